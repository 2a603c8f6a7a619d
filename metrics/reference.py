"""Reference statistics on disk, in EDM's format: an .npz file with `mu` and `sigma`; ours says how they were made too."""
from __future__ import annotations

import os
import sys
import zipfile
import zlib
from dataclasses import asdict, dataclass

import numpy as np

from dnnlib.util import UserError, atomic_write, open_url
from metrics.detectors import Detector
from metrics.frechet import check_gaussian
from torch_utils import distributed

UNREADABLE = (ValueError, OSError, EOFError, KeyError, NotImplementedError, MemoryError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Reference:
    """Statistics of a data set's features; attributes are the file's keys. What a file does not record is None.

    Attributes:
        mu, sigma: [D] and [D, D], float64.
        detector, detector_digest: name and SHA-256 of the detector's file.
        num_images: how many images they are of.
        resolution: of the images, as in '64x64x3'.
    """

    mu: np.ndarray
    sigma: np.ndarray
    detector: str | None = None
    detector_digest: str | None = None
    num_images: int | None = None
    resolution: str | None = None


def load_reference(source: str | os.PathLike) -> Reference:
    """Reference statistics from a path or URL. Pickled contents are refused, not loaded.

    Raises: UserError for a missing or broken file, missing keys, or values that are no mean and covariance.
    """
    with open_url(source) as file:
        if file.read(2) != b'PK':
            raise UserError(f'{source} is not an .npz file. Make a reference with fid.py ref.')
        file.seek(0)
        try:
            with np.load(file, allow_pickle=False) as archive:
                values = {key: archive[key] for key in Reference.__dataclass_fields__ if key in archive}
        except UNREADABLE as error:
            raise UserError(f'{source} cannot be read as an .npz file of plain arrays: {error}. Make the reference again with fid.py ref.') from error
    if missing := [key for key in ('mu', 'sigma') if key not in values]:
        raise UserError(f'{source} has no {" and no ".join(missing)}. Make a reference with fid.py ref.')
    mu, sigma = check_gaussian(values.pop('mu'), values.pop('sigma'), os.fspath(source))
    try:
        notes = {key: int(value) if key == 'num_images' else str(value) for key, value in values.items()}
    except (TypeError, ValueError) as error:
        raise UserError(f'{source}: num_images is not a number. Make the reference again with fid.py ref.') from error
    return Reference(mu, sigma, **notes)


def save_reference(path: str | os.PathLike, reference: Reference) -> None:
    """Write an .npz file that EDM's tools read too, whole or not at all."""
    with atomic_write(path) as file:
        np.savez(file, **{key: value for key, value in asdict(reference).items() if value is not None})


def check_same_detector(reference: Reference, detector: Detector, source: str | os.PathLike) -> None:
    """Refuse a reference of another detector; where `source` does not record its detector, say so on stderr.

    Raises: UserError for another detector, or another number of features once the detector's is known.
    """
    if reference.detector_digest is not None and reference.detector_digest != detector.digest:
        raise UserError(f'{source} was made with detector {reference.detector} (SHA-256 {reference.detector_digest[:12]}...), '
                        f'not with {detector.name} ({detector.digest[:12]}...). '
                        'Pass the same --detector, or make the reference again with fid.py ref.')
    if detector.dim is not None and detector.dim != len(reference.mu):
        raise UserError(f'{source} is of {len(reference.mu)} features, detector {detector.name} returns {detector.dim}. '
                        'Pass the detector that made the reference, or make the reference again with fid.py ref.')
    if reference.detector_digest is None:
        distributed.print0(f'Warning: {source} does not record its detector; taking it for {detector.name}.', file=sys.stderr)
