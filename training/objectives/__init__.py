"""The objectives, as train.py sees them: what each starts from, its options, and the defaults it gives to those of every run.

Plain data, quick to import. What an objective computes is in a module of its own, which takes these options: see `training.objectives.loss`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType

from dnnlib.options import options_of
from training.objectives import options as declared
from training.objectives.options import (
    CONSISTENCY_MODEL,
    EDM2_STUDENT,
    EDM2_WIDTHS,
    RADAM,
    STUDENT,
    Config,
    by_width,
)


@dataclass(frozen=True)
class Objective:
    """A way to train.

    Attributes:
        config: its own options, typed.
        loss: its module; None for diffusion.
        teacher: what it starts from, `diffusion` or `consistency` model; None: from nothing.
        defaults: of options that every run has: learning rate, length, ... (`ema` in images).
        edm2: all of these, and its own, for EDM2's networks, where they are others: see `edm2_defaults`.
        edm2_latents: those of `edm2` that are others again where the data are latents.
        edm2_sizes, edm2_latent_sizes: those that depend on the network's width, see `by_width`, for pixels and for latents; None: as for pixels.
        boundary: whether the network is the identity at sigma_min, not at 0.
    """

    config: type[Config]
    loss: str | None = None
    teacher: str | None = None
    defaults: Mapping[str, object] = field(default_factory=dict)
    edm2: Mapping[str, object] = field(default_factory=dict)
    edm2_latents: Mapping[str, object] = field(default_factory=dict)
    edm2_sizes: Mapping[int, Mapping[str, object]] = field(default_factory=dict)
    edm2_latent_sizes: Mapping[int, Mapping[str, object]] | None = None
    boundary: bool = False

    @property
    def own(self) -> dict[str, object]:
        """Options that not every objective has, and their defaults."""
        return {name: option.default for name, option in options_of(self.config).items()}

    @property
    def options(self) -> dict[str, object]:
        """What the loss is given and a run records of it, and the defaults."""
        declared, names = options_of(self.config), self.config.sampling
        return {
            f.name: f.default
            for f in dataclasses.fields(self.config)
            if f.name not in (*names, 'sigma_data')
            and (f.name not in declared or (declared[f.name].record and not declared[f.name].key))
        }

    def edm2_defaults(self, width: int, latents: bool) -> dict[str, object]:
        """`edm2` for a network of `width` channels at its finest level. A width that has no name in EDM2 has what depends on it from
        the next smaller size that has one, and from S where there is none."""
        sizes = self.edm2_latent_sizes if latents and self.edm2_latent_sizes is not None else self.edm2_sizes
        nearest = max((known for known in sizes if known <= width), default=EDM2_WIDTHS['S'])
        return {**self.edm2, **(self.edm2_latents if latents else {}), **sizes.get(nearest, {})}

    def module(self) -> ModuleType:
        """The objective's module, see `training.objectives.loss`."""
        return importlib.import_module(f'training.objectives.{self.loss or "loss_diffusion"}')


# fmt: off
# EDM2's presets (Karras et al. 2024); durations are in 2^20 images there.
MI = 2**20 / 1e6
EDM2_TEACHERS = by_width(
    lr=dict(XS=12e-3, S=10e-3, M=9e-3, L=8e-3, XL=7e-3),
    dropout=dict(XS=0.0, S=0.0, M=0.1, L=0.1, XL=0.1),
    duration=dict(XS=1024 * MI, S=1024 * MI, M=2048 * MI, L=1024 * MI, XL=640 * MI),
)
EDM2_LATENT_TEACHERS = by_width(
    lr=dict(XS=12e-3, S=10e-3, M=9e-3, L=8e-3, XL=7e-3, XXL=6.5e-3),
    dropout=dict(XS=0.0, S=0.0, M=0.1, L=0.1, XL=0.1, XXL=0.1),
    duration=dict(XS=2048 * MI, S=2048 * MI, M=2048 * MI, L=1792 * MI, XL=1280 * MI, XXL=896 * MI),
)
# ECT's presets for EDM2's networks (Geng et al. 2024).
ECT_SIZES = by_width(lr=dict(S=10e-4, M=9e-4, L=8e-4, XL=7e-4), dropout=dict(S=0.4, M=0.5, L=0.5, XL=0.5))

OBJECTIVES = {
    'diffusion': Objective(
        declared.DiffusionConfig,
        defaults=dict(optim='adam', lr=10e-4, lr_rampup=10_000, lr_schedule='constant', beta2=0.999, duration=200.0, batch=512,
                      ema=0.5e6, ema_rampup=0.05, augment=0.12, dropout=0.13),
        edm2=dict(lr_schedule='sqrt', lr_decay=35_000, beta2=0.99, batch=2048, augment=0.0, phema=[0.05, 0.1], P_mean=-0.8, P_std=1.6),
        edm2_latents=dict(lr_decay=70_000, P_mean=-0.4, P_std=1.0),
        edm2_sizes=EDM2_TEACHERS,
        edm2_latent_sizes=EDM2_LATENT_TEACHERS,
    ),
    'mcd': Objective(
        declared.DistillationConfig,
        'loss_cd',
        teacher='diffusion',
        defaults=STUDENT,
        edm2=EDM2_STUDENT,
    ),
    'mct': Objective(
        declared.TrainingConfig,
        'loss_ct',
        defaults=dict(STUDENT, dropout=0.0),
        edm2=EDM2_STUDENT,
    ),
    'direct': Objective(
        declared.RegressionConfig,
        'loss_direct',
        teacher='diffusion',
        defaults=STUDENT,
        edm2=EDM2_STUDENT,
    ),
    'pd': Objective(
        declared.ProgressiveConfig,
        'loss_pd',
        teacher='diffusion',
        defaults=dict(optim='adam', lr=2e-4, lr_rampup=0, lr_schedule='linear', beta2=0.999, batch=128, ema=0.5e6,
                      ema_rampup=0.05, augment=0.0),
        edm2=EDM2_STUDENT,
    ),
    'cm-cd': Objective(
        declared.SongDistillationConfig,
        'loss_cm_cd',
        teacher='diffusion',
        defaults=CONSISTENCY_MODEL,
        edm2=EDM2_STUDENT,
        boundary=True,
    ),
    'cm-ct': Objective(
        declared.SongConfig,
        'loss_cm_ct',
        defaults=CONSISTENCY_MODEL,
        edm2=EDM2_STUDENT,
        boundary=True,
    ),
    'ict': Objective(
        declared.ImprovedConfig,
        'loss_ict',
        defaults=dict(RADAM, lr=1e-4, duration=409.6, batch=1024, ema=10.14e6, dropout=0.3),
        edm2=EDM2_STUDENT,
        boundary=True,
    ),
    'ect': Objective(
        declared.TuningConfig,
        'loss_ect',
        defaults=dict(RADAM, lr=1e-4, duration=51.2, batch=128, ema=0.887e6, dropout=0.2),
        edm2=dict(EDM2_STUDENT, optim='adam', duration=12.8, phema=[0.01, 0.05, 0.1], max_dropout_resolution=16, P_mean=-0.8,
                  P_std=1.6, q=4.0, c=0.06, ect_weight='karras'),
        edm2_sizes=ECT_SIZES,
    ),
    'tcm': Objective(
        declared.TruncatedConfig,
        'loss_tcm',
        teacher='consistency',
        defaults=dict(RADAM, lr=5e-5, duration=204.8, batch=1024, ema=7.097e6),
        edm2=dict(EDM2_STUDENT, optim='adam', lr=5e-4, lr_decay=8000, duration=122.88, q=4.0, c=0.06, ratio_cap=0.9961, tcm_weight='karras'),
    ),
}
# fmt: on


def objectives_with(option: str) -> list[str]:
    """The objectives that have an option."""
    return [name for name, objective in OBJECTIVES.items() if option in objective.own]
