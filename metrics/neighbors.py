"""How two sets of features cover each other, by balls around nearest neighbors: precision and recall, density
and coverage.

The ball of a sample reaches to its k-th nearest neighbor in its own set. The sample itself is left out by its
index, so a duplicate of it is a neighbor like any other. No more than chunk² distances are in memory at a
time, and results do not depend on `chunk`.

Squared distances are |a|² + |b|² − 2 a·b, in FP64 around the reference's mean. That leaves an error of a few
D·ε of the largest |a|², 1e-12 of it or so, where features themselves are known to 1e-7 of theirs. Distances
and radii closer than this (`slack`) count as equal; otherwise chance would decide about samples on a
boundary, and the k-th neighbor of every sample is on one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from metrics.kernel import check_features


def precision_recall(
    features: torch.Tensor, reference: torch.Tensor, k: int = 3, chunk: int = 2048
) -> tuple[float, float]:
    """Share of images inside balls of the reference, and of the reference inside balls of the images
    (Kynkäänniemi et al. 2019, Eqs. 1 and 2).

    precision = 1/n Σ_j max_i 1[‖y_j − x_i‖ ≤ r_k(x_i)]; recall is the same with the sets exchanged. Balls
    contain their boundary. Both depend on the number of samples; the paper takes 50,000 of each set.

    Args:
        features: y, [n, D] of the images. reference: x, [m, D], on the same device.
        k: which neighbor a ball reaches to.
        chunk: samples of each set at a time.
    Returns: (precision, recall).
    Raises: UserError for features that are not finite or do not match, or that are too few for k neighbors.
    """
    distances = _Distances(features, reference, k, chunk)
    features, reference = distances.sets
    image_radii, real_radii = distances.squared_radii(features), distances.squared_radii(reference)
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
    """How densely images lie in balls of the reference, and the share of those balls that hold any (Naeem et
    al. 2020, Sec. 3).

    density = 1/(k n) Σ_j Σ_i 1[‖y_j − x_i‖ < r_k(x_i)], near 1 for equal distributions and not bounded by it;
    coverage = 1/m Σ_i max_j 1[‖y_j − x_i‖ < r_k(x_i)]. Balls do not contain their boundary: the paper leaves
    that open, its authors' code settles it.

    Args:
        features: y, [n, D] of the images. reference: x, [m, D], on the same device.
        k: which neighbor a ball reaches to.
        chunk: samples of each set at a time.
    Returns: (density, coverage).
    Raises: UserError for features that are not finite or do not match, or that are too few for k neighbors.
    """
    distances = _Distances(features, reference, k, chunk)
    features, reference = distances.sets
    radii = distances.squared_radii(reference)
    inside = torch.zeros(len(reference), dtype=torch.int64, device=reference.device)
    for rows, _, squares in distances.squared(reference, features):
        inside[rows] += (squares < radii[rows, None] - distances.slack).sum(dim=1)
    return inside.sum().item() / (k * len(features)), (inside > 0).double().mean().item()


class _Distances:
    """Distances between the samples of two sets [n, D], [m, D], chunk by chunk, in FP64 around the second
    set's mean.

    Attributes:
        sets: both, checked. k: which neighbor a ball reaches to.
        slack: how far from the truth the difference of two squared distances may be.
    """

    def __init__(self, features: torch.Tensor, reference: torch.Tensor, k: int, chunk: int):
        self.sets = features, reference = check_features(features, reference, least=k + 1)
        self.k, self.center, self.chunk = k, reference.mean(dim=0, dtype=torch.float64), chunk
        largest = max(
            self._part(x, rows).square().sum(dim=1).max().item()
            for x in (features, reference)
            for rows in self._slices(x)
        )
        self.slack = 8 * features.shape[1] * torch.finfo(torch.float64).eps * largest

    def squared(self, a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """(rows, columns, squared distances of a[rows] from b[columns]); all columns of some rows come before
        the next rows."""
        for rows in self._slices(a):
            x = self._part(a, rows)
            for columns in self._slices(b):
                y = self._part(b, columns)
                squares = torch.addmm(y.square().sum(dim=1)[None], x, y.T, alpha=-2)
                yield rows, columns, squares.add_(x.square().sum(dim=1, keepdim=True))

    def squared_radii(self, x: torch.Tensor) -> torch.Tensor:
        """[n] squared distance of every sample of x [n, D] from its k-th nearest neighbor among the
        others."""
        radii = torch.empty(len(x), dtype=torch.float64, device=x.device)
        for rows, columns, squares in self.squared(x, x):
            if columns.start == 0:
                nearest = squares.new_full([len(squares), self.k], torch.inf)
            if rows == columns:
                squares.fill_diagonal_(torch.inf)
            nearest = torch.cat([nearest, squares], dim=1).topk(self.k, largest=False).values
            radii[rows] = nearest[:, -1]  # of the columns so far; the last ones decide
        return radii

    def _slices(self, x: torch.Tensor) -> list[slice]:
        return [slice(start, min(start + self.chunk, len(x))) for start in range(0, len(x), self.chunk)]

    def _part(self, x: torch.Tensor, rows: slice) -> torch.Tensor:
        return x[rows].double() - self.center
