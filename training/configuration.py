"""From the options of train.py, the data and the teacher to the whole run as plain data, which `training_loop` takes.

Options that contradict the files they name are `UserError`s here; those that contradict each other are train.py's.
"""
from __future__ import annotations

import json
import os
import re

import click

from dnnlib import EasyDict, UserError
from training.objectives import OBJECTIVES

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

# The network's options: click name -> constructor argument.
NETWORK_OPTIONS = dict(cbase='model_channels', cres='channel_mult', num_blocks='num_blocks', attn_resolutions='attn_resolutions',
                       dropout='dropout', dout_resolutions='dout_resolutions')
FREE_FOR_STUDENTS = ('dropout', 'dout_resolutions')  # they do not change the weights' shapes


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
            opts[name] = value
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
    if opts.stage_steps is not None:
        opts.stage_nimg = opts.stage_steps * opts.batch
    elif opts.get('stage_nimg') is None:
        opts.stage_nimg = ((earlier or {}).get('loss') or {}).get('stage_nimg', max(round(opts.duration * 1e6 / 8), 1))
    if opts.objective == 'ect':
        check_stages(opts)
    opts.val_emas = averages_to_evaluate(opts)
    if opts.phema_snap is None:
        opts.phema_snap = opts.snap


def check_stages(opts: EasyDict) -> None:
    """UserError where the last of ECT's stages is too late for its times to differ."""
    import torch

    from training import time_schedules as times
    try:
        times.earlier_time(torch.ones(1), times.tuning_stage(round(opts.duration * 1e6), opts.stage_nimg), opts.q)
    except ValueError as error:
        raise UserError(f'--stage_steps, --q: {error}.') from error


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
        names = ('objective', 'teacher_digest', 'encoder', 'batch_size', 'seed', 'augment', 'phema_stds', 'precision', 'optim')
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
    c.sampling = EasyDict({name: opts[name] for name in OBJECTIVES[opts.objective].sampling}) or None
    if own := OBJECTIVES[opts.objective].options:
        c.loss = EasyDict({name: opts[name] for name in own}, sigma_data=float(getattr(teacher, 'sigma_data', 0.5)))
        if 'sigma_min' in own:
            c.loss.sigma_min, c.loss.sigma_max = samplers.clip_range(teacher, opts.sigma_min, opts.sigma_max)
    else:
        c.loss = EasyDict(kind='edm2' if opts.edm2 else opts.precond or 'edm')
        for name in ('P_mean', 'P_std'):  # of losses that have them
            if (default := default_of(DIFFUSION_LOSSES[c.loss.kind], name)) is not None:
                c.loss[name] = default if opts[name] is None else opts[name]
    c.update(batch_size=opts.batch, batch_gpu=opts.batch_gpu, optim=opts.optim, lr=opts.lr, betas=[0.9, opts.beta2], eps=1e-8,
             lr_rampup_nimg=opts.lr_rampup * 1e3, lr_schedule=opts.lr_schedule, lr_ref_nimg=(opts.lr_decay or 0) * opts.batch,
             loss_scaling=None if opts.ls == 'dynamic' else opts.ls,
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
    objective = OBJECTIVES[opts.objective]
    student = [objective.loss_class().name + (f'-s{opts.S}' if opts.S else '')] if objective.loss else []
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
