"""Multistep consistency training (Heek et al. 2024, Section 3.1): distillation's target without a teacher.

The hop is along the data's own noise, x_s = y + sigma_s n, which is right on average over the images that x_t may stem from.
"""

from __future__ import annotations

from torch import Tensor

from former_losses.consistency_loss import Pairs, SegmentLoss


class ConsistencyTrainingLoss(SegmentLoss):
    """Multistep consistency training; on the edge to zero the target is the image. Arguments: see `SegmentLoss`."""

    name = 'ct'
    gap_option = '--T_end'

    def reference(self, net, pairs: Pairs) -> Tensor:
        return self.self_target(net, pairs, pairs.data_hop(), pairs.y)
