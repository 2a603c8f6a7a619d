"""Images per second from a zip to a detector, without the detector, and whether memory grows with their
number.

PNGs, crops of scikit-learn's two photographs, are decoded, resized to Inception's 299x299, and projected at
random to 2048 features, which go into the FP64 statistics of fid.py. `decode` is decoding only, in one
thread; `threads` and `processes` decode in `--workers` threads, as fid.py does, or processes of a
`torch.utils.data.DataLoader`; `all` is the entire pipeline with threads. Measured in turns; numbers are
minima over rounds and include the start of workers.

`peak` is resident memory of a process above what it had before it opened images of 32x32 pixels, which are
not resized to save time.
"""

from __future__ import annotations

import functools
import io
import json
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.checkpoint import forget_peak, resident
from benchmarks.common import apart, block, machine, rounds_option, table
from dnnlib import cli
from metrics.images import open_images
from metrics.statistics import FeatureStats

DIM, INPUT, POOLED = 2048, 299, 16
BATCH = 32
RESOLUTIONS = {64: 8, 256: 1}  # {resolution: factor for the number of images}
MEMORY_RESOLUTION, DISTINCT = 32, 500


def write_zip(path: Path, resolution: int, count: int) -> Path:
    """Write a zip of `count` PNGs, of which at most `DISTINCT` differ."""
    from sklearn.datasets import load_sample_images

    rng, photographs = np.random.default_rng(0), load_sample_images().images
    files = []
    for i in range(min(count, DISTINCT)):
        photograph = photographs[i % len(photographs)]
        # A crop of 256x256 anywhere, averaged down to the resolution.
        top, left = (rng.integers(side - 256) for side in photograph.shape[:2])
        crop = Image.fromarray(photograph[top : top + 256, left : left + 256]).resize(
            [resolution] * 2, Image.Resampling.BOX
        )
        crop.save(file := io.BytesIO(), 'png')
        files.append(file.getvalue())
    with zipfile.ZipFile(path, 'w') as archive:
        for i in range(count):
            archive.writestr(f'{i:06d}.png', files[i % len(files)])
    return path


@functools.cache
def projection() -> torch.Tensor:
    return torch.randn(3 * POOLED**2, DIM, generator=torch.Generator().manual_seed(0))


def resize(images: torch.Tensor) -> torch.Tensor:
    """[N, 3, 299, 299] float32"""
    return torch.nn.functional.interpolate(images.float(), [INPUT, INPUT], mode='bilinear')


def features(images: torch.Tensor) -> torch.Tensor:
    """[N, 2048] random projections of images averaged to 16x16."""
    return torch.nn.functional.adaptive_avg_pool2d(images, POOLED).flatten(1) @ projection()


def batches_of(source) -> list[range]:
    return [range(start, min(start + BATCH, len(source))) for start in range(0, len(source), BATCH)]


def pipeline(source, workers: int, prepare=resize) -> FeatureStats:
    stats = FeatureStats(DIM)
    for _, images, _ in source.stream(batches_of(source), workers):
        stats.append(features(prepare(images)))
    return stats


class Batches(torch.utils.data.Dataset):
    """The batches of a source, for a DataLoader."""

    def __init__(self, source):
        self.source, self.batches = source, batches_of(source)

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, k):
        return self.source.batch(self.batches[k])[0]


def in_processes(source, workers: int) -> int:
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'This DataLoader will create')  # more processes than cores
        return sum(
            len(images)
            for images in torch.utils.data.DataLoader(Batches(source), batch_size=None, num_workers=workers)
        )


def in_threads(source, workers: int) -> int:
    return sum(len(images) for _, images, _ in source.stream(batches_of(source), workers))


def time_parts(path: Path, workers: int, rounds: int) -> dict[str, float]:
    """Microseconds per image of every part, the least over rounds."""
    # Parts that take short are repeated, for a measurable time.
    source = open_images(path)
    batch, _ = source.batch(range(BATCH))
    stats, small, large = FeatureStats(DIM), resize(batch), BATCH * 8
    vectors = features(small)
    tasks = {
        'decode': (lambda: in_threads(source, 0), len(source)),
        'threads': (lambda: in_threads(source, workers), len(source)),
        'processes': (lambda: in_processes(source, workers), len(source)),
        'resize': (lambda: [resize(batch) for _ in range(8)], large),
        'statistics': (lambda: [stats.append(vectors) for _ in range(8)], large),
        'all': (lambda: pipeline(source, workers), len(source)),
    }

    # In turns.
    least = dict.fromkeys(tasks, float('inf'))
    for _ in range(rounds):
        for name, (task, images) in tasks.items():
            start = time.perf_counter()
            task()
            least[name] = min(least[name], (time.perf_counter() - start) / images * 1e6)
    return least


def peak_memory(path: Path, count: int, workers: int) -> int:
    """Peak memory of reading `count` images in this process, in bytes above the memory before."""
    pipeline(
        open_images(path, num=BATCH), workers, torch.Tensor.float
    )  # allocates what stays after the first use
    before = forget_peak()
    stats = pipeline(open_images(path, num=count), workers, torch.Tensor.float)
    if stats.count != count or not np.isfinite(stats.sigma).all():
        raise RuntimeError('the statistics are not those of all images')
    return resident(peak=True) - before


def peak_memory_apart(path: Path, count: int, workers: int) -> int:
    return apart(__file__, f'--measure={count}', f'--folder={path.parent}', f'--workers={workers}')


@click.command(cls=cli.Command)
@cli.option(
    '--images',
    metavar='INT',
    type=click.IntRange(min=BATCH),
    default=500,
    show_default=True,
    help='Number of 256x256 images per timing; of 64x64 images, 8 times as many.',
)
@rounds_option('Number of repetitions.')
@cli.option(
    '--workers',
    metavar='INT',
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help='Number of decoding threads or processes.',
)
@cli.option(
    '--memory',
    metavar='INT',
    type=click.IntRange(min=1),
    default=50_000,
    show_default=True,
    help='Number of images whose peak memory is compared with that of a fifth of them.',
)
@cli.option(
    '--folder',
    metavar='DIR',
    type=cli.PATH,
    help='Folder to write the images in, 200 MB by default.  [default: a temporary folder]',
)
@cli.option('--measure', metavar='INT', type=int, hidden=True)
@cli.option('--json', 'as_json', is_flag=True, help='Print one JSON object.')
def main(images, rounds, workers, memory, folder, measure, as_json):
    """Measure time and memory of reading images for a detector."""
    if measure is not None:
        click.echo(peak_memory(Path(folder) / 'memory.zip', measure, workers))
        return

    # Measure times, then memory in processes of their own.
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        temporary = Path(temporary)
        times = {
            resolution: time_parts(
                write_zip(temporary / f'{resolution}.zip', resolution, images * factor), workers, rounds
            )
            for resolution, factor in RESOLUTIONS.items()
        }
        path = write_zip(temporary / 'memory.zip', MEMORY_RESOLUTION, memory)
        peaks = {count: peak_memory_apart(path, count, workers) for count in (-(-memory // 5), memory)}
    if as_json:
        click.echo(json.dumps(dict(device=machine(), workers=workers, microseconds=times, peaks=peaks)))
        return

    # Print the block.
    cells = []
    for resolution, parts in times.items():
        ms = {name: f'{value / 1e3:.2f} ms' for name, value in parts.items()}
        cells.append(
            [
                f'{resolution}x{resolution}',
                ms['decode'],
                ms['threads'],
                ms['processes'],
                f'{parts["threads"] / parts["processes"]:.2f}',
                ms['resize'],
                ms['statistics'],
                ms['all'],
                f'{1e6 / parts["all"]:.0f}',
            ]
        )
    click.echo(
        block(
            'Images on their way to a detector',
            f'Milliseconds per image, least of {rounds} rounds; decoding by {workers} threads or processes '
            f'includes their start. `all` is decode, resize to {INPUT}x{INPUT} and FP64 statistics of {DIM} '
            'features, without the network. Memory is the peak above what a process had before it opened '
            'the images.',
            table(
                [
                    'PNGs',
                    'decode',
                    'threads',
                    'processes',
                    'threads / processes',
                    'resize',
                    'statistics',
                    'all',
                    'images/s',
                ],
                cells,
            ),
            table(
                ['images', 'peak'], [[f'{count:,}', f'{peak / 1e6:.0f} MB'] for count, peak in peaks.items()]
            ),
        )
    )


if __name__ == '__main__':
    main()
