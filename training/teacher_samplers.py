"""Samplers of teachers, that is diffusion models: their options, noise levels and solvers.

Each is (net, denoiser, latents, steps, options, randn_like, [solver]) -> images, for training/samplers.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from dnnlib import UserError, WrongOptions
from training import solvers
from training.ode_time import ode_time
from training.schedules import DISCRETIZATIONS
from training.solvers import ODE_SOLVERS

DEFAULT_TEACHER_STEPS = 18  # 35 evaluations by Heun's method, EDM's for CIFAR-10
ROUNDING = 1e-6  # relative distance by which a listed level may lie outside of the network's range

# {fewest evaluations: solver} of `best`. From 3 to 10 evaluations, iPNDM of order 4 has the least FID of all
# solvers here on CIFAR-10 (Zhou et al. 2024: 3.69 at 8, Euler 22.3); on ImageNet-64 it is within 0.4 of the
# best at 8, and the best at 10. From 35 on, Heun's method gives the figures by which teachers are known
# (Karras et al. 2022). Between 10 and 35 there are no figures.
BEST = {1: 'ipndm', 35: 'heun'}


# ----------------------------------------------------------------------------
# Options.


@dataclass(frozen=True)
class AddimOptions:
    """How a teacher is sampled by `solvers.addim`."""

    sigma_min: float | None = None  # None: of the discretization
    sigma_max: float | None = None
    rho: float | None = None  # None: of the discretization
    discretization: str = 'edm'
    xvar_scale: float = 1.0


@dataclass(frozen=True)
class LevelOptions:
    """The noise levels of a solver of the ODE."""

    sigma_min: float | None = None  # None: of the discretization
    sigma_max: float | None = None
    rho: float | None = None  # None: of the solver, or of the discretization if that is given
    discretization: str | None = None  # None: of the solver
    sigmas: Sequence[float] | None = None  # these levels, in place of all of the above
    afs: bool = False  # analytical first step
    to_zero: bool | None = None  # a last step to 0; None: of the solver, or none with `sigmas`


@dataclass(frozen=True)
class SolverOptions(LevelOptions):
    """How a teacher is sampled by a solver of `solvers.ODE_SOLVERS` other than EDM's."""

    order: int | None = None  # None: the solver's default
    variant: str | None = None


@dataclass(frozen=True)
class OdeOptions(LevelOptions):
    """How a teacher is sampled by EDM's solvers, euler and heun; the names are EDM's."""

    schedule: str = 'linear'  # sigma(t)
    scaling: str = 'none'  # s(t)
    alpha: float = 1.0  # of heun
    S_churn: float = 0.0  # 0: deterministic
    S_min: float = 0.0
    S_max: float = math.inf
    S_noise: float = 1.0


def best_solver(evaluations: int | None, options: dict) -> tuple[str, int]:
    """The solver of `BEST` for a number of evaluations, and its number of steps. None: 18 evaluations.

    Raises: UserError for options that it chooses itself.
    """
    own = [
        name
        for name in ('order', 'variant', 'discretization', 'rho', 'sigmas')
        if options.get(name) is not None
    ]
    if own:
        raise WrongOptions(f'the solver best comes with its own {own[0]}: leave it out, or name a solver')
    evaluations = DEFAULT_TEACHER_STEPS if evaluations is None else evaluations
    solver = BEST[max(fewest for fewest in BEST if fewest <= evaluations)]
    # Two evaluations per step but the last: one less than asked for, if that is even.
    return solver, (evaluations + 1) // 2 if ODE_SOLVERS[solver].evaluations == 2 else evaluations


# ----------------------------------------------------------------------------
# Noise levels.


def clip_range(net, sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """The part of a range that the network was trained at. Raises: UserError if it is empty."""
    known_min, known_max = known_range(net)
    low, high = max(sigma_min, known_min), min(sigma_max, known_max)
    if not low < high:
        raise UserError(
            f'no noise levels from sigma_min = {low:g} to sigma_max = {high:g}: the network knows '
            f'{known_min:g} to {known_max:g}'
        )
    return low, high


def known_range(net) -> tuple[float, float]:
    """Lowest and highest noise level that the network can evaluate."""
    return float(getattr(net, 'sigma_min', 0)), float(getattr(net, 'sigma_max', math.inf))


def teacher_range(net, o: AddimOptions | LevelOptions) -> tuple[float, float]:
    """(sigma_min, sigma_max) of the options, or of the discretization, clipped to the network's range.

    Raises: UserError for another discretization or an empty range.
    """
    name = o.discretization or 'edm'
    if name not in DISCRETIZATIONS:
        raise UserError(f'discretization {name!r} is not one of {", ".join(DISCRETIZATIONS)}')
    default = DISCRETIZATIONS[name]
    low = default.sigma_min if o.sigma_min is None else o.sigma_min
    high = default.sigma_max if o.sigma_max is None else o.sigma_max
    return clip_range(net, low, high)


class Levels(NamedTuple):
    """Noise levels to solve over.

    Attributes:
        sigmas: decreasing; only listed ones may end in 0.
        to_zero: whether a step to 0 follows the last.
    """

    sigmas: list[float]
    to_zero: bool


def ode_levels(net, solver: str, steps: int, o: LevelOptions) -> Levels:
    """The levels of `steps` steps: those listed, or of the discretization within the network's range, not
    rounded."""
    if o.sigmas is not None:
        return Levels(listed_sigmas(net, o), bool(o.to_zero))
    chosen = ODE_SOLVERS[solver]
    to_zero = steps_to_zero(solver, o.to_zero)
    low, high = teacher_range(net, o)
    name, rho = o.discretization or chosen.schedule, o.rho
    if rho is None and o.discretization is None:
        rho = chosen.rho
    sigmas = DISCRETIZATIONS[name].sigmas(chosen.levels(steps, o.afs, to_zero), low, high, rho)
    # Powers and roots may leave the range by a rounding error.
    return Levels([min(max(sigma, low), high) for sigma in sigmas.tolist()], to_zero)


def listed_sigmas(net, o: LevelOptions) -> list[float]:
    """The levels of `sigmas`.

    Raises: UserError if they do not fall, leave the network's range, or other options are for levels too.
    """
    # Nothing else may say what the levels are.
    others = [
        name for name in ('sigma_min', 'sigma_max', 'rho', 'discretization') if getattr(o, name) is not None
    ]
    if others:
        raise WrongOptions(f'sigmas are all noise levels: leave out {", ".join(others)}')
    # They fall, and make one step at least.
    sigmas = [float(sigma) for sigma in o.sigmas]
    solvers.check_levels(sigmas, bool(o.to_zero))
    if len(sigmas) < 2 and not o.to_zero:
        raise WrongOptions(
            'sigmas lists a single noise level, and a step needs two: list more, or add to_zero'
        )
    if sigmas[-1] == 0 and o.to_zero is False:
        raise WrongOptions('sigmas ends in 0, and to_zero is off: leave out one of them')

    # The network knows them; text may have rounded its own ends.
    known_min, known_max = known_range(net)
    beyond = [
        s for s in sigmas if s > 0 and not known_min * (1 - ROUNDING) <= s <= known_max * (1 + ROUNDING)
    ]
    if beyond:
        raise WrongOptions(
            f'sigmas: the noise level {beyond[0]:g} is outside of what the network knows, '
            f'{known_min:g} to {known_max:g}'
        )
    return [min(max(sigma, known_min), known_max) if sigma else 0.0 for sigma in sigmas]


def steps_to_zero(solver: str, to_zero: bool | None, sigmas: Sequence[float] | None = None) -> bool:
    """Whether the last step is to 0: as given, by the end of the list, or by the solver."""
    if sigmas is not None:
        return bool(to_zero) or sigmas[-1] == 0
    return ODE_SOLVERS[solver].to_zero if to_zero is None else to_zero


def ode_steps(net, solver: str, steps: int | None, o: LevelOptions) -> int:
    """The number of steps: as given, of the list, or by default.

    Raises: UserError if the options do not go together.
    """
    chosen, to_zero = ODE_SOLVERS[solver], steps_to_zero(solver, o.to_zero, o.sigmas or None)
    solvers.check_choices(solver, getattr(o, 'order', None), getattr(o, 'variant', None))
    if o.afs and getattr(o, 'S_churn', 0) > 0:
        raise WrongOptions('afs is an analytical first step without noise: leave out S_churn')
    if o.sigmas is not None:
        levels = [sigma for sigma in listed_sigmas(net, o) if sigma > 0]
        listed = chosen.steps(len(levels), o.afs, to_zero)
        if steps not in (None, listed):
            raise WrongOptions(f'sigmas makes {listed} steps, not {steps}: leave out the number of steps')
        steps = listed
    steps = DEFAULT_TEACHER_STEPS if steps is None else steps
    if chosen.nfe(steps, o.afs, to_zero) < 1:
        raise WrongOptions('afs leaves no evaluation of the network: take more steps, or leave it out')
    return steps


# ----------------------------------------------------------------------------
# Samplers.


def _round_sigma(net, sigma) -> float:
    return float(net.round_sigma(sigma)) if hasattr(net, 'round_sigma') else float(sigma)


def sample_addim(net, denoiser, latents: Tensor, steps: int, o: AddimOptions, randn_like) -> Tensor:
    """Adjusted DDIM of a teacher, over [steps+1] levels, rounded to those of the network, then 0   (Karras et
    al. 2022, Table 1, 'Time steps')."""
    low, high = teacher_range(net, o)
    sigmas = DISCRETIZATIONS[o.discretization].sigmas(steps, low, high, o.rho)
    # The final 0 is no level of the network, so it is not rounded.
    sigmas = [_round_sigma(net, sigma) for sigma in sigmas] + [0.0]
    return solvers.addim(denoiser, latents * sigmas[0], sigmas, o.xvar_scale)


def sample_ode(
    net, denoiser, latents: Tensor, steps: int, o: SolverOptions, randn_like, solver: str
) -> Tensor:
    """A solver over its own schedule, or another."""
    sigmas, to_zero = ode_levels(net, solver, steps, o)
    return solvers.solve(denoiser, latents * sigmas[0], sigmas, solver, o.order, o.variant, o.afs, to_zero)


def sample_edm(net, denoiser, latents: Tensor, steps: int, o: OdeOptions, randn_like, solver: str) -> Tensor:
    """EDM's sampler: a discretization, mapped to the time of a schedule sigma(t) and scaling s(t), and a
    solver (Karras et al. 2022, Algorithm 2 with the choices of Table 1).

    S_churn > 0 adds noise before every step with S_min <= sigma <= S_max.
    """
    # Times of the steps. Levels of a discretization are rounded to those of the network.
    sigmas, to_zero = ode_levels(net, solver, steps, o)
    if o.sigmas is None:
        sigmas = [_round_sigma(net, sigma) for sigma in sigmas]
    time = ode_time(o.schedule, o.scaling, *teacher_range(net, o))
    times = [time.time(sigma) if sigma else 0.0 for sigma in sigmas] + [0.0] * to_zero

    # Churn, relative to the noise level (gamma in Algorithm 2).
    # The cap adds at most as much noise as the state holds: sigma² is at most doubled.
    gain = min(o.S_churn / steps, math.sqrt(2) - 1)
    round_sigma = lambda sigma: _round_sigma(net, sigma)
    perturb = None
    if gain > 0:
        perturb = solvers.churn(gain, o.S_min, o.S_max, o.S_noise, time, round_sigma, randn_like)

    # Latents at the first time.
    x = latents * (time.sigma(times[0]) * time.scale(times[0]))
    if o.afs:
        denoiser = solvers.analytical_first(denoiser)
    solve: dict[str, Callable[..., Tensor]] = dict(euler=solvers.euler, heun=solvers.heun)
    settings = dict(alpha=o.alpha) if solver == 'heun' else {}
    return solve[solver](denoiser, x, times, time, perturb, **settings)
