"""Stored solutions of a teacher's ODE, from pure noise to the image, of which many pairs of levels are learned.

Regression on a teacher's solution needs a new solution for each training image, many evaluations of the teacher. A
solution over T levels holds T (T + 1) / 2 pairs of states, and here each serves many optimizer steps (Hu et al. 2025,
"CMT", regress on pairs of a 16-step trajectory).

A place of the batch has `pool` trajectories, which serve in turn, step by step. After `reuse` uses another takes the
place of one; the places take turns in `GROUPS` groups, so that never all change at once. A trajectory depends only on
the seed, the number of the image in whose place it began, and that image's label; so a resumed run makes them again
from the labels alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dnnlib.lazy import lazy_import

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

np = lazy_import('numpy')
torch = lazy_import('torch')
misc = lazy_import('torch_utils.misc')
ops = lazy_import('training.consistency_ops')
segment_solvers = lazy_import('training.segment_solvers')

GROUPS = 4  # of places, whose trajectories begin at different steps


class Trajectories(NamedTuple):
    """The trajectories of a micro-batch in one turn.

    Attributes:
        begun: the optimizer step at which the trajectories of each group began.
        rows: [M] int64 the images that have one.
        labels: [N, label_dim] of all images, those of trajectories where there is one; None: there are no labels.
        states: [M, T+1, C, H, W] float32 at each level.
    """

    begun: list[int]
    rows: Tensor
    labels: Tensor | None
    states: Tensor


class TrajectoryStore:
    """The trajectories of this process's part of the batch.

    Args:
        levels: T+1 levels, the last one 0.
        share: of the places of a batch, evenly spread over it, that have trajectories.
        pool: trajectories of a place, which serve in turn.
        reuse: optimizer steps that a trajectory serves.
        batch_size: images of an optimizer step, on all processes.
        solver: of SEGMENT_SOLVERS, over all levels.
    """

    def __init__(
        self, levels: list[float], share: float, pool: int, reuse: int, batch_size: int, solver: str = 'heun'
    ):
        self.levels, self.share, self.solver = levels, share, solver
        self.pool, self.reuse, self.batch_size = pool, reuse, batch_size
        self.step = 0
        # By the turn, which is the step modulo `pool`, and the place of the first image of a micro-batch.
        self._stored: dict[tuple[int, int], Trajectories] = {}
        self._resumed: Tensor | None = None  # labels of a resumed run, by place and turn
        self._first_place: int | None = None

    def begin_step(self, nimg: int) -> None:
        self.step = nimg // self.batch_size

    def begun(self, group: int, step: int) -> int:
        """The step at which the trajectories began that a group has at a step."""
        # In uses of this turn. Groups begin at equal distances; all of them at the first use.
        use, turn = divmod(step, self.pool)
        begun = max(0, use - (use + group * self.reuse // GROUPS) % self.reuse)
        return begun * self.pool + turn

    def parts(self, rng) -> tuple[np.ndarray, np.ndarray]:
        """Of a micro-batch, the images that have a trajectory, [M] int64 on the host, and the others."""
        ends = np.arange(rng.count + 1) + self._place(rng)
        stored = np.diff(np.floor(ends * self.share)) > 0
        return np.flatnonzero(stored), np.flatnonzero(~stored)

    def _place(self, rng) -> int:
        """The place of a micro-batch's first image in the whole batch."""
        return rng.first - self.step * self.batch_size

    def trajectories(
        self,
        rng,
        labels: Tensor | None,
        shape: tuple[int, ...],
        denoiser: Callable[[Tensor | None], Callable],
    ) -> Trajectories:
        """The trajectories of a micro-batch; those whose turn it is begin with the labels of the images that are in
        their places now.

        Args:
            labels: [N, label_dim] of the micro-batch.
            shape: (C, H, W)
            denoiser: labels -> D(x, sigma) of the teacher.
        """
        place, turn = self._place(rng), self.step % self.pool
        self._first_place = place if self._first_place is None else min(place, self._first_place)
        stored = self._stored.get((turn, place))
        if stored is None:
            rows = misc.upload(self.parts(rng)[0], rng.device)
            states = torch.empty(len(rows), len(self.levels), *shape, device=rng.device)
            stored = Trajectories([-1] * GROUPS, rows, None if labels is None else labels.clone(), states)
            self._stored[turn, place] = stored

        # Trajectories count in the whole batch, whatever part of it is here.
        before = int(place * self.share)
        for group in range(GROUPS):
            begun, mine = self.begun(group, self.step), slice((group - before) % GROUPS, None, GROUPS)
            if begun == stored.begun[group]:
                continue
            stored.begun[group] = begun
            if not len(rows := stored.rows[mine]):
                continue

            # From noise, under the labels of the images in these places when they began.
            if labels is not None:
                stored.labels[rows] = self._labels_at(place, labels, begun)[rows]
            of_rows = None if labels is None else stored.labels[rows]
            noise = rng.at(begun * self.batch_size + place).normal('noise', shape)[rows]
            start = noise.double() * self.levels[0]
            stored.states[mine] = torch.stack([start, *self._path(denoiser(of_rows), start)], dim=1).float()
        return stored

    def _path(self, denoiser: Callable, start: Tensor) -> Iterator[Tensor]:
        """The states of the teacher at each level after the first."""
        if self.solver == 'heun':
            return ops.ode_path(denoiser, start, self.levels)  # whose last step takes one evaluation, not two
        levels = misc.upload(np.array(self.levels), start.device)
        return segment_solvers.solution_path(
            denoiser, start, levels[:, None].expand(-1, len(start)), self.solver
        )

    def _labels_at(self, place: int, labels: Tensor, begun: int) -> Tensor:
        """The labels of a micro-batch at the step at which trajectories began: now, or before a resumed run began."""
        before = self._labels_before(place, len(labels)) if begun < self.step else None
        return labels if before is None else before[:, self.step % self.pool]

    def _labels_before(self, place: int, count: int) -> Tensor | None:
        """[count, pool, label_dim] those of a micro-batch when a resumed run began; None: there are none."""
        start = place - self._first_place
        known = self._resumed is not None and start + count <= len(self._resumed)
        return self._resumed[start : start + count] if known else None

    def labels(self) -> Tensor | None:
        """[N, pool, label_dim] the labels of all trajectories at their places, 0 before their first turn; None: there
        are none."""
        found: dict[int, Tensor] = {}
        for turn, place in sorted(self._stored):
            labels = self._stored[turn, place].labels
            if labels is None:
                return None
            # After a restart, turns that have not come yet are as they were.
            before = self._labels_before(place, len(labels))
            blank = labels.new_zeros(len(labels), self.pool, labels.shape[1]) if before is None else before
            found.setdefault(place, blank.clone())[:, turn] = labels
        return torch.cat([found[place] for place in sorted(found)]) if found else None

    def resume(self, labels: Tensor) -> None:
        """The labels of the trajectories of a run that is resumed, as `labels` returned them."""
        self._resumed, self._stored = labels, {}
