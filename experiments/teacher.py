"""The teacher without training, in few evaluations: its solvers, with their own noise levels and with searched
ones, as rows of a table beside the students."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.runner import Runner

COUNTS = (1, 2, 4, 5, 8)  # evaluations for which solvers are compared in the literature, and 1
# Of all solvers in docs/results.md, those that are best on the digits: one with its own levels in 2 and 4
# evaluations, one in 5 and 8; with searched levels one in 2, one in 4, 5 and 8.
FAST = ('deis', 'dpmpp')
SEARCHED = ('ipndm', 'unipc')
SEARCH_IMAGES = 128


@dataclass(frozen=True)
class TeacherSampling:
    """How the teacher is sampled.

    Attributes:
        solver, steps: sampling options.
        nfe: network evaluations per image.
        searched: whether the noise levels are searched, not the solver's own.
    """

    solver: str
    steps: int
    nfe: int
    searched: bool = False

    @property
    def name(self) -> str:
        """Name in tables and of files."""
        return f'teacher-{self.solver}{"-searched" * self.searched}-{self.nfe}'


def few_evaluations(counts: Iterable[int]) -> list[TeacherSampling]:
    """Euler's method, the fast solvers, and searched levels, for each number of evaluations. With one, all are
    nearly Euler's, and there is no level to search."""
    counts = sorted(counts)
    more = [n for n in counts if n > 1]
    return [
        *(TeacherSampling('euler', n, n) for n in counts),
        *(TeacherSampling(solver, n, n) for solver in FAST for n in more),
        *(TeacherSampling(solver, n, n, searched=True) for solver in SEARCHED for n in more),
    ]


def sampler_options(
    runner: Runner,
    name: str,
    network: Path | str,
    sampling: TeacherSampling,
    batch: int,
    labels: str | None = None,
) -> list[str]:
    """Options of generate.py; levels that they need are searched first, unless an earlier command has.

    Args:
        labels: see --labels of generate.py.
    """
    if not sampling.searched:
        return [f'--solver={sampling.solver}', f'--steps={sampling.steps}']
    # Levels stay in the folder, so that a resumed command does not search again.
    levels = runner.path('levels', f'{name}.txt')
    if not levels.exists():
        levels.parent.mkdir(exist_ok=True)
        runner.run(
            name,
            'search.py',
            f'--network={network}',
            '--schedule',
            f'--solver={sampling.solver}',
            f'--steps={sampling.steps}',
            f'--num={SEARCH_IMAGES}',
            f'--batch={batch}',
            f'--save={levels}',
            *([f'--labels={labels}'] if labels else []),
        )
    return [f'--sigmas={levels}']


# ----------------------------------------------------------------------------
# Rows of results: dicts with `solver`, `nfe`, `distance`, and `searched` if that is so.


def best(rows: Sequence[dict], nfe: int, searched: bool, entry: str = 'distance') -> dict | None:
    """The teacher's row of so many evaluations with the least distance, by a fast solver with its own levels or
    by any with searched ones; None if there is none."""
    known = [
        row
        for row in rows
        if row['nfe'] == nfe and bool(row.get('searched')) == searched and (searched or row['solver'] in FAST)
    ]
    return min(known, key=lambda row: row[entry], default=None)
