"""The bundled photographs as a data set: which pixels crops are from, how they are resized, and their classes."""

import json
import zipfile

import numpy as np
import pytest
from helpers import assert_one_clear_error, invoke
from PIL import Image

import dataset_tool
from data.dataset import ImageFolderDataset
from data.sources import photos


def make(dest, *options):
    result = invoke(dataset_tool.main, '--source=photos', f'--dest={dest}', *options)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def covered(name, split, sides=photos.SIDES):
    """[640] bool: the columns that crops of a split touch."""
    columns = np.zeros(photos.WIDTH, bool)
    for left, _, right, _ in photos.crop_boxes(name, split, list(sides)):
        columns[left:right] = True
    return columns


@pytest.mark.parametrize('name', photos.CLASSES)
def test_no_pixel_is_in_training_and_test_crops(name):
    train, test = covered(name, 'train'), covered(name, 'test')
    assert not (train & test).any() and test.sum() == 128 and train.sum() > 500


@pytest.mark.parametrize('name', photos.CLASSES)
def test_crops_lie_in_the_photograph_at_all_scales_and_none_is_there_twice(name):
    for split, count in (('train', 4000), ('test', 1000)):
        boxes = photos.crop_boxes(name, split, list(photos.SIDES))
        assert len(boxes) == len(set(boxes)) == count
        left, top, right, bottom = np.array(boxes).T
        assert left.min() >= 0 and top.min() >= 0 and right.max() <= 640 and bottom.max() <= 427
        sides, counts = np.unique(right - left, return_counts=True)
        assert (right - left == bottom - top).all()
        assert sides.tolist() == [32, 48, 64, 96] and counts.tolist() == 4 * [count // 4]
        assert (np.diff(right - left)[:100] != 0).any(), 'scales are mixed, so that any prefix has all'


def test_images_are_crops_resized_with_antialiasing_and_alternate_between_named_classes(tmp_path):
    """Against scikit-learn's arrays and Pillow's Lanczos filter, which is wider where it shrinks."""
    from sklearn.datasets import load_sample_image

    out = make(tmp_path / 'a.zip', '--resolution=16', '--max-images=40')
    assert 'Wrote 40 RGB images of 16x16, with 2 classes (china=0, flower=1)' in out
    dataset = ImageFolderDataset(tmp_path / 'a.zip', use_labels=True)
    for i in range(40):
        name = ('china', 'flower')[i % 2]
        left, top, right, bottom = photos.crop_boxes(name, 'train', list(photos.SIDES))[i // 2]
        crop = Image.fromarray(load_sample_image(f'{name}.jpg')[top:bottom, left:right])
        expected = np.asarray(crop.resize((16, 16), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
        pixels, label = dataset[i]
        np.testing.assert_array_equal(pixels, expected)
        assert label.tolist() == [float(i % 2 == 0), float(i % 2 == 1)]
    content = json.loads(zipfile.ZipFile(tmp_path / 'a.zip').read('dataset.json'))
    assert content['class_names'] == ['china', 'flower'] and len(content['labels']) == 40


def test_the_same_command_gives_the_same_bytes_and_the_other_split_other_images(tmp_path):
    make(tmp_path / 'a.zip', '--resolution=32', '--max-images=20')
    make(tmp_path / 'b.zip', '--resolution=32x32', '--max-images=20', '--split=train')
    make(tmp_path / 'c.zip', '--resolution=32x32', '--max-images=20', '--split=test')
    a, b, c = ((tmp_path / f'{name}.zip').read_bytes() for name in 'abc')
    assert a == b != c


def test_no_crop_is_enlarged(tmp_path):
    """At 64x64 only crops of 64 and 96 pixels are left, still as many in all."""
    result = invoke(dataset_tool.main, '--stats', '--source=photos', '--resolution=64', '--split=test')
    assert '64x64 (1000)' in result.stdout and '96x96 (1000)' in result.stdout
    assert 'Images:   2000 RGB of 64x64' in result.stdout


@pytest.mark.parametrize(
    ('options', 'words', 'status'),
    [
        ([], ['add --resolution, such as 16x16'], 1),
        (['--resolution=128'], ['at most 96 pixels', '64x64 or smaller'], 1),
        (['--resolution=24'], ['not a power of two'], 1),
        (['--resolution=16x8'], ['not square'], 1),
        (['--resolution=16', '--labels-from=folders'], ['not for photos'], 1),
        (['--resolution=16', '--split=val'], ['--split'], 2),
    ],
)
def test_what_cannot_be_is_refused_with_the_cure(tmp_path, options, words, status):
    result = invoke(dataset_tool.main, '--source=photos', f'--dest={tmp_path / "a.zip"}', *options)
    assert_one_clear_error(result, *words, status=status)
    assert not any(tmp_path.iterdir())


def test_a_folder_of_that_name_is_not_passed_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'photos').mkdir()
    Image.new('RGB', (16, 16)).save(tmp_path / 'photos' / 'a.png')
    result = invoke(dataset_tool.main, '--source=photos', '--dest=a.zip', '--resolution=16')
    assert_one_clear_error(result, '--source=./photos')
    assert invoke(dataset_tool.main, '--source=./photos', '--dest=a.zip').exit_code == 0


def test_a_split_is_for_photos_only(tmp_path):
    result = invoke(dataset_tool.main, '--source=digits', f'--dest={tmp_path / "a.zip"}', '--split=test')
    assert_one_clear_error(result, '--split=test is for --source=photos', status=2)
