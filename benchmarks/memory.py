"""Memory of a consistency distillation step: by part, by the formula of --dry-run (`training.memory`), and the peak of
whole steps with random weights, of a GPU's allocator or of a stand-in for one (`gpu_stand_in`)."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import click
import torch

if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import gpu_stand_in
from benchmarks.common import NOT_MEASURED, apart, block, table
from benchmarks.sizes import SIZES
from benchmarks.step import Training, Way, phema_stds
from dnnlib import EasyDict, cli
from training import memory
from training.objectives.loss import State
from training.phema import average_name
from training.starting_point import on_meta

WAYS = {
    'plain': Way(),
    '--checkpoint-activations': Way(checkpoint_activations=True),
    '--precision=bf16': Way(precision='bf16'),
    '--ema-device=cpu': Way(),
    'all three': Way(precision='bf16', checkpoint_activations=True),
}
ON_HOST = ('--ema-device=cpu', 'all three')  # averages take no device memory
PARTS = ('teacher', 'weights', 'rounded', 'gradients', 'optimizer', 'averages', 'activations')


def parts_of(size: str, name: str, batch: int) -> dict[str, int]:
    """Bytes of a step of `batch` images on the device, by the formula of docs/scaling.md."""
    way, network = WAYS[name], SIZES[size].description
    how = dict(precision=way.precision, checkpoint_activations=way.checkpoint_activations, compiled=False)
    c, net = EasyDict(how, network=network, phema_stds=phema_stds(size)), on_meta(network)
    found = memory.parts(c, net, on_meta(network), State(), batch, processes=1, on_gpu=True)
    if name in ON_HOST:
        found['averages'] = 0
    return {part: found[part] for part in PARTS}


def measured_peak(size: str, name: str, batch: int, on_gpu: bool) -> int:
    """Peak bytes of the GPU's allocator over a step, in this process, or of the stand-in's."""
    device, way = torch.device('cuda'), WAYS[name]
    # The stand-in computes no numbers, so that the host needs no memory for averages either.
    host = torch.device('cpu' if on_gpu else 'meta')
    training = Training(size, batch, device, averages_device=host if name in ON_HOST else None)
    training.use(way)
    if way.held:
        training.teacher = None  # a run holds only the one in half precision
    # The first step allocates what stays.
    training.step(0, inside=False)
    torch.cuda.reset_peak_memory_stats(device)
    training.step(1, inside=False)
    return torch.cuda.max_memory_allocated(device)


@click.command(cls=cli.Command)
@cli.option(
    '--size', type=click.Choice(list(SIZES)), default='imagenet64-adm', show_default=True, help='Network.'
)
@cli.option(
    '--batch',
    metavar='INT',
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help='Batch size per GPU.',
)
@cli.option('--measure', hidden=True)
def main(size, batch, measure):
    """Count the memory of a consistency distillation step by part."""
    on_gpu = torch.cuda.is_available()
    if measure is not None:
        with contextlib.nullcontext() if on_gpu else gpu_stand_in.gpu(track_memory=True):
            peak = measured_peak(size, measure, batch, on_gpu)
        click.echo(peak)
        if not on_gpu:
            gpu_stand_in.leave()
        return

    # The peak of steps, in processes of their own.
    found, peaks = {name: parts_of(size, name, batch) for name in WAYS}, {}
    if on_gpu or not gpu_stand_in.why_unavailable():
        env = {} if on_gpu else dict(gpu_stand_in.guarded_environment(), PYTHONWARNINGS='ignore')
        arguments = f'--size={size}', f'--batch={batch}'
        peaks = {name: apart(__file__, *arguments, f'--measure={name}', env=env) for name in WAYS}
    plain = sum(found['plain'].values())
    unit, one = ('GB', 1e9) if plain > 1e9 else ('MB', 1e6)
    text = lambda count: f'{count / one:.2f}'
    rows = []
    for name, parts in found.items():
        total, measured = sum(parts.values()), [NOT_MEASURED, NOT_MEASURED]
        if name in peaks:
            measured = text(peaks[name]), f'{peaks[name] / total:.3f}'
        rows.append([name, *map(text, parts.values()), text(total), text(plain - total), *measured])
    click.echo(
        block(
            f'Memory of a step: {SIZES[size].title}, batch {batch}',
            f'{unit} ({one:.0e} bytes) by part, by the formula of --dry-run (`training/memory.py`). All but activations, '
            f'{text(plain - found["plain"]["activations"])} {unit}, does not depend on the batch. Averages: '
            f'{", ".join(["ema", *map(average_name, phema_stds(size))])}. In half precision the teacher holds its '
            'convolutions in it, and `rounded` are weights and gradients of a step in it. `peak` has all temporary '
            f'tensors: {"of the allocator in real steps" if on_gpu else "counted on a stand-in for a GPU"}.',
            table(['', *PARTS, 'sum', 'saved', 'peak', 'peak / sum'], rows),
        )
    )


if __name__ == '__main__':
    main()
