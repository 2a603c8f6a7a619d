"""Reads pickles as data. Nothing is imported, called or executed, whatever the file says.

The reader knows the opcodes that Python's binary protocols 2 to 5 emit, and the first ones that one meets in protocol 0, so that what such a file
names is told. It turns names and calls into inert records:
`Name('collections.OrderedDict')`, `Call(name, args, state)`. Long byte strings are not read: a `Span` says where they lie, so that
tensors can be read later, straight into their memory, or not at all. Opcodes and names outside the tables are refused.

Names are never looked up, so none of them could do anything. They are in a table all the same, because a file that names anything
else was not written to hold a network, and its user should know. What the network does not need (a loss, an encoder, attributes
that someone added) is skipped, if it is data: so the table has the types of data that Python, NumPy and PyTorch have at hand, and what
these pickle them with. Functions that anyone would call for their effect, or to reach something else, have no place in it.

Time and memory are at most proportional to the file's length, and its records are limited in number.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import torch


class MalformedPickle(ValueError):
    """The file is damaged, hostile, or of a kind that this reader does not know. The message completes 'it ...'."""


class RefusedName(MalformedPickle):
    """The file names something that has no place in it."""


@dataclass(frozen=True, eq=False, slots=True)
class Name:
    """A global that the file names."""

    path: str


@dataclass(eq=False, slots=True)
class Call:
    """An object that the file would have built by calling `name`, and the state it would have given to it."""

    name: str
    args: tuple
    state: object = None


@dataclass(frozen=True, eq=False, slots=True)
class Span:
    """A byte string (or an integer of more than 255 bytes) and its place in the file; a long one is left there."""

    start: int
    size: int
    data: bytes | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Key:
    """A key that is no string. It is told from others by identity: a crafted one could take for ever to hash, or collide with many."""

    value: object


PERSISTENT_OBJECT = 'torch_utils.persistence._reconstruct_persistent_obj'
PARAMETERS = {'torch._utils._rebuild_parameter', 'torch._utils._rebuild_parameter_with_state'}
TENSOR, TYPED_TENSOR, STORAGE = (
    'torch._utils._rebuild_tensor_v2',
    'torch._utils._rebuild_tensor_v3',
    'torch.storage._load_from_bytes',
)
TENSOR_WITH_ATTRIBUTES = 'torch._tensor._rebuild_from_type_v2'
TENSORS = PARAMETERS | {TENSOR, TYPED_TENSOR, TENSOR_WITH_ATTRIBUTES}
PERSISTENT_ID = 'persistent_id'  # what references to what is outside of the pickle are called here
ENCODED_BYTES = '_codecs.encode'  # how protocol 2, which has no bytes, writes them: as text in Latin-1
DTYPES = {
    'Float': torch.float32,
    'Double': torch.float64,
    'Half': torch.float16,
    'BFloat16': torch.bfloat16,
    'Long': torch.int64,
    'Int': torch.int32,
    'Short': torch.int16,
    'Char': torch.int8,
    'Byte': torch.uint8,
}
STORAGE_TYPES = {f'torch.{name}Storage': dtype for name, dtype in DTYPES.items()}
STORAGE_TYPES |= {
    f'torch.{name}': torch.uint8
    for name in ('UntypedStorage', 'storage.UntypedStorage', 'storage._UntypedStorage')
}


def _names(*modules: str, of: str) -> set[str]:
    return {f'{module}.{name}' for module in modules for name in of.split()}


DICTS = {'collections.OrderedDict', 'dnnlib.util.EasyDict'}
CONTAINERS = _names('torch.nn.modules.container', of='ModuleDict ModuleList Sequential')
NUMPY_SCALARS = _names('numpy.core.multiarray', 'numpy._core.multiarray', of='scalar')
NUMPY_TYPES = _names(
    'numpy',
    of='ndarray dtype bool bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64',
)
NUMPY_ARRAYS = _names('numpy.core', 'numpy._core', of='multiarray._reconstruct numeric._frombuffer')
TORCH_TYPES = _names('torch', of='Tensor Size device nn.parameter.Parameter')
TORCH_DTYPES = {str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)}
LAYERS = {
    f'{value.__module__}.{value.__name__}' for value in vars(torch.nn).values() if isinstance(value, type)
}  # in a loss: a feature network
PYTHON_TYPES = (
    _names(
        'builtins',
        '__builtin__',
        of='object bool int float complex str bytes bytearray list tuple dict set frozenset range slice',
    )
    | _names('__builtin__', of='long unicode xrange')
    | _names('collections', of='defaultdict deque Counter')
    | _names('copyreg', 'copy_reg', of='_reconstructor')
    | _names('datetime', of='date datetime time timedelta timezone')
    | {'argparse.Namespace', 'types.SimpleNamespace'}
    | _names('pathlib', 'pathlib._local', of='PosixPath WindowsPath PurePosixPath PureWindowsPath')
)
SNAPSHOT_NAMES = frozenset(
    {PERSISTENT_OBJECT, TENSOR, TYPED_TENSOR, TENSOR_WITH_ATTRIBUTES, STORAGE, ENCODED_BYTES}.union(
        PARAMETERS,
        DICTS,
        CONTAINERS,
        NUMPY_SCALARS,
        NUMPY_TYPES,
        NUMPY_ARRAYS,
        TORCH_TYPES,
        TORCH_DTYPES,
        LAYERS,
        PYTHON_TYPES,
    )
)

# ----------------------------------------------------------------------------
# The machine. A handler is a function of the reader; it takes its operands from the file and the stack.

MAX_RECORDS = 4_000_000  # opcodes; a network of a thousand tensors has about 100,000
WINDOW = 8192  # bytes that are read from the file at a time


class Reader:
    """Reads one pickle after the other from file[start:stop]. See `read_pickle`."""

    def __init__(self, file: BinaryIO, start: int, stop: int, names: frozenset[str], persistent_ids: bool):
        self.file, self.stop, self.names, self.persistent_ids = file, stop, names, persistent_ids
        self.window, self.at, self.start = (
            b'',
            0,
            start,
        )  # bytes of the file, the next one to read, the offset of the first

    def next_pickle(self):
        """What the pickle at hand holds. Raises: MalformedPickle."""
        self.stack, self.marked, self.memo = [], [], {}
        try:
            return self._run()
        except (IndexError, KeyError, UnicodeDecodeError) as error:
            raise MalformedPickle(f'is not a well-formed pickle ({type(error).__name__})') from error

    def _run(self):
        for _ in range(MAX_RECORDS):
            if self.at == len(self.window):
                self.refill(1)
            opcode = self.window[self.at]
            self.at += 1
            if opcode == STOP:
                return self.stack.pop()
            if opcode not in OPCODES:
                raise MalformedPickle(f'has opcode 0x{opcode:02x}, which no snapshot uses')
            OPCODES[opcode](self)
        raise MalformedPickle(f'has more than {MAX_RECORDS:,} records')

    def position(self) -> int:
        return self.start + self.at

    def refill(self, size: int):
        """Has at least `size` bytes in the window. Nothing is allocated beyond what the file has."""
        self.move_to(self.position())
        self.file.seek(self.start)
        self.window = self.file.read(min(max(size, WINDOW), self.stop - self.start))
        if len(self.window) < size:
            raise MalformedPickle('ends in the middle of a record (truncated?): copy or download it again')

    def move_to(self, position: int):
        self.window, self.at, self.start = b'', 0, position

    def take(self, size: int) -> bytes:
        if self.at + size > len(self.window):
            self.refill(size)
        self.at += size
        return self.window[self.at - size : self.at]

    def byte(self) -> int:
        if self.at == len(self.window):
            self.refill(1)
        self.at += 1
        return self.window[self.at - 1]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), 'little')

    def text(self, size: int, encoding: str = 'utf-8') -> str:
        return self.take(size).decode(encoding, 'surrogatepass')

    def line(self) -> str:
        if b'\n' not in self.window[self.at : self.at + 256]:
            self.refill(1)
        end = self.window.find(b'\n', self.at, self.at + 256)
        if end < 0:
            raise MalformedPickle('has a name without an end')
        return self.take(end + 1 - self.at)[:-1].decode()

    def span(self, size: int) -> Span:
        start = self.position()
        if start + size > self.stop:
            raise MalformedPickle('ends in the middle of a tensor (truncated?)')
        if size < 256:
            return Span(start, size, self.take(size))
        self.move_to(start + size)
        return Span(start, size)

    def mark(self):
        self.marked.append(self.stack)
        self.stack = []

    def pop_to_mark(self) -> list:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def replace_mark(self, make: Callable[[list], object]):
        item = make(self.pop_to_mark())
        self.stack.append(item)  # looked up only now: the mark's stack is another one

    def memoize(self):
        self.memo[len(self.memo)] = self.stack[-1]

    def put(self, index: int):
        self.memo[index] = self.stack[-1]

    def pop(self, count: int) -> list:
        if len(self.stack) < count:
            raise MalformedPickle('takes more values than it gives')
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def target(self, *kinds: type):
        """The value on top of the stack, which the current opcode is about to fill."""
        if type(self.stack[-1]) not in kinds:
            raise MalformedPickle(
                f'fills a {type(self.stack[-1]).__name__} as if it were a {kinds[0].__name__}'
            )
        return self.stack[-1]

    def set_items(self, items: list):
        target = self.target(dict, Call)
        if len(items) % 2:
            raise MalformedPickle('has a key without a value')
        if isinstance(target, dict):  # no one asks for the items of other objects
            target.update(
                (key if isinstance(key, str) else Key(key), value)
                for key, value in zip(items[::2], items[1::2])
            )

    def add_to_list(self, items: list):
        target = self.target(list, Call)
        if isinstance(target, list):
            target.extend(items)

    def push_name(self, module: object, name: object):
        if not (
            isinstance(module, str) and isinstance(name, str) and (path := f'{module}.{name}') in self.names
        ):
            refused = (
                repr(path)
                if isinstance(module, str) and isinstance(name, str)
                else 'something by what is no text'
            )
            raise RefusedName(
                f'names {refused}, which such a file has no use for (refused, nothing was executed)'
            )
        self.stack.append(Name(path))

    def call(self):
        args, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Name) or not isinstance(args, tuple):
            raise MalformedPickle('calls something that is not a function')
        self.stack.append({} if function.path in DICTS and not args else Call(function.path, args))

    def build(self):
        (state,) = self.pop(1)
        target = self.target(
            Call, dict
        )  # a dict of a class of its own can have attributes: those of a state dict, for example
        if isinstance(target, Call):
            target.state = state

    def short_integer(self):
        line = self.line()
        if not re.fullmatch(r'-?[0-9]{1,19}', line):
            raise MalformedPickle('has a number that is none')
        self.stack.append(
            {'00': False, '01': True}.get(line, int(line))
        )  # Python 2's booleans, which NumPy wrote with protocol 2 too

    def push_dict(self):
        items = self.pop_to_mark()
        self.stack.append({})
        self.set_items(items)

    def persistent_id(self):
        if not self.persistent_ids:
            raise MalformedPickle('refers to objects outside of it')
        self.stack.append(Call(PERSISTENT_ID, *self.pop(1)))


STOP = ord('.')
OPCODES: dict[int, Callable[[Reader], object]] = {
    code[0]: handler
    for code, handler in {
        b'\x80': lambda r: r.take(1),  # PROTO
        b'\x95': lambda r: r.take(8),  # FRAME: a hint to readers, nothing more
        b'(': Reader.mark,
        b'0': lambda r: r.pop(1),
        b'1': Reader.pop_to_mark,  # both end recursive tuples
        b'N': lambda r: r.stack.append(None),
        b'\x88': lambda r: r.stack.append(True),
        b'\x89': lambda r: r.stack.append(False),
        b'J': lambda r: r.stack.append(int.from_bytes(r.take(4), 'little', signed=True)),
        b'K': lambda r: r.stack.append(r.byte()),
        b'M': lambda r: r.stack.append(r.number(2)),
        b'\x8a': lambda r: r.stack.append(int.from_bytes(r.take(r.byte()), 'little', signed=True)),
        b'\x8b': lambda r: r.stack.append(r.span(r.number(4))),  # LONG4
        b'G': lambda r: r.stack.append(struct.unpack('>d', r.take(8))[0]),
        b'U': lambda r: r.stack.append(
            r.text(r.byte(), 'latin-1')
        ),  # SHORT_BINSTRING and BINSTRING: Python 2's
        b'T': lambda r: r.stack.append(r.text(r.number(4), 'latin-1')),
        b'X': lambda r: r.stack.append(r.text(r.number(4))),
        b'\x8c': lambda r: r.stack.append(r.text(r.byte())),
        b'\x8d': lambda r: r.stack.append(r.text(r.number(8))),
        b'C': lambda r: r.stack.append(r.span(r.byte())),
        b'B': lambda r: r.stack.append(r.span(r.number(4))),
        b'\x8e': lambda r: r.stack.append(r.span(r.number(8))),
        b'\x96': lambda r: r.stack.append(r.span(r.number(8))),  # BYTEARRAY8
        b']': lambda r: r.stack.append([]),
        b'}': lambda r: r.stack.append({}),
        b')': lambda r: r.stack.append(()),
        b'\x8f': lambda r: r.stack.append(Call('builtins.set', ())),
        b'\x91': lambda r: r.replace_mark(lambda items: Call('builtins.frozenset', (items,))),
        b'd': Reader.push_dict,  # this one and the next three: protocol 0, short lines only
        b'I': Reader.short_integer,
        b'V': lambda r: r.stack.append(r.line()),
        b'p': lambda r: r.memo.__setitem__(r.line(), r.stack[-1]),
        b'l': lambda r: r.replace_mark(list),
        b't': lambda r: r.replace_mark(tuple),
        b'\x85': lambda r: r.stack.append(tuple(r.pop(1))),
        b'\x86': lambda r: r.stack.append(tuple(r.pop(2))),
        b'\x87': lambda r: r.stack.append(tuple(r.pop(3))),
        b'a': lambda r: r.add_to_list(r.pop(1)),
        b'e': lambda r: r.add_to_list(r.pop_to_mark()),
        b'\x90': lambda r: r.add_to_list(r.pop_to_mark()),  # ADDITEMS
        b's': lambda r: r.set_items(r.pop(2)),
        b'u': lambda r: r.set_items(r.pop_to_mark()),
        b'h': lambda r: r.stack.append(r.memo[r.byte()]),
        b'j': lambda r: r.stack.append(r.memo[r.number(4)]),
        b'q': lambda r: r.put(r.byte()),
        b'r': lambda r: r.put(r.number(4)),
        b'\x94': Reader.memoize,
        b'c': lambda r: r.push_name(r.line(), r.line()),
        b'\x93': lambda r: r.push_name(*r.pop(2)),
        b'R': Reader.call,
        b'\x81': Reader.call,  # NEWOBJ: the class is called with these arguments
        b'\x92': lambda r: (r.pop(1), r.call()),  # NEWOBJ_EX: and keywords
        b'b': Reader.build,
        b'Q': Reader.persistent_id,
    }.items()
}


def read_pickle(
    file: BinaryIO, stop: int, names: frozenset[str] = SNAPSHOT_NAMES, persistent_ids: bool = False
):
    """The pickle at the file's position, as dicts, lists, tuples, scalars, `Name`, `Call` and `Span`.

    Args:
        file: seekable binary file; afterwards at the byte after the pickle's end.
        stop: offset in the file that the pickle must not cross.
        names: globals, 'module.name', that it may name. Any other is refused.
        persistent_ids: whether it may hold `persistent_id` records (PyTorch's storages do).
    Raises: MalformedPickle.
    """
    reader = Reader(file, file.tell(), stop, names, persistent_ids)
    tree = reader.next_pickle()
    file.seek(reader.position())
    return tree


# ----------------------------------------------------------------------------
# What the records mean.

MAX_PLAIN_VALUES, MAX_DEPTH = 1_000_000, 32  # of constructor arguments and metadata


class NotPlain(MalformedPickle):
    """The value is something else than plain data."""


def plain(tree, leave_out: bool = False):
    """The tree as dicts with string keys, lists, tuples, strings, numbers, booleans and None; numpy scalars become Python numbers.

    Args:
        leave_out: whether entries of dicts that hold anything else are left out.
    Raises: NotPlain for anything else; MalformedPickle for cycles, and for values that share parts so often that they are endless.
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
        if isinstance(value, dict) and (leave_out or all(isinstance(key, str) for key in value)):
            return dict(entries(value, depth + 1))
        if isinstance(value, (list, tuple)):
            return (tuple if isinstance(value, tuple) else list)(convert(item, depth + 1) for item in value)
        if isinstance(value, Call) and value.name in NUMPY_SCALARS:
            return _numpy_scalar(value)
        raise NotPlain(
            f'holds a {value.name if isinstance(value, Call) else type(value).__name__} where plain data is expected'
        )

    def entries(items, depth):
        for key, item in items.items():
            if isinstance(key, str):
                try:
                    yield key, convert(item, depth)
                except NotPlain:
                    if not leave_out:
                        raise

    return convert(tree, 0)


def _numpy_scalar(call: Call) -> bool | int | float:
    dtype, data = call.args if len(call.args) == 2 else (None, None)
    code = dtype.args[0] if isinstance(dtype, Call) and dtype.name == 'numpy.dtype' and dtype.args else None
    order = (
        dtype.state[1]
        if code is not None and isinstance(dtype.state, tuple) and len(dtype.state) > 1
        else None
    )
    data = data.data if isinstance(data, Span) else latin1(text_of_bytes(data) or '')
    if not (
        isinstance(code, str)
        and re.fullmatch(r'b1|[iu][1248]|f[248]', code)
        and order in ('<', '|')
        and data is not None
        and len(data) == int(code[1])
    ):
        raise NotPlain('holds a numpy scalar that is not a little-endian number')
    return np.frombuffer(data, f'<{code}')[0].item()


def text_of_bytes(node) -> str | None:
    """The text by which protocol 2 and Python 2 write bytes; None for anything else."""
    if isinstance(node, Call) and node.name == ENCODED_BYTES and node.args[1:] == ('latin1',):
        node = node.args[0]
    return node if isinstance(node, str) else None


def latin1(text: str) -> bytes:
    """The bytes that such a text stands for. Raises: MalformedPickle where there are none."""
    try:
        return text.encode('latin-1')
    except UnicodeEncodeError as error:
        raise MalformedPickle('has text in the place of bytes') from error


def persistent_object(node) -> tuple[str, dict] | None:
    """(class name, state) of a persistent object's record, None for anything else. Its source is not looked at."""
    meta = (
        node.args[0]
        if isinstance(node, Call) and node.name == PERSISTENT_OBJECT and len(node.args) == 1
        else None
    )
    if (
        isinstance(meta, dict)
        and isinstance(meta.get('class_name'), str)
        and isinstance(meta.get('state'), dict)
    ):
        return meta['class_name'], meta['state']
    return None
