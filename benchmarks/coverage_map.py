"""Which tests execute which lines, also in subprocesses: a pytest plugin that records it, a run that makes
the map, and the map.

Coverage.py runs in every process under a context, the name of the current test or fixture: the processes of
pytest switch it, others inherit it through the environment. A test executes its own lines and those of every
fixture that it uses, wherever the fixture was set up.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest

PLUGIN = 'mutants_coverage_plugin'
CONTEXT = 'COVERAGE_TEST'  # environment variable: the current test or fixture
NONE = 'none'
CONFIG = """[run]
parallel = true
branch = false
concurrency = multiprocessing, thread
patch = _exit
context = ${{{context}-{none}}}
source = {tree}
omit = {tree}/tests/*, {tree}/benchmarks/*
data_file = {folder}/data/coverage
disable_warnings = no-data-collected, module-not-imported, not-measured, couldnt-parse, trace-changed, module-not-measured
"""

# ----------------------------------------------------------------------------
# The plugin: `make_map` loads a copy of this file as one.


def switch(name: str) -> str:
    """Attribute lines to `name` from now on, in this process and those it starts; returns the old name."""
    import coverage

    before = os.environ.get(CONTEXT, NONE)
    os.environ[CONTEXT] = name
    if (current := coverage.Coverage.current()) is not None:
        current.switch_context(name)
    return before


def fixture_name(definition) -> str:
    return f'fixture {definition.baseid}::{definition.argname}'


@pytest.hookimpl(hookwrapper=True)
def pytest_fixture_setup(fixturedef, request):
    before = switch(fixture_name(fixturedef))
    yield
    switch(before)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item, nextitem):
    definitions = item._fixtureinfo.name2fixturedefs
    item.user_properties.append(
        ('fixtures', sorted(fixture_name(found[-1]) for found in definitions.values()))
    )
    before = switch(item.nodeid)
    yield
    switch(before)


def pytest_sessionfinish(session):
    """Save coverage in workers of xdist, which exit without running Python's exit handlers."""
    import coverage

    if (current := coverage.Coverage.current()) is not None and hasattr(session.config, 'workerinput'):
        current.stop()
        current.save()


REPORTS = defaultdict(lambda: dict(seconds=0.0, outcome='passed', fixtures=[]))


def pytest_runtest_logreport(report):
    record = REPORTS[report.nodeid]
    record['seconds'] += report.duration
    record['fixtures'] = dict(report.user_properties).get('fixtures', [])
    if report.outcome != 'passed' and record['outcome'] != 'failed':
        record['outcome'] = report.outcome


def pytest_unconfigure(config):
    if not hasattr(config, 'workerinput') and (path := os.environ.get('COVERAGE_REPORTS')):
        Path(path).write_text(json.dumps(REPORTS))


# ----------------------------------------------------------------------------
# The map.


@dataclass(frozen=True)
class CoverageMap:
    """Coverage of a tree by its tests.

    Attributes:
        seconds: {id: duration under coverage, with the fixtures set up for it} of each test that passed.
        tests: {file: {line: ids of the tests that execute it}}.
        failed: ids of the tests that failed, which are not used.
    """

    seconds: dict[str, float]
    tests: dict[str, dict[int, list[str]]]
    failed: list[str]

    def at(self, file: str, lines: range) -> list[str]:
        """Tests that execute any of these lines."""
        found = self.tests.get(file, {})
        return sorted({test for line in lines for test in found.get(line, [])})

    def save(self, path: Path) -> None:
        """Write the map as JSON, in which numbers stand for tests."""
        names = sorted(self.seconds)
        index = {name: i for i, name in enumerate(names)}
        tests = {
            file: {line: [index[name] for name in found] for line, found in lines.items()}
            for file, lines in self.tests.items()
        }
        # Under another name until it is complete.
        partial = path.with_suffix('.partial')
        partial.write_text(
            json.dumps(
                dict(
                    names=names,
                    seconds=[self.seconds[name] for name in names],
                    tests=tests,
                    failed=self.failed,
                )
            )
        )
        partial.replace(path)


def load_map(path: Path) -> CoverageMap:
    """A map that `save` wrote."""
    record = json.loads(path.read_text())
    names = record['names']
    tests = {
        file: {int(line): [names[i] for i in found] for line, found in lines.items()}
        for file, lines in record['tests'].items()
    }
    return CoverageMap(dict(zip(names, record['seconds'])), tests, record['failed'])


def make_map(tree: Path, folder: Path, jobs: int, arguments: list[str]) -> CoverageMap:
    """Run the tests of a tree once.

    Args:
        folder: output folder for the data.
        jobs: number of test processes.
        arguments: arguments of pytest, such as test files.
    """
    # sitecustomize starts coverage in every Python process, before anything else.
    (folder / 'data').mkdir(parents=True, exist_ok=True)
    (folder / 'site').mkdir(exist_ok=True)
    config, reports = folder / 'coverage.ini', folder / 'reports.json'
    config.write_text(CONFIG.format(context=CONTEXT, none=NONE, folder=folder, tree=tree))
    (folder / 'site' / 'sitecustomize.py').write_text('import coverage\ncoverage.process_startup()\n')
    shutil.copy(__file__, folder / 'site' / f'{PLUGIN}.py')
    path = os.pathsep.join([str(folder / 'site'), *filter(None, [os.environ.get('PYTHONPATH')])])
    env = dict(
        os.environ,
        PYTHONPATH=path,
        COVERAGE_PROCESS_START=str(config),
        COVERAGE_REPORTS=str(reports),
        OMP_NUM_THREADS='1',
    )

    # Modules stay together, because their tests share fixtures.
    command = [
        sys.executable,
        '-m',
        'pytest',
        '-q',
        '-p',
        'no:cacheprovider',
        '-p',
        PLUGIN,
        '--timeout=900',
        f'--numprocesses={jobs}',
        '--dist=loadfile',
        *arguments,
    ]
    with (folder / 'pytest.log').open('w') as log:
        subprocess.run(command, cwd=tree, env=env, stdout=log, stderr=subprocess.STDOUT, check=False)
    return read_map(tree, folder / 'data', json.loads(reports.read_text()))


def read_map(tree: Path, data: Path, reports: dict[str, dict]) -> CoverageMap:
    """The map from the data of every process and pytest's reports."""
    import coverage

    # Merge the contexts of all processes.
    contexts = defaultdict(lambda: defaultdict(set))  # file, line -> names
    for path in sorted(data.glob('coverage.*')):
        found = coverage.CoverageData(str(path))
        found.read()
        for file in found.measured_files():
            for line, names in found.contexts_by_lineno(file).items():
                contexts[str(Path(file).relative_to(tree))][line].update(
                    name.removeprefix(f'{NONE}|') for name in names
                )

    # A test executes what its fixtures execute.
    passed = {name: report for name, report in reports.items() if report['outcome'] == 'passed'}
    users = defaultdict(set)  # context -> tests
    for name, report in passed.items():
        for context in (name, *report['fixtures']):
            users[context].add(name)
    tests = {
        file: {
            line: sorted(set().union(*(users.get(name, ()) for name in names)))
            for line, names in lines.items()
        }
        for file, lines in contexts.items()
    }
    failed = sorted(name for name, report in reports.items() if report['outcome'] == 'failed')
    return CoverageMap({name: report['seconds'] for name, report in passed.items()}, tests, failed)
