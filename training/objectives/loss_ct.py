"""Multistep consistency training (Heek et al. 2024, Section 3.1): the target of distillation without a
teacher.

The hop follows the noise of the data, x_s = y + sigma_s n. It is correct on average over the images that x_t
may come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dnnlib.lazy import lazy_import
from training.objectives.loss import student_and_target
from training.objectives.multistep import MultistepSchedule
from training.objectives.options import EDM2_STUDENT, STUDENT, Objective, Segments, SyncDropout

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy_import('torch')
ops = lazy_import('training.consistency_ops')

NAME = 'ct'


@dataclass(frozen=True)
class TrainingConfig(SyncDropout, Segments):
    """Options of --objective=mct."""


OBJECTIVE = Objective(TrainingConfig, defaults=dict(STUDENT, dropout=0.0), edm2=EDM2_STUDENT)


def setup(c, teacher=None, net=None, perceptual=None) -> MultistepSchedule:
    """Options: those of `MultistepSchedule`; cd_loss, cd_weight_mode, sigma_data; sync_dropout."""
    return MultistepSchedule(c, gap_option='--T_end')


def loss(net, images: Tensor, labels, rng, state: MultistepSchedule, augment_labels=None) -> Tensor:
    """Distance of the student's image from the one that leads to the boundary target x_b.

    w(sigma_t) ℓ(student(x_t; sigma_t) − x*), x* = inv_ddim(x_b, x_t, sigma_t, sigma_b)   (Heek et al. 2024,
    Algorithm 1).

    Args: see `training.objectives.loss`.
    Returns: [N] float64.
    """
    c = state.c
    student, self_target = student_and_target(net, labels, augment_labels, rng, c.sync_dropout)

    # One teacher edge sigma_t -> sigma_s per image; sigma_b is the lower end of its segment. On terminal
    # edges, where sigma_s = 0, a stand-in keeps arithmetic finite, and `by_kind` drops what follows from it.
    edges = state.draw(rng)
    sigma_t, sigma_b = edges.sigma_t, edges.sigma_b
    sigma_s = ops.above_zero(edges.sigma_s, sigma_t)

    # Data: x_t = y + sigma_t n.
    y, noise = images.double(), rng.normal('noise', images.shape[1:])
    x_t = y + ops.expand_like(sigma_t, y) * noise

    with torch.no_grad():
        # Data: the same noise at the lower end of the edge, instead of the teacher's step.
        x_s = y + ops.expand_like(sigma_s, y) * noise

        # Student: a DDIM step on to the boundary, unless the hop has reached it. Terminal edges end at the
        # data.
        x_b = ops.ddim_step(x_s, self_target(x_s, sigma_s), sigma_s, sigma_b)
        x_b = ops.by_kind(edges.kind, terminal=y, snap=x_s, general=x_b)

        # Target: the denoised image from which a DDIM step leads to the boundary target.
        x_star = ops.inv_ddim(x_b, x_t, sigma_t, sigma_b, check=False)

    # Loss.
    distance = ops.image_distance(student(x_t, sigma_t) - x_star, c.cd_loss)
    values = ops.edge_weight(sigma_t, edges.sigma_s, c.cd_weight_mode, c.sigma_data) * distance
    state.report(edges, values.detach())
    return values
