"""Time points of a consistency model's steps, found by a metric of the images that they give (Song et al.
2023)."""

from __future__ import annotations

import dnnlib.interrupts  # noqa: F401  (first)

import functools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import click

from dnnlib import EasyDict, UserError, cli
from dnnlib.limits import MAX_STEPS
from dnnlib.util import DISK_ERRORS, named
from metrics import evaluation
from sampling.options import GENERAL, OF_CMS, sampling_arguments

POINTS, IMAGES = 'Points', 'Images and metric'
SPACES = ('log', 'karras-index')
DEFAULT_TOLERANCE = 0.05


class Metric(evaluation.Measures):
    """The name of one measure."""

    name = 'name'

    def convert(self, value, param, ctx):
        measures = super().convert(value, param, ctx)
        if len(measures) > 1:
            self.fail(f'{value!r} is more than one, and points are best for one', param, ctx)
        return measures


@click.command(cls=cli.Command)
@cli.option(
    '--network', metavar='PKL|URL', type=cli.PATH, required=True, help='Snapshot of a consistency model.'
)
@cli.option(
    '--log',
    metavar='FILE',
    type=cli.PATH,
    required=True,
    help='Log of all evaluations, .jsonl, one a line; a search that was stopped resumes from it.',
)
@cli.option(
    '--solver',
    type=click.Choice(['cm']),
    help='Treat the network as a consistency model where its snapshot does not say that it is one.',
)
@cli.option(
    '--save',
    metavar='PKL',
    type=cli.PATH,
    help='Write a copy of the snapshot that is sampled at the points found by default.',
)
@cli.option('--json', 'json_path', metavar='FILE', type=cli.PATH, help='Write the results to this file too.')
@cli.option('-n', '--dry-run', is_flag=True, help='Print what would be searched as JSON and exit.')
@cli.option(
    '--steps',
    metavar='INT',
    type=cli.LEVELS,
    default=2,
    show_default=True,
    group=POINTS,
    help='Network evaluations per image: the first at sigma_max, the others at the points.',
)
@cli.option(
    '--space',
    type=click.Choice(SPACES),
    default='log',
    show_default=True,
    group=POINTS,
    help='Candidates: levels evenly spaced in ln sigma, or those that --ts of generate.py counts.',
)
@cli.option(
    '--tolerance',
    metavar='FLOAT',
    type=cli.Number(min=1e-4, max=1),
    group=POINTS,
    help=f'Relative distance of neighboring candidates, for --space=log.  [default: {DEFAULT_TOLERANCE}]',
)
@cli.option(
    '--timesteps',
    metavar='INT',
    type=cli.Integer(min=3, max=MAX_STEPS),
    group=POINTS,
    help='Number of candidate levels, both ends included, for --space=karras-index.  [default: the '
    "snapshot's; 40]",
)
@cli.option(
    '--scan',
    metavar='INT',
    type=cli.INDEX,
    default=8,
    show_default=True,
    group=POINTS,
    help='Evaluate this many candidates, evenly spread, before each search, and search around the best of '
    'them; 0: a plain ternary search.',
)
@cli.option(
    '--low',
    metavar='FLOAT',
    type=cli.SIGMA,
    group=POINTS,
    help="Search above this level.  [default: the network's sigma_min]",
)
@cli.option(
    '--high',
    metavar='FLOAT',
    type=cli.SIGMA,
    group=POINTS,
    help="Search below this level.  [default: the network's sigma_max]",
)
@cli.option(
    '--metric',
    'measures',
    metavar='NAME',
    type=Metric(),
    default='fid',
    show_default=True,
    group=IMAGES,
    help='Measure to optimize, one of those of fid.py calc. Scores such as is and recall are maximized, '
    'distances minimized.',
)
@cli.option(
    '--ref',
    metavar='PATH|URL',
    type=cli.PATH,
    group=IMAGES,
    help='Reference: statistics (.npz, .pkl), or the images themselves (folder, zip, array).',
)
@cli.option(
    '--num',
    metavar='INT',
    type=cli.Integer(min=2),
    default=evaluation.DEFAULT_NUM,
    show_default=True,
    group=IMAGES,
    help='Images per evaluation of the metric.',
)
@cli.option(
    '--seed',
    metavar='INT',
    type=cli.SEED,
    default=0,
    show_default=True,
    group=IMAGES,
    help='First seed of the images, the same for all points, and seed of every other random choice.',
)
@GENERAL['class_idx'].under(IMAGES)
@GENERAL['labels'].under(IMAGES)
@OF_CMS['clip_denoised'].under(IMAGES)
@cli.option(
    '--batch',
    metavar='INT',
    type=cli.BATCH,
    default=64,
    show_default=True,
    group=IMAGES,
    help='Images per batch and process.',
)
@cli.option(
    '--detector',
    metavar='PATH|URL',
    type=cli.PATH,
    group=IMAGES,
    help=f"Feature detector, as for fid.py calc. {cli.PROGRAM}  [default: NVIDIA's Inception, downloaded "
    'once]',
)
@cli.option(
    '--dinov2',
    metavar='DIR',
    type=cli.PATH,
    group=IMAGES,
    help='DINOv2 for fd_dinov2, as for fid.py calc.  [default: downloaded once]',
)
@cli.option('--detector-sha256', metavar='HEX', group=IMAGES, help='Digest that the detector file must have.')
def main(network, log, solver, save, json_path, dry_run, measures, **options):
    """Find the noise levels at which a consistency model is evaluated again, one after another, each by a
    ternary search.

    \b
    The second of two steps, by FID; then three steps, resuming from the same log:
      torchrun --standalone --nproc_per_node=4 -- search.py --network=ect.pkl \\
          --ref=fid-refs/cifar10-32x32.npz --log=search.jsonl --num=10000
      torchrun --standalone --nproc_per_node=4 -- search.py --network=ect.pkl \\
          --ref=fid-refs/cifar10-32x32.npz --log=search.jsonl --num=10000 --steps=3 --save=ect-3.pkl

    The only line on stdout has the points as options for generate.py; everything else goes to stderr.
    """
    from torch_utils import distributed
    from training.checkpoint import network_digest

    # `evaluation` reads these of the images that a reference may consist of.
    options = EasyDict(options, skip_bad=False, cache=None, workers=4)
    check_usage(network, log, save, measures, options)
    evaluation.check_detector_options(measures, options)
    distributed.init()

    # What is searched, checked before anything is computed.
    net = load_consistency_model(network, solver)
    sampler = Sampler(net, network, options.class_idx, options.labels, options.clip_denoised)
    candidates = candidate_levels(net, options)
    plan = search_plan(candidates, sampler, measures, options)
    references = evaluation.read_references(options.ref, measures)
    if dry_run:
        distributed.print0(json.dumps(plan, indent=2))
        return
    for path in (log, save, json_path):
        evaluation.make_folder(path)
        check_writable(path)
    evaluate = MetricOfPoints(sampler, measures, references, options)

    # What decides the values of the metric: a log of other settings is refused.
    settings = {
        'metric': evaluate.name,
        'num': options.num,
        'seed': options.seed,
        'class': options.class_idx,
        'network': network_digest(net, net.metadata),
        'detector': evaluate.detector.digest,
        'reference': reference_digest(options.ref, bool(references)),
    }
    extra = {
        'labels': sampler.choose_labels.digest() if options.labels else None,
        'clip_denoised': options.clip_denoised,
    }
    settings |= {name: value for name, value in extra.items() if value is not None}

    # The points go to stdout first, before anything that may fail.
    found = search(evaluate, SearchLog(log, settings), candidates, plan)
    if distributed.is_main():
        click.echo(as_options(found['taus'], options.clip_denoised))
        evaluation.write_json(json_path, found)
        if save:
            save_copy(save, net, found['sigmas'], options.clip_denoised)
    distributed.shutdown()


def check_usage(network, log, save, measures, options) -> None:
    """UsageError where options contradict each other or lack one another."""
    ((name, measure),) = measures.items()
    if measure.compares and options.ref is None:
        raise click.UsageError(f'--ref is missing, and {name} compares with a reference.')
    if not measure.compares and options.ref is not None:
        raise click.UsageError(f'--ref: {name} compares with nothing.')
    for option, space in (('tolerance', 'log'), ('timesteps', 'karras-index')):
        if options[option] is not None and options.space != space:
            raise click.UsageError(f'--{option} is for --space={space}.')
    cli.check_seeds(options.seed, options.num, '--seed', '--num')
    if not (options.low or 0) < (options.high or math.inf):
        raise click.UsageError('--low is not below --high.')
    if not log.endswith('.jsonl'):
        raise click.UsageError(f'--log={log}: the name of a log ends in .jsonl.')
    if save and os.path.realpath(save) == os.path.realpath(network):
        raise click.UsageError('--save names the network itself; choose another name.')


def check_writable(path: str | None) -> None:
    """UserError where the folder of a file to be written is closed to writing."""
    if path is None:
        return
    try:
        with tempfile.TemporaryFile(dir=os.path.dirname(path) or '.'):
            pass
    except OSError as error:
        raise UserError(f'Cannot write {path}: {error.strerror}. Choose another place.') from error


# ----------------------------------------------------------------------------
# What is searched.


def load_consistency_model(network: str, solver: str | None):
    """The network.

    Raises: UserError where it is no consistency model, or neither its snapshot nor `solver` says so.
    """
    from torch_utils import distributed
    from training.checkpoint import load_network

    with distributed.main_process_first():
        net = load_network(network, distributed.get_device())
    steps, objective = len(net.metadata.get('sigmas', ())) - 1, net.metadata.get('objective', 'unknown')
    if solver is None and net.metadata.get('solver') != 'cm' and steps != 1:
        problem = (
            f'is a student of {steps} steps: its noise levels are those it was trained for'
            if steps > 0
            else f'does not say that it is one (objective {objective}): if it is, add --solver=cm; '
            'a diffusion model becomes one by train.py --objective=ect'
        )
        raise UserError(
            f'Time points are found for consistency models, whose every output is an image, and {network} '
            f'{problem}.'
        )
    return net


@dataclass
class Sampler:
    """A network's images from its points, always of the same seeds: a metric of them then depends on the
    points alone, and smoothly."""

    net: object
    network: str
    class_idx: int | None
    labels: str | None = None
    clip_denoised: bool | None = None

    @functools.cached_property
    def choose_labels(self):
        """What --class and --labels mean."""
        from sampling.label_choosers import choose

        return choose(self.net, self.network, self.class_idx, self.labels)

    def arguments(self, taus: list[float]) -> dict:
        """What `generation.generate_batch` takes.

        Raises: UserError where the network cannot be sampled so.
        """
        return sampling_arguments(
            self.net,
            self.network,
            choose_labels=self.choose_labels,
            solver='cm',
            taus=taus,
            clip_denoised=self.clip_denoised,
        )

    def images(self, taus: list[float], options):
        """A source as in metrics/images.py."""
        from metrics.generated import GeneratedImages

        seeds = range(options.seed, options.seed + options.num)
        return GeneratedImages(
            self.net, seeds, options.batch, name=f'{self.network}, {as_options(taus)}', **self.arguments(taus)
        )


def as_options(taus: list[float], clip_denoised: bool | None = None) -> str:
    """Points as options of generate.py and fid.py; a number's shortest digits are the number itself."""
    clip = {None: '', True: ' --clip_denoised', False: ' --no_clip_denoised'}[clip_denoised]
    return f'--solver=cm --taus={",".join(map(repr, taus))}{clip}'


def candidate_levels(net, options) -> list[float]:
    """The falling noise levels to choose from. Raises: UserError where they are too few."""
    from sampling import time_search
    from training import samplers

    lowest, highest = samplers.clip_range(
        net, net.metadata.get('sigma_min', 0.002), net.metadata.get('sigma_max', 80.0)
    )
    low, high = max(options.low or 0, lowest), min(options.high or math.inf, highest)
    if options.space == 'karras-index':
        count = options.timesteps or net.metadata.get('num_timesteps', samplers.DEFAULT_TIMESTEPS)
        levels = [
            sigma
            for sigma in samplers.cm_sigmas(net, samplers.CMOptions(ts=range(count), timesteps=count))[1:]
            if low < sigma < high
        ]
    else:
        levels = (
            time_search.log_levels(low, high, options.tolerance or DEFAULT_TOLERANCE) if low < high else []
        )
    if len(levels) < options.steps - 1:
        cure = 'more --timesteps' if options.space == 'karras-index' else 'a smaller --tolerance'
        raise UserError(
            f'There are {len(levels)} noise levels to choose from between {low:g} and {high:g}, and '
            f'{options.steps} steps need '
            f'{options.steps - 1}: widen --low and --high, or take {cure}.'
        )
    return levels


def search_plan(candidates: list[float], sampler: Sampler, measures, options) -> dict:
    """What will be done, for --dry-run. Raises: UserError where the network cannot be sampled so."""
    from sampling import time_search
    from training import samplers

    points = options.steps - 1
    arguments = sampler.arguments(candidates[-points:])
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


class MetricOfPoints:
    """The metric of the images that points give, on all processes together.

    Raises: UserError where reference or detector cannot be used; at once, not at the first evaluation.
    """

    def __init__(self, sampler: Sampler, measures, references, options):
        from metrics.uncertainty import check_enough_to_extrapolate

        ((self.name, self.measure),) = measures.items()
        self.sampler, self.options = sampler, options
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
        from metrics.measures import Comparison
        from torch_utils import distributed

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


# ----------------------------------------------------------------------------
# The search and its log.


def search(evaluate: MetricOfPoints, log: SearchLog, candidates: list[float], plan: dict) -> dict:
    """The points found, as --json has them; progress goes to stderr."""
    from sampling import time_search

    sign = -1 if evaluate.measure.larger_is_better else 1
    evaluated: list[list[float]] = []
    evaluation.log(
        f'{plan["points"]} of {len(candidates)} noise levels from {candidates[0]:g} to {candidates[-1]:g}, '
        f'by {evaluate.title}: at most '
        f'{plan["evaluations_at_most"]} evaluations of {plan["images_each"]} images; {len(log.values)} are '
        f'in {log.path}.'
    )

    def value_of(taus: list[float]) -> float:
        evaluated.append(taus)
        value = log.value(taus, lambda: evaluate(taus))
        evaluation.log(f'{len(evaluated)}: {listed(taus)}: {value:.6g}')
        return value

    by_steps = [dict(steps=1, taus=[], value=value_of([]))]
    for taus, signed in time_search.find_points(
        lambda taus: sign * value_of(taus), candidates, plan['points'], plan['scan']
    ):
        by_steps.append(dict(steps=len(taus) + 1, taus=taus, value=sign * signed))
        evaluation.log(f'{len(taus) + 1} steps: {as_options(taus)}, {evaluate.title} {sign * signed:.6g}')
        if signed >= sign * by_steps[-2]['value']:
            evaluation.log(
                f'Warning: no better than {len(taus)} step{"s" * (len(taus) > 1)} at any level that was '
                'tried. If one more step helps '
                'at all, a larger --scan may find where; --low and --high may leave out the rest.'
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
    return ', '.join(f'{tau:.6g}' for tau in taus) or 'one step'


class SearchLog:
    """All evaluations, on disk: a line with what the values depend on, then a line for each.

    Which points are searched may change between searches that share a log; what decides the values may not.
    All processes have the values of the main one, which reads and writes.

    Args:
        path: of the file; it need not exist.
        settings: plain data that decides the values.
    Raises: UserError where the file is no such log, of other settings, damaged, or cannot be written.
    """

    def __init__(self, path: str, settings: dict):
        from torch_utils import distributed

        self.path, self.metric = path, settings['metric']
        self.values: dict[tuple[float, ...], float] = {}
        if distributed.is_main():
            header, self.values = read_log(path)
            others = [
                f'{name} is {json.dumps(settings.get(name))}, in the log {json.dumps(header.get(name))}'
                for name in {**settings, **(header or {})}
                if header is not None and settings.get(name) != header.get(name)
            ]
            if others:
                raise UserError(
                    f'{path} is the log of another search: {"; ".join(others)}. Give the options of that '
                    'search, or another --log.'
                )
            self._append(
                dict(search=settings) if header is None else None
            )  # at once: that it cannot be written is better known now
        self.values = distributed.broadcast_object(self.values)

    def value(self, taus: list[float], compute: Callable[[], float]) -> float:
        """The value at these points: the one known, or that which `compute` gives, once it is on disk."""
        from torch_utils import distributed

        if tuple(taus) not in self.values:
            start = time.monotonic()
            value = compute()
            if distributed.is_main():
                self._append(
                    dict(
                        taus=taus, metric=self.metric, value=value, seconds=round(time.monotonic() - start, 3)
                    )
                )
            self.values[tuple(taus)] = value
        return self.values[tuple(taus)]

    def _append(self, record: dict | None) -> None:
        """A line, on disk; in any case what a kill has left of the line before it is gone."""
        from training.run_log import append_lines, json_line

        try:
            append_lines(self.path, f'{json_line(record)}\n' if record else '')
            with open(self.path, 'rb') as file:
                os.fsync(file.fileno())
        except OSError as error:
            cure = (
                'Free some space'
                if error.errno in DISK_ERRORS
                else 'Make sure that its folder is there and open to writing'
            )
            raise UserError(
                f'--log={self.path} cannot be written: {error.strerror}. {cure}; the same command goes on '
                'from what is in it.'
            ) from error


def read_log(path: str) -> tuple[dict | None, dict[tuple[float, ...], float]]:
    """(settings, values by points) of a log; (None, {}) where there is none yet. What a kill has left of a
    last line does not count.

    Raises: UserError where the file is something else, or damaged.
    """
    from training.run_log import records

    try:
        with named('--log'):
            lines = list(records(path))
    except FileNotFoundError:
        return None, {}
    except OSError as error:
        raise UserError(f'--log={path} cannot be read: {error.strerror}.') from error
    torn = lines.pop()[0] if lines and lines[-1][1] is None and not lines[-1][0].endswith(b'\n') else b''
    if not lines and b'{"search": '.startswith(torn[:11]):
        return None, {}
    settings = (lines[0][1] or {}).get('search') if lines else None
    if not isinstance(settings, dict):
        raise UserError(f'--log={path} is a file, and no log of search.py. Choose another name.')
    values = {}
    for number, (_, record) in enumerate(lines[1:], start=2):
        taus, value = (record or {}).get('taus'), (record or {}).get('value')
        if not isinstance(taus, list) or not all(
            isinstance(number, (int, float)) for number in [*taus, value]
        ):
            raise UserError(
                f'--log={path} is damaged: line {number} is no evaluation. Remove that line, or choose '
                'another name.'
            )
        values[tuple(taus)] = value
    return settings, values


def reference_digest(ref: str | None, holds_statistics: bool) -> str | None:
    """What tells a reference from others: of its file or, where it is images, of their names, sizes and
    times; None where there is none."""
    from dnnlib.downloads import file_sha256, local_path
    from metrics.images import open_images

    if ref is None:
        return None
    return file_sha256(local_path(ref)) if holds_statistics else open_images(ref).fingerprint()


def save_copy(path: str, net, sigmas: list[float], clip_denoised: bool | None = None) -> None:
    """The network as a snapshot that is sampled at `sigmas`, which end in 0, and clamped as the search did
    where that was given. Of its metadata, what was measured at others is left out."""
    from training.checkpoint import save_snapshot

    reserved = ('path', 'net')  # what only a file that was tampered with has
    metadata = {name: value for name, value in net.metadata.items() if name not in ('fid', *reserved)}
    metadata |= {} if clip_denoised is None else dict(clip_denoised=clip_denoised)
    save_snapshot(
        path,
        net,
        **metadata | dict(solver='cm', sigmas=sigmas) | ({'S': len(sigmas) - 1} if 'S' in metadata else {}),
    )


if __name__ == '__main__':
    main()
