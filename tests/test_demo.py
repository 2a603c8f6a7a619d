"""`make demo`: every command runs and every file is there; what was interrupted is resumed."""

import json
from pathlib import Path

import pytest
from helpers import assert_one_clear_error, invoke

import demo
from dnnlib import UserError
from experiments import demo_run
from experiments.runner import Runner
from experiments.teacher import TeacherSampling, few_evaluations


def test_the_demo_tells_its_story(tmp_path, forked_commands, monkeypatch):
    """As little training as it can have, and one row of each kind: every command runs and every file is there;
    the numbers mean nothing."""
    fast, searched = TeacherSampling('dpmpp', 8, 8), TeacherSampling('ipndm', 2, 2, searched=True)
    euler = TeacherSampling('euler', 8, 8)
    monkeypatch.setattr(demo_run, 'TEACHER_ROWS', [euler, fast, searched, demo_run.GOOD])
    students = {'mcd': ('student', {4: 1000}), 'direct': ('direct', {1: 300})}
    monkeypatch.setattr(demo_run, 'STUDENTS', students)
    out = tmp_path / 'out'
    done = invoke(demo.main, f'--outdir={out}', '--scale=0.001')
    assert done.exit_code == 0, done.output
    rows = json.loads((out / 'results.json').read_text())
    assert [(r['model'], r['solver'], r['nfe'], r.get('searched', False)) for r in rows] == [
        ('teacher', 'euler', 8, False),
        ('teacher', 'dpmpp', 8, False),
        ('teacher', 'ipndm', 2, True),
        ('teacher', 'heun', 511, False),
        ('student-4', 'student', 4, False),
        ('direct-1', 'student', 1, False),
    ]
    for row in rows:
        assert (
            row['images'] == 64
            and row['seconds'] > 0
            and row['interval'][0] <= row['distance'] <= row['interval'][1]
        )
        assert row['distance_pca'] > 0 and row['distance_random'] > 0
        assert (row['paired_rmse'] == 0) == (row['nfe'] == 511)
    page = (out / 'report.html').read_text()
    assert (
        page.count('data:image/png;base64,') == 6 + 2
        and 'train.py' in page
        and 'http' not in page
        and 'not FID' in page
    )
    table = (out / 'table.md').read_text()
    assert table.count('\n') == (2 + 6) + 1 + (2 + 6) and table in done.stdout
    assert [line.split('|')[1].strip() for line in table.splitlines()[2:8]] == [
        '1',
        '2',
        '4',
        '5',
        '8',
        '511',
    ]
    assert {'loss.png', 'distance.png', 'samples.png', 'samples-student-4.png'} <= {
        path.name for path in out.iterdir()
    }
    shown = [line for line in done.stdout.splitlines() if line.startswith('$ python ')]
    assert len(shown) == 2 + 3 + 3 + 6 * 4 + 1  # data and detectors, references, trainings, rows, a search
    assert '"nfe": 2}' in (out / 'levels' / 'teacher-ipndm-searched-2.txt').read_text()
    assert_one_clear_error(invoke(demo.main, f'--outdir={out}'), 'holds a finished demo', 'report.html')
    assert (out / 'commands.txt').read_text().splitlines() == [line[2:] for line in shown]


# ----------------------------------------------------------------------------
# Resuming, with commands that only pretend.


class PretendRunner(Runner):
    """Commands leave what the demo looks at; a training of `cut` is interrupted after it has saved a state."""

    cut = None

    def run(self, name, *arguments, threads=None):
        words = [str(word) for word in arguments]
        given = dict(word[2:].split('=', 1) for word in words if word.startswith('--') and '=' in word)
        with self.lock:
            self.commands.append(' '.join(words))
        if words[0] == 'train.py':
            folder = Path(given['outdir'])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / 'training-state-000001.pt').touch()
            (folder / 'network-snapshot-000000.pkl').touch()
            if name == self.cut:
                (folder / 'log.txt').write_text('Training...\n')
                raise UserError('interrupted')
            (folder / 'log.txt').write_text('Training...\nDone.\n')
        elif words[0] == 'generate.py':
            Path(given['outdir']).mkdir(parents=True)
        elif words[:2] == ['fid.py', 'calc']:
            value = float(len(given['images']))
            Path(given['json']).write_text(json.dumps(dict(fid=dict(value=value, interval=[value, value]))))
        elif words[0] == 'search.py':
            Path(given['save']).touch()


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """A function that runs the demo, the training of `cut` interrupted: (commands, rows or None, what is done)."""
    metrics = {name: demo_run.Metric(f'{name}.npz', None) for name in demo_run.DIGITS.metrics}
    monkeypatch.setattr(demo_run.bundled, 'prepare', lambda *_: (None, metrics))

    def run(cut=None, scale=1.0):
        done, runner = demo_run.Done(tmp_path, scale), PretendRunner(tmp_path, 1)
        runner.cut = cut
        try:
            rows = demo_run.run_demo(runner, done, 1)
        except UserError:
            rows = None
        return runner.commands, rows, done

    return run


def test_the_teacher_is_sampled_by_its_solvers_in_few_evaluations():
    few = (2, 4, 5, 8)
    assert [sampling.name for sampling in demo_run.TEACHER_ROWS] == [
        *(f'teacher-euler-{nfe}' for nfe in (1, *few)),
        *(
            f'teacher-{solver}-{nfe}'
            for solver in ('deis', 'dpmpp', 'ipndm-searched', 'unipc-searched')
            for nfe in few
        ),
        'teacher-heun-511',
    ]
    assert [sampling.name for sampling in few_evaluations([1])] == ['teacher-euler-1']


@pytest.mark.parametrize('cut', ['teacher', 'student-4', 'direct-1'])
def test_an_interrupted_demo_resumes_and_does_nothing_twice(pretend, tmp_path, cut):
    first, rows, done = pretend(cut)
    assert rows is None and cut not in done.rows
    second, rows, done = pretend()
    assert [row['model'] for row in rows] == ['teacher'] * 22 + [f'student-{S}' for S in (8, 4, 2)] + [
        f'direct-{S}' for S in (8, 2, 1)
    ]
    assert {row['labels'] for row in rows} == {'balanced'}
    of = lambda commands, script: [command for command in commands if command.startswith(script)]
    resumed = [command for command in of(second, 'train.py') if '--resume=' in command]
    assert len(resumed) == 1 and f'--outdir={tmp_path / cut} ' in resumed[0]
    assert f'--resume={tmp_path / cut} ' in resumed[0]
    assert len(of(first + second, 'train.py')) == 7 + 1
    assert len(of(first + second, 'generate.py')) == 28 and len(of(first + second, 'search.py')) == 8
    assert pretend()[0] == []


def test_seconds_add_up_over_interruptions(pretend, tmp_path):
    pretend('teacher')
    record = json.loads((tmp_path / 'demo.json').read_text())
    (tmp_path / 'demo.json').write_text(json.dumps(dict(record, seconds=1000.0)))
    assert 1000 <= pretend()[2].seconds < 1100


@pytest.mark.parametrize(
    'files, scale, words',
    [
        (['notes.txt'], 1, ['is not empty', 'choose another folder']),
        (['demo.json'], 0.5, ['interrupted demo of --scale=1: resume it with that']),
        (['demo.json', 'report.html'], 1, ['finished demo', 'open', 'remove the folder']),
        (['damaged'], 1, ['demo.json is damaged: delete it']),
        (['row'], 1, ['demo.json is damaged: delete it']),
        (['older'], 1, ['an older version', 'drawn labels', 'remove the folder']),
    ],
)
def test_another_folder_is_refused(tmp_path, files, scale, words):
    """`row`: a record of a row without its distance; `older`: of one that does not say how labels were chosen."""
    whole = dict(
        model='teacher',
        solver='heun',
        nfe=511,
        images=6000,
        seconds=1.0,
        distance=1.0,
        distance_pca=1.0,
        distance_random=1.0,
        interval=[0.5, 1.5],
    )
    rows = {'row': dict(row=dict(model='teacher')), 'older': dict(row=whole)}.get(files[0], {})
    record = dict(scale=1.0, seconds=1.0, rows=rows)
    for name in files:
        path = tmp_path / ('demo.json' if name in ('damaged', 'row', 'older') else name)
        path.write_text('{' if name == 'damaged' else json.dumps(record))
    before = sorted(tmp_path.iterdir())
    assert_one_clear_error(invoke(demo.main, f'--outdir={tmp_path}', f'--scale={scale}'), *words)
    assert sorted(tmp_path.iterdir()) == before


def test_what_intervals_support_is_said():
    row = lambda model, solver, nfe, *interval: dict(
        model=model, solver=solver, nfe=nfe, interval=interval, distance=sum(interval) / 2, searched=False
    )
    rows = [
        row('teacher', 'euler', 8, 0.3, 0.5),
        row('teacher', 'dpmpp', 8, 0.1, 0.12),
        row('teacher', 'heun', 511, 0.05, 0.07),
        row('student-8', 'student', 8, 0.06, 0.08),
        row('student-2', 'student', 2, 0.08, 0.11),
        row('direct-1', 'student', 1, 0.2, 0.31),
    ]
    said = demo_run.supported(rows)
    assert '(teacher, dpmpp): student-8; worse: direct-1; not' in said and said.endswith(
        'with 511: student-8.'
    )
    assert demo_run.supported(rows[:3]).count('none') == 3


def test_the_paired_error_is_of_equal_seeds(tmp_path):
    from PIL import Image

    runner = Runner(tmp_path, 1)
    for name, values in (('teacher-heun-511', (0, 100)), ('student-8', (51, 100))):
        runner.path('samples', name).mkdir(parents=True)
        for seed, value in enumerate(values):
            Image.new('L', (8, 8), value).save(runner.path('samples', name, f'{seed:06d}.png'))
    assert demo_run.paired_rmse(runner, 'student-8') == pytest.approx(0.2 / 2**0.5)
    assert demo_run.paired_rmse(runner, 'teacher-heun-511') == 0
