"""The losses of diffusion models: noise levels by their laws, weights and errors in closed form."""

import math

import pytest
import torch
from losses import Loss
from scipy import stats

from torch_utils import training_stats
from training.objectives import loss_diffusion
from training.rng import SampleRng

COUNT = 40_000


def make_loss(kind, **options):
    return Loss(loss_diffusion, kind=kind, **options)


class Asked(torch.nn.Module):
    """Answers half of what it is given, and remembers that."""

    def __init__(self, logvar=None):
        super().__init__()
        self.logvar, self.calls = logvar, []

    def forward(
        self, x, sigma, class_labels=None, augment_labels=None, dropout_masks=None, return_logvar=False
    ):
        self.calls.append(
            dict(x=x, sigma=sigma, labels=class_labels, augment=augment_labels, masks=dropout_masks)
        )
        assert return_logvar == (self.logvar is not None)
        return (x / 2, torch.full([len(x), 1, 1, 1], self.logvar)) if return_logvar else x / 2

    def dropout_masks(self, batch_size, generator=None):
        return {'block': torch.rand([batch_size, 2], generator=generator) > 0.5}


def images_of(count):
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1


def run(loss, count=COUNT, **net):
    """(losses [N], what the network was asked, noise levels [N], errors |D − y|² [N])."""
    asked, images = Asked(**net), images_of(count)
    values = loss(asked, images, None, SampleRng(0, 0, count))
    (call,) = asked.calls
    sigma = call['sigma'].double().flatten()
    noise = (call['x'] - images).double() / sigma.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(
        noise,
        SampleRng(0, 0, count).normal('noise', [1, 4, 4]).double(),
        rtol=0,
        atol=1e-6 / sigma.min().item(),
    )
    return values.double(), call, sigma, (call['x'] / 2 - images).double().square().sum(dim=(1, 2, 3))


def assert_law(values, law, *arguments):
    """Kolmogorov and Smirnov's test: with 40,000 draws, a distribution function that is off by 0.01 somewhere
    fails."""
    assert stats.kstest(values.numpy(), law, args=arguments).pvalue > 1e-3


@pytest.mark.parametrize(
    'options, P_mean, P_std, sigma_data',
    [({}, -1.2, 1.2, 0.5), (dict(P_mean=0.3, P_std=0.6, sigma_data=2.0), 0.3, 0.6, 2.0)],
)
def test_edms_noise_is_lognormal_and_its_weight_is_that_of_unit_outputs(options, P_mean, P_std, sigma_data):
    """Karras et al. 2022, Table 1: lambda = (sigma² + sigma_d²) / (sigma sigma_d)²."""
    values, _, sigma, error = run(make_loss('edm', **options))
    assert_law(sigma.log(), 'norm', P_mean, P_std)
    torch.testing.assert_close(
        values, (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2 * error, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize(
    'options, beta_d, beta_min, epsilon',
    [({}, 19.9, 0.1, 1e-5), (dict(beta_d=5.0, beta_min=1.0, epsilon_t=0.2), 5.0, 1.0, 0.2)],
)
def test_the_time_of_variance_preserving_noise_is_uniform_and_its_weight_the_snr(
    options, beta_d, beta_min, epsilon
):
    """ln(1 + sigma²) = beta_d t² / 2 + beta_min t, solved for t."""
    values, _, sigma, error = run(make_loss('vp', **options))
    t = ((beta_min**2 + 2 * beta_d * (1 + sigma**2).log()).sqrt() - beta_min) / beta_d
    assert t.min() >= 0.99 * epsilon and t.max() <= 1
    assert_law(t, 'uniform', epsilon, 1 - epsilon)
    torch.testing.assert_close(values, error / sigma**2, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    'options, low, high', [({}, 0.02, 100.0), (dict(sigma_min=0.5, sigma_max=3.0), 0.5, 3.0)]
)
def test_variance_exploding_noise_is_log_uniform_and_its_weight_the_snr(options, low, high):
    values, _, sigma, error = run(make_loss('ve', **options))
    assert_law(sigma.log(), 'uniform', math.log(low), math.log(high / low))
    torch.testing.assert_close(values, error / sigma**2, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    'options, P_mean, P_std, sigma_data',
    [({}, -0.4, 1.0, 0.5), (dict(P_mean=-0.8, P_std=1.6, sigma_data=1.0), -0.8, 1.6, 1.0)],
)
def test_the_uncertainty_divides_the_weighted_error_and_is_paid_for_by_every_value(
    options, P_mean, P_std, sigma_data
):
    """Karras et al. 2024, Eq. 21: for the sum over 16 values, error / e^u + 16 u; the error itself is
    reported."""
    training_stats.reset()
    values, _, sigma, error = run(make_loss('edm2', **options), logvar=0.7)
    assert_law(sigma.log(), 'norm', P_mean, P_std)
    weighted = (sigma**-2 + sigma_data**-2) * error
    torch.testing.assert_close(values, weighted / math.exp(0.7) + 16 * 0.7, rtol=1e-4, atol=0)
    assert training_stats.collect()['Loss/weighted_error']['mean'] == pytest.approx(
        weighted.mean().item(), rel=1e-4
    )


def test_conditions_reach_the_network_and_masks_do_where_it_trains():
    labels, augment = torch.eye(8), torch.arange(8.0)[:, None]
    for training in (True, False):
        asked = Asked().train(training)
        make_loss('edm')(asked, images_of(8), labels, SampleRng(0, 0, 8), augment)
        (call,) = asked.calls
        assert call['labels'] is labels and call['augment'] is augment
        assert set(call['masks']) == ({'block'} if training else set())


@pytest.mark.parametrize('kind', loss_diffusion.DEFAULTS)
def test_losses_are_reported_by_noise_level_and_do_not_depend_on_how_the_batch_is_split(kind):
    training_stats.reset()
    net, images, loss = Asked(logvar=0.5 if kind == 'edm2' else None), images_of(64), make_loss(kind)
    whole = loss(net, images, None, SampleRng(7, 1000, 64))
    reported = [value for name, value in training_stats.collect().items() if name.startswith('Loss/sigma_')]
    assert sum(value['num'] for value in reported) == 64
    assert sum(value['mean'] * value['num'] for value in reported) == pytest.approx(
        whole.sum().item(), rel=1e-5
    )
    parts = [loss(net, images[a : a + 16], None, SampleRng(7, 1000 + a, 16)) for a in range(0, 64, 16)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=0)
