"""Processes that this one has started: which they are, and in words how they have ended."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess

CAUSES = {
    signal.SIGKILL: ', as the system does when memory runs out',
    signal.SIGBUS: ', as when /dev/shm or a disk is full',
}


def how_ended(status: int) -> str:
    """An exit status in words. A negative one is minus the signal, as in `subprocess`."""
    if status >= 0:
        return f'exit status {status}'
    try:
        number = signal.Signals(-status)
    except ValueError:  # one of the real-time signals
        return f'killed by signal {-status}'
    return f'killed by {number.name}{CAUSES.get(number, "")}'


def how_one_died(processes: Sequence[BaseProcess]) -> str | None:
    """`how_ended` of one that failed, or None. SIGTERM, which a broken pool sends the rest, is last."""
    statuses = sorted(
        (process.exitcode for process in processes if process.exitcode),
        key=lambda status: status == -signal.SIGTERM,
    )
    return how_ended(statuses[0]) if statuses else None


@contextlib.contextmanager
def starting(processes: list[BaseProcess]) -> Iterator[None]:
    """A block that starts processes by `multiprocessing`, which are added to the list."""
    earlier = multiprocessing.active_children()
    yield
    processes += [child for child in multiprocessing.active_children() if child not in earlier]
