"""Objectives with a second network that trains: as real processes, interrupted, on two ranks, divided, and in half
precision; and steps that are not finite."""

import json
import math
import signal
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_one_clear_error, lines, run, run_ranks
from runs import Process, ticks

from dnnlib import UserError
from training import samplers
from training.checkpoint import load_network, load_state
from training.run_files import saved_snapshots, saved_states
from training.setup import Run

COMMON = [
    *(
        '--cond=1',
        '--workers=0',
        '--batch=32',
        '--lr=1e-3',
        '--lr_schedule=constant',
        '--lr_rampup=0',
        '--ema=1kimg',
    ),
    *('--seed=3', '--dropout=0.1', '--tick=0.064', '--snap=1', '--dump=1', '--nosubdir', '--sample_grid=0'),
]
OWN = {'mm': ['--objective=mm', '--S=4', '--aux_ahead=2'], 'sid': ['--objective=sid', '--aux_lr=2e-3']}
STEPS = 12


def arguments(name, folder, digits, teacher, *extra, steps=STEPS):
    source = [f'--outdir={folder}', f'--data={digits}', f'--teacher={teacher}']
    return ['train.py', *source, *COMMON, *OWN[name], f'--duration={steps * 32}img', *extra]


def losses(folder, name):
    """Both networks', tick by tick, of two steps each."""
    found = [
        [tick.get(f'Loss/{of}', {}).get('mean', math.nan) for of in (name, 'auxiliary')]
        for tick in lines(folder / 'stats.jsonl')
    ]
    return torch.tensor(found, dtype=torch.float64)


def weights(folder):
    """The student's average, and everything that the newest state holds of both networks."""
    state = load_state(saved_states(folder)[0])
    moments = [part['update']['optimizer']['state'][0] for part in (state, state['auxiliary'])]
    tensors = [
        *load_network(saved_snapshots(folder)[0]).state_dict().values(),
        *state['net'].values(),
        *state['auxiliary']['net'].values(),
        *(tensor for each in moments for tensor in each.values()),
    ]
    return torch.cat([tensor.double().flatten() for tensor in tensors])


@pytest.fixture(scope='module')
def whole(digits, teacher, tmp_path_factory):
    """Runs of one process that nothing stopped, by name."""
    folders = {name: tmp_path_factory.mktemp(name) for name in OWN}
    for name, folder in folders.items():
        run(*arguments(name, folder, digits, teacher))
    return folders


@pytest.mark.parametrize('name', OWN)
def test_a_run_that_a_signal_stops_resumes_bit_for_bit(tmp_path, digits, teacher, whole, name):
    """In the middle of a tick, in either network's turn."""
    process = Process(arguments(name, tmp_path, digits, teacher))
    process.wait_for(lambda: ticks(tmp_path) >= 2)
    process.popen.send_signal(signal.SIGTERM)
    assert process.end()[0] == 75
    run('train.py', f'--resume={tmp_path}')
    assert torch.equal(weights(tmp_path), weights(whole[name]))
    assert torch.equal(losses(tmp_path, name).nan_to_num(), losses(whole[name], name).nan_to_num())


@pytest.mark.parametrize('name', ['mm', pytest.param('sid', marks=pytest.mark.slow)])
def test_two_processes_resume_bit_for_bit(tmp_path, digits, teacher, name):
    two, half = tmp_path / 'two', tmp_path / 'half'
    run_ranks(2, *arguments(name, two, digits, teacher))
    run_ranks(2, *arguments(name, half, digits, teacher, steps=STEPS // 2 + 1))
    run_ranks(2, *arguments(name, half, digits, teacher, f'--resume={half}'))
    assert torch.equal(weights(half), weights(two))


@pytest.mark.slow
@pytest.mark.parametrize('name', OWN)
def test_two_processes_come_to_the_losses_of_one(tmp_path, digits, teacher, name):
    """Without dropout, whose masks depend on the split."""
    one = tmp_path / 'one'
    plain = ('--dropout=0', '--precision=fp64', '--lr=1e-5', '--aux_lr=1e-5')
    run(*arguments(name, one, digits, teacher, *plain))
    for extra in ((), ('--shard=optimizer',)):
        folder = tmp_path / f'two{len(extra)}'
        run_ranks(2, *arguments(name, folder, digits, teacher, *plain, *extra))
        torch.testing.assert_close(losses(folder, name), losses(one, name), rtol=1e-7, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize('name', OWN)
def test_half_precision_trains_both_networks_alike(tmp_path, digits, teacher, whole, name):
    run(*arguments(name, tmp_path, digits, teacher, '--precision=bf16'))
    found, plain = losses(tmp_path, name), losses(whole[name], name)
    torch.testing.assert_close(found[:, 1], plain[:, 1], rtol=0.15, atol=0, equal_nan=True)
    assert not torch.equal(found, plain)


@pytest.mark.slow
@pytest.mark.parametrize('name', OWN)
def test_compiled_and_checkpointed_runs_have_the_same_losses(tmp_path, digits, teacher, whole, name):
    """Weights of the network whose turn it is not are frozen, in the code that is compiled and computed again too."""
    for extra in ('--checkpoint-activations', '--compile'):
        run(*arguments(name, tmp_path / extra, digits, teacher, extra), timeout=900)
        found = losses(tmp_path / extra, name)
        torch.testing.assert_close(found, losses(whole[name], name), rtol=2e-3, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize('name', OWN)
def test_a_learning_rate_of_the_auxiliary_network_is_its_own(tmp_path, digits, teacher, whole, name):
    """It stays near the teacher at a rate of a hundredth. (At the teacher itself the student's gradient would be 0.)"""
    run(*arguments(name, tmp_path, digits, teacher, '--aux_lr=1e-5', '--dropout=0'))
    state = load_state(saved_states(tmp_path)[0])
    start = load_network(teacher).state_dict()
    moved = lambda net: max((net[key] - start[key]).abs().max().item() for key in start)
    assert 0 < moved(state['auxiliary']['net']) < 1e-3 < moved(state['net'])
    # As many steps as each had turns.
    steps = [int(part['update']['optimizer']['state'][0]['step']) for part in (state, state['auxiliary'])]
    assert steps == ([5, 7] if name == 'mm' else [6, 6])


def test_a_rate_that_is_not_given_follows_the_students_also_on_resume(tmp_path, digits, teacher):
    """And a resumed run may change it, as it may --lr."""
    command = arguments('sid', tmp_path, digits, teacher, steps=2)
    run(*(word for word in command if not word.startswith('--aux_lr')))
    for extra in ('--lr=1e-5', '--aux_lr=3e-6'):
        shown = run('train.py', f'--resume={tmp_path}', extra, f'--duration={4 * 32}img', '--dry-run')
        c = json.loads(shown.stdout)
        assert (c['lr'], c['loss']['aux_lr']) == ((1e-5, None) if extra.startswith('--lr') else (1e-3, 3e-6))


@pytest.mark.parametrize('rate', ['--lr', '--aux_lr'])
def test_steps_that_are_not_finite_stop_a_run_whichever_network_takes_them(tmp_path, digits, teacher, rate):
    """Once a network has overflowed, so has every loss: neither changes any more."""
    extra = (f'{rate}=1e38', '--max-bad-steps=4', '--dropout=0')
    done = run(*arguments('sid', tmp_path, digits, teacher, *extra, steps=40), check=False)
    assert_one_clear_error(done, 'steps in a row had a loss or gradient that is not finite')
    skipped = [tick['Progress/auxiliary_bad_steps']['mean'] for tick in lines(tmp_path / 'stats.jsonl')]
    assert skipped[0] == 0


def test_a_run_counts_the_longest_of_its_networks_skips():
    of = lambda count: SimpleNamespace(update=SimpleNamespace(consecutive_skips=torch.tensor(count)))
    run = Run(**dict.fromkeys(Run._fields) | dict(student=of(2), auxiliary=of(5)))
    assert run.consecutive_skips == 5 and run._replace(auxiliary=None).consecutive_skips == 2


@pytest.mark.parametrize(
    ('extra', 'words'), [(['--aux_ahead=11'], '--aux_ahead=11'), (['--sigma_init=100'], '--sigma_init=100')]
)
def test_a_run_that_would_not_train_the_student_or_leave_its_levels_is_refused(
    tmp_path, digits, teacher, extra, words
):
    done = run(*arguments('sid', tmp_path / 'run', digits, teacher, *extra), check=False)
    assert_one_clear_error(done, words)
    assert not (tmp_path / 'run').exists()


# ----------------------------------------------------------------------------
# Snapshots.


@pytest.mark.parametrize(
    ('options', 'levels'),
    [
        (dict(), [2.5]),
        (dict(rho=5.0), [2.5]),
        (dict(sigma_min=0.01), [2.5]),
        (dict(sigma_max=10.0), [10.0]),
        (dict(solver='cm', taus=[0.8]), [2.5, 0.8]),
        (dict(steps=2, force_steps=True), [2.5, 0.002]),
    ],
)
def test_a_student_of_one_step_begins_at_its_own_level(whole, options, levels):
    """Whatever else of the grid is changed."""
    net, seen = load_network(saved_snapshots(whole['sid'])[0]), []
    net.register_forward_pre_hook(lambda _, given: seen.append(float(given[1])))
    samplers.sample(net, torch.zeros(1, 1, 8, 8), torch.eye(10)[:1], **options)
    assert seen == pytest.approx(levels)


def test_ancestral_steps_are_for_students_of_them_and_for_teachers(whole, teacher):
    mm, sid, plain = (
        load_network(path) for path in (*(saved_snapshots(whole[name])[0] for name in OWN), teacher)
    )
    assert samplers.resolve(mm, None, None) == ('ancestral', 4)
    assert samplers.resolve(plain, 'ancestral', None) == ('ancestral', 18)
    assert samplers.resolve(plain, 'ancestral', None, sigmas=[80.0, 2.0, 0.5]) == ('ancestral', 3)
    for net, solver, options in (
        (mm, 'student', {}),
        (mm, 'cm', {}),
        (sid, 'ancestral', {}),
        (plain, 'ancestral', dict(steps=9, sigmas=[80.0, 2.0])),
    ):
        with pytest.raises(UserError, match='leave out'):
            samplers.resolve(net, solver, options.pop('steps', None), **options)


def test_a_student_of_ancestral_steps_is_no_round_of_progressive_distillation(whole, digits, tmp_path):
    network = saved_snapshots(whole['mm'])[0]
    rounds = ['--objective=pd', '--sigma_grid=cosine', '--S_start=2', '--S=1', '--stage_steps=2']
    done = run(
        'train.py',
        f'--outdir={tmp_path}',
        f'--data={digits}',
        '--cond=1',
        f'--teacher={network}',
        *rounds,
        check=False,
    )
    assert_one_clear_error(done, 'is a student of 4 steps itself')
