"""Conversion of images to a data set: transforms to squares, PNGs or latents, dataset.json."""

from __future__ import annotations

import io
import itertools
import json
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import click
import numpy as np
from PIL.Image import Image
from tqdm import tqdm

from data import pixels
from data.archive_writer import IMAGE_NAME, open_dest, png_bytes
from data.image_files import Unreadable
from data.label_space import Labels, LabelSpace
from data.pixels import Picture
from data.sources import Label, Source
from dnnlib import UserError
from dnnlib.lazy import lazy_import
from dnnlib.text import first_line, printable

torch = lazy_import('torch')  # only latents need them
encoders = lazy_import('training.networks.encoders')

NAMED = 5  # images that cannot be read in a message
WIDE = ('center-crop-wide', 'center-crop-letterbox')  # transforms that pad to a square

# ----------------------------------------------------------------------------
# Transforms.


def make_transform(name: str | None, resolution: tuple[int, int] | None) -> Callable[[Image], Image | None]:
    """A function from a source image to the output image, or None to skip the image.

    Args:
        name: name of a function of data/pixels.py with hyphens; None to stretch.
        resolution: width and height of the output; None to keep the size.
    Raises: UserError for invalid sizes.
    """
    if resolution is None:
        return lambda image: image

    # WIDE transforms crop to the requested shape, then pad to a square of its width.
    width, height = resolution
    if name in WIDE:
        if height > width:
            raise UserError(
                f'--resolution={width}x{height}: {name} pads to a square of the width, so the height cannot '
                'exceed it'
            )
        check_size(width, width, f'--resolution={width}x{height}')
    else:
        check_size(width, height, f'--resolution={width}x{height}')
    function = pixels.resize if name is None else getattr(pixels, name.replace('-', '_'))
    return lambda image: function(image, width, height)


def check_size(width: int, height: int, what: str) -> None:
    """Raises: UserError unless the size is square and a power of two."""
    if width != height:
        raise UserError(
            f'{what}: {width}x{height} is not square; add --transform=center-crop and a square --resolution, '
            'such as 64x64'
        )
    if not is_power_of_two(width):
        raise UserError(
            f'{what}: side {width} is not a power of two, which networks require; choose a --resolution such '
            'as 64x64'
        )


def is_power_of_two(number: int) -> bool:
    """Whether a positive number is a power of two."""
    return number & (number - 1) == 0


# ----------------------------------------------------------------------------
# Conversion.


class Color(NamedTuple):
    """A color and its name in messages."""

    rgb: tuple[int, int, int]
    name: str


class Recipe(NamedTuple):
    """How to convert an image.

    Attributes:
        transform: function from an 8-bit image to one of the output size, or None to skip it.
        background: color behind transparent pixels.
        upright: whether to apply the EXIF orientation.
    """

    transform: Callable[[Image], Image | None]
    background: Color
    upright: bool


class Written(NamedTuple):
    """An image to write: its index and name in the source, pixels, label, and width and height before the
    transform."""

    number: int
    name: str
    image: Image
    label: Label
    original: tuple[int, int]


def converted(source: Source, recipe: Recipe) -> Iterator[Written]:
    """Convert the images of a source one by one, then print notes on what was changed.

    Raises: UserError if an image differs in size from the first, or all were skipped.
    """
    first = None  # name and size
    for written in transformed(source, recipe):
        # All images have the size of the first, a square with a power of two as its side.
        name, image = written.name, written.image
        if first is None:
            check_size(*image.size, name)
            first = name, image.size
        if image.size != first[1]:
            raise UserError(
                f'{name} is {image.width}x{image.height}, but {first[0]} is {first[1][0]}x{first[1][1]}; '
                'resize all with --resolution and --transform'
            )
        yield written


def transformed(source: Source, recipe: Recipe) -> Iterator[Written]:
    """The images of a source as a recipe makes them, of any size; then notes on what was changed are printed.

    Raises: UserError if an image cannot be read or converted, or all were skipped.
    """
    notes, skipped, bad, done = Counter(), 0, [], 0
    for number, name, picture, label in source.items:
        if isinstance(picture, Unreadable):
            bad.append(str(picture))  # not the error, whose frames hold pixels
            continue
        image, transparent = pixels.prepared(
            picture, source.mode, recipe.background.rgb, recipe.upright, name
        )
        original, image = image.size, recipe.transform(image)
        if image is None:
            skipped += 1
            continue
        notes.update(what_was_done(picture, transparent, source.mode, recipe))
        done += 1
        yield Written(number, name, image, label, original)

    # Print notes with the numbers of images.
    if skipped:
        notes['images are too small for --transform=center-crop-wide and were skipped'] = skipped
    for text, count in sorted(notes.items()):
        click.echo(printable(f'Note: {count} {text}.'), err=True)
    if bad and (done or skipped):
        click.echo(f'Note: {len(bad)} of {source.count} images cannot be read and were skipped:', err=True)
        for error in bad[:NAMED]:
            click.echo(printable(f'  {error}'), err=True)
        if len(bad) > NAMED:
            click.echo(f'  and {len(bad) - NAMED} more', err=True)

    # Something must remain.
    if not done and not skipped:
        raise UserError(f'None of the {len(bad)} images can be read. The first problem: {bad[0]}')
    if not done:
        raise UserError(
            f'None of the {skipped} images are large enough; choose a smaller --resolution, or '
            '--transform=center-crop-letterbox'
        )


def what_was_done(picture: Picture, transparent: bool, mode: str, recipe: Recipe) -> Iterator[str]:
    """Notes on the changes to an image; each is printed after the number of such images."""
    if picture.image.mode != mode:
        yield f'images were converted from mode {picture.image.mode} to {mode}'
    if picture.animated:
        yield 'files hold several frames or pages, of which the first was used'
    if picture.loses_bits:
        yield 'images have 16 bits per channel, of which the upper 8 were kept'
    if transparent:
        yield f'images have transparent pixels and were composited on --background={recipe.background.name}'
    if picture.orientation != 1:
        yield (
            'images have an EXIF orientation, which was applied (--exif=apply)'
            if recipe.upright
            else 'images have an EXIF orientation, which was ignored; --exif=apply rotates them as viewers do'
        )


class PngFiles:
    """Images as uncompressed PNGs."""

    pattern, entries = IMAGE_NAME, {}

    def contents(self, images: Iterable[Written]) -> Iterator[tuple[int, bytes, Label]]:
        """(index, file contents, label) of each image. At the end sets `what`, a description of the files."""
        for number, _, image, label, _ in images:
            yield number, png_bytes(image), label
        self.what = f'{"RGB" if image.mode == "RGB" else "grayscale"} images of {image.width}x{image.height}'


class LatentFiles:
    """Raw latents of a VAE in EDM2's format: .npy files of float32 [2 C, h, w], means, then standard
    deviations.

    `entries` of dataset.json name the VAE and, per channel, the mean and standard deviation of sampled
    latents over all images.
    """

    pattern = 'img-mean-std-{:08d}.npy'

    def __init__(self, vae: str):
        self.device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
        self.encoder = encoders.StabilityVAEEncoder(
            vae_name=os.path.abspath(vae) if os.path.isdir(vae) else vae
        )
        encoders.make_ready(self.encoder, self.device)
        self.values, self.sums = 0, np.zeros([2, self.encoder.channels])

    def contents(self, images: Iterable[Written]) -> Iterator[tuple[int, bytes, Label]]:
        """As `PngFiles.contents`."""
        images = iter(images)
        while batch := list(itertools.islice(images, self.encoder.batch_size)):
            for raw, written in zip(self._encode(batch), batch):
                data = io.BytesIO()
                np.save(data, raw)
                yield written.number, data.getvalue(), written.label
        self.what = 'latents of {2}x{1}x{0}'.format(*raw.shape)

    def _encode(self, batch: list[Written]) -> np.ndarray:
        """[N, 2 C, h, w] float32 latents, whose moments are added to the sums."""
        images = torch.from_numpy(np.stack([np.asarray(written.image) for written in batch])).permute(
            0, 3, 1, 2
        )

        # Wrong sizes and unsuitable weights show only here.
        try:
            raw = self.encoder.encode_pixels(images.to(self.device)).cpu().numpy()
        except RuntimeError as error:
            raise UserError(
                f'{batch[0].name}: the VAE cannot encode images of {images.shape[3]}x{images.shape[2]} '
                f'({first_line(error)}); choose another --resolution'
            ) from error
        if bad := [item.name for item, values in zip(batch, raw) if not np.isfinite(values).all()]:
            raise UserError(
                f'{bad[0]}: its latents under the VAE {self.encoder.vae_name} are not finite (NaN or '
                'infinite values): the weights are damaged, or it overflows in its precision; use another '
                'VAE, such as stabilityai/sd-vae-ft-mse'
            )

        # Moments of a sample from N(mean, std²): its second moment is mean² + std².
        mean, std = np.split(raw.astype(np.float64), 2, axis=1)
        self.values += mean[:, 0].size
        self.sums += [mean.sum((0, 2, 3)), (mean**2 + std**2).sum((0, 2, 3))]
        return raw

    @property
    def entries(self) -> dict:
        # Six digits; the variance is bounded below, since rounding could make that of a constant negative.
        mean, square = self.sums / self.values
        std = np.sqrt(np.maximum(square - mean**2, 1e-12))
        raw_mean, raw_std = ([float(f'{value:.6g}') for value in values] for values in (mean, std))
        return dict(
            encoder=dict(
                class_name='StabilityVAEEncoder',
                vae_name=self.encoder.vae_name,
                raw_mean=raw_mean,
                raw_std=raw_std,
            )
        )


def convert(source: Source, dest: pathlib.Path, recipe: Recipe, files: PngFiles | LatentFiles) -> str:
    """Write all images, numbered as in the source, then `dataset.json`. Returns: a summary sentence."""
    # Write images.
    labels = []
    with open_dest(dest) as write, progress_bar(converted(source, recipe), source.count) as progress:
        for number, data, label in files.contents(progress):
            name = f'{number // 1000:05d}/{files.pattern.format(number)}'
            write(name, data)
            labels.append([name, label])

        # Write labels, if all images have them.
        labeled = all(label is not None for _, label in labels)
        space = (
            Labels.of_data(np.array([label for _, label in labels]), source.vectors, source.class_names).space
            if labeled
            else LabelSpace(0)
        )
        about = {'label_kind': space.kind} if space.are_vectors else {}
        about |= {'class_names': space.names} if space.names else {}
        write(
            'dataset.json',
            json.dumps({'labels': labels if labeled else None, **about, **files.entries}).encode(),
        )
    if warning := space.warning():
        click.echo(printable(f'Warning: {warning}'), err=True)
    of_what = f'with {space}' if space.are_vectors or space.names else 'with labels'
    return f'Wrote {len(labels)} {files.what}, {of_what if labeled else "without labels"}, to {dest}'


def progress_bar(images: Iterable[Written], total: int) -> tqdm:
    """A bar over the images of a source, shown only if stderr is a terminal."""
    return tqdm(images, total=total, unit='img', dynamic_ncols=True, disable=None)
