"""Directory of a zip file as arrays: seconds for millions of members, and cached for the next time.

Python's zipfile creates an object per member. Here, a plain directory (as dataset_tool.py writes it) is
parsed into arrays; zipfile reads any other. Members are always opened by zipfile, with all its checks.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import struct
import zipfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import file_names
from dnnlib import UserError, downloads, limits, util
from dnnlib.archives import BoundedZip

CACHE_FROM = 100_000  # members; smaller directories are parsed as fast as a cache is read
FORMAT = 2  # version of the cached arrays and of everything computed from them
# Arrays of an index, in the order in which `ZipIndex.info` unpacks them.
FIELDS = dict(
    offset=np.uint64,
    compressed=np.uint64,
    size=np.uint64,
    crc=np.uint32,
    method=np.uint16,
    flags=np.uint16,
    attributes=np.uint32,
)
SYMBOLIC_LINK = 0o12  # upper four bits of a Unix file mode, which are the upper four of the attributes
EMPTY_ZIP = b'PK\5\6' + bytes(18)


class Names(Sequence):
    """Strings in three arrays: name i is `blob[starts[i]:ends[i]]` in UTF-8. Slices are lists."""

    def __init__(self, blob: bytes, starts: np.ndarray, ends: np.ndarray):
        self.blob, self.starts, self.ends = blob, starts, ends

    @classmethod
    def of(cls, names: Sequence[bytes]) -> Names:
        lengths = np.fromiter(map(len, names), np.int64, len(names))
        ends = np.cumsum(lengths)
        return cls(b''.join(names), ends - lengths, ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return list(self[np.arange(len(self))[i]])
        if isinstance(i, np.ndarray):
            return Names(self.blob, self.starts[i], self.ends[i])
        return self.blob[self.starts[i] : self.ends[i]].decode()

    def __iter__(self) -> Iterator[str]:
        return (self.blob[start:end].decode() for start, end in zip(self.starts.tolist(), self.ends.tolist()))


class Entry(NamedTuple):
    """A member's directory entry."""

    filename: str
    file_size: int
    CRC: int


class ZipIndex:
    """Members of a zip file, stably sorted by name.

    Attributes:
        names: with forward slashes; `stored` has them as written.
        fields: name -> array [N]; see `FIELDS`.
        key: hex digest of the directory and the file size, which determine the index; None if unknown.
    """

    def __init__(self, stored: Names, fields: dict[str, np.ndarray], key: str | None):
        self.stored, self.fields, self.key = stored, fields, key
        self.names = Names(_with_slashes(stored.blob), stored.starts, stored.ends)

    @classmethod
    def read(cls, path: str) -> ZipIndex:
        """Index of a file, from the cache if an identical directory was read before.

        Raises: as `zipfile.ZipFile`; UserError if two names differ only in their separators.
        """
        tail = _find_directory(path)
        key = tail and tail.key()

        def parse():
            # A file without a plain end record takes zipfile, with its own limit.
            names, fields = (tail and _parse(tail)) or _parse_by_zipfile(
                path, limits.DATA_DIRECTORY if tail else limits.ZIP_DIRECTORY
            )
            # A stable sort: of members with one name, the last in the file stays last, as in zipfile.
            order = sorted(range(len(names)), key=[_with_slashes(name) for name in names].__getitem__)
            names = Names.of([names[i] for i in order])

            # Check what zipfile does not: separators, and sizes that the file cannot have.
            _check_separators(names, path)
            if fields['compressed'].astype(np.float64).sum() > Path(path).stat().st_size:
                raise zipfile.BadZipFile('its members overlap, or lie beyond its end')
            return dict(
                blob=np.frombuffer(names.blob, np.uint8),
                ends=names.ends,
                **{name: array[order] for name, array in fields.items()},
            )

        arrays = cached(key if tail and tail.count >= CACHE_FROM else None, 'directory', parse, _consistent)
        ends = arrays['ends']
        return cls(
            Names(arrays['blob'].tobytes(), np.append(0, ends)[:-1], ends),
            {name: arrays[name] for name in FIELDS},
            key,
        )

    def __len__(self) -> int:
        return len(self.names)

    def entries(self) -> list[Entry]:
        """All members, including repeated ones."""
        return list(map(Entry, self.names, self.fields['size'].tolist(), self.fields['crc'].tolist()))

    def info(self, name: str) -> zipfile.ZipInfo:
        """zipfile's handle of a member. Raises: KeyError."""
        # The last member of that name, as bisect_right finds it.
        row = bisect_right(self.names, name) - 1
        if row < 0 or self.names[row] != name:
            raise KeyError(f'There is no item named {name!r} in the archive')

        # FIELDS has the order of these attributes.
        info = zipfile.ZipInfo(self.stored[row])
        (
            info.header_offset,
            info.compress_size,
            info.file_size,
            info.CRC,
            info.compress_type,
            info.flag_bits,
            info.external_attr,
        ) = (int(self.fields[field][row]) for field in FIELDS)
        return info

    def links(self) -> list[str]:
        """Names of members that are symbolic links, whose contents are paths."""
        return list(self.names[np.flatnonzero(self.fields['attributes'] >> 28 == SYMBOLIC_LINK)])


def _with_slashes(names: bytes) -> bytes:
    """`file_names.with_slashes` on UTF-8, where the byte of a backslash occurs in no other character."""
    return names.replace(b'\\', b'/')


def _check_separators(stored: Names, path: str) -> None:
    """Raises: UserError if two sorted names are equal once their backslashes are slashes."""
    if b'\\' not in stored.blob:
        return
    for name, following in itertools.pairwise(stored):
        if name != following and file_names.with_slashes(name) == file_names.with_slashes(following):
            raise UserError(
                f'{path} has both {name} and {following}: backslashes separate folders like slashes, so the '
                'names collide; recreate the zip'
            )


def open_archive(path: str) -> zipfile.ZipFile:
    """A zip file opened without reading its directory; `ZipIndex.info` gives the members to open."""
    # zipfile reads the directory in its constructor: give it an empty zip, then the real file.
    archive = zipfile.ZipFile(io.BytesIO(EMPTY_ZIP))
    archive.fp, archive.filename = open(path, 'rb'), path  # noqa: SIM115  (it stays open)
    return archive


# ----------------------------------------------------------------------------
# Reading directories (PKWARE's APPNOTE, 4.3.12 to 4.3.16).


class Tail(NamedTuple):
    """The end of a zip file, from its central directory on.

    Attributes:
        data: all these bytes.
        length: bytes of the directory, at the start of `data`.
        shift: bytes before the archive, to add to the directory's offsets.
        file_size: bytes of the file.
        count: number of members according to the end record.
    """

    data: bytes
    length: int
    shift: int
    file_size: int
    count: int

    def key(self) -> str:
        return hashlib.blake2b(
            self.data + struct.pack('<QQ', self.file_size, FORMAT), digest_size=16
        ).hexdigest()


def _find_directory(path: str) -> Tail | None:
    """Locate the directory; None if it takes zipfile to find it. Raises: OSError, BadZipFile, TooLarge."""
    with open(path, 'rb') as file:
        # The end record (22 bytes and a comment), after the records of ZIP64 (76 bytes) if there are any.
        size = file.seek(0, io.SEEK_END)
        base = max(size - 22 - 65535 - 76, 0)
        file.seek(base)
        data = file.read()
        end = data.rfind(b'PK\5\6')
        if end < 0 or len(data) < end + 22:
            return None
        count, length, offset, comment = struct.unpack_from('<10xHIIH', data, end)
        if end + 22 + comment != len(data):
            return None
        if data[max(end - 20, 0) : end][:4] == b'PK\6\7':  # ZIP64
            end -= 76
            if end < 0 or data[end : end + 4] != b'PK\6\6':
                return None
            count, length, offset = struct.unpack_from('<32xQQQ', data, end)

        # The directory ends where the end records begin.
        start = base + end - length
        if start < offset:
            return None
        limits.check_size(size - start, limits.DATA_DIRECTORY, 'the directory of a zip archive')
        file.seek(start)
        if length and file.read(4) != b'PK\1\2':
            raise zipfile.BadZipFile('its directory is not where it says')
        file.seek(start)
        return Tail(file.read(), length, start - offset, size, count)


def _parse(tail: Tail) -> tuple[list[bytes], dict[str, np.ndarray]] | None:
    """(names, fields) of a plain directory: ASCII names, no extra field but 64-bit offsets; else None."""
    # Find the entries' positions one by one: they vary in length.
    data, position, positions = tail.data, 0, []
    lengths = struct.Struct('<3H').unpack_from
    while position < tail.length:
        if data[position : position + 4] != b'PK\1\2' or position + 46 > tail.length:
            return None
        positions.append(position)
        position += 46 + sum(lengths(data, position + 28))
    if position != tail.length:
        return None
    positions = np.array(positions, dtype=np.int64)

    # Gather each field from an unaligned view that has a number at every byte.
    def field(kind, at):
        # Seven bytes less than the data, so that the widest number fits at the last position.
        every = np.ndarray([len(data) - 7], kind, data, strides=[1])
        return every[positions + at]

    fields = dict(
        offset=field('<u4', 42).astype(np.uint64),
        compressed=field('<u4', 20),
        size=field('<u4', 24),
        crc=field('<u4', 16),
        method=field('<u2', 10),
        flags=field('<u2', 8),
        attributes=field('<u4', 38),
    )
    name_length, extra_length = field('<u2', 28).astype(np.int64), field('<u2', 30)

    # ZIP64: an offset of all ones is in the extra field (id 1, 8 bytes). zipfile reads anything else.
    far = fields['offset'] == 0xFFFFFFFF
    extra = positions[far] + 46 + name_length[far]
    every_2, every_8 = (np.ndarray([len(data) - 7], kind, data, strides=[1]) for kind in ('<u2', '<u8'))
    if (
        (extra_length != far * 12).any()
        or (every_2[extra] != 1).any()
        or (every_2[extra + 2] != 8).any()
        or max(fields['compressed'].max(initial=0), fields['size'].max(initial=0)) == 0xFFFFFFFF
        or (field('<u2', 6) > 63).any()  # versions that zipfile refuses
    ):
        return None
    fields['offset'][far] = every_8[extra + 4]
    fields['offset'] += np.uint64(tail.shift)

    # Names follow the 46 bytes of the fixed fields.
    names = [
        data[start:end]
        for start, end in zip((positions + 46).tolist(), (positions + 46 + name_length).tolist())
    ]
    joined = b''.join(names)
    if not joined.isascii() or b'\0' in joined:
        return None
    return names, {name: fields[name].astype(kind) for name, kind in FIELDS.items()}


def _parse_by_zipfile(path: str, directory: int) -> tuple[list[bytes], dict[str, np.ndarray]]:
    with BoundedZip(path, directory) as archive:
        infos = archive.infolist()

    # One array per field, in the order of FIELDS.
    def row(i):
        sizes = i.header_offset, i.compress_size, i.file_size
        return *sizes, i.CRC, i.compress_type, i.flag_bits, i.external_attr

    columns = list(zip(*map(row, infos))) or [()] * len(FIELDS)
    arrays = [np.array(column, dtype=kind) for column, kind in zip(columns, FIELDS.values())]
    return [info.filename.encode() for info in infos], dict(zip(FIELDS, arrays))


# ----------------------------------------------------------------------------
# The cache.


def cached(
    key: str | None,
    what: str,
    compute: Callable[[], dict[str, np.ndarray]],
    sound: Callable[[dict], bool] = lambda arrays: True,
) -> dict[str, np.ndarray]:
    """Arrays from the cache, or computed and cached; errors of the cache are ignored.

    Args:
        key: digest of all that determines the arrays; None disables the cache.
        sound: whether arrays read from the cache can be the result of `compute`.
    """
    # Read the cache.
    path = None
    if key is not None:
        path = Path(downloads.DEFAULT_CACHE_DIR).expanduser() / 'indices' / f'{key}-{what}.npz'
        with contextlib.suppress(*limits.UNREADABLE), np.load(path, allow_pickle=False) as file:
            arrays = dict(file)  # zipfile compares checksums
            if sound(arrays):
                return arrays

    # Compute the arrays and cache them.
    with util.without_garbage_collection():
        arrays = compute()
    if path is not None:
        with contextlib.suppress(OSError, UserError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with util.atomic_write(path, durable=False) as file:
                np.savez(file, **arrays)
    return arrays


def _consistent(arrays: dict[str, np.ndarray]) -> bool:
    ends = arrays.get('ends', np.empty(0))
    return (
        arrays.keys() == {'blob', 'ends', *FIELDS}
        and all(len(arrays[name]) == len(ends) for name in FIELDS)
        and len(ends) > 0
        and ends[-1] == len(arrays['blob'])
        and (np.diff(ends, prepend=0) >= 0).all()
    )
