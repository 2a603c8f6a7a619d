"""Measure what docs/results.md gives of all objectives, and record it in docs/measured/: comparisons by compare.py, one
after another.

Each command resumes. Rows of the record before stay where nothing new replaces them, so that a long comparison can be
measured in parts, by `--some`; their settings, trainings and teacher have to be the same. `python -m docs.generate_results`
then writes the page.
"""

from __future__ import annotations

import dnnlib.interrupts  # noqa: F401  (first)

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from dnnlib import UserError, cli
from dnnlib.text import as_ranges
from dnnlib.util import write_json
from experiments.comparison import STUDENTS
from experiments.options import JOBS, NamesOrAll
from experiments.results import read_json
from experiments.runner import ROOT, Runner, is_finished, newest_snapshot, run_interruptibly

MEASURED = ROOT / 'docs' / 'measured'
# Of all students the four best with 10,000 evaluations, by their ratios over all numbers of steps; and mcd, the published
# system's.
LONGER = ('mcd', 'mct', 'direct', 'flowmap', 'ect')

# Options of compare.py that choose rows of a comparison.
PARTS = ('objectives', 'steps', 'seeds', 'bootstrap')


@dataclass(frozen=True)
class Comparison:
    """A call of compare.py.

    Attributes:
        objectives, seeds, budget, data, steps: options of compare.py.
        teacher_of: the comparison whose teacher it uses; None: it trains one.
        further, train: further options of compare.py, and of all trainings.
    """

    objectives: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    budget: int = 10_000
    data: str = 'digits'
    steps: tuple[int, ...] = (1, 2, 4, 8)
    teacher_of: str | None = None
    further: tuple[str, ...] = ()
    train: tuple[str, ...] = ()

    @property
    def options(self) -> list[str]:
        """The options of compare.py without folders."""
        return [
            f'--data={self.data}',
            f'--objectives={",".join(self.objectives)}',
            f'--seeds={as_ranges(self.seeds)}',
            f'--budget={self.budget}',
            f'--steps={",".join(map(str, self.steps))}',
            *self.further,
        ]


COMPARISONS = {
    'digits': Comparison(tuple(STUDENTS), seeds=(0, 1, 2)),
    'digits-40000': Comparison(LONGER, budget=40_000, teacher_of='digits'),
    # A thirteenth of the digits' evaluations, in batches of a fourth, each of which takes some five times as long. The warm-up
    # is shorter, because the shortest trainings see 3,500 images.
    'photos': Comparison(
        tuple(STUDENTS),
        seeds=(0, 1, 2),
        budget=3_000,
        data='photos',
        steps=(1, 4),
        further=('--batch=32', '--reference-steps=64'),
        train=('--lr_rampup=1',),
    ),
}


@click.command(cls=cli.Command)
@cli.option(
    '--outdir',
    metavar='DIR',
    type=cli.PATH,
    default='evidence-out',
    help='Output folder, with one folder for each comparison.',
)
@cli.option(
    '--only',
    type=NamesOrAll(COMPARISONS),
    default='all',
    help=f'Comparisons to run: {", ".join(COMPARISONS)}, or all.',
)
@cli.option(
    '--some',
    metavar='STR',
    default='',
    help='Options of compare.py that measure a part, as in "--steps=4,8 --seeds=0".',
)
@cli.option('--record', is_flag=True, help='Run nothing; record the rows that there are.')
@JOBS
def main(outdir, only, some, record, jobs):
    """Measure what docs/results.md says of all objectives; hours.

    \b
    Example:
      python -m experiments.evidence --only=digits
      python -m docs.generate_results
    """
    runner = Runner(Path(outdir), threads=os.cpu_count() or 1)
    try:
        part = shlex.split(some)
    except ValueError as error:
        raise click.UsageError(f'--some={some}: {error}.') from error
    # Rows of other settings could not be recorded, which would be found after hours.
    if fixed := [word for word in part if word.lstrip('-').partition('=')[0].replace('_', '-') not in PARTS]:
        raise click.UsageError(
            f'--some={some}: {fixed[0]} would be another comparison; choose among --{", --".join(PARTS)}, '
            'each with = and its value.'
        )

    # One comparison after another: measure, and put its rows into the record.
    def work() -> None:
        for name in only:
            if not record:
                runner.run(name, *command(name, Path(outdir), jobs, part))
            found, path = recorded(name, Path(outdir, name)), MEASURED / f'{name}.json'
            count = len(found['rows'])
            if path.exists():
                found = with_rows_before(found, json.loads(path.read_text()), path)
            write_json(path, found)
            print(
                f'Recorded in {path}: {count} rows measured, {len(found["rows"]) - count} of the record '
                'before.'
            )

    run_interruptibly(runner, work, 'run the same command again to resume.')


def command(name: str, outdir: Path, jobs: int, part: Sequence[str] = ()) -> list[str]:
    """The command line of a comparison, or with further options of a part of it."""
    comparison = COMPARISONS[name]
    teacher = []
    if comparison.teacher_of:
        folder = teacher_folder(name, outdir)
        if not is_finished(folder):
            raise UserError(
                f'{name} needs the teacher of {comparison.teacher_of}: run --only={comparison.teacher_of} '
                'first.'
            )
        teacher = [f'--teacher={newest_snapshot(folder)}']
    options = [f'--outdir={outdir / name}', *teacher, f'--jobs={jobs}', *comparison.options, *part]
    return ['compare.py', *options, *(['--', *comparison.train] if comparison.train else [])]


def teacher_folder(name: str, outdir: Path) -> Path:
    """Where the teacher of a comparison was trained."""
    return outdir / (COMPARISONS[name].teacher_of or name) / 'trainings' / 'teacher'


def recorded(name: str, folder: Path) -> dict:
    """The record of a comparison: its command without folders, settings, and rows, each with its commit."""
    from training.checkpoint import load_network
    from training.snapshot_metadata import network_digest

    if not (folder / 'results.json').exists():
        raise UserError(f'{folder} holds no results.json: leave --record out.')
    plan = read_json(folder / 'plan.json', dict(settings={}, trainings={}))
    # Of its weights: the metadata of a snapshot name folders.
    teacher = network_digest(load_network(newest_snapshot(teacher_folder(name, folder.parent))), {})
    return dict(
        command=f'python -m experiments.evidence --only={name}',
        teacher=teacher,
        objectives=list(COMPARISONS[name].objectives),
        seeds=list(COMPARISONS[name].seeds),
        steps=list(COMPARISONS[name].steps),
        settings={key: value for key, value in plan['settings'].items() if key not in ('teacher', 'rulers')},
        trainings=plan['trainings'],
        rows=in_order(read_json(folder / 'results.json', [])),
    )


def with_rows_before(record: dict, before: dict, path: Path) -> dict:
    """A record with the rows of an earlier one, of the file `path`, that it does not replace.

    Raises: UserError if they do not compare: of other settings, of other options of the same training, or of another teacher.
    """
    measured = {row['model'] for row in record['rows']}
    rows = [row for row in before['rows'] if row['model'] not in measured]
    if not rows:
        return record
    others = before['trainings']
    alike = all(before.get(key) == record[key] for key in ('settings', 'teacher')) and all(
        others[name] == options for name, options in record['trainings'].items() if name in others
    )
    if not alike:
        raise UserError(
            f'{path} holds {len(rows)} rows of other settings, other trainings or another teacher, which '
            'do not compare with those measured: move it away, and record again with --record.'
        )
    return record | dict(rows=in_order([*record['rows'], *rows]), trainings=others | record['trainings'])


def in_order(rows: Sequence[dict]) -> list[dict]:
    """Rows in an order that does not depend on which was measured first: the teacher's, then by objective and seed."""
    key = lambda row: (row['seed'] is not None, row['objective'], row['seed'] or 0, row['nfe'], row['model'])
    return sorted(rows, key=key)


if __name__ == '__main__':
    main()
