"""Truncated consistency training (Lee et al. 2025): the second stage of easy consistency tuning, at times above t' alone.

The network of the first stage, frozen, knows the way from t' to the image; the one that trains has all its capacity for the way from noise to t'.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from former_losses.consistency_loss import ConsistencyLoss, Drawn, Pairs
from torch_utils import training_stats
from training import consistency_ops as ops
from training.draws import upload
from training.networks.switched import Switched
from training.objectives import time_schedules as times


class TruncatedTrainingLoss(ConsistencyLoss):
    """w(t) ℓ(student(x_t; t) − sg[network(x_r; r)]), x_r = y + r n, the network being the student where r >= t' and the first stage's below.

    A share of every batch lies at t = t' itself, where the first stage answers and so ties the student to images. The loss is the mean over the
    others plus `boundary_weight` times the mean over that share.

    Args:
        teacher: the first stage's consistency model, frozen.
        sigma_max, dividing_t: ends of the times, t' the lower.
        student_scale, student_df: of ln t, see `time_schedules.truncated_log_student_times`.
        q, k, b, ratio_cap: of r(t), see `time_schedules.tcm_ratio` and `tcm_earlier_time`.
        stage_nimg: images that a stage lasts.
        c: constant of the pseudo-Huber distance.
        tcm_weight, sigma_data: see `time_schedules.tcm_weight`.
        batch_size, boundary_share, boundary_weight: samples of a step, over all processes; share of them at t'; weight of theirs.
        sync_dropout: both networks see the dropout masks of the student; the first stage's none where it has another dropout.
    Raises: ValueError unless 0 < dividing_t < sigma_max, and where a batch would have no samples at t' or none elsewhere.
    """

    name = 'tcm'
    gap_option = '--ratio_cap'

    def __init__(
        self,
        teacher,
        *,
        sigma_max: float,
        dividing_t: float,
        student_scale: float,
        student_df: float,
        q: float,
        k: float,
        b: float,
        ratio_cap: float,
        stage_nimg: int,
        c: float,
        tcm_weight: str,
        sigma_data: float,
        batch_size: int,
        boundary_share: float,
        boundary_weight: float,
        **others,
    ):
        super().__init__(cd_loss='pseudo_huber', eps=c, **others)
        if not 0 < dividing_t < sigma_max:
            raise ValueError(f"0 < t' < sigma_max does not hold for {dividing_t}, {sigma_max}")
        times.boundary_count(batch_size, boundary_share)
        self.teacher, self.sigma_max, self.dividing_t = teacher, sigma_max, dividing_t
        self.student_scale, self.student_df = student_scale, student_df
        self.q, self.k, self.b, self.ratio_cap, self.stage_nimg = q, k, b, ratio_cap, stage_nimg
        self.tcm_weight, self.sigma_data = tcm_weight, sigma_data
        self.boundary_share, self.boundary_weight, self.batch_size = (
            boundary_share,
            boundary_weight,
            batch_size,
        )
        self.same_dropout = True
        self.begin_step(0)

    def attach(self, net, weights) -> None:
        self.same_dropout = dropout_rates(net) == dropout_rates(self.teacher)

    def begin_step(self, nimg: int) -> None:
        self.stage, self.ratio = (
            times.tuning_stage(nimg, self.stage_nimg),
            times.tcm_ratio(nimg, self.stage_nimg, self.q, self.ratio_cap),
        )

    def self_target_gap(self, nimg: int) -> float:
        half = torch.tensor([0.5], dtype=torch.float64)
        t = times.truncated_log_student_times(
            half, self.dividing_t, self.sigma_max, self.student_scale, self.student_df
        )
        ratio = times.tcm_ratio(nimg, self.stage_nimg, self.q, self.ratio_cap)
        return float(1 - times.tcm_earlier_time(t, ratio, self.k, self.b) / t)

    def times_on_host(self, draws) -> np.ndarray:
        """t, r and the weight of each sample, [3, N] float64."""
        u = torch.from_numpy(draws.uniform('sigma'))
        t = times.truncated_log_student_times(
            u, self.dividing_t, self.sigma_max, self.student_scale, self.student_df
        )
        at_boundary = times.boundary_samples(draws.first, draws.count, self.batch_size, self.boundary_share)
        t = torch.where(at_boundary, self.dividing_t, t)
        r = times.tcm_earlier_time(t, self.ratio, self.k, self.b)
        scales = times.boundary_scales(
            at_boundary, self.batch_size, self.boundary_share, self.boundary_weight
        )
        return torch.stack([t, r, times.tcm_weight(t, r, self.tcm_weight, self.sigma_data) * scales]).numpy()

    def draw(self, draws, device: torch.device) -> Drawn:
        # The host draws, so that it knows which samples each network is asked for without asking the device.
        on_host = self.times_on_host(draws)
        below = on_host[1] < self.dividing_t
        parts = self.split(device, student=~below, teacher=below)
        t, r, weight = upload(on_host, device).unbind()
        kind = torch.full(t.shape, ops.GENERAL, device=device)
        return Drawn(t, r, torch.zeros_like(t), weight, kind, parts=parts)

    def reference(self, net, pairs: Pairs) -> Tensor:
        """As sigma_b = 0, what is answered at r. Each network is asked for its own samples alone."""
        x_r = pairs.data_hop()
        answers = x_r
        for name, network, masks in (
            ('student', net, pairs.masks),
            ('teacher', self.teacher, pairs.masks if self.same_dropout else {}),
        ):
            if part := pairs.edges.parts.get(name):
                answer = pairs.ask(
                    network, part.pick(x_r), part.pick(pairs.edges.sigma_s), part, dropout_masks=masks
                )
                answers = part.put(answers, answer)
        return answers

    def report(self, edges: Drawn, loss: Tensor) -> None:
        super().report(edges, loss)
        training_stats.report('Edges/stage', edges.sigma_t.new_full([1], self.stage))
        of_first_stage = torch.stack(
            [edges.sigma_t == self.dividing_t, edges.sigma_s < self.dividing_t], dim=1
        )
        training_stats.report(['Edges/boundary', 'Edges/first_stage'], of_first_stage)

    def sampled(self, net: torch.nn.Module) -> torch.nn.Module:
        return Switched(net, self.teacher, self.dividing_t)


def dropout_rates(net: torch.nn.Module) -> list[float]:
    """The dropout probabilities of a network's blocks, in their order."""
    return [module.dropout for module in net.modules() if hasattr(module, 'dropout')]
