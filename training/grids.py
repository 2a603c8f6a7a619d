"""Noise levels of multistep consistency models: the grids of student and teacher, and the edges on them.

A *grid* is a decreasing [n+1] tensor of noise levels that ends in 0; its n *edges* join neighbors. The
student's grid has S edges, its *segments*; the teacher's has about T, each of them inside one segment or cut
off at that segment's lower end, its *boundary*. Training computes both once per stage, on the host.

Pure functions in FP64. Imports nothing of ours but names; `consistency_ops` re-exports all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from training.choices import SAMPLING_MODES, SIGMA_GRIDS, STUDENT_GRIDS, check_choice

TERMINAL, SNAP, GENERAL = 0, 1, 2  # kinds of edges
KIND_NAMES = ('terminal', 'snap', 'general')
TIE_TOLERANCE = 1e-5  # relative distance at which a teacher level is the same as a student level

# ----------------------------------------------------------------------------
# Noise levels beside images.


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


# ----------------------------------------------------------------------------
# Grids.


def warp_of(spacing: str, rho: float) -> tuple[Callable, Callable]:
    """The coordinate in which a grid's nodes are evenly spaced, as a function of sigma, and its inverse.

    `karras`: sigma^(1/rho) (Karras et al. 2022, Eq. 5). `cosine`: atan sigma, which is pi u / 2 for the
    variance-preserving cosine schedule alpha = cos(pi u / 2), sigma = tan(pi u / 2) (Salimans & Ho 2022; Heek
    et al. 2024, Appendix A).

    Raises: ValueError for another spacing.
    """
    check_choice('sigma grid', spacing, SIGMA_GRIDS)
    if spacing == 'karras':
        return lambda sigma: sigma ** (1 / rho), lambda u: u**rho
    # In float64 also where sigma is a Python number.
    return lambda sigma: torch.as_tensor(sigma, dtype=torch.float64).atan(), torch.tan


def sigma_nodes(n: int, sigma_min: float, sigma_max: float, rho: float, spacing: str = 'karras') -> Tensor:
    """n noise levels from sigma_max down to sigma_min, evenly spaced as `spacing` says (see `warp_of`).

    Args:
        rho: exponent of `karras`; `cosine` does not use it.
    Returns: [n] float64; a single node is sigma_max.
    Raises: ValueError unless 0 < sigma_min <= sigma_max < inf.
    """
    if not 0 < sigma_min <= sigma_max < math.inf:
        raise ValueError(f'0 < sigma_min <= sigma_max < inf does not hold for {sigma_min}, {sigma_max}')
    warp, unwarp = warp_of(spacing, rho)
    top, bottom = warp(sigma_max), warp(sigma_min)
    # Evenly spaced in the warped coordinate.
    ramp = torch.arange(n, dtype=torch.float64) / max(n - 1, 1)
    nodes = unwarp(top + ramp * (bottom - top))

    # The ends are exact, so that grids of different lengths share them bit for bit.
    nodes[-1], nodes[0] = sigma_min, sigma_max
    return nodes


def level_at(
    share: Tensor, sigma_min: float, sigma_max: float, rho: float, spacing: str = 'karras'
) -> Tensor:
    """The levels at a share of the way from sigma_min to sigma_max, in the shape of `share`, float64."""
    low, high = (torch.full_like(share, sigma) for sigma in (sigma_min, sigma_max))
    return level_between(low, high, share, sigma_min, rho, spacing)


def level_between(
    low: Tensor, high: Tensor, share: Tensor, sigma_min: float, rho: float, spacing: str = 'karras'
) -> Tensor:
    """The levels at a share of the way from `low`, but at least sigma_min, to `high`, where grids are even; all [N]."""
    warp, unwarp = warp_of(spacing, rho)
    return unwarp(torch.lerp(warp(low.clamp(min=sigma_min)), warp(high), share))


def karras_sigmas(n: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """n noise levels from sigma_max down to sigma_min, evenly spaced in sigma^(1/rho).

    sigma_i = (sigma_max^(1/rho) + i/(n−1) (sigma_min^(1/rho) − sigma_max^(1/rho)))^rho   (Karras et al. 2022,
    Eq. 5).

    Returns: [n] float64; a single node is sigma_max.
    """
    return sigma_nodes(n, sigma_min, sigma_max, rho)


def ending_in_zero(levels: Tensor) -> Tensor:
    """[n+1]: `levels` [n], then 0."""
    return torch.cat([levels, levels.new_zeros(1)])


def student_grid(
    S: int, sigma_min: float, sigma_max: float, rho: float, kind: str = 'edm', spacing: str = 'karras'
) -> Tensor:
    """The noise levels of an S-step student, the last one 0.

    `edm`: S nodes (Karras's, or of another `spacing`), then 0. `full`: S+1 nodes with the last one replaced
    by 0, so that no evaluation is spent on sigma_min -> 0.

    Returns: [S+1] float64.
    Raises: ValueError for S < 1, or another kind or spacing.
    """
    if S < 1:
        raise ValueError(f'a student takes at least one step, not {S}')
    check_choice('student grid', kind, STUDENT_GRIDS)
    nodes = sigma_nodes(S if kind == 'edm' else S + 1, sigma_min, sigma_max, rho, spacing)
    return ending_in_zero(nodes[:S])


def teacher_grid(
    student: Tensor,
    T: int,
    sigma_min: float,
    sigma_max: float,
    rho: float,
    spacing: str = 'karras',
    keep_ties: bool = False,
) -> Tensor:
    """The teacher's noise levels, at least T edges: nodes of a `spacing`, then 0, without the interior ones
    that coincide with a student level.

    A coinciding node is dropped (relative tolerance 1e-5), so that the edge above it crosses the boundary and
    snaps to it. The first node and the last are kept. The raw count is raised until at least T edges remain.

    `keep_ties` keeps such nodes, as the student's very numbers: each starts the first edge of the segment
    below it, and the student is trained at the noise levels that sampling uses. That holds at every T,
    because the raw count is raised until every student level is a node.

    Args:
        student: [S+1] the student's grid.
    Returns: [T'+1] float64, T' >= T (with `keep_ties` about T).
    Raises: ValueError where no count does that (a student grid of another range or spacing).
    """
    for raw in range(T, 2 * T + 2 * len(student) + 2):
        # Another count moves all the nodes, and may make others coincide, so counts are tried in turn.
        # Which nodes are student levels.
        nodes = sigma_nodes(raw, sigma_min, sigma_max, rho, spacing)
        level = student[(nodes[:, None] - student).abs().argmin(dim=1)]
        tied = (nodes - level).abs() <= TIE_TOLERANCE * level

        # Keep them all, or drop them, once the count of nodes allows it.
        if keep_ties and torch.isin(student[:-1], level[tied]).all():
            return ending_in_zero(torch.where(tied, level, nodes))
        tied[0] = tied[-1] = False
        if not keep_ties and raw - int(tied.sum()) >= T:
            return ending_in_zero(nodes[~tied])
    raise ValueError(f'no teacher grid of about {T} edges suits the student levels {student.tolist()}')


# ----------------------------------------------------------------------------
# Edges.


@dataclass(frozen=True)
class Edges:
    """The edges of a teacher's grid as columns, [T'] each."""

    sigma_t: Tensor  # upper end
    sigma_s: Tensor  # lower end
    sigma_b: Tensor  # boundary
    segment: Tensor  # int64, 0 is the noisiest
    kind: Tensor  # int64: TERMINAL where sigma_s = 0, SNAP where sigma_s = sigma_b > 0, else GENERAL

    def __len__(self) -> int:
        return len(self.sigma_t)


def segment_of(sigma: Tensor, student: Tensor) -> Tensor:
    """Index j of the segment (student[j+1], student[j]] that holds each noise level; int64, shape of
    `sigma`."""
    # On an increasing list, right=False assigns a level to the segment that it tops, not to the one above.
    levels = student.flip(0).contiguous()
    return len(student) - 1 - torch.searchsorted(levels, sigma.contiguous(), right=False)


def segment_bounds(teacher: Tensor, student: Tensor) -> Tensor:
    """[S, 2] int64: the first and the last edge of each segment, both included."""
    counts = torch.bincount(segment_of(teacher[:-1], student), minlength=len(student) - 1)
    # Edges are in order of segments, so each segment is a range of them.
    ends = counts.cumsum(0)
    return torch.stack([ends - counts, ends - 1], dim=1)


def edge_table(teacher: Tensor, student: Tensor) -> Edges:
    """The edges of a teacher's grid [T'+1] on a student's [S+1], with their boundaries and kinds."""
    sigma_t = teacher[:-1]
    segment = segment_of(sigma_t, student)
    sigma_b = student[segment + 1]
    # An edge that would cross the boundary of its segment ends there.
    sigma_s = torch.maximum(teacher[1:], sigma_b)
    kind = torch.where(sigma_s > sigma_b, GENERAL, torch.where(sigma_s > 0, SNAP, TERMINAL))
    return Edges(sigma_t, sigma_s, sigma_b, segment, kind)


def check_edges(edges: Edges) -> None:
    """Raises: ValueError unless sigma_t > sigma_s >= sigma_b >= 0 on every edge and every segment from the
    first to the last has one."""
    ordered = (edges.sigma_t > edges.sigma_s) & (edges.sigma_s >= edges.sigma_b) & (edges.sigma_b >= 0)
    # Names the first edge at fault.
    if not bool(ordered.all()):
        raise ValueError(f'noise levels out of order on edge {int((~ordered).nonzero()[0])}')
    if len(edges.segment.unique()) != int(edges.segment[-1]) + 1:
        raise ValueError('a segment has no edge')


def edge_density(
    sigma: Tensor, mode: str, rho: float, spacing: str = 'karras', P_mean: float = -1.2, P_std: float = 1.2
) -> Tensor:
    """How often edges at `sigma` should be drawn, up to a common factor: a density in sigma times |dsigma/di|
    on the grid's nodes.

    Densities: `vp` 1 / (1 + sigma²), which is uniform in the cosine schedule's time; `edm` exp(−(ln sigma −
    P_mean)² / (2 P_std²)) / sigma, the training distribution of Karras et al. 2022, Table 1. |dsigma/di| is ∝
    sigma^(1−1/rho) on Karras nodes and ∝ 1 + sigma² on cosine ones.

    Returns: float64 in the shape of `sigma`.
    Raises: ValueError for another mode.
    """
    # |dsigma/di|, up to a factor.
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
    """Probability of drawing each edge.

    Args:
        teacher, student: [T'+1] and [S+1] grids.
        mode: `uniform`: segment uniform, then edge uniform within it; `vp`, `edm`: see `edge_density`.
        terminal_anchor: in `vp` and `edm`, hold the last edge (sigma_min -> 0) at exactly 1/T'; the others
            share the rest in proportion.
        pin_top: hold the first edge at 1/T' too.
        top_mass: share of the first edges of the S segments together, in equal parts, because sampling
            evaluates the student once at each of them (their upper ends are the student's levels on a teacher
            grid with `keep_ties`). A part takes the place of a held 1/T'; if the last edge is not the
            first of a segment, its 1/T' is limited to what top_mass leaves. If no other edge is left, the
            parts are scaled to sum to one.
    Returns: [T'] float64.
    Raises: ValueError for another mode or share.
    """
    if not 0 <= top_mass <= 1:
        raise ValueError(f'top_mass must be in [0, 1], got {top_mass}')
    edges, S = len(teacher) - 1, len(student) - 1

    # Weights of edges by mode, and which edges are held at a probability of their own.
    held = torch.zeros(edges, dtype=torch.bool)
    if mode == 'uniform':
        segment = segment_of(teacher[:-1], student)
        weight = 1 / (torch.bincount(segment, minlength=S)[segment] * S).double()
    else:
        weight = edge_density(teacher[:-1], mode, rho, spacing, P_mean, P_std)
        held[-1] |= terminal_anchor
        held[0] |= pin_top
    fixed = held.double() / edges

    # The first edges of segments.
    if top_mass:
        tops = segment_bounds(teacher, student)[:, 0]
        fixed = fixed.clamp(max=1 - top_mass)
        fixed[tops], held[tops] = top_mass / S, True

    # The other edges share the rest.
    if held.all():
        return fixed / fixed.sum()
    free = torch.where(held, 0, weight)
    # Rounding may carry the sum of the held ones past 1, hence the clamp.
    return torch.where(held, fixed, free / free.sum() * (1 - fixed.sum()).clamp(min=0))


# ----------------------------------------------------------------------------
# Nodes of a teacher's own solution down to a boundary.


def default_anchor_hops(sigma_b: float) -> int:
    """Heun steps from sigma_max to the boundary sigma_b of the anchored edge.

    From sigma_max = 80, 4 are exact to 0.03 % down to sigma_b = 10, for data of standard deviation 0.5; at
    sigma_b = 1.5 they would be 6 % off. 32 stay below 0.5 % down to sigma_b = 0.5 and below 2 % for a path to
    0.
    """
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

    Args:
        hops: None: `default_anchor_hops`.
    Returns: [hops+1] float64.
    """
    hops = hops or default_anchor_hops(sigma_b)
    if sigma_b > 0:
        return sigma_nodes(hops + 1, sigma_b, sigma_max, rho, spacing)
    return ending_in_zero(sigma_nodes(hops, sigma_min, sigma_max, rho, spacing))
