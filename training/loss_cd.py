"""Multistep consistency distillation (Heek et al. 2024, Section 3) in EDM's noise schedule.

An image is noised to the upper end of a teacher edge, the teacher hops to the lower end, the student's own (stopped) prediction there carries it
on to the boundary of the segment, and the student at the upper end is trained towards the denoised image from which a DDIM step would reach the
same place.
"""
from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from training import consistency_ops as ops
from training.consistency_loss import HOPS, Pairs, SegmentLoss


class ConsistencyDistillationLoss(SegmentLoss):
    """Multistep consistency distillation of a frozen teacher.

    Args:
        teacher: D(x, sigma, class_labels), frozen.
        terminal_anchor: the last edge is drawn with probability 1/T', and so is the first, whose reference is the teacher's own solution.
        terminal_teacher_hop: on the edge to zero the teacher's denoised image is the target, not the data.
        hop: 'heun', 'ddim', 'addim', or a function (x_t, sigma_t, sigma_s) -> x_s in the teacher's place (tests).
        xvar_frac: of aDDIM, see `consistency_ops.addim_variance`; 0 for the variance that does not look at the data.
        anchor_hops: sub-steps of the pinned first edge; None: `consistency_ops.default_anchor_hops`.
        pin_top: by default as `terminal_anchor`.
        segments: see `SegmentLoss`.
    """

    name = 'cd'

    def __init__(self, teacher, *, terminal_anchor: bool, terminal_teacher_hop: bool, hop: str | Callable = 'heun', xvar_frac: float = 0.75,
                 anchor_hops: int | None = None, pin_top: bool | None = None, **segments):
        if isinstance(hop, str) and hop not in HOPS:
            raise ValueError(f'hop {hop!r} is not one of {", ".join(HOPS)}')
        super().__init__(terminal_anchor=terminal_anchor, **segments)
        self.teacher, self.hop, self.xvar_frac, self.terminal_teacher_hop = teacher, hop, xvar_frac, terminal_teacher_hop
        self.pin_top = terminal_anchor if pin_top is None else pin_top
        self.anchor_nodes = ops.anchor_nodes(float(self.student[0]), float(self.student[1]), self.sigma_min, self.rho, anchor_hops, self.sigma_grid)

    def reference(self, net, pairs: Pairs) -> Tensor:
        """See docs/method.md, 'Target'."""
        denoised = None
        if isinstance(self.hop, str) or self.terminal_teacher_hop:
            denoised = pairs.ask(self.teacher, pairs.x_t, pairs.edges.sigma_t)
        x_b = self.self_target(net, pairs, self._hop(pairs, denoised), denoised if self.terminal_teacher_hop else pairs.y)
        on_host = pairs.edges.on_host
        pinned = (on_host == 0).nonzero().flatten() if self.pin_top else on_host[:0]
        if len(pinned):
            rows = pinned.to(x_b.device, non_blocking=True)
            x_b = x_b.index_copy(0, rows, ops.solve_ode(lambda x, sigma: pairs.ask(self.teacher, x, sigma, rows), pairs.x_t[rows], self.anchor_nodes))
        return x_b

    def _hop(self, pairs: Pairs, denoised: Tensor) -> Tensor:
        """x_s, the teacher's step from sigma_t to sigma_s."""
        edges = pairs.edges
        if callable(self.hop):
            return self.hop(pairs.x_t, edges.sigma_t, edges.sigma_s)
        return pairs.teacher_hop(self.teacher, pairs.x_t, edges.sigma_t, edges.sigma_s, self.hop, self.xvar_frac, denoised)
