"""From the options of train.py, the data and the teacher to the whole run as plain data, which `training_loop` takes.

Options that contradict the files they name are `UserError`s here; those that contradict each other are train.py's.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable

import click

from dnnlib import EasyDict, UserError
from dnnlib.text import printable
from training.objectives import OBJECTIVES

ARCHITECTURES = dict(
    ddpmpp=dict(
        model_type='SongUNet',
        embedding_type='positional',
        encoder_type='standard',
        decoder_type='standard',
        channel_mult_noise=1,
        resample_filter=[1, 1],
        model_channels=128,
        channel_mult=[2, 2, 2],
    ),
    ncsnpp=dict(
        model_type='SongUNet',
        embedding_type='fourier',
        encoder_type='residual',
        decoder_type='standard',
        channel_mult_noise=2,
        resample_filter=[1, 3, 3, 1],
        model_channels=128,
        channel_mult=[2, 2, 2],
    ),
    adm=dict(model_type='DhariwalUNet', model_channels=192, channel_mult=[1, 2, 3, 4]),
    edm2=dict(model_type='UNet', model_channels=192, channel_mult=[1, 2, 3, 4]),
)
PRECONDITIONING = dict(edm='EDMPrecond', vp='VPPrecond', ve='VEPrecond')
EDM2 = 'Precond'  # EDM2's class: EDM's preconditioning around its own U-Net
BOUNDARY_CLASSES = ('EDMPrecond', 'CMPrecond', 'Precond')  # whose level of the identity can be chosen
AUGMENT_DIM = 9  # labels of EDM's augmentation pipeline

# Options that say in optimizer steps what a loss counts in images: what it calls that, and its unit in images.
IN_STEPS = dict(
    T_anneal_steps=('T_anneal_kimg', 1000), stage_steps=('stage_nimg', 1), schedule_steps=('schedule_nimg', 1)
)

# The network's options: click name -> constructor argument.
NETWORK_OPTIONS = dict(
    cbase='model_channels',
    cres='channel_mult',
    num_blocks='num_blocks',
    attn_resolutions='attn_resolutions',
    dropout='dropout',
    dout_resolutions='dout_resolutions',
)
FREE_FOR_STUDENTS = ('dropout', 'dout_resolutions')  # they do not change the weights' shapes


def fill_defaults(opts: EasyDict, dataset, teacher, earlier: dict | None) -> None:
    """The defaults that depend on other options, the data, the teacher, and the run that is resumed."""
    objective = OBJECTIVES[opts.objective]
    opts.edm2 = type(teacher).__name__ == EDM2 if teacher is not None else opts.arch == 'edm2'
    if dataset.holds_latents:
        if opts.augment:
            raise UserError(
                f'--augment={opts.augment:g} is for images, but --data={opts.data} holds latents: leave it out.'
            )
        opts.augment = 0.0
    late = {name: objective.own[name] for name in objective.edm2 if name in objective.own}
    edm2 = objective.edm2_defaults(edm2_width(opts, teacher), dataset.holds_latents) if opts.edm2 else {}
    if limit := edm2.pop('max_dropout_resolution', None):
        levels = opts.cres or ARCHITECTURES['edm2']['channel_mult']
        edm2['dout_resolutions'] = [
            res for i in range(len(levels)) if (res := dataset.resolution >> i) <= limit
        ]
    for name, value in {
        **late,
        **objective.defaults,
        **edm2,
        **options_of_run(earlier, opts.objective, late),
    }.items():
        if name == 'lr_decay' and opts.lr_schedule != 'sqrt':
            continue
        if opts.get(name) is None:
            opts[name] = value
    if opts.lr_schedule == 'sqrt' and not opts.lr_decay:
        raise click.UsageError('--lr_schedule=sqrt needs --lr_decay=STEPS.')
    if opts.lr_schedule != 'sqrt' and opts.lr_decay:
        raise click.UsageError(f'--lr_decay is for --lr_schedule=sqrt, not {opts.lr_schedule}.')
    if opts.phema_snap is not None and not opts.phema:
        raise click.UsageError('--phema_snap needs --phema.')
    opts.ls = opts.ls or ('dynamic' if opts.precision == 'fp16' else 1.0)
    for steps, (name, unit) in IN_STEPS.items():
        if opts[steps] is not None:
            opts[name] = opts[steps] * opts.batch / unit
        elif opts.get(name) is None:
            opts[name] = ((earlier or {}).get('loss') or {}).get(name, default_length(opts, steps) / unit)
        if unit == 1:
            opts[name] = round(opts[name])
    opts.batch_size = opts.batch
    if opts.objective == 'ect':
        check_stages(opts)
    if opts.objective == 'tcm':
        check_truncation(opts, teacher)
    if opts.objective == 'ict':
        check_edges(opts)
    opts.val_emas = averages_to_evaluate(opts)
    if opts.phema_snap is None:
        opts.phema_snap = opts.snap


def edm2_width(opts: EasyDict, teacher) -> int:
    """Channels at the finest level of a network of EDM2's, by which its sizes go."""
    if teacher is None:
        return opts.cbase or ARCHITECTURES['edm2']['model_channels']
    from training.checkpoint import constructor_arguments

    return constructor_arguments(teacher).get('model_channels') or default_of(
        type(teacher.model), 'model_channels'
    )


def options_of_run(earlier: dict | None, objective: str, own: Iterable[str]) -> dict:
    """What a run was trained with, as options that take the place of defaults where it is resumed: whatever the defaults have become since, the same
    command goes on with the same training.

    Args:
        earlier: its configuration; None, and one of another objective, have none.
        own: names of the objective's own options among them.
    """
    if not earlier or earlier.get('objective') != objective:
        return {}
    network, loss, batch = earlier['network']['kwargs'], earlier['loss'], earlier['batch_size']
    names = ('optim', 'lr', 'lr_schedule', 'augment')
    settings = {name: earlier.get(name) for name in names} | {
        name: loss.get(name) for name in (*own, 'P_mean', 'P_std')
    }
    settings |= dict(
        batch=batch,
        duration=earlier['total_nimg'] / 1e6,
        beta2=earlier['betas'][1],
        ema=earlier['ema_halflife_nimg'],
        ema_rampup=earlier['ema_rampup_ratio'] or 0.0,
        phema=earlier['phema_stds'],
        dropout=network.get('dropout'),
        lr_rampup=earlier['lr_rampup_nimg'] / 1e3,
        lr_decay=round(earlier['lr_ref_nimg'] / batch) or None,
    )
    return {name: value for name, value in settings.items() if value is not None} | dict(
        dout_resolutions=network.get('dout_resolutions')
    )


def training_steps(opts: EasyDict) -> int:
    """Optimizer steps of the run."""
    return -(-total_images(opts) // opts.batch)


def total_images(opts: EasyDict) -> int:
    """--duration in images."""
    return max(round(opts.duration * 1e6), 1)


def default_length(opts: EasyDict, option: str) -> float:
    """Images that an option of IN_STEPS means by default: T rises over half of the run, a grid grows over all of it, and easy consistency tuning
    goes through the stages that suit its q, the last of which may be shorter."""
    if option == 'T_anneal_steps':
        return opts.duration * 1e6 / 2
    if option == 'schedule_steps':
        return training_steps(opts) * opts.batch
    if opts.objective != 'ect':
        return 0
    from training.objectives import time_schedules as times

    return -(-training_steps(opts) // times.tuning_stages(opts.q)) * opts.batch


def check_stages(opts: EasyDict) -> None:
    """UserError where the last of ECT's stages is too late for its times to differ."""
    import torch

    from training.objectives import time_schedules as times

    try:
        times.earlier_time(
            torch.ones(1),
            times.tuning_stage((training_steps(opts) - 1) * opts.batch, opts.stage_nimg),
            opts.q,
        )
    except ValueError as error:
        raise UserError(f'--stage_steps, --q: {error}.') from error


def check_perceptual(c: EasyDict) -> None:
    """UserError where the loss compares images by a network whose weights are not there, or which cannot see them."""
    if c.loss.get('cm_loss') != 'lpips':
        return
    from metrics import lpips
    from torch_utils import distributed

    if c.network.kwargs['img_channels'] not in (1, 3):
        raise UserError('--cm_loss=lpips compares images, not latents: use --cm_loss=pseudo_huber.')
    with distributed.main_process_first():
        lpips.load(c.loss.lpips, 'cpu')


def check_truncation(opts: EasyDict, teacher) -> None:
    """UserError where truncated consistency training has no times to train at, or too small a batch for its boundary."""
    import torch

    from training import samplers
    from training.objectives import time_schedules as times

    low, high = samplers.clip_range(teacher, opts.sigma_min, opts.sigma_max)
    if not low < opts.dividing_t < high:
        raise UserError(
            f'--dividing_t={opts.dividing_t:g} does not lie between the noise levels {low:g} and {high:g}.'
        )
    try:
        times.boundary_count(opts.batch, opts.boundary_share)
    except ValueError as error:
        raise UserError(
            f'--batch={opts.batch}, --boundary_share={opts.boundary_share:g}: {error}.'
        ) from error
    try:
        times.truncated_log_student_times(
            torch.zeros(1), opts.dividing_t, high, opts.student_scale, opts.student_df
        )
    except ValueError as error:
        raise UserError(
            f'--student_scale={opts.student_scale:g}, --student_df={opts.student_df:g}: {error}.'
        ) from error


def check_edges(opts: EasyDict) -> None:
    """UserError where improved consistency training would draw no edge of its grid."""
    from training import consistency_ops as ops
    from training.objectives import time_schedules as times

    try:
        times.lognormal_edge_probabilities(
            ops.karras_sigmas(opts.s0 + 1, opts.sigma_min, opts.sigma_max, opts.rho), opts.P_mean, opts.P_std
        )
    except ValueError as error:
        raise UserError(f'--P_mean={opts.P_mean:g}, --P_std={opts.P_std:g}: {error}.') from error


def averages_to_evaluate(opts: EasyDict) -> list[str]:
    """The names of the averages that --val_emas means: `ema`, `phema-0.050`, ..."""
    from training.phema import average_name

    known = {'ema': 'ema', **{f'{std:.3f}': average_name(std) for std in opts.phema or []}}
    if opts.val_emas == 'all':
        return list(known.values())
    names = []
    for word in (opts.val_emas or 'ema').split(','):
        number = re.fullmatch(r'(?:phema-)?(0?\.[0-9]{1,9})', word.strip())
        name = known.get(f'{float(number[1]):.3f}' if number else word.strip())
        if name is None or name in names:
            there = ', '.join(known)
            raise click.UsageError(
                f'--val_emas={opts.val_emas}: {word!r} is not one more of {there}. (Widths are those of --phema.)'
            )
        names.append(name)
    return names


def load_earlier(opts: EasyDict) -> tuple[dict, dict]:
    """The training state of --resume, whose path takes the place of a folder's, and the configuration that it was made with."""
    from torch_utils import distributed
    from training import checkpoint, run_files

    state = None
    if distributed.is_main():
        opts.resume, state = run_files.load_state(
            opts.resume, report=lambda line: click.echo(printable(line), err=True)
        )
    opts.resume = distributed.broadcast_object(opts.resume)
    state = state or checkpoint.read_state(opts.resume)
    return state, state['options']


def check_same_run(opts: EasyDict, c: EasyDict, earlier: dict) -> None:
    """UserError, naming the setting, where the resumed run would be another one."""

    def settings(config):
        names = (
            'objective',
            'teacher_digest',
            'encoder',
            'batch_size',
            'seed',
            'augment',
            'phema_stds',
            'precision',
            'optim',
        )
        chosen = {name: config.get(name) for name in names}
        return {
            **chosen,
            'network': config['network']['class_name'],
            **config['network']['kwargs'],
            **config['loss'],
        }

    then, now = settings(earlier), settings(json.loads(json.dumps(c)))
    for name in {**then, **now}:
        if then.get(name) != now.get(name):
            raise UserError(
                f'--resume={opts.resume} was trained with {name} = {json.dumps(then.get(name))}, these options say '
                f'{json.dumps(now.get(name))}: resume with the options it was made with, or add --resume-override'
            )


def data_record(opts: EasyDict, dataset) -> EasyDict:
    """The training set as plain data: how it is opened, and what tells it from others, the same on all processes."""
    from torch_utils import distributed

    space, some = dataset.label_space, dataset.num_images < dataset.num_files
    digest = distributed.broadcast_object(dataset.digest() if distributed.is_main() else None)
    return EasyDict(
        path=opts.data,
        use_labels=opts.cond,
        resolution=dataset.resolution,
        xflip=opts.xflip,
        cache=dataset.caches,
        max_size=dataset.num_images if some else None,
        num_images=dataset.num_images,
        image_shape=dataset.image_shape,
        label_dim=space.dim,
        **space.record(),
        digest=digest,
    )


DATA_FACTS = (
    dict(  # what tells data from others besides their digest: in words, and each of the two values in words
        use_labels=('--cond={} then, --cond={} now', int),
        xflip=('xflip = {} then, {} now', json.dumps),
        max_size=(
            '{} then, {} now',
            lambda value: 'all images' if value is None else f'--max-images={value}',
        ),
        num_images=('{} images then, {} now', int),
        image_shape=('images of {} then, of {} now', '{0[2]}x{0[1]}x{0[0]}'.format),
        label_dim=('labels of length {} then, {} now', int),
        label_kind=('{} then, {} now', lambda value: value or 'no labels'),
        classes=('images of class {} then, {} now', lambda value: value or 'each'),
    )
)


def check_same_data(opts: EasyDict, now: dict, then: dict, source: str) -> str | None:
    """A line for people about the data of a run that is resumed, where there is something to say.

    Args:
        now, then: `data_record` of these options, and what `source`, a state or a folder, has recorded.
    Raises: UserError, which names what differs, where they are other data, unless --allow-other-data. For mirrored images of the same data,
        --resume-override does too.
    """
    now, recorded = (
        json.loads(json.dumps(now)),
        'digest' in then,
    )  # older versions recorded some of it, and had no --max-images
    words = {
        name: text.format(name_it(then.get(name)), name_it(now.get(name)))
        for name, (text, name_it) in DATA_FACTS.items()
        if (recorded or name in then or name == 'max_size') and then.get(name) != now.get(name)
    }
    if recorded and then['digest'] != now['digest'] and not words:
        words = {'digest': 'other names, sizes, contents or labels of files'}
    listed, mirrored = '; '.join(words.values()), words.keys() == {'xflip'}
    if words and not (opts.allow_other_data or (mirrored and opts.resume_override)):
        cure = '--allow-other-data' + ' or --resume-override' * mirrored
        raise UserError(
            f'--resume={source} was trained on other data than --data={opts.data}: {listed}. '
            f'Resume with the data it was made with, or add {cure}'
        )
    if words:
        return f'Warning: {source} was trained on other data ({listed}); it goes on with --data={opts.data}.'
    return (
        None
        if recorded
        else f'Note: {source} does not record its data; they are taken for {opts.data}, which is recorded from now on.'
    )


def random_seed() -> int:
    """A seed, the same on all processes."""
    import random

    from torch_utils import distributed

    return distributed.broadcast_object(random.SystemRandom().randrange(1 << 31))


def open_dataset(opts: EasyDict):
    """The training set; UserError where labels are asked for and missing."""
    from data.dataset import ImageFolderDataset

    return ImageFolderDataset(
        opts.data, use_labels=opts.cond, max_size=opts.max_images, xflip=opts.xflip, cache=opts.cache
    )


def load_teacher(opts: EasyDict, dataset):
    """The network of --teacher, if it is what the objective starts from and fits the data; UserError otherwise."""
    from torch_utils import distributed
    from training.checkpoint import load_network

    with distributed.main_process_first():
        teacher = load_network(opts.teacher)
    check_teacher(opts, dataset, teacher)
    check_numbers(teacher, f'--teacher={opts.teacher}')
    return teacher


def check_numbers(net, name: str) -> None:
    """UserError where weights of a network, or what it makes of noise at a middle level, are not finite: training would end in broken steps."""
    import torch

    from torch_utils import distributed

    broken = [
        name
        for name, tensor in net.state_dict().items()
        if tensor.is_floating_point() and not tensor.isfinite().all()
    ]
    if broken:
        raise UserError(
            f'{name} has values that are not finite (NaN or infinite) in {", ".join(broken[:3])}{", ..." * (len(broken) > 3)}: '
            'its training had diverged, or the file is damaged. Take an earlier snapshot, or another one.'
        )
    net.to(distributed.get_device())
    low, high = max(net.sigma_min, 0.002), min(net.sigma_max, 80)
    sigma = (low * high) ** 0.5
    noise = torch.randn(
        [1, net.img_channels, net.img_resolution, net.img_resolution],
        generator=torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        denoised = net((sigma * noise).to(distributed.get_device()), torch.tensor(sigma))
    if not denoised.isfinite().all():
        raise UserError(
            f'{name} makes values that are not finite (NaN or infinite) of noise of sigma = {sigma:.3g}, though its weights are finite. '
            'Take an earlier snapshot, or another one.'
        )


def check_transfer(opts: EasyDict) -> None:
    """UserError where --transfer is no network: before there is a folder, and in a dry run."""
    from dnnlib.util import named
    from torch_utils import distributed
    from training.checkpoint import load_network

    with distributed.main_process_first(), named('--transfer'):
        origin = load_network(opts.transfer)
    check_numbers(origin, f'--transfer={opts.transfer}')


def check_teacher(opts: EasyDict, dataset, teacher) -> None:
    """UserError unless the network of --teacher is what the objective starts from and fits the data."""
    from data.label_space import space_of
    from training.networks import encoders

    check_kind(opts, teacher)
    theirs = (teacher.img_resolution, teacher.img_channels, space_of(teacher))
    ours = (dataset.resolution, encoders.for_dataset(dataset, teacher)[1], dataset.label_space)
    if theirs[:2] != ours[:2] or theirs[2].differs(ours[2]):
        describe = lambda r, ch, labels: f'{r}x{r}x{ch} with {labels}'
        cond = ' (--cond=1 reads labels)' if theirs[2].dim and not ours[2].dim else ''
        tool = f'--resolution={theirs[0]}x{theirs[0]}'
        if 'encoder' in teacher.metadata:
            tool = '--encode-vae' + ' from images of another size' * dataset.holds_latents
        cure = f'convert the data with dataset_tool.py {tool}'
        if (
            theirs[:2] == ours[:2]
            and theirs[2].dim > ours[2].dim > 0
            and not (theirs[2].are_vectors or ours[2].are_vectors)
        ):
            cure = f'where these are the first of its classes, say so by one-hot vectors of length {theirs[2].dim} in dataset.json'
        raise UserError(
            f'--teacher={opts.teacher} expects images of {describe(*theirs)}, but --data={opts.data} gives {describe(*ours)}{cond}.',
            more=f'Pick the teacher trained on this data, or {cure}.',
        )
    if opts.augment and not teacher.init_kwargs.get('augment_dim'):
        raise UserError(
            f'--augment={opts.augment:g} needs a teacher with augmentation labels; --teacher={opts.teacher} has none: use --augment=0.'
        )


def check_kind(opts: EasyDict, teacher) -> None:
    """UserError unless --teacher is of the kind that the objective starts from."""
    from training import samplers
    from training.checkpoint import NETWORKS

    metadata, kind = teacher.metadata, OBJECTIVES[opts.objective].teacher
    steps = len(metadata.get('sigmas', [0])) - 1
    one_model = isinstance(teacher, tuple(NETWORKS[name] for name in BOUNDARY_CLASSES))
    if kind == 'consistency':
        if metadata.get('solver') != 'cm' or getattr(teacher, 'boundary', 0) or not one_model:
            raise UserError(
                f'--teacher={opts.teacher} is no consistency model of the first stage: --objective={opts.objective} goes on '
                'from a snapshot of --objective=ect.'
            )
    elif steps and not (
        opts.objective == 'pd'
        and is_stage_of(metadata, opts, *samplers.clip_range(teacher, opts.sigma_min, opts.sigma_max))
    ):
        what = 'a consistency model' if metadata.get('solver') == 'cm' else f'a student of {steps} steps'
        nested = (
            f', or from a student of --student_grid=full and {2 * opts.S_start} steps'
            if opts.objective == 'pd'
            else ''
        )
        raise UserError(f'--teacher={opts.teacher} is {what} itself: distil from a diffusion model{nested}.')
    elif OBJECTIVES[opts.objective].boundary and not one_model:
        raise UserError(
            f'--teacher={opts.teacher} has the preconditioning {type(teacher).__name__}, but --objective={opts.objective} needs one '
            f'that can be the identity at sigma_min: {", ".join(BOUNDARY_CLASSES)}.'
        )


def is_stage_of(metadata: dict, opts: EasyDict, sigma_min: float, sigma_max: float) -> bool:
    """Whether a snapshot's metadata are those of a student whose grid of twice as many steps the first student's is half of."""
    from training.consistency_ops import student_grid

    grid = student_grid(2 * opts.S_start, sigma_min, sigma_max, opts.rho, 'full', opts.sigma_grid)
    return 'S' in metadata and metadata['sigmas'] == grid.tolist()


def network_of_teacher(opts: EasyDict, teacher) -> EasyDict:
    """The student's network: the teacher's, with the options that leave its weights alone; UserError where options contradict it."""
    from training.checkpoint import constructor_arguments

    kwargs = constructor_arguments(teacher)
    wanted = dict(
        PRECONDITIONING=opts.precond and preconditioning(opts),
        **(ARCHITECTURES[opts.arch] if opts.arch else {}),
    )
    own = dict(kwargs, PRECONDITIONING=type(teacher).__name__)
    own.setdefault('model_type', type(teacher.model).__name__)
    for option, keys in (
        ('precond', ['PRECONDITIONING']),
        ('arch', ['model_type', 'embedding_type', 'encoder_type']),
    ):
        for key in keys:
            theirs = own.get(key) or default_of(type(teacher.model), key)
            if wanted.get(key) is not None and wanted[key] != theirs:
                raise UserError(
                    f'--{option}={opts[option]} contradicts --teacher={opts.teacher}, which has {theirs}: leave it out.'
                )
    for option, key in NETWORK_OPTIONS.items():
        if opts[option] is None:
            continue
        if option in FREE_FOR_STUDENTS:
            kwargs[key] = opts[option]
            continue
        theirs = as_list(kwargs.get(key, default_of(type(teacher.model), key)))
        if opts[option] != theirs:
            raise UserError(
                f'--{option}={opts[option]} contradicts --teacher={opts.teacher}, which has {theirs}: leave it out.'
            )
    kwargs['use_fp16'] = opts.precision == 'fp16'
    if OBJECTIVES[opts.objective].boundary:
        kwargs['boundary'] = opts.sigma_min
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
    kwargs = dict(
        img_resolution=dataset.resolution,
        img_channels=channels,
        label_dim=dataset.label_dim,
        use_fp16=opts.precision == 'fp16',
        **ARCHITECTURES[opts.arch or 'ddpmpp'],
    )
    for option, key in NETWORK_OPTIONS.items():
        if opts[option] is not None:
            kwargs[key] = opts[option]
    if opts.augment:
        kwargs['augment_dim'] = AUGMENT_DIM
    if OBJECTIVES[opts.objective].boundary:
        kwargs['boundary'] = opts.sigma_min
    if not kwargs['channel_mult'] or dataset.resolution % 2 ** (len(kwargs['channel_mult']) - 1):
        raise UserError(
            f'{len(kwargs["channel_mult"])} levels do not fit images of {dataset.resolution}x{dataset.resolution}: change --cres.'
        )
    if opts.edm2:  # its preconditioning knows one U-Net
        del kwargs['model_type']
    network = EasyDict(class_name=preconditioning(opts), kwargs=kwargs)
    try:
        try_network(network)
    except (RuntimeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f'these options make no network that works ({str(error).splitlines()[0]}): channels should be multiples of 4 with 32 groups '
            'or fewer, see --cbase and --cres.'
        ) from error
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
    from training import samplers
    from training.checkpoint import network_digest
    from training.networks import encoders
    from training.objectives import loss_diffusion

    processes = distributed.get_world_size()
    if opts.batch % processes or (
        opts.batch_gpu and opts.batch // processes % min(opts.batch_gpu, opts.batch // processes)
    ):
        parts = f'equal parts of --batch-gpu={opts.batch_gpu}' if opts.batch_gpu else 'equal parts'
        raise click.UsageError(
            f'--batch={opts.batch} cannot be split into {parts} on {processes} process(es).'
        )
    c = EasyDict(objective=opts.objective, teacher=opts.teacher, total_nimg=total_images(opts))
    c.teacher_digest = network_digest(teacher, {}) if teacher is not None else None
    c.dataset = data_record(opts, dataset)
    encoder, channels = encoders.for_dataset(dataset, teacher)
    c.encoder = encoders.record_of(encoder)
    objective = OBJECTIVES[opts.objective]
    if 'sigma_min' in objective.own:
        opts.sigma_min, opts.sigma_max = samplers.clip_range(teacher, opts.sigma_min, opts.sigma_max)
    if opts.mid_t is not None and not opts.sigma_min < opts.mid_t < opts.sigma_max:
        raise UserError(
            f'--mid_t={opts.mid_t:g} does not lie between the noise levels {opts.sigma_min:g} and {opts.sigma_max:g} of the network.'
        )
    c.network = (
        network_of_teacher(opts, teacher)
        if teacher is not None
        else network_from_scratch(opts, dataset, channels)
    )
    c.sampling = EasyDict({name: opts[name] for name in objective.sampling}) or None
    if objective.loss:
        c.loss = EasyDict(
            {name: opts[name] for name in objective.options},
            sigma_data=float(getattr(teacher, 'sigma_data', 0.5)),
        )
    else:
        c.loss = EasyDict(kind='edm2' if opts.edm2 else opts.precond or 'edm')
        for name in ('P_mean', 'P_std'):  # of losses that have them
            if (default := loss_diffusion.DEFAULTS[c.loss.kind].get(name)) is not None:
                c.loss[name] = default if opts[name] is None else opts[name]
    c.update(
        batch_size=opts.batch,
        batch_gpu=opts.batch_gpu,
        optim=opts.optim,
        lr=opts.lr,
        betas=[0.9, opts.beta2],
        eps=1e-8,
        lr_rampup_nimg=opts.lr_rampup * 1e3,
        lr_schedule=opts.lr_schedule,
        lr_ref_nimg=(opts.lr_decay or 0) * opts.batch,
        loss_scaling=None if opts.ls == 'dynamic' else opts.ls,
        grad_clip=opts.grad_clip,
        precision=opts.precision,
        max_bad_steps=opts.max_bad_steps,
        augment=opts.augment,
    )
    c.update(
        ema_halflife_nimg=opts.ema, ema_rampup_ratio=opts.ema_rampup or None, phema_stds=opts.phema or []
    )
    c.update(
        kimg_per_tick=opts.tick,
        snapshot_ticks=opts.snap,
        phema_snapshot_ticks=opts.phema_snap,
        state_dump_ticks=opts.dump,
        states_kept=opts.keep,
        on_save_error=opts.on_save_error,
        seed=opts.seed,
        transfer=opts.transfer,
        resume=opts.resume,
    )
    c.update(
        workers=opts.workers,
        cudnn_benchmark=opts.bench,
        tf32=opts.tf32,
        compiled=opts.compiled,
        channels_last=opts.channels_last,
        checkpoint_activations=opts.checkpoint_activations,
        ema_device=opts.ema_device,
        profile_steps=opts.profile_steps,
    )
    c.validation = None
    if opts.val:
        names = (
            'ref',
            'ref_data',
            'detector',
            'steps',
            'every',
            'emas',
            'at_start',
            'teacher',
            'num',
            'batch',
            'seed',
            'label',
            'dump_images_dir',
            'overwrite',
        )
        c.validation = EasyDict({name: opts[f'val_{name}'] for name in names})
    c.wandb = None
    if opts.wandb:
        c.wandb = EasyDict(
            project=opts.wandb_project,
            entity=opts.wandb_entity,
            name=opts.wandb_run,
            mode=opts.wandb_mode,
            tags=[tag.strip() for tag in (opts.wandb_tags or '').split(',') if tag.strip()],
        )
    c.tensorboard = opts.tensorboard
    c.stages = opts.get('stages')
    c.run_dir = planned_run_dir(opts, dataset.name)
    return c


def planned_run_dir(opts: EasyDict, data_name: str) -> str:
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
    numbers = [int(m[1]) for m in map(re.compile(r'([0-9]{1,9})-').match, there) if m]
    arch = opts.arch or ('ddpmpp' if not opts.teacher else 'teacher')
    objective = OBJECTIVES[opts.objective]
    student = [objective.module().NAME + (f'-s{opts.S}' if opts.S else '')] if objective.loss else []
    words = [
        data_name,
        'cond' if opts.cond else 'uncond',
        arch,
        opts.precond or 'edm',
        *student,
        f'gpus{distributed.get_world_size()}',
        f'batch{opts.batch}',
        opts.precision,
        *([opts.desc] if opts.desc else []),
    ]
    return os.path.join(opts.outdir, f'{max(numbers, default=-1) + 1:05d}-{"-".join(words)}')


def make_run_dir(opts: EasyDict, data_name: str) -> str:
    """Create the folder of a new run: the next number where another run has just taken one, or --outdir itself, which may be there."""
    while True:
        run_dir = planned_run_dir(opts, data_name)
        try:
            os.makedirs(run_dir, exist_ok=opts.nosubdir)
            return run_dir
        except FileExistsError as error:
            if opts.nosubdir:
                raise UserError(f'--outdir={opts.outdir} is a file: name a folder') from error
        except OSError as error:
            raise UserError(
                f'--outdir={opts.outdir} cannot be written to: {error.strerror or error}'
            ) from error


def remove_if_empty(folder: str) -> None:
    """Leave no folder of a run that ended before it wrote anything."""
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def record_options(opts: EasyDict, c: EasyDict) -> None:
    """Write training_options.json into the folder of a new run, which is locked. Raises: UserError where another run has left states there."""
    from dnnlib.util import atomic_write
    from training.run_files import saved_states

    if saved_states(c.run_dir):
        raise UserError(
            f'--outdir={opts.outdir} holds training states of an earlier run: go on with it by --resume={opts.outdir}, or choose '
            'another folder.'
        )
    with atomic_write(os.path.join(c.run_dir, 'training_options.json')) as file:
        file.write(json.dumps(c, indent=2).encode())
