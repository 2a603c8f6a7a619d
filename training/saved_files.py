"""Names of a run's files, and advice for users who give another file or folder in place of one. Imports no
torch."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from dnnlib import UserError
from dnnlib.file_kind import another_kind

LOG, STATS, METRICS = 'log.txt', 'stats.jsonl', 'metrics-val.jsonl'
OPTIONS = 'training_options.json'
PREEMPTED = 'preempted.json'  # left by a run that a signal stopped, for the script that starts it again
LAUNCH = 'launch.json'  # left where torchrun may start the processes again, see `restart`
OWN_FILES = (LOG, STATS, METRICS, OPTIONS, PREEMPTED, LAUNCH)
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


def _why_no_folder(folder: str | os.PathLike) -> str:
    # The folder of a run, or of runs.
    runs = [Path(folder), *sorted((path for path in Path(folder).iterdir() if path.is_dir()), reverse=True)]
    newest = next((found[0] for run in runs if (found := saved_snapshots(run))), None)
    if newest is not None:
        return f'is the folder of a run. Give a file in it, such as {newest}.'
    if any(Path(folder, name).is_file() for name in ('model_index.json', 'config.json')):
        return (
            'is a folder of diffusers or transformers. convert.py writes such folders and does not read '
            'them: give the snapshot.'
        )
    return 'is a folder, and holds no network-snapshot-*.pkl. Check the path.'


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
