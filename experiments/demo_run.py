"""The demo: train a teacher on digits, distill students of 8 and fewer steps, measure all, and write a
report."""

from __future__ import annotations

import concurrent.futures
import json
from pathlib import Path

from experiments import bundled
from experiments.bundled import DIGITS
from experiments.runner import SHOWN, Metric, Runner, measure, newest_snapshot, workers

IMAGES = 1797  # as many as there are digits
COMMON = [
    *bundled.COMMON,
    '--cond=1',
    f'--batch={DIGITS.batch}',
    '--seed=0',
    '--nosubdir',
    '--snap=10',
    '--dump=0',
]
# {objective: (name, {S: optimizer steps})}
STUDENTS = {'mcd': ('student', {8: 1250, 4: 1000, 2: 800}), 'direct': ('direct', {8: 1000, 2: 450, 1: 300})}
TEACHER_ROWS = [('euler', 8, 8), ('heun', 256, 511)]  # solver, steps, NFE


def train(
    runner: Runner,
    name: str,
    steps: int,
    options: list[str],
    metric: Metric,
    val_num: int,
    threads: int | None = None,
) -> Path:
    """Train a network and evaluate it five times on the way; returns its snapshot."""
    kimg = steps * DIGITS.batch / 1000
    runner.run(
        name,
        'train.py',
        f'--outdir={runner.path(name)}',
        f'--data={runner.path("digits.zip")}',
        *COMMON,
        *options,
        f'--duration={kimg / 1000:g}',
        f'--tick={kimg / 5:g}',
        '--val=1',
        '--val_every=1',
        f'--val_num={val_num}',
        '--val_batch=256',
        f'--val_ref={metric.ref}',
        f'--val_detector={metric.detector}',
        threads=threads,
    )
    return newest_snapshot(runner.path(name))


def run_demo(runner: Runner, scale: float, jobs: int) -> list[dict]:
    """Train the teacher, then train students and measure all of them in parallel.

    Args:
        scale: factor for the numbers of training steps and, below 1, of samples.
        jobs: commands that run at a time.
    Returns: the rows of the table.
    """
    # The teacher has all threads, because everything else waits for it.
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
    def row(name: str, network: Path, model: str, solver: str, steps: int, nfe: int) -> dict:
        measured = measure(runner, name, network, solver, steps, images, metrics, bootstrap=200)
        return dict(model=model, solver=solver, nfe=nfe, **measured)

    def student(objective: str, S: int, name: str, steps: int) -> dict:
        options = [
            f'--objective={objective}',
            f'--teacher={teacher}',
            f'--S={S}',
            *bundled.student_options(objective, S),
        ]
        network = train(runner, name, scaled(steps), options, metrics['classifier'], val_num)
        return row(name, network, name, 'student', S, S)

    def of_teacher(solver: str, steps: int, nfe: int) -> dict:
        return row(f'teacher-{solver}-{nfe}', teacher, 'teacher', solver, steps, nfe)

    # The longest job first, so that no core is idle at the end.
    with workers(runner, jobs) as pool:
        teachers = [pool.submit(of_teacher, *settings) for settings in reversed(TEACHER_ROWS)]
        students = [
            pool.submit(student, objective, S, f'{name}-{S}', steps)
            for objective, (name, runs) in STUDENTS.items()
            for S, steps in runs.items()
        ]
        for future in concurrent.futures.as_completed([*students, *teachers]):
            future.result()  # the first failure ends the others
        return [future.result() for future in (*reversed(teachers), *students)]


def write_report(runner: Runner, rows: list[dict], minutes: float) -> None:
    """Write results.json, table.md, the pictures and report.html."""
    from experiments import report as pages

    # Results and their table.
    runner.path('results.json').write_text(json.dumps(rows, indent=2) + '\n')
    header = [
        'Model',
        'Solver',
        'NFE',
        'Distance (95 % interval)',
        'PCA features',
        'Random features',
        'Seconds',
    ]
    cells = [
        [
            r['model'],
            r['solver'],
            r['nfe'],
            f'{r["distance"]:.3f} ({r["interval"][0]:.3f} to {r["interval"][1]:.3f})',
            f'{r["distance_pca"]:.3f}',
            f'{r["distance_random"]:.4f}',
            r['seconds'],
        ]
        for r in rows
    ]
    runner.path('table.md').write_text(pages.markdown_table(header, cells))

    # Grids of samples, and four of them side by side.
    names = [f'teacher-{r["solver"]}-{r["nfe"]}' if r['model'] == 'teacher' else r['model'] for r in rows]
    grid = lambda name: str(runner.path(f'samples-{name}.png'))
    for name in names:
        samples = sorted(map(str, runner.path('samples', name).glob('*.png')))
        pages.write_grid(samples[:SHOWN], grid(name))
    captions = dict(
        zip(names, (f'{r["model"]}, {r["nfe"]} evaluations: distance {r["distance"]:.3g}' for r in rows))
    )
    shown = ['teacher-euler-8', 'student-8', 'direct-8', 'teacher-heun-511']
    pages.write_side_by_side({captions[name]: grid(name) for name in shown}, str(runner.path('samples.png')))

    write_training_curves(runner, rows)

    # The page.
    grids = ''.join(
        pages.embed(grid(name), f'{r["model"]}, {r["solver"]}, {r["nfe"]} evaluations')
        for name, r in zip(names, rows)
    )
    sections = [
        ('', introduction(rows, minutes) + pages.html_table(header, cells)),
        ('Samples, from the same seeds', f'<div class="grids">{grids}</div>'),
        ('Distance during training', pages.embed(str(runner.path('distance.png')), css='wide')),
        ('Loss', pages.embed(str(runner.path('loss.png')), css='wide')),
        ('Commands', f'<pre>{pages.html.escape(chr(10).join(runner.commands))}</pre>'),
    ]
    pages.write_page(
        str(runner.path('report.html')), 'A teacher in 511 evaluations, a student in 8', sections
    )


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
    levels = {
        f'teacher, NFE {r["nfe"]} ({r["images"]} samples)': r['distance']
        for r in rows
        if r['model'] == 'teacher'
    }
    pages.write_curves(distances, str(runner.path('distance.png')), 'distance of 512 samples', levels)


def introduction(rows: list[dict], minutes: float) -> str:
    """The first paragraphs of report.html, as HTML: what the models and the numbers are."""
    students = '; '.join(
        f'<b>{name}-S</b>: students of S steps by --objective={objective}'
        for objective, (name, _) in STUDENTS.items()
    )
    metrics = '; '.join(f'<b>{name}</b>: {text}' for name, text in DIGITS.metrics.items())
    return (
        f'<p>{students}.</p><p>Fréchet distances between {rows[0]["images"]} samples and the 1,797 real '
        'digits of scikit-learn, in the features of a small digits classifier that the demo trains in '
        'seconds. This is not FID: no Inception network is involved, and the numbers compare with nothing '
        f'outside this page. The features of the other two columns are not trained. {metrics}. Intervals are '
        f'the sampling noise (bootstrap). The whole run took {minutes:.1f} minutes.</p>'
    )
