"""Images to evaluate, from a folder, zip or array, read in batches and decoded ahead of use."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from data.arrays import ArchivedArrays, map_npy, may_be_images
from data.dataset import random_subset
from data.image_files import ImageFiles
from data.label_file import read_labels
from data.pixels import describe_shape, image_pixels, image_shape_of, is_left_unturned, orientation
from dnnlib.util import UserError

WORKERS = 4  # decoding threads: Pillow releases the interpreter lock
PREFETCH = 2  # batches per thread, done or in progress


def open_images(
    path: str | os.PathLike, num: int | None = None, seed: int = 0, skip_bad: bool = False
) -> ImageSource:
    """Open the images of a folder (with subfolders), a zip, an .npz or an .npy file.

    Args:
        num: number of images, a random subset if there are more; None takes all.
        seed: decides the subset, the one that training takes for the same number.
        skip_bad: skip images that cannot be read or differ from the first in size or mode; otherwise the
            first such image is an error.
    Raises: UserError if there are fewer than `num`, or they are not 8-bit gray or RGB images.
    """
    kind = os.path.splitext(os.fspath(path))[1].lower()
    if kind in ('.npz', '.npy') and os.path.isfile(path):
        return ArrayImages(path, num, seed)
    return FileImages(path, num, seed, skip_bad)


# ----------------------------------------------------------------------------
# Sources: folders, zips and arrays.


class ImageSource:
    """A sequence of uint8 images of one size, readable by any number of threads and processes.

    Attributes:
        name: their name in messages.
        total: number of images before taking a random subset.
        image_shape: [C, H, W]; C is 1 or 3.
        skipped: reasons for skipping images, by index, as far as this process has read.
        unturned: EXIF orientations other than 1, which are ignored, likewise.
        strata: number of classes that the images are of in turn, 1 if they are not; None: not known.
    """

    strata: int | None = None

    def __init__(self, path: str | os.PathLike, count: int, num: int | None, seed: int):
        self.name = os.fspath(path)
        if num is not None and count < num:
            cure = f'Make more images, or pass --num={count}.' if count > 1 else 'Make more images.'
            raise UserError(f'{self.name} holds {count} images, expected at least {num}. {cure}')
        self.total, self.index = count, random_subset(count, num, seed)
        self.skipped: dict[int, str] = {}
        self.unturned: dict[int, int] = {}
        self.skip_bad = False
        self.image_shape: list[int] = []

    def __len__(self) -> int:
        return len(self.index)

    def batch(self, indices: range) -> tuple[torch.Tensor, list[int]]:
        """(uint8 images [n, C, H, W], their indices), without skipped images.

        Raises: UserError naming an image that cannot be read or differs from the first, unless `skip_bad`.
        """
        # Skipped images leave room at the end.
        images = np.empty([len(indices), *self.image_shape], np.uint8)
        read: list[int] = []
        for i in indices:
            try:
                images[len(read)] = self.pixels(i)
            except UserError as error:
                if not self.skip_bad:
                    raise
                self.skipped[i] = str(error)
            else:
                read.append(i)
        return torch.from_numpy(images[: len(read)]), read

    def stream(
        self, parts: Iterable[range], workers: int = WORKERS
    ) -> Iterator[tuple[range, torch.Tensor, list[int]]]:
        """(part, images, indices) for each part in turn, read ahead of use; see `prefetch`."""
        return prefetch(self, parts, workers)

    def pixels(self, i: int) -> np.ndarray:
        """uint8 [C, H, W]"""
        raise NotImplementedError

    def classes(self) -> np.ndarray | None:
        """int64 [N], the class of each image; None where that is not known. Raises: UserError for damaged labels."""
        return None

    def nonfinite(self, indices: range) -> list[int]:
        """Indices of images of a batch that were not finite before conversion to 8 bits; [] for files."""
        return []

    def fingerprint(self) -> str:
        """Digest that changes whenever the images may have changed; computed without reading them."""
        raise NotImplementedError


class FileImages(ImageSource):
    """Images of a folder or zip, gray (L) or RGB, with the same pixels that training sees."""

    def __init__(
        self, path: str | os.PathLike, num: int | None = None, seed: int = 0, skip_bad: bool = False
    ):
        self.files = ImageFiles(path)
        if self.files.holds_latents:
            raise UserError(
                f'{self.files.path} holds latents ({self.files.images[0]}, ...), not images. '
                'Give the images, or decode the latents first.'
            )
        # The checksums in a zip tell whether its images changed, without reading them.
        self._checksums = {} if self.files.is_folder else _zip_checksums(self.files)
        super().__init__(path, len(self.files.images), num, seed)
        self.skip_bad = skip_bad
        self._first, self.image_shape = self._find_first()

    def about_others(self) -> str | None:
        """A note about skipped files that are not images by name; None if there are none."""
        return self.files.about_others()

    def classes(self) -> np.ndarray | None:
        labels = read_labels(self.files)
        return None if labels is None or labels.ndim > 1 else labels[self.index]

    def _find_first(self) -> tuple[str, list[int]]:
        """Name and shape of the first readable image."""
        problem = None
        # The first image may itself be one to skip.
        for i in range(len(self)):
            try:
                return self.files.images[self.index[i]], list(self.pixels(i).shape)
            except UserError as error:
                if not self.skip_bad:
                    raise
                problem = problem or error
        raise UserError(
            f'None of the {len(self)} images in {self.name} can be read. The first problem: {problem}'
        )

    def pixels(self, i: int) -> np.ndarray:
        # Compare the header first: decoding is the expensive part.
        file = self.files.images[self.index[i]]
        with self.files.open_image(file) as image:
            shape = image_shape_of(image, f'{self.name}: {file}')
            if self.image_shape and list(shape) != self.image_shape:
                raise UserError(
                    f'{self.name}: {file} is {describe_shape(shape)}, but {self._first} is '
                    f'{describe_shape(self.image_shape)}. Give all images one size and mode, or skip those '
                    'unlike the first with --skip-bad.'
                )
            # Pixels stay as stored, as in training; a note will tell of the orientation.
            if is_left_unturned(image):
                self.unturned[i] = orientation(image)
            return image_pixels(image)

    def fingerprint(self) -> str:
        """Digest of names and sizes, and of modification times in a folder or checksums in a zip."""
        names = [self.files.images[i] for i in self.index]
        if self.files.is_folder:
            states = [_file_state(self.files.path_of(name)) for name in names]
        else:
            states = [self._checksums[name] for name in names]
        return _fingerprint('files', [(name, *state) for name, state in zip(names, states)])


def _zip_checksums(files: ImageFiles) -> dict[str, tuple[int, int]]:
    """(CRC, size) of each image in a zip by name. Raises: UserError if a name repeats, which is ambiguous."""
    wanted = set(files.images)
    infos = [info for info in files.entries() if info.filename in wanted]
    name, times = Counter(info.filename for info in infos).most_common(1)[0]
    if times > 1:
        raise UserError(f'{files.path} lists {name} {times} times. Recreate the zip.')
    return {info.filename: (info.CRC, info.file_size) for info in infos}


def _file_state(path: str) -> tuple:
    """(size, mtime, ctime in nanoseconds); () for a missing file, which reading will report.

    mtime and size are not enough: programs that unpack or copy restore mtime, and uncompressed images have
    equal sizes. No program can set ctime.
    """
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


class ArrayImages(ImageSource):
    """Images in an .npy file, or in an .npz file as `arr_0` or its only uint8 array; memory-mapped.

    uint8 [N, H, W], [N, H, W, C] or [N, C, H, W], where C is 1 or 3; an ambiguous shape is refused.

    Args:
        array: the file's array, if already open.
    """

    def __init__(
        self, path: str | os.PathLike, num: int | None = None, seed: int = 0, array: np.ndarray | None = None
    ):
        name = os.fspath(path)
        if array is None:
            name, array = (name, map_npy(path)) if name.lower().endswith('.npy') else _map_images(path)
        self._images = _channels_first(array, name)  # [N, C, H, W], a view
        super().__init__(path, len(array), num, seed)
        self.image_shape = list(self._images.shape[1:])

    @property
    def images(self) -> np.ndarray:
        """uint8 [N, C, H, W]: all images of the file, as a memory-mapped view."""
        return self._images

    def pixels(self, i: int) -> np.ndarray:
        return self._images[self.index[i]]

    def fingerprint(self) -> str:
        """Digest of the file's size and modification time; the array would take long to read."""
        return _fingerprint('array', [_file_state(self.name), self._images.shape, self.index.tolist()])


def _map_images(path: str | os.PathLike) -> tuple[str, np.ndarray]:
    """(name for messages, array of images) of an .npz file."""
    with ArchivedArrays(path, path) as arrays:
        # `arr_0` is np.savez's name of an array without a name.
        found = ['arr_0']
        if 'arr_0' not in arrays.keys:
            found = [key for key in arrays.keys if key.isprintable() and may_be_images(arrays.header(key))]
        if len(found) != 1:
            what = f'several arrays of images ({", ".join(found)})' if found else 'no array of images'
            raise UserError(
                f'{path} has {what}. Save them as the only one: np.savez(file, images), uint8 [N, H, W, 3].'
            )
        return f'{os.fspath(path)}: {found[0]}', arrays.map(found[0])


def _channels_first(array: np.ndarray, name: str) -> np.ndarray:
    """View [N, C, H, W] of an array in one of the three layouts. Raises: UserError for none, or several."""
    if array.dtype != np.uint8:
        cure = (
            'Convert values in [-1, 1] by (x * 127.5 + 128).clip(0, 255).astype(np.uint8).'
            if array.dtype.kind == 'f'
            else 'Convert 16-bit values by (x / 257).round().astype(np.uint8), others by their white value.'
        )
        raise UserError(f'{name} holds {array.dtype}, but images must be uint8, 0 to 255. {cure}')

    # Collect the layouts that fit. Up to 4 in the last of three dimensions are channels of a single image.
    shape, views = list(array.shape), []
    if array.size and len(shape) == 3 and shape[2] > 4:
        views.append(array[:, None])
    if array.size and len(shape) == 4:
        views += [array.transpose(0, 3, 1, 2)] * (shape[3] in (1, 3)) + [array] * (shape[1] in (1, 3))
    # A wrong guess would scramble every image without an error.
    if len(views) != 1:
        why = (
            'could be [N, H, W, C] or [N, C, H, W]'
            if views
            else 'is not [N, H, W], [N, H, W, C] or [N, C, H, W] with C = 1 or 3'
        )
        raise UserError(f'{name} has the shape {shape}, which {why}. Save images as uint8 [N, H, W, 3].')
    return views[0]


def _fingerprint(*parts) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# ----------------------------------------------------------------------------
# Decoding ahead.


def prefetch(
    source: ImageSource, parts: Iterable[range], workers: int = WORKERS
) -> Iterator[tuple[range, torch.Tensor, list[int]]]:
    """(part, images, indices) for each part in turn, as `source.batch` returns them, read ahead by threads.

    Holds at most `PREFETCH` batches per worker in memory. A worker's error is raised here, when its part is
    due. Closing the iterator ends the threads.

    Args:
        workers: number of threads; 0 reads in the calling thread, on demand.
    """
    if workers == 0:
        yield from ((part, *source.batch(part)) for part in parts)
        return
    # Keep a queue of parts in progress; the oldest is due first.
    waiting: deque = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for part in parts:
            waiting.append((part, pool.submit(source.batch, part)))
            if len(waiting) > PREFETCH * workers:
                done, future = waiting.popleft()
                yield done, *future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, *future.result()
    finally:
        # Also if the reader stops early: batches that no thread has begun are dropped.
        pool.shutdown(cancel_futures=True)
