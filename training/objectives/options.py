"""Options that several objectives share, and the defaults that objectives give to those of every run.

Plain data, quick to import: `train.py --help` reads it. Each objective's own options stand in the file of its loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import click

from dnnlib import cli
from dnnlib.options import SWITCH, opt, recorded
from dnnlib.schema import Integer, Real

HOPS = ('heun', 'ddim', 'addim')
HOP_COST = dict(heun=2, ddim=1, addim=1)  # network evaluations
COUNT = Integer(0, 1 << 63)


@dataclass(frozen=True)
class Config:
    """The options of one objective.

    Class attributes:
        sampling: names of those that are recorded for samplers and unknown to the loss.
    """

    heading: ClassVar[str] = 'Objective'
    sampling: ClassVar[tuple[str, ...]] = ()

    sigma_data: float = recorded(0.5, Real(1e-6, 1e6))

    @classmethod
    def from_given(cls, given: Mapping[str, object]) -> Config:
        """The configuration with the options that were given. Raises: click.UsageError where they do not go together."""
        return cls(**given)

    def cost(self) -> float:
        """Network evaluations that one training image costs on average; the student's forward and backward pass counts 3."""
        return 3.0


@dataclass(frozen=True)
class NoiseRange(Config):
    heading: ClassVar[str] = 'Noise levels (all objectives but diffusion)'

    sigma_min: float = opt(0.002, cli.SIGMA, 'Lowest noise level above 0.', metavar='FLOAT')
    sigma_max: float = opt(80.0, cli.SIGMA, 'Highest noise level.', metavar='FLOAT')

    def __post_init__(self):
        if self.sigma_min >= self.sigma_max:
            raise click.UsageError(
                f'--sigma_min={self.sigma_min:g} is not below --sigma_max={self.sigma_max:g}.'
            )


@dataclass(frozen=True)
class NoiseGrid(NoiseRange):
    rho: float = opt(7.0, cli.RHO, 'Exponent of the Karras noise levels.', metavar='FLOAT')


@dataclass(frozen=True)
class SyncDropout(Config):
    heading: ClassVar[str] = 'Noise levels (all objectives but diffusion)'

    sync_dropout: bool = opt(
        True, SWITCH, 'Give the self-target, where there is one, the dropout masks of the student.'
    )


@dataclass(frozen=True)
class LogNormal(Config):
    heading: ClassVar[str] = 'Log-normal noise levels (--objective=diffusion, ict, ect)'

    P_mean: float | None = opt(
        None, cli.Number(min=-100, max=100), 'Mean of ln sigma in training.', metavar='FLOAT'
    )
    P_std: float | None = opt(
        None,
        cli.Number(min=0, max=100, min_open=True),
        'Standard deviation of ln sigma in training.',
        metavar='FLOAT',
    )


@dataclass(frozen=True)
class Teacher(Config):
    heading: ClassVar[str] = 'Distillation (--objective=mcd, direct, pd, cm-cd, tcm)'

    teacher: str | None = opt(
        None,
        cli.PATH,
        'Snapshot of the diffusion model to distill; pd: or of a student of 2 --S_start steps; tcm: of the consistency '
        'model to go on from.',
        metavar='PKL|URL',
        key='teacher',
    )


@dataclass(frozen=True)
class TeacherHop(Teacher):
    hop: str = opt(
        'heun',
        click.Choice(HOPS),
        "The teacher's step from one noise level to the next (mcd, cm-cd, pd); pd takes ddim or addim.",
    )
    xvar_frac: float = opt(
        0.75,
        cli.FACTOR,
        "With --hop=addim: share of the image's squared error that is put back as noise; 0 guesses it without the image.",
        needs=('hop', 'addim'),
        metavar='FLOAT',
    )


@dataclass(frozen=True)
class Students(NoiseGrid):
    """A student of S steps, and how its image is compared with the target."""

    heading: ClassVar[str] = 'Multistep consistency (--objective=mcd, mct, direct, pd)'

    S: int = opt(8, cli.STEPS, 'Number of student sampling steps.', metavar='INT')
    student_grid: str = opt(
        'edm',
        click.Choice(['edm', 'full']),
        'The student steps on S nodes and 0 (edm), or on the first S of S+1 nodes and 0 (full).',
    )
    sigma_grid: str = opt(
        'karras',
        click.Choice(['karras', 'cosine']),
        "Spacing of nodes: Karras's, or even in the time of the cosine schedule.",
    )
    cd_loss: str = opt(
        'pseudo_huber',
        click.Choice(['pseudo_huber', 'l2_root', 'l2', 'huber']),
        "Distance between the student's image and its target.",
    )
    cd_weight_mode: str = opt(
        'sqrt_karras',
        click.Choice(
            [
                'sqrt_karras',
                'edm',
                'karras',
                'vlike',
                'snr+1',
                'snr',
                'truncated-snr',
                'flat',
                'uniform',
                'sqrt_gap',
            ]
        ),
        'Loss weight by noise level: sqrt_karras = sqrt(1/sigma^2 + 1/sigma_data^2), edm its square, '
        'sqrt_gap = sqrt(sigma_t - sigma_s).',
    )


@dataclass(frozen=True)
class Segments(Students):
    """Segments of a student and the teacher's grid on them (Heek et al. 2024)."""

    T_start: int | None = opt(
        64,
        cli.STEPS,
        'Number of teacher steps at the start of training (Heek et al. 2024).',
        metavar='INT',
        default_text='64; direct as --T_end',
    )
    T_end: int = opt(1280, cli.STEPS, 'Number of teacher steps at the end of annealing.', metavar='INT')
    T_anneal_kimg: float | None = opt(
        None,
        cli.KIMG,
        'Thousands of images over which T rises.',
        metavar='KIMG',
        default_text='half of --duration',
    )
    T_anneal_steps: int | None = opt(
        None, cli.Integer(min=0), 'Optimizer steps over which T rises.', record=False, metavar='INT'
    )
    sampling_mode: str = opt(
        'edm',
        click.Choice(['edm', 'vp', 'uniform']),
        'Distribution of edges: the training density of edm or vp, or uniform over segments.',
    )
    keep_ties: bool = opt(
        False,
        SWITCH,
        'Keep the teacher nodes that are student levels, so that the student is trained at the levels it samples at.',
    )
    top_mass: float = opt(
        0.0,
        cli.Number(0, 1),
        'Share of samples on the first edges of segments, where sampling evaluates the student; needs --keep_ties.',
        flags=('--top-mass',),
        metavar='FLOAT',
    )

    def __post_init__(self):
        super().__post_init__()
        if self.T_start is None:
            object.__setattr__(self, 'T_start', self.T_end)
        if not self.S <= self.T_start <= self.T_end:
            raise click.UsageError(
                f'--S={self.S} <= --T_start={self.T_start} <= --T_end={self.T_end} does not hold: every segment needs an edge.'
            )
        if self.top_mass and not self.keep_ties:
            raise click.UsageError(
                f'--top-mass={self.top_mass:g} needs --keep_ties: without them no edge begins where a segment does.'
            )

    @classmethod
    def from_given(cls, given: Mapping[str, object]) -> Config:
        if given.get('T_anneal_steps') is not None and given.get('T_anneal_kimg') is not None:
            raise click.UsageError('--T_anneal_steps and --T_anneal_kimg say the same: give one of them.')
        return super().from_given(given)


@dataclass(frozen=True)
class ConsistencySampling(Config):
    """How a consistency model is sampled."""

    heading: ClassVar[str] = 'Consistency models (--objective=cm-cd, cm-ct, ict, ect, tcm)'
    sampling: ClassVar[tuple[str, ...]] = ('mid_t', 'clip_denoised')

    mid_t: float | None = opt(
        None, cli.SIGMA, 'Noise level of the second sampling step.', metavar='FLOAT', default_text='one step'
    )
    clip_denoised: bool | None = opt(
        None,
        SWITCH,
        'Clamp every image that the network gives in sampling to [-1, 1]; recorded in snapshots.',
        default_text='on',
    )


@dataclass(frozen=True)
class GrowingGrid(NoiseGrid):
    """A grid whose number of nodes rises in training."""

    heading: ClassVar[str] = 'Consistency models (--objective=cm-cd, cm-ct, ict, ect, tcm)'

    s0: int = opt(2, cli.STEPS, 'Number of grid steps at the start.', metavar='INT')
    s1: int = opt(150, cli.STEPS, 'Number of grid steps at the end.', metavar='INT')
    schedule_steps: int | None = opt(
        None,
        cli.COUNT,
        'Optimizer steps over which the grid grows.',
        record=False,
        metavar='INT',
        default_text='all of --duration',
    )
    schedule_nimg: int | None = recorded(None, COUNT)

    def __post_init__(self):
        super().__post_init__()
        if not getattr(self, 'N', None) and self.s0 > self.s1:
            raise click.UsageError(f'--s0={self.s0} is more than --s1={self.s1}: the grid becomes finer.')


@dataclass(frozen=True)
class PseudoHuber(Config):
    heading: ClassVar[str] = 'Consistency models (--objective=cm-cd, cm-ct, ict, ect, tcm)'

    c: float | None = opt(
        None,
        cli.FACTOR,
        'Constant of the pseudo-Huber distance (ict, ect, tcm).',
        metavar='FLOAT',
        default_text='0.00054 times the root of the number of values',
    )


@dataclass(frozen=True)
class Stages(Config):
    heading: ClassVar[str] = 'Stages of training (--objective=ect, tcm, pd)'

    stage_steps: int | None = opt(
        None,
        cli.COUNT,
        'Optimizer steps of a stage; pd takes twice as many for --S=2 and 1.',
        metavar='INT',
        record=False,
        default_text='ect: --duration in equal stages, 8 for --q=2, 4 for --q=4, until 1 - r/t is about 1/256; tcm 1; pd 50000',
    )


@dataclass(frozen=True)
class TimePairs(Stages, PseudoHuber):
    """The ratio r/t of easy consistency tuning, which approaches 1 in stages."""

    heading: ClassVar[str] = 'Easy consistency tuning (--objective=ect, tcm)'

    q: float = opt(
        2.0,
        cli.Number(min=1, max=1e6, min_open=True),
        '1 - r/t shrinks by this factor from stage to stage.',
        metavar='FLOAT',
    )
    k: float = opt(
        8.0,
        cli.FACTOR,
        'Factor in 1 - r/t = q^-(stage+1) (1 + k sigmoid(-b t)); 0 gives one ratio for all t.',
        metavar='FLOAT',
    )
    b: float = opt(
        1.0, cli.FACTOR, 'Slope of the sigmoid in the mapping from t to r.', metavar='FLOAT', idle=('k', 0)
    )
    stage_nimg: int | None = recorded(None, COUNT)


@dataclass(frozen=True)
class DiffusionConfig(LogNormal):
    """Options of --objective=diffusion, whose loss --precond names. EDM's and EDM2's draw ln sigma from a normal distribution."""

    P_mean: float | None = -1.2
    P_std: float | None = 1.2


@dataclass(frozen=True)
class DistillationConfig(SyncDropout, Segments, TeacherHop):
    """Options of --objective=mcd."""

    terminal_anchor: bool = opt(
        True,
        SWITCH,
        "Give the first and the last edge the probability 1/T each; at sigma_max the target is the teacher's own solution.",
    )
    terminal_teacher_hop: bool = opt(
        True, SWITCH, "On the edge to 0, aim at the teacher's denoised image instead of the data."
    )
    anchor_hops: int | None = opt(
        None,
        cli.STEPS,
        'Heun steps of the solution at sigma_max.',
        metavar='INT',
        default_text='4; 32 where the first segment ends below sigma = 10',
        idle=('terminal_anchor', False),
    )

    def cost(self) -> float:
        """A hop, the self-target, the student; on the anchored first edge the teacher's solution: 2 evaluations a sub-step."""
        total = HOP_COST[self.hop] + 4
        if self.terminal_anchor:
            anchored = self.top_mass / self.S if self.top_mass else 1 / self.T_end
            total += anchored * 2 * (self.anchor_hops or 32)
        return total


@dataclass(frozen=True)
class TrainingConfig(SyncDropout, Segments):
    """Options of --objective=mct."""

    def cost(self) -> float:
        return 4


@dataclass(frozen=True)
class RegressionConfig(Segments, Teacher):
    """Options of --objective=direct."""

    T_start: int | None = None
    keep_ties: bool = True
    top_mass: float = 0.9
    substeps: int = opt(3, cli.STEPS, 'Heun steps of the teacher over a segment (direct).', metavar='INT')

    def cost(self) -> float:
        return 2 * self.substeps + 3


@dataclass(frozen=True)
class ProgressiveConfig(Stages, Students, TeacherHop):
    """Options of --objective=pd."""

    S: int = 1
    student_grid: str = 'full'
    hop: str = 'ddim'
    cd_loss: str = 'l2'
    cd_weight_mode: str = 'truncated-snr'
    stage_steps: int | None = 50_000
    S_start: int = opt(
        512,
        cli.STEPS,
        'Sampling steps of the first student (pd), halved from stage to stage down to --S; its teacher is sampled in twice as many.',
        metavar='INT',
        record=False,
    )

    def __post_init__(self):
        from training.objectives.time_schedules import halving_stages

        super().__post_init__()
        try:
            halving_stages(self.S_start, self.S, self.stage_steps)
        except ValueError as error:
            raise click.UsageError(
                f'--S_start={self.S_start}, --S={self.S}: {error}. Give a --S_start that is --S times a power of two.'
            ) from error
        if self.student_grid != 'full':
            raise click.UsageError(
                f'--student_grid={self.student_grid}: the stages of pd are nested on full grids alone; leave it out.'
            )
        if self.hop == 'heun':
            raise click.UsageError('--hop=heun: the teacher of pd takes its own steps, ddim or addim.')

    def cost(self) -> float:
        return 2 + 3


@dataclass(frozen=True)
class SongConfig(ConsistencySampling, SyncDropout, GrowingGrid):
    """Options of --objective=cm-ct, and of cm-cd besides its teacher."""

    N: int | None = opt(
        None,
        cli.LEVELS,
        'Number of grid nodes throughout training, with --mu0 as the decay (cm-cd, cm-ct).',
        metavar='INT',
        default_text='cm-cd 18, unless --s0, --s1 or --schedule_steps let it grow; cm-ct: growing',
    )
    mu0: float = opt(
        0.9,
        cli.Number(0, 1, max_open=True),
        'Decay of the target network at the start (cm-cd, cm-ct); 0: the target is the network itself.',
        metavar='FLOAT',
    )
    mu_schedule: str = opt(
        'adaptive',
        click.Choice(['adaptive', 'fixed']),
        'The decay rises with the number of nodes (adaptive), or stays (cm-cd, cm-ct).',
        idle=('mu0', 0),
    )
    cm_loss: str = opt(
        'lpips',
        click.Choice(['lpips', 'l2', 'l1', 'pseudo_huber']),
        "Distance between the network's image and its target (cm-cd, cm-ct).",
    )
    lpips: str | None = opt(
        None,
        cli.PATHS,
        "Weights of --cm_loss=lpips: torchvision's VGG16 and the lpips package's heads, joined by a comma; or one TorchScript file. "
        f'{cli.PROGRAM}',
        metavar='FILES|URLS',
        default_text='the published ones',
        needs=('cm_loss', 'lpips'),
    )

    @classmethod
    def from_given(cls, given: Mapping[str, object]) -> Config:
        growing = sorted(given.keys() & {'s0', 's1', 'schedule_steps'})
        if 'N' in given and growing:
            raise click.UsageError(f'--N is a grid that stays as it is: leave out --{growing[0]}, or --N.')
        if 'mu_schedule' in given and (cls.N or 'N' in given) and not growing:
            raise click.UsageError(
                '--mu_schedule is for grids that grow: give --s0, --s1 or --schedule_steps as well, and no --N.'
            )
        return super().from_given(given | (dict(N=None) if growing else {}))

    def cost(self) -> float:
        return 4


@dataclass(frozen=True)
class SongDistillationConfig(SongConfig, TeacherHop):
    """Options of --objective=cm-cd."""

    N: int | None = 18
    mu0: float = 0.0

    def cost(self) -> float:
        return HOP_COST[self.hop] + 4


@dataclass(frozen=True)
class ImprovedConfig(ConsistencySampling, PseudoHuber, LogNormal, SyncDropout, GrowingGrid):
    """Options of --objective=ict."""

    s0: int = 10
    s1: int = 1280
    P_mean: float | None = -1.1
    P_std: float | None = 2.0
    batch_size: int | None = recorded(None, COUNT)

    def cost(self) -> float:
        return 4


@dataclass(frozen=True)
class TuningConfig(ConsistencySampling, TimePairs, LogNormal, SyncDropout, NoiseRange):
    """Options of --objective=ect."""

    sampling: ClassVar[tuple[str, ...]] = ('mid_t', 'clip_denoised', 'sigma_min', 'sigma_max')

    P_mean: float | None = -1.1
    P_std: float | None = 2.0
    c: float | None = 0.0
    ect_weight: str = opt(
        'gap',
        click.Choice(['gap', 'flat', 'inv', 'inv_sum', 'snr', 'karras', 'c_in_squared']),
        'Loss weight (ect): gap = 1/(t - r), or of t alone 1, 1/t, 1/t + 1/sigma_data, 1/t^2, 1/t^2 + 1/sigma_data^2, '
        '1/(t^2 + sigma_data^2).',
    )

    def cost(self) -> float:
        return 4


@dataclass(frozen=True)
class TruncatedConfig(ConsistencySampling, TimePairs, SyncDropout, NoiseRange, Teacher):
    """Options of --objective=tcm."""

    heading: ClassVar[str] = 'Truncated consistency models (--objective=tcm)'
    sampling: ClassVar[tuple[str, ...]] = ('mid_t', 'clip_denoised', 'sigma_min')

    c: float | None = 1e-8
    stage_steps: int | None = 1
    dividing_t: float = opt(
        1.0,
        cli.SIGMA,
        'Noise level below which the network of the first stage is evaluated.',
        metavar='FLOAT',
    )
    boundary_share: float = opt(
        0.25, cli.Number(0, 1, max_open=True), 'Share of samples at --dividing_t.', metavar='FLOAT'
    )
    boundary_weight: float = opt(
        0.1,
        cli.FACTOR,
        'Weight of the mean loss of samples at --dividing_t.',
        metavar='FLOAT',
        idle=('boundary_share', 0),
    )
    ratio_cap: float = opt(
        0.999, cli.Number(0, 1, max_open=True), 'Upper limit of the ratio r/t.', metavar='FLOAT'
    )
    tcm_weight: str = opt(
        'flat', click.Choice(['flat', 'karras']), 'Loss weight times t - r: 1, or t / c_out(t)^2.'
    )
    student_scale: float = opt(
        0.2, cli.SOME_FACTOR, 'ln t is Student-t distributed times this.', metavar='FLOAT'
    )
    student_df: float = opt(
        0.01, cli.SOME_FACTOR, 'Degrees of freedom of the distribution of ln t.', metavar='FLOAT'
    )
    batch_size: int | None = recorded(None, COUNT)

    def cost(self) -> float:
        return 4


# Channels at the finest level of EDM2's networks.
EDM2_WIDTHS = dict(XS=128, S=192, M=256, L=320, XL=384, XXL=448)


def by_width(**columns: Mapping[str, object]) -> dict[int, dict[str, object]]:
    """{width: {option: default}} from {option: {size: default}}."""
    sizes = dict.fromkeys(size for column in columns.values() for size in column)
    return {EDM2_WIDTHS[size]: {option: column[size] for option, column in columns.items()} for size in sizes}


# fmt: off
# The released ImageNet-64 student's settings; for networks of EDM2's, those of ECT's EDM2 models. Others are of their papers' CIFAR-10 models.
STUDENT = dict(optim='adam', lr=8e-5, lr_rampup=10_000, lr_schedule='constant', beta2=0.999, duration=210.0, batch=2048,
               ema=50e6, ema_rampup=0.05, augment=0.0)
EDM2_STUDENT = dict(lr=10e-4, lr_schedule='sqrt', lr_decay=2000, beta2=0.99, phema=[0.05, 0.1])
# Their averages decay at one rate throughout training.
RADAM = dict(optim='radam', lr_rampup=0, lr_schedule='constant', beta2=0.999, ema_rampup=0.0, augment=0.0)
# An EMA of 0.9999 a step.
CONSISTENCY_MODEL = dict(RADAM, lr=4e-4, duration=409.6, batch=512, ema=3.549e6, dropout=0.0)
# fmt: on
