"""Segment regression: the student learns the teacher's own solution over each segment, without a self-target.

Ours. Related work: PeRFlow (Yan et al. 2024) straightens a flow segment by segment; SFD (Zhou et al. 2024)
regresses on a few steps of the teacher. Sampling evaluates the student only at the tops of segments, so most
images are drawn there (`top_mass`), the rest anywhere in a segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dnnlib import cli
from dnnlib.lazy import lazy_import
from dnnlib.options import opt
from training.choices import SEGMENT_SOLVER_COST
from training.objectives.loss import denoiser, dropout_masks
from training.objectives.multistep import MultistepSchedule
from training.objectives.options import EDM2_STUDENT, STUDENT, Objective, Segments, TeacherSolver

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy_import('torch')
ops = lazy_import('training.consistency_ops')
segment_solvers = lazy_import('training.segment_solvers')

NAME = 'direct'


@dataclass(frozen=True)
class RegressionConfig(Segments, TeacherSolver):
    """Options of --objective=direct."""

    T_start: int | None = None
    keep_ties: bool = True
    top_mass: float = 0.9
    substeps: int = opt(3, cli.STEPS, 'Steps of the teacher over a segment (direct).')

    def cost(self) -> float:
        # The teacher's steps, and the student; no self-target.
        return self.guide_cost * SEGMENT_SOLVER_COST[self.solver] * self.substeps + 3


OBJECTIVE = Objective(RegressionConfig, teacher='diffusion', defaults=STUDENT, edm2=EDM2_STUDENT)


def setup(c, teacher, net=None, perceptual=None) -> MultistepSchedule:
    """Options: those of `MultistepSchedule`; substeps, solver; cd_loss, cd_weight_mode, sigma_data."""
    return MultistepSchedule(c, teacher)


def loss(net, images: Tensor, labels, rng, state: MultistepSchedule, augment_labels=None) -> Tensor:
    """Distance of the student's image from the one that leads to the teacher's solution x_b.

    w(sigma_t) ℓ(student(x_t; sigma_t) − x*), x* = inv_ddim(x_b, x_t, sigma_t, sigma_b).

    Args: see `training.objectives.loss`.
    Returns: [N] float64.
    """
    c = state.c
    student = denoiser(net, labels, augment_labels, dropout_masks(net, rng))
    teacher = denoiser(state.teacher, labels, augment_labels)

    # One noise level sigma_t per image; sigma_b is the lower end of its segment.
    edges = state.draw(rng)
    sigma_t, sigma_b = edges.sigma_t, edges.sigma_b

    # Data: x_t = y + sigma_t n.
    y, noise = images.double(), rng.normal('noise', images.shape[1:])
    x_t = y + ops.expand_like(sigma_t, y) * noise

    with torch.no_grad():
        # Teacher: `substeps` steps of its solver down to the boundary, at evenly spaced nodes of the grid; a
        # last step to 0 gives the denoised image.
        grid = c.substeps, c.rho, c.sigma_min, c.sigma_grid
        x_b = segment_solvers.solve_between(teacher, x_t, sigma_t, sigma_b, *grid, solver=c.solver)

        # Target: the denoised image from which a DDIM step leads to the boundary target.
        x_star = ops.inv_ddim(x_b, x_t, sigma_t, sigma_b, check=False)

    # Loss.
    distance = ops.image_distance(student(x_t, sigma_t) - x_star, c.cd_loss)
    values = ops.edge_weight(sigma_t, edges.sigma_s, c.cd_weight_mode, c.sigma_data) * distance
    state.report(edges, values.detach())
    return values
