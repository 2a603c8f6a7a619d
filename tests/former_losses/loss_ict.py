"""Improved consistency training (iCT; Song & Dhariwal 2023): the network is its own target, the grid doubles in stages, edges are drawn by a
lognormal distribution, short edges weigh more, and the distance is the pseudo-Huber one."""

from __future__ import annotations

from torch import Tensor

from former_losses.loss_cm import GridLoss
from training import consistency_ops as ops
from training.objectives import time_schedules as times


class ImprovedConsistencyTrainingLoss(GridLoss):
    """Consistency training without a target network, whose average biases what is learned (Song & Dhariwal 2023, Section 3.2).

    Args:
        s0, s1, schedule_nimg, batch_size: of the grid, which has s0 + 1 nodes at first and s1 + 1 at last, see `time_schedules.doubling_steps`: the
            schedule counts whole optimizer steps, of batch_size images each.
        P_mean, P_std: distribution of ln sigma, see `time_schedules.lognormal_edge_probabilities`.
        grid: see `GridLoss`.
    """

    name = 'ict'
    gap_option = '--s1'

    def __init__(
        self, *, s0: int, s1: int, schedule_nimg: int, batch_size: int, P_mean: float, P_std: float, **grid
    ):
        super().__init__(**grid)
        self.s0, self.s1, self.schedule_nimg, self.batch_size = s0, s1, schedule_nimg, batch_size
        self.P_mean, self.P_std = P_mean, P_std
        self.begin_step(0)

    def begin_step(self, nimg: int) -> None:
        self.stage = times.doubling_steps(
            nimg // self.batch_size, self.schedule_nimg // self.batch_size, self.s0, self.s1
        )

    def probabilities(self, sigmas: Tensor) -> Tensor:
        return times.lognormal_edge_probabilities(sigmas, self.P_mean, self.P_std)

    def weights(self, edges: ops.Edges) -> Tensor:
        return times.gap_weight(edges.sigma_t, edges.sigma_s)
