"""Limits on the memory that untrusted files may take, and readers that keep them.

A limit comes before a parser: code that reads a file checks its size first, or reads no more than the limit.
Nothing here parses.
"""

from __future__ import annotations

import errno
import lzma
import os
import pickle
import stat
import struct
import tarfile
import tokenize
import zipfile
import zlib
from typing import BinaryIO

KB, MB, GB = 1 << 10, 1 << 20, 1 << 30

# Most bytes to read, by kind of content.
JSON_FILE = 4 * MB  # options, records: kilobytes in practice; parsed, 24 times as much in the worst case
JSON_LINE = 1 * MB  # a line of stats.jsonl has a few kilobytes
YAML_FILE = 64 * KB  # options written by hand; the parser is slow
LABELS_OF_IMAGE = 16 * KB  # per image of dataset.json, if more than JSON_FILE: a name and 800 numbers
IMAGE_FILE = 256 * MB  # one image: 40 million pixels of 16-bit RGB, uncompressed
LATENTS_FILE = 64 * MB  # latents of one image: float32 [8, 1024, 1024] have 32 MB
SAVED_STRUCTURE = 16 * MB  # a PyTorch file without its tensors' elements: about 200 bytes per tensor
PICKLED_TEXT = 512 * MB  # in a pickle; protocol 2 writes a tensor as text, and the largest have 250 MB
PICKLED_BATCH = 64 * MB  # a CIFAR-10 batch has 30 MB
ARRAY_HEADER = 10_000  # of a .npy file: NumPy's own limit
SAFETENSORS_HEADER = 16 * MB  # about 100 bytes per tensor, and a configuration
PICKLED_REFERENCE = 256 * MB  # EDM2's statistics have 42 MB
IDX_FILE = 640 * MB  # unpacked: EMNIST has 547 MB
TAR_ARCHIVE = 512 * MB  # unpacked: CIFAR-10 has 186 MB
ZIP_DIRECTORY = 16 * MB  # of arrays, networks and states: 300,000 members
DATA_DIRECTORY = 1024 * MB  # of a data set: 13 million members

# Downloads of unannounced length: most bytes of one, and bytes that stay free on its disk.
UNANNOUNCED_DOWNLOAD, KEPT_FREE = 64 * GB, 256 * MB

# Largest size and ratio of inflated data. Images, statistics and labels compress less.
INFLATED, INFLATED_RATIO = 64 * MB, 100

# Numbers.
IMAGE_PIXELS, IMAGE_SIDE = 1 << 26, 65_535  # of an image: 8192 x 8192, and the longest side of a JPEG
MAX_STEPS = 10_000  # of a sampler, a student, or a teacher's grid in a snapshot
TAR_MEMBERS = 10_000  # CIFAR-10 has ten
MAX_DIGITS = 32  # of a number on the command line, in a file name or the environment
MAX_TEXT = 1000  # characters of a file that a message repeats

# What parsers of any library raise on damaged or hostile files. Subclasses are not listed: LookupError covers
# IndexError and KeyError; ValueError, errors of JSON and Unicode; RuntimeError, RecursionError.
UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    SyntaxError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    tarfile.TarError,
    pickle.UnpicklingError,
    tokenize.TokenError,
)


class TooLarge(ValueError):
    """A size beyond the limit of its kind. The message completes 'it ...'."""


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a file for reading. Raises: OSError, also for folders, pipes and devices, which could block."""
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), 'rb')
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, 'It is not a regular file', os.fspath(path))
    return file


def check_size(size: int, limit: int, what: str) -> None:
    """Raises: TooLarge if `size` bytes exceed the `limit` of `what`."""
    if size > limit:
        raise TooLarge(f'has {size:,} bytes, and {what} has at most {limit:,}')


def check_inflation(size: int, compressed: int, what: str) -> None:
    """Raises: TooLarge if `compressed` bytes claim to inflate to more than honest data does."""
    if size > max(INFLATED, INFLATED_RATIO * compressed):
        raise TooLarge(f'claims {size:,} bytes for {what} in {compressed:,} of the file')


def read_at_most(file: BinaryIO, limit: int, what: str) -> bytes:
    """The remaining bytes of a file. Raises: TooLarge if they exceed `limit`; what the file raises."""
    # One byte more tells a longer file from one of just that length.
    data = file.read(limit + 1)
    if len(data) > limit:
        raise TooLarge(f'has more than the {limit:,} bytes that {what} has at most')
    return data
