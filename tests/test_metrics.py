"""Fréchet distance, streaming statistics, detectors and reference files."""
import io
import pickle
import zipfile

import numpy as np
import pytest
import scipy.linalg
import torch
from golden import golden_numbers

from dnnlib.util import UserError, file_sha256
from metrics.calc import feature_statistics
from metrics.detectors import load_detector
from metrics.frechet import frechet_distance
from metrics.images import image_batches
from metrics.reference import Reference, check_same_detector, load_reference, save_reference
from metrics.statistics import FeatureStats, bootstrap_interval


class Pooled(torch.nn.Module):
    """Fixed random features: convolution, ReLU, mean over the image."""

    def __init__(self, dim: int = 6, channels: int = 3):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, dim, 3, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.randn(self.conv.weight.shape, generator=torch.Generator().manual_seed(dim)))

    def forward(self, images):
        return self.conv(images.float() / 255).relu().mean([2, 3])


class Grey(Pooled):
    def __init__(self):
        super().__init__(channels=1)
        self.img_channels = 1


class TwoHeads(Pooled):
    """Classes unless asked for features, like NVIDIA's Inception."""

    def forward(self, images, return_features: bool = False):
        features = self.conv(images.float() / 255).relu().mean([2, 3])
        return features if return_features else features.softmax(dim=1)[:, :2]


class Images(torch.nn.Module):
    def forward(self, images):
        return images


def save(module, path):
    torch.jit.script(module).save(path)
    return path


def gaussian(features):
    return features.mean(axis=0), np.cov(features, rowvar=False)


def images(count, channels=3, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, channels, 8, 8), dtype=np.uint8))

#----------------------------------------------------------------------------
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


@pytest.mark.parametrize('count', [20, 500])
def test_identical_sets_have_distance_zero(count):
    """With fewer samples than dimensions too: an eigenvalue that is 0 must not come back as the root of a rounding error."""
    mu, sigma = gaussian(np.random.default_rng(0).normal(size=(count, 100)))
    assert 0 <= frechet_distance(mu, sigma, mu, sigma) < 1e-11


def test_one_lost_dimension_is_no_root_of_a_rounding_error():
    """Covariance A Aᵀ, A [D, D − 1], against the identity: tr (Σ1 Σ2)^½ is the sum of A's singular values. Cholesky often gets through it."""
    for seed in range(20):
        a = np.random.default_rng(seed).normal(size=(6, 5))
        expected = np.sum((scipy.linalg.svdvals(a) - 1) ** 2) + 1
        assert frechet_distance(np.zeros(6), a @ a.T, np.zeros(6), np.eye(6)) == pytest.approx(expected, rel=1e-12)


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


@pytest.mark.parametrize('change, words', [
    (dict(mu1=[0, np.nan, 0]), 'NaN'),
    (dict(sigma2=np.full((3, 3), np.inf)), 'infinite'),
    (dict(sigma1=np.eye(4)), 'shape'),
    (dict(mu1=np.zeros(2), sigma1=np.eye(2)), 'different detectors'),
    (dict(sigma1=np.triu(np.ones((3, 3)))), 'not symmetric'),
    (dict(sigma2=np.diag([1.0, 1.0, -1.0])), 'negative eigenvalue'),
    (dict(sigma2=np.eye(3, dtype=complex)), 'real numbers'),
])
def test_what_is_no_gaussian_is_refused(change, words):
    arguments = dict(mu1=np.zeros(3), sigma1=np.eye(3), mu2=np.zeros(3), sigma2=np.eye(3))
    with pytest.raises(UserError, match=words):
        frechet_distance(**(arguments | change))

#----------------------------------------------------------------------------
# Statistics.

def test_streaming_equals_one_pass_over_everything():
    features = np.random.default_rng(2).normal(3.0, 2.0, (101, 5)).astype(np.float32)
    stats = FeatureStats(5, keep=True)
    for batch in np.array_split(features, 7):
        stats.append(torch.from_numpy(batch))
    assert stats.reduce() is stats and stats.count == 101
    np.testing.assert_allclose(stats.mu, features.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(stats.sigma, np.cov(features.astype(np.float64), rowvar=False), rtol=0, atol=1e-11)
    np.testing.assert_array_equal(stats.features, features)


def test_padding_does_not_count():
    features = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    padded, plain = FeatureStats(3, keep=True), FeatureStats(3, keep=True)
    padded.append(torch.cat([features, torch.full((2, 3), torch.nan)]), weights=torch.tensor([1.0] * 10 + [0.0] * 2))
    plain.append(features)
    np.testing.assert_array_equal(padded.sigma, plain.sigma)
    assert padded.count == 10 and len(padded.features) == 10


def test_one_image_has_no_covariance():
    stats = FeatureStats(3)
    stats.append(torch.zeros(1, 3))
    with pytest.raises(UserError, match='at least 2'):
        _ = stats.sigma


def test_summing_over_processes_twice_is_a_bug():
    stats = FeatureStats(3).reduce()
    with pytest.raises(RuntimeError, match='already'):
        stats.reduce()


def test_bootstrap_interval_has_the_width_of_repeated_experiments():
    """Its width matches the spread of the distance over independent samples, and it holds the distance itself."""
    rng = np.random.default_rng(3)
    mu, sigma = np.array([0.5, 0, 0, 0]), np.diag([1.0, 2.0, 1.0, 0.5])
    samples = rng.normal(size=(200, 300, 4))
    distances = [frechet_distance(*gaussian(sample), mu, sigma) for sample in samples]
    spread = np.subtract(*np.quantile(distances, [0.975, 0.025]))
    intervals = [bootstrap_interval(sample, mu, sigma, num=200, seed=i) for i, sample in enumerate(samples[:10])]
    assert np.mean([high - low for low, high in intervals]) == pytest.approx(spread, rel=0.2)
    assert all(low < distance < high for (low, high), distance in zip(intervals, distances))
    assert intervals[0] == bootstrap_interval(samples[0], mu, sigma, num=200, seed=0)


def test_bootstrap_interval_holds_the_distance_of_a_small_sample():
    """Resamples of 30 images in 10 dimensions are all farther from the reference than the sample is."""
    features = np.random.default_rng(4).normal(size=(30, 10))
    low, high = bootstrap_interval(features, np.zeros(10), np.eye(10), num=100)
    assert low < frechet_distance(*gaussian(features), np.zeros(10), np.eye(10)) < high

#----------------------------------------------------------------------------
# Detectors.

def test_grey_images_become_colour_unless_the_detector_wants_grey(tmp_path):
    colour, grey = load_detector(save(Pooled(), tmp_path / 'c.pt')), load_detector(save(Grey(), tmp_path / 'g.pt'))
    x = images(4, channels=1)
    torch.testing.assert_close(colour(x), colour(x.repeat(1, 3, 1, 1)))
    assert (colour.img_channels, grey.img_channels, grey(x).shape, grey.dim, grey.name) == (3, 1, (4, 6), 6, 'g')
    with pytest.raises(UserError, match='wants images of 1 channels'):
        grey(images(4))


def test_a_detector_with_two_heads_is_asked_for_features(tmp_path):
    detector = load_detector(save(TwoHeads(), tmp_path / 'inception.pt'))
    features = detector(images(3))
    assert features.shape == (3, 6) and detector.metric_name == 'FID' and not features.requires_grad
    torch.testing.assert_close(features, load_detector(save(Pooled(), tmp_path / 'plain.pt'))(images(3)))


def test_detectors_are_known_by_their_digest(tmp_path):
    path = save(Pooled(), tmp_path / 'd.pt')
    assert load_detector(path, sha256=file_sha256(path).upper()).digest == file_sha256(path)
    with pytest.raises(UserError, match='does not have the SHA-256'):
        load_detector(path, sha256='0' * 64)


def test_files_that_are_no_detectors_are_refused(tmp_path):
    (tmp_path / 'junk.pt').write_bytes(b'junk')
    torch.save(dict(a=torch.zeros(2)), tmp_path / 'weights.pt')
    for name in ('junk.pt', 'weights.pt'):
        with pytest.raises(UserError, match='not a TorchScript file'):
            load_detector(tmp_path / name)
    with pytest.raises(UserError, match='did not return'):
        load_detector(save(Images(), tmp_path / 'images.pt'))(images(2))
    with pytest.raises(UserError, match='failed on uint8 images') as error:
        load_detector(save(Pooled(), tmp_path / 'pooled.pt'))(images(2)[..., :2, :2])
    assert '\n' not in str(error.value)


def test_statistics_do_not_depend_on_the_batch_size(tmp_path):
    detector = load_detector(save(Pooled(), tmp_path / 'd.pt'))
    x = images(30)
    data = [(image.numpy(), None) for image in x]
    expected = gaussian(detector(x).double().numpy())
    for batch in (4, 64):
        stats = feature_statistics(image_batches(data, batch), detector)
        np.testing.assert_allclose(stats.sigma, expected[1], atol=1e-8)
    with pytest.raises(UserError, match='no images'):
        feature_statistics([], load_detector(tmp_path / 'd.pt'))


def test_processes_share_the_images_in_order():
    data = [(np.full((1, 2, 2), i, np.uint8), None) for i in range(50)]
    shares = [torch.cat(list(image_batches(data, 3, rank, 4)))[:, 0, 0, 0].tolist() for rank in range(4)]
    assert [i for share in shares for i in share] == list(range(50)) and all(len(share) in (12, 13) for share in shares)

#----------------------------------------------------------------------------
# References.

REFERENCE = Reference(np.arange(3.0), np.eye(3), 'inception', 'a' * 64, 100, '8x8x3')


def test_a_reference_comes_back_as_written_and_edm_reads_it(tmp_path):
    save_reference(tmp_path / 'r.npz', REFERENCE)
    back = load_reference(tmp_path / 'r.npz')
    assert (back.detector, back.detector_digest, back.num_images, back.resolution) == ('inception', 'a' * 64, 100, '8x8x3')
    with np.load(tmp_path / 'r.npz', allow_pickle=False) as file:
        np.testing.assert_array_equal(file['mu'], REFERENCE.mu)
        np.testing.assert_array_equal(file['sigma'], REFERENCE.sigma)


class Bomb:
    def __reduce__(self):
        return exec, ('raise SystemExit("code ran")',)


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def truncated_member():
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
        archive.writestr('mu.npy', b'\x93NUMPY\x01\x00')
    return file.getvalue()


@pytest.mark.parametrize('content, words', [
    (pickle.dumps(Bomb()), 'not an .npz'),
    (npz(mu=np.array([Bomb()], dtype=object), sigma=np.eye(1)), 'plain arrays'),
    (npz(mu=np.zeros(3), sigma=np.eye(3))[:-40], 'plain arrays'),
    (truncated_member(), 'plain arrays'),
    (npz(mu=np.zeros(3)), 'has no sigma'),
    (npz(mu=np.zeros(3), sigma=np.eye(2)), 'shape'),
    (npz(mu=np.full(2, np.nan), sigma=np.eye(2)), 'NaN'),
    (npz(mu=np.zeros(2), sigma=np.array([[1.0, 2.0], [0.0, 1.0]])), 'not symmetric'),
    (npz(mu=np.zeros(2), sigma=np.array([['a', 'b'], ['c', 'd']])), 'real numbers'),
    (npz(mu=np.zeros(2), sigma=np.eye(2), num_images=np.array('many')), 'num_images'),
    (b'', 'not an .npz'),
])
def test_broken_or_hostile_references_are_refused(tmp_path, content, words):
    path = tmp_path / 'r.npz'
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        load_reference(path)
    assert str(path) in str(error.value) and '\n' not in str(error.value)


def test_another_detectors_reference_is_refused_and_an_unknown_one_noted(tmp_path, capsys):
    path = save(Pooled(dim=3), tmp_path / 'd.pt')
    detector = load_detector(path)
    with pytest.raises(UserError, match='was made with detector inception'):
        check_same_detector(REFERENCE, detector, 'r.npz')
    check_same_detector(Reference(np.zeros(3), np.eye(3), 'd', detector.digest), detector, 'r.npz')
    assert capsys.readouterr().err == ''
    check_same_detector(Reference(np.zeros(3), np.eye(3)), detector, 'r.npz')
    assert 'does not record its detector' in capsys.readouterr().err
    detector(images(1))
    with pytest.raises(UserError, match='is of 4 features, detector d returns 3'):
        check_same_detector(Reference(np.zeros(4), np.eye(4)), detector, 'r.npz')
