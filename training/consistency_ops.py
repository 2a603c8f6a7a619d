"""The mathematics of multistep consistency models in EDM's noise schedule: grids, segments, edges, hops and their inverses.

Pure functions in FP64, without networks or state. Notation: x_sigma = y + sigma n; the probability-flow ODE is
dx/dsigma = (x − D(x; sigma)) / sigma (Karras et al. 2022, Eq. 1 with s(t) = 1, sigma(t) = t).

A *grid* is a decreasing [n+1] tensor of noise levels that ends in 0; its n *edges* join neighbours. The student's grid has S edges, its
*segments*; the teacher's has about T, each of them inside one segment or cut off at that segment's lower end, its *boundary*.
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]

STUDENT_GRIDS = ('edm', 'full')
SAMPLING_MODES = ('edm', 'vp', 'uniform')
TERMINAL, SNAP, GENERAL = 0, 1, 2  # kinds of edges
KIND_NAMES = ('terminal', 'snap', 'general')
TIE_TOLERANCE = 1e-5  # relative distance at which a teacher level is the same as a student level

#----------------------------------------------------------------------------
# Grids.

def karras_sigmas(n: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """n noise levels from sigma_max down to sigma_min, evenly spaced in sigma^(1/rho) (Karras et al. 2022, Eq. 5).

    Returns: [n] float64; a single node is sigma_max.
    """
    if not 0 < sigma_min <= sigma_max < math.inf:
        raise ValueError(f'0 < sigma_min <= sigma_max < inf does not hold for {sigma_min}, {sigma_max}')
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    ramp = torch.arange(n, dtype=torch.float64) / max(n - 1, 1)
    nodes = (top + ramp * (bottom - top)) ** rho
    nodes[-1], nodes[0] = sigma_min, sigma_max  # exact, so that grids of different lengths share their ends bit for bit
    return nodes


def _ending_in_zero(levels: Tensor) -> Tensor:
    return torch.cat([levels, levels.new_zeros(1)])


def student_grid(S: int, sigma_min: float, sigma_max: float, rho: float, kind: str = 'edm') -> Tensor:
    """The S+1 noise levels of an S-step student, the last one 0.

    `edm`: S Karras nodes, then 0. `full`: S+1 Karras nodes with the last one replaced by 0, so that no evaluation is spent on sigma_min -> 0.
    """
    if S < 1:
        raise ValueError(f'a student takes at least one step, not {S}')
    if kind not in STUDENT_GRIDS:
        raise ValueError(f'student grid {kind!r} is not one of {", ".join(STUDENT_GRIDS)}')
    nodes = karras_sigmas(S if kind == 'edm' else S + 1, sigma_min, sigma_max, rho)
    return _ending_in_zero(nodes[:S])


def teacher_grid(student: Tensor, T: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """Teacher noise levels [T'+1], at least T edges: Karras nodes, then 0, without the interior ones that coincide with a student level.

    A coinciding node is dropped (relative tolerance 1e-5), so that the edge above it crosses the boundary and snaps to it. The first node and
    the last are kept. The raw count is raised until at least T edges remain.
    """
    interior = student[1:-1]
    for raw in range(T, 2 * T + 2 * len(student) + 2):
        nodes = karras_sigmas(raw, sigma_min, sigma_max, rho)
        tied = ((nodes[:, None] - interior).abs() <= TIE_TOLERANCE * interior).any(dim=1)
        tied[0] = tied[-1] = False
        if raw - int(tied.sum()) >= T:
            return _ending_in_zero(nodes[~tied])
    raise AssertionError('every added node coincides with a student level')


def anneal_T(nimg: float, T_start: int, T_end: int, T_anneal_kimg: float) -> int:
    """Teacher edges after `nimg` images: log-linear from T_start to T_end over T_anneal_kimg thousand images
    (Heek et al. 2024, "annealing the teacher steps").

    T_anneal_kimg = 0 means T_end from the start.
    """
    done = 1.0 if T_anneal_kimg <= 0 else min(max(nimg / (1e3 * T_anneal_kimg), 0.0), 1.0)
    return round(math.exp(math.log(T_start) + done * (math.log(T_end) - math.log(T_start))))

#----------------------------------------------------------------------------
# Edges.

@dataclass(frozen=True)
class Edges:
    """The edges of a teacher's grid as columns, [T'] each: upper and lower end, boundary, segment and kind."""

    sigma_t: Tensor
    sigma_s: Tensor
    sigma_b: Tensor
    segment: Tensor  # int64, 0 is the noisiest
    kind: Tensor     # int64: TERMINAL where sigma_s = 0, SNAP where sigma_s = sigma_b > 0, else GENERAL

    def __len__(self) -> int:
        return len(self.sigma_t)


def segment_of(sigma: Tensor, student: Tensor) -> Tensor:
    """Index j of the segment (student[j+1], student[j]] that holds each noise level; int64, shape of `sigma`."""
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


def edge_probabilities(teacher: Tensor, student: Tensor, mode: str, rho: float, terminal_anchor: bool, pin_top: bool = False,
                       P_mean: float = -1.2, P_std: float = 1.2) -> Tensor:
    """Probability of drawing each edge, [T'] float64.

    Modes: `uniform`: segment uniform, then edge uniform within it. `vp`: ∝ sigma^(1−1/rho) / (1 + sigma²).
    `edm`: ∝ sigma^(−1/rho) exp(−(ln sigma − P_mean)² / (2 P_std²)), the training density of Karras et al. 2022, Table 1.
    The last two are densities in sigma times |dsigma/di| on Karras nodes.

    `terminal_anchor` gives the last edge (sigma_min -> 0) exactly 1/T' in those two modes, `pin_top` the first edge likewise; the others share the
    rest in proportion.
    """
    sigma = teacher[:-1]
    edges = len(sigma)
    if mode == 'uniform':
        segment = segment_of(sigma, student)
        counts = torch.bincount(segment, minlength=len(student) - 1)
        return 1 / (counts[segment] * (len(student) - 1)).double()
    if mode == 'vp':
        density = sigma ** (1 - 1 / rho) / (1 + sigma ** 2)
    elif mode == 'edm':
        density = sigma ** (-1 / rho) * torch.exp(-(sigma.log() - P_mean) ** 2 / (2 * P_std ** 2))
    else:
        raise ValueError(f'sampling mode {mode!r} is not one of {", ".join(SAMPLING_MODES)}')
    pinned = torch.zeros(edges, dtype=torch.bool)
    pinned[-1] |= terminal_anchor
    pinned[0] |= pin_top
    if pinned.all():
        return torch.full_like(density, 1 / edges)
    share = 1 - int(pinned.sum()) / edges
    free = torch.where(pinned, 0, density)
    return torch.where(pinned, 1 / edges, free / free.sum() * share)

#----------------------------------------------------------------------------
# Moves between noise levels.

def expand_like(sigma: Tensor, x: Tensor) -> Tensor:
    """[N] or scalar noise levels as float64 that broadcast against images [N, ...]."""
    sigma = torch.as_tensor(sigma, dtype=torch.float64, device=x.device)
    return sigma.reshape(-1, *[1] * (x.ndim - 1))


def ddim_step(x_t: Tensor, denoised: Tensor, sigma_t: Tensor, sigma_s: Tensor) -> Tensor:
    """x_s = D + (sigma_s / sigma_t)(x_t − D): one Euler step of the ODE, DDIM's (Song et al. 2021) in EDM's notation.

    Args:
        x_t, denoised: [N, ...] state and denoiser output at sigma_t.
        sigma_t, sigma_s: [N] noise levels, sigma_t > 0.
    Returns: [N, ...] float64.
    """
    ratio = expand_like(sigma_s, x_t) / expand_like(sigma_t, x_t)
    denoised = denoised.double()
    return denoised + ratio * (x_t.double() - denoised)


def inv_ddim(x_b: Tensor, x_t: Tensor, sigma_t: Tensor, sigma_b: Tensor, check: bool = True) -> Tensor:
    """The denoised image that a DDIM step from `x_t` at `sigma_t` would carry to `x_b` at `sigma_b`.

    Inverse of `ddim_step`: x* = (sigma_t x_b − sigma_b x_t) / (sigma_t − sigma_b)   (Salimans & Ho 2022; Heek et al. 2024, Eq. 7).

    Args:
        x_b, x_t: [N, ...] states at the two noise levels.
        sigma_t, sigma_b: [N] noise levels, sigma_t > sigma_b >= 0.
        check: look at the levels, which synchronises with the device. Training checks its whole table once instead (`check_edges`).
    Returns: [N, ...] float64.
    Raises: ValueError where sigma_t <= sigma_b.
    """
    sigma_t, sigma_b = expand_like(sigma_t, x_t), expand_like(sigma_b, x_t)
    if check and not bool((sigma_t > sigma_b).all()):
        raise ValueError('inv_ddim needs sigma_t > sigma_b')
    return (sigma_t * x_b.double() - sigma_b * x_t.double()) / (sigma_t - sigma_b)


def check_edges(edges: Edges) -> None:
    """Raises ValueError unless sigma_t > sigma_s >= sigma_b >= 0 on every edge and every segment from the first to the last has one."""
    ordered = (edges.sigma_t > edges.sigma_s) & (edges.sigma_s >= edges.sigma_b) & (edges.sigma_b >= 0)
    if not bool(ordered.all()):
        raise ValueError(f'noise levels out of order on edge {int((~ordered).nonzero()[0])}')
    if len(edges.segment.unique()) != int(edges.segment[-1]) + 1:
        raise ValueError('a segment has no edge')


def heun_hop(denoiser: Denoiser, x_t: Tensor, sigma_t: Tensor, sigma_s: Tensor, denoised: Tensor | None = None) -> Tensor:
    """One Heun step of the ODE from sigma_t to sigma_s (Karras et al. 2022, Algorithm 1): local error O((sigma_t − sigma_s)³).

    Args:
        denoiser: D(x, sigma) for x [N, ...] and sigma [N].
        x_t: [N, ...] state at sigma_t.
        sigma_t, sigma_s: [N] noise levels, sigma_t > sigma_s > 0 (a step to 0 has no second slope: use `ddim_step`).
        denoised: D(x_t, sigma_t) where it is known already.
    Returns: [N, ...] float64.
    """
    sigma_t, sigma_s = (torch.as_tensor(s, dtype=torch.float64, device=x_t.device).expand(len(x_t)) for s in (sigma_t, sigma_s))
    x_t = x_t.double()
    if denoised is None:
        denoised = denoiser(x_t, sigma_t)
    x_euler = ddim_step(x_t, denoised, sigma_t, sigma_s)
    slope_t = (x_t - denoised.double()) / expand_like(sigma_t, x_t)
    slope_s = (x_euler - denoiser(x_euler, sigma_s).double()) / expand_like(sigma_s, x_t)
    return x_t + expand_like(sigma_s - sigma_t, x_t) * (slope_t + slope_s) / 2


def default_anchor_hops(sigma_b: float) -> int:
    """Sub-steps of the pinned top edge. From sigma_max = 80, 4 are exact to 0.03 % down to sigma_b = 10, for data of standard deviation 0.5;
    at sigma_b = 1.5 they would be 6 % off. 32 stay below 0.5 % down to sigma_b = 0.5 and below 2 % for a path to 0."""
    return 4 if sigma_b >= 10 else 32


def anchor_nodes(sigma_max: float, sigma_b: float, sigma_min: float, rho: float, hops: int | None = None) -> Tensor:
    """Noise levels of the teacher's solution from sigma_max to the boundary sigma_b.

    sigma_b > 0: hops + 1 Karras nodes between the two. sigma_b = 0: `hops` Karras nodes down to sigma_min, then 0.
    """
    hops = hops or default_anchor_hops(sigma_b)
    if sigma_b > 0:
        return karras_sigmas(hops + 1, sigma_b, sigma_max, rho)
    return _ending_in_zero(karras_sigmas(hops, sigma_min, sigma_max, rho))


def solve_ode(denoiser: Denoiser, x: Tensor, nodes: Tensor) -> Tensor:
    """Follow the ODE down a list of noise levels by Heun steps; a last step to 0 is Euler's. Returns [N, ...] float64."""
    levels = nodes.tolist()
    for sigma_t, sigma_s in itertools.pairwise(levels):
        sigma = torch.full([len(x)], sigma_t, dtype=torch.float64, device=x.device)
        if sigma_s > 0:
            x = heun_hop(denoiser, x, sigma, torch.full_like(sigma, sigma_s))
        else:
            x = denoiser(x, sigma).double()
    return x

#----------------------------------------------------------------------------
# Losses per image and their weights.

PSEUDO_HUBER_EPS = HUBER_DELTA = 1e-4
DISTANCES = ('pseudo_huber', 'l2_root', 'l2', 'huber')
WEIGHT_MODES = ('sqrt_karras', 'edm', 'karras', 'vlike', 'snr+1', 'snr', 'truncated-snr', 'flat', 'uniform', 'sqrt_gap')


def image_distance(d: Tensor, kind: str) -> Tensor:
    """Distance of each image's difference `d` [N, ...] from zero, [N]; sums run over all of an image's values.

    `pseudo_huber` sqrt(|d|² + eps²) − eps; `l2_root` sqrt(max(|d|², 1e-12)); `l2` |d|²; `huber` the elementwise Huber function, delta = 1e-4.
    """
    d = d.flatten(1)
    if kind == 'huber':
        return torch.nn.functional.huber_loss(d, torch.zeros_like(d), reduction='none', delta=HUBER_DELTA).sum(dim=1)
    square = d.square().sum(dim=1)
    if kind == 'pseudo_huber':
        return (square + PSEUDO_HUBER_EPS ** 2).sqrt() - PSEUDO_HUBER_EPS
    if kind == 'l2_root':
        return square.clamp(min=1e-12).sqrt()
    if kind == 'l2':
        return square
    raise ValueError(f'distance {kind!r} is not one of {", ".join(DISTANCES)}')


def edge_weight(sigma_t: Tensor, sigma_s: Tensor, mode: str, sigma_data: float) -> Tensor:
    """Loss weight of edges, in the shape of `sigma_t`.

    `edm` = `karras`: 1/sigma² + 1/sigma_d² (Karras et al. 2022, Table 1); `sqrt_karras`: its square root, 1/c_out, for losses that grow linearly;
    `vlike` = `snr+1`: 1/sigma² + 1; `snr`: 1/sigma²; `truncated-snr`: max(1/sigma², 1) (Salimans & Ho 2022); `flat` = `uniform`: 1;
    `sqrt_gap`: sqrt(sigma_t − sigma_s).
    """
    snr = sigma_t ** -2
    if mode in ('edm', 'karras'):
        return snr + sigma_data ** -2
    if mode == 'sqrt_karras':
        return (snr + sigma_data ** -2).sqrt()
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
