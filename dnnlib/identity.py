"""Processes by what tells them from all others: whether one is gone, and how this one ends at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import platform
import sys
from pathlib import Path
from typing import NoReturn

import psutil

from dnnlib.schema import Integer, Real, Record, Text

# An identity in a file.
KIND = Record(
    dict(host=Text(), boot=Text(), pid=Integer(1, 2**31 - 1), started=Real()),
    ['host', 'boot', 'pid', 'started'],
)
SAME_START_SEC = 2.0  # the time of booting is in whole seconds, and corrections of the clock move it


def machine() -> dict[str, str]:
    """The host, its boot and its container, each of which has process ids of its own."""
    boot = ''
    with contextlib.suppress(OSError):  # Linux only
        boot = (
            f'{Path("/proc/sys/kernel/random/boot_id").read_text().strip()} '
            f'{os.readlink("/proc/self/ns/pid")}'
        )
    return dict(host=platform.node(), boot=boot)


def of_process(pid: int | None = None) -> dict:
    """Plain data that no other process ever has: `machine()`, `pid`, and `started` (seconds after booting).

    Raises: psutil.Error.
    """
    process = psutil.Process(pid)
    return dict(machine(), pid=process.pid, started=_started(process))


def same(a: dict, b: dict) -> bool:
    """Whether two identities are of one process."""
    return (
        all(a[name] == b[name] for name in ('host', 'boot', 'pid'))
        and abs(a['started'] - b['started']) <= SAME_START_SEC
    )


def has_ended(process: dict) -> bool | None:
    """Whether a process is gone; None if unknown: on another machine, or hidden from this user."""
    if any(process[name] != value for name, value in machine().items()):
        return None
    try:
        found = psutil.Process(process['pid'])
        return (
            found.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
            or abs(_started(found) - process['started']) > SAME_START_SEC
        )
    except psutil.AccessDenied:
        return None
    except psutil.NoSuchProcess:
        return None if _answers(process['pid']) else True


def _started(process: psutil.Process) -> float:
    return process.create_time() - psutil.boot_time()


def _answers(pid: int) -> bool:
    """Whether there is a process of that id, also one that /proc does not show."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def end_at_once(line: str, status: int = 1) -> NoReturn:
    """End this process and its data workers, from any thread, with a line on stderr and nothing else."""
    with contextlib.suppress(OSError):  # the terminal may be gone
        # A print could wait for another print that was interrupted.
        os.write(sys.__stderr__.fileno(), f'{line}\n'.encode())
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)
