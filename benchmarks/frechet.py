"""Time of a Fréchet distance compared with the usual ways to compute it, on covariances like those of a
detector's features.

Eigenvalues follow a power law from 1 to 1e-6, like Inception's. One covariance has these eigenvalues in a
random basis; the other is that of a sample with five images per dimension. The rows: `sqrtm` of the product,
as in pytorch-fid; singular values of the product of Cholesky factors, which is exact for any spectrum, and
our method where eigenvalues are not accurate enough; `frechet_distance` with its checks of the input; the
same for a Gaussian factored before, as in the bootstrap; and for fewer images than dimensions, whose
covariance is singular. Rows take turns in one process; seconds are minima over rounds. `difference` is from
the row of singular values.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import scipy.linalg

if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import block, machine, rounds_option, table
from dnnlib import cli
from metrics.frechet import Gaussian, frechet_distance

CONDITION = 1e6  # ratio of the largest to the smallest eigenvalue
BASE, EXACT = 'sqrtm of the product', 'singular values of the factors'


def make_covariances(dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Covariances [D, D]: of the power law, of a sample of 5 D images from it, of a sample of D/4 images."""
    rng = np.random.default_rng(0)
    deviations = np.arange(1, dim + 1) ** (-np.log(CONDITION) / np.log(dim) / 2)
    root = scipy.linalg.qr(rng.normal(size=(dim, dim)))[0] * deviations
    samples = [rng.normal(size=(count, dim)) @ root.T for count in (5 * dim, dim // 4)]
    return root @ root.T, *(np.cov(sample, rowvar=False) for sample in samples)


def by_square_root(sigma1: np.ndarray, sigma2: np.ndarray) -> float:
    return np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(scipy.linalg.sqrtm(sigma1 @ sigma2)).real


def by_singular_values(sigma1: np.ndarray, sigma2: np.ndarray) -> float:
    a, b = (scipy.linalg.cholesky(sigma, lower=True) for sigma in (sigma1, sigma2))
    return np.trace(sigma1) + np.trace(sigma2) - 2 * scipy.linalg.svdvals(b.T @ a).sum()


def make_rows(dim: int) -> dict[str, Callable[[], float]]:
    """Functions to time, by name; each computes a distance."""
    zero, (law, sample, few) = np.zeros(dim), make_covariances(dim)
    factored = Gaussian(zero, law)
    factored.distance(factored)
    return {
        BASE: lambda: by_square_root(law, sample),
        EXACT: lambda: by_singular_values(law, sample),
        'frechet_distance': lambda: frechet_distance(zero, law, zero, sample),
        'one of the two factored before': lambda: factored.distance(Gaussian(zero, sample)),
        'frechet_distance, D/4 images': lambda: frechet_distance(zero, law, zero, few),
    }


def measure(rows: dict[str, Callable[[], float]], rounds: int) -> dict[str, dict]:
    """{row: least seconds, distance}."""
    results = {name: dict(seconds=float('inf')) for name in rows}
    for _ in range(rounds):
        for name, call in rows.items():
            start = time.perf_counter()
            results[name]['distance'] = float(call())
            results[name]['seconds'] = min(results[name]['seconds'], time.perf_counter() - start)
    return results


@click.command(cls=cli.Command)
@cli.option(
    '--dim',
    metavar='INT',
    type=click.IntRange(min=8),
    default=2048,
    show_default=True,
    help='Number of features.',
)
@rounds_option('Number of times to time every row.')
@cli.option('--json', 'as_json', is_flag=True, help='Print one JSON object.')
def main(dim, rounds, as_json):
    """Time a Fréchet distance against a matrix square root."""
    results = measure(make_rows(dim), rounds)
    if as_json:
        click.echo(json.dumps(dict(device=machine(), dim=dim, rows=results)))
        return

    # The distance of few images is another one, which has no exact value to compare with.
    cells = []
    for name, result in results.items():
        difference = '' if 'images' in name else f'{result["distance"] - results[EXACT]["distance"]:.1e}'
        speed = results[BASE]['seconds'] / result['seconds']
        cells.append(
            [name, f'{result["seconds"]:.3f}', f'{speed:.1f}', f'{result["distance"]:.6f}', difference]
        )
    click.echo(
        block(
            f'Fréchet distance at {dim} dimensions',
            f'Covariances with condition number {CONDITION:.0e}, least of {rounds} rounds; `difference` is '
            f'from the row of singular values, which is exact. SciPy {scipy.__version__}.',
            table(['', 'seconds', 'times faster', 'distance', 'difference'], cells),
        )
    )


if __name__ == '__main__':
    main()
