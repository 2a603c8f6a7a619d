"""What a solver's step costs besides the network: seconds of 8 evaluations by a network, and of each solver
with a denoiser that returns a tensor at once.

The share is that of a step outside of the network in the whole step. A step of a multistep solver is a few
operations on the state in FP64; coefficients depend on the noise levels only, are Python numbers, and are
computed once for a list of levels.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import torch

if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import block, in_turns, least, rounds_option, table
from benchmarks.sizes import SIZES
from dnnlib import cli
from training.schedules import schedule_sigmas
from training.solvers import ODE_SOLVERS, ode_solve

EVALUATIONS = 8


def measured(size: str, batch: int, rounds: int) -> tuple[float, dict[str, float]]:
    """(seconds of an evaluation of the network, {solver: seconds of a step outside of it})."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    wait = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    net = SIZES[size].build().to(device).eval().requires_grad_(False)
    shape = batch, net.img_channels, net.img_resolution, net.img_resolution
    x = torch.randn(shape, device=device, dtype=torch.float64)
    labels = torch.zeros(batch, net.label_dim, device=device) if net.label_dim else None

    def evaluate():
        with torch.no_grad():
            net(x, torch.ones([], device=device), labels).double()
        wait()

    # Of as many evaluations each: solvers of two have half as many steps.
    calls, steps = {}, {}
    for name, solver in ODE_SOLVERS.items():
        steps[name] = EVALUATIONS // solver.evaluations
        sigmas = schedule_sigmas('polynomial', steps[name] + 1, 0.002, 80.0).tolist()
        calls[name] = lambda name=name, sigmas=sigmas: (
            ode_solve(lambda x, sigma: x, x, sigmas, name),
            wait(),
        )
    for call in calls.values():
        call()  # warms up, and computes coefficients

    # Solvers in turns, then the network, which would leave the caches cold for one of them.
    seconds = least(in_turns(calls, rounds))
    network = least(in_turns(dict(network=evaluate), max(rounds // 3, 1)))['network']
    return network, {name: value / steps[name] for name, value in seconds.items()}


@click.command(cls=cli.Command)
@cli.option(
    '--size', type=click.Choice(list(SIZES)), default='cifar10-ddpmpp', show_default=True, help='Network.'
)
@cli.option('--batch', metavar='INT', type=cli.BATCH, default=16, show_default=True, help='Images.')
@rounds_option('Rounds; the least time counts.', default=10)
def main(size, batch, rounds):
    """Measure a step of every solver outside of the network, against an evaluation of the network."""
    network, outside = measured(size, batch, rounds)
    evaluations = {name: solver.evaluations for name, solver in ODE_SOLVERS.items()}
    share = lambda name: outside[name] / (outside[name] + evaluations[name] * network)
    click.echo(
        block(
            f'Solvers outside of the network: {size}, batch {batch}',
            f'A network evaluation takes {1e3 * network:.1f} ms. Each solver over {EVALUATIONS} evaluations; the '
            f'least of {rounds} rounds.',
            table(
                ['solver', 'a step outside of the network, ms', 'share of the step'],
                [[name, f'{1e3 * outside[name]:.2f}', f'{share(name):.2%}'] for name in outside],
            ),
        )
    )


if __name__ == '__main__':
    main()
