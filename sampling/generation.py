"""From seeds to 8-bit images or latents."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.label_space import LabelSpace, space_of
from dnnlib import NotFinite, UserError, cli
from dnnlib.text import as_ranges
from sampling import writers
from training import samplers
from training.networks import encoders

LabelChooser = Callable[['SeededNoise', int], Tensor]


# ----------------------------------------------------------------------------
# Random numbers and labels, by seed.


class SeededNoise:
    """Random numbers for a batch of images, each from its own generator.

    So an image depends only on its seed, not on its batch. The order of draws is EDM's: latents, then the
    label, then churn noise. Seeds are below 2^32.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str):
        self.device = torch.device(device)
        if beyond := [seed for seed in seeds if not 0 <= seed < cli.SEED_COUNT]:
            raise ValueError(f'there is no seed {beyond[0]}: seeds are from 0 to 2^32 - 1')
        self.seeds = [int(seed) for seed in seeds]
        self.generators = [torch.Generator(self.device).manual_seed(seed) for seed in self.seeds]

    def randn(self, shape: Sequence[int], dtype=torch.float32) -> Tensor:
        """[len(seeds), *shape] standard normal."""
        return torch.stack(
            [torch.randn(*shape, generator=g, device=self.device, dtype=dtype) for g in self.generators]
        )

    def randn_like(self, x: Tensor) -> Tensor:
        """Standard normal in the shape and type of `x` [len(seeds), ...]."""
        return self.randn(x.shape[1:], x.dtype)

    def randint(self, high: int) -> Tensor:
        """[len(seeds)] int64, uniform in 0 ... high − 1."""
        return torch.stack(
            [torch.randint(high, [], generator=g, device=self.device) for g in self.generators]
        )


def uniform_labels(noise: SeededNoise, label_dim: int, classes: Sequence[int] | None = None) -> Tensor:
    """One-hot labels [N, label_dim], uniform over `classes` (None: all), from the images' own seeds."""
    if classes is None:
        indices = noise.randint(label_dim)
    else:
        indices = torch.tensor(classes, device=noise.device)[noise.randint(len(classes))]
    return torch.nn.functional.one_hot(indices, label_dim).float()


def uniform_over(space: LabelSpace, network: str = 'the network') -> LabelChooser:
    """A chooser of classes, uniform over those that have images.

    Raises: UserError, naming `network`, if labels are vectors.
    """
    if space.are_vectors:
        raise UserError(
            f'{network} takes {space}, which are not drawn uniformly: give --labels=data, for those of its '
            'training set, or --labels=FILE.npy'
        )
    return (
        uniform_labels if space.present is None else functools.partial(uniform_labels, classes=space.present)
    )


def fixed_labels(class_idx: int) -> LabelChooser:
    """A chooser that gives every image the class `class_idx`."""

    def choose(noise, label_dim):
        # Draw a label anyway, as EDM does: churn noise comes after it.
        labels = torch.zeros_like(uniform_labels(noise, label_dim))
        labels[:, class_idx] = 1
        return labels

    return choose


# ----------------------------------------------------------------------------
# Samples, checked for finite values.


def draw_start(
    net, seeds: Sequence[int], choose_labels: LabelChooser | None = None
) -> tuple[SeededNoise, Tensor, Tensor | None]:
    """(random numbers, latents [N, C, H, W] of unit variance, labels [N, label_dim] or None) of the seeds, on the
    network's device; the order of draws is EDM's, latents first.

    Args: as of `generate_latents`.
    """
    noise = SeededNoise(seeds, next(net.parameters()).device)
    latents = noise.randn([net.img_channels, net.img_resolution, net.img_resolution])
    choose_labels = choose_labels or uniform_over(space_of(net))
    return noise, latents, choose_labels(noise, net.label_dim) if net.label_dim else None


@torch.no_grad()
def generate_latents(
    net, seeds: Sequence[int], choose_labels: LabelChooser | None = None, solver=None, steps=None, **options
) -> Tensor:
    """Outputs of the network for the given seeds, [N, C, H, W] float64 on its device, before decoding.

    Args:
        choose_labels: None for classes, uniformly over those that have images in the network's training set.
        solver, steps, options: see `samplers.sample`.
    Raises: UserError if `choose_labels` is None and the network takes label vectors.
    """
    noise, latents, labels = draw_start(net, seeds, choose_labels)
    return samplers.sample(net, latents, labels, solver, steps, randn_like=noise.randn_like, **options)


class Checked(NamedTuple):
    """Images, or latents, and which of them are finite; on the device, without synchronization.

    Attributes:
        values: [N, C, H, W].
        finite: [N] bool, whether all of an image's values were finite, in the output and in `values`.
    """

    values: Tensor
    finite: Tensor


def all_finite(values: Tensor) -> Tensor:
    """[N] bool: which of the images [N, ...] have only finite values."""
    return values.isfinite().flatten(1).all(dim=1)


def checked_images(encoder, drawn: Tensor) -> Checked:
    """Outputs of a network, [N, C, H, W], decoded to images uint8 [N, C', H', W']."""
    # Check before the conversion to 8 bits, which hides NaN.
    levels = encoder.decode_levels(drawn)
    return Checked(encoders.to_pixels(levels), all_finite(drawn) & all_finite(levels))


def checked_latents(drawn: Tensor) -> Checked:
    """Outputs of a network, [N, C, H, W], as float32."""
    values = drawn.float()
    return Checked(values, all_finite(values))


def generate_checked(
    net, seeds: Sequence[int], choose_labels: LabelChooser | None = None, solver=None, steps=None, **options
) -> Checked:
    """Images of the given seeds, uint8 on the network's device, decoded by its encoder.

    Args: see `generate_latents`.
    Raises: UserError if the network's images cannot be decoded.
    """
    encoder = encoders.encoder_of(net, next(net.parameters()).device)
    return checked_images(encoder, generate_latents(net, seeds, choose_labels, solver, steps, **options))


def generate_batch(
    net, seeds: Sequence[int], choose_labels: LabelChooser | None = None, solver=None, steps=None, **options
) -> Tensor:
    """The images of `generate_checked`, [N, C, H, W] uint8. Synchronizes with the device.

    Raises: NotFinite if any is not finite; UserError if the network's images cannot be decoded.
    """
    return finite_images([generate_checked(net, seeds, choose_labels, solver, steps, **options)], seeds)


def finite_images(batches: Sequence[Checked], seeds: Sequence[int]) -> Tensor:
    """Concatenate the images of batches, [N, C, H, W]. Synchronizes with the device.

    Raises: NotFinite if any is not finite.
    """
    # Joined on the device: one copy to the host shows all batches.
    images, finite = (torch.cat(tensors) for tensors in zip(*batches))
    if bad := [seed for seed, is_finite in zip(seeds, finite.tolist()) if not is_finite]:
        raise NotFinite(nonfinite_seeds(bad, len(seeds)), nonfinite=len(bad))
    return images


def nonfinite_seeds(bad: Sequence[int], count: int, what: str = 'images') -> str:
    """A clause that names the `bad` seeds, of `count`, whose images are not finite."""
    one = len(bad) == 1
    return (
        f'{len(bad)} of {count} {what} {"is" if one else "are"} not finite (NaN or infinite values), '
        f'of seed{"s" * (not one)} {as_ranges(sorted(bad), limit=20)}'
    )


# ----------------------------------------------------------------------------
# Checks before sampling, batches, and images on their way to files.


class IdentityDenoiser:
    """D = x, with the attributes of a network."""

    def __init__(self, net):
        self._net = net

    def __getattr__(self, name):
        return getattr(self._net, name)

    def __call__(self, x, sigma, class_labels, **end):
        return x


def validate_arguments(net, choose_labels: LabelChooser | None = None, **arguments) -> None:
    """Sample a pixel by an identity denoiser, with the arguments of `generate_latents`.

    Raises: UserError if the options do not fit the network.
    """
    samplers.sample(IdentityDenoiser(net), torch.zeros(1, net.img_channels, 1, 1), **arguments)


class RecordedLabels:
    """Wraps a chooser and records its labels on the device: classes by index, vectors as they are."""

    def __init__(self, choose_labels: LabelChooser):
        self._choose_labels, self._chosen = choose_labels, []
        self._are_vectors = getattr(choose_labels, 'are_vectors', False)

    def __call__(self, noise: SeededNoise, label_dim: int) -> Tensor:
        labels = self._choose_labels(noise, label_dim)
        # Kept on the device: a copy for each batch would wait for it.
        self._chosen.append(labels if self._are_vectors else labels.argmax(dim=1))
        return labels

    def tolist(self) -> list[int] | list[list[float]]:
        """The labels of all images so far. Synchronizes with the device."""
        return torch.cat(self._chosen).tolist() if self._chosen else []


def split_batches(items: Sequence, batch: int, rank: int = 0, world_size: int = 1) -> Iterator[Sequence]:
    """This process's batches of at most `batch` items; batch k goes to process k mod world_size."""
    for start in range(rank * batch, len(items), world_size * batch):
        yield items[start : start + batch]


def save_images(images: Tensor, paths: Sequence[str]) -> None:
    """Write uint8 images [N, C, H, W], gray or RGB, to PNG files, atomically; folders are created.

    Raises: UserError if a file cannot be written.
    """
    writers.write_images(images.permute(0, 2, 3, 1).cpu().numpy(), paths)


def save_picture(picture: Tensor, path: str) -> None:
    """Write a uint8 picture [C, H, W] like `save_images`, a small one enlarged to some 256 pixels.

    The factor is a whole number, so that pixels stay square.
    """
    # By the nearest pixel, as every value has to be seen.
    zoom = max(256 // picture.shape[-1], 1)
    save_images(picture.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)[None], [path])


class HostCopy:
    """Asynchronous device-to-host copy of tensors."""

    def __init__(self, *tensors: Tensor):
        # Only copies into pinned memory are asynchronous.
        self._arrived, self._tensors = None, tensors
        if tensors[0].is_cuda:
            self._tensors = [
                torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
                for t in tensors
            ]
            # The event marks the copies as done, which were queued before it.
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def numpy(self) -> list[np.ndarray]:
        """The values. Waits for the copy."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [tensor.numpy() for tensor in self._tensors]


def image_grid(images: Tensor, columns: int) -> Tensor:
    """uint8 images [N, C, H, W] as one picture [C, rows × H, columns × W]; N is a multiple of `columns`."""
    # [rows, columns, C, H, W] to [C, rows, H, columns, W], whose axes then join in pairs.
    n, c, h, w = images.shape
    return (
        images.reshape(n // columns, columns, c, h, w)
        .permute(2, 0, 3, 1, 4)
        .reshape(c, n // columns * h, columns * w)
    )
