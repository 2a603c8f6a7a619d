"""Files that end in their own checksum, and reading of files by several threads, at about memory speed.

A sealed file ends in the line `#checksum <64 hexadecimal digits>`, which readers of pickles and of PyTorch's
files ignore. The checksum is the SHA-256 over the CRC-32s, four little-endian bytes each, of the file's
pieces of 512 KiB. It finds accidents, not forgeries; SHA-256 of the file itself would take longer than
reading it from memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import numpy as np

from dnnlib.util import atomic_write

SEAL_LENGTH = len(b'\n#checksum ') + 64 + len(b'\n')
PIECE = 1 << 19  # bytes: fits in a core's cache while it is summed and copied
THREADS = min(4, os.cpu_count() or 1)
Part = tuple[int, np.ndarray]  # offset in a file, uint8 array for the bytes from there on


class DamagedFile(ValueError):
    """A file that differs from what was written. The message completes 'it ...'."""


# ----------------------------------------------------------------------------
# Writing.


class _SealingFile:
    """Writes to a file and computes its checksum on the way."""

    def __init__(self, file: BinaryIO):
        self.file, self.failure = file, None
        # The digest is of complete pieces, CRC and length are of the current one.
        self._digest, self._crc, self._length = hashlib.sha256(), 0, 0

    def write(self, data) -> int:
        data = memoryview(data).cast('B')
        self._sum_up(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.failure = error
            raise

    def _sum_up(self, data: memoryview):
        while data:
            part, data = data[: PIECE - self._length], data[PIECE - self._length :]
            self._crc, self._length = zlib.crc32(part, self._crc), self._length + len(part)
            if self._length == PIECE:
                self._end_piece()

    def _end_piece(self):
        self._digest.update(self._crc.to_bytes(4, 'little'))
        self._crc = self._length = 0

    def seal(self) -> bytes:
        """The line that ends the file."""
        if self._length:
            self._end_piece()
        return b'\n#checksum ' + self._digest.hexdigest().encode() + b'\n'

    def flush(self):
        self.file.flush()


@contextlib.contextmanager
def sealed(path: str | os.PathLike) -> Iterator[_SealingFile]:
    """A file to write, sealed at the end of the block; see `atomic_write`."""
    with atomic_write(path) as file:
        sealing = _SealingFile(file)
        try:
            yield sealing
        except RuntimeError:  # PyTorch's writer raises it for a full disk
            if sealing.failure:
                raise sealing.failure from None
            raise
        file.write(sealing.seal())


# ----------------------------------------------------------------------------
# Reading.


def find_seal(file: BinaryIO) -> tuple[int, str | None]:
    """(length of the contents, their checksum or None); leaves the file at its start."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - SEAL_LENGTH, 0))
    seal = re.fullmatch(rb'\n#checksum ([0-9a-f]{64})\n', file.read())
    file.seek(0)
    return (size, None) if seal is None else (size - SEAL_LENGTH, seal[1].decode())


def read_parts(file: BinaryIO, parts: Sequence[Part]):
    """Fill the parts from a file. Raises: DamagedFile if it ends before them."""

    def read(some: Sequence[Part]):
        for start, target in some:
            _read_at(file, start, target)

    # `list` raises the errors of threads. Eight parts per task: small tensors are many.
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, (parts[i : i + 8] for i in range(0, len(parts), 8))))


def read_sealed(file: BinaryIO, size: int, seal: str, parts: Sequence[Part] = ()):
    """Fill the parts from a file of `size` bytes and check its seal, in one pass. Raises: DamagedFile."""
    # Parts by the pieces that they overlap.
    wanted: dict[int, list[Part]] = {}
    for start, target in parts:
        for index in range(start // PIECE, -(-(start + len(target)) // PIECE)):
            wanted.setdefault(index, []).append((start, target))

    def read(indices: range) -> bytes:
        buffer, sums = np.empty(PIECE, np.uint8), []
        for index in indices:
            first = index * PIECE
            piece = buffer[: size - first]  # the last one may be shorter
            _read_at(file, first, piece)
            sums.append(zlib.crc32(piece).to_bytes(4, 'little'))
            # Copy what each part shares with this piece.
            for start, target in wanted.get(index, ()):
                shared = piece[max(start - first, 0) : start - first + len(target)]
                target[max(first - start, 0) :][: len(shared)] = shared
        return b''.join(sums)

    # `map` keeps the order, in which the checksum is computed.
    indices, digest = range(-(-size // PIECE)), hashlib.sha256()
    with ThreadPoolExecutor(THREADS) as pool:
        # Tasks of 32 pieces, 16 MiB, for little overhead.
        for sums in pool.map(read, (indices[i : i + 32] for i in indices[::32])):
            digest.update(sums)
    if digest.hexdigest() != seal:
        raise DamagedFile('is damaged: its contents do not match its checksum. Copy or download it again')


def _read_at(file: BinaryIO, start: int, target: np.ndarray):
    done = 0
    while done < len(target):
        count = os.preadv(file.fileno(), [target[done:]], start + done)  # at most 2 GiB at a time
        if not count:
            raise DamagedFile('ends in the middle of a tensor (truncated?)')
        done += count
