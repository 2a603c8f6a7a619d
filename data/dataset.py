"""EDM's image data sets, EDM2's latent data sets, and the order in which processes read them.

A data set is a folder or zip, nested at will, of square grayscale or RGB images of one size, or of latents:
`.npy` files of float32 or float16 [C, H, W]. An optional `dataset.json` holds
`{"labels": [[name, class index or vector], ...]}` or `{"labels": null}`; its `"class_names"` are names by
class, and for latents, its `"encoder"` tells how they were made. `dataset_tool.py` creates such data sets.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import math
import os
from collections.abc import Callable, Iterator

import numpy as np
import psutil
import torch.utils.data

from data import pixels
from data.image_files import LABEL_FILE, ImageFiles
from data.label_file import (
    are_label_vectors,
    count_unused_labels,
    read_class_names,
    read_encoder,
    read_labels,
)
from data.label_space import Labels, LabelSpace
from data.pixels import UNREADABLE, image_pixels, image_shape_of
from dnnlib import UserError

# Larger data sets compare each image's header when it is read, smaller ones all headers at construction.
HEADER_CHECK_LIMIT = 10_000
CACHE_SHARE = 0.05  # of the machine's memory: decoded images of at most this size are kept by default
DIGESTED_FILES = 16  # hashed by content for the data set's digest: uncompressed sizes alone identify little

# ----------------------------------------------------------------------------
# The data set.


class ImageFolderDataset(torch.utils.data.Dataset):
    """Images or latents with labels, from a folder or zip in EDM's format.

    Args:
        path: folder or zip file.
        resolution: required side of the images in pixels; None accepts any.
        use_labels: read `dataset.json`; otherwise labels have length 0.
        max_size: keep a random subset of this size, drawn by `seed` (the subset that EDM draws).
        xflip: append mirrored copies. Mirrored latents only approximate the latents of mirrored images.
        cache: keep decoded images in each process's memory; None: keep images, but not latents, if `copies` of
            them are at most CACHE_SHARE of the machine's memory.
        copies: number of processes on this machine that read the data set.
    Items: (uint8 [C, H, W], or float32 [C, H, W] of latents; float32 [label_dim]); class labels are one-hot.
    Raises: UserError at construction or, beyond 10,000 images, when an unsuitable image is read.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        resolution: int | None = None,
        use_labels: bool = False,
        max_size: int | None = None,
        xflip: bool = False,
        cache: bool | None = False,
        copies: int = 1,
        seed: int = 0,
    ):
        # Files and the chosen subset.
        self._files = ImageFiles(path)
        self._index = random_subset(len(self._files.images), max_size, seed)
        self._mirrored, self._cache = xflip, None

        # Headers. `unturned`: file numbers of images that viewers would rotate (EXIF).
        self.unturned: set[int] = set()
        self._shape = None  # while `_check_headers` reads headers
        self._shape = self._check_headers()
        if resolution not in (None, self.resolution):
            raise UserError(
                f'{self._files.path} has {self._describe(self._shape)} images, not '
                f'{resolution}x{resolution}; convert it with dataset_tool.py '
                f'--resolution={resolution}x{resolution}'
            )

        # Cache.
        self.decoded_bytes = copies * len(self._index) * math.prod(self._shape)
        fits = self.decoded_bytes <= CACHE_SHARE * psutil.virtual_memory().total
        self.caches = (fits and not self._files.holds_latents) if cache is None else cache
        self._cache = {} if self.caches else None

        # Labels.
        labels = read_labels(self._files) if use_labels else None
        if use_labels and labels is None:
            raise UserError(
                f'{self._files.path} has no labels; {self._cure_of_no_labels()}, or train without (--cond=0)'
            )
        self.unused_labels = count_unused_labels(self._files) if use_labels else 0
        self._labels_of_all = self.labels = None
        if labels is not None:
            self._labels_of_all = Labels.of_data(
                labels, are_label_vectors(self._files), read_class_names(self._files)
            )
            self.labels = self._labels_of_all.subset(self._index)

        # How latents were made.
        self.holds_latents = self._files.holds_latents
        self.encoder = read_encoder(self._files) if self.holds_latents else None

    def _cure_of_no_labels(self) -> str:
        from data.sources.class_folders import class_folders

        # EDM's format has labels in a file; folders of classes are a source for it.
        if folders := class_folders(self._files.images):
            names = ', '.join(folders.names[:3]) + ', ...' * (len(folders.names) > 3)
            how = f'dataset_tool.py --source={self._files.path} --dest=data.zip'
            return f'{how} makes labels of its class folders ({names})'
        return f'add them to its {LABEL_FILE}'

    def __getstate__(self):
        # A copy for another process starts with an empty cache.
        return dict(self.__dict__, _cache=None if self._cache is None else {})

    @contextlib.contextmanager
    def _open(self, i: int) -> Iterator[tuple[tuple[int, int, int], Callable[[], np.ndarray]]]:
        """(shape, function that reads the values) of file i; valid inside the block."""
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
        """Shape of the first image; compares all headers in data sets up to HEADER_CHECK_LIMIT."""
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
        """[C, H, W] values of file i."""
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
        # The second half of the items are the mirrored ones.
        copy, place = divmod(int(i), len(self._index))
        values = self._pixels(self._index[place])
        # A copy: the cache keeps the original, and torch takes no views with negative strides.
        return np.array(values[:, :, ::-1] if copy else values, order='C'), self.get_label(i)

    def get_label(self, i: int) -> np.ndarray:
        """float32 [label_dim] label of item i."""
        return (
            np.zeros(0, dtype=np.float32) if self.labels is None else self.labels[int(i) % len(self._index)]
        )

    def digest(self) -> str:
        """SHA-256 over names and uncompressed sizes of all images, the bytes of a few, and the labels in use.

        Equal for a folder and any zip of it, whatever its name, inner folder or compression. Independent of
        `max_size` and `xflip`. Raises: UserError if a file cannot be read.
        """
        # Names relative to the common folder: in sorted names, what the first and last share, all share.
        names, last = list(self._files.images), len(self._files.images) - 1
        shared = itertools.takewhile(
            lambda parts: parts[0] == parts[1], zip(*(name.split('/')[:-1] for name in (names[0], names[-1])))
        )
        start = sum(len(folder) + 1 for folder, _ in shared)
        digest = hashlib.sha256('\0'.join(name[start:] for name in names).encode(errors='surrogateescape'))

        # Sizes of all files, contents of a few at equal distances.
        digest.update(self._files.sizes().astype('<i8'))
        for name in dict.fromkeys(names[i * last // (DIGESTED_FILES - 1)] for i in range(DIGESTED_FILES)):
            try:
                with self._files.open(name) as file:
                    digest.update(hashlib.sha256(file.read()).digest())
            except UNREADABLE as error:
                raise UserError(
                    f'{self._files.path}: {name} cannot be read ({error}); replace or remove it'
                ) from error

        # All labels, whatever the subset.
        if self._labels_of_all is not None:
            digest.update(self._labels_of_all.digest().encode())
        return digest.hexdigest()

    @property
    def name(self) -> str:
        """File or folder name without `.zip`."""
        return os.path.basename(os.path.abspath(self._files.path)).removesuffix('.zip').removesuffix('.ZIP')

    @property
    def image_shape(self) -> list[int]:
        """[channels, height, width] of items; for the network's view of latents, `encoders.for_dataset`."""
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
        """Number of classes before `max_size`, or length of label vectors; 0 without labels."""
        return self.label_space.dim

    @property
    def label_space(self) -> LabelSpace:
        """The kind of labels, and the classes that have images in this subset."""
        return LabelSpace(0) if self.labels is None else self.labels.space

    @property
    def label_shape(self) -> list[int]:
        return [self.label_dim]

    def about_others(self) -> str | None:
        """A note about skipped files that are not images by name; None if there are none."""
        return self._files.about_others()

    @property
    def num_files(self) -> int:
        """Images before `max_size` and `xflip`."""
        return len(self._files.images)

    @property
    def num_images(self) -> int:
        """Images after `max_size`, before `xflip`."""
        return len(self._index)


def random_subset(count: int, max_size: int | None, seed: int) -> np.ndarray:
    """Sorted indices of the images to keep."""
    if max_size is None or max_size >= count:
        return np.arange(count)
    if max_size < 1:
        raise UserError(f'max_size must be at least 1 image, got {max_size}')
    # RandomState, unlike numpy's newer generators, guarantees the same stream forever.
    return np.sort(np.random.RandomState(seed % 2**32).permutation(count)[:max_size])


# ----------------------------------------------------------------------------
# The order of training.


class InfiniteSampler(torch.utils.data.Sampler):
    """Endless stream of image indices, shared among processes.

    Image g = 0, 1, 2, ... of the stream is `permutation(g // size)[g % size]`. Global batch k starts at image
    start + k·batch_size; process r of R takes the r-th of its R equal contiguous parts. The images seen
    therefore depend neither on the number of processes nor on interruptions (resume with start = images
    seen).

    Args:
        size: images in the data set.
        batch_size: global batch size, a multiple of num_replicas.
        rank, num_replicas: this process and the number of processes.
        seed: any integer; decides the permutations.
        shuffle: False keeps the order of the data set in every epoch.
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
        """[size] order of the data set in an epoch; a function of (seed, epoch) only."""
        if not self.shuffle:
            return np.arange(self.size)
        key = np.array([self.seed % 2**64, epoch], dtype=np.uint64)
        # The key of a counter-based generator selects an independent stream.
        return np.random.Generator(np.random.Philox(key=key)).permutation(self.size)

    def __iter__(self) -> Iterator[int]:
        order = functools.lru_cache(maxsize=1)(self.permutation)  # g only grows: one epoch at a time
        share = self.batch_size // self.num_replicas
        for batch in itertools.count(self.start, self.batch_size):
            # This process's part of the global batch.
            for g in range(batch + self.rank * share, batch + (self.rank + 1) * share):
                epoch, place = divmod(g, self.size)
                yield int(order(epoch)[place])
