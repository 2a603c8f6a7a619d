"""Kernels of a consistency distillation step, counted on a stand-in for a GPU: tensors with shapes but without values.

Needs no GPU, but g++. The step is that of `benchmarks/step.py`, without `torch.compile`. A kernel costs the host
some five microseconds to launch, so their number bounds how fast a step with small kernels can be.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
import torch

if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import gpu_stand_in
from benchmarks.common import NamesOf, apart, block, table
from benchmarks.sizes import SIZES
from benchmarks.step import OPTIONS, PARTS, WAYS, Stopwatch, Training
from dnnlib import UserError, cli

MOST_FREQUENT = 8


class KernelCounter(Stopwatch):
    """Counts kernels by part, where a stopwatch would measure seconds."""

    def __init__(self, stand_in: gpu_stand_in.StandIn):
        self._stand_in = stand_in
        super().__init__(torch.device('cuda', 0), inside=True)

    def now(self) -> int:
        return sum(self._stand_in.kernels.values())


def count(size: str, way: str) -> dict:
    """Kernels of a step by part (`PARTS`), the most frequent ones, layouts of convolutions, and what waits."""
    with gpu_stand_in.gpu() as stand_in:
        training = Training(size, SIZES[size].batch, torch.device('cuda', 0))
        training.use(WAYS[way])
        # The first step allocates what stays.
        training.step(0, inside=False, watch=KernelCounter(stand_in))
        stand_in.reset()
        found = training.step(1, inside=True, watch=KernelCounter(stand_in))
    return dict(
        parts={part: found[part] for part in PARTS},
        frequent=stand_in.kernels.most_common(MOST_FREQUENT),
        waits=stand_in.findings.lines(),
        layouts=stand_in.layouts,
    )


def describe(results: dict[str, dict[str, dict]]) -> str:
    """The block of RESULTS.md."""
    header = ['', *(f'{size}, {OPTIONS[way]}' for size, ways in results.items() for way in ways)]
    columns = [found for ways in results.values() for found in ways.values()]
    rows = [[part, *(f'{found["parts"][part]:,}' for found in columns)] for part in PARTS]
    rows.append(['waits for the device', *(str(len(found['waits'])) for found in columns)])
    lines = [
        f'Most frequent, {name}: '
        + ', '.join(f'{kernel} {number:,}' for kernel, number in found['frequent'])
        + '.'
        for name, found in zip(header[1:], columns)
    ]
    batches = ', '.join(f'{size} {SIZES[size].batch}' for size in results)
    return block(
        'Kernels of a step',
        'Counted, not measured: operators on fake tensors, each with the number of kernels that it launches '
        f'(`benchmarks/gpu_stand_in.py: LAUNCHES`). Batches: {batches}. Nothing is compiled.',
        table(header, rows),
        *lines,
    )


@click.command(cls=cli.Command)
@cli.option(
    '--size',
    'sizes',
    metavar='LIST',
    type=NamesOf(SIZES),
    default='demo,imagenet64-adm',
    show_default=True,
    help=f'Networks, of {", ".join(SIZES)}.',
)
@cli.option(
    '--ways',
    metavar='LIST',
    type=NamesOf(WAYS),
    default='plain,fp16',
    show_default=True,
    help=f'Ways of running them, of {", ".join(name for name, way in WAYS.items() if not way.compiled)}.',
)
@cli.option('--measure', is_flag=True, hidden=True)
def main(sizes, ways, measure):
    """Count the kernels of a consistency distillation step."""
    if compiled := [name for name in ways if WAYS[name].compiled]:
        raise click.UsageError(f'--ways={",".join(compiled)}: what is compiled cannot be counted.')
    if measure:
        click.echo(json.dumps(count(sizes[0], ways[0])))
        gpu_stand_in.leave()
    if reason := gpu_stand_in.why_unavailable():
        raise UserError(f'There is no stand-in for a GPU: {reason}.')
    environment = dict(gpu_stand_in.guarded_environment(), PYTHONWARNINGS='ignore')
    results = {
        size: {
            way: apart(__file__, f'--size={size}', f'--ways={way}', '--measure', env=environment)
            for way in ways
        }
        for size in sizes
    }
    click.echo(describe(results))


if __name__ == '__main__':
    main()
