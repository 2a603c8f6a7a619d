"""Progressive distillation in rounds. Each is a run in its own folder, `S0512`, `S0256`, ..., with its own
states, snapshots and logs; its teacher is the last snapshot of the round before."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from dnnlib import UserError
from dnnlib.text import printable
from training.command_line import Options
from training.guidance_options import GuidanceOptions
from training.objectives import time_schedules as times
from training.saved_files import round_folders, saved_snapshots, saved_states
from training.stored_options import recorded_options

# Options of a run that resumes nothing, and of one whose teacher is not guided.
ANEW = dict(resume=None, resume_override=False, allow_other_data=False)
UNGUIDED = dict(guide=None, guidance=None, guidance_interval=None)


def rounds(o: Options, run_dir: str) -> Iterator[Options]:
    """The options of each round in turn, which start it, or resume it if it was interrupted.

    A finished round that left states is resumed too, so that its options are compared with these; it has
    nothing to do.

    Args:
        o: options of train.py; `batch` and `seed` are known.
        run_dir: folder of the rounds' folders.
    Raises: UserError if a round does not follow from the one before it.
    """
    from torch_utils import distributed
    from training import configuration, same_run

    teacher, plan = o.teacher, times.halving_rounds(o.own.S_start, o.own.S, o.own.stage_steps)
    data = None

    # The rounds that exist are those of these options.
    for folder in round_folders(run_dir):
        if (recorded := recorded_options(folder)['stages']) != [[S, steps] for S, steps in plan]:
            raise UserError(
                f'{run_dir} holds a progressive distillation in the rounds {json.dumps(recorded)} (sampling '
                f'steps, optimizer steps), these options say {json.dumps(plan)}: resume with the --S_start, '
                '--S and --stage_steps it was made with.'
            )

    # Yield one round after the other; the last snapshot of each is the teacher of the next. That is not
    # guided: what guidance does, the first student has learned.
    for i, (S, steps) in enumerate(plan):
        folder, total = os.path.join(run_dir, f'S{S:04d}'), steps * o.run.batch
        snapshot, has_states = distributed.broadcast_object(
            (_finished(folder, total, teacher, o.own), bool(saved_states(folder)))
        )
        # Start the round, or resume it.
        if snapshot is None or has_states:
            resume = o.run.resume if o.run.resume and Path(o.run.resume).parent == Path(folder) else folder
            one = o.but(
                S=S,
                S_start=S,
                teacher=teacher,
                duration=total / 1e6,
                outdir=folder,
                nosubdir=True,
                **(dict(resume=resume) if has_states else ANEW),
                **(UNGUIDED if i else {}),
            )
            yield dataclasses.replace(one, stages=tuple(plan))
            snapshot = distributed.broadcast_object(_finished(folder, total, teacher, o.own))
        # Without a state to resume from, compare the data with the record in its folder.
        else:
            data = data or same_run.data_record(o, configuration.open_dataset(o.run))
            if about_data := same_run.check_same_data(o, data, recorded_options(folder)['dataset'], folder):
                distributed.print0(printable(about_data), file=sys.stderr)
        if snapshot is None:
            raise UserError(
                f'{folder} has no snapshot of {total} images, from which the next round would start: resume '
                'with the --batch it was made with, or delete that folder and the ones of fewer steps.'
            )
        teacher = snapshot


def _finished(folder: str, total_nimg: int, teacher: str, guidance: GuidanceOptions) -> str | None:
    """The last snapshot of a finished round; None if it is not finished, and on all but the main process."""
    from torch_utils import distributed
    from training.checkpoint import load_network, network_digest

    if not distributed.is_main():
        return None
    # The snapshot of the last image, distilled from this very teacher.
    for path in saved_snapshots(folder):
        if load_network(path).metadata.get('nimg') != total_nimg:
            continue
        recorded = recorded_options(folder)
        then = tuple(recorded.get(name) for name in ('guidance', 'guidance_interval'))
        if then != (guidance.guidance, guidance.guidance_interval):
            raise UserError(
                f'{folder} was distilled from a teacher that was guided otherwise ({then}): '
                'resume with the options it was made with, or start anew.'
            )
        if recorded['teacher_digest'] != network_digest(load_network(teacher), {}):
            raise UserError(
                f'{folder} was distilled from another teacher than {teacher}: delete that folder and the '
                'ones of fewer steps, or start anew.'
            )
        return os.fspath(path)
    return None
