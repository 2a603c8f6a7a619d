"""Fréchet distance between Gaussians, the D in FID (Heusel et al. 2017, Eq. 6; Dowson & Landau 1982)."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import scipy.linalg

from dnnlib.util import UserError

ASYMMETRY = 1e-6  # relative to the largest entry: what FP32 statistics show
WELL_CONDITIONED = 1e-9  # ratio of Cholesky pivots, far above rounding errors
ACCURACY = 1e-11  # of the distance, relative to tr Σ1 + tr Σ2, below which eigenvalues are good enough


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared 2-Wasserstein distance of N(mu1, sigma1) and N(mu2, sigma2): |µ1 − µ2|² + tr Σ1 + tr Σ2 − 2 tr
    (Σ1 Σ2)^½.

    Args:
        mu1, mu2: [D] means.
        sigma1, sigma2: [D, D] covariances; any rank.
    Returns: a float, never negative, computed in FP64.
    Raises: UserError for values that are not finite, shapes that do not match, or matrices that are not
        covariances.
    """
    return Gaussian(mu1, sigma1, 'the first statistics').distance(
        Gaussian(mu2, sigma2, 'the second statistics')
    )


class Gaussian:
    """N(mu, sigma), whose factor is computed once for any number of distances from it.

    Args:
        mu: [D] mean. sigma: [D, D] covariance, of any rank.
        name: what errors call it.
    Raises: UserError for what is no Gaussian; that an eigenvalue is negative shows only in `distance`.
    """

    def __init__(self, mu: np.ndarray, sigma: np.ndarray, name: str = 'the statistics'):
        self.name = name
        self.mu, self.sigma = check_gaussian(mu, sigma, name)

    @cached_property
    def lower(self) -> np.ndarray | None:
        """Cholesky factor [D, D] of the covariance, None where that is singular or nearly so."""
        try:
            lower = scipy.linalg.cholesky(self.sigma, lower=True, check_finite=False)
        except scipy.linalg.LinAlgError:
            return None  # singular or, as the eigenvalues will tell, no covariance
        pivots = np.diag(lower) ** 2
        return lower if pivots.min() > WELL_CONDITIONED * pivots.max() else None

    @cached_property
    def factor(self) -> np.ndarray:
        """A [D, rank] with A Aᵀ = sigma: the Cholesky factor or else the eigenvectors that carry variance.

        Rounding leaves about D·ε·λ_max where an eigenvalue is 0; its square root, 1e-8 a dimension, must not
        be counted.
        """
        if self.lower is not None:
            return self.lower
        values, vectors = scipy.linalg.eigh(self.sigma, check_finite=False)
        if values[0] < -ASYMMETRY * np.abs(values).max():
            raise UserError(
                f'{self.name}: the covariance has a negative eigenvalue ({values[0]:.3g}), so it is none. '
                'Make the statistics again with fid.py ref.'
            )
        kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
        return vectors[:, kept] * np.sqrt(values[kept])

    def distance(self, other: Gaussian) -> float:
        """Squared 2-Wasserstein distance, as `frechet_distance`."""
        if self.mu.shape != other.mu.shape:
            raise UserError(
                f'The statistics have {len(self.mu)} and {len(other.mu)} dimensions: they come from '
                'different detectors. Use one detector for both.'
            )
        traces = np.trace(self.sigma) + np.trace(other.sigma)
        product = other.factor.T @ self.factor
        overlap = None
        if self.lower is not None and other.lower is not None:
            log_det = 2 * np.log(np.diag(self.lower) * np.diag(other.lower)).sum()
            overlap = _regular_overlap(product, log_det, ACCURACY * traces)
        if overlap is None:
            overlap = scipy.linalg.svdvals(product, overwrite_a=True, check_finite=False).sum()
        return max(0.0, float(np.sum((self.mu - other.mu) ** 2) + traces - 2 * overlap))


def _regular_overlap(product: np.ndarray, log_det: float, tolerance: float) -> float | None:
    """tr (Σ1 Σ2)^½ by eigenvalues, or None where rounding may have moved it by more than `tolerance`.

    With Σ1 = A Aᵀ, Σ2 = B Bᵀ and G = Bᵀ A, the matrix Σ1 Σ2 has the eigenvalues λ of the symmetric Gᵀ G = Aᵀ
    Σ2 A, and the trace is Σ λ^½. These are the squared singular values of G, which cost twice as much, but
    know small λ far better: an eigenvalue solver errs by δ ≈ ε·λ_max in all of them, and so by δ/2 · λ^-½ in
    their roots. How large δ came out is seen from the determinant, which the Cholesky factors give to full
    precision: to first order, Σ log λ is off by δ Σ λ^-1 and the trace by δ/2 Σ λ^-½. On random spectra from
    flat to λ_max/λ_min = 1e20 this is the actual error within a factor of two or so; `tolerance` leaves more.

    Args:
        product: G [D, D]. log_det: log det Gᵀ G.
    """
    values = scipy.linalg.eigvalsh(product.T @ product, overwrite_a=True, check_finite=False)
    if values[0] <= 0:
        return None
    delta = abs(np.log(values).sum() - log_det) / (1 / values).sum()
    return np.sqrt(values).sum() if delta * (values**-0.5).sum() <= tolerance else None


def check_gaussian(mu: np.ndarray, sigma: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and exactly symmetric covariance [D, D] in FP64, or a UserError that says what is wrong with
    `name`."""
    if any(np.asarray(value).dtype.kind not in 'fiu' for value in (mu, sigma)):
        raise UserError(
            f'{name}: mean and covariance must be real numbers. Make the statistics again with fid.py ref.'
        )
    mu, sigma = np.atleast_1d(np.asarray(mu, np.float64)), np.atleast_2d(np.asarray(sigma, np.float64))
    if mu.ndim != 1 or len(mu) == 0 or sigma.shape != (len(mu), len(mu)):
        raise UserError(
            f'{name}: a mean of shape {mu.shape} and a covariance of shape {sigma.shape}, expected [D] and '
            '[D, D]. Make the statistics again with fid.py ref.'
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(
            f'{name}: some values are NaN or infinite. Check the detector and the images, and make the '
            'statistics again.'
        )
    if np.abs(sigma - sigma.T).max() > ASYMMETRY * np.abs(sigma).max():
        raise UserError(
            f'{name}: the covariance is not symmetric. Make the statistics again with fid.py ref.'
        )
    return mu, (sigma + sigma.T) / 2
