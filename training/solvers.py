"""Solvers: functions that step a state over a list of falling noise levels. None of them knows how the list
was made.

Each is `solver(denoiser, x, sigmas, ...) -> x`: x [N, ...] float64 is the state at the first level; the
result is the state at the last. A denoiser here is a function D(x, sigma) of a state and a Python number that
returns float64. A new solver of the ODE is a function here and an entry in `ODE_SOLVERS`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dnnlib import UserError
from training import consistency_ops as ops
from training.ode_time import LINEAR, OdeTime

Denoiser = Callable[[Tensor, float], Tensor]
Perturb = Callable[[Tensor, float], tuple[Tensor, float]]  # state and time, before a step: with noise added

# ----------------------------------------------------------------------------
# The probability-flow ODE. With another time than sigma, "sigmas" are times, and states are scaled by s(t).


def euler(
    denoiser: Denoiser,
    x: Tensor,
    times: Sequence[float],
    time: OdeTime = LINEAR,
    perturb: Perturb | None = None,
) -> Tensor:
    """x <- x + (t' − t) dx/dt, of first order, one evaluation a step."""
    for t, t_next in itertools.pairwise(times):
        if perturb:
            x, t = perturb(x, t)
        x = x + (t_next - t) * ode_slope(denoiser, x, t, time)
    return x


def heun(
    denoiser: Denoiser,
    x: Tensor,
    times: Sequence[float],
    time: OdeTime = LINEAR,
    perturb: Perturb | None = None,
    alpha: float = 1.0,
) -> Tensor:
    """Runge-Kutta steps of second order, two evaluations each (Karras et al. 2022, Algorithms 1 to 3).

    A step to 0, where the slope has no value, is Euler's. `alpha`: where in the step the second slope is
    taken.
    """
    for t, t_next in itertools.pairwise(times):
        if perturb:
            x, t = perturb(x, t)
        step = t_next - t
        slope = ode_slope(denoiser, x, t, time)
        if t_next > 0:
            second = ode_slope(denoiser, x + alpha * step * slope, t + alpha * step, time)
            slope = slope + (second - slope) / (2 * alpha)
        x = x + step * slope
    return x


def ode_slope(denoiser: Denoiser, x: Tensor, t: float, time: OdeTime = LINEAR) -> Tensor:
    """dx/dt = (sigma'/sigma + s'/s) x − (sigma'/sigma) s D(x/s; sigma)   (Karras et al. 2022, Eq. 81).

    With sigma = t and s = 1: (x − D) / sigma.
    """
    sigma, s = time.sigma(t), time.scale(t)
    rate = time.sigma_slope(t) / sigma
    return (rate + time.scale_slope(t) / s) * x - rate * s * denoiser(x / s, sigma)


def churn(
    gain: float,
    S_min: float,
    S_max: float,
    S_noise: float,
    time: OdeTime,
    round_sigma: Callable[[float], float],
    randn_like: Callable[[Tensor], Tensor],
) -> Perturb:
    """Noise before every step with S_min <= sigma <= S_max that raises sigma by `gain` (Karras et al. 2022,
    Algorithm 2)."""

    def perturb(x, t):
        # The noise is drawn at every step, used or not, as in EDM: images then differ by what the options do.
        sigma, noise = time.sigma(t), randn_like(x)
        raised = time.time(round_sigma(sigma + gain * sigma)) if S_min <= sigma <= S_max else t
        spread = math.sqrt(max(time.sigma(raised) ** 2 - sigma**2, 0))
        return time.scale(raised) * (x / time.scale(t) + spread * S_noise * noise), raised

    return perturb


class OdeSolver(NamedTuple):
    """A solver of the ODE for `ode_solve`, and what there is to choose.

    Attributes:
        solve: (denoiser, x, sigmas), and the keywords `order` and `variant` where there is a choice.
        evaluations: of the denoiser in a step; a step to 0 takes one.
        orders, variants: to choose from, the default first.
    """

    solve: Callable[..., Tensor]
    evaluations: int = 1
    orders: Sequence[int] = ()
    variants: Sequence[str] = ()


ODE_SOLVERS = dict(euler=OdeSolver(euler), heun=OdeSolver(heun, evaluations=2))


def ode_solve(
    denoiser: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    solver: str,
    order: int | None = None,
    variant: str | None = None,
    afs: bool = False,
    to_zero: bool = False,
) -> Tensor:
    """The state at the last of `sigmas`, from that at the first, along the probability-flow ODE.

    Args:
        denoiser: D(x, sigma) of [N, ...] float64 and a float64 scalar.
        x: [N, ...] at sigmas[0], which has a deviation of about that level.
        sigmas: [n] falling noise levels; the last may be 0.
        solver: one of ODE_SOLVERS.
        order, variant: of solvers that have several; None: their default.
        afs: analytical first step: the first slope is x / sqrt(1 + sigma²), as for data of unit variance,
            without an evaluation.
        to_zero: after the last level, x <- D(x; sigma), one evaluation more.
    Returns: [N, ...] float64.
    Raises: UserError where the solver has no such order or variant, or the levels do not fall.
    """
    chosen, sigmas = _chosen(solver, order, variant), torch.as_tensor(sigmas, dtype=torch.float64).tolist()
    if not sigmas or sigmas[-1] < 0 or any(a <= b for a, b in itertools.pairwise(sigmas)):
        raise UserError(
            f'noise levels {", ".join(f"{s:g}" for s in sigmas)}: they must fall, and none is below 0'
        )
    if to_zero and sigmas[-1] == 0:
        raise UserError('to_zero is for noise levels that end above 0')

    def denoise(x, sigma):
        if afs and sigma == sigmas[0]:  # levels fall: this is the first evaluation and no other
            return x - sigma / math.sqrt(1 + sigma**2) * x
        return denoiser(x, ops.noise_level(sigma, x)).double()

    x = chosen(denoise, x.double(), sigmas)
    return denoise(x, sigmas[-1]) if to_zero else x


def _chosen(solver: str, order: int | None, variant: str | None) -> Callable[..., Tensor]:
    """The solver with its order and variant. Raises: UserError."""
    if solver not in ODE_SOLVERS:
        raise UserError(f'solver {solver!r} is not one of {", ".join(ODE_SOLVERS)}')
    settings = {}
    for name, given, known in (
        ('order', order, ODE_SOLVERS[solver].orders),
        ('variant', variant, ODE_SOLVERS[solver].variants),
    ):
        if given is not None and given not in known:
            there = (
                f'{name} is one of {", ".join(map(str, known))}'
                if known
                else f'solver has no {name} to choose'
            )
            raise UserError(f'{name} {given!r}: the {solver} {there}')
        if known:
            settings[name] = known[0] if given is None else given
    return lambda denoiser, x, sigmas: ODE_SOLVERS[solver].solve(denoiser, x, sigmas, **settings)


# ----------------------------------------------------------------------------
# Others: students, adjusted DDIM, consistency models.


def ddim(denoiser: Denoiser, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """x <- D + (sigma' / sigma)(x − D), one evaluation a step (Heek et al. 2024, Section 3)."""
    for sigma, sigma_next in itertools.pairwise(sigmas):
        x = ops.ddim_step(x, denoiser(x, sigma), sigma, sigma_next)
    return x


def addim(denoiser: Denoiser, x: Tensor, sigmas: Sequence[float], xvar_scale: float = 1.0) -> Tensor:
    """DDIM steps whose noise is lengthened by the variance that D lacks (Heek et al. 2024, Algorithm 3).

    That variance is `xvar_scale` times the one that is assumed without data, `ops.addim_variance`; 0 is DDIM.
    A step to 0 is plain DDIM.
    """
    for sigma, sigma_next in itertools.pairwise(sigmas):
        denoised = denoiser(x, sigma)
        x = ops.addim_hop(x, denoised, sigma, sigma_next, xvar_scale * ops.addim_variance(denoised, sigma))
    return x


def consistency(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    boundary: float = 0.0,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """x <- D(x; sigma_0); for each further level: x <- D(x + sqrt(sigma² − boundary²) z; sigma)   (Song et
    al. 2023, Algorithm 1).

    Args:
        sigmas: the levels of the evaluations; no 0 at the end.
        boundary: level at which the network is the identity: its outputs have that much noise.
        randn_like: gives z, one draw for each level but the first.
    """
    x = denoiser(x, sigmas[0])
    for sigma in sigmas[1:]:
        x = denoiser(x + math.sqrt(sigma**2 - boundary**2) * randn_like(x), sigma)
    return x
