"""Runs whose processes torchrun has started again (--max-restarts): they go on from where the earlier attempt
came to, and no others by themselves.

Where torchrun may do so, a run leaves `launch.json` in its folder: which torchruns, one for each machine, it
was started by. An attempt is of the same run where one of its own is among them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import sys
from pathlib import Path

from dnnlib import identity, schema
from dnnlib.text import printable
from dnnlib.util import atomic_write
from torch_utils import distributed, elastic
from training import run_lock, stages
from training.command_line import Options
from training.config import RunConfig
from training.saved_files import LAUNCH, saved_states

RECORD = schema.Record(
    dict(
        run_id=schema.Maybe(schema.Text()),
        torchruns=schema.ListOf(identity.KIND),
        seed=schema.Integer(),
        resume=schema.Maybe(schema.Text()),
        passed_over=schema.ListOf(schema.Row((schema.Text(), schema.Integer()))),
    ),
    required=['run_id', 'torchruns', 'seed', 'resume', 'passed_over'],
)


def remember(folder: str, seed: int, resume: str | None) -> None:
    """Record in the folder of a run, which this process has locked, which launch it is of. All processes call
    it together.

    Args:
        seed: of the run.
        resume: what it goes on from, as on the command line or later. States beyond are of a course that is
            given up.
    Raises: UserError where the file cannot be written.
    """
    if not elastic.restarts()[1]:
        return
    launch = _launch()

    def write():
        earlier = _recorded(Path(folder))
        record = launch | (
            dict(seed=seed, resume=resume, passed_over=_beyond(resume))
            if earlier is None or not _same(earlier, launch)
            else {name: earlier[name] for name in ('seed', 'resume', 'passed_over')}
        )
        with atomic_write(os.path.join(folder, LAUNCH)) as file:
            file.write(json.dumps(record, indent=2).encode())

    distributed.from_main(write)


def go_on(o: Options) -> Options:
    """The options; where torchrun has started this process again, those that resume the same run, or begin it
    again in its folder."""
    if not elastic.restarts()[1]:
        return o
    restarted = max(
        distributed.gather_objects(elastic.restarts()[0])
    )  # each torchrun counts those of its own processes
    if not restarted:
        return o
    launch = _launch()
    changes, line = distributed.from_main(lambda: _changes(o, launch))
    distributed.print0(
        printable(f'Started again by torchrun (restart {restarted}): {line}.'), file=sys.stderr
    )
    return o.but(**changes)


def _changes(o: Options, launch: dict) -> tuple[dict, str]:
    """(options that change, what the run does)."""
    for folder in _candidates(o.run):
        if (record := _recorded(folder)) is not None and _same(record, launch):
            break
    else:
        return {}, 'no earlier attempt has got as far as a run folder, so it starts as the options say'
    overwrite = dict(val_overwrite=True) if o.run.val else {}
    given = record['resume']
    with_states = folder if given is None or os.path.isdir(given) else Path(given).parent
    states, passed_over = saved_states(with_states), dict(map(tuple, record['passed_over']))
    own = [path for path in states if passed_over.get(path.name) != path.stat().st_mtime_ns]
    if o.run.objective == 'pd' and not passed_over and stages.stage_folders(folder):
        return dict(overwrite, resume=os.fspath(folder)), f'resuming the stages in {folder}'
    if own:  # a folder's damaged ones are passed over, but so may be those that are not given up
        resume = os.fspath(own[0] if len(own) < len(states) else with_states)
        return dict(overwrite, resume=resume), f'resuming from {own[0]}'
    return (
        dict(overwrite, **stages.ANEW, outdir=os.fspath(folder), nosubdir=True, seed=record['seed']),
        f'it had saved no state, so it begins again in {folder}',
    )


def _candidates(run: RunConfig) -> list[Path]:
    """The folders that the earlier attempt may have trained in."""
    if run.resume:
        return [
            Path(stages.run_folder(run.resume) if run.objective == 'pd' else run_lock.folder_of(run.resume))
        ]
    if run.nosubdir:
        return [Path(run.outdir)]
    return sorted(
        (path.parent for path in Path(run.outdir).glob(f'*/{LAUNCH}') if re.match(r'\d+-', path.parent.name)),
        reverse=True,
    )


def _launch() -> dict:
    """What tells one launch from others: torchrun's id of it, and all the torchruns. Collective."""
    torchruns = distributed.gather_objects(elastic.torchrun())
    return dict(
        run_id=os.environ.get('TORCHELASTIC_RUN_ID'),
        torchruns=[torchrun for torchrun in torchruns if torchrun is not None],
    )


def _same(record: dict, launch: dict) -> bool:
    return record['run_id'] == launch['run_id'] and any(
        identity.same(a, b) for a in record['torchruns'] for b in launch['torchruns']
    )


def _beyond(resume: str | None) -> list[tuple[str, int]]:
    """The states beside `resume`, where it is one, that are newer: their names and modification times."""
    if resume is None or os.path.isdir(resume):
        return []
    newer = itertools.takewhile(
        lambda path: path.name != Path(resume).name, saved_states(Path(resume).parent)
    )
    return [(path.name, path.stat().st_mtime_ns) for path in newer]


def _recorded(folder: Path) -> dict | None:
    """A folder's record; None where there is none, or it is damaged."""
    with contextlib.suppress(OSError, ValueError):
        return schema.read_json(folder / LAUNCH, RECORD, LAUNCH)
    return None
