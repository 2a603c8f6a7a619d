"""EDM's data sets of images and EDM2's of latents, and the order in which processes read them.

A data set is a folder or a zip of equally sized square images, grayscale or RGB, in any nesting; or of
latents, `.npy` files of float32 or float16 [C, H, W]. An optional `dataset.json` holds `{"labels": [[name,
class index or vector], ...]}` or `{"labels": null}`, and for latents may say under `"encoder"` how they were
made. `dataset_tool.py` makes such a data set.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

import numpy as np
import torch.utils.data
from PIL import Image, UnidentifiedImageError

from data import file_names, pixels, zip_index
from data.label_space import Labels, LabelSpace
from data.pixels import IMAGE_EXTENSIONS, UNREADABLE, open_image
from data.zip_index import ZipIndex
from dnnlib import UserError, limits
from dnnlib.archives import open_member
from dnnlib.file_kind import DAMAGED_ZIP, HEAD, NPY, NPZ, ZIP, describe_file
from dnnlib.npy import read_header

# Up to so many images all headers are compared at construction; beyond, each image when it is read
HEADER_CHECK_LIMIT = 10_000
MAX_CLASSES = (
    1_000_000  # a class index beyond is taken for a damaged file: one-hot labels would not fit in memory
)
DIGESTED_FILES = 16  # whose bytes are in a data set's digest: sizes say little of uncompressed images
LABEL_FILE = 'dataset.json'
LATENT_EXTENSION = '.npy'
NOT_A_ZIP = 'File is not a zip file'  # what zipfile says of any file without the record at the end of one

# ----------------------------------------------------------------------------
# Files of a folder or a zip, by name.


class ImageFiles:
    """The images, or latents, and label files of a folder or a zip, by their sorted names with forward
    slashes.

    A zip is opened anew by each process that reads from it: a handle shared over a fork would share its file
    position too. Nothing is ever extracted. Hidden files and macOS resource forks are left out. In a folder
    symbolic links are followed; a zip has none. A backslash in a name separates folders, in a zip as in a
    folder that such a zip was unpacked to.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self._zip, self._zip_owner = None, None
        self.label_entries: dict[str, np.ndarray] | None = None  # what `read_labels` and the like have read
        if not os.path.exists(self.path):
            raise UserError(f'{self.path}: no such file or folder')
        self.is_folder = os.path.isdir(self.path)
        self._index = None if self.is_folder else self._read_index()
        self._stored: dict[str, str] = {}  # names in the folder that have backslashes
        names = self._walk() if self.is_folder else self._index.names
        rows = self.remember('listing', lambda: self._list(names))
        self.images, self.label_files, self.others = (
            [names[i] for i in rows[which]] if self.is_folder else names[rows[which]]
            for which in ('images', 'label_files', 'others')
        )
        self.holds_latents = bool(rows['latents'])
        self._image_rows = None if self.is_folder else rows['images']

    def __getstate__(self):
        return dict(self.__dict__, _zip=None, _zip_owner=None, label_entries=None)

    def _walk(self) -> list[str]:
        stored = list(file_names.walk(self.path))
        names = list(map(file_names.with_slashes, stored))
        self._stored = {name: own for name, own in zip(names, stored) if name != own}
        if self._stored and len(set(names)) < len(names):
            twice = next(name for name, times in Counter(names).items() if times > 1)
            raise UserError(
                f'{self.path} has both {twice} and {self._stored[twice]}: a backslash separates folders as a '
                'slash does, so these are one name; rename one'
            )
        return sorted(names)

    def _read_index(self) -> ZipIndex:
        try:
            index = ZipIndex.read(self.path)
        except UNREADABLE as error:
            kind = None if isinstance(error, PermissionError) else describe_file(self.path)
            what = (
                error
                if kind is None or (kind == DAMAGED_ZIP and str(error) != NOT_A_ZIP)
                else f'it is {kind}'
            )
            raise UserError(
                f'{self.path} is neither a folder nor a complete zip file ({what}); {cure_of_kind(kind)}'
            ) from error
        if self.path.lower().endswith('.npz'):
            raise UserError(f'{self.path} is {NPZ}, not a zip of images; {cure_of_kind(NPZ)}')
        for name in index.links():
            if not file_names.is_hidden(name):
                raise UserError(
                    f'{self.path}: {name} is a symbolic link, so the zip holds a path instead of what it '
                    'leads to; make the zip again with the files that links lead to (zip -r, without -y)'
                )
        return index

    def _list(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Which of the sorted names are `images`, whether those are `latents`, and which are `label_files`
        and `others`.

        Label files are told whatever their case and depth, so that none is passed over. Of a name that
        repeats, the last counts.
        """
        pictures, latents, label_files, others = [], [], [], []
        for i, (name, following) in enumerate(
            zip(names, itertools.chain(itertools.islice(names, 1, None), [None]))
        ):
            if name == following or (
                ('.' in name[:1] or '/.' in name or '__MACOSX' in name) and file_names.is_hidden(name)
            ):
                continue
            extension = name[name.rfind('.') :].lower()
            if extension in IMAGE_EXTENSIONS:
                pictures.append(i)
            elif extension == LATENT_EXTENSION:
                latents.append(i)
            elif name[-len(LABEL_FILE) :].lower() == LABEL_FILE and name[: -len(LABEL_FILE)][-1:] in (
                '',
                '/',
            ):
                label_files.append(i)
            elif name[-1:] != '/':
                others.append(i)
        if pictures and latents:
            raise UserError(
                f'{self.path} holds images and latents ({names[pictures[0]]}, {names[latents[0]]}, ...); '
                'keep one kind, or put them into two folders'
            )
        images = pictures or latents
        if not images:
            kind = None if self.is_folder else describe_file(self.path)
            what = 'holds no images' if kind in (None, ZIP) else f'is {kind} and holds no images'
            raise UserError(f'{self.path} {what}; dataset_tool.py converts other sources')
        for name in (names[i] for i in images):
            if name[0] == '/' or ('..' in name and '..' in name.split('/')):
                raise UserError(
                    f'{self.path} names a file outside of itself, {name}, as no data set does; make the zip '
                    'again'
                )
        return dict(
            images=np.array(images),
            latents=np.array(bool(latents)),
            label_files=np.array(label_files, dtype=np.int64),
            others=np.array(others, dtype=np.int64),
        )

    def remember(self, what: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """What is computed of a zip's directory and label file; for a large zip, what was computed of the
        same one earlier."""
        if self.is_folder or self._index.key is None or len(self._index) < zip_index.CACHE_FROM:
            return compute()
        kinds = hashlib.blake2b(' '.join(sorted(IMAGE_EXTENSIONS)).encode(), digest_size=4).hexdigest()
        return zip_index.cached(self._index.key, f'{what}-{kinds}', compute)

    def entries(self) -> list[zip_index.Entry]:
        """The directory of the zip."""
        return self._index.entries()

    def about_others(self) -> str | None:
        """A sentence about files that are neither images by their names nor label files; None where there are
        none."""
        if not len(self.others):
            return None
        shown = ', '.join(self.others[:3]) + (', ...' if len(self.others) > 3 else '')
        return (
            f'{len(self.others)} files in {self.path} are no images by their names, and are left out: {shown}'
        )

    def folders(self, inner: str) -> set[str]:
        """The names of the folders in `inner`, a path that is empty or ends in a slash; of a zip, those that
        it lists. None that is hidden."""
        if self.is_folder:
            with os.scandir(os.path.join(self.path, inner)) as entries:
                found = {entry.name for entry in entries if entry.is_dir()}
        else:
            found = {
                name[len(inner) :].split('/')[0]
                for name in self._index.names
                if name.endswith('/') and name.startswith(inner) and name != inner
            }
        return {name for name in found if not file_names.is_hidden_part(name)}

    def path_of(self, name: str) -> str:
        """Where the file of that name lies, of a folder."""
        return os.path.join(self.path, self._stored.get(name, name))

    def sizes(self) -> np.ndarray:
        """[N] int64: bytes of each of `images`, uncompressed. A zip's index tells them; in a folder every
        file is looked at. Raises: UserError."""
        if not self.is_folder:
            return self._index.fields['size'][self._image_rows].astype(np.int64)
        try:
            return np.fromiter(
                (os.stat(self.path_of(name)).st_size for name in self.images), np.int64, len(self.images)
            )
        except OSError as error:
            raise UserError(f'{error.filename} cannot be read: {error.strerror}') from error

    def open(self, name: str, limit: int = limits.IMAGE_FILE, what: str = 'an image') -> BinaryIO:
        """The file of that name, for reading, of at most `limit` bytes, as `what` has. Raises: one of
        `limits.UNREADABLE`."""
        if self.is_folder:
            limits.check_size(os.stat(path := self.path_of(name)).st_size, limit, what)
            return open(path, 'rb')
        if self._zip is None or self._zip_owner != os.getpid():
            self._zip, self._zip_owner = zip_index.open_archive(self.path), os.getpid()
        return open_member(self._zip, self._index.info(name), limit, what)

    @contextlib.contextmanager
    def open_image(self, name: str) -> Iterator[Image.Image]:
        """The image of that name: at first its header, and with `load()`, inside the block, its pixels too.
        Raises: UserError."""
        try:
            with self.open(name) as file:
                yield open_image(file, self._size_of(name))
        except UNREADABLE as error:
            what = self._what_it_is(name) if isinstance(error, UnidentifiedImageError) else error
            raise UserError(
                f'{self.path}: {name} is not a readable image ({what}); replace or remove it'
            ) from error

    @contextlib.contextmanager
    def open_latents(self, name: str) -> Iterator[LatentFile]:
        """The latents of that name: at first their header, and with `load()`, inside the block, their values.
        Raises: UserError."""
        try:
            with self.open(name, limits.LATENTS_FILE, 'a file of latents') as file:
                yield LatentFile(file)
        except UNREADABLE as error:
            raise UserError(
                f'{self.path}: {name} is not a readable file of latents ({error}); make it again with '
                'dataset_tool.py'
            ) from error

    def _size_of(self, name: str) -> int:
        return os.stat(self.path_of(name)).st_size if self.is_folder else self._index.info(name).file_size

    def _what_it_is(self, name: str) -> str:
        """What a file is that is no image, as 'it is ...'."""
        with contextlib.suppress(*UNREADABLE), self.open(name) as file:
            return what_it_is(file.read(HEAD))
        return 'it cannot be read'


class LatentFile:
    """A `.npy` file of float32 or float16 [C, H, W]. Nothing but such a header is understood, and it is
    checked before memory is taken.

    Raises: ValueError for any other contents.
    """

    def __init__(self, file: BinaryIO):
        try:
            self._header = read_header(file)
        except limits.UNREADABLE as error:
            raise ValueError(f'its header cannot be read: {error}') from error
        self._file, self.shape, dtype = file, self._header.shape, self._header.dtype
        if len(self.shape) != 3 or dtype.kind != 'f' or dtype.itemsize > 4:
            raise ValueError(
                f'its header says {dtype} {list(self.shape)}, not float32 or float16 and three dimensions'
            )
        if min(self.shape) < 1:
            raise ValueError('it is empty')

    def load(self) -> np.ndarray:
        """float32 [C, H, W]"""
        size = self._header.nbytes
        data = self._file.read(size + 1) if size <= limits.LATENTS_FILE else b''
        if len(data) != size:
            raise ValueError('it is shorter or longer than its header says')
        values = (
            np.frombuffer(data, self._header.dtype)
            .reshape(self.shape, order=self._header.order)
            .astype(np.float32, order='C')
        )
        if not np.isfinite(values).all():
            raise ValueError('it holds numbers that are not finite')
        return values


def what_it_is(head: bytes) -> str:
    """What a file is, by its first bytes, that cannot be opened as an image: 'it is ...'."""
    kind = describe_file(head)
    if kind is None:
        return 'it is of no format that is read'
    return f'it is {kind}' + (', of which the header is damaged' if kind.endswith(' image') else '')


def cure_of_kind(kind: str | None) -> str:
    """What to give instead of a file of a kind that `describe_file` tells, where images are expected."""
    if kind in (NPZ, NPY):
        return 'dataset_tool.py converts arrays of images to a data set'
    if kind and kind.endswith('image'):
        return 'name the folder or the zip that images lie in'
    if kind and kind.startswith(('a web page', 'an XML', 'an empty', 'a file of zeros')):
        return 'download or copy it again'
    if kind and re.search('tar|gzip|bzip2|xz|Zstandard|7-Zip|RAR', kind):
        return 'unpack it and name the folder'
    return 'copy or make it again' if kind in (None, DAMAGED_ZIP) else 'name a folder or a zip of images'


def image_names(folder: str | os.PathLike) -> list[str]:
    """The sorted names of what `ImageFiles` takes for images or for latents in a folder, both at once if
    there are both; none is no error."""
    kinds = IMAGE_EXTENSIONS | {LATENT_EXTENSION}
    return sorted(
        name for name in file_names.walk(os.fspath(folder)) if os.path.splitext(name)[1].lower() in kinds
    )


# ----------------------------------------------------------------------------
# Labels.


def read_labels(files: ImageFiles) -> np.ndarray | None:
    """The labels of `files.images`, in their order; None where there is no `dataset.json` or its labels are
    null.

    `dataset.json` lies at the root, or is the only one in a folder below; it names images from the root or
    from its own folder.

    Returns: [N] int64 class indices or [N, D] float32 vectors.
    Raises: UserError where the file is malformed or leaves out an image.
    """
    return _label_entries(files).get('labels')


def are_label_vectors(files: ImageFiles) -> bool:
    """Whether `dataset.json` says that its labels are vectors, also where they look like classes. Raises: as
    `read_labels`."""
    return bool(_label_entries(files).get('vectors', False))


def count_unused_labels(files: ImageFiles) -> int:
    """How many labels in `dataset.json` are of no image that is there: of a copy that lacks some, perhaps.
    Raises: as `read_labels`."""
    return int(_label_entries(files).get('unused', 0))


def _label_entries(files: ImageFiles) -> dict[str, np.ndarray]:
    """As `_labels_by_name`; a label file is read once, whatever is asked of it."""
    if files.label_entries is None:
        files.label_entries = files.remember('labels', lambda: _labels_by_name(files))
    return files.label_entries


def _labels_by_name(files: ImageFiles) -> dict[str, np.ndarray]:
    """`labels`, how many others are `unused`, and whether they are told to be `vectors`; or nothing."""
    name = _label_file(files)
    table, vectors = (None, False) if name is None else _read_label_table(files, name)
    if table is None:
        return {}
    folder, images = name.removesuffix(LABEL_FILE), list(files.images)
    keys = (
        images
        if not folder
        else [image if image in table else image.removeprefix(folder) for image in images]
    )
    if missing := [image for image, key in zip(images, keys) if key not in table]:
        why = file_names.explain_absence(
            missing[0].removeprefix(folder), table
        ) or file_names.explain_absence(missing[0], table)
        raise UserError(
            f'{files.path}: {name} has no label for {len(missing)} of {len(images)} images, such as '
            f'{missing[0]}' + (f'. {why}' if why else '; make it again')
        )
    return dict(
        labels=_label_array([table[key] for key in keys], f'{files.path}: {name}'),
        unused=np.array(len(table) - len(set(keys))),
        vectors=np.array(vectors),
    )


def read_encoder(files: ImageFiles) -> dict | None:
    """How latents were made, as `encoders.build` takes it, from the entry `"encoder"` of `dataset.json`; None
    where it has none."""
    name = _label_file(files)
    try:
        encoder = None if name is None else _read_json(files, name).get('encoder')
    except limits.UNREADABLE as error:
        raise UserError(
            f'{files.path}: {name} is not {{"labels": [[name, label], ...]}} ({type(error).__name__}: '
            f'{error})'
        ) from error
    if not isinstance(encoder, (dict, type(None))):
        raise UserError(
            f'{files.path}: the encoder in {name} is no object of constructor arguments; make it again with '
            'dataset_tool.py'
        )
    return encoder


def _label_file(files: ImageFiles) -> str | None:
    at_root = LABEL_FILE in files.label_files
    if not at_root and len(files.label_files) > 1:
        raise UserError(
            f'{files.path} holds several label files ({", ".join(files.label_files[:3])}, ...); keep one, or '
            'convert each data set alone'
        )
    name = LABEL_FILE if at_root else next(iter(files.label_files), None)
    if name is not None and not name.endswith(LABEL_FILE):
        raise UserError(
            f'{files.path}: {name} differs from {LABEL_FILE} in upper and lower case; rename it, or remove '
            'it where it holds no labels'
        )
    return name


def _read_json(files: ImageFiles, name: str):
    limit = max(limits.JSON_FILE, limits.LABELS_OF_IMAGE * len(files.images))
    with files.open(name, limit, f'a label file of {len(files.images):,} images') as file:
        return json.loads(file.read(), object_pairs_hook=_without_repeats)


def _without_repeats(pairs: list[tuple[str, object]]) -> dict:
    if len(entries := dict(pairs)) < len(pairs):
        raise ValueError('one of its keys is there twice')
    return entries


def _read_label_table(files: ImageFiles, name: str) -> tuple[dict | None, bool]:
    """(labels by the names of images, or None; whether they are told to be vectors)."""
    try:
        content = _read_json(files, name)
        pairs, vectors = content['labels'], content.get('label_kind') == 'vectors'
        if pairs is None:
            return None, vectors
        pairs = [(file_names.with_slashes(image), label) for image, label in pairs]
    except limits.UNREADABLE as error:
        raise UserError(
            f'{files.path}: {name} is not {{"labels": [[name, label], ...]}} ({type(error).__name__}: '
            f'{error})'
        ) from error
    table = dict(pairs)
    if (
        len(table) < len(pairs)
        and (twice := next((image for image, label in pairs if table[image] != label), None)) is not None
    ):
        raise UserError(f'{files.path}: {name} gives {twice} two different labels; make it again')
    return table, vectors


def _label_array(labels: list, source: str) -> np.ndarray:
    if all(type(label) is int for label in labels):  # not bool
        if not 0 <= min(labels) <= max(labels) < MAX_CLASSES:
            raise UserError(
                f'{source}: class indices from {min(labels)} to {max(labels)} are not in [0, {MAX_CLASSES})'
            )
        return np.array(labels, dtype=np.int64)
    try:
        with np.errstate(over='ignore'):
            vectors = np.array(labels, dtype=np.float32)
    except (ValueError, TypeError, OverflowError):
        vectors = np.empty(0)
    if (
        vectors.ndim != 2
        or not vectors.size
        or not all(isinstance(label, list) for label in labels)
        or not np.isfinite(vectors).all()
    ):
        ordinary = next((type(label) for label in labels if type(label) in (int, list)), None)
        odd = [label for label in labels if type(label) is not ordinary][:1]
        raise UserError(
            f'{source}: labels are neither all class indices nor all vectors of one length of finite numbers '
            'that float32 holds' + (f', such as {json.dumps(odd[0])[:80]}' if odd else '')
        )
    return vectors


# ----------------------------------------------------------------------------
# The data set.


def image_shape_of(
    image: Image.Image, source: str, cure: str = 'convert the data set with dataset_tool.py'
) -> tuple[int, int, int]:
    """(channels, height, width) of an image that training takes as it is. Raises: UserError with the `cure`
    for any other."""
    kind = '16-bit ' + image.mode if is_16_bit(image) else image.mode
    if 'transparency' in image.info:
        raise UserError(
            f'{source} is a {kind} image in which a color stands for transparent pixels, which training and '
            f'measuring would see; {cure}'
        )
    if kind not in ('L', 'RGB'):
        raise UserError(f'{source} is a {kind} image, and only 8-bit grayscale (L) and RGB are read; {cure}')
    return len(kind), image.height, image.width


def image_pixels(image: Image.Image) -> np.ndarray:
    """[C, H, W]"""
    image.load()
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def is_16_bit(image: Image.Image) -> bool:
    """Whether the file has more than 8 bits a channel. Pillow reduces 16-bit RGB on its own, and only the raw
    mode of the decoder tells."""
    return image.mode[0] in 'IF' or pixels.has_16_bits(pixels.raw_mode(image))


class ImageFolderDataset(torch.utils.data.Dataset):
    """Images or latents and their labels, of a folder or zip in EDM's format.

    Args:
        path: folder or zip file.
        resolution: side that the images must have, in pixels; None takes any.
        use_labels: read `dataset.json`; without, labels have length 0.
        max_size: keep a random subset of so many images, drawn by `seed` (the subset that EDM draws).
        xflip: follow the images by their mirror images: twice as many. Of latents, mirrored latents, which
            are those of mirrored images roughly.
        cache: keep decoded images in memory, for each process its own; None: images yes, latents, which are
            larger, no.
    Items: (uint8 [C, H, W] or, of latents, float32 [C, H, W]; float32 [label_dim]); an integer label is
        one-hot.
    Raises: UserError, at construction or, for more than 10,000 images, when an unfit image is read.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        resolution: int | None = None,
        use_labels: bool = False,
        max_size: int | None = None,
        xflip: bool = False,
        cache: bool | None = False,
        seed: int = 0,
    ):
        self._files = ImageFiles(path)
        self._index = random_subset(len(self._files.images), max_size, seed)
        self.caches = not self._files.holds_latents if cache is None else cache
        self._mirrored, self._cache = xflip, ({} if self.caches else None)
        self.unturned: set[int] = (
            set()
            # File numbers of images that viewers turn (EXIF), among those whose headers are read at
            # construction
        )
        self._shape = None  # until headers have been read
        self._shape = self._check_headers()
        if resolution not in (None, self.resolution):
            raise UserError(
                f'{self._files.path} has {self._describe(self._shape)} images, not '
                f'{resolution}x{resolution}; convert it with dataset_tool.py '
                f'--resolution={resolution}x{resolution}'
            )
        labels = read_labels(self._files) if use_labels else None
        if use_labels and labels is None:
            raise UserError(
                f'{self._files.path} has no labels; add them to its {LABEL_FILE}, or train without (--cond=0)'
            )
        self.unused_labels = count_unused_labels(self._files) if use_labels else 0
        self._labels_of_all = (
            None if labels is None else Labels.of_data(labels, are_label_vectors(self._files))
        )
        self.labels = None if labels is None else self._labels_of_all.subset(self._index)

        self.holds_latents = self._files.holds_latents
        self.encoder = read_encoder(self._files) if self.holds_latents else None

    def __getstate__(self):
        return dict(self.__dict__, _cache=None if self._cache is None else {})

    @contextlib.contextmanager
    def _open(self, i: int) -> Iterator[tuple[tuple[int, int, int], Callable[[], np.ndarray]]]:
        """(shape, function that reads the values) of file number i, within the block."""
        name = self._files.images[i]
        if self._files.holds_latents:
            with self._files.open_latents(name) as latents:
                yield latents.shape, latents.load
        else:
            with self._files.open_image(name) as image:
                if self._shape is None and pixels.is_left_unturned(image):
                    self.unturned.add(int(i))
                yield image_shape_of(image, self._source(i)), functools.partial(image_pixels, image)

    def _check_headers(self) -> tuple[int, int, int]:
        """The shape of the first image, once all others, where they are few, have been found to share it."""
        shape = self._header(self._index[0])
        if shape[1] != shape[2]:
            raise UserError(
                f'{self._source(self._index[0])} is {self._describe(shape)}, not square; convert the data '
                'set with dataset_tool.py --transform=center-crop'
            )
        if len(self._index) <= HEADER_CHECK_LIMIT:
            for i in self._index:
                self._check_shape(self._header(i), shape, i)
        return shape

    def _header(self, i: int) -> tuple[int, int, int]:
        with self._open(i) as (shape, _):
            return shape

    def _check_shape(self, shape: tuple, expected: tuple, i: int) -> None:
        if shape != expected:
            raise UserError(
                f'{self._source(i)} is {self._describe(shape)}, but {self._files.images[self._index[0]]} is '
                f'{self._describe(expected)}; give all images one size and mode with dataset_tool.py'
            )

    def _source(self, i: int) -> str:
        return f'{self._files.path}: {self._files.images[i]}'

    @staticmethod
    def _describe(shape: tuple) -> str:
        return f'{shape[2]}x{shape[1]}x{shape[0]}'

    def _pixels(self, i: int) -> np.ndarray:
        """[C, H, W] of file number i."""
        if self._cache is not None and i in self._cache:
            return self._cache[i]
        with self._open(i) as (shape, read):
            self._check_shape(shape, self._shape, i)
            values = read()
        if self._cache is not None:
            self._cache[i] = values
        return values

    def __len__(self) -> int:
        return len(self._index) * (2 if self._mirrored else 1)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= i < len(self):
            raise IndexError(f'image {i} of {len(self)}')
        copy, place = divmod(int(i), len(self._index))
        values = self._pixels(self._index[place])
        return np.array(values[:, :, ::-1] if copy else values, order='C'), self.get_label(i)

    def get_label(self, i: int) -> np.ndarray:
        """float32 [label_dim] label of item i."""
        return (
            np.zeros(0, dtype=np.float32) if self.labels is None else self.labels[int(i) % len(self._index)]
        )

    def digest(self) -> str:
        """Hexadecimal digest of the whole data set: names and uncompressed sizes of its images, the bytes of
        a few, and the labels in use.

        The same for a folder and a zip of it, under whatever name, in whatever folder within the zip, and
        however compressed. It does not depend on `max_size` and `xflip`. Raises: UserError where a file
        cannot be read.
        """
        names, last = list(self._files.images), len(self._files.images) - 1
        shared = itertools.takewhile(
            lambda parts: parts[0] == parts[1], zip(*(name.split('/')[:-1] for name in (names[0], names[-1])))
        )
        start = sum(
            len(folder) + 1 for folder, _ in shared
        )  # names are sorted: what the first and the last share, all do
        digest = hashlib.sha256('\0'.join(name[start:] for name in names).encode(errors='surrogateescape'))
        digest.update(self._files.sizes().astype('<i8'))
        for name in dict.fromkeys(names[i * last // (DIGESTED_FILES - 1)] for i in range(DIGESTED_FILES)):
            try:
                with self._files.open(name) as file:
                    digest.update(hashlib.sha256(file.read()).digest())
            except UNREADABLE as error:
                raise UserError(
                    f'{self._files.path}: {name} cannot be read ({error}); replace or remove it'
                ) from error
        if self._labels_of_all is not None:
            digest.update(self._labels_of_all.digest().encode())
        return digest.hexdigest()

    @property
    def name(self) -> str:
        """File or folder name without `.zip`."""
        return os.path.basename(os.path.abspath(self._files.path)).removesuffix('.zip').removesuffix('.ZIP')

    @property
    def image_shape(self) -> list[int]:
        """[channels, height, width] of the items; `encoders.for_dataset` says what a network sees of
        latents."""
        return list(self._shape)

    @property
    def resolution(self) -> int:
        return self._shape[1]

    @property
    def num_channels(self) -> int:
        return self._shape[0]

    @property
    def has_labels(self) -> bool:
        return self.labels is not None

    @property
    def label_dim(self) -> int:
        """Classes of the whole data set (`max_size` does not change it), or the length of its label vectors;
        0 without labels."""
        return self.label_space.dim

    @property
    def label_space(self) -> LabelSpace:
        """What the labels are, and which classes have images here."""
        return LabelSpace(0) if self.labels is None else self.labels.space

    @property
    def label_shape(self) -> list[int]:
        return [self.label_dim]

    def about_others(self) -> str | None:
        """A sentence about files that are left out, as they are no images by their names; None where there
        are none."""
        return self._files.about_others()

    @property
    def num_files(self) -> int:
        """Images of the whole data set, of which `max_size` may take some, and which `xflip` mirrors."""
        return len(self._files.images)

    @property
    def num_images(self) -> int:
        """Images that are used, without mirrored ones."""
        return len(self._index)


def random_subset(count: int, max_size: int | None, seed: int) -> np.ndarray:
    """Sorted indices of the images to keep."""
    if max_size is None or max_size >= count:
        return np.arange(count)
    if max_size < 1:
        raise UserError(f'a data set of at most {max_size} images is empty; keep at least one')
    # RandomState, unlike numpy's newer generators, promises the same stream for ever.
    return np.sort(np.random.RandomState(seed % 2**32).permutation(count)[:max_size])


# ----------------------------------------------------------------------------
# The order of training.


class InfiniteSampler(torch.utils.data.Sampler):
    """The endless global stream of image indices, of which each process takes its share.

    Image g = 0, 1, 2, ... of the stream is `permutation(g // size)[g % size]`. Global batch k is images start
    + k·batch_size onwards, and process r of R takes the r-th of R equal contiguous parts of each. The images
    seen thus depend neither on the number of processes nor on where training was stopped and resumed with
    start = images seen.

    Args:
        size: images in the data set.
        batch_size: global batch size, a multiple of num_replicas.
        rank, num_replicas: this process and how many there are.
        seed: of the permutations, any integer.
        shuffle: False leaves every epoch in the order of the data set.
        start: images of the stream to skip.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        rank: int = 0,
        num_replicas: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        start: int = 0,
    ):
        if size < 1 or batch_size < 1 or start < 0 or not 0 <= rank < num_replicas:
            raise ValueError(
                f'no stream from image {start} of {size}, {batch_size} at a time, for process {rank} of '
                f'{num_replicas}'
            )
        if batch_size % num_replicas:
            raise UserError(
                f'a batch of {batch_size} images does not divide among {num_replicas} processes; choose a '
                f'multiple of {num_replicas}'
            )
        self.size, self.batch_size, self.rank, self.num_replicas = size, batch_size, rank, num_replicas
        self.seed, self.shuffle, self.start = seed, shuffle, start

    def permutation(self, epoch: int) -> np.ndarray:
        """[size] order of the data set in that epoch; a function of (seed, epoch) alone."""
        if not self.shuffle:
            return np.arange(self.size)
        key = np.array([self.seed % 2**64, epoch], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key)).permutation(self.size)

    def __iter__(self) -> Iterator[int]:
        order = functools.lru_cache(maxsize=1)(self.permutation)  # g only grows: one epoch at a time
        share = self.batch_size // self.num_replicas
        for batch in itertools.count(self.start, self.batch_size):
            for g in range(batch + self.rank * share, batch + (self.rank + 1) * share):
                epoch, place = divmod(g, self.size)
                yield int(order(epoch)[place])
