"""Consistency training (Song et al. 2023, Algorithm 3): the network agrees with its average at the next lower
level of the same noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dnnlib.lazy import lazy_import
from training.objectives.consistency_model import ConsistencyModelState
from training.objectives.loss import student_and_target

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy_import('torch')
ops = lazy_import('training.consistency_ops')

NAME = 'cm-ct'


def setup(c, teacher=None, net=None, perceptual=None) -> ConsistencyModelState:
    """Options: those of `ConsistencyModelState`."""
    return ConsistencyModelState(c, None, net, perceptual)


def loss(net, images: Tensor, labels, rng, state: ConsistencyModelState, augment_labels=None) -> Tensor:
    """ℓ(student(x_t; sigma_t), target(x_s; sigma_s)), [N]."""
    c = state.c
    student, target = student_and_target(net, labels, augment_labels, rng, c.sync_dropout, state.target)

    # Neighbors sigma_t > sigma_s on the grid.
    edges = state.draw(rng)
    y, noise = images.double(), rng.normal('noise', images.shape[1:])
    x_t = y + ops.expand_like(edges.sigma_t, y) * noise

    with torch.no_grad():
        # Data: the same noise at the lower end of the edge.
        x_s = y + ops.expand_like(edges.sigma_s, y) * noise
        x_star = target(x_s, edges.sigma_s)

    values = state.image_distance(student(x_t, edges.sigma_t), x_star)
    state.report(edges, values.detach())
    return values
