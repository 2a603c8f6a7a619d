"""A run is resumed on the data that it was trained on: what counts as the same, what differs by name, and how to insist."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import FAST, TINY_NETWORK, assert_one_clear_error, run_ranks
from PIL import Image

import train
from data.dataset import DIGESTED_FILES, ImageFolderDataset, random_subset
from dnnlib import UserError
from training.checkpoint import load_network, load_state, save_state
from training.run_files import saved_states

COUNT = 40


def data_warnings(result):
    """Those of a run of three steps aside, which says that its learning rate still rises."""
    said = [line for line in result.stderr.splitlines() if 'Warning' in line]
    return [line for line in said if 'learning rate' not in line]


def write_folder(path, count=COUNT, size=8, labels=True, changed=(), renamed=(), seed=0):
    """Random gray images of classes 0 to 3 in two folders; uncompressed, so that all files are of one length."""
    for i in range(count):
        rng = np.random.default_rng([seed, i + 1000 * (i in changed)])
        name = path / f'{i % 2}' / f'{i:03d}{"x" * (i in renamed)}.png'
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, [size, size], np.uint8)).save(name, compress_level=0)
    if labels:
        names = sorted(str(file.relative_to(path)) for file in path.rglob('*.png'))
        (path / 'dataset.json').write_text(
            json.dumps({'labels': [[name, i % 4] for i, name in enumerate(names)]})
        )
    return path


def zipped(folder, path, method=zipfile.ZIP_STORED, within='', order=1):
    with zipfile.ZipFile(path, 'w', method) as archive:
        for file in sorted(folder.rglob('*'))[::order]:
            if file.is_file():
                archive.write(file, within + str(file.relative_to(folder)))
    return path


def digest(path, **options):
    return ImageFolderDataset(path, **options).digest()


def invoke(data, folder, *options):
    return CliRunner().invoke(
        train.main,
        [
            f'--outdir={folder}',
            f'--data={data}',
            *TINY_NETWORK,
            *FAST,
            '--batch=4',
            '--augment=0',
            '--tick=0.004',
            '--snap=0',
            '--dump=1',
            '--cond=1',
            *map(str, options),
        ],
    )


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp('data') / 'images')


@pytest.fixture(scope='module')
def begun(data, tmp_path_factory):
    """A run of two steps, to be copied."""
    folder = tmp_path_factory.mktemp('begun')
    result = invoke(data, folder, '--duration=0.000008')
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def run_folder(begun, tmp_path):
    return shutil.copytree(begun, tmp_path / 'run')


def resume(folder, data, *options):
    return invoke(data, folder, f'--resume={folder}', '--duration=0.000012', *options)


# ----------------------------------------------------------------------------
# The digest.


def test_a_folder_and_its_zips_are_the_same_data(tmp_path, data):
    """Deflated, stored, in another order, with a folder around it, under another name; with the label file written otherwise."""
    whole = digest(data, use_labels=True)
    copies = [
        zipped(data, tmp_path / 'a.zip'),
        zipped(data, tmp_path / 'b.zip', zipfile.ZIP_DEFLATED),
        zipped(data, tmp_path / 'c.zip', order=-1),
        zipped(data, tmp_path / 'd.zip', within='some/'),
        shutil.copytree(data, tmp_path / 'elsewhere'),
    ]
    labels = json.loads((data / 'dataset.json').read_text())['labels']
    (copies[-1] / 'dataset.json').write_text(json.dumps({'labels': labels[::-1]}, indent=3))
    assert {digest(copy, use_labels=True) for copy in copies} == {whole}
    assert digest(data, use_labels=True, xflip=True, max_size=7) == whole


def test_other_names_sizes_contents_and_labels_are_other_data(tmp_path, data):
    """The first, the last and a middle one of the 16 files whose bytes count: of 40, every 2.6th."""
    whole, seen = digest(data, use_labels=True), set()
    middle = 7 * (COUNT - 1) // (DIGESTED_FILES - 1)
    order = [int(file.stem) for file in sorted(data.rglob('*.png'))]
    others = [
        write_folder(tmp_path / f'{kind}{i}', **options)
        for i, (kind, options) in enumerate(
            [
                ('fewer', dict(count=COUNT - 1)),
                ('larger', dict(size=16)),
                ('renamed', dict(renamed=[20])),
                *(('changed', dict(changed=[order[place]])) for place in (0, middle, COUNT - 1)),
            ]
        )
    ]
    assert len({(other / '0' / '000.png').stat().st_size for other in (others[0], *others[3:])}) == 1
    longer = shutil.copytree(data, tmp_path / 'longer')  # not one of the 16, but longer
    place = next(
        i
        for i in range(COUNT)
        if i not in {k * (COUNT - 1) // (DIGESTED_FILES - 1) for k in range(DIGESTED_FILES)}
    )
    with open(sorted(longer.rglob('*.png'))[place], 'ab') as file:
        file.write(b'.')
    relabeled = shutil.copytree(data, tmp_path / 'relabeled')
    text = (relabeled / 'dataset.json').read_text()
    (relabeled / 'dataset.json').write_text(text.replace('39.png", 3]', '39.png", 2]'))
    assert (relabeled / 'dataset.json').read_text() != text
    seen = {digest(other, use_labels=True) for other in (*others, longer, relabeled)}
    assert len(seen) == len(others) + 2 and whole not in seen
    assert digest(relabeled) == digest(data) != whole, 'labels count where they are used'


def test_a_digest_needs_files_that_can_be_read(tmp_path):
    write_folder(tmp_path / 'x', count=2)
    dataset = ImageFolderDataset(tmp_path / 'x')
    (tmp_path / 'x' / '1' / '001.png').unlink()
    with pytest.raises(UserError, match=r'001\.png'):
        dataset.digest()


# ----------------------------------------------------------------------------
# Resuming.


def test_the_state_and_the_options_say_what_the_data_are(begun, data):
    for options in (
        json.loads(load_state(saved_states(begun)[0])['options']),
        json.loads((begun / 'training_options.json').read_text()),
    ):
        recorded = options['dataset']
        assert recorded == dict(
            path=str(data),
            use_labels=True,
            resolution=8,
            xflip=False,
            cache=True,
            max_size=None,
            num_images=COUNT,
            image_shape=[1, 8, 8],
            label_dim=4,
            label_kind='classes',
            digest=digest(data, use_labels=True),
        )


@pytest.mark.parametrize(
    'make',
    [
        lambda data, path: zipped(data, path / 'x.zip', zipfile.ZIP_DEFLATED),
        lambda data, path: shutil.copytree(data, path / 'x'),
    ],
    ids=['zipped', 'moved'],
)
def test_the_same_data_elsewhere_resume_without_a_word(run_folder, data, tmp_path, make):
    result = resume(run_folder, make(data, tmp_path))
    assert (
        result.exit_code == 0
        and 'Resumed' in result.output
        and data_warnings(result) == []
        and 'Note' not in result.stderr
    ), result.output


OTHER = {
    'fewer': (dict(count=12), [], f'{COUNT} images then, 12 now'),
    'contents': (dict(seed=1), [], 'other names, sizes, contents or labels'),
    'names': (dict(renamed=[4]), [], 'other names, sizes, contents or labels'),
    'size': (dict(size=16), [], 'images of 8x8x1 then, of 16x16x1 now'),
    'subset': ({}, ['--max-images=9'], 'all images then, --max-images=9 now'),
    'mirrored': ({}, ['--xflip=1'], 'xflip = false then, true now'),
    'unlabeled': ({}, ['--cond=0'], '--cond=1 then, --cond=0 now'),
}


@pytest.mark.parametrize('case', OTHER)
def test_other_data_are_refused_by_what_differs(run_folder, tmp_path, case):
    """--resume-override does not cover them, but for mirrored images of the same data."""
    options, extra, words = OTHER[case]
    other = write_folder(tmp_path / 'other', **options)
    before = {path.name: path.read_bytes() for path in run_folder.iterdir()}
    for override in ([], ['--resume-override'][: case != 'mirrored']):
        assert_one_clear_error(
            resume(run_folder, other, *extra, *override),
            'was trained on other data',
            words,
            '--allow-other-data',
        )
    assert before == {path.name: path.read_bytes() for path in run_folder.iterdir()}


@pytest.mark.parametrize('case', ['fewer', 'contents', 'subset', 'mirrored'])
def test_whoever_insists_goes_on_with_other_data_which_are_recorded(run_folder, tmp_path, case):
    options, extra, words = OTHER[case]
    other = write_folder(tmp_path / 'other', **options)
    result = resume(run_folder, other, *extra, '--allow-other-data')
    assert (
        result.exit_code == 0
        and f'Warning: {saved_states(run_folder)[1]} was trained on other data' in result.stderr
    ), result.output
    assert words in result.stderr and 'Resumed' in result.output
    again = invoke(other, run_folder, f'--resume={run_folder}', '--duration=0.000016', *extra)
    assert again.exit_code == 0 and data_warnings(again) == [], again.output


def test_mirrored_images_of_the_same_data_are_insisted_on_by_either_option(run_folder, data):
    result = resume(run_folder, data, '--xflip=1', '--resume-override')
    assert (
        result.exit_code == 0
        and 'xflip = false then, true now' in result.stderr
        and 'Resumed' in result.output
    ), result.output


def test_insisting_needs_a_run_to_resume(tmp_path, data):
    assert_one_clear_error(
        invoke(data, tmp_path, '--allow-other-data'), '--allow-other-data needs --resume', status=2
    )


def of_an_older_version(path):
    """What states and options were before data were recorded."""
    state = load_state(path)
    options = json.loads(state['options'])
    options['dataset'] = {
        name: options['dataset'][name] for name in ('path', 'use_labels', 'resolution', 'xflip', 'cache')
    }
    save_state(path, dict(state, options=json.dumps(options)))


def test_a_state_that_does_not_record_its_data_resumes_with_a_line_and_records_them(
    run_folder, data, tmp_path
):
    for path in saved_states(run_folder):
        of_an_older_version(path)
    assert_one_clear_error(resume(run_folder, data, '--max-images=9'), 'all images then, --max-images=9 now')
    assert_one_clear_error(resume(run_folder, data, '--xflip=1'), 'xflip = false then')
    result = resume(run_folder, data)
    assert result.exit_code == 0 and result.stderr.count('does not record its data') == 1, result.output
    assert json.loads(load_state(saved_states(run_folder)[0])['options'])['dataset']['num_images'] == COUNT
    assert_one_clear_error(
        invoke(
            write_folder(tmp_path / 'other', count=9),
            run_folder,
            f'--resume={run_folder}',
            '--duration=0.000016',
        ),
        f'{COUNT} images then, 9 now',
    )


def test_two_processes_agree_on_the_data_and_refuse_others_together(run_folder, data, tmp_path):
    """Only the main process computes the digest; who waits for it must hear of it."""
    arguments = [
        f'--outdir={run_folder}',
        f'--data={data}',
        *TINY_NETWORK,
        *FAST,
        '--batch=4',
        '--augment=0',
        '--tick=0.004',
        '--snap=0',
        '--dump=1',
        '--cond=1',
        f'--resume={run_folder}',
        '--duration=0.000012',
    ]
    run_ranks(2, 'train.py', *arguments)
    assert json.loads(load_state(saved_states(run_folder)[0])['options'])['dataset']['digest'] == digest(
        data, use_labels=True
    )
    other = write_folder(tmp_path / 'other', count=12)
    result = run_ranks(
        2, 'train.py', *[argument.replace(str(data), str(other)) for argument in arguments], check=False
    )
    assert result.returncode and f'{COUNT} images then, 12 now' in result.stderr


# ----------------------------------------------------------------------------
# --max-images, and progressive distillation.


def test_a_subset_is_edm_s_and_is_said_and_recorded(tmp_path, data):
    """EDM shuffles the indices by RandomState(0) and sorts the first so many."""
    shuffled = np.arange(COUNT)
    np.random.RandomState(0).shuffle(shuffled)
    assert random_subset(COUNT, 9, 0).tolist() == sorted(shuffled[:9])
    result = invoke(data, tmp_path / 'run', '--duration=0.000004', '--max-images=9', '--snap=1')
    assert (
        result.exit_code == 0
        and f'9 images of [1, 8, 8], 4 classes, from {data}, a random 9 of its {COUNT}' in result.output
    ), result.output
    kwargs = load_network(max((tmp_path / 'run').glob('*.pkl'))).metadata['dataset_kwargs']
    assert (kwargs['max_size'], kwargs['num_images'], kwargs['digest']) == (
        9,
        9,
        digest(data, use_labels=True),
    )
    result = invoke(data, tmp_path / 'all', '--max-images=1000', '--dry-run')
    assert json.loads(result.stdout)['dataset']['max_size'] is None
    result = invoke(data, tmp_path / 'all', '--max-images=2', '--dry-run')
    assert json.loads(result.stdout)['dataset']['classes'].count(',') <= 1
    assert_one_clear_error(invoke(data, tmp_path / 'all', '--max-images=0'), '--max-images', status=2)


@pytest.mark.parametrize('dump', [1, 0])
def test_the_stages_of_a_progressive_distillation_are_of_one_data_set(tmp_path, data, dump):
    """With and without states of the finished stage: what it was trained on is in its options too."""
    made = invoke(data, tmp_path / 'teacher', '--duration=0.000004', '--snap=1')
    assert made.exit_code == 0, made.output
    teacher, folder = max((tmp_path / 'teacher').glob('*.pkl')), tmp_path / 'run'
    options = [
        '--objective=pd',
        '--cond=1',
        f'--teacher={teacher}',
        *FAST,
        '--batch=4',
        '--S_start=2',
        '--S=1',
        '--stage_steps=1',
        '--tick=0.004',
        '--snap=1',
        f'--dump={dump}',
        f'--outdir={folder}',
    ]
    whole = CliRunner().invoke(train.main, [*options, f'--data={data}'])
    assert whole.exit_code == 0, whole.output
    shutil.rmtree(folder / 'S0001')
    other = write_folder(tmp_path / 'other', seed=1)
    result = CliRunner().invoke(train.main, [*options, f'--data={other}', f'--resume={folder}'])
    assert_one_clear_error(result, 'was trained on other data', '--allow-other-data')
    assert not (folder / 'S0001').exists()
    result = CliRunner().invoke(
        train.main, [*options, f'--data={other}', f'--resume={folder}', '--allow-other-data']
    )
    assert result.exit_code == 0 and 'was trained on other data' in result.stderr, result.output
    assert json.loads((Path(folder) / 'S0001' / 'training_options.json').read_text())['dataset'][
        'digest'
    ] == digest(other, use_labels=True)
