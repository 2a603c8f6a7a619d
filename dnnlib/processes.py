"""Child processes: which ones a block starts, and how they ended, as text."""

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
    """An exit status as text. A negative one is minus the signal, as in `subprocess`."""
    if status >= 0:
        return f'exit status {status}'
    try:
        number = signal.Signals(-status)
    except ValueError:  # one of the real-time signals
        return f'killed by signal {-status}'
    return f'killed by {number.name}{CAUSES.get(number, "")}'


def how_one_died(processes: Sequence[BaseProcess]) -> str | None:
    """`how_ended` of a process that failed, or None."""
    # SIGTERM last: a broken pool sends it to all processes but the cause.
    statuses = sorted(
        (process.exitcode for process in processes if process.exitcode),
        key=lambda status: status == -signal.SIGTERM,
    )
    return how_ended(statuses[0]) if statuses else None


@contextlib.contextmanager
def starting(processes: list[BaseProcess]) -> Iterator[None]:
    """Add the `multiprocessing` children that the block starts to the list."""
    earlier = multiprocessing.active_children()
    yield
    processes += [child for child in multiprocessing.active_children() if child not in earlier]
