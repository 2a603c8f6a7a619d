"""Averages of weights: EDM2's numbers, closed forms, and what the training loop's averages contain."""
import numpy as np
import pytest
import torch

from torch_utils.flat import FlatParameters
from training import phema


def test_exponents_and_decays_equal_edm2s(numerics):
    stds = numerics['edm2.phema_stds']
    np.testing.assert_allclose(phema.std_to_exp(stds), numerics['edm2.phema_exps'], rtol=1e-9)
    got = [[phema.power_function_beta(std, t, 2048) for t in numerics['edm2.phema_nimg']] for std in stds]
    np.testing.assert_allclose(got, numerics['edm2.phema_beta'], rtol=1e-9)


def test_post_hoc_weights_equal_edm2s(numerics):
    got = phema.solve_posthoc_coefficients(*(numerics[f'edm2.posthoc_{name}'] for name in ('in_ofs', 'in_std', 'out_ofs', 'out_std')))
    np.testing.assert_allclose(got, numerics['edm2.posthoc_weights'], atol=1e-9)
    np.testing.assert_allclose(got.sum(axis=0), 1)


def test_the_exponent_has_the_width_that_was_asked_for():
    std = np.array([0.01, 0.05, 0.1, 0.25])
    g = phema.std_to_exp(std)
    np.testing.assert_allclose((g + 1) / ((g + 2) ** 2 * (g + 3)), std ** 2, rtol=1e-9)


def test_post_hoc_reconstruction_finds_a_stored_average():
    weights = phema.solve_posthoc_coefficients([1, 1, 2, 2], [0.05, 0.1, 0.05, 0.1], [2], [0.1])
    np.testing.assert_allclose(weights[:, 0], [0, 0, 0, 1], atol=1e-9)


class Scalar(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.value = torch.nn.Parameter(torch.zeros([], dtype=torch.float64))


def averages_of(trajectory, batch=100, **options):
    """Averages after the weight took the given values, one a step."""
    net = Scalar()
    averages = phema.WeightAverages(net, FlatParameters(net), **{**dict(halflife_nimg=500, rampup_ratio=None, phema_stds=[0.05, 0.2]), **options})
    for step, value in enumerate(trajectory):
        net.value.data.fill_(value)
        averages.update((step + 1) * batch, batch)
    return averages


def test_after_one_half_life_half_the_distance_remains():
    averages = averages_of([1.0] * 5)
    assert averages.ema.value.item() == pytest.approx(0.5, rel=1e-12)


def test_the_ramp_up_bounds_the_half_life_by_the_images_seen():
    averages = averages_of([1.0], rampup_ratio=0.05)
    assert averages.ema.value.item() == 1  # half-life 0 before the first step: the average is the weight itself
    assert averages.halflife_at(1000) == 50 and averages.halflife_at(10**6) == 500


def test_a_power_function_average_is_the_integral_over_its_profile():
    """For the trajectory tau itself, the profile (gamma+1) tau^gamma averages to (gamma+1) / (gamma+2); 4,000 steps, error of order 1/steps."""
    steps = 4000
    averages = averages_of([(i + 1) / steps for i in range(steps)])
    for std, net in averages.phema.items():
        gamma = phema.std_to_exp(std)
        assert net.value.item() == pytest.approx((gamma + 1) / (gamma + 2), abs=2e-3)


def test_averages_round_trip_through_their_state():
    first, second = averages_of([1.0, 2.0, 3.0]), averages_of([0.0])
    second.load_state_dict(first.state_dict())
    assert second.ema.value == first.ema.value
    assert [n.value for n in second.phema.values()] == [n.value for n in first.phema.values()]
