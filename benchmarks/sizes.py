"""Networks for benchmarks, by name, with random weights, and their numbers of operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from dnnlib import EasyDict
from training.checkpoint import NETWORKS


@dataclass(frozen=True)
class Size:
    """A network, and how much work with it suits a device.

    Attributes:
        title: name in headings.
        resolution, channels, classes: shape of its images, number of classes.
        batch, steps: batch size and number of steps to time on a GPU.
        cpu_batch, cpu_steps: the same on a CPU.
        large: whether to compile it on GPUs only.
        network: keyword arguments of the network.
        class_name: its class (`training.checkpoint.NETWORKS`).
    """

    title: str
    resolution: int
    channels: int
    classes: int
    batch: int
    cpu_batch: int
    steps: int
    cpu_steps: int
    large: bool
    network: dict
    class_name: str = 'EDMPrecond'

    @property
    def description(self) -> EasyDict:
        """The network {class_name, kwargs}, as in a run's configuration."""
        shape = dict(img_resolution=self.resolution, img_channels=self.channels, label_dim=self.classes)
        return EasyDict(class_name=self.class_name, kwargs=shape | self.network)

    def build(self, **kwargs) -> torch.nn.Module:
        return NETWORKS[self.class_name](**self.description.kwargs, **kwargs)

    def batch_on(self, device: torch.device) -> int:
        return self.batch if device.type == 'cuda' else self.cpu_batch

    def steps_on(self, device: torch.device) -> int:
        return self.steps if device.type == 'cuda' else self.cpu_steps


SIZES = {
    'demo': Size(
        "the demo's network",
        8,
        1,
        10,
        batch=128,
        cpu_batch=128,
        steps=40,
        cpu_steps=40,
        large=False,
        network=dict(
            model_type='DhariwalUNet',
            model_channels=16,
            channel_mult=[1, 2],
            num_blocks=1,
            attn_resolutions=[],
            dropout=0,
        ),
    ),
    'cifar10-ddpmpp': Size(
        'CIFAR-10 DDPM++',
        32,
        3,
        10,
        batch=256,
        cpu_batch=8,
        steps=20,
        cpu_steps=3,
        large=True,
        network=dict(model_type='SongUNet', model_channels=128, channel_mult=[2, 2, 2], dropout=0.13),
    ),
    'imagenet64-adm': Size(
        'ImageNet-64 ADM',
        64,
        3,
        1000,
        batch=64,
        cpu_batch=4,
        steps=10,
        cpu_steps=2,
        large=True,
        network=dict(
            model_type='DhariwalUNet',
            model_channels=192,
            channel_mult=[1, 2, 3, 4],
            dropout=0.2,
            dout_resolutions=[16, 8],
        ),
    ),
    'edm2-xxl': Size(
        'EDM2-XXL',
        64,
        4,
        1000,
        batch=64,
        cpu_batch=1,
        steps=10,
        cpu_steps=1,
        large=True,
        network=dict(model_channels=448, dropout=0.1),
        class_name='Precond',
    ),
}


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of a forward and a backward pass per image; a multiply-add counts as 2."""

    parameters: int
    forward: float
    backward: float

    def of_step(self, plain: float, differentiated: float) -> float:
        """Operations of `plain` forward passes without and `differentiated` with a backward pass."""
        return plain * self.forward + differentiated * (self.forward + self.backward)


def count_operations(net: torch.nn.Module, *inputs: torch.Tensor) -> Operations:
    """Count operations of matrix products and convolutions, on the meta device, where attention consists of
    matrix products too; others are negligible."""
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        net(*inputs)
    with FlopCounterMode(display=False) as both:
        net(*inputs).sum().backward()
    return Operations(
        sum(p.numel() for p in net.parameters()),
        forward.get_total_flops(),
        both.get_total_flops() - forward.get_total_flops(),
    )


def operations(size: Size) -> Operations:
    """Operations of the network of a size."""
    with torch.device('meta'):
        image = torch.zeros(1, size.channels, size.resolution, size.resolution)
        return count_operations(size.build(), image, torch.ones(1), torch.zeros(1, size.classes))
