"""Images, latents and label files of a folder or zip, by name."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from data import file_names, zip_index
from data.pixels import IMAGE_EXTENSIONS, UNREADABLE, open_image
from data.zip_index import ZipIndex
from dnnlib import UserError, limits
from dnnlib.archives import open_member
from dnnlib.file_kind import DAMAGED_ZIP, HEAD, NPY, NPZ, ZIP, describe_file
from dnnlib.npy import read_header

LABEL_FILE = 'dataset.json'
LATENT_EXTENSION = '.npy'
NOT_A_ZIP = 'File is not a zip file'  # zipfile's message for any file without an end-of-archive record


class Unreadable(UserError):
    """An image file whose contents cannot be read."""


class NoImages(UserError):
    """A folder or file without images."""


class ImageFiles:
    """Images (or latents) and label files of a folder or zip, sorted by name.

    Each process opens a zip for itself, because a handle shared across a fork shares its file position.
    Nothing is extracted. Hidden files and macOS resource forks are skipped. Symbolic links are followed in
    folders and refused in zips. Names use forward slashes; a backslash in a stored name separates folders.
    """

    def __init__(self, path: str | os.PathLike):
        # State of this process.
        self.path = os.fspath(path)
        self._zip, self._zip_owner = None, None
        self.label_entries: dict[str, np.ndarray] | None = None  # parsed label file, filled by `read_labels`
        if not os.path.exists(self.path):
            raise UserError(f'{self.path}: no such file or folder')

        # Names, from the disk or the zip's directory.
        self.is_folder = os.path.isdir(self.path)
        # Its PNGs would pass as a data set of a few large images.
        if self.is_folder and os.path.exists(os.path.join(self.path, file_names.RUN_RECORD)):
            raise UserError(
                f'{self.path} is the folder of a training run, whose pictures are grids of samples; give a '
                'folder of images, such as the --outdir of generate.py'
            )
        self._index = None if self.is_folder else self._read_index()
        self._stored: dict[str, str] = {}  # normalized name -> name on disk, where the latter has backslashes
        names = self._walk() if self.is_folder else self._index.names

        # Classify them; a zip's rows of `names` stay arrays, because there may be millions.
        rows = self.remember('listing', lambda: self._list(names))
        self.images, self.label_files, self.others = (
            [names[i] for i in rows[which]] if self.is_folder else names[rows[which]]
            for which in ('images', 'label_files', 'others')
        )
        self.holds_latents = bool(rows['latents'])
        self._image_rows = None if self.is_folder else rows['images']

    def __getstate__(self):
        # Handles cannot be pickled, and labels are large: another process reads them again.
        return dict(self.__dict__, _zip=None, _zip_owner=None, label_entries=None)

    def _walk(self) -> list[str]:
        stored = list(file_names.walk(self.path))
        names = list(map(file_names.with_slashes, stored))
        self._stored = {name: own for name, own in zip(names, stored) if name != own}
        if self._stored and len(set(names)) < len(names):
            twice = next(name for name, times in Counter(names).items() if times > 1)
            raise UserError(
                f'{self.path} has both {twice} and {self._stored[twice]}: a backslash separates folders like '
                'a slash, so the names collide; rename one'
            )
        return sorted(names)

    def _read_index(self) -> ZipIndex:
        # Say what a file of another kind is.
        try:
            index = ZipIndex.read(self.path)
        except UNREADABLE as error:
            kind = None if isinstance(error, PermissionError) else describe_file(self.path)
            specific = kind is None or (kind == DAMAGED_ZIP and str(error) != NOT_A_ZIP)
            what = error if specific else f'it is {kind}'
            raise UserError(
                f'{self.path} is neither a folder nor a complete zip file ({what}); {cure_of_kind(kind)}'
            ) from error

        # Refuse what other programs would read differently.
        if self.path.lower().endswith('.npz'):
            raise UserError(f'{self.path} is {NPZ}, not a zip of images; {cure_of_kind(NPZ)}')
        for name in index.links():
            if not file_names.is_hidden(name):
                raise UserError(
                    f'{self.path}: {name} is a symbolic link, so the zip holds a path and not the file; '
                    'recreate the zip with the linked files (zip -r, without -y)'
                )
        return index

    def _list(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Indices of sorted names by kind: `images`, `label_files`, `others`; whether images are `latents`.

        Label files match in any case and at any depth, so that none is overlooked. The last of equal names
        wins.
        """
        # Classify by extension. There may be millions of names: the cheap tests come before `is_hidden`.
        pictures, latents, label_files, others = [], [], [], []
        # Sorted names: equal ones are neighbors, and the last of them counts.
        followers = itertools.chain(itertools.islice(names, 1, None), [None])
        for i, (name, following) in enumerate(zip(names, followers)):
            may_be_hidden = '.' in name[:1] or '/.' in name or '__MACOSX' in name
            if name == following or (may_be_hidden and file_names.is_hidden(name)):
                continue
            extension = name[name.rfind('.') :].lower()
            if extension in IMAGE_EXTENSIONS:
                pictures.append(i)
            elif extension == LATENT_EXTENSION:
                latents.append(i)
            elif extension == '.json' and name.rpartition('/')[2].lower() == LABEL_FILE:
                label_files.append(i)
            elif name[-1:] != '/':
                others.append(i)
        if pictures and latents:
            raise UserError(
                f'{self.path} holds images and latents ({names[pictures[0]]}, {names[latents[0]]}, ...); '
                'keep one kind, or put them into two folders'
            )

        # A data set has images, all of them inside it.
        images = pictures or latents
        if not images:
            kind = None if self.is_folder else describe_file(self.path)
            what = 'holds no images' if kind in (None, ZIP) else f'is {kind} and holds no images'
            raise NoImages(f'{self.path} {what}; dataset_tool.py converts other sources')
        for name in (names[i] for i in images):
            if name[0] == '/' or ('..' in name and '..' in name.split('/')):
                raise UserError(
                    f'{self.path}: {name} is outside the data set, which is not allowed; recreate the zip'
                )
        return dict(
            images=np.array(images),
            latents=np.array(bool(latents)),
            label_files=np.array(label_files, dtype=np.int64),
            others=np.array(others, dtype=np.int64),
        )

    def remember(self, what: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """`compute()`, cached for large zips, on whose directory and label file only it depends."""
        if self.is_folder or self._index.key is None or len(self._index) < zip_index.CACHE_FROM:
            return compute()
        # With other extensions, the same names would be classified differently.
        kinds = hashlib.blake2b(' '.join(sorted(IMAGE_EXTENSIONS)).encode(), digest_size=4).hexdigest()
        return zip_index.cached(self._index.key, f'{what}-{kinds}', compute)

    def entries(self) -> list[zip_index.Entry]:
        """The directory of the zip."""
        return self._index.entries()

    def about_others(self) -> str | None:
        """A note about skipped files, neither images nor label files by name; None if there are none."""
        if not len(self.others):
            return None
        shown = ', '.join(self.others[:3]) + (', ...' if len(self.others) > 3 else '')
        return f'{len(self.others)} files in {self.path} are not images by name and are skipped: {shown}'

    def folders(self, inner: str) -> set[str]:
        """Names of the visible folders in `inner`, which is empty or ends in a slash."""
        # A zip need not list its folders.
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
        """Path of a file in the folder."""
        return os.path.join(self.path, self._stored.get(name, name))

    def sizes(self) -> np.ndarray:
        """[N] int64 uncompressed bytes of `images`, from a zip's index or one stat per file of a folder.

        Raises: UserError if a file cannot be read.
        """
        if not self.is_folder:
            return self._index.fields['size'][self._image_rows].astype(np.int64)
        try:
            return np.fromiter(
                (os.stat(self.path_of(name)).st_size for name in self.images), np.int64, len(self.images)
            )
        except OSError as error:
            raise UserError(f'{error.filename} cannot be read: {error.strerror}') from error

    def open(self, name: str, limit: int = limits.IMAGE_FILE, what: str = 'an image') -> BinaryIO:
        """Open a file of at most `limit` bytes (of `what`). Raises: one of `limits.UNREADABLE`."""
        if self.is_folder:
            limits.check_size(os.stat(path := self.path_of(name)).st_size, limit, what)
            return open(path, 'rb')
        # A handle of the parent process shares its file position with this one.
        if self._zip is None or self._zip_owner != os.getpid():
            self._zip, self._zip_owner = zip_index.open_archive(self.path), os.getpid()
        return open_member(self._zip, self._index.info(name), limit, what)

    @contextlib.contextmanager
    def open_image(self, name: str) -> Iterator[Image.Image]:
        """An image whose header has been read, for `load()` inside the block. Raises: Unreadable."""
        try:
            with self.open(name) as file:
                yield open_image(file, self._size_of(name))
        except UNREADABLE as error:
            what = self._describe_file(name) if isinstance(error, UnidentifiedImageError) else error
            raise Unreadable(
                f'{self.path}: {name} is not a readable image ({what}); replace or remove it'
            ) from error

    @contextlib.contextmanager
    def open_latents(self, name: str) -> Iterator[LatentFile]:
        """Latents whose header has been read, for `load()` inside the block. Raises: UserError."""
        try:
            with self.open(name, limits.LATENTS_FILE, 'a file of latents') as file:
                yield LatentFile(file)
        except UNREADABLE as error:
            raise UserError(
                f'{self.path}: {name} is not a readable file of latents ({error}); recreate it with '
                'dataset_tool.py'
            ) from error

    def _size_of(self, name: str) -> int:
        return os.stat(self.path_of(name)).st_size if self.is_folder else self._index.info(name).file_size

    def _describe_file(self, name: str) -> str:
        """'it is ...', for a file that is not an image."""
        with contextlib.suppress(*UNREADABLE), self.open(name) as file:
            return describe_non_image(file.read(HEAD))
        return 'it cannot be read'


# ----------------------------------------------------------------------------
# Latents, and files that are not images.


class LatentFile:
    """A `.npy` file of float32 or float16 [C, H, W], whose header is checked before memory is allocated.

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
        # Read one byte more than there should be, which shows a longer file.
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


def describe_non_image(head: bytes) -> str:
    """'it is ...', from the first bytes of a file that cannot be opened as an image."""
    kind = describe_file(head)
    if kind is None:
        return 'it is in no supported format'
    return f'it is {kind}' + (' with a damaged header' if kind.endswith(' image') else '')


def cure_of_kind(kind: str | None) -> str:
    """Advice for a file of this kind (see `describe_file`) where images are expected."""
    if kind in (NPZ, NPY):
        return 'dataset_tool.py converts arrays of images to a data set'
    if kind and kind.endswith('image'):
        return 'name the folder or zip that holds the images'
    if kind and kind.startswith(('a web page', 'an XML', 'an empty', 'a file of zeros')):
        return 'download or copy it again'
    if kind and re.search('tar|gzip|bzip2|xz|Zstandard|7-Zip|RAR', kind):
        return 'unpack it and name the folder'
    return 'copy or recreate it' if kind in (None, DAMAGED_ZIP) else 'name a folder or a zip of images'


def image_names(folder: str | os.PathLike) -> list[str]:
    """Sorted names of a folder's images and latents, as `ImageFiles` recognizes them; possibly none."""
    kinds = IMAGE_EXTENSIONS | {LATENT_EXTENSION}
    return sorted(
        name for name in file_names.walk(os.fspath(folder)) if os.path.splitext(name)[1].lower() in kinds
    )
