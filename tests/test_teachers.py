"""Distillation from every kind of teacher: train.py reads its snapshot, trains, and writes a student that samples."""

import json
import math

import pytest
import torch
from helpers import FAST, TINY_NETWORK, assert_one_clear_error, invoke, lines
from losses import Loss
from teachers import DIGITS, TEACHERS, new_teacher

import generate
import train
from training.checkpoint import load_network
from training.networks import edm2 as networks_edm2
from training.objectives import loss_diffusion
from training.rng import SampleRng


@pytest.mark.parametrize(
    'kind', [kind if kind == 'EDM2' else pytest.param(kind, marks=pytest.mark.slow) for kind in TEACHERS]
)
def test_a_student_is_distilled_from_every_kind_of_teacher(tmp_path, digits, kind):
    """40 steps, after which the loss of a student that started as its teacher is lower (0.70 to 0.85 of the first tick's, of 32 images, was seen)."""
    teacher = new_teacher(TEACHERS[kind], tmp_path / 'teacher.pkl')
    augment = ['--augment=0.2'] if teacher.init_kwargs.get('augment_dim') else []
    lr = 0.01 if kind == 'EDM2' else 0.002
    result = invoke(
        train.main,
        f'--outdir={tmp_path}',
        f'--data={digits}',
        '--cond=1',
        '--consistency=True',
        f'--teacher={tmp_path / "teacher.pkl"}',
        '--S=2',
        '--T_start=8',
        '--T_end=8',
        '--anchor_hops=2',
        '--dropout=0.1',
        *augment,
        *FAST,
        '--batch=32',
        '--duration=0.00128',
        '--tick=0.32',
        f'--lr={lr}',
        '--dump=0',
        '--ema=1kimg',
    )
    assert result.exit_code == 0, result.output
    stats = lines(tmp_path / 'stats.jsonl')
    losses = [tick['Loss/cd']['mean'] for tick in stats]
    assert losses[-1] < 0.95 * losses[0], losses

    student = load_network(max(tmp_path.glob('network-snapshot-*.pkl')))
    assert type(student) is type(teacher) and student.metadata['S'] == 2
    assert {**student.init_kwargs, 'dropout': None, 'use_fp16': None} == {
        **teacher.init_kwargs,
        'dropout': None,
        'use_fp16': None,
    }
    assert (student.sigma_min, student.sigma_max) == (teacher.sigma_min, teacher.sigma_max)
    result = invoke(
        generate.main,
        f'--network={max(tmp_path.glob("network-snapshot-*.pkl"))}',
        f'--outdir={tmp_path / "out"}',
        '--seeds=0-3',
    )
    assert result.exit_code == 0 and len(list((tmp_path / 'out').glob('*.png'))) == 4, result.output


# ----------------------------------------------------------------------------
# EDM2 from scratch.


def test_the_uncertainty_that_minimizes_edm2s_loss_is_the_logarithm_of_the_error_per_value():
    """w/e^u |D − y|² + 64 u has its minimum, 64 (1 + ln(e/64)), where e^u is the weighted error e of a value; the loss's value is checked there."""
    logvar = torch.zeros(16, requires_grad=True)
    answer = lambda x, sigma, labels, **kwargs: (torch.zeros_like(x), logvar.reshape(-1, 1, 1, 1))
    images, rng, loss_fn = (
        torch.full((16, 1, 8, 8), 0.3),
        SampleRng(0, 0, 16),
        Loss(loss_diffusion, kind='edm2'),
    )
    net = torch.nn.Module()
    net.forward = answer
    _, weight = loss_diffusion.noise_levels(loss_fn.state.c, rng)
    error = weight * 0.3**2
    logvar.data.copy_(error.log())
    loss = loss_fn(net.eval(), images, None, rng)
    torch.testing.assert_close(loss, 64 * (1 + error.log()))
    (gradient,) = torch.autograd.grad(loss.sum(), logvar)
    torch.testing.assert_close(gradient, torch.zeros(16), atol=1e-4, rtol=0)


def test_an_edm2_teacher_trains_with_its_own_loss_and_learning_rate(tmp_path, digits):
    """Image and uncertainty learn: the weighted error falls, and u(sigma = 0.3) comes nearer to its logarithm per value (0.12, then −0.28; −0.15)."""
    result = invoke(
        train.main,
        f'--outdir={tmp_path}',
        f'--data={digits}',
        '--cond=1',
        '--arch=edm2',
        '--cbase=16',
        '--cres=1,2',
        '--num_blocks=1',
        *FAST,
        '--batch=64',
        '--duration=0.0064',
        '--tick=1.6',
        '--lr_decay=25',
        '--snap=1',
        '--dump=0',
        '--ema=1kimg',
        '--phema=none',
    )
    assert result.exit_code == 0, result.output
    stats = lines(tmp_path / 'stats.jsonl')
    errors = [tick['Loss/weighted_error']['mean'] for tick in stats]
    assert (
        errors[-1] < 0.8 * errors[0]
        and stats[-1]['Loss/diffusion']['mean'] < stats[0]['Loss/diffusion']['mean']
    )
    assert stats[-1]['Progress/lr']['mean'] == pytest.approx(0.01 / (99 / 25) ** 0.5)

    first, *_, last = [load_network(path) for path in sorted(tmp_path.glob('network-snapshot-*.pkl'))]
    assert type(last) is networks_edm2.Precond and last.metadata['objective'] == 'diffusion'
    uncertainty = [
        net(torch.zeros(1, 1, 8, 8), torch.tensor([0.3]), return_logvar=True)[1].item()
        for net in (first, last)
    ]
    expected = math.log(errors[-1] / 64)
    assert abs(uncertainty[1] - expected) < abs(uncertainty[0] - expected) / 2, (uncertainty, expected)


def test_defaults_for_edm2_are_its_own(tmp_path, digits):
    config = lambda *arguments: json.loads(
        invoke(train.main, f'--outdir={tmp_path}', f'--data={digits}', '--cond=1', *arguments, '-n').stdout
    )
    c = config('--arch=edm2')
    assert c['network'] == dict(
        class_name='Precond',
        kwargs=dict(DIGITS, use_fp16=False, model_channels=192, channel_mult=[1, 2, 3, 4], dropout=0),
    )
    assert (
        c['loss'] == dict(kind='edm2', P_mean=-0.8, P_std=1.6)
        and c['betas'] == [0.9, 0.99]
        and c['phema_stds'] == [0.05, 0.1]
    )
    assert (c['lr'], c['lr_schedule'], c['lr_ref_nimg'], c['lr_rampup_nimg']) == (
        0.01,
        'sqrt',
        35_000 * 2048,
        10_000_000,
    )

    new_teacher(TEACHERS['EDM2'], tmp_path / 'teacher.pkl')
    c = config(
        '--consistency=True',
        f'--teacher={tmp_path / "teacher.pkl"}',
        '--arch=edm2',
        '--precond=edm',
        '--batch=128',
    )
    assert c['network']['class_name'] == 'Precond' and c['network']['kwargs']['channels_per_head'] == 16
    assert (c['lr'], c['lr_schedule'], c['lr_ref_nimg']) == (0.001, 'sqrt', 2000 * 128)


@pytest.mark.parametrize(
    'arguments, words, status',
    [
        (['--arch=edm2', '--precond=vp'], ['--arch=edm2', '--precond=vp'], 2),
        (['--arch=edm2', '--augment=0.1'], ['--augment=0.1', 'no augmentation labels'], 2),
        (['--P_mean=0', '--precond=ve'], ['--P_mean', '--precond=edm'], 2),
        (['--lr_decay=5'], ['--lr_decay', '--lr_schedule=sqrt'], 2),
        (['--lr_schedule=sqrt'], ['--lr_decay=STEPS'], 2),
        (
            ['--consistency=True', '--arch=edm2', '--teacher={adm}'],
            ['--arch=edm2 contradicts', 'DhariwalUNet'],
            1,
        ),
        (['--consistency=True', '--arch=adm', '--teacher={edm2}'], ['--arch=adm contradicts', 'UNet'], 1),
        (
            ['--consistency=True', '--precond=vp', '--teacher={edm2}'],
            ['--precond=vp contradicts', 'Precond'],
            1,
        ),
        (
            ['--consistency=True', '--augment=0.1', '--teacher={edm2}'],
            ['--augment=0.1', 'augmentation labels'],
            1,
        ),
    ],
)
def test_what_does_not_go_with_edm2_is_refused(tmp_path, digits, arguments, words, status):
    names = dict(adm='EDM ADM', edm2='EDM2')
    for name, kind in names.items():
        if f'{{{name}}}' in arguments[-1]:
            new_teacher(TEACHERS[kind], tmp_path / name)
    paths = {name: tmp_path / name for name in names}
    result = invoke(
        train.main,
        f'--outdir={tmp_path}',
        f'--data={digits}',
        '--cond=1',
        *(text.format(**paths) for text in arguments),
        '-n',
    )
    assert_one_clear_error(result, *words, status=status)


def test_a_transfer_into_edm2_from_another_architecture_is_refused(tmp_path, digits):
    new_teacher(TEACHERS['EDM ADM'], tmp_path / 'adm.pkl')
    result = invoke(
        train.main,
        f'--outdir={tmp_path}',
        f'--data={digits}',
        '--cond=1',
        '--arch=edm2',
        *TINY_NETWORK[1:-1],
        *FAST,
        '--batch=32',
        '--duration=0.001',
        f'--transfer={tmp_path / "adm.pkl"}',
    )
    assert_one_clear_error(result, '--transfer', 'no tensor that fits')
