"""Files by path or URL; downloads are checked and cached."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import sys
import urllib.parse
from pathlib import Path
from typing import BinaryIO

from dnnlib.text import printable
from dnnlib.transport import CHUNK, TIMEOUT, AnotherFile, download
from dnnlib.util import UserError, atomic_write, is_old, unfinished

DEFAULT_CACHE_DIR = Path('~/.cache/multistep-consistency-edm')

# ----------------------------------------------------------------------------
# Reading, by path or URL.


def open_url(
    source: str | os.PathLike,
    cache_dir: str | os.PathLike | None = None,
    sha256: str | None = None,
    timeout: float = TIMEOUT,
    pinned: bool = False,
) -> BinaryIO:
    """The file at a path or an http(s) URL, opened for reading. Arguments and errors: see `local_path`."""
    path = local_path(source, cache_dir, sha256, timeout, pinned)
    try:
        return open(path, 'rb')
    except OSError as error:
        raise UserError(f'Cannot read {path}: {error.strerror}. Check its permissions.') from error


def local_path(
    source: str | os.PathLike,
    cache_dir: str | os.PathLike | None = None,
    sha256: str | None = None,
    timeout: float = TIMEOUT,
    pinned: bool = False,
) -> Path:
    """The local path of `source`. A URL is downloaded once.

    It is downloaded again if the cached file does not have the recorded length or the expected digest.

    Args:
        source: a path, or an http(s) URL (Google Drive links included), optionally followed by
            `#sha256=<64 hexadecimal digits>`, the digest that the file must have.
        cache_dir: folder of downloads; by default `~/.cache/multistep-consistency-edm`.
        sha256: the digest as an argument.
        timeout: seconds without a byte after which a connection counts as stalled.
        pinned: whether a URL without a digest must still be the file of its first download into this cache
            (trust on first use).
    Raises: UserError for a missing file, another scheme, a failed or incomplete download, another digest, or
        a malformed one.
    """
    # A URL.
    source = os.fspath(source)
    expected = None if sha256 is None else _checked_digest(sha256, sha256)
    if re.match(r'https?://', source, re.IGNORECASE):
        url, fragment = _split_url(source)
        digest = _one_digest(source, fragment, expected)
        return _cached(url, Path(cache_dir or DEFAULT_CACHE_DIR).expanduser(), digest, timeout, pinned)

    # A path.
    match = re.fullmatch(r'(.+)#sha256=([0-9A-Fa-f]{64})', source, re.DOTALL)
    if match and not os.path.exists(source):  # a file's name may end like this
        expected = _one_digest(source, match[2].lower(), expected)
        source = match[1]
    if not os.path.isfile(source):
        raise UserError(_why_no_file(source))
    if expected is not None and file_sha256(source) != expected:
        raise UserError(
            f'{source} does not have the SHA-256 digest {expected}. Check the expected digest and the file.'
        )
    return Path(source)


def is_here(source: str | os.PathLike) -> bool:
    """Whether nothing has to be downloaded for `source`: a path, or a URL whose file is in the cache."""
    source = os.fspath(source)
    if source == 'dinov2':  # from the hub, whose cache is not ours
        return False
    if not re.match(r'https?://', source, re.IGNORECASE):
        return True
    return _cache_path(_split_url(source)[0], Path(DEFAULT_CACHE_DIR).expanduser()).is_file()


def _one_digest(source: str, named: str | None, expected: str | None) -> str | None:
    """The digest in a source or expected by its caller. Raises: UserError if they differ."""
    if named is not None and expected not in (None, named):
        raise UserError(
            f'{source} names another SHA-256 digest than the one that is expected, {expected}. Give one of '
            'them.'
        )
    return named or expected


def pinned(source: str, digest: str) -> str:
    """A path or URL with the digest that its file must have, as `local_path` understands it."""
    return f'{source.partition("#sha256=")[0]}#sha256={digest}'


def _why_no_file(source: str) -> str:
    scheme = re.match(r'([A-Za-z][A-Za-z0-9+.-]+):', source)  # a single letter is a Windows drive
    if scheme and not os.path.exists(source):
        return (
            f'{source} does not exist as a file, and {scheme[1]}: is not supported. Give a path, or a URL '
            'that begins with http:// or https://.'
        )
    if os.path.isdir(source):
        return f'{source} is a directory, not a file. Check the path.'
    return f'{source} does not exist. Check the path.'


def _split_url(source: str) -> tuple[str, str | None]:
    """(the URL without its fragment, the digest in its fragment or None)."""
    try:
        url, fragment = urllib.parse.urldefrag(source)
        if not urllib.parse.urlsplit(url).hostname:
            raise ValueError('no host')
    except ValueError as error:
        raise UserError(f'{source} is not a well-formed URL ({error}). Check the URL.') from error

    # A fragment of any other name could be a misspelled digest, which must not be ignored.
    name, _, digest = fragment.partition('=')
    if fragment and name != 'sha256':
        raise UserError(
            f'{source}: #{fragment} means nothing here. After # only sha256=<64 hexadecimal digits> is '
            'understood.'
        )
    return url, _checked_digest(digest, source) if fragment else None


def _checked_digest(digest: str, where: str) -> str:
    if not re.fullmatch(r'[0-9A-Fa-f]{64}', digest):
        raise UserError(
            f'{where}: {digest!r} is not a SHA-256 digest, which has 64 hexadecimal digits. Check the digest.'
        )
    return digest.lower()


def file_sha256(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 digest of a file's bytes. Raises: UserError if it cannot be read."""
    try:
        status = os.stat(path)
        return _digest_of_version(os.fspath(path), status.st_mtime_ns, status.st_size)
    except OSError as error:
        raise UserError(f'Cannot read {path}: {error.strerror}. Check its permissions.') from error


@functools.lru_cache(maxsize=16)  # one load opens its file more than once
def _digest_of_version(path: str, mtime_ns: int, size: int) -> str:
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# ----------------------------------------------------------------------------
# The cache: a file per URL and, written after it, a record of its length and digest. A file without a record
# is downloaded again.


def _cached(url: str, cache_dir: Path, sha256: str | None, timeout: float, pinned: bool) -> Path:
    """The cached file of a URL, downloaded if it is missing or not what it should be."""
    path = _cache_path(url, cache_dir)
    record = _read_record(path)
    first = record.get('sha256') if pinned and sha256 is None else None

    # Use what is there.
    if path.is_file():
        problem = _cache_problem(path, record, sha256 or first)
        if problem is None:
            # The digest that the caller expects, and the file has, replaces the recorded one.
            if sha256 not in (None, record['sha256']):
                _write_record(path, url, record['bytes'], sha256)
            return path
        print(printable(f'{path} {problem}.'), file=sys.stderr)

    # Or download it.
    print(printable(f'Downloading {url}'), file=sys.stderr, flush=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'Cannot create the download cache {path.parent}: {error.strerror}.') from error
    _remove_leftovers(path)
    try:
        size, digest = download(url, path, sha256 or first, timeout)
    except AnotherFile as error:
        cure = (
            'Check the URL and the expected digest.'
            if first is None
            else (
                'That was the digest of its first download. If the file was replaced for a good reason, '
                f'expect the new one (--detector-sha256={error.digest}, or #sha256= and the digest at the '
                f'end of the URL), or delete {_record_path(path)}.'
            )
        )
        raise UserError(f'{error} {cure}') from error
    _write_record(path, url, size, digest)
    return path


def _cache_path(url: str, cache_dir: Path) -> Path:
    """The cached file of a URL. Its name begins with a digest of the URL, and ends readably."""
    # Characters that every file system takes, and no more than fit into a name.
    name = re.sub(r'[^A-Za-z0-9._-]', '_', urllib.parse.urlsplit(url).path.rsplit('/', 1)[-1])[-100:]
    key = hashlib.sha256(url.encode(errors='surrogateescape')).hexdigest()[:16]
    return cache_dir / f'{key}-{name or "file"}'


def _record_path(path: Path) -> Path:
    return path.with_name(f'{path.name}.json')


def _read_record(path: Path) -> dict:
    """The record of a cached file: url, bytes, sha256. Empty if it cannot be read."""
    from dnnlib import schema

    kind = schema.Record(
        dict(bytes=schema.Integer(), sha256=schema.Text('[0-9a-f]{64}')), required=['bytes', 'sha256']
    )
    try:
        return schema.read_json(_record_path(path), kind, 'the record of a download')
    except (OSError, ValueError):
        return {}


def _write_record(path: Path, url: str, size: int, digest: str) -> None:
    with atomic_write(_record_path(path), tidy=False) as file:
        file.write(json.dumps(dict(url=url, bytes=size, sha256=digest)).encode() + b'\n')


def _cache_problem(path: Path, record: dict, sha256: str | None) -> str | None:
    """Why a cached file cannot be used, as 'is ...' or 'does not ...'; None if it can."""
    if record.get('bytes') != path.stat().st_size:
        return 'is not as long as what was downloaded'
    if sha256 is not None and file_sha256(path) != sha256:
        return 'does not have the expected SHA-256 digest'
    return None


def _remove_leftovers(path: Path) -> None:
    """Delete what killed downloads have left; one in progress has written recently, and is kept."""
    for leftover in unfinished(path.parent, path.name):
        with contextlib.suppress(FileNotFoundError):
            if is_old(leftover):
                leftover.unlink()
