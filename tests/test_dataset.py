"""data/dataset.py: what a data set on disk becomes, which files are refused and how, and the order of training."""

import io
import itertools
import json
import multiprocessing
import os
import pathlib
import pickle
import tracemalloc
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from latents import npy, random_latents
from pictures import label_json, png, random_images, write_folder, write_zip
from PIL import Image

from data import dataset as dataset_module
from data.dataset import ImageFolderDataset, InfiniteSampler
from data.image_files import ImageFiles
from dnnlib import UserError


@pytest.fixture
def files():
    """Six RGB images in two folders, listed out of order, with class indices 0..2."""
    names = [f'{folder}/img{i}.png' for i in (2, 0, 1) for folder in ('b', 'a')]
    contents = {name: png(pixels) for name, pixels in zip(names, random_images(6))}
    return {**contents, 'dataset.json': label_json([[name, i % 3] for i, name in enumerate(sorted(names))])}


@pytest.fixture(params=['folder', 'zip', 'deflated'])
def data(request, tmp_path, files):
    if request.param == 'folder':
        return write_folder(tmp_path / 'data', files)
    return write_zip(
        tmp_path / 'data.zip',
        files,
        zipfile.ZIP_DEFLATED if request.param == 'deflated' else zipfile.ZIP_STORED,
    )


# ----------------------------------------------------------------------------
# What is read.


def test_a_data_set_is_named_after_its_folder_however_that_is_written(tmp_path, monkeypatch, files):
    """As run folders are: with a slash at the end or as the folder one is in, there would be no name."""
    folder = write_folder(tmp_path / 'data', files)
    monkeypatch.chdir(folder)
    assert [
        ImageFolderDataset(path).name for path in (f'{folder}/', '.', '../data', folder / '..' / 'data')
    ] == ['data'] * 4


def test_items_are_the_files_in_sorted_order_with_one_hot_labels(data, files):
    dataset = ImageFolderDataset(data, resolution=4, use_labels=True)
    names = sorted(name for name in files if name.endswith('.png'))
    assert len(dataset) == 6 and dataset.name == 'data'
    assert (dataset.image_shape, dataset.resolution, dataset.num_channels) == ([3, 4, 4], 4, 3)
    assert (dataset.has_labels, dataset.label_dim, dataset.label_shape) == (True, 3, [3])
    for i, name in enumerate(names):
        image, label = dataset[i]
        assert image.dtype == np.uint8 and label.dtype == np.float32
        np.testing.assert_array_equal(
            image, np.asarray(Image.open(io.BytesIO(files[name]))).transpose(2, 0, 1)
        )
        np.testing.assert_array_equal(label, np.eye(3)[i % 3])
        np.testing.assert_array_equal(dataset.get_label(i), label)


def test_grayscale_images_have_one_channel_and_unused_labels_length_zero(tmp_path):
    pixels = random_images(2, channels=1)
    dataset = ImageFolderDataset(
        write_zip(tmp_path / 'gray.zip', {f'{i}.png': png(p) for i, p in enumerate(pixels)})
    )
    np.testing.assert_array_equal(dataset[1][0], pixels[1][None])
    assert dataset[0][1].shape == (0,) and dataset.label_dim == 0 and not dataset.has_labels


def test_mirrored_copies_follow_the_originals_with_the_same_labels(data):
    plain, both = (ImageFolderDataset(data, use_labels=True, xflip=xflip) for xflip in (False, True))
    assert len(both) == 12
    for i in range(6):
        np.testing.assert_array_equal(both[i][0], plain[i][0])
        np.testing.assert_array_equal(both[i + 6][0], plain[i][0][:, :, ::-1])
        np.testing.assert_array_equal(both[i + 6][1], plain[i][1])
    torch.from_numpy(both[6][0])  # refuses negative strides
    with pytest.raises(IndexError):
        both[12]


def test_max_size_keeps_a_sorted_subset_that_the_seed_draws(data):
    everything = ImageFolderDataset(data, use_labels=True)
    kept = {}
    for seed in range(20):
        subset = ImageFolderDataset(data, use_labels=True, max_size=3, seed=seed)
        places = [
            next(j for j in range(6) if (everything[j][0] == image).all())
            for image, _ in (subset[i] for i in range(3))
        ]
        assert places == sorted(set(places)) and len(subset) == 3 and subset.label_dim == 3
        for i, j in enumerate(places):
            np.testing.assert_array_equal(subset[i][1], everything[j][1])
        kept[seed] = tuple(places)
    assert len(set(kept.values())) > 5
    assert kept[0] == tuple(np.sort(np.random.RandomState(0).permutation(6)[:3]))
    assert len(ImageFolderDataset(data, max_size=100)) == 6
    with pytest.raises(UserError, match='max_size must be at least 1'):
        ImageFolderDataset(data, max_size=0)


@pytest.mark.parametrize(
    'cache, copies, kept', [(None, 1, True), (None, 5, False), (True, 5, True), (False, 1, False)]
)
def test_images_are_kept_by_default_if_all_copies_take_a_small_share_of_the_memory(
    tmp_path, files, cache, copies, kept, monkeypatch
):
    """Of a machine with room for four copies in CACHE_SHARE of its memory."""
    path = write_zip(tmp_path / 'data.zip', files)
    one = ImageFolderDataset(path).decoded_bytes
    memory = SimpleNamespace(total=4 * one / dataset_module.CACHE_SHARE)
    monkeypatch.setattr(dataset_module.psutil, 'virtual_memory', lambda: memory)
    dataset = ImageFolderDataset(path, cache=cache, copies=copies)
    assert dataset.caches is kept and dataset.decoded_bytes == copies * one
    dataset[0]
    assert bool(dataset._cache) is kept


def test_cached_images_survive_the_removal_of_the_file_and_cannot_be_written_through(tmp_path, files):
    path = write_zip(tmp_path / 'data.zip', files)
    dataset = ImageFolderDataset(path, cache=True)
    first = dataset[0][0].copy()
    dataset[0][0][:] = 0
    dataset._files._zip.close()
    path.unlink()
    np.testing.assert_array_equal(dataset[0][0], first)


@pytest.mark.parametrize('prefix', ['sub/', ''])
def test_a_nested_label_file_names_images_from_the_root_or_its_own_folder(tmp_path, prefix):
    files = {f'sub/deep/{i}.png': png(p) for i, p in enumerate(random_images(3))}
    files['sub/dataset.json'] = label_json([[f'{prefix}deep/{i}.png', 2 - i] for i in range(3)])
    for path in (write_zip(tmp_path / 'data.zip', files), write_folder(tmp_path / 'data', files)):
        dataset = ImageFolderDataset(path, use_labels=True)
        assert [int(dataset.get_label(i).argmax()) for i in range(3)] == [2, 1, 0]


def test_label_vectors_are_passed_on(tmp_path, files):
    names = sorted(name for name in files if name.endswith('.png'))
    files['dataset.json'] = label_json([[name, [i, 0.5]] for i, name in enumerate(names)])
    dataset = ImageFolderDataset(write_zip(tmp_path / 'data.zip', files), use_labels=True)
    assert dataset.label_dim == 2
    np.testing.assert_array_equal(dataset.get_label(4), np.float32([4, 0.5]))


def test_hidden_files_and_resource_forks_are_not_images(tmp_path, files):
    path = write_zip(
        tmp_path / 'data.zip',
        {**files, '__MACOSX/a/._img0.png': b'fork', 'a/.hidden.png': b'', 'notes.txt': b''},
    )
    assert len(ImageFolderDataset(path, use_labels=True)) == 6


def test_zip_members_outside_the_archive_are_refused_and_never_extracted(tmp_path):
    path = write_zip(tmp_path / 'data.zip', {'../../escape.png': png(random_images(1)[0])})
    with pytest.raises(UserError, match='is outside the data set'):
        ImageFolderDataset(path)
    assert [p.name for p in tmp_path.rglob('*')] == ['data.zip']


# ----------------------------------------------------------------------------
# Latents.

LATENT_NAMES = [f'{i // 3:05d}/img-mean-std-{i:08d}.npy' for i in range(5)]


@pytest.fixture
def latent_files():
    """Five files as EDM2 names them, in two folders, with labels."""
    contents = {name: npy(values) for name, values in zip(LATENT_NAMES, random_latents(5))}
    return {**contents, 'dataset.json': label_json([[name, i % 3] for i, name in enumerate(LATENT_NAMES)])}


@pytest.fixture(params=['folder', 'zip'])
def latent_data(request, tmp_path, latent_files):
    return (
        write_folder(tmp_path / 'data', latent_files)
        if request.param == 'folder'
        else write_zip(tmp_path / 'data.zip', latent_files)
    )


def test_latents_are_read_as_they_are_stored(latent_data):
    dataset = ImageFolderDataset(latent_data, resolution=4, use_labels=True, cache=True)
    assert (len(dataset), dataset.image_shape, dataset.num_channels, dataset.label_dim) == (
        5,
        [8, 4, 4],
        8,
        3,
    )
    assert dataset.holds_latents and dataset.encoder is None
    for repeat in range(2):  # the second time from the cache
        for i, values in enumerate(random_latents(5)):
            item, label = dataset[i]
            assert item.dtype == np.float32 and label.argmax() == i % 3
            np.testing.assert_array_equal(item, values)
            item[:] = repeat


def test_images_hold_no_latents(data):
    assert not ImageFolderDataset(data).holds_latents


def test_mirrored_latents_are_turned_left_to_right(latent_data):
    dataset = ImageFolderDataset(latent_data, xflip=True)
    np.testing.assert_array_equal(dataset[7][0], random_latents(5)[2][:, :, ::-1])


def test_workers_batch_latents(latent_data):
    loader = torch.utils.data.DataLoader(ImageFolderDataset(latent_data), batch_size=5, num_workers=2)
    images, _ = next(iter(loader))
    assert images.dtype == torch.float32 and np.array_equal(images, random_latents(5))


@pytest.mark.parametrize(
    'store',
    [
        lambda x: npy(x.astype(np.float16)),
        lambda x: npy(x.astype('>f4')),
        lambda x: npy(np.asfortranarray(x)),
        lambda x: version_2(x),
    ],
    ids=['half', 'big-endian', 'column-major', 'version 2'],
)
def test_the_forms_that_numpy_writes_are_read_alike(tmp_path, store):
    values = random_latents(2).astype(np.float16).astype(np.float32)  # which half precision holds exactly
    dataset = ImageFolderDataset(
        write_zip(tmp_path / 'data.zip', {'a.npy': store(values[0]), 'b.npy': npy(values[1])})
    )
    for i in range(2):
        assert dataset[i][0].dtype == np.float32
        np.testing.assert_array_equal(dataset[i][0], values[i])


def version_2(values):
    data = io.BytesIO()
    np.lib.format.write_array(data, values, version=(2, 0))
    return data.getvalue()


@pytest.mark.parametrize(
    'label_file, encoder',
    [
        ({}, None),
        ({'labels': None}, None),
        ({'labels': None, 'encoder': {'class_name': 'E', 'x': [1, 2]}}, {'class_name': 'E', 'x': [1, 2]}),
    ],
)
def test_the_label_file_may_say_how_latents_were_made(tmp_path, latent_files, label_file, encoder):
    latent_files['dataset.json'] = json.dumps(label_file).encode()
    assert ImageFolderDataset(write_zip(tmp_path / 'data.zip', latent_files)).encoder == encoder


@pytest.mark.parametrize(
    'content, message',
    [
        (b'[1]', 'is not {"labels"'),
        (b'{', 'is not {"labels"'),
        (b'{"encoder": 3}', 'not an object of constructor'),
    ],
)
def test_a_label_file_that_says_nothing_sensible_is_refused(tmp_path, latent_files, content, message):
    latent_files['dataset.json'] = content
    with pytest.raises(UserError, match=message):
        ImageFolderDataset(write_zip(tmp_path / 'data.zip', latent_files))


def test_images_and_latents_do_not_mix(tmp_path, latent_files, files):
    for path in (
        write_zip(tmp_path / 'data.zip', {**files, **latent_files}),
        write_folder(tmp_path / 'data', {**files, **latent_files}),
    ):
        with pytest.raises(
            UserError, match=r'holds images and latents \(a/img0\.png, 00000/img-mean-std-00000000\.npy'
        ):
            ImageFolderDataset(path)


def test_latents_unlike_the_first_are_named_with_both_shapes(tmp_path, latent_files, monkeypatch):
    path = write_zip(
        tmp_path / 'data.zip', {**latent_files, LATENT_NAMES[3]: npy(random_latents(1, channels=4)[0])}
    )
    message = r'img-mean-std-00000003\.npy is 4x4x4, but 00000/img-mean-std-00000000\.npy is 4x4x8'
    with pytest.raises(UserError, match=message):
        ImageFolderDataset(path)
    monkeypatch.setattr(
        'data.dataset.HEADER_CHECK_LIMIT', 4
    )  # as in a data set too large to look at every header
    dataset = ImageFolderDataset(path)
    dataset[2]
    with pytest.raises(UserError, match=message):
        dataset[3]
    with pytest.raises(UserError, match=r'is 4x2x8, not square'):
        ImageFolderDataset(write_zip(tmp_path / 'wide.zip', {'a.npy': npy(random_latents(1)[0][:, ::2])}))


def header_of(text):
    return b'\x93NUMPY\x01\x00' + len(text).to_bytes(2, 'little') + text


GOOD_HEADER = b"{'descr': '<f4', 'fortran_order': False, 'shape': (8, 4, 4), }\n"


@pytest.mark.parametrize(
    'content, message',
    [
        (b'', 'header cannot be read'),
        (b'no array', 'header cannot be read'),
        (npy(np.zeros(3))[:9], 'not a readable'),
        (npy(random_latents(1)[0])[:-1], 'shorter or longer'),
        (npy(random_latents(1)[0]) + b'x', 'shorter or longer'),
        (npy(random_latents(1)[0])[:40], 'header cannot be read'),
        (npy(random_latents(1)), 'three dimensions'),
        (npy(np.zeros([8, 4, 4])), 'float32'),
        (npy(np.zeros([8, 4, 4], np.uint8)), 'float32'),
        (npy(np.float32(1)), 'three dimensions'),
        (npy(np.zeros([8, 0, 0], np.float32)), 'is empty'),
        (npy(np.full([8, 4, 4], np.nan, np.float32)), 'not finite'),
        (npy(np.full([8, 4, 4], np.inf, np.float16)), 'not finite'),
        (
            header_of(b"{'descr': '<f4', 'fortran_order': False, 'shape': (8, 99999, 99999), }\n")
            + bytes(512),
            'shorter or longer',
        ),
        (
            header_of(
                b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b'9' * 60_000 + b', 4, 4), }\n'
            ),
            'header cannot be read',
        ),
        (header_of(b'(' * 60_000), 'header cannot be read'),
        (header_of(b"__import__('os').mkdir('canary')"), 'header cannot be read'),
        (header_of(b'(' * 9_000), 'header cannot be read'),
        (
            header_of(GOOD_HEADER.replace(b'<f4', b'|O')) + pickle.dumps(np.zeros([8, 4, 4])),
            'its header says',
        ),
    ],
)
def test_a_file_that_holds_no_latents_is_named(tmp_path, content, message):
    """Whatever its header claims, no memory is taken for it and nothing is evaluated or unpickled."""
    files = {'a.npy': content}
    for path in (write_folder(tmp_path / 'data', files), write_zip(tmp_path / 'data.zip', files)):
        with pytest.raises(UserError, match=r'a\.npy is not a readable file of latents') as error:
            ImageFolderDataset(path)[0]
        assert message in str(error.value)


def test_a_header_written_by_hand_is_as_good(tmp_path):
    values = random_latents(1)[0]
    path = write_zip(tmp_path / 'data.zip', {'a.npy': header_of(GOOD_HEADER) + values.tobytes()})
    np.testing.assert_array_equal(ImageFolderDataset(path)[0][0], values)


def test_flipped_bits_of_latents_in_a_zip_are_noticed(tmp_path, latent_files):
    path = write_zip(tmp_path / 'data.zip', latent_files)
    content = path.read_bytes()
    place = content.index(latent_files[LATENT_NAMES[1]]) + 400
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(UserError, match=r'00000001\.npy is not a readable file of latents'):
        ImageFolderDataset(path)[1]


def test_the_values_of_latents_are_not_read_at_construction(tmp_path, latent_files):
    """Only the headers are: a cut-off file shows when it is used."""
    latent_files[LATENT_NAMES[4]] = latent_files[LATENT_NAMES[4]][:200]
    dataset = ImageFolderDataset(write_folder(tmp_path / 'data', latent_files))
    with pytest.raises(UserError, match='shorter or longer'):
        dataset[4]


# ----------------------------------------------------------------------------
# Processes.


def _read_in_child(dataset, queue):
    queue.put([int(dataset[i % 6][0].astype(int).sum()) for i in range(60)])


def test_forked_processes_read_a_zip_at_once_without_disturbing_each_other(tmp_path):
    """A handle shared over a fork shares its file position: readers would hit each other's bytes. (Images larger than a read buffer show it.)"""
    files = {f'{i}.png': png(pixels) for i, pixels in enumerate(random_images(6, size=64))}
    dataset = ImageFolderDataset(write_zip(tmp_path / 'data.zip', files))
    sums = [int(dataset[i][0].astype(int).sum()) for i in range(6)]
    position = lambda: os.lseek(dataset._files._zip.fp.fileno(), 0, os.SEEK_CUR)
    before = position()
    context = multiprocessing.get_context('fork')
    queue = context.Queue()
    children = [context.Process(target=_read_in_child, args=(dataset, queue)) for _ in range(2)]
    for child in children:
        child.start()
    results = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert all(result == sums * 10 for result in results)
    assert position() == before
    assert int(dataset[3][0].astype(int).sum()) == sums[3]


def test_pickling_leaves_handle_and_cache_behind(data):
    dataset = ImageFolderDataset(data, use_labels=True, cache=True)
    expected = dataset[3]
    content = pickle.dumps(dataset)
    assert expected[0].tobytes() not in content
    copy = pickle.loads(content)
    assert copy._files._zip is None
    np.testing.assert_array_equal(copy[3][0], expected[0])
    np.testing.assert_array_equal(copy[3][1], expected[1])


def test_a_data_loader_with_workers_batches_the_data_set(data):
    dataset = ImageFolderDataset(data, use_labels=True)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=2, num_workers=1, sampler=InfiniteSampler(6, 2, shuffle=False)
    )
    images, labels = next(iter(loader))
    assert images.shape == (2, 3, 4, 4) and images.dtype == torch.uint8
    assert labels.tolist() == [[1, 0, 0], [0, 1, 0]]


# ----------------------------------------------------------------------------
# What is refused.


def test_an_unusable_path_is_named(tmp_path):
    (tmp_path / 'text.zip').write_text('no zip')
    (tmp_path / 'empty').mkdir()
    write_zip(tmp_path / 'empty.zip', {'readme.txt': b''})
    for name, message in [
        ('missing', 'no such file'),
        ('text.zip', 'complete zip'),
        ('empty', 'no images'),
        ('empty.zip', 'no images'),
    ]:
        with pytest.raises(UserError, match=message) as error:
            ImageFolderDataset(tmp_path / name)
        assert name in str(error.value)


@pytest.mark.parametrize('part', [0.3, 0.9, 0.999])
def test_a_truncated_zip_is_refused(tmp_path, files, part):
    content = write_zip(tmp_path / 'data.zip', files).read_bytes()
    (tmp_path / 'data.zip').write_bytes(content[: int(len(content) * part)])
    with pytest.raises(UserError, match='complete zip'):
        ImageFolderDataset(tmp_path / 'data.zip')


def test_a_resolution_that_differs_is_refused_with_both_sizes(data):
    with pytest.raises(UserError, match=r'4x4x3 images, not 8x8.*--resolution=8x8'):
        ImageFolderDataset(data, resolution=8)


def test_images_that_are_not_square_are_refused(tmp_path):
    path = write_zip(tmp_path / 'wide.zip', {'a.png': png(np.zeros([4, 6], np.uint8))})
    with pytest.raises(UserError, match=r'a\.png is 6x4x1, not square.*dataset_tool'):
        ImageFolderDataset(path)


@pytest.mark.parametrize('odd', [random_images(1, size=8)[0], random_images(1, channels=1)[0]])
def test_an_image_unlike_the_first_is_named_with_both_shapes(tmp_path, files, odd, monkeypatch):
    path = write_zip(tmp_path / 'data.zip', {**files, 'b/img1.png': png(odd)})
    size, channels = odd.shape[0], 3 if odd.ndim == 3 else 1
    message = rf'b/img1\.png is {size}x{size}x{channels}, but a/img0\.png is 4x4x3'
    with pytest.raises(UserError, match=message):
        ImageFolderDataset(path)
    monkeypatch.setattr(
        'data.dataset.HEADER_CHECK_LIMIT', 5
    )  # as in a data set too large to look at every header
    dataset = ImageFolderDataset(path)
    dataset[3]
    with pytest.raises(UserError, match=message):
        dataset[4]


def test_headers_beyond_the_limit_are_not_read_at_construction(tmp_path, files, monkeypatch):
    monkeypatch.setattr('data.dataset.HEADER_CHECK_LIMIT', 5)
    opened = []
    original = ImageFiles.open
    monkeypatch.setattr(ImageFiles, 'open', lambda self, name: opened.append(name) or original(self, name))
    ImageFolderDataset(write_zip(tmp_path / 'data.zip', files))
    assert opened == ['a/img0.png']


@pytest.mark.parametrize('mode', ['RGBA', 'P', 'LA', '1', '16-bit I;16', '16-bit RGB'])
def test_other_modes_are_refused_with_the_cure(tmp_path, mode):
    pixels = random_images(1)[0]
    content = {
        '16-bit I;16': lambda: png(pixels[:, :, 0].astype(np.uint16) * 257),
        '16-bit RGB': rgb16_png,
    }.get(mode, lambda: png(pixels, mode))()
    with pytest.raises(UserError, match=rf'x\.png is a {mode} image.*dataset_tool\.py'):
        ImageFolderDataset(write_zip(tmp_path / 'data.zip', {'x.png': content}))


def rgb16_png():
    """A 16-bit RGB PNG of 2x2 pixels, which Pillow reads but does not write."""
    import struct
    import zlib

    chunk = lambda kind, body: (
        struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
    )
    rows = (b'\0' + bytes(range(12))) * 2
    header = struct.pack('>IIBBBBB', 2, 2, 16, 2, 0, 0, 0)
    return (
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', header)
        + chunk(b'IDAT', zlib.compress(rows))
        + chunk(b'IEND', b'')
    )


def test_a_16_bit_image_is_refused_when_it_is_read_too(tmp_path, monkeypatch):
    monkeypatch.setattr('data.dataset.HEADER_CHECK_LIMIT', 1)
    files = {'a.png': png(random_images(1, size=2)[0]), 'b.png': rgb16_png()}
    with pytest.raises(UserError, match=r'b\.png is a 16-bit RGB image'):
        ImageFolderDataset(write_zip(tmp_path / 'data.zip', files))[1]


@pytest.mark.parametrize(
    'damage',
    [
        lambda c: b'not a png',
        lambda c: c[:60],
        lambda c: b'',
        lambda c: c[: len(c) // 2] + bytes(len(c) - len(c) // 2),
    ],
)
def test_a_corrupt_image_is_named(tmp_path, files, damage):
    files['b/img0.png'] = damage(files['b/img0.png'])
    for path in (write_folder(tmp_path / 'data', files), write_zip(tmp_path / 'data.zip', files)):
        with pytest.raises(UserError, match=r'b/img0\.png is not a readable image'):
            ImageFolderDataset(path)[3]


def test_flipped_bytes_inside_a_zip_are_noticed(tmp_path, files):
    path = write_zip(tmp_path / 'data.zip', files)
    content = path.read_bytes()
    place = content.index(files['b/img0.png']) + len(files['b/img0.png']) // 2
    path.write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
    with pytest.raises(UserError, match=r'b/img0\.png is not a readable image'):
        ImageFolderDataset(path)[3]


@pytest.mark.parametrize(
    'content, message',
    [
        (None, 'has no labels'),
        (label_json(None), 'has no labels'),
        (b'{"labels": [', 'is not {"labels"'),
        (b'[' * 100_000, 'is not {"labels"'),
        (b'[]', 'is not {"labels"'),
        (b'{}', 'is not {"labels"'),
        (label_json([['a/img0.png']]), 'is not {"labels"'),
        (label_json([[3, 3]]), 'is not {"labels"'),
        (label_json([['a/img0.png', 1]]), 'no label for 5 of 6 images, such as a/img1.png'),
        (label_json([[f'{f}/img{i}.png', -1] for f in 'ab' for i in range(3)]), 'not in'),
        (label_json([[f'{f}/img{i}.png', 10**30] for f in 'ab' for i in range(3)]), 'not in'),
        (
            label_json([[f'{f}/img{i}.png', 'cat'] for f in 'ab' for i in range(3)]),
            'labels must be all class indices',
        ),
        (
            label_json([[f'{f}/img{i}.png', True] for f in 'ab' for i in range(3)]),
            'labels must be all class indices',
        ),
        (
            label_json([[f'{f}/img{i}.png', [0] * (i + 1)] for f in 'ab' for i in range(3)]),
            'labels must be all class indices',
        ),
        (
            label_json([[f'{f}/img{i}.png', [float('nan')]] for f in 'ab' for i in range(3)]),
            'labels must be all class indices',
        ),
        (
            label_json([[f'{f}/img{i}.png', [i] if i else 0] for f in 'ab' for i in range(3)]),
            'labels must be all class indices',
        ),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, files, content, message):
    files.pop('dataset.json')
    path = write_zip(tmp_path / 'data.zip', files if content is None else {**files, 'dataset.json': content})
    assert len(ImageFolderDataset(path)) == 6
    with pytest.raises(UserError) as error:
        ImageFolderDataset(path, use_labels=True)
    assert message in str(error.value) and 'data.zip' in str(error.value)


def test_two_nested_label_files_are_ambiguous(tmp_path, files):
    content = files.pop('dataset.json')
    path = write_zip(tmp_path / 'data.zip', {**files, 'a/dataset.json': content, 'b/dataset.json': content})
    with pytest.raises(UserError, match='several label files'):
        ImageFolderDataset(path, use_labels=True)


# ----------------------------------------------------------------------------
# The sampler.


def take(sampler, count):
    return list(itertools.islice(sampler, count))


def test_every_epoch_is_another_permutation_of_the_data_set():
    stream = take(InfiniteSampler(10, 4, seed=1), 40)
    epochs = [tuple(stream[i : i + 10]) for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == 4
    assert stream == take(InfiniteSampler(10, 4, seed=1), 40) != take(InfiniteSampler(10, 4, seed=2), 40)
    assert all(type(i) is int for i in stream)


@pytest.mark.parametrize('replicas', [1, 2, 3, 6])
def test_processes_share_each_global_batch_in_contiguous_parts(replicas):
    """The stream does not depend on the number of processes, whether or not batches divide the epoch."""
    stream = take(InfiniteSampler(10, 12, seed=5), 48)
    shares = [
        take(InfiniteSampler(10, 12, rank=r, num_replicas=replicas, seed=5), 48 // replicas)
        for r in range(replicas)
    ]
    size = 12 // replicas
    joined = [i for k in range(4) for share in shares for i in share[k * size : (k + 1) * size]]
    assert joined == stream


@pytest.mark.parametrize('start', [4, 10, 12, 1000])
def test_a_resumed_stream_goes_on_where_it_stopped(start):
    assert (
        take(InfiniteSampler(10, 4, seed=3, start=start), 20)
        == take(InfiniteSampler(10, 4, seed=3), start + 20)[start:]
    )


def test_without_shuffling_the_order_is_that_of_the_data_set():
    assert take(InfiniteSampler(3, 2, shuffle=False, start=2), 7) == [2, 0, 1, 2, 0, 1, 2]


def test_a_far_start_costs_one_permutation_and_none_is_drawn_twice(monkeypatch):
    drawn = []
    original = InfiniteSampler.permutation
    monkeypatch.setattr(
        InfiniteSampler, 'permutation', lambda self, epoch: drawn.append(epoch) or original(self, epoch)
    )
    take(InfiniteSampler(10, 4, start=10**12 + 8), 24)
    assert drawn == [10**11, 10**11 + 1, 10**11 + 2, 10**11 + 3]


def test_a_seed_may_be_any_integer_and_a_batch_must_divide_among_processes():
    assert sorted(take(InfiniteSampler(5, 5, seed=-1), 5)) == list(range(5))
    with pytest.raises(UserError, match='does not divide among 4 processes'):
        InfiniteSampler(10, 6, num_replicas=4)
    for wrong in (dict(size=0), dict(batch_size=0), dict(start=-1), dict(rank=1)):
        with pytest.raises(ValueError):
            InfiniteSampler(**{**dict(size=10, batch_size=4), **wrong})


def test_a_missing_file_after_construction_is_a_clear_error(tmp_path, files):
    path = write_folder(tmp_path / 'data', files)
    dataset = ImageFolderDataset(path)
    pathlib.Path(path / 'a/img0.png').unlink()
    with pytest.raises(UserError, match=r'a/img0\.png is not a readable image'):
        dataset[0]


def test_memory_does_not_grow_over_epochs(tmp_path):
    """Reading a zip 20 times more leaves what Python allocates where it was, to a thousandth of what was read."""
    write_zip(
        tmp_path / 'data.zip',
        {f'{i}.png': png(pixels) for i, pixels in enumerate(random_images(50, size=64))},
    )
    dataset = ImageFolderDataset(tmp_path / 'data.zip')
    stream = iter(InfiniteSampler(len(dataset), 10, seed=0))

    def read(epochs):
        return sum(dataset[next(stream)][0].nbytes for _ in range(epochs * len(dataset)))

    tracemalloc.start()
    try:
        read(3)
        before = tracemalloc.get_traced_memory()[0]
        volume = read(20)
        assert tracemalloc.get_traced_memory()[0] - before < max(volume / 1000, 20_000)
    finally:
        tracemalloc.stop()
