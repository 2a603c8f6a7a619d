"""dataset_tool.py --stats and --skip-bad, and names of classes in dataset.json."""

import json
import tarfile
import zipfile

import numpy as np
import pytest
from helpers import assert_one_clear_error, invoke
from PIL import Image

import dataset_tool
from data.dataset import ImageFolderDataset
from data.label_space import LabelSpace


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(folder, images):
    """Write PNGs by name; None makes a truncated one."""
    for name, image in images.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(16, 16, 3) if image is None else image).save(path)
        if image is None:
            path.write_bytes(path.read_bytes()[:200])
    return folder


def tool(*arguments):
    result = invoke(dataset_tool.main, *arguments)
    assert result.exit_code == 0, result.stderr
    return result


def label_file(path):
    return json.loads(zipfile.ZipFile(path).read('dataset.json'))


# ----------------------------------------------------------------------------
# Statistics.


def test_statistics_are_those_of_the_pixels(tmp_path):
    """Over all values and per channel, in units of [-1, 1], of images of two sizes that weigh by their pixels."""
    images = {
        'cat/1.png': pixels(8, 8, 3),
        'cat/2.png': pixels(20, 12, 3, seed=1) // 3,
        'dog/1.png': pixels(8, 8, 3, seed=2),
    }
    source, record = save(tmp_path / 'src', images), tmp_path / 'new' / 'stats.json'
    result = tool('--stats', f'--source={source}', f'--json={record}')
    found = json.loads(record.read_text())
    values = np.concatenate([image.reshape(-1, 3) for image in images.values()]) / 127.5 - 1
    assert found['mean'] == pytest.approx(values.mean()) and found['std'] == pytest.approx(values.std())
    np.testing.assert_allclose(found['channel_mean'], values.mean(0))
    np.testing.assert_allclose(found['channel_std'], values.std(0))
    assert (found['images'], found['skipped'], found['resolution'], found['mode']) == (3, 0, None, 'RGB')
    assert found['sizes'] == {'8x8': 2, '12x20': 1}
    assert (found['class_images'], found['class_names']) == ([2, 1], ['cat', 'dog'])
    for words in (
        'of several sizes',
        'add --resolution',
        f'sigma_data is their standard deviation, {values.std():.2f}',
    ):
        assert words in result.stdout
    assert [path.name for path in tmp_path.iterdir() if path.name not in ('src', 'new')] == []


def test_statistics_are_of_what_would_be_written(tmp_path):
    """Of converted images the same as of the data set made with the same options; sizes are those of the source."""
    source = save(tmp_path / 'src', {f'{i}.png': pixels(20, 30, 3, seed=i) for i in range(3)})
    options = ['--resolution=8', '--transform=center-crop']
    tool(f'--source={source}', f'--dest={tmp_path / "a.zip"}', *options)
    files = [tmp_path / 'a.json', tmp_path / 'b.json']
    tool('--stats', f'--source={source}', *options, f'--json={files[0]}')
    tool('--stats', f'--source={tmp_path / "a.zip"}', f'--json={files[1]}')
    before, after = (json.loads(file.read_text()) for file in files)
    assert before.pop('sizes') == {'30x20': 3} and after.pop('sizes') == {'8x8': 3}
    assert before == after and before['resolution'] == '8x8' and before['labels'] is None


def test_gray_images_have_one_channel_and_long_lists_of_classes_are_cut(tmp_path):
    images = {f'{i:02d}/a.png': pixels(8, 8, seed=i) for i in range(23)}
    result = tool('--stats', f'--source={save(tmp_path / "src", images)}')
    assert 'Images:   23 grayscale of 8x8' in result.stdout and 'red' not in result.stdout
    assert 'Classes:  23' in result.stdout and 'and 3 more; --json has all' in result.stdout


def test_label_vectors_are_no_classes(tmp_path):
    source = save(tmp_path / 'src', {'a.png': pixels(8, 8), 'b.png': pixels(8, 8)})
    labels = {'labels': [['a.png', [0.5, 1]], ['b.png', [1, 0]]]}
    (source / 'dataset.json').write_text(json.dumps(labels))
    assert 'Labels:   vectors' in tool('--stats', f'--source={source}').stdout


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (['--stats', '--dest=x.zip'], ['--stats', 'leave --dest out']),
        (['--stats', '--encode-vae=x'], ['--stats', 'leave --encode-vae out']),
        ([], ['--dest=PATH is missing', '--stats']),
        (['--dest=x.zip', '--json=x.json'], ['--json is for --stats']),
        (['--stats', '--resolution=8by8'], ['WIDTHxHEIGHT', 'a side, such as 64']),
    ],
)
def test_options_that_contradict_each_other_are_one_usage_error(tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    assert_one_clear_error(invoke(dataset_tool.main, '--source=digits', *options), *words, status=2)
    assert not any(tmp_path.iterdir())


# ----------------------------------------------------------------------------
# Images that cannot be read.


def with_bad_ones(tmp_path, bad=2):
    images = {f'{i}.png': pixels(16, 16, 3, seed=i) for i in range(3)}
    return save(tmp_path / 'src', {f'0bad{i}.png': None for i in range(bad)} | images)


def test_an_unreadable_image_is_an_error_that_names_it_and_the_cure(tmp_path):
    result = invoke(dataset_tool.main, f'--source={with_bad_ones(tmp_path)}', f'--dest={tmp_path / "a.zip"}')
    assert_one_clear_error(result, '0bad0.png', '--skip-bad')
    assert not (tmp_path / 'a.zip').exists()


@pytest.mark.parametrize('content', [None, b'', b'<html>'])
def test_unreadable_images_are_skipped_counted_and_named_on_request(tmp_path, content):
    """Truncated pixels, an empty file, and a web page; images keep the numbers of their places."""
    source = with_bad_ones(tmp_path, bad=7)
    if content is not None:
        for i in range(7):
            (source / f'0bad{i}.png').write_bytes(content)
    result = tool(f'--source={source}', f'--dest={tmp_path / "a.zip"}', '--skip-bad')
    assert '7 of 10 images cannot be read and were skipped' in result.stderr
    assert '0bad4.png' in result.stderr and '0bad5.png' not in result.stderr and '2 more' in result.stderr
    dataset = ImageFolderDataset(tmp_path / 'a.zip')
    assert len(dataset) == 3 and dataset.num_channels == 3
    np.testing.assert_array_equal(dataset[0][0], pixels(16, 16, 3, seed=0).transpose(2, 0, 1))
    numbers = [name[-6:-4] for name in zipfile.ZipFile(tmp_path / 'a.zip').namelist()[:3]]
    assert numbers == ['00', '08', '09'], '0bad0 to 0bad6 come after 0'
    assert (
        'Images:   3 RGB of 16x16 (7 skipped)' in tool('--stats', f'--source={source}', '--skip-bad').stdout
    )


def test_where_nothing_can_be_read_nothing_is_written(tmp_path):
    source = save(tmp_path / 'src', {'a.png': None, 'b.png': None})
    result = invoke(dataset_tool.main, f'--source={source}', f'--dest={tmp_path / "a.zip"}', '--skip-bad')
    assert_one_clear_error(result, 'None of the 2 images can be read', 'a.png')
    assert not (tmp_path / 'a.zip').exists()


# ----------------------------------------------------------------------------
# Names of classes.


def test_names_of_class_folders_are_kept_also_by_a_further_conversion(tmp_path):
    source = save(tmp_path / 'src', {f'{name}/1.png': pixels(8, 8) for name in ('dog', 'cat', 'emu')})
    result = tool(f'--source={source}', f'--dest={tmp_path / "a.zip"}')
    assert 'with 3 classes (cat=0, dog=1, emu=2)' in result.stdout
    tool(f'--source={tmp_path / "a.zip"}', f'--dest={tmp_path / "b.zip"}', '--resolution=4')
    assert label_file(tmp_path / 'b.zip')['class_names'] == ['cat', 'dog', 'emu']
    dataset = ImageFolderDataset(tmp_path / 'b.zip', use_labels=True)
    assert str(dataset.label_space) == '3 classes (cat=0, dog=1, emu=2)' and dataset.label_dim == 3


def test_a_class_without_images_is_named(tmp_path):
    source = save(tmp_path / 'src', {f'{i}.png': pixels(8, 8) for i in range(2)})
    content = {'labels': [['0.png', 0], ['1.png', 2]], 'class_names': ['cat', 'dog', 'emu', 'fox']}
    (source / 'dataset.json').write_text(json.dumps(content))
    assert (
        '1 of 3 classes has no images: dog=1'
        in tool(f'--source={source}', f'--dest={tmp_path / "a.zip"}').stderr
    )
    assert label_file(tmp_path / 'a.zip')['class_names'] == ['cat', 'dog', 'emu']


@pytest.mark.parametrize(
    ('names', 'words'),
    [
        (['cat'], ['has 2 classes, but class_names names 1']),
        (['cat', 'cat'], ['different names']),
        ('cat', ['class_names must be a list']),
        (['cat', 1], ['class_names must be a list']),
        (['cat', 'x' * 1001], ['at most 1000']),
        (['cat', ''], ['class_names must be a list']),
    ],
)
def test_malformed_names_are_one_error(tmp_path, names, words):
    source = save(tmp_path / 'src', {'a.png': pixels(8, 8), 'b.png': pixels(8, 8)})
    content = {'labels': [['a.png', 0], ['b.png', 1]], 'class_names': names}
    (source / 'dataset.json').write_text(json.dumps(content))
    result = invoke(dataset_tool.main, f'--source={source}', f'--dest={tmp_path / "a.zip"}')
    assert_one_clear_error(result, 'dataset.json', *words)


def test_names_leave_the_identity_of_a_data_set_alone(tmp_path):
    """A run resumes on its data set after names are added."""
    source = save(tmp_path / 'src', {'a.png': pixels(8, 8), 'b.png': pixels(8, 8)})
    digests = set()
    for more in ({}, {'class_names': ['cat', 'dog']}, {'class_names': None}):
        content = {'labels': [['a.png', 0], ['b.png', 1]], **more}
        (source / 'dataset.json').write_text(json.dumps(content))
        dataset = ImageFolderDataset(source, use_labels=True)
        digests.add(dataset.digest())
        assert dataset.label_space.record() == LabelSpace(2, 'classes').record()
    assert len(digests) == 1


def test_cifar_10_has_its_names(tmp_path):
    import io
    import pickle

    batch = {'data': pixels(10, 3072), 'labels': list(range(10))}
    data, path = pickle.dumps(batch, 2), tmp_path / 'cifar-10-python.tar.gz'
    with tarfile.open(path, 'w:gz') as archive:
        info = tarfile.TarInfo('cifar-10-batches-py/data_batch_1')
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    tool(f'--source={path}', f'--dest={tmp_path / "a.zip"}')
    names = label_file(tmp_path / 'a.zip')['class_names']
    assert len(names) == 10 and (names[0], names[3], names[9]) == ('airplane', 'cat', 'truck')
