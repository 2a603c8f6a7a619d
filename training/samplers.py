"""Every sampler behind one signature: `sample(net, latents, class_labels, solver, steps, **options) -> images`.

A denoiser is any function D(x, sigma, class_labels) of x [N, C, H, W] and a scalar noise level. States are FP64. Students walk their own grid
(`student`). Consistency models, whose every output is an image, are asked once, or again after adding noise (`cm`). Teachers follow the
probability-flow ODE by Euler or Heun steps (`euler`, `heun`: Karras et al. 2022, Algorithms 1 and 2), with EDM's discretizations, schedules and
scalings to choose from, or by DDIM steps that make up for missing variance (`addim`: Heek et al. 2024).

A snapshot's metadata say what it is. `solver`: its sampler; where that is not recorded, `student` if there is a grid, `heun` if not.
`sigmas`: the noise levels of its evaluations, then 0.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dnnlib import UserError
from training import consistency_ops as ops

SOLVERS = ('student', 'euler', 'heun', 'addim', 'cm')
DISCRETIZATIONS = ('edm', 'vp', 've', 'iddpm', 'cosine')
SCHEDULES = ('linear', 'vp', 've')
SCALINGS = ('none', 'vp')
DEFAULT_TEACHER_STEPS = 18
DEFAULT_TIMESTEPS = 40  # of a consistency model's indices `ts`: Song et al.'s where they distil
SIGMA_RANGES = dict(
    edm=(0.002, 80), cosine=(0.002, 80), ve=(0.02, 100), iddpm=(0.002, 81)
)  # vp's follow from its betas
VP_EPSILON = 1e-3  # smallest time of the vp discretization

Edit = Callable[[Tensor], Tensor]  # of a denoised image, such as putting its known pixels in place
Start = tuple[Tensor, float]  # (image, sigma): sampling begins at image + sigma · latents


def sample(
    net,
    latents: Tensor,
    class_labels: Tensor | None = None,
    solver: str | None = None,
    steps: int | None = None,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    **options,
) -> Tensor:
    """Images from latents.

    Args:
        net: denoiser; what it is (a student with its grid, a consistency model, a teacher) is read from `net.metadata` where it has that.
        latents: [N, C, H, W], unit variance.
        class_labels: [N, label_dim] one-hot, or None.
        solver: student | euler | heun | addim | cm; None: what the snapshot is.
        steps: of the solver; None: the network's own number, 18 for a teacher, 1 for a consistency model.
        randn_like: noise for the solvers that add any, cm and those with churn: standard normal in the shape and type of its argument.
        options: see `student_sampler`, `cm_sampler`, `addim_sampler` and `ode_sampler`.
    Returns: [N, C, H, W] float64 in about [-1, 1], clamped by cm alone.
    Raises: UserError for a solver or an option that does not apply.
    """
    solver, steps = resolve(net, solver, steps, force_steps=options.pop('force_steps', False), **options)
    function = SAMPLERS[solver]
    known = inspect.signature(function).parameters
    unknown = [name for name in options if name not in known]
    if unknown:
        raise UserError(
            f'the {solver} sampler has no option {", ".join(unknown)}; choose another solver or leave it out'
        )
    if 'randn_like' in known:
        options['randn_like'] = randn_like
    return function(net, latents, class_labels, steps=steps, **options)


def resolve(
    net, solver: str | None, steps: int | None, force_steps: bool = False, **options
) -> tuple[str, int]:
    """The solver and number of steps that `sample` uses for a network and options; UserError where they do not fit what it is."""
    metadata = getattr(net, 'metadata', None) or {}
    own_steps = len(metadata['sigmas']) - 1 if 'sigmas' in metadata else None
    solver = solver or metadata.get('solver') or ('student' if own_steps else 'heun')
    if solver not in SOLVERS:
        raise UserError(f'solver {solver!r} is not one of {", ".join(SOLVERS)}')
    if solver == 'cm':
        if metadata.get('solver') != 'cm' and (own_steps or 1) > 1:
            raise UserError(
                f'this is a student of {own_steps} steps, whose outputs are no images before the last: leave out the solver cm'
            )
        given = {name: options[name] for name in CM_LEVEL_OPTIONS if name in options}
        return solver, len(cm_sigmas(net, steps, **given))
    if solver != 'student':
        return solver, DEFAULT_TEACHER_STEPS if steps is None else steps
    if own_steps is None and steps is None:
        raise UserError(
            'this network is no student with a grid of its own: give the number of steps, or take the solver heun or euler'
        )
    if own_steps is not None and steps not in (None, own_steps) and not force_steps:
        raise UserError(
            f'this student was trained for {own_steps} steps, not {steps}: leave out --steps, or add --force-steps to try all the same'
        )
    return solver, own_steps if steps is None else steps


def evaluations(solver: str, steps: int) -> int:
    """Network evaluations per image (NFE): Heun's last step, to zero, is Euler's. A student that is given a `start` skips the levels above it."""
    return 2 * steps - 1 if solver == 'heun' else steps


def clip_range(net, sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """Noise levels within what the network knows; UserError where nothing is left."""
    low, high = (
        max(sigma_min, float(getattr(net, 'sigma_min', 0))),
        min(sigma_max, float(getattr(net, 'sigma_max', math.inf))),
    )
    if not low < high:
        raise UserError(
            f'no noise levels from sigma_min = {low:g} to sigma_max = {high:g}: the network knows '
            f'{float(getattr(net, "sigma_min", 0)):g} to {float(getattr(net, "sigma_max", math.inf)):g}'
        )
    return low, high


# ----------------------------------------------------------------------------
# Students.


def student_sigmas(
    net, steps: int, sigma_min: float | None, sigma_max: float | None, rho: float | None, grid: str | None
) -> Tensor:
    """The student's grid [steps+1]: the recorded one, or one built from what is given where it has none or another is asked for."""
    metadata = getattr(net, 'metadata', None) or {}
    if (
        'sigmas' in metadata
        and steps == len(metadata['sigmas']) - 1
        and (sigma_min, sigma_max, rho, grid) == (None,) * 4
    ):
        return torch.tensor(metadata['sigmas'], dtype=torch.float64)
    pick = lambda given, name, default: metadata.get(name, default) if given is None else given
    low, high = clip_range(net, pick(sigma_min, 'sigma_min', 0.002), pick(sigma_max, 'sigma_max', 80.0))
    return ops.student_grid(
        steps,
        low,
        high,
        pick(rho, 'rho', 7.0),
        pick(grid, 'student_grid', 'edm'),
        metadata.get('sigma_grid', 'karras'),
    )


def student_sampler(
    net,
    latents,
    class_labels=None,
    *,
    steps: int,
    sigma_min=None,
    sigma_max=None,
    rho=None,
    student_grid=None,
    edit: Edit | None = None,
    start: Start | None = None,
) -> Tensor:
    """x <- D + (sigma_{i+1} / sigma_i)(x − D) down the student's grid, one evaluation a step (Heek et al. 2024, Section 3).

    `edit` is applied to every D. `start`: from an image with so much noise, through the rest of its segment and the grid below it.
    """
    sigmas = student_sigmas(net, steps, sigma_min, sigma_max, rho, student_grid).tolist()
    if start is not None:
        sigmas = [_start_level(start, sigmas[0]), *(sigma for sigma in sigmas if sigma < start[1])]
    x = _begin(latents, sigmas[0], start)
    for sigma, sigma_next in itertools.pairwise(sigmas):
        denoised = _denoise(net, x, sigma, class_labels)
        x = ops.ddim_step(
            x, denoised if edit is None else still_broken(edit(denoised), denoised), sigma, sigma_next
        )
    return x


def _denoise(net, x: Tensor, sigma: float, class_labels) -> Tensor:
    return net(x, ops.noise_level(sigma, x), class_labels).double()


def still_broken(changed: Tensor, denoised: Tensor) -> Tensor:
    """D after a clamp or an edit, [N, C, H, W]: NaN where D itself is not finite, which a clamp would make 1, and an edit may put a pixel over."""
    return torch.where(denoised.isfinite(), changed, torch.nan)


def _begin(latents: Tensor, sigma: float, start: Start | None) -> Tensor:
    noise = latents.double() * sigma
    return noise if start is None else start[0].double() + noise


def _start_level(start: Start, highest: float) -> float:
    if not 0 < start[1] <= highest:
        raise UserError(
            f'sampling cannot start at sigma = {start[1]:g}: choose a noise level above 0 and up to {highest:g}'
        )
    return float(start[1])


# ----------------------------------------------------------------------------
# Consistency models: D is an image at every noise level (Song et al. 2023).


def cm_sigmas(
    net,
    steps: int | None = None,
    *,
    taus: Sequence[float] | None = None,
    mid_t: float | None = None,
    ts: Sequence[int] | None = None,
    timesteps: int | None = None,
    start: Start | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float | None = None,
) -> list[float]:
    """The falling noise levels at which `cm_sampler` evaluates the network. The first is sigma_max, or that of `start`. The others are

    - `taus`: given one by one;
    - `mid_t`: a single one (Geng et al. 2024: 0.821 for CIFAR-10, 1.526 for ImageNet-64);
    - `ts`: given as indices of `timesteps` Karras nodes from sigma_max (0) to sigma_min (timesteps − 1). The first index stands for the first
      level, the last for the end, which is not evaluated: 0,22,39 of 40 are two evaluations (Song et al. 2023; metadata: `num_timesteps`);
    - none of these given: those that the network records, of them those below `start`, at their number of steps, or else the first n of n+1
      Karras nodes, n = `steps`: sigma_min is left out, because a consistency model changes next to nothing there.

    Raises: UserError where they contradict each other or the network.
    """
    metadata = getattr(net, 'metadata', None) or {}
    pick = lambda given, name, default: metadata.get(name, default) if given is None else given
    low, high = clip_range(net, pick(sigma_min, 'sigma_min', 0.002), pick(sigma_max, 'sigma_max', 80.0))
    top, rho = high if start is None else _start_level(start, high), pick(rho, 'rho', 7.0)
    given = [name for name, value in dict(taus=taus, mid_t=mid_t, ts=ts).items() if value is not None]
    if len(given) > 1 or (timesteps is not None and ts is None):
        raise UserError(
            f'{" and ".join([*given, "timesteps"][:2])}: noise levels are given as one of taus, mid_t, and ts with or without timesteps'
        )
    if ts is not None:
        sigmas = [
            top,
            *_indexed_sigmas(ts, pick(timesteps, 'num_timesteps', DEFAULT_TIMESTEPS), low, high, rho),
        ]
    elif given:
        sigmas = [top, *([mid_t] if taus is None else taus)]
    else:
        own = metadata.get('sigmas', [high, 0.0])[:-1]
        own = own if start is None else [top, *(sigma for sigma in own[1:] if sigma < top)]
        steps = len(own) if steps is None else steps
        as_trained = steps == len(own) and (sigma_min, sigma_max) == (None,) * 2
        sigmas = own if as_trained else ops.student_grid(steps, min(low, top), top, rho, 'full')[:-1].tolist()
    boundary = float(getattr(net, 'boundary', 0))
    if start is not None and top <= boundary:
        raise UserError(
            f'sampling cannot start at sigma = {top:g}, where the network is the identity: choose a noise level above {boundary:g}'
        )
    if not all(above > below for above, below in itertools.pairwise([*sigmas, boundary])):
        raise UserError(
            f'noise levels {", ".join(f"{sigma:g}" for sigma in sigmas)}: they must fall, and stay above {boundary:g}'
        )
    if steps not in (None, len(sigmas)):
        raise UserError(
            f'{given[0]} makes {len(sigmas)} evaluations, not {steps}: leave out the number of steps'
        )
    return [float(sigma) for sigma in sigmas]


CM_LEVEL_OPTIONS = tuple(inspect.signature(cm_sigmas).parameters)[2:]


def _indexed_sigmas(
    ts: Sequence[int], timesteps: int, sigma_min: float, sigma_max: float, rho: float
) -> list[float]:
    """The levels between the first and the last of `ts`, indices of Karras nodes."""
    if len(ts) < 2 or ts[0] != 0 or ts[-1] != timesteps - 1 or any(i >= j for i, j in itertools.pairwise(ts)):
        raise UserError(
            f'ts = {",".join(map(str, ts))} does not rise from 0 to {timesteps - 1}, the end of {timesteps} timesteps'
        )
    return ops.karras_sigmas(timesteps, sigma_min, sigma_max, rho)[list(ts[1:-1])].tolist()


def cm_sampler(
    net,
    latents,
    class_labels=None,
    *,
    steps: int | None = None,
    taus=None,
    mid_t=None,
    ts=None,
    timesteps=None,
    sigma_min=None,
    sigma_max=None,
    rho=None,
    edit: Edit | None = None,
    start: Start | None = None,
    clip_denoised: bool | None = None,
    randn_like=torch.randn_like,
) -> Tensor:
    """x <- D(sigma_max n); for each further level tau: x <- D(x + sqrt(tau² − sigma_e²) z; tau)   (Song et al. 2023, Algorithm 1).

    sigma_e is the level at which the network is the identity, `net.boundary`: its outputs have that much noise. Levels: see `cm_sigmas`.
    Every D is clamped to [-1, 1] (`clip_denoised`; None: as the network records, else not for one of latents), then given to `edit`. `start`:
    instead of pure noise, an image with so much noise (SDEdit, Meng et al. 2022). `randn_like(x)` gives z, one draw for each level but the first.
    """
    sigmas = cm_sigmas(
        net,
        steps,
        taus=taus,
        mid_t=mid_t,
        ts=ts,
        timesteps=timesteps,
        start=start,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        rho=rho,
    )
    boundary, metadata = float(getattr(net, 'boundary', 0)), getattr(net, 'metadata', None) or {}
    clip_denoised = (
        metadata.get('clip_denoised', not metadata.get('encoder')) if clip_denoised is None else clip_denoised
    )
    x = _begin(latents, sigmas[0], start)
    for i, sigma in enumerate(sigmas):
        if i > 0:
            x = x + math.sqrt(sigma**2 - boundary**2) * randn_like(x)
        denoised = x = _denoise(net, x, sigma, class_labels)
        x = x.clamp(-1, 1) if clip_denoised else x
        x = x if edit is None else edit(x)
        x = still_broken(x, denoised)
    return x


# ----------------------------------------------------------------------------
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
    time = lambda s: (math.sqrt(beta_min**2 + 2 * beta_d * math.log1p(s * s)) - beta_min) / beta_d
    return Schedule(sigma, slope, time)


def vp_betas(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """beta_d and beta_min for which sigma(VP_EPSILON) = sigma_min and sigma(1) = sigma_max."""
    low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
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
    """[steps] falling noise levels, by one of DISCRETIZATIONS (Karras et al. 2022, Table 1, 'Time steps'; `cosine`: Heek et al. 2024)."""
    ramp = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
    if kind == 'edm':
        return ops.karras_sigmas(steps, sigma_min, sigma_max, rho)
    if kind == 'cosine':
        return ops.sigma_nodes(steps, sigma_min, sigma_max, rho, 'cosine')
    if kind == 'vp':
        sigma = vp_schedule(*vp_betas(sigma_min, sigma_max)).sigma
        return torch.tensor([sigma(t) for t in (1 + ramp * (VP_EPSILON - 1)).tolist()], dtype=torch.float64)
    if kind == 've':
        return sigma_max * (sigma_min / sigma_max) ** ramp
    if kind == 'iddpm':
        levels = torch.tensor(
            [u for u in reversed(iddpm_levels()) if sigma_min <= u <= sigma_max], dtype=torch.float64
        )
        if not len(levels):
            raise UserError(
                f'iDDPM has no noise level between {sigma_min:g} and {sigma_max:g}: widen the range'
            )
        return levels[(ramp * (len(levels) - 1)).round().long()]
    raise UserError(f'discretization {kind!r} is not one of {", ".join(DISCRETIZATIONS)}')


def default_range(discretization: str) -> tuple[float, float]:
    """(sigma_min, sigma_max) of a discretization; vp's are those of its usual betas, 19.9 and 0.1."""
    if discretization == 'vp':
        sigma = vp_schedule(19.9, 0.1).sigma
        return sigma(VP_EPSILON), sigma(1.0)
    return SIGMA_RANGES[discretization]


def teacher_sigmas(
    net, steps: int, discretization: str, sigma_min: float | None, sigma_max: float | None, rho: float
) -> tuple[list, float, float]:
    """([steps] noise levels rounded to those of the network, the ends of their range)."""
    if discretization not in DISCRETIZATIONS:
        raise UserError(f'discretization {discretization!r} is not one of {", ".join(DISCRETIZATIONS)}')
    low, high = default_range(discretization)
    low, high = clip_range(
        net, low if sigma_min is None else sigma_min, high if sigma_max is None else sigma_max
    )
    return [_snap(net, sigma) for sigma in discretize(discretization, steps, low, high, rho)], low, high


def _snap(net, sigma) -> float:
    return float(net.round_sigma(sigma)) if hasattr(net, 'round_sigma') else float(sigma)


def addim_sampler(
    net,
    latents,
    class_labels=None,
    *,
    steps: int,
    sigma_min=None,
    sigma_max=None,
    rho: float = 7.0,
    discretization: str = 'edm',
    xvar_scale: float = 1.0,
) -> Tensor:
    """DDIM steps whose noise is lengthened by the variance that D lacks (Heek et al. 2024, Algorithm 3); the last, to 0, is plain DDIM.

    That variance is `xvar_scale` times the one that is assumed without data, `ops.addim_variance`; 0 is DDIM.
    """
    sigmas, _, _ = teacher_sigmas(net, steps, discretization, sigma_min, sigma_max, rho)
    x = latents.double() * sigmas[0]
    for sigma, sigma_next in itertools.pairwise([*sigmas, 0.0]):
        denoised = _denoise(net, x, sigma, class_labels)
        x = ops.addim_hop(x, denoised, sigma, sigma_next, xvar_scale * ops.addim_variance(denoised, sigma))
    return x


def ode_sampler(
    net,
    latents,
    class_labels=None,
    *,
    steps: int,
    solver: str = 'heun',
    sigma_min=None,
    sigma_max=None,
    rho: float = 7.0,
    discretization: str = 'edm',
    schedule: str = 'linear',
    scaling: str = 'none',
    alpha: float = 1.0,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    randn_like=torch.randn_like,
) -> Tensor:
    """Probability-flow ODE by Euler steps or second-order Runge-Kutta steps with their middle point at `alpha` (1: Heun), with optional churn.

    Noise levels are rounded to those of the network. S_churn > 0 adds noise before every step with S_min <= sigma <= S_max
    (Karras et al. 2022, Algorithm 2); `randn_like(x)` gives it.
    """
    levels, low, high = teacher_sigmas(net, steps, discretization, sigma_min, sigma_max, rho)
    path = make_schedule(schedule, low, high)
    scale = make_scaling(scaling, path)
    times = [path.time(sigma) for sigma in levels] + [0.0]

    def velocity(x, t):  # dx/dt, Karras et al. 2022, Eq. 81
        sigma, s = path.sigma(t), scale.scale(t)
        rate = path.slope(t) / sigma
        return (rate + scale.slope(t) / s) * x - rate * s * _denoise(net, x / s, sigma, class_labels)

    gain = min(S_churn / steps, math.sqrt(2) - 1)
    x = latents.double() * (path.sigma(times[0]) * scale.scale(times[0]))
    for t, t_next in itertools.pairwise(times):
        if gain > 0:
            sigma, noise = (
                path.sigma(t),
                randn_like(x),
            )  # drawn at every step, as in EDM: images then differ by what the options do
            raised = path.time(_snap(net, sigma + gain * sigma)) if S_min <= sigma <= S_max else t
            spread = math.sqrt(max(path.sigma(raised) ** 2 - sigma**2, 0))
            x = scale.scale(raised) * (x / scale.scale(t) + spread * S_noise * noise)
            t = raised
        v = velocity(x, t)
        step = t_next - t
        if solver == 'heun' and t_next > 0:
            v_middle = velocity(x + alpha * step * v, t + alpha * step)
            v = v + (v_middle - v) / (2 * alpha)
        x = x + step * v
    return x


SAMPLERS = dict(
    student=student_sampler,
    cm=cm_sampler,
    addim=addim_sampler,
    **{solver: functools.partial(ode_sampler, solver=solver) for solver in ('euler', 'heun')},
)
