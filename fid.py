"""Fréchet Inception distance (Heusel et al. 2017) between images and reference statistics."""
from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import click

from dnnlib import cli
from dnnlib.util import UserError, atomic_write

FEW_IMAGES = 10_000


def shared_options(command):
    """The options that `calc` and `ref` have in common."""
    for option in reversed([
        cli.option('--seed', metavar='INT', type=click.IntRange(min=0), default=0, show_default=True, help='Which random subset; the bootstrap too.'),
        cli.option('--batch', metavar='INT', type=click.IntRange(min=1), default=64, show_default=True, help='Images at a time, for each process.'),
        cli.option('--detector', metavar='PATH|URL',
                   help="TorchScript file: uint8 images [N, C, H, W] to features [N, D].  [default: NVIDIA's Inception, downloaded once]"),
        cli.option('--detector-sha256', metavar='HEX', help='Digest that the detector file must have.'),
    ]):
        command = option(command)
    return command


@click.group(cls=cli.Group)
def main():
    """Fréchet Inception distance (FID) of images, and the reference statistics that it needs.

    \b
    Distance of 50,000 images, in 1 or 4 processes:
      python fid.py calc --images=samples --ref=fid-refs/imagenet-64x64.npz
      torchrun --standalone --nproc_per_node=4 fid.py calc --images=samples --ref=fid-refs/imagenet-64x64.npz
    \b
    Reference statistics of a data set:
      python fid.py ref --data=datasets/imagenet-64x64.zip --dest=fid-refs/imagenet-64x64.npz

    The last line that `calc` writes to stdout is the bare number; everything else goes to stderr.
    Under torchrun put `--` before fid.py where you pass --num: recent ones take that for an option of their own.
    """


@main.command()
@cli.option('--images', 'path', metavar='PATH|ZIP', required=True, help='Images to measure: a folder (with its subfolders) or a zip.')
@cli.option('--ref', metavar='PATH|URL', required=True, help='Reference statistics: an .npz with mu and sigma.')
@cli.option('--num', metavar='INT', type=click.IntRange(min=2), default=50000, show_default=True,
            help='Images to use: a random subset where there are more, an error where there are fewer.')
@cli.option('--bootstrap', metavar='INT', type=click.IntRange(min=0), default=0, show_default=True,
            help='Resamples for a 95 % interval of the sampling noise (not the bias); each costs about one more distance. 0 for none.')
@cli.option('--json', 'json_path', metavar='FILE', help='Write the result to this file too.')
@shared_options
def calc(path, ref, num, bootstrap, json_path, seed, batch, detector, detector_sha256):
    """Distance between images and reference statistics."""
    from metrics.images import open_images
    from metrics.reference import check_same_detector, load_reference
    with _processes() as is_main:
        reference = load_reference(ref)
        images = open_images(path, num, seed)
        _make_folder(json_path)
        network = _load_detector(detector, detector_sha256, images)
        check_same_detector(reference, network, ref)
        if num < FEW_IMAGES:
            _say(f'Warning: {network.metric_name} of as few as {num} images is too high on average. Compare it with values of {num} images only.')
        stats = _statistics(images, network, batch, keep=bootstrap > 0)
        if is_main:
            value, interval = _distance(stats, reference, bootstrap, seed)
            noise = f', 95 % interval {interval[0]:.6g} to {interval[1]:.6g}' if interval else ''
            _say(f'{network.metric_name} of {stats.count} images in {path} against {ref}{noise}:')
            click.echo(f'{value:.10g}')
            _write_json(json_path, value, interval, num_images=stats.count, detector=network.name, detector_digest=network.digest, reference=ref)


@main.command()
@cli.option('--data', 'path', metavar='PATH|ZIP', required=True, help='Data set: a folder (with its subfolders) or a zip.')
@cli.option('--dest', metavar='FILE', required=True, help='The .npz to write.')
@cli.option('--num', metavar='INT', type=click.IntRange(min=2), help='Images to use, a random subset.  [default: all]')
@shared_options
def ref(path, dest, num, seed, batch, detector, detector_sha256):
    """Reference statistics of a data set."""
    from metrics.images import open_images
    from metrics.reference import Reference, save_reference
    with _processes() as is_main:
        images = open_images(path, num, seed)
        _make_folder(dest)
        network = _load_detector(detector, detector_sha256, images)
        stats = _statistics(images, network, batch)
        if is_main:
            channels, height, width = images.image_shape
            save_reference(dest, Reference(stats.mu, stats.sigma, network.name, network.digest, stats.count, f'{width}x{height}x{channels}'))
            _say(f'Statistics of {stats.count} images written to {dest}')


@contextlib.contextmanager
def _processes():
    """Join the other processes, if there are some; yields whether this is the one that reports."""
    from torch_utils import distributed
    distributed.init()
    yield distributed.is_main()
    distributed.shutdown()


def _load_detector(source, sha256, images):
    """The detector, having seen one image so that it knows how many features it returns. The main process goes first and downloads."""
    import torch

    from metrics.detectors import INCEPTION_URL, load_detector
    from torch_utils import distributed
    with distributed.main_process_first():
        detector = load_detector(source or INCEPTION_URL, distributed.get_device(), sha256)
    detector(torch.from_numpy(images[0][0])[None])
    return detector


def _statistics(images, detector, batch, keep=False):
    """Feature statistics of all images, over all processes; with a bar on stderr where a person is watching."""
    from tqdm import tqdm

    from metrics.calc import feature_statistics
    from metrics.images import image_batches
    from torch_utils import distributed
    batches = image_batches(images, batch, distributed.get_rank(), distributed.get_world_size())
    total = -(-len(images) // (batch * distributed.get_world_size()))
    hidden = None if distributed.is_main() else True  # None: unless stderr is a terminal
    return feature_statistics(tqdm(batches, total=total, unit='batch', disable=hidden), detector, keep)


def _distance(stats, reference, bootstrap, seed):
    """(distance, its interval or None)"""
    from metrics.frechet import frechet_distance
    from metrics.statistics import bootstrap_interval
    value = frechet_distance(stats.mu, stats.sigma, reference.mu, reference.sigma)
    interval = bootstrap_interval(stats.features, reference.mu, reference.sigma, num=bootstrap, seed=seed) if bootstrap else None
    return value, interval


def _write_json(path, value, interval, **facts):
    if path is None:
        return
    result = dict(value=value, **(dict(interval=interval) if interval else {}), **facts)
    with atomic_write(path) as file:
        file.write(json.dumps(dict(fid=result), indent=2).encode() + b'\n')


def _make_folder(path):
    """The folder of a file to be written, before hours of work go into its contents."""
    if path is None:
        return
    if Path(path).is_dir():
        raise UserError(f'{path} is a directory. Give the name of the file to write.')
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'Cannot create the folder of {path}: {error.strerror}. Choose another place.') from error


def _say(message):
    from torch_utils import distributed
    distributed.print0(message, file=sys.stderr, flush=True)


if __name__ == '__main__':
    main()
