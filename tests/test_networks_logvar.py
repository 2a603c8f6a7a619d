"""The estimate of a loss's log-variance that EDM's networks may have: it starts at 0, leaves everything else as it is, and
is found and left out wherever networks are read and written."""

import pytest
import torch
from helpers import FAST, TINY_NETWORK, invoke
from stock_edm import assert_stock_edm_agrees

import train
from training import networks
from training.checkpoint import load_network, save_snapshot
from training.interchange.diffusers import unet_weights
from training.interchange.safetensors import load_safetensors, save_safetensors

SIZES = dict(model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], dropout=0.2)
KINDS = dict(
    adm=(networks.EDMPrecond, SIZES),
    ddpmpp=(networks.EDMPrecond, dict(SIZES, model_type='SongUNet')),
    cm=(networks.CMPrecond, SIZES),
)
X, LABELS = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.eye(3)
SIGMA = torch.tensor([80.0, 0.7, 0.002])
HEAD = {'logvar_fourier.freqs', 'logvar_linear.weight'}


def network(kind, **options):
    cls, sizes = KINDS[kind]
    torch.manual_seed(0)
    net = cls(8, 1, 3, **sizes, **options)
    for name, parameter in net.named_parameters():
        if name not in HEAD:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
    return net.eval().requires_grad_(False)


def trained(kind):
    """A network whose estimate has left 0."""
    net = network(kind, logvar_channels=16)
    torch.nn.init.normal_(net.logvar_linear.weight)
    return net


@pytest.mark.parametrize('kind', KINDS)
def test_it_starts_at_zero_and_leaves_the_network_as_it_is(kind):
    plain, net = network(kind), network(kind, logvar_channels=16)
    assert net.state_dict().keys() - plain.state_dict().keys() == HEAD and not HEAD & {*plain.state_dict()}
    denoised, logvar = net(X, SIGMA, LABELS, return_logvar=True)
    assert torch.equal(denoised, plain(X, SIGMA, LABELS)) and torch.equal(logvar, torch.zeros(3, 1, 1, 1))
    # The random weights of the rest are the same.
    cls, sizes = KINDS[kind]
    made = []
    for options in ({}, dict(logvar_channels=16)):
        torch.manual_seed(0)
        made.append(cls(8, 1, 3, **sizes, **options).model.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.parametrize('kind', KINDS)
def test_it_learns_a_function_of_the_noise_level_alone(kind):
    net = network(kind, logvar_channels=16).requires_grad_(True)
    optimizer, wanted = (
        torch.optim.Adam(net.logvar_linear.parameters(), lr=0.1),
        torch.tensor([3.0, -2.0, 1.0]),
    )
    for _ in range(100):
        optimizer.zero_grad()
        (net(X, SIGMA, LABELS, return_logvar=True)[1].flatten() - wanted).square().sum().backward()
        optimizer.step()
    for x in (X, -X):
        found = net(x, SIGMA, LABELS, return_logvar=True)[1].flatten()
        torch.testing.assert_close(found, wanted, atol=0.1, rtol=0)


def test_a_network_without_it_says_so():
    with pytest.raises(ValueError, match='no estimate of log-variances: build it with logvar_channels'):
        network('adm')(X, SIGMA, LABELS, return_logvar=True)


@pytest.mark.parametrize('kind', KINDS)
def test_a_snapshot_and_safetensors_bring_it_back(kind, tmp_path):
    net = trained(kind)
    save_snapshot(tmp_path / 'net.pkl', net, objective='scd')
    net.metadata = dict(objective='scd')
    save_safetensors(tmp_path / 'net.safetensors', net)
    for loaded in (load_network(tmp_path / 'net.pkl'), load_safetensors(tmp_path / 'net.safetensors')):
        assert loaded.state_dict().keys() == net.state_dict().keys()
        assert all(
            torch.equal(tensor, net.state_dict()[name]) for name, tensor in loaded.state_dict().items()
        )
        logvar = loaded(X, SIGMA, LABELS, return_logvar=True)[1]
        torch.testing.assert_close(logvar, net(X, SIGMA, LABELS, return_logvar=True)[1])


def test_stock_edm_evaluates_a_network_with_it(tmp_path):
    net = trained('adm')
    save_snapshot(tmp_path / 'net.pkl', net, objective='scd')
    assert_stock_edm_agrees(tmp_path, dict(net=net), dict(x=X, sigma=SIGMA, labels=LABELS))


def test_diffusers_do_without_it():
    weights, plain = unet_weights(trained('adm')), unet_weights(network('adm'))
    assert weights.keys() == plain.keys()
    assert all(torch.equal(weights[name], plain[name]) for name in plain)


RUN = [
    *FAST,
    '--cond=1',
    '--batch=32',
    '--duration=0.000064',
    '--dropout=0',
    '--lr_rampup=0',
    '--ema=0.001kimg',
]


@pytest.mark.parametrize('start', ['teacher', 'transfer'])
def test_a_run_adds_it_to_a_network_without_it(start, digits, teacher, tmp_path):
    """The rest starts as that network, without a warning, and the snapshot has an estimate that has learned."""
    options = ['--objective=scd', f'--teacher={teacher}'] if start == 'teacher' else ['--objective=sct']
    if start == 'transfer':
        options += [*TINY_NETWORK, f'--transfer={teacher}']
    result = invoke(train.main, f'--outdir={tmp_path}', f'--data={digits}', *RUN, *options, '--lr=1e-6')
    assert result.exit_code == 0, result.output
    assert 'start at random' not in result.output
    net, origin = load_network(tmp_path / 'network-snapshot-000000.pkl'), load_network(teacher)
    theirs = origin.state_dict()
    for name, tensor in net.state_dict().items():
        if name not in HEAD:
            torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=0)
    assert {*net.state_dict()} - {*theirs} == HEAD and net.logvar_linear.weight.abs().sum() > 0


def test_a_run_with_the_prior_weight_has_none(digits, teacher, tmp_path):
    options = ['--objective=scd', f'--teacher={teacher}', '--tangent_weight=prior']
    result = invoke(train.main, f'--outdir={tmp_path}', f'--data={digits}', *RUN, *options)
    assert result.exit_code == 0, result.output
    assert not HEAD & {*load_network(tmp_path / 'network-snapshot-000000.pkl').state_dict()}


def test_a_teacher_that_has_one_lends_its_weights_to_objectives_that_use_none(digits, tmp_path, teacher):
    """Easy consistency tuning from a snapshot of sct: the options of the network are found, the estimate is left out."""
    first, second = tmp_path / 'first', tmp_path / 'second'
    common = [f'--data={digits}', *RUN]
    result = invoke(train.main, f'--outdir={first}', *common, '--objective=sct', f'--transfer={teacher}')
    assert result.exit_code == 0, result.output
    snapshot = first / 'network-snapshot-000000.pkl'
    assert {*load_network(snapshot).state_dict()} >= HEAD
    result = invoke(train.main, f'--outdir={second}', *common, '--objective=ect', f'--transfer={snapshot}')
    assert result.exit_code == 0, result.output
    assert not HEAD & {*load_network(second / 'network-snapshot-000000.pkl').state_dict()}
