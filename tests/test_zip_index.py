"""data/zip_index.py: zip directories as arrays against Python's zipfile, and the cache of them."""

import io
import json
import os
import shutil
import zipfile

import numpy as np
import pytest
from helpers import run_python
from PIL import Image

from data import zip_index
from data.dataset import ImageFolderDataset
from data.image_files import ImageFiles
from data.zip_index import ZipIndex, open_archive
from dnnlib import UserError, downloads


def png(value, size=4):
    data = io.BytesIO()
    Image.fromarray(np.full([size, size, 3], value, np.uint8)).save(data, 'png')
    return data.getvalue()


def write_zip(path, contents, compression=zipfile.ZIP_STORED, comment=b'', extra=b''):
    with zipfile.ZipFile(path, 'w', compression) as archive:
        for name, data in contents:
            info = zipfile.ZipInfo(name)
            info.compress_type, info.extra = compression, extra
            archive.writestr(info, data)
        archive.comment = comment
    return path


CONTENTS = [('b/1.png', b'one'), ('a/2.png', b'two' * 50), ('a/10.png', b''), ('a b/ü.txt', b'x')]


def after(prefix):
    """As programs that unpack themselves are made: the offsets in the archive do not know of what is before it."""

    def write(path):
        write_zip(path, CONTENTS[:3])
        path.write_bytes(prefix + path.read_bytes())

    return write


def behind_a_gap(path):
    """Members beyond 4 GiB, in a file with a hole, told of by ZIP64."""
    with open(path, 'wb') as file, zipfile.ZipFile(file, 'w') as archive:
        archive.writestr('near.png', b'near')
        file.seek(5 << 30)
        archive.start_dir = file.tell()
        archive.writestr('far.png', b'far')
        archive.writestr('farther.png', b'farther')


def with_cp437(path):
    """A name in the alphabet of MS-DOS, without the flag that says UTF-8."""
    write_zip(path, [('caf~.png', b'x'), ('b.png', b'y')])
    path.write_bytes(path.read_bytes().replace(b'caf~', b'caf\x82'))


ARCHIVES = dict(
    plain=lambda path: write_zip(path, CONTENTS[:3]),
    deflated=lambda path: write_zip(path, CONTENTS[:3], zipfile.ZIP_DEFLATED),
    lzma=lambda path: write_zip(path, CONTENTS[:3], zipfile.ZIP_LZMA),
    unicode=lambda path: write_zip(path, CONTENTS),
    cp437=with_cp437,
    comment=lambda path: write_zip(path, CONTENTS[:3], comment=b'PK comment' * 9),
    misleading=lambda path: write_zip(path, CONTENTS[:3], comment=b'PK\5\6' + bytes(30)),
    times=lambda path: write_zip(path, CONTENTS[:3], extra=b'UT\5\0\3abcd'),
    appended=after(b'#!/bin/sh\n'),
    gap=behind_a_gap,
    twice=lambda path: write_zip(path, [('x.png', b'first'), ('y.png', b'y'), ('x.png', b'last')]),
)


@pytest.mark.filterwarnings('ignore:Duplicate name')
@pytest.mark.parametrize('kind', ARCHIVES)
def test_an_index_is_what_zipfile_reads(tmp_path, kind):
    path = tmp_path / 'x.zip'
    ARCHIVES[kind](path)
    index = ZipIndex.read(str(path))
    with zipfile.ZipFile(path) as archive:
        infos = sorted(archive.infolist(), key=lambda info: info.filename)
        assert [tuple(entry) for entry in index.entries()] == [
            (info.filename, info.file_size, info.CRC) for info in infos
        ]
        ours = open_archive(str(path))
        for name in archive.namelist():
            info, expected = index.info(name), archive.getinfo(name)
            for field in ('header_offset', 'compress_size', 'file_size', 'CRC', 'compress_type', 'flag_bits'):
                assert getattr(info, field) == getattr(expected, field), (name, field)
            assert ours.open(info).read() == archive.read(name)
        ours.close()
    for missing in ('', 'a', 'zzz', 'a/1'):
        with pytest.raises(KeyError):
            index.info(missing)


@pytest.mark.parametrize('kind', ['plain', 'deflated', 'comment', 'appended', 'gap'])
def test_usual_directories_need_no_zipfile(tmp_path, kind, monkeypatch):
    """Or they would be read slowly, one object a member."""
    ARCHIVES[kind](tmp_path / 'x.zip')
    monkeypatch.setattr(zip_index, '_parse_by_zipfile', None)
    assert len(ZipIndex.read(str(tmp_path / 'x.zip'))) == 3


def test_names_are_a_sequence():
    names = zip_index.Names.of([b'a', b'bcd', b'', 'é'.encode()])
    assert list(names) == ['a', 'bcd', '', 'é'] and len(names) == 4 and names[3] == names[-1] == 'é'
    assert (
        names[1:3] == ['bcd', '']
        and names[::-1] == ['é', '', 'bcd', 'a']
        and list(names[np.array([3, 0])]) == ['é', 'a']
        and 'bcd' in names
    )


# ----------------------------------------------------------------------------
# Members.


def test_what_zipfile_finds_wrong_in_a_directory_is_wrong_here(tmp_path):
    """An extra field that says it is longer than it is."""
    path = write_zip(tmp_path / 'data.zip', [('a.png', png(1))], extra=b'UT\4\0abcd')
    content = path.read_bytes()
    path.write_bytes(content[:-30] + content[-30:].replace(b'UT\4\0', b'UT\x99\0'))
    with pytest.raises(UserError, match=r'complete zip file \(Corrupt extra field'):
        ImageFiles(path)


def test_an_encrypted_member_is_named(tmp_path):
    """Bit 0 of its flags, in the local header and in the directory, says so."""
    path = write_zip(tmp_path / 'data.zip', [('a.png', png(1)), ('b.png', png(2))])
    content = bytearray(path.read_bytes())
    content[content.index(b'PK\3\4', 10) + 6] |= 1
    content[content.index(b'PK\1\2', content.index(b'PK\1\2') + 4) + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r'b\.png is not a readable image .*encrypted'):
        ImageFolderDataset(path)


def test_a_member_that_is_not_where_the_directory_says_is_named(tmp_path):
    path = write_zip(tmp_path / 'data.zip', [('a.png', png(1)), ('b.png', png(2))])
    content = path.read_bytes()
    path.write_bytes(content.replace(b'b.png', b'c.png', 1))  # the local header's
    with pytest.raises(UserError, match=r'b\.png is not a readable image .*differ'):
        ImageFolderDataset(path)


# ----------------------------------------------------------------------------
# The cache.


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of indices, of however few members."""
    monkeypatch.setattr(downloads, 'DEFAULT_CACHE_DIR', tmp_path / 'cache')
    monkeypatch.setattr(zip_index, 'CACHE_FROM', 1)
    return tmp_path / 'cache' / 'indices'


def write_data(path, values=(10, 20, 30), classes=(0, 1, 2)):
    names = [f'0/{i}.png' for i in range(len(values))]
    return write_zip(
        path,
        [
            *zip(names, map(png, values)),
            ('dataset.json', json.dumps(dict(labels=list(zip(names, classes)))).encode()),
        ],
    )


def contents(path):
    dataset = ImageFolderDataset(path, use_labels=True)
    return [(int(dataset[i][0][0, 0, 0]), int(dataset[i][1].argmax())) for i in range(len(dataset))]


def refuse(*_):
    raise AssertionError('this was to come from the cache')


def without_reading(monkeypatch, path):
    """`contents` where neither directory nor labels can be parsed."""
    with monkeypatch.context() as patch:
        for module, name in ((zip_index, '_parse'), (zip_index, '_parse_by_zipfile')):
            patch.setattr(module, name, refuse)
        patch.setattr('data.label_file._read_json', refuse)
        return contents(path)


def test_the_second_time_nothing_is_parsed_wherever_the_file_lies(tmp_path, cache, monkeypatch):
    path = write_data(tmp_path / 'data.zip')
    expected = [(10, 0), (20, 1), (30, 2)]
    assert contents(path) == expected and len(list(cache.iterdir())) == 3
    assert without_reading(monkeypatch, path) == expected
    shutil.move(path, tmp_path / 'moved.zip')
    assert without_reading(monkeypatch, tmp_path / 'moved.zip') == expected


def test_small_zips_leave_nothing(tmp_path, cache, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(downloads, 'DEFAULT_CACHE_DIR', tmp_path / 'cache')
    contents(write_data(tmp_path / 'data.zip'))
    assert not (tmp_path / 'cache').exists()


def test_another_file_of_the_same_name_size_and_time_is_not_mistaken_for_the_first(tmp_path, cache):
    path = write_data(tmp_path / 'data.zip')
    status = path.stat()
    contents(path)
    write_data(path, values=(40, 50, 60), classes=(2, 1, 0))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert contents(path) == [(40, 2), (50, 1), (60, 0)]


def flip(data):
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]


def other_arrays(_):
    data = io.BytesIO()
    np.savez(data, blob=np.zeros(3, np.uint8), ends=np.array([9, 1]))
    return data.getvalue()


@pytest.mark.parametrize(
    'damage',
    [lambda data: b'', lambda data: data[: len(data) // 2], flip, lambda data: b'no arrays', other_arrays],
    ids=['empty', 'cut off', 'flipped bit', 'garbage', 'other arrays'],
)
def test_a_damaged_cache_is_replaced(tmp_path, cache, monkeypatch, damage):
    path = write_data(tmp_path / 'data.zip')
    expected = contents(path)
    (directory,) = cache.glob('*-directory.npz')
    directory.write_bytes(damage(directory.read_bytes()))
    assert contents(path) == expected == without_reading(monkeypatch, path)


def test_pickles_in_the_cache_are_not_run(tmp_path, cache):
    class Canary:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'canary'),)

    path = write_data(tmp_path / 'data.zip')
    expected = contents(path)
    for file in cache.iterdir():
        np.savez(file, blob=np.array([Canary()], dtype=object), ends=np.array([Canary()], dtype=object))
    assert contents(path) == expected and not (tmp_path / 'canary').exists()


def test_without_a_place_for_it_there_is_no_cache(tmp_path, cache):
    cache.parent.write_text('a file')
    path = write_data(tmp_path / 'data.zip')
    assert contents(path) == contents(path) == [(10, 0), (20, 1), (30, 2)]


def test_errors_are_not_kept(tmp_path, cache):
    """The file is refused again, and its directory alone is remembered."""
    path = write_zip(tmp_path / 'data.zip', [('../a.png', png(1))])
    for _ in range(2):
        with pytest.raises(UserError, match='is outside the data set'):
            ImageFiles(path)
    assert [file.name.split('-')[1] for file in cache.iterdir()] == ['directory.npz']


def test_how_latents_were_made_is_read_from_a_cached_directory_too(tmp_path, cache):
    values = np.zeros([2, 4, 4], np.float32)
    data = io.BytesIO()
    np.save(data, values)
    path = write_zip(
        tmp_path / 'data.zip',
        [('a.npy', data.getvalue()), ('dataset.json', b'{"labels": null, "encoder": {"class_name": "E"}}')],
    )
    for _ in range(2):
        dataset = ImageFolderDataset(path)
        assert dataset.holds_latents and dataset.encoder == {'class_name': 'E'} and dataset.label_dim == 0
        with pytest.raises(UserError, match='has no labels'):
            ImageFolderDataset(path, use_labels=True)


def test_processes_that_begin_together_all_read_the_data(tmp_path, cache):
    """Three processes, an empty cache; each writes what it computed, whole."""
    path = write_data(tmp_path / 'data.zip', values=range(100), classes=range(100))
    code = """
import sys
from multiprocessing import Pool
from data import zip_index
from data.dataset import ImageFolderDataset
from dnnlib import downloads

downloads.DEFAULT_CACHE_DIR, zip_index.CACHE_FROM = sys.argv[2], 1

def contents(path):
    dataset = ImageFolderDataset(path, use_labels=True)
    return tuple((int(dataset[i][0][0, 0, 0]), int(dataset[i][1].argmax())) for i in range(len(dataset)))

with Pool(3) as pool:
    print(len(set(pool.map(contents, [sys.argv[1]] * 6, 1))))
"""
    assert run_python('-c', code, path, tmp_path / 'cache').stdout.strip() == '1'
    assert sorted(file.name.split('-')[1].split('.')[0] for file in cache.iterdir()) == [
        'directory',
        'listing',
        'named',
    ]
