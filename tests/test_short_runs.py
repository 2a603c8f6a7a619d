"""Short runs of every objective on real digits: with one and two evaluations they are far better than their teacher is."""
import json

import pytest
from helpers import run

from training.objectives import OBJECTIVES


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_every_objective_beats_its_teacher_at_one_and_two_evaluations(tmp_path):
    """A third of the budget of `make compare`. What the teacher makes of so few evaluations is a blur."""
    run('compare.py', f'--outdir={tmp_path}', '--budget=3000', '--steps=1,2', '--num=1797', '--reference-steps=18', timeout=5000)
    rows = json.loads((tmp_path / 'results.json').read_text())
    teacher = {row['nfe']: row['distance'] for row in rows if row['objective'] == 'diffusion' and row['solver'] == 'euler'}
    students = {name: {row['nfe']: row['distance'] for row in rows if row['objective'] == name} for name in OBJECTIVES if name != 'diffusion'}
    assert all(set(distances) == {1, 2} for distances in students.values())
    worse = {(name, nfe): distance / teacher[nfe] for name, distances in students.items() for nfe, distance in distances.items()
             if distance > teacher[nfe] / 2}
    assert not worse, worse
