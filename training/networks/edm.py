"""Denoisers D(x; sigma): the ADM, DDPM++ and NCSN++ U-Nets under EDM, CM, VP, VE and iDDPM preconditioning.

Constructor arguments and parameter names are those of EDM's published snapshots, so that their weights load.
A snapshot carries this file's source, so it imports nothing but torch and `torch_utils.persistence`.

Shapes: images [N, C, H, W], noise levels [N] or a scalar, one-hot class labels [N, label_dim], augmentation
labels [N, augment_dim].
"""

import math

import torch
import torch.nn.functional as F
from torch.nn import Module, ModuleDict, Parameter
from torch.utils.checkpoint import checkpoint

from torch_utils.persistence import persistent_class as persistent

# ----------------------------------------------------------------------------
# Layers.


def init_tensor(shape, mode, fan_in, fan_out):
    """Random tensor of the given shape; `mode` is (xavier|kaiming)_(uniform|normal).

    Its variance is 2 / (fan_in + fan_out) for xavier (Glorot & Bengio 2010) and 1 / fan_in for kaiming (He et
    al. 2015, for a gain of one).
    """
    family, _, law = mode.partition('_')
    variance = {'xavier': 2 / (fan_in + fan_out), 'kaiming': 1 / fan_in}[family]
    if law == 'uniform':
        # The variance of a uniform law on [−a, a] is a² / 3.
        return torch.empty(shape).uniform_(-1, 1) * math.sqrt(3 * variance)
    return torch.empty(shape).normal_() * math.sqrt(variance)


@persistent
class Linear(Module):
    """Affine map with an explicit initialization."""

    def __init__(
        self, in_features, out_features, bias=True, init_mode='kaiming_normal', init_weight=1, init_bias=0
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        fans = dict(mode=init_mode, fan_in=in_features, fan_out=out_features)
        self.weight = Parameter(init_tensor([out_features, in_features], **fans) * init_weight)
        self.bias = Parameter(init_tensor([out_features], **fans) * init_bias) if bias else None

    def forward(self, x):
        # Weights follow the activations' type: they are stored in FP32 and used in FP16 or BF16.
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


@persistent
class Conv2d(Module):
    """Convolution with optional 2x up- or downsampling through a separable filter; `kernel=0` resamples only.

    `fused_resample` filters and convolves without padding in between (NCSN++'s residual encoder).
    """

    def __init__(
        self, in_channels, out_channels, kernel, bias=True, up=False, down=False, resample_filter=(1, 1),
        fused_resample=False, init_mode='kaiming_normal', init_weight=1, init_bias=0
    ):  # fmt: skip
        super().__init__()
        if up and down:
            raise ValueError('a convolution resamples up or down, not both')
        self.in_channels, self.out_channels = in_channels, out_channels
        self.up, self.down, self.fused_resample = up, down, fused_resample
        fans = dict(mode=init_mode, fan_in=in_channels * kernel**2, fan_out=out_channels * kernel**2)
        shape = [out_channels, in_channels, kernel, kernel]
        self.weight = Parameter(init_tensor(shape, **fans) * init_weight) if kernel else None
        self.bias = Parameter(init_tensor([out_channels], **fans) * init_bias) if kernel and bias else None

        # The separable filter as a [1, 1, K, K] kernel that sums to one.
        taps = torch.as_tensor(resample_filter, dtype=torch.float32)
        taps = torch.outer(taps, taps) / taps.sum() ** 2
        self.register_buffer('resample_filter', taps[None, None] if up or down else None)

    def _resample(self, x, channels, padding):
        # Upsampling puts three zeros beside every value, so the filter's sum must be 4.
        taps = self.resample_filter.to(x.dtype)
        taps, convolve = (taps * 4, F.conv_transpose2d) if self.up else (taps, F.conv2d)
        return convolve(x, taps.expand(channels, 1, -1, -1), stride=2, padding=padding, groups=channels)

    def forward(self, x):
        weight = None if self.weight is None else self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        # Padding that keeps the size: half the kernel, and half the filter.
        w_pad = 0 if weight is None else weight.shape[-1] // 2
        f_pad = 0 if self.resample_filter is None else (self.resample_filter.shape[-1] - 1) // 2

        # Fused: the padding of both operations at once, in the first one if possible.
        if self.fused_resample and weight is not None and self.up:
            x = self._resample(x, self.in_channels, padding=max(f_pad - w_pad, 0))
            return F.conv2d(x, weight, bias, padding=max(w_pad - f_pad, 0))
        if self.fused_resample and weight is not None and self.down:
            x = self._resample(F.conv2d(x, weight, padding=w_pad + f_pad), self.out_channels, padding=0)
            return x if bias is None else x + bias.reshape(1, -1, 1, 1)

        # One after the other.
        if self.resample_filter is not None:
            x = self._resample(x, self.in_channels, padding=f_pad)
        return x if weight is None else F.conv2d(x, weight, bias, padding=w_pad)


@persistent
class GroupNorm(Module):
    """Group normalization (Wu & He 2018) with at least `min_channels_per_group` channels per group."""

    def __init__(self, num_channels, num_groups=32, min_channels_per_group=4, eps=1e-5):
        super().__init__()
        # Narrow layers have fewer groups rather than groups of too few channels.
        self.eps, self.num_groups = eps, min(num_channels // min_channels_per_group, num_groups)
        self.weight, self.bias = Parameter(torch.ones(num_channels)), Parameter(torch.zeros(num_channels))

    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.group_norm(x, self.num_groups, weight, bias, self.eps)


@persistent
class PositionalEmbedding(Module):
    """Sinusoidal embedding of a scalar: [N] -> [N, num_channels], cosines first (Vaswani et al. 2017)."""

    def __init__(self, num_channels, max_positions=10000, endpoint=False):
        super().__init__()
        self.num_channels, self.max_positions, self.endpoint = num_channels, max_positions, endpoint

    def forward(self, x):
        half = self.num_channels // 2
        exponents = torch.arange(half, dtype=torch.float32, device=x.device) / -(half - int(self.endpoint))
        # [N, num_channels / 2]
        angles = torch.outer(x, (self.max_positions**exponents).to(x.dtype))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


@persistent
class FourierEmbedding(Module):
    """Random Fourier features of a scalar: [N] -> [N, num_channels] (Tancik et al. 2020)."""

    def __init__(self, num_channels, scale=16):
        super().__init__()
        frequencies = torch.empty(num_channels // 2).normal_(std=scale)
        self.register_buffer('freqs', frequencies)

    def forward(self, x):
        # The product with 2 pi is in the precision of the frequencies, as in EDM.
        angles = torch.outer(x, (self.freqs * (2 * math.pi)).to(x.dtype))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


@persistent
class EndEmbedding(Module):
    """Embedding of the level at which a step of a two-time network ends, [N] -> [N, emb_channels]; zero at first, so
    that the network starts as the denoiser that it is made from."""

    def __init__(self, num_channels, emb_channels, **init):
        super().__init__()
        self.positions = PositionalEmbedding(num_channels)
        self.layer0 = Linear(num_channels, emb_channels, **init)
        self.layer1 = Linear(emb_channels, emb_channels, **dict(init, init_weight=0, init_bias=0))

    def forward(self, x):
        return self.layer1(F.silu(self.layer0(self.positions(x))))


def keep_mask(shape, probability, device, generator=None):
    """[*shape] bool, true with a probability in (0, 1), rounded to steps of 2^-16."""
    # One int64 gives four values, because CPUs draw slowly.
    count = math.prod(shape)
    drawn = torch.empty(-(-count // 4), dtype=torch.int64, device=device)
    drawn.random_(-(2**63), None, generator=generator)
    values = drawn.view(torch.int16)[:count].reshape(shape)
    # The threshold of a signed 16-bit number, itself within that range.
    return values < min(round(probability * 2**16), 2**16 - 1) - 2**15


@persistent
class UNetBlock(Module):
    """Residual block with noise-level modulation, optional 2x resampling and self-attention.

    Attention has `num_heads` heads, or one for every `channels_per_head` channels; with fewer channels there
    is no attention. `dropout` acts before the second convolution.
    """

    def __init__(
        self, in_channels, out_channels, emb_channels, up=False, down=False, attention=False,
        num_heads=None, channels_per_head=64, dropout=0, skip_scale=1, eps=1e-5, resample_filter=(1, 1),
        resample_proj=False, adaptive_scale=True, init=None, init_zero=None, init_attn=None,
        min_channels_per_group=4
    ):  # fmt: skip
        super().__init__()
        init, init_zero = init or {}, init_zero or dict(init_weight=0)

        # The number of heads: none, as given, or by the width.
        if not attention:
            num_heads = 0
        elif num_heads is None:
            num_heads = out_channels // channels_per_head
        self.in_channels, self.out_channels = in_channels, out_channels
        self.emb_channels, self.num_heads = emb_channels, num_heads
        self.dropout, self.skip_scale, self.adaptive_scale = dropout, skip_scale, adaptive_scale

        # Main path.
        resample = dict(up=up, down=down, resample_filter=resample_filter)
        norm = dict(min_channels_per_group=min_channels_per_group, eps=eps)
        self.norm0 = GroupNorm(num_channels=in_channels, **norm)
        self.conv0 = Conv2d(in_channels, out_channels, kernel=3, **resample, **init)
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1), **init)
        self.norm1 = GroupNorm(num_channels=out_channels, **norm)
        self.conv1 = Conv2d(out_channels, out_channels, kernel=3, **init_zero)

        # Skip connection, where the shape changes, and attention.
        self.skip = None
        if in_channels != out_channels or up or down:
            project = resample_proj or in_channels != out_channels
            self.skip = Conv2d(in_channels, out_channels, kernel=int(project), **resample, **init)
        if num_heads:
            self.norm2 = GroupNorm(num_channels=out_channels, **norm)
            self.qkv = Conv2d(out_channels, out_channels * 3, kernel=1, **(init_attn or init))
            self.proj = Conv2d(out_channels, out_channels, kernel=1, **init_zero)

    def _scaled(self, x):
        # To keep the variance of a sum; without a scale there is no kernel to launch.
        return x if self.skip_scale == 1 else x * self.skip_scale

    def _dropout(self, x, mask):
        if mask is not None:
            return x * (mask.to(x.dtype) / (1 - self.dropout))
        return F.dropout(x, self.dropout, self.training)

    def _attention(self, x):
        n, c, h, w = x.shape
        # Channels are ordered head, feature, (q, k, v). Fused kernels need features contiguous in memory.
        # [N, heads, features, 3, H·W]
        qkv = self.qkv(self.norm2(x)).reshape(n, self.num_heads, c // self.num_heads, 3, h * w)
        q, k, v = qkv.permute(3, 0, 4, 1, 2).contiguous().transpose(2, 3)
        # [N, heads, H·W, features], in memory as q, so that [N, H, W, C] is a view.
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, h, w, c)
        return self.proj(out.permute(0, 3, 1, 2))

    def forward(self, x, emb, mask=None):
        """Block output for `x` [N, in_channels, H, W] and embedding `emb` [N, emb_channels]; `mask` [N,
        out_channels, H, W] is true where dropout keeps a value; None draws one in training mode."""
        # Main path: the embedding scales and shifts after the second norm, or only shifts before it.
        h = self.conv0(F.silu(self.norm0(x)))
        modulation = self.affine(emb).to(h.dtype)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = modulation.chunk(2, dim=1)
            # shift + norm(h) · (scale + 1) in one kernel.
            h = torch.addcmul(shift, self.norm1(h), scale + 1)
        else:
            h = self.norm1(h + modulation)
        h = self.conv1(self._dropout(F.silu(h), mask))

        # Residual sums.
        x = self._scaled(h + (x if self.skip is None else self.skip(x)))
        return self._scaled(x + self._attention(x)) if self.num_heads else x


# ----------------------------------------------------------------------------
# U-Nets.


class UNet(Module):
    """What both U-Nets share: their levels, dropout per resolution, and how a block runs. Modules are named
    `<res>x<res>_<what>`.

    `checkpoint_activations` trades time for memory: the backward pass recomputes what is inside a block.
    """

    checkpoint_activations = False

    def _levels(self):
        """(level, name prefix, channel multiplier, attention here) from the finest level to the coarsest.
        Raises: ValueError if there is no level."""
        if not self.channel_mult:
            raise ValueError('channel_mult is empty: a U-Net has one level at least')
        for level, mult in enumerate(self.channel_mult):
            # Levels halve the resolution.
            res = self.img_resolution >> level
            yield level, f'{res}x{res}', mult, res in self.attn_resolutions

    def _block(self, prefix, in_channels, out_channels, **kwargs):
        """A UNetBlock at the resolution in `prefix`, with dropout only if it is one of `dout_resolutions`."""
        dropped = self.dout_resolutions is None or int(prefix.partition('x')[0]) in self.dout_resolutions
        kwargs |= dict(self.block_kwargs, dropout=self.dropout if dropped else 0)
        return UNetBlock(in_channels, out_channels, **kwargs)

    def _encode_level(self, prefix, width, out_width, num_blocks, attention, skips):
        """Adds the encoder's residual blocks of a level, and the widths of their outputs to `skips`; returns
        the last width."""
        for i in range(num_blocks):
            self.enc[f'{prefix}_block{i}'] = self._block(prefix, width, out_width, attention=attention)
            width = out_width
            skips.append(width)
        return width

    def _decode_level(self, prefix, width, out_width, attention, skips):
        """Adds the decoder's blocks of a level; each takes one of the encoder's `skips`, and `attention[i]`
        says whether block i has attention. Returns the last width."""
        # Two blocks at the coarsest level, which is the first; upsampling at the others.
        if not self.dec:
            # Attention at the coarsest level, whatever attn_resolutions says.
            self.dec[f'{prefix}_in0'] = self._block(prefix, width, width, attention=True)
            self.dec[f'{prefix}_in1'] = self._block(prefix, width, width)
        else:
            self.dec[f'{prefix}_up'] = self._block(prefix, width, width, up=True)

        for i, here in enumerate(attention):
            # Skips are a stack: the decoder meets the encoder's outputs in reverse.
            in_width, width = width + skips.pop(), out_width
            self.dec[f'{prefix}_block{i}'] = self._block(prefix, in_width, out_width, attention=here)
        return width

    def _run(self, block, x, emb, mask):
        """Output of a layer of the main path: `block(x, emb, mask)` for a residual block, else `block(x)`."""
        if not isinstance(block, UNetBlock):
            return block(x)
        if self.checkpoint_activations and torch.is_grad_enabled():
            # Recomputing must draw the same masks, so the generator's state is kept where there are draws.
            draws = mask is None and block.dropout > 0
            return checkpoint(block, x, emb, mask, use_reentrant=False, preserve_rng_state=draws)
        return block(x, emb, mask)

    def _label_embedding(self, class_labels):
        """Embedding of labels [N, label_dim], each dropped with probability `label_dropout` in training."""
        if self.training and self.label_dropout:
            # A dropped label is a row of zeros, the label of unconditional sampling.
            keep = torch.rand([class_labels.shape[0], 1], device=class_labels.device) >= self.label_dropout
            class_labels = class_labels * keep.to(class_labels.dtype)
        return self.map_label(class_labels if self.label_gain == 1 else class_labels * self.label_gain)

    def _modulation(self, emb, end_labels):
        """What blocks see of the embedding, with that of the step's end in two-time networks."""
        return F.silu(emb if self.map_end is None else emb + self.map_end(end_labels))

    def dropout_masks(self, batch_size, generator=None):
        """Masks for one pass: {block name: [N, C, H, W] bool, true where kept}, empty without dropout.

        Two passes with the same masks have the same dropout bit for bit, whatever the precision or compiler.
        """
        if not self.dropout:
            return {}
        device, masks = next(self.parameters()).device, {}
        for part in ('enc', 'dec'):
            for name, block in getattr(self, part).items():
                if getattr(block, 'dropout', 0):
                    res = int(name.partition('x')[0])
                    # At the block's output resolution, where dropout acts.
                    shape = [batch_size, block.out_channels, res, res]
                    masks[f'{part}.{name}'] = keep_mask(shape, 1 - block.dropout, device, generator)
        return masks


@persistent
class SongUNet(UNet):
    """DDPM++ and NCSN++ (Song et al. 2021), as in EDM (Karras et al. 2022, Table 7).

    DDPM++: positional embedding, standard encoder. NCSN++: Fourier embedding, residual encoder, [1,3,3,1]
    filter, channel_mult_noise 2. `dout_resolutions` restricts dropout to those resolutions (None:
    everywhere).
    """

    def __init__(
        self, img_resolution, in_channels, out_channels, label_dim=0, augment_dim=0, model_channels=128,
        channel_mult=(1, 2, 2, 2), channel_mult_emb=4, num_blocks=4, attn_resolutions=(16,), dropout=0.10,
        label_dropout=0, embedding_type='positional', channel_mult_noise=1, encoder_type='standard',
        decoder_type='standard', resample_filter=(1, 1), dout_resolutions=None, two_time=False
    ):  # fmt: skip
        super().__init__()
        for value, known in (
            (embedding_type, ('positional', 'fourier')),
            (encoder_type, ('standard', 'skip', 'residual')),
            (decoder_type, ('standard', 'skip')),
        ):
            if value not in known:
                raise ValueError(f'{value!r} is not one of {", ".join(known)}')
        self.img_resolution, self.channel_mult = img_resolution, channel_mult
        self.attn_resolutions, self.label_dropout = attn_resolutions, label_dropout
        self.dropout, self.dout_resolutions = dropout, dout_resolutions
        emb_channels, noise_channels = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        # EDM's initialization for this family: last layers near zero, attention at a fifth of the variance.
        init = dict(init_mode='xavier_uniform')
        init_zero, init_attn = dict(init, init_weight=1e-5), dict(init, init_weight=math.sqrt(0.2))
        self.block_kwargs = dict(
            emb_channels=emb_channels, num_heads=1, skip_scale=math.sqrt(0.5), eps=1e-6,
            resample_filter=resample_filter, resample_proj=True, adaptive_scale=False,
            init=init, init_zero=init_zero, init_attn=init_attn,
        )  # fmt: skip

        # Embedding of noise level, class and augmentation.
        positional = PositionalEmbedding(noise_channels, endpoint=True)
        self.map_noise = FourierEmbedding(noise_channels) if embedding_type == 'fourier' else positional
        self.label_gain = math.sqrt(label_dim or 0)
        self.map_label = Linear(label_dim, noise_channels, **init) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False, **init) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels, **init)
        self.map_layer1 = Linear(emb_channels, emb_channels, **init)

        # Encoder, with the auxiliary path that `forward` follows by the names of its layers.
        filtered = dict(resample_filter=resample_filter)
        self.enc = ModuleDict()
        width = aux_width = in_channels
        skips = []
        for level, at, mult, attention in self._levels():
            if level == 0:
                self.enc[f'{at}_conv'] = Conv2d(width, model_channels, kernel=3, **init)
                width = model_channels
            else:
                self.enc[f'{at}_down'] = self._block(at, width, width, down=True)
                if encoder_type == 'skip':
                    self.enc[f'{at}_aux_down'] = Conv2d(aux_width, aux_width, kernel=0, down=True, **filtered)
                    self.enc[f'{at}_aux_skip'] = Conv2d(aux_width, width, kernel=1, **init)
                if encoder_type == 'residual':
                    fused = dict(down=True, fused_resample=True, **filtered, **init)
                    self.enc[f'{at}_aux_residual'] = Conv2d(aux_width, width, kernel=3, **fused)
                    aux_width = width
            skips.append(width)
            width = self._encode_level(at, width, model_channels * mult, num_blocks, attention, skips)

        # Decoder. Attention ends each level that has any. Output layers stand at the finest level, or
        # (`skip`) at every level, and their images are summed.
        self.dec = ModuleDict()
        for level, at, mult, attention in reversed(list(self._levels())):
            coarsest, last = not self.dec, [False] * num_blocks + [attention]
            width = self._decode_level(at, width, model_channels * mult, last, skips)
            if decoder_type == 'skip' and not coarsest:
                self.dec[f'{at}_aux_up'] = Conv2d(out_channels, out_channels, kernel=0, up=True, **filtered)
            if decoder_type == 'skip' or level == 0:
                self.dec[f'{at}_aux_norm'] = GroupNorm(num_channels=width, eps=1e-6)
                self.dec[f'{at}_aux_conv'] = Conv2d(width, out_channels, kernel=3, **init_zero)
        self.map_end = EndEmbedding(noise_channels, emb_channels, **init) if two_time else None

    def _embed(self, noise_labels, class_labels, augment_labels, end_labels):
        emb = self.map_noise(noise_labels)
        emb = emb.unflatten(1, (2, -1)).flip(1).flatten(1)  # sines first, the order of the published weights
        if self.map_label is not None:
            emb = emb + self._label_embedding(class_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return self._modulation(self.map_layer1(F.silu(self.map_layer0(emb))), end_labels)

    def forward(
        self, x, noise_labels, class_labels, augment_labels=None, dropout_masks=None, end_labels=None
    ):  # fmt: skip
        masks = dropout_masks or {}
        emb = self._embed(noise_labels, class_labels, augment_labels, end_labels)

        # Encoder. `aux` is the image at lower resolutions (`skip`), or the residual path.
        skips, aux = [], x
        for name, block in self.enc.items():
            if name.endswith('aux_down'):
                aux = block(aux)
            elif name.endswith('aux_skip'):
                x = skips[-1] = x + block(aux)
            elif name.endswith('aux_residual'):
                x = skips[-1] = aux = (x + block(aux)) * math.sqrt(0.5)
            else:
                x = self._run(block, x, emb, masks.get(f'enc.{name}'))
                skips.append(x)

        # Decoder.
        image = None
        for name, block in self.dec.items():
            if name.endswith('aux_up'):
                image = block(image)
            elif name.endswith('aux_norm'):
                normed = block(x)
            elif name.endswith('aux_conv'):
                update = block(F.silu(normed))
                image = update if image is None else image + update
            else:
                if '_block' in name:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = self._run(block, x, emb, masks.get(f'dec.{name}'))
        return image


@persistent
class DhariwalUNet(UNet):
    """ADM (Dhariwal & Nichol 2021), as in EDM (Karras et al. 2022, Table 7). `dout_resolutions`: see
    `SongUNet`.

    Some networks of Song et al. 2023 differ: the embedding only shifts (`adaptive_scale` False), norms have
    32 groups whatever their width (`min_channels_per_group` 1), attention has heads of another size
    (`channels_per_head`) or the same number everywhere (`num_heads`).
    """

    def __init__(
        self, img_resolution, in_channels, out_channels, label_dim=0, augment_dim=0, model_channels=192,
        channel_mult=(1, 2, 3, 4), channel_mult_emb=4, num_blocks=3, attn_resolutions=(32, 16, 8),
        dropout=0.10, label_dropout=0, dout_resolutions=None, adaptive_scale=True, min_channels_per_group=4,
        channels_per_head=64, num_heads=None, two_time=False
    ):  # fmt: skip
        super().__init__()
        self.img_resolution, self.channel_mult = img_resolution, channel_mult
        self.attn_resolutions, self.label_dropout = attn_resolutions, label_dropout
        self.dropout, self.dout_resolutions = dropout, dout_resolutions
        emb_channels = model_channels * channel_mult_emb
        # EDM's initialization for ADM: uniform, with last layers at zero.
        init = dict(init_mode='kaiming_uniform', init_weight=math.sqrt(1 / 3), init_bias=math.sqrt(1 / 3))
        init_zero = dict(init_mode='kaiming_uniform', init_weight=0, init_bias=0)
        self.block_kwargs = dict(
            emb_channels=emb_channels, num_heads=num_heads, channels_per_head=channels_per_head,
            adaptive_scale=adaptive_scale, min_channels_per_group=min_channels_per_group,
            init=init, init_zero=init_zero,
        )  # fmt: skip

        # Embedding of noise level, class and augmentation.
        self.map_noise = PositionalEmbedding(model_channels)
        augment = dict(bias=False, **init_zero)
        self.map_augment = Linear(augment_dim, model_channels, **augment) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels, **init)
        self.map_layer1 = Linear(emb_channels, emb_channels, **init)
        self.label_gain = 1
        # One-hot labels have a variance of about 1 / label_dim, which these weights make up for.
        label = dict(bias=False, init_mode='kaiming_normal', init_weight=math.sqrt(label_dim))
        self.map_label = Linear(label_dim, emb_channels, **label) if label_dim else None

        # Encoder.
        self.enc = ModuleDict()
        skips = []
        for level, at, mult, attention in self._levels():
            if level == 0:
                width = model_channels * mult
                self.enc[f'{at}_conv'] = Conv2d(in_channels, width, kernel=3, **init)
            else:
                self.enc[f'{at}_down'] = self._block(at, width, width, down=True)
            skips.append(width)
            width = self._encode_level(at, width, model_channels * mult, num_blocks, attention, skips)

        # Decoder.
        self.dec = ModuleDict()
        for _, at, mult, attention in reversed(list(self._levels())):
            everywhere = [attention] * (num_blocks + 1)
            width = self._decode_level(at, width, model_channels * mult, everywhere, skips)
        self.out_norm = GroupNorm(num_channels=width, min_channels_per_group=min_channels_per_group)
        self.out_conv = Conv2d(width, out_channels, kernel=3, **init_zero)
        self.map_end = EndEmbedding(model_channels, emb_channels, **init) if two_time else None

    def _embed(self, noise_labels, class_labels, augment_labels, end_labels):
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self._label_embedding(class_labels)
        return self._modulation(emb, end_labels)

    def forward(
        self, x, noise_labels, class_labels, augment_labels=None, dropout_masks=None, end_labels=None
    ):  # fmt: skip
        masks = dropout_masks or {}
        emb = self._embed(noise_labels, class_labels, augment_labels, end_labels)
        skips = []
        for name, block in self.enc.items():
            x = self._run(block, x, emb, masks.get(f'enc.{name}'))
            skips.append(x)
        for name, block in self.dec.items():
            if '_block' in name:
                x = torch.cat([x, skips.pop()], dim=1)
            x = self._run(block, x, emb, masks.get(f'dec.{name}'))
        return self.out_conv(F.silu(self.out_norm(x)))


# ----------------------------------------------------------------------------
# Preconditioning (Karras et al. 2022, Table 1): D(x; sigma) = c_skip x + c_out F(c_in x; c_noise).


def end_labels(r, x, sigma_data):
    """What a two-time network embeds of the level `r` where a step ends: its angle atan(r / sigma_data), from 0 to
    pi/2, [N]."""
    if r is None:
        raise ValueError(
            'this is a two-time network: give the noise level at which the step ends too, as net(x, sigma, '
            'class_labels, r=r); 0 gives the image'
        )
    return (torch.as_tensor(r, device=x.device).to(x.dtype).flatten() / sigma_data).atan()


class Precond(Module):
    """What all preconditionings share. Subclasses define `coefficients(sigma)`: c_skip, c_out, c_in, c_noise.

    `channels_last` sets the memory format inside. With `logvar_channels` the network also estimates the
    log-variance of a loss at each noise level, from as many features of ln sigma; 0 at first.
    """

    channels_last = False

    def __init__(
        self, img_resolution, img_channels, label_dim, use_fp16, sigma_min, sigma_max, model_type,
        model_kwargs, out_channels=None, logvar_channels=0
    ):  # fmt: skip
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.use_fp16, self.use_bf16 = use_fp16, False
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        unets = dict(SongUNet=SongUNet, DhariwalUNet=DhariwalUNet)
        if model_type not in unets:
            raise ValueError(f'model_type {model_type!r} is not one of {", ".join(unets)}')
        sizes = dict(img_resolution=img_resolution, label_dim=label_dim, in_channels=img_channels)
        sizes['out_channels'] = out_channels or img_channels
        self.model = unets[model_type](**sizes, **model_kwargs)

        # After the U-Net, whose random weights do not depend on it.
        self.logvar_fourier = self.logvar_linear = None
        if logvar_channels:
            self.logvar_fourier = FourierEmbedding(logvar_channels, scale=1)
            self.logvar_linear = Linear(logvar_channels, 1, bias=False, init_weight=0)

    @property
    def two_time(self):
        """Whether the network also takes the level at which a step ends."""
        return self.model.map_end is not None

    def forward(
        self, x, sigma, class_labels=None, force_fp32=False, return_logvar=False, r=None, **model_kwargs
    ):  # fmt: skip
        """Denoised images from noisy `x` at noise levels `sigma`; of a two-time network the images from which a DDIM
        step leads to the state at `r`.

        The U-Net runs in BF16 if `use_bf16` is set, or in FP16 if `use_fp16` is set and the device is a GPU,
        unless `force_fp32`.

        Args:
            x: [N, C, H, W]
            sigma: [N] or scalar.
            class_labels: [N, label_dim]; None: zeros.
            r: [N] or scalar, of two-time networks alone: 0 <= r <= sigma.
            model_kwargs: `augment_labels`, `dropout_masks`.
        Returns: [N, C, H, W] FP32, or FP64 if the weights are. With `return_logvar`, for networks with
            `logvar_channels`, a pair: that, and the log-variance u(sigma), [N, 1, 1, 1].
        Raises: ValueError for a two-time network without `r`, or another one with it, and for an estimate that the
            network does not have.
        """
        # Precision outside and inside of the U-Net.
        full = inner = torch.promote_types(self.model.map_layer0.weight.dtype, torch.float32)
        if self.use_bf16 and not force_fp32:
            inner = torch.bfloat16
        elif self.use_fp16 and not force_fp32 and x.device.type == 'cuda':
            inner = torch.float16

        # Inputs.
        x = x.to(full)
        sigma = torch.as_tensor(sigma, device=x.device).to(full).reshape(-1, 1, 1, 1)
        if self.label_dim == 0:
            class_labels = None
        elif class_labels is None:
            # One row broadcasts over the batch.
            class_labels = torch.zeros([1, self.label_dim], device=x.device, dtype=full)
        else:
            class_labels = class_labels.to(full).reshape(-1, self.label_dim)

        if self.two_time:
            model_kwargs['end_labels'] = end_labels(r, x, getattr(self, 'sigma_data', 0.5))
        elif r is not None:
            raise ValueError('this network is given one noise level, and no r')

        # D(x; sigma) = c_skip x + c_out F(c_in x; c_noise).
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        scaled = (c_in * x).to(inner)
        if self.channels_last:
            scaled = scaled.clone(memory_format=torch.channels_last)
        out = self.model(scaled, c_noise.flatten(), class_labels, **model_kwargs)
        # iDDPM's networks also predict a variance, in channels that are dropped here.
        denoised = c_skip * x + c_out * out[:, : self.img_channels].to(full)
        if return_logvar:
            if self.logvar_linear is None:
                raise ValueError(
                    'this network has no estimate of log-variances: build it with logvar_channels'
                )
            features = self.logvar_fourier(sigma.flatten().log() / 4)
            return denoised, self.logvar_linear(features).reshape(-1, 1, 1, 1)
        return denoised

    def dropout_masks(self, batch_size, generator=None):
        """See `UNet.dropout_masks`."""
        return self.model.dropout_masks(batch_size, generator)

    def round_sigma(self, sigma):
        """The noise levels that the network was trained at, nearest to `sigma`."""
        return torch.as_tensor(sigma)


@persistent
class EDMPrecond(Precond):
    """EDM's preconditioning: unit variance in and out at every noise level (Karras et al. 2022, Eq. 7).

    D(x; boundary) = x. The boundary is 0 for denoisers, sigma_min for consistency models (Song et al. 2023,
    Appendix C).
    """

    def __init__(
        self, img_resolution, img_channels, label_dim=0, use_fp16=False, sigma_min=0,
        sigma_max=float('inf'), sigma_data=0.5, model_type='DhariwalUNet', boundary=0, logvar_channels=0,
        **model_kwargs
    ):  # fmt: skip
        super().__init__(
            img_resolution, img_channels, label_dim, use_fp16, sigma_min, sigma_max, model_type, model_kwargs,
            logvar_channels=logvar_channels,
        )  # fmt: skip
        self.sigma_data, self.boundary = sigma_data, boundary

    def coefficients(self, sigma):
        # The boundary shifts c_skip and c_out, not c_in: c_skip = 1 and c_out = 0 there.
        total = shifted = sigma**2 + self.sigma_data**2
        above, root = sigma, total.sqrt()
        if self.boundary:
            above = sigma - self.boundary
            shifted = above**2 + self.sigma_data**2
        return self.sigma_data**2 / shifted, above * self.sigma_data / root, 1 / root, sigma.log() / 4


@persistent
class CMPrecond(EDMPrecond):
    """OpenAI's consistency models and the EDM teachers that they are distilled from: EDM's preconditioning
    with c_noise = 250 ln sigma (Song et al. 2023, Appendix C)."""

    def coefficients(self, sigma):
        return *super().coefficients(sigma)[:3], 250 * sigma.log()


@persistent
class VPPrecond(Precond):
    """Variance-preserving SDE (Song et al. 2021); sigma(t)² = exp(beta_d t² / 2 + beta_min t) − 1."""

    def __init__(
        self, img_resolution, img_channels, label_dim=0, use_fp16=False, beta_d=19.9, beta_min=0.1, M=1000,
        epsilon_t=1e-5, model_type='SongUNet', **model_kwargs
    ):  # fmt: skip
        def level(t):
            return math.sqrt(math.expm1(beta_d * t**2 / 2 + beta_min * t))

        ends = level(epsilon_t), level(1)
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, *ends, model_type, model_kwargs)
        self.beta_d, self.beta_min, self.M, self.epsilon_t = beta_d, beta_min, M, epsilon_t

    def sigma_inv(self, sigma):
        """The time t of a noise level."""
        # The root of the quadratic beta_d t² / 2 + beta_min t = ln(1 + sigma²).
        root = (self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt()
        return (root - self.beta_min) / self.beta_d

    def coefficients(self, sigma):
        return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), (self.M - 1) * self.sigma_inv(sigma)


@persistent
class VEPrecond(Precond):
    """Variance-exploding SDE (Song et al. 2021)."""

    def __init__(
        self, img_resolution, img_channels, label_dim=0, use_fp16=False, sigma_min=0.02, sigma_max=100,
        model_type='SongUNet', **model_kwargs
    ):  # fmt: skip
        super().__init__(
            img_resolution, img_channels, label_dim, use_fp16, sigma_min, sigma_max, model_type, model_kwargs
        )

    def coefficients(self, sigma):
        return 1, sigma, 1, (sigma / 2).log()


@persistent
class iDDPMPrecond(Precond):
    """Improved DDPM's cosine schedule (Nichol & Dhariwal 2021), M levels u_0 > ... > u_{M-1}; the network's
    variance output is ignored."""

    def __init__(
        self, img_resolution, img_channels, label_dim=0, use_fp16=False, C_1=0.001, C_2=0.008, M=1000,
        model_type='DhariwalUNet', **model_kwargs
    ):  # fmt: skip
        def alpha_bar(j):
            return math.sin(math.pi / 2 * j / M / (C_2 + 1)) ** 2

        # From u_M = 0 up to u_0; see `schedules.iddpm_levels`, which a snapshot cannot import.
        levels = [0.0]
        for j in range(M, 0, -1):
            levels.append(math.sqrt((levels[-1] ** 2 + 1) / max(alpha_bar(j - 1) / alpha_bar(j), C_1) - 1))
        super().__init__(
            # The range: the smallest level above 0, and the largest.
            img_resolution, img_channels, label_dim, use_fp16, levels[1], levels[M], model_type, model_kwargs,
            out_channels=img_channels * 2,
        )  # fmt: skip
        self.C_1, self.C_2, self.M = C_1, C_2, M
        self.register_buffer('u', torch.tensor(levels[::-1]))

    def _nearest(self, sigma):
        levels = self.u.to(sigma.device, torch.float32)
        return (sigma.to(torch.float32).reshape(-1, 1) - levels).abs().argmin(dim=1)

    def round_sigma(self, sigma):
        sigma = torch.as_tensor(sigma)
        return self.u.to(sigma.device)[self._nearest(sigma)].to(sigma.dtype).reshape(sigma.shape)

    def coefficients(self, sigma):
        index = self._nearest(sigma).reshape(sigma.shape).to(sigma.dtype)
        return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), self.M - 1 - index


PRECONDS = {cls.__name__: cls for cls in (EDMPrecond, CMPrecond, VPPrecond, VEPrecond, iDDPMPrecond)}
