"""Every sampler behind one signature: `sample(net, latents, class_labels, solver, steps, **options) -> images`.

A denoiser is any function D(x, sigma, class_labels) of x [N, C, H, W] and a scalar noise level. States are FP64. Students walk their own grid;
teachers follow the probability-flow ODE by Euler or Heun steps (Karras et al. 2022, Algorithms 1 and 2), with EDM's discretisations,
schedules and scalings to choose from.
"""
from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dnnlib import UserError
from training import consistency_ops as ops

TEACHER_SOLVERS = ('euler', 'heun')
SOLVERS = ('student', *TEACHER_SOLVERS)
DISCRETIZATIONS = ('edm', 'vp', 've', 'iddpm')
SCHEDULES = ('linear', 'vp', 've')
SCALINGS = ('none', 'vp')
DEFAULT_TEACHER_STEPS = 18
SIGMA_RANGES = dict(edm=(0.002, 80), ve=(0.02, 100), iddpm=(0.002, 81))  # vp's follow from its betas
VP_EPSILON = 1e-3  # smallest time of the vp discretisation


def sample(net, latents: Tensor, class_labels: Tensor | None = None, solver: str | None = None, steps: int | None = None, **options) -> Tensor:
    """Images from latents.

    Args:
        net: denoiser; what it is (a student with its grid, a teacher) is read from `net.metadata` where it has that.
        latents: [N, C, H, W], unit variance.
        class_labels: [N, label_dim] one-hot, or None.
        solver: student | euler | heun; None: what the snapshot is.
        steps: of the solver; None: the student's own number, or 18.
        options: see `student_sampler` and `ode_sampler`.
    Returns: [N, C, H, W] float64 in about [-1, 1], not clamped.
    Raises: UserError for a solver or an option that does not apply.
    """
    solver, steps = resolve(net, solver, steps, force_steps=options.pop('force_steps', False))
    function = student_sampler if solver == 'student' else ode_sampler
    known = list(inspect.signature(function).parameters)
    unknown = [name for name in options if name not in known]
    if unknown:
        raise UserError(f'the {solver} sampler has no option {", ".join(unknown)}; choose another solver or leave it out')
    if function is ode_sampler:
        options['solver'] = solver
    return function(net, latents, class_labels, steps=steps, **options)


def resolve(net, solver: str | None, steps: int | None, force_steps: bool = False) -> tuple[str, int]:
    """The solver and number of steps that `sample` uses for a network; UserError where they do not fit what it is."""
    metadata = getattr(net, 'metadata', None) or {}
    own_steps = len(metadata['sigmas']) - 1 if 'sigmas' in metadata else None
    solver = solver or ('student' if own_steps else 'heun')
    if solver not in SOLVERS:
        raise UserError(f'solver {solver!r} is not one of {", ".join(SOLVERS)}')
    if solver != 'student':
        return solver, DEFAULT_TEACHER_STEPS if steps is None else steps
    if own_steps is None and steps is None:
        raise UserError('this network is no student with a grid of its own: give the number of steps, or take the solver heun or euler')
    if own_steps is not None and steps not in (None, own_steps) and not force_steps:
        raise UserError(f'this student was trained for {own_steps} steps, not {steps}: leave out --steps, or add --force-steps to try all the same')
    return solver, own_steps if steps is None else steps


def evaluations(solver: str, steps: int) -> int:
    """Network evaluations per image (NFE): Heun's last step, to zero, is Euler's."""
    return 2 * steps - 1 if solver == 'heun' else steps


def clip_range(net, sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """Noise levels within what the network knows; UserError where nothing is left."""
    low, high = max(sigma_min, float(getattr(net, 'sigma_min', 0))), min(sigma_max, float(getattr(net, 'sigma_max', math.inf)))
    if not low < high:
        raise UserError(f'no noise levels from sigma_min = {low:g} to sigma_max = {high:g}: the network knows '
                        f'{float(getattr(net, "sigma_min", 0)):g} to {float(getattr(net, "sigma_max", math.inf)):g}')
    return low, high

#----------------------------------------------------------------------------
# Students.

def student_sigmas(net, steps: int, sigma_min: float | None, sigma_max: float | None, rho: float | None, grid: str | None) -> Tensor:
    """The student's grid [steps+1]: the recorded one, or one built from what is given where it has none or another is asked for."""
    metadata = getattr(net, 'metadata', None) or {}
    if 'sigmas' in metadata and steps == len(metadata['sigmas']) - 1 and (sigma_min, sigma_max, rho, grid) == (None,) * 4:
        return torch.tensor(metadata['sigmas'], dtype=torch.float64)
    pick = lambda given, name, default: metadata.get(name, default) if given is None else given
    low, high = clip_range(net, pick(sigma_min, 'sigma_min', 0.002), pick(sigma_max, 'sigma_max', 80.0))
    return ops.student_grid(steps, low, high, pick(rho, 'rho', 7.0), pick(grid, 'student_grid', 'edm'))


def student_sampler(net, latents, class_labels=None, *, steps: int, sigma_min=None, sigma_max=None, rho=None, student_grid=None) -> Tensor:
    """x <- D + (sigma_{i+1} / sigma_i)(x − D) down the student's grid, one evaluation a step (Heek et al. 2024, Section 3)."""
    sigmas = student_sigmas(net, steps, sigma_min, sigma_max, rho, student_grid).tolist()
    x = latents.double() * sigmas[0]
    for sigma, sigma_next in itertools.pairwise(sigmas):
        x = ops.ddim_step(x, _denoise(net, x, sigma, class_labels), sigma, sigma_next)
    return x


def _denoise(net, x: Tensor, sigma: float, class_labels) -> Tensor:
    return net(x, torch.tensor(sigma, dtype=torch.float64, device=x.device), class_labels).double()

#----------------------------------------------------------------------------
# Teachers. Time t parameterises the ODE: x(t) = s(t) (y + sigma(t) n)   (Karras et al. 2022, Eq. 4).

class Schedule(NamedTuple):
    """sigma(t), its derivative and its inverse."""

    sigma: Callable[[float], float]
    slope: Callable[[float], float]
    time: Callable[[float], float]


class Scaling(NamedTuple):
    """s(t) and its derivative."""

    scale: Callable[[float], float]
    slope: Callable[[float], float]


def vp_schedule(beta_d: float, beta_min: float) -> Schedule:
    """sigma² = exp(beta_d t² / 2 + beta_min t) − 1 (Song et al. 2021)."""
    sigma = lambda t: math.sqrt(math.expm1(beta_d * t * t / 2 + beta_min * t))
    slope = lambda t: (beta_min + beta_d * t) * (sigma(t) + 1 / sigma(t)) / 2
    time = lambda s: (math.sqrt(beta_min ** 2 + 2 * beta_d * math.log1p(s * s)) - beta_min) / beta_d
    return Schedule(sigma, slope, time)


def vp_betas(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """beta_d and beta_min for which sigma(VP_EPSILON) = sigma_min and sigma(1) = sigma_max."""
    low, high = math.log1p(sigma_min ** 2), math.log1p(sigma_max ** 2)
    beta_d = 2 * (low / VP_EPSILON - high) / (VP_EPSILON - 1)
    return beta_d, high - beta_d / 2


def make_schedule(kind: str, sigma_min: float, sigma_max: float) -> Schedule:
    """One of SCHEDULES."""
    if kind == 'linear':
        return Schedule(lambda t: t, lambda t: 1.0, lambda s: s)
    if kind == 've':
        return Schedule(math.sqrt, lambda t: 0.5 / math.sqrt(t), lambda s: s * s)
    if kind == 'vp':
        return vp_schedule(*vp_betas(sigma_min, sigma_max))
    raise UserError(f'schedule {kind!r} is not one of {", ".join(SCHEDULES)}')


def make_scaling(kind: str, schedule: Schedule) -> Scaling:
    """One of SCALINGS: none, or s = 1 / sqrt(1 + sigma²), which keeps the variance."""
    if kind == 'none':
        return Scaling(lambda t: 1.0, lambda t: 0.0)
    if kind == 'vp':
        scale = lambda t: 1 / math.sqrt(1 + schedule.sigma(t) ** 2)
        return Scaling(scale, lambda t: -schedule.sigma(t) * schedule.slope(t) * scale(t) ** 3)
    raise UserError(f'scaling {kind!r} is not one of {", ".join(SCALINGS)}')


def iddpm_levels(M: int = 1000, C_1: float = 0.001, C_2: float = 0.008) -> list[float]:
    """iDDPM's noise levels in rising order, 0 first (Nichol & Dhariwal 2021 in EDM's notation, Karras et al. 2022, Appendix C.3.2)."""
    alpha_bar = lambda j: math.sin(math.pi / 2 * j / M / (C_2 + 1)) ** 2
    levels = [0.0]
    for j in range(M, 0, -1):
        levels.append(math.sqrt((levels[-1] ** 2 + 1) / max(alpha_bar(j - 1) / alpha_bar(j), C_1) - 1))
    return levels


def discretize(kind: str, steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """[steps] falling noise levels, by one of DISCRETIZATIONS (Karras et al. 2022, Table 1, 'Time steps')."""
    ramp = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
    if kind == 'edm':
        return ops.karras_sigmas(steps, sigma_min, sigma_max, rho)
    if kind == 'vp':
        sigma = vp_schedule(*vp_betas(sigma_min, sigma_max)).sigma
        return torch.tensor([sigma(t) for t in (1 + ramp * (VP_EPSILON - 1)).tolist()], dtype=torch.float64)
    if kind == 've':
        return sigma_max * (sigma_min / sigma_max) ** ramp
    if kind == 'iddpm':
        levels = torch.tensor([u for u in reversed(iddpm_levels()) if sigma_min <= u <= sigma_max], dtype=torch.float64)
        if not len(levels):
            raise UserError(f'iDDPM has no noise level between {sigma_min:g} and {sigma_max:g}: widen the range')
        return levels[(ramp * (len(levels) - 1)).round().long()]
    raise UserError(f'discretization {kind!r} is not one of {", ".join(DISCRETIZATIONS)}')


def default_range(discretization: str) -> tuple[float, float]:
    """(sigma_min, sigma_max) of a discretisation; vp's are those of its usual betas, 19.9 and 0.1."""
    if discretization == 'vp':
        sigma = vp_schedule(19.9, 0.1).sigma
        return sigma(VP_EPSILON), sigma(1.0)
    return SIGMA_RANGES[discretization]


def ode_sampler(net, latents, class_labels=None, *, steps: int, solver: str = 'heun', sigma_min=None, sigma_max=None, rho: float = 7.0,
                discretization: str = 'edm', schedule: str = 'linear', scaling: str = 'none', alpha: float = 1.0,
                S_churn: float = 0.0, S_min: float = 0.0, S_max: float = math.inf, S_noise: float = 1.0, randn_like=torch.randn_like) -> Tensor:
    """Probability-flow ODE by Euler steps or second-order Runge-Kutta steps with their middle point at `alpha` (1: Heun), with optional churn.

    Noise levels are rounded to those of the network. S_churn > 0 adds noise before every step with S_min <= sigma <= S_max
    (Karras et al. 2022, Algorithm 2); `randn_like(x)` gives it.
    """
    if discretization not in DISCRETIZATIONS:
        raise UserError(f'discretization {discretization!r} is not one of {", ".join(DISCRETIZATIONS)}')
    low, high = default_range(discretization)
    low, high = clip_range(net, low if sigma_min is None else sigma_min, high if sigma_max is None else sigma_max)
    path = make_schedule(schedule, low, high)
    scale = make_scaling(scaling, path)
    snap = lambda sigma: float(net.round_sigma(sigma)) if hasattr(net, 'round_sigma') else float(sigma)
    times = [path.time(snap(s)) for s in discretize(discretization, steps, low, high, rho)] + [0.0]

    def velocity(x, t):  # dx/dt, Karras et al. 2022, Eq. 81
        sigma, s = path.sigma(t), scale.scale(t)
        rate = path.slope(t) / sigma
        return (rate + scale.slope(t) / s) * x - rate * s * _denoise(net, x / s, sigma, class_labels)

    gain = min(S_churn / steps, math.sqrt(2) - 1)
    x = latents.double() * (path.sigma(times[0]) * scale.scale(times[0]))
    for t, t_next in itertools.pairwise(times):
        if gain > 0:
            sigma, noise = path.sigma(t), randn_like(x)  # drawn at every step, as in EDM: images then differ by what the options do
            raised = path.time(snap(sigma + gain * sigma)) if S_min <= sigma <= S_max else t
            spread = math.sqrt(max(path.sigma(raised) ** 2 - sigma ** 2, 0))
            x = scale.scale(raised) * (x / scale.scale(t) + spread * S_noise * noise)
            t = raised
        v = velocity(x, t)
        step = t_next - t
        if solver == 'heun' and t_next > 0:
            v_middle = velocity(x + alpha * step * v, t + alpha * step)
            v = v + (v_middle - v) / (2 * alpha)
        x = x + step * v
    return x
