"""The ways to train, as train.py sees them: what each needs, which options it has, and what they default to.

Plain data, quick to import. What an objective computes is in its loss, a class in a file of its own, whose keyword arguments are these options.
"""
from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Objective:
    """A way to train.

    Attributes:
        loss: module and class of the loss; None for diffusion, which has several.
        teacher: whether it is distilled from one.
        options: its own options of train.py and their defaults, by the names of the loss's arguments.
        sampling: of networks that are sampled in stochastic steps (`cm`), options and defaults too, of how.
        defaults: of options that all have: learning rate, length, ... (`ema` in images); EDM2's networks have others, `edm2`.
    """

    loss: str | None = None
    teacher: bool = False
    options: Mapping[str, object] = field(default_factory=dict)
    sampling: Mapping[str, object] = field(default_factory=dict)
    defaults: Mapping[str, object] = field(default_factory=dict)
    edm2: Mapping[str, object] = field(default_factory=dict)

    def loss_class(self) -> type:
        """The class of the loss, imported."""
        module, name = self.loss.split(':')
        return getattr(importlib.import_module(f'training.{module}'), name)


# The released ImageNet-64 student's; and, for networks of EDM2's, those of ECT's EDM2 models. ECT's own are its CIFAR-10 models'.
STUDENT = dict(optim='adam', lr=8e-5, lr_rampup=10_000, lr_schedule='constant', beta2=0.999, duration=210.0, batch=2048, ema=50e6, augment=0.0)
EDM2_STUDENT = dict(lr=10e-4, lr_schedule='sqrt', lr_decay=2000, beta2=0.99, phema=[0.05, 0.1])
SEGMENTS = dict(S=8, student_grid='edm', sigma_grid='karras', rho=7.0, sigma_min=0.002, sigma_max=80.0, T_start=64, T_end=1280, T_anneal_kimg=None,
                keep_ties=False, top_mass=0.0, sampling_mode='edm', cd_loss='pseudo_huber', cd_weight_mode='sqrt_karras')

OBJECTIVES = dict(
    diffusion=Objective(
        defaults=dict(optim='adam', lr=10e-4, lr_rampup=10_000, lr_schedule='constant', beta2=0.999, duration=200.0, batch=512, ema=0.5e6,
                      augment=0.12, dropout=0.13),
        edm2=dict(lr=10e-3, lr_schedule='sqrt', lr_decay=70_000, beta2=0.99, duration=2 ** 31 / 1e6, batch=2048, augment=0.0, dropout=0.0,
                  phema=[0.05, 0.1])),
    mcd=Objective('loss_cd:ConsistencyDistillationLoss', teacher=True, defaults=STUDENT, edm2=EDM2_STUDENT,
                  options=dict(SEGMENTS, sync_dropout=True, hop='heun', xvar_frac=0.75, terminal_anchor=True, terminal_teacher_hop=True,
                               anchor_hops=None)),
    mct=Objective('loss_ct:ConsistencyTrainingLoss', defaults=dict(STUDENT, dropout=0.0), edm2=EDM2_STUDENT,
                  options=dict(SEGMENTS, sync_dropout=True)),
    direct=Objective('loss_direct:SegmentRegressionLoss', teacher=True, defaults=STUDENT, edm2=EDM2_STUDENT,
                     options=dict(SEGMENTS, T_start=None, keep_ties=True, top_mass=0.9, substeps=3)),
    ect=Objective('loss_ect:ConsistencyTuningLoss', edm2=EDM2_STUDENT,
                  defaults=dict(optim='radam', lr=1e-4, lr_rampup=0, lr_schedule='constant', beta2=0.999, duration=51.2, batch=128, ema=0.887e6,
                                augment=0.0, dropout=0.2),
                  options=dict(P_mean=-1.1, P_std=2.0, q=2.0, k=8.0, b=1.0, c=0.0, stage_nimg=None, ect_weight='gap', sync_dropout=True),
                  sampling=dict(sigma_min=0.002, sigma_max=80.0, mid_t=None)),
)


def objectives_with(option: str) -> list[str]:
    """The objectives that have an option."""
    return [name for name, objective in OBJECTIVES.items() if option in {**objective.options, **objective.sampling}]
