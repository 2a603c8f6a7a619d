"""The options that say how a network is sampled, which command lines share. Imports no torch."""

from __future__ import annotations

import functools

import click

from dnnlib import cli

STUDENT, CM, TEACHER = 'Students', 'Consistency models (--solver=cm)', 'Teachers (probability-flow ODE)'


def class_option(group: str | None = None):
    return cli.option(
        '--class',
        'class_idx',
        metavar='INT',
        type=cli.Integer(min=0),
        group=group,
        help='Class of all images.  [default: random, by seed]',
    )


def labels_option(group: str | None = None):
    return cli.option(
        '--labels',
        metavar='NPY|data',
        type=cli.PATH,
        group=group,
        help='Draw labels, by seed, from a file, class indices [N] or vectors [N, D]; or from those of the training set: data.  '
        '[default: classes that have images, uniformly]',
    )


def clip_option(group: str | None = None):
    """The option whether a consistency model's images are clamped between evaluations."""
    return cli.option(
        '--clip_denoised/--no_clip_denoised',
        'clip_denoised',
        default=None,
        group=group,
        help='Clamp every image that the network gives to [-1, 1], as Song et al. do and ECT and TCM do not.  '
        "[default: the snapshot's; on]",
    )


def sampling_options(
    group: str | None = None,
    teachers: bool = True,
    steps: str = "a student's own; 1 for a consistency model; 18 for a teacher",
):
    """A decorator for commands: the options that say how a network is sampled, as a dict `sampling`. `group` heads the general ones.

    Args:
        teachers: whether those of teachers are among them.
        steps: the default number, in words.
    """
    solvers, what_it_is = ['student', 'cm'], 'what the snapshot is'
    if teachers:
        solvers, what_it_is = (
            ['student', 'euler', 'heun', 'addim', 'cm'],
            f'{what_it_is}: student, cm for a consistency model, heun for a teacher',
        )
    general, student, cm, teacher = (dict(group=name) for name in (group, STUDENT, CM, TEACHER))
    options = [
        class_option(group),
        labels_option(group),
        cli.option(
            '--steps', metavar='INT', type=cli.STEPS, **general, help=f'Sampling steps.  [default: {steps}]'
        ),
        cli.option(
            '--solver', type=click.Choice(solvers), **general, help=f'Sampler.  [default: {what_it_is}]'
        ),
        cli.option(
            '--sigma_min',
            metavar='FLOAT',
            type=cli.SIGMA,
            **general,
            help='Lowest noise level.  [default: varies]',
        ),
        cli.option(
            '--sigma_max',
            metavar='FLOAT',
            type=cli.SIGMA,
            **general,
            help='Highest noise level.  [default: varies]',
        ),
        cli.option(
            '--rho',
            metavar='FLOAT',
            type=cli.RHO,
            **general,
            help='Exponent of the noise levels.  [default: 7]',
        ),
        cli.option(
            '--force-steps',
            is_flag=True,
            **student,
            help='Sample a student with another number of steps than it was trained for.',
        ),
        cli.option(
            '--taus',
            metavar='LIST',
            type=cli.NumberList(cli.SIGMA),
            **cm,
            help='Noise levels after sigma_max to ask at, as in 2.5,0.8.',
        ),
        cli.option('--mid_t', metavar='FLOAT', type=cli.SIGMA, **cm, help='A single one, for two steps.'),
        cli.option(
            '--ts',
            metavar='LIST',
            type=cli.NumberList(cli.INDEX),
            **cm,
            help='The same by indices of --timesteps levels, as in 0,22,39.',
        ),
        cli.option(
            '--timesteps',
            metavar='INT',
            type=cli.LEVELS,
            **cm,
            help="Levels that --ts counts in.  [default: the snapshot's; 40]",
        ),
        clip_option(CM),
    ]
    options += (
        []
        if not teachers
        else [
            cli.option(
                '--xvar_scale',
                metavar='FLOAT',
                type=cli.FACTOR,
                **teacher,
                help='Of --solver=addim: factor on the variance that it adds; 0 is DDIM.  [default: 1]',
            ),
            cli.option(
                '--S_churn',
                'S_churn',
                metavar='FLOAT',
                type=cli.FACTOR,
                **teacher,
                help='Amount of noise added.  [default: 0]',
            ),
            cli.option(
                '--S_min',
                'S_min',
                metavar='FLOAT',
                type=cli.FACTOR,
                **teacher,
                help='Lowest noise level with added noise.  [default: 0]',
            ),
            cli.option(
                '--S_max',
                'S_max',
                metavar='FLOAT',
                type=cli.Number(min=0, infinite=True),
                **teacher,
                help='Highest such level.  [default: inf]',
            ),
            cli.option(
                '--S_noise',
                'S_noise',
                metavar='FLOAT',
                type=cli.SIGNED_FACTOR,
                **teacher,
                help='Scale of the added noise.  [default: 1]',
            ),
            cli.option(
                '--disc',
                'discretization',
                type=click.Choice(['edm', 'vp', 've', 'iddpm', 'cosine']),
                **teacher,
                help='Time steps.  [default: edm]',
            ),
            cli.option(
                '--schedule',
                type=click.Choice(['linear', 'vp', 've']),
                **teacher,
                help='Noise schedule sigma(t).  [default: linear]',
            ),
            cli.option(
                '--scaling',
                type=click.Choice(['none', 'vp']),
                **teacher,
                help='Signal scaling s(t).  [default: none]',
            ),
        ]
    )

    def decorate(command):
        @functools.wraps(command)
        def collected(**values):
            return command(sampling={name: values.pop(name) for name in names}, **values)

        for option in reversed(options):
            collected = option(collected)
        names = [parameter.name for parameter in collected.__click_params__[-len(options) :]]
        return collected

    return decorate


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
    """What `generation.generate_batch` takes, from the values of `sampling_options`. Raises: UserError where they do not fit the network.

    `choose_labels`: a chooser that takes the place of what `class_idx` and `labels` say.
    """
    from sampling import label_choosers
    from training import samplers

    options = {name: value for name, value in options.items() if value is not None}
    solver, steps = samplers.resolve(net, solver, steps, force_steps, **options)
    choose_labels = choose_labels or label_choosers.choose(net, network, class_idx, labels)
    return dict(choose_labels=choose_labels, solver=solver, steps=steps, force_steps=force_steps, **options)
