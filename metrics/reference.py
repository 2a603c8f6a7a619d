"""Reference statistics on disk.

- ours, `.npz`: `mu`, `sigma`, and where known `detector`, `detector_digest`, `num_images`, `resolution`,
  `features`, `pixel_std`
- EDM and pytorch-fid, `.npz`: `mu`, `sigma`
- OpenAI's guided-diffusion, `.npz`: `mu`, `sigma`; `arr_0`, some images; `mu_s`, `sigma_s`, spatial features,
  which are not used
- EDM2, `.pkl`: `{'num_images': ..., 'fid': {'mu': ..., 'sigma': ...}, 'fd_dinov2': {...}}`

An entry holds the statistics of one detector. Ours has `fid` under plain keys, where other tools look for it,
and others behind their name: `fd_dinov2.mu`. Nothing in a file is executed: arrays of Python objects are
refused, and pickles are read as plain data.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.arrays import ArchivedArrays, may_be_images
from dnnlib.downloads import local_path
from dnnlib.file_kind import another_kind
from dnnlib.limits import MAX_TEXT, PICKLED_REFERENCE, UNREADABLE, check_size
from dnnlib.npy import Header
from dnnlib.text import printable
from dnnlib.util import UserError, atomic_write
from metrics.detectors import DINOV2, INCEPTION_URL, Detector
from metrics.frechet import check_gaussian
from torch_utils import distributed
from torch_utils.restricted_pickle import MalformedPickle, plain, read_pickle
from torch_utils.stored_arrays import PICKLE_NAMES, StoredArray, stored_array

MAIN_ENTRY = 'fid'
WANTED = 'reference statistics (.npz, made by fid.py ref)'
AGAIN = 'Recreate the reference with fid.py ref.'
ORIGINAL = 'Use the original file, or create a reference with fid.py ref.'
ROWS = 4096  # features checked at a time
KNOWN_DIMS = {INCEPTION_URL: 2048, DINOV2: 1024}  # features of the detectors that are used by default


@dataclass(frozen=True)
class Reference:
    """Statistics of a data set's features. Attributes are the file's keys, None if absent.

    Attributes:
        mu, sigma: [D] and [D, D], float64.
        detector, detector_digest: name and SHA-256 of the detector's file.
        num_images: number of images.
        resolution: width x height x channels of the images, such as '64x64x3'.
        features: [n, D] float32 of some of the images, memory-mapped.
        pixel_std: standard deviation of all values of the images, in [-1, 1].
    """

    mu: np.ndarray
    sigma: np.ndarray
    detector: str | None = None
    detector_digest: str | None = None
    num_images: int | None = None
    resolution: str | None = None
    features: np.ndarray | None = None
    pixel_std: float | None = None


def load_reference(source: str | os.PathLike, entry: str = MAIN_ENTRY) -> Reference:
    """Reference statistics from a path or URL, in any of the formats above.

    Args:
        entry: 'fid', 'fd_dinov2' or another entry of the file.
    Raises: UserError, naming file and key, for a missing or damaged file, a missing entry or key, or invalid
        values.
    """
    with _open_arrays(source) as arrays:
        # Mean and covariance, which every reference has.
        prefix = _prefix(entry)
        _check_there(arrays, entry, prefix)
        mu = _read_finite(arrays, f'{prefix}mu')
        sigma = _read_covariance(arrays, f'{prefix}sigma', mu)

        # What else the file records.
        notes = {
            name: read(arrays, f'{prefix}{name}')
            for name, read in NOTES.items()
            if f'{prefix}{name}' in arrays.keys
        }
        # OpenAI's files do not record a resolution, but some of the images show it.
        if 'resolution' not in notes and not prefix and 'arr_0' in arrays.keys:
            notes['resolution'] = _resolution_of_images(arrays)
        if f'{prefix}features' in arrays.keys:
            notes['features'] = _map_features(arrays, f'{prefix}features', len(mu), notes.get('num_images'))
    return Reference(mu, sigma, **notes)


def recorded_deviation(source: str | os.PathLike) -> float | None:
    """`pixel_std` of any entry of a reference, which is the same in all; None if none has it."""
    with _open_arrays(source) as arrays:
        keys = [key for key in arrays.keys if key == 'pixel_std' or key.endswith('.pixel_std')]
        return _read_deviation(arrays, keys[0]) if keys else None


def holds_statistics(source: str | os.PathLike) -> bool:
    """False for a folder, zip or array of images; True for statistics, and for anything unusable."""
    if os.path.isdir(source) or os.path.splitext(os.fspath(source))[1].lower() in ('.zip', '.npy'):
        return False
    with _open_arrays(source) as arrays:
        # References of OpenAI have both: images in arr_0, and statistics, which are of more images.
        if 'arr_0' in arrays.keys or any(
            key in ('mu', 'sigma') or key.endswith(('.mu', '.sigma')) for key in arrays.keys
        ):
            return 'mu' in arrays.keys or 'arr_0' not in arrays.keys
        return not any(may_be_images(arrays.header(key)) for key in arrays.keys)


def reference_images(source: str | os.PathLike) -> np.ndarray | None:
    """Images in an OpenAI reference, uint8 [N, H, W, 3], memory-mapped; None if there are none.

    These are about 10,000 images; `mu` and `sigma` are of many more.
    """
    with _open_arrays(source) as arrays:
        if 'arr_0' not in arrays.keys:
            return None
        _resolution_of_images(arrays)
        return arrays.map('arr_0')


def save_reference(path: str | os.PathLike, entries: Mapping[str, Reference]) -> None:
    """Write an .npz file atomically; other tools read its entry 'fid'.

    Args:
        entries: references by name, such as {'fid': ..., 'fd_dinov2': ...}.
    """
    with atomic_write(path) as file:
        np.savez(
            file,
            **{
                f'{_prefix(entry)}{key}': value
                for entry, reference in entries.items()
                for key, value in vars(reference).items()
                if value is not None
            },
        )


def check_same_detector(
    reference: Reference, detector: Detector, source: str | os.PathLike, image_shape: list[int] | None = None
) -> None:
    """Refuse another detector's reference; warn on stderr about an unrecorded detector or another resolution.

    Args:
        image_shape: [C, H, W] of the images to compare. Channels may differ: gray images become color images.
    Raises: UserError for another detector, or another number of features if the detector's is known.
    """
    _check_features(reference, source, detector.name, detector.digest, detector.dim)

    # What is unknown or only doubtful is a warning.
    if reference.detector_digest is None:
        distributed.print0(
            printable(f'Warning: {source} does not record its detector; assuming {detector.name}.'),
            file=sys.stderr,
        )
    if image_shape is not None and reference.resolution is not None:
        width, height, _ = reference.resolution.split('x')
        if [int(height), int(width)] != list(image_shape[1:]):
            distributed.print0(
                printable(
                    f'Warning: {source} is of {width}x{height} images, but these are '
                    f'{image_shape[2]}x{image_shape[1]}: the distance includes the difference in sharpness.'
                ),
                file=sys.stderr,
            )


def check_before_download(
    reference: Reference, source: str | os.PathLike, detector: str, sha256: str | None = None
) -> None:
    """The same as far as it is known without the detector's file: by its `sha256`, or the one in `detector`, and
    by the numbers of features of the default detectors."""
    place, _, pinned = str(detector).partition('#sha256=')
    name = os.path.splitext(os.path.basename(place))[0]
    _check_features(reference, source, name, (sha256 or pinned).lower() or None, KNOWN_DIMS.get(place))


def _check_features(
    reference: Reference, source: str | os.PathLike, name: str, digest: str | None, dim: int | None
) -> None:
    """Raises: UserError for another detector's reference. `digest`, `dim`: None if unknown."""
    known, made_with = (
        reference.detector_digest,
        f' of detector {reference.detector}' * bool(reference.detector),
    )
    # Digests identify a detector; without them, the number of features still tells many apart.
    if None not in (known, digest) and known != digest:
        raise UserError(
            f'{source} was made with detector {reference.detector} (SHA-256 {known[:12]}...), not with '
            f'{name} ({digest[:12]}...). Pass the same --detector, or recreate the reference with fid.py ref.'
        )
    if dim is not None and dim != len(reference.mu):
        raise UserError(
            f'{source} has {len(reference.mu)} features{made_with}, but detector {name} returns {dim}. '
            'Pass the detector that made the reference, or recreate the reference with fid.py ref.'
        )


# ----------------------------------------------------------------------------
# Entries and their keys.


def _prefix(entry: str) -> str:
    return '' if entry == MAIN_ENTRY else f'{entry}.'


def _check_there(arrays: ArchivedArrays | PickledArrays, entry: str, prefix: str) -> None:
    """Raises: UserError, listing what the file has, if it lacks the entry or its mean or covariance."""
    # List the keys, and the entries that have a mean.
    missing = [f'{prefix}{key}' for key in ('mu', 'sigma') if f'{prefix}{key}' not in arrays.keys]
    keys = [key for key in arrays.keys if key.isprintable()]
    others = [
        key.removesuffix('mu').removesuffix('.') or MAIN_ENTRY
        for key in keys
        if key == 'mu' or key.endswith('.mu')
    ]

    # Name the most likely cause.
    if len(missing) == 2 and others:
        raise UserError(
            f'{arrays.name} has no entry {entry}, only {", ".join(others)}. '
            f'Create one with fid.py ref --metrics={",".join([*others, entry])}.'
        )
    is_archive = isinstance(arrays, ArchivedArrays)
    if not arrays.keys and is_archive and (kind := _another_kind(arrays.path)):
        raise UserError(f'{arrays.name} holds no statistics: it {kind}')
    if missing:
        held = f' (it holds {", ".join(keys[:4])}{", ..." if len(keys) > 4 else ""})' if keys else ''
        raise UserError(
            f'{arrays.name} has no {" and no ".join(missing)}{held}. Create a reference with fid.py ref.'
        )


def _read_finite(arrays: ArchivedArrays | PickledArrays, key: str) -> np.ndarray:
    """A float64 array without NaN and infinity."""
    values = arrays.read(key)
    if values.dtype.kind not in 'fiu':
        raise UserError(f'{arrays.name}: {key} has type {values.dtype}, not real numbers. {AGAIN}')
    values = values.astype(np.float64, copy=False)
    if not np.isfinite(values).all():
        raise UserError(
            f'{arrays.name}: {key} has values that are NaN or infinite. Check detector and images. {AGAIN}'
        )
    return values


def _read_covariance(arrays: ArchivedArrays | PickledArrays, key: str, mu: np.ndarray) -> np.ndarray:
    """The covariance [D, D] for a mean [D]; the shape is checked before values are read."""
    # A covariance of the wrong size may be huge.
    shape = arrays.header(key).shape
    if mu.ndim != 1 or len(mu) == 0 or shape != (len(mu), len(mu)):
        raise UserError(
            f'{arrays.name}: a mean of shape {list(mu.shape)} does not match {key} of shape {list(shape)}; '
            f'expected [D] and [D, D]. {AGAIN}'
        )
    _, sigma = check_gaussian(mu, _read_finite(arrays, key), f'{arrays.name}: {key}')
    if sigma.diagonal().min() < 0:
        raise UserError(
            f'{arrays.name}: {key} is not a covariance: feature {sigma.diagonal().argmin()} has a negative '
            f'variance. {AGAIN}'
        )
    return sigma


def _read_text(arrays: ArchivedArrays | PickledArrays, key: str) -> str:
    value = arrays.read(key)
    if value.ndim or value.dtype.kind != 'U':
        raise UserError(f'{arrays.name}: {key} is not text. {AGAIN}')
    return str(value)


def _read_count(arrays: ArchivedArrays | PickledArrays, key: str) -> int:
    value = arrays.read(key)
    if value.ndim or value.dtype.kind not in 'iu' or value < 1:
        raise UserError(f'{arrays.name}: {key} is not a number of images. {AGAIN}')
    return int(value)


def _read_resolution(arrays: ArchivedArrays | PickledArrays, key: str) -> str:
    text = _read_text(arrays, key)
    if not re.fullmatch(r'[0-9]{1,6}x[0-9]{1,6}x[0-9]{1,3}', text):
        raise UserError(
            f'{arrays.name}: {key} is {text[:40]!r}, not width x height x channels as in 64x64x3. {AGAIN}'
        )
    return text


def _read_deviation(arrays: ArchivedArrays | PickledArrays, key: str) -> float:
    value = arrays.read(key)
    if value.ndim or value.dtype.kind != 'f' or not 0 <= value <= 1:
        raise UserError(f'{arrays.name}: {key} is not a standard deviation of values in [-1, 1]. {AGAIN}')
    return float(value)


NOTES = dict(
    detector=_read_text,
    detector_digest=_read_text,
    num_images=_read_count,
    resolution=_read_resolution,
    pixel_std=_read_deviation,
)


def _map_features(
    arrays: ArchivedArrays | PickledArrays, key: str, dim: int, num_images: int | None
) -> np.ndarray:
    """float32 [n, D], memory-mapped and verified."""
    # Check type and shape before reading.
    header = arrays.header(key)
    if (
        header.dtype.kind != 'f'
        or len(header.shape) != 2
        or header.shape[1] != dim
        or header.shape[0] > (num_images or header.shape[0])
    ):
        raise UserError(
            f'{arrays.name}: {key} is {header.dtype} {list(header.shape)}; expected float32 '
            f'[at most {num_images or "N"}, {dim}]. {AGAIN}'
        )

    # Check the values a few rows at a time, so that only they are in memory.
    features = arrays.map(key, verify=True)
    if not all(np.isfinite(features[row : row + ROWS]).all() for row in range(0, len(features), ROWS)):
        raise UserError(
            f'{arrays.name}: {key} has values that are NaN or infinite. Check detector and images. {AGAIN}'
        )
    return features.astype(np.float32, copy=False)


def _resolution_of_images(arrays: ArchivedArrays | PickledArrays) -> str:
    """Resolution of OpenAI's `arr_0` from its header. Raises: UserError unless it holds color images."""
    header = arrays.header('arr_0')
    if header.dtype != np.uint8 or len(header.shape) != 4 or header.shape[3] != 3:
        raise UserError(
            f'{arrays.name}: arr_0 is {header.dtype} {list(header.shape)}, not images, uint8 [N, H, W, 3]. '
            f'{ORIGINAL}'
        )
    _, height, width, channels = header.shape
    return f'{width}x{height}x{channels}'


# ----------------------------------------------------------------------------
# Files.


def _open_arrays(source: str | os.PathLike) -> ArchivedArrays | PickledArrays:
    """The arrays of a file in any of the formats, under our keys."""
    # The first bytes tell zip archives and pickles apart.
    path = local_path(source)
    try:
        with open(path, 'rb') as file:
            start = file.read(2)
    except OSError as error:
        raise UserError(f'Cannot read {source}: {error.strerror}. Check its permissions.') from error
    kind = _another_kind(path)
    if start == b'PK':
        return ArchivedArrays(path, source)
    if start[:1] == b'\x80' and kind is None:
        return PickledArrays(path, source)
    what = f': it {kind}' if kind else '. Create one with fid.py ref.'
    raise UserError(f"{source} is neither an .npz file nor a pickle like EDM2's references{what}")


def _another_kind(path: Path) -> str | None:
    """What a file is and what to give instead, to complete 'it ...'; None if it may hold statistics."""
    return another_kind(
        path,
        WANTED,
        own=('a NumPy .npz', 'a damaged', 'a pickle', 'text'),
        instead={
            'a zip archive': f'From a zip of images, create {WANTED}.',
            'a NumPy .npy': f'From images, create {WANTED}.',
            'a network snapshot': f'Give {WANTED}.',
        },
    )


class PickledArrays:
    """Arrays and numbers of a pickled dict and its nested dicts, under the keys of `save_reference`.

    `restricted_pickle` reads it as plain data and refuses all names but those of arrays. A context manager.
    """

    def __init__(self, path: Path, name: str | os.PathLike):
        # Read the structure; arrays stay in the file.
        self.name, self._path = os.fspath(name), path
        try:
            check_size(size := os.path.getsize(path), PICKLED_REFERENCE, 'a pickled reference')
            with open(path, 'rb') as file:
                tree = read_pickle(file, size, PICKLE_NAMES)
        except UNREADABLE as error:
            raise UserError(
                f"{name} cannot be read as one of EDM2's references: it {error}. {ORIGINAL}"
            ) from error

        # Flatten to our keys; EDM2 has one `num_images` for all entries.
        self._nodes = {}
        entries = tree if isinstance(tree, dict) else {}
        shared = {key: entries[key] for key in ('num_images',) if key in entries}
        self._nodes |= {
            key: node for key, node in entries.items() if isinstance(key, str) and not isinstance(node, dict)
        }
        for entry, node in entries.items():
            if isinstance(entry, str) and isinstance(node, dict):
                self._nodes |= {
                    f'{_prefix(entry)}{key}': value
                    for key, value in (shared | node).items()
                    if isinstance(key, str)
                }

    def __enter__(self) -> PickledArrays:
        return self

    def __exit__(self, *_) -> None:
        pass

    @property
    def keys(self) -> list[str]:
        return list(self._nodes)

    def header(self, key: str) -> Header:
        found = self._find(key)
        return found.header if isinstance(found, StoredArray) else Header(found.shape, found.dtype, 'C')

    def read(self, key: str) -> np.ndarray:
        found = self._find(key)
        if not isinstance(found, StoredArray):
            return found
        with open(self._path, 'rb') as file:
            return found.read(file)

    def map(self, key: str, verify: bool = False) -> np.ndarray:
        return self.read(key)

    def _find(self, key: str) -> StoredArray | np.ndarray:
        """An array whose values are still in the file, or a number, text or list of numbers as an array."""
        node = self._nodes[key]
        try:
            return stored_array(node) or _plain_array(node)
        except UNREADABLE as error:
            raise UserError(
                f'{self.name}: {key} is not a readable plain array: it {error}. {ORIGINAL}'
            ) from error


def _plain_array(node) -> np.ndarray:
    """Array of a number, a text or a list of numbers.

    Lists of texts are refused: an array would give each text the memory of the longest, and statistics have
    none.
    """
    value = plain(node)
    if isinstance(value, (list, tuple)):
        return np.array(value, np.float64)
    if not isinstance(value, (int, float, str)) or len(str(value)) > MAX_TEXT:
        raise MalformedPickle(f'is of type {type(node).__name__}')
    return np.array(value)
