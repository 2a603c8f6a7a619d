"""One run in a folder: the lock, ranks that end with their torchrun, and runs that torchrun starts again."""

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from helpers import ROOT, assert_one_clear_error, run
from runs import Process, assert_same_run, command, ticks

from dnnlib import UserError, identity
from torch_utils import elastic
from training import command_line, restart, run_folder, run_lock
from training.objectives import OBJECTIVES
from training.run_files import saved_states
from training.run_lock import LOCK, RunLock, read_holder

ELSEWHERE = dict(host='node7', boot='another', pid=1, started=5.0)


@pytest.fixture
def quick(monkeypatch):
    """Clocks that a test can wait for."""
    for name, seconds in dict(PERIOD=0.1, CHECK_SEC=0.04, FAREWELL_SEC=2.0).items():
        monkeypatch.setattr(run_lock, name, seconds)


@pytest.fixture
def ended():
    """The identity of a process that has ended."""
    child = subprocess.Popen(['sleep', '60'])
    found = identity.of_process(child.pid)
    child.kill()
    child.wait()
    return found


@pytest.fixture
def acquired():
    """A function that acquires a lock, which is released in the end, and notes in `said` and `lost` what it says."""

    def acquire(folder, **options):
        lock = RunLock(folder, say=acquire.said.append, on_loss=acquire.lost.append, **options)
        lock.acquire()
        locks.append(lock)
        return lock

    acquire.said, acquire.lost, locks = [], [], []
    yield acquire
    for lock in locks:
        lock.release()


def write_lock(folder, process, *, age=0.0, name=LOCK, **fields):
    """The lock of another process, whose last heartbeat is `age` seconds old."""
    record = (
        dict(token='0' * 32, process=process, torchrun=None, timestamp=1.7e9, period=0.1, processes=1)
        | fields
    )
    (folder / name).write_text(json.dumps(record))
    then = time.time() - age
    os.utime(folder / name, (then, then))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def refused(folder, *words):
    with pytest.raises(UserError) as error:
        RunLock(folder, say=print).acquire()
    assert all(word in str(error.value) for word in words), error.value


# ----------------------------------------------------------------------------
# The lock.


def test_a_lock_lasts_from_acquire_to_release_and_leaves_nothing(tmp_path, quick, acquired):
    lock = acquired(tmp_path)
    assert names(tmp_path) == [LOCK]
    refused(
        tmp_path,
        f'process {os.getpid()}',
        identity.machine()['host'],
        'last heartbeat',
        '--take-lock',
        'another folder',
    )
    lock.release()
    assert names(tmp_path) == []


def test_a_lock_of_a_process_that_is_gone_is_taken_over_in_one_line(tmp_path, quick, ended, acquired):
    for process in (ended, identity.of_process() | dict(started=1.0)):  # or another has its id now
        write_lock(tmp_path, process)
        acquired(tmp_path).release()
        assert (
            len(acquired.said) == 1
            and f'process {process["pid"]}' in acquired.said.pop()
            and names(tmp_path) == []
        )


def test_a_process_that_nobody_has_waited_for_is_gone_too(tmp_path, quick, acquired):
    child = subprocess.Popen(['sleep', '60'])
    write_lock(tmp_path, identity.of_process(child.pid))
    refused(tmp_path, f'process {child.pid}')
    child.kill()
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    acquired(tmp_path)
    child.wait()


@pytest.mark.parametrize('process', [ELSEWHERE, identity.of_process() | dict(boot='another container')])
def test_another_machine_counts_as_gone_after_ten_silent_periods_only(tmp_path, quick, process, acquired):
    write_lock(tmp_path, process, age=2)
    acquired(tmp_path)
    assert len(acquired.said) == 1 and 'is gone: taking over' in acquired.said[0]


def test_a_run_waits_for_a_heartbeat_that_stands_still_and_gives_up_at_once_when_it_moves(
    tmp_path, quick, acquired
):
    """A job that starts again elsewhere finds a fresh lock of the node that died. Only the file system's clock is compared with itself."""
    write_lock(tmp_path, ELSEWHERE, age=-3600)  # of a server whose clock is ahead
    start = time.monotonic()
    acquired(tmp_path).release()
    waiting, taking = acquired.said
    assert 0.9 < time.monotonic() - start < 5 and 'Waiting up to' in waiting and 'taking over' in taking

    write_lock(tmp_path, ELSEWHERE, period=10)
    threading.Timer(0.2, lambda: os.utime(tmp_path / LOCK, (1, 1))).start()
    start = time.monotonic()
    refused(tmp_path, 'node7')
    assert time.monotonic() - start < 5


def test_the_clock_of_this_machine_does_not_matter(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(time, 'time', lambda: 5e9)
    write_lock(tmp_path, ELSEWHERE, period=10)
    os.utime(tmp_path / LOCK)
    threading.Timer(0.2, lambda: os.utime(tmp_path / LOCK)).start()
    refused(tmp_path, 'node7')


def test_of_many_that_find_a_dead_lock_one_takes_it_over(tmp_path, quick, ended, acquired):
    def attempt(_):
        with contextlib.suppress(UserError):
            return acquired(tmp_path)

    for round_idx in range(20):
        write_lock(tmp_path, ended, token=f'{round_idx:032x}')
        with ThreadPoolExecutor(8) as threads:
            winners = [lock for lock in threads.map(attempt, range(8)) if lock]
        assert len(winners) == 1 and read_holder(tmp_path / LOCK).token == winners[0].token
        winners[0].release()
        assert names(tmp_path) == [] and not acquired.lost


def test_a_claim_of_a_process_that_died_while_taking_over_is_no_obstacle_and_one_of_a_live_process_is(
    tmp_path, quick, ended, acquired
):
    write_lock(tmp_path, ended)
    write_lock(tmp_path, ended, name=f'.{LOCK}.{"0" * 32}.0')
    write_lock(tmp_path, identity.of_process(), name=f'.{LOCK}.{"0" * 32}.1')
    assert not RunLock(tmp_path)._replace(read_holder(tmp_path / LOCK))
    (tmp_path / f'.{LOCK}.{"0" * 32}.1').unlink()
    acquired(tmp_path)
    assert names(tmp_path) == [LOCK]


@pytest.mark.parametrize('number', [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links_locks_as_well(
    tmp_path, quick, monkeypatch, ended, number, acquired
):
    def no_links(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, 'link', no_links)
    write_lock(tmp_path, ended)
    lock = acquired(tmp_path)
    refused(tmp_path, '--take-lock')
    lock.release()
    assert names(tmp_path) == []


def test_a_link_whose_answer_was_lost_has_been_made(tmp_path, quick, monkeypatch, acquired):
    """A server of NFS may do what it was asked to, and report to the repeated request that the name is taken."""
    link = os.link

    def answer_lost(*names):
        link(*names)
        raise FileExistsError(errno.EEXIST, 'File exists')

    monkeypatch.setattr(os, 'link', answer_lost)
    acquired(tmp_path)


def test_a_run_whose_lock_is_taken_ends_and_one_whose_lock_is_removed_makes_it_again(
    tmp_path, quick, acquired
):
    lost, first = acquired.lost, acquired(tmp_path)
    (tmp_path / LOCK).unlink()
    while not (tmp_path / LOCK).exists():
        time.sleep(0.01)
    assert not lost
    second = acquired(tmp_path, take=True)
    assert len(lost) == 1 and 'was taken from this run' in lost[0] and str(os.getpid()) in lost[0]
    first.release()
    assert read_holder(tmp_path / LOCK).token == second.token


def test_a_heartbeat_moves_and_a_disk_that_refuses_it_stops_nothing(tmp_path, quick, monkeypatch, acquired):
    lock = acquired(tmp_path)
    beats = set()
    while len(beats) < 3:
        beats.add(read_holder(tmp_path / LOCK).beat)
    refusals = []

    def read_only(path):
        refusals.append(path)
        raise OSError(errno.EROFS, 'Read-only file system')

    monkeypatch.setattr(os, 'utime', read_only)
    while len(refusals) < 3:
        time.sleep(0.01)
    assert lock._watcher.is_alive() and not acquired.lost


@pytest.mark.parametrize(
    'data',
    [
        b'',
        b'{',
        b'[' * 9999,
        b'\xff',
        b'{"token": 1}',
        json.dumps(
            dict(
                token='0' * 32,
                process=dict(host=[], boot='', pid=10**30, started=float('nan')),
                torchrun=None,
                timestamp=1,
                period=1,
            )
        ).encode(),
    ],
)
def test_a_damaged_lock_is_judged_by_its_age(tmp_path, quick, data, acquired):
    (tmp_path / LOCK).write_bytes(data)
    assert read_holder(tmp_path / LOCK).process is None
    os.utime(tmp_path / LOCK, (1, 1))
    acquired(tmp_path)


@pytest.mark.parametrize('make', [os.mkdir, os.mkfifo])
def test_a_lock_that_is_no_file_is_an_error(tmp_path, make):
    make(tmp_path / LOCK)
    refused(tmp_path, 'remove it')


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    refused(tmp_path / 'gone', 'Cannot write to the folder', 'another place')


def test_a_rank_that_is_about_to_end_with_its_torchrun_is_waited_for(tmp_path, quick, ended, acquired):
    child = subprocess.Popen(['sleep', '0.6'])
    write_lock(tmp_path, identity.of_process(child.pid), torchrun=ended)
    acquired(tmp_path)
    assert child.wait() == 0


def test_forged_words_in_a_lock_do_not_reach_the_terminal(tmp_path, quick, acquired):
    write_lock(tmp_path, ELSEWHERE | dict(host='x\x1b[2J\nError: y'), age=2)
    acquired(tmp_path)
    assert '\x1b' not in acquired.said[0] and '\n' not in acquired.said[0]


def test_runs_that_choose_a_numbered_folder_at_the_same_moment_get_numbers_of_their_own(tmp_path):
    o = options(tmp_path, nosubdir=False).but(batch=1)
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: run_folder.make_run_dir(o, 'digits'), range(24)))
    assert (
        sorted(made) == [str(tmp_path / name) for name in names(tmp_path)]
        and len(made) == len(set(made)) == 24
    )


# ----------------------------------------------------------------------------
# Ranks and their torchrun.

WATCHED = """
import multiprocessing, os, sys, time
from torch_utils import elastic
elastic.end_with_torchrun()
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=[60])
child.start()
with open(sys.argv[1] + ".tmp", "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
os.rename(sys.argv[1] + ".tmp", sys.argv[1])
time.sleep(60)
"""
LAUNCHER = 'import subprocess, sys\nsubprocess.run(sys.argv[1:], start_new_session=True)\n'


def orphans(tmp_path, launcher, *between):
    """The processes of a script that is started in torchrun's environment, whose launcher is then killed."""
    (tmp_path / 'watched.py').write_text(WATCHED)
    (tmp_path / launcher).write_text(LAUNCHER)
    line = [
        sys.executable,
        str(tmp_path / launcher),
        *between,
        sys.executable,
        str(tmp_path / 'watched.py'),
        str(tmp_path / 'pids'),
    ]
    if between[:2] == ('bash', '-c'):
        line = [
            *line[:2],
            'bash',
            '-c',
            f'{sys.executable} {tmp_path / "watched.py"} {tmp_path / "pids"} & wait',
        ]
    parent = subprocess.Popen(
        line,
        env=dict(os.environ, PYTHONPATH=str(ROOT), TORCHELASTIC_RUN_ID='x', RANK='0'),
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / 'pids').exists():
        time.sleep(0.01)
    time.sleep(0.2)
    parent.kill()
    parent.wait()
    return parent, [int(pid) for pid in (tmp_path / 'pids').read_text().split()]


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_rank_ends_with_its_torchrun_in_one_line_and_takes_its_data_loaders_along(tmp_path):
    parent, pids = orphans(tmp_path, 'torchrun')
    deadline = time.monotonic() + 5
    while not all(map(gone, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert parent.stderr.read().splitlines() == [
        f'torchrun (process {parent.pid}) is gone: process {pids[0]}, rank 0, ends with it.'
    ]


IMPORTING = """
import os, sys, time
import dnnlib
with open(sys.argv[1] + ".tmp", "w") as file:
    file.write(f"{os.getpid()}")
os.rename(sys.argv[1] + ".tmp", sys.argv[1])
parent = os.getppid()
while os.getppid() == parent:  # as imports take seconds
    time.sleep(0.01)
from torch_utils import elastic
elastic.end_with_torchrun()
time.sleep(60)
"""


@pytest.mark.parametrize(
    'launcher, between, ends',
    [
        ('torchrun', [], True),
        pytest.param('torchrun', ['bash', '-c'], False, marks=pytest.mark.slow),
        ('shell.py', [], False),
    ],
)
def test_a_rank_whose_torchrun_is_killed_while_it_imports_ends_too(
    tmp_path, monkeypatch, launcher, between, ends
):
    """By then its parent is the system's first process; which one it was is seen at the first import."""
    monkeypatch.setattr(sys.modules[__name__], 'WATCHED', IMPORTING)
    _, (pid,) = orphans(tmp_path, launcher, *between)
    if 'bash' in between:  # it lives on, so the process waits for its end
        psutil.Process(pid).parent().kill()
    deadline = time.monotonic() + 20
    while ends and not gone(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0 if ends else 8)
    assert gone(pid) == ends
    if not ends:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    'launcher, between',
    [
        ('torchrun', ['bash', '-c']),
        ('shell.py', []),
        ('shell.py', ['nohup']),
        ('shell.py', ['setsid', '--wait']),
    ],
)
def test_a_process_that_torchrun_did_not_start_itself_outlives_its_parent(tmp_path, launcher, between):
    """A shell between the two, or a shell's environment that has torchrun's variables."""
    _, pids = orphans(tmp_path, launcher, *between)
    time.sleep(1.5)
    assert not any(map(gone, pids))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


# ----------------------------------------------------------------------------
# Real runs.


def compete(digits, folder, whole, processes, resume):
    """Two runs in one folder, started at the same moment: one trains to the end, the other one changes nothing."""
    extra = []
    if resume:
        run(*command(digits, folder, f'--duration={21 * 64e-6}', processes=processes))
        extra = [f'--resume={folder}']
    pair = [Process(command(digits, folder, *extra, processes=processes)) for _ in range(2)]
    (winner, *_), (loser, _, error) = sorted((one.end() for one in pair), key=lambda result: result[0])
    if loser:  # else one was ready before the other looked, which had nothing to do then
        errors = re.findall(r'^Error: .*', error, re.MULTILINE)  # torchrun adds its own lines
        assert (
            winner == 0
            and len(errors) == 1
            and ('a run that goes on' in errors[0] or 'an earlier run' in errors[0])
        ), error
    else:
        assert resume and winner == 0
    assert_same_run(folder, whole)
    assert not (folder / LOCK).exists()


def test_of_two_runs_that_start_in_one_folder_one_trains(tmp_path, digits, whole):
    compete(digits, tmp_path, whole, processes=1, resume=False)


@pytest.mark.slow
def test_of_two_resumes_on_two_processes_each_one_trains(tmp_path, digits, whole_of_two):
    compete(digits, tmp_path, whole_of_two, processes=2, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize('number', range(20))
def test_of_20_pairs_of_runs_one_of_each_trains(tmp_path, digits, whole, whole_of_two, number):
    processes = 1 + number % 2
    compete(digits, tmp_path, whole_of_two if processes == 2 else whole, processes, resume=number % 4 >= 2)


@pytest.mark.slow
def test_a_resume_a_second_after_torchrun_was_killed_is_the_only_course(tmp_path, digits, whole_of_two):
    first = Process(command(digits, tmp_path, processes=2))
    first.wait_for(lambda: saved_states(tmp_path))
    ranks = first.ranks()
    first.popen.kill()
    time.sleep(1)
    second = Process(command(digits, tmp_path, f'--resume={tmp_path}', processes=2))
    _, _, error = first.end()
    assert 'is gone: process' in error, error
    deadline = time.monotonic() + 5  # what they print is closed a moment before they end
    while not all(map(gone, ranks)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    status, _, error = second.end()  # with a lock to take over, unless rank 0 saw the other rank's end first
    assert status == 0, error
    assert_same_run(tmp_path, whole_of_two)
    assert not (tmp_path / LOCK).exists()


def test_a_run_ends_when_its_folder_is_taken(tmp_path, digits, whole):
    """The first run is halted meanwhile: a fast machine would have it past the end of the second one before that has started."""
    first = Process(command(digits, tmp_path, '--duration=1'))
    first.wait_for(lambda: saved_states(tmp_path))
    first.popen.send_signal(signal.SIGSTOP)
    holder = read_holder(tmp_path / LOCK)
    second = Process(command(digits, tmp_path, f'--resume={tmp_path}', '--take-lock'))
    second.wait_for(lambda: read_holder(tmp_path / LOCK).token != holder.token)
    first.popen.send_signal(signal.SIGCONT)
    status, _, error = first.end()
    assert status == 1 and error.count('Error:') == 1 and 'was taken from this run' in error, error
    status, _, error = second.end()
    assert status == 0 and 'Taking' in error, error
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize('saved', [True, False])
def test_a_run_that_torchrun_starts_again_goes_on_by_itself(tmp_path, digits, whole_of_two, saved):
    """In the folder of the first attempt, although it is numbered: from its newest state, or from the beginning."""
    launcher, script = command(digits, tmp_path, processes=2), []
    split = launcher.index('train.py')
    launcher, script = (
        [*launcher[:split], '--max-restarts=1'],
        [option for option in launcher[split:] if option != '--nosubdir'],
    )
    process = Process([*launcher, *script])
    runs = lambda: [path for path in tmp_path.iterdir() if path.is_dir()]
    process.wait_for(
        lambda: runs() and (ticks(runs()[0]) >= 3 if saved else (runs()[0] / restart.LAUNCH).exists())
    )
    os.kill(process.ranks()[1], signal.SIGKILL)
    status, out, error = process.end()
    assert status == 0 and error.count('Started again by torchrun (restart 1)') == 1, error
    assert ('Resumed from' in out) == saved, out
    (folder,) = runs()
    assert_same_run(folder, whole_of_two)


# ----------------------------------------------------------------------------
# What a restart makes of options.


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """Attempts of a launch of torchrun: a function that sets the number of the attempt."""
    monkeypatch.setattr(elastic, 'torchrun', identity.of_process)  # this very process
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    monkeypatch.setenv('TORCHELASTIC_MAX_RESTARTS', '3')
    return lambda count: monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', str(count))


def options(folder, objective='diffusion', nosubdir=True, **given):
    """The options of a run."""
    teacher = dict(teacher='x') if OBJECTIVES[objective].teacher else {}
    nosubdir = dict(nosubdir=True) if nosubdir else {}
    return command_line.choose(
        dict(outdir=str(folder), data='x', objective=objective, **nosubdir, **teacher, **given)
    )


def save(folder, *kimg):
    for number in kimg:
        (folder / f'training-state-{number:06d}.pt').write_bytes(os.urandom(8))


def test_the_first_attempt_resumes_nothing_and_a_launch_without_restarts_leaves_no_file(
    tmp_path, launched, monkeypatch
):
    save(tmp_path, 1)
    launched(0)
    o = restart.go_on(options(tmp_path))
    assert o.run == options(tmp_path).run
    monkeypatch.setenv('TORCHELASTIC_MAX_RESTARTS', '0')
    restart.remember(tmp_path, 7, None)
    assert not (tmp_path / restart.LAUNCH).exists()


def test_a_restart_resumes_its_own_run_from_the_newest_state_or_begins_again_with_its_seed(
    tmp_path, launched, capsys
):
    folder = tmp_path / '00003-digits'
    folder.mkdir()
    launched(0)
    restart.remember(folder, 7, None)
    launched(1)
    o = restart.go_on(options(tmp_path, nosubdir=False))
    assert o.run == options(folder, seed=7).run
    save(folder, 1, 2)
    o = restart.go_on(options(tmp_path, nosubdir=False))
    assert (
        o.run.resume == str(folder)
        and capsys.readouterr().err.count('Started again by torchrun (restart 1)') == 2
    )


def test_a_restart_does_not_resume_a_run_of_another_launch(tmp_path, launched, monkeypatch, ended):
    """As where the first attempt was refused because of that run's states; torchrun's id may be the same, 'none' or the job's."""
    launched(0)
    restart.remember(tmp_path, 7, None)
    save(tmp_path, 1)
    record = json.loads((tmp_path / restart.LAUNCH).read_text())
    launched(1)
    for change in (
        dict(torchruns=[ended]),
        dict(run_id='other'),
        dict(torchruns=[{}]),
        dict(passed_over=[1]),
    ):
        (tmp_path / restart.LAUNCH).write_text(json.dumps(record | change))
        o = restart.go_on(options(tmp_path))
        assert o.run == options(tmp_path).run


def test_a_restart_of_a_resume_from_an_older_state_does_not_go_on_with_the_course_that_was_given_up(
    tmp_path, launched
):
    save(tmp_path, 1, 2, 3)
    state = str(tmp_path / 'training-state-000001.pt')
    launched(0)
    restart.remember(tmp_path, 7, state)
    launched(1)
    resumed = lambda: restart.go_on(options(tmp_path, resume=state)).run.resume
    assert resumed() == state
    restart.remember(tmp_path, 7, state)
    save(tmp_path, 2)  # it has come to the same point itself, and was killed before it could delete 3
    assert resumed() == str(tmp_path / 'training-state-000002.pt')
    (tmp_path / 'training-state-000003.pt').unlink()
    launched(2)
    assert resumed() == str(tmp_path)


def test_a_restart_of_progressive_distillation_resumes_its_stages(tmp_path, launched):
    launched(0)
    restart.remember(tmp_path, 7, None)
    launched(1)
    o = restart.go_on(options(tmp_path, objective='pd'))
    assert o.run == options(tmp_path, objective='pd', seed=7).run
    (tmp_path / 'S0004').mkdir()
    assert restart.go_on(o).run.resume == str(tmp_path)


def test_a_second_run_is_told_who_has_the_folder(tmp_path, digits):
    write_lock(tmp_path, identity.of_process())
    result = run(*command(digits, tmp_path), check=False)
    assert_one_clear_error(result, f'process {os.getpid()}', '--take-lock')
    assert names(tmp_path) == [LOCK]
