"""Truncated consistency training against Gaussian data, where the function that it converges to is known, given the first stage's."""

import itertools

import pytest
import torch
from test_loss_cd import VARIANCE, small_network
from test_loss_ect import Linear

from torch_utils import training_stats
from training import consistency_ops as ops
from training.draws import SampleDraws
from training.objectives.consistency_loss import Drawn, Pairs, split_batch
from training.objectives.loss_tcm import TruncatedTrainingLoss, dropout_rates
from training.objectives.time_schedules import truncated_log_student_times

DEFAULTS = dict(
    sigma_max=80.0,
    dividing_t=1.0,
    student_scale=0.2,
    student_df=0.01,
    q=2.0,
    k=8.0,
    b=1.0,
    c=1e-8,
    ratio_cap=0.999,
    stage_nimg=1000,
    tcm_weight='flat',
    boundary_share=0.25,
    boundary_weight=0.1,
    batch_size=64,
    sigma_data=0.5,
)
CPU = torch.device('cpu')


def make_loss(teacher, stage=0, **options):
    loss = TruncatedTrainingLoss(teacher, **{**DEFAULTS, **options})
    loss.begin_step(stage * loss.stage_nimg)
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
    """c(t) = (s² + r t) / (s² + t²) c(r), the best answer on average given the answer at r, which below t' is the first stage's."""
    c = torch.ones_like(VARIANCE[0])
    while t >= dividing_t:
        r = earlier(t, ratio)
        c = c * (VARIANCE[0] + r * t) / (VARIANCE[0] + t**2)
        t = r
    return c * first_stage(t)


def drawn_at(t, r, weight, dividing_t=1.0, few_sizes=False):
    """Samples at times t with their r, [N] each."""
    low = (r < dividing_t).numpy()
    parts = split_batch(dict(student=~low, teacher=low), CPU, few_sizes)
    return Drawn(t, r, torch.zeros_like(t), weight, torch.full(t.shape, ops.GENERAL), parts=parts)


def below(edges):
    """Which samples the first stage is asked for, [N] bool."""
    part, mask = edges.parts.get('teacher'), torch.zeros(len(edges.sigma_t), dtype=torch.bool)
    return mask if part is None else part.put(mask, part.pick(~mask))


def expected_gradients(loss, t, student):
    """E[(student(x_t) − x*) x_t] / E[x_t²] at the given times, by probing with image and noise alone: all is linear."""
    gradient, r = 0, torch.tensor([earlier(time, loss.ratio) for time in t.tolist()], dtype=torch.float64)
    for y, noise, moment in ((1, 0, VARIANCE), (0, 1, torch.ones_like(VARIANCE))):
        y, noise = (torch.full([len(t), 1, 2, 2], float(value), dtype=torch.float64) for value in (y, noise))
        x_t = y + ops.expand_like(t, y) * noise
        pairs = Pairs(y, noise, x_t, drawn_at(t, r, t, loss.dividing_t))
        gradient = gradient + moment * (student(x_t, t) - loss.reference(student, pairs)) * x_t
    return gradient / (VARIANCE + ops.expand_like(t, VARIANCE.expand(len(t), 1, 2, 2)) ** 2)


@pytest.mark.parametrize('first_stage', FIRST_STAGES)
@pytest.mark.parametrize(
    'stage, dividing_t, cap', [(0, 1.0, 0.999), (3, 1.0, 0.999), (5, 0.7, 0.9), (9, 2.5, 0.99)]
)
def test_the_truncated_consistency_function_has_zero_expected_gradient_and_a_perturbed_one_has_not(
    first_stage, stage, dividing_t, cap
):
    """Whatever the first stage answers below t'. At a stage's own ratio, or at its cap, whichever is less."""
    low = FIRST_STAGES[first_stage]
    loss = make_loss(Linear(low), stage, dividing_t=dividing_t, ratio_cap=cap)
    ratio = min(1 - 0.5 ** (stage + 1), cap)
    t = torch.tensor([dividing_t, dividing_t * 1.001, dividing_t * 1.3, 3.0, 20.0, 80.0], dtype=torch.float64)
    assert (
        expected_gradients(loss, t, Linear(lambda t: multiplier(t, ratio, dividing_t, low))).abs().max()
        < 1e-10
    )
    for wrong in t.tolist():
        student = Linear(
            lambda t, wrong=wrong: multiplier(t, ratio, dividing_t, low) * (1.01 if t == wrong else 1)
        )
        assert expected_gradients(loss, t, student)[t == wrong].abs().max() > 1e-6


@pytest.fixture
def edges_at(monkeypatch):
    """The edges that a loss draws where chance gives the times [N]; none at t'."""

    def edges(loss, t):
        monkeypatch.setattr('training.objectives.loss_tcm.times.truncated_log_student_times', lambda *_: t)
        return loss.draw(SampleDraws(0, 0, len(t)), CPU)

    return edges


def multiplier_of_targets(edges_at, t, first_stage, **options):
    """c(t), read off the loss's own targets by regression on x_t: they are affine in what the student says at r, where it is that same c, and the
    first stage's where r < t'."""
    loss = make_loss(Linear(first_stage), 20, boundary_share=0.0, **options)
    chain = [torch.tensor([t], dtype=torch.float64)]
    while (r := edges_at(loss, chain[-1]).sigma_s) >= loss.dividing_t:
        assert r < chain[-1]
        chain.append(r)
    edges, coefficients = edges_at(loss, torch.cat(chain)), []
    for value in (0.0, 1.0):
        student, moment = Linear(lambda t, value=value: torch.full_like(VARIANCE[0], value)), 0
        for y, noise, second_moment in ((1, 0, VARIANCE), (0, 1, torch.ones_like(VARIANCE))):
            y, noise = (
                torch.full([len(chain), 1, 2, 2], float(value), dtype=torch.float64) for value in (y, noise)
            )
            x_t = y + ops.expand_like(edges.sigma_t, y) * noise
            moment = moment + second_moment * loss.reference(student, Pairs(y, noise, x_t, edges)) * x_t
        coefficients.append(moment / (VARIANCE + ops.expand_like(edges.sigma_t, x_t) ** 2))
    offset, full = coefficients
    c = torch.zeros_like(VARIANCE[0])
    for k in reversed(range(len(chain))):
        c = offset[k] + (full - offset)[k] * c
    return c


def test_the_truncated_consistency_function_tends_to_the_exact_map_as_times_come_closer(edges_at):
    """s / sqrt(s² + t²) where the first stage is exact; of first order, as the data's hop is: half of 1 − ratio halves the error."""
    exact = FIRST_STAGES['exact']
    errors = [
        (multiplier_of_targets(edges_at, 5.0, exact, ratio_cap=cap) / exact(5.0) - 1).abs().max()
        for cap in (0.99, 0.995, 0.9975)
    ]
    assert all(1.8 < a / b < 2.2 for a, b in itertools.pairwise(errors)), errors


def test_an_error_of_the_first_stage_is_passed_on_whole(edges_at):
    """The student's chain of targets ends below t' and never reaches the image: what is 10 % off there is 10 % off at 80."""
    exact = FIRST_STAGES['exact']
    wrong, right = (
        multiplier_of_targets(edges_at, 80.0, lambda t, scale=scale: scale * exact(t), ratio_cap=0.99)
        for scale in (1.1, 1.0)
    )
    torch.testing.assert_close(wrong / right, torch.full_like(wrong, 1.1), rtol=1e-9, atol=0)


# ----------------------------------------------------------------------------
# What is drawn.


def drawn(loss, first=0, count=64):
    return loss.draw(SampleDraws(0, first, count), CPU)


@pytest.mark.parametrize(
    'options',
    [{}, dict(dividing_t=0.5, sigma_max=50.0, student_scale=0.4, student_df=1.5)],
    ids=['defaults', 'others'],
)
def test_times_are_log_student_but_for_the_share_at_the_dividing_time(options):
    """A quarter of every 64 samples lies at t' exactly. The others' ln t is scaled Student-t, given that it is between the ends: between the host's
    draws and quantiles of that law there is no difference."""
    loss = make_loss(None, **options)
    low, high = loss.dividing_t, loss.sigma_max
    t = drawn(loss, first=640).sigma_t
    assert int((t == low).sum()) == 16 and bool((t[t != low] > low).all()) and t.max() <= high
    uniform = torch.from_numpy(SampleDraws(0, 640, 64).uniform('sigma'))
    expected = truncated_log_student_times(uniform, low, high, loss.student_scale, loss.student_df)
    assert torch.equal(t[t != low], expected[t != low])


@pytest.mark.parametrize('stage, ratio', [(0, 0.5), (3, 0.9375), (8, 1 - 2.0**-9), (9, 0.999), (30, 0.999)])
def test_the_earlier_time_comes_closer_stage_by_stage_up_to_the_cap(stage, ratio):
    edges = drawn(make_loss(None, stage))
    expected = torch.tensor([earlier(t, ratio) for t in edges.sigma_t.tolist()], dtype=torch.float64)
    torch.testing.assert_close(edges.sigma_s, expected, rtol=1e-10, atol=0)
    assert torch.equal(below(edges), expected < 1)


def test_the_first_stage_is_never_asked_at_zero():
    """At stage 0 most r would be negative, and near t' all: 1e-6 is the least."""
    edges = drawn(make_loss(None, 0))
    assert edges.sigma_s.min() == 1e-6 and bool((edges.sigma_s[edges.sigma_t == 1] == 1e-6).all())


def test_the_mapping_has_its_options():
    edges = drawn(make_loss(None, 1, q=4.0, k=2.0, b=0.3))
    expected = torch.tensor(
        [earlier(t, 1 - 4.0**-2, k=2.0, b=0.3) for t in edges.sigma_t.tolist()], dtype=torch.float64
    )
    torch.testing.assert_close(edges.sigma_s, expected, rtol=1e-10, atol=0)


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
    """Written out, with a c that matters: omega / (t − r) (sqrt(|d|² + c²) − c), omega = 1 or t / c_out², the mean of either part."""
    loss, images = make_loss(Scaled(0.5), 4, **options), images_of(64)
    got = loss(Scaled(0.2), images, None, SampleDraws(7, 128, 64)).mean()
    edges, c = loss.draw(SampleDraws(7, 128, 64), CPU), options.get('c', 1e-8)
    noise = SampleDraws(7, 128, 64).normal('noise', [1, 8, 8]).double()
    parts = {True: [], False: []}
    for y, n, t, r in zip(images, noise, edges.sigma_t, edges.sigma_s):
        target = (0.5 if r < 1 else 0.2) * (y + r * n)
        distance = ((0.2 * (y + t * n) - target).square().sum() + c**2).sqrt() - c
        omega = t * (t**2 + 0.25) / (t * 0.5) ** 2 if loss.tcm_weight == 'karras' else 1
        parts[bool(t == 1)].append(omega / (t - r) * distance)
    at_boundary, elsewhere = torch.stack(parts[True]), torch.stack(parts[False])
    assert len(at_boundary) == 64 * loss.boundary_share
    torch.testing.assert_close(
        got, elsewhere.mean() + loss.boundary_weight * at_boundary.mean(), rtol=1e-9, atol=0
    )


def test_without_a_share_at_the_dividing_time_there_is_no_boundary_loss():
    loss = make_loss(Scaled(0.5), boundary_share=0.0, boundary_weight=100.0)
    edges = drawn(loss)
    assert bool((edges.sigma_t > 1).all())
    torch.testing.assert_close(edges.weight, 1 / (edges.sigma_t - edges.sigma_s))


def test_each_network_is_asked_for_its_own_samples_under_their_own_conditions():
    """The student for r >= t', the first stage for r < t', then the student for all at t."""
    student, teacher, labels, augment = (
        Scaled(0.2),
        Scaled(0.5),
        torch.arange(64.0)[:, None],
        torch.arange(64.0)[:, None] + 0.5,
    )
    loss = make_loss(teacher, 4)
    loss(student, images_of(64), labels, SampleDraws(7, 0, 64), augment)
    edges = loss.draw(SampleDraws(7, 0, 64), CPU)
    low = below(edges)
    assert 16 < low.sum() < 64, "more than those at t' itself"
    (first, *_), (r, own, kwargs), (t, whole, _) = *teacher.calls, *student.calls
    assert (
        torch.equal(first, edges.sigma_s[low])
        and torch.equal(r, edges.sigma_s[~low])
        and torch.equal(t, edges.sigma_t)
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
    make_loss(teacher, 0, sigma_max=1.5)(student, images_of(64), None, SampleDraws(7, 0, 64))
    assert len(teacher.calls) == 1 and len(student.calls) == 1
    teacher.calls.clear()
    loss, one = make_loss(teacher), torch.ones(64, dtype=torch.float64)
    loss.draw = lambda draws, device: drawn_at(50 * one, 45 * one, one)
    loss(student, images_of(64), None, SampleDraws(7, 0, 64))
    assert teacher.calls == []


def test_gradients_reach_the_student_alone_and_through_its_own_answer_alone():
    """d/dv |v x_t − target| with the targets held: as if they were numbers."""
    student, teacher, images = Scaled(0.2), Scaled(0.5), images_of(64)
    loss = make_loss(teacher, 4)
    loss(student, images, None, SampleDraws(7, 0, 64)).sum().backward()
    edges, noise = (
        loss.draw(SampleDraws(7, 0, 64), CPU),
        SampleDraws(7, 0, 64).normal('noise', [1, 8, 8]).double(),
    )
    x_t, x_r = (images + ops.expand_like(s, images) * noise for s in (edges.sigma_t, edges.sigma_s))
    d = 0.2 * x_t - torch.where(below(edges), 0.5, 0.2).reshape(-1, 1, 1, 1) * x_r
    expected = (edges.weight * (d * x_t).flatten(1).sum(1) / d.flatten(1).norm(dim=1)).sum()
    torch.testing.assert_close(student.value.grad, expected, rtol=1e-6, atol=0)
    assert teacher.value.grad is None


@pytest.mark.parametrize('cuts', [[16] * 4, [40, 24], [1] * 64], ids=['four', 'two', 'single samples'])
def test_the_loss_of_a_batch_does_not_depend_on_how_it_is_split(cuts):
    """Over processes or accumulation rounds: boundary samples belong to places in the stream, of which any 64 have 16."""
    student, images = Scaled(0.2), images_of(64)
    loss = make_loss(Scaled(0.5), 4)
    whole = loss(student, images, None, SampleDraws(7, 1000, 64))
    starts = [sum(cuts[:i]) for i in range(len(cuts))]
    parts = [
        loss(student, images[a : a + n], None, SampleDraws(7, 1000 + a, n)) for a, n in zip(starts, cuts)
    ]
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
    loss = make_loss(teacher, 4, **options)
    loss.attach(student, None)
    loss(student, images_of(64), None, SampleDraws(0, 0, 64))
    return *student.masks, *teacher.masks, below(loss.draw(SampleDraws(0, 0, 64), CPU))


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
    """Of every block, by its resolution: equal networks are told from those with another rate, or with dropout elsewhere."""
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
        stages.append((loss.stage, loss.ratio))
    assert stages == [(0, 0.5), (0, 0.5), (1, 0.75), (4, 1 - 2.0**-5)]
    loss(Scaled(0.2), images_of(64), None, SampleDraws(0, 0, 64))
    stats = training_stats.collect()
    assert stats['Edges/stage']['mean'] == 4 and stats['Edges/boundary']['mean'] == 0.25
    assert stats['Edges/first_stage']['mean'] == below(loss.draw(SampleDraws(0, 0, 64), CPU)).double().mean()


def test_images_are_made_by_the_average_above_the_dividing_time_and_by_the_first_stage_below():
    teacher, average = small_network(0).eval(), small_network(0).eval()
    net = make_loss(teacher, dividing_t=0.7).sampled(average)
    assert net.high is average and net.low is teacher and net.switch == 0.7
