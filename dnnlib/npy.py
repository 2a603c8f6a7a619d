"""Headers of NumPy's .npy files, read as data: no code runs, and no memory is allocated on their word."""

from __future__ import annotations

import ast
import math
import re
import struct
import sys
from typing import BinaryIO, NamedTuple

import numpy as np

from dnnlib import limits

START = b'\x93NUMPY'
LENGTHS = {(1, 0): '<H', (2, 0): '<I'}  # format of the header's length, by version
KINDS = 'biufUS'  # booleans, numbers and text
MAX_DIMENSIONS = 32  # NumPy 1's own limit


class Header(NamedTuple):
    """The description of an array in a .npy file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    order: str  # 'C' or 'F'

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: BinaryIO) -> Header:
    """Read the header at the file's position, and leave the position where the values begin.

    Raises: one of `limits.UNREADABLE` without a header, or for anything but plain numbers and text.
    """
    # Magic, version and length.
    start = file.read(len(START) + 2)
    if start[: len(START)] != START or len(start) < len(START) + 2:
        raise ValueError('it does not begin as a .npy file does')
    if (version := tuple(start[-2:])) not in LENGTHS:
        raise ValueError(f'its format {version[0]}.{version[1]} is not one of plain arrays')
    (size,) = struct.unpack(LENGTHS[version], file.read(struct.calcsize(LENGTHS[version])))
    limits.check_size(size, limits.ARRAY_HEADER, 'the header of an array')

    # The header is the text of a Python dict, which `literal_eval` reads without running code.
    text = file.read(size).decode('latin-1')
    if len(text) < size or '\\' in text:
        raise ValueError('its header is damaged')
    entries = ast.literal_eval(re.sub(r'(?<=\d)L\b', '', text.strip()))  # Python 2 wrote 3L
    if not isinstance(entries, dict) or entries.keys() != {'descr', 'fortran_order', 'shape'}:
        raise ValueError('its header does not say type, shape and order')

    # Type and shape, which must be those of an array that fits into memory.
    shape, dtype = entries['shape'], _dtype(entries['descr'])
    if (
        not isinstance(shape, tuple)
        or len(shape) > MAX_DIMENSIONS
        or not all(type(side) is int and side >= 0 for side in shape)
    ):
        raise ValueError(f'its shape is {str(list(shape) if isinstance(shape, tuple) else shape)[:80]}')
    if math.prod(max(side, 1) for side in shape) * dtype.itemsize > sys.maxsize:
        raise ValueError(f'its shape is {str(list(shape))[:80]}, which is too large for any memory')
    return Header(shape, dtype, 'F' if entries['fortran_order'] else 'C')


def _dtype(code: object) -> np.dtype:
    plain = isinstance(code, str) and re.fullmatch(r'[<>|=]?[a-zA-Z?]\d{0,9}', code)
    dtype = np.dtype(code) if plain else None
    if dtype is None or dtype.kind not in KINDS or dtype.itemsize == 0:
        shown = str(code)[:40] if dtype is None else dtype
        raise ValueError(
            f'it holds values of type {shown}, as its header says, not plain numbers or text (refused, '
            'nothing was executed)'
        )
    return dtype
