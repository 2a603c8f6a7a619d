"""`python -m experiments.evidence`: what becomes of the rows of an earlier record."""

import json
from pathlib import Path

import pytest
from helpers import assert_one_clear_error, invoke

from dnnlib import UserError
from experiments import evidence

PATH = Path('mcd.json')


def row(model, objective='mcd', seed=0, nfe=4):
    return dict(model=model, objective=objective, seed=seed, nfe=nfe, commit='0' * 12)


@pytest.fixture
def before():
    """The record of a part: a teacher's row and two students'."""
    return dict(
        teacher='a',
        settings=dict(budget=10_000),
        trainings={'mcd-4-seed0': ['--S=4'], 'mm-4-seed0': ['--S=4']},
        rows=[row('teacher', 'diffusion', None), row('mcd-4-seed0'), row('mm-4-seed0', 'mm')],
    )


def test_rows_that_nothing_replaces_stay(before):
    new = dict(row('mcd-4-seed0'), distance=1.0)
    now = dict(before, trainings={'mcd-4-seed0': ['--S=4'], 'mcd-8-seed0': ['--S=8']})
    now['rows'] = [row('mcd-8-seed0', nfe=8), new]
    record = evidence.with_rows_before(now, before, PATH)
    assert [each['model'] for each in record['rows']] == [
        'teacher',
        'mcd-4-seed0',
        'mcd-8-seed0',
        'mm-4-seed0',
    ]
    assert new in record['rows'] and record['trainings'].keys() == before['trainings'].keys() | {
        'mcd-8-seed0'
    }


@pytest.mark.parametrize(
    'change',
    [
        dict(teacher='b'),
        dict(settings=dict(budget=5_000)),
        dict(trainings={'mcd-4-seed0': ['--S=4', '--lr=1e-4']}),
    ],
)
def test_rows_that_do_not_compare_are_refused_with_their_number(before, change):
    now = dict(before, rows=[row('mcd-4-seed0')], **change)
    with pytest.raises(
        UserError, match=r'mcd.json holds 2 rows .* move it away, and record again with --record'
    ):
        evidence.with_rows_before(now, before, PATH)
    # What is measured anew as a whole replaces them.
    assert evidence.with_rows_before(dict(now, rows=before['rows']), before, PATH)['rows'] == before['rows']


def test_a_record_older_than_the_teachers_digest_does_not_compare(before):
    older = {name: value for name, value in before.items() if name != 'teacher'}
    with pytest.raises(UserError, match='another teacher'):
        evidence.with_rows_before(dict(before, rows=[]), older, PATH)


def test_a_part_is_given_to_compare(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(evidence.Runner, 'run', lambda self, name, *words: ran.append(words))
    monkeypatch.setattr(evidence, 'MEASURED', tmp_path)
    monkeypatch.setattr(evidence, 'recorded', lambda name, folder: dict(rows=[row('a')], trainings={}))
    done = invoke(
        evidence.main, f'--outdir={tmp_path}', '--only=digits', '--some=--objectives=mm --steps=4,8'
    )
    assert done.exit_code == 0 and '1 rows' in done.output, done.output
    assert ran[0][-2:] == ('--objectives=mm', '--steps=4,8') and ran[0][0] == 'compare.py'
    assert json.loads((tmp_path / 'digits.json').read_text())['rows'] == [row('a')]
    assert_one_clear_error(invoke(evidence.main, '--some="'), '--some', status=2)
