"""Conversion between what a data set stores and what a network sees: pixels, or latents of a VAE, as in EDM2
(Karras et al. 2024).

    pixels  --encode_pixels-->  raw  --encode_latents-->  final  --decode_levels-->  levels  --to_pixels-->
    pixels

*Pixels* are uint8 [N, C, H, W]. *Raw* is what a data set stores: the pixels themselves, or mean and standard
deviation of a VAE's latent distribution. *Final* is what the network is trained on and generates: pixels in
[-1, 1], or latents of about zero mean and standard deviation sigma_data. *Levels* are gray levels 0 ... 255
in floating point, the last form in which non-finite numbers can be detected; `decode` takes both steps.

Class names and constructor arguments are those of EDM2's snapshots. A snapshot carries this file's source in
its `encoder` entry, so the file imports nothing but the standard library, numpy, torch and
`torch_utils.persistence`; functions import diffusers and our own modules.
"""

import functools
import inspect

import numpy as np
import torch

from torch_utils.persistence import persistent_class

# ----------------------------------------------------------------------------
# Encoders. `init(device)` prepares for pixels on a device; `noise_shape` is the shape of the noise that makes
# `encode_latents` a pure function.


@persistent_class
class StandardRGBEncoder:
    """Pixels: 0 ... 255 to [-1, 1] and back, rounded as in EDM. Needs no noise and no preparation."""

    def init(self, device):
        pass

    def noise_shape(self, raw_shape):
        return None

    def encode_pixels(self, pixels):
        return pixels

    def encode_latents(self, raw, noise=None):
        """uint8 [N, C, H, W] to float32 in [-1, 1]."""
        return raw.float() / 127.5 - 1

    def decode_levels(self, final):
        """[N, C, H, W] in [-1, 1] to floating-point gray levels, which `decode` casts."""
        return final * 127.5 + 128

    def decode(self, final):
        """[N, C, H, W] in [-1, 1] to uint8."""
        return to_pixels(self.decode_levels(final))


@persistent_class
class StabilityVAEEncoder:
    """Latents of a VAE, drawn from its distribution, then normalized per channel from raw statistics to final
    ones.

        final = (mean + std · noise - raw_mean) / raw_std · final_std + final_mean

    The VAE takes and returns pixels in 0 ... 1, not -1 ... 1. This is EDM2's convention, under which the
    default statistics were measured.

    Args:
        vae_name: folder or Hugging Face repository of a diffusers `AutoencoderKL`.
        raw_mean, raw_std: [C] statistics of the raw latents.
        final_mean, final_std: those of the final latents, one number or [C].
        batch_size: images that pass through the VAE at a time.
    """

    def __init__(
        self,
        vae_name='stabilityai/sd-vae-ft-mse',
        raw_mean=(5.81, 3.25, 0.12, -2.15),
        raw_std=(4.17, 4.62, 3.71, 3.28),
        final_mean=0,
        final_std=0.5,
        batch_size=8,
    ):
        # As one scale and bias per channel, in FP32 as in EDM2.
        # z · scale + bias = (z − raw_mean) / raw_std · final_std + final_mean.
        scale = np.float32(final_std) / np.float32(raw_std)
        bias = np.float32(final_mean) - np.float32(raw_mean) * scale
        if (
            bias.ndim != 1
            or scale.shape != bias.shape
            or not np.isfinite(bias).all()
            or not (scale > 0).all()
            or int(batch_size) < 1
        ):
            raise ValueError(
                'raw_mean and raw_std must be as long as each other, deviations and batch_size positive'
            )
        if not isinstance(vae_name, str):
            raise TypeError(f'vae_name is a {type(vae_name).__name__}, not a string')
        self.vae_name, self.batch_size, self.channels = vae_name, int(batch_size), len(scale)
        self.scale, self.bias = scale.tolist(), bias.tolist()  # float32 values

    def init(self, device):
        """Load the VAE. Raises: ImportError without diffusers; OSError, RuntimeError, ValueError if there is
        no VAE of these latents."""
        vae = load_vae(self.vae_name, torch.empty(0, device=device).device)  # 'cuda' becomes 'cuda:0'
        if vae.config.latent_channels != self.channels:
            raise ValueError(f'it has {vae.config.latent_channels} latent channels, not {self.channels}')

    def noise_shape(self, raw_shape):
        """Shape of one image's noise for raw latents of `raw_shape` [2 C, H, W]."""
        return (raw_shape[0] // 2, *raw_shape[1:])

    @torch.no_grad()
    def encode_pixels(self, pixels):
        """uint8 [N, 3, H, W] to float32 [N, 2 C, h, w]: mean and standard deviation of each latent."""
        vae = load_vae(self.vae_name, pixels.device)
        # In batches, because a VAE at full resolution needs much memory per image.
        parts = [vae.encode(part.float() / 255).latent_dist for part in pixels.split(self.batch_size)]
        return torch.cat([torch.cat([part.mean, part.std], dim=1) for part in parts])

    def encode_latents(self, raw, noise=None):
        """Raw latents [N, 2 C, h, w] and standard normal `noise` [N, C, h, w] (None: drawn here) to final
        latents, float32."""
        # [N, C, h, w] each.
        mean, std = raw.float().chunk(2, dim=1)
        latents = mean + std * (torch.randn_like(mean) if noise is None else noise)
        return latents * per_channel(self.scale, latents) + per_channel(self.bias, latents)

    @torch.no_grad()
    def decode_levels(self, final):
        """Final latents [N, C, h, w] to floating-point gray levels [N, 3, H, W], which `decode` casts."""
        # Inverse of the normalization in `encode_latents`.
        vae, final = load_vae(self.vae_name, final.device), final.float()
        latents = (final - per_channel(self.bias, final)) / per_channel(self.scale, final)
        parts = [vae.decode(part).sample for part in latents.split(self.batch_size)]
        return torch.cat(parts).float() * 255

    def decode(self, final):
        """Final latents [N, C, h, w] to uint8 [N, 3, H, W], truncated as in EDM2, not rounded."""
        return to_pixels(self.decode_levels(final))


def to_pixels(levels):
    """Gray levels, clipped to 0 ... 255, as uint8. Non-finite values become arbitrary levels, so check for
    them first."""
    return levels.clip(0, 255).to(torch.uint8)


def per_channel(values, like):
    """[1, C, 1, 1] constants beside `like`."""
    # Filled on the device, because a copy from the host would synchronize.
    return torch.stack([like.new_full([], value) for value in values]).reshape(1, -1, 1, 1)


@functools.lru_cache(maxsize=1)
def load_vae(vae_name, device):
    """The VAE, from a folder, from the local cache of Hugging Face, or downloaded into it. Reads safetensors
    only, never pickles."""
    from diffusers import AutoencoderKL

    load = functools.partial(
        AutoencoderKL.from_pretrained, vae_name, use_safetensors=True, low_cpu_mem_usage=False
    )

    # A cached VAE is used without asking the server for a newer one.
    try:
        vae = load(local_files_only=True)
    except OSError:
        vae = load()
    return vae.eval().requires_grad_(False).to(device)


# ----------------------------------------------------------------------------
# Encoders as plain data: dict(class_name=..., **constructor arguments), or None for pixels. A network's
# metadata, the configuration of a run and the dataset.json of latents hold such records.

ENCODERS = {cls.__name__: cls for cls in (StandardRGBEncoder, StabilityVAEEncoder)}
HINT = '; generate.py --latents writes latents as they are'


def record(class_name, args=(), kwargs=()):
    """The record of an encoder's class and constructor arguments; for an unknown class, only its name."""
    if class_name == 'StandardRGBEncoder':
        return None
    if class_name not in ENCODERS:
        return dict(class_name=class_name)
    # Positional arguments by their names, so that a record does not depend on their order.
    names = inspect.signature(ENCODERS[class_name]).parameters
    return {'class_name': class_name, **dict(zip(names, args)), **dict(kwargs)}


def record_of(encoder):
    """The record of an encoder."""
    return record(type(encoder).__name__, encoder.init_args, encoder.init_kwargs)


def build(record, device=None):
    """The encoder of a record, ready for pixels if a device is given. Raises: UserError."""
    from dnnlib import UserError

    arguments = dict(record or dict(class_name='StandardRGBEncoder'))
    class_name = str(arguments.pop('class_name', None))
    if class_name not in ENCODERS:
        raise UserError(
            f'The encoder {class_name!r} is none that we know ({", ".join(ENCODERS)}), so there is no way '
            f'from or to its latents{HINT}'
        )
    try:
        # The arguments are those of a file, and may be anything.
        encoder = ENCODERS[class_name](**arguments)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f'The encoder {class_name} cannot be built from the arguments that are recorded for it: {error}'
        ) from error
    if device is not None:
        make_ready(encoder, device, HINT)
    return encoder


def make_ready(encoder, device, hint=''):
    """`encoder.init(device)`. Raises: UserError, whose message ends in `hint`, if diffusers or the VAE's
    weights are missing."""
    from dnnlib import UserError

    try:
        encoder.init(device)
    except ImportError as error:
        raise UserError(
            f'The VAE {encoder.vae_name} needs the diffusers package ({error}): pip install diffusers{hint}'
        ) from error
    except (OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f'The VAE {encoder.vae_name} cannot be loaded ({reason}): connect to the Hugging Face hub, or '
            f'name a folder that AutoencoderKL.save_pretrained wrote{hint}'
        ) from error


def encoder_of(net, device=None):
    """The encoder of a loaded network, ready to decode if a device is given. Raises: UserError."""
    from dnnlib import UserError

    encoder = build(getattr(net, 'metadata', {}).get('encoder'))

    # The channels that the encoder decodes must be those that the network makes.
    if net.img_channels not in ([1, 3] if isinstance(encoder, StandardRGBEncoder) else [encoder.channels]):
        raise UserError(
            f'The network makes images of {net.img_channels} channels, which its {type(encoder).__name__} '
            f'cannot decode{HINT}'
        )
    if device is not None:
        make_ready(encoder, device, HINT)
    return encoder


def for_dataset(dataset, teacher=None):
    """(encoder, channels of the network) for a data set. Latents are encoded as recorded by the teacher, else
    by the data set.

    Raises: UserError if the data set's channels are not the encoder's.
    """
    from dnnlib import UserError

    if not dataset.holds_latents:
        return StandardRGBEncoder(), dataset.num_channels
    # A student continues on its teacher's latents.
    taught = teacher.metadata.get('encoder') if teacher is not None else None
    encoder = build(taught or dataset.encoder or dict(class_name='StabilityVAEEncoder'))
    if isinstance(encoder, StandardRGBEncoder) or dataset.num_channels != 2 * encoder.channels:
        raise UserError(
            f'The latents of {dataset.name} have {dataset.num_channels} channels, which '
            f'{type(encoder).__name__} does not take: make them with dataset_tool.py --encode-vae'
        )
    return encoder, encoder.channels
