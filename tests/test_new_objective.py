"""docs/new-objective.md, followed to the letter in a copy of the repository: what it says follows does follow."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from helpers import FAST, ROOT, TINY_NETWORK, assert_one_clear_error
from pages import blocks

PAGE = ROOT / 'docs' / 'new-objective.md'
OBJECTIVE = [*FAST, '--objective=midpoint', '--S=2', '--batch=64', '--tick=10', '--lr=1e-3', '--ema=10kimg']
# Runs commands one after the other: importing PyTorch for each would take longer than they do.
DRIVER = """
import importlib, json, sys
from click.testing import CliRunner
for script, *arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(importlib.import_module(script).main, arguments, prog_name=f'{script}.py')
    print(json.dumps(dict(returncode=result.exit_code, stdout=result.stdout, stderr=result.stderr)))
"""


class Result:
    def __init__(self, returncode, stdout, stderr):
        self.returncode, self.stdout, self.stderr = returncode, stdout, stderr


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    """The repository with the page's file and its two lines, and nothing else."""
    folder = tmp_path_factory.mktemp('copy') / 'repository'
    unneeded = shutil.ignore_patterns('.*', '*.egg-info', 'tests', 'images', '__pycache__', '*-out*')
    shutil.copytree(ROOT, folder, ignore=unneeded)
    ((module, _),) = blocks(PAGE, 'python')
    objectives = folder / 'training' / 'objectives'
    (objectives / 'loss_midpoint.py').write_text(module)
    registry = objectives / '__init__.py'
    imported, entry = re.findall(r'^    (.*loss_midpoint.*,)$', PAGE.read_text(), re.M)
    text = registry.read_text()
    for line, after in ((imported, 'from training.objectives import (\n'), (entry, 'OBJECTIVES = {\n')):
        assert after in text
        text = text.replace(after, f'{after}    {line}\n')
    registry.write_text(text)
    return folder


def run_in(copy, *commands):
    """The results of commands, each a script and its arguments, in a new interpreter in the copy."""
    done = subprocess.run(
        [
            sys.executable,
            '-W',
            'ignore',
            '-c',
            DRIVER,
            json.dumps([[str(word) for word in c] for c in commands]),
        ],
        cwd=copy,
        env=dict(PYTHONPATH=str(copy), OMP_NUM_THREADS='1', PATH='/usr/bin:/bin', HOME=str(copy)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [Result(**json.loads(line)) for line in done.stdout.splitlines()]


def test_the_two_files_are_enough_to_train_resume_and_sample(copy, digits, teacher, tmp_path):
    train = ['train', f'--data={digits}', '--cond=1', *OBJECTIVE]
    distill = [*train, f'--teacher={teacher}', f'--outdir={tmp_path / "run"}']
    snapshot = tmp_path / 'run' / 'network-snapshot-000000.pkl'
    trained, resumed, refused, sampled, foreign, wrong = run_in(
        copy,
        [*distill, '--middle=0.4', '--duration=0.000256'],
        [*distill, '--middle=0.4', '--duration=0.000512', f'--resume={tmp_path / "run"}'],
        [*distill, '--middle=0.6', '--duration=0.000768', f'--resume={tmp_path / "run"}'],
        ['generate', f'--network={snapshot}', f'--outdir={tmp_path / "images"}', '--seeds=0-3'],
        ['train', f'--data={digits}', '--objective=mcd', '--middle=0.4', f'--outdir={tmp_path}', *TINY_NETWORK],
        [*distill, '--middle=2'],
    )  # fmt: skip
    for result in (trained, resumed, sampled):
        assert result.returncode == 0, result.stderr
    assert_one_clear_error(refused, 'middle')
    assert_one_clear_error(foreign, '--middle', 'mcd', status=2)
    assert_one_clear_error(wrong, '--middle', status=2)

    # Recorded, logged and sampled in the student's own number of steps.
    recorded = json.loads((tmp_path / 'run' / 'training_options.json').read_text())
    assert recorded['loss']['middle'] == 0.4 and recorded['loss']['keep_ties']
    ticks = [json.loads(line) for line in (tmp_path / 'run' / 'stats.jsonl').read_text().splitlines()]
    assert ticks[-1]['Loss/midpoint']['mean'] > 0
    assert len(list((tmp_path / 'images').glob('*.png'))) == 4 and '2' in sampled.stdout


def test_help_the_table_of_options_and_the_budget_of_compare_know_it(copy):
    code = """
from click.testing import CliRunner
import train
from docs import generate_options
from experiments.comparison import cost_of
print(CliRunner().invoke(train.main, ['--objective=midpoint', '--help']).stdout)
print(*(line for line in generate_options.page().splitlines() if '`--middle`' in line))
print('cost', cost_of('midpoint', ['--objective=midpoint', '--teacher=x'])[0])
"""
    done = subprocess.run(
        [sys.executable, '-c', code],
        cwd=copy,
        env=dict(PYTHONPATH=str(copy), PATH='/usr/bin:/bin', HOME=str(copy)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert '--middle' in done.stdout and '| `--middle` |' in done.stdout
    assert 'cost 6\n' in done.stdout or 'cost 6.0\n' in done.stdout
