"""OpenAI's UNet in two functions, as an oracle: the shapes of its parameters, and what it computes from a state dict.

Written from the architecture (Dhariwal & Nichol 2021; Song et al. 2023), names as in the published files; it shares nothing with our networks.
"""

import math

import torch
import torch.nn.functional as F


def unet_shapes(
    model_channels,
    channel_mult,
    num_res_blocks,
    attention_levels,
    scale_shift,
    num_classes=0,
    image_channels=3,
):
    """{name: shape} of every parameter."""
    emb, shapes = 4 * model_channels, {}

    def layer(name, *shape):
        shapes[f'{name}.weight'], shapes[f'{name}.bias'] = shape, shape[:1]

    def resblock(name, cin, cout):
        layer(f'{name}.in_layers.0', cin)
        layer(f'{name}.in_layers.2', cout, cin, 3, 3)
        layer(f'{name}.emb_layers.1', cout * (2 if scale_shift else 1), emb)
        layer(f'{name}.out_layers.0', cout)
        layer(f'{name}.out_layers.3', cout, cout, 3, 3)
        if cin != cout:
            layer(f'{name}.skip_connection', cout, cin, 1, 1)

    def attention(name, width):
        layer(f'{name}.norm', width)
        layer(f'{name}.qkv', 3 * width, width, 1, 1)
        layer(f'{name}.proj_out', width, width, 1, 1)

    layer('time_embed.0', emb, model_channels)
    layer('time_embed.2', emb, emb)
    if num_classes:
        shapes['label_emb.weight'] = (num_classes, emb)
    width = channel_mult[0] * model_channels
    layer('input_blocks.0.0', width, image_channels, 3, 3)
    skips, i = [width], 1
    for level, mult in enumerate(channel_mult):
        if level:
            resblock(f'input_blocks.{i}.0', width, width)
            skips.append(width)
            i += 1
        for _ in range(num_res_blocks):
            resblock(f'input_blocks.{i}.0', width, mult * model_channels)
            width = mult * model_channels
            if level in attention_levels:
                attention(f'input_blocks.{i}.1', width)
            skips.append(width)
            i += 1
    resblock('middle_block.0', width, width)
    attention('middle_block.1', width)
    resblock('middle_block.2', width, width)
    i = 0
    for level in reversed(range(len(channel_mult))):
        for k in range(num_res_blocks + 1):
            resblock(f'output_blocks.{i}.0', width + skips.pop(), channel_mult[level] * model_channels)
            width = channel_mult[level] * model_channels
            if level in attention_levels:
                attention(f'output_blocks.{i}.1', width)
            if level and k == num_res_blocks:
                resblock(f'output_blocks.{i}.{1 + (level in attention_levels)}', width, width)
            i += 1
    layer('out.0', width)
    layer('out.2', image_channels, width, 3, 3)
    return shapes


def random_weights(shapes, seed=0):
    """A state dict of these shapes under which every layer matters."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        scale = math.sqrt(1 / math.prod(shape[1:])) if len(shape) > 1 else 0.2
        weights[name] = torch.randn(shape, generator=generator) * scale + (
            1.0 if len(shape) == 1 and name.endswith('weight') else 0.0
        )
    return weights


def unet(weights, num_res_blocks, x, timesteps, labels=None, head_channels=64, heads=None, heads_first=False):
    """The network's raw output for `x` [N, C, H, W] at `timesteps` [N], with integer `labels` [N].

    `heads`: their number at every level, instead of their `head_channels`. `heads_first`: QKVAttentionLegacy's order of channels.
    """

    def affine(name, h, function=F.linear, **kwargs):
        return function(h, weights[f'{name}.weight'], weights[f'{name}.bias'], **kwargs)

    def norm(name, h):
        return F.group_norm(h, 32, weights[f'{name}.weight'], weights[f'{name}.bias'])

    def resblock(name, h, resample):
        skip = resample(h)
        h = affine(
            f'{name}.in_layers.2', resample(F.silu(norm(f'{name}.in_layers.0', h))), F.conv2d, padding=1
        )
        modulation = affine(f'{name}.emb_layers.1', F.silu(emb))[:, :, None, None]
        if modulation.shape[1] == 2 * h.shape[1]:
            scale, shift = modulation.chunk(2, dim=1)
            h = norm(f'{name}.out_layers.0', h) * (1 + scale) + shift
        else:
            h = norm(f'{name}.out_layers.0', h + modulation)
        if f'{name}.skip_connection.weight' in weights:
            skip = affine(f'{name}.skip_connection', skip, F.conv2d)
        return skip + affine(f'{name}.out_layers.3', F.silu(h), F.conv2d, padding=1)

    def attention(name, h):
        n, c, height, width = h.shape
        count = heads or c // head_channels
        order, parts = ((count, 3), 2) if heads_first else ((3, count), 1)
        q, k, v = (
            affine(f'{name}.qkv', norm(f'{name}.norm', h), F.conv2d)
            .reshape(n, *order, c // count, -1)
            .unbind(parts)
        )
        scores = torch.einsum('nhdi,nhdj->nhij', q, k) / math.sqrt(c // count)
        out = torch.einsum('nhij,nhdj->nhdi', scores.softmax(dim=-1), v).reshape(n, c, height, width)
        return h + affine(f'{name}.proj_out', out, F.conv2d)

    def sequence(name, h, resamplings):
        part = 0
        while any(key.startswith(f'{name}.{part}.') for key in weights):
            if f'{name}.{part}.qkv.weight' in weights:
                h = attention(f'{name}.{part}', h)
            elif f'{name}.{part}.weight' in weights:
                h = affine(f'{name}.{part}', h, F.conv2d, padding=1)
            else:
                h = resblock(f'{name}.{part}', h, resamplings.get(part, lambda h: h))
            part += 1
        return h

    def parts(name):
        return [key for key in weights if key.startswith(f'{name}.') and key.endswith('.in_layers.0.weight')]

    half = weights['time_embed.0.weight'].shape[1] // 2
    angles = timesteps[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
    emb = affine(
        'time_embed.2', F.silu(affine('time_embed.0', torch.cat([angles.cos(), angles.sin()], dim=1)))
    )
    if labels is not None:
        emb = emb + weights['label_emb.weight'][labels]
    blocks = len({key.split('.')[1] for key in weights if key.startswith('input_blocks.')})
    skips = []
    for i in range(blocks):
        down = {0: lambda h: F.avg_pool2d(h, 2)} if i and i % (num_res_blocks + 1) == 0 else {}
        x = sequence(f'input_blocks.{i}', x, down)
        skips.append(x)
    x = sequence('middle_block', x, {})
    for i in range(blocks):
        last = 1 + (f'output_blocks.{i}.1.qkv.weight' in weights)
        up = (
            {last: lambda h: h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)}
            if len(parts(f'output_blocks.{i}')) == 2
            else {}
        )
        x = sequence(f'output_blocks.{i}', torch.cat([x, skips.pop()], dim=1), up)
    return affine('out.2', F.silu(norm('out.0', x)), F.conv2d, padding=1)
