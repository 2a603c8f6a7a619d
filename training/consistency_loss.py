"""The engine of the objectives that train a student towards a point on its own trajectory.

    loss = w(sigma_t) ℓ(student(x_t; sigma_t) − x*),   x_t = y + sigma_t n

x* is the denoised image from which a DDIM step would reach the reference x_b at the boundary sigma_b. An objective says which edges there are and how
often each is drawn (`make_edges`), and what the reference is (`reference`); noise, masks, inversion, distance, weight and statistics are here.
"""
from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_utils import training_stats
from training import consistency_ops as ops
from training.loss import Loss, report_by_sigma, student_masks, unwrap

HOPS = ('heun', 'ddim', 'addim')  # of a teacher
EDGE_NAMES = [f'Edges/{name}' for name in (*ops.KIND_NAMES, 'pinned')]


@dataclass(frozen=True)
class EdgeTable:
    """The edges to draw from, and what a training step needs to know of each, on host and device."""

    stage: Hashable        # of training, for which they were made
    edges: ops.Edges       # on the host
    cumulative: Tensor     # [T'] host, cumulative probabilities
    columns: Tensor        # [T', 5] device: sigma_t, hop target, sigma_b, weight, kind
    flags: Tensor          # [T', 4] device: indicators of the kinds and of the pinned edge, for statistics
    segment: Tensor        # [T'] int64, device
    segment_names: list[str]


@dataclass(frozen=True)
class Drawn:
    """The edges of a batch's samples: float64 columns [N] on the device.

    Edges to zero, which have no hop, have a positive sigma_s all the same, so that arithmetic whose result is not used stays finite.
    """

    sigma_t: Tensor
    sigma_s: Tensor
    sigma_b: Tensor
    weight: Tensor
    kind: Tensor                # TERMINAL, SNAP or GENERAL
    index: Tensor | None = None    # which of a table's, [N] int64
    on_host: Tensor | None = None  # what the host has to know of each sample: the same index, or which of two networks it asks


@dataclass(frozen=True)
class Pairs:
    """A batch on its edges.

    Attributes:
        y, noise, x_t: [N, ...] float64 images, noise, and their sum at sigma_t.
        edges: of the samples.
        labels, augment_labels: conditions of the images.
        masks: dropout masks of the self-target.
    """

    y: Tensor
    noise: Tensor
    x_t: Tensor
    edges: Drawn
    labels: Tensor | None = None
    augment_labels: Tensor | None = None
    masks: dict = field(default_factory=dict)

    def ask(self, net, x: Tensor, sigma: Tensor, rows: Tensor | None = None, **kwargs) -> Tensor:
        """[N, ...] float64: what a network says to `x` at `sigma` under the conditions of the images, or of `rows`, indices of some."""
        pick = lambda value: value if value is None or rows is None else value[rows]
        if self.augment_labels is not None:
            kwargs['augment_labels'] = pick(self.augment_labels)
        return net(x, sigma, pick(self.labels), **kwargs).double()

    def data_hop(self) -> Tensor:
        """x_s = y + sigma_s n: the data's own step to the lower end."""
        return self.y + ops.expand_like(self.edges.sigma_s, self.y) * self.noise

    def teacher_hop(self, teacher, x: Tensor, sigma: Tensor, sigma_next: Tensor, hop: str, xvar_frac: float,
                    denoised: Tensor | None = None) -> Tensor:
        """A step of the teacher from `x` at `sigma`, by one of HOPS; `denoised` is what it says there, where that is known already."""
        denoised = self.ask(teacher, x, sigma) if denoised is None else denoised
        if hop == 'heun':
            return ops.heun_hop(lambda x, sigma: self.ask(teacher, x, sigma), x, sigma, sigma_next, denoised)
        if hop == 'ddim':
            return ops.ddim_step(x, denoised, sigma, sigma_next)
        return ops.addim_hop(x, denoised, sigma, sigma_next, ops.addim_variance(denoised, sigma, self.y if xvar_frac else None, xvar_frac))


class ConsistencyLoss(Loss):
    """`loss_fn(net, images, labels, draws, augment_labels) -> [N]` for a student `net`; subclasses say of what edges and references.

    Args:
        cd_loss, eps: see `consistency_ops.image_distance`.
        sync_dropout: the self-target sees the dropout masks of the student.
    """

    name = 'consistency'

    def __init__(self, *, cd_loss: str, eps: float = ops.PSEUDO_HUBER_EPS, sync_dropout: bool = True):
        self.cd_loss, self.eps, self.sync_dropout = cd_loss, eps, sync_dropout
        self.stage: Hashable = None

    def draw(self, draws, device: torch.device) -> Drawn:
        """An edge for each sample."""
        raise NotImplementedError

    def reference(self, net, pairs: Pairs) -> Tensor:
        """x_b [N, ...] float64: where the student should go from x_t, at the boundary. Called without gradients."""
        raise NotImplementedError

    def distance(self, prediction: Tensor, x_star: Tensor) -> Tensor:
        """ℓ of each image's prediction [N, ...] from its target, [N]."""
        return ops.image_distance(prediction - x_star, self.cd_loss, self.eps)

    def report(self, edges: Drawn, loss: Tensor) -> None:
        """Statistics of a step."""
        training_stats.report('Edges/log10_sigma_t', edges.sigma_t.log() / math.log(10))
        report_by_sigma('Loss', edges.sigma_t, loss)

    def __call__(self, net, images, labels, draws, augment_labels=None):
        edges = self.draw(draws, images.device)
        y, noise = images.double(), draws.normal('noise', images.shape[1:])
        x_t = y + ops.expand_like(edges.sigma_t, y) * noise
        masks = student_masks(net, draws)
        target_masks = masks if self.sync_dropout else student_masks(net, draws, purpose='target dropout')
        pairs = Pairs(y, noise, x_t, edges, labels, augment_labels, target_masks)
        with torch.no_grad():
            x_star = ops.inv_ddim(self.reference(unwrap(net), pairs), x_t, edges.sigma_t, edges.sigma_b, check=False)
        prediction = pairs.ask(net, x_t, edges.sigma_t, dropout_masks=masks)
        loss = edges.weight * self.distance(prediction, x_star)
        self.report(edges, loss.detach())
        return loss


class TableLoss(ConsistencyLoss):
    """A loss on a list of edges, each with a probability, which changes with the stage of training: subclasses set `stage` in `begin_step`.

    Args:
        cd_weight_mode, sigma_data: see `consistency_ops.edge_weight`.
        others: see `ConsistencyLoss`.
    """

    pin_top = False  # whether the first edge has a reference of its own

    def __init__(self, *, sigma_data: float, cd_weight_mode: str = 'flat', **others):
        super().__init__(**others)
        self.cd_weight_mode, self.sigma_data = cd_weight_mode, sigma_data
        self._table: EdgeTable | None = None

    def make_edges(self) -> tuple[ops.Edges, Tensor]:
        """The edges of this stage and their probabilities, [T'] float64, on the host."""
        raise NotImplementedError

    def weights(self, edges: ops.Edges) -> Tensor:
        """w of each edge, [T']."""
        return ops.edge_weight(edges.sigma_t, edges.sigma_s, self.cd_weight_mode, self.sigma_data)

    def table(self, device: torch.device) -> EdgeTable:
        """The edges of this stage; made once."""
        if self._table is None or self._table.stage != self.stage or self._table.columns.device != device:
            self._table = self._make_table(device)
        return self._table

    def _make_table(self, device: torch.device) -> EdgeTable:
        edges, probabilities = self.make_edges()
        ops.check_edges(edges)
        hop_target = torch.where(edges.kind == ops.TERMINAL, edges.sigma_t / 2, edges.sigma_s)
        columns = torch.stack([edges.sigma_t, hop_target, edges.sigma_b, self.weights(edges), edges.kind.double()], dim=1)
        flags = torch.nn.functional.one_hot(edges.kind, 3).double()
        pinned = torch.zeros(len(edges), 1, dtype=torch.float64)
        pinned[0] = self.pin_top
        return EdgeTable(self.stage, edges, probabilities.cumsum(0), columns.to(device), torch.cat([flags, pinned], dim=1).to(device),
                         edges.segment.to(device), [f'Loss/segment{j}' for j in range(int(edges.segment[-1]) + 1)])

    def draw(self, draws, device: torch.device) -> Drawn:
        # The host draws, so that it knows which samples need another reference without asking the device.
        table = self.table(device)
        on_host = torch.searchsorted(table.cumulative, draws.uniform('edge') * table.cumulative[-1], right=True).clamp(max=len(table.edges) - 1)
        index = on_host.to(device, non_blocking=True)
        return Drawn(*table.columns[index].unbind(dim=1), index, on_host)

    def report(self, edges: Drawn, loss: Tensor) -> None:
        super().report(edges, loss)
        table = self.table(loss.device)
        training_stats.report(EDGE_NAMES, table.flags[edges.index])
        training_stats.report('Edges/T', edges.sigma_t.new_full([1], len(table.edges)))
        training_stats.report_bins(table.segment_names, table.segment[edges.index], loss)


class SegmentLoss(TableLoss):
    """A loss on the segments of a student of S steps (Heek et al. 2024, Section 3).

    Args:
        S, student_grid: steps of the student and the kind of its grid.
        T_start, T_end, T_anneal_kimg: edges of the teacher's grid, annealed log-linearly by images seen.
        sigma_grid, rho, sigma_min, sigma_max: noise levels, already clipped to the teacher's range.
        sampling_mode, terminal_anchor, top_mass: distribution of edges, see `consistency_ops.edge_probabilities`.
        keep_ties: see `consistency_ops.teacher_grid`.
        others: see `TableLoss`.
    """

    def __init__(self, *, S: int, student_grid: str, T_start: int, T_end: int, T_anneal_kimg: float, rho: float, sigma_min: float, sigma_max: float,
                 sampling_mode: str, sigma_grid: str = 'karras', keep_ties: bool = False, top_mass: float = 0.0, terminal_anchor: bool = False,
                 **others):
        if not S <= T_start <= T_end:
            raise ValueError(f'S <= T_start <= T_end does not hold for {S}, {T_start}, {T_end}')
        super().__init__(**others)
        self.T_start, self.T_end, self.T_anneal_kimg = T_start, T_end, T_anneal_kimg
        self.sigma_grid, self.rho, self.sigma_min, self.sigma_max = sigma_grid, rho, sigma_min, sigma_max
        self.student = ops.student_grid(S, sigma_min, sigma_max, rho, student_grid, sigma_grid)
        self.sampling_mode, self.keep_ties, self.top_mass, self.terminal_anchor = sampling_mode, keep_ties, top_mass, terminal_anchor
        self.stage = T_start

    def begin_step(self, nimg: int) -> None:
        self.stage = ops.anneal_T(nimg, self.T_start, self.T_end, self.T_anneal_kimg)

    def make_edges(self) -> tuple[ops.Edges, Tensor]:
        teacher = ops.teacher_grid(self.student, self.stage, self.sigma_min, self.sigma_max, self.rho, self.sigma_grid, self.keep_ties)
        probabilities = ops.edge_probabilities(teacher, self.student, self.sampling_mode, self.rho, self.terminal_anchor, self.pin_top,
                                               spacing=self.sigma_grid, top_mass=self.top_mass)
        return ops.edge_table(teacher, self.student), probabilities

    def self_target(self, net, pairs: Pairs, x_s: Tensor, x_terminal: Tensor) -> Tensor:
        """x_b: where a DDIM step from x_s goes, by the student's word; on edges that end at the boundary x_s itself, on those to 0 x_terminal."""
        edges, kind = pairs.edges, ops.expand_like(pairs.edges.kind, x_s)
        x_general = ops.ddim_step(x_s, pairs.ask(net, x_s, edges.sigma_s, dropout_masks=pairs.masks), edges.sigma_s, edges.sigma_b)
        return torch.where(kind == ops.GENERAL, x_general, torch.where(kind == ops.SNAP, x_s, x_terminal))
