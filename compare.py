"""Train objectives from one teacher, for an equal budget of network evaluations, and compare the results in a
table, a plot and samples.

Runs the scripts of this repository as a user would, and prints each command. The same command again resumes.
"""

from __future__ import annotations

import dnnlib.interrupts  # noqa: F401  (first)

import click

from dnnlib import cli
from experiments.bundled import DIGITS
from experiments.comparison import STUDENTS
from experiments.comparison_run import Options, run
from experiments.options import JOBS, NamesOrAll
from experiments.runner import SHOWN
from metrics.options import Resamples
from training.saved_files import NETWORK_FILE

TRAINING, MEASURING = 'Training', 'Measuring'


class Counts(cli.NumberList):
    """Comma-separated different positive integers."""

    def convert(self, value, param, ctx):
        numbers = super().convert(value, param, ctx)
        if not numbers or len(set(numbers)) < len(numbers):
            self.fail(f'{value!r} is not a list of different numbers from 1 on', param, ctx)
        return sorted(numbers)


class OptionsFor(click.ParamType):
    """`NAME:OPTIONS`, such as `direct:--substeps=3 --top-mass=1`."""

    name = 'text'

    def convert(self, value, param, ctx):
        import shlex

        if isinstance(value, tuple):
            return value
        name, colon, arguments = value.partition(':')
        if not colon:
            self.fail(f'{value!r} is not NAME:OPTIONS, such as direct:--substeps=3', param, ctx)
        try:
            return name.strip(), shlex.split(arguments)
        except ValueError as error:
            self.fail(f'{value!r}: {error}', param, ctx)


@click.command(cls=cli.Command)
@cli.option(
    '--outdir',
    metavar='DIR',
    type=cli.PATH,
    help='Output folder; the same command again resumes there.  [default: compare-out; of photos '
    'compare-photos]',
)
@cli.option(
    '--data',
    metavar='ZIP|DIR',
    type=cli.PATH,
    default=DIGITS.name,
    help="Data set, made by dataset_tool.py; or digits, for scikit-learn's digits, or photos, for crops of "
    'its two photographs in 16x16, each with suitable metrics and options.',
)
@cli.option(
    '--teacher',
    type=NETWORK_FILE,
    help='Diffusion model that all students start from.  [default: on digits and photos one that is trained '
    'first]',
)
@JOBS
@cli.option(
    '--objectives',
    type=NamesOrAll(STUDENTS),
    default='all',
    group=TRAINING,
    help='Objectives to compare, or all.',
)
@cli.option(
    '--budget',
    type=cli.COUNT,
    default=10000,
    group=TRAINING,
    help='Network evaluations per training and batch element, of which a forward and backward pass of the '
    'student counts as 3.',
)
@cli.option('--batch', type=cli.BATCH, default=DIGITS.batch, group=TRAINING, help='Training batch size.')
@cli.option(
    '--seeds',
    type=cli.Seeds(),
    default='0',
    group=TRAINING,
    help='Training seeds; each objective is trained with each.',
)
@cli.option(
    '--with',
    'extra',
    metavar='NAME:OPTIONS',
    type=OptionsFor(),
    multiple=True,
    group=TRAINING,
    help="Additional train.py options for an objective or its S-step student, such as 'direct:--top-mass=1' "
    "or 'direct-8:--substeps=2'.",
)
@cli.option(
    '--steps',
    type=Counts(cli.STEPS),
    default='1,2,4,8',
    group=MEASURING,
    help='Numbers of sampling steps to compare.',
)
@cli.option(
    '--bootstrap',
    type=Resamples(),
    group=MEASURING,
    help='Resamples, 40 or more, for 95 % intervals of the sampling noise, each as expensive as a '
    'distance; 0 disables them.  [default: 200 on digits and photos, else 0]',
)
@cli.option(
    '--reference-steps',
    type=cli.LEVELS,
    default=256,
    group=MEASURING,
    help='Heun steps of the teacher samples that all others are compared with.',
)
@cli.option(
    '--num',
    '--num-images',
    'num',
    type=cli.Images(cli.Integer(min=SHOWN)),
    group=MEASURING,
    help='Number of images per model.  [default: 50000; on digits and photos 6000]',
)
@cli.option(
    '--ref',
    'refs',
    metavar='NPZ|URL',
    type=cli.PATH,
    multiple=True,
    group=MEASURING,
    help='Reference statistics, made by fid.py ref; if repeated, the plot shows the first.  [default: on '
    'digits three, on photos four]',
)
@cli.option(
    '--detector',
    'detectors',
    metavar='PATH|URL',
    type=cli.PATH,
    multiple=True,
    group=MEASURING,
    help=f"Detector of each --ref, in the same order. {cli.PROGRAM}  [default: NVIDIA's Inception]",
)
@cli.option(
    '--sample-batch',
    type=cli.BATCH,
    default=256,
    group=MEASURING,
    help='Batch size of sampling and evaluation.',
)
@cli.argument(
    'train_options', nargs=-1, type=click.UNPROCESSED, help='train.py options for all trainings, after --.'
)
def main(**options):
    """Train objectives from one teacher, for an equal budget of network evaluations, and compare the results.

    \b
    All objectives on digits, on a laptop:
      python compare.py
    \b
    The same on color crops of two photographs, in hours:
      python compare.py --data=photos --seeds=0-2
    \b
    Two objectives on CIFAR-10:
      python compare.py --outdir=cifar10 --data=datasets/cifar10-32x32.zip \\
          --teacher=edm-cifar10-32x32-cond-vp.pkl --objectives=mcd,direct --budget=600000 --batch=512 \\
          --ref=fid-refs/cifar10-32x32.npz -- --batch-gpu=128

    A student with a fixed number of steps is trained for each of --steps, with the full budget; a consistency
    model or a flow map is trained once, and sampled with each.
    """
    run(Options(**options))


if __name__ == '__main__':
    main()
