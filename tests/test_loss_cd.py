"""The consistency distillation loss against Gaussian data, where teacher, trajectories and the discrete
consistency function are known."""

import itertools

import pytest
import torch
from gaussian import Gaussian
from losses import (
    VARIANCE,
    LinearStudent,
    Loss,
    Recorder,
    assert_stationary_there_alone,
    exact_student,
    multipliers_of_targets,
    small_network,
    targets,
)

from torch_utils import training_stats
from training import consistency_ops as ops
from training.objectives.loss_cd import DistillationConfig
from training.rng import SampleRng

DEFAULTS = dict(
    S=4,
    T_start=16,
    T_end=16,
    T_anneal_kimg=0,
    rho=7.0,
    sigma_min=0.002,
    sigma_max=80.0,
    student_grid='edm',
    sampling_mode='edm',
    cd_loss='l2',
    cd_weight_mode='flat',
    sigma_data=0.5,
    terminal_anchor=False,
    terminal_teacher_hop=True,
    sync_dropout=True,
)


def make_loss(teacher, **options):
    return Loss('mcd', teacher, **{**DEFAULTS, **options})


@pytest.mark.parametrize('S, T, kind', [(1, 16, 'edm'), (4, 16, 'edm'), (8, 64, 'full'), (4, 33, 'full')])
def test_with_exact_hops_the_exact_segment_map_has_zero_loss(S, T, kind):
    """Terminal edges and the pin are left out: their references are the denoised image and a many-step
    solution."""
    gaussian = Gaussian(VARIANCE)
    loss = make_loss(gaussian, S=S, T_start=T, T_end=T, student_grid=kind, hop=gaussian.solve)
    student = exact_student(gaussian, loss.state.student_sigmas)
    generator = torch.Generator().manual_seed(1)
    y, noise = torch.randn(2, 1, 1, 2, 2, generator=generator, dtype=torch.float64)
    x_t, x_star, edges = targets(loss, student, y, noise)
    error = (student(x_t, edges.sigma_t) - x_star).abs().flatten(1).amax(dim=1)
    assert error[edges.kind != ops.TERMINAL].max() < 1e-10


def discrete_multipliers(loss, hop):
    """c of docs/method.md in closed form: the multiplier of x from each edge's upper end to its boundary,
    [T', 1, 2, 2], and its edges."""
    edges = loss.state.edges
    D = lambda sigma: VARIANCE[0] / (VARIANCE[0] + sigma**2)
    c = [None] * len(edges)
    for k in reversed(range(len(edges))):
        sigma_t, sigma_s = float(edges.sigma_t[k]), float(edges.sigma_s[k])
        if edges.kind[k] == ops.TERMINAL:
            c[k] = D(sigma_t)
            continue
        ddim = D(sigma_t) + sigma_s / sigma_t * (1 - D(sigma_t))
        slope_t = (1 - D(sigma_t)) / sigma_t
        slope_s = (1 - D(sigma_s)) / sigma_s * ddim
        multiplier = ddim if hop == 'ddim' else 1 + (sigma_s - sigma_t) * (slope_t + slope_s) / 2
        c[k] = multiplier if edges.kind[k] == ops.SNAP else multiplier * c[k + 1]
    return torch.stack(c), edges


@pytest.mark.parametrize('hop', ['heun', 'ddim'])
@pytest.mark.parametrize('teacher_hop', [True, False])
@pytest.mark.parametrize('S, T, kind', [(1, 8, 'edm'), (4, 16, 'edm'), (4, 17, 'full')])
def test_the_discrete_consistency_function_has_zero_expected_gradient_and_a_perturbed_one_has_not(
    hop, teacher_hop, S, T, kind
):
    loss = make_loss(
        Gaussian(VARIANCE),
        S=S,
        T_start=T,
        T_end=T,
        student_grid=kind,
        hop=hop,
        terminal_teacher_hop=teacher_hop,
    )
    assert_stationary_there_alone(loss, loss.state.student_sigmas, *discrete_multipliers(loss, hop))


@pytest.mark.parametrize('hop, order', [('ddim', 1), ('heun', 2)])
def test_the_discrete_consistency_function_converges_at_the_hops_order(hop, order):
    """Twice the edges divide the distance to the exact map sqrt((s² + sigma_b²) / (s² + sigma_t²)) by about
    2**order.

    At the top of the first segment, where all of its edges' errors add up."""
    errors = []
    for T in (128, 256, 512):
        loss = make_loss(Gaussian(VARIANCE), S=2, T_start=T, T_end=T, student_grid='full', hop=hop)
        c, edges = multipliers_of_targets(loss, loss.state.student_sigmas)
        exact = ((VARIANCE + edges.sigma_b[0] ** 2) / (VARIANCE + edges.sigma_t[0] ** 2)).sqrt()[0]
        errors.append((c[0] / exact - 1).abs().max())
    ratios = [a / b for a, b in itertools.pairwise(errors)]
    assert all(0.8 * 2**order < r < 1.2 * 2**order for r in ratios), ratios


def test_snap_edges_have_the_known_targets():
    """DDIM: x* = D(x_t; sigma_t). Heun: x* = D1 + sigma_t / (2 sigma_s) (D2 − D1)."""
    gaussian = Gaussian(VARIANCE)
    y, noise = torch.randn(2, 1, 1, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for hop in ('ddim', 'heun'):
        loss = make_loss(gaussian, S=4, T_start=4, T_end=4, student_grid='full', hop=hop)
        x_t, x_star, edges = targets(loss, exact_student(gaussian, loss.state.student_sigmas), y, noise)
        D1 = gaussian(x_t, edges.sigma_t)
        if hop == 'ddim':
            expected = D1
        else:
            sigma_t, sigma_s = (
                ops.expand_like(s, x_t) for s in (edges.sigma_t, edges.sigma_s.clamp(min=1e-9))
            )
            D2 = gaussian(ops.ddim_step(x_t, D1, edges.sigma_t, edges.sigma_s), edges.sigma_s)
            expected = torch.where(sigma_s > 1e-6, D1 + sigma_t / (2 * sigma_s) * (D2 - D1), D1)
        torch.testing.assert_close(x_star, expected, rtol=1e-10, atol=1e-10)


def test_terminal_edges_aim_at_the_data_without_the_teacher_hop():
    gaussian = Gaussian(VARIANCE)
    y, noise = torch.randn(2, 1, 1, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    loss = make_loss(gaussian, terminal_teacher_hop=False)
    _, x_star, edges = targets(loss, exact_student(gaussian, loss.state.student_sigmas), y, noise)
    terminal = edges.kind == ops.TERMINAL
    torch.testing.assert_close(x_star[terminal], y.expand(int(terminal.sum()), -1, -1, -1))


@pytest.mark.parametrize('S', [1, 4])
def test_the_anchored_edge_follows_the_teacher_alone(S):
    """Whatever the student says, the first edge's target leads to the teacher's own solution at the
    boundary."""
    gaussian = Gaussian(VARIANCE)
    y, noise = torch.randn(2, 1, 1, 2, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    loss = make_loss(gaussian, S=S, terminal_anchor=True)
    nonsense = LinearStudent(
        loss.state.student_sigmas, lambda sigma, sigma_b: torch.full([1, 1, 1, 1], 7.0, dtype=torch.float64)
    )
    x_t, x_star, edges = targets(loss, nonsense, y, noise)
    x_b = ops.ddim_step(x_t[:1], x_star[:1], edges.sigma_t[:1], edges.sigma_b[:1])
    exact = gaussian.solve(x_t[:1], edges.sigma_t[0], edges.sigma_b[0])
    assert ((x_b / exact - 1).abs()).max() < (1e-3 if S > 1 else 3e-2)


@pytest.mark.parametrize('sync', [True, False])
def test_both_passes_see_the_same_masks_exactly_where_dropout_is_synchronized(sync):
    student, rng = Recorder(small_network()).train(), SampleRng(0, 0, 16)
    loss = make_loss(small_network(0).eval(), sync_dropout=sync)
    loss(student, torch.zeros(16, 1, 8, 8), None, rng)
    (_, first), (_, second) = student.calls
    assert len(first) == len(second) > 4
    assert all(torch.equal(first[name], second[name]) for name in first) == sync


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_mask_drops_the_same_values_in_every_precision(dtype):
    block = small_network().model.enc['8x8_block0']
    mask = torch.rand(4, 16, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    out = block._dropout(torch.ones(4, 16, 8, 8, dtype=dtype), mask)
    assert torch.equal(out != 0, mask)
    assert (out[mask] == 2).all()


def test_compiled_and_eager_passes_agree_under_the_same_masks():
    net = small_network()
    masks = net.dropout_masks(4, torch.Generator().manual_seed(0))
    x, sigma = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.ones(4)
    for parameter in net.parameters():  # zero-initialized layers would hide the dropout
        torch.nn.init.normal_(parameter, std=0.1)
    compiled = torch.compile(net, backend='aot_eager')
    torch.testing.assert_close(
        compiled(x, sigma, None, dropout_masks=masks), net(x, sigma, None, dropout_masks=masks)
    )
    assert not torch.allclose(
        net(x, sigma, None, dropout_masks=masks), net(x, sigma, None, dropout_masks=net.dropout_masks(4))
    )


def test_the_student_is_asked_at_the_upper_end_and_its_own_target_at_the_lower():
    student, rng = Recorder(small_network()).train(), SampleRng(0, 0, 64)
    loss = make_loss(small_network(0).eval(), T_start=16, T_end=16)
    loss(student, torch.zeros(64, 1, 8, 8), None, rng)
    (lower, _), (upper, _) = student.calls
    edges = loss.state.edges
    index = (edges.sigma_t[None] == upper[:, None]).int().argmax(dim=1)
    hopped = edges.kind[index] != ops.TERMINAL
    assert torch.equal(lower[hopped], edges.sigma_s[index][hopped])
    assert len(index.unique()) > 5


def test_gradients_reach_the_student_alone_and_the_loss_does_not_depend_on_how_the_batch_is_split():
    student, teacher = small_network(0).double(), small_network(0).double().eval().requires_grad_(False)
    torch.nn.init.normal_(student.model.out_conv.weight, std=0.1)
    images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = make_loss(teacher, terminal_anchor=True, cd_loss='pseudo_huber', cd_weight_mode='sqrt_karras')
    whole = loss(student, images, None, SampleRng(7, 1000, 64))
    parts = [loss(student, images[a : a + 16], None, SampleRng(7, 1000 + a, 16)) for a in range(0, 64, 16)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-9, atol=1e-9)
    whole.sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert sum(p.grad.abs().sum() for p in student.parameters()) > 0


def test_edges_are_drawn_with_their_probabilities():
    """20,000 draws: every frequency within 5 standard deviations."""
    loss = make_loss(Gaussian(VARIANCE), terminal_anchor=True)
    student = LinearStudent(
        loss.state.student_sigmas, lambda sigma, sigma_b: torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    )
    seen = []
    student.forward = lambda x, sigma, labels=None, dropout_masks=None, **_: seen.append(sigma) or x.double()
    count = 20_000
    loss(student, torch.zeros(count, 1, 2, 2), None, SampleRng(0, 0, count))
    edges = loss.state.edges
    index = (edges.sigma_t[None] == seen[-1][:, None]).int().argmax(dim=1)
    frequency = torch.bincount(index, minlength=len(edges)) / count
    teacher = torch.cat([edges.sigma_t, torch.zeros(1, dtype=torch.float64)])
    p = ops.edge_probabilities(teacher, loss.state.student_sigmas, 'edm', 7, True, pin_top=True)
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / count).sqrt()).all()


def test_edge_statistics_are_reported():
    training_stats.reset()
    loss = make_loss(small_network(0).eval(), S=2, terminal_anchor=True)
    per_image = loss(small_network(0), torch.zeros(256, 1, 8, 8), None, SampleRng(0, 0, 256))
    stats = training_stats.collect()
    kinds = [stats[f'Edges/{name}']['mean'] for name in ops.KIND_NAMES]
    assert (
        abs(sum(kinds) - 1) < 1e-12
        and stats['Edges/terminal']['mean'] > 0
        and stats['Edges/pinned']['mean'] > 0
    )
    by_segment = sum(stats[name]['mean'] * stats[name]['num'] for name in ('Loss/segment0', 'Loss/segment1'))
    by_sigma = sum(s['mean'] * s['num'] for name, s in stats.items() if name.startswith('Loss/sigma_'))
    assert (
        abs(by_segment - per_image.sum().item()) < 1e-6 * by_segment
        and abs(by_sigma - by_segment) < 1e-6 * by_segment
    )


def test_T_follows_the_images_seen():
    loss = make_loss(Gaussian(VARIANCE), T_start=16, T_end=64, T_anneal_kimg=10)
    lengths = []
    for nimg in (0, 5000, 10_000):
        loss.begin_step(nimg)
        lengths.append(len(loss.state.edges))
    assert 16 <= lengths[0] < 20 and 32 <= lengths[1] < 36 and 64 <= lengths[2] < 68


# ----------------------------------------------------------------------------
# The whole loss, recomputed.

CASES = {
    'defaults': dict(terminal_anchor=True),
    'tops': dict(terminal_anchor=True, keep_ties=True, top_mass=0.5),
    'to the data': dict(terminal_anchor=True, terminal_teacher_hop=False, hop='ddim'),
    'addim without an anchor': dict(hop='addim', student_grid='full', T_start=6, T_end=6),
    'one segment': dict(S=1, terminal_anchor=True, anchor_hops=3, top_mass=0.5, keep_ties=True),
    'no general edge': dict(S=4, T_start=4, T_end=4, student_grid='full', sampling_mode='uniform'),
}


def boundary_target(loss, net, y, x_t, edges, masks):
    """x_b as docs/method.md has it, every network evaluated for every image, and then what each image needs
    is chosen."""
    c, sigma_t, kind = loss.state.c, edges.sigma_t, ops.expand_like(edges.kind, y)
    sigma_s = torch.where(edges.kind == ops.TERMINAL, sigma_t / 2, edges.sigma_s)
    teacher = lambda x, sigma: loss.state.teacher(x, sigma).double()
    denoised = teacher(x_t, sigma_t)
    x_s = dict(
        heun=lambda: ops.heun_hop(teacher, x_t, sigma_t, sigma_s),
        ddim=lambda: ops.ddim_step(x_t, denoised, sigma_t, sigma_s),
        addim=lambda: ops.addim_hop(
            x_t, denoised, sigma_t, sigma_s, ops.addim_variance(denoised, sigma_t, y, c.xvar_frac)
        ),
    )[c.hop]()
    x_b = ops.ddim_step(x_s, net(x_s, sigma_s, dropout_masks=masks).double(), sigma_s, edges.sigma_b)
    x_b = torch.where(
        kind == ops.GENERAL,
        x_b,
        torch.where(kind == ops.SNAP, x_s, denoised if c.terminal_teacher_hop else y),
    )
    if not c.terminal_anchor:
        return x_b
    solution = ops.solve_ode(teacher, x_t, loss.state.anchor_levels)
    return torch.where(ops.expand_like(edges.index == 0, y) > 0, solution, x_b)


@pytest.mark.parametrize('name', CASES)
def test_the_loss_is_the_distance_from_the_boundary_target_of_the_method(name):
    """With dropout, in FP64."""
    student, teacher = small_network().double(), small_network(0).double().eval()
    for net in (student, teacher):
        torch.nn.init.normal_(net.model.out_conv.weight, std=0.1)
    loss, rng = make_loss(teacher, **CASES[name]), SampleRng(3, 0, 24)
    y = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    edges, masks = loss.state.draw(rng), student.dropout_masks(24, rng.generator('dropout'))
    x_t = y + ops.expand_like(edges.sigma_t, y) * rng.normal('noise', [1, 8, 8]).double()
    with torch.no_grad():
        x_b = boundary_target(loss, student, y, x_t, edges, masks)
        x_star = ops.inv_ddim(x_b, x_t, edges.sigma_t, edges.sigma_b)
        prediction = student(x_t, edges.sigma_t, dropout_masks=masks)
        expected = (prediction - x_star).square().sum(dim=(1, 2, 3))
        torch.testing.assert_close(loss(student, y, None, rng), expected, rtol=1e-9, atol=1e-9)
    assert len(edges.kind.unique()) > 1


def test_only_the_long_solution_is_of_the_images_that_need_it():
    """Four sub-steps above 0 have eight evaluations, of which the first is the hop's."""
    sizes = {'teacher': [], 'student': []}
    counting = lambda who: lambda x, sigma, labels=None, **_: sizes[who].append(len(x)) or x.double() / 2
    loss = make_loss(counting('teacher'), terminal_anchor=True, keep_ties=True, top_mass=0.5, anchor_hops=4)
    student = torch.nn.Identity().eval()
    student.forward = counting('student')
    loss(student, torch.ones(64, 1, 2, 2), None, SampleRng(3, 0, 64))
    anchored = int((loss.state.draw(SampleRng(3, 0, 64)).index == 0).sum())
    assert 1 < anchored < 32
    assert sizes == dict(teacher=[64, 64] + [anchored] * 7, student=[64, 64])


@pytest.mark.parametrize('S, hops', [(8, 4), (1, 32)])
def test_the_cost_counts_the_heun_steps_that_the_anchored_edge_takes(S, hops):
    """Two evaluations of Heun's hop, the self-target, three of the student; and the anchored edge's own."""
    config = DistillationConfig(S=S, T_start=64, T_end=64)
    top, bottom = ops.student_grid(S, 0.002, 80.0, 7.0, 'edm')[:2].tolist()
    assert len(ops.anchor_nodes(top, bottom, 0.002, 7.0)) - 1 == hops
    assert config.cost() == 2 + 1 + 3 + 2 * hops / 64
