"""The keyboard's interrupt while scripts are imported; clocks; read-only folders."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers import ROOT, SCRIPTS

from dnnlib import UserError, interrupts
from dnnlib.util import check_writable, remove
from training import run_lock, saved_files, tick_stats

# Runs a script as Python does, with an interrupt when a module is about to be imported, and in a callback, where Python would forget it.
INTERRUPTED = """
import builtins, os, runpy, signal, sys, weakref
script, module, how, *sys.argv[1:] = sys.argv[1:]
sys.argv[0], real = script, builtins.__import__
class Thing: pass
def interrupted(name, *arguments, **kwargs):
    if name == module:
        if how == 'callback':
            thing = Thing()
            callback = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
            del thing
        else:
            signal.raise_signal(signal.SIGINT)
    return real(name, *arguments, **kwargs)
builtins.__import__ = interrupted
runpy.run_path(script, run_name='__main__')
"""


def interrupt(script, module, how, *arguments):
    return subprocess.run(
        [sys.executable, '-c', INTERRUPTED, script, module, how, *arguments],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=120,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.parametrize('script', [*SCRIPTS, 'example.py'])
def test_an_interrupt_during_imports_is_one_line(script):
    done = interrupt(script, 'torch' if script == 'example.py' else 'click', 'at once')
    assert (done.returncode, done.stderr, done.stdout) == (130, 'Interrupted.\n', '')


@pytest.mark.parametrize('how', ['at once', 'callback'])
def test_what_is_imported_later_is_imported_too(tmp_path, how):
    done = interrupt('train.py', 'torch_utils', how, f'--outdir={tmp_path}', '--data=x')
    assert (done.returncode, done.stderr) == (130, 'Interrupted.\n')


def test_an_interrupt_at_work_ends_it_in_order(tmp_path):
    done = interrupt(
        'dataset_tool.py', 'PIL.Image', 'at once', '--source=digits', f'--dest={tmp_path / "digits.zip"}'
    )
    assert done.returncode in (1, 130) and 'Traceback' not in done.stderr and not list(tmp_path.iterdir())


def test_other_programs_that_import_dnnlib_keep_their_interrupt():
    program = 'import dnnlib, signal\ntry: signal.raise_signal(signal.SIGINT)\nexcept KeyboardInterrupt: print("mine")'
    done = subprocess.run(
        [sys.executable, '-c', program],
        cwd=ROOT,
        text=True,
        capture_output=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert done.stdout == 'mine\n'


def test_every_script_is_known():
    assert sorted(interrupts.SCRIPTS) == sorted(
        script.removesuffix('.py') for script in [*SCRIPTS, 'example.py']
    )


def test_processes_that_are_started_meanwhile_never_get_the_interrupt():
    with interrupts.kept_from_children():
        child = subprocess.Popen(
            [sys.executable, '-c', 'import time; print(1, flush=True); time.sleep(0.5); print(2)'],
            stdout=subprocess.PIPE,
        )
    child.stdout.readline()
    child.send_signal(signal.SIGINT)
    assert child.communicate()[0] == b'2\n' and child.returncode == 0


def test_a_clock_that_stands_still_divides_nothing_by_zero(monkeypatch):
    c = SimpleNamespace(
        batch_size=8, lr=1, total_nimg=8, lr_rampup_nimg=0, lr_schedule='constant', lr_ref_nimg=0
    )
    run = SimpleNamespace(
        c=c,
        progress=SimpleNamespace(nimg=8, tick=0, tick_start_nimg=0),
        averages=SimpleNamespace(halflife_at=lambda nimg: nimg),
        device=SimpleNamespace(type='cpu'),
        start_nimg=0,
    )
    stats = tick_stats.tick_stats(run, tick_stats.Clock(5.0, 5.0, 0.0), 5.0, 0.0)
    assert (
        stats['Timing/images_per_sec']['mean']
        == stats['Timing/data_wait_share']['mean']
        == stats['Timing/sec_per_tick']['mean']
        == 0
    )


def test_durations_do_not_depend_on_the_time_of_day():
    """Which may jump back. Times of files are compared with it, and lines carry it."""
    sources = [
        *ROOT.glob('*.py'),
        *(
            path
            for room in ('dnnlib', 'metrics', 'torch_utils', 'training')
            for path in (ROOT / room).rglob('*.py')
        ),
    ]
    found = [line for path in sources for line in path.read_text().splitlines() if 'time.time()' in line]
    assert found and all('mtime' in line or 'timestamp' in line for line in found), found


def read_only(*_, **__):
    raise OSError(30, 'Read-only file system')


def test_a_folder_on_a_read_only_file_system_is_named(tmp_path, monkeypatch):
    check_writable(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr('tempfile.TemporaryFile', read_only)
    with pytest.raises(UserError, match=f'{tmp_path}: Read-only file system'):
        check_writable(tmp_path)


def test_a_file_that_cannot_be_removed_is_named(tmp_path, monkeypatch):
    assert not remove(tmp_path / 'x')
    (tmp_path / 'x').touch()
    monkeypatch.setattr(os, 'remove', read_only)
    with pytest.raises(UserError, match=f'{tmp_path / "x"}.*Read-only file system'):
        remove(tmp_path / 'x')


def test_a_run_is_not_resumed_in_a_folder_that_is_read_only(tmp_path, monkeypatch):
    monkeypatch.setattr('tempfile.TemporaryFile', read_only)
    with pytest.raises(UserError, match=f'{tmp_path}: Read-only file system'):
        run_lock.RunLock(saved_files.folder_of(str(tmp_path / 'training-state-000001.pt'))).acquire()


def test_installed_commands_are_scripts_too(monkeypatch):
    for name, known in (
        ('edm-dataset-tool', True),
        ('edm-train', True),
        ('edm-other', False),
        ('train', False),
    ):
        monkeypatch.setattr(sys.modules['__main__'], '__file__', f'/usr/bin/{name}', raising=False)
        assert interrupts.is_script() == known
