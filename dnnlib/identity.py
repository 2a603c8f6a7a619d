"""Unique identities of processes, whether one has ended, and ending this one at once."""

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
from dnnlib.util import process_exists

# An identity in a file.
KIND = Record(
    dict(host=Text(), boot=Text(), pid=Integer(1, 2**31 - 1), started=Real()),
    ['host', 'boot', 'pid', 'started'],
)
SAME_START_SEC = 2.0  # the boot time is in whole seconds, and moves when the clock is corrected


def machine() -> dict[str, str]:
    """The host, its boot and its container, each with its own process ids."""
    boot = ''
    with contextlib.suppress(OSError):  # Linux only
        boot = (
            f'{Path("/proc/sys/kernel/random/boot_id").read_text().strip()} '
            f'{os.readlink("/proc/self/ns/pid")}'
        )
    return dict(host=platform.node(), boot=boot)


def of_process(pid: int | None = None) -> dict:
    """Plain data unique to a process: `machine()`, `pid`, and `started` (seconds after booting).

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
    """Whether a process has ended; None if unknown: on another machine, or hidden from this user."""
    # Process ids mean nothing on another machine or after another boot.
    if any(process[name] != value for name, value in machine().items()):
        return None
    # An id may have been reused by a process that started later.
    try:
        found = psutil.Process(process['pid'])
        return (
            found.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
            or abs(_started(found) - process['started']) > SAME_START_SEC
        )
    except psutil.AccessDenied:
        return None
    except psutil.NoSuchProcess:
        return None if process_exists(process['pid']) else True


def _started(process: psutil.Process) -> float:
    return process.create_time() - psutil.boot_time()


def end_at_once(line: str, status: int = 1) -> NoReturn:
    """End this process and its data workers, from any thread, with only a line on stderr."""
    with contextlib.suppress(OSError):  # the terminal may be gone
        # print() could deadlock on a lock that an interrupted print holds.
        os.write(sys.__stderr__.fileno(), f'{line}\n'.encode())
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)
