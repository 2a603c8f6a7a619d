"""Random numbers by global sample index."""

import numpy as np
import torch

from training.rng import SampleRng, derive_seed


def test_a_sample_draws_the_same_numbers_however_the_stream_is_cut():
    whole = SampleRng(3, 100, 90)
    for purpose in ('noise', 'edge'):
        draw = lambda d, purpose=purpose: np.asarray(
            d.normal(purpose, (2, 3)) if purpose == 'noise' else d.uniform(purpose)
        )
        pieces = [
            draw(SampleRng(3, first, count)) for first, count in ((100, 1), (101, 31), (132, 40), (172, 18))
        ]
        assert np.array_equal(np.concatenate(pieces), draw(whole))


def test_seeds_purposes_and_samples_are_independent():
    base = SampleRng(0, 0, 64).normal('noise', (16,))
    others = [
        SampleRng(seed, first, 64).normal(purpose, (16,))
        for seed, first, purpose in ((1, 0, 'noise'), (0, 0, 'other'), (0, 64, 'noise'))
    ]
    for other in others:
        assert abs(torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1]) < 0.15
    assert len({derive_seed(0, 'noise', block) for block in range(1000)}) == 1000


def test_the_numbers_have_their_distribution():
    """100,000 draws: mean and variance within 5 standard errors."""
    n = 100_000
    normal, uniform = SampleRng(0, 0, n).normal('noise'), SampleRng(0, 0, n).uniform('edge')
    assert abs(normal.mean()) < 5 / n**0.5 and abs(normal.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs(uniform.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5 and uniform.min() >= 0 and uniform.max() < 1


def test_generators_belong_to_their_samples():
    draw = lambda first, count: torch.rand(4, generator=SampleRng(0, first, count).generator('dropout'))
    assert torch.equal(draw(0, 8), draw(0, 8)) and not torch.equal(draw(0, 8), draw(8, 8))
