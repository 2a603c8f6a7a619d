"""The plan of a comparison: which networks to train, for how many steps, and how each is sampled. Pure: from
options to trainings.

The unit of the budget is a network evaluation for each place in the batch; a student's forward and backward
pass counts 3 (`Objective.cost`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import click

from dnnlib import UserError
from experiments import digits
from training import command_line
from training.objectives import OBJECTIVES

OURS = {
    'outdir',
    'nosubdir',
    'desc',
    'data',
    'consistency',
    'teacher',
    'transfer',
    'resume',
    'resume_override',
    'tick',
    'snap',
    'dump',
    'keep',
    'dry_run',
}  # options of train.py that say where from, where to, and what is saved when
FROM_ELSEWHERE = {
    'img_resolution',
    'img_channels',
    'label_dim',
    'augment_dim',
    'use_fp16',
    'use_bf16',
}  # arguments of networks: data, precision
FINER = 8  # progressive distillation begins with so many times the largest number of steps, because its teacher's own steps are DDIM's
PLACE = '.'  # stands for a path in options that are only looked at


@dataclass(frozen=True)
class Training:
    """A run of train.py.

    Attributes:
        name: of its folder.
        objective: that it trains.
        options: of train.py that decide what it is: all but paths and what is saved when.
        start: option that names the snapshot it starts from; None: from nothing.
        after: the training whose snapshot that is; None: the teacher's.
        steps, cost: optimizer steps, and network evaluations for an image of one.
        batch: images of a step.
        stages: folders and steps so far of the students that one training makes one after another; '' is the
            training's own folder.
    """

    name: str
    objective: str
    options: tuple[str, ...]
    start: str | None
    after: Training | None
    steps: int
    cost: int
    batch: int
    stages: tuple[tuple[str, int], ...]

    @property
    def evaluations(self) -> int:
        """For each place in the batch, those of the training before it included."""
        return self.steps * self.cost + (self.after.evaluations if self.after else 0)

    @property
    def chain(self) -> list[Training]:
        """What has to be trained, one after another."""
        return [*(self.after.chain if self.after else []), self]


@dataclass(frozen=True)
class Model:
    """A network and a way to sample it: a place in the table.

    Attributes:
        objective, seed: of the training; the teacher's seed is None.
        training: that makes it; None: the teacher is given.
        stage: which of the training's stages.
        S: steps that it was trained for; None where it may take any number.
        solver, steps: of sampling.
        nfe: network evaluations of an image.
    """

    objective: str
    seed: int | None
    training: Training | None
    stage: int
    S: int | None
    solver: str
    steps: int
    nfe: int

    @property
    def name(self) -> str:
        """Of files."""
        return (
            f'{self.objective}-seed{self.seed}-{self.nfe}'
            if self.seed is not None
            else f'teacher-{self.solver}-{self.nfe}'
        )

    def record(self) -> dict:
        """What a row of the results says of the model."""
        facts = dict(
            model=self.name,
            objective=self.objective,
            S=self.S,
            solver=self.solver,
            nfe=self.nfe,
            seed=self.seed,
        )
        if self.seed is None:
            return facts
        steps = self.training.stages[self.stage][1]
        earlier = self.training.after
        spent = steps * self.training.cost + (earlier.evaluations if earlier else 0)
        return dict(
            facts,
            train_steps=steps + (earlier.steps if earlier else 0),
            cost=self.training.cost,
            evaluations=spent,
        )


@dataclass(frozen=True)
class Request:
    """What is to be compared.

    Attributes:
        objectives, steps, seeds: each objective is trained with each seed, and sampled in each number of
            steps.
        budget: network evaluations for each place in the batch, of the trainings behind one place in the
            table.
        batch: images of an optimizer step.
        cond: whether the teacher, and so everyone, knows classes.
        network: options that describe the teacher's network, for objectives that only start from its weights.
        recipe: whether the options are those that suit the digits; else train.py's defaults.
        for_all: options for every training.
        for_some: more of them, by the name of an objective or `<objective>-<S>`.
    """

    objectives: Sequence[str]
    steps: Sequence[int]
    seeds: Sequence[int]
    budget: int
    batch: int
    cond: bool
    network: Sequence[str]
    recipe: bool = False
    for_all: Sequence[str] = ()
    for_some: Mapping[str, Sequence[str]] = field(default_factory=dict)


def plan(request: Request) -> list[Model]:
    """All models of a comparison. Raises: UserError where the budget is too small, click.UsageError where
    options do not go together."""
    single = [
        name
        for name in request.objectives
        if 'S' in OBJECTIVES[name].options and 'S_start' not in OBJECTIVES[name].own
    ]
    known = {
        *request.objectives,
        *(f'{name}-{S}' for name in single for S in request.steps),
        *(['ect'] if 'tcm' in request.objectives else []),
    }
    if unknown := sorted(request.for_some.keys() - known):
        raise click.UsageError(
            f'--with={unknown[0]}:...: nothing of that name is compared; there are '
            f'{", ".join(sorted(known))}.'
        )
    return [
        model
        for seed in request.seeds
        for objective in request.objectives
        for model in models_of(request, objective, seed)
    ]


def models_of(request: Request, objective: str, seed: int) -> list[Model]:
    """One objective's models, one for each number of sampling steps."""
    known, name = OBJECTIVES[objective], f'{objective}-seed{seed}'
    if 'S' not in known.options:  # a consistency model: any number of steps
        first = None
        if known.teacher == 'consistency':  # the second stage of another one
            first = make_training(request, f'{name}-stage1', 'ect', seed, request.budget // 2)
        training = make_training(
            request, name, objective, seed, request.budget - (first.evaluations if first else 0), after=first
        )
        return [Model(objective, seed, training, 0, None, 'cm', steps, steps) for steps in request.steps]
    if 'S_start' in known.own:
        training = halving_training(request, name, objective, seed)
        made = [int(folder[1:]) for folder, _ in training.stages]
        return [Model(objective, seed, training, made.index(S), S, 'student', S, S) for S in request.steps]
    trainings = {
        S: make_training(request, f'{objective}-{S}-seed{seed}', objective, seed, request.budget, S)
        for S in request.steps
    }
    return [Model(objective, seed, training, 0, S, 'student', S, S) for S, training in trainings.items()]


def make_training(
    request: Request,
    name: str,
    objective: str,
    seed: int,
    budget: int,
    S: int | None = None,
    after: Training | None = None,
) -> Training:
    """As many steps of an objective as a budget allows."""
    start = '--teacher' if OBJECTIVES[objective].teacher else '--transfer'
    fixed = [*fixed_options(request, objective, seed), *([f'--S={S}'] if S else [])]
    words = [
        *recipe_of(request, objective, S),
        *own_options(request, objective, S, {*names_of(fixed), 'duration'}),
        *fixed,
    ]
    cost = cost_of(name, [*words, f'{start}={PLACE}'])
    steps = affordable(name, budget, cost)
    words.append(f'--duration={steps * request.batch / 1e6!r}')
    return Training(name, objective, tuple(words), start, after, steps, cost, request.batch, (('', steps),))


def halving_training(request: Request, name: str, objective: str, seed: int) -> Training:
    """Progressive distillation down to the smallest number of sampling steps, whose stages share the
    budget."""
    from training.objectives.time_schedules import halving_stages

    most, least = FINER * max(request.steps), min(request.steps)
    fixed = [*fixed_options(request, objective, seed), f'--S_start={most}', f'--S={least}']
    words = [
        *recipe_of(request, objective),
        *own_options(request, objective, None, {*names_of(fixed), 'stage_steps'}),
        *fixed,
    ]
    try:
        units = halving_stages(most, least, 1)
    except ValueError as error:
        raise click.UsageError(
            f'--objectives={objective}: {error}. Give --steps that are halves of each other, or leave it out.'
        ) from error
    if odd := sorted(set(request.steps) - {S for S, _ in units}):
        raise click.UsageError(
            f'--objectives={objective}: {odd[0]} of --steps is no half, quarter, ... of {most}. Leave one of '
            'them out.'
        )
    cost = cost_of(name, [*words, f'--teacher={PLACE}'])
    stage_steps = affordable(name, request.budget, cost * sum(count for _, count in units))
    stages, so_far = [], 0
    for S, steps in halving_stages(most, least, stage_steps):
        so_far += steps
        stages.append((f'S{S:04d}', so_far))
    return Training(
        name,
        objective,
        (*words, f'--stage_steps={stage_steps}'),
        '--teacher',
        None,
        so_far,
        cost,
        request.batch,
        tuple(stages),
    )


def affordable(name: str, budget: int, cost: int) -> int:
    """How often something can be done. Raises: UserError where it is never."""
    if budget < cost:
        raise UserError(
            f'--budget: {budget} network evaluations do not pay for one step of {name}, which takes {cost}. '
            'Give more.'
        )
    return int(budget // cost)


# ----------------------------------------------------------------------------
# Options of train.py.


def fixed_options(request: Request, objective: str, seed: int) -> list[str]:
    """What the comparison decides for every training; that of how long comes on top."""
    return [
        f'--objective={objective}',
        f'--batch={request.batch}',
        f'--cond={int(request.cond)}',
        f'--seed={seed}',
    ]


def recipe_of(request: Request, objective: str, S: int | None = None) -> list[str]:
    """What is fixed for nobody, but suits the objective: the first options, which all others override."""
    known = OBJECTIVES[objective]
    words = [] if known.teacher else list(request.network)
    if request.recipe:
        words += [*digits.COMMON, *digits.student_options(objective, S)]
    return words


def own_options(request: Request, objective: str, S: int | None, fixed: set[str]) -> list[str]:
    """The user's options for a training. Raises: click.UsageError where they are those that the comparison
    has to decide."""
    words = [
        *request.for_all,
        *request.for_some.get(objective, []),
        *(request.for_some.get(f'{objective}-{S}', []) if S else []),
    ]
    for name in names_of(words):
        if name in fixed | OURS:
            raise click.UsageError(f'--{name} of train.py is for compare.py to decide: leave it out.')
    return words


def names_of(words: Sequence[str]) -> list[str]:
    """The parameters of train.py that options set."""
    command = command_line.command()
    try:
        _, rest, given = command.make_parser(click.Context(command, info_name='train.py')).parse_args(
            list(words)
        )
    except click.UsageError as error:
        raise click.UsageError(f'{" ".join(words)}: {error.format_message()}') from error
    if rest:
        raise click.UsageError(
            f'{rest[0]!r} is no option of train.py; those for a training look like --lr=1e-4.'
        )
    return [parameter.name for parameter in given]


def cost_of(name: str, words: Sequence[str]) -> float:
    """Network evaluations for an image, by the options."""
    try:
        return command_line.parse([f'--outdir={PLACE}', f'--data={PLACE}', *words]).own.cost()
    except click.UsageError as error:
        raise click.UsageError(f'{name}: {error.format_message()}') from error


def teacher_training() -> Training:
    """That of the digits' teacher, the one of demo.py."""
    options = [*digits.COMMON, *digits.TEACHER, '--cond=1', '--seed=0', f'--batch={digits.BATCH}']
    duration = f'--duration={digits.TEACHER_STEPS * digits.BATCH / 1e6!r}'
    return Training(
        'teacher',
        'diffusion',
        (*options, duration),
        None,
        None,
        digits.TEACHER_STEPS,
        3,
        digits.BATCH,
        (('', digits.TEACHER_STEPS),),
    )


def teacher_models(steps: Sequence[int], reference_steps: int) -> list[Model]:
    """The teacher in as many evaluations as its students (Heun: that or one less), and in many, first the
    reference that all are held against."""
    teacher = Model('diffusion', None, None, 0, None, 'heun', reference_steps, 2 * reference_steps - 1)
    euler = [replace(teacher, solver='euler', steps=n, nfe=n) for n in sorted(steps)]
    heun = [
        replace(teacher, steps=n, nfe=2 * n - 1)
        for n in sorted({(n + 1) // 2 for n in steps} - {1, reference_steps})
    ]
    return [teacher, *euler, *heun]


def starting_from_weights(objectives: Sequence[str]) -> list[str]:
    """Those of the objectives that, or whose first stage, begin with the teacher's weights in a network that
    options describe."""
    return [name for name in objectives if OBJECTIVES[name].teacher != 'diffusion']


def network_options(net, objectives: Sequence[str]) -> list[str]:
    """Options of train.py that make the network of a snapshot from scratch, so that its weights fit;
    `objectives` need them.

    Raises: UserError where there are none.
    """
    from training.architectures import ARCHITECTURES, EDM2
    from training.checkpoint import constructor_arguments
    from training.starting_point import NETWORK_OPTIONS, as_list, default_of

    kwargs = {
        name: as_list(value)
        for name, value in constructor_arguments(net).items()
        if name not in FROM_ELSEWHERE
    }
    kwargs.setdefault('model_type', type(net.model).__name__)
    default = lambda name: as_list(default_of(type(net.model), name) or default_of(type(net), name))
    text = lambda value: (','.join(map(str, value)) or 'none') if isinstance(value, list) else f'{value:g}'
    for arch, own in ARCHITECTURES.items():
        own = {'model_type': 'UNet', **own}
        others = (own.keys() | kwargs.keys()) - {*NETWORK_OPTIONS.values()}
        same = all(kwargs.get(name, default(name)) == own.get(name, default(name)) for name in others)
        if same and type(net).__name__ == (EDM2 if arch == 'edm2' else 'EDMPrecond'):
            values = {option: kwargs.get(name, default(name)) for option, name in NETWORK_OPTIONS.items()}
            return [
                f'--arch={arch}',
                *(f'--{option}={text(value)}' for option, value in values.items() if value is not None),
            ]
    raise UserError(
        f'--teacher: no options of train.py make its network, a {type(net).__name__} around a '
        f'{kwargs["model_type"]}, so that students cannot start from its weights: leave '
        f'{", ".join(objectives)} out of --objectives.'
    )
