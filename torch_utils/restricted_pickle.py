"""Read pickles as data. Nothing is imported, called or executed, whatever the file contains.

This uses Python's own unpickler, in its Python version, whose memo is a dict; the memo of the C version is an
array as long as the largest index in the file. What it would look up, call or fill is replaced by inert
records: `Name('collections.OrderedDict')`, `Call(name, args, state)`. Long byte strings are not read: a
`Span` gives their position, so that tensors can be read later, directly into their memory, or not at all.
Opcodes and names outside the tables are refused.

Names are never looked up, so none could do any harm. They are still limited to a table, because a file with
any other name was not written to hold a network, and its user should know. Parts that the network does not
need (a loss, an encoder, added attributes) are skipped if they are data, so the table has the data types of
Python, NumPy and PyTorch, and the functions that pickle them. It has no functions with effects or access to
others.

Time and memory are at most proportional to the file's length, and the number of records is limited.
"""

from __future__ import annotations

import functools
import pickle
import re
import struct
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import torch

from dnnlib.limits import PICKLED_TEXT
from dnnlib.util import without_garbage_collection


class MalformedPickle(ValueError):
    """The file is damaged, hostile, or of an unknown kind. The message completes 'it ...'."""


class RefusedName(MalformedPickle):
    """The file names something outside the table."""


@dataclass(frozen=True, eq=False, slots=True)
class Name:
    """A global that the file names."""

    path: str


@dataclass(eq=False, slots=True)
class Call:
    """An object that the file would have built by calling `name`, and the state that it would have set."""

    name: str
    args: tuple
    state: object = None


@dataclass(frozen=True, eq=False, slots=True)
class Span:
    """A byte string, or a long integer, and its position in the file; from 256 bytes on, it is not read."""

    start: int
    size: int
    data: bytes | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Key:
    """A key other than a string, compared by identity: a crafted one could hash forever, or collide."""

    value: object


PERSISTENT_OBJECT = 'torch_utils.persistence._reconstruct_persistent_obj'
PARAMETERS = {'torch._utils._rebuild_parameter', 'torch._utils._rebuild_parameter_with_state'}
TENSOR, TYPED_TENSOR = 'torch._utils._rebuild_tensor_v2', 'torch._utils._rebuild_tensor_v3'
TENSOR_WITH_ATTRIBUTES = 'torch._tensor._rebuild_from_type_v2'
TENSORS = PARAMETERS | {TENSOR, TYPED_TENSOR, TENSOR_WITH_ATTRIBUTES}
STORAGE = 'torch.storage._load_from_bytes'
PERSISTENT_ID = 'persistent_id'  # our name for references to objects outside of the pickle
ENCODED_BYTES = '_codecs.encode'  # protocol 2, which has no bytes, encodes them as Latin-1 text
# fmt: off
DTYPES = {
    'Float': torch.float32, 'Double': torch.float64, 'Half': torch.float16, 'BFloat16': torch.bfloat16,
    'Long': torch.int64, 'Int': torch.int32, 'Short': torch.int16, 'Char': torch.int8, 'Byte': torch.uint8,
}
# fmt: on
STORAGE_TYPES = {f'torch.{name}Storage': dtype for name, dtype in DTYPES.items()}
STORAGE_TYPES |= dict.fromkeys(
    ('torch.UntypedStorage', 'torch.storage.UntypedStorage', 'torch.storage._UntypedStorage'), torch.uint8
)


def _names(table: str) -> set[str]:
    """Dotted names from lines of `module or module: name name ...`."""
    lines = [line.split(':') for line in table.strip().splitlines()]
    return {
        f'{module.strip()}.{name}'
        for modules, names in lines
        for module in modules.split(' or ')
        for name in names.split()
    }


DICTS = {'collections.OrderedDict', 'dnnlib.util.EasyDict'}
CONTAINERS = _names('torch.nn.modules.container: ModuleDict ModuleList Sequential')
LAYERS = {f'{kind.__module__}.{kind.__name__}' for kind in vars(torch.nn).values() if isinstance(kind, type)}
TORCH_DTYPES = {str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)}
NUMPY_SCALARS = _names('numpy.core.multiarray or numpy._core.multiarray: scalar')
NUMPY_ARRAYS = _names('numpy.core or numpy._core: multiarray._reconstruct numeric._frombuffer')
NUMPY_TYPES = _names("""
    numpy: ndarray dtype bool bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64
""")
# Found in options, metadata and optimizer states. As names they do nothing.
OTHER_TYPES = _names("""
    torch: Tensor Size device nn.parameter.Parameter
    builtins or __builtin__: object bool int float complex str bytes bytearray list tuple dict set frozenset
    builtins or __builtin__: range slice
    __builtin__: long unicode xrange
    collections: defaultdict deque Counter
    copyreg or copy_reg: _reconstructor
    datetime: date datetime time timedelta timezone
    argparse: Namespace
    types: SimpleNamespace
    pathlib or pathlib._local: PosixPath WindowsPath PurePosixPath PureWindowsPath
""")
SNAPSHOT_NAMES = frozenset(
    {PERSISTENT_OBJECT, STORAGE, ENCODED_BYTES}
    | (TENSORS | CONTAINERS | LAYERS | TORCH_DTYPES)  # layers: of a feature network, in a loss
    | (NUMPY_SCALARS | NUMPY_ARRAYS | NUMPY_TYPES)
    | (DICTS | OTHER_TYPES)
)

# ----------------------------------------------------------------------------
# Reading.

MALFORMED = (pickle.UnpicklingError, EOFError, LookupError, ValueError, ArithmeticError, struct.error)
CUT_OFF = 'ends in the middle of a record (truncated?): copy or download it again'
MAX_RECORDS = 4_000_000  # reads from the file; a network of a thousand tensors takes about 200,000


class _Source:
    """The bytes of a file up to `stop`, for an unpickler: no read exceeds what the file has."""

    def __init__(self, file: BinaryIO, stop: int):
        self.file, self.stop, self.position, self.records = file, stop, file.tell(), 0

    def read(self, size: int) -> bytes:
        self.records += 1
        self.position += size
        if self.position > self.stop:
            raise MalformedPickle(CUT_OFF)
        if self.records > MAX_RECORDS:
            raise MalformedPickle(f'has more than {MAX_RECORDS:,} records')
        if size > PICKLED_TEXT:
            raise MalformedPickle(f'has a text of {size:,} bytes')
        return self.file.read(size)

    def readline(self) -> bytes:
        # A longer line is no name, and an endless one is not read.
        line = self.file.readline(256)
        self.position += len(line)
        if not line.endswith(b'\n'):
            raise MalformedPickle('has a name without an end')
        return line

    def span(self, size: int) -> Span:
        """A byte string that begins here; one of less than 256 bytes is read."""
        # Short strings are values such as numbers; long ones are tensors.
        if size < 256:
            return Span(self.position, size, self.read(size))
        self.position += size
        if self.position > self.stop:
            raise MalformedPickle(CUT_OFF)
        self.file.seek(self.position)
        return Span(self.position - size, size)


class _Opcodes(dict):
    """Handlers by opcode."""

    def __missing__(self, code: int):
        raise MalformedPickle(f'has opcode 0x{code:02x}, which no snapshot uses')


# Opcodes of protocols 2 to 5, and the first ones of protocol 0, so that messages tell what such a file names.
OPCODES = """
    PROTO FRAME MARK STOP POP POP_MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT
    SHORT_BINSTRING BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
    SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8
    EMPTY_LIST EMPTY_DICT EMPTY_TUPLE EMPTY_SET LIST DICT TUPLE TUPLE1 TUPLE2 TUPLE3 FROZENSET
    APPEND APPENDS ADDITEMS SETITEM SETITEMS BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE
    GLOBAL STACK_GLOBAL REDUCE NEWOBJ NEWOBJ_EX BUILD BINPERSID
"""


class _Unpickler(pickle._Unpickler):
    """Python's unpickler, with records instead of what it would look up, call, fill or hash."""

    def __init__(self, file: BinaryIO, stop: int, names: frozenset[str], persistent_ids: bool):
        self.source, self.names, self.persistent_ids = _Source(file, stop), names, persistent_ids
        # Latin-1 has a character for every byte, so no string of Python 2 fails to decode.
        super().__init__(self.source, encoding='latin-1')

    def find_class(self, module: str, name: str) -> Name:
        if f'{module}.{name}' not in self.names:
            raise _refused(repr(f'{module}.{name}'))
        # The name itself: nothing is imported.
        return Name(f'{module}.{name}')

    def load_stack_global(self):
        if not all(isinstance(text, str) for text in self.stack[-2:]):
            raise _refused('something by what is not text')
        super().load_stack_global()

    def persistent_load(self, pid) -> Call:
        if not self.persistent_ids:
            raise MalformedPickle('refers to objects outside of it')
        return Call(PERSISTENT_ID, pid)

    def load_frame(self):
        self.read(8)  # only a hint to readers

    # Byte strings, and integers that would take minutes to print.

    def load_span(self, width: int):
        self.append(self.source.span(int.from_bytes(self.read(width), 'little')))

    load_short_binbytes = functools.partialmethod(load_span, 1)
    load_binbytes = functools.partialmethod(load_span, 4)
    load_binbytes8 = functools.partialmethod(load_span, 8)
    load_long4, load_bytearray8 = load_binbytes, load_binbytes8

    # Calls.

    def load_reduce(self):
        args, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Name) or not isinstance(args, tuple):
            raise MalformedPickle('calls something that is not a function')
        # Later opcodes fill dicts, which therefore are real ones; other calls stay records.
        self.append({} if function.path in DICTS and not args else Call(function.path, args))

    load_newobj = load_reduce  # the class is called with these arguments

    def load_newobj_ex(self):
        self.stack.pop()  # keywords
        self.load_reduce()

    def load_build(self):
        state = self.stack.pop()
        target = self.target(Call, dict)  # a state dict has attributes, which are ignored
        if isinstance(target, Call):
            target.state = state

    # Lists, dicts and sets. Only keys that are text are hashed.

    def target(self, *kinds: type):
        """The value on top of the stack, which the current opcode fills."""
        target = self.stack[-1]
        if type(target) not in kinds:
            raise MalformedPickle(f'fills a {type(target).__name__} as if it were a {kinds[0].__name__}')
        return target

    def extend(self, items: list):
        target = self.target(list, Call)
        if isinstance(target, list):
            target.extend(items)

    def update(self, items: list):
        target = self.target(dict, Call)
        if len(items) % 2:
            raise MalformedPickle('has a key without a value')
        if isinstance(target, dict):  # items of other objects are not needed
            pairs = zip(items[::2], items[1::2])
            target.update((key if isinstance(key, str) else Key(key), value) for key, value in pairs)

    def load_append(self):
        self.extend([self.stack.pop()])

    def load_appends(self):
        self.extend(self.pop_mark())

    load_additems = load_appends

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self.update([key, value])

    def load_setitems(self):
        self.update(self.pop_mark())

    def load_dict(self):
        items = self.pop_mark()
        self.append({})
        self.update(items)

    def load_empty_set(self):
        self.append(Call('builtins.set', ()))

    def load_frozenset(self):
        items = self.pop_mark()
        self.append(Call('builtins.frozenset', (items,)))

    dispatch = _Opcodes()


# The listed opcodes only, by the methods above or Python's own.
for _code in (getattr(pickle, name)[0] for name in OPCODES.split()):
    _Unpickler.dispatch[_code] = getattr(_Unpickler, pickle._Unpickler.dispatch[_code].__name__)


def _refused(what: str) -> RefusedName:
    return RefusedName(f'names {what}, which such a file has no use for (refused, nothing was executed)')


def read_pickle(
    file: BinaryIO, stop: int, names: frozenset[str] = SNAPSHOT_NAMES, persistent_ids: bool = False
):
    """Read the pickle at the file's position, as dicts, lists, tuples, scalars, `Name`, `Call` and `Span`.

    Args:
        file: seekable binary file; afterwards at the byte after the pickle's end.
        stop: offset in the file that the pickle must not cross.
        names: allowed globals, 'module.name'.
        persistent_ids: whether `persistent_id` records are allowed, which refer to PyTorch's storages.
    Raises: MalformedPickle.
    """
    try:
        with without_garbage_collection():  # halves the time of a million records
            return _Unpickler(file, stop, names, persistent_ids).load()
    except MalformedPickle:
        raise
    except MALFORMED as error:
        raise MalformedPickle(f'is not a well-formed pickle ({type(error).__name__})') from error


# ----------------------------------------------------------------------------
# From records to values.

MAX_PLAIN_VALUES, MAX_DEPTH = 1_000_000, 32  # of constructor arguments and metadata


class NotPlain(MalformedPickle):
    """The value is not plain data."""


def plain(tree, leave_out: bool = False):
    """The tree as dicts with string keys, lists, tuples, strings, numbers, booleans and None.

    NumPy scalars become Python numbers.

    Args:
        leave_out: leave out entries of dicts that hold anything else.
    Raises: NotPlain for anything else; MalformedPickle for cycles, and for values that share parts endlessly.
    """
    # Shared parts are copied for each reference: their number is limited.
    left = MAX_PLAIN_VALUES

    def convert(value, depth):
        nonlocal left
        left -= 1
        if left < 0 or depth > MAX_DEPTH:
            raise MalformedPickle('nests values without end')
        if isinstance(value, np.generic):
            value = value.item()
        # Exact types: subclasses may carry other things.
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, dict) and (leave_out or all(isinstance(key, str) for key in value)):
            return dict(entries(value, depth + 1))
        if isinstance(value, (list, tuple)):
            return (tuple if isinstance(value, tuple) else list)(convert(item, depth + 1) for item in value)
        if isinstance(value, Call) and value.name in NUMPY_SCALARS:
            return _numpy_scalar(value)
        kind = value.name if isinstance(value, Call) else type(value).__name__
        raise NotPlain(f'holds a {kind} where plain data is expected')

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
    """The number of scalar(dtype(code, ...), bytes), whose dtype has the state (version, byte order, ...)."""
    match call.args:
        case (Call(name='numpy.dtype', args=(str(code), *_), state=(_, '<' | '|', *_)), data) if re.fullmatch(
            r'b1|[iu][1248]|f[248]', code
        ):
            data = data.data if isinstance(data, Span) else latin1(text_of_bytes(data) or '')
            if data is not None and len(data) == int(code[1]):
                return np.frombuffer(data, f'<{code}')[0].item()
    raise NotPlain('holds a numpy scalar that is not a little-endian number')


def text_of_bytes(node) -> str | None:
    """The text by which protocol 2 and Python 2 write bytes; None for anything else."""
    if isinstance(node, Call) and node.name == ENCODED_BYTES and node.args[1:] == ('latin1',):
        node = node.args[0]
    return node if isinstance(node, str) else None


def latin1(text: str) -> bytes:
    """The bytes of such a text. Raises: MalformedPickle for other text."""
    try:
        return text.encode('latin-1')
    except UnicodeEncodeError as error:
        raise MalformedPickle('has text in place of bytes') from error


def persistent_object(node) -> tuple[str, dict] | None:
    """(class name, state) of a persistent object's record; None for anything else. The source is ignored."""
    match node:
        case Call(name=name, args=({'class_name': str(class_name), 'state': dict(state)},)) if (
            name == PERSISTENT_OBJECT
        ):
            return class_name, state
    return None
