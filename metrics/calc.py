"""Features of images and their statistics: one pass on all processes for any number of detectors.

All evaluations go through `compute_features`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dnnlib import NotFinite, UserError
from metrics.cache import FeatureCache
from metrics.detectors import Detector
from metrics.images import ImageSource
from metrics.reference import Reference
from metrics.statistics import FeatureStats
from sampling.generation import HostCopy
from torch_utils import distributed, misc


@dataclass(frozen=True)
class ImageFeatures:
    """A detector's features of a set of images. Fields after `skipped` are filled on the main process only.

    Attributes:
        stats: moments of the features, on every process.
        skipped: number of images that could not be used.
        problems: reasons why images were skipped.
        copies: number of images with the same pixels as an earlier one.
        unturned: number of images read (not cached) with an EXIF orientation, which is ignored.
        features: [n, D] float32 on the CPU, in the order of the images; None unless requested.
        probabilities: [n, K] of its classes, likewise.
        pixel_std: standard deviation of all values of the images, in [-1, 1]; None unless requested.
    """

    stats: FeatureStats
    skipped: int = 0
    problems: list[str] = field(default_factory=list)
    copies: int = 0
    features: Tensor | None = None
    probabilities: Tensor | None = None
    unturned: int = 0
    pixel_std: float | None = None


def compute_features(
    source: ImageSource,
    detectors: Mapping[str, Detector],
    batch: int,
    keep: np.ndarray | bool = False,
    classes: Container[str] = (),
    cache: str | None = None,
    workers: int = 4,
    advance: Callable[[int], object] = lambda count: None,
    stop: Callable[[], bool] | None = None,
    pixels: bool = False,
) -> dict[str, ImageFeatures] | None:
    """Features of all images under each detector, computed by all processes together.

    Batch k holds images k·batch … (k + 1)·batch − 1, whichever process computes it, and the last one is
    padded: features do not depend on the number of processes.

    Args:
        source: images (see metrics/images.py), the same on every process.
        detectors: by name, as in the result.
        keep: whether to keep features, or [len(source)] bool: of which images.
        classes: names of detectors whose class probabilities to keep.
        cache: folder of cached features; see `FeatureCache`.
        workers: decoding threads.
        advance: called with the number of images, over all processes, that each step completes.
        stop: polled by all processes together; once it returns True, the result is None. Not with a cache.
        pixels: whether to compute `pixel_std`.
    Raises: NotFinite, on all processes, if images of a network or features are not finite; UserError if
        there are no images, or one cannot be used.
    """
    # Processes take batches round-robin.
    parts = [range(start, min(start + batch, len(source))) for start in range(0, len(source), batch)]
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    keep = np.full(len(source), keep) if isinstance(keep, bool) else keep
    facts = None
    if cache:  # the main process's fingerprint: other machines' copies may have other modification times
        facts = dict(
            images=distributed.broadcast_object(source.fingerprint() if distributed.is_main() else None),
            batch=batch,
        )
    passes = {
        name: _DetectorPass(detector, source, keep, name in classes, pixels, cache, facts)
        for name, detector in detectors.items()
    }
    # Images of the round of batch k: one batch of every process.
    images_of_round = lambda k: sum(map(len, parts[k - rank : k - rank + processes]))

    # Read cached batches; those that any detector lacks are computed.
    missing = []
    for k in range(rank, len(parts), processes):
        cached = [each.load_cached(parts[k]) for each in passes.values()]
        if all(cached):
            advance(images_of_round(k))
        else:
            missing.append(k)

    # Compute the others, padded to full size: kernels, and so rounding, may depend on the batch size.
    for k, (part, images, indices) in zip(missing, source.stream([parts[k] for k in missing], workers)):
        filled = (
            torch.cat([images, images[-1:].expand(batch - len(images), -1, -1, -1)])
            if 0 < len(images) < batch
            else images
        )
        marks = dict(digests=image_digests(images), **(dict(moments=pixel_moments(images)) if pixels else {}))
        for each in passes.values():
            each.compute(part, filled, indices, marks)
        advance(images_of_round(k))
        # `stop` is collective: only in rounds in which every process has a batch.
        if stop and k - rank + processes <= len(parts) and stop():
            return None

    # Combine the processes.
    if stop and stop():
        return None
    check_finite(source, parts, passes.values())
    return {name: each.result() for name, each in passes.items()}


def check_finite(source: ImageSource, parts: Sequence[range], passes: Collection[_DetectorPass]) -> None:
    """Raises: NotFinite, on all processes, if any process met non-finite images or features.

    Without this check, a metric of the remaining images would result.
    """
    # Every process gathers all, because all must raise the same error.
    for each in passes:
        each.receive()
    own = [i for part in parts for i in source.nonfinite(part)], [each.nonfinite for each in passes]
    images, features = zip(*distributed.gather_objects(own))
    if bad := sorted(itertools.chain(*images)):
        raise NotFinite(source.describe_nonfinite(bad), nonfinite=len(bad))
    for each, count in zip(passes, map(sum, zip(*features))):
        if count:
            raise NotFinite(
                f'Detector {each.detector.name} returns features that are not finite (NaN or infinite) for '
                f'{count} of {len(source)} images of {source.name}: no metric can be computed. Use another '
                'detector, or fix this one.',
                nonfinite_features=count,
            )


def count_features(detector: Detector, image_shape: list[int]) -> None:
    """Set the detector's `dim`, if unknown, by running it on a black image [C, H, W]."""
    if detector.dim is None:
        detector(torch.zeros([1, *image_shape], dtype=torch.uint8))


class _DetectorPass:
    """One detector's features of the images that this process handles."""

    def __init__(
        self,
        detector: Detector,
        source: ImageSource,
        keep: np.ndarray,
        classes: bool,
        pixels: bool,
        cache: str | None,
        facts: dict | None,
    ):
        count_features(detector, source.image_shape)
        self.detector, self.source, self.classes, self.keep = detector, source, classes, keep
        self.marks = ['digests', *(['moments'] if pixels else [])]  # of images, whatever the detector
        self.stats = FeatureStats(detector.dim, detector.device)
        self.nonfinite = 0  # images whose features or probabilities are not finite
        # By the first image of each batch: marks, and the features and probabilities to keep.
        self.kept: dict[int, dict[str, Tensor]] = {}
        # The last batch, on its way to the host: its first image, the names of its tensors, their copies.
        self._arriving: tuple[int, list[str], HostCopy] | None = None
        self.cache = (
            FeatureCache(cache, detector.name, dict(facts, detector=detector.digest)) if cache else None
        )

    def load_cached(self, part: range) -> bool:
        """Add a batch from the cache. Returns: whether it was there."""
        names = {*self.marks, 'features', *(['probabilities'] if self.classes else [])}
        found = self.cache.load(part, names) if self.cache else None
        if found:
            self._add(part, list(part), {name: torch.from_numpy(found[name]) for name in names})
        return bool(found)

    def compute(self, part: range, images: Tensor, indices: list[int], marks: dict[str, Tensor]) -> None:
        """Add a batch, whose first `len(indices)` images count, unless it came from the cache or is empty.

        A batch with skipped images is not cached, so that they are reported every time (an error without
        --skip-bad). Neither is one with images or features that are not finite.
        """
        count = len(indices)
        self.receive()
        if part.start in self.kept or count == 0:
            return

        # Run the detector on the padded batch, then drop the padding.
        found = dict(marks)
        if self.classes:
            found['features'], found['probabilities'] = self.detector.with_probabilities(images)
        else:
            found['features'] = self.detector(images)
        found = {
            name: values[:count].float() if values.is_floating_point() else values
            for name, values in found.items()
        }
        self._add(part, indices, found)
        if self.cache and count == len(part) and self.receive() == 0 and not self.source.nonfinite(part):
            self.cache.save(part, {name: values.cpu().numpy() for name, values in found.items()})

    def _add(self, part: range, indices: list[int], found: dict[str, Tensor]) -> None:
        """Accumulate a batch."""
        # Statistics are of all images, but only some features may be wanted.
        self.stats.append(found['features'])
        rows = misc.upload(np.flatnonzero(self.keep[indices]), found['features'].device)
        kept = {name: found[name] for name in self.marks}
        kept['features'] = found['features'].index_select(0, rows)
        finite = found['features'].isfinite().all(dim=1)
        if self.classes:
            kept['probabilities'] = found['probabilities']
            finite = finite & found['probabilities'].isfinite().all(dim=1)

        # The host receives them when the next batch is on its way, so that the device never waits for it.
        self.receive()
        self._arriving = part.start, list(kept), HostCopy(*kept.values(), finite)

    def receive(self) -> int:
        """Wait for what the last batch keeps. Returns: how many of its images have no finite outputs."""
        if self._arriving is None:
            return 0
        (start, names, copy), self._arriving = self._arriving, None
        *values, finite = copy.numpy()
        # Cloned, because the copies are in pinned memory.
        self.kept[start] = {name: torch.from_numpy(array).clone() for name, array in zip(names, values)}
        broken = int((~finite).sum())
        self.nonfinite += broken
        return broken

    def result(self) -> ImageFeatures:
        """Combine all processes. Raises: UserError if fewer than two images were usable."""
        # Collective, so every process raises the same error.
        if self.stats.reduce().count < 2:
            found = 'is only one image' if self.stats.count else 'are no images'
            raise UserError(f'There {found} in {self.source.name}, but statistics need at least two.')

        # The main process collects what was kept, in the order of the images.
        skipped = len(self.source) - self.stats.count
        shares = distributed.gather_on_main((self.kept, self.source.skipped, self.source.unturned))
        if not shares:
            return ImageFeatures(self.stats, skipped)
        kept, problems, unturned = (
            {key: value for share in column for key, value in share.items()} for column in zip(*shares)
        )
        joined = {name: torch.cat([kept[start][name] for start in sorted(kept)]) for name in kept[min(kept)]}

        # Count exact copies by the images' digests.
        return ImageFeatures(
            self.stats,
            skipped,
            [problems[i] for i in sorted(problems)],
            len(joined['digests']) - len(joined['digests'].unique()),
            joined['features'] if self.keep.any() else None,
            joined.get('probabilities'),
            len(unturned),
            pixel_deviation(joined['moments']) if 'moments' in joined else None,
        )


def reference_of(source: ImageSource, seen: ImageFeatures, detector: Detector) -> Reference:
    """A detector's statistics of images, as a reference for other images."""
    channels, height, width = source.image_shape
    features = None if seen.features is None else seen.features.numpy()
    return Reference(
        seen.stats.mu,
        seen.stats.sigma,
        detector.name,
        detector.digest,
        seen.stats.count,
        f'{width}x{height}x{channels}',
        features,
        seen.pixel_std,
    )


def image_digests(images: Tensor) -> Tensor:
    """[n] int64 digests of uint8 images [n, C, H, W]: random multiples of their pixels, summed modulo 2⁶⁴.

    Computed on the images' device. Different images collide with a probability of about 2⁻⁵⁶. Detects
    accidental copies, not forgeries.
    """
    # The product promotes uint8 to int64, whose overflow is modulo 2⁶⁴.
    pixels = images.flatten(1)
    return (pixels * _multiples(pixels.shape[1], pixels.device)).sum(dim=1)


def pixel_moments(images: Tensor) -> Tensor:
    """[n, 3] int64 of uint8 images [n, C, H, W]: their numbers of values, sums of values and of squares; exact."""
    values = images.flatten(1).to(torch.int64)
    counts = torch.full([len(values)], values.shape[1], device=values.device)
    return torch.stack([counts, values.sum(dim=1), values.square().sum(dim=1)], dim=1)


def pixel_deviation(moments: Tensor) -> float:
    """Standard deviation of all values of images, in [-1, 1], from their `pixel_moments`, as --stats of
    dataset_tool.py has it."""
    count, total, squares = (int(number) for number in moments.sum(dim=0))
    # In integers of any size, so that nothing cancels.
    return math.sqrt(count * squares - total**2) / count / 127.5


@functools.lru_cache(maxsize=1)  # images of one pass have one size
def _multiples(count: int, device: torch.device) -> Tensor:
    # A fixed seed: digests must agree between processes and with cached ones.
    return torch.randint(-1 << 63, (1 << 63) - 1, [count], generator=torch.Generator().manual_seed(0)).to(
        device
    )
