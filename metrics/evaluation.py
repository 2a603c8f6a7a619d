"""Shared by fid.py and search.py: metrics, their detectors and references, and one pass over the images."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import click

from dnnlib import NotFinite, UserError
from dnnlib.text import printable
from dnnlib.util import LONGEST_MESSAGE, check_writable

FEW_IMAGES = 10_000  # below, the bias of a Fréchet distance is too large to compare it
DEFAULT_NUM = 50_000  # as published values have it
PAIRED_ERROR = 'paired_error'


# ----------------------------------------------------------------------------
# Options.


class Measures(click.ParamType):
    """Option type: comma-separated names of metrics, out of all or `some`.

    Its value is {name: `Measure`}, and None for the paired error, which needs no features of images.
    """

    name = 'list'

    def __init__(self, *some: str):
        self.some = some

    def convert(self, value, param, ctx):
        from metrics.measures import MEASURES

        names, known = [name.strip() for name in value.split(',')], self.some or (*MEASURES, PAIRED_ERROR)
        for name in names:
            if name not in known or names.count(name) > 1:
                self.fail(
                    f'{name!r} is {"repeated" if name in known else "not one of " + ", ".join(known)}',
                    param,
                    ctx,
                )
        return {name: MEASURES.get(name) for name in names}


def check_detector_options(measures, options) -> None:
    """Raises: UsageError for a detector, or its digest, that no metric uses."""
    main = {measure.entry for measure in measures.values()} - {'fd_dinov2'}
    idle = ['dinov2'] * ('fd_dinov2' not in measures) + ['detector', 'detector_sha256'] * (not main)
    if given := [name for name in idle if getattr(options, name) is not None]:
        raise click.UsageError(
            f'{option_names(given)}: not used by {", ".join(measures) or PAIRED_ERROR}. '
            'fd_dinov2 uses the detector of --dinov2, all others that of --detector.'
        )


def option_names(parameters: list[str]) -> str:
    return ', '.join(
        option.opts[0] for option in click.get_current_context().command.params if option.name in parameters
    )


# ----------------------------------------------------------------------------
# Detectors and references.


def load_detectors(entries, image_shape, options) -> dict:
    """Detectors by reference entry, the main one first. The main process downloads before the others load."""
    from metrics.calc import count_features
    from metrics.detectors import load_detector
    from torch_utils import distributed

    with distributed.main_process_first():
        detectors = {
            entry: load_detector(source, distributed.get_device(), sha256)
            for entry, (source, sha256) in detector_sources(options).items()
            if entry in entries
        }

    # Their dimensions are needed before the first batch.
    for detector in detectors.values():
        count_features(detector, image_shape)
    return detectors


def detector_sources(options) -> dict[str, tuple[str, str | None]]:
    """{reference entry: (detector's file or URL, required digest)}"""
    from metrics.detectors import DINOV2, INCEPTION_URL
    from metrics.measures import FD_DINOV2, FID

    return {
        FID: (options.detector or INCEPTION_URL, options.detector_sha256),
        FD_DINOV2: (f'{DINOV2}:{options.dinov2}' if options.dinov2 else DINOV2, None),
    }


def entries_to_compare(measures) -> set[str]:
    return {measure.entry for measure in measures.values() if measure.compares}


def read_references(ref, measures, options) -> dict:
    """References by entry if `ref` is a file of statistics; {} if it is images, which are only opened.

    Called before detectors are loaded, so that a missing file, or another detector's, is reported before one
    is downloaded.
    """
    from dnnlib.util import named
    from metrics.images import open_images
    from metrics.reference import check_before_download, holds_statistics, load_reference

    entries = entries_to_compare(measures)
    with named('--ref'):
        if entries and not holds_statistics(ref):
            open_images(ref)
            return {}
        references = {entry: load_reference(ref, entry) for entry in entries}
        for entry, reference in references.items():
            check_before_download(reference, ref, *detector_sources(options)[entry])
    return references


def complete_references(references, ref, measures, detectors, sources, options) -> dict:
    """References by entry, checked; missing statistics and features are computed from the images of `ref`."""
    from metrics.reference import check_same_detector

    # Entries whose features are compared, not only their moments.
    needy = {measure.entry: name for name, measure in measures.items() if measure.reference_features}

    # References that are images have no statistics yet.
    of_images = not references
    if of_images:
        compared = {entry: detectors[entry] for entry in entries_to_compare(measures)}
        references = references_of_images(ref, compared, sources, options, keep=bool(needy))

    # Check all, and compute features that a file of statistics lacks.
    for entry, reference in references.items():
        if reference.num_images is not None and reference.num_images <= detectors[entry].dim:
            log(
                f'Warning: {ref} has {reference.num_images} images, no more than the detector has features '
                f'({detectors[entry].dim}): their covariance is singular, and the distance says little.'
            )
        for shape in dict.fromkeys(tuple(source.image_shape) for source in sources):
            check_same_detector(reference, detectors[entry], ref, list(shape))
        if entry in needy and reference.features is None and not of_images:
            references[entry] = dataclasses.replace(
                reference, features=features_of_reference(ref, needy[entry], detectors[entry], options)
            )
    return references


def references_of_images(ref, detectors, sources, options, keep: bool) -> dict:
    """References by entry, computed from the images at `ref`."""
    from metrics.calc import reference_of
    from metrics.images import open_images

    if not detectors:
        return {}
    source = open_images(ref, None, options.seed, options.skip_bad)
    if any(os.path.realpath(images.name) == os.path.realpath(ref) for images in sources):
        log(f'Warning: --images and --ref are both {ref}: the images are compared with themselves.')
    seen = features_of(source, detectors, options, keep)
    warn_about(source, next(iter(seen.values())))
    return {entry: reference_of(source, seen[entry], detector) for entry, detector in detectors.items()}


def features_of_reference(ref, measure: str, detector, options):
    """Features of the images inside an OpenAI reference. Raises: UserError if it holds none."""
    from dnnlib.downloads import local_path
    from metrics.images import ArrayImages
    from metrics.reference import reference_images

    images = reference_images(ref)
    # Most references of other programs have neither features nor images.
    if images is None:
        raise UserError(
            f'{ref} has no features, which {measure} needs. Recreate it with fid.py ref --features=50000, or '
            'give the images as --ref.'
        )
    source = ArrayImages(local_path(ref), array=images)
    return features_of(source, {measure: detector}, options, keep=True)[measure].features


# ----------------------------------------------------------------------------
# Features and warnings about images.


def features_of(source, detectors, options, keep, classes=(), pixels=False) -> dict:
    """`compute_features` with a progress bar on terminals; NotFinite ends all processes with one message."""
    from metrics.calc import compute_features
    from torch_utils import distributed

    with distributed.progress(total=len(source), unit='img', leave=True) as bar:
        try:
            return compute_features(
                source,
                detectors,
                options.batch,
                keep,
                classes,
                options.cache,
                options.workers,
                bar.update,
                pixels=pixels,
            )
        except NotFinite as error:
            distributed.fail_together(str(error))


def warn_about(source, seen, measures=None, detectors=None) -> None:
    """Print warnings about the images that affect the metrics. Raises: UserError if most were unusable."""
    # Skipped files.
    if seen.skipped > len(source) // 2:
        raise UserError(
            f'{seen.skipped} of {len(source)} images in {source.name} cannot be used, such as: '
            f'{"; ".join(seen.problems[:1])}'
        )
    if seen.skipped:
        log(
            f'Warning: {seen.skipped} of {len(source)} images in {source.name} were skipped, such as: '
            f'{"; ".join(seen.problems[:3])}'
        )
    if about := getattr(source, 'about_others', lambda: None)():
        log(f'Note: {about}.')

    # Peculiar images.
    if seen.unturned:
        log(
            f'Note: {seen.unturned} images in {source.name} have an EXIF orientation, which is ignored: '
            'pixels are used as stored.'
        )
    if seen.copies:
        log(
            f'Warning: {seen.copies} of {seen.stats.count} images in {source.name} are exact copies of '
            'others.'
        )

    # Too few images for an unbiased distance.
    for name, measure in (measures or {}).items():
        if measure.frechet and name != 'fid_inf' and seen.stats.count < FEW_IMAGES:
            title, count = measure.title.format(detectors[measure.entry].metric_name), seen.stats.count
            log(
                f'Warning: {title} of only {count} images is biased upward. Compare it only with values of '
                f'{count} images; kid is unbiased, and fid_inf extrapolates.'
            )


# ----------------------------------------------------------------------------
# Output.


def how_many(count: int, total: int, skipped: int = 0) -> str:
    """'N images', or 'a random subset of N of M images' if fewer than the usable ones are measured."""
    return f'{count} images' if count + skipped == total else f'a random subset of {count} of {total} images'


def make_folder(path) -> None:
    """Create the folder of an output file, before hours of work go into its contents.

    Raises: UserError if that, or a file in it, cannot be created.
    """
    if path is None:
        return
    if Path(path).is_dir():
        raise UserError(f'{path} is a directory. Give the name of the file to write.')
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f'Cannot create the folder of {path}: {error.strerror}. Choose another path.'
        ) from error
    check_writable(Path(path).parent)


def log(message: str) -> None:
    """Print to stderr, on the main process only, above any progress bar."""
    from tqdm import tqdm

    from torch_utils import distributed

    if distributed.is_main():
        tqdm.write(printable(message, LONGEST_MESSAGE), file=sys.stderr)
