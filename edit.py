"""Zero-shot editing: a student or consistency model completes a partly known image, without training for
it."""

from __future__ import annotations

import dnnlib.interrupts  # noqa: F401  (first)

import itertools
import os

import click

from dnnlib import UserError, cli
from dnnlib.util import named
from sampling.options import (
    CM_EDIT_STEPS,
    EditJob,
    editing_options,
    guidance_options,
    sampling_arguments,
    sampling_options,
)
from training.saved_files import NETWORK_FILE


def open_input(path: str, indices: list[int] | None):
    """An `edit_files.Input` from a folder, a zip, an array of images, or a single image. Raises: UserError.

    Args:
        indices: indices of the images to edit; None for all.
    """
    from metrics.images import FileImages, open_images
    from sampling import edit_files

    if edit_files.is_single(path):
        return edit_files.single_input(path, indices)
    source = open_images(path)
    files = source.files if isinstance(source, FileImages) else None
    return edit_files.chosen_input(source, files, path, indices)


@click.group(cls=cli.Group)
def main():
    """Edit images with a student or a consistency model that was not trained for it (Song et al. 2023,
    Section 6; Meng et al. 2022).

    \b
    Inpaint the lower half of the first eight digits, four times each:
      python edit.py inpaint --network=demo-out/student-8/network-snapshot-000160.pkl \\
          --input=demo-out/digits.zip --indices=0-7 --box=0,4,8,8 --seeds=0-3 --outdir=edits
    \b
    Colorize a gray photograph, and upscale an image from 64 to 256 pixels:
      python edit.py colorize --network=consistency-256.pkl --input=old.png --outdir=color
      python edit.py superres --factor=4 --network=consistency-256.pkl --input=small.png --outdir=large

    The known part of an image is preserved exactly: pixels outside the mask, the gray version, or the
    averages of blocks. An output depends only on its image and seed, not on the batch size.
    """


# ----------------------------------------------------------------------------
# Edits that keep what is known of an image.

EDITED_STEPS = f"the snapshot's own; {CM_EDIT_STEPS} for a consistency model with one step"


class Box(click.ParamType):
    """LEFT,TOP,RIGHT,BOTTOM in pixels; right and bottom are exclusive."""

    name = 'box'

    def convert(self, value, param, ctx):
        if isinstance(value, list):  # the default, already converted
            return value
        box = cli.NumberList(cli.Integer(min=0, max=1 << 16)).convert(value, param, ctx)
        if len(box) != 4 or not (0 <= box[0] < box[2] and 0 <= box[1] < box[3]):
            self.fail(f'{value!r} is not LEFT,TOP,RIGHT,BOTTOM, such as 0,4,8,8', param, ctx)
        return box


@main.command()
@cli.option(
    '--mask',
    metavar='IMAGE',
    type=cli.PATH,
    help='Image of the same size that is white at unknown pixels.',
    group='Unknown pixels',
)
@cli.option(
    '--box',
    metavar='LIST',
    type=Box(),
    help='Box of unknown pixels: left, top, right, bottom, such as 0,4,8,8.',
    group='Unknown pixels',
)
@cli.option(
    '--random-share',
    type=cli.Number(min=0, max=1, min_open=True),
    help='Fraction of unknown pixels, chosen at random, the same in all images.',
    group='Unknown pixels',
)
@editing_options(EDITED_STEPS)
def inpaint(job, mask, box, random_share):
    """Fill in unknown pixels; all others are preserved exactly."""
    if sum(given is not None for given in (mask, box, random_share)) != 1:
        raise click.UsageError('unknown pixels: give one of --mask, --box and --random-share')
    from sampling import edit_files, editing

    net, source = edit_files.load(job.network), open_input(job.path, job.indices)
    shape = [net.img_channels, net.img_resolution, net.img_resolution]
    edit_files.check_shape(job.path, source.shape, [shape])
    unknown = edit_files.unknown_pixels(net.img_resolution, mask, box, random_share)
    edit_files.edit(job, net, source, editing.inpainting_task(unknown))


@main.command()
@editing_options(EDITED_STEPS)
def colorize(job):
    """Colorize gray images, or color images turned to gray first; the gray version is preserved."""
    from sampling import edit_files, editing

    net = edit_files.load(job.network)
    if net.img_channels != 3:
        raise UserError(f'{job.network} makes gray images; colorizing requires a network of RGB images')
    source = open_input(job.path, job.indices)
    shapes = [[channels, net.img_resolution, net.img_resolution] for channels in (1, 3)]
    edit_files.check_shape(job.path, source.shape, shapes)
    edit_files.edit(job, net, source, editing.colorization_task)


@main.command()
@cli.option(
    '--factor',
    type=cli.Integer(min=2, max=1 << 16),
    required=True,
    help='Upscaling factor: side of the block that each pixel becomes.',
)
@editing_options(EDITED_STEPS)
def superres(job, factor):
    """Upscale small images, or large ones that are downscaled first; the averages of blocks are preserved."""
    from sampling import edit_files, editing

    net = edit_files.load(job.network)
    if net.img_resolution % factor:
        raise UserError(
            f'--factor={factor} does not divide {net.img_resolution}, the side of the images '
            f'that {job.network} makes'
        )

    # Small images, or large ones that the task averages first.
    source, sides = open_input(job.path, job.indices), (net.img_resolution // factor, net.img_resolution)
    edit_files.check_shape(job.path, source.shape, [[net.img_channels, side, side] for side in sides])
    edit_files.edit(job, net, source, editing.superresolution_task(factor, net.img_resolution))


# ----------------------------------------------------------------------------
# Edits that start from an image with noise.

STARTED_STEPS = "as many as the snapshot's own levels below --sigma"
SIGMA_HELP = 'Standard deviation of the noise for pixels in [-1, 1], that is 127.5 times as many gray levels.'


@main.command()
@cli.option('--sigma', type=cli.SIGMA, required=True, help=SIGMA_HELP)
@editing_options(STARTED_STEPS)
def stroke(job, sigma):
    """Turn brush strokes or other rough images into realistic ones by adding and removing noise."""
    start_at(job, sigma, add_noise=True)


@main.command()
@cli.option('--sigma', type=cli.SIGMA, required=True, help=SIGMA_HELP)
@cli.option('--add-noise', is_flag=True, help='Add noise of level --sigma to the images first.')
@editing_options(STARTED_STEPS)
def denoise(job, sigma, add_noise):
    """Remove noise of a known level."""
    start_at(job, sigma, add_noise)


def start_at(job: EditJob, sigma: float, add_noise: bool) -> None:
    """Sample starting from images with noise of level `sigma`, which is added first if `add_noise`."""
    from sampling import edit_files, editing

    net, source = edit_files.load(job.network), open_input(job.path, job.indices)
    shape = [net.img_channels, net.img_resolution, net.img_resolution]
    edit_files.check_shape(job.path, source.shape, [shape])
    edit_files.edit(job, net, source, editing.start_task(sigma, add_noise), sigma)


# ----------------------------------------------------------------------------
# Interpolation.


@main.command()
@cli.option('--network', type=NETWORK_FILE, required=True, help='Snapshot of any network.')
@cli.option(
    '--outdir', metavar='DIR', type=cli.PATH, required=True, help='Folder for images/%06d.png and grid.png.'
)
@cli.option(
    '--seeds',
    type=cli.Seeds(repeats=True),
    required=True,
    help='Two or more seeds; interpolates from each to the next.',
)
@cli.option(
    '--count', type=cli.LEVELS, default=8, help='Number of images from one seed to the next, both included.'
)
@cli.option('--batch', type=cli.BATCH, default=64, help='Batch size.')
@sampling_options()
@guidance_options()
def interpolate(network, outdir, seeds, count, batch, sampling, guidance):
    """Interpolate between the latents of successive seeds; other random numbers are those of the first."""
    import torch

    from sampling import edit_files, generation
    from training.checkpoint import load_network
    from training.guidance import guided
    from training.networks import encoders

    if len(seeds) < 2:
        raise click.UsageError('--seeds: give two or more, such as 3,7')
    if any(a == b for a, b in itertools.pairwise(seeds)):
        raise click.UsageError('--seeds: there is nothing between a seed and itself.')

    # Load the network and its decoder.
    with named('--network'):
        net = load_network(network, 'cuda' if torch.cuda.is_available() else 'cpu')
    encoder = encoders.encoder_of(net, next(net.parameters()).device)
    net = guided(net, network, guidance)
    arguments = sampling_arguments(net, network, **sampling)
    edit_files.make_folder(outdir)

    # A row of images per pair of successive seeds, in batches.

    batches = torch.linspace(0, 1, count, dtype=torch.float64).split(batch)
    made = [
        generation.checked_images(encoder, edit_files.between(net, *ends, share, **arguments))
        for ends in itertools.pairwise(seeds)
        for share in batches
    ]

    # Write finite images and the grid.
    images, finite = (torch.cat(tensors) for tensors in zip(*made))
    bad = edit_files.save_finite(images, finite, [f'{i:06d}' for i in range(len(images))], outdir)
    edit_files.refuse_nonfinite(bad, len(images), outdir)
    edit_files.write_grid(images.split(count), outdir)
    print(
        f'Rows of {os.path.join(outdir, "grid.png")}: '
        + ', '.join(f'seed {a} to {b}' for a, b in itertools.pairwise(seeds))
    )


if __name__ == '__main__':
    main()
