"""train.py --budget: the duration that fits into the hours, by the measured step."""

import functools
import json
import os
import re
import signal

import helpers
import pytest
import torch
from helpers import FAST, TINY_NETWORK, assert_one_clear_error, run, run_ranks
from runs import LAUNCHER, Process

import train
from training import budget, command_line, same_run
from training.checkpoint import load_network
from training.objectives import OBJECTIVES
from training.saved_files import saved_states

invoke = functools.partial(helpers.invoke, train.main)
HOURS = 0.0004  # 1.4 seconds


def options(digits, folder, *others):
    return [f'--outdir={folder}', f'--data={digits}', '--cond=1', *TINY_NETWORK, *FAST, '--batch=32', *others]


def recorded(folder):
    return json.loads((folder / 'training_options.json').read_text())


@pytest.fixture
def a_second_a_step(monkeypatch):
    """As if every step took a second."""
    monkeypatch.setattr(budget, 'measure_step', lambda *_: (1.0, 5))


@pytest.fixture(scope='module')
def spent(digits, tmp_path_factory):
    """(folder, what it printed) of a run with a budget."""
    folder = tmp_path_factory.mktemp('spent')
    done = run('train.py', *options(digits, folder, '--augment=0.12', f'--budget={HOURS}'))
    return folder, done


def test_the_duration_is_printed_and_recorded_and_the_hours_are_not(spent):
    folder, done = spent
    ms, steps, mimg = re.search(
        r'takes ([\d.e+]+) ms here \(\d+ measured\).* are ([\d,]+) steps: --duration=(\S+) ', done.stderr
    ).groups()
    steps = int(steps.replace(',', ''))
    assert steps == pytest.approx(3600 * HOURS / (float(ms) / 1e3), rel=0.01, abs=1)
    assert recorded(folder)['total_nimg'] == steps * 32 == round(float(mimg) * 1e6)
    assert 'budget' not in (folder / 'training_options.json').read_text()
    assert '--budget' not in done.stdout and 'Training for' in done.stdout


def test_measuring_leaves_no_trace_in_the_run(spent, digits, tmp_path):
    """The same weights as with the duration, bit for bit: random numbers, data and statistics begin anew."""
    folder, _ = spent
    duration = recorded(folder)['total_nimg'] / 1e6
    run('train.py', *options(digits, tmp_path, '--augment=0.12', f'--duration={duration!r}'))
    first, second = (max(where.glob('network-snapshot-*.pkl')) for where in (folder, tmp_path))
    ours, theirs = (load_network(path).state_dict() for path in (first, second))
    assert first.name == second.name and all(torch.equal(ours[name], theirs[name]) for name in ours)
    stats = lambda where: [
        {key: value for key, value in record.items() if key.startswith('Loss/')}
        for record in helpers.lines(where / 'stats.jsonl')
    ]
    assert stats(folder) == stats(tmp_path) and 'Loss/diffusion' in stats(folder)[0]


def test_a_resume_repeats_the_duration(spent):
    folder, _ = spent
    done = run('train.py', f'--resume={folder}')
    assert f'has seen {recorded(folder)["total_nimg"] / 1e3:g} kimg' in done.stdout


def test_processes_agree_on_the_duration(digits, tmp_path):
    run_ranks(2, 'train.py', *options(digits, tmp_path, f'--budget={HOURS}'))
    assert recorded(tmp_path)['total_nimg'] % 32 == 0 and list(tmp_path.glob('network-snapshot-*.pkl'))


def test_what_scales_with_the_duration_follows(digits, teacher, tmp_path, a_second_a_step):
    """An hour is 3,600 steps. T anneals over half of them; ramp and average keep their share of a shorter run."""
    student = [f'--outdir={tmp_path}', f'--data={digits}', '--cond=1', '--consistency=True', '--S=2']
    result = invoke(*student, f'--teacher={teacher}', '--batch=64', '--budget=1', '--dry-run')
    assert result.exit_code == 0, result.stderr
    c = json.loads(result.stdout)
    assert c['total_nimg'] == 3600 * 64 and c['loss']['T_anneal_kimg'] == 1800 * 64 / 1000
    usual = OBJECTIVES['mcd'].defaults
    share = 3600 * 64 / (usual['duration'] * 1e6)
    assert c['lr_rampup_nimg'] == pytest.approx(usual['lr_rampup'] * 1e3 * share)
    assert c['ema_halflife_nimg'] == pytest.approx(usual['ema'] * share)
    assert 'a step of 64 images takes 1000 ms here (5 measured), so 1 hours are 3,600 steps' in result.stderr
    assert not list(tmp_path.iterdir())


def test_budgets_that_cannot_be_are_refused(digits, spent, tmp_path, a_second_a_step):
    new = options(digits, tmp_path / 'run')
    for words, *told in (
        ([*new, '--budget=1', '--duration=1'], '--budget and --duration exclude each other'),
        ([f'--resume={spent[0]}', '--budget=1'], '--budget is for new runs'),
        (['--outdir=x', f'--data={digits}', '--objective=pd', '--teacher=x', '--budget=1'], 'not for pd'),
        ([*new, '--budget=0'], '--budget'),
    ):
        assert_one_clear_error(invoke(*words), *told, status=2)
    assert_one_clear_error(invoke(*new, '--budget=0.0001'), '0.36 seconds, less than a step', '--batch')
    taken = options(digits, spent[0], '--budget=1')
    assert_one_clear_error(invoke(*taken), 'holds training states of an earlier run')
    assert not (tmp_path / 'run').exists()


def test_a_budget_displaces_the_duration_of_a_preset():
    places = ['--outdir=runs', '--data=data.zip', '--preset=digits-teacher']
    assert command_line.parse([*places, '--budget=2']).run.duration is None
    assert command_line.parse([*places, '--budget=2']).run.budget == 2


# ----------------------------------------------------------------------------
# Restarts.


def test_a_run_that_is_started_again_has_the_duration_of_its_first_start(spent):
    """The same command line, --budget and --transfer included, on top of what the run has recorded."""
    folder, _ = spent
    given = dict(outdir=str(folder), data='x', budget=9.0)
    o = command_line.resume(given, str(folder))
    assert o.run.budget is None
    assert round(o.run.duration * 1e6) == recorded(folder)['total_nimg']


@pytest.mark.slow
def test_torchrun_starts_a_run_with_a_budget_again_and_all_its_processes_keep_the_duration(digits, tmp_path):
    """A process is killed after a state was saved. Both would else measure again, and disagree with the state."""
    words = options(digits, tmp_path, '--budget=0.002', '--tick=0.032', '--dump=1', '--snap=0')
    launcher = [*LAUNCHER, '--standalone', '--nproc_per_node=2', '--max-restarts=1']
    process = Process([*launcher, 'train.py', *words])
    process.wait_for(lambda: saved_states(tmp_path), timeout=300)
    first = recorded(tmp_path)['total_nimg']
    os.kill(process.ranks()[1], signal.SIGKILL)
    status, out, error = process.end(timeout=300)
    assert status == 0 and 'Resumed from' in out and out.count('Done.') == 1, error
    assert error.count('--budget=0.002: a step of') == 1 and recorded(tmp_path)['total_nimg'] == first
    _, state = same_run.load_earlier(str(tmp_path))
    assert state['options']['total_nimg'] == first == state['progress']['nimg']


def test_both_networks_of_an_objective_are_measured_alike(digits, teacher, tmp_path, monkeypatch):
    """From the first step on, however far one of them begins ahead: their steps take different times."""
    turns, step = [], budget.train_step

    def observed(run, *others):
        step(run, *others)
        turns.append(run.loss_state.trains_auxiliary)

    monkeypatch.setattr(budget, 'train_step', observed)
    start = [
        f'--outdir={tmp_path}',
        f'--data={digits}',
        f'--teacher={teacher}',
        '--cond=1',
        *FAST,
        '--batch=32',
    ]
    done = invoke(*start, '--objective=sid', '--aux_ahead=8', '--budget=0.002', '--dry-run')
    measured = turns[budget.WARM_UP + 2 :]  # two steps tell how many fit
    assert f'({len(measured)} measured)' in done.stderr and sum(measured) == len(measured) / 2 >= 1
    assert json.loads(done.stdout)['loss']['aux_ahead'] == 8
