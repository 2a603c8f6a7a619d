"""The demo: train a teacher on digits, distill students of 8 and fewer steps, measure all, and write a
report. What an interrupted demo has done is not done again."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable
from pathlib import Path

from dnnlib import UserError
from dnnlib.util import write_json
from experiments import bundled
from experiments.bundled import DIGITS
from experiments.results import DAMAGED, distance_entries, read_json
from experiments.runner import (
    SHOWN,
    Metric,
    Resampling,
    Runner,
    is_finished,
    measure,
    newest_snapshot,
    resumption,
    workers,
)
from experiments.teacher import COUNTS, TeacherSampling, best, few_evaluations, sampler_options
from sampling.options import BALANCED

IMAGES = DIGITS.images  # of each row, as in compare.py
IN_PICTURE = 16  # samples of a row in the picture
COMMON = [*bundled.COMMON, '--cond=1', f'--batch={DIGITS.batch}', '--seed=0', '--nosubdir', '--snap=10']
# {objective: (name, {S: optimizer steps})}
STUDENTS = {'mcd': ('student', {8: 1250, 4: 1000, 2: 800}), 'direct': ('direct', {8: 1000, 2: 450, 1: 300})}
GOOD = TeacherSampling('heun', 256, 511)  # whose samples the others are compared with
TEACHER_ROWS = [*few_evaluations(COUNTS), GOOD]
PAGE = 'report.html'  # written last


# ----------------------------------------------------------------------------
# What is done.


class Done:
    """What a demo has done, in demo.json: its scale, the seconds it took, and rows by name, saved as each is
    measured.

    Raises: UserError if the folder holds something else, a finished demo, or one of another scale.
    """

    def __init__(self, outdir: Path, scale: float):
        self.path, self.lock, self.start = outdir / 'demo.json', threading.Lock(), time.monotonic()
        # A demo begins in an empty folder, and its page, written last, marks it as finished.
        if not self.path.exists() and any(outdir.iterdir()):
            raise UserError(f'--outdir={outdir} is not empty: remove it, or choose another folder.')
        if (outdir / PAGE).exists():
            raise UserError(
                f'--outdir={outdir} holds a finished demo: open {outdir / PAGE}. For another one remove the '
                'folder, or choose another.'
            )

        # The folder of an interrupted demo.
        found = read_json(self.path, dict(scale=float(scale), seconds=0.0, rows={}))
        if found['scale'] != scale:
            raise UserError(
                f'--outdir={outdir} holds an interrupted demo of --scale={found["scale"]:g}: resume it with '
                'that, or choose another folder.'
            )
        if not all(map(is_row, found['rows'].values())):
            raise UserError(DAMAGED.format(self.path))
        # Rows of older versions, which drew labels, do not say so.
        if any(row.get('labels') != BALANCED for row in found['rows'].values()):
            raise UserError(
                f'--outdir={outdir} holds an interrupted demo of an older version, whose samples had drawn '
                'labels: remove the folder, or choose another.'
            )
        self.scale, self.earlier, self.rows = scale, found['seconds'], found['rows']
        self.save()

    @property
    def seconds(self) -> float:
        """Seconds of this command and of those that it resumes."""
        return self.earlier + time.monotonic() - self.start

    def add(self, name: str, row: dict) -> None:
        # Rows come from several threads.
        with self.lock:
            self.rows[name] = row
            self.save()

    def save(self) -> None:
        write_json(self.path, dict(scale=float(self.scale), seconds=self.seconds, rows=self.rows))


def is_row(row: object) -> bool:
    """Whether a row has the entries that the report reads."""
    number = lambda value: isinstance(value, (int, float))
    numbers = ['nfe', 'images', 'seconds', *distance_entries(list(DIGITS.metrics)).values()]
    return (
        isinstance(row, dict)
        and all(isinstance(row.get(name), str) for name in ('model', 'solver'))
        and all(number(row.get(name)) for name in numbers)
        and isinstance(row.get('interval'), list)
        and len(row['interval']) == 2
        and all(map(number, row['interval']))
    )


# ----------------------------------------------------------------------------
# Training and measuring.


def train(
    runner: Runner,
    name: str,
    steps: int,
    options: list[str],
    metric: Metric,
    val_num: int,
    threads: int | None = None,
) -> Path:
    """Train a network and evaluate it five times on the way, unless it is trained; returns its snapshot."""
    folder = runner.path(name)
    if is_finished(folder):
        return newest_snapshot(folder)
    # Five ticks, each with an evaluation and a training state to resume from.
    kimg = steps * DIGITS.batch / 1000
    runner.run(
        name,
        'train.py',
        f'--outdir={folder}',
        f'--data={runner.path("digits.zip")}',
        *resumption(folder),
        *COMMON,
        *options,
        f'--duration={kimg / 1000:g}',
        f'--tick={kimg / 5:g}',
        '--dump=1',
        '--keep=1',
        '--val=1',
        '--val_every=1',
        f'--val_num={val_num}',
        '--val_batch=256',
        f'--val_ref={metric.ref}',
        f'--val_detector={metric.detector}',
        threads=threads,
    )
    return newest_snapshot(folder)


def run_demo(runner: Runner, done: Done, jobs: int) -> list[dict]:
    """Train the teacher, then train students and measure all of them in parallel.

    Args:
        done: what is done already; its scale is a factor for the numbers of training steps and, below 1, of samples.
        jobs: commands that run at a time.
    Returns: the rows of the table.
    """
    # The teacher has all threads, because everything else waits for it.
    scale = done.scale
    images, val_num = (max(round(num * min(scale, 1)), 64) for num in (IMAGES, 512))
    scaled = lambda steps: max(round(steps * scale), 5)
    _, metrics = bundled.prepare(DIGITS, runner)
    teacher = train(
        runner,
        'teacher',
        scaled(DIGITS.teacher_steps),
        [*DIGITS.network, *DIGITS.teacher, '--val_steps=9'],
        metrics['classifier'],
        val_num,
        threads=runner.threads * jobs,
    )

    # Students are trained and measured, the teacher is only measured; each makes a row.
    def row(name: str, network: Path, sampler: Callable[[], list[str]], **facts) -> dict:
        if name not in done.rows:
            # Every class equally often: the shares of drawn labels differ from the data's.
            how = dict(labels=BALANCED, resampling=Resampling(bundled.RESAMPLES, DIGITS.classes))
            measured = measure(runner, name, network, sampler(), images, metrics, **how)
            done.add(name, dict(facts, labels=BALANCED, **measured))
        return done.rows[name]

    def student(objective: str, S: int, name: str, steps: int) -> dict:
        options = [
            f'--objective={objective}',
            f'--teacher={teacher}',
            f'--S={S}',
            *bundled.student_options(objective, S),
        ]
        network = train(runner, name, scaled(steps), options, metrics['classifier'], val_num)
        sampler = lambda: ['--solver=student', f'--steps={S}']
        return row(name, network, sampler, model=name, solver='student', nfe=S)

    def of_teacher(s: TeacherSampling) -> dict:
        sampler = lambda: sampler_options(runner, s.name, teacher, s, 256, BALANCED)
        return row(s.name, teacher, sampler, model='teacher', solver=s.solver, nfe=s.nfe, searched=s.searched)

    # The longest job first, so that no core is idle at the end.
    with workers(runner, jobs) as pool:
        teachers = [pool.submit(of_teacher, sampling) for sampling in reversed(TEACHER_ROWS)]
        students = [
            pool.submit(student, objective, S, f'{name}-{S}', steps)
            for objective, (name, runs) in STUDENTS.items()
            for S, steps in runs.items()
        ]
        for future in concurrent.futures.as_completed([*students, *teachers]):
            future.result()  # the first failure ends the others
        return [future.result() for future in (*reversed(teachers), *students)]


# ----------------------------------------------------------------------------
# The report.


def write_report(runner: Runner, rows: list[dict], minutes: float) -> None:
    """Write results.json, table.md, the pictures and report.html."""
    from experiments import report as pages

    # Results and their tables.
    rows = [dict(r, paired_rmse=paired_rmse(runner, name_of(r))) for r in rows]
    write_json(runner.path('results.json'), rows)
    tables = [headline(rows), all_rows(rows)]
    runner.path('table.md').write_text('\n'.join(pages.markdown_table(*table) for table in tables))

    # Grids of samples, and the first ones of some rows in one picture.
    grid = lambda r: str(runner.path(f'samples-{name_of(r)}.png'))
    samples = {name_of(r): sorted(map(str, runner.path('samples', name_of(r)).glob('*.png'))) for r in rows}
    for r in rows:
        pages.write_grid(samples[name_of(r)][:SHOWN], grid(r))
    evaluations = lambda r: f'{r["nfe"]} evaluation{"s" * (r["nfe"] > 1)}'
    pictures = {f'{title_of(r)}, {evaluations(r)}': samples[name_of(r)][:IN_PICTURE] for r in shown(rows)}
    pages.write_rows(pictures, str(runner.path('samples.png')))

    write_training_curves(runner, rows)

    # The page.
    grids = ''.join(pages.embed(grid(r), f'{title_of(r)}, {evaluations(r)}') for r in rows)
    sections = [
        ('', introduction(rows, minutes) + ''.join(pages.html_table(*table) for table in tables)),
        ('Samples, from the same seeds', f'<div class="grids">{grids}</div>'),
        ('Distance during training', pages.embed(str(runner.path('distance.png')), css='wide')),
        ('Loss', pages.embed(str(runner.path('loss.png')), css='wide')),
        ('Commands', f'<pre>{pages.html.escape(runner.record.read_text().rstrip())}</pre>'),
    ]
    pages.write_page(str(runner.path(PAGE)), 'A teacher in 511 evaluations, a student in 8', sections)


def name_of(row: dict) -> str:
    """The name of a row's files."""
    if row['model'] != 'teacher':
        return row['model']
    return TeacherSampling(row['solver'], 0, row['nfe'], row.get('searched', False)).name


def title_of(row: dict) -> str:
    """A row's model and, of the teacher, its solver."""
    if row['model'] != 'teacher':
        return row['model']
    return f'teacher, {row["solver"]}{", searched levels" * row.get("searched", False)}'


def shown(rows: list[dict]) -> list[dict]:
    """The rows in the picture: the teacher in 511 evaluations, by Euler's method in 8, with searched levels in 2
    and 4, and by the best solver in 8, beside the students."""
    teachers = [r for r in rows if r['model'] == 'teacher']
    euler = [r for r in teachers if r['solver'] == 'euler' and r['nfe'] == 8]
    few = [*(best(teachers, nfe, searched=True) for nfe in (2, 4)), best(teachers, 8, searched=False)]
    good = [r for r in teachers if name_of(r) == GOOD.name]
    return [*good, *euler, *filter(None, few), *(r for r in rows if r['model'] != 'teacher')]


def with_interval(row: dict | None, more: str = '') -> str:
    """A cell: the distance and its interval."""
    if row is None:
        return ''
    return f'{row["distance"]:.3f} ({row["interval"][0]:.3f} to {row["interval"][1]:.3f}){more}'


def headline(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the first table: by the number of evaluations, the teacher without training and the
    students."""
    teachers = [r for r in rows if r['model'] == 'teacher']
    euler = {r['nfe']: r for r in teachers if r['solver'] == 'euler'}
    of_model = {r['model']: r for r in rows}
    lines = []
    # A line for each number of evaluations; what was not measured stays empty.
    for nfe in COUNTS:
        fast, searched = (best(teachers, nfe, searched) for searched in (False, True))
        lines.append(
            [
                nfe,
                with_interval(euler.get(nfe)),
                with_interval(fast, f' {fast["solver"]}' if fast else ''),
                with_interval(searched, f' {searched["solver"]}' if searched else ''),
                *(with_interval(of_model.get(f'{name}-{nfe}')) for name, _ in STUDENTS.values()),
            ]
        )
    # Last, the teacher in many evaluations: the quality that students aim at.
    good = next(r for r in teachers if name_of(r) == GOOD.name)
    lines.append([GOOD.nfe, '', with_interval(good, f' {GOOD.solver}'), '', *('' for _ in STUDENTS)])
    students = (f'{name}-S, `{objective}`' for objective, (name, _) in STUDENTS.items())
    header = ['NFE', 'teacher, Euler', 'teacher, best solver', 'teacher, searched levels', *students]
    return header, lines


def all_rows(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the second table: everything that was measured."""
    header = [
        'Model',
        'Solver',
        'NFE',
        'Distance (95 % interval)',
        'PCA features',
        'Random features',
        'Paired error',
        'Seconds',
    ]
    # Three distances of the same images, by different features.
    lines = [
        [
            r['model'],
            r['solver'] + ', searched levels' * r.get('searched', False),
            r['nfe'],
            with_interval(r),
            f'{r["distance_pca"]:.3f}',
            f'{r["distance_random"]:.4f}',
            f'{r["paired_rmse"]:.3f}',
            r['seconds'],
        ]
        for r in rows
    ]
    return header, lines


def write_training_curves(runner: Runner, rows: list[dict]) -> None:
    """Write loss.png and distance.png of the teacher's and the students' trainings."""
    from experiments import report as pages

    losses, distances = {}, {}
    for run in ['teacher', *(r['model'] for r in rows if r['model'] != 'teacher')]:
        # The first tick is a single step.
        stats = pages.read_jsonl(runner.path(run, 'stats.jsonl'))[1:]
        key = next(f'Loss/{loss}' for loss in ('diffusion', 'cd', 'direct') if f'Loss/{loss}' in stats[0])
        losses[run] = ([s['Progress/kimg']['mean'] for s in stats], [s[key]['mean'] for s in stats])

        # An evaluation of images that are not finite has no FID.
        evaluations = pages.read_jsonl(runner.path(run, 'metrics-val.jsonl'))
        evaluations = [each for each in evaluations if each['fid'] is not None]
        distances[run] = ([each['kimg'] for each in evaluations], [each['fid'] for each in evaluations])
    pages.write_curves(losses, str(runner.path('loss.png')), 'training loss')
    pages.write_curves(distances, str(runner.path('distance.png')), 'distance of 512 samples')


def paired_rmse(runner: Runner, name: str) -> float:
    """Root mean square difference of a row's pixels, in [0, 1], from those of the good teacher's images of the
    same seeds."""
    import numpy as np

    from data.pixels import open_image

    # Files of one name are of one seed; squares are summed in FP64 over all of them.
    total, count = 0.0, 0
    for good in runner.path('samples', GOOD.name).glob('*.png'):
        pair = (good, runner.path('samples', name, good.name))
        a, b = (np.asarray(open_image(str(path)), np.float64) / 255 for path in pair)
        total, count = total + np.square(a - b).sum(), count + a.size
    return (total / count) ** 0.5


def supported(rows: list[dict]) -> str:
    """What the intervals say of the students and the teacher, as a sentence."""
    low_of = lambda r: r['interval'][0]
    high_of = lambda r: r['interval'][1]
    teachers, students = ([r for r in rows if (r['model'] == 'teacher') is of] for of in (True, False))
    good = max(teachers, key=lambda r: r['nfe'])
    few = min((r for r in teachers if r['nfe'] <= 8), key=lambda r: r['distance'])
    listed = lambda found: ', '.join(r['model'] for r in found) or 'none'
    # Intervals that do not overlap tell two models apart; overlapping ones decide nothing.
    better = [r for r in students if high_of(r) < low_of(few)]
    worse = [r for r in students if low_of(r) > high_of(few)]
    level = [r for r in students if low_of(r) <= high_of(good) and low_of(good) <= high_of(r)]
    return (
        'By their intervals, better than the best that the teacher does in up to 8 evaluations '
        f'({title_of(few)}): {listed(better)}; worse: {listed(worse)}; not to be told from the teacher '
        f'with {good["nfe"]}: {listed(level)}.'
    )


def introduction(rows: list[dict], minutes: float) -> str:
    """The first paragraphs of report.html, as HTML: what the models and the numbers are."""
    students = '; '.join(
        f'<b>{name}-S</b>: students of S steps by --objective={objective}'
        for objective, (name, _) in STUDENTS.items()
    )
    metrics = '; '.join(f'<b>{name}</b>: {text}' for name, text in DIGITS.metrics.items())
    return (
        f'<p>{students}.</p><p>Fréchet distances between {rows[0]["images"]} samples, each digit equally '
        'often, and the 1,797 real digits of scikit-learn, in the features of a small digits classifier '
        'that the demo trains in seconds. This is not FID: no Inception network is involved, and the '
        'numbers compare with nothing outside this page. The features of the other two columns are not '
        f'trained. {metrics}. Intervals are the sampling noise (bootstrap within each digit), not that of '
        'another training. Paired error: root mean square difference of pixels, which are between 0 and 1, '
        'from what the teacher makes of the same seeds in 511 '
        f'evaluations. {supported(rows)} The whole run took {minutes:.1f} minutes.</p>'
    )
