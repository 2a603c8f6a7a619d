"""fid.py from the command line."""
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import fid
from metrics.frechet import frechet_distance

ROOT = Path(__file__).resolve().parents[1]
DIM = 5


class Moments(torch.nn.Module):
    """Grey levels of five fixed pixels: features that a test can compute by itself."""

    def forward(self, images):
        return images[:, 0, 1, 1:6].float() / 255


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    """A folder with a detector, 60 images in nested folders and a zip of 40 others; `pixels` of each."""
    folder = tmp_path_factory.mktemp('lab')
    torch.jit.script(Moments()).save(folder / 'detector.pt')
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 200, (60, 8, 8), dtype=np.uint8), rng.integers(60, 256, (40, 8, 8), dtype=np.uint8)
    for i, pixels in enumerate(a):
        path = folder / 'samples' / f'{i // 20:02d}' / f'{i:06d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    with zipfile.ZipFile(folder / 'data.zip', 'w') as archive:
        for i, pixels in enumerate(b):
            with archive.open(f'{i:06d}.png', 'w') as file:
                Image.fromarray(pixels).save(file, 'png')
    return folder, a, b


def run(*arguments):
    return CliRunner().invoke(fid.main, [str(argument) for argument in arguments])


def gaussian(pixels):
    features = (pixels[:, 1, 1:6].astype(np.float32) / np.float32(255)).astype(np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False)


@pytest.fixture(scope='module')
def reference(lab):
    folder, *_ = lab
    result = run('ref', f'--data={folder}/data.zip', f'--dest={folder}/refs/data.npz', f'--detector={folder}/detector.pt')
    assert result.exit_code == 0 and result.stdout == '', result.output
    return folder / 'refs' / 'data.npz'


def calc(lab, reference, *more, detector='detector.pt'):
    return run('calc', f'--images={lab[0]}/samples', f'--ref={reference}', f'--detector={lab[0]}/{detector}', *more)


def one_line_error(result):
    """The message of a run that ended as errors should."""
    lines = [line for line in result.stderr.splitlines() if line.startswith('Error: ')]
    assert result.exit_code == 1 and len(lines) == 1 and result.stdout == '', result.output
    assert isinstance(result.exception, SystemExit), result.exception
    return lines[0]


def test_the_distance_is_that_of_the_images(lab, reference):
    result = calc(lab, reference, '--num=60', '--batch=7')
    assert result.exit_code == 0, result.output
    assert float(result.stdout) == pytest.approx(frechet_distance(*gaussian(lab[1]), *gaussian(lab[2])), rel=1e-8)
    assert 'Fréchet distance of 60 images' in result.stderr and 'FID' not in result.stderr
    assert 'Compare it with values of 60 images only' in result.stderr


def test_a_reference_says_how_it_was_made(lab, reference):
    with np.load(reference, allow_pickle=False) as file:
        assert (str(file['detector']), int(file['num_images']), str(file['resolution'])) == ('detector', 40, '8x8x1')
        np.testing.assert_allclose(file['sigma'], gaussian(lab[2])[1], atol=1e-12)
    assert not list(reference.parent.glob('.*'))


def test_the_images_of_a_reference_have_distance_zero(lab, reference):
    result = run('calc', f'--images={lab[0]}/data.zip', f'--ref={reference}', f'--detector={lab[0]}/detector.pt', '--num=40')
    assert 0 <= float(result.stdout) < 1e-12


def test_a_subset_is_drawn_by_the_seed(lab, reference):
    values = [calc(lab, reference, '--num=30', f'--seed={seed}').stdout for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def test_the_json_file_holds_value_interval_and_origin(lab, reference, tmp_path):
    path = tmp_path / 'new' / 'fid.json'
    result = calc(lab, reference, '--num=60', '--bootstrap=50', f'--json={path}')
    facts = json.loads(path.read_text())['fid']
    assert facts['interval'][0] < facts['value'] < facts['interval'][1]
    assert facts['value'] == pytest.approx(float(result.stdout), rel=1e-9)
    assert (facts['num_images'], facts['detector'], facts['reference'], len(facts['detector_digest'])) == (60, 'detector', str(reference), 64)
    calc(lab, reference, '--num=60', f'--json={path}')
    assert 'interval' not in json.loads(path.read_text())['fid']


def test_two_processes_agree_with_one(lab, reference, tmp_path):
    """One run in a real process, one in two under torchrun, to 1e-9; the last line on stdout is the number."""
    values = []
    for launcher in ([], ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--']):
        path = tmp_path / f'{len(values)}.json'
        command = [sys.executable, *launcher, 'fid.py', 'calc', f'--images={lab[0]}/samples', f'--ref={reference}',
                   f'--detector={lab[0]}/detector.pt', '--num=51', '--batch=8', '--bootstrap=20', f'--json={path}']
        result = subprocess.run(command, cwd=ROOT, env={**os.environ, 'CUDA_VISIBLE_DEVICES': ''}, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        assert len(result.stdout.splitlines()) == 1
        values.append([float(result.stdout), *json.loads(path.read_text())['fid']['interval']])
    np.testing.assert_allclose(values[0], values[1], rtol=1e-9)


def test_too_few_images_are_an_error_that_names_the_option(lab, reference):
    assert '60 images, expected at least 50000' in one_line_error(calc(lab, reference))


def test_missing_and_empty_inputs_are_named(lab, reference, tmp_path):
    detector = f'--detector={lab[0]}/detector.pt'
    assert 'nowhere' in one_line_error(run('calc', '--images=nowhere', f'--ref={reference}', detector))
    assert str(tmp_path) in one_line_error(run('calc', f'--images={tmp_path}', f'--ref={reference}', detector))
    assert 'nowhere.npz does not exist' in one_line_error(calc(lab, 'nowhere.npz'))
    assert 'nowhere.pt does not exist' in one_line_error(calc(lab, reference, '--num=60', detector='nowhere.pt'))
    assert 'is a directory' in one_line_error(run('ref', f'--data={lab[0]}/data.zip', f'--dest={tmp_path}', detector))


def test_a_corrupt_image_is_named(lab, reference, tmp_path):
    for i in range(4):
        Image.fromarray(lab[1][i]).save(tmp_path / f'{i}.png')
    (tmp_path / '2.png').write_bytes((tmp_path / '2.png').read_bytes()[:70])
    result = run('calc', f'--images={tmp_path}', f'--ref={reference}', f'--detector={lab[0]}/detector.pt', '--num=4')
    assert '2.png' in one_line_error(result)


def test_unusable_references_are_named_and_nothing_in_them_runs(lab, reference, tmp_path):
    digest = str(np.load(reference)['detector_digest'])
    nan, marker = np.full(DIM, np.nan), tmp_path / 'code-ran'

    class Hostile:
        def __reduce__(self):
            return Path.touch, (marker,)

    cases = {
        'nan': (dict(mu=nan, sigma=np.eye(DIM)), 'NaN'),
        'skew': (dict(mu=np.zeros(DIM), sigma=np.triu(np.ones((DIM, DIM)))), 'not symmetric'),
        'half': (dict(mu=np.zeros(DIM)), 'has no sigma'),
        'dims': (dict(mu=np.zeros(7), sigma=np.eye(7), detector_digest=digest), 'is of 7 features, detector detector returns 5'),
        'other': (dict(mu=np.zeros(DIM), sigma=np.eye(DIM), detector='inception', detector_digest='b' * 64), 'was made with detector inception'),
        'pickled': (dict(mu=np.array([Hostile()], dtype=object), sigma=np.eye(1)), 'plain arrays'),
    }
    for name, (arrays, words) in cases.items():
        np.savez(tmp_path / f'{name}.npz', **arrays)
        assert words in one_line_error(calc(lab, tmp_path / f'{name}.npz', '--num=60'))
    (tmp_path / 'bare.npz').write_bytes(pickle.dumps(Hostile()))
    assert 'not an .npz' in one_line_error(calc(lab, tmp_path / 'bare.npz', '--num=60'))
    assert not marker.exists()


def test_a_reference_of_unknown_origin_is_used_with_a_warning(lab, tmp_path):
    mu, sigma = gaussian(lab[2])
    np.savez(tmp_path / 'edm.npz', mu=mu, sigma=sigma)
    result = calc(lab, tmp_path / 'edm.npz', '--num=60')
    assert result.exit_code == 0 and 'does not record its detector' in result.stderr and float(result.stdout) > 0


def test_usage_errors_exit_with_2():
    for arguments in (['calc'], ['calc', '--images=x', '--ref=y', '--num=many'], ['measure']):
        assert run(*arguments).exit_code == 2


def test_help_loads_nothing_heavy():
    code = "import sys, fid; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'scipy', 'PIL', 'requests')))"
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0
