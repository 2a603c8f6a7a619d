"""Snapshots and training states of a run: their names, which states are kept, saving and resuming."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch

import dnnlib
from dnnlib import EasyDict, UserError
from torch_utils import distributed, training_stats
from training import checkpoint, recorded
from training.objectives.loss import State
from training.phema import WeightAverages, average_name
from training.saved_files import (  # noqa: F401 (users import some of these from here)
    OPTIONS,
    PREEMPTED,
    no_state,
    saved_snapshots,
    saved_states,
)
from training.trained import Trained

# ----------------------------------------------------------------------------
# Where a run stands.


@dataclass
class Progress:
    """Where a run stands. Training states hold all of it."""

    nimg: int = 0  # images seen
    tick: int = 0  # ticks ended
    tick_start_nimg: int = 0  # images seen when this tick began
    due: bool = False  # whether the end of the tick remains to be done
    begun: bool = False  # whether evaluation before the first step is done
    fid: float | None = None  # of the first average of --val_emas, at the end of this tick
    # Training states that are kept, oldest first, and their FID.
    states: dict[str, float | None] = field(default_factory=dict)
    # Names of all files so far, and the images seen at each.
    names: dict[str, int] = field(default_factory=dict)
    wandb_id: str | None = None

    @classmethod
    def restored(cls, entries: dict) -> Progress:
        """From a training state, without entries that only another version knows."""
        return cls(**{entry.name: entries[entry.name] for entry in fields(cls) if entry.name in entries})

    def position(self) -> dict:
        """The progress as plain data."""
        return asdict(self)

    def next_position(self) -> dict:
        """The progress at the beginning of the next tick, as plain data."""
        following = replace(self)
        following.begin_tick()
        return asdict(following)

    def begin_tick(self) -> None:
        """End the tick, and begin the next one."""
        self.tick, self.tick_start_nimg, self.due, self.fid = self.tick + 1, self.nimg, False, None


# ----------------------------------------------------------------------------
# Names and choices.


def file_stem(progress: Progress, kind: str) -> str:
    """`<kind>-<kimg:06d>` for a file saved now; with `-<nimg>` if one of another moment has the same kimg."""
    stem = f'{kind}-{progress.nimg // 1000:06d}'
    if progress.names.setdefault(stem, progress.nimg) != progress.nimg:
        stem += f'-{progress.nimg}'
    return stem


def is_due(every: int, progress: Progress, done: bool) -> bool:
    """Whether something that comes every so many ticks, and at the end, comes at the end of this tick; 0:
    never."""
    return bool(every) and (done or progress.tick % every == 0)


def states_to_keep(states: dict[str, float | None], newest: int = 2) -> set[str]:
    """The stems of the `newest` states and the one of least FID, of {stem: FID or None}, oldest first."""
    measured = {stem: fid for stem, fid in states.items() if fid is not None}
    return {*list(states)[-newest:], *([min(measured, key=measured.get)] if measured else [])}


def load_state(resume: str, report=print) -> tuple[str, dict]:
    """(path, contents) of the state to resume from: the file `resume`, or the newest complete one in it.

    Damaged states of a folder are reported and skipped.
    Raises: UserError if there is none.
    """
    if not os.path.isdir(resume):
        return resume, checkpoint.read_state(resume, recorded.RECORDED)

    # Skip damaged states, such as those that were copied in part.
    for path in saved_states(resume):
        try:
            return os.fspath(path), checkpoint.read_state(path, recorded.RECORDED)
        except UserError as error:
            report(f'Warning: {error}' + ' Trying the state before it.' * (path != saved_states(resume)[-1]))
    raise UserError(f'--resume={resume}: {no_state(resume)}')


# ----------------------------------------------------------------------------
# Writing.


class RunFiles:
    """Writes a run's snapshots and states. All processes call the methods together; the main one writes.

    Args:
        c, run_dir: the run's configuration and folder.
        student, auxiliary, averages, loss_state: what a state holds.
        log: function that logs a line.
    """

    def __init__(
        self,
        c: EasyDict,
        run_dir: str,
        student: Trained,
        auxiliary: Trained | None,
        averages: WeightAverages,
        loss_state: State,
        log,
    ):
        self.c, self.run_dir, self.log = c, Path(run_dir), log
        self.student, self.auxiliary, self.averages, self.loss_state = (
            student,
            auxiliary,
            averages,
            loss_state,
        )
        self._newest: tuple[tuple, str] | None = None  # position and name of the last state that was written
        self._abandoned: set[str] = set()  # states later than the one that the run resumed from

    def save(self, progress: Progress, metadata: dict, fids: dict[str, float], done: bool) -> None:
        """Save what is due at the end of this tick.

        Args:
            metadata: of snapshots, see `save_snapshot`.
            fids: FIDs of the averages evaluated at the end of this tick, by name.
            done: whether training is finished.
        """
        c = self.c
        due = lambda every: is_due(every, progress, done)

        # Snapshots of the averages.
        if due(c.snapshot_ticks):
            extra = dict(ema='ema', ema_halflife_kimg=c.ema_halflife_nimg / 1e3)
            average = self.averages.saved('ema')
            self.guarded(self._snapshot, progress, '', average, metadata | extra, fids)
        for std in c.phema_stds if due(c.phema_snapshot_ticks) else ():
            extra = dict(ema=average_name(std), ema_std=std)
            average = self.averages.saved(average_name(std))
            self.guarded(self._snapshot, progress, f'-{std:.3f}', average, metadata | extra, fids)

        # A state: now and then, and the best one by FID.
        least = min((fid for fid in progress.states.values() if fid is not None), default=float('inf'))
        best = progress.fid is not None and progress.fid < least
        if (due(c.state_dump_ticks) and (progress.tick > 0 or done)) or (c.state_dump_ticks and best):
            self.save_state(progress, progress.next_position())

    def _snapshot(
        self, progress: Progress, suffix: str, net: torch.nn.Module, metadata: dict, fids: dict[str, float]
    ) -> None:
        path = self.run_dir / f'{file_stem(progress, "network-snapshot")}{suffix}.pkl'
        checkpoint.save_snapshot(
            path,
            self.loss_state.sampling_network(net),
            **metadata,
            dataset_kwargs=dict(self.c.dataset),
            fid=fids.get(metadata['ema']),
        )

    def check_weights(self) -> None:
        """End all processes if they do not hold the same weights."""
        updates = [trained.update for trained in (self.student, self.auxiliary) if trained]
        whole = [update.weights for update in updates if not update.parameters.sharded]
        if not all(map(distributed.same_everywhere, whole)):
            distributed.fail_together(
                'the processes hold different weights: a GPU or its memory is faulty. The states saved '
                'before are whole; resume from the newest one on other machines.'
            )

    def save_state(self, progress: Progress, position: dict) -> str | None:
        """Write a state from which a run resumes at `position`, then delete older ones.

        Returns: the name of its file, or of the one that already holds this position; None if it could not be
            written.
        """
        where = position['nimg'], position['tick'], position['due']
        if self._newest and self._newest[0] == where:
            return self._newest[1]

        # Collect what it holds.
        self.check_weights()
        rng = dict(cpu=torch.get_rng_state())
        if torch.cuda.is_available():
            rng['cuda'] = torch.cuda.get_rng_state()
        state = dict(
            **self.student.state_dict(),
            averages=self.averages.state_dict(),
            loss=self._loss_state(),
            progress=dict(position),
            stats=training_stats.state(),
            rng=distributed.gather_objects(rng),
            options=json.dumps(self.c),
        )
        if self.auxiliary:
            state['auxiliary'] = self.auxiliary.state_dict()

        # Write it. All processes must know the FIDs of states, to agree on which later one is the best.
        stem = file_stem(progress, 'training-state')
        if not self.guarded(self._write_state, progress, stem, state):
            return None
        progress.states = distributed.broadcast_object(progress.states)
        self._newest = where, f'{stem}.pt'
        return f'{stem}.pt'

    def _loss_state(self) -> dict:
        """What the objective keeps, with what it keeps of each image of the whole batch."""
        rows = self.loss_state.per_image()
        rows = distributed.gather_objects(None if rows is None else rows.cpu())
        return self.loss_state.state_dict() | ({} if rows[0] is None else dict(per_image=torch.cat(rows)))

    def _write_state(self, progress: Progress, stem: str, state: dict) -> None:
        # A state of this name may exist already, with its FID.
        fid = progress.states.get(stem) if progress.fid is None else progress.fid
        states = {**{name: other for name, other in progress.states.items() if name != stem}, stem: fid}
        kept = states_to_keep(states, self.c.states_kept)
        kept_states = {name: fid for name, fid in states.items() if name in kept}
        state['progress'] |= dict(names=progress.names, states=kept_states)

        # Delete older states only after this one has been read back.
        path = self.run_dir / f'{stem}.pt'
        checkpoint.save_state(path, state)
        checkpoint.verify(path)
        progress.states = state['progress']['states']
        for stale in (states.keys() | self._abandoned) - kept:
            dnnlib.util.remove(self.run_dir / f'{stale}.pt')
        self._abandoned = set()

    def guarded(self, write: Callable, *args) -> bool:
        """Whether the main process could `write(*args)`. If not, --on-save-error decides whether all
        processes stop or all continue."""
        return self.attempt(write, *args)[0]

    def attempt(self, write: Callable, *args) -> tuple[bool, object]:
        """Like `guarded`, but also returns what `write` returned on the main process."""
        # Write, and tell the other processes of any problem.
        problem = result = None
        if distributed.is_main():
            try:
                result = write(*args)
            except UserError as error:
                problem = str(error)
        problem = distributed.broadcast_object(problem)
        if problem is None:
            return True, result

        # Stop together, or continue together.
        if self.c.on_save_error == 'stop':
            distributed.fail_together(
                f'{problem} The states saved before are whole: make room and resume. '
                '(--on-save-error=continue trains on.)'
            )
        self.log(f'Warning: {problem} Training goes on (--on-save-error=continue).')
        return False, None

    def leave_note(self, signal_name: str, nimg: int, state: str) -> None:
        """Write `preempted.json`: a signal stopped the run, and this is the state to resume from."""

        def write():
            with dnnlib.util.atomic_write(self.run_dir / PREEMPTED) as file:
                file.write(json.dumps(dict(signal=signal_name, nimg=nimg, state=state)).encode() + b'\n')

        self.guarded(write)

    def tidy(self) -> None:
        """Remove the note of a run that stopped, and unfinished files of one that was killed.

        States later than the one that this run resumes from are kept until it has saved its first.
        """
        if not distributed.is_main():
            return

        # The note, and unfinished files.
        dnnlib.util.remove(self.run_dir / PREEMPTED)
        for kind in ('network-snapshot-*', 'training-state-*', 'samples-*', PREEMPTED, '*.jsonl', OPTIONS):
            for leftover in dnnlib.util.unfinished(self.run_dir, kind):
                dnnlib.util.remove(leftover)

        # Later states.
        stems, resumed = [path.stem for path in saved_states(self.run_dir)], Path(self.c.resume or '').stem
        self._abandoned = set(stems[: stems.index(resumed)]) if resumed in stems else set()
        if self._abandoned:
            self.log(
                f'{", ".join(sorted(self._abandoned))}: later than the state that this run resumes from, and '
                'deleted as soon as a new one is saved.'
            )


def newest_state(progress: Progress) -> str | None:
    """The file of the newest state that was saved and kept; None if there is none."""
    return f'{next(reversed(progress.states))}.pt' if progress.states else None


# ----------------------------------------------------------------------------
# Resuming.


def restore(
    path: str,
    state: dict,
    student: Trained,
    auxiliary: Trained | None,
    averages: WeightAverages,
    loss_state: State,
    device: torch.device,
) -> tuple[Progress, int]:
    """Restore the given objects from a training state, which is emptied.

    Returns: its progress, and the number of processes that saved it.
    Raises: UserError if it does not fit the objects.
    """
    try:
        student.load_state_dict(state)
        if auxiliary:
            auxiliary.load_state_dict(state.pop('auxiliary'))
        averages.load_state_dict(state.pop('averages'))
        loss = state.pop('loss')
        if (rows := loss.pop('per_image', None)) is not None:
            # Processes, of which there may be another number now, have consecutive parts of the batch.
            parts = rows.to(device).tensor_split(distributed.get_world_size())
            loss_state.load_per_image(parts[distributed.get_rank()])
        loss_state.load_state_dict(loss)
        training_stats.load_state(state.pop('stats'), device)
        progress, rng = state.pop('progress'), state.pop('rng')
        # Each process has a generator of its own; with another number of processes they start afresh.
        if len(rng) == distributed.get_world_size():
            own = rng[distributed.get_rank()]
            torch.set_rng_state(own['cpu'])
            if 'cuda' in own and device.type == 'cuda':
                torch.cuda.set_rng_state(own['cuda'], device)
    except (KeyError, RuntimeError, ValueError) as error:
        # PyTorch's first line says where, the next one what.
        reason = ' '.join(line.strip() for line in str(error).strip().splitlines()[:2])
        raise UserError(
            f'--resume={path} is the state of another run or network ({reason}): resume with the options it '
            'was made with'
        ) from error
    return Progress.restored(progress), len(rng)
