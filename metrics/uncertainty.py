"""How much chance and how much bias is in a Fréchet distance: bootstrap, and extrapolation to infinitely many
images."""

from __future__ import annotations

import numpy as np
import torch

from dnnlib.util import UserError
from metrics.frechet import Gaussian

CHUNK = 4096  # samples lifted to FP64 at a time


def bootstrap_interval(
    features: torch.Tensor,
    reference_mu: np.ndarray,
    reference_sigma: np.ndarray,
    num: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Where the Fréchet distance of another sample of as many images would lie, the reference held fixed.

    Images are drawn with replacement `num` times (Efron 1979). A resample holds repeated images and so looks
    poorer than the sample: its distances are too large on average. Only their spread is used, shifted to lie
    around the distance of the sample itself; it is the noise of FID at this number of images and says nothing
    about its bias.

    Args:
        features: [n, D] of the images, on any device.
        reference_mu, reference_sigma: [D], [D, D].
        num: resamples. One costs a weighted [D, n] x [n, D] product on the features' device and a Fréchet
            distance.
        level: probability of the interval.
        seed: of the resampling.
    Returns: (low, high), around the distance of `features`.
    """
    sample = _Sample(features, reference_mu, reference_sigma)
    rng, n = np.random.default_rng(seed), len(sample)
    value = sample.distance(np.ones(n))
    resampled = np.array([sample.distance(rng.multinomial(n, np.full(n, 1 / n))) for _ in range(num)])
    low, high = value - resampled.mean() + np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return max(0.0, float(low)), float(high)


def frechet_infinity(
    features: torch.Tensor,
    reference_mu: np.ndarray,
    reference_sigma: np.ndarray,
    points: int = 15,
    seed: int = 0,
) -> dict:
    """Fréchet distance extrapolated to infinitely many images, where it has no bias of their number (Chong &
    Forsyth 2020, Sec. 3).

    The expected distance of N images is linear in 1/N up to terms of higher order. It is taken for `points`
    sizes, evenly spaced from n/10 to n (with 50,000 images the paper's 5,000 to 50,000), each a random
    subset, and a least-squares line in 1/N goes to its intercept. Toward N = D, where the covariance becomes
    singular, higher orders take over: sizes start at 2 D where n/10 is less, and n itself must be 4 D or
    more. What they leave makes the value too small, by a tenth of the bias of FID at n for features of equal
    variance and less for others.

    Args:
        features: [n, D] of the images, on any device.
        reference_mu, reference_sigma: [D], [D, D]; whatever bias the reference's own number of images leaves
            stays.
        points: number of sizes.
        seed: of the subsets.
    Returns: dict of `value`, the intercept, which noise may well make negative; `error`, its standard error
        from the residuals of the line; and `sizes`. All subsets come from the same n images: the error holds
        the noise of choosing among them, and neither that of the n images (for which see
        `bootstrap_interval`) nor the terms of higher order.
    Raises: UserError for too few images or points.
    """
    if points < 3:
        raise ValueError(f'a line through {points} points has no error')
    sample = _Sample(features, reference_mu, reference_sigma)
    n, dim = sample.features.shape
    check_enough_to_extrapolate(n, dim)
    rng = np.random.default_rng(seed)
    sizes = np.linspace(max(n // 10, 2 * dim), n, points).round().astype(int)
    distances = [sample.distance(rng.permutation(n) < size) for size in sizes]
    line = np.stack([np.ones(points), 1 / sizes], axis=1)
    (value, slope), *_ = np.linalg.lstsq(line, distances)
    residuals = distances - line @ [value, slope]
    error = np.sqrt(residuals @ residuals / (points - 2) * np.linalg.inv(line.T @ line)[0, 0])
    return dict(value=float(value), error=float(error), sizes=sizes.tolist())


def check_enough_to_extrapolate(n: int, dim: int) -> None:
    """Raises: UserError where n images are too few for `frechet_infinity` with D features."""
    if n < 4 * dim:
        raise UserError(
            f'{n} images are too few to extrapolate a Fréchet distance of {dim} features: at least {4 * dim} '
            'are needed. Use more images, or KID, which has no bias.'
        )


class _Sample:
    """Features [n, D] that are weighted in several ways and compared with the same reference."""

    def __init__(self, features: torch.Tensor, reference_mu: np.ndarray, reference_sigma: np.ndarray):
        self.features = torch.as_tensor(features)
        self.center = self.features.mean(dim=0, dtype=torch.float64)
        self.reference = Gaussian(reference_mu, reference_sigma, 'the reference')

    def __len__(self) -> int:
        return len(self.features)

    def distance(self, counts: np.ndarray) -> float:
        """Fréchet distance from the reference where image i is there counts[i] times; images that are not
        there cost nothing."""
        device, dim = self.features.device, len(self.center)
        total = torch.zeros([dim], dtype=torch.float64, device=device)
        outer = torch.zeros([dim, dim], dtype=torch.float64, device=device)
        for rows in np.array_split(np.flatnonzero(counts), -(-len(self) // CHUNK)):
            x = self.features[torch.from_numpy(rows).to(device)].double() - self.center
            weighted = x * torch.from_numpy(counts[rows].astype(np.float64)).to(device)[:, None]
            total += weighted.sum(dim=0)
            outer.addmm_(weighted.T, x)
        n = counts.sum()
        sigma = (outer - torch.outer(total, total) / n) / (n - 1)
        return self.reference.distance(
            Gaussian((self.center + total / n).cpu().numpy(), sigma.cpu().numpy(), 'the images')
        )
