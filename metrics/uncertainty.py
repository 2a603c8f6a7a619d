"""Noise and bias of metrics: bootstrap and extrapolation of a Fréchet distance, interval of a mean."""

from __future__ import annotations

import numpy as np
import torch

from dnnlib.util import UserError
from metrics.frechet import Gaussian
from torch_utils import distributed

CHUNK = 4096  # samples converted to FP64 at a time
WITHIN = 1.959964  # deviations around the mean that hold 95 % of a normal distribution


def bootstrap_interval(
    features: torch.Tensor,
    reference_mu: np.ndarray,
    reference_sigma: np.ndarray,
    num: int = 200,
    level: float = 0.95,
    seed: int = 0,
    strata: int = 1,
) -> tuple[float, float]:
    """Interval of the Fréchet distance for another sample of as many images, with the reference fixed.

    Images are drawn with replacement `num` times (Efron 1979), of every stratum as many as it has. Resamples repeat
    images, so their distances are too large on average. Only their spread is used, centered on the distance of the
    sample itself: the noise of FID at this number of images, not its bias.

    Args:
        features: [n, D] of the images, on any device.
        reference_mu, reference_sigma: [D], [D, D].
        num: number of resamples, each a weighted [D, n] x [n, D] product on the features' device and a
            Fréchet distance.
        level: probability of the interval.
        seed: seed of the resampling.
        strata: number of strata that follow one another in turn: image i is of stratum i mod `strata`. Classes are
            strata if every sample has each equally often (Cochran 1977, Chapter 5). With m images each, the interval is
            too narrow by √(1 − 1/m).
    Returns: (low, high), around the distance of `features`.
    """
    # Resampling gives the spread, not the center: the distances of resamples are biased.
    sample = _Sample(features, reference_mu, reference_sigma)
    rng, n = np.random.default_rng(seed), len(sample)
    value = sample.distance(np.ones(n))
    draws = distributed.progress(range(num), unit='resample')
    resampled = np.array([sample.distance(resample(rng, n, strata)) for _ in draws])
    low, high = value - resampled.mean() + np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return max(0.0, float(low)), float(high)


def resample(rng: np.random.Generator, n: int, strata: int = 1) -> np.ndarray:
    """[n] int64 how often each of n images occurs in a resample: multinomial in every stratum."""
    counts = np.zeros(n, dtype=np.int64)
    for first in range(min(strata, n)):
        of_stratum = counts[first::strata]
        of_stratum[:] = rng.multinomial(len(of_stratum), np.full(len(of_stratum), 1 / len(of_stratum)))
    return counts


def root_mean_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of √(expected value), by the normal approximation of the mean of `values` [n] >= 0."""
    mean, error = values.mean(), values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.inf
    low, high = mean - WITHIN * error, mean + WITHIN * error
    return float(np.sqrt(max(low, 0.0))), float(np.sqrt(high))


def frechet_infinity(
    features: torch.Tensor,
    reference_mu: np.ndarray,
    reference_sigma: np.ndarray,
    points: int = 15,
    seed: int = 0,
) -> dict:
    """Fréchet distance extrapolated to infinitely many images (Chong & Forsyth 2020, Sec. 3).

    This removes the bias of their number. The expected distance of N images is linear in 1/N up to higher
    orders. It is computed for random subsets of `points` sizes, evenly spaced from n/10 to n (5,000 to 50,000
    in the paper); the result is the intercept of a least-squares line in 1/N. Near N = D, where the
    covariance becomes singular, higher orders dominate: sizes start at 2 D or more, and n must be at least 4
    D. What remains of them makes the value too small, by a tenth of FID's bias at n for features of equal
    variance, and less for others.

    Args:
        features: [n, D] of the images, on any device.
        reference_mu, reference_sigma: [D], [D, D]; the bias of the reference's own size remains.
        points: number of sizes.
        seed: seed of the subsets.
    Returns: dict of `value`, the intercept, which noise may make negative; `error`, its standard error from
        the residuals; and `sizes`. All subsets come from the same n images: the error covers the choice among
        them, but neither the noise of the n images (see `bootstrap_interval`) nor higher orders.
    Raises: UserError for too few images or points.
    """
    if points < 3:
        raise ValueError(f'a line through {points} points has no error')
    sample = _Sample(features, reference_mu, reference_sigma)
    n, dim = sample.features.shape
    check_enough_to_extrapolate(n, dim)

    # Distances of random subsets.
    rng = np.random.default_rng(seed)
    sizes = np.linspace(max(n // 10, 2 * dim), n, points).round().astype(int)
    subsets = distributed.progress(sizes, unit='subset')
    distances = [sample.distance(rng.permutation(n) < size) for size in subsets]

    # Least squares of distance = value + slope / N, and the standard error of the value from the residuals.
    line = np.stack([np.ones(points), 1 / sizes], axis=1)
    (value, slope), *_ = np.linalg.lstsq(line, distances)
    residuals = distances - line @ [value, slope]
    error = np.sqrt(residuals @ residuals / (points - 2) * np.linalg.inv(line.T @ line)[0, 0])
    return dict(value=float(value), error=float(error), sizes=sizes.tolist())


def check_enough_to_extrapolate(n: int, dim: int) -> None:
    """Raises: UserError if n images are too few for `frechet_infinity` with D features."""
    if n < 4 * dim:
        raise UserError(
            f'{n} images are too few to extrapolate a Fréchet distance of {dim} features: at least {4 * dim} '
            'are needed. Use more images, or KID, which is unbiased.'
        )


class _Sample:
    """Features [n, D], compared with one reference under different weights."""

    def __init__(self, features: torch.Tensor, reference_mu: np.ndarray, reference_sigma: np.ndarray):
        self.features = torch.as_tensor(features)
        self.center = self.features.mean(dim=0, dtype=torch.float64)
        self.reference = Gaussian(reference_mu, reference_sigma, 'the reference')

    def __len__(self) -> int:
        return len(self.features)

    def distance(self, counts: np.ndarray) -> float:
        """Fréchet distance from the reference if image i occurs counts[i] times."""
        # Sums over the images that occur, around the mean of all, in FP64.
        device, dim = self.features.device, len(self.center)
        total = torch.zeros([dim], dtype=torch.float64, device=device)
        outer = torch.zeros([dim, dim], dtype=torch.float64, device=device)
        for rows in np.array_split(np.flatnonzero(counts), -(-len(self) // CHUNK)):
            x = self.features[torch.from_numpy(rows).to(device)].double() - self.center
            weighted = x * torch.from_numpy(counts[rows].astype(np.float64)).to(device)[:, None]
            total += weighted.sum(dim=0)
            outer.addmm_(weighted.T, x)

        # Moments of the resample.
        n = counts.sum()
        sigma = (outer - torch.outer(total, total) / n) / (n - 1)
        return self.reference.distance(
            Gaussian((self.center + total / n).cpu().numpy(), sigma.cpu().numpy(), 'the images')
        )
