"""Statistics of a source of images: sizes, mean and standard deviation of pixels, classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data.conversion import Recipe, is_power_of_two, progress_bar, transformed
from data.label_space import Labels
from data.sources import Source

LISTED = 20  # sizes or classes that are printed
SIZE = '{0[0]}x{0[1]}'.format  # text of a width and height
CHANNELS = {'L': ('gray',), 'RGB': ('red', 'green', 'blue')}


class Statistics(NamedTuple):
    """Statistics of images as they would be written, in units where 8-bit values span [-1, 1].

    Attributes:
        images: number of images, without those that were skipped.
        skipped: number of images that cannot be read or are too small for the transform.
        resolution: width and height of all images after the transform; None if they differ.
        mode: 'L' or 'RGB'.
        sizes: number of images by (width, height) before the transform, the most frequent first.
        mean, std: over all values.
        channel_mean, channel_std: [C] each.
        labels: 'classes', 'vectors' or None; of classes their numbers of images and names, by index.
    """

    images: int
    skipped: int
    resolution: tuple[int, int] | None
    mode: str
    sizes: dict[tuple[int, int], int]
    mean: float
    std: float
    channel_mean: list[float]
    channel_std: list[float]
    labels: str | None
    class_images: list[int]
    class_names: list[str] | None

    def record(self) -> dict:
        """The statistics as JSON data."""
        return dict(
            self._asdict(),
            resolution=self.resolution and SIZE(self.resolution),
            sizes={SIZE(size): count for size, count in self.sizes.items()},
        )

    def lines(self) -> Iterator[str]:
        """The statistics as text."""
        # Images and their sizes.
        shape = f'of {SIZE(self.resolution)}' if self.resolution else 'of several sizes'
        skipped = f' ({self.skipped} skipped)' if self.skipped else ''
        yield f'Images:   {self.images} {"RGB" if self.mode == "RGB" else "grayscale"} {shape}{skipped}'
        sizes = [f'{SIZE(size)} ({count})' for size, count in self.sizes.items()]
        more = f', and {len(sizes) - LISTED} more sizes' if len(sizes) > LISTED else ''
        yield f'Sizes:    {", ".join(sizes[:LISTED])}{more}'
        if (
            self.resolution is None
            or self.resolution[0] != self.resolution[1]
            or not is_power_of_two(self.resolution[0])
        ):
            yield (
                'A data set needs one square size, a power of two: add --resolution, such as 64x64, and '
                '--transform=center-crop, also here.'
            )

        # Pixels.
        for name, value, channels in (
            ('Mean:    ', self.mean, self.channel_mean),
            ('Std:     ', self.std, self.channel_std),
        ):
            each = ', '.join(
                f'{channel} {number:.4f}' for channel, number in zip(CHANNELS[self.mode], channels)
            )
            yield f'{name} {value:.4f}' + (f' ({each})' if len(channels) > 1 else '')
        yield f'Pixels are in [-1, 1]; sigma_data is their standard deviation, {self.std:.2f}.'

        # Classes.
        if self.labels != 'classes':
            yield f'Labels:   {"vectors" if self.labels else "none"}'
            return
        yield f'Classes:  {len(self.class_images)}'
        names = self.class_names or [''] * len(self.class_images)
        for index, (name, count) in enumerate(zip(names, self.class_images[:LISTED])):
            yield f'  {index:>3}  {name:<12} {count:>8}' if name else f'  {index:>3} {count:>8}'
        if len(self.class_images) > LISTED:
            yield f'  and {len(self.class_images) - LISTED} more; --json has all'


def statistics_of(source: Source, recipe: Recipe) -> Statistics:
    """Statistics of the images of a source as a recipe makes them; prints the notes of a conversion.

    Raises: UserError if an image cannot be read or converted, or all were skipped.
    """
    # Sums over 8-bit values are exact in integers.
    sizes, results, labels = Counter(), Counter(), []
    counts, sums, squares = 0, 0, 0
    with progress_bar(transformed(source, recipe), source.count) as progress:
        for written in progress:
            values = np.atleast_3d(np.asarray(written.image)).reshape(-1, len(source.mode)).astype(np.int64)
            counts, sums, squares = counts + len(values), sums + values.sum(0), squares + (values**2).sum(0)
            sizes[written.original] += 1
            results[written.image.size] += 1
            labels.append(written.label)

    # Moments in units of [-1, 1].
    mean, square = sums / counts, squares / counts
    std = lambda mean, square: np.sqrt(np.maximum(square - mean**2, 0)) / 127.5
    of_data = None
    if labels[0] is not None:
        of_data = Labels.of_data(np.array(labels), source.vectors, source.class_names)
    space, classes = of_data and of_data.space, of_data is not None and not of_data.are_vectors
    return Statistics(
        images=len(labels),
        skipped=source.count - len(labels),
        resolution=next(iter(results)) if len(results) == 1 else None,
        mode=source.mode,
        sizes=dict(sizes.most_common()),
        mean=float(mean.mean() / 127.5 - 1),
        # Channels have equally many values, so their moments may be averaged.
        std=float(std(mean.mean(), square.mean())),
        channel_mean=(mean / 127.5 - 1).tolist(),
        channel_std=std(mean, square).tolist(),
        labels=space.kind if space else None,
        class_images=np.bincount(of_data.values, minlength=space.dim).tolist() if classes else [],
        class_names=list(space.names) if classes and space.names else None,
    )
