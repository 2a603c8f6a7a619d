"""The mutants: faults are faults, the draw is fair, tests are asked that execute the line, and the figure is what happened."""

from __future__ import annotations

import ast
import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers import ROOT, lines

from benchmarks import mutants
from benchmarks.coverage_map import CoverageMap, load_map
from benchmarks.mutation import compiles, draw, mutants_of, places_of

SOURCE = b'''
"""A module of 3 things."""
from typing import TYPE_CHECKING

__all__ = ['nearest']
if TYPE_CHECKING:
    LIMIT = 4
SIZES = {'a': 7}


def nearest(values: list[int], to: int = 0) -> int:
    """1 of them."""
    if not values:
        raise ValueError(f'{len(values) + 5} values')
    print(9, 'values')
    return min(values, key=lambda value: abs(value - to))


if __name__ == '__main__':
    nearest([8])
'''.lstrip()


def texts(source: bytes) -> set[str]:
    return {place.text for place in places_of('a.py', source)}


def test_docstrings_annotations_messages_and_scripts_hold_no_place():
    """Of the numbers only the default and the constant of the module are left."""
    assert {text for text in texts(SOURCE) if text.isdigit()} == {'0', '7'}
    assert "raise ValueError(f'{len(values) + 5} values')" in texts(
        SOURCE
    ) and "__all__ = ['nearest']" not in texts(SOURCE)


@pytest.mark.parametrize(
    'statement, expected',
    [
        ('x = a < b', {'(a <= b)', '(a >= b)'}),
        ('x = a + 2', {'(a - 2)', '(a)', '(3)', '(1)', '(-2)'}),
        ('x = a[1:]', {'(a[:])', '(2)', '(0)', '(-1)'}),
        ('x = not a', {'(a)'}),
        ('x = f(a, b)', {'(f(b, a))'}),
        ('x = max(a)', {'(min(a))', '(a)'}),
        ('x = True', {'(False)'}),
        ('x = f(a, b, dim=c)', {'(f(b, a, dim=c))', '(f(a, b))'}),
        ('x = a.clone()', {'(a)'}),
        ('x = math.pi()', set()),
        ('x = "text" + a', set()),
        ('x = a if b else c', {'(a)', '(c)'}),
        ('x = a and b', {'(a or b)', '(a)', '(b)'}),
        ('raise a', {'pass'}),
        ('a += b', {'pass', 'a -= b'}),
    ],
)
def test_the_faults_of_a_statement(statement, expected):
    """Of a chosen few of each kind; `math` is a module, without which a call would be nothing."""
    found = {
        text
        for place in places_of('a.py', f'import math\ndef f():\n    {statement}\n'.encode())
        for _, text in place.faults
    }
    assert found == expected


def test_every_mutant_of_this_repository_differs_in_one_place():
    source = (ROOT / 'training' / 'samplers.py').read_bytes()
    found = mutants_of('training/samplers.py', source, seed=0)
    assert len(found) > 200 and len({mutant.key for mutant in found}) == len(found)
    plain = ast.dump(ast.parse(source))
    for mutant in found[::8]:
        changed = mutant.apply(source)
        assert changed.startswith(source[: mutant.start]) and changed.endswith(source[mutant.end :])
        assert not compiles(changed) or ast.dump(ast.parse(changed)) != plain, mutant.change


def test_keys_do_not_depend_on_what_stands_elsewhere():
    moved = SOURCE.replace(b'SIZES', b'\n\nOTHER = 1\nSIZES')
    before, after = (
        {mutant.key: mutant for mutant in mutants_of('a.py', source, seed=3)} for source in (SOURCE, moved)
    )
    assert before.keys() < after.keys() and all(after[key].line == before[key].line + 3 for key in before)


def test_the_draw_has_every_file_in_proportion_and_what_is_left_out_is_replaced():
    """Two places against some twenty: one and nine of ten. The seed decides which."""
    sources = {
        'small.py': b'x = 1\ny = 2\n',
        'large.py': b''.join(b'x%d = %d\n' % (i, i + 2) for i in range(18)),
        'empty.py': b'',
    }
    chosen = draw(sources, 10, seed=0, left_out=[])
    assert [sum(mutant.file == file for mutant in chosen) for file in sources] == [1, 9, 0]
    assert draw(sources, 10, seed=0, left_out=[]) == chosen != draw(sources, 10, seed=1, left_out=[])
    other = draw(sources, 10, seed=0, left_out=[chosen[0].key])
    assert chosen[0] not in other and set(chosen[1:]) < set(other) and len(other) == 10


def test_tests_are_asked_in_groups_the_quickest_modules_first():
    seconds = {'b.py::slow': 9.0, 'b.py::quick': 1.0, 'a.py::one': 4.0, 'a.py::two': 3.0, 'c.py::late': 100.0}
    assert list(mutants.groups_of(list(seconds), seconds, most=50)) == [
        ['a.py::two', 'a.py::one', 'b.py::quick'],
        ['b.py::slow'],
    ]
    assert list(mutants.groups_of(list(seconds), seconds, most=8)) == [
        ['a.py::two', 'a.py::one', 'b.py::quick']
    ]


class Clock:
    """Runs of tests that take what they are said to take."""

    def __init__(self, monkeypatch, *runs):
        self.now, self.runs, self.limits = 0.0, iter(runs), []
        monkeypatch.setattr(mutants, 'run_tests', self.run)
        monkeypatch.setattr(mutants.time, 'perf_counter', lambda: self.now)

    def run(self, tree, tests, limit):
        status, seconds = next(self.runs)
        self.now, self.limits = self.now + seconds, [*self.limits, limit]
        return status, 'FAILED a.py::test - wrong'


@pytest.fixture
def mutant(tmp_path):
    (tmp_path / 'a.py').write_bytes(SOURCE)
    return mutants.Tree(tmp_path), mutants_of('a.py', SOURCE, seed=0)[0], SOURCE, ['a.py::test']


def test_tests_that_do_not_end_or_run_have_caught_something_only_where_they_do_without_the_mutant(
    monkeypatch, mutant
):
    Clock(monkeypatch, (None, 60), (0, 20))
    assert mutants.notice(*mutant, limit=60) == 'no end within 60 s, 20 s without the mutant'
    clock = Clock(monkeypatch, (None, 60), (0, 40), (0, 90))
    assert mutants.notice(*mutant, limit=60) is None and clock.limits[2] == 120
    Clock(monkeypatch, (2, 5), (0, 5))
    assert mutants.notice(*mutant, limit=60) == 'a.py::test - wrong'
    for status in (None, 4):
        Clock(monkeypatch, (status, 60), (4, 40))
        with pytest.raises(mutants.Undecided, match=r'do not pass either: a\.py::test - wrong'):
            mutants.notice(*mutant, limit=60)


def test_the_file_is_whole_again_after_every_mutant(monkeypatch, mutant):
    tree, fault, source, _ = mutant
    seen = []
    monkeypatch.setattr(
        mutants,
        'run_tests',
        lambda path, tests, limit: (seen.append((path / 'a.py').read_bytes()), (1, ''))[1],
    )
    found = CoverageMap({'a.py::test': 1.0}, {'a.py': {line: ['a.py::test'] for line in range(30)}}, [])
    assert mutants.judge(tree, fault, source, found, 60, 60).outcome == 'caught'
    assert seen == [fault.apply(source)] and (tree.path / 'a.py').read_bytes() == source


# ----------------------------------------------------------------------------
# A campaign.

PROJECT = {
    'training/a.py': 'def add(a, b):\n    return a + b\n\n\ndef unused():\n    return [1]\n',
    'metrics/b.py': 'import os\nfrom training.a import add\n\nif __name__ != "b":\n    NAME = os.name\n\n\ndef twice(a):\n    return add(a, a)\n',
    'tests/conftest.py': 'import pytest\nfrom metrics.b import twice\n\n\n@pytest.fixture\ndef four():\n    return twice(2)\n',
    'tests/test_a.py': """
import subprocess, sys
from training.a import add

PRINT = "from training.a import add; print(add(2, 3))"


def test_sum():
    assert add(1, 2) == 3


def test_four(four):
    assert four == 4


def test_false():
    assert not add(1, 1)


def test_process():
    assert subprocess.run([sys.executable, "-c", PRINT], stdout=-1, text=True).stdout.strip() == "5"
""",
}


@pytest.fixture(scope='module')
def project(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('project') / 'repository'
    for name, text in PROJECT.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    subprocess.run(['git', 'init', '-q', root], check=True)
    return root


def campaign(monkeypatch, project, *arguments):
    monkeypatch.setattr(mutants, 'ROOT', project)
    (project / mutants.EQUAL).parent.mkdir(exist_ok=True)
    (project / mutants.EQUAL).write_text('[]')
    result = CliRunner().invoke(mutants.main, [f'--out={project.parent / "out"}', '--jobs=1', *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.slow
def test_a_campaign_asks_who_executes_the_line_in_whatever_process_and_resumes(monkeypatch, project):
    """`unused` is not executed, NAME is used by nobody; what fails is not asked; fixtures and processes are part of the tests that use them."""
    printed = campaign(monkeypatch, project, '--num=4', '--seed=5')
    found = load_map(project.parent / 'out' / 'map.json')
    assert found.failed == ['tests/test_a.py::test_false']
    assert found.tests['training/a.py'][2] == [
        f'tests/test_a.py::test_{name}' for name in ('four', 'process', 'sum')
    ]
    assert found.tests['metrics/b.py'][9] == ['tests/test_a.py::test_four']
    record = project.parent / 'out' / 'mutants.jsonl'
    results = lines(record)
    expected = {'unused': 'not covered', 'module': 'survived', 'add': 'caught', 'twice': 'caught'}
    assert {line['outcome'] for line in results} == set(
        expected.values()
    ) and 'tests/test_a.py::test_false' in printed
    assert all(line['outcome'] == expected[line['change'].partition(':')[0]] for line in results)
    assert all('tests/test_a.py::test_' in line['by'] for line in results if line['outcome'] == 'caught')
    caught = sum(line['outcome'] == 'caught' for line in results)
    assert f'| together | 2 | {len(results)} | {caught} |' in printed
    record.write_text(''.join(json.dumps(line) + '\n' for line in results[:-1]) + '{"key": "dead')
    assert campaign(monkeypatch, project, '--num=4', '--seed=5') == printed and len(lines(record)) == len(
        results
    )


def test_the_reasons_of_equal_mutants_are_given():
    reasons = mutants.equal_mutants(ROOT / mutants.EQUAL)
    assert reasons and all(len(key) == 8 and len(reason) > 20 for key, reason in reasons.items())
