"""fid.py from the command line."""

import functools
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import assert_one_clear_error, run_ranks
from PIL import Image

import fid
import generate
from metrics.frechet import frechet_distance
from metrics.inception_score import inception_score
from metrics.kernel import kernel_distance
from metrics.measures import MEASURES
from metrics.neighbors import density_coverage, precision_recall
from metrics.uncertainty import frechet_infinity

ROOT = Path(__file__).resolve().parents[1]
DIM = 5


class Moments(torch.nn.Module):
    """Gray levels of five fixed pixels: features that a test can compute by itself."""

    def forward(self, images):
        return images[:, 0, 1, 1:6].float() / 255


class Classes(torch.nn.Module):
    """The same, and two classes by the first of them, in the manner of NVIDIA's Inception."""

    def forward(self, images, return_features: bool = False):
        features = images[:, 0, 1, 1:6].float() / 255
        return features if return_features else torch.stack([features[:, 0], 1 - features[:, 0]], dim=1)


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    """A folder with a detector, 60 images in nested folders and a zip of 40 others; `pixels` of each."""
    folder = tmp_path_factory.mktemp('lab')
    torch.jit.script(Moments()).save(folder / 'detector.pt')
    torch.jit.script(Classes()).save(folder / 'classes.pt')
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


run = functools.partial(helpers.invoke, fid.main)


def features(pixels):
    return torch.from_numpy(pixels[:, 1, 1:6].astype(np.float32) / np.float32(255))


def gaussian(pixels):
    values = features(pixels).double().numpy()
    return values.mean(axis=0), np.cov(values, rowvar=False)


@pytest.fixture(scope='module')
def reference(lab):
    folder, *_ = lab
    result = run(
        'ref',
        f'--data={folder}/data.zip',
        f'--dest={folder}/refs/data.npz',
        f'--detector={folder}/detector.pt',
    )
    assert result.exit_code == 0 and result.stdout == '', result.output
    return folder / 'refs' / 'data.npz'


def calc(lab, reference, *more, detector='detector.pt'):
    return run(
        'calc', f'--images={lab[0]}/samples', f'--ref={reference}', f'--detector={lab[0]}/{detector}', *more
    )


def one_line_error(result):
    """The message of a run that ended as errors should."""
    lines = [line for line in result.stderr.splitlines() if line.startswith('Error: ')]
    assert result.exit_code == 1 and len(lines) == 1 and result.stdout == '', result.output
    assert isinstance(result.exception, SystemExit), result.exception
    return lines[0]


def test_the_distance_is_that_of_the_images(lab, reference):
    result = calc(lab, reference, '--num=60', '--batch=7')
    assert result.exit_code == 0, result.output
    assert float(result.stdout) == pytest.approx(
        frechet_distance(*gaussian(lab[1]), *gaussian(lab[2])), rel=1e-8
    )
    assert (
        f'60 images of {lab[0]}/samples, detector detector' in result.stderr and 'FID ' not in result.stderr
    )
    assert 'Compare it only with values of 60 images' in result.stderr


def test_a_reference_says_how_it_was_made(lab, reference):
    with np.load(reference, allow_pickle=False) as file:
        assert (str(file['detector']), int(file['num_images']), str(file['resolution'])) == (
            'detector',
            40,
            '8x8x1',
        )
        np.testing.assert_allclose(file['sigma'], gaussian(lab[2])[1], atol=1e-12)
    assert not list(reference.parent.glob('.*'))


def test_the_images_of_a_reference_have_distance_zero(lab, reference):
    result = run(
        'calc',
        f'--images={lab[0]}/data.zip',
        f'--ref={reference}',
        f'--detector={lab[0]}/detector.pt',
        '--num=40',
    )
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
    assert (facts['num_images'], facts['detector'], facts['reference'], len(facts['detector_digest'])) == (
        60,
        'detector',
        str(reference),
        64,
    )
    calc(lab, reference, '--num=60', f'--json={path}')
    assert 'interval' not in json.loads(path.read_text())['fid']


def test_classes_in_turn_have_another_interval_and_no_image_may_be_missing(lab, reference, tmp_path):
    intervals = []
    for strata in ([], ['--bootstrap-strata=1'], ['--bootstrap-strata=3']):
        calc(lab, reference, '--num=60', '--bootstrap=50', f'--json={tmp_path / "x.json"}', *strata)
        intervals.append(json.loads((tmp_path / 'x.json').read_text())['fid']['interval'])
    assert intervals[0] == intervals[1] != intervals[2]
    for options, problem in (
        (['--num=50', '--bootstrap-strata=3'], '--bootstrap-strata=3: 10 of 60 images are left out'),
        (['--num=60', '--bootstrap-strata=60'], '60 images are fewer than 10 of each class'),
        (['--num=60', '--bootstrap-strata=7'], '60 images are fewer than 10 of each class'),
    ):
        assert problem in one_line_error(calc(lab, reference, '--bootstrap=40', *options))


def test_every_number_of_processes_gives_the_same_numbers(lab, reference, tmp_path):
    """One, 2 and 3 processes, to 1e-9: batches of 8 of 51 images, so that shares are unequal and the last batch is filled up.
    The only line on stdout is the number."""
    values = []
    for processes in (1, 2, 3):
        path = tmp_path / f'{processes}.json'
        result = run_ranks(
            processes,
            'fid.py',
            'calc',
            f'--images={lab[0]}/samples',
            f'--ref={lab[0]}/data.zip',
            '--metrics=fid,kid,recall,is',
            f'--detector={lab[0]}/classes.pt',
            '--num=51',
            '--batch=8',
            '--bootstrap=40',
            f'--json={path}',
            f'--cache={tmp_path}/{processes}',
            timeout=120,
        )
        assert len(result.stdout.splitlines()) == 1
        found = json.loads(path.read_text())
        assert found['fid']['num_images'] == 51
        values.append(
            [
                float(result.stdout),
                *found['fid']['interval'],
                *(found[name]['value'] for name in ('fid', 'kid', 'recall', 'is')),
            ]
        )
    np.testing.assert_allclose(values[1:], values[:1] * 2, rtol=1e-9)


def test_all_measures_come_from_one_pass_and_are_those_of_the_library(lab, tmp_path):
    """Against the images themselves as the reference; every entry says what it is and of what."""
    folder, a, b = lab
    names = 'kid,fid,fid_inf,precision,recall,density,coverage,is'
    result = run(
        'calc',
        f'--images={folder}/samples',
        f'--ref={folder}/data.zip',
        f'--detector={folder}/classes.pt',
        f'--metrics={names}',
        '--num=60',
        '--batch=25',
        '--nearest-k=4',
        '--seed=3',
        f'--json={tmp_path}/all.json',
    )
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / 'all.json').read_text())
    x, y = features(a), features(b)
    mu, sigma = gaussian(b)
    (precision, recall), (density, coverage) = precision_recall(x, y, 4), density_coverage(x, y, 4)
    expected = dict(
        kid=kernel_distance(x, y, seed=3)['value'],
        fid=frechet_distance(*gaussian(a), mu, sigma),
        fid_inf=frechet_infinity(x, mu, sigma, seed=3)['value'],
        precision=precision,
        recall=recall,
        density=density,
        coverage=coverage,
        **{'is': inception_score(torch.stack([x[:, 0], 1 - x[:, 0]], dim=1))['value']},
    )
    assert {name: entry['value'] for name, entry in found.items()} == pytest.approx(
        expected, rel=1e-6
    ) and len(found) == 8
    assert float(result.stdout) == pytest.approx(expected['kid'], rel=1e-6)
    assert {entry['name'] for entry in found.values()} >= {'KID', 'FID', 'Inception Score'}
    assert (
        found['recall']['k'],
        found['recall']['reference_features'],
        found['fid']['reference_images'],
    ) == (4, 40, 40)
    assert 'reference' not in found['is'] and 'against' not in next(
        line for line in result.stderr.splitlines() if 'Inception Score' in line
    )
    assert all(
        entry['num_images'] == 60 and entry['detector'] == 'classes' and entry['skipped'] == 0
        for entry in found.values()
    )


def test_measures_of_features_find_them_in_the_reference(lab, tmp_path):
    """In ours, if it was made with --features; in OpenAI's, by its images."""
    folder, _, b = lab
    detector = f'--detector={folder}/detector.pt'
    calc_kid = lambda ref: run(
        'calc', f'--images={folder}/samples', f'--ref={ref}', detector, '--metrics=kid', '--num=60'
    )
    expected = float(calc_kid(folder / 'data.zip').stdout)
    run('ref', f'--data={folder}/data.zip', f'--dest={tmp_path}/ours.npz', detector, '--features=40')
    mu, sigma = gaussian(b)
    np.savez(tmp_path / 'openai.npz', mu=mu, sigma=sigma, arr_0=np.repeat(b[..., None], 3, axis=3))
    np.savez(tmp_path / 'images.npz', arr_0=b)
    for name in ('ours', 'openai', 'images'):
        assert float(calc_kid(tmp_path / f'{name}.npz').stdout) == pytest.approx(expected, rel=1e-6), name
    run('ref', f'--data={folder}/data.zip', f'--dest={tmp_path}/few.npz', detector, '--features=10')
    with np.load(tmp_path / 'few.npz') as file:
        assert file['features'].shape == (10, DIM) and int(file['num_images']) == 40
    assert 'against' in (said := calc_kid(tmp_path / 'few.npz').stderr) and 'few.npz (10 images)' in said
    run('ref', f'--data={folder}/data.zip', f'--dest={tmp_path}/bare.npz', detector)
    assert_one_clear_error(calc_kid(tmp_path / 'bare.npz'), 'has no features, which kid needs', '--features')


def test_a_detector_without_classes_has_no_inception_score(lab):
    result = run(
        'calc', f'--images={lab[0]}/samples', f'--detector={lab[0]}/detector.pt', '--metrics=is', '--num=60'
    )
    assert_one_clear_error(result, 'Detector detector has no classes')


def test_an_extrapolation_of_too_few_images_is_refused_before_any_work(lab, reference):
    """Four images for each of the five features are needed."""
    assert_one_clear_error(
        calc(lab, reference, '--metrics=fid_inf', '--num=19'), '19 images are too few', 'at least 20'
    )


def test_arrays_are_measured_like_folders(lab, reference, tmp_path):
    expected = float(calc(lab, reference, '--num=60').stdout)
    np.save(tmp_path / 'gray.npy', lab[1])
    np.savez(tmp_path / 'rgb.npz', np.repeat(lab[1][..., None], 3, axis=3))
    for name in ('gray.npy', 'rgb.npz'):
        result = run(
            'calc',
            f'--images={tmp_path}/{name}',
            f'--ref={reference}',
            f'--detector={lab[0]}/detector.pt',
            '--num=60',
        )
        assert float(result.stdout) == pytest.approx(expected, rel=1e-9)


def test_a_random_subset_is_called_one_and_of_how_many(lab, reference, tmp_path):
    """Of a folder, an array and a data set; all images are no subset, and those that are left out are none of it."""
    detector = f'--detector={lab[0]}/detector.pt'
    np.save(tmp_path / 'gray.npy', lab[1])
    for images in (lab[0] / 'samples', tmp_path / 'gray.npy'):
        result = run(
            'calc',
            f'--images={images}',
            f'--ref={reference}',
            detector,
            '--num=20',
            f'--json={tmp_path}/fid.json',
        )
        assert f'a random subset of 20 of 60 images of {images}' in result.stderr
        found = json.loads((tmp_path / 'fid.json').read_text())['fid']
        assert (found['num_images'], found['total_images']) == (20, 60)
    assert ': 60 images of' in calc(lab, reference, '--num=60').stderr
    said = run('ref', f'--data={lab[0]}/data.zip', f'--dest={tmp_path}/ref.npz', detector, '--num=30').stderr
    assert 'Statistics of a random subset of 30 of 40 images written' in said
    assert (
        'Statistics of 40 images written'
        in run('ref', f'--data={lab[0]}/data.zip', f'--dest={tmp_path}/ref.npz', detector).stderr
    )
    shutil.copytree(lab[0] / 'samples', tmp_path / 'samples')
    (tmp_path / 'samples' / '00' / '000007.png').write_bytes(b'no image')
    said = [
        run(
            'calc',
            f'--images={tmp_path}/samples',
            f'--ref={reference}',
            detector,
            '--skip-bad',
            f'--num={num}',
        ).stderr
        for num in (60, 59)
    ]
    assert ': 59 images of' in said[0] and 'a random subset of 5' in said[1] and 'of 60 images of' in said[1]


def test_a_networks_images_are_measured_without_writing_them(lab, teacher, tmp_path):
    """The same as those that generate.py writes; of two sets each value, mean and minimum."""
    ref, detector = f'--ref={lab[0]}/data.zip', f'--detector={lab[0]}/detector.pt'
    values = []
    for seeds in ('0-19', '20-39'):
        CliRunner().invoke(
            generate.main,
            [f'--network={teacher}', f'--outdir={tmp_path}/{seeds}', f'--seeds={seeds}', '--steps=3'],
        )
        values.append(float(run('calc', f'--images={tmp_path}/{seeds}', ref, detector, '--num=20').stdout))
    result = run(
        'calc',
        f'--network={teacher}',
        '--seeds=0-19',
        '--seeds=20-39',
        '--steps=3',
        '--batch=8',
        ref,
        detector,
        f'--json={tmp_path}/fid.json',
    )
    found = json.loads((tmp_path / 'fid.json').read_text())['fid']
    assert [entry['value'] for entry in found['sets']] == pytest.approx(
        values, rel=1e-2
    )  # a level of rounding here and there
    assert (
        found['sets'][1]['images'] == f'{teacher}, seeds 20-39, --steps=3'
        and found['sets'][1]['num_images'] == 20
    )
    assert (
        found['value'] == found['mean'] == pytest.approx(sum(entry['value'] for entry in found['sets']) / 2)
    )
    assert found['minimum'] == min(entry['value'] for entry in found['sets']) and float(
        result.stdout
    ) == pytest.approx(found['mean'], rel=1e-9)
    assert 'mean' in result.stderr and 'minimum' in result.stderr and 'EDM' not in result.stderr


def test_features_in_the_cache_are_not_computed_again(lab, reference, tmp_path):
    """With a detector that has meanwhile become unable to see: its digest alone is what the cache knows it by."""
    first = calc(lab, reference, '--num=60', f'--cache={tmp_path}')
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*.npz')}
    second = calc(lab, reference, '--num=60', f'--cache={tmp_path}', '--bootstrap=40')
    assert (
        first.stdout == second.stdout
        and stamps
        and {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*.npz')} == stamps
    )


def test_bad_images_are_left_out_on_request_and_counted(lab, reference, tmp_path):
    for i in range(30):
        Image.fromarray(lab[1][i]).save(tmp_path / f'{i:02d}.png')
    (tmp_path / '07.png').write_bytes((tmp_path / '07.png').read_bytes()[:60])
    Image.fromarray(lab[1][8]).convert('RGB').save(tmp_path / '08.png')
    arguments = [
        f'--images={tmp_path}',
        f'--ref={reference}',
        f'--detector={lab[0]}/detector.pt',
        '--num=30',
        f'--json={tmp_path}/out.json',
    ]
    assert_one_clear_error(run('calc', *arguments), '07.png')
    assert not (tmp_path / 'out.json').exists()
    result = run('calc', *arguments, '--skip-bad')
    found = json.loads((tmp_path / 'out.json').read_text())['fid']
    assert (
        (found['num_images'], found['skipped']) == (28, 2)
        and '2 of 30 images' in result.stderr
        and '07.png' in result.stderr
    )
    kept = np.delete(lab[1][:30], [7, 8], axis=0)
    assert found['value'] == pytest.approx(frechet_distance(*gaussian(kept), *gaussian(lab[2])), rel=1e-8)
    Image.fromarray(lab[1][0]).convert('RGB').save(
        tmp_path / '00.png'
    )  # the one that the others are compared with
    assert_one_clear_error(run('calc', *arguments, '--skip-bad'), '28 of 30 images', '01.png')


def test_a_bad_image_on_one_process_of_two_ends_both_without_a_traceback(lab, reference, tmp_path):
    """It is in the second process's share; the first one waits for it in vain."""
    for i in range(30):
        Image.fromarray(lab[1][i]).save(tmp_path / f'{i:02d}.png')
    (tmp_path / '12.png').write_bytes((tmp_path / '12.png').read_bytes()[:60])
    result = run_ranks(
        2,
        'fid.py',
        'calc',
        f'--images={tmp_path}',
        f'--ref={reference}',
        f'--detector={lab[0]}/detector.pt',
        '--num=30',
        '--batch=10',
        check=False,
    )
    assert (
        result.returncode == 1
        and 'Error: ' in result.stderr
        and '12.png' in result.stderr
        and result.stdout == ''
    )
    assert 'Traceback' not in result.stderr, result.stderr


def test_copies_are_noted(lab, reference, tmp_path):
    for i in range(12):
        Image.fromarray(lab[1][i % 10]).save(tmp_path / f'{i}.png')
    result = run(
        'calc', f'--images={tmp_path}', f'--ref={reference}', f'--detector={lab[0]}/detector.pt', '--num=12'
    )
    assert '2 of 12 images' in result.stderr and 'exact copies' in result.stderr


def test_a_reference_of_another_resolution_is_noted(lab, reference, tmp_path):
    np.save(tmp_path / 'larger.npy', np.repeat(np.repeat(lab[1], 2, axis=1), 2, axis=2))
    result = run(
        'calc',
        f'--images={tmp_path}/larger.npy',
        f'--ref={reference}',
        f'--detector={lab[0]}/detector.pt',
        '--num=60',
    )
    assert 'is of 8x8 images, but these are 16x16' in result.stderr and result.exit_code == 0
    result = run(
        'calc',
        f'--images={lab[0]}/samples',
        f'--images={tmp_path}/larger.npy',
        f'--ref={lab[0]}/data.zip',
        f'--detector={lab[0]}/detector.pt',
        '--num=60',
    )
    assert 'data.zip is of 8x8 images, but these are 16x16' in result.stderr and result.exit_code == 0


def test_images_compared_with_themselves_are_noted(lab):
    result = calc(lab, f'{lab[0]}/./samples', '--num=60')
    assert float(result.stdout) < 1e-12 and 'compared with themselves' in result.stderr


def test_the_name_of_a_value_is_that_of_its_detector(lab, reference):
    """Inception's is FID-infinity; another detector's is not. Nor is FD-DINOv2 that of another size than ViT-L/14."""
    assert MEASURES['fd_dinov2'].title.format('Fréchet distance') == 'Fréchet distance'
    result = calc(lab, reference, '--num=60', '--metrics=fid_inf')
    assert 'Fréchet distance-infinity' in result.stderr and 'FID' not in result.stderr


def test_all_images_are_seen_before_any_are_compared(lab, reference, monkeypatch):
    """The main process compares alone, for minutes perhaps; others that wait for it in the next pass would run into their time limit."""
    events = []
    features_of, sentence = fid.features_of, fid.sentence
    monkeypatch.setattr(fid, 'features_of', lambda *args: (events.append('look'), features_of(*args))[1])
    monkeypatch.setattr(fid, 'sentence', lambda found: (events.append('compare'), sentence(found))[1])
    result = calc(lab, reference, f'--images={lab[0]}/data.zip', '--num=40')
    assert result.exit_code == 0 and events == ['look', 'look', 'compare', 'compare']


def test_too_few_images_are_an_error_that_names_the_option(lab, reference):
    assert '60 images, expected at least 50000. Make more images, or pass --num=60.' in one_line_error(
        calc(lab, reference)
    )


def test_a_single_image_is_no_reason_to_advise_num_1(lab, reference, tmp_path):
    Image.fromarray(lab[1][0]).save(tmp_path / '0.png')
    result = run('calc', f'--images={tmp_path}', f'--ref={reference}', f'--detector={lab[0]}/detector.pt')
    assert '--num=1' not in one_line_error(result)


def test_a_detector_whose_features_are_no_numbers_is_named_with_their_count(lab, reference, tmp_path):
    class Blind(torch.nn.Module):
        def forward(self, images):
            return images[:, 0, 1, 1:6].float() / 0

    torch.jit.script(Blind()).save(tmp_path / 'blind.pt')
    np.savez(tmp_path / 'edm.npz', mu=np.zeros(DIM), sigma=np.eye(DIM))
    result = run(
        'calc',
        f'--images={lab[0]}/samples',
        f'--ref={tmp_path}/edm.npz',
        f'--detector={tmp_path}/blind.pt',
        '--num=60',
    )
    assert (
        'Detector blind returns features that are not finite (NaN or infinite) for 60 of 60 images'
        in one_line_error(result)
    )


def test_missing_and_empty_inputs_are_named(lab, reference, tmp_path):
    detector = f'--detector={lab[0]}/detector.pt'
    assert 'nowhere' in one_line_error(run('calc', '--images=nowhere', f'--ref={reference}', detector))
    assert str(tmp_path) in one_line_error(
        run('calc', f'--images={tmp_path}', f'--ref={reference}', detector)
    )
    assert 'nowhere.npz does not exist' in one_line_error(calc(lab, 'nowhere.npz'))
    assert 'nowhere.pt does not exist' in one_line_error(
        calc(lab, reference, '--num=60', detector='nowhere.pt')
    )
    assert 'is a directory' in one_line_error(
        run('ref', f'--data={lab[0]}/data.zip', f'--dest={tmp_path}', detector)
    )


def test_a_corrupt_image_is_named(lab, reference, tmp_path):
    for i in range(4):
        Image.fromarray(lab[1][i]).save(tmp_path / f'{i}.png')
    (tmp_path / '2.png').write_bytes((tmp_path / '2.png').read_bytes()[:70])
    result = run(
        'calc', f'--images={tmp_path}', f'--ref={reference}', f'--detector={lab[0]}/detector.pt', '--num=4'
    )
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
        'dims': (
            dict(mu=np.zeros(7), sigma=np.eye(7), detector_digest=digest),
            'has 7 features, but detector detector returns 5',
        ),
        'other': (
            dict(mu=np.zeros(DIM), sigma=np.eye(DIM), detector='inception', detector_digest='b' * 64),
            'was made with detector inception',
        ),
        'pickled': (
            dict(mu=np.array([Hostile()], dtype=object), sigma=np.eye(1)),
            'not a readable plain array',
        ),
    }
    for name, (arrays, words) in cases.items():
        np.savez(tmp_path / f'{name}.npz', **arrays)
        assert words in one_line_error(calc(lab, tmp_path / f'{name}.npz', '--num=60'))
    (tmp_path / 'bare.npz').write_bytes(pickle.dumps(Hostile()))
    assert 'refused, nothing was executed' in one_line_error(calc(lab, tmp_path / 'bare.npz', '--num=60'))
    assert not marker.exists()


def test_a_reference_of_fewer_images_than_features_is_warned_of(lab, tmp_path):
    for i, pixels in enumerate(lab[2][:5]):
        Image.fromarray(pixels).save(tmp_path / f'{i}.png')
    result = calc(lab, tmp_path, '--num=60')
    assert f'{tmp_path} has 5 images, no more than the detector has features (5)' in result.stderr
    assert 'no more than' not in calc(lab, lab[0] / 'data.zip', '--num=60').stderr


def test_a_reference_of_unknown_origin_is_used_with_a_warning(lab, tmp_path):
    mu, sigma = gaussian(lab[2])
    np.savez(tmp_path / 'edm.npz', mu=mu, sigma=sigma)
    result = calc(lab, tmp_path / 'edm.npz', '--num=60')
    assert (
        result.exit_code == 0 and 'does not record its detector' in result.stderr and float(result.stdout) > 0
    )


def test_usage_errors_exit_with_2():
    for arguments, words in {
        'measure': 'No such command',
        'calc': 'either --images or --network',
        'calc --images=x --network=y --ref=z': 'either --images or --network',
        'calc --network=y --ref=z': 'belong together',
        'calc --network=y --seeds=0-9 --num=10 --ref=z': '--num is for --images',
        'calc --network=y --seeds=0-9 --seeds=9-12 --ref=z': 'some seeds are given twice',
        'calc --network=y --seeds=0-9,3-4 --ref=z': '3-4 of 12 seeds named twice',
        f'calc --network=y --seeds=7 --seeds={7 + (1 << 32)} --ref=z': f'no seed {7 + (1 << 32)}',
        'calc --images=x --ref=y --steps=4 --class=1 --disc=vp --force-steps': '--class, --steps, --force-steps, --disc: applies to --network',
        'calc --images=x --images=./x --ref=z': '--images: the same path',
        'calc --images=x': '--ref is missing',
        'calc --images=x --ref=y --metrics=is --bootstrap=40': '--bootstrap is for',
        'calc --images=x --ref=y --bootstrap=39': '39 resamples have no 95 % interval: give 40 or more',
        'calc --images=x --ref=y --bootstrap-strata=5': '--bootstrap-strata is for --bootstrap',
        'calc --images=x --ref=y --metrics=fid_inf --bootstrap=40': '--bootstrap is for',
        'calc --images=x --ref=y --nearest-k=4': '--nearest-k is for',
        'calc --images=x --ref=y --dinov2=d': '--dinov2: not used by fid.',
        'calc --images=x --ref=y --metrics=fd_dinov2 --detector=d --detector-sha256=e': '--detector, --detector-sha256: not used by fd_dinov2.',
        'ref --data=x --dest=y --dinov2=d': '--dinov2: not used by fid.',
        f'ref --data=x --dest=y --seed={1 << 32}': '--seed',
        'calc --images=x --ref=y --num=many': 'many',
        'calc --network=x --ref=y --seeds=0-99999999999': 'has more than 10,000,000 numbers',
        'calc --images=x --ref=y --metrics=fid,lpips': "'lpips' is not one of",
        'calc --images=x --ref=y --metrics=fid,kid,fid': "'fid' is repeated",
        'ref --data=x --dest=y --metrics=kid': "'kid' is not one of fid, fd_dinov2",
    }.items():
        assert_one_clear_error(run(*arguments.split()), words, status=2)
