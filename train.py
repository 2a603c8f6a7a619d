"""Train a diffusion model, or distil one into a multistep consistency model."""

from __future__ import annotations

import dnnlib.interrupts  # noqa: F401  (first)

import contextlib
import json
import re
import sys
from collections.abc import Iterator

import click

from dnnlib import EasyDict, UserError, cli
from dnnlib.text import printable
from metrics.validator import SHOWN, LabelMode, check_files
from training import configuration
from training.configuration import ARCHITECTURES, IN_STEPS, PRECONDITIONING
from training.objectives import OBJECTIVES, objectives_with

MAIN, HYPER, NET, TEACH, LEVELS, SEG, DIRECT, PD, CM, ECT, TCM, VAL, PERF, IO, LOGS = (
    'Main',
    'Hyperparameters',
    'Network',
    'Distillation (--objective=mcd, direct, pd, cm-cd, tcm)',
    'All objectives but diffusion',
    'Multistep consistency (--objective=mcd, mct, direct, pd)',
    'Segment regression (--objective=direct)',
    'Progressive distillation (--objective=pd)',
    'Consistency models (--objective=cm-cd, cm-ct, ict)',
    'Easy consistency tuning (--objective=ect, tcm)',
    'Truncated consistency models (--objective=tcm)',
    'Validation',
    'Precision and performance',
    'Input and output',
    'Weights & Biases, TensorBoard',
)
OWN = (TEACH, LEVELS, SEG, DIRECT, PD, CM, ECT, TCM)  # groups of options that not every objective has

# Options that turn others off where they are given with this value, and the groups or names of these: they are ignored, and named. One that is off
# only because it was not given turns nothing off: what depends on it is a usage error then, so that it is not forgotten.
SWITCHES = {
    '--val=0': ('val', False, {VAL}),
    '--wandb=0': ('wandb', False, {'wandb_project', 'wandb_entity', 'wandb_run', 'wandb_tags', 'wandb_mode'}),
    '--consistency=False': ('consistency', False, {*OWN, 'val_teacher'}),
    '--cond=0': ('cond', False, {'val_label'}),
    '--phema=none': ('phema', [], {'phema_snap'}),
    '--lr_schedule=constant': ('lr_schedule', 'constant', {'lr_decay'}),
    '--dump=0': ('dump', 0, {'keep'}),
    '--nosubdir': ('nosubdir', True, {'desc'}),
    '--no_terminal_anchor': ('terminal_anchor', False, {'anchor_hops'}),
    '--mu0=0': ('mu0', 0, {'mu_schedule'}),
    '--k=0': ('k', 0, {'b'}),
    '--boundary_share=0': ('boundary_share', 0, {'boundary_weight'}),
}


class Images(click.ParamType):
    """A number of images: `50` and `50Mimg` are millions, `500kimg` thousands."""

    name = 'images'

    def convert(self, value, param, ctx):
        match = re.fullmatch(r'([0-9.eE+-]+)\s*(Mimg|kimg|)', str(value))
        try:
            return (cli.SOME_KIMG if match[2] == 'kimg' else cli.SOME_MIMG).convert(match[1], param, ctx) * (
                1e3 if match[2] == 'kimg' else 1e6
            )
        except TypeError:
            self.fail(
                f'{cli.shown(value)} is not a number of images such as 50, 50Mimg or 500kimg', param, ctx
            )


class LossScale(click.ParamType):
    """A positive number, or `dynamic`."""

    name = 'float'

    def convert(self, value, param, ctx):
        return value if value == 'dynamic' else cli.POSITIVE.convert(value, param, ctx)


COUNT = cli.COUNT
TICKS = cli.Integer(min=0)


def switch(name: str, **kwargs):
    """A boolean flag as `--name/--no_name`, whose default depends on the objective."""
    return cli.option(f'--{name}/--no_{name}', name, default=None, **kwargs)


@click.command(cls=cli.Command)
@cli.option(
    '--outdir',
    metavar='DIR',
    type=cli.PATH,
    required=True,
    group=MAIN,
    help='Where to make the numbered folder of this run.',
)
@cli.option(
    '--data',
    metavar='ZIP|DIR',
    type=cli.PATH,
    required=True,
    group=MAIN,
    help='Data set, made by dataset_tool.py.',
)
@cli.option(
    '--cond',
    type=bool,
    default=False,
    show_default=True,
    group=MAIN,
    help='Train a class-conditional model; needs labels.',
)
@cli.option(
    '--arch',
    type=click.Choice(list(ARCHITECTURES)),
    group=MAIN,
    help="Network.  [default: ddpmpp; for students the teacher's]",
)
@cli.option(
    '--precond',
    type=click.Choice(list(PRECONDITIONING)),
    group=MAIN,
    help="Preconditioning and, for teachers, loss.  [default: edm; for students the teacher's]",
)
@cli.option(
    '--objective',
    type=click.Choice(list(OBJECTIVES)),
    group=MAIN,
    help='diffusion: a teacher; mcd: multistep consistency distillation; mct: the same without a teacher; direct: regression on the '
    "teacher's solution of each segment; pd: progressive distillation; cm-cd, cm-ct: Song et al.'s consistency distillation "
    'and training; ict: improved consistency training; ect: easy consistency tuning; tcm: truncated consistency training.  '
    '[default: diffusion]',
)
@cli.option('--consistency', type=bool, group=MAIN, help='True: as --objective=mcd.  [default: False]')
@cli.option(
    '--duration',
    metavar='MIMG',
    type=cli.SOME_MIMG,
    group=MAIN,
    help='Length of training in millions of images.  [default: 200; mcd, mct, direct 210; pd by --stage_steps; cm, ict 409.6; ect 51.2, '
    'edm2 12.8; tcm 204.8, edm2 122.88; edm2 teachers by size, S 1073.7, of latents 2147.5]',
)
@cli.option(
    '--batch',
    metavar='INT',
    type=cli.BATCH,
    group=HYPER,
    help='Total batch size.  [default: 512; mcd, mct, direct and edm2 teachers 2048; ict, tcm 1024; pd, ect 128]',
)
@cli.option(
    '--batch-gpu',
    metavar='INT',
    type=cli.BATCH,
    group=HYPER,
    help='Images a process handles at a time; smaller than its share of the batch, gradients accumulate.  [default: its share]',
)
@cli.option(
    '--optim',
    type=click.Choice(['adam', 'radam']),
    group=HYPER,
    help='Optimizer.  [default: adam; cm, ict, ect, tcm radam; ect, tcm of edm2 adam]',
)
@cli.option(
    '--lr',
    metavar='FLOAT',
    type=cli.POSITIVE,
    group=HYPER,
    help='Learning rate.  '
    '[default: 0.001; mcd, mct, direct 8e-5; pd 2e-4; cm 4e-4; ict, ect 1e-4; tcm 5e-5; edm2 by size, S 0.01, students 0.001, ect by '
    'size, S 0.001, tcm 5e-4]',
)
@cli.option(
    '--lr_rampup',
    metavar='KIMG',
    type=cli.KIMG,
    group=HYPER,
    help='Images over which the learning rate rises from 0, in thousands.  [default: 10000; pd, cm, ict, ect, tcm 0]',
)
@cli.option(
    '--lr_schedule',
    type=click.Choice(['constant', 'linear', 'cosine', 'sqrt']),
    group=HYPER,
    help='Decay of the learning rate: to 0 at the end of training (linear, cosine), or as 1/sqrt(steps) after --lr_decay steps (sqrt).  '
    '[default: constant; pd linear; edm2 sqrt]',
)
@cli.option(
    '--lr_decay',
    metavar='STEPS',
    type=COUNT,
    group=HYPER,
    help='Optimizer steps after which sqrt decays, t_ref of EDM2.  [default: 35000; of latents 70000; students 2000; tcm 8000]',
)
@cli.option(
    '--beta2',
    metavar='FLOAT',
    type=cli.Number(0, 1, max_open=True),
    group=HYPER,
    help="Decay of Adam's second moments.  [default: 0.999; edm2 0.99]",
)
@cli.option(
    '--P_mean',
    'P_mean',
    metavar='FLOAT',
    type=cli.Number(min=-100, max=100),
    group=HYPER,
    help='Mean of ln sigma that teachers, with --precond=edm, ict and ect are trained at.  '
    '[default: -1.2; edm2 -0.8, of latents -0.4; ict, ect -1.1; ect of edm2 -0.8]',
)
@cli.option(
    '--P_std',
    'P_std',
    metavar='FLOAT',
    type=cli.Number(min=0, max=100, min_open=True),
    group=HYPER,
    help='And its standard deviation.  [default: 1.2; edm2 1.6, of latents 1; ict, ect 2; ect of edm2 1.6]',
)
@cli.option(
    '--ema',
    metavar='MIMG',
    type=Images(),
    group=HYPER,
    help='Half-life of the weight average, in millions of images; 500kimg and 50Mimg name their unit.  '
    '[default: 0.5; mcd, mct, direct 50; cm 3.549; ict 10.14; ect 0.887; tcm 7.097]',
)
@cli.option(
    '--ema_rampup',
    metavar='FLOAT',
    type=cli.FACTOR,
    group=HYPER,
    help='The effective half-life is at most this fraction of the images seen; 0 for no limit.  [default: 0.05; cm, ict, ect, tcm 0]',
)
@cli.option(
    '--phema',
    metavar='LIST',
    type=cli.NumberList(cli.FACTOR),
    group=HYPER,
    help='Relative widths of power-function EMAs to keep as well, as in 0.05,0.10.  '
    '[default: none; edm2 0.05,0.1; ect of edm2 0.01,0.05,0.1]',
)
@cli.option(
    '--augment',
    metavar='FLOAT',
    type=cli.Number(0, 1),
    group=HYPER,
    help='Augmentation probability.  [default: 0.12; students and edm2 0]',
)
@cli.option(
    '--grad-clip',
    metavar='FLOAT',
    type=cli.POSITIVE,
    group=HYPER,
    help='Shorten gradients whose norm is larger.  [default: never]',
)
@cli.option(
    '--max-images',
    metavar='INT',
    type=COUNT,
    group=HYPER,
    help='Train on so many images only, a random subset that is always the same.  [default: all]',
)
@cli.option(
    '--xflip',
    type=bool,
    default=False,
    show_default=True,
    group=HYPER,
    help='Add mirrored copies of all images.',
)
@cli.option(
    '--cbase',
    metavar='INT',
    type=cli.SIDE,
    group=NET,
    help='Channels of the finest level.  [default: by --arch]',
)
@cli.option(
    '--cres',
    metavar='LIST',
    type=cli.NumberList(cli.SIDE),
    group=NET,
    help='Channel multiplier of each level.  [default: by --arch]',
)
@cli.option(
    '--num_blocks',
    metavar='INT',
    type=cli.Integer(min=1, max=1000),
    group=NET,
    help='Residual blocks a level.  [default: by --arch]',
)
@cli.option(
    '--attn_resolutions',
    metavar='LIST',
    type=cli.NumberList(cli.SIDE),
    group=NET,
    help='Resolutions with self-attention.  [default: by --arch]',
)
@cli.option(
    '--dropout',
    metavar='FLOAT',
    type=cli.Number(0, 1, max_open=True),
    group=NET,
    help='Dropout probability.  [default: 0.13; mct, cm 0; ict 0.3; ect 0.2; edm2 by size, S 0; ect of edm2 by size, S 0.4; '
    "for other students the teacher's]",
)
@cli.option(
    '--dout_resolutions',
    metavar='LIST',
    type=cli.NumberList(cli.SIDE),
    group=NET,
    help='Resolutions with dropout.  [default: all; ect of edm2 those up to 16]',
)
@cli.option(
    '--teacher',
    metavar='PKL|URL',
    type=cli.PATH,
    group=TEACH,
    help='Snapshot of the diffusion model to distil; pd: or of a student of 2 --S_start steps; tcm: of the consistency model to go on from.',
)
@cli.option(
    '--hop',
    type=click.Choice(['heun', 'ddim', 'addim']),
    group=TEACH,
    help="mcd, cm-cd, pd: the teacher's step from one noise level to the next; heun not for pd.  [default: heun; pd ddim]",
)
@cli.option(
    '--xvar_frac',
    metavar='FLOAT',
    type=cli.FACTOR,
    group=TEACH,
    help="With --hop=addim: share of the image's squared error that is put back as noise; 0: a guess without the image.  [default: 0.75]",
)
@cli.option(
    '--rho',
    metavar='FLOAT',
    type=cli.RHO,
    group=LEVELS,
    help="Exponent of Karras's noise levels.  [default: 7]",
)
@cli.option(
    '--sigma_min',
    metavar='FLOAT',
    type=cli.SIGMA,
    group=LEVELS,
    help='Lowest noise level above 0.  [default: 0.002]',
)
@cli.option(
    '--sigma_max', metavar='FLOAT', type=cli.SIGMA, group=LEVELS, help='Highest noise level.  [default: 80]'
)
@switch(
    'sync_dropout',
    group=LEVELS,
    help='The self-target, where there is one, sees the dropout masks of the student.  [default: on]',
)
@cli.option(
    '--S',
    'S',
    metavar='INT',
    type=cli.STEPS,
    group=SEG,
    help='Sampling steps of the student.  [default: 8; pd 1]',
)
@cli.option(
    '--T_start',
    'T_start',
    metavar='INT',
    type=cli.STEPS,
    group=SEG,
    help='Edges of the fine grid at the start of training (Heek et al. 2024).  [default: 64; direct as --T_end]',
)
@cli.option(
    '--T_end', 'T_end', metavar='INT', type=cli.STEPS, group=SEG, help='And at the end.  [default: 1280]'
)
@cli.option(
    '--T_anneal_kimg',
    'T_anneal_kimg',
    metavar='KIMG',
    type=cli.KIMG,
    group=SEG,
    help='Thousands of images over which T rises.  [default: half of --duration]',
)
@cli.option(
    '--T_anneal_steps',
    'T_anneal_steps',
    metavar='INT',
    type=TICKS,
    group=SEG,
    help='The same in optimizer steps.',
)
@cli.option(
    '--student_grid',
    type=click.Choice(['edm', 'full']),
    group=SEG,
    help='The student steps on S nodes and 0 (edm), or on the first S of S+1 nodes and 0 (full).  [default: edm; pd full]',
)
@cli.option(
    '--sigma_grid',
    type=click.Choice(['karras', 'cosine']),
    group=SEG,
    help="How nodes are spaced: Karras's, or evenly in the time of the cosine schedule.  [default: karras]",
)
@cli.option(
    '--sampling_mode',
    type=click.Choice(['edm', 'vp', 'uniform']),
    group=SEG,
    help='How edges are drawn: by the training densities of edm or vp, or uniformly over segments.  [default: edm]',
)
@switch(
    'keep_ties',
    group=SEG,
    help="Keep the fine grid's nodes that are levels of the student: it is trained at the levels that it samples at.  "
    '[default: off; direct on]',
)
@cli.option(
    '--top-mass',
    metavar='FLOAT',
    type=cli.Number(0, 1),
    group=SEG,
    help='Share of samples on the first edges of segments, where sampling asks; with --keep_ties.  [default: 0; direct 0.9]',
)
@cli.option(
    '--cd_loss',
    type=click.Choice(['pseudo_huber', 'l2_root', 'l2', 'huber']),
    group=SEG,
    help="Distance between the student's image and its target.  [default: pseudo_huber; pd l2]",
)
@cli.option(
    '--cd_weight_mode',
    group=SEG,
    type=click.Choice(
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
    help='Loss weight by noise level: sqrt_karras = sqrt(1/sigma^2 + 1/sigma_data^2), edm its square, sqrt_gap = sqrt(sigma_t - sigma_s).  '
    '[default: sqrt_karras; pd truncated-snr]',
)
@switch(
    'terminal_anchor',
    group=SEG,
    help="mcd: give the first and last edge 1/T each; at sigma_max the target is the teacher's own solution.  "
    '[default: on]',
)
@switch(
    'terminal_teacher_hop',
    group=SEG,
    help="mcd: on the edge to 0, aim at the teacher's denoised image, not at the data.  [default: on]",
)
@cli.option(
    '--anchor_hops',
    metavar='INT',
    type=cli.STEPS,
    group=SEG,
    help='mcd: Heun steps of the solution at sigma_max.  [default: 4; 32 where the first segment ends below sigma = 10]',
)
@cli.option(
    '--substeps',
    metavar='INT',
    type=cli.STEPS,
    group=DIRECT,
    help='Heun steps of the teacher over a segment.  [default: 3]',
)
@cli.option(
    '--S_start',
    'S_start',
    metavar='INT',
    type=cli.STEPS,
    group=PD,
    help='Sampling steps of the first student, halved from stage to stage down to --S; its teacher is sampled in twice as many.  '
    '[default: 512]',
)
@cli.option(
    '--N',
    'N',
    metavar='INT',
    type=cli.LEVELS,
    group=CM,
    help='Noise levels of the grid, and --mu0 as the decay, throughout.  '
    '[default: cm-cd 18, unless --s0, --s1 or --schedule_steps let it grow; cm-ct: growing]',
)
@cli.option(
    '--s0', metavar='INT', type=cli.STEPS, group=CM, help='Levels at the start.  [default: 2; ict 10]'
)
@cli.option('--s1', metavar='INT', type=cli.STEPS, group=CM, help='And at the end.  [default: 150; ict 1280]')
@cli.option(
    '--schedule_steps',
    metavar='INT',
    type=COUNT,
    group=CM,
    help='Optimizer steps over which the grid grows.  [default: all of --duration]',
)
@cli.option(
    '--mu0',
    metavar='FLOAT',
    type=cli.Number(0, 1, max_open=True),
    group=CM,
    help='cm-cd, cm-ct: decay of the target network at the start; 0: the target is the network itself.  [default: cm-cd 0; cm-ct 0.9]',
)
@cli.option(
    '--mu_schedule',
    type=click.Choice(['adaptive', 'fixed']),
    group=CM,
    help='cm-cd, cm-ct: the decay rises with the number of levels (adaptive), or stays.  [default: adaptive]',
)
@cli.option(
    '--cm_loss',
    type=click.Choice(['lpips', 'l2', 'l1', 'pseudo_huber']),
    group=CM,
    help="cm-cd, cm-ct: distance between the network's image and its target.  [default: lpips]",
)
@cli.option(
    '--lpips',
    metavar='FILES|URLS',
    type=cli.PATHS,
    group=CM,
    help="Weights of --cm_loss=lpips: torchvision's VGG16 and the lpips package's heads, joined by a comma; or one TorchScript file. "
    f'{cli.PROGRAM}  [default: the published ones]',
)
@cli.option(
    '--q',
    metavar='FLOAT',
    type=cli.Number(min=1, max=1e6, min_open=True),
    group=ECT,
    help='1 - r/t shrinks by this factor from stage to stage.  [default: 2; edm2 4]',
)
@cli.option(
    '--k',
    metavar='FLOAT',
    type=cli.FACTOR,
    group=ECT,
    help='Of 1 - r/t = q^-(stage+1) (1 + k sigmoid(-b t)); 0: one ratio for all t.  [default: 8]',
)
@cli.option('--b', metavar='FLOAT', type=cli.FACTOR, group=ECT, help='Slope of the sigmoid.  [default: 1]')
@cli.option(
    '--c',
    metavar='FLOAT',
    type=cli.FACTOR,
    group=ECT,
    help='ict too: constant of the pseudo-Huber distance.  '
    '[default: 0; tcm 1e-8; edm2 0.06; ict 0.00054 times the root of the number of values]',
)
@cli.option(
    '--stage_steps',
    metavar='INT',
    type=COUNT,
    group=ECT,
    help='pd too, twice for --S=2 and 1: optimizer steps of a stage.  '
    '[default: --duration in equal stages, 8 for --q=2, 4 for --q=4, until 1 - r/t is about 1/256; tcm 1; pd 50000]',
)
@cli.option(
    '--ect_weight',
    type=click.Choice(['gap', 'flat', 'inv', 'inv_sum', 'snr', 'karras', 'c_in_squared']),
    group=ECT,
    help='ect: loss weight: gap = 1/(t - r), or of t alone 1, 1/t, 1/t + 1/sigma_data, 1/t^2, 1/t^2 + 1/sigma_data^2, '
    '1/(t^2 + sigma_data^2).  [default: gap; edm2 karras]',
)
@cli.option(
    '--mid_t',
    metavar='FLOAT',
    type=cli.SIGMA,
    group=ECT,
    help='cm too: noise level of the second sampling step.  [default: one step]',
)
@switch(
    'clip_denoised',
    group=ECT,
    help='cm, ict, tcm too: sampling clamps every image that the network gives to [-1, 1]; recorded in snapshots.  '
    '[default: on]',
)
@cli.option(
    '--dividing_t',
    metavar='FLOAT',
    type=cli.SIGMA,
    group=TCM,
    help='Noise level below which the network of the first stage answers.  [default: 1]',
)
@cli.option(
    '--boundary_share',
    metavar='FLOAT',
    type=cli.Number(0, 1, max_open=True),
    group=TCM,
    help='Share of samples at that level.  [default: 0.25]',
)
@cli.option(
    '--boundary_weight',
    metavar='FLOAT',
    type=cli.FACTOR,
    group=TCM,
    help='Weight of their mean loss.  [default: 0.1]',
)
@cli.option(
    '--ratio_cap',
    metavar='FLOAT',
    type=cli.Number(0, 1, max_open=True),
    group=TCM,
    help='r/t comes no closer to 1.  [default: 0.999; edm2 0.9961]',
)
@cli.option(
    '--tcm_weight',
    type=click.Choice(['flat', 'karras']),
    group=TCM,
    help='Weight times t - r: 1, or t / c_out(t)^2.  [default: flat; edm2 karras]',
)
@cli.option(
    '--student_scale',
    metavar='FLOAT',
    type=cli.SOME_FACTOR,
    group=TCM,
    help='ln t is Student-t times this.  [default: 0.2]',
)
@cli.option(
    '--student_df',
    metavar='FLOAT',
    type=cli.SOME_FACTOR,
    group=TCM,
    help='Its degrees of freedom.  [default: 0.01]',
)
@cli.option(
    '--val',
    type=bool,
    default=False,
    show_default=True,
    group=VAL,
    help='Evaluate the Frechet distance during training.',
)
@cli.option(
    '--val_ref', metavar='NPZ|URL', type=cli.PATH, group=VAL, help='Reference statistics, made by fid.py ref.'
)
@cli.option(
    '--val_ref_data',
    metavar='ZIP|DIR',
    type=cli.PATH,
    group=VAL,
    help='Or images to compute them from at the start.',
)
@cli.option(
    '--val_detector',
    metavar='PATH|URL',
    type=cli.PATH,
    group=VAL,
    help=f"TorchScript feature detector. {cli.PROGRAM}  [default: NVIDIA's Inception]",
)
@cli.option(
    '--val_steps',
    metavar='INT',
    type=cli.STEPS,
    group=VAL,
    help="Sampling steps.  [default: the student's S; 1 for consistency models, with --mid_t 2; 18 for teachers]",
)
@cli.option(
    '--val_every',
    metavar='TICKS',
    type=COUNT,
    default=50,
    show_default=True,
    group=VAL,
    help='How often to evaluate.',
)
@cli.option(
    '--val_emas',
    metavar='LIST',
    group=VAL,
    help='Averages to evaluate: ema, widths of --phema as in 0.05, or all. The first decides which state is the best.  [default: ema]',
)
@cli.option(
    '--val_at_start',
    type=bool,
    default=False,
    show_default=True,
    group=VAL,
    help='Evaluate before the first step.',
)
@cli.option(
    '--val_teacher',
    type=bool,
    default=False,
    show_default=True,
    group=VAL,
    help='Evaluate the teacher once at the start, as it is sampled by default: a diffusion model by Heun, 18 steps.',
)
@cli.option(
    '--val_num',
    metavar='INT',
    type=cli.Integer(min=2),
    default=50000,
    show_default=True,
    group=VAL,
    help='Images to generate.',
)
@cli.option(
    '--val_batch',
    metavar='INT',
    type=cli.BATCH,
    default=64,
    show_default=True,
    group=VAL,
    help='Images a process makes at a time.',
)
@cli.option(
    '--val_seed', metavar='INT', type=cli.SEED, default=0, show_default=True, group=VAL, help='First seed.'
)
@cli.option(
    '--val_label',
    metavar='MODE',
    type=LabelMode(),
    default='auto',
    show_default=True,
    group=VAL,
    help='Classes: uniform, dataset (those of training images), fixed:K; auto: dataset where it has labels.',
)
@cli.option(
    '--val_dump_images_dir',
    metavar='DIR',
    type=cli.PATH,
    group=VAL,
    help='Keep the generated images, in a folder for each evaluation.',
)
@cli.option(
    '--val_overwrite',
    type=bool,
    default=False,
    show_default=True,
    group=VAL,
    help='Replace images that are there already.',
)
@cli.option(
    '--precision',
    type=click.Choice(['fp32', 'fp16', 'bf16', 'fp64']),
    group=PERF,
    help='Arithmetic inside the network; fp16 on GPUs only. Weights stay FP32, with fp64 FP64.  [default: fp32]',
)
@cli.option('--fp16', type=bool, group=PERF, help='True: as --precision=fp16.  [default: False]')
@cli.option(
    '--ls',
    metavar='FLOAT',
    type=LossScale(),
    group=PERF,
    help='Loss scaling: a number, or dynamic.  [default: dynamic with fp16, else 1]',
)
@cli.option(
    '--max-bad-steps',
    metavar='INT',
    type=COUNT,
    default=100,
    show_default=True,
    group=PERF,
    help='Stop after so many steps in a row whose loss or gradient is not finite; each is left out.',
)
@cli.option(
    '--tf32',
    type=bool,
    is_flag=False,
    flag_value=True,
    default=False,
    show_default=True,
    group=PERF,
    help='Let GPUs compute FP32 in TensorFloat-32 inside.',
)
@cli.option(
    '--compile',
    'compiled',
    type=bool,
    is_flag=False,
    flag_value=True,
    default=False,
    show_default=True,
    group=PERF,
    help='Compile the networks (torch.compile): minutes at the start, faster steps.',
)
@cli.option(
    '--channels_last',
    type=bool,
    is_flag=False,
    flag_value=True,
    default=False,
    show_default=True,
    group=PERF,
    help='Keep the channels of images together in memory inside the networks.',
)
@cli.option(
    '--checkpoint-activations',
    type=bool,
    is_flag=False,
    flag_value=True,
    default=False,
    show_default=True,
    group=PERF,
    help='Compute activations again in the backward pass: less memory, about a quarter more time.',
)
@cli.option(
    '--ema-device',
    type=click.Choice(['same', 'cpu']),
    default='same',
    show_default=True,
    group=PERF,
    help="Memory that averages of the weights live in: where the network is, or the host's.",
)
@cli.option(
    '--profile',
    'profile_steps',
    metavar='STEPS',
    type=TICKS,
    default=0,
    show_default=True,
    group=PERF,
    help='Write a Chrome trace of so many steps to the run folder.',
)
@cli.option('--bench', type=bool, default=True, show_default=True, group=PERF, help='cuDNN benchmarking.')
@cli.option(
    '--cache', type=bool, group=PERF, help='Keep decoded images in memory.  [default: True; latents False]'
)
@cli.option(
    '--workers',
    metavar='INT',
    type=cli.WORKERS,
    default=1,
    show_default=True,
    group=PERF,
    help='Processes that load data.',
)
@cli.option('--desc', metavar='STR', group=IO, help="Words to add to the run folder's name.")
@cli.option('--nosubdir', is_flag=True, group=IO, help='Write into --outdir itself.')
@cli.option(
    '--tick',
    metavar='KIMG',
    type=cli.SOME_KIMG,
    default=50,
    show_default=True,
    group=IO,
    help='How often to print progress; fractions allowed.',
)
@cli.option(
    '--snap',
    metavar='TICKS',
    type=TICKS,
    default=50,
    show_default=True,
    group=IO,
    help='How often to save snapshots; 0: never.',
)
@cli.option(
    '--phema_snap',
    metavar='TICKS',
    type=TICKS,
    group=IO,
    help='How often to save those of --phema.  [default: as --snap]',
)
@cli.option(
    '--dump',
    metavar='TICKS',
    type=TICKS,
    default=500,
    show_default=True,
    group=IO,
    help='How often to save the training state; 0: never.',
)
@cli.option(
    '--keep',
    metavar='INT',
    type=COUNT,
    default=2,
    show_default=True,
    group=IO,
    help='Training states to keep: the newest so many, and the one with the least distance in validation.',
)
@cli.option(
    '--on-save-error',
    type=click.Choice(['stop', 'continue']),
    default='stop',
    show_default=True,
    group=IO,
    help='What to do when a file cannot be written, as on a full disk.',
)
@cli.option(
    '--seed',
    metavar='INT',
    type=cli.Integer(min=0, max=(1 << 63) - 1),
    group=IO,
    help='Random seed.  [default: random]',
)
@cli.option(
    '--transfer',
    metavar='PKL|URL',
    type=cli.PATH,
    group=IO,
    help='Start from the weights of this snapshot, where they fit.',
)
@cli.option(
    '--resume',
    metavar='PT|DIR',
    type=cli.PATH,
    group=IO,
    help='Continue from a training state, in its folder; of a run folder, the newest whole one.',
)
@cli.option(
    '--take-lock',
    is_flag=True,
    group=IO,
    help='Take the run folder from another run that has it (run.lock), and stop that run.',
)
@cli.option(
    '--resume-override',
    is_flag=True,
    group=IO,
    help='Resume although options differ that make it another run.',
)
@cli.option('--allow-other-data', is_flag=True, group=IO, help='Resume although the data set is another one.')
@cli.option('-n', '--dry-run', is_flag=True, group=IO, help='Print the configuration as JSON and exit.')
@cli.option(
    '--wandb',
    type=bool,
    is_flag=False,
    flag_value=True,
    default=False,
    show_default=True,
    group=LOGS,
    help='Log to Weights & Biases.',
)
@cli.option(
    '--wandb_project', metavar='STR', group=LOGS, help="Project.  [default: the environment's, or W&B's]"
)
@cli.option('--wandb_entity', metavar='STR', group=LOGS, help='User or team.  [default: yours]')
@cli.option('--wandb_run', metavar='STR', group=LOGS, help="Name of the run.  [default: the run folder's]")
@cli.option('--wandb_tags', metavar='LIST', group=LOGS, help='Comma-separated tags.  [default: none]')
@cli.option(
    '--wandb_mode',
    type=click.Choice(['online', 'offline', 'disabled']),
    group=LOGS,
    help="Upload at once, or write into the run folder for `wandb sync`.  [default: the environment's, or online]",
)
@cli.option(
    '--tensorboard',
    type=bool,
    is_flag=False,
    flag_value=True,
    default=False,
    show_default=True,
    group=LOGS,
    help='Write TensorBoard events into the run folder.',
)
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
    ignored = check_usage(ctx, opts)

    from torch_utils import distributed
    from torch_utils.preemption import EXIT_PREEMPTED

    distributed.init()
    for line in ignored:
        distributed.print0(printable(line), file=sys.stderr)
    if not opts.dry_run:
        from training import restart

        restart.go_on(opts)
    with contextlib.ExitStack() as held:
        for run in runs(opts, held):
            with contextlib.ExitStack() as lock:
                finished = train(run, lock)
            if not finished:
                break
    distributed.shutdown()
    if not finished:
        ctx.exit(EXIT_PREEMPTED)


def runs(opts: EasyDict, held: contextlib.ExitStack) -> Iterator[EasyDict]:
    """The options of what is to be trained, one run after the other: one, but for the stages of progressive distillation, whose folder is locked
    until `held` is closed."""
    if opts.objective != 'pd':
        yield opts
        return
    from torch_utils import distributed
    from training import restart, run_lock, stages

    opts.batch = opts.batch or OBJECTIVES['pd'].defaults['batch']
    if opts.resume:
        run_dir = stages.run_folder(opts.resume)
    else:
        choose = configuration.planned_run_dir if opts.dry_run else configuration.make_run_dir
        run_dir = distributed.from_main(lambda: choose(opts, configuration.open_dataset(opts).name))
        if not (opts.nosubdir or opts.dry_run):
            held.callback(configuration.remove_if_empty, run_dir)
    if not opts.dry_run:
        held.enter_context(run_lock.locked(run_dir, opts.take_lock))
    begun = stages.stage_folders(run_dir)
    if begun and not opts.resume:
        raise UserError(
            f'--outdir={opts.outdir} holds the stages of an earlier run: go on with them by --resume={opts.outdir}, or choose another '
            'folder.'
        )
    if opts.resume and not begun:
        raise UserError(
            f'--resume={opts.resume} holds no stages of a progressive distillation: give its run folder, or start anew without --resume.'
        )
    if opts.seed is None:
        opts.seed = stages.recorded_options(begun[0])['seed'] if begun else configuration.random_seed()
    if not opts.dry_run:
        restart.remember(run_dir, opts.seed, opts.resume)
    for run in stages.stages(opts, run_dir):
        yield run
        if opts.dry_run:
            return


def train(opts: EasyDict, held: contextlib.ExitStack) -> bool:
    """Train one network, or say what would be trained; whether it is finished. Its folder is locked until `held` is closed."""
    from torch_utils import distributed
    from training import restart, run_lock

    if (
        opts.resume and not opts.dry_run
    ):  # before the choice of a state: another run may be about to write one
        held.enter_context(run_lock.locked(run_lock.folder_of(opts.resume), opts.take_lock))
    from training.run_log import check_available

    state, earlier = configuration.load_earlier(opts) if opts.resume else (None, None)
    if opts.seed is None:
        opts.seed = earlier['seed'] if earlier else configuration.random_seed()
    dataset = configuration.open_dataset(opts)
    teacher = configuration.load_teacher(opts, dataset) if opts.teacher else None
    if opts.transfer:
        configuration.check_transfer(opts)
    configuration.fill_defaults(opts, dataset, teacher, earlier)
    c = configuration.configure(opts, dataset, teacher)
    about_data = (
        configuration.check_same_data(opts, c.dataset, earlier['dataset'], opts.resume) if earlier else None
    )
    if earlier and not opts.resume_override:
        configuration.check_same_run(opts, c, earlier)
    if about_data:
        distributed.print0(printable(about_data), file=sys.stderr)
    check_available(c.wandb, c.tensorboard)
    if opts.lpips or not opts.dry_run:  # else it would download them
        configuration.check_perceptual(c)
    if opts.dry_run:
        from training.resolution import unresolved_gap

        if warning := unresolved_gap(c, teacher):
            distributed.print0(printable(warning), file=sys.stderr)
        distributed.print0(json.dumps(c, indent=2))
        return True
    if c.validation:  # what is missing or wrong is better said before there is a folder
        check_files(c.validation, dataset)
    if not opts.resume:
        c.run_dir = distributed.from_main(lambda: configuration.make_run_dir(opts, dataset.name))
        held.enter_context(run_lock.locked(c.run_dir, opts.take_lock))
        distributed.from_main(lambda: configuration.record_options(opts, c))
    if opts.objective != 'pd':  # of which the stages' common folder has it
        restart.remember(c.run_dir, opts.seed, opts.resume)

    from training.training_loop import training_loop

    with distributed.among_others():
        return training_loop(c, c.run_dir, dataset, teacher, state)


def check_usage(ctx: click.Context, opts: EasyDict) -> list[str]:
    """Combinations of options that make no sense whatever the files hold: exit status 2. Returns: lines for people about what is ignored."""
    given, ignored = leave_out_idle(ctx, opts)
    choose_objective(opts, [p for p in given if getattr(p, 'group', None) in OWN])
    for group, switched_on, cure in ((VAL, opts.val, '--val=1'), (LOGS, opts.wandb, '--wandb=1')):
        stray = [
            p.opts[0]
            for p in given
            if getattr(p, 'group', None) == group and p.name not in ('val', 'wandb', 'tensorboard')
        ]
        if stray and not switched_on:
            raise click.UsageError(f'{", ".join(stray)} needs {cure}.')
    widths = [f'{std:.3f}' for std in opts.phema or []]
    if any(not 0.001 <= std <= 0.28 for std in opts.phema or []) or len(set(widths)) < len(widths):
        raise click.UsageError(
            f'--phema={",".join(widths)}: widths lie between 0.001 and 0.28 and differ in the third decimal, which names files.'
        )
    objective = OBJECTIVES[opts.objective]
    if objective.loss and opts.sigma_min >= opts.sigma_max:
        raise click.UsageError(f'--sigma_min={opts.sigma_min:g} is not below --sigma_max={opts.sigma_max:g}.')
    if 'S' in objective.options and opts.objective != 'pd' and opts.val_steps not in (None, opts.S):
        raise click.UsageError(
            f'--val_steps={opts.val_steps}, but the student takes --S={opts.S} steps: leave it out.'
        )
    if 'T_end' in objective.options:
        if not opts.S <= opts.T_start <= opts.T_end:
            raise click.UsageError(
                f'--S={opts.S} <= --T_start={opts.T_start} <= --T_end={opts.T_end} does not hold: every segment needs an edge.'
            )
        if opts.top_mass and not opts.keep_ties:
            raise click.UsageError(
                f'--top-mass={opts.top_mass:g} needs --keep_ties: without them no edge begins where a segment does.'
            )
        if opts.T_anneal_steps is not None and opts.T_anneal_kimg is not None:
            raise click.UsageError('--T_anneal_steps and --T_anneal_kimg say the same: give one of them.')
    if opts.objective == 'pd':
        check_halving(opts)
    if 's0' in objective.options and not opts.N and opts.s0 > opts.s1:
        raise click.UsageError(f'--s0={opts.s0} is more than --s1={opts.s1}: the grid becomes finer.')
    if opts.lpips and opts.cm_loss != 'lpips':
        raise click.UsageError(f'--lpips is for --cm_loss=lpips, not {opts.cm_loss}.')
    stray = [f'--{name}' for name in ('P_mean', 'P_std') if opts[name] is not None]
    if stray and ((objective.loss and 'P_mean' not in objective.options) or opts.precond in ('vp', 've')):
        raise click.UsageError(
            f'{", ".join(stray)}: only teachers with --precond=edm, ict and ect are trained at log-normal noise levels.'
        )
    if opts.arch == 'edm2' and opts.precond in ('vp', 've'):
        raise click.UsageError(f"--arch=edm2 has EDM's preconditioning: leave --precond={opts.precond} out.")
    if opts.arch == 'edm2' and opts.augment:
        raise click.UsageError(
            f'--arch=edm2 has no augmentation labels: leave --augment={opts.augment:g} out.'
        )
    if objective.loss and not objective.teacher and opts.precond in ('vp', 've'):
        raise click.UsageError(
            f"--objective={opts.objective} wants EDM's preconditioning: leave --precond={opts.precond} out."
        )
    if opts.val_teacher and not opts.teacher:
        raise click.UsageError(f'--val_teacher=1 needs a teacher, and --objective={opts.objective} has none.')
    if opts.val and not (opts.val_ref or opts.val_ref_data):
        raise click.UsageError('--val=1 needs --val_ref=NPZ (made by fid.py ref) or --val_ref_data=ZIP.')
    if opts.val:
        cli.check_seeds(opts.val_seed, max(opts.val_num, SHOWN), '--val_seed', '--val_num')
    if (opts.fp16 and opts.precision not in (None, 'fp16')) or (
        opts.fp16 is False and opts.precision == 'fp16'
    ):
        raise click.UsageError(f'--fp16={opts.fp16} contradicts --precision={opts.precision}.')
    opts.precision = opts.precision or ('fp16' if opts.fp16 else 'fp32')
    if opts.resume_override and not opts.resume:
        raise click.UsageError('--resume-override needs --resume.')
    if opts.allow_other_data and not opts.resume:
        raise click.UsageError('--allow-other-data needs --resume.')
    if opts.resume and opts.transfer:
        raise click.UsageError(
            '--resume and --transfer exclude each other: a training state holds the weights.'
        )
    return ignored


def leave_out_idle(ctx: click.Context, opts: EasyDict) -> tuple[list[click.Parameter], list[str]]:
    """(options on the command line that mean something, a line for each of SWITCHES that turns others off); `opts` gets the others' defaults.

    Values of a loss stay as given, although it does not use them: training states record them, and a resumed run is compared with that.
    """
    given = [
        p
        for p in ctx.command.params
        if ctx.get_parameter_source(p.name) is click.core.ParameterSource.COMMANDLINE
    ]
    lines, names = [], {p.name for p in given}
    defaults = ctx.command.make_context(ctx.info_name, [], resilient_parsing=True).params
    own = OBJECTIVES[opts.objective or ('mcd' if opts.consistency else 'diffusion')].own
    for text, (switch, off, idle) in SWITCHES.items():
        if switch not in names or opts[switch] != off or (switch == 'consistency' and opts.objective):
            continue
        left_out = [p for p in given if p.name != switch and (p.group in idle or p.name in idle)]
        if left_out:
            lines.append(f'{text}: ignoring {", ".join(p.opts[0] for p in left_out)}.')
        opts.update({p.name: defaults[p.name] for p in left_out if p.name not in own})
        given = [p for p in given if p not in left_out]
    return given, lines


def choose_objective(opts: EasyDict, given: list[click.Parameter]) -> None:
    """Settle `opts.objective` and the options of its own; UsageError where options belong to another one."""
    if opts.consistency and opts.objective not in (None, 'mcd'):
        raise click.UsageError(
            f'--consistency=True means --objective=mcd, not {opts.objective}: leave one of them out.'
        )
    if opts.consistency is False and opts.objective == 'mcd':
        raise click.UsageError('--consistency=False contradicts --objective=mcd: leave one of them out.')
    opts.objective = opts.objective or ('mcd' if opts.consistency else 'diffusion')
    objective = OBJECTIVES[opts.objective]
    own, names = objective.own, {parameter.name for parameter in given}
    for parameter in given:
        in_images = IN_STEPS[parameter.name][0] if parameter.name in IN_STEPS else None
        if parameter.name not in own and in_images not in own:
            having = [
                name
                for name in OBJECTIVES
                if name in {*objectives_with(parameter.name), *objectives_with(in_images)}
            ]
            raise click.UsageError(
                f'{parameter.opts[0]} is for --objective={" or ".join(having)}, and this is {opts.objective}.'
                + (' (--consistency=True means mcd.)' if 'mcd' in having else '')
            )
    if objective.teacher and not opts.teacher:
        what = (
            'the diffusion model to distil'
            if objective.teacher == 'diffusion'
            else 'the consistency model to go on from'
        )
        raise click.UsageError(f'--objective={opts.objective} needs --teacher=PKL, {what}.')
    growing = names & {'s0', 's1', 'schedule_steps'}
    if 'N' in names and growing:
        raise click.UsageError(
            f'--N is a grid that stays as it is: leave out --{sorted(growing)[0]}, or --N.'
        )
    if 'mu_schedule' in names and (own['N'] or 'N' in names) and not growing:
        raise click.UsageError(
            '--mu_schedule is for grids that grow: give --s0, --s1 or --schedule_steps as well, and no --N.'
        )
    for name, default in own.items():
        if opts.get(name) is None and name not in objective.edm2 and not (name == 'N' and growing):
            opts[name] = default
    if 'T_end' in own and opts.T_start is None:
        opts.T_start = opts.T_end
    if 'xvar_frac' in names and opts.hop != 'addim':
        raise click.UsageError(f'--xvar_frac is for --hop=addim, not {opts.hop}.')


def check_halving(opts: EasyDict) -> None:
    """UsageError where progressive distillation cannot go from stage to stage."""
    from training.objectives.time_schedules import halving_stages

    try:
        halving_stages(opts.S_start, opts.S, opts.stage_steps)
    except ValueError as error:
        raise click.UsageError(
            f'--S_start={opts.S_start}, --S={opts.S}: {error}. Give a --S_start that is --S times a power of two.'
        ) from error
    if opts.student_grid != 'full':
        raise click.UsageError(
            f'--student_grid={opts.student_grid}: the stages of pd are nested on full grids alone; leave it out.'
        )
    if opts.hop == 'heun':
        raise click.UsageError('--hop=heun: the teacher of pd takes its own steps, ddim or addim.')
    if opts.duration:
        raise click.UsageError('--duration is not for pd: a stage lasts --stage_steps optimizer steps.')
    if opts.val_steps is not None:
        raise click.UsageError('--val_steps is not for pd: each stage has its own number of steps.')
    if not opts.snap:
        raise click.UsageError(
            "--snap=0 leaves no snapshot, and a stage's last one is the next one's teacher."
        )
    if opts.transfer:
        raise click.UsageError('--transfer is not for pd: each student starts from its teacher.')


if __name__ == '__main__':
    main()
