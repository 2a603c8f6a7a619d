"""The batches of training, from the disk to the step, and how long the step waited for them."""
from __future__ import annotations

import time

import numpy as np
import torch

from dnnlib import UserError

AHEAD = 2  # batches that each worker has ready


def stacked(samples: list[tuple[np.ndarray, ...]]) -> tuple[torch.Tensor, ...]:
    """The samples as a batch: each of their arrays stacked, once, and not tensor by tensor."""
    return tuple(torch.from_numpy(np.stack(arrays)) for arrays in zip(*samples))


class Feed:
    """The endless batches of a data set, in the order of a sampler: (raw images, labels) as the data set stores them, pixels in uint8.

    They are stacked by worker processes, ahead of use, and for a GPU lie in pinned memory, from which they are copied while it works. Without
    workers this process loads them when they are asked for, which is while a GPU is busy with the step before: launching it does not wait.

    Args:
        device: where they will go.
        worker_init_fn: called in each worker with its number.
    """

    def __init__(self, dataset, sampler, batch_size: int, workers: int, device: torch.device, worker_init_fn=None):
        self._batches = iter(torch.utils.data.DataLoader(
            dataset, sampler=sampler, batch_size=batch_size, num_workers=workers, worker_init_fn=worker_init_fn,
            collate_fn=stacked, pin_memory=device.type == 'cuda', prefetch_factor=AHEAD if workers else None))
        self._seconds = 0.0

    def __next__(self):
        """The next batch. A worker's `UserError` arrives with the worker's traceback for a text: its last line is the message."""
        start = time.perf_counter()
        try:
            return next(self._batches)
        except UserError as error:
            raise UserError(str(error).strip().splitlines()[-1].removeprefix('dnnlib.util.UserError: ')) from error
        finally:
            self._seconds += time.perf_counter() - start

    def waited(self) -> float:
        """Seconds that this process has spent on waiting for batches, or loading them, since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
