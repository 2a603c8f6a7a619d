"""Tensors in pickled modules, and the positions of their elements in the file.

A tensor is pickled as a call with its storage, and its offset, shape and stride in it. A storage is a byte
string in PyTorch's legacy format: five pickles (magic number, version, system, the storage's description, its
key), the number of elements, the elements. The pickles are read as data (`restricted_pickle`); the elements
are not read, so that they can later be read directly into a tensor's memory.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, replace
from typing import BinaryIO

import torch

from torch_utils import restricted_pickle
from torch_utils.restricted_pickle import (
    Call,
    MalformedPickle,
    Name,
    Span,
    latin1,
    persistent_object,
    read_pickle,
    text_of_bytes,
)

MAGIC = 0x1950A86A20F9469CFC6C  # of PyTorch's files before 1.6, and of storages in pickles
MAX_ENTRIES = 100_000  # parameters, buffers and modules of a network
MAX_NAME = 1000  # characters of their dotted names


# ----------------------------------------------------------------------------
# Records of tensors and modules.


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that is still in the file: its storage, and its view in elements."""

    storage: Span | str | Call  # bytes in the file, bytes as text, or a persistent ID (`saved_tensors`)
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype | None = None  # None: the storage's own


def _called(node, names: set[str], least: int) -> bool:
    return isinstance(node, Call) and node.name in names and len(node.args) >= least


def stored_tensor(node) -> StoredTensor:
    """The tensor or parameter of a record. Raises: MalformedPickle."""
    # Unwrap parameters, and tensors with attributes.
    if _called(node, restricted_pickle.PARAMETERS, 1):
        node = node.args[0]
    if (
        _called(node, {restricted_pickle.TENSOR_WITH_ATTRIBUTES}, 3)
        and isinstance(node.args[0], Name)
        and isinstance(node.args[2], tuple)
    ):
        node = Call(node.args[0].path, node.args[2])
    is_tensor = _called(node, {restricted_pickle.TENSOR}, 4)
    if not is_tensor and not _called(node, {restricted_pickle.TYPED_TENSOR}, 7):
        raise MalformedPickle('has something else where a tensor is expected')

    # Check its view.
    storage, offset, shape, stride = node.args[:4]
    if not _called(storage, {restricted_pickle.STORAGE, restricted_pickle.PERSISTENT_ID}, 1):
        raise MalformedPickle('has a tensor without storage')
    if _called(shape, {'torch.Size'}, 1):
        (shape,) = shape.args
    if not (
        isinstance(shape, tuple)
        and isinstance(stride, tuple)
        and len(shape) == len(stride) <= 16
        and all(type(number) is int and 0 <= number < 2**48 for number in (offset, *shape, *stride))
    ):
        raise MalformedPickle('has a tensor of impossible shape')

    # Flags mark lazy negation and conjugation.
    dtype, flags = None, node.args[6:]
    if node.name == restricted_pickle.TYPED_TENSOR:
        dtype, flags = _dtype(flags[0]), flags[1:]
    if any(flags):
        raise MalformedPickle('has a tensor that stands for the negative or the conjugate of what is stored')

    # Its storage.
    if storage.name == restricted_pickle.PERSISTENT_ID:
        return StoredTensor(storage, offset, shape, stride, dtype)
    data = storage.args[0] if isinstance(storage.args[0], Span) else text_of_bytes(storage.args[0])
    if data is None:
        raise MalformedPickle('has a tensor without storage')
    return StoredTensor(data, offset, shape, stride, dtype)


def _dtype(node) -> torch.dtype:
    for dtype in restricted_pickle.DTYPES.values():
        if isinstance(node, Name) and node.path == str(dtype):
            return dtype
    raise MalformedPickle('has a tensor of unknown type')


def module_tensors(node) -> dict[str, StoredTensor]:
    """Parameters and buffers of a module's record, by dotted name. Raises: MalformedPickle."""
    # A queue instead of recursion: a file may nest modules deeply.
    found: dict[str, StoredTensor] = {}
    queue, entries = [('', node)], 0
    while queue:
        prefix, node = queue.pop()
        # Containers of PyTorch's have a plain state, our modules are persistent objects.
        if isinstance(node, Call) and node.name in restricted_pickle.CONTAINERS:
            state = node.state
        else:
            _, state = persistent_object(node) or (None, None)
        tables = [None]
        if isinstance(state, dict):
            tables = [state.get(kind) for kind in ('_parameters', '_buffers', '_modules')]
        if not all(isinstance(table, dict) for table in tables):
            raise MalformedPickle(
                f'has something else where the module {prefix.rstrip(".") or "at the top"!r} is expected'
            )

        # Collect its tensors, and queue its submodules. A shared submodule is visited for each of its names.
        entries += sum(len(table) for table in tables)
        if entries > MAX_ENTRIES:
            raise MalformedPickle('nests modules without end')
        parameters, buffers, children = (
            [(_joined(prefix, name), value) for name, value in table.items() if value is not None]
            for table in tables
        )
        found.update((name, stored_tensor(value)) for name, value in [*parameters, *buffers])
        queue.extend((f'{name}.', child) for name, child in children)
    return found


def _joined(prefix: str, name: object) -> str:
    if not isinstance(name, str) or len(prefix) + len(name) > MAX_NAME:
        raise MalformedPickle('has modules or tensors whose names are no text or without end')
    return prefix + name


# ----------------------------------------------------------------------------
# Positions of their elements.


@dataclass(frozen=True, slots=True)
class LocatedTensor:
    """A tensor with the position of its elements."""

    text: str | None  # storage as text; None: the elements are in the file
    start: int  # offset of the first element in the file, or in the text, in bytes
    extent: int  # number of elements from the first to the last, gaps included
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return self.extent * self.dtype.itemsize

    def text_bytes(self) -> bytes:
        """The elements, if they are in a text."""
        return latin1(self.text[self.start : self.start + self.nbytes])

    def view(self, elements: torch.Tensor) -> torch.Tensor:
        """The tensor of these elements [extent]; a copy if it does not fill their memory."""
        view = elements.as_strided(self.shape, self.stride)
        return view if view.is_contiguous() else view.clone()


class Storages:
    """Locates tensors' elements in a file whose storages are in PyTorch's legacy format (see above)."""

    def __init__(self, file: BinaryIO):
        self.file = file
        # First three pickles of the previous storage; most files have the same in all storages.
        self.preamble = b''
        self.known: dict[int, Elements] = {}  # by the identity of a storage, which several tensors may share

    def locate(self, tensor: StoredTensor) -> LocatedTensor:
        """Raises: MalformedPickle if the tensor reaches beyond its storage or repeats its elements."""
        elements = self.known.get(id(tensor.storage))
        if elements is None:
            elements = self.known[id(tensor.storage)] = self._read_header(tensor.storage)

        # The view must lie in the storage, and each of its elements at one place of its own.
        dtype = tensor.dtype or elements.dtype
        numel, count = elements.nbytes // dtype.itemsize, math.prod(tensor.shape)
        extent = 0
        if count:
            extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride))
        if count > numel or tensor.offset + extent > numel:
            raise MalformedPickle(
                f'claims a tensor of shape {list(tensor.shape)} that does not fit into its storage of '
                f'{numel:,} elements' + ' (its own would share memory)' * (tensor.offset + extent <= numel)
            )
        return LocatedTensor(
            elements.text,
            elements.start + tensor.offset * dtype.itemsize,
            extent,
            dtype,
            tensor.shape,
            tensor.stride,
        )

    def _read_header(self, storage: Span | str) -> Elements:
        if isinstance(storage, str):
            data = latin1(storage)
            return self._parse_header(storage, io.BytesIO(data), 0, len(data))
        return self._parse_header(None, self.file, storage.start, storage.start + storage.size)

    def _parse_header(self, text: str | None, file: BinaryIO, start: int, stop: int) -> Elements:
        def next_record():
            return read_pickle(file, stop, frozenset(restricted_pickle.STORAGE_TYPES), persistent_ids=True)

        # Skip the first three pickles if they are those of the previous storage; else check them.
        file.seek(start)
        if not self.preamble or file.read(min(len(self.preamble), stop - start)) != self.preamble:
            file.seek(start)
            magic, _version, system = (next_record() for _ in range(3))
            if magic != MAGIC or not isinstance(system, dict) or system.get('little_endian') is not True:
                raise MalformedPickle('has a tensor that is not in the little-endian format of PyTorch')
            length = file.tell() - start
            file.seek(start)
            self.preamble = file.read(length)

        # The description, whose device does not matter, then the key and the number of elements.
        description, _keys = next_record(), next_record()
        # ('storage', type, key, device, number of elements[, view of a part])
        record = description.args if isinstance(description, Call) else None
        if not isinstance(record, tuple) or len(record) not in (5, 6) or not isinstance(record[1], Name):
            raise MalformedPickle('has a tensor of unknown type')
        dtype, numel = restricted_pickle.STORAGE_TYPES[record[1].path], int.from_bytes(file.read(8), 'little')
        elements = Elements(text, file.tell(), dtype, numel * dtype.itemsize)
        if elements.start + elements.nbytes != stop:
            raise MalformedPickle('has a tensor whose length is not what it claims')
        return elements if len(record) == 5 or record[5] is None else elements.part(record[5])


@dataclass(frozen=True, slots=True)
class Elements:
    """The elements of a storage: offset of the first one and size of all, in bytes."""

    text: str | None
    start: int
    dtype: torch.dtype
    nbytes: int

    def part(self, view: object) -> Elements:
        """A part of a storage, by old PyTorch's record (key, first element, number of elements)."""
        if not (
            isinstance(view, tuple)
            and len(view) == 3
            and all(type(number) is int and 0 <= number < 2**48 for number in view[1:])
            and sum(view[1:]) * self.dtype.itemsize <= self.nbytes
        ):
            raise MalformedPickle('has a view of a storage that reaches beyond it')
        first, numel = (number * self.dtype.itemsize for number in view[1:])
        return replace(self, start=self.start + first, nbytes=numel)
