"""The batches of training, from the disk to the step, and how long the step waited for them."""

from __future__ import annotations

import contextlib
import signal
import time
import traceback
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import numpy as np
import torch

from dnnlib import UserError
from dnnlib.processes import how_one_died, starting

AHEAD = 2  # batches that each worker has ready


class Failure(NamedTuple):
    """What a worker has met with, in the place of a batch, and its traceback. `DataLoader` would put that
    into the error's message."""

    error: UserError
    traceback: str


class Samples(torch.utils.data.Dataset):
    """A data set in batches."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitems__(self, indices: list[int]) -> list[tuple[np.ndarray, ...]] | Failure:
        try:
            return [self.dataset[i] for i in indices]
        except UserError as error:
            if (worker := torch.utils.data.get_worker_info()) is None:
                raise
            return Failure(error, f'in DataLoader worker process {worker.id}:\n{traceback.format_exc()}')


def stacked(samples: list[tuple[np.ndarray, ...]] | Failure) -> tuple[torch.Tensor, ...] | Failure:
    """The samples as a batch: each of their arrays stacked, once, and not tensor by tensor."""
    return (
        samples
        if isinstance(samples, Failure)
        else tuple(torch.from_numpy(np.stack(arrays)) for arrays in zip(*samples))
    )


@contextlib.contextmanager
def unchanged_handler(number: signal.Signals) -> Iterator[None]:
    """A block after which the signal does what it did before.

    `DataLoader` has SIGCHLD raise where a worker has died, in the middle of whatever is done then, which may
    be a save. It also looks at its workers while it waits for them, and that is early enough.
    """
    before = signal.getsignal(number)
    yield
    if signal.getsignal(number) is not before:
        signal.signal(number, before or signal.SIG_DFL)


class Feed:
    """The endless batches of a data set, in the order of a sampler: (raw images, labels) as the data set
    stores them, pixels in uint8.

    They are stacked by worker processes, ahead of use, and for a GPU lie in pinned memory, from which they
    are copied while it works. Without workers this process loads them when they are asked for, which is while
    a GPU is busy with the step before: launching it does not wait.

    Args:
        device: where they will go.
        worker_init_fn: called in each worker with its number.
    """

    def __init__(
        self, dataset, sampler, batch_size: int, workers: int, device: torch.device, worker_init_fn=None
    ):
        self._workers: list[BaseProcess] = []
        with unchanged_handler(signal.SIGCHLD), starting(self._workers):
            self._batches = iter(
                torch.utils.data.DataLoader(
                    Samples(dataset),
                    sampler=sampler,
                    batch_size=batch_size,
                    num_workers=workers,
                    worker_init_fn=worker_init_fn,
                    collate_fn=stacked,
                    pin_memory=device.type == 'cuda',
                    prefetch_factor=AHEAD if workers else None,
                )
            )
        self._seconds = 0.0

    def __next__(self):
        """The next batch. Raises: UserError where an image cannot be read, or a worker was killed: within
        seconds of the first batch missing."""
        start = time.perf_counter()
        try:
            batch = next(self._batches)
        except RuntimeError as error:
            if (ending := how_one_died(self._workers)) is None:
                raise
            raise UserError(
                f'A process that loads data has died ({ending}). Use fewer --workers, --cache=False, or a '
                'machine with more memory; --resume goes on from the newest training state.'
            ) from error
        finally:
            self._seconds += time.perf_counter() - start
        if isinstance(batch, Failure):
            raise batch.error from RuntimeError(batch.traceback)
        return batch

    def waited(self) -> float:
        """Seconds that this process has spent on waiting for batches, or loading them, since the last
        call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
