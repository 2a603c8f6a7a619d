"""The network that training starts from: the teacher, which is checked, or one that the options describe."""

from __future__ import annotations

import copy
import functools
import json
import sys
from collections.abc import Mapping
from typing import NoReturn

from dnnlib import EasyDict, UserError
from dnnlib.options import value_text
from dnnlib.text import first_line
from dnnlib.util import named
from training import architectures
from training.architectures import ARCHITECTURES, AUGMENT_DIM, BOUNDARY_CLASSES, EDM2, PRECONDITIONING
from training.command_line import RUN, Options

FREE_FOR_STUDENTS = ('dropout', 'dout_resolutions')  # options that do not change the shapes of weights
LOGVAR_CHANNELS = 128  # as in EDM2's networks
# Of an embedding in radians, for a derivative, and of EDM's positional one: see `architectures.embedding_turns`.
MOST_TURNS, EDMS_TURNS = 1.0, 0.25
# {option: constructor argument}
NETWORK_OPTIONS = {
    name: option.key.rpartition('.')[2]
    for name, option in RUN.items()
    if option.key and option.key.startswith('network.kwargs.')
}


# ----------------------------------------------------------------------------
# Networks in files, and their checks.


def load_teacher(o: Options, dataset):
    """The network of --teacher. Raises: UserError unless the objective can start from it and data fit it."""
    from torch_utils import distributed
    from training.checkpoint import load_network

    with distributed.main_process_first(), named('--teacher'):
        teacher = load_network(o.teacher)
    check_teacher(o, dataset, teacher)
    check_numbers(teacher, f'--teacher={o.teacher}')
    return teacher


def guided_teacher(o: Options, teacher):
    """The teacher, guided by --guide. Raises: UserError unless the guide fits it."""
    from training import guidance

    if getattr(o.own, 'guide', None) is None:
        return teacher
    guided = guidance.guided(teacher, f'--teacher={o.teacher}', o.own)
    if guided.guide is not None:
        check_numbers(guided.guide, f'--guide={o.own.guide}')
        if o.run.augment and not guided.shares_augmentation:
            raise UserError(
                f'--augment={o.run.augment:g}: --guide={o.own.guide} does not know the augmentation labels '
                'of the teacher: use --augment=0.'
            )
    return guided


def check_numbers(net, name: str) -> None:
    """Check the numbers of a network, which could only lead to skipped steps.

    Raises: UserError if its weights, or its output for noise at a middle level, are not finite.
    """
    import torch

    from torch_utils import distributed

    # Weights.
    broken = [
        name
        for name, tensor in net.state_dict().items()
        if tensor.is_floating_point() and not tensor.isfinite().all()
    ]
    if broken:
        listed = ', '.join(broken[:3]) + ', ...' * (len(broken) > 3)
        raise UserError(
            f'{name} has values that are not finite (NaN or infinite) in {listed}: its training had '
            'diverged, or the file is damaged. Take an earlier snapshot, or another one.'
        )

    # Output.
    net.to(distributed.get_device())
    low, high = max(net.sigma_min, 0.002), min(net.sigma_max, 80)
    sigma = (low * high) ** 0.5
    # On the CPU, so that it is the same on all machines.
    noise = torch.randn(
        [1, net.img_channels, net.img_resolution, net.img_resolution],
        generator=torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        level = torch.tensor(sigma)
        denoised = net((sigma * noise).to(distributed.get_device()), level, **as_denoiser(net, level))
    if not denoised.isfinite().all():
        raise UserError(
            f'{name} makes values that are not finite (NaN or infinite) of noise of sigma = {sigma:.3g}, '
            'though its weights are finite. Take an earlier snapshot, or another one.'
        )


def load_transfer(o: Options) -> dict:
    """{class_name, kwargs} of the network of --transfer, which is checked.

    Raises: UserError if it is no network. Runs before a folder is created, and in a dry run.
    """
    from torch_utils import distributed
    from training.checkpoint import constructor_arguments, load_network

    # The main process reads first, so that a download happens once.
    with distributed.main_process_first(), named('--transfer'):
        origin = load_network(o.run.transfer)
    check_numbers(origin, f'--transfer={o.run.transfer}')
    # Where the constructor's default names the U-Net, its class does here.
    kwargs = dict(model_type=type(getattr(origin, 'model', None)).__name__) | constructor_arguments(origin)
    return dict(class_name=type(origin).__name__, kwargs=kwargs)


def with_architecture(o: Options, network: Mapping) -> Options:
    """The options; without --arch, with those that describe the network of --transfer.

    Sizes that are given stay. Dropout, which changes no weight, is the objective's or as given.
    Args:
        network: {class_name, kwargs}.
    Raises: UserError if no options describe it.
    """
    from torch_utils import distributed

    if o.run.arch or o.teacher:
        return o
    try:
        arch, precond = architectures.name_of(network['class_name'], network['kwargs'])
    except ValueError as error:
        raise UserError(f'--transfer={o.run.transfer} {error}: say which one to train by --arch.') from error

    # Options that are not given are the network's own.
    found = dict(arch=arch, precond=o.run.precond or precond)
    for option, key in NETWORK_OPTIONS.items():
        if option not in FREE_FOR_STUDENTS and getattr(o.run, option) is None and key in network['kwargs']:
            found[option] = as_list(network['kwargs'][key])
    if o.run.transfer:
        words = ' '.join(RUN[name].spelled(value_text(value)) for name, value in found.items())
        distributed.print0(f'Network of --transfer: {words}', file=sys.stderr)
    return o.but(**found)


def check_teacher(o: Options, dataset, teacher) -> None:
    """Raises: UserError unless the objective can start from the network of --teacher and it fits the data."""
    from data.label_space import space_of
    from training.networks import encoders

    # Size, channels and labels of images.
    check_kind(o, teacher)
    theirs = (teacher.img_resolution, teacher.img_channels, space_of(teacher))
    ours = (dataset.resolution, encoders.for_dataset(dataset, teacher)[1], dataset.label_space)
    if theirs[:2] != ours[:2] or theirs[2].differs(ours[2]):
        describe = lambda r, ch, labels: f'{r}x{r}x{ch} with {labels}'
        # The cure: other images, or labels in another form if only the number of classes differs.
        tool = f'--resolution={theirs[0]}x{theirs[0]}'
        if 'encoder' in teacher.metadata:
            tool = '--encode-vae' + ' from images of another size' * dataset.holds_latents
        cure = f'convert the data with dataset_tool.py {tool}'
        are_classes = not (theirs[2].are_vectors or ours[2].are_vectors)
        if theirs[:2] == ours[:2] and theirs[2].dim > ours[2].dim > 0 and are_classes:
            cure = (
                'where these are the first of its classes, say so by one-hot vectors of length '
                f'{theirs[2].dim} in dataset.json'
            )
        if {theirs[1], ours[1]} == {1, 3}:
            kind = 'grayscale' if theirs[1] == 1 else 'RGB'
            cure = f'save its images as {kind} before dataset_tool.py, which leaves the channels as they are'
            cure += '' if theirs[0] == ours[0] else f', and convert them with {tool}'
        cond = (
            'Add --cond=1, which reads the labels of the data. ' if theirs[2].dim and not ours[2].dim else ''
        )
        more = f'{cond}Pick the teacher trained on this data, or {cure}.'
        if cond and theirs[:2] == ours[:2]:
            more = cond.strip()
        raise UserError(
            f'--teacher={o.teacher} expects images of {describe(*theirs)}, but --data={o.run.data} gives '
            f'{describe(*ours)}.',
            more=more,
        )

    # Augmentation labels.
    if o.run.augment and not teacher.init_kwargs.get('augment_dim'):
        raise UserError(
            f'--augment={o.run.augment:g} needs a teacher with augmentation labels; --teacher={o.teacher} '
            'has none: use --augment=0.'
        )


def check_kind(o: Options, teacher) -> None:
    """Raises: UserError unless --teacher is of the kind that the objective starts from."""
    from training import samplers
    from training.checkpoint import NETWORKS

    metadata, kind = teacher.metadata, o.objective.teacher
    # A diffusion model records no noise levels: 0 steps.
    steps = len(metadata.get('sigmas', [0])) - 1
    one_model = isinstance(teacher, tuple(NETWORKS[name] for name in BOUNDARY_CLASSES))

    # A consistency model of ECT's.
    if kind == 'consistency':
        if metadata.get('solver') != 'cm' or getattr(teacher, 'boundary', 0) or not one_model:
            raise UserError(
                f'--teacher={o.teacher} is not a consistency model of the first stage: '
                f'--objective={o.run.objective} goes on from a snapshot of --objective=ect.'
            )
        return

    # A diffusion model, or an earlier round of progressive distillation.
    if getattr(teacher, 'two_time', False):
        raise UserError(
            f'--teacher={o.teacher} is a two-time student itself: distill from a diffusion model. '
            '(--transfer starts from its weights.)'
        )
    halving = o.run.objective == 'pd'
    if steps and not (
        halving and is_round_of(metadata, o, *samplers.clip_range(teacher, o.own.sigma_min, o.own.sigma_max))
    ):
        what = 'a consistency model' if metadata.get('solver') == 'cm' else f'a student of {steps} steps'
        nested = (
            f', or from a student of --student_grid=full and {2 * o.own.S_start} steps' if halving else ''
        )
        raise UserError(f'--teacher={o.teacher} is {what} itself: distill from a diffusion model{nested}.')
    if o.objective.boundary and not one_model:
        raise UserError(
            f'--teacher={o.teacher} has the preconditioning {type(teacher).__name__}, but '
            f'--objective={o.run.objective} needs one that can be the identity at sigma_min: '
            f'{", ".join(BOUNDARY_CLASSES)}.'
        )


def is_round_of(metadata: dict, o: Options, sigma_min: float, sigma_max: float) -> bool:
    """Whether a snapshot is of the student with twice as many steps as the first one of these options."""
    from training.consistency_ops import student_grid

    grid = student_grid(2 * o.own.S_start, sigma_min, sigma_max, o.own.rho, 'full', o.own.sigma_grid)
    return 'S' in metadata and 'solver' not in metadata and metadata['sigmas'] == grid.tolist()


# ----------------------------------------------------------------------------
# The network that trains.


def network_of_teacher(o: Options, teacher) -> EasyDict:
    """The student's network: the teacher's, with the options that leave its weights alone.

    Raises: UserError if options contradict it.
    """
    from training.checkpoint import constructor_arguments

    # --precond and --arch.
    kwargs = constructor_arguments(teacher)
    # What the options want, None where they leave it open, and what the teacher is.
    wanted = dict(
        PRECONDITIONING=o.run.precond and preconditioning(o, is_edm2(o, teacher)),
        **(ARCHITECTURES[o.run.arch] if o.run.arch else {}),
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
                refuse_contradiction(o, option, theirs)

    # Sizes and dropout.
    for option, key in NETWORK_OPTIONS.items():
        value = getattr(o.run, option)
        if value is None:
            continue
        if option in FREE_FOR_STUDENTS:
            kwargs[key] = value
            continue
        theirs = as_list(kwargs.get(key, default_of(type(teacher.model), key)))
        if value != theirs:
            refuse_contradiction(o, option, theirs)
    # Settings that change none of the teacher's weights, or that the objective imposes.
    kwargs['use_fp16'] = o.run.arithmetic == 'fp16'
    kwargs |= imposed(o, type(teacher).__name__)
    return EasyDict(class_name=type(teacher).__name__, kwargs=kwargs)


def imposed(o: Options, class_name: str) -> dict[str, object]:
    """Constructor arguments that the objective imposes on a class of networks."""
    boundary = dict(boundary=o.own.sigma_min) if o.objective.boundary else {}
    # EDM2's networks estimate log-variances anyway.
    learns = getattr(o.own, 'tangent_weight', None) == 'adaptive' and class_name != EDM2
    weight = dict(logvar_channels=LOGVAR_CHANNELS) if learns else {}
    return {**boundary, **weight, **(dict(two_time=True) if o.own.two_time else {})}


def check_differentiable(o: Options, network: EasyDict) -> None:
    """Raises: UserError if the objective needs the network's derivative by the noise level, and that is rough, because
    the embedding resolves far smaller differences of levels than training does."""
    turns = architectures.embedding_turns(network)
    if not o.own.differentiates or turns <= MOST_TURNS:
        return
    start = f'--teacher={o.teacher}' if o.teacher else f'--arch={o.run.arch}'
    raise UserError(
        f'--objective={o.run.objective} trains by the derivative by the noise level, and {start} embeds '
        f'the level in features that turn by {turns:.2g} radians as ln(sigma) rises by 1, '
        f'{turns / EDMS_TURNS:.0f} times as fast as '
        "EDM's positional embedding, and the derivative grows with them. Use a network of --arch=adm or "
        'ddpmpp with --precond=edm, or an objective of discrete steps, such as ect or flowmap.'
    )


def refuse_contradiction(o: Options, option: str, theirs) -> NoReturn:
    """Raises: UserError, because the teacher has another value of an option."""
    raise UserError(
        f'--{option}={getattr(o.run, option)} contradicts --teacher={o.teacher}, which has {theirs}: leave '
        'it out.'
    )


def is_edm2(o: Options, teacher) -> bool:
    """Whether the network is one of EDM2's."""
    return type(teacher).__name__ == EDM2 if teacher is not None else o.run.arch == 'edm2'


def preconditioning(o: Options, edm2: bool) -> str:
    """The class of preconditioning that --arch and --precond name."""
    if edm2 and o.run.precond in (None, 'edm'):
        return EDM2
    return PRECONDITIONING[o.run.precond or 'edm']


def network_from_scratch(o: Options, dataset, channels: int) -> EasyDict:
    """The network that the options describe, for encoded images of `channels` channels.

    Raises: UserError if there is no such network.
    """
    # The architecture, and what options change in it.
    kwargs = dict(
        img_resolution=dataset.resolution,
        img_channels=channels,
        label_dim=dataset.label_dim,
        use_fp16=o.run.arithmetic == 'fp16',
        **ARCHITECTURES[o.run.arch or 'ddpmpp'],
    )
    for option, key in NETWORK_OPTIONS.items():
        if getattr(o.run, option) is not None:
            kwargs[key] = getattr(o.run, option)
    if o.run.augment:
        kwargs['augment_dim'] = AUGMENT_DIM
    kwargs |= imposed(o, preconditioning(o, is_edm2(o, None)))
    if is_edm2(o, None):  # its preconditioning knows one U-Net
        del kwargs['model_type']

    # Whether it works.
    levels, resolution = len(kwargs['channel_mult']), dataset.resolution
    if not levels or resolution % 2 ** (levels - 1):
        raise UserError(f'{levels} levels do not fit images of {resolution}x{resolution}: change --cres.')
    network = EasyDict(class_name=preconditioning(o, is_edm2(o, None)), kwargs=kwargs)
    try:
        try_network(network)
    except (RuntimeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f'these options make no network that works ({first_line(error)}): channels should be '
            'multiples of 4 with 32 groups or fewer, see --cbase and --cres.'
        ) from error
    return network


def try_network(network: Mapping) -> None:
    """Pass one image through a network on the meta device. Raises: any error."""
    _try_network(json.dumps(network))


@functools.cache
def _try_network(network: str) -> None:
    import torch

    net = on_meta(json.loads(network)).eval()
    with torch.no_grad(), torch.device('meta'):
        sigma = torch.ones(1)
        images = torch.zeros(1, net.img_channels, net.img_resolution, net.img_resolution)
        net(images, sigma, **as_denoiser(net, sigma))


def as_denoiser(net, sigma) -> dict[str, object]:
    """The argument with which a two-time network is a denoiser: its step ends where it begins. Others take none."""
    return dict(r=sigma) if getattr(net, 'two_time', False) else {}


def on_meta(network: Mapping):
    """The network {class_name, kwargs} on the meta device: shapes without numbers or memory."""
    return copy.deepcopy(_on_meta(json.dumps(network)))


@functools.cache
def _on_meta(network: str):
    import torch

    from training.checkpoint import NETWORKS

    description = json.loads(network)
    with torch.device('meta'):
        return NETWORKS[description['class_name']](**description['kwargs'])


def edm2_width(o: Options, teacher) -> int:
    """Channels at the finest level of a network of EDM2's, which identify its size."""
    if teacher is None:
        return o.run.cbase or ARCHITECTURES['edm2']['model_channels']
    from training.checkpoint import constructor_arguments

    return constructor_arguments(teacher).get('model_channels') or default_of(
        type(teacher.model), 'model_channels'
    )


def default_of(cls: type, argument: str):
    """The default of a constructor argument of a class; None if it has no such argument."""
    import inspect

    parameter = inspect.signature(cls).parameters.get(argument)
    return parameter and parameter.default


def as_list(value):
    """Tuples as lists, everything else as it is."""
    return list(value) if isinstance(value, tuple) else value
