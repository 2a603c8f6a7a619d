"""Grids, segments, edges, hops: against golden values, closed forms and for all settings."""
import itertools
import math

import pytest
import torch
from gaussian import Gaussian
from hypothesis import given, settings
from hypothesis import strategies as st

from training import consistency_ops as ops

SETTINGS = [(S, T) for S in (2, 4, 8, 16) for T in (64, 129, 256, 1280)]


@pytest.fixture
def gaussian():
    return Gaussian(torch.tensor([0.02, 0.25, 1.0, 4.0]).reshape(1, 1, 2, 2), mean=0.3)


def grids(S, T, kind='edm', rho=7.0):
    student = ops.student_grid(S, 0.002, 80, rho, kind)
    return student, ops.teacher_grid(student, T, 0.002, 80, rho)

#----------------------------------------------------------------------------
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
    torch.testing.assert_close(got.float(), torch.from_numpy(numerics[f'prob_{mode}_S{S}_T{T}']), rtol=1e-5, atol=0)


@settings(max_examples=60, deadline=None)
@given(S=st.integers(1, 16), extra=st.integers(0, 200), kind=st.sampled_from(ops.STUDENT_GRIDS), rho=st.floats(1, 12),
       sigma_min=st.floats(1e-4, 0.1), sigma_max=st.floats(1, 500))
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
@given(S=st.integers(1, 12), T=st.integers(12, 300), mode=st.sampled_from(ops.SAMPLING_MODES), anchor=st.booleans(), pin=st.booleans())
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

#----------------------------------------------------------------------------
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
    errors = hop_errors(lambda x, t, s: ops.ddim_step(x, gaussian(x, t), torch.tensor(t), torch.tensor(s)), gaussian)
    ratios = [a / b for a, b in itertools.pairwise(errors)]
    assert all(3.4 < r < 4.6 for r in ratios), ratios


@pytest.mark.parametrize('sigma_b, tolerance', [(40.0, 3e-4), (10.0, 3e-4), (9.9, 3e-4), (1.5, 5e-3), (0.5, 5e-3), (0.05, 2e-2), (0.0, 2e-2)])
def test_the_anchor_solution_is_as_exact_as_promised(sigma_b, tolerance):
    """Relative to the exact solution, for data of standard deviation 0.5 (EDM's sigma_data)."""
    gaussian = Gaussian(0.25)
    x = torch.full([1, 1, 1, 1], 80.0, dtype=torch.float64)
    got = ops.solve_ode(gaussian, x, ops.anchor_nodes(80.0, sigma_b, 0.002, 7))
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

#----------------------------------------------------------------------------
# Losses and weights.

def test_distances_are_their_formulas():
    d = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64).reshape(2, 1, 1, 2)
    expected = dict(l2=[25, 0], l2_root=[5, 1e-6], pseudo_huber=[math.sqrt(25 + 1e-8) - 1e-4, 0], huber=[1e-4 * (7 - 1e-4), 0])
    for kind, values in expected.items():
        torch.testing.assert_close(ops.image_distance(d, kind), torch.tensor(values, dtype=torch.float64), rtol=1e-12, atol=1e-15)


def test_distances_have_finite_gradients_at_zero():
    for kind in ops.DISTANCES:
        d = torch.zeros(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
        ops.image_distance(d, kind).sum().backward()
        assert torch.isfinite(d.grad).all(), kind


def test_weights_are_their_formulas():
    sigma, lower = torch.tensor([2.0, 0.5], dtype=torch.float64), torch.tensor([1.0, 0.25], dtype=torch.float64)
    expected = dict(edm=[4.25, 8], karras=[4.25, 8], sqrt_karras=[4.25 ** 0.5, 8 ** 0.5], vlike=[1.25, 5], snr=[0.25, 4], flat=[1, 1],
                    uniform=[1, 1], sqrt_gap=[1, 0.5], **{'snr+1': [1.25, 5], 'truncated-snr': [1, 4]})
    assert set(expected) == set(ops.WEIGHT_MODES)
    for mode, values in expected.items():
        torch.testing.assert_close(ops.edge_weight(sigma, lower, mode, 0.5), torch.tensor(values, dtype=torch.float64))
