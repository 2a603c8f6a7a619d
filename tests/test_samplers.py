"""Samplers against EDM's and OpenAI's outputs and against the exact solution for Gaussian data."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from gaussian import Gaussian

from dnnlib import UserError
from sampling.generation import SeededNoise
from training import consistency_ops as ops
from training import samplers
from training.checkpoint import load_network
from training.interchange.openai import load_openai
from training.schedules import DISCRETIZATIONS

GOLDEN_NETWORKS = ('edm-adm-cond', 'vp-ddpmpp-cond', 've-ncsnpp-uncond')
ABLATIONS = (
    'euler.edm.linear.none',
    'heun.edm.linear.none',
    'heun.vp.vp.vp',
    'heun.ve.ve.none',
    'euler.iddpm.linear.none',
)


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
        options, golden = (
            dict(solver=solver, discretization=disc, schedule=schedule, scaling=scaling),
            get(f'ablate.{what}'),
        )
    with torch.no_grad():
        images = samplers.sample(net, get('latents'), get('labels'), steps=18, **options)
    assert (images - golden).abs().max() < 1e-4 * golden.std()


def test_a_long_heun_run_equals_edms(fixtures, numerics):
    net = load_network(fixtures / 'edm-adm-cond.pkl')
    latents, labels, golden = (
        torch.from_numpy(numerics[f'edm.edm-adm-cond.{key}']) for key in ('latents', 'labels', 'heun256')
    )
    with torch.no_grad():
        images = samplers.sample(net, latents, labels, 'heun', 256)
    assert (images - golden).abs().max() < 1e-4 * golden.std()


@pytest.mark.parametrize('solver, order', [('euler', 1), ('heun', 2)])
@pytest.mark.parametrize(
    'options',
    [
        {},
        dict(discretization='ve', schedule='ve'),
        dict(discretization='vp', schedule='vp', scaling='vp'),
        dict(alpha=0.75),
    ],
)
def test_ode_solvers_converge_at_their_order(gaussian, latents, solver, order, options):
    """Twice the steps divide what they still change by 2**order."""
    runs = [
        samplers.sample(gaussian, latents, None, solver, n, sigma_min=0.02, sigma_max=20.0, **options)
        for n in (64, 128, 256, 512)
    ]
    changes = [(a - b).abs().max().item() for a, b in itertools.pairwise(runs)]
    ratios = [a / b for a, b in itertools.pairwise(changes)]
    assert all(0.75 * 2**order < r < 1.3 * 2**order for r in ratios), ratios


def test_heun_converges_to_the_exact_solution(gaussian, latents):
    """At sigma_min; the last Euler step to 0 is the denoiser there."""
    exact = gaussian(gaussian.solve(latents.double() * 20, 20, 0.02), 0.02)
    errors = [
        (samplers.sample(gaussian, latents, None, 'heun', n, sigma_min=0.02, sigma_max=20.0) - exact)
        .abs()
        .max()
        for n in (128, 256)
    ]
    assert 3.5 < errors[0] / errors[1] < 4.5 and errors[1] < 1e-3


def test_churn_keeps_the_distribution():
    """Sampling with churn gives the mean and variance of Gaussian data; 20,000 samples, 5 standard errors."""
    n, gaussian, generator = 20_000, Gaussian(0.25, mean=0.5), torch.Generator().manual_seed(0)
    latents = torch.randn(n, 1, 1, 1, generator=generator)
    randn_like = lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)
    x = samplers.sample(
        gaussian, latents, None, 'heun', 160, S_churn=20, S_min=0.05, S_max=50, randn_like=randn_like
    )
    assert (x - samplers.sample(gaussian, latents, None, 'heun', 160)).abs().mean() > 0.5
    assert abs(x.mean() - 0.5) < 5 * 0.5 / n**0.5 and abs(x.var() / 0.25 - 1) < 5 * (2 / n) ** 0.5


class ExactStudent(torch.nn.Module):
    """The student whose every step lands on the trajectory, with a snapshot's metadata."""

    def __init__(self, gaussian, sigmas):
        super().__init__()
        self.gaussian, self.metadata = (
            gaussian,
            dict(
                objective='mcd',
                sigmas=sigmas.tolist(),
                sigma_min=0.002,
                sigma_max=80.0,
                rho=7.0,
                student_grid='full',
            ),
        )
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


@pytest.mark.parametrize(
    'solver, steps, options, message',
    [
        ('dpm', 8, {}, 'not one of student, euler, heun'),
        ('student', None, {}, 'not a student'),
        ('heun', 8, dict(eta=1), 'no option eta'),
        ('student', 4, dict(S_churn=1), 'no option S_churn'),
        ('addim', 4, dict(schedule='vp'), 'no option schedule'),
        ('cm', 1, dict(S_churn=1), 'no option S_churn'),
        ('addim', 8, dict(discretization='x'), 'not one of edm'),
        ('heun', 8, dict(schedule='cosine'), 'not one of linear'),
        ('heun', 8, dict(discretization='x'), 'not one of edm'),
        ('heun', 8, dict(scaling='x'), 'not one of none'),
    ],
)
def test_what_does_not_apply_is_refused_by_name(gaussian, latents, solver, steps, options, message):
    with pytest.raises(UserError, match=message):
        samplers.sample(gaussian, latents, None, solver, steps, **options)


def test_the_number_of_evaluations_is_counted(gaussian, latents):
    for solver, steps in (('euler', 8), ('heun', 8), ('heun', 1), ('addim', 8), ('cm', 1), ('cm', 3)):
        calls = []
        samplers.sample(
            lambda x, s, c, calls=calls: calls.append(s) or gaussian(x, s), latents, None, solver, steps
        )
        assert len(calls) == samplers.evaluations(solver, steps)


def test_noise_levels_stay_within_what_the_network_knows(gaussian, latents):
    gaussian.sigma_min, gaussian.sigma_max = 0.1, 5.0
    asked = []
    samplers.sample(
        type(
            'Net',
            (),
            dict(
                sigma_min=0.1,
                sigma_max=5.0,
                __call__=lambda self, x, s, c: asked.append(float(s)) or gaussian(x, s),
            ),
        )(),
        latents,
        None,
        'euler',
        6,
    )
    assert max(asked) == pytest.approx(5.0) and min(asked) == pytest.approx(0.1)


# ----------------------------------------------------------------------------
# Consistency models.


class ExactConsistency:
    """The consistency function of Gaussian data: from any noise level along the trajectory to `boundary`,
    where it is the identity."""

    def __init__(self, gaussian, boundary=0.0, **metadata):
        self.gaussian, self.boundary, self.metadata, self.asked = gaussian, boundary, metadata, []

    def __call__(self, x, sigma, class_labels=None):
        self.asked.append(float(sigma))
        return self.gaussian.solve(x, sigma, self.boundary)


class Units:
    """The k-th of several sources of noise is 1 in the k-th image of a batch and 0 in the others: a linear
    sampler's images are then its weights, and the sum of their squares the variance over independent
    sources."""

    def __init__(self, count):
        self.count, self.drawn = count, 0

    def randn_like(self, x=None):
        noise = torch.zeros(self.count, 1, 2, 2, dtype=torch.float64)
        noise[self.drawn] = 1
        self.drawn += 1
        return noise


@pytest.mark.parametrize(
    'steps, golden',
    [
        (dict(), 'openai.onestep'),
        (dict(ts=[0, 22, 39]), 'openai.multistep_0_22_39'),
        (dict(ts=[0, 22, 39], timesteps=40, steps=2), 'openai.multistep_0_22_39'),
        (dict(mid_t=1.3823679566485092), 'openai.multistep_0_22_39'),
    ],
)
def test_consistency_samples_equal_openais(fixtures, family, steps, golden):
    """From the given noises, to 1e-4 of the images' standard deviation. 22 of 40 levels is 1.382; the
    network's boundary is 0.002."""
    net, expected = load_openai(fixtures / 'openai-cm-cond.pt'), torch.from_numpy(family[golden])
    noises, labels = (
        torch.from_numpy(family['openai.noises']),
        torch.eye(10)[torch.from_numpy(family['openai.labels'])],
    )
    between = iter(noises[1:])
    with torch.no_grad():
        images = samplers.sample(net, noises[0], labels, 'cm', randn_like=lambda x: next(between), **steps)
    assert (images - expected).abs().max() < 1e-4 * expected.std()
    assert len(list(between)) == (
        2 if golden == 'openai.onestep' else 1
    )  # noise is drawn between evaluations only


@pytest.mark.parametrize('boundary', [0.0, 0.3])
@pytest.mark.parametrize('taus', [[], [2.0], [5.0, 1.0, 0.4]])
def test_consistency_sampling_has_the_variance_of_its_closed_form(boundary, taus):
    """With b the boundary, s² the data's variance: v = σ² (s²+b²)/(s²+σ²) after sigma_max (no data is in pure
    noise, so less than s²+b²); a further level sees v + τ² − b² and multiplies it by (s²+b²)/(s²+τ²)."""
    gaussian = Gaussian(torch.tensor([0.05, 0.25, 1.0, 4.0]).reshape(1, 1, 2, 2))
    net, units = ExactConsistency(gaussian, boundary), Units(1 + len(taus))
    weights = samplers.sample(
        net,
        units.randn_like(),
        None,
        'cm',
        taus=taus,
        sigma_max=20.0,
        clip_denoised=False,
        randn_like=units.randn_like,
    )
    expected = 20.0**2 * (gaussian.variance + boundary**2) / (gaussian.variance + 20.0**2)
    for tau in taus:
        expected = (
            (expected + tau**2 - boundary**2)
            * (gaussian.variance + boundary**2)
            / (gaussian.variance + tau**2)
        )
    torch.testing.assert_close(weights.square().sum(dim=0, keepdim=True), expected, rtol=1e-12, atol=0)
    assert net.asked == [20.0, *taus]


def test_data_with_noise_that_a_consistency_model_takes_off_keep_their_variance():
    """Data's first source of noise has their standard deviation; from sigma = 3 and again from 1 and 0.5 the
    variance is s² + b² exactly."""
    gaussian = Gaussian(torch.tensor([0.05, 0.25, 1.0, 4.0]).reshape(1, 1, 2, 2))
    net, units = ExactConsistency(gaussian, boundary=0.1), Units(4)
    data = units.randn_like() * gaussian.variance.sqrt()
    options = dict(taus=[1.0, 0.5], start=(data, 3.0), clip_denoised=False, randn_like=units.randn_like)
    weights = samplers.sample(net, units.randn_like(), None, 'cm', **options)
    torch.testing.assert_close(
        weights.square().sum(dim=0, keepdim=True), gaussian.variance + 0.01, rtol=1e-12, atol=0
    )


def test_every_output_of_a_consistency_model_is_clamped_but_latents_are_not(latents):
    """Without noise between, the second evaluation is asked at the clamped first output."""
    asked, three = [], lambda x, sigma, labels: asked.append(x) or torch.full_like(x, 3.0)
    run = lambda net, **options: samplers.sample(
        net, latents, None, 'cm', taus=[1.0], randn_like=torch.zeros_like, **options
    )
    assert bool((run(three) == 1).all()) and bool((asked[1] == 1).all())
    assert bool((run(three, clip_denoised=False) == 3).all()) and bool((asked[3] == 3).all())
    net = ExactConsistency(Gaussian(100.0), encoder=dict(class_name='StabilityVAEEncoder'))
    assert run(net).abs().max() > 5 and run(net, clip_denoised=True).abs().max() <= 1


@pytest.mark.parametrize(
    'recorded, given, clamped',
    [(None, None, True), (False, None, False), (True, None, True), (False, True, True), (True, False, False)],
)
def test_a_network_records_whether_it_is_clamped_and_an_option_overrides_it(
    latents, recorded, given, clamped
):
    net = ExactConsistency(Gaussian(100.0), **({} if recorded is None else dict(clip_denoised=recorded)))
    largest = (
        samplers.sample(net, latents, None, 'cm', **({} if given is None else dict(clip_denoised=given)))
        .abs()
        .max()
    )
    assert (largest <= 1) == clamped and (largest > 5) != clamped


def test_a_recorded_clamp_holds_for_latents_too(latents):
    net = ExactConsistency(
        Gaussian(100.0), encoder=dict(class_name='StabilityVAEEncoder'), clip_denoised=True
    )
    assert samplers.sample(net, latents, None, 'cm').abs().max() <= 1


@pytest.mark.parametrize(
    'options, metadata, expected',
    [
        (dict(), dict(), [80]),
        (dict(sigma_max=20), dict(), [20]),
        (dict(steps=3), dict(), ops.karras_sigmas(4, 0.002, 80, 7)[:3].tolist()),
        (
            dict(steps=3, sigma_min=0.1, sigma_max=10, rho=3),
            dict(),
            ops.karras_sigmas(4, 0.1, 10, 3)[:3].tolist(),
        ),
        (dict(), dict(sigmas=[50.0, 0.8, 0.0], sigma_max=50.0), [50, 0.8]),
        (dict(steps=2), dict(sigmas=[50.0, 0.8, 0.0], sigma_max=50.0), [50, 0.8]),
        (dict(steps=1), dict(sigmas=[50.0, 0.8, 0.0], sigma_max=50.0), [50]),
        (
            dict(sigma_max=30),
            dict(sigmas=[50.0, 0.8, 0.0], sigma_max=50.0, rho=4),
            ops.karras_sigmas(3, 0.002, 30, 4)[:2].tolist(),
        ),
        (dict(taus=[3, 1]), dict(), [80, 3, 1]),
        (dict(mid_t=0.821), dict(sigmas=[80.0, 5.0, 1.0, 0.0]), [80, 0.821]),
        (dict(ts=[0, 22, 39]), dict(), [80, ops.karras_sigmas(40, 0.002, 80, 7)[22].item()]),
        (
            dict(ts=[0, 106, 200]),
            dict(num_timesteps=201),
            [80, ops.karras_sigmas(201, 0.002, 80, 7)[106].item()],
        ),
        (
            dict(ts=[0, 2, 10], timesteps=11),
            dict(num_timesteps=201),
            [80, ops.karras_sigmas(11, 0.002, 80, 7)[2].item()],
        ),
        (dict(ts=[0, 39]), dict(), [80]),
        (dict(start=(0, 5.0)), dict(sigmas=[50.0, 0.0]), [5]),
        (dict(start=(0, 5.0), steps=2), dict(), ops.karras_sigmas(3, 0.002, 5, 7)[:2].tolist()),
        (dict(start=(0, 5.0), mid_t=1), dict(), [5, 1]),
    ],
)
def test_where_a_consistency_model_is_evaluated(gaussian, latents, options, metadata, expected):
    """And `resolve` counts it, also where the number that it gave comes back to it."""
    net = ExactConsistency(gaussian, solver='cm', **metadata)
    solver, steps = samplers.resolve(net, None, **{'steps': None, **options})
    assert (solver, steps) == ('cm', len(expected)) and samplers.resolve(
        net, solver, **{**options, 'steps': steps}
    ) == (solver, steps)
    if 'start' in options:
        options = dict(options, start=(torch.zeros(1, 1, 2, 2), options['start'][1]))
    samplers.sample(net, latents, **options)
    assert net.asked == pytest.approx(expected, rel=1e-12) and len(net.asked) == samplers.evaluations(
        solver, steps
    )


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(taus=[1.0, 2.0]), 'must fall'),
        (dict(taus=[1.0, 1.0]), 'must fall'),
        (dict(taus=[90.0]), 'must fall'),
        (dict(taus=[0.1]), 'stay above 0.1'),
        (dict(mid_t=math.nan), 'must fall'),
        (dict(mid_t=1.0, ts=[0, 39]), 'mid_t and ts'),
        (dict(taus=[1.0], timesteps=40), 'taus and timesteps'),
        (dict(timesteps=40), 'timesteps'),
        (dict(ts=[0, 22, 38]), 'to 39, the end of 40'),
        (dict(ts=[1, 22, 39]), 'rise from 0'),
        (dict(ts=[0, 30, 22, 39]), 'rise'),
        (dict(ts=[0]), 'rise'),
        (dict(ts=[]), 'rise'),
        (dict(ts=[0, 22, 39], timesteps=23), 'to 22, the end of 23'),
        (dict(steps=3, mid_t=1.0), 'mid_t makes 2 evaluations, not 3'),
        (dict(start=(0, 90.0)), 'cannot start at sigma = 90.*up to 80'),
        (dict(start=(0, 0.0)), 'above 0'),
        (dict(sigma_max=0.001), 'no noise levels'),
    ],
)
def test_noise_levels_that_a_consistency_model_cannot_take_are_refused(gaussian, latents, options, message):
    with pytest.raises(UserError, match=message):
        samplers.sample(ExactConsistency(gaussian, boundary=0.1), latents, None, 'cm', **options)


def test_a_snapshot_says_how_it_is_sampled(gaussian):
    """`solver` before `sigmas`: a consistency model may take any number of steps, a student its own."""
    what = lambda steps=None, **metadata: samplers.resolve(SimpleNamespace(metadata=metadata), None, steps)
    assert what() == what(objective='diffusion') == ('heun', 18)
    assert what(sigmas=[80.0, 0.0]) == ('student', 1)
    assert what(sigmas=[80.0, 0.0], solver='cm') == ('cm', 1) and what(
        4, sigmas=[80.0, 0.0], solver='cm'
    ) == ('cm', 4)
    assert what(solver='addim') == ('addim', 18)
    with pytest.raises(UserError, match='not one of'):
        what(solver='unknown')


def test_an_image_depends_on_its_seed_alone(gaussian):
    """Also where noise is added between evaluations: seeds 3, 4, 5 together and seed 4 by itself."""

    def images(seeds):
        noise = SeededNoise(seeds, 'cpu')
        return samplers.sample(
            ExactConsistency(gaussian),
            noise.randn([1, 2, 2]),
            None,
            'cm',
            taus=[2.0, 0.5],
            randn_like=noise.randn_like,
        )

    assert torch.equal(images([3, 4, 5])[1:2], images([4])) and not torch.equal(images([4]), images([5]))


# ----------------------------------------------------------------------------
# Editing.


def known_left_half(image):
    """An edit that puts the left column of pixels in place."""
    mask = torch.tensor([1.0, 0.0]).expand(1, 1, 2, 2)
    return lambda denoised: mask * image + (1 - mask) * denoised


def test_an_edit_is_made_after_every_evaluation_of_a_consistency_model(gaussian, latents):
    """Known pixels are in the result exactly, and, with no noise between, in what the second evaluation is
    asked at."""
    image, asked = torch.full([1, 1, 2, 2], 0.7, dtype=torch.float64), []
    net = lambda x, sigma, labels: asked.append(x) or gaussian(x, sigma)
    result = samplers.sample(
        net, latents, None, 'cm', taus=[1.0], edit=known_left_half(image), randn_like=torch.zeros_like
    )
    plain = samplers.sample(net, latents, None, 'cm', taus=[1.0], randn_like=torch.zeros_like)
    for x, other in ((asked[1], asked[3]), (result, plain)):
        assert bool((x[..., 0] == 0.7).all()) and torch.equal(x[..., 1], other[..., 1])


def test_an_edit_comes_after_the_clamp(latents):
    """So that a known part is kept exactly, whatever its values."""
    result = samplers.sample(
        lambda x, sigma, labels: x, latents, None, 'cm', edit=known_left_half(torch.full([1, 1, 2, 2], 1.5))
    )
    assert bool((result[..., 0] == 1.5).all()) and result[..., 1].abs().max() <= 1


def test_an_edited_student_steps_from_the_edited_output(gaussian, latents):
    """x <- D' + r (x − D'), D' with its left pixels known: they are exact in the end, and between on the line
    from there to the noise."""
    student, image = (
        ExactStudent(gaussian, ops.student_grid(3, 0.002, 80, 7, 'full')),
        torch.full([1, 1, 2, 2], 0.7, dtype=torch.float64),
    )
    states, forward = [], student.forward
    student.forward = lambda x, sigma, labels=None: states.append(x) or forward(x, sigma)
    result = samplers.sample(student, latents, edit=known_left_half(image))
    ratio = student.asked[1] / student.asked[0]
    torch.testing.assert_close(states[1][..., 0], 0.7 + ratio * (states[0][..., 0] - 0.7), rtol=1e-12, atol=0)
    assert bool((result[..., 0] == 0.7).all()) and len(states) == 3


@pytest.mark.parametrize('sigma', [80.0, 5.0, 0.5])
def test_a_perfect_student_denoises_from_any_noise_level(gaussian, latents, sigma):
    """Through the rest of the segment that sigma is in, then down the grid."""
    grid = ops.student_grid(4, 0.002, 80, 7, 'full')
    student, image = ExactStudent(gaussian, grid), torch.tensor([[0.1, -0.3], [0.5, 0.9]])
    images = samplers.sample(student, latents, start=(image, sigma))
    torch.testing.assert_close(
        images, gaussian.solve(image.double() + sigma * latents.double(), sigma, 0), rtol=1e-9, atol=1e-9
    )
    assert student.asked == [sigma, *(level for level in grid.tolist() if 0 < level < sigma)]
    with pytest.raises(UserError, match='cannot start at sigma = 81'):
        samplers.sample(student, latents, start=(image, 81.0))


# ----------------------------------------------------------------------------
# aDDIM.


@pytest.mark.parametrize('discretization', DISCRETIZATIONS)
def test_addim_without_variance_is_ddim(gaussian, latents, discretization):
    """Which is Euler's method on the linear schedule."""
    options = dict(steps=9, discretization=discretization)
    addim = samplers.sample(gaussian, latents, None, 'addim', xvar_scale=0, **options)
    torch.testing.assert_close(
        addim, samplers.sample(gaussian, latents, None, 'euler', **options), rtol=1e-12, atol=1e-12
    )
    assert (samplers.sample(gaussian, latents, None, 'addim', **options) - addim).abs().max() > 1e-3


def test_cosine_levels_are_evenly_spaced_in_the_angle(gaussian, latents):
    """atan sigma is the time of the variance-preserving cosine schedule, up to a factor.

    A student with another number of steps keeps its spacing.
    """
    asked = []
    samplers.sample(
        lambda x, sigma, labels: asked.append(float(sigma)) or gaussian(x, sigma),
        latents,
        None,
        'addim',
        5,
        discretization='cosine',
    )
    angles = [math.atan(sigma) for sigma in asked]
    assert angles == pytest.approx(
        [angles[0] + i / 4 * (angles[4] - angles[0]) for i in range(5)], rel=1e-12
    ) and asked[::4] == [80, 0.002]
    student = ExactStudent(gaussian, ops.student_grid(2, 0.002, 80, 7, 'edm', 'cosine'))
    student.metadata.update(student_grid='edm', sigma_grid='cosine')
    samplers.sample(student, latents, steps=5, force_steps=True)
    assert student.asked == asked


@pytest.mark.parametrize('options, share', [(dict(), 0.1), (dict(xvar_scale=3), 0.3)])
def test_addim_inflates_the_noise_of_each_image_by_the_formula(gaussian, latents, options, share):
    """d = 4 values an image; the last of the three steps is plain."""
    x, sigmas = latents.double() * 20, ops.karras_sigmas(3, 0.5, 20, 7).tolist()
    for sigma_t, sigma_s in itertools.pairwise(sigmas):
        denoised = gaussian(x, sigma_t)
        noise, variance = (x - denoised) / sigma_t, share * 4 / (2 + 1 / sigma_t**2)
        square = noise.square().sum(dim=(1, 2, 3), keepdim=True)
        x = denoised + (sigma_s**2 + (1 - sigma_s / sigma_t) ** 2 * variance / square).sqrt() * noise
    images = samplers.sample(gaussian, latents, None, 'addim', 3, sigma_min=0.5, sigma_max=20.0, **options)
    torch.testing.assert_close(images, gaussian(x, 0.5), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('steps', [8, 32])
def test_addim_makes_up_for_variance_that_ddim_loses(steps):
    """On data of the variance 1/2 that the formula assumes, of which DDIM's images have 46 % after 8 steps
    and 81 % after 32."""
    latents, gaussian = torch.randn(400, 1, 16, 16, generator=torch.Generator().manual_seed(0)), Gaussian(0.5)
    ddim, addim = (
        samplers.sample(gaussian, latents, None, 'addim', steps, xvar_scale=scale).var().item() / 0.5
        for scale in (0, 1)
    )
    assert ddim < 0.9 and abs(addim - 1) < 0.6 * abs(ddim - 1)


@pytest.mark.parametrize('solver', ['euler', 'heun', 'addim'])
def test_teachers_are_asked_at_noise_levels_that_they_know(gaussian, latents, solver):
    """Here whole ones: 80, 3 and 1 in the place of 80, 2.5 and 0.002."""
    asked = []
    net = lambda x, sigma, labels: asked.append(float(sigma)) or gaussian(x, sigma)
    net.round_sigma = lambda sigma: torch.as_tensor(sigma).ceil()
    samplers.sample(net, latents, None, solver, 3)
    assert sorted({*asked}, reverse=True) == [80, 3, 1]
