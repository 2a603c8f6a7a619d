"""What a distillation step should cost on 1 to 256 GPUs: a model on paper, from counted operations and stated speeds. Measures nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import click

if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.sizes import SIZES, Operations, operations
from dnnlib import cli

BYTES = 4  # of a weight and a gradient, which are FP32 whatever the network computes in
PASSES = 3  # of the networks without gradients: the teacher's two, the self-target
UPDATE_TRANSFERS = (
    7 + 3
)  # Adam reads four vectors and writes three; an average reads two and writes one, for each
HEADROOM = 0.9  # share of the backward pass during which there are finished gradients to send


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
    """Seconds of a step's parts. Speeds: tflops sustained; memory, inner (within a node) and outer (between nodes) in GB/s for each GPU."""
    images = batch / gpus
    flops = net.of_step(PASSES, 1)
    compute = images * flops / (tflops * 1e12)
    window = (
        HEADROOM * min(images, batch_gpu) * net.backward / (tflops * 1e12)
    )  # gradients are reduced in the last round only
    sent = 2 * (gpus - 1) / gpus * net.parameters * BYTES
    reduce = sent / ((inner if gpus <= node_gpus else outer) * 1e9)
    update = (UPDATE_TRANSFERS + 3 * (averages - 1)) * net.parameters * BYTES / (memory * 1e9)
    total = compute + max(reduce - window, 0) + update
    alone = batch * flops / (tflops * 1e12)
    return dict(
        gpus=gpus,
        images=images,
        compute=compute,
        sent=sent,
        reduce=reduce,
        hidden=min(reduce, window),
        update=update,
        total=total,
        efficiency=alone / gpus / total,
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
    help='Images a GPU handles at a time.',
)
@cli.option(
    '--tflops',
    metavar='FLOAT',
    type=cli.POSITIVE,
    default=300,
    show_default=True,
    help='Operations that a GPU sustains on this network, in 10^12 a second. Measure it: benchmarks/step.py.',
)
@cli.option(
    '--memory',
    metavar='GB/S',
    type=cli.POSITIVE,
    default=3350,
    show_default=True,
    help="A GPU's memory bandwidth.",
)
@cli.option(
    '--node-gpus',
    metavar='INT',
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help='GPUs of a node.',
)
@cli.option(
    '--inner',
    metavar='GB/S',
    type=cli.POSITIVE,
    default=450,
    show_default=True,
    help='Link of a GPU within a node, in one direction.',
)
@cli.option(
    '--outer',
    metavar='GB/S',
    type=cli.POSITIVE,
    default=50,
    show_default=True,
    help='Link of a GPU to other nodes, in one direction.',
)
@cli.option(
    '--averages',
    metavar='INT',
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help='Averages of the weights: EMA and phEMA.',
)
def main(size, gpus, **options):
    """Print what a consistency distillation step should cost on several numbers of GPUs. The defaults are those of H100 nodes on paper."""
    net = operations(SIZES[size])
    click.echo(
        f'{size}: {net.parameters:,} parameters; for each image {net.forward / 1e9:.0f} GFLOP a pass, '
        f'{net.of_step(PASSES, 1) / 1e12:.2f} TFLOP a step'
    )
    click.echo(
        'gpus  images/gpu  compute ms  sent GB  reduce ms  hidden ms  update ms  step ms  efficiency  Mimg/day'
    )
    for number in gpus:
        row = step(net, number, **options)
        ms = [row[name] * 1e3 for name in ('compute', 'reduce', 'hidden', 'update', 'total')]
        click.echo(
            f'{number:4}  {row["images"]:10.4g}  {ms[0]:10.1f}  {row["sent"] / 1e9:7.2f}  {ms[1]:9.1f}  {ms[2]:9.1f}  {ms[3]:9.1f}  '
            f'{ms[4]:7.1f}  {row["efficiency"]:10.1%}  {options["batch"] / row["total"] * 86400 / 1e6:8.1f}'
        )


if __name__ == '__main__':
    main()
