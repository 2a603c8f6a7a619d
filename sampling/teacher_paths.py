"""The search for a solver's noise levels on a network: `schedule_search` with the fine paths of a teacher."""

from __future__ import annotations

import functools
import math
import shlex
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dnnlib import UserError, WrongOptions
from dnnlib.util import named
from sampling import generation, schedule_search
from sampling.label_choosers import choose
from torch_utils import distributed
from training import samplers, solvers
from training.checkpoint import load_network
from training.guidance import describe, guided, model_digest
from training.guidance_options import UNGUIDED, GuidanceOptions
from training.schedules import schedule_sigmas
from training.solvers import ODE_SOLVERS
from training.teacher_samplers import LevelOptions, steps_to_zero, teacher_range


class TeacherPaths:
    """Fine paths of a network from the latents of seeds, of which each process has a share.

    Args:
        net: teacher, on its device.
        sigmas: nodes of the fine grid, decreasing.
        seeds, batch: images, and images per batch and process.
        choose_labels: as for `generation.generate_latents`.
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
        with_errors: bool = True,
    ):
        # Each process computes a share of the batches.
        self.net, self.count, self.choose_labels = net, len(seeds), choose_labels
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
        self.batches = list(generation.split_batches(seeds, batch, rank, world_size))
        self.ends: list[dict[bool, Tensor]] = []  # by whether they are denoised, as by a step to 0

        # Each batch's paths are dropped when they are measured: only their ends are kept.
        errors = torch.zeros(len(sigmas), len(sigmas), dtype=torch.float64, device=distributed.get_device())
        for batch_seeds in distributed.progress(self.batches, desc='Fine paths', unit='batch'):
            denoiser, latents = self._denoiser(batch_seeds)
            path = schedule_search.fine_path(denoiser, latents.double() * sigmas[0], sigmas)
            end = path.states[-1]
            self.ends.append({False: end, True: denoiser(end, sigmas[-1])})
            if with_errors:
                errors += schedule_search.jump_errors(path, sigmas)
        # Means over the images of all processes, so that all choose the same levels.
        self.errors = (distributed.all_reduce_sum(errors) / self.count).tolist() if with_errors else None
        # Gathered, so that all processes fail together.
        finite = all(end.isfinite().all().item() for ends in self.ends for end in ends.values())
        if not all(distributed.gather_objects(finite)):
            raise UserError(
                "The network's paths are not finite (NaN or infinite values): no schedule of it can be "
                'searched.'
            )

    def _denoiser(self, seeds: Sequence[int]) -> tuple[solvers.Denoiser, Tensor]:
        """(D(x, sigma) with the labels of the seeds, their latents)"""
        _, latents, labels = generation.draw_start(self.net, seeds, self.choose_labels)
        denoiser = torch.no_grad()(samplers.denoiser_of(self.net, labels))
        return denoiser, latents

    @torch.no_grad()
    def distance(self, levels: Sequence[float], **sampler) -> float:
        """Mean RMS difference of images by a solver over `levels` from the ends of the paths; the same on all
        processes.

        Args:
            sampler: of `samplers.sample`: solver, order, variant, afs, to_zero.
        """
        total = torch.zeros([], dtype=torch.float64, device=distributed.get_device())
        for seeds, ends in zip(self.batches, self.ends):
            # Latents come again from the seeds, so that only the ends of the paths take memory.
            _, latents, labels = generation.draw_start(self.net, seeds, self.choose_labels)
            images = samplers.sample(self.net, latents, labels, sigmas=list(levels), **sampler)
            total += schedule_search.rms(images - ends[sampler['to_zero']]).sum()
        distance = (distributed.all_reduce_sum(total) / self.count).item()
        # Levels at which the solver diverges are the worst ones, not an error.
        return distance if math.isfinite(distance) else math.inf


class Teacher:
    """A teacher, the nodes of its fine paths, and these paths, which every search shares.

    Args:
        network: its path.
        options: num, seed, batch, nodes, low, high, class_idx, labels, as of search.py.
        guidance: of the teacher.
    Attributes:
        nodes: [n] candidate levels, decreasing.
    Raises: UserError if the network is no teacher, or the options do not fit it.
    """

    def __init__(self, network: str, options, guidance: GuidanceOptions = UNGUIDED):
        with distributed.main_process_first(), named('--network'):
            self.net = load_network(network, distributed.get_device())
        self.network, self.options, self.guidance = network, options, guidance
        metadata = self.net.metadata
        if metadata.get('solver') == 'cm' or 'sigmas' in metadata:
            raise UserError(
                f'Schedules are searched for diffusion models, and {network} is a student or a consistency '
                f'model (objective {metadata.get("objective", "unknown")}), which has its own noise levels.'
            )
        self.net = guided(self.net, network, guidance)
        self.choose_labels = choose(self.net, network, options.class_idx, options.labels)
        low, high = teacher_range(self.net, LevelOptions(sigma_min=options.low, sigma_max=options.high))
        # The ends exactly, without the rounding of roots and powers.
        nodes = schedule_sigmas('polynomial', options.nodes, low, high).tolist()
        # In a smaller range, spacings differ by rounding only.
        if high < 1.1 * low:
            raise WrongOptions(
                f'--low={low:g} and --high={high:g} leave no room for noise levels: widen them'
            )
        self.nodes = [high, *nodes[1:-1], low]

    @functools.cached_property
    def paths(self) -> tuple[TeacherPaths, TeacherPaths]:
        """Those to search with, and those of other seeds to say how good the levels are."""
        o = self.options
        of_seeds = lambda first, with_errors: TeacherPaths(
            self.net, self.nodes, range(first, first + o.num), o.batch, self.choose_labels, with_errors
        )
        return of_seeds(o.seed, True), of_seeds(o.seed + o.num, False)


class ScheduleSearch:
    """The search for the noise levels of a solver with so many steps.

    Args:
        order, variant, afs, to_zero: of the solver; None: its defaults.
    Attributes:
        count: number of levels.
        sampler: arguments of `samplers.sample` besides the levels.
    Raises: UserError if they do not go together, or there is no level to choose.
    """

    def __init__(
        self, teacher: Teacher, solver: str, steps: int, order=None, variant=None, afs=None, to_zero=None
    ):
        self.teacher, self.solver, self.steps = teacher, solver, steps
        chosen, afs = ODE_SOLVERS[solver], bool(afs)
        settings, to_zero = solvers.check_choices(solver, order, variant), steps_to_zero(solver, to_zero)
        self.sampler = dict(solver=solver, **settings, afs=afs, to_zero=to_zero)
        self.nfe, self.count = chosen.nfe(steps, afs, to_zero), chosen.levels(steps, afs, to_zero)
        # The first and the last level are given; those between are searched.
        if self.count < 3:
            raise WrongOptions(
                f'{steps} steps of {solver} have {self.count} noise levels, both given: take more --steps'
            )
        if self.count > len(teacher.nodes):
            raise WrongOptions(
                f'--nodes={len(teacher.nodes)} are fewer than {self.count} noise levels: take more'
            )
        generation.validate_arguments(teacher.net, sigmas=teacher.nodes, **self.sampler)

    def plan(self) -> dict:
        """The search as --dry-run prints it."""
        nodes = self.teacher.nodes
        return dict(
            network=self.teacher.network,
            **self.sampler,
            nfe=self.nfe,
            levels=self.count,
            first=nodes[0],
            last=nodes[-1],
            nodes=len(nodes),
            images=self.teacher.options.num,
        )

    def record(self) -> dict:
        """What files of levels remember, `level_list.RECORD`."""
        net = self.teacher.net
        return dict(network=model_digest(net), **self.sampler, nfe=self.nfe)

    def as_options(self, sigmas: Sequence[float]) -> str:
        """Options of generate.py and fid.py for these levels."""
        words = [f'--{name}={value}' for name, value in self.sampler.items() if type(value) is not bool]
        words += [f'--{name}' for name, value in self.sampler.items() if value is True]
        # Named only where it differs from the default of the solver.
        if not self.sampler['to_zero'] and ODE_SOLVERS[self.solver].to_zero:
            words.append('--no_to_zero')
        words += map(shlex.quote, self.teacher.guidance.words())
        return ' '.join([*words, f'--sigmas={",".join(map(repr, sigmas))}'])

    def run(self, log: Callable[[str], None]) -> dict:
        """The results, as --json writes them, with progress by `log`."""
        (own, others), nodes = self.teacher.paths, self.teacher.nodes
        log(
            f'{self.count} of {len(nodes)} noise levels from {nodes[0]:g} to {nodes[-1]:g} for '
            f'{describe(self.teacher.net, steps=self.steps, **self.sampler)}, by {own.count} images.'
        )
        usual, best = schedule_search.search(
            own.errors,
            nodes,
            self.count,
            lambda levels: own.distance(levels, **self.sampler),
            lambda found: log(f'{found.error:.5f}: {found.source}: {listed(found.sigmas)}'),
        )

        # On images that the search has not seen.
        held_out = {found.source: others.distance(found.sigmas, **self.sampler) for found in (usual, best)}
        log(
            f'On {others.count} other images: {held_out[best.source]:.5f} ({best.source}); the best of the '
            f'usual schedules, {usual.source}, {held_out[usual.source]:.5f}.'
        )
        if best.source == usual.source:
            log('Warning: no schedule is better than the usual ones. More --nodes may find one.')
        return dict(
            self.record(),
            sigmas=best.sigmas,
            source=best.source,
            distance=held_out[best.source],
            usual=usual.source,
            usual_distance=held_out[usual.source],
            num_images=own.count,
        )


def listed(sigmas: Sequence[float]) -> str:
    return ', '.join(f'{sigma:.4g}' for sigma in sigmas)
