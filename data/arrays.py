"""NumPy's .npy and .npz files, read as data: pickled contents are refused, and no memory is taken on a
header's word."""

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
from dnnlib.util import DISK_ERRORS, UserError

CHUNK = 1 << 20


def may_be_images(header: Header) -> bool:
    """Whether an array has the type of images, and as many dimensions as gray or color images."""
    return header.dtype == np.uint8 and len(header.shape) in (3, 4)


def map_npy(path: str | os.PathLike) -> np.ndarray:
    """The array of a .npy file, mapped: its values are read when they are used. Changes to it stay in memory.

    Raises: UserError for a file that is no such array, or shorter or longer than its header says.
    """
    try:
        with open(path, 'rb') as file:
            return _map(file, npy.read_header(file), file.tell(), os.path.getsize(path))
    except UNREADABLE as error:
        raise UserError(
            f'{path} is no readable .npy file: '
            f'{_what_it_is(path, error, "an array of images (.npy)", "a NumPy .npy")}'
        ) from error


def _what_it_is(path: str | os.PathLike, error: BaseException, wanted: str, own: str) -> str:
    """The reason why a file cannot be read and what to do about it: that it is of another kind, or else what
    the reader said."""
    kind = another_kind(path, wanted, own=(own, 'text')) if os.access(path, os.R_OK) else None
    return f'it {kind}' if kind else f'{_reason(error)}. Copy or make it again.'


def _map(file: BinaryIO, header: Header, start: int, stop: int) -> np.ndarray:
    """The array whose values are file[start:stop]."""
    if stop - start != header.nbytes:
        raise ValueError(
            f'its header says {header.dtype} {list(header.shape)}, and {stop - start:,} bytes follow instead '
            f'of {header.nbytes:,}'
        )
    if header.nbytes == 0:
        return np.empty(header.shape, header.dtype)
    return np.memmap(file, header.dtype, 'c', start, header.shape, header.order)


class ArchivedArrays:
    """The arrays of an .npz file by name. Only what is asked for is read. A context manager.

    Args:
        path: the file.
        name: what messages call it.
    Raises (every method): UserError that says which array cannot be read.
    """

    def __init__(self, path: str | os.PathLike, name: str | os.PathLike):
        self.path, self.name = Path(path), os.fspath(name)
        try:
            self._zip = BoundedZip(path)
        except UNREADABLE as error:
            reason = _what_it_is(path, error, 'an archive of arrays (.npz)', 'a damaged')
            raise UserError(f'{self.name} is no complete .npz file: {reason}') from error
        self._members = {}
        for info in self._zip.infolist():
            if info.filename.endswith('.npy'):
                key = info.filename.removesuffix('.npy')
                if key in self._members:
                    raise UserError(f'{self.name} has two arrays called {key}. Make it again.')
                self._members[key] = info

    def __enter__(self) -> ArchivedArrays:
        return self

    def __exit__(self, *_) -> None:
        self._zip.close()

    @property
    def keys(self) -> list[str]:
        return list(self._members)

    def header(self, key: str) -> Header:
        """Type and shape of an array, whose values are not read."""
        try:
            with self._zip.open(self._members[key]) as file:
                return self._checked_header(key, file)
        except UNREADABLE as error:
            raise self._unreadable(key, error) from error

    def read(self, key: str) -> np.ndarray:
        """An array, in memory."""
        try:
            with self._zip.open(self._members[key]) as file:
                header = self._checked_header(key, file)
                values = np.empty(
                    math.prod(header.shape), header.dtype
                )  # takes memory only where it is written to
                _fill(file, memoryview(values.view(np.uint8)))
            return values.reshape(header.shape, order=header.order)
        except UNREADABLE as error:
            raise self._unreadable(key, error) from error

    def map(self, key: str, verify: bool = False) -> np.ndarray:
        """An array whose values are read when they are used: in place or, of a compressed file, from a
        temporary copy that goes with the array.

        Args:
            verify: whether to read it once for its checksum, which for a copy is compared anyway.
        """
        info = self._members[key]
        try:
            with self._zip.open(info) as member:
                header = self._checked_header(key, member)
                start = member.tell()
                if info.compress_type == zipfile.ZIP_STORED:
                    while verify and member.read(CHUNK):
                        pass
                    with open(self.path, 'rb') as file:
                        begin = member_start(file, info)
                        return _map(file, header, begin + start, begin + info.file_size)
                with tempfile.TemporaryFile() as file:
                    shutil.copyfileobj(member, file, CHUNK)
                    file.flush()
                    return _map(file, header, 0, file.tell())
        except UNREADABLE as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise UserError(
                    f'{self.name}: {key} cannot be unpacked into {tempfile.gettempdir()}: {error.strerror}. '
                    'Set TMPDIR to a folder with more space, or save it uncompressed, with np.savez.'
                ) from error
            raise self._unreadable(key, error) from error

    def _checked_header(self, key: str, file: BinaryIO) -> Header:
        info = self._members[key]
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError('it is compressed as NumPy never does')
        header = npy.read_header(file)
        if file.tell() + header.nbytes != info.file_size:
            raise ValueError(
                f'its header says {header.dtype} {list(header.shape)}, {header.nbytes:,} bytes, and it has '
                f'{info.file_size:,}'
            )
        check_inflation(header.nbytes, info.compress_size, 'its values')
        return header

    def _unreadable(self, key: str, error: BaseException) -> UserError:
        return UserError(
            f'{self.name}: {key} is no readable plain array: {_reason(error)}. Copy or make the file again.'
        )


def _reason(error: BaseException) -> str:
    """The first line of what an error says; its name where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _fill(file: BinaryIO, view: memoryview) -> None:
    """Read as many bytes as there is room for, a little at a time, to the end of the file, where its checksum
    is compared."""
    for start in range(0, len(view), CHUNK):
        part = file.read(min(CHUNK, len(view) - start))
        if not part:
            raise ValueError(f'it ends after {start:,} of {len(view):,} bytes')
        view[start : start + len(part)] = part
