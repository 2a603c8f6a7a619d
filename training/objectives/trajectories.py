"""Stored solutions of a teacher's ODE, from pure noise to the image, of which many pairs of levels are learned.

Regression on a teacher's solution needs a new solution for each training image, many evaluations of the teacher. A
solution over T levels holds T (T + 1) / 2 pairs of states, and here each serves many optimizer steps (Hu et al. 2025,
"CMT", regress on pairs of a 16-step trajectory).

A place of the batch keeps one trajectory for `reuse` optimizer steps, then another. The places take turns in `GROUPS`
groups, so that never all change at once. A trajectory depends only on the seed, the number of the image in whose
place it began, and that image's label; so a resumed run makes them again from the labels alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dnnlib.lazy import lazy_import

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

np = lazy_import('numpy')
torch = lazy_import('torch')
misc = lazy_import('torch_utils.misc')
ops = lazy_import('training.consistency_ops')

GROUPS = 4  # of places, whose trajectories begin at different steps


class Trajectories(NamedTuple):
    """The trajectories of a micro-batch.

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
        share: of the places of a batch, evenly spread over it, that have a trajectory.
        reuse: optimizer steps that a trajectory serves.
        batch_size: images of an optimizer step, on all processes.
    """

    def __init__(self, levels: list[float], share: float, reuse: int, batch_size: int):
        self.levels, self.share, self.reuse, self.batch_size = levels, share, reuse, batch_size
        self.step = 0
        self._stored: dict[int, Trajectories] = {}  # by the place of the first image of a micro-batch
        self._resumed: Tensor | None = None  # labels of a resumed run, by place
        self._first_place: int | None = None

    def begin_step(self, nimg: int) -> None:
        self.step = nimg // self.batch_size

    def begun(self, group: int, step: int) -> int:
        """The step at which the trajectories began that a group has at a step."""
        # Groups begin at equal distances; all of them at step 0.
        offset = group * self.reuse // GROUPS
        return max(0, step - (step + offset) % self.reuse)

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
        place = self._place(rng)
        self._first_place = place if self._first_place is None else min(place, self._first_place)
        stored = self._stored.get(place)
        if stored is None:
            rows = misc.upload(self.parts(rng)[0], rng.device)
            states = torch.empty(len(rows), len(self.levels), *shape, device=rng.device)
            stored = Trajectories([-1] * GROUPS, rows, None if labels is None else labels.clone(), states)
            self._stored[place] = stored

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
            path = [start, *ops.ode_path(denoiser(of_rows), start, self.levels)]
            stored.states[mine] = torch.stack(path, dim=1).float()
        return stored

    def _labels_at(self, place: int, labels: Tensor, begun: int) -> Tensor:
        """The labels of a micro-batch at the step at which trajectories began: now, or before a resumed run began."""
        start = place - self._first_place
        resumed = (
            self._resumed is not None and begun < self.step and start + len(labels) <= len(self._resumed)
        )
        return self._resumed[start : start + len(labels)] if resumed else labels

    def labels(self) -> Tensor | None:
        """[N, label_dim] the labels of all trajectories at their places; None: there are none."""
        stored = [self._stored[place].labels for place in sorted(self._stored)]
        return torch.cat(stored) if stored and stored[0] is not None else None

    def resume(self, labels: Tensor) -> None:
        """The labels of the trajectories of a run that is resumed, as `labels` returned them."""
        self._resumed, self._stored = labels, {}
