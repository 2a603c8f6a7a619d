"""Continuous-time consistency against its formulas, written out here from the design's equations, and against Gaussian
data, where the function that it converges to is known."""

import math

import pytest
import torch
from gaussian import Gaussian
from helpers import assert_one_clear_error, invoke
from losses import Loss

import train
from training import networks
from training.architectures import embedding_turns
from training.guidance import GuidedDenoiser
from training.objectives import OBJECTIVES
from training.objectives.loss import dropout_masks
from training.rng import SampleRng
from training.starting_point import MOST_TURNS

SIGMA_DATA, COUNT, CLASSES = 0.5, 8, 3
RNG = SampleRng(3, 0, COUNT)


def network(seed, dropout=0.2, **options):
    """A network no layer of which is zero, FP64."""
    torch.manual_seed(seed)
    sizes = dict(model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[], dropout=dropout)
    net = networks.EDMPrecond(8, 1, CLASSES, **sizes, **options)
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net.double()


def batch():
    generator = torch.Generator().manual_seed(9)
    images = torch.randn(COUNT, 1, 8, 8, dtype=torch.float64, generator=generator)
    return images, torch.eye(CLASSES, dtype=torch.float64)[torch.arange(COUNT) % CLASSES]


def by_hand(objective, net, teacher, c, warmup):
    """The loss of each image: DESIGN's equations with EDM's network inside, t = atan(sigma / sigma_d)."""
    images, labels = batch()
    n = RNG.normal('noise', images.shape[1:]).double()
    sigma = torch.exp(c['P_mean'] + c['P_std'] * torch.from_numpy(RNG.normal_on_host('sigma')).double())
    masks = dropout_masks(net, RNG)
    column = lambda values: values[:, None, None, None]
    t = torch.atan(sigma / SIGMA_DATA)
    cos, sin = column(torch.cos(t)), column(torch.sin(t))
    z = SIGMA_DATA * n
    X = cos * images + sin * z

    def F(network, masks):
        """F_trig(X / sigma_d, t) = −F_edm(c_in x; ln(sigma) / 4)."""

        def of(scaled, t):
            c_noise = torch.log(SIGMA_DATA * torch.tan(t)) / 4
            return -network.model(scaled, c_noise, labels, dropout_masks=masks)

        return of

    # dX/dt, and the Jacobian-vector product along (cos t sin t dX/dt / sigma_d, cos t sin t).
    dX = cos * z - sin * images if objective == 'sct' else SIGMA_DATA * F(teacher, None)(X / SIGMA_DATA, t)
    dX = dX.detach()
    F_minus, dF = torch.func.jvp(
        F(net, masks), (X / SIGMA_DATA, t), (cos * sin * dX / SIGMA_DATA, torch.cos(t) * torch.sin(t))
    )
    F_minus, dF = F_minus.detach(), dF.detach()
    g = -(cos**2) * (SIGMA_DATA * F_minus - dX) - warmup * (cos * sin * X + SIGMA_DATA * dF)
    g = g / (column(torch.sqrt((g**2).sum(dim=(1, 2, 3)))) + c['tangent_c'])

    w = torch.zeros_like(t)
    if c['tangent_weight'] == 'adaptive':
        angles = torch.log(sigma)[:, None] / 4 * net.logvar_fourier.freqs.double() * 2 * math.pi
        features = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)
        w = -(features @ net.logvar_linear.weight[0])
    error = F(net, masks)(X / SIGMA_DATA, t) - F_minus - g
    return torch.exp(w) / 64 * (error**2).sum(dim=(1, 2, 3)) - w


def gradients(net, values):
    weights = [p for p in net.parameters() if p.requires_grad]
    return torch.autograd.grad(values.sum(), weights, materialize_grads=True)


@pytest.mark.parametrize('objective', ['scd', 'sct'])
@pytest.mark.parametrize('weight', ['adaptive', 'prior'])
@pytest.mark.parametrize('warmup', [0.0, 0.3, 1.0])
def test_loss_and_gradient_of_each_image_are_those_of_the_equations(objective, weight, warmup):
    net, teacher = network(0, logvar_channels=16).train(), network(1).eval()
    c = dict(P_mean=-0.7, P_std=1.2, tangent_c=0.2, tangent_weight=weight, warmup_nimg=1000)
    loss = Loss(objective, teacher, net, **c)
    loss.begin_step(round(1000 * warmup))
    values = loss(net, *batch(), RNG)
    expected = by_hand(objective, net, teacher, c, warmup)
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-12)
    for found, wanted in zip(gradients(net, values), gradients(net, expected), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)


def test_central_differences_give_the_same_loss_and_gradient():
    """To the order h² of a step of 1e-3."""
    net, teacher = network(0, logvar_channels=16).train(), network(1).eval()
    found = []
    for jvp in ('forward', 'difference'):
        values = Loss('scd', teacher, net, jvp=jvp, warmup_nimg=0)(net, *batch(), RNG)
        found.append((values, torch.cat([g.flatten() for g in gradients(net, values)])))
    (forward, slopes), (difference, their_slopes) = found
    torch.testing.assert_close(difference, forward, rtol=1e-4, atol=0)
    assert (slopes - their_slopes).norm() < 1e-4 * slopes.norm()


@pytest.mark.parametrize('jvp', ['forward', 'difference'])
def test_a_compiled_network_has_the_same_loss_and_gradient(jvp):
    """Differences are of the compiled network; forward mode runs the network as it is written."""
    net, teacher = network(0, logvar_channels=16).train(), network(1).eval()
    found = []
    for compiled in (False, True):
        if compiled:
            net.compile(backend='eager')
        values = Loss('scd', teacher, net, jvp=jvp, warmup_nimg=0)(net, *batch(), RNG)
        found.append((values, *gradients(net, values)))
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-8, atol=1e-10)


def test_the_derivative_is_in_fp32_where_the_network_computes_in_half_precision():
    """The tangent of one network: in BF16 it would be off by percents."""
    net, teacher = network(0, logvar_channels=16).float().train(), network(1).float().eval()
    found = {}
    for half in (False, True):
        net.use_bf16 = half
        loss = Loss('scd', teacher, net, tangent_weight='prior', warmup_nimg=0)
        found[half] = loss(net, *batch(), RNG).detach()
    torch.testing.assert_close(found[True], found[False], rtol=1e-5, atol=0)


def test_a_guided_teachers_velocity_is_followed():
    """The loss with w (D − D_weak) + D_weak is that of a teacher which is this function."""
    net = network(0, logvar_channels=16).train()
    strong, weak = network(1).eval(), network(2).eval()

    class Mixed(torch.nn.Module):
        def forward(self, x, sigma, class_labels=None, **options):
            at = x, sigma, class_labels
            return weak(*at) + 2 * (strong(*at) - weak(*at))

    values = [
        Loss('scd', teacher, net, warmup_nimg=0)(net, *batch(), RNG)
        for teacher in (GuidedDenoiser(strong, weak, 2.0), Mixed(), strong)
    ]
    torch.testing.assert_close(values[0], values[1], rtol=1e-10, atol=0)
    assert not torch.allclose(values[0], values[2], rtol=1e-3)


# ----------------------------------------------------------------------------
# Gaussian data.

DEVIATION = 0.7


class Flow(torch.nn.Module):
    """x (c² / (c² + sigma²))^(power / 2): for power 1 the exact consistency function, D(x; 0) = x for all. Each image has
    a power of its own, so that its gradient is the image's."""

    def __init__(self, power, count):
        super().__init__()
        self.power = torch.nn.Parameter(torch.full([count, 1, 1, 1], power, dtype=torch.float64))

    def forward(self, x, sigma, class_labels=None, force_fp32=False, dropout_masks=None):
        ratio = DEVIATION**2 / (DEVIATION**2 + sigma.reshape(-1, 1, 1, 1) ** 2)
        return ratio ** (self.power / 2) * x

    def dropout_masks(self, batch_size, generator=None):
        return {}


def slope_at(objective, power, count=4096):
    """(mean, its standard error) over images of the loss's slope by the power, without normalization."""
    c, net, rng = 1e9, Flow(power, count), SampleRng(5, 0, count)
    options = dict(tangent_weight='prior', tangent_c=c, warmup_nimg=0)
    loss = Loss(objective, Gaussian(DEVIATION**2), net, **options)
    y = DEVIATION * SampleRng(6, 0, count).normal('images', (1, 2, 2)).double()
    (slopes,) = torch.autograd.grad(c * loss(net, y, None, rng).sum(), net.power)
    return slopes.mean().item(), (slopes.std() / count**0.5).item()


@pytest.mark.parametrize('objective', ['scd', 'sct'])
def test_the_exact_consistency_function_has_no_expected_gradient_and_a_perturbed_one_has(objective):
    """Of scd in every image, to rounding; of sct, whose velocity is the image's own, in the mean: within four standard
    errors, while a power 10 % off is beyond twelve, and pulled back to 1."""
    mean, error = slope_at(objective, 1.0)
    assert abs(mean) < (1e-6 if objective == 'scd' else 4 * error)
    for power in (0.9, 1.1):
        mean, error = slope_at(objective, power)
        assert abs(mean) > 12 * error and (mean > 0) == (power > 1)


# ----------------------------------------------------------------------------
# Options.


def test_the_tangent_is_warmed_up_linearly():
    loss = Loss('sct', tangent_weight='prior', warmup_nimg=1000)
    found = []
    for nimg in (0, 250, 999, 1000, 5000):
        loss.begin_step(nimg)
        found.append(loss.state.warmup)
    assert found == [0.0, 0.25, 0.999, 1.0, 1.0]
    assert Loss('sct', tangent_weight='prior', warmup_nimg=0).state.warmup == 1.0


def test_a_weight_is_not_learned_by_a_network_that_has_none():
    with pytest.raises(ValueError, match='logvar_channels'):
        Loss('sct', net=network(0), warmup_nimg=0)


def test_costs_count_the_derivative():
    """Forward mode counts as 4.5 forward passes, a difference as two; scd evaluates its teacher, guided or not."""
    cost = lambda name, **options: OBJECTIVES[name].config(**options).cost()
    assert (cost('sct'), cost('sct', jvp='difference')) == (7.5, 5)
    assert (cost('scd'), cost('scd', guide='none-label', guidance=2.0)) == (8.5, 9.5)


# ----------------------------------------------------------------------------
# Networks whose derivative would explode.

TURNS = dict(
    edm2=('Precond', {}),
    ncsnpp=('EDMPrecond', dict(embedding_type='fourier')),
    openai=('CMPrecond', {}),
    vp=('VPPrecond', {}),
    ve=('VEPrecond', dict(embedding_type='fourier')),
    iddpm=('iDDPMPrecond', {}),
)


@pytest.mark.parametrize('kind', TURNS)
def test_fast_embeddings_are_told_from_edms_positional_one(kind):
    class_name, kwargs = TURNS[kind]
    assert embedding_turns(dict(class_name=class_name, kwargs=kwargs)) > MOST_TURNS
    for plain in ({}, dict(embedding_type='positional')):
        assert embedding_turns(dict(class_name='EDMPrecond', kwargs=plain)) == 0.25 < MOST_TURNS


@pytest.mark.parametrize('arch, words', [('edm2', '1.6 radians'), ('ncsnpp', '25 radians')])
def test_a_network_with_a_fast_embedding_is_refused_with_the_reason_and_the_cure(digits, arch, words):
    options = [f'--data={digits}', f'--arch={arch}', '--cbase=16', '--cres=1,2', '--objective=sct']
    result = invoke(train.main, '--outdir=x', '--dry-run', *options)
    assert_one_clear_error(result, f'--arch={arch}', words, 'explodes', '--arch=adm or ddpmpp', 'flowmap')


@pytest.mark.parametrize('arch', ['adm', 'ddpmpp'])
def test_a_network_with_a_positional_embedding_is_accepted(digits, arch):
    options = [f'--data={digits}', f'--arch={arch}', '--cbase=16', '--cres=1,2', '--objective=sct']
    assert invoke(train.main, '--outdir=x', '--dry-run', *options).exit_code == 0


def test_a_difference_of_rounded_outputs_is_refused(digits):
    options = [f'--data={digits}', '--arch=adm', '--objective=sct', '--tf32']
    result = invoke(train.main, '--outdir=x', '--dry-run', *options, '--jvp=difference')
    assert_one_clear_error(result, '--tf32', '--jvp=difference', '--jvp=forward', status=2)
    assert invoke(train.main, '--outdir=x', '--dry-run', *options).exit_code == 0
