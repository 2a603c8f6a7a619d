"""sampling/writers.py: processes that write while another one generates."""

import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

from dnnlib import UserError
from sampling import writers
from sampling.writers import AHEAD, WriterPool


def write_once_there_is(signal_file, path):
    """What a slow disk is in these tests: it takes a file when another one is there."""
    while not signal_file.exists():
        time.sleep(0.01)
    path.touch()


def fail(message):
    raise UserError(message)


def test_the_process_goes_on_while_workers_write(tmp_path):
    """The file cannot appear before `submit` has come back."""
    with WriterPool(1) as pool:
        pool.submit(write_once_there_is, tmp_path / 'go', tmp_path / 'written')
        assert not (tmp_path / 'written').exists()
        (tmp_path / 'go').touch()
    assert (tmp_path / 'written').exists()


def test_no_more_work_waits_than_said(tmp_path):
    """With nothing written, one call more than `AHEAD` waits: someone else has to say go."""
    with WriterPool(1) as pool:
        for i in range(AHEAD):
            pool.submit(write_once_there_is, tmp_path / 'go', tmp_path / str(i))
        starter = subprocess.Popen(
            [
                sys.executable,
                '-c',
                f'import time, pathlib; time.sleep(0.5); pathlib.Path({str(tmp_path / "go")!r}).touch()',
            ]
        )
        for i in range(AHEAD, 20):
            pool.submit(write_once_there_is, tmp_path / 'go', tmp_path / str(i))
            assert (tmp_path / 'go').exists() and len(pool._waiting) == AHEAD
    assert starter.wait(timeout=60) == 0 and all((tmp_path / str(i)).exists() for i in range(20))


def test_more_parts_than_files_may_be_open_become_one_array(tmp_path):
    """50,000 images are thousands of parts, and 1,024 open files a usual limit."""
    images = np.random.default_rng(0).integers(0, 256, [120, 4, 4, 3], dtype=np.uint8)
    parts = [str(tmp_path / f'{i:09d}') for i in range(0, 120, 3)]
    for i, part in enumerate(parts):
        writers.write_array_part(images[3 * i : 3 * i + 3], part)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir('/proc/self/fd'))) + 8, limits[1]))
    try:
        writers.join_arrays(parts, range(120), str(tmp_path / 'a.npz'))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with np.load(tmp_path / 'a.npz') as file:
        assert np.array_equal(file['arr_0'], images) and file['arr_1'].tolist() == list(range(120))


@pytest.mark.parametrize('workers', [0, 1])
def test_an_error_is_raised_here(workers):
    with pytest.raises(UserError, match='no space'), WriterPool(workers) as pool:
        pool.submit(fail, 'no space')


def test_a_worker_that_dies_is_told_of():
    with pytest.raises(UserError, match=r'has died .*--workers=0'), WriterPool(1) as pool:
        pool.submit(os.kill, os.getpid(), 0)  # which does nothing: the pool works
        pool.finish()
        os.kill(next(iter(pool._pool._processes)), signal.SIGKILL)
        for _ in range(100):
            pool.submit(time.sleep, 0.01)


@pytest.mark.parametrize('workers, count, parts', [(0, 5, [5]), (1, 5, [5]), (2, 5, [3, 2]), (4, 2, [1, 1])])
def test_a_batch_is_shared_by_all_workers(workers, count, parts):
    with WriterPool(0) as pool:
        pool.workers = workers
        shares = pool.shares(count)
    assert [len(range(count)[share]) for share in shares] == parts
    assert [i for share in shares for i in range(count)[share]] == list(range(count))


def test_gray_and_color_images_are_written_as_they_are(tmp_path):
    for channels, mode in ((1, 'L'), (3, 'RGB')):
        images = np.random.default_rng(0).integers(0, 256, [2, 4, 4, channels], dtype=np.uint8)
        writers.write_images(images, [str(tmp_path / mode / f'{i}.png') for i in range(2)])
        for i in range(2):
            with Image.open(tmp_path / mode / f'{i}.png') as image:
                assert image.mode == mode and np.array_equal(np.atleast_3d(np.asarray(image)), images[i])


def test_workers_do_without_torch():
    """It takes seconds to import, and a GPU may come with it."""
    code = (
        'import sys, sampling.writers, dataset_tool; print(*{"torch", "scipy", "sklearn"} & set(sys.modules))'
    )
    assert (
        subprocess.run(
            [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        == ''
    )
