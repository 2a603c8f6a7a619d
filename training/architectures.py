"""The networks that --arch and --precond name, as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping

# fmt: off
ARCHITECTURES = dict(
    ddpmpp=dict(model_type='SongUNet', embedding_type='positional', encoder_type='standard',
                decoder_type='standard', channel_mult_noise=1, resample_filter=[1, 1],
                model_channels=128, channel_mult=[2, 2, 2]),
    ncsnpp=dict(model_type='SongUNet', embedding_type='fourier', encoder_type='residual',
                decoder_type='standard', channel_mult_noise=2, resample_filter=[1, 3, 3, 1],
                model_channels=128, channel_mult=[2, 2, 2]),
    adm=dict(model_type='DhariwalUNet', model_channels=192, channel_mult=[1, 2, 3, 4]),
    edm2=dict(model_type='UNet', model_channels=192, channel_mult=[1, 2, 3, 4]),
)
# fmt: on
PRECONDITIONING = dict(edm='EDMPrecond', vp='VPPrecond', ve='VEPrecond')
EDM2 = 'Precond'  # EDM2's class: EDM's preconditioning around its own U-Net
BOUNDARY_CLASSES = ('EDMPrecond', 'CMPrecond', 'Precond')  # whose level of the identity can be chosen
# Change of c_noise, the network's input, as ln sigma rises by 1; at its largest for VP. iDDPM's is an index.
C_NOISE_RATES = dict(
    EDMPrecond=0.25, Precond=0.25, CMPrecond=250.0, VEPrecond=1.0, VPPrecond=200.0, iDDPMPrecond=math.inf
)
AUGMENT_DIM = 9  # labels of EDM's augmentation pipeline


def resolutions(network: Mapping) -> list[int]:
    """Resolutions of the levels of a network, {class_name, kwargs}, from the finest."""
    levels = len(network['kwargs'].get('channel_mult') or [1, 2, 3, 4])
    return [network['kwargs']['img_resolution'] >> level for level in range(levels)]


def missing_levels(network: Mapping) -> list[str]:
    """Warnings about resolutions of attention or dropout that no level of a network has."""
    levels, warnings = resolutions(network), []
    for option in ('attn_resolutions', 'dout_resolutions'):
        named = network['kwargs'].get(option) or []
        if missing := [str(res) for res in named if res not in levels]:
            warnings.append(
                f'Warning: --{option} names {", ".join(missing)}, which this network does not have: its '
                f'levels are {", ".join(map(str, levels))}.'
            )
    return warnings


def embedding_turns(network: Mapping) -> float:
    """Radians by which the fast features of the noise level turn in a network's embedding, as ln sigma rises by 1.

    The rate of its input c_noise times the frequency: 1 of positional embeddings, their deviation of Fourier features.
    Args:
        network: {class_name, kwargs}.
    """
    kwargs = network['kwargs']
    if network['class_name'] == EDM2:
        frequency = 2 * math.pi
    else:
        frequency = 2 * math.pi * 16 if kwargs.get('embedding_type') == 'fourier' else 1.0
    return C_NOISE_RATES[network['class_name']] * frequency


def name_of(class_name: str, kwargs: dict) -> tuple[str, str]:
    """(--arch, --precond) of a network. Raises: ValueError, which completes 'it ...', if there are none."""
    precond = {cls: name for name, cls in PRECONDITIONING.items()}.get(class_name, 'edm')
    for arch, known in ARCHITECTURES.items():
        if arch == 'edm2':
            if class_name == EDM2:
                return arch, precond
            continue
        # Sizes do not matter.
        fixed = {k: v for k, v in known.items() if k not in ('model_channels', 'channel_mult')}
        same = all(name in kwargs and kwargs[name] == value for name, value in fixed.items())
        if class_name in PRECONDITIONING.values() and same:
            return arch, precond
    raise ValueError(f'describes a network {class_name} that no --arch names')
