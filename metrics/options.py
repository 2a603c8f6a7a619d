"""The options of computing features of images, which the commands of fid.py share. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from dnnlib import cli
from dnnlib.options import FLAG, gathered, opt, options_of


@dataclass(frozen=True)
class ImageOptions:
    heading: ClassVar[str] = ''

    skip_bad: bool = opt(
        False,
        FLAG,
        'Skip and count images that cannot be read, or that differ from the first in size or mode.',
        flags=('--skip-bad',),
    )
    seed: int = opt(0, cli.SEED, 'Random seed of subsets and resamples.', metavar='INT')


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

    batch: int = opt(64, cli.BATCH, 'Batch size per process.', metavar='INT')
    workers: int = opt(4, cli.SOME_WORKERS, 'Image decoding threads per process.', metavar='INT')
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


def feature_options() -> Callable[[Callable], Callable]:
    """A decorator for commands: these options, as a `FeatureOptions` called `options`."""
    return gathered('options', list(options_of(FeatureOptions).values()), FeatureOptions)
