"""The options that every run has, declared once. Imports no PyTorch, so that `train.py --help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import click

from dnnlib import cli
from dnnlib.options import FLAG, ON_OFF, opt
from dnnlib.schema import Real
from metrics.validator import SHOWN, LabelMode
from sampling.options import OF_ODE
from training.architectures import ARCHITECTURES, PRECONDITIONING
from training.objectives import OBJECTIVES
from training.saved_files import NETWORK_FILE

TICKS = cli.Integer(min=0)
LONGEST = 5_000  # millions of images; a longer --duration is a mistake about its unit
PHEMA_RANGE = (0.001, 0.28)
# Options in optimizer steps: the loss's name for the same length, and its unit in images.
IN_STEPS = dict(
    T_anneal_steps=('T_anneal_kimg', 1000),
    stage_steps=('stage_nimg', 1),
    schedule_steps=('schedule_nimg', 1),
    tangent_warmup=('warmup_nimg', 1),
)
# Those that a loss records in images alone: the number of steps follows from the batch size.
COUNTED_IN_IMAGES = {option: name for option, (name, unit) in IN_STEPS.items() if unit == 1}
RESUME_OR_TRANSFER = '--resume and --transfer exclude each other: a training state holds the weights.'


class HalfLife(click.ParamType):
    """A number of images, whose value is in images: a bare one is in millions."""

    name = 'images'
    schema = Real(0, 1e15)

    def convert(self, value, param, ctx):
        return value if isinstance(value, float) else cli.SOME_MIMG.convert(value, param, ctx) * 1e6


class LossScale(click.ParamType):
    """A positive number, or `dynamic`."""

    name = 'float'

    def convert(self, value, param, ctx):
        return value if value == 'dynamic' else cli.POSITIVE.convert(value, param, ctx)


# ----------------------------------------------------------------------------
# The options, as a table: default, kind, help, and how --help and records show them.


# fmt: off
@dataclass(frozen=True)
class Main:
    heading: ClassVar[str] = 'Main'

    outdir: str | None = opt(
        None, cli.PATH, 'Folder in which the numbered folder of this run is created.',
        metavar='DIR', required=True)
    data: str | None = opt(
        None, cli.PATH, 'Data set, made by dataset_tool.py.',
        metavar='ZIP|DIR', key='dataset.path', required=True)
    cond: bool = opt(False, bool, 'Train a class-conditional model; needs labels.', key='dataset.use_labels')
    arch: str | None = opt(
        None, click.Choice(list(ARCHITECTURES)), 'Network architecture.',
        default_text="ddpmpp; for students the teacher's")
    precond: str | None = opt(
        None, click.Choice(list(PRECONDITIONING)), 'Preconditioning and, for teachers, loss.',
        default_text="edm; for students the teacher's")
    objective: str = opt(
        'diffusion', click.Choice(list(OBJECTIVES)),
        'diffusion: a teacher; mcd: multistep consistency distillation; mct: the same without a teacher; '
        "direct: regression on the teacher's solution of each segment; pd: progressive distillation; "
        "flowmap: one student for any number of steps, of the teacher's flow map; cm-cd, cm-ct: Song et "
        "al.'s consistency "
        'distillation and training; ict: improved consistency training; ect: easy consistency tuning; tcm: '
        'truncated consistency training; scd, sct: continuous-time consistency distillation and training; '
        'mm, sid (both experimental): moment matching, and score identity distillation to one step.',
        key='objective')
    consistency: bool | None = opt(None, bool, 'True: same as --objective=mcd.', default_text='False')
    duration: float | None = opt(
        None, cli.SOME_MIMG, 'Length of training in millions of images.')
    budget: float | None = opt(
        None, cli.POSITIVE,
        'Train for this many hours: measures the training step at the start, and sets --duration.',
        metavar='HOURS')
    preset: str | None = opt(
        None, None,
        'Options of a published or tried setting, see --list-presets; small-gpu goes with another, joined by '
        'a comma. --config and options on the command line take precedence.',
        metavar='NAME', key='preset')


@dataclass(frozen=True)
class Hyperparameters:
    heading: ClassVar[str] = 'Hyperparameters'

    # Batch.
    batch: int | None = opt(
        None, cli.BATCH, 'Total batch size.',
        key='batch_size', settled=True)
    batch_gpu: int | None = opt(
        None, cli.BATCH,
        'Micro-batch size per GPU; gradients accumulate if it is smaller than batch / world size.',
        flags=('--batch-gpu',), default_text='batch / world size', key='batch_gpu')
    # Optimizer and learning rate.
    optim: str | None = opt(None, click.Choice(['adam', 'radam']), 'Optimizer.', key='optim', settled=True)
    lr: float | None = opt(None, cli.POSITIVE, 'Learning rate.', key='lr', settled=True)
    lr_rampup: float | None = opt(
        None, cli.KIMG, 'Thousands of images over which the learning rate rises from 0.',
        key='lr_rampup_nimg', settled=True, scales=True, unit=1e3)
    lr_schedule: str | None = opt(
        None, click.Choice(['constant', 'linear', 'cosine', 'sqrt']),
        'Decay of the learning rate: to 0 at the end of training (linear, cosine), or as 1/sqrt(steps) '
        'after --lr_decay steps (sqrt).',
        key='lr_schedule', settled=True)
    lr_decay: int | None = opt(
        None, cli.COUNT, 'Optimizer steps after which --lr_schedule=sqrt decays (t_ref of EDM2).',
        metavar='STEPS', idle=('lr_schedule', 'constant'))
    beta1: float = opt(
        0.9, cli.Number(0, 1, max_open=True), "Decay of Adam's first moments.")
    beta2: float | None = opt(
        None, cli.Number(0, 1, max_open=True), "Decay of Adam's second moments.")
    # Weight averages.
    ema: float | None = opt(
        None, HalfLife(),
        'Half-life of the weight average in millions of images; 500kimg and 50Mimg name their unit.',
        metavar='MIMG', key='ema_halflife_nimg', settled=True, scales=True)
    ema_rampup: float | None = opt(
        None, cli.FACTOR,
        'Limit of the effective half-life as a fraction of the images seen; 0 for no limit.')
    phema: list | None = opt(
        None, cli.NumberList(cli.FACTOR),
        'Relative widths of power-function EMAs to keep as well, as in 0.05,0.10.',
        key='phema_stds')
    # Regularization and data.
    augment: float | None = opt(
        None, cli.Number(0, 1), 'Augmentation probability.',
        key='augment', settled=True)
    grad_clip: float | None = opt(
        None, cli.POSITIVE, 'Clip the global gradient norm to this value.',
        flags=('--grad-clip',), default_text='never', key='grad_clip')
    max_images: int | None = opt(
        None, cli.SOME_IMAGES, 'Train on a fixed random subset of this size.',
        flags=('--max-images',), default_text='all', key='dataset.max_size')
    xflip: bool = opt(False, bool, 'Add mirrored copies of all images.', key='dataset.xflip')


@dataclass(frozen=True)
class Network:
    heading: ClassVar[str] = 'Network'

    cbase: int | None = opt(
        None, cli.SIDE, 'Number of channels at the finest level.',
        key='network.kwargs.model_channels', default_text='by --arch')
    cres: list | None = opt(
        None, cli.NumberList(cli.SIDE), 'Channel multiplier of each level.',
        key='network.kwargs.channel_mult', default_text='by --arch')
    num_blocks: int | None = opt(
        None, cli.Integer(min=1, max=1000), 'Residual blocks per level.',
        key='network.kwargs.num_blocks', default_text='by --arch')
    attn_resolutions: list | None = opt(
        None, cli.NumberList(cli.SIDE), 'Resolutions with self-attention.',
        key='network.kwargs.attn_resolutions', default_text='by --arch')
    dropout: float | None = opt(
        None, cli.Number(0, 1, max_open=True), 'Dropout probability.',
        key='network.kwargs.dropout', default_text="the teacher's")
    dout_resolutions: list | None = opt(
        None, cli.NumberList(cli.SIDE), 'Resolutions with dropout.',
        key='network.kwargs.dout_resolutions',
        default_text='all; ect of edm2 those up to 16')


@dataclass(frozen=True)
class Validation:
    heading: ClassVar[str] = 'Validation'
    switch: ClassVar[str] = 'val'  # without it the others are refused

    val: bool = opt(False, bool, 'Evaluate the Frechet distance during training.')
    # Reference and features. Paths are checked before training starts.
    val_ref: str | None = opt(
        None, cli.PATH, 'Reference statistics, made by fid.py ref.',
        metavar='NPZ|URL', key='validation.ref')
    val_ref_data: str | None = opt(
        None, cli.PATH, 'Images to compute reference statistics from at the start.',
        metavar='ZIP|DIR', key='validation.ref_data')
    val_detector: str | None = opt(
        None, cli.PATH, f'TorchScript feature detector. {cli.PROGRAM}',
        metavar='PATH|URL', default_text="NVIDIA's Inception", key='validation.detector')
    # Sampling.
    val_steps: int | None = opt(
        None, cli.STEPS, 'Number of sampling steps.',
        default_text="the student's S, a flow map's most of --steps; 1 for consistency models, with "
        "--mid_t 2; 18 for teachers",
        key='validation.steps')
    val_solver: str | None = opt(
        None, OF_ODE['solver'].kind,
        'Method of sampling a diffusion model; best: by the number of evaluations. For '
        '--objective=diffusion, as the five options after it.',
        default_text='heun', key='validation.solver')
    val_order: int | None = opt(
        None, OF_ODE['order'].kind, OF_ODE['order'].help,
        default_text='the highest', key='validation.order')
    val_afs: bool = opt(False, bool, OF_ODE['afs'].help, key='validation.afs')
    val_to_zero: bool | None = opt(
        None, bool, OF_ODE['to_zero'].help,
        default_text='euler and heun without --val_sigmas True, others False', key='validation.to_zero')
    val_disc: str | None = opt(
        None, OF_ODE['discretization'].kind, 'Spacing of the noise levels, as --disc of generate.py.',
        default_text=OF_ODE['discretization'].default_text, key='validation.discretization')
    val_sigmas: list[float] | None = opt(
        None, OF_ODE['sigmas'].kind, OF_ODE['sigmas'].help,
        metavar='LIST|FILE', key='validation.sigmas')
    # When, and which networks.
    val_every: int = opt(50, cli.COUNT, 'Ticks between evaluations.', metavar='TICKS', key='validation.every')
    val_emas: str | None = opt(
        None, None,
        'Averages to evaluate: ema, widths of --phema as in 0.05, or all. The first one decides which '
        'training state is the best.',
        metavar='LIST', default_text='ema')
    val_at_start: bool = opt(False, bool, 'Evaluate before the first step.', key='validation.at_start')
    val_teacher: bool = opt(
        False, bool,
        'Evaluate the teacher once at the start, by its default sampler (diffusion models: Heun, 18 steps).',
        key='validation.teacher')
    # Images, their seeds and labels; by default as many as FID is usually computed from.
    val_num: int = opt(
        50000, cli.TWO_IMAGES, 'Number of images to generate.',
        key='validation.num')
    val_pairs: int = opt(
        0, cli.IMAGES,
        'Number of pairs of which to compute the paired error: the distance of an image from the one that '
        'the '
        "teacher makes of the same seed and label, over the data's standard deviation; 0: none.",
        key='validation.pairs', later=True)
    val_batch: int = opt(
        64, cli.BATCH, 'Number of images that a process generates at a time.',
        key='validation.batch')
    val_seed: int = opt(0, cli.SEED, 'First seed.', key='validation.seed')
    val_label: str = opt(
        'auto', LabelMode(),
        'Classes of generated images: uniform, dataset (those of training images), fixed:K; auto: dataset '
        'if it has labels, else uniform.',
        key='validation.label', idle=('cond', False))
    val_dump_images_dir: str | None = opt(
        None, cli.PATH, 'Keep the generated images, in a folder for each evaluation.',
        metavar='DIR', key='validation.dump_images_dir')
    val_overwrite: bool = opt(
        False, bool, 'Replace generated images that exist already.',
        key='validation.overwrite')


@dataclass(frozen=True)
class Performance:
    heading: ClassVar[str] = 'Precision and performance'

    # Precision of the network, and what keeps it from overflowing.
    precision: str | None = opt(
        None, click.Choice(['fp32', 'fp16', 'bf16', 'fp64']),
        'Precision inside the network; fp16 on GPUs only. Weights are FP32, or FP64 with fp64.',
        default_text='fp32', key='precision', settled=True)
    fp16: bool | None = opt(None, bool, 'True: same as --precision=fp16.', default_text='False')
    ls: float | str | None = opt(
        None, LossScale(), 'Loss scaling: a number, or dynamic.',
        default_text='dynamic with fp16, else 1')
    max_bad_steps: int = opt(
        100, cli.COUNT,
        'Stop after this many consecutive skipped steps; a step is skipped if its loss or gradient is not '
        'finite.',
        flags=('--max-bad-steps',), key='max_bad_steps')
    # Arithmetic of the GPU, and whether runs repeat.
    tf32: bool = opt(False, ON_OFF, 'Use TensorFloat-32 for FP32 on GPUs.', key='tf32')
    lpips_tf32: bool = opt(
        True, ON_OFF, 'Use TensorFloat-32 inside LPIPS (--cm_loss=lpips) on GPUs.', key='lpips_tf32')
    deterministic: bool = opt(
        False, ON_OFF,
        'Use deterministic algorithms only, so that a run on the same GPUs repeats bit for bit; slower.',
        key='deterministic')
    # Speed against memory.
    compiled: bool = opt(
        False, ON_OFF, 'Compile the networks (torch.compile): minutes at the start, then faster steps.',
        flags=('--compile',), key='compiled')
    channels_last: bool = opt(
        False, ON_OFF, 'Use the channels-last memory format inside the networks.',
        key='channels_last')
    checkpoint_activations: bool = opt(
        False, ON_OFF,
        'Recompute activations in the backward pass: less memory, about a quarter more time.',
        flags=('--checkpoint-activations',), key='checkpoint_activations')
    ema_device: str = opt(
        'same', click.Choice(['same', 'cpu']),
        "Device of the weight averages: the network's, or the host.",
        flags=('--ema-device',), key='ema_device')
    ema_every: int = opt(
        1, cli.COUNT, 'Number of steps between two weights that enter the averages.',
        flags=('--ema-every',), key='ema_every')
    shard: str = opt(
        'none', click.Choice(['none', 'optimizer']),
        'optimizer: divide weights, optimizer state and averages among processes (FSDP2); each still '
        'evaluates the whole network.',
        key='shard')
    profile_steps: int = opt(
        0, TICKS, 'Write a Chrome trace of this many steps to the run folder.',
        flags=('--profile',), metavar='STEPS', key='profile_steps')
    # Waiting for other processes.
    init_timeout: float | None = opt(
        None, cli.POSITIVE, 'Minutes that processes wait for each other at the start.',
        flags=('--init-timeout',), metavar='MINUTES', default_text="PyTorch's: 10 or 30",
        key='init_timeout')
    train_timeout: float | None = opt(
        None, cli.POSITIVE,
        'Minutes that a process waits for the others in a step, after which all end.',
        flags=('--train-timeout',), metavar='MINUTES', default_text="PyTorch's: 10 on GPUs, 30 on CPUs",
        key='train_timeout')
    # Convolution algorithms; loading of data.
    bench: bool = opt(True, bool, 'Enable cuDNN benchmarking.', key='cudnn_benchmark')
    cache: bool | None = opt(
        None, bool, 'Keep decoded images in memory.',
        default_text='True if all copies take 5 % of the memory at most; latents False', key='dataset.cache')
    workers: int = opt(1, cli.WORKERS, 'Processes that load data.', key='workers')


@dataclass(frozen=True)
class Files:
    heading: ClassVar[str] = 'Input and output'

    desc: str | None = opt(
        None, None, "Text to add to the run folder's name.",
        metavar='STR', idle=('nosubdir', True))
    nosubdir: bool = opt(False, FLAG, 'Write into --outdir itself.')
    # Progress, snapshots and training states.
    tick: float = opt(
        50.0, cli.SOME_KIMG, 'Thousands of images between progress reports; fractions allowed.',
        key='kimg_per_tick')
    snap: int = opt(50, TICKS, 'Ticks between snapshots; 0: never.', metavar='TICKS', key='snapshot_ticks')
    sample_grid: int | None = opt(
        None, cli.Integer(min=0, max=SHOWN),
        'Images in the picture of samples that is written with every snapshot; 0: no picture.',
        default_text=f'{SHOWN}; latents 0', key='sample_grid', settled=True)
    phema_snap: int | None = opt(
        None, TICKS, 'Ticks between snapshots of --phema.',
        metavar='TICKS', default_text='as --snap', key='phema_snapshot_ticks', settled=True,
        idle=('phema', []))
    dump: int = opt(
        500, TICKS, 'Ticks between training states; 0: never.',
        metavar='TICKS', key='state_dump_ticks')
    keep: int = opt(
        2, cli.COUNT,
        'Number of newest training states to keep; the one with the least validation distance is kept too.',
        key='states_kept', idle=('dump', 0))
    on_save_error: str = opt(
        'stop', click.Choice(['stop', 'continue']),
        'What to do when a file cannot be written, as on a full disk.',
        flags=('--on-save-error',), key='on_save_error')
    seed: int | None = opt(
        None, cli.Integer(min=0, max=(1 << 63) - 1), 'Random seed.',
        default_text='random', key='seed', settled=True)
    # Where to start.
    transfer: str | None = opt(
        None, NETWORK_FILE, 'Start from the weights of this snapshot that fit the network.',
        key='transfer')
    resume: str | None = opt(
        None, cli.PATH,
        'Resume from this training state, or from the newest complete one in this run folder.',
        metavar='PT|DIR', key='resume')
    # Permissions to resume what is refused otherwise.
    take_lock: bool = opt(
        False, FLAG, 'Take the lock of the run folder (run.lock) from another run, and stop that run.',
        flags=('--take-lock',))
    resume_override: bool = opt(
        False, FLAG, 'Resume even if options differ that make it another run.',
        flags=('--resume-override',))
    allow_other_data: bool = opt(
        False, FLAG, 'Resume even if the data set differs.',
        flags=('--allow-other-data',))
    dry_run: bool = opt(False, FLAG, 'Print the configuration as JSON and exit.', flags=('-n', '--dry-run'))


@dataclass(frozen=True)
class WandB:
    heading: ClassVar[str] = 'Weights & Biases, TensorBoard'
    switch: ClassVar[str] = 'wandb'

    wandb: bool = opt(False, ON_OFF, 'Log to Weights & Biases.')
    wandb_project: str | None = opt(
        None, None, 'W&B project.',
        metavar='STR', default_text="the environment's, or W&B's", key='wandb.project')
    wandb_entity: str | None = opt(
        None, None, 'W&B user or team.',
        metavar='STR', default_text='yours', key='wandb.entity')
    wandb_run: str | None = opt(
        None, None, 'W&B run name.',
        metavar='STR', default_text="the run folder's", key='wandb.name')
    wandb_tags: str | None = opt(None, None, 'Comma-separated tags.', metavar='LIST')
    wandb_mode: str | None = opt(
        None, click.Choice(['online', 'offline', 'disabled']),
        'online: upload at once; offline: write into the run folder for `wandb sync`.',
        default_text="the environment's, or online", key='wandb.mode')


@dataclass(frozen=True)
class TensorBoard:
    heading: ClassVar[str] = WandB.heading

    tensorboard: bool = opt(False, ON_OFF, 'Write TensorBoard events into the run folder.', key='tensorboard')
# fmt: on


@dataclass(frozen=True)
class RunConfig(TensorBoard, WandB, Files, Performance, Validation, Network, Hyperparameters, Main):
    """The options of every run.

    None is for defaults that depend on the objective, the data or the teacher: see `configuration.resolve_defaults`.
    Raises: click.UsageError for values that contradict each other.
    """

    def __post_init__(self):
        self._check_averages()
        self._check_network()

        # Validation.
        if self.val and not (self.val_ref or self.val_ref_data):
            raise click.UsageError(
                '--val=1 needs --val_ref=NPZ (made by fid.py ref) or --val_ref_data=ZIP; --val=0 trains '
                'without.'
            )
        if self.val:
            cli.check_seeds(self.val_seed, max(self.val_num, SHOWN), '--val_seed', '--val_num')
            cli.check_seeds(self.val_seed, self.val_pairs, '--val_seed', '--val_pairs')
        if self.val_pairs == 1:
            raise click.UsageError('--val_pairs=1: an interval needs two pairs or more, and 0 is none.')

        if self.shard != 'none' and self.compiled:
            raise click.UsageError(
                f'--shard={self.shard} with --compile is not supported: leave one of them out.'
            )

        # Units.
        if self.duration and self.duration > LONGEST:
            raise click.UsageError(
                f'--duration={self.duration:g} is in millions of images, more than any training has seen: '
                f'for {self.duration:g} thousand images write --duration={self.duration / 1e3:g}.'
            )

        if self.budget and self.duration:
            raise click.UsageError(
                '--budget and --duration exclude each other: one sets how long the run is, in hours or in '
                'images.'
            )

        # Precision and resuming.
        if (self.fp16 and self.precision not in (None, 'fp16')) or (
            self.fp16 is False and self.precision == 'fp16'
        ):
            raise click.UsageError(f'--fp16={self.fp16} contradicts --precision={self.precision}.')
        for name in ('resume_override', 'allow_other_data'):
            if getattr(self, name) and not self.resume:
                raise click.UsageError(f'--{name.replace("_", "-")} needs --resume.')
        if self.resume and self.transfer:
            raise click.UsageError(RESUME_OR_TRANSFER)
        if self.resume and self.budget:
            raise click.UsageError(
                '--budget is for new runs: a resumed run has the duration that was chosen at its start. '
                'Leave it out, or change --duration.'
            )

    def _check_averages(self) -> None:
        stds, widths = self.phema or [], [f'{std:.3f}' for std in self.phema or []]
        low, high = PHEMA_RANGE
        if any(not low <= std <= high for std in stds) or len(set(widths)) < len(widths):
            raise click.UsageError(
                f'--phema={",".join(widths)}: widths lie between {low:g} and {high:g} and differ in the '
                'third decimal, which names files.'
            )

    def _check_network(self) -> None:
        if self.arch == 'edm2' and self.precond in ('vp', 've'):
            raise click.UsageError(
                f"--arch=edm2 has EDM's preconditioning: leave --precond={self.precond} out."
            )
        if self.arch == 'edm2' and self.augment:
            raise click.UsageError(
                f'--arch=edm2 has no augmentation labels: leave --augment={self.augment:g} out.'
            )

    @property
    def arithmetic(self) -> str:
        """The precision that --precision and --fp16 name."""
        return self.precision or ('fp16' if self.fp16 else 'fp32')
