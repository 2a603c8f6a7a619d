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

KIND = Record(
    dict(host=Text(), boot=Text(), pid=Integer(1, 2**31 - 1), started=Real()),
    ['host', 'boot', 'pid', 'started'],
)  # in a file
SAME_START_SEC = 2.0  # the time of booting, from which starts are counted, is a whole number of seconds that corrections of the clock move


def machine() -> dict[str, str]:
    """The host, and what tells apart hosts of one name, a host before and after booting, and containers, whose process ids are their own."""
    boot = ''
    with contextlib.suppress(OSError):  # Linux only
        boot = f'{Path("/proc/sys/kernel/random/boot_id").read_text().strip()} {os.readlink("/proc/self/ns/pid")}'
    return dict(host=platform.node(), boot=boot)


def of_process(pid: int | None = None) -> dict:
    """Plain data that no other process ever has: `machine()`, `pid`, and `started`, in seconds after booting. Raises: psutil.Error."""
    process = psutil.Process(pid)
    return dict(machine(), pid=process.pid, started=_started(process))


def same(a: dict, b: dict) -> bool:
    """Whether two identities are of one process."""
    return (
        all(a[name] == b[name] for name in ('host', 'boot', 'pid'))
        and abs(a['started'] - b['started']) <= SAME_START_SEC
    )


def has_ended(process: dict) -> bool | None:
    """Whether a process is gone, given its identity; None where that cannot be known: on another machine, or hidden from this user."""
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
    """End this process and those that load data for it, from any thread, with a line on stderr. Nothing else is run or written."""
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(
            sys.__stderr__.fileno(), f'{line}\n'.encode()
        )  # a print could wait for one that is interrupted
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)
