"""How fast networks change with the noise level, which is what losses by the derivative train by (scd, sct,
`--target=tangent`): a fast embedding of the level makes it rough.

For each network, at levels from 0.01 to 10, the root mean square over images of dF/d ln(sigma) with the scaled image
c_in x held, over that of F, EDM's raw output.

    python benchmarks/noise_derivative.py edm.pkl edm2.pkl --data=digits.zip
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import torch

if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import table
from data.dataset import ImageFolderDataset
from dnnlib import cli
from training.checkpoint import load_network
from training.objectives import tangents
from training.objectives.continuous_time import velocity_field

LEVELS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def relative_derivative(
    net: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, sigma: float
) -> float:
    """|dF/d ln(sigma)| / |F|, each over all images [N, C, H, W] noised at `sigma`, the scaled images held."""
    t = tangents.time_of(torch.full([len(images)], sigma, dtype=torch.float64), net.sigma_data)
    noise = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    X = tangents.noisy(images.double(), net.sigma_data * noise, t)
    F = velocity_field(lambda x, sigma: net(x, sigma, labels, force_fp32=True), net.sigma_data)
    value, slope = tangents.derivative(F, (X, t), (torch.zeros_like(X), tangents.rate(t)), 'forward')
    return float(slope.norm() / value.norm())


@click.command(cls=cli.Command)
@cli.argument('networks', nargs=-1, required=True, metavar='PKL...', help='Snapshots of diffusion models.')
@cli.option('--data', required=True, help='Images to noise, with labels.', metavar='ZIP|DIR')
@cli.option(
    '--images', default=256, show_default=True, type=cli.COUNT, help='Number of images.', metavar='INT'
)
def main(networks, data, images):
    """Print the relative derivative by the logarithm of the noise level of one or several NETWORKS."""
    dataset = ImageFolderDataset(data, use_labels=True, max_size=images)
    pixels = torch.stack([torch.from_numpy(dataset[i][0]) for i in range(len(dataset))]) / 127.5 - 1
    labels = torch.stack([torch.from_numpy(dataset[i][1]) for i in range(len(dataset))])
    rows = []
    for path in networks:
        net = load_network(path).double()
        rows.append([path, *(f'{relative_derivative(net, pixels, labels, sigma):.2g}' for sigma in LEVELS)])
    print(table(['network, sigma:', *(f'{sigma:g}' for sigma in LEVELS)], rows))


if __name__ == '__main__':
    main()
