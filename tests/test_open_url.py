"""Downloads against a local server that misbehaves on purpose, and files that appear whole or not at all."""

import gzip
import hashlib
import io
import itertools
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import ROOT

from dnnlib import downloads, google_drive, transport
from dnnlib.downloads import local_path, open_url
from dnnlib.util import UserError, atomic_write

CONTENT = bytes(range(256)) * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
REPLACEMENT = b'new' + CONTENT[3:]
NEW_DIGEST = hashlib.sha256(REPLACEMENT).hexdigest()
CONFIRM = (
    b'<html><form id="download-form" action="/confirmed" method="get"><input type="hidden" name="id" value="x1">'
    b'<input type="hidden" name="confirm" value="t"></form>'
)
OLDER_CONFIRM = {
    '/older-form': b'<form id="downloadForm" action="/confirmed?id=x1&amp;confirm=t" method="post"><input type="submit"></form>',
    '/older-link': b'<html><a href="/help">?</a><a id="uc-download-link" href="/confirmed?id=x1&amp;confirm=t">Download anyway</a>',
}
STATUSES = {'/busy': 503, '/broken': 500, '/too-many': 429, '/gone': 410}
REDIRECTIONS = {
    '/moved': '/file.bin',
    '/loop': '/loop',
    '/to-disk': 'file:///etc/hostname',
    '/to-data': 'data:text/plain,x',
    '/to-ftp': 'ftp://h/x',
    '/to-nowhere': 'http://[',
}
OK, CHUNKED = b'HTTP/1.1 200 OK\r\n', b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n'
DRIPPING = {  # parts of an answer that is never over, a moment after one another
    '/status': lambda: itertools.chain([b'HTTP/1.1 200 '], itertools.repeat(b'O')),
    '/header': lambda: itertools.chain([OK, b'X: '], itertools.repeat(b'x')),
    '/not-yet': lambda: itertools.repeat(b'HTTP/1.1 100 Continue\r\n\r\n'),
    '/moved-slowly': lambda: itertools.chain([b'HTTP/1.1 302 Found\r\nLocation: /'], itertools.repeat(b'x')),
    '/slow-page': lambda: itertools.chain(
        [OK, b'Content-Type: text/html\r\nContent-Length: 999999\r\n\r\n'], itertools.repeat(b'x')
    ),
    '/chunk-size': lambda: itertools.chain([CHUNKED, b'5;'], itertools.repeat(b'x')),
    '/trailers': lambda: itertools.chain([CHUNKED, b'3\r\nabc\r\n0\r\n'], itertools.repeat(b'X: y\r\n')),
    '/last-trailer': lambda: itertools.chain([CHUNKED, b'3\r\nabc\r\n0\r\nX: '], itertools.repeat(b'y')),
}
sleep = time.sleep


class QuietServer(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """Clients that hang up are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass

    def send(self, body, length=None, status=200, **headers):
        self.send_response(status)
        self.send_header('Content-Length', str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.server.requests.append(self.path)
        path, _, query = self.path.partition('?')
        if path == '/file.bin' or (path == '/flaky' and len(self.server.requests) > 1):
            self.send(CONTENT)
        elif path in ('/truncated', '/flaky'):
            self.send(CONTENT[:1000], length=len(CONTENT))
            self.close_connection = True
        elif path == '/stalled':
            self.send(CONTENT[:1000], length=len(CONTENT))
            self.server.released.wait(20)
        elif path == '/odd-length':
            self.send(CONTENT, length='many')
            self.close_connection = True
        elif path == '/no-length':
            self.send_response(200)
            self.end_headers()
            self.wfile.write(CONTENT)
            self.close_connection = True
        elif path == '/silent':
            self.server.released.wait(20)
        elif path == '/kept-open':
            self.send(CONTENT)
            self.server.released.wait(20)
        elif path == '/dripping':
            self.send(b'', length=len(CONTENT))
            while not self.server.released.wait(0.05):
                self.wfile.write(b'.')
        elif path == '/reset':
            self.send(CONTENT[:200_000], length=len(CONTENT))
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            self.close_connection = True
        elif path == '/one-more':
            self.send(CONTENT + b'.', length=len(CONTENT))
            self.close_connection = True
        elif path in ('/too-short', '/endless'):
            self.send(CONTENT, length=1000)
            while path == '/endless':
                self.wfile.write(CONTENT)
            self.close_connection = True
        elif path == '/enormous':
            self.send(CONTENT, length=10**17)
            self.close_connection = True
        elif path == '/slow':
            self.send(CONTENT[:100_000], length=len(CONTENT))
            self.server.released.wait(20)
            self.wfile.write(CONTENT[100_000:])
        elif path in ('/chunks', '/broken-chunks'):
            self.send_response(200)
            self.send_header('Transfer-Encoding', 'chunked')
            self.end_headers()
            self.wfile.write(b'%x\r\n%b\r\n' % (len(CONTENT), CONTENT) + b'0\r\n\r\n' * (path == '/chunks'))
            self.close_connection = True
        elif path == '/compressed':
            self.send(gzip.compress(CONTENT), Content_Encoding='gzip')
        elif path in REDIRECTIONS:
            self.send(b'', status=302, Location=REDIRECTIONS[path])
        elif path in OLDER_CONFIRM:
            self.send(OLDER_CONFIRM[path], Content_Type='text/html')
        elif path == '/uc' and query == 'export=download&id=x1':
            self.send(CONFIRM, Content_Type='text/html; charset=utf-8')
        elif path == '/confirmed' and query == 'id=x1&confirm=t':
            self.send(CONTENT)
        elif path in STATUSES:
            self.send(b'', status=STATUSES[path])
        elif path == '/page':
            self.send(b'<html>log in</html>', Content_Type='text/html')
        elif path == '/unnamed-page':
            self.send(
                b'\n<!DOCTYPE html><html>log in' + bytes(2_000_000), Content_Type='application/octet-stream'
            )
        elif path in DRIPPING:
            for part in DRIPPING[path]():
                self.wfile.write(part)
                if self.server.released.wait(0.02):
                    break
            self.close_connection = True
        elif path == '/hop':
            self.server.released.wait(0.04)
            self.send(b'', status=302, Location=f'/hop?{len(self.server.requests)}')
        elif path == '/replaced':
            self.send(CONTENT if len(self.server.requests) == 1 else REPLACEMENT)
        else:
            self.send(b'', status=404)


@pytest.fixture
def server(monkeypatch):
    """The address of a server on this machine; `server.requests` is what it was asked for."""
    monkeypatch.setattr(transport.time, 'sleep', lambda seconds: None)
    with QuietServer(('127.0.0.1', 0), Handler) as server:
        server.requests, server.released = [], threading.Event()
        server.url = f'http://127.0.0.1:{server.server_port}'
        thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


def files_in(folder):
    return [name for _, _, names in os.walk(folder) for name in names]


def test_local_files_open_as_they_are(tmp_path):
    (tmp_path / 'a.bin').write_bytes(CONTENT)
    with open_url(tmp_path / 'a.bin', sha256=DIGEST.upper()) as file:
        file.seek(256)
        assert file.read(2) == b'\x00\x01'
    assert local_path(str(tmp_path / 'a.bin')) == tmp_path / 'a.bin'
    (tmp_path / 'a:b#sha256=c').write_bytes(CONTENT)
    assert local_path(tmp_path / 'a:b#sha256=c').read_bytes() == CONTENT
    for wrong, words in (('0' * 64, 'does not have the SHA-256 digest'), ('0' * 63, '64 hexadecimal digits')):
        with pytest.raises(UserError, match=words):
            open_url(tmp_path / 'a.bin', sha256=wrong)


def test_a_download_is_whole_and_happens_once(server, tmp_path):
    for _ in range(2):
        with open_url(f'{server.url}/file.bin', cache_dir=tmp_path / 'cache', sha256=DIGEST) as file:
            assert file.seekable() and file.read() == CONTENT
    assert server.requests == ['/file.bin']
    name, record = sorted(files_in(tmp_path))
    assert name.endswith('-file.bin') and record == f'{name}.json'
    assert json.loads((tmp_path / 'cache' / record).read_text()) == dict(
        url=f'{server.url}/file.bin', bytes=len(CONTENT), sha256=DIGEST
    )


@pytest.mark.parametrize('terminal', [True, False])
def test_a_terminal_shows_how_far_a_download_is(server, tmp_path, monkeypatch, terminal):
    screen = io.StringIO()
    screen.isatty = lambda: terminal
    monkeypatch.setattr(sys, 'stderr', screen)
    local_path(f'{server.url}/file.bin', cache_dir=tmp_path)
    assert ('256k' in screen.getvalue()) == terminal and 'Downloading' in screen.getvalue()


def test_equal_names_at_different_addresses_do_not_collide(server, tmp_path):
    paths = {local_path(f'{server.url}/file.bin?v={v}', cache_dir=tmp_path) for v in (1, 2)}
    assert len(paths) == 2


def test_a_broken_connection_is_tried_again(server, tmp_path):
    assert local_path(f'{server.url}/flaky', cache_dir=tmp_path).read_bytes() == CONTENT
    assert len(server.requests) == 2


@pytest.mark.parametrize('path', ['/moved', '/chunks', '/kept-open'])
def test_redirections_chunks_and_open_connections_lead_to_the_file(server, tmp_path, path):
    assert local_path(server.url + path, cache_dir=tmp_path, timeout=0.3).read_bytes() == CONTENT


@pytest.mark.parametrize(
    'path, words, attempts',
    [
        ('/truncated', '256,000 bytes were announced, and 1,000 came', 3),
        ('/too-short', '1,000 bytes were announced, and more came', 3),
        ('/one-more', '256,000 bytes were announced, and more came', 3),
        ('/endless', '1,000 bytes were announced, and more came', 3),
        ('/reset', 'broke off after|200,000 came', 3),  # as it happens to be noticed
        ('/stalled', 'stalled after 1,000 bytes', 3),
        ('/silent', 'nothing came for 0.2 seconds', 3),
        ('/dripping', 'less than 1,000 a second', 3),
        ('/compressed', r'encodes it \(gzip\)', 1),
        ('/busy', '503', 3),
        ('/broken', '500', 3),
        ('/too-many', '429', 3),
        ('/gone', '410', 1),
        ('/missing', '404', 1),
        ('/broken-chunks', 'broke off after 256,000 bytes', 3),
        ('/odd-length', "'many'", 1),
        ('/enormous', 'are free in', 1),
        ('/no-length', 'does not say how long', 1),
        ('/loop', 'redirects without end', 31),
        ('/to-disk', 'something else than http.*file:///etc/hostname', 1),
        ('/to-data', 'something else than http.*data:text', 1),
        ('/to-ftp', 'something else than http.*ftp://h/x', 1),
        ('/to-nowhere', 'Check the URL', 1),
        ('/page', 'is a web page', 1),
        ('/unnamed-page', 'is a web page', 1),
    ],
)
def test_a_failed_download_names_the_url_and_leaves_nothing(server, tmp_path, path, words, attempts):
    with pytest.raises(UserError, match=words) as error:
        open_url(server.url + path, cache_dir=tmp_path, timeout=0.2)
    assert server.url + path in str(error.value) and '\n' not in str(error.value)
    assert files_in(tmp_path) == []
    assert len(server.requests) == attempts


def test_a_digest_makes_up_for_a_missing_length(server, tmp_path):
    assert local_path(f'{server.url}/no-length', cache_dir=tmp_path, sha256=DIGEST).read_bytes() == CONTENT


def test_a_wrong_digest_is_refused_before_and_after_caching(server, tmp_path):
    """Afterwards the file might be an old one, so it is downloaded again; the cached one stays."""
    wrong = '0' * 64
    with pytest.raises(UserError, match=DIGEST):
        local_path(f'{server.url}/file.bin', cache_dir=tmp_path, sha256=wrong)
    assert files_in(tmp_path) == []
    path = local_path(f'{server.url}/file.bin', cache_dir=tmp_path)
    with pytest.raises(UserError, match=DIGEST):
        local_path(f'{server.url}/file.bin', cache_dir=tmp_path, sha256=wrong)
    assert path.read_bytes() == CONTENT and len(server.requests) == 3


def test_a_digest_can_stand_in_the_url(server, tmp_path):
    """As pip writes it; the server does not see it, and the file is the same with and without it."""
    for fragment in (f'#sha256={DIGEST}', '', f'#sha256={DIGEST.upper()}'):
        assert local_path(f'{server.url}/file.bin{fragment}', cache_dir=tmp_path).read_bytes() == CONTENT
    assert (
        local_path(f'{server.url}/file.bin#sha256={DIGEST}', cache_dir=tmp_path, sha256=DIGEST).read_bytes()
        == CONTENT
    )
    assert server.requests == ['/file.bin']
    with pytest.raises(UserError, match='has the SHA-256 digest'):
        local_path(f'{server.url}/file.bin?other#sha256={"0" * 64}', cache_dir=tmp_path)
    with pytest.raises(UserError, match='another SHA-256 digest than the one'):
        local_path(f'{server.url}/file.bin#sha256={"0" * 64}', cache_dir=tmp_path, sha256=DIGEST)


@pytest.mark.parametrize(
    'fragment, words',
    [
        ('#sha256=', '64 hexadecimal digits'),
        (f'#sha256={DIGEST}0', '64 hexadecimal digits'),
        (f'#sha256={DIGEST[:-1]}', '64 hexadecimal digits'),
        (f'#sha256={DIGEST[:-1]}g', '64 hexadecimal digits'),
        (f'#sha256={DIGEST}&egg=x', '64 hexadecimal digits'),
        (f'#md5={DIGEST}', 'means nothing here'),
        (f'#{DIGEST}', 'means nothing here'),
        ('#top', 'means nothing here'),
    ],
)
def test_a_malformed_digest_in_a_url_is_refused_before_anything_is_asked_for(
    server, tmp_path, fragment, words
):
    with pytest.raises(UserError, match=words):
        open_url(f'{server.url}/file.bin{fragment}', cache_dir=tmp_path)
    assert server.requests == [] and files_in(tmp_path) == []


@pytest.mark.parametrize(
    'damage',
    [
        lambda path: path.write_bytes(CONTENT[:-1]),
        lambda path: path.write_bytes(b''),
        lambda path: downloads._record_path(path).unlink(),
        lambda path: downloads._record_path(path).write_text('{'),
        lambda path: downloads._record_path(path).write_text('[1]'),
    ],
    ids=['cut', 'emptied', 'no record', 'broken record', 'odd record'],
)
def test_a_cached_file_of_another_length_than_was_downloaded_is_downloaded_again(
    server, tmp_path, capfd, damage
):
    path = local_path(f'{server.url}/file.bin', cache_dir=tmp_path)
    damage(path)
    assert local_path(f'{server.url}/file.bin', cache_dir=tmp_path).read_bytes() == CONTENT
    assert len(server.requests) == 2 and f'{path} is not as long' in capfd.readouterr().err


def test_a_changed_byte_in_the_cache_is_noticed_where_the_digest_is_known(server, tmp_path):
    path = local_path(f'{server.url}/file.bin', cache_dir=tmp_path)
    path.write_bytes(b'X' + CONTENT[1:])
    assert local_path(f'{server.url}/file.bin', cache_dir=tmp_path).read_bytes() != CONTENT
    assert local_path(f'{server.url}/file.bin#sha256={DIGEST}', cache_dir=tmp_path).read_bytes() == CONTENT


def test_a_pinned_file_that_changed_in_the_cache_is_downloaded_again(server, tmp_path, capfd):
    path = local_path(f'{server.url}/file.bin', cache_dir=tmp_path, pinned=True)
    path.write_bytes(REPLACEMENT)
    with open_url(f'{server.url}/file.bin', cache_dir=tmp_path, pinned=True) as file:
        assert file.read() == CONTENT
    assert (
        len(server.requests) == 2 and f'{path} does not have the expected SHA-256' in capfd.readouterr().err
    )


@pytest.mark.parametrize(
    'damage',
    [
        lambda path: path.write_bytes(b'bad' + CONTENT[3:]),
        lambda path: path.write_bytes(CONTENT[:-1]),
        lambda path: path.unlink(),
    ],
    ids=['changed', 'cut', 'gone'],
)
def test_a_pinned_file_that_was_replaced_on_the_server_is_refused(server, tmp_path, damage):
    """Both digests and both cures are named; the record of the first download stays, so that the next run is refused too."""
    url = f'{server.url}/replaced'
    path = local_path(url, cache_dir=tmp_path, pinned=True)
    record = downloads._record_path(path)
    damage(path)
    for _ in range(2):
        with pytest.raises(UserError, match=f'{NEW_DIGEST}, not {DIGEST}') as error:
            local_path(url, cache_dir=tmp_path, pinned=True)
        assert f'--detector-sha256={NEW_DIGEST}' in str(error.value) and f'delete {record}' in str(
            error.value
        )
        assert json.loads(record.read_text())['sha256'] == DIGEST and not [
            name for name in files_in(tmp_path) if name.endswith('.tmp')
        ]
    assert local_path(url, cache_dir=tmp_path, pinned=True, sha256=NEW_DIGEST).read_bytes() == REPLACEMENT
    assert (
        local_path(url, cache_dir=tmp_path, pinned=True).read_bytes() == REPLACEMENT
        and len(server.requests) == 4
    )


def test_an_expected_digest_that_the_cached_file_has_becomes_the_recorded_one(server, tmp_path):
    path = local_path(f'{server.url}/file.bin', cache_dir=tmp_path, pinned=True)
    path.write_bytes(REPLACEMENT)
    for sha256 in (NEW_DIGEST, None):
        assert (
            local_path(f'{server.url}/file.bin', cache_dir=tmp_path, pinned=True, sha256=sha256).read_bytes()
            == REPLACEMENT
        )
    assert server.requests == ['/file.bin']


def test_deleting_the_record_accepts_a_replaced_file(server, tmp_path):
    path = local_path(f'{server.url}/replaced', cache_dir=tmp_path, pinned=True)
    downloads._record_path(path).unlink()
    assert local_path(f'{server.url}/replaced', cache_dir=tmp_path, pinned=True).read_bytes() == REPLACEMENT
    path.write_bytes(CONTENT)
    assert local_path(f'{server.url}/replaced', cache_dir=tmp_path, pinned=True).read_bytes() == REPLACEMENT


def test_who_does_not_pin_does_not_pay_for_a_digest(server, tmp_path, monkeypatch):
    path = local_path(f'{server.url}/file.bin', cache_dir=tmp_path, pinned=True)
    monkeypatch.setattr(downloads, 'file_sha256', lambda path: pytest.fail('the file was read'))
    assert local_path(f'{server.url}/file.bin', cache_dir=tmp_path) == path
    assert local_path(path, pinned=True) == path


def download_in_a_process(url, cache_dir):
    code = 'import sys; from dnnlib import downloads; print(downloads.file_sha256(downloads.local_path(*sys.argv[1:])))'
    return subprocess.Popen(
        [sys.executable, '-c', code, url, str(cache_dir)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, 'it did not happen'
        sleep(0.01)


def test_processes_that_download_the_same_file_at_the_same_time_do_not_disturb_each_other(server, tmp_path):
    processes = [download_in_a_process(f'{server.url}/slow', tmp_path) for _ in range(3)]
    wait_until(lambda: len(server.requests) == 3)
    assert not [name for name in files_in(tmp_path) if not name.startswith('.')]
    server.released.set()
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out.strip()) == (0, DIGEST), err
    assert sorted(name[16:] for name in files_in(tmp_path)) == ['-slow', '-slow.json']


def test_a_killed_download_leaves_no_half_file_and_the_next_one_is_whole(server, tmp_path):
    process = download_in_a_process(f'{server.url}/slow', tmp_path)
    wait_until(lambda: server.requests and files_in(tmp_path))
    process.kill()
    process.communicate()
    (leftover,) = files_in(tmp_path)
    assert leftover.startswith('.') and leftover.endswith('.tmp')
    server.released.set()
    assert local_path(f'{server.url}/slow', cache_dir=tmp_path).read_bytes() == CONTENT
    assert leftover in files_in(tmp_path), 'it might have been the unfinished file of another process'


def test_the_leftovers_of_yesterday_go_with_the_next_download(server, tmp_path):
    path = local_path(f'{server.url}/file.bin', cache_dir=tmp_path)
    for name, age in ((f'.{path.name}.1-ab.tmp', 25), (f'.{path.name}.2-ab.tmp', 1), ('.other.1-ab.tmp', 25)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age * 3600,) * 2)
    path.unlink()
    local_path(f'{server.url}/file.bin', cache_dir=tmp_path)
    assert {name for name in files_in(tmp_path) if name.endswith('.tmp')} == {
        f'.{path.name}.2-ab.tmp',
        '.other.1-ab.tmp',
    }


def test_nobody_listening_is_an_error_in_one_line(server, tmp_path):
    port = server.server_port
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match='connection failed'):
        local_path(f'http://127.0.0.1:{port}/file.bin', cache_dir=tmp_path)


def test_google_drive_confirmation_is_given(server, tmp_path, monkeypatch):
    monkeypatch.setattr(google_drive, 'HOSTS', (server.url.removeprefix('http://'),))
    assert local_path(f'{server.url}/file/d/x1/view?usp=sharing', cache_dir=tmp_path).read_bytes() == CONTENT
    assert server.requests == ['/uc?export=download&id=x1', '/confirmed?id=x1&confirm=t']


@pytest.mark.parametrize('path', OLDER_CONFIRM)
def test_older_confirmations_are_given_too(server, tmp_path, path):
    assert local_path(server.url + path, cache_dir=tmp_path).read_bytes() == CONTENT
    assert server.requests == [path, '/confirmed?id=x1&confirm=t']


@pytest.mark.parametrize(
    'source, words',
    [
        ('ftp://example.org/x.pkl', 'ftp: is not supported'),
        ('file:///etc/hostname', 'file: is not supported'),
        ('FILE:/etc/hostname', 'FILE: is not supported'),
        ('s3://bucket/x.pkl', 's3: is not supported'),
        ('data:text/plain,x', 'data: is not supported'),
        ('http:/example.org/x.pkl', 'begins with http://'),
        ('no/such/file.pkl', 'does not exist'),
        ('.', 'is a directory'),
        ('http://', 'Check the URL'),
        ('http:///x.pkl', 'Check the URL'),
        ('http://[/x.pkl', 'Check the URL'),
        ('http://a:b/x.pkl', 'Check the URL'),
    ],
)
def test_what_cannot_be_opened_is_named(source, words, tmp_path):
    with pytest.raises(UserError, match=words):
        open_url(source, cache_dir=tmp_path)


def test_atomic_write_shows_nothing_until_the_end(tmp_path):
    path = tmp_path / 'a.bin'
    path.write_bytes(b'old')
    with atomic_write(path) as file:
        file.write(b'new')
        file.flush()
        assert path.read_bytes() == b'old'
    assert path.read_bytes() == b'new' and files_in(tmp_path) == ['a.bin']
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask, 'colleagues could not read it'


def test_atomic_write_leaves_the_old_file_where_the_block_fails(tmp_path):
    path = tmp_path / 'a.bin'
    path.write_bytes(b'old')
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b'half')
        raise KeyboardInterrupt
    assert path.read_bytes() == b'old' and files_in(tmp_path) == ['a.bin']


def test_atomic_write_explains_a_full_disk_and_a_missing_folder(tmp_path):
    with pytest.raises(UserError, match='No space'), atomic_write(tmp_path / 'a.bin'):
        raise OSError(28, 'No space left on device')
    assert files_in(tmp_path) == []
    with pytest.raises(UserError, match='existing directory'), atomic_write(tmp_path / 'nowhere' / 'a.bin'):
        pass


@pytest.mark.parametrize('path', [*DRIPPING, '/hop'])
def test_an_answer_that_is_never_over_is_given_up(server, tmp_path, monkeypatch, path):
    """Something comes all the time: no timeout of a socket would end it."""
    monkeypatch.setattr(transport, 'ATTEMPTS', 2)
    start = time.monotonic()
    with pytest.raises(UserError, match=r'took more than 0.4 seconds to answer|stalled after'):
        local_path(f'{server.url}{path}', cache_dir=tmp_path, timeout=0.1)
    assert time.monotonic() - start < 5 and not files_in(tmp_path)


def test_a_process_that_has_given_up_ends(server, tmp_path):
    """Although the thread that was at it still waits."""
    setup = 'from dnnlib import downloads, transport\ntransport.ATTEMPTS = 1'
    code = f'{setup}\ndownloads.local_path({server.url + "/header"!r}, {str(tmp_path)!r}, timeout=0.2)'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert 'took more than 0.8 seconds to answer' in done.stderr


def test_a_million_lines_of_header_are_no_answer(server, tmp_path, monkeypatch):
    monkeypatch.setattr(transport, 'ATTEMPTS', 1)
    monkeypatch.setitem(DRIPPING, '/header', lambda: [OK + b'X: y\r\n' * 1_000_000])
    with pytest.raises(UserError, match='the connection failed'):
        local_path(f'{server.url}/header', cache_dir=tmp_path)


def test_the_body_of_a_redirection_is_not_read(server, tmp_path, monkeypatch):
    moved = b'HTTP/1.1 302 Found\r\nLocation: /file.bin\r\nContent-Length: 99999999999\r\n\r\n'
    monkeypatch.setitem(DRIPPING, '/header', lambda: itertools.chain([moved], itertools.repeat(b'x' * 1000)))
    assert local_path(f'{server.url}/header', cache_dir=tmp_path, timeout=1).read_bytes() == CONTENT


@pytest.mark.parametrize('limit', ['UNANNOUNCED_DOWNLOAD', 'KEPT_FREE'])
def test_chunks_without_end_stop_where_there_is_no_room(server, tmp_path, monkeypatch, limit):
    chunk = b'%x\r\n%b\r\n' % (len(CONTENT), CONTENT)
    monkeypatch.setitem(DRIPPING, '/header', lambda: itertools.chain([CHUNKED], itertools.repeat(chunk)))
    monkeypatch.setattr(
        transport, limit, {'UNANNOUNCED_DOWNLOAD': 2 * len(CONTENT), 'KEPT_FREE': 10**18}[limit]
    )
    with pytest.raises(UserError, match=r'does not say how long it is, .* no room'):
        local_path(f'{server.url}/header#sha256={DIGEST}', cache_dir=tmp_path)
    assert not files_in(tmp_path)
