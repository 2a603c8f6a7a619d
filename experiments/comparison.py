"""The plan of a comparison: which networks to train, for how many steps, and how to sample each.

Only computes; it trains nothing and reads no files. The unit of the budget is one network evaluation per
batch element; a student's forward and backward pass counts 3 (`Objective.cost`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import click

from dnnlib import UserError, cli
from experiments import bundled
from experiments.bundled import Bundled
from experiments.teacher import COUNTS, TeacherSampling, few_evaluations
from training import command_line
from training.objectives import OBJECTIVES

STUDENTS = [name for name, objective in OBJECTIVES.items() if objective.loss]
# Parameters of train.py that compare.py sets: input, output, and what is saved when.
SET_BY_COMPARE = {
    'outdir',
    'nosubdir',
    'desc',
    'data',
    'consistency',
    'teacher',
    'transfer',
    'S',
    'resume',
    'resume_override',
    'tick',
    'snap',
    'dump',
    'keep',
    'dry_run',
}
# Arguments of a network that follow from data, augmentation and precision, not from its architecture.
NOT_ARCHITECTURE = {'img_resolution', 'img_channels', 'label_dim', 'augment_dim', 'use_fp16', 'use_bf16'}
# Progressive distillation starts from this multiple of the largest number of steps, because its teacher takes
# DDIM steps, which are less accurate than Heun's.
FINER = 8
PLACEHOLDER = 'a.pkl'  # path in options that are parsed but not used


@dataclass(frozen=True)
class Training:
    """A run of train.py.

    Attributes:
        name: name of its folder.
        objective: objective that it trains.
        options: options of train.py except for SET_BY_COMPARE.
        start: option that names the snapshot it starts from; None for random weights.
        after: the training whose snapshot that is; None for the teacher's.
        steps, cost: number of optimizer steps; network evaluations per image of a step.
        batch: images per step.
        rounds: (folder, steps up to its end) of each student that the training makes; the folder is relative,
            '' for the training's own.
        first_cost: network evaluations per batch element at the start.
    """

    name: str
    objective: str
    options: tuple[str, ...]
    start: str | None
    after: Training | None
    steps: int
    cost: int
    batch: int
    rounds: tuple[tuple[str, int], ...]
    first_cost: float = 0

    @property
    def evaluations(self) -> int:
        """Network evaluations per batch element, including those of the training before it."""
        return self.spent(self.steps)

    def spent(self, steps: int) -> int:
        """The same up to a number of its steps."""
        own = steps * self.cost + self.first_cost
        return own + (self.after.evaluations if self.after else 0)

    @property
    def chain(self) -> list[Training]:
        """The trainings that lead to this one, and itself, in order."""
        return [*(self.after.chain if self.after else []), self]


@dataclass(frozen=True)
class Model:
    """A network and how to sample it: a cell of the table.

    Attributes:
        objective, seed: objective and seed of its training; the teacher's seed is None.
        training: the training that makes it; None for the teacher.
        round: index of the training's round.
        S: number of steps it is trained for; None if it takes any number.
        solver, steps: sampling options.
        nfe: network evaluations per image.
        sampling: of the teacher, which has the same three.
    """

    objective: str
    seed: int | None
    training: Training | None
    round: int
    S: int | None
    solver: str
    steps: int
    nfe: int
    sampling: TeacherSampling | None = None

    @property
    def draws_noise(self) -> bool:
        """Whether noise is drawn between steps, so that its images are no function of latent and label."""
        return self.solver in ('cm', 'ancestral') and self.steps > 1

    @property
    def name(self) -> str:
        """Name in tables and of files."""
        return self.sampling.name if self.sampling else f'{self.objective}-seed{self.seed}-{self.nfe}'

    def record(self) -> dict:
        """The entries of a row of the results that describe the model."""
        facts = dict(
            model=self.name,
            objective=self.objective,
            S=self.S,
            solver=self.solver,
            nfe=self.nfe,
            seed=self.seed,
        )
        if self.sampling:
            return dict(facts, searched=self.sampling.searched)

        # What was spent up to this round, including the training before it.
        steps = self.training.rounds[self.round][1]
        earlier = self.training.after
        return dict(
            facts,
            train_steps=steps + (earlier.steps if earlier else 0),
            cost=self.training.cost,
            evaluations=self.training.spent(steps),
        )


@dataclass(frozen=True)
class Request:
    """What to compare.

    Attributes:
        objectives, steps, seeds: each objective is trained with each seed and sampled in each number of
            steps.
        budget: network evaluations per batch element for all trainings behind one cell of the table.
        batch: images per optimizer step.
        cond: whether the teacher, and with it every student, is class-conditional.
        network: options that make the teacher's network, for objectives that only start from its weights.
        recipe: whether to use the options that suit bundled data sets instead of train.py's defaults.
        for_all: options for every training.
        for_some: further options by the name of an objective, or `<objective>-<S>`.
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
    """All models of a comparison.

    Raises: UserError if the budget is too small, click.UsageError if options contradict each other.
    """
    # Names that `for_some` may have; tcm has a first stage of ect.
    single = [
        name
        for name in request.objectives
        if OBJECTIVES[name].fixed_steps and 'S_start' not in OBJECTIVES[name].own_defaults
    ]
    known = {
        *request.objectives,
        *(f'{name}-{S}' for name in single for S in request.steps),
        *(['ect'] if 'tcm' in request.objectives else []),
    }
    if unknown := sorted(request.for_some.keys() - known):
        raise click.UsageError(
            f'--with={unknown[0]}:...: no training has that name; choose from {", ".join(sorted(known))}.'
        )
    return [
        model
        for seed in request.seeds
        for objective in request.objectives
        for model in models_of(request, objective, seed)
    ]


def models_of(request: Request, objective: str, seed: int) -> list[Model]:
    """The models of an objective, one for each number of sampling steps."""
    known, name = OBJECTIVES[objective], f'{objective}-seed{seed}'

    # A student of one step has no other column.
    if known.one_step:
        training = make_training(request, name, objective, seed, request.budget)
        return [Model(objective, seed, training, 0, 1, 'student', 1, 1)]

    # A flow map or a consistency model is trained once for all numbers of steps, in two stages if its teacher is one.
    if not known.fixed_steps:
        first = None
        if known.teacher == 'consistency':
            first = make_training(request, f'{name}-stage1', 'ect', seed, request.budget // 2)
        training = make_training(
            request, name, objective, seed, request.budget - (first.evaluations if first else 0), after=first
        )
        solver = 'student' if known.config().two_time else 'cm'
        return [Model(objective, seed, training, 0, None, solver, steps, steps) for steps in request.steps]

    # Progressive distillation makes students of all its numbers of steps on the way.
    if 'S_start' in known.own_defaults:
        training = halving_training(request, name, objective, seed)
        made = [int(folder[1:]) for folder, _ in training.rounds]
        return [Model(objective, seed, training, made.index(S), S, 'student', S, S) for S in request.steps]

    # Otherwise one training for each number of steps.
    trainings = {
        S: make_training(request, f'{objective}-{S}-seed{seed}', objective, seed, request.budget, S)
        for S in request.steps
    }
    return [Model(objective, seed, training, 0, S, known.solver, S, S) for S, training in trainings.items()]


def make_training(
    request: Request,
    name: str,
    objective: str,
    seed: int,
    budget: int,
    S: int | None = None,
    after: Training | None = None,
) -> Training:
    """A training with as many steps as a budget allows."""
    # Later options override earlier ones.
    start = '--teacher' if OBJECTIVES[objective].teacher else '--transfer'
    fixed = [*fixed_options(request, objective, seed), *([f'--S={S}'] if S else [])]
    options = [
        *recipe_options(request, objective, S),
        *user_options(request, objective, S, {*parameter_names(fixed), 'duration'}),
        *fixed,
    ]

    # The cost of a step decides their number.
    cost, first_cost = cost_of(name, [*options, f'{start}={PLACEHOLDER}'])
    steps = affordable(name, budget, cost, first_cost)
    options.append(f'--duration={steps * request.batch / 1e6!r}')
    lengths = steps, cost, request.batch, (('', steps),), first_cost
    return Training(name, objective, tuple(options), start, after, *lengths)


def halving_training(request: Request, name: str, objective: str, seed: int) -> Training:
    """Progressive distillation down to the fewest sampling steps, whose rounds share the budget."""
    from training.objectives.time_schedules import halving_rounds

    # From FINER times the most steps down to the fewest.
    most, least = FINER * max(request.steps), min(request.steps)
    fixed = [*fixed_options(request, objective, seed), f'--S_start={most}', f'--S={least}']
    options = [
        *recipe_options(request, objective),
        *user_options(request, objective, None, {*parameter_names(fixed), 'stage_steps'}),
        *fixed,
    ]

    # Every requested number of steps must be one of the rounds.
    try:
        units = halving_rounds(most, least, 1)
    except ValueError as error:
        raise click.UsageError(
            f'--objectives={objective}: {error}. Give --steps that are halves of each other, or leave it out.'
        ) from error
    if odd := sorted(set(request.steps) - {S for S, _ in units}):
        raise click.UsageError(
            f'--objectives={objective}: {odd[0]} in --steps is not {most} halved some number of times. Leave '
            'one of them out.'
        )

    # Rounds of one and two sampling steps are longer: `units` counts in ordinary rounds.
    cost, _ = cost_of(name, [*options, f'--teacher={PLACEHOLDER}'])
    stage_steps = affordable(name, request.budget, cost * sum(count for _, count in units))

    # Folders of the rounds and steps up to their ends.
    rounds, so_far = [], 0
    for S, steps in halving_rounds(most, least, stage_steps):
        so_far += steps
        rounds.append((f'S{S:04d}', so_far))
    return Training(
        name,
        objective,
        (*options, f'--stage_steps={stage_steps}'),
        '--teacher',
        None,
        so_far,
        cost,
        request.batch,
        tuple(rounds),
    )


def affordable(name: str, budget: int, cost: float, first_cost: float = 0) -> int:
    """How many steps a budget pays for. Raises: UserError if there is none."""
    if budget < cost + first_cost:
        raise UserError(
            f'--budget: {budget} network evaluations do not pay for one step of {name}, which takes '
            f'{cost + first_cost:g}. Raise it.'
        )
    return int((budget - first_cost) // cost)


# ----------------------------------------------------------------------------
# Options of train.py.


def fixed_options(request: Request, objective: str, seed: int) -> list[str]:
    """Options that the comparison sets for every training, except for its duration."""
    return [
        f'--objective={objective}',
        f'--batch={request.batch}',
        f'--cond={int(request.cond)}',
        f'--seed={seed}',
    ]


def recipe_options(request: Request, objective: str, S: int | None = None) -> list[str]:
    """Defaults that suit an objective, which all other options override."""
    # Objectives without a teacher start from its weights, which must fit their network.
    options = [] if OBJECTIVES[objective].teacher else list(request.network)
    if request.recipe:
        options += [*bundled.COMMON, *bundled.student_options(objective, S)]
    if OBJECTIVES[objective].config().two_time:
        options.append(f'--steps={",".join(map(str, sorted(request.steps)))}')
    return options


def user_options(request: Request, objective: str, S: int | None, fixed: set[str]) -> list[str]:
    """The user's options for a training. Raises: click.UsageError for those that the comparison sets."""
    options = [
        *request.for_all,
        *request.for_some.get(objective, []),
        *(request.for_some.get(f'{objective}-{S}', []) if S else []),
    ]
    # Some would break the equal budget, others the names of folders.
    for name in parameter_names(options):
        if name in fixed | SET_BY_COMPARE:
            raise click.UsageError(f'--{name} of train.py is for compare.py to decide: leave it out.')
    return options


def parameter_names(options: Sequence[str]) -> list[str]:
    """The parameters of train.py that options set."""
    command = command_line.command()
    parser = command.make_parser(click.Context(command, info_name='train.py'))
    # Parsed by the command of train.py, so that every spelling of an option is recognized.
    try:
        _, rest, given = parser.parse_args(cli.as_declared(command, list(options)))
    except click.UsageError as error:
        raise click.UsageError(f'{" ".join(options)}: {error.format_message()}') from error
    if rest:
        raise click.UsageError(
            f'{rest[0]!r} is not an option of train.py; options for a training look like --lr=1e-4.'
        )
    return [parameter.name for parameter in given]


def cost_of(name: str, options: Sequence[str]) -> tuple[float, float]:
    """Network evaluations per image of a step with these options, and once at the start."""
    # Paths are placeholders: the cost follows from the options alone.
    try:
        own = command_line.parse([f'--outdir={PLACEHOLDER}', f'--data={PLACEHOLDER}', *options]).own
        return own.cost(), own.first_cost()
    except click.UsageError as error:
        raise click.UsageError(f'{name}: {error.format_message()}') from error


def teacher_training(data: Bundled) -> Training:
    """The training of a bundled data set's teacher; of digits, with the options of demo.py."""
    options = [*bundled.COMMON, *data.network, *data.teacher, '--cond=1', '--seed=0', f'--batch={data.batch}']
    duration = f'--duration={data.teacher_steps * data.batch / 1e6!r}'
    return Training(
        'teacher',
        'diffusion',
        (*options, duration),
        None,
        None,
        data.teacher_steps,
        3,  # evaluations per image of a step
        data.batch,
        (('', data.teacher_steps),),
    )


def teacher_models(steps: Sequence[int], reference_steps: int) -> list[Model]:
    """The teacher as a model: with many Heun steps, the reference of all others; with as many evaluations as
    the students, and in between as in `teacher.COUNTS`, by the solvers of `few_evaluations`, and by Heun where
    one evaluation less is allowed.
    """
    counts = {*steps, *(n for n in COUNTS if n <= max(steps))}
    # Heun with (n + 1) // 2 steps takes n evaluations, or one less.
    few = sorted({(n + 1) // 2 for n in steps} - {1, reference_steps})
    samplings = [
        TeacherSampling('heun', reference_steps, 2 * reference_steps - 1),
        *few_evaluations(counts),
        *(TeacherSampling('heun', n, 2 * n - 1) for n in few),
    ]
    return [Model('diffusion', None, None, 0, None, s.solver, s.steps, s.nfe, s) for s in samplings]


def starting_from_weights(objectives: Sequence[str]) -> list[str]:
    """Those of the objectives whose training, or its first stage, is initialized with the teacher's weights:
    they need options that make its network."""
    return [name for name in objectives if OBJECTIVES[name].teacher != 'diffusion']


def network_options(net, objectives: Sequence[str]) -> list[str]:
    """Options of train.py that make a network like `net`, so that its weights fit.

    Raises: UserError, naming the `objectives` that need them, if there are none.
    """
    from training.architectures import ARCHITECTURES, EDM2
    from training.checkpoint import constructor_arguments
    from training.starting_point import NETWORK_OPTIONS, as_list, default_of

    # What decides the architecture.
    kwargs = {
        name: as_list(value)
        for name, value in constructor_arguments(net).items()
        if name not in NOT_ARCHITECTURE
    }
    kwargs.setdefault('model_type', type(net.model).__name__)

    # An architecture fits if it agrees in all arguments that no option sets.
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
