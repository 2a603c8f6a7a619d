"""Writes networks as folders for diffusers' `ConsistencyModelPipeline`, without needing diffusers.

The pipeline evaluates a `UNet2DModel`, which can be configured as our ADM, under one of two schedulers.
`CMStochasticIterativeScheduler` samples consistency models: it applies the preconditioning of Song et al.
2023 (Appendix C) and passes 250 ln sigma to the network. `EDMDPMSolverMultistepScheduler` samples students
and teachers: EDM's preconditioning and ln(sigma) / 4; its steps of first order are DDIM's, over Karras nodes
and then to 0. (`EDMEulerScheduler` takes the same steps, but a long one loses five digits in FP32.) Networks
that these cannot express are refused.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

import dnnlib
from data.label_space import space_of
from dnnlib import UserError
from training import consistency_ops as ops
from training import networks
from training.samplers import DEFAULT_TIMESTEPS
from training.teacher_samplers import OdeOptions, teacher_range

EDM_SCHEDULER = 'EDMDPMSolverMultistepScheduler'
RHO = 7.0  # default exponent of the Karras nodes, see `cm_scheduler` and `edm_scheduler`

# Our layers of a residual block and of its attention, and their names in diffusers.
BLOCK_NAMES = dict(
    norm0='norm1', conv0='conv1', affine='time_emb_proj', norm1='norm2', conv1='conv2', skip='conv_shortcut'
)
ATTENTION_NAMES = dict(norm2='group_norm', qkv='qkv', proj='to_out.0')


def save_diffusers(folder: str | os.PathLike, net: torch.nn.Module) -> None:
    """Writes a folder; `DiffusionPipeline.from_pretrained(folder)` then makes the network's images.

    The pipeline's `num_inference_steps` are a student's steps, a teacher's Euler steps.

    Args:
        folder: must not exist, or be empty.
    Raises: UserError, naming what diffusers cannot express, or why the folder cannot be written.
    """
    # Everything that can fail comes before the first file.
    check_expressible(net)
    scheduler = cm_scheduler(net) if net.boundary else edm_scheduler(net)
    unet, weights = unet_config(net), unet_weights(net)
    # EDM's scheduler starts at noise of another deviation, for which levels are renamed.
    if not net.boundary:
        weights = scaled_levels(weights, scheduler['sigma_data'] / net.sigma_data)
    # The folder gets its name when all files are in it.
    with new_folder(folder) as place:
        index = dict(
            _class_name='ConsistencyModelPipeline',
            unet=['diffusers', 'UNet2DModel'],
            scheduler=['diffusers', scheduler['_class_name']],
        )
        for path, contents in (
            ('model_index.json', index),
            ('unet/config.json', unet),
            ('scheduler/scheduler_config.json', scheduler),
        ):
            (place / path).parent.mkdir(exist_ok=True)
            dnnlib.util.write_json(place / path, contents, allow_nan=False)
        with dnnlib.util.atomic_write(place / 'unet' / 'diffusion_pytorch_model.safetensors') as file:
            file.write(safetensors.torch.save(weights, dict(format='pt')))


# ----------------------------------------------------------------------------
# What can be expressed.


def check_expressible(net: torch.nn.Module) -> None:
    """Raises: UserError for the first property of a network without a counterpart in
    ConsistencyModelPipeline and its parts."""
    # Preconditioning.
    if not isinstance(net, networks.EDMPrecond):
        refuse(
            f'{type(net).__name__}: its schedulers have the preconditioning of EDM and of Song et al. only'
        )
    if net.two_time:
        refuse(
            'a two-time student, which is also given the level where a step ends: its schedulers give one '
            'level'
        )
    if isinstance(net, networks.CMPrecond) and not net.boundary:
        refuse(
            "a diffusion model or a student of several steps with OpenAI's time embedding, 250 ln(sigma): "
            f'{EDM_SCHEDULER} gives the network ln(sigma) / 4'
        )
    if not isinstance(net, networks.CMPrecond) and net.boundary:
        refuse(
            "a consistency model, for which D(x; sigma_min) = x, with EDM's time embedding, ln(sigma) / 4: "
            'CMStochasticIterativeScheduler gives the network 250 ln(sigma)'
        )
    if net.boundary and not 0 < net.boundary < net.sigma_max < math.inf:
        refuse(
            f'noise levels from {net.boundary:g} to {net.sigma_max:g}: the scheduler begins at sigma_max and '
            'ends at sigma_min'
        )

    # What the pipeline gives the network and makes of its output.
    if net.metadata.get('encoder'):
        refuse('a network of latents: ConsistencyModelPipeline has no VAE')
    if net.label_dim and space_of(net).are_vectors:
        refuse('label vectors: UNet2DModel takes class indices')

    # U-Net.
    if not isinstance(net.model, networks.DhariwalUNet):
        refuse(f'{type(net.model).__name__}: UNet2DModel has no counterpart')
    if net.model.map_augment is not None:
        refuse('augmentation labels')
    if net.model.channel_mult[0] != 1:
        refuse(f'a first level {net.model.channel_mult[0]} times as wide as the time embedding')

    # Numbers that UNet2DModel has once for all layers.
    if len(sizes := head_sizes(net.model)) > 1:
        refuse(
            f'attention heads of {" or ".join(map(str, sizes))} channels: UNet2DModel has the same size '
            'everywhere'
        )
    if len(groups := group_counts(net.model)) > 1:
        refuse(
            f'normalization in {" or ".join(map(str, groups))} groups: UNet2DModel has the same number '
            'everywhere'
        )


def refuse(what: str):
    raise UserError(f'diffusers cannot express {what}. Use --to=safetensors, or keep the snapshot.')


def head_sizes(model: networks.DhariwalUNet) -> list[int]:
    blocks = [*model.enc.values(), *model.dec.values()]
    return sorted(
        {block.out_channels // block.num_heads for block in blocks if getattr(block, 'num_heads', 0)}
    )


def group_counts(model: torch.nn.Module) -> list[int]:
    return sorted({module.num_groups for module in model.modules() if isinstance(module, networks.GroupNorm)})


# ----------------------------------------------------------------------------
# Configurations and weights.


def cm_scheduler(net: networks.CMPrecond) -> dict:
    """Arguments of `CMStochasticIterativeScheduler`.

    Its `timesteps` are indices of `num_train_timesteps` Karras nodes from sigma_max (0) down to sigma_min.
    One-step sampling starts at 0 whatever their number, which is `num_timesteps` of the metadata. Song et al.
    have 40 in distillation, 201 (ImageNet-64) or 151 (LSUN) in training.
    """
    timesteps, rho = net.metadata.get('num_timesteps', DEFAULT_TIMESTEPS), checked_rho(net)
    if type(timesteps) is not int or timesteps < 2:
        refuse(f'the number of timesteps {timesteps!r} in the metadata')
    return dict(
        _class_name='CMStochasticIterativeScheduler',
        num_train_timesteps=timesteps,
        sigma_min=net.boundary,
        sigma_max=net.sigma_max,
        sigma_data=net.sigma_data,
        rho=rho,
        s_noise=1.0,
        clip_denoised=bool(net.metadata.get('clip_denoised', True)),
    )


def edm_scheduler(net: networks.EDMPrecond) -> dict:
    """Arguments of `EDM_SCHEDULER`: the levels and sigma_data, all times s (see `scaled_levels`).

    The scheduler starts at noise of deviation √(σ² + 1), σ its highest level. With s = √(1 − 1/σ_0²) that is
    σ_0, where our sampler starts.
    """
    highest, lowest, rho = levels_of_sampling(net)
    if highest <= 1:
        refuse(f'sampling from sigma = {highest:g}: {EDM_SCHEDULER} starts at noise of deviation above 1')
    scale = math.sqrt(1 - 1 / highest**2)
    # DPM-Solver++ of first order is DDIM.
    return dict(
        _class_name=EDM_SCHEDULER,
        solver_order=1,
        algorithm_type='dpmsolver++',
        sigma_min=scale * lowest,
        sigma_max=scale * highest,
        sigma_data=scale * net.sigma_data,
        sigma_schedule='karras',
        prediction_type='epsilon',
        rho=rho,
        final_sigmas_type='zero',
    )


def steps_of_sampling(net: networks.EDMPrecond) -> str:
    """The `num_inference_steps` to sample a network with, for a message."""
    if net.boundary or 'sigmas' not in net.metadata:
        return 'any num_inference_steps' + ('' if net.boundary else ', which are Euler steps')
    return f'num_inference_steps={len(net.metadata["sigmas"]) - 1}, the steps that it was trained for'


def levels_of_sampling(net: networks.EDMPrecond) -> tuple[float, float, float]:
    """(highest, lowest, rho) of the Karras nodes at which a student or teacher is evaluated.

    Raises: UserError if a student's levels are no such nodes, or noise is added between them.
    """
    rho, sigmas = checked_rho(net), net.metadata.get('sigmas')
    # A teacher has no levels of its own.
    if sigmas is None:
        low, high = teacher_range(net, OdeOptions())
        return high, low, RHO

    # The levels of a student, without the 0 at the end.
    levels = [float(sigma) for sigma in sigmas[:-1]]
    solver = net.metadata.get('solver', 'student')
    if solver != 'student' and (solver not in ('cm', 'ancestral') or len(levels) > 1):
        refuse(
            f'{len(levels)} evaluations of the sampler {solver}, which adds noise between them: '
            f'{EDM_SCHEDULER} adds none'
        )
    if len(levels) == 1:
        return levels[0], levels[0] / 2, rho  # the lower end is no level of one step

    # The scheduler computes its levels from the ends, so they must be Karras nodes.
    nodes = ops.karras_sigmas(len(levels), levels[-1], levels[0], rho)
    if not torch.allclose(nodes, nodes.new_tensor(levels), rtol=1e-6, atol=0):
        listed = ', '.join(f'{sigma:.4g}' for sigma in levels)
        refuse(f'the noise levels {listed}: {EDM_SCHEDULER} has Karras nodes (rho = {rho:g} here) only')
    return levels[0], levels[-1], rho


def checked_rho(net: networks.EDMPrecond) -> float:
    """The exponent of the Karras nodes. Raises: UserError for one that cannot be, or such a sigma_data."""
    rho = net.metadata.get('rho', RHO)
    if type(rho) not in (int, float) or not 0 < rho < math.inf or not 0 < net.sigma_data < math.inf:
        refuse(f'rho = {rho!r} in the metadata with sigma_data = {net.sigma_data!r}')
    return rho


def scaled_levels(weights: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The weights of a `UNet2DModel` for which D(x; σ) stays the same if σ and sigma_data are named s times
    what they are, s = `scale`, and x is not.

    c_skip stays; c_in becomes c_in / s, c_out becomes s c_out, and c_noise = ln(σ) / 4 grows by b = ln(s) / 4.
    With cos fc = cos fb cos f(c+b) + sin fb sin f(c+b) and sin fc = cos fb sin f(c+b) − sin fb cos f(c+b), the
    first layer undoes the latter.
    """
    # Input and output.
    weights = dict(weights)
    weights['conv_in.weight'] = (weights['conv_in.weight'].double() * scale).float()
    for name in ('conv_out.weight', 'conv_out.bias'):
        weights[name] = (weights[name].double() / scale).float()

    # Time embedding: [cos fc, sin fc] with f from 1 down, see `networks.PositionalEmbedding`.
    cos_weight, sin_weight = weights['time_embedding.linear_1.weight'].double().chunk(2, dim=1)
    half = cos_weight.shape[1]
    turn = 10000 ** -(torch.arange(half, dtype=torch.float64) / half) * (math.log(scale) / 4)
    turned = (
        cos_weight * turn.cos() - sin_weight * turn.sin(),
        cos_weight * turn.sin() + sin_weight * turn.cos(),
    )
    weights['time_embedding.linear_1.weight'] = torch.cat(turned, dim=1).float()
    return weights


def unet_config(net: networks.EDMPrecond) -> dict:
    """Arguments of `UNet2DModel`."""
    # Numbers that are the same everywhere, see `check_expressible`.
    model, (num_groups,) = net.model, group_counts(net.model)
    (head_size,) = head_sizes(model) or [None]

    # The first block of each level tells its width, and whether it has attention.
    firsts = [model.enc[f'{at}_block0'] for at in levels(model)]
    attention = [bool(block.num_heads) for block in firsts]
    return dict(
        _class_name='UNet2DModel',
        sample_size=net.img_resolution,
        in_channels=net.img_channels,
        out_channels=net.img_channels,
        block_out_channels=[block.out_channels for block in firsts],
        layers_per_block=sum('_block' in name for name in model.enc) // len(firsts),
        down_block_types=['AttnDownBlock2D' if here else 'ResnetDownsampleBlock2D' for here in attention],
        downsample_type='resnet',
        up_block_types=['AttnUpBlock2D' if here else 'ResnetUpsampleBlock2D' for here in reversed(attention)],
        upsample_type='resnet',
        add_attention=any('mid_block.attentions' in name for name in unet_places(model)),
        attention_head_dim=head_size,
        norm_num_groups=num_groups,
        attn_norm_num_groups=num_groups,
        norm_eps=model.out_norm.eps,
        resnet_time_scale_shift='scale_shift' if model.block_kwargs['adaptive_scale'] else 'default',
        time_embedding_type='positional',
        time_embedding_dim=model.map_layer0.out_features,
        flip_sin_to_cos=True,
        freq_shift=0,
        num_class_embeds=net.label_dim or None,
        act_fn='silu',
        dropout=0.0,
    )


def levels(model: networks.DhariwalUNet) -> list[str]:
    """Prefixes of module names, finest level first."""
    resolutions = [model.img_resolution >> level for level in range(len(model.channel_mult))]
    return [f'{res}x{res}' for res in resolutions]


def block_places(model: networks.DhariwalUNet) -> dict[str, torch.nn.Module]:
    """{UNet2DModel's name of a residual block (or of the first convolution): our module}."""
    order, places = levels(model), {}

    # Encoder; a downsampling block belongs to the level above it.
    for name, module in model.enc.items():
        at, _, what = name.partition('_')
        level = order.index(at)
        if what == 'conv':
            place = 'conv_in'
        elif what == 'down':
            place = f'down_blocks.{level - 1}.downsamplers.0'
        else:
            place = f'down_blocks.{level}.resnets.{what.removeprefix("block")}'
        places[place] = module

    # Decoder, which begins with the middle; levels count from the coarsest.
    for name, module in model.dec.items():
        at, _, what = name.partition('_')
        level = len(order) - 1 - order.index(at)
        if what == 'up':
            place = f'up_blocks.{level - 1}.upsamplers.0'
        elif what in ('in0', 'in1'):
            place = f'mid_block.resnets.{what[2:]}'
        else:
            place = f'up_blocks.{level}.resnets.{what.removeprefix("block")}'
        places[place] = module
    return places


def unet_places(model: networks.DhariwalUNet) -> dict[str, torch.nn.Module]:
    """{UNet2DModel's name of a layer: our module with its weight and bias}."""
    places = {
        'time_embedding.linear_1': model.map_layer0,
        'time_embedding.linear_2': model.map_layer1,
        'conv_norm_out': model.out_norm,
        'conv_out': model.out_conv,
    }
    # Residual blocks, and their attention, which UNet2DModel lists apart.
    for place, block in block_places(model).items():
        if not isinstance(block, networks.UNetBlock):
            places[place] = block
            continue
        for ours, theirs in BLOCK_NAMES.items():
            if getattr(getattr(block, ours), 'weight', None) is not None:
                places[f'{place}.{theirs}'] = getattr(block, ours)
        if block.num_heads:
            attention = place.replace('resnets', 'attentions')
            for ours, theirs in ATTENTION_NAMES.items():
                places[f'{attention}.{theirs}'] = getattr(block, ours)
    return places


def unet_weights(net: networks.EDMPrecond) -> dict[str, Tensor]:
    """The tensors of an ADM under the names and in the shapes of `UNet2DModel`."""
    weights = {}
    for place, module in unet_places(net.model).items():
        for leaf, tensor in module.named_parameters():
            if place.endswith('.qkv'):
                # From channels ordered head, feature, (q, k, v) to three layers of head, feature.
                for part, value in zip('qkv', tensor.unflatten(0, (-1, 3)).unbind(1)):
                    weights[f'{place[:-3]}to_{part}.{leaf}'] = linear(value)
            else:
                weights[f'{place}.{leaf}'] = linear(tensor) if place.endswith('.to_out.0') else tensor
    if net.label_dim:
        weights['class_embedding.weight'] = net.model.map_label.weight.mT
    return {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}


def linear(tensor: Tensor) -> Tensor:
    """A 1x1 convolution's parameter as that of a matrix."""
    return tensor.flatten(1) if tensor.ndim == 4 else tensor


# ----------------------------------------------------------------------------
# Folders.


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A folder to fill, which is renamed to `path` when the `with` block ends without an error.

    Raises: UserError if `path` is a file or a folder that is not empty, or cannot be written.
    """
    path = Path(path)
    try:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise UserError(f'{path} exists already. Give the name of a new folder, or remove it.')
        with dnnlib.util.temporary_folder(path) as temporary:
            yield temporary
            os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f'Cannot write {path}: {error.strerror}. Choose an existing directory that you may write to.'
        ) from error
