"""Draws the edges that the images of a batch lie on, from a list of edges and their probabilities that
changes with the stage of training."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, NamedTuple

from dnnlib.lazy import lazy_import
from training.objectives.loss import State, report_levels

if TYPE_CHECKING:
    from torch import Tensor

np = lazy_import('numpy')
torch = lazy_import('torch')
training_stats = lazy_import('torch_utils.training_stats')
ops = lazy_import('training.consistency_ops')
misc = lazy_import('torch_utils.misc')


class BatchEdges(NamedTuple):
    """The edges of a batch's images, [N] each, on the device.

    Attributes:
        sigma_t, sigma_s, sigma_b: float64 upper and lower end, and boundary.
        kind: TERMINAL, SNAP or GENERAL, see `grids.Edges`.
        index: int64, position in the list of edges.
        anchored: [M] int64, the images on the anchored edge.
    """

    sigma_t: Tensor
    sigma_s: Tensor
    sigma_b: Tensor
    kind: Tensor
    index: Tensor
    anchored: Tensor

    def of(self, rows: Tensor) -> BatchEdges:
        """The edges of some of the images, [M] int64."""
        return BatchEdges(*(values[rows] for values in self[:-1]), self.anchored)


class EdgeSchedule(State):
    """Draws edges; subclasses define them by `stage_after` and `edges_at`.

    Attributes:
        anchor: whether the first edge is anchored, which means that it has a boundary target of its own.
        stage: stage of the next step.
        edges: [T'] edges of this stage, on the host.
    """

    def __init__(self, c, teacher=None, anchor: bool = False, gap_option: str = ''):
        super().__init__(c, teacher)
        self.anchor, self.gap_option, self.stage = anchor, gap_option, None
        self.begin_step(0)

    def stage_after(self, nimg: int) -> Hashable:
        """The stage of the step that follows `nimg` images."""
        raise NotImplementedError

    def edges_at(self, stage: Hashable) -> tuple[ops.Edges, Tensor]:
        """The edges of a stage and their probabilities, [T'] float64, on the host."""
        raise NotImplementedError

    def begin_step(self, nimg: int) -> None:
        stage = self.stage_after(nimg)
        if stage != self.stage:
            self.stage = stage
            self._enter()

    def _enter(self) -> None:
        """Build the tables of this stage."""
        # Checked here once, so that steps need not synchronize with the device.
        edges, probabilities = self.edges_at(self.stage)
        ops.check_edges(edges)
        self.edges, self._on_device = edges, None
        self.cumulative = probabilities.cumsum(0).numpy()

        # What a step gathers by index: columns of `BatchEdges`, indicators for statistics, segments. Uploaded
        # by the first step that draws.
        columns = [edges.sigma_t, edges.sigma_s, edges.sigma_b, edges.kind.double()]
        anchored = torch.zeros(len(edges), 1, dtype=torch.float64)
        anchored[0] = self.anchor
        flags = torch.cat([torch.nn.functional.one_hot(edges.kind, 3).double(), anchored], dim=1)
        self._on_host = [values.numpy() for values in (torch.stack(columns, dim=1), flags, edges.segment)]
        self._segment_names = self.segment_names(int(edges.segment[-1]) + 1)

    def segment_names(self, count: int) -> list[str]:
        """Statistics of the loss by segment."""
        return [f'Loss/segment{j}' for j in range(count)]

    def draw(self, rng) -> BatchEdges:
        """An edge for each image of `rng`, by inversion of the cumulative probabilities."""
        # On the host, which then knows the anchored images without synchronizing with the device.
        # Probabilities may sum to 1 only up to rounding, and a draw may hit the end of the last interval.
        uniform = rng.uniform('edge') * self.cumulative[-1]
        index = np.searchsorted(self.cumulative, uniform, side='right').clip(max=len(self.edges) - 1)
        anchored = np.flatnonzero((index == 0) & self.anchor)

        # The columns of these edges, on the device.
        if self._on_device is None:
            self._on_device = [misc.upload(values, rng.device) for values in self._on_host]
        index, anchored = (misc.upload(values, rng.device) for values in (index, anchored))
        return BatchEdges(*self._on_device[0][index].unbind(dim=1), index, anchored)

    def report(self, edges: BatchEdges, loss: Tensor) -> None:
        """Report a batch's edges and its losses [N]."""
        _, flags, segment = self._on_device
        report_levels(edges.sigma_t, loss)
        names = [f'Edges/{name}' for name in (*ops.KIND_NAMES, 'pinned')]
        training_stats.report(names, flags[edges.index])
        training_stats.report('Edges/T', edges.sigma_t.new_full(loss.shape, len(self.edges)))
        training_stats.report_bins(self._segment_names, segment[edges.index], loss)

    def self_target_gap(self, nimg: int) -> float | None:
        if not self.gap_option:
            return None
        # Terminal and snap edges compare the network with no output of its own.
        edges, probabilities = self.edges_at(self.stage_after(nimg))
        general = edges.kind == ops.GENERAL
        gap, order = (1 - edges.sigma_s / edges.sigma_t)[general].sort()
        # The median by probability: the gap at which half of it is reached.
        cumulative = probabilities[general][order].cumsum(0)
        return float(gap[torch.searchsorted(cumulative, cumulative[-1] / 2)]) if len(gap) else None
