"""Data sets into zips and folders, which come into being when they are whole."""

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
FILE_SUFFIXES = (
    '.tar',
    '.gz',
    '.tgz',
    '.bz2',
    '.xz',
    '.zst',
    '.7z',
    '.rar',
    '.npz',
    '.npy',
    '.lmdb',
    '.mdb',
    '.h5',
    '.hdf5',
    '.pkl',
    '.pt',
    '.pth',
    '.safetensors',
    '.tfrecord',
    '.tfrecords',
    '.parquet',
    '.arrow',
    '.json',
    '.csv',
    '.txt',
    '.png',
    '.jpg',
    '.jpeg',
    '.webp',
    '.gif',
)


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


def is_zip(dest: pathlib.Path) -> bool:
    return dest.suffix.lower() == '.zip'


def check_dest(dest: pathlib.Path) -> None:
    """Raises UserError unless `dest` is a new or existing zip file, or a new or empty folder."""
    if is_zip(dest) and dest.is_dir():
        raise UserError(f'--dest={dest} is a folder; name a zip file, or a folder without .zip')
    if not is_zip(dest) and dest.exists() and not dest.is_dir():
        raise UserError(f'--dest={dest} is a file; name a .zip file or a folder')
    if dest.suffix.lower() in FILE_SUFFIXES and not dest.is_dir():
        raise UserError(
            f'--dest={dest}: data sets are written to a .zip file or a folder, and {dest.suffix} is neither'
        )
    if dest.is_dir() and any(dest.iterdir()):
        raise UserError(f'--dest={dest} is a folder that is not empty; name another, or empty it first')


@contextlib.contextmanager
def open_dest(dest: pathlib.Path) -> Iterator[Callable[[str, bytes], None]]:
    """A function that writes a file into `dest`, which comes into being, whole, at the end of the block, and
    not at all after an error."""
    target = dest.resolve()  # through a link, so that it is not replaced itself
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(target) as staging:
            with contextlib.closing(
                (ZipWriter if is_zip(dest) else FolderWriter)(staging / target.name)
            ) as writer:
                yield writer.write
            os.replace(staging / target.name, target)
    except OSError as error:
        raise UserError(f'cannot write --dest={dest} ({error}); free space or name another place') from error


def png_bytes(image: Image) -> bytes:
    data = io.BytesIO()
    image.save(data, format='PNG', compress_level=0)
    return data.getvalue()
