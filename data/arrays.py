"""NumPy's .npy and .npz files, read as plain data: no pickles, and sizes are checked before allocation."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dnnlib import npy
from dnnlib.archives import BoundedZip, member_start
from dnnlib.file_kind import another_kind
from dnnlib.limits import UNREADABLE, check_inflation
from dnnlib.npy import Header
from dnnlib.text import first_line
from dnnlib.util import DISK_ERRORS, UserError

CHUNK = 1 << 20  # bytes read at a time


def may_be_images(header: Header) -> bool:
    """Whether an array has the type and the number of dimensions of gray or color images."""
    return header.dtype == np.uint8 and len(header.shape) in (3, 4)


def map_npy(path: str | os.PathLike) -> np.ndarray:
    """The array of a .npy file, memory-mapped copy-on-write.

    Raises: UserError for any other file, or one shorter or longer than its header says.
    """
    try:
        with open(path, 'rb') as file:
            return _map(file, npy.read_header(file), file.tell(), os.path.getsize(path))
    except UNREADABLE as error:
        raise UserError(
            f'{path} is not a readable .npy file: '
            f'{_explain(path, error, "an array of images (.npy)", "a NumPy .npy")}'
        ) from error


def _explain(path: str | os.PathLike, error: BaseException, wanted: str, own: str) -> str:
    """Why a file cannot be read, and the cure: it is of another kind, or else the reader's message."""
    kind = another_kind(path, wanted, own=(own, 'text')) if os.access(path, os.R_OK) else None
    return f'it {kind}' if kind else f'{first_line(error)}. Copy or recreate it.'


def _map(file: BinaryIO, header: Header, start: int, stop: int) -> np.ndarray:
    """The array whose values are file[start:stop]."""
    if stop - start != header.nbytes:
        raise ValueError(
            f'its header says {header.dtype} {list(header.shape)}, but {stop - start:,} bytes follow instead '
            f'of {header.nbytes:,}'
        )
    # An empty region cannot be mapped.
    if header.nbytes == 0:
        return np.empty(header.shape, header.dtype)
    return np.memmap(file, header.dtype, 'c', start, header.shape, header.order)


class ArchivedArrays:
    """Arrays of an .npz file by name, each read on demand. A context manager.

    Args:
        path: the file.
        name: its name in messages.
    Raises (every method): UserError naming the array that cannot be read.
    """

    def __init__(self, path: str | os.PathLike, name: str | os.PathLike):
        self.path, self.name = Path(path), os.fspath(name)
        try:
            self._zip = BoundedZip(path)
        except UNREADABLE as error:
            reason = _explain(path, error, 'an archive of arrays (.npz)', 'a damaged')
            raise UserError(f'{self.name} is not a complete .npz file: {reason}') from error
        # Map names to members. A second member of a name would be another array to other readers.
        self._members = {}
        for info in self._zip.infolist():
            if info.filename.endswith('.npy'):
                key = info.filename.removesuffix('.npy')
                if key in self._members:
                    raise UserError(f'{self.name} has two arrays called {key}. Recreate it.')
                self._members[key] = info

    def __enter__(self) -> ArchivedArrays:
        return self

    def __exit__(self, *_) -> None:
        self._zip.close()

    @property
    def keys(self) -> list[str]:
        return list(self._members)

    def header(self, key: str) -> Header:
        """Type and shape of an array."""
        try:
            with self._zip.open(self._members[key]) as file:
                return self._checked_header(key, file)
        except UNREADABLE as error:
            raise self._unreadable(key, error) from error

    def read(self, key: str) -> np.ndarray:
        """An array, read into memory."""
        try:
            with self._zip.open(self._members[key]) as file:
                header = self._checked_header(key, file)
                # np.empty commits memory page by page, so that a truncated file fails before it is all taken.
                values = np.empty(math.prod(header.shape), header.dtype)
                _fill(file, memoryview(values.view(np.uint8)))
            return values.reshape(header.shape, order=header.order)
        except UNREADABLE as error:
            raise self._unreadable(key, error) from error

    def map(self, key: str, verify: bool = False) -> np.ndarray:
        """An array, memory-mapped in place or, if compressed, from a temporary copy that lives as long as it.

        Args:
            verify: verify the checksum of an array mapped in place; a copy's always is.
        """
        info = self._members[key]
        try:
            with self._zip.open(info) as member:
                header = self._checked_header(key, member)
                start = member.tell()
                # Stored members can be mapped where they are.
                if info.compress_type == zipfile.ZIP_STORED:
                    # Reading to the end compares the checksum.
                    while verify and member.read(CHUNK):
                        pass
                    with open(self.path, 'rb') as file:
                        begin = member_start(file, info)
                        return _map(file, header, begin + start, begin + info.file_size)
                # Others are unpacked to a file without a name, which the map keeps alive.
                with tempfile.TemporaryFile() as file:
                    shutil.copyfileobj(member, file, CHUNK)
                    file.flush()
                    return _map(file, header, 0, file.tell())
        except UNREADABLE as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise UserError(
                    f'{self.name}: {key} cannot be unpacked into {tempfile.gettempdir()}: {error.strerror}. '
                    'Set TMPDIR to a folder with more space, or save the file uncompressed with np.savez.'
                ) from error
            raise self._unreadable(key, error) from error

    def _checked_header(self, key: str, file: BinaryIO) -> Header:
        info = self._members[key]
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError('it is compressed by a method that NumPy does not use')
        header = npy.read_header(file)
        if file.tell() + header.nbytes != info.file_size:
            raise ValueError(
                f'its header says {header.dtype} {list(header.shape)}, {header.nbytes:,} bytes, but it has '
                f'{info.file_size:,}'
            )
        check_inflation(header.nbytes, info.compress_size, 'its values')
        return header

    def _unreadable(self, key: str, error: BaseException) -> UserError:
        return UserError(
            f'{self.name}: {key} is not a readable plain array: {first_line(error)}. '
            'Copy or recreate the file.'
        )


def _fill(file: BinaryIO, view: memoryview) -> None:
    """Fill `view` chunk by chunk; reading a member to its end compares its checksum. Raises: ValueError."""
    for start in range(0, len(view), CHUNK):
        part = file.read(min(CHUNK, len(view) - start))
        if not part:
            raise ValueError(f'it ends after {start:,} of {len(view):,} bytes')
        view[start : start + len(part)] = part
