"""Solvers: functions that step a state over a decreasing list of noise levels, from any schedule.

Each is `solver(denoiser, x, sigmas, ...) -> x`: x [N, ...] float64 is the state at the first level, the
result the state at the last. A denoiser here is a function D(x, sigma) of a state and a Python number that
returns float64. A new solver of the ODE is a function here, or in training/multistep_solvers.py if it reuses
earlier evaluations, and an entry in `ODE_SOLVERS`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dnnlib import WrongOptions
from training import consistency_ops as ops
from training import multistep_solvers as multistep
from training.addim import addim_hop, addim_variance
from training.ode_time import LINEAR, OdeTime

Denoiser = Callable[[Tensor, float], Tensor]
Perturb = Callable[[Tensor, float], tuple[Tensor, float]]  # adds noise to a state: (x, t) -> (x, t)

# ----------------------------------------------------------------------------
# The probability-flow ODE in a time t: states are s(t) (y + sigma(t) n). By default t is sigma, and s is 1.


def euler(
    denoiser: Denoiser,
    x: Tensor,
    times: Sequence[float],
    time: OdeTime = LINEAR,
    perturb: Perturb | None = None,
) -> Tensor:
    """Euler steps x <- x + (t' − t) dx/dt: first order, one evaluation per step.

    Args:
        x: [N, ...] state at times[0].
        times: [n+1] decreasing.
        perturb: applied before every step, see `churn`.
    Returns: [N, ...] state at times[-1].
    """
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
    """Runge-Kutta steps of second order, two evaluations each   (Karras et al. 2022, Algorithms 1 to 3).

    x <- x + (t' − t) ((1 − 1/(2 alpha)) d + d'/(2 alpha)), with d the slope at t and d' the slope at the end
    of an Euler step to t + alpha (t' − t). alpha = 1 is Heun's method. A step to 0, where the slope is
    undefined, is Euler's.

    Args: as of `euler`.
    """
    for t, t_next in itertools.pairwise(times):
        if perturb:
            x, t = perturb(x, t)
        step = t_next - t

        # First slope, and the second one unless the step ends at 0.
        slope = ode_slope(denoiser, x, t, time)
        if t_next > 0:
            # The second slope, from the end of a partial Euler step.
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
    """Adds noise that raises sigma to (1 + gain) sigma where S_min <= sigma <= S_max   (Karras et al. 2022,
    Algorithm 2).

    Args:
        S_noise: factor on the standard deviation of the noise.
        round_sigma: to the noise levels of the network.
        randn_like: standard normal noise in the shape of its argument.
    """

    def perturb(x, t):
        # Drawn at every step, used or not, as in EDM: options do not change the noise of later steps.
        sigma, noise = time.sigma(t), randn_like(x)
        # Levels outside of [S_min, S_max] stay as they are.
        raised = time.time(round_sigma(sigma + gain * sigma)) if S_min <= sigma <= S_max else t
        # Rounding to the network's levels may lower sigma, where no noise can be added.
        spread = math.sqrt(max(time.sigma(raised) ** 2 - sigma**2, 0))
        return time.scale(raised) * (x / time.scale(t) + spread * S_noise * noise), raised

    return perturb


def dpm2(denoiser: Denoiser, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Midpoint steps in ln sigma, two evaluations each: second order   (DPM-Solver-2 with r_1 = 1/2: Lu et
    al. 2022a, Algorithm 1, in EDM's notation).

    x <- x + (sigma' − sigma) d', d' the slope at sqrt(sigma sigma'), where an Euler step leads. A step to 0,
    which has no middle, is Euler's.
    """
    for sigma, sigma_next in itertools.pairwise(sigmas):
        slope, middle = ode_slope(denoiser, x, sigma), math.sqrt(sigma * sigma_next)
        if middle > 0:
            slope = ode_slope(denoiser, x + (middle - sigma) * slope, middle)
        x = x + (sigma_next - sigma) * slope
    return x


class OdeSolver(NamedTuple):
    """A solver of the ODE for `ode_solve`, its choices, and its defaults in `samplers.sample`.

    Attributes:
        solve: (denoiser, x, sigmas, [order], [variant]) -> x, with the keywords that have a choice.
        evaluations: denoiser evaluations per step; a step to 0 takes one.
        orders, variants: choices, the default first.
        schedule, rho: of its levels, as its authors or Zhou et al. 2024 (Fast ODE-based Sampling) use it.
        to_zero: whether its samples end at 0, and not at sigma_min.
    """

    solve: Callable[..., Tensor]
    evaluations: int = 1
    orders: Sequence[int] = ()
    variants: Sequence[str] = ()
    schedule: str = 'edm'
    rho: float | None = None
    to_zero: bool = False

    def levels(self, steps: int, afs: bool, to_zero: bool) -> int:
        """The number of levels above 0 for `steps` steps, the one to 0 among them.

        Of a solver with one evaluation per step, `steps` is the number of evaluations.
        """
        return steps + 1 - to_zero + (afs and self.evaluations == 1)

    def steps(self, levels: int, afs: bool, to_zero: bool) -> int:
        """The inverse of `levels`."""
        return levels - 1 + to_zero - (afs and self.evaluations == 1)

    def nfe(self, steps: int, afs: bool, to_zero: bool) -> int:
        """Denoiser evaluations of so many steps."""
        # Steps between levels, a single evaluation for the one to 0, none for the analytical first slope.
        return self.evaluations * (self.levels(steps, afs, to_zero) - 1) + to_zero - afs


# New ones: a function (of several evaluations' memory: in training/multistep_solvers.py) and an entry.
ODE_SOLVERS = dict(
    euler=OdeSolver(euler, to_zero=True),
    heun=OdeSolver(heun, evaluations=2, to_zero=True),
    ipndm=OdeSolver(multistep.ipndm, orders=(4, 1, 2, 3)),
    ipndm_v=OdeSolver(multistep.ipndm_v, orders=(4, 1, 2, 3)),
    deis=OdeSolver(multistep.deis, orders=(4, 1, 2, 3), schedule='time_uniform', rho=2),
    dpmpp=OdeSolver(multistep.dpmpp, orders=(3, 2), schedule='logsnr'),
    unipc=OdeSolver(multistep.unipc, orders=(3, 2), variants=('bh2', 'bh1'), schedule='logsnr'),
    dpm2=OdeSolver(dpm2, evaluations=2),
)


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
    """Solves the probability-flow ODE from the first of `sigmas` to the last.

    Args:
        denoiser: D(x, sigma) of [N, ...] float64 and a float64 scalar.
        x: [N, ...] state at sigmas[0], with a standard deviation of about that level.
        sigmas: [n] decreasing noise levels; the last may be 0.
        solver: one of ODE_SOLVERS.
        order, variant: of solvers that have several; None: their default.
        afs: analytical first step: the first slope is x / sqrt(1 + sigma²), as for data of unit variance,
            without an evaluation.
        to_zero: after the last level, x <- D(x; sigma), with one more evaluation.
    Returns: [N, ...] float64 state at the last level.
    Raises: UserError if the solver has no such order or variant, or the levels do not decrease.
    """
    # Numbers of the host, once: solvers then launch their steps without waiting for the device.
    sigmas = torch.as_tensor(sigmas, dtype=torch.float64).tolist()
    denoise = lambda x, sigma: denoiser(x, ops.noise_level(sigma, x)).double()
    return solve(denoise, x.double(), sigmas, solver, order, variant, afs, to_zero)


def solve(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    solver: str,
    order: int | None,
    variant: str | None,
    afs: bool,
    to_zero: bool,
) -> Tensor:
    """`ode_solve` for a denoiser of Python numbers that returns float64."""
    settings = check_choices(solver, order, variant)
    check_levels(sigmas, to_zero)
    if afs:
        denoiser = analytical_first(denoiser)
    x = ODE_SOLVERS[solver].solve(denoiser, x, sigmas, **settings)
    return denoiser(x, sigmas[-1]) if to_zero else x


def analytical_first(denoiser: Denoiser) -> Denoiser:
    """The denoiser, but for its first evaluation, which is that of data of unit variance: D = x − sigma d
    with the slope d = x / sqrt(1 + sigma²)   (the analytical first step, Dockhorn et al. 2022)."""
    evaluated = False

    def denoise(x, sigma):
        nonlocal evaluated
        if evaluated:
            return denoiser(x, sigma)
        evaluated = True
        return x - sigma / math.sqrt(1 + sigma**2) * x

    return denoise


def check_choices(solver: str, order: int | None, variant: str | None) -> dict:
    """The keywords of the solver for an order and a variant; None: its defaults. Raises: UserError."""
    if solver not in ODE_SOLVERS:
        raise WrongOptions(f'solver {solver!r} is not one of {", ".join(ODE_SOLVERS)}')

    # Each choice must be one of the solver's; the first is the default.
    settings = {}
    for name, given, known in (
        ('order', order, ODE_SOLVERS[solver].orders),
        ('variant', variant, ODE_SOLVERS[solver].variants),
    ):
        if given is not None and given not in known:
            one_of = f'{name} is one of {", ".join(map(str, sorted(known)))}'
            none = f'solver has no {name} to choose'
            raise WrongOptions(f'{name} {given!r}: the {solver} {one_of if known else none}')
        if known:
            settings[name] = known[0] if given is None else given
    return settings


def check_levels(sigmas: Sequence[float], to_zero: bool) -> None:
    """Raises: UserError unless noise levels fall, to 0 at the lowest."""
    finite = all(math.isfinite(sigma) for sigma in sigmas)
    if not sigmas or not finite or sigmas[-1] < 0 or any(a <= b for a, b in itertools.pairwise(sigmas)):
        raise WrongOptions(
            f'noise levels {", ".join(f"{s:g}" for s in sigmas)}: they must fall, and none is below 0'
        )
    if to_zero and sigmas[-1] == 0:
        raise WrongOptions('to_zero is for noise levels that end above 0')


# ----------------------------------------------------------------------------
# Solvers of students, of adjusted DDIM and of consistency models.


def ddim(denoiser: Denoiser, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """x <- D + (sigma' / sigma)(x − D), one evaluation per step   (Heek et al. 2024, Section 3)."""
    for sigma, sigma_next in itertools.pairwise(sigmas):
        x = ops.ddim_step(x, denoiser(x, sigma), sigma, sigma_next)
    return x


def ancestral(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """x <- a sample of the state at the next level given x and D, one evaluation per step   (Ho et al. 2020,
    Algorithm 2; Salimans et al. 2024, Algorithm 1).

    Args:
        sigmas: decreasing, the last one 0, where the state is D.
        randn_like: draws noise, once for each step but the last.
    """
    for sigma, sigma_next in itertools.pairwise(sigmas):
        denoised = denoiser(x, sigma)
        x = ops.ancestral_step(x, denoised, sigma, sigma_next, randn_like(x)) if sigma_next > 0 else denoised
    return x


def flow_map(flow: Callable[[Tensor, float, float], Tensor], x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """DDIM steps by a two-time network, which knows where each of them ends.

    Args:
        flow: G(x, sigma, r).
        x: [N, ...] state at sigmas[0].
        sigmas: decreasing, the last one 0.
    """
    for sigma, r in itertools.pairwise(sigmas):
        x = ops.ddim_step(x, flow(x, sigma, r), sigma, r)
    return x


def addim(denoiser: Denoiser, x: Tensor, sigmas: Sequence[float], xvar_scale: float = 1.0) -> Tensor:
    """DDIM steps whose noise is lengthened by the variance that D lacks   (Heek et al. 2024, Algorithm 3).

    That variance is `xvar_scale` times `addim.addim_variance` without images; 0 is DDIM. A step to
    0 is plain DDIM.
    """
    for sigma, sigma_next in itertools.pairwise(sigmas):
        denoised = denoiser(x, sigma)
        x = addim_hop(x, denoised, sigma, sigma_next, xvar_scale * addim_variance(denoised, sigma))
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
        boundary: level at which the network is the identity; its outputs have that much noise.
        randn_like: draws z, once for each level but the first.
    Returns: [N, ...] the last output.
    """
    # The first output comes from pure noise; the others from the last output, noised again.
    x = denoiser(x, sigmas[0])
    for sigma in sigmas[1:]:
        x = denoiser(x + math.sqrt(sigma**2 - boundary**2) * randn_like(x), sigma)
    return x
