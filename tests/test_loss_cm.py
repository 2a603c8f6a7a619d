"""Consistency models and improved consistency training against Gaussian data, the published schedules, and
their formulas."""

import copy
import io
import itertools
import math

import pytest
import torch
from gaussian import Gaussian
from losses import VARIANCE, EveryEdge, Loss, Recorder, small_network, targets

from metrics.lpips import LPIPS
from torch_utils import training_stats
from torch_utils.flat import FlatParameters
from training import consistency_ops as ops
from training import networks
from training.objectives import OBJECTIVES
from training.rng import SampleRng

CM = dict(N=12, schedule_nimg=1000, mu0=0.0, cm_loss='l2')
SMALLEST = 0.002


def distillation(teacher, hop='heun', **options):
    return Loss('cm-cd', teacher, **{**CM, 'hop': hop, **options})


def plain_training(**options):
    return Loss('cm-ct', **{**CM, **options})


def improved(**options):
    return Loss('ict', **{'schedule_nimg': 1600, 'batch_size': 2, **options})


def make(kind, **options):
    """`heun`, `ddim`: distillation of Gaussian data by such hops; `data`: training; `ict`: at its first
    stage, 10 edges."""
    if kind == 'ict':
        return improved(**options)
    return plain_training(**options) if kind == 'data' else distillation(Gaussian(VARIANCE), kind, **options)


# ----------------------------------------------------------------------------
# The discrete consistency function of Gaussian data.


class Linear(torch.nn.Module):
    """D(x; sigma) = c(sigma) x, for the noise levels of a grid."""

    def __init__(self, sigmas, c):
        super().__init__()
        self.c = dict(zip(sigmas.tolist(), c))

    def forward(self, x, sigma, class_labels=None, dropout_masks=None):
        return torch.stack([self.c[s] for s in sigma.tolist()]) * x


def discrete_multipliers(loss, kind):
    """c at each of the grid's levels, [N, 1, 2, 2], and these: 1 at sigma_min, and above it the hop's
    multiplier times the c of the lower end."""
    edges = loss.state.edges
    sigmas, c = [*edges.sigma_t.tolist(), SMALLEST], [torch.ones_like(VARIANCE[0])]
    slope = lambda sigma: sigma / (VARIANCE[0] + sigma**2)
    for upper, lower in reversed(list(itertools.pairwise(sigmas))):
        ddim = 1 + (lower - upper) * slope(upper)  # the data's hop has the same multiplier, on average
        heun = 1 + (lower - upper) * (slope(upper) + slope(lower) * ddim) / 2
        c.append((heun if kind == 'heun' else ddim) * c[-1])
    return torch.stack(c[::-1]), torch.tensor(sigmas, dtype=torch.float64)


def expected_gradients(loss, c, sigmas):
    """E[(prediction − x*) x_t] / E[x_t²] on every edge and eigenvalue: all is linear in (y, noise), so
    probing with each alone is enough."""
    student, gradient = Linear(sigmas, c), 0
    one, zero = torch.ones(1, 1, 2, 2, dtype=torch.float64), torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    for y, noise, moment in ((one, zero, VARIANCE), (zero, one, torch.ones_like(VARIANCE))):
        x_t, x_star, edges = targets(loss, student, y, noise)
        gradient = gradient + moment * (student(x_t, edges.sigma_t) - x_star) * x_t
    return gradient / (VARIANCE + ops.expand_like(sigmas[:-1], gradient) ** 2)


@pytest.mark.parametrize('kind', ['heun', 'ddim', 'data', 'ict'])
def test_the_discrete_consistency_function_has_zero_expected_gradient_and_a_perturbed_one_has_not(kind):
    """On every edge, the one that ends at sigma_min included, where c = 1 is the network's boundary
    condition. A c that is 1 % off at one level is felt on the edges above and below it."""
    loss = make(kind, **(dict(c=1e12) if kind == 'ict' else {}))  # of a quadratic distance
    c, sigmas = discrete_multipliers(loss, kind)
    assert expected_gradients(loss, c, sigmas).abs().max() < 1e-10
    for k in range(len(c)):
        wrong = c.clone()
        wrong[k] *= 1.01
        gradients = expected_gradients(loss, wrong, sigmas).abs().flatten(1).amax(dim=1)
        assert (gradients > 1e-7).nonzero().flatten().tolist() == [
            edge for edge in (k - 1, k) if 0 <= edge < len(gradients)
        ]


def multipliers_of_targets(loss):
    """c at the upper ends of edges, read off the own targets of a loss by regression on x_t: affine in what
    the network says at the lower end."""
    one, zero = torch.ones(1, 1, 2, 2, dtype=torch.float64), torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    coefficients = []
    for value in (0.0, 1.0):
        moment, square = 0, 0
        for y, noise, second_moment in ((one, zero, VARIANCE), (zero, one, torch.ones_like(VARIANCE))):
            x_t, x_star, _ = targets(loss, lambda x, *_, value=value, **__: value * x, y, noise)
            moment, square = moment + second_moment * x_star * x_t, square + second_moment * x_t**2
        coefficients.append(moment / square)
    offset, full = coefficients
    c = [torch.ones_like(VARIANCE[0])]  # at sigma_min
    for k in reversed(range(len(offset))):
        c.append(offset[k] + (full - offset)[k] * c[-1])
    return torch.stack(c[:0:-1])


@pytest.mark.parametrize('kind, order', [('ddim', 1), ('data', 1), ('heun', 2)])
def test_it_converges_to_the_exact_map_at_the_hops_order(kind, order):
    """sqrt((s² + sigma_min²) / (s² + sigma_max²)) at the top, where the errors of all edges add up: twice the
    edges, 2**order less."""
    exact = ((VARIANCE[0] + SMALLEST**2) / (VARIANCE[0] + 80.0**2)).sqrt()
    errors = [(multipliers_of_targets(make(kind, N=N))[0] / exact - 1).abs().max() for N in (257, 513, 1025)]
    ratios = [a / b for a, b in itertools.pairwise(errors)]
    assert all(0.85 * 2**order < r < 1.15 * 2**order for r in ratios), ratios


def test_addim_hops_are_the_engines():
    """x* of the identity network is where the hop leads: DDIM's direction, lengthened by what 3/4 of |y − D|²
    calls for."""
    y, noise = torch.randn(2, 1, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = distillation(Gaussian(VARIANCE), 'addim')
    x_t, x_star, edges = targets(loss, lambda x, *_, **__: x, y, noise)
    sigma_t, sigma_s, D = edges.sigma_t, edges.sigma_s, Gaussian(VARIANCE)(x_t, edges.sigma_t)
    e = (x_t - D) / ops.expand_like(sigma_t, D)
    length = (
        sigma_s**2
        + (1 - sigma_s / sigma_t) ** 2
        * 0.75
        * (y - D).square().sum(dim=(1, 2, 3))
        / e.square().sum(dim=(1, 2, 3))
    ).sqrt()
    torch.testing.assert_close(x_star, D + ops.expand_like(length, D) * e, rtol=1e-9, atol=1e-9)


# ----------------------------------------------------------------------------
# The boundary, and what separates these from multistep models.


def random_network(boundary, dropout=0.0):
    torch.manual_seed(0)
    net = networks.EDMPrecond(
        8,
        1,
        0,
        model_channels=8,
        channel_mult=[1],
        num_blocks=1,
        attn_resolutions=[],
        dropout=dropout,
        boundary=boundary,
    )
    for parameter in net.parameters():  # zero-initialized layers would hide the rest
        torch.nn.init.normal_(parameter, std=0.1)
    return net.double().train()


def digits_like(count, seed=0):
    return (
        torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    )


@pytest.mark.parametrize('kind', ['heun', 'data', 'ict'])
def test_on_the_last_edge_the_target_is_where_the_hop_leads_whatever_the_weights(kind):
    """There the network is asked at sigma_min, where it is the identity, and on no other edge."""
    teacher, (y, noise) = random_network(0).eval(), digits_like(2).split(1)
    loss = dict(heun=lambda: distillation(teacher), data=plain_training, ict=lambda: improved(c=1e12))[kind]()
    x_t, x_star, edges = targets(loss, random_network(SMALLEST), y, noise)
    hopped = y + ops.expand_like(edges.sigma_s, x_t) * noise
    if kind == 'heun':
        with torch.no_grad():
            hopped = ops.heun_hop(lambda x, sigma: teacher(x, sigma), x_t, edges.sigma_t, edges.sigma_s)
    torch.testing.assert_close(x_star[-1], hopped[-1], rtol=1e-12, atol=1e-12)
    assert (x_star[:-1] - hopped[:-1]).abs().flatten(1).amax(dim=1).min() > 1e-6


def test_away_from_zero_one_step_multistep_distillation_is_distillation_of_a_consistency_model():
    """With EDM's boundary at 0, N = T, mu = 0, no pin and the same sum over values: on each of the T − 1
    edges that do not end at 0."""
    teacher, student, images = random_network(0).eval(), random_network(0), digits_like(32)
    options = dict(S=1, T_start=12, T_end=12, T_anneal_kimg=0, sampling_mode='uniform', terminal_anchor=False)
    multistep = Loss('mcd', teacher, cd_loss='l2', cd_weight_mode='flat', **options)
    ours = distillation(teacher)
    theirs, own = multistep.state.edges, ours.state.edges
    assert theirs.kind[-1] == ops.TERMINAL
    for column in ('sigma_t', 'sigma_s', 'sigma_b', 'kind'):
        assert torch.equal(getattr(theirs, column)[:-1], getattr(own, column))

    index, noise = torch.arange(32) % len(own), digits_like(32, seed=1)
    a, b = (loss(student, images, None, EveryEdge(loss.state, noise, index)) for loss in (multistep, ours))
    torch.testing.assert_close(a, 64 * b, rtol=1e-10, atol=0)
    assert b.min() > 0


# ----------------------------------------------------------------------------
# Grids, draws and schedules.


@pytest.mark.parametrize(
    'name, s1, mu0, schedule', [('adaptive', 150, 0.9, 'adaptive'), ('fixed', 200, 0.95, 'fixed')]
)
def test_schedules_equal_the_published_ones(family, name, s1, mu0, schedule):
    """Columns: target decay, N; 800,000 steps, here of 512 images."""
    loss = plain_training(N=None, s0=2, s1=s1, schedule_nimg=800_000 * 512, mu0=mu0, mu_schedule=schedule)
    seen = set()
    for k, (mu, N) in zip(family['openai.steps'].tolist(), family[f'openai.progressive_{name}'].tolist()):
        loss.begin_step(k * 512)
        assert loss.state.stage == N and math.isclose(loss.state.mu, mu, rel_tol=1e-12)
        seen.add(N)
    assert len(seen) > 5


def test_a_given_grid_stays_and_so_does_its_decay():
    loss = plain_training(N=18, mu0=0.95)
    for nimg in (0, 500, 10**6):
        loss.begin_step(nimg)
        assert (loss.state.stage, loss.state.mu, len(loss.state.edges)) == (18, 0.95, 17)


@pytest.mark.parametrize('loss', [plain_training(N=None), improved()], ids=['cm', 'ict'])
def test_the_grid_follows_the_schedule_from_sigma_max_to_sigma_min(loss):
    sizes = []
    for nimg in (0, 700, 1600):
        loss.begin_step(nimg)
        edges = loss.state.edges
        assert (edges.sigma_t[0], edges.sigma_s[-1]) == (80.0, SMALLEST)
        torch.testing.assert_close(
            edges.sigma_t, ops.karras_sigmas(loss.state.stage, SMALLEST, 80, 7)[:-1], rtol=0, atol=0
        )
        assert torch.equal(edges.sigma_s[:-1], edges.sigma_t[1:]) and (edges.sigma_b == 0).all()
        sizes.append(len(edges))
    assert sizes[0] < sizes[1] < sizes[2] and sizes[2] == loss.state.c.s1


def test_improved_training_doubles_its_grid_in_stages_of_whole_steps():
    """800 steps of 2 images, 8 stages: 100 steps each. An image less is a step less."""
    loss, stages = improved(), {}
    for nimg in range(1602):
        loss.begin_step(nimg)
        stages.setdefault(loss.state.stage, []).append(nimg)
    assert list(stages) == [10 * 2**i + 1 for i in range(8)]
    assert [seen[0] for seen in stages.values()] == list(range(0, 1600, 200))


@pytest.mark.parametrize('kind', ['data', 'ict'])
def test_edges_are_drawn_with_their_probabilities(kind):
    """20,000 draws: within 5 standard deviations of equal shares of 11 edges; iCT's are the log-normal's mass
    between the ends of 10."""
    loss, count = make(kind), 20_000
    drawn = loss.state.draw(SampleRng(0, 0, count))
    edges = loss.state.edges
    p = torch.full([11], 1 / 11, dtype=torch.float64)
    if kind == 'ict':
        normal = torch.distributions.Normal(torch.tensor(-1.1, dtype=torch.float64), 2.0)
        p = normal.cdf(edges.sigma_t.log()) - normal.cdf(edges.sigma_s.log())
        p = p / p.sum()
    frequency = torch.bincount(drawn.index, minlength=len(p)) / count
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / count).sqrt()).all()
    assert torch.equal(drawn.sigma_t, edges.sigma_t[drawn.index]) and torch.equal(
        drawn.sigma_s, edges.sigma_s[drawn.index]
    )


def test_the_number_of_edges_is_reported():
    training_stats.reset()
    plain_training(N=18)(small_network(0), torch.zeros(32, 1, 8, 8), None, SampleRng(0, 0, 32))
    stats = training_stats.collect()
    assert stats['Edges/T']['mean'] == 17 and stats['Edges/general']['mean'] == 1


# ----------------------------------------------------------------------------
# Metrics and weights: the whole loss, recomputed.


def recompute(loss, distance, weight):
    """A loss's values for 16 images, and weight(sigma_t, sigma_s) · distance(D(x_t), D(x_s)) from what the
    network was asked."""
    net, images, rng = random_network(SMALLEST), digits_like(16), SampleRng(3, 0, 16)
    student = Recorder(net).train()
    got = loss(student, images, None, rng)
    (sigma_s, _), (sigma_t, _) = student.calls
    at = lambda sigma: net(images + ops.expand_like(sigma, images) * rng.normal('noise', [1, 8, 8]), sigma)
    return got, weight(sigma_t, sigma_s) * distance(at(sigma_t), at(sigma_s))


def huber(c):
    return lambda a, b: ((a - b).square().sum(dim=(1, 2, 3)) + c**2).sqrt() - c


@pytest.mark.parametrize(
    'cm_loss, distance',
    [
        ('l1', lambda a, b: (a - b).abs().mean(dim=(1, 2, 3))),
        ('l2', lambda a, b: (a - b).square().mean(dim=(1, 2, 3))),
        ('pseudo_huber', huber(0.00054 * 8)),
        ('lpips', lambda a, b: 3 * (a - b).amax(dim=(1, 2, 3))),
    ],
)
def test_losses_of_consistency_models_are_their_metric_with_weight_one(cm_loss, distance):
    """0.00054 √64 = 0.00054 · 8. The perceptual distance stands for another, which is not symmetric."""
    loss = plain_training(cm_loss=cm_loss, perceptual=distance if cm_loss == 'lpips' else None)
    got, expected = recompute(loss, distance, lambda sigma_t, sigma_s: 1)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert len(got.unique()) == 16


@pytest.mark.parametrize('c', [None, 0.06])
def test_improved_trainings_loss_is_the_pseudo_huber_distance_over_the_gap(c):
    got, expected = recompute(
        improved(c=c), huber(c or 0.00054 * 8), lambda sigma_t, sigma_s: 1 / (sigma_t - sigma_s)
    )
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_lpips_trains_the_student_and_not_itself():
    torch.manual_seed(1)
    net, perceptual = random_network(SMALLEST), LPIPS(resolution=16)
    plain_training(cm_loss='lpips', perceptual=perceptual)(
        net, digits_like(2), None, SampleRng(0, 0, 2)
    ).sum().backward()
    assert (
        all(p.grad.isfinite().all() for p in net.parameters())
        and sum(p.grad.abs().sum() for p in net.parameters()) > 0
    )
    assert all(p.grad is None for p in perceptual.parameters())


@pytest.mark.parametrize(
    'make_one',
    [plain_training, improved, lambda: distillation(random_network(0).eval().requires_grad_(False))],
    ids=['cm-ct', 'ict', 'cm-cd'],
)
def test_losses_do_not_depend_on_how_the_batch_is_split(make_one):
    net, images, loss = random_network(SMALLEST), digits_like(32), make_one()
    whole = loss(net, images, None, SampleRng(7, 1000, 32))
    parts = [loss(net, images[a : a + 16], None, SampleRng(7, 1000 + a, 16)) for a in range(0, 32, 16)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-9, atol=1e-9)


# ----------------------------------------------------------------------------
# The target network.


def vector(net):
    return torch.nn.utils.parameters_to_vector(net.parameters()).detach().clone()


def test_the_target_network_follows_mu_of_the_step_exactly():
    """Twelve steps with known weights: target <- mu target + (1 − mu) weights, mu = exp(2 ln 0.9 / (N − 1)),
    N by the published formula."""
    net = random_network(SMALLEST)
    weights, loss = FlatParameters(net).weights, plain_training(net=net, N=None, mu0=0.9, schedule_nimg=1200)
    expected, decays = vector(net), []
    for step in range(12):
        loss.begin_step(100 * step)
        with torch.no_grad():
            weights.copy_(
                torch.randn(weights.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            )
        loss.state.end_step()
        N = max(math.ceil(math.sqrt(step / 12 * (151**2 - 4) + 4) - 1), 1) + 1
        decays.append(math.exp(2 * math.log(0.9) / (N - 1)))
        expected = decays[-1] * expected + (1 - decays[-1]) * vector(net)
    assert decays[0] < decays[5] < decays[-1] and decays[0] == pytest.approx(0.81), 'from s0 = 2 nodes on'
    torch.testing.assert_close(vector(loss.state.target), expected, rtol=0, atol=1e-12)


def test_a_fixed_decay_forgets_the_first_weights_geometrically():
    """After n steps at constant weights w: mu^n w_0 + (1 − mu^n) w."""
    net = random_network(SMALLEST)
    weights, loss = FlatParameters(net).weights, plain_training(net=net, N=18, mu0=0.95)
    first = vector(net)
    with torch.no_grad():
        weights.mul_(-2)
    for step in range(20):
        loss.begin_step(step)
        loss.state.end_step()
    torch.testing.assert_close(
        vector(loss.state.target), first * (0.95**20 - 2 * (1 - 0.95**20)), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize('mu0', [0.0, 0.9])
def test_the_target_is_the_target_networks_answer_which_is_the_network_itself_without_decay(mu0):
    net = random_network(SMALLEST)
    before, weights, loss = copy.deepcopy(net), FlatParameters(net).weights, plain_training(net=net, mu0=mu0)
    with torch.no_grad():
        weights.mul_(1.5)
    y, noise = digits_like(2).split(1)
    x_t, x_star, edges = targets(loss, net, y, noise)
    answers, x_s = before if mu0 else net, y + ops.expand_like(edges.sigma_s, x_t) * noise
    with torch.no_grad():
        torch.testing.assert_close(x_star, answers(x_s, edges.sigma_s), rtol=1e-12, atol=1e-12)
    assert bool(loss.state.state_dict()) == (mu0 > 0) and (loss.state.target is None) == (mu0 == 0)


@pytest.mark.parametrize('sync', [True, False])
@pytest.mark.parametrize('mu0', [0.0, 0.9])
def test_the_target_sees_the_students_masks_exactly_where_dropout_is_synchronized(mu0, sync):
    student = Recorder(random_network(SMALLEST, dropout=0.5)).train()
    loss = plain_training(net=student, mu0=mu0, sync_dropout=sync)
    loss(student, digits_like(16), None, SampleRng(0, 0, 16))
    target = loss.state.target
    calls = student.calls if target is None else target.calls + student.calls
    (_, first), (_, second) = calls
    assert len(first) == len(second) > 3
    assert all(torch.equal(first[name], second[name]) for name in first) == sync


def test_gradients_reach_the_student_alone():
    net = random_network(SMALLEST)
    loss = distillation(random_network(0).eval().requires_grad_(False), net=net, mu0=0.9)
    loss(net, digits_like(16), None, SampleRng(0, 0, 16)).sum().backward()
    assert sum(p.grad.abs().sum() for p in net.parameters()) > 0
    assert all(p.grad is None for p in [*loss.state.target.parameters(), *loss.state.teacher.parameters()])


def steps(first, last, state=None):
    """Plain gradient descent under cm-ct from step to step; what a training state holds of it."""
    net = random_network(SMALLEST, dropout=0.2).float()
    loss = plain_training(net=net, N=None, mu0=0.9, schedule_nimg=160)
    weights = FlatParameters(net).weights
    if state is not None:
        net.load_state_dict(state['net'])
        loss.state.load_state_dict(state['loss'])
    for step in range(first, last):
        loss.begin_step(16 * step)
        weights.grad.zero_()
        loss(net, digits_like(16, seed=step).float(), None, SampleRng(0, 16 * step, 16)).mean().backward()
        with torch.no_grad():
            weights.sub_(0.1 * weights.grad)
        loss.state.end_step()
    file = io.BytesIO()
    torch.save(dict(net=net.state_dict(), loss=loss.state.state_dict()), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_not_stopped():
    whole, resumed = steps(0, 6), steps(3, 6, steps(0, 3))
    for part in ('net', 'target'):
        a, b = (state['net'] if part == 'net' else state['loss']['target'] for state in (whole, resumed))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(
        whole['net']['model.map_layer0.weight'], whole['loss']['target']['model.map_layer0.weight']
    )


# ----------------------------------------------------------------------------
# Options.


@pytest.mark.parametrize('name', ['cm-cd', 'cm-ct', 'ict'])
def test_these_networks_are_the_identity_at_sigma_min(name):
    assert OBJECTIVES[name].boundary and name == OBJECTIVES[name].module().NAME


@pytest.mark.parametrize(
    'options',
    [
        dict(cm_loss='huber'),
        dict(mu_schedule='linear'),
        dict(mu0=1.0),
        dict(mu0=-0.1),
        dict(N=1),
        dict(cm_loss='lpips'),
        dict(perceptual=huber(1.0)),
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(ValueError, match=r'is not one of|do not hold'):
        plain_training(**options)
    with pytest.raises(ValueError, match='is not one of'):
        distillation(None, 'midpoint')
