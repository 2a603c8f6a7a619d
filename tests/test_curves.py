"""Curves of run folders: what is drawn, of runs in progress and in stages, and what cannot be."""

import json

import pytest
from helpers import assert_one_clear_error, invoke
from PIL import Image

from experiments import curves


def record(kimg, **means):
    names = {'Progress/kimg': kimg, 'Progress/nimg': kimg * 1000, **means}
    return json.dumps({name: dict(num=1, mean=mean, std=0) for name, mean in names.items()}) + '\n'


@pytest.fixture
def folder(tmp_path):
    """A run of three ticks; the loss of one is not finite, and a fourth is being written."""
    losses = [3.0, None, 1.0]
    ticks = [
        record(k, **{'Loss/cd': loss, 'Loss/sigma_0-0.01': 1.0, 'Progress/lr': 1e-3, 'Edges/T': 2.0**k})
        for k, loss in enumerate(losses)
    ]
    (tmp_path / 'stats.jsonl').write_text(''.join(ticks) + record(3)[:40])
    evaluations = [
        dict(kimg=k, nimg=k * 1000, fid=fid, ema='ema') for k, fid in ((0, 9.0), (1, None), (2, 5.0))
    ]
    (tmp_path / 'metrics-val.jsonl').write_text(''.join(json.dumps(each) + '\n' for each in evaluations))
    return tmp_path


def test_lines_are_what_the_run_recorded(folder):
    """Values that are missing or not finite leave a gap, parts of the loss have no line, and the unfinished last line is left out."""
    panels = curves.panels_of(curves.folders_of(folder))
    assert panels['loss'] == ({'cd': ([0, 2], [3.0, 1.0])}, True)
    assert panels['Fréchet distance'] == ({'ema': ([0, 2], [9.0, 5.0])}, True)
    assert panels['teacher edges T'][0] == {'': ([0, 1, 2], [1, 2, 4])}
    assert set(panels) == {'loss', 'Fréchet distance', 'learning rate', 'teacher edges T'}


def test_the_picture_is_in_the_run_folder_or_where_one_says(folder):
    result = invoke(curves.main, folder)
    assert result.exit_code == 0 and str(folder / 'training-curves.png') in result.stdout
    assert invoke(curves.main, folder, f'--dest={folder / "x.png"}').exit_code == 0
    sizes = [Image.open(folder / name).size for name in ('training-curves.png', 'x.png')]
    assert sizes[0] == sizes[1] and sizes[0][0] > 800


def test_stages_are_lines_of_the_same_panels_in_the_order_of_training(tmp_path):
    for stage in ('S0002', 'S0004', 'S0008'):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / 'stats.jsonl').write_text(record(1, **{'Loss/pd': 1.0}))
    lines, _ = curves.panels_of(curves.folders_of(tmp_path))['loss']
    assert list(lines) == ['S0008 pd', 'S0004 pd', 'S0002 pd']


def test_what_is_no_run_is_refused_with_a_cure(tmp_path):
    assert_one_clear_error(invoke(curves.main, tmp_path / 'none'), 'is not a folder')
    assert_one_clear_error(invoke(curves.main, tmp_path), 'has no stats.jsonl', 'give the folder of a run')
    run = tmp_path / '00000-digits'
    run.mkdir()
    (run / 'stats.jsonl').write_text('')
    assert_one_clear_error(invoke(curves.main, tmp_path), '00000-digits: give one of them')
    assert_one_clear_error(invoke(curves.main, run), 'wait for the first one')
    (run / 'stats.jsonl').write_text('{"a": 1\n' + record(1))
    assert_one_clear_error(invoke(curves.main, run), 'line 1 is not a record')
