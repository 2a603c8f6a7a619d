"""Where a run's words and numbers go, that they are there once after kills and resumes, and that nothing that fails there stops a training."""

import contextlib
import fcntl
import http.server
import json
import os
import pty
import re
import resource
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path  # noqa: F401 (for the processes that are killed)

import numpy as np
import PIL.Image
import psutil
import pytest
from helpers import ROOT
from run_logs import CONFIG, TOTAL, begin, evaluation, offline, tick, train
from wandb_files import leveldb_records

from dnnlib import UserError
from training import run_log, trackers
from training.run_log import RunLog


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps_of(path):
    return [run_log.images_seen(record) for record in records(path)]


# ----------------------------------------------------------------------------
# Files.


def test_lines_statistics_and_evaluations_go_where_people_look(tmp_path, capsys):
    log = RunLog(str(tmp_path), enabled=True)
    log('Network: tiny')
    log.start(TOTAL)
    train(log, 64, 128, evaluated=[128])
    log.close()
    log('Done.')
    assert (tmp_path / 'log.txt').read_text() == capsys.readouterr().out
    assert (tmp_path / 'log.txt').read_text().splitlines() == [
        'Network: tiny',
        json.dumps(evaluation(128)),
        'Done.',
    ]
    first, second = records(tmp_path / 'stats.jsonl')
    assert first.pop('timestamp') <= second.pop('timestamp') and (first, second) == (tick(64), tick(128))
    assert records(tmp_path / 'metrics-val.jsonl') == [evaluation(128)]
    assert {path.name for path in tmp_path.iterdir()} == {'log.txt', 'stats.jsonl', 'metrics-val.jsonl'}


def test_other_processes_say_and_write_nothing(tmp_path, capsys):
    log = RunLog(str(tmp_path), enabled=False)
    log('hello')
    log.start(TOTAL, resumed_at=64, wandb=offline('abcd1234'), config=CONFIG, tensorboard=True)
    train(log, 128)
    log.evaluation(evaluation(128))
    log.close()
    log.close()
    assert not any(tmp_path.iterdir()) and capsys.readouterr() == ('', '') and log.wandb_id == 'abcd1234'


def test_numbers_that_are_not_finite_are_null(tmp_path):
    log = RunLog(str(tmp_path), enabled=True)
    log.start(TOTAL)
    log.stats(tick(64, loss=float('nan')))
    log.evaluation(evaluation(64, fid=float('inf')))
    log.close()
    strict = lambda name: json.loads(
        (tmp_path / name).read_text(), parse_constant=lambda constant: pytest.fail(constant)
    )
    assert strict('stats.jsonl')['Loss/cd'] == dict(num=64, mean=None, std=0.25)
    assert strict('metrics-val.jsonl')['fid'] is None


def test_a_console_that_is_gone_does_not_stop_the_run(tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, 'w') as broken:
        monkeypatch.setattr(sys, 'stdout', broken)
        log = RunLog(str(tmp_path), enabled=True)
        log('one')
        log('two')
        monkeypatch.undo()
        with contextlib.suppress(BrokenPipeError):
            broken.close()
    assert (tmp_path / 'log.txt').read_text() == 'one\ntwo\n'


# ----------------------------------------------------------------------------
# Resuming.


@pytest.fixture
def interrupted(tmp_path):
    """A run that recorded up to 256 images, was killed in the middle of a line, and whose newest state has seen 128."""
    log = RunLog(str(tmp_path), enabled=True)
    log.start(TOTAL)
    log.evaluation(evaluation(0, ema='teacher'))
    train(log, 64, 128, 192, 256, evaluated=[128, 256])
    for name in ('stats.jsonl', 'metrics-val.jsonl'):
        with open(tmp_path / name, 'a') as file:
            file.write('{"Loss/cd": {"num": 64, "me')
    return tmp_path


def test_a_resumed_run_forgets_what_it_will_compute_again(interrupted):
    before = {
        name: (interrupted / name).read_bytes().splitlines(keepends=True)
        for name in ('stats.jsonl', 'metrics-val.jsonl', 'log.txt')
    }
    log = RunLog(str(interrupted), enabled=True)
    log.start(TOTAL, resumed_at=128)
    assert (interrupted / 'stats.jsonl').read_bytes() == b''.join(before['stats.jsonl'][:2])
    assert (interrupted / 'metrics-val.jsonl').read_bytes() == b''.join(before['metrics-val.jsonl'][:2])
    assert (interrupted / 'log.txt').read_bytes() == b''.join(before['log.txt'])
    train(log, 192, 256, 320)
    log.close()
    assert steps_of(interrupted / 'stats.jsonl') == [64, 128, 192, 256, 320]


def test_lines_that_name_no_images_are_kept_byte_for_byte(tmp_path):
    path = tmp_path / 'stats.jsonl'
    kept = b'{"note":  1}\n\nnot JSON\n[2]\n\xff\n{"Progress/nimg":{"mean":64}}\n'
    path.write_bytes(kept + b'{"Progress/nimg": {"num": 1, "mean": 65, "std": 0}}\n')
    log = RunLog(str(tmp_path), enabled=True)
    log.start(TOTAL, resumed_at=64)
    assert path.read_bytes() == kept


def test_a_file_without_a_future_is_left_alone(tmp_path):
    path = tmp_path / 'stats.jsonl'
    path.write_text(json.dumps(tick(64)) + '\n')
    inode = path.stat().st_ino
    RunLog(str(tmp_path), enabled=True).start(TOTAL, resumed_at=64)
    assert path.stat().st_ino == inode and {p.name for p in tmp_path.iterdir()} == {'stats.jsonl'}


def test_a_last_record_that_lacks_only_its_newline_is_kept(tmp_path):
    path = tmp_path / 'stats.jsonl'
    path.write_text(json.dumps(tick(64)))
    log = RunLog(str(tmp_path), enabled=True)
    log.start(TOTAL, resumed_at=64)
    train(log, 128)
    assert steps_of(path) == [64, 128]


def test_lines_are_appended_to_a_record_that_lacks_only_its_newline(tmp_path):
    path = tmp_path / 'metrics-val.jsonl'
    path.write_text(json.dumps(evaluation(64)))
    run_log.append_lines(str(path), run_log.json_line(evaluation(128)) + '\n')
    assert records(path) == [evaluation(64), evaluation(128)]


def test_a_new_run_in_the_folder_of_an_old_one_begins_anew(interrupted):
    """It is the same run, restarted after a kill that came before its first training state."""
    said_before = (interrupted / 'log.txt').read_text()
    log = RunLog(str(interrupted), enabled=True)
    log.start(TOTAL)
    train(log, 64)
    assert (
        steps_of(interrupted / 'stats.jsonl') == [64]
        and (interrupted / 'metrics-val.jsonl').read_text() == ''
    )
    assert (interrupted / 'log.txt').read_text() == said_before


def test_half_a_line_of_text_is_ended_and_not_lost(tmp_path):
    (tmp_path / 'log.txt').write_text('tick 7 los')
    RunLog(str(tmp_path), enabled=True)('Resumed')
    assert (tmp_path / 'log.txt').read_text() == 'tick 7 los\nResumed\n'


# ----------------------------------------------------------------------------
# A full disk.


@contextlib.contextmanager
def files_no_longer_than(size):
    """A limit on files, which makes the system take a part of what is written and then refuse, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_no_line_and_is_told_once(tmp_path, capfd):
    """Of every line a part would fit, and the system writes it: the files must not keep it."""
    log, long = RunLog(str(tmp_path), enabled=True), 'x' * 4000
    log.start(TOTAL)

    def tell(nimg):
        log(f'{nimg} {long}')
        log.stats(tick(nimg) | {long: dict(num=1, mean=0, std=0)})
        log.evaluation(evaluation(nimg) | {long: 0})

    tell(64)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert min(sizes.values()) > 4000 and max(sizes.values()) < 9000 and capfd.readouterr().err == ''
    with files_no_longer_than(9000):
        tell(128)
        tell(192)
        partial = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert all(path.read_bytes().endswith(b'\n') for path in tmp_path.iterdir()), partial
    told = capfd.readouterr().err
    assert told.count('\n') == 1 and 'Cannot write log.txt' in told and 'Training goes on' in told
    log('space again')
    assert [
        line.split()[0] for line in (tmp_path / 'log.txt').read_text().splitlines() if line[0] != '{'
    ] == ['64', '128', '192', 'space']
    assert steps_of(tmp_path / 'stats.jsonl') == steps_of(tmp_path / 'metrics-val.jsonl') == [64, 128, 192]
    with files_no_longer_than(9000):
        log('full once more')
    assert 'Cannot write log.txt' in capfd.readouterr().err
    log.close()
    assert (tmp_path / 'log.txt').read_text().endswith('space again\nfull once more\n')


# ----------------------------------------------------------------------------
# The progress bar.


def terminal_output(code, columns):
    """What a program shows on a terminal of that width."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack('HHHH', 24, columns, 0, 0))
    process = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdin=side, stdout=side, stderr=side)
    os.close(side)
    output = b''
    with contextlib.suppress(OSError):  # the end of a terminal
        while chunk := os.read(main, 4096):
            output += chunk
    os.close(main)
    assert process.wait() == 0, output.decode()
    return output.decode()


def test_the_bar_fits_a_terminal_of_60_columns_and_counts_a_resumed_run_s_time_from_where_it_went_on(
    tmp_path,
):
    """100 of 200 Mimg were there before, and 1 Mimg takes 0.1 s: 99 more take 10 s. Had all 101 counted as seen in 0.1 s, none would be left."""
    code = f"""
import time
from training.run_log import RunLog
log = RunLog({str(tmp_path)!r}, enabled=True)
log.start(200_000_000, resumed_at=100_000_000)
time.sleep(0.1)
log.advance(101_000_000)
log('tick')
log.close()
"""
    shown = re.split(r'[\r\n]+', re.sub(r'\x1b\[[0-9;]*[A-Za-z]', '', terminal_output(code, 60)))
    assert max(map(len, shown)) <= 60 and 'tick' in [line.strip() for line in shown]
    bars = [line for line in shown if 'kimg' in line]
    assert bars[0].startswith(' 50%|') and '| 100000.0/200000.0 kimg' in bars[0]
    percent, left = re.fullmatch(
        r' (\d+)%\|.*\| 101000\.0/200000\.0 kimg 00:(\d\d)', bars[-1].rstrip()
    ).groups()
    assert percent == '50' and int(left) >= 8


def test_the_bar_ends_at_its_end_where_the_last_step_goes_beyond_the_duration(tmp_path):
    """64 of 100 images, and then 128: no more than all, no time below 0, no warning of the bar's own."""
    code = f"""
from training.run_log import RunLog
log = RunLog({str(tmp_path)!r}, enabled=True)
log.start(100)
log._bar.mininterval, log._bar.miniters, log._bar.dynamic_miniters = 0, 0, False
log.advance(64)
log.advance(128)
log.close()
"""
    shown = re.split(r'[\r\n]+', re.sub(r'\x1b\[[0-9;]*[A-Za-z]', '', terminal_output(code, 40)))
    bars = [line.strip() for line in shown if line.strip()]
    assert [bar.partition('%')[0] for bar in bars] == ['0', '64', '100'] and max(map(len, shown)) <= 40
    assert bars[-1].endswith('0.1/0.1 kimg 00:00')


# ----------------------------------------------------------------------------
# Weights & Biases, the real package.


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """The package, without this machine's settings, its service process ended afterwards."""
    for name in [name for name in os.environ if name.startswith('WANDB_')]:
        monkeypatch.delenv(name)
    for name in ('HOME', 'WANDB_CONFIG_DIR', 'WANDB_CACHE_DIR', 'WANDB_DATA_DIR'):
        monkeypatch.setenv(name, str(tmp_path / 'home'))
    monkeypatch.setenv('WANDB_ERROR_REPORTING', 'false')
    monkeypatch.setattr(sys, 'exit', sys.exit)  # wandb replaces both
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    import wandb

    yield wandb
    with contextlib.suppress(OSError):
        wandb.teardown()


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / '00003-digits-cond'
    folder.mkdir()
    return folder


def wandb_files(run_dir):
    return sorted((run_dir / 'wandb').glob('offline-run-*/run-*.wandb'))


def contents(path):
    """(the run's record, {step: {name: value}}) of a .wandb file, as `wandb sync` would send them."""
    from wandb.proto import wandb_internal_pb2

    run, history = None, []
    for data in leveldb_records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.HasField('run'):
            run = record.run
        elif record.HasField('history'):
            items = {
                item.key or '/'.join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            assert items.pop('_step') == record.history.step.num
            history.append(
                (
                    record.history.step.num,
                    {name: value for name, value in items.items() if not name.startswith('_')},
                )
            )
    assert len(dict(history)) == len(history), 'a step is there twice'
    return run, dict(history)


def services():
    """W&B's processes that this one has started."""
    return [child for child in psutil.Process().children() if 'wandb-core' in child.name()]


def png(path):
    PIL.Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(path)
    return str(path)


def test_wandb_gets_every_tick_and_evaluation_under_the_images_seen(wandb, run_dir, capsys):
    log = begin(run_dir, offline())
    log.evaluation(evaluation(0, ema='teacher', fid=9.0))
    train(log, 64)
    log.stats(tick(128))
    log.evaluation(evaluation(128), grid=png(run_dir / 'grid.png'))
    log.evaluation(evaluation(128, ema='phema-0.050', fid=2.0), grid=png(run_dir / 'grid-0.050.png'))
    log.advance(192)
    log.close()
    (path,) = wandb_files(run_dir)
    run, history = contents(path)
    assert (run.run_id, run.project, run.display_name, list(run.tags)) == (
        log.wandb_id,
        'digits',
        '00003-digits-cond',
        ['a', 'b'],
    )
    assert {
        entry.key: json.loads(entry.value_json) for entry in run.config.update if entry.key != '_wandb'
    } == CONFIG
    row = {'Loss/cd': 6.4, 'Loss/cd_std': 0.25, 'Progress/nimg': 64, 'Progress/kimg': 0.064}
    assert history[0] == {'Metrics/fid/teacher': 9.0} and history[64] == row and list(history) == [0, 64, 128]
    assert {name: history[128][name] for name in ('Loss/cd', 'Metrics/fid', 'Metrics/fid/phema-0.050')} == {
        'Loss/cd': 12.8,
        'Metrics/fid': 2.5,
        'Metrics/fid/phema-0.050': 2.0,
    }
    pictures = [
        path.parent / 'files' / history[128][f'{name}/path'] for name in ('Samples', 'Samples/phema-0.050')
    ]
    assert [np.array(PIL.Image.open(picture)).flatten().tolist() for picture in pictures] == [
        list(range(192))
    ] * 2
    out, err = capsys.readouterr()
    assert out.count('wandb sync') == 1 and err == '' and 'W&B: ' in (run_dir / 'log.txt').read_text()
    assert not services()


def test_wandb_hears_of_a_tick_as_soon_as_it_is_over(wandb, run_dir):
    """Not a tick later: W&B itself would wait for the next step."""
    log = begin(run_dir, offline())
    sent = []
    log._wandb._run.log = lambda row, step, commit: sent.append((step, commit))
    log.stats(tick(64))
    log.advance(64)
    assert not sent
    log.advance(128)
    assert sent == [(64, True)]
    log.close()


def test_a_resumed_run_continues_the_same_wandb_run_and_every_step_is_in_one_folder(wandb, run_dir):
    log = begin(run_dir, offline())
    train(log, 64, 128, 192, evaluated=[192])
    log.close()
    resumed = begin(run_dir, offline(log.wandb_id), resumed_at=128)
    train(resumed, 192, 256)
    resumed.close()
    assert resumed.wandb_id == log.wandb_id
    (first, before), (second, after) = map(contents, wandb_files(run_dir))
    assert first.run_id == second.run_id == log.wandb_id
    assert list(before) == [64, 128, 192] and list(after) == [256] and 'Metrics/fid' in before[192]
    assert steps_of(run_dir / 'stats.jsonl') == [64, 128, 192, 256]


def test_what_a_kill_keeps_from_wandb_is_sent_when_the_run_resumes(wandb, run_dir):
    """W&B's service writes every 15 seconds; a process that is killed takes what it had said since."""
    code = f"""
import os, signal, sys
sys.path.insert(0, 'tests')
from pathlib import Path
from run_logs import begin, evaluation, offline, train
log = begin(Path({str(run_dir)!r}), offline())
print(log.wandb_id, os.getpid(), flush=True)
log.evaluation(evaluation(0, ema='teacher'))
train(log, 64, 128, 192)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run(
        [sys.executable, '-c', code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS='1'),
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run_id, pid = killed.stdout.splitlines()[1].split()
    (path,) = wandb_files(run_dir)
    deadline = time.time() + 10
    while (
        any(
            {'--pid', pid} <= set(process.info['cmdline'] or [])
            for process in psutil.process_iter(['cmdline'])
        )
        and time.time() < deadline
    ):
        time.sleep(0.05)
    assert contents(path)[1] == {}, 'the kill was to lose steps, or this test shows nothing'
    log = begin(run_dir, offline(run_id), resumed_at=128)
    train(log, 192, 256)
    log.close()
    run, history = contents(wandb_files(run_dir)[1])
    assert (
        run.run_id == run_id
        and list(history) == [0, 64, 128, 192, 256]
        and history[0] == {'Metrics/fid/teacher': 2.5}
    )
    assert history[64] == {'Loss/cd': 6.4, 'Loss/cd_std': 0.25, 'Progress/nimg': 64, 'Progress/kimg': 0.064}


def test_a_run_that_gets_wandb_when_it_resumes_brings_its_history(wandb, run_dir):
    log = RunLog(str(run_dir), enabled=True)
    log.start(TOTAL)
    train(log, 64, 128, 192)
    log.close()
    log = begin(run_dir, offline(), resumed_at=128)
    train(log, 192)
    log.close()
    (path,) = wandb_files(run_dir)
    assert list(contents(path)[1]) == [64, 128, 192]


def test_offline_files_that_were_uploaded_and_removed_are_not_made_again(wandb, run_dir):
    log = begin(run_dir, offline())
    train(log, 64, 128, 192)
    log.close()
    for path in sorted((run_dir / 'wandb').rglob('*'), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    log = begin(run_dir, offline(log.wandb_id), resumed_at=128)
    train(log, 192, 256)
    log.close()
    (path,) = wandb_files(run_dir)
    assert list(contents(path)[1]) == [256]


def test_a_run_whose_wandb_was_off_or_failed_for_a_while_brings_what_is_missing(wandb, run_dir):
    log = begin(run_dir, offline())
    train(log, 64)
    log.close()
    without = RunLog(str(run_dir), enabled=True)
    without.start(TOTAL, resumed_at=64)
    train(without, 128, 192)
    without.close()
    again = begin(run_dir, offline(log.wandb_id), resumed_at=192)
    train(again, 256)
    again.close()
    assert [list(contents(path)[1]) for path in wandb_files(run_dir)] == [[64], [128, 192, 256]]


@pytest.mark.parametrize(
    'note, steps', [('64\n', [128, 192]), ('', [64, 128, 192]), ('x', [64, 128, 192]), ('9' * 99, [])]
)
def test_a_note_of_what_is_written_is_kept_and_damage_to_it_does_no_harm(wandb, run_dir, note, steps):
    """What lies before the last step that was sent a minute ago is not sent again after a kill."""
    log = begin(run_dir, offline())
    path = run_dir / 'wandb' / f'{log.wandb_id}.written'
    assert path.read_text() == '-1\n'
    train(log, 64, 128)
    assert path.read_text() == '-1\n'
    log._wandb._since -= trackers.WRITTEN_AFTER
    train(log, 192)
    log._wandb._since -= trackers.WRITTEN_AFTER
    train(log, 256)
    assert path.read_text() == '192\n'
    log.close()
    assert path.read_text() == '256\n'
    path.write_text(note)
    again = begin(run_dir, offline(log.wandb_id), resumed_at=192)
    again.close()
    assert list(contents(wandb_files(run_dir)[1])[1]) == steps


# ----------------------------------------------------------------------------
# W&B that fails.


def said(run_dir, words='W&B failed'):
    """The lines of log.txt with these words."""
    return [line for line in (run_dir / 'log.txt').read_text().splitlines() if words in line]


def test_a_service_process_that_dies_is_told_once(wandb, run_dir, capfd):
    log = begin(run_dir, offline())
    train(log, 64)
    (service,) = services()
    service.kill()
    service.wait()
    train(log, 128, 192)
    log.close()
    log.close()
    (line,) = said(run_dir)
    assert 'stats.jsonl' in line and ('ConnectionResetError' in line or 'BrokenPipeError' in line)
    assert steps_of(run_dir / 'stats.jsonl') == [64, 128, 192] and log.wandb_id
    assert 'Traceback' not in capfd.readouterr().err


@pytest.mark.parametrize('name', ['CommError', 'UsageError'])
def test_errors_of_wandb_while_training_are_told_once(wandb, run_dir, monkeypatch, name):
    log = begin(run_dir, offline())

    def fail(*args, **kwargs):
        raise getattr(wandb.errors, name)('the server\nis unwell')

    monkeypatch.setattr(log._wandb._run, 'log', fail)
    train(log, 64, 128)
    log.close()
    (line,) = said(run_dir)
    assert f'{name}: the server is unwell' in line and steps_of(run_dir / 'stats.jsonl') == [64, 128]


def test_errors_that_are_not_wandb_s_are_not_hidden(wandb, run_dir, monkeypatch):
    log = begin(run_dir, offline())
    monkeypatch.setattr(log._wandb._run, 'log', lambda *args, **kwargs: {}['a bug of ours'])
    with pytest.raises(KeyError, match='a bug of ours'):
        train(log, 64)
    log.close()


def test_without_a_network_the_run_begins_after_the_time_limit(wandb, run_dir, monkeypatch):
    """Nothing listens at port 9. On a resume the run's name is kept for the next one."""
    monkeypatch.setenv('WANDB_BASE_URL', 'http://127.0.0.1:9')
    monkeypatch.setenv('WANDB_API_KEY', '0' * 40)
    monkeypatch.setattr(trackers, 'INIT_TIMEOUT', 1.0)
    start = time.time()
    log = begin(run_dir, offline('abcd1234') | dict(mode='online'), resumed_at=64)
    assert time.time() - start < 20 and log.wandb_id == 'abcd1234'
    train(log, 128)
    log.close()
    (line,) = said(run_dir)
    assert 'CommError' in line and 'connection refused' in line and steps_of(run_dir / 'stats.jsonl') == [128]


def test_without_a_key_the_cure_is_told(wandb, run_dir, monkeypatch):
    monkeypatch.setenv('WANDB_BASE_URL', 'http://127.0.0.1:9')
    log = begin(run_dir, offline() | dict(mode='online'))
    train(log, 64)
    log.close()
    (line,) = said(run_dir)
    assert 'wandb login' in line and log.wandb_id is None


@pytest.mark.parametrize('by_environment', [False, True])
def test_disabled_is_silent_and_keeps_the_name(wandb, run_dir, monkeypatch, by_environment):
    if by_environment:
        monkeypatch.setenv('WANDB_MODE', 'disabled')
    log = begin(
        run_dir, offline('abcd1234') | dict(mode=None if by_environment else 'disabled'), resumed_at=64
    )
    train(log, 128)
    log.close()
    assert (
        log.wandb_id == 'abcd1234' and not (run_dir / 'wandb').exists() and not (run_dir / 'log.txt').exists()
    )


def test_wandb_leaves_signals_and_the_console_alone(wandb, run_dir):
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGCHLD)
    handlers = [signal.getsignal(number) for number in numbers]
    log = begin(run_dir, offline())
    assert [
        signal.getsignal(number) for number in numbers
    ] == handlers and log._wandb._run.settings.console == 'off'
    log.close()


@pytest.mark.parametrize('project', ['imagenet/64', 'x' * 129])
def test_a_project_that_wandb_would_refuse_is_refused_before_anything_is_made(wandb, project):
    with pytest.raises(UserError, match='--wandb_project'):
        run_log.check_available(dict(project=project), tensorboard=False)
    run_log.check_available(dict(project='imagenet-64', mode='online'), tensorboard=False)
    run_log.check_available(None, tensorboard=False)


@pytest.mark.parametrize(
    'options, tensorboard, cure',
    [(dict(project='p'), False, 'pip install wandb'), (None, True, 'pip install tensorboard')],
)
def test_a_missing_package_is_named_with_its_cure(run_dir, monkeypatch, options, tensorboard, cure):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard' if tensorboard else 'wandb', None)
    for call in (
        lambda: run_log.check_available(options, tensorboard),
        lambda: begin(run_dir, options, tensorboard=tensorboard),
    ):
        with pytest.raises(UserError, match=cure):
            call()


# ----------------------------------------------------------------------------
# W&B online, with a server that knows one run.


class Server(http.server.ThreadingHTTPServer):
    """As much of W&B's server as a run talks to: it has one run, and keeps the lines of its history."""

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Answers)
        self.history: list[dict] = []
        self.address = f'http://127.0.0.1:{self.server_port}'
        threading.Thread(target=self.serve_forever, kwargs=dict(poll_interval=0.05), daemon=True).start()


class Answers(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_PUT(self):
        self.body()
        self.answer({})

    def do_POST(self):
        body = self.body()
        if self.path.endswith('/graphql'):
            return self.answer(dict(data=self.graphql(json.loads(body))))
        if self.path.endswith('/file_stream'):
            for name, part in json.loads(body).get('files', {}).items():
                self.server.history += (
                    map(json.loads, part['content']) if name == 'wandb-history.jsonl' else []
                )
        return self.answer({})

    def body(self):
        return self.rfile.read(int(self.headers.get('Content-Length') or 0))

    def graphql(self, query):
        run = dict(
            id='cnVu',
            name='abcd1234',
            displayName='name',
            project=dict(id='cA==', name='digits', entity=dict(id='bWU=', name='me')),
            historyLineCount=len(self.server.history),
            historyTail=json.dumps(list(map(json.dumps, self.server.history[-1:]))),
            config='{}',
            summaryMetrics='{}',
            eventsLineCount=0,
            logLineCount=0,
            eventsTail='[]',
            wandbConfig='{"t": 1}',
        )
        if query['operationName'] == 'RunResumeStatus':
            return dict(
                model=dict(
                    id='cA==',
                    name='digits',
                    entity=dict(id='bWU=', name='me'),
                    bucket=run if self.server.history else None,
                )
            )
        if query['operationName'] == 'UpsertBucket':
            return dict(upsertBucket=dict(bucket=run, inserted=not self.server.history))
        if query['operationName'] == 'CreateRunFiles':
            files = [
                dict(name=name, uploadUrl=f'{self.server.address}/upload')
                for name in query['variables']['files']
            ]
            return dict(createRunFiles=dict(runID='abcd1234', uploadHeaders=[], files=files))
        return {}

    def answer(self, reply):
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server(monkeypatch):
    server = Server()
    monkeypatch.setenv('WANDB_BASE_URL', server.address)
    monkeypatch.setenv('WANDB_API_KEY', '0' * 40)
    yield server
    server.shutdown()
    server.server_close()


def test_online_the_server_says_where_it_stands(wandb, run_dir, server):
    """It had got 64 of the steps up to 192 when the process was killed; the state has seen 128."""
    online = offline('abcd1234') | dict(mode='online')
    log = RunLog(str(run_dir), enabled=True)
    log.start(TOTAL)
    train(log, 64, 128, 192)
    log.close()
    server.history.append({'_step': 64, 'Loss/cd': 6.4})
    log = begin(run_dir, online, resumed_at=128)
    train(log, 192, 256)
    log.close()
    assert [(line['_step'], line['Loss/cd']) for line in server.history] == [
        (64, 6.4),
        (128, 12.8),
        (192, 19.2),
        (256, 25.6),
    ]
    assert said(run_dir, 'W&B: ') == [f'W&B: {server.address}/me/digits/runs/abcd1234'] and not said(run_dir)


def test_a_server_that_vanishes_delays_the_end_by_the_time_limit_at_most(wandb, run_dir, server, monkeypatch):
    monkeypatch.setattr(trackers, 'FINISH_TIMEOUT', 1.0)
    log = begin(run_dir, offline() | dict(mode='online'))
    server.shutdown()
    server.server_close()
    start = time.time()
    train(log, 64, 128)
    assert time.time() - start < 5
    log.close()
    assert time.time() - start < 20 and steps_of(run_dir / 'stats.jsonl') == [64, 128]
    (line,) = said(run_dir)
    assert 'TimeoutError' in line


# ----------------------------------------------------------------------------
# TensorBoard.


def shown_by_tensorboard(run_dir):
    """{name: steps} and pictures, as TensorBoard shows the folder."""
    accumulators = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    events = accumulators.EventAccumulator(str(run_dir))
    events.Reload()
    tags = events.Tags()
    return (
        {name: [(e.step, pytest.approx(e.value)) for e in events.Scalars(name)] for name in tags['scalars']},
        {name: [(e.step, e.width, e.height) for e in events.Images(name)] for name in tags['images']},
    )


def test_tensorboard_shows_every_step_once_after_a_resume(run_dir):
    pytest.importorskip('tensorboard')
    log = RunLog(str(run_dir), enabled=True)
    log.start(TOTAL, tensorboard=True)
    train(log, 64, 128, 192)  # and a kill: no close
    time.sleep(1.1)  # TensorBoard reads files in the order of their names, which hold seconds
    log = RunLog(str(run_dir), enabled=True)
    log.start(TOTAL, tensorboard=True, resumed_at=128)
    train(log, 192)
    log.stats(tick(256))
    PIL.Image.new('L', (6, 4)).save(run_dir / 'gray.png')
    log.evaluation(evaluation(256), grid=str(run_dir / 'gray.png'))
    log.close()
    numbers, pictures = shown_by_tensorboard(run_dir)
    assert numbers['Loss/cd'] == [(step, step / 10) for step in (64, 128, 192, 256)]
    assert [step for step, _ in numbers['Loss/cd_std']] == [64, 128, 192, 256]
    assert numbers['Metrics/fid'] == [(256, 2.5)] and pictures == {'Samples': [(256, 6, 4)]}


def test_tensorboard_forgets_the_old_run_where_a_new_one_begins_in_its_folder(run_dir):
    pytest.importorskip('tensorboard')
    for steps in ((64, 128, 192), (32, 128)):
        log = RunLog(str(run_dir), enabled=True)
        log.start(TOTAL, tensorboard=True)
        train(log, *steps)
        log.close()
        time.sleep(1.1)
    assert [step for step, _ in shown_by_tensorboard(run_dir)[0]['Loss/cd']] == [32, 128]


@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')  # of the writer's thread
def test_tensorboard_goes_on_in_a_new_file_when_the_disk_has_been_full(run_dir):
    pytest.importorskip('tensorboard')
    log = RunLog(str(run_dir), enabled=True)
    log.start(TOTAL, tensorboard=True)
    train(log, 64)
    with files_no_longer_than(200):
        train(log, 128, 192)
    time.sleep(1.1)
    train(log, 256)
    log.close()
    assert (
        steps_of(run_dir / 'stats.jsonl') == [64, 128, 192, 256]
        and len(said(run_dir, 'TensorBoard: cannot write')) == 1
    )
    steps = [step for step, _ in shown_by_tensorboard(run_dir)[0]['Loss/cd']]
    assert steps == sorted(set(steps)) and {64, 256} <= set(steps) < {64, 128, 192, 256}
