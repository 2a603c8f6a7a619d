"""Latents for tests: a stand-in for a VAE, a tiny real one, latents on disk, a network of latents."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from training import networks
from training.checkpoint import save_snapshot

DEVIATIONS = torch.tensor([0.1, 0.2, 0.3, 0.4])  # of the stand-in's latents


class StandInVAE:
    """What the encoder asks of an AutoencoderKL: means are averages over 2x2 pixels and, as a fourth channel, their sum; decoding repeats them."""

    config = SimpleNamespace(latent_channels=4)

    def __init__(self):
        self.batches, self.seen = [], []

    def encode(self, x):
        self.seen.append(x)
        self.batches.append(len(x))
        colors = F.avg_pool2d(x, 2)
        mean = torch.cat([colors, colors.sum(1, keepdim=True)], dim=1)
        return SimpleNamespace(
            latent_dist=SimpleNamespace(mean=mean, std=DEVIATIONS.reshape(1, 4, 1, 1).expand_as(mean))
        )

    def decode(self, z):
        self.batches.append(len(z))
        return SimpleNamespace(sample=F.interpolate(z[:, :3], scale_factor=2))


def use_stand_in(monkeypatch) -> StandInVAE:
    """Puts a stand-in where the VAE would be loaded, so that diffusers is not needed."""
    vae = StandInVAE()
    monkeypatch.setattr('training.networks.encoders.load_vae', lambda name, device: vae)
    return vae


def save_vae(folder) -> str:
    """A tiny random AutoencoderKL that halves the sides, saved as diffusers saves; its folder. Skips the test without diffusers."""
    diffusers = pytest.importorskip('diffusers')
    torch.manual_seed(0)
    blocks = dict(
        down_block_types=['DownEncoderBlock2D'] * 2,
        up_block_types=['UpDecoderBlock2D'] * 2,
        block_out_channels=[8, 8],
    )
    diffusers.AutoencoderKL(
        **blocks, norm_num_groups=4, layers_per_block=1, latent_channels=4
    ).save_pretrained(folder)
    return str(folder)


def npy(values) -> bytes:
    data = io.BytesIO()
    np.save(data, values)
    return data.getvalue()


def random_latents(count, channels=8, size=4, seed=0):
    return np.random.default_rng(seed).standard_normal([count, channels, size, size]).astype(np.float32)


def save_latent_network(path, encoder=None, **metadata) -> str:
    """A snapshot of a tiny random network of 4 channels and 8x8; `encoder` without class_name: the rest of a StabilityVAEEncoder's record."""
    torch.manual_seed(0)
    net = networks.EDMPrecond(
        8,
        4,
        0,
        model_type='DhariwalUNet',
        model_channels=16,
        channel_mult=[1],
        num_blocks=1,
        attn_resolutions=[],
    )
    torch.nn.init.normal_(net.model.out_conv.weight, std=0.1)
    save_snapshot(path, net, encoder={'class_name': 'StabilityVAEEncoder', **(encoder or {})}, **metadata)
    return str(path)
