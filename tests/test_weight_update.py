"""Adam on flat parameters against torch's own, loss scaling, clipping, and steps whose numbers are broken."""

import copy

import pytest
import torch

from torch_utils import training_stats
from torch_utils.flat import FlatParameters
from training.weight_update import DYNAMIC_START, GROWTH_INTERVAL, WeightUpdate


class Problem:
    """A linear regression in FP64, solved by a `WeightUpdate` and, for comparison, by Adam over separate parameters."""

    def __init__(self, **options):
        torch.manual_seed(0)
        self.net, self.plain = torch.nn.Linear(3, 2).double(), torch.nn.Linear(3, 2).double()
        self.plain.load_state_dict(self.net.state_dict())
        self.flat = FlatParameters(self.net)
        self.update = WeightUpdate(self.flat, (0.9, 0.99), 1e-8, **options)
        self.adam = (torch.optim.RAdam if options.get('optim') == 'radam' else torch.optim.Adam)(
            self.plain.parameters(), betas=(0.9, 0.99)
        )

    def batch(self, i):
        return torch.randn(5, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64)

    def step(self, i, factor=1.0, lr=0.01):
        self.flat.weights.grad.zero_()
        loss = self.net(self.batch(i)).square().sum(dim=1) * factor
        self.update.scaled_sum(loss).backward()
        self.update.step(lr)

    def plain_step(self, i, lr=0.01, clip=None):
        self.adam.zero_grad()
        self.plain(self.batch(i)).square().sum().backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(self.plain.parameters(), clip)
        self.adam.param_groups[0]['lr'] = lr
        self.adam.step()

    def difference(self):
        return max((a - b).abs().max().item() for a, b in zip(self.net.parameters(), self.plain.parameters()))


@pytest.fixture(autouse=True)
def fresh_statistics():
    training_stats.reset()
    yield
    training_stats.reset()


def test_radam_by_the_fused_kernel_is_radam():
    """To rounding, from the first step that is divided by second moments; a step that is skipped counts."""
    plain, fused = (Problem(optim='radam', loss_scale=4.0) for _ in range(2))
    taken = []
    for i in range(30):
        for problem in (plain, fused):
            problem.flat.weights.grad.zero_()
            problem.update.scaled_sum(problem.net(problem.batch(i)).square().sum(dim=1)).backward()
            if i in (3, 20):
                problem.flat.weights.grad[0] = float('inf')
        plain.update.step(0.01)
        update, adaptive = fused.update, fused.update._adaptive()
        if adaptive:
            norm = update.weights.grad.norm() / update.scale
            update._step_radam_fused(update.scale, ~(norm < float('inf')), 0.01)
        else:
            update.step(0.01)
        taken.append(adaptive)
    assert taken.index(True) == 5 and all(taken[5:])
    torch.testing.assert_close(fused.flat.weights, plain.flat.weights, rtol=1e-9, atol=1e-12)
    ours, theirs = (p.update.optimizer.state[p.update.weights] for p in (fused, plain))
    assert ours.keys() == theirs.keys() and ours['step'] == theirs['step'] == 30
    torch.testing.assert_close(ours['exp_avg_sq'], theirs['exp_avg_sq'])


@pytest.mark.parametrize('optim', ['adam', 'radam'])
@pytest.mark.parametrize('loss_scale', [1.0, 1024.0, None])
def test_steps_are_adams_whatever_the_loss_scale(loss_scale, optim):
    """Powers of two scale without rounding, and are taken out before the optimizer sees the gradient."""
    problem = Problem(loss_scale=loss_scale, optim=optim)
    for i in range(10):
        problem.step(i, lr=0.01 * (i + 1))
        problem.plain_step(i, lr=0.01 * (i + 1))
    assert problem.difference() < 1e-12
    assert training_stats.collect()['Progress/grad_norm']['num'] == 10


def test_long_gradients_are_shortened_to_the_given_norm():
    """The norm is known in FP32: 1e-7 of the gradient, and of steps that Adam makes about 0.01 long."""
    problem = Problem(loss_scale=None, grad_clip=0.5)
    for i in range(10):
        problem.step(i)
        problem.plain_step(i, clip=0.5)
    assert problem.difference() < 1e-7


@pytest.mark.parametrize('broken', [float('inf'), float('nan')])
def test_a_broken_step_changes_nothing_and_is_counted(broken):
    problem = Problem()
    problem.step(0)
    problem.plain_step(0)
    problem.step(1, factor=broken)
    problem.step(2, factor=broken)
    assert (problem.update.skips.item(), problem.update.consecutive_skips.item()) == (2, 2)
    problem.step(3)
    problem.plain_step(3)
    assert problem.difference() < 1e-15
    assert (problem.update.skips.item(), problem.update.consecutive_skips.item()) == (2, 0)
    stats = training_stats.collect()['Progress/grad_norm']
    assert stats['num'] == 2 and stats['mean'] > 0


@pytest.mark.parametrize('before', [0, 3])
def test_a_broken_step_of_radam_leaves_weights_and_moments_as_they_were(before):
    """At the first step too, when there are no moments yet."""
    problem = Problem(optim='radam')
    for i in range(before):
        problem.step(i)
    moments = problem.update.optimizer.state[problem.flat.weights]
    state = lambda: [problem.flat.weights.data, moments.get('exp_avg'), moments.get('exp_avg_sq')]
    kept = [
        torch.zeros_like(problem.flat.weights.data) if value is None else value.clone() for value in state()
    ]
    problem.step(9, factor=float('nan'))
    assert all(torch.equal(a, b) for a, b in zip(state(), kept)) and problem.update.skips.item() == 1
    problem.step(10)
    assert not torch.equal(problem.flat.weights.data, kept[0]) and problem.flat.weights.isfinite().all()


def test_one_image_with_a_broken_loss_breaks_the_step_even_where_its_gradient_is_zero():
    problem = Problem()
    loss = problem.net(problem.batch(0)).square().sum(dim=1)
    loss = torch.where(torch.arange(5) == 2, torch.tensor(float('inf'), dtype=torch.float64), loss)
    problem.update.scaled_sum(loss).backward()
    problem.update.step(0.01)
    assert problem.update.skips.item() == 1 and problem.difference() == 0


def test_the_dynamic_loss_scale_halves_after_broken_steps_and_doubles_after_many_whole_ones():
    problem = Problem(loss_scale=None)
    problem.step(0, factor=float('inf'))
    problem.step(1, factor=float('inf'))
    assert problem.update.scale.item() == DYNAMIC_START / 4
    problem.flat.weights.grad.zero_()
    for _ in range(GROWTH_INTERVAL - 1):
        problem.update.step(0)
    assert problem.update.scale.item() == DYNAMIC_START / 4
    problem.update.step(0)
    assert problem.update.scale.item() == DYNAMIC_START / 2 and problem.update.consecutive_finite.item() == 0


def test_a_gradient_that_would_vanish_in_half_precision_survives_with_the_scale():
    """1e-6 · 1e-3 = 1e-9 is below FP16's least number, 6e-8; 65536 times as much is not."""

    def half_gradient(scale):
        x = torch.tensor(1e-3, dtype=torch.float16, requires_grad=True)
        (
            x * torch.tensor(1e-3, dtype=torch.float16) * torch.tensor(1e-6 * scale, dtype=torch.float16)
        ).backward()
        return x.grad.float().item() / scale

    assert half_gradient(1) == 0 and half_gradient(DYNAMIC_START) == pytest.approx(1e-9, rel=0.01)


def test_a_state_brings_its_moments_and_not_the_betas_that_made_them():
    """A resumed run follows its own --beta2, as it follows its own --lr."""
    problem, flat = Problem(), Problem().flat
    problem.step(0)
    update = WeightUpdate(flat, (0.9, 0.5), 1e-8)
    update.load_state_dict(copy.deepcopy(problem.update.state_dict()))
    assert [group['betas'] for group in update.optimizer.param_groups] == [(0.9, 0.5)]
    assert torch.equal(
        update.optimizer.state_dict()['state'][0]['exp_avg'],
        problem.update.optimizer.state_dict()['state'][0]['exp_avg'],
    )


def test_a_state_gives_back_moments_scale_and_counts():
    problem, other = Problem(loss_scale=None), Problem(loss_scale=None)
    for i in range(3):
        problem.step(i, factor=float('inf') if i == 1 else 1)
    other.update.load_state_dict(copy.deepcopy(problem.update.state_dict()))
    other.flat.weights.data.copy_(problem.flat.weights.data)
    problem.step(7)
    other.step(7)
    assert torch.equal(problem.flat.weights, other.flat.weights) and torch.equal(
        problem.update.scale, other.update.scale
    )
    assert other.update.skips.item() == 1 and other.update.consecutive_finite.item() == 2
