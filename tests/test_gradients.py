"""Rounded weights and reduced gradients of a step: the numbers of weights that are rounded in every pass, and of DDP."""

import copy
import json

import pytest
import torch
from helpers import torchrun
from losses import Loss
from test_execution import KINDS, build, inputs

from torch_utils.flat import FlatParameters
from torch_utils.gradients import Gradients
from training import execution
from training.rng import SampleRng
from training.weight_update import WeightUpdate

BATCH, ROUNDS, STEPS = 4, 2, 3


def train(kind: str, objective: str, rounded: bool) -> dict[str, object]:
    """Losses and what is left after steps of two rounds, the second of which is not finite."""
    net = execution.in_precision(build(kind), 'bf16')
    teacher = execution.in_precision(build(kind).eval().requires_grad_(False), 'bf16')
    options = dict(S=2, T_start=4, T_end=8, T_anneal_kimg=0.02, anchor_hops=2)
    loss_fn = Loss(objective, teacher, net, **(options if objective == 'mcd' else dict(kind='edm')))
    flat = FlatParameters(net)
    gradients = Gradients(net, flat, *(execution.rounded_parameters(net) if rounded else []))
    assert (gradients.net is net) == (not rounded)
    update, losses = WeightUpdate(flat, (0.9, 0.99), 1e-8, None, grad_clip=1.0), []
    for step in range(STEPS):
        loss_fn.begin_step(step * BATCH)
        gradients.begin_step()
        for i in range(ROUNDS):
            first = step * BATCH + i * BATCH // ROUNDS
            rng = SampleRng(0, first, BATCH // ROUNDS, torch.device('cpu'))
            images, _, labels, _ = inputs(net, BATCH // ROUNDS)
            with gradients.round(last=i == ROUNDS - 1):
                values = loss_fn(gradients.net, images, labels, rng)
                losses.append(values.detach())
                update.scaled_sum(values * (float('inf') if (step, i) == (1, 0) else 1)).backward()
        update.step(1e-3)
    assert update.skips == 1
    return dict(
        losses=torch.stack(losses), weights=flat.weights, state=update.state_dict(), net=net.state_dict()
    )


def assert_equal(ours, theirs) -> None:
    """Bit for bit."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize('kind, objective', [('ncsnpp', 'mcd'), ('ddpmpp', 'mcd'), ('adm', 'diffusion')])
def test_weights_that_are_rounded_once_a_step_train_as_those_that_are_rounded_in_every_pass(kind, objective):
    """Losses, weights and moments, through two rounds a step, clipped norms, a dynamic loss scale and a skipped step."""
    assert_equal(train(kind, objective, rounded=True), train(kind, objective, rounded=False))


def test_a_rounded_network_is_the_network_with_the_same_weights():
    """Of its parameters only those of convolutions and norms are copies; gradients of the others need no lifting."""
    net = execution.in_precision(build('adm'), 'bf16')
    flat = FlatParameters(net)
    gradients = Gradients(net, flat, *execution.rounded_parameters(net))
    flat.weights.data.mul_(1.5)
    gradients.begin_step()
    own, rounded = dict(net.named_parameters()), dict(gradients.net.named_parameters())
    assert own.keys() == rounded.keys()
    shared = {name for name in own if own[name] is rounded[name]}
    assert {name.split('.')[-2] for name in shared} == {'affine', 'map_layer0', 'map_layer1', 'map_label'}
    for name in own.keys() - shared:
        assert torch.equal(rounded[name], own[name].bfloat16()) and rounded[name].dtype == torch.bfloat16
    assert all(a is b for a, b in zip(net.buffers(), gradients.net.buffers()))
    assert net.training and gradients.net.training and {p.dtype for p in net.parameters()} == {torch.float32}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('precision', ['fp32', 'fp16', 'fp64', 'bf16'])
def test_what_is_rounded(kind, precision):
    """Nothing on CPUs but by BF16, and nothing of EDM2's networks, which normalize their weights before."""
    net = execution.in_precision(build(kind), precision)
    rounded, dtype = execution.rounded_parameters(net)
    assert bool(rounded) == (precision == 'bf16' and kind != 'edm2')
    assert dtype == (torch.bfloat16 if precision == 'bf16' else None)
    gradients = Gradients(net, FlatParameters(net), rounded, dtype)
    assert (gradients.net is net) == (not rounded) and copy.deepcopy(gradients.net) is not net


@pytest.mark.parametrize('processes', [2, pytest.param(3, marks=pytest.mark.slow)])
def test_gradients_are_those_of_ddp(processes):
    """Two processes to the bit, because a sum of two has one order; three to the rounding of gloo's sums, in BF16 once
    the weights have been rounded otherwise."""
    found = json.loads(torchrun(processes, '-m', 'tests.gradient_steps').stdout)
    for case, result in found.items():
        assert result['difference'] <= (0 if processes == 2 else 1e-2 if 'bf16' in case else 1e-5), found
        assert result['same'] and result['slices'] > 3, found
        assert result['rounded'] == ('bf16' in case and 'edm2' not in case)
