"""Images per second of 8-step student sampling to PNG files, by a plain loop and by generate.py, and the
network's share of the time.

`plain loop` samples a batch by the eager FP32 network, encodes and writes it, then starts the next.
`generate.py` is `generate.generate_all`, whose worker processes encode and write while the network computes.
`torchrun generate.py` is the same in one process per CPU core, each with one thread. `network alone` samples
without writing, `writing alone` encodes and writes in one process; the network is the bottleneck if it is
slower than all workers together. Weights are random, so that images are noise, which PNG does not compress:
files are larger than those of photographs. Start-up is not included (see benchmarks/startup.py).
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
IMAGES = {'demo': (2048, 64), 'cifar10-ddpmpp': (8, 4), 'imagenet64-adm': (2, 1)}  # images, batch; on a CPU
GPU_IMAGES, GPU_BATCH = 2048, 128
WRITTEN = 256  # smallest number of images to time writing with


def build(size: str, device: torch.device, precision: str = 'fp32', **ways) -> torch.nn.Module:
    """An 8-step student with the metadata of a snapshot."""
    torch.manual_seed(0)
    net = execution.in_precision(SIZES[size].build().to(device).eval().requires_grad_(False), precision)
    execution.run_with(net, cuda_graphs=True, **ways)
    net.metadata = dict(sigmas=student_grid(STEPS, 0.002, 80.0, 7.0).tolist())
    return net


class Runs:
    """Ways to sample images in batches, each into its own subfolder of `folder`, removed afterwards."""

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
        self.share_of_overlapped(net, pool)
        self._tidy('overlapped', len(self.seeds))

    def share_of_overlapped(self, net: torch.nn.Module, pool: writers.WriterPool) -> None:
        """This process's share of the images."""
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
        """Check that all images were written, and remove them."""
        found = sum(1 for _ in (self.folder / name).glob('*.png'))
        if found != count:
            raise RuntimeError(f'{found} of {count} images were written')
        shutil.rmtree(self.folder / name)


class Group:
    """Processes that share the work of generate.py as under torchrun, with one thread each; a context."""

    def __init__(self, count: int, *arguments):
        # Addresses as torchrun sets them; a pipe to each process tells it to start and ends it.
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
            pipe.close()  # so that the other end is notified when the process ends

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_):
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join()

    def run(self) -> None:
        """Generate all images. Raises: EOFError if a process has died, after its own error message."""
        for pipe in self._pipes:
            pipe.send('go')
        for pipe in self._pipes:
            pipe.recv()


def take_part(place: dict[str, str], pipe, size: str, runs: Runs, how: dict) -> None:
    """Main function of a process of a group."""
    os.environ.update(place)
    torch.set_num_threads(1)
    distributed.init()
    net = build(size, torch.device('cpu'), **how)
    with writers.WriterPool(0) as pool, contextlib.suppress(EOFError):  # when the group ends
        while pipe.recv():
            runs.share_of_overlapped(net, pool)
            pipe.send('done')


def images_to_write(size: str, images: int) -> np.ndarray:
    """Noise, uint8 [N, H, W, C], in a number large enough to time."""
    of = SIZES[size]
    return np.random.default_rng(0).integers(
        256, size=[max(images, WRITTEN), of.resolution, of.resolution, of.channels], dtype=np.uint8
    )


def measure(
    size: str, images: int, batch: int, rounds: int, workers: int, ways: dict[str, dict], device: torch.device
) -> dict[str, list[float]]:
    """Seconds per image in every round, by row, in turns; the first round compiles and is not counted."""
    net, pixels = build(size, device), images_to_write(size, images)
    with (
        tempfile.TemporaryDirectory() as folder,
        writers.WriterPool(workers) as pool,
        contextlib.ExitStack() as groups,
    ):
        runs = Runs(images, batch, Path(folder))

        # Networks and processes of all ways are ready at the same time, because they take turns.
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

        # The first round is not counted.
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
    help="Number of images per round.  [default: the size's own]",
)
@cli.option(
    '--batch', metavar='INT', type=click.IntRange(min=1), help="Batch size.  [default: the size's own]"
)
@rounds_option('Number of repetitions.', default=5)
@cli.option(
    '--workers',
    metavar='INT',
    type=click.IntRange(min=0),
    help="Number of writing processes.  [default: generate.py's own]",
)
@cli.option('--eager', is_flag=True, help='Do not measure compilation.')
@cli.option('--compile-large', is_flag=True, help='Also compile large networks on a CPU.')
def main(size, images, batch, rounds, workers, eager, compile_large):
    """Time 8-step student sampling to files."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    own_images, own_batch = (GPU_IMAGES, GPU_BATCH) if device.type == 'cuda' else IMAGES[size]
    images, batch, workers = (
        images or own_images,
        batch or own_batch,
        writers.default_workers() if workers is None else workers,
    )

    # What can be measured here.
    distributed.init()
    compiles = not eager and (device.type == 'cuda' or compile_large or not SIZES[size].large)
    shared = SHARED if device.type == 'cpu' and usable_cores() > 1 else {}  # one GPU serves one process
    ways = {name: how for name, how in (FASTER | shared).items() if compiles or not how.get('compiled')}
    seconds = measure(size, images, batch, rounds, workers, ways, device)

    # A row for each, measured or not.
    rows = []
    for name in itertools.chain((ALONE, WRITING, PLAIN, OVERLAPPED), FASTER, SHARED):
        if name not in seconds:
            rows.append([name] + [NOT_MEASURED] * 4)
            continue
        times = seconds[name]
        if name == WRITING:  # has no ratio: it does not sample
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
            f'{images} images in batches of {batch}, written as PNG files by {workers} process(es); least '
            f'of {rounds} rounds in turns, after one that is not counted. `{PLAIN}` samples a batch (eager '
            f'FP32), encodes and writes it, then starts the next; `{OVERLAPPED}` is generate.py after its '
            f'network is loaded, and `torchrun {OVERLAPPED}` the same in {usable_cores()} processes with '
            f'one core and thread each. `{ALONE}` samples without writing, and is the basis of the last '
            f'column; `{WRITING}` is one process that encodes and writes noise of the same size. Ratios are '
            'over the plain loop.',
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
