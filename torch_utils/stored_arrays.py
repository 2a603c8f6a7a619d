"""NumPy's arrays in pickles: type, shape and position of the values, which are not read.

Pickles are read as data (`restricted_pickle`), and an array's description is checked before memory is
allocated for it.
"""

from __future__ import annotations

import math
import re
import sys
from typing import BinaryIO, NamedTuple

import numpy as np

from dnnlib.npy import MAX_DIMENSIONS, Header
from torch_utils.restricted_pickle import (
    DICTS,
    ENCODED_BYTES,
    NUMPY_ARRAYS,
    NUMPY_SCALARS,
    NUMPY_TYPES,
    Call,
    MalformedPickle,
    Span,
    latin1,
    text_of_bytes,
)

# For files that hold only arrays.
PICKLE_NAMES = frozenset(NUMPY_ARRAYS | NUMPY_SCALARS | NUMPY_TYPES | DICTS | {ENCODED_BYTES})


class StoredArray(NamedTuple):
    """An array of numbers in a pickle."""

    header: Header
    values: Span | bytes

    def read(self, file: BinaryIO) -> np.ndarray:
        """The array, whose pickle is in that file."""
        data = self.values
        if isinstance(data, Span) and data.data is None:
            file.seek(data.start)
            data = file.read(data.size)
        elif isinstance(data, Span):
            data = data.data
        return np.frombuffer(data, self.header.dtype).reshape(self.header.shape, order=self.header.order)


def stored_array(node, wanted: str = 'numbers', codes: str = r'[iu][1248]|f[248]') -> StoredArray | None:
    """The array of a record; None for a record of anything else. Raises: MalformedPickle.

    Args:
        wanted: name of the wanted types in messages.
        codes: regular expression of NumPy's codes for them, without byte order.

    Protocols 2 to 4 call `_reconstruct` with the state (version, shape, type, Fortran's order or not,
    values); protocol 5 calls `_frombuffer` with (values, type, shape, order).
    """
    # Take the record apart.
    match node:
        case Call(name=name, args=(values, Call(name='numpy.dtype') as dtype, tuple(shape), str(order))) if (
            name in NUMPY_ARRAYS
        ):
            pass
        case Call(
            name=name, state=(_, tuple(shape), Call(name='numpy.dtype') as dtype, bool(fortran), values)
        ) if name in NUMPY_ARRAYS:
            order = 'F' if fortran else 'C'
        case _:
            return None

    # Check the type.
    code = dtype.args[0] if dtype.args else None
    # A type's state is (version, byte order, ...).
    byte_order = dtype.state[1] if isinstance(dtype.state, tuple) and len(dtype.state) > 1 else None
    if not (
        isinstance(code, str)
        and re.fullmatch(codes, code)
        and byte_order in ('<', '>', '|')
        and order in ('C', 'F')
    ):
        raise MalformedPickle(f'is an array of type {str(code)[:40]!r} instead of {wanted}')

    # Check the shape, and that it fits the values.
    if (
        len(shape) > MAX_DIMENSIONS
        or not all(type(side) is int and side >= 0 for side in shape)
        # A size of 0 must not hide others beyond any memory.
        or math.prod(max(side, 1) for side in shape) > sys.maxsize // 8
    ):
        raise MalformedPickle('has no shape')
    if not isinstance(values, Span):
        values = latin1(text_of_bytes(values) or '')
    header = Header(shape, np.dtype(byte_order + code), order)
    size = values.size if isinstance(values, Span) else len(values)
    if size != header.nbytes:
        raise MalformedPickle(f'says {header.dtype} {list(header.shape)}, and has {size:,} bytes')
    return StoredArray(header, values)
