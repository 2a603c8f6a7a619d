"""The mathematics of multistep consistency models in EDM's noise schedule: grids, segments, edges, hops and
their inverses.

Pure functions in FP64, without networks or state. Notation: x_sigma = y + sigma n; the probability-flow ODE
is dx/dsigma = (x − D(x; sigma)) / sigma (Karras et al. 2022, Eq. 1 with s(t) = 1, sigma(t) = t).

A *grid* is a decreasing [n+1] tensor of noise levels that ends in 0; its n *edges* join neighbors. The
student's grid has S edges, its *segments*; the teacher's has about T, each of them inside one segment or cut
off at that segment's lower end, its *boundary*.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]

STUDENT_GRIDS = ('edm', 'full')
SIGMA_GRIDS = ('karras', 'cosine')  # what noise levels are evenly spaced in
SAMPLING_MODES = ('edm', 'vp', 'uniform')
HOPS = ('heun', 'ddim', 'addim')  # of a teacher, see `teacher_hop`
TERMINAL, SNAP, GENERAL = 0, 1, 2  # kinds of edges
KIND_NAMES = ('terminal', 'snap', 'general')
TIE_TOLERANCE = 1e-5  # relative distance at which a teacher level is the same as a student level

# ----------------------------------------------------------------------------
# Grids.


def _warp(spacing: str, rho: float) -> tuple[Callable, Callable]:
    """The coordinate in which a grid's nodes are evenly spaced, as a function of sigma, and its inverse.

    `karras`: sigma^(1/rho) (Karras et al. 2022, Eq. 5). `cosine`: atan sigma, which is pi u / 2 for the
    variance-preserving cosine schedule alpha = cos(pi u / 2), sigma = tan(pi u / 2) (Salimans & Ho 2022; Heek
    et al. 2024, Appendix A).
    """
    if spacing == 'karras':
        return lambda sigma: sigma ** (1 / rho), lambda u: u**rho
    if spacing == 'cosine':
        return lambda sigma: torch.as_tensor(sigma, dtype=torch.float64).atan(), torch.tan
    raise ValueError(f'sigma grid {spacing!r} is not one of {", ".join(SIGMA_GRIDS)}')


def sigma_nodes(n: int, sigma_min: float, sigma_max: float, rho: float, spacing: str = 'karras') -> Tensor:
    """n noise levels from sigma_max down to sigma_min, evenly spaced as `spacing` says (see `_warp`); rho is
    for `karras` alone.

    Returns: [n] float64; a single node is sigma_max.
    """
    if not 0 < sigma_min <= sigma_max < math.inf:
        raise ValueError(f'0 < sigma_min <= sigma_max < inf does not hold for {sigma_min}, {sigma_max}')
    warp, unwarp = _warp(spacing, rho)
    top, bottom = warp(sigma_max), warp(sigma_min)
    ramp = torch.arange(n, dtype=torch.float64) / max(n - 1, 1)
    nodes = unwarp(top + ramp * (bottom - top))
    nodes[-1], nodes[0] = (
        sigma_min,
        sigma_max,
    )  # exact, so that grids of different lengths share their ends bit for bit
    return nodes


def karras_sigmas(n: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """n noise levels from sigma_max down to sigma_min, evenly spaced in sigma^(1/rho) (Karras et al. 2022,
    Eq. 5).

    Returns: [n] float64; a single node is sigma_max.
    """
    return sigma_nodes(n, sigma_min, sigma_max, rho)


def _ending_in_zero(levels: Tensor) -> Tensor:
    return torch.cat([levels, levels.new_zeros(1)])


def student_grid(
    S: int, sigma_min: float, sigma_max: float, rho: float, kind: str = 'edm', spacing: str = 'karras'
) -> Tensor:
    """The S+1 noise levels of an S-step student, the last one 0.

    `edm`: S nodes (Karras's, or of another `spacing`), then 0. `full`: S+1 nodes with the last one replaced
    by 0, so that no evaluation is spent on sigma_min -> 0.
    """
    if S < 1:
        raise ValueError(f'a student takes at least one step, not {S}')
    if kind not in STUDENT_GRIDS:
        raise ValueError(f'student grid {kind!r} is not one of {", ".join(STUDENT_GRIDS)}')
    nodes = sigma_nodes(S if kind == 'edm' else S + 1, sigma_min, sigma_max, rho, spacing)
    return _ending_in_zero(nodes[:S])


def teacher_grid(
    student: Tensor,
    T: int,
    sigma_min: float,
    sigma_max: float,
    rho: float,
    spacing: str = 'karras',
    keep_ties: bool = False,
) -> Tensor:
    """Teacher noise levels [T'+1], at least T edges: nodes of a `spacing`, then 0, without the interior ones
    that coincide with a student level.

    A coinciding node is dropped (relative tolerance 1e-5), so that the edge above it crosses the boundary and
    snaps to it. The first node and the last are kept. The raw count is raised until at least T edges remain.

    `keep_ties` keeps such nodes, as the student's very numbers: each starts the first edge of the segment
    below it, and the student is trained at the noise levels that sampling uses. That holds at every T,
    because the raw count is raised until every student level is a node.
    Raises: ValueError where no count does that (a student grid of another range or spacing).
    """
    for raw in range(T, 2 * T + 2 * len(student) + 2):
        nodes = sigma_nodes(raw, sigma_min, sigma_max, rho, spacing)
        level = student[(nodes[:, None] - student).abs().argmin(dim=1)]
        tied = (nodes - level).abs() <= TIE_TOLERANCE * level
        if keep_ties and torch.isin(student[:-1], level[tied]).all():
            return _ending_in_zero(torch.where(tied, level, nodes))
        tied[0] = tied[-1] = False
        if not keep_ties and raw - int(tied.sum()) >= T:
            return _ending_in_zero(nodes[~tied])
    raise ValueError(f'no teacher grid of about {T} edges suits the student levels {student.tolist()}')


def anneal_T(nimg: float, T_start: int, T_end: int, T_anneal_kimg: float) -> int:
    """Teacher edges after `nimg` images: log-linear from T_start to T_end over T_anneal_kimg thousand images
    (Heek et al. 2024, "annealing the teacher steps").

    T_anneal_kimg = 0 means T_end from the start.
    """
    done = 1.0 if T_anneal_kimg <= 0 else min(max(nimg / (1e3 * T_anneal_kimg), 0.0), 1.0)
    return round(math.exp(math.log(T_start) + done * (math.log(T_end) - math.log(T_start))))


# ----------------------------------------------------------------------------
# Edges.


@dataclass(frozen=True)
class Edges:
    """The edges of a teacher's grid as columns, [T'] each: upper and lower end, boundary, segment and
    kind."""

    sigma_t: Tensor
    sigma_s: Tensor
    sigma_b: Tensor
    segment: Tensor  # int64, 0 is the noisiest
    kind: Tensor  # int64: TERMINAL where sigma_s = 0, SNAP where sigma_s = sigma_b > 0, else GENERAL

    def __len__(self) -> int:
        return len(self.sigma_t)


def segment_of(sigma: Tensor, student: Tensor) -> Tensor:
    """Index j of the segment (student[j+1], student[j]] that holds each noise level; int64, shape of
    `sigma`."""
    levels = student.flip(0).contiguous()
    return len(student) - 1 - torch.searchsorted(levels, sigma.contiguous(), right=False)


def segment_bounds(teacher: Tensor, student: Tensor) -> Tensor:
    """[S, 2] int64: the first and the last edge of each segment, both included."""
    counts = torch.bincount(segment_of(teacher[:-1], student), minlength=len(student) - 1)
    ends = counts.cumsum(0)
    return torch.stack([ends - counts, ends - 1], dim=1)


def edge_table(teacher: Tensor, student: Tensor) -> Edges:
    """Classify the edges of a teacher's grid (see `Edges`)."""
    sigma_t = teacher[:-1]
    segment = segment_of(sigma_t, student)
    sigma_b = student[segment + 1]
    sigma_s = torch.maximum(teacher[1:], sigma_b)
    kind = torch.where(sigma_s > sigma_b, GENERAL, torch.where(sigma_s > 0, SNAP, TERMINAL))
    return Edges(sigma_t, sigma_s, sigma_b, segment, kind)


def edge_density(
    sigma: Tensor, mode: str, rho: float, spacing: str = 'karras', P_mean: float = -1.2, P_std: float = 1.2
) -> Tensor:
    """How often edges at `sigma` should be drawn, up to a common factor: a density in sigma times |dsigma/di|
    on the grid's nodes.

    Densities: `vp` 1 / (1 + sigma²), which is uniform in the cosine schedule's time; `edm` exp(−(ln sigma −
    P_mean)² / (2 P_std²)) / sigma, the training distribution of Karras et al. 2022, Table 1. |dsigma/di| is ∝
    sigma^(1−1/rho) on Karras nodes and ∝ 1 + sigma² on cosine ones.
    """
    slope = 1 + sigma**2 if spacing == 'cosine' else sigma ** (1 - 1 / rho)
    if mode == 'vp':
        return slope / (1 + sigma**2)
    if mode == 'edm':
        return slope / sigma * torch.exp(-((sigma.log() - P_mean) ** 2) / (2 * P_std**2))
    raise ValueError(f'sampling mode {mode!r} is not one of {", ".join(SAMPLING_MODES)}')


def edge_probabilities(
    teacher: Tensor,
    student: Tensor,
    mode: str,
    rho: float,
    terminal_anchor: bool,
    pin_top: bool = False,
    P_mean: float = -1.2,
    P_std: float = 1.2,
    spacing: str = 'karras',
    top_mass: float = 0.0,
) -> Tensor:
    """Probability of drawing each edge, [T'] float64.

    Modes: `uniform`: segment uniform, then edge uniform within it; `vp` and `edm`: see `edge_density`.

    `terminal_anchor` gives the last edge (sigma_min -> 0) exactly 1/T' in those two modes, `pin_top` the
    first edge likewise; the others share the rest in proportion.

    `top_mass` > 0 gives the first edges of the S segments that share together, in equal parts, because
    sampling evaluates the student once at each of them (their upper ends are the student's levels on a teacher
    grid with `keep_ties`). A part takes the place of a pinned 1/T'; where the last edge is no segment's
    first, its 1/T' is cut to what top_mass leaves. Where no other edge is left the parts are scaled to sum to
    one.
    """
    if not 0 <= top_mass <= 1:
        raise ValueError(f'top_mass {top_mass} is no share between 0 and 1')
    edges, S = len(teacher) - 1, len(student) - 1
    pinned = torch.zeros(edges, dtype=torch.bool)
    if mode == 'uniform':
        segment = segment_of(teacher[:-1], student)
        weight = 1 / (torch.bincount(segment, minlength=S)[segment] * S).double()
    else:
        weight = edge_density(teacher[:-1], mode, rho, spacing, P_mean, P_std)
        pinned[-1] |= terminal_anchor
        pinned[0] |= pin_top
    fixed = pinned.double() / edges
    if top_mass:
        tops = segment_bounds(teacher, student)[:, 0]
        fixed = fixed.clamp(max=1 - top_mass)
        fixed[tops], pinned[tops] = top_mass / S, True
    if pinned.all():
        return fixed / fixed.sum()
    free = torch.where(pinned, 0, weight)
    return torch.where(pinned, fixed, free / free.sum() * (1 - fixed.sum()).clamp(min=0))


def halving_edges(S: int, sigma_min: float, sigma_max: float, rho: float, spacing: str = 'karras') -> Edges:
    """What progressive distillation to S steps learns (Salimans & Ho 2022, Algorithm 2): from sigma_t =
    fine[2i] the teacher takes two steps, to sigma_s = fine[2i+1] and on to sigma_b = fine[2i+2], the student
    is to take one; [S] columns, all of the kind GENERAL.

    fine is the `full` grid of 2S steps; every second level of it is the `full` grid of S steps, whose very
    numbers stand here, because the student is sampled at them.
    """
    coarse, fine = (student_grid(n, sigma_min, sigma_max, rho, 'full', spacing) for n in (S, 2 * S))
    return Edges(coarse[:-1], fine[1::2], coarse[1:], torch.arange(S), torch.full([S], GENERAL))


# ----------------------------------------------------------------------------
# Moves between noise levels.


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
    """x_s = D + (sigma_s / sigma_t)(x_t − D): one Euler step of the ODE, DDIM's (Song et al. 2021) in EDM's
    notation.

    Args:
        x_t, denoised: [N, ...] state and denoiser output at sigma_t.
        sigma_t, sigma_s: [N] noise levels, sigma_t > 0.
    Returns: [N, ...] float64.
    """
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


def check_edges(edges: Edges) -> None:
    """Raises ValueError unless sigma_t > sigma_s >= sigma_b >= 0 on every edge and every segment from the
    first to the last has one."""
    ordered = (edges.sigma_t > edges.sigma_s) & (edges.sigma_s >= edges.sigma_b) & (edges.sigma_b >= 0)
    if not bool(ordered.all()):
        raise ValueError(f'noise levels out of order on edge {int((~ordered).nonzero()[0])}')
    if len(edges.segment.unique()) != int(edges.segment[-1]) + 1:
        raise ValueError('a segment has no edge')


def heun_hop(
    denoiser: Denoiser, x_t: Tensor, sigma_t: Tensor, sigma_s: Tensor, denoised: Tensor | None = None
) -> Tensor:
    """One Heun step of the ODE from sigma_t to sigma_s (Karras et al. 2022, Algorithm 1): local error
    O((sigma_t − sigma_s)³).

    With h = sigma_s − sigma_t and slopes d = (x − D) / sigma, x_e = x_t + h d_t is Euler's step, DDIM's; x_t
    + h (d_t + d_s) / 2 is halfway between x_t and x_e + h d_s = D_s + (2 − sigma_t / sigma_s)(x_e − D_s).

    Args:
        denoiser: D(x, sigma) for x [N, ...] and sigma [N].
        x_t: [N, ...] state at sigma_t.
        sigma_t, sigma_s: [N] noise levels, sigma_t > sigma_s > 0 (a step to 0 has no second slope: use
            `ddim_step`).
        denoised: D(x_t, sigma_t) where it is known already.
    Returns: [N, ...] float64.
    """
    sigma_t, sigma_s = (noise_level(s, x_t).expand(len(x_t)) for s in (sigma_t, sigma_s))
    if denoised is None:
        denoised = denoiser(x_t.double(), sigma_t)
    x_euler = ddim_step(x_t, denoised, sigma_t, sigma_s)
    x_twice = torch.lerp(
        denoiser(x_euler, sigma_s).double(), x_euler, expand_like(2 - sigma_t / sigma_s, x_t)
    )
    return torch.lerp(x_t.double(), x_twice, 0.5)


def addim_hop(x_t: Tensor, denoised: Tensor, sigma_t: Tensor, sigma_s: Tensor, v: Tensor) -> Tensor:
    """One step of adjusted DDIM, whose noise is lengthened by what DDIM's smooth prediction lacks (Heek et
    al. 2024, Eq. 14 and Algorithm 3).

    x_s = D + sqrt(sigma_s² + (1 − sigma_s / sigma_t)² v / |e|²) e with e = (x_t − D) / sigma_t and |e| over
    all of an image's values. v = 0 is DDIM, and so is a step to sigma_s = 0.

    Args:
        x_t, denoised: [N, ...] state and denoiser output at sigma_t.
        sigma_t, sigma_s: [N] noise levels, sigma_t > sigma_s >= 0.
        v: [N] expected squared distance of the image from D, see `addim_variance`.
    Returns: [N, ...] float64.
    """
    sigma_t, sigma_s, v = (noise_level(s, x_t).expand(len(x_t)) for s in (sigma_t, sigma_s, v))
    denoised = denoised.double()
    noise = (x_t.double() - denoised) / expand_like(sigma_t, x_t)
    square = (
        noise.flatten(1).square().sum(dim=1).clamp(min=1e-100)
    )  # without noise there is nothing to lengthen, and nothing to divide by
    length = (sigma_s**2 + (1 - sigma_s / sigma_t) ** 2 * v / square).sqrt()
    return denoised + expand_like(torch.where(sigma_s > 0, length, 0), x_t) * noise


def addim_variance(
    denoised: Tensor, sigma_t: Tensor, y: Tensor | None = None, xvar_frac: float = 0.75
) -> Tensor:
    """v of `addim_hop`, [N] float64, for images of d values: xvar_frac |y − D|² from the clean images y, or,
    without them, 0.1 d / (2 + 1/sigma_t²), a tenth of the posterior variance under a Gaussian prior of
    variance 1/2 (Heek et al. 2024, Section 3.2)."""
    if y is not None:
        return xvar_frac * (y.double() - denoised.double()).flatten(1).square().sum(dim=1)
    sigma_t = noise_level(sigma_t, denoised).expand(len(denoised))
    return 0.1 * denoised[0].numel() / (2 + sigma_t**-2)


def check_hop(hop: str | Callable, known: Sequence[str] = HOPS) -> None:
    """Raises ValueError unless `hop` is one of `known`, or a function: see `teacher_hop`."""
    if not callable(hop) and hop not in known:
        raise ValueError(f'hop {hop!r} is not one of {", ".join(known)}')


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
    if hop == 'heun':
        return heun_hop(denoiser, x_t, sigma_t, sigma_s, denoised)
    if hop == 'ddim':
        return ddim_step(x_t, denoised, sigma_t, sigma_s)
    variance = addim_variance(denoised, sigma_t, y if xvar_frac else None, xvar_frac)
    return addim_hop(x_t, denoised, sigma_t, sigma_s, variance)


def above_zero(sigma_s: Tensor, sigma_t: Tensor) -> Tensor:
    """sigma_s where it is positive, and where it is 0 a level in its place, at which arithmetic stays finite:
    sigma_t / 2."""
    return torch.where(sigma_s > 0, sigma_s, sigma_t / 2)


def by_kind(kind: Tensor, terminal: Tensor, snap: Tensor, general: Tensor) -> Tensor:
    """Of three images [N, ...] for each edge, the one of its kind [N]."""
    kind = expand_like(kind, general)
    return torch.where(kind == GENERAL, general, torch.where(kind == SNAP, snap, terminal))


def default_anchor_hops(sigma_b: float) -> int:
    """Sub-steps of the anchored edge. From sigma_max = 80, 4 are exact to 0.03 % down to sigma_b = 10, for
    data of standard deviation 0.5; at sigma_b = 1.5 they would be 6 % off. 32 stay below 0.5 % down to
    sigma_b = 0.5 and below 2 % for a path to 0."""
    return 4 if sigma_b >= 10 else 32


def anchor_nodes(
    sigma_max: float,
    sigma_b: float,
    sigma_min: float,
    rho: float,
    hops: int | None = None,
    spacing: str = 'karras',
) -> Tensor:
    """Noise levels of the teacher's solution from sigma_max to the boundary sigma_b.

    sigma_b > 0: hops + 1 nodes (Karras's, or of another `spacing`) between the two. sigma_b = 0: `hops` nodes
    down to sigma_min, then 0.
    """
    hops = hops or default_anchor_hops(sigma_b)
    if sigma_b > 0:
        return sigma_nodes(hops + 1, sigma_b, sigma_max, rho, spacing)
    return _ending_in_zero(sigma_nodes(hops, sigma_min, sigma_max, rho, spacing))


def solve_ode(
    denoiser: Denoiser, x: Tensor, levels: Sequence[float], denoised: Tensor | None = None
) -> Tensor:
    """Follow the ODE down a list of noise levels by Heun steps; a last step to 0 is Euler's. Returns [N, ...]
    float64.

    `denoised` is D at x, at the first level, where it is known already.
    """
    for sigma_t, sigma_s in itertools.pairwise(levels):
        sigma = torch.full([len(x)], sigma_t, dtype=torch.float64, device=x.device)
        denoised = denoiser(x, sigma).double() if denoised is None else denoised
        x = (
            heun_hop(denoiser, x, sigma, torch.full_like(sigma, sigma_s), denoised)
            if sigma_s > 0
            else denoised
        )
        denoised = None
    return x


def nodes_between(
    sigma_t: Tensor, sigma_b: Tensor, substeps: int, rho: float, sigma_min: float, spacing: str = 'karras'
) -> Tensor:
    """`anchor_nodes` for levels that differ from sample to sample: [substeps+1, N] float64, from sigma_t [N]
    down to sigma_b [N].

    Where sigma_b = 0 the last but one is sigma_min, or sigma_t where that is lower. Does not synchronize with
    the device.
    """
    to_zero = sigma_b == 0
    bottom = torch.where(to_zero, sigma_t.clamp(max=sigma_min), sigma_b)
    ramp = torch.arange(substeps + 1, dtype=torch.float64, device=sigma_t.device)[:, None] / (
        substeps - to_zero.double()
    ).clamp(min=1)
    warp, unwarp = _warp(spacing, rho)
    nodes = unwarp(warp(sigma_t) + ramp.clamp(max=1) * (warp(bottom) - warp(sigma_t))).clamp(bottom, sigma_t)
    nodes = torch.where(ramp < 1, nodes, bottom)
    nodes[0], nodes[-1] = sigma_t, sigma_b
    return nodes


def solve_between(
    denoiser: Denoiser,
    x_t: Tensor,
    sigma_t: Tensor,
    sigma_b: Tensor,
    substeps: int,
    rho: float,
    sigma_min: float,
    spacing: str = 'karras',
) -> Tensor:
    """The teacher's own solution from sigma_t to sigma_b, both [N] float64, by Heun steps over
    `nodes_between`; a last step to 0 is Euler's.

    Samples that end at 0 and others may share a batch: that costs 2 substeps evaluations, one of which those
    that end at 0 ignore.
    Returns: [N, ...] float64.
    """
    x = x_t.double()
    for sigma, lower in itertools.pairwise(
        nodes_between(sigma_t, sigma_b, substeps, rho, sigma_min, spacing)
    ):
        denoised = denoiser(x, sigma).double()
        hopped = heun_hop(denoiser, x, sigma, torch.where(lower > 0, lower, sigma / 2), denoised)
        x = torch.where(expand_like(lower, x) > 0, hopped, denoised)
    return x


# ----------------------------------------------------------------------------
# Losses per image and their weights.

PSEUDO_HUBER_EPS = HUBER_DELTA = 1e-4
DISTANCES = ('pseudo_huber', 'l2_root', 'l2', 'huber')
WEIGHT_MODES = (
    'sqrt_karras',
    'edm',
    'karras',
    'vlike',
    'snr+1',
    'snr',
    'truncated-snr',
    'flat',
    'uniform',
    'sqrt_gap',
)


def image_distance(d: Tensor, kind: str, eps: float = PSEUDO_HUBER_EPS) -> Tensor:
    """Distance of each image's difference `d` [N, ...] from zero, [N]; sums run over all of an image's
    values.

    `pseudo_huber` sqrt(|d|² + eps²) − eps, which is `l2_root` for eps = 0; `l2_root` sqrt(max(|d|², 1e-12));
    `l2` |d|²; `huber` the elementwise Huber function, delta = 1e-4.
    """
    d = d.flatten(1)
    if kind == 'huber':
        return torch.nn.functional.huber_loss(
            d, torch.zeros_like(d), reduction='none', delta=HUBER_DELTA
        ).sum(dim=1)
    square = d.square().sum(dim=1)
    if kind == 'pseudo_huber' and eps > 0:
        return (square + eps**2).sqrt() - eps
    if kind in ('l2_root', 'pseudo_huber'):  # without eps the square root has no slope at 0
        return square.clamp(min=1e-12).sqrt()
    if kind == 'l2':
        return square
    raise ValueError(f'distance {kind!r} is not one of {", ".join(DISTANCES)}')


def edge_weight(sigma_t: Tensor, sigma_s: Tensor, mode: str, sigma_data: float) -> Tensor:
    """Loss weight of edges, in the shape of `sigma_t`.

    `edm` = `karras`: 1/sigma² + 1/sigma_d² (Karras et al. 2022, Table 1); `sqrt_karras`: its square root,
    1/c_out, for losses that grow linearly; `vlike` = `snr+1`: 1/sigma² + 1; `snr`: 1/sigma²; `truncated-snr`:
    max(1/sigma², 1) (Salimans & Ho 2022); `flat` = `uniform`: 1; `sqrt_gap`: sqrt(sigma_t − sigma_s).
    """
    snr = sigma_t**-2
    if mode in ('edm', 'karras'):
        return snr + sigma_data**-2
    if mode == 'sqrt_karras':
        return (snr + sigma_data**-2).sqrt()
    if mode in ('vlike', 'snr+1'):
        return snr + 1
    if mode == 'snr':
        return snr
    if mode == 'truncated-snr':
        return snr.clamp(min=1)
    if mode in ('flat', 'uniform'):
        return torch.ones_like(sigma_t)
    if mode == 'sqrt_gap':
        return (sigma_t - sigma_s).sqrt()
    raise ValueError(f'weight mode {mode!r} is not one of {", ".join(WEIGHT_MODES)}')
