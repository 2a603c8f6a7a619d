"""Convert images to a data set in EDM's format: a zip or folder of square PNGs, or of latents, with
`dataset.json`. `--stats` describes images instead."""

from __future__ import annotations

import dnnlib.interrupts  # noqa: F401  (first)

import pathlib
import re
from typing import TYPE_CHECKING

import click
import numpy as np

from data.archive_writer import check_dest
from dnnlib import UserError
from dnnlib.cli import OUTPUT, PATH, SOME_IMAGES, Command, option, shown
from dnnlib.text import printable
from dnnlib.util import write_json

if TYPE_CHECKING:  # Pillow and torch are imported where they are used, so that --help stays fast
    from data.conversion import Color, Recipe
    from data.sources import Selection, Source

# Names of functions in data/pixels.py, with hyphens.
TRANSFORMS = ('center-crop', 'center-crop-wide', 'center-crop-letterbox', 'center-crop-dhariwal')

# ----------------------------------------------------------------------------
# Sources.


def open_source(
    source: str,
    selection: Selection,
    background: tuple[int, int, int],
    split: str,
    resolution: tuple[int, int] | None,
) -> Source:
    """The selected images of --source, whose kind is known by its name.

    Args:
        split, resolution: for photos, whose crops depend on them.
    """
    from data import sources

    # Bundled data sets, which files of the same name do not replace.
    if source == 'digits':
        if pathlib.Path(source).exists():
            sources.note(
                "--source=digits is scikit-learn's digits; for the folder or file here write ./digits"
            )
        return sources.digits_source(selection)
    if source == 'photos':
        sources.check_unambiguous('--source', source)
        return sources.photos_source(selection, split, resolution)

    # Paths: databases, archives and arrays by their names, images otherwise.
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
    """Images of an .npz or .npy file, with classes from `arr_1` as generate.py and ADM write them."""
    from data import sources
    from metrics.images import ArrayImages

    labels = None if path.suffix.lower() == '.npy' or selection.labels_from == 'none' else read_classes(path)
    # [N, H, W, C], as Pillow takes them.
    images = ArrayImages(path).images.transpose(0, 2, 3, 1)
    if labels is not None and len(labels) != len(images):
        raise UserError(
            f'{path} has {len(images)} images, but {len(labels)} labels in arr_1; ignore the labels with '
            '--labels-from=none'
        )
    # Pillow takes gray images without a dimension of channels.
    return sources.array_source(
        images[:, :, :, 0] if images.shape[3] == 1 else images, labels, path.name, selection
    )


def read_classes(path: pathlib.Path) -> np.ndarray | None:
    """[N] class indices of an .npz file, or None. Raises: UserError if its `arr_1` is anything else."""
    from data import sources
    from data.arrays import ArchivedArrays, may_be_images

    # Without an array of that name, any array that may be images is not reported as ignored.
    with ArchivedArrays(path, path) as arrays:
        keys = arrays.keys
        images = ['arr_0'] if 'arr_0' in keys else [key for key in keys if may_be_images(arrays.header(key))]
        if unused := [ascii(key)[1:-1] for key in keys if key not in (*images, 'arr_1')]:
            sources.note(f'ignored arrays in {path}: {", ".join(unused[:5])}. Only arr_1 is read as labels.')

        # Labels are read only if their header allows class indices: the array may be large.
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
# Command line.


class Resolution(click.ParamType):
    """WIDTHxHEIGHT in pixels, or the side of a square: `64x64` and `64` become (64, 64)."""

    name = 'WxH'

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r'([1-9][0-9]{0,4})(?:x([1-9][0-9]{0,4}))?', value)
        if match is None:
            self.fail(f'{shown(value)} is not WIDTHxHEIGHT, such as 64x64, or a side, such as 64', param, ctx)
        return int(match[1]), int(match[2] or match[1])


class Background(click.ParamType):
    """A color by a name that Pillow knows: `white` becomes `Color((255, 255, 255), 'white')`."""

    name = 'COLOR'

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        from PIL import ImageColor

        from data.conversion import Color

        try:
            rgb = ImageColor.getrgb(value)
        except ValueError:
            rgb = ()
        # ImageColor also knows colors with transparency, and takes rgb() above 255.
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
    metavar='PATH|NAME',
    type=PATH,
    group='Input',
    help='Images to convert: a folder or zip; an .npz or .npy of uint8 images; cifar-10-python.tar.gz; '
    "MNIST's train-images-idx3-ubyte[.gz] beside its labels (28x28 is padded to 32x32); an LSUN *_lmdb "
    "folder; digits, scikit-learn's 1,797 images of 8x8; or photos, color crops of scikit-learn's two "
    'photographs.',
)
@option(
    '--split',
    type=click.Choice(['train', 'test']),
    group='Input',
    help='Crops of photos: 8,000 for training, or 2,000 of a band that those leave out.  [default: train]',
)
@option(
    '--max-images', type=SOME_IMAGES, group='Input', help='Convert only the first N images.  [default: all]'
)
@option(
    '--max-images-per-class',
    type=SOME_IMAGES,
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
    group='Input',
    help='Color behind transparent pixels: a CSS name or #rrggbb. Gray images with transparency stay gray '
    'on gray.',
)
@option(
    '--skip-bad',
    is_flag=True,
    group='Input',
    help='Skip, count and name images that cannot be read.  [default: the first is an error]',
)
@option(
    '--dest',
    type=PATH,
    group='Output',
    help='Output: a .zip file, replaced if it exists, or a new or empty folder. Required without --stats.',
)
@option(
    '--resolution',
    type=Resolution(),
    metavar='WxH|W',
    group='Output',
    help='Output image size, such as 64x64 or 64.  [default: keep the size]',
)
@option(
    '--transform',
    type=click.Choice(list(TRANSFORMS)),
    group='Output',
    help='How to make images square. center-crop: the largest centered square. center-crop-wide: as EDM '
    'does for LSUN, the middle rows, padded with black bars to WxW; skips images smaller than WxH. '
    'center-crop-letterbox: a W:H crop, padded the same way. center-crop-dhariwal: as ADM does for '
    'ImageNet.  [default: stretch]',
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
@option(
    '--stats',
    is_flag=True,
    group='Statistics',
    help='Write no data set. Print number, sizes and classes of the images, and mean and standard deviation '
    '(the sigma_data to use) of their pixels in [-1, 1].',
)
@option(
    '--json', 'json_path', type=OUTPUT, group='Statistics', help='Also write the statistics to this file.'
)
def main(
    source: str,
    split: str | None,
    max_images: int | None,
    max_images_per_class: int | None,
    labels_from: str,
    exif: str,
    background: Color,
    skip_bad: bool,
    dest: str | None,
    resolution: tuple[int, int] | None,
    transform: str | None,
    vae: str | None,
    stats: bool,
    json_path: str | None,
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
      python dataset_tool.py --stats --source=my-images --resolution=32 --transform=center-crop
    """
    check_usage(source, split, dest, resolution, transform, vae, stats, json_path)
    if dest is not None:
        check_dest(pathlib.Path(dest))
    from data import conversion
    from data.sources import Selection

    # Transform and VAE are checked before the source, which may take long to list.
    transform = conversion.make_transform(transform, resolution)
    recipe = conversion.Recipe(transform, background, upright=exif == 'apply')
    files = conversion.PngFiles() if vae is None else conversion.LatentFiles(vae)
    selection = Selection(max_images, max_images_per_class, labels_from, skip_bad)
    images = open_source(source, selection, background.rgb, split or 'train', resolution)
    if stats:
        print_statistics(images, recipe, json_path)
        return
    if vae is not None:  # VAEs take RGB, also of gray images
        images = images._replace(mode='RGB')
    click.echo(printable(conversion.convert(images, pathlib.Path(dest), recipe, files)))


def check_usage(source, split, dest, resolution, transform, vae, stats, json_path) -> None:
    """Raises: click.UsageError for options that contradict each other, or that need others."""
    # Statistics or a data set, not both.
    if stats and (unused := '--dest' if dest is not None else '--encode-vae' if vae is not None else None):
        raise click.UsageError(f'--stats writes no data set: leave {unused} out, or --stats')
    if not stats and dest is None:
        raise click.UsageError('--dest=PATH is missing: the output, unless --stats only describes the images')
    if not stats and json_path is not None:
        raise click.UsageError('--json is for --stats: add that option, or leave --json out')
    # Options that would have no effect.
    if split is not None and source != 'photos':
        raise click.UsageError(f'--split={split} is for --source=photos: leave it out')
    if transform is not None and resolution is None:
        raise click.UsageError(f'--transform={transform} needs --resolution=WxH')


def print_statistics(images: Source, recipe: Recipe, json_path: str | None) -> None:
    """Print the statistics of a source's images, and write them to `json_path`."""
    from data.statistics import statistics_of
    from metrics.evaluation import make_folder

    # Before the images are read, which may take long.
    if json_path is not None:
        make_folder(json_path)
    found = statistics_of(images, recipe)
    for line in found.lines():
        click.echo(printable(line))
    if json_path is not None:
        write_json(json_path, found.record())


if __name__ == '__main__':
    main()
