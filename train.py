"""Train a diffusion model, or distil one into a multistep consistency model."""
from __future__ import annotations

import json
import re

import click

import validation
from dnnlib import EasyDict, cli
from training import configuration
from training.configuration import ARCHITECTURES, PRECONDITIONING
from training.objectives import OBJECTIVES, objectives_with

MAIN, HYPER, NET, SEG, TEACH, ECT, VAL, PERF, IO, LOGS = (
    'Main', 'Hyperparameters', 'Network', 'Multistep consistency (--objective=mcd, mct, direct)', 'Distillation (--objective=mcd, direct)',
    'Easy consistency tuning (--objective=ect)', 'Validation', 'Precision and performance', 'Input and output', 'Weights & Biases, TensorBoard')
IN_STEPS = dict(T_anneal_steps='T_anneal_kimg', stage_steps='stage_nimg')  # options that say in optimiser steps what a loss counts in images


class Images(click.ParamType):
    """A number of images: `50` and `50Mimg` are millions, `500kimg` thousands."""

    name = 'images'

    def convert(self, value, param, ctx):
        match = re.fullmatch(r'([0-9.eE+-]+)\s*(Mimg|kimg|)', str(value))
        try:
            return cli.POSITIVE.convert(match[1], param, ctx) * (1e3 if match[2] == 'kimg' else 1e6)
        except TypeError:
            self.fail(f'{value!r} is not a number of images such as 50, 50Mimg or 500kimg', param, ctx)


class LossScale(click.ParamType):
    """A positive number, or `dynamic`."""

    name = 'float'

    def convert(self, value, param, ctx):
        return value if value == 'dynamic' else cli.POSITIVE.convert(value, param, ctx)


COUNT = click.IntRange(min=1)
TICKS = click.IntRange(min=0)


def switch(name: str, **kwargs):
    """A boolean flag as `--name/--no_name`, whose default depends on the objective."""
    return cli.option(f'--{name}/--no_{name}', name, default=None, **kwargs)


@click.command(cls=cli.Command)
@cli.option('--outdir', metavar='DIR', required=True, group=MAIN, help='Where to make the numbered folder of this run.')
@cli.option('--data', metavar='ZIP|DIR', required=True, group=MAIN, help='Data set, made by dataset_tool.py.')
@cli.option('--cond', type=bool, default=False, show_default=True, group=MAIN, help='Train a class-conditional model; needs labels.')
@cli.option('--arch', type=click.Choice(list(ARCHITECTURES)), group=MAIN, help="Network.  [default: ddpmpp; for students the teacher's]")
@cli.option('--precond', type=click.Choice(list(PRECONDITIONING)), group=MAIN,
            help="Preconditioning and, for teachers, loss.  [default: edm; for students the teacher's]")
@cli.option('--objective', type=click.Choice(list(OBJECTIVES)), group=MAIN,
            help='diffusion: a teacher; mcd: multistep consistency distillation; mct: the same without a teacher; direct: regression on the '
                 "teacher's solution of each segment; ect: easy consistency tuning.  [default: diffusion]")
@cli.option('--consistency', type=bool, group=MAIN, help='True: as --objective=mcd.  [default: False]')
@cli.option('--duration', metavar='MIMG', type=cli.POSITIVE, group=MAIN,
            help='Length of training in millions of images.  [default: 200; students 210; ect 51.2; edm2 teachers 2147]')
@cli.option('--batch', metavar='INT', type=COUNT, group=HYPER, help='Total batch size.  [default: 512; students and edm2 2048; ect 128]')
@cli.option('--batch-gpu', metavar='INT', type=COUNT, group=HYPER,
            help='Images a process handles at a time; smaller than its share of the batch, gradients accumulate.  [default: its share]')
@cli.option('--optim', type=click.Choice(['adam', 'radam']), group=HYPER, help='Optimiser.  [default: adam; ect radam]')
@cli.option('--lr', metavar='FLOAT', type=cli.POSITIVE, group=HYPER,
            help='Learning rate.  [default: 0.001, students 8e-5, ect 1e-4; edm2 0.01, students 0.001]')
@cli.option('--lr_rampup', metavar='KIMG', type=cli.Number(min=0), group=HYPER,
            help='Images over which the learning rate rises from 0, in thousands.  [default: 10000; ect 0]')
@cli.option('--lr_schedule', type=click.Choice(['constant', 'linear', 'cosine', 'sqrt']), group=HYPER,
            help='Decay of the learning rate: to 0 at the end of training (linear, cosine), or as 1/sqrt(steps) after --lr_decay steps (sqrt).  '
                 '[default: constant; edm2 sqrt]')
@cli.option('--lr_decay', metavar='STEPS', type=COUNT, group=HYPER,
            help='Optimiser steps after which sqrt decays, t_ref of EDM2.  [default: 70000; students 2000]')
@cli.option('--beta2', metavar='FLOAT', type=cli.Number(0, 1, max_open=True), group=HYPER,
            help="Decay of Adam's second moments.  [default: 0.999; edm2 0.99]")
@cli.option('--P_mean', 'P_mean', metavar='FLOAT', type=cli.Number(), group=HYPER,
            help='Mean of ln sigma that teachers, with --precond=edm, and ect are trained at.  [default: -1.2; edm2 -0.4; ect -1.1]')
@cli.option('--P_std', 'P_std', metavar='FLOAT', type=cli.POSITIVE, group=HYPER,
            help='And its standard deviation.  [default: 1.2; edm2 1.0; ect 2]')
@cli.option('--ema', metavar='MIMG', type=Images(), group=HYPER,
            help='Half-life of the weight average, in millions of images; 500kimg and 50Mimg name their unit.  '
                 '[default: 0.5; students 50; ect 0.887]')
@cli.option('--ema_rampup', metavar='FLOAT', type=cli.Number(min=0), default=0.05, show_default=True, group=HYPER,
            help='The effective half-life is at most this fraction of the images seen; 0 for no limit.')
@cli.option('--phema', metavar='LIST', type=cli.NumberList(float), group=HYPER,
            help='Relative widths of power-function EMAs to keep as well, as in 0.05,0.10.  [default: none; edm2 0.05,0.1]')
@cli.option('--augment', metavar='FLOAT', type=cli.Number(0, 1), group=HYPER, help='Augmentation probability.  [default: 0.12; students and edm2 0]')
@cli.option('--grad-clip', metavar='FLOAT', type=cli.POSITIVE, group=HYPER, help='Shorten gradients whose norm is larger.  [default: never]')
@cli.option('--xflip', type=bool, default=False, show_default=True, group=HYPER, help='Add mirrored copies of all images.')
@cli.option('--cbase', metavar='INT', type=COUNT, group=NET, help='Channels of the finest level.  [default: by --arch]')
@cli.option('--cres', metavar='LIST', type=cli.NumberList(), group=NET, help='Channel multiplier of each level.  [default: by --arch]')
@cli.option('--num_blocks', metavar='INT', type=COUNT, group=NET, help='Residual blocks a level.  [default: by --arch]')
@cli.option('--attn_resolutions', metavar='LIST', type=cli.NumberList(), group=NET, help='Resolutions with self-attention.  [default: by --arch]')
@cli.option('--dropout', metavar='FLOAT', type=cli.Number(0, 1, max_open=True), group=NET,
            help="Dropout probability.  [default: 0.13; edm2 0; mct 0, ect 0.2; for students of a teacher the teacher's]")
@cli.option('--dout_resolutions', metavar='LIST', type=cli.NumberList(), group=NET, help='Resolutions with dropout.  [default: all]')
@cli.option('--S', 'S', metavar='INT', type=COUNT, group=SEG, help='Sampling steps of the student.  [default: 8]')
@cli.option('--T_start', 'T_start', metavar='INT', type=COUNT, group=SEG,
            help='Edges of the fine grid at the start of training (Heek et al. 2024).  [default: 64; direct as --T_end]')
@cli.option('--T_end', 'T_end', metavar='INT', type=COUNT, group=SEG, help='And at the end.  [default: 1280]')
@cli.option('--T_anneal_kimg', 'T_anneal_kimg', metavar='KIMG', type=cli.Number(min=0), group=SEG,
            help='Thousands of images over which T rises.  [default: half of --duration]')
@cli.option('--T_anneal_steps', 'T_anneal_steps', metavar='INT', type=TICKS, group=SEG, help='The same in optimiser steps.')
@cli.option('--student_grid', type=click.Choice(['edm', 'full']), group=SEG,
            help='The student steps on S nodes and 0 (edm), or on the first S of S+1 nodes and 0 (full).  [default: edm]')
@cli.option('--sigma_grid', type=click.Choice(['karras', 'cosine']), group=SEG,
            help="How nodes are spaced: Karras's, or evenly in the time of the cosine schedule.  [default: karras]")
@cli.option('--rho', metavar='FLOAT', type=cli.RHO, group=SEG, help="Exponent of Karras's noise levels.  [default: 7]")
@cli.option('--sigma_min', metavar='FLOAT', type=cli.POSITIVE, group=SEG, help='Lowest noise level above 0.  [default: 0.002]')
@cli.option('--sigma_max', metavar='FLOAT', type=cli.POSITIVE, group=SEG, help='Highest noise level.  [default: 80]')
@cli.option('--sampling_mode', type=click.Choice(['edm', 'vp', 'uniform']), group=SEG,
            help='How edges are drawn: by the training densities of edm or vp, or uniformly over segments.  [default: edm]')
@switch('keep_ties', group=SEG, help="Keep the fine grid's nodes that are levels of the student: it is trained at the levels that it samples at.  "
                                     '[default: off; direct on]')
@cli.option('--top-mass', metavar='FLOAT', type=cli.Number(0, 1), group=SEG,
            help='Share of samples on the first edges of segments, where sampling asks; with --keep_ties.  [default: 0; direct 0.9]')
@cli.option('--cd_loss', type=click.Choice(['pseudo_huber', 'l2_root', 'l2', 'huber']), group=SEG,
            help="Distance between the student's image and its target.  [default: pseudo_huber]")
@cli.option('--cd_weight_mode', group=SEG,
            type=click.Choice(['sqrt_karras', 'edm', 'karras', 'vlike', 'snr+1', 'snr', 'truncated-snr', 'flat', 'uniform', 'sqrt_gap']),
            help='Loss weight by noise level: sqrt_karras = sqrt(1/sigma^2 + 1/sigma_data^2), edm its square, sqrt_gap = sqrt(sigma_t - sigma_s).  '
                 '[default: sqrt_karras]')
@switch('sync_dropout', group=SEG, help='mcd, mct: the self-target sees the dropout masks of the student.  [default: on]')
@cli.option('--teacher', metavar='PKL|URL', group=TEACH, help='Snapshot of the diffusion model to distil.')
@cli.option('--hop', type=click.Choice(['heun', 'ddim', 'addim']), group=TEACH, help="mcd: the teacher's step across an edge.  [default: heun]")
@cli.option('--xvar_frac', metavar='FLOAT', type=cli.Number(min=0), group=TEACH,
            help="mcd with --hop=addim: share of the image's squared error that is put back as noise; 0: a guess without the image.  [default: 0.75]")
@switch('terminal_anchor', group=TEACH, help='mcd: give the first and last edge 1/T each; at sigma_max the target is the teacher\'s own solution.  '
                                             '[default: on]')
@switch('terminal_teacher_hop', group=TEACH, help="mcd: on the edge to 0, aim at the teacher's denoised image, not at the data.  [default: on]")
@cli.option('--anchor_hops', metavar='INT', type=COUNT, group=TEACH,
            help='mcd: Heun steps of the solution at sigma_max.  [default: 4; 32 where the first segment ends below sigma = 10]')
@cli.option('--substeps', metavar='INT', type=COUNT, group=TEACH, help='direct: Heun steps of the teacher over a segment.  [default: 3]')
@cli.option('--q', metavar='FLOAT', type=cli.Number(min=1, min_open=True), group=ECT,
            help='1 - r/t shrinks by this factor from stage to stage.  [default: 2]')
@cli.option('--k', metavar='FLOAT', type=cli.Number(min=0), group=ECT,
            help='Of 1 - r/t = q^-(stage+1) (1 + k sigmoid(-b t)); 0: one ratio for all t.  [default: 8]')
@cli.option('--b', metavar='FLOAT', type=cli.Number(min=0), group=ECT, help='Slope of the sigmoid.  [default: 1]')
@cli.option('--c', metavar='FLOAT', type=cli.Number(min=0), group=ECT, help='Constant of the pseudo-Huber distance.  [default: 0]')
@cli.option('--stage_steps', metavar='INT', type=COUNT, group=ECT, help='Optimiser steps of a stage.  [default: an eighth of --duration]')
@cli.option('--ect_weight', type=click.Choice(['gap', 'flat', 'inv', 'inv_sum', 'snr', 'karras', 'c_in_squared']), group=ECT,
            help='Loss weight: gap = 1/(t - r), or of t alone 1, 1/t, 1/t + 1/sigma_data, 1/t^2, 1/t^2 + 1/sigma_data^2, 1/(t^2 + sigma_data^2).  '
                 '[default: gap]')
@cli.option('--mid_t', metavar='FLOAT', type=cli.POSITIVE, group=ECT, help='Noise level of the second sampling step.  [default: one step]')
@cli.option('--val', type=bool, default=False, show_default=True, group=VAL, help='Evaluate the Frechet distance during training.')
@cli.option('--val_ref', metavar='NPZ|URL', group=VAL, help='Reference statistics, made by fid.py ref.')
@cli.option('--val_ref_data', metavar='ZIP|DIR', group=VAL, help='Or images to compute them from at the start.')
@cli.option('--val_detector', metavar='PATH|URL', group=VAL, help="TorchScript feature detector.  [default: NVIDIA's Inception]")
@cli.option('--val_steps', metavar='INT', type=COUNT, group=VAL,
            help="Sampling steps.  [default: the student's S; 18 for teachers]")
@cli.option('--val_every', metavar='TICKS', type=COUNT, default=50, show_default=True, group=VAL, help='How often to evaluate.')
@cli.option('--val_emas', metavar='LIST', group=VAL,
            help='Averages to evaluate: ema, widths of --phema as in 0.05, or all. The first decides which state is the best.  [default: ema]')
@cli.option('--val_at_start', type=bool, default=False, show_default=True, group=VAL, help='Evaluate before the first step.')
@cli.option('--val_teacher', type=bool, default=False, show_default=True, group=VAL, help='Evaluate the teacher (Heun, 18 steps) once at the start.')
@cli.option('--val_num', metavar='INT', type=click.IntRange(min=2), default=50000, show_default=True, group=VAL, help='Images to generate.')
@cli.option('--val_batch', metavar='INT', type=COUNT, default=64, show_default=True, group=VAL,
            help='Images a process makes at a time.')
@cli.option('--val_seed', metavar='INT', type=TICKS, default=0, show_default=True, group=VAL, help='First seed.')
@cli.option('--val_label', metavar='MODE', type=validation.LabelMode(), default='auto', show_default=True, group=VAL,
            help='Classes: uniform, dataset (those of training images), fixed:K; auto: dataset where it has labels.')
@cli.option('--val_dump_images_dir', metavar='DIR', group=VAL, help='Keep the generated images, in a folder for each evaluation.')
@cli.option('--val_overwrite', type=bool, default=False, show_default=True, group=VAL, help='Replace images that are there already.')
@cli.option('--precision', type=click.Choice(['fp32', 'fp16', 'bf16', 'fp64']), group=PERF,
            help='Arithmetic inside the network; fp16 on GPUs only. Weights stay FP32, with fp64 FP64.  [default: fp32]')
@cli.option('--fp16', type=bool, group=PERF, help='True: as --precision=fp16.  [default: False]')
@cli.option('--ls', metavar='FLOAT', type=LossScale(), group=PERF,
            help='Loss scaling: a number, or dynamic.  [default: dynamic with fp16, else 1]')
@cli.option('--max-bad-steps', metavar='INT', type=COUNT, default=100, show_default=True, group=PERF,
            help='Stop after so many steps in a row whose loss or gradient is not finite; each is left out.')
@cli.option('--bench', type=bool, default=True, show_default=True, group=PERF, help='cuDNN benchmarking.')
@cli.option('--cache', type=bool, group=PERF, help='Keep decoded images in memory.  [default: True; latents False]')
@cli.option('--workers', metavar='INT', type=TICKS, default=1, show_default=True, group=PERF, help='Processes that load data.')
@cli.option('--desc', metavar='STR', group=IO, help="Words to add to the run folder's name.")
@cli.option('--nosubdir', is_flag=True, group=IO, help='Write into --outdir itself.')
@cli.option('--tick', metavar='KIMG', type=cli.POSITIVE, default=50, show_default=True, group=IO,
            help='How often to print progress; fractions allowed.')
@cli.option('--snap', metavar='TICKS', type=TICKS, default=50, show_default=True, group=IO,
            help='How often to save snapshots; 0: never.')
@cli.option('--phema_snap', metavar='TICKS', type=TICKS, group=IO, help='How often to save those of --phema.  [default: as --snap]')
@cli.option('--dump', metavar='TICKS', type=TICKS, default=500, show_default=True, group=IO,
            help='How often to save the training state; 0: never.')
@cli.option('--keep', metavar='INT', type=COUNT, default=2, show_default=True, group=IO,
            help='Training states to keep: the newest so many, and the one with the least distance in validation.')
@cli.option('--on-save-error', type=click.Choice(['stop', 'continue']), default='stop', show_default=True, group=IO,
            help='What to do when a file cannot be written, as on a full disk.')
@cli.option('--seed', metavar='INT', type=TICKS, group=IO, help='Random seed.  [default: random]')
@cli.option('--transfer', metavar='PKL|URL', group=IO, help='Start from the weights of this snapshot, where they fit.')
@cli.option('--resume', metavar='PT|DIR', group=IO, help='Continue from a training state, in its folder; of a run folder, the newest whole one.')
@cli.option('--resume-override', is_flag=True, group=IO, help='Resume although options differ that make it another run.')
@cli.option('-n', '--dry-run', is_flag=True, group=IO, help='Print the configuration as JSON and exit.')
@cli.option('--wandb', type=bool, is_flag=False, flag_value=True, default=False, show_default=True, group=LOGS, help='Log to Weights & Biases.')
@cli.option('--wandb_project', metavar='STR', group=LOGS, help="Project.  [default: the environment's, or W&B's]")
@cli.option('--wandb_entity', metavar='STR', group=LOGS, help='User or team.  [default: yours]')
@cli.option('--wandb_run', metavar='STR', group=LOGS, help="Name of the run.  [default: the run folder's]")
@cli.option('--wandb_tags', metavar='LIST', group=LOGS, help='Comma-separated tags.  [default: none]')
@cli.option('--wandb_mode', type=click.Choice(['online', 'offline', 'disabled']), group=LOGS,
            help="Upload at once, or write into the run folder for `wandb sync`.  [default: the environment's, or online]")
@cli.option('--tensorboard', type=bool, is_flag=False, flag_value=True, default=False, show_default=True, group=LOGS,
            help='Write TensorBoard events into the run folder.')
@click.pass_context
def main(ctx, **kwargs):
    """Train a diffusion model (a teacher), or distil a teacher into a student that samples in --S evaluations.

    \b
    A class-conditional DDPM++ teacher on 8 GPUs:
      torchrun --standalone --nproc_per_node=8 train.py --outdir=training-runs \\
          --data=datasets/cifar10-32x32.zip --cond=1 --arch=ddpmpp
    \b
    An 8-step student of EDM's ImageNet-64 model:
      torchrun --standalone --nproc_per_node=8 train.py --outdir=training-runs \\
          --data=datasets/imagenet-64x64.zip --cond=1 --consistency=True \\
          --teacher=edm-imagenet-64x64-cond-adm.pkl --S=8 --batch-gpu=64 --fp16=True
    """
    opts = EasyDict(kwargs)
    check_usage(ctx, opts)

    import random

    from torch_utils import distributed
    from torch_utils.preemption import EXIT_PREEMPTED
    from training.run_log import check_available
    distributed.init()
    state, earlier = configuration.load_earlier(opts) if opts.resume else (None, None)
    if opts.seed is None:
        opts.seed = earlier['seed'] if earlier else distributed.broadcast_object(random.SystemRandom().randrange(1 << 31))
    dataset = configuration.open_dataset(opts)
    teacher = configuration.load_teacher(opts, dataset) if opts.teacher else None
    configuration.fill_defaults(opts, dataset, teacher, earlier)
    c = configuration.configure(opts, dataset, teacher)
    if earlier and not opts.resume_override:
        configuration.check_same_run(opts, c, earlier)
    if opts.dry_run:
        distributed.print0(json.dumps(c, indent=2))
        return
    check_available(c.wandb, c.tensorboard)
    run_dir = configuration.make_run_dir(opts, c) if distributed.is_main() else None
    run_dir = distributed.broadcast_object(run_dir)

    from training.training_loop import training_loop
    finished = training_loop(c, run_dir, dataset, teacher, state)
    distributed.shutdown()
    if not finished:
        ctx.exit(EXIT_PREEMPTED)


def check_usage(ctx: click.Context, opts: EasyDict) -> None:
    """Combinations of options that make no sense whatever the files hold; exit status 2."""
    given = [p for p in ctx.command.params if ctx.get_parameter_source(p.name) is click.core.ParameterSource.COMMANDLINE]
    choose_objective(opts, [p for p in given if getattr(p, 'group', None) in (SEG, TEACH, ECT)])
    for group, switched_on, cure in ((VAL, opts.val, '--val=1'), (LOGS, opts.wandb, '--wandb=1')):
        stray = [p.opts[0] for p in given if getattr(p, 'group', None) == group and p.name not in ('val', 'wandb', 'tensorboard')]
        if stray and not switched_on:
            raise click.UsageError(f'{", ".join(stray)} needs {cure}.')
    widths = [f'{std:.3f}' for std in opts.phema or []]
    if any(not 0.001 <= std <= 0.28 for std in opts.phema or []) or len(set(widths)) < len(widths):
        raise click.UsageError(f'--phema={",".join(widths)}: widths lie between 0.001 and 0.28 and differ in the third decimal, which names files.')
    objective = OBJECTIVES[opts.objective]
    if objective.loss and opts.sigma_min >= opts.sigma_max:
        raise click.UsageError(f'--sigma_min={opts.sigma_min:g} is not below --sigma_max={opts.sigma_max:g}.')
    if opts.mid_t is not None and not opts.sigma_min <= opts.mid_t < opts.sigma_max:
        raise click.UsageError(f'--mid_t={opts.mid_t:g} does not lie between --sigma_min={opts.sigma_min:g} and --sigma_max={opts.sigma_max:g}.')
    if 'S' in objective.options:
        if not opts.S <= opts.T_start <= opts.T_end:
            raise click.UsageError(f'--S={opts.S} <= --T_start={opts.T_start} <= --T_end={opts.T_end} does not hold: every segment needs an edge.')
        if opts.val_steps not in (None, opts.S):
            raise click.UsageError(f'--val_steps={opts.val_steps}, but the student takes --S={opts.S} steps: leave it out.')
        if opts.top_mass and not opts.keep_ties:
            raise click.UsageError(f'--top-mass={opts.top_mass:g} needs --keep_ties: without them no edge begins where a segment does.')
        if opts.T_anneal_steps is not None and opts.T_anneal_kimg is not None:
            raise click.UsageError('--T_anneal_steps and --T_anneal_kimg say the same: give one of them.')
    stray = [f'--{name}' for name in ('P_mean', 'P_std') if opts[name] is not None]
    if stray and ((objective.loss and 'P_mean' not in objective.options) or opts.precond in ('vp', 've')):
        raise click.UsageError(f'{", ".join(stray)}: only teachers with --precond=edm, and ect, are trained at log-normal noise levels.')
    if opts.arch == 'edm2' and opts.precond in ('vp', 've'):
        raise click.UsageError(f'--arch=edm2 has EDM\'s preconditioning: leave --precond={opts.precond} out.')
    if opts.arch == 'edm2' and opts.augment:
        raise click.UsageError(f'--arch=edm2 has no augmentation labels: leave --augment={opts.augment:g} out.')
    if objective.loss and not objective.teacher and opts.precond in ('vp', 've'):
        raise click.UsageError(f'--objective={opts.objective} wants EDM\'s preconditioning: leave --precond={opts.precond} out.')
    if opts.val_teacher and not opts.teacher:
        raise click.UsageError(f'--val_teacher=1 needs a teacher, and --objective={opts.objective} has none.')
    if opts.val and not (opts.val_ref or opts.val_ref_data):
        raise click.UsageError('--val=1 needs --val_ref=NPZ (made by fid.py ref) or --val_ref_data=ZIP.')
    if opts.fp16 and opts.precision not in (None, 'fp16'):
        raise click.UsageError(f'--fp16=True contradicts --precision={opts.precision}.')
    if opts.resume_override and not opts.resume:
        raise click.UsageError('--resume-override needs --resume.')
    if opts.resume and opts.transfer:
        raise click.UsageError('--resume and --transfer exclude each other: a training state holds the weights.')


def choose_objective(opts: EasyDict, given: list[click.Parameter]) -> None:
    """Settle `opts.objective` and the options of its own; UsageError where options belong to another one."""
    if opts.consistency and opts.objective not in (None, 'mcd'):
        raise click.UsageError(f'--consistency=True means --objective=mcd, not {opts.objective}: leave one of them out.')
    opts.objective = opts.objective or ('mcd' if opts.consistency else 'diffusion')
    objective = OBJECTIVES[opts.objective]
    own = {**objective.options, **objective.sampling, **({'teacher': None} if objective.teacher else {})}
    for parameter in given:
        name = IN_STEPS.get(parameter.name, parameter.name)
        if name not in own:
            having = objectives_with(name) or [name for name, other in OBJECTIVES.items() if other.teacher]
            raise click.UsageError(f'{parameter.opts[0]} is for --objective={" or ".join(having)}, and this is {opts.objective}.'
                                   + (' (--consistency=True means mcd.)' if 'mcd' in having else ''))
    if objective.teacher and not opts.teacher:
        raise click.UsageError(f'--objective={opts.objective} needs --teacher=PKL, the diffusion model to distil.')
    for name, default in own.items():
        if opts.get(name) is None:
            opts[name] = default
    if opts.T_start is None:
        opts.T_start = opts.T_end
    if opts.hop != 'addim' and any(parameter.name == 'xvar_frac' for parameter in given):
        raise click.UsageError(f'--xvar_frac is for --hop=addim, not {opts.hop}.')


if __name__ == '__main__':
    main()
