"""Time in the probability-flow ODE: x(t) = s(t) (y + sigma(t) n)   (Karras et al. 2022, Eq. 4).

Schedules (training/schedules.py) and solvers (training/solvers.py) both need sigma(t), and do not know each
other. Everything here is a function of one Python number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from dnnlib import UserError

VP_EPSILON = 1e-3  # smallest time of the variance-preserving process
VP_BETAS = (19.9, 0.1)  # its usual beta_d and beta_min (Song et al. 2021)
SIGMAS_OF_TIME = ('linear', 'vp', 've')
SCALES_OF_TIME = ('none', 'vp')


class OdeTime(NamedTuple):
    """sigma(t) and s(t), their derivatives, and t(sigma)."""

    sigma: Callable[[float], float]
    sigma_slope: Callable[[float], float]
    time: Callable[[float], float]  # inverse of `sigma`
    scale: Callable[[float], float] = lambda t: 1.0
    scale_slope: Callable[[float], float] = lambda t: 0.0


LINEAR = OdeTime(lambda t: t, lambda t: 1.0, lambda sigma: sigma)  # EDM's own: time is the noise level
VE = OdeTime(math.sqrt, lambda t: 0.5 / math.sqrt(t), lambda sigma: sigma * sigma)


def vp_time(beta_d: float, beta_min: float) -> OdeTime:
    """The time of the variance-preserving process with s = 1.

    sigma(t)² = exp(beta_d t² / 2 + beta_min t) − 1   (Song et al. 2021; Karras et al. 2022, Table 1).
    """
    sigma = lambda t: math.sqrt(math.expm1(beta_d * t * t / 2 + beta_min * t))
    # By the chain rule, with exp(…) = 1 + sigma².
    slope = lambda t: (beta_min + beta_d * t) * (sigma(t) + 1 / sigma(t)) / 2
    # The positive root of beta_d t² / 2 + beta_min t = ln(1 + sigma²).
    time = lambda s: (math.sqrt(beta_min**2 + 2 * beta_d * math.log1p(s * s)) - beta_min) / beta_d
    return OdeTime(sigma, slope, time)


def vp_betas(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """beta_d and beta_min for which sigma(VP_EPSILON) = sigma_min and sigma(1) = sigma_max."""
    # ln(1 + sigma²) is linear in both betas, so its values at the two ends determine them.
    low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (low / VP_EPSILON - high) / (VP_EPSILON - 1)
    return beta_d, high - beta_d / 2


def ode_time(schedule: str, scaling: str, sigma_min: float, sigma_max: float) -> OdeTime:
    """EDM's ablations of sigma(t) and s(t) (Karras et al. 2022, Table 1, 'Schedule' and 'Scaling').

    Args:
        schedule: linear: sigma = t; vp: see `vp_time`, spanning the range; ve: sigma = sqrt(t).
        scaling: none: s = 1; vp: s = 1 / sqrt(1 + sigma²), which keeps the variance.
    Raises: UserError for other names.
    """
    if schedule not in SIGMAS_OF_TIME:
        raise UserError(f'schedule {schedule!r} is not one of {", ".join(SIGMAS_OF_TIME)}')
    if scaling not in SCALES_OF_TIME:
        raise UserError(f'scaling {scaling!r} is not one of {", ".join(SCALES_OF_TIME)}')

    # sigma(t).
    if schedule == 'vp':
        time = vp_time(*vp_betas(sigma_min, sigma_max))
    else:
        time = dict(linear=LINEAR, ve=VE)[schedule]

    # s(t).
    if scaling == 'none':
        return time
    scale = lambda t: 1 / math.sqrt(1 + time.sigma(t) ** 2)
    # The derivative of (1 + sigma²)^(−1/2).
    scale_slope = lambda t: -time.sigma(t) * time.sigma_slope(t) * scale(t) ** 3
    return time._replace(scale=scale, scale_slope=scale_slope)
