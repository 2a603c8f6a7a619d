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
    """Add observations: any tensor for one name, [N, K] for K names, a column each. Those that are not finite are left out."""
    names = (name,) if isinstance(name, str) else tuple(name)
    moments = _moments_of(torch.as_tensor(values).detach().double().reshape(-1, len(names)))
    _accumulator(names, moments.device).add_(moments.sum(dim=0))


def report_bins(names: list[str], index: torch.Tensor, values: torch.Tensor) -> None:
    """Add `values` [N] under `names[index]`, index [N] int64. Those that are not finite are left out."""
    moments = _moments_of(values.detach().double())
    _accumulator(tuple(names), values.device).index_add_(0, index, moments)


def _moments_of(values: torch.Tensor) -> torch.Tensor:
    """[..., 3] float64: count, value, square; zeros for what is not finite."""
    finite = values.isfinite()
    values = values.where(finite, 0)
    return torch.stack([finite.double(), values, values.square()], dim=-1)


def collect() -> dict[str, dict[str, float]]:
    """Statistics of all processes since the last call; names without observations are left out."""
    stats = {}
    for names, totals in state():
        for name, (count, total, square) in zip(names, totals.tolist()):
            if count:
                mean = total / count
                stats[name] = dict(num=int(count), mean=mean, std=math.sqrt(max(square / count - mean ** 2, 0)))
    reset()
    return stats


def state() -> list[tuple[list[str], torch.Tensor]]:
    """What was reported since the last collection, summed over processes, for a training state that is made in the middle of a tick."""
    if not _moments:
        return []
    totals = distributed.all_reduce_sum(torch.cat(list(_moments.values()))).cpu().split([len(names) for names in _moments])
    return [(list(names), total.clone()) for names, total in zip(_moments, totals)]


def load_state(groups: list[tuple[list[str], torch.Tensor]], device: torch.device) -> None:
    """Inverse of `state`: every process knows the names, the main one has what was reported."""
    reset()
    for names, total in groups:
        _moments[tuple(names)] = (total if distributed.is_main() else torch.zeros_like(total)).to(device)


def reset() -> None:
    """Forget everything that was reported."""
    _moments.clear()
