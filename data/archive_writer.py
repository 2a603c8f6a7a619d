"""Write a data set to a zip or folder that appears only once it is complete."""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from dnnlib import UserError
from dnnlib.util import temporary_folder

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_NAME = 'img{:08d}.png'  # of an image by its number
# Suffixes of other file formats: such a --dest is a mistake rather than the name of a folder.
# fmt: off
FILE_SUFFIXES = (
    '.tar', '.gz', '.tgz', '.bz2', '.xz', '.zst', '.7z', '.rar',
    '.npz', '.npy', '.lmdb', '.mdb', '.h5', '.hdf5', '.tfrecord', '.tfrecords', '.parquet', '.arrow',
    '.pkl', '.pt', '.pth', '.safetensors', '.json', '.csv', '.txt', '.png', '.jpg', '.jpeg', '.webp', '.gif',
)
# fmt: on


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
    """Writes files into an uncompressed zip whose bytes depend only on names and contents."""

    def __init__(self, path: pathlib.Path):
        self.file = path.open('wb')
        self.zip = zipfile.ZipFile(self.file, 'w', zipfile.ZIP_STORED)

    def write(self, name: str, data: bytes) -> None:
        # Fixed time and attributes, so that equal contents give equal files.
        entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
        entry.create_system, entry.external_attr = 3, 0o644 << 16  # Unix, whatever this system is
        self.zip.writestr(entry, data)

    def close(self) -> None:
        self.zip.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def is_zip(dest: pathlib.Path) -> bool:
    return dest.suffix.lower() == '.zip'


def check_dest(dest: pathlib.Path) -> None:
    """Raises: UserError unless `dest` is a zip file, new or not, or a folder that is new or empty."""
    if is_zip(dest) and dest.is_dir():
        raise UserError(f'--dest={dest} is a folder; name a zip file, or a folder without .zip')
    if not is_zip(dest) and dest.exists() and not dest.is_dir():
        raise UserError(f'--dest={dest} is a file; name a .zip file or a folder')
    if dest.suffix.lower() in FILE_SUFFIXES and not dest.is_dir():
        raise UserError(
            f'--dest={dest}: data sets are written to a .zip file or a folder, not to {dest.suffix}'
        )
    if dest.is_dir() and any(dest.iterdir()):
        raise UserError(f'--dest={dest} is not empty; name another folder, or empty it first')


@contextlib.contextmanager
def open_dest(dest: pathlib.Path) -> Iterator[Callable[[str, bytes], None]]:
    """A function that writes a file into `dest`, which appears, complete, only if the block succeeds."""
    target = dest.resolve()  # follow a link instead of replacing it
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that moving into place is atomic.
        with temporary_folder(target) as staging:
            with contextlib.closing(
                (ZipWriter if is_zip(dest) else FolderWriter)(staging / target.name)
            ) as writer:
                yield writer.write
            os.replace(staging / target.name, target)
    except OSError as error:
        raise UserError(f'cannot write --dest={dest} ({error}); free space or choose another path') from error


def png_bytes(image: Image) -> bytes:
    data = io.BytesIO()
    # Uncompressed, so that training decodes it fast.
    image.save(data, format='PNG', compress_level=0)
    return data.getvalue()
