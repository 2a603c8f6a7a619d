"""How many small faults the tests detect: mutants of `training/` and `metrics/`, drawn at random by a seed,
each against the tests that execute its line.

Works on a copy of the repository, taken once, so that the working tree may change meanwhile. The tests run
once under Coverage.py to find which lines they execute and how long they take. Then each mutant is put into a
copy, and its tests run in groups, the fastest modules first, until one fails. At the end the tests that
failed run again without mutants: those that fail again have caught nothing. The copy, the map and a line per
mutant stay in --out, where an interrupted run resumes.

Tests that exceed the time limit have caught a mutant only if they take less than half of it without the
mutant; otherwise the limit is raised. Mutants whose line no test executes count as missed. Mutants without an
observable effect are excluded by `equal_mutants.json`, which gives a reason for each; others are drawn
instead.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

import click

if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import ROOT, block, table
from benchmarks.mutation import Mutant, draw
from dnnlib import UserError, cli

FOLDERS = ('training', 'metrics')
EQUAL = Path('benchmarks') / 'equal_mutants.json'
GROUP = 15.0  # seconds of tests that run together
PASSED, FAILED = 0, 1  # exit statuses of pytest; others mean that it could not run the tests
OUTCOMES = ('caught', 'survived', 'not covered', 'undecided')

# ----------------------------------------------------------------------------
# Copies of the repository.


def repository_files(root: Path) -> list[str]:
    """Files that git tracks or would track, as far as they exist."""
    listed = subprocess.run(
        ['git', 'ls-files', '--cached', '--others', '--exclude-standard', '-z'],
        cwd=root,
        check=True,
        stdout=subprocess.PIPE,
    )
    return sorted(name for name in listed.stdout.decode().split('\0') if (root / name).is_file())


def copy_tree(source: Path, files: list[str], folder: Path) -> Path:
    """Copy files to folder/main, beside a link to `shared` if there is one; returns the path."""
    copy = folder / 'main'
    for name in files:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / name, copy / name)
    shared = ROOT.parent / 'shared'
    if shared.is_dir() and not (folder / 'shared').exists():
        (folder / 'shared').symlink_to(shared, target_is_directory=True)
    return copy


class Tree:
    """A copy of the repository that receives one mutant at a time."""

    def __init__(self, path: Path):
        self.path, self._touched = path, int(time.time())

    def write(self, file: str, source: bytes) -> None:
        """Write a file with a new modification time, by which Python knows to compile it again."""
        self._touched = max(self._touched + 2, int(time.time()))
        (self.path / file).write_bytes(source)
        os.utime(self.path / file, (self._touched, self._touched))


# ----------------------------------------------------------------------------
# Tests.


@dataclass(frozen=True)
class Outcome:
    """Result for a mutant.

    Attributes:
        outcome: caught, survived, not covered, or undecided.
        by: the test that failed, with its error; or why the outcome is undecided.
        tests, left_out: number of tests that ran, and of those that would have taken too long.
        seconds: total duration.
    """

    outcome: str
    by: str
    tests: int
    left_out: int
    seconds: float


def tests_of(mutant: Mutant, found) -> list[str]:
    """The tests that execute a mutant's lines; for lines that run at import, those of the entire file."""
    lines = range(1, max(found.tests.get(mutant.file, {0: ()})) + 1) if mutant.lines is None else mutant.lines
    return found.at(mutant.file, lines)


def groups_of(tests: list[str], seconds: dict[str, float], most: float) -> Iterator[list[str]]:
    """Groups of tests to run together, at most `most` seconds in total, fast modules and tests first."""
    modules: dict[str, list[str]] = {}
    for test in sorted(tests, key=lambda test: (seconds[test], test)):
        modules.setdefault(test.partition('::')[0], []).append(test)
    ordered = sorted(modules.values(), key=lambda module: (sum(seconds[test] for test in module), module))

    # Tests that exceed the total are left out; groups are limited in time, so that a failure ends the work
    # early.
    group, taken, total = [], 0.0, 0.0
    for test in (test for module in ordered for test in module):
        if total + seconds[test] > most:
            continue
        if group and taken + seconds[test] > GROUP:
            yield group
            group, taken = [], 0.0
        group.append(test)
        taken, total = taken + seconds[test], total + seconds[test]
    if group:
        yield group


def run_tests(tree: Path, tests: list[str], limit: float | None, stop: bool = True) -> tuple[int | None, str]:
    """Run tests in a process group, which is killed at the time limit in seconds.

    Args:
        stop: stop at the first failure.
    Returns: (exit status of pytest, or None if it exceeded the limit; its output).
    """
    # The same examples each time: without those that Hypothesis remembers, by a fixed seed.
    shutil.rmtree(tree / '.hypothesis', ignore_errors=True)
    command = [
        sys.executable,
        '-m',
        'pytest',
        *(['-x'] if stop else []),
        '-q',
        '--tb=line',
        '-p',
        'no:cacheprovider',
        '-p',
        'no:xdist',
        '--hypothesis-seed=0',
        *tests,
    ]

    # A session of its own makes a process group of everything that tests start.
    with subprocess.Popen(
        command,
        cwd=tree,
        env=dict(os.environ, OMP_NUM_THREADS='1'),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors='replace',
        start_new_session=True,
    ) as process:
        try:
            printed, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, process.communicate()[0]
    return process.returncode, printed


def failures(printed: str) -> list[str]:
    """The tests that pytest names as failed, each with its error; its last line if it names none."""
    named = [
        line.partition(' ')[2] for line in printed.splitlines() if line.startswith(('FAILED ', 'ERROR '))
    ]
    return [line[:200] for line in named or printed.strip().splitlines()[-1:] or ['nothing printed']]


class Undecided(Exception):
    """The tests say nothing about a mutant."""


def notice(tree: Tree, mutant: Mutant, source: bytes, tests: list[str], limit: float) -> str | None:
    """The test that catches a mutant, with its error; None if all of these tests pass.

    If they exceed the limit or cannot run, they are run without the mutant as well. Raises: Undecided if they
    then fail too.
    """
    while True:
        tree.write(mutant.file, mutant.apply(source))
        status, printed = run_tests(tree.path, tests, limit)
        tree.write(mutant.file, source)
        if status == PASSED:
            return None
        if status == FAILED:
            return failures(printed)[-1]

        # The limit was exceeded, or pytest failed: is it the mutant's fault?
        start = time.perf_counter()
        sound, without = run_tests(tree.path, tests, 20 * limit)
        if sound != PASSED:
            raise Undecided(f'without it the tests do not pass either: {failures(without)[-1]}')
        needed = time.perf_counter() - start
        if status is not None:
            return failures(printed)[-1]
        if needed < limit / 2:
            return f'no end within {limit:.0f} s, {needed:.0f} s without the mutant'
        limit = 3 * needed  # the limit was too short to tell


def judge(tree: Tree, mutant: Mutant, source: bytes, found, limit: float, most: float) -> Outcome:
    """Run a mutant's tests until one fails."""
    start, tests = time.perf_counter(), tests_of(mutant, found)
    count, outcome, by = 0, 'not covered', ''
    try:
        for group in groups_of(tests, found.seconds, most):
            count, outcome = count + len(group), 'survived'
            if by := notice(tree, mutant, source, group, limit) or '':
                outcome = 'caught'
                break
    except Undecided as error:
        outcome, by = 'undecided', str(error)
    finally:
        tree.write(mutant.file, source)
    return Outcome(outcome, by, count, len(tests) - count, time.perf_counter() - start)


# ----------------------------------------------------------------------------
# The campaign.


@dataclass(frozen=True)
class Campaign:
    """A folder with the copy of the repository, its coverage map, and a line per judged mutant."""

    folder: Path

    @property
    def original(self) -> Path:
        return self.folder / 'original' / 'main'

    @property
    def record(self) -> Path:
        return self.folder / 'mutants.jsonl'

    def prepare(self) -> None:
        """Copy the repository, unless there is a copy."""
        if not self.original.exists():
            copy_tree(ROOT, repository_files(ROOT), self.folder / 'copying')
            (self.folder / 'copying').rename(self.original.parent)

    def map(self, jobs: int, arguments: list[str]):
        """The coverage map of the copy, which is made if there is none."""
        from benchmarks.coverage_map import load_map, make_map

        path = self.folder / 'map.json'
        if not path.exists():
            click.echo('Running the tests once, to record which lines they execute...', err=True)
            make_map(self.original, self.folder / 'coverage', jobs, arguments).save(path)
        return load_map(path)

    def sources(self) -> dict[str, bytes]:
        paths = [path for folder in FOLDERS for path in sorted((self.original / folder).rglob('*.py'))]
        return {path.relative_to(self.original).as_posix(): path.read_bytes() for path in paths}

    def results(self) -> dict[str, dict]:
        """The last line about each mutant, by its key; an incomplete line at the end is ignored."""
        lines = self.record.read_text().split('\n')[:-1] if self.record.exists() else []
        return {line['key']: line for line in map(json.loads, lines)}

    def keep(self, mutant: Mutant, outcome: Outcome) -> None:
        """Append a line about a mutant, and print it."""
        about = dict(
            key=mutant.key, file=mutant.file, line=mutant.line, operator=mutant.operator, change=mutant.change
        )
        with self.record.open('a') as record:
            record.write(json.dumps(about | asdict(outcome)) + '\n')
        click.echo(
            f'{outcome.outcome} {mutant.key} {mutant.file}:{mutant.line} {mutant.change} {outcome.by}',
            err=True,
        )

    def trees(self, jobs: int) -> list[Tree]:
        """Fresh copies of the copy, without mutants that an interrupted run has left."""
        names = (
            path.relative_to(self.original).as_posix() for path in self.original.rglob('*') if path.is_file()
        )
        files = sorted(name for name in names if '__pycache__' not in name and not name.startswith('.'))
        return [Tree(copy_tree(self.original, files, self.folder / f'copy-{i}')) for i in range(jobs)]

    def run(self, mutants: list[Mutant], found, jobs: int, limit: float, most: float) -> None:
        """Judge the mutants that have no outcome yet, then confirm what was caught."""
        # Remove an incomplete line, to which the next one would be appended.
        sources, known = self.sources(), self.results()
        if self.record.exists():
            text = self.record.read_text()
            self.record.write_text(text[: text.rfind('\n') + 1])
        waiting = [
            mutant
            for mutant in mutants
            if known.get(mutant.key, {}).get('outcome', 'undecided') == 'undecided'
        ]

        # Each thread takes a free copy for a mutant.
        free, adding = SimpleQueue(), Lock()
        for tree in self.trees(jobs):
            free.put(tree)

        def one(mutant: Mutant) -> None:
            tree = free.get()
            outcome = judge(tree, mutant, sources[mutant.file], found, limit, most)
            free.put(tree)
            with adding:
                self.keep(mutant, outcome)

        with ThreadPoolExecutor(jobs) as pool:
            for _ in pool.map(one, waiting):
                pass
        if waiting:
            self.confirm(mutants, free.get())

    def confirm(self, mutants: list[Mutant], tree: Tree) -> None:
        """Run the tests that caught mutants again, without mutants; where one fails, nothing is decided."""
        caught = {key: line for key, line in self.results().items() if line['outcome'] == 'caught'}
        by = {
            mutant.key: caught[mutant.key]['by'].partition(' - ')[0]
            for mutant in mutants
            if mutant.key in caught
        }
        tests = sorted({name for name in by.values() if '::' in name})
        if not tests:
            return
        # A test that fails without a mutant has caught none.
        status, printed = run_tests(tree.path, tests, None, stop=False)
        failing = {line.partition(' - ')[0] for line in failures(printed)} if status != PASSED else set()
        for mutant in mutants:
            if by.get(mutant.key) in failing:
                self.keep(mutant, Outcome('undecided', f'without it {by[mutant.key]} fails too', 0, 0, 0.0))


def equal_mutants(path: Path) -> dict[str, str]:
    """{key: reason}. Raises: UserError if a reason is missing, or a key is repeated."""
    entries = json.loads(path.read_text())
    reasons = {entry['key']: entry['reason'].strip() for entry in entries}
    if len(reasons) < len(entries) or not all(reasons.values()):
        raise UserError(f'{path}: every mutant must be listed once, with a reason.')
    return reasons


def report(mutants: list[Mutant], results: dict[str, dict], failed: list[str]) -> str:
    """A table by folder, the mutants that were not caught, and the tests that were not used."""
    # By folder, then together.
    rows = []
    for name in (*FOLDERS, ''):
        chosen = [mutant for mutant in mutants if mutant.file.startswith(name)]
        counts = Counter(results[mutant.key]['outcome'] for mutant in chosen)
        share = f'{100 * counts["caught"] / len(chosen):.1f} %' if chosen else ''
        figures = [
            len({mutant.file for mutant in chosen}),
            len(chosen),
            *(counts[outcome] for outcome in OUTCOMES),
        ]
        rows.append([f'`{name}/`' if name else 'together', *map(str, figures), share])

    # What was not caught, and which tests did not help.
    missed = [
        f'- {results[m.key]["outcome"]}: `{m.key}`, {m.file}:{m.line}, {m.operator}: `{m.change}`'
        for m in mutants
        if results[m.key]['outcome'] != 'caught'
    ]
    unused = [f'- not used, because it fails without mutants: {name}' for name in failed]
    return '\n\n'.join(
        filter(
            None,
            [table(['', 'files', 'mutants', *OUTCOMES, 'share caught'], rows), '\n'.join([*missed, *unused])],
        )
    )


@click.command(cls=cli.Command)
@cli.option(
    '--out',
    metavar='DIR',
    type=cli.PATH,
    required=True,
    help='Folder of the campaign, which resumes if it exists.',
)
@cli.option(
    '--num',
    metavar='INT',
    type=click.IntRange(min=1),
    default=160,
    show_default=True,
    help='Number of mutants.',
)
@cli.option('--seed', metavar='INT', type=int, default=0, show_default=True, help='Seed of the selection.')
@cli.option(
    '--jobs',
    metavar='INT',
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help='Number of mutants to test in parallel.',
)
@cli.option(
    '--limit',
    metavar='SECONDS',
    type=click.IntRange(min=10),
    default=60,
    show_default=True,
    help='Time limit of a group of tests.',
)
@cli.option(
    '--most',
    metavar='SECONDS',
    type=click.IntRange(min=1),
    default=240,
    show_default=True,
    help='Total duration of tests per mutant; fast tests run first.',
)
@cli.option('--files', metavar='LIST', help='Files to mutate.  [default: all]')
@cli.option('--tests', metavar='LIST', help='Test files to run.  [default: all]')
def main(out, num, seed, jobs, limit, most, files, tests):
    """Draw mutants of training/ and metrics/, run the tests of their lines, and count the caught ones."""
    # Copy of the repository.
    campaign = Campaign(Path(out).resolve())
    campaign.folder.mkdir(parents=True, exist_ok=True)
    campaign.prepare()
    sources = campaign.sources()
    if files and (unknown := set(files.split(',')) - set(sources)):
        raise click.UsageError(f'--files: {", ".join(sorted(unknown))}: not in {" or ".join(FOLDERS)}')

    # Coverage, mutants, tests.
    equal = equal_mutants(ROOT / EQUAL)
    found = campaign.map(jobs, tests.split(',') if tests else ['tests'])
    mutants = draw(
        {file: source for file, source in sources.items() if not files or file in files.split(',')},
        num,
        seed,
        set(equal),
    )
    campaign.run(mutants, found, jobs, limit, most)
    click.echo(
        block(
            'Mutants',
            f'{len(mutants)} small faults in {len({m.file for m in mutants})} files, drawn by seed {seed}, '
            'each put into a copy of the repository, where the tests that execute its line run until one '
            f'fails. {len(equal)} without an observable effect are excluded, see `{EQUAL.as_posix()}`. Not '
            'covered: no test executes the line.',
            report(mutants, campaign.results(), found.failed),
        )
    )


if __name__ == '__main__':
    main(prog_name='python -m benchmarks.mutants')
