"""Parameters as views of one vector."""

import copy

import pytest
import torch

from torch_utils.flat import FlatParameters


def make_net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3, padding=1),
        torch.nn.GroupNorm(1, 3),
        torch.nn.Flatten(),
        torch.nn.Linear(48, 5),
    )


def test_training_on_the_vector_equals_training_on_the_parameters():
    """Two optimizers over ten steps, bit for bit but for the order of sums inside the optimizer: 1e-6."""
    plain, moved = make_net(), make_net()
    flat = FlatParameters(moved)
    first, second = torch.optim.Adam(plain.parameters(), lr=1e-2), torch.optim.Adam([flat.weights], lr=1e-2)
    for step in range(10):
        x = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(step))
        first.zero_grad()
        flat.weights.grad.zero_()
        plain(x).square().sum().backward()
        moved(x).square().sum().backward()
        norm = torch.cat([p.grad.flatten() for p in plain.parameters()]).norm()
        torch.testing.assert_close(flat.weights.grad.norm(), norm)
        first.step()
        second.step()
    for a, b in zip(plain.parameters(), moved.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_network_keeps_its_names_values_and_independence():
    net = make_net()
    before = copy.deepcopy(net.state_dict())
    flat = FlatParameters(net)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    other = copy.deepcopy(net)
    flat.weights.data.zero_()
    assert not any(p.any() for p in net.parameters()) and all(
        torch.equal(before[name], t) for name, t in other.state_dict().items()
    )
    net.load_state_dict(before)
    assert flat.weights.abs().sum() > 0


def test_mixed_types_are_refused():
    net = make_net()
    net[3].double()
    with pytest.raises(ValueError, match='several types'):
        FlatParameters(net)
