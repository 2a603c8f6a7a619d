"""Schedules and solvers, each by itself: against public solvers on a mixture, closed forms, and each
other."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from gaussian import Gaussian
from scipy import integrate

from dnnlib import UserError
from training import consistency_ops as ops
from training import multistep_solvers as multistep
from training import samplers, solvers
from training.ode_time import VP_EPSILON, ode_time, vp_betas, vp_time
from training.samplers import ode_solve
from training.schedules import DISCRETIZATIONS, SCHEDULES, schedule_sigmas
from training.solvers import ODE_SOLVERS

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


# ipndm3.polynomial.11.afs, unipc2.bh1.logsnr.5: solver, order, variant, schedule, number of levels.
GOLDEN = re.compile(r'(dpm2|[a-z_]+)(\d?)(?:\.(bh[12]))?\.([a-z]+)\.(\d+)(\.afs)?(\.to_zero)?')
ARRAYS = dict(euler=8, dpm2=8, ipndm=24, ipndm_v=8, deis=12, dpmpp=18, unipc=32)


@pytest.mark.parametrize('solver', ARRAYS)
def test_every_solver_equals_public_code(golden, mixture, solver):
    """From sigma_max 80 to sigma_min 0.002, for every array; their DEIS is a fine sum, ours quadrature."""
    names = [match for name in golden if (match := GOLDEN.fullmatch(name)) and match[1] == solver]
    assert len(names) == ARRAYS[solver]
    for match in names:
        _, order, variant, schedule, n, afs, to_zero = match.groups()
        sigmas = schedule_sigmas(schedule, int(n), *SPAN)
        torch.testing.assert_close(sigmas, golden[f'levels.{schedule}.{n}'], rtol=1e-12, atol=0)
        choices = dict(order=int(order) if order else None, variant=variant)
        x = golden['latents'] * 80
        images = ode_solve(mixture, x, sigmas, solver, **choices, afs=bool(afs), to_zero=bool(to_zero))
        error = (images - golden[match[0]]).abs().max()
        assert error < (1e-5 if solver == 'deis' else 1e-8), match[0]


def test_a_heun_step_is_the_hop_of_training(golden, mixture):
    sigmas, x = samplers.schedule_sigmas('polynomial', 5, *SPAN), golden['latents'] * 80
    expected = x
    for sigma, sigma_next in itertools.pairwise(sigmas):
        expected = ops.heun_hop(lambda x, sigma: mixture(x, sigma[0]), expected, sigma, sigma_next)
    images = samplers.ode_solve(mixture, x, sigmas, 'heun')
    torch.testing.assert_close(images, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    'solver, order, expected',
    [
        ('euler', None, 1),
        ('heun', None, 2),
        ('dpm2', None, 2),
        *(('ipndm', k, min(k, 2)) for k in (1, 2, 3, 4)),
        *(('ipndm_v', k, min(k, 2)) for k in (1, 2, 3, 4)),
        *(('deis', k, min(k, 2)) for k in (1, 2, 3, 4)),
        ('dpmpp', 2, 2),
        ('dpmpp', 3, 2),
        ('unipc', 2, 2),
        ('unipc', 3, 2),
    ],
)
def test_solvers_converge_to_the_exact_solution_at_their_order(solver, order, expected):
    """Twice the levels divide the error by 2**order; a first step of order 1 leaves at most 2 overall."""
    gaussian = Gaussian(torch.tensor([0.05, 0.25, 1.0, 4.0]).reshape(1, 1, 2, 2), mean=0.2)
    x = 20 * torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = gaussian.solve(x, 20, 0.02)
    runs = [
        ode_solve(gaussian, x, schedule_sigmas('polynomial', n, 0.02, 20), solver, order) for n in (129, 257)
    ]
    errors = [(run - exact).abs().max() for run in runs]
    assert 0.75 * 2**expected < errors[0] / errors[1] < (1.3 if order is None else 4) * 2**expected
    assert errors[1] < 0.1 * 2 ** -(expected - 1)


# ----------------------------------------------------------------------------
# One step, from exact earlier outputs: its own error, of a solver of order k, falls as h^(k+1).

LAST_STEPS = (1.0, 0.8, 0.9, 0.7, 0.6)  # lengths, in h, of the steps before and of the last one
EXACT = Gaussian(torch.tensor([0.3, 1.5]).reshape(1, 1, 1, 2))
STATE = torch.tensor([2.0, -1.0], dtype=torch.float64).reshape(1, 1, 1, 2)  # at sigma = 2


def levels_of(h, k, equal=False):
    """k + 1 levels of k steps that end below 2, unequal unless `equal`; the last is about h long."""
    lengths = [h * (1.0 if equal else length) for length in LAST_STEPS[-k:]]
    return [2.0 - sum(lengths[:i]) for i in range(k + 1)]


def exact_state(sigma):
    return EXACT.solve(STATE, 2.0, sigma)


def exact_output(sigma):
    return EXACT(exact_state(sigma), sigma)


def order_of(error):
    """log2 of the ratio of errors as h is halved."""
    return math.log2(error(0.04) / error(0.02))


@pytest.mark.parametrize('k', [1, 2, 3, 4])
@pytest.mark.parametrize('solver', ['ipndm', 'ipndm_v', 'deis'])
def test_a_step_through_k_exact_slopes_has_local_order_k_plus_1(solver, k):
    """Of `ipndm` on equal steps only, for which its weights are."""

    def error(h):
        sigmas, states = levels_of(h, k, equal=solver == 'ipndm'), []

        # D for which the slope is the exact one, whatever the state is.
        def denoiser(x, sigma):
            states.append(x)
            slope = (exact_state(sigma) - exact_output(sigma)) / sigma
            return x - sigma * slope

        end = ODE_SOLVERS[solver].solve(denoiser, STATE, sigmas, order=k)
        exact = exact_state(sigmas[-1]) - exact_state(sigmas[-2])
        return ((end - states[-1]) - exact).abs().max().item()

    assert order_of(error) == pytest.approx(k + 1, abs=0.25)


@pytest.mark.parametrize('k', [2, 3])
def test_a_step_of_dpmpp_through_exact_outputs_has_local_order_3(k):
    """In mid-run: the last steps have lower orders. 3M's second difference has half its weight."""

    def error(h):
        sigmas, states = levels_of(h, 5), []
        denoiser = lambda x, sigma: states.append(x) or exact_output(sigma)
        multistep.dpmpp(denoiser, STATE, sigmas, order=k)
        # The homogeneous part carries the earlier error along.
        ratio = sigmas[3] / sigmas[2]
        exact = exact_state(sigmas[3]) - ratio * exact_state(sigmas[2])
        return ((states[3] - ratio * states[2]) - exact).abs().max().item()

    assert order_of(error) == pytest.approx(3, abs=0.25)


@pytest.mark.parametrize('variant', ['bh1', 'bh2'])
@pytest.mark.parametrize('k', [1, 2, 3])
def test_unipc_predicts_at_local_order_k_plus_1_and_corrects_at_one_more(k, variant):
    def error(h, correct):
        sigmas = levels_of(h, k)
        outputs = [exact_output(sigma) for sigma in sigmas[-2::-1]]
        latest = exact_output(sigmas[-1]) if correct else None
        end = multistep.unipc_step(exact_state(sigmas[-2]), outputs, sigmas, k - 1, k, variant, latest)
        return (end - exact_state(sigmas[-1])).abs().max().item()

    for correct in (False, True):
        assert order_of(lambda h: error(h, correct)) == pytest.approx(k + 1 + correct, abs=0.3)  # noqa: B023


@pytest.mark.parametrize('order', [1, 2, 3, 4])
def test_on_equal_steps_ipndm_v_is_ipndm(mixture, golden, order):
    sigmas, x = torch.linspace(10, 1, 9, dtype=torch.float64), golden['latents'] * 10
    runs = [ode_solve(mixture, x, sigmas, solver, order) for solver in ('ipndm', 'ipndm_v')]
    torch.testing.assert_close(*runs, rtol=1e-12, atol=1e-12)
    unequal = [
        ode_solve(mixture, x, schedule_sigmas('polynomial', 9, 1, 10), solver, order)
        for solver in ('ipndm', 'ipndm_v')
    ]
    assert ((unequal[0] - unequal[1]).abs().max() > 1e-3) == (order > 1)


@pytest.mark.parametrize('sigmas', [(80.0, 5.0, 0.002), (80.0, 0.002), (2.0, 1.0, 0.5), (20.0, 1.0, 0.0)])
def test_weights_of_deis_are_the_integrals(sigmas):
    """Against adaptive quadrature, also where the levels end at 0; a constant slope integrates to the step."""
    time = vp_time(*vp_betas(sigmas[-1], sigmas[0]))
    weights = multistep.vp_time_weights(sigmas, 2)
    for (start, end), found in zip(itertools.pairwise(sigmas), weights):
        assert sum(found) == pytest.approx(end - start, rel=1e-12)
    if len(sigmas) < 3:
        return

    # The last step is linear in t through the last two slopes.
    first, last = time.time(sigmas[0]), time.time(sigmas[1])
    share = lambda sigma: (time.time(sigma) - first) / (last - first)
    expected, _ = integrate.quad(share, sigmas[1], sigmas[2], epsabs=1e-13, epsrel=1e-13, limit=500)
    assert weights[1][0] == pytest.approx(expected, rel=1e-10)


def test_a_last_level_of_0_ends_at_the_denoised_image(mixture, golden):
    """Of solvers whose last step is of order 1 there, and of dpm2, whose step to 0 is Euler's."""
    sigmas, x = [80.0, 5.0, 0.5, 0.02, 0.0], golden['latents'] * 80
    for solver in ('euler', 'heun', 'dpm2', 'dpmpp', 'unipc'):
        outputs = []
        denoiser = lambda x, sigma, outputs=outputs: outputs.append(mixture(x, sigma)) or outputs[-1]
        image = ode_solve(denoiser, x, sigmas, solver)
        torch.testing.assert_close(image, outputs[-1], rtol=0, atol=1e-12)
    assert all(
        ode_solve(mixture, x, sigmas, solver).isfinite().all() for solver in ('ipndm', 'ipndm_v', 'deis')
    )


@pytest.mark.parametrize('afs', [False, True])
@pytest.mark.parametrize('end', ['at sigma_min', 'to 0', 'to_zero'])
@pytest.mark.parametrize(
    'solver, order',
    [(name, order) for name, known in ODE_SOLVERS.items() for order in known.orders or (None,)],
)
def test_a_denoiser_is_evaluated_as_often_as_the_table_says(solver, order, end, afs):
    """n levels: n − 1 steps; a step to 0 is one evaluation, and so is to_zero; the analytical first step
    saves one."""
    evaluated, step = [], 2 if solver in ('heun', 'dpm2') else 1
    denoiser = lambda x, sigma: evaluated.append(float(sigma)) or x / 2
    sigmas = schedule_sigmas('polynomial', 6, *SPAN).tolist() + ([0.0] if end == 'to 0' else [])
    options = dict(order=order, afs=afs, to_zero=end == 'to_zero')
    x = samplers.ode_solve(denoiser, torch.ones(1, 1, 2, 2), sigmas, solver, **options)
    assert len(evaluated) == 5 * step + (end != 'at sigma_min') - afs and x.dtype == torch.float64
    assert solvers.ODE_SOLVERS[solver].evaluations == step and (evaluated[0] < 80) == afs
    lowest = 0.002
    if end == 'at sigma_min' and solver != 'heun':
        lowest = math.sqrt(sigmas[-2] * 0.002) if solver == 'dpm2' else sigmas[-2]
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
        (dict(solver='ipndm', order=5), 'ipndm order is one of 1, 2, 3, 4'),
        (dict(solver='dpmpp', order=4), 'dpmpp order is one of 2, 3'),
        (dict(solver='unipc', variant='bh3'), 'unipc variant is one of bh1, bh2'),
        (dict(sigmas=[math.inf, 1.0]), 'must fall'),
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
    for rho in (1, 2):
        times = [
            vp_time(*vp_betas(*SPAN)).time(s) for s in schedule_sigmas('time_uniform', 5, *SPAN, rho).tolist()
        ]
        steps = torch.tensor(times).double().pow(1 / rho).diff()
        torch.testing.assert_close(steps, steps.mean().expand(4), rtol=1e-6, atol=0)
    vp = DISCRETIZATIONS['vp'].sigmas(5, *SPAN, 7.0)
    assert torch.equal(vp, schedule_sigmas('time_uniform', 5, *SPAN)), "EDM's has no exponent"
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
