"""dataset_tool.py: every source to EDM's format, transforms against slow oracles, and nothing left behind by a failure."""

import gzip
import hashlib
import io
import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from latents import npy, random_latents, save_vae, use_stand_in
from PIL import Image

import dataset_tool
from data import archive_writer
from data.dataset import ImageFolderDataset
from training.networks import encoders

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(*args, code=0):
    """The tool's output; fails unless it exits with that code, and shows no traceback."""
    result = CliRunner().invoke(dataset_tool.main, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    assert code == 0 or (isinstance(result.exception, SystemExit) and 'Error: ' in result.output)
    return result.output


def convert(source, dest, *options):
    run(f'--source={source}', f'--dest={dest}', *options)
    return load(dest)


def load(dest):
    """Pixels [N, H, W] or [N, H, W, 3] and the label table of a data set."""
    dataset = ImageFolderDataset(dest)
    pixels = np.stack([dataset[i][0] for i in range(len(dataset))])
    content = (
        (dest / 'dataset.json').read_bytes() if dest.is_dir() else zipfile.ZipFile(dest).read('dataset.json')
    )
    return pixels[:, 0] if pixels.shape[1] == 1 else pixels.transpose(0, 2, 3, 1), json.loads(content)[
        'labels'
    ]


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encode(pixels, mode=None, kind='PNG'):
    data = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(data, format=kind)
    return data.getvalue()


def write_files(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_zip(path, files):
    with zipfile.ZipFile(path, 'w') as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


# ----------------------------------------------------------------------------
# Digits, and the form of what is written.


def digit_pixels():
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.array(
        [[[round(v * 255 / 16) for v in row] for row in image] for image in digits.images], dtype=np.uint8
    ), digits.target


def test_digits_make_a_round_trip_through_a_zip_pixel_for_pixel(tmp_path):
    output = run('--source=digits', f'--dest={tmp_path}/new/folder/digits.zip')
    assert 'Wrote 1797 grayscale images of 8x8, with labels' in output
    dataset = ImageFolderDataset(tmp_path / 'new/folder/digits.zip', resolution=8, use_labels=True)
    pixels, target = digit_pixels()
    assert (len(dataset), dataset.image_shape, dataset.label_dim, dataset.name) == (
        1797,
        [1, 8, 8],
        10,
        'digits',
    )
    np.testing.assert_array_equal(np.stack([dataset[i][0][0] for i in range(1797)]), pixels)
    np.testing.assert_array_equal([dataset.get_label(i).argmax() for i in range(1797)], target)


def test_a_zip_is_stored_plain_and_named_as_in_edm_with_bytes_that_never_change(tmp_path):
    for name in ('a.zip', 'b.zip'):
        run('--source=digits', f'--dest={tmp_path / name}', '--max-images=1002')
    assert (tmp_path / 'a.zip').read_bytes() == (tmp_path / 'b.zip').read_bytes()
    entries = zipfile.ZipFile(tmp_path / 'a.zip').infolist()
    assert all(
        e.compress_type == zipfile.ZIP_STORED and e.date_time == (1980, 1, 1, 0, 0, 0) for e in entries
    )
    names = [e.filename for e in entries]
    assert names[0] == '00000/img00000000.png' and names[1001:] == ['00001/img00001001.png', 'dataset.json']
    labels = json.loads(zipfile.ZipFile(tmp_path / 'a.zip').read('dataset.json'))['labels']
    assert labels[:3] == [
        ['00000/img00000000.png', 0],
        ['00000/img00000001.png', 1],
        ['00000/img00000002.png', 2],
    ]


def test_pngs_are_not_compressed_so_that_training_need_not_inflate_them(tmp_path):
    source = write_files(tmp_path / 'src', {'0.png': encode(np.zeros([64, 64], np.uint8))})
    convert(source, tmp_path / 'out')
    assert (tmp_path / 'out/00000/img00000000.png').stat().st_size > 64 * 64


def test_a_folder_holds_the_same_files_as_a_zip(tmp_path):
    (tmp_path / 'empty').mkdir()
    pixels, labels = convert('digits', tmp_path / 'digits.zip', '--max-images=20')
    for dest in (tmp_path / 'new', tmp_path / 'empty'):
        again, labels_again = convert('digits', dest, '--max-images=20')
        np.testing.assert_array_equal(again, pixels)
        assert labels_again == labels
        assert dest.stat().st_mode & 0o777 == 0o777 & ~current_umask()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['digits.zip', 'empty', 'new']


def current_umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_a_data_set_converts_to_itself(tmp_path):
    """Zip to folder to zip: names, labels and bytes are a fixed point."""
    run('--source=digits', f'--dest={tmp_path}/a.zip', '--max-images=30')
    run(f'--source={tmp_path}/a.zip', f'--dest={tmp_path}/b')
    run(f'--source={tmp_path}/b', f'--dest={tmp_path}/c.zip')
    assert (tmp_path / 'a.zip').read_bytes() == (tmp_path / 'c.zip').read_bytes()


# ----------------------------------------------------------------------------
# Folders and zips of images.


@pytest.mark.parametrize('wrapper', ['', 'train/'])
def test_class_folders_become_integer_labels_in_sorted_order(tmp_path, wrapper):
    names = ['dog/2.png', 'cat/x/1.png', 'emu/0.png', 'dog/1.png']
    source = write_files(
        tmp_path / 'src',
        {wrapper + name: encode(random_pixels(4, 4, 3, seed=i)) for i, name in enumerate(names)},
    )
    pixels, labels = convert(source, tmp_path / 'out.zip')
    assert [label for _, label in labels] == [0, 1, 1, 2]
    np.testing.assert_array_equal(pixels, [random_pixels(4, 4, 3, seed=i) for i in (1, 3, 0, 2)])


STRAYS = [
    (['0.png', 'cat/1.png', 'dog/1.png'], ['0.png'], [0, 1]),
    (['train/0.png', 'train/cat/1.png', 'train/dog/x/1.png'], ['train/0.png'], [0, 1]),
    (
        ['0.png', 'train/1.png', 'train/cat/1.png', 'train/dog/1.png', 'train/dog/2.png'],
        ['0.png', 'train/1.png'],
        [0, 1, 1],
    ),
]


@pytest.mark.parametrize('kind', ['folder', 'zip'])
@pytest.mark.parametrize('names, strays, labels', STRAYS)
def test_images_beside_the_class_folders_are_named_and_left_out_or_all_labels_are_by_choice(
    tmp_path, names, strays, labels, kind
):
    """Also where they lie beside class folders further down, which would become one class."""
    files = {name: encode(random_pixels(4, 4, seed=i)) for i, name in enumerate(names)}
    source = (write_files if kind == 'folder' else write_zip)(tmp_path / 'src', files)
    output = run(f'--source={source}', f'--dest={tmp_path}/out.zip', code=1)
    assert f'{len(strays)} of {len(names)} images' in output and f'({", ".join(strays)})' in output
    assert (
        '--labels-from=folders' in output
        and '--labels-from=none' in output
        and not (tmp_path / 'out.zip').exists()
    )
    output = run(f'--source={source}', f'--dest={tmp_path}/out.zip', '--labels-from=folders')
    pixels, table = load(tmp_path / 'out.zip')
    assert f'({", ".join(strays)}) and are skipped' in output and [label for _, label in table] == labels
    np.testing.assert_array_equal(
        pixels, [random_pixels(4, 4, seed=i) for i, name in enumerate(names) if name not in strays]
    )
    pixels, table = convert(source, tmp_path / 'none.zip', '--labels-from=none')
    assert len(pixels) == len(names) and table is None


@pytest.mark.parametrize(
    'labels, expected',
    [
        ([['a/0.png', 7], ['b/0.png', 3]], [7, 3]),
        ([['sub/a/0.png', 7], ['sub/b/0.png', 3]], [7, 3]),
        ([['a/0.png', [0.5, 1]], ['b/0.png', [0, 2]]], [[0.5, 1], [0, 2]]),
        (None, None),
    ],
)
def test_a_nested_label_file_wins_over_class_folders(tmp_path, labels, expected):
    files = {f'sub/{folder}/0.png': encode(random_pixels(4, 4)) for folder in 'ab'} | {
        'sub/dataset.json': json.dumps({'labels': labels}).encode()
    }
    for source in (write_files(tmp_path / 'src', files), write_zip(tmp_path / 'src.zip', files)):
        found = convert(source, tmp_path / f'{source.name}-out.zip')[1]
        assert found == (
            expected and [[f'00000/img0000000{i}.png', label] for i, label in enumerate(expected)]
        )


def test_max_images_takes_the_first_in_sorted_order(tmp_path):
    source = write_files(
        tmp_path / 'src', {f'{i}.png': encode(random_pixels(4, 4, seed=i)) for i in (3, 1, 2)}
    )
    np.testing.assert_array_equal(
        convert(source, tmp_path / 'out.zip', '--max-images=2')[0],
        [random_pixels(4, 4, seed=i) for i in (1, 2)],
    )


def test_a_grayscale_image_among_colors_becomes_rgb_even_if_it_is_first(tmp_path):
    gray, color = random_pixels(4, 4), random_pixels(4, 4, 3)
    source = write_files(tmp_path / 'src', {'0.png': encode(gray), '1.png': encode(color)})
    output = run(f'--source={source}', f'--dest={tmp_path}/out.zip')
    assert 'Note: 1 images were converted from mode L to RGB' in output
    np.testing.assert_array_equal(load(tmp_path / 'out.zip')[0], [np.stack([gray] * 3, -1), color])


@pytest.mark.parametrize('mode', ['RGBA', 'P', 'LA', '1', 'CMYK'])
def test_other_modes_are_converted_with_a_note(tmp_path, mode):
    image = Image.fromarray(random_pixels(4, 4, 3)).convert(mode)
    image.save(tmp_path / 'x.tif' if mode == 'CMYK' else tmp_path / 'x.png')
    output = run(f'--source={tmp_path}', f'--dest={tmp_path}/out.zip')
    expected = 'L' if mode in ('LA', '1') else 'RGB'
    assert f'Note: 1 images were converted from mode {mode} to {expected}' in output
    np.testing.assert_array_equal(load(tmp_path / 'out.zip')[0][0], np.asarray(image.convert(expected)))


def test_16_bit_grayscale_is_divided_by_257(tmp_path):
    values = np.array(
        [[0, 128, 129, 257], [65535, 65406, 65407, 300], [1000] * 4, [40000] * 4], dtype=np.uint16
    )
    source = write_files(tmp_path / 'src', {'0.png': encode(values)})
    np.testing.assert_array_equal(convert(source, tmp_path / 'out.zip')[0][0], np.rint(values / 257))


def test_floating_point_images_are_refused(tmp_path):
    Image.fromarray(np.ones([4, 4], np.float32)).save(tmp_path / 'x.tif')
    assert 'x.tif is a floating-point image' in run(
        f'--source={tmp_path}', f'--dest={tmp_path}/out.zip', code=1
    )


# ----------------------------------------------------------------------------
# Which images, with which labels.


def three_classes(path):
    files = {
        f'{name}/{i}.png': encode(random_pixels(4, 4, seed=10 * k + i))
        for k, name in enumerate(('ant', 'bee', 'cat'))
        for i in range(4)
    }
    return write_files(path, files)


@pytest.mark.parametrize(
    'options, labels, said',
    [
        (['--max-images=5'], [0] * 4 + [1], 'leaves out 1 of 3 classes (cat=2)'),
        (['--max-images=2'], [0, 0], 'leaves out 2 of 3 classes (bee=1, cat=2)'),
        (['--max-images=9'], [0] * 4 + [1] * 4 + [2], None),
        (['--max-images-per-class=2'], [0, 0, 1, 1, 2, 2], None),
        (['--max-images-per-class=1', '--max-images=2'], [0, 1], 'leaves out 1 of 3 classes (cat=2)'),
        (
            ['--max-images-per-class=5'],
            [0] * 4 + [1] * 4 + [2] * 4,
            '3 of 3 classes have fewer than 5 images',
        ),
    ],
)
def test_classes_that_are_left_out_are_named_and_images_can_be_spread_over_them(
    tmp_path, options, labels, said
):
    source = three_classes(tmp_path / 'src')
    output = run(f'--source={source}', f'--dest={tmp_path}/out', *options)
    pixels, table = load(tmp_path / 'out')
    assert (
        [label for _, label in table] == labels
        and (said or 'Wrote') in output
        and ('leaves out' in output) == ('leaves out' in (said or ''))
    )
    places = [labels[:i].count(label) for i, label in enumerate(labels)]
    np.testing.assert_array_equal(
        pixels, [random_pixels(4, 4, seed=10 * label + i) for label, i in zip(labels, places)]
    )


@pytest.mark.parametrize('kind', ['dataset.json', 'digits', 'mnist', 'npz'])
def test_every_source_with_classes_names_those_left_out_and_spreads(tmp_path, kind):
    pixels, labels = random_pixels(6, 8, 8), [0, 0, 0, 1, 1, 2]
    if kind == 'dataset.json':
        table = {'labels': [[f'{i}.png', label] for i, label in enumerate(labels)]}
        source = write_zip(
            tmp_path / 'src.zip',
            {f'{i}.png': encode(p) for i, p in enumerate(pixels)} | {'dataset.json': json.dumps(table)},
        )
    elif kind == 'npz':
        source = tmp_path / 'src.npz'
        np.savez(source, pixels, np.array(labels))
    else:
        source = 'digits' if kind == 'digits' else write_mnist(tmp_path / 'src', pixels, labels)
    assert f'leaves out {8 if kind == "digits" else 2} of' in run(
        f'--source={source}', f'--dest={tmp_path}/a.zip', '--max-images=2'
    )
    output = run(f'--source={source}', f'--dest={tmp_path}/b.zip', '--max-images-per-class=1')
    assert 'leaves out' not in output
    assert [label for _, label in load(tmp_path / 'b.zip')[1]] == list(range(10 if kind == 'digits' else 3))
    assert load_labels(run, source, tmp_path / 'c.zip') is None


def load_labels(run, source, dest):
    run(f'--source={source}', f'--dest={dest}', '--labels-from=none', '--max-images=2')
    return load(dest)[1]


def test_where_labels_come_from_can_be_chosen(tmp_path):
    source = three_classes(tmp_path / 'src')
    names = sorted(str(path.relative_to(source)) for path in source.rglob('*.png'))
    (source / 'dataset.json').write_text(
        json.dumps({'labels': [[name, 7 + i] for i, name in enumerate(names)]})
    )
    chosen = lambda *options: [label for _, label in convert(source, tmp_path / 'out.zip', *options)[1]]
    assert chosen() == chosen('--labels-from=dataset.json') == list(range(7, 19))
    assert chosen('--labels-from=folders') == [0] * 4 + [1] * 4 + [2] * 4
    fails = lambda source, *options: run(f'--source={source}', f'--dest={tmp_path}/no.zip', *options, code=1)
    assert 'src/ant has no class folders' in fails(source / 'ant', '--labels-from=folders')
    assert 'src/ant has no dataset.json with labels' in fails(source / 'ant', '--labels-from=dataset.json')
    assert 'not for digits' in fails('digits', '--labels-from=folders')
    assert '--max-images-per-class needs class labels' in fails(source / 'ant', '--max-images-per-class=2')


def labeled(names, labels):
    return json.dumps({'labels': [list(pair) for pair in zip(names, labels)]}).encode()


def test_a_label_file_is_found_however_deep_it_lies(tmp_path):
    """Numbered folders of a data set that was zipped with the folders above it are no classes."""
    names = [f'{i // 2:05d}/{i}.png' for i in range(4)]
    files = {f'a/b/{name}': encode(random_pixels(8, 8, seed=i)) for i, name in enumerate(names)}
    files['a/b/dataset.json'] = labeled(names, [2, 0, 1, 2])
    _, table = convert(write_zip(tmp_path / 'in.zip', files), tmp_path / 'out.zip')
    assert [label for _, label in table] == [2, 0, 1, 2]


@pytest.mark.parametrize('name', ['Dataset.json', 'x/DATASET.JSON'])
def test_a_label_file_in_other_letters_is_named_and_not_passed_over(tmp_path, name):
    files = {
        name: labeled(['a/0.png'], [1]),
        'a/0.png': encode(random_pixels(8, 8)),
        'b/1.png': encode(random_pixels(8, 8)),
    }
    said = run(f'--source={write_zip(tmp_path / "in.zip", files)}', f'--dest={tmp_path / "out.zip"}', code=1)
    assert f'{name} differs from dataset.json in case' in said


def test_a_key_that_is_twice_in_a_label_file_is_an_error(tmp_path):
    content = b'{"labels": [["0.png", 0]], "labels": [["0.png", 1]]}'
    files = {'dataset.json': content, '0.png': encode(random_pixels(8, 8))}
    assert 'twice' in run(
        f'--source={write_zip(tmp_path / "in.zip", files)}', f'--dest={tmp_path / "out.zip"}', code=1
    )


@pytest.mark.parametrize(
    'label, odd', [(0.0, '0.0'), ('1', '"1"'), (True, 'true'), (None, 'null'), ([], None), ([1e39], None)]
)
def test_labels_that_are_none_are_refused_by_an_example(tmp_path, label, odd):
    files = {
        'dataset.json': labeled(['0.png', '1.png'], [label, label]),
        **{f'{i}.png': encode(random_pixels(8, 8)) for i in range(2)},
    }
    said = run(f'--source={write_zip(tmp_path / "in.zip", files)}', f'--dest={tmp_path / "out.zip"}', code=1)
    assert (
        'labels must be all class indices, or all vectors' in said
        and (odd is None or f'got {odd}' in said)
        and 'Warning' not in said
    )


def test_vectors_that_look_one_hot_in_a_subset_stay_vectors(tmp_path):
    files = {
        'dataset.json': labeled(['0.png', '1.png'], [[1.0, 0.0], [0.5, 0.2]]),
        **{f'{i}.png': encode(random_pixels(8, 8)) for i in range(2)},
    }
    write_zip(tmp_path / 'in.zip', files)
    assert 'label vectors of 2 numbers' in run(
        f'--source={tmp_path / "in.zip"}', f'--dest={tmp_path / "one.zip"}', '--max-images=1'
    )
    assert ImageFolderDataset(tmp_path / 'one.zip', use_labels=True).label_space.are_vectors
    run(f'--source={tmp_path / "one.zip"}', f'--dest={tmp_path / "again.zip"}')
    assert ImageFolderDataset(tmp_path / 'again.zip', use_labels=True).label_space.are_vectors


@pytest.mark.parametrize('stray', ['b/2', 'b/3.png_', 'notes.txt'])
def test_files_that_are_no_images_by_their_names_are_counted(tmp_path, stray):
    pixels = encode(random_pixels(8, 8))
    folder = write_files(tmp_path / 'in', {'a/0.png': pixels, 'b/1.png': pixels, stray: pixels})
    said = run(f'--source={folder}', f'--dest={tmp_path / "out.zip"}')
    assert f'1 files in {folder} are not images by name and are skipped: {stray}' in said
    assert (
        ImageFolderDataset(folder).about_others()
        and ImageFolderDataset(tmp_path / 'out.zip').about_others() is None
    )


def test_a_pipe_among_images_is_named_and_not_waited_for(tmp_path):
    folder = write_files(tmp_path / 'in', {'0.png': encode(random_pixels(8, 8))})
    os.mkfifo(folder / '1.png')
    assert '1.png is neither a file nor a folder' in run(
        f'--source={folder}', f'--dest={tmp_path / "out.zip"}', code=1
    )


def test_arrays_of_an_archive_that_are_not_read_are_named(tmp_path):
    np.savez(tmp_path / 'in.npz', images=random_pixels(3, 8, 8), labels=np.arange(3))
    said = run(f'--source={tmp_path / "in.npz"}', f'--dest={tmp_path / "out.zip"}')
    assert 'ignored arrays in' in said and 'in.npz: labels.' in said


@pytest.mark.parametrize('folder', ['', 'inner/'])
def test_labels_of_images_that_are_not_there_are_counted(tmp_path, folder):
    """Half of a data set was copied, say."""
    names = [f'{i}.png' for i in range(5)]
    labels = json.dumps({'labels': [[name, int(name[0]) % 2] for name in names]}).encode()
    write_zip(
        tmp_path / 'in.zip',
        {
            f'{folder}dataset.json': labels,
            **{folder + name: encode(random_pixels(8, 8)) for name in names[:2]},
        },
    )
    assert 'Note: 3 labels in dataset.json have no image' in run(
        f'--source={tmp_path / "in.zip"}', f'--dest={tmp_path / "out.zip"}'
    )
    assert ImageFolderDataset(tmp_path / 'in.zip', use_labels=True).unused_labels == 3
    assert ImageFolderDataset(tmp_path / 'out.zip', use_labels=True).unused_labels == 0


@pytest.mark.parametrize('kind', ['folder', 'zip'])
def test_folders_without_images_beside_the_class_folders_are_named(tmp_path, kind):
    files = {
        't/dog/1.png': encode(random_pixels(4, 4)),
        't/emu/1.png': encode(random_pixels(4, 4)),
        't/cat/readme.txt': b'',
        't/.git/x': b'',
    }
    if kind == 'folder':
        source = write_files(tmp_path / 'src', files)
    else:
        source = write_zip(tmp_path / 'src.zip', {'t/cat/': b'', 't/.git/': b'', **files})
    output = run(f'--source={source}', f'--dest={tmp_path}/out.zip')
    assert '1 folders beside' in output and 'are not classes (cat)' in output and 'dog=0, emu=1' in output


# ----------------------------------------------------------------------------
# Arrays of images.


@pytest.mark.parametrize('name', ['a.npy', 'a.npz', 'a.NPZ'])
@pytest.mark.parametrize('layout', ['NHWC', 'NCHW', 'NHW', 'NHW1'])
def test_arrays_of_images_are_a_source(tmp_path, name, layout):
    pixels = random_pixels(5, 8, 8, 3) if layout in ('NHWC', 'NCHW') else random_pixels(5, 8, 8)
    array = {'NCHW': lambda: pixels.transpose(0, 3, 1, 2), 'NHW1': lambda: pixels[..., None]}.get(
        layout, lambda: pixels
    )()
    with open(tmp_path / name, 'wb') as file:
        (np.save if name.endswith('npy') else np.savez_compressed)(file, array)
    found, labels = convert(tmp_path / name, tmp_path / 'out.zip')
    np.testing.assert_array_equal(found, pixels)
    assert labels is None and len(convert(tmp_path / name, tmp_path / 'two.zip', '--max-images=2')[0]) == 2


def test_the_handed_arrays_are_read(tmp_path, fixtures):
    for name in ('arr.npy', 'arr.npz'):
        assert 'Wrote 4 RGB images of 8x8' in run(
            f'--source={fixtures}/faults/{name}', f'--dest={tmp_path}/out.zip'
        )


@pytest.mark.parametrize(
    'arrays, words',
    [
        (dict(arr_0=np.zeros([2, 4, 4, 3])), 'holds float64, but images must be uint8'),
        (dict(arr_0=np.zeros([2, 4, 4, 3], np.uint16)), 'Convert 16-bit values by (x / 257)'),
        (dict(arr_0=np.zeros([4, 4, 3], np.uint8)), 'has the shape [4, 4, 3]'),
        (dict(mu=np.zeros(3), sigma=np.eye(3)), 'has no array of images'),
        (dict(arr_0=np.zeros([2, 4, 4, 3], np.uint8), arr_1=np.zeros(2)), 'arr_1 is float64 [2]'),
        (dict(arr_0=np.zeros([2, 4, 4, 3], np.uint8), arr_1=np.array([0, -1])), 'arr_1 is int64 [2]'),
        (dict(arr_0=np.zeros([2, 4, 4, 3], np.uint8), arr_1=np.array([0, 1, 2])), '2 images, but 3 labels'),
        (dict(arr_0=np.zeros([2, 4, 2, 3], np.uint8)), 'is not square'),
    ],
)
def test_other_arrays_are_refused_by_what_they_are(tmp_path, arrays, words):
    np.savez(tmp_path / 'a.npz', **arrays)
    assert words in run(f'--source={tmp_path}/a.npz', f'--dest={tmp_path}/out.zip', code=1)
    assert os.listdir(tmp_path) == ['a.npz']


# ----------------------------------------------------------------------------
# CIFAR-10.


def write_cifar(path, batches, folder='cifar-10-batches-py'):
    with tarfile.open(path, 'w:gz') as archive:
        for name, content in batches.items():
            member = tarfile.TarInfo(f'{folder}/{name}')
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def python2_batch(pixels, labels):
    """A batch in the very opcodes of the published archive, which Python 2 wrote: arrays' bytes are 8-bit strings."""
    text = lambda s: b'U' + bytes([len(s)]) + s
    raw = pixels.transpose(0, 3, 1, 2).tobytes()
    integer = lambda i: b'J' + struct.pack('<i', i)
    dtype = (
        b'cnumpy\ndtype\n('
        + text(b'u1')
        + integer(0)
        + integer(1)
        + b'tR('
        + integer(3)
        + text(b'|')
        + b'NNN'
        + integer(-1) * 2
        + integer(0)
        + b'tb'
    )
    array = (
        b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n('
        + integer(0)
        + b't'
        + text(b'b')
        + b'tR('
        + integer(1)
        + b'('
        + integer(len(pixels))
        + integer(3072)
        + b't'
        + dtype
        + b'I00\n'
        + b'T'
        + struct.pack('<i', len(raw))
        + raw
        + b'tb'
    )
    return (
        b'\x80\x02}('
        + text(b'data')
        + array
        + text(b'labels')
        + b']('
        + b''.join(map(integer, labels))
        + b'e'
        + b'u.'
    )


def numpy_batch(pixels, labels, protocol):
    return pickle.dumps(
        {'data': pixels.transpose(0, 3, 1, 2).reshape(len(pixels), 3072).copy(), 'labels': labels},
        protocol=protocol,
    )


@pytest.mark.parametrize('writer', [python2_batch] + [lambda *a, p=p: numpy_batch(*a, p) for p in (2, 4, 5)])
def test_cifar_batches_are_joined_in_order(tmp_path, writer):
    pixels = random_pixels(8, 32, 32, 3)
    batches = {
        f'data_batch_{i}': writer(pixels[k * 2 : k * 2 + 2], [k, 9 - k])
        for k, i in [(1, 2), (0, 1), (3, 10), (2, 3)]
    }
    source = write_cifar(
        tmp_path / 'cifar-10-python.tar.gz', {**batches, 'test_batch': b'never read', 'batches.meta': b''}
    )
    found, labels = convert(source, tmp_path / 'cifar.zip')
    np.testing.assert_array_equal(found, pixels)
    assert [label for _, label in labels] == [0, 9, 1, 8, 2, 7, 3, 6]


class Hostile:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('protocol', [0, 2, 4, 5])
@pytest.mark.parametrize('function', [os.mkdir, eval, exec, np.load, getattr, Hostile])
def test_a_hostile_cifar_pickle_is_refused_and_nothing_runs(tmp_path, monkeypatch, function, protocol):
    monkeypatch.chdir(tmp_path)
    argument = 'ran' if function is os.mkdir else "__import__('os').mkdir('ran')"
    args = (argument,) if function is not getattr else ('text', 'join')
    batch = pickle.dumps({'data': Hostile(function, *args), 'labels': [0]}, protocol=protocol)
    write_cifar(tmp_path / 'cifar-10-python.tar.gz', {'data_batch_1': batch})
    output = run('--source=cifar-10-python.tar.gz', '--dest=out.zip', code=1)
    assert 'data_batch_1 is not a CIFAR-10 batch (it names ' in output and function.__name__ in output
    assert os.listdir() == ['cifar-10-python.tar.gz']


def test_arrays_with_objects_inside_cannot_be_forged(tmp_path):
    """Raw bytes taken for an array of objects would be taken for pointers."""
    batch = numpy_batch(random_pixels(1, 32, 32, 3), [0], 4).replace(b'u1', b'O8')
    write_cifar(tmp_path / 'cifar-10-python.tar.gz', {'data_batch_1': batch})
    assert "type 'O8' instead of uint8" in run(
        f'--source={tmp_path}/cifar-10-python.tar.gz', f'--dest={tmp_path}/out.zip', code=1
    )


@pytest.mark.parametrize(
    'batch',
    [
        b'',
        b'\x80',
        b'garbage',
        pickle.dumps([1]),
        pickle.dumps({'data': 1, 'labels': [0]}),
        pickle.dumps({'labels': [0]}),
        numpy_batch(random_pixels(2, 32, 32, 3), [0], 4),
        numpy_batch(random_pixels(1, 32, 32, 3), ['0'], 4),
        numpy_batch(random_pixels(1, 32, 32, 3), [10], 4),
        numpy_batch(random_pixels(1, 32, 32, 3), [0], 4)[:-500],
        b'\x80\x02cnumpy\nndarray\n.',
        b'\x80\x02}U\x04datacnumpy\nndarray\n)Rs.',
        b'\x80\x02Pid.',
        b'\x80\x02\x82\x01.',
    ],
)
def test_a_malformed_cifar_batch_is_an_error_that_names_it(tmp_path, batch):
    source = write_cifar(tmp_path / 'cifar-10-python.tar.gz', {'data_batch_1': batch})
    output = run(f'--source={source}', f'--dest={tmp_path}/out.zip', code=1)
    assert 'data_batch_1 is not a CIFAR-10 batch' in output


def test_a_tar_without_batches_or_cut_short_is_refused(tmp_path):
    source = write_cifar(tmp_path / 'cifar-10-python.tar.gz', {'train': b'x'})
    assert 'holds no CIFAR-10 batches' in run(f'--source={source}', f'--dest={tmp_path}/out.zip', code=1)
    source = write_cifar(source, {'data_batch_1': numpy_batch(random_pixels(20, 32, 32, 3), [0] * 20, 4)})
    for size in (0, 10, 5000):
        source.write_bytes(source.read_bytes()[:size] if size else b'nothing')
        assert 'is not a complete tar archive' in run(
            f'--source={source}', f'--dest={tmp_path}/out.zip', code=1
        )


# ----------------------------------------------------------------------------
# MNIST and LSUN.


def idx(array):
    return struct.pack(f'>{1 + array.ndim}I', 0x800 + array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder, pixels, labels, suffix='', labels_suffix=None):
    folder.mkdir(exist_ok=True)
    for name, array, end in [
        ('images-idx3', pixels, suffix),
        ('labels-idx1', labels, suffix if labels_suffix is None else labels_suffix),
    ]:
        content = idx(np.asarray(array, dtype=np.uint8))
        (folder / f'train-{name}-ubyte{end}').write_bytes(gzip.compress(content) if end else content)
    return folder / f'train-images-idx3-ubyte{suffix}'


@pytest.mark.parametrize('suffix, labels_suffix', [('', ''), ('.gz', '.gz'), ('.gz', ''), ('', '.gz')])
def test_mnist_is_padded_to_32_pixels(tmp_path, suffix, labels_suffix):
    pixels = random_pixels(3, 28, 28)
    found, labels = convert(
        write_mnist(tmp_path / 'src', pixels, [7, 0, 9], suffix, labels_suffix), tmp_path / 'mnist.zip'
    )
    assert found.shape == (3, 32, 32) and [label for _, label in labels] == [7, 0, 9]
    np.testing.assert_array_equal(found[:, 2:30, 2:30], pixels)
    assert found.astype(int).sum() == pixels.astype(int).sum()


def test_malformed_mnist_files_are_named(tmp_path):
    source = write_mnist(tmp_path / 'src', random_pixels(3, 28, 28), [7, 0])
    fails = lambda: run(f'--source={source}', f'--dest={tmp_path}/out.zip', code=1)
    assert '3 images, but' in fails() and '2 labels' in fails()
    content = source.read_bytes()
    for damaged in (
        content[:-1],
        content + b'x',
        content[:3],
        b'',
        b'\0\0\x08\x01' + content[4:],
        content[:4] + b'\xff' * 12 + content[16:],
    ):
        source.write_bytes(damaged)
        assert 'images-idx3-ubyte is not a' in fails()
    source.write_bytes(idx(random_pixels(0, 28, 28)))
    (tmp_path / 'src/train-labels-idx1-ubyte').write_bytes(idx(random_pixels(0)))
    assert 'holds no images' in fails()
    (tmp_path / 'src/train-labels-idx1-ubyte').unlink()
    assert 'needs its label file beside it' in fails()
    zipped = write_mnist(tmp_path / 'gz', random_pixels(3, 28, 28), [7, 0, 1], '.gz')
    zipped.write_bytes(zipped.read_bytes()[:-20])
    assert 'is not a readable IDX file' in run(f'--source={zipped}', f'--dest={tmp_path}/out.zip', code=1)


def write_lmdb(path, values):
    lmdb = pytest.importorskip('lmdb')
    with lmdb.open(str(path), map_size=1 << 20) as base, base.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)
    return path


def test_an_lmdb_is_read_in_the_order_of_its_keys(tmp_path):
    pixels = random_pixels(3, 4, 4, 3)
    source = write_lmdb(
        tmp_path / 'cat_lmdb', {k: encode(p, kind='PNG') for k, p in zip((b'c', b'a', b'b'), pixels)}
    )
    found, labels = convert(source, tmp_path / 'cat.zip')
    np.testing.assert_array_equal(found, pixels[[1, 2, 0]])
    assert labels is None
    assert len(convert(source, tmp_path / 'two.zip', '--max-images=2')[0]) == 2


def test_a_bad_lmdb_is_named_by_file_or_key(tmp_path, monkeypatch):
    fails = lambda source: run(f'--source={source}', f'--dest={tmp_path}/out.zip', code=1)
    source = write_lmdb(tmp_path / 'cat_lmdb', {b'a': encode(random_pixels(4, 4, 3)), b'key2': b'no image'})
    assert 'cat_lmdb: key2 is not a readable image' in fails(source)
    assert 'holds no images' in fails(write_lmdb(tmp_path / 'none_lmdb', {}))
    (tmp_path / 'bad_lmdb').mkdir()
    (tmp_path / 'bad_lmdb/data.mdb').write_bytes(b'x' * 10000)
    assert 'bad_lmdb is not a readable LMDB' in fails(tmp_path / 'bad_lmdb')
    monkeypatch.setitem(sys.modules, 'lmdb', None)  # as if not installed
    assert 'pip install lmdb' in fails(source)


@pytest.fixture
def large_lmdb(tmp_path):
    """41 pages, of which most belong to images."""
    noise = random_pixels(12, 64, 64, 3)
    return (
        write_lmdb(tmp_path / 'cat_lmdb', {b'%03d' % i: encode(p, kind='PNG') for i, p in enumerate(noise)})
        / 'data.mdb'
    )


@pytest.mark.parametrize(
    'length, words',
    [
        (0.25, 'but declares'),
        (0.5, 'but declares'),
        (0.75, 'but declares'),
        (0, 'does not begin like one'),
        (100, 'but declares'),
        (-4096, 'but declares'),
        (-100, 'but declares'),
    ],
)
def test_an_lmdb_that_is_cut_off_is_one_error_and_not_the_end_of_the_process(
    large_lmdb, tmp_path, length, words
):
    """Its pages are mapped: one that is not there ends whoever reads it by SIGBUS."""
    data = large_lmdb.read_bytes()
    large_lmdb.write_bytes(data[: int(len(data) * length) if 0 < length < 1 else length])
    said = run(f'--source={large_lmdb.parent}', f'--dest={tmp_path}/out.zip', code=1)
    assert (
        'cat_lmdb is not a readable LMDB database' in said
        and words in said
        and not (tmp_path / 'out.zip').exists()
    )


def test_damage_that_ends_the_reader_of_an_lmdb_is_named(large_lmdb, tmp_path):
    """Images that are said to be larger than the file."""
    data = bytearray(large_lmdb.read_bytes())
    for page in range(2, len(data) // 4096):
        if struct.unpack_from('<QxxH', data, page * 4096) == (
            page,
            2,
        ):  # a leaf: its nodes begin with the size of an image
            for node in struct.unpack_from('<12H', data, page * 4096 + 16):
                struct.pack_into('<I', data, page * 4096 + node, 700_000)
    large_lmdb.write_bytes(data)
    assert 'it is damaged: reading it ends in SIG' in run(
        f'--source={large_lmdb.parent}', f'--dest={tmp_path}/out.zip', code=1
    )


def test_pages_at_the_end_of_an_lmdb_that_were_never_used_may_be_missing(tmp_path):
    """LMDB numbers pages that a transaction uses and gives back, and does not write them."""
    pixels = random_pixels(3, 4, 4, 3)
    source = write_lmdb(
        tmp_path / 'cat_lmdb', {b'%d' % i: encode(p, kind='PNG') for i, p in enumerate(pixels)}
    )
    data = bytearray((source / 'data.mdb').read_bytes())
    for meta in (0, 4096):
        struct.pack_into('<Q', data, meta + 136, len(data) // 4096 + 5)
    (source / 'data.mdb').write_bytes(data)
    np.testing.assert_array_equal(convert(source, tmp_path / 'cat.zip')[0], pixels)


@pytest.mark.parametrize(
    'shape, words',
    [
        ((2**32 - 1,) * 3, 'an IDX file has at most'),
        ((500_000, 28, 28), 'claims 392,000,000 bytes'),
        ((3, 28, 29), 'or wrong length'),
    ],
)
def test_an_idx_file_takes_no_memory_on_its_word(tmp_path, shape, words):
    source = write_mnist(tmp_path / 'src', random_pixels(3, 28, 28), [7, 0, 9], '.gz')
    source.write_bytes(gzip.compress(struct.pack('>4I', 0x803, *shape) + bytes(1 << 27), 1))
    tracemalloc.start()
    said = run(f'--source={source}', f'--dest={tmp_path}/out.zip', code=1)
    assert tracemalloc.get_traced_memory()[1] < 20 << 20 and words in said
    tracemalloc.stop()


@pytest.mark.parametrize(
    'batch',
    [
        b'\x80\x02Nr\xff\xff\xff\x7f.',
        b'\x80\x02\x8b\xff\xff\xff\x7f',
        b'\x80\x02}Nq\0' + b'0h\0h\0\x86q\0' * 60 + b'Ns.',
        b'\x80\x04\x8e' + b'\xff' * 8,
    ],
)
def test_a_cifar_batch_takes_no_memory_on_its_word(tmp_path, batch):
    source = write_cifar(tmp_path / 'cifar-10-python.tar.gz', {'data_batch_1': batch})
    tracemalloc.start()
    assert 'data_batch_1 is not a CIFAR-10 batch' in run(
        f'--source={source}', f'--dest={tmp_path}/out.zip', code=1
    )
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    'name, kind, size',
    [
        ('data_batch_1', b'0', 1 << 37),
        ('x', b'L', 1 << 33),
        ('x', b'x', 1 << 33),
        ('data_batch_1', b'0', 1 << 27),
    ],
)
def test_members_of_a_tar_take_no_memory_on_their_word(tmp_path, name, kind, size):
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    source = tmp_path / 'cifar-10-python.tar.gz'
    source.write_bytes(gzip.compress(member.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20)))
    assert 'is not cifar-10-python.tar.gz' in run(f'--source={source}', f'--dest={tmp_path}/out.zip', code=1)


# ----------------------------------------------------------------------------
# Transforms.


def smooth(width, height):
    """An RGB image that changes slowly enough for any good filter to agree with area averages."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / width * 5 + 1), np.cos(y / height * 4), np.sin(x / width * 3 + y / height * 2)]
    return np.stack([np.rint(127.5 + 120 * w) for w in waves], -1).astype(np.uint8)


def area_average(pixels, width, height):
    """Means over equal blocks, of which the source must consist."""
    h, w = pixels.shape[:2]
    return pixels.reshape(height, h // height, width, w // width, 3).mean((1, 3))


def transformed(tmp_path, pixels, resolution, transform=None):
    source = write_files(tmp_path / 'src', {'0.png': encode(pixels)})
    options = [f'--resolution={resolution}'] + ([f'--transform={transform}'] if transform else [])
    return convert(source, tmp_path / 'out.zip', *options)[0][0].astype(float)


@pytest.mark.parametrize(
    'size, box', [((96, 64), (16, 80, 0, 64)), ((64, 97), (0, 64, 16, 80)), ((65, 64), (0, 64, 0, 64))]
)
def test_center_crop_cuts_the_middle_square_exactly(tmp_path, size, box):
    pixels = random_pixels(size[1], size[0], 3)
    left, right, top, bottom = box
    np.testing.assert_array_equal(
        transformed(tmp_path, pixels, '64x64', 'center-crop'), pixels[top:bottom, left:right]
    )


def test_center_crop_then_resizes(tmp_path):
    pixels = smooth(192, 128)
    out = transformed(tmp_path, pixels, '32x32', 'center-crop')
    assert np.abs(out - area_average(pixels[:, 32:160], 32, 32)).max() < 2.5


@pytest.mark.parametrize(
    'size, box', [((96, 48), (0, 96, 0, 48)), ((96, 72), (0, 96, 12, 60)), ((128, 48), (16, 112, 0, 48))]
)
def test_center_crop_letterbox_cuts_to_the_ratio_and_pads_with_black(tmp_path, size, box):
    """32x16 wanted: the middle 2:1 part of the source, resized, between bars of 8 rows."""
    pixels = smooth(*size)
    left, right, top, bottom = box
    out = transformed(tmp_path, pixels, '32x16', 'center-crop-letterbox')
    assert out.shape == (32, 32, 3) and not out[:8].any() and not out[24:].any()
    assert np.abs(out[8:24] - area_average(pixels[top:bottom, left:right], 32, 16)).max() < 3


def edm_wide(pixels, width, height):
    """EDM's formula in whole numbers: the rows are the image's height at the wanted width, w H / W, halves to the even number."""
    h, w = pixels.shape[:2]
    rows, rest = divmod(width * h, w)
    rows += 2 * rest > w or (2 * rest == w and rows % 2)
    if w < width or rows < height:
        return None
    out = np.zeros([width, width, *pixels.shape[2:]], np.uint8)
    top = (width - height) // 2
    cut = Image.fromarray(pixels[(h - rows) // 2 : (h + rows) // 2])
    out[top : top + height] = np.asarray(cut.resize((width, height), Image.Resampling.LANCZOS))
    return out


SIZES = [
    (32, 16),
    (32, 15),
    (32, 17),
    (32, 24),
    (32, 29),
    (31, 40),
    (33, 16),
    (33, 21),
    (33, 64),
    (47, 22),
    (47, 23),
    (47, 71),
    (48, 24),
    (64, 31),
    (64, 32),
    (64, 33),
    (64, 47),
    (96, 64),
    (97, 64),
    (101, 77),
    (20, 40),
]  # columns, rows


def test_center_crop_wide_leaves_out_and_cuts_what_edm_does(tmp_path):
    """Odd sizes, just too small or large enough, and halves: (64, 31) and (64, 33) both have 16 rows. Files are numbered as in the source."""
    images = [random_pixels(h, w, 3, seed=i) for i, (w, h) in enumerate(SIZES)]
    source = write_files(tmp_path / 'src', {f'{i:02d}.png': encode(image) for i, image in enumerate(images)})
    output = run(
        f'--source={source}', f'--dest={tmp_path}/out', '--resolution=32x16', '--transform=center-crop-wide'
    )
    expected = {i: out for i, image in enumerate(images) if (out := edm_wide(image, 32, 16)) is not None}
    assert {SIZES[i] for i in range(len(SIZES)) if i not in expected} == {
        (32, 15),
        (31, 40),
        (47, 22),
        (20, 40),
    }
    assert (
        f'Note: {len(SIZES) - len(expected)} images are too small for --transform=center-crop-wide and were skipped'
        in output
    )
    assert f'Wrote {len(expected)} RGB images' in output
    assert sorted(path.stem for path in (tmp_path / 'out').rglob('*.png')) == [
        f'img{i:08d}' for i in expected
    ]
    np.testing.assert_array_equal(load(tmp_path / 'out')[0], list(expected.values()))


def test_where_every_image_is_too_small_nothing_is_written(tmp_path):
    source = write_files(tmp_path / 'src', {'0.png': encode(random_pixels(16, 16))})
    assert 'None of the 1 images are large enough' in run(
        f'--source={source}',
        f'--dest={tmp_path}/out.zip',
        '--resolution=32x16',
        '--transform=center-crop-wide',
        code=1,
    )
    assert os.listdir(tmp_path) == ['src']


@pytest.mark.parametrize('size', [(65, 64), (64, 67), (99, 70), (33, 34)])
def test_center_crop_cuts_the_rows_and_columns_of_edm_where_sizes_are_odd(tmp_path, size):
    pixels, side = random_pixels(size[1], size[0], 3), min(size)
    top, left = (size[1] - side) // 2, (size[0] - side) // 2
    cut = Image.fromarray(pixels[top : top + side, left : left + side])
    out = transformed(tmp_path, pixels, '32x32', 'center-crop')
    np.testing.assert_array_equal(out, np.asarray(cut.resize((32, 32), Image.Resampling.LANCZOS)))


def adm_oracle(pixels, side):
    """Box halvings by hand (even sizes only; columns, then rows, each rounded half up as Pillow does), then bicubic, then crop."""
    while min(pixels.shape[:2]) >= 2 * side:
        pixels = (pixels[:, ::2].astype(int) + pixels[:, 1::2] + 1) // 2
        pixels = ((pixels[::2] + pixels[1::2] + 1) // 2).astype(np.uint8)
    h, w = pixels.shape[:2]
    factor = side / min(h, w)
    image = Image.fromarray(pixels).resize((round(w * factor), round(h * factor)), Image.Resampling.BICUBIC)
    top, left = (image.height - side) // 2, (image.width - side) // 2
    return np.asarray(image)[top : top + side, left : left + side]


@pytest.mark.parametrize('size', [(256, 192), (64, 72), (80, 96), (20, 16)])
def test_center_crop_dhariwal_halves_by_box_then_bicubic_then_crops(tmp_path, size):
    pixels = random_pixels(size[1], size[0], 3)
    np.testing.assert_array_equal(
        transformed(tmp_path, pixels, '32x32', 'center-crop-dhariwal'), adm_oracle(pixels, 32)
    )


def test_without_a_transform_the_image_is_stretched(tmp_path):
    pixels = smooth(128, 64)
    assert np.abs(transformed(tmp_path, pixels, '16x16') - area_average(pixels, 16, 16)).max() < 2.5


# ----------------------------------------------------------------------------
# Latents.


def write_colors(path, count=11, size=8):
    """RGB images of random colors in two class folders, and their pixels in the order of the files."""
    pixels = random_pixels(count, size, size, 3)
    write_zip(path, {f'{"ab"[i > count // 2]}/{i:02d}.png': encode(p) for i, p in enumerate(pixels)})
    return pixels


def stand_in_latents(pixels):
    """Independent of the stand-in's code: 2x2 means of 0 ... 1, their sum, constant deviations."""
    n, h, w, _ = pixels.shape
    means = (pixels / 255).reshape(n, h // 2, 2, w // 2, 2, 3).mean((2, 4)).transpose(0, 3, 1, 2)
    deviations = np.broadcast_to(np.reshape([0.1, 0.2, 0.3, 0.4], (1, 4, 1, 1)), (n, 4, h // 2, w // 2))
    return np.concatenate([means, means.sum(1, keepdims=True), deviations], axis=1)


def test_a_vae_encodes_all_images_with_their_labels(tmp_path, monkeypatch):
    """In EDM2's format and names, in batches of 8; the same bytes again."""
    vae, pixels = use_stand_in(monkeypatch), write_colors(tmp_path / 'src.zip')
    output = run(f'--source={tmp_path}/src.zip', f'--dest={tmp_path}/a.zip', '--encode-vae=some/name')
    assert 'Wrote 11 latents of 4x4x8, with 2 classes (' in output and vae.batches == [8, 3]
    dataset = ImageFolderDataset(tmp_path / 'a.zip', use_labels=True)
    np.testing.assert_allclose(
        np.stack([dataset[i][0] for i in range(11)]), stand_in_latents(pixels), rtol=1e-5, atol=1e-6
    )
    assert [dataset[i][1].argmax() for i in range(11)] == [0] * 6 + [1] * 5
    with zipfile.ZipFile(tmp_path / 'a.zip') as archive:
        assert archive.namelist()[10:] == ['00000/img-mean-std-00000010.npy', 'dataset.json']
        with archive.open('00000/img-mean-std-00000010.npy') as file:
            stored = np.load(file, allow_pickle=False)
    assert stored.dtype == np.float32 and np.array_equal(stored, dataset[10][0])
    run(f'--source={tmp_path}/src.zip', f'--dest={tmp_path}/b.zip', '--encode-vae=some/name')
    assert (tmp_path / 'a.zip').read_bytes() == (tmp_path / 'b.zip').read_bytes()


def test_the_label_file_names_the_vae_and_the_statistics_of_what_is_drawn_from_it(tmp_path, monkeypatch):
    """Drawing from the latents and mapping them gives mean 0 and deviation 0.5 in every channel: within 0.01 for 512,000 values each."""
    use_stand_in(monkeypatch)
    pixels = write_colors(tmp_path / 'src.zip', count=20)
    run(f'--source={tmp_path}/src.zip', f'--dest={tmp_path}/data', '--encode-vae=some/name')
    dataset = ImageFolderDataset(tmp_path / 'data')
    record, latents = dataset.encoder, stand_in_latents(pixels)
    assert (record['class_name'], record['vae_name']) == ('StabilityVAEEncoder', 'some/name')
    np.testing.assert_allclose(record['raw_mean'], latents[:, :4].mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(
        record['raw_std'], (latents[:, :4].var((0, 2, 3)) + latents[0, 4:, 0, 0] ** 2) ** 0.5, rtol=1e-5
    )
    encoder, channels = encoders.for_dataset(dataset)
    raw = torch.from_numpy(np.stack([dataset[i][0] for i in range(20)])).repeat(1600, 1, 1, 1)
    final = encoder.encode_latents(
        raw, torch.randn(32_000, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    )
    assert (
        channels == 4
        and final.mean((0, 2, 3)).abs().max() < 0.01
        and (final.std((0, 2, 3)) - 0.5).abs().max() < 0.01
    )


def test_grayscale_images_are_encoded_as_color_and_transformed_before(tmp_path, monkeypatch):
    use_stand_in(monkeypatch)
    output = run(
        '--source=digits',
        f'--dest={tmp_path}/latents.zip',
        '--encode-vae=some/name',
        '--max-images=3',
        '--resolution=32x32',
    )
    assert '3 images were converted from mode L to RGB' in output and 'Wrote 3 latents of 16x16x8' in output
    latents = ImageFolderDataset(tmp_path / 'latents.zip')[0][0]
    np.testing.assert_allclose(latents[0], latents[1])


def test_a_real_vae_encodes_from_a_folder(tmp_path, monkeypatch):
    """A relative folder is recorded by its whole path, so that the data set finds it from elsewhere."""
    pixels, name = write_colors(tmp_path / 'src.zip'), save_vae(tmp_path / 'vae')
    monkeypatch.chdir(tmp_path)
    run('--source=src.zip', '--dest=latents.zip', '--encode-vae=vae')
    dataset = ImageFolderDataset('latents.zip')
    assert dataset.encoder['vae_name'] == name
    expected = (
        encoders.build(dataset.encoder).encode_pixels(torch.from_numpy(pixels).permute(0, 3, 1, 2)).numpy()
    )
    np.testing.assert_allclose(np.stack([dataset[i][0] for i in range(11)]), expected, rtol=1e-4, atol=1e-5)
    assert 'the VAE cannot encode images of 1x1' in run(
        '--source=src.zip', '--dest=small.zip', '--encode-vae=vae', '--resolution=1x1', code=1
    )
    assert not (tmp_path / 'small.zip').exists()


def test_without_diffusers_nothing_is_written_and_the_cure_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'diffusers', None)
    encoders.load_vae.cache_clear()
    output = run('--source=digits', f'--dest={tmp_path}/latents.zip', '--encode-vae=some/name', code=1)
    assert 'pip install diffusers' in output and '--latents' not in output
    assert not os.listdir(tmp_path)


def test_a_vae_that_is_not_there_is_named(tmp_path, monkeypatch):
    pytest.importorskip('diffusers')
    encoders.load_vae.cache_clear()
    (tmp_path / 'empty').mkdir()
    output = run(
        '--source=digits', f'--dest={tmp_path}/latents.zip', f'--encode-vae={tmp_path}/empty', code=1
    )
    assert f'The VAE {tmp_path}/empty cannot be loaded' in output and 'name a folder' in output


def test_latents_are_not_encoded_again(tmp_path):
    source = write_zip(
        tmp_path / 'latents.zip', {f'{i}.npy': npy(x) for i, x in enumerate(random_latents(2))}
    )
    assert 'already holds latents (0.npy, ...)' in run(
        f'--source={source}', f'--dest={tmp_path}/out.zip', code=1
    )


# ----------------------------------------------------------------------------
# Errors.


@pytest.mark.parametrize(
    'options, message',
    [
        (['--source=digits', '--transform=center-crop'], '--transform=center-crop needs --resolution'),
        (['--source=digits', '--resolution=64x'], 'is not WIDTHxHEIGHT'),
        (['--source=digits', '--resolution=0x0'], 'is not WIDTHxHEIGHT'),
        (['--source=digits', '--max-images=0'], 'max-images'),
        (['--source=digits', '--transform=zoom'], 'zoom'),
        ([], '--source'),
    ],
)
def test_misuse_of_options_exits_with_2(tmp_path, options, message):
    assert message in run(*options, f'--dest={tmp_path}/out.zip', code=2)


@pytest.mark.parametrize(
    'options, message',
    [
        (['--resolution=48x48'], 'side 48 is not a power of two'),
        (['--resolution=64x32', '--transform=center-crop'], '64x32 is not square'),
        (['--resolution=32x64', '--transform=center-crop-wide'], 'the height cannot exceed it'),
        (['--resolution=48x16', '--transform=center-crop-letterbox'], 'side 48 is not a power of two'),
    ],
)
def test_sizes_that_networks_cannot_take_are_refused_before_reading(tmp_path, options, message):
    assert message in run('--source=missing', f'--dest={tmp_path}/out.zip', *options, code=1)


@pytest.mark.parametrize(
    'files, message',
    [
        ({'0.png': encode(random_pixels(6, 6))}, '0.png: side 6 is not a power of two'),
        ({'0.png': encode(random_pixels(4, 8))}, '0.png: 8x4 is not square'),
        ({'0.png': encode(random_pixels(4, 4)), '1.png': encode(random_pixels(8, 8))}, '1.png is 8x8, but'),
        ({'0.png': encode(random_pixels(4, 4)), '1.png': b'no image'}, '1.png is not a readable image'),
        (
            {'0.png': encode(random_pixels(4, 4, 3)), '1.png': encode(random_pixels(4, 4, 3))[:-30]},
            '1.png is not a readable image',
        ),
        (
            {'0.png': encode(random_pixels(4, 4)), 'dataset.json': b'{"labels": [["1.png", 3]]}'},
            'no label for 1 of 1 images, such as 0.png',
        ),
        ({'0.png': encode(random_pixels(4, 4)), 'dataset.json': b'{'}, 'dataset.json is not'),
        ({'readme.txt': b''}, 'holds no images'),
    ],
)
def test_unfit_images_are_named_and_nothing_is_left_behind(tmp_path, files, message):
    """Whatever was at the destination stays as it was, and no temporary file remains."""
    write_files(tmp_path / 'src', files)
    write_zip(tmp_path / 'src.zip', files)
    (tmp_path / 'old.zip').write_bytes(b'old')
    before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    for source in ('src', 'src.zip'):
        for dest in ('old.zip', 'new.zip', 'new'):
            assert message in run(f'--source={tmp_path / source}', f'--dest={tmp_path / dest}', code=1)
    assert {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ['old.zip', 'src', 'src.zip']


def test_a_truncated_zip_and_a_missing_source_are_refused(tmp_path):
    source = write_zip(tmp_path / 'src.zip', {'0.png': encode(random_pixels(4, 4))})
    source.write_bytes(source.read_bytes()[:-30])
    assert 'complete zip' in run(f'--source={source}', f'--dest={tmp_path}/out.zip', code=1)
    assert 'no such file or folder' in run('--source=missing', f'--dest={tmp_path}/out.zip', code=1)
    assert os.listdir(tmp_path) == ['src.zip']


def test_a_destination_in_use_is_refused(tmp_path):
    write_files(tmp_path / 'full', {'precious.txt': b'data'})
    write_files(tmp_path / 'folder.zip', {'precious.txt': b'data'})
    (tmp_path / 'file').write_bytes(b'data')
    for name, message in [
        ('full', 'not empty'),
        ('folder.zip', 'is a folder'),
        ('file', 'is a file'),
        ('file/out.zip', 'cannot write'),
    ]:
        assert message in run('--source=digits', f'--dest={tmp_path / name}', code=1)
    assert (tmp_path / 'full/precious.txt').read_bytes() == (tmp_path / 'file').read_bytes() == b'data'
    assert sorted(os.listdir(tmp_path)) == ['file', 'folder.zip', 'full']


@pytest.mark.parametrize('name', ['x.ZIP', 'x.Zip'])
def test_a_zip_is_a_zip_in_any_case(tmp_path, name):
    assert len(convert('digits', tmp_path / name, '--max-images=3')[0]) == 3
    assert zipfile.is_zipfile(tmp_path / name)


@pytest.mark.parametrize('name', ['x.tar', 'x.tar.gz', 'x.npz', 'x.NPY', 'x.lmdb', 'x.h5', 'x.tfrecords'])
def test_a_destination_that_is_called_another_file_is_refused_and_other_dots_are_a_folders(tmp_path, name):
    assert 'are written to a .zip file or a folder' in run(
        '--source=digits', f'--dest={tmp_path / name}', code=1
    )
    assert not os.listdir(tmp_path)
    assert (
        len(convert('digits', tmp_path / 'digits.v1', '--max-images=3')[0]) == 3
        and (tmp_path / 'digits.v1').is_dir()
    )


def test_an_existing_zip_is_replaced_even_by_its_own_conversion(tmp_path):
    source = write_zip(
        tmp_path / 'data.zip', {f'{i}.png': encode(random_pixels(8, 8, seed=i)) for i in range(3)}
    )
    before = hashlib.sha256(source.read_bytes()).digest()
    assert convert(source, source, '--resolution=4x4')[0].shape == (3, 4, 4)
    assert hashlib.sha256(source.read_bytes()).digest() != before


def test_a_full_disk_leaves_the_old_file_and_one_clear_message(tmp_path, monkeypatch):
    (tmp_path / 'out.zip').write_bytes(b'old')
    written = []

    def fail(self, name, data):
        written.append(name)
        if len(written) == 5:
            raise OSError(28, 'No space left on device')

    monkeypatch.setattr(archive_writer.ZipWriter, 'write', fail)
    assert 'No space left on device' in run('--source=digits', f'--dest={tmp_path}/out.zip', code=1)
    assert os.listdir(tmp_path) == ['out.zip'] and (tmp_path / 'out.zip').read_bytes() == b'old'


def test_the_script_runs_on_its_own_and_is_quiet_off_a_terminal(tmp_path):
    command = [
        sys.executable,
        ROOT / 'dataset_tool.py',
        '--source=digits',
        '--dest=digits.zip',
        '--max-images=3',
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    said = (
        'Note: --max-images=3 leaves out 7 of 10 classes (3, 4, 5, 6, 7, ...); --max-images-per-class takes as many of each.\n',
    )
    assert (result.returncode, result.stdout, result.stderr) == (
        0,
        'Wrote 3 grayscale images of 8x8, with labels, to digits.zip\n',
        *said,
    )
    result = subprocess.run(
        [*command[:2], '--source=missing', '--dest=x.zip'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stdout, result.stderr) == (
        1,
        '',
        'Error: --source=missing: no such file or folder\n',
    )
