"""Zero-shot editing: a student or consistency model completes what is known of an image, untrained for it."""

from __future__ import annotations

import dnnlib.interrupts  # noqa: F401  (first)

import itertools
import os

import click

from dnnlib import UserError, cli
from sampling.options import CM_EDIT_STEPS, EditJob, editing_options, sampling_arguments, sampling_options


def open_input(path: str, indices: list[int] | None):
    """An `edit_files.Input`: a folder, a zip, an array of images, or a single one. Raises: UserError.

    Args:
        indices: of the images, by their place; None: all.
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
    Make up the lower half of the first eight digits, four times each:
      python edit.py inpaint --network=demo-out/student-8/network-snapshot-000160.pkl \\
          --input=demo-out/digits.zip --indices=0-7 --box=0,4,8,8 --seeds=0-3 --outdir=edits
    \b
    Color for a gray photograph, and 256 pixels from 64:
      python edit.py colorize --network=consistency-256.pkl --input=old.png --outdir=color
      python edit.py superres --factor=4 --network=consistency-256.pkl --input=small.png --outdir=large

    What is known stays exactly so in the files: pixels outside the mask, the gray version, the averages of
    blocks. An output depends on its image and seed alone, not on the batch.
    """


EDITED_STEPS = f"the snapshot's own; {CM_EDIT_STEPS} for a consistency model of one"


class Box(click.ParamType):
    """LEFT,TOP,RIGHT,BOTTOM in pixels, the last two not included."""

    name = 'box'

    def convert(self, value, param, ctx):
        if isinstance(value, list):
            return value
        box = cli.NumberList(cli.Integer(min=0, max=1 << 16)).convert(value, param, ctx)
        if len(box) != 4 or not (0 <= box[0] < box[2] and 0 <= box[1] < box[3]):
            self.fail(f'{value!r} is not LEFT,TOP,RIGHT,BOTTOM, as in 0,4,8,8', param, ctx)
        return box


@main.command()
@cli.option(
    '--mask',
    metavar='IMAGE',
    type=cli.PATH,
    help='Image of the same size whose white pixels are made up.',
    group='What is unknown',
)
@cli.option(
    '--box',
    metavar='LIST',
    type=Box(),
    help='Box whose pixels are made up: left, top, right, bottom, as in 0,4,8,8.',
    group='What is unknown',
)
@cli.option(
    '--random-share',
    metavar='FLOAT',
    type=cli.Number(min=0, max=1, min_open=True),
    help='Share of the pixels that is made up, the same random ones in all images.',
    group='What is unknown',
)
@editing_options(EDITED_STEPS)
def inpaint(job, mask, box, random_share):
    """Make up the pixels under a mask; the others stay as they are, byte for byte."""
    if sum(given is not None for given in (mask, box, random_share)) != 1:
        raise click.UsageError('what is unknown: give one of --mask, --box and --random-share')
    from sampling import edit_files, editing

    net, source = edit_files.load(job.network), open_input(job.path, job.indices)
    shape = [net.img_channels, net.img_resolution, net.img_resolution]
    edit_files.check_shape(job.path, source.shape, [shape])
    unknown = edit_files.unknown_pixels(net.img_resolution, mask, box, random_share)
    edit_files.edit(job, net, source, editing.inpainting_task(unknown))


@main.command()
@editing_options(EDITED_STEPS)
def colorize(job):
    """Make up the colors of gray images, or of color images that are turned gray first; their gray version
    stays."""
    from sampling import edit_files, editing

    net = edit_files.load(job.network)
    if net.img_channels != 3:
        raise UserError(f'{job.network} makes gray images; colors take a network of RGB images')
    source = open_input(job.path, job.indices)
    shapes = [[channels, net.img_resolution, net.img_resolution] for channels in (1, 3)]
    edit_files.check_shape(job.path, source.shape, shapes)
    edit_files.edit(job, net, source, editing.colorization_task)


@main.command()
@cli.option(
    '--factor',
    metavar='INT',
    type=cli.Integer(min=2, max=1 << 16),
    required=True,
    help='Factor of enlargement: side of the block that each pixel becomes.',
)
@editing_options(EDITED_STEPS)
def superres(job, factor):
    """Make up the detail of small images, or of large ones that are averaged first; the average of every
    block stays."""
    from sampling import edit_files, editing

    net = edit_files.load(job.network)
    if net.img_resolution % factor:
        raise UserError(
            f'--factor={factor} does not divide {net.img_resolution}, the side of the images '
            f'that {job.network} makes'
        )
    source, sides = open_input(job.path, job.indices), (net.img_resolution // factor, net.img_resolution)
    edit_files.check_shape(job.path, source.shape, [[net.img_channels, side, side] for side in sides])
    edit_files.edit(job, net, source, editing.superresolution_task(factor, net.img_resolution))


STARTED_STEPS = "the snapshot's own, as far as they are below --sigma"
SIGMA_HELP = 'Standard deviation of the noise, for pixels in [-1, 1]: 127.5 times as many gray levels.'


@main.command()
@cli.option('--sigma', metavar='FLOAT', type=cli.SIGMA, required=True, help=SIGMA_HELP)
@editing_options(STARTED_STEPS)
def stroke(job, sigma):
    """Images from strokes of a brush, or from any other rough image: noise is added that drowns what is wrong
    with them, then removed."""
    start_at(job, sigma, add_noise=True)


@main.command()
@cli.option('--sigma', metavar='FLOAT', type=cli.SIGMA, required=True, help=SIGMA_HELP)
@cli.option('--add-noise', is_flag=True, help='Add noise of level --sigma first, to images that have none.')
@editing_options(STARTED_STEPS)
def denoise(job, sigma, add_noise):
    """Remove noise of a known level."""
    start_at(job, sigma, add_noise)


def start_at(job: EditJob, sigma: float, add_noise: bool) -> None:
    """Sample from images with noise."""
    from sampling import edit_files, editing

    net, source = edit_files.load(job.network), open_input(job.path, job.indices)
    shape = [net.img_channels, net.img_resolution, net.img_resolution]
    edit_files.check_shape(job.path, source.shape, [shape])
    edit_files.edit(job, net, source, editing.start_task(sigma, add_noise), sigma)


@main.command()
@cli.option('--network', metavar='PKL|URL', type=cli.PATH, required=True, help='Snapshot of any network.')
@cli.option(
    '--outdir', metavar='DIR', type=cli.PATH, required=True, help='Folder for images/%06d.png and grid.png.'
)
@cli.option(
    '--seeds',
    metavar='LIST',
    type=cli.Seeds(repeats=True),
    required=True,
    help='Two or more seeds, to interpolate from each to the next.',
)
@cli.option(
    '--count',
    metavar='INT',
    type=cli.LEVELS,
    default=8,
    show_default=True,
    help='Images from one seed to the next, both ends included.',
)
@cli.option('--batch', metavar='INT', type=cli.BATCH, default=64, show_default=True, help='Images per batch.')
@sampling_options()
def interpolate(network, outdir, seeds, count, batch, sampling):
    """Images between those of two seeds: latents between theirs, all else that is random as the first
    one's."""
    import torch

    from sampling import edit_files, generation
    from training.checkpoint import load_network
    from training.networks import encoders

    if len(seeds) < 2:
        raise click.UsageError('--seeds: two or more, such as 3,7')
    if any(a == b for a, b in itertools.pairwise(seeds)):
        raise click.UsageError('--seeds: there is nothing between a seed and itself.')
    net = load_network(network, 'cuda' if torch.cuda.is_available() else 'cpu')
    encoder = encoders.encoder_of(net, next(net.parameters()).device)
    arguments = sampling_arguments(net, network, **sampling)
    edit_files.make_folder(outdir)
    parts = torch.linspace(0, 1, count, dtype=torch.float64).split(batch)
    made = [
        generation.checked_images(encoder, edit_files.between(net, *ends, share, **arguments))
        for ends in itertools.pairwise(seeds)
        for share in parts
    ]
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
