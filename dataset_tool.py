"""Convert any image source into a data set in EDM's format: a zip or a folder of equally sized square PNGs,
or of latents, with `dataset.json`."""

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

TRANSFORMS = (
    'center-crop',
    'center-crop-wide',
    'center-crop-letterbox',
    'center-crop-dhariwal',
)  # functions in data/pixels.py
WIDE = ('center-crop-wide', 'center-crop-letterbox')  # those that pad to a square
# What an archive, an array or a single file is called, and a folder is not.
# ----------------------------------------------------------------------------
# Sources.


def open_source(source: str, selection: Selection, background: tuple[int, int, int]) -> Source:
    """What of the source that `--source` names is to be converted."""
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
    """The images of an .npz or .npy file, as fid.py reads them; of an .npz `arr_1`, as generate.py and ADM
    write it, are their classes."""
    from data import sources
    from metrics.images import ArrayImages

    labels = None if path.suffix.lower() == '.npy' or selection.labels_from == 'none' else read_classes(path)
    images = ArrayImages(path).images.transpose(0, 2, 3, 1)
    if labels is not None and len(labels) != len(images):
        raise UserError(
            f'{path} has {len(images)} images, but {len(labels)} labels in arr_1; leave them out with '
            '--labels-from=none'
        )
    return sources.array_source(
        images[:, :, :, 0] if images.shape[3] == 1 else images, labels, path.name, selection
    )


def read_classes(path: pathlib.Path) -> np.ndarray | None:
    """[N] class indices in an .npz file; None where it has none. Raises: UserError where its `arr_1` is
    anything else."""
    from data import sources
    from data.arrays import ArchivedArrays, may_be_images

    with ArchivedArrays(path, path) as arrays:
        keys = arrays.keys
        images = ['arr_0'] if 'arr_0' in keys else [key for key in keys if may_be_images(arrays.header(key))]
        if unused := [ascii(key)[1:-1] for key in keys if key not in (*images, 'arr_1')]:
            sources.note(
                f'arrays in {path} that are not read: {", ".join(unused[:5])}. Labels are those called arr_1.'
            )
        if 'arr_1' not in keys:
            return None
        header = arrays.header('arr_1')
        labels = arrays.read('arr_1') if header.dtype.kind in 'iu' and len(header.shape) == 1 else None
    if labels is None or (labels.size and labels.min() < 0):
        raise UserError(
            f'{path}: arr_1 is {header.dtype} {list(header.shape)}, and labels are class indices, whole '
            'numbers [N] from 0; leave it out with --labels-from=none'
        )
    return labels


# ----------------------------------------------------------------------------
# Transforms.


def make_transform(name: str | None, resolution: tuple[int, int] | None) -> Callable[[Image], Image | None]:
    """The function from a source image to the image written, or to None where it is left out. Raises:
    UserError where no size could be valid."""
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
    """Raises UserError unless the size is square with a power of two as side."""
    if width != height:
        raise UserError(
            f'{what}: {width}x{height} is not square; add --transform=center-crop and a square --resolution, '
            'such as 64x64'
        )
    if width & (width - 1):
        raise UserError(
            f'{what}: side {width} is not a power of two, as networks need; choose such a --resolution, such '
            'as 64x64'
        )


# ----------------------------------------------------------------------------
# Conversion.


class Color(NamedTuple):
    """A color, and what messages call it."""

    rgb: tuple[int, int, int]
    name: str


class Recipe(NamedTuple):
    """How an image of a source becomes the image that is written.

    Attributes:
        transform: from the image in 8 bits to one of the wanted size, or None where it is left out.
        background: of transparent pixels.
        upright: whether images are turned as their EXIF orientation says.
    """

    transform: Callable[[Image], Image | None]
    background: Color
    upright: bool


class Written(NamedTuple):
    """An image to be written: its place in the source, its name there, for messages, the image, and its
    label."""

    number: int
    name: str
    image: Image
    label: Label


def converted(source: Source, recipe: Recipe) -> Iterator[Written]:
    """The source's images as they are to be written; afterwards what was done to them is said.

    Raises: UserError where one is of another size than the first, or none is left.
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
                'bring all to one size with --resolution and --transform'
            )
        notes.update(what_was_done(picture, transparent, source.mode, recipe))
        yield Written(number, name, image, label)
    if left_out:
        notes['images are too small for --transform=center-crop-wide and were left out'] = left_out
    for text, count in sorted(notes.items()):
        click.echo(printable(f'Note: {count} {text}.'), err=True)
    if first is None:
        raise UserError(
            f'None of the {left_out} images is large enough; choose a smaller --resolution, or '
            '--transform=center-crop-letterbox'
        )


def what_was_done(picture: Picture, transparent: bool, mode: str, recipe: Recipe) -> Iterator[str]:
    """Sentences, without their number, that say what became of an image."""
    if picture.image.mode != mode:
        yield f'images were converted from mode {picture.image.mode} to {mode}'
    if picture.animated:
        yield 'files hold several frames or pages, of which the first was taken'
    if picture.loses_bits:
        yield 'images have 16 bits a channel, of which the upper 8 were kept'
    if transparent:
        yield f'images have transparent pixels and were composited on --background={recipe.background.name}'
    if picture.orientation != 1:
        yield (
            'images carry an EXIF orientation and were turned by it (--exif=apply)'
            if recipe.upright
            else 'images carry an EXIF orientation, which was ignored; --exif=apply turns them as viewers do'
        )


class PngFiles:
    """Images as uncompressed PNGs."""

    pattern, entries = IMAGE_NAME, {}

    def contents(self, images: Iterable[Written]) -> Iterator[tuple[int, bytes, Label]]:
        """(number, what to write, label) of each image; afterwards `what` says what these files are."""
        for number, _, image, label in images:
            yield number, png_bytes(image), label
        self.what = f'{"RGB" if image.mode == "RGB" else "grayscale"} images of {image.width}x{image.height}'


class LatentFiles:
    """Images as raw latents of a VAE, in EDM2's format: .npy files, float32 [2 C, h, w], first means, then
    standard deviations.

    `entries` of dataset.json name the VAE, and the mean and deviation that each channel has over all images
    and draws from them.
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
                f'{bad[0]}: the VAE {self.encoder.vae_name} makes latents of it that are not finite (NaN or '
                'infinite values): its weights are damaged, or it overflows in its precision; use another, '
                'such as stabilityai/sd-vae-ft-mse'
            )
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
    """Write all images as `files` has it, numbered as in the source, then `dataset.json`. Returns: a sentence
    about what was written."""
    from tqdm import tqdm

    from data.label_space import Labels, LabelSpace

    labels = []
    bar = dict(
        total=source.count, unit='img', dynamic_ncols=True, disable=None
    )  # None: no bar where stderr is not a terminal
    with open_dest(dest) as write, tqdm(converted(source, recipe), **bar) as progress:
        for number, data, label in files.contents(progress):
            name = f'{number // 1000:05d}/{files.pattern.format(number)}'
            write(name, data)
            labels.append([name, label])
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
    help="Folder or zip of images; an .npz or .npy of uint8 images; cifar-10-python.tar.gz; MNIST's train-images-idx3-ubyte[.gz], its labels "
    'beside it (28x28 images are padded to 32x32); an LSUN *_lmdb folder; or "digits", scikit-learn\'s '
    '1,797 images of 8x8.',
)
@option(
    '--max-images',
    type=COUNT,
    metavar='INT',
    group='Input',
    help='Convert the first so many images only.  [default: all]',
)
@option(
    '--max-images-per-class',
    type=COUNT,
    metavar='INT',
    group='Input',
    help='Convert the first so many images of each class only.  [default: all]',
)
@option(
    '--labels-from',
    type=click.Choice(['auto', 'folders', 'dataset.json', 'none']),
    default='auto',
    show_default=True,
    group='Input',
    help="Where labels come from. auto: the source's dataset.json; without one, its class folders, beside which no other images may lie. "
    'folders: class folders, without the images beside them. none: no labels.',
)
@option(
    '--exif',
    type=click.Choice(['apply', 'ignore']),
    default='ignore',
    show_default=True,
    group='Input',
    help='Whether images that carry an EXIF orientation are turned by it, as viewers do, or stay as their '
    'pixels are stored.',
)
@option(
    '--background',
    type=Background(),
    default='white',
    show_default=True,
    metavar='COLOR',
    group='Input',
    help='What transparent pixels lie on: a name of CSS or #rrggbb. Gray images with transparency stay '
    'gray if it is gray.',
)
@option(
    '--dest',
    required=True,
    metavar='PATH',
    type=PATH,
    group='Output',
    help='A .zip file, replaced if it exists, or a new or empty folder.',
)
@option(
    '--resolution',
    type=Resolution(),
    metavar='WxH',
    group='Output',
    help='Resize the images to this size.  [default: keep their size]',
)
@option(
    '--transform',
    type=click.Choice(list(TRANSFORMS)),
    group='Output',
    help="How non-square images become square: center-crop cuts the largest centered square; center-crop-wide is EDM's, for LSUN: it cuts the "
    'middle rows, leaves out images that are smaller than WxH, and pads with black bars to WxW; '
    'center-crop-letterbox cuts to W:H and pads; '
    "center-crop-dhariwal is ADM's preprocessing, for ImageNet.  [default: stretch]",
)
@option(
    '--encode-vae',
    'vae',
    metavar='NAME|DIR',
    type=PATH,
    group='Output',
    help='Write latents, not images: of this diffusers AutoencoderKL, a name on the Hugging Face hub, such '
    'as stabilityai/sd-vae-ft-mse (the VAE of EDM2), or a folder.',
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
    """Convert images into a data set for training and evaluation.

    The result is a zip or folder of PNGs of one size, square with a power of two as side, grayscale or RGB,
    and a dataset.json of labels. Labels come from the source's own dataset.json; without one, the class
    folders become the labels 0, 1, ... in sorted order.

    \b
    Examples:
      python dataset_tool.py --source=digits --dest=datasets/digits.zip python dataset_tool.py
      --source=downloads/cifar-10-python.tar.gz --dest=datasets/cifar10-32x32.zip python dataset_tool.py
      --source=imagenet/train --dest=datasets/imagenet-64x64.zip --resolution=64x64 --transform=center-crop
      python dataset_tool.py --source=datasets/imagenet-512x512.zip --dest=datasets/latents.zip
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
