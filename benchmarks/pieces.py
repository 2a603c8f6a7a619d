"""Optimized code that has no option, compared with the plain code that it replaces: time, and difference of
results.

Attention by `scaled_dot_product_attention` or as softmax(q kᵀ / √d) v; Adam as one fused kernel over a vector
of all parameters or by PyTorch's plain loop over them; averages of the weights in one pass over such vectors
or parameter by parameter. Random weights and gradients; least of several rounds, in turns.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import click
import torch

if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import block, in_turns, least, median_ratio, rounds_option, table
from benchmarks.sizes import SIZES
from dnnlib import cli
from torch_utils import misc
from torch_utils.flat import FlatParameters
from training.phema import WeightAverages
from training.weight_update import WeightUpdate

STDS = [0.05, 0.10]  # of the power-function averages
ATTENTION = {
    'cifar10-ddpmpp': (1, 256, 16),
    'imagenet64-adm': (6, 64, 32),
}  # heads, channels per head, resolution

Way = Callable[[], Iterable[torch.Tensor]]  # does the work and returns its results


def attention(size: str, device: torch.device) -> tuple[Way, Way]:
    """Forward and backward pass of attention; the results are output and gradients."""
    batch = SIZES[size].batch_on(device)
    heads, channels, side = ATTENTION[size]
    q, k, v = (
        torch.randn(batch, heads, side * side, channels, device=device, requires_grad=True) for _ in range(3)
    )

    def way(function):
        def work():
            output = function()
            return output.detach(), *torch.autograd.grad(output.square().sum(), (q, k, v))

        return work

    return (
        way(lambda: (q @ k.transpose(-1, -2) / math.sqrt(channels)).softmax(dim=-1) @ v),
        way(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)),
    )


def twins(size: str, device: torch.device) -> tuple[torch.nn.Module, torch.nn.Module, FlatParameters]:
    """A network, and a copy whose weights and gradients are stored in vectors, with these vectors."""
    plain = SIZES[size].build().to(device)
    ours = copy.deepcopy(plain)
    flat = FlatParameters(ours)
    for p, q in zip(plain.parameters(), ours.parameters()):
        p.grad = torch.randn_like(p)
        q.grad.copy_(p.grad)
    return plain, ours, flat


def optimizer(size: str, device: torch.device) -> tuple[Way, Way]:
    """A step of Adam; the results are the weights."""
    plain, ours, flat = twins(size, device)
    adam, update = (
        torch.optim.Adam(plain.parameters(), lr=1e-4, foreach=False),
        WeightUpdate(flat, (0.9, 0.999), 1e-8),
    )
    return lambda: adam.step() or plain.parameters(), lambda: update.step(1e-4) or ours.parameters()


def averages(size: str, device: torch.device) -> tuple[Way, Way]:
    """An update of an EMA and power-function averages with doubled weights; the result is the last one."""
    plain, ours, flat = twins(size, device)
    kept = WeightAverages(ours, flat, 5e5, None, STDS)
    *_, last = kept.networks.values()
    copies = [[p.detach().clone() for p in plain.parameters()] for _ in kept.networks]
    # Weights that differ from the averages, so that an update changes these.
    for p in (*plain.parameters(), *ours.parameters()):
        p.data.mul_(2)
    decays = kept.decays(10_000, 100)

    @torch.no_grad()
    def one_by_one():
        for averaged, decay in zip(copies, decays):
            for average, p in zip(averaged, plain.parameters()):
                average.lerp_(p, 1 - decay)
        return copies[-1]

    return one_by_one, lambda: kept.update(10_000, 100) or last.parameters()


PIECES = {'attention': attention, 'Adam': optimizer, f'averages: EMA and {len(STDS)} phEMA': averages}


def difference(numbers: Iterable[torch.Tensor], others: Iterable[torch.Tensor]) -> float:
    """The largest absolute difference, relative to the largest absolute value."""
    pairs = [(a.detach(), b.detach()) for a, b in zip(numbers, others, strict=True)]
    return max(float((a - b).abs().max()) for a, b in pairs) / max(float(a.abs().max()) for a, _ in pairs)


def measure(piece: Callable, size: str, device: torch.device, rounds: int) -> list[str]:
    """A row of the table: times, speedups, difference of results."""
    torch.manual_seed(0)
    plain, ours = piece(size, device)
    apart = difference(plain(), ours())
    wait = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    seconds = in_turns({'plain': lambda: (plain(), wait()), 'ours': lambda: (ours(), wait())}, rounds)
    before, now = least(seconds).values()
    return [
        f'{before * 1e3:.3f}',
        f'{now * 1e3:.3f}',
        f'{before / now:.2f}',
        f'{median_ratio(*seconds.values()):.2f}',
        f'{apart:.1e}',
    ]


@click.command(cls=cli.Command)
@cli.option(
    '--size', type=click.Choice(list(SIZES)), default='imagenet64-adm', show_default=True, help='Network.'
)
@rounds_option('Number of repetitions.', default=10)
def main(size, rounds):
    """Time attention, optimizer and averages against plain implementations."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    misc.keep_freed_memory()
    rows = [
        [name, *measure(piece, size, device, rounds)]
        for name, piece in PIECES.items()
        if piece is not attention or size in ATTENTION
    ]
    click.echo(
        block(
            f'What has no switch: {SIZES[size].title}',
            f'Milliseconds, least of {rounds} rounds in turns, of a forward and backward pass of attention, '
            'a step of Adam, and an update of averages, each as a plain implementation (softmax of '
            'products; one parameter after another) and as here (fused attention; vectors of all '
            'parameters). Our Adam also computes the norm of the gradient and checks that it is finite. '
            '`difference`: the largest between FP32 results, relative to the largest value.',
            table(
                ['', 'plain, ms', 'ours, ms', 'times faster, least', 'times faster, median', 'difference'],
                rows,
            ),
        )
    )


if __name__ == '__main__':
    main()
