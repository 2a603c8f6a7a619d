"""Averages of weights: EDM2's numbers, closed forms, and what the training loop's averages contain."""

import copy
import time

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
    got = phema.solve_posthoc_coefficients(
        *(numerics[f'edm2.posthoc_{name}'] for name in ('in_ofs', 'in_std', 'out_ofs', 'out_std'))
    )
    np.testing.assert_allclose(got, numerics['edm2.posthoc_weights'], atol=1e-9)
    np.testing.assert_allclose(got.sum(axis=0), 1)


def test_the_exponent_has_the_width_that_was_asked_for():
    std = np.array([0.01, 0.05, 0.1, 0.25])
    g = phema.std_to_exp(std)
    np.testing.assert_allclose((g + 1) / ((g + 2) ** 2 * (g + 3)), std**2, rtol=1e-9)


def test_post_hoc_reconstruction_finds_a_stored_average():
    weights = phema.solve_posthoc_coefficients([1, 1, 2, 2], [0.05, 0.1, 0.05, 0.1], [2], [0.1])
    np.testing.assert_allclose(weights[:, 0], [0, 0, 0, 1], atol=1e-9)


class Scalar(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.value = torch.nn.Parameter(torch.zeros([], dtype=torch.float64))


def of_widths(averages):
    """The power-function averages by width."""
    return {std: averages.networks[name] for name, std in averages.names.items() if std}


def averages_of(trajectory, batch=100, **options):
    """Averages after the weight took the given values, one a step."""
    net = Scalar()
    averages = phema.WeightAverages(
        net,
        FlatParameters(net),
        **{**dict(halflife_nimg=500, rampup_ratio=None, phema_stds=[0.05, 0.2]), **options},
    )
    for step, value in enumerate(trajectory):
        net.value.data.fill_(value)
        averages.update((step + 1) * batch, batch)
    return averages


def test_after_one_half_life_half_the_distance_remains():
    averages = averages_of([1.0] * 5)
    assert averages.networks['ema'].value.item() == pytest.approx(0.5, rel=1e-12)


def test_the_ramp_up_bounds_the_half_life_by_the_images_seen():
    averages = averages_of([1.0], rampup_ratio=0.05)
    assert (
        averages.networks['ema'].value.item() == 1
    )  # half-life 0 before the first step: the average is the weight itself
    assert averages.halflife_at(1000) == 50 and averages.halflife_at(10**6) == 500


def test_a_power_function_average_is_the_integral_over_its_profile():
    """For the trajectory tau itself, the profile (gamma+1) tau^gamma averages to (gamma+1) / (gamma+2); 4,000 steps, error of order 1/steps."""
    steps = 4000
    averages = averages_of([(i + 1) / steps for i in range(steps)])
    assert len(of_widths(averages)) == 2
    for std, net in of_widths(averages).items():
        gamma = phema.std_to_exp(std)
        assert net.value.item() == pytest.approx((gamma + 1) / (gamma + 2), abs=2e-3)


def test_weights_that_enter_every_third_step_have_the_decay_of_three():
    """2^(-300/500), and ((t − 300) / t)^(γ+1) as a product of three: 0 at t = 300. Others are not seen."""
    averages, kept = averages_of([9.0, 9.0, 1.0, 7.0, 7.0, 2.0, 5.0], every=3), 2**-0.6
    expected = (1 - kept) * kept + 2 * (1 - kept)
    assert averages.networks['ema'].value.item() == pytest.approx(expected, rel=1e-12)
    for std, net in of_widths(averages).items():
        assert net.value.item() == pytest.approx(2 - 0.5 ** (phema.std_to_exp(std) + 1), rel=1e-12)


def test_averages_round_trip_through_their_state():
    first, second = averages_of([1.0, 2.0, 3.0]), averages_of([0.0])
    second.load_state_dict(first.state_dict())
    assert second.networks['ema'].value == first.networks['ema'].value
    assert [n.value for n in of_widths(second).values()] == [n.value for n in of_widths(first).values()]


def trained(steps, device, state=None, slow=False, every=1):
    """Averages of a small network whose weights are other random numbers at every step, from the given state's step on."""
    net = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3))
    averages = phema.WeightAverages(net, flat := FlatParameters(net), 500, 0.05, [0.05, 0.2], device, every)
    if state is not None:
        averages.load_state_dict(state)
    if slow:
        take_in = averages._copies.take_in
        averages._copies.take_in = lambda weights, decays: time.sleep(0.02) or take_in(weights, decays)
    for step in steps:
        averages.begin_step()
        flat.weights.data.copy_(
            torch.randn(flat.weights.shape, generator=torch.Generator().manual_seed(step))
        )
        averages.update((step + 1) * 100, 100)
    return averages


@pytest.mark.parametrize('slow, every', [(False, 1), (True, 1), (False, 4)])
def test_averages_that_a_thread_computes_are_bit_for_bit_those_of_the_network_s_own_device(slow, every):
    """Also where the thread is slower than the steps, whose weights change meanwhile, and where a run goes on from a
    state, which may lie between two weights that enter."""
    plain, threaded = trained(range(12), None, every=every), trained(range(5), 'cpu', slow=slow, every=every)
    state = copy.deepcopy(threaded.state_dict())
    assert ('waiting' in state) == (every > 1)
    threaded = trained(range(5, 12), 'cpu', state=state, slow=slow, every=every)
    for name, network in plain.networks.items():
        assert all(
            torch.equal(a, b) for a, b in zip(network.parameters(), threaded.networks[name].parameters())
        )
    assert len(plain.vectors) == 3 and not torch.equal(plain.vectors['ema'], plain.vectors['phema-0.050'])
    assert threaded.on_device('ema') is threaded.networks['ema'] and not threaded._copies._pending


@pytest.mark.parametrize(
    'read',
    [
        lambda a: a.vectors,
        lambda a: a.networks,
        lambda a: a.state_dict(),
        lambda a: a.on_device('phema-0.200'),
    ],
)
def test_whoever_reads_averages_waits_for_the_thread(read):
    """Its last update takes 20 ms."""
    threaded = trained(range(2), 'cpu', slow=True)
    assert threaded._copies._pending
    read(threaded)
    assert not threaded._copies._pending


def test_what_goes_wrong_in_the_thread_ends_the_training():
    averages = trained(range(1), 'cpu')
    averages.flush()
    averages._copies.take_in = lambda weights, decays: 1 / 0
    averages.update(200, 100)
    with pytest.raises(ZeroDivisionError):
        averages.flush()


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason='needs a GPU: averages on the host, weights on the device'
)
def test_averages_in_host_memory_equal_those_on_the_gpu():
    """To rounding, which may differ between the two: 1e-6."""
    averages = []
    for device in (None, 'cpu'):
        net = torch.nn.Linear(300, 300).cuda()
        averages.append(phema.WeightAverages(net, flat := FlatParameters(net), 500, None, [0.1], device))
        for step in range(10):
            averages[-1].before_update()
            flat.weights.data.copy_(
                torch.randn(flat.weights.shape, generator=torch.Generator().manual_seed(step))
            )
            averages[-1].update((step + 1) * 100, 100)
    for name, vector in averages[1].vectors.items():
        assert vector.device.type == 'cpu' and next(averages[1].on_device(name).parameters()).is_cuda
        torch.testing.assert_close(vector.data, averages[0].vectors[name].data.cpu(), rtol=1e-6, atol=1e-6)


# ----------------------------------------------------------------------------
# Post-hoc reconstruction: how far it is off.


def mass(std, t, tau):
    """Of the profile that ends at `t`, the part up to the times `tau`."""
    return np.minimum(np.asarray(tau) / t, 1) ** (float(phema.std_to_exp(std)) + 1)


def combination(out_std, out_ofs=1.0, in_ofs=(0.25, 0.5, 0.75, 1.0), in_std=(0.05, 0.1)):
    """(times, widths, coefficients, error) of the best combination of averages stored at these times in these widths."""
    ofs, std = np.repeat(in_ofs, len(in_std)), np.tile(in_std, len(in_ofs))
    weights = phema.solve_posthoc_coefficients(ofs, std, [out_ofs], [out_std])
    return ofs, std, weights[:, 0], phema.posthoc_error(ofs, std, [out_ofs], [out_std], weights)[0]


@pytest.mark.parametrize('out_std', [0.01, 0.07, 0.15, 0.25])
def test_the_profile_error_is_that_of_numerical_integration(out_std):
    """Gauss-Legendre with 400 nodes between neighboring times of storage, where profiles are smooth: exact to 1e-9."""
    ofs, std, weights, error = combination(out_std)
    nodes, node_weights = np.polynomial.legendre.leggauss(400)
    density = lambda std, t, tau: (
        np.where(tau <= t, (g := float(phema.std_to_exp(std))) + 1, 0) * (tau / t) ** g / t
    )
    missed = total = 0
    for start in (0, 0.25, 0.5, 0.75):
        tau = start + (nodes + 1) / 8
        wanted = density(out_std, 1, tau)
        missed += (
            node_weights @ (wanted - sum(c * density(s, t, tau) for c, s, t in zip(weights, std, ofs))) ** 2
        )
        total += node_weights @ wanted**2
    assert error == pytest.approx((missed / total) ** 0.5, rel=1e-9) and error > 0.01


def test_the_profile_error_of_a_stored_average_is_zero_and_several_are_judged_one_by_one():
    arguments = [1, 1, 2, 2], [0.05, 0.1, 0.05, 0.1], [2, 2, 1], [0.1, 0.15, 0.05]
    errors = phema.posthoc_error(*arguments, phema.solve_posthoc_coefficients(*arguments))
    assert errors.shape == (3,) and errors[[0, 2]].max() < 1e-7
    assert errors[1] == combination(0.15, 2.0, (1, 2))[-1] > 0.1


def test_the_profile_error_bounds_the_error_of_the_weights_and_is_attained():
    """Averages as training makes them, of the trajectory that Cauchy-Schwarz names as the worst: the difference of the profiles itself, step by step.

    The bound counts what profiles differ by within a step too, which these weights cannot follow: less than 1e-3 of it for 2,000 steps.
    """
    steps, out_std = 2000, 0.15
    ofs, std, weights, error = combination(out_std)
    ends = np.arange(steps + 1) / steps
    missed = np.diff(mass(out_std, 1, ends) - sum(c * mass(s, t, ends) for c, s, t in zip(weights, std, ofs)))
    net, stored = Scalar(), {}
    averages = phema.WeightAverages(net, FlatParameters(net), 500, None, [0.05, 0.1, out_std])
    for step, value in enumerate(missed, start=1):
        net.value.data.fill_(value)
        averages.update(step, 1)
        stored |= {
            (step / steps, width): average.value.item() for width, average in of_widths(averages).items()
        }
    found = sum(c * stored[t, s] for c, s, t in zip(weights, std, ofs)) - stored[1, out_std]
    g = float(phema.std_to_exp(out_std))
    bound = error * (g + 1) / (2 * g + 1) ** 0.5 * (missed**2).mean() ** 0.5
    assert -found == pytest.approx(
        (missed**2).sum(), rel=1e-9
    )  # what combined profiles lack is what combined averages lack
    assert 0.999 < abs(found) / bound <= 1
