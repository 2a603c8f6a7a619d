"""Untrained teachers of every kind, with weights that all matter."""

import torch

from training import networks
from training.checkpoint import save_snapshot
from training.networks import edm2 as networks_edm2

DIGITS = dict(img_resolution=8, img_channels=1, label_dim=10)
ADM = dict(
    model_type='DhariwalUNet', model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4]
)
DDPMPP = dict(
    model_type='SongUNet', model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4]
)
NCSNPP = dict(
    DDPMPP,
    embedding_type='fourier',
    channel_mult_noise=2,
    encoder_type='residual',
    resample_filter=[1, 3, 3, 1],
)
EDM2 = dict(model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], channels_per_head=16)

TEACHERS = {
    'EDM ADM': lambda: networks.EDMPrecond(**DIGITS, **ADM),
    'DDPM++ with augmentation labels': lambda: networks.EDMPrecond(**DIGITS, **DDPMPP, augment_dim=9),
    'VP': lambda: networks.VPPrecond(**DIGITS, **DDPMPP),
    'VE': lambda: networks.VEPrecond(**DIGITS, **NCSNPP),
    'iDDPM': lambda: networks.iDDPMPrecond(**DIGITS, **ADM),
    'EDM2': lambda: networks_edm2.Precond(**DIGITS, **EDM2, use_fp16=False),
    "OpenAI's, converted": lambda: networks.CMPrecond(**DIGITS, **ADM),
}


def new_teacher(make, path):
    """A snapshot with random weights in every layer, those that start at zero included."""
    torch.manual_seed(0)
    net = make()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    save_snapshot(path, net, objective='diffusion')
    return net
