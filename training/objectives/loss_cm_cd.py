"""Consistency distillation (Song et al. 2023, Algorithm 2): the network is trained to agree with its average
at the lower level that one step of the teacher leads to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dnnlib.lazy import lazy_import
from training.choices import HOP_COST
from training.objectives.consistency_model import ConsistencyModelState
from training.objectives.loss import denoiser, student_and_target
from training.objectives.loss_cm_ct import SongConfig
from training.objectives.options import CONSISTENCY_MODEL, EDM2_STUDENT, Objective, TeacherHop

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy_import('torch')
ops = lazy_import('training.consistency_ops')

NAME = 'cm-cd'


@dataclass(frozen=True)
class SongDistillationConfig(SongConfig, TeacherHop):
    """Options of --objective=cm-cd."""

    N: int | None = 18
    mu0: float = 0.0

    def cost(self) -> float:
        # The hop, the target, and the student's forward and backward pass.
        return self.guide_cost * HOP_COST[self.hop] + 4


OBJECTIVE = Objective(
    SongDistillationConfig, teacher='diffusion', defaults=CONSISTENCY_MODEL, edm2=EDM2_STUDENT, boundary=True
)


def setup(c, teacher, net=None, perceptual=None) -> ConsistencyModelState:
    """Options: those of `ConsistencyModelState`; hop, one of `consistency_ops.HOPS`, and xvar_frac of
    aDDIM."""
    ops.check_hop(c.hop)
    return ConsistencyModelState(c, teacher, net, perceptual)


def loss(net, images: Tensor, labels, rng, state: ConsistencyModelState, augment_labels=None) -> Tensor:
    """Distance between the network at t and its target network at s, on one trajectory.

    ℓ(student(x_t; sigma_t), target(x_s; sigma_s))   (Song et al. 2023, Algorithm 2).

    Args: see `training.objectives.loss`.
    Returns: [N] float64.
    """
    c = state.c
    student, target = student_and_target(net, labels, augment_labels, rng, c.sync_dropout, state.target)
    teacher = denoiser(state.teacher, labels, augment_labels)

    # Neighbors sigma_t > sigma_s on the grid.
    edges = state.draw(rng)
    y, noise = images.double(), rng.normal('noise', images.shape[1:])
    x_t = y + ops.expand_like(edges.sigma_t, y) * noise

    with torch.no_grad():
        # Teacher: one solver step along the edge.
        x_s = ops.teacher_hop(teacher, x_t, edges.sigma_t, edges.sigma_s, c.hop, None, y, c.xvar_frac)

        # Target network at the lower end.
        x_star = target(x_s, edges.sigma_s)

    # Loss.
    values = state.image_distance(student(x_t, edges.sigma_t), x_star)
    state.report(edges, values.detach())
    return values
