"""The consistency distillation loss against Gaussian data, where teacher, trajectories and the discrete consistency function are known."""

import itertools
import math

import numpy as np
import pytest
import torch
from gaussian import Gaussian

from torch_utils import training_stats
from training import consistency_ops as ops
from training import networks
from training.draws import SampleDraws
from training.objectives.consistency_loss import EVERYONE, Drawn, Pairs, padded_size, split_batch
from training.objectives.loss_cd import ConsistencyDistillationLoss

VARIANCE = torch.tensor([0.02, 0.25, 1.0, 4.0], dtype=torch.float64).reshape(1, 1, 2, 2)
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
    return ConsistencyDistillationLoss(teacher, **{**DEFAULTS, **options})


class LinearStudent(torch.nn.Module):
    """Predicts the image from which DDIM reaches x_b = multiplier(sigma) x at the boundary of sigma's segment (data of mean 0)."""

    def __init__(self, student_grid, multiplier):
        super().__init__()
        self.grid, self.multiplier = student_grid, multiplier

    def forward(self, x, sigma, class_labels=None, dropout_masks=None):
        sigma_b = self.grid[ops.segment_of(sigma, self.grid) + 1]
        return ops.inv_ddim(self.multiplier(sigma, sigma_b) * x, x, sigma, sigma_b)

    def dropout_masks(self, batch_size, generator=None):
        return {}


def all_rows(loss):
    """One row of columns for every edge of the loss's grid."""
    return loss.table(torch.device('cpu'))


def on_edges(loss, index, few_sizes=False):
    """Samples on the edges of these indices, [N] int64."""
    table = all_rows(loss)
    parts = split_batch(loss.parts(table.kinds[index.numpy()]), torch.device('cpu'), few_sizes)
    return Drawn(*table.columns[index].unbind(dim=1), index, parts)


def targets(loss, student, y, noise):
    """x_t, x*, and the edges, for one sample on every edge; `y` and `noise` [1, 1, 2, 2]."""
    schedule = all_rows(loss)
    count = len(schedule.edges)
    sigma_t, sigma_b = schedule.columns[:, 0], schedule.columns[:, 2]
    y, noise = y.expand(count, -1, -1, -1), noise.expand(count, -1, -1, -1)
    x_t = y + ops.expand_like(sigma_t, y) * noise
    x_b = loss.reference(student, Pairs(y, noise, x_t, on_edges(loss, torch.arange(count))))
    return x_t, ops.inv_ddim(x_b, x_t, sigma_t, sigma_b), schedule.edges


def exact_student(gaussian, grid):
    return LinearStudent(
        grid,
        lambda sigma, sigma_b: gaussian.solve(torch.ones(1, 1, 1, 1, dtype=torch.float64), sigma, sigma_b),
    )


@pytest.mark.parametrize('S, T, kind', [(1, 16, 'edm'), (4, 16, 'edm'), (8, 64, 'full'), (4, 33, 'full')])
def test_with_exact_hops_the_exact_segment_map_has_zero_loss(S, T, kind):
    """Terminal edges and the pin are left out: their references are the denoised image and a many-step solution."""
    gaussian = Gaussian(VARIANCE)
    loss = make_loss(gaussian, S=S, T_start=T, T_end=T, student_grid=kind, hop=gaussian.solve)
    student = exact_student(gaussian, loss.student)
    generator = torch.Generator().manual_seed(1)
    y, noise = torch.randn(2, 1, 1, 2, 2, generator=generator, dtype=torch.float64)
    x_t, x_star, edges = targets(loss, student, y, noise)
    error = (student(x_t, edges.sigma_t) - x_star).abs().flatten(1).amax(dim=1)
    assert error[edges.kind != ops.TERMINAL].max() < 1e-10


def discrete_multipliers(loss, hop):
    """c of docs/method.md in closed form: the multiplier of x from each edge's upper end to its boundary, [T', 1, 2, 2], and its edges."""
    edges = all_rows(loss).edges
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


def expected_gradients(loss, c, edges):
    """E[(prediction − x*) x_t] on every edge and eigenvalue, in closed form.

    All is linear in (y, noise), so that probing with each alone gives the coefficients, and E[y²] = variance, E[noise²] = 1.
    """
    table = dict(zip(edges.sigma_t.tolist(), c))
    student = LinearStudent(
        loss.student, lambda sigma, sigma_b: torch.stack([table[s] for s in sigma.tolist()])
    )
    one, zero = torch.ones(1, 1, 2, 2, dtype=torch.float64), torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    gradient = 0
    for y, noise, second_moment in ((one, zero, VARIANCE), (zero, one, torch.ones_like(VARIANCE))):
        x_t, x_star, _ = targets(loss, student_on(student, edges), y, noise)
        gradient = gradient + second_moment * (student(x_t, edges.sigma_t) - x_star) * x_t
    return gradient / (VARIANCE + ops.expand_like(edges.sigma_t, VARIANCE.expand(len(c), 1, 2, 2)) ** 2)


def student_on(student, edges):
    """The student as a self-target: asked at lower ends, which are upper ends of the next edge, except where nobody looks."""
    known = set(edges.sigma_t.tolist())

    class Lenient(LinearStudent):
        def forward(self, x, sigma, class_labels=None, dropout_masks=None):
            stand_in = torch.tensor(
                [s if s in known else float(edges.sigma_t[0]) for s in sigma.tolist()], dtype=torch.float64
            )
            return student(x, stand_in)

    return Lenient(student.grid, None)


def assert_stationary_there_alone(loss, c, edges, rounding=1e-10):
    """The expected gradient vanishes for the multipliers c, and on no edge for one that is 1 % off."""
    assert expected_gradients(loss, c, edges).abs().max() < rounding
    for k in range(len(edges)):
        wrong = c.clone()
        wrong[k] *= 1.01
        assert expected_gradients(loss, wrong, edges)[k].abs().max() > 1e-6, k


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
    assert_stationary_there_alone(loss, *discrete_multipliers(loss, hop))


def boundary_multiplier(loss, value):
    """What the loss's own references x_b hold of x_t, by regression, [T', 1, 2, 2], for a student that multiplies by `value` everywhere."""
    student = LinearStudent(
        loss.student, lambda sigma, sigma_b: torch.full([1, 1, 1, 1], value, dtype=torch.float64)
    )
    one, zero = torch.ones(1, 1, 2, 2, dtype=torch.float64), torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    moment, square = 0, 0
    for y, noise, second_moment in ((one, zero, VARIANCE), (zero, one, torch.ones_like(VARIANCE))):
        x_t, x_star, edges = targets(loss, student, y, noise)
        moment = moment + second_moment * ops.ddim_step(x_t, x_star, edges.sigma_t, edges.sigma_b) * x_t
        square = square + second_moment * x_t**2
    return moment / square


def multipliers_of_targets(loss):
    """c read off the loss's own targets: they are affine in what the student says at the lower end, which is the next edge's upper one."""
    offset, full = (boundary_multiplier(loss, value) for value in (0.0, 1.0))
    edges, c = all_rows(loss).edges, torch.zeros_like(offset)
    for k in reversed(range(len(c))):
        c[k] = offset[k] + (full - offset)[k] * (c[k + 1] if edges.kind[k] == ops.GENERAL else 0)
    return c, edges


@pytest.mark.parametrize('hop, order', [('ddim', 1), ('heun', 2)])
def test_the_discrete_consistency_function_converges_at_the_hops_order(hop, order):
    """Twice the edges divide the distance to the exact map sqrt((s² + sigma_b²) / (s² + sigma_t²)) by about 2**order.

    At the top of the first segment, where all of its edges' errors add up."""
    errors = []
    for T in (128, 256, 512):
        loss = make_loss(Gaussian(VARIANCE), S=2, T_start=T, T_end=T, student_grid='full', hop=hop)
        c, edges = multipliers_of_targets(loss)
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
        x_t, x_star, edges = targets(loss, exact_student(gaussian, loss.student), y, noise)
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
    _, x_star, edges = targets(loss, exact_student(gaussian, loss.student), y, noise)
    terminal = edges.kind == ops.TERMINAL
    torch.testing.assert_close(x_star[terminal], y.expand(int(terminal.sum()), -1, -1, -1))


@pytest.mark.parametrize('S', [1, 4])
def test_the_pinned_edge_follows_the_teacher_alone(S):
    """Whatever the student says, the first edge's target leads to the teacher's own solution at the boundary."""
    gaussian = Gaussian(VARIANCE)
    y, noise = torch.randn(2, 1, 1, 2, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    loss = make_loss(gaussian, S=S, terminal_anchor=True)
    nonsense = LinearStudent(
        loss.student, lambda sigma, sigma_b: torch.full([1, 1, 1, 1], 7.0, dtype=torch.float64)
    )
    x_t, x_star, edges = targets(loss, nonsense, y, noise)
    x_b = ops.ddim_step(x_t[:1], x_star[:1], edges.sigma_t[:1], edges.sigma_b[:1])
    exact = gaussian.solve(x_t[:1], edges.sigma_t[0], edges.sigma_b[0])
    assert ((x_b / exact - 1).abs()).max() < (1e-3 if S > 1 else 3e-2)


class Recorder(torch.nn.Module):
    """A student that remembers what it was given."""

    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, []

    def forward(self, x, sigma, labels=None, dropout_masks=None):
        self.calls.append((sigma, dropout_masks))
        return self.net(x, sigma, labels, dropout_masks=dropout_masks)

    def dropout_masks(self, batch_size, generator=None):
        return self.net.dropout_masks(batch_size, generator)


def small_network(dropout=0.5, **kwargs):
    torch.manual_seed(0)
    return networks.EDMPrecond(
        8,
        1,
        0,
        model_channels=16,
        channel_mult=[1, 2],
        num_blocks=1,
        attn_resolutions=[],
        dropout=dropout,
        **kwargs,
    ).train()


def general_samples(loss, draws):
    """Indices of the samples on general edges, pinned ones left out."""
    index, edges = loss.draw(draws, torch.device('cpu')).index, all_rows(loss).edges
    return ((edges.kind[index] == ops.GENERAL) & ~(loss.pin_top & (index == 0))).nonzero().flatten()


@pytest.mark.parametrize('sync', [True, False])
def test_both_passes_see_the_same_masks_exactly_where_dropout_is_synchronized(sync):
    """The self-target those of its own samples."""
    student, draws = Recorder(small_network()).train(), SampleDraws(0, 0, 16)
    loss = make_loss(small_network(0).eval(), sync_dropout=sync)
    loss(student, torch.zeros(16, 1, 8, 8), None, draws)
    (_, first), (_, second) = student.calls
    rows = general_samples(loss, draws)
    assert len(first) == len(second) > 4 and 4 < len(rows) < 16
    assert all(torch.equal(first[name], second[name][rows]) for name in first) == sync


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
    student, draws = Recorder(small_network()).train(), SampleDraws(0, 0, 64)
    loss = make_loss(small_network(0).eval(), T_start=16, T_end=16)
    loss(student, torch.zeros(64, 1, 8, 8), None, draws)
    (lower, _), (upper, _) = student.calls
    edges = all_rows(loss).edges
    index = (edges.sigma_t[None] == upper[:, None]).int().argmax(dim=1)
    assert torch.equal(lower, edges.sigma_s[index][general_samples(loss, draws)])
    assert len(index.unique()) > 5


def test_gradients_reach_the_student_alone_and_the_loss_does_not_depend_on_how_the_batch_is_split():
    student, teacher = small_network(0).double(), small_network(0).double().eval().requires_grad_(False)
    torch.nn.init.normal_(student.model.out_conv.weight, std=0.1)
    images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = make_loss(teacher, terminal_anchor=True, cd_loss='pseudo_huber', cd_weight_mode='sqrt_karras')
    whole = loss(student, images, None, SampleDraws(7, 1000, 64))
    parts = [loss(student, images[a : a + 16], None, SampleDraws(7, 1000 + a, 16)) for a in range(0, 64, 16)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-9, atol=1e-9)
    whole.sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert sum(p.grad.abs().sum() for p in student.parameters()) > 0


def test_edges_are_drawn_with_their_probabilities():
    """20,000 draws: every frequency within 5 standard deviations."""
    loss = make_loss(Gaussian(VARIANCE), terminal_anchor=True)
    student = LinearStudent(loss.student, lambda sigma, sigma_b: torch.zeros(1, 1, 1, 1, dtype=torch.float64))
    seen = []
    student.forward = lambda x, sigma, labels=None, dropout_masks=None, **_: seen.append(sigma) or x.double()
    count = 20_000
    loss(student, torch.zeros(count, 1, 2, 2), None, SampleDraws(0, 0, count))
    edges = all_rows(loss).edges
    index = (edges.sigma_t[None] == seen[-1][:, None]).int().argmax(dim=1)
    frequency = torch.bincount(index, minlength=len(edges)) / count
    teacher = torch.cat([edges.sigma_t, torch.zeros(1, dtype=torch.float64)])
    p = ops.edge_probabilities(teacher, loss.student, 'edm', 7, True, pin_top=True)
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / count).sqrt()).all()


def test_edge_statistics_are_reported():
    training_stats.reset()
    loss = make_loss(small_network(0).eval(), S=2, terminal_anchor=True)
    per_image = loss(small_network(0), torch.zeros(256, 1, 8, 8), None, SampleDraws(0, 0, 256))
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
        lengths.append(len(all_rows(loss).edges))
    assert 16 <= lengths[0] < 20 and 32 <= lengths[1] < 36 and 64 <= lengths[2] < 68


# ----------------------------------------------------------------------------
# Parts of a batch: evaluations of those samples alone that need them.

PARTITIONED = {
    'defaults': dict(terminal_anchor=True),
    'tops': dict(terminal_anchor=True, keep_ties=True, top_mass=0.5),
    'to the data': dict(terminal_anchor=True, terminal_teacher_hop=False, hop='ddim'),
    'addim without a pin': dict(hop='addim', student_grid='full', T_start=6, T_end=6),
    'one segment': dict(S=1, terminal_anchor=True, anchor_hops=3, top_mass=0.5, keep_ties=True),
    'no general edge': dict(S=4, T_start=4, T_end=4, student_grid='full', sampling_mode='uniform'),
}


def reference_of_everyone(loss, net, y, noise, edges, masks):
    """x_b as docs/method.md has it, every network asked for every sample, and then what each sample needs is chosen."""
    sigma_t, sigma_s, kind, pinned = (
        edges.sigma_t,
        edges.sigma_s,
        ops.expand_like(edges.kind, y),
        ops.expand_like(edges.index == 0, y) > 0,
    )
    x_t, teacher = y + ops.expand_like(sigma_t, y) * noise, lambda x, sigma: loss.teacher(x, sigma).double()
    denoised = teacher(x_t, sigma_t)
    x_s = dict(
        heun=lambda: ops.heun_hop(teacher, x_t, sigma_t, sigma_s),
        ddim=lambda: ops.ddim_step(x_t, denoised, sigma_t, sigma_s),
        addim=lambda: ops.addim_hop(
            x_t, denoised, sigma_t, sigma_s, ops.addim_variance(denoised, sigma_t, y, loss.xvar_frac)
        ),
    )[loss.hop]()
    x_b = ops.ddim_step(x_s, net(x_s, sigma_s, dropout_masks=masks).double(), sigma_s, edges.sigma_b)
    x_b = torch.where(
        kind == ops.GENERAL,
        x_b,
        torch.where(kind == ops.SNAP, x_s, denoised if loss.terminal_teacher_hop else y),
    )
    return torch.where(pinned, ops.solve_ode(teacher, x_t, loss.anchor_levels), x_b) if loss.pin_top else x_b


@pytest.mark.parametrize('few_sizes', [False, True])
@pytest.mark.parametrize('name', PARTITIONED)
def test_the_reference_is_that_of_a_batch_of_which_every_network_is_asked_for_everyone(name, few_sizes):
    """With dropout, in FP64: to rounding, 1e-9 of numbers up to 80."""
    student, teacher = small_network().double(), small_network(0).double().eval()
    for net in (student, teacher):
        torch.nn.init.normal_(net.model.out_conv.weight, std=0.1)
    loss = make_loss(teacher, **PARTITIONED[name])
    loss.few_sizes, draws = few_sizes, SampleDraws(3, 0, 64)
    edges, noise = loss.draw(draws, torch.device('cpu')), draws.normal('noise', [1, 8, 8]).double()
    y = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    masks = student.dropout_masks(64, torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = loss.reference(
            student, Pairs(y, noise, y + ops.expand_like(edges.sigma_t, y) * noise, edges, masks=masks)
        )
        torch.testing.assert_close(
            got, reference_of_everyone(loss, student, y, noise, edges, masks), rtol=0, atol=1e-9
        )
    assert len(edges.kind.unique()) > 1


def asked_for(loss, few_sizes):
    """Sizes of the batches of 64 samples that the teacher and the student's self-target are asked for, and how many samples are of each kind."""
    sizes, loss.few_sizes = {'teacher': [], 'student': []}, few_sizes
    counting = lambda who: lambda x, sigma, labels=None, **_: sizes[who].append(len(x)) or x.double() / 2
    loss.teacher = counting('teacher')
    edges = loss.draw(SampleDraws(3, 0, 64), torch.device('cpu'))
    kinds = torch.bincount(torch.from_numpy(all_rows(loss).kinds)[edges.index], minlength=4).tolist()
    x = torch.ones(64, 1, 2, 2, dtype=torch.float64)
    loss.reference(counting('student'), Pairs(x, x, x, edges))
    return sizes, dict(zip((*ops.KIND_NAMES, 'pinned'), kinds))


def test_an_evaluation_is_of_the_samples_that_need_it():
    """Of all the teacher's first, which is the pinned samples' first too; four sub-steps above 0 have seven more."""
    sizes, kinds = asked_for(
        make_loss(None, terminal_anchor=True, keep_ties=True, top_mass=0.5, anchor_hops=4), few_sizes=False
    )
    assert min(kinds.values()) > 0
    assert sizes['teacher'] == [64, kinds['general'] + kinds['snap']] + [kinds['pinned']] * 7 and sizes[
        'student'
    ] == [kinds['general']]


def test_a_batch_without_general_samples_asks_no_self_target():
    sizes, kinds = asked_for(make_loss(None, **PARTITIONED['no general edge']), few_sizes=False)
    assert kinds['general'] == 0 and sizes['student'] == [] and sizes['teacher'] == [64, kinds['snap']]


@pytest.mark.parametrize('few_sizes', [False, True])
def test_nobody_is_no_part_even_of_a_batch_of_one(few_sizes):
    nobody, everybody = np.zeros(1, bool), np.ones(1, bool)
    assert split_batch(dict(a=nobody, b=everybody), torch.device('cpu'), few_sizes) == dict(b=EVERYONE)


def test_networks_that_are_compiled_see_few_sizes_of_batches():
    """Powers of two up to an eighth of a batch, eighths above it; every count fits; at most twice as many are asked for, or an eighth more.
    Never one, for which the compiler would run apart."""
    for batch in (1, 2, 7, 64, 100, 128):
        sizes = [padded_size(count, batch) for count in range(1, batch + 1)]
        assert len(set(sizes)) <= 8 + math.log2(batch) and sizes[-1] == batch
        assert sizes[0] == min(2, batch)
        assert all(
            count <= size <= min(max(2 * count - 1, count + -(-batch // 8)), batch)
            for count, size in enumerate(sizes, start=1)
        )
    sizes, kinds = asked_for(
        make_loss(None, terminal_anchor=True, keep_ties=True, top_mass=0.5), few_sizes=True
    )
    assert sizes['student'] == [padded_size(kinds['general'], 64)] and sizes['student'] != [kinds['general']]
