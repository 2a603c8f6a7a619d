"""Runs whose processes torchrun has started again (--max-restarts) resume by themselves; no others do.

If torchrun may do so, a run leaves `launch.json` in its folder, which names the torchruns that started it,
one per machine. A later attempt belongs to the same run if one of its own torchruns is among them.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
from pathlib import Path

from dnnlib import identity, schema
from dnnlib.text import printable
from dnnlib.util import write_json
from torch_utils import distributed, elastic
from training.command_line import Options
from training.config import RunConfig
from training.rounds import ANEW
from training.saved_files import LAUNCH, folder_of, folder_of_rounds, round_folders, saved_states

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
    """Record the launch of a run in its folder, which is locked. All processes call this together.

    Args:
        seed: of the run.
        resume: what it resumes from, as on the command line or later. States later than that are abandoned.
    Raises: UserError if the file cannot be written.
    """
    if not elastic.restarts()[1]:
        return
    launch = _launch()

    def write():
        earlier = _recorded(Path(folder))
        # A later attempt of the same launch keeps what the first one recorded.
        if earlier is None or not _same(earlier, launch):
            earlier = dict(seed=seed, resume=resume, passed_over=_beyond(resume))
        record = launch | {name: earlier[name] for name in ('seed', 'resume', 'passed_over')}
        write_json(os.path.join(folder, LAUNCH), record)

    distributed.from_main(write)


def go_on(o: Options) -> Options:
    """The options. If torchrun has started this process again, they resume the same run, or begin it again in
    its folder."""
    if not elastic.restarts()[1]:
        return o
    # Each torchrun counts the restarts of its own processes.
    restarted = max(distributed.gather_objects(elastic.restarts()[0]))
    if not restarted:
        return o
    launch = _launch()
    changes, line = distributed.from_main(lambda: _changes(o, launch))
    distributed.print0(
        printable(f'Started again by torchrun (restart {restarted}): {line}.'), file=sys.stderr
    )
    return o.but(**changes)


def _changes(o: Options, launch: dict) -> tuple[dict, str]:
    """(options that change, a line that says what the run does)."""
    # Find the folder of the earlier attempt.
    for folder in _candidates(o.run):
        if (record := _recorded(folder)) is not None and _same(record, launch):
            break
    else:
        return {}, 'no earlier attempt got as far as a run folder, so it starts as the options say'

    # Find its own states: not those that were abandoned when it resumed from an older one.
    # The earlier attempt may have begun to write validation's files.
    overwrite = dict(val_overwrite=True) if o.run.val else {}
    of_start = dict(overwrite, transfer=None, budget=None)
    given = record['resume']
    with_states = folder if given is None or os.path.isdir(given) else Path(given).parent
    states, passed_over = saved_states(with_states), dict(map(tuple, record['passed_over']))
    # Abandoned states are those that were passed over and have not been written since.
    own = [path for path in states if passed_over.get(path.name) != path.stat().st_mtime_ns]

    # Resume if there is one, or else begin again in the folder.
    if o.run.objective == 'pd' and not passed_over and round_folders(folder):
        return dict(of_start, resume=os.fspath(folder)), f'resuming the rounds in {folder}'
    # A folder lets resuming skip damaged states, but must then not hold abandoned ones.
    if own:
        resume = os.fspath(own[0] if len(own) < len(states) else with_states)
        return dict(of_start, resume=resume), f'resuming from {own[0]}'
    return (
        dict(overwrite, **ANEW, outdir=os.fspath(folder), nosubdir=True, seed=record['seed']),
        f'it had saved no state, so it begins again in {folder}',
    )


def _candidates(run: RunConfig) -> list[Path]:
    """The folders that the earlier attempt may have trained in."""
    if run.resume:
        folder = folder_of_rounds if run.objective == 'pd' else folder_of
        return [Path(folder(run.resume))]
    if run.nosubdir:
        return [Path(run.outdir)]
    # Newest first: the names begin with the number of the run.
    return sorted(
        (path.parent for path in Path(run.outdir).glob(f'*/{LAUNCH}') if re.match(r'\d+-', path.parent.name)),
        reverse=True,
    )


def _launch() -> dict:
    """What identifies a launch: torchrun's id of it, and all torchruns. Collective."""
    torchruns = distributed.gather_objects(elastic.torchrun())
    return dict(
        run_id=os.environ.get('TORCHELASTIC_RUN_ID'),
        torchruns=[torchrun for torchrun in torchruns if torchrun is not None],
    )


def _same(record: dict, launch: dict) -> bool:
    """Whether a record is of this launch."""
    # The id does not identify a launch: torchrun's default is the same for all.
    return record['run_id'] == launch['run_id'] and any(
        identity.same(a, b) for a in record['torchruns'] for b in launch['torchruns']
    )


def _beyond(resume: str | None) -> list[tuple[str, int]]:
    """Names and modification times of the states that are newer than `resume`, if that is a state."""
    if resume is None or os.path.isdir(resume):
        return []
    newer = itertools.takewhile(
        lambda path: path.name != Path(resume).name, saved_states(Path(resume).parent)
    )
    return [(path.name, path.stat().st_mtime_ns) for path in newer]


def _recorded(folder: Path) -> dict | None:
    """A folder's record; None if it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError):
        return schema.read_json(folder / LAUNCH, RECORD, LAUNCH)
    return None
