"""The mathematics of evaluation: Fréchet and kernel distance, neighbors, Inception Score, bootstrap and extrapolation."""

import json
import math

import mpmath
import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import scipy.stats
import torch
from golden import golden_numbers
from helpers import run_python
from sklearn.neighbors import NearestNeighbors

from dnnlib.util import UserError
from metrics import frechet
from metrics.frechet import Gaussian, frechet_distance
from metrics.inception_score import inception_score
from metrics.kernel import kernel_distance, squared_mmd
from metrics.neighbors import density_coverage, precision_recall
from metrics.uncertainty import _Sample, bootstrap_interval, frechet_infinity, resample


def gaussian(features):
    return features.mean(axis=0), np.cov(features, rowvar=False)


def normal(count, dim, seed, dtype=torch.float64):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotated(spectrum, seed):
    """A covariance with the given eigenvalues and random eigenvectors."""
    spectrum = np.asarray(spectrum, np.float64)
    rotation = scipy.linalg.qr(np.random.default_rng(seed).normal(size=(len(spectrum),) * 2))[0]
    return rotation * spectrum @ rotation.T


def by_singular_values(sigma1, sigma2):
    """Distance of centered Gaussians from the singular values of Bᵀ A, Σ1 = A Aᵀ, Σ2 = B Bᵀ: no root of anything small is taken."""
    a, b = (scipy.linalg.cholesky(sigma, lower=True) for sigma in (sigma1, sigma2))
    return np.trace(sigma1) + np.trace(sigma2) - 2 * scipy.linalg.svdvals(b.T @ a).sum()


# ----------------------------------------------------------------------------
# Fréchet distance.


def test_commuting_gaussians_have_the_textbook_distance():
    """Diagonal covariances: |µ1 − µ2|² + Σ (s1 − s2)², also along dimensions without variance."""
    rng = np.random.default_rng(0)
    rotation = scipy.linalg.qr(rng.normal(size=(7, 7)))[0]
    mu1, mu2 = rng.normal(size=(2, 7))
    for s1, s2 in (rng.uniform(0.5, 2, (2, 7)), ([1, 2, 3, 0, 0, 0, 0], [0, 1, 5, 0, 2, 0, 0])):
        sigma1, sigma2 = (rotation * np.square(s) @ rotation.T for s in (s1, s2))
        expected = np.sum((mu1 - mu2) ** 2) + np.sum((np.array(s1) - s2) ** 2)
        assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-12)


def test_one_dimension_is_the_difference_of_mean_and_deviation():
    assert frechet_distance([1.0], [[4.0]], [4.0], [[25.0]]) == pytest.approx(9 + 9, rel=1e-14)
    assert frechet_distance([1.0], [[0.0]], [4.0], [[25.0]]) == pytest.approx(9 + 25, rel=1e-14)


@pytest.mark.parametrize('count', [20, 101, 500])
def test_identical_sets_have_distance_zero(count):
    """With fewer samples than dimensions too, and with just enough: an eigenvalue that is 0 must not come back as the root of a rounding error."""
    mu, sigma = gaussian(np.random.default_rng(0).normal(size=(count, 100)))
    assert 0 <= frechet_distance(mu, sigma, mu, sigma) < 1e-11


def test_one_lost_dimension_is_no_root_of_a_rounding_error():
    """Covariance A Aᵀ, A [D, D − 1], against the identity: tr (Σ1 Σ2)^½ is the sum of A's singular values. Cholesky often gets through it."""
    for seed in range(20):
        a = np.random.default_rng(seed).normal(size=(6, 5))
        expected = np.sum((scipy.linalg.svdvals(a) - 1) ** 2) + 1
        for sigmas in ((a @ a.T, np.eye(6)), (np.eye(6), a @ a.T)):
            assert frechet_distance(np.zeros(6), sigmas[0], np.zeros(6), sigmas[1]) == pytest.approx(
                expected, rel=1e-12
            )


@pytest.mark.parametrize('count', [40, 300])
def test_distance_of_few_samples_is_that_of_their_factors(count):
    """Σ1 = X Xᵀ of fewer samples than dimensions, Σ2 of few or of many: tr (Σ1 Σ2)^½ is the nuclear norm of Xᵀ Y."""
    x, y = (np.random.default_rng(seed).normal(size=(n, 100)) / 10 for seed, n in ((1, 30), (2, count)))
    expected = np.sum(x**2) + np.sum(y**2) - 2 * np.linalg.norm(x @ y.T, 'nuc')
    assert frechet_distance(np.zeros(100), x.T @ x, np.zeros(100), y.T @ y) == pytest.approx(
        expected, rel=1e-12
    )


def test_distance_is_that_of_a_general_matrix_square_root():
    rng = np.random.default_rng(1)
    a, b = (gaussian(rng.normal(size=(60, 12)) @ rng.normal(size=(12, 12))) for _ in range(2))
    expected = np.sum((a[0] - b[0]) ** 2) + np.trace(a[1] + b[1] - 2 * scipy.linalg.sqrtm(a[1] @ b[1]).real)
    assert frechet_distance(*a, *b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(*b, *a) == pytest.approx(expected, rel=1e-9)


def test_distance_agrees_with_the_established_implementation():
    """The third set has 40 samples of 64 dimensions."""
    golden = golden_numbers('inception-fid.npz')
    a, b, c = (gaussian(golden[f'fd_{name}']) for name in 'abc')
    assert frechet_distance(*a, *b) == pytest.approx(float(golden['fd_ab']), rel=1e-6)
    assert frechet_distance(*c, *b) == pytest.approx(float(golden['fd_cb']), rel=1e-6)


@pytest.mark.parametrize('condition', [1e3, 1e6, 1e9])
def test_power_law_spectra_need_no_singular_values(condition, monkeypatch):
    """Spectra i^-p like those of detectors' features, 2 or 5 samples a dimension: within 1e-11 of the traces of the slow way, on the fast one."""
    spectrum = np.arange(1, 201) ** -(np.log(condition) / np.log(200))
    truth = rotated(spectrum, seed=0)
    root = scipy.linalg.cholesky(truth, lower=True)
    sample = np.cov(np.random.default_rng(1).normal(size=(1000, 200)) @ root.T, rowvar=False)
    pairs = [(truth, truth), (truth, sample), (truth, rotated(spectrum, seed=2))]
    expected = [by_singular_values(*pair) for pair in pairs]
    monkeypatch.setattr(scipy.linalg, 'svdvals', None)
    for (sigma1, sigma2), value in zip(pairs, expected):
        traces = np.trace(sigma1) + np.trace(sigma2)
        assert frechet_distance(np.zeros(200), sigma1, np.zeros(200), sigma2) == pytest.approx(
            max(value, 0), abs=2e-11 * traces
        )


def test_distance_of_an_ill_conditioned_pair_is_that_of_high_precision_arithmetic():
    """Eigenvalues from 1 to 1e-8, the product's to 1e-16, in 40 digits: Σ λ^½ over the eigenvalues of Lᵀ Σ2 L."""
    sigma1, sigma2 = (rotated(np.logspace(0, -8, 12), seed) for seed in (3, 4))
    with mpmath.workdps(40):
        a, b = (
            mpmath.matrix(((sigma1 + sigma1.T) / 2).tolist()),
            mpmath.matrix(((sigma2 + sigma2.T) / 2).tolist()),
        )
        lower = mpmath.cholesky(a)
        values = mpmath.eigsy(lower.T * b * lower, eigvals_only=True)
        expected = float(sum(a[i, i] + b[i, i] - 2 * mpmath.sqrt(values[i]) for i in range(12)))
    assert frechet_distance(np.zeros(12), sigma1, np.zeros(12), sigma2) == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize('small', [1e-5, 1e-6, 1e-7, 1e-8])
def test_where_eigenvalues_lose_their_digits_singular_values_take_over(small):
    """Half of the variances are 1, half `small`: the product's are small² ± 1e-16, so their roots are off by up to 1e-16/small. The distance is 0."""
    sigma = rotated([1.0] * 150 + [small] * 150, seed=5)
    assert frechet_distance(np.zeros(300), sigma, np.zeros(300), sigma) < 2 * frechet.ACCURACY * 300


def test_the_error_read_from_the_determinant_is_the_actual_one(monkeypatch):
    """Spectra as above: where the eigenvalues' answer is off by more than the tolerance times three, it is not taken."""
    taken = 0
    for small in np.logspace(-3, -7, 9):
        sigma = rotated([1.0] * 50 + [small] * 50, seed=6)
        lower = scipy.linalg.cholesky(sigma, lower=True)
        exact = scipy.linalg.svdvals(lower.T @ lower).sum()
        for tolerance in (1e-12, 1e-11, 1e-10, 1e-9):
            overlap = frechet._regular_overlap(lower.T @ lower, 4 * np.log(np.diag(lower)).sum(), tolerance)
            assert overlap is None or abs(2 * (overlap - exact)) < 3 * tolerance + 1e-12
            taken += overlap is not None
    assert 5 < taken < 31


def test_a_gaussian_is_factored_once(monkeypatch):
    calls = []
    cholesky = scipy.linalg.cholesky
    monkeypatch.setattr(
        scipy.linalg, 'cholesky', lambda *args, **kwargs: calls.append(1) or cholesky(*args, **kwargs)
    )
    reference = Gaussian(np.zeros(3), np.eye(3))
    for scale in (1, 2, 3):
        assert reference.distance(Gaussian(np.zeros(3), scale**2 * np.eye(3))) == pytest.approx(
            3 * (scale - 1) ** 2, abs=1e-13
        )
    assert len(calls) == 4


def test_the_benchmark_computes_the_same_distance_in_every_row():
    rows = json.loads(run_python('benchmarks/frechet.py', '--dim=16', '--rounds=1', '--json').stdout)['rows']
    *same, few = (row['distance'] for row in rows.values())
    assert len(same) == 4 and same == pytest.approx([same[1]] * 4, abs=1e-7) and few > 2 * same[1] > 0


@pytest.mark.parametrize(
    'change, words',
    [
        (dict(mu1=[0, np.nan, 0]), 'the first statistics: some values are NaN'),
        (dict(sigma2=np.full((3, 3), np.inf)), 'the second statistics: .* infinite'),
        (dict(sigma1=np.eye(4)), 'shape'),
        (dict(mu1=np.zeros(2), sigma1=np.eye(2)), 'different detectors'),
        (dict(sigma1=np.triu(np.ones((3, 3)))), 'not symmetric'),
        (dict(sigma2=np.diag([1.0, 1.0, -1.0])), 'the second statistics: .* negative eigenvalue'),
        (dict(sigma2=np.eye(3, dtype=complex)), 'real numbers'),
    ],
)
def test_what_is_no_gaussian_is_refused(change, words):
    arguments = dict(mu1=np.zeros(3), sigma1=np.eye(3), mu2=np.zeros(3), sigma2=np.eye(3))
    with pytest.raises(UserError, match=words):
        frechet_distance(**(arguments | change))


# ----------------------------------------------------------------------------
# Kernel distance.


def test_squared_mmd_is_the_double_sum_over_pairs():
    x, y = normal(7, 3, 0).tolist(), normal(5, 3, 1).tolist()
    k = lambda a, b: (sum(p * q for p, q in zip(a, b)) / 3 + 1) ** 3
    expected = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / 42
    expected += sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / 20
    expected -= 2 * sum(k(a, b) for a in x for b in y) / 35
    assert squared_mmd(*(torch.tensor(v, dtype=torch.float64) for v in (x, y))).item() == pytest.approx(
        expected, rel=1e-12
    )


def test_frechet_distance_is_that_of_torchmetrics():
    """Of 60 and 80 images of 3x2x2 values, which are their own features; it takes eigenvalues of the product of covariances."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    theirs = FrechetInceptionDistance(feature=torch.nn.Flatten(), input_img_size=(3, 2, 2)).set_dtype(
        torch.float64
    )
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.rand(n, 3, 2, 2, generator=generator, dtype=torch.float64) ** power
        for n, power in ((60, 1), (80, 2))
    )
    theirs.update(x, real=False)
    theirs.update(y, real=True)
    assert frechet_distance(
        *gaussian(x.flatten(1).numpy()), *gaussian(y.flatten(1).numpy())
    ) == pytest.approx(theirs.compute().item(), rel=1e-9)


@pytest.mark.filterwarnings('ignore:Metric')  # that it keeps all features
def test_kernel_distance_of_whole_sets_is_that_of_torchmetrics():
    from torchmetrics.image.kid import KernelInceptionDistance

    theirs = KernelInceptionDistance(feature=torch.nn.Flatten(), subsets=1, subset_size=60)
    x, y = normal(60, 8, 2), normal(60, 8, 3) * 1.2 + 0.3
    theirs.set_dtype(torch.float64)
    theirs.update(y, real=True)
    theirs.update(x, real=False)
    ours = kernel_distance(x, y, block=1000)
    assert ours['value'] == pytest.approx(theirs.compute()[0].item(), rel=1e-5)
    assert ours == dict(value=ours['value'], std=0, error=None, blocks=1, block=60)


def test_kernel_distance_is_unbiased():
    """Blocks of 4 of equal distributions: the mean of 2,000 is within three standard errors of 0, and about half of them are negative."""
    values = torch.stack([squared_mmd(*normal(8, 5, seed).split(4)) for seed in range(2000)])
    assert abs(values.mean()) < 3 * values.std() / 2000**0.5
    assert 0.4 < (values < 0).double().mean() < 0.75


def test_expected_kernel_distance_has_its_closed_form():
    """In one dimension k = 1 + 3xy + 3x²y² + x³y³, so the squared discrepancy is 3 (Δ E x)² + 3 (Δ E x²)² + (Δ E x³)²."""
    x, y = normal(40_000, 1, 0), normal(40_000, 1, 1) + 0.5
    expected = 3 * 0.5**2 + 3 * 0.25**2 + (0.5**3 + 3 * 0.5) ** 2
    result = kernel_distance(x, y, block=1000, blocks=40)
    assert abs(result['value'] - expected) < 3 * result['error'] and result['error'] < 0.05 * expected


def test_blocks_of_a_permutation_are_disjoint_and_hold_every_image(monkeypatch):
    """13 images in blocks of 4: three blocks a permutation, one image left out of each, another one next time."""
    seen = []
    monkeypatch.setattr(
        'metrics.kernel.squared_mmd',
        lambda x, y: seen.append((x.flatten().tolist(), y.flatten().tolist())) or torch.tensor(0.0),
    )
    assert (
        kernel_distance(torch.arange(13.0)[:, None], torch.arange(20.0)[:, None], block=4, blocks=30)[
            'blocks'
        ]
        == 30
    )
    for side, count in ((0, 13), (1, 20)):
        permutations = np.array([block[side] for block in seen]).reshape(10, 12)
        assert (
            all(len(set(images)) == 12 for images in permutations)
            and len(np.unique(permutations, axis=0)) == 10
        )
        assert set(permutations.flat) == set(range(count))


@pytest.mark.parametrize('shift', [0.0, 0.6])
def test_error_of_a_kernel_distance_is_what_repeated_experiments_show(shift):
    """400 images in blocks of 50, 8 of 60 independent: a shifted set scatters as the error says, equal distributions by less."""
    results = [
        kernel_distance(normal(400, 4, 2 * i) + shift, normal(400, 4, 2 * i + 1), block=50, blocks=60, seed=i)
        for i in range(60)
    ]
    scatter = np.std([r['value'] for r in results], ddof=1)
    error = np.sqrt(np.mean([r['error'] ** 2 for r in results]))
    assert error > 0.8 * scatter
    assert error < (1.35 if shift else 5) * scatter
    assert error > 2 * np.mean([r['std'] for r in results]) / 60**0.5  # what ignoring the overlap would say


def test_fewer_images_than_a_block_make_smaller_blocks():
    result = kernel_distance(normal(30, 4, 0), normal(200, 4, 1), blocks=5)
    assert (result['block'], result['blocks'], result['error']) == (30, 5, None) and result['std'] > 0
    again, other = (
        kernel_distance(normal(30, 4, 0), normal(200, 4, 1), blocks=5, seed=seed) for seed in (0, 1)
    )
    assert result == again != other


@pytest.mark.parametrize(
    'features, reference, words',
    [
        (torch.zeros(1, 3), torch.zeros(5, 3), '1 features of the images are too few'),
        (torch.zeros(5, 3), torch.zeros(5, 4), 'different detectors'),
        (torch.zeros(5, 3), torch.full((5, 3), torch.nan), 'features of the reference are NaN'),
        (torch.zeros(5, 3), torch.zeros(5), 'shape'),
    ],
)
def test_features_that_cannot_be_compared_are_refused(features, reference, words):
    for measure in (
        kernel_distance,
        lambda x, y: precision_recall(x, y, k=1),
        lambda x, y: density_coverage(x, y, k=1),
    ):
        with pytest.raises(UserError, match=words):
            measure(features, reference)


def test_a_block_of_one_sample_is_refused():
    with pytest.raises(UserError, match='needs at least 1 block'):
        kernel_distance(torch.zeros(5, 3), torch.zeros(5, 3), block=1)


# ----------------------------------------------------------------------------
# Neighbors.


def by_neighbors(features, reference, k):
    """All four measures from scikit-learn's trees and a full table of distances; for data without ties."""
    distances = scipy.spatial.distance.cdist(reference, features)
    radius = lambda x: (
        NearestNeighbors(n_neighbors=k, algorithm='kd_tree').fit(x).kneighbors()[0][:, -1]
    )  # without the points themselves
    inside_real, inside_images = distances <= radius(reference)[:, None], distances <= radius(features)[None]
    return (
        inside_real.any(axis=0).mean(),
        inside_images.any(axis=1).mean(),
        inside_real.sum() / k / len(features),
        inside_real.any(axis=1).mean(),
    )


@pytest.mark.parametrize('k', [1, 3, 5])
def test_neighbor_measures_are_those_of_scikit_learn(k):
    features, reference = normal(150, 4, 0) + 1, normal(120, 4, 1)
    expected = by_neighbors(features.numpy(), reference.numpy(), k)
    assert all(0.3 < value < 0.9 for value in expected)
    assert (
        *precision_recall(features, reference, k),
        *density_coverage(features, reference, k),
    ) == pytest.approx(expected, rel=1e-12)


def test_chunks_do_not_show_in_the_results():
    """With duplicates and images equal to the reference's, so with many samples on boundaries; float32, and far from the origin."""
    reference = normal(97, 16, 0, torch.float32) + 100
    features = torch.cat([reference[:40], reference[:10], normal(30, 16, 1, torch.float32) + 100])
    for measure in (precision_recall, density_coverage):
        assert len({measure(features, reference, chunk=chunk) for chunk in (1, 7, 32, 97, 2048)}) == 1


def test_no_more_than_a_chunk_of_distances_is_in_memory(monkeypatch):
    shapes = set()
    addmm = torch.addmm
    monkeypatch.setattr(
        torch,
        'addmm',
        lambda *args, **kwargs: shapes.add(args[1].shape[:1] + args[2].shape[1:]) or addmm(*args, **kwargs),
    )
    precision_recall(normal(50, 3, 0), normal(41, 3, 1), chunk=16)
    assert max(shapes) == (16, 16)


def test_a_set_against_itself_is_precise_complete_and_of_density_one():
    """A ball of radius r_k holds its center and the k − 1 nearer neighbors, and its boundary the k-th: density counts k, exactly."""
    x = normal(200, 8, 3)
    assert precision_recall(x, x) == (1, 1)
    assert density_coverage(x, x) == (1, 1)


def test_disjoint_sets_share_nothing():
    x = normal(50, 3, 0)
    assert precision_recall(x, x + 100) == (0, 0) and density_coverage(x, x + 100) == (0, 0)


def test_one_of_two_clusters_is_precise_and_half_complete():
    """Reference at 0, 1, 2, 3 and 100, 101, 102, 103 of a line, all radii 1 at k = 1; images only near the first four."""
    reference = torch.tensor([0.0, 1, 2, 3, 100, 101, 102, 103])[:, None]
    assert precision_recall(torch.tensor([0.4, 1.4, 2.4, 3.4])[:, None], reference, k=1) == (1, 0.5)
    # 0.4: inside the balls of 0, 1; 1.4: 1, 2; 2.4: 2, 3; 3.4: 3
    assert density_coverage(torch.tensor([0.4, 1.4, 2.4, 3.4])[:, None], reference, k=1) == (7 / 4, 0.5)


def test_boundaries_belong_to_balls_of_precision_and_not_of_density():
    """Images at −1 and 4 lie on the balls of 0 and of 3, of radius 1; scaled by 0.1 no sum is exact."""
    reference, images = torch.tensor([0.0, 1, 2, 3])[:, None], torch.tensor([-1.0, 4.0])[:, None]
    for scale in (1, 0.1):
        x, y = (v.double() * scale for v in (images, reference))
        assert precision_recall(x, y, k=1)[0] == 1
        assert density_coverage(x, y, k=1) == (0, 0)


def test_duplicates_are_neighbors_but_a_sample_is_not_its_own():
    """Reference 0, 0, 0, 5, 6, 7: at k = 2 balls reach 0, 0, 0, 2, 1, 2 far, at k = 3 they reach 5, 5, 5, 5, 6, 7."""
    reference = torch.tensor([0.0, 0, 0, 5, 6, 7])[:, None] / 3
    images = torch.tensor([0.0, 0.3, 40, 41])[:, None] / 3
    assert (
        precision_recall(images, reference, k=2)[0] == 0.25
    )  # the image at 0: a ball of radius 0 contains its boundary
    assert density_coverage(images, reference, k=2) == (0, 0)
    assert density_coverage(images, reference, k=3) == (9 / 3 / 4, 1)  # 0 in three balls, 0.3 in all six


def test_too_few_samples_for_k_neighbors_are_refused():
    with pytest.raises(UserError, match='3 features of the images are too few: at least 4'):
        precision_recall(normal(3, 2, 0), normal(9, 2, 1))
    with pytest.raises(UserError, match='5 features of the reference are too few: at least 6'):
        density_coverage(normal(9, 2, 0), normal(5, 2, 1))
    assert precision_recall(normal(4, 2, 0), normal(4, 2, 0)) == (1, 1)


# ----------------------------------------------------------------------------
# Inception Score.


def test_undecided_classes_score_one_and_decided_balanced_ones_their_number():
    """KL is 0 where p(y|x) = p(y), and log K for one-hot rows, all other terms being 0 log 0."""
    assert inception_score(torch.full((50, 7), 1 / 7))['value'] == pytest.approx(1, rel=1e-12)
    assert inception_score(torch.eye(7).repeat(20, 1)) == dict(
        value=pytest.approx(7, rel=1e-12), std=pytest.approx(0, abs=1e-12), splits=10
    )


def test_splits_are_contiguous_parts_of_the_images():
    """Two classes, each in a half of its own: every half alone is of one class and scores 1, all together 2."""
    halves = torch.eye(2).repeat_interleave(10, dim=0)
    assert inception_score(halves, splits=2)['value'] == pytest.approx(1)
    assert inception_score(halves, splits=1)['value'] == pytest.approx(2)


def test_inception_score_is_the_formula_of_its_paper():
    """53 images do not divide by 5: parts begin at ⌊53 i/5⌋. Deviation of the population."""
    p = torch.softmax(3 * normal(53, 9, 0), dim=1).numpy()
    parts = [p[53 * i // 5 : 53 * (i + 1) // 5] for i in range(5)]
    scores = [
        math.exp(np.mean(np.sum(part * (np.log(part) - np.log(part.mean(axis=0))), axis=1))) for part in parts
    ]
    result = inception_score(torch.from_numpy(p).float(), splits=5)
    assert result == dict(
        value=pytest.approx(np.mean(scores), rel=1e-6), std=pytest.approx(np.std(scores), rel=1e-5), splits=5
    )


@pytest.mark.filterwarnings('ignore:Metric', 'ignore:std')  # that it keeps all features, and of one part
def test_inception_score_of_one_part_is_that_of_torchmetrics():
    """It shuffles, which one part does not notice."""
    from torchmetrics.image.inception import InceptionScore

    theirs = InceptionScore(feature=torch.nn.Flatten(), splits=1)
    logits = 2 * normal(40, 6, 1)
    theirs.update(logits)
    assert inception_score(logits.softmax(dim=1), splits=1)['value'] == pytest.approx(
        theirs.compute()[0].item(), rel=1e-5
    )


@pytest.mark.parametrize(
    'probabilities, splits, words',
    [
        (torch.full((9, 2), 0.5), 10, '9 images cannot be split into 10'),
        (torch.full((9, 2), 0.6), 3, 'sum to 1'),
        (torch.tensor([[1.5, -0.5]] * 4), 2, 'nonnegative'),
        (torch.full((4, 2), torch.nan), 2, 'nonnegative'),
    ],
)
def test_what_has_no_inception_score_is_refused(probabilities, splits, words):
    with pytest.raises(UserError, match=words):
        inception_score(probabilities, splits)


# ----------------------------------------------------------------------------
# Bootstrap and extrapolation.


def test_bootstrap_interval_has_the_width_of_repeated_experiments():
    """Its width matches the spread of the distance over independent samples, and it holds the distance itself."""
    rng = np.random.default_rng(3)
    mu, sigma = np.array([0.5, 0, 0, 0]), np.diag([1.0, 2.0, 1.0, 0.5])
    samples = rng.normal(size=(200, 300, 4))
    distances = [frechet_distance(*gaussian(sample), mu, sigma) for sample in samples]
    spread = np.subtract(*np.quantile(distances, [0.975, 0.025]))
    intervals = [
        bootstrap_interval(torch.from_numpy(sample), mu, sigma, num=200, seed=i)
        for i, sample in enumerate(samples[:10])
    ]
    assert np.mean([high - low for low, high in intervals]) == pytest.approx(spread, rel=0.2)
    assert all(low < distance < high for (low, high), distance in zip(intervals, distances))
    assert intervals[0] == bootstrap_interval(samples[0], mu, sigma, num=200, seed=0)


def test_bootstrap_interval_holds_the_distance_of_a_small_sample():
    """Resamples of 30 images in 10 dimensions are all farther from the reference than the sample is."""
    features = np.random.default_rng(4).normal(size=(30, 10))
    low, high = bootstrap_interval(features, np.zeros(10), np.eye(10), num=100)
    assert low < frechet_distance(*gaussian(features), np.zeros(10), np.eye(10)) < high


def test_classes_in_turn_are_resampled_by_themselves_as_wide_as_repeated_experiments():
    """Two classes far apart, 150 images of each in every sample: with the numbers of images free to vary, the interval is
    several times as wide."""
    rng = np.random.default_rng(5)
    mu, sigma = np.array([1.0, 0.5]), np.diag([10.0, 2.0])
    centers = np.resize([[-3.0, 0], [3, 0]], (300, 2))
    samples = rng.normal(size=(200, 300, 2)) + centers
    distances = [frechet_distance(*gaussian(sample), mu, sigma) for sample in samples]
    spread = np.subtract(*np.quantile(distances, [0.975, 0.025]))
    width = lambda **options: np.mean(
        [
            np.ptp(bootstrap_interval(torch.from_numpy(sample), mu, sigma, num=200, seed=i, **options))
            for i, sample in enumerate(samples[:10])
        ]
    )
    assert width(strata=2) == pytest.approx(spread, rel=0.2)
    assert width() > 1.5 * spread

    counts = resample(np.random.default_rng(0), 10, 3)
    assert [counts[i::3].sum() for i in range(3)] == [4, 3, 3] and counts.max() > 1


def test_resampled_moments_are_those_of_the_repeated_images(monkeypatch):
    """Images counted 0 to 3 times, in chunks and far from the origin, against an array that repeats them. Those counted 0 times are NaN."""
    monkeypatch.setattr('metrics.uncertainty.CHUNK', 16)
    features = normal(50, 5, 7) + 1000
    counts = np.random.default_rng(0).integers(0, 4, 50)
    expected = frechet_distance(*gaussian(features.numpy().repeat(counts, axis=0)), np.zeros(5), np.eye(5))
    sample = _Sample(features, np.zeros(5), np.eye(5))
    sample.features = features.where(torch.from_numpy(counts > 0)[:, None], torch.nan)
    assert sample.distance(counts) == pytest.approx(expected, rel=1e-12)


def test_the_reference_is_factored_once_for_all_resamples(monkeypatch):
    factored = []
    cholesky = scipy.linalg.cholesky
    monkeypatch.setattr(
        scipy.linalg, 'cholesky', lambda a, **kwargs: factored.append(a[0, 0]) or cholesky(a, **kwargs)
    )
    bootstrap_interval(normal(40, 3, 0), np.zeros(3), 5 * np.eye(3), num=10)
    assert factored.count(5) == 1 and len(factored) == 12


def test_extrapolated_distance_is_nearer_to_the_true_one():
    """Covariance 1.2² of a power law against the law itself: FID of 400 images in 20 dimensions is too large by its bias, in every experiment."""
    deviations = np.arange(1, 21) ** -0.5
    reference = np.zeros(20), np.diag(deviations**2)
    true = 0.2**2 * np.sum(deviations**2)
    samples = [normal(400, 20, seed).numpy() * deviations * 1.2 for seed in range(12)]
    biased = np.array([frechet_distance(*gaussian(sample), *reference) for sample in samples]) - true
    extrapolated = (
        np.array([frechet_infinity(sample, *reference, seed=i)['value'] for i, sample in enumerate(samples)])
        - true
    )
    assert (
        abs(extrapolated.mean()) < 0.3 * biased.mean() and np.abs(extrapolated).mean() < np.abs(biased).mean()
    )


def test_extrapolated_distance_of_equal_distributions_is_about_zero_and_may_be_negative():
    """At most a fifth of the biased value is left; some experiments end below zero and say so."""
    results = [
        frechet_infinity(normal(300, 6, seed), np.zeros(6), np.eye(6), seed=seed)['value']
        for seed in range(12)
    ]
    biased = np.mean(
        [
            frechet_distance(*gaussian(normal(300, 6, seed).numpy()), np.zeros(6), np.eye(6))
            for seed in range(12)
        ]
    )
    assert abs(np.mean(results)) < 0.2 * biased and min(results) < 0 < max(results)


def test_extrapolation_is_the_intercept_of_a_line_in_the_reciprocal_number(monkeypatch):
    """Distances made to be 3 + 500/N come back as 3 with no error; with noise, as scipy.stats' line through the same points."""
    noise = np.random.default_rng(0).normal(size=15)
    sizes = []

    def distances(scale):
        return lambda self, counts: (
            sizes.append(int(counts.sum())) or 3 + 500 / counts.sum() + scale * noise[len(sizes) - 1]
        )

    monkeypatch.setattr(_Sample, 'distance', distances(0))
    result = frechet_infinity(normal(1000, 5, 0), np.zeros(5), np.eye(5))
    assert result['value'] == pytest.approx(3) and result['error'] == pytest.approx(0, abs=1e-12)
    assert (
        result['sizes'] == sizes and len(sizes) == 15 and (sizes[0], sizes[7], sizes[14]) == (100, 550, 1000)
    )
    sizes.clear()
    monkeypatch.setattr(_Sample, 'distance', distances(0.1))
    noisy = frechet_infinity(normal(1000, 5, 0), np.zeros(5), np.eye(5))
    line = scipy.stats.linregress(1 / np.array(sizes), 3 + 500 / np.array(sizes) + 0.1 * noise)
    assert (noisy['value'], noisy['error']) == pytest.approx((line.intercept, line.intercept_stderr))


def test_extrapolation_needs_several_images_a_dimension():
    """Sizes start at n/10 or 2 D."""
    assert frechet_infinity(normal(40, 10, 0), np.zeros(10), np.eye(10), points=3)['sizes'] == [20, 30, 40]
    with pytest.raises(UserError, match='at least 40 are needed'):
        frechet_infinity(normal(39, 10, 0), np.zeros(10), np.eye(10))
