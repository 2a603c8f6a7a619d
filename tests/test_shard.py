"""--shard=optimizer: the same training as undivided, on any number of processes, in less memory."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import FAST, TINY_NETWORK, assert_one_clear_error, invoke, lines, run_ranks
from PIL import Image

import train
from dnnlib import EasyDict, UserError
from torch_utils.flat import FlatParameters
from training import setup
from training.checkpoint import load_network, load_state
from training.objectives.loss import State
from training.run_files import saved_states

BATCH, STEPS = 32, 8
COMMON = [
    '--cond=1',
    *FAST,
    f'--batch={BATCH}',
    f'--duration={STEPS * BATCH / 1e6}',
    '--tick=0.128',
    '--snap=1',
    '--dump=1',
    '--keep=9',
    '--augment=0',
    '--ema=1kimg',
    '--phema=0.1,0.2',
    '--lr=1e-3',
    '--grad-clip=1',
]
EDM2 = ['--arch=edm2', '--cbase=16', '--cres=1,2', '--num_blocks=1', '--attn_resolutions=8', '--dropout=0']
DIVIDED = '--shard=optimizer'


def losses(folder) -> list[float]:
    return [
        next(v['mean'] for k, v in tick.items() if k.startswith('Loss/'))
        for tick in lines(folder / 'stats.jsonl')
    ]


def assert_same_state(ours, theirs) -> None:
    """Of all networks, moments and averages: the same entries, shapes and types, and values to rounding."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for name in ours:
            assert_same_state(ours[name], theirs[name])
    elif torch.is_tensor(ours):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope='module')
def runs(digits, tmp_path_factory):
    """Two processes, undivided and divided, in two rounds of gradients."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ('whole', 'divided')}
    for name, folder in folders.items():
        options = [
            *TINY_NETWORK,
            '--batch-gpu=8',
            '--sample_grid=4',
            *([DIVIDED] if name == 'divided' else []),
        ]
        run_ranks(2, 'train.py', f'--outdir={folder}', f'--data={digits}', *COMMON, *options)
    return folders


def test_two_processes_come_to_the_losses_and_states_of_an_undivided_run(runs):
    whole, divided = runs['whole'], runs['divided']
    assert losses(divided) == pytest.approx(losses(whole), rel=1e-5) and len(losses(whole)) == 3
    ours, theirs = (load_state(saved_states(folder)[0]) for folder in (divided, whole))
    for part in ('net', 'update', 'averages', 'loss'):
        assert_same_state(ours[part], theirs[part])
    assert json.loads(ours['options'])['shard'] == 'optimizer'
    distances = [name for name in lines(whole / 'stats.jsonl')[-1] if name.startswith('EMA/')]
    last = [lines(folder / 'stats.jsonl')[-1] for folder in (divided, whole)]
    for name in ('Progress/grad_norm', *distances):
        ours, theirs = (tick[name]['mean'] for tick in last)
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6), name


def test_snapshots_are_those_of_undivided_networks(runs):
    paths = [sorted(folder.glob('network-snapshot-*.pkl')) for folder in runs.values()]
    assert [path.name for path in paths[0]] == [path.name for path in paths[1]] and len(paths[0]) == 9
    for a, b in zip(*paths):
        a, b = load_network(a), load_network(b)
        assert type(a) is type(b) and vars(a).keys() == vars(b).keys()
        torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=1e-3, atol=1e-5)


def test_pictures_of_samples_are_the_same(runs):
    paths = [sorted(folder.glob('samples-*.png')) for folder in runs.values()]
    assert [path.name for path in paths[0]] == [path.name for path in paths[1]] and len(paths[0]) == 3
    for a, b in zip(*paths):
        a, b = (np.asarray(Image.open(path)).astype(int) for path in (a, b))
        assert abs(a - b).max() <= 1


def test_a_divided_state_resumes_undivided_in_one_process(runs, digits, tmp_path):
    """From the middle, to the losses of the run that was not interrupted."""
    middle = saved_states(runs['divided'])[-1]
    (tmp_path / middle.name).write_bytes(middle.read_bytes())
    invoke(
        train.main, f'--resume={tmp_path / middle.name}', f'--data={digits}', '--shard=none', '--batch-gpu=32'
    )
    assert losses(tmp_path) == pytest.approx(losses(runs['whole'])[-len(losses(tmp_path)) :], rel=1e-4)


def test_a_state_of_one_process_resumes_divided_among_four(digits, tmp_path):
    """EDM2's networks: scalars are not divided, and weights are normalized outside of the network."""
    # Large steps, which change the norm of weights.
    options = [f'--data={digits}', *COMMON, *EDM2, '--lr=0.02', '--lr_schedule=constant']
    assert invoke(train.main, f'--outdir={tmp_path / "one"}', *options).exit_code == 0
    middle = saved_states(tmp_path / 'one')[-1]
    (tmp_path / 'four').mkdir()
    (tmp_path / 'four' / middle.name).write_bytes(middle.read_bytes())
    run_ranks(4, 'train.py', f'--resume={tmp_path / "four" / middle.name}', f'--data={digits}', DIVIDED)
    one, four = losses(tmp_path / 'one'), losses(tmp_path / 'four')
    assert four == pytest.approx(one[-len(four) :], rel=1e-4)
    ours, theirs = (load_state(saved_states(tmp_path / name)[0]) for name in ('four', 'one'))
    for part in ('net', 'update', 'averages'):
        assert_same_state(ours[part], theirs[part])


@pytest.mark.slow
def test_a_target_network_is_divided_too_and_resumes_undivided(digits, tmp_path):
    """Of consistency training: its average, by which the loss is, comes to that of an undivided run."""
    target = ['--objective=cm-ct', '--mu0=0.9', '--cm_loss=l2', '--N=8', '--batch-gpu=8']
    options = [f'--data={digits}', *COMMON, *TINY_NETWORK, *target]
    for name, more in (('whole', []), ('divided', [DIVIDED])):
        run_ranks(2, 'train.py', f'--outdir={tmp_path / name}', *options, *more)
    assert losses(tmp_path / 'divided') == pytest.approx(losses(tmp_path / 'whole'), rel=1e-4)
    ours, theirs = (load_state(saved_states(tmp_path / name)[0]) for name in ('divided', 'whole'))
    for part in ('net', 'averages', 'loss'):
        assert_same_state(ours[part], theirs[part])
    lag = [(ours['loss']['target'][name] - value).abs().max() for name, value in ours['net'].items()]
    assert max(lag) > 1e-4, 'no more than what counts as equal'

    # From the middle: the divided run in one process, and the undivided one divided.
    resumed = {'divided': (1, ['--shard=none', '--batch-gpu=32']), 'whole': (2, [DIVIDED])}
    for name, (processes, more) in resumed.items():
        middle, folder = saved_states(tmp_path / name)[-1], tmp_path / f'{name}, resumed'
        folder.mkdir()
        (folder / middle.name).write_bytes(middle.read_bytes())
        run_ranks(processes, 'train.py', f'--resume={folder / middle.name}', f'--data={digits}', *more)
        assert losses(folder) == pytest.approx(losses(tmp_path / 'whole')[-len(losses(folder)) :], rel=1e-4)
        assert_same_state(load_state(saved_states(folder)[0])['loss'], theirs['loss'])


def test_an_objective_that_does_not_divide_its_own_network_is_refused():
    class Own(State):
        def networks(self):
            return [torch.nn.Linear(1, 1)]

    weights = FlatParameters(torch.nn.Linear(1, 1))
    with pytest.raises(UserError, match='--objective=own keeps a network of its own'):
        setup.divide_others(EasyDict(objective='own'), weights, Own())


def test_what_cannot_be_divided_is_an_error_or_a_line(digits, tmp_path):
    options = [f'--data={digits}', f'--outdir={tmp_path}', DIVIDED, *TINY_NETWORK, *COMMON]
    wrong = CliRunner().invoke(train.main, [*options, '--compile'])
    assert_one_clear_error(wrong, '--compile', status=2)
    alone = invoke(train.main, *options, '--duration=0.000032')
    assert '--shard=optimizer is for several processes' in alone.stdout
