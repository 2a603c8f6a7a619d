"""One download over HTTP: attempts, deadlines, and checks that the file is complete.

Not pooch (tried at 1.9.0): it has hashes, retries and atomic files, but no deadline for servers that send a
byte now and then, no check that no more comes than was announced, no limit by free disk space, and no record
by which a file without a known digest is told from half of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
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

from dnnlib import google_drive
from dnnlib.limits import KEPT_FREE, UNANNOUNCED_DOWNLOAD
from dnnlib.util import UserError, atomic_write

ATTEMPTS = 3  # if the connection breaks or stalls, or the server fails
TIMEOUT = 15  # seconds without a byte after which a connection counts as stalled
ANSWER = 4  # times the timeout: deadline for a response's header, redirections included
SLOWEST = 1000  # bytes a second, on average after the first TIMEOUT
CHUNK = 1 << 20  # bytes read at a time
PAGE_START = re.compile(rb'\s*<(!doctype\s+html|html)\b', re.IGNORECASE)
ELSEWHERE = 'download it elsewhere and give the path'
T = TypeVar('T')


class BrokenDownload(Exception):
    """A connection that ended before the file did; another attempt may succeed.

    The message completes 'Cannot download it: ...'.
    """


class AnotherFile(Exception):
    """A complete download whose `digest` is not the expected one. The message lacks a cure."""

    def __init__(self, url: str, digest: str, expected: str):
        super().__init__(f'{url} has the SHA-256 digest {digest}, not {expected}.')
        self.digest = digest


def download(url: str, path: Path, sha256: str | None, timeout: float) -> tuple[int, str]:
    """Download `url` to `path`, with retries if the connection breaks or stalls, or the server fails.

    Returns: (length, SHA-256 digest).
    Raises: UserError, or AnotherFile if the digest is not the expected one.
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
        # Another attempt would fail in the same way.
        except requests.exceptions.InvalidSchema as error:
            raise UserError(
                f'Cannot download {url}: it redirects to something else than http(s) ({error}). Check the '
                'URL.'
            ) from error
        except requests.TooManyRedirects as error:
            raise UserError(f'Cannot download {url}: it redirects without end. Check the URL.') from error
        except ValueError as error:  # a malformed URL, its own or a redirection's
            raise UserError(f'Cannot download {url}: {error}. Check the URL.') from error
        # Another attempt may succeed.
        except requests.HTTPError as error:
            answer = error.response
            problem, cause = f'the server answered {answer.status_code} {answer.reason}', error
        except requests.Timeout as error:
            problem, cause = f'nothing came for {timeout:g} seconds', error
        except requests.RequestException as error:
            problem, cause = 'the connection failed', error
        except BrokenDownload as error:
            problem, cause = str(error), error
    raise UserError(
        f'Cannot download {url}: {problem} ({ATTEMPTS} attempts). '
        f'Check the connection and try again, or {ELSEWHERE}.'
    ) from cause


class Deadlines:
    """Blocking calls with a deadline, in a thread: a socket's timeout starts anew with every byte.

    A call past its deadline continues in that thread, which nobody waits for, until the other end gives up or
    this process ends.
    """

    def __init__(self):
        from multiprocessing.pool import ThreadPool

        self._threads = ThreadPool(1)

    def __enter__(self) -> Deadlines:
        return self

    def __exit__(self, *_):
        self._threads.terminate()

    def within(self, seconds: float, function: Callable[..., T], *arguments) -> T:
        """What `function` returns, or raises. Raises: TimeoutError if it takes longer."""
        call = self._threads.apply_async(function, arguments)
        call.wait(seconds)
        if not call.ready():
            raise TimeoutError
        return call.get()


def _fetch(
    session, deadlines: Deadlines, url: str, file: BinaryIO, sha256: str | None, timeout: float
) -> tuple[int, str]:
    """One attempt to download `url` into `file`. Returns: (length, digest)."""
    try:
        response = deadlines.within(ANSWER * timeout, _request, session, url, timeout)
    except TimeoutError as error:
        raise BrokenDownload(f'the server took more than {ANSWER * timeout:g} seconds to answer') from error

    # Check the free space before the first byte.
    length, folder = _announced_length(url, response, sha256), os.path.dirname(file.name)
    if length is not None and length > (free := shutil.disk_usage(folder).free):
        raise UserError(
            f'Cannot download {url}: it has {length:,} bytes, and {free:,} are free in {folder}. '
            f'Free some space, or {ELSEWHERE}.'
        )

    # Write and hash what comes; a length that was not announced is bounded by the disk.
    digest, start = hashlib.sha256(), b''
    for chunk in _with_progress(_body(response, deadlines, length, timeout), length):
        if length is None and (
            file.tell() > UNANNOUNCED_DOWNLOAD or shutil.disk_usage(folder).free < KEPT_FREE
        ):
            raise UserError(
                f'Cannot download {url}: the server does not say how long it is, more than {file.tell():,} '
                f'bytes have come, and there is no room for more in {folder}. Check the URL, or {ELSEWHERE}.'
            )
        file.write(chunk)
        digest.update(chunk)
        start = start or chunk[:100]
    response.close()

    # Check that it is the expected file.
    if PAGE_START.match(start):
        raise UserError(_page_message(url))
    if sha256 is not None and digest.hexdigest() != sha256:
        raise AnotherFile(url, digest.hexdigest(), sha256)
    return file.tell(), digest.hexdigest()


def _with_progress(chunks: Iterator[bytes], length: int | None) -> Iterator[bytes]:
    """The chunks, with a progress bar if stderr is a terminal."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    with tqdm(total=length, unit='B', unit_scale=True, leave=False, disable=not terminal) as bar:
        for chunk in chunks:
            yield chunk
            bar.update(len(chunk))


def _body(response, deadlines: Deadlines, length: int | None, timeout: float) -> Iterator[bytes]:
    """The bytes of a response as they come, to the end of the connection, as many as were announced.

    Raises: BrokenDownload.
    """
    # Read below `requests`, which stops at the announced length and would miss that more bytes come.
    # read1 of http.client's stream returns what is there and loses nothing to a timeout.
    stream = response.raw._original_response
    if not stream.chunked:
        stream.length = None
    received, since = 0, time.monotonic()
    while length is None or received <= length:
        try:
            # Twice the timeout: headers of chunks, and a trailer, may come within this call.
            chunk = deadlines.within(2 * timeout, stream.read1, CHUNK)
        except TimeoutError as error:
            _hang_up(response)
            if received == length:  # complete; the server just keeps the connection open
                return
            raise BrokenDownload(f'the connection stalled after {received:,} bytes') from error
        except (OSError, http.client.HTTPException) as error:
            raise BrokenDownload(f'the connection broke off after {received:,} bytes') from error
        if not chunk:
            break
        yield chunk
        received += len(chunk)

        # A byte now and then resets every timeout, so bound the average too.
        if received < SLOWEST * (time.monotonic() - since - timeout):
            raise BrokenDownload(
                f'the connection stalled after {received:,} bytes, less than {SLOWEST:,} a second'
            )
    if length is not None and received != length:
        raise BrokenDownload(
            f'{length:,} bytes were announced, and {"more" if received > length else f"{received:,}"} came'
        )


def _hang_up(response) -> None:
    """Shut down a response's connection; closing it would wait for the thread that may be reading it."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(response.raw.fileno())) as connection:
        connection.shutdown(socket.SHUT_RDWR)


def _announced_length(url: str, response, sha256: str | None) -> int | None:
    """The length of the response's body; None if its end shows in chunks or by the file's digest."""
    # An encoded body has another length than the file.
    if (coding := response.headers.get('Content-Encoding', 'identity').lower()) != 'identity':
        raise UserError(
            f'Cannot download {url}: the server encodes it ({coding}), though asked not to. '
            f'{ELSEWHERE.capitalize()}.'
        )
    if 'chunked' in response.headers.get('Transfer-Encoding', '').lower():
        return None

    # Without chunks, length or digest, a truncated file looks complete.
    length = response.headers.get('Content-Length')
    if length is None and sha256 is None:
        raise UserError(
            f'Cannot download {url}: the server does not say how long the file is, so a broken download '
            f'would go unnoticed. Add #sha256= and its digest to the URL, or {ELSEWHERE}.'
        )
    if length is not None and not re.fullmatch(r'[0-9]{1,18}', length):
        raise UserError(
            f'Cannot download {url}: the server announced a length of {length!r}. {ELSEWHERE.capitalize()}.'
        )
    return None if length is None else int(length)


def _request(session, url: str, timeout: float):
    """The response whose body is the file.

    Compression is declined, so that Content-Length counts the file's bytes. The connection closes after the
    body, so that its end shows.
    """

    def forget(response, **_):
        # A redirection must not reuse a connection that closes, nor wait for this response's body.
        session.get_adapter(response.url).close()
        if response.is_redirect:
            response.close()

    def get(address, fields=None):
        headers = {'Accept-Encoding': 'identity', 'Connection': 'close'}
        response = session.get(
            address, params=fields, stream=True, timeout=timeout, headers=headers, hooks=dict(response=forget)
        )
        if response.status_code >= 500 or response.status_code == 429:
            response.raise_for_status()  # another attempt may succeed
        if response.status_code != 200:
            raise UserError(
                f'Cannot download {url}: the server answered {response.status_code} {response.reason}. '
                'Check the URL, or download the file elsewhere and give the path.'
            )
        return response

    # Google Drive answers with a page to confirm if it cannot scan the file for viruses.
    response = get(google_drive.download_address(url))
    if _is_page(response):
        page = next(response.iter_content(CHUNK), b'').decode(errors='replace')
        form = google_drive.ConfirmationForm(page)
        if form.action is None:
            raise UserError(_page_message(url))
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
