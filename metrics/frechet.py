"""Fréchet distance between Gaussians, the D in FID (Heusel et al. 2017, Eq. 6; Dowson & Landau 1982)."""
from __future__ import annotations

import numpy as np
import scipy.linalg

from dnnlib.util import UserError

ASYMMETRY = 1e-6         # relative to the largest entry: what FP32 statistics show
WELL_CONDITIONED = 1e-9  # ratio of Cholesky pivots, far above rounding errors


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared 2-Wasserstein distance of N(mu1, sigma1) and N(mu2, sigma2): |µ1 − µ2|² + tr Σ1 + tr Σ2 − 2 tr (Σ1 Σ2)^½.

    With Σ1 = A Aᵀ and Σ2 = B Bᵀ the eigenvalues of Σ1 Σ2 are the squared singular values of Aᵀ B, so the last trace is
    their plain sum. No square root of a rounding error appears, which makes it as exact for singular covariances
    (fewer samples than dimensions) as for regular ones.

    Args:
        mu1, mu2: [D] means.
        sigma1, sigma2: [D, D] covariances; any rank.
    Returns: a float, never negative, computed in FP64.
    Raises: UserError for values that are not finite, shapes that do not match, or matrices that are not covariances.
    """
    mu1, sigma1 = check_gaussian(mu1, sigma1, 'the first statistics')
    mu2, sigma2 = check_gaussian(mu2, sigma2, 'the second statistics')
    if mu1.shape != mu2.shape:
        raise UserError(f'The statistics have {len(mu1)} and {len(mu2)} dimensions: they come from different detectors. Use one detector for both.')
    overlap = scipy.linalg.svdvals(_factor(sigma1).T @ _factor(sigma2)).sum()
    return max(0.0, float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap))


def check_gaussian(mu: np.ndarray, sigma: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and exactly symmetric covariance [D, D] in FP64, or a UserError that says what is wrong with `name`."""
    if any(np.asarray(value).dtype.kind not in 'fiu' for value in (mu, sigma)):
        raise UserError(f'{name}: mean and covariance must be real numbers. Make the statistics again with fid.py ref.')
    mu, sigma = np.atleast_1d(np.asarray(mu, np.float64)), np.atleast_2d(np.asarray(sigma, np.float64))
    if mu.ndim != 1 or len(mu) == 0 or sigma.shape != (len(mu), len(mu)):
        raise UserError(f'{name}: a mean of shape {mu.shape} and a covariance of shape {sigma.shape}, expected [D] and [D, D]. '
                        'Make the statistics again with fid.py ref.')
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f'{name}: some values are NaN or infinite. Check the detector and the images, and make the statistics again.')
    if np.abs(sigma - sigma.T).max() > ASYMMETRY * np.abs(sigma).max():
        raise UserError(f'{name}: the covariance is not symmetric. Make the statistics again with fid.py ref.')
    return mu, (sigma + sigma.T) / 2


def _factor(sigma: np.ndarray) -> np.ndarray:
    """A [D, rank] with A Aᵀ = sigma: Cholesky, the fast one, where the matrix is well-conditioned, else the eigenvectors that carry variance.

    Rounding leaves about D·ε·λ_max where an eigenvalue is 0; its square root, 1e-8 a dimension, must not be counted.
    """
    try:
        lower = np.linalg.cholesky(sigma)
        pivots = np.diag(lower) ** 2
        if pivots.min() > WELL_CONDITIONED * pivots.max():
            return lower
    except np.linalg.LinAlgError:
        pass  # singular or, as the eigenvalues will tell, no covariance
    values, vectors = np.linalg.eigh(sigma)
    if values[0] < -ASYMMETRY * np.abs(values).max():
        raise UserError(f'The covariance has a negative eigenvalue ({values[0]:.3g}): it is no covariance. '
                        'Make the statistics again with fid.py ref.')
    kept = values > len(sigma) * np.finfo(np.float64).eps * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])
