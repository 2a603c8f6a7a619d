"""Truncated consistency training (Lee et al. 2025): the second stage of easy consistency tuning, restricted
to times above t'.

The frozen network of the first stage maps t' to the image, so the network that trains has all its capacity
for the way from noise to t'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import click

from dnnlib import cli
from dnnlib.lazy import lazy_import
from dnnlib.options import opt, recorded
from training.choices import TCM_WEIGHTS
from training.objectives.loss import State, denoiser, dropout_masks, report_levels, unwrap
from training.objectives.options import (
    EDM2_STUDENT,
    POSITIVE_COUNT,
    RADAM,
    ConsistencySampling,
    NoiseRange,
    Objective,
    SyncDropout,
    Teacher,
    TimePairs,
)

if TYPE_CHECKING:
    import numpy
    from torch import Tensor
    from torch.nn import Module

np = lazy_import('numpy')
torch = lazy_import('torch')
training_stats = lazy_import('torch_utils.training_stats')
ops = lazy_import('training.consistency_ops')
misc = lazy_import('torch_utils.misc')
switched = lazy_import('training.networks.switched')
times = lazy_import('training.objectives.time_schedules')

NAME = 'tcm'


@dataclass(frozen=True)
class TruncatedConfig(ConsistencySampling, TimePairs, SyncDropout, NoiseRange, Teacher):
    """Options of --objective=tcm."""

    heading: ClassVar[str] = 'Truncated consistency models (--objective=tcm)'
    sampling: ClassVar[tuple[str, ...]] = ('mid_t', 'clip_denoised', 'sigma_min')

    c: float | None = 1e-8
    stage_steps: int | None = 1
    dividing_t: float = opt(
        1.0, cli.SIGMA, 'Noise level below which the network of the first stage is evaluated.'
    )
    boundary_share: float = opt(0.25, cli.Number(0, 1, max_open=True), 'Share of samples at --dividing_t.')
    boundary_weight: float = opt(
        0.1, cli.FACTOR, 'Weight of the mean loss of samples at --dividing_t.', idle=('boundary_share', 0)
    )
    ratio_cap: float = opt(0.999, cli.Number(0, 1, max_open=True), 'Upper limit of the ratio r/t.')
    tcm_weight: str = opt('flat', click.Choice(TCM_WEIGHTS), 'Loss weight times t - r: 1, or t / c_out(t)^2.')
    student_scale: float = opt(0.2, cli.SOME_FACTOR, 'ln t is Student-t distributed times this.')
    student_df: float = opt(0.01, cli.SOME_FACTOR, 'Degrees of freedom of the distribution of ln t.')
    batch_size: int | None = recorded(None, POSITIVE_COUNT)


# fmt: off
OBJECTIVE = Objective(
    TruncatedConfig,
    teacher='consistency',
    defaults=dict(RADAM, lr=5e-5, duration=204.8, batch=1024, ema=7.097e6),
    edm2=dict(EDM2_STUDENT, optim='adam', lr=5e-4, lr_decay=8000, duration=122.88, q=4.0, c=0.06, ratio_cap=0.9961, tcm_weight='karras'),
)
# fmt: on


class TruncatedState(State):
    """The stage of r(t), and what draws the times.

    Args:
        c: sigma_max, dividing_t, ends of the times, t' the lower; student_scale, student_df of ln t, see
            `time_schedules.truncated_log_student_times`; q, k, b, ratio_cap of r(t), see
            `time_schedules.tcm_ratio` and `tcm_earlier_time`; stage_nimg, images per stage; c of the
            pseudo-Huber distance; tcm_weight, sigma_data, see `time_schedules.tcm_weight`; batch_size,
            boundary_share, boundary_weight: images of a step over all processes, the share of them at t', and
            the weight of that share; sync_dropout: both networks see the dropout masks of the student, the
            first stage only if its dropout is the same.
        teacher: the first stage's consistency model, frozen.
        net: the network that trains.
    Raises: ValueError unless 0 < dividing_t < sigma_max, and if a batch would have no images at t' or no
        others.
    """

    gap_option = '--ratio_cap'

    def __init__(self, c, teacher, net: Module | None = None):
        super().__init__(c, teacher)
        if not 0 < c.dividing_t < c.sigma_max:
            raise ValueError(f"0 < t' < sigma_max does not hold for {c.dividing_t}, {c.sigma_max}")
        # Checks that neither the samples at t' nor the others are empty.
        times.boundary_count(c.batch_size, c.boundary_share)
        self.same_dropout = net is None or dropout_rates(net) == dropout_rates(teacher)
        self.begin_step(0)

    def begin_step(self, nimg: int) -> None:
        c = self.c
        self.stage = times.tuning_stage(nimg, c.stage_nimg)
        self.ratio = times.tcm_ratio(nimg, c.stage_nimg, c.q, c.ratio_cap)

    def self_target_gap(self, nimg: int) -> float:
        c, half = self.c, torch.tensor([0.5], dtype=torch.float64)
        # The median time is where the distribution function is 1/2.
        t = times.truncated_log_student_times(half, c.dividing_t, c.sigma_max, c.student_scale, c.student_df)
        ratio = times.tcm_ratio(nimg, c.stage_nimg, c.q, c.ratio_cap)
        return float(1 - times.tcm_earlier_time(t, ratio, c.k, c.b) / t)

    def draw_on_host(self, rng) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        """[3, N] float64 t, r and the weight of each image; [M] images whose target is the student's; [N − M]
        images whose target is the first stage's."""
        # Times: truncated Student-t, except for the share of images at t'.
        c, u = self.c, torch.from_numpy(rng.uniform('sigma'))
        t = times.truncated_log_student_times(u, c.dividing_t, c.sigma_max, c.student_scale, c.student_df)
        at_boundary = times.boundary_samples(rng.first, rng.count, c.batch_size, c.boundary_share)
        t = torch.where(at_boundary, c.dividing_t, t)
        r = times.tcm_earlier_time(t, self.ratio, c.k, c.b)

        # Weights, scaled so that the mean over the batch weighs both shares as it should.
        scale = times.boundary_scales(at_boundary, c.batch_size, c.boundary_share, c.boundary_weight)
        weight = times.tcm_weight(t, r, c.tcm_weight, c.sigma_data) * scale
        below = (r < c.dividing_t).numpy()
        return torch.stack([t, r, weight]).numpy(), np.flatnonzero(~below), np.flatnonzero(below)

    def sampling_network(self, net: Module) -> Module:
        return switched.Switched(net, self.teacher, self.c.dividing_t)


def setup(c, teacher, net=None, perceptual=None) -> TruncatedState:
    return TruncatedState(c, teacher, net)


def loss(net, images: Tensor, labels, rng, state: TruncatedState, augment_labels=None) -> Tensor:
    """Distance between the student at t and at r, or the first stage at r below t'.

    w(t) ℓ(student(x_t; t) − sg[f(x_r; r)]) with f the student where r >= t' and the first stage below   (Lee
    et al. 2025, Algorithm 1). A share of every batch lies at t = t' itself, where the target is the first
    stage's, which ties the student to images. The mean over a batch is the mean over the other images plus
    `boundary_weight` times the mean over this share.

    Args: see `training.objectives.loss`.
    Returns: [N] float64.
    """
    c = state.c
    masks = dropout_masks(net, rng)
    target_masks = masks if c.sync_dropout else dropout_masks(net, rng, 'target dropout')
    student = denoiser(net, labels, augment_labels, masks)

    # A pair of times t > r per image. The host draws them, so that it knows which images each network
    # evaluates without synchronizing with the device.
    drawn = state.draw_on_host(rng)
    (t, r, weight), above, below = (misc.upload(values, images.device) for values in drawn)

    # Data: x_t = y + t n.
    y, noise = images.double(), rng.normal('noise', images.shape[1:])
    x_t = y + ops.expand_like(t, y) * noise

    with torch.no_grad():
        # At r, on the same noise: the student above t', the first stage below. Every row is replaced.
        x_star = x_r = y + ops.expand_like(r, y) * noise
        for network, its_masks, rows in (
            (unwrap(net), target_masks, above),
            (state.teacher, target_masks if state.same_dropout else {}, below),
        ):
            if len(rows):
                target = denoiser(network, labels, augment_labels, its_masks, rows)
                x_star = x_star.index_copy(0, rows, target(x_r[rows], r[rows]))

    # Loss.
    values = weight * ops.image_distance(student(x_t, t) - x_star, 'pseudo_huber', c.c)

    report_levels(t, values.detach())
    training_stats.report('Edges/stage', t.new_full([1], state.stage))
    # [N, 2] indicators, whose means are the shares of images.
    of_first_stage = torch.stack([t == c.dividing_t, r < c.dividing_t], dim=1)
    training_stats.report(['Edges/boundary', 'Edges/first_stage'], of_first_stage)
    return values


def dropout_rates(net: Module) -> list[float]:
    """The dropout probabilities of a network's blocks, in order."""
    return [module.dropout for module in net.modules() if hasattr(module, 'dropout')]
