"""Precision and recall, density and coverage: how two sets of features cover each other.

The ball of a sample reaches to its k-th nearest neighbor in its own set. The sample itself is excluded by
index, so a duplicate of it counts as a neighbor. At most chunk² distances are in memory, and results do not
depend on `chunk`.

Squared distances are |a|² + |b|² − 2 a·b, in FP64 around the reference's mean. Their error is a few D·ε of
the largest |a|², about 1e-12 of it, while features have errors of 1e-7. Distances and radii closer than this
(`slack`) count as equal; otherwise rounding would decide about samples on a boundary, and the k-th neighbor
of every sample is on one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from metrics.kernel import check_features
from torch_utils import distributed


def precision_recall(
    features: torch.Tensor, reference: torch.Tensor, k: int = 3, chunk: int = 2048
) -> tuple[float, float]:
    """Fraction of images in balls of the reference, and vice versa (Kynkäänniemi et al. 2019, Eqs. 1 and 2).

    precision = 1/n Σ_j max_i 1[‖y_j − x_i‖ ≤ r_k(x_i)]; recall exchanges the sets. Balls contain their
    boundary. Both depend on the number of samples; the paper uses 50,000 of each set.

    Args:
        features: y, [n, D] of the images. reference: x, [m, D], on the same device.
        k: number of the neighbor that a ball reaches to.
        chunk: samples of each set at a time.
    Returns: (precision, recall).
    Raises: UserError for features that are not finite or do not match, or that are too few for k neighbors.
    """
    distances = _Distances(features, reference, k, chunk)
    features, reference = distances.sets
    image_radii, real_radii = distances.squared_radii(features), distances.squared_radii(reference)

    # Mark the samples of each set that lie in any ball of the other, chunk by chunk.
    precise, recalled = (
        torch.zeros(len(x), dtype=torch.bool, device=x.device) for x in (features, reference)
    )
    for rows, columns, squares in distances.squared(reference, features):
        precise[columns] |= (squares <= real_radii[rows, None] + distances.slack).any(dim=0)
        recalled[rows] |= (squares <= image_radii[columns] + distances.slack).any(dim=1)
    return precise.double().mean().item(), recalled.double().mean().item()


def density_coverage(
    features: torch.Tensor, reference: torch.Tensor, k: int = 5, chunk: int = 2048
) -> tuple[float, float]:
    """Density of images in reference balls, and fraction of balls with images (Naeem et al. 2020, Sec. 3).

    density = 1/(k n) Σ_j Σ_i 1[‖y_j − x_i‖ < r_k(x_i)], about 1 for equal distributions, but unbounded;
    coverage = 1/m Σ_i max_j 1[‖y_j − x_i‖ < r_k(x_i)]. Balls exclude their boundary, as in the authors' code;
    the paper does not say.

    Args:
        features: y, [n, D] of the images. reference: x, [m, D], on the same device.
        k: number of the neighbor that a ball reaches to.
        chunk: samples of each set at a time.
    Returns: (density, coverage).
    Raises: UserError for features that are not finite or do not match, or that are too few for k neighbors.
    """
    distances = _Distances(features, reference, k, chunk)
    features, reference = distances.sets
    radii = distances.squared_radii(reference)

    # Count the images in each ball.
    inside = torch.zeros(len(reference), dtype=torch.int64, device=reference.device)
    for rows, _, squares in distances.squared(reference, features):
        inside[rows] += (squares < radii[rows, None] - distances.slack).sum(dim=1)
    return inside.sum().item() / (k * len(features)), (inside > 0).double().mean().item()


class _Distances:
    """FP64 distances between two sets [n, D], [m, D], chunk by chunk, around the second set's mean.

    Attributes:
        sets: both, checked. k: number of the neighbor that a ball reaches to.
        slack: bound on the error of the difference of two squared distances.
    """

    def __init__(self, features: torch.Tensor, reference: torch.Tensor, k: int, chunk: int):
        self.sets = features, reference = check_features(features, reference, least=k + 1)
        # Around the mean, |x|² − 2 x·y + |y|² loses fewer digits to cancellation.
        self.k, self.center, self.chunk = k, reference.mean(dim=0, dtype=torch.float64), chunk
        largest = max(
            self._part(x, rows).square().sum(dim=1).max().item()
            for x in (features, reference)
            for rows in self._slices(x)
        )
        self.slack = 8 * features.shape[1] * torch.finfo(torch.float64).eps * largest

    def squared(self, a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """(rows, columns, squared distances of a[rows] from b[columns]), row by row."""
        for rows in distributed.progress(self._slices(a), unit='chunk'):
            x = self._part(a, rows)
            for columns in self._slices(b):
                y = self._part(b, columns)
                # |y|² − 2 x·y, [rows, columns]; then |x|² in place.
                squares = torch.addmm(y.square().sum(dim=1)[None], x, y.T, alpha=-2)
                yield rows, columns, squares.add_(x.square().sum(dim=1, keepdim=True))

    def squared_radii(self, x: torch.Tensor) -> torch.Tensor:
        """[n] squared distance of each sample of x [n, D] from its k-th nearest neighbor among the others."""
        radii = torch.empty(len(x), dtype=torch.float64, device=x.device)
        for rows, columns, squares in self.squared(x, x):
            # Merge the k nearest so far with the next columns; a sample is not its own neighbor.
            if columns.start == 0:
                nearest = squares.new_full([len(squares), self.k], torch.inf)
            if rows == columns:
                squares.fill_diagonal_(torch.inf)
            nearest = torch.cat([nearest, squares], dim=1).topk(self.k, largest=False).values
            radii[rows] = nearest[:, -1]  # final after the last columns
        return radii

    def _slices(self, x: torch.Tensor) -> list[slice]:
        return [slice(start, min(start + self.chunk, len(x))) for start in range(0, len(x), self.chunk)]

    def _part(self, x: torch.Tensor, rows: slice) -> torch.Tensor:
        return x[rows].double() - self.center
