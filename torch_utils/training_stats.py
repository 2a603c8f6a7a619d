"""Scalar statistics of a training run, gathered on the device and reduced over processes once a tick.

`report` and `report_bins` accumulate moments on the device; their tensors must not change afterwards.
`collect` sums them over all processes, returns {name: {"num", "mean", "std"}} and resets them. Every process
must report the same names. Reports are queued and become moments together, because their operations would
slow down a step of a small network.
"""

from __future__ import annotations

import math

import torch

from torch_utils import distributed

AT_ONCE = 32  # queued reports of a name that become moments together

# Names -> (values,) or (values, index) of each queued report.
_waiting: dict[tuple[str, ...], list[tuple[torch.Tensor, ...]]] = {}
# Names -> [len(names), 3] float64: count, sum, sum of squares.
_moments: dict[tuple[str, ...], torch.Tensor] = {}


def _accumulator(names: tuple[str, ...], device: torch.device) -> torch.Tensor:
    if names not in _moments:
        _moments[names] = torch.zeros([len(names), 3], dtype=torch.float64, device=device)
    return _moments[names]


def report(name: str | list[str], values) -> None:
    """Add observations: any tensor for one name, [N, K] for K names. Non-finite ones are left out."""
    names = (name,) if isinstance(name, str) else tuple(name)
    _add(names, torch.as_tensor(values).detach().reshape(-1, len(names)))


def report_bins(names: list[str], index: torch.Tensor, values: torch.Tensor) -> None:
    """Add `values` [N] under `names[index]`, index [N] int64. Those that are not finite are left out."""
    _add(tuple(names), values.detach(), index)


def _add(names: tuple[str, ...], values: torch.Tensor, *index: torch.Tensor) -> None:
    _accumulator(names, values.device)  # create it now, so that all processes have the same order of names
    reports = _waiting.setdefault(names, [])
    reports.append((values, *index))
    # Many reports at once, because small networks would feel the launches for each.
    if len(reports) >= AT_ONCE:
        _take_in(names)


def _take_in(names: tuple[str, ...]) -> None:
    """Add the queued reports to the moments."""
    values, *index = (torch.cat(column) for column in zip(*_waiting.pop(names)))
    moments = _moments_of(values.double())
    if index:
        _moments[names].index_add_(0, *index, moments)
    else:
        _moments[names].add_(moments.sum(dim=0))


def _moments_of(values: torch.Tensor) -> torch.Tensor:
    """[..., 3] float64: count, value, square; zeros for non-finite values."""
    finite = values.isfinite()
    # Replaced, not selected: a selection would wait for the device to know its size.
    values = values.where(finite, 0)
    return torch.stack([finite.double(), values, values.square()], dim=-1)


def collect() -> dict[str, dict[str, float]]:
    """Statistics of all processes since the last call; names without observations are left out."""
    stats = {}
    for names, totals in state():
        for name, (count, total, square) in zip(names, totals.tolist()):
            if count:
                mean = total / count  # the variance may be slightly negative by rounding
                stats[name] = dict(num=int(count), mean=mean, std=math.sqrt(max(square / count - mean**2, 0)))
    reset()
    return stats


def state() -> list[tuple[list[str], torch.Tensor]]:
    """The sums over processes since the last collection, for a training state saved during a tick."""
    for names in list(_waiting):
        _take_in(names)
    if not _moments:
        return []
    # One all-reduce for all names.
    sums = distributed.all_reduce_sum(torch.cat(list(_moments.values()))).cpu()
    totals = sums.split([len(names) for names in _moments])
    return [(list(names), total.clone()) for names, total in zip(_moments, totals)]


def load_state(groups: list[tuple[list[str], torch.Tensor]], device: torch.device) -> None:
    """Inverse of `state`: all processes take the names, and the main one the sums. Raises: ValueError."""
    reset()
    for names, total in groups:
        if total.shape != (len(names), 3):
            raise ValueError(f'statistics of {len(names)} names have the shape {list(total.shape)}')
        # The sums are of all processes: given to each, they would count many times.
        _moments[tuple(names)] = (total if distributed.is_main() else torch.zeros_like(total)).to(device)


def reset() -> None:
    """Forget everything that was reported."""
    for reports in (_waiting, _moments):
        reports.clear()
