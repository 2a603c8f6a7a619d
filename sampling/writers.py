"""Write images and latents to files in worker processes, so that generation does not wait.

Imports no torch: workers start fast and never touch a GPU.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pathlib
import threading
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import BinaryIO

import numpy as np

from dnnlib import UserError, interrupts
from dnnlib.processes import how_one_died, starting
from dnnlib.util import atomic_write, remove, temporary_folder, usable_cores

AHEAD = 2  # jobs per worker, waiting or in progress
MOST_WORKERS = 4

# ----------------------------------------------------------------------------
# One file an image.


def write_images(images: np.ndarray, paths: Sequence[str]) -> None:
    """Write uint8 [N, H, W, C], gray or RGB, to PNG files, each atomically. Raises: UserError."""
    for image, path in zip(images, paths):
        with _complete_file(path) as file:
            _picture(image).save(file, format='png')


def write_latents(latents: np.ndarray, paths: Sequence[str]) -> None:
    """Write float32 [N, C, H, W] to `.npy` files [C, H, W], each atomically. Raises: UserError."""
    for values, path in zip(latents, paths):
        with _complete_file(path) as file:
            np.save(file, values)


def _picture(image: np.ndarray):
    from PIL import Image

    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


@contextlib.contextmanager
def _complete_file(path: str) -> Iterator[BinaryIO]:
    """A file to write, in a folder that is created, with its name only when it is complete."""
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    except OSError as error:
        raise UserError(f'{path} cannot be written: {error.strerror}') from error
    # Not durable: an image that a crash loses is generated again.
    with atomic_write(path, durable=False) as file:
        yield file


# ----------------------------------------------------------------------------
# The workers.


def default_workers() -> int:
    """Half of the CPUs but one, because without a GPU the network needs them too."""
    return min(max(usable_cores() // 2 - 1, 0), MOST_WORKERS)


class WriterPool:
    """Processes that write files; a context manager, at whose end everything is written.

    At most `AHEAD` jobs per worker are in memory. A worker's error is raised by a later call. Workers end
    with this process, even if it is killed.

    Args:
        workers: number of processes; 0 writes in this process.
    """

    def __init__(self, workers: int):
        interrupts.at_work()

        self.workers, self._waiting = workers, deque()
        self._pool, self._processes = None, []
        if workers:
            self._pool = ProcessPoolExecutor(
                workers, multiprocessing.get_context('spawn'), initializer=_become_worker
            )
            for _ in range(workers):
                self._hand_over(int)  # a first job starts a worker

    def __enter__(self) -> WriterPool:
        return self

    def __exit__(self, kind, *_):
        # After an error in the block, what is queued is not worth writing.
        try:
            if kind is None:
                self.finish()
        finally:
            # What is queued is dropped, what is being written ends.
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)

    def submit(self, write: Callable[..., None], *arguments) -> None:
        """Have a worker call `write(*arguments)`; waits while all queues are full.

        Raises: UserError of an earlier call.
        """
        if self._pool is None:
            write(*arguments)
            return
        self._waiting.append(self._hand_over(write, *arguments))
        # Waiting bounds the memory: the queue holds images.
        while len(self._waiting) > AHEAD * self.workers:
            self._finish_one()

    def finish(self) -> None:
        """Wait until everything is written. Raises: UserError."""
        while self._waiting:
            self._finish_one()

    def _hand_over(self, function: Callable, *arguments) -> Future:
        # A signal is for the main process, which ends its workers itself.
        with self._telling_of_death(), starting(self._processes), interrupts.kept_from_children():
            return self._pool.submit(function, *arguments)

    def _finish_one(self) -> None:
        with self._telling_of_death():
            self._waiting.popleft().result()

    @contextlib.contextmanager
    def _telling_of_death(self) -> Iterator[None]:
        try:
            yield
        except BrokenProcessPool as error:
            ending = how_one_died(self._processes) or 'nobody knows how'
            raise UserError(
                f'A process that writes the images has died ({ending}). Use --workers=0, or a machine with '
                'more memory.'
            ) from error

    def shares(self, count: int) -> list[slice]:
        """Slices that divide `count` items equally among the workers."""
        # Rounded up, so that no worker has two shares.
        size = max(-(-count // max(self.workers, 1)), 1)
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _become_worker() -> None:
    """Watch the parent process, which normally ends its workers: if it is killed, the worker ends itself."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    # Ends the process at once, from a thread of it.
    os._exit(1)


# ----------------------------------------------------------------------------
# Destinations: a folder, or one file.
#
# The main process calls `begin`, then, after all batches, `complete` with the labels in the order of seeds,
# and `end` in any case. All processes have the same `parts` and call `add` with batches; `place` is the index
# of the first image in the order of seeds. If images are not finite, `leave_out` gets their seeds, `complete`
# is not called, and `without` tells what happened to the others.


class FolderDestination:
    """Files in a folder, named after their seeds: PNGs or, of latents, `.npy`.

    Args:
        subdirs: a folder for every 1000 seeds.
        latents: whether values are latents [N, C, H, W] rather than images [N, H, W, C].
    """

    def __init__(self, path: str, subdirs: bool = False, latents: bool = False):
        self.path, self.subdirs, self.parts = path, subdirs, None
        self._write, self._extension = (write_latents, 'npy') if latents else (write_images, 'png')

    def begin(self) -> None:
        try:
            os.makedirs(self.path, exist_ok=True)
        except OSError as error:
            raise UserError(f'--outdir={self.path} cannot be made: {error.strerror}') from error

    def others(self, seeds: Sequence[int]) -> dict[str, list[str]]:
        """Files in the folder that these seeds will not overwrite: {description: relative paths}."""
        from data.image_files import image_names

        # Names of wanted seeds count too if they are in the other layout.
        wanted, found = set(seeds), {}
        for name in image_names(self.path) if os.path.isdir(self.path) else ():
            seed = self._seed(name)
            if seed is None:
                what = 'of other names'
            elif seed not in wanted:
                what = 'of other seeds'
            elif name == self._name(seed, self.subdirs):
                continue
            else:
                what = f'of these seeds, but {"not " * self.subdirs}in folders as by --subdirs'
            found.setdefault(what, []).append(name)
        return found

    def add(self, pool: WriterPool, values: np.ndarray, seeds: Sequence[int], place: int) -> None:
        paths = [self.path_of(seed) for seed in seeds]
        # Workers encode parts of a batch side by side.
        for share in pool.shares(len(paths)):
            pool.submit(self._write, values[share], paths[share])

    def leave_out(self, seeds: Sequence[int]) -> int:
        """Remove an earlier run's files of these seeds, which would pass for new. Returns: their number."""
        return sum(remove(self.path_of(seed)) for seed in seeds)

    def without(self, count: int, removed: int) -> str:
        earlier = f', and {removed} of the same names, of an earlier run, removed' if removed else ''
        were = 'It was' if count == 1 else 'They were'
        return f'{were} not written to {self.path}{earlier}; the others are there.'

    def path_of(self, seed: int) -> str:
        """The file of a seed."""
        return os.path.join(self.path, self._name(seed, self.subdirs))

    def _name(self, seed: int, subdirs: bool) -> str:
        # Thousands of files in one folder are slow on network file systems.
        return f'{seed - seed % 1000:06d}/' * subdirs + f'{seed:06d}.{self._extension}'

    def _seed(self, name: str) -> int | None:
        """The seed in a file's name, in either layout; None for other names."""
        stem, _, extension = name.rpartition('/')[2].rpartition('.')
        if extension != self._extension or not stem.isdecimal():
            return None
        # The name decides, so that 1.png is no image of seed 1.
        names = (self._name(int(stem), subdirs) for subdirs in (False, True))
        return int(stem) if name in names else None

    def complete(self, labels: Sequence | None) -> None:
        pass

    def end(self) -> None:
        pass


class FileDestination:
    """One file, written atomically from parts in a hidden folder beside it.

    `.npz`: `arr_0`, uint8 [N, H, W, C], and for a conditional network `arr_1`, the labels: classes, int64
    [N], or vectors, float32 [N, D]. `.zip`: a data set like those of dataset_tool.py.
    """

    def __init__(self, path: str):
        self.path, self.parts = path, None
        self._cleanup = contextlib.ExitStack()
        self._as_array = path.endswith('.npz')

    def begin(self) -> None:
        if os.path.isdir(self.path):
            raise UserError(f'--dest={self.path} is a folder; name a file')
        try:
            os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
            self.parts = str(self._cleanup.enter_context(temporary_folder(os.path.abspath(self.path))))
        except OSError as error:
            raise UserError(f'--dest={self.path} cannot be written: {error.strerror}') from error

    def add(self, pool: WriterPool, images: np.ndarray, seeds: Sequence[int], place: int) -> None:
        # Parts are named by their place, so that sorted names are in the order of seeds.
        for share in pool.shares(len(seeds)):
            part = os.path.join(self.parts, f'{place + share.start:09d}')
            if self._as_array:
                pool.submit(write_array_part, images[share], part)
            else:
                pool.submit(write_png_part, images[share], part, place + share.start)

    def leave_out(self, seeds: Sequence[int]) -> int:
        return 0

    def without(self, count: int, removed: int) -> str:
        earlier = '; the file of that name is of an earlier run' if os.path.exists(self.path) else ''
        return f'{self.path} was not written{earlier}.'

    def complete(self, labels: Sequence | None) -> None:
        parts = [os.path.join(self.parts, name) for name in sorted(os.listdir(self.parts))]
        (join_arrays if self._as_array else join_pngs)(parts, labels, self.path)

    def end(self) -> None:
        self._cleanup.close()


# ----------------------------------------------------------------------------
# Parts of one file.


def write_array_part(images: np.ndarray, path: str) -> None:
    with atomic_write(path, durable=False) as file:
        np.save(file, images)


def write_png_part(images: np.ndarray, path: str, place: int) -> None:
    """Write an uncompressed zip of PNGs, named as by dataset_tool.py from the number `place` on."""
    from data.archive_writer import IMAGE_NAME, png_bytes

    with atomic_write(path, durable=False) as file, zipfile.ZipFile(file, 'w') as archive:
        for i, image in enumerate(images, place):
            archive.writestr(f'{i // 1000:05d}/{IMAGE_NAME.format(i)}', png_bytes(_picture(image)))


def join_arrays(parts: Sequence[str], labels: Sequence | None, path: str) -> None:
    """Write the `.npz` file of parts [n, H, W, C]."""
    # The header needs the total; then only one part at a time is in memory.
    shapes = [np.load(part, mmap_mode='r').shape for part in parts]
    header = dict(descr='|u1', fortran_order=False, shape=(sum(shape[0] for shape in shapes), *shapes[0][1:]))
    with atomic_write(path) as file, zipfile.ZipFile(file, 'w') as archive:
        with archive.open('arr_0.npy', 'w', force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for part in parts:
                member.write(np.load(part).data)
        if labels is not None:
            # Vectors are lists in the recorded labels, classes are numbers.
            kind = np.float32 if labels and isinstance(labels[0], list) else np.int64
            with archive.open('arr_1.npy', 'w') as member:
                np.lib.format.write_array(member, np.array(labels, dtype=kind))


def join_pngs(parts: Sequence[str], labels: Sequence | None, path: str) -> None:
    """Write the data set of parts, each a zip with some of its images, and its labels."""
    from data.archive_writer import open_dest

    names = []
    with open_dest(pathlib.Path(path)) as write:
        # Copied as they are: PNGs are compressed already.
        for part in parts:
            with zipfile.ZipFile(part) as archive:
                for name in archive.namelist():
                    write(name, archive.read(name))
                    names.append(name)
        pairs = None if labels is None else [list(pair) for pair in zip(names, labels)]
        # Vectors of whole numbers would otherwise be read as classes.
        kind = {'label_kind': 'vectors'} if labels and isinstance(labels[0], list) else {}
        write('dataset.json', json.dumps({'labels': pairs, **kind}).encode())
