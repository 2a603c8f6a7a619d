"""Easy consistency tuning (Geng et al. 2024): consistency training at continuous times, which starts as
diffusion training.

The network is compared with itself at two times t > r of one noised image. r is 0 at first and approaches t
stage by stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import click

from dnnlib.lazy import lazy_import
from dnnlib.options import opt
from training.choices import ECT_WEIGHTS
from training.objectives.loss import State, report_levels, student_and_target
from training.objectives.options import (
    EDM2_STUDENT,
    RADAM,
    ConsistencySampling,
    LogNormal,
    NoiseRange,
    Objective,
    SyncDropout,
    TimePairs,
    by_width,
)

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy_import('torch')
training_stats = lazy_import('torch_utils.training_stats')
ops = lazy_import('training.consistency_ops')
misc = lazy_import('torch_utils.misc')
times = lazy_import('training.objectives.time_schedules')

NAME = 'ect'


@dataclass(frozen=True)
class TuningConfig(ConsistencySampling, TimePairs, LogNormal, SyncDropout, NoiseRange):
    """Options of --objective=ect."""

    sampling: ClassVar[tuple[str, ...]] = ('mid_t', 'clip_denoised', 'sigma_min', 'sigma_max')

    P_mean: float | None = -1.1
    P_std: float | None = 2.0
    c: float | None = 0.0
    ect_weight: str = opt(
        'gap',
        click.Choice(ECT_WEIGHTS),
        'Loss weight (ect): gap = 1/(t - r), or of t alone 1, 1/t, 1/t + 1/sigma_data, 1/t^2, 1/t^2 + '
        '1/sigma_data^2, 1/(t^2 + sigma_data^2).',
    )


# fmt: off
# ECT's presets for EDM2's networks (Geng et al. 2024).
ECT_SIZES = by_width(lr=dict(S=10e-4, M=9e-4, L=8e-4, XL=7e-4), dropout=dict(S=0.4, M=0.5, L=0.5, XL=0.5))

OBJECTIVE = Objective(
    TuningConfig,
    defaults=dict(RADAM, lr=1e-4, duration=51.2, batch=128, ema=0.887e6, dropout=0.2),
    edm2=dict(EDM2_STUDENT, optim='adam', duration=12.8, phema=[0.01, 0.05, 0.1], max_dropout_resolution=16, P_mean=-0.8,
              P_std=1.6, q=4.0, c=0.06, ect_weight='karras'),
    edm2_sizes=ECT_SIZES,
)
# fmt: on


class TuningState(State):
    """The stage of r(t).

    Args:
        c: P_mean, P_std of ln t; q, k, b of r(t), see `time_schedules.earlier_time`; stage_nimg, images per
            stage; c of the pseudo-Huber distance, 0 for the distance itself; ect_weight, sigma_data,
            see `time_schedules.ect_weight`; sync_dropout.
    """

    gap_option = '--stage_steps or --q'

    def __init__(self, c):
        super().__init__(c)
        self.begin_step(0)

    def begin_step(self, nimg: int) -> None:
        self.stage = times.tuning_stage(nimg, self.c.stage_nimg)

    def self_target_gap(self, nimg: int) -> float:
        # The gap falls with t, so its median is that at the median time.
        c = self.c
        t = torch.tensor(c.P_mean, dtype=torch.float64).exp()
        r = times.earlier_time(t, times.tuning_stage(nimg, c.stage_nimg), c.q, c.k, c.b)
        return float(1 - r / t)


def setup(c, teacher=None, net=None, perceptual=None) -> TuningState:
    return TuningState(c)


def loss(net, images: Tensor, labels, rng, state: TuningState, augment_labels=None) -> Tensor:
    """Distance between the network at t and at r, or the image where r = 0.

    w(t) ℓ(student(x_t; t) − sg[student(x_r; r)])   (Geng et al. 2024, Algorithm 1).

    Args: see `training.objectives.loss`.
    Returns: [N] float64.
    """
    c = state.c
    student, self_target = student_and_target(net, labels, augment_labels, rng, c.sync_dropout)

    # A pair of times t > r >= 0 per image.
    normal = misc.upload(rng.normal_on_host('sigma'), images.device)
    t = times.lognormal_times(normal, c.P_mean, c.P_std)
    r = times.earlier_time(t, state.stage, c.q, c.k, c.b)

    # Data: x_t = y + t n.
    y, noise = images.double(), rng.normal('noise', images.shape[1:])
    x_t = y + ops.expand_like(t, y) * noise

    with torch.no_grad():
        # Student at r, on the same noise; the image itself where r = 0, as in diffusion training. There a
        # stand-in for r keeps arithmetic finite, and its prediction is dropped.
        at_r = ops.above_zero(r, t)
        x_r = y + ops.expand_like(at_r, y) * noise
        x_star = torch.where(ops.expand_like(r, y) > 0, self_target(x_r, at_r), y)

    # Loss.
    distance = ops.image_distance(student(x_t, t) - x_star, 'pseudo_huber', c.c)
    values = times.ect_weight(t, r, c.ect_weight, c.sigma_data) * distance

    report_levels(t, values.detach())
    training_stats.report('Edges/stage', t.new_full([1], state.stage))
    training_stats.report('Edges/terminal', (r == 0).double())
    return values
