"""A file of another kind than the one that was asked for: what it is, and what to give instead; nothing is blamed that is whole."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from helpers import FAST, assert_one_clear_error
from PIL import Image

import compare
import convert
import fid
import generate
import search
import train
import validation
from dnnlib import UserError
from metrics import lpips
from metrics.detectors import load_detector
from metrics.reference import load_reference
from training.checkpoint import load_network, load_state, save_state


def written(write) -> bytes:
    data = io.BytesIO()
    write(data)
    return data.getvalue()


def images_zip(data):
    with zipfile.ZipFile(data, 'w') as archive:
        archive.writestr('a/1.png', written(lambda file: Image.new('L', (8, 8)).save(file, 'PNG')))


TENSORS = {'model.weight': torch.zeros(3)}
OURS = dict(net=TENSORS, update={}, averages={})
KINDS = {  # what it is called, and its bytes
    'a web page': b'<html>not a model</html>',
    'a Git LFS pointer': b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n',
    'an empty file': b'',
    'a JSON file': b'{"labels": null}',
    'a PNG image': written(lambda file: Image.new('L', (8, 8)).save(file, 'PNG')),
    'a gzip file': b'\x1f\x8b\x08' + bytes(20),
    'a tar archive': bytes(257) + b'ustar' + bytes(250),
    'a safetensors file': safetensors.torch.save(TENSORS),
    'a NumPy .npz archive': written(lambda file: np.savez(file, np.zeros([2, 8, 8, 3], np.uint8))),
    'a NumPy .npy array': written(lambda file: np.save(file, np.zeros([2, 8, 8, 3], np.uint8))),
    'a zip archive': written(images_zip),
    'a PyTorch file (torch.save)': written(lambda file: torch.save(TENSORS, file)),
    'a PyTorch file (torch.save, before': written(
        lambda file: torch.save(TENSORS, file, _use_new_zipfile_serialization=False)
    ),
    'a TorchScript file': written(lambda file: torch.jit.save(torch.jit.script(torch.nn.ReLU()), file)),
    'a training state of train.py': written(lambda file: torch.save(OURS, file)),
    'a training state of EDM': written(lambda file: torch.save(dict(net=TENSORS, optimizer_state={}), file)),
}
MAY_BE_DAMAGED = {'an empty file'}


def loaded(load, content, path) -> str:
    """The message of a refusal."""
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load(path)
    message = str(error.value)
    assert str(path) in message and 'opcode' not in message
    return message


def assert_says(message, words):
    """What it is, and only of what is probably damaged that it should be copied again."""
    assert words in message, message
    again = any(
        f'{verb} again' in message or f'{verb} it again' in message
        for verb in ('Copy', 'download', 'copy', 'Copy or recreate')
    )
    assert again == (words in MAY_BE_DAMAGED), message


@pytest.mark.parametrize('words', KINDS)
def test_what_is_no_network_is_called_what_it_is(tmp_path, words):
    assert_says(
        loaded(load_network, KINDS[words], tmp_path / 'net.pkl'),
        f'is {words}' if words not in MAY_BE_DAMAGED else words,
    )


@pytest.mark.parametrize(
    'words', [words for words in KINDS if not words.startswith('a training state of train')]
)
def test_what_is_no_training_state_is_called_what_it_is(tmp_path, words):
    assert_says(loaded(load_state, KINDS[words], tmp_path / 'state.pt'), words)


@pytest.mark.parametrize('words', [words for words in KINDS if words != 'a NumPy .npz archive'])
def test_what_is_no_reference_is_called_what_it_is(tmp_path, words):
    assert_says(loaded(load_reference, KINDS[words], tmp_path / 'ref.npz'), words)


@pytest.mark.parametrize(
    'words', [words for words in KINDS if words != 'a TorchScript file' and not words.startswith('a PyTorch')]
)
def test_what_is_no_detector_is_called_what_it_is(tmp_path, words):
    assert_says(loaded(load_detector, KINDS[words], tmp_path / 'detector.pt'), words)


@pytest.mark.parametrize(
    'words', [words for words in KINDS if words != 'a TorchScript file' and not words.startswith('a PyTorch')]
)
def test_what_is_no_weights_of_lpips_is_called_what_it_is(tmp_path, words):
    assert_says(loaded(lambda path: lpips.load(str(path)), KINDS[words], tmp_path / 'vgg.pth'), words)


def converted(path, *options):
    done = CliRunner().invoke(convert.main, [*options, str(path), str(path.with_name('out'))])
    assert not path.with_name('out').exists()
    assert_one_clear_error(done)
    raise UserError(done.stderr)


@pytest.mark.parametrize(
    'words', [words for words in KINDS if words not in ('a safetensors file', 'a PyTorch file (torch.save)')]
)
@pytest.mark.parametrize('reader', ['snapshot', 'openai', 'safetensors'])
def test_what_cannot_be_converted_is_called_what_it_is_whatever_it_is_said_to_be(tmp_path, words, reader):
    message = loaded(lambda path: converted(path, f'--from={reader}'), KINDS[words], tmp_path / 'in')
    if words.startswith('a training state of train') or 'before' in words:
        return  # of these `convert.read` and `openai` speak for themselves
    assert words in message


def test_a_state_is_answered_with_its_snapshot_and_a_snapshot_with_its_state(tmp_path, teacher):
    """The snapshot of the state's own time where there is one, else the newest; as well of a folder, and of the folder above."""
    run = tmp_path / 'runs' / '00003-digits'
    run.mkdir(parents=True)
    for kimg in (100, 200, 300):
        (run / f'network-snapshot-{kimg:06d}.pkl').write_bytes(teacher.read_bytes())
    for kimg in (200, 250):
        save_state(run / f'training-state-{kimg:06d}.pt', OURS)
    (run / 'network-snapshot-000300-0.050.pkl').write_bytes(teacher.read_bytes())

    def message(load, path):
        with pytest.raises(UserError) as error:
            load(path)
        return str(error.value)

    assert str(run / 'network-snapshot-000200.pkl') in message(load_network, run / 'training-state-000200.pt')
    assert str(run / 'network-snapshot-000300.pkl') in message(load_network, run / 'training-state-000250.pt')
    assert str(run / 'network-snapshot-000300.pkl') in message(load_network, run)
    assert f'is a folder of run folders. Name one of them, such as {run}' in message(load_network, run.parent)
    said = message(load_state, run / 'network-snapshot-000300.pkl')
    assert str(run / 'training-state-000250.pt') in said and '--transfer=' in said
    for name in ('sd', 'empty'):
        (tmp_path / name).mkdir()
    (tmp_path / 'sd' / 'model_index.json').write_text('{}')
    assert 'diffusers' in message(load_network, tmp_path / 'sd') and 'holds no network-snapshot' in message(
        load_network, tmp_path / 'empty'
    )
    for options in ([], ['--from=openai'], ['--from=safetensors']):
        done = CliRunner().invoke(convert.main, [*options, str(run), str(tmp_path / 'out')])
        assert_one_clear_error(done, str(run))
    options = [f'--outdir={tmp_path / "out"}', '--workers=0', '--seeds=0']
    done = CliRunner().invoke(generate.main, [f'--network={run.parent}', *options])
    assert_one_clear_error(done, 'is a folder of run folders', f'--network={run}')
    assert not (tmp_path / 'out').exists()
    done = CliRunner().invoke(generate.main, [f'--network={run}', *options])
    assert done.exit_code == 0, done.output
    assert f'--network={run}: its newest snapshot is {run / "network-snapshot-000300.pkl"}.' in done.stderr


@pytest.mark.parametrize(
    'content, words',
    [
        ({'ema': TENSORS}, "weights by name under 'ema' (a state dict)"),
        (TENSORS, 'weights by name (a state dict)'),
        ({'ema': {'w': np.zeros(3)}}, "weights by name under 'ema'"),
        ([1, 2], 'is not a dict of networks'),
        ({'fid': dict(mu=np.zeros(3), sigma=np.eye(3))}, 'statistics of a reference, which are for --ref'),
    ],
)
def test_a_pickle_without_networks_says_what_it_holds(tmp_path, content, words):
    assert_says(loaded(load_network, pickle.dumps(content, protocol=4), tmp_path / 'net.pkl'), words)


@pytest.mark.parametrize(
    'load', [load_reference, load_detector, load_state, lambda path: lpips.load(str(path))]
)
def test_a_network_is_called_one_wherever_something_else_was_asked_for(tmp_path, teacher, load):
    assert_says(loaded(load, teacher.read_bytes(), tmp_path / 'x'), 'is a network snapshot')


def test_a_truncated_snapshot_is_to_be_copied_again(tmp_path, teacher):
    for length in (100, 2000, -1000):
        assert 'again' in loaded(load_network, teacher.read_bytes()[:length], tmp_path / 'net.pkl')


# ----------------------------------------------------------------------------
# What is missing is said before what would be downloaded, under its option.


@pytest.fixture
def no_detectors(monkeypatch):
    def refuse(source, *_, **__):
        raise AssertionError(f'the detector {source} was loaded first')

    monkeypatch.setattr('metrics.detectors.load_detector', refuse)


@pytest.mark.parametrize('ref', ['none.npz', 'none.zip', 'none.npy', 'none', 'page.npz', 'empty'])
def test_a_reference_is_missed_before_any_detector(tmp_path, digits, teacher, no_detectors, ref):
    (tmp_path / 'page.npz').write_bytes(KINDS['a web page'])
    (tmp_path / 'empty').mkdir()
    path, run = tmp_path / ref, CliRunner().invoke
    assert_one_clear_error(
        run(fid.main, ['calc', f'--images={digits}', f'--ref={path}', '--num=20']), '--ref', ref
    )
    done = run(
        train.main,
        [
            f'--outdir={tmp_path / "runs"}',
            f'--data={digits}',
            '--cres=1,2',
            *FAST,
            '--val=1',
            f'--val_ref={path}',
        ],
    )
    assert_one_clear_error(done, '--val_ref', ref)
    done = run(
        train.main,
        [
            f'--outdir={tmp_path / "runs"}',
            f'--data={digits}',
            '--cres=1,2',
            *FAST,
            '--val=1',
            f'--val_ref_data={path}',
        ],
    )
    assert_one_clear_error(done, '--val_ref_data', ref)
    assert not (tmp_path / 'runs').exists()
    done = run(validation.main, [f'--network={teacher}', f'--ref={path}', f'--outdir={tmp_path}'])
    assert_one_clear_error(done, '--ref', ref)
    done = run(
        compare.main,
        [f'--outdir={tmp_path / "c"}', f'--data={digits}', f'--teacher={teacher}', f'--ref={path}'],
    )
    assert_one_clear_error(done, '--ref', ref)
    done = run(
        search.main, [f'--network={teacher}', '--solver=cm', f'--ref={path}', f'--log={tmp_path / "l.jsonl"}']
    )
    assert_one_clear_error(done, '--ref', ref)
    assert not (tmp_path / 'l.jsonl').exists() and not (tmp_path / 'c').exists()


def test_what_is_given_to_transfer_is_looked_at_in_a_dry_run_and_before_there_is_a_folder(tmp_path, digits):
    for options in ([], ['--dry-run']):
        (tmp_path / 'ref.npz').write_bytes(KINDS['a NumPy .npz archive'])
        done = CliRunner().invoke(
            train.main,
            [
                f'--outdir={tmp_path / "runs"}',
                f'--data={digits}',
                '--cres=1,2',
                *FAST,
                f'--transfer={tmp_path / "ref.npz"}',
                *options,
            ],
        )
        assert_one_clear_error(done, '--transfer', 'is a NumPy .npz archive')
        assert not (tmp_path / 'runs').exists()
