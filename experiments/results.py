"""What a comparison writes down: its plan in plan.json and its rows in results.json, both complete at any
time."""

from __future__ import annotations

import json
import re
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

from dnnlib import UserError, schema
from dnnlib.util import write_json
from experiments.comparison import Training
from experiments.runner import ROOT
from training.objectives import OBJECTIVES

NAME = re.compile(r'[\w.+-]{1,100}', re.ASCII)  # of a solver, and of a model, which names a file as well
DAMAGED = '{} is damaged: delete it, or choose another --outdir.'


class Results:
    """Rows measured under all `metrics`, each saved as soon as it is known."""

    def __init__(self, path: Path, metrics: Sequence[str]):
        self.path, self.lock = path, threading.Lock()
        found = read_json(path, [])
        if not all(is_row(row, metrics) for row in found):
            raise UserError(DAMAGED.format(path))
        self.rows: dict[str, dict] = {row['model']: row for row in found}

    def add(self, row: dict) -> None:
        # Jobs run in several threads.
        with self.lock:
            self.rows[row['model']] = row
            write_json(self.path, list(self.rows.values()))


def commit() -> str | None:
    """The commit of this repository, `-dirty` with changes but to documents; None where it is no checkout of git."""
    git = lambda *words: subprocess.run(['git', '-C', str(ROOT), *words], capture_output=True, text=True)
    try:
        found, changes = (
            git('rev-parse', '--short=12', 'HEAD'),
            git('diff', '--quiet', 'HEAD', '--', ':!docs'),
        )
    except OSError:
        return None
    return None if found.returncode else found.stdout.strip() + '-dirty' * (changes.returncode == 1)


def distance_entries(metrics: Sequence[str]) -> dict[str, str]:
    """{metric: key of its distance in a row}"""
    return {metric: f'distance_{metric}' if i else 'distance' for i, metric in enumerate(metrics)}


def is_row(row: object, metrics: Sequence[str]) -> bool:
    """Whether a row has the entries that tables read; a teacher's has `seed` null and no training entries."""
    if not isinstance(row, dict) or row.get('objective') not in list(OBJECTIVES) or 'seed' not in row:
        return False
    # Damaged rows are found here, not in the middle of a report.
    of_training = [] if row['seed'] is None else ['seed', 'train_steps', 'cost', 'evaluations']
    distances = list(distance_entries(metrics).values())
    return (
        all(isinstance(row.get(name), str) and NAME.fullmatch(row[name]) for name in ('model', 'solver'))
        and all(
            isinstance(row.get(name), (int, float)) for name in ['nfe', 'images', *of_training, *distances]
        )
        and all(row[name] > 0 for name in distances)  # their logarithms are plotted
        # Rows of older versions have no paired error, and images of some samplers have none.
        and isinstance(row.get('paired_error'), (int, float, type(None)))
    )


def read_json(path: Path, default: list | dict) -> list | dict:
    """Contents of plan.json or results.json; `default` where there is no such file.

    Raises: UserError unless the contents have the type, the keys, and the types of values of the default.
    """
    if not path.exists():
        return default
    try:
        value = schema.read_json(path, schema.Plain(), 'a record of results')
    except (OSError, ValueError) as error:
        raise UserError(DAMAGED.format(path)) from error
    types = lambda of: {name: type(entry) for name, entry in of.items()} if isinstance(of, dict) else type(of)
    if types(value) != types(default):
        raise UserError(DAMAGED.format(path))
    return value


def record_plan(outdir: Path, settings: dict, trainings: Sequence[Training]) -> None:
    """Write plan.json, or check that the folder holds the same comparison, to which trainings may be added.

    Raises: UserError if the settings differ, or a training of the same name has other options.
    """
    path, now = outdir / 'plan.json', {training.name: list(training.options) for training in trainings}
    earlier = read_json(path, dict(settings=settings, trainings={}))

    # Settings apply to every row, so none may differ.
    for name, value in settings.items():
        if earlier['settings'].get(name) != value:
            raise UserError(
                f'--outdir={outdir} holds a comparison with {name} = '
                f'{json.dumps(earlier["settings"].get(name))}, now it is {json.dumps(value)}: use its '
                'options, or choose another folder.'
            )

    # A folder's name does not show all options: a training may only be resumed with its own.
    for name, options in now.items():
        then = earlier['trainings'].get(name, options)
        if then != options:
            change = ' '.join(option for option in then if option not in options) or 'none of ' + ' '.join(
                set(options) - set(then)
            )
            raise UserError(
                f'--outdir={outdir} holds {name} trained with {change}, and these options would make another '
                'network of it: use its options, or choose another folder.'
            )
    write_json(path, dict(settings=settings, trainings={**earlier['trainings'], **now}))
