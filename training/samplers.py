"""All samplers behind one signature: images = sample(net, latents, class_labels, solver, steps, **options).

A sampler combines a schedule and a solver: it lists the noise levels at which a network is evaluated
(training/schedules.py for teachers; students and consistency models record theirs) and steps over them
(training/solvers.py).

- `student`: DDIM steps over the student's own grid, of a two-time student over any.
- `cm`: a consistency model, each of whose outputs is an image; evaluated once, or again after adding noise.
- `euler`, `heun`: the probability-flow ODE of a teacher, with EDM's discretizations, schedules, scalings and
  churn (Karras et al. 2022, Algorithms 1 and 2).
- `ipndm`, `ipndm_v`, `deis`, `dpmpp`, `unipc`, `dpm2`: the same ODE in few evaluations; `best`: a solver by the
  number of evaluations.
- `addim`: DDIM steps of a teacher that compensate for missing variance (Heek et al. 2024).

Those of teachers are in training/teacher_samplers.py.

The metadata of a snapshot record how it is sampled. `solver`: its sampler; by default `student` if there is a
grid, else `heun`. `sigmas`: the noise levels of its evaluations, then 0.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from dnnlib import UserError, WrongOptions
from training import consistency_ops as ops
from training import solvers
from training import teacher_samplers as teachers
from training.schedules import schedule_sigmas
from training.solvers import ODE_SOLVERS, ode_solve
from training.teacher_samplers import DEFAULT_TEACHER_STEPS, clip_range

__all__ = ['clip_range', 'ode_solve', 'sample', 'schedule_sigmas']

DEFAULT_TIMESTEPS = 40  # nodes that the indices `ts` count; Song et al.'s number in distillation
DEFAULT_RANGE = (0.002, 80.0)  # noise levels of a student or consistency model that records none

Edit = Callable[[Tensor], Tensor]  # changes a denoised image, such as replacing its known pixels
Start = tuple[Tensor, float]  # (image, sigma): sampling starts at image + sigma · latents

# ----------------------------------------------------------------------------
# Options. None: as recorded by the network, else the default.


@dataclass(frozen=True)
class StudentOptions:
    """How a student is sampled."""

    sigma_min: float | None = None  # range and exponent of the grid, which is then rebuilt
    sigma_max: float | None = None
    rho: float | None = None
    student_grid: str | None = None  # edm | full
    sigmas: Sequence[float] | None = None  # these levels, then 0, in place of a grid
    edit: Edit | None = None  # applied to every D
    start: Start | None = None  # start there; then the grid levels below it


@dataclass(frozen=True)
class CMOptions:
    """How a consistency model is sampled. Its noise levels: see `cm_sigmas`."""

    taus: Sequence[float] | None = None
    mid_t: float | None = None
    ts: Sequence[int] | None = None
    timesteps: int | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float | None = None
    edit: Edit | None = None  # applied to every D, after the clamp
    start: Start | None = None  # start there instead of at pure noise (SDEdit, Meng et al. 2022)
    clip_denoised: bool | None = None  # clamp every D to [-1, 1]; by default for pixels, not for latents


def _known(options_class: type, options: dict) -> dict:
    """The subset of `options` that are fields of the class."""
    names = {field.name for field in fields(options_class)}
    return {name: value for name, value in options.items() if name in names}


# ----------------------------------------------------------------------------
# Sampling.


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
        net: denoiser D(x, sigma, class_labels) of x [N, C, H, W] and a scalar noise level. Its `metadata`, if
            any, record whether it is a student with a grid, a consistency model or a teacher.
        latents: [N, C, H, W], unit variance.
        class_labels: [N, label_dim] one-hot, or None.
        solver: student | cm | ancestral | addim | best | one of `solvers.ODE_SOLVERS`; None: as recorded by the network.
        steps: of the solver, which are network evaluations but for heun and dpm2; None: the network's own
            number, 18 for a teacher, 1 for a consistency model that records none.
        randn_like: standard normal noise in the shape and type of its argument, for cm, ancestral and solvers
            with churn.
        options: of `StudentOptions`, `CMOptions`, or `AddimOptions`, `OdeOptions`, `SolverOptions` of
            training/teacher_samplers.py; for students also `force_steps`, which allows another number of steps
            than they were trained for.
    Returns: [N, C, H, W] float64 in about [-1, 1]; only cm clamps.
    Raises: UserError for a solver or an option that does not apply.
    """
    solver, steps = resolve(net, solver, steps, force_steps=options.pop('force_steps', False), **options)
    sampler = SAMPLERS[solver]
    known = _known(sampler.options, options)
    if stray := [name for name in options if name not in known]:
        raise UserError(no_option(solver, stray))

    denoiser = denoiser_of(net, class_labels)
    return sampler.run(net, denoiser, latents.double(), steps, sampler.options(**options), randn_like)


def denoiser_of(net, class_labels: Tensor | None) -> solvers.Denoiser:
    """D(x, sigma) float64 of a network at noise levels that are Python numbers, because solvers step in float64
    whatever precision the network computes in. A guided network chooses by the number what to evaluate. Of a
    two-time network G(x, sigma, r), where r = 0, the image, if it is left out."""
    if is_two_time(net):
        level = ops.noise_level
        return lambda x, sigma, r=0.0: net(x, level(sigma, x), class_labels, r=level(r, x)).double()
    level = (lambda sigma, x: sigma) if getattr(net, 'takes_numbers', False) else ops.noise_level
    return lambda x, sigma: net(x, level(sigma, x), class_labels).double()


def is_two_time(net) -> bool:
    """Whether a network is a two-time student, which also takes the level at which a step ends."""
    return getattr(net, 'two_time', False)


def resolve(
    net, solver: str | None, steps: int | None, force_steps: bool = False, **options
) -> tuple[str, int]:
    """The solver and number of steps that `sample` uses for a network and options.

    Raises: UserError if they do not apply to the network.
    """
    # The solver: as given, as recorded, or by whether there is a grid.
    metadata = getattr(net, 'metadata', None) or {}
    own_steps = len(metadata['sigmas']) - 1 if 'sigmas' in metadata else None
    two_time = is_two_time(net)
    solver = solver or metadata.get('solver') or ('student' if own_steps or two_time else 'heun')
    if two_time and solver not in OF_TWO_TIME:
        raise WrongOptions(f'{solver} is for diffusion models, and this is a two-time student: leave it out')
    if own_steps and (solver == 'ancestral') != (metadata.get('solver') == 'ancestral'):
        how = 'without noise between its steps' if solver == 'ancestral' else 'by ancestral steps'
        raise WrongOptions(f'this student is sampled {how}: leave out the solver {solver}')
    if solver in ONLY_OF_TEACHERS and (own_steps or metadata.get('solver') == 'cm'):
        what = f'a student of {own_steps} steps' if metadata.get('solver') != 'cm' else 'a consistency model'
        raise WrongOptions(f'{solver} solves the ODE of a diffusion model, and this is {what}: leave it out')
    if solver == 'best':
        solver, steps = teachers.best_solver(steps, options)
    if solver not in SAMPLERS:
        raise UserError(f'solver {solver!r} is not one of {", ".join(SAMPLERS)}')

    # Options of solvers that the sampler does not have; `sample` refuses all others.
    known = _known(SAMPLERS[solver].options, options)
    if stray := [name for name in options if name in OF_SOLVERS and name not in known]:
        raise WrongOptions(no_option(solver, stray))

    # Consistency models and teachers take any number of steps.
    if solver == 'cm':
        if metadata.get('solver') != 'cm' and (own_steps or 1) > 1:
            raise UserError(
                f'this is a student of {own_steps} steps, whose outputs are no images before the last: '
                'leave out the solver cm'
            )
        return solver, len(cm_sigmas(net, CMOptions(**known), steps))
    if solver in ODE_SOLVERS:
        return solver, teachers.ode_steps(net, solver, steps, SAMPLERS[solver].options(**known))
    if solver not in ('student', 'ancestral'):
        return solver, DEFAULT_TEACHER_STEPS if steps is None else steps

    # A flow map takes any number of steps, by default as many as it learned at most; and so does a teacher.
    if own_steps is None and (two_time or solver == 'ancestral'):
        if (sigmas := known.get('sigmas')) is None:
            return solver, steps or max(metadata.get('steps', [1 if two_time else DEFAULT_TEACHER_STEPS]))
        listed = len(falling_to_zero(sigmas)) - 1
        if steps not in (None, listed):
            raise UserError(
                f'sigmas are the levels of {listed} steps, not {steps}: leave out the number of steps'
            )
        return solver, listed
    if known.get('sigmas') is not None:
        raise UserError('this student samples at the levels that it was trained at: leave out sigmas')

    # Another student takes the steps of its grid.
    if own_steps is None and steps is None:
        raise UserError(
            'this network is not a student with a grid of its own: give the number of steps, or take the '
            'solver heun or euler'
        )
    if own_steps is not None and steps not in (None, own_steps) and not force_steps:
        raise UserError(
            f'this student was trained for {own_steps} steps, not {steps}: leave out --steps, '
            'or add --force-steps to try all the same'
        )
    return solver, own_steps if steps is None else steps


def no_option(solver: str, names: Sequence[str]) -> str:
    """The message for options that a sampler does not have."""
    return f'the {solver} sampler has no option {", ".join(names)}; choose another solver or leave it out'


def evaluations(
    solver: str,
    steps: int,
    afs: bool = False,
    to_zero: bool | None = None,
    sigmas: Sequence[float] | None = None,
    **_,
) -> int:
    """Network evaluations per image (NFE) without a `start`, which skips the levels above it.

    Args: what `resolve` returns, and the options of sampling, of which others make no difference.
    """
    if solver not in ODE_SOLVERS:
        return steps
    return ODE_SOLVERS[solver].nfe(steps, afs, teachers.steps_to_zero(solver, to_zero, sigmas))


def describe(solver: str, steps: int, order: int | None = None, **options) -> str:
    """`ipndm of order 4, 8 evaluations each`. Args: as of `evaluations`."""
    orders = ODE_SOLVERS[solver].orders if solver in ODE_SOLVERS else ()
    of_order = f' of order {order or orders[0]}' if orders else ''
    nfe = evaluations(solver, steps, **options)
    return f'{solver}{of_order}, {nfe} evaluations each'


# ----------------------------------------------------------------------------
# The noise levels that a network is evaluated at.


def _recorded(net, name: str, given, default):
    """`given`; if that is None, the entry of the network's metadata, or the default."""
    return (getattr(net, 'metadata', None) or {}).get(name, default) if given is None else given


def _recorded_range(net, o: StudentOptions | CMOptions) -> tuple[float, float]:
    low = _recorded(net, 'sigma_min', o.sigma_min, DEFAULT_RANGE[0])
    high = _recorded(net, 'sigma_max', o.sigma_max, DEFAULT_RANGE[1])
    return clip_range(net, low, high)


def _grid_of(net) -> str:
    """The kind of a student's grid that is not recorded."""
    return 'full' if is_two_time(net) else 'edm'


def _start_level(start: Start, highest: float) -> float:
    if not 0 < start[1] <= highest:
        raise UserError(
            f'sampling cannot start at sigma = {start[1]:g}: choose a noise level above 0 and up to '
            f'{highest:g}'
        )
    return float(start[1])


def student_sigmas(net, o: StudentOptions, steps: int) -> list[float]:
    """The student's noise levels, then 0: the recorded grid, or one built from the options if none is
    recorded or the options ask for another. With a `start`, its level and the grid levels below it."""
    # A recorded grid is used as it is, so that the levels are those of training bit for bit.
    recorded = _recorded(net, 'sigmas', None, [])
    if o.sigmas is not None:
        sigmas = falling_to_zero(o.sigmas)
        low, high = teachers.known_range(net)
        if not max(low, 0) <= sigmas[-2] or sigmas[0] > high:
            raise UserError(
                f'sigmas do not lie within {low:g} to {high:g}, the levels that the network knows'
            )
    elif steps == len(recorded) - 1 and (o.sigma_min, o.sigma_max, o.rho, o.student_grid) == (None,) * 4:
        sigmas = [float(sigma) for sigma in recorded]
    else:
        # Any other grid is rebuilt from what is recorded, with the options in its place.
        rho, kind = (
            _recorded(net, 'rho', o.rho, 7.0),
            _recorded(net, 'student_grid', o.student_grid, _grid_of(net)),
        )
        spacing = _recorded(net, 'sigma_grid', None, 'karras')
        sigmas = ops.student_grid(steps, *_recorded_range(net, o), rho, kind, spacing).tolist()

    # A start replaces the levels at and above its own.
    if o.start is None:
        return sigmas
    return [_start_level(o.start, sigmas[0]), *(sigma for sigma in sigmas if sigma < o.start[1])]


def falling_to_zero(sigmas: Sequence[float]) -> list[float]:
    """Listed levels, with a 0 at their end. Raises: UserError unless they fall."""
    levels = [float(sigma) for sigma in sigmas]
    levels += [0.0] * (levels[-1:] != [0.0])
    if len(levels) < 2 or any(not above > below for above, below in itertools.pairwise(levels)):
        raise UserError(
            f'sigmas {", ".join(f"{sigma:g}" for sigma in sigmas)}: they must fall, and stay above 0'
        )
    return levels


def cm_sigmas(net, o: CMOptions, steps: int | None = None) -> list[float]:
    """The decreasing noise levels that a consistency model is evaluated at: sigma_max or that of `start`, then

    - `taus`: these levels;
    - `mid_t`: this level (Geng et al. 2024: 0.821 for CIFAR-10, 1.526 for ImageNet-64);
    - `ts`: indices of `timesteps` Karras nodes from sigma_max (0) to sigma_min (timesteps − 1). The first
      index is the first level, the last index the end, which is not evaluated: 0,22,39 of 40 are two
      evaluations (Song et al. 2023; metadata: `num_timesteps`);
    - none of these: the recorded levels (below `start`), if their number is `steps`; else the first n of n+1
      Karras nodes, n = `steps`. sigma_min is left out, because a consistency model is nearly the identity
      there.

    Raises: UserError if options contradict each other or the network.
    """
    # The range.
    low, high = _recorded_range(net, o)
    top = high if o.start is None else _start_level(o.start, high)
    rho = _recorded(net, 'rho', o.rho, 7.0)

    # At most one of the options lists levels.
    ways = [name for name in ('taus', 'mid_t', 'ts') if getattr(o, name) is not None]
    if len(ways) > 1 or (o.timesteps is not None and o.ts is None):
        raise UserError(
            f'{" and ".join([*ways, "timesteps"][:2])}: noise levels are given as one of taus, mid_t, '
            'and ts with or without timesteps'
        )

    # The levels, by that option or by the number of steps.
    if o.ts is not None:
        nodes = _recorded(net, 'num_timesteps', o.timesteps, DEFAULT_TIMESTEPS)
        sigmas = [top, *_indexed_sigmas(o.ts, nodes, low, high, rho)]
    elif ways:
        sigmas = [top, *(o.taus if o.mid_t is None else [o.mid_t])]
    else:
        # The recorded levels without the final 0; if there are none, one evaluation at sigma_max.
        sigmas = _recorded(net, 'sigmas', None, [high, 0.0])[:-1]
        if o.start is not None:
            # The start is the first evaluation, in place of the recorded one.
            sigmas = [top, *(sigma for sigma in sigmas[1:] if sigma < top)]
        if steps not in (None, len(sigmas)) or (o.sigma_min, o.sigma_max) != (None, None):
            n = len(sigmas) if steps is None else steps
            sigmas = ops.student_grid(n, min(low, top), top, rho, 'full')[:-1].tolist()

    # They must decrease to the boundary, and be as many as the steps.
    boundary = float(getattr(net, 'boundary', 0))
    if o.start is not None and top <= boundary:
        raise UserError(
            f'sampling cannot start at sigma = {top:g}, where the network is the identity: '
            f'choose a noise level above {boundary:g}'
        )
    if not all(above > below for above, below in itertools.pairwise([*sigmas, boundary])):
        raise UserError(
            f'noise levels {", ".join(f"{sigma:g}" for sigma in sigmas)}: they must fall, and stay above '
            f'{boundary:g}'
        )
    if steps not in (None, len(sigmas)):
        raise UserError(
            f'{ways[0]} makes {len(sigmas)} evaluations, not {steps}: leave out the number of steps'
        )
    return [float(sigma) for sigma in sigmas]


def _indexed_sigmas(
    ts: Sequence[int], timesteps: int, sigma_min: float, sigma_max: float, rho: float
) -> list[float]:
    """The levels between the first and the last of `ts`, indices of Karras nodes."""
    if len(ts) < 2 or ts[0] != 0 or ts[-1] != timesteps - 1 or any(i >= j for i, j in itertools.pairwise(ts)):
        raise UserError(
            f'ts = {",".join(map(str, ts))} does not rise from 0 to {timesteps - 1}, the end of '
            f'{timesteps} timesteps'
        )
    return ops.karras_sigmas(timesteps, sigma_min, sigma_max, rho)[list(ts[1:-1])].tolist()


# ----------------------------------------------------------------------------
# Samplers: a schedule, a start and a solver. Each is (net, denoiser, latents, steps, options, randn_like) ->
# images.


def _start_state(latents: Tensor, sigma: float, start: Start | None) -> Tensor:
    noise = latents * sigma
    return noise if start is None else start[0].double() + noise


def changed(denoiser: solvers.Denoiser, changes: Sequence[Edit]) -> solvers.Denoiser:
    """A denoiser whose outputs are clamped or edited by `changes` in turn."""

    def denoise(x, *levels):
        denoised = result = denoiser(x, *levels)
        for change in changes:
            result = change(result)

        # Non-finite values stay visible: a clamp would turn infinity into 1, an edit may overwrite it.
        return torch.where(denoised.isfinite(), result, torch.nan)

    return denoise


def sample_student(
    net, denoiser, latents: Tensor, steps: int, o: StudentOptions, randn_like, ancestral: bool = False
) -> Tensor:
    """DDIM or ancestral steps down the student's grid; a two-time student is told where each step ends."""
    sigmas = student_sigmas(net, o, steps)
    x = _start_state(latents, sigmas[0], o.start)
    denoiser = denoiser if o.edit is None else changed(denoiser, [o.edit])
    if ancestral:
        return solvers.ancestral(denoiser, x, sigmas, randn_like)
    solve = solvers.flow_map if is_two_time(net) else solvers.ddim
    return solve(denoiser, x, sigmas)


def sample_cm(net, denoiser, latents: Tensor, steps: int, o: CMOptions, randn_like) -> Tensor:
    """Multistep sampling of a consistency model."""
    # Every output is clamped, then edited.
    # Latents have no bounds to clamp to, so an encoder turns clamping off.
    clip = _recorded(net, 'clip_denoised', o.clip_denoised, not _recorded(net, 'encoder', None, None))
    clamp = [lambda denoised: denoised.clamp(-1, 1)] if clip else []
    edit = [] if o.edit is None else [o.edit]

    sigmas = cm_sigmas(net, o, steps)
    x = _start_state(latents, sigmas[0], o.start)
    boundary = float(getattr(net, 'boundary', 0))
    return solvers.consistency(changed(denoiser, clamp + edit), x, sigmas, boundary, randn_like)


class Sampler(NamedTuple):
    """A sampler and the class of its options."""

    run: Callable[..., Tensor]
    options: type


# Of EDM's solvers; a student or consistency model may be sampled by them, whatever that gives.
EDMS = ('euler', 'heun')
ONLY_OF_TEACHERS = [*(name for name in ODE_SOLVERS if name not in EDMS), 'best']
OF_TWO_TIME = ('student', 'cm')
OF_SOLVERS = {'sigmas', 'afs', 'to_zero', 'order', 'variant'}
SAMPLERS = dict(
    student=Sampler(sample_student, StudentOptions),
    **{
        name: Sampler(functools.partial(teachers.sample_edm, solver=name), teachers.OdeOptions)
        for name in EDMS
    },
    addim=Sampler(teachers.sample_addim, teachers.AddimOptions),
    cm=Sampler(sample_cm, CMOptions),
    ancestral=Sampler(functools.partial(sample_student, ancestral=True), StudentOptions),
    **{
        name: Sampler(functools.partial(teachers.sample_ode, solver=name), teachers.SolverOptions)
        for name in ODE_SOLVERS
        if name not in EDMS
    },
)
