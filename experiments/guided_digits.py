"""Guided distillation on digits: whether a student of a guided teacher has what guidance gives the teacher.

    python -m experiments.guided_digits

Trains a teacher with some labels dropped, and students of 8 steps of it, unguided and guided (classifier-free).
Measures of all: the share of images that the digits classifier takes for the class that they were made for, and
Fréchet distances, from the data and from the guided teacher's images of other seeds.
"""

from __future__ import annotations

import dnnlib.interrupts  # noqa: F401  (first)

import json
import os
from pathlib import Path
from typing import NamedTuple

import click

from dnnlib import cli
from dnnlib.util import write_json
from experiments import bundled, demo_run
from experiments.bundled import DIGITS
from experiments.options import JOBS, SCALE
from experiments.report import markdown_table
from experiments.results import read_json
from experiments.runner import Metric, Runner, make_outdir, run_interruptibly, workers

S = 8
STEPS = {'mcd': 1250, 'direct': 1000}  # optimizer steps of the students, as in the demo
HEUN_STEPS = 16  # of the teacher, which is best with 12 to 16
HEUN = ('--solver=heun', f'--steps={HEUN_STEPS}')
LABEL_DROPOUT = 0.2


class Model(NamedTuple):
    """A line of the table.

    Attributes:
        name: of its files.
        network: its snapshot.
        sampler: options of generate.py.
        nfe: network evaluations per image.
    """

    name: str
    network: Path
    sampler: tuple[str, ...]
    nfe: int


@click.command(cls=cli.Command)
@cli.option(
    '--outdir',
    metavar='DIR',
    type=cli.PATH,
    default='guidance-out',
    help='Output folder; the same command again resumes there.',
)
@cli.option('--guidance', type=cli.FACTOR, default=2.0, help='Weight of guidance.')
@SCALE
@JOBS
def main(outdir, guidance, scale, jobs):
    """Train a teacher of digits with some labels dropped, distill it unguided and guided, and print a table."""
    outdir = Path(outdir)
    make_outdir(outdir)
    # A folder is of one command.
    settings = dict(guidance=float(guidance), scale=float(scale))
    found = read_json(outdir / 'settings.json', settings)
    if found != settings:
        raise click.UsageError(f'--outdir={outdir} was made with {found}: choose another folder.')
    write_json(outdir / 'settings.json', settings)

    threads = max((os.cpu_count() or 1) // jobs, 1)
    runner = Runner(outdir, threads, record=outdir / 'commands.txt')
    rows = run_interruptibly(
        runner, lambda: run(runner, guidance, scale, jobs), 'run the same command again to resume.'
    )
    write_json(outdir / 'results.json', rows)
    print('\n' + table(rows))


def run(runner: Runner, guidance: float, scale: float, jobs: int) -> list[dict]:
    """Train and measure everything that is not done yet; the rows of the table."""
    images, val_num = (max(round(num * min(scale, 1)), 64) for num in (DIGITS.images, 512))
    scaled = lambda steps: max(round(steps * scale), 5)
    _, metrics = bundled.prepare(DIGITS, runner)
    classifier, guide = metrics['classifier'], ('--guide=none-label', f'--guidance={guidance:g}')

    # The teacher, and images of it, guided, that others are compared with.
    options = [*DIGITS.network, *DIGITS.teacher, f'--label_dropout={LABEL_DROPOUT}', '--val_steps=9']
    teacher = demo_run.train(runner, 'teacher', scaled(DIGITS.teacher_steps), options, classifier, val_num)
    guided_teacher = Model('teacher, guided', teacher, (*HEUN, *guide), 2 * (2 * HEUN_STEPS - 1))
    sample(runner, 'reference', guided_teacher, range(images, 2 * images))
    of_guided = Metric(str(runner.path('guided.npz')), classifier.detector)
    if not Path(of_guided.ref).exists():
        own = f'--data={runner.path("reference.npz")}', f'--dest={of_guided.ref}'
        runner.run('reference', 'fid.py', 'ref', *own, f'--detector={classifier.detector}', '--batch=256')

    def student(objective: str, guided: bool) -> Model:
        name = f'{objective}-{S}{", guided" * guided}'
        options = [f'--objective={objective}', f'--S={S}', f'--teacher={teacher}', *guide[: 2 * guided]]
        options += bundled.student_options(objective, S)
        folder = name.replace(', ', '-')
        network = demo_run.train(runner, folder, scaled(STEPS[objective]), options, classifier, val_num)
        return Model(name, network, ('--solver=student',), S)

    def row(make, *arguments) -> dict:
        return measure(runner, make(*arguments), images, classifier, of_guided)

    with workers(runner, jobs) as pool:
        futures = [
            *(pool.submit(row, student, objective, of) for objective in STEPS for of in (False, True)),
            pool.submit(row, lambda: guided_teacher),
            pool.submit(row, lambda: Model('teacher', teacher, HEUN, 2 * HEUN_STEPS - 1)),
        ]
        students, teachers = futures[:-2], futures[:-3:-1]
        return [future.result() for future in (*teachers, *students)]


def sample(runner: Runner, name: str, model: Model, seeds: range) -> Path:
    """Images of a model, with their classes, in <name>.npz."""
    path = runner.path(f'{name}.npz')
    if not path.exists():
        runner.run(
            name,
            'generate.py',
            f'--network={model.network}',
            f'--dest={path}',
            f'--seeds={seeds[0]}-{seeds[-1]}',
            '--batch=256',
            *model.sampler,
        )
    return path


def measure(runner: Runner, model: Model, images: int, classifier: Metric, of_guided: Metric) -> dict:
    """A row of the table: accuracy, and distances with their 95 % intervals."""
    name = model.name.replace(', ', '-')
    path = sample(runner, name, model, range(images))
    row = dict(model=model.name, nfe=model.nfe, images=images)

    # Distances that an earlier command has measured are read.
    for entry, metric in (('data', classifier), ('guided', of_guided)):
        found = runner.path(f'{name}-{entry}.json')
        if not found.exists():
            common = (
                f'--images={path}',
                f'--num={images}',
                '--batch=256',
                '--bootstrap=200',
                f'--json={found}',
            )
            runner.run(
                name, 'fid.py', 'calc', *common, f'--ref={metric.ref}', f'--detector={metric.detector}'
            )
        value = json.loads(found.read_text())['fid']
        row |= {f'distance_{entry}': value['value'], f'interval_{entry}': value['interval']}
    return dict(row, accuracy=accuracy(path, runner.path('rulers', 'classifier.pt')))


def accuracy(images: Path, classifier: Path) -> float:
    """The share of images that the classifier takes for their class.

    Args:
        images: .npz of generate.py. classifier: that of `metrics.small_detectors`, whose features lead to its classes.
    """
    import numpy as np
    import torch

    with np.load(images) as file:
        pixels, classes = (torch.from_numpy(file[name]) for name in ('arr_0', 'arr_1'))
    network = torch.jit.load(classifier)
    with torch.no_grad():
        predicted = network.out(network(pixels.permute(0, 3, 1, 2))).argmax(dim=1)
    return (predicted == classes).double().mean().item()


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    distance = lambda row, entry: '{:.4f} ({:.4f} to {:.4f})'.format(
        row[f'distance_{entry}'], *row[f'interval_{entry}']
    )
    header = [
        'model',
        'evaluations',
        'accuracy',
        'distance from the data',
        "from the guided teacher's images",
    ]
    # A line of each model, in the order in which they were measured.
    cells = lambda row: [
        row['model'],
        row['nfe'],
        f'{100 * row["accuracy"]:.1f} %',
        distance(row, 'data'),
        distance(row, 'guided'),
    ]
    return markdown_table(header, list(map(cells, rows)))


if __name__ == '__main__':
    main()
