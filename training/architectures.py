"""The networks that --arch and --precond name, as plain data."""

from __future__ import annotations

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
                f'Warning: --{option} names {", ".join(missing)}, which this network does not have: its levels '
                f'are {", ".join(map(str, levels))}.'
            )
    return warnings


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
