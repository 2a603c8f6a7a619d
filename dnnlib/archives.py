"""Untrusted zip and tar archives, read by Python's own modules through files that bound each read."""

from __future__ import annotations

import functools
import io
import os
import struct
import tarfile
import zipfile
from typing import BinaryIO

from dnnlib import limits

# Compressed bytes to read at a time: zipfile inflates all that it reads, and LZMA and bzip2 may make a
# megabyte of 50.
PIECE = 4096


class BoundedFile:
    """A binary file from which a read takes at most `at_once` bytes, and none beyond `end`.

    Raises: TooLarge, about `what`, for a larger read.
    """

    def __init__(self, file: BinaryIO, at_once: int, what: str, end: int | None = None):
        self.file, self.at_once, self.what, self.end = file, at_once, what, end
        self.tell, self.close = file.tell, file.close

    def read(self, size: int | None = -1) -> bytes:
        # Reading to the end is a read of all remaining bytes.
        if size is None or size < 0:
            here, size = self.file.tell(), self.file.seek(0, os.SEEK_END)
            size -= self.file.seek(here)
        limits.check_size(size, self.at_once, self.what)
        return self.file.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if self.end is not None and whence == os.SEEK_SET:
            limits.check_size(offset, self.end, self.what)
        return self.file.seek(offset, whence)

    def seekable(self) -> bool:
        return True


class BoundedZip(zipfile.ZipFile):
    """A zip archive for reading, whose directory has at most `directory` bytes.

    Raises: one of `limits.UNREADABLE`.
    """

    _file = None  # for `close`, which a failed constructor calls too

    def __init__(self, path: str | os.PathLike, directory: int = limits.ZIP_DIRECTORY):
        file = open(path, 'rb')  # noqa: SIM115
        self._file = BoundedFile(file, directory, 'the directory of a zip archive')
        try:
            super().__init__(self._file)
        except BaseException:
            self._file.close()
            raise
        self.filename = os.fspath(path)

    def close(self) -> None:
        super().close()
        if self._file is not None:
            self._file.close()


def open_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int, what: str) -> BinaryIO:
    """Open a member of a zip archive for reading, after checking its size in the directory.

    Args:
        limit: uncompressed bytes that `what` has at most.
    Raises: TooLarge, and what zipfile raises.
    """
    limits.check_size(info.file_size, limit, what)
    limits.check_inflation(info.file_size, info.compress_size, what)
    member = archive.open(info)
    if info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return member
    # Other methods inflate without bounds, so read small pieces; the size is checked already.
    with member:
        return io.BytesIO(b''.join(iter(functools.partial(member.read, PIECE), b'')))


def member_start(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Offset of a member's bytes, after its local header and name (PKWARE's APPNOTE, 4.3.7)."""
    file.seek(info.header_offset)
    name, extra = struct.unpack('<26x2H', file.read(30))
    return info.header_offset + 30 + name + extra


class BoundedTar(tarfile.TarFile):
    """A tar archive for reading, compressed or not, of at most `limits.TAR_ARCHIVE` bytes when unpacked.

    Opened by `BoundedTar.open(fileobj=file)`.

    Raises: TooLarge, and what tarfile raises.
    """

    def __init__(self, name: str | None, mode: str, fileobj: BinaryIO, **others):
        super().__init__(
            name,
            mode,
            BoundedFile(fileobj, limits.PICKLED_BATCH, "CIFAR-10's archive", limits.TAR_ARCHIVE),
            **others,
        )
