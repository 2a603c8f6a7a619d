"""Sources of dataset_tool.py, as sequences of labeled images: folders, zips, arrays, CIFAR-10, MNIST, LSUN,
digits."""

from __future__ import annotations

import gzip
import importlib.util
import io
import itertools
import math
import mmap
import os
import pathlib
import re
import signal
import struct
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import click
import numpy as np
from PIL import Image, UnidentifiedImageError

from data import file_names, lmdb_pipe
from data.image_files import ImageFiles, describe_non_image
from data.label_file import are_label_vectors, count_unused_labels, read_labels
from data.label_space import Labels
from data.pixels import UNREADABLE, Picture, is_color, open_image
from dnnlib import UserError, limits
from dnnlib.archives import BoundedTar
from dnnlib.file_kind import HEAD, describe_file
from dnnlib.text import printable
from torch_utils.restricted_pickle import MalformedPickle, read_pickle
from torch_utils.stored_arrays import PICKLE_NAMES, stored_array

SHOWN = 5  # names listed in a message
Label = int | list[float] | None


class Item(NamedTuple):
    """An image of a source: index, name for messages, and label (class index, vector or None)."""

    number: int
    name: str
    picture: Picture
    label: Label


class Source(NamedTuple):
    """A sequence of images to convert."""

    count: int
    mode: str  # 'L' or 'RGB', of all written images
    items: Iterable[Item]
    vectors: bool = False  # labels are vectors, even if the selected ones look one-hot


class Selection(NamedTuple):
    """Which images of a source to convert, and with which labels.

    Attributes:
        max_images: keep the first N; None keeps all.
        max_per_class: keep the first N of each class; None keeps all.
        labels_from: auto | folders | dataset.json | none.
    """

    max_images: int | None = None
    max_per_class: int | None = None
    labels_from: str = 'auto'

    def rows(
        self, labels: Sequence[Label] | None, count: int, names: Sequence[str] | None = None
    ) -> Sequence[int]:
        """Sorted indices of the selected images among `count`; prints a note about classes (`names`) left
        out."""
        rows: Sequence[int] = range(count)
        classes = Counter(labels) if labels is not None and count and isinstance(labels[0], int) else None
        if self.max_per_class is not None:
            if classes is None:
                raise UserError(
                    '--max-images-per-class needs class labels, and the source has none; use --max-images'
                )
            if few := [label for label, number in classes.items() if number < self.max_per_class]:
                note(
                    f'{_listed(few, names)}: {len(few)} of {len(classes)} classes have fewer than '
                    f'{self.max_per_class} images.'
                )
            rows = first_of_each(labels, self.max_per_class)
        rows = rows[: self.max_images]
        if classes is not None and (left_out := classes.keys() - {labels[i] for i in rows}):
            note(
                f'--max-images={self.max_images} leaves out {len(left_out)} of {len(classes)} classes '
                f'({_listed(left_out, names)}); --max-images-per-class takes as many of each.'
            )
        return rows


def first_of_each(labels: Sequence[int], count: int) -> list[int]:
    """Sorted indices of the first `count` occurrences of each label."""
    seen, rows = Counter(), []
    for i, label in enumerate(labels):
        if seen[label] < count:
            seen[label] += 1
            rows.append(i)
    return rows


def note(text: str) -> None:
    click.echo(f'Note: {printable(text)}', err=True)


def _explain(path: pathlib.Path, error: Exception) -> str:
    """Why an archive cannot be read: it is a file of another kind, or else the reader's message."""
    kind = None if isinstance(error, PermissionError) else describe_file(path)
    return str(error) if kind is None or re.search('gzip|tar|IDX', kind) else f'it is {kind}'


def _listed(values: Iterable, names: Sequence[str] | None = None) -> str:
    """The first sorted values, as 'name=value' if there are names by value."""
    values = sorted(values)
    shown = ', '.join(str(value) if names is None else f'{names[value]}={value}' for value in values[:SHOWN])
    return shown + (', ...' if len(values) > SHOWN else '')


# ----------------------------------------------------------------------------
# Arrays.


def array_source(images: np.ndarray, labels: Sequence[int] | None, name: str, selection: Selection) -> Source:
    """Source from uint8 [N, H, W] or [N, H, W, 3] images and class indices."""
    if images.size == 0:
        raise UserError(f'{name} holds no images')
    if selection.labels_from in ('folders', 'dataset.json'):
        raise UserError(
            f'--labels-from={selection.labels_from} is for folders and zips of images, not for {name}; leave '
            'it out'
        )
    labels = None if labels is None or selection.labels_from == 'none' else [int(label) for label in labels]
    rows = selection.rows(labels, len(images))
    items = (
        Item(
            i,
            f'{name}[{row}]',
            Picture(Image.fromarray(np.ascontiguousarray(images[row]))),
            None if labels is None else labels[row],
        )
        for i, row in enumerate(rows)
    )
    return Source(len(rows), 'L' if images.ndim == 3 else 'RGB', items)


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
            if found == magic:
                limits.check_size(size, limits.IDX_FILE, 'an IDX file')
                limits.check_inflation(size, path.stat().st_size, 'its values')
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
    name = path.name.replace('images-idx3', 'labels-idx1')
    beside = [path.with_name(n) for n in (name, name.removesuffix('.gz'), name + '.gz')]
    labels_path = next((p for p in beside if p.is_file()), None)
    if labels_path is None:
        raise UserError(f'{path} needs its label file beside it, {beside[0]}')
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


def read_cifar_batch(data: bytes, source: str) -> tuple[np.ndarray, list[int]]:
    """uint8 [N, 32, 32, 3] images and N class indices of a pickled CIFAR-10 batch, read as plain data."""
    file = io.BytesIO(data)
    try:
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
    images, labels = zip(
        *(read_cifar_batch(data, f'{path}: {name}') for _, (name, data) in sorted(batches.items()))
    )
    return array_source(
        np.concatenate(images), list(itertools.chain.from_iterable(labels)), path.name, selection
    )


# ----------------------------------------------------------------------------
# Labels from class folders.


class ClassFolders(NamedTuple):
    """Assignment of images to class folders.

    Attributes:
        prefix: path to the class folders: empty, or ends in a slash.
        names: sorted names of the class folders.
        labels: index into `names` for each image; None for an image outside of class folders.
    """

    prefix: str
    names: list[str]
    labels: list[int | None]


def class_folders(images: Sequence[str]) -> ClassFolders | None:
    """Classes by the outermost folders that tell images apart; None if all images are in the root.

    Images beside folders with images have no class. If all are in one folder, that is the only class.
    """
    by_folder = defaultdict(list)
    for i, name in enumerate(images):
        by_folder[tuple(name.split('/')[:-1])].append(i)

    # Descend to the folder where class folders begin, leaving out images on the way.
    folders = set(by_folder)
    prefix = _common(folders)
    while prefix in folders and len(folders) > 1:
        folders.remove(prefix)
        prefix = _common(folders)
    depth = len(prefix) - 1 if folders == {prefix} else len(prefix)
    if depth < 0:
        return None

    # Number the class folders in sorted order.
    names = sorted({folder[depth] for folder in folders})
    index, labels = {name: i for i, name in enumerate(names)}, [None] * len(images)
    for folder in folders:
        for i in by_folder[folder]:
            labels[i] = index[folder[depth]]
    return ClassFolders(''.join(f'{part}/' for part in prefix[:depth]), names, labels)


def _common(folders: set[tuple[str, ...]]) -> tuple[str, ...]:
    """Longest common prefix of the folders, each a tuple of names."""
    pairs = zip(min(folders), max(folders))
    return tuple(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def folder_labels(files: ImageFiles, leave_out: bool) -> tuple[list[str], list[int], list[str]] | None:
    """(image names, class indices, class names) by class folders; None without folders.

    Args:
        leave_out: skip images outside of class folders; otherwise they are an error.
    """
    found = class_folders(files.images)
    if found is None:
        return None
    if strays := [name for name, label in zip(files.images, found.labels) if label is None]:
        where = (
            f'{len(strays)} of {len(files.images)} images in {files.path} are outside of class folders '
            f'({_listed(strays)})'
        )
        if not leave_out:
            raise UserError(
                f'{where} and have no label. Skip them with --labels-from=folders, write all images without '
                'labels with --labels-from=none, or move them.'
            )
        note(f'{where} and are skipped.')
    _check_class_names(files, found)
    shown = ', '.join(f'{name}={i}' for i, name in enumerate(found.names[:10])) + (
        ', ...' if len(found.names) > 10 else ''
    )
    click.echo(printable(f'Labels from {len(found.names)} class folders: {shown}'), err=True)
    pairs = [(name, label) for name, label in zip(files.images, found.labels) if label is not None]
    return [name for name, _ in pairs], [label for _, label in pairs], found.names


def _check_class_names(files: ImageFiles, found: ClassFolders) -> None:
    """Reject class folders that look the same; print a note about similar ones, and about empty folders."""
    for key, alike in (
        (file_names.composed, 'in Unicode normalization only (composed, NFC, against decomposed, NFD)'),
        (str.casefold, 'in case only'),
    ):
        groups = defaultdict(list)
        for name in found.names:
            groups[key(name)].append(name)
        for first, second, *_ in (group for group in groups.values() if len(group) > 1):
            text = f'{files.path}: the class folders {first!a} and {second!a} differ {alike}'
            if key is file_names.composed:
                raise UserError(f'{text}; rename one, or put their images into one folder')
            note(f'{text}; they are two classes.')
    if empty := files.folders(found.prefix) - set(found.names):
        note(
            f'{len(empty)} folders beside the class folders in {files.path} hold no images and are not '
            f'classes ({_listed(empty)}).'
        )


# ----------------------------------------------------------------------------
# Image files.


def files_source(path: pathlib.Path, selection: Selection, background: tuple[int, int, int]) -> Source:
    """A folder or zip of images, sorted by name; RGB if any image is in color (mostly the first one
    tells)."""
    files = ImageFiles(path)
    if files.holds_latents:
        with files.open_latents(files.images[0]):  # or it holds other arrays
            pass
        raise UserError(
            f'{path} already holds latents ({files.images[0]}, ...); use it as it is, or name the images '
            'they were made from'
        )
    names, labels, classes = labeled_images(files, selection.labels_from)
    rows = selection.rows(labels, len(names), classes)
    mode = 'RGB' if any(_is_color(files, names[row], background) for row in rows) else 'L'
    items = (
        Item(i, f'{path}: {names[row]}', _read(files, names[row]), None if labels is None else labels[row])
        for i, row in enumerate(rows)
    )
    vectors = (
        bool(labels)
        and isinstance(labels[0], list)
        and Labels.of_data(np.array(labels), are_label_vectors(files)).are_vectors
    )
    if about := files.about_others():
        note(f'{about}.')
    return Source(len(rows), mode, items, vectors)


def labeled_images(
    files: ImageFiles, labels_from: str
) -> tuple[Sequence[str], list[Label] | None, list[str] | None]:
    """(image names, labels or None, class names or None) for a `Selection.labels_from`."""
    if labels_from == 'none':
        return files.images, None, None
    if labels_from == 'dataset.json' or (labels_from == 'auto' and files.label_files):
        labels = read_labels(files)
        if labels is None and labels_from == 'dataset.json':
            raise UserError(f'{files.path} has no dataset.json with labels; leave out --labels-from')
        if unused := count_unused_labels(files):
            note(f'{unused} labels in dataset.json have no image in {files.path}. Is it complete?')
        return files.images, None if labels is None else labels.tolist(), None
    by_folder = folder_labels(files, leave_out=labels_from == 'folders')
    if by_folder is None and labels_from == 'folders':
        raise UserError(f'{files.path} has no class folders; leave out --labels-from')
    return by_folder or (files.images, None, None)


def _is_color(files: ImageFiles, name: str, background: tuple[int, int, int]) -> bool:
    with files.open_image(name) as image:
        return is_color(image, background)


def _read(files: ImageFiles, name: str) -> Picture:
    with files.open_image(name) as image:
        return Picture.load(image)


def read_lmdb(path: pathlib.Path, count: int) -> Iterator[int | tuple[bytes, bytes]]:
    """Yields the number of records of a database, then its first `count` records (key, value).

    Reads in another process (`lmdb_pipe`), which damaged or missing pages may crash. Raises: UserError.
    """
    if importlib.util.find_spec('lmdb') is None:
        raise UserError(
            f'{path} is an LMDB database, but the lmdb package is not installed; run: pip install lmdb'
        )
    command = [sys.executable, lmdb_pipe.__file__, os.path.abspath(path), str(count)]
    try:
        shortage = _shortage_of_lmdb(path / 'data.mdb')
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            try:
                (total,) = lmdb_pipe.HEAD.unpack(_take(process, lmdb_pipe.HEAD.size))
                yield total
                for _ in range(min(count, total)):
                    key, value = lmdb_pipe.LENGTHS.unpack(_take(process, lmdb_pipe.LENGTHS.size))
                    limits.check_size(key + value, limits.IMAGE_FILE, 'an image')
                    yield _take(process, key), _take(process, value)
            except EOFError as error:
                # The reader's own message, a file too short, or the signal that ended it.
                said = process.stderr.read().decode(errors='replace').strip().splitlines()
                status = process.wait()
                signaled = (
                    f'it is damaged: reading it ends in {signal.Signals(-status).name}'
                    if status < 0
                    else 'it ends before its last record'
                )
                raise ValueError(said[-1] if said else shortage or signaled) from error
            finally:
                process.kill()
    except UNREADABLE as error:
        raise UserError(
            f'{path} is not a readable LMDB database ({error}); copy or download it again'
        ) from error


def _take(process: subprocess.Popen, size: int) -> bytes:
    """The next bytes of a process's output. Raises: EOFError if it ends first."""
    data = process.stdout.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _shortage_of_lmdb(path: pathlib.Path) -> str:
    """How much shorter a file is than the newer of its two meta pages declares, in words; '' if complete.

    A shortage is no error yet: unused pages at the end may be missing, and only reading tells. Raises:
    ValueError if reading could not tell, because the file ends within a memory page, whose rest would read
    as zeros, or has no meta pages; OSError.

    Layout (LMDB's mdb.c, MDB_meta, data version 1): 16 bytes of page header, magic number, version, address,
    map size, two tables of 48 bytes (the first begins with the page size), last page, transaction.
    """
    # The two meta pages.
    meta = struct.Struct('<16xIIQQI92xQQ')
    with open(path, 'rb') as file:
        length = os.fstat(file.fileno()).st_size
        pages = [meta.unpack(file.read(meta.size).ljust(meta.size, b'\0'))]
        size = pages[0][4]
        if pages[0][:2] != (0xBEEFC0DE, 1) or size not in (1 << bits for bits in range(8, 17)):
            raise ValueError('it does not begin like one')
        file.seek(size)
        pages.append(meta.unpack(file.read(meta.size).ljust(meta.size, b'\0')))

    # The newer one counts the pages.
    wanted = (max(pages, key=lambda page: page[6])[5] + 1) * size
    shortage = f'it has {length:,} bytes but declares {wanted:,}' if length < wanted else ''
    if length % size or (shortage and length % mmap.PAGESIZE):
        raise ValueError(shortage or f'it ends within a page of {size:,} bytes')
    return shortage


def lmdb_source(path: pathlib.Path, selection: Selection) -> Source:
    """An LSUN `*_lmdb` folder of JPEG or WebP images, in key order, without labels."""
    if selection.labels_from in ('folders', 'dataset.json'):
        raise UserError(
            f'--labels-from={selection.labels_from} is for folders and zips of images, not for the LMDB '
            f'database {path}; leave it out'
        )
    (count,) = read_lmdb(path, 0)
    if count == 0:
        raise UserError(f'{path} holds no images')
    rows = selection.rows(None, count)
    return Source(len(rows), 'RGB', _lmdb_items(path, len(rows)))


def _lmdb_items(path: pathlib.Path, count: int) -> Iterator[Item]:
    records = read_lmdb(path, count)
    next(records)
    for i, (key, value) in enumerate(records):
        name = f'{path}: {key.decode("ascii", "backslashreplace")}'
        try:
            picture = Picture.load(open_image(io.BytesIO(value), len(value)))
        except UNREADABLE as error:
            what = describe_non_image(value[:HEAD]) if isinstance(error, UnidentifiedImageError) else error
            raise UserError(f'{name} is not a readable image ({what}); replace or remove it') from error
        yield Item(i, name, picture, None)
