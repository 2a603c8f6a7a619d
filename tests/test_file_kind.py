"""Files are called what they are, by their first bytes."""

import gzip
import io
import tarfile
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from dnnlib.file_kind import describe_file


def written(write) -> bytes:
    data = io.BytesIO()
    write(data)
    return data.getvalue()


def image(kind: str) -> bytes:
    return written(lambda data: Image.new('RGB', (8, 8)).save(data, kind))


def archive(*names: str) -> bytes:
    def write(data):
        with zipfile.ZipFile(data, 'w') as file:
            for name in names:
                file.writestr(name, b'1' * 100)

    return written(write)


def tar() -> bytes:
    return written(lambda data: tarfile.open(fileobj=data, mode='w').addfile(tarfile.TarInfo('a.png')))


KINDS = [
    (b'', 'an empty file'),
    (b'\n\n<!DOCTYPE HTML>\n<html>', 'a web page (HTML)'),
    (b'\xef\xbb\xbf<HTML lang="en">', 'a web page (HTML)'),
    (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', 'an XML document'),
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n', 'a Git LFS pointer'),
    (b'{"labels": null}', 'a JSON file'),
    ('Grüße aus dem Netz'.encode(), 'text'),
    (bytes(5000), 'a file of zeros'),
    (image('PNG'), 'a PNG image'),
    (image('JPEG'), 'a JPEG image'),
    (image('WebP'), 'a WebP image'),
    (image('TIFF'), 'a TIFF image'),
    (image('BMP'), 'a BMP image'),
    (image('PPM'), 'a PNM image'),
    (archive('a/1.png', 'dataset.json'), 'a zip archive'),
    (archive(), 'a zip archive'),
    (archive('a/1.png')[:-30], 'a damaged or incomplete zip archive'),
    (gzip.compress(b'1'), 'a gzip file'),
    (tar(), 'a tar archive'),
    (b'Rar!\x1a\x07\x01\x00' + bytes(range(50)), 'a RAR archive'),
    (b'7z\xbc\xaf\x27\x1c\0\4' + bytes(range(50)), 'a 7-Zip archive'),
    (written(lambda data: np.save(data, np.zeros(3))), 'a NumPy .npy array'),
    (written(lambda data: np.savez(data, np.zeros(3))), 'a NumPy .npz archive'),
    (written(lambda data: torch.save(dict(a=torch.zeros(3)), data)), 'a PyTorch file (torch.save)'),
    (
        written(lambda data: torch.save(dict(a=torch.zeros(3)), data, _use_new_zipfile_serialization=False)),
        'a PyTorch file (torch.save, before',
    ),
    (
        written(lambda data: torch.save(dict(net={}, update={}, averages={}, loss={}), data)),
        'a training state',
    ),
    (
        written(lambda data: torch.save(dict(net=torch.zeros(3), optimizer_state={}), data)),
        'a training state',
    ),
    (written(lambda data: torch.jit.save(torch.jit.script(torch.nn.ReLU()), data)), 'a TorchScript file'),
    (safetensors.torch.save(dict(a=torch.zeros(3))), 'a safetensors file'),
    (b'\x89HDF\r\n\x1a\n' + bytes(range(50)), 'an HDF5 file'),
    (b'\x80\x04\x95' + bytes(range(50)), 'a pickle'),
]


@pytest.mark.parametrize(
    'content, words', KINDS, ids=[f'{i}-{words[:20]}' for i, (_, words) in enumerate(KINDS)]
)
def test_a_file_is_called_what_it_is_whatever_its_name(content, words, tmp_path):
    path = tmp_path / 'data.bin'
    path.write_bytes(content)
    assert describe_file(path).startswith(words)
    if 'zip' not in words and not content.startswith(b'PK'):
        assert describe_file(content) == describe_file(path)


@pytest.mark.parametrize('content', [b'\x01\x02\x03\x04' * 100, b'\xff\xfe\xfd' * 100, bytes(range(256))])
def test_of_other_bytes_nothing_is_claimed(content, tmp_path):
    path = tmp_path / 'data.bin'
    path.write_bytes(content)
    assert describe_file(path) is None


def test_a_folder_is_called_a_folder(tmp_path):
    assert describe_file(tmp_path) == 'a folder'
