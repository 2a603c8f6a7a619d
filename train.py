"""Train a diffusion model, or distil one into a multistep consistency model."""
from __future__ import annotations

import json
import os
import re

import click

import validation
from dnnlib import EasyDict, UserError, cli
from training.objectives import OBJECTIVES, objectives_with

ARCHITECTURES = dict(
    ddpmpp=dict(model_type='SongUNet', embedding_type='positional', encoder_type='standard', decoder_type='standard', channel_mult_noise=1,
                resample_filter=[1, 1], model_channels=128, channel_mult=[2, 2, 2]),
    ncsnpp=dict(model_type='SongUNet', embedding_type='fourier', encoder_type='residual', decoder_type='standard', channel_mult_noise=2,
                resample_filter=[1, 3, 3, 1], model_channels=128, channel_mult=[2, 2, 2]),
    adm=dict(model_type='DhariwalUNet', model_channels=192, channel_mult=[1, 2, 3, 4]),
    edm2=dict(model_type='UNet', model_channels=192, channel_mult=[1, 2, 3, 4]),
)
PRECONDITIONING = dict(edm='EDMPrecond', vp='VPPrecond', ve='VEPrecond')
EDM2 = 'Precond'  # EDM2's class: EDM's preconditioning around its own U-Net
AUGMENT_DIM = 9  # labels of EDM's augmentation pipeline

MAIN, HYPER, NET, SEG, TEACH, VAL, PERF, IO, LOGS = (
    'Main', 'Hyperparameters', 'Network', 'Multistep consistency (--objective=mcd, mct, direct)', 'Distillation (--objective=mcd, direct)',
    'Validation', 'Precision and performance', 'Input and output', 'Weights & Biases, TensorBoard')
# The network's options: click name -> constructor argument.
NETWORK_OPTIONS = dict(cbase='model_channels', cres='channel_mult', num_blocks='num_blocks', attn_resolutions='attn_resolutions',
                       dropout='dropout', dout_resolutions='dout_resolutions')
FREE_FOR_STUDENTS = ('dropout', 'dout_resolutions')  # they do not change the weights' shapes


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
                 "teacher's solution of each segment.  [default: diffusion]")
@cli.option('--consistency', type=bool, group=MAIN, help='True: as --objective=mcd.  [default: False]')
@cli.option('--duration', metavar='MIMG', type=cli.POSITIVE, group=MAIN,
            help='Length of training in millions of images.  [default: 200; students 210; edm2 teachers 2147]')
@cli.option('--batch', metavar='INT', type=COUNT, group=HYPER, help='Total batch size.  [default: 512; students and edm2 2048]')
@cli.option('--batch-gpu', metavar='INT', type=COUNT, group=HYPER,
            help='Images a process handles at a time; smaller than its share of the batch, gradients accumulate.  [default: its share]')
@cli.option('--lr', metavar='FLOAT', type=cli.POSITIVE, group=HYPER,
            help='Learning rate of Adam.  [default: 0.001, students 8e-5; edm2 0.01, students 0.001]')
@cli.option('--lr_rampup', metavar='KIMG', type=cli.Number(min=0), default=10000, show_default=True, group=HYPER,
            help='Images over which the learning rate rises from 0, in thousands.')
@cli.option('--lr_schedule', type=click.Choice(['constant', 'linear', 'cosine', 'sqrt']), group=HYPER,
            help='Decay of the learning rate: to 0 at the end of training (linear, cosine), or as 1/sqrt(steps) after --lr_decay steps (sqrt).  '
                 '[default: constant; edm2 sqrt]')
@cli.option('--lr_decay', metavar='STEPS', type=COUNT, group=HYPER,
            help='Optimiser steps after which sqrt decays, t_ref of EDM2.  [default: 70000; students 2000]')
@cli.option('--beta2', metavar='FLOAT', type=cli.Number(0, 1, max_open=True), group=HYPER,
            help="Decay of Adam's second moments.  [default: 0.999; edm2 0.99]")
@cli.option('--P_mean', 'P_mean', metavar='FLOAT', type=cli.Number(), group=HYPER,
            help='Mean of ln sigma that teachers are trained at, with --precond=edm.  [default: -1.2; edm2 -0.4]')
@cli.option('--P_std', 'P_std', metavar='FLOAT', type=cli.POSITIVE, group=HYPER, help='And its standard deviation.  [default: 1.2; edm2 1.0]')
@cli.option('--ema', metavar='MIMG', type=Images(), group=HYPER,
            help='Half-life of the weight average, in millions of images; 500kimg and 50Mimg name their unit.  [default: 0.5; students 50]')
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
            help="Dropout probability.  [default: 0.13; edm2 0; for students the teacher's]")
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
            help='Share of samples on the first edges of segments, where sampling asks; with --keep_ties.  [default: 0; direct 0.5]')
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
    state, earlier = load_earlier(opts) if opts.resume else (None, None)
    if opts.seed is None:
        opts.seed = earlier['seed'] if earlier else distributed.broadcast_object(random.SystemRandom().randrange(1 << 31))
    dataset = open_dataset(opts)
    teacher = load_teacher(opts, dataset) if opts.teacher else None
    fill_defaults(opts, dataset, teacher, earlier)
    c = configure(opts, dataset, teacher)
    if earlier and not opts.resume_override:
        check_same_run(opts, c, earlier)
    if opts.dry_run:
        distributed.print0(json.dumps(c, indent=2))
        return
    check_available(c.wandb, c.tensorboard)
    run_dir = make_run_dir(opts, c) if distributed.is_main() else None
    run_dir = distributed.broadcast_object(run_dir)

    from training.training_loop import training_loop
    finished = training_loop(c, run_dir, dataset, teacher, state)
    distributed.shutdown()
    if not finished:
        ctx.exit(EXIT_PREEMPTED)


def check_usage(ctx: click.Context, opts: EasyDict) -> None:
    """Combinations of options that make no sense whatever the files hold; exit status 2."""
    given = [p for p in ctx.command.params if ctx.get_parameter_source(p.name) is click.core.ParameterSource.COMMANDLINE]
    choose_objective(opts, [p for p in given if getattr(p, 'group', None) in (SEG, TEACH)])
    for group, switched_on, cure in ((VAL, opts.val, '--val=1'), (LOGS, opts.wandb, '--wandb=1')):
        stray = [p.opts[0] for p in given if getattr(p, 'group', None) == group and p.name not in ('val', 'wandb', 'tensorboard')]
        if stray and not switched_on:
            raise click.UsageError(f'{", ".join(stray)} needs {cure}.')
    widths = [f'{std:.3f}' for std in opts.phema or []]
    if any(not 0.001 <= std <= 0.28 for std in opts.phema or []) or len(set(widths)) < len(widths):
        raise click.UsageError(f'--phema={",".join(widths)}: widths lie between 0.001 and 0.28 and differ in the third decimal, which names files.')
    student = opts.objective != 'diffusion'
    if student:
        if not opts.S <= opts.T_start <= opts.T_end:
            raise click.UsageError(f'--S={opts.S} <= --T_start={opts.T_start} <= --T_end={opts.T_end} does not hold: every segment needs an edge.')
        if opts.sigma_min >= opts.sigma_max:
            raise click.UsageError(f'--sigma_min={opts.sigma_min:g} is not below --sigma_max={opts.sigma_max:g}.')
        if opts.val_steps not in (None, opts.S):
            raise click.UsageError(f'--val_steps={opts.val_steps}, but the student takes --S={opts.S} steps: leave it out.')
        if opts.top_mass and not opts.keep_ties:
            raise click.UsageError(f'--top-mass={opts.top_mass:g} needs --keep_ties: without them no edge begins where a segment does.')
        if opts.T_anneal_steps is not None and opts.T_anneal_kimg is not None:
            raise click.UsageError('--T_anneal_steps and --T_anneal_kimg say the same: give one of them.')
    stray = [f'--{name}' for name in ('P_mean', 'P_std') if opts[name] is not None]
    if stray and (student or opts.precond in ('vp', 've')):
        raise click.UsageError(f'{", ".join(stray)}: only teachers with --precond=edm are trained at log-normal noise levels.')
    if opts.arch == 'edm2' and opts.precond in ('vp', 've'):
        raise click.UsageError(f'--arch=edm2 has EDM\'s preconditioning: leave --precond={opts.precond} out.')
    if opts.arch == 'edm2' and opts.augment:
        raise click.UsageError(f'--arch=edm2 has no augmentation labels: leave --augment={opts.augment:g} out.')
    if opts.objective == 'mct' and opts.precond in ('vp', 've'):
        raise click.UsageError(f'--objective=mct wants EDM\'s preconditioning: leave --precond={opts.precond} out.')
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
    own = {*objective.options, *(['teacher'] if objective.teacher else []), *(['T_anneal_steps'] if 'T_anneal_kimg' in objective.options else [])}
    for parameter in given:
        if parameter.name not in own:
            name = 'T_anneal_kimg' if parameter.name == 'T_anneal_steps' else parameter.name
            having = objectives_with(name) or [name for name, other in OBJECTIVES.items() if other.teacher]
            raise click.UsageError(f'{parameter.opts[0]} is for --objective={" or ".join(having)}, and this is {opts.objective}.'
                                   + (' (--consistency=True means mcd.)' if 'mcd' in having else ''))
    if objective.teacher and not opts.teacher:
        raise click.UsageError(f'--objective={opts.objective} needs --teacher=PKL, the diffusion model to distil.')
    for name, default in objective.options.items():
        if opts[name] is None:
            opts[name] = default
    if opts.T_start is None:
        opts.T_start = opts.T_end
    if opts.hop != 'addim' and any(parameter.name == 'xvar_frac' for parameter in given):
        raise click.UsageError(f'--xvar_frac is for --hop=addim, not {opts.hop}.')


def fill_defaults(opts: EasyDict, dataset, teacher, earlier: dict | None) -> None:
    """The defaults that depend on other options, the data, the teacher, and the run that is resumed."""
    objective = OBJECTIVES[opts.objective]
    opts.edm2 = type(teacher).__name__ == EDM2 if teacher is not None else opts.arch == 'edm2'
    if dataset.holds_latents:
        if opts.augment:
            raise UserError(f'--augment={opts.augment:g} is for images, but --data={opts.data} holds latents: leave it out.')
        opts.augment = 0.0
    for name, value in {**objective.defaults, **(objective.edm2 if opts.edm2 else {})}.items():
        if name == 'lr_decay' and opts.lr_schedule != 'sqrt':
            continue
        if opts[name] is None:
            opts[name] = Images().convert(value, None, None) if name == 'ema' else value
    if opts.lr_schedule == 'sqrt' and not opts.lr_decay:
        raise click.UsageError('--lr_schedule=sqrt needs --lr_decay=STEPS.')
    if opts.lr_schedule != 'sqrt' and opts.lr_decay:
        raise click.UsageError(f'--lr_decay is for --lr_schedule=sqrt, not {opts.lr_schedule}.')
    if opts.phema_snap is not None and not opts.phema:
        raise click.UsageError('--phema_snap needs --phema.')
    opts.precision = opts.precision or ('fp16' if opts.fp16 else 'fp32')
    opts.ls = opts.ls or ('dynamic' if opts.precision == 'fp16' else 1.0)
    if opts.T_anneal_steps is not None:
        opts.T_anneal_kimg = opts.T_anneal_steps * opts.batch / 1000
    elif opts.T_anneal_kimg is None:
        opts.T_anneal_kimg = ((earlier or {}).get('loss') or {}).get('T_anneal_kimg', opts.duration * 500)
    opts.val_emas = averages_to_evaluate(opts)
    if opts.phema_snap is None:
        opts.phema_snap = opts.snap


def averages_to_evaluate(opts: EasyDict) -> list[str]:
    """The names of the averages that --val_emas means: `ema`, `phema-0.050`, ..."""
    from training.phema import average_name
    known = {'ema': 'ema', **{f'{std:.3f}': average_name(std) for std in opts.phema or []}}
    if opts.val_emas == 'all':
        return list(known.values())
    names = []
    for word in (opts.val_emas or 'ema').split(','):
        number = re.fullmatch(r'(?:phema-)?(0?\.\d+)', word.strip())
        name = known.get(f'{float(number[1]):.3f}' if number else word.strip())
        if name is None or name in names:
            there = ', '.join(known)
            raise click.UsageError(f'--val_emas={opts.val_emas}: {word!r} is not one more of {there}. (Widths are those of --phema.)')
        names.append(name)
    return names


def load_earlier(opts: EasyDict) -> tuple[dict, dict]:
    """The training state of --resume, whose path takes the place of a folder's, and the configuration that it was made with."""
    from torch_utils import distributed
    from training import checkpoint, run_files
    state = None
    if distributed.is_main():
        opts.resume, state = run_files.load_state(opts.resume, report=lambda line: click.echo(line, err=True))
    opts.resume = distributed.broadcast_object(opts.resume)
    state = state or checkpoint.load_state(opts.resume)
    try:
        return state, json.loads(state['options'])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f'--resume={opts.resume} holds no configuration of a run: name a training-state-*.pt file that train.py wrote') from error


def check_same_run(opts: EasyDict, c: EasyDict, earlier: dict) -> None:
    """UserError, naming the setting, where the resumed run would be another one."""
    def settings(config):
        names = ('objective', 'teacher_digest', 'encoder', 'batch_size', 'seed', 'augment', 'phema_stds', 'precision')
        chosen = {name: config.get(name) for name in names}
        return {**chosen, 'xflip': config['dataset']['xflip'], 'network': config['network']['class_name'], **config['network']['kwargs'],
                **config['loss']}

    then, now = settings(earlier), settings(json.loads(json.dumps(c)))
    for name in {**then, **now}:
        if then.get(name) != now.get(name):
            raise UserError(f'--resume={opts.resume} was trained with {name} = {json.dumps(then.get(name))}, these options say '
                            f'{json.dumps(now.get(name))}: resume with the options it was made with, or add --resume-override')


def open_dataset(opts: EasyDict):
    """The training set; UserError where labels are asked for and missing."""
    from training.dataset import ImageFolderDataset
    return ImageFolderDataset(opts.data, use_labels=opts.cond, xflip=opts.xflip, cache=opts.cache)


def load_teacher(opts: EasyDict, dataset):
    """The teacher, if it fits the data; UserError otherwise."""
    from torch_utils import distributed
    from training import encoders
    from training.checkpoint import load_network
    with distributed.main_process_first():
        teacher = load_network(opts.teacher)
    if 'sigmas' in teacher.metadata:
        steps = len(teacher.metadata['sigmas']) - 1
        raise UserError(f'--teacher={opts.teacher} is a student of {steps} steps itself: distil from a diffusion model.')
    theirs = (teacher.img_resolution, teacher.img_channels, teacher.label_dim)
    ours = (dataset.resolution, encoders.for_dataset(dataset, teacher)[1], dataset.label_dim)
    if theirs != ours:
        describe = lambda r, ch, n: f'{r}x{r}x{ch} with {n or "no"} classes'
        cond = ' (--cond=1 reads labels)' if teacher.label_dim and not dataset.label_dim else ''
        tool = '--encode-vae' if 'encoder' in teacher.metadata and not dataset.holds_latents else f'--resolution={theirs[0]}x{theirs[0]}'
        raise UserError(f'--teacher={opts.teacher} expects images of {describe(*theirs)}, but --data={opts.data} gives {describe(*ours)}{cond}.\n'
                        f'       Pick the teacher trained on this data, or convert the data with dataset_tool.py {tool}.')
    if opts.augment and not teacher.init_kwargs.get('augment_dim'):
        raise UserError(f'--augment={opts.augment:g} needs a teacher with augmentation labels; --teacher={opts.teacher} has none: use --augment=0.')
    return teacher


def network_of_teacher(opts: EasyDict, teacher) -> EasyDict:
    """The student's network: the teacher's, with the options that leave its weights alone; UserError where options contradict it."""
    from training.checkpoint import constructor_arguments
    kwargs = constructor_arguments(teacher)
    wanted = dict(PRECONDITIONING=opts.precond and preconditioning(opts), **(ARCHITECTURES[opts.arch] if opts.arch else {}))
    own = dict(kwargs, PRECONDITIONING=type(teacher).__name__)
    own.setdefault('model_type', type(teacher.model).__name__)
    for option, keys in (('precond', ['PRECONDITIONING']), ('arch', ['model_type', 'embedding_type', 'encoder_type'])):
        for key in keys:
            theirs = own.get(key) or default_of(type(teacher.model), key)
            if wanted.get(key) is not None and wanted[key] != theirs:
                raise UserError(f'--{option}={opts[option]} contradicts --teacher={opts.teacher}, which has {theirs}: leave it out.')
    for option, key in NETWORK_OPTIONS.items():
        if opts[option] is None:
            continue
        if option in FREE_FOR_STUDENTS:
            kwargs[key] = opts[option]
            continue
        theirs = as_list(kwargs.get(key, default_of(type(teacher.model), key)))
        if opts[option] != theirs:
            raise UserError(f'--{option}={opts[option]} contradicts --teacher={opts.teacher}, which has {theirs}: leave it out.')
    kwargs['use_fp16'] = opts.precision == 'fp16'
    return EasyDict(class_name=type(teacher).__name__, kwargs=kwargs)


def default_of(cls: type, argument: str):
    """The default of a constructor argument of a class; None where it has no such argument."""
    import inspect
    parameter = inspect.signature(cls).parameters.get(argument)
    return parameter and parameter.default


def as_list(value):
    """Tuples as lists, everything else as it is."""
    return list(value) if isinstance(value, tuple) else value


def preconditioning(opts: EasyDict) -> str:
    """The class of preconditioning that --arch and --precond name."""
    if opts.edm2 and opts.precond in (None, 'edm'):
        return EDM2
    return PRECONDITIONING[opts.precond or 'edm']


def network_from_scratch(opts: EasyDict, dataset, channels: int) -> EasyDict:
    """The network that the options describe, for encoded images of so many channels."""
    kwargs = dict(img_resolution=dataset.resolution, img_channels=channels, label_dim=dataset.label_dim,
                  use_fp16=opts.precision == 'fp16', **ARCHITECTURES[opts.arch or 'ddpmpp'])
    for option, key in NETWORK_OPTIONS.items():
        if opts[option] is not None:
            kwargs[key] = opts[option]
    if opts.augment:
        kwargs['augment_dim'] = AUGMENT_DIM
    if not kwargs['channel_mult'] or dataset.resolution % 2 ** (len(kwargs['channel_mult']) - 1):
        raise UserError(f'{len(kwargs["channel_mult"])} levels do not fit images of {dataset.resolution}x{dataset.resolution}: change --cres.')
    if opts.edm2:  # its preconditioning knows one U-Net
        del kwargs['model_type']
    network = EasyDict(class_name=preconditioning(opts), kwargs=kwargs)
    try:
        try_network(network)
    except (RuntimeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f'these options make no network that works ({str(error).splitlines()[0]}): channels should be multiples of 4 with 32 groups '
                        'or fewer, see --cbase and --cres.') from error
    return network


def try_network(network: EasyDict) -> None:
    """Build the network without memory behind it and pass one image through; raises what is wrong with it."""
    import torch

    from training.checkpoint import NETWORKS
    with torch.device('meta'):
        net = NETWORKS[network.class_name](**network.kwargs)
        net(torch.zeros(1, net.img_channels, net.img_resolution, net.img_resolution), torch.ones(1))


def configure(opts: EasyDict, dataset, teacher) -> EasyDict:
    """The whole run as plain data: what --dry-run prints, training_options.json records and `training_loop` takes."""
    from torch_utils import distributed
    from training import encoders, samplers
    from training.checkpoint import network_digest
    from training.loss import DIFFUSION_LOSSES
    processes = distributed.get_world_size()
    if opts.batch % processes or (opts.batch_gpu and opts.batch // processes % min(opts.batch_gpu, opts.batch // processes)):
        parts = f'equal parts of --batch-gpu={opts.batch_gpu}' if opts.batch_gpu else 'equal parts'
        raise click.UsageError(f'--batch={opts.batch} cannot be split into {parts} on {processes} process(es).')
    c = EasyDict(objective=opts.objective, teacher=opts.teacher, total_nimg=max(round(opts.duration * 1e6), 1))
    c.teacher_digest = network_digest(teacher, {}) if teacher is not None else None
    c.dataset = EasyDict(path=opts.data, use_labels=opts.cond, resolution=dataset.resolution, xflip=opts.xflip, cache=dataset.caches)
    encoder, channels = encoders.for_dataset(dataset, teacher)
    c.encoder = encoders.record_of(encoder)
    c.network = network_of_teacher(opts, teacher) if teacher is not None else network_from_scratch(opts, dataset, channels)
    if own := OBJECTIVES[opts.objective].options:
        c.loss = EasyDict({name: opts[name] for name in own}, sigma_data=float(getattr(teacher, 'sigma_data', 0.5)))
        c.loss.sigma_min, c.loss.sigma_max = samplers.clip_range(teacher, opts.sigma_min, opts.sigma_max)
    else:
        c.loss = EasyDict(kind='edm2' if opts.edm2 else opts.precond or 'edm')
        for name in ('P_mean', 'P_std'):  # of losses that have them
            if (default := default_of(DIFFUSION_LOSSES[c.loss.kind], name)) is not None:
                c.loss[name] = default if opts[name] is None else opts[name]
    c.update(batch_size=opts.batch, batch_gpu=opts.batch_gpu, lr=opts.lr, betas=[0.9, opts.beta2], eps=1e-8, lr_rampup_nimg=opts.lr_rampup * 1e3,
             lr_schedule=opts.lr_schedule, lr_ref_nimg=(opts.lr_decay or 0) * opts.batch, loss_scaling=None if opts.ls == 'dynamic' else opts.ls,
             grad_clip=opts.grad_clip, precision=opts.precision, max_bad_steps=opts.max_bad_steps, augment=opts.augment)
    c.update(ema_halflife_nimg=opts.ema, ema_rampup_ratio=opts.ema_rampup or None, phema_stds=opts.phema or [])
    c.update(kimg_per_tick=opts.tick, snapshot_ticks=opts.snap, phema_snapshot_ticks=opts.phema_snap, state_dump_ticks=opts.dump,
             states_kept=opts.keep, on_save_error=opts.on_save_error,
             seed=opts.seed, workers=opts.workers, cudnn_benchmark=opts.bench, transfer=opts.transfer, resume=opts.resume)
    c.validation = None
    if opts.val:
        names = ('ref', 'ref_data', 'detector', 'steps', 'every', 'emas', 'at_start', 'teacher', 'num', 'batch', 'seed', 'label', 'dump_images_dir',
                 'overwrite')
        c.validation = EasyDict({name: opts[f'val_{name}'] for name in names})
    c.wandb = None
    if opts.wandb:
        c.wandb = EasyDict(project=opts.wandb_project, entity=opts.wandb_entity, name=opts.wandb_run, mode=opts.wandb_mode,
                           tags=[tag.strip() for tag in (opts.wandb_tags or '').split(',') if tag.strip()])
    c.tensorboard = opts.tensorboard
    c.run_dir = planned_run_dir(opts, c, dataset.name)
    return c


def planned_run_dir(opts: EasyDict, c: EasyDict, data_name: str) -> str:
    """`<outdir>/00000-<data>-<cond>-<arch>-...`, numbered after the highest that is there; --nosubdir: outdir; --resume: the state's folder."""
    if opts.resume:
        return os.path.dirname(os.path.abspath(opts.resume))
    if opts.nosubdir:
        return opts.outdir
    from torch_utils import distributed
    try:
        there = os.listdir(opts.outdir) if os.path.isdir(opts.outdir) else []
    except OSError as error:
        raise UserError(f'--outdir={opts.outdir} cannot be read: {error.strerror}') from error
    numbers = [int(m[1]) for m in map(re.compile(r'(\d+)-').match, there) if m]
    arch = opts.arch or ('ddpmpp' if not opts.teacher else 'teacher')
    student = [f'{OBJECTIVES[opts.objective].loss_class().name}-s{opts.S}'] if opts.S else []
    words = [data_name, 'cond' if opts.cond else 'uncond', arch, opts.precond or 'edm', *student,
             f'gpus{distributed.get_world_size()}', f'batch{opts.batch}', opts.precision, *([opts.desc] if opts.desc else [])]
    return os.path.join(opts.outdir, f'{max(numbers, default=-1) + 1:05d}-{"-".join(words)}')


def make_run_dir(opts: EasyDict, c: EasyDict) -> str:
    """Create the run folder with training_options.json; a resumed run's folder is there already."""
    if opts.resume:
        return c.run_dir
    from dnnlib.util import atomic_write
    from training.run_files import saved_states
    if saved_states(c.run_dir):
        raise UserError(f'--outdir={opts.outdir} holds training states of an earlier run: go on with it by --resume={opts.outdir}, or choose '
                        'another folder.')
    try:
        os.makedirs(c.run_dir, exist_ok=opts.nosubdir)
        with atomic_write(os.path.join(c.run_dir, 'training_options.json')) as file:
            file.write(json.dumps(c, indent=2).encode())
    except OSError as error:
        raise UserError(f'--outdir={opts.outdir} cannot be written to: {error.strerror or error}') from error
    return c.run_dir


if __name__ == '__main__':
    main()
