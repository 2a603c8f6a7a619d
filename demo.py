"""Demo on real digits, in minutes on a laptop: a teacher that needs 511 evaluations, students that need 8 or
fewer.

Runs the scripts of this repository as a user would, prints each command, and writes a report.
"""

from __future__ import annotations

import dnnlib.interrupts  # noqa: F401  (first)

import concurrent.futures
import json
import os
import time
from pathlib import Path

import click

from dnnlib import UserError, cli
from experiments import digits
from experiments.runner import (
    SHOWN,
    Ruler,
    Runner,
    make_outdir,
    measure,
    newest_snapshot,
    run_interruptibly,
    workers,
)

IMAGES = 1797  # as many as there are digits
COMMON = [
    *digits.COMMON,
    '--cond=1',
    f'--batch={digits.BATCH}',
    '--seed=0',
    '--nosubdir',
    '--snap=10',
    '--dump=0',
]
STUDENTS = {
    'mcd': ('student', {8: 1250, 4: 1000, 2: 800}),
    'direct': ('direct', {8: 1000, 2: 450, 1: 300}),
}  # name; steps of each S
TEACHER_ROWS = [('euler', 8, 8), ('heun', 256, 511)]  # solver, steps, NFE


def train(
    runner: Runner, name: str, steps: int, options: list[str], ruler: Ruler, threads: int | None = None
) -> Path:
    """Train a network of the demo's size, with five evaluations on the way, by a ruler; returns its
    snapshot."""
    kimg = steps * digits.BATCH / 1000
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
        '--val_num=512',
        '--val_batch=256',
        f'--val_ref={ruler.ref}',
        f'--val_detector={ruler.detector}',
        threads=threads,
    )
    return newest_snapshot(runner.path(name))


def row_of(
    runner: Runner,
    name: str,
    network: Path,
    model: str,
    solver: str,
    steps: int,
    nfe: int,
    images: int,
    rulers: dict,
) -> dict:
    """Sample and measure with every ruler: a row of the table."""
    return dict(
        model=model,
        solver=solver,
        nfe=nfe,
        **measure(runner, name, network, solver, steps, images, rulers, bootstrap=200),
    )


def run_demo(runner: Runner, scale: float, jobs: int) -> list[dict]:
    """Teacher first, then students and measurements side by side; returns the rows of the table."""
    images = max(round(IMAGES * min(scale, 1)), 128)
    steps = lambda full: max(round(full * scale), 10)
    _, rulers = digits.prepare(runner)
    teacher = train(
        runner,
        'teacher',
        steps(digits.TEACHER_STEPS),
        [*digits.TEACHER, '--val_steps=9'],
        rulers['classifier'],
        threads=runner.threads * jobs,
    )

    def student(objective: str, S: int, name: str, full_steps: int) -> dict:
        options = [
            f'--objective={objective}',
            f'--teacher={teacher}',
            f'--S={S}',
            *digits.student_options(objective, S),
        ]
        network = train(runner, name, steps(full_steps), options, rulers['classifier'])
        return row_of(runner, name, network, name, 'student', S, S, images, rulers)

    def of_teacher(solver: str, solver_steps: int, nfe: int) -> dict:
        return row_of(
            runner, f'teacher-{solver}-{nfe}', teacher, 'teacher', solver, solver_steps, nfe, images, rulers
        )

    with workers(runner, jobs) as pool:
        teachers = [
            pool.submit(of_teacher, *row) for row in reversed(TEACHER_ROWS)
        ]  # the longest first, so that no core waits at the end
        students = [
            pool.submit(student, objective, S, f'{name}-{S}', full_steps)
            for objective, (name, runs) in STUDENTS.items()
            for S, full_steps in runs.items()
        ]
        for future in concurrent.futures.as_completed([*students, *teachers]):
            future.result()  # the first that fails ends the others
        return [future.result() for future in (*reversed(teachers), *students)]


def report(runner: Runner, rows: list[dict], minutes: float) -> None:
    """results.json, table.md, the pictures and report.html."""
    from experiments import report as pages

    runner.path('results.json').write_text(json.dumps(rows, indent=2) + '\n')
    header = ['Model', 'Solver', 'NFE', 'Distance (95 % interval)', 'PCA ruler', 'Random ruler', 'Seconds']
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

    names = [f'teacher-{r["solver"]}-{r["nfe"]}' if r['model'] == 'teacher' else r['model'] for r in rows]
    for name in names:
        pages.write_grid(
            sorted(map(str, runner.path('samples', name).glob('*.png')))[:SHOWN],
            str(runner.path(f'samples-{name}.png')),
        )
    shown = ['teacher-euler-8', 'student-8', 'direct-8', 'teacher-heun-511']
    captions = dict(
        zip(names, (f'{r["model"]}, {r["nfe"]} evaluations: distance {r["distance"]:.3g}' for r in rows))
    )
    pages.write_side_by_side(
        {captions[name]: str(runner.path(f'samples-{name}.png')) for name in shown},
        str(runner.path('samples.png')),
    )
    runs = ['teacher', *(r['model'] for r in rows if r['model'] != 'teacher')]
    losses, distances = {}, {}
    for run in runs:
        stats = pages.read_jsonl(runner.path(run, 'stats.jsonl'))[1:]
        key = next(f'Loss/{loss}' for loss in ('diffusion', 'cd', 'direct') if f'Loss/{loss}' in stats[0])
        losses[run] = ([s['Progress/kimg']['mean'] for s in stats], [s[key]['mean'] for s in stats])
        records = [
            record
            for record in pages.read_jsonl(runner.path(run, 'metrics-val.jsonl'))
            if record['fid'] is not None
        ]
        distances[run] = ([r['kimg'] for r in records], [r['fid'] for r in records])
    pages.write_curves(losses, str(runner.path('loss.png')), 'training loss')
    pages.write_curves(
        distances,
        str(runner.path('distance.png')),
        'distance of 512 samples',
        {
            f'teacher, NFE {r["nfe"]} ({r["images"]} samples)': r['distance']
            for r in rows
            if r['model'] == 'teacher'
        },
    )

    captions = [f'{r["model"]}, {r["solver"]}, {r["nfe"]} evaluations' for r in rows]
    grids = ''.join(
        pages.embed(str(runner.path(f'samples-{name}.png')), caption)
        for name, caption in zip(names, captions)
    )
    rulers = '; '.join(f'<b>{name}</b>: {text}' for name, text in digits.RULERS.items())
    who = '; '.join(
        f'<b>{name}-S</b>: students of S steps by --objective={objective}'
        for objective, (name, _) in STUDENTS.items()
    )
    note = (
        f'<p>{who}.</p><p>Fréchet distances between {rows[0]["images"]} samples and the 1,797 real digits of '
        'scikit-learn, in the features of a small digits classifier that the demo trains in seconds. This '
        'is not FID: no Inception network is involved, and the numbers compare with nothing outside this '
        f'page. Two rulers that nobody trained stand beside it. Rulers: {rulers}. Intervals are the sampling '
        f'noise (bootstrap). The whole run took {minutes:.1f} minutes.</p>'
    )
    sections = [
        ('', note + pages.html_table(header, cells)),
        ('Samples, from the same seeds', f'<div class="grids">{grids}</div>'),
        ('Distance during training', pages.embed(str(runner.path('distance.png')), css='wide')),
        ('Loss', pages.embed(str(runner.path('loss.png')), css='wide')),
        ('Commands', f'<pre>{pages.html.escape(chr(10).join(runner.commands))}</pre>'),
    ]
    pages.write_page(
        str(runner.path('report.html')), 'A teacher in 511 evaluations, a student in 8', sections
    )


@click.command(cls=cli.Command)
@cli.option(
    '--outdir', metavar='DIR', type=cli.PATH, default='demo-out', show_default=True, help='Output folder.'
)
@cli.option(
    '--scale',
    metavar='FLOAT',
    type=cli.SOME_FACTOR,
    default=1.0,
    show_default=True,
    help='Factor for the number of training steps and, below 1, of samples. Small values give a meaningless '
    'table.',
)
@cli.option(
    '--jobs',
    metavar='INT',
    type=cli.SOME_WORKERS,
    default=2,
    show_default=True,
    help='Commands to run in parallel.',
)
def main(outdir, scale, jobs):
    """Train a teacher on real digits, distill students of 8 and fewer steps in two ways, and write a report.

    Takes minutes on two cores.
    """
    start = time.monotonic()
    outdir = Path(outdir)
    make_outdir(outdir)
    if any(outdir.iterdir()):
        raise UserError(f'--outdir={outdir} is not empty: remove it, or choose another folder.')
    runner = Runner(outdir, threads=max((os.cpu_count() or 1) // jobs, 1))
    rows = run_interruptibly(
        runner, lambda: run_demo(runner, scale, jobs), f'remove --outdir={outdir} before you begin again.'
    )
    minutes = (time.monotonic() - start) / 60
    report(runner, rows, minutes)
    print('\n' + runner.path('table.md').read_text())
    print(f'{minutes:.1f} minutes. Open {runner.path("report.html")} for the samples, curves and commands.')


if __name__ == '__main__':
    main()
