"""Sources that are arrays of images: scikit-learn's digits, MNIST, CIFAR-10."""

from __future__ import annotations

import gzip
import io
import itertools
import math
import pathlib
import re
import struct
from collections.abc import Sequence

import numpy as np
from PIL import Image

from data.pixels import UNREADABLE, Picture
from data.sources.selection import Item, Selection, Source
from dnnlib import UserError, limits
from dnnlib.archives import BoundedTar
from dnnlib.file_kind import describe_file
from torch_utils.restricted_pickle import MalformedPickle, read_pickle
from torch_utils.stored_arrays import PICKLE_NAMES, stored_array


def _explain(path: pathlib.Path, error: Exception) -> str:
    """Why an archive cannot be read: it is a file of another kind, or else the reader's message."""
    kind = None if isinstance(error, PermissionError) else describe_file(path)
    return str(error) if kind is None or re.search('gzip|tar|IDX', kind) else f'it is {kind}'


def array_source(
    images: np.ndarray,
    labels: Sequence[int] | None,
    name: str,
    selection: Selection,
    class_names: Sequence[str] | None = None,
) -> Source:
    """Source from uint8 [N, H, W] or [N, H, W, 3] images and class indices."""
    if images.size == 0:
        raise UserError(f'{name} holds no images')
    selection.refuse_label_files(name)

    # Images are views of the array, read when they are needed.
    labels = None if labels is None or selection.labels_from == 'none' else [int(label) for label in labels]
    rows = selection.rows(labels, len(images), class_names)
    items = (
        Item(
            i,
            f'{name}[{row}]',
            Picture(Image.fromarray(np.ascontiguousarray(images[row]))),
            None if labels is None else labels[row],
        )
        for i, row in enumerate(rows)
    )
    mode = 'L' if images.ndim == 3 else 'RGB'
    return Source(len(rows), mode, items, class_names=None if labels is None else class_names)


def digits_source(selection: Selection) -> Source:
    """scikit-learn's bundled digits: 1,797 grayscale 8x8 images with values 0..16, 10 classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return array_source(
        np.rint(digits.images * 255 / 16).astype(np.uint8), digits.target, 'digits', selection
    )


def read_idx(path: pathlib.Path, magic: int) -> np.ndarray:
    """The uint8 array of an IDX file, gzipped or not; the last byte of the magic number counts dimensions."""
    try:
        with (gzip.open if path.suffix == '.gz' else open)(path, 'rb') as file:
            header = struct.Struct(f'>{1 + (magic & 0xFF)}I')
            found, *shape = header.unpack(file.read(header.size))
            size = math.prod(shape)
            # Check the size in the header before any memory is allocated for it.
            if found == magic:
                limits.check_size(size, limits.IDX_FILE, 'an IDX file')
                limits.check_inflation(size, path.stat().st_size, 'its values')
            # One byte more than there should be shows a longer file.
            data = file.read(size + 1) if found == magic else b''
    except UNREADABLE as error:
        raise UserError(
            f'{path} is not a readable IDX file ({_explain(path, error)}); download it again'
        ) from error
    if found != magic or len(data) != size:
        what = _explain(path, ValueError(f'magic number {found:#x} instead of {magic:#x}, or wrong length'))
        raise UserError(f'{path} is not a complete IDX file ({what}); download it again')
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def mnist_source(path: pathlib.Path, selection: Selection) -> Source:
    """MNIST's images and the label file beside them; 28x28 is padded with black to 32x32, as EDM does."""
    # Find the label file: gzipped or not, whatever the images are.
    name = path.name.replace('images-idx3', 'labels-idx1')
    beside = [path.with_name(n) for n in (name, name.removesuffix('.gz'), name + '.gz')]
    labels_path = next((p for p in beside if p.is_file()), None)
    if labels_path is None:
        raise UserError(f'{path} needs its label file beside it, {beside[0]}')

    # Read both.
    images, labels = read_idx(path, 0x803), read_idx(labels_path, 0x801)
    if len(images) != len(labels):
        raise UserError(
            f'{path} has {len(images)} images, but {labels_path} has {len(labels)} labels; take both from '
            'one release'
        )
    if images.shape[1:] == (28, 28):
        images = np.pad(images, [(0, 0), (2, 2), (2, 2)])
    return array_source(images, labels, path.name, selection)


# ----------------------------------------------------------------------------
# CIFAR-10's pickles, read without running code.


# fmt: off
CIFAR10_CLASSES = (
    'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck',
)
# fmt: on


def read_cifar_batch(data: bytes, source: str) -> tuple[np.ndarray, list[int]]:
    """uint8 [N, 32, 32, 3] images and N class indices of a pickled CIFAR-10 batch, read as plain data."""
    file = io.BytesIO(data)
    try:
        # Rows of the array are the three color planes of an image, one after another.
        batch = read_pickle(file, len(data), PICKLE_NAMES)
        images, labels = stored_array(batch['data'], wanted='uint8', codes='u1').read(file), batch['labels']
        images = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        if len(images) != len(labels) or not all(type(label) is int and 0 <= label < 10 for label in labels):
            raise ValueError(
                f'it has {len(images)} images and {len(labels)} labels, or a label is not in 0..9'
            )
    except UNREADABLE as error:
        what = f'it {error}' if isinstance(error, MalformedPickle) else error
        raise UserError(
            f'{source} is not a CIFAR-10 batch ({what}); download cifar-10-python.tar.gz again'
        ) from error
    return images, labels


def cifar10_source(path: pathlib.Path, selection: Selection) -> Source:
    """The training batches of `cifar-10-python.tar.gz`: 50,000 images of 32x32, 10 classes."""
    # Collect the batches by number; the archive may have them in any order.
    batches = {}
    try:
        limits.check_size(path.stat().st_size, limits.TAR_ARCHIVE, "CIFAR-10's archive")
        with open(path, 'rb') as file, BoundedTar.open(fileobj=file) as archive:
            for number, member in enumerate(archive):
                if number == limits.TAR_MEMBERS:
                    raise limits.TooLarge(f'has more than {number:,} files')
                if member.isreg() and (match := re.search(r'(?:^|/)data_batch_([0-9]{1,3})$', member.name)):
                    limits.check_size(member.size, limits.PICKLED_BATCH, 'a CIFAR-10 batch')
                    batches[int(match[1])] = member.name, archive.extractfile(member).read()
    except limits.TooLarge as error:
        raise UserError(
            f'{path} is not cifar-10-python.tar.gz (it {error}); unpack other archives and name the folder'
        ) from error
    except UNREADABLE as error:
        raise UserError(
            f'{path} is not a complete tar archive ({_explain(path, error)}); download it again'
        ) from error
    if not batches:
        raise UserError(
            f'{path} holds no CIFAR-10 batches (data_batch_1, ...); only cifar-10-python.tar.gz is read as a '
            'tar archive; unpack others and name the folder'
        )

    # Join them.
    images, labels = zip(
        *(read_cifar_batch(data, f'{path}: {name}') for _, (name, data) in sorted(batches.items()))
    )
    return array_source(
        np.concatenate(images),
        list(itertools.chain.from_iterable(labels)),
        path.name,
        selection,
        CIFAR10_CLASSES,
    )
