"""Writes consistency models as folders for diffusers' `ConsistencyModelPipeline`, without needing diffusers.

The pipeline's scheduler applies the preconditioning of Song et al. 2023 (Appendix C) and passes c_noise, 250
ln sigma, to a `UNet2DModel`, which can be configured as our ADM. Networks that these two cannot express are
refused.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

import dnnlib
from dnnlib import UserError
from training import networks
from training.samplers import DEFAULT_TIMESTEPS

RHO = 7.0  # default exponent of the Karras nodes, see `scheduler_config`

# Our layers of a residual block and of its attention, and their names in diffusers.
BLOCK_NAMES = dict(
    norm0='norm1', conv0='conv1', affine='time_emb_proj', norm1='norm2', conv1='conv2', skip='conv_shortcut'
)
ATTENTION_NAMES = dict(norm2='group_norm', qkv='qkv', proj='to_out.0')


def save_diffusers(folder: str | os.PathLike, net: torch.nn.Module) -> None:
    """Writes a folder; `ConsistencyModelPipeline.from_pretrained(folder)` then has the network's outputs.

    Args:
        folder: must not exist, or be empty.
    Raises: UserError, naming what diffusers cannot express, or why the folder cannot be written.
    """
    # Everything that can fail comes before the first file.
    check_expressible(net)
    scheduler, unet, weights = scheduler_config(net), unet_config(net), unet_weights(net)
    with new_folder(folder) as place:
        index = dict(
            _class_name='ConsistencyModelPipeline',
            unet=['diffusers', 'UNet2DModel'],
            scheduler=['diffusers', 'CMStochasticIterativeScheduler'],
        )
        write_json(place / 'model_index.json', index)
        write_json(place / 'unet' / 'config.json', unet)
        write_json(place / 'scheduler' / 'scheduler_config.json', scheduler)
        with dnnlib.util.atomic_write(place / 'unet' / 'diffusion_pytorch_model.safetensors') as file:
            file.write(safetensors.torch.save(weights, dict(format='pt')))


# ----------------------------------------------------------------------------
# What can be expressed.


def check_expressible(net: torch.nn.Module) -> None:
    """Raises: UserError for the first property of a network without a counterpart in
    ConsistencyModelPipeline."""
    # Preconditioning.
    if type(net) is networks.EDMPrecond:
        refuse(
            "EDM's time embedding, ln(sigma) / 4: UNet2DModel's frequencies are fixed, and the scheduler gives 250 ln(sigma)"
        )
    if not isinstance(net, networks.CMPrecond):
        refuse(
            f"{type(net).__name__}: the scheduler has the preconditioning of OpenAI's consistency models only"
        )
    if not net.boundary:
        refuse(
            'a diffusion model or a student of several steps: the pipeline samples consistency models, for '
            'which D(x; sigma_min) = x'
        )
    if not 0 < net.boundary < net.sigma_max < math.inf:
        refuse(
            f'noise levels from {net.boundary:g} to {net.sigma_max:g}: the scheduler begins at sigma_max and '
            'ends at sigma_min'
        )

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


def scheduler_config(net: networks.CMPrecond) -> dict:
    """Arguments of `CMStochasticIterativeScheduler`.

    Its `timesteps` are indices of `num_train_timesteps` Karras nodes from sigma_max (0) down to sigma_min.
    One-step sampling starts at 0 whatever their number, which is `num_timesteps` of the metadata. Song et al.
    have 40 in distillation, 201 (ImageNet-64) or 151 (LSUN) in training.
    """
    timesteps, rho = net.metadata.get('num_timesteps', DEFAULT_TIMESTEPS), net.metadata.get('rho', RHO)
    if type(timesteps) is not int or timesteps < 2:
        refuse(f'the number of timesteps {timesteps!r} in the metadata')
    if type(rho) not in (int, float) or not 0 < rho < math.inf or not 0 < net.sigma_data < math.inf:
        refuse(f'rho = {rho!r} in the metadata with sigma_data = {net.sigma_data!r}')
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


def unet_config(net: networks.CMPrecond) -> dict:
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


def unet_weights(net: networks.CMPrecond) -> dict[str, Tensor]:
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


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    with dnnlib.util.atomic_write(path) as file:
        file.write(json.dumps(value, indent=2, allow_nan=False).encode() + b'\n')
