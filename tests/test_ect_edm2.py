"""Easy consistency tuning of EDM2's networks against the published loss, written out by itself (Geng et al.
2024; their code for ImageNet-64)."""

import math

import pytest
import torch
from losses import Loss, Recorder

from training.networks import edm2 as networks_edm2
from training.objectives import OBJECTIVES
from training.resolution import ROUNDING
from training.rng import SampleRng

COUNT, STAGE_NIMG = 48, 3_200_000


def network(dropout=0.4):
    """Random weights, in place of the zeros from which a network starts, dropout at 4x4 alone."""
    torch.manual_seed(0)
    net = networks_edm2.Precond(
        8,
        2,
        3,
        use_fp16=False,
        model_channels=16,
        channel_mult=[1, 2],
        num_blocks=1,
        attn_resolutions=[],
        dropout=dropout,
        dout_resolutions=[4],
    )
    for name, parameter in net.named_parameters():
        if name.endswith('gain'):
            torch.nn.init.constant_(parameter, 0.7)
    net.logvar_linear.requires_grad_(False)
    for _ in range(
        3
    ):  # as after any step: what a pass with gradients does to weights once more changes nothing
        networks_edm2.force_unit_weights(net.double())
    return net.train()


def published_loss(net, y, labels, stage, noise, normal, masks):
    """Mean over images of (1/t² + 1/sigma_d²) (sqrt(‖f(y + t n; t) − f(y + r n; r)‖² + c²) − c), f(…; r)
    without gradient, y itself where r = 0.

    ln t = −0.8 + 1.6 u; r = max(t (1 − (1 + 8 / (1 + e^t)) / 4^(stage+1)), 0); c = 0.06; sigma_d = 0.5. One
    image after the other. `net` is not in training mode, so that its weights stay as they are.
    """
    total = 0
    for i in range(len(y)):
        t = math.exp(-0.8 + 1.6 * float(normal[i]))
        r = max(t * (1 - (1 + 8 / (1 + math.exp(t))) / 4 ** (stage + 1)), 0)
        f = lambda level, i=i: net(
            y[i : i + 1] + level * noise[i : i + 1],
            torch.tensor([level], dtype=torch.float64),
            labels[i : i + 1],
            dropout_masks={name: mask[i : i + 1] for name, mask in masks.items()},
        )
        with torch.no_grad():
            target = f(r) if r > 0 else y[i : i + 1]
        squared = (f(t) - target).square().sum()
        total = total + (t * t + 0.25) / (0.5 * t) ** 2 * ((squared + 0.06**2).sqrt() - 0.06)
    return total / len(y)


@pytest.mark.parametrize('stage', [0, 1, 3])
def test_the_loss_and_its_gradient_are_the_published_ones_with_edm2s_defaults(stage):
    """To 1e-5: the student's pass normalizes weights once more, by 1e-8, and the last stage compares outputs
    at times 1 − r/t = 4^-4 apart. In the first many targets are images."""
    net, rng = network(), SampleRng(5, 0, COUNT)
    generator = torch.Generator().manual_seed(1)
    y = torch.rand(COUNT, 2, 8, 8, generator=generator, dtype=torch.float64) * 2 - 1
    labels = torch.eye(3, dtype=torch.float64)[torch.arange(COUNT) % 3]
    of = OBJECTIVES['ect']
    options = {name: of.edm2.get(name, default) for name, default in of.options.items()}
    loss = Loss('ect', **options | dict(stage_nimg=STAGE_NIMG))
    loss.begin_step(stage * STAGE_NIMG)
    recorder = Recorder(net).train()
    ours = loss(recorder, y, labels, rng).mean()
    _, masks = recorder.calls[-1]
    gradients = torch.autograd.grad(ours, [p for p in net.parameters() if p.requires_grad])
    noise, normal = (
        SampleRng(5, 0, COUNT).normal('noise', y.shape[1:]),
        SampleRng(5, 0, COUNT).normal_on_host('sigma'),
    )
    theirs = published_loss(net.eval(), y, labels, stage, noise, normal, masks)
    expected = torch.autograd.grad(theirs, [p for p in net.parameters() if p.requires_grad])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert masks and all(
        torch.allclose(a, b, rtol=0, atol=1e-4 * float(b.abs().max())) for a, b in zip(gradients, expected)
    )


@pytest.mark.parametrize('weight', ['gap', 'snr', 'inv_sum'])
def test_no_other_weight_is_the_published_one(weight):
    """So that the test above can fail: by more than a hundredth."""
    net, images = network(0), torch.zeros(COUNT, 2, 8, 8, dtype=torch.float64)
    of = OBJECTIVES['ect']
    value = {}
    for name in ('karras', weight):
        options = {option: of.edm2.get(option, default) for option, default in of.options.items()}
        loss = Loss('ect', **options | dict(stage_nimg=1, ect_weight=name))
        loss.begin_step(3)
        value[name] = (
            loss(net, images, torch.eye(3).double()[torch.zeros(COUNT, dtype=int)], SampleRng(5, 0, COUNT))
            .mean()
            .item()
        )
    assert abs(value[weight] / value['karras'] - 1) > 0.01


def test_the_roundings_that_gaps_are_held_against_are_those_of_the_formats():
    """Half of the distance from 1 to the next number; TF32 has FP16's 10 bits of mantissa."""
    formats = dict(
        bf16=torch.bfloat16, fp16=torch.float16, tf32=torch.float16, fp32=torch.float32, fp64=torch.float64
    )
    assert {name: torch.finfo(kind).eps / 2 for name, kind in formats.items()} == ROUNDING
