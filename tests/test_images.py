"""Sources of images: folders, zips and arrays, what is refused, what is left out, and reading ahead."""

import errno
import gc
import inspect
import json
import os
import shutil
import threading
import time
import zipfile

import numpy as np
import pytest
import torch
from helpers import run_python
from PIL import Image

from benchmarks import images as benchmark
from data import arrays
from data.dataset import ImageFolderDataset
from dnnlib.util import UserError
from metrics.images import ArrayImages, open_images, prefetch

COUNT, HEIGHT, WIDTH = 12, 6, 9


def pictures(channels=3, count=COUNT, height=HEIGHT, width=WIDTH, seed=0):
    """uint8 [N, H, W, C]"""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def write(folder, pixels):
    """PNGs of the images, ten to a folder."""
    for i, image in enumerate(pixels):
        path = folder / f'{i // 10:02d}' / f'{i:06d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze()).save(path)
    return folder


def zipped(folder, path):
    with zipfile.ZipFile(path, 'w') as archive:
        for file in sorted(folder.rglob('*.*')):
            archive.write(file, file.relative_to(folder))
    return path


@pytest.fixture(scope='module')
def pixels():
    return pictures()


@pytest.fixture(scope='module')
def folder(tmp_path_factory, pixels):
    """Twelve color images, 9 wide and 6 high, in two folders."""
    return write(tmp_path_factory.mktemp('images'), pixels)


@pytest.fixture
def broken(folder, tmp_path):
    """The same, of which number 3 is cut off, 5 is no image and 7 is gray."""
    copy = shutil.copytree(folder, tmp_path / 'broken')
    (copy / '00' / '000003.png').write_bytes((folder / '00' / '000003.png').read_bytes()[:100])
    (copy / '00' / '000005.png').write_bytes(b'no image')
    Image.fromarray(pictures(1)[0, ..., 0]).save(copy / '00' / '000007.png')
    return copy


def everything(source, batch=5, workers=0):
    """[N, H, W, C] of all images that a source gives, and which they are."""
    found = list(
        source.stream([range(i, min(i + batch, len(source))) for i in range(0, len(source), batch)], workers)
    )
    return torch.cat([images for _, images, _ in found]).permute(0, 2, 3, 1).numpy(), [
        i for *_, indices in found for i in indices
    ]


def refused(path, *words, **kwargs):
    with pytest.raises(UserError) as error:
        source = open_images(path, **kwargs)
        source.batch(range(len(source)))
    message = str(error.value)
    assert '\n' not in message
    for word in (str(path), *words):
        assert word in message, message


# ----------------------------------------------------------------------------
# Folders and zips.


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('kind', ['folder', 'zip'])
def test_images_of_folders_and_zips_are_those_written(tmp_path, kind, channels):
    """Gray and color, not square, in the order of their names."""
    expected = pictures(channels)
    path = write(tmp_path / 'images', expected)
    source = open_images(path if kind == 'folder' else zipped(path, tmp_path / 'images.zip'))
    assert (len(source), source.image_shape, source.skipped) == (COUNT, [channels, HEIGHT, WIDTH], {})
    images, indices = source.batch(range(2, 11, 3))
    assert images.dtype == torch.uint8 and images.is_contiguous() and indices == [2, 5, 8]
    np.testing.assert_array_equal(images.permute(0, 2, 3, 1), expected[2:11:3])
    np.testing.assert_array_equal(everything(source)[0], expected)


def test_names_are_found_as_a_data_sets_are(tmp_path, pixels):
    """Extensions in capitals and folders in folders; no hidden files, no others."""
    for i, name in enumerate(['B.PNG', 'a/b/c.bmp', '.hidden.png', '__MACOSX/x.png', 'notes.txt']):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i]).save(path, 'bmp' if i == 1 else 'png')
    np.testing.assert_array_equal(everything(open_images(tmp_path))[0], pixels[:2])


def test_training_and_measuring_see_the_same_subset_and_pixels(tmp_path):
    """Of JPEGs too, whose pixels depend on who decodes them. The subset is that of `max_size` and `seed`."""
    for i, image in enumerate(pictures(count=20, height=16, width=16)):
        Image.fromarray(image).save(tmp_path / f'{i}.jpg', quality=60)
    for seed in (0, 7):
        dataset = ImageFolderDataset(tmp_path, max_size=8, seed=seed)
        images, _ = everything(open_images(tmp_path, num=8, seed=seed))
        np.testing.assert_array_equal(
            images, np.stack([dataset[i][0] for i in range(8)]).transpose(0, 2, 3, 1)
        )
    assert (images != everything(open_images(tmp_path, num=8, seed=1))[0]).any()


def test_too_few_images_are_counted(folder, tmp_path, pixels):
    np.save(tmp_path / 'few.npy', pixels)
    for path in (folder, tmp_path / 'few.npy'):
        assert len(open_images(path, num=COUNT)) == COUNT
        refused(path, '12 images, expected at least 13', '--num=12', num=13)


@pytest.mark.parametrize(
    'mode, kind',
    [('RGBA', 'RGBA'), ('LA', 'LA'), ('P', 'P'), ('1', '1'), ('I;16', '16-bit I;16'), ('CMYK', 'CMYK')],
)
def test_other_modes_are_refused_by_name_and_cure(tmp_path, pixels, mode, kind):
    """As training refuses them; Pillow would drop alpha, or half of the bits, in silence."""
    image = Image.new(mode, (8, 8)) if mode == 'I;16' else Image.fromarray(pixels[0]).convert(mode)
    image.save(tmp_path / ('a.jpg' if mode == 'CMYK' else 'a.png'))
    refused(tmp_path, 'a.jpg' if mode == 'CMYK' else 'a.png', f'is a {kind} image', 'dataset_tool.py')
    refused(tmp_path, 'None of the 1 images', f'is a {kind} image', skip_bad=True)


@pytest.mark.parametrize(
    'other, words',
    [
        (pictures(1)[0, ..., 0], ('z.png is 9x6 gray, but 00/000000.png is 9x6 RGB', '--skip-bad')),
        (pictures(3, height=9, width=6)[0], ('z.png is 6x9 RGB, but 00/000000.png is 9x6 RGB',)),
    ],
)
def test_images_unlike_the_first_are_refused_by_both_names(folder, tmp_path, other, words):
    copy = shutil.copytree(folder, tmp_path / 'mixed')
    Image.fromarray(other).save(copy / 'z.png')
    refused(copy, *words)


def test_a_name_twice_in_a_zip_is_refused(folder, tmp_path):
    path = zipped(folder, tmp_path / 'images.zip')
    with zipfile.ZipFile(path, 'a') as archive, pytest.warns(UserWarning):
        archive.write(folder / '00' / '000001.png', '00/000004.png')
    refused(path, 'lists 00/000004.png 2 times')


def test_what_holds_no_images_is_refused(tmp_path):
    refused(tmp_path / 'nowhere.npz', 'no such file')
    refused(tmp_path, 'holds no images')
    (tmp_path / 'junk.zip').write_bytes(b'junk')
    refused(tmp_path / 'junk.zip', 'neither a folder nor a complete zip')
    np.save(tmp_path / 'a.npy', np.zeros([4, 8, 8], np.float32))
    refused(tmp_path, 'holds latents')


# ----------------------------------------------------------------------------
# Bad images.


def test_the_first_bad_image_is_named(broken):
    source = open_images(broken)
    for workers in (0, 2):
        with pytest.raises(UserError, match=r'000003\.png is not a readable image'):
            everything(source, batch=2, workers=workers)
    with pytest.raises(UserError, match=r'000007\.png is 9x6 gray'):
        source.batch(range(7, 8))


@pytest.mark.parametrize('workers', [0, 3])
@pytest.mark.parametrize('kind', ['folder', 'zip'])
def test_bad_images_are_left_out_and_counted(broken, tmp_path, pixels, kind, workers):
    """A batch may be empty; the others keep their indices."""
    source = open_images(
        broken if kind == 'folder' else zipped(broken, tmp_path / 'broken.zip'), skip_bad=True
    )
    images, indices = everything(source, batch=1, workers=workers)
    assert indices == [i for i in range(COUNT) if i not in (3, 5, 7)] and sorted(source.skipped) == [3, 5, 7]
    np.testing.assert_array_equal(images, pixels[indices])
    for i, words in {
        3: '000003.png is not a readable image',
        5: '000005.png is not a',
        7: '000007.png is 9x6 gray',
    }.items():
        assert words in source.skipped[i]


def test_processes_that_share_the_images_leave_out_the_same(broken):
    """Each knows of its own; together they know all."""
    shares = []
    for rank in range(2):
        source = open_images(broken, skip_bad=True)
        indices = [i for k in range(2 * rank, COUNT, 4) for i in source.batch(range(k, k + 2))[1]]
        shares.append((indices, source.skipped))
    assert sorted(shares[0][0] + shares[1][0]) == [0, 1, 2, 4, 6, 8, 9, 10, 11]
    assert (sorted(shares[0][1]), sorted(shares[1][1])) == ([5], [3, 7])


def test_the_first_image_that_can_be_read_sets_the_shape(broken, tmp_path):
    for i in range(3):
        (broken / '00' / f'{i:06d}.png').write_bytes(b'')
    source = open_images(broken, skip_bad=True)
    assert source.image_shape == [3, HEIGHT, WIDTH] and everything(source)[1] == [4, 6, 8, 9, 10, 11]
    with pytest.raises(UserError, match=r'000000\.png is not a readable image'):
        open_images(broken)


def test_where_no_image_can_be_read_the_first_problem_is_told(tmp_path):
    (tmp_path / 'a.png').write_bytes(b'')
    Image.new('RGBA', (8, 8)).save(tmp_path / 'b.png')
    refused(tmp_path, 'None of the 2 images', 'a.png is not a readable image', skip_bad=True)


# ----------------------------------------------------------------------------
# Arrays.

LAYOUTS = {
    'NHWC': (lambda x: x, 3),
    'NCHW': (lambda x: x.transpose(0, 3, 1, 2), 3),
    'NHW': (lambda x: x[..., 0], 1),
    'NHW1': (lambda x: x, 1),
    'N1HW': (lambda x: x.transpose(0, 3, 1, 2), 1),
}


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('kind', ['npy', 'fortran', 'npz', 'compressed', 'NPZ'])
def test_arrays_of_every_layout_are_the_images(tmp_path, layout, kind):
    arrange, channels = LAYOUTS[layout]
    expected = pictures(channels)
    path, array = (
        tmp_path / f'images.{dict(fortran="npy", compressed="npz").get(kind, kind)}',
        arrange(expected),
    )
    with open(path, 'wb') as file:
        if path.suffix == '.npy':
            np.save(file, np.asfortranarray(array) if kind == 'fortran' else array)
        else:
            (np.savez_compressed if kind == 'compressed' else np.savez)(
                file, arr_0=array, arr_1=np.arange(COUNT)
            )
    source = open_images(path)
    assert (len(source), source.image_shape) == (COUNT, [channels, HEIGHT, WIDTH])
    images, indices = everything(source, workers=2)
    np.testing.assert_array_equal(images, expected)
    assert indices == list(range(COUNT))
    subset = np.sort(np.random.RandomState(3).permutation(COUNT)[:4])
    np.testing.assert_array_equal(everything(open_images(path, num=4, seed=3))[0], expected[subset])


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_arrays_are_mapped_and_files_stay_as_they_are(tmp_path, pixels, save):
    path = tmp_path / 'images.npz'
    save(path, labels=np.arange(COUNT), images=pixels)
    before = path.read_bytes()
    with arrays.ArchivedArrays(path, path) as archive:
        array = archive.map('images')
    assert isinstance(array, np.memmap) and (array.filename == str(path)) == (save is np.savez)
    array[:] = 0
    np.testing.assert_array_equal(everything(ArrayImages(path))[0], pixels)
    assert path.read_bytes() == before


def test_a_full_disk_is_named(tmp_path, pixels, monkeypatch):
    """A compressed array is unpacked once; that there is no room for it is no fault of the file's."""
    np.savez_compressed(tmp_path / 'a.npz', pixels)

    def full(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(arrays.shutil, 'copyfileobj', full)
    refused(tmp_path / 'a.npz', 'cannot be unpacked', 'No space left on device', 'TMPDIR')


@pytest.mark.parametrize(
    'entries, words',
    [
        (
            dict(a=np.zeros([2, 8, 8, 3], np.uint8), b=np.zeros([2, 8, 8], np.uint8)),
            ('several arrays of images (a, b)',),
        ),
        (dict(mu=np.zeros(3)), ('no array of images', 'np.savez')),
        (dict(arr_0=np.zeros([2, 8, 8, 3])), ('arr_0 holds float64', 'uint8')),
    ],
)
def test_archives_without_a_clear_array_of_images_are_refused(tmp_path, entries, words):
    np.savez(tmp_path / 'a.npz', **entries)
    refused(tmp_path / 'a.npz', *words)


@pytest.mark.parametrize(
    'shape, words',
    [
        ([2, 3, 8, 3], 'could be [N, H, W, C] or [N, C, H, W]'),
        ([2, 1, 1, 1], 'could be'),
        ([2, 8, 8, 4], 'is not [N, H, W], [N, H, W, C] or'),
        ([2, 8, 8, 2], 'is not [N, H, W], [N, H, W, C] or'),
        ([8, 8, 3], 'is not [N, H, W], [N, H, W, C] or'),
        ([8, 8], 'is not [N, H, W], [N, H, W, C] or'),
        ([2, 2, 8, 8, 3], 'is not [N, H, W], [N, H, W, C] or'),
        ([0, 8, 8, 3], 'is not [N, H, W], [N, H, W, C] or'),
    ],
)
def test_unclear_shapes_are_refused(tmp_path, shape, words):
    np.save(tmp_path / 'a.npy', np.zeros(shape, np.uint8))
    refused(tmp_path / 'a.npy', words, 'uint8 [N, H, W, 3]')


def test_damaged_arrays_are_refused(tmp_path, pixels):
    path = tmp_path / 'a.npy'
    np.save(path, pixels)
    content = path.read_bytes()
    for damaged in (content[:-1], content + b'x', content[:60], b'junk', b''):
        path.write_bytes(damaged)
        refused(path, 'not a readable .npy file')
    np.save(path, np.array([print]), allow_pickle=True)
    refused(path, 'type object', 'nothing was executed')
    np.savez(tmp_path / 'a.npz', pixels)
    (tmp_path / 'a.npz').write_bytes((tmp_path / 'a.npz').read_bytes()[:-50])
    refused(tmp_path / 'a.npz', 'not a complete .npz file')


# ----------------------------------------------------------------------------
# Fingerprints.


def test_fingerprints_change_with_the_images_and_nothing_else(folder, tmp_path, pixels):
    """Another subset, size, time or name is another one."""
    copy = shutil.copytree(folder, tmp_path / 'copy')
    assert open_images(copy).fingerprint() == open_images(copy).fingerprint()
    found = {
        open_images(copy).fingerprint(),
        open_images(copy, num=5).fingerprint(),
        open_images(copy, num=5, seed=1).fingerprint(),
    }
    image = copy / '00' / '000004.png'
    os.utime(image, ns=(0, image.stat().st_mtime_ns + 1))
    found.add(open_images(copy).fingerprint())
    image.rename(copy / '00' / '000004x.png')  # its place among the others is the same
    found.add(open_images(copy).fingerprint())
    assert len(found) == 5


def test_files_unpacked_with_equal_names_sizes_and_times_have_other_fingerprints(tmp_path):
    """As the uncompressed PNGs of two of dataset_tool.py's zips are, which all bear one date: only the inode's time tells them apart."""
    fingerprints = set()
    for seed, name in enumerate(('a', 'b')):
        image = tmp_path / name / '0.png'
        image.parent.mkdir()
        Image.fromarray(pictures(seed=seed)[0]).save(image, compress_level=0)
        time.sleep(0.02)  # clocks of file systems tick every few milliseconds
        os.utime(image, (0, 0))
        fingerprints.add((open_images(image.parent).fingerprint(), image.stat().st_size))
    assert len(fingerprints) == 2 and len({size for _, size in fingerprints}) == 1


def test_fingerprints_of_zips_are_of_their_contents(folder, tmp_path):
    """Not of their times, which dataset_tool.py does not keep."""
    a = zipped(folder, tmp_path / 'a.zip')
    b = shutil.copyfile(a, tmp_path / 'b.zip')
    os.utime(b, (0, 0))
    assert open_images(a).fingerprint() == open_images(b).fingerprint() != open_images(a, num=3).fingerprint()
    copy = write(tmp_path / 'other', pictures(seed=1))
    assert open_images(zipped(copy, b)).fingerprint() != open_images(a).fingerprint()


def test_fingerprints_of_arrays_are_of_size_time_and_subset(tmp_path, pixels):
    path = tmp_path / 'a.npy'
    np.save(path, pixels)
    found = [open_images(path).fingerprint(), open_images(path, num=3).fingerprint()]
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    found.append(open_images(path).fingerprint())
    assert len(set(found)) == 3 and open_images(path).fingerprint() == found[2]


# ----------------------------------------------------------------------------
# Reading ahead.


class Recorder:
    """A source that notes which parts are read, and by which thread; part 5 fails."""

    def __init__(self):
        self.read, self.threads, self.lock = [], set(), threading.Lock()

    def batch(self, indices):
        with self.lock:
            self.read.append(indices.start)
            self.threads.add(threading.get_ident())
        time.sleep(0.002)
        if indices.start == 5:
            raise UserError('number 5 is bad')
        return torch.tensor(list(indices)), list(indices)


def threads():
    gc.collect()
    return threading.active_count()


@pytest.mark.parametrize('workers', [0, 1, 4])
def test_batches_come_in_order_and_an_error_in_its_turn(workers):
    source, before, found = Recorder(), threads(), []
    with pytest.raises(UserError, match='number 5 is bad'):
        for part, images, indices in prefetch(source, [range(i, i + 1) for i in range(40)], workers):
            assert images.tolist() == indices == list(part)
            found += indices
    assert found == list(range(5)) and threads() == before
    assert (threading.get_ident() in source.threads) == (workers == 0)


def test_no_more_is_read_ahead_than_told_and_closing_ends_the_threads():
    """Two workers, two batches each: four besides the one in use."""
    source, before = Recorder(), threads()
    stream = prefetch(source, [range(i, i + 1) for i in range(10, 60)], workers=2)
    assert source.read == []
    next(stream)
    time.sleep(0.1)
    assert 1 < len(source.read) <= 5 and threads() == before + 2
    stream.close()
    assert threads() == before and len(source.read) <= 5


# ----------------------------------------------------------------------------
# The benchmark.


def test_the_benchmarks_whole_way_takes_every_image_through_every_part(tmp_path, monkeypatch):
    """`all` is decoding, resizing and statistics, of each image once: which is why it takes longer than each."""
    path = zipped(write(tmp_path / 'images', pictures(count=10, height=8, width=8)), tmp_path / 'images.zip')
    seen = []
    monkeypatch.setattr(benchmark, 'BATCH', 4)
    stats = benchmark.pipeline(
        open_images(path), 0, lambda images: seen.append(len(images)) or benchmark.resize(images)
    )
    assert seen == [4, 4, 2] and stats.count == 10
    assert inspect.signature(benchmark.pipeline).parameters['prepare'].default is benchmark.resize


@pytest.mark.slow
def test_the_benchmark_times_every_part_and_measures_memory():
    done = json.loads(
        run_python(
            'benchmarks/images.py', '--images=32', '--rounds=3', '--memory=300', '--workers=2', '--json'
        ).stdout
    )
    assert list(done['microseconds']) == ['64', '256'] and list(done['peaks']) == ['60', '300']
    for parts in done['microseconds'].values():
        assert (
            list(parts) == ['decode', 'threads', 'processes', 'resize', 'statistics', 'all']
            and min(parts.values()) > 0
        )
    assert all(peak > 0 for peak in done['peaks'].values())
