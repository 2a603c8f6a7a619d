"""Multistep consistency distillation (Heek et al. 2024, Section 3) in EDM's noise schedule.

An image is noised to the upper end of a teacher edge, the teacher hops to the lower end, the student's own (stopped) prediction there carries it
on to the boundary of the segment, and the student at the upper end is trained toward the denoised image from which a DDIM step would reach the
same place.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from former_losses.consistency_loss import HOPS, PINNED, Pairs, SegmentLoss
from training import consistency_ops as ops


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
    gap_option = '--T_end'

    def __init__(
        self,
        teacher,
        *,
        terminal_anchor: bool,
        terminal_teacher_hop: bool,
        hop: str | Callable = 'heun',
        xvar_frac: float = 0.75,
        anchor_hops: int | None = None,
        pin_top: bool | None = None,
        **segments,
    ):
        if isinstance(hop, str) and hop not in HOPS:
            raise ValueError(f'hop {hop!r} is not one of {", ".join(HOPS)}')
        super().__init__(terminal_anchor=terminal_anchor, **segments)
        self.teacher, self.hop, self.xvar_frac, self.terminal_teacher_hop = (
            teacher,
            hop,
            xvar_frac,
            terminal_teacher_hop,
        )
        self.pin_top = terminal_anchor if pin_top is None else pin_top
        top, bottom = float(self.student[0]), float(self.student[1])
        self.anchor_levels = ops.anchor_nodes(
            top, bottom, self.sigma_min, self.rho, anchor_hops, self.sigma_grid
        ).tolist()

    def parts(self, kinds: np.ndarray) -> dict[str, np.ndarray]:
        return dict(
            super().parts(kinds), hopping=(kinds == ops.GENERAL) | (kinds == ops.SNAP), pinned=kinds == PINNED
        )

    def reference(self, net, pairs: Pairs) -> Tensor:
        """See docs/method.md, 'Target'. An evaluation is of the samples alone whose reference depends on it."""
        denoised = (
            pairs.ask(self.teacher, pairs.x_t, pairs.edges.sigma_t) if self.terminal_teacher_hop else None
        )
        x_b = self.self_target(
            net, pairs, self._hop(pairs, denoised), denoised if self.terminal_teacher_hop else pairs.y
        )
        return self._solve_pinned(pairs, x_b, denoised)

    def _hop(self, pairs: Pairs, denoised: Tensor | None) -> Tensor:
        """x_s, the teacher's step from sigma_t to sigma_s, on the edges that have one; x_t elsewhere."""
        edges, hopping = pairs.edges, pairs.edges.parts.get('hopping')
        if hopping is None:
            return pairs.x_t
        ends = [hopping.pick(values) for values in (pairs.x_t, edges.sigma_t, edges.sigma_s)]
        if callable(self.hop):
            return hopping.put(pairs.x_t, self.hop(*ends))
        return hopping.put(
            pairs.x_t,
            pairs.teacher_hop(self.teacher, *ends, self.hop, self.xvar_frac, hopping.pick(denoised), hopping),
        )

    def _solve_pinned(self, pairs: Pairs, x_b: Tensor, denoised: Tensor | None) -> Tensor:
        """x_b, with the teacher's solution over sub-steps on the pinned edge."""
        pinned = pairs.edges.parts.get('pinned')
        if pinned is None:
            return x_b
        ask = lambda x, sigma: pairs.ask(self.teacher, x, sigma, pinned)
        return pinned.put(
            x_b, ops.solve_ode(ask, pinned.pick(pairs.x_t), self.anchor_levels, pinned.pick(denoised))
        )
