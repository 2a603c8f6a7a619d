"""Runs that stop and go on: exact resuming, signals, kills, full disks, broken numbers. Everything here happens to real processes."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import FAST, ROOT, assert_one_clear_error, lines, run, run_ranks
from runs import Process, assert_same_run, command, ticks
from wandb.proto import wandb_internal_pb2
from wandb_files import leveldb_records

from dnnlib import EasyDict
from torch_utils.flat import FlatParameters
from training.checkpoint import load_network, load_state
from training.objectives.loss import State
from training.phema import WeightAverages
from training.run_files import PREEMPTED, Progress, RunFiles, saved_states, states_to_keep
from training.run_files import load_state as newest_state
from training.trained import Trained
from training.weight_update import WeightUpdate

# ----------------------------------------------------------------------------
# Splitting.


def test_the_loss_does_not_depend_on_how_a_batch_is_split(tmp_path, digits, teacher):
    """50 steps of distillation in FP64 with a small learning rate: rounding is all that differs, 1e-4 would be a different random number."""

    def losses(name, *extra, processes=1):
        arguments = [
            'train.py',
            f'--outdir={tmp_path / name}',
            f'--data={digits}',
            '--cond=1',
            '--consistency=True',
            f'--teacher={teacher}',
            *FAST,
            '--batch=64',
            f'--duration={10 * 64e-6}',
            '--tick=0.064',
            '--snap=0',
            '--dump=0',
            '--dropout=0',
            '--S=4',
            '--T_start=8',
            '--T_end=16',
            '--anchor_hops=2',
            '--lr=1e-5',
            '--precision=fp64',
            '--ema=10kimg',
            *extra,
        ]
        run(*arguments) if processes == 1 else run_ranks(processes, *arguments)
        return [tick['Loss/cd']['mean'] for tick in lines(tmp_path / name / 'stats.jsonl')]

    at_once = losses('at_once')
    assert len(at_once) == 10
    assert losses('rounds', '--batch-gpu=16') == pytest.approx(at_once, rel=1e-9)
    assert losses('processes', processes=2) == pytest.approx(at_once, rel=1e-9)


# ----------------------------------------------------------------------------
# Signals.


@pytest.mark.parametrize('number', [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_stops_a_run_in_the_middle_of_a_tick_and_a_resume_ends_bit_for_bit_the_same(
    tmp_path, digits, whole, number
):
    process = Process(command(digits, tmp_path))
    process.wait_for(lambda: ticks(tmp_path) >= 3)
    for _ in range(2):  # SLURM and the terminal may both deliver it
        os.kill(process.popen.pid, number)
        time.sleep(0.05)
    status, out, err = process.end()
    assert status == 75, err
    note = json.loads((tmp_path / 'preempted.json').read_text())
    assert (
        note['signal'] == signal.Signals(number).name
        and load_state(tmp_path / note['state'])['progress']['nimg'] == note['nimg']
    )
    assert 'Traceback' not in err and f'{signal.Signals(number).name}: stopping' in out

    run(*command(digits, tmp_path, f'--resume={tmp_path}'))
    assert not (tmp_path / 'preempted.json').exists()
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_two_processes_stop_together_and_resume_bit_for_bit(tmp_path, digits, whole_of_two):
    """torchrun's own exit status is 1 whatever happens: the note is what a script tests."""
    process = Process(command(digits, tmp_path, processes=2))
    process.wait_for(lambda: ticks(tmp_path) >= 2)
    os.kill(process.popen.pid, signal.SIGUSR1)
    status, out, err = process.end()
    assert status == 1 and (tmp_path / 'preempted.json').exists(), (out, err)
    run_ranks(2, *command(digits, tmp_path, f'--resume={tmp_path}'))
    assert_same_run(tmp_path, whole_of_two)


@pytest.mark.slow
def test_one_process_of_two_is_asked_and_both_stop(tmp_path, digits, whole_of_two):
    process = Process(command(digits, tmp_path, processes=2))
    process.wait_for(lambda: ticks(tmp_path) >= 2)
    os.kill(process.ranks()[1], signal.SIGTERM)
    process.end()
    assert json.loads((tmp_path / 'preempted.json').read_text())['signal'] == 'SIGTERM'
    run_ranks(2, *command(digits, tmp_path, f'--resume={tmp_path}'))
    assert_same_run(tmp_path, whole_of_two)


def test_a_later_signal_ends_a_process_at_once(tmp_path):
    """Within five seconds it would be a repetition of the first."""
    script = (
        'import time\nfrom torch_utils.distributed import AsyncAllReduce\nfrom torch_utils.preemption import PreemptionHandler\n'
        'with PreemptionHandler(AsyncAllReduce()):\n    print("ready", flush=True)\n    end = time.monotonic() + 60\n'
        '    while time.monotonic() < end: time.sleep(0.1)\n'
    )
    popen = subprocess.Popen(
        [sys.executable, '-c', script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert popen.stdout.readline() == 'ready\n'
    for pause in (0.5, 5.0):
        popen.send_signal(signal.SIGTERM)
        time.sleep(pause)
        assert popen.poll() is None
    popen.send_signal(signal.SIGTERM)
    assert popen.wait(timeout=10) == 128 + signal.SIGTERM and 'at once' in popen.stderr.read()


# ----------------------------------------------------------------------------
# Resuming.


def test_states_that_are_kept_are_the_newest_and_the_best():
    assert states_to_keep(dict(a=None, b=None, c=None, d=None), newest=3) == set('bcd')


def test_keep_changes_how_many_states_stay(tmp_path, digits):
    run(*command(digits, tmp_path, '--keep=4'))
    assert len(saved_states(tmp_path)) == 4


def test_a_damaged_newest_state_is_reported_and_the_one_before_is_used(tmp_path, digits, whole):
    run(*command(digits, tmp_path, f'--duration={21 * 64e-6}'))
    newest, before = saved_states(tmp_path)
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    reports = []
    assert newest_state(tmp_path, report=reports.append)[0] == str(before)
    assert len(reports) == 1 and newest.name in reports[0] and 'checksum' in reports[0]
    done = run(*command(digits, tmp_path, f'--resume={tmp_path}'))
    assert newest.name in done.stderr and f'Resumed from {before}' in done.stdout
    assert_same_run(tmp_path, whole)


def test_another_number_of_processes_goes_on_with_the_same_images_and_says_what_it_cannot_promise(
    tmp_path, digits, whole
):
    run(*command(digits, tmp_path, f'--duration={21 * 64e-6}'))
    done = run_ranks(
        2, *command(digits, tmp_path, f'--resume={tmp_path}', '--dropout=0', '--resume-override')
    )
    assert 'not be bit for bit' in done.stderr
    a, b = lines(tmp_path / 'stats.jsonl'), lines(whole / 'stats.jsonl')
    assert [tick['Progress/nimg'] for tick in a] == [tick['Progress/nimg'] for tick in b]
    assert [tick['Loss/diffusion']['num'] for tick in a] == [tick['Loss/diffusion']['num'] for tick in b]


def small_run(folder, **options):
    """The files of a run of a network with eight weights, and where that run is."""
    net = torch.nn.Linear(3, 2)
    flat = FlatParameters(net)
    c = EasyDict(dict(states_kept=10, on_save_error='stop', resume=None), **options)
    files = RunFiles(
        c,
        folder,
        Trained(net, None, None, WeightUpdate(flat, (0.9, 0.99), 1e-8)),
        None,
        WeightAverages(net, flat, 1e3, None, []),
        State(),
        log=print,
    )
    return files, Progress(nimg=1000, tick=1, begun=True)


def test_a_state_that_is_saved_again_keeps_its_distance(tmp_path):
    """As by a signal right after a resume: it is still the best one."""
    files, progress = small_run(tmp_path)
    progress.fid = 3.0
    state = tmp_path / files.save_state(progress, progress.next_position())
    files, _ = small_run(tmp_path, resume=str(state))
    progress = Progress(**load_state(state)['progress'])
    assert progress.fid is None and tmp_path / files.save_state(progress, progress.position()) == state
    assert load_state(state)['progress']['states'] == {state.stem: 3.0}


def test_states_beyond_the_one_that_a_run_goes_on_from_are_deleted_when_a_new_one_is_whole(tmp_path):
    """Or the folder's newest state would be one of a future that was computed differently, whose statistics are gone."""
    files, progress = small_run(tmp_path)
    for nimg in (1000, 2000, 3000, 4000):
        progress.nimg = nimg
        files.save_state(progress, progress.next_position())
    middle = tmp_path / 'training-state-000002.pt'
    files, _ = small_run(tmp_path, resume=str(middle))
    progress = Progress(**{**load_state(middle)['progress'], 'nimg': 2500})
    files.tidy()
    assert len(saved_states(tmp_path)) == 4
    files.save_state(progress, progress.next_position())
    assert [path.stem.removeprefix('training-state-') for path in saved_states(tmp_path)] == [
        '000002-2500',
        '000002',
        '000001',
    ]


def test_a_state_that_somebody_has_deleted_is_not_missed(tmp_path):
    files, progress = small_run(tmp_path, states_kept=2)
    for nimg in (1000, 2000, 3000, 4000):
        progress.nimg = nimg
        assert files.save_state(progress, progress.next_position()) == f'training-state-{nimg // 1000:06d}.pt'
        for path in saved_states(tmp_path)[1:]:  # all but the newest
            path.unlink()
    assert [path.name for path in saved_states(tmp_path)] == ['training-state-000004.pt']


def test_a_run_that_starts_anew_tidies_up_after_one_that_was_killed_and_leaves_other_files_alone(tmp_path):
    for name in ('.training-state-000001.pt.7-0a1b2c3d.tmp', PREEMPTED, '.notes.tmp'):
        (tmp_path / name).touch()
    small_run(tmp_path)[0].tidy()
    assert [path.name for path in tmp_path.iterdir()] == ['.notes.tmp']


def test_a_resumed_run_goes_on_with_its_wandb_run_and_tells_every_tick_once(tmp_path, digits):
    """Offline: the second folder carries the same id, and the two together have every step."""
    options = ['--wandb', '--wandb_mode=offline', '--wandb_project=tests', '--tensorboard=1']
    environment = {f'WANDB_{name}_DIR': str(tmp_path / name) for name in ('CONFIG', 'CACHE', 'DATA')}
    run(*command(digits, tmp_path / 'run', f'--duration={21 * 64e-6}', *options), env=environment)
    run(*command(digits, tmp_path / 'run', f'--resume={tmp_path / "run"}', *options), env=environment)
    files = sorted((tmp_path / 'run').glob('wandb/offline-run-*/run-*.wandb'))
    assert len(files) == 2 and len({path.name for path in files}) == 1
    records = [
        wandb_internal_pb2.Record.FromString(record)
        for path in files
        for record in leveldb_records(path.read_bytes())
    ]
    steps = [record.history.step.num for record in records if record.WhichOneof('record_type') == 'history']
    assert (
        sorted(steps) == [tick['Progress/nimg']['mean'] for tick in lines(tmp_path / 'run' / 'stats.jsonl')]
        and len(steps) == 9
    )
    assert list((tmp_path / 'run').glob('events.out.tfevents.*'))


@pytest.mark.parametrize(
    'option, words',
    [
        ('--cbase=16', 'cbase 8 -> 16'),
        ('--batch=32', 'batch 64 -> 32'),
        ('--seed=1', 'seed 0 -> 1'),
        ('--phema=0.2', 'phema 0.1 -> 0.2'),
        ('--precision=bf16', 'precision fp32 -> bf16'),
        ('--xflip=1', 'xflip = false'),
    ],
)
def test_a_changed_option_that_makes_another_run_is_refused_by_name(digits, whole, option, words):
    result = run(*command(digits, whole, f'--resume={whole}', option), check=False)
    assert_one_clear_error(result, words, '--resume-override')


def test_a_folder_without_a_whole_state_is_an_error(tmp_path, digits):
    assert_one_clear_error(
        run(*command(digits, tmp_path, f'--resume={tmp_path}'), check=False), 'holds no training-state'
    )
    (tmp_path / 'training-state-000001.pt').write_bytes(b'half a fi')
    assert_one_clear_error(
        run(*command(digits, tmp_path, f'--resume={tmp_path}'), check=False), 'none of its states is whole'
    )


# ----------------------------------------------------------------------------
# Full disks.


def limited(size):
    """No file may become longer than `size` bytes: what a full disk does, without a disk."""
    return dict(limits={resource.RLIMIT_FSIZE: size})


@pytest.fixture(scope='module')
def sizes(whole):
    snapshot = max(path.stat().st_size for path in whole.glob('network-snapshot-*.pkl'))
    state = min(path.stat().st_size for path in whole.glob('training-state-*.pt'))
    assert state > 1.5 * snapshot
    return (state + snapshot) // 2


def test_a_full_disk_stops_a_run_whose_earlier_state_is_whole_and_which_goes_on_when_there_is_room(
    tmp_path, digits, whole, sizes
):
    run(*command(digits, tmp_path, f'--duration={21 * 64e-6}'))
    before = {path.name: path.read_bytes() for path in saved_states(tmp_path)}
    result = run(*command(digits, tmp_path, f'--resume={tmp_path}'), check=False, **limited(sizes))
    assert_one_clear_error(
        result, 'Cannot write', 'training-state', 'Free some space', '--on-save-error=continue'
    )
    assert {path.name: path.read_bytes() for path in saved_states(tmp_path)} == before
    assert not list(tmp_path.glob('.*.tmp'))
    run(*command(digits, tmp_path, f'--resume={tmp_path}'))
    assert_same_run(tmp_path, whole)


def test_a_run_may_go_on_without_saving(tmp_path, digits, whole, sizes):
    done = run(*command(digits, tmp_path, '--on-save-error=continue'), **limited(sizes))
    assert 'Training goes on' in done.stderr and not saved_states(tmp_path)
    assert_same_run(tmp_path, whole)


def test_a_run_that_is_stopped_and_cannot_save_does_not_promise_a_state(tmp_path, digits, sizes):
    """Requeued by its note, it would begin anew again and again."""
    process = Process(command(digits, tmp_path, '--on-save-error=continue', '--duration=1'), **limited(sizes))
    process.wait_for(lambda: ticks(tmp_path) >= 2)
    process.popen.send_signal(signal.SIGTERM)
    status, out, err = process.end()
    assert status == 75 and 'none to resume from' in out and not (tmp_path / 'preempted.json').exists(), (
        out,
        err,
    )


def test_all_processes_stop_together_when_one_cannot_write(tmp_path, digits, sizes):
    result = run_ranks(2, *command(digits, tmp_path), check=False, **limited(sizes))
    assert result.returncode == 1 and 'Free some space' in result.stderr


# ----------------------------------------------------------------------------
# Broken numbers.


def test_a_run_whose_numbers_stay_broken_stops_with_its_last_good_state_whole(tmp_path, digits):
    """A learning rate of 1e30 breaks the network at its first step; every later one is left out."""
    run(*command(digits, tmp_path, f'--duration={21 * 64e-6}'))
    before = {path.name: path.read_bytes() for path in saved_states(tmp_path)}
    result = run(
        *command(
            digits,
            tmp_path,
            f'--resume={tmp_path}',
            '--lr=1e30',
            '--lr_rampup=0',
            '--max-bad-steps=4',
            '--tick=50',
        ),
        check=False,
    )
    assert_one_clear_error(result, '4 steps in a row', 'not finite', saved_states(tmp_path)[0].name)
    assert {path.name: path.read_bytes() for path in saved_states(tmp_path)} == before


@pytest.mark.parametrize('precision', ['bf16', 'fp64'])
def test_other_precisions_train_and_are_remembered(tmp_path, digits, precision):
    run(
        *command(
            digits,
            tmp_path,
            f'--precision={precision}',
            '--grad-clip=100',
            '--ls=dynamic',
            f'--duration={10 * 64e-6}',
        )
    )
    net = load_network(max(tmp_path.glob('network-snapshot-*.pkl')))
    assert net.use_bf16 == (precision == 'bf16') and next(net.parameters()).dtype == (
        torch.float64 if precision == 'fp64' else torch.float32
    )
    last = lines(tmp_path / 'stats.jsonl')[-1]
    assert last['Progress/loss_scale']['mean'] == 65536 and last['Progress/bad_steps']['mean'] == 0


# ----------------------------------------------------------------------------
# Kills.


def kill_and_resume(digits, folder, kills, seed):
    """Run on two processes and kill one rank or all, `kills` times: at a random moment, or as soon as a file is being written."""
    rng, happened = random.Random(seed), []
    while len(happened) < kills:
        resume = [f'--resume={folder}'] if saved_states(folder) else []
        process = Process(command(digits, folder, *resume, processes=2), start_new_session=True)
        start = ticks(folder)
        process.wait_for(lambda: ticks(folder) > start or process.popen.poll() is not None)  # noqa: B023
        while_saving = rng.random() < 0.5
        if while_saving:
            process.wait_for(
                lambda: any(folder.glob('.training-state-*.tmp')) or process.popen.poll() is not None  # noqa: B023
            )
        else:
            time.sleep(rng.random() * 0.3)
        if process.popen.poll() is not None:
            break  # it was quicker
        ranks = process.ranks()
        victims = ranks if rng.random() < 0.5 else [rng.choice(ranks)]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        status, *_ = process.end()
        assert status != 0
        happened.append((len(victims), while_saving))
        for path in saved_states(folder):
            load_state(path)
    return happened


def kill_test(tmp_path, digits, whole_of_two, kills, seed):
    folders, happened = [], []
    while len(happened) < kills:  # a run may end before it was killed that often
        folder = tmp_path / str(len(folders))
        folders.append(folder)
        folder.mkdir()
        happened += kill_and_resume(digits, folder, min(kills - len(happened), 6), seed + len(folders))
        resume = [f'--resume={folder}'] if saved_states(folder) else []
        run_ranks(2, *command(digits, folder, *resume))
        assert_same_run(folder, whole_of_two)
    return happened


def test_killed_runs_leave_whole_states_and_end_bit_for_bit_the_same(tmp_path, digits, whole_of_two):
    kill_test(tmp_path, digits, whole_of_two, kills=2, seed=1)


@pytest.mark.slow
def test_runs_killed_at_25_random_moments_end_bit_for_bit_the_same(tmp_path, digits, whole_of_two):
    happened = kill_test(tmp_path, digits, whole_of_two, kills=25, seed=2)
    assert {victims for victims, _ in happened} == {1, 2} and {
        while_saving for _, while_saving in happened
    } == {False, True}
