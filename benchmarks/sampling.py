"""Images per second of 8-step student sampling to PNG files: a plain loop against generate.py's own, and how much of it is the network's time.

`plain loop` draws a batch by the eager FP32 network, encodes and writes it, and goes on to the next. `generate.py` is `generate.generate_all`, whose
worker processes encode and write while the network is at work. `torchrun generate.py` is the same in as many processes as there are CPU cores, with a
thread each. `network alone` asks for the same evaluations and writes nothing, `writing alone` encodes and writes, in one process; the network sets
the pace where it is slower than the workers together. Weights are random, so images are noise, which PNG does not compress: files are larger than
those of photographs. Start-up is left out (benchmarks/startup.py).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import click
import numpy as np
import torch

if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import generate
from benchmarks.common import NOT_MEASURED, block, in_turns, median_ratio, rounds_option, table
from benchmarks.sizes import SIZES
from dnnlib import cli
from dnnlib.util import usable_cores
from sampling import generation, writers
from torch_utils import distributed
from training import execution
from training.consistency_ops import student_grid

STEPS = 8
ALONE, WRITING, PLAIN, OVERLAPPED = 'network alone', 'writing alone', 'plain loop', 'generate.py'
FASTER = {
    'generate.py, --channels_last': dict(channels_last=True),
    'generate.py, --compile': dict(compiled=True),
    'generate.py, --precision=bf16': dict(precision='bf16'),
    'generate.py, --precision=bf16 --compile': dict(precision='bf16', compiled=True),
}
SHARED = {'torchrun generate.py': {}, 'torchrun generate.py, --compile': dict(compiled=True)}
IMAGES = {'demo': (2048, 64), 'cifar10-ddpmpp': (8, 4), 'imagenet64-adm': (2, 1)}  # and their batch, on a CPU
GPU_IMAGES, GPU_BATCH = 2048, 128
WRITTEN = 256  # images at least


def build(size: str, device: torch.device, precision: str = 'fp32', **ways) -> torch.nn.Module:
    """A student of 8 steps, with the metadata that a snapshot has."""
    torch.manual_seed(0)
    net = execution.in_precision(SIZES[size].build().to(device).eval().requires_grad_(False), precision)
    execution.run_with(net, cuda_graphs=True, **ways)
    net.metadata = dict(sigmas=student_grid(STEPS, 0.002, 80.0, 7.0).tolist())
    return net


class Runs:
    """Ways of sampling `images` images in batches, each into a folder of its own below `folder`, which is removed again."""

    def __init__(self, images: int, batch: int, folder: Path):
        self.seeds, self.batch, self.folder = list(range(images)), batch, folder

    def alone(self, net: torch.nn.Module) -> None:
        for seeds in generation.split_batches(self.seeds, self.batch):
            last = generation.generate_checked(net, seeds, steps=STEPS)
        last.finite.cpu()

    def writing(self, images: np.ndarray) -> None:
        writers.write_images(
            images, [str(self.folder / 'writing' / f'{i:06d}.png') for i in range(len(images))]
        )
        self._tidy('writing', len(images))

    def plain(self, net: torch.nn.Module) -> None:
        for seeds in generation.split_batches(self.seeds, self.batch):
            paths = [str(self.folder / 'plain' / f'{seed:06d}.png') for seed in seeds]
            generation.save_images(generation.generate_batch(net, seeds, steps=STEPS), paths)
        self._tidy('plain', len(self.seeds))

    def overlapped(self, net: torch.nn.Module, pool: writers.WriterPool) -> None:
        self.part_of_overlapped(net, pool)
        self._tidy('overlapped', len(self.seeds))

    def part_of_overlapped(self, net: torch.nn.Module, pool: writers.WriterPool) -> None:
        """All of it where there is one process, else this one's share."""
        arguments = dict(choose_labels=generation.uniform_labels, solver='student', steps=STEPS)
        generate.generate_all(
            net,
            self.seeds,
            self.batch,
            writers.FolderDestination(str(self.folder / 'overlapped')),
            pool,
            False,
            arguments,
        )

    def shared(self, group: Group) -> None:
        group.run()
        self._tidy('overlapped', len(self.seeds))

    def _tidy(self, name: str, count: int) -> None:
        found = sum(1 for _ in (self.folder / name).glob('*.png'))
        if found != count:
            raise RuntimeError(f'{found} of {count} images were written')
        shutil.rmtree(self.folder / name)


class Group:
    """Processes that have generate.py's work among them, as torchrun starts them, each with one thread; they wait for `run`. A context."""

    def __init__(self, count: int, *arguments):
        context = multiprocessing.get_context('spawn')
        with socket.socket() as free:
            free.bind(('localhost', 0))
            place = dict(
                WORLD_SIZE=str(count), MASTER_ADDR='localhost', MASTER_PORT=str(free.getsockname()[1])
            )
        self._pipes, theirs = zip(*(context.Pipe() for _ in range(count)))
        self._processes = [
            context.Process(
                target=take_part, args=(dict(place, RANK=str(rank), LOCAL_RANK=str(rank)), pipe, *arguments)
            )
            for rank, pipe in enumerate(theirs)
        ]
        for process, pipe in zip(self._processes, theirs):
            process.start()
            pipe.close()  # theirs alone now, so that its end is seen

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_):
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join()

    def run(self) -> None:
        """Have all images made. Raises: EOFError where a process has died, whose own message says why."""
        for pipe in self._pipes:
            pipe.send('go')
        for pipe in self._pipes:
            pipe.recv()


def take_part(place: dict[str, str], pipe, size: str, runs: Runs, how: dict) -> None:
    """One process of a group."""
    os.environ.update(place)
    torch.set_num_threads(1)
    distributed.init()
    net = build(size, torch.device('cpu'), **how)
    with writers.WriterPool(0) as pool, contextlib.suppress(EOFError):  # of a group that has come to its end
        while pipe.recv():
            runs.part_of_overlapped(net, pool)
            pipe.send('done')


def images_to_write(size: str, images: int) -> np.ndarray:
    """Noise, uint8 [N, H, W, C]; enough of it to time."""
    of = SIZES[size]
    return np.random.default_rng(0).integers(
        256, size=[max(images, WRITTEN), of.resolution, of.resolution, of.channels], dtype=np.uint8
    )


def measure(
    size: str, images: int, batch: int, rounds: int, workers: int, ways: dict[str, dict], device: torch.device
) -> dict[str, list[float]]:
    """Seconds an image in every round, by row, measured in turns; each is run once before, so that it is compiled and its workers are there."""
    net, pixels = build(size, device), images_to_write(size, images)
    with (
        tempfile.TemporaryDirectory() as folder,
        writers.WriterPool(workers) as pool,
        contextlib.ExitStack() as groups,
    ):
        runs = Runs(images, batch, Path(folder))
        calls = {
            ALONE: lambda: runs.alone(net),
            WRITING: lambda: runs.writing(pixels),
            PLAIN: lambda: runs.plain(net),
            OVERLAPPED: lambda: runs.overlapped(net, pool),
        }
        for name, how in ways.items():
            if name in SHARED:
                group = groups.enter_context(Group(usable_cores(), size, runs, how))
                calls[name] = functools.partial(runs.shared, group)
            else:
                calls[name] = functools.partial(runs.overlapped, build(size, device, **how), pool)
        in_turns(calls, 1)
        return {
            name: [time / (len(pixels) if name == WRITING else images) for time in times]
            for name, times in in_turns(calls, rounds).items()
        }


@click.command(cls=cli.Command)
@cli.option('--size', type=click.Choice(list(SIZES)), default='demo', show_default=True, help='Network.')
@cli.option(
    '--images',
    metavar='INT',
    type=click.IntRange(min=1),
    help="To draw in every round.  [default: the size's own]",
)
@cli.option(
    '--batch', metavar='INT', type=click.IntRange(min=1), help="Images at a time.  [default: the size's own]"
)
@rounds_option('Times that each is timed.', default=5)
@cli.option(
    '--workers',
    metavar='INT',
    type=click.IntRange(min=0),
    help="Processes that write.  [default: generate.py's own]",
)
@cli.option('--eager', is_flag=True, help='Leave compilation out.')
@cli.option('--compile-large', is_flag=True, help='Compile large networks on a CPU too.')
def main(size, images, batch, rounds, workers, eager, compile_large):
    """Time 8-step student sampling to files."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    own_images, own_batch = (GPU_IMAGES, GPU_BATCH) if device.type == 'cuda' else IMAGES[size]
    images, batch, workers = (
        images or own_images,
        batch or own_batch,
        writers.default_workers() if workers is None else workers,
    )
    distributed.init()
    compiles = not eager and (device.type == 'cuda' or compile_large or not SIZES[size].large)
    shared = SHARED if device.type == 'cpu' and usable_cores() > 1 else {}  # of GPUs there is one
    ways = {name: how for name, how in (FASTER | shared).items() if compiles or not how.get('compiled')}
    seconds = measure(size, images, batch, rounds, workers, ways, device)
    rows = []
    for name in itertools.chain((ALONE, WRITING, PLAIN, OVERLAPPED), FASTER, SHARED):
        if name not in seconds:
            rows.append([name] + [NOT_MEASURED] * 4)
            continue
        times = seconds[name]
        if name == WRITING:  # which is no way of sampling
            rows.append([name, f'{1 / min(times):.4g}', '', '', ''])
            continue
        rows.append(
            [
                name,
                f'{1 / min(times):.4g}',
                f'{min(seconds[PLAIN]) / min(times):.3f}',
                f'{median_ratio(seconds[PLAIN], times):.3f}',
                f'{min(seconds[ALONE]) / min(times):.1%}',
            ]
        )
    click.echo(
        block(
            f'Sampling in {STEPS} evaluations: {SIZES[size].title}',
            f'{images} images in batches of {batch}, written as PNG files, {workers} process(es) writing; least of {rounds} rounds in turns, after one '
            f'that is not counted. `{PLAIN}` draws a batch (eager FP32), encodes and writes it, and goes on; `{OVERLAPPED}` is what generate.py does '
            f'once its network is loaded, and `torchrun {OVERLAPPED}` what it does as {usable_cores()} processes, a core and a thread each. '
            f'`{ALONE}` writes nothing, and is what the last column compares with; `{WRITING}` is a process that encodes and writes noise of that size. '
            'Ratios are over the plain loop.',
            table(
                [
                    '',
                    'images/s',
                    'times faster, least',
                    'times faster, median',
                    "of the eager network's speed",
                ],
                rows,
            ),
        )
    )


if __name__ == '__main__':
    main()
