"""Names of a run's files, and advice for users who give another file or folder in place of one. Imports no
torch."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import click

from data.file_names import RUN_RECORD
from dnnlib import UserError, cli
from dnnlib.file_kind import another_kind
from dnnlib.text import printable

LOG, STATS, METRICS = 'log.txt', 'stats.jsonl', 'metrics-val.jsonl'
OPTIONS = RUN_RECORD
PREEMPTED = 'preempted.json'  # left by a run that a signal stopped, for the script that starts it again
LAUNCH = 'launch.json'  # left where torchrun may start the processes again, see `restart`
OWN_FILES = (LOG, STATS, METRICS, OPTIONS, PREEMPTED, LAUNCH)
LISTED = 10  # run folders in a message
SNAPSHOT, STATE = 'a network snapshot (network-snapshot-*.pkl)', 'a training state (training-state-*.pt)'


def saved_states(folder: str | os.PathLike) -> list[Path]:
    """The training states in a folder, newest first."""
    return _saved(folder, 'training-state', 'pt')


def saved_snapshots(folder: str | os.PathLike) -> list[Path]:
    """The snapshots in a folder, newest first, without those of power-function averages (width in the
    name)."""
    return _saved(folder, 'network-snapshot', 'pkl')


def _saved(folder: str | os.PathLike, kind: str, suffix: str) -> list[Path]:
    """The files `<kind>-<kimg>[-<nimg>].<suffix>` by the images in their names, most first."""
    found = []
    for path in Path(folder).glob(f'{kind}-*.{suffix}'):
        if match := re.fullmatch(rf'{kind}-(\d+)(?:-(\d+))?\.{suffix}', path.name):
            found.append((int(match[1]), int(match[2] or 0), path))
    return [path for *_, path in sorted(found, reverse=True)]


# ----------------------------------------------------------------------------
# Folders of runs.


def round_folders(run_dir: str | os.PathLike) -> list[Path]:
    """The folders of the rounds of a progressive distillation that have begun, in order."""
    return sorted(
        (path for path in Path(run_dir).glob('S*') if re.fullmatch(r'S\d{4,}', path.name)), reverse=True
    )


def folder_of(resume: str) -> str:
    """The folder of the run that --resume names, by a state or the folder itself."""
    return resume if os.path.isdir(resume) else os.path.dirname(os.path.abspath(resume))


def folder_of_rounds(path: str | os.PathLike) -> str:
    """The folder of the progressive distillation that a path names: by itself, a round, or a state."""
    path = Path(path)
    folder = path.parent if path.suffix == '.pt' else path
    return os.fspath(folder.parent if re.fullmatch(r'S\d{4,}', folder.name) else folder)


def run_folders(folder: str | os.PathLike) -> list[Path]:
    """The folders of runs in a folder, newest first by the time of what they last saved."""
    found = []
    for run in (path for path in Path(folder).iterdir() if path.is_dir()):
        own = [run, *round_folders(run)]
        files = [
            file for part in own for file in (part / OPTIONS, *saved_states(part), *saved_snapshots(part))
        ]
        if times := [file.stat().st_mtime_ns for file in files if file.is_file()]:
            found.append((max(times), run))
    return [run for _, run in sorted(found, reverse=True)]


def which_run(folder: str | os.PathLike, option: str = '') -> str | None:
    """That a folder is one of run folders and which ones, to complete 'it ...'; None if it is not."""
    runs = run_folders(folder)
    if not runs or round_folders(folder):
        return None
    listed = ', '.join(map(str, runs[:LISTED])) + (f' and {len(runs) - LISTED} more' * (len(runs) > LISTED))
    return (
        f'is a folder of run folders. Name one of them, such as {option}{runs[0]} (newest first: {listed}).'
    )


def no_state(folder: str | os.PathLike) -> str:
    """Why a folder has no training state to resume from, and the cure."""
    if runs := which_run(folder, '--resume='):
        return f'it {runs}'
    found = 'none of its states is whole' if saved_states(folder) else 'it holds no training-state-*.pt'
    return (
        f'{found}. Give a training state or the folder of a run that saved one (or that of all rounds of '
        'progressive distillation), or start anew without --resume, in another folder.'
    )


def newest_snapshot(folder: str | os.PathLike, option: str = '') -> Path:
    """The snapshot in a run folder that has seen most images; of progressive distillation, of its last round.

    Raises: UserError, whose message completes 'it ...', if there is none.
    """
    if newest := _newest_snapshot(folder):
        return newest
    raise UserError(_why_no_folder(folder, option))


def _newest_snapshot(folder: str | os.PathLike) -> Path | None:
    for part in (Path(folder), *reversed(round_folders(folder))):
        if found := saved_snapshots(part):
            return found[0]
    return None


class Snapshot(cli.PathOrURL):
    """A snapshot's path or URL, or a run folder, which stands for its newest snapshot and is said."""

    name = 'pkl|dir|url'

    def convert(self, value, param, ctx):
        path = super().convert(value, param, ctx)
        if not os.path.isdir(path):
            return path
        flag = f'{param.opts[-1]}=' if param is not None and param.opts else ''
        try:
            newest = os.fspath(newest_snapshot(path, flag))
        except (UserError, OSError) as error:
            raise UserError(f'{flag}{path} cannot be used as a network snapshot: it {error}') from error
        # Each process of a run reads the same options.
        if os.environ.get('RANK', '0') == '0':
            click.echo(f'{flag}{printable(path)}: its newest snapshot is {printable(newest)}.', err=True)
        return newest


NETWORK_FILE = Snapshot()


# ----------------------------------------------------------------------------
# Files of another kind.


def check_own_files(folder: str | os.PathLike) -> None:
    """Raises: UserError if a run would write through a link, or anything but a regular file."""
    for path in (Path(folder, name) for name in OWN_FILES):
        if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
            kind = 'a link' if path.is_symlink() else 'a folder' if path.is_dir() else 'no regular file'
            raise UserError(f'{path} is {kind}, in place of a file that the run writes: move it away')


def why_no_snapshot(path: str | os.PathLike) -> str | None:
    """What a file or folder is and what to give instead, to complete 'it ...'; None for a pickle, or if
    unknown."""
    if os.path.isdir(path):
        return _why_no_folder(path)
    beside = saved_snapshots(Path(path).parent)
    # Prefer the snapshot of the same moment as a training state.
    moment = Path(path).stem.removeprefix('training-state')
    same = [snapshot for snapshot in beside if snapshot.stem.removeprefix('network-snapshot') == moment]
    snapshot = (same or beside or [None])[0]

    return another_kind(
        path,
        SNAPSHOT,
        own=('a network snapshot', 'a pickle'),
        instead={
            'a training state': 'It is for train.py --resume; for sampling and as a teacher give '
            f'{snapshot or f"{SNAPSHOT} of the same run"}.',
            'a PyTorch file': "OpenAI's consistency models become snapshots by convert.py --from=openai "
            f'{path} NAME.pkl. Other weights by name (state dicts) do not say which network they are of: '
            'give the snapshot that they were taken from.',
            'a safetensors file': 'What convert.py wrote becomes a snapshot again by convert.py '
            f'--from=safetensors {path} NAME.pkl.',
        },
    )


def _why_no_folder(folder: str | os.PathLike, option: str = '') -> str:
    # A run folder, which the command line takes and the library does not.
    if newest := _newest_snapshot(folder):
        return f'is the folder of a run. Give a file in it, such as {newest}.'
    if runs := which_run(folder, option):
        return runs
    if widths := sorted(Path(folder).glob('network-snapshot-*-*.*.pkl'), reverse=True):
        return f'holds power-function averages only. Give the file of one of them, such as {widths[0]}.'
    if any(Path(folder, name).is_file() for name in ('model_index.json', 'config.json')):
        return (
            'is a folder of diffusers or transformers. convert.py writes such folders and does not read '
            'them: give the snapshot.'
        )
    states = ' It holds training states only: resume by train.py --resume.' * bool(saved_states(folder))
    return f'is a folder, and holds no network-snapshot-*.pkl. Check the path.{states}'


def why_no_state(path: str | os.PathLike, sealed: bool) -> str | None:
    """What a file is and what to give instead, to complete 'it ...'; None for a training state of ours,
    complete or damaged. `sealed`: the file ends in a checksum, as ours do."""
    # Training can continue from a state nearby, or start anew from weights.
    beside = saved_states(Path(path).parent)
    resume = f'resume from {beside[0]}, or ' if beside else ''
    weights = (
        f'It has only weights, without the state of the optimizer: {resume}start anew from them by '
        f'--transfer={path}.'
    )
    return another_kind(
        path,
        STATE,
        own=('a training state of train.py', 'a damaged', *(['a PyTorch file'] if sealed else [])),
        instead={
            'a network snapshot': weights,
            'a training state of EDM': f'Its optimizer is not ours: {resume}start anew from the '
            'network-snapshot-*.pkl beside it by --transfer.',
            'a PyTorch file': f'Give {STATE} that train.py wrote.',
        },
    )
