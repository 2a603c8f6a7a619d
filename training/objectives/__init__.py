"""The ways to train, as train.py sees them: what each needs, which options it has, and what they default to.

Plain data, quick to import. What an objective computes is in a module of its own, which takes these options: see `training.objectives.loss`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType


@dataclass(frozen=True)
class Objective:
    """A way to train.

    Attributes:
        loss: its module; None for diffusion.
        teacher: what it starts from, `diffusion` or `consistency` model; None: from nothing.
        options: its own options of train.py and their defaults, as its module knows them.
        stages: options and defaults of how it goes from stage to stage, which the loss does not know, or not by that name.
        sampling: of networks that are sampled in stochastic steps (`cm`), options and defaults too, of how.
        defaults: of options that all have: learning rate, length, ... (`ema` in images).
        edm2: all of these for EDM2's networks, where they are others: see `edm2_defaults`.
        edm2_latents: those of `edm2` that are others again where the data are latents.
        edm2_sizes, edm2_latent_sizes: those that depend on the network's width, see `by_width`, for pixels and for latents; None: as for pixels.
        boundary: whether the network is the identity at sigma_min, not at 0.
        cost: network evaluations that an image costs in training on average, by the options; a student's forward and backward pass counts 3.
    """

    loss: str | None = None
    teacher: str | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    stages: Mapping[str, object] = field(default_factory=dict)
    sampling: Mapping[str, object] = field(default_factory=dict)
    defaults: Mapping[str, object] = field(default_factory=dict)
    edm2: Mapping[str, object] = field(default_factory=dict)
    edm2_latents: Mapping[str, object] = field(default_factory=dict)
    edm2_sizes: Mapping[int, Mapping[str, object]] = field(default_factory=dict)
    edm2_latent_sizes: Mapping[int, Mapping[str, object]] | None = None
    boundary: bool = False
    cost: Callable[[Mapping], float] = lambda options: 3

    @property
    def own(self) -> dict[str, object]:
        """Options that not every objective has, and their defaults."""
        return {**self.options, **self.stages, **self.sampling, **({'teacher': None} if self.teacher else {})}

    def edm2_defaults(self, width: int, latents: bool) -> dict[str, object]:
        """`edm2` for a network of `width` channels at its finest level. A width that has no name in EDM2 has what depends on it from the next
        smaller size that has one, and from S where there is none."""
        sizes = self.edm2_latent_sizes if latents and self.edm2_latent_sizes is not None else self.edm2_sizes
        nearest = max((known for known in sizes if known <= width), default=EDM2_WIDTHS['S'])
        return {**self.edm2, **(self.edm2_latents if latents else {}), **sizes.get(nearest, {})}

    def module(self) -> ModuleType:
        """The objective's module, see `training.objectives.loss`."""
        return importlib.import_module(f'training.objectives.{self.loss or "loss_diffusion"}')


HOP_COST = dict(heun=2, ddim=1, addim=1)


def distillation_cost(options: Mapping) -> float:
    """A hop, the self-target, the student, and on the pinned first edge the teacher's solution instead: 2 evaluations a sub-step."""
    cost = HOP_COST[options['hop']] + 4
    if options['terminal_anchor']:
        pinned = options['top_mass'] / options['S'] if options['top_mass'] else 1 / options['T_end']
        cost += pinned * 2 * (options['anchor_hops'] or 32)
    return cost


# Channels at the finest level of EDM2's networks.
EDM2_WIDTHS = dict(XS=128, S=192, M=256, L=320, XL=384, XXL=448)


def by_width(**columns: Mapping[str, object]) -> dict[int, dict[str, object]]:
    """{width: {option: default}} from {option: {size: default}}."""
    sizes = dict.fromkeys(size for column in columns.values() for size in column)
    return {EDM2_WIDTHS[size]: {option: column[size] for option, column in columns.items()} for size in sizes}


# EDM2's presets (Karras et al. 2024); durations are in 2^20 images there.
EDM2_TEACHERS = by_width(
    lr=dict(XS=12e-3, S=10e-3, M=9e-3, L=8e-3, XL=7e-3),
    dropout=dict(XS=0.0, S=0.0, M=0.1, L=0.1, XL=0.1),
    duration={
        size: count * 2**20 / 1e6 for size, count in dict(XS=1024, S=1024, M=2048, L=1024, XL=640).items()
    },
)
EDM2_LATENT_TEACHERS = by_width(
    lr=dict(XS=12e-3, S=10e-3, M=9e-3, L=8e-3, XL=7e-3, XXL=6.5e-3),
    dropout=dict(XS=0.0, S=0.0, M=0.1, L=0.1, XL=0.1, XXL=0.1),
    duration={
        size: count * 2**20 / 1e6
        for size, count in dict(XS=2048, S=2048, M=2048, L=1792, XL=1280, XXL=896).items()
    },
)
# ECT's presets for EDM2's networks (Geng et al. 2024).
ECT_SIZES = by_width(lr=dict(S=10e-4, M=9e-4, L=8e-4, XL=7e-4), dropout=dict(S=0.4, M=0.5, L=0.5, XL=0.5))

# The released ImageNet-64 student's; and, for networks of EDM2's, those of ECT's EDM2 models. Others' own are of their papers' CIFAR-10 models.
STUDENT = dict(
    optim='adam',
    lr=8e-5,
    lr_rampup=10_000,
    lr_schedule='constant',
    beta2=0.999,
    duration=210.0,
    batch=2048,
    ema=50e6,
    ema_rampup=0.05,
    augment=0.0,
)
EDM2_STUDENT = dict(lr=10e-4, lr_schedule='sqrt', lr_decay=2000, beta2=0.99, phema=[0.05, 0.1])
RADAM = dict(
    optim='radam', lr_rampup=0, lr_schedule='constant', beta2=0.999, ema_rampup=0.0, augment=0.0
)  # their averages decay alike throughout
CONSISTENCY_MODEL = dict(
    RADAM, lr=4e-4, duration=409.6, batch=512, ema=3.549e6, dropout=0.0
)  # EMA: 0.9999 a step
SEGMENTS = dict(
    S=8,
    student_grid='edm',
    sigma_grid='karras',
    rho=7.0,
    sigma_min=0.002,
    sigma_max=80.0,
    T_start=64,
    T_end=1280,
    T_anneal_kimg=None,
    keep_ties=False,
    top_mass=0.0,
    sampling_mode='edm',
    cd_loss='pseudo_huber',
    cd_weight_mode='sqrt_karras',
)
BOUNDARY = dict(
    rho=7.0, sigma_min=0.002, sigma_max=80.0, schedule_nimg=None, sync_dropout=True
)  # of grids that end at sigma_min
CM = dict(BOUNDARY, N=None, s0=2, s1=150, mu0=0.9, mu_schedule='adaptive', cm_loss='lpips', lpips=None)
ECT = dict(
    P_mean=-1.1, P_std=2.0, q=2.0, k=8.0, b=1.0, c=0.0, stage_nimg=None, ect_weight='gap', sync_dropout=True
)
STOCHASTIC = dict(mid_t=None, clip_denoised=None)
WHOLE_RANGE = dict(STOCHASTIC, sigma_min=0.002, sigma_max=80.0)

OBJECTIVES = dict(
    diffusion=Objective(
        defaults=dict(
            optim='adam',
            lr=10e-4,
            lr_rampup=10_000,
            lr_schedule='constant',
            beta2=0.999,
            duration=200.0,
            batch=512,
            ema=0.5e6,
            ema_rampup=0.05,
            augment=0.12,
            dropout=0.13,
        ),
        edm2=dict(
            lr_schedule='sqrt',
            lr_decay=35_000,
            beta2=0.99,
            batch=2048,
            augment=0.0,
            phema=[0.05, 0.1],
            P_mean=-0.8,
            P_std=1.6,
        ),
        edm2_latents=dict(lr_decay=70_000, P_mean=-0.4, P_std=1.0),
        edm2_sizes=EDM2_TEACHERS,
        edm2_latent_sizes=EDM2_LATENT_TEACHERS,
    ),
    mcd=Objective(
        'loss_cd',
        teacher='diffusion',
        defaults=STUDENT,
        edm2=EDM2_STUDENT,
        options=dict(
            SEGMENTS,
            sync_dropout=True,
            hop='heun',
            xvar_frac=0.75,
            terminal_anchor=True,
            terminal_teacher_hop=True,
            anchor_hops=None,
        ),
        cost=distillation_cost,
    ),
    mct=Objective(
        'loss_ct',
        defaults=dict(STUDENT, dropout=0.0),
        edm2=EDM2_STUDENT,
        options=dict(SEGMENTS, sync_dropout=True),
        cost=lambda options: 4,
    ),
    direct=Objective(
        'loss_direct',
        teacher='diffusion',
        defaults=STUDENT,
        edm2=EDM2_STUDENT,
        options=dict(SEGMENTS, T_start=None, keep_ties=True, top_mass=0.9, substeps=3),
        cost=lambda options: 2 * options['substeps'] + 3,
    ),
    pd=Objective(
        'loss_pd',
        teacher='diffusion',
        edm2=EDM2_STUDENT,
        stages=dict(S_start=512, stage_steps=50_000),
        defaults=dict(
            optim='adam',
            lr=2e-4,
            lr_rampup=0,
            lr_schedule='linear',
            beta2=0.999,
            batch=128,
            ema=0.5e6,
            ema_rampup=0.05,
            augment=0.0,
        ),
        options=dict(
            S=1,
            student_grid='full',
            sigma_grid='karras',
            rho=7.0,
            sigma_min=0.002,
            sigma_max=80.0,
            hop='ddim',
            xvar_frac=0.75,
            cd_loss='l2',
            cd_weight_mode='truncated-snr',
        ),
        cost=lambda options: 2 + 3,
    ),
    **{
        'cm-cd': Objective(
            'loss_cm_cd',
            teacher='diffusion',
            defaults=CONSISTENCY_MODEL,
            edm2=EDM2_STUDENT,
            options=dict(CM, N=18, mu0=0.0, hop='heun', xvar_frac=0.75),
            sampling=STOCHASTIC,
            boundary=True,
            cost=lambda options: HOP_COST[options['hop']] + 4,
        ),
        'cm-ct': Objective(
            'loss_cm_ct',
            defaults=CONSISTENCY_MODEL,
            edm2=EDM2_STUDENT,
            options=CM,
            sampling=STOCHASTIC,
            boundary=True,
            cost=lambda options: 4,
        ),
    },
    ict=Objective(
        'loss_ict',
        edm2=EDM2_STUDENT,
        boundary=True,
        sampling=STOCHASTIC,
        defaults=dict(RADAM, lr=1e-4, duration=409.6, batch=1024, ema=10.14e6, dropout=0.3),
        options=dict(BOUNDARY, s0=10, s1=1280, P_mean=-1.1, P_std=2.0, c=None, batch_size=None),
        cost=lambda options: 4,
    ),
    ect=Objective(
        'loss_ect',
        options=ECT,
        sampling=WHOLE_RANGE,
        cost=lambda options: 4,
        defaults=dict(RADAM, lr=1e-4, duration=51.2, batch=128, ema=0.887e6, dropout=0.2),
        edm2=dict(
            EDM2_STUDENT,
            optim='adam',
            duration=12.8,
            phema=[0.01, 0.05, 0.1],
            max_dropout_resolution=16,
            P_mean=-0.8,
            P_std=1.6,
            q=4.0,
            c=0.06,
            ect_weight='karras',
        ),
        edm2_sizes=ECT_SIZES,
    ),
    tcm=Objective(
        'loss_tcm',
        teacher='consistency',
        cost=lambda options: 4,
        defaults=dict(RADAM, lr=5e-5, duration=204.8, batch=1024, ema=7.097e6),
        stages=dict(stage_steps=1),
        options=dict(
            sigma_max=80.0,
            dividing_t=1.0,
            student_scale=0.2,
            student_df=0.01,
            q=2.0,
            k=8.0,
            b=1.0,
            c=1e-8,
            ratio_cap=0.999,
            stage_nimg=None,
            tcm_weight='flat',
            boundary_share=0.25,
            boundary_weight=0.1,
            batch_size=None,
            sync_dropout=True,
        ),
        sampling=dict(STOCHASTIC, sigma_min=0.002),
        edm2=dict(
            EDM2_STUDENT,
            optim='adam',
            lr=5e-4,
            lr_decay=8000,
            duration=122.88,
            q=4.0,
            c=0.06,
            ratio_cap=0.9961,
            tcm_weight='karras',
        ),
    ),
)


def objectives_with(option: str) -> list[str]:
    """The objectives that have an option."""
    return [name for name, objective in OBJECTIVES.items() if option in objective.own]
