"""Flow maps by the derivative along the ODE: against Gaussian data, against the formulas of the papers, and as the limit
of hops."""

import pytest
import torch
from gaussian import Gaussian
from losses import VARIANCE, Loss

from training import consistency_ops as ops
from training import networks
from training.objectives.loss import dropout_masks
from training.rng import SampleRng

OPTIONS = dict(steps=[1, 2, 4], T=8, reuse=15, batch_size=16, target='tangent', warmup_nimg=0)
GAUSSIAN, COUNT = Gaussian(VARIANCE), 16
RNG = SampleRng(3, 0, COUNT)


def make_loss(teacher=GAUSSIAN, **options):
    return Loss('flowmap', teacher, **{**OPTIONS, **options})


def column(values):
    return values.reshape(-1, 1, 1, 1)


class Exact(torch.nn.Module):
    """The flow map of Gaussian data, or one beside it: times 1 + off at high levels, and less below. (With one factor at
    all levels G is as constant along the ODE as without, for r = 0.)"""

    def __init__(self, off=0.0):
        super().__init__()
        self.off, self.outputs = torch.nn.Parameter(torch.tensor(off, dtype=torch.float64)), []

    def forward(self, x, sigma, class_labels=None, dropout_masks=None, r=None, force_fp32=False):
        sigma, r = column(sigma), column(r)
        moved = ((VARIANCE + r**2) / (VARIANCE + sigma**2)).sqrt() * x
        self.outputs.append((1 + self.off * sigma / (sigma + 1)) * (sigma * moved - r * x) / (sigma - r))
        return self.outputs[-1]

    def dropout_masks(self, batch_size, generator=None):
        return {}


def levels_of(loss):
    """(sigma, r) of the images of `RNG`, [COUNT] each."""
    edges, low = loss.state.draw(RNG), 0.002 ** (1 / 7)
    bottom = edges.sigma_b.clamp(min=0.002) ** (1 / 7)
    share = torch.from_numpy(RNG.uniform('level'))
    assert bottom.min() >= low - 1e-12
    return (bottom + share * (edges.sigma_t ** (1 / 7) - bottom)) ** 7, edges.sigma_b


# ----------------------------------------------------------------------------
# Gaussian data.


@pytest.mark.parametrize('jvp, rounding', [('forward', 1e-10), ('difference', 1e-5)])
def test_the_tangent_vanishes_at_the_exact_flow_map_and_not_beside_it(jvp, rounding):
    y = VARIANCE.sqrt() * torch.randn(COUNT, 1, 2, 2, dtype=torch.float64)
    losses = {off: make_loss(jvp=jvp, tangent_c=1.0)(Exact(off), y, None, RNG) for off in (0.0, 0.01)}
    # The loss is |g / (|g| + 1)|².
    assert losses[0.0].sqrt().max() < rounding
    assert losses[0.01].sqrt().median() > 1e-4 and (
        jvp == 'difference' or losses[0.01].sqrt().min() > 10 * rounding
    )


def test_levels_lie_anywhere_between_the_ends_of_pairs():
    loss, seen = make_loss(), []
    net = Exact()
    net.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[1], kwargs['r'])), with_kwargs=True
    )
    loss(net, torch.zeros(COUNT, 1, 2, 2), None, RNG)
    sigma, r = levels_of(loss)
    torch.testing.assert_close(seen[-1][0], sigma, rtol=1e-12, atol=0)
    assert torch.equal(seen[-1][1], r)
    edges = loss.state.draw(RNG)
    assert (sigma > r).all() and (sigma <= edges.sigma_t).all() and len(sigma.unique()) == COUNT


def test_without_a_teacher_the_expected_gradient_vanishes_there_alone():
    """All is linear in image and noise, so that each alone gives its coefficient, and g is theirs times x."""

    def moment(off):
        loss, net = make_loss(None, tangent_power=0.0), Exact(off)
        sigma, _ = levels_of(loss)
        total = 0
        for y, noise, variance in ((1.0, 0.0, VARIANCE), (0.0, 1.0, torch.ones_like(VARIANCE))):
            rng = Given(torch.full([COUNT, 1, 2, 2], noise, dtype=torch.float64))
            images = torch.full([COUNT, 1, 2, 2], y, dtype=torch.float64)
            net.outputs.clear()
            values = loss(net, images, None, rng)
            # d|G − sg[G + g]|² / dG = −2 g.
            g = -torch.autograd.grad(values.sum(), net.outputs[-1])[0] / 2
            total = total + variance * g * (images + column(sigma) * noise)
        return total / (VARIANCE + column(sigma) ** 2)

    assert moment(0.0).abs().max() < 1e-10
    assert moment(0.01).abs().amax(dim=(1, 2, 3)).min() > 1e-9 and moment(0.01).abs().max() > 1e-3


class Given(SampleRng):
    """`RNG` with other noise."""

    def __init__(self, noise):
        super().__init__(RNG.seed, RNG.first, RNG.count)
        self.noise = noise

    def normal(self, purpose, shape=()):
        return self.noise


def test_only_the_derivative_asks_for_weights_in_fp32():
    assert make_loss().state.in_fp32 and not make_loss(target='hop').state.in_fp32


# ----------------------------------------------------------------------------
# The papers' formulas, and the limit of hops, for a network that is nothing in particular.


def network(seed, **options):
    torch.manual_seed(seed)
    sizes = dict(model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], dropout=0.2)
    net = networks.EDMPrecond(8, 1, 3, **sizes, **options)
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net.double()


def batch():
    images = torch.randn(COUNT, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return images, torch.eye(3, dtype=torch.float64)[torch.arange(COUNT) % 3]


@pytest.mark.parametrize('distilled, warmup', [(True, 1.0), (True, 0.25), (False, 1.0)])
def test_losses_and_gradients_are_the_papers(distilled, warmup):
    """MeanFlow's u_tgt = v − (t − r)(v ∂_z u + ∂_t u), here with z = x, t = sigma and u = (x − G)/sigma."""
    net = network(0, two_time=True).train()
    teacher = network(1).eval().requires_grad_(False) if distilled else None
    y, labels = batch()
    loss = make_loss(teacher, warmup_nimg=64, tangent_power=0.75)
    loss.begin_step(int(64 * warmup))
    values = loss(net, y, labels, RNG)
    gradients = torch.autograd.grad(values.sum(), list(net.parameters()), allow_unused=True)

    sigma, r = levels_of(loss)
    noise = RNG.normal('noise', y.shape[1:]).double()
    x, masks = y + column(sigma) * noise, dropout_masks(net, RNG)
    v = (x - teacher(x, sigma, labels)) / column(sigma) if distilled else noise

    def u(x, sigma):
        return (x - net(x, sigma, labels, r=r, dropout_masks=masks)) / column(sigma)

    def slope_of_u(h):
        return (
            u(x + h * column(sigma) * v, sigma * (1 + h)) - u(x - h * column(sigma) * v, sigma * (1 - h))
        ) / (2 * h)

    with torch.no_grad():
        # du/dsigma times sigma, by differences of order h² and their extrapolation.
        du = (4 * slope_of_u(5e-4) - slope_of_u(1e-3)) / 3 / column(sigma)
        u_now = u(x, sigma)
        gap = column(sigma - r)
        # The warm-up is a factor on dG = v − u − sigma du.
        dG = v - u_now - column(sigma) * du
        u_target = u_now + (column(r) * (v - u_now) + warmup * gap * dG) / column(sigma)
        if warmup == 1:
            torch.testing.assert_close(u_target, v - gap * du, rtol=1e-9, atol=1e-9)
        step = -column(sigma) * (u_target - u_now)  # of G
        norm = step.flatten(1).norm(dim=1)
        if distilled:
            step, weight = step / column(norm + 0.1), torch.ones_like(norm)
        else:
            weight = 1 / (norm**2 + 1e-3) ** 0.75
    G = net(x, sigma, labels, r=r, dropout_masks=masks)
    expected = weight * (G - (G.detach() + step)).square().flatten(1).sum(1)
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-9)
    for mine, theirs in zip(
        gradients, torch.autograd.grad(expected.sum(), list(net.parameters()), allow_unused=True)
    ):
        if theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()) + 1e-12)


def test_targets_of_short_hops_tend_to_it_at_first_order():
    """x* − G of a hop of length delta is delta g / (sigma − r), up to delta²."""
    net, teacher = network(0, two_time=True).eval(), network(1).eval()
    y, labels = batch()
    sigma, r = levels_of(make_loss(teacher))
    x = y + column(sigma) * RNG.normal('noise', y.shape[1:]).double()
    with torch.no_grad():
        student = lambda x, sigma: net(x, sigma, labels, r=r)
        denoised, G = teacher(x, sigma, labels), student(x, sigma)
        v, u = (x - denoised) / column(sigma), (x - G) / column(sigma)
        along = (column(sigma - r) * v, sigma - r)
        _, dG = torch.func.jvp(student, (x, sigma), along)
        g = -column(r) * (v - u) - dG

        errors = []
        for share in (1e-2, 5e-3, 2.5e-3):
            sigma_s = sigma - share * (sigma - r)
            x_s = ops.ddim_step(x, denoised, sigma, sigma_s)
            x_r = ops.ddim_step(x_s, student(x_s, sigma_s), sigma_s, r)
            step = (ops.inv_ddim(x_r, x, sigma, r) - G) / share
            errors.append((step - g).flatten(1).norm(dim=1))
    ratios = torch.stack([errors[0] / errors[1], errors[1] / errors[2]])
    assert (ratios.median(dim=1).values - 2).abs().max() < 0.1, ratios
    assert (errors[2] < 0.1 * g.flatten(1).norm(dim=1)).double().mean() > 0.8
