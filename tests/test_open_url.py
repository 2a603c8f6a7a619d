"""Downloads against a local server that misbehaves on purpose, and files that appear whole or not at all."""
import hashlib
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dnnlib import util
from dnnlib.util import UserError, atomic_write, local_path, open_url

CONTENT = bytes(range(256)) * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
CONFIRM = (b'<html><form id="download-form" action="/confirmed" method="get"><input type="hidden" name="id" value="x1">'
           b'<input type="hidden" name="confirm" value="t"></form>')


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
        elif path == '/moved':
            self.send(b'', status=302, Location='/file.bin')
        elif path == '/to-disk':
            self.send(b'', status=302, Location='file:///etc/hostname')
        elif path == '/uc' and query == 'export=download&id=x1':
            self.send(CONFIRM, Content_Type='text/html; charset=utf-8')
        elif path == '/confirmed' and query == 'id=x1&confirm=t':
            self.send(CONTENT)
        elif path == '/busy':
            self.send(b'', status=503)
        elif path == '/page':
            self.send(b'<html>log in</html>', Content_Type='text/html')
        else:
            self.send(b'', status=404)


@pytest.fixture
def server(monkeypatch):
    """The address of a server on this machine; `server.requests` is what it was asked for."""
    monkeypatch.setattr(util.time, 'sleep', lambda seconds: None)
    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
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


def test_a_download_is_whole_and_happens_once(server, tmp_path):
    for _ in range(2):
        with open_url(f'{server.url}/file.bin', cache_dir=tmp_path / 'cache', sha256=DIGEST) as file:
            assert file.seekable() and file.read() == CONTENT
    assert server.requests == ['/file.bin']
    (name,) = files_in(tmp_path)
    assert name.endswith('-file.bin')


def test_equal_names_at_different_addresses_do_not_collide(server, tmp_path):
    paths = {local_path(f'{server.url}/file.bin?v={v}', cache_dir=tmp_path) for v in (1, 2)}
    assert len(paths) == 2


def test_a_broken_connection_is_tried_again(server, tmp_path):
    assert local_path(f'{server.url}/flaky', cache_dir=tmp_path).read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_redirects_lead_to_the_file(server, tmp_path):
    assert local_path(f'{server.url}/moved', cache_dir=tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize('path, words, attempts', [
    ('/truncated', 'broke off', 3),
    ('/stalled', 'stalled', 3),
    ('/busy', '503', 3),
    ('/missing', '404', 1),
    ('/odd-length', "'many'", 1),
    ('/no-length', 'does not say how long', 1),
    ('/to-disk', 'Only http', 1),
    ('/page', 'is a web page', 1),
])
def test_a_failed_download_names_the_url_and_leaves_nothing(server, tmp_path, path, words, attempts):
    with pytest.raises(UserError, match=words) as error:
        open_url(server.url + path, cache_dir=tmp_path, timeout=0.2)
    assert server.url + path in str(error.value) and '\n' not in str(error.value)
    assert files_in(tmp_path) == []
    assert len(server.requests) == attempts


def test_a_digest_makes_up_for_a_missing_length(server, tmp_path):
    assert local_path(f'{server.url}/no-length', cache_dir=tmp_path, sha256=DIGEST).read_bytes() == CONTENT


def test_a_wrong_digest_is_refused_before_and_after_caching(server, tmp_path):
    wrong = '0' * 64
    with pytest.raises(UserError, match=DIGEST):
        local_path(f'{server.url}/file.bin', cache_dir=tmp_path, sha256=wrong)
    assert files_in(tmp_path) == []
    local_path(f'{server.url}/file.bin', cache_dir=tmp_path)
    with pytest.raises(UserError, match='delete'):
        local_path(f'{server.url}/file.bin', cache_dir=tmp_path, sha256=wrong)


def test_nobody_listening_is_an_error_in_one_line(server, tmp_path):
    port = server.server_port
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match='connection failed'):
        local_path(f'http://127.0.0.1:{port}/file.bin', cache_dir=tmp_path)


def test_google_drive_confirmation_is_given(server, tmp_path, monkeypatch):
    monkeypatch.setattr(util, 'DRIVE_HOSTS', (server.url.removeprefix('http://'),))
    assert local_path(f'{server.url}/file/d/x1/view?usp=sharing', cache_dir=tmp_path).read_bytes() == CONTENT
    assert server.requests == ['/uc?export=download&id=x1', '/confirmed?id=x1&confirm=t']


@pytest.mark.parametrize('source, words', [
    ('ftp://example.org/x.pkl', 'ftp:// is not supported'),
    ('file:///etc/hostname', 'file:// is not supported'),
    ('s3://bucket/x.pkl', 's3:// is not supported'),
    ('no/such/file.pkl', 'does not exist'),
    ('.', 'is a directory'),
    ('http://', 'Check the URL'),
])
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
