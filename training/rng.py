"""Counter-based random numbers: a sample's noise and edge depend only on the seed and the sample's index in
the stream of training images.

A batch may therefore be split over processes, accumulation rounds and restarts in any way and see the same
noise, and there is no generator state to save. Dropout masks and augmentation are drawn for a whole batch at
once (`SampleRng.generator`) and do depend on the split. Numbers are drawn in blocks of `BLOCK` consecutive
samples, each from a generator seeded by (seed, purpose, block).
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import torch
from torch import Tensor

BLOCK = 32  # samples


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from integers and strings, independent for different tuples."""
    digest = hashlib.blake2b('/'.join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


class SampleRng:
    """Random numbers for the samples first ... first + count − 1 of the global stream.

    Every purpose (`'noise'`, `'edge'`, ...) has an independent stream of numbers.
    """

    def __init__(self, seed: int, first: int, count: int, device: torch.device | str = 'cpu'):
        self.seed, self.first, self.count, self.device = seed, first, count, torch.device(device)

    def at(self, first: int) -> SampleRng:
        """The numbers of as many other samples, from number `first`."""
        return SampleRng(self.seed, first, self.count, self.device)

    def _draw(self, purpose: str, shape, device, fill) -> Tensor:
        # Whole blocks, of which the first and the last are used in part.
        generator = torch.Generator(device)
        first_block, last_block = self.first // BLOCK, (self.first + self.count - 1) // BLOCK
        blocks = []
        for block in range(first_block, last_block + 1):
            generator.manual_seed(derive_seed(self.seed, purpose, block))
            # Always a whole block, so that numbers do not depend on where the batch begins.
            blocks.append(fill([BLOCK, *shape], generator=generator, device=device))
        drawn = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        return drawn.narrow(0, self.first - first_block * BLOCK, self.count)

    def normal(self, purpose: str, shape=()) -> Tensor:
        """[count, *shape] float32 on the device, standard normal."""
        return self._draw(purpose, shape, self.device, torch.randn)

    def normal_on_host(self, purpose: str) -> np.ndarray:
        """[count] float32, standard normal, on the host: for choices that the host must know without
        synchronizing with the device."""
        return self._draw(purpose, (), torch.device('cpu'), torch.randn).numpy()

    def uniform(self, purpose: str) -> np.ndarray:
        """[count] float64, uniform in [0, 1), on the host."""
        rand = functools.partial(torch.rand, dtype=torch.float64)
        return self._draw(purpose, (), torch.device('cpu'), rand).numpy()

    def generator(self, purpose: str) -> torch.Generator:
        """A generator on the device for numbers that belong to this set of samples as a whole (dropout masks,
        augmentation)."""
        seed = derive_seed(self.seed, purpose, self.first, self.count)
        return torch.Generator(self.device).manual_seed(seed)
