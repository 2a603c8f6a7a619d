"""Samplers against EDM's outputs and against the exact solution for Gaussian data."""
import itertools

import pytest
import torch
from gaussian import Gaussian

from dnnlib import UserError
from training import consistency_ops as ops
from training import samplers
from training.checkpoint import load_network

GOLDEN_NETWORKS = ('edm-adm-cond', 'vp-ddpmpp-cond', 've-ncsnpp-uncond')
ABLATIONS = ('euler.edm.linear.none', 'heun.edm.linear.none', 'heun.vp.vp.vp', 'heun.ve.ve.none', 'euler.iddpm.linear.none')


@pytest.fixture
def gaussian():
    return Gaussian(torch.tensor([0.05, 0.25, 1.0, 4.0]).reshape(1, 1, 2, 2), mean=0.2)


@pytest.fixture
def latents():
    return torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('name', GOLDEN_NETWORKS)
@pytest.mark.parametrize('what', ['heun18', *ABLATIONS])
def test_teacher_samplers_equal_edms(fixtures, numerics, name, what):
    """To 1e-4 of the images' standard deviation, from the same latents."""
    net = load_network(fixtures / f'{name}.pkl')
    get = lambda key: torch.from_numpy(numerics[key]) if (key := f'edm.{name}.{key}') in numerics else None
    if what == 'heun18':
        options, golden = dict(solver='heun'), get(what)
    else:
        solver, disc, schedule, scaling = what.split('.')
        options, golden = dict(solver=solver, discretization=disc, schedule=schedule, scaling=scaling), get(f'ablate.{what}')
    with torch.no_grad():
        images = samplers.sample(net, get('latents'), get('labels'), steps=18, **options)
    assert (images - golden).abs().max() < 1e-4 * golden.std()


def test_a_long_heun_run_equals_edms(fixtures, numerics):
    net = load_network(fixtures / 'edm-adm-cond.pkl')
    latents, labels, golden = (torch.from_numpy(numerics[f'edm.edm-adm-cond.{key}']) for key in ('latents', 'labels', 'heun256'))
    with torch.no_grad():
        images = samplers.sample(net, latents, labels, 'heun', 256)
    assert (images - golden).abs().max() < 1e-4 * golden.std()


@pytest.mark.parametrize('solver, order', [('euler', 1), ('heun', 2)])
@pytest.mark.parametrize('options', [{}, dict(discretization='ve', schedule='ve'), dict(discretization='vp', schedule='vp', scaling='vp'),
                                     dict(alpha=0.75)])
def test_ode_solvers_converge_at_their_order(gaussian, latents, solver, order, options):
    """Twice the steps divide what they still change by 2**order."""
    runs = [samplers.sample(gaussian, latents, None, solver, n, sigma_min=0.02, sigma_max=20.0, **options) for n in (64, 128, 256, 512)]
    changes = [(a - b).abs().max().item() for a, b in itertools.pairwise(runs)]
    ratios = [a / b for a, b in itertools.pairwise(changes)]
    assert all(0.75 * 2 ** order < r < 1.3 * 2 ** order for r in ratios), ratios


def test_heun_converges_to_the_exact_solution(gaussian, latents):
    """At sigma_min; the last Euler step to 0 is the denoiser there."""
    exact = gaussian(gaussian.solve(latents.double() * 20, 20, 0.02), 0.02)
    errors = [(samplers.sample(gaussian, latents, None, 'heun', n, sigma_min=0.02, sigma_max=20.0) - exact).abs().max() for n in (128, 256)]
    assert 3.5 < errors[0] / errors[1] < 4.5 and errors[1] < 1e-3


def test_churn_keeps_the_distribution():
    """Sampling with churn gives the mean and variance of Gaussian data; 20,000 samples, 5 standard errors."""
    n, gaussian, generator = 20_000, Gaussian(0.25, mean=0.5), torch.Generator().manual_seed(0)
    latents = torch.randn(n, 1, 1, 1, generator=generator)
    randn_like = lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)
    x = samplers.sample(gaussian, latents, None, 'heun', 160, S_churn=20, S_min=0.05, S_max=50, randn_like=randn_like)
    assert (x - samplers.sample(gaussian, latents, None, 'heun', 160)).abs().mean() > 0.5
    assert abs(x.mean() - 0.5) < 5 * 0.5 / n ** 0.5 and abs(x.var() / 0.25 - 1) < 5 * (2 / n) ** 0.5


class ExactStudent(torch.nn.Module):
    """The student whose every step lands on the trajectory, with a snapshot's metadata."""

    def __init__(self, gaussian, sigmas):
        super().__init__()
        self.gaussian, self.metadata = gaussian, dict(objective='mcd', sigmas=sigmas.tolist(), sigma_min=0.002, sigma_max=80.0, rho=7.0,
                                                      student_grid='full')
        self.asked = []

    def forward(self, x, sigma, class_labels=None):
        self.asked.append(float(sigma))
        grid = torch.tensor(self.metadata['sigmas'], dtype=torch.float64)
        sigma = sigma.expand(len(x))
        sigma_b = grid[ops.segment_of(sigma, grid) + 1]
        return ops.inv_ddim(self.gaussian.solve(x, sigma, sigma_b), x, sigma, sigma_b)


@pytest.mark.parametrize('S', [1, 2, 8])
def test_a_perfect_student_samples_the_exact_solution_in_S_evaluations(gaussian, latents, S):
    student = ExactStudent(gaussian, ops.student_grid(S, 0.002, 80, 7, 'full'))
    images = samplers.sample(student, latents)
    torch.testing.assert_close(images, gaussian.solve(latents.double() * 80, 80, 0), rtol=1e-9, atol=1e-9)
    assert student.asked == student.metadata['sigmas'][:-1]


def test_a_student_refuses_other_steps_unless_forced(gaussian, latents):
    student = ExactStudent(gaussian, ops.student_grid(4, 0.002, 80, 7, 'full'))
    with pytest.raises(UserError, match='trained for 4 steps, not 8'):
        samplers.sample(student, latents, steps=8)
    samplers.sample(student, latents, steps=8, force_steps=True)
    assert student.asked == ops.student_grid(8, 0.002, 80, 7, 'full')[:-1].tolist()


@pytest.mark.parametrize('solver, steps, options, message', [
    ('dpm', 8, {}, 'not one of student, euler, heun'), ('student', None, {}, 'no student'), ('heun', 8, dict(eta=1), 'no option eta'),
    ('student', 4, dict(S_churn=1), 'no option S_churn'), ('heun', 8, dict(schedule='cosine'), 'not one of linear'),
    ('heun', 8, dict(discretization='x'), 'not one of edm'), ('heun', 8, dict(scaling='x'), 'not one of none')])
def test_what_does_not_apply_is_refused_by_name(gaussian, latents, solver, steps, options, message):
    with pytest.raises(UserError, match=message):
        samplers.sample(gaussian, latents, None, solver, steps, **options)


def test_the_number_of_evaluations_is_counted(gaussian, latents):
    for solver, steps in (('euler', 8), ('heun', 8), ('heun', 1)):
        calls = []
        samplers.sample(lambda x, s, c, calls=calls: calls.append(s) or gaussian(x, s), latents, None, solver, steps)
        assert len(calls) == samplers.evaluations(solver, steps)


def test_noise_levels_stay_within_what_the_network_knows(gaussian, latents):
    gaussian.sigma_min, gaussian.sigma_max = 0.1, 5.0
    asked = []
    samplers.sample(type('Net', (), dict(sigma_min=0.1, sigma_max=5.0, __call__=lambda self, x, s, c: asked.append(float(s)) or gaussian(x, s)))(),
                    latents, None, 'euler', 6)
    assert max(asked) == pytest.approx(5.0) and min(asked) == pytest.approx(0.1)
