"""Measure what docs/results.md gives of all objectives, and record it in docs/measured/: comparisons by compare.py, one
after another.

Each command resumes, and what is recorded replaces the record before. `python -m docs.generate_results` then writes
the page.
"""

from __future__ import annotations

import dnnlib.interrupts  # noqa: F401  (first)

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from data.label_space import ranges
from dnnlib import UserError, cli
from experiments.comparison import STUDENTS
from experiments.options import JOBS, NamesOrAll
from experiments.results import read_json, write_json
from experiments.runner import ROOT, Runner, is_finished, newest_snapshot, run_interruptibly

MEASURED = ROOT / 'docs' / 'measured'
# Of all students the four best with 10,000 evaluations, by their ratios over all numbers of steps; and mcd, the published
# system's.
LONGER = ('mcd', 'mct', 'direct', 'flowmap', 'ect')


@dataclass(frozen=True)
class Comparison:
    """A call of compare.py.

    Attributes:
        objectives, seeds, budget, data: options of compare.py.
        teacher_of: the comparison whose teacher it uses; None: it trains one.
    """

    objectives: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    budget: int = 10_000
    data: str = 'digits'
    teacher_of: str | None = None

    @property
    def options(self) -> list[str]:
        """The options of compare.py without folders."""
        return [
            f'--data={self.data}',
            f'--objectives={",".join(self.objectives)}',
            f'--seeds={ranges(self.seeds)}',
            f'--budget={self.budget}',
        ]


COMPARISONS = {
    'digits': Comparison(tuple(STUDENTS), seeds=(0, 1, 2)),
    'digits-40000': Comparison(LONGER, budget=40_000, teacher_of='digits'),
    'photos': Comparison(LONGER, data='photos'),
}


@click.command(cls=cli.Command)
@cli.option(
    '--outdir',
    metavar='DIR',
    type=cli.PATH,
    default='evidence-out',
    show_default=True,
    help='Output folder, with one folder for each comparison.',
)
@cli.option(
    '--only',
    metavar='LIST',
    type=NamesOrAll(COMPARISONS),
    default='all',
    show_default=True,
    help=f'Comparisons to run: {", ".join(COMPARISONS)}, or all.',
)
@cli.option('--record', is_flag=True, help='Run nothing; record the rows that there are.')
@JOBS
def main(outdir, only, record, jobs):
    """Measure what docs/results.md says of all objectives; hours.

    \b
    Example:
      python -m experiments.evidence --only=digits
      python -m docs.generate_results
    """
    runner = Runner(Path(outdir), threads=os.cpu_count() or 1)

    def work() -> None:
        for name in only:
            if not record:
                runner.run(name, *command(name, Path(outdir), jobs))
            write_json(MEASURED / f'{name}.json', recorded(name, Path(outdir, name)))
            print(f'Recorded {MEASURED / name}.json.')

    run_interruptibly(runner, work, 'run the same command again to resume.')


def command(name: str, outdir: Path, jobs: int) -> list[str]:
    """The command line of a comparison."""
    comparison = COMPARISONS[name]
    teacher = []
    if comparison.teacher_of:
        folder = outdir / comparison.teacher_of / 'trainings' / 'teacher'
        if not is_finished(folder):
            raise UserError(
                f'{name} needs the teacher of {comparison.teacher_of}: run --only={comparison.teacher_of} first.'
            )
        teacher = [f'--teacher={newest_snapshot(folder)}']
    return ['compare.py', f'--outdir={outdir / name}', *teacher, f'--jobs={jobs}', *comparison.options]


def recorded(name: str, folder: Path) -> dict:
    """The record of a comparison: its command without folders, settings, and rows, each with its commit."""
    if not (folder / 'results.json').exists():
        raise UserError(f'{folder} holds no results.json: leave --record out.')
    plan = read_json(folder / 'plan.json', dict(settings={}, trainings={}))
    return dict(
        command=f'python -m experiments.evidence --only={name}',
        objectives=list(COMPARISONS[name].objectives),
        seeds=list(COMPARISONS[name].seeds),
        settings={key: value for key, value in plan['settings'].items() if key not in ('teacher', 'rulers')},
        trainings=plan['trainings'],
        rows=in_order(read_json(folder / 'results.json', [])),
    )


def in_order(rows: Sequence[dict]) -> list[dict]:
    """Rows in an order that does not depend on which was measured first: the teacher's, then by objective and seed."""
    key = lambda row: (row['seed'] is not None, row['objective'], row['seed'] or 0, row['nfe'], row['model'])
    return sorted(rows, key=key)


if __name__ == '__main__':
    main()
