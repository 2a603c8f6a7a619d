"""The options of computing features of images, and of the paired error, which commands share. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import click

from dnnlib import cli
from dnnlib.options import FLAG, gathered, opt, options_of
from sampling.options import SOLVERS
from training.saved_files import NETWORK_FILE

GOOD_SOLVER, GOOD_STEPS = 'heun', 256  # of a teacher's good images: 511 evaluations
LEAST_PER_CLASS = 10  # images of a class that is resampled by itself; the interval is 5 % too narrow then
PAIRS = 1000  # whose paired error has a standard error of about 1 %


@dataclass(frozen=True)
class ImageOptions:
    heading: ClassVar[str] = ''

    skip_bad: bool = opt(
        False,
        FLAG,
        'Skip and count images that cannot be read, or that differ from the first in size or mode.',
        flags=('--skip-bad',),
    )
    seed: int = opt(0, cli.SEED, 'Random seed of subsets and resamples.')


@dataclass(frozen=True)
class DetectorOptions:
    heading: ClassVar[str] = 'Detector'

    detector: str | None = opt(
        None,
        cli.PATH,
        'Feature detector: a TorchScript file from uint8 images [N, C, H, W] to features '
        f"[N, D], pytorch-fid's weights, dinov2 or dinov2:FOLDER. {cli.PROGRAM}",
        metavar='PATH|URL',
        default_text="NVIDIA's Inception, downloaded once",
    )
    dinov2: str | None = opt(
        None,
        cli.PATH,
        'Folder with DINOv2 ViT-L/14 for fd_dinov2, written by save_pretrained of transformers.',
        metavar='DIR',
        default_text='downloaded once',
    )
    detector_sha256: str | None = opt(
        None,
        None,
        'Required SHA-256 digest of the detector file.',
        flags=('--detector-sha256',),
        metavar='HEX',
    )


@dataclass(frozen=True)
class SpeedOptions:
    heading: ClassVar[str] = 'Speed'

    batch: int = opt(64, cli.BATCH, 'Batch size per process.')
    workers: int = opt(4, cli.SOME_WORKERS, 'Image decoding threads per process.')
    cache: str | None = opt(
        None,
        cli.PATH,
        'Folder of cached features, from which interrupted evaluations resume and other metrics of the same '
        'images start.',
        metavar='DIR',
    )


@dataclass(frozen=True)
class FeatureOptions(SpeedOptions, DetectorOptions, ImageOptions):
    """What `metrics.evaluation` computes features with."""


# ----------------------------------------------------------------------------
# The paired error.


class Resamples(cli.Integer):
    """A number of bootstrap resamples: 0, or enough for the 2.5 % and 97.5 % quantiles to lie among them."""

    LEAST = 40

    def __init__(self):
        super().__init__(min=0, max=1_000_000)

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if 0 < number < self.LEAST:
            self.fail(
                f'{number} resamples have no 95 % interval: give {self.LEAST} or more, or 0 for none',
                param,
                ctx,
            )
        return number


class PairsWith(NamedTuple):
    """The network of --pairs-with, and how it is sampled; None: see `pairs.good_sampler`."""

    network: str
    solver: str | None = None
    steps: int | None = None


class Teacher(click.ParamType):
    """NETWORK[:SOLVER[:STEPS]]. The network is a path or URL, which may have colons itself."""

    name = 'network'

    def convert(self, value, param, ctx):
        if isinstance(value, PairsWith):
            return value
        network, solver, steps = self._split(value, param, ctx)
        return PairsWith(NETWORK_FILE.convert(network, param, ctx), solver, steps)

    def _split(self, value: str, param, ctx) -> tuple[str, str | None, int | None]:
        # From the right, because only solver and steps are known not to be a name.
        head, colon, last = value.rpartition(':')
        network, _, solver = head.rpartition(':')
        if os.path.exists(value) or not colon:
            return value, None, None
        if head and last in SOLVERS:
            return head, last, None
        if network and solver in SOLVERS and re.fullmatch('[0-9]+', last):
            return network, solver, cli.STEPS.convert(last, param, ctx)
        # A word after the last colon is a mistake about solver or steps; names have a suffix or a slash.
        if not head or solver in SOLVERS or re.fullmatch(r'[\w-]*', last):
            self.fail(
                f'{cli.shown(value)} is not NETWORK[:SOLVER[:STEPS]], as in '
                f'teacher.pkl:{GOOD_SOLVER}:{GOOD_STEPS}, with a solver of {", ".join(SOLVERS)}',
                param,
                ctx,
            )
        return value, None, None


@dataclass(frozen=True)
class PairOptions:
    heading: ClassVar[str] = 'Paired error'

    pairs_with: PairsWith | None = opt(
        None,
        Teacher(),
        'Also compute the paired error: the distance of each image from the one that this network makes of '
        'the '
        "same seed and label, over the data's standard deviation. A teacher is sampled by the solver with "
        'so many steps.',
        flags=('--pairs-with',),
        metavar='PKL[:SOLVER[:STEPS]]',
        default_text=f"none; its solver {GOOD_SOLVER} with {GOOD_STEPS} steps, a student's own",
    )
    pairs_num: int | None = opt(
        None,
        cli.TWO_IMAGES,
        'Number of pairs, of the first seeds.',
        flags=('--pairs-num',),
        default_text=f'{PAIRS}, or all if they are fewer',
    )


UNPAIRED = PairOptions()


def pair_options() -> Callable[[Callable], Callable]:
    """A decorator for commands: these options, as `PairOptions` called `pairs`."""
    return gathered('pairs', list(options_of(PairOptions).values()), PairOptions)


# ----------------------------------------------------------------------------
# Features.


def feature_options() -> Callable[[Callable], Callable]:
    """A decorator for commands: these options, as a `FeatureOptions` called `options`."""
    return gathered('options', list(options_of(FeatureOptions).values()), FeatureOptions)
