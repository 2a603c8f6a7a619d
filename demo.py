"""The whole story on real digits, in minutes on a laptop: a teacher that needs 511 evaluations, students that need 8 or fewer.

Drives the scripts of this repository as a user would, prints every command before it runs, and writes a report.
"""
from __future__ import annotations

import concurrent.futures
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import click

from dnnlib import UserError, cli

ROOT = Path(__file__).resolve().parent
RULERS = dict(classifier='digits classifier, trained here', pca='PCA of raw pixels', random='fixed random convolution')
IMAGES = 1797  # as many as there are digits
BATCH = 128
SHOWN = 40     # images in a grid

NETWORK = ['--arch=adm', '--cbase=16', '--cres=1,2', '--num_blocks=1', '--attn_resolutions=none']
COMMON = ['--cond=1', f'--batch={BATCH}', '--workers=0', '--seed=0', '--nosubdir', '--snap=10', '--dump=0', '--lr_schedule=cosine']
TEACHER_STEPS, TEACHER = 4000, ['--lr=2e-3', '--ema=40kimg', '--augment=0', '--dropout=0', '--lr_rampup=20']
STUDENT = ['--consistency=True', '--lr=1e-3', '--ema=20kimg', '--lr_rampup=5', '--student_grid=full']
STUDENT_STEPS = {8: 2000, 4: 1500, 2: 1000}
TEACHER_ROWS = [('euler', 8, 8), ('heun', 256, 511)]  # solver, steps, NFE


@dataclass
class Story:
    """Runs commands of the repository and remembers them; `threads` is what each command may use while several run side by side."""

    outdir: Path
    threads: int
    commands: list[str] = field(default_factory=list)
    running: set[subprocess.Popen] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def say(self, line: str) -> None:
        with self.lock:
            print(line, flush=True)

    def run(self, name: str, *arguments, threads: int | None = None) -> str:
        """Run `python <arguments>`; its lines appear behind [name], and its stdout is returned."""
        script = [os.path.relpath(ROOT / arguments[0])] if arguments[0].endswith('.py') else [arguments[0]]
        shown = ['python', *script, *map(str, arguments[1:])]
        with self.lock:
            self.commands.append(shlex.join(shown))
            print(f'$ {shlex.join(shown)}', flush=True)
        env = dict(os.environ, OMP_NUM_THREADS=str(threads or self.threads), PYTHONUNBUFFERED='1', PYTHONPATH=str(ROOT))
        process = subprocess.Popen([sys.executable, '-W', 'ignore', *shown[1:]], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.running.add(process)
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip())
            self.say(f'[{name}] {line.rstrip()}')
        self.running.discard(process)
        if process.wait() != 0:
            raise UserError(f'`{shlex.join(shown)}` failed with exit status {process.returncode}; its last line: {lines[-1] if lines else "none"}')
        return '\n'.join(lines)

    def stop(self) -> None:
        """End what still runs: one command failed, and the others' work is of no use."""
        for process in list(self.running):
            process.terminate()

    def path(self, *parts: str) -> Path:
        return self.outdir.joinpath(*parts)


def prepare(story: Story) -> None:
    """Data, rulers, reference statistics."""
    story.run('data', 'dataset_tool.py', '--source=digits', f'--dest={story.path("digits.zip")}')
    story.run('rulers', '-m', 'metrics.rulers', f'--data={story.path("digits.zip")}', f'--outdir={story.path("rulers")}')
    for ruler in RULERS:
        story.run('rulers', 'fid.py', 'ref', f'--data={story.path("digits.zip")}', f'--dest={story.path("rulers", f"{ruler}.npz")}',
                  f'--detector={story.path("rulers", f"{ruler}.pt")}', '--batch=256')


def train(story: Story, name: str, steps: int, options: list[str], threads: int | None = None) -> Path:
    """Train a network of the demo's size, with ten evaluations on the way; returns its snapshot."""
    kimg = steps * BATCH / 1000
    story.run(name, 'train.py', f'--outdir={story.path(name)}', f'--data={story.path("digits.zip")}', *COMMON, *options,
              f'--duration={kimg / 1000:g}', f'--tick={kimg / 10:g}',
              '--val=1', '--val_every=1', '--val_num=512', '--val_batch=256', f'--val_ref={story.path("rulers", "classifier.npz")}',
              f'--val_detector={story.path("rulers", "classifier.pt")}', threads=threads)
    return max(story.path(name).glob('network-snapshot-*.pkl'), key=os.path.getmtime)


def measure(story: Story, name: str, network: Path, model: str, solver: str, steps: int, nfe: int, images: int) -> dict:
    """Sample and measure with every ruler: a row of the table."""
    folder, start = story.path('samples', name), time.time()
    story.run(name, 'generate.py', f'--network={network}', f'--outdir={folder}', f'--seeds=0-{images - 1}', '--batch=256', f'--solver={solver}',
              f'--steps={steps}')
    row = dict(model=model, solver=solver, nfe=nfe, images=images, seconds=round(time.time() - start, 1))
    for ruler in RULERS:
        result = story.path('samples', f'{name}-{ruler}.json')
        story.run(name, 'fid.py', 'calc', f'--images={folder}', f'--ref={story.path("rulers", f"{ruler}.npz")}', f'--num={images}', '--batch=256',
                  f'--detector={story.path("rulers", f"{ruler}.pt")}', '--bootstrap=200', f'--json={result}')
        found = json.loads(result.read_text())['fid']
        suffix = '' if ruler == 'classifier' else f'_{ruler}'
        row |= {f'distance{suffix}': found['value'], f'interval{suffix}': found['interval']}
    return row


def story_of(story: Story, scale: float, jobs: int) -> list[dict]:
    """Teacher first, then students and measurements side by side; returns the rows of the table."""
    images = max(round(IMAGES * min(scale, 1)), 128)
    steps = lambda full: max(round(full * scale), 10)
    prepare(story)
    teacher = train(story, 'teacher', steps(TEACHER_STEPS), [*NETWORK, *TEACHER, '--val_steps=9'], threads=story.threads * jobs)

    def student(S: int) -> dict:
        kimg = steps(STUDENT_STEPS[S]) * BATCH / 1000
        options = [*STUDENT, f'--teacher={teacher}', f'--S={S}', f'--T_anneal_kimg={kimg / 2:g}']
        network = train(story, f'student-{S}', steps(STUDENT_STEPS[S]), options)
        return measure(story, f'student-{S}', network, f'student-{S}', 'student', S, S, images)

    def of_teacher(solver: str, solver_steps: int, nfe: int) -> dict:
        return measure(story, f'teacher-{solver}-{nfe}', teacher, 'teacher', solver, solver_steps, nfe, images)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        # The long ones first, so that no core waits at the end.
        students = [pool.submit(student, S) for S in (8, 4)]
        teachers = [pool.submit(of_teacher, *row) for row in reversed(TEACHER_ROWS)]
        students.append(pool.submit(student, 2))
        try:
            concurrent.futures.wait([*students, *teachers], return_when=concurrent.futures.FIRST_EXCEPTION)
            return [future.result() for future in (*reversed(teachers), *students)]
        except UserError:
            pool.shutdown(wait=False, cancel_futures=True)
            story.stop()
            raise


def report(story: Story, rows: list[dict], minutes: float) -> None:
    """results.json, table.md, the pictures and report.html."""
    from metrics import report as pages
    story.path('results.json').write_text(json.dumps(rows, indent=2) + '\n')
    header = ['Model', 'Solver', 'NFE', 'Distance (95 % interval)', 'PCA ruler', 'Random ruler', 'Seconds']
    cells = [[r['model'], r['solver'], r['nfe'], f'{r["distance"]:.3f} ({r["interval"][0]:.3f} to {r["interval"][1]:.3f})',
              f'{r["distance_pca"]:.3f}', f'{r["distance_random"]:.4f}', r['seconds']] for r in rows]
    story.path('table.md').write_text(pages.markdown_table(header, cells))

    names = [f'teacher-{r["solver"]}-{r["nfe"]}' if r['model'] == 'teacher' else r['model'] for r in rows]
    for name in names:
        pages.write_grid(sorted(map(str, story.path('samples', name).glob('*.png')))[:SHOWN], str(story.path(f'samples-{name}.png')))
    shown = ['teacher-euler-8', 'student-8', 'teacher-heun-511']
    captions = dict(zip(names, (f'{r["model"]}, {r["nfe"]} evaluations: distance {r["distance"]:.3g}' for r in rows)))
    pages.write_side_by_side({captions[name]: str(story.path(f'samples-{name}.png')) for name in shown}, str(story.path('samples.png')))
    runs = ['teacher', *(r['model'] for r in rows if r['model'] != 'teacher')]
    losses, distances = {}, {}
    for run in runs:
        stats = pages.read_jsonl(story.path(run, 'stats.jsonl'))[1:]
        key = 'Loss/diffusion' if run == 'teacher' else 'Loss/cd'
        losses[run] = ([s['Progress/kimg']['mean'] for s in stats], [s[key]['mean'] for s in stats])
        records = pages.read_jsonl(story.path(run, 'metrics-val.jsonl'))
        distances[run] = ([r['kimg'] for r in records], [r['fid'] for r in records])
    pages.write_curves(losses, str(story.path('loss.png')), 'training loss')
    pages.write_curves(distances, str(story.path('distance.png')), 'distance of 512 samples',
                       {f'teacher, NFE {r["nfe"]} ({r["images"]} samples)': r['distance'] for r in rows if r['model'] == 'teacher'})

    captions = [f'{r["model"]}, {r["solver"]}, {r["nfe"]} evaluations' for r in rows]
    grids = ''.join(pages.embed(str(story.path(f'samples-{name}.png')), caption) for name, caption in zip(names, captions))
    rulers = '; '.join(f'<b>{name}</b>: {text}' for name, text in RULERS.items())
    note = (f'<p>Fréchet distances between {rows[0]["images"]} samples and the 1,797 real digits of scikit-learn, in the features of a small digits '
            'classifier that the demo trains in seconds. This is not FID: no Inception network is involved, and the numbers compare with nothing '
            f'outside this page. Two rulers that nobody trained stand beside it. Rulers: {rulers}. Intervals are the sampling noise (bootstrap). '
            f'The whole run took {minutes:.1f} minutes.</p>')
    sections = [('', note + pages.html_table(header, cells)), ('Samples, from the same seeds', f'<div class="grids">{grids}</div>'),
                ('Distance during training', pages.embed(str(story.path('distance.png')), css='wide')),
                ('Loss', pages.embed(str(story.path('loss.png')), css='wide')),
                ('Commands', f'<pre>{pages.html.escape(chr(10).join(story.commands))}</pre>')]
    pages.write_page(str(story.path('report.html')), 'A teacher in 511 evaluations, a student in 8', sections)


@click.command(cls=cli.Command)
@cli.option('--outdir', metavar='DIR', default='demo-out', show_default=True, help='Folder for everything that the demo writes.')
@cli.option('--scale', metavar='FLOAT', type=cli.POSITIVE, default=1.0, show_default=True,
            help='Factor on the training steps; below 1 on the number of samples too. The table means nothing for small values.')
@cli.option('--jobs', metavar='INT', type=click.IntRange(min=1), default=2, show_default=True, help='Commands that run side by side.')
def main(outdir, scale, jobs):
    """Train a teacher on real digits, distil students of 8, 4 and 2 steps, compare them, and write a report. Minutes on two cores."""
    start = time.time()
    outdir = Path(outdir)
    try:
        outdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'--outdir={outdir} cannot be made: {error.strerror}') from error
    if any(outdir.iterdir()):
        raise UserError(f'--outdir={outdir} is not empty: remove it, or choose another folder.')
    story = Story(outdir, threads=max((os.cpu_count() or 1) // jobs, 1))
    rows = story_of(story, scale, jobs)
    minutes = (time.time() - start) / 60
    report(story, rows, minutes)
    print('\n' + story.path('table.md').read_text())
    print(f'{minutes:.1f} minutes. Open {story.path("report.html")} for the samples, curves and commands.')


if __name__ == '__main__':
    main()
