"""Files by path or URL: downloads, checked and kept in a cache.

Not by pooch (tried at 1.9.0), which brings a hash, retries and a file that appears when it is complete, but
no deadline for servers that send a byte now and then, no check that no more comes than was announced, no
limit by what is free on the disk, and no record of what was downloaded, by which a file without a known
digest is told from half of it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import html.parser
import http.client
import json
import os
import re
import shutil
import socket
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from dnnlib.limits import KEPT_FREE, UNANNOUNCED_DOWNLOAD
from dnnlib.text import printable
from dnnlib.util import UserError, atomic_write, is_old, unfinished

DEFAULT_CACHE_DIR = Path('~/.cache/multistep-consistency-edm')
DRIVE_HOSTS = ('drive.google.com', 'docs.google.com', 'drive.usercontent.google.com')
ATTEMPTS = 3  # of a download whose connection breaks, stalls, or ends in a server's error
TIMEOUT = 15  # seconds without a byte after which a connection counts as stalled
ANSWER = 4  # times that: a server's deadline for its answer's header, redirections included
SLOWEST = 1000  # bytes a second, on average after the first TIMEOUT
CHUNK = 1 << 20
PAGE_START = re.compile(rb'\s*<(!doctype\s+html|html)\b', re.IGNORECASE)
T = TypeVar('T')

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
    """The local path of `source`. A URL is downloaded once and then served from the cache.

    A cached file whose length is not what was downloaded, or whose digest is not the expected one, is
    downloaded again.

    Args:
        source: a path, or an http(s) URL (Google Drive links included). `#sha256=<64 hexadecimal digits>` at
            its end names the digest that the file must have.
        cache_dir: where downloads live; `~/.cache/multistep-consistency-edm` unless told.
        sha256: the digest too, for callers; also for paths.
        timeout: seconds without a byte after which a connection counts as stalled.
        pinned: whether a URL without a digest must stay the file that it was when it was first downloaded
            into this cache (trust on first use).
    Raises: UserError for a missing file, another scheme, a failed or incomplete download, another digest, or
        a malformed one.
    """
    source = os.fspath(source)
    expected = None if sha256 is None else _checked_digest(sha256, sha256)
    if re.match(r'https?://', source, re.IGNORECASE):
        url, fragment = _split_url(source)
        digest = _one_digest(source, fragment, expected)
        return _cached(url, Path(cache_dir or DEFAULT_CACHE_DIR).expanduser(), digest, timeout, pinned)

    match = re.fullmatch(r'(.+)#sha256=([0-9A-Fa-f]{64})', source, re.DOTALL)
    if match and not os.path.exists(source):  # a file may be called so
        expected = _one_digest(source, match[2].lower(), expected)
        source = match[1]
    if not os.path.isfile(source):
        raise UserError(_why_no_file(source))
    if expected is not None and file_sha256(source) != expected:
        raise UserError(
            f'{source} does not have the SHA-256 digest {expected}. Check the expected digest and the file.'
        )
    return Path(source)


def _one_digest(source: str, named: str | None, expected: str | None) -> str | None:
    """The digest that a source names or its caller expects. Raises: UserError where these are two."""
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
    scheme = re.match(r'([A-Za-z][A-Za-z0-9+.-]+):', source)  # one letter is a drive of Windows
    if scheme and not os.path.exists(source):
        return (
            f'{source} does not exist as a file, and {scheme[1]}: is not supported. Give a path, or a URL '
            'that begins with http:// or https://.'
        )
    if os.path.isdir(source):
        return f'{source} is a directory, not a file. Check the path.'
    return f'{source} does not exist. Check the path.'


def _split_url(source: str) -> tuple[str, str | None]:
    """(the URL without its fragment, the digest that its fragment names or None)."""
    try:
        url, fragment = urllib.parse.urldefrag(source)
        if not urllib.parse.urlsplit(url).hostname:
            raise ValueError('no host')
    except ValueError as error:
        raise UserError(f'{source} is not a well-formed URL ({error}). Check the URL.') from error
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
            f'{where}: a SHA-256 digest has 64 hexadecimal digits, and {digest!r} is none. Check the digest.'
        )
    return digest.lower()


def file_sha256(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 digest of a file's bytes. Raises: UserError where it cannot be read."""
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
# The cache: a file for every URL, and beside it a record of its length and digest, written after the file:
# one without a record is not relied on.


def _cached(url: str, cache_dir: Path, sha256: str | None, timeout: float, pinned: bool) -> Path:
    """The cached file of a URL, downloaded where it is not there or not what it should be."""
    name = re.sub(r'[^A-Za-z0-9._-]', '_', urllib.parse.urlsplit(url).path.rsplit('/', 1)[-1])[-100:]
    path = (
        cache_dir
        / f'{hashlib.sha256(url.encode(errors="surrogateescape")).hexdigest()[:16]}-{name or "file"}'
    )
    record = _read_record(path)
    first = record.get('sha256') if pinned and sha256 is None else None
    if path.is_file():
        problem = _cache_problem(path, record, sha256 or first)
        if problem is None:
            if sha256 not in (
                None,
                record['sha256'],
            ):  # the file is the one that the caller expects: so be it from now on
                _write_record(path, url, record['bytes'], sha256)
            return path
        print(printable(f'{path} {problem}.'), file=sys.stderr)
    print(printable(f'Downloading {url}'), file=sys.stderr, flush=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'Cannot create the download cache {path.parent}: {error.strerror}.') from error
    _remove_leftovers(path)
    try:
        size, digest = _download(url, path, sha256 or first, timeout)
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


def _record_path(path: Path) -> Path:
    return path.with_name(f'{path.name}.json')


def _read_record(path: Path) -> dict:
    """What is recorded of a cached file: url, bytes, sha256. Empty where that cannot be read."""
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
    """Why a cached file cannot be relied on, as 'is ...' or 'does not ...'; None where it can."""
    if record.get('bytes') != path.stat().st_size:
        return 'is not as long as what was downloaded'
    if sha256 is not None and file_sha256(path) != sha256:
        return 'does not have the expected SHA-256 digest'
    return None


def _remove_leftovers(path: Path) -> None:
    """Delete what downloads that were killed have left; one that is under way has written lately."""
    for leftover in unfinished(path.parent, path.name):
        with contextlib.suppress(FileNotFoundError):
            if is_old(leftover):
                leftover.unlink()


# ----------------------------------------------------------------------------
# Downloads.


class BrokenDownload(Exception):
    """A connection that ended before the file did; another attempt may do better.

    The message completes 'Cannot download it: ...'.
    """


class AnotherFile(Exception):
    """A complete download whose `digest` is not the expected one. The message lacks a cure."""

    def __init__(self, url: str, digest: str, expected: str):
        super().__init__(f'{url} has the SHA-256 digest {digest}, not {expected}.')
        self.digest = digest


def _download(url: str, path: Path, sha256: str | None, timeout: float) -> tuple[int, str]:
    """Download `url` to `path`, and try again if the connection breaks or stalls, or the server fails.

    Returns: (its length, its SHA-256 digest). Raises: UserError, or AnotherFile where the digest is not the
        expected one.
    """
    import requests  # slow to import, and most runs read local files

    problem, cause = '', None
    for attempt in range(ATTEMPTS):
        time.sleep(2**attempt - 1)
        try:
            with (
                requests.Session() as session,
                Deadlines() as deadlines,
                atomic_write(path, tidy=False) as file,
            ):
                return _fetch(session, deadlines, url, file, sha256, timeout)
        except requests.exceptions.InvalidSchema as error:
            raise UserError(
                f'Cannot download {url}: it redirects to something else than http(s) ({error}). Check the '
                'URL.'
            ) from error
        except requests.TooManyRedirects as error:
            raise UserError(f'Cannot download {url}: it redirects without end. Check the URL.') from error
        except ValueError as error:  # of a URL that cannot be taken apart, its own or a redirection's
            raise UserError(f'Cannot download {url}: {error}. Check the URL.') from error
        except requests.HTTPError as error:
            problem, cause = (
                f'the server answered {error.response.status_code} {error.response.reason}',
                error,
            )
        except requests.Timeout as error:
            problem, cause = f'nothing came for {timeout:g} seconds', error
        except requests.RequestException as error:
            problem, cause = 'the connection failed', error
        except BrokenDownload as error:
            problem, cause = str(error), error
    raise UserError(
        f'Cannot download {url}: {problem} ({ATTEMPTS} attempts). '
        'Check the connection and try again, or download it elsewhere and give the path.'
    ) from cause


class Deadlines:
    """Blocking calls with a deadline, in a thread: timeouts of sockets begin anew with every byte.

    A call that takes too long goes on in that thread, which nobody waits for, until the other end gives up,
    or this process ends.
    """

    def __init__(self):
        from multiprocessing.pool import ThreadPool

        self._threads = ThreadPool(1)

    def __enter__(self) -> Deadlines:
        return self

    def __exit__(self, *_):
        self._threads.terminate()

    def within(self, seconds: float, function: Callable[..., T], *arguments) -> T:
        """What `function` returns, or raises. Raises: TimeoutError where it takes longer."""
        call = self._threads.apply_async(function, arguments)
        call.wait(seconds)
        if not call.ready():
            raise TimeoutError
        return call.get()


def _fetch(
    session, deadlines: Deadlines, url: str, file: BinaryIO, sha256: str | None, timeout: float
) -> tuple[int, str]:
    """One attempt to download `url`, as long as announced, into `file`. Returns (length, digest)."""
    try:
        response = deadlines.within(ANSWER * timeout, _request, session, url, timeout)
    except TimeoutError as error:
        raise BrokenDownload(f'the server took more than {ANSWER * timeout:g} seconds to answer') from error

    # Is there room for it?
    length, folder = _announced_length(url, response, sha256), os.path.dirname(file.name)
    if length is not None and length > (free := shutil.disk_usage(folder).free):
        raise UserError(
            f'Cannot download {url}: it has {length:,} bytes, and {free:,} are free in {folder}. '
            'Free some space, or download it elsewhere and give the path.'
        )
    # Write and sum up what comes, as long as there is room.
    digest, start = hashlib.sha256(), b''
    for chunk in _shown(_body(response, deadlines, length, timeout), length):
        if length is None and (
            file.tell() > UNANNOUNCED_DOWNLOAD or shutil.disk_usage(folder).free < KEPT_FREE
        ):
            raise UserError(
                f'Cannot download {url}: the server does not say how long it is, more than {file.tell():,} '
                f'bytes have come, and there is no room for more in {folder}. Check the URL, or download it '
                'elsewhere and give the path.'
            )
        file.write(chunk)
        digest.update(chunk)
        start = start or chunk[:100]
    response.close()

    # Is it the file that was asked for?
    if PAGE_START.match(start):
        raise UserError(_page_message(url))
    if sha256 is not None and digest.hexdigest() != sha256:
        raise AnotherFile(url, digest.hexdigest(), sha256)
    return file.tell(), digest.hexdigest()


def _shown(chunks: Iterator[bytes], length: int | None) -> Iterator[bytes]:
    """The chunks, with a progress bar where stderr is a terminal."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    with tqdm(total=length, unit='B', unit_scale=True, leave=False, disable=not terminal) as bar:
        for chunk in chunks:
            yield chunk
            bar.update(len(chunk))


def _body(response, deadlines: Deadlines, length: int | None, timeout: float) -> Iterator[bytes]:
    """The bytes of a response as they come, to the end of the connection: as many as were announced.

    They are read from underneath `requests`, which stops where the announced length ends and so would miss
    that more bytes come.
    Raises: BrokenDownload.
    """
    # http.client's stream: its read1 gives what is there and loses nothing to a timeout
    stream = response.raw._original_response
    if not stream.chunked:
        stream.length = None
    received, since = 0, time.monotonic()
    while length is None or received <= length:
        try:
            # headers of chunks, and what may follow the last one, come within this call
            chunk = deadlines.within(2 * timeout, stream.read1, CHUNK)
        except TimeoutError as error:
            _hang_up(response)
            if received == length:  # the server keeps the connection open although it was asked to close it
                return
            raise BrokenDownload(f'the connection stalled after {received:,} bytes') from error
        except (OSError, http.client.HTTPException) as error:
            raise BrokenDownload(f'the connection broke off after {received:,} bytes') from error
        if not chunk:
            break
        yield chunk
        received += len(chunk)
        if received < SLOWEST * (time.monotonic() - since - timeout):
            raise BrokenDownload(
                f'the connection stalled after {received:,} bytes, less than {SLOWEST:,} a second'
            )
    if length is not None and received != length:
        raise BrokenDownload(
            f'{length:,} bytes were announced, and {"more" if received > length else f"{received:,}"} came'
        )


def _hang_up(response) -> None:
    """Shut a response's connection down. Closing it would wait for the thread that may be reading it."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(response.raw.fileno())) as connection:
        connection.shutdown(socket.SHUT_RDWR)


def _announced_length(url: str, response, sha256: str | None) -> int | None:
    """The length of the response's body; None if its end shows in chunks or by the file's digest."""
    if (coding := response.headers.get('Content-Encoding', 'identity').lower()) != 'identity':
        raise UserError(
            f'Cannot download {url}: the server encodes it ({coding}), though asked not to. Download it '
            'elsewhere and give the path.'
        )
    if 'chunked' in response.headers.get('Transfer-Encoding', '').lower():
        return None
    length = response.headers.get('Content-Length')
    if length is None and sha256 is None:
        raise UserError(
            f'Cannot download {url}: the server does not say how long the file is, so a broken download '
            'would go unnoticed. Add #sha256= and its digest to the URL, or download it elsewhere and give '
            'the path.'
        )
    if length is not None and not re.fullmatch(r'[0-9]{1,18}', length):
        raise UserError(
            f'Cannot download {url}: the server announced a length of {length!r}. Download it elsewhere and '
            'give the path.'
        )
    return None if length is None else int(length)


def _request(session, url: str, timeout: float):
    """The response whose body is the file.

    Compression is declined, so that Content-Length counts the file's bytes. The body is the last thing on its
    connection, so that its end shows.
    """

    def forget(response, **_):
        session.get_adapter(response.url).close()  # or a redirection could use a connection that closes
        if response.is_redirect:
            response.close()  # or its body would be read to the end

    def get(address, fields=None):
        headers = {'Accept-Encoding': 'identity', 'Connection': 'close'}
        response = session.get(
            address, params=fields, stream=True, timeout=timeout, headers=headers, hooks=dict(response=forget)
        )
        if response.status_code >= 500 or response.status_code == 429:
            response.raise_for_status()  # worth another attempt
        if response.status_code != 200:
            raise UserError(
                f'Cannot download {url}: the server answered {response.status_code} {response.reason}. '
                'Check the URL, or download the file elsewhere and give the path.'
            )
        return response

    response = get(_drive_address(url))
    if _is_page(response) and (form := _DriveForm(response)).action is not None:
        response = get(urllib.parse.urljoin(response.url, form.action), form.fields)
    if _is_page(response):
        raise UserError(_page_message(url))
    return response


def _is_page(response) -> bool:
    return response.headers.get('Content-Type', '').lower().startswith('text/html')


def _page_message(url: str) -> str:
    return (
        f'{url} is a web page, not a file (a log-in, a quota, a wrong link?). Download the file in a browser '
        'and give its path.'
    )


def _drive_address(url: str) -> str:
    """The download address behind a Google Drive link of any form; other URLs as they are."""
    parts = urllib.parse.urlsplit(url)
    if parts.netloc.lower() not in DRIVE_HOSTS or parts.path.endswith('/download'):
        return url
    ids = re.findall(r'/d/([\w-]+)', parts.path) + urllib.parse.parse_qs(parts.query).get('id', [])
    return f'{parts.scheme}://{parts.netloc}/uc?export=download&id={ids[0]}' if ids else url


class _DriveForm(html.parser.HTMLParser):
    """The form on Google Drive's page "too large to be scanned for viruses": address and hidden fields.

    It is a form, `download-form`; on older pages `downloadForm`, or a link, `uc-download-link`. `action` is
    None on other pages.
    """

    def __init__(self, response):
        super().__init__()
        self.action: str | None = None
        self.fields: dict[str, str] = {}
        self.feed(next(response.iter_content(CHUNK), b'').decode(errors='replace'))

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag == 'form' and attributes.get('id') in ('download-form', 'downloadForm'):
            self.action = attributes.get('action')
        elif tag == 'a' and attributes.get('id') == 'uc-download-link':
            self.action = attributes.get('href')
        elif tag == 'input' and self.action is not None and attributes.get('name'):
            self.fields[attributes['name']] = attributes.get('value') or ''
