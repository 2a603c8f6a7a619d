"""Improved consistency training (iCT; Song & Dhariwal 2023).

The network is its own target, because an average biases what is learned (Section 3.2). The grid doubles in
stages, edges are drawn from a lognormal distribution, short edges weigh more, and the distance is
pseudo-Huber.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dnnlib.lazy import lazy_import
from dnnlib.options import recorded
from training.objectives.consistency_model import NodeSchedule, pseudo_huber
from training.objectives.loss import student_and_target
from training.objectives.options import (
    EDM2_STUDENT,
    POSITIVE_COUNT,
    RADAM,
    ConsistencySampling,
    GrowingGrid,
    LogNormal,
    Objective,
    PseudoHuber,
    SyncDropout,
)

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy_import('torch')
ops = lazy_import('training.consistency_ops')
times = lazy_import('training.objectives.time_schedules')

NAME = 'ict'


@dataclass(frozen=True)
class ImprovedConfig(ConsistencySampling, PseudoHuber, LogNormal, SyncDropout, GrowingGrid):
    """Options of --objective=ict."""

    s0: int = 10
    s1: int = 1280
    P_mean: float | None = -1.1
    P_std: float | None = 2.0
    batch_size: int | None = recorded(None, POSITIVE_COUNT)


OBJECTIVE = Objective(
    ImprovedConfig,
    defaults=dict(RADAM, lr=1e-4, duration=409.6, batch=1024, ema=10.14e6, dropout=0.3),
    edm2=EDM2_STUDENT,
    boundary=True,
)


class DoublingSchedule(NodeSchedule):
    """From s0 + 1 nodes to s1 + 1, see `time_schedules.doubling_steps`. The schedule counts whole optimizer
    steps, of batch_size images each.

    Args:
        c: rho, sigma_min, sigma_max of the grid; s0, s1, schedule_nimg, batch_size; P_mean, P_std of ln
            sigma, see `time_schedules.lognormal_edge_probabilities`; c of the pseudo-Huber distance;
            sync_dropout.
    """

    def stage_after(self, nimg: int) -> int:
        c = self.c
        return times.doubling_steps(nimg // c.batch_size, c.schedule_nimg // c.batch_size, c.s0, c.s1)

    def probabilities(self, sigmas: Tensor) -> Tensor:
        return times.lognormal_edge_probabilities(sigmas, self.c.P_mean, self.c.P_std)


def setup(c, teacher=None, net=None, perceptual=None) -> DoublingSchedule:
    return DoublingSchedule(c, gap_option='--s1')


def loss(net, images: Tensor, labels, rng, state: DoublingSchedule, augment_labels=None) -> Tensor:
    """Distance between the network at both ends of an edge.

    ℓ(student(x_t; sigma_t) − sg[student(x_s; sigma_s)]) / (sigma_t − sigma_s).

    Args: see `training.objectives.loss`.
    Returns: [N] float64.
    """
    c = state.c
    student, self_target = student_and_target(net, labels, augment_labels, rng, c.sync_dropout)

    # Neighbors sigma_t > sigma_s on the grid.
    edges = state.draw(rng)
    y, noise = images.double(), rng.normal('noise', images.shape[1:])
    x_t = y + ops.expand_like(edges.sigma_t, y) * noise

    with torch.no_grad():
        # Data: the same noise at the lower end of the edge.
        x_s = y + ops.expand_like(edges.sigma_s, y) * noise

        # Student at the lower end.
        x_star = self_target(x_s, edges.sigma_s)

    # Loss.
    distance = pseudo_huber(student(x_t, edges.sigma_t) - x_star, c.c)
    values = times.gap_weight(edges.sigma_t, edges.sigma_s) * distance
    state.report(edges, values.detach())
    return values
