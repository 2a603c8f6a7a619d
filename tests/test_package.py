"""What `pip install` gives: modules under the names of the checkout, and commands that work from any folder."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, SCRIPTS

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    tomllib = None


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """The folder in which pip has installed what the Dockerfile copies, without its dependencies."""
    source, target = (tmp_path_factory.mktemp('package') / name for name in ('source', 'target'))
    left_out = [line.removeprefix('**/') for line in (ROOT / '.dockerignore').read_text().split()]
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*left_out))
    done = subprocess.run(
        [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-build-isolation', '--no-index',
         '--disable-pip-version-check', f'--target={target}', source],
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return target


def call(installed, *command, folder):
    """A command in a folder of its own, with the installed files in the place of these."""
    env = {**os.environ, 'PYTHONPATH': str(installed), 'OMP_NUM_THREADS': '1'}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def test_all_modules_and_scripts_are_installed(installed):
    """As in the checkout, down to the last file."""
    rooms = ('training', 'metrics', 'sampling', 'data', 'torch_utils', 'dnnlib', 'experiments')
    wanted = {
        path.relative_to(ROOT)
        for path in (*ROOT.glob('*.py'), *(path for room in rooms for path in (ROOT / room).rglob('*.py')))
        if path.name != 'example.py'
    }
    assert {path.relative_to(installed) for path in installed.rglob('*.py')} == wanted


def test_commands_work_from_any_folder(installed, tmp_path):
    """Up to the demo, which starts other scripts: one after the other, a data set, its record, a run's."""
    commands = {path.name for path in (installed / 'bin').iterdir()}
    assert commands == {f'edm-{name.removesuffix(".py").replace("_", "-")}' for name in SCRIPTS}
    command = lambda name, *arguments: call(
        installed, sys.executable, installed / 'bin' / name, *arguments, folder=tmp_path
    )
    made = command('edm-dataset-tool', '--source=digits', '--dest=digits.zip')
    assert made.returncode == 0 and (tmp_path / 'digits.zip').exists(), made.stderr
    planned = command(
        'edm-train', '--data=digits.zip', '--cond=1', '--outdir=runs', '--arch=adm', '--cres=1,2', '--dry-run'
    )
    assert planned.returncode == 0 and '"objective": "diffusion"' in planned.stdout, planned.stderr
    refused = command('edm-train', '--outdir=runs')
    assert refused.returncode == 2 and refused.stderr.startswith('Usage: edm-train')


def test_torchrun_starts_an_installed_script_as_a_module(installed, tmp_path):
    """`torchrun -m train`: its processes start so."""
    done = call(installed, sys.executable, '-m', 'train', '--help', folder=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith('Usage: ')


@pytest.mark.skipif(tomllib is None, reason='tomllib needs Python 3.11')
def test_every_script_has_a_command():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())
    names = [name.removesuffix('.py') for name in SCRIPTS]
    assert project['project']['scripts'] == {
        f'edm-{name.replace("_", "-")}': f'{name}:main' for name in names
    }
    assert sorted(project['tool']['setuptools']['py-modules']) == sorted(names)
