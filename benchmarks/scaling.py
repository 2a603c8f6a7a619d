"""Predicted time of a distillation step on 1 to 256 GPUs, from operation counts and given speeds. Measures
nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import click

if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.sizes import SIZES, Operations, operations
from dnnlib import cli

BYTES = 4  # per weight or gradient, which are FP32 in any precision of the network
PASSES = 3  # network evaluations without gradients: two of the teacher, and the self-target
UPDATE_TRANSFERS = 7 + 3  # vectors: Adam reads four and writes three; an average reads two and writes one
OVERLAP = 0.9  # fraction of the backward pass during which there are finished gradients to send


def step(
    net: Operations,
    gpus: int,
    batch: int,
    batch_gpu: int,
    tflops: float,
    memory: float,
    node_gpus: int,
    inner: float,
    outer: float,
    averages: int,
) -> dict:
    """Seconds of a step by part.

    Args:
        tflops: sustained speed of a GPU, in 10^12 operations per second.
        memory, inner, outer: bandwidth of memory, within a node, and between nodes, in GB/s per GPU.
    """
    # Networks.
    images = batch / gpus
    flops = net.of_step(PASSES, 1)
    compute = images * flops / (tflops * 1e12)

    # A ring all-reduce sends all gradients about twice, hidden behind the backward pass of the last
    # micro-batch.
    window = OVERLAP * min(images, batch_gpu) * net.backward / (tflops * 1e12)
    sent = 2 * (gpus - 1) / gpus * net.parameters * BYTES
    reduce = sent / ((inner if gpus <= node_gpus else outer) * 1e9)

    # Optimizer and averages are limited by memory bandwidth.
    update = (UPDATE_TRANSFERS + 3 * (averages - 1)) * net.parameters * BYTES / (memory * 1e9)
    total = compute + max(reduce - window, 0) + update
    single_gpu = batch * flops / (tflops * 1e12)
    return dict(
        gpus=gpus,
        images=images,
        compute=compute,
        sent=sent,
        reduce=reduce,
        hidden=min(reduce, window),
        update=update,
        total=total,
        efficiency=single_gpu / gpus / total,
    )


@click.command(cls=cli.Command)
@cli.option(
    '--size', type=click.Choice(list(SIZES)), default='imagenet64-adm', show_default=True, help='Network.'
)
@cli.option(
    '--gpus',
    metavar='LIST',
    type=cli.NumberList(),
    default='1,8,32,256',
    show_default=True,
    help='Numbers of GPUs.',
)
@cli.option(
    '--batch',
    metavar='INT',
    type=click.IntRange(min=1),
    default=2048,
    show_default=True,
    help='Total batch size.',
)
@cli.option(
    '--batch-gpu',
    metavar='INT',
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help='Micro-batch size per GPU.',
)
@cli.option(
    '--tflops',
    metavar='FLOAT',
    type=cli.POSITIVE,
    default=300,
    show_default=True,
    help='Sustained speed of a GPU on this network, in 10^12 operations per second, as benchmarks/step.py '
    'measures.',
)
@cli.option(
    '--memory',
    metavar='GB/S',
    type=cli.POSITIVE,
    default=3350,
    show_default=True,
    help='Memory bandwidth per GPU.',
)
@cli.option(
    '--node-gpus',
    metavar='INT',
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help='Number of GPUs per node.',
)
@cli.option(
    '--inner',
    metavar='GB/S',
    type=cli.POSITIVE,
    default=450,
    show_default=True,
    help='Bandwidth per GPU within a node, in one direction.',
)
@cli.option(
    '--outer',
    metavar='GB/S',
    type=cli.POSITIVE,
    default=50,
    show_default=True,
    help='Bandwidth per GPU to other nodes, in one direction.',
)
@cli.option(
    '--averages',
    metavar='INT',
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help='Number of averages of the weights, EMA and phEMA.',
)
def main(size, gpus, **options):
    """Print the predicted time of a consistency distillation step by number of GPUs.

    The default speeds are from data sheets of H100 nodes.
    """
    net = operations(SIZES[size])
    click.echo(
        f'{size}: {net.parameters:,} parameters; per image {net.forward / 1e9:.0f} GFLOP per forward pass, '
        f'{net.of_step(PASSES, 1) / 1e12:.2f} TFLOP per step'
    )
    click.echo(
        'gpus  images/gpu  compute ms  sent GB  reduce ms  hidden ms  update ms  step ms  efficiency  '
        'Mimg/day'
    )
    for number in gpus:
        row = step(net, number, **options)
        ms = [row[name] * 1e3 for name in ('compute', 'reduce', 'hidden', 'update', 'total')]
        click.echo(
            f'{number:4}  {row["images"]:10.4g}  {ms[0]:10.1f}  {row["sent"] / 1e9:7.2f}  {ms[1]:9.1f}  '
            f'{ms[2]:9.1f}  {ms[3]:9.1f}  {ms[4]:7.1f}  {row["efficiency"]:10.1%}  '
            f'{options["batch"] / row["total"] * 86400 / 1e6:8.1f}'
        )


if __name__ == '__main__':
    main()
