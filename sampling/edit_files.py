"""Editing of image files: read, run a task of sampling/editing.py, write the results."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import tqdm
from torch import Tensor

from data.image_files import ImageFiles
from data.label_file import read_labels
from data.label_space import Labels, space_of
from data.pixels import (
    UNREADABLE,
    Picture,
    describe_shape,
    image_pixels,
    image_shape_of,
    is_16_bit,
    open_image,
    oriented,
)
from dnnlib import NotFinite, UserError
from dnnlib.file_kind import describe_file
from dnnlib.text import printable
from dnnlib.util import named, remove
from sampling import editing, generation
from sampling.editing import Task
from sampling.generation import LabelChooser
from sampling.label_choosers import given_labels
from sampling.options import CM_EDIT_STEPS, EDITING_SOLVERS, EditJob, sampling_arguments
from training import samplers
from training.checkpoint import load_network
from training.networks import encoders

SHOWN = 16  # images of the input in the grid
NAMED = 20  # images in an error
SIDE, GAP = 64, 2  # least side of an image in the grid, and space between images, in pixels

# ----------------------------------------------------------------------------
# Input.


class Input(NamedTuple):
    """Chosen images on disk, read on demand.

    Attributes:
        names: relative paths without extension.
        read: function of indices among the chosen images that returns uint8 [n, C, H, W].
        shape: [C, H, W].
        read_labels: returns [N] class indices or [N, D] vectors; None if the input has none.
    """

    names: list[str]
    read: Callable[[Sequence[int]], Tensor]
    shape: list[int]
    read_labels: Callable[[], np.ndarray | None]


def is_single(path: str) -> bool:
    """Whether a path is a single image."""
    return os.path.isfile(path) and os.path.splitext(path)[1].lower() not in ('.zip', '.npz', '.npy')


def single_input(path: str, indices: list[int] | None) -> Input:
    """A single image. Raises: UserError."""
    if indices not in (None, [0]):
        raise UserError(f'--indices: {path} is a single image; leave the option out')
    image = read_image(path)
    name = os.path.splitext(os.path.basename(path))[0]
    return Input([name], lambda places: image[[0] * len(places)], list(image.shape[1:]), lambda: None)


def chosen_input(source, files: ImageFiles | None, path: str, indices: list[int] | None) -> Input:
    """The images at `indices` of several; None: all of them.

    Args:
        source: the images, as in metrics/images.py.
        files: their files; None for an array.
    Raises: UserError.
    """
    chosen = list(range(len(source))) if indices is None else indices
    if max(chosen) >= len(source):
        raise UserError(
            f'--indices={max(chosen)} does not exist: {path} holds the {len(source)} images '
            f'0 to {len(source) - 1}'
        )

    # Results are named after their images, so names must be unique.
    names = [os.path.splitext(files.images[i])[0] if files else f'{i:06d}' for i in chosen]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(
            f'{path}: {twice} would be edited twice, into the same file: give each image a name, '
            'and list each index once in --indices'
        )

    # Find other sizes before any image is edited.
    if files:
        check_headers(files, chosen, source.image_shape)

    def labels_of_chosen():
        labels = read_labels(files) if files else None
        return None if labels is None else labels[chosen]

    read = lambda places: source.batch([chosen[i] for i in places])[0]
    return Input(names, read, source.image_shape, labels_of_chosen)


def check_headers(files: ImageFiles, chosen: Sequence[int], shape: Sequence[int]) -> None:
    """Raises: UserError if a chosen image has another `shape` [C, H, W]."""
    for i in chosen:
        name = files.images[i]
        # The header alone, because decoding takes most of the time.
        with files.open_image(name) as image:
            own = image_shape_of(image, f'{files.path}: {name}')
        if list(own) != list(shape):
            found, first = describe_shape(own), describe_shape(shape)
            raise UserError(
                f'{files.path}: {name} is {found}, but {files.images[0]} is {first}: '
                'put those of one size and mode into a folder of their own'
            )


def read_image(path: str, as_gray: bool = False) -> Tensor:
    """An image file, oriented by its EXIF data: uint8 [1, C, H, W]. Raises: UserError.

    Args:
        as_gray: convert 8-bit images of any mode to gray.
    """
    cure = 'save it as 8-bit gray' if as_gray else 'save it as 8-bit gray or RGB'
    try:
        with open_image(path) as opened:
            # What has no plain 8-bit gray version is refused by its own message.
            convert = as_gray and not is_16_bit(opened) and opened.mode != 'LAB'
            if not convert:
                image_shape_of(opened, path, cure)
            picture = oriented(Picture.load(opened), upright=True)
            pixels = image_pixels(picture.convert('L') if convert else picture)
            return torch.from_numpy(pixels.copy())[None]
    except UNREADABLE as error:
        # What the file is says more than Pillow's error, unless it is an image after all.
        kind = describe_file(path) if os.path.isfile(path) and os.access(path, os.R_OK) else None
        reason = (
            f'it is {kind}'
            if kind and not kind.endswith(' image')
            else getattr(error, 'strerror', None) or error
        )
        raise UserError(f'{path} is not a readable image ({reason})') from error


def check_shape(path: str, shape: Sequence[int], wanted: Sequence[Sequence[int]]) -> None:
    """Raises: UserError, with cures, for images of none of the `wanted` shapes [C, H, W]."""
    if list(shape) in [list(one) for one in wanted]:
        return
    it, what = ('it', 'is an image') if is_single(path) else ('them', 'has images')
    cures = []
    # Cures by what differs: the size, the channels, or both.
    if list(shape[1:]) not in [list(one[1:]) for one in wanted]:
        cures.append(f'resize {it}')
    if shape[0] not in [one[0] for one in wanted]:
        cures.append(f'save {it} as 8-bit {"gray" if wanted[0][0] == 1 else "RGB"}')
    raise UserError(
        f'--input={path} {what} of {describe_shape(shape)}, '
        f'and here it must be {" or ".join(map(describe_shape, wanted))}: {" and ".join(cures)}'
    )


def unknown_pixels(
    resolution: int, mask: str | None, box: list[int] | None, random_share: float | None
) -> Tensor:
    """Boolean [H, W] from a mask's white, a box, or random pixels.

    Raises: UserError if a mask or box does not fit the images, or nothing is unknown.
    """
    unknown = torch.zeros(resolution, resolution, dtype=torch.bool)
    # White in the mask.
    if mask is not None:
        image = read_image(mask, as_gray=True)
        if list(image.shape[2:]) != [resolution, resolution]:
            raise UserError(
                f'--mask={mask} is {image.shape[3]}x{image.shape[2]}, and the images are '
                f'{resolution}x{resolution}: draw the mask in their size'
            )
        # A mask that is scaled or compressed has grays at its edges.
        unknown = image[0, 0] >= 128
    # The inside of the box.
    elif box is not None:
        left, top, right, bottom = box
        if max(right, bottom) > resolution:
            raise UserError(
                f'--box={",".join(map(str, box))} goes beyond the images, which are {resolution}x{resolution}'
            )
        unknown[top:bottom, left:right] = True
    # The same random pixels for all images.
    else:
        order = torch.randperm(unknown.numel(), generator=torch.Generator().manual_seed(0))
        unknown.view(-1)[order[: round(random_share * unknown.numel())]] = True
    if not unknown.any():
        reason = f'--mask={mask} has no white' if mask else '--random-share is less than a pixel'
        raise UserError(f'nothing is unknown: {reason}')
    return unknown


# ----------------------------------------------------------------------------
# Network and its arguments.


def load(network: str):
    """A network of pixels, on the GPU if there is one. Raises: UserError for a network of latents."""
    with named('--network'):
        net = load_network(network, 'cuda' if torch.cuda.is_available() else 'cpu')
    if not isinstance(encoders.encoder_of(net), encoders.StandardRGBEncoder):
        raise UserError(
            f'{network} makes latents of a VAE, but edits keep pixels: '
            'only networks of pixels can edit. interpolate works with both.'
        )
    return net


def labels_for(net, path: str, source: Input) -> Tensor | None:
    """A data set's labels [N, label_dim]; None if it has none or the network takes none.

    Raises: UserError if they are not labels of the network.
    """
    labels = source.read_labels() if net.label_dim else None
    if labels is None:
        return None
    try:
        what = f'the label file of --input={path}'
        return torch.from_numpy(np.stack(list(Labels.checked(labels, space_of(net), what, 'the network'))))
    except UserError as error:
        raise UserError(f'{error}. Choose labels with --class or --labels') from error


def editing_arguments(
    net, network: str, sampling: dict, sigma: float | None, labels: Tensor | None = None
) -> dict:
    """Arguments of `samplers.sample`, and `choose_labels`.

    Args:
        sigma: noise level at which sampling starts from images; None for edits that project on what is known.
        labels: of the images, [N, label_dim], in place of those that `sampling` chooses.
    Raises: UserError if they do not go together, found by sampling a pixel.
    """
    # Only students and consistency models can edit.

    pixel = torch.zeros(1, net.img_channels, 1, 1)
    start = dict(start=(pixel, sigma)) if sigma else {}
    choose_labels = None if labels is None else given_labels(labels)
    arguments = sampling_arguments(net, network, **sampling, **start, choose_labels=choose_labels)
    if arguments['solver'] not in EDITING_SOLVERS or net.metadata.get('objective') == 'diffusion':
        raise UserError(
            f'{network} is a teacher, or of unknown kind, and only students and consistency models '
            'can edit: distill a teacher with train.py --objective=mcd or direct, '
            'or tune it with --objective=ect'
        )

    # A projection needs two evaluations or more: the first sees only noise.
    levels_given = any(sampling[name] is not None for name in ('steps', 'taus', 'mid_t', 'ts'))
    if not sigma and arguments['solver'] == 'cm' and arguments['steps'] < 2 and not levels_given:
        arguments['steps'] = CM_EDIT_STEPS
    if not sigma and arguments['steps'] < 2:
        raise UserError(
            'a single evaluation sees nothing of the known part, only noise: take --steps=2 or more, '
            'or a student of more steps'
        )
    generation.validate_arguments(net, **arguments)
    # It was the pixel's; each batch brings its own start.
    arguments.pop('start', None)
    return arguments


def edit_batch(
    net, task: Task, images: Tensor, seeds: Sequence[int], labels: Tensor | None, choose_labels, **arguments
) -> tuple[Tensor, Tensor, Tensor]:
    """Edit images uint8 [N, ...] with a seed each; a result depends only on its image and seed.

    Returns: (what is known, results, which results are finite): uint8 [N, C, H, W] twice, bool [N].
    """
    # The order of random numbers is that of generate.py: latents, label, noise of the sampler.
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


def edit(job: EditJob, net, source: Input, task: Task, sigma: float | None = None) -> None:
    """Edit every image once for every seed: `outdir`/images/NAME-SEED.png and `outdir`/grid.png.

    Args:
        sigma: see `editing_arguments`.
    Raises: NotFinite, at the end, for non-finite results, which are not written, nor is the grid.
    """
    # Labels of the input, unless others are given.
    chosen = job.sampling['class_idx'] is not None or job.sampling['labels'] is not None
    labels = None if chosen else labels_for(net, job.path, source)
    arguments = editing_arguments(net, job.network, job.sampling, sigma, labels)
    make_folder(job.outdir)
    what = f'Editing {len(source.names)} images {len(job.seeds)} times to "{job.outdir}"'
    print(printable(f'{what} ({arguments["solver"]}, up to {arguments["steps"]} evaluations each)...'))

    # Edit every image with every seed, in batches; keep the first few for the grid.
    pairs, shown, bad = list(itertools.product(range(len(source.names)), job.seeds)), [], []
    batches = list(generation.split_batches(pairs, job.batch))
    for batch in tqdm.tqdm(batches, unit='batch', dynamic_ncols=True, disable=None):
        places, seeds = map(list, zip(*batch))
        images, batch_labels = source.read(places), None if labels is None else labels[places]
        known, results, finite = edit_batch(net, task, images, seeds, batch_labels, **arguments)
        names = [f'{source.names[i]}-{seed:06d}' for i, seed in batch]
        bad += save_finite(results, finite, names, job.outdir)
        # Only the first images, on the host: a grid of all would fill the memory.
        shown += [tensors for i, *tensors in zip(places, images, known.cpu(), results.cpu()) if i < SHOWN]
    refuse_nonfinite(bad, len(pairs), job.outdir)
    write_before_and_after(shown, job.seeds, job.outdir)


def save_finite(images: Tensor, finite: Tensor, names: Sequence[str], outdir: str) -> list[str]:
    """Write the finite images of uint8 [N, C, H, W] to `outdir`/images/NAME.png.

    Removes files of an earlier run with the names of the others, which would pass for results of this run.

    Returns: the names of the others.
    """
    path_of = lambda name: os.path.join(outdir, 'images', f'{name}.png')
    finite = finite.tolist()
    generation.save_images(
        images[[i for i, is_finite in enumerate(finite) if is_finite]],
        [path_of(name) for name, is_finite in zip(names, finite) if is_finite],
    )
    bad = [name for name, is_finite in zip(names, finite) if not is_finite]
    for name in bad:
        remove(path_of(name))
    return bad


def refuse_nonfinite(bad: Sequence[str], count: int, outdir: str) -> None:
    """Remove an earlier run's grid if any of `count` images are `bad`. Raises: NotFinite, naming them."""
    if not bad:
        return
    remove(os.path.join(outdir, 'grid.png'))
    named = ', '.join(bad[:NAMED]) + (f' and {len(bad) - NAMED} more' if len(bad) > NAMED else '')
    raise NotFinite(
        f'{len(bad)} of {count} images {"is" if len(bad) == 1 else "are"} not finite '
        f'(NaN or infinite values): {named}. '
        f'Not written to {outdir}, nor is grid.png; the others are there. The network is broken for them, '
        'or overflows with these sampling options.',
        nonfinite=len(bad),
    )


def write_before_and_after(shown: Sequence[Sequence[Tensor]], seeds: Sequence[int], outdir: str) -> None:
    """Write the grid: a column per image, with rows of the input, what is known of it, and a result per seed.

    Args:
        shown: (input, known, result), uint8 [C, H, W], by image, then seed.
    """
    # `shown` has all seeds of the first image, then those of the second.
    inputs, known = ([three[i] for three in shown[:: len(seeds)]] for i in (0, 1))
    rows = {'input': inputs, 'what is known of it': known}
    rows |= {f'seed {seed}': [three[2] for three in shown[k :: len(seeds)]] for k, seed in enumerate(seeds)}
    if all(a.shape == b.shape and bool((a == b).all()) for a, b in zip(inputs, known)):
        del rows['what is known of it']
    write_grid(list(rows.values()), outdir)
    print(f'Rows of {os.path.join(outdir, "grid.png")}: {", ".join(rows)}')


def write_grid(rows: Sequence[Sequence[Tensor]], outdir: str) -> None:
    """Write `outdir`/grid.png of rows of uint8 images [C, H, W]."""
    # Enlarge small images to the largest, and all to at least `SIDE`.
    flat = [image for row in rows for image in row]
    channels, size = max(len(image) for image in flat), max(image.shape[-1] for image in flat)
    factor = max(1, -(-SIDE // size))  # rounded up, so that each is at least SIDE
    cells = [
        editing.repeat(image[None].expand(1, channels, -1, -1), factor * size // image.shape[-1])
        for image in flat
    ]
    padded = torch.nn.functional.pad(torch.cat(cells), (0, GAP, 0, GAP), value=96)
    # [columns · rows, C, H', W'] with a gap at the right and the bottom of each.
    generation.save_images(
        generation.image_grid(padded, len(rows[0]))[None], [os.path.join(outdir, 'grid.png')]
    )


def make_folder(outdir: str) -> None:
    """Create the folder before any work is done. Raises: UserError."""
    try:
        os.makedirs(outdir, exist_ok=True)
    except OSError as error:
        raise UserError(f'--outdir={outdir} cannot be made: {error.strerror}') from error


def between(net, first: int, last: int, share: Tensor, choose_labels: LabelChooser, **arguments) -> Tensor:
    """Outputs of the network at shares [n] of the way from one seed's latents to another's.

    All other noise is the first seed's. Returns: [n, C, H, W] float64.
    """
    device, shape = next(net.parameters()).device, [net.img_channels, net.img_resolution, net.img_resolution]
    # The same seed for all, so that labels and churn noise do not change along the way.
    noise = generation.SeededNoise([first] * len(share), device)
    start = noise.randn(shape).double()
    end = generation.SeededNoise([last], device).randn(shape).double()
    latents = editing.slerp(start, end.expand_as(start), share.to(device))
    labels = choose_labels(noise, net.label_dim) if net.label_dim else None
    with torch.no_grad():
        return samplers.sample(net, latents, labels, randn_like=noise.randn_like, **arguments)
