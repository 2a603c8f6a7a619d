"""TorchScript files are programs: whoever has one run is told so, once, unless its digest was named."""

import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from dnnlib import UserError
from dnnlib.downloads import file_sha256, local_path, pinned
from metrics import detectors, lpips
from metrics.detectors import load_detector


class Mean(torch.nn.Module):
    def forward(self, images):
        return images.float().mean(dim=(2, 3))


class Embedding(torch.nn.Module):
    def forward(self, images, return_lpips: bool = False):
        return images.flatten(1)[:, :4]


def script(module, path):
    torch.jit.script(module).save(path)
    return str(path)


@pytest.fixture(autouse=True)
def nothing_said_yet():
    detectors.warn_of_program.cache_clear()


@pytest.mark.parametrize('load, module', [(load_detector, Mean()), (lpips.load, Embedding())])
def test_a_program_is_told_of_once_with_the_digest_to_name(tmp_path, capsys, load, module):
    path = script(module, tmp_path / 'a.pt')
    for _ in range(2):
        load(path)
    (line,) = capsys.readouterr().err.splitlines()
    assert path in line and 'a program' in line and f'#sha256={file_sha256(path)}' in line
    load(pinned(path, file_sha256(path)))
    assert capsys.readouterr().err == ''


def test_a_digest_in_an_option_is_enough(tmp_path, capsys):
    path = script(Mean(), tmp_path / 'a.pt')
    load_detector(path, sha256=file_sha256(path))
    assert capsys.readouterr().err == ''


def test_only_the_main_process_speaks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('torch_utils.distributed.is_main', lambda: False)
    load_detector(script(Mean(), tmp_path / 'a.pt'))
    assert capsys.readouterr().err == ''


def test_the_published_detector_is_known(tmp_path, capsys, monkeypatch):
    path = script(Mean(), tmp_path / 'a.pt')
    monkeypatch.setattr(detectors, 'local_path', lambda source, **_: path)
    load_detector(detectors.INCEPTION_URL)
    assert capsys.readouterr().err == ''


def test_a_path_may_name_its_digest(tmp_path):
    path = tmp_path / 'a.bin'
    path.write_bytes(b'x')
    assert local_path(pinned(str(path), file_sha256(path))) == path
    for digest, expected in (('0' * 64, None), (file_sha256(path), '0' * 64)):
        with pytest.raises(UserError, match='digest'):
            local_path(pinned(str(path), digest), sha256=expected)


@pytest.mark.parametrize(
    'command', ['fid.py calc', 'fid.py ref', 'validation.py', 'search.py', 'compare.py', 'train.py']
)
def test_help_says_so(command):
    done = subprocess.run(
        [sys.executable, *command.split(), '--help-all' if command == 'train.py' else '--help'],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert ' '.join(done.stdout.split()).count('is a program that PyTorch runs') == (
        2 if command == 'train.py' else 1
    )
