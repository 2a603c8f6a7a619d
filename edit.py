"""Zero-shot editing: a student or consistency model completes what is known of an image, without having been trained for it."""

from __future__ import annotations

import dnnlib.interrupts  # noqa: F401  (first)

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import click

from dnnlib import EasyDict, NotFinite, UserError, cli
from dnnlib.file_kind import describe_file
from dnnlib.text import printable
from dnnlib.util import remove
from sampling.options import sampling_arguments, sampling_options

if TYPE_CHECKING:  # imported where they are used, so that --help stays fast
    import numpy as np
    from torch import Tensor

    from data.dataset import ImageFiles
    from sampling.generation import LabelChooser

SOLVERS = ('student', 'cm')
CM_STEPS = 40  # of consistency models of one step in edits: the more there are, the more of what is known is heeded (docs/editing.md)
SHOWN = 16  # images of the input in the grid
NAMED = 20  # images in an error
SIDE, GAP = 64, 2  # of an image in the grid, at least, and between two, in pixels
GRAY = 128  # of pixels that are to be made up

# ----------------------------------------------------------------------------
# What is edited.


class Input(NamedTuple):
    """Images as they lie on disk, read when they are asked for.

    Attributes:
        names: of the chosen images, relative paths without extension.
        read: from places among the chosen to uint8 [n, C, H, W].
        shape: [C, H, W].
        read_labels: [N] class indices or [N, D] vectors of the chosen; None where the input has none.
    """

    names: list[str]
    read: Callable[[Sequence[int]], Tensor]
    shape: list[int]
    read_labels: Callable[[], np.ndarray | None]


def is_single(path: str) -> bool:
    """Whether this is one image, not several."""
    return os.path.isfile(path) and os.path.splitext(path)[1].lower() not in ('.zip', '.npz', '.npy')


def open_input(path: str, indices: list[int] | None) -> Input:
    """A folder, a zip, an array of images, or a single one; of several those at `indices`, by their place. Raises: UserError."""
    from data.dataset import read_labels
    from metrics.images import FileImages, open_images

    if is_single(path):
        if indices not in (None, [0]):
            raise UserError(f'--indices: {path} is a single image; leave the option out')
        image = read_image(path)
        return Input(
            [os.path.splitext(os.path.basename(path))[0]],
            lambda places: image[[0] * len(places)],
            list(image.shape[1:]),
            lambda: None,
        )
    source = open_images(path)
    chosen = list(range(len(source))) if indices is None else indices
    if max(chosen) >= len(source):
        raise UserError(
            f'--indices={max(chosen)} does not exist: {path} holds the {len(source)} images 0 to {len(source) - 1}'
        )
    from_files = isinstance(source, FileImages)
    names = [os.path.splitext(source.files.images[i])[0] if from_files else f'{i:06d}' for i in chosen]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(
            f'{path}: {twice} would be edited twice, into the same file: give each image a name, and in --indices a place, of its own'
        )
    if from_files:
        check_headers(source.files, chosen, source.image_shape)

    def labels_of_chosen():
        labels = read_labels(source.files) if from_files else None
        return None if labels is None else labels[chosen]

    return Input(
        names,
        lambda places: source.batch([chosen[i] for i in places])[0],
        source.image_shape,
        labels_of_chosen,
    )


def check_headers(files: ImageFiles, chosen: Sequence[int], shape: Sequence[int]) -> None:
    """UserError, before any is edited, where an image is not of the shape [C, H, W], which is that of the first."""
    from data.dataset import image_shape_of

    for i in chosen:
        name = files.images[i]
        with files.open_image(name) as image:
            own = image_shape_of(image, f'{files.path}: {name}')
        if list(own) != list(shape):
            raise UserError(
                f'{files.path}: {name} is {in_words(own)}, but {files.images[0]} is {in_words(shape)}: '
                'put those of one size and mode into a folder of their own'
            )


def read_image(path: str, as_gray: bool = False) -> Tensor:
    """An image file, turned as its camera was, as uint8 [1, C, H, W]; `as_gray`: of 8-bit ones of any mode the gray levels. Raises: UserError."""
    import torch

    from data.dataset import image_pixels, image_shape_of, is_16_bit
    from data.pixels import UNREADABLE, Picture, open_image, oriented

    cure = 'save it as 8-bit gray' if as_gray else 'save it as 8-bit gray or RGB'
    try:
        with open_image(path) as opened:
            if as_gray and not is_16_bit(opened) and opened.mode != 'LAB':
                return torch.from_numpy(
                    image_pixels(oriented(Picture.load(opened), upright=True).convert('L')).copy()
                )[None]
            image_shape_of(opened, path, cure)
            return torch.from_numpy(image_pixels(oriented(Picture.load(opened), upright=True)).copy())[None]
    except UNREADABLE as error:
        kind = describe_file(path) if os.path.isfile(path) and os.access(path, os.R_OK) else None
        reason = (
            f'it is {kind}'
            if kind and not kind.endswith(' image')
            else getattr(error, 'strerror', None) or error
        )
        raise UserError(f'{path} is not a readable image ({reason})') from error


def in_words(shape: Sequence[int]) -> str:
    channels, height, width = shape
    return f'{width}x{height} {"gray" if channels == 1 else "RGB"}'


def check_shape(path: str, shape: Sequence[int], wanted: Sequence[Sequence[int]]) -> None:
    """UserError where images are of none of the shapes [C, H, W]."""
    if list(shape) in [list(one) for one in wanted]:
        return
    cures = (
        [f'resize {"it" if is_single(path) else "them"}']
        if list(shape[1:]) not in [list(one[1:]) for one in wanted]
        else []
    )
    if shape[0] not in [one[0] for one in wanted]:
        cures.append(
            f'save {"it" if is_single(path) else "them"} as 8-bit {"gray" if wanted[0][0] == 1 else "RGB"}'
        )
    what = 'is an image' if is_single(path) else 'has images'
    raise UserError(
        f'--input={path} {what} of {in_words(shape)}, and here it must be {" or ".join(map(in_words, wanted))}: {" and ".join(cures)}'
    )


# ----------------------------------------------------------------------------
# How it is edited.


class Prepared(NamedTuple):
    """A batch made ready for the sampler.

    Attributes:
        known: what the network is told of the images, to be seen in the grid: uint8 [N, C, H, W].
        latents: [N, C, H, W].
        options: of `samplers.sample`: an edit, or a start.
        to_pixels: from what the sampler returns to uint8.
    """

    known: Tensor
    latents: Tensor
    options: dict
    to_pixels: Callable[[Tensor], Tensor]


Task = Callable[['Tensor', 'Tensor'], Prepared]  # of images, uint8 [N, C, H, W], and latents


def to_signed(images: Tensor) -> Tensor:
    """uint8 to [-1, 1], in float64: what is known stays exact."""
    return images.double() / 127.5 - 1


def to_pixels(images: Tensor) -> Tensor:
    from training.networks.encoders import StandardRGBEncoder

    return StandardRGBEncoder().decode(images)


def inpainting_task(unknown: Tensor) -> Task:
    """`unknown`: boolean [H, W]."""
    from sampling import editing

    def prepare(images, latents):
        where = unknown.to(images.device)
        return Prepared(
            images.masked_fill(where, GRAY),
            latents,
            dict(edit=editing.inpainting(to_signed(images), where)),
            to_pixels,
        )

    return prepare


def colorization_task(images: Tensor, latents: Tensor) -> Prepared:
    from sampling import editing

    gray = editing.gray_pixels(images)
    return Prepared(
        gray,
        latents,
        dict(edit=editing.colorization(to_signed(gray))),
        lambda x: to_pixels(editing.contract_colors(x)),
    )


def superresolution_task(factor: int, resolution: int) -> Task:
    """From images of `resolution`, which are averaged, or of a `factor`-th of it."""
    from sampling import editing

    def prepare(images, latents):
        small = to_signed(images)
        small = editing.block_mean(small, factor) if images.shape[-1] == resolution else small
        return Prepared(
            to_pixels(small),
            latents,
            dict(edit=editing.superresolution(small, factor)),
            lambda x: editing.round_blocks(x, factor),
        )

    return prepare


def start_task(sigma: float, add_noise: bool) -> Task:
    """Sampling begins at the images, with noise of `sigma` that they have already or that is added."""

    def prepare(images, latents):
        begin = to_signed(images)
        noise = latents.double() * add_noise
        return Prepared(to_pixels(begin + sigma * noise), noise, dict(start=(begin, sigma)), to_pixels)

    return prepare


def given_labels(labels: Tensor) -> LabelChooser:
    """A chooser of these labels; random ones are drawn all the same, so that noise that comes after them is what it is without labels."""

    def choose(noise, label_dim):
        noise.randint(label_dim)
        return labels.to(noise.device)

    return choose


def labels_for(net, path: str, source: Input) -> Tensor | None:
    """[N, label_dim] of a data set's labels; None where there are none or the network takes none. Raises: UserError where they are not its."""
    import numpy as np
    import torch

    from data.label_space import Labels, space_of

    labels = source.read_labels() if net.label_dim else None
    if labels is None:
        return None
    try:
        return torch.from_numpy(
            np.stack(
                list(
                    Labels.checked(labels, space_of(net), f'the label file of --input={path}', 'the network')
                )
            )
        )
    except UserError as error:
        raise UserError(f'{error}. Choose labels with --class or --labels') from error


def load(network: str):
    """The network, of pixels, on the device that there is. Raises: UserError."""
    import torch

    from training.checkpoint import load_network
    from training.networks import encoders

    net = load_network(network, 'cuda' if torch.cuda.is_available() else 'cpu')
    if not isinstance(encoders.encoder_of(net), encoders.StandardRGBEncoder):
        raise UserError(
            f'{network} makes latents of a VAE, and what is known of an image is known of its pixels: '
            'only networks of pixels can edit. interpolate works with both.'
        )
    return net


def editing_arguments(
    net, network: str, sampling: dict, sigma: float | None, labels: Tensor | None = None
) -> dict:
    """What `samplers.sample` and the choice of labels take.

    Args:
        sigma: level at which sampling starts from images; None: an edit projects on what is known, which is lost on a single evaluation.
        labels: of the images, [N, label_dim], which take the place of what `sampling` says of labels.
    Raises: UserError where they do not go together, found by sampling a pixel.
    """
    import torch

    from sampling import generation

    pixel = torch.zeros(1, net.img_channels, 1, 1)
    start = dict(start=(pixel, sigma)) if sigma else {}
    choose_labels = None if labels is None else given_labels(labels)
    arguments = sampling_arguments(net, network, **sampling, **start, choose_labels=choose_labels)
    if arguments['solver'] not in SOLVERS or net.metadata.get('objective') == 'diffusion':
        raise UserError(
            f'{network} is a teacher, or does not say what it is, and only students and consistency models can edit: '
            'distil a teacher with train.py --objective=mcd or direct, or tune it with --objective=ect'
        )
    levels_given = any(sampling[name] is not None for name in ('steps', 'taus', 'mid_t', 'ts'))
    if not sigma and arguments['solver'] == 'cm' and arguments['steps'] < 2 and not levels_given:
        arguments['steps'] = CM_STEPS
    if not sigma and arguments['steps'] < 2:
        raise UserError(
            'a single evaluation sees nothing of the known part, only noise: take --steps=2 or more, or a student of more steps'
        )
    generation.rehearse(net, **arguments)
    arguments.pop('start', None)
    return arguments


def edit_batch(
    net, task: Task, images: Tensor, seeds: Sequence[int], labels: Tensor | None, choose_labels, **arguments
) -> tuple[Tensor, Tensor, Tensor]:
    """(what is known, results, which results are finite), uint8 [N, C, H, W] and bool [N], of images uint8 [N, ...] with a seed each.

    An output depends on its image and seed alone.
    """
    import torch

    from sampling import generation
    from training import samplers

    device = next(net.parameters()).device
    noise = generation.SeededNoise(seeds, device)
    latents = noise.randn([net.img_channels, net.img_resolution, net.img_resolution])
    choose = choose_labels if labels is None else given_labels(labels)
    prepared = task(images.to(device), latents)
    with torch.no_grad():
        drawn = samplers.sample(
            net,
            prepared.latents,
            choose(noise, net.label_dim) if net.label_dim else None,
            randn_like=noise.randn_like,
            **arguments,
            **prepared.options,
        )
    return prepared.known, prepared.to_pixels(drawn), generation.all_finite(drawn)


# ----------------------------------------------------------------------------
# From files to files.


def edit(c: EasyDict, net, source: Input, task: Task, sigma: float | None = None) -> None:
    """Edit every image once for every seed: `outdir`/images/NAME-SEED.png and `outdir`/grid.png.

    Args:
        c: the values of `editing_options`.
        sigma: see `editing_arguments`.
    Raises: NotFinite, at the end, where results are not finite. They are not written, and neither is the grid.
    """
    import tqdm

    from sampling import generation

    told = c.sampling['class_idx'] is not None or c.sampling['labels'] is not None
    labels = None if told else labels_for(net, c.path, source)
    arguments = editing_arguments(net, c.network, c.sampling, sigma, labels)
    make_folder(c.outdir)
    pairs, shown, bad = list(itertools.product(range(len(source.names)), c.seeds)), [], []
    print(
        printable(
            f'Editing {len(source.names)} images {len(c.seeds)} times to "{c.outdir}" '
            f'({arguments["solver"]}, up to {arguments["steps"]} evaluations each)...'
        )
    )
    for part in tqdm.tqdm(
        list(generation.split_batches(pairs, c.batch)), unit='batch', dynamic_ncols=True, disable=None
    ):
        places, seeds = map(list, zip(*part))
        images = source.read(places)
        known, results, finite = edit_batch(
            net, task, images, seeds, None if labels is None else labels[places], **arguments
        )
        bad += save_finite(results, finite, [f'{source.names[i]}-{seed:06d}' for i, seed in part], c.outdir)
        shown += [tensors for i, *tensors in zip(places, images, known.cpu(), results.cpu()) if i < SHOWN]
    refuse_nonfinite(bad, len(pairs), c.outdir)
    write_before_and_after(shown, c.seeds, c.outdir)


def save_finite(images: Tensor, finite: Tensor, names: Sequence[str], outdir: str) -> list[str]:
    """Write images, uint8 [N, C, H, W], to `outdir`/images/NAME.png, those that are finite; returns the names of the others.

    At the names of the others nothing stays, of an earlier run, that would pass for one of this run's.
    """
    from sampling import generation

    path_of = lambda name: os.path.join(outdir, 'images', f'{name}.png')
    finite = finite.tolist()
    generation.save_images(
        images[[i for i, sound in enumerate(finite) if sound]],
        [path_of(name) for name, sound in zip(names, finite) if sound],
    )
    bad = [name for name, sound in zip(names, finite) if not sound]
    for name in bad:
        remove(path_of(name))
    return bad


def refuse_nonfinite(bad: Sequence[str], count: int, outdir: str) -> None:
    """Raises: NotFinite that names the images, of `count`, if there are any; a grid that an earlier run left is removed."""
    if not bad:
        return
    remove(os.path.join(outdir, 'grid.png'))
    named = ', '.join(bad[:NAMED]) + (f' and {len(bad) - NAMED} more' if len(bad) > NAMED else '')
    raise NotFinite(
        f'{len(bad)} of {count} images {"is" if len(bad) == 1 else "are"} not finite (NaN or infinite values): {named}. '
        f'Not written to {outdir}, nor is grid.png; the others are there. The network is broken for them, or overflows with these '
        'sampling options.',
        nonfinite=len(bad),
    )


def write_before_and_after(shown: Sequence[Sequence[Tensor]], seeds: Sequence[int], outdir: str) -> None:
    """The grid: a column for each image; its rows are the input, what is known of it, and a result for each seed.

    Args:
        shown: (input, known, result), uint8 [C, H, W], of each image and, within it, each seed.
    """
    inputs, known = ([three[i] for three in shown[:: len(seeds)]] for i in (0, 1))
    rows = {'input': inputs, 'what is known of it': known}
    rows |= {f'seed {seed}': [three[2] for three in shown[k :: len(seeds)]] for k, seed in enumerate(seeds)}
    if all(a.shape == b.shape and bool((a == b).all()) for a, b in zip(inputs, known)):
        del rows['what is known of it']
    write_grid(list(rows.values()), outdir)
    print(f'Rows of {os.path.join(outdir, "grid.png")}: {", ".join(rows)}')


def write_grid(rows: Sequence[Sequence[Tensor]], outdir: str) -> None:
    """`outdir`/grid.png of rows of uint8 images [C, H, W]; smaller ones are enlarged to the largest, and all to a size that can be seen."""
    import torch

    from sampling import editing, generation

    flat = [image for row in rows for image in row]
    channels, size = max(len(image) for image in flat), max(image.shape[-1] for image in flat)
    factor = max(1, -(-SIDE // size))
    cells = [
        editing.repeat(image[None].expand(1, channels, -1, -1), factor * size // image.shape[-1])
        for image in flat
    ]
    padded = torch.nn.functional.pad(torch.cat(cells), (0, GAP, 0, GAP), value=96)
    generation.save_images(
        generation.image_grid(padded, len(rows[0]))[None], [os.path.join(outdir, 'grid.png')]
    )


def make_folder(outdir: str) -> None:
    """The folder, or a UserError before any work is done."""
    try:
        os.makedirs(outdir, exist_ok=True)
    except OSError as error:
        raise UserError(f'--outdir={outdir} cannot be made: {error.strerror}') from error


# ----------------------------------------------------------------------------
# The command line.


def editing_options(steps: str):
    """A decorator: the options that all edits of images have, as one argument `c`. `steps`: the default number, in words."""
    options = [
        cli.option(
            '--network',
            metavar='PKL|URL',
            type=cli.PATH,
            required=True,
            help='Snapshot of a student or a consistency model.',
        ),
        cli.option(
            '--input',
            'path',
            metavar='PATH',
            type=cli.PATH,
            required=True,
            help='An image, or a folder, zip or array of images; labels of its dataset.json are used.',
        ),
        cli.option(
            '--outdir',
            metavar='DIR',
            type=cli.PATH,
            required=True,
            help='Folder for images/NAME-SEED.png and grid.png.',
        ),
        cli.option(
            '--indices',
            metavar='LIST',
            type=cli.IntRanges(),
            help='Images of the input by their place in it, as in 0-7.  [default: all]',
        ),
        cli.option(
            '--seeds',
            metavar='LIST',
            type=cli.Seeds(),
            default='0',
            show_default=True,
            help='A result of each image for every seed.',
        ),
        cli.option(
            '--batch', metavar='INT', type=cli.BATCH, default=64, show_default=True, help='Images at a time.'
        ),
    ]

    def decorate(command):
        @functools.wraps(command)
        def collected(**values):
            c = EasyDict({name: values.pop(name) for name in names})
            return command(c, **values)

        collected = sampling_options(teachers=False, steps=steps)(collected)
        for option in reversed(options):
            collected = option(collected)
        names = ['sampling', *(parameter.name for parameter in collected.__click_params__[-len(options) :])]
        return collected

    return decorate


@click.group(cls=cli.Group)
def main():
    """Edit images with a student or a consistency model that was not trained for it (Song et al. 2023, Section 6; Meng et al. 2022).

    \b
    Make up the lower half of the first eight digits, four times each:
      python edit.py inpaint --network=demo-out/student-8/network-snapshot-000160.pkl --input=demo-out/digits.zip --indices=0-7 \\
          --box=0,4,8,8 --seeds=0-3 --outdir=edits
    \b
    Color for a gray photograph, and 256 pixels from 64:
      python edit.py colorize --network=consistency-256.pkl --input=old.png --outdir=color
      python edit.py superres --factor=4 --network=consistency-256.pkl --input=small.png --outdir=large

    What is known stays exactly so in the files: pixels outside the mask, the gray version, the averages of blocks.
    An output depends on its image and seed alone, not on the batch.
    """


EDITED_STEPS = f"the snapshot's own; {CM_STEPS} for a consistency model of one"


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
    help='What is to be made up: white in an image of the same size.',
    group='What is unknown',
)
@cli.option(
    '--box',
    metavar='LIST',
    type=Box(),
    help='Or a box: left, top, right, bottom in pixels, as in 0,4,8,8.',
    group='What is unknown',
)
@cli.option(
    '--random-share',
    metavar='FLOAT',
    type=cli.Number(min=0, max=1, min_open=True),
    help='Or this share of the pixels, the same random ones in all images.',
    group='What is unknown',
)
@editing_options(EDITED_STEPS)
def inpaint(c, mask, box, random_share):
    """Make up the pixels under a mask; the others stay as they are, byte for byte."""
    if sum(given is not None for given in (mask, box, random_share)) != 1:
        raise click.UsageError('what is unknown: give one of --mask, --box and --random-share')
    net, source = load(c.network), open_input(c.path, c.indices)
    check_shape(c.path, source.shape, [[net.img_channels, net.img_resolution, net.img_resolution]])
    edit(c, net, source, inpainting_task(unknown_pixels(net.img_resolution, mask, box, random_share)))


def unknown_pixels(
    resolution: int, mask: str | None, box: list[int] | None, random_share: float | None
) -> Tensor:
    """Boolean [H, W]. Raises: UserError where a mask or box does not fit the images, or nothing is unknown."""
    import torch

    unknown = torch.zeros(resolution, resolution, dtype=torch.bool)
    if mask is not None:
        image = read_image(mask, as_gray=True)
        if list(image.shape[2:]) != [resolution, resolution]:
            raise UserError(
                f'--mask={mask} is {image.shape[3]}x{image.shape[2]}, and the images are {resolution}x{resolution}: '
                'draw the mask in their size'
            )
        unknown = image[0, 0] >= 128
    elif box is not None:
        left, top, right, bottom = box
        if max(right, bottom) > resolution:
            raise UserError(
                f'--box={",".join(map(str, box))} goes beyond the images, which are {resolution}x{resolution}'
            )
        unknown[top:bottom, left:right] = True
    else:
        order = torch.randperm(unknown.numel(), generator=torch.Generator().manual_seed(0))
        unknown.view(-1)[order[: round(random_share * unknown.numel())]] = True
    if not unknown.any():
        raise UserError(
            f'nothing is to be made up: {f"--mask={mask} has no white" if mask else "--random-share is less than a pixel"}'
        )
    return unknown


@main.command()
@editing_options(EDITED_STEPS)
def colorize(c):
    """Make up the colors of gray images, or of color images that are turned gray first; their gray version stays."""
    net = load(c.network)
    if net.img_channels != 3:
        raise UserError(f'{c.network} makes gray images; colors take a network of RGB images')
    source = open_input(c.path, c.indices)
    check_shape(
        c.path, source.shape, [[channels, net.img_resolution, net.img_resolution] for channels in (1, 3)]
    )
    edit(c, net, source, colorization_task)


@main.command()
@cli.option(
    '--factor',
    metavar='INT',
    type=cli.Integer(min=2, max=1 << 16),
    required=True,
    help='Side of the block of pixels that each becomes.',
)
@editing_options(EDITED_STEPS)
def superres(c, factor):
    """Make up the detail of small images, or of large ones that are averaged first; the average of every block stays."""
    net = load(c.network)
    if net.img_resolution % factor:
        raise UserError(
            f'--factor={factor} does not divide {net.img_resolution}, the side of the images that {c.network} makes'
        )
    source, small = open_input(c.path, c.indices), net.img_resolution // factor
    check_shape(
        c.path, source.shape, [[net.img_channels, side, side] for side in (small, net.img_resolution)]
    )
    edit(c, net, source, superresolution_task(factor, net.img_resolution))


STARTED_STEPS = "the snapshot's own, as far as they are below --sigma"
SIGMA_HELP = 'Standard deviation of the noise, for pixels in [-1, 1]: 127.5 times as many gray levels.'


@main.command()
@cli.option('--sigma', metavar='FLOAT', type=cli.SIGMA, required=True, help=SIGMA_HELP)
@editing_options(STARTED_STEPS)
def stroke(c, sigma):
    """Images from strokes of a brush, or from any other rough image: noise is added that drowns what is wrong with them, then removed."""
    start_at(c, sigma, add_noise=True)


@main.command()
@cli.option('--sigma', metavar='FLOAT', type=cli.SIGMA, required=True, help=SIGMA_HELP)
@cli.option('--add-noise', is_flag=True, help='The images have no noise yet: add it.')
@editing_options(STARTED_STEPS)
def denoise(c, sigma, add_noise):
    """Remove noise of a known level."""
    start_at(c, sigma, add_noise)


def start_at(c: EasyDict, sigma: float, add_noise: bool) -> None:
    """Sample from images with noise."""
    net, source = load(c.network), open_input(c.path, c.indices)
    check_shape(c.path, source.shape, [[net.img_channels, net.img_resolution, net.img_resolution]])
    edit(c, net, source, start_task(sigma, add_noise), sigma)


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
    help='Two seeds or more, from each to the next.',
)
@cli.option(
    '--count',
    metavar='INT',
    type=cli.LEVELS,
    default=8,
    show_default=True,
    help='Images from one seed to the next, with both.',
)
@cli.option('--batch', metavar='INT', type=cli.BATCH, default=64, show_default=True, help='Images at a time.')
@sampling_options()
def interpolate(network, outdir, seeds, count, batch, sampling):
    """Images between those of two seeds: latents between theirs, all else that is random as the first one's."""
    import torch

    from sampling import generation
    from training.checkpoint import load_network
    from training.networks import encoders

    if len(seeds) < 2:
        raise click.UsageError('--seeds: two or more, such as 3,7')
    if any(a == b for a, b in itertools.pairwise(seeds)):
        raise click.UsageError('--seeds: there is nothing between a seed and itself.')
    net = load_network(network, 'cuda' if torch.cuda.is_available() else 'cpu')
    encoder = encoders.encoder_of(net, next(net.parameters()).device)
    arguments = sampling_arguments(net, network, **sampling)
    make_folder(outdir)
    parts = torch.linspace(0, 1, count, dtype=torch.float64).split(batch)
    made = [
        generation.checked_images(encoder, between(net, *ends, share, **arguments))
        for ends in itertools.pairwise(seeds)
        for share in parts
    ]
    images, finite = (torch.cat(tensors) for tensors in zip(*made))
    bad = save_finite(images, finite, [f'{i:06d}' for i in range(len(images))], outdir)
    refuse_nonfinite(bad, len(images), outdir)
    write_grid(images.split(count), outdir)
    print(
        f'Rows of {os.path.join(outdir, "grid.png")}: '
        + ', '.join(f'seed {a} to {b}' for a, b in itertools.pairwise(seeds))
    )


def between(net, first: int, last: int, share: Tensor, choose_labels: LabelChooser, **arguments) -> Tensor:
    """What the network draws at shares [n] of the way from one seed's latents to another's, [n, C, H, W] float64: label and later noise are
    the first's."""
    import torch

    from sampling import editing, generation
    from training import samplers

    device, shape = next(net.parameters()).device, [net.img_channels, net.img_resolution, net.img_resolution]
    noise, end = (
        generation.SeededNoise([first] * len(share), device),
        generation.SeededNoise([last], device).randn(shape),
    )
    start = noise.randn(shape).double()
    latents = editing.slerp(start, end.double().expand_as(start), share.to(device))
    labels = choose_labels(noise, net.label_dim) if net.label_dim else None
    with torch.no_grad():
        return samplers.sample(net, latents, labels, randn_like=noise.randn_like, **arguments)


if __name__ == '__main__':
    main()
