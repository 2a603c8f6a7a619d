"""Mean and covariance of features, accumulated over batches and processes."""

from __future__ import annotations

import math

import numpy as np
import torch

from dnnlib.util import UserError
from torch_utils import distributed


class FeatureStats:
    """Running mean and scatter matrix Σ (f − μ)(f − μ)ᵀ of features, in FP64 (Chan, Golub & LeVeque 1983).

    One matrix product adds both a batch's own scatter and that of its mean against the mean so far: the
    latter is an extra row, √(nm/(n+m)) times their difference for m images after n. No large sums are
    subtracted, so features may be far from zero.

    Args:
        dim: D, the number of features.
        device: device of the features and moments.
    """

    def __init__(self, dim: int, device: torch.device | str = 'cpu'):
        self.dim, self.count = dim, 0
        self._mean = torch.zeros([dim], dtype=torch.float64, device=device)
        self._scatter = torch.zeros([dim, dim], dtype=torch.float64, device=device)
        self._reduced = False

    def append(self, features: torch.Tensor) -> None:
        """Add a batch: features [m, D]."""
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise UserError(
                f'The detector returned features of shape {tuple(features.shape)}, expected [N, {self.dim}]. '
                'Use a detector with one feature vector per image.'
            )
        # Batches added after the sum would count once for every process.
        if self._reduced:
            raise RuntimeError('these statistics were already summed over the processes')

        # The extra row is that of the batch's mean against the mean so far.
        n, m = self.count, len(features)
        if m == 0:
            return
        features = features.detach().to(self._mean)
        mean = features.mean(dim=0)
        step = mean - self._mean
        rows = torch.cat([features - mean, math.sqrt(n * m / (n + m)) * step[None]])
        self._scatter.addmm_(rows.T, rows)
        self._mean += m / (n + m) * step
        self.count += m

    def reduce(self) -> FeatureStats:
        """Combine all processes in place; every process then has the statistics of all images."""
        if self._reduced:
            raise RuntimeError('these statistics were already summed over the processes')
        # The mean of all, then each process's scatter around it.
        count = distributed.all_reduce_sum(self._mean.new_tensor(self.count))
        mean = distributed.all_reduce_sum(self._mean * self.count) / count.clamp(min=1)
        step = self._mean - mean
        # A scatter around another center is larger by count · step stepᵀ.
        self._scatter.addr_(step, step, alpha=self.count)
        distributed.all_reduce_sum(self._scatter)
        self.count, self._mean, self._reduced = int(count), mean, True
        return self

    @property
    def mu(self) -> np.ndarray:
        """[D] mean."""
        self._require(1)
        return self._mean.cpu().numpy()

    @property
    def sigma(self) -> np.ndarray:
        """[D, D] covariance, normalized by count - 1."""
        self._require(2)
        # Rounding leaves the scatter slightly asymmetric.
        return ((self._scatter + self._scatter.T) / (2 * (self.count - 1))).cpu().numpy()

    def _require(self, minimum: int) -> None:
        if self.count < minimum:
            raise UserError(f'{self.count} images are too few for statistics: at least {minimum} are needed.')
