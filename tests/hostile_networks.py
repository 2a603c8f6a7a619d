"""Hostile files for the readers of networks, states, weights, records of runs and URLs: more of the table in `hostile`."""

import contextlib
import io
import json
import os
import pickle
import socket
import struct
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

Content = bytes | Callable[[Path], None]


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


# ----------------------------------------------------------------------------
# Readers: what a script does with a path. They import what they need, which is no part of what a file costs.


def read_snapshot(path: str) -> None:
    from training.checkpoint import load_network

    load_network(path)


def read_state(path: str) -> None:
    from training.run_files import load_state

    load_state(path)


def describe_network(path: str) -> None:
    """convert.py info"""
    import convert

    convert.main.main(['info', path], standalone_mode=False)


def read_openai(path: str) -> None:
    from training.interchange.openai import read_state_dict

    read_state_dict(path)


def read_detector(path: str) -> None:
    from metrics.detectors import load_detector

    load_detector(path)


def read_lpips(path: str) -> None:
    from metrics import lpips

    lpips.load(path)


def read_statistics(folder: str) -> None:
    from experiments.report import read_jsonl
    from training.run_log import forget_future

    forget_future(folder, 10)
    read_jsonl(f'{folder}/stats.jsonl')


def read_stage(folder: str) -> None:
    from training.rounds import recorded_options

    recorded_options(folder)


def read_results(path: str) -> None:
    from experiments.results import read_json

    read_json(Path(path), [])


def read_search_log(path: str) -> None:
    from experiments.search_log import read_log

    read_log(path)


def download(path: str) -> None:
    """The file's bytes are what a server answers, to every connection, whatever it asks."""
    import dnnlib.downloads
    import dnnlib.transport

    dnnlib.transport.ATTEMPTS = 1
    answer = Path(path).read_bytes()
    with socket.create_server(('127.0.0.1', 0)) as server, tempfile.TemporaryDirectory() as cache:

        def serve():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:  # closed: that was all
                    return
                with connection:
                    connection.recv(65536)
                    with contextlib.suppress(OSError):  # the other side may have had enough
                        connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            dnnlib.downloads.open_url(
                f'http://127.0.0.1:{server.getsockname()[1]}/net.pkl', cache_dir=cache, timeout=1
            ).close()
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


READERS = dict(
    snapshot=read_snapshot,
    state=read_state,
    info=describe_network,
    openai=read_openai,
    detector=read_detector,
    lpips=read_lpips,
    statistics=read_statistics,
    stage=read_stage,
    results=read_results,
    search=read_search_log,
    url=download,
)

# ----------------------------------------------------------------------------
# Makers of files.


def saved(contents, new: bool = True) -> bytes:
    data = io.BytesIO()
    torch.save(contents, data, _use_new_zipfile_serialization=new)
    return data.getvalue()


def zip_of(pickled: bytes, *members: tuple[str, bytes], method=zipfile.ZIP_STORED) -> bytes:
    """A PyTorch file whose contents are this pickle."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, 'w', method) as archive:
        archive.writestr('x/data.pkl', pickled)
        archive.writestr('x/byteorder', b'little')
        for name, content in members:
            archive.writestr(name, content)
    return data.getvalue()


def sealed(content: bytes) -> Callable[[Path], None]:
    """With a checksum at its end, as states have."""

    def write(path: Path) -> None:
        from torch_utils.sealed_file import sealed

        with sealed(path) as file:
            file.write(content)

    return write


class Named:
    """Pickles as a call of something by its name, with these arguments."""

    def __init__(self, name: Callable, *args):
        self.name, self.args = name, args

    def __reduce__(self):
        return self.name, self.args


def claiming(
    numel: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int = 0,
    key: str = '0',
    member: bytes = bytes(16),
) -> bytes:
    """A PyTorch file with one tensor, which says so of itself and has a storage of these bytes."""

    def integer(value: int) -> bytes:
        data = value.to_bytes(9, 'little', signed=True)
        return b'\x8a' + bytes([len(data)]) + data

    def text(value: str) -> bytes:
        return b'X' + struct.pack('<I', len(value.encode())) + value.encode()

    storage = (
        b'(' + text('storage') + b'ctorch\nFloatStorage\n' + text(key) + text('cpu') + integer(numel) + b'tQ'
    )
    sizes = [b'(' + b''.join(map(integer, numbers)) + b't' for numbers in (shape, stride)]
    tensor = (
        b'ctorch._utils\n_rebuild_tensor_v2\n('
        + storage
        + integer(offset)
        + b''.join(sizes)
        + b'\x89ccollections\nOrderedDict\n)RtR'
    )
    return zip_of(b'\x80\x02}' + text('time_embed.0.weight') + tensor + b's.', (f'x/data/{key}', member))


CLAIMS = [
    dict(numel=1 << 40, shape=(4,), stride=(1,)),
    dict(numel=4, shape=(1 << 40,), stride=(0,)),
    dict(numel=4, shape=(5,), stride=(1,)),
    dict(numel=4, shape=(4,), stride=(1,), offset=1),
    dict(numel=4, shape=(4,), stride=(-1,)),
    dict(numel=-4, shape=(4,), stride=(1,)),
    dict(numel=4, shape=(2, 2), stride=(1 << 62, 1)),
    dict(numel=4, shape=(4,), stride=()),
    dict(numel=4, shape=(1,) * 999, stride=(1,) * 999),
    dict(numel=4, shape=(4,), stride=(1,), key='../../etc/passwd'),
    dict(numel=3, shape=(3,), stride=(1,)),
    dict(numel=4, shape=(-1,), stride=(1,)),
    dict(numel=4, shape=(0, 1 << 62), stride=(1, 1)),
    dict(numel=0, shape=(0,), stride=(1,), member=b''),
    dict(numel=4, shape=(4,), stride=(1,)),
]
LINES = [
    b'{"nimg": 1e400}',
    b'{"nimg": NaN}',
    b'{"nimg": -1}',
    b'{"nimg": 1' + b'0' * 5000 + b'}',
    b'[' * 200_000,
    b'{"a":' * 200_000,
    b'\0' * 10**6,
    b'{"Progress/nimg": {"mean": 1e400}}',
    b'{"Progress/nimg": 7}',
    b'{"Progress/nimg": {"mean": "x"}}',
    b'{"Loss": {"mean": NaN}}',
    b'\xff\xfe',
    b'{"ema": "\\u001b[2J\\nError: no", "nimg": "x"}',
    b'{"timestamp": "now"}',
    b'"' + b'x' * 3_000_000 + b'"',
    b'{"search": 3}',
    b'{"search": {}}\n{"taus": [1e400], "value": 1}',
    b'{"search": {}}\n{"taus": [[[]]], "value": {}}',
    b'',
    b'null',
    b'{"a": ' + b'[' * 900 + b']' * 900 + b'}',
]
TEXTS = [
    b'[',
    b'{}',
    b'[[]]',
    b'[{"model": 1}]',
    b'[' * 200_000,
    b'1' * 5000,
    b'NaN',
    b'\xff',
    b'',
    b'{"seed": 1e400}',
    b' ' * 20_000_000,
    b'{"objective": "mcd", "dataset": [], "network": {}}',
    b'[{"objective": ["mcd"], "seed": {}}]',
    b'{"\\ud800": 1}',
    b'[' + b'[],' * 5_000_000 + b'[]]',
]


def answers() -> Iterator[bytes]:
    """What servers should not say."""
    ok = b'HTTP/1.1 200 OK\r\n'
    yield from (
        b'',
        b'\0' * 100,
        b'HTTP/1.1\r\n\r\n',
        b'HTTP/9.9 abc\r\n\r\n',
        b'HTTP/1.1 200 \x1b[2J\x1b[31m\r\nContent-Length: 1\r\n\r\nx',
        b'HTTP/1.1 404 \x1b[2JError: gone\r\nContent-Length: 0\r\n\r\n',
        b'HTTP/1.1 599 \xff\xfe\r\nContent-Length: 0\r\n\r\n',
        ok + b'X: ' + b'y' * 100_000 + b'\r\n\r\n',
        ok + b'X: y\r\n' * 100_000 + b'\r\n',
        ok + b'Content-Length: -1\r\n\r\n',
        ok + b'Content-Length: ' + b'9' * 5000 + b'\r\n\r\n',
        ok + b'Content-Length: 1' + b'0' * 17 + b'\r\n\r\nx',
        ok + b'Content-Length: 5\r\n\r\nabc',
        ok + b'Content-Length: 3\r\n\r\nabcdef',
        ok + b'\r\nabc',
        ok + b'Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc',
        ok + b'Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nabc',
        ok + b'Transfer-Encoding: chunked\r\n\r\n-5\r\nabc',
        ok + b'Transfer-Encoding: chunked\r\n\r\nzz\r\n',
        ok + b'Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n' + b'X: y\r\n' * 9999 + b'\r\n',
        ok + b'Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc',
        ok + b'Content-Type: text/html\r\nContent-Length: 30\r\n\r\n<html>Error: \x1b[2J</html>    ',
        ok
        + b'Content-Type: text/html\r\n\r\n<form id="download-form" action="file:///etc/passwd"><input name="a">',
        ok + b'Content-Type: text/html\r\n\r\n<form id="download-form" action="http://[::1">',
        ok + b'Content-Length: 0\r\n\r\n',
    )
    for target in (
        b'file:///etc/passwd',
        b'ftp://x/y',
        b'http://',
        b'http://[::1',
        b'//\x1b[2J/',
        b'/net.pkl',
        b'http://127.0.0.1:99999/',
        b'gopher:' + b'x' * 9999,
    ):
        yield b'HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: ' + target + b'\r\n\r\n'


def good_network() -> torch.nn.Module:
    from training import networks

    torch.manual_seed(0)
    return networks.EDMPrecond(
        img_resolution=8,
        img_channels=1,
        label_dim=2,
        model_type='DhariwalUNet',
        model_channels=4,
        channel_mult=[1],
        num_blocks=1,
        attn_resolutions=[],
        sigma_max=80.0,
    )


def good_snapshot() -> bytes:
    from training.checkpoint import save_snapshot

    with tempfile.TemporaryDirectory() as folder:
        save_snapshot(
            Path(folder, 'net.pkl'),
            good_network(),
            objective='mcd',
            S=2,
            sigmas=[80.0, 1.0, 0.0],
            rho=7.0,
            sigma_min=0.002,
            sigma_max=80.0,
        )
        return Path(folder, 'net.pkl').read_bytes()


def patched(data: bytes) -> Iterator[bytes]:
    """A snapshot's numbers, texts and names replaced by others of the same length."""
    for old, new in (
        (b'sigma_max', b'sigma_mux'),
        (b'img_resolution', b'img_resolutiom'),
        (b'EDMPrecond', b'EDMPrecone'),
        (b'DhariwalUNet', b'DhariwalUNut'),
        (b'torch_utils', b'torch_utilz'),
        (b'_reconstruct_persistent_obj', b'_reconstruct_persistent_abj'),
        (b'metadata', b'metadatb'),
        (b'FloatStorage', b'BloatStorage'),
        (b'mcd', b'm\x1bd'),
        (struct.pack('>d', 80.0), struct.pack('>d', float('nan'))),
        (struct.pack('>d', 80.0), struct.pack('>d', -1.0)),
        (struct.pack('>d', 7.0), struct.pack('>d', 0.0)),
        (struct.pack('>d', 0.5), struct.pack('>d', 0.0)),
        (struct.pack('>d', 0.5), struct.pack('>d', float('nan'))),
    ):
        if old in data:
            yield data.replace(old, new)


def cases(pickles: list[bytes], hollow: Callable) -> Iterator[tuple[str, str, Content]]:
    """(reader, file name, its contents or what writes it). `pickles`: hostile ones; `hollow`: see `hostile`."""
    for i, data in enumerate(pickles):
        yield 'snapshot', f'{i}.pkl', data
        yield ('detector', 'lpips')[i % 2], f'{i}.pth', data
        yield ('openai', 'info', 'detector')[i % 3], f'{i}.pt', zip_of(data)
        yield 'state', f'training-state-{i:06d}.pt', sealed(zip_of(data))
    for i, claim in enumerate(CLAIMS):
        data = claiming(**claim)
        yield ('openai', 'detector', 'lpips')[i % 3], f'claim{i}.pt', data
        yield 'state', f'claim/training-state-{i:06d}.pt', sealed(data)
    for i, call in enumerate(
        (
            Named(bytearray, 1 << 40),
            Named(bytes, 1 << 40),
            Named(os.system, 'touch canary'),
            Named(eval, '1'),
            Named(open, 'canary', 'w'),
            Named(torch.zeros, 1 << 40),
            Named(torch.load, 'x'),
            Named(range, 1 << 60),
            Named(getattr, 'a', 'b'),
        )
    ):
        for new in (True, False):
            data = saved([call], new)
            yield ('openai', 'lpips', 'detector')[i % 3], f'call{i}{new}.pt', data
            yield ('state', 'info')[new], f'call{i}{new}-training-state-000000.pt', sealed(data)
        yield 'snapshot', f'call{i}.pkl', pickle.dumps(dict(ema=call, metadata=call))
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        yield 'openai', f'bomb{method}.pt', zip_of(b'\x80\x02N.', ('x/data/0', bytes(10**8)), method=method)
        yield 'state', f'bomb{method}/training-state-000000.pt', sealed(zip_of(bytes(10**8), method=method))
    for i, line in enumerate(LINES):
        yield 'statistics', f'{i}/stats.jsonl', line + b'\n'
        yield 'search', f'{i}.jsonl', line + b'\n'
    for i, text in enumerate(TEXTS):
        yield 'stage', f's{i}/training_options.json', text
        yield 'results', f'{i}.json', text
    for i, answer in enumerate(answers()):
        yield 'url', f'{i}.http', answer
    seal = b'\n#checksum ' + b'0' * 64 + b'\n'
    yield 'state', 'hollow-sealed/training-state-000000.pt', hollow(1 << 37, zip_of(b'\x80\x02N.'), seal)
    yield 'state', 'hollow-zip/training-state-000000.pt', hollow(1 << 37, b'', zip_of(b'\x80\x02N.') + seal)
    yield 'snapshot', 'hollow-sealed.pkl', hollow(1 << 37, pickle.dumps({}), seal)
    snapshot = good_snapshot()
    for i, data in enumerate(
        [
            *patched(snapshot),
            snapshot[:-300],
            snapshot[:100],
            snapshot[:-1] + b'x',
            snapshot + b'x',
            snapshot * 2,
            snapshot[200:],
        ]
    ):
        yield ('snapshot', 'info')[i % 2], f'net{i}.pkl', data
    for reader, name in (
        ('snapshot', 'a.pkl'),
        ('state', 'training-state-000000.pt'),
        ('openai', 'a.pt'),
        ('detector', 'a.pth'),
        ('lpips', 'b.pth'),
        ('statistics', 'z/stats.jsonl'),
        ('stage', 'z/training_options.json'),
        ('results', 'a.json'),
        ('search', 'a.jsonl'),
        ('info', 'b.pkl'),
    ):
        for kind, start in (
            ('zeros', b''),
            ('pickle', b'\x80\x04\x8e' + struct.pack('<Q', 1 << 36)),
            ('text', b'[' * 1000),
            ('json', json.dumps(dict(a=1)).encode()),
        ):
            yield reader, f'hollow-{kind}-{name}', hollow(1 << 37, start)
