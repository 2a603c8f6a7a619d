"""Read files of `torch.save` as data: nothing in them is imported, called or executed.

Since PyTorch 1.6 such a file is a zip archive without compression: `<name>/data.pkl` holds everything but the
tensors' elements, and `<name>/data/<key>` the elements of each storage. Before, it was five pickles (magic
number, version, system, the contents, the storages' keys) and, for each key, the number of elements and the
elements. Sizes in the file are compared with its length before memory is allocated.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import torch

from dnnlib.archives import BoundedFile, member_start
from dnnlib.limits import SAVED_STRUCTURE, UNREADABLE, ZIP_DIRECTORY, check_size
from dnnlib.text import printable
from torch_utils import restricted_pickle
from torch_utils.restricted_pickle import (
    Call,
    Key,
    MalformedPickle,
    Name,
    Span,
    latin1,
    read_pickle,
    text_of_bytes,
)
from torch_utils.sealed_file import DamagedFile, Part, find_seal, read_parts
from torch_utils.stored_tensors import MAGIC, Elements, Storages, stored_tensor

NAMES = frozenset(
    {
        'collections.OrderedDict',
        'torch.Size',
        'torch.Tensor',
        'torch.nn.parameter.Parameter',
        'torch.serialization._get_layout',
        'torch._utils._rebuild_sparse_tensor',
        restricted_pickle.ENCODED_BYTES,
        *restricted_pickle.TENSORS,
        *restricted_pickle.TORCH_DTYPES,
        *restricted_pickle.STORAGE_TYPES,
    }
)
MAX_DEPTH = 32  # of nested dicts and lists


def read_saved(file: BinaryIO):
    """The contents of a PyTorch file: plain data, bytes, and CPU tensors, each in its own memory.

    Anything else, such as a sparse tensor, is an inert `Call` or `Name`.

    Args:
        file: seekable, with a file descriptor. Our checksum may follow its end.
    Raises: MalformedPickle for a file that is damaged, hostile, or of another kind.
    """
    contents, parts = _open(file, verify=True)
    try:
        read_parts(file, parts)
    except DamagedFile as error:
        raise MalformedPickle(str(error)) from error
    return contents


def check_saved(file: BinaryIO) -> None:
    """Check a file like `read_saved`, without the tensors' elements. Raises: MalformedPickle."""
    _open(file, verify=False)
    file.seek(0)


def _open(file: BinaryIO, verify: bool) -> tuple[object, list[Part]]:
    """The contents, with tensors whose memory is still empty, and the parts of the file that fill it."""
    size, _ = find_seal(file)
    try:
        if zipfile.is_zipfile(file):
            tree, places, pickled = _read_zip(file, size, verify)
        else:
            tree, places, pickled = _read_legacy(file, size)
        assembly = _Assembly(_SavedStorages(file, places), pickled, size)
        return assembly.value(tree), assembly.parts
    except MalformedPickle:
        raise
    except UNREADABLE as error:
        raise MalformedPickle(
            f'is not a complete PyTorch file ({printable(error, 200) or type(error).__name__})'
        ) from error


# ----------------------------------------------------------------------------
# The two formats. Each reader returns the tree of the contents, {key: (start, stop)} of the storages in the
# file, and the file that byte strings in the tree refer to.

Places = dict[str, tuple[int, int]]


def _read_zip(file: BinaryIO, size: int, verify: bool) -> tuple[object, Places, BinaryIO]:
    file.seek(0)
    with zipfile.ZipFile(BoundedFile(file, ZIP_DIRECTORY, 'the directory of a PyTorch file')) as archive:
        members = {info.filename: info for info in archive.infolist()}
        # Equal names, or bytes outside of entries, could mean another file to another reader.
        if len({name.lower() for name in members}) < len(archive.infolist()):
            raise MalformedPickle('has two entries of one name')
        # The end record of a zip archive without a comment has 22 bytes.
        file.seek(max(size - 22, 0))
        if file.read(22)[:4] != b'PK\5\6':
            raise MalformedPickle('has data after its zip archive')
        held = sum(info.file_size for info in members.values())
        if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()) or held > size:
            raise MalformedPickle('has compressed or overlapping entries, which PyTorch files never have')
        overhead = sum(512 + 2 * len(name.encode(errors='replace')) for name in members)
        if size - held > 512 + overhead:  # headers, names, alignment
            raise MalformedPickle(f'has {size - held:,} bytes outside of its entries')

        # Find the pickle, whose folder is the file's name when it was saved.
        record = next((name for name in members if re.fullmatch(r'([^/]+/)?data\.pkl', name)), None)
        if record is None:
            raise MalformedPickle('is a zip archive without data.pkl, which PyTorch files have')
        folder = record.removesuffix('data.pkl')
        if (order := members.get(f'{folder}byteorder')) is not None and archive.read(order)[:10] != b'little':
            raise MalformedPickle('was not written by a little-endian machine')

        # Read it.
        check_size(members[record].file_size, SAVED_STRUCTURE, 'a PyTorch file without its tensors')
        pickled = io.BytesIO(archive.read(record))
        if verify and (damaged := archive.testzip()) is not None:
            raise MalformedPickle(f'is damaged: {printable(damaged, 200)} does not match its checksum')

    # Locate the storages.
    tree = read_pickle(pickled, len(pickled.getbuffer()), NAMES, persistent_ids=True)
    starts = {
        name: member_start(file, info) for name, info in members.items() if name.startswith(f'{folder}data/')
    }
    places = {
        name.removeprefix(f'{folder}data/'): (start, start + members[name].file_size)
        for name, start in starts.items()
    }
    return tree, places, pickled


def _read_legacy(file: BinaryIO, size: int) -> tuple[object, Places, BinaryIO]:
    def next_record():
        return read_pickle(file, min(size, SAVED_STRUCTURE), NAMES, persistent_ids=True)

    # Five pickles.
    file.seek(0)
    if next_record() != MAGIC:
        raise MalformedPickle('is not a PyTorch file')
    _version, system, tree, keys = (next_record() for _ in range(4))
    if not isinstance(system, dict) or system.get('little_endian') is not True:
        raise MalformedPickle('was not written by a little-endian machine')

    # Then the storages, one after another: their lengths follow from the types in the tensors' records.
    itemsizes = {storage.key: storage.dtype.itemsize for storage in map(_Storage.of, _persistent_ids(tree))}
    places, position = {}, file.tell()
    for key in keys if isinstance(keys, list) else ():
        if not isinstance(key, str) or key not in itemsizes:
            raise MalformedPickle('has a storage of no tensor')
        file.seek(position)
        start, numel = position + 8, int.from_bytes(file.read(8), 'little')
        position = start + numel * itemsizes[key]
        if position > size:
            raise MalformedPickle('ends in the middle of a tensor (truncated?)')
        places[key] = start, position
    return tree, places, file


def _persistent_ids(tree) -> Iterator[Call]:
    """The records of storages in a tree, each once."""
    # A file may hold a node many times, or in itself.
    queue, seen = [tree], set()
    while queue:
        node = queue.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, Call) and node.name == restricted_pickle.PERSISTENT_ID:
            yield node
        elif isinstance(node, Call):
            queue += [node.args, node.state]
        elif isinstance(node, (list, tuple)):
            queue += node
        elif isinstance(node, dict):
            queue += node.values()


# ----------------------------------------------------------------------------
# From the tree to values.


class _Storage(NamedTuple):
    """A storage, as a tensor's record describes it."""

    dtype: torch.dtype
    key: str
    numel: int
    view: tuple | None  # in old files: the record of a part of the storage

    @classmethod
    def of(cls, record: Call) -> _Storage:
        """From ('storage', type, key, device, number of elements[, (key of the view, first, number)])."""
        match record.args:
            case ('storage', Name(path=path), str(key), _, int(numel), *rest) if (
                path in restricted_pickle.STORAGE_TYPES and numel >= 0
            ):
                view = rest[0] if rest else None
                return cls(restricted_pickle.STORAGE_TYPES[path], key, numel, view)
        raise MalformedPickle('has a tensor of unknown type or place')


class _SavedStorages(Storages):
    """Storages at known positions."""

    def __init__(self, file: BinaryIO, places: Places):
        super().__init__(file)
        self.places = places

    def _read_header(self, record: Call) -> Elements:
        storage = _Storage.of(record)
        start, stop = self.places.get(storage.key, (0, 0))
        elements = Elements(None, start, storage.dtype, storage.numel * storage.dtype.itemsize)
        if elements.nbytes != stop - start:
            raise MalformedPickle(f'claims {storage.numel:,} numbers for a storage of {stop - start:,} bytes')
        return elements if storage.view is None else elements.part(storage.view)


class _Assembly:
    """Builds values from the tree. Tensors have empty memory, which `parts` of the file fill."""

    def __init__(self, storages: Storages, pickled: BinaryIO, size: int):
        self.storages, self.pickled, self.left = storages, pickled, size
        self.parts: list[Part] = []
        # (node, value) by the node's identity, because a file may repeat nodes endlessly. Keeping the node
        # keeps its identity unique.
        self.known: dict[int, tuple] = {}

    def value(self, node, depth: int = 0):
        """The value of a node."""
        if node is None or type(node) in (bool, int, float, str):
            return node
        if depth > MAX_DEPTH:
            raise MalformedPickle('nests values without end')
        if id(node) in self.known:
            return self.known[id(node)][1]
        # Dicts and lists may hold themselves, so they are known before they are filled.
        if isinstance(node, (dict, list)):
            value = type(node)()
            self.known[id(node)] = node, value
            self._fill(value, node, depth + 1)
        else:
            value = self._new(node, depth + 1)
            self.known[id(node)] = node, value
        return value

    def _fill(self, value: dict | list, node: dict | list, depth: int) -> None:
        if isinstance(node, dict):
            value.update((self._key(key), self.value(item, depth)) for key, item in node.items())
        else:
            value.extend(self.value(item, depth) for item in node)

    def _new(self, node, depth: int):
        match node:
            case tuple():
                return tuple(self.value(item, depth) for item in node)
            case Call(name='torch.Size', args=(tuple(sizes),)):
                return self.value(sizes, depth)
            case Call(name=restricted_pickle.ENCODED_BYTES):
                return latin1(text_of_bytes(node) or '')
            case Call(name=name) if name in restricted_pickle.TENSORS:
                return self._tensor(node)
            case Span():
                self.pickled.seek(node.start)
                return self.pickled.read(node.size)
        return node

    def _key(self, key):
        key = key.value if isinstance(key, Key) else key
        if type(key) not in (bool, int, float, str):
            raise MalformedPickle('has a key that is neither text nor a number')
        return key

    def _tensor(self, node: Call) -> torch.Tensor:
        # Tensors in the file may share memory; here each gets its own, up to the file's size in all.
        located = self.storages.locate(stored_tensor(node))
        self.left -= located.nbytes
        if self.left < 0:
            raise MalformedPickle('has tensors that share memory: together they are larger than the file')
        elements = torch.empty(located.extent, dtype=located.dtype)
        self.parts.append((located.start, elements.view(torch.uint8).numpy()))
        return elements.as_strided(located.shape, located.stride)
