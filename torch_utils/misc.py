"""Small helpers of training: readable times, learning rates, TF32, the allocator."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Callable, Iterator

import numpy as np
import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def allow_tf32(allowed: bool) -> None:
    """Allow or forbid TensorFloat-32 (10 bits of mantissa) inside matrix products and convolutions."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


def use_deterministic_algorithms(only: bool) -> None:
    """Whether PyTorch uses deterministic algorithms only, and raises where it has none."""
    if only:
        # cuBLAS reads it when it starts, before the first matrix product.
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(only)
    # Nothing here reads memory before it is written.
    torch.utils.deterministic.fill_uninitialized_memory = False


@contextlib.contextmanager
def garbage_by_hand(every: int = 100) -> Iterator[Callable[[int], None]]:
    """A block in which Python collects garbage only when the function that it gives is called with the number of
    a step, and that is a multiple of `every`: by itself, processes would do so at different steps, and the others
    would wait each time. What exists before the block is left alone."""

    def collect(step: int) -> None:
        if step % every == 0:
            gc.collect()

    enabled = gc.isenabled()
    gc.freeze()
    gc.disable()
    try:
        yield collect
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy an array from the host to the device, asynchronously."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' else tensor.to(device)


def keep_freed_memory() -> None:
    """Have glibc's allocator keep freed memory instead of returning it to the system.

    A step on a CPU frees its activations, and each of their pages that is requested again costs a page fault:
    1,100 in a step of the demo, 5 % of its time.
    """
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # glibc's limit
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class AsyncScalar:
    """A device scalar, read without waiting: on a GPU, its value as of an earlier step."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == 'cuda'
        self._value, self._arrived = torch.zeros([], dtype=torch.int64, pin_memory=self._on_gpu), None
        self._latest = 0

    def read(self, tensor: torch.Tensor) -> int:
        """The latest known value of `tensor`, int64 []."""
        # Start the next copy only when the previous one has arrived.
        if not self._on_gpu:
            return int(tensor)
        if self._arrived is None or self._arrived.query():
            self._latest = int(self._value)
            self._value.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        return self._latest
