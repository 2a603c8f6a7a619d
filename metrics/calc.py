"""From images to features and their statistics: one pass, on all processes, under any number of detectors.
All that evaluates goes through it."""

from __future__ import annotations

import functools
import itertools
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
from torch_utils import distributed


@dataclass(frozen=True)
class Observed:
    """What a detector saw in a set of images.

    Attributes:
        stats: moments of the features, on every process.
        skipped: how many images were left out.
        problems: why. This and what follows: on the main process only.
        copies: how many images have the very pixels of another one before them.
        unturned: how many images, of those that were read and not recalled, carry an EXIF orientation, which
            is ignored.
        features: [n, D] float32 on the CPU, in the order of the images; None where they were not asked for.
        probabilities: [n, K] of its classes, likewise.
    """

    stats: FeatureStats
    skipped: int = 0
    problems: list[str] = field(default_factory=list)
    copies: int = 0
    features: Tensor | None = None
    probabilities: Tensor | None = None
    unturned: int = 0


def observe(
    source: ImageSource,
    detectors: Mapping[str, Detector],
    batch: int,
    keep: np.ndarray | bool = False,
    classes: Container[str] = (),
    cache: str | None = None,
    workers: int = 4,
    advance: Callable[[int], object] = lambda count: None,
    stop: Callable[[], bool] | None = None,
) -> dict[str, Observed] | None:
    """What each detector sees in all images, of all processes together.

    Batch k holds the images k·batch … (k + 1)·batch − 1, whichever process computes it, and the last one is
    filled up before a detector sees it: features do not depend on the number of processes.

    Args:
        source: of images; see metrics/images.py. Every process calls with the same.
        detectors: by the names that the result has.
        keep: whether to keep features; or [len(source)] bool, of which images.
        classes: the names of detectors whose class probabilities are to be kept.
        cache: folder in which features are kept and found again; see `FeatureCache`.
        workers: threads that decode.
        advance: called with the number of images, of all processes, that a step of this process stands for.
        stop: asked by all processes together, now and then; where it says so the images are left, and the
            result is None. Not with a cache.
    Raises: NotFinite, on all processes, where images of a network, or a detector's answers to images, are not
        finite; UserError where there are no images, or one cannot be used.
    """
    parts = [range(start, min(start + batch, len(source))) for start in range(0, len(source), batch)]
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    keep = np.full(len(source), keep) if isinstance(keep, bool) else keep
    facts = None
    if cache:  # the main process's word counts: machines may have copies of other times
        facts = dict(
            images=distributed.broadcast_object(source.fingerprint() if distributed.is_main() else None),
            batch=batch,
        )
    watches = {
        name: _Watch(detector, source, keep, name in classes, cache, facts)
        for name, detector in detectors.items()
    }
    images_of_round = lambda k: sum(map(len, parts[k - rank : k - rank + processes]))
    missing = []
    for k in range(rank, len(parts), processes):
        recalled = [watch.recall(parts[k]) for watch in watches.values()]
        if all(recalled):
            advance(images_of_round(k))
        else:
            missing.append(k)
    for k, (part, images, indices) in zip(missing, source.stream([parts[k] for k in missing], workers)):
        filled = (
            torch.cat([images, images[-1:].expand(batch - len(images), -1, -1, -1)])
            if 0 < len(images) < batch
            else images
        )
        digests = image_digests(images)
        for watch in watches.values():
            watch.see(part, filled, indices, digests)
        advance(images_of_round(k))
        if (
            stop and k - rank + processes <= len(parts) and stop()
        ):  # of the rounds in which every process has a batch
            return None
    if stop and stop():
        return None
    check_finite(source, parts, watches.values())
    return {name: watch.result() for name, watch in watches.items()}


def check_finite(source: ImageSource, parts: Sequence[range], watches: Collection[_Watch]) -> None:
    """Raises: NotFinite, on all processes together, where any of them met with what is not finite. What
    follows would be a number all the same."""
    own = [i for part in parts for i in source.nonfinite(part)], [watch.nonfinite for watch in watches]
    images, features = zip(*distributed.gather_objects(own))
    if bad := sorted(itertools.chain(*images)):
        raise NotFinite(source.describe_nonfinite(bad), nonfinite=len(bad))
    for watch, count in zip(watches, map(sum, zip(*features))):
        if count:
            raise NotFinite(
                f'Detector {watch.detector.name} gives features that are not finite (NaN or infinite) for '
                f'{count} of {len(source)} images of {source.name}: there is no measure of them. Use '
                'another detector, or mend this one.',
                nonfinite_features=count,
            )


def count_features(detector: Detector, image_shape: list[int]) -> None:
    """See to it that the detector's `dim` is known, if need be by an empty image [C, H, W]."""
    if detector.dim is None:
        detector(torch.zeros([1, *image_shape], dtype=torch.uint8))


class _Watch:
    """One detector's view of the images, as far as this process sees them."""

    def __init__(
        self,
        detector: Detector,
        source: ImageSource,
        keep: np.ndarray,
        classes: bool,
        cache: str | None,
        facts: dict | None,
    ):
        count_features(detector, source.image_shape)
        self.detector, self.source, self.keep, self.classes = (
            detector,
            source,
            torch.from_numpy(keep),
            classes,
        )
        self.stats = FeatureStats(detector.dim, detector.device)
        self.nonfinite = 0  # images whose features, or probabilities, are not finite
        self.kept: dict[
            int, dict[str, Tensor]
        ] = {}  # of each batch, by its first image: digests, and what is to be kept
        self.cache = (
            FeatureCache(cache, detector.name, dict(facts, detector=detector.digest)) if cache else None
        )

    def recall(self, part: range) -> bool:
        """Add a batch from the cache; whether it was there."""
        names = {'digests', 'features', *(['probabilities'] if self.classes else [])}
        found = self.cache.load(part, names) if self.cache else None
        if found:
            self._add(part, list(part), {name: torch.from_numpy(found[name]) for name in names})
        return bool(found)

    def see(self, part: range, images: Tensor, indices: list[int], digests: Tensor) -> None:
        """Add a batch of images, of which the first `len(indices)` count; nothing where it was recalled, or
        none is left of it.

        A batch of which images were left out is not cached: what was wrong with them is told every time, and
        an error without --skip-bad. Neither is one with images or features that are not finite.
        """
        count = len(indices)
        if part.start in self.kept or count == 0:
            return
        found = dict(digests=digests)
        if self.classes:
            found['features'], found['probabilities'] = self.detector.with_probabilities(images)
        else:
            found['features'] = self.detector(images)
        found = {
            name: values[:count].float() if values.is_floating_point() else values
            for name, values in found.items()
        }
        sound = self._add(part, indices, found)
        if self.cache and count == len(part) and sound and not self.source.nonfinite(part):
            self.cache.save(part, {name: values.cpu().numpy() for name, values in found.items()})

    def _add(self, part: range, indices: list[int], found: dict[str, Tensor]) -> bool:
        """Whether all that the detector gave was finite."""
        self.stats.append(found['features'])
        kept = dict(
            digests=found['digests'],
            features=found['features'][self.keep[indices].to(found['features'].device)],
        )
        finite = found['features'].isfinite().all(dim=1)
        if self.classes:
            kept['probabilities'] = found['probabilities']
            finite = finite & found['probabilities'].isfinite().all(dim=1)
        self.kept[part.start] = {name: values.cpu() for name, values in kept.items()}
        broken = len(finite) - int(finite.sum())
        self.nonfinite += broken
        return broken == 0

    def result(self) -> Observed:
        """Over all processes."""
        if self.stats.reduce().count < 2:
            found = 'is only one image' if self.stats.count else 'are no images'
            raise UserError(
                f'There {found} in {self.source.name} to compute statistics of, and at least two are needed.'
            )
        skipped = len(self.source) - self.stats.count
        shares = distributed.gather_on_main((self.kept, self.source.skipped, self.source.unturned))
        if not shares:
            return Observed(self.stats, skipped)
        kept, problems, unturned = (
            {key: value for share in column for key, value in share.items()} for column in zip(*shares)
        )
        joined = {name: torch.cat([kept[start][name] for start in sorted(kept)]) for name in kept[min(kept)]}
        return Observed(
            self.stats,
            skipped,
            [problems[i] for i in sorted(problems)],
            len(joined['digests']) - len(joined['digests'].unique()),
            joined['features'] if self.keep.any() else None,
            joined.get('probabilities'),
            len(unturned),
        )


def reference_of(source: ImageSource, seen: Observed, detector: Detector) -> Reference:
    """What a detector saw, as a reference for other images."""
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
    )


def image_digests(images: Tensor) -> Tensor:
    """[n] int64 digests of uint8 images [n, C, H, W], where they live: sums of random multiples of their
    pixels, modulo 2⁶⁴.

    Two images that differ have the same one with a probability of about 2⁻⁵⁶. They tell copies by accident,
    and no forgeries.
    """
    pixels = images.flatten(1)
    return (pixels * _multiples(pixels.shape[1], pixels.device)).sum(dim=1)


@functools.lru_cache(maxsize=1)  # images of one pass have one size
def _multiples(count: int, device: torch.device) -> Tensor:
    return torch.randint(-1 << 63, (1 << 63) - 1, [count], generator=torch.Generator().manual_seed(0)).to(
        device
    )
