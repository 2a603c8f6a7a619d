"""EasyDict, the error that users see, files by path or URL, and files written whole or not at all."""
from __future__ import annotations

import contextlib
import errno
import hashlib
import html.parser
import os
import re
import secrets
import sys
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

DEFAULT_CACHE_DIR = Path('~/.cache/multistep-consistency-edm')
DRIVE_HOSTS = ('drive.google.com', 'docs.google.com', 'drive.usercontent.google.com')
ATTEMPTS = 3                # of a download whose connection breaks, stalls, or ends in a server's error
CHUNK = 1 << 20
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


class UserError(Exception):
    """An input that cannot be used. The message is one line or two that name the cause and the cure.

    Command lines (`dnnlib.cli.Command`) print it as `Error: ...` and exit with status 1, without a traceback.
    """


class EasyDict(dict):
    """A dict whose string keys are attributes too."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name, value):
        self[name] = value

    def __delattr__(self, name):
        try:
            del self[name]
        except KeyError:
            raise AttributeError(name) from None


# ---------------------------------------------------------------------------------------------------------------------
# Writing.

@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file that takes the name `path` only when the `with` block has ended well.

    It is written under a hidden name in the same directory, flushed to disk, then renamed: a reader, a full disk
    or a kill finds either the previous file or the whole new one. Where the block raises, nothing is left behind.

    Raises: UserError where the directory is missing or closed to writing, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp')
    try:
        file = open(temporary, 'xb')  # noqa: SIM115 (closed below; its own errors are told apart from the block's)
    except OSError as error:
        raise UserError(f'Cannot write {path}: {error.strerror}. Choose an existing directory that you may write to.') from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        if error.errno in DISK_ERRORS or temporary.name in str(error.filename):
            raise UserError(f'Cannot write {path}: {error.strerror}. Free some space or choose another place.') from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    """Flush a rename to disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------
# Reading, by path or URL.

def open_url(source: str | os.PathLike, cache_dir: str | os.PathLike | None = None, sha256: str | None = None, timeout: float = 30) -> BinaryIO:
    """The file at a path or an http(s) URL, opened for reading, seekable. Arguments and errors are `local_path`'s."""
    path = local_path(source, cache_dir, sha256, timeout)
    try:
        return open(path, 'rb')
    except OSError as error:
        raise UserError(f'Cannot read {path}: {error.strerror}. Check its permissions.') from error


def local_path(source: str | os.PathLike, cache_dir: str | os.PathLike | None = None, sha256: str | None = None, timeout: float = 30) -> Path:
    """The path of a file on this machine that holds `source`; a URL is downloaded once and then served from the cache.

    Args:
        source: a path, or an http(s) URL (Google Drive links included).
        cache_dir: where downloads live; `~/.cache/multistep-consistency-edm` unless told.
        sha256: hexadecimal digest that the file must have.
        timeout: seconds without a byte after which a connection counts as stalled.
    Raises: UserError for a missing file, another scheme, a failed or incomplete download, or another digest.
    """
    source = os.fspath(source)
    scheme = re.match(r'([A-Za-z][A-Za-z0-9+.-]*)://', source)
    if scheme is None:
        path = Path(source)
        if not os.path.isfile(path):
            problem = 'is a directory, not a file' if os.path.isdir(path) else 'does not exist'
            raise UserError(f'{source} {problem}. Check the path.')
    elif scheme[1].lower() in ('http', 'https'):
        path = _cache_path(source, Path(cache_dir or DEFAULT_CACHE_DIR).expanduser())
        if not path.is_file():
            _download(source, path, sha256, timeout)
    else:
        raise UserError(f'{source}: {scheme[1]}:// is not supported. Give a path or an http(s) URL.')
    if sha256 is not None and file_sha256(path) != sha256.lower():
        cure = 'Check the expected digest' + (f', or delete {path} to download it again.' if scheme else ' and the file.')
        raise UserError(f'{source} does not have the SHA-256 digest {sha256}. {cure}')
    return path


def file_sha256(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 digest of a file's bytes."""
    digest = hashlib.sha256()
    try:
        with open(path, 'rb') as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise UserError(f'Cannot read {path}: {error.strerror}. Check its permissions.') from error
    return digest.hexdigest()


def _cache_path(url: str, cache_dir: Path) -> Path:
    """A name that no two URLs share and that people recognise."""
    name = re.sub(r'[^A-Za-z0-9._-]', '_', urllib.parse.urlsplit(url).path.rsplit('/', 1)[-1])[-100:]
    return cache_dir / f'{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name or "file"}'


def _download(url: str, path: Path, sha256: str | None, timeout: float) -> None:
    """Bring `url` to `path`, whole; try again where the connection breaks or stalls, or the server has a bad moment."""
    import requests  # slow to import, and most runs read local files
    print(f'Downloading {url}', file=sys.stderr, flush=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'Cannot create the download cache {path.parent}: {error.strerror}.') from error
    for attempt in range(ATTEMPTS):
        try:
            time.sleep(2 ** attempt - 1)
            with requests.Session() as session, atomic_write(path) as file:
                return _fetch(session, url, file, sha256, timeout)
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, requests.exceptions.TooManyRedirects) as error:
            raise UserError(f'Cannot download {url}: {error}. Only http(s) is followed. Check the URL.') from error
        except requests.Timeout as error:
            problem, cause = f'nothing came for {timeout:g} seconds', error
        except requests.RequestException as error:
            problem, cause = _explain(error), error
    raise UserError(f'Cannot download {url}: {problem} ({ATTEMPTS} attempts). '
                    'Check the connection and try again, or download it elsewhere and give the path.') from cause


def _explain(error: Exception) -> str:
    """What went wrong with a connection, without the client library's object names."""
    if (response := getattr(error, 'response', None)) is not None:
        return f'the server answered {response.status_code} {response.reason}'
    text = str(error)
    if 'Read timed out' in text:
        return 'the connection stalled'
    if 'IncompleteRead' in text or 'bytes missing' in text:
        return 'the download broke off before its end'
    return 'the connection failed'


def _fetch(session, url: str, file: BinaryIO, sha256: str | None, timeout: float) -> None:
    """One attempt: the bytes of `url` into `file`, their number checked against what the server announced."""
    with _request(session, url, timeout) as response:
        length = response.headers.get('Content-Length')
        if length is not None and not length.isdecimal():
            raise UserError(f'Cannot download {url}: the server announced a length of {length!r}. Download it elsewhere and give the path.')
        if length is None and 'chunked' not in response.headers.get('Transfer-Encoding', '').lower() and sha256 is None:
            raise UserError(f'Cannot download {url}: the server does not say how long the file is, so a broken download would go unnoticed. '
                            'Give the SHA-256 digest, or download it elsewhere and give the path.')
        digest, received = hashlib.sha256(), 0
        for chunk in response.iter_content(CHUNK):
            file.write(chunk)
            digest.update(chunk)
            received += len(chunk)
    if length is not None and received != int(length):
        raise UserError(f'Cannot download {url}: {received} bytes came, {length} were announced. '
                        'Try again, or download it elsewhere and give the path.')
    if sha256 is not None and digest.hexdigest() != sha256.lower():
        raise UserError(f'{url} has the SHA-256 digest {digest.hexdigest()}, not {sha256}. Check the URL and the expected digest.')


def _request(session, url: str, timeout: float):
    """The response whose body is the file. Compression is declined, so that Content-Length counts the file's bytes."""
    def get(address, **parameters):
        response = session.get(address, params=parameters, stream=True, timeout=timeout, headers={'Accept-Encoding': 'identity'})
        if response.status_code >= 500 or response.status_code == 429:
            response.raise_for_status()  # worth another attempt
        if response.status_code != 200:
            raise UserError(f'Cannot download {url}: the server answered {response.status_code} {response.reason}. '
                            'Check the URL, or download the file elsewhere and give the path.')
        return response

    response = get(_drive_address(url))
    if _is_page(response) and urllib.parse.urlsplit(response.url).netloc in DRIVE_HOSTS:
        form = _DriveForm(response.text)
        if form.action is not None:
            response = get(urllib.parse.urljoin(response.url, form.action), **form.fields)
    if _is_page(response):
        raise UserError(f'{url} is a web page, not a file (a log-in, a quota, a wrong link?). Download the file in a browser and give its path.')
    return response


def _is_page(response) -> bool:
    return response.headers.get('Content-Type', '').lower().startswith('text/html')


def _drive_address(url: str) -> str:
    """The download address behind a Google Drive link of any form; other URLs as they are."""
    parts = urllib.parse.urlsplit(url)
    if parts.netloc not in DRIVE_HOSTS or parts.path.endswith('/download'):
        return url
    ids = re.findall(r'/d/([\w-]+)', parts.path) + urllib.parse.parse_qs(parts.query).get('id', [])
    return f'{parts.scheme}://{parts.netloc}/uc?export=download&id={ids[0]}' if ids else url


class _DriveForm(html.parser.HTMLParser):
    """The form on Google Drive's page "too large to be scanned for viruses": its address and hidden fields."""

    def __init__(self, page: str):
        super().__init__()
        self.action: str | None = None
        self.fields: dict[str, str] = {}
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag == 'form' and attributes.get('id') == 'download-form':
            self.action = attributes.get('action')
        elif tag == 'input' and self.action is not None and attributes.get('name'):
            self.fields[attributes['name']] = attributes.get('value') or ''
