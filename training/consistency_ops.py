"""The mathematics of multistep consistency models in EDM's noise schedule: moves between noise levels and
their inverses, distances and weights of losses. The levels themselves, in grids and edges, are in `grids`;
its names are importable from here too.

Pure functions in FP64, without networks or state. Notation: x_sigma = y + sigma n; the probability-flow ODE
is dx/dsigma = (x − D(x; sigma)) / sigma (Karras et al. 2022, Eq. 1 with s(t) = 1, sigma(t) = t).
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from training.choices import DISTANCES, HOPS, SEGMENT_SOLVERS, WEIGHT_MODES, check_choice
from training.grids import *  # noqa: F403
from training.grids import GENERAL, SNAP, nodes_between

Denoiser = Callable[[Tensor, Tensor], Tensor]


def anneal_T(nimg: float, T_start: int, T_end: int, T_anneal_kimg: float) -> int:
    """Teacher edges after `nimg` images: log-linear from T_start to T_end over T_anneal_kimg thousand images.

    T = round(exp(lerp(ln T_start, ln T_end, clip(kimg / T_anneal_kimg, 0, 1))))   (Heek et al. 2024,
    "annealing the teacher steps"). T_anneal_kimg = 0 means T_end from the start.
    """
    # Progress of annealing, from 0 to 1.
    done = 1.0 if T_anneal_kimg <= 0 else min(max(nimg / (1e3 * T_anneal_kimg), 0.0), 1.0)
    return round(math.exp(math.log(T_start) + done * (math.log(T_end) - math.log(T_start))))


# ----------------------------------------------------------------------------
# Single steps.


def noise_level(sigma: Tensor | float, x: Tensor) -> Tensor:
    """Noise levels as float64 beside `x`. A number is filled in there: a copy from the host would wait for
    the device."""
    if isinstance(sigma, Tensor):
        return sigma.to(x.device, torch.float64)
    return torch.full([], sigma, dtype=torch.float64, device=x.device)


def expand_like(sigma: Tensor, x: Tensor) -> Tensor:
    """[N] or scalar noise levels as float64 that broadcast against images [N, ...]."""
    sigma = noise_level(sigma, x)
    return sigma.reshape(-1, *[1] * (x.ndim - 1))


def ddim_step(x_t: Tensor, denoised: Tensor, sigma_t: Tensor, sigma_s: Tensor) -> Tensor:
    """One Euler step of the ODE: DDIM's (Song et al. 2021) in EDM's notation.

    x_s = D + (sigma_s / sigma_t)(x_t − D)

    Args:
        x_t, denoised: [N, ...] state and denoiser output at sigma_t.
        sigma_t, sigma_s: [N] noise levels, sigma_t > 0.
    Returns: [N, ...] float64.
    """
    # lerp is exact at both ends: D where sigma_s = 0, x_t where the levels are equal.
    ratio = expand_like(sigma_s, x_t) / expand_like(sigma_t, x_t)
    return torch.lerp(denoised.double(), x_t.double(), ratio)


def inv_ddim(x_b: Tensor, x_t: Tensor, sigma_t: Tensor, sigma_b: Tensor, check: bool = True) -> Tensor:
    """The denoised image that a DDIM step from `x_t` at `sigma_t` would carry to `x_b` at `sigma_b`.

    Inverse of `ddim_step`: x* = (sigma_t x_b − sigma_b x_t) / (sigma_t − sigma_b)   (Salimans & Ho 2022; Heek
    et al. 2024, Eq. 7).

    Args:
        x_b, x_t: [N, ...] states at the two noise levels.
        sigma_t, sigma_b: [N] noise levels, sigma_t > sigma_b >= 0.
        check: look at the levels, which synchronizes with the device. Training checks its whole table once
            instead (`check_edges`).
    Returns: [N, ...] float64.
    Raises: ValueError where sigma_t <= sigma_b.
    """
    sigma_t, sigma_b = expand_like(sigma_t, x_t), expand_like(sigma_b, x_t)
    if check and not bool((sigma_t > sigma_b).all()):
        raise ValueError('inv_ddim needs sigma_t > sigma_b')
    return (sigma_t * x_b.double() - sigma_b * x_t.double()) / (sigma_t - sigma_b)


def heun_hop(
    denoiser: Denoiser, x_t: Tensor, sigma_t: Tensor, sigma_s: Tensor, denoised: Tensor | None = None
) -> Tensor:
    """One Heun step of the ODE from sigma_t to sigma_s; its local error is O((sigma_t − sigma_s)³).

    x_s = x_t + h (d_t + d_s) / 2 with h = sigma_s − sigma_t, d_t = (x_t − D(x_t; sigma_t)) / sigma_t and d_s
    the slope at x_e = x_t + h d_t   (Karras et al. 2022, Algorithm 1).

    Args:
        denoiser: D(x, sigma) for x [N, ...] and sigma [N].
        x_t: [N, ...] state at sigma_t.
        sigma_t, sigma_s: [N] noise levels, sigma_t > sigma_s > 0 (a step to 0 has no second slope: use
            `ddim_step`).
        denoised: D(x_t, sigma_t) where it is known already.
    Returns: [N, ...] float64.
    """
    sigma_t, sigma_s = (noise_level(s, x_t).expand(len(x_t)) for s in (sigma_t, sigma_s))

    # The Euler step, to the state at which the second slope is evaluated.
    if denoised is None:
        denoised = denoiser(x_t.double(), sigma_t)
    x_euler = ddim_step(x_t, denoised, sigma_t, sigma_s)

    # Without slopes: x_s is halfway between x_t and x_e + h d_s = D_s + (2 − sigma_t / sigma_s)(x_e − D_s).
    second = denoiser(x_euler, sigma_s).double()
    x_twice = torch.lerp(second, x_euler, expand_like(2 - sigma_t / sigma_s, x_t))
    return torch.lerp(x_t.double(), x_twice, 0.5)


# Weights of the last slopes, newest first, for equal steps.
ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def ipndm_hop(x_t: Tensor, slopes: Sequence[Tensor], sigma_t: Tensor, sigma_s: Tensor) -> Tensor:
    """One step of iPNDM: x_s = x_t + (sigma_s − sigma_t) sum_k w_k d_k, with the weights of equal steps   (Liu
    et al. 2022, Section 3.3; Zhang & Chen 2023).

    Args:
        slopes: 1 to 4 of d = (x − D) / sigma, the newest, at sigma_t, first.
        sigma_t, sigma_s: [N] noise levels.
    Returns: [N, ...] float64.
    """
    slope = sum(weight * d for weight, d in zip(ADAMS_BASHFORTH[len(slopes)], slopes))
    return x_t + expand_like(sigma_s - sigma_t, x_t) * slope


def dpmpp_hop(
    x_t: Tensor, outputs: Sequence[Tensor], sigma_before: Tensor, sigma_t: Tensor, sigma_s: Tensor
) -> Tensor:
    """One step of DPM-Solver++(2M): a DDIM step with the denoised image extrapolated in lambda = −ln sigma to
    the middle of the step   (Lu et al. 2022b, Algorithm 2).

    D_0 + (D_0 − D_1) h / (2 h_before), h = ln(sigma_t / sigma_s), h_before = ln(sigma_before / sigma_t).

    Args:
        outputs: D at sigma_t and, but in the first step, D at sigma_before.
        sigma_before, sigma_t, sigma_s: [N] noise levels that do not rise, sigma_s > 0.
    Returns: [N, ...] float64.
    """
    denoised = outputs[0]
    if len(outputs) > 1:
        # Equal levels, of steps without length, have equal outputs: their ratio does not matter.
        h, h_before = (sigma_t / sigma_s).log(), (sigma_before / sigma_t).log().clamp(min=1e-12)
        denoised = denoised + expand_like(h / (2 * h_before), x_t) * (outputs[0] - outputs[1])
    return ddim_step(x_t, denoised, sigma_t, sigma_s)


def addim_hop(x_t: Tensor, denoised: Tensor, sigma_t: Tensor, sigma_s: Tensor, v: Tensor) -> Tensor:
    """One step of adjusted DDIM, whose noise is lengthened by what DDIM's smooth prediction lacks.

    x_s = D + sqrt(sigma_s² + (1 − sigma_s / sigma_t)² v / |e|²) e with e = (x_t − D) / sigma_t and |e| over
    all of an image's values   (Heek et al. 2024, Eq. 14 and Algorithm 3). v = 0 is DDIM, and so is a step to
    sigma_s = 0.

    Args:
        x_t, denoised: [N, ...] state and denoiser output at sigma_t.
        sigma_t, sigma_s: [N] noise levels, sigma_t > sigma_s >= 0.
        v: [N] expected squared distance of the image from D, see `addim_variance`.
    Returns: [N, ...] float64.
    """
    sigma_t, sigma_s, v = (noise_level(s, x_t).expand(len(x_t)) for s in (sigma_t, sigma_s, v))
    denoised = denoised.double()
    noise = (x_t.double() - denoised) / expand_like(sigma_t, x_t)  # [N, ...], about unit variance

    # Without noise there is nothing to lengthen, and nothing to divide by.
    square = noise.flatten(1).square().sum(dim=1).clamp(min=1e-100)
    length = (sigma_s**2 + (1 - sigma_s / sigma_t) ** 2 * v / square).sqrt()
    return denoised + expand_like(torch.where(sigma_s > 0, length, 0), x_t) * noise


def addim_variance(
    denoised: Tensor, sigma_t: Tensor, y: Tensor | None = None, xvar_frac: float = 0.75
) -> Tensor:
    """v of `addim_hop` for images of d values   (Heek et al. 2024, Section 3.2).

    xvar_frac |y − D|² from the clean images y or, without them, 0.1 d / (2 + 1/sigma_t²), a tenth of the
    posterior variance under a Gaussian prior of variance 1/2.

    Args:
        denoised: [N, ...] D at sigma_t [N].
        y: [N, ...]
    Returns: [N] float64.
    """
    if y is not None:
        return xvar_frac * (y.double() - denoised.double()).flatten(1).square().sum(dim=1)
    # Without images: d / (2 + 1/sigma²) is the expected error |y − D|² under that prior.
    sigma_t = noise_level(sigma_t, denoised).expand(len(denoised))
    return 0.1 * denoised[0].numel() / (2 + sigma_t**-2)


def check_hop(hop: str | Callable, known: Sequence[str] = HOPS) -> None:
    """Raises: ValueError unless `hop` is one of `known`, or a function: see `teacher_hop`."""
    if not callable(hop):
        check_choice('hop', hop, known)


def teacher_hop(
    denoiser: Denoiser,
    x_t: Tensor,
    sigma_t: Tensor,
    sigma_s: Tensor,
    hop: str | Callable[[Tensor, Tensor, Tensor], Tensor],
    denoised: Tensor | None = None,
    y: Tensor | None = None,
    xvar_frac: float = 0.75,
) -> Tensor:
    """x_s, one step of a teacher from sigma_t to sigma_s > 0, `ddim` and `addim` also to 0.

    Args:
        hop: `heun`, `ddim` or `addim` (`heun_hop`, `ddim_step`, `addim_hop`), or the exact solution (x_t,
            sigma_t, sigma_s) -> x_s (tests).
        denoised: D(x_t, sigma_t) where it is known already.
        y, xvar_frac: of `addim_variance`; xvar_frac = 0 for the variance that does not look at the images.
    Returns: [N, ...] float64.
    """
    if callable(hop):
        return hop(x_t, sigma_t, sigma_s)
    denoised = denoiser(x_t, sigma_t) if denoised is None else denoised
    # Every hop evaluates the teacher at sigma_t; only Heun's evaluates it again, at sigma_s.
    if hop == 'heun':
        return heun_hop(denoiser, x_t, sigma_t, sigma_s, denoised)
    if hop == 'ddim':
        return ddim_step(x_t, denoised, sigma_t, sigma_s)
    variance = addim_variance(denoised, sigma_t, y if xvar_frac else None, xvar_frac)
    return addim_hop(x_t, denoised, sigma_t, sigma_s, variance)


# ----------------------------------------------------------------------------
# Batches whose edges end at 0 and elsewhere. All images take part in every evaluation; what does not apply is
# dropped afterward, because selecting images on the device would wait for it.


def above_zero(sigma_s: Tensor, sigma_t: Tensor) -> Tensor:
    """sigma_s where it is positive, and where it is 0 a level in its place, at which arithmetic stays finite:
    sigma_t / 2."""
    return torch.where(sigma_s > 0, sigma_s, sigma_t / 2)


def by_kind(kind: Tensor, terminal: Tensor, snap: Tensor, general: Tensor) -> Tensor:
    """Of three images [N, ...] for each edge, the one of its kind [N]."""
    kind = expand_like(kind, general)
    return torch.where(kind == GENERAL, general, torch.where(kind == SNAP, snap, terminal))


# ----------------------------------------------------------------------------
# The teacher's own solution, in several steps.


def ode_path(
    denoiser: Denoiser, x: Tensor, levels: Sequence[float], denoised: Tensor | None = None
) -> Iterator[Tensor]:
    """Follow the ODE down a list of noise levels by Heun steps; a last step to 0 is Euler's.

    Args:
        x: [N, ...] state at the first level.
        denoised: D at x, where it is known already.
    Yields: [N, ...] float64, the state at each level after the first.
    """
    for sigma_t, sigma_s in itertools.pairwise(levels):
        sigma = torch.full([len(x)], sigma_t, dtype=torch.float64, device=x.device)
        # What is known already serves the first step only.
        denoised = denoiser(x, sigma).double() if denoised is None else denoised
        if sigma_s > 0:
            x, denoised = heun_hop(denoiser, x, sigma, torch.full_like(sigma, sigma_s), denoised), None
        else:
            x = denoised
        yield x


def solve_ode(
    denoiser: Denoiser, x: Tensor, levels: Sequence[float], denoised: Tensor | None = None
) -> Tensor:
    """The last state of `ode_path`."""
    # A queue of one forgets the states before.
    return collections.deque(itertools.chain([x], ode_path(denoiser, x, levels, denoised)), 1).pop()


def solve_between(
    denoiser: Denoiser,
    x_t: Tensor,
    sigma_t: Tensor,
    sigma_b: Tensor,
    substeps: int,
    rho: float,
    sigma_min: float,
    spacing: str = 'karras',
    solver: str = 'heun',
) -> Tensor:
    """The teacher's own solution from sigma_t to sigma_b, both [N] float64, by steps over `nodes_between`; a
    last step to 0 gives D.

    Samples that end at 0 and others may share a batch: that costs as many evaluations as if none did, and
    those that end at 0 ignore the second one of Heun's last step.

    Args:
        solver: `heun`, 2 evaluations a step; `ipndm` of order 4 or `dpmpp` of order 2, one evaluation a step.
            Multistep solvers begin anew at sigma_t, with order 1, and do not lower their order at sigma_b,
            where the path goes on.
    Returns: [N, ...] float64.
    Raises: ValueError for another solver.
    """
    check_choice('solver', solver, SEGMENT_SOLVERS)
    x, levels = x_t.double(), nodes_between(sigma_t, sigma_b, substeps, rho, sigma_min, spacing)
    outputs: list[Tensor] = []  # newest first
    slopes: list[Tensor] = []
    for i, (sigma, lower) in enumerate(itertools.pairwise(levels)):
        denoised = denoiser(x, sigma).double()

        # Where the step ends at 0, the hop goes to a level above it and is dropped.
        goal = above_zero(lower, sigma)
        if solver == 'heun':
            hopped = heun_hop(denoiser, x, sigma, goal, denoised)
        elif solver == 'ipndm':
            slopes = [(x - denoised) / expand_like(sigma, x), *slopes[:3]]
            hopped = ipndm_hop(x, slopes, sigma, goal)
        else:
            outputs = [denoised, *outputs[:1]]
            hopped = dpmpp_hop(x, outputs, levels[max(i - 1, 0)], sigma, goal)
        x = torch.where(expand_like(lower, x) > 0, hopped, denoised)
    return x


# ----------------------------------------------------------------------------
# Losses per image and their weights.

PSEUDO_HUBER_EPS = HUBER_DELTA = 1e-4


def image_distance(d: Tensor, kind: str, eps: float = PSEUDO_HUBER_EPS) -> Tensor:
    """Distance of each image's difference `d` [N, ...] from zero, [N]; sums run over all of an image's
    values.

    `pseudo_huber` sqrt(|d|² + eps²) − eps, which is `l2_root` for eps = 0; `l2_root` sqrt(max(|d|², 1e-12));
    `l2` |d|²; `huber` the elementwise Huber function, delta = 1e-4.

    Raises: ValueError for another kind.
    """
    check_choice('distance', kind, DISTANCES)
    d = d.flatten(1)
    if kind == 'huber':
        elementwise = dict(reduction='none', delta=HUBER_DELTA)
        return torch.nn.functional.huber_loss(d, torch.zeros_like(d), **elementwise).sum(dim=1)
    square = d.square().sum(dim=1)
    if kind == 'l2':
        return square
    if kind == 'pseudo_huber' and eps > 0:
        return (square + eps**2).sqrt() - eps
    return square.clamp(min=1e-12).sqrt()  # without eps the square root has no slope at 0


def edge_weight(sigma_t: Tensor, sigma_s: Tensor, mode: str, sigma_data: float) -> Tensor:
    """Loss weight of edges, in the shape of `sigma_t`.

    `edm` = `karras`: 1/sigma² + 1/sigma_d² (Karras et al. 2022, Table 1); `sqrt_karras`: its square root,
    1/c_out, for losses that grow linearly; `vlike` = `snr+1`: 1/sigma² + 1; `snr`: 1/sigma²; `truncated-snr`:
    max(1/sigma², 1) (Salimans & Ho 2022); `flat` = `uniform`: 1; `sqrt_gap`: sqrt(sigma_t − sigma_s).

    Raises: ValueError for another mode.
    """
    check_choice('weight mode', mode, WEIGHT_MODES)
    if mode == 'sqrt_gap':
        return (sigma_t - sigma_s).sqrt()
    if mode in ('flat', 'uniform'):
        return torch.ones_like(sigma_t)
    snr = sigma_t**-2
    # Weights that are functions of sigma_t alone.
    if mode in ('edm', 'karras'):
        return snr + sigma_data**-2
    if mode == 'sqrt_karras':
        return (snr + sigma_data**-2).sqrt()
    if mode in ('vlike', 'snr+1'):
        return snr + 1
    return snr.clamp(min=1) if mode == 'truncated-snr' else snr
