"""Grids, segments, edges, hops: against golden values, closed forms and for all settings."""

import itertools
import math

import pytest
import torch
from gaussian import Gaussian
from hypothesis import given, settings
from hypothesis import strategies as st

from training import consistency_ops as ops
from training import segment_solvers
from training.choices import SEGMENT_SOLVERS
from training.objectives import loss_pd
from training.solvers import ode_solve

SETTINGS = [(S, T) for S in (2, 4, 8, 16) for T in (64, 129, 256, 1280)]


@pytest.fixture
def gaussian():
    return Gaussian(torch.tensor([0.02, 0.25, 1.0, 4.0]).reshape(1, 1, 2, 2), mean=0.3)


def grids(S, T, kind='edm', rho=7.0):
    student = ops.student_grid(S, 0.002, 80, rho, kind)
    return student, ops.teacher_grid(student, T, 0.002, 80, rho)


# ----------------------------------------------------------------------------
# Grids and edges.


@pytest.mark.parametrize('S, T', SETTINGS)
def test_grids_and_segments_equal_the_published_ones(numerics, S, T):
    student, teacher = grids(S, T)
    torch.testing.assert_close(student, torch.from_numpy(numerics[f'student_S{S}']), rtol=1e-12, atol=0)
    torch.testing.assert_close(teacher, torch.from_numpy(numerics[f'teacher_S{S}_T{T}']), rtol=1e-12, atol=0)
    assert ops.segment_bounds(teacher, student).tolist() == numerics[f'bounds_S{S}_T{T}'].tolist()


@pytest.mark.parametrize('S, T', SETTINGS)
@pytest.mark.parametrize('mode', ['vp', 'edm'])
def test_edge_probabilities_equal_the_published_ones(numerics, S, T, mode):
    """The golden values are FP32 and have the anchor on the last edge only."""
    student, teacher = grids(S, T)
    got = ops.edge_probabilities(teacher, student, mode, 7, terminal_anchor=True)
    torch.testing.assert_close(
        got.float(), torch.from_numpy(numerics[f'prob_{mode}_S{S}_T{T}']), rtol=1e-5, atol=0
    )


@settings(max_examples=60, deadline=None)
@given(
    S=st.integers(1, 16),
    extra=st.integers(0, 200),
    kind=st.sampled_from(ops.STUDENT_GRIDS),
    rho=st.floats(1, 12),
    sigma_min=st.floats(1e-4, 0.1),
    sigma_max=st.floats(1, 500),
)
def test_every_edge_is_in_one_segment_and_no_segment_is_empty(S, extra, kind, rho, sigma_min, sigma_max):
    student = ops.student_grid(S, sigma_min, sigma_max, rho, kind)
    teacher = ops.teacher_grid(student, S + extra, sigma_min, sigma_max, rho)
    edges = ops.edge_table(teacher, student)
    ops.check_edges(edges)
    assert len(edges) >= S + extra
    assert edges.segment.unique().tolist() == list(range(S))
    inside = (student[edges.segment + 1] < edges.sigma_t) & (edges.sigma_t <= student[edges.segment])
    assert inside.all()
    assert ((edges.sigma_b < edges.sigma_s) == (edges.kind == ops.GENERAL)).all()
    assert ((edges.sigma_s == 0) == (edges.kind == ops.TERMINAL)).all()
    assert edges.sigma_s[-1] == 0 and teacher[0] == sigma_max and student[0] == sigma_max


@settings(max_examples=40, deadline=None)
@given(
    S=st.integers(1, 12),
    T=st.integers(12, 300),
    mode=st.sampled_from(ops.SAMPLING_MODES),
    anchor=st.booleans(),
    pin=st.booleans(),
)
def test_edge_probabilities_sum_to_one_and_the_pinned_edges_get_their_share(S, T, mode, anchor, pin):
    student, teacher = grids(S, T)
    p = ops.edge_probabilities(teacher, student, mode, 7, anchor, pin)
    assert p.min() >= 0 and math.isclose(p.sum(), 1, abs_tol=1e-12)
    if mode != 'uniform':
        assert not anchor or math.isclose(p[-1], 1 / len(p), rel_tol=1e-12)
        assert not pin or math.isclose(p[0], 1 / len(p), rel_tol=1e-12)


def test_uniform_sampling_gives_every_segment_the_same_share():
    student, teacher = grids(8, 64)
    p = ops.edge_probabilities(teacher, student, 'uniform', 7, terminal_anchor=True)
    shares = torch.zeros(8, dtype=torch.float64).index_add_(0, ops.segment_of(teacher[:-1], student), p)
    torch.testing.assert_close(shares, torch.full_like(shares, 1 / 8), rtol=1e-12, atol=0)


@pytest.mark.parametrize('S', [1, 2, 8])
def test_on_a_full_grid_with_T_equal_to_S_no_edge_is_general(S):
    student, teacher = grids(S, S, 'full')
    kinds = ops.edge_table(teacher, student).kind
    assert kinds.tolist() == [ops.SNAP] * (S - 1) + [ops.TERMINAL]


def test_annealing_is_log_linear_between_its_ends():
    """Half-way the number of edges is the geometric mean of its ends."""
    T = [ops.anneal_T(nimg, 64, 1280, 100) for nimg in (0, 50_000, 100_000, 10**9)]
    assert T == [64, 286, 1280, 1280]
    assert ops.anneal_T(0, 64, 1280, 0) == 1280


@pytest.mark.parametrize('sigma_min, sigma_max', [(0, 80), (1, 0.5), (0.002, math.inf)])
def test_a_range_without_order_is_refused(sigma_min, sigma_max):
    with pytest.raises(ValueError, match='does not hold'):
        ops.karras_sigmas(8, sigma_min, sigma_max, 7)


# ----------------------------------------------------------------------------
# Cosine grids, kept ties, tops, halves.


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 100), sigma_min=st.floats(1e-4, 0.1), sigma_max=st.floats(1, 500))
def test_cosine_levels_are_evenly_spaced_times_of_the_cosine_schedule(n, sigma_min, sigma_max):
    """alpha = cos(pi u / 2) and variance 1 − alpha²: sigma = tan(pi u / 2), so u = 2/pi atan sigma. Ends are exact."""
    nodes = ops.sigma_nodes(n, sigma_min, sigma_max, 7, 'cosine')
    assert nodes[0] == sigma_max and nodes[-1] == sigma_min
    steps = nodes.atan().mul(2 / math.pi).diff()
    torch.testing.assert_close(steps, steps.mean().expand(n - 1), rtol=0, atol=1e-14)


@pytest.mark.parametrize('kind', ops.STUDENT_GRIDS)
@pytest.mark.parametrize('S', [1, 2, 8])
def test_student_teacher_and_anchor_grids_come_in_either_spacing(kind, S):
    """`full` drops the node that `edm` follows by 0; a cosine teacher keeps a cosine student's numbers; a reference has the same nodes."""
    cosine = lambda n, low=0.002, high=80.0: torch.tensor(
        [
            math.tan(math.atan(high) + i / max(n - 1, 1) * (math.atan(low) - math.atan(high)))
            for i in range(n)
        ],
        dtype=torch.float64,
    )
    student = ops.student_grid(S, 0.002, 80, 7, kind, 'cosine')
    torch.testing.assert_close(student[:-1], cosine(S if kind == 'edm' else S + 1)[:S], rtol=1e-9, atol=0)
    assert student[-1] == 0
    torch.testing.assert_close(
        ops.teacher_grid(student[[0, -1]], 33, 0.002, 80, 7, 'cosine')[:-1], cosine(33), rtol=1e-9, atol=0
    )
    torch.testing.assert_close(
        ops.anchor_nodes(80, 1.5, 0.002, 7, 6, 'cosine'), cosine(7, low=1.5), rtol=1e-9, atol=0
    )
    torch.testing.assert_close(
        ops.anchor_nodes(80, 0.0, 0.002, 7, 6, 'cosine')[:-1], cosine(6), rtol=1e-9, atol=0
    )
    karras = ops.student_grid(S, 0.002, 80, 7, kind)
    assert torch.equal(karras, ops.student_grid(S, 0.002, 80, 7, kind, 'karras'))
    with pytest.raises(ValueError, match='is not one of karras, cosine'):
        ops.student_grid(S, 0.002, 80, 7, kind, 'linear')


@pytest.mark.parametrize('spacing', ops.SIGMA_GRIDS)
@pytest.mark.parametrize('mode', ['vp', 'edm'])
def test_edge_probabilities_are_the_mass_of_the_density_around_each_node(spacing, mode):
    """`edm` draws ln sigma ~ N(−1.2, 1.2²) and `vp` sigma = tan(pi u / 2), u uniform, whatever the grid: on a fine one an edge's probability is the
    distribution function's increase from half a node below to half a node above, to second order in the spacing."""
    student = ops.student_grid(1, 0.002, 80, 7)
    halves = ops.sigma_nodes(2 * 4000 + 1, 0.002, 80, 7, spacing)
    teacher = torch.cat([halves[1::2], torch.zeros(1, dtype=torch.float64)])
    cdf = {'edm': lambda s: torch.special.ndtr((s.log() + 1.2) / 1.2), 'vp': torch.atan}[mode](halves[::2])
    expected = (cdf[:-1] - cdf[1:]) / (cdf[0] - cdf[-1])
    got = ops.edge_probabilities(teacher, student, mode, 7, terminal_anchor=False, spacing=spacing)
    likely = expected > 1e-3 * expected.max()
    torch.testing.assert_close(
        got[likely], expected[likely], rtol=5e-3 if (spacing, mode) == ('cosine', 'edm') else 2e-5, atol=0
    )


@settings(max_examples=80, deadline=None)
@given(
    S=st.integers(1, 16),
    extra=st.integers(0, 200),
    kind=st.sampled_from(ops.STUDENT_GRIDS),
    spacing=st.sampled_from(ops.SIGMA_GRIDS),
    rho=st.floats(1, 12),
    sigma_min=st.floats(1e-4, 0.1),
    sigma_max=st.floats(1, 500),
)
def test_with_kept_ties_every_student_level_starts_an_edge_of_the_segment_below_it(
    S, extra, kind, spacing, rho, sigma_min, sigma_max
):
    """Whatever T, the very numbers, and nothing else changes: equally spaced nodes, no more than S edges beyond T."""
    student = ops.student_grid(S, sigma_min, sigma_max, rho, kind, spacing)
    teacher = ops.teacher_grid(student, S + extra, sigma_min, sigma_max, rho, spacing, keep_ties=True)
    edges = ops.edge_table(teacher, student)
    ops.check_edges(edges)
    assert S + extra <= len(edges) <= 2 * S + extra
    torch.testing.assert_close(
        teacher[:-1], ops.sigma_nodes(len(edges), sigma_min, sigma_max, rho, spacing), rtol=1e-5, atol=0
    )
    tops = ops.segment_bounds(teacher, student)[:, 0]
    assert torch.equal(edges.sigma_t[tops], student[:-1])
    assert torch.equal(edges.sigma_b[tops], student[1:])
    above = tops[1:] - 1
    assert torch.equal(edges.sigma_s[above], student[1:-1]) and (edges.kind[above] == ops.SNAP).all()


def test_ties_are_kept_as_the_students_own_numbers_where_these_are_rounded():
    """A grid that was stored in FP32 is within the tolerance of the nodes, and is what sampling asks for."""
    student = ops.student_grid(8, 0.002, 80, 7).float().double()
    teacher = ops.teacher_grid(student, 100, 0.002, 80, 7, keep_ties=True)
    assert torch.isin(student, teacher).all()
    assert len(ops.edge_table(teacher, student)) == 106, (
        '7 intervals of the student nest in 105 of the teacher, not in 99'
    )


def test_levels_that_are_no_nodes_cannot_be_kept():
    student = torch.tensor([80.0, 3.3, 0.7, 0.0], dtype=torch.float64)
    with pytest.raises(ValueError, match='no teacher grid'):
        ops.teacher_grid(student, 32, 0.002, 80, 7, keep_ties=True)


@settings(max_examples=80, deadline=None)
@given(
    S=st.integers(1, 12),
    extra=st.integers(0, 200),
    kind=st.sampled_from(ops.STUDENT_GRIDS),
    mode=st.sampled_from(ops.SAMPLING_MODES),
    anchor=st.booleans(),
    pin=st.booleans(),
    p=st.floats(0.01, 1),
    keep_ties=st.booleans(),
)
def test_top_mass_is_shared_by_the_tops_and_leaves_the_rest_in_proportion(
    S, extra, kind, mode, anchor, pin, p, keep_ties
):
    student = ops.student_grid(S, 0.002, 80, 7, kind)
    teacher = ops.teacher_grid(student, S + extra, 0.002, 80, 7, keep_ties=keep_ties)
    tops = ops.segment_bounds(teacher, student)[:, 0]
    got = ops.edge_probabilities(teacher, student, mode, 7, anchor, pin, top_mass=p)
    assert got.min() >= 0 and math.isclose(got.sum(), 1, abs_tol=1e-12)
    edges = len(got)
    rest = torch.ones(edges, dtype=torch.bool)
    rest[tops] = False
    if anchor and mode != 'uniform' and rest[-1]:
        rest[-1] = False
        if rest.any():
            assert math.isclose(got[-1], min(1 / edges, 1 - p), rel_tol=1e-12, abs_tol=1e-15)
    if not rest.any():
        return
    torch.testing.assert_close(got[tops], torch.full([S], p / S, dtype=torch.float64), rtol=1e-12, atol=0)
    plain = ops.edge_probabilities(teacher, student, mode, 7, terminal_anchor=False)
    torch.testing.assert_close(
        got[rest], plain[rest] / plain[rest].sum() * got[rest].sum(), rtol=1e-9, atol=1e-15
    )


def test_where_there_are_only_tops_they_share_everything():
    student, teacher = grids(4, 4, 'full')
    got = ops.edge_probabilities(teacher, student, 'edm', 7, terminal_anchor=True, pin_top=True, top_mass=0.5)
    torch.testing.assert_close(got, torch.full([4], 0.25, dtype=torch.float64))


@pytest.mark.parametrize('p', [-0.1, 1.1, math.nan])
def test_a_top_mass_that_is_no_share_is_refused(p):
    student, teacher = grids(4, 16)
    with pytest.raises(ValueError, match=r'top_mass must be in \[0, 1\]'):
        ops.edge_probabilities(teacher, student, 'edm', 7, True, top_mass=p)


@settings(max_examples=40, deadline=None)
@given(S=st.integers(1, 64), spacing=st.sampled_from(ops.SIGMA_GRIDS), rho=st.floats(1, 12))
def test_halving_joins_two_steps_of_the_finer_grid_into_one_of_the_coarser(S, spacing, rho):
    """The two grids nest, to rounding; the ends are, bit for bit, those that the student is sampled at."""
    edges = loss_pd.halving_edges(S, 0.002, 80, rho, spacing)
    ops.check_edges(edges)
    coarse = ops.student_grid(S, 0.002, 80, rho, 'full', spacing)
    fine = ops.student_grid(2 * S, 0.002, 80, rho, 'full', spacing)
    assert torch.equal(torch.stack([edges.sigma_t, edges.sigma_b]), torch.stack([coarse[:-1], coarse[1:]]))
    torch.testing.assert_close(
        torch.stack([edges.sigma_t, edges.sigma_s], dim=1).flatten(), fine[:-1], rtol=1e-12, atol=0
    )
    assert edges.segment.tolist() == list(range(S)) and (edges.kind == ops.GENERAL).all()


# ----------------------------------------------------------------------------
# Moves.


def test_a_ddim_step_carries_the_inverted_image_to_the_boundary():
    generator = torch.Generator().manual_seed(0)
    x_t, x_b = torch.randn(2, 50, 1, 4, 4, generator=generator, dtype=torch.float64).mul(30).unbind(0)
    sigma_b = torch.linspace(0, 20, 50, dtype=torch.float64)
    sigma_t = sigma_b * 1.05 + 0.01
    x_star = ops.inv_ddim(x_b, x_t, sigma_t, sigma_b)
    torch.testing.assert_close(ops.ddim_step(x_t, x_star, sigma_t, sigma_b), x_b, rtol=1e-10, atol=1e-10)


def test_inverting_a_step_of_no_width_raises():
    x = torch.zeros(2, 1, 2, 2)
    with pytest.raises(ValueError, match='sigma_t > sigma_b'):
        ops.inv_ddim(x, x, torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0]))


def hop_errors(hop, gaussian):
    x = torch.linspace(-3, 3, 4, dtype=torch.float64).reshape(1, 1, 2, 2)
    return [(hop(x, 2.0, 2.0 - h) - gaussian.solve(x, 2.0, 2.0 - h)).abs().max() for h in (0.1, 0.05, 0.025)]


def test_heun_hop_is_second_order(gaussian):
    """Halving the hop divides the error by about 2**3 (local error of a second-order method)."""
    errors = hop_errors(lambda x, t, s: ops.heun_hop(gaussian, x, t, s), gaussian)
    ratios = [a / b for a, b in itertools.pairwise(errors)]
    assert all(6.5 < r < 9.5 for r in ratios), ratios


def test_ddim_step_is_first_order(gaussian):
    """Halving the step divides the local error by about 2**2."""
    errors = hop_errors(
        lambda x, t, s: ops.ddim_step(x, gaussian(x, t), torch.tensor(t), torch.tensor(s)), gaussian
    )
    ratios = [a / b for a, b in itertools.pairwise(errors)]
    assert all(3.4 < r < 4.6 for r in ratios), ratios


@pytest.mark.parametrize(
    'sigma_b, tolerance',
    [(40.0, 3e-4), (10.0, 3e-4), (9.9, 3e-4), (1.5, 5e-3), (0.5, 5e-3), (0.05, 2e-2), (0.0, 2e-2)],
)
def test_the_anchor_solution_is_as_exact_as_promised(sigma_b, tolerance):
    """Relative to the exact solution, for data of standard deviation 0.5 (EDM's sigma_data)."""
    gaussian = Gaussian(0.25)
    x = torch.full([1, 1, 1, 1], 80.0, dtype=torch.float64)
    got = ops.solve_ode(gaussian, x, ops.anchor_nodes(80.0, sigma_b, 0.002, 7).tolist())
    assert abs(got / gaussian.solve(x, 80, sigma_b) - 1) < tolerance


def test_hops_equal_the_golden_ones(fixtures, family):
    """`hop.*` of family.npz: a Heun hop of the edm-adm-cond network, a boundary push and its inverse."""
    from training.checkpoint import load_network

    net = load_network(fixtures / 'edm-adm-cond.pkl')
    get = lambda name: torch.from_numpy(family[f'hop.{name}'])
    labels = get('class_labels')
    x_s = ops.heun_hop(lambda x, sigma: net(x, sigma, labels), get('x_t'), get('sigma_t'), get('sigma_s'))
    torch.testing.assert_close(x_s, get('x_s'), rtol=0, atol=1e-4 * get('x_s').std().item())
    x_b = ops.ddim_step(get('x_s'), get('denoised'), get('sigma_s'), get('sigma_b'))
    torch.testing.assert_close(x_b, get('x_b'), rtol=1e-6, atol=1e-6)
    x_star = ops.inv_ddim(get('x_b'), get('x_t'), get('sigma_t'), get('sigma_b'))
    torch.testing.assert_close(x_star, get('x_star'), rtol=1e-6, atol=1e-6)


def images_and_noise(N=6):
    generator = torch.Generator().manual_seed(3)
    x, denoised, y = torch.randn(3, N, 2, 4, 4, generator=generator, dtype=torch.float64).unbind(0)
    sigma_t = torch.logspace(-2, 1.9, N, dtype=torch.float64)
    return x * (1 + sigma_t.reshape(-1, 1, 1, 1)), denoised, y, sigma_t


def test_adjusted_ddim_is_the_papers_step_in_its_own_variables():
    """Algorithm 3 of Heek et al. in variance-preserving variables: z = alpha x, with standard deviation sigma' = alpha sigma of the noise and
    alpha² + sigma'² = 1; the noise of z_s is lengthened to sqrt(sigma'_s² + (alpha_s − alpha_t sigma'_s / sigma'_t)² v / |e|²)."""
    x_t, denoised, y, sigma_t = images_and_noise()
    sigma_s = sigma_t * 0.6
    wide = lambda s: s.reshape(-1, 1, 1, 1)
    alpha_t, alpha_s = ((1 + wide(s) ** 2).rsqrt() for s in (sigma_t, sigma_s))
    std_t, std_s = wide(sigma_t) * alpha_t, wide(sigma_s) * alpha_s
    noise = (alpha_t * x_t - alpha_t * denoised) / std_t
    v = 0.75 * (y - denoised).square().sum(dim=(1, 2, 3), keepdim=True)
    length = (
        std_s**2
        + (alpha_s - alpha_t * std_s / std_t) ** 2 * v / noise.square().sum(dim=(1, 2, 3), keepdim=True)
    ).sqrt()
    expected = (alpha_s * denoised + length * noise) / alpha_s
    got = ops.addim_hop(x_t, denoised, sigma_t, sigma_s, ops.addim_variance(denoised, sigma_t, y))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_adjusted_ddim_is_ddim_without_variance_and_at_the_end():
    """v = 0; and to sigma_s = 0, where the formula as it stands would add noise of length √v. Where there is no noise it stays where it is."""
    x_t, denoised, _, sigma_t = images_and_noise()
    v = torch.full_like(sigma_t, 3.0)
    sigma_s = sigma_t * torch.tensor([0.9, 0.5, 0.1, 0.9, 0.5, 0.1])
    ddim, adjusted = (
        ops.ddim_step(x_t, denoised, sigma_t, sigma_s),
        ops.addim_hop(x_t, denoised, sigma_t, sigma_s, v),
    )
    torch.testing.assert_close(
        ops.addim_hop(x_t, denoised, sigma_t, sigma_s, 0 * v), ddim, rtol=1e-12, atol=1e-12
    )
    assert not torch.allclose(adjusted, ddim, rtol=1e-3)
    mixed = ops.addim_hop(x_t, denoised, sigma_t, torch.where(torch.arange(6) % 2 == 0, 0, sigma_s), v)
    assert torch.equal(mixed[::2], denoised[::2]) and torch.equal(mixed[1::2], adjusted[1::2])
    assert torch.equal(ops.addim_hop(denoised, denoised, sigma_t, sigma_s, v), denoised)


def test_the_analytic_variance_is_a_tenth_of_a_gaussian_posterior(gaussian):
    """Values N(0, 1/2) under noise sigma have the posterior variance (1/2) sigma² / (1/2 + sigma²) each; an image has 32 of them here. With data it
    is a share of the squared error over all of an image's values."""
    _, denoised, y, sigma_t = images_and_noise()
    posterior = Gaussian(0.5).shrink(sigma_t).flatten() * sigma_t**2
    torch.testing.assert_close(
        ops.addim_variance(denoised, sigma_t), 0.1 * 32 * posterior, rtol=1e-12, atol=0
    )
    square = torch.tensor([float(((a - b) ** 2).sum()) for a, b in zip(y, denoised)], dtype=torch.float64)
    torch.testing.assert_close(ops.addim_variance(denoised, sigma_t, y), 0.75 * square, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        ops.addim_variance(denoised, sigma_t, y, xvar_frac=0.2), 0.2 * square, rtol=1e-12, atol=0
    )


def test_adjusted_ddim_is_first_order(gaussian):
    """Its correction vanishes with the square of the step: halving the step divides the local error by about 2**2."""

    def hop(x, t, s):
        denoised = gaussian(x, t)
        return ops.addim_hop(x, denoised, t, s, ops.addim_variance(denoised, t))

    ratios = [a / b for a, b in itertools.pairwise(hop_errors(hop, gaussian))]
    assert all(3.4 < r < 4.6 for r in ratios), ratios


BETWEEN_T = torch.tensor([80.0, 80.0, 7.0, 0.5, 0.3, 0.002, 0.001], dtype=torch.float64)
BETWEEN_B = torch.tensor(
    [1.5, 0.0, 0.02, 0.0, 0.29, 0.0, 0.0], dtype=torch.float64
)  # the last starts below sigma_min


@pytest.mark.parametrize('spacing', ops.SIGMA_GRIDS)
@pytest.mark.parametrize('substeps', [1, 2, 5])
def test_a_solution_between_levels_of_their_own_is_every_samples_own_solution(gaussian, spacing, substeps):
    """One batch, of which some samples end at 0, against one call of the many-step solver for each sample. No network is asked at noise level 0,
    where EDM's c_noise is −inf."""
    x, asked = (
        torch.randn(7, 1, 2, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        * BETWEEN_T.reshape(-1, 1, 1, 1),
        [],
    )
    watched = lambda x, sigma: asked.append(sigma.min().item()) or gaussian(x, sigma)
    got = segment_solvers.solve_between(watched, x, BETWEEN_T, BETWEEN_B, substeps, 7, 0.002, spacing)
    assert min(asked) > 0
    for i, (top, bottom) in enumerate(zip(BETWEEN_T.tolist(), BETWEEN_B.tolist())):
        nodes = ops.anchor_nodes(top, bottom, min(0.002, top), 7, substeps, spacing)
        torch.testing.assert_close(
            segment_solvers.nodes_between(BETWEEN_T, BETWEEN_B, substeps, 7, 0.002, spacing)[:, i],
            nodes,
            rtol=1e-12,
            atol=0,
        )
        torch.testing.assert_close(
            got[i : i + 1], ops.solve_ode(gaussian, x[i : i + 1], nodes.tolist()), rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize('substeps', [1, 2, 3, 6])
@pytest.mark.parametrize('solver, order', [('ipndm', 4), ('dpmpp', 2)])
def test_multistep_solutions_between_levels_are_those_of_the_sampler(gaussian, solver, order, substeps):
    """Each sample against the solver of sampling over its own nodes, with a step to 0 where it ends there.

    The order of `dpmpp` is not lowered at the end of a segment: the solver's solution over nodes that go one
    step further has the same states up to there.
    """
    x = torch.randn(7, 1, 2, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x, calls = x * BETWEEN_T.reshape(-1, 1, 1, 1), []
    counted = lambda x, sigma: calls.append(sigma) or gaussian(x, sigma)
    got = segment_solvers.solve_between(counted, x, BETWEEN_T, BETWEEN_B, substeps, 7, 0.002, solver=solver)
    assert len(calls) == substeps and min(sigma.min() for sigma in calls) > 0

    for i, (top, bottom) in enumerate(zip(BETWEEN_T.tolist(), BETWEEN_B.tolist())):
        nodes = ops.anchor_nodes(top, bottom, min(0.002, top), 7, substeps, 'karras').tolist()
        levels = [
            sigma
            for sigma, lower in itertools.pairwise([*nodes, None])
            if sigma and sigma - (lower or 0) > 1e-9 * sigma
        ]
        state, outputs = x[i : i + 1], {}
        watched = lambda x, sigma, outputs=outputs: outputs.setdefault(float(sigma), (x, gaussian(x, sigma)))[
            1
        ]
        ode_solve(watched, state, [*levels, levels[-1] / 2, levels[-1] / 4], solver, order)
        state, denoised = outputs[levels[-1]]
        torch.testing.assert_close(got[i : i + 1], state if bottom else denoised, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('solver, ratio', [('ipndm', 4), ('dpmpp', 4)])
def test_multistep_solutions_between_levels_are_second_order_and_better(gaussian, solver, ratio):
    """iPNDM's weights are those of equal steps, and a first step of order 1 costs the others their order: each
    is of second order, as Heun's solution is."""
    x = torch.linspace(-3, 3, 4, dtype=torch.float64).reshape(1, 1, 2, 2)
    sigma_t, sigma_b = (torch.tensor([sigma], dtype=torch.float64) for sigma in (2.0, 0.3))
    exact = gaussian.solve(x, sigma_t, sigma_b)
    errors = [
        (segment_solvers.solve_between(gaussian, x, sigma_t, sigma_b, n, 7, 0.002, solver=solver) - exact)
        .abs()
        .max()
        for n in (32, 64, 128)
    ]
    ratios = [a / b for a, b in itertools.pairwise(errors)]
    assert all(0.9 * ratio < r < 1.1 * ratio for r in ratios), ratios


def test_a_segment_is_solved_by_known_solvers_only(gaussian):
    with pytest.raises(ValueError, match="solver 'euler' is not one of heun, ipndm, dpmpp"):
        segment_solvers.solve_between(
            gaussian, torch.zeros(1, 1), torch.ones(1), torch.zeros(1), 1, 7, 0.002, solver='euler'
        )


def test_solutions_between_levels_begin_and_end_exactly_there():
    nodes = segment_solvers.nodes_between(BETWEEN_T, BETWEEN_B, 5, 7, 0.002)
    assert torch.equal(nodes[0], BETWEEN_T) and torch.equal(nodes[-1], BETWEEN_B)
    assert (
        nodes[-2][BETWEEN_B == 0] == torch.tensor([0.002, 0.002, 0.002, 0.001], dtype=torch.float64)
    ).all()
    assert (nodes[:-1] >= nodes[1:]).all()


def test_a_solution_between_levels_is_second_order_and_costs_two_evaluations_a_substep(gaussian):
    """Doubling the sub-steps divides the global error by about 2**2."""
    x, calls = torch.linspace(-3, 3, 4, dtype=torch.float64).reshape(1, 1, 2, 2), []
    counted = lambda x, sigma: calls.append(len(x)) or gaussian(x, sigma)
    sigma_t, sigma_b = torch.tensor([2.0]), torch.tensor([0.3])
    errors = [
        (
            segment_solvers.solve_between(counted, x, sigma_t.double(), sigma_b.double(), n, 7, 0.002)
            - gaussian.solve(x, sigma_t, sigma_b)
        )
        .abs()
        .max()
        for n in (16, 32, 64)
    ]
    ratios = [a / b for a, b in itertools.pairwise(errors)]
    assert all(3.7 < r < 4.3 for r in ratios), ratios
    assert len(calls) == 2 * (16 + 32 + 64)


def test_moves_never_ask_the_device():
    """Tensors without values, on the `meta` device, raise wherever a value is needed on the host."""
    x, sigma = (
        torch.empty(4, 1, 2, 2, dtype=torch.float64, device='meta'),
        torch.empty(4, dtype=torch.float64, device='meta'),
    )
    denoiser = lambda x, sigma: x / ops.expand_like(1 + sigma, x)
    moved = [
        segment_solvers.solve_between(denoiser, x, sigma, sigma, 3, 7, 0.002, spacing, solver)
        for spacing, solver in itertools.product(ops.SIGMA_GRIDS, SEGMENT_SOLVERS)
    ]
    moved += [ops.addim_hop(x, x, sigma, sigma, ops.addim_variance(x, sigma, y)) for y in (x, None)]
    assert all(m.shape == x.shape and m.device.type == 'meta' for m in moved)


# ----------------------------------------------------------------------------
# Losses and weights.


def test_distances_are_their_formulas():
    d = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64).reshape(2, 1, 1, 2)
    expected = dict(
        l2=[25, 0],
        l2_root=[5, 1e-6],
        pseudo_huber=[math.sqrt(25 + 1e-8) - 1e-4, 0],
        huber=[1e-4 * (7 - 1e-4), 0],
    )
    for kind, values in expected.items():
        torch.testing.assert_close(
            ops.image_distance(d, kind), torch.tensor(values, dtype=torch.float64), rtol=1e-12, atol=1e-15
        )


def test_the_pseudo_huber_distance_takes_another_eps():
    """sqrt(25 + 144) − 12; without eps it is the root of the square, and as finite at 0."""
    d = torch.tensor([3.0, 4.0], dtype=torch.float64).reshape(1, 1, 1, 2)
    assert ops.image_distance(d, 'pseudo_huber', eps=12.0) == 1
    for same in (d, 0 * d):
        assert torch.equal(
            ops.image_distance(same, 'pseudo_huber', eps=0), ops.image_distance(same, 'l2_root')
        )


@pytest.mark.parametrize('eps', [ops.PSEUDO_HUBER_EPS, 0.0])
def test_distances_have_finite_gradients_at_zero(eps):
    for kind in ops.DISTANCES:
        d = torch.zeros(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
        ops.image_distance(d, kind, eps).sum().backward()
        assert torch.isfinite(d.grad).all(), kind


def test_weights_are_their_formulas():
    sigma, lower = (
        torch.tensor([2.0, 0.5], dtype=torch.float64),
        torch.tensor([1.0, 0.25], dtype=torch.float64),
    )
    expected = dict(
        edm=[4.25, 8],
        karras=[4.25, 8],
        sqrt_karras=[4.25**0.5, 8**0.5],
        vlike=[1.25, 5],
        snr=[0.25, 4],
        flat=[1, 1],
        uniform=[1, 1],
        sqrt_gap=[1, 0.5],
        **{'snr+1': [1.25, 5], 'truncated-snr': [1, 4]},
    )
    assert set(expected) == set(ops.WEIGHT_MODES)
    for mode, values in expected.items():
        torch.testing.assert_close(
            ops.edge_weight(sigma, lower, mode, 0.5), torch.tensor(values, dtype=torch.float64)
        )
