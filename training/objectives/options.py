"""Options that several objectives share, and what an objective is to the command line.

Imports no PyTorch, so that `train.py --help` is fast. The options of a single objective stand in the file of
its loss.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import ClassVar

import click

from dnnlib import EasyDict, cli
from dnnlib.options import SWITCH, opt, options_of, recorded
from dnnlib.schema import Integer, Real
from training.choices import (
    DISTANCES,
    HOPS,
    SAMPLING_MODES,
    SEGMENT_SOLVERS,
    SIGMA_GRIDS,
    STUDENT_GRIDS,
    WEIGHT_MODES,
)
from training.guidance_options import GuidanceOptions
from training.saved_files import NETWORK_FILE

COUNT, POSITIVE_COUNT = Integer(0, 1 << 63), Integer(1, 1 << 63)


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Raises: click.UsageError in place of a ValueError of the block."""
    try:
        yield
    except ValueError as error:
        raise click.UsageError(str(error)) from error


@dataclass(frozen=True)
class Config:
    """The options of one objective.

    Class attributes:
        heading: of the options' group in --help.
        sampling: names of options that are recorded for samplers and not passed to the loss.
    """

    heading: ClassVar[str] = 'Objective'
    sampling: ClassVar[tuple[str, ...]] = ()

    sigma_data: float = recorded(0.5, Real(1e-6, 1e6))

    @classmethod
    def from_given(cls, given: Mapping[str, object]) -> Config:
        """The configuration with the given options. Raises: click.UsageError for contradictions."""
        return cls(**given)

    def cost(self) -> float:
        """Mean network evaluations per training image; the student's forward and backward pass counts 3."""
        return 3.0

    @property
    def differentiates(self) -> bool:
        """Whether the loss takes the network's derivative by the noise level."""
        return False

    @property
    def two_time(self) -> bool:
        """Whether the network also takes the noise level at which a step ends."""
        return False

    def first_cost(self) -> float:
        """Network evaluations for each image of a batch that come once, at the start, on top of those of steps."""
        return 0.0


# ----------------------------------------------------------------------------
# Noise levels, dropout and teachers.


@dataclass(frozen=True)
class NoiseRange(Config):
    heading: ClassVar[str] = 'Noise levels (all objectives but diffusion)'

    sigma_min: float = opt(0.002, cli.SIGMA, 'Lowest noise level above 0.')
    sigma_max: float = opt(80.0, cli.SIGMA, 'Highest noise level.')

    def __post_init__(self):
        if self.sigma_min >= self.sigma_max:
            raise click.UsageError(
                f'--sigma_min={self.sigma_min:g} is not below --sigma_max={self.sigma_max:g}.'
            )


@dataclass(frozen=True)
class NoiseGrid(NoiseRange):
    rho: float = opt(7.0, cli.RHO, 'Exponent of the Karras noise levels.')


@dataclass(frozen=True)
class SpacedGrid(NoiseGrid):
    sigma_grid: str = opt(
        'karras',
        click.Choice(SIGMA_GRIDS),
        "Spacing of nodes: Karras's, or even in the time of the cosine schedule.",
    )


@dataclass(frozen=True)
class SyncDropout(Config):
    heading: ClassVar[str] = 'Self-target (the output of the network itself, as a target)'

    sync_dropout: bool = opt(
        True, SWITCH, 'Give the self-target, where there is one, the dropout masks of the student.'
    )

    def cost(self) -> float:
        # The self-target, and the student's forward and backward pass.
        return 4


@dataclass(frozen=True)
class LogNormal(Config):
    heading: ClassVar[str] = 'Log-normal noise levels (--objective=diffusion, ict, ect, scd, sct, sid)'

    P_mean: float | None = opt(None, cli.Number(min=-100, max=100), 'Mean of ln sigma in training.')
    P_std: float | None = opt(
        None, cli.Number(min=0, max=100, min_open=True), 'Standard deviation of ln sigma in training.'
    )


@dataclass(frozen=True)
class Teacher(Config):
    heading: ClassVar[str] = 'Distillation (--objective=mcd, direct, pd, flowmap, cm-cd, tcm, scd, mm, sid)'

    teacher: str | None = opt(
        None,
        NETWORK_FILE,
        'Snapshot of the diffusion model to distill; pd: or of a student of 2 --S_start steps; tcm: of the '
        'consistency model to go on from.',
        key='teacher',
    )


@dataclass(frozen=True)
class GuidedTeacher(GuidanceOptions, Teacher):
    """A diffusion model, which may be guided."""


@dataclass(frozen=True)
class TeacherHop(GuidedTeacher):
    heading: ClassVar[str] = Teacher.heading

    hop: str = opt(
        'heun',
        click.Choice(HOPS),
        "The teacher's step from one noise level to the next (mcd, cm-cd, pd, flowmap); pd takes ddim or "
        'addim.',
    )
    xvar_frac: float = opt(
        0.75,
        cli.FACTOR,
        "With --hop=addim: share of the image's squared error that is put back as noise; 0 guesses it "
        'without the image.',
        needs=('hop', 'addim'),
    )


@dataclass(frozen=True)
class TeacherSolver(GuidedTeacher):
    heading: ClassVar[str] = Teacher.heading

    solver: str = opt(
        'heun',
        click.Choice(SEGMENT_SOLVERS),
        "The teacher's steps over a segment (direct) or a stored solution (flowmap): heun, 2 evaluations "
        'each, or ipndm, dpmpp, 1 each.',
        later=True,
    )


# ----------------------------------------------------------------------------
# Multistep students.


@dataclass(frozen=True)
class Targets(SpacedGrid):
    """The distance of the student's image from the one that a step to the boundary needs."""

    heading: ClassVar[str] = 'Targets (--objective=mcd, mct, direct, pd, flowmap)'

    cd_loss: str = opt(
        'pseudo_huber', click.Choice(DISTANCES), "Distance between the student's image and its target."
    )
    cd_weight_mode: str = opt(
        'sqrt_karras',
        click.Choice(WEIGHT_MODES),
        'Loss weight by noise level: sqrt_karras = sqrt(1/sigma^2 + 1/sigma_data^2), edm its square, '
        'sqrt_gap = sqrt(sigma_t - sigma_s).',
    )


@dataclass(frozen=True)
class StudentSteps(Config):
    """A student of S steps."""

    heading: ClassVar[str] = 'Multistep students (--objective=mcd, mct, direct, pd, mm; scd and sct with --S)'

    S: int | None = opt(
        8,
        cli.STEPS,
        'Number of student sampling steps. scd, sct: of segments of the noise levels, each of which one '
        'step crosses; without it they train a consistency model.',
    )


@dataclass(frozen=True)
class Students(Targets, StudentSteps):
    """A student of S steps by DDIM."""

    heading: ClassVar[str] = 'Multistep consistency (--objective=mcd, mct, direct, pd)'

    student_grid: str = opt(
        'edm',
        click.Choice(STUDENT_GRIDS),
        'The student steps on S nodes and 0 (edm), or on the first S of S+1 nodes and 0 (full).',
    )


def check_segments(S: int, T_start: int, T_end: int) -> None:
    """Raises: ValueError unless S <= T_start <= T_end."""
    if not S <= T_start <= T_end:
        raise ValueError(
            f'--S={S} <= --T_start={T_start} <= --T_end={T_end} does not hold: every segment needs an edge.'
        )


@dataclass(frozen=True)
class Segments(Students):
    """Segments of a student and the teacher's grid on them (Heek et al. 2024)."""

    T_start: int | None = opt(
        64,
        cli.STEPS,
        'Number of teacher steps at the start of training (Heek et al. 2024).',
        default_text='64; direct as --T_end',
        settled=True,
    )
    T_end: int = opt(1280, cli.STEPS, 'Number of teacher steps at the end of annealing.')
    T_anneal_kimg: float | None = opt(
        None,
        cli.KIMG,
        'Thousands of images over which T rises.',
        default_text='half of --duration',
        settled=True,
    )
    T_anneal_steps: int | None = opt(
        None, cli.Integer(min=0), 'Optimizer steps over which T rises.', record=False
    )
    sampling_mode: str = opt(
        'edm',
        click.Choice(SAMPLING_MODES),
        'Distribution of edges: the training density of edm or vp, or uniform over segments.',
    )
    keep_ties: bool = opt(
        False,
        SWITCH,
        'Keep the teacher nodes that are student levels, so that the student is trained at the levels it '
        'samples at.',
    )
    top_mass: float = opt(
        0.0,
        cli.Number(0, 1),
        'Share of samples on the first edges of segments, where sampling evaluates the student; needs '
        '--keep_ties.',
        flags=('--top-mass',),
    )

    def __post_init__(self):
        super().__post_init__()
        # The class is frozen; without --T_start (direct), T is the same throughout.
        if self.T_start is None:
            object.__setattr__(self, 'T_start', self.T_end)
        with usage_errors():
            check_segments(self.S, self.T_start, self.T_end)
        if self.top_mass and not self.keep_ties:
            raise click.UsageError(
                f'--top-mass={self.top_mass:g} needs --keep_ties: without them no edge begins where a '
                'segment does.'
            )

    @classmethod
    def from_given(cls, given: Mapping[str, object]) -> Config:
        if given.get('T_anneal_steps') is not None and given.get('T_anneal_kimg') is not None:
            raise click.UsageError('--T_anneal_steps and --T_anneal_kimg say the same: give one of them.')
        return super().from_given(given)


# ----------------------------------------------------------------------------
# Objectives with a second network that trains.


@dataclass(frozen=True)
class AuxiliaryNetwork(Config):
    """A second network, which starts from the teacher and trains in turn with the student."""

    heading: ClassVar[str] = 'Auxiliary network (--objective=mm, sid)'

    aux_lr: float | None = opt(
        None,
        cli.POSITIVE,
        'Learning rate of the auxiliary network, which rises and decays as --lr (mm, sid).',
        default_text='--lr',
    )
    aux_ahead: int = opt(
        0,
        cli.Integer(min=0),
        'Optimizer steps of the auxiliary network alone at the start; then they alternate (mm, sid).',
    )
    batch_size: int | None = recorded(None, POSITIVE_COUNT)


# ----------------------------------------------------------------------------
# Consistency models and stages of training.


@dataclass(frozen=True)
class ConsistencySampling(Config):
    """How a consistency model is sampled."""

    heading: ClassVar[str] = 'Consistency models (--objective=cm-cd, cm-ct, ict, ect, tcm, scd, sct)'
    sampling: ClassVar[tuple[str, ...]] = ('mid_t', 'clip_denoised')

    mid_t: float | None = opt(
        None, cli.SIGMA, 'Noise level of the second sampling step.', default_text='one step'
    )
    clip_denoised: bool | None = opt(
        None,
        SWITCH,
        'Clamp every image that the network gives in sampling to [-1, 1]; recorded in snapshots.',
        default_text='on',
    )


@dataclass(frozen=True)
class GrowingGrid(NoiseGrid):
    """A grid whose number of nodes grows in training."""

    heading: ClassVar[str] = 'Consistency models (--objective=cm-cd, cm-ct, ict, ect, tcm, scd, sct)'

    s0: int = opt(2, cli.STEPS, 'Number of grid steps at the start.')
    s1: int = opt(150, cli.STEPS, 'Number of grid steps at the end.')
    schedule_steps: int | None = opt(
        None,
        cli.COUNT,
        'Optimizer steps over which the grid grows.',
        record=False,
        default_text='all of --duration',
    )
    schedule_nimg: int | None = recorded(None, COUNT)

    def __post_init__(self):
        super().__post_init__()
        if self.grows and self.s0 > self.s1:
            raise click.UsageError(f'--s0={self.s0} is more than --s1={self.s1}: the grid becomes finer.')

    @property
    def grows(self) -> bool:
        """Whether the number of nodes grows; if not, s0 and s1 are not used."""
        return True


@dataclass(frozen=True)
class PseudoHuber(Config):
    heading: ClassVar[str] = 'Consistency models (--objective=cm-cd, cm-ct, ict, ect, tcm, scd, sct)'

    c: float | None = opt(
        None,
        cli.FACTOR,
        'Constant of the pseudo-Huber distance (ict, ect, tcm).',
        default_text='0.00054 times the root of the number of values',
    )


@dataclass(frozen=True)
class Stages(Config):
    heading: ClassVar[str] = 'Stages of training (--objective=ect, tcm, pd)'

    stage_steps: int | None = opt(
        None,
        cli.COUNT,
        'Optimizer steps of a stage; for pd, of a round, twice as many for --S=2 and 1.',
        record=False,
        default_text='ect: --duration in equal stages, 8 for --q=2, 4 for --q=4, until 1 - r/t is about '
        '1/256; tcm 1; pd 50000',
    )


@dataclass(frozen=True)
class TimePairs(Stages, PseudoHuber):
    """The ratio r/t of easy consistency tuning, which approaches 1 in stages."""

    heading: ClassVar[str] = 'Easy consistency tuning (--objective=ect, tcm)'

    q: float = opt(
        2.0, cli.Number(min=1, max=1e6, min_open=True), '1 - r/t shrinks by this factor from stage to stage.'
    )
    k: float = opt(
        8.0,
        cli.FACTOR,
        'Factor in 1 - r/t = q^-(stage+1) (1 + k sigmoid(-b t)); 0 gives one ratio for all t.',
    )
    b: float = opt(1.0, cli.FACTOR, 'Slope of the sigmoid in the mapping from t to r.', idle=('k', 0))
    stage_nimg: int | None = recorded(None, COUNT)


# ----------------------------------------------------------------------------
# Defaults of options of the run, by kind of student and size of network.


# Channels at the finest level of EDM2's networks.
EDM2_WIDTHS = dict(XS=128, S=192, M=256, L=320, XL=384, XXL=448)


def by_width(**columns: Mapping[str, object]) -> dict[int, dict[str, object]]:
    # The sizes in their order: a dict serves as an ordered set.
    """{width: {option: default}} from {option: {size: default}}."""
    sizes = dict.fromkeys(size for column in columns.values() for size in column)
    return {EDM2_WIDTHS[size]: {option: column[size] for option, column in columns.items()} for size in sizes}


# Defaults of options of the run. Students: those of the released ImageNet-64 student; EDM2's networks: those
# of ECT's EDM2 models; others: those of their papers' CIFAR-10 models.
# fmt: off
STUDENT = dict(optim='adam', lr=8e-5, lr_rampup=10_000, lr_schedule='constant', beta2=0.999, duration=210.0, batch=2048,
               ema=50e6, ema_rampup=0.05, augment=0.0)
EDM2_STUDENT = dict(lr=10e-4, lr_schedule='sqrt', lr_decay=2000, beta2=0.99, phema=[0.05, 0.1])
# Averages decay at a constant rate.
RADAM = dict(optim='radam', lr_rampup=0, lr_schedule='constant', beta2=0.999, ema_rampup=0.0, augment=0.0)
# The half-life is that of a decay of 0.9999 per step.
CONSISTENCY_MODEL = dict(RADAM, lr=4e-4, duration=409.6, batch=512, ema=3.549e6, dropout=0.0)
# Lu & Song's distribution of noise levels stands in the objectives' files; lengths and rates are ours.
CONTINUOUS = dict(RADAM, optim='adam', beta2=0.99, lr=1e-4, duration=204.8, batch=512, ema=3.549e6)
# fmt: on


# ----------------------------------------------------------------------------
# Objectives.


@dataclass(frozen=True)
class Objective:
    """An objective, as the command line sees it.

    Attributes:
        config: the class of its options.
        teacher: kind of its teacher, `diffusion` or `consistency`; None: no teacher.
        needs_teacher: whether --teacher is required; if not, it may be left out.
        defaults: defaults of options that every run has: learning rate, duration, ... (`ema` in images).
        edm2: other defaults for EDM2's networks, of the objective's own options too, see `edm2_defaults`.
        edm2_latents: defaults that replace those of `edm2` for latents.
        edm2_sizes, edm2_latent_sizes: defaults by the network's width (`by_width`), for pixels and for
            latents; None: as for pixels.
        boundary: whether the network is the identity at sigma_min, not at 0.
        auxiliary: whether it has a second network that trains (`AuxiliaryNetwork`).
    """

    config: type[Config]
    teacher: str | None = None
    needs_teacher: bool = True
    defaults: Mapping[str, object] = field(default_factory=dict)
    edm2: Mapping[str, object] = field(default_factory=dict)
    edm2_latents: Mapping[str, object] = field(default_factory=dict)
    edm2_sizes: Mapping[int, Mapping[str, object]] = field(default_factory=dict)
    edm2_latent_sizes: Mapping[int, Mapping[str, object]] | None = None
    boundary: bool = False
    auxiliary: bool = False

    @property
    def solver(self) -> str:
        """Of its students of a fixed number of steps, as samplers call it."""
        return getattr(self.config, 'sampler', 'student')

    @property
    def one_step(self) -> bool:
        """Whether its students take one step, from a noise level of their own."""
        return 'sigma_init' in self.options

    @property
    def own_defaults(self) -> dict[str, object]:
        """{name: default} of the objective's own options."""
        return {name: option.default for name, option in options_of(self.config).items()}

    @property
    def fixed_steps(self) -> bool:
        """Whether a student is, by default, of one number of steps, --S."""
        return self.own_defaults.get('S') is not None

    @property
    def options(self) -> dict[str, object]:
        """{name: default} of what is passed to the loss and recorded by runs."""
        # Left out: options of samplers, those that stand only on the command line, and files.
        declared, names = options_of(self.config), self.config.sampling
        return {
            f.name: f.default
            for f in dataclasses.fields(self.config)
            if f.name not in (*names, 'sigma_data')
            and (f.name not in declared or (declared[f.name].record and not declared[f.name].key))
        }

    def complete(self, recorded: Mapping[str, object]) -> EasyDict:
        """The recorded options of a loss, and the defaults of those that are not recorded at their default."""
        later = {name: option.default for name, option in options_of(self.config).items() if option.later}
        return EasyDict({**later, **recorded})

    def edm2_defaults(self, width: int, latents: bool) -> dict[str, object]:
        """`edm2` for a network of `width` channels at its finest level."""
        # A width between EDM2's sizes has the defaults of the next smaller size, or of S if there is none.
        sizes = self.edm2_latent_sizes if latents and self.edm2_latent_sizes is not None else self.edm2_sizes
        nearest = max((known for known in sizes if known <= width), default=EDM2_WIDTHS['S'])
        return {**self.edm2, **(self.edm2_latents if latents else {}), **sizes.get(nearest, {})}

    @property
    def loss(self) -> str | None:
        """The name of its module; None for diffusion, whose loss is selected by --precond."""
        name = self.config.__module__.rpartition('.')[2]
        return None if name == 'loss_diffusion' else name

    def module(self) -> ModuleType:
        """The objective's module, see `training.objectives.loss`."""
        return importlib.import_module(self.config.__module__)
