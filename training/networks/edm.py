"""Denoisers D(x; sigma): the ADM, DDPM++ and NCSN++ U-Nets under EDM, CM, VP, VE and iDDPM preconditioning.

Constructor arguments and parameter names are those of EDM's published snapshots, so that their weights load.
A snapshot carries this file's source, so it imports nothing but torch and `torch_utils.persistence`.

Shapes: images [N, C, H, W], noise levels [N] or a scalar, class labels one-hot [N, label_dim], augmentation
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
    """Random tensor of the given shape; `mode` is (xavier|kaiming)_(uniform|normal), scaled as Glorot &
    Bengio 2010 and He et al. 2015 for a gain of one (kaiming: variance 1 / fan_in)."""
    family, _, law = mode.partition('_')
    variance = {'xavier': 2 / (fan_in + fan_out), 'kaiming': 1 / fan_in}[family]
    if law == 'uniform':
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
        self.weight = (
            Parameter(init_tensor([out_channels, in_channels, kernel, kernel], **fans) * init_weight)
            if kernel
            else None
        )
        self.bias = Parameter(init_tensor([out_channels], **fans) * init_bias) if kernel and bias else None
        taps = torch.as_tensor(resample_filter, dtype=torch.float32)
        taps = torch.outer(taps, taps) / taps.sum() ** 2
        self.register_buffer('resample_filter', taps[None, None] if up or down else None)

    def _resample(self, x, channels, padding):
        taps = self.resample_filter.to(x.dtype)
        if self.up:
            return F.conv_transpose2d(
                x, (taps * 4).expand(channels, 1, -1, -1), stride=2, padding=padding, groups=channels
            )
        return F.conv2d(x, taps.expand(channels, 1, -1, -1), stride=2, padding=padding, groups=channels)

    def forward(self, x):
        weight = None if self.weight is None else self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        w_pad = 0 if weight is None else weight.shape[-1] // 2
        f_pad = 0 if self.resample_filter is None else (self.resample_filter.shape[-1] - 1) // 2
        if self.fused_resample and weight is not None and self.up:
            x = self._resample(x, self.in_channels, padding=max(f_pad - w_pad, 0))
            return F.conv2d(x, weight, bias, padding=max(w_pad - f_pad, 0))
        if self.fused_resample and weight is not None and self.down:
            x = self._resample(F.conv2d(x, weight, padding=w_pad + f_pad), self.out_channels, padding=0)
            return x if bias is None else x + bias.reshape(1, -1, 1, 1)
        if self.resample_filter is not None:
            x = self._resample(x, self.in_channels, padding=f_pad)
        return x if weight is None else F.conv2d(x, weight, bias, padding=w_pad)


@persistent
class GroupNorm(Module):
    """Group normalization (Wu & He 2018) with at least `min_channels_per_group` channels a group."""

    def __init__(self, num_channels, num_groups=32, min_channels_per_group=4, eps=1e-5):
        super().__init__()
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
        exponents = torch.arange(half, dtype=torch.float32, device=x.device) / (half - int(self.endpoint))
        angles = torch.outer(x, (self.max_positions**-exponents).to(x.dtype))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


@persistent
class FourierEmbedding(Module):
    """Random Fourier features of a scalar: [N] -> [N, num_channels] (Tancik et al. 2020)."""

    def __init__(self, num_channels, scale=16):
        super().__init__()
        frequencies = torch.empty(num_channels // 2).normal_(std=scale)
        self.register_buffer('freqs', frequencies)

    def forward(self, x):
        angles = torch.outer(
            x, (self.freqs * (2 * math.pi)).to(x.dtype)
        )  # in the precision of the frequencies, as in EDM
        return torch.cat([angles.cos(), angles.sin()], dim=1)


def keep_mask(shape, probability, device, generator=None):
    """[*shape] bool, true with a probability in (0, 1), as it is in steps of 2^-16: an int64 is drawn for
    four values, since CPUs draw slowly."""
    count = math.prod(shape)
    lanes = (
        torch.empty(-(-count // 4), dtype=torch.int64, device=device)
        .random_(-(2**63), None, generator=generator)
        .view(torch.int16)
    )
    return lanes[:count].reshape(shape) < min(round(probability * 2**16), 2**16 - 1) - 2**15


@persistent
class UNetBlock(Module):
    """Residual block with noise-level modulation, optional 2x resampling and self-attention.

    Attention has `num_heads` heads, or one for every `channels_per_head` channels: none at all where there
    are fewer. `dropout` acts before the second convolution.
    """

    def __init__(
        self, in_channels, out_channels, emb_channels, up=False, down=False, attention=False,
        num_heads=None, channels_per_head=64, dropout=0, skip_scale=1, eps=1e-5, resample_filter=(1, 1),
        resample_proj=False, adaptive_scale=True, init=None, init_zero=None, init_attn=None,
        min_channels_per_group=4
    ):  # fmt: skip
        super().__init__()
        init, init_zero = init or {}, init_zero or dict(init_weight=0)
        if not attention:
            num_heads = 0
        elif num_heads is None:
            num_heads = out_channels // channels_per_head
        self.in_channels, self.out_channels, self.emb_channels, self.num_heads = (
            in_channels,
            out_channels,
            emb_channels,
            num_heads,
        )
        self.dropout, self.skip_scale, self.adaptive_scale = dropout, skip_scale, adaptive_scale

        resample = dict(up=up, down=down, resample_filter=resample_filter)
        norm = dict(min_channels_per_group=min_channels_per_group, eps=eps)
        self.norm0 = GroupNorm(num_channels=in_channels, **norm)
        self.conv0 = Conv2d(in_channels, out_channels, kernel=3, **resample, **init)
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1), **init)
        self.norm1 = GroupNorm(num_channels=out_channels, **norm)
        self.conv1 = Conv2d(out_channels, out_channels, kernel=3, **init_zero)
        self.skip = None
        if in_channels != out_channels or up or down:
            project = resample_proj or in_channels != out_channels
            self.skip = Conv2d(in_channels, out_channels, kernel=int(project), **resample, **init)
        if num_heads:
            self.norm2 = GroupNorm(num_channels=out_channels, **norm)
            self.qkv = Conv2d(out_channels, out_channels * 3, kernel=1, **(init_attn or init))
            self.proj = Conv2d(out_channels, out_channels, kernel=1, **init_zero)

    def _dropout(self, x, mask):
        if mask is not None:
            return x * (mask.to(x.dtype) / (1 - self.dropout))
        return F.dropout(x, self.dropout, self.training)

    def _attention(self, x):
        n, c, h, w = x.shape
        # Channels are ordered head, feature, (q, k, v).
        qkv = self.qkv(self.norm2(x)).reshape(n, self.num_heads, c // self.num_heads, 3, h * w)
        q, k, v = qkv.permute(
            3, 0, 1, 4, 2
        ).contiguous()  # features side by side: fused kernels take nothing else
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, h, w, c)
        return self.proj(out.permute(0, 3, 1, 2))

    def forward(self, x, emb, mask=None):
        """`mask`: [N, out_channels, H, W] bool, true where a value is kept; None draws one where the block is
        training."""
        h = self.conv0(F.silu(self.norm0(x)))
        modulation = self.affine(emb).to(h.dtype)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = modulation.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm1(h), scale + 1)
        else:
            h = self.norm1(h + modulation)
        h = self.conv1(self._dropout(F.silu(h), mask))
        x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if self.num_heads:
            x = (x + self._attention(x)) * self.skip_scale
        return x


# ----------------------------------------------------------------------------
# U-Nets.


class UNet(Module):
    """What both U-Nets share: levels, dropout per resolution, the pass down and up. Modules are named
    `<res>x<res>_<what>`.

    Where `checkpoint_activations` is set, the backward pass computes what is inside a block again, which then
    takes no memory meanwhile.
    """

    checkpoint_activations = False

    def _levels(self):
        """(level, name prefix, channel multiplier, attention here) from the finest level to the coarsest.
        Raises: ValueError where none is."""
        if not self.channel_mult:
            raise ValueError('channel_mult is empty: a U-Net has one level at least')
        for level, mult in enumerate(self.channel_mult):
            res = self.img_resolution >> level
            yield level, f'{res}x{res}', mult, res in self.attn_resolutions

    def _block(self, prefix, in_channels, out_channels, **kwargs):
        """A UNetBlock at the resolution that `prefix` names, with dropout only where `dout_resolutions`
        admits it."""
        resolution = int(prefix.partition('x')[0])
        dropped = self.dout_resolutions is None or resolution in self.dout_resolutions
        return UNetBlock(
            in_channels, out_channels, dropout=self.dropout if dropped else 0, **self.block_kwargs, **kwargs
        )

    def _encode_level(self, prefix, width, out_width, num_blocks, attention, skips):
        """The encoder's own blocks of a level; adds the widths of their outputs to `skips` and returns the
        last."""
        for i in range(num_blocks):
            self.enc[f'{prefix}_block{i}'] = self._block(prefix, width, out_width, attention=attention)
            width = out_width
            skips.append(width)
        return width

    def _enter_level(self, prefix, width, coarsest):
        """The decoder's modules before a level's own blocks: two at the coarsest level, one that upsamples at
        the others."""
        if coarsest:
            self.dec[f'{prefix}_in0'] = self._block(prefix, width, width, attention=True)
            self.dec[f'{prefix}_in1'] = self._block(prefix, width, width)
        else:
            self.dec[f'{prefix}_up'] = self._block(prefix, width, width, up=True)

    def _run(self, block, x, emb, mask):
        """`block(x, emb, mask)`"""
        if self.checkpoint_activations and torch.is_grad_enabled():
            draws = mask is None and block.dropout > 0
            return checkpoint(block, x, emb, mask, use_reentrant=False, preserve_rng_state=draws)
        return block(x, emb, mask)

    def _label_embedding(self, class_labels):
        """[N, label_dim] labels, dropped per image with probability `label_dropout` in training."""
        if self.training and self.label_dropout:
            keep = torch.rand([class_labels.shape[0], 1], device=class_labels.device) >= self.label_dropout
            class_labels = class_labels * keep.to(class_labels.dtype)
        return self.map_label(class_labels * self.label_gain)

    def dropout_masks(self, batch_size, generator=None):
        """Masks for one pass: {block name: [N, C, H, W] bool, true where kept}, empty without dropout.

        Giving the same masks to two passes synchronizes their dropout bit for bit, whatever the precision or
        compiler.
        """
        if not self.dropout:
            return {}
        device, masks = next(self.parameters()).device, {}
        for part in ('enc', 'dec'):
            for name, block in getattr(self, part).items():
                if getattr(block, 'dropout', 0):
                    res = int(name.partition('x')[0])
                    masks[f'{part}.{name}'] = keep_mask(
                        [batch_size, block.out_channels, res, res], 1 - block.dropout, device, generator
                    )
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
        decoder_type='standard', resample_filter=(1, 1), dout_resolutions=None
    ):  # fmt: skip
        super().__init__()
        for value, known in (
            (embedding_type, ('positional', 'fourier')),
            (encoder_type, ('standard', 'skip', 'residual')),
            (decoder_type, ('standard', 'skip')),
        ):
            if value not in known:
                raise ValueError(f'{value!r} is not one of {", ".join(known)}')
        self.img_resolution, self.channel_mult, self.attn_resolutions = (
            img_resolution,
            channel_mult,
            attn_resolutions,
        )
        self.dropout, self.dout_resolutions, self.label_dropout = dropout, dout_resolutions, label_dropout
        emb_channels, noise_channels = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        init = dict(init_mode='xavier_uniform')
        init_zero, init_attn = dict(init, init_weight=1e-5), dict(init, init_weight=math.sqrt(0.2))
        self.block_kwargs = dict(
            emb_channels=emb_channels,
            num_heads=1,
            skip_scale=math.sqrt(0.5),
            eps=1e-6,
            resample_filter=resample_filter,
            resample_proj=True,
            adaptive_scale=False,
            init=init,
            init_zero=init_zero,
            init_attn=init_attn,
        )

        # Embedding of noise level, class and augmentation.
        self.map_noise = (
            FourierEmbedding(noise_channels)
            if embedding_type == 'fourier'
            else PositionalEmbedding(noise_channels, endpoint=True)
        )
        self.label_gain = math.sqrt(label_dim)
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
                    self.enc[f'{at}_aux_residual'] = Conv2d(
                        aux_width, width, kernel=3, down=True, fused_resample=True, **filtered, **init
                    )
                    aux_width = width
            skips.append(width)
            width = self._encode_level(at, width, model_channels * mult, num_blocks, attention, skips)

        self._build_decoder(width, skips, model_channels, out_channels, num_blocks, decoder_type, filtered)

    def _build_decoder(self, width, skips, model_channels, out_channels, num_blocks, decoder_type, filtered):
        """`dec`: blocks that consume the encoder's `skips`, then the output layers, at each level for
        `skip`."""
        self.dec = ModuleDict()
        for level, at, mult, attention in reversed(list(self._levels())):
            coarsest = level == len(self.channel_mult) - 1
            self._enter_level(at, width, coarsest)
            for i in range(num_blocks + 1):
                self.dec[f'{at}_block{i}'] = self._block(
                    at, width + skips.pop(), model_channels * mult, attention=attention and i == num_blocks
                )
                width = model_channels * mult
            if decoder_type == 'skip' or level == 0:
                if decoder_type == 'skip' and not coarsest:
                    self.dec[f'{at}_aux_up'] = Conv2d(
                        out_channels, out_channels, kernel=0, up=True, **filtered
                    )
                self.dec[f'{at}_aux_norm'] = GroupNorm(num_channels=width, eps=1e-6)
                self.dec[f'{at}_aux_conv'] = Conv2d(
                    width, out_channels, kernel=3, **self.block_kwargs['init_zero']
                )

    def _embed(self, noise_labels, class_labels, augment_labels):
        emb = self.map_noise(noise_labels)
        emb = emb.unflatten(1, (2, -1)).flip(1).flatten(1)  # sines first, the order of the published weights
        if self.map_label is not None:
            emb = emb + self._label_embedding(class_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def forward(self, x, noise_labels, class_labels, augment_labels=None, dropout_masks=None):
        masks = dropout_masks or {}
        emb = self._embed(noise_labels, class_labels, augment_labels)
        skips, aux = [], x
        for name, block in self.enc.items():
            if name.endswith('aux_down'):
                aux = block(aux)
            elif name.endswith('aux_skip'):
                x = skips[-1] = x + block(aux)
            elif name.endswith('aux_residual'):
                x = skips[-1] = aux = (x + block(aux)) * math.sqrt(0.5)
            else:
                x = (
                    self._run(block, x, emb, masks.get(f'enc.{name}'))
                    if isinstance(block, UNetBlock)
                    else block(x)
                )
                skips.append(x)
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

    Some weights of Song et al. 2023 differ: the embedding only shifts (`adaptive_scale` False), norms have 32
    groups whatever their width (`min_channels_per_group` 1), attention has heads of another size
    (`channels_per_head`) or the same number everywhere (`num_heads`).
    """

    def __init__(
        self, img_resolution, in_channels, out_channels, label_dim=0, augment_dim=0, model_channels=192,
        channel_mult=(1, 2, 3, 4), channel_mult_emb=4, num_blocks=3, attn_resolutions=(32, 16, 8),
        dropout=0.10, label_dropout=0, dout_resolutions=None, adaptive_scale=True, min_channels_per_group=4,
        channels_per_head=64, num_heads=None
    ):  # fmt: skip
        super().__init__()
        self.img_resolution, self.channel_mult, self.attn_resolutions = (
            img_resolution,
            channel_mult,
            attn_resolutions,
        )
        self.dropout, self.dout_resolutions, self.label_dropout = dropout, dout_resolutions, label_dropout
        emb_channels = model_channels * channel_mult_emb
        init = dict(init_mode='kaiming_uniform', init_weight=math.sqrt(1 / 3), init_bias=math.sqrt(1 / 3))
        init_zero = dict(init_mode='kaiming_uniform', init_weight=0, init_bias=0)
        self.block_kwargs = dict(
            emb_channels=emb_channels,
            num_heads=num_heads,
            channels_per_head=channels_per_head,
            adaptive_scale=adaptive_scale,
            min_channels_per_group=min_channels_per_group,
            init=init,
            init_zero=init_zero,
        )

        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = (
            Linear(augment_dim, model_channels, bias=False, **init_zero) if augment_dim else None
        )
        self.map_layer0 = Linear(model_channels, emb_channels, **init)
        self.map_layer1 = Linear(emb_channels, emb_channels, **init)
        self.label_gain = 1
        self.map_label = (
            Linear(
                label_dim,
                emb_channels,
                bias=False,
                init_mode='kaiming_normal',
                init_weight=math.sqrt(label_dim),
            )
            if label_dim
            else None
        )

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

        self.dec = ModuleDict()
        for level, at, mult, attention in reversed(list(self._levels())):
            self._enter_level(at, width, coarsest=level == len(channel_mult) - 1)
            for i in range(num_blocks + 1):
                self.dec[f'{at}_block{i}'] = self._block(
                    at, width + skips.pop(), model_channels * mult, attention=attention
                )
                width = model_channels * mult
        self.out_norm = GroupNorm(num_channels=width, min_channels_per_group=min_channels_per_group)
        self.out_conv = Conv2d(width, out_channels, kernel=3, **init_zero)

    def _embed(self, noise_labels, class_labels, augment_labels):
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self._label_embedding(class_labels)
        return F.silu(emb)

    def forward(self, x, noise_labels, class_labels, augment_labels=None, dropout_masks=None):
        masks = dropout_masks or {}
        emb = self._embed(noise_labels, class_labels, augment_labels)
        skips = []
        for name, block in self.enc.items():
            x = (
                self._run(block, x, emb, masks.get(f'enc.{name}'))
                if isinstance(block, UNetBlock)
                else block(x)
            )
            skips.append(x)
        for name, block in self.dec.items():
            if '_block' in name:
                x = torch.cat([x, skips.pop()], dim=1)
            x = self._run(block, x, emb, masks.get(f'dec.{name}'))
        return self.out_conv(F.silu(self.out_norm(x)))


# ----------------------------------------------------------------------------
# Preconditioning (Karras et al. 2022, Table 1): D(x; sigma) = c_skip x + c_out F(c_in x; c_noise).


class Precond(Module):
    """The wrapper that all share; each gives `coefficients(sigma) -> c_skip, c_out, c_in, c_noise`.

    Where `channels_last` is set, images inside have their channels next to each other in memory.
    """

    channels_last = False

    def __init__(
        self, img_resolution, img_channels, label_dim, use_fp16, sigma_min, sigma_max, model_type,
        model_kwargs, out_channels=None
    ):  # fmt: skip
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim, self.use_fp16 = (
            img_resolution,
            img_channels,
            label_dim,
            use_fp16,
        )
        self.use_bf16 = False
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        unets = dict(SongUNet=SongUNet, DhariwalUNet=DhariwalUNet)
        if model_type not in unets:
            raise ValueError(f'model_type {model_type!r} is not one of {", ".join(unets)}')
        self.model = unets[model_type](
            img_resolution=img_resolution,
            in_channels=img_channels,
            out_channels=out_channels or img_channels,
            label_dim=label_dim,
            **model_kwargs,
        )

    def forward(self, x, sigma, class_labels=None, force_fp32=False, **model_kwargs):
        """Denoised images [N, C, H, W] in FP32 (FP64 where the weights are) from noisy `x` at noise levels
        `sigma`, [N] or scalar.

        Inside runs BF16 where `use_bf16` is set, or FP16 where `use_fp16` is and the device is a GPU, unless
        `force_fp32`. `model_kwargs`: `augment_labels`, `dropout_masks`.
        """
        full = torch.float64 if self.model.map_layer0.weight.dtype == torch.float64 else torch.float32
        half = (
            torch.bfloat16
            if self.use_bf16
            else torch.float16
            if self.use_fp16 and x.device.type == 'cuda'
            else full
        )
        inner = full if force_fp32 else half
        x = x.to(full)
        sigma = torch.as_tensor(sigma, device=x.device).to(full).reshape(-1, 1, 1, 1)
        if self.label_dim == 0:
            class_labels = None
        elif class_labels is None:
            class_labels = torch.zeros([1, self.label_dim], device=x.device, dtype=full)
        else:
            class_labels = class_labels.to(full).reshape(-1, self.label_dim)
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        scaled = (c_in * x).to(inner)
        if self.channels_last:
            scaled = scaled.clone(memory_format=torch.channels_last)
        out = self.model(scaled, c_noise.flatten(), class_labels, **model_kwargs)
        return c_skip * x + c_out * out[:, : self.img_channels].to(full)

    def dropout_masks(self, batch_size, generator=None):
        """See `UNet.dropout_masks`."""
        return self.model.dropout_masks(batch_size, generator)

    def round_sigma(self, sigma):
        """The noise levels that the network was trained at, nearest to `sigma`."""
        return torch.as_tensor(sigma)


@persistent
class EDMPrecond(Precond):
    """EDM's preconditioning: unit variance in and out at every noise level (Karras et al. 2022, Eq. 7).

    D(x; boundary) = x: at 0 for denoisers, at sigma_min for consistency models (Song et al. 2023, Appendix
    C).
    """

    def __init__(
        self, img_resolution, img_channels, label_dim=0, use_fp16=False, sigma_min=0,
        sigma_max=float('inf'), sigma_data=0.5, model_type='DhariwalUNet', boundary=0, **model_kwargs
    ):  # fmt: skip
        super().__init__(
            img_resolution, img_channels, label_dim, use_fp16, sigma_min, sigma_max, model_type, model_kwargs
        )
        self.sigma_data, self.boundary = sigma_data, boundary

    def coefficients(self, sigma):
        total, above = sigma**2 + self.sigma_data**2, sigma - self.boundary
        c_skip = self.sigma_data**2 / (above**2 + self.sigma_data**2)
        return c_skip, above * self.sigma_data / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4


@persistent
class CMPrecond(EDMPrecond):
    """OpenAI's consistency models and the EDM teachers that they were distilled from: as EDM's, but the
    network is told the noise level as 250 ln sigma (Song et al. 2023, Appendix C)."""

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

        super().__init__(
            img_resolution,
            img_channels,
            label_dim,
            use_fp16,
            level(epsilon_t),
            level(1),
            model_type,
            model_kwargs,
        )
        self.beta_d, self.beta_min, self.M, self.epsilon_t = beta_d, beta_min, M, epsilon_t

    def sigma_inv(self, sigma):
        """The time t of a noise level."""
        return (
            (self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt() - self.beta_min
        ) / self.beta_d

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

        levels = [0.0]
        for j in range(M, 0, -1):
            levels.append(math.sqrt((levels[-1] ** 2 + 1) / max(alpha_bar(j - 1) / alpha_bar(j), C_1) - 1))
        super().__init__(
            img_resolution,
            img_channels,
            label_dim,
            use_fp16,
            levels[1],
            levels[M],
            model_type,
            model_kwargs,
            out_channels=img_channels * 2,
        )
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
