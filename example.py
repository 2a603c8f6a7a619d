"""Load a snapshot, sample a grid of images, save it: the shortest complete use of this repository.

    python example.py demo-out/student-8/network-snapshot-000160.pkl grid.png

Works for teachers, ours and EDM's, and for students and flow maps, which take DDIM steps: what the network is, is read
from the snapshot.
"""

import dnnlib.interrupts  # noqa: F401  (first)

import itertools
import sys

import torch

from data.label_space import space_of
from dnnlib import UserError
from dnnlib.cli import expand_path
from dnnlib.util import check_other_file
from sampling.generation import checked_images, image_grid, save_images
from training import samplers
from training.checkpoint import load_network
from training.networks.encoders import encoder_of


@torch.no_grad()
def student_sample(net, latents, class_labels, sigmas):
    """One evaluation per step down the student's own noise levels: x <- D + (sigma_next / sigma) (x - D)."""
    x = latents.double() * sigmas[0]
    for sigma, sigma_next in itertools.pairwise(sigmas):
        # A flow map is also given the noise level where the step ends.
        end = dict(r=torch.tensor(sigma_next)) if samplers.is_two_time(net) else {}
        denoised = net(x, torch.tensor(sigma), class_labels, **end).double()
        x = denoised + sigma_next / sigma * (x - denoised)
    return x


@torch.no_grad()
def heun_sample(net, latents, class_labels, steps=18, sigma_min=0.002, sigma_max=80, rho=7):
    """Heun's method for the probability-flow ODE of a teacher (Karras et al. 2022, Algorithm 1)."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = max(sigma_min, net.sigma_min), min(sigma_max, net.sigma_max)
    # Karras nodes, then 0.
    sigmas = [*((high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho).tolist(), 0.0]
    x = latents.double() * sigmas[0]
    for sigma, sigma_next in itertools.pairwise(sigmas):
        slope = (x - net(x, torch.tensor(sigma), class_labels)) / sigma
        x_next = x + (sigma_next - sigma) * slope
        # The second slope, except at 0, where there is none.
        if sigma_next > 0:
            slope_next = (x_next - net(x_next, torch.tensor(sigma_next), class_labels)) / sigma_next
            x_next = x + (sigma_next - sigma) * (slope + slope_next) / 2
        x = x_next
    return x


def main(snapshot, dest, rows=4, columns=10):
    # Load the network and draw latents of unit variance.
    check_other_file(snapshot, dest, 'GRID.png')
    net = load_network(snapshot, device='cuda' if torch.cuda.is_available() else 'cpu')
    device = next(net.parameters()).device
    solver, steps = samplers.resolve(net, None, None)
    if solver not in ('student', 'heun'):
        raise UserError(
            f'{snapshot} is a consistency model or a student that is sampled with noise, and this example '
            'knows teachers and other students: see generate.py'
        )
    torch.manual_seed(0)
    latents = torch.randn(rows * columns, net.img_channels, net.img_resolution, net.img_resolution).to(device)

    # One-hot labels of the classes that have images in the training set, in turn.
    space = space_of(net)
    if space.are_vectors:
        raise UserError(
            f'{snapshot} takes {space}, and this example knows classes only: see generate.py --labels'
        )
    classes = itertools.cycle(space.present or range(net.label_dim))
    labels = (
        torch.eye(net.label_dim, device=device)[list(itertools.islice(classes, rows * columns))]
        if net.label_dim
        else None
    )

    # A student's snapshot records its noise levels, a flow map's how many steps to take.
    if solver == 'student':
        sigmas = samplers.student_sigmas(net, samplers.StudentOptions(), steps)
        images = student_sample(net, latents, labels, sigmas)
    else:
        images = heun_sample(net, latents, labels)

    # Decode and save.
    pixels, finite = checked_images(encoder_of(net, device), images)
    if not finite.all():
        raise UserError(
            f'{int((~finite).sum())} of {len(images)} images are not finite (NaN or infinite values): '
            f'{snapshot} is broken for them.'
        )
    save_images(image_grid(pixels, columns)[None], [dest])


if __name__ == '__main__':
    asked = sys.argv[1:] in (['-h'], ['--help'])
    if asked or len(sys.argv) != 3:
        print('Usage: python example.py SNAPSHOT.pkl GRID.png', file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    try:
        main(*map(expand_path, sys.argv[1:]))
    except UserError as error:
        sys.exit(f'Error: {error}')
