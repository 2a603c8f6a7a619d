"""Images to be measured: those of a folder, a zip or an array, read in batches and decoded ahead of use."""

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
from data.dataset import ImageFiles, image_pixels, image_shape_of, random_subset
from data.pixels import is_left_unturned, orientation
from dnnlib.util import UserError

WORKERS = 4  # threads that decode: Pillow lets go of the interpreter lock
AHEAD = 2  # batches that each has done or is at work on, besides the one in use


def open_images(
    path: str | os.PathLike, num: int | None = None, seed: int = 0, skip_bad: bool = False
) -> ImageSource:
    """The images of a folder (with its subfolders), a zip, an .npz or an .npy file.

    Args:
        num: how many, a random subset where there are more. None: all.
        seed: which subset; the one that training takes of as many.
        skip_bad: leave out images that cannot be read or differ from the first in size or mode. Without, the
            first such image is an error.
    Raises: UserError where there are fewer than `num`, or what there is are no 8-bit gray or RGB images.
    """
    kind = os.path.splitext(os.fspath(path))[1].lower()
    if kind in ('.npz', '.npy') and os.path.isfile(path):
        return ArrayImages(path, num, seed)
    return FileImages(path, num, seed, skip_bad)


class ImageSource:
    """A sequence of equally sized uint8 images, which any number of threads and processes may read.

    Attributes:
        name: what messages call them.
        total: how many there are, of which these may be a random subset.
        image_shape: [C, H, W]; C is 1 or 3.
        skipped: why images were left out, by index, as far as this process has read.
        unturned: EXIF orientations other than 1, which are ignored, likewise.
    """

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
        """Images, uint8 [n, C, H, W], and which of `indices` they are: n is less than their number where bad
        ones are left out.

        Raises: UserError that names an image which cannot be read, or differs from the first, unless such are
            left out.
        """
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
        """(part, images, which they are) for each part in turn, as `batch` returns them, read ahead of use.
        See `prefetch`."""
        return prefetch(self, parts, workers)

    def pixels(self, i: int) -> np.ndarray:
        """uint8 [C, H, W]"""
        raise NotImplementedError

    def nonfinite(self, indices: range) -> list[int]:
        """Which images of a batch that was read had values that are not finite before they became 8-bit. In
        files nothing tells: none."""
        return []

    def fingerprint(self) -> str:
        """Hexadecimal digest that changes whenever the images may have changed. Reads no images."""
        raise NotImplementedError


class FileImages(ImageSource):
    """The images of a folder or zip: PNG, JPEG or whatever else Pillow opens; gray (L) or RGB as they are,
    with the pixels that training sees."""

    def __init__(
        self, path: str | os.PathLike, num: int | None = None, seed: int = 0, skip_bad: bool = False
    ):
        self.files = ImageFiles(path)
        if self.files.holds_latents:
            raise UserError(
                f'{self.files.path} holds latents ({self.files.images[0]}, ...), not images. '
                'Give the images, or decode the latents first.'
            )
        self._checksums = {} if self.files.is_folder else _zip_checksums(self.files)
        super().__init__(path, len(self.files.images), num, seed)
        self.skip_bad = skip_bad
        self._first, self.image_shape = self._find_first()

    def about_others(self) -> str | None:
        """A sentence about files that are left out, as they are no images by their names; None where there
        are none."""
        return self.files.about_others()

    def _find_first(self) -> tuple[str, list[int]]:
        """Name and shape of the first image that can be read."""
        problem = None
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
        file = self.files.images[self.index[i]]
        with self.files.open_image(file) as image:
            shape = image_shape_of(image, f'{self.name}: {file}')
            if self.image_shape and list(shape) != self.image_shape:
                raise UserError(
                    f'{self.name}: {file} is {_describe(shape)}, but {self._first} is '
                    f'{_describe(self.image_shape)}. Give all images one size and mode, or leave out those '
                    'unlike the first with --skip-bad.'
                )
            if is_left_unturned(image):
                self.unturned[i] = orientation(image)
            return image_pixels(image)

    def fingerprint(self) -> str:
        """Of names, sizes and times of change in a folder; of names, sizes and checksums in a zip."""
        names = [self.files.images[i] for i in self.index]
        state = (
            (lambda name: _file_state(self.files.path_of(name)))
            if self.files.is_folder
            else self._checksums.__getitem__
        )
        return _fingerprint('files', [(name, *state(name)) for name in names])


def _zip_checksums(files: ImageFiles) -> dict[str, tuple[int, int]]:
    """(CRC, size) of each image in a zip by name. Raises: UserError where a name is there twice: which of
    them is meant cannot be told."""
    wanted = set(files.images)
    infos = [info for info in files.entries() if info.filename in wanted]
    name, times = Counter(info.filename for info in infos).most_common(1)[0]
    if times > 1:
        raise UserError(f'{files.path} lists {name} {times} times. Make the zip again.')
    return {info.filename: (info.CRC, info.file_size) for info in infos}


def _file_state(path: str) -> tuple:
    """(size, time of its last change in nanoseconds, and of its inode's); nothing of a file that is not
    there, which reading will tell.

    Programs that unpack and copy set the first time to what it was elsewhere, and uncompressed images are all
    of one size. None can set the second.
    """
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


class ArrayImages(ImageSource):
    """Images in an .npy file, or in an .npz file as `arr_0` or its only uint8 array; mapped, so that they
    take no memory.

    uint8 [N, H, W], [N, H, W, C] or [N, C, H, W], where C is 1 or 3. A shape that could be both of the latter
    is refused. `array`: the file's array, where someone has it already.
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
        """uint8 [N, C, H, W], all that the file has; a view that is mapped."""
        return self._images

    def pixels(self, i: int) -> np.ndarray:
        return self._images[self.index[i]]

    def fingerprint(self) -> str:
        """Of the file's size and time of change; the arrays themselves would take long to read."""
        return _fingerprint('array', [_file_state(self.name), self._images.shape, self.index.tolist()])


def _map_images(path: str | os.PathLike) -> tuple[str, np.ndarray]:
    """(what messages call it, the array of images) of an .npz file."""
    with ArchivedArrays(path, path) as arrays:
        found = (
            ['arr_0']
            if 'arr_0' in arrays.keys
            else [key for key in arrays.keys if key.isprintable() and may_be_images(arrays.header(key))]
        )
        if len(found) != 1:
            what = f'several arrays of images ({", ".join(found)})' if found else 'no array of images'
            raise UserError(
                f'{path} has {what}. Save them as the only one: np.savez(file, images), uint8 [N, H, W, 3].'
            )
        return f'{os.fspath(path)}: {found[0]}', arrays.map(found[0])


def _channels_first(array: np.ndarray, name: str) -> np.ndarray:
    """A view [N, C, H, W] of an array of images in one of the three layouts. Raises: UserError where it is in
    none of them, or could be in two."""
    if array.dtype != np.uint8:
        cure = (
            'Convert values in [-1, 1] by (x * 127.5 + 128).clip(0, 255).astype(np.uint8).'
            if array.dtype.kind == 'f'
            else 'Convert 16-bit values by (x / 257).round().astype(np.uint8), others by what is white in '
            'them.'
        )
        raise UserError(f'{name} holds {array.dtype}, and images are uint8, 0 to 255. {cure}')
    shape, views = list(array.shape), []
    if array.size and len(shape) == 3 and shape[2] > 4:  # fewer columns are the channels of a single image
        views.append(array[:, None])
    if array.size and len(shape) == 4:
        views += [array.transpose(0, 3, 1, 2)] * (shape[3] in (1, 3)) + [array] * (shape[1] in (1, 3))
    if len(views) != 1:
        why = (
            'could be [N, H, W, C] or [N, C, H, W]'
            if views
            else 'is none of [N, H, W], [N, H, W, C] and [N, C, H, W] with C = 1 or 3'
        )
        raise UserError(f'{name} has the shape {shape}, which {why}. Save images as uint8 [N, H, W, 3].')
    return views[0]


def _describe(shape: Iterable[int]) -> str:
    channels, height, width = shape
    return f'{width}x{height} {"gray" if channels == 1 else "RGB"}'


def _fingerprint(*parts) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# ----------------------------------------------------------------------------
# Decoding ahead.


def prefetch(
    source: ImageSource, parts: Iterable[range], workers: int = WORKERS
) -> Iterator[tuple[range, torch.Tensor, list[int]]]:
    """(part, images, which they are) for each part in turn, as `source.batch` returns them, read ahead of use
    by threads.

    No more than `AHEAD` batches a worker are in memory. What a worker raises is raised here, when it is its
    part's turn. Closing the iterator ends the threads.

    Args:
        workers: 0 reads in the calling thread, when asked.
    """
    if workers == 0:
        yield from ((part, *source.batch(part)) for part in parts)
        return
    waiting: deque = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for part in parts:
            waiting.append((part, pool.submit(source.batch, part)))
            if len(waiting) > AHEAD * workers:
                done, future = waiting.popleft()
                yield done, *future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, *future.result()
    finally:
        pool.shutdown(cancel_futures=True)
