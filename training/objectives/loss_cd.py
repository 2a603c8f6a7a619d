"""Multistep consistency distillation (Heek et al. 2024, Section 3) in EDM's noise schedule.

An image is noised to the upper end of a teacher edge. The teacher steps to the lower end. From there the
student's own prediction (stop-gradient) leads on to the boundary of the segment. The student at the upper end
is trained toward the denoised image from which a DDIM step reaches the same place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dnnlib import cli
from dnnlib.lazy import lazy_import
from dnnlib.options import SWITCH, opt
from training.choices import HOP_COST
from training.objectives.loss import denoiser, student_and_target
from training.objectives.multistep import MultistepSchedule
from training.objectives.options import EDM2_STUDENT, STUDENT, Objective, Segments, SyncDropout, TeacherHop

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy_import('torch')
ops = lazy_import('training.consistency_ops')
grids = lazy_import('training.grids')

NAME = 'cd'


@dataclass(frozen=True)
class DistillationConfig(SyncDropout, Segments, TeacherHop):
    """Options of --objective=mcd."""

    heading: ClassVar[str] = 'Multistep consistency distillation (--objective=mcd)'

    terminal_anchor: bool = opt(
        True,
        SWITCH,
        'Give the first and the last edge the probability 1/T each; at sigma_max the target is the '
        "teacher's own solution.",
    )
    terminal_teacher_hop: bool = opt(
        True, SWITCH, "On the edge to 0, aim at the teacher's denoised image instead of the data."
    )
    anchor_hops: int | None = opt(
        None,
        cli.STEPS,
        'Heun steps of the solution at sigma_max.',
        default_text='4; 32 where the first segment ends below sigma = 10',
        idle=('terminal_anchor', False),
    )

    def cost(self) -> float:
        # The hop, the self-target and the student; on the anchored edge 2 evaluations for each Heun step.
        total = self.guide_cost * HOP_COST[self.hop] + 4
        if self.terminal_anchor:
            # The anchored edge is drawn at 1/T, or as one of the S tops.
            anchored = self.top_mass / self.S if self.top_mass else 1 / self.T_end
            hops = self.anchor_hops or self._default_anchor_hops()
            total += anchored * self.guide_cost * 2 * hops
        return total

    def _default_anchor_hops(self) -> int:
        grid = grids.student_grid(
            self.S, self.sigma_min, self.sigma_max, self.rho, self.student_grid, self.sigma_grid
        )
        return grids.default_anchor_hops(float(grid[1]))


OBJECTIVE = Objective(DistillationConfig, teacher='diffusion', defaults=STUDENT, edm2=EDM2_STUDENT)


class DistillationState(MultistepSchedule):
    """The edges, and the noise levels of the teacher's own solution on the anchored edge.

    Args:
        c: options of `MultistepSchedule`; hop, one of `consistency_ops.HOPS`, and xvar_frac of aDDIM;
            terminal_anchor, anchor_hops (sub-steps on the anchored edge, None:
            `grids.default_anchor_hops`); terminal_teacher_hop; cd_loss, cd_weight_mode, sigma_data;
            sync_dropout.
        teacher: D(x, sigma, class_labels), frozen.
    """

    def __init__(self, c, teacher):
        ops.check_hop(c.hop)
        super().__init__(c, teacher, anchor=c.terminal_anchor, gap_option='--T_end')
        top, bottom = self.student_sigmas[:2].tolist()
        nodes = ops.anchor_nodes(top, bottom, c.sigma_min, c.rho, c.anchor_hops, c.sigma_grid)
        self.anchor_levels = nodes.tolist()


def setup(c, teacher, net=None, perceptual=None) -> DistillationState:
    return DistillationState(c, teacher)


def loss(net, images: Tensor, labels, rng, state: DistillationState, augment_labels=None) -> Tensor:
    """Distance of the student's image from the one that leads to the boundary target x_b.

    w(sigma_t) ℓ(student(x_t; sigma_t) − x*), x* = inv_ddim(x_b, x_t, sigma_t, sigma_b)   (Heek et al. 2024,
    Algorithm 1).

    Args: see `training.objectives.loss`.
    Returns: [N] float64.
    """
    c = state.c
    student, self_target = student_and_target(net, labels, augment_labels, rng, c.sync_dropout)
    teacher = denoiser(state.teacher, labels, augment_labels)

    # One teacher edge sigma_t -> sigma_s per image; sigma_b is the lower end of its segment. On terminal
    # edges, where sigma_s = 0, a stand-in keeps arithmetic finite, and `by_kind` drops what follows from it.
    edges = state.draw(rng)
    sigma_t, sigma_b = edges.sigma_t, edges.sigma_b
    sigma_s = ops.above_zero(edges.sigma_s, sigma_t)

    # Data: x_t = y + sigma_t n.
    y, noise = images.double(), rng.normal('noise', images.shape[1:])
    x_t = y + ops.expand_like(sigma_t, y) * noise

    with torch.no_grad():
        # Teacher: one solver step along the edge.
        denoised = teacher(x_t, sigma_t)
        x_s = ops.teacher_hop(teacher, x_t, sigma_t, sigma_s, c.hop, denoised, y, c.xvar_frac)

        # Student: a DDIM step on to the boundary, unless the hop has reached it. Terminal edges end at the
        # teacher's denoised image, or at the data.
        x_b = ops.ddim_step(x_s, self_target(x_s, sigma_s), sigma_s, sigma_b)
        terminal = denoised if c.terminal_teacher_hop else y
        x_b = ops.by_kind(edges.kind, terminal=terminal, snap=x_s, general=x_b)

        # Edges from sigma_max: the teacher's own solution down to the boundary. These are few, so only they
        # pay for its many evaluations.
        if len(rows := edges.anchored):
            of_rows = denoiser(state.teacher, labels, augment_labels, rows=rows)
            solution = ops.solve_ode(of_rows, x_t[rows], state.anchor_levels, denoised[rows])
            x_b = x_b.index_copy(0, rows, solution)

        # Target: the denoised image from which a DDIM step leads to the boundary target.
        x_star = ops.inv_ddim(x_b, x_t, sigma_t, sigma_b, check=False)

    # Loss.
    distance = ops.image_distance(student(x_t, sigma_t) - x_star, c.cd_loss)
    values = ops.edge_weight(sigma_t, edges.sigma_s, c.cd_weight_mode, c.sigma_data) * distance
    state.report(edges, values.detach())
    return values
