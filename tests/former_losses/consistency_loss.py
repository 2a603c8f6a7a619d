"""The engine of the objectives that train a student toward a point on its own trajectory.

    loss = w(sigma_t) ℓ(student(x_t; sigma_t) − x*),   x_t = y + sigma_t n

x* is the denoised image from which a DDIM step would reach the reference x_b at the boundary sigma_b. An objective says which edges there are and how
often each is drawn (`make_edges`), and what the reference is (`reference`); noise, masks, inversion, distance, weight and statistics are here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from former_losses.loss import Loss, report_by_sigma, student_masks, unwrap
from torch_utils import training_stats
from training import consistency_ops as ops
from training.draws import upload

HOPS = ('heun', 'ddim', 'addim')  # of a teacher
PINNED = len(
    ops.KIND_NAMES
)  # to the host a kind of its own: the first edge where it has a reference of its own
EDGE_NAMES = [f'Edges/{name}' for name in (*ops.KIND_NAMES, 'pinned')]


@dataclass(frozen=True)
class EdgeTable:
    """The edges to draw from, and what a training step needs to know of each, on host and device."""

    stage: Hashable  # of training, for which they were made
    edges: ops.Edges  # on the host
    cumulative: np.ndarray  # [T'] cumulative probabilities
    kinds: np.ndarray  # [T'] TERMINAL, SNAP, GENERAL or PINNED
    columns: Tensor  # [T', 5] device: sigma_t, hop target, sigma_b, weight, kind
    flags: Tensor  # [T', 4] device: indicators of the kinds and of the pinned edge, for statistics
    segment: Tensor  # [T'] int64, device
    segment_names: list[str]

    def report(self, index: Tensor, loss: Tensor) -> None:
        """Statistics of the edges [N] that samples were on, and of their losses [N]."""
        report_levels(self.columns[index, 0], loss)
        training_stats.report(EDGE_NAMES, self.flags[index])
        training_stats.report('Edges/T', torch.full_like(loss, len(self.edges)))
        training_stats.report_bins(self.segment_names, self.segment[index], loss)


def report_levels(sigma_t: Tensor, loss: Tensor) -> None:
    """Statistics of samples' noise levels [N] and losses [N]."""
    training_stats.report('Edges/log10_sigma_t', sigma_t.log() / math.log(10))
    report_by_sigma(sigma_t, loss)


@dataclass(frozen=True)
class Part:
    """Those samples of a batch that need an evaluation which the others do without.

    Attributes:
        mask: [N] bool, which; None: all.
        rows: [M] indices of those to ask a network for: theirs, which come first, and maybe others, so that networks see few sizes of batches.
            None: the whole batch is asked, as it lies.
        count: how many rows are theirs.
    """

    mask: Tensor | None = None
    rows: Tensor | None = None
    count: int = 0

    def pick(self, values: Tensor | None) -> Tensor | None:
        """[M, ...] of [N, ...]: the rows to ask for."""
        return values if values is None or self.rows is None else values[self.rows]

    def put(self, batch: Tensor, answers: Tensor) -> Tensor:
        """The batch [N, ...] with the answers [M, ...] in the places of these samples."""
        if self.rows is not None:
            return batch.index_copy(0, self.rows[: self.count], answers[: self.count])
        return (
            answers
            if self.mask is None
            else torch.where(self.mask.reshape(-1, *[1] * (batch.ndim - 1)), answers, batch)
        )


EVERYONE = Part()


def padded_size(count: int, batch: int) -> int:
    """The rows to ask for where `count` > 0 are needed: a power of two up to an eighth of the batch, then a multiple of that eighth. Never one, for
    which PyTorch compiles apart, unless the batch is one."""
    eighth = -(-batch // 8)
    size = min(1 << (count - 1).bit_length(), eighth) if count <= eighth else -(-count // eighth) * eighth
    return min(max(size, 2), batch)


def split_batch(masks: Mapping[str, np.ndarray], device: torch.device, few_sizes: bool) -> dict[str, Part]:
    """The parts of a batch on the device, by their names. Parts of nobody are left out.

    Args:
        masks: [N] bool for each part.
        few_sizes: networks are asked for few sizes of batches (`padded_size`), at the cost of rows that nobody needs.
    """
    parts = {}
    for name, mask in masks.items():
        if not (count := int(mask.sum())):
            continue
        size = padded_size(count, len(mask)) if few_sizes else count
        if count == len(mask):
            parts[name] = EVERYONE
        elif size == len(mask):
            parts[name] = Part(mask=upload(mask, device))
        else:  # a stable sort puts the part's rows first, both in their order
            parts[name] = Part(rows=upload(np.argsort(~mask, kind='stable')[:size], device), count=count)
    return parts


@dataclass(frozen=True)
class Drawn:
    """The edges of a batch's samples: float64 columns [N] on the device.

    Edges to zero, which have no hop, have a positive sigma_s all the same, so that arithmetic whose result is not used stays finite.
    """

    sigma_t: Tensor
    sigma_s: Tensor
    sigma_b: Tensor
    weight: Tensor
    kind: Tensor  # TERMINAL, SNAP or GENERAL
    index: Tensor | None = None  # which of a table's, [N] int64
    parts: Mapping[str, Part] | None = (
        None  # which need evaluations that others do without, by names; nobody those that are not there
    )

    @property
    def general(self) -> Part | None:
        """Those on general edges; None where nobody is."""
        return Part(mask=self.kind == ops.GENERAL) if self.parts is None else self.parts.get('general')


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

    def ask(
        self,
        net,
        x: Tensor,
        sigma: Tensor,
        part: Part = EVERYONE,
        dropout_masks: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """[M, ...] float64: what a network says to `x` [M, ...] at `sigma` [M], which are of a part of the batch, under the conditions and
        dropout masks of that part's rows."""
        kwargs = {} if self.augment_labels is None else dict(augment_labels=part.pick(self.augment_labels))
        if dropout_masks is not None:
            kwargs['dropout_masks'] = {name: part.pick(mask) for name, mask in dropout_masks.items()}
        return net(x, sigma, part.pick(self.labels), **kwargs).double()

    def data_hop(self) -> Tensor:
        """x_s = y + sigma_s n: the data's own step to the lower end."""
        return self.y + ops.expand_like(self.edges.sigma_s, self.y) * self.noise

    def teacher_hop(
        self,
        teacher,
        x: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        hop: str,
        xvar_frac: float,
        denoised: Tensor | None = None,
        part: Part = EVERYONE,
    ) -> Tensor:
        """A step of the teacher from `x` [M, ...] at `sigma`, of a part of the batch, by one of HOPS; `denoised` is what it says there, where that
        is known already."""
        ask = lambda x, sigma: self.ask(teacher, x, sigma, part)
        denoised = ask(x, sigma) if denoised is None else denoised
        if hop == 'heun':
            return ops.heun_hop(ask, x, sigma, sigma_next, denoised)
        if hop == 'ddim':
            return ops.ddim_step(x, denoised, sigma, sigma_next)
        y = part.pick(self.y) if xvar_frac else None
        return ops.addim_hop(
            x, denoised, sigma, sigma_next, ops.addim_variance(denoised, sigma, y, xvar_frac)
        )


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

    def split(self, device: torch.device, **masks: np.ndarray) -> dict[str, Part]:
        """The parts of a batch by their names, of masks [N] bool: see `split_batch`. GPUs see few sizes always, for their allocator's sake."""
        return split_batch(masks, device, self.few_sizes or device.type == 'cuda')

    def reference(self, net, pairs: Pairs) -> Tensor:
        """x_b [N, ...] float64: where the student should go from x_t, at the boundary. Called without gradients."""
        raise NotImplementedError

    def distance(self, prediction: Tensor, x_star: Tensor) -> Tensor:
        """ℓ of each image's prediction [N, ...] from its target, [N]."""
        return ops.image_distance(prediction - x_star, self.cd_loss, self.eps)

    def report(self, edges: Drawn, loss: Tensor) -> None:
        """Statistics of a step."""
        report_levels(edges.sigma_t, loss)

    def __call__(self, net, images, labels, draws, augment_labels=None):
        edges = self.draw(draws, images.device)
        y, noise = images.double(), draws.normal('noise', images.shape[1:])
        x_t = y + ops.expand_like(edges.sigma_t, y) * noise
        masks = student_masks(net, draws)
        target_masks = masks if self.sync_dropout else student_masks(net, draws, purpose='target dropout')
        pairs = Pairs(y, noise, x_t, edges, labels, augment_labels, target_masks)
        with torch.no_grad():
            x_star = ops.inv_ddim(
                self.reference(unwrap(net), pairs), x_t, edges.sigma_t, edges.sigma_b, check=False
            )
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

    def self_target_gap(self, nimg: int) -> float | None:
        if not self.gap_option:
            return None
        then = copy.copy(self)
        then.begin_step(nimg)
        edges, probabilities = then.make_edges()
        general = edges.kind == ops.GENERAL
        gap, order = (1 - edges.sigma_s / edges.sigma_t)[general].sort()
        cumulative = probabilities[general][order].cumsum(0)
        return float(gap[torch.searchsorted(cumulative, cumulative[-1] / 2)]) if len(gap) else None

    def parts(self, kinds: np.ndarray) -> dict[str, np.ndarray]:
        """Which samples of a batch need an evaluation that others do without, [N] bool by names, given the kinds [N] of their edges."""
        return {}

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
        columns = torch.stack(
            [edges.sigma_t, hop_target, edges.sigma_b, self.weights(edges), edges.kind.double()], dim=1
        )
        flags = torch.nn.functional.one_hot(edges.kind, 3).double()
        pinned = torch.zeros(len(edges), 1, dtype=torch.float64)
        pinned[0] = self.pin_top
        kinds = torch.where(pinned[:, 0] > 0, PINNED, edges.kind)
        on_device = (
            upload(column.numpy(), device)
            for column in (columns, torch.cat([flags, pinned], dim=1), edges.segment)
        )
        return EdgeTable(
            self.stage,
            edges,
            probabilities.cumsum(0).numpy(),
            kinds.numpy(),
            *on_device,
            [f'Loss/segment{j}' for j in range(int(edges.segment[-1]) + 1)],
        )

    def draw(self, draws, device: torch.device) -> Drawn:
        # The host draws, so that it knows which samples need which evaluations without asking the device.
        table = self.table(device)
        index = np.searchsorted(
            table.cumulative, draws.uniform('edge') * table.cumulative[-1], side='right'
        ).clip(max=len(table.edges) - 1)
        parts = self.split(device, **self.parts(table.kinds[index]))
        index = upload(index, device)
        return Drawn(*table.columns[index].unbind(dim=1), index, parts)

    def report(self, edges: Drawn, loss: Tensor) -> None:
        self.table(loss.device).report(edges.index, loss)


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

    def __init__(
        self,
        *,
        S: int,
        student_grid: str,
        T_start: int,
        T_end: int,
        T_anneal_kimg: float,
        rho: float,
        sigma_min: float,
        sigma_max: float,
        sampling_mode: str,
        sigma_grid: str = 'karras',
        keep_ties: bool = False,
        top_mass: float = 0.0,
        terminal_anchor: bool = False,
        **others,
    ):
        if not S <= T_start <= T_end:
            raise ValueError(f'S <= T_start <= T_end does not hold for {S}, {T_start}, {T_end}')
        super().__init__(**others)
        self.T_start, self.T_end, self.T_anneal_kimg = T_start, T_end, T_anneal_kimg
        self.sigma_grid, self.rho, self.sigma_min, self.sigma_max = sigma_grid, rho, sigma_min, sigma_max
        self.student = ops.student_grid(S, sigma_min, sigma_max, rho, student_grid, sigma_grid)
        self.sampling_mode, self.keep_ties, self.top_mass, self.terminal_anchor = (
            sampling_mode,
            keep_ties,
            top_mass,
            terminal_anchor,
        )
        self.stage = T_start

    def begin_step(self, nimg: int) -> None:
        self.stage = ops.anneal_T(nimg, self.T_start, self.T_end, self.T_anneal_kimg)

    def make_edges(self) -> tuple[ops.Edges, Tensor]:
        teacher = ops.teacher_grid(
            self.student,
            self.stage,
            self.sigma_min,
            self.sigma_max,
            self.rho,
            self.sigma_grid,
            self.keep_ties,
        )
        probabilities = ops.edge_probabilities(
            teacher,
            self.student,
            self.sampling_mode,
            self.rho,
            self.terminal_anchor,
            self.pin_top,
            spacing=self.sigma_grid,
            top_mass=self.top_mass,
        )
        return ops.edge_table(teacher, self.student), probabilities

    def parts(self, kinds: np.ndarray) -> dict[str, np.ndarray]:
        return dict(general=kinds == ops.GENERAL)

    def self_target(self, net, pairs: Pairs, x_s: Tensor, x_terminal: Tensor) -> Tensor:
        """x_b: where a DDIM step from x_s goes, by the student's word; on edges that end at the boundary x_s itself, on those to 0 x_terminal."""
        edges = pairs.edges
        x_b = torch.where(ops.expand_like(edges.kind, x_s) == ops.TERMINAL, x_terminal, x_s)
        if (general := edges.general) is None:
            return x_b
        x_s, sigma_s, sigma_b = (general.pick(values) for values in (x_b, edges.sigma_s, edges.sigma_b))
        denoised = pairs.ask(net, x_s, sigma_s, general, pairs.masks)
        return general.put(x_b, ops.ddim_step(x_s, denoised, sigma_s, sigma_b))
