"""Mean and covariance of features, batch by batch and over processes, and how much chance is in a Fréchet distance."""
from __future__ import annotations

import numpy as np
import torch

from dnnlib.util import UserError
from metrics.frechet import frechet_distance
from torch_utils import distributed


class FeatureStats:
    """Running sums of features in FP64, from which mean and covariance follow.

    No data-dependent shift is subtracted, so that the sums of several processes simply add up; FP64 leaves
    ten digits for features whose mean is up to a thousand times their standard deviation.

    Args:
        dim: D, the number of features.
        device: where the sums live; the features' device.
        keep: whether to keep the features too, as `bootstrap_interval` wants them.
    """

    def __init__(self, dim: int, device: torch.device | str = 'cpu', keep: bool = False):
        self.dim, self.keep = dim, keep
        self._count = torch.zeros([], dtype=torch.float64, device=device)
        self._sum = torch.zeros([dim], dtype=torch.float64, device=device)
        self._outer = torch.zeros([dim, dim], dtype=torch.float64, device=device)
        self._kept: list[torch.Tensor] = []
        self._reduced = False

    def append(self, features: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add a batch: features [n, D]; weights [n], 0 for rows that only fill up the batch and 1 for the others."""
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise UserError(f'The detector returned features of shape {tuple(features.shape)} after some of {self.dim} dimensions. '
                            'Use a detector with one feature vector an image.')
        if self._reduced:
            raise RuntimeError('these statistics were already summed over the processes')
        features = features.detach().double()
        if weights is not None:
            features = features[weights.to(features.device) > 0]
        self._count += len(features)
        self._sum += features.sum(dim=0)
        self._outer += features.T @ features
        if self.keep:
            self._kept.append(features.float().cpu())

    def reduce(self) -> FeatureStats:
        """Sum over the processes, in place; every process then has the statistics (and kept features) of all of them."""
        if self._reduced:
            raise RuntimeError('these statistics were already summed over the processes')
        for total in (self._count, self._sum, self._outer):
            distributed.all_reduce_sum(total)
        if self.keep:
            self._kept = distributed.gather_objects(torch.cat(self._kept or [torch.zeros([0, self.dim])]))
        self._reduced = True
        return self

    @property
    def count(self) -> int:
        """Number of images."""
        return int(self._count)

    @property
    def mu(self) -> np.ndarray:
        """[D] mean."""
        return (self._sum / self._require(1)).cpu().numpy()

    @property
    def sigma(self) -> np.ndarray:
        """[D, D] covariance, normalised by count - 1."""
        count = self._require(2)
        mu = self._sum / count
        sigma = (self._outer - count * torch.outer(mu, mu)) / (count - 1)
        return ((sigma + sigma.T) / 2).cpu().numpy()

    @property
    def features(self) -> np.ndarray:
        """[count, D] float32, in the order of ranks, then of `append`."""
        if not self.keep:
            raise RuntimeError('features are kept by FeatureStats(keep=True) only')
        return torch.cat(self._kept).numpy()

    def _require(self, minimum: int) -> int:
        if self.count < minimum:
            raise UserError(f'{self.count} images are too few for statistics: at least {minimum} are needed.')
        return self.count


def bootstrap_interval(features: np.ndarray, reference_mu: np.ndarray, reference_sigma: np.ndarray,
                       num: int = 200, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Where the Fréchet distance of another sample of as many images would lie, the reference held fixed.

    Images are drawn with replacement `num` times (Efron 1979). A resample holds repeated images and so looks poorer
    than the sample: its distances are too large on average. Only their spread is used, shifted to lie around the
    distance of the sample itself; it is the noise of FID at this number of images and says nothing about its bias.

    Args:
        features: [n, D] of the images.
        reference_mu, reference_sigma: [D], [D, D].
        num: resamples. One costs a [D, n] x [n, D] product and a Fréchet distance.
        level: probability of the interval.
        seed: of the resampling.
    Returns: (low, high), around the distance of `features`.
    """
    features = np.asarray(features, np.float64)
    rng, n = np.random.default_rng(seed), len(features)

    def distance(counts):
        mu = counts @ features / n
        centred = features - mu
        return frechet_distance(mu, (centred * counts[:, None]).T @ centred / (n - 1), reference_mu, reference_sigma)

    value = distance(np.ones(n))
    resampled = np.array([distance(counts) for counts in rng.multinomial(n, np.full(n, 1 / n), size=num)])
    low, high = value - resampled.mean() + np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return max(0.0, float(low)), float(high)
