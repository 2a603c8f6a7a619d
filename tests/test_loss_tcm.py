"""Truncated consistency training against Gaussian data, where the function that it converges to is known,
given the first stage's."""

import itertools

import numpy as np
import pytest
import torch
from losses import VARIANCE, Linear, Loss, small_network, target

from torch_utils import training_stats
from training import consistency_ops as ops
from training.objectives import loss_tcm
from training.objectives.loss_tcm import dropout_rates
from training.objectives.time_schedules import truncated_log_student_times
from training.rng import SampleRng


def make_loss(teacher, stage=0, **options):
    loss = Loss('tcm', teacher, **{'stage_nimg': 1000, 'batch_size': 64, **options})
    loss.begin_step(stage * loss.state.c.stage_nimg)
    return loss


def earlier(t, ratio, k=8.0, b=1.0):
    """r of the paper, for a number t."""
    return max(
        1e-6, t - t * (1 - ratio) * (1 + k / (1 + torch.tensor(b * t, dtype=torch.float64).exp().item()))
    )


# ----------------------------------------------------------------------------
# The function that it converges to.

FIRST_STAGES = {
    'exact': lambda t: (VARIANCE[0] / (VARIANCE[0] + t**2)).sqrt(),
    'another function': lambda t: torch.full_like(VARIANCE[0], 0.3 + 0.5 / (1 + t)),
}


def multiplier(t, ratio, dividing_t, first_stage):
    """c(t) = (s² + r t) / (s² + t²) c(r), the best answer on average given the answer at r, which below t' is
    the first stage's."""
    c = torch.ones_like(VARIANCE[0])
    while t >= dividing_t:
        r = earlier(t, ratio)
        c = c * (VARIANCE[0] + r * t) / (VARIANCE[0] + t**2)
        t = r
    return c * first_stage(t)


class Given:
    """Random numbers of images whose noise is given, [N, ...]."""

    first, device = 0, torch.device('cpu')

    def __init__(self, noise):
        self.noise, self.count = noise, len(noise)

    def uniform(self, purpose):
        return np.zeros(self.count)

    def normal(self, purpose, shape=()):
        return self.noise

    def generator(self, purpose):
        return torch.Generator().manual_seed(0)


QUADRATIC = dict(
    c=1e12, boundary_share=0.0
)  # a distance of which `losses.target` reads targets; none lies at t'


@pytest.fixture
def targets_at(monkeypatch):
    """x_t and x* of a loss where chance gives the times [N], for images y."""

    def targets(loss, t, student, y, noise):
        monkeypatch.setattr(loss_tcm.times, 'truncated_log_student_times', lambda *_: t, raising=False)
        return target(loss, student, y, Given(noise))

    return targets


def moments(targets_at, loss, t, student, values):
    """E[values(x_t, x*) x_t] / E[x_t²] at the given times, by probing with image and noise alone: all is
    linear."""
    moment = 0
    for y, noise, second_moment in ((1, 0, VARIANCE), (0, 1, torch.ones_like(VARIANCE))):
        y, noise = (torch.full([len(t), 1, 2, 2], float(value), dtype=torch.float64) for value in (y, noise))
        x_t, x_star = targets_at(loss, t, student, y, noise)
        moment = moment + second_moment * values(x_t, x_star) * x_t
    return moment / (VARIANCE + ops.expand_like(t, x_t) ** 2)


def expected_gradients(targets_at, loss, t, student):
    """E[(student(x_t) − x*) x_t] / E[x_t²] at the given times."""
    return moments(targets_at, loss, t, student, lambda x_t, x_star: student(x_t, t) - x_star)


@pytest.mark.parametrize('first_stage', FIRST_STAGES)
@pytest.mark.parametrize(
    'stage, dividing_t, cap', [(0, 1.0, 0.999), (3, 1.0, 0.999), (5, 0.7, 0.9), (9, 2.5, 0.99)]
)
def test_the_truncated_consistency_function_has_zero_expected_gradient_and_a_perturbed_one_has_not(
    first_stage, stage, dividing_t, cap, targets_at
):
    """Whatever the first stage answers below t'. At a stage's own ratio, or at its cap, whichever is less."""
    low = FIRST_STAGES[first_stage]
    loss = make_loss(Linear(low), stage, dividing_t=dividing_t, ratio_cap=cap, **QUADRATIC)
    ratio = min(1 - 0.5 ** (stage + 1), cap)
    t = torch.tensor([dividing_t, dividing_t * 1.001, dividing_t * 1.3, 3.0, 20.0, 80.0], dtype=torch.float64)
    assert (
        expected_gradients(targets_at, loss, t, Linear(lambda t: multiplier(t, ratio, dividing_t, low)))
        .abs()
        .max()
        < 1e-10
    )
    for wrong in t.tolist():
        student = Linear(
            lambda t, wrong=wrong: multiplier(t, ratio, dividing_t, low) * (1.01 if t == wrong else 1)
        )
        assert expected_gradients(targets_at, loss, t, student)[t == wrong].abs().max() > 1e-6


def multiplier_of_targets(targets_at, t, first_stage, **options):
    """c(t), read off the loss's own targets by regression on x_t: they are affine in what the student says at
    r, where it is that same c, and the first stage's where r < t'."""
    loss = make_loss(Linear(first_stage), 20, **QUADRATIC, **options)
    c, chain = loss.state.c, [torch.tensor([t], dtype=torch.float64)]
    while (r := loss_tcm.times.tcm_earlier_time(chain[-1], loss.state.ratio, c.k, c.b)) >= c.dividing_t:
        assert r < chain[-1]
        chain.append(r)
    offset, full = (
        moments(
            targets_at,
            loss,
            torch.cat(chain),
            Linear(lambda t, value=value: torch.full_like(VARIANCE[0], value)),
            lambda x_t, x_star: x_star,
        )
        for value in (0.0, 1.0)
    )
    c = torch.zeros_like(VARIANCE[0])
    for k in reversed(range(len(chain))):
        c = offset[k] + (full - offset)[k] * c
    return c


def test_the_truncated_consistency_function_tends_to_the_exact_map_as_times_come_closer(targets_at):
    """s / sqrt(s² + t²) where the first stage is exact; of first order, as the data's hop is: half of 1 −
    ratio halves the error."""
    exact = FIRST_STAGES['exact']
    errors = [
        (multiplier_of_targets(targets_at, 5.0, exact, ratio_cap=cap) / exact(5.0) - 1).abs().max()
        for cap in (0.99, 0.995, 0.9975)
    ]
    assert all(1.8 < a / b < 2.2 for a, b in itertools.pairwise(errors)), errors


def test_an_error_of_the_first_stage_is_passed_on_whole(targets_at):
    """The student's chain of targets ends below t' and never reaches the image: what is 10 % off there is 10
    % off at 80."""
    exact = FIRST_STAGES['exact']
    wrong, right = (
        multiplier_of_targets(targets_at, 80.0, lambda t, scale=scale: scale * exact(t), ratio_cap=0.99)
        for scale in (1.1, 1.0)
    )
    torch.testing.assert_close(wrong / right, torch.full_like(wrong, 1.1), rtol=1e-9, atol=0)


# ----------------------------------------------------------------------------
# What is drawn.


def drawn(loss, first=0, count=64, seed=0):
    """t, r, the weight [N] each, and which images the first stage gives the target of, [N] bool."""
    columns, above, below = loss.state.draw_on_host(SampleRng(seed, first, count))
    assert sorted([*above, *below]) == list(range(count))
    return *torch.from_numpy(columns), torch.from_numpy(np.isin(np.arange(count), below))


@pytest.mark.parametrize(
    'options',
    [{}, dict(dividing_t=0.5, sigma_max=50.0, student_scale=0.4, student_df=1.5)],
    ids=['defaults', 'others'],
)
def test_times_are_log_student_but_for_the_share_at_the_dividing_time(options):
    """A quarter of every 64 samples lies at t' exactly. The others' ln t is scaled Student-t, given that it
    is between the ends: between the host's draws and quantiles of that law there is no difference."""
    loss = make_loss(None, **options)
    c = loss.state.c
    low, high = c.dividing_t, c.sigma_max
    t, *_ = drawn(loss, first=640)
    assert int((t == low).sum()) == 16 and bool((t[t != low] > low).all()) and t.max() <= high
    uniform = torch.from_numpy(SampleRng(0, 640, 64).uniform('sigma'))
    expected = truncated_log_student_times(uniform, low, high, c.student_scale, c.student_df)
    assert torch.equal(t[t != low], expected[t != low])


@pytest.mark.parametrize('stage, ratio', [(0, 0.5), (3, 0.9375), (8, 1 - 2.0**-9), (9, 0.999), (30, 0.999)])
def test_the_earlier_time_comes_closer_stage_by_stage_up_to_the_cap(stage, ratio):
    t, r, _, below = drawn(make_loss(None, stage))
    expected = torch.tensor([earlier(time, ratio) for time in t.tolist()], dtype=torch.float64)
    torch.testing.assert_close(r, expected, rtol=1e-10, atol=0)
    assert torch.equal(below, expected < 1)


def test_the_first_stage_is_never_asked_at_zero():
    """At stage 0 most r would be negative, and near t' all: 1e-6 is the least."""
    t, r, *_ = drawn(make_loss(None, 0))
    assert r.min() == 1e-6 and bool((r[t == 1] == 1e-6).all())


def test_the_mapping_has_its_options():
    t, r, *_ = drawn(make_loss(None, 1, q=4.0, k=2.0, b=0.3))
    expected = torch.tensor(
        [earlier(time, 1 - 4.0**-2, k=2.0, b=0.3) for time in t.tolist()], dtype=torch.float64
    )
    torch.testing.assert_close(r, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    'options', [dict(dividing_t=80.0), dict(dividing_t=0.0), dict(batch_size=3), dict(batch_size=1)], ids=str
)
def test_what_cannot_be_trained_is_refused_at_once(options):
    """t' beyond the ends of times; no sample of a batch at t', as the floor of a quarter of 3 is 0."""
    with pytest.raises(ValueError, match=r'does not hold|leaves the boundary'):
        make_loss(None, **options)


# ----------------------------------------------------------------------------
# The loss.


class Scaled(torch.nn.Module):
    """D(x; t) = value x, and what it was asked."""

    def __init__(self, value):
        super().__init__()
        self.value, self.calls = torch.nn.Parameter(torch.tensor(float(value), dtype=torch.float64)), []

    def forward(self, x, sigma, class_labels=None, dropout_masks=None, **kwargs):
        self.calls.append((sigma, class_labels, kwargs))
        return self.value * x

    def dropout_masks(self, batch_size, generator=None):
        return {}


def images_of(count):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    'options',
    [{}, dict(tcm_weight='karras', c=3.0, boundary_weight=0.7, boundary_share=0.5)],
    ids=['flat', 'karras'],
)
def test_the_mean_over_a_batch_is_the_consistency_loss_plus_the_weighted_boundary_loss(options):
    """Written out, with a c that matters: omega / (t − r) (sqrt(|d|² + c²) − c), omega = 1 or t / c_out², the
    mean of either part."""
    loss, images = make_loss(Scaled(0.5), 4, **options), images_of(64)
    got = loss(Scaled(0.2), images, None, SampleRng(7, 128, 64)).mean()
    (times, earlier_times, *_), c = drawn(loss, first=128, seed=7), options.get('c', 1e-8)
    noise = SampleRng(7, 128, 64).normal('noise', [1, 8, 8]).double()
    parts = {True: [], False: []}
    for y, n, t, r in zip(images, noise, times, earlier_times):
        target = (0.5 if r < 1 else 0.2) * (y + r * n)
        distance = ((0.2 * (y + t * n) - target).square().sum() + c**2).sqrt() - c
        omega = t * (t**2 + 0.25) / (t * 0.5) ** 2 if loss.state.c.tcm_weight == 'karras' else 1
        parts[bool(t == 1)].append(omega / (t - r) * distance)
    at_boundary, elsewhere = torch.stack(parts[True]), torch.stack(parts[False])
    assert len(at_boundary) == 64 * loss.state.c.boundary_share
    torch.testing.assert_close(
        got, elsewhere.mean() + loss.state.c.boundary_weight * at_boundary.mean(), rtol=1e-9, atol=0
    )


def test_without_a_share_at_the_dividing_time_there_is_no_boundary_loss():
    loss = make_loss(Scaled(0.5), boundary_share=0.0, boundary_weight=100.0)
    t, r, weight, _ = drawn(loss)
    assert bool((t > 1).all())
    torch.testing.assert_close(weight, 1 / (t - r))


def test_each_network_is_asked_for_its_own_samples_under_their_own_conditions():
    """The student for r >= t', the first stage for r < t', then the student for all at t."""
    student, teacher, labels, augment = (
        Scaled(0.2),
        Scaled(0.5),
        torch.arange(64.0)[:, None],
        torch.arange(64.0)[:, None] + 0.5,
    )
    loss = make_loss(teacher, 4)
    loss(student, images_of(64), labels, SampleRng(7, 0, 64), augment)
    times, earlier_times, _, low = drawn(loss, seed=7)
    assert 16 < low.sum() < 64, "more than those at t' itself"
    (first, *_), (r, own, kwargs), (t, whole, _) = *teacher.calls, *student.calls
    assert (
        torch.equal(first, earlier_times[low])
        and torch.equal(r, earlier_times[~low])
        and torch.equal(t, times)
    )
    assert (
        torch.equal(teacher.calls[0][1], labels[low])
        and torch.equal(own, labels[~low])
        and torch.equal(whole, labels)
    )
    assert torch.equal(teacher.calls[0][2]['augment_labels'], augment[low]) and torch.equal(
        kwargs['augment_labels'], augment[~low]
    )


def test_a_network_that_has_no_samples_is_not_asked():
    """At stage 0 no r of times up to 1.5 is as much as t'; all are where t is 50 and r is 45."""
    student, teacher = Scaled(0.2), Scaled(0.5)
    make_loss(teacher, 0, sigma_max=1.5)(student, images_of(64), None, SampleRng(7, 0, 64))
    assert len(teacher.calls) == 1 and len(student.calls) == 1
    teacher.calls.clear()
    loss, all_of_them = make_loss(teacher), np.arange(64)
    columns = np.stack([np.full(64, 50.0), np.full(64, 45.0), np.ones(64)])
    loss.state.draw_on_host = lambda rng: (columns, all_of_them, all_of_them[:0])
    loss(student, images_of(64), None, SampleRng(7, 0, 64))
    assert teacher.calls == []


def test_gradients_reach_the_student_alone_and_through_its_own_answer_alone():
    """d/dv |v x_t − target| with the targets held: as if they were numbers."""
    student, teacher, images = Scaled(0.2), Scaled(0.5), images_of(64)
    loss = make_loss(teacher, 4)
    loss(student, images, None, SampleRng(7, 0, 64)).sum().backward()
    (t, r, weight, below), noise = (
        drawn(loss, seed=7),
        SampleRng(7, 0, 64).normal('noise', [1, 8, 8]).double(),
    )
    x_t, x_r = (images + ops.expand_like(s, images) * noise for s in (t, r))
    d = 0.2 * x_t - torch.where(below, 0.5, 0.2).reshape(-1, 1, 1, 1) * x_r
    expected = (weight * (d * x_t).flatten(1).sum(1) / d.flatten(1).norm(dim=1)).sum()
    torch.testing.assert_close(student.value.grad, expected, rtol=1e-6, atol=0)
    assert teacher.value.grad is None


@pytest.mark.parametrize('cuts', [[16] * 4, [40, 24], [1] * 64], ids=['four', 'two', 'single samples'])
def test_the_loss_of_a_batch_does_not_depend_on_how_it_is_split(cuts):
    """Over processes or accumulation rounds: boundary samples belong to places in the stream, of which any 64
    have 16."""
    student, images = Scaled(0.2), images_of(64)
    loss = make_loss(Scaled(0.5), 4)
    whole = loss(student, images, None, SampleRng(7, 1000, 64))
    starts = [sum(cuts[:i]) for i in range(len(cuts))]
    parts = [loss(student, images[a : a + n], None, SampleRng(7, 1000 + a, n)) for a, n in zip(starts, cuts)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-9, atol=1e-9)


class Dropping(Scaled):
    """A network of one block with dropout, which remembers the masks."""

    def __init__(self, dropout):
        super().__init__(0.5)
        self.dropout, self.masks = dropout, []

    def forward(self, x, sigma, class_labels=None, dropout_masks=None):
        self.masks.append(dropout_masks)
        return super().forward(x, sigma)

    def dropout_masks(self, batch_size, generator=None):
        return {'block': torch.rand([batch_size, 4], generator=generator) > self.dropout}


def masks_seen(student_dropout, teacher_dropout, **options):
    """Masks of the student at r, at t, and of the first stage; which samples those are."""
    student, teacher = Dropping(student_dropout).train(), Dropping(teacher_dropout).eval()
    loss = make_loss(teacher, 4, net=student, **options)
    loss(student, images_of(64), None, SampleRng(0, 0, 64))
    *_, below = drawn(loss)
    return *student.masks, *teacher.masks, below


@pytest.mark.parametrize('sync', [True, False])
def test_both_networks_see_the_masks_of_the_student_where_dropout_is_synchronized(sync):
    """Each the rows of its own samples."""
    own, whole, first, low = masks_seen(0.3, 0.3, sync_dropout=sync)
    assert (
        torch.equal(own['block'], whole['block'][~low])
        == torch.equal(first['block'], whole['block'][low])
        == sync
    )


def test_a_first_stage_with_another_dropout_is_asked_as_in_sampling():
    """Masks of probability 0.3 under another rate would be scaled by the wrong factor."""
    _, _, first, _ = masks_seen(0.3, 0.2)
    assert first == {}


def test_the_dropout_of_real_networks_is_known_block_by_block():
    """Of every block, by its resolution: equal networks are told from those with another rate, or with
    dropout elsewhere."""
    nets = [
        small_network(0.3),
        small_network(0.3),
        small_network(0.2),
        small_network(0.3, dout_resolutions=[8]),
    ]
    rates = [dropout_rates(net) for net in nets]
    assert rates[0] == rates[1] and rates[0] not in rates[2:]


def test_stages_follow_the_images_and_shares_are_reported():
    training_stats.reset()
    loss = make_loss(Scaled(0.5))
    stages = []
    for nimg in (0, 999, 1000, 4500):
        loss.begin_step(nimg)
        stages.append((loss.state.stage, loss.state.ratio))
    assert stages == [(0, 0.5), (0, 0.5), (1, 0.75), (4, 1 - 2.0**-5)]
    loss(Scaled(0.2), images_of(64), None, SampleRng(0, 0, 64))
    stats = training_stats.collect()
    assert stats['Edges/stage']['mean'] == 4 and stats['Edges/boundary']['mean'] == 0.25
    *_, below = drawn(loss)
    assert stats['Edges/first_stage']['mean'] == below.double().mean()


def test_images_are_made_by_the_average_above_the_dividing_time_and_by_the_first_stage_below():
    teacher, average = small_network(0).eval(), small_network(0).eval()
    net = make_loss(teacher, dividing_t=0.7).state.sampling_network(average)
    assert net.high is average and net.low is teacher and net.switch == 0.7
