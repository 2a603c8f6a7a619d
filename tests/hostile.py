"""Files of strangers, made to do harm: a table by reader, and a process that opens all of them within limits of memory and time.

`python tests/hostile.py FOLDER` reads FOLDER/cases.json, a list of [reader, path], opens each path by its reader in one process of `MEMORY` bytes of
address space, and prints a line of JSON for each: how it ended, seconds, and by how much the peak of resident memory grew. `examine` writes the files
and runs that. Payloads in files make the file CANARY in the working directory.
"""

import argparse
import gzip
import importlib
import io
import json
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import hostile_networks
import numpy as np

MEMORY, SECONDS = (
    6 << 30,
    10,
)  # of address space: importing torch takes two, and threads have stacks; for a file
CANARY = 'canary'

# ----------------------------------------------------------------------------
# Readers, by name: what a script does with a path.


def read_images(path: str) -> None:
    """All of a data set, with its labels, as training does."""
    from data.dataset import ImageFolderDataset

    dataset = ImageFolderDataset(path, use_labels=_has_labels(path))
    for i in range(len(dataset)):
        dataset[i]
    dataset.digest()


def _has_labels(path: str) -> bool:
    from data.image_files import ImageFiles

    return bool(ImageFiles(path).label_files)


def convert(path: str) -> None:
    """By dataset_tool.py, whatever the source."""
    import dataset_tool

    dataset_tool.main.main(
        [f'--source={path}', f'--dest={path}-converted.zip', '--resolution=8x8', '--transform=center-crop'],
        standalone_mode=False,
    )


def measure(path: str) -> None:
    from metrics.images import open_images

    source = open_images(path)
    source.batch(range(min(len(source), 4)))
    source.fingerprint()


def read_reference(path: str) -> None:
    from metrics.reference import holds_statistics, load_reference, reference_images

    if not holds_statistics(path):
        reference_images(path)
    load_reference(path)


def edit_image(path: str) -> None:
    from sampling import edit_files

    edit_files.read_image(path)


def read_label_file(path: str) -> None:
    from data.label_space import LabelSpace
    from sampling.label_choosers import read_labels

    read_labels(path, LabelSpace(10), 'network')


def read_safetensors(path: str) -> None:
    from training.interchange.safetensors import load_safetensors

    load_safetensors(path)


def describe(path: str) -> None:
    from dnnlib.file_kind import describe_file

    describe_file(path)


READERS: dict[str, Callable[[str], None]] = dict(
    images=read_images,
    convert=convert,
    measure=measure,
    reference=read_reference,
    edit=edit_image,
    labels=read_label_file,
    safetensors=read_safetensors,
    describe=describe,
    **hostile_networks.READERS,
)

# ----------------------------------------------------------------------------
# Makers of bytes.


def png(
    width=8, height=8, *chunks: tuple[bytes, bytes], depth=8, color=0, data: bytes | None = None
) -> bytes:
    chunk = lambda kind, body: (
        struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
    )
    data = zlib.compress(bytes(min(height * (width + 1), 10**6))) if data is None else data
    return (
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, depth, color, 0, 0, 0))
        + b''.join(chunk(*one) for one in chunks)
        + chunk(b'IDAT', data)
        + chunk(b'IEND', b'')
    )


def zipped(members: dict[str, bytes], method=zipfile.ZIP_DEFLATED) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, 'w', method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return data.getvalue()


def npy(
    descr='<f8',
    shape='(3,)',
    order='False',
    version=(1, 0),
    data=bytes(24),
    text: bytes | None = None,
    size: int | None = None,
) -> bytes:
    text = (
        f"{{'descr': {descr!r}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
        if text is None
        else text
    )
    length = struct.pack('<H' if version[0] == 1 else '<I', len(text) if size is None else size)
    return b'\x93NUMPY' + bytes(version) + length + text + data


class Payload:
    def __reduce__(self):
        return os.system, (f'touch {CANARY}',)


def tarred(*members: tuple[str, bytes], **fields) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode='w:gz', format=tarfile.GNU_FORMAT) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


def tar_header(name: str, size: int, kind: bytes = b'0') -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def with_directory(data: bytes, **fields: int) -> bytes:
    """A zip whose record at the end, or first directory entry, says something else."""
    data, end = bytearray(data), data.rindex(b'PK\5\6')
    entry = struct.unpack_from('<I', data, end + 16)[0]
    places = dict(
        entries=(end + 10, '<H'),
        length=(end + 12, '<I'),
        offset=(end + 16, '<I'),
        comment=(end + 20, '<H'),
        method=(entry + 10, '<H'),
        flags=(entry + 8, '<H'),
        compressed=(entry + 20, '<I'),
        size=(entry + 24, '<I'),
        name=(entry + 28, '<H'),
        extra=(entry + 30, '<H'),
        attributes=(entry + 38, '<I'),
        local=(entry + 42, '<I'),
        version=(entry + 6, '<H'),
    )
    for field, value in fields.items():
        struct.pack_into(places[field][1], data, places[field][0], value)
    return bytes(data)


def hollow(size: int, start: bytes = b'', end: bytes = b'') -> Callable[[Path], None]:
    """Writes a file of that size, zeros that take no space on disk between its start and its end."""

    def write(path: Path) -> None:
        with open(path, 'wb') as file:
            file.write(start)
            file.truncate(size)
            file.seek(0, os.SEEK_END)
            file.write(end)

    return write


def later(make: Callable[..., bytes], *args) -> Callable[[Path], None]:
    """Writes what takes long to make only where it is wanted."""
    return lambda path: path.write_bytes(make(*args))


def label_file(text: bytes, images: int = 2) -> bytes:
    return zipped({'dataset.json': text, **{f'{i}.png': png() for i in range(images)}})


HEADERS = [
    dict(shape='(0, 9223372036854775808)'),
    dict(shape='(9223372036854775807,)'),
    dict(shape=f'({"9" * 5000},)'),
    dict(shape='(-1,)'),
    dict(shape='(True,)'),
    dict(shape='(3.0,)'),
    dict(shape='3'),
    dict(shape='[3]'),
    dict(shape='None'),
    dict(shape='(1e400,)'),
    dict(shape=f'({"1, " * 60})'),
    dict(shape='("3",)'),
    dict(descr='|O'),
    dict(descr='S0'),
    dict(descr='<U0', shape='(1000000000000000000,)'),
    dict(descr='<U999999999', shape='(999999999,)'),
    dict(descr='V8'),
    dict(descr='<M8[ns]'),
    dict(descr=[('a', '<f8')]),
    dict(descr=[('a', [('b', '|O')])]),
    dict(descr='f8,' * 2000),
    dict(descr=None),
    dict(descr=3),
    dict(descr='<f3'),
    dict(descr='x' * 9000),
    dict(descr=''),
    dict(order='None'),
    dict(order='1'),
    dict(version=(9, 9)),
    dict(version=(3, 0)),
    dict(version=(2, 0), size=2**32 - 1),
    dict(size=65535),
    dict(size=0),
    dict(text=b'(' * 9999),
    dict(text=b'-' * 9999 + b'1'),
    dict(text=b'[' * 9999),
    dict(text=b'{1:' * 3000),
    dict(text=b'not ' * 2400 + b'1'),
    dict(text=b'1+' * 4000 + b'1j'),
    dict(text=b'\0' * 100),
    dict(text=b'\xff' * 100),
    dict(text=b"{'descr': '<f8'}"),
    dict(text=b'{}'),
    dict(text=b''),
    dict(text=b'"\\d"'),
    dict(text=f'__import__("os").system("touch {CANARY}")'.encode()),
    dict(text=b'lambda: 0'),
    dict(text=b'{**{}}'),
    dict(text=b'f"{1}"'),
    dict(data=b''),
    dict(data=bytes(1000)),
]
JSONS = [
    b'[' * 200_000,
    b'{"labels": ' * 100_000,
    b'{"labels": [["0.png", ' + b'[' * 100_000,
    b'{"labels": [["0.png", ' + b'9' * 5000 + b'], ["1.png", 0]]}',
    b'{"labels": [["0.png", 1e400], ["1.png", NaN]]}',
    b'{"labels": [["0.png", [1e400]], ["1.png", [NaN]]]}',
    b'{"labels": 3}',
    b'{"labels": [3]}',
    b'{"labels": [["0.png"]]}',
    b'{"labels": [[["0.png"], 1]]}',
    b'{"labels": {"0.png": 1}}',
    b'{"labels": [["0.png", 1], ["0.png", 2]]}',
    b'[]',
    b'3',
    b'',
    b'\xff\xfe',
    b'"\\ud800"',
    b'{"labels": [["\\ud800.png", 1], ["1.png", 1]]}',
    b'{"labels": [["../0.png", 0], ["1.png", 0]]}',
    b'\xef\xbb\xbf{}',
    b'{"labels": [["0.png", 99999999999], ["1.png", 0]]}',
    b'{"labels": [["0.png", -1], ["1.png", 0]]}',
    b'{"labels": [["0.png", []], ["1.png", []]]}',
    b'{"labels": [["0.png\\u001b[2J\\nError: x", 0]]}',
    b'{"labels": [["0.png", {"a": 1}], ["1.png", 0]]}',
    b'{' + b'"a": 1, ' * 100_000 + b'"b": 1}',
    b'{"labels": [' + b'["0.png", 0],' * 500_000 + b'["1.png", 0]]}',
    b'{"labels": [["0.png", true], ["1.png", 0]]}',
    b' ' * 15_000_000,
]
PICKLES = [
    b'\x80\x02r\xff\xff\xff\x7f.',
    b'\x80\x02Nr\xff\xff\xff\x7f.',
    b'\x80\x02\x8b\xff\xff\xff\x7f',
    b'\x80\x04\x8e' + b'\xff' * 8,
    b'\x80\x04\x8d' + b'\xff' * 8,
    b'\x80\x05\x96' + b'\xff' * 7 + b'\x7f',
    b'\x80\x02X\xff\xff\xff\xff',
    b'\x80\x02T\xff\xff\xff\x7f',
    b'\x80\x02' + b'(' * 10**6,
    b'\x80\x02' + b']' * 10**6,
    b'\x80\x02}' + b'N\x85' * 300_000 + b'Ns.',
    b'\x80\x02}N' + b'\x85' * 300_000 + b'Ns.',
    b'\x80\x02}N' + b'2\x86' * 60 + b'Ns.',
    b'\x80\x02}q\0' + b'h\0h\0s' * 9 + b'.',
    b'\x80\x02Nq\0' + b'0h\0h\0\x86q\0' * 60 + b'.',
    b'\x80\x02\x82\x01.',
    b'\x80\x05\x97.',
    b'\x80\x02Pid\n.',
    b'\x80\xff.',
    b'\x80',
    b'.',
    b'\x80\x02.',
    b'0',
    b'a',
    b'b.',
    pickle.dumps({'data': Payload()}, 0),
    pickle.dumps({'data': Payload()}, 2),
    pickle.dumps({'data': Payload()}, 4),
    pickle.dumps([Payload()]),
    pickle.dumps({'labels': [0], 'data': np.zeros(3)}),
    pickle.dumps({'labels': [0], 'data': np.zeros(3072, np.uint8), 'x': 10**400}),
    pickle.dumps({'labels': [0], 'data': np.array([Payload()])}),
    pickle.dumps({'labels': 10**400, 'data': np.zeros([1, 3072], np.uint8)}),
    pickle.dumps({'labels': [0], 'data': np.zeros([1, 3072], np.uint8)}, 2).replace(
        b'M\x00\x0c', b'J\xff\xff\xff\x7f'
    ),
    pickle.dumps({b'data': bytearray(10), 'labels': []}),
    pickle.dumps({'data': [0] * 3072, 'labels': [0]}),
    pickle.dumps(np.zeros(5)),
    pickle.dumps(None),
]
STATISTICS = [
    dict(mu='a' * 10**6),
    dict(mu=['a' * 10**6] + ['b'] * 10**5),
    dict(mu=[1.0] * 10**5 + ['a' * 10**6]),
    dict(mu=10**400, sigma=[[1]]),
    dict(mu=[10**400]),
    dict(mu=[[[]] * 5] * 10),
    dict(mu=None),
    dict(mu=True),
    dict(mu=np.zeros([3, 0]), sigma=np.zeros(3)),
    dict(mu=np.zeros(3), sigma=np.zeros([3, 3], complex)),
    dict(mu=np.zeros(3), sigma=np.full([3, 3], np.nan)),
    dict(mu=np.array(['a']), sigma=np.eye(1)),
    dict(mu=np.array([None]), sigma=np.eye(1)),
    dict(mu=np.zeros(3), sigma=np.eye(3), num_images='3'),
    dict(mu=[0.0], sigma=[[float('inf')]]),
    dict(mu=Payload(), sigma=np.eye(1)),
    dict(mu=np.zeros(2), sigma=np.eye(2), resolution='x' * 10**6),
    dict(mu={'a': 1}, sigma=()),
    dict(mu=[], sigma=[]),
    dict(mu=-1, sigma=1),
]
IMAGES = {
    'eps': f'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n({CANARY}) (w) file closefile showpage\n%%EOF\n'.encode(),
    'wide': png(2**31 - 1, 1),
    'tall': png(1, 2**31 - 1),
    'giga': png(40_000, 40_000),
    'bomb': png(8000, 8000, color=6, data=zlib.compress(bytes(10**8), 9)),
    'none': png(0, 0),
    'column': png(1, 60_000),
    'text': png(8, 8, (b'zTXt', b'a\0\0' + zlib.compress(bytes(10**8), 9))),
    'international': png(8, 8, (b'iTXt', b'a\0\1\0\0\0' + zlib.compress(bytes(10**8), 9))),
    'profile': png(8, 8, (b'iCCP', b'a\0\0' + zlib.compress(bytes(10**8), 9))),
    'texts': png(8, 8, *[(b'tEXt', b'a\0' + bytes(900))] * 10_000),
    'palette': png(8, 8, color=3),
    'frames': png(8, 8, (b'acTL', struct.pack('>II', 2**31 - 1, 0))),
    'depth': png(8, 8, depth=3),
    'color': png(8, 8, color=7),
    'short': png()[:40],
    'long chunk': png()[:33] + b'\x7f\xff\xff\xffIDAT',
    'gif frames': b'GIF89a'
    + struct.pack('<2H3B', 1, 1, 0x80, 0, 0)
    + bytes(6)
    + (b',' + struct.pack('<4HB', 0, 0, 1, 1, 0) + b'\x02\x02D\x01\0') * 10**6
    + b';',
    'gif size': b'GIF89a'
    + struct.pack('<2H3B', 65535, 65535, 0, 0, 0)
    + b','
    + struct.pack('<4HB', 0, 0, 65535, 65535, 0)
    + b'\x02\x02D\x01\0;',
    'bmp': b'BM'
    + struct.pack('<I4xI', 60, 54)
    + struct.pack('<IiiHHI', 40, 65000, 30000, 1, 24, 0)
    + bytes(24),
    'bmp negative': b'BM'
    + struct.pack('<I4xI', 60, 54)
    + struct.pack('<IiiHHI', 40, -8, -(2**31), 1, 24, 0)
    + bytes(24),
    'tiff': b'II*\0\x08\0\0\0\x03\0'
    + b''.join(struct.pack('<HHII', t, 4, 1, v) for t, v in ((256, 60_000), (257, 60_000), (258, 8)))
    + bytes(40),
    'tiff tag': b'II*\0\x08\0\0\0\x02\0' + struct.pack('<HHIIHHII4x', 256, 12, 0x7FFFFFFF, 8, 257, 4, 1, 8),
    'tiff loop': b'II*\0\x08\0\0\0\x01\0' + struct.pack('<HHIII', 256, 4, 1, 8, 8),
    'bigtiff': b'II+\0\x08\0\0\0' + b'\xff' * 8 + bytes(50),
    'pgm': b'P5 99999999999999999999 1 255\n',
    'pgm digits': b'P5 ' + b'9' * 5000 + b' 1 255\n',
    'pnm maximum': b'P5 8 8 ' + b'9' * 100 + b'\n' + bytes(64),
    'pfm': b'Pf 8 8 nan\n' + bytes(256),
    'webp': b'RIFF\x1a\0\0\0WEBPVP8X\x0a\0\0\0' + b'\xff' * 14,
    'webp lossless': b'RIFF\x1a\0\0\0WEBPVP8L\x0a\0\0\0/' + b'\xff' * 14,
    'jpeg': b'\xff\xd8\xff\xc0\0\x0b\x08\xff\xff\xff\xff\x01\x01\x11\0\xff\xda\0\x08\x01\x01\0\0\x3f\0'
    + bytes(9),
    'jp2': b'\0\0\0\x0cjP  \r\n\x87\n' + b'\xff' * 100,
    'j2k': b'\xff\x4f\xff\x51\0\x29\0\0'
    + struct.pack('>IIIIIIII', 2**31, 2**31, 0, 0, 2**31, 2**31, 0, 0)
    + b'\0\1\7\1\1',
    'avif': b'\0\0\0\x20ftypavif' + b'\xff' * 200,
    'tga': bytes([0, 0, 10]) + bytes(9) + struct.pack('<2HBB', 65535, 65535, 24, 0) + b'\xff\0\0\0' * 9,
    'mpo': b'\xff\xd8\xff\xe2\0\x10MPF\0II*\0' + b'\xff' * 100,
    'empty': b'',
    'nothing': bytes(100),
    'psd': b'8BPS\0\1' + bytes(6) + b'\0\3' + b'\0\0\xff\xff' * 2 + bytes(50),
    'fli': bytes(4) + b'\x11\xaf\xff\xff' + bytes(200),
    'wmf': b'\xd7\xcd\xc6\x9a' + bytes(100),
    'icns': b'icns\xff\xff\xff\xff' + bytes(100),
    'xpm': b'/* XPM */' + bytes(100),
}


def _lmdb(trial: int, folder: Path) -> None:
    """A data base, cut off or damaged."""
    import lmdb

    rng = np.random.default_rng(trial)
    with lmdb.open(str(folder), map_size=1 << 22) as base, base.begin(write=True) as transaction:
        for i in range(40):
            transaction.put(b'%05d' % i, png(8, 8, (b'tEXt', b'a\0' + rng.bytes(50 + 200 * i))))
    data = bytearray((folder / 'data.mdb').read_bytes())
    if trial < 8:
        data = data[: len(data) * trial // 8]
    elif trial < 12:
        data = data[: len(data) // 4096 * trial // 16 * 4096]
    else:
        for _ in range(20):
            data[rng.integers(0, len(data) if trial % 2 else 8192)] = rng.integers(256)
    (folder / 'data.mdb').write_bytes(data)
    (folder / 'lock.mdb').unlink()


def cases() -> Iterator[tuple[str, str, bytes | Callable[[Path], None]]]:
    """(reader, file name, its contents or what writes it)."""
    good = zipped({f'{i}.png': png() for i in range(3)})
    for i, (kind, image) in enumerate(IMAGES.items()):
        yield (
            ('edit', 'images', 'convert')[i % 3] if len(image) < 10**6 else 'convert',
            f'{kind}/a.png' if i % 3 else f'{kind}.png',
            image,
        )
        yield ('measure', 'convert')[i % 2], f'{kind}.zip', zipped({'a.png': image})
    for i, fields in enumerate(HEADERS):
        yield 'labels', f'{i}.npy', npy(**fields)
        yield (
            ('measure', 'reference', 'convert')[i % 3],
            f'{i}.npz',
            zipped(dict.fromkeys(('mu.npy', 'sigma.npy', 'arr_0.npy'), npy(**fields))),
        )
        yield 'images', f'{i}/a.npy', npy(**fields)
    for i, text in enumerate(JSONS):
        yield ('images', 'convert')[i % 2], f'json{i}.zip', label_file(text)
        yield 'safetensors', f'{i}.safetensors', struct.pack('<Q', len(text)) + text
    for i, data in enumerate(PICKLES):
        yield 'convert', f'{i}.tar.gz', tarred(('cifar-10-batches-py/data_batch_1', data))
        yield 'reference', f'{i}.pkl', data
    for i, statistics in enumerate(STATISTICS):
        yield 'reference', f's{i}.pkl', pickle.dumps(statistics, 4)
        yield 'reference', f't{i}.pkl', pickle.dumps({'fid': statistics, 'num_images': 10**400}, 2)
    batch = 'data_batch_1'
    yield 'convert', 'sparse.tar', hollow(1 << 37, tar_header(batch, (1 << 37) - 512))
    yield (
        'convert',
        'sparse-gz.tar.gz',
        later(lambda: gzip.compress(tar_header(batch, 1 << 37) + bytes(1 << 20))),
    )
    yield (
        'convert',
        'long name.tar.gz',
        later(lambda: gzip.compress(tar_header('x', 1 << 33, b'L') + bytes(1 << 26))),
    )
    yield (
        'convert',
        'pax.tar.gz',
        later(lambda: gzip.compress(tar_header('x', 1 << 33, b'x') + bytes(1 << 26))),
    )
    yield (
        'convert',
        'global.tar.gz',
        later(lambda: gzip.compress(tar_header('x', 1 << 27, b'g') + bytes(1 << 27))),
    )
    yield 'convert', 'members.tar.gz', later(lambda: gzip.compress(tar_header('x', 0) * 200_000))
    yield 'convert', 'link.tar.gz', tarred((batch, b''), type=b'2', linkname='/etc/passwd')
    yield 'convert', 'hard.tar.gz', tarred((batch, b''), type=b'1', linkname=batch)
    yield 'convert', 'device.tar.gz', tarred((batch, b''), type=b'3')
    yield 'convert', 'zeros.tar.gz', later(lambda: gzip.compress(bytes(1 << 27)))
    yield 'convert', 'names.tar.gz', tarred((f'data_batch_{"9" * 5000}', b'x'))
    for name, magic, shape in (
        ('a', 0x803, (2**32 - 1,) * 3),
        ('b', 0x803, (10**6, 28, 28)),
        ('c', 0x803, (0, 0, 0)),
        ('d', 0x8FF, (1, 1, 1)),
        ('e', 0x803, (1, 28, 28)),
    ):
        for end in ('', '.gz'):
            content = struct.pack('>4I', magic, *shape) + bytes(1 << 24)

            def write(path: Path, content=content, pack=gzip.compress if end else bytes) -> None:
                path.write_bytes(pack(content))
                path.with_name(path.name.replace('images-idx3', 'labels-idx1')).write_bytes(
                    pack(struct.pack('>2I', 0x801, 1) + b'\1')
                )

            yield 'convert', f'{name}/train-images-idx3-ubyte{end}', write
    for i, fields in enumerate(
        [
            dict(entries=0xFFFF),
            dict(length=0xFFFFFFFF),
            dict(length=2),
            dict(offset=0xFFFFFFF0),
            dict(comment=9),
            dict(method=99),
            dict(method=12),
            dict(method=14),
            dict(flags=1),
            dict(flags=0x2041),
            dict(compressed=0xFFFFFFF0),
            dict(size=0xFFFFFFF0),
            dict(size=0),
            dict(compressed=0),
            dict(name=0xFFFF),
            dict(extra=0xFFFF),
            dict(attributes=0xA1FF << 16),
            dict(local=0xFFFFFFF0),
            dict(local=3),
            dict(version=99),
            dict(flags=0x800),
        ]
    ):
        for reader in ('images', 'measure', 'convert', 'describe'):
            yield reader, f'zip{i}.zip', with_directory(good, **fields)
    many = {f'{"a" * 65_000}{i}.png': png() for i in range(20)}
    entries = dict(
        names=many,
        outside={'../../a.png': png()},
        absolute={'/etc/a.png': png()},
        escape={'\x1b[2J\nError: x.png': b'no'},
        empty={},
        folder={'a.png/': b''},
        both={'a\\b.png': png(), 'a/b.png': png()},
        bomb={'a.png': bytes(5 << 24)},
        label={'a.png': png(), 'dataset.json': b' ' * (5 << 24)},
        latents={'a.npy': npy('<f4', '(8, 9999, 9999)')},
        zeros={'a.npy': npy('<f4', '(8, 4, 4)', data=bytes(5 << 24))},
    )
    for name, members in entries.items():
        for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
            yield (
                ('images', 'convert')[method == zipfile.ZIP_LZMA],
                f'{name}{method}.zip',
                later(zipped, members, method),
            )
        yield 'measure', f'{name}.zip', later(zipped, members)
    end = struct.pack('<4s4H2IH', b'PK\5\6', 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    for size in (1 << 29, 1 << 36):
        locator = struct.pack('<4sIQI', b'PK\6\7', 0, size, 1)
        record = struct.pack('<4sQ2H2I4Q', b'PK\6\6', 44, 45, 45, 0, 0, 2**32, 2**32, size - 100, 100)
        for reader, name in (
            ('images', 'a.zip'),
            ('reference', 'a.npz'),
            ('measure', 'b.npz'),
            ('describe', 'c.zip'),
        ):
            yield reader, f'{size}-{name}', hollow(size, b'PK\3\4' + bytes(96), record + locator + end)
    for reader, name in (
        ('reference', 'a.pkl'),
        ('reference', 'a.npz'),
        ('labels', 'a.npy'),
        ('edit', 'a.png'),
        ('images', 'a/a.png'),
        ('images', 'b/a.npy'),
        ('convert', 'a/train-images-idx3-ubyte'),
        ('safetensors', 'a.safetensors'),
        ('measure', 'b.npy'),
        ('convert', 'a.tar'),
        ('describe', 'x'),
    ):
        for kind, start in (
            ('zeros', b''),
            ('pickle', b'\x80\x04\x8e' + struct.pack('<Q', 1 << 36)),
            ('npy', npy(version=(2, 0), size=2**32 - 1)),
            ('image', png()[:33] + b'\x7f\xff\xff\xfftEXt'),
        ):
            yield reader, f'hollow-{kind}-{name}', hollow(1 << 37, start)
    yield from hostile_networks.cases(PICKLES, hollow)
    try:
        import lmdb  # noqa: F401 (whether it is installed)
    except ImportError:
        return
    for trial in range(40):
        yield 'convert', f'{trial}_lmdb', lambda folder, trial=trial: (folder.mkdir(), _lmdb(trial, folder))


# ----------------------------------------------------------------------------
# The process that opens them.


def examine(
    folder: Path, chosen: list[tuple[str, str, bytes | Callable[[Path], None]]], timeout: float
) -> list[dict]:
    """Writes cases to a folder and opens them in one process: how each `ended`, its `seconds`, and by how many MB the peak of memory `grew`."""
    paths = []
    for number, (reader, name, content) in enumerate(chosen):
        path = folder / 'files' / f'{number:04d}' / name
        path.parent.mkdir(parents=True)
        path.write_bytes(content) if isinstance(content, bytes) else content(path)
        paths.append(
            (
                reader,
                str(
                    path.parent
                    if path.parent.name not in (f'{number:04d}', *'abcde') and reader != 'edit'
                    else path
                ),
            )
        )
    (folder / 'cases.json').write_text(json.dumps(paths))
    (folder / 'here').mkdir()
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        cwd=folder / 'here',
        capture_output=True,
        text=True,
        timeout=timeout,
        env=dict(os.environ, PYTHONPATH=root, OMP_NUM_THREADS='1', HOME=str(folder)),
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(results) == len(paths), (
        done.returncode,
        paths[len(results)],
        done.stderr[-2000:],
    )
    return results


class TooSlow(BaseException):
    pass


def main(folder: str) -> None:
    import click

    from dnnlib import UserError

    warnings.simplefilter('ignore')
    lines, sys.stdout, sys.stderr = os.fdopen(os.dup(1), 'w'), io.StringIO(), io.StringIO()
    for name in (
        'dataset_tool',
        'convert',
        'compare',
        'search',
        'experiments.report',
        'metrics.detectors',
        'metrics.lpips',
        'training.run_files',
        'requests',
    ):
        importlib.import_module(name)  # imports are no part of what a file costs
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    def give_up(*_):
        raise TooSlow

    signal.signal(signal.SIGALRM, give_up)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for reader, path in json.loads(Path(folder, 'cases.json').read_text()):
        start, ended = time.monotonic(), 'well'
        signal.alarm(SECONDS)
        try:
            READERS[reader](path)
        except (UserError, click.ClickException) as error:
            ended = (
                'one clear error'
                if str(error).count('\n') <= 1 and '\x1b' not in str(error)
                else f'forged: {error}'
            )
        except TooSlow:
            ended = f'too slow ({SECONDS} s)'
        except BaseException as error:  # noqa: BLE001 (what this is for)
            import traceback

            ended = f'{type(error).__name__}: {error}'[:300] + ''.join(
                traceback.format_tb(error.__traceback__)[-2:]
            )
        signal.alarm(0)
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds = round(time.monotonic() - start, 2)
        lines.write(
            json.dumps(dict(reader=reader, path=path, ended=ended, seconds=seconds, grew=(now - peak) >> 10))
            + '\n'
        )
        lines.flush()
        peak = max(peak, now)


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('folder')
    main(parser.parse_args().folder)
