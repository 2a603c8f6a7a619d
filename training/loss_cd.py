"""Multistep consistency distillation (Heek et al. 2024, Section 3) in EDM's noise schedule.

An image is noised to the upper end of a teacher edge, the teacher hops to the lower end, the student's own (stopped) prediction there carries it
on to the boundary of the segment, and the student at the upper end is trained towards the denoised image from which a DDIM step would reach the
same place.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_utils import training_stats
from training import consistency_ops as ops
from training.loss import report_by_sigma, student_masks, unwrap

EDGE_NAMES = [f'Edges/{name}' for name in (*ops.KIND_NAMES, 'pinned')]


@dataclass(frozen=True)
class EdgeSchedule:
    """What a training step needs to know of the teacher's grid at one T: built when T changes, kept on host and device."""

    T: int
    edges: ops.Edges       # on the host
    cumulative: Tensor     # [T'] host, cumulative probabilities
    columns: Tensor        # [T', 5] device: sigma_t, hop target, sigma_b, weight, kind
    edge_flags: Tensor     # [T', 4] device: indicators of the kinds and of the pinned edge, for statistics
    segment: Tensor        # [T'] int64, device


class ConsistencyDistillationLoss:
    """`loss_fn(net, images, labels, draws, augment_labels) -> [N]` for a student `net` and a frozen teacher.

    Args:
        teacher: D(x, sigma, class_labels), frozen.
        S, student_grid: steps of the student and the kind of its grid.
        T_start, T_end, T_anneal_kimg: teacher edges, annealed log-linearly by images seen.
        rho, sigma_min, sigma_max: Karras schedule, already clipped to the teacher's range.
        sampling_mode: distribution of edges, see `consistency_ops.edge_probabilities`.
        cd_loss, cd_weight_mode, sigma_data: see `consistency_ops.image_distance` and `edge_weight`.
        terminal_anchor: the last edge is drawn with probability 1/T', and so is the first, whose reference is the teacher's own solution.
        terminal_teacher_hop: on the edge to zero the teacher's denoised image is the target, not the data.
        sync_dropout: the self-target sees the same dropout masks as the student.
        hop: 'heun', 'ddim', or a function (x_t, sigma_t, sigma_s) -> x_s in the teacher's place (tests).
        anchor_hops: sub-steps of the pinned first edge; None: `consistency_ops.default_anchor_hops`.
        pin_top: by default as `terminal_anchor`.
    """

    name = 'cd'

    def __init__(self, teacher, *, S: int, T_start: int, T_end: int, T_anneal_kimg: float, rho: float, sigma_min: float, sigma_max: float,
                 student_grid: str, sampling_mode: str, cd_loss: str, cd_weight_mode: str, sigma_data: float, terminal_anchor: bool,
                 terminal_teacher_hop: bool, sync_dropout: bool, hop: str | Callable = 'heun', anchor_hops: int | None = None,
                 pin_top: bool | None = None):
        if not S <= T_start <= T_end:
            raise ValueError(f'S <= T_start <= T_end does not hold for {S}, {T_start}, {T_end}')
        if isinstance(hop, str) and hop not in ('heun', 'ddim'):
            raise ValueError(f'hop {hop!r} is neither heun nor ddim')
        self.teacher, self.hop = teacher, hop
        self.T_start, self.T_end, self.T_anneal_kimg = T_start, T_end, T_anneal_kimg
        self.rho, self.sigma_min, self.sigma_max, self.sigma_data = rho, sigma_min, sigma_max, sigma_data
        self.student = ops.student_grid(S, sigma_min, sigma_max, rho, student_grid)
        self.sampling_mode, self.cd_loss, self.cd_weight_mode = sampling_mode, cd_loss, cd_weight_mode
        self.terminal_anchor, self.terminal_teacher_hop, self.sync_dropout = terminal_anchor, terminal_teacher_hop, sync_dropout
        self.pin_top = terminal_anchor if pin_top is None else pin_top
        self.anchor_nodes = ops.anchor_nodes(float(self.student[0]), float(self.student[1]), sigma_min, rho, anchor_hops)
        self.segment_names = [f'Loss/segment{j}' for j in range(S)]
        self.schedule: EdgeSchedule | None = None
        self.T = T_start

    def begin_step(self, nimg: int) -> None:
        """Set T for the step that follows `nimg` images."""
        self.T = ops.anneal_T(nimg, self.T_start, self.T_end, self.T_anneal_kimg)

    def _schedule(self, device: torch.device) -> EdgeSchedule:
        if self.schedule is None or self.schedule.T != self.T or self.schedule.columns.device != device:
            self.schedule = self._build_schedule(device)
        return self.schedule

    def _build_schedule(self, device: torch.device) -> EdgeSchedule:
        teacher = ops.teacher_grid(self.student, self.T, self.sigma_min, self.sigma_max, self.rho)
        edges = ops.edge_table(teacher, self.student)
        ops.check_edges(edges)
        probabilities = ops.edge_probabilities(teacher, self.student, self.sampling_mode, self.rho, self.terminal_anchor, self.pin_top)
        # Edges to zero have no hop; any positive level keeps the unused arithmetic finite.
        target = torch.where(edges.kind == ops.TERMINAL, edges.sigma_t / 2, edges.sigma_s)
        weight = ops.edge_weight(edges.sigma_t, edges.sigma_s, self.cd_weight_mode, self.sigma_data)
        columns = torch.stack([edges.sigma_t, target, edges.sigma_b, weight, edges.kind.double()], dim=1)
        flags = torch.nn.functional.one_hot(edges.kind, 3).double()
        pinned = torch.zeros(len(edges), 1, dtype=torch.float64)
        pinned[0] = self.pin_top
        return EdgeSchedule(self.T, edges, probabilities.cumsum(0), columns.to(device), torch.cat([flags, pinned], dim=1).to(device),
                            edges.segment.to(device))

    def _denoise(self, x: Tensor, sigma: Tensor, labels, augment_labels) -> Tensor:
        kwargs = {} if augment_labels is None else dict(augment_labels=augment_labels)
        return self.teacher(x, sigma, labels, **kwargs).double()

    @torch.no_grad()
    def reference(self, target_net, y, x_t, row, labels, augment_labels, masks, pinned: Tensor) -> Tensor:
        """x_b, the state at the boundary that the student should reach from x_t, [N, ...] float64 (docs/method.md, 'Target').

        `row`: the edges' columns [N, 5]; `pinned`: indices, known to the host, of samples on the pinned first edge.
        """
        sigma_t, sigma_s, sigma_b, _, kind = row.unbind(dim=1)
        kind = ops.expand_like(kind, x_t)
        kwargs = {} if augment_labels is None else dict(augment_labels=augment_labels)
        denoise = lambda x, sigma: self._denoise(x, sigma, labels, augment_labels)
        if callable(self.hop):
            denoised = denoise(x_t, sigma_t) if self.terminal_teacher_hop else None
            x_s = self.hop(x_t, sigma_t, sigma_s)
        else:
            denoised = denoise(x_t, sigma_t)
            if self.hop == 'heun':
                x_s = ops.heun_hop(denoise, x_t, sigma_t, sigma_s, denoised)
            else:
                x_s = ops.ddim_step(x_t, denoised, sigma_t, sigma_s)
        self_target = target_net(x_s, sigma_s, labels, dropout_masks=masks, **kwargs)
        x_general = ops.ddim_step(x_s, self_target, sigma_s, sigma_b)
        x_terminal = denoised if self.terminal_teacher_hop else y
        x_b = torch.where(kind == ops.GENERAL, x_general, torch.where(kind == ops.SNAP, x_s, x_terminal))
        if len(pinned):
            rows = pinned.to(x_t.device, non_blocking=True)
            some = lambda t: None if t is None else t[rows]
            denoise_some = lambda x, sigma: self._denoise(x, sigma, some(labels), some(augment_labels))
            x_b = x_b.index_copy(0, rows, ops.solve_ode(denoise_some, x_t[rows], self.anchor_nodes))
        return x_b

    def __call__(self, net, images, labels, draws, augment_labels=None):
        schedule = self._schedule(images.device)
        # The host draws the edges, so that it knows which samples need the many-step reference without asking the device.
        index = torch.searchsorted(schedule.cumulative, draws.uniform('edge') * schedule.cumulative[-1], right=True)
        index = index.clamp(max=len(schedule.edges) - 1)
        pinned = (index == 0).nonzero().flatten() if self.pin_top else index[:0]
        index = index.to(images.device, non_blocking=True)
        row = schedule.columns[index]
        sigma_t, sigma_b, weight = row[:, 0], row[:, 2], row[:, 3]

        y = images.double()
        x_t = y + ops.expand_like(sigma_t, y) * draws.normal('noise', images.shape[1:])
        masks = student_masks(net, draws)
        target_masks = masks if self.sync_dropout else student_masks(net, draws, purpose='target dropout')
        x_b = self.reference(unwrap(net), y, x_t, row, labels, augment_labels, target_masks, pinned)
        x_star = ops.inv_ddim(x_b, x_t, sigma_t, sigma_b, check=False)
        kwargs = {} if augment_labels is None else dict(augment_labels=augment_labels)
        prediction = net(x_t, sigma_t, labels, dropout_masks=masks, **kwargs)
        loss = weight * ops.image_distance(prediction.double() - x_star, self.cd_loss)
        self._report(schedule, index, sigma_t, loss.detach())
        return loss

    def _report(self, schedule: EdgeSchedule, index: Tensor, sigma_t: Tensor, loss: Tensor) -> None:
        training_stats.report(EDGE_NAMES, schedule.edge_flags[index])
        training_stats.report('Edges/T', sigma_t.new_full([1], len(schedule.edges)))
        training_stats.report('Edges/log10_sigma_t', sigma_t.log() / math.log(10))
        training_stats.report_bins(self.segment_names, schedule.segment[index], loss)
        report_by_sigma('Loss', sigma_t, loss)
