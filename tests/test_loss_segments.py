"""Consistency training, segment regression and aDDIM hops against Gaussian data, and what the objectives have
in common under known conditions."""

import itertools

import pytest
import torch
from gaussian import Gaussian
from losses import (
    VARIANCE,
    Loss,
    assert_stationary_there_alone,
    exact_student,
    multipliers_of_targets,
    small_network,
    targets,
)

from training import consistency_ops as ops
from training import segment_solvers
from training.choices import SEGMENT_SOLVERS
from training.objectives.loss_direct import RegressionConfig
from training.rng import SampleRng

SEGMENTS = dict(S=4, T_start=16, T_end=16, T_anneal_kimg=0, cd_loss='l2', cd_weight_mode='flat')


def make_loss(teacher, **options):
    return Loss('mcd', teacher, **{**SEGMENTS, 'terminal_anchor': False, **options})


def make_training_loss(**options):
    return Loss('mct', **{**SEGMENTS, **options})


def make_direct_loss(teacher, **options):
    return Loss('direct', teacher, **{**SEGMENTS, 'top_mass': 0.5, **options})


def sample_of_each(seed):
    return torch.randn(2, 1, 1, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shrink(sigma):
    return VARIANCE[0] / (VARIANCE[0] + sigma**2)


# ----------------------------------------------------------------------------
# Consistency training.


def training_multipliers(loss):
    """The data's hop is right on average: its multiplier is DDIM's, D + r (1 − D), and D at the end."""
    edges, c = loss.state.edges, []
    for k in reversed(range(len(edges))):
        D, r = shrink(edges.sigma_t[k]), edges.sigma_s[k] / edges.sigma_t[k]
        c.append(
            {ops.TERMINAL: D, ops.SNAP: D + r * (1 - D)}.get(
                int(edges.kind[k]), (D + r * (1 - D)) * (c[-1] if c else 1)
            )
        )
    return torch.stack(c[::-1]), edges


@pytest.mark.parametrize('S, T, kind', [(1, 8, 'edm'), (4, 16, 'edm'), (4, 17, 'full')])
def test_trainings_discrete_consistency_function_has_zero_expected_gradient_and_a_perturbed_one_has_not(
    S, T, kind
):
    loss = make_training_loss(S=S, T_start=T, T_end=T, student_grid=kind)
    assert_stationary_there_alone(loss, loss.state.student_sigmas, *training_multipliers(loss))


def test_trainings_losses_do_not_vanish_where_its_gradients_do():
    """Its targets are right on average only: noise along the trajectory remains."""
    loss, gaussian = make_training_loss(S=2), Gaussian(VARIANCE)
    y, noise = sample_of_each(0)
    student = exact_student(gaussian, loss.state.student_sigmas)
    x_t, x_star, edges = targets(loss, student, y, noise)
    assert (student(x_t, edges.sigma_t) - x_star).abs().mean() > 1e-2


def test_training_where_every_edge_ends_a_segment_is_diffusion_training():
    """A full grid with T = S: every target is the image itself."""
    loss = make_training_loss(S=8, T_start=8, T_end=8, student_grid='full')
    y, noise = sample_of_each(1)
    _, x_star, edges = targets(loss, exact_student(Gaussian(VARIANCE), loss.state.student_sigmas), y, noise)
    assert set(edges.kind.tolist()) == {ops.SNAP, ops.TERMINAL} and len(edges) == 8
    torch.testing.assert_close(x_star, y.expand(8, -1, -1, -1), rtol=1e-9, atol=1e-9)


def test_distillation_there_by_ddim_is_regression_on_the_teacher():
    loss, gaussian = (
        make_loss(Gaussian(VARIANCE), S=8, T_start=8, T_end=8, student_grid='full', hop='ddim'),
        Gaussian(VARIANCE),
    )
    y, noise = sample_of_each(2)
    x_t, x_star, edges = targets(loss, exact_student(gaussian, loss.state.student_sigmas), y, noise)
    torch.testing.assert_close(x_star, gaussian(x_t, edges.sigma_t), rtol=1e-9, atol=1e-9)


# ----------------------------------------------------------------------------
# Segment regression.


def direct_multipliers(loss):
    """Products of Heun's multipliers over the sub-steps, from each edge's upper end to its boundary."""
    edges = loss.state.edges
    c = []
    for sigma_t, sigma_b in zip(edges.sigma_t.tolist(), edges.sigma_b.tolist()):
        n = loss.state.c.substeps
        lowest = sigma_b or min(loss.state.c.sigma_min, sigma_t)
        spaced = n if sigma_b else n - 1
        roots = [
            sigma_t ** (1 / 7) + i / max(spaced, 1) * (lowest ** (1 / 7) - sigma_t ** (1 / 7))
            for i in range(spaced + 1)
        ]
        nodes = [root**7 for root in roots] + ([] if sigma_b else [0.0])
        product = torch.ones_like(VARIANCE[0])
        for upper, lower in itertools.pairwise(nodes):
            slope = (1 - shrink(upper)) / upper
            euler = 1 + (lower - upper) * slope
            product = product * (
                euler
                if lower == 0
                else 1 + (lower - upper) * (slope + (1 - shrink(lower)) / lower * euler) / 2
            )
        c.append(product)
    return torch.stack(c), edges


@pytest.mark.parametrize('S, kind, substeps', [(1, 'full', 12), (2, 'edm', 1), (4, 'full', 3), (4, 'edm', 2)])
def test_regressions_function_has_zero_expected_gradient_and_a_perturbed_one_has_not(S, kind, substeps):
    loss = make_direct_loss(Gaussian(VARIANCE), S=S, student_grid=kind, substeps=substeps)
    assert_stationary_there_alone(loss, loss.state.student_sigmas, *direct_multipliers(loss), rounding=1e-9)


def test_regression_converges_to_the_exact_map_with_the_square_of_the_substeps():
    """At the tops of segments that end above 0, where Heun's order shows; the last step to 0 is of first
    order."""
    errors = []
    for substeps in (8, 16, 32):
        loss = make_direct_loss(Gaussian(VARIANCE), S=4, student_grid='full', substeps=substeps)
        c, edges = multipliers_of_targets(loss, loss.state.student_sigmas)
        tops = ops.segment_bounds(
            torch.cat([edges.sigma_t, edges.sigma_t.new_zeros(1)]), loss.state.student_sigmas
        )[:-1, 0]
        exact = (
            (VARIANCE + ops.expand_like(edges.sigma_b, VARIANCE.expand(len(c), 1, 2, 2)) ** 2)
            / (VARIANCE + ops.expand_like(edges.sigma_t, VARIANCE.expand(len(c), 1, 2, 2)) ** 2)
        ).sqrt()
        errors.append((c / exact - 1)[tops].abs().amax(dim=(1, 2, 3)))
    assert all((a / b > 3).all() and (a / b < 5).all() for a, b in itertools.pairwise(errors)), errors


@pytest.mark.parametrize('solver', SEGMENT_SOLVERS)
def test_regressions_target_leads_to_the_solution_of_its_solver(solver):
    """A DDIM step from x_t with the target ends where the solver's path does, and a step costs what `cost` says."""
    gaussian, calls = Gaussian(VARIANCE), []
    counted = lambda x, sigma, *_, **__: calls.append(sigma) or gaussian(x, sigma)
    loss = make_direct_loss(counted, S=4, student_grid='full', substeps=3, solver=solver)
    y, noise = sample_of_each(2)
    x_t, x_star, edges = targets(loss, exact_student(gaussian, loss.state.student_sigmas), y, noise)
    per_loss = len(calls) / 2  # `targets` evaluates the loss twice
    assert per_loss + 3 == RegressionConfig(substeps=3, solver=solver).cost()

    x_b = segment_solvers.solve_between(
        gaussian, x_t, edges.sigma_t, edges.sigma_b, 3, 7, 0.002, solver=solver
    )
    got = ops.ddim_step(x_t, x_star, edges.sigma_t, edges.sigma_b)
    torch.testing.assert_close(got, x_b, rtol=1e-9, atol=1e-9)


def test_regression_never_asks_the_student_for_its_target():
    class Mute(torch.nn.Module):
        def forward(self, *_, **__):
            raise AssertionError('asked')

    loss = make_direct_loss(Gaussian(VARIANCE))
    targets(loss, Mute(), *sample_of_each(3))


def test_regression_draws_its_share_at_the_very_levels_that_sampling_asks_for():
    """20,000 draws; each of the four levels within 5 standard deviations of an eighth."""
    loss, seen, count = make_direct_loss(Gaussian(VARIANCE), T_start=64, T_end=64), [], 20_000
    student = exact_student(Gaussian(VARIANCE), loss.state.student_sigmas)
    student.forward = lambda x, sigma, *_, **__: seen.append(sigma) or x.double()
    loss(student, torch.zeros(count, 1, 2, 2), None, SampleRng(0, 0, count))
    for level in loss.state.student_sigmas[:-1]:
        assert abs((seen[0] == level).double().mean() - 0.125) < 5 * (0.125 * 0.875 / count) ** 0.5
    assert len(seen[0].unique()) > 40  # the rest anywhere in the segments


# ----------------------------------------------------------------------------
# aDDIM, and what all share.


def test_an_addim_hop_adds_what_the_images_error_calls_for():
    """On snap edges x_b is the hop itself: DDIM's direction, lengthened by xvar_frac |y − D|² spread over the
    noise."""
    gaussian, y, noise = Gaussian(VARIANCE), *sample_of_each(4)
    options = dict(S=4, T_start=4, T_end=4, student_grid='full', hop='addim')
    for xvar_frac in (0.75, 0.0):
        loss = make_loss(gaussian, xvar_frac=xvar_frac, **options)
        x_t, x_star, edges = targets(loss, exact_student(gaussian, loss.state.student_sigmas), y, noise)
        snap = edges.kind == ops.SNAP
        x_t, sigma_t, sigma_s = x_t[snap], edges.sigma_t[snap], edges.sigma_s[snap]
        x_b = ops.ddim_step(x_t, x_star[snap], sigma_t, sigma_s)
        D = gaussian(x_t, sigma_t)
        v = xvar_frac * (y - D).square().sum(dim=(1, 2, 3)) if xvar_frac else 0.1 * 4 / (2 + sigma_t**-2)
        e = (x_t - D) / ops.expand_like(sigma_t, D)
        length = (sigma_s**2 + (1 - sigma_s / sigma_t) ** 2 * v / e.square().sum(dim=(1, 2, 3))).sqrt()
        torch.testing.assert_close(x_b, D + ops.expand_like(length, D) * e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    'make', [make_training_loss, lambda **k: make_direct_loss(small_network(0).double().eval(), **k)]
)
def test_losses_do_not_depend_on_how_the_batch_is_split_and_reach_the_student_alone(make):
    student = small_network(0).double()
    torch.nn.init.normal_(student.model.out_conv.weight, std=0.1)
    images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = make(cd_loss='pseudo_huber', cd_weight_mode='sqrt_karras')
    whole = loss(student, images, None, SampleRng(7, 1000, 64))
    parts = [loss(student, images[a : a + 16], None, SampleRng(7, 1000 + a, 16)) for a in range(0, 64, 16)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-9, atol=1e-9)
    whole.sum().backward()
    assert sum(p.grad.abs().sum() for p in student.parameters()) > 0


def test_a_cosine_grid_is_used_throughout():
    """Students' levels, the fine grid and sub-steps are evenly spaced in atan sigma."""
    loss = make_direct_loss(
        Gaussian(VARIANCE), S=4, T_start=32, T_end=32, student_grid='full', sigma_grid='cosine'
    )
    for levels in (loss.state.student_sigmas[:-1], loss.state.edges.sigma_t):
        steps = levels.atan().diff()
        torch.testing.assert_close(steps, steps[:1].expand_as(steps), rtol=1e-9, atol=0)
