"""The project's own files: one list of dependencies, a clean linter."""

import ast
import fnmatch
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    tomllib = None


def test_the_linter_is_content():
    done = subprocess.run(
        [sys.executable, '-m', 'ruff', 'check', '.'], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_the_formatter_has_nothing_to_do():
    done = subprocess.run(
        [sys.executable, '-m', 'ruff', 'format', '--diff', '.'], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_arrows_between_rooms_go_down():
    """The contract in pyproject.toml: who may import whom."""
    done = subprocess.run(
        [Path(sys.executable).with_name('lint-imports'), '--no-cache'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and '1 kept' in done.stdout, done.stdout


@pytest.mark.parametrize(
    'folder', ['.', 'experiments', 'training', 'metrics', 'sampling', 'data', 'torch_utils', 'dnnlib']
)
def test_no_script_is_imported(folder):
    """What scripts share lies in the rooms."""
    scripts, found = {path.stem for path in ROOT.glob('*.py')}, set()
    for path in (ROOT / folder).glob('*.py' if folder == '.' else '**/*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [getattr(node, 'module', None)]
            )
            found |= {
                (path.stem, name)
                for name in names
                if name in scripts and isinstance(node, (ast.Import, ast.ImportFrom))
            }
    assert not found


def test_conda_installs_the_one_list_of_dependencies_under_the_tested_versions():
    environment = yaml.safe_load((ROOT / 'environment.yml').read_text())
    assert environment['name'] == 'edm'
    (pip,) = (item['pip'] for item in environment['dependencies'] if isinstance(item, dict))
    assert pip == ['-c constraints.txt', '-e .[dev]']
    assert not {'torch', 'pytorch', 'numpy', 'scipy'} & {str(item) for item in environment['dependencies']}


@pytest.mark.skipif(tomllib is None, reason='tomllib needs Python 3.11')
def test_every_dependency_has_a_tested_version():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    name = lambda requirement: re.match(r'[A-Za-z0-9_.-]+', requirement)[0].lower()
    wanted = {name(r) for r in [*project['dependencies'], *project['optional-dependencies']['dev']]}
    pinned = {
        name(line)
        for line in (ROOT / 'constraints.txt').read_text().splitlines()
        if line and not line.startswith('#')
    }
    assert wanted <= pinned
    assert {
        'torch',
        'numpy',
        'scipy',
        'click',
        'pillow',
        'wandb',
        'psutil',
        'requests',
        'scikit-learn',
        'matplotlib',
        'tqdm',
    } <= wanted


def test_the_tested_torch_is_installed():
    import torch

    pinned = re.search(r'^torch==(\S+)', (ROOT / 'constraints.txt').read_text(), re.M)[1]
    assert torch.__version__.split('+')[0] == pinned


def test_default_output_folders_are_none_of_the_repositorys_files():
    """Neither git nor an image of Docker takes them in."""
    folders = set()
    for script in (*ROOT.glob('*.py'), *ROOT.glob('experiments/*.py')):
        folders |= set(re.findall(r"'([a-z]+-(?:out|photos))'", script.read_text())) - {'held-out'}
    assert folders == {'compare-out', 'compare-photos', 'demo-out', 'evidence-out', 'guidance-out'}
    paths = [f'{name}{more}/a.pkl' for name in folders for more in ('', '-2')]
    done = subprocess.run(['git', 'check-ignore', *paths], cwd=ROOT, capture_output=True, text=True)
    assert set(done.stdout.split()) == set(paths)
    left_out = (ROOT / '.dockerignore').read_text().split()
    assert all(any(fnmatch.fnmatch(name, line) for line in left_out) for name in folders)


def test_the_license_is_named():
    text = (ROOT / 'LICENSE.txt').read_text()
    assert (
        'CC-BY-NC-SA-4.0' in text
        and 'https://creativecommons.org/licenses/by-nc-sa/4.0/' in text
        and 'EDM' in text
    )
