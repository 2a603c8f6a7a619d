"""Train and measure the models of a comparison, each only once."""

from __future__ import annotations

import concurrent.futures
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from dnnlib import UserError
from experiments.comparison import Model, Training
from experiments.results import Results, commit
from experiments.runner import (
    NO_INTERVALS,
    SHOWN,
    Metric,
    Pairs,
    Resampling,
    Runner,
    is_finished,
    measure,
    newest_snapshot,
    resumption,
    workers,
)
from experiments.teacher import sampler_options

Job = tuple[float, str, Callable[[], None]]  # network evaluations, name, function


def train(
    runner: Runner, training: Training, data: Path | str, teacher: str | None, threads: int | None = None
) -> None:
    """Start a training or resume it, unless it is finished. It starts from the snapshot `teacher`, or from
    that of the training before it."""
    folder = runner.path('trainings', training.name)
    if is_finished(folder / training.rounds[-1][0]):
        return

    # A resumed run needs its teacher again, but not the weights that it was initialized with.
    source, resume = snapshot(runner, training.after) if training.after else teacher, resumption(folder)
    with_source = training.start == '--teacher' or (training.start and not resume)
    origin = [*([f'{training.start}={source}'] if with_source else []), *resume]

    # About ten training states per round, and no snapshots but the last.
    kimg = training.steps * training.batch / 1e3 / len(training.rounds)
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


def seconds_of(runner: Runner, model: Model) -> float | None:
    """Seconds of training up to a model, in all its rounds and processes, without the starts; None where statistics are
    missing."""
    *before, last = model.training.chain
    rounds = [(training, folder) for training in before for folder, _ in training.rounds]
    rounds += [(last, folder) for folder, _ in last.rounds[: model.round + 1]]
    files = [runner.path('trainings', training.name, folder, 'stats.jsonl') for training, folder in rounds]
    if not all(file.exists() for file in files):
        return None
    ticks = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    names = 'Timing/sec_per_tick', 'Timing/maintenance_sec'
    return round(sum(tick[name]['mean'] for tick in ticks for name in names), 1)


def snapshot(runner: Runner, training: Training, number: int = -1) -> Path:
    """The last snapshot of a finished training, or of one of its rounds."""
    return newest_snapshot(runner.path('trainings', training.name, training.rounds[number][0]))


def measure_model(
    runner: Runner,
    model: Model,
    teacher: str,
    metrics: dict[str, Metric],
    num: int,
    batch: int,
    labels: str | None = None,
    reference: Model | None = None,
    resampling: Resampling = NO_INTERVALS,
) -> dict:
    """Sample and measure a model; the images are deleted, except for a grid of them.

    Args:
        labels: see --labels of generate.py.
        reference: the teacher with many evaluations, for the paired error; None for no such error.
    Returns: a row of the results, whose `paired_error` is None for images without pairs.
    """
    from experiments.report import write_grid

    network = snapshot(runner, model.training, model.round) if model.training else teacher
    sampler = (
        sampler_options(runner, model.name, network, model.sampling, batch, labels)
        if model.sampling
        else [f'--solver={model.solver}', f'--steps={model.steps}']
    )
    # The reference is paired with itself, and images with noise of their own have no pairs.
    pairs, known = None, {}
    if model == reference:
        known = dict(paired_error=0.0, paired_interval=[0.0, 0.0])
    elif model.draws_noise:
        known = dict(paired_error=None, paired_interval=None)
    elif reference:
        pairs = Pairs(teacher, reference.steps)
    measured = measure(runner, model.name, network, sampler, num, metrics, batch, resampling, labels, pairs)
    if model.training:
        known['train_seconds'] = seconds_of(runner, model)
    row = model.record() | known | measured | dict(commit=commit())
    # Keep a grid only: the images of all models would fill a disk.
    images = runner.path('samples', model.name)
    runner.path('grids').mkdir(exist_ok=True)
    write_grid(sorted(map(str, images.glob('*.png')))[:SHOWN], str(runner.path('grids', f'{model.name}.png')))
    shutil.rmtree(images)
    return row


def remaining_jobs(
    runner: Runner,
    models: Sequence[Model],
    data: Path | str,
    teacher: str,
    metrics: dict[str, Metric],
    num: int,
    batch: int,
    results: Results,
    labels: str | None = None,
    resampling: Resampling = NO_INTERVALS,
) -> list[Job]:
    """Jobs for models without results, longest first: a training with measurements of its models each. The first
    of the models is the teacher with many evaluations."""
    # Models of one training belong together; the teacher's are independent of each other.
    groups: dict[str, list[Model]] = {}
    for model in models:
        groups.setdefault(model.training.name if model.training else model.name, []).append(model)

    def do(group: list[Model]) -> None:
        # Trainings in their order, then measurements of what they made.
        for training in group[0].training.chain if group[0].training else []:
            train(runner, training, data, teacher)
        for model in group:
            results.add(
                measure_model(runner, model, teacher, metrics, num, batch, labels, models[0], resampling)
            )

    # The work of a job, by which to order them, is its number of network evaluations.
    jobs = []
    for name, group in groups.items():
        if group := [model for model in group if model.name not in results.rows]:
            training = group[0].training
            work = (training.evaluations * training.batch if training else 0) + sum(
                model.nfe for model in group
            ) * num
            # `group` is bound now: the loop goes on to others before the job runs.
            jobs.append((work, name, lambda group=group: do(group)))
    return sorted(jobs, key=lambda job: -job[0])


def run_jobs(runner: Runner, jobs: list[Job], parallel: int) -> list[str]:
    """Run `parallel` jobs at a time; one that fails does not stop the others. Returns: the error messages."""
    with workers(runner, parallel) as pool:
        futures = {pool.submit(function): name for _, name, function in jobs}
        return [
            f'{futures[future]}: {error}'
            for future in concurrent.futures.as_completed(futures)
            if (error := user_error(future))
        ]


def user_error(future: concurrent.futures.Future) -> UserError | None:
    """The UserError that a job ended with, if any; any other exception is raised."""
    error = future.exception()
    if error is not None and not isinstance(error, UserError):
        raise error
    return error
