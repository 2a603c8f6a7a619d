"""A network's images as a source, like a folder's: generated when they are read, written only on request."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from metrics.images import prefetch
from sampling import generation
from sampling.writers import FolderDestination
from training.networks import encoders


class GeneratedImages:
    """Images of a network, one for each seed; a source as in metrics/images.py.

    Args:
        net: network, on its device.
        seeds: of the images.
        batch: images per evaluation of the network; a smaller last batch is padded, so that it runs like the
            others.
        choose_labels, solver, steps, options: as for `generation.generate_batch`.
        name: for messages.
        identity: what decides the images besides the seeds, for `fingerprint`.
        dump: folder for the images, `<seed>.png`, those that are finite; None: they are not written.
    """

    def __init__(
        self,
        net,
        seeds: Sequence[int],
        batch: int,
        choose_labels: generation.LabelChooser | None = None,
        solver: str | None = None,
        steps: int | None = None,
        name: str = 'network',
        identity: str = '',
        dump: str | None = None,
        **options,
    ):
        self.net, self.seeds, self.size = net, seeds, batch
        self.name, self.identity, self.dump = name, identity, dump
        self.total = len(seeds)
        self.skipped: dict[int, str] = {}
        self.unturned: dict[int, int] = {}
        self._finite: dict[int, generation.HostCopy] = {}  # of each batch, by its first image
        self.arguments = dict(choose_labels=choose_labels, solver=solver, steps=steps, **options)

    @functools.cached_property
    def image_shape(self) -> list[int]:
        """[C, H, W], found by decoding. Raises: UserError where the network's images cannot be decoded."""
        device = next(self.net.parameters()).device
        latents = torch.zeros(
            [1, self.net.img_channels, self.net.img_resolution, self.net.img_resolution], device=device
        )
        return list(encoders.encoder_of(self.net, device).decode(latents).shape[1:])

    def __len__(self) -> int:
        return len(self.seeds)

    def fingerprint(self) -> str:
        """Changes with whatever changes the images."""
        return f'{self.identity} {list(self.seeds)}'

    def batch(self, indices: range) -> tuple[Tensor, list[int]]:
        """Images [n, C, H, W] uint8 on the network's device, and their places among the seeds."""
        seeds = [self.seeds[i] for i in indices]
        images, finite = generation.generate_checked(
            self.net, seeds + seeds[-1:] * (self.size - len(seeds)), **self.arguments
        )
        images, self._finite[indices.start] = images[: len(seeds)], generation.HostCopy(finite[: len(seeds)])
        if self.dump:
            self._write(images, seeds, self.nonfinite(indices))
        return images, list(indices)

    def _write(self, images: Tensor, seeds: Sequence[int], bad: Sequence[int]) -> None:
        """Into the folder, those that are finite."""
        folder = FolderDestination(self.dump)
        out = {self.seeds[i] for i in bad}
        folder.leave_out(sorted(out))
        kept = [i for i, seed in enumerate(seeds) if seed not in out]
        generation.save_images(images[kept], [folder.path_of(seeds[i]) for i in kept])

    def nonfinite(self, indices: range) -> list[int]:
        """The places among the seeds, in a batch that was made here, of images that were not finite. Waits
        for the device."""
        if indices.start not in self._finite:
            return []
        (finite,) = self._finite[indices.start].numpy()
        return [i for i, is_finite in zip(indices, finite.tolist()) if not is_finite]

    def describe_nonfinite(self, places: Sequence[int]) -> str:
        """A sentence that names the seeds at these places."""
        found = generation.nonfinite_seeds([self.seeds[i] for i in places], len(self.seeds))
        return (
            f'{self.name}: {found}. There is no measure of such images: the network is broken for them, or '
            'overflows with these sampling options or in this precision. generate.py with the same options '
            'writes the others.'
        )

    def stream(self, parts: Sequence[range], workers: int = 0) -> Iterator[tuple[range, Tensor, list[int]]]:
        """(part, images, indices) of each part, one after another: the network is busy anyway."""
        return prefetch(self, parts, workers=0)
