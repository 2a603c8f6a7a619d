"""LSUN's LMDB databases of image files."""

from __future__ import annotations

import functools
import importlib.util
import io
import mmap
import os
import pathlib
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator

from PIL import UnidentifiedImageError

from data import lmdb_pipe
from data.image_files import Unreadable, describe_non_image
from data.pixels import UNREADABLE, Picture, open_image
from data.sources.selection import Item, Selection, Source
from dnnlib import UserError, limits
from dnnlib.file_kind import HEAD


def read_lmdb(path: pathlib.Path, count: int) -> Iterator[int | tuple[bytes, bytes]]:
    """Yields the number of records of a database, then its first `count` records (key, value).

    Another process reads (`lmdb_pipe`), because damaged or missing pages may crash it. Raises: UserError.
    """
    if importlib.util.find_spec('lmdb') is None:
        raise UserError(
            f'{path} is an LMDB database, but the lmdb package is not installed; run: pip install lmdb'
        )
    # Run the reader, and pass its records on.
    command = [sys.executable, lmdb_pipe.__file__, os.path.abspath(path), str(count)]
    try:
        shortage = _shortage_of_lmdb(path / 'data.mdb')
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            try:
                (total,) = lmdb_pipe.HEAD.unpack(_take(process, lmdb_pipe.HEAD.size))
                yield total
                for _ in range(min(count, total)):
                    key, value = lmdb_pipe.LENGTHS.unpack(_take(process, lmdb_pipe.LENGTHS.size))
                    limits.check_size(key + value, limits.IMAGE_FILE, 'an image')
                    yield _take(process, key), _take(process, value)
            except EOFError as error:
                # Give the reader's own message, or that the file is short, or the signal that ended it.
                messages = process.stderr.read().decode(errors='replace').strip().splitlines()
                status = process.wait()
                ending = 'it ends before its last record'
                if status < 0:
                    ending = f'it is damaged: reading it ends in {signal.Signals(-status).name}'
                raise ValueError(messages[-1] if messages else shortage or ending) from error
            finally:
                # In a damaged file the reader may never end by itself.
                process.kill()
    except UNREADABLE as error:
        raise UserError(
            f'{path} is not a readable LMDB database ({error}); copy or download it again'
        ) from error


def _take(process: subprocess.Popen, size: int) -> bytes:
    """The next bytes of a process's output. Raises: EOFError if it ends first."""
    data = process.stdout.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _shortage_of_lmdb(path: pathlib.Path) -> str:
    """How much shorter a file is than the newer of its two meta pages declares, as text; '' if complete.

    A short file is not an error yet: unused pages at its end may be missing, which only reading shows.

    Raises: OSError; ValueError if the file has no meta pages, or ends within a memory page, whose remainder
        would read as zeros.

    Layout (LMDB's mdb.c, MDB_meta, data version 1): 16 bytes of page header, magic number, version, address,
    map size, two tables of 48 bytes (the first begins with the page size), last page, transaction.
    """
    # Read the two meta pages.
    meta = struct.Struct('<16xIIQQI92xQQ')
    with open(path, 'rb') as file:
        length = os.fstat(file.fileno()).st_size
        pages = [meta.unpack(file.read(meta.size).ljust(meta.size, b'\0'))]
        size = pages[0][4]
        if pages[0][:2] != (0xBEEFC0DE, 1) or size not in (1 << bits for bits in range(8, 17)):
            raise ValueError('it does not begin like one')
        file.seek(size)
        pages.append(meta.unpack(file.read(meta.size).ljust(meta.size, b'\0')))

    # The one with the later transaction has the number of pages.
    wanted = (max(pages, key=lambda page: page[6])[5] + 1) * size
    shortage = f'it has {length:,} bytes but declares {wanted:,}' if length < wanted else ''
    if length % size or (shortage and length % mmap.PAGESIZE):
        raise ValueError(shortage or f'it ends within a page of {size:,} bytes')
    return shortage


def lmdb_source(path: pathlib.Path, selection: Selection) -> Source:
    """An LSUN `*_lmdb` folder of JPEG or WebP images, in key order, without labels."""
    selection.refuse_label_files(f'the LMDB database {path}')
    (count,) = read_lmdb(path, 0)
    if count == 0:
        raise UserError(f'{path} holds no images')
    rows = selection.rows(None, count)
    return Source(len(rows), 'RGB', _lmdb_items(path, len(rows), selection))


def _lmdb_items(path: pathlib.Path, count: int, selection: Selection) -> Iterator[Item]:
    records = read_lmdb(path, count)
    # The number of records comes first.
    next(records)
    for i, (key, value) in enumerate(records):
        name = f'{path}: {key.decode("ascii", "backslashreplace")}'
        yield Item(i, name, selection.read(functools.partial(_decode, name, value)), None)


def _decode(name: str, value: bytes) -> Picture:
    try:
        return Picture.load(open_image(io.BytesIO(value), len(value)))
    except UNREADABLE as error:
        what = describe_non_image(value[:HEAD]) if isinstance(error, UnidentifiedImageError) else error
        raise Unreadable(f'{name} is not a readable image ({what}); replace or remove it') from error
