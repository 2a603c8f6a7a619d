"""Reads pickles as data. Nothing is imported, called or executed, whatever the file says.

The reader knows the opcodes that Python's binary protocols 2 to 5 emit for plain data, and turns names and calls into inert
records: `Name('collections.OrderedDict')`, `Call(name, args, state)`. Long byte strings are not read: a `Span` says where they lie, so
that tensors can be read later, straight into their memory, or not at all. Opcodes and names outside the tables are refused.
Time and memory are at most proportional to the file's length.
"""
from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import torch


class MalformedPickle(ValueError):
    """The file is damaged, hostile, or of a kind that this reader does not know. The message completes 'it ...'."""


@dataclass(frozen=True, eq=False)
class Name:
    """A global that the file names."""
    path: str


@dataclass(eq=False)
class Call:
    """An object that the file would have built by calling `name`, and the state it would have given to it."""
    name: str
    args: tuple
    state: object = None


@dataclass(frozen=True, eq=False)
class Span:
    """A byte string and its place in the file; a long one is left there."""
    start: int
    size: int
    data: bytes | None = None


PERSISTENT_OBJECT = 'torch_utils.persistence._reconstruct_persistent_obj'
PARAMETERS = {'torch._utils._rebuild_parameter', 'torch._utils._rebuild_parameter_with_state'}
TENSOR, STORAGE = 'torch._utils._rebuild_tensor_v2', 'torch.storage._load_from_bytes'
NUMPY_SCALARS = {'numpy.core.multiarray.scalar', 'numpy._core.multiarray.scalar'}
DICTS = {'collections.OrderedDict', 'dnnlib.util.EasyDict'}
CONTAINERS = {f'torch.nn.modules.container.{name}' for name in ('ModuleDict', 'ModuleList', 'Sequential')}
DTYPES = {'Float': torch.float32, 'Double': torch.float64, 'Half': torch.float16, 'BFloat16': torch.bfloat16,
          'Long': torch.int64, 'Int': torch.int32, 'Short': torch.int16, 'Char': torch.int8, 'Byte': torch.uint8}
STORAGE_TYPES = {f'torch.{name}Storage': dtype for name, dtype in DTYPES.items()}
ARRAYS = {f'{package}.multiarray._reconstruct' for package in ('numpy.core', 'numpy._core')} | {'numpy.ndarray', 'numpy.dtype'}
PLAIN = {'torch.Size', 'torch.device', 'builtins.set', '__builtin__.set'} | {str(dtype) for dtype in DTYPES.values()}
SNAPSHOT_NAMES = frozenset({PERSISTENT_OBJECT, TENSOR, STORAGE} | PARAMETERS | NUMPY_SCALARS | DICTS | CONTAINERS | ARRAYS | PLAIN)

#----------------------------------------------------------------------------
# The machine. A handler is a function of the reader; it takes its operands from the file and the stack.

MAX_KEY_LENGTH = 16  # tuples hash in time proportional to their length, at every use


class _Reader:
    def __init__(self, file: BinaryIO, stop: int, names: frozenset[str], persistent_ids: bool):
        self.file, self.stop, self.names, self.persistent_ids = file, stop, names, persistent_ids
        self.stack: list = []
        self.marked: list[list] = []
        self.memo: dict[int, object] = {}

    def run(self):
        while (opcode := self.take(1)) != b'.':
            handler = OPCODES.get(opcode)
            if handler is None:
                raise MalformedPickle(f'has opcode 0x{opcode[0]:02x}, which no snapshot uses')
            handler(self)
        return self.stack.pop()

    def take(self, size: int) -> bytes:
        # Lengths are checked against the file before anything is allocated.
        data = self.file.read(size) if size <= self.stop else b''
        if len(data) != size:
            raise MalformedPickle('ends in the middle of a record (truncated?)')
        return data

    def number(self, layout: str):
        return struct.unpack(f'<{layout}', self.take(struct.calcsize(layout)))[0]

    def text(self, layout: str) -> str:
        return self.take(self.number(layout)).decode('utf-8', 'surrogatepass')

    def line(self) -> str:
        data = self.file.readline(256)
        if not data.endswith(b'\n'):
            raise MalformedPickle('has a name without an end')
        return data[:-1].decode('utf-8')

    def span(self, layout: str) -> Span:
        size = self.number(layout)
        start = self.file.tell()
        if start + size > self.stop:
            raise MalformedPickle('ends in the middle of a tensor (truncated?)')
        if size < 256:
            return Span(start, size, self.take(size))
        self.file.seek(start + size)
        return Span(start, size)

    def mark(self):
        self.marked.append(self.stack)
        self.stack = []

    def pop_to_mark(self) -> list:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def pop(self, count: int) -> list:
        if len(self.stack) < count:
            raise MalformedPickle('takes more values than it gives')
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def target(self, kind: type):
        """The value on top of the stack, which the current opcode is about to fill."""
        if type(self.stack[-1]) is not kind:
            raise MalformedPickle(f'fills a {type(self.stack[-1]).__name__} as if it were a {kind.__name__}')
        return self.stack[-1]

    def set_items(self, items: list):
        target = self.target(dict)
        if len(items) % 2:
            raise MalformedPickle('has a key without a value')
        for key, value in zip(items[::2], items[1::2]):
            target[_checked_key(key)] = value

    def add_to_list(self, items: list):
        self.target(list).extend(items)

    def add_to_set(self, items: list):
        self.target(set).update(_checked_key(item) for item in items)

    def push_name(self, module: object, name: object):
        path = f'{module}.{name}'
        if not (isinstance(module, str) and isinstance(name, str)) or path not in self.names:
            raise MalformedPickle(f'names {path!r}, which a snapshot has no use for (refused, nothing was executed)')
        self.stack.append(Name(path))

    def call(self):
        function, args = self.pop(2)
        if not isinstance(function, Name) or not isinstance(args, tuple):
            raise MalformedPickle('calls something that is not a function')
        self.stack.append({} if function.path in DICTS and not args else Call(function.path, args))

    def build(self):
        state, = self.pop(1)
        self.target(Call).state = state

    def persistent_id(self):
        if not self.persistent_ids:
            raise MalformedPickle('refers to objects outside of it')
        self.stack.append(Call('persistent_id', *self.pop(1)))


def _checked_key(key):
    """Keys that hash fast: a crafted nest of tuples would take for ever."""
    scalar = (str, int, float, type(None))
    if isinstance(key, scalar) or (isinstance(key, tuple) and len(key) <= MAX_KEY_LENGTH and all(isinstance(item, scalar) for item in key)):
        return key
    raise MalformedPickle(f'has a {type(key).__name__} for a key')


def _push(value: Callable) -> Callable:
    def handler(reader):
        item = value(reader)  # before `reader.stack` is looked up: reaching back to a mark replaces it
        reader.stack.append(item)
    return handler


def _put(index: Callable) -> Callable:
    def handler(reader):
        reader.memo[index(reader)] = reader.stack[-1]
    return handler


OPCODES: dict[bytes, Callable[[_Reader], None]] = {
    b'\x80': lambda r: r.take(1),                       # PROTO
    b'\x95': lambda r: r.take(8),                       # FRAME: a hint to readers, nothing more
    b'(': _Reader.mark,
    b'N': _push(lambda r: None),
    b'\x88': _push(lambda r: True),
    b'\x89': _push(lambda r: False),
    b'J': _push(lambda r: r.number('i')),
    b'K': _push(lambda r: r.number('B')),
    b'M': _push(lambda r: r.number('H')),
    b'\x8a': _push(lambda r: int.from_bytes(r.take(r.number('B')), 'little', signed=True)),
    b'G': _push(lambda r: struct.unpack('>d', r.take(8))[0]),
    b'X': _push(lambda r: r.text('I')),
    b'\x8c': _push(lambda r: r.text('B')),
    b'\x8d': _push(lambda r: r.text('Q')),
    b'C': _push(lambda r: r.span('B')),
    b'B': _push(lambda r: r.span('I')),
    b'\x8e': _push(lambda r: r.span('Q')),
    b']': _push(lambda r: []),
    b'}': _push(lambda r: {}),
    b')': _push(lambda r: ()),
    b'\x8f': _push(lambda r: set()),
    b't': _push(lambda r: tuple(r.pop_to_mark())),
    b'\x85': _push(lambda r: tuple(r.pop(1))),
    b'\x86': _push(lambda r: tuple(r.pop(2))),
    b'\x87': _push(lambda r: tuple(r.pop(3))),
    b'a': lambda r: r.add_to_list(r.pop(1)),
    b'e': lambda r: r.add_to_list(r.pop_to_mark()),
    b's': lambda r: r.set_items(r.pop(2)),
    b'u': lambda r: r.set_items(r.pop_to_mark()),
    b'\x90': lambda r: r.add_to_set(r.pop_to_mark()),
    b'h': _push(lambda r: r.memo[r.number('B')]),
    b'j': _push(lambda r: r.memo[r.number('I')]),
    b'q': _put(lambda r: r.number('B')),
    b'r': _put(lambda r: r.number('I')),
    b'\x94': _put(lambda r: len(r.memo)),
    b'c': lambda r: r.push_name(r.line(), r.line()),
    b'\x93': lambda r: r.push_name(*r.pop(2)),
    b'R': _Reader.call,
    b'\x81': _Reader.call,                              # NEWOBJ: the class is called with these arguments
    b'b': _Reader.build,
    b'Q': _Reader.persistent_id,
}


def read_pickle(file: BinaryIO, stop: int, names: frozenset[str] = SNAPSHOT_NAMES, persistent_ids: bool = False):
    """The pickle at the file's position, as dicts, lists, tuples, scalars, `Name`, `Call` and `Span`.

    Args:
        file: seekable binary file; afterwards at the byte after the pickle's end.
        stop: offset in the file that the pickle must not cross.
        names: globals, 'module.name', that it may name. Any other is refused.
        persistent_ids: whether it may hold `persistent_id` records (PyTorch's storages do).
    Raises: MalformedPickle.
    """
    try:
        tree = _Reader(file, stop, names, persistent_ids).run()
    except (IndexError, KeyError, UnicodeDecodeError) as error:
        raise MalformedPickle(f'is not a well-formed pickle ({type(error).__name__})') from error
    if file.tell() > stop:
        raise MalformedPickle('ends in the middle of a record (truncated?)')
    return tree

#----------------------------------------------------------------------------
# What the records mean.

MAX_PLAIN_VALUES, MAX_DEPTH = 1_000_000, 32     # of constructor arguments and metadata
MAX_ENTRIES, MAX_PREFIX = 100_000, 1000         # of a network: parameters, buffers and modules; length of a module's name


def plain(tree):
    """The tree as dicts with string keys, lists, tuples, strings, numbers, booleans and None; numpy scalars become Python numbers.

    Raises: MalformedPickle for anything else, for cycles, and for values that share parts so often that they are endless.
    """
    left = MAX_PLAIN_VALUES

    def convert(value, depth):
        nonlocal left
        left -= 1
        if left < 0 or depth > MAX_DEPTH:
            raise MalformedPickle('nests values without end')
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {key: convert(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return (tuple if isinstance(value, tuple) else list)(convert(item, depth + 1) for item in value)
        if isinstance(value, Call) and value.name in NUMPY_SCALARS:
            return _numpy_scalar(value)
        raise MalformedPickle(f'holds a {value.name if isinstance(value, Call) else type(value).__name__} where plain data is expected')

    return convert(tree, 0)


def _numpy_scalar(call: Call) -> bool | int | float:
    dtype, data = call.args if len(call.args) == 2 else (None, None)
    code = dtype.args[0] if isinstance(dtype, Call) and dtype.name == 'numpy.dtype' and dtype.args else None
    order = dtype.state[1] if code is not None and isinstance(dtype.state, tuple) and len(dtype.state) > 1 else None
    if not (isinstance(code, str) and re.fullmatch(r'b1|[iu][1248]|f[248]', code) and order in ('<', '|')
            and isinstance(data, Span) and data.data is not None and data.size == int(code[1])):
        raise MalformedPickle('holds a numpy scalar that is not a little-endian number')
    return np.frombuffer(data.data, f'<{code}')[0].item()


def persistent_object(node) -> tuple[str, dict] | None:
    """(class name, state) of a persistent object's record, None for anything else. Its source is not looked at."""
    if not isinstance(node, Call) or node.name != PERSISTENT_OBJECT:
        return None
    meta = node.args[0] if len(node.args) == 1 else None
    if not (isinstance(meta, dict) and isinstance(meta.get('class_name'), str) and isinstance(meta.get('state'), dict)):
        raise MalformedPickle('has a persistent object without class name or state')
    return meta['class_name'], meta['state']


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still in the file: where its storage lies, and its view of the storage, in elements."""
    storage: Span
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def stored_tensor(node) -> StoredTensor:
    """The tensor or parameter that a record stands for."""
    if isinstance(node, Call) and node.name in PARAMETERS and node.args:
        node = node.args[0]
    if not isinstance(node, Call) or node.name != TENSOR or len(node.args) < 4:
        raise MalformedPickle('has something else where a tensor is expected')
    storage, offset, shape, stride = node.args[:4]
    if not (isinstance(storage, Call) and storage.name == STORAGE and len(storage.args) == 1 and isinstance(storage.args[0], Span)):
        raise MalformedPickle('has a tensor without storage')
    if not (isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride) <= 16
            and all(type(number) is int and 0 <= number < 2 ** 48 for number in (offset, *shape, *stride))):
        raise MalformedPickle('has a tensor of impossible shape')
    return StoredTensor(storage.args[0], offset, shape, stride)


def module_tensors(node) -> dict[str, StoredTensor]:
    """Parameters and buffers of a module's record and the modules in it, by their dotted names."""
    found: dict[str, StoredTensor] = {}
    queue, entries = [('', node)], 0
    while queue:
        prefix, node = queue.pop()
        state = node.state if isinstance(node, Call) and node.name in CONTAINERS else (persistent_object(node) or (None, None))[1]
        tables = [state.get(kind) for kind in ('_parameters', '_buffers', '_modules')] if isinstance(state, dict) else [None]
        if not all(isinstance(table, dict) for table in tables):
            raise MalformedPickle(f'has something else where the module {prefix.rstrip(".") or "at the top"!r} is expected')
        entries += sum(len(table) for table in tables)
        if entries > MAX_ENTRIES or len(prefix) > MAX_PREFIX:
            raise MalformedPickle('nests modules without end')
        for name, value in [*tables[0].items(), *tables[1].items()]:
            if value is not None:
                found[f'{prefix}{name}'] = stored_tensor(value)
        queue.extend((f'{prefix}{name}.', child) for name, child in tables[2].items() if child is not None)
    return found


def _storage_layout(file: BinaryIO, span: Span) -> tuple[torch.dtype, int]:
    """(dtype, number of elements) of a storage in PyTorch's legacy format; leaves the file at its first byte.

    The format: five pickles (magic number, version, system, the storage's description, its key), the number of elements, the data.
    """
    stop = span.start + span.size
    file.seek(span.start)
    magic, _version, system, description, _keys = (
        read_pickle(file, stop, frozenset(STORAGE_TYPES), persistent_ids=True) for _ in range(5))
    if magic != 0x1950a86a20f9469cfc6c or not isinstance(system, dict) or system.get('little_endian') is not True:
        raise MalformedPickle('has a tensor that is not in the little-endian format of PyTorch')
    record = description.args if isinstance(description, Call) else None
    if not isinstance(record, tuple) or len(record) not in (5, 6) or not isinstance(record[1], Name):
        raise MalformedPickle('has a tensor of unknown type')
    dtype, numel = STORAGE_TYPES[record[1].path], int.from_bytes(file.read(8), 'little')
    if file.tell() + numel * dtype.itemsize != stop:
        raise MalformedPickle('has a tensor whose length is not what it claims')
    return dtype, numel


def read_tensor(file: BinaryIO, tensor: StoredTensor) -> torch.Tensor:
    """Reads a stored tensor into memory, on the CPU, with its own dtype.

    Raises: MalformedPickle where the view would reach beyond the storage or repeat elements of it.
    """
    dtype, numel = _storage_layout(file, tensor.storage)
    count = math.prod(tensor.shape)
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride))
    if count > numel or (count and last >= numel):
        raise MalformedPickle(f'claims a tensor of shape {list(tensor.shape)} that does not fit into its storage of {numel:,} elements')
    data = torch.empty(numel * dtype.itemsize, dtype=torch.uint8)
    if file.readinto(data.numpy()) != len(data):
        raise MalformedPickle('ends in the middle of a tensor (truncated?)')
    view = data.view(dtype).as_strided(tensor.shape, tensor.stride, tensor.offset)
    return view if count == numel else view.clone()
