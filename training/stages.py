"""Progressive distillation in rounds. Each is a run in its own folder, `S0512`, `S0256`, ..., with its own
states, snapshots and logs; its teacher is the last snapshot of the round before."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from dnnlib import UserError
from dnnlib.schema import read_json
from dnnlib.text import printable
from training.command_line import Options
from training.objectives import time_schedules as times

# Options of a run that resumes nothing.
ANEW = dict(resume=None, resume_override=False, allow_other_data=False)


def stages(o: Options, run_dir: str) -> Iterator[Options]:
    """The options of each stage when its turn comes: a new one's, or those to resume one that was
    interrupted. One that is finished is resumed too, where it left states, so that its options are compared
    with these; there is nothing to do for it.

    Args:
        o: options of train.py; `batch` and `seed` are known.
        run_dir: folder of the stages' folders.
    Raises: UserError where a stage does not follow from the one before it.
    """
    from torch_utils import distributed
    from training import configuration, same_run
    from training.run_files import saved_states

    teacher, plan = o.teacher, times.halving_stages(o.own.S_start, o.own.S, o.own.stage_steps)
    data = None
    for folder in stage_folders(run_dir):
        if (recorded := recorded_options(folder)['stages']) != [[S, steps] for S, steps in plan]:
            raise UserError(
                f'{run_dir} holds a progressive distillation in the stages {json.dumps(recorded)} (sampling '
                f'steps, optimizer steps), these options say {json.dumps(plan)}: resume with the --S_start, '
                '--S and --stage_steps it was made with.'
            )
    for S, steps in plan:
        folder, total = os.path.join(run_dir, f'S{S:04d}'), steps * o.run.batch
        snapshot, there = distributed.broadcast_object(
            (_finished(folder, total, teacher), bool(saved_states(folder)))
        )
        if snapshot is None or there:
            resume = o.run.resume if o.run.resume and Path(o.run.resume).parent == Path(folder) else folder
            stage = o.but(
                S=S,
                S_start=S,
                teacher=teacher,
                duration=total / 1e6,
                outdir=folder,
                nosubdir=True,
                **(dict(resume=resume) if there else ANEW),
            )
            yield dataclasses.replace(stage, stages=tuple(plan))
            snapshot = distributed.broadcast_object(_finished(folder, total, teacher))
        else:  # its options are in its folder only
            data = data or same_run.data_record(o, configuration.open_dataset(o.run))
            if about_data := same_run.check_same_data(o, data, recorded_options(folder)['dataset'], folder):
                distributed.print0(printable(about_data), file=sys.stderr)
        if snapshot is None:
            raise UserError(
                f'{folder} has no snapshot of {total} images, from which the next stage would start: resume '
                'with the --batch it was made with, or delete that folder and the ones of fewer steps.'
            )
        teacher = snapshot


def run_folder(resume: str) -> str:
    """The folder of a progressive distillation's stages from what --resume names: itself, a stage's folder,
    or a state in one."""
    path = Path(resume)
    stage = path.parent if path.suffix == '.pt' else path
    return os.fspath(stage.parent if re.fullmatch(r'S\d{4,}', stage.name) else stage)


def stage_folders(run_dir: str) -> list[Path]:
    """The folders of the stages that have begun, the first one first."""
    return sorted(
        (path for path in Path(run_dir).glob('S*') if re.fullmatch(r'S\d{4,}', path.name)), reverse=True
    )


def recorded_options(folder: str | os.PathLike) -> dict:
    """The training_options.json of a stage. Raises: UserError where it is missing or damaged."""
    from training import recorded

    path = Path(folder, 'training_options.json')
    try:
        return read_json(path, recorded.STAGE, 'the configuration')
    except (OSError, ValueError) as error:
        reason = '' if isinstance(error, FileNotFoundError) else f' (it {error})'
        raise UserError(
            f'{path} is missing or damaged{reason}: delete that folder and the ones of fewer steps, and '
            'resume.'
        ) from error


def _finished(folder: str, total_nimg: int, teacher: str) -> str | None:
    """The snapshot with which a stage ended; None where it has not, or on processes other than the main
    one."""
    from torch_utils import distributed
    from training.checkpoint import load_network, network_digest
    from training.run_files import saved_snapshots

    if not distributed.is_main():
        return None
    for path in saved_snapshots(folder):
        if load_network(path).metadata.get('nimg') != total_nimg:
            continue
        if recorded_options(folder)['teacher_digest'] != network_digest(load_network(teacher), {}):
            raise UserError(
                f'{folder} was distilled from another teacher than {teacher}: delete that folder and the '
                'ones of fewer steps, or start anew.'
            )
        return os.fspath(path)
    return None
