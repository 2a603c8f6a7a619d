"""Files of an earlier version load, resume and sample as they did: golden/runs.tar.xz, see `old_runs`."""

import json
import tarfile

import numpy as np
import pytest
import torch
from helpers import assert_one_clear_error, invoke, run
from old_runs import ROOT, RUNS, STATE, sample, train

import train as script
from training.checkpoint import load_network

FAST = ('mcd', 'tcm')  # those whose states hold most; the others in the slow suite
LAST = 'network-snapshot-000000-256.pkl'


@pytest.fixture(scope='module')
def old(tmp_path_factory):
    folder = tmp_path_factory.mktemp('old')
    with tarfile.open(ROOT / 'tests/golden/runs.tar.xz') as archive:
        archive.extractall(folder, filter='data')
    return folder / 'runs'


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """The data that they were trained on."""
    path = tmp_path_factory.mktemp('data') / 'digits.zip'
    run('dataset_tool.py', '--source=digits', f'--dest={path}', '--max-images=256')
    return path


@pytest.mark.parametrize('name', RUNS)
def test_snapshots_sample_the_same_images(old, tmp_path, name):
    """To rounding: other processors multiply matrices in another order."""
    sample(old / name / LAST, tmp_path / 'images.npz')
    with np.load(tmp_path / 'images.npz') as now, np.load(old / name / 'images.npz') as then:
        np.testing.assert_allclose(now['images'], then['images'], rtol=0, atol=1e-3 * then['images'].std())


@pytest.mark.parametrize(
    'name', [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_states_resume_to_the_weights_they_came_to(old, images, tmp_path, name):
    """Metadata are equal; weights to rounding, which on the machine that made them is none."""
    (tmp_path / name).mkdir()
    for path in (old / name).iterdir():
        if path.name in (STATE, 'training_options.json', 'stats.jsonl'):
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    train(name, images, tmp_path / name, old, f'--resume={tmp_path / name}')
    now, then = load_network(tmp_path / name / LAST), load_network(old / name / LAST)
    for key, weights in then.state_dict().items():
        torch.testing.assert_close(now.state_dict()[key], weights, rtol=1e-3, atol=1e-5)
    assert {**now.metadata, 'digest': None, 'dataset_kwargs': None} == {
        **then.metadata,
        'digest': None,
        'dataset_kwargs': None,
    }


@pytest.mark.parametrize('name', RUNS)
def test_a_resume_by_the_folder_alone_keeps_all_that_the_run_recorded(old, images, name):
    """Only data and teacher have moved, and are named again. Nothing that has become another default is taken."""
    recorded = json.loads((old / name / 'training_options.json').read_text())
    teacher = dict(tcm='ect').get(name, 'diffusion')
    moved = [f'--teacher={old / teacher / LAST}'] if recorded['teacher'] else []
    result = invoke(script.main, f'--resume={old / name}', f'--data={images}', *moved, '--dry-run')
    assert result.exit_code == 0, result.output
    now = json.loads(result.stdout)
    places = {'dataset', 'teacher', 'resume', 'run_dir', 'transfer'}
    assert {key: now[key] for key in recorded.keys() - places} == {
        key: recorded[key] for key in recorded.keys() - places
    }


def test_a_solver_that_an_old_run_did_not_have_makes_another_run(old, images):
    """It took Heun's steps. --val_solver is another option."""
    moved = [f'--data={images}', f'--teacher={old / "diffusion" / LAST}']
    result = invoke(script.main, f'--resume={old / "direct"}', *moved, '--solver=dpmpp', '--dry-run')
    assert_one_clear_error(result, 'another run with solver heun -> dpmpp')
