"""The metrics of fid.py: what each needs of the images and of a reference, and how it is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from metrics.calc import ImageFeatures
from metrics.frechet import Gaussian
from metrics.inception_score import inception_score
from metrics.kernel import kernel_distance
from metrics.neighbors import density_coverage, precision_recall
from metrics.reference import MAIN_ENTRY, Reference
from metrics.uncertainty import bootstrap_interval, frechet_infinity


@dataclass
class Comparison:
    """Images and a reference under one detector.

    Args:
        images: their features.
        reference: computed with the same detector; None for metrics that need none.
        device: where features are compared.
        bootstrap: resamples for the interval of a Fréchet distance; 0 disables it.
        strata: see `uncertainty.bootstrap_interval`.
        neighbors: k of precision, recall, density and coverage; None uses their papers' k.
        seed: seed of all random choices.
    """

    images: ImageFeatures
    reference: Reference | None = None
    device: torch.device | str = 'cpu'
    bootstrap: int = 0
    strata: int = 1
    neighbors: int | None = None
    seed: int = 0

    @cached_property
    def features(self) -> torch.Tensor:
        """[n, D] of the images, on the device."""
        return self.images.features.to(self.device)

    @cached_property
    def reference_features(self) -> torch.Tensor:
        """[m, D] of the reference, on the device."""
        return torch.as_tensor(self.reference.features).to(self.device)

    def frechet(self) -> dict:
        stats, reference = self.images.stats, self.reference
        ours = Gaussian(stats.mu, stats.sigma, 'the images')
        theirs = Gaussian(reference.mu, reference.sigma, 'the reference')
        result = dict(value=ours.distance(theirs))
        if self.bootstrap:
            result['interval'] = list(
                bootstrap_interval(
                    self.features,
                    reference.mu,
                    reference.sigma,
                    num=self.bootstrap,
                    seed=self.seed,
                    strata=self.strata,
                )
            )
        return result

    def frechet_infinity(self) -> dict:
        return frechet_infinity(self.features, self.reference.mu, self.reference.sigma, seed=self.seed)

    def kernel(self) -> dict:
        return kernel_distance(self.features, self.reference_features, seed=self.seed) | dict(
            reference_features=len(self.reference_features)
        )

    def inception_score(self) -> dict:
        return inception_score(self.images.probabilities.to(self.device))

    @cached_property
    def _precision_recall(self) -> list[dict]:
        # One pass over the distances gives both.
        return self._neighbors(precision_recall, 3)

    @cached_property
    def _density_coverage(self) -> list[dict]:
        return self._neighbors(density_coverage, 5)

    def _neighbors(self, function, k: int) -> list[dict]:
        k = self.neighbors or k
        facts = dict(k=k, reference_features=len(self.reference_features))
        return [dict(value=value, **facts) for value in function(self.features, self.reference_features, k=k)]

    def precision(self) -> dict:
        return self._precision_recall[0]

    def recall(self) -> dict:
        return self._precision_recall[1]

    def density(self) -> dict:
        return self._density_coverage[0]

    def coverage(self) -> dict:
        return self._density_coverage[1]


# ----------------------------------------------------------------------------
# The table.


@dataclass(frozen=True)
class Measure:
    """A metric and its needs.

    Attributes:
        compute: function of a `Comparison` that returns {'value': float, ...}.
        title: display name; {} stands for the detector's name of a Fréchet distance.
        entry: detector and reference entry: `fid`, the main one, or `fd_dinov2`.
        frechet: needs the reference's mean and covariance.
        features: needs all features of the images.
        reference_features: needs features of reference images.
        classes: needs class probabilities.
        larger_is_better: True for scores, False for distances.
    """

    compute: Callable[[Comparison], dict]
    title: str
    entry: str = MAIN_ENTRY
    frechet: bool = False
    features: bool = False
    reference_features: bool = False
    classes: bool = False
    larger_is_better: bool = False

    @property
    def compares(self) -> bool:
        """Whether it needs a reference."""
        return self.frechet or self.reference_features


FID, FD_DINOV2 = MAIN_ENTRY, 'fd_dinov2'
BOTH = dict(features=True, reference_features=True)
# fmt: off
MEASURES = {
    FID: Measure(Comparison.frechet, '{}', frechet=True),
    'fid_inf': Measure(Comparison.frechet_infinity, '{}-infinity', frechet=True, features=True),
    'kid': Measure(Comparison.kernel, 'KID', **BOTH),
    'precision': Measure(Comparison.precision, 'precision', **BOTH, larger_is_better=True),
    'recall': Measure(Comparison.recall, 'recall', **BOTH, larger_is_better=True),
    'density': Measure(Comparison.density, 'density', **BOTH, larger_is_better=True),
    'coverage': Measure(Comparison.coverage, 'coverage', **BOTH, larger_is_better=True),
    'is': Measure(Comparison.inception_score, 'Inception Score', classes=True, larger_is_better=True),
    FD_DINOV2: Measure(Comparison.frechet, '{}', entry=FD_DINOV2, frechet=True),
}
# fmt: on
