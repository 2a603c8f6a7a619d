"""Moment matching and score identity distillation against Gaussian data, where student, teacher and auxiliary network
are linear, and the expected gradient is a polynomial of normal numbers, which three nodes each integrate exactly."""

import itertools
import math

import numpy as np
import pytest
import torch
from gaussian import Gaussian
from helpers import assert_one_clear_error, invoke
from losses import Loss
from scipy.optimize import brentq

import train
from training import consistency_ops as ops
from training.objectives import OBJECTIVES
from training.rng import SampleRng
from training.samplers import sample

C = 0.7  # deviation of the data
NODES = [(-math.sqrt(3), 1 / 6), (0.0, 2 / 3), (math.sqrt(3), 1 / 6)]  # exact for polynomials of degree five
MM = dict(batch_size=1, aux_ahead=0, sigma_min=1e-3, sigma_max=100.0)
SID = dict(
    batch_size=1, aux_ahead=0, sigma_min=0.002, sigma_max=80.0, sigma_init=1.0, u_max=1.0, classes=None
)


class Slope(torch.nn.Module):
    """D(x; sigma) = a x with a trained a."""

    def __init__(self, a):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def forward(self, x, sigma, labels=None, dropout_masks=None):
        return self.a * x

    def dropout_masks(self, count, generator=None):
        return {}


class Quadrature:
    """Normal numbers at all nodes, by purpose in the given order, with `weights`; and uniform numbers that are given."""

    device, first = torch.device('cpu'), 0

    def __init__(self, purposes, uniform=None):
        table = list(itertools.product(NODES, repeat=len(purposes)))
        self.count, self.given = len(table), uniform or {}
        self.weights = torch.tensor(
            [math.prod(weight for _, weight in row) for row in table], dtype=torch.float64
        )
        columns = torch.tensor([[node for node, _ in row] for row in table], dtype=torch.float64)
        self.columns = dict(zip(purposes, columns.T))

    def normal(self, purpose, shape=()):
        return self.columns[purpose].reshape(-1, *[1] * len(shape))

    def uniform(self, purpose):
        return np.full(self.count, self.given[purpose])

    def generator(self, purpose):
        return torch.Generator()


def turn(loss, auxiliary):
    """Begin the auxiliary network's step, the first, or the student's."""
    loss.begin_step(0 if auxiliary else 1)
    assert loss.state.trains_auxiliary == auxiliary
    return loss


# ----------------------------------------------------------------------------
# Moment matching.

T_LEVEL = 2.0


def level_time(sigma, low=MM['sigma_min'], high=MM['sigma_max']):
    """The time u of a level on the cosine grid."""
    return (math.atan(sigma) - math.atan(low)) / (math.atan(high) - math.atan(low))


def moment_matching(s, auxiliary):
    """The loss and the numbers that put t at T_LEVEL and s at the given level."""
    S = 1 / level_time(T_LEVEL)  # so that the first grid time is that of T_LEVEL
    loss = Loss('mm', Gaussian(C**2), S=S, **MM)
    rng = Quadrature(['y', 'noise', 'step noise'], {'time': level_time(s), 'time step': 0.0})
    return turn(loss, auxiliary), rng


def posterior_slope(a, s):
    """The slopes of E[x|z_s] for x = a z_t, and of the teacher."""
    m, q, square = 1 - s**2 / T_LEVEL**2, s**2 / T_LEVEL**2, s**2 * (T_LEVEL**2 - s**2) / T_LEVEL**2
    v = C**2 + T_LEVEL**2
    return a * (m * a + q) * v / ((m * a + q) ** 2 * v + square), C**2 / (C**2 + s**2)


def student_gradient(a, s):
    """The gradient by a of the student's expected loss, with the exact auxiliary network."""
    loss, rng = moment_matching(s, auxiliary=False)
    student, slopes = Slope(a), posterior_slope(a, s)
    loss.state.auxiliary = Slope(sum(slopes) / 2)
    values = loss(student, C * rng.normal('y', (1, 1, 1)), None, rng)
    (gradient,) = torch.autograd.grad((rng.weights * values).sum(), student.a)
    return gradient.item()


@pytest.mark.parametrize(('s', 'fixed_point'), [(0.8, 0.30525), (0.1, 0.37007)])
def test_the_student_of_gaussian_data_is_stationary_where_the_closed_form_says(s, fixed_point):
    root = brentq(lambda a: np.subtract(*posterior_slope(a, s)), 0.01, 2, xtol=1e-14)
    assert root == pytest.approx(fixed_point, abs=1e-5)
    assert student_gradient(root, s) == pytest.approx(0, abs=1e-10)
    # Beside it descent leads back.
    assert student_gradient(0.99 * root, s) < -1e-5 and student_gradient(1.01 * root, s) > 1e-5


@pytest.mark.parametrize('a', [0.3, 0.9])
def test_the_auxiliary_network_learns_half_of_both_denoisers(a):
    """|x − g|² + |D − g|² is least where g is the mean of E[x|z_s] and D(z_s)."""
    loss, rng = moment_matching(0.8, auxiliary=True)
    student, exact = Slope(a), sum(posterior_slope(a, 0.8)) / 2
    for slope, expected in ((exact, 0), (exact * 1.01, 1), (exact * 0.99, -1)):
        auxiliary = loss.state.auxiliary = Slope(slope)
        values = loss(student, C * rng.normal('y', (1, 1, 1)), None, rng)
        (rng.weights * values).sum().backward()
        gradient = auxiliary.a.grad.item()
        assert abs(gradient) < 1e-10 if expected == 0 else gradient * expected > 1e-4
        assert student.a.grad is None


def test_the_weight_of_a_level_is_edms():
    """The gradient at two levels, over that of a weight of 1."""
    for s in (0.1, 0.8):
        learned, real = posterior_slope(0.5, s)
        m, q = 1 - s**2 / T_LEVEL**2, s**2 / T_LEVEL**2
        v = C**2 + T_LEVEL**2
        # E[z_t (g − D)(z_s)], where z_s is (m a + q) z_t and noise.
        plain = (learned - real) / 2 * (m * 0.5 + q) * v
        assert student_gradient(0.5, s) == pytest.approx((1 / s**2 + 1 / 0.5**2) * plain, rel=1e-9)


def test_published_times_are_above_by_less_than_a_step_and_grid_times_are_those_of_sampling():
    options = dict(sigma_min=0.01, sigma_max=50.0, batch_size=1, aux_ahead=0)
    time = lambda sigma: (sigma.atan() - math.atan(0.01)) / (math.atan(50.0) - math.atan(0.01))
    rng = SampleRng(0, 0, 4096)
    for times in ('uniform', 'grid'):
        state = Loss('mm', Gaussian(C**2), S=4, mm_times=times, **options).state
        sigma_s, sigma_t = state.draw_levels(rng)
        s, gap = time(sigma_s), time(sigma_t) - time(sigma_s)
        assert abs(s.mean() - 0.5) < 0.02 and abs(s.std() - 12**-0.5) < 0.01
        assert gap.min() > -1e-12 and gap.max() < 0.25 + 1e-12
        if times == 'grid':
            grid = ops.student_grid(4, 0.01, 50.0, 7.0, 'full', 'cosine')
            assert torch.isclose(sigma_t[:, None], grid).sum(dim=1).eq(1).all()
        else:
            # Uniform on [0, 1/4], but for the quarter of s that is near the end: t stops at 1.
            assert (
                gap[s < 0.75].mean() == pytest.approx(0.125, abs=0.005) and time(sigma_t).max() <= 1 + 1e-12
            )


def test_ancestral_steps_of_the_exact_posterior_sampler_keep_the_distribution():
    """With D replaced by a sample of the image given the state, every step is exact, so that the result is the data's:
    its variance, in closed form, is c²."""
    levels = [20.0, 3.0, 0.7, 0.1, 0.0]
    variance = C**2 + levels[0] ** 2
    for t, s in itertools.pairwise(levels):
        shrink, q = C**2 / (C**2 + t**2), s**2 / t**2
        # x_s = (1 − q) x̂ + q x_t + noise, x̂ = shrink x_t + deviation sqrt(c² (1 − shrink)).
        slope = (1 - q) * shrink + q
        variance = slope**2 * variance + (1 - q) ** 2 * C**2 * (1 - shrink) + s**2 * (1 - q)
        assert variance == pytest.approx(C**2 + s**2, rel=1e-12)

    class Posterior(torch.nn.Module):
        sigma_min, sigma_max = 0.0, float('inf')

        def __init__(self):
            super().__init__()
            self.metadata = dict(solver='ancestral', sigmas=levels, objective='mm')

        def forward(self, x, sigma, labels=None):
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            shrink = C**2 / (C**2 + sigma**2)
            return shrink * x + C * (1 - shrink).sqrt() * noise

    generator = torch.Generator().manual_seed(0)
    randn_like = lambda x: torch.randn(x.shape, generator=generator, dtype=torch.float64)
    images = sample(Posterior(), randn_like(torch.empty(40000, 1, 1, 1)), randn_like=randn_like)
    assert images.std().item() == pytest.approx(C, rel=0.015)
    # The noise is needed: without it the images are too alike.
    images = sample(Posterior(), randn_like(torch.empty(40000, 1, 1, 1)), randn_like=torch.zeros_like)
    assert images.std().item() < 0.95 * C


# ----------------------------------------------------------------------------
# Score identity distillation.


def identity_gradient(a, c=C, sigma=0.8, alpha=1.0, fake=None, scale=True):
    """The gradient by a of the student's expected loss, x = a n, with the denoiser of deviation `fake` or a."""
    u = (sigma ** (1 / 7) - SID['sigma_min'] ** (1 / 7)) / (
        SID['sigma_max'] ** (1 / 7) - SID['sigma_min'] ** (1 / 7)
    )
    rng = Quadrature(['noise', 'image noise'], {'sigma': u})
    loss = turn(Loss('sid', Gaussian(c**2), alpha=alpha, **SID), auxiliary=False)
    loss.state.auxiliary = Gaussian((a if fake is None else fake) ** 2)
    loss.state.auxiliary.training, loss.state.auxiliary.dropout_masks = False, None
    student = Slope(a)
    values = loss(student, torch.zeros(rng.count, 1, 1, 1), None, rng)

    # Without the divisor, which is no polynomial: it is |x − D(z)|, a constant of each image.
    x, z = a * rng.normal('noise'), a * rng.normal('noise') + sigma * rng.normal('image noise')
    divisor = (x - c**2 / (c**2 + sigma**2) * z).abs().clamp(min=1e-5)
    (gradient,) = torch.autograd.grad((rng.weights * divisor * values).sum(), student.a)
    return gradient.item()


@pytest.mark.parametrize(('a', 'expected'), [(0.5, -0.110), (0.7, 0.0), (0.9, 0.099)])
def test_the_identity_loss_pulls_a_gaussian_student_to_the_data(a, expected):
    assert identity_gradient(a) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize('alpha', [0.0, 0.5, 1.0, 1.2])
def test_it_is_stationary_at_the_data_for_every_alpha(alpha):
    assert identity_gradient(C, alpha=alpha) == pytest.approx(0, abs=1e-12)
    assert identity_gradient(0.8, alpha=alpha) > 1e-3 > -1e-3 > identity_gradient(0.6, alpha=alpha)


def test_the_auxiliary_network_learns_to_denoise_the_students_images():
    a, sigma, rng = 0.9, math.exp(-1.2), Quadrature(['noise', 'image noise'])
    rng.normal_on_host = lambda purpose: np.zeros(rng.count, np.float32)
    loss = turn(Loss('sid', Gaussian(C**2), **SID), auxiliary=True)
    exact = a**2 / (a**2 + sigma**2)
    for slope, sign in ((exact, 0), (exact * 1.01, 1), (exact * 0.99, -1)):
        student, loss.state.auxiliary = Slope(a), Slope(slope)
        values = loss(student, torch.zeros(rng.count, 1, 1, 1), None, rng)
        (rng.weights * values).sum().backward()
        gradient = loss.state.auxiliary.a.grad.item()
        assert abs(gradient) < 1e-6 if sign == 0 else gradient * sign > 1e-4
        assert student.a.grad is None


def test_labels_are_uniform_over_the_classes_that_have_images():
    state = Loss('sid', Gaussian(C**2), **{**SID, 'classes': '0-1,3'}).state
    rng, labels = SampleRng(0, 0, 6000), torch.eye(5)[torch.zeros(6000, dtype=torch.long)]
    drawn = state.draw_labels(labels, rng)
    assert drawn.shape == labels.shape and drawn.sum(dim=1).eq(1).all()
    counts = drawn.sum(dim=0)
    assert counts[[2, 4]].eq(0).all() and (counts[[0, 1, 3]] - 2000).abs().max() < 150
    # Vectors, and no labels, stay what they are.
    vectors = torch.rand(6000, 5)
    state = Loss('sid', Gaussian(C**2), **SID).state
    assert state.draw_labels(vectors, rng) is vectors and state.draw_labels(None, rng) is None


# ----------------------------------------------------------------------------
# Turns, costs, and options.


def test_the_auxiliary_network_begins_ahead_and_then_they_alternate():
    options = dict(MM, batch_size=32, aux_ahead=3)
    loss = Loss('mm', Gaussian(C**2), S=8, **options)
    turns = []
    for step in range(9):
        loss.begin_step(32 * step)
        turns.append(loss.state.trains_auxiliary)
    assert turns == [True, True, True, True, False, True, False, True, False]


def test_costs_count_both_turns():
    mm, sid = (OBJECTIVES[name].config for name in ('mm', 'sid'))
    assert mm(S=8).cost() == 5 and sid().cost() == 5.5
    # Steps of the auxiliary network alone are of its own cost: 4.
    ahead = sid(aux_ahead=10)
    assert ahead.first_cost() + 10 * ahead.cost() == pytest.approx(10 * 4)


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (['--objective=mm', '--S=1', '--mm_times=uniform'], '--mm_times=grid'),
        (['--objective=mcd', '--aux_lr=1e-3'], '--aux_lr'),
        (['--objective=sid', '--S=2'], '--S'),
        (['--objective=mm', '--student_grid=edm'], '--student_grid'),
    ],
)
def test_wrong_options_are_refused(options, words, digits, teacher, tmp_path):
    result = invoke(
        train.main, f'--outdir={tmp_path}', f'--data={digits}', f'--teacher={teacher}', '--cond=1', *options
    )
    assert_one_clear_error(result, words, status=2)
