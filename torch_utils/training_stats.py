"""Scalar statistics of a training run, gathered on the device and reduced over processes once a tick.

`report` and `report_bins` add to running moments without any transfer; `collect` sums them over all processes, returns
{name: {"num", "mean", "std"}} and starts anew. Every process must report the same names.
"""
from __future__ import annotations

import math

import torch

from torch_utils import distributed

_moments: dict[tuple[str, ...], torch.Tensor] = {}  # names -> [len(names), 3] float64: count, sum, sum of squares


def _accumulator(names: tuple[str, ...], device: torch.device) -> torch.Tensor:
    if names not in _moments:
        _moments[names] = torch.zeros([len(names), 3], dtype=torch.float64, device=device)
    return _moments[names]


def report(name: str | list[str], values) -> None:
    """Add observations: any tensor for one name, [N, K] for K names, a column each."""
    names = (name,) if isinstance(name, str) else tuple(name)
    values = torch.as_tensor(values).detach().double().reshape(-1, len(names))
    total = _accumulator(names, values.device)
    total[:, 0] += len(values)
    total[:, 1] += values.sum(dim=0)
    total[:, 2] += values.square().sum(dim=0)


def report_bins(names: list[str], index: torch.Tensor, values: torch.Tensor) -> None:
    """Add `values` [N] under `names[index]`, index [N] int64."""
    values = values.detach().double()
    moments = torch.stack([torch.ones_like(values), values, values.square()], dim=1)
    _accumulator(tuple(names), values.device).index_add_(0, index, moments)


def collect() -> dict[str, dict[str, float]]:
    """Statistics of all processes since the last call; names without observations are left out."""
    if not _moments:
        return {}
    names = [name for group in _moments for name in group]
    totals = distributed.all_reduce_sum(torch.cat(list(_moments.values()))).tolist()
    reset()
    stats = {}
    for name, (count, total, square) in zip(names, totals):
        if count:
            mean = total / count
            stats[name] = dict(num=int(count), mean=mean, std=math.sqrt(max(square / count - mean ** 2, 0)))
    return stats


def reset() -> None:
    """Forget everything that was reported."""
    _moments.clear()
