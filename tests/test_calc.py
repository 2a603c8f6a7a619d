"""From images to features: one pass, its cache, its statistics, and a network's images as a source."""

import numpy as np
import pytest
import torch
from PIL import Image

from dnnlib.util import UserError
from metrics.calc import compute_features, image_digests, reference_of
from metrics.generated import GeneratedImages
from metrics.images import ImageSource
from metrics.statistics import FeatureStats
from sampling import generation
from training.checkpoint import load_network

BATCH = 4


class Pixels(ImageSource):
    """Images in memory; those in `bad` cannot be read."""

    def __init__(self, images, bad=(), name='pixels'):
        super().__init__(name, len(images), None, 0)
        self.images, self.image_shape, self.bad, self.skip_bad = images, list(images.shape[1:]), bad, True

    def pixels(self, i):
        if i in self.bad:
            raise UserError(f'image {i} is bad')
        return self.images[i].numpy()

    def fingerprint(self):
        return self.name


class Sums:
    """A detector whose three features are sums over the channels; two classes by the first. Counts its calls, and refuses from `limit` on."""

    def __init__(self, digest='d', limit=10**9, dim=3):
        self.name, self.digest, self.dim, self.device, self.has_classes, self.limit, self.shapes = (
            'sums',
            digest,
            dim,
            'cpu',
            True,
            limit,
            [],
        )

    def __call__(self, images):
        self.shapes.append(tuple(images.shape))
        if len(self.shapes) > self.limit:
            raise KeyboardInterrupt
        self.dim = 3
        return images.float().sum(dim=[2, 3])

    def with_probabilities(self, images):
        features = self(images)
        share = features[:, :1] / (64 * 255)
        return features, torch.cat([share, 1 - share], dim=1)


def images(count, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, 8, 8), dtype=np.uint8))


def look(source, detector=None, **options):
    return compute_features(source, {'x': detector or Sums()}, BATCH, **options)['x']


# ----------------------------------------------------------------------------
# Statistics.


def test_streaming_equals_one_pass_over_everything():
    features = np.random.default_rng(2).normal(3.0, 2.0, (101, 5)).astype(np.float32)
    stats = FeatureStats(5)
    for batch in np.array_split(features, 7):
        stats.append(torch.from_numpy(batch))
    assert stats.reduce() is stats and stats.count == 101
    np.testing.assert_allclose(stats.mu, features.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(
        stats.sigma, np.cov(features.astype(np.float64), rowvar=False), rtol=0, atol=1e-11
    )


def test_features_far_from_zero_lose_no_digits():
    """Sums of squares of 10⁸ would lose all but the first digits of a variance of 1."""
    features = torch.from_numpy(np.random.default_rng(3).normal(1e4, 1.0, (4000, 3)))
    stats = FeatureStats(3)
    for batch in features.split(64):
        stats.append(batch)
    np.testing.assert_allclose(stats.sigma, np.cov(features.numpy(), rowvar=False), rtol=0, atol=1e-11)


def test_one_image_has_no_covariance():
    stats = FeatureStats(3)
    stats.append(torch.zeros(1, 3))
    with pytest.raises(UserError, match='at least 2'):
        _ = stats.sigma


def test_summing_over_processes_twice_is_a_bug():
    stats = FeatureStats(3).reduce()
    with pytest.raises(RuntimeError, match='already'):
        stats.reduce()
    with pytest.raises(RuntimeError, match='already'):
        stats.append(torch.zeros(1, 3))


def test_features_of_another_length_are_refused():
    with pytest.raises(UserError, match=r'shape \(2, 4\), expected \[N, 3\]'):
        FeatureStats(3).append(torch.zeros(2, 4))


# ----------------------------------------------------------------------------
# One pass.


def test_a_pass_sees_every_image_once_in_order_and_always_full_batches():
    x, detector = images(10), Sums(dim=None)
    seen = look(Pixels(x), detector, keep=True, classes={'x'})
    assert set(detector.shapes[1:]) == {(BATCH, 3, 8, 8)} and detector.shapes[0] == (
        1,
        3,
        8,
        8,
    )  # the first tells how many features there are
    torch.testing.assert_close(seen.features, x.float().sum(dim=[2, 3]), rtol=0, atol=0)
    torch.testing.assert_close(seen.probabilities.sum(dim=1), torch.ones(10))
    assert (seen.stats.count, seen.skipped, seen.copies) == (10, 0, 0)
    np.testing.assert_allclose(
        seen.stats.sigma, np.cov(seen.features.double().numpy(), rowvar=False), rtol=1e-9
    )


def test_nothing_is_kept_that_was_not_asked_for():
    seen = look(Pixels(images(10)))
    assert seen.features is None and seen.probabilities is None
    keep = np.arange(10) % 3 == 0
    torch.testing.assert_close(
        look(Pixels(images(10)), keep=keep).features, images(10).float().sum(dim=[2, 3])[keep]
    )


def test_images_that_cannot_be_used_are_left_out_and_counted():
    """A whole batch of them too, and the last one, from which the batch would otherwise be filled up."""
    x, bad = images(11), (0, 4, 5, 6, 7, 10)
    good = [i for i in range(11) if i not in bad]
    seen = look(Pixels(x, bad), keep=True)
    torch.testing.assert_close(seen.features, x[good].float().sum(dim=[2, 3]))
    assert (seen.stats.count, seen.skipped, seen.problems[0], len(seen.problems)) == (
        5,
        6,
        'image 0 is bad',
        6,
    )
    keep = np.arange(11) >= 8
    torch.testing.assert_close(look(Pixels(x, bad), keep=keep).features, x[[8, 9]].float().sum(dim=[2, 3]))
    with pytest.raises(UserError, match='no images in pixels'):
        look(Pixels(x, range(11)))


def test_copies_are_counted():
    x = images(10)
    x[9], x[4] = x[1], x[1]
    assert look(Pixels(x)).copies == 2


def test_digests_tell_images_apart_by_their_pixels_alone():
    x = images(6)
    x[3] = x[0]
    x[4] = x[0]
    x[4, 2, 7, 7] ^= 1
    digests = image_digests(x)
    assert len(digests.unique()) == 5 and digests[3] == digests[0] != digests[4]
    assert torch.equal(image_digests(x[3:]), digests[3:])


def test_a_pass_that_is_asked_to_stop_has_no_result():
    calls = iter([False, True])
    detector = Sums()
    assert (
        compute_features(Pixels(images(40)), {'x': detector}, BATCH, stop=lambda: next(calls)) is None
        and len(detector.shapes) == 2
    )
    assert compute_features(Pixels(images(4)), {'x': Sums()}, BATCH, stop=lambda: False) is not None


def test_progress_counts_images():
    counts = []
    look(Pixels(images(10)), advance=counts.append)
    assert counts == [4, 4, 2]


def test_a_reference_is_what_was_seen():
    seen = look(Pixels(images(10)), keep=np.arange(10) < 3)
    reference = reference_of(Pixels(images(10)), seen, Sums())
    assert (reference.detector, reference.detector_digest, reference.num_images, reference.resolution) == (
        'sums',
        'd',
        10,
        '8x8x3',
    )
    np.testing.assert_array_equal(reference.features, images(10)[:3].float().sum(dim=[2, 3]))


# ----------------------------------------------------------------------------
# The cache.


def test_an_interrupted_pass_goes_on_where_it_was(tmp_path):
    """To the bit; of five batches the second run computes those that the first one had not, and every run the last, of which an image is bad."""
    x, bad = images(19), (18,)
    plain = look(Pixels(x, bad), keep=True, classes={'x'})
    with pytest.raises(KeyboardInterrupt):
        look(Pixels(x, bad), Sums(limit=2), keep=True, classes={'x'}, cache=tmp_path)
    detector = Sums()
    again = look(Pixels(x, bad), detector, keep=True, classes={'x'}, cache=tmp_path)
    assert len(detector.shapes) == 3
    assert torch.equal(again.features, plain.features) and torch.equal(
        again.probabilities, plain.probabilities
    )
    assert (again.skipped, again.copies, again.problems) == (1, 0, ['image 18 is bad'])
    third = look(Pixels(x, bad), Sums(limit=1), cache=tmp_path)
    np.testing.assert_allclose(third.stats.sigma, plain.stats.sigma, rtol=1e-12)
    assert (third.skipped, third.problems) == (1, ['image 18 is bad'])


def test_a_cache_does_not_hide_bad_images_from_those_who_want_none(tmp_path):
    """What --skip-bad left out is an error again without it."""
    look(Pixels(images(8), bad=(5,)), cache=tmp_path)
    assert [path.name for path in tmp_path.rglob('*.npz')] == ['000000000.npz']
    strict = Pixels(images(8), bad=(5,))
    strict.skip_bad = False
    with pytest.raises(UserError, match='image 5 is bad'):
        look(strict, cache=tmp_path)


def test_a_single_image_has_no_statistics_and_its_source_is_named():
    with pytest.raises(UserError, match='only one image in pixels'):
        look(Pixels(images(1)))


def test_a_damaged_or_lacking_batch_is_computed_again(tmp_path):
    x = images(12)
    look(Pixels(x), cache=tmp_path)
    first, second, _ = sorted(tmp_path.glob('*/*.npz'))
    first.write_bytes(first.read_bytes()[:-30])
    second.unlink()
    detector = Sums()
    assert (
        torch.equal(look(Pixels(x), detector, keep=True, cache=tmp_path).features, x.float().sum(dim=[2, 3]))
        and len(detector.shapes) == 2
    )
    detector = Sums()
    assert (
        look(Pixels(x), detector, classes={'x'}, cache=tmp_path).probabilities.shape == (12, 2)
        and len(detector.shapes) == 3
    )


def test_a_complete_cache_is_only_read(tmp_path):
    look(Pixels(images(8)), cache=tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
    look(Pixels(images(8)), Sums(limit=0), cache=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')} == stamps


def test_other_images_another_detector_or_another_batch_are_not_taken_from_the_cache(tmp_path):
    look(Pixels(images(8)), cache=tmp_path)
    same, others = Pixels(images(8)), Pixels(images(8), name='others')
    for source, detector, batch in ((others, Sums(), BATCH), (same, Sums('e'), BATCH), (same, Sums(), 8)):
        compute_features(source, {'x': detector}, batch, cache=tmp_path)
        assert detector.shapes
    assert len(list(tmp_path.iterdir())) == 4


def test_two_detectors_see_the_same_pass_and_each_has_its_own_cache(tmp_path):
    source, first, second = Pixels(images(8)), Sums('a'), Sums('b')
    compute_features(source, {'a': first}, BATCH, cache=tmp_path)
    seen = compute_features(source, {'a': first, 'b': second}, BATCH, keep=True, cache=tmp_path)
    assert len(first.shapes) == len(second.shapes) == 2 and torch.equal(
        seen['a'].features, seen['b'].features
    )


def test_a_cache_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match=r'--cache=.*file cannot be created'):
        look(Pixels(images(4)), cache=tmp_path / 'file')


# ----------------------------------------------------------------------------
# A network's images.


@pytest.fixture(scope='module')
def net(teacher):
    return load_network(teacher)


def test_a_networks_images_are_those_that_generate_makes(net, tmp_path):
    """Batches are always full, whatever is left; dumped files hold the same pixels."""
    seeds = [5, 6, 7, 20, 21]
    source = GeneratedImages(net, seeds, BATCH, steps=2, dump=str(tmp_path / 'dump'))
    expected = generation.generate_batch(net, seeds, steps=2)
    made = torch.cat([x for _, x, _ in source.stream([range(4), range(4, 5)])])
    assert (
        (made.int() - expected.int()).abs().max() <= 1
        and source.image_shape == [1, 8, 8]
        and len(source) == 5
    )
    dumped = [np.asarray(Image.open(tmp_path / 'dump' / f'{seed:06d}.png')) for seed in seeds]
    np.testing.assert_array_equal(np.stack(dumped), made[:, 0].numpy())


def test_what_changes_a_networks_images_changes_their_fingerprint(net):
    make = lambda seeds, identity='a': GeneratedImages(net, seeds, BATCH, identity=identity).fingerprint()
    assert make([1, 2]) == make(range(1, 3)) and len({make([1, 2]), make([1, 3]), make([1, 2], 'b')}) == 3
