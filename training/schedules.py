"""Schedules: functions that return a decreasing list of noise levels to sample at, for any solver.

Each is a function of (n, sigma_min, sigma_max, rho) and returns [n] float64 from sigma_max to sigma_min. A
new one is a function here and an entry in `SCHEDULES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dnnlib import UserError
from training import consistency_ops as ops
from training.ode_time import VP_BETAS, VP_EPSILON, vp_betas, vp_time

DEFAULT_RHO = 7.0  # Karras et al. 2022


def polynomial(n: int, sigma_min: float, sigma_max: float, rho: float | None = None) -> Tensor:
    """Evenly spaced in sigma^(1/rho)   (Karras et al. 2022, Eq. 5)."""
    return ops.karras_sigmas(n, sigma_min, sigma_max, DEFAULT_RHO if rho is None else rho)


def logsnr(n: int, sigma_min: float, sigma_max: float, rho: float | None = None) -> Tensor:
    """Evenly spaced in ln sigma, the time of the variance-exploding process (Karras et al. 2022, Table 1,
    've')."""
    return sigma_max * (sigma_min / sigma_max) ** _ramp(n)


def time_uniform(n: int, sigma_min: float, sigma_max: float, rho: float | None = None) -> Tensor:
    """Evenly spaced in t^(1/rho), t the time of the linear variance-preserving process that spans the range
    (Karras et al. 2022, Table 1, 'vp').

    Args:
        rho: None: 1, evenly in t; 2 is DEIS's quadratic time steps (Zhang & Chen 2023).
    """
    # The betas for which time runs from 1 at sigma_max to VP_EPSILON at sigma_min.
    sigma, rho = vp_time(*vp_betas(sigma_min, sigma_max)).sigma, rho or 1.0
    times = (1 + _ramp(n) * (VP_EPSILON ** (1 / rho) - 1)) ** rho
    return torch.tensor([sigma(t) for t in times.tolist()], dtype=torch.float64)


def vp(n: int, sigma_min: float, sigma_max: float, rho: float | None = None) -> Tensor:
    """`time_uniform` whatever `rho`, EDM's option for other discretizations."""
    return time_uniform(n, sigma_min, sigma_max)


def cosine(n: int, sigma_min: float, sigma_max: float, rho: float | None = None) -> Tensor:
    """Evenly spaced in atan sigma, the time of the variance-preserving cosine process (Heek et al. 2024,
    Appendix A)."""
    return ops.sigma_nodes(n, sigma_min, sigma_max, rho, 'cosine')


def iddpm(n: int, sigma_min: float, sigma_max: float, rho: float | None = None) -> Tensor:
    """Evenly spaced in the index of iDDPM's levels within the range (Karras et al. 2022, Table 1, 'iDDPM').

    Raises: UserError if the range has none.
    """
    # The table rises from 0; samplers go down.
    inside = [u for u in reversed(iddpm_levels()) if sigma_min <= u <= sigma_max]
    levels = torch.tensor(inside, dtype=torch.float64)
    if not len(levels):
        raise UserError(f'iDDPM has no noise level between {sigma_min:g} and {sigma_max:g}: widen the range')
    # The nearest indices, because iDDPM has no levels between its own.
    return levels[(_ramp(n) * (len(levels) - 1)).round().long()]


def iddpm_levels(M: int = 1000, C_1: float = 0.001, C_2: float = 0.008) -> list[float]:
    """[M+1] noise levels of iDDPM in increasing order, 0 first.

    u_{j−1} = sqrt((u_j² + 1) / max(alpha_bar_{j−1} / alpha_bar_j, C_1) − 1), u_M = 0, alpha_bar_j = sin²(pi/2
    j / (M (C_2 + 1)))   (Nichol & Dhariwal 2021 in EDM's notation: Karras et al. 2022, Appendix C.3.2).
    """
    alpha_bar = lambda j: math.sin(math.pi / 2 * j / M / (C_2 + 1)) ** 2
    levels = [0.0]
    # From u_M = 0 at the clean end up. C_1 bounds the ratio, which is 0 at j = 1.
    for j in range(M, 0, -1):
        levels.append(math.sqrt((levels[-1] ** 2 + 1) / max(alpha_bar(j - 1) / alpha_bar(j), C_1) - 1))
    return levels


def _ramp(n: int) -> Tensor:
    """[n] float64, evenly from 0 to 1."""
    return torch.arange(n, dtype=torch.float64) / max(n - 1, 1)


SCHEDULES = dict(polynomial=polynomial, logsnr=logsnr, time_uniform=time_uniform, cosine=cosine)


def schedule_sigmas(
    name: str, n: int, sigma_min: float, sigma_max: float, rho: float | None = None
) -> Tensor:
    """Noise levels from sigma_max down to sigma_min, by one of SCHEDULES; a single one is sigma_max.

    Args:
        rho: exponent of `polynomial`, None: 7, and of `time_uniform`, None: 1. Others do not use it.
    Returns: [n] float64.
    Raises: UserError for another name.
    """
    if name not in SCHEDULES:
        raise UserError(f'schedule {name!r} is not one of {", ".join(SCHEDULES)}')
    return SCHEDULES[name](n, sigma_min, sigma_max, rho)


# ----------------------------------------------------------------------------
# Schedules by the names of EDM's ablations, with EDM's ranges, and by their own.


class Discretization(NamedTuple):
    """A schedule and its usual range."""

    sigmas: Callable[[int, float, float, float | None], Tensor]
    sigma_min: float
    sigma_max: float


VP_RANGE = (vp_time(*VP_BETAS).sigma(VP_EPSILON), vp_time(*VP_BETAS).sigma(1.0))
DISCRETIZATIONS = dict(
    edm=Discretization(polynomial, 0.002, 80),
    vp=Discretization(vp, *VP_RANGE),
    ve=Discretization(logsnr, 0.02, 100),
    iddpm=Discretization(iddpm, 0.002, 81),
    **{name: Discretization(schedule, 0.002, 80) for name, schedule in SCHEDULES.items()},
)
