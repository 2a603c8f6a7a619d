"""Schedules and solvers, each by itself: against public solvers on a mixture, closed forms, and each
other."""

import itertools
import math

import numpy as np
import pytest
import torch
from gaussian import Gaussian

from dnnlib import UserError
from training import consistency_ops as ops
from training import samplers, solvers
from training.ode_time import VP_EPSILON, ode_time
from training.schedules import SCHEDULES, schedule_sigmas

SPAN = (0.002, 80.0)


@pytest.fixture(scope='module')
def golden(fixtures):
    with np.load(fixtures / 'solvers.npz') as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture(scope='module')
def mixture(golden):
    """The denoiser of a mixture of isotropic Gaussians:

    E[y | x], each component's mean shrunk toward x by its posterior.
    """
    means, std, weights = golden['means'], golden['std'], golden['weights']

    def denoiser(x, sigma):
        total = std**2 + sigma**2
        square = (x[:, None] - means).square().flatten(2).sum(2)
        posterior = torch.softmax(weights.log() - square / (2 * total), dim=1)
        center = torch.einsum('nk,kchw->nchw', posterior, means)
        return center + std**2 / total * (x - center)

    torch.testing.assert_close(denoiser(golden['x'], 3.0), golden['D_at_3'], rtol=1e-10, atol=1e-10)
    return denoiser


@pytest.mark.parametrize('afs', ['', '.afs'])
@pytest.mark.parametrize('n', [5, 11])
@pytest.mark.parametrize('schedule', ['polynomial', 'logsnr'])
def test_euler_equals_public_code(golden, mixture, schedule, n, afs):
    """To 1e-8, from sigma_max 80 to sigma_min 0.002, with and without the analytical first step."""
    sigmas = samplers.schedule_sigmas(schedule, n, *SPAN)
    torch.testing.assert_close(sigmas, golden[f'levels.{schedule}.{n}'], rtol=1e-12, atol=0)
    images = samplers.ode_solve(mixture, golden['latents'] * 80, sigmas, 'euler', afs=bool(afs))
    torch.testing.assert_close(images, golden[f'euler.{schedule}.{n}{afs}'], rtol=1e-8, atol=1e-8)


def test_a_heun_step_is_the_hop_of_training(golden, mixture):
    sigmas, x = samplers.schedule_sigmas('polynomial', 5, *SPAN), golden['latents'] * 80
    expected = x
    for sigma, sigma_next in itertools.pairwise(sigmas):
        expected = ops.heun_hop(lambda x, sigma: mixture(x, sigma[0]), expected, sigma, sigma_next)
    images = samplers.ode_solve(mixture, x, sigmas, 'heun')
    torch.testing.assert_close(images, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('solver, order', [('euler', 1), ('heun', 2)])
def test_solvers_converge_to_the_exact_solution_at_their_order(solver, order):
    """Twice the levels divide the error by 2**order."""
    gaussian = Gaussian(torch.tensor([0.05, 0.25, 1.0, 4.0]).reshape(1, 1, 2, 2), mean=0.2)
    x = 20 * torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = gaussian.solve(x, 20, 0.02)
    runs = [
        samplers.ode_solve(gaussian, x, schedule_sigmas('polynomial', n, 0.02, 20), solver)
        for n in (129, 257)
    ]
    errors = [(run - exact).abs().max() for run in runs]
    assert 0.75 * 2**order < errors[0] / errors[1] < 1.3 * 2**order and errors[1] < 0.1


@pytest.mark.parametrize('afs', [False, True])
@pytest.mark.parametrize('end', ['at sigma_min', 'to 0', 'to_zero'])
@pytest.mark.parametrize('solver, step', [('euler', 1), ('heun', 2)])
def test_a_denoiser_is_evaluated_as_often_as_the_table_says(solver, step, end, afs):
    """n levels: n − 1 steps; a step to 0 is one evaluation, and so is to_zero; the analytical first step
    saves one."""
    evaluated = []
    denoiser = lambda x, sigma: evaluated.append(float(sigma)) or x / 2
    sigmas = schedule_sigmas('polynomial', 6, *SPAN).tolist() + ([0.0] if end == 'to 0' else [])
    options = dict(afs=afs, to_zero=end == 'to_zero')
    x = samplers.ode_solve(denoiser, torch.ones(1, 1, 2, 2), sigmas, solver, **options)
    assert len(evaluated) == 5 * step + (end != 'at sigma_min') - afs and x.dtype == torch.float64
    assert solvers.ODE_SOLVERS[solver].evaluations == step and (evaluated[0] < 80) == afs
    lowest = sigmas[-2] if end == 'at sigma_min' and solver == 'euler' else 0.002
    assert evaluated[-1] == pytest.approx(lowest)


def test_an_analytical_first_step_takes_the_slope_of_data_of_unit_variance():
    """x / sqrt(1 + 80²) to 10, then Euler's step to 1 with D = x / (1 + 10²)."""
    start = 80 * torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = start + (10 - 80) * start / math.sqrt(1 + 80**2)
    x = x + (1 - 10) * (x - x / 101) / 10
    images = samplers.ode_solve(Gaussian(1.0), start, [80.0, 10.0, 1.0], 'euler', afs=True)
    torch.testing.assert_close(images, x, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(solver='rk4'), 'not one of euler, heun'),
        (dict(order=3), 'heun solver has no order'),
        (dict(variant='bh1'), 'heun solver has no variant'),
        (dict(sigmas=[80.0, 1.0, 1.0]), 'must fall'),
        (dict(sigmas=[80.0, -1.0]), 'none is below 0'),
        (dict(sigmas=[]), 'must fall'),
        (dict(sigmas=[80.0, 0.0], to_zero=True), 'end above 0'),
    ],
)
def test_what_a_solver_cannot_do_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        samplers.ode_solve(
            Gaussian(1.0), torch.ones(1, 1, 2, 2), **dict(dict(sigmas=[80.0, 1.0], solver='heun'), **options)
        )


# ----------------------------------------------------------------------------
# Schedules.


@pytest.mark.parametrize('name', SCHEDULES)
def test_a_schedule_falls_from_sigma_max_to_sigma_min(name):
    sigmas = samplers.schedule_sigmas(name, 9, *SPAN)
    assert sigmas.dtype == torch.float64 and bool((sigmas.diff() < 0).all())
    assert sigmas[[0, -1]].tolist() == pytest.approx([80, 0.002], rel=1e-9)
    assert samplers.schedule_sigmas(name, 1, *SPAN).tolist() == pytest.approx([80], rel=1e-9)


@pytest.mark.parametrize(
    'name, coordinate',
    [
        ('polynomial', lambda sigma: sigma ** (1 / 7)),
        ('logsnr', torch.log),
        ('cosine', torch.atan),
        (
            'time_uniform',
            lambda sigma: torch.tensor([ode_time('vp', 'none', *SPAN).time(s) for s in sigma.tolist()]),
        ),
    ],
)
def test_schedules_are_even_in_their_coordinate(name, coordinate):
    u = coordinate(samplers.schedule_sigmas(name, 9, *SPAN)).double()
    torch.testing.assert_close(u, torch.lerp(u[0], u[-1], torch.arange(9).double() / 8), rtol=1e-6, atol=1e-9)
    if name == 'time_uniform':
        assert u[[0, -1]].tolist() == pytest.approx([1, VP_EPSILON], rel=1e-6)


def test_rho_is_of_the_polynomial_schedule_and_other_names_are_refused():
    assert torch.equal(schedule_sigmas('polynomial', 5, *SPAN, rho=3), ops.karras_sigmas(5, *SPAN, 3))
    assert torch.equal(schedule_sigmas('logsnr', 5, *SPAN, rho=3), schedule_sigmas('logsnr', 5, *SPAN))
    with pytest.raises(UserError, match="'edm' is not one of polynomial, logsnr"):
        schedule_sigmas('edm', 5, *SPAN)


@pytest.mark.parametrize('scaling', ['none', 'vp'])
@pytest.mark.parametrize('schedule', ['linear', 'vp', 've'])
def test_slopes_of_sigma_and_scale_are_their_derivatives(schedule, scaling):
    """Against central differences; the scale keeps the variance where it is vp; time is the inverse of
    sigma."""
    time = ode_time(schedule, scaling, *SPAN)
    for t in (0.1, 0.5, 0.9):
        h = 1e-6
        for function, slope in ((time.sigma, time.sigma_slope), (time.scale, time.scale_slope)):
            assert slope(t) == pytest.approx(
                (function(t + h) - function(t - h)) / (2 * h), rel=1e-6, abs=1e-9
            )
        assert time.time(time.sigma(t)) == pytest.approx(t, rel=1e-9)
        if scaling == 'vp':
            assert time.scale(t) ** 2 * (1 + time.sigma(t) ** 2) == pytest.approx(1, rel=1e-12)
