"""The tangent of continuous-time consistency, against Gaussian data and discrete steps; derivatives of networks."""

import math

import pytest
import torch
from gaussian import Gaussian

from training import consistency_ops as ops
from training import networks
from training.networks import edm2 as networks_edm2
from training.objectives import tangents
from training.objectives.continuous_time import velocity_field

SIGMA_DATA, DEVIATION = 0.5, 0.7
SIGMA = torch.tensor([0.002, 0.03, 0.4, 1.0, 5.0, 80.0], dtype=torch.float64)
TEACHER = Gaussian(DEVIATION**2)


def images():
    return torch.randn(len(SIGMA), 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def state(sigma=SIGMA):
    """(X, t, dX) on the ODE of Gaussian data."""
    t = tangents.time_of(sigma, SIGMA_DATA)
    X = tangents.noisy(DEVIATION * images(), SIGMA_DATA * images().flip(0), t)
    return X, t, SIGMA_DATA * velocity_field(TEACHER, SIGMA_DATA)(X, t)


def exact(scale=1.0, end=0.0, power=1.0):
    """G(x; sigma, end) of Gaussian data: the image from which a DDIM step leads to x √((c² + r²) / (c² + sigma²)), times
    `scale`, and with that root to another power."""

    def G(x, sigma):
        sigma = ops.expand_like(sigma, x)
        ratio = (DEVIATION**2 + end**2) / (DEVIATION**2 + sigma**2)
        x_end = ratio ** (power / 2) * x
        return scale * (sigma * x_end - end * x) / (sigma - end)

    return G


def tangent_of(denoiser, end=0.0, warmup=1.0, mode='forward'):
    """g of a function D(x, sigma) along the ODE, at the noise levels above `end`."""
    X, t, dX = state(SIGMA[end < SIGMA].new_tensor(SIGMA.clamp(min=2 * end).tolist()))
    s = math.atan(end / SIGMA_DATA)
    rate = tangents.rate(t, s)
    F = velocity_field(denoiser, SIGMA_DATA)
    now, dF = tangents.derivative(F, (X, t), (ops.expand_like(rate, X) * dX, rate), mode)
    return tangents.tangent(X, now, dX, dF, t, SIGMA_DATA, warmup, s)


def test_the_coordinates_are_edms_and_back():
    """X is x cos t, which has the deviation sigma_d where the images have it; F is minus EDM's network."""
    y, n = images(), images().flip(1)
    t = tangents.time_of(SIGMA, SIGMA_DATA)
    X = tangents.noisy(y, SIGMA_DATA * n, t)
    x, sigma = tangents.edm_state(X, t, SIGMA_DATA)
    torch.testing.assert_close(x, y + ops.expand_like(SIGMA, y) * n, rtol=1e-12, atol=0)
    torch.testing.assert_close(sigma, SIGMA, rtol=1e-12, atol=0)

    raw, level = images().flip(2), ops.expand_like(SIGMA, y)
    total = (level**2 + SIGMA_DATA**2).sqrt()
    denoised = (SIGMA_DATA / total) ** 2 * x + level * SIGMA_DATA / total * raw
    torch.testing.assert_close(tangents.velocity(denoised, X, t, SIGMA_DATA), -raw, rtol=1e-9, atol=1e-9)
    # X / sigma_d is what EDM's network sees.
    torch.testing.assert_close(X / SIGMA_DATA, x / total, rtol=1e-12, atol=1e-12)


def test_the_teachers_velocity_is_that_of_the_exact_trajectory():
    """Of x(sigma) = x √(c² + sigma²) / …, in TrigFlow's coordinates, by differences of 1e-5 in t."""
    X, t, dX = state()
    x, sigma = tangents.edm_state(X, t, SIGMA_DATA)

    def after(h):
        later = SIGMA_DATA * (t + h).tan()
        return TEACHER.solve(x, sigma, later) * ops.expand_like(t + h, x).cos()

    h = 1e-5 * tangents.rate(t)
    slope = (after(h) - after(-h)) / ops.expand_like(2 * h, x)
    torch.testing.assert_close(slope, dX, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('end', [0.0, 0.05, 0.7])
def test_the_tangent_vanishes_at_the_exact_flow_map_and_not_beside_it(end):
    """To 0 and, as a function of two times, to any other level. A multiple of the map to 0 is constant along the ODE too:
    only D(x; 0) = x, which every network has, excludes it."""
    assert tangent_of(exact(end=end), end).abs().max() < 1e-10
    multiples = [exact(1.01, end)] if end else []
    for beside in (*multiples, exact(1.0, end, power=1.01), TEACHER):
        size = tangents.norms(tangent_of(beside, end))
        assert (size > 1e-6).all() and size.max() > 1e-2, size


def test_without_its_second_term_the_tangent_is_the_step_toward_the_teacher():
    """w = 0 is distillation of the denoiser, weighted by cos² t, and vanishes there."""
    assert tangent_of(TEACHER, warmup=0.0).abs().max() < 1e-10
    assert tangent_of(exact(), warmup=0.0).abs().max() > 1e-2


@pytest.mark.parametrize('denoiser', [TEACHER, exact(1.1), exact(1.0, power=0.9)])
def test_discrete_targets_tend_to_the_tangent_at_first_order(denoiser):
    """Song et al.'s target is the network one step of the teacher down. The network less the target, over the step, tends
    to dD/dsigma, which is g over √(sigma² + sigma_d²)."""
    x, sigma = tangents.edm_state(*state()[:2], SIGMA_DATA)
    expected = tangent_of(denoiser) / ops.expand_like((sigma**2 + SIGMA_DATA**2).sqrt(), x)

    def error(share):
        lower = sigma * (1 - share)
        x_s = ops.ddim_step(x, TEACHER(x, sigma), sigma, lower)
        difference = (denoiser(x, sigma) - denoiser(x_s, lower)) / ops.expand_like(sigma - lower, x)
        return tangents.norms(difference - expected)

    errors = [error(share) for share in (4e-3, 2e-3, 1e-3)]
    for ratio in (errors[0] / errors[1], errors[1] / errors[2]):
        assert ((ratio > 1.95) & (ratio < 2.05)).all(), ratio


def test_the_tangent_is_normalized_by_its_length():
    g = images() * torch.tensor([0.0, 1e-3, 0.1, 1, 10, 1e6], dtype=torch.float64).reshape(-1, 1, 1, 1)
    length = g.flatten(1).square().sum(1).sqrt()
    torch.testing.assert_close(tangents.norms(tangents.normalized(g, 0.1)), length / (length + 0.1))


# ----------------------------------------------------------------------------
# Derivatives of networks.

SIZES = dict(model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], dropout=0.2)
NCSNPP = dict(
    embedding_type='fourier', encoder_type='residual', channel_mult_noise=2, resample_filter=[1, 3, 3, 1]
)
SONG = dict(SIZES, model_type='SongUNet')
KINDS = dict(
    adm=(networks.EDMPrecond, dict(SIZES, channels_per_head=16)),
    ddpmpp=(networks.EDMPrecond, SONG),
    ncsnpp=(networks.EDMPrecond, SONG | NCSNPP),
    vp=(networks.VPPrecond, SONG),
    edm2=(networks_edm2.Precond, dict(SIZES, channels_per_head=16)),
)


def network(kind):
    cls, options = KINDS[kind]
    torch.manual_seed(0)
    net = cls(8, 1, 3, **options)
    for parameter in net.parameters():  # last layers start at zero
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net.double().train().requires_grad_(False)


def both_modes(kind, masks, step):
    net = network(kind)
    generator = torch.Generator().manual_seed(1)
    X, dX = torch.randn(2, 3, 1, 8, 8, dtype=torch.float64, generator=generator)
    t = torch.tensor([0.05, 0.8, 1.5], dtype=torch.float64)
    denoise = lambda x, sigma: net(x, sigma, torch.eye(3), dropout_masks=masks(net))
    rate = tangents.rate(t)
    along = (ops.expand_like(rate, X) * dX, rate)
    F = velocity_field(denoise, SIGMA_DATA)
    return [tangents.derivative(F, (X, t), along, mode, step) for mode in ('forward', 'difference')]


@pytest.mark.parametrize('kind', KINDS)
def test_forward_mode_equals_central_differences_with_dropout(kind):
    fixed = {}

    def masks(net):
        return fixed.setdefault('masks', net.dropout_masks(3, torch.Generator().manual_seed(2)))

    (value, forward), (near, difference) = both_modes(kind, masks, step=1e-6 if kind == 'vp' else 1e-5)
    assert fixed['masks'] and forward.abs().max() > 0.1
    assert (forward - difference).abs().max() < 1e-6 * forward.abs().max()
    assert (value - near).abs().max() < 1e-6 * value.abs().max()


def test_other_masks_in_the_two_evaluations_would_be_no_derivative():
    draws = iter(range(9))
    (_, forward), (_, difference) = both_modes(
        'ddpmpp', lambda net: net.dropout_masks(3, torch.Generator().manual_seed(next(draws))), step=1e-5
    )
    assert (forward - difference).abs().max() > 10 * forward.abs().max()


def test_a_mode_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match='jvp'):
        tangents.derivative(torch.sin, (SIGMA,), (SIGMA,), 'backward')
