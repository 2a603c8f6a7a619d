"""data/prefetcher.py: batches ahead of use, and how long they are waited for."""

import itertools
import os
import signal
import time

import numpy as np
import pytest
import torch
from pictures import png, random_images, write_zip

from data.dataset import ImageFolderDataset, InfiniteSampler
from data.prefetcher import PREFETCH, Prefetcher
from dnnlib import UserError
from dnnlib.processes import how_ended
from dnnlib.util import atomic_write

CPU = torch.device('cpu')


class Slow(torch.utils.data.Dataset):
    """Item i is (i, no label); it takes a while, and leaves a file that tells that it was loaded."""

    def __init__(self, folder, seconds):
        self.folder, self.seconds = folder, seconds

    def __getitem__(self, i):
        time.sleep(self.seconds)
        (self.folder / str(i)).touch()
        return np.array([i]), np.zeros(0, np.float32)


def test_time_that_is_waited_is_counted_once(tmp_path):
    """Two items of 50 ms a batch; without workers all of it is waited for."""
    feed = Prefetcher(Slow(tmp_path, 0.05), itertools.count(), 2, 0, CPU)
    for _ in range(2):
        next(feed)
    assert feed.data_wait() >= 0.2
    assert feed.data_wait() == 0
    next(feed)
    assert feed.data_wait() >= 0.1


def test_workers_load_ahead_without_being_asked(tmp_path):
    feed = Prefetcher(Slow(tmp_path, 0), itertools.count(), 3, 1, CPU)
    assert next(feed)[0].flatten().tolist() == [0, 1, 2]
    end = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 3 * (1 + PREFETCH):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert next(feed)[0].flatten().tolist() == [3, 4, 5]


@pytest.mark.parametrize('workers', [0, 1])
def test_pixels_stay_bytes_on_the_way(tmp_path, workers):
    """A quarter of the traffic of float32; they become numbers in [-1, 1] where the network is."""
    pixels = random_images(4)
    path = write_zip(tmp_path / 'data.zip', {f'{i}.png': png(p) for i, p in enumerate(pixels)})
    dataset = ImageFolderDataset(path)
    feed = Prefetcher(dataset, InfiniteSampler(4, 4, shuffle=False), 4, workers, CPU)
    images, labels = next(feed)
    assert images.dtype == torch.uint8 and labels.shape == (4, 0)
    assert np.array_equal(images.numpy(), pixels.transpose(0, 3, 1, 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_batches_for_a_gpu_are_in_pinned_memory(tmp_path):
    images, _ = next(Prefetcher(Slow(tmp_path, 0), itertools.count(), 3, 1, torch.device('cuda')))
    assert images.is_pinned()


@pytest.mark.parametrize('workers', [0, 1])
def test_an_unreadable_image_is_one_line(tmp_path, workers, monkeypatch):
    monkeypatch.setattr('data.dataset.HEADER_CHECK_LIMIT', 1)
    path = write_zip(tmp_path / 'data.zip', {'0.png': png(random_images(1)[0]), '1.png': b'no png'})
    feed = Prefetcher(ImageFolderDataset(path), InfiniteSampler(2, 2, shuffle=False), 2, workers, CPU)
    with pytest.raises(UserError) as error:
        next(feed)
    assert str(error.value).startswith(f'{path}: 1.png is not a readable image') and '\n' not in str(
        error.value
    )


def killed_worker(tmp_path, number=signal.SIGKILL):
    """A feed whose only worker is gone, with batches that it had made."""
    feed = Prefetcher(Slow(tmp_path, 0), itertools.count(), 1, 1, CPU)
    next(feed)
    (worker,) = feed._workers
    os.kill(worker.pid, number)
    worker.join()
    return feed


def batches_until_the_end(feed):
    for _ in range(100):
        next(feed)


def test_a_worker_that_was_killed_is_told_of_by_the_batch_that_is_missing(tmp_path):
    with pytest.raises(
        UserError, match=r'process died \(killed by SIGBUS, as when /dev/shm.*--workers.*--cache=False'
    ):
        batches_until_the_end(killed_worker(tmp_path, signal.SIGBUS))


def test_the_death_of_a_worker_interrupts_nothing(tmp_path):
    """PyTorch would raise here, in whatever is done at the moment, such as the writing of a state."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # earlier tests of this process may have left PyTorch's
    with atomic_write(tmp_path / 'state') as file:
        file.write(b'one half')
        feed = killed_worker(tmp_path)
        time.sleep(0.2)
        file.write(b', the other')
    assert (tmp_path / 'state').read_bytes() == b'one half, the other' and signal.getsignal(
        signal.SIGCHLD
    ) == signal.SIG_DFL
    with pytest.raises(UserError, match='SIGKILL'):
        batches_until_the_end(feed)


class Broken(Slow):
    def __getitem__(self, i):
        raise RuntimeError('a bug of ours')


def test_an_error_of_the_program_itself_is_not_taken_for_a_death(tmp_path):
    with pytest.raises(RuntimeError, match='a bug of ours'):
        next(Prefetcher(Broken(tmp_path, 0), itertools.count(), 1, 1, CPU))


def test_how_a_process_has_ended_is_said_in_words():
    assert [how_ended(status) for status in (0, 3, -15, -40)] == [
        'exit status 0',
        'exit status 3',
        'killed by SIGTERM',
        'killed by signal 40',
    ]
