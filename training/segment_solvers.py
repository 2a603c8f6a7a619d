"""The teacher's own solution over a segment, from one noise level per sample to another, by a few steps.

`solvers` steps over one list of levels for all samples; here every sample of a batch has levels of its own,
and nothing synchronizes with the device.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from training.choices import SEGMENT_SOLVERS, check_choice
from training.consistency_ops import Denoiser, above_zero, ddim_step, heun_hop
from training.grids import expand_like, warp_of
from training.multistep_solvers import ADAMS_BASHFORTH


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
        solver: of `solution_path`. Multistep solvers do not lower their order at sigma_b, where the path goes on.
    Returns: [N, ...] float64.
    Raises: ValueError for another solver.
    """
    levels = nodes_between(sigma_t, sigma_b, substeps, rho, sigma_min, spacing)
    # A queue of one forgets the states before.
    return collections.deque(solution_path(denoiser, x_t, levels, solver), maxlen=1).pop()


def solution_path(
    denoiser: Denoiser, x: Tensor, levels: Sequence[Tensor], solver: str = 'heun'
) -> Iterator[Tensor]:
    """Follow the ODE down noise levels that may differ from sample to sample; a step to 0 gives D.

    Args:
        x: [N, ...] states at the first levels.
        levels: [n+1, N] float64.
        solver: `heun`, 2 evaluations a step; `ipndm` of order 4 or `dpmpp` of order 2, one evaluation a step. These
            begin with order 1.
    Yields: [N, ...] float64, the states after each step.
    Raises: ValueError for another solver.
    """
    check_choice('solver', solver, SEGMENT_SOLVERS)
    x = x.double()
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
        yield x


def nodes_between(
    sigma_t: Tensor, sigma_b: Tensor, substeps: int, rho: float, sigma_min: float, spacing: str = 'karras'
) -> Tensor:
    """`grids.anchor_nodes` for levels that differ from sample to sample. Does not synchronize with the device.

    Args:
        sigma_t, sigma_b: [N] float64 upper and lower ends.
    Returns: [substeps+1, N] float64 from sigma_t down to sigma_b. Where sigma_b = 0 the last but one is
        sigma_min, or sigma_t where that is lower.
    """
    # A path to 0 spends its last step below `bottom`, so it has one step fewer above.
    to_zero = sigma_b == 0
    bottom = torch.where(to_zero, sigma_t.clamp(max=sigma_min), sigma_b)
    ramp = torch.arange(substeps + 1, dtype=torch.float64, device=sigma_t.device)[:, None]
    ramp = ramp / (substeps - to_zero.double()).clamp(min=1)

    # Rounding must not carry a node past the ends, which are exact.
    warp, unwarp = warp_of(spacing, rho)
    nodes = unwarp(warp(sigma_t) + ramp.clamp(max=1) * (warp(bottom) - warp(sigma_t))).clamp(bottom, sigma_t)
    nodes = torch.where(ramp < 1, nodes, bottom)
    nodes[0], nodes[-1] = sigma_t, sigma_b
    return nodes


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
