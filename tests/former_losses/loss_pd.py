"""Progressive distillation (Salimans & Ho 2022), a stage of it: a student of S steps learns to do in one what its teacher does in two."""

from __future__ import annotations

import torch
from torch import Tensor

from former_losses.consistency_loss import Pairs, TableLoss
from training import consistency_ops as ops

HOPS = ('ddim', 'addim')


class ProgressiveDistillationLoss(TableLoss):
    """Regression on two steps of the teacher, from each level of the student's grid to the next by way of the level between them.

    Args:
        teacher: D(x, sigma, class_labels), frozen; it is asked at the levels of the grid of 2 S steps alone.
        S, student_grid, sigma_grid, rho, sigma_min, sigma_max: the student's grid, `full`, whose levels are every second one of the teacher's.
        hop, xvar_frac: 'ddim' or 'addim', see `Pairs.teacher_hop`.
        others: see `TableLoss`.
    """

    name = 'pd'

    def __init__(
        self,
        teacher,
        *,
        S: int,
        student_grid: str,
        sigma_grid: str,
        rho: float,
        sigma_min: float,
        sigma_max: float,
        hop: str,
        xvar_frac: float,
        **others,
    ):
        if student_grid != 'full':
            raise ValueError(
                f'the grids of progressive distillation are nested only if they are full, not {student_grid}'
            )
        if hop not in HOPS:
            raise ValueError(f'hop {hop!r} is not one of {", ".join(HOPS)}')
        super().__init__(**others)
        self.teacher, self.hop, self.xvar_frac = teacher, hop, xvar_frac
        self.edges = ops.halving_edges(S, sigma_min, sigma_max, rho, sigma_grid)

    def make_edges(self) -> tuple[ops.Edges, Tensor]:
        return self.edges, torch.full([len(self.edges)], 1 / len(self.edges), dtype=torch.float64)

    def reference(self, net, pairs: Pairs) -> Tensor:
        levels, x = pairs.edges, pairs.x_t
        for sigma, lower in ((levels.sigma_t, levels.sigma_s), (levels.sigma_s, levels.sigma_b)):
            x = pairs.teacher_hop(self.teacher, x, sigma, lower, self.hop, self.xvar_frac)
        return x
