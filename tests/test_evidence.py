"""`python -m experiments.evidence`: what becomes of the rows of an earlier record."""

import dataclasses
import json
from pathlib import Path

import pytest
from helpers import assert_one_clear_error, invoke

import compare
from dnnlib import UserError
from experiments import evidence
from experiments.bundled import BUNDLED
from experiments.comparison import Request, plan
from experiments.comparison_run import Options

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


def test_options_of_all_trainings_come_last_and_every_comparison_can_be_planned(tmp_path):
    own = [f'--outdir={tmp_path}', '--seeds=1', '--', *evidence.COMPARISONS['photos'].train]
    words = evidence.command('photos', tmp_path, 2, ['--seeds=1'])
    assert [words[1], *words[-3:]] == [f'--outdir={tmp_path / "photos"}', *own[1:]]

    for name, each in evidence.COMPARISONS.items():
        trained = dataclasses.replace(each, teacher_of=None)
        words = ['--teacher=a.pkl'] if each.teacher_of else []
        o = Options(
            **compare.main.make_context('compare.py', [*words, *trained.options, '--', *each.train]).params
        )
        data = BUNDLED[each.data]
        request = Request(
            o.objectives, o.steps, o.seeds, o.budget, o.batch, True, data.network, True, o.train_options
        )
        assert len(plan(request)) >= len(each.objectives) * len(each.seeds), name


@pytest.mark.parametrize(
    'word', ['--num=100', '--outdir=other', '--budget=1', '--num_images=5', '--steps 4', 'mm']
)
def test_a_part_is_of_the_same_comparison(tmp_path, word):
    """Before anything runs."""
    done = invoke(evidence.main, f'--outdir={tmp_path / "new"}', '--only=digits', f'--some=--seeds=0 {word}')
    assert done.exit_code == 2 and 'would be another comparison; choose among --objectives' in done.output
    assert not (tmp_path / 'new').exists()
