"""Inception Score (Salimans et al. 2016)."""

from __future__ import annotations

from itertools import pairwise

import torch

from dnnlib.util import UserError

NORMALIZED = 1e-3  # tolerated deviation of a sum of probabilities from 1, as in half precision


def inception_score(probabilities: torch.Tensor, splits: int = 10) -> dict:
    """exp E_x KL(p(y|x) ‖ p(y)), from 1 to the number of classes (Salimans et al. 2016, Sec. 4).

    Mean and standard deviation over `splits` contiguous parts of the images, with p(y) the mean over a part.
    Larger parts score higher; the convention is 50,000 images in 10 parts. Images sorted by class score far
    too low: shuffle them.

    Args:
        probabilities: [N, K] p(y|x).
        splits: number of parts; part i is images ⌊iN/splits⌋ to ⌊(i+1)N/splits⌋ − 1.
    Returns: dict of `value` (mean over parts), `std` (population) and `splits`.
    Raises: UserError for invalid probabilities, or fewer images than parts.
    """
    # Check the probabilities and their number.
    probabilities = torch.as_tensor(probabilities).double()
    if (
        probabilities.ndim != 2
        or not (probabilities >= 0).all()
        or not ((probabilities.sum(dim=1) - 1).abs() < NORMALIZED).all()
    ):
        raise UserError(
            f'Class probabilities must be [N, K], nonnegative, and sum to 1 for every image; got shape '
            f'{tuple(probabilities.shape)}. Check the detector.'
        )
    n = len(probabilities)
    if splits < 1 or n < splits:
        raise UserError(
            f'{n} images cannot be split into {splits} parts for the Inception Score. Use more images or '
            'fewer parts.'
        )

    # Score each part.
    bounds = [i * n // splits for i in range(splits + 1)]
    scores = torch.stack([_score(probabilities[start:end]) for start, end in pairwise(bounds)])
    return dict(value=scores.mean().item(), std=scores.std(correction=0).item(), splits=splits)


def _score(probabilities: torch.Tensor) -> torch.Tensor:
    """exp of the mean KL divergence of p(y|x) [N, K] from its mean, with 0 log 0 = 0."""
    marginal = probabilities.mean(dim=0)
    divergence = torch.xlogy(probabilities, probabilities) - torch.xlogy(probabilities, marginal)
    return divergence.sum(dim=1).mean().exp()
