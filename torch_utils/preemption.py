"""Signals of schedulers and users to stop, on which all processes act at the same step."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time

from torch_utils.distributed import AsyncAllReduce

# SLURM's at its time limit, its --signal=USR1, the keyboard's.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_REQUEST_SEC = 5.0  # a terminal, torchrun and SLURM may each deliver the same signal
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later


class PreemptionHandler:
    """A context in which signals to stop are recorded; `requested` is the name of the first one, or None.

    Repeats within five seconds count as one; a later one ends the process at once.
    """

    def __init__(self, hosts: AsyncAllReduce):
        self._hosts = hosts
        self.requested: str | None = None
        self._first_time = 0.0
        self._previous: dict = {}

    def __enter__(self) -> PreemptionHandler:
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            # Once stopping, a repeated signal must not change the exit status.
            signal.signal(number, signal.SIG_IGN if self.here() else handler)

    def here(self) -> bool:
        """Whether this process was asked to stop."""
        return self.requested is not None

    def anywhere(self) -> bool:
        """Whether any process was asked to stop. All processes must call it; synchronizes them."""
        return self._hosts.any(self.here())

    def _handle(self, number: int, _frame) -> None:
        now = time.monotonic()
        if self.requested is None:
            self.requested, self._first_time = signal.Signals(number).name, now
        elif now - self._first_time > SAME_REQUEST_SEC:
            with contextlib.suppress(OSError):  # the terminal may be gone
                # print() could deadlock on a lock that an interrupted print holds.
                os.write(sys.__stderr__.fileno(), b'Stopping at once.\n')
            os._exit(128 + number)


class WorkersIgnoreSignals:
    """A context in which data workers, with this as their `worker_init_fn`, ignore signals to stop.

    A scheduler may send these to every process, but the current step needs its data. After the block, workers
    obey SIGTERM again, with which Python ends them.
    """

    def __init__(self):
        # Raw, because a lock could deadlock with a signal during the handler.
        self._leaving = multiprocessing.RawValue('b', 0)

    def __enter__(self) -> WorkersIgnoreSignals:
        return self

    def __exit__(self, *_):
        self._leaving.value = 1

    def __call__(self, _worker: int) -> None:
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame) -> None:
        if number == signal.SIGTERM and self._leaving.value:
            os._exit(0)
