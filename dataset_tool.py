"""Convert any image source into a data set in EDM's format: a zip or a folder of equally sized square PNGs, or of latents, with `dataset.json`."""
from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import os
import pathlib
import pickle
import re
import shutil
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import click
import numpy as np

from dnnlib import UserError
from dnnlib.cli import PATH, Command, option

if TYPE_CHECKING:  # Pillow is imported where it is used, so that --help stays fast
    import lmdb
    from PIL.Image import Image

    from training.dataset import ImageFiles

# What tarfile, gzip and the pickle machine raise on damaged or hostile archives.
DAMAGED_ARCHIVE = (OSError, EOFError, tarfile.TarError, zlib.error, struct.error)
DAMAGED_PICKLE = (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError, OverflowError,
                  MemoryError)


class Item(NamedTuple):
    """One image of a source: its name there, for error messages, and its label: a class index, a vector or None."""
    name: str
    image: Image
    label: int | list[float] | None


class Source(NamedTuple):
    """A sequence of images to convert."""
    count: int
    mode: str  # 'L' or 'RGB': what all images are written as
    items: Iterable[Item]

#----------------------------------------------------------------------------
# Sources: arrays.

def array_source(images: np.ndarray, labels: Iterable[int], name: str, limit: int | None) -> Source:
    """Source of the first `limit` of uint8 [N, H, W] or [N, H, W, 3] images with class indices."""
    from PIL import Image

    images = images[:limit]
    if images.size == 0:
        raise UserError(f'{name} holds no images')
    items = (Item(f'{name}[{i}]', Image.fromarray(image), int(label)) for i, (image, label) in enumerate(zip(images, labels)))
    return Source(len(images), 'L' if images.ndim == 3 else 'RGB', items)


def digits_source(limit: int | None) -> Source:
    """scikit-learn's bundled digits: 1,797 greyscale images of 8x8 pixels in 0..16, 10 classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return array_source(np.rint(digits.images * 255 / 16).astype(np.uint8), digits.target, 'digits', limit)


def read_idx(path: pathlib.Path, magic: int) -> np.ndarray:
    """The uint8 array of an IDX file, gzipped or not; the magic number's last byte is the number of dimensions."""
    try:
        with (gzip.open if path.suffix == '.gz' else open)(path, 'rb') as file:
            data = file.read()
        found, *shape = struct.unpack_from(f'>{1 + (magic & 0xff)}I', data)
    except DAMAGED_ARCHIVE as error:
        raise UserError(f'{path} is not a readable IDX file ({error}); download it again') from error
    header = 4 * (1 + len(shape))
    if found != magic or len(data) - header != int(np.prod(shape, dtype=object)):
        raise UserError(f'{path} is not a complete IDX file: magic number {found:#x} instead of {magic:#x}, or a wrong length; download it again')
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)


def mnist_source(path: pathlib.Path, limit: int | None) -> Source:
    """MNIST's images and the labels beside them; 28x28 images get a black border of 2 pixels, as in EDM, since sides are powers of two."""
    name = path.name.replace('images-idx3', 'labels-idx1')
    beside = [path.with_name(n) for n in (name, name.removesuffix('.gz'), name + '.gz')]
    labels_path = next((p for p in beside if p.is_file()), None)
    if labels_path is None:
        raise UserError(f'{path} needs its labels beside it, in {beside[0]}')
    images, labels = read_idx(path, 0x803), read_idx(labels_path, 0x801)
    if len(images) != len(labels):
        raise UserError(f'{path} has {len(images)} images, but {labels_path} has {len(labels)} labels; take both from one release')
    if images.shape[1:] == (28, 28):
        images = np.pad(images, [(0, 0), (2, 2), (2, 2)])
    return array_source(images, labels, path.name, limit)

#----------------------------------------------------------------------------
# Sources: CIFAR-10's pickles, read without running anything that they name.

class InertArray:
    """Stands in for `numpy.ndarray` in a pickle: takes down a uint8 array's shape and bytes."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, column_major, data = state
        self.fill(data, dtype, shape, 'F' if column_major else 'C')

    def fill(self, data: bytes | str, dtype: InertDtype, shape: tuple, order: str) -> InertArray:
        if dtype.name not in ('u1', 'uint8', '|u1'):
            raise ValueError(f'an array of type {dtype.name!r} instead of uint8')
        data = data.encode('latin1') if isinstance(data, str) else data  # Python 2 wrote bytes as text
        self.values = np.frombuffer(data, dtype=np.uint8).reshape(shape, order=order)
        return self


class InertDtype:
    """Stands in for `numpy.dtype` in a pickle: takes down its name."""

    def __init__(self, name: str, *_):
        self.name = name

    def __setstate__(self, state: tuple) -> None:
        pass  # byte order and alignment, which bytes do not have


def _encode(text: str, encoding: str) -> bytes:
    """Python 3 writes bytes so in pickles for Python 2; any other codec is refused."""
    if encoding != 'latin1':
        raise ValueError(f'text in codec {encoding!r}')
    return text.encode('latin1')


ADMITTED = {
    ('numpy', 'ndarray'): InertArray,
    ('numpy', 'dtype'): InertDtype,
    ('_codecs', 'encode'): _encode,
    **{(f'numpy.{core}.multiarray', '_reconstruct'): lambda *_: InertArray() for core in ('core', '_core')},
    **{(f'numpy.{core}.numeric', '_frombuffer'): lambda *state: InertArray().fill(*state[:4]) for core in ('core', '_core')},
}


class ArrayUnpickler(pickle.Unpickler):
    """Reads plain data and uint8 arrays. An admitted name maps to one of the harmless stand-ins above; any other is refused, and named."""

    def find_class(self, module: str, name: str):
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f'it names {module}.{name}, which is no plain array; nothing of it was run')
        return ADMITTED[module, name]


def read_cifar_batch(data: bytes, source: str) -> tuple[np.ndarray, list[int]]:
    """uint8 [N, 32, 32, 3] images and N class indices of one pickled CIFAR-10 batch."""
    try:
        batch = ArrayUnpickler(io.BytesIO(data), encoding='latin1').load()
        images, labels = batch['data'].values.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), batch['labels']
        if len(images) != len(labels) or not all(type(label) is int and 0 <= label < 10 for label in labels):
            raise ValueError(f'its {len(images)} images do not go with {len(labels)} labels, or a label is not in 0..9')
    except DAMAGED_PICKLE as error:
        raise UserError(f'{source} is not a CIFAR-10 batch ({error}); download cifar-10-python.tar.gz again') from error
    return images, labels


def cifar10_source(path: pathlib.Path, limit: int | None) -> Source:
    """The training batches of `cifar-10-python.tar.gz`: 50,000 images of 32x32, 10 classes."""
    batches = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and (match := re.search(r'(?:^|/)data_batch_(\d+)$', member.name)):
                    batches[int(match[1])] = member.name, archive.extractfile(member).read()
    except DAMAGED_ARCHIVE as error:
        raise UserError(f'{path} is not a complete tar archive ({error}); download it again') from error
    if not batches:
        raise UserError(f'{path} holds no CIFAR-10 batches (data_batch_1, ...); the tar archive to name is cifar-10-python.tar.gz')
    images, labels = zip(*(read_cifar_batch(data, f'{path}: {name}') for _, (name, data) in sorted(batches.items())))
    return array_source(np.concatenate(images), itertools.chain.from_iterable(labels), path.name, limit)

#----------------------------------------------------------------------------
# Sources: image files.

def folder_labels(names: list[str]) -> list[int] | None:
    """Class indices from the outermost folders in which sorted names differ; None unless every image lies in a folder."""
    folders = [name.split('/')[:-1] for name in names]
    if not all(folders):
        return None
    shared = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*folders))
    depth = min(len(list(shared)), min(map(len, folders)) - 1)
    index = {name: i for i, name in enumerate(sorted({folder[depth] for folder in folders}))}
    click.echo(f'Labels from {len(index)} class folders: ' + ', '.join(f'{name}={i}' for name, i in list(index.items())[:10])
               + (', ...' if len(index) > 10 else ''), err=True)
    return [index[folder[depth]] for folder in folders]


def is_colour(files: ImageFiles, name: str) -> bool:
    with files.open_image(name) as image:
        return image.mode not in ('1', 'L', 'LA', 'La', 'F') and not image.mode.startswith('I')


def read_image(files: ImageFiles, name: str) -> Image:
    with files.open_image(name) as image:
        image.load()
    return image


def files_source(path: pathlib.Path, limit: int | None) -> Source:
    """A folder or zip of images, sorted by name. They are written as RGB if any is in colour; in a colour set the first header tells."""
    from training.dataset import ImageFiles, read_labels

    files = ImageFiles(path)
    if files.holds_latents:
        raise UserError(f'{path} holds latents already ({files.images[0]}, ...); it is a data set as it is, or name the images they were made from')
    labels = read_labels(files)
    if labels is None:
        labels = [None] * len(files.images) if files.label_files else folder_labels(files.images) or [None] * len(files.images)
    else:
        labels = labels.tolist()
    names = files.images[:limit]
    mode = 'RGB' if any(is_colour(files, name) for name in names) else 'L'
    items = (Item(f'{path}: {name}', read_image(files, name), label) for name, label in zip(names, labels))
    return Source(len(names), mode, items)


@contextlib.contextmanager
def open_lmdb(path: pathlib.Path) -> Iterator[lmdb.Transaction]:
    """A read transaction over the data base. Raises: UserError."""
    try:
        import lmdb
    except ImportError as error:
        raise UserError(f'{path} is an LMDB data base, and the lmdb package is not installed; run: pip install lmdb') from error
    try:
        with lmdb.open(str(path), readonly=True, lock=False) as base, base.begin(buffers=True) as transaction:
            yield transaction
    except lmdb.Error as error:
        raise UserError(f'{path} is not a readable LMDB data base ({error}); copy or download it again') from error


def lmdb_source(path: pathlib.Path, limit: int | None) -> Source:
    """An LSUN `*_lmdb` folder of JPEG or WebP images, in the order of its keys, without labels."""
    with open_lmdb(path) as transaction:
        count = transaction.stat()['entries']
    if count == 0:
        raise UserError(f'{path} holds no images')
    return Source(count if limit is None else min(limit, count), 'RGB', _lmdb_items(path, limit))


def _lmdb_items(path: pathlib.Path, limit: int | None) -> Iterator[Item]:
    from PIL import Image

    from training.dataset import UNREADABLE
    with open_lmdb(path) as transaction:
        for key, value in itertools.islice(transaction.cursor(), limit):
            name = f'{path}: {bytes(key).decode("ascii", "backslashreplace")}'
            try:
                image = Image.open(io.BytesIO(value))
                image.load()
            except UNREADABLE as error:
                raise UserError(f'{name} is not a readable image ({error}); replace or remove it') from error
            yield Item(name, image, None)


def open_source(source: str, limit: int | None) -> Source:
    """The source that `--source` names, cut to its first `limit` images."""
    if source == 'digits':
        return digits_source(limit)
    path = pathlib.Path(source)
    if not path.exists():
        raise UserError(f'--source={source}: no such file or folder')
    if path.is_dir():
        is_lmdb = path.name.endswith('_lmdb') or (path / 'data.mdb').is_file()
        return (lmdb_source if is_lmdb else files_source)(path, limit)
    if re.search(r'\.(tar|tgz|tar\.gz)$', path.name):
        return cifar10_source(path, limit)
    return (mnist_source if re.search(r'-images-idx3-ubyte(\.gz)?$', path.name) else files_source)(path, limit)

#----------------------------------------------------------------------------
# Modes and transforms.

def to_mode(image: Image, mode: str, name: str) -> Image:
    """The image in 8 bits, 'L' or 'RGB'; transparency is dropped, 16-bit values are divided by 257."""
    from PIL import Image

    if image.mode == 'F':
        raise UserError(f'{name} is a floating-point image of unknown range; convert it to 8 bits')
    if image.mode.startswith('I'):
        image = Image.fromarray(np.rint(np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    try:
        return image if image.mode == mode else image.convert(mode)
    except ValueError as error:
        raise UserError(f'{name} cannot be converted to {mode} ({error}); convert it to RGB') from error


def crop_centre(image: Image, width: int, height: int) -> Image:
    """The middle width x height pixels; one pixel nearer to the top left where they cannot be in the middle."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def resize(image: Image, width: int, height: int) -> Image:
    """The image at that size, whatever its own aspect ratio, by Lanczos filter."""
    from PIL.Image import Resampling

    return image if image.size == (width, height) else image.resize((width, height), Resampling.LANCZOS)


def center_crop(image: Image, width: int, height: int) -> Image:
    """The largest centred square, resized."""
    side = min(image.size)
    return resize(crop_centre(image, side, side), width, height)


def center_crop_wide(image: Image, width: int, height: int) -> Image:
    """The largest centred part of the ratio width : height, resized, between black bars that make it a square of `width`."""
    from PIL import Image

    crop_width = min(image.width, max(round(image.height * width / height), 1))
    crop_height = min(image.height, max(round(image.width * height / width), 1))
    canvas = Image.new(image.mode, (width, width))
    canvas.paste(resize(crop_centre(image, crop_width, crop_height), width, height), (0, (width - height) // 2))
    return canvas


def center_crop_dhariwal(image: Image, width: int, height: int) -> Image:
    """ADM's preprocessing (Dhariwal & Nichol 2021): halved by box filter while twice too large, the shorter side made exact by bicubic
    filter, the middle cropped."""
    from PIL.Image import Resampling

    while min(image.size) >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    factor = width / min(image.size)
    image = image.resize((round(image.width * factor), round(image.height * factor)), Resampling.BICUBIC)
    return crop_centre(image, width, height)


TRANSFORMS = {'center-crop': center_crop, 'center-crop-wide': center_crop_wide, 'center-crop-dhariwal': center_crop_dhariwal}


def make_transform(name: str | None, resolution: tuple[int, int] | None) -> Callable[[Image], Image]:
    """The function from a source image to the image written. Raises: UserError where it could not give valid sizes."""
    if resolution is None:
        return lambda image: image
    width, height = resolution
    if name == 'center-crop-wide':
        if height > width:
            raise UserError(f'--resolution={width}x{height}: center-crop-wide pads to a square of the width, so the height cannot exceed it')
        check_size(width, width, f'--resolution={width}x{height}')
    else:
        check_size(width, height, f'--resolution={width}x{height}')
    return lambda image: TRANSFORMS.get(name, resize)(image, width, height)


def check_size(width: int, height: int, what: str) -> None:
    """Raises UserError unless the size is square with a power of two as side."""
    if width != height:
        raise UserError(f'{what}: {width}x{height} is not square; add --transform=center-crop and a square --resolution, such as 64x64')
    if width & (width - 1):
        raise UserError(f'{what}: side {width} is not a power of two, as networks need; choose such a --resolution, such as 64x64')

#----------------------------------------------------------------------------
# Destination.

class FolderWriter:
    """Writes files into a new folder."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        path.mkdir()

    def write(self, name: str, data: bytes) -> None:
        target = self.path / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(data)

    def close(self) -> None:
        pass


class ZipWriter:
    """Writes files into an uncompressed zip whose bytes depend on nothing but names and contents."""

    def __init__(self, path: pathlib.Path):
        self.file = path.open('wb')
        self.zip = zipfile.ZipFile(self.file, 'w', zipfile.ZIP_STORED)

    def write(self, name: str, data: bytes) -> None:
        entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
        entry.create_system, entry.external_attr = 3, 0o644 << 16  # Unix, whatever this system is
        self.zip.writestr(entry, data)

    def close(self) -> None:
        self.zip.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def check_dest(dest: pathlib.Path) -> None:
    """Raises UserError unless `dest` is a new or existing zip file, or a new or empty folder."""
    if dest.suffix == '.zip' and dest.is_dir():
        raise UserError(f'--dest={dest} is a folder; name a zip file, or a folder without .zip')
    if dest.suffix != '.zip' and dest.exists() and not dest.is_dir():
        raise UserError(f'--dest={dest} is a file; name a .zip file or a folder')
    if dest.is_dir() and any(dest.iterdir()):
        raise UserError(f'--dest={dest} is a folder that is not empty; name another, or empty it first')


@contextlib.contextmanager
def open_dest(dest: pathlib.Path) -> Iterator[Callable[[str, bytes], None]]:
    """A function that writes a file into `dest`, which comes into being, whole, at the end of the block, and not at all after an error."""
    staging, target = None, dest.resolve()  # through a link, so that it is not replaced itself
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = pathlib.Path(tempfile.mkdtemp(prefix=f'.{target.name}.', suffix='.tmp', dir=target.parent))
        with contextlib.closing((ZipWriter if dest.suffix == '.zip' else FolderWriter)(staging / target.name)) as writer:
            yield writer.write
        os.replace(staging / target.name, target)
    except OSError as error:
        raise UserError(f'cannot write --dest={dest} ({error}); free space or name another place') from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)

#----------------------------------------------------------------------------
# Conversion.

def png_bytes(image: Image) -> bytes:
    data = io.BytesIO()
    image.save(data, format='PNG', compress_level=0)
    return data.getvalue()


def converted(source: Source, transform: Callable[[Image], Image]) -> Iterator[Item]:
    """The source's images as they are to be written. Raises UserError where one is of another size than the first."""
    first, modes = None, Counter()
    for item in source.items:
        if item.image.mode != source.mode:
            modes[item.image.mode] += 1
        image = transform(to_mode(item.image, source.mode, item.name))
        if first is None:
            check_size(*image.size, item.name)
            first = item.name, image.size
        if image.size != first[1]:
            raise UserError(f'{item.name} is {image.width}x{image.height}, but {first[0]} is {first[1][0]}x{first[1][1]}; '
                            'bring all to one size with --resolution and --transform')
        yield item._replace(image=image)
    for mode, count in sorted(modes.items()):
        click.echo(f'Note: {count} images were converted from mode {mode} to {source.mode}.', err=True)


class PngFiles:
    """Images as uncompressed PNGs."""

    pattern, entries = 'img{:08d}.png', {}

    def contents(self, items: Iterable[Item]) -> Iterator[tuple[bytes, int | list[float] | None]]:
        """(what to write, label) of each item; afterwards `what` says what these files are."""
        for _, image, label in items:
            yield png_bytes(image), label
        self.what = f'{"RGB" if image.mode == "RGB" else "greyscale"} images of {image.width}x{image.height}'


class LatentFiles:
    """Images as raw latents of a VAE, in EDM2's format: .npy files, float32 [2 C, h, w], first means, then standard deviations.

    `entries` of dataset.json name the VAE, and the mean and deviation that each channel has over all images and draws from them.
    """

    pattern = 'img-mean-std-{:08d}.npy'

    def __init__(self, vae: str):
        import torch

        from training import encoders
        self.device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
        self.encoder = encoders.StabilityVAEEncoder(vae_name=os.path.abspath(vae) if os.path.isdir(vae) else vae)
        encoders.make_ready(self.encoder, self.device)
        self.values, self.sums = 0, np.zeros([2, self.encoder.channels])

    def contents(self, items: Iterable[Item]) -> Iterator[tuple[bytes, int | list[float] | None]]:
        """As `PngFiles.contents`."""
        items = iter(items)
        while batch := list(itertools.islice(items, self.encoder.batch_size)):
            for raw, (_, _, label) in zip(self._encode(batch), batch):
                data = io.BytesIO()
                np.save(data, raw)
                yield data.getvalue(), label
        self.what = 'latents of {2}x{1}x{0}'.format(*raw.shape)

    def _encode(self, batch: list[Item]) -> np.ndarray:
        import torch

        pixels = torch.from_numpy(np.stack([np.asarray(image) for _, image, _ in batch])).permute(0, 3, 1, 2)
        try:
            raw = self.encoder.encode_pixels(pixels.to(self.device)).cpu().numpy()
        except RuntimeError as error:
            raise UserError(f'{batch[0].name}: the VAE cannot encode images of {pixels.shape[3]}x{pixels.shape[2]} ({str(error).splitlines()[0]}); '
                            'choose another --resolution') from error
        mean, std = np.split(raw.astype(np.float64), 2, axis=1)
        self.values += mean[:, 0].size
        self.sums += [mean.sum((0, 2, 3)), (mean ** 2 + std ** 2).sum((0, 2, 3))]
        return raw

    @property
    def entries(self) -> dict:
        mean, square = self.sums / self.values
        std = np.sqrt(np.maximum(square - mean ** 2, 1e-12))
        raw_mean, raw_std = ([float(f'{value:.6g}') for value in values] for values in (mean, std))
        return dict(encoder=dict(class_name='StabilityVAEEncoder', vae_name=self.encoder.vae_name, raw_mean=raw_mean, raw_std=raw_std))


def convert(source: Source, dest: pathlib.Path, transform: Callable[[Image], Image], files: PngFiles | LatentFiles) -> str:
    """Write all images as `files` has it, then `dataset.json`. Returns: a sentence about what was written."""
    from tqdm import tqdm

    labels = []
    bar = dict(total=source.count, unit='img', dynamic_ncols=True, disable=None)  # None: no bar where stderr is not a terminal
    with open_dest(dest) as write, tqdm(converted(source, transform), **bar) as progress:
        for i, (data, label) in enumerate(files.contents(progress)):
            name = f'{i // 1000:05d}/{files.pattern.format(i)}'
            write(name, data)
            labels.append([name, label])
        labelled = all(label is not None for _, label in labels)
        write('dataset.json', json.dumps({'labels': labels if labelled else None, **files.entries}).encode())
    return f'Wrote {len(labels)} {files.what}, {"with" if labelled else "without"} labels, to {dest}'


class Resolution(click.ParamType):
    """WIDTHxHEIGHT in pixels: `64x64` becomes (64, 64)."""

    name = 'WxH'

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r'([1-9]\d*)x([1-9]\d*)', value)
        if match is None:
            self.fail(f'{value!r} is not WIDTHxHEIGHT, such as 64x64', param, ctx)
        return int(match[1]), int(match[2])


@click.command(cls=Command)
@option('--source', required=True, metavar='PATH|digits', type=PATH, group='Input',
        help='Folder or zip of images; cifar-10-python.tar.gz; MNIST\'s train-images-idx3-ubyte[.gz], its labels beside it (28x28 images are padded '
             'to 32x32); an LSUN *_lmdb folder; or "digits", scikit-learn\'s 1,797 images of 8x8.')
@option('--max-images', type=click.IntRange(min=1), metavar='INT', group='Input', help='Convert the first so many images only.  [default: all]')
@option('--dest', required=True, metavar='PATH', type=PATH, group='Output', help='A .zip file, replaced if it exists, or a new or empty folder.')
@option('--resolution', type=Resolution(), metavar='WxH', group='Output', help='Resize the images to this size.  [default: keep their size]')
@option('--transform', type=click.Choice(list(TRANSFORMS)), group='Output',
        help='How non-square images become square: center-crop cuts the largest centred square; center-crop-wide cuts to W:H and pads with black '
             'bars to WxW; center-crop-dhariwal is ADM\'s preprocessing, for ImageNet.  [default: stretch]')
@option('--encode-vae', 'vae', metavar='NAME|DIR', type=PATH, group='Output',
        help='Write latents, not images: of this diffusers AutoencoderKL, a name on the Hugging Face hub, such as stabilityai/sd-vae-ft-mse (the VAE '
             'of EDM2), or a folder.')
def main(source: str, max_images: int | None, dest: str, resolution: tuple[int, int] | None, transform: str | None, vae: str | None) -> None:
    """Convert images into a data set for training and evaluation.

    The result is a zip or folder of PNGs of one size, square with a power of two as side, greyscale or RGB, and a dataset.json of labels. Labels
    come from the source's own dataset.json; without one, the class folders become the labels 0, 1, ... in sorted order.

    \b
    Examples:
      python dataset_tool.py --source=digits --dest=datasets/digits.zip
      python dataset_tool.py --source=downloads/cifar-10-python.tar.gz --dest=datasets/cifar10-32x32.zip
      python dataset_tool.py --source=imagenet/train --dest=datasets/imagenet-64x64.zip --resolution=64x64 --transform=center-crop
      python dataset_tool.py --source=datasets/imagenet-512x512.zip --dest=datasets/latents.zip --encode-vae=stabilityai/sd-vae-ft-mse
    """
    if transform is not None and resolution is None:
        raise click.UsageError(f'--transform={transform} needs --resolution=WxH')
    check_dest(pathlib.Path(dest))
    function = make_transform(transform, resolution)
    files = PngFiles() if vae is None else LatentFiles(vae)
    images = open_source(source, max_images)
    if vae is not None:
        images = images._replace(mode='RGB')
    click.echo(convert(images, pathlib.Path(dest), function, files))


if __name__ == '__main__':
    main()
