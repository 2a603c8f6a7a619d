"""A comparison from start to end: check its options, plan it, train and measure, write the report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from dnnlib import UserError
from dnnlib.lazy import lazy_import
from experiments import comparison
from experiments.bundled import BUNDLED, PHOTOS, RESAMPLES, Bundled, prepare
from experiments.comparison import Request
from experiments.inputs import Teacher, describe_teacher, read_metrics, write_labels
from experiments.jobs import remaining_jobs, run_jobs, snapshot, train
from experiments.results import Results, record_plan
from experiments.runner import Metric, Resampling, Runner, make_outdir, run_interruptibly
from experiments.tables import write_report
from sampling.options import BALANCED
from training.objectives import OBJECTIVES

sources = lazy_import('data.sources')  # it imports PyTorch, which --help must not


@dataclass(frozen=True)
class Options:
    """The options of compare.py, by the names of their parameters; its --help describes them."""

    outdir: str | None
    data: str
    teacher: str | None
    jobs: int
    objectives: Sequence[str]
    budget: int
    batch: int
    seeds: Sequence[int]
    extra: Sequence[tuple[str, list[str]]]
    steps: Sequence[int]
    bootstrap: int | None
    reference_steps: int
    num: int | None
    refs: Sequence[str]
    detectors: Sequence[str]
    sample_batch: int
    train_options: Sequence[str]

    def __post_init__(self):
        if self.data not in BUNDLED and not os.path.exists(self.data):
            raise click.UsageError(
                f'--data={self.data}: no such file or folder, and none of {", ".join(BUNDLED)}.'
            )
        own = {'--teacher=PKL': self.teacher, '--ref=NPZ (made by fid.py ref)': self.refs}
        if self.data not in BUNDLED and (missing := [option for option, value in own.items() if not value]):
            raise click.UsageError(f'--data={self.data} needs {" and ".join(missing)}.')
        if self.data in BUNDLED and (self.refs or self.detectors):
            raise click.UsageError(
                f'--data={self.data} has metrics of its own: leave --ref and --detector out.'
            )
        if self.detectors and len(self.detectors) != len(self.refs):
            raise click.UsageError(
                f'{len(self.detectors)} --detector for {len(self.refs)} --ref: give one for each, in the '
                'same order.'
            )


def with_their_steps(o: Options) -> list[str]:
    """The objectives that take one of the numbers of steps; says which are left out."""
    one_step = [name for name in o.objectives if OBJECTIVES[name].one_step and 1 not in o.steps]
    if one_step:
        print(f'{", ".join(one_step)}: left out, because it takes one step, and --steps has no 1.')
    return [name for name in o.objectives if name not in one_step]


def teacher_of(o: Options, bundled: Bundled | None, objectives: list[str]) -> Teacher:
    """The teacher that was given, or the one to train."""
    if o.teacher:
        return describe_teacher(o.teacher, o.data, objectives)
    return Teacher(network=bundled.network, classes=bundled.classes)


def resampling(o: Options, bundled: Bundled | None, classes: int, labels: str | None) -> Resampling:
    """By classes where every class comes equally often."""
    bootstrap = o.bootstrap if o.bootstrap is not None else RESAMPLES * (bundled is not None)
    return Resampling(bootstrap, classes if labels == BALANCED else 1)


def run(o: Options) -> None:
    """Do what remains of a comparison, and write its report.

    Raises: UserError if an input cannot be used, or some jobs failed.
    """
    bundled = BUNDLED.get(o.data)
    if bundled is PHOTOS:
        sources.check_unambiguous('--data', o.data)
    outdir = Path(o.outdir or ('compare-photos' if bundled is PHOTOS else 'compare-out'))
    num = o.num or (bundled.images if bundled else 50000)
    objectives = with_their_steps(o)

    # Plan all models before any of them is trained.
    given = teacher_of(o, bundled, objectives)
    # --with may name a training several times.
    for_some: dict[str, list[str]] = {}
    for name, arguments in o.extra:
        for_some.setdefault(name, []).extend(arguments)
    request = Request(
        objectives,
        o.steps,
        o.seeds,
        o.budget,
        o.batch,
        given.cond,
        given.network,
        recipe=bundled is not None,
        for_all=o.train_options,
        for_some=for_some,
    )
    models = [*comparison.teacher_models(o.steps, o.reference_steps), *comparison.plan(request)]
    trainings = {each.name: each for model in models if model.training for each in model.training.chain}
    metrics, metric_facts = read_metrics(o.refs, o.detectors, given.image_shape)

    # Record the plan; a folder holds one comparison.
    make_outdir(outdir)
    # Labels of the data, else every class equally often: drawn ones would differ from the data's shares.
    labels = write_labels(outdir, given.labels) or (BALANCED if given.cond else None)
    settings = dict(
        data=o.data,
        teacher=given.digest,
        budget=o.budget,
        batch=o.batch,
        images=num,
        reference_steps=o.reference_steps,
        labels='drawn' if labels and labels != BALANCED else labels,
        rulers=metric_facts,
    )
    record_plan(outdir, settings, list(trainings.values()))
    results = Results(outdir / 'results.json', list(metrics or bundled.metrics))

    # Train and measure. A bundled data set's teacher has all cores, because everything else waits for it.
    cores = os.cpu_count() or 1
    runner = Runner(outdir, threads=max(cores // o.jobs, 1), record=outdir / 'commands.txt')

    # All that takes long, in a thread, so that Ctrl-C can end its commands.
    def work() -> tuple[dict[str, Metric], list[str]]:
        data, used = prepare(bundled, runner) if bundled else (o.data, metrics)
        teacher = o.teacher
        if not teacher:
            training = comparison.teacher_training(bundled)
            train(runner, training, data, None, threads=cores)
            teacher = str(snapshot(runner, training))
        how = labels, resampling(o, bundled, given.classes, labels)
        jobs = remaining_jobs(runner, models, data, teacher, used, num, o.sample_batch, results, *how)
        return used, run_jobs(runner, jobs, o.jobs)

    metrics, failures = run_interruptibly(runner, work, 'run the same command again to resume.')

    # Report what there is, also of earlier commands in the folder and if some jobs failed.
    order = {model.name: i for i, model in enumerate(models)}
    rows = sorted(results.rows.values(), key=lambda row: order.get(row['model'], len(order)))
    if reference := results.rows.get(models[0].name):
        write_report(runner, rows, reference, o.budget, o.batch, list(metrics))
        print('\n' + runner.path('table.md').read_text())
    if failures:
        raise UserError(f'{len(failures)} jobs failed; run the same command again to retry them.', *failures)
    print(f'Open {runner.path("report.html")} for the plot, samples and commands.')
