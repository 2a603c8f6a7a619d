"""Convert images to a data set in EDM's format: a zip or folder of square PNGs, or of latents, with
`dataset.json`."""

from __future__ import annotations

import dnnlib.interrupts  # noqa: F401  (first)

import io
import itertools
import json
import os
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import click
import numpy as np

from data.archive_writer import IMAGE_NAME, check_dest, open_dest, png_bytes
from dnnlib import UserError
from dnnlib.cli import COUNT, PATH, Command, option, shown
from dnnlib.text import printable

if TYPE_CHECKING:  # Pillow and torch are imported where they are used, so that --help stays fast
    from PIL.Image import Image

    from data.pixels import Picture
    from data.sources import Label, Selection, Source

# Names of functions in data/pixels.py; the WIDE ones pad to a square.
TRANSFORMS = ('center-crop', 'center-crop-wide', 'center-crop-letterbox', 'center-crop-dhariwal')
WIDE = ('center-crop-wide', 'center-crop-letterbox')

# ----------------------------------------------------------------------------
# Sources.


def open_source(source: str, selection: Selection, background: tuple[int, int, int]) -> Source:
    """The selected images of `--source`."""
    from data import sources

    if source == 'digits':
        return sources.digits_source(selection)
    path = pathlib.Path(source)
    if not path.exists():
        raise UserError(f'--source={source}: no such file or folder')
    if path.is_dir():
        if path.name.endswith('_lmdb') or (path / 'data.mdb').is_file():
            return sources.lmdb_source(path, selection)
        return sources.files_source(path, selection, background)
    if re.search(r'\.(tar|tgz|tar\.gz)$', path.name):
        return sources.cifar10_source(path, selection)
    if re.search(r'-images-idx3-ubyte(\.gz)?$', path.name):
        return sources.mnist_source(path, selection)
    if path.suffix.lower() in ('.npz', '.npy'):
        return image_array_source(path, selection)
    return sources.files_source(path, selection, background)


def image_array_source(path: pathlib.Path, selection: Selection) -> Source:
    """Images of an .npz or .npy file, as fid.py reads them, with classes from `arr_1` as generate.py and ADM
    write."""
    from data import sources
    from metrics.images import ArrayImages

    labels = None if path.suffix.lower() == '.npy' or selection.labels_from == 'none' else read_classes(path)
    images = ArrayImages(path).images.transpose(0, 2, 3, 1)
    if labels is not None and len(labels) != len(images):
        raise UserError(
            f'{path} has {len(images)} images, but {len(labels)} labels in arr_1; ignore the labels with '
            '--labels-from=none'
        )
    return sources.array_source(
        images[:, :, :, 0] if images.shape[3] == 1 else images, labels, path.name, selection
    )


def read_classes(path: pathlib.Path) -> np.ndarray | None:
    """[N] class indices of an .npz file, or None. Raises: UserError if its `arr_1` is anything else."""
    from data import sources
    from data.arrays import ArchivedArrays, may_be_images

    with ArchivedArrays(path, path) as arrays:
        keys = arrays.keys
        images = ['arr_0'] if 'arr_0' in keys else [key for key in keys if may_be_images(arrays.header(key))]
        if unused := [ascii(key)[1:-1] for key in keys if key not in (*images, 'arr_1')]:
            sources.note(f'ignored arrays in {path}: {", ".join(unused[:5])}. Only arr_1 is read as labels.')
        if 'arr_1' not in keys:
            return None
        header = arrays.header('arr_1')
        labels = arrays.read('arr_1') if header.dtype.kind in 'iu' and len(header.shape) == 1 else None
    if labels is None or (labels.size and labels.min() < 0):
        raise UserError(
            f'{path}: arr_1 is {header.dtype} {list(header.shape)}, but labels must be class indices, '
            'nonnegative integers [N]; ignore it with --labels-from=none'
        )
    return labels


# ----------------------------------------------------------------------------
# Transforms.


def make_transform(name: str | None, resolution: tuple[int, int] | None) -> Callable[[Image], Image | None]:
    """A function from a source image to the output image, or None to skip it. Raises: UserError for invalid
    sizes."""
    if resolution is None:
        return lambda image: image
    from data import pixels

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
    if width & (width - 1):
        raise UserError(
            f'{what}: side {width} is not a power of two, which networks require; choose a --resolution such '
            'as 64x64'
        )


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
    """An image to write: its index and name in the source, pixels and label."""

    number: int
    name: str
    image: Image
    label: Label


def converted(source: Source, recipe: Recipe) -> Iterator[Written]:
    """Convert the source's images one by one, then print notes about what was changed.

    Raises: UserError if an image differs in size from the first, or none is left.
    """
    from data import pixels

    first, notes, left_out = None, Counter(), 0
    for number, name, picture, label in source.items:
        image, transparent = pixels.prepared(
            picture, source.mode, recipe.background.rgb, recipe.upright, name
        )
        image = recipe.transform(image)
        if image is None:
            left_out += 1
            continue
        if first is None:
            check_size(*image.size, name)
            first = name, image.size
        if image.size != first[1]:
            raise UserError(
                f'{name} is {image.width}x{image.height}, but {first[0]} is {first[1][0]}x{first[1][1]}; '
                'resize all with --resolution and --transform'
            )
        notes.update(what_was_done(picture, transparent, source.mode, recipe))
        yield Written(number, name, image, label)

    # Notes.
    if left_out:
        notes['images are too small for --transform=center-crop-wide and were skipped'] = left_out
    for text, count in sorted(notes.items()):
        click.echo(printable(f'Note: {count} {text}.'), err=True)
    if first is None:
        raise UserError(
            f'None of the {left_out} images are large enough; choose a smaller --resolution, or '
            '--transform=center-crop-letterbox'
        )


def what_was_done(picture: Picture, transparent: bool, mode: str, recipe: Recipe) -> Iterator[str]:
    """Notes on the changes to an image, to be preceded by the number of such images."""
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
        """(index, file contents, label) of each image; sets `what`, a description of the files, at the
        end."""
        for number, _, image, label in images:
            yield number, png_bytes(image), label
        self.what = f'{"RGB" if image.mode == "RGB" else "grayscale"} images of {image.width}x{image.height}'


class LatentFiles:
    """Raw latents of a VAE in EDM2's format: .npy files of float32 [2 C, h, w], means then standard
    deviations.

    `entries` of dataset.json name the VAE, and each channel's mean and standard deviation over all images and
    over samples of their latents.
    """

    pattern = 'img-mean-std-{:08d}.npy'

    def __init__(self, vae: str):
        import torch

        from training.networks import encoders

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
        import torch

        pixels = torch.from_numpy(np.stack([np.asarray(written.image) for written in batch])).permute(
            0, 3, 1, 2
        )
        try:
            raw = self.encoder.encode_pixels(pixels.to(self.device)).cpu().numpy()
        except RuntimeError as error:
            raise UserError(
                f'{batch[0].name}: the VAE cannot encode images of {pixels.shape[3]}x{pixels.shape[2]} '
                f'({str(error).splitlines()[0]}); choose another --resolution'
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
    from tqdm import tqdm

    from data.label_space import Labels, LabelSpace

    # Images; tqdm's disable=None shows no bar unless stderr is a terminal.
    labels = []
    bar = dict(total=source.count, unit='img', dynamic_ncols=True, disable=None)
    with open_dest(dest) as write, tqdm(converted(source, recipe), **bar) as progress:
        for number, data, label in files.contents(progress):
            name = f'{number // 1000:05d}/{files.pattern.format(number)}'
            write(name, data)
            labels.append([name, label])

        # Labels.
        labeled = all(label is not None for _, label in labels)
        space = (
            Labels.of_data(np.array([label for _, label in labels]), source.vectors).space
            if labeled
            else LabelSpace(0)
        )
        kind = {'label_kind': space.kind} if space.are_vectors else {}
        write(
            'dataset.json',
            json.dumps({'labels': labels if labeled else None, **kind, **files.entries}).encode(),
        )
    if warning := space.warning():
        click.echo(printable(f'Warning: {warning}'), err=True)
    return (
        f'Wrote {len(labels)} {files.what}, '
        f'{f"with {space}" if space.are_vectors else "with labels" if labeled else "without labels"}, to '
        f'{dest}'
    )


class Resolution(click.ParamType):
    """WIDTHxHEIGHT in pixels: `64x64` becomes (64, 64)."""

    name = 'WxH'

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r'([1-9][0-9]{0,4})x([1-9][0-9]{0,4})', value)
        if match is None:
            self.fail(f'{shown(value)} is not WIDTHxHEIGHT, such as 64x64', param, ctx)
        return int(match[1]), int(match[2])


class Background(click.ParamType):
    """A color as Pillow names it: `white` becomes `Color((255, 255, 255), 'white')`."""

    name = 'COLOR'

    def convert(self, value, param, ctx):
        if isinstance(value, Color):
            return value
        from PIL import ImageColor

        try:
            rgb = ImageColor.getrgb(value)
        except ValueError:
            rgb = ()
        if len(rgb) != 3 or max(rgb) > 255:
            self.fail(
                f'{shown(value)} is not an opaque color: a name of CSS, such as white, black or gray, or '
                '#rrggbb, or rgb(255, 255, 255)',
                param,
                ctx,
            )
        return Color(rgb, value)


@click.command(cls=Command)
@option(
    '--source',
    required=True,
    metavar='PATH|digits',
    type=PATH,
    group='Input',
    help='Images to convert: a folder or zip; an .npz or .npy of uint8 images; cifar-10-python.tar.gz; '
    "MNIST's train-images-idx3-ubyte[.gz] beside its labels (28x28 is padded to 32x32); an LSUN *_lmdb "
    'folder; or "digits", scikit-learn\'s 1,797 images of 8x8.',
)
@option(
    '--max-images',
    type=COUNT,
    metavar='INT',
    group='Input',
    help='Convert only the first N images.  [default: all]',
)
@option(
    '--max-images-per-class',
    type=COUNT,
    metavar='INT',
    group='Input',
    help='Convert only the first N images of each class.  [default: all]',
)
@option(
    '--labels-from',
    type=click.Choice(['auto', 'folders', 'dataset.json', 'none']),
    default='auto',
    show_default=True,
    group='Input',
    help="Source of labels. auto: the source's dataset.json or, without one, its class folders, outside of "
    'which there must be no images. folders: class folders, skipping images outside of them. none: no '
    'labels.',
)
@option(
    '--exif',
    type=click.Choice(['apply', 'ignore']),
    default='ignore',
    show_default=True,
    group='Input',
    help='Whether to apply the EXIF orientation of images, as viewers do, or to keep their pixels as stored.',
)
@option(
    '--background',
    type=Background(),
    default='white',
    show_default=True,
    metavar='COLOR',
    group='Input',
    help='Color behind transparent pixels: a CSS name or #rrggbb. Gray images with transparency stay gray '
    'on gray.',
)
@option(
    '--dest',
    required=True,
    metavar='PATH',
    type=PATH,
    group='Output',
    help='Output: a .zip file, replaced if it exists, or a new or empty folder.',
)
@option(
    '--resolution',
    type=Resolution(),
    metavar='WxH',
    group='Output',
    help='Output image size, such as 64x64.  [default: keep the size]',
)
@option(
    '--transform',
    type=click.Choice(list(TRANSFORMS)),
    group='Output',
    help='How to make images square. center-crop: the largest centered square. center-crop-wide: as EDM does '
    'for LSUN, the middle rows, padded with black bars to WxW; skips images smaller than WxH. '
    'center-crop-letterbox: a W:H crop, padded likewise. center-crop-dhariwal: as ADM does for ImageNet.  '
    '[default: stretch]',
)
@option(
    '--encode-vae',
    'vae',
    metavar='NAME|DIR',
    type=PATH,
    group='Output',
    help='Write latents of this diffusers AutoencoderKL instead of images: a name on the Hugging Face hub, '
    "such as stabilityai/sd-vae-ft-mse (EDM2's VAE), or a folder.",
)
def main(
    source: str,
    max_images: int | None,
    max_images_per_class: int | None,
    labels_from: str,
    exif: str,
    background: Color,
    dest: str,
    resolution: tuple[int, int] | None,
    transform: str | None,
    vae: str | None,
) -> None:
    """Convert images to a data set for training and evaluation.

    Writes a zip or folder of square grayscale or RGB PNGs of one size, a power of two, and a dataset.json of
    labels. Labels come from the source's dataset.json or, without one, from its class folders, numbered
    0, 1, ... in sorted order.

    \b
    Examples:
      python dataset_tool.py --source=digits --dest=datasets/digits.zip
      python dataset_tool.py --source=downloads/cifar-10-python.tar.gz --dest=datasets/cifar10-32x32.zip
      python dataset_tool.py --source=imagenet/train --dest=datasets/imagenet-64x64.zip \\
          --resolution=64x64 --transform=center-crop
      python dataset_tool.py --source=datasets/imagenet-512x512.zip --dest=datasets/latents.zip \\
          --encode-vae=stabilityai/sd-vae-ft-mse
    """
    if transform is not None and resolution is None:
        raise click.UsageError(f'--transform={transform} needs --resolution=WxH')
    check_dest(pathlib.Path(dest))
    recipe = Recipe(make_transform(transform, resolution), background, exif == 'apply')
    files = PngFiles() if vae is None else LatentFiles(vae)
    from data.sources import Selection

    images = open_source(source, Selection(max_images, max_images_per_class, labels_from), background.rgb)
    if vae is not None:
        images = images._replace(mode='RGB')
    click.echo(printable(convert(images, pathlib.Path(dest), recipe, files)))


if __name__ == '__main__':
    main()
