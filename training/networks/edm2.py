"""EDM2's denoiser D(x; sigma): the magnitude-preserving U-Net of configuration G, and its preconditioning
(Karras et al. 2024; equation numbers without a source are of that paper).

Every layer maps inputs of unit variance to outputs of about unit variance, and weights are forced to unit
variance, so that activations and updates keep their size throughout training. There are no biases and no
group norms.

Classes, constructor arguments and parameter names are those of EDM2's published snapshots, so that their
weights load. A snapshot carries this file's source, so it imports nothing but torch and
`torch_utils.persistence`.

Shapes: images [N, C, H, W], noise levels [N] or a scalar, one-hot class labels [N, label_dim].
"""

import math

import torch
import torch.nn.functional as F
from torch.nn import Module, ModuleDict, Parameter
from torch.utils.checkpoint import checkpoint

from torch_utils.persistence import persistent_class as persistent

# ----------------------------------------------------------------------------
# Magnitude-preserving operations.


def normalize(x, dims):
    """`x` divided by its root mean square over `dims`, plus 1e-4; the mean is taken in FP32 at least."""
    at_least_fp32 = torch.promote_types(x.dtype, torch.float32)
    count = math.prod([x.shape[dim] for dim in dims])
    # The sum of squares could overflow FP16.
    rms = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=at_least_fp32) / math.sqrt(count)
    return x / (rms + 1e-4).to(x.dtype)


def normalize_weight(weight):
    """`weight` [out, ...] with unit variance for every output channel, in FP32 at least."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return normalize(weight, dims=tuple(range(1, weight.ndim)))


def mp_silu(x):
    """SiLU over the magnitude that it gives to a standard normal input, 0.596 (Eq. 81)."""
    return F.silu(x) / 0.596


def mp_sum(a, b, t):
    """(1 − t) a + t b over the magnitude of that sum of independent unit inputs, sqrt((1 − t)² + t²) (Eq.
    88)."""
    return torch.lerp(a, b, t) / math.hypot(1 - t, t)


def mp_cat(a, b, t):
    """Channels of `a`, then of `b`, the two contributing to what follows in proportion 1 − t : t whatever
    their numbers (Eq. 103).

    With N = N_a + N_b and C = sqrt(N / ((1 − t)² + t²)), the factors are C (1 − t) / sqrt(N_a) and C t /
    sqrt(N_b).
    """
    n_a, n_b = a.shape[1], b.shape[1]
    # Channels of a concatenation weigh by their number, which the factors take back.
    scale = math.sqrt(n_a + n_b) / math.hypot(1 - t, t)
    return torch.cat([a * (scale * (1 - t) / math.sqrt(n_a)), b * (scale * t / math.sqrt(n_b))], dim=1)


def keep_mask(shape, probability, device, generator=None):
    """[*shape] bool, true with a probability in (0, 1), rounded to steps of 2^-16."""
    # One int64 gives four values, because CPUs draw slowly.
    count = math.prod(shape)
    drawn = torch.empty(-(-count // 4), dtype=torch.int64, device=device)
    drawn.random_(-(2**63), None, generator=generator)
    values = drawn.view(torch.int16)[:count].reshape(shape)
    return values < min(round(probability * 2**16), 2**16 - 1) - 2**15


def resample(x, taps, mode):
    """2x resampling with a separable filter: `mode` is keep, down or up."""
    if mode == 'keep':
        return x
    channels, padding = x.shape[1], (len(taps) - 1) // 2
    # Filled on the device, because a copy of the list from the host would synchronize.
    line = torch.stack([x.new_full([], tap / sum(taps)) for tap in taps])
    kernel = torch.outer(line, line).expand(channels, 1, -1, -1)
    if mode == 'down':
        return F.conv2d(x, kernel, stride=2, padding=padding, groups=channels)
    return F.conv_transpose2d(x, kernel * 4, stride=2, padding=padding, groups=channels)


# ----------------------------------------------------------------------------
# Layers.


@persistent
class MPFourier(Module):
    """Random Fourier features of a scalar, of unit variance: [N] -> [N, num_channels] (Eq. 75)."""

    def __init__(self, num_channels, bandwidth=1):
        super().__init__()
        self.register_buffer('freqs', torch.randn(num_channels) * (2 * math.pi * bandwidth))
        self.register_buffer('phases', torch.rand(num_channels) * (2 * math.pi))

    def forward(self, x):
        angles = torch.outer(x, self.freqs.to(x.dtype)) + self.phases.to(x.dtype)
        # cos² of a uniform phase has the mean 1/2.
        return angles.cos() * math.sqrt(2)


@persistent
class MPConv(Module):
    """Convolution, or matrix product if `kernel` is [], with weights normalized for every output channel (Eq.
    47).

    In training the stored weights are normalized too, before use (see `force_unit_weights`).
    """

    def __init__(self, in_channels, out_channels, kernel):
        super().__init__()
        self.out_channels = out_channels
        self.weight = Parameter(torch.randn(out_channels, in_channels, *kernel))

    def forward(self, x, gain=1):
        # With weights of unit variance, a dot product has fan_in times the variance of its inputs.
        fan_in = self.weight.numel() // self.out_channels
        # The quotient is in the precision of the gain, as in EDM2, whose snapshots have FP16 tensors.
        weight = (normalize_weight(self.weight) * (gain / math.sqrt(fan_in))).to(x.dtype)
        if weight.ndim == 2:
            return F.linear(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


def force_unit_weights(net):
    """Normalize the stored weights of all `MPConv` in `net` (forced weight normalization, Eq. 66).

    Gradient steps are orthogonal to the weights, which would only grow otherwise. To be called only before a
    pass with gradients, so that other passes may lie between a forward pass and its backward pass.
    """
    for module in net.modules():
        if isinstance(module, MPConv):
            # In place and without a gradient: the optimizer's tensor stays the same.
            stored = module.weight.detach()
            stored.copy_(normalize_weight(stored))


@persistent
class Block(Module):
    """Residual block with noise-level modulation, optional 2x resampling and self-attention.

    An encoder block (`flavor` enc) projects and normalizes its main path first, a decoder block (dec)
    projects it last. Attention has one head for every `channels_per_head` channels; with fewer channels there
    is no attention. `res_balance` and `attn_balance` are the shares of the residual branches (`mp_sum`'s t),
    `clip_act` bounds the output. `dropout` acts before the second convolution.
    """

    def __init__(
        self, in_channels, out_channels, emb_channels, flavor='enc', resample_mode='keep',
        resample_filter=(1, 1), attention=False, channels_per_head=64, dropout=0, res_balance=0.3,
        attn_balance=0.3, clip_act=256
    ):  # fmt: skip
        super().__init__()
        for value, known in ((flavor, ('enc', 'dec')), (resample_mode, ('keep', 'down', 'up'))):
            if value not in known:
                raise ValueError(f'{value!r} is not one of {", ".join(known)}')
        self.out_channels, self.flavor = out_channels, flavor
        self.resample_mode, self.resample_filter = resample_mode, resample_filter
        self.num_heads = out_channels // channels_per_head if attention else 0
        self.dropout, self.clip_act = dropout, clip_act
        self.res_balance, self.attn_balance = res_balance, attn_balance

        # Main path, with the gain of the embedding, which starts at 0.
        self.conv_res0 = MPConv(out_channels if flavor == 'enc' else in_channels, out_channels, kernel=[3, 3])
        self.conv_res1 = MPConv(out_channels, out_channels, kernel=[3, 3])
        self.emb_linear = MPConv(emb_channels, out_channels, kernel=[])
        self.emb_gain = Parameter(torch.zeros([]))

        # Skip connection, where the number of channels changes, and attention.
        self.conv_skip = self.attn_qkv = self.attn_proj = None
        if in_channels != out_channels:
            self.conv_skip = MPConv(in_channels, out_channels, kernel=[1, 1])
        if self.num_heads:
            self.attn_qkv = MPConv(out_channels, out_channels * 3, kernel=[1, 1])
            self.attn_proj = MPConv(out_channels, out_channels, kernel=[1, 1])

    def _project(self, x):
        return x if self.conv_skip is None else self.conv_skip(x)

    def _dropout(self, x, mask):
        if mask is not None:
            return x * (mask.to(x.dtype) / (1 - self.dropout))
        return F.dropout(x, self.dropout, self.training)

    def _attention(self, x):
        n, c, h, w = x.shape
        # Channels are ordered head, feature, (q, k, v). Each of the three is normalized over its features, so
        # that logits are bounded. Fused kernels need features contiguous in memory.
        qkv = normalize(self.attn_qkv(x).reshape(n, self.num_heads, c // self.num_heads, 3, h * w), dims=(2,))
        q, k, v = qkv.permute(3, 0, 4, 1, 2).contiguous().transpose(2, 3)
        # The output is in memory as q, so that [N, H, W, C] is a view.
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, h, w, c)
        return self.attn_proj(out.permute(0, 3, 1, 2))

    def forward(self, x, emb, mask=None):
        """Block output for `x` [N, in_channels, H, W] and embedding `emb` [N, emb_channels]; `mask` [N,
        out_channels, H, W] is true where dropout keeps a value; None draws one in training mode."""
        x = resample(x, self.resample_filter, self.resample_mode)
        # Pixel norm: unit variance over the channels at every position.
        if self.flavor == 'enc':
            x = normalize(self._project(x), dims=(1,))

        # Residual branch, modulated by the embedding.
        h = self.conv_res0(mp_silu(x))
        # The gain starts at 0, so the embedding modulates nothing at first.
        scale = self.emb_linear(emb, gain=self.emb_gain) + 1
        h = mp_silu(h * scale[:, :, None, None].to(h.dtype))
        h = self.conv_res1(self._dropout(h, mask))

        # Sums of unit-variance branches.
        x = mp_sum(x if self.flavor == 'enc' else self._project(x), h, t=self.res_balance)
        if self.num_heads:
            x = mp_sum(x, self._attention(x), t=self.attn_balance)
        return x if self.clip_act is None else x.clamp(-self.clip_act, self.clip_act)


# ----------------------------------------------------------------------------
# U-Net.


@persistent
class UNet(Module):
    """The U-Net of configuration G; modules are named `<res>x<res>_<what>`.

    The noise embedding has `model_channels` times `channel_mult_noise` channels (None: as the finest level),
    the embedding that blocks see times `channel_mult_emb` (None: as the widest level). `label_balance` and
    `concat_balance` are the shares of the class embedding and of the skip connections. `dropout` acts
    everywhere or only at `dout_resolutions`. `block_kwargs`: see `Block`. `checkpoint_activations` trades
    time for memory: the backward pass recomputes what is inside a block.
    """

    checkpoint_activations = False

    def __init__(
        self, img_resolution, img_channels, label_dim, model_channels=192, channel_mult=(1, 2, 3, 4),
        channel_mult_noise=None, channel_mult_emb=None, num_blocks=3, attn_resolutions=(16, 8),
        label_balance=0.5, concat_balance=0.5, dropout=0, dout_resolutions=None, two_time=False, **block_kwargs
    ):  # fmt: skip
        super().__init__()
        self.label_balance, self.concat_balance = label_balance, concat_balance
        self.dropout, self.dout_resolutions, self.block_kwargs = dropout, dout_resolutions, block_kwargs
        if not channel_mult:
            raise ValueError('channel_mult is empty: a U-Net has one level at least')

        # (resolution, channels) of each level, and the widths of embeddings.
        levels = [(img_resolution >> level, model_channels * mult) for level, mult in enumerate(channel_mult)]
        finest, coarsest = levels[0], levels[-1]
        noise_channels = finest[1] if channel_mult_noise is None else model_channels * channel_mult_noise
        widest = max(width for _, width in levels)
        self.emb_channels = widest if channel_mult_emb is None else model_channels * channel_mult_emb

        # Embedding of noise level and class.
        self.out_gain = Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(noise_channels)
        self.emb_noise = MPConv(noise_channels, self.emb_channels, kernel=[])
        self.emb_label = MPConv(label_dim, self.emb_channels, kernel=[]) if label_dim else None

        # Encoder. The input has one more channel, a constant in place of biases.
        self.enc = ModuleDict()
        width = finest[1]
        for res, channels in levels:
            if res == finest[0]:
                self.enc[f'{res}x{res}_conv'] = MPConv(img_channels + 1, width, kernel=[3, 3])
            else:
                self._add('enc', res, 'down', width, width, resample_mode='down')
            for i in range(num_blocks):
                self._add('enc', res, f'block{i}', width, channels, attention=res in attn_resolutions)
                width = channels

        # Decoder.
        self.dec = ModuleDict()
        # The decoder takes the outputs of all the encoder's layers, the last first.
        skips = [module.out_channels for module in self.enc.values()]
        for res, channels in reversed(levels):
            if res == coarsest[0]:
                self._add('dec', res, 'in0', width, width, attention=True)
                self._add('dec', res, 'in1', width, width)
            else:
                self._add('dec', res, 'up', width, width, resample_mode='up')
            attention = res in attn_resolutions
            for i in range(num_blocks + 1):
                self._add('dec', res, f'block{i}', width + skips.pop(), channels, attention=attention)
                width = channels
        self.out_conv = MPConv(width, img_channels, kernel=[3, 3])

        # Embedding of the level at which a step of a two-time network ends. Its gain starts at 0, so that the network
        # starts as the denoiser that it is made from.
        self.end_fourier = self.end_noise = None
        if two_time:
            self.end_fourier = MPFourier(noise_channels)
            self.end_noise = MPConv(noise_channels, self.emb_channels, kernel=[])
            self.end_gain = Parameter(torch.zeros([]))

    def _add(self, part, res, what, in_channels, out_channels, **kwargs):
        """Append a block to the encoder or decoder, with dropout only at `dout_resolutions`."""
        dropped = self.dout_resolutions is None or res in self.dout_resolutions
        kwargs |= dict(self.block_kwargs, flavor=part, dropout=self.dropout if dropped else 0)
        block = Block(in_channels, out_channels, self.emb_channels, **kwargs)
        getattr(self, part)[f'{res}x{res}_{what}'] = block

    def dropout_masks(self, batch_size, generator=None):
        """Masks for one pass: {block name: [N, C, H, W] bool, true where kept}, empty without dropout.

        Two passes with the same masks have the same dropout bit for bit, whatever the precision or compiler.
        """
        device, masks = self.out_gain.device, {}
        for part in ('enc', 'dec'):
            # At the block's output resolution, where dropout acts.
            for name, block in getattr(self, part).items():
                if getattr(block, 'dropout', 0):
                    res = int(name.partition('x')[0])
                    shape = [batch_size, block.out_channels, res, res]
                    masks[f'{part}.{name}'] = keep_mask(shape, 1 - block.dropout, device, generator)
        return masks

    def _run(self, block, x, emb, mask):
        """Output of a layer of the main path: `block(x, emb, mask)` for a residual block, else `block(x)`."""
        if not isinstance(block, Block):
            return block(x)
        if self.checkpoint_activations and torch.is_grad_enabled():
            draws = mask is None and block.dropout > 0
            return checkpoint(block, x, emb, mask, use_reentrant=False, preserve_rng_state=draws)
        return block(x, emb, mask)

    def _embed(self, noise_labels, class_labels, end_labels):
        emb = self.emb_noise(self.emb_fourier(noise_labels))
        if self.emb_label is not None:
            # A one-hot vector times the root of its length has unit variance.
            of_label = self.emb_label(class_labels * math.sqrt(class_labels.shape[1]))
            emb = mp_sum(emb, of_label, t=self.label_balance)
        if self.end_noise is not None:
            emb = emb + self.end_noise(self.end_fourier(end_labels), gain=self.end_gain)
        return mp_silu(emb)

    def forward(self, x, noise_labels, class_labels, dropout_masks=None, end_labels=None):
        masks = dropout_masks or {}
        emb = self._embed(noise_labels, class_labels, end_labels)

        # Encoder, with a constant channel in place of biases.
        x, skips = torch.cat([x, torch.ones_like(x[:, :1])], dim=1), []
        for name, block in self.enc.items():
            x = self._run(block, x, emb, masks.get(f'enc.{name}'))
            skips.append(x)

        # Decoder.
        for name, block in self.dec.items():
            if '_block' in name:
                x = mp_cat(x, skips.pop(), t=self.concat_balance)
            x = self._run(block, x, emb, masks.get(f'dec.{name}'))
        return self.out_conv(x, gain=self.out_gain)


# ----------------------------------------------------------------------------
# Preconditioning: D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), as in EDM.


def end_labels(r, x, sigma_data):
    """What a two-time network embeds of the level `r` where a step ends: its angle atan(r / sigma_data), from 0 to
    pi/2, [N]."""
    if r is None:
        raise ValueError(
            'this is a two-time network: give the noise level at which the step ends too, as net(x, sigma, '
            'class_labels, r=r); 0 gives the image'
        )
    return (torch.as_tensor(r, device=x.device).to(x.dtype).flatten() / sigma_data).atan()


@persistent
class Precond(Module):
    """EDM's preconditioning (Karras et al. 2022, Eq. 7) around EDM2's U-Net, with its estimate of the loss's
    log-variance.

    D(x; boundary) = x. The boundary is 0 for denoisers, sigma_min for consistency models (Song et al. 2023,
    Appendix C). `model_kwargs`: see `UNet`. `channels_last` sets the memory format inside.
    """

    channels_last = False
    forces_unit_weights = True  # False: the training loop does

    def __init__(
        self, img_resolution, img_channels, label_dim, use_fp16=True, sigma_data=0.5, logvar_channels=128,
        boundary=0, **model_kwargs
    ):  # fmt: skip
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.use_fp16, self.use_bf16 = use_fp16, False
        self.sigma_data, self.boundary, self.sigma_min, self.sigma_max = sigma_data, boundary, 0, float('inf')
        self.unet = UNet(img_resolution, img_channels, label_dim, **model_kwargs)
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = MPConv(logvar_channels, 1, kernel=[])

    @property
    def model(self):
        """The U-Net, under the name that it has in all our networks."""
        return self.unet

    @property
    def two_time(self):
        """Whether the network also takes the level at which a step ends."""
        return self.unet.end_noise is not None

    def forward(
        self, x, sigma, class_labels=None, force_fp32=False, return_logvar=False, augment_labels=None,
        r=None, **model_kwargs
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
            model_kwargs: `dropout_masks`.
        Returns: [N, C, H, W] FP32, or FP64 if the weights are. With `return_logvar` a pair: that, and the
            log-variance of the loss u(sigma), [N, 1, 1, 1] (Eq. 21).
        Raises: ValueError for augmentation labels, which EDM2 does not have, for a two-time network without `r`, or
            another one with it.
        """
        if augment_labels is not None:
            raise ValueError('EDM2 networks take no augmentation labels')

        # Precision outside and inside of the U-Net.
        full = inner = torch.promote_types(self.unet.out_gain.dtype, torch.float32)
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
            class_labels = torch.zeros([1, self.label_dim], device=x.device, dtype=full)
        else:
            class_labels = class_labels.to(full).reshape(-1, self.label_dim)

        if self.two_time:
            model_kwargs['end_labels'] = end_labels(r, x, self.sigma_data)
        elif r is not None:
            raise ValueError('this network is given one noise level, and no r')

        # The U-Net at unit variance.
        # Blocks expect inputs of unit variance: divide by the deviation of x at this level.
        total = sigma**2 + self.sigma_data**2
        c_noise = sigma.flatten().log() / 4
        if self.training and torch.is_grad_enabled() and self.forces_unit_weights:
            for part in (self.unet, self.logvar_linear) if return_logvar else (self.unet,):
                force_unit_weights(part)
        scaled = (x / total.sqrt()).to(inner)
        if self.channels_last:
            scaled = scaled.clone(memory_format=torch.channels_last)
        out = self.unet(scaled, c_noise, class_labels, **model_kwargs)

        # D(x; sigma) = c_skip x + c_out F.
        above = sigma - self.boundary
        c_skip = self.sigma_data**2 / (above**2 + self.sigma_data**2)
        c_out = above * self.sigma_data / total.sqrt()
        denoised = c_skip * x + c_out * out.to(full)
        if return_logvar:
            return denoised, self.logvar_linear(self.logvar_fourier(c_noise)).reshape(-1, 1, 1, 1)
        return denoised

    def dropout_masks(self, batch_size, generator=None):
        """See `UNet.dropout_masks`."""
        return self.unet.dropout_masks(batch_size, generator)

    def round_sigma(self, sigma):
        """`sigma`, because the network was trained at all noise levels."""
        return torch.as_tensor(sigma)


PRECONDS = {Precond.__name__: Precond}
