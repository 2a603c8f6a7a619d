"""From seeds to 8-bit images or latents: what generate.py, validation and the demo share."""
from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dnnlib import UserError
from dnnlib.util import atomic_write
from training import encoders, samplers

LabelChooser = Callable[['SeededNoise', int], Tensor]


class SeededNoise:
    """Random numbers for a batch of images, each from its own generator: an image depends on its seed alone, not on its batch.

    The order of draws is EDM's: latents, then the label, then churn noise.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str):
        self.device = torch.device(device)
        self.generators = [torch.Generator(self.device).manual_seed(int(seed) % (1 << 32)) for seed in seeds]

    def randn(self, shape: Sequence[int], dtype=torch.float32) -> Tensor:
        """[len(seeds), *shape] standard normal."""
        return torch.stack([torch.randn(*shape, generator=g, device=self.device, dtype=dtype) for g in self.generators])

    def randn_like(self, x: Tensor) -> Tensor:
        """Standard normal in the shape and type of `x` [len(seeds), ...]."""
        return self.randn(x.shape[1:], x.dtype)

    def randint(self, high: int) -> Tensor:
        """[len(seeds)] int64, uniform in 0 ... high − 1."""
        return torch.stack([torch.randint(high, [], generator=g, device=self.device) for g in self.generators])


def uniform_labels(noise: SeededNoise, label_dim: int) -> Tensor:
    """One-hot labels [N, label_dim], uniform, from the images' own seeds."""
    return torch.nn.functional.one_hot(noise.randint(label_dim), label_dim).float()


def fixed_labels(class_idx: int) -> LabelChooser:
    """A chooser that gives every image the class `class_idx`."""
    def choose(noise, label_dim):
        labels = torch.zeros_like(uniform_labels(noise, label_dim))  # drawn all the same, as in EDM: churn noise comes after it
        labels[:, class_idx] = 1
        return labels
    return choose


@torch.no_grad()
def generate_latents(net, seeds: Sequence[int], choose_labels: LabelChooser = uniform_labels, solver=None, steps=None, **options) -> Tensor:
    """What the network draws for the given seeds, [N, C, H, W] float64 on its device, before decoding. Options: see `samplers.sample`."""
    noise = SeededNoise(seeds, next(net.parameters()).device)
    latents = noise.randn([net.img_channels, net.img_resolution, net.img_resolution])
    labels = choose_labels(noise, net.label_dim) if net.label_dim else None
    return samplers.sample(net, latents, labels, solver, steps, randn_like=noise.randn_like, **options)


def generate_batch(net, seeds: Sequence[int], choose_labels: LabelChooser = uniform_labels, solver=None, steps=None, **options) -> Tensor:
    """Images of the given seeds, [N, C, H, W] uint8 on the network's device, decoded by its encoder. Arguments: see `generate_latents`.

    Raises: UserError where the network's images cannot be decoded.
    """
    encoder = encoders.encoder_of(net, next(net.parameters()).device)
    return encoder.decode(generate_latents(net, seeds, choose_labels, solver, steps, **options))


def split_batches(items: Sequence, batch: int, rank: int = 0, world_size: int = 1) -> Iterator[Sequence]:
    """This process's batches of at most `batch` items; batch k goes to process k mod world_size."""
    for start in range(rank * batch, len(items), world_size * batch):
        yield items[start:start + batch]


def save_images(images: Tensor, paths: Sequence[str]) -> None:
    """Write uint8 images [N, C, H, W], grey or RGB, to PNG files; their folders are made where needed.

    A file appears under its name when it is complete. Raises: UserError where it cannot be written.
    """
    for image, path in zip(images.permute(0, 2, 3, 1).cpu().numpy(), paths):
        with _complete_file(path) as file:
            Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(file, format='png')


def save_latents(latents: Tensor, paths: Sequence[str]) -> None:
    """Write latents [N, C, H, W] to `.npy` files, float32 [C, H, W], as `save_images` writes images."""
    for values, path in zip(latents.float().cpu().numpy(), paths):
        with _complete_file(path) as file:
            np.save(file, values)


@contextlib.contextmanager
def _complete_file(path: str) -> Iterator[BinaryIO]:
    """A file to write to, in a folder that is made where needed, which takes its name at the end."""
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    except OSError as error:
        raise UserError(f'{path} cannot be written: {error.strerror}') from error
    with atomic_write(path, durable=False) as file:
        yield file


def image_grid(images: Tensor, columns: int) -> Tensor:
    """uint8 images [N, C, H, W] as one picture [C, rows × H, columns × W]; N is a multiple of `columns`."""
    n, c, h, w = images.shape
    return images.reshape(n // columns, columns, c, h, w).permute(2, 0, 3, 1, 4).reshape(c, n // columns * h, columns * w)
