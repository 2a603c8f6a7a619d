"""Search for the noise levels of a solver with few steps, by the paths that a teacher takes with many.

All of a teacher's paths bend at about the same noise levels, so levels that suit some suit others (Chen et
al. 2024, GITS). Candidates are the nodes of a fine grid:

    errors     e_ij, the distance from the fine path at node j after one Euler step along it from node i
    a path     from sigma_max to sigma_min over K jumps, whose discounted sum of errors is least, by dynamic
               programming, for each of several discounts
    the best   of these paths and of the usual schedules, by the distance of the solver's images from those
               of the fine path; then neighboring levels are moved while that distance falls

The first two are of Chen et al.; comparing the images of the very solver is ours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from training import solvers
from training.schedules import SCHEDULES, schedule_sigmas

# Weights of all later errors, for each jump: an early error is multiplied by what follows, or shrinks.
DISCOUNTS = (0.8, 0.9, 1.0, 1.05, 1.1, 1.15, 1.2, 1.3)
MOVES = (-4, -2, -1, 1, 2, 4)  # of levels, in nodes of the fine grid

# ----------------------------------------------------------------------------
# Paths.


def rms(difference: Tensor) -> Tensor:
    """[...] root mean square of images [..., C, H, W]."""
    return difference.square().mean(dim=(-3, -2, -1)).sqrt()


class FinePath(NamedTuple):
    """The teacher's own solution, by a Heun step from node to node.

    Attributes:
        states: [n, N, C, H, W] float64, at every node.
        slopes: [n−1, N, C, H, W] float64, (x − D) / sigma at every node but the last.
    """

    states: Tensor
    slopes: Tensor


def fine_path(denoiser: solvers.Denoiser, x: Tensor, sigmas: Sequence[float]) -> FinePath:
    """The path from x [N, C, H, W] at sigmas[0] over all nodes, 2(n − 1) evaluations."""
    states, slopes = [x], []
    for sigma, lower in itertools.pairwise(sigmas):
        # Heun's step, of which the first slope is kept.
        slopes.append(solvers.ode_slope(denoiser, x, sigma))
        second = solvers.ode_slope(denoiser, x + (lower - sigma) * slopes[-1], lower)
        x = x + (lower - sigma) / 2 * (slopes[-1] + second)
        states.append(x)
    return FinePath(torch.stack(states), torch.stack(slopes))


def jump_errors(path: FinePath, sigmas: Sequence[float]) -> Tensor:
    """[n, n] float64: the sum over images of the RMS error of an Euler step from node i to node j; infinite for
    j <= i.

    e_ij = |x_i + (sigma_j − sigma_i) d_i − x_j|
    """
    levels = torch.tensor(sigmas, dtype=torch.float64, device=path.states.device)
    errors = torch.full((len(levels), len(levels)), math.inf, dtype=torch.float64, device=levels.device)
    # All jumps from a node at once; they take no evaluation of the network.
    for i, slope in enumerate(path.slopes):
        steps = (levels[i + 1 :] - levels[i]).reshape(-1, 1, 1, 1, 1)
        errors[i, i + 1 :] = rms(path.states[i] + steps * slope - path.states[i + 1 :]).sum(dim=1)
    return errors


def cheapest_path(errors: Sequence[Sequence[float]], jumps: int, discount: float = 1.0) -> list[int]:
    """The nodes [jumps+1] of the path from the first to the last with the least sum_k discount^k e_k, e_k the
    error of jump k; by dynamic programming from the end.

    Raises: ValueError if there are fewer nodes than the path has.
    """
    end = len(errors) - 1
    if not 1 <= jumps <= end:
        raise ValueError(f'a path of {jumps} jumps over {end + 1} nodes')

    # cost[i]: of the cheapest path of k jumps from node i to the end; following[k][i]: its next node.
    cost, following = [math.inf] * end + [0.0], []
    for _ in range(jumps):
        nearest = [
            min(
                ((errors[i][j] + discount * cost[j], j) for j in range(i + 1, end + 1)),
                default=(math.inf, end),
            )
            for i in range(end + 1)
        ]
        cost = [value for value, _ in nearest]
        following.append([j for _, j in nearest])

    # Follow the next nodes from the first one on.
    nodes = [0]
    for step in reversed(following):
        nodes.append(step[nodes[-1]])
    return nodes


# ----------------------------------------------------------------------------
# The search.


class Found(NamedTuple):
    """A schedule and how far its images are from those of the fine path, RMS in the images' units."""

    error: float
    sigmas: list[float]
    source: str


def search(
    errors: Sequence[Sequence[float]],
    sigmas: Sequence[float],
    count: int,
    error_of: Callable[[list[float]], float],
    report: Callable[[Found], None] = lambda found: None,
) -> tuple[Found, Found]:
    """(the best of the usual schedules, the best schedule) of `count` levels from sigmas[0] to sigmas[-1].

    Args:
        errors: `jump_errors` between the nodes `sigmas`.
        error_of: the distance of the solver's images over a list of levels; called once for each list.
        report: called with every schedule before levels move, and with every better one after.
    Raises: ValueError if there are fewer nodes than levels.
    """
    # Each measurement samples all images, so none is repeated.
    known: dict[tuple[float, ...], float] = {}

    def measured(levels: list[float], source: str) -> Found:
        if tuple(levels) not in known:
            known[tuple(levels)] = error_of(levels)
        return Found(known[tuple(levels)], levels, source)

    # The usual schedules, the nodes nearest to them, and one path for each discount.
    usual, paths = [], []
    for name in SCHEDULES:
        levels = schedule_sigmas(name, count, sigmas[-1], sigmas[0]).tolist()
        usual.append(measured([sigmas[0], *levels[1:-1], sigmas[-1]], name))
        report(usual[-1])
        if nodes := nearest_nodes(levels, sigmas):
            paths.append((measured([sigmas[i] for i in nodes], f'{name}, on nodes'), nodes))
    for discount in DISCOUNTS:
        nodes = cheapest_path(errors, count - 1, discount)
        paths.append((measured([sigmas[i] for i in nodes], f'path, discount {discount:g}'), nodes))
        report(paths[-1][0])

    # Move levels of the best of them while that helps.
    best, nodes = min(paths, key=lambda path: path[0].error)
    moved = True
    while moved:
        moved = False
        for neighbor in neighbors(nodes):
            found = measured([sigmas[i] for i in neighbor], 'moved')
            if found.error < best.error:
                best, nodes, moved = found, neighbor, True
                report(best)
                break  # the neighbors are those of the new path
    # The usual schedules lie between nodes, and may be better than what moves reach.
    least = min(usual, key=lambda found: found.error)
    return least, min(best, least, key=lambda found: found.error)


def nearest_nodes(levels: Sequence[float], sigmas: Sequence[float]) -> list[int] | None:
    """The nodes nearest to levels in ln sigma, the ends among them; None if two levels have the same."""
    logs = [math.log(sigma) for sigma in sigmas]
    nodes = [min(range(len(logs)), key=lambda i: abs(logs[i] - math.log(level))) for level in levels]
    nodes = [0, *nodes[1:-1], len(sigmas) - 1]
    return nodes if all(a < b for a, b in itertools.pairwise(nodes)) else None


def neighbors(nodes: Sequence[int]) -> Iterator[list[int]]:
    """Paths with one inner node, or several that follow one another, moved by one of MOVES together; single ones
    first."""
    for width in range(1, len(nodes) - 1):
        for k, move in itertools.product(range(1, len(nodes) - width), MOVES):
            moved = (i + move for i in nodes[k : k + width])
            path = [*nodes[:k], *moved, *nodes[k + width :]]
            if all(i < j for i, j in itertools.pairwise(path)):
                yield path
