"""Time points of a consistency model by a metric of its images: candidates, evaluation, and the search for
the best of them (Song et al. 2023)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from dnnlib import UserError
from dnnlib.downloads import file_sha256, local_path
from dnnlib.util import named
from metrics import evaluation
from metrics.generated import GeneratedImages
from metrics.images import open_images
from metrics.measures import Comparison
from metrics.uncertainty import check_enough_to_extrapolate
from sampling import time_search
from sampling.label_choosers import choose
from sampling.options import sampling_arguments
from torch_utils import distributed
from training import samplers
from training.checkpoint import load_network, save_snapshot


def load_consistency_model(network: str, solver: str | None):
    """Load a network.

    Raises: UserError unless its snapshot, or `solver`, says that it is a consistency model.
    """
    with distributed.main_process_first(), named('--network'):
        net = load_network(network, distributed.get_device())
    # The output of a student of one step is an image too.
    steps, objective = len(net.metadata.get('sigmas', ())) - 1, net.metadata.get('objective', 'unknown')
    if solver is None and net.metadata.get('solver') != 'cm' and steps != 1:
        problem = (
            f'is a student of {steps} steps: its noise levels are those it was trained for'
            if steps > 0
            else f'does not say that it is one (objective {objective}): if it is, add --solver=cm; '
            'a diffusion model becomes one by train.py --objective=ect'
        )
        raise UserError(
            f'Time points are searched for consistency models, whose every output is an image, and '
            f'{network} {problem}.'
        )
    return net


@dataclass
class Sampler:
    """Images of a network at given time points, always from the same seeds, so that a metric of them depends
    on the points only, and varies smoothly with them."""

    net: object
    network: str
    class_idx: int | None
    labels: str | None = None
    clip_denoised: bool | None = None

    @functools.cached_property
    def choose_labels(self):
        """The labels given by --class and --labels."""
        return choose(self.net, self.network, self.class_idx, self.labels)

    def arguments(self, taus: list[float]) -> dict:
        """Arguments of `generation.generate_batch`. Raises: UserError if the network cannot be sampled so."""
        return sampling_arguments(
            self.net,
            self.network,
            choose_labels=self.choose_labels,
            solver='cm',
            taus=taus,
            clip_denoised=self.clip_denoised,
        )

    def images(self, taus: list[float], options):
        """An image source as in metrics/images.py."""
        seeds = range(options.seed, options.seed + options.num)
        return GeneratedImages(
            self.net, seeds, options.batch, name=f'{self.network}, {as_options(taus)}', **self.arguments(taus)
        )


def as_options(taus: list[float], clip_denoised: bool | None = None) -> str:
    """Options of generate.py and fid.py for these points; repr gives the shortest exact digits."""
    clip = {None: '', True: ' --clip_denoised', False: ' --no_clip_denoised'}[clip_denoised]
    return f'--solver=cm --taus={",".join(map(repr, taus))}{clip}'


# ----------------------------------------------------------------------------
# Candidates and the plan.


def candidate_levels(net, options) -> list[float]:
    """Noise levels to choose from, descending. Raises: UserError if there are too few."""
    # The range that the network can evaluate, narrowed by --low and --high.
    lowest, highest = samplers.clip_range(
        net, net.metadata.get('sigma_min', 0.002), net.metadata.get('sigma_max', 80.0)
    )
    low, high = max(options.low or 0, lowest), min(options.high or math.inf, highest)

    # Levels strictly inside, as OpenAI indexes them or evenly spaced in ln sigma.
    if options.space == 'karras-index':
        count = options.timesteps or net.metadata.get('num_timesteps', samplers.DEFAULT_TIMESTEPS)
        levels = [
            sigma
            for sigma in samplers.cm_sigmas(net, samplers.CMOptions(ts=range(count), timesteps=count))[1:]
            if low < sigma < high
        ]
    else:
        levels = (
            time_search.log_levels(low, high, options.tolerance or time_search.DEFAULT_TOLERANCE)
            if low < high
            else []
        )

    if len(levels) < options.steps - 1:
        cure = 'more --timesteps' if options.space == 'karras-index' else 'a smaller --tolerance'
        raise UserError(
            f'There are {len(levels)} noise levels to choose from between {low:g} and {high:g}, and '
            f'{options.steps} steps need {options.steps - 1}: widen --low and --high, or take {cure}.'
        )
    return levels


def search_plan(candidates: list[float], sampler: Sampler, measures, options) -> dict:
    """The plan as --dry-run prints it. Raises: UserError if the network cannot be sampled so."""
    points = options.steps - 1
    # Any of the candidates show whether the network can be sampled so.
    arguments = sampler.arguments(candidates[-points:])
    # One more for the single step, which has no points.
    most = 1 + time_search.most_evaluations(len(candidates), points, options.scan)
    return dict(
        network=sampler.network,
        metric=next(iter(measures)),
        points=points,
        highest=samplers.cm_sigmas(sampler.net, samplers.CMOptions(taus=[]))[0],
        candidates=len(candidates),
        first=candidates[0],
        last=candidates[-1],
        scan=options.scan,
        evaluations_at_most=most,
        images_each=options.num,
        nfe=samplers.evaluations(arguments['solver'], arguments['steps']),
    )


# ----------------------------------------------------------------------------
# The search.


class MetricOfPoints:
    """A metric of the images at given time points, computed by all processes together.

    Raises: UserError in the constructor if reference or detector cannot be used.
    """

    def __init__(self, sampler: Sampler, measures, references, options):
        ((self.name, self.measure),) = measures.items()
        self.sampler, self.options = sampler, options
        # The shape of images does not depend on the points.
        source = sampler.images([], options)
        detectors = evaluation.load_detectors({self.measure.entry}, source.image_shape, options)
        self.detector = detectors[self.measure.entry]
        if self.name == 'fid_inf':
            check_enough_to_extrapolate(options.num, self.detector.dim)
        self.reference = evaluation.complete_references(
            references, options.ref, measures, detectors, [source], options
        ).get(self.measure.entry)
        self.title = self.measure.title.format(self.detector.metric_name)

    def __call__(self, taus: list[float]) -> float:
        # Compute features on all processes, the metric on the main one, whose value all use.
        classes = {self.measure.entry} if self.measure.classes else set()
        source = self.sampler.images(taus, self.options)
        seen = evaluation.features_of(
            source, {self.measure.entry: self.detector}, self.options, self.measure.features, classes
        )[self.measure.entry]
        value = None
        if distributed.is_main():
            value = float(
                self.measure.compute(
                    Comparison(seen, self.reference, self.detector.device, seed=self.options.seed)
                )['value']
            )
        return distributed.broadcast_object(value)


def search(evaluate: MetricOfPoints, log, candidates: list[float], plan: dict) -> dict:
    """Search points one after another, with progress on stderr.

    Args:
        log: `SearchLog` of experiments/search_log.py.
    Returns: the results as --json writes them.
    """
    # Searches minimize, so that scores change sign.
    sign = -1 if evaluate.measure.larger_is_better else 1
    evaluated: list[list[float]] = []
    evaluation.log(
        f'{plan["points"]} of {len(candidates)} noise levels from {candidates[0]:g} to {candidates[-1]:g}, '
        f'by {evaluate.title}: at most {plan["evaluations_at_most"]} evaluations of {plan["images_each"]} '
        f'images; {len(log.values)} are in {log.path}.'
    )

    # An evaluation in the log is not repeated.
    def value_of(taus: list[float]) -> float:
        evaluated.append(taus)
        value = log.value(taus, lambda: evaluate(taus))
        evaluation.log(f'{len(evaluated)}: {listed(taus)}: {value:.6g}')
        return value

    # One step, then one more at a time.
    by_steps = [dict(steps=1, taus=[], value=value_of([]))]
    for taus, signed in time_search.find_points(
        lambda taus: sign * value_of(taus), candidates, plan['points'], plan['scan']
    ):
        by_steps.append(dict(steps=len(taus) + 1, taus=taus, value=sign * signed))
        evaluation.log(f'{len(taus) + 1} steps: {as_options(taus)}, {evaluate.title} {sign * signed:.6g}')
        if signed >= sign * by_steps[-2]['value']:
            evaluation.log(
                f'Warning: no better than {len(taus)} step{"s" * (len(taus) > 1)} at any level that was '
                'tried. A larger --scan, or a range of --low and --high, may find one that does.'
            )
    best = by_steps[-1]
    return dict(
        metric=evaluate.name,
        name=evaluate.title,
        **best,
        sigmas=[plan['highest'], *best['taus'], 0.0],
        by_steps=by_steps,
        evaluations=len(evaluated),
        num_images=plan['images_each'],
    )


def listed(taus: list[float]) -> str:
    """Points in a line of progress."""
    return ', '.join(f'{tau:.6g}' for tau in taus) or 'one step'


def reference_digest(ref: str | None, holds_statistics: bool) -> str | None:
    """Digest of a reference's file or, if it consists of images, of their names, sizes and times; None
    without a reference."""
    if ref is None:
        return None
    return file_sha256(local_path(ref)) if holds_statistics else open_images(ref).fingerprint()


def save_copy(path: str, net, sigmas: list[float], clip_denoised: bool | None = None) -> None:
    """Save a snapshot sampled by default at `sigmas`, which end in 0, and clamped as in the search."""
    # An FID was measured at other levels. `path` and `net` are not metadata names, and would be taken for
    # arguments of save_snapshot.
    reserved = ('path', 'net')
    metadata = {name: value for name, value in net.metadata.items() if name not in ('fid', *reserved)}
    metadata |= {} if clip_denoised is None else dict(clip_denoised=clip_denoised)
    save_snapshot(
        path,
        net,
        **metadata | dict(solver='cm', sigmas=sigmas) | ({'S': len(sigmas) - 1} if 'S' in metadata else {}),
    )
