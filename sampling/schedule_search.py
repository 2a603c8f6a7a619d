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

from dnnlib import UserError, WrongOptions
from sampling import generation
from sampling.label_choosers import choose
from torch_utils import distributed
from training import consistency_ops as ops
from training import samplers, solvers
from training.checkpoint import load_network, network_digest
from training.schedules import SCHEDULES, schedule_sigmas
from training.solvers import ODE_SOLVERS
from training.teacher_samplers import LevelOptions, steps_to_zero, teacher_range

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


# ----------------------------------------------------------------------------
# The paths of a network.


class TeacherPaths:
    """Fine paths of a network from the latents of seeds, of which each process has a share.

    Args:
        net: teacher, on its device.
        sigmas: nodes of the fine grid, decreasing.
        seeds, batch: images, and images per batch and process.
        choose_labels: as for `generation.generate_latents`.
        to_zero: the solver's images are denoised at the last level, and so are those of the paths.
        with_errors: also measure `jump_errors`.
    Attributes:
        errors: [n][n] mean error of every jump; None without `with_errors`.
    Raises: UserError if a path is not finite.
    """

    def __init__(
        self,
        net,
        sigmas: Sequence[float],
        seeds: Sequence[int],
        batch: int,
        choose_labels: generation.LabelChooser | None = None,
        to_zero: bool = False,
        with_errors: bool = True,
    ):
        self.net, self.count, self.choose_labels = net, len(seeds), choose_labels
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
        self.batches = list(generation.split_batches(seeds, batch, rank, world_size))
        self.ends: list[Tensor] = []

        # Each batch's paths are dropped when they are measured: only their ends are kept.
        errors = torch.zeros(len(sigmas), len(sigmas), dtype=torch.float64, device=distributed.get_device())
        for batch_seeds in distributed.progress(self.batches, desc='Fine paths', unit='batch'):
            path = self._fine_path(batch_seeds, sigmas)
            end = path.states[-1]
            self.ends.append(self._denoiser(batch_seeds)[0](end, sigmas[-1]) if to_zero else end)
            if with_errors:
                errors += jump_errors(path, sigmas)
        self.errors = (distributed.all_reduce_sum(errors) / self.count).tolist() if with_errors else None
        finite = all(end.isfinite().all().item() for end in self.ends)
        if not all(distributed.gather_objects(finite)):
            raise UserError(
                "The network's paths are not finite (NaN or infinite values): no schedule of it can be searched."
            )

    @torch.no_grad()
    def _fine_path(self, seeds: Sequence[int], sigmas: Sequence[float]) -> FinePath:
        denoiser, latents = self._denoiser(seeds)
        return fine_path(denoiser, latents.double() * sigmas[0], sigmas)

    def _denoiser(self, seeds: Sequence[int]) -> tuple[solvers.Denoiser, Tensor]:
        """(D(x, sigma) with the labels of the seeds, their latents)"""
        _, latents, labels = generation.draw_start(self.net, seeds, self.choose_labels)
        denoiser = torch.no_grad()(lambda x, sigma: self.net(x, ops.noise_level(sigma, x), labels).double())
        return denoiser, latents

    @torch.no_grad()
    def distance(self, levels: Sequence[float], **sampler) -> float:
        """Mean RMS difference of images by a solver over `levels` from the ends of the paths; the same on all
        processes.

        Args:
            sampler: of `samplers.sample`: solver, order, variant, afs, to_zero.
        """
        total = torch.zeros([], dtype=torch.float64, device=distributed.get_device())
        for seeds, end in zip(self.batches, self.ends):
            _, latents, labels = generation.draw_start(self.net, seeds, self.choose_labels)
            images = samplers.sample(self.net, latents, labels, sigmas=list(levels), **sampler)
            total += rms(images - end).sum()
        distance = (distributed.all_reduce_sum(total) / self.count).item()
        return distance if math.isfinite(distance) else math.inf


class Teacher:
    """A teacher, a solver with its options, and the search for the solver's noise levels.

    Args:
        network: its path.
        options: steps, num, seed, batch, nodes, low, high, class_idx, labels, order, variant, afs, to_zero, as
            of search.py.
    Raises: UserError if the network is no teacher, or the options do not fit it.
    """

    def __init__(self, network: str, solver: str, options):
        with distributed.main_process_first():
            self.net = load_network(network, distributed.get_device())
        self.network, self.solver, self.options = network, solver, options
        metadata = self.net.metadata
        if metadata.get('solver') == 'cm' or 'sigmas' in metadata:
            raise UserError(
                f'Schedules are searched for diffusion models, and {network} is a student or a consistency '
                f'model (objective {metadata.get("objective", "unknown")}), which has its own noise levels.'
            )
        self.choose_labels = choose(self.net, network, options.class_idx, options.labels)

        # The solver, whose defaults may depend on it, and its number of levels.
        chosen = ODE_SOLVERS[solver]
        settings = solvers.check_choices(solver, options.order, options.variant)
        to_zero = steps_to_zero(solver, options.to_zero)
        self.sampler = dict(solver=solver, **settings, afs=bool(options.afs), to_zero=to_zero)
        self.nfe = chosen.nfe(options.steps, bool(options.afs), to_zero)
        self.count = chosen.levels(options.steps, bool(options.afs), to_zero)
        if self.count < 3:
            raise WrongOptions(
                f'{options.steps} steps of {solver} have {self.count} noise levels, both given: take more --steps'
            )
        if self.count > options.nodes:
            raise WrongOptions(f'--nodes={options.nodes} are fewer than {self.count} noise levels: take more')

        # Candidates.
        low, high = teacher_range(self.net, LevelOptions(sigma_min=options.low, sigma_max=options.high))
        nodes = schedule_sigmas('polynomial', options.nodes, low, high).tolist()
        self.nodes = [high, *nodes[1:-1], low]
        generation.validate_arguments(self.net, sigmas=self.nodes, **self.sampler)

    def plan(self) -> dict:
        """The search as --dry-run prints it."""
        return dict(
            network=self.network,
            **self.sampler,
            nfe=self.nfe,
            levels=self.count,
            first=self.nodes[0],
            last=self.nodes[-1],
            nodes=len(self.nodes),
            images=self.options.num,
        )

    def record(self) -> dict:
        """What files of levels remember, `level_list.RECORD`."""
        return dict(network=network_digest(self.net, self.net.metadata), **self.sampler, nfe=self.nfe)

    def as_options(self, sigmas: Sequence[float]) -> str:
        """Options of generate.py and fid.py for these levels."""
        words = [f'--{name}={value}' for name, value in self.sampler.items() if type(value) is not bool]
        words += [f'--{name}' for name, value in self.sampler.items() if value is True]
        if not self.sampler['to_zero'] and ODE_SOLVERS[self.solver].to_zero:
            words.append('--no_to_zero')
        return ' '.join([*words, f'--sigmas={",".join(map(repr, sigmas))}'])

    def search(self, log: Callable[[str], None]) -> dict:
        """The results, as --json writes them, with progress by `log`."""
        o = self.options
        paths = lambda first, with_errors: TeacherPaths(
            self.net,
            self.nodes,
            range(first, first + o.num),
            o.batch,
            self.choose_labels,
            self.sampler['to_zero'],
            with_errors,
        )
        log(
            f'{self.count} of {len(self.nodes)} noise levels from {self.nodes[0]:g} to {self.nodes[-1]:g} for '
            f'{samplers.describe(steps=o.steps, **self.sampler)}, by {o.num} images.'
        )
        own, others = paths(o.seed, True), paths(o.seed + o.num, False)
        usual, best = search(
            own.errors,
            self.nodes,
            self.count,
            lambda levels: own.distance(levels, **self.sampler),
            lambda found: log(f'{found.error:.5f}: {found.source}: {listed(found.sigmas)}'),
        )

        # On images that the search has not seen.
        held_out = {found.source: others.distance(found.sigmas, **self.sampler) for found in (usual, best)}
        log(
            f'On {o.num} other images: {held_out[best.source]:.5f} ({best.source}); the best of the usual '
            f'schedules, {usual.source}, {held_out[usual.source]:.5f}.'
        )
        if best.source == usual.source:
            log(
                'Warning: no schedule was found that is better than the usual ones. More --nodes may find one.'
            )
        return dict(
            self.record(),
            sigmas=best.sigmas,
            source=best.source,
            distance=held_out[best.source],
            usual=usual.source,
            usual_distance=held_out[usual.source],
            num_images=o.num,
        )


def listed(sigmas: Sequence[float]) -> str:
    return ', '.join(f'{sigma:.4g}' for sigma in sigmas)
