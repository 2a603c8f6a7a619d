"""NumPy's arrays in pickles: type, shape and place of the values, which are not read.

The pickles are read as data (`restricted_pickle`), and what they say of an array is checked before memory is
taken for it.
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

# Of files that hold arrays and nothing else.
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
    """The array that a record stands for; None where it is of something else. Raises: MalformedPickle.

    Args:
        wanted: what messages call the types that are meant.
        codes: a regular expression of NumPy's codes for these, without byte order.

    Protocols 2 to 4 call `_reconstruct` and give it the state (version, shape, type, whether Fortran's order,
    values); protocol 5 calls `_frombuffer` with (values, type, shape, order).
    """
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
    code = dtype.args[0] if dtype.args else None
    byte_order = dtype.state[1] if isinstance(dtype.state, tuple) and len(dtype.state) > 1 else None
    if not (
        isinstance(code, str)
        and re.fullmatch(codes, code)
        and byte_order in ('<', '>', '|')
        and order in ('C', 'F')
    ):
        raise MalformedPickle(f'is an array of type {str(code)[:40]!r} instead of {wanted}')
    if (
        len(shape) > MAX_DIMENSIONS
        or not all(type(side) is int and side >= 0 for side in shape)
        or math.prod(max(side, 1) for side in shape) > sys.maxsize // 8
    ):
        raise MalformedPickle('has no shape')
    if not isinstance(values, Span):
        values = latin1(text_of_bytes(values) or '')
    header, size = (
        Header(shape, np.dtype(byte_order + code), order),
        values.size if isinstance(values, Span) else len(values),
    )
    if size != header.nbytes:
        raise MalformedPickle(f'says {header.dtype} {list(header.shape)}, and has {size:,} bytes')
    return StoredArray(header, values)
