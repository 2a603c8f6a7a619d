"""The options of sampling a network and of editing images, which command lines share. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import click

from dnnlib import cli
from dnnlib.options import FLAG, SWITCH, gathered, opt, options_of
from sampling.level_list import LevelList, follow_search
from training.guidance_options import GuidanceOptions, checked
from training.saved_files import NETWORK_FILE

# Of training/samplers.py, which imports torch.
FAST_SOLVERS = ['ipndm', 'ipndm_v', 'deis', 'dpmpp', 'unipc', 'dpm2']
SOLVERS, EDITING_SOLVERS = (
    ['student', 'euler', 'heun', 'addim', 'cm', 'ancestral', *FAST_SOLVERS, 'best'],
    ['student', 'cm', 'ancestral'],
)
# Values of --labels in place of a file: labels of the training set; classes in turn.
DATA, BALANCED = 'data', 'balanced'
# Steps of an edit by a one-step consistency model; more steps respect the known part more (docs/editing.md).
CM_EDIT_STEPS = 40

TEACHER_SOLVERS = [name for name in SOLVERS if name not in EDITING_SOLVERS]

# The fields have the names of `samplers.sample`'s arguments; a default of None means `default_text`.


@dataclass(frozen=True)
class GeneralOptions:
    heading: ClassVar[str] = ''

    class_idx: int | None = opt(
        None, cli.Integer(min=0), 'Class of all images.', flags=('--class',), default_text='random, by seed'
    )
    labels: str | None = opt(
        None,
        cli.PATH,
        'Draw labels, by seed, from a file of class indices [N] or vectors [N, D], or, with data, from those '
        'of the training set; balanced: classes that have images, in turn.',
        metavar='NPY|data|balanced',
        default_text='classes that have images, uniformly',
    )
    steps: int | None = opt(
        None,
        cli.STEPS,
        'Number of sampling steps.',
        default_text="a student's own, a flow map's most; a consistency model's, mostly 1; 18 for a teacher",
    )
    solver: str | None = opt(
        None,
        click.Choice(SOLVERS),
        'Method of sampling; best: a solver for teachers by the number of evaluations.',
        default_text='what the snapshot is: student, cm for a consistency model, ancestral for mm, heun '
        'for a teacher',
    )
    sigma_min: float | None = opt(None, cli.SIGMA, 'Lowest noise level.', default_text='varies')
    sigma_max: float | None = opt(None, cli.SIGMA, 'Highest noise level.', default_text='varies')
    rho: float | None = opt(None, cli.RHO, 'Exponent of the noise levels.', default_text='7; deis 2')


@dataclass(frozen=True)
class StudentOptions:
    heading: ClassVar[str] = 'Students'

    force_steps: bool = opt(
        False,
        FLAG,
        'Sample a student with another number of steps than it was trained for.',
        flags=('--force-steps',),
    )


@dataclass(frozen=True)
class ConsistencyModelOptions:
    heading: ClassVar[str] = 'Consistency models (--solver=cm)'

    taus: list[float] | None = opt(
        None,
        cli.NumberList(cli.SIGMA),
        'Noise levels of the evaluations after the first, at sigma_max, as in 2.5,0.8.',
    )
    mid_t: float | None = opt(None, cli.SIGMA, 'Noise level of the second of two evaluations.')
    ts: list[int] | None = opt(
        None,
        cli.NumberList(cli.INDEX),
        'Noise levels of the evaluations by their indices among --timesteps levels, as in 0,22,39.',
    )
    timesteps: int | None = opt(
        None, cli.LEVELS, 'Number of levels that --ts counts in.', default_text="the snapshot's; 40"
    )
    clip_denoised: bool | None = opt(
        None,
        SWITCH,
        'Clamp every image that the network gives to [-1, 1], as Song et al. do and ECT and TCM do not.',
        default_text="the snapshot's; on",
    )


@dataclass(frozen=True)
class TeacherOptions:
    heading: ClassVar[str] = 'Teachers (probability-flow ODE)'

    xvar_scale: float | None = opt(
        None, cli.FACTOR, 'Factor on the variance that --solver=addim adds; 0 is DDIM.', default_text='1'
    )
    S_churn: float | None = opt(
        None, cli.FACTOR, 'Amount of noise that is added before steps.', default_text='0'
    )
    S_min: float | None = opt(
        None, cli.FACTOR, 'Lowest noise level at which noise is added.', default_text='0'
    )
    S_max: float | None = opt(
        None,
        cli.Number(min=0, infinite=True),
        'Highest noise level at which noise is added.',
        default_text='inf',
    )
    S_noise: float | None = opt(None, cli.SIGNED_FACTOR, 'Scale of the added noise.', default_text='1')
    discretization: str | None = opt(
        None,
        click.Choice(['edm', 'vp', 've', 'iddpm', 'cosine', 'polynomial', 'logsnr', 'time_uniform']),
        'Spacing of the noise levels: edm, vp, ve, iddpm as in EDM, each over its own range, or polynomial, '
        'logsnr, time_uniform, cosine from 0.002 to 80.',
        flags=('--disc',),
        default_text='edm; dpmpp, unipc logsnr; deis time_uniform',
    )
    sigmas: list[float] | None = opt(
        None,
        LevelList(),
        'Noise levels to sample at, in place of a spacing: falling numbers, as in 80,5.8,0.9,0.002, or a '
        'text file of them, as search.py --schedule writes. The image is the state at the last, or at 0; '
        'also for flow maps, whose last step always ends at 0.',
        metavar='LIST|FILE',
    )
    to_zero: bool | None = opt(
        None,
        SWITCH,
        'End with a step to 0, the denoised image at the lowest noise level, and not at that level.',
        default_text='euler and heun without --sigmas on, others off',
    )
    afs: bool | None = opt(
        None,
        SWITCH,
        'Analytical first step: the slope of data of unit variance in place of the first evaluation.',
        default_text='off',
    )
    order: int | None = opt(
        None,
        cli.Integer(min=1, max=4),
        'Order of a multistep solver: ipndm, ipndm_v, deis 1 to 4; dpmpp, unipc 2 or 3.',
        default_text='the highest',
    )
    variant: str | None = opt(
        None, click.Choice(['bh1', 'bh2']), 'Function B(h) of unipc.', default_text='bh2'
    )
    schedule: str | None = opt(
        None, click.Choice(['linear', 'vp', 've']), 'Noise schedule sigma(t).', default_text='linear'
    )
    scaling: str | None = opt(None, click.Choice(['none', 'vp']), 'Signal scaling s(t).', default_text='none')


GENERAL, OF_STUDENTS, OF_CMS, OF_TEACHERS = map(
    options_of, (GeneralOptions, StudentOptions, ConsistencyModelOptions, TeacherOptions)
)


# How the ODE of a teacher is solved, for commands that evaluate networks: the solver and its options.
OF_ODE = dict(
    solver=replace(GENERAL['solver'], kind=click.Choice(TEACHER_SOLVERS)),
    **{name: OF_TEACHERS[name] for name in ('order', 'afs', 'to_zero', 'discretization', 'sigmas')},
)


def sampling_options(heading: str = '') -> Callable[[Callable], Callable]:
    """A decorator for commands: all options of sampling a network, as a dict `sampling`.

    Args:
        heading: of the general options.
    """
    general = [option.under(heading) for option in GENERAL.values()]
    return gathered('sampling', [*general, *OF_STUDENTS.values(), *OF_CMS.values(), *OF_TEACHERS.values()])


def guidance_options() -> Callable[[Callable], Callable]:
    """A decorator for commands: the options of guidance, as `GuidanceOptions` called `guidance`."""
    return gathered('guidance', list(options_of(GuidanceOptions).values()), checked)


def sampling_arguments(
    net,
    network: str,
    class_idx: int | None = None,
    solver: str | None = None,
    steps: int | None = None,
    force_steps: bool = False,
    labels: str | None = None,
    choose_labels=None,
    **options,
) -> dict:
    """Arguments of `generation.generate_batch` from the values of `sampling_options`.

    Args:
        choose_labels: a chooser, in place of `class_idx` and `labels`.
    Raises: UserError if they do not fit the network.
    """
    from sampling import label_choosers
    from torch_utils import distributed
    from training import guidance, samplers

    # None means the sampler's own default.
    options = {name: value for name, value in options.items() if value is not None}
    solver, options = follow_search(net, solver, options)
    # Resolving checks them against the network, before the first batch.
    chosen, steps = samplers.resolve(net, solver, steps, force_steps, **options)
    if solver == 'best' and distributed.is_main():
        click.echo(f'--solver=best: {guidance.describe(net, chosen, steps, **options)}.', err=True)
    choose_labels = choose_labels or label_choosers.choose(net, network, class_idx, labels)
    return dict(choose_labels=choose_labels, solver=chosen, steps=steps, force_steps=force_steps, **options)


# ----------------------------------------------------------------------------
# Editing.


@dataclass(frozen=True)
class EditJob:
    """What all edits of images need; `sampling` is that of `editing_options`."""

    heading: ClassVar[str] = ''

    network: str | None = opt(
        None, NETWORK_FILE, 'Snapshot of a student or a consistency model.', required=True
    )
    path: str | None = opt(
        None,
        cli.PATH,
        'An image, or a folder, zip or array of images; labels of its dataset.json are used.',
        flags=('--input',),
        required=True,
    )
    outdir: str | None = opt(
        None, cli.PATH, 'Folder for images/NAME-SEED.png and grid.png.', metavar='DIR', required=True
    )
    indices: list[int] | None = opt(
        None, cli.IntRanges(), 'Images of the input by their place in it, as in 0-7.', default_text='all'
    )
    seeds: list[int] | str = opt('0', cli.Seeds(), 'Seeds; each image is edited once for every seed.')
    batch: int = opt(64, cli.BATCH, 'Images per batch.')
    sampling: dict = field(default_factory=dict)


def editing_options(steps: str) -> Callable[[Callable], Callable]:
    """A decorator for commands: the options that all edits of images have, as an `EditJob` called `job`.

    Args:
        steps: the default number, in words.
    """
    # Only students and consistency models edit, so the solvers are fewer.
    general = dict(
        GENERAL,
        steps=replace(GENERAL['steps'], default_text=steps),
        solver=replace(
            GENERAL['solver'],
            kind=click.Choice(EDITING_SOLVERS),
            help='Method of sampling.',
            default_text='what the snapshot is',
        ),
    )
    shared = [*general.values(), *OF_STUDENTS.values(), *OF_CMS.values()]
    own = options_of(EditJob)

    def job_of(**values) -> EditJob:
        # What is no option of the job is one of sampling.
        return EditJob(**{name: values.pop(name) for name in own}, sampling=values)

    return gathered('job', [*own.values(), *shared], job_of)
