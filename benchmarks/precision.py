"""How well half precision resolves a self-target: cosine between a gradient and its FP64 value as r
approaches t.

The loss is that of easy consistency tuning with the same ratio r/t at all times (`--k=0`), so that the table
lists 1 - r/t. Near r = t the network's outputs at t and r differ by less than its rounding errors, and the
gradient is noise. `training/resolution.py: ROUNDING`, below which runs print a warning, was chosen from these
tables.
"""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path

import click

if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import block, table
from dnnlib import cli

GAPS = [2.0**-i for i in range(2, 17, 2)]


def gradient(net, precision: str, gap: float, images, labels, ect: dict, tf32: bool = False):
    """Gradient of the mean loss, an FP64 vector, of a copy of `net` that computes in `precision`.

    `gap`: 1 - r/t; `ect`: options of the loss.
    """
    import torch

    from dnnlib import EasyDict
    from torch_utils import misc
    from training import execution
    from training.objectives import loss_ect
    from training.rng import SampleRng

    misc.allow_tf32(tf32)
    net = execution.in_precision(copy.deepcopy(net), precision).train().requires_grad_(True)
    gaps = dict(q=1 / gap, k=0.0, b=1.0, stage_nimg=len(images))  # the gap is that of stage 0
    state = loss_ect.setup(EasyDict(gaps, sigma_data=net.sigma_data, sync_dropout=True, **ect))
    images, rng = (
        images.double() if precision == 'fp64' else images,
        SampleRng(0, 0, len(images), images.device),
    )
    loss_ect.loss(net, images, labels, rng, state).mean().backward()
    return torch.cat([p.grad.double().flatten() for p in net.parameters() if p.grad is not None])


def random_network(arch: str):
    """A network of 16x16 images whose zero-initialized layers are random, as after some training."""
    import torch

    from training import networks
    from training.networks import edm2 as networks_edm2

    # Small, with attention at the lower resolution.
    torch.manual_seed(0)
    size = dict(
        img_resolution=16,
        img_channels=3,
        label_dim=0,
        use_fp16=False,
        model_channels=32,
        channel_mult=[1, 2],
        num_blocks=2,
        attn_resolutions=[8],
        dropout=0,
    )
    net = (
        networks_edm2.Precond(**size)
        if arch == 'edm2'
        else networks.EDMPrecond(**size, model_type='DhariwalUNet')
    )

    # Gains of EDM2 and zero weights of ADM would leave the network constant.
    for name, parameter in net.named_parameters():
        if name.endswith('gain'):
            torch.nn.init.constant_(parameter, 0.7)
        elif parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return net


def random_images(count: int):
    """[count, 3, 16, 16] noise of standard deviation 0.5, smoothed over 3x3 pixels."""
    import torch

    images = torch.nn.functional.avg_pool2d(
        torch.randn(count, 3, 18, 18, generator=torch.Generator().manual_seed(0)), 3, stride=1
    )
    return images * (0.5 / images.std())


def some_of(data: str, label_dim: int, count: int, device):
    """Images in [-1, 1] and labels, evenly spaced in a data set."""
    import torch

    from data.dataset import ImageFolderDataset

    dataset = ImageFolderDataset(data, use_labels=bool(label_dim))
    samples = [dataset[i * len(dataset) // count] for i in range(count)]
    images, labels = (
        torch.stack([torch.as_tensor(sample[i]) for sample in samples]).to(device) for i in (0, 1)
    )
    return images.float() / 127.5 - 1, labels


@click.command(cls=cli.Command)
@cli.option(
    '--network',
    metavar='PKL|URL',
    type=cli.PATH,
    help='Snapshot whose gradients are compared.  [default: random networks of ADM and EDM2]',
)
@cli.option(
    '--data',
    metavar='ZIP|DIR',
    type=cli.PATH,
    help='Data set like the one it was trained on.  [default: random images]',
)
@cli.option(
    '--batch', metavar='INT', type=click.IntRange(min=1), default=64, show_default=True, help='Batch size.'
)
def main(network, data, batch):
    """Print the cosine between gradients of consistency tuning in every precision and in FP64, by 1 - r/t.

    Weight, distance and times are those of ECT with EDM2's networks. fp16 and TensorFloat-32 require a GPU.
    """
    import torch

    from torch_utils import distributed
    from training.checkpoint import load_network

    if (network is None) != (data is None):
        raise click.UsageError('--network and --data go together.')

    # Networks, images, labels.
    device = distributed.get_device()
    nets = (
        [random_network(arch).to(device) for arch in ('adm', 'edm2')]
        if network is None
        else [load_network(network, device)]
    )
    if data is None:
        images, labels = random_images(batch).to(device), torch.zeros(batch, 0, device=device)
    else:
        images, labels = some_of(data, nets[0].label_dim, batch, device)
    tables = [part for net in nets for part in (f'{type(net.model).__name__}:', cosines(net, images, labels))]
    click.echo(
        block('Gradients of a self-target', f'Cosine with the gradient in FP64, of {batch} images.', *tables)
    )


def cosines(net, images, labels) -> str:
    """Table for one network: cosines by gap and precision."""
    import torch

    from training.objectives import OBJECTIVES

    device = images.device
    ect = {name: OBJECTIVES['ect'].edm2[name] for name in ('P_mean', 'P_std', 'c', 'ect_weight')}
    ways = {'bf16': ('bf16', False), 'fp32': ('fp32', False)}
    if device.type == 'cuda':
        ways = {
            'bf16': ('bf16', False),
            'fp16': ('fp16', False),
            'fp32, TF32': ('fp32', True),
            'fp32': ('fp32', False),
        }

    # All precisions see the same images, noise and times.
    rows = []
    for gap in GAPS:
        exact = gradient(net, 'fp64', gap, images, labels, ect)
        rounded = [
            gradient(net, precision, gap, images, labels, ect, tf32) for precision, tf32 in ways.values()
        ]
        rows.append(
            [
                f'2^{math.log2(gap):.0f}',
                *(f'{torch.cosine_similarity(vector, exact, dim=0):.3f}' for vector in rounded),
            ]
        )
    return table(['1 - r/t', *ways], rows)


if __name__ == '__main__':
    main()
