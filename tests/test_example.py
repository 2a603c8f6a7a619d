"""example.py samples as generate.py does, which it repeats in a few lines."""

import pytest
import torch

import example
from training import networks, samplers
from training.checkpoint import load_network, save_snapshot

METADATA = {
    'teacher': {},
    'student': dict(objective='mcd', sigmas=[80.0, 5.0, 0.7, 0.0]),
    'flow map': dict(objective='flowmap', steps=[1, 2, 4], sigma_min=0.002, sigma_max=80.0),
}


@pytest.mark.parametrize('kind', METADATA)
def test_its_images_are_those_of_the_network_s_sampler(tmp_path, monkeypatch, kind):
    torch.manual_seed(0)
    two_time = dict(two_time=True) if kind == 'flow map' else {}
    net = networks.EDMPrecond(
        8, 1, 3, model_channels=16, channel_mult=[1], num_blocks=1, attn_resolutions=[], **two_time
    )
    # The last layers, whose weights are zero at first, too.
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    snapshot = tmp_path / 'net.pkl'
    save_snapshot(snapshot, net, **METADATA[kind])

    seen, checked = [], example.checked_images
    monkeypatch.setattr(
        example, 'checked_images', lambda encoder, images: seen.append(images) or checked(encoder, images)
    )
    example.main(snapshot, tmp_path / 'grid.png', rows=2, columns=3)

    torch.manual_seed(0)
    latents, labels = torch.randn(6, 1, 8, 8), torch.eye(3)[[0, 1, 2] * 2]
    with torch.no_grad():
        expected = samplers.sample(load_network(snapshot), latents, labels)
    assert torch.allclose(seen[0], expected, atol=1e-5) and (tmp_path / 'grid.png').exists()
