"""Easy consistency tuning against Gaussian data, where the function that it converges to is known stage by
stage."""

import itertools
import math

import pytest
import torch
from gaussian import Gaussian
from losses import VARIANCE, Linear, Loss, Recorder, small_network, target

from torch_utils import training_stats
from training import consistency_ops as ops
from training.objectives import time_schedules as times
from training.rng import SampleRng


def make_loss(stage=0, **options):
    loss = Loss('ect', **{'stage_nimg': 1000, **options})
    loss.begin_step(stage * loss.state.c.stage_nimg)
    return loss


class Given:
    """Random numbers of images whose times and noise are given, [N] and [N, ...]."""

    first, device = 0, torch.device('cpu')

    def __init__(self, loss, t, noise):
        c = loss.state.c
        self.normals, self.noise, self.count = ((t.log() - c.P_mean) / c.P_std).numpy(), noise, len(t)

    def normal_on_host(self, purpose):
        return self.normals

    def normal(self, purpose, shape=()):
        return self.noise

    def generator(self, purpose):
        return torch.Generator().manual_seed(0)


QUADRATIC = dict(
    c=1e12, ect_weight='flat'
)  # of which `losses.target` reads targets; they do not depend on it


def regressed(loss, t, values):
    """E[values(x_t, target) x_t] / E[x_t²] at times [N], by probing with image and noise alone, of which all
    is linear, for a student."""

    def of(student):
        moment = 0
        for y, noise, second_moment in ((1, 0, VARIANCE), (0, 1, torch.ones_like(VARIANCE))):
            y, noise = (
                torch.full([len(t), 1, 2, 2], float(value), dtype=torch.float64) for value in (y, noise)
            )
            x_t, x_star = target(loss, student, y, Given(loss, t, noise))
            moment = moment + second_moment * values(student, x_t, x_star) * x_t
        return moment / (VARIANCE + ops.expand_like(t, x_t) ** 2)

    return of


def multiplier_of_targets(loss, t):
    """c(t), read off the loss's own targets: they are affine in what the student says at r, where it is that
    same c, and c → 1 at 0."""
    chain = [torch.tensor([t], dtype=torch.float64)]
    c = loss.state.c
    while (r := times.earlier_time(chain[-1], loss.state.stage, c.q, c.k, c.b)) > 0 and chain[-1] > 1e-7:
        chain.append(r)
        assert chain[-1] < chain[-2], 'r has not left t'
    coefficients = regressed(loss, torch.cat(chain), lambda student, x_t, target: target)
    offset, full = (
        coefficients(Linear(lambda t, value=value: torch.full_like(VARIANCE[0], value)))
        for value in (0.0, 1.0)
    )
    c = torch.ones_like(VARIANCE[0])
    for k in reversed(range(len(chain))):
        c = offset[k] + (full - offset)[k] * c
    return c


def closed_form_earlier_time(t, stage, q, k, b=1.0):
    """r of DESIGN's table: t max(0, 1 − q^−(a+1) (1 + k / (1 + exp(b t))))."""
    return t * max(0.0, 1 - q ** -(stage + 1) * (1 + k / (1 + math.exp(b * t))))


def multiplier(loss, t):
    """c(t) = (s² + r t) / (s² + t²) c(r), c = s² / (s² + t²) where r = 0: the best answer on average, given
    the answers at r. c → 1 at 0."""
    c = torch.ones_like(VARIANCE[0])
    while t > 1e-7:
        r = closed_form_earlier_time(t, loss.state.stage, loss.state.c.q, loss.state.c.k)
        c = c * (VARIANCE[0] + r * t) / (VARIANCE[0] + t**2)
        t = r
    return c


def accumulated_error(stage, t, q=2.0, k=8.0):
    """ln c(t) − ln(s / sqrt(s² + t²)) to first order in the hops, of which each adds −(τ − r)² s² / (2 (s² +
    τ²)²), so that together they are −∫ (τ − r(τ)) s² / (2 (s² + τ²)²) dτ from 0 to t."""
    log_tau = torch.linspace(math.log(1e-6), math.log(t), 20_001, dtype=torch.float64).reshape(-1, 1, 1, 1)
    tau = log_tau.exp()
    gap = tau * q ** -(stage + 1) * (1 + k / (1 + tau.exp()))
    return -torch.trapezoid(gap * VARIANCE / (2 * (VARIANCE + tau**2) ** 2) * tau, log_tau, dim=0)


def expected_gradients(loss, t, student):
    """E[(student(x_t) − x*) x_t] / E[x_t²] at the given times."""
    return regressed(loss, t, lambda student, x_t, target: student(x_t, t) - target)(student)


@pytest.mark.parametrize('stage, q, k', [(0, 2.0, 8.0), (3, 2.0, 8.0), (1, 4.0, 8.0), (4, 2.0, 0.0)])
def test_the_consistency_function_of_a_stage_has_zero_expected_gradient_and_a_perturbed_one_has_not(
    stage, q, k
):
    loss, t = (
        make_loss(stage, q=q, k=k, **QUADRATIC),
        torch.tensor([0.01, 0.1, 0.5, 1.0, 3.0, 20.0, 80.0], dtype=torch.float64),
    )
    assert expected_gradients(loss, t, Linear(lambda t: multiplier(loss, t))).abs().max() < 1e-10
    for wrong in t.tolist():
        student = Linear(lambda t, wrong=wrong: multiplier(loss, t) * (1.01 if t == wrong else 1))
        assert expected_gradients(loss, t, student)[t == wrong].abs().max() > 1e-7


def test_the_consistency_function_tends_to_the_exact_map_as_stages_pass():
    """s / sqrt(s² + t²); of first order, as the data's hop is: a stage halves the error, which is the sum of
    the hops' to a few of their lengths."""
    exact = (VARIANCE[0] / (VARIANCE[0] + 1)).sqrt()
    errors = [
        (multiplier_of_targets(make_loss(stage, **QUADRATIC), 1.0) / exact).log() for stage in (6, 7, 8)
    ]
    assert all((a / b > 1.8).all() and (a / b < 2.2).all() for a, b in itertools.pairwise(errors)), errors
    torch.testing.assert_close(errors[-1], accumulated_error(8, 1.0), rtol=0.03, atol=0)


def test_where_r_is_zero_it_is_diffusion_training():
    """At stage 0, with q = 2 and k = 8, r = 0 for t below 5 or so: the distance from the image itself, with
    weight 1/t."""
    net, images = (
        small_network(0).double(),
        torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    )
    student = Recorder(net).train()
    loss = make_loss(P_std=0.5)
    got = loss(student, images, None, SampleRng(0, 0, 64))
    _, (t, masks) = student.calls
    assert t.max() < 1.9
    x_t = images + ops.expand_like(t, images) * SampleRng(0, 0, 64).normal('noise', [1, 8, 8])
    expected = ops.image_distance(net(x_t, t, None, dropout_masks=masks) - images, 'l2_root') / t
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('sync', [True, False])
def test_both_passes_see_the_same_masks_and_the_later_time_is_r(sync):
    student = Recorder(small_network()).train()
    make_loss(5, sync_dropout=sync)(student, torch.zeros(16, 1, 8, 8), None, SampleRng(0, 0, 16))
    (r, first), (t, second) = student.calls
    torch.testing.assert_close(r, times.earlier_time(t, 5, 2.0))
    assert all(torch.equal(first[name], second[name]) for name in first) == sync


def test_times_weights_and_distance_are_the_options():
    """Twice as many draws as options: ln t has the mean and deviation asked for; the weight is 1/t² and the
    distance has its constant."""
    student, count = Recorder(small_network(0)).train(), 4000
    loss = make_loss(4, P_mean=-0.8, P_std=1.6, ect_weight='snr', c=0.06)
    images = torch.zeros(count, 1, 8, 8)
    got = loss(student, images, None, SampleRng(0, 0, count))
    t = student.calls[-1][0]
    assert abs(t.log().mean() + 0.8) < 5 * 1.6 / count**0.5 and abs(t.log().std() - 1.6) < 0.1
    r = times.earlier_time(t, 4, 2.0)
    noise = SampleRng(0, 0, count).normal('noise', [1, 8, 8]).double()
    with torch.no_grad():
        at_t, at_r = (
            student.net(ops.expand_like(s, noise) * noise, s, None).double().flatten(1) for s in (t, r)
        )
    expected = ((at_t - at_r).square().sum(dim=1) + 0.06**2).sqrt() - 0.06
    torch.testing.assert_close(got.detach(), expected / t**2, rtol=1e-4, atol=1e-9)


def test_stages_follow_the_images_and_are_reported():
    training_stats.reset()
    loss = make_loss()
    stages = []
    for nimg in (0, 999, 1000, 5500):
        loss.begin_step(nimg)
        stages.append(loss.state.stage)
    assert stages == [0, 0, 1, 5]
    loss(small_network(0), torch.zeros(32, 1, 8, 8), None, SampleRng(0, 0, 32))
    stats = training_stats.collect()
    assert stats['Edges/stage']['mean'] == 5 and 0 <= stats['Edges/terminal']['mean'] <= 1


def test_losses_do_not_depend_on_how_the_batch_is_split():
    net, images = (
        small_network(0).double(),
        torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    )
    loss = make_loss(3)
    whole = loss(net, images, None, SampleRng(7, 1000, 64))
    parts = [loss(net, images[a : a + 16], None, SampleRng(7, 1000 + a, 16)) for a in range(0, 64, 16)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-9, atol=1e-9)


def test_the_exact_map_of_the_gaussian_is_what_sampling_would_see():
    """At a late stage c(80) x at σ = 80 has the data's deviation, to the percents that its first-order hops
    leave, which are known."""
    gaussian, loss = Gaussian(VARIANCE), make_loss(9, **QUADRATIC)
    produced = multiplier_of_targets(loss, 80.0) ** 2 * (VARIANCE[0] + 80.0**2)
    error = (produced / gaussian.variance[0]).log() / 2
    assert error.abs().max() < 0.03
    torch.testing.assert_close(error, accumulated_error(9, 80.0), rtol=0.03, atol=0)
