"""Time of the derivative of a network along the ODE, which `scd`, `sct` and `flowmap --target=tangent` train by, in
forward passes: in forward mode and by a central difference, beside a forward and backward pass.

    python benchmarks/derivatives.py --sizes=demo
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import click
import torch

if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import NamesOf, block, in_turns, least, median_ratio, rounds_option, table
from benchmarks.sizes import SIZES
from dnnlib import cli
from training.objectives import tangents
from training.objectives.continuous_time import differentiable, velocity_field

WARM_UP = 2


def passes(size: str, device: torch.device) -> dict[str, Callable[[], object]]:
    """The passes to time, by name: of the network of a size, on random images [N, C, H, W]."""
    network = SIZES[size]
    net = network.build().to(device)
    n = network.batch_on(device)
    generator = torch.Generator(device).manual_seed(0)
    X = torch.randn(n, net.img_channels, *[net.img_resolution] * 2, device=device, generator=generator)
    t = torch.linspace(0.1, 1.5, n, device=device)
    labels = torch.eye(net.label_dim, device=device)[:1].repeat(n, 1)

    def field(jvp: str) -> Callable:
        call = differentiable(net, jvp)
        return velocity_field(lambda x, sigma: call(x, sigma, labels), 0.5)

    def plain() -> None:
        with torch.no_grad():
            field('difference')(X, t)

    def trained() -> None:
        field('difference')(X, t).square().sum().backward()

    derivative = lambda mode: lambda: tangents.derivative(field(mode), (X, t), (X, torch.ones_like(t)), mode)
    return {
        'forward': plain,
        'forward and backward': trained,
        'derivative, forward mode': derivative('forward'),
        'derivative, difference': derivative('difference'),
    }


@click.command(cls=cli.Command)
@cli.option(
    '--sizes',
    metavar='LIST',
    type=NamesOf(list(SIZES)),
    default='demo,cifar10-ddpmpp',
    show_default=True,
    help='Networks.',
)
@rounds_option('Number of times to time every pass.', 10)
def main(sizes, rounds):
    """Time a network's derivative along the ODE in forward passes."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    # A GPU computes while the host goes on.
    wait = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    rows = []
    for size in sizes:
        calls = passes(size, device)
        waited = {name: lambda call=call: (call(), wait()) for name, call in calls.items()}
        in_turns(waited, WARM_UP)
        seconds = in_turns(waited, rounds)
        for name, value in least(seconds).items():
            ratio = median_ratio(seconds[name], seconds['forward'])
            rows.append([SIZES[size].title, name, f'{value * 1e3:.1f} ms', f'{ratio:.2f}'])
    click.echo(
        block(
            'Derivatives along the ODE',
            f'Least times of {rounds} rounds, in turns, and the median over rounds of the ratio to a forward pass without '
            'gradients. FP32; forward mode has no fused attention, norms and activations.',
            table(['network', 'pass', 'least', 'forward passes'], rows),
        )
    )


if __name__ == '__main__':
    main()
