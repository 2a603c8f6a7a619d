"""Zip and tar archives of strangers, read by Python's own modules through files that bound each read."""

from __future__ import annotations

import functools
import io
import os
import struct
import tarfile
import zipfile
from typing import BinaryIO

from dnnlib import limits

PIECE = 4096  # compressed bytes at once; LZMA and bzip2 may make a megabyte of 50, which zipfile takes whole


class BoundedFile:
    """A binary file of which no more than `at_once` bytes are read together, and none beyond `end`.

    Raises: TooLarge, of `what`, where more is wanted.
    """

    def __init__(self, file: BinaryIO, at_once: int, what: str, end: int | None = None):
        self.file, self.at_once, self.what, self.end = file, at_once, what, end
        self.tell, self.close = file.tell, file.close

    def read(self, size: int | None = -1) -> bytes:
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
    """A zip archive for reading. Its directory has at most `directory` bytes.

    Raises: one of `limits.UNREADABLE`.
    """

    _file = None

    def __init__(self, path: str | os.PathLike, directory: int = limits.ZIP_DIRECTORY):
        self._file = BoundedFile(open(path, 'rb'), directory, 'the directory of a zip archive')  # noqa: SIM115
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
    """A member of a zip archive, for reading. The directory's size for it is checked first.

    Args:
        limit: bytes, uncompressed, that `what` has at most.
    Raises: TooLarge, and what zipfile raises.
    """
    limits.check_size(info.file_size, limit, what)
    limits.check_inflation(info.file_size, info.compress_size, what)
    member = archive.open(info)
    if info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return member
    with member:
        return io.BytesIO(b''.join(iter(functools.partial(member.read, PIECE), b'')))


def member_start(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Offset of a member's bytes, which follow its local header and name (PKWARE's APPNOTE, 4.3.7)."""
    file.seek(info.header_offset)
    name, extra = struct.unpack('<26x2H', file.read(30))
    return info.header_offset + 30 + name + extra


class BoundedTar(tarfile.TarFile):
    """A tar archive for reading, compressed or not: `BoundedTar.open(fileobj=file)`.

    Unpacked, it has at most `limits.TAR_ARCHIVE` bytes.

    Raises: TooLarge, and what tarfile raises.
    """

    def __init__(self, name: str | None, mode: str, fileobj: BinaryIO, **others):
        super().__init__(
            name,
            mode,
            BoundedFile(fileobj, limits.PICKLED_BATCH, "CIFAR-10's archive", limits.TAR_ARCHIVE),
            **others,
        )
