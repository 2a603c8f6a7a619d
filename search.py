"""Search the noise levels of sampling: the time points of a consistency model by a metric of the images (Song
et al. 2023), or the schedule of a teacher's solver by the teacher's own paths (Chen et al. 2024)."""

from __future__ import annotations

import dnnlib.interrupts  # noqa: F401  (first)

import json
import math

import click
from click.core import ParameterSource

from dnnlib import EasyDict, cli
from dnnlib.limits import MAX_STEPS
from dnnlib.util import write_json
from metrics import evaluation
from sampling.options import GENERAL, OF_CMS, OF_TEACHERS, TEACHER_SOLVERS, guidance_options
from sampling.time_search import DEFAULT_TOLERANCE
from training.saved_files import NETWORK_FILE

POINTS, IMAGES, SCHEDULE = 'Points', 'Images and metric', 'Schedules of teachers (--schedule)'
SPACES = ('log', 'karras-index')
# Options that only one of the two searches has, and the numbers of images and steps that each takes.
OF_POINTS = ('log', 'space', 'tolerance', 'timesteps', 'scan', 'measures', 'ref', 'detector', 'dinov2',
             'detector_sha256', 'clip_denoised')  # fmt: skip
OF_SCHEDULES = ('nodes', 'order', 'variant', 'afs', 'to_zero', 'guide', 'guidance', 'guidance_interval')
SCHEDULE_IMAGES, SCHEDULE_STEPS, DEFAULT_NODES = 256, 8, 61
MAX_NODES = 500  # a batch's states at all nodes are in memory, and errors between all pairs


class Metric(evaluation.Measures):
    """The name of one metric."""

    name = 'name'

    def convert(self, value, param, ctx):
        measures = super().convert(value, param, ctx)
        if len(measures) > 1:
            self.fail(f'{value!r} is more than one; points are optimal for a single metric', param, ctx)
        return measures


@click.command(cls=cli.Command)
@cli.option(
    '--network',
    type=NETWORK_FILE,
    required=True,
    help='Snapshot of a consistency model, or of a teacher for --schedule.',
)
@cli.option(
    '--schedule',
    is_flag=True,
    help='Search the noise levels of a solver for a teacher, so that its images are those of many steps.',
)
@cli.option(
    '--log',
    metavar='FILE',
    type=cli.PATH,
    help='Log of all evaluations (.jsonl), from which an interrupted search resumes; required but for '
    '--schedule.',
)
@cli.option(
    '--solver',
    type=click.Choice(['cm', *(name for name in TEACHER_SOLVERS if name not in ('addim', 'best'))]),
    help='cm: treat the network as a consistency model even if its snapshot does not say that it is one. '
    'Others, with --schedule: the solver.  [default: ipndm with --schedule]',
)
@cli.option(
    '--save',
    type=cli.OUTPUT,
    help='Also write a copy of the snapshot that is sampled at these points by default; with --schedule the '
    'levels, a text file for --sigmas of generate.py.',
)
@cli.option('--json', 'json_path', type=cli.OUTPUT, help='Also write the results to this file.')
@cli.option('-n', '--dry-run', is_flag=True, help='Print what would be searched as JSON and exit.')
@cli.option(
    '--steps',
    type=cli.LEVELS,
    group=POINTS,
    help='Network evaluations per image: the first at sigma_max, the others at the points; with --schedule '
    f'the number of sampling steps, as for generate.py.  [default: 2; with --schedule {SCHEDULE_STEPS}]',
)
@cli.option(
    '--space',
    type=click.Choice(SPACES),
    default='log',
    group=POINTS,
    help='Candidate levels: evenly spaced in ln sigma, or those that --ts of generate.py indexes.',
)
@cli.option(
    '--tolerance',
    type=cli.Number(min=1e-4, max=1),
    group=POINTS,
    help='Relative distance between neighboring candidates, for --space=log.  [default: '
    f'{DEFAULT_TOLERANCE}]',
)
@cli.option(
    '--timesteps',
    type=cli.Integer(min=3, max=MAX_STEPS),
    group=POINTS,
    help='Number of candidate levels, both ends included, for --space=karras-index.  [default: the '
    "snapshot's; 40]",
)
@cli.option(
    '--scan',
    type=cli.INDEX,
    default=8,
    group=POINTS,
    help='Number of evenly spaced candidates to evaluate before each search, which continues around the '
    'best of them; 0 for a plain ternary search.',
)
@cli.option(
    '--low',
    type=cli.SIGMA,
    group=POINTS,
    help="Search only above this level.  [default: the network's sigma_min; with --schedule at least 0.002]",
)
@cli.option(
    '--high',
    type=cli.SIGMA,
    group=POINTS,
    help="Search only below this level.  [default: the network's sigma_max; with --schedule at most 80]",
)
@cli.option(
    '--metric',
    'measures',
    type=Metric(),
    default='fid',
    group=IMAGES,
    help='Metric to optimize, any of fid.py calc. Scores such as is and recall are maximized, distances are '
    'minimized.',
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
    '--num-images',
    'num',
    type=cli.TWO_IMAGES,
    group=IMAGES,
    help=f'Images per evaluation.  [default: {evaluation.DEFAULT_NUM}; with --schedule {SCHEDULE_IMAGES}]',
)
@cli.option(
    '--seed',
    type=cli.SEED,
    default=0,
    group=IMAGES,
    help='First seed of the images, the same for all points, and seed of other random choices.',
)
@GENERAL['class_idx'].under(IMAGES)
@GENERAL['labels'].under(IMAGES)
@OF_CMS['clip_denoised'].under(IMAGES)
@cli.option('--batch', type=cli.BATCH, default=64, group=IMAGES, help='Images per batch and process.')
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
@cli.option(
    '--nodes',
    type=cli.Integer(min=3, max=MAX_NODES),
    default=DEFAULT_NODES,
    group=SCHEDULE,
    help='Number of candidate levels, the nodes of the fine paths.',
)
@OF_TEACHERS['order'].under(SCHEDULE)
@OF_TEACHERS['variant'].under(SCHEDULE)
@OF_TEACHERS['afs'].under(SCHEDULE)
@OF_TEACHERS['to_zero'].under(SCHEDULE)
@guidance_options()
def main(network, schedule, log, solver, save, json_path, dry_run, measures, **options):
    """Search noise levels: those at which a consistency model is evaluated again, one after another, each by a
    ternary search; or with --schedule those of a teacher's solver, by the teacher's own paths.

    \b
    The second of two steps by FID; then a third, resuming from the same log:
      torchrun --standalone --nproc_per_node=4 -- search.py --network=ect.pkl \\
          --ref=fid-refs/cifar10-32x32.npz --log=search.jsonl --num=10000
      torchrun --standalone --nproc_per_node=4 -- search.py --network=ect.pkl \\
          --ref=fid-refs/cifar10-32x32.npz --log=search.jsonl --num=10000 --steps=3 --save=ect-3.pkl
    \b
    The noise levels for 8 evaluations of a teacher by iPNDM, and images of them:
      python search.py --network=edm-cifar10-32x32-cond-vp.pkl --schedule --steps=8 --save=levels.txt
      python generate.py --network=edm-cifar10-32x32-cond-vp.pkl --sigmas=levels.txt --outdir=out

    The only line on stdout has the points as options for generate.py; everything else goes to stderr.
    """
    from experiments.search_log import SearchLog
    from metrics import time_points
    from torch_utils import distributed
    from training.checkpoint import network_digest

    # `evaluation` also reads options of fid.py, for references that consist of images.
    options = EasyDict(options, skip_bad=False, cache=None, workers=4)
    check_mode(schedule, solver, log)
    # Defaults that differ between the two searches.
    options.num = options.num or (SCHEDULE_IMAGES if schedule else evaluation.DEFAULT_NUM)
    options.steps = options.steps or (SCHEDULE_STEPS if schedule else 2)
    if schedule:
        find_schedule(network, solver or 'ipndm', save, json_path, dry_run, options)
        return
    check_usage(log, measures, options)
    evaluation.check_detector_options(measures, options)
    distributed.init()

    # Check everything before the first evaluation.
    net = time_points.load_consistency_model(network, solver)
    sampler = time_points.Sampler(net, network, options.class_idx, options.labels, options.clip_denoised)
    candidates = time_points.candidate_levels(net, options)
    plan = time_points.search_plan(candidates, sampler, measures, options)
    references = evaluation.read_references(options.ref, measures, options)
    if dry_run:
        distributed.print0(json.dumps(plan, indent=2))
        return
    for path in (log, save, json_path):
        evaluation.make_folder(path)
    evaluate = time_points.MetricOfPoints(sampler, measures, references, options)

    # What the values depend on: a log with other settings is refused.
    settings = {
        'metric': evaluate.name,
        'num': options.num,
        'seed': options.seed,
        'class': options.class_idx,
        'network': network_digest(net, net.metadata),
        'detector': evaluate.detector.digest,
        'reference': time_points.reference_digest(options.ref, bool(references)),
    }
    # Only where given, so that logs of older versions, without them, still fit.
    extra = {
        'labels': sampler.choose_labels.digest() if options.labels else None,
        'clip_denoised': options.clip_denoised,
    }
    settings |= {name: value for name, value in extra.items() if value is not None}

    # Search. Print the points before writing files, which may fail.
    found = time_points.search(evaluate, SearchLog(log, settings), candidates, plan)
    if distributed.is_main():
        click.echo(time_points.as_options(found['taus'], options.clip_denoised))
        if json_path is not None:
            write_json(json_path, found)
        if save:
            time_points.save_copy(save, net, found['sigmas'], options.clip_denoised)
    distributed.shutdown()


def check_mode(schedule: bool, solver: str | None, log: str | None) -> None:
    """Raises: UsageError for options of the other search."""
    context = click.get_current_context()
    given = [
        param.opts[0]
        for param in context.command.params
        if param.name in (OF_POINTS if schedule else OF_SCHEDULES)
        and context.get_parameter_source(param.name) is not ParameterSource.DEFAULT
    ]
    # Options of the other search would have no effect.
    if given and schedule:
        raise click.UsageError(f'{", ".join(given)}: a search for a --schedule has no such option.')
    if given:
        raise click.UsageError(f'{", ".join(given)}: only a search for a --schedule has such an option.')
    # The solver, and the log without which a search of points cannot resume.
    if schedule and solver == 'cm':
        raise click.UsageError('--solver=cm is not a solver for teachers, for which --schedule searches.')
    if not schedule and solver not in (None, 'cm'):
        raise click.UsageError(f'--solver={solver} is for --schedule.')
    if not schedule and log is None:
        raise click.UsageError('--log is missing: the file of all evaluations, from which a search resumes.')


def find_schedule(
    network: str, solver: str, save: str | None, json_path: str | None, dry_run: bool, options: EasyDict
) -> None:
    """`search.py --schedule`."""
    from sampling.level_list import write_levels
    from sampling.teacher_paths import ScheduleSearch, Teacher
    from torch_utils import distributed

    # Two sets of seeds: one to search with, one to say how good the levels are.
    cli.check_seeds(options.seed, 2 * options.num, '--seed', 'twice --num')
    if not (options.low or 0) < (options.high or math.inf):
        raise click.UsageError('--low is not below --high.')
    distributed.init()
    # The fine paths, which take long, are computed by `run`; what may be wrong is found here.
    settings = {name: options[name] for name in ('steps', 'order', 'variant', 'afs', 'to_zero')}
    search = ScheduleSearch(Teacher(network, options, options.guidance), solver, **settings)
    if dry_run:
        distributed.print0(json.dumps(search.plan(), indent=2))
        return
    # Output files are checked before the search, not after hours.
    for path in (save, json_path):
        evaluation.make_folder(path)
    found = search.run(evaluation.log)
    # Print the levels before writing files, which may fail.
    if distributed.is_main():
        click.echo(search.as_options(found['sigmas']))
        if json_path is not None:
            write_json(json_path, found)
        if save:
            write_levels(save, found['sigmas'], search.record())
    distributed.shutdown()


def check_usage(log, measures, options) -> None:
    """Raises: UsageError if options contradict or lack each other."""
    ((name, measure),) = measures.items()
    if measure.compares and options.ref is None:
        raise click.UsageError(f'--ref is missing, and {name} compares with a reference.')
    if not measure.compares and options.ref is not None:
        raise click.UsageError(f'--ref: {name} compares with nothing.')
    # Each of these sets the density of candidates in one space only.
    for option, space in (('tolerance', 'log'), ('timesteps', 'karras-index')):
        if options[option] is not None and options.space != space:
            raise click.UsageError(f'--{option} is for --space={space}.')
    cli.check_seeds(options.seed, options.num, '--seed', '--num')
    if not (options.low or 0) < (options.high or math.inf):
        raise click.UsageError('--low is not below --high.')
    if not log.endswith('.jsonl'):
        raise click.UsageError(f'--log={log}: the name of a log ends in .jsonl.')


if __name__ == '__main__':
    main()
