"""Flow maps against Gaussian data: their pairs of levels, targets by hops and by stored solutions, the store, and
sampling in any number of steps."""

import itertools

import pytest
import torch
from gaussian import Gaussian
from helpers import TINY_NETWORK, assert_one_clear_error, invoke
from losses import VARIANCE, EveryEdge, Loss, target

import convert
import generate
import train
from dnnlib import UserError
from training import consistency_ops as ops
from training import networks, samplers, segment_solvers
from training.checkpoint import load_network, save_snapshot
from training.objectives.loss_flowmap import FlowMapConfig, flow_map_pairs
from training.objectives.trajectories import GROUPS, TrajectoryStore
from training.rng import SampleRng

OPTIONS = dict(steps=[1, 2, 4], T=8, pool=3, reuse=5, batch_size=8, cd_loss='l2', cd_weight_mode='flat')
GAUSSIAN = Gaussian(VARIANCE)


def make_loss(teacher=GAUSSIAN, **options):
    return Loss('flowmap', teacher, **{**OPTIONS, 'target': 'hop', **options})


class FlowMap(torch.nn.Module):
    """The two-time student that moves x at sigma to multiplier(sigma, r) x at r."""

    two_time, img_channels, img_resolution, label_dim = True, 1, 2, 0

    def __init__(self, multiplier, label_dim=0):
        super().__init__()
        self.multiplier, self.calls, self.label_dim = multiplier, [], label_dim

    def forward(self, x, sigma, class_labels=None, dropout_masks=None, r=None):
        self.calls.append((x, sigma, class_labels, r))
        sigma, r = sigma.expand(len(x)), r.expand(len(x))
        moved = torch.cat([self.multiplier(s, e) for s, e in zip(sigma, r)]) * x
        return ops.inv_ddim(moved, x, sigma, r, check=False)

    def dropout_masks(self, batch_size, generator=None):
        return {}


EXACT = FlowMap(lambda sigma, r: ((VARIANCE + r**2) / (VARIANCE + sigma**2)).sqrt())


def sample_of_each(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, 1, 2, 2, generator=generator, dtype=torch.float64)


# ----------------------------------------------------------------------------
# Pairs of levels.


@pytest.mark.parametrize(
    'steps, T, share', [([1, 2, 4, 8], 16, 0.8), ([3], 6, 1.0), ([5, 1], 5, 0.3), ([1], 1, 0.5)]
)
def test_a_share_of_the_samples_is_on_the_steps_of_each_number_and_the_rest_on_all_pairs(steps, T, share):
    edges, probabilities, ends = flow_map_pairs(T, steps, share, 0.002, 80.0, 7.0)
    ops.check_edges(edges)
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)
    grid, known = ops.student_grid(T, 0.002, 80.0, 7.0, 'full'), T * (T + 1) // 2
    torch.testing.assert_close(torch.stack([edges.sigma_t, edges.sigma_b], 1), grid[ends], rtol=0, atol=0)
    assert torch.equal(edges.sigma_s, grid[ends[:, 0] + 1]) and len({*map(tuple, ends.tolist())}) == len(ends)

    # The steps that sampling takes, at its very levels up to rounding.
    for k, N in enumerate(steps):
        levels = ops.student_grid(N, 0.002, 80.0, 7.0, 'full')
        mine = edges.segment == k
        found = torch.stack([edges.sigma_t, edges.sigma_b], 1)[mine]
        torch.testing.assert_close(found, torch.stack([levels[:-1], levels[1:]], 1), rtol=1e-13, atol=0)
        expected = share / len(steps) / N + (1 - share) / known
        torch.testing.assert_close(probabilities[mine], torch.full([N], expected, dtype=torch.float64))
    assert len(edges) == (known if share < 1 else sum(steps))


def test_a_number_of_steps_that_is_not_on_the_grid_is_refused():
    with pytest.raises(ValueError, match='3 does not divide 8'):
        flow_map_pairs(8, [1, 3], 0.8, 0.002, 80.0, 7.0)


# ----------------------------------------------------------------------------
# Targets by hops.


def hop_targets(loss, student):
    """x_t, x_r and the edges for one image on every pair."""
    edges = loss.state.edges
    y, noise = sample_of_each(1).expand(2, len(edges), 1, 2, 2)
    x_t, x_star = target(loss, student, VARIANCE.sqrt() * y, EveryEdge(loss.state, noise))
    return x_t, ops.ddim_step(x_t, x_star, edges.sigma_t, edges.sigma_b), edges


def test_with_exact_hops_the_exact_flow_map_is_its_own_target_and_one_beside_it_is_not():
    loss = make_loss(hop=GAUSSIAN.solve)
    x_t, x_r, edges = hop_targets(loss, EXACT)
    exact = GAUSSIAN.solve(x_t, edges.sigma_t, edges.sigma_b)
    inner = edges.kind != ops.TERMINAL  # the last hop to 0 is the denoised image
    assert inner.sum() == len(edges) - 1
    assert (x_r - exact)[inner].abs().max() < 1e-10
    _, x_r, _ = hop_targets(loss, FlowMap(lambda sigma, r: 1.01 * EXACT.multiplier(sigma, r)))
    general = edges.kind == ops.GENERAL
    assert ((x_r - exact)[general].abs().amax(dim=(1, 2, 3)) > 1e-5).all()


def hop_multiplier(hop, sigma_t, sigma_s):
    """What one hop of the exact denoiser, or on average of the data, multiplies x by."""
    D, ratio = VARIANCE / (VARIANCE + sigma_t**2), sigma_s / sigma_t
    if sigma_s == 0:
        return D
    if hop != 'heun':
        return D + ratio * (1 - D)
    step = sigma_s - sigma_t
    first = (1 - D) / sigma_t
    second = (1 - VARIANCE / (VARIANCE + sigma_s**2)) / sigma_s * (1 + step * first)
    return 1 + step / 2 * (first + second)


def discrete_flow_map(hop, grid):
    """The multipliers that are their own targets: a hop, then the same from there, by levels."""
    levels, found = grid.tolist(), {}
    for i, j in itertools.combinations(range(len(levels)), 2):
        first = hop_multiplier(hop, levels[i], levels[i + 1])
        found[levels[i], levels[j]] = first if j == i + 1 else None
    for i, j in sorted(itertools.combinations(range(len(levels)), 2), key=lambda pair: -pair[0]):
        if found[levels[i], levels[j]] is None:
            first = hop_multiplier(hop, levels[i], levels[i + 1])
            found[levels[i], levels[j]] = first * found[levels[i + 1], levels[j]]
    return found


def student_of(table):
    """A student with these multipliers; at levels that are none, where the result is dropped, anything."""
    return FlowMap(lambda sigma, r: table.get((float(sigma), float(r)), torch.ones_like(VARIANCE)))


@pytest.mark.parametrize('hop', ['heun', 'ddim'])
def test_a_teachers_hops_lead_to_the_discrete_flow_map_and_from_nowhere_else(hop):
    loss = make_loss(hop=hop)
    table = discrete_flow_map(hop, ops.student_grid(8, 0.002, 80.0, 7.0, 'full'))
    x_t, x_r, edges = hop_targets(loss, student_of(table))
    expected = torch.cat([table[pair] for pair in zip(edges.sigma_t.tolist(), edges.sigma_b.tolist())]) * x_t
    assert (x_r - expected).abs().max() < 1e-10 * x_t.abs().max()
    _, x_r, _ = hop_targets(loss, student_of({pair: 1.01 * m for pair, m in table.items()}))
    assert ((x_r - expected)[edges.kind == ops.GENERAL].abs().amax(dim=(1, 2, 3)) > 1e-5).all()


def test_without_a_teacher_the_datas_hops_do_so_on_average():
    loss = make_loss(None)
    table = discrete_flow_map('data', ops.student_grid(8, 0.002, 80.0, 7.0, 'full'))
    edges, moment, square = loss.state.edges, 0, 0
    # All is linear in image and noise, so that each alone gives its coefficient.
    one, zero = torch.ones(len(edges), 1, 2, 2).double(), torch.zeros(len(edges), 1, 2, 2).double()
    for y, noise, variance in ((one, zero, VARIANCE), (zero, one, 1.0)):
        x_t, x_star = target(loss, student_of(table), y, EveryEdge(loss.state, noise))
        x_r = ops.ddim_step(x_t, x_star, edges.sigma_t, edges.sigma_b)
        moment, square = moment + variance * x_r * x_t, square + variance * x_t**2
    expected = torch.cat([table[pair] for pair in zip(edges.sigma_t.tolist(), edges.sigma_b.tolist())])
    assert (moment / square - expected).abs().max() < 1e-10


@pytest.mark.parametrize('hop, order', [('heun', 2), ('ddim', 1)])
def test_the_discrete_flow_map_tends_to_the_exact_one_at_the_hops_order(hop, order):
    errors = []
    for T in (32, 64, 128):
        grid = ops.student_grid(T, 0.002, 80.0, 7.0, 'full')
        high, low = float(grid[T // 4]), float(grid[T // 2])
        error = discrete_flow_map(hop, grid[T // 4 : T // 2 + 1])[high, low] - EXACT.multiplier(
            grid[T // 4], grid[T // 2]
        )
        errors.append(error.abs().max())
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(2**order, rel=0.1)


# ----------------------------------------------------------------------------
# Stored solutions.


class Labeled:
    """A denoiser of Gaussian data whose mean is the label's; counts the images it evaluates."""

    def __init__(self):
        self.evaluated = 0

    def __call__(self, x, sigma, class_labels=None, **_):
        self.evaluated += len(x)
        self.mean = class_labels @ torch.arange(class_labels.shape[1]).to(class_labels)
        return Gaussian(VARIANCE, self.mean.double().reshape(-1, 1, 1, 1))(x, sigma)


def run_steps(loss, steps, split=1, first_step=0, seed=0, teacher=None):
    """(x_t, x_r, labels) of the images of some optimizer steps of 8 images, in `split` micro-batches; and labels."""
    found, size = [], 8 // split
    for step in range(first_step, steps):
        loss.begin_step(step * 8)
        labels = torch.eye(3)[torch.randint(3, [8], generator=torch.Generator().manual_seed(100 + step))]
        parts = []
        for i in range(split):
            student = FlowMap(lambda sigma, r: torch.ones_like(VARIANCE), 3)
            rng = SampleRng(seed, step * 8 + i * size, size)
            of_part = labels[i * size : (i + 1) * size]
            loss(student, torch.zeros(size, 1, 2, 2), of_part, rng)
            x_t, sigma_t, seen, r = student.calls[-1]
            parts.append((x_t, sigma_t, r, seen))
        found.append([torch.cat(column) for column in zip(*parts)])
    return found


def test_a_stored_sample_starts_on_a_heun_path_from_noise_and_carries_its_label():
    teacher = Labeled()
    loss = make_loss(teacher, target='solution')
    grid = ops.student_grid(8, 0.002, 80.0, 7.0, 'full').tolist()
    x_t, sigma_t, _, labels = run_steps(loss, 1)[0]
    noise = SampleRng(0, 0, 8).normal('noise', (1, 2, 2)).double() * grid[0]
    mean = (labels @ torch.arange(3.0)).double().reshape(-1, 1, 1, 1)
    path = torch.stack([noise, *ops.ode_path(Gaussian(VARIANCE, mean), noise, grid)])
    at = [grid.index(float(sigma)) for sigma in sigma_t]
    torch.testing.assert_close(x_t, path[at, range(8)].float().double(), rtol=0, atol=0)
    # And the target: the image that leads to the path's state at r.
    values = make_loss(teacher, target='solution')
    probe_x, x_star = target(values, None, torch.zeros(8, 1, 2, 2), SampleRng(0, 0, 8), labels)
    edges = values.state.draw(SampleRng(0, 0, 8))
    ends = [grid.index(float(r)) for r in edges.sigma_b]
    x_r = ops.ddim_step(probe_x, x_star, edges.sigma_t, edges.sigma_b)
    torch.testing.assert_close(x_r, path[ends, range(8)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('solver', ['ipndm', 'dpmpp'])
def test_a_stored_solution_may_be_a_multistep_solvers_with_one_evaluation_a_step(solver):
    """The states are those that the solver of segments reaches from noise, and tend to the exact ones (before the last
    step, which is Euler's): at second order at least the error of a grid of eight times the levels is under 1/32."""
    labels, noise = torch.eye(3)[[0, 1, 2, 2]], SampleRng(0, 0, 4).normal('noise', (1, 2, 2)).double() * 80
    exact = Gaussian(VARIANCE, (labels @ torch.arange(3.0)).double().reshape(-1, 1, 1, 1))
    errors = []
    for T in (16, 128):
        teacher, levels = Labeled(), ops.student_grid(T, 0.002, 80.0, 7.0, 'full')
        denoiser = lambda labels, teacher=teacher: lambda x, sigma: teacher(x, sigma, labels)
        store = TrajectoryStore(levels.tolist(), 1.0, pool=1, reuse=5, batch_size=4, solver=solver)
        states = store.trajectories(SampleRng(0, 0, 4), labels, (1, 2, 2), denoiser).states.double()
        assert teacher.evaluated == 4 * T

        of_samples = levels[:, None].expand(-1, 4)
        path = [noise, *segment_solvers.solution_path(denoiser(labels), noise, of_samples, solver)]
        torch.testing.assert_close(states, torch.stack(path, dim=1), rtol=1e-6, atol=1e-6)
        errors.append((path[-2] - exact.solve(noise, 80.0, levels[-2])).abs().max())
    assert errors[1] < errors[0] / 32


def test_splits_and_restarts_see_the_same_samples():
    whole = run_steps(make_loss(Labeled(), target='mixed'), 20)
    for split in (2, 4):
        for a, b in zip(run_steps(make_loss(Labeled(), target='mixed'), 20, split), whole):
            for x, y in zip(a, b):
                torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)

    # Resumed from labels alone, in the same split or another one.
    for at, split in itertools.product((1, 2, 7, 15, 16), (1, 2)):
        earlier, later = (make_loss(Labeled(), target='mixed') for _ in range(2))
        run_steps(earlier, at)
        later.state.load_per_image(earlier.state.per_image().clone())
        for a, b in zip(run_steps(later, 20, split, first_step=at), whole[at:], strict=True):
            for x, y in zip(a, b):
                torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_every_solution_serves_as_many_steps_as_it_says_and_they_do_not_all_change_at_once():
    store = TrajectoryStore([80.0, 1.0, 0.0], 1.0, pool=3, reuse=15, batch_size=8)
    for group, turn in itertools.product(range(GROUPS), range(3)):
        steps = range(turn, 300, 3)
        begun = [store.begun(group, step) for step in steps]
        lengths = [len(list(uses)) for _, uses in itertools.groupby(begun)]
        assert set(lengths[1:-1]) == {15} and lengths[0] <= 15
        assert all(start <= step and start % 3 == turn for step, start in zip(steps, begun))
    changes = [[store.begun(g, s) == s for g in range(GROUPS)] for s in range(3, 300)]
    assert max(map(sum, changes)) == 1


@pytest.mark.parametrize('kind, share', [('solution', 1), ('mixed', 0.5), ('mixed', 0.25), ('hop', 0)])
@pytest.mark.parametrize('solver', ['heun', 'dpmpp'])
def test_the_teacher_is_evaluated_as_often_as_the_cost_says(kind, share, solver):
    teacher = Labeled()
    solver = dict(solver=solver if share else 'heun')
    loss = make_loss(teacher, target=kind, solution_share=share if kind == 'mixed' else 0.5, **solver)
    run_steps(loss, 15)  # the first solutions of all places, at once
    before = teacher.evaluated
    run_steps(loss, 15 + 60, first_step=15)
    config = FlowMapConfig(
        teacher='x',
        target=kind,
        T=8,
        steps=[1],
        reuse=5,
        solution_share=share if kind == 'mixed' else 0.5,
        **solver,
    )
    self_target = 1 - share
    # A hop to 0 is evaluated twice as all others, and what follows from the second is dropped.
    assert (teacher.evaluated - before) / (60 * 8) == pytest.approx(config.cost() - 3 - self_target, rel=1e-9)


# ----------------------------------------------------------------------------
# Sampling.


@pytest.mark.parametrize(
    'options',
    [dict(steps=n) for n in (1, 2, 3, 7)] + [dict(sigmas=[80.0, 5.0, 0.1]), dict(sigmas=[80.0, 0.0])],
)
def test_the_exact_flow_map_is_sampled_exactly_in_any_steps(options):
    z = sample_of_each(5)[0]
    images = samplers.sample(EXACT, z, **options)
    assert (images - GAUSSIAN.solve(80.0 * z, 80.0, 0.0)).abs().max() < 1e-10


def test_the_levels_of_n_steps_are_those_of_the_full_grid_and_each_step_is_told_where_it_ends():
    student = FlowMap(EXACT.multiplier)
    samplers.sample(student, sample_of_each(1)[0], steps=4)
    grid = ops.student_grid(4, 0.002, 80.0, 7.0, 'full').tolist()
    assert [(float(sigma), float(r)) for _, sigma, _, r in student.calls] == list(itertools.pairwise(grid))


def test_as_a_consistency_model_its_steps_end_at_0():
    student = FlowMap(EXACT.multiplier)
    samplers.sample(student, sample_of_each(1)[0], solver='cm', taus=[2.0])
    assert [(float(sigma), float(r)) for _, sigma, _, r in student.calls] == [(80, 0), (2, 0)]


@pytest.mark.parametrize(
    'options, words',
    [
        (dict(solver='heun'), 'heun is for diffusion models, and this is a two-time student'),
        (dict(solver='best'), 'best is for diffusion models'),
        (dict(sigmas=[1.0, 2.0]), 'they must fall'),
        (dict(sigmas=[0.0]), 'they must fall'),
        (dict(sigmas=[80.0, 1.0], steps=3), 'levels of 2 steps, not 3'),
        (dict(afs=True), 'no option afs'),
    ],
)
def test_what_a_two_time_student_does_not_have_is_said(options, words):
    with pytest.raises(UserError, match=words):
        samplers.sample(EXACT, sample_of_each(1)[0], **options)


def test_levels_are_not_given_to_a_student_of_its_own_grid():
    net = networks.EDMPrecond(8, 1, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[])
    net.metadata = dict(objective='mcd', sigmas=[80.0, 1.0, 0.0])
    with pytest.raises(UserError, match='levels that it was trained at: leave out sigmas'):
        samplers.sample(net, torch.zeros(1, 1, 8, 8), sigmas=[80.0, 2.0])


# ----------------------------------------------------------------------------
# On the command line.


@pytest.mark.parametrize(
    'options, words',
    [
        (['--steps=3', '--teacher=a.pkl'], '--steps=3 does not divide --T=16'),
        (['--target=hop', '--teacher=a.pkl', '--solver=dpmpp'], '--solver=dpmpp is for stored solutions'),
        (['--solver=ipndm'], '--solver=ipndm is for stored solutions'),
        (['--steps=2,2', '--teacher=a.pkl'], 'give different numbers'),
        (['--target=solution'], '--target=solution is the solution of a --teacher: give one'),
        (['--target=hop', '--solution_share=0.3'], '--solution_share is for --target=mixed, not hop'),
        (['--precond=vp'], "wants EDM's preconditioning"),
        (['--guidance=2', '--guide=b.pkl'], '--teacher'),
        (['--S=4'], '--S is for --objective=mcd'),
    ],
)
def test_options_that_contradict_each_other_are_refused(tmp_path, digits, options, words):
    result = invoke(train.main, f'--outdir={tmp_path}', f'--data={digits}', '--objective=flowmap', *options)
    assert_one_clear_error(result, words, status=2)
    assert not any(tmp_path.iterdir())


SIZES = dict(model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[])


def test_augmentation_does_not_go_with_stored_solutions(tmp_path, digits):
    save_snapshot(
        tmp_path / 'net.pkl', networks.EDMPrecond(8, 1, 10, augment_dim=9, **SIZES), objective='diffusion'
    )
    options = [
        f'--outdir={tmp_path / "run"}',
        f'--data={digits}',
        '--cond=1',
        f'--teacher={tmp_path / "net.pkl"}',
        '--augment=0.1',
    ]
    result = invoke(train.main, *options, '--objective=flowmap')
    assert_one_clear_error(result, '--augment=0.1', '--target=hop', status=1)


def test_without_a_teacher_it_trains_on_hops_of_the_data_from_a_given_start(tmp_path, digits, teacher):
    options = [
        f'--data={digits}',
        '--cond=1',
        *TINY_NETWORK,
        '--batch=64',
        '--duration=0.000128',
        '--nosubdir',
        '--workers=0',
    ]
    result = invoke(
        train.main, f'--outdir={tmp_path / "run"}', '--objective=flowmap', f'--transfer={teacher}', *options
    )
    assert result.exit_code == 0, result.output
    # Nothing that it lacks starts at random: the second level has no effect at first.
    assert 'start at random' not in result.output
    network = next((tmp_path / 'run').glob('network-snapshot-*.pkl'))
    done = invoke(
        generate.main, f'--network={network}', f'--outdir={tmp_path / "out"}', '--seeds=0', '--sigmas=80,1'
    )
    assert done.exit_code == 0 and '2 evaluations each' in done.output, done.output


def test_it_is_no_teacher_and_no_network_of_diffusers(tmp_path, digits):
    torch.manual_seed(0)
    net = networks.EDMPrecond(8, 1, 10, two_time=True, **SIZES)
    save_snapshot(tmp_path / 'net.pkl', net, objective='flowmap', steps=[1, 2])
    options = [
        f'--outdir={tmp_path / "run"}',
        f'--data={digits}',
        '--cond=1',
        f'--teacher={tmp_path / "net.pkl"}',
    ]
    result = invoke(train.main, *options, '--objective=mcd')
    assert_one_clear_error(result, 'two-time student itself', '--transfer', status=1)
    result = invoke(convert.main, '--to=diffusers', tmp_path / 'net.pkl', tmp_path / 'out')
    assert_one_clear_error(result, 'diffusers cannot express a two-time student', status=1)
    # A safetensors file can, there and back.
    for words in (['--to=safetensors', 'net.pkl', 'st'], ['--from=safetensors', 'st', 'back.pkl']):
        result = invoke(convert.main, words[0], *(tmp_path / name for name in words[1:]))
        assert result.exit_code == 0, result.output
    back = load_network(tmp_path / 'back.pkl')
    z, r = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 0.0])
    assert torch.equal(back(z, r + 1, r=r), net.eval()(z, r + 1, r=r)) and back.metadata['steps'] == [1, 2]
