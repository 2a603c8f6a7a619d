"""Reads the UNet weights that OpenAI published with Song et al. 2023 (consistency models and their EDM teachers) into our ADM.

Both are the ADM of Dhariwal & Nichol 2021 under other parameter names. What differs, and where it is dealt with:

- The network is told the noise level as 1000 · ln(sigma) / 4, and consistency models are the identity at sigma_min: `networks.CMPrecond`.
- LSUN models add the embedding before the second norm instead of scaling and shifting after it; all norms have 32 groups: arguments of our ADM.
- Channels of attention are ordered (q, k, v), head, feature; ours head, feature, (q, k, v). Labels are an embedding table, ours a matrix that
  one-hot vectors are multiplied by: its transpose. Both are rearranged here.

The files say nothing but names and shapes; the architecture is inferred from those.
"""
from __future__ import annotations

import itertools
import os
import pickle
import struct
import zipfile
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

import dnnlib
from dnnlib import UserError
from training import networks

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0    # of all published models
CHANNELS_PER_HEAD, NUM_GROUPS = 64, 32          # likewise; shapes do not tell
COARSEST = 8                                    # pixels: the level at which all published U-Nets end
READING_ERRORS = (pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, struct.error, OSError, MemoryError, RuntimeError, EOFError, LookupError,
                  TypeError, ValueError, ArithmeticError, AttributeError, AssertionError)  # what damaged files cause in zipfile and PyTorch


def load_openai(source: str | os.PathLike, kind: str = 'consistency', resolution: int | None = None) -> torch.nn.Module:
    """The network of a state dict of OpenAI's consistency_models, as `load_network` would give it; tensors keep their dtypes.

    Args:
        source: path or http(s) URL of the `.pt` file.
        kind: `consistency` (distilled or trained; D(x; sigma_min) = x) or `edm` (a diffusion model, their teacher). The file does not tell.
        resolution: of the images; None: the one at which the coarsest level has 8x8 pixels, as in all that were published.
    Raises: UserError, naming the source, where the file is damaged, hostile, or of another layout.
    """
    weights = read_state_dict(source)
    try:
        return _convert(weights, kind, resolution)
    except UnknownLayout as error:
        raise UserError(f'{os.fspath(source)} cannot be converted: it {error}.') from error


class UnknownLayout(ValueError):
    """The weights are not those of a UNet that we can express. The message completes 'it ...'."""

#----------------------------------------------------------------------------
# The file.

def read_state_dict(source: str | os.PathLike) -> dict[str, Tensor]:
    """The named tensors of a PyTorch file, on the CPU, without executing anything in it.

    Raises: UserError where it holds anything else, is damaged, or would take more memory than its length.
    """
    path = dnnlib.util.local_path(source)
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > size:
                raise UserError(f'{os.fspath(source)} is not a PyTorch file: its entries are compressed.')
            if (damaged := archive.testzip()) is not None:
                raise UserError(f'{os.fspath(source)} is damaged: {damaged} does not match its checksum. Copy or download it again.')
        weights = torch.load(path, map_location='cpu', weights_only=True)
    except READING_ERRORS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f'{os.fspath(source)} cannot be read as a PyTorch file of tensors ({reason}). Nothing in it was executed.') from error
    if not (isinstance(weights, dict) and weights and all(isinstance(name, str) and _is_plain(value) for name, value in weights.items())):
        raise UserError(f'{os.fspath(source)} is not a state dict: it should hold tensors by name and nothing else.')
    if sum(tensor.nbytes for tensor in weights.values()) > size:
        raise UserError(f'{os.fspath(source)} is not a state dict: its tensors share memory, or claim more than the file has.')
    return dict(weights)


def _is_plain(value) -> bool:
    return (isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == 'cpu' and not value.is_quantized
            and value.is_floating_point())

#----------------------------------------------------------------------------
# The architecture, from names and shapes.

@dataclass(frozen=True)
class Layout:
    """What the shapes of a UNet's weights say about it."""

    img_channels: int
    label_dim: int
    model_channels: int
    channel_mult: list[int]
    num_blocks: int
    attention: list[bool]   # by level, finest first
    adaptive_scale: bool


def infer_layout(shapes: dict[str, tuple[int, ...]]) -> Layout:
    """The UNet that has parameters of these names and shapes, so far as they tell. Raises: UnknownLayout."""
    def shape(name: str, dims: int) -> tuple[int, ...]:
        if len(shapes.get(name, ())) != dims or 0 in shapes[name]:
            raise UnknownLayout(f"has no {dims}-dimensional {name}, which every UNet of OpenAI's consistency_models has")
        return shapes[name]

    if plain := [name for name in shapes if name.endswith(('.op.weight', '.conv.weight'))]:
        raise UnknownLayout(f'resamples by a convolution ({plain[0]}); our ADM has residual blocks there (resblock_updown=True)')
    _, model_channels = shape('time_embed.0.weight', 2)
    _, img_channels, _, _ = shape('input_blocks.0.0.weight', 4)
    count = next(k for k in itertools.count() if f'output_blocks.{k}.0.in_layers.2.weight' not in shapes)
    levels = 1 + sum(f'output_blocks.{k}.{last}.in_layers.2.weight' in shapes for k in range(count) for last in (1, 2))
    if count % levels or not 2 * levels <= count <= 64 * levels or levels > 10:
        raise UnknownLayout(f'has {count} blocks in its decoder, of which {levels - 1} upsample: '
                            "no UNet of OpenAI's consistency_models has that")
    firsts = [1 + level * (count // levels) for level in range(levels)]  # each level's first block in the encoder
    widths = [shape(f'input_blocks.{first}.0.in_layers.2.weight', 4)[0] for first in firsts]
    attention = [f'input_blocks.{first}.1.qkv.weight' in shapes for first in firsts]
    if model_channels % NUM_GROUPS or any(width % model_channels for width in widths):
        raise UnknownLayout(f'has levels of {widths} channels, which are not multiples of {model_channels} and {NUM_GROUPS}')
    for width in [*itertools.compress(widths, attention), widths[-1]]:
        if width % CHANNELS_PER_HEAD:
            raise UnknownLayout(f'has attention over {width} channels, which heads of {CHANNELS_PER_HEAD} do not divide')
    modulation = shape('input_blocks.1.0.emb_layers.1.weight', 2)[0]
    label_dim = shape('label_emb.weight', 2)[0] if 'label_emb.weight' in shapes else 0
    return Layout(img_channels, label_dim, model_channels, [width // model_channels for width in widths], count // levels - 1, attention,
                  adaptive_scale=modulation == 2 * widths[0])


def parameter_names(model: networks.DhariwalUNet) -> dict[str, str]:
    """{our parameter's name: OpenAI's}, for every parameter of an ADM."""
    modules = {'map_layer0': 'time_embed.0', 'map_layer1': 'time_embed.2', 'out_norm': 'out.0', 'out_conv': 'out.2'}
    for index, name in enumerate(model.enc):
        modules.update(_block_names(f'enc.{name}', f'input_blocks.{index}', 0, model.enc[name]))
    outputs, parts = -1, 0
    for name, block in model.dec.items():
        if name.endswith(('_in0', '_in1')):     # the middle: block, attention, block
            modules.update(_block_names(f'dec.{name}', 'middle_block', 0 if name.endswith('_in0') else 2, block))
            continue
        if not name.endswith('_up'):            # an upsampling block is the last part of the output block before it
            outputs, parts = outputs + 1, 0
        modules.update(_block_names(f'dec.{name}', f'output_blocks.{outputs}', parts, block))
        parts += 2 if block.num_heads else 1
    names = {f'{ours}.{leaf}': f'{theirs}.{leaf}' for ours, theirs in modules.items() for leaf in ('weight', 'bias')}
    return names | ({'map_label.weight': 'label_emb.weight'} if model.map_label is not None else {})


def _block_names(ours: str, theirs: str, part: int, block: torch.nn.Module) -> dict[str, str]:
    """Module names of one residual block, which is part number `part` of `theirs`; its attention is the part after it."""
    if not isinstance(block, networks.UNetBlock):
        return {ours: f'{theirs}.{part}'}
    names = dict(norm0='in_layers.0', conv0='in_layers.2', affine='emb_layers.1', norm1='out_layers.0', conv1='out_layers.3')
    if block.skip is not None and block.skip.weight is not None:
        names['skip'] = 'skip_connection'
    modules = {f'{ours}.{name}': f'{theirs}.{part}.{other}' for name, other in names.items()}
    if block.num_heads:
        modules |= {f'{ours}.{name}': f'{theirs}.{part + 1}.{other}' for name, other in dict(norm2='norm', qkv='qkv', proj='proj_out').items()}
    return modules

#----------------------------------------------------------------------------
# The network.

def _convert(weights: dict[str, Tensor], kind: str, resolution: int | None) -> torch.nn.Module:
    layout = infer_layout({name: tuple(tensor.shape) for name, tensor in weights.items()})
    net = build_network(layout, kind, resolution)
    names = parameter_names(net.model)
    for what, found in (('lacks', set(names.values()) - weights.keys()), ('has unexpected', weights.keys() - set(names.values()))):
        if found:
            raise UnknownLayout(f'{what} tensors: {", ".join(sorted(found)[:5])}{", ..." if len(found) > 5 else ""}')
    state = dict(net.named_buffers()) | {f'model.{ours}': to_our_order(ours, weights[theirs]) for ours, theirs in names.items()}
    for name, tensor in net.named_parameters():
        if state[name].shape != tensor.shape:
            raise UnknownLayout(f'has {names[name.removeprefix("model.")]} in the place of our {name}, with shape {list(state[name].shape)} '
                                f'instead of {list(tensor.shape)}')
    net.load_state_dict(state, assign=True)
    net.metadata = _metadata(kind)
    return net.eval().requires_grad_(False)


def build_network(layout: Layout, kind: str, resolution: int | None) -> networks.CMPrecond:
    """Our network of a layout; its parameters have shapes but no memory. Raises: UnknownLayout for an impossible resolution."""
    levels = len(layout.channel_mult)
    resolution = resolution or COARSEST << (levels - 1)
    if resolution % (1 << (levels - 1)):
        raise UnknownLayout(f'has {levels} levels, which do not fit images of {resolution}x{resolution}')
    if kind == 'consistency':
        span = dict(sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, boundary=SIGMA_MIN)
    elif kind == 'edm':
        span = {}
    else:
        raise ValueError(f'kind {kind!r} is neither consistency nor edm')
    attn_resolutions = [resolution >> level for level, attention in enumerate(layout.attention) if attention]
    with torch.device('meta'):
        net = networks.CMPrecond(resolution, layout.img_channels, label_dim=layout.label_dim, **span, model_channels=layout.model_channels,
                                 channel_mult=layout.channel_mult, num_blocks=layout.num_blocks, attn_resolutions=attn_resolutions, dropout=0,
                                 adaptive_scale=layout.adaptive_scale, min_channels_per_group=1)
    for module in net.modules():  # constants, which `meta` has left without values
        if isinstance(module, networks.Conv2d) and module.resample_filter is not None:
            module.resample_filter = networks.Conv2d(1, 1, kernel=0, up=True).resample_filter
    return net


def to_our_order(name: str, tensor: Tensor) -> Tensor:
    """A tensor of OpenAI's, for our parameter `name`."""
    if name.endswith(('.qkv.weight', '.qkv.bias')):     # (q, k, v), head, feature -> head, feature, (q, k, v)
        if tensor.shape[0] % (3 * CHANNELS_PER_HEAD):
            raise UnknownLayout(f'has {tensor.shape[0]} channels of attention where three times a multiple of {CHANNELS_PER_HEAD} is expected')
        return tensor.unflatten(0, (3, -1, CHANNELS_PER_HEAD)).movedim(0, 2).flatten(0, 2)
    return tensor.mT.contiguous() if name == 'map_label.weight' else tensor


def _metadata(kind: str) -> dict:
    """A consistency model is a student of one step: from sigma_max to 0."""
    if kind == 'edm':
        return dict(objective='diffusion', source='openai')
    return dict(objective='cm', source='openai', S=1, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, rho=RHO, student_grid='edm', sigmas=[SIGMA_MAX, 0.0])
