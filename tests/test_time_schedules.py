"""Schedules and drawn times of the family: against goldens, the papers' formulas, SciPy's distributions and for all settings."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from training import consistency_ops as ops
from training.objectives import time_schedules as times

TIMES = torch.logspace(-2.7, 1.9, 24, dtype=torch.float64)
UNIFORM = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000  # the quantiles of a uniform draw

# ----------------------------------------------------------------------------
# Consistency models.


def test_discretization_and_target_decay_equal_the_published_ones(family):
    """Columns: target decay, N; 800,000 steps. The fixed decay is a constant, only its N is a schedule."""
    for k, (_, N_fixed), (mu, N) in zip(
        family['openai.steps'].tolist(),
        family['openai.progressive_fixed'],
        family['openai.progressive_adaptive'],
    ):
        assert times.discretization_steps(k, 800_000, 2, 200) == N_fixed
        assert times.discretization_steps(k, 800_000, 2, 150) == N
        assert math.isclose(times.target_ema(int(N), 2, 0.9), mu, rel_tol=1e-12)


def test_the_grid_of_consistency_models_equals_the_published_one(family):
    """OpenAI's 40 levels, of which `ts=0,22,39` picks sigma_max, 1.382 and the end."""
    nodes = ops.karras_sigmas(40, 0.002, 80, 7)
    torch.testing.assert_close(nodes, torch.from_numpy(family['openai.ts_sigmas_40']), rtol=1e-12, atol=0)
    assert [round(nodes[i].item(), 3) for i in (0, 22, 39)] == [80, 1.382, 0.002]


def test_discretization_grows_with_the_square_root_of_the_steps():
    """Half-way N² has covered half the distance; from the end on N stays at s1 + 1 nodes."""
    K, s0, s1 = 1000, 2, 150
    assert times.discretization_steps(K // 2, K, s0, s1) == math.ceil(math.sqrt((151**2 + 4) / 2) - 1) + 1
    assert times.discretization_steps(K, K, s0, s1) == times.discretization_steps(5 * K, K, s0, s1) == s1 + 1
    assert times.discretization_steps(0, K, 1, s1) == 2, 'one edge is the least'


@settings(max_examples=100, deadline=None)
@given(
    K=st.integers(1, 10**6),
    s0=st.integers(1, 20),
    more=st.integers(0, 2000),
    a=st.floats(0, 1.5),
    b=st.floats(0, 1.5),
)
def test_discretizations_never_coarsen_and_stay_between_their_ends(K, s0, more, a, b):
    early, late = sorted([int(a * K), int(b * K)])
    for steps in (times.discretization_steps, times.doubling_steps):
        assert max(s0, 2) <= steps(early, K, s0, s0 + more) <= steps(late, K, s0, s0 + more) <= s0 + more + 1


def test_the_target_follows_the_network_where_the_initial_decay_is_zero():
    assert times.target_ema(18, 2, 0.0) == 0
    assert times.target_ema(3, 2, 0.9) == 0.9
    assert 0.9 < times.target_ema(18, 2, 0.9) < times.target_ema(151, 2, 0.9) < 1


@pytest.mark.parametrize('K, s0, s1', [(0, 2, 150), (100, 0, 150), (100, 151, 150)])
def test_a_schedule_without_order_is_refused(K, s0, s1):
    for steps in (times.discretization_steps, times.doubling_steps):
        with pytest.raises(ValueError, match='do not hold'):
            steps(0, K, s0, s1)


# ----------------------------------------------------------------------------
# iCT.


def test_doubling_has_equally_long_stages_up_to_its_cap():
    """From 10 to 1280 are seven doublings: eight stages of 50,000 steps in 400,000."""
    for stage in range(8):
        nodes = {times.doubling_steps(stage * 50_000 + offset, 400_000) for offset in (0, 1, 49_999)}
        assert nodes == {10 * 2**stage + 1}
    assert times.doubling_steps(400_000, 400_000) == times.doubling_steps(10**9, 400_000) == 1281
    assert times.doubling_steps(400_000, 400_000, s0=10, s1=1000) == 1001, 'the cap need not be a doubling'
    assert [times.doubling_steps(k, 3) for k in range(4)] == [11, 21, 41, 81], 'fewer steps than stages'


@pytest.mark.parametrize('P_mean, P_std', [(-1.1, 2.0), (0.3, 0.7)])
def test_lognormal_edges_have_the_mass_of_their_interval(P_mean, P_std):
    """SciPy's normal distribution function, between the ends of each edge and normalized by that of the whole grid."""
    sigmas = ops.karras_sigmas(41, 0.002, 80, 7)
    cdf = stats.norm(P_mean, P_std).cdf(sigmas.log().numpy())
    expected = torch.from_numpy((cdf[:-1] - cdf[1:]) / (cdf[0] - cdf[-1]))
    got = times.lognormal_edge_probabilities(sigmas, P_mean, P_std)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-15)
    assert math.isclose(got.sum(), 1, abs_tol=1e-14)


def test_lognormal_edges_default_to_the_papers_distribution():
    sigmas = ops.karras_sigmas(11, 0.002, 80, 7)
    assert torch.equal(
        times.lognormal_edge_probabilities(sigmas), times.lognormal_edge_probabilities(sigmas, -1.1, 2.0)
    )
    assert times.pseudo_huber_eps(3 * 32 * 32) == pytest.approx(0.0299, abs=5e-5), (
        'the value that the paper gives for CIFAR-10 is 0.03'
    )
    assert times.gap_weight(torch.tensor(2.0), torch.tensor(1.75)) == 4


# ----------------------------------------------------------------------------
# ECT.


@pytest.mark.parametrize('q', [2, 4])
@pytest.mark.parametrize('mapping, k', [('const', 0), ('sigmoid', 8)])
def test_earlier_times_equal_the_published_ones(family, q, mapping, k):
    t = torch.from_numpy(family['ect.t'])
    for stage, expected in enumerate(torch.from_numpy(family[f'ect.r_q{q}_{mapping}'])):
        torch.testing.assert_close(times.earlier_time(t, stage, q, k=k), expected, rtol=1e-12, atol=1e-15)


@settings(max_examples=100, deadline=None)
@given(
    t=st.floats(1e-3, 500),
    stage=st.integers(0, 10),
    q=st.floats(1.5, 8),
    k=st.floats(0, 20),
    b=st.floats(0.1, 5),
)
def test_earlier_times_are_earlier_and_move_closer_by_stages(t, stage, q, k, b):
    t = torch.tensor(t, dtype=torch.float64)
    r, closer = (times.earlier_time(t, a, q, k, b) for a in (stage, stage + 1))
    assert 0 <= r <= closer < t
    assert (r == 0) == bool(q ** -(stage + 1) * (1 + k * torch.sigmoid(-b * t)) >= 1)


def test_tuning_starts_as_diffusion_at_low_noise():
    """q = 2, stage 0: half of (1 + 8 sigmoid(−t)) is above 1 while sigmoid(−t) > 1/8, that is t < ln 7."""
    r = times.earlier_time(torch.tensor([1.94, 1.95], dtype=torch.float64), 0, 2)
    assert r[0] == 0 and r[1] > 0 and 1.94 < math.log(7) < 1.95


def test_a_stage_that_would_divide_by_nothing_is_refused():
    """2^−40 is 9e-13: the loss divides by t − r, and in FP64 r = t from stage 52 on."""
    assert times.earlier_time(TIMES, 38, 2, k=0).lt(TIMES).all()
    with pytest.raises(ValueError, match='make the stages longer'):
        times.earlier_time(TIMES, 39, 2, k=0)


def test_stages_of_tuning_are_equally_long():
    assert [times.tuning_stage(i, 100) for i in (0, 99, 100, 250)] == [0, 0, 1, 2]


@pytest.mark.parametrize('P_mean, P_std', [(-1.1, 2.0), (-0.8, 1.6)])
def test_lognormal_times_have_that_distribution(P_mean, P_std):
    """Given the quantiles of a standard normal, they are the quantiles of SciPy's lognormal distribution."""
    got = times.lognormal_times(torch.from_numpy(stats.norm.ppf(UNIFORM.numpy())), P_mean, P_std)
    torch.testing.assert_close(
        got,
        torch.from_numpy(stats.lognorm(P_std, scale=math.exp(P_mean)).ppf(UNIFORM.numpy())),
        rtol=1e-9,
        atol=0,
    )
    assert times.lognormal_times(torch.zeros(1)).dtype == torch.float64


def test_times_are_by_default_those_of_cifar10():
    """ECT and TCM: ln t of mean −1.1 and deviation 2; r by k = 8, b = 1; a Student distribution of scale 0.2 and 0.01 degrees of freedom."""
    t, normal = (
        torch.tensor([0.5, 2.0, 30.0], dtype=torch.float64),
        torch.tensor([-1.0, 0.0, 1.5], dtype=torch.float64),
    )
    torch.testing.assert_close(times.lognormal_times(normal), (2 * normal - 1.1).exp(), rtol=1e-12, atol=0)
    sigmoid = 1 / (1 + t.exp())
    torch.testing.assert_close(
        times.earlier_time(t, 4, 2.0), t * (1 - 2.0**-5 * (1 + 8 * sigmoid)), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        times.tcm_earlier_time(t, 0.9), t - t * 0.1 * (1 + 8 * sigmoid), rtol=1e-12, atol=0
    )
    assert torch.equal(
        times.truncated_log_student_times(UNIFORM, 1, 80),
        times.truncated_log_student_times(UNIFORM, 1, 80, 0.2, 0.01),
    )


def test_tuning_weights_are_their_formulas():
    t, r = torch.tensor([2.0, 0.5], dtype=torch.float64), torch.tensor([1.0, 0.25], dtype=torch.float64)
    expected = dict(
        gap=[1, 4],
        flat=[1, 1],
        inv=[0.5, 2],
        snr=[0.25, 4],
        inv_sum=[2.5, 4],
        karras=[4.25, 8],
        c_in_squared=[1 / 4.25, 2],
    )
    assert set(expected) == set(times.ECT_WEIGHTS)
    for mode, values in expected.items():
        torch.testing.assert_close(
            times.ect_weight(t, r, mode, 0.5), torch.tensor(values, dtype=torch.float64)
        )
    with pytest.raises(ValueError, match='is not one of'):
        times.ect_weight(t, r, 'nothing', 0.5)


# ----------------------------------------------------------------------------
# TCM.


@pytest.mark.parametrize(
    'low, high, scale, df',
    [(1.0, 80.0, 0.2, 0.01), (0.5, 80.0, 0.2, 0.01), (1.0, 80.0, 2.0, 3.0), (2.0, 300.0, 0.3, 50.0)],
)
def test_log_student_times_have_that_distribution(low, high, scale, df):
    """Against the density, integrated by quadrature: the mass below the u-quantile is u. df = 0.01 has next to no mass within reach, and df = 50,
    scale 0.3 from ln 2 on, is the far tail, where distribution functions near 1 would have lost their digits."""
    density = lambda x: (1 + x * x / df) ** (-(df + 1) / 2)
    bend = min(max(0.0, math.log(low) / scale), math.log(high) / scale)
    mass = lambda a, b: integrate.quad(density, a, b, epsabs=0, epsrel=1e-11, limit=500)[0]
    bottom, top = math.log(low) / scale, math.log(high) / scale
    pieces = lambda x: mass(bottom, x) if x <= bend + 1 else mass(bottom, bend + 1) + mass(bend + 1, x)
    u = torch.tensor([0.0, 0.01, 0.1, 0.35, 0.6, 0.9, 0.999, 1 - 1e-9], dtype=torch.float64)
    t = times.truncated_log_student_times(u, low, high, scale, df)
    assert (
        t.dtype == torch.float64
        and t[0] == pytest.approx(low, rel=1e-12)
        and low <= t.min()
        and t.max() <= high
    )
    got = [pieces(math.log(value) / scale) / pieces(top) for value in t.tolist()]
    assert got == pytest.approx(u.tolist(), rel=1e-7, abs=1e-12)


def test_log_student_draws_pass_a_kolmogorov_smirnov_test_against_scipy():
    """The paper's parameters. A location of 0.05 in ln t, or a scale of 0.3, would be rejected at p < 1e-6."""
    u = torch.rand(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = times.truncated_log_student_times(u, 1.0, 80.0)
    student = stats.t(df=0.01, scale=0.2)
    low, high = student.cdf([0.0, math.log(80)])
    p = lambda shift, scale: (
        stats.kstest(
            t.log().numpy(), lambda x: (stats.t(0.01, shift, scale).cdf(x) - low) / (high - low)
        ).pvalue
    )
    assert p(0.0, 0.2) > 0.05
    assert p(0.05, 0.2) < 1e-6 and p(0.0, 0.3) < 1e-6


def test_times_of_no_interval_are_refused():
    for low, high in ((0.0, 80.0), (2.0, 1.0), (1.0, math.inf)):
        with pytest.raises(ValueError, match='does not hold'):
            times.truncated_log_student_times(UNIFORM, low, high)


@pytest.mark.parametrize('q, cap, first_capped', [(2, 0.999, 9), (4, 0.9961, 4)])
def test_the_ratio_rises_by_stages_up_to_its_cap(q, cap, first_capped):
    """1 − 2^−10 = 0.99902 and 1 − 4^−5 = 0.99902 are the first above the two caps; 1 − 4^−4 = 0.99609 is just below."""
    ratios = [times.tcm_ratio(25_000 * stage, 25_000, q, cap) for stage in range(12)]
    assert ratios[:first_capped] == [1 - q ** -(stage + 1) for stage in range(first_capped)]
    assert ratios[first_capped - 1] < cap and ratios[first_capped:] == [cap] * (12 - first_capped)


def test_truncated_pairs_are_those_of_tuning_above_the_floor():
    """The same mapping, for the same ratio; where tuning has r = 0 there is the floor."""
    for stage in (0, 3):
        r = times.earlier_time(TIMES, stage, 2)
        got = times.tcm_earlier_time(TIMES, times.tcm_ratio(stage * 10, 10, 2, 0.999))
        torch.testing.assert_close(got, r.clamp(min=1e-6), rtol=1e-9, atol=0)
    assert times.tcm_earlier_time(torch.tensor(1.0, dtype=torch.float64), 0.5) == 1e-6, (
        'at t = 1, (1 + 8 sigmoid(−1)) / 2 is 1.58'
    )


def test_truncated_weights_are_their_formulas():
    """t / c_out², with c_out as EDM's preconditioning has it, over the gap."""
    t, r, sigma_data = TIMES, TIMES / 3, 0.5
    c_out = t * sigma_data / (t**2 + sigma_data**2).sqrt()
    torch.testing.assert_close(
        times.tcm_weight(t, r, 'karras', sigma_data), t / c_out**2 / (t - r), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(times.tcm_weight(t, r, 'flat', sigma_data), 1 / (t - r), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match='is not one of'):
        times.tcm_weight(t, r, 'snr', sigma_data)


def test_the_boundary_has_the_whole_part_of_its_share():
    assert [times.boundary_count(batch, 0.25) for batch in (4, 7, 8, 1024)] == [1, 1, 2, 256]
    assert times.boundary_count(100, 0.29) == 29, '0.29 · 100 is 28.999… in floating point'
    assert times.boundary_count(8, 0) == 0
    for batch, share in ((3, 0.25), (8, 1.0), (8, -0.5)):
        with pytest.raises(ValueError, match='leaves'):
            times.boundary_count(batch, share)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(4, 300),
    share=st.sampled_from([0.25, 0.3, 0.5]),
    first=st.integers(0, 10**9),
    cut=st.floats(0, 1),
)
def test_any_batch_of_the_stream_has_its_boundary_samples_however_it_is_split(batch, share, first, cut):
    n = int(cut * batch)
    whole = times.boundary_samples(first, batch, batch, share)
    assert int(whole.sum()) == times.boundary_count(batch, share)
    assert torch.equal(
        whole,
        torch.cat(
            [
                times.boundary_samples(first, n, batch, share),
                times.boundary_samples(first + n, batch - n, batch, share),
            ]
        ),
    )
    assert abs(int(whole[:n].sum()) - n * int(whole.sum()) / batch) <= 1, 'evenly spread'


@pytest.mark.parametrize('share', [0, 0.25])
def test_the_mean_of_scaled_losses_is_the_sum_of_the_two_means(share):
    losses = torch.rand(10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    at_boundary = times.boundary_samples(30, 10, 10, share)
    expected = losses[~at_boundary].mean() + (0.1 * losses[at_boundary].mean() if share else 0)
    got = (losses * times.boundary_scales(at_boundary, 10, share, w_b=0.1)).mean()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


# ----------------------------------------------------------------------------
# Progressive distillation.


def test_halving_equals_the_published_schedule(family):
    """Column 1: from 1024 steps, 50,000 optimizer steps a stage, and twice that for the last two stages."""
    schedule = [
        S for S, steps in times.halving_rounds(1024, 1, 50_000) for _ in range(steps // 50_000)
    ]  # S of every 50,000 steps
    got = [schedule[min(k // 50_000, len(schedule) - 1)] for k in family['openai.steps'].tolist()]
    assert got == family['openai.progdist'][:, 1].tolist()


def test_stages_halve_down_to_their_end():
    assert times.halving_rounds(16, 4, 100) == [(16, 100), (8, 100), (4, 100)]
    assert times.halving_rounds(2, 1, 100) == [(2, 200), (1, 200)]
    assert times.halving_rounds(6, 6, 100) == [(6, 100)]


@pytest.mark.parametrize('start, end', [(6, 4), (2, 4), (12, 5), (4, 0)])
def test_steps_that_do_not_halve_to_their_end_are_refused(start, end):
    with pytest.raises(ValueError, match='by halving'):
        times.halving_rounds(start, end, 100)


# ----------------------------------------------------------------------------
# On devices.


def test_functions_of_times_never_ask_the_device():
    """Tensors without values, on the `meta` device, raise wherever a value is needed on the host."""
    t = torch.empty(4, dtype=torch.float64, device='meta')
    results = [
        times.lognormal_times(t),
        times.earlier_time(t, 0, 2),
        times.tcm_earlier_time(t, 0.5),
        times.gap_weight(t, t),
        times.boundary_scales(t > 0, 4, 0.25, 0.1),
        *(times.ect_weight(t, t, mode, 0.5) for mode in times.ECT_WEIGHTS),
        *(times.tcm_weight(t, t, mode, 0.5) for mode in times.TCM_WEIGHTS),
    ]
    assert all(result.device.type == 'meta' and result.shape == (4,) for result in results)
