"""Reads the UNet weights of OpenAI's consistency_models (Song et al. 2023: consistency models and their EDM
teachers) into our ADM.

Both are the ADM of Dhariwal & Nichol 2021 under other parameter names. Differences, and what handles them:

- c_noise is 1000 · ln(sigma) / 4, and consistency models are the identity at sigma_min: `networks.CMPrecond`.
- LSUN models add the embedding before the second norm instead of scaling and shifting after it; all norms
  have 32 groups: arguments of our ADM.
- Channels of attention are ordered (q, k, v), head, feature; ours head, feature, (q, k, v). Labels are an
  embedding table; ours is its transpose, a matrix that multiplies one-hot vectors. This module rearranges
  both.

The files hold nothing but tensors by name. Names and shapes determine widths, levels, blocks, attention
levels, classes, and how the embedding enters (`infer_layout`). They do not determine `Untold`, whose defaults
are the values of all published models.
"""

from __future__ import annotations

import itertools
import math
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import dnnlib
from dnnlib import UserError
from dnnlib.file_kind import another_kind
from torch_utils.restricted_pickle import MalformedPickle
from torch_utils.saved_tensors import read_saved
from training import checkpoint, networks

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0  # of all published models
NUM_GROUPS = 32  # of every norm in consistency_models
COARSEST = 8  # pixels; the coarsest level of all published U-Nets
FIRST_LAYER = 'time_embed.0.weight'  # identifies a UNet in a file
MAX_ENTRIES, MAX_DEPTH = 200_000, 8  # limits on nested dicts, enough for tensors and an optimizer's state


@dataclass(frozen=True)
class Untold:
    """What the names and shapes of a UNet's weights do not determine.

    Attributes:
        kind: `consistency` (distilled or trained; D(x; sigma_min) = x) or `edm` (a diffusion model, their
            teacher).
        resolution: of the images; None: the one at which the coarsest level has 8x8 pixels. It does not
            change what the network computes.
        channels_per_head: channels of each attention head (`num_head_channels`).
        heads: their number at every level instead (`num_heads`, if `num_head_channels` is -1).
        attention_order: outermost order of the channels of attention, `qkv-first` or `heads-first`
            (`QKVAttentionLegacy`).
    """

    kind: str = 'consistency'
    resolution: int | None = None
    channels_per_head: int = 64
    heads: int | None = None
    attention_order: str = 'qkv-first'

    def __post_init__(self):
        orders = ('qkv-first', 'heads-first')
        if self.kind not in ('consistency', 'edm') or self.attention_order not in orders:
            raise ValueError(
                f'{self.kind!r} is no kind of model, or {self.attention_order!r} no order of attention'
            )

    def heads_over(self, channels: int) -> int:
        """The number of heads in attention over `channels`. Raises: UnknownLayout if it is not whole."""
        heads = self.heads or channels // self.channels_per_head
        if not heads or channels % heads or (self.heads is None and channels % self.channels_per_head):
            what = f'{self.heads} heads' if self.heads else f'heads of {self.channels_per_head} channels'
            raise UnknownLayout(
                f'has attention over {channels} channels, which cannot be split into {what}: '
                'say how it was trained with --channels-per-head or --heads'
            )
        return heads


class UnknownLayout(ValueError):
    """The weights are not those of a UNet that our ADM can express. The message completes 'it ...'."""


def load_openai(
    source: str | os.PathLike,
    kind: str = 'consistency',
    resolution: int | None = None,
    key: str | None = None,
    **untold,
) -> torch.nn.Module:
    """The network of a state dict of OpenAI's consistency_models, as `load_network` would return it. Tensors
    keep their dtypes.

    Args:
        source: path or http(s) URL of the `.pt` file.
        kind, resolution, untold: see `Untold`.
        key: entry of the file with the weights, such as `ema`, if it holds several networks.
    Raises: UserError, naming the source, if the file is damaged, hostile, or of another layout.
    """
    told = Untold(kind, resolution, **untold)
    return _load(source, key, lambda layout: told)


def inspect_openai(source: str | os.PathLike, key: str | None = None) -> tuple[torch.nn.Module, dict]:
    """(the network as far as names and shapes determine it, what was assumed for the rest), for `convert.py
    info`.

    Attention heads have 64 channels, or the largest number below that divides all widths. Arguments and
    errors are those of `load_openai`.
    """

    def fitting(layout: Layout) -> Untold:
        return Untold('edm', channels_per_head=math.gcd(Untold.channels_per_head, *layout.attention_widths))

    net = _load(source, key, fitting)
    net.metadata['objective'] = None
    per_head = net.init_kwargs.get('channels_per_head', Untold.channels_per_head)
    return net, dict(
        resolution=net.img_resolution, channels_per_head=per_head, attention_order=Untold.attention_order
    )


def _load(source, key: str | None, choose: Callable[[Layout], Untold]) -> torch.nn.Module:
    weights = read_state_dict(source, key)
    try:
        layout = infer_layout({name: tuple(tensor.shape) for name, tensor in weights.items()})
        return _convert(weights, layout, choose(layout))
    except UnknownLayout as error:
        raise UserError(f'{os.fspath(source)} cannot be converted: it {error}.') from error


# ----------------------------------------------------------------------------
# The file.


def read_state_dict(source: str | os.PathLike, key: str | None = None) -> dict[str, Tensor]:
    """The named tensors of a UNet in a PyTorch file, on the CPU, without executing anything in it.

    They may be under an entry of the file (`ema`, `model_state_dict`, ...), and their names may have a prefix
    (`module.` of data-parallel training).

    Raises: UserError if there are none or several such sets, the file is damaged, or would take more memory
        than its length.
    """
    contents = _read(source)
    name, entries = os.fspath(source), _entries(contents) if isinstance(contents, dict) else {}

    # Every UNet in the file has its own prefix; `key` selects one.
    firsts = [entry for entry in entries if entry == FIRST_LAYER or entry.endswith(f'.{FIRST_LAYER}')]
    prefixes = [entry.removesuffix(FIRST_LAYER) for entry in firsts]
    if not prefixes:
        raise UserError(
            f"{name} holds no weights of OpenAI's consistency_models: a state dict with a tensor "
            f'{FIRST_LAYER} is expected, '
            f'and there is {_outline(contents)}.'
        )
    chosen = [prefix for prefix in prefixes if key is None or f'{prefix}.'.startswith(f'{key}.')]
    if len(chosen) != 1:
        found = 'several networks' if chosen else f'no network {key!r} but others'
        raise UserError(
            f'{name} holds {found}: {", ".join(prefix.rstrip(".") for prefix in prefixes)}. Say which one '
            'with --key.'
        )

    # Its tensors, without the prefix.
    (prefix,) = chosen
    weights = {
        entry.removeprefix(prefix): value for entry, value in entries.items() if entry.startswith(prefix)
    }
    if odd := [entry for entry, value in weights.items() if not _is_plain(value)]:
        raise UserError(f'{name} is not a state dict: {odd[0]} should be a tensor of floating-point numbers.')
    return weights


def _read(source: str | os.PathLike):
    """The contents of a PyTorch file."""
    path, name = dnnlib.downloads.local_path(source), os.fspath(source)
    # Name files of other kinds before reading this one.
    own = ('a PyTorch file', 'a training state of train.py', 'a pickle', 'a damaged', 'text')
    instead = {
        'a network snapshot': 'Leave out --from=openai.',
        'a safetensors file': 'Say so with --from=safetensors.',
    }
    if kind := another_kind(path, "weights of OpenAI's consistency_models (.pt)", own, instead):
        raise UserError(f"{name} cannot be read as weights of OpenAI's: it {kind}")
    if not zipfile.is_zipfile(path):
        raise UserError(
            f'{name} is not a zip archive, as files of PyTorch 1.6 and newer are. Load and save an older one '
            'with a newer PyTorch; copy or download a damaged one again.'
        )
    try:
        with open(path, 'rb') as file:
            return read_saved(file)
    except MalformedPickle as error:
        raise UserError(
            f'{name} cannot be read as a PyTorch file of tensors: it {error}. Nothing in it was executed.'
        ) from error


def _entries(contents: dict) -> dict[str, object]:
    """{dotted name: value} of nested dicts, up to MAX_ENTRIES entries and MAX_DEPTH levels."""
    found, queue, left = {}, [('', contents, 0)], MAX_ENTRIES
    while queue and left > 0:
        prefix, table, depth = queue.pop()
        left -= 1 + len(table)
        for name, value in table.items():
            if isinstance(value, dict) and isinstance(name, (str, int)) and depth < MAX_DEPTH:
                queue.append((f'{prefix}{name}.', value, depth + 1))
            elif isinstance(name, str):
                found[f'{prefix}{name}'] = value
    return found


def _outline(contents) -> str:
    """A few words on what a file holds instead of a UNet."""
    if not isinstance(contents, dict):
        return f'a {type(contents).__name__}'
    names = [
        name[:100] if isinstance(name, str) else type(name).__name__ for name in itertools.islice(contents, 5)
    ]
    return ', '.join([*names, '...'] if len(contents) > len(names) else names) or 'nothing'


def _is_plain(value) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == 'cpu'
        and not value.is_quantized
        and value.is_floating_point()
    )


# ----------------------------------------------------------------------------
# The architecture, from names and shapes.


@dataclass(frozen=True)
class Layout:
    """What the names and shapes of a UNet's weights determine."""

    img_channels: int
    label_dim: int
    model_channels: int
    channel_mult: list[int]
    num_blocks: int
    attention: list[bool]  # by level, finest first; the middle always has attention
    adaptive_scale: bool

    @property
    def attention_widths(self) -> list[int]:
        """The numbers of channels of layers with attention."""
        there = [*itertools.compress(self.channel_mult, self.attention), self.channel_mult[-1]]
        return sorted({mult * self.model_channels for mult in there})


def infer_layout(shapes: dict[str, tuple[int, ...]]) -> Layout:
    """The UNet that has parameters of these names and shapes. Raises: UnknownLayout."""

    def shape(name: str, dims: int) -> tuple[int, ...]:
        if len(shapes.get(name, ())) != dims or 0 in shapes[name]:
            raise UnknownLayout(
                f"has no {dims}-dimensional {name}, which every UNet of OpenAI's consistency_models has"
            )
        return shapes[name]

    # Levels: the decoder upsamples after each but the last.
    _check_expressible(shapes)
    _, model_channels = shape(FIRST_LAYER, 2)
    _, img_channels, _, _ = shape('input_blocks.0.0.weight', 4)
    count = next(k for k in itertools.count() if f'output_blocks.{k}.0.in_layers.2.weight' not in shapes)
    upsampling = [f'output_blocks.{k}.{last}.in_layers.2.weight' for k in range(count) for last in (1, 2)]
    levels = 1 + sum(name in shapes for name in upsampling)
    if count % levels or not 2 * levels <= count <= 64 * levels or levels > 10:
        raise UnknownLayout(
            f'has {count} blocks in its decoder, of which {levels - 1} upsample: '
            "no UNet of OpenAI's consistency_models has that"
        )

    # Widths, by the first block of each level in the encoder.
    # A level has num_blocks + 1 input blocks, as many as output blocks.
    firsts = [1 + level * (count // levels) for level in range(levels)]
    widths = [shape(f'input_blocks.{first}.0.in_layers.2.weight', 4)[0] for first in firsts]
    if model_channels % 2 or any(width % model_channels or width % NUM_GROUPS for width in widths):
        raise UnknownLayout(
            f'has levels of {", ".join(map(str, widths))} channels, which are not multiples of {NUM_GROUPS} '
            'and of the '
            f"time embedding's {model_channels}, an even number: our ADM has no other widths"
        )

    # Inputs and outputs.
    if (outputs := shape('out.2.weight', 4)[0]) == 2 * img_channels:
        raise UnknownLayout(
            f'has {outputs} output channels for {img_channels} input channels: it predicts a variance too '
            '(learn_sigma), as diffusion models with a discrete schedule do, not EDM nor consistency models'
        )
    modulation = shape('input_blocks.1.0.emb_layers.1.weight', 2)[0]
    label_dim = shape('label_emb.weight', 2)[0] if 'label_emb.weight' in shapes else 0
    return Layout(
        img_channels,
        label_dim,
        model_channels,
        [width // model_channels for width in widths],
        count // levels - 1,
        [f'input_blocks.{first}.1.qkv.weight' in shapes for first in firsts],
        adaptive_scale=modulation == 2 * widths[0],
    )


def _check_expressible(shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises: UnknownLayout for levels that are joined by anything but residual blocks."""
    theirs, ours = 'resamples {}', '; our ADM has residual blocks there (resblock_updown=True)'
    if convolutions := [name for name in shapes if name.endswith(('.op.weight', '.conv.weight'))]:
        raise UnknownLayout(theirs.format(f'by a convolution ({convolutions[0]})') + ours)
    # Pooling has no weights, which leaves a gap in the numbers of the input blocks.
    found = {
        int(parts[1])
        for parts in (name.split('.') for name in shapes)
        if parts[0] == 'input_blocks' and parts[1].isdecimal()
    }
    if gaps := sorted(set(range(max(found, default=0))) - found):
        raise UnknownLayout(theirs.format(f'by pooling (input_blocks.{gaps[0]} has no weights)') + ours)


def parameter_names(model: networks.DhariwalUNet) -> dict[str, str]:
    """{our parameter's name: OpenAI's}, for every parameter of an ADM."""
    modules = {
        'map_layer0': 'time_embed.0',
        'map_layer1': 'time_embed.2',
        'out_norm': 'out.0',
        'out_conv': 'out.2',
    }

    # Encoder: one input block for each of our layers.
    for index, name in enumerate(model.enc):
        modules.update(_block_names(f'enc.{name}', f'input_blocks.{index}', 0, model.enc[name]))

    # Decoder: output blocks, of which a layer may be a part.
    outputs, parts = -1, 0
    for name, block in model.dec.items():
        # The middle is block, attention, block.
        if name.endswith(('_in0', '_in1')):
            part = 0 if name.endswith('_in0') else 2
            modules.update(_block_names(f'dec.{name}', 'middle_block', part, block))
            continue

        # An upsampling block is the last part of the output block before it.
        if not name.endswith('_up'):
            outputs, parts = outputs + 1, 0
        modules.update(_block_names(f'dec.{name}', f'output_blocks.{outputs}', parts, block))
        parts += 2 if block.num_heads else 1

    # From modules to parameters.
    leaves = ('weight', 'bias')
    names = {f'{ours}.{leaf}': f'{theirs}.{leaf}' for ours, theirs in modules.items() for leaf in leaves}
    return names | ({'map_label.weight': 'label_emb.weight'} if model.map_label is not None else {})


def _block_names(ours: str, theirs: str, part: int, block: torch.nn.Module) -> dict[str, str]:
    """Module names of one residual block, which is part number `part` of `theirs`; its attention is the part
    after it."""
    if not isinstance(block, networks.UNetBlock):
        return {ours: f'{theirs}.{part}'}
    # Main path, and the skip connection where there is one.
    names = dict(
        norm0='in_layers.0',
        conv0='in_layers.2',
        affine='emb_layers.1',
        norm1='out_layers.0',
        conv1='out_layers.3',
    )
    if block.skip is not None and block.skip.weight is not None:
        names['skip'] = 'skip_connection'
    modules = {f'{ours}.{name}': f'{theirs}.{part}.{other}' for name, other in names.items()}
    if block.num_heads:
        modules |= {
            f'{ours}.{name}': f'{theirs}.{part + 1}.{other}'
            for name, other in dict(norm2='norm', qkv='qkv', proj='proj_out').items()
        }
    return modules


# ----------------------------------------------------------------------------
# The network.


def _convert(weights: dict[str, Tensor], layout: Layout, untold: Untold) -> torch.nn.Module:
    net = build_network(layout, untold)

    # The names must be all there are.
    names = parameter_names(net.model)
    for what, found in (
        ('lacks', set(names.values()) - weights.keys()),
        ('has unexpected', weights.keys() - set(names.values())),
    ):
        if found:
            raise UnknownLayout(
                f'{what} tensors: {", ".join(sorted(found)[:5])}{", ..." if len(found) > 5 else ""}'
            )

    # The shapes must be ours, once reordered.
    state = dict(net.named_buffers()) | {
        f'model.{ours}': to_our_order(ours, weights[theirs], untold) for ours, theirs in names.items()
    }
    for name, tensor in net.named_parameters():
        if state[name].shape != tensor.shape:
            raise UnknownLayout(
                f'has {names[name.removeprefix("model.")]} in the place of our {name}, with shape '
                f'{list(state[name].shape)} instead of {list(tensor.shape)}'
            )
    # Assigned, not copied: our parameters had no memory so far.
    net.load_state_dict(state, assign=True)
    net.metadata = _metadata(untold.kind)
    return net.eval().requires_grad_(False)


def build_network(layout: Layout, untold: Untold) -> networks.CMPrecond:
    """Our network of a layout; its parameters have shapes but no memory. Raises: UnknownLayout for a
    resolution or heads that do not fit it."""
    # The resolution, and heads that divide all widths.
    levels = len(layout.channel_mult)
    resolution = untold.resolution or COARSEST << (levels - 1)
    if resolution % (1 << (levels - 1)):
        raise UnknownLayout(f'has {levels} levels, which do not fit images of {resolution}x{resolution}')
    for width in layout.attention_widths:
        untold.heads_over(width)

    # Arguments that are not our defaults.
    heads = dict(num_heads=untold.heads) if untold.heads else {}
    if untold.channels_per_head != Untold.channels_per_head:
        heads['channels_per_head'] = untold.channels_per_head
    span = (
        dict(sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, boundary=SIGMA_MIN)
        if untold.kind == 'consistency'
        else {}
    )
    attn_resolutions = [resolution >> level for level, attention in enumerate(layout.attention) if attention]
    return checkpoint.build_unfilled(
        networks.CMPrecond.__name__,
        (),
        dict(
            img_resolution=resolution,
            img_channels=layout.img_channels,
            label_dim=layout.label_dim,
            **span,
            model_channels=layout.model_channels,
            channel_mult=layout.channel_mult,
            num_blocks=layout.num_blocks,
            attn_resolutions=attn_resolutions,
            dropout=0,
            adaptive_scale=layout.adaptive_scale,
            min_channels_per_group=1,
            **heads,
        ),
    )


def to_our_order(name: str, tensor: Tensor, untold: Untold) -> Tensor:
    """A tensor of OpenAI's, for our parameter `name`."""
    if name.endswith(('.qkv.weight', '.qkv.bias')) and tensor.shape[0] % 3 == 0:
        heads = untold.heads_over(tensor.shape[0] // 3)
        # head, (q, k, v), feature or (q, k, v), head, feature -> head, feature, (q, k, v).
        if untold.attention_order == 'heads-first':
            return tensor.unflatten(0, (heads, 3, -1)).movedim(1, 2).flatten(0, 2)
        return tensor.unflatten(0, (3, heads, -1)).movedim(0, 2).flatten(0, 2)
    return tensor.mT.contiguous() if name == 'map_label.weight' else tensor


def _metadata(kind: str) -> dict:
    # A consistency model is sampled in one step, from sigma_max to 0, or in several stochastic ones.
    if kind == 'edm':
        return dict(objective='diffusion', source='openai')
    return dict(
        objective='cm',
        source='openai',
        solver='cm',
        S=1,
        sigma_min=SIGMA_MIN,
        sigma_max=SIGMA_MAX,
        rho=RHO,
        student_grid='edm',
        sigmas=[SIGMA_MAX, 0.0],
    )
