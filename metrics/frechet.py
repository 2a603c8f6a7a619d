"""Fréchet distance between Gaussians, the D in FID (Heusel et al. 2017, Eq. 6; Dowson & Landau 1982)."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import scipy.linalg

from dnnlib.util import UserError

ASYMMETRY = 1e-6  # tolerated, relative to the largest entry, as in FP32 statistics
WELL_CONDITIONED = 1e-9  # least ratio of Cholesky pivots, far above rounding errors
ACCURACY = 1e-11  # required of the eigenvalue method, relative to tr Σ1 + tr Σ2


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared 2-Wasserstein distance of two Gaussians: |µ1 − µ2|² + tr Σ1 + tr Σ2 − 2 tr (Σ1 Σ2)^½.

    Args:
        mu1, mu2: [D] means.
        sigma1, sigma2: [D, D] covariances of any rank.
    Returns: a float >= 0, computed in FP64.
    Raises: UserError for values that are not finite, shapes that do not match, or matrices that are not
        covariances.
    """
    return Gaussian(mu1, sigma1, 'the first statistics').distance(
        Gaussian(mu2, sigma2, 'the second statistics')
    )


class Gaussian:
    """N(mu, sigma), factored once for any number of distances.

    Args:
        mu: [D] mean. sigma: [D, D] covariance of any rank.
        name: its name in messages.
    Raises: UserError if it is not a Gaussian; a negative eigenvalue is only found by `distance`.
    """

    def __init__(self, mu: np.ndarray, sigma: np.ndarray, name: str = 'the statistics'):
        self.name = name
        self.mu, self.sigma = check_gaussian(mu, sigma, name)

    @cached_property
    def lower(self) -> np.ndarray | None:
        """Cholesky factor [D, D] of the covariance; None if it is singular or nearly so."""
        try:
            lower = scipy.linalg.cholesky(self.sigma, lower=True, check_finite=False)
        except scipy.linalg.LinAlgError:
            return None  # singular or indefinite: the eigenvalues in `factor` decide
        pivots = np.diag(lower) ** 2
        return lower if pivots.min() > WELL_CONDITIONED * pivots.max() else None

    @cached_property
    def factor(self) -> np.ndarray:
        """A [D, rank] with A Aᵀ = sigma: Cholesky factor, or scaled eigenvectors of nonzero eigenvalues.

        Rounding turns a zero eigenvalue into about D·ε·λ_max, whose square root, 1e-8 per dimension, must not
        count.
        """
        if self.lower is not None:
            return self.lower
        values, vectors = scipy.linalg.eigh(self.sigma, check_finite=False)
        # Covariances have no negative eigenvalue, but for rounding in FP32 statistics.
        if values[0] < -ASYMMETRY * np.abs(values).max():
            raise UserError(
                f'{self.name}: the covariance has a negative eigenvalue ({values[0]:.3g}). '
                'Recreate the statistics with fid.py ref.'
            )
        kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
        return vectors[:, kept] * np.sqrt(values[kept])

    def distance(self, other: Gaussian) -> float:
        """Squared 2-Wasserstein distance; see `frechet_distance`."""
        if self.mu.shape != other.mu.shape:
            raise UserError(
                f'The statistics have {len(self.mu)} and {len(other.mu)} dimensions: they come from '
                'different detectors. Use one detector for both.'
            )

        # With Σ1 = A Aᵀ and Σ2 = B Bᵀ, all that is needed is the product Bᵀ A.
        traces = np.trace(self.sigma) + np.trace(other.sigma)
        product = other.factor.T @ self.factor

        # tr (Σ1 Σ2)^½ is the sum of the singular values of Bᵀ A; eigenvalues are twice as fast if accurate.
        overlap = None
        if self.lower is not None and other.lower is not None:
            log_det = 2 * np.log(np.diag(self.lower) * np.diag(other.lower)).sum()
            overlap = _regular_overlap(product, log_det, ACCURACY * traces)
        if overlap is None:
            overlap = scipy.linalg.svdvals(product, overwrite_a=True, check_finite=False).sum()
        # Rounding may make the distance of equal Gaussians negative.
        return max(0.0, float(np.sum((self.mu - other.mu) ** 2) + traces - 2 * overlap))


def _regular_overlap(product: np.ndarray, log_det: float, tolerance: float) -> float | None:
    """tr (Σ1 Σ2)^½ by eigenvalues, or None if rounding may have changed it by more than `tolerance`.

    With Σ1 = A Aᵀ, Σ2 = B Bᵀ and G = Bᵀ A, the eigenvalues λ of Σ1 Σ2 are those of the symmetric Gᵀ G = Aᵀ Σ2
    A, and the trace is Σ λ^½. They are the squared singular values of G, which cost twice as much but resolve
    small λ far better: an eigenvalue solver errs by δ ≈ ε·λ_max in every λ, so by δ/2 · λ^-½ in its root. The
    determinant, known to full precision from the Cholesky factors, reveals δ: to first order, Σ log λ is off
    by δ Σ λ^-1, and the trace by δ/2 Σ λ^-½. On random spectra from flat to λ_max/λ_min = 1e20 this estimates
    the error within a factor of about two; `tolerance` leaves more.

    Args:
        product: G [D, D]. log_det: log det Gᵀ G.
    """
    values = scipy.linalg.eigvalsh(product.T @ product, overwrite_a=True, check_finite=False)
    if values[0] <= 0:
        return None
    delta = abs(np.log(values).sum() - log_det) / (1 / values).sum()
    return np.sqrt(values).sum() if delta * (values**-0.5).sum() <= tolerance else None


def check_gaussian(mu: np.ndarray, sigma: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """FP64 mean [D] and exactly symmetric covariance [D, D]. Raises: UserError, naming `name`."""
    # Types and shapes.
    if any(np.asarray(value).dtype.kind not in 'fiu' for value in (mu, sigma)):
        raise UserError(
            f'{name}: mean and covariance must be real numbers. Recreate the statistics with fid.py ref.'
        )
    mu, sigma = np.atleast_1d(np.asarray(mu, np.float64)), np.atleast_2d(np.asarray(sigma, np.float64))
    if mu.ndim != 1 or len(mu) == 0 or sigma.shape != (len(mu), len(mu)):
        raise UserError(
            f'{name}: expected a mean [D] and a covariance [D, D], got shapes {mu.shape} and {sigma.shape}. '
            'Recreate the statistics with fid.py ref.'
        )

    # Values.
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(
            f'{name}: some values are NaN or infinite. Check the detector and the images, and recreate the '
            'statistics.'
        )
    if np.abs(sigma - sigma.T).max() > ASYMMETRY * np.abs(sigma).max():
        raise UserError(f'{name}: the covariance is not symmetric. Recreate the statistics with fid.py ref.')
    return mu, (sigma + sigma.T) / 2
