"""Continuous-time consistency against its formulas, written out here from the design's equations, and against Gaussian
data, where the function that it converges to is known."""

import itertools
import math

import pytest
import torch
from gaussian import Gaussian
from helpers import assert_one_clear_error, invoke
from losses import Loss

import train
from dnnlib import EasyDict, UserError
from torch_utils import distributed
from torch_utils.sharded import ShardedParameters
from training import command_line, execution, networks, samplers
from training import consistency_ops as ops
from training.architectures import embedding_turns
from training.configuration import loss_record
from training.guidance import GuidedDenoiser
from training.objectives import OBJECTIVES
from training.objectives.loss import dropout_masks
from training.rng import SampleRng
from training.snapshot_metadata import snapshot_metadata
from training.starting_point import EDMS_TURNS, MOST_TURNS

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
    t, s = torch.atan(sigma / SIGMA_DATA), torch.zeros_like(sigma)
    ends = {}
    if S := c.get('S'):
        # The lower end t_k of the segment: of sigma_i = (80^(1/7) + i/S (0.002^(1/7) − 80^(1/7)))^7, and of 0.
        top, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
        levels = [0.0, *((top + i / S * (low - top)) ** 7 for i in range(1, S))]
        ends_of = [max(r for r in levels if r < level) for level in sigma.tolist()]
        s = torch.atan(torch.tensor(ends_of, dtype=torch.float64) / SIGMA_DATA)
        ends = dict(end_labels=s)
    cos, sin = column(torch.cos(t)), column(torch.sin(t))
    cos_step, sin_step = torch.cos(t - s), torch.sin(t - s)
    z = SIGMA_DATA * n
    X = cos * images + sin * z

    def F(network, masks):
        """F_trig(X / sigma_d, t) = −F_edm(c_in x; ln(sigma) / 4)."""

        def of(scaled, t):
            c_noise = torch.log(SIGMA_DATA * torch.tan(t)) / 4
            given = ends if network is net else {}
            return -network.model(scaled, c_noise, labels, dropout_masks=masks, **given)

        return of

    # dX/dt, and the Jacobian-vector product along (cos sin dX/dt / sigma_d, cos sin) of t − t_k.
    dX = cos * z - sin * images if objective == 'sct' else SIGMA_DATA * F(teacher, None)(X / SIGMA_DATA, t)
    dX = dX.detach()
    F_minus, dF = torch.func.jvp(
        F(net, masks),
        (X / SIGMA_DATA, t),
        (column(cos_step * sin_step) * dX / SIGMA_DATA, cos_step * sin_step),
    )
    F_minus, dF = F_minus.detach(), dF.detach()
    cos, sin = column(cos_step), column(sin_step)
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
@pytest.mark.parametrize('warmup, S', [(0.0, None), (0.3, None), (1.0, None), (0.3, 1), (0.3, 4), (1.0, 4)])
def test_loss_and_gradient_of_each_image_are_those_of_the_equations(objective, weight, warmup, S):
    net, teacher = network(0, logvar_channels=16, two_time=S is not None).train(), network(1).eval()
    c = dict(P_mean=-0.7, P_std=1.2, tangent_c=0.2, tangent_weight=weight, warmup_nimg=1000, S=S)
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


@pytest.mark.parametrize('S', [None, 3])
def test_a_divided_network_has_the_same_loss_and_gradient(S):
    """By FSDP2, here on one process: parameters are tensors only once the network is called."""
    net, teacher = network(0, logvar_channels=16, two_time=S is not None).train(), network(1).eval()
    loss = Loss('scd', teacher, net, warmup_nimg=0, S=S)
    values = loss(net, *batch(), RNG)
    expected = gradients(net, values)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    try:
        divided = ShardedParameters(net, execution.blocks_of(net))
        found = loss(net, *batch(), RNG)
        found.sum().backward()
        slopes = [divided.own_part(p.grad if p.grad is not None else 0 * p) for p in net.parameters()]
    finally:
        distributed.shutdown()
    assert torch.equal(found, values)
    for slope, gradient in zip(slopes, expected, strict=True):
        torch.testing.assert_close(slope, gradient, rtol=1e-12, atol=1e-15)


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
    """x_r = x ((c² + r²) / (c² + sigma²))^(power / 2): for power 1 the exact consistency function, or flow map, D(x; 0) = x
    for all. Each image has a power of its own, so that its gradient is the image's."""

    two_time, label_dim, img_channels, img_resolution = True, 0, 1, 2

    def __init__(self, power, count):
        super().__init__()
        self.power = torch.nn.Parameter(torch.full([count, 1, 1, 1], power, dtype=torch.float64))
        self.ends = []

    def forward(self, x, sigma, class_labels=None, force_fp32=False, dropout_masks=None, r=None):
        r = torch.zeros_like(sigma) if r is None else r
        self.ends.append((sigma, r))
        sigma, r = (level.reshape(-1, 1, 1, 1) for level in (sigma, r))
        ratio = (DEVIATION**2 + r**2) / (DEVIATION**2 + sigma**2)
        return (sigma * ratio ** (self.power / 2) * x - r * x) / (sigma - r)

    def dropout_masks(self, batch_size, generator=None):
        return {}


def slope_at(objective, power, S=None, count=4096):
    """(mean, its standard error) over images of the loss's slope by the power, without normalization. In segments high
    levels have slopes beside which others vanish, so they are rare there."""
    c, net, rng = 1e9, Flow(power, count), SampleRng(5, 0, count)
    options = dict(tangent_weight='prior', tangent_c=c, warmup_nimg=0, S=S)
    options |= dict(P_std=0.7) if S else {}
    loss = Loss(objective, Gaussian(DEVIATION**2), net, **options)
    y = DEVIATION * SampleRng(6, 0, count).normal('images', (1, 2, 2)).double()
    (slopes,) = torch.autograd.grad(c * loss(net, y, None, rng).sum(), net.power)
    return slopes.mean().item(), (slopes.std() / count**0.5).item()


@pytest.mark.parametrize('S', [None, 3])
@pytest.mark.parametrize('objective', ['scd', 'sct'])
def test_the_exact_consistency_function_has_no_expected_gradient_and_a_perturbed_one_has(objective, S):
    """Of scd in every image, to rounding; of sct, whose velocity is the image's own, in the mean: within four standard
    errors, while a power 10 % off is beyond twelve (in segments eight), and pulled back to 1."""
    mean, error = slope_at(objective, 1.0, S)
    assert abs(mean) < (1e-6 if objective == 'scd' else 4 * error)
    for power in (0.9, 1.1):
        mean, error = slope_at(objective, power, S)
        assert abs(mean) > (8 if S else 12) * error and (mean > 0) == (power > 1)


# ----------------------------------------------------------------------------
# Students of S steps, each of which crosses a segment of noise levels.


def test_a_step_ends_where_the_segment_of_its_level_does():
    """A level that tops a segment is in it; one above the highest is in the first."""
    loss = Loss('scd', tangent_weight='prior', S=4)
    grid = ops.student_grid(4, 0.002, 80.0, 7.0, 'full')
    sigma = torch.cat(
        [grid[:-1], grid[:-1] * (1 - 1e-9), grid[1:-1] * (1 + 1e-9), torch.tensor([1e-6, 500.0])]
    )
    expected = torch.cat([grid[1:], grid[1:], grid[1:-1], torch.tensor([0.0, grid[1]])])
    assert torch.equal(loss.state.lower_ends(sigma), expected)
    assert torch.equal(Loss('scd', tangent_weight='prior').state.lower_ends(sigma), torch.zeros_like(sigma))


@pytest.mark.parametrize('S', [1, 2, 4])
def test_the_tangent_of_each_image_vanishes_at_the_exact_flow_map_and_not_beside_it(S):
    """The loss is |g / (|g| + 1)|² over 4 values."""
    y = DEVIATION * SampleRng(6, 0, 256).normal('images', (1, 2, 2)).double()
    sizes = {}
    for power in (1.0, 1.01):
        loss = Loss('scd', Gaussian(DEVIATION**2), tangent_weight='prior', tangent_c=1.0, S=S)
        sizes[power] = (4 * loss(Flow(power, 256), y, None, SampleRng(5, 0, 256)).detach()).sqrt()
    assert sizes[1.0].max() < 1e-10
    assert sizes[1.01].min() > 1e-8 and sizes[1.01].median() > 1e-3


def test_one_segment_is_the_consistency_model_bit_for_bit():
    """At the start, when the second embedding has no effect: losses and gradients of all weights that both have."""
    plain, flow_map = (
        network(0, logvar_channels=16, two_time=two_time).train() for two_time in (False, True)
    )
    flow_map.load_state_dict(plain.state_dict(), strict=False)
    for parameter in flow_map.model.map_end.layer1.parameters():
        parameter.data.zero_()
    found = []
    for net, S in ((plain, None), (flow_map, 1)):
        values = Loss('scd', network(1).eval(), net, warmup_nimg=0, S=S)(net, *batch(), RNG)
        found.append((values, dict(zip(dict(net.named_parameters()), gradients(net, values)))))
    (values, slopes), (theirs, their_slopes) = found
    assert torch.equal(values, theirs)
    assert all(torch.equal(slopes[name], their_slopes[name]) for name in slopes)
    assert their_slopes['model.map_end.layer1.weight'].abs().max() > 0


def of_snapshot(net, *options):
    """The network with the metadata of its snapshot."""
    o = command_line.choose(dict(objective='scd', teacher='t.pkl', data='d', outdir='o', **dict(options)))
    c = EasyDict(objective='scd', seed=0, dataset={}, encoder=None, sampling=None, loss=loss_record(o, None))
    net.metadata = snapshot_metadata(c, 64)
    return net


@pytest.mark.parametrize('S', [1, 2, 3])
def test_a_snapshot_samples_gaussian_data_exactly_along_its_segments(S):
    net = of_snapshot(Flow(1.0, 4), ('S', S))
    z = SampleRng(1, 0, 4).normal('latents', (1, 2, 2)).double()
    images = samplers.sample(net, z)
    assert (images - Gaussian(DEVIATION**2).solve(80.0 * z, 80.0, 0.0)).abs().max() < 1e-10
    grid = ops.student_grid(S, 0.002, 80.0, 7.0, 'full').tolist()
    assert [(float(sigma), float(r)) for sigma, r in net.ends] == list(itertools.pairwise(grid))


@pytest.mark.parametrize(
    'options, words',
    [
        (dict(steps=3), 'trained for 2 steps, not 3: leave out --steps, or add --force-steps'),
        (dict(sigmas=[80.0, 1.0]), 'levels that it was trained at: leave out sigmas'),
        (dict(solver='cm'), 'a student of 2 steps, whose outputs are no images before the last'),
        (dict(solver='heun'), 'heun is for diffusion models'),
    ],
)
def test_other_samplings_of_it_are_refused(options, words):
    net = of_snapshot(Flow(1.0, 4), ('S', 2))
    with pytest.raises(UserError, match=words):
        samplers.sample(net, torch.zeros(4, 1, 2, 2), **options)
    images = samplers.sample(net, torch.ones(4, 1, 2, 2), steps=3, force_steps=True)
    assert (
        images - Gaussian(DEVIATION**2).solve(torch.full([4, 1, 2, 2], 80.0), 80.0, 0.0)
    ).abs().max() < 1e-6


@pytest.mark.parametrize(
    'options, words',
    [
        (['--mid_t=0.8'], '--mid_t is for a consistency model'),
        (['--no_clip_denoised'], '--clip_denoised is for a consistency model'),
        (['--val=1', '--val_ref=r.npz', '--val_steps=3'], 'the student takes --S=2 steps'),
    ],
)
def test_what_a_student_of_s_steps_does_not_have_is_refused(options, words):
    arguments = ['--outdir=x', '--data=x', '--objective=scd', '--teacher=x.pkl', '--S=2', *options]
    assert_one_clear_error(invoke(train.main, *arguments), words, status=2)


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
# Networks whose derivative would be rough.

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
        assert embedding_turns(dict(class_name='EDMPrecond', kwargs=plain)) == EDMS_TURNS < MOST_TURNS


@pytest.mark.parametrize(
    'arch, words', [('edm2', ['1.6 radians', '6 times']), ('ncsnpp', ['25 radians', '101 times'])]
)
def test_a_network_with_a_fast_embedding_is_refused_with_the_reason_and_the_cure(digits, arch, words):
    options = [f'--data={digits}', f'--arch={arch}', '--cbase=16', '--cres=1,2', '--objective=sct']
    result = invoke(train.main, '--outdir=x', '--dry-run', *options)
    assert_one_clear_error(result, f'--arch={arch}', *words, '--arch=adm or ddpmpp', 'flowmap')


@pytest.mark.parametrize('arch', ['adm', 'ddpmpp'])
def test_a_network_with_a_positional_embedding_is_accepted(digits, arch):
    options = [f'--data={digits}', f'--arch={arch}', '--cbase=16', '--cres=1,2', '--objective=sct']
    assert invoke(train.main, '--outdir=x', '--dry-run', *options).exit_code == 0


def test_a_difference_of_rounded_outputs_is_refused(digits):
    options = [f'--data={digits}', '--arch=adm', '--objective=sct', '--tf32']
    result = invoke(train.main, '--outdir=x', '--dry-run', *options, '--jvp=difference')
    assert_one_clear_error(result, '--tf32', '--jvp=difference', '--jvp=forward', status=2)
    assert invoke(train.main, '--outdir=x', '--dry-run', *options).exit_code == 0
