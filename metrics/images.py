"""The images of a folder or zip, in batches, this process's share of them."""
from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from dnnlib.util import UserError
from training.dataset import ImageFolderDataset

READERS = 4  # threads that decode: Pillow lets go of the interpreter lock
AHEAD = 4    # batches decoded in advance


def open_images(path: str | os.PathLike, num: int | None = None, seed: int = 0) -> ImageFolderDataset:
    """The images of a folder or zip; `num` of them, a random subset, where there are more.

    Raises: UserError where there are fewer than `num`, or where they are unfit as a data set.
    """
    dataset = ImageFolderDataset(path, max_size=num, seed=seed)
    if num is not None and len(dataset) < num:
        raise UserError(f'{path} holds {len(dataset)} images, expected at least {num}. Make more images, or pass --num={len(dataset)}.')
    return dataset


def image_batches(dataset: Sequence, batch: int, rank: int = 0, world_size: int = 1) -> Iterator[torch.Tensor]:
    """This process's images, uint8 [n, C, H, W] a batch, n <= batch, decoded ahead of use.

    Processes take contiguous shares in the order of ranks, so that what is gathered from them has the data set's order.

    Args:
        dataset: `dataset[i]` is (uint8 [C, H, W], label).
        batch: images at a time.
    """
    start, end = (len(dataset) * r // world_size for r in (rank, rank + 1))
    waiting: deque = deque()
    pool = ThreadPoolExecutor(READERS)
    try:
        for first in range(start, end, batch):
            waiting.append([pool.submit(dataset.__getitem__, i) for i in range(first, min(first + batch, end))])
            if len(waiting) > AHEAD:
                yield _stack(waiting.popleft())
        while waiting:
            yield _stack(waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _stack(futures: list) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(future.result()[0]) for future in futures]))
