"""What killed processes were writing goes with the next one that writes there; what others are writing stays."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, run

from dnnlib import util
from dnnlib.util import LEFTOVER_SECONDS, atomic_write, temporary_folder, temporary_name

WRITE = {
    'file': 'with util.atomic_write(sys.argv[1]) as file:\n    file.write(b"half")\n    wait()',
    'folder': 'with util.temporary_folder(sys.argv[1]) as folder:\n    (folder / "part").touch()\n    wait()',
}


def writer(path, what):
    """A process that is writing."""
    code = f'import sys, time\nfrom dnnlib import util\ndef wait(): print(1, flush=True); time.sleep(60)\n{WRITE[what]}'
    process = subprocess.Popen([sys.executable, '-c', code, str(path)], cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def write(path):
    """As a process does that begins."""
    util.remove_leftovers.cache_clear()
    with atomic_write(path) as file:
        file.write(b'whole')


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize('what', WRITE)
def test_what_a_killed_process_left_goes_and_what_a_running_one_writes_stays(tmp_path, what):
    process = writer(tmp_path / 'a.npz', what)
    write(tmp_path / 'b.npz')
    leftover, _ = names(tmp_path)
    assert leftover.startswith('.a.npz.') and leftover.endswith('.tmp')
    process.send_signal(signal.SIGKILL)
    process.communicate()
    write(tmp_path / 'b.npz')
    assert names(tmp_path) == ['b.npz']


@pytest.mark.parametrize('age, stays', [(0, True), (LEFTOVER_SECONDS + 60, False)])
def test_what_another_machine_left_goes_after_a_day(tmp_path, monkeypatch, age, stays):
    monkeypatch.setattr(util, '_this_machine', lambda: 'abcdef')
    leftover = tmp_path / temporary_name('a.npz').replace(str(os.getpid()), '999999999')
    monkeypatch.undo()
    leftover.touch()
    os.utime(leftover, (time.time() - age,) * 2)
    write(tmp_path / 'b.npz')
    assert leftover.exists() == stays


def test_files_of_other_programs_stay(tmp_path):
    others = ['.tmp', '.notes.tmp', '.a.npz.12-0a1b2c3d.tmp', '.x.abcdef-1-12.tmp', 'a.npz.tmp']
    for name in others:
        (tmp_path / name).touch()
    write(tmp_path / 'b.npz')
    assert names(tmp_path) == sorted([*others, 'b.npz'])


def test_a_folder_is_looked_at_once(tmp_path, monkeypatch):
    """Fifty thousand images would be listed fifty thousand times."""
    looked, glob = [], type(tmp_path).glob
    monkeypatch.setattr(
        type(tmp_path), 'glob', lambda self, pattern: looked.append(self) or glob(self, pattern)
    )
    for i in range(3):
        with atomic_write(tmp_path / str(i), durable=False):
            pass
    assert looked == [tmp_path]


def test_a_temporary_folder_is_gone_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), temporary_folder(tmp_path / 'x') as folder:
        (folder / 'part').touch()
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_a_killed_conversion_leaves_nothing_for_ever(tmp_path):
    """The next one of the same name, whose process may have died in the middle too."""
    process = writer(tmp_path / 'digits.zip', 'folder')
    process.kill()
    process.communicate()
    assert names(tmp_path)
    run('dataset_tool.py', '--source=digits', f'--dest={tmp_path / "digits.zip"}')
    assert names(tmp_path) == ['digits.zip']
