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

from training.addim import addim_hop, addim_variance
from training.choices import DISTANCES, HOPS, WEIGHT_MODES, check_choice
from training.grids import *  # noqa: F403
from training.grids import GENERAL, SNAP, expand_like, noise_level

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


def ancestral_step(x_t: Tensor, denoised: Tensor, sigma_t: Tensor, sigma_s: Tensor, noise: Tensor) -> Tensor:
    """A sample of x_s given x_t and the image, of noise that is added step by step.

    x_s = D + q (x_t − D) + sigma_s sqrt(1 − q) n with q = sigma_s² / sigma_t²   (Ho et al. 2020, Eq. 7, in EDM's
    notation).

    Args:
        x_t, denoised: [N, ...] state at sigma_t, and image.
        sigma_t, sigma_s: [N] noise levels, sigma_t >= sigma_s >= 0 and sigma_t > 0.
        noise: [N, ...] standard normal.
    Returns: [N, ...] float64.
    """
    sigma_t, sigma_s = expand_like(sigma_t, x_t), expand_like(sigma_s, x_t)
    q = (sigma_s / sigma_t) ** 2
    mean = torch.lerp(denoised.double(), x_t.double(), q)
    return mean + sigma_s * (1 - q).sqrt() * noise.double()


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
