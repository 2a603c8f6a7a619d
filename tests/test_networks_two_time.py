"""Networks with a second noise input: they start as the denoiser that they are made from, say so when it is missing,
and are saved like any other network."""

import os
import subprocess
import sys

import pytest
import torch
from stock_edm import STAND_IN

from training import networks
from training.checkpoint import load_network, save_snapshot
from training.networks import edm2 as networks_edm2

SIZES = dict(model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], dropout=0.2)
NCSNPP = dict(
    model_type='SongUNet',
    embedding_type='fourier',
    encoder_type='residual',
    channel_mult_noise=2,
    resample_filter=[1, 3, 3, 1],
    augment_dim=9,
)
KINDS = dict(
    adm=(networks.EDMPrecond, SIZES),
    ddpmpp=(networks.EDMPrecond, dict(SIZES, model_type='SongUNet')),
    ncsnpp=(networks.VEPrecond, dict(SIZES, **NCSNPP)),
    vp=(networks.VPPrecond, dict(SIZES, model_type='SongUNet')),
    cm=(networks.CMPrecond, SIZES),
    edm2=(networks_edm2.Precond, dict(SIZES, channels_per_head=16, use_fp16=False)),
)


def network(kind, two_time, noise=True):
    cls, sizes = KINDS[kind]
    torch.manual_seed(0)
    net = cls(8, 1, 3, **sizes, **(dict(two_time=True) if two_time else {}))
    if noise:  # the output layers start at zero
        for name, parameter in net.named_parameters():
            if '_end' not in name and 'end_' not in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return net.requires_grad_(False)


def pair(kind):
    """A denoiser, and the two-time network made from it."""
    denoiser, flow_map = network(kind, False), network(kind, True)
    missing, unexpected = flow_map.load_state_dict(denoiser.state_dict(), strict=False)
    assert missing and not unexpected
    return denoiser.eval(), flow_map.eval()


X, LABELS = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.eye(3)
SIGMA, R = torch.tensor([80.0, 0.7, 0.002]), torch.tensor([2.0, 0.0, 0.002])


@pytest.mark.parametrize('kind', KINDS)
def test_it_starts_as_its_denoiser_at_every_end_bit_for_bit(kind):
    denoiser, flow_map = pair(kind)
    expected = denoiser(X * 3, SIGMA, LABELS)
    for r in (R, SIGMA, torch.zeros(3), 0.0, torch.tensor(0.001)):
        assert torch.equal(flow_map(X * 3, SIGMA, LABELS, r=r), expected)
    # With the same dropout masks too, and in half precision.
    masks = flow_map.train().dropout_masks(3, torch.Generator().manual_seed(2))
    assert masks.keys() == denoiser.train().dropout_masks(3).keys() and masks
    denoiser.use_bf16 = flow_map.use_bf16 = True
    expected = denoiser(X, SIGMA, LABELS, dropout_masks=masks)
    assert torch.equal(flow_map(X, SIGMA, LABELS, r=R, dropout_masks=masks), expected)


@pytest.mark.parametrize('kind', KINDS)
def test_only_the_last_layer_of_the_second_embedding_learns_at_first_then_all_of_it(kind):
    _, flow_map = pair(kind)
    end = {name: p.requires_grad_(True) for name, p in flow_map.named_parameters() if 'end_' in name}
    end |= {name: p.requires_grad_(True) for name, p in flow_map.named_parameters() if '_end' in name}
    assert end

    def slopes():
        flow_map.zero_grad()
        flow_map(X, SIGMA, LABELS, r=R).square().sum().backward()
        return {name for name, p in end.items() if p.grad.abs().sum() > 0}

    last = {name for name in end if name.endswith(('layer1.weight', 'layer1.bias', 'end_gain'))}
    assert last and slopes() == last
    with torch.no_grad():
        for name in last:
            end[name].add_(torch.randn_like(end[name]) * 0.1)
    assert slopes() == end.keys()
    # Then its outputs depend on where the step ends, also very near 0.
    outputs = [flow_map(X, SIGMA, LABELS, r=torch.full([3], r)) for r in (0.0, 0.002, 0.1, 1.0, 40.0)]
    assert all(not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


@pytest.mark.parametrize('kind', KINDS)
def test_a_level_too_few_or_too_many_is_said(kind):
    denoiser, flow_map = pair(kind)
    with pytest.raises(ValueError, match='two-time network: give the noise level at which the step ends'):
        flow_map(X, SIGMA, LABELS)
    with pytest.raises(ValueError, match='one noise level, and no r'):
        denoiser(X, SIGMA, LABELS, r=R)


@pytest.mark.parametrize('kind', KINDS)
def test_a_snapshot_brings_it_back(kind, tmp_path):
    _, flow_map = pair(kind)
    for parameter in flow_map.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_snapshot(tmp_path / 'net.pkl', flow_map, objective='flowmap')
    loaded = load_network(tmp_path / 'net.pkl')
    assert loaded.two_time
    assert torch.equal(loaded(X, SIGMA, LABELS, r=R), flow_map(X, SIGMA, LABELS, r=R))


def test_stock_edm_evaluates_it_and_is_told_of_the_level_that_it_does_not_give(tmp_path):
    _, flow_map = pair('adm')
    save_snapshot(tmp_path / 'net.pkl', flow_map, objective='flowmap')
    (tmp_path / 'torch_utils').mkdir()
    (tmp_path / 'torch_utils' / '__init__.py').touch()
    (tmp_path / 'torch_utils' / 'persistence.py').write_text(STAND_IN)
    script = """
import pickle, torch
net = pickle.load(open('net.pkl', 'rb'))['ema']
x, sigma, labels = torch.ones(2, 1, 8, 8), torch.tensor([2.0, 1.0]), torch.eye(3)[:2]
assert net(x, sigma, labels, r=torch.zeros(2)).shape == x.shape
try:
    net(x, sigma, labels)
except ValueError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, '-c', script],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert 'r=r); 0 gives the image' in run.stdout
