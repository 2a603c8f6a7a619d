"""The options of sampling a network, which command lines share, as data. Imports no torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import click

from dnnlib import cli

STUDENT, CM, TEACHER = 'Students', 'Consistency models (--solver=cm)', 'Teachers (probability-flow ODE)'
SOLVERS, EDITING_SOLVERS = ['student', 'euler', 'heun', 'addim', 'cm'], ['student', 'cm']
CM_EDIT_STEPS = (
    40  # of edits by consistency models of one step: more heed more of what is known (docs/editing.md)
)
SWITCH = None  # the type of an option that has no value


class SharedOption(NamedTuple):
    """An option of several commands, which is also the decorator that adds it to one.

    Attributes:
        name: of the command's argument.
        flags: as the command line has it.
        type: of its value.
        help: with its default in words, which is what None means.
        metavar: what --help shows for the value; None: the type's own.
        group: heading in --help; None: the general ones.
        default: of the argument, which --help shows where the option takes a value; None: the one in `help`.
        required: whether it must be given.
    """

    name: str
    flags: str
    type: click.ParamType | None
    help: str
    metavar: str | None = None
    group: str | None = None
    default: object = None
    required: bool = False

    def __call__(self, command: Callable) -> Callable:
        if self.type is SWITCH:
            kind = dict(is_flag=True, default=self.default)
        else:
            kind = dict(type=self.type, metavar=self.metavar, required=self.required)
            if self.default is not None:
                kind |= dict(default=self.default, show_default=True)
        return cli.option(self.flags, self.name, group=self.group, help=self.help, **kind)(command)

    def under(self, group: str | None) -> SharedOption:
        """The same under another heading."""
        return self._replace(group=group)


def gathered(name: str, options: Sequence[SharedOption]) -> Callable[[Callable], Callable]:
    """A decorator: adds the options to a command; their values are one dict, the argument `name`."""

    def decorate(command):
        @functools.wraps(command)
        def gathering(**values):
            own = {option.name: values.pop(option.name) for option in options}
            return command(**{name: own}, **values)

        for option in reversed(options):
            gathering = option(gathering)
        return gathering

    return decorate


CLASS = SharedOption(
    'class_idx', '--class', cli.Integer(min=0), 'Class of all images.  [default: random, by seed]', 'INT'
)
LABELS = SharedOption(
    'labels',
    '--labels',
    cli.PATH,
    'Draw labels, by seed, from a file of class indices [N] or vectors [N, D], or, with data, from those '
    'of the training set.  '
    '[default: classes that have images, uniformly]',
    'NPY|data',
)
CLIP = SharedOption(
    'clip_denoised',
    '--clip_denoised/--no_clip_denoised',
    SWITCH,
    'Clamp every image that the network gives to [-1, 1], as Song et al. do and ECT and TCM do not.  '
    "[default: the snapshot's; on]",
    group=CM,
)

# The names are those of `samplers.sample`'s arguments and options. Steps and solver: see `sampling_options`.
RANGE = (
    SharedOption('sigma_min', '--sigma_min', cli.SIGMA, 'Lowest noise level.  [default: varies]', 'FLOAT'),
    SharedOption('sigma_max', '--sigma_max', cli.SIGMA, 'Highest noise level.  [default: varies]', 'FLOAT'),
    SharedOption('rho', '--rho', cli.RHO, 'Exponent of the noise levels.  [default: 7]', 'FLOAT'),
)
OF_STUDENTS = (
    SharedOption(
        'force_steps',
        '--force-steps',
        SWITCH,
        'Sample a student with another number of steps than it was trained for.',
        group=STUDENT,
        default=False,
    ),
)
OF_CMS = (
    SharedOption(
        'taus',
        '--taus',
        cli.NumberList(cli.SIGMA),
        'Noise levels of the evaluations after the first, at sigma_max, as in 2.5,0.8.',
        'LIST',
        CM,
    ),
    SharedOption('mid_t', '--mid_t', cli.SIGMA, 'Noise level of the second of two evaluations.', 'FLOAT', CM),
    SharedOption(
        'ts',
        '--ts',
        cli.NumberList(cli.INDEX),
        'Noise levels of the evaluations by their indices among --timesteps levels, as in 0,22,39.',
        'LIST',
        CM,
    ),
    SharedOption(
        'timesteps',
        '--timesteps',
        cli.LEVELS,
        "Number of levels that --ts counts in.  [default: the snapshot's; 40]",
        'INT',
        CM,
    ),
    CLIP,
)
OF_TEACHERS = (
    SharedOption(
        'xvar_scale',
        '--xvar_scale',
        cli.FACTOR,
        'Factor on the variance that --solver=addim adds; 0 is DDIM.  [default: 1]',
        'FLOAT',
        TEACHER,
    ),
    SharedOption(
        'S_churn',
        '--S_churn',
        cli.FACTOR,
        'Amount of noise that is added before steps.  [default: 0]',
        'FLOAT',
        TEACHER,
    ),
    SharedOption(
        'S_min',
        '--S_min',
        cli.FACTOR,
        'Lowest noise level at which noise is added.  [default: 0]',
        'FLOAT',
        TEACHER,
    ),
    SharedOption(
        'S_max',
        '--S_max',
        cli.Number(min=0, infinite=True),
        'Highest noise level at which noise is added.  [default: inf]',
        'FLOAT',
        TEACHER,
    ),
    SharedOption(
        'S_noise', '--S_noise', cli.SIGNED_FACTOR, 'Scale of the added noise.  [default: 1]', 'FLOAT', TEACHER
    ),
    SharedOption(
        'discretization',
        '--disc',
        click.Choice(['edm', 'vp', 've', 'iddpm', 'cosine']),
        'Spacing of the noise levels.  [default: edm]',
        group=TEACHER,
    ),
    SharedOption(
        'schedule',
        '--schedule',
        click.Choice(['linear', 'vp', 've']),
        'Noise schedule sigma(t).  [default: linear]',
        group=TEACHER,
    ),
    SharedOption(
        'scaling',
        '--scaling',
        click.Choice(['none', 'vp']),
        'Signal scaling s(t).  [default: none]',
        group=TEACHER,
    ),
)


def sampling_options(
    group: str | None = None,
    teachers: bool = True,
    steps: str = "a student's own; 1 for a consistency model; 18 for a teacher",
) -> Callable[[Callable], Callable]:
    """A decorator for commands: the options of sampling a network, as a dict `sampling`.

    Args:
        group: heads the general ones.
        teachers: whether those of teachers are among them.
        steps: the default number, in words.
    """
    what_it_is = 'what the snapshot is'
    if teachers:
        what_it_is += ': student, cm for a consistency model, heun for a teacher'
    kind = click.Choice(SOLVERS if teachers else EDITING_SOLVERS)
    general = (
        CLASS,
        LABELS,
        SharedOption('steps', '--steps', cli.STEPS, f'Number of sampling steps.  [default: {steps}]', 'INT'),
        SharedOption('solver', '--solver', kind, f'Method of sampling.  [default: {what_it_is}]'),
        *RANGE,
    )
    options = (*(option.under(group) for option in general), *OF_STUDENTS, *OF_CMS)
    return gathered('sampling', (*options, *OF_TEACHERS) if teachers else options)


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
    """What `generation.generate_batch` takes, from the values of `sampling_options`.

    Args:
        choose_labels: a chooser that takes the place of `class_idx` and `labels`.
    Raises: UserError where they do not fit the network.
    """
    from sampling import label_choosers
    from training import samplers

    options = {name: value for name, value in options.items() if value is not None}
    solver, steps = samplers.resolve(net, solver, steps, force_steps, **options)
    choose_labels = choose_labels or label_choosers.choose(net, network, class_idx, labels)
    return dict(choose_labels=choose_labels, solver=solver, steps=steps, force_steps=force_steps, **options)
