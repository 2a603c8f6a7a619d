"""Training batches, loaded ahead of use by worker processes, and the time spent waiting for them."""

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

PREFETCH = 2  # batches per worker


class Failure(NamedTuple):
    """A worker's error, sent in place of a batch: `DataLoader` would put the traceback into the message."""

    error: UserError
    traceback: str


class Samples(torch.utils.data.Dataset):
    """A data set that loads batch by batch."""

    def __init__(self, dataset):
        self.dataset = dataset

    # DataLoader prefers this to __getitem__: one call, and at most one Failure, per batch.
    def __getitems__(self, indices: list[int]) -> list[tuple[np.ndarray, ...]] | Failure:
        try:
            return [self.dataset[i] for i in indices]
        except UserError as error:
            if (worker := torch.utils.data.get_worker_info()) is None:
                raise
            return Failure(error, f'in DataLoader worker process {worker.id}:\n{traceback.format_exc()}')


def collate(samples: list[tuple[np.ndarray, ...]] | Failure) -> tuple[torch.Tensor, ...] | Failure:
    """Stack the samples' arrays as a batch; faster than PyTorch's default, which stacks tensor by tensor."""
    if isinstance(samples, Failure):
        return samples
    return tuple(torch.from_numpy(np.stack(arrays)) for arrays in zip(*samples))


@contextlib.contextmanager
def unchanged_handler(number: signal.Signals) -> Iterator[None]:
    """Restore a signal's handler after the block.

    `DataLoader` makes SIGCHLD raise when a worker dies, wherever the program is, perhaps amid a save. It also
    checks its workers while it waits for a batch, which is early enough.
    """
    before = signal.getsignal(number)
    yield
    if signal.getsignal(number) is not before:
        signal.signal(number, before or signal.SIG_DFL)


class Prefetcher:
    """Endless batches (images as stored, labels) of a data set in a sampler's order.

    Images are uint8 pixels or latents. Workers collate them ahead of use, into pinned memory for a GPU, so
    that copies overlap its work. Without workers, `next` loads a batch in this process while a GPU still
    computes the previous step.

    Args:
        device: where the batches will be copied.
        worker_init_fn: called in each worker with its index.
    """

    def __init__(
        self, dataset, sampler, batch_size: int, workers: int, device: torch.device, worker_init_fn=None
    ):
        # Remember the workers, whose exit statuses tell why one has died.
        self._workers: list[BaseProcess] = []
        with unchanged_handler(signal.SIGCHLD), starting(self._workers):
            self._batches = iter(
                torch.utils.data.DataLoader(
                    Samples(dataset),
                    sampler=sampler,
                    batch_size=batch_size,
                    num_workers=workers,
                    worker_init_fn=worker_init_fn,
                    collate_fn=collate,
                    pin_memory=device.type == 'cuda',
                    prefetch_factor=PREFETCH if workers else None,
                )
            )
        self._seconds = 0.0

    def __next__(self):
        """The next batch. Raises: UserError if an image cannot be read, or a worker has died."""
        # DataLoader notices a dead worker while it waits for its batch, within seconds.
        start = time.perf_counter()
        try:
            batch = next(self._batches)
        except RuntimeError as error:
            if (ending := how_one_died(self._workers)) is None:
                raise
            raise UserError(
                f'A data-loading process died ({ending}). Use fewer --workers, --cache=False, or a machine '
                'with more memory; --resume continues from the newest training state.'
            ) from error
        finally:
            self._seconds += time.perf_counter() - start

        # A worker's error came in place of a batch; its traceback is the cause.
        if isinstance(batch, Failure):
            raise batch.error from RuntimeError(batch.traceback)
        return batch

    def data_wait(self) -> float:
        """Seconds that this process spent waiting for batches, or loading them, since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
