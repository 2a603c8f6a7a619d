"""Segment regression: the student learns the teacher's own solution over each segment, and never its own guess. Ours; related are PeRFlow
(Yan et al. 2024), which straightens a flow segment by segment, and SFD (Zhou et al. 2024), which regresses on a few steps of the teacher.

Sampling asks the student at the tops of segments alone, so most samples are drawn there (`top_mass`), the rest anywhere in a segment.
"""

from __future__ import annotations

from torch import Tensor

from former_losses.consistency_loss import Pairs, SegmentLoss
from training import consistency_ops as ops


class SegmentRegressionLoss(SegmentLoss):
    """Regression on the teacher's Heun solution at the segment's end, `substeps` steps away.

    Args:
        teacher: D(x, sigma, class_labels), frozen.
        substeps: Heun steps from x_t to the boundary, at evenly spaced nodes of the grid; on the last segment the last one, to 0, is Euler's.
        segments: see `SegmentLoss`.
    """

    name = 'direct'

    def __init__(self, teacher, *, substeps: int, **segments):
        super().__init__(**segments)
        self.teacher, self.substeps = teacher, substeps

    def reference(self, net, pairs: Pairs) -> Tensor:
        return ops.solve_between(
            lambda x, sigma: pairs.ask(self.teacher, x, sigma),
            pairs.x_t,
            pairs.edges.sigma_t,
            pairs.edges.sigma_b,
            self.substeps,
            self.rho,
            self.sigma_min,
            self.sigma_grid,
        )
