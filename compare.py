"""Objectives side by side: one teacher, an equal budget of network evaluations for each student, the same
rulers; a table, a plot, samples.

Drives the scripts of this repository as a user would and prints every command before it runs. Called again,
it does what is left to do.
"""

from __future__ import annotations

import dnnlib.interrupts  # noqa: F401  (first)

import concurrent.futures
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from dnnlib import EasyDict, UserError, cli, schema
from dnnlib.util import atomic_write
from experiments import comparison, digits
from experiments.comparison import Model, Request, Training
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
from training.objectives import OBJECTIVES

if TYPE_CHECKING:
    import numpy as np

DIGITS = 'digits'
STUDENTS = [name for name, objective in OBJECTIVES.items() if objective.loss]
TRAINING, MEASURING = 'Training', 'Measuring'
NAME = re.compile(
    r'[\w.+-]{1,100}', re.ASCII
)  # of a model, which is the name of a file as well, and of a solver
DAMAGED = '{} is damaged: delete it, or choose another --outdir.'
GOES_ON = 'the same command again goes on from here.'
DIGITS_DATA = EasyDict(resolution=8, num_channels=1, holds_latents=False)


class Objectives(click.ParamType):
    """Comma-separated names of objectives, or `all`."""

    name = 'list'

    def convert(self, value, param, ctx):
        names = (
            STUDENTS
            if value == 'all'
            else [name.strip() for name in value.split(',')]
            if isinstance(value, str)
            else value
        )
        for name in names:
            if name not in STUDENTS or names.count(name) > 1:
                self.fail(
                    f'{name!r} is {"named twice" if name in STUDENTS else "none of " + ", ".join(STUDENTS)}',
                    param,
                    ctx,
                )
        return names


class Counts(cli.NumberList):
    """Comma-separated different positive integers."""

    def convert(self, value, param, ctx):
        numbers = super().convert(value, param, ctx)
        if not numbers or len(set(numbers)) < len(numbers):
            self.fail(f'{value!r} is no list of different numbers from 1 on', param, ctx)
        return sorted(numbers)


class OptionsFor(click.ParamType):
    """`NAME:OPTIONS`, such as `direct:--substeps=3 --top-mass=1`."""

    name = 'text'

    def convert(self, value, param, ctx):
        import shlex

        if isinstance(value, tuple):
            return value
        name, colon, words = value.partition(':')
        if not colon:
            self.fail(f'{value!r} is not NAME:OPTIONS, such as direct:--substeps=3', param, ctx)
        try:
            return name.strip(), shlex.split(words)
        except ValueError as error:
            self.fail(f'{value!r}: {error}', param, ctx)


# ----------------------------------------------------------------------------
# Training and measuring, each thing once.


class Results:
    """The rows that were measured, by all `rulers`, in a file that is whole at any time."""

    def __init__(self, path: Path, rulers: Sequence[str]):
        self.path, self.lock = path, threading.Lock()
        found = read_json(path, [])
        if not all(is_row(row, rulers) for row in found):
            raise UserError(DAMAGED.format(path))
        self.rows: dict[str, dict] = {row['model']: row for row in found}

    def add(self, row: dict) -> None:
        with self.lock:
            self.rows[row['model']] = row
            write_json(self.path, list(self.rows.values()))


def entries_of(rulers: Sequence[str]) -> dict[str, str]:
    """{ruler: where a row has the distance by it}"""
    return {ruler: f'distance_{ruler}' if i else 'distance' for i, ruler in enumerate(rulers)}


def is_row(row: object, rulers: Sequence[str]) -> bool:
    """Whether this has what tables and plots read of a row: the teacher's have `seed` null, and nothing of
    training."""
    if not isinstance(row, dict) or row.get('objective') not in list(OBJECTIVES) or 'seed' not in row:
        return False
    of_training = [] if row['seed'] is None else ['seed', 'train_steps', 'cost', 'evaluations']
    numbers = ['nfe', 'images', *of_training, *entries_of(rulers).values()]
    return (
        all(isinstance(row.get(name), str) and NAME.fullmatch(row[name]) for name in ('model', 'solver'))
        and all(isinstance(row.get(name), (int, float)) for name in numbers)
        and all(row[name] > 0 for name in entries_of(rulers).values())
    )


def read_json(path: Path, default: list | dict) -> list | dict:
    """Contents of a file of ours, with the keys of the default, and values of its types. Raises: UserError
    where it is damaged."""
    if not path.exists():
        return default
    try:
        value = schema.read_json(path, schema.Plain(), 'a record of results')
    except (OSError, ValueError) as error:
        raise UserError(DAMAGED.format(path)) from error
    types = lambda of: {name: type(entry) for name, entry in of.items()} if isinstance(of, dict) else type(of)
    if types(value) != types(default):
        raise UserError(DAMAGED.format(path))
    return value


def write_json(path: Path, value) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=2).encode() + b'\n')


def settle(outdir: Path, settings: dict, trainings: Sequence[Training]) -> None:
    """Write down what a comparison is, or see to it that it is the one that the folder holds; it may grow by
    trainings.

    Raises: UserError where it is another one.
    """
    path, now = outdir / 'plan.json', {training.name: list(training.options) for training in trainings}
    earlier = read_json(path, dict(settings=settings, trainings={}))
    for name, value in settings.items():
        if earlier['settings'].get(name) != value:
            raise UserError(
                f'--outdir={outdir} holds a comparison with {name} = '
                f'{json.dumps(earlier["settings"].get(name))}, now it is {json.dumps(value)}: go on with the '
                'options it was made with, or choose another folder.'
            )
    for name, options in now.items():
        then = earlier['trainings'].get(name, options)
        if then != options:
            change = ' '.join(option for option in then if option not in options) or 'none of ' + ' '.join(
                set(options) - set(then)
            )
            raise UserError(
                f'--outdir={outdir} holds {name} trained with {change}, and these options make another '
                'network of it: go on with the options it was made with, or choose another folder.'
            )
    write_json(path, dict(settings=settings, trainings={**earlier['trainings'], **now}))


def train(
    runner: Runner, training: Training, data: Path | str, teacher: str | None, threads: int | None = None
) -> None:
    """See to it that a training is finished: begin it, or go on with it. It starts from the snapshot
    `teacher`, or from another training's."""
    folder = runner.path('trainings', training.name)
    if is_finished(folder, training):
        return
    begun = any(folder.rglob('training-state-*.pt'))
    if not begun:
        shutil.rmtree(folder, ignore_errors=True)
    source = snapshot(runner, training.after) if training.after else teacher
    origin = (
        [f'{training.start}={source}']
        if training.start == '--teacher' or (training.start and not begun)
        else []
    )
    origin += [f'--resume={folder}'] if begun else []
    kimg = training.steps * training.batch / 1e3 / len(training.stages)
    runner.run(
        training.name,
        'train.py',
        f'--outdir={folder}',
        '--nosubdir',
        f'--data={data}',
        *origin,
        *training.options,
        f'--tick={max(kimg / 10, 1e-3):g}',
        f'--snap={10**6}',
        '--dump=1',
        '--keep=1',
        threads=threads,
    )


def is_finished(folder: Path, training: Training) -> bool:
    """Whether train.py has said so, of the last stage."""
    log = folder / training.stages[-1][0] / 'log.txt'
    return log.exists() and log.read_text().rstrip().endswith('\nDone.')


def snapshot(runner: Runner, training: Training, stage: int = -1) -> Path:
    """The last one of a finished training, or of one of its stages."""
    return newest_snapshot(runner.path('trainings', training.name, training.stages[stage][0]))


def measure_model(
    runner: Runner,
    model: Model,
    teacher: str,
    rulers: dict[str, Ruler],
    num: int,
    batch: int,
    labels: str | None = None,
) -> dict:
    """A row of the results. Of the images a grid is kept. `labels`: as --labels of generate.py."""
    from experiments.report import write_grid

    network = snapshot(runner, model.training, model.stage) if model.training else teacher
    row = model.record() | measure(
        runner, model.name, network, model.solver, model.steps, num, rulers, batch, labels=labels
    )
    images = runner.path('samples', model.name)
    runner.path('grids').mkdir(exist_ok=True)
    write_grid(sorted(map(str, images.glob('*.png')))[:SHOWN], str(runner.path('grids', f'{model.name}.png')))
    shutil.rmtree(images)
    return row


def jobs_of(
    runner: Runner,
    models: Sequence[Model],
    data: Path | str,
    teacher: str,
    rulers: dict[str, Ruler],
    num: int,
    batch: int,
    results: Results,
    labels: str | None = None,
) -> list[tuple[float, str, Callable[[], None]]]:
    """What is left to do, as (network evaluations, name, function): a training with the measurements of its
    models each, longest first."""
    groups: dict[str, list[Model]] = {}
    for model in models:
        groups.setdefault(model.training.name if model.training else model.name, []).append(model)

    def do(group: list[Model]) -> None:
        for training in group[0].training.chain if group[0].training else []:
            train(runner, training, data, teacher)
        for model in group:
            results.add(measure_model(runner, model, teacher, rulers, num, batch, labels))

    jobs = []
    for name, group in groups.items():
        if group := [model for model in group if model.name not in results.rows]:
            training = group[0].training
            work = (training.evaluations * training.batch if training else 0) + sum(
                model.nfe for model in group
            ) * num
            jobs.append((work, name, lambda group=group: do(group)))
    return sorted(jobs, key=lambda job: -job[0])


def do_all(runner: Runner, jobs: list[tuple[float, str, Callable[[], None]]], side_by_side: int) -> list[str]:
    """Do the jobs; one that fails does not keep the others from being done. Returns what was wrong with those
    that failed."""
    with workers(runner, side_by_side) as pool:
        futures = {pool.submit(function): name for _, name, function in jobs}
        return [
            f'{futures[future]}: {error}'
            for future in concurrent.futures.as_completed(futures)
            if (error := failure(future))
        ]


def failure(future: concurrent.futures.Future) -> UserError | None:
    """The user's error that a job ended with; any other is raised."""
    error = future.exception()
    if error is not None and not isinstance(error, UserError):
        raise error
    return error


# ----------------------------------------------------------------------------
# Tables and pages.


def of_students(rows: Sequence[dict]) -> dict[str, dict[int, list[dict]]]:
    """{objective: {evaluations: rows, one for each seed}}, in the order of the registry."""
    table = {name: {} for name in STUDENTS}
    for row in sorted(
        (row for row in rows if row['seed'] is not None), key=lambda row: (row['nfe'], row['seed'])
    ):
        table[row['objective']].setdefault(row['nfe'], []).append(row)
    return {name: cells for name, cells in table.items() if cells}


def of_teacher(rows: Sequence[dict], solver: str) -> dict[int, dict]:
    """{evaluations: row} of one of the teacher's solvers."""
    return {row['nfe']: row for row in rows if row['seed'] is None and row['solver'] == solver}


def distances_table(rows: Sequence[dict], best: dict, entry: str) -> tuple[list[str], list[list[str]]]:
    """Header and lines: ratios to the distance of the row `best`, the teacher's in many evaluations, and in
    brackets the distance of each seed."""
    students, euler, heun = of_students(rows), of_teacher(rows, 'euler'), of_teacher(rows, 'heun')
    reference = best[entry]
    columns = sorted({nfe for cells in students.values() for nfe in cells} | set(euler))
    text = lambda found: (
        f'{sum(row[entry] for row in found) / len(found) / reference:.2f} '
        f'({", ".join(f"{row[entry]:.4g}" for row in found)})'
    )
    lines = [
        [name, *(text(cells[n]) if n in cells else '' for n in columns)] for name, cells in students.items()
    ]
    lines.append(['teacher, Euler', *(text([euler[n]]) if n in euler else '' for n in columns)])
    near = {n: next((k for k in (n, n - 1) if k in heun and k != best['nfe']), None) for n in columns}
    lines.append(
        [
            'teacher, Heun',
            *(f'{text([heun[near[n]]])}, {near[n]} evaluations' if near[n] else '' for n in columns),
        ]
    )
    return ['objective', *map(str, columns)], [line for line in lines if any(line[1:])]


def training_table(rows: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: optimizer steps times network evaluations for an image."""
    students = of_students(rows)
    columns = sorted({nfe for cells in students.values() for nfe in cells})
    text = lambda row: f'{row["train_steps"]:,} × {row["cost"]:.3g}'
    lines = [
        [name, *(text(cells[n][0]) if n in cells else '' for n in columns)]
        for name, cells in students.items()
    ]
    return ['objective', *map(str, columns)], lines


def notes(rows: Sequence[dict], best: dict, budget: int, batch: int, rulers: Sequence[str]) -> list[str]:
    """What a reader of the tables has to know."""
    students = of_students(rows)
    having = lambda condition: [name for name in students if condition(OBJECTIVES[name])]
    lines = [
        f'Columns are network evaluations of an image. The budget of a model is {budget:,} network '
        'evaluations for each place in the batch of '
        f"{batch}, where a forward pass counts 1 and the student's forward and backward together 3.",
        f"Ratios are to the teacher's own distance with {best['nfe']} evaluations (Heun); in brackets the Fréchet distance of "
        f'{best["images"]:,} images, of each training seed. By {next(iter(rulers))}, that of the teacher is '
        f'{best["distance"]:.4g}.',
    ]
    about = [
        (
            lambda o: 'S' in o.options and 'S_start' not in o.own,
            'a student for each number of steps, each with the whole budget.',
        ),
        (
            lambda o: 'S_start' in o.own,
            'one chain of students, which has the budget as a whole; each is what it had made by then.',
        ),
        (lambda o: 'S' not in o.options, 'one model for all columns, sampled in that many stochastic steps.'),
        (
            lambda o: o.teacher == 'consistency',
            'half of the budget for the first stage, ect, half for the second.',
        ),
        (lambda o: not o.teacher, 'no teacher in training, but its weights to start from.'),
    ]
    lines += [f'{", ".join(names)}: {text}' for condition, text in about if (names := having(condition))]
    if set(rulers) == set(digits.RULERS):
        lines.append(
            'The rulers are made for this data: a classifier trained on it, principal components of its '
            'pixels, a random convolution. This is not FID, and compares with nothing outside this table.'
        )
    return lines


def report(
    runner: Runner, rows: Sequence[dict], best: dict, budget: int, batch: int, rulers: Sequence[str]
) -> None:
    """table.md, compare.png, samples.png and report.html; all is held against the row `best`."""
    from experiments import report as pages

    tables = {
        f'Distance by {ruler}': distances_table(rows, best, entry)
        for ruler, entry in entries_of(rulers).items()
    }
    tables['Optimizer steps × network evaluations for an image'] = training_table(rows)
    text = notes(rows, best, budget, batch, rulers)
    runner.path('table.md').write_text(
        '\n'.join(
            [
                *(f'{title}:\n\n{pages.markdown_table(*table)}' for title, table in tables.items()),
                *(f'- {line}' for line in text),
            ]
        )
        + '\n'
    )
    students, euler, heun = of_students(rows), of_teacher(rows, 'euler'), of_teacher(rows, 'heun')
    lines = {
        name: {nfe: [row['distance'] for row in found] for nfe, found in cells.items()}
        for name, cells in students.items()
    }
    lines['teacher, Euler'] = {nfe: [row['distance']] for nfe, row in euler.items()}
    lines['teacher, Heun'] = {nfe: [row['distance']] for nfe, row in heun.items() if row is not best}
    pages.write_frontier(
        lines,
        str(runner.path('compare.png')),
        f'Fréchet distance ({next(iter(rulers))})',
        (f'teacher, {best["nfe"]} evaluations', best['distance']),
    )
    grid = lambda row: str(runner.path('grids', f'{row["model"]}.png'))
    pictures = {
        name: {nfe: grid(found[0]) for nfe, found in cells.items()}
        for name, cells in {**students, 'teacher, Euler': {nfe: [row] for nfe, row in euler.items()}}.items()
    }
    pages.write_strips(pictures, str(runner.path('samples.png')))
    shown = [pages.embed(grid(row), f'{row["model"]}: {row["distance"]:.4g}') for row in rows]
    commands = runner.record.read_text() if runner.record.exists() else ''
    pages.write_page(
        str(runner.path('report.html')),
        'Objectives side by side',
        [
            (
                '',
                pages.embed(str(runner.path('compare.png')), css='wide')
                + ''.join(f'<p>{pages.html.escape(line)}</p>' for line in text),
            ),
            *((title, pages.html_table(*table)) for title, table in tables.items()),
            ('Samples, from the same seeds', pages.embed(str(runner.path('samples.png')), css='wide')),
            ('More of them', f'<div class="grids">{"".join(shown)}</div>'),
            ('Commands', f'<pre>{pages.html.escape(commands)}</pre>'),
        ],
    )


# ----------------------------------------------------------------------------
# Command line.


def check_usage(data: str, teacher: str | None, refs: Sequence[str], detectors: Sequence[str]) -> None:
    """Combinations of options that make no sense whatever the files hold; exit status 2."""
    if data != DIGITS and not (teacher and refs):
        raise click.UsageError(f'--data={data} needs --teacher=PKL and --ref=NPZ (made by fid.py ref).')
    if data == DIGITS and (refs or detectors):
        raise click.UsageError('--data=digits has rulers of its own: leave --ref and --detector out.')
    if detectors and len(detectors) != len(refs):
        raise click.UsageError(
            f'{len(detectors)} --detector for {len(refs)} --ref: give one for each, in the same order.'
        )


def read_rulers(
    refs: Sequence[str], detectors: Sequence[str], image_shape: list[int] | None
) -> tuple[dict[str, Ruler], dict[str, list]]:
    """The rulers by name, and what makes them what they are: digests of the reference and of the detector.

    Args:
        image_shape: [C, H, W] of the images to be measured, where that is known.
    Raises: UserError where a reference or its detector cannot be used.
    """
    from dnnlib.downloads import file_sha256, local_path, pinned
    from dnnlib.util import named
    from metrics.calc import count_features
    from metrics.detectors import INCEPTION_URL, ScriptNetwork, load_detector
    from metrics.reference import check_same_detector, load_reference

    rulers = {
        Path(ref.partition('#')[0]).stem: Ruler(ref, detector)
        for ref, detector in zip(refs, detectors or [None] * len(refs))
    }
    if len(rulers) < len(refs):
        raise click.UsageError('--ref: two files have the same name, which names the ruler in the table.')
    facts, references = {}, {}
    for name, (ref, _) in rulers.items():  # all of them before the first detector, which may be a download
        with named('--ref'):
            references[name] = load_reference(ref)
    for name, (ref, source) in rulers.items():
        with named('--detector'):
            detector = load_detector(source or INCEPTION_URL)
        reference = references[name]
        if image_shape:
            count_features(detector, image_shape)
        check_same_detector(reference, detector, ref, image_shape)
        facts[name] = [file_sha256(local_path(ref)), detector.digest]
        if isinstance(detector.network, ScriptNetwork) and source:
            rulers[name] = Ruler(ref, pinned(source, detector.digest))
    return rulers, facts


class Teacher(NamedTuple):
    """What a comparison has to know of its teacher.

    Attributes:
        digest: of its file.
        cond: whether it knows classes.
        network: options of train.py that make its network, where they are needed.
        image_shape: [C, H, W]; None of a network of latents.
        labels: what --labels of generate.py has to draw from for everyone, where that are not all classes:
            [N] classes or [N, D] vectors.
    """

    digest: str = 'trained here'
    cond: bool = True
    network: Sequence[str] = tuple(digits.NETWORK)
    image_shape: list[int] | None = None
    labels: np.ndarray | None = None


def describe_teacher(teacher: str, data: str, objectives: Sequence[str]) -> Teacher:
    """Raises: UserError where it is a student, or not one of such data, or lacks options that `objectives`
    need."""
    from data.dataset import ImageFolderDataset
    from data.label_space import LabelSpace
    from dnnlib.downloads import file_sha256, local_path
    from training import command_line
    from training.checkpoint import load_network
    from training.starting_point import check_teacher

    net = load_network(teacher)
    cond, needy = bool(net.label_dim), comparison.starting_from_weights(objectives)
    dataset = (
        EasyDict(DIGITS_DATA, label_space=LabelSpace(10 * cond))
        if data == DIGITS
        else ImageFolderDataset(data, use_labels=cond)
    )
    o = command_line.choose(dict(outdir=data, data=data, teacher=teacher, objective='mcd', augment=0.0))
    check_teacher(o, dataset, net)
    shape = None if 'encoder' in net.metadata else [net.img_channels, net.img_resolution, net.img_resolution]
    options = comparison.network_options(net, needy) if needy else []
    return Teacher(file_sha256(local_path(teacher)), cond, options, shape, labels_for_all(net, dataset))


def labels_for_all(teacher, dataset) -> np.ndarray | None:
    """What teacher and students are sampled with, where that is not each of all classes: the vectors of the
    data, or the classes that both have."""
    import numpy as np

    from data.label_space import space_of

    known, there = dataset.label_space, space_of(teacher)
    if known.are_vectors:
        return dataset.labels.values
    absent = {*known.absent, *there.absent}
    return np.array([k for k in range(known.dim) if k not in absent]) if absent else None


def write_labels(outdir: Path, labels: np.ndarray | None) -> str | None:
    """The file that --labels of generate.py takes."""
    import numpy as np

    from dnnlib.util import atomic_write

    if labels is None:
        return None
    path = outdir / 'labels.npy'
    with atomic_write(path) as file:
        np.save(file, labels)
    return str(path)


@click.command(cls=cli.Command)
@cli.option(
    '--outdir',
    metavar='DIR',
    type=cli.PATH,
    default='compare-out',
    show_default=True,
    help='Output folder; the same command again resumes there.',
)
@cli.option(
    '--data',
    metavar='ZIP|DIR',
    type=cli.PATH,
    default=DIGITS,
    show_default=True,
    help="Data set, made by dataset_tool.py; or digits, for scikit-learn's digits with suitable metrics and "
    'options.',
)
@cli.option(
    '--teacher',
    metavar='PKL|URL',
    type=cli.PATH,
    help="Diffusion model that all students start from.  [default: on digits the demo's, trained first]",
)
@cli.option(
    '--jobs',
    metavar='INT',
    type=cli.SOME_WORKERS,
    default=2,
    show_default=True,
    help='Commands to run in parallel.',
)
@cli.option(
    '--objectives',
    metavar='LIST',
    type=Objectives(),
    default='all',
    show_default=True,
    group=TRAINING,
    help='Objectives to compare, or all.',
)
@cli.option(
    '--budget',
    metavar='INT',
    type=cli.COUNT,
    default=10000,
    show_default=True,
    group=TRAINING,
    help='Network evaluations per training and batch element, of which a forward and backward pass of the '
    'student counts as 3.',
)
@cli.option(
    '--batch',
    metavar='INT',
    type=cli.BATCH,
    default=digits.BATCH,
    show_default=True,
    group=TRAINING,
    help='Training batch size.',
)
@cli.option(
    '--seeds',
    metavar='LIST',
    type=cli.Seeds(),
    default='0',
    show_default=True,
    group=TRAINING,
    help='Training seeds; each objective is trained with each.',
)
@cli.option(
    '--with',
    'extra',
    metavar='NAME:OPTIONS',
    type=OptionsFor(),
    multiple=True,
    group=TRAINING,
    help="Additional train.py options for an objective or its S-step student, such as 'direct:--top-mass=1' or "
    "'direct-8:--substeps=2'.",
)
@cli.option(
    '--steps',
    metavar='LIST',
    type=Counts(cli.STEPS),
    default='1,2,4,8',
    show_default=True,
    group=MEASURING,
    help='Numbers of sampling steps to compare.',
)
@cli.option(
    '--reference-steps',
    metavar='INT',
    type=cli.LEVELS,
    default=256,
    show_default=True,
    group=MEASURING,
    help='Heun steps of the teacher samples that all others are compared with.',
)
@cli.option(
    '--num',
    metavar='INT',
    type=cli.Integer(min=SHOWN),
    group=MEASURING,
    help='Number of images per model.  [default: 50000; on digits 6000]',
)
@cli.option(
    '--ref',
    'refs',
    metavar='NPZ|URL',
    type=cli.PATH,
    multiple=True,
    group=MEASURING,
    help='Reference statistics, made by fid.py ref; if repeated, the plot shows the first.  [default: on '
    'digits three]',
)
@cli.option(
    '--detector',
    'detectors',
    metavar='PATH|URL',
    type=cli.PATH,
    multiple=True,
    group=MEASURING,
    help=f"Detector of each --ref, in the same order. {cli.PROGRAM}  [default: NVIDIA's Inception]",
)
@cli.option(
    '--sample-batch',
    metavar='INT',
    type=cli.BATCH,
    default=256,
    show_default=True,
    group=MEASURING,
    help='Batch size of sampling and evaluation.',
)
@cli.argument(
    'train_options', nargs=-1, type=click.UNPROCESSED, help='train.py options for all trainings, after --.'
)
def main(
    outdir,
    data,
    teacher,
    jobs,
    objectives,
    budget,
    batch,
    seeds,
    extra,
    steps,
    reference_steps,
    num,
    refs,
    detectors,
    sample_batch,
    train_options,
):
    """Train objectives from one teacher, for an equal budget of network evaluations, and compare the results.

    \b
    All objectives on digits, on a laptop:
      python compare.py
    \b
    Two objectives on CIFAR-10:
      python compare.py --outdir=cifar10 --data=datasets/cifar10-32x32.zip \\
          --teacher=edm-cifar10-32x32-cond-vp.pkl --objectives=mcd,direct --budget=600000 --batch=512 \\
          --ref=fid-refs/cifar10-32x32.npz -- --batch-gpu=128

    A student with a fixed number of steps is trained for each of --steps, with the full budget; a consistency
    model is trained once, and sampled with each.
    """
    on_digits, outdir = data == DIGITS, Path(outdir)
    check_usage(data, teacher, refs, detectors)
    num = num or (6000 if on_digits else 50000)
    origin = describe_teacher(teacher, data, objectives) if teacher else Teacher()
    for_some: dict[str, list[str]] = {}
    for name, words in extra:
        for_some.setdefault(name, []).extend(words)
    request = Request(
        objectives,
        steps,
        seeds,
        budget,
        batch,
        origin.cond,
        origin.network,
        on_digits,
        train_options,
        for_some,
    )
    first = None if teacher else comparison.teacher_training()
    models = [*comparison.teacher_models(steps, reference_steps), *comparison.plan(request)]
    rulers, ruler_facts = read_rulers(refs, detectors, origin.image_shape)
    trainings = {
        training.name: training for model in models if model.training for training in model.training.chain
    }
    facts = dict(
        data=data,
        teacher=origin.digest,
        budget=budget,
        batch=batch,
        images=num,
        reference_steps=reference_steps,
        rulers=ruler_facts,
    )
    make_outdir(outdir)
    labels = write_labels(outdir, origin.labels)
    settle(outdir, facts, list(trainings.values()))

    cores = os.cpu_count() or 1
    runner = Runner(outdir, threads=max(cores // jobs, 1), record=outdir / 'commands.txt')
    results = Results(runner.path('results.json'), list(rulers or digits.RULERS))

    def everything() -> tuple[dict[str, Ruler], list[str]]:
        dataset, used = digits.prepare(runner) if on_digits else (data, rulers)
        if first:
            train(runner, first, dataset, None, threads=cores)
        source = str(snapshot(runner, first)) if first else teacher
        return used, do_all(
            runner, jobs_of(runner, models, dataset, source, used, num, sample_batch, results, labels), jobs
        )

    rulers, failures = run_interruptibly(runner, everything, GOES_ON)
    order = {model.name: i for i, model in enumerate(models)}
    rows = sorted(results.rows.values(), key=lambda row: order.get(row['model'], len(order)))
    if reference := results.rows.get(models[0].name):
        report(runner, rows, reference, budget, batch, list(rulers))
        print('\n' + runner.path('table.md').read_text())
    if failures:
        raise UserError(
            f'{len(failures)} of them failed; the same command again tries them once more.', *failures
        )
    print(f'Open {runner.path("report.html")} for the plot, samples and commands.')


if __name__ == '__main__':
    main()
