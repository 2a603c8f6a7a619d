"""Easy consistency tuning (Geng et al. 2024): consistency training at continuous times, which begins as diffusion training.

A pair of times t > r lies on one noised image; r is 0 at first and comes closer to t stage by stage.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from former_losses.consistency_loss import ConsistencyLoss, Drawn, Pairs
from torch_utils import training_stats
from training import consistency_ops as ops
from training.draws import upload
from training.objectives import time_schedules as times


class ConsistencyTuningLoss(ConsistencyLoss):
    """w(t) ℓ(student(x_t; t) − sg[student(x_r; r)]), x_r = y + r n under the same dropout masks; the image itself where r = 0.

    Args:
        P_mean, P_std: of ln t.
        q, k, b: of r(t), see `time_schedules.earlier_time`.
        stage_nimg: images that a stage lasts.
        c: constant of the pseudo-Huber distance; 0 for the distance itself.
        ect_weight, sigma_data: see `time_schedules.ect_weight`.
        others: see `ConsistencyLoss`.
    """

    name = 'ect'
    gap_option = '--stage_steps or --q'

    def __init__(
        self,
        *,
        P_mean: float,
        P_std: float,
        q: float,
        k: float,
        b: float,
        c: float,
        stage_nimg: int,
        ect_weight: str,
        sigma_data: float,
        **others,
    ):
        super().__init__(cd_loss='pseudo_huber', eps=c, **others)
        self.P_mean, self.P_std, self.q, self.k, self.b = P_mean, P_std, q, k, b
        self.stage_nimg, self.ect_weight, self.sigma_data = stage_nimg, ect_weight, sigma_data
        self.stage = 0

    def begin_step(self, nimg: int) -> None:
        self.stage = times.tuning_stage(nimg, self.stage_nimg)

    def self_target_gap(self, nimg: int) -> float:
        t = torch.tensor(
            self.P_mean, dtype=torch.float64
        ).exp()  # the gap falls with t, so its median is the median time's
        return float(
            1 - times.earlier_time(t, times.tuning_stage(nimg, self.stage_nimg), self.q, self.k, self.b) / t
        )

    def times_on_host(self, draws) -> np.ndarray:
        """t and r of each sample, [2, N] float64."""
        t = times.lognormal_times(torch.from_numpy(draws.normal_on_host('sigma')), self.P_mean, self.P_std)
        return torch.stack([t, times.earlier_time(t, self.stage, self.q, self.k, self.b)]).numpy()

    def draw(self, draws, device: torch.device) -> Drawn:
        # The host draws, so that it knows where r = 0, of which the first stages are full, without asking the device.
        on_host = self.times_on_host(draws)
        parts = self.split(device, general=on_host[1] > 0)
        t, r = upload(on_host, device).unbind()
        kind = torch.where(r > 0, ops.GENERAL, ops.TERMINAL)
        weight = times.ect_weight(t, r, self.ect_weight, self.sigma_data)
        return Drawn(t, torch.where(r > 0, r, t / 2), torch.zeros_like(t), weight, kind, parts=parts)

    def reference(self, net, pairs: Pairs) -> Tensor:
        """As sigma_b = 0, what is answered at r, or the image where r = 0."""
        if (general := pairs.edges.general) is None:
            return pairs.y
        x_r, r = general.pick(pairs.data_hop()), general.pick(pairs.edges.sigma_s)
        return general.put(pairs.y, pairs.ask(net, x_r, r, general, pairs.masks))

    def report(self, edges: Drawn, loss: Tensor) -> None:
        super().report(edges, loss)
        training_stats.report('Edges/stage', edges.sigma_t.new_full([1], self.stage))
        training_stats.report('Edges/terminal', (edges.kind == ops.TERMINAL).double())
