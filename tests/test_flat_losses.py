"""The losses against the classes that they take the place of, which are in `former_losses`: values and gradients to 1e-12, in FP64."""

import pytest
import torch
from former_losses import loss_cd, loss_cm, loss_ct, loss_direct, loss_ect, loss_ict, loss_pd, loss_tcm
from former_losses.loss import DIFFUSION_LOSSES
from losses import Loss

from dnnlib import EasyDict
from torch_utils import training_stats
from torch_utils.flat import FlatParameters
from training import networks
from training.draws import SampleDraws
from training.networks import edm2 as networks_edm2
from training.objectives import OBJECTIVES

FORMER = {
    'mcd': loss_cd.ConsistencyDistillationLoss,
    'mct': loss_ct.ConsistencyTrainingLoss,
    'direct': loss_direct.SegmentRegressionLoss,
    'pd': loss_pd.ProgressiveDistillationLoss,
    'cm-cd': loss_cm.ConsistencyModelDistillationLoss,
    'cm-ct': loss_cm.ConsistencyModelTrainingLoss,
    'ict': loss_ict.ImprovedConsistencyTrainingLoss,
    'ect': loss_ect.ConsistencyTuningLoss,
    'tcm': loss_tcm.TruncatedTrainingLoss,
}
COUNT = 48
SEGMENTS = dict(T_start=16, T_end=64, T_anneal_kimg=0.1)
FULL = dict(student_grid='full')
TOPS = dict(keep_ties=True, top_mass=0.5)
CM = dict(schedule_nimg=1000, lpips=None, cm_loss='l2')
CASES = {
    'edm': ('diffusion', dict(kind='edm')),
    'edm2': ('diffusion', dict(kind='edm2', P_mean=-0.8, P_std=1.6)),
    'vp': ('diffusion', dict(kind='vp')),
    've': ('diffusion', dict(kind='ve')),
    'mcd': ('mcd', SEGMENTS),
    'mcd ddim to the data': ('mcd', dict(SEGMENTS, hop='ddim', terminal_teacher_hop=False)),
    'mcd addim without anchor': ('mcd', dict(SEGMENTS, hop='addim', terminal_anchor=False, sync_dropout=False)),
    'mcd addim, own variance': ('mcd', dict(SEGMENTS, hop='addim', xvar_frac=0.0, cd_weight_mode='sqrt_gap')),
    'mcd tops': ('mcd', dict(SEGMENTS, **TOPS, **FULL, anchor_hops=3, cd_loss='huber')),
    'mcd one segment': ('mcd', dict(SEGMENTS, **TOPS, S=1, anchor_hops=3)),
    'mcd every edge ends a segment': ('mcd', dict(S=4, T_start=4, T_end=4, T_anneal_kimg=0, **FULL)),
    'mcd uniform cosine': ('mcd', dict(SEGMENTS, sampling_mode='uniform', sigma_grid='cosine', cd_loss='l2')),
    'mct': ('mct', SEGMENTS),
    'mct vp, apart': ('mct', dict(SEGMENTS, sampling_mode='vp', sync_dropout=False, keep_ties=True)),
    'direct': ('direct', dict(SEGMENTS, T_start=16)),
    'direct full': ('direct', dict(SEGMENTS, **FULL, top_mass=1.0, substeps=2, cd_loss='l2_root')),
    'pd': ('pd', dict(S=4)),
    'pd addim': ('pd', dict(S=8, hop='addim', sigma_grid='cosine', cd_weight_mode='snr')),
    'cm-cd': ('cm-cd', dict(CM, mu0=0.9, N=12)),
    'cm-cd ddim': ('cm-cd', dict(CM, hop='ddim', cm_loss='l1', mu0=0.0, sync_dropout=False)),
    'cm-cd addim': ('cm-cd', dict(CM, hop='addim', cm_loss='pseudo_huber', N=None, mu0=0.9)),
    'cm-ct': ('cm-ct', dict(CM, s1=20)),
    'cm-ct lpips': ('cm-ct', dict(CM, s1=20, cm_loss='lpips', mu_schedule='fixed', sync_dropout=False)),
    'ict': ('ict', dict(schedule_nimg=1000, batch_size=COUNT, s1=40)),
    'ict constant': ('ict', dict(schedule_nimg=1000, batch_size=COUNT, s1=40, c=0.06, sync_dropout=False)),
    'ect': ('ect', dict(stage_nimg=300)),
    'ect constant': ('ect', dict(stage_nimg=100, c=0.06, ect_weight='karras', q=4.0, sync_dropout=False)),
    'tcm': ('tcm', dict(stage_nimg=300, batch_size=COUNT)),
    'tcm karras': (
        'tcm',
        dict(stage_nimg=100, batch_size=COUNT, tcm_weight='karras', c=0.06, boundary_share=0.0, sync_dropout=False),
    ),
}  # fmt: skip


def distance(a, b):
    """In place of LPIPS."""
    return (a - b).abs().amax(dim=(1, 2, 3)) + b.square().mean(dim=(1, 2, 3))


def network(seed, edm2, boundary, dropout=0.2):
    torch.manual_seed(seed)
    options = dict(model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[], dropout=dropout)
    if edm2:
        net = networks_edm2.Precond(8, 2, 3, use_fp16=False, **options)
    else:
        net = networks.EDMPrecond(8, 2, 3, augment_dim=4, boundary=boundary, **options)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return net.double()


@pytest.mark.parametrize('nimg', [0, 250, 500, 900])
@pytest.mark.parametrize('case', CASES)
def test_values_gradients_and_statistics_are_those_of_the_classes(case, nimg):
    name, given = CASES[case]
    objective = OBJECTIVES[name]
    options = {**objective.options, **given}
    options |= {} if name == 'diffusion' else dict(sigma_data=0.5)
    boundary = 0.002 if objective.boundary else 0
    generator = torch.Generator().manual_seed(nimg)
    images = torch.rand(COUNT, 2, 8, 8, generator=generator, dtype=torch.float64) * 2 - 1
    labels = torch.eye(3, dtype=torch.float64)[torch.arange(COUNT) % 3]
    augment = None if case == 'edm2' else torch.randn(COUNT, 4, generator=generator, dtype=torch.float64)

    results = []
    for former in (True, False):
        net = network(0, case == 'edm2', boundary).train()
        teacher = network(1, case == 'edm2', 0).eval().requires_grad_(False) if objective.teacher else None
        flat, perceptual = FlatParameters(net), distance if options.get('cm_loss') == 'lpips' else None
        if former:
            arguments = {key: value for key, value in options.items() if key not in ('kind', 'lpips')}
            arguments |= {'perceptual': perceptual} if 'cm_loss' in options else {}
            cls = DIFFUSION_LOSSES[options['kind']] if name == 'diffusion' else FORMER[name]
            state = cls(*([] if teacher is None else [teacher]), **arguments)
            state.attach(net, flat)
            assert state.name == objective.module().NAME
            loss = state
        else:
            module = objective.module()
            state = module.setup(EasyDict(options), teacher, net, perceptual)
            loss = Loss.__new__(Loss)
            loss.module, loss.state = module, state
        gap = state.self_target_gap(nimg), state.gap_option
        training_stats.reset()
        state.begin_step(nimg)
        with torch.no_grad():
            flat.weights.mul_(1.1)
        state.end_step()
        values = loss(net, images, labels, SampleDraws(5, nimg, COUNT), augment)
        values.sum().backward()
        results.append((values.detach(), flat.weights.grad.clone(), gap, training_stats.collect()))

    (a, grad_a, gap_a, stats_a), (b, grad_b, gap_b, stats_b) = results
    torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad_b, grad_a, rtol=1e-12, atol=1e-12 * float(grad_a.abs().max()))
    assert gap_a == gap_b and grad_a.abs().max() > 0
    assert stats_a.keys() == stats_b.keys()
    for key, of in stats_a.items():
        assert of['num'] == stats_b[key]['num'] and of['mean'] == pytest.approx(
            stats_b[key]['mean'], rel=1e-9
        ), key
