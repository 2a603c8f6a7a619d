"""Small things around training: times for people, gradients under DDP, learning rates."""
from __future__ import annotations

import contextlib
import math

import torch


def format_time(seconds: float) -> str:
    """`42s`, `3m 05s`, `1h 02m`, `2d 03h`."""
    seconds = round(seconds)
    if seconds < 60:
        return f'{seconds}s'
    if seconds < 3600:
        return f'{seconds // 60}m {seconds % 60:02}s'
    if seconds < 86400:
        return f'{seconds // 3600}h {seconds // 60 % 60:02}m'
    return f'{seconds // 86400}d {seconds // 3600 % 24:02}h'


def gradient_sync(net: torch.nn.Module, sync: bool):
    """A context in which DDP reduces gradients only if `sync`: true in the last round of an accumulation."""
    if sync or not isinstance(net, torch.nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return net.no_sync()


LR_SCHEDULES = ('constant', 'linear', 'cosine')


def learning_rate(base: float, nimg: int, total_nimg: int, rampup_nimg: float, schedule: str = 'constant') -> float:
    """Learning rate after `nimg` images: a linear ramp from 0 over `rampup_nimg`, times a decay to 0 at `total_nimg`.

    Schedules: constant; linear 1 − p; cosine (1 + cos(pi p)) / 2, with p = nimg / total_nimg.
    """
    ramp = min(nimg / rampup_nimg, 1.0) if rampup_nimg > 0 else 1.0
    done = min(nimg / total_nimg, 1.0)
    decay = dict(constant=1.0, linear=1 - done, cosine=(1 + math.cos(math.pi * done)) / 2)[schedule]
    return base * ramp * decay
