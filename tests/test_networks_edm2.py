"""EDM2's network: golden output, magnitudes, forced weight normalization, dropout, distillation."""

import numpy as np
import pytest
import torch
from losses import Loss

from torch_utils.flat import FlatParameters
from training.checkpoint import load_network, save_snapshot
from training.networks import edm2 as edm2
from training.objectives import loss_diffusion
from training.rng import SampleRng

SMALL = dict(model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], channels_per_head=16)


def small_net(img_channels=1, label_dim=3, **kwargs):
    """8x8, its gains away from zero, where they hide what is behind them."""
    torch.manual_seed(0)
    net = edm2.Precond(8, img_channels, label_dim, **{**SMALL, **kwargs})
    for name, parameter in net.named_parameters():
        if name.endswith('_gain'):
            torch.nn.init.constant_(parameter, 0.5)
    return net


def inputs(channels=1):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, 8, 8, generator=generator), torch.tensor([0.3, 5.0]), torch.eye(3)[[0, 2]]


def rms(x, dims):
    return x.double().square().mean(dim=dims).sqrt()


def weights(net):
    found = {name: p for name, p in net.named_parameters() if name.endswith('weight')}
    assert len(found) > 20
    return found


# ----------------------------------------------------------------------------
# Snapshots.


def test_the_network_gives_edm2s_golden_output(fixtures):
    """Tolerance: 1e-4 of the output's standard deviation, FP32 on the CPU; FP64 is as near."""
    net = load_network(fixtures / 'edm2-cond.pkl')
    assert (type(net).__name__, net.init_args, net.init_kwargs['model_channels']) == (
        'Precond',
        (16, 3, 10),
        16,
    )
    assert (net.sigma_min, net.sigma_max, net.metadata['objective']) == (0, float('inf'), 'diffusion')
    golden = {name: torch.as_tensor(value) for name, value in np.load(fixtures / 'edm2-cond.npz').items()}
    for precise in (False, True):
        net = net.double() if precise else net
        denoised = net(golden['x'], golden['sigma'], golden['class_labels'])
        assert denoised.dtype == (torch.float64 if precise else torch.float32)
        assert (denoised - golden['D']).abs().max() < 1e-4 * golden['D'].std()


def test_a_round_trip_keeps_tensors_arguments_and_attributes(fixtures, tmp_path):
    first = load_network(fixtures / 'edm2-cond.pkl')
    first.sigma_min, first.sigma_max = 0.002, 80
    save_snapshot(tmp_path / 'again.pkl', first, **first.metadata)
    again = load_network(tmp_path / 'again.pkl')
    assert again.state_dict().keys() == first.state_dict().keys()
    assert all(torch.equal(tensor, first.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert (again.init_args, again.init_kwargs, again.sigma_min, again.sigma_max) == (
        first.init_args,
        first.init_kwargs,
        0.002,
        80,
    )


def test_half_precision_tensors_load_as_they_are_and_compute_in_single(tmp_path):
    net, (x, sigma, labels) = small_net().eval(), inputs()
    expected = net(x, sigma, labels)
    save_snapshot(tmp_path / 'half.pkl', net.half())
    half = load_network(tmp_path / 'half.pkl')
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.float16}
    denoised = half(x, sigma, labels)
    assert denoised.dtype == torch.float32
    assert (
        denoised - expected
    ).abs().max() < 1e-2 * expected.std()  # FP16 rounds by up to 2**-11, most of all the frequencies


# ----------------------------------------------------------------------------
# Magnitudes.


def test_silu_keeps_the_magnitude_of_a_standard_normal_input():
    """E[silu(z)²] = 0.596² by quadrature, to the three digits of the constant."""
    z = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2)
    assert abs((edm2.mp_silu(z) ** 2 * density).sum() / density.sum() - 1) < 2e-3


@pytest.mark.parametrize('t', [0.0, 0.3, 0.5, 1.0])
def test_sums_and_concatenations_keep_unit_variance_and_their_balance(t):
    """Orthogonal inputs of unit magnitude stand for independent ones: all is exact."""
    a, b = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, -1.0]])
    torch.testing.assert_close(rms(edm2.mp_sum(a, b, t), 1), torch.ones(1, dtype=torch.float64))
    joined = edm2.mp_cat(torch.ones(1, 6, 1, 1), -torch.ones(1, 2, 1, 1), t).flatten()
    torch.testing.assert_close(rms(joined, 0).item(), 1.0)
    ours, theirs = joined[:6].norm(), joined[6:].norm()
    torch.testing.assert_close(ours * t, theirs * (1 - t))


@pytest.mark.parametrize('kernel', [[], [1, 1], [3, 3]])
def test_convolutions_keep_unit_variance_whatever_the_scale_of_their_weights(kernel):
    torch.manual_seed(0)
    conv = edm2.MPConv(64, 256, kernel).eval()
    x = torch.randn(512, 64, *(5 for _ in kernel))
    for scale in (0.3, 1, 3):
        torch.nn.init.normal_(conv.weight, std=scale)
        out = conv(x)
        inner = out[..., 1:-1, 1:-1] if kernel else out  # the border sees zeros
        assert abs(inner.square().mean().sqrt() - 1) < 0.02
    torch.testing.assert_close(conv(x, gain=torch.tensor(0.5)), out / 2)


def test_fourier_features_have_unit_variance():
    torch.manual_seed(0)
    features = edm2.MPFourier(4096)(torch.linspace(-2, 1, 64))
    assert abs(rms(features, (0, 1)) - 1) < 0.01 and features.mean().abs() < 0.01


def test_normalization_is_exact_in_every_precision():
    x = (
        torch.randn(4, 64, 3, generator=torch.Generator().manual_seed(0)).double() * 1e4
    )  # its norm is beyond FP16
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-5), (torch.float16, 2e-3)):
        y = edm2.normalize(x.to(dtype), dims=(1,))
        assert y.dtype == dtype and (rms(y, 1) - 1).abs().max() < tolerance


def test_activations_keep_their_size_through_the_whole_network():
    """At initialization, with data of EDM's scale, every block's output has a magnitude within 30 % of one."""
    net = small_net(3, model_channels=64, channel_mult=[1, 2], num_blocks=2, channels_per_head=64).eval()
    magnitudes = {}
    for name, block in [*net.unet.enc.items(), *net.unet.dec.items()]:
        block.register_forward_hook(
            lambda _module, _inputs, out, name=name: magnitudes.update({name: rms(out, (0, 1, 2, 3)).item()})
        )
    sigma = torch.tensor([0.02, 0.5, 3.0, 50.0])
    noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    net(noise * (sigma**2 + 0.25).sqrt().reshape(-1, 1, 1, 1), sigma, torch.eye(3)[[0, 1, 2, 0]])
    assert len(magnitudes) == len({*net.unet.enc, *net.unet.dec}) and all(
        0.7 < m < 1.3 for m in magnitudes.values()
    ), magnitudes


@pytest.mark.parametrize('taps', [(1, 1), (1, 3, 3, 1)])
def test_resampling_keeps_constants(taps):
    x = torch.full([1, 2, 8, 8], 1.5)
    for mode, size in (('down', 4), ('up', 16), ('keep', 8)):
        out = edm2.resample(x, taps, mode)
        assert out.shape == (1, 2, size, size)
        inner = out[..., 1:-1, 1:-1]  # longer filters see zeros beyond the border
        torch.testing.assert_close(inner, torch.full_like(inner, 1.5))


def test_the_output_is_bounded_by_the_clip():
    block = edm2.Block(16, 16, 16, flavor='dec', clip_act=0.25)
    assert block(torch.randn(1, 16, 4, 4), torch.randn(1, 16)).abs().max() == 0.25


# ----------------------------------------------------------------------------
# Forced weight normalization.


def test_a_training_pass_normalizes_all_weights_in_place_through_one_vector():
    """Magnitude one for every output channel; normalization's 1e-4 is more where a weight is small by chance."""
    net = small_net().train()
    flat = FlatParameters(net)
    flat.weights.data.mul_(3)
    net(*inputs(), return_logvar=True)
    for name, weight in weights(net).items():
        assert (rms(weight.detach(), tuple(range(1, weight.ndim))) - 1).abs().max() < 1e-3, name
        assert weight.untyped_storage().data_ptr() == flat.weights.untyped_storage().data_ptr()


@pytest.mark.parametrize('mode', ['evaluation', 'without gradients'])
def test_other_passes_leave_the_weights_alone_and_say_the_same(mode):
    """The weights' scale means nothing: 1e-3 covers what normalization adds to it, 1e-4 in every layer."""
    net = small_net().train()
    for weight in weights(net).values():
        weight.data.mul_(3)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with torch.set_grad_enabled(mode == 'evaluation'):
        expected = net.train(mode != 'evaluation')(*inputs())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    trained = net.train()(*inputs())
    assert not torch.equal(net.unet.out_conv.weight, before['unet.out_conv.weight'])
    assert (trained - expected).abs().max() < 1e-3 * expected.std()


def test_gradients_are_orthogonal_to_the_weights():
    """A weight's magnitude does not change the output: the reason why steps would only ever increase it (1e-4 as above)."""
    net = small_net().double().train()
    x, sigma, labels = inputs()
    denoised, logvar = net(x, sigma, labels, return_logvar=True)
    (denoised.square().sum() + logvar.sum()).backward()
    for name, weight in weights(net).items():
        dims = tuple(range(1, weight.ndim))
        assert weight.grad.norm() > 0, name
        along = (weight.detach() * weight.grad).mean(dim=dims).norm()
        assert along < 1e-3 * (rms(weight.detach(), dims) * rms(weight.grad, dims)).norm(), name


def test_a_pass_without_gradients_may_lie_between_a_prediction_and_its_backward_pass():
    net = small_net().train()
    prediction = net(*inputs())
    with torch.no_grad():
        target = net(*inputs())
    (prediction - 2 * target).square().sum().backward()
    assert all(p.grad is not None for name, p in net.unet.named_parameters())


def test_compiled_training_passes_are_one_graph_and_agree_with_eager_ones():
    eager, compiled = (small_net(channel_mult=[1], attn_resolutions=[8]).train() for _ in range(2))
    expected = eager(*inputs())
    torch.testing.assert_close(
        torch.compile(compiled, backend='aot_eager', fullgraph=True)(*inputs()), expected
    )
    torch.testing.assert_close(compiled.state_dict(), eager.state_dict())


# ----------------------------------------------------------------------------
# Dropout.


def test_dropout_is_restricted_to_the_given_resolutions():
    def dropped(**kwargs):
        return sorted({name.split('.')[1].partition('x')[0] for name in small_net(**kwargs).dropout_masks(2)})

    assert dropped() == [] and dropped(dropout=0.3) == ['4', '8']
    assert (
        dropped(dropout=0.3, dout_resolutions=[4]) == ['4']
        and dropped(dropout=0.3, dout_resolutions=[]) == []
    )


def test_masks_keep_the_right_share_and_scale_what_they_keep():
    net = small_net(dropout=0.3)
    masks = net.dropout_masks(64, torch.Generator().manual_seed(0))
    kept = torch.cat([mask.flatten() for mask in masks.values()]).double()
    assert abs(kept.mean() - 0.7) < 5 * (0.21 / len(kept)) ** 0.5
    for name, mask in masks.items():
        part, _, block = name.partition('.')
        assert torch.equal(getattr(net.unet, part)[block]._dropout(torch.ones(mask.shape), mask), mask / 0.7)


def test_the_same_masks_give_the_same_output_and_all_of_them_matter():
    net, (x, sigma, labels) = small_net(dropout=0.5).train(), inputs()
    with torch.no_grad():
        masks = net.dropout_masks(2)
        first = net(x, sigma, labels, dropout_masks=masks)
        assert torch.equal(net(x, sigma, labels, dropout_masks=masks), first)
        for name in masks:
            assert not torch.equal(
                net(x, sigma, labels, dropout_masks={**masks, name: ~masks[name]}), first
            ), name


def test_without_masks_a_training_network_drops_and_an_evaluating_one_does_not():
    net = small_net(dropout=0.5)
    with torch.no_grad():
        assert not torch.equal(net.train()(*inputs()), net(*inputs()))
        assert torch.equal(net.eval()(*inputs()), net(*inputs()))


# ----------------------------------------------------------------------------
# The network as a whole.


@pytest.mark.parametrize('channels, label_dim', [(1, 0), (4, 3)])
@pytest.mark.parametrize(
    'options', [{}, dict(channel_mult_noise=2, channel_mult_emb=3, label_balance=0.3, concat_balance=0.7)]
)
def test_every_parameter_learns(channels, label_dim, options):
    net, (x, sigma, labels) = small_net(channels, label_dim, **options).train(), inputs(channels)
    denoised, logvar = net(x, sigma, labels if label_dim else None, return_logvar=True)
    assert denoised.shape == x.shape and denoised.dtype == torch.float32 and logvar.shape == (2, 1, 1, 1)
    (denoised.square() + logvar).sum().backward()
    assert all(
        p.grad is not None and torch.isfinite(p.grad).all() and p.grad.norm() > 0 for p in net.parameters()
    )


def test_no_label_is_a_label_of_zeros_and_a_noise_level_may_be_a_number():
    net, (x, _, _) = small_net().eval(), inputs()
    expected = net(x, torch.full([2], 0.7), torch.zeros(2, 3))
    torch.testing.assert_close(net(x, 0.7), expected)
    assert net.round_sigma(0.7) == torch.tensor(0.7)


def test_augmentation_labels_are_refused():
    with pytest.raises(ValueError, match='no augmentation labels'):
        small_net()(*inputs(), augment_labels=torch.zeros(2, 9))


def test_diffusion_training_runs():
    net = small_net(dropout=0.2).train()
    loss = Loss(loss_diffusion, kind='edm')(
        net, torch.zeros(4, 1, 8, 8), torch.eye(3)[[0, 1, 2, 0]], SampleRng(0, 0, 4)
    )
    loss.sum().backward()
    assert loss.shape == (4,) and net.unet.out_gain.grad != 0


def test_a_student_is_distilled_from_a_teacher_which_stays_as_it_is():
    """Twenty steps of Adam on one batch with fixed draws, from the teacher's weights, more than halve the loss."""
    teacher, student = (
        small_net().eval().requires_grad_(False),
        small_net(dropout=0.1, dout_resolutions=[4]).train(),
    )
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    flat = FlatParameters(student)
    optimizer = torch.optim.Adam([flat.weights], lr=1e-2)
    loss_fn = Loss(
        'mcd',
        teacher,
        S=2,
        T_start=8,
        T_end=8,
        T_anneal_kimg=0,
        cd_loss='l2',
        cd_weight_mode='edm',
        anchor_hops=2,
    )
    images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)) / 2
    losses = []
    for _ in range(20):
        flat.weights.grad.zero_()
        loss = loss_fn(student, images, torch.eye(3)[torch.arange(8) % 3], SampleRng(0, 0, 8)).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2, losses
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_the_widths_of_embeddings_are_those_of_the_widest_level_or_multiples_that_are_asked_for():
    """The Fourier features' are the first level's."""
    widths = lambda **options: (
        small_net(**options).unet.emb_fourier.freqs.numel(),
        small_net(**options).unet.emb_noise.weight.shape[0],
    )
    assert widths() == (16, 32) and widths(channel_mult_noise=3, channel_mult_emb=5) == (48, 80)
