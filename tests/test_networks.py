"""Networks: shapes, dropout, preconditioning. Golden outputs are in test_checkpoint.py, through the loader."""

import itertools

import pytest
import torch

from training import networks
from training.networks import edm2 as networks_edm2

SONG = dict(model_type='SongUNet', model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8])
ADM = dict(
    model_type='DhariwalUNet', model_channels=16, channel_mult=[1, 4], num_blocks=1, attn_resolutions=[4]
)


@pytest.mark.parametrize('precond', sorted(networks.PRECONDS))
@pytest.mark.parametrize('unet', [SONG, ADM], ids=['song', 'adm'])
@pytest.mark.parametrize('label_dim, augment_dim', [(0, 0), (3, 0), (0, 9)])
def test_every_combination_denoises_and_trains(precond, unet, label_dim, augment_dim):
    torch.manual_seed(0)
    net = networks.PRECONDS[precond](8, 1, label_dim, augment_dim=augment_dim, **unet).train()
    labels = torch.eye(3)[[0, 1]] if label_dim else None
    augment = torch.randn(2, 9) if augment_dim else None
    out = net(torch.randn(2, 1, 8, 8), torch.tensor([0.5, 3.0]), labels, augment_labels=augment)
    assert out.shape == (2, 1, 8, 8) and out.dtype == torch.float32
    out.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize(
    'encoder, decoder, embedding, taps',
    itertools.product(
        ['standard', 'skip', 'residual'],
        ['standard', 'skip'],
        ['positional', 'fourier'],
        [[1, 1], [1, 3, 3, 1]],
    ),
)
def test_every_song_variant_runs(encoder, decoder, embedding, taps):
    torch.manual_seed(0)
    net = networks.VEPrecond(
        8,
        3,
        encoder_type=encoder,
        decoder_type=decoder,
        embedding_type=embedding,
        resample_filter=taps,
        **SONG,
    )
    assert net(torch.randn(2, 3, 8, 8), torch.ones(2)).shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    'argument, value',
    [('encoder_type', 'x'), ('decoder_type', 'x'), ('embedding_type', 'x'), ('model_type', 'x')],
)
def test_unknown_variants_are_refused_by_name(argument, value):
    with pytest.raises(ValueError, match="'x' is not one of"):
        networks.EDMPrecond(8, 1, **{**SONG, argument: value})


@pytest.mark.parametrize('unet', [SONG, ADM], ids=['song', 'adm'])
def test_dropout_is_restricted_to_the_given_resolutions(unet):
    everywhere = networks.EDMPrecond(8, 1, dropout=0.3, **unet)
    coarse = networks.EDMPrecond(8, 1, dropout=0.3, dout_resolutions=[4], **unet)
    assert {name.split('.')[1].partition('x')[0] for name in everywhere.dropout_masks(2)} == {'8', '4'}
    assert {name.split('.')[1].partition('x')[0] for name in coarse.dropout_masks(2)} == {'4'}
    assert networks.EDMPrecond(8, 1, dropout=0.3, dout_resolutions=[], **unet).dropout_masks(2) == {}


def test_masks_keep_the_right_share_and_scale_what_they_keep():
    net = networks.EDMPrecond(8, 1, dropout=0.3, **ADM)
    masks = net.dropout_masks(64, torch.Generator().manual_seed(0))
    kept = torch.cat([mask.flatten() for mask in masks.values()]).double()
    assert abs(kept.mean() - 0.7) < 5 * (0.21 / len(kept)) ** 0.5
    name, mask = next(iter(masks.items()))
    block = net.model.enc[name.removeprefix('enc.')]
    assert torch.equal(block._dropout(torch.ones(mask.shape), mask), mask / 0.7)


@pytest.mark.parametrize('keep_mask', [networks.keep_mask, networks_edm2.keep_mask], ids=['edm', 'edm2'])
@pytest.mark.parametrize('probability', [0.13, 0.5, 0.87, 2**-16, 1 - 1e-9])
def test_values_of_masks_are_independent_also_where_they_come_from_one_random_number(keep_mask, probability):
    shape = [25, 3, 101, 67]  # not a multiple of four
    kept = keep_mask(shape, probability, 'cpu', torch.Generator().manual_seed(1))
    again = keep_mask(shape, probability, 'cpu', torch.Generator().manual_seed(1))
    assert kept.shape == torch.Size(shape) and kept.dtype == torch.bool and torch.equal(kept, again)
    lanes = kept.flatten()[: kept.numel() // 4 * 4].reshape(-1, 4).double()
    rate, count = min(probability, 1 - 2**-16), len(lanes)
    assert ((lanes.mean(dim=0) - rate).abs() < 5 * (rate * (1 - rate) / count) ** 0.5).all()
    together = (lanes - rate).T @ (lanes - rate) / count  # of two of them: no covariance
    assert (together - together.diag().diag()).abs().max() < 5 * rate * (1 - rate) / count**0.5


def test_without_masks_a_training_network_drops_and_an_evaluating_one_does_not():
    torch.manual_seed(0)
    net = networks.EDMPrecond(8, 1, dropout=0.5, **ADM)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, sigma = torch.randn(2, 1, 8, 8), torch.ones(2)
    assert not torch.equal(net.train()(x, sigma), net(x, sigma))
    assert torch.equal(net.eval()(x, sigma), net(x, sigma))


def test_edm_preconditioning_has_unit_variance_in_and_out():
    """c_in scales x to unit variance, and c_skip, c_out leave the network a target of unit variance (Karras et al. 2022, Appendix B.6)."""
    net = networks.EDMPrecond(8, 1, **ADM)
    sigma = torch.tensor([0.01, 0.5, 30.0], dtype=torch.float64)
    c_skip, c_out, c_in, _ = net.coefficients(sigma)
    torch.testing.assert_close(c_in**2 * (0.25 + sigma**2), torch.ones_like(sigma))
    target_variance = ((1 - c_skip) ** 2 * 0.25 + c_skip**2 * sigma**2) / c_out**2
    torch.testing.assert_close(target_variance, torch.ones_like(sigma))


def test_a_double_network_computes_in_double():
    net = networks.EDMPrecond(8, 1, **ADM).double()
    assert net(torch.randn(2, 1, 8, 8), torch.ones(2)).dtype == torch.float64


def test_iddpm_rounds_to_its_own_levels():
    net = networks.iDDPMPrecond(8, 1, **ADM)
    sigma = net.u[[10, 500, 900]]
    assert torch.equal(net.round_sigma(sigma * 1.0001), sigma)
    assert net.round_sigma(float(net.u[3])) == net.u[3]


ROLES = {'map_label', 'map_augment', 'map_layer0', 'conv0', 'conv1', 'affine', 'skip', 'qkv', 'proj'}


def spread_of(module):
    """(largest absolute weight, their root mean square, the same of biases), and how many values go in and come out."""
    weight, inputs = module.weight.detach(), module.weight[0].numel()
    bias = torch.zeros(1) if module.bias is None else module.bias.detach()
    return (
        weight.abs().max().item(),
        weight.square().mean().sqrt().item(),
        bias.abs().max().item(),
        inputs,
        weight.numel() // inputs,
    )


def modules_with_weights(net):
    """Linear and Conv2d modules by name."""
    found = {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, (networks.Linear, networks.Conv2d))
    }
    return {name: module for name, module in found.items() if module.weight is not None}


def test_song_begins_with_glorots_weights_and_without_biases():
    """Uniform in ±√(6 / (fan_in + fan_out)), so √3 above the root mean square; 1e-5 of that before a sum or an output, √(1/5) of it before attention.
    A convolution's fans are channels times 9, or times 1."""
    torch.manual_seed(0)
    found = modules_with_weights(networks.EDMPrecond(8, 3, 5, augment_dim=9, **dict(SONG, model_channels=32)))
    for name, module in found.items():
        largest, spread, bias, inputs, outputs = spread_of(module)
        taps = module.weight[0, 0].numel() if module.weight.ndim == 4 else 1
        scale = (
            1e-5 if name.endswith(('conv1', 'proj', 'aux_conv')) else 0.2**0.5 if name.endswith('qkv') else 1
        )
        bound = scale * (6 / (inputs + outputs * taps)) ** 0.5
        assert 0.98 * bound < largest <= bound and spread == pytest.approx(bound / 3**0.5, rel=0.1), name
        assert bias == 0, name
    assert {name.rpartition('.')[2] for name in found} >= ROLES


def test_adm_begins_as_pytorchs_own_layers_do_with_zeros_before_sums_and_outputs():
    """Weights and biases uniform in ±1/√fan_in; label embeddings normal of unit variance, whatever the number of labels."""
    torch.manual_seed(0)
    found = modules_with_weights(networks.EDMPrecond(8, 3, 5, augment_dim=9, **dict(ADM, model_channels=64)))
    for name, module in found.items():
        largest, spread, bias, inputs, _ = spread_of(module)
        if name.endswith(('conv1', 'proj', 'out_conv', 'map_augment')):
            assert largest == bias == 0, name
        elif name.endswith('map_label'):
            assert spread == pytest.approx(1, rel=0.1) and largest > 2.5 and module.bias is None
        else:
            bound = inputs**-0.5
            assert 0.98 * bound < largest <= bound and spread == pytest.approx(bound / 3**0.5, rel=0.1), name
            assert 0.8 * bound < bias <= bound, name
    assert {name.rpartition('.')[2] for name in found} >= ROLES


@pytest.mark.parametrize(
    'net',
    [
        lambda: networks.EDMPrecond(8, 1, **SONG),
        lambda: networks_edm2.Precond(8, 1, 0, model_channels=8, channel_mult=[1]),
    ],
    ids=['edm', 'edm2'],
)
@pytest.mark.parametrize('width', [0, 4])
def test_networks_without_classes_take_no_notice_of_labels(net, width):
    """A data set without labels has some of width 0."""
    torch.manual_seed(0)
    net, x = net().eval(), torch.randn(2, 1, 8, 8)
    for parameter in net.parameters():  # zeros would hide the rest
        torch.nn.init.normal_(parameter, std=0.1)
    assert torch.equal(net(x, torch.ones(2), torch.ones(2, width)), net(x, torch.ones(2), None))
