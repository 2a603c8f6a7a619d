"""Fixtures that tests share."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from golden import golden_numbers
from helpers import FAST, TINY_NETWORK, run, run_ranks
from objective_runs import RUNS, SHORT
from programs import PipedProgram
from runs import command

from experiments import runner
from training.saved_files import saved_snapshots


@pytest.fixture(scope='session')
def fixtures() -> Path:
    """The folder of golden files that other projects' code computed."""
    folder = Path(__file__).resolve().parents[2] / 'shared' / 'fixtures'
    if not folder.is_dir():
        pytest.skip('the shared fixtures are not beside this checkout')
    return folder


@pytest.fixture(scope='session')
def numerics():
    return golden_numbers('numerics.npz')


@pytest.fixture(scope='session')
def family():
    return golden_numbers('family.npz')


@pytest.fixture(scope='session')
def digits(tmp_path_factory) -> Path:
    """The first 400 digits as a data set: every command reads all headers when it begins."""
    path = tmp_path_factory.mktemp('data') / 'digits.zip'
    run('dataset_tool.py', '--source=digits', '--max-images=400', f'--dest={path}')
    return path


@pytest.fixture(scope='session')
def teacher(digits, tmp_path_factory) -> Path:
    """A snapshot of a small digits teacher that has seen next to nothing."""
    folder = tmp_path_factory.mktemp('teacher')
    run(
        'train.py',
        f'--outdir={folder}',
        f'--data={digits}',
        '--cond=1',
        *TINY_NETWORK,
        *FAST,
        '--batch=64',
        '--duration=0.00128',
        '--tick=10',
        '--augment=0',
        '--ema=10kimg',
        '--lr=2e-3',
        '--dump=0',
    )
    return max(folder.glob('network-snapshot-*.pkl'))


@pytest.fixture(scope='session')
def consistency_model(digits, tmp_path_factory) -> Path:
    """A snapshot of easy consistency tuning that has seen next to nothing."""
    folder = tmp_path_factory.mktemp('consistency')
    options = [*SHORT, *RUNS['ect'], '--duration=0.00064']
    run('train.py', f'--outdir={folder}', f'--data={digits}', '--objective=ect', *options)
    return saved_snapshots(folder)[0]


@pytest.fixture(scope='session')
def rulers(digits, tmp_path_factory) -> Path:
    """A folder with pca.pt and pca.npz: a feature detector and the digits' statistics under it."""
    folder = tmp_path_factory.mktemp('rulers')
    run('-m', 'metrics.small_detectors', f'--data={digits}', f'--outdir={folder}')
    run(
        'fid.py',
        'ref',
        f'--data={digits}',
        f'--dest={folder / "pca.npz"}',
        f'--detector={folder / "pca.pt"}',
        '--batch=256',
    )
    return folder


@pytest.fixture(scope='session')
def whole(digits, tmp_path_factory) -> Path:
    """An uninterrupted run of one process (see `runs.command`)."""
    folder = tmp_path_factory.mktemp('whole')
    run(*command(digits, folder))
    return folder


@pytest.fixture(scope='session')
def whole_of_two(digits, tmp_path_factory) -> Path:
    """And of two."""
    folder = tmp_path_factory.mktemp('whole2')
    run_ranks(2, *command(digits, folder))
    return folder


@pytest.fixture
def forked_commands(monkeypatch):
    """demo.py and compare.py start their commands as `programs.Program` does."""
    popen = SimpleNamespace(Popen=PipedProgram, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(runner, 'subprocess', popen)
