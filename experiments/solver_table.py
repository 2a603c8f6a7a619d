"""A table of what a teacher does without training: a metric of its images by every solver in few evaluations,
with the solver's own noise levels, with levels even in the time of the cosine process, and with searched ones.
A second table has their paired error, from its own images in 511 evaluations.

    python -m experiments.solver_table --network=teacher.pkl --ref=classifier.npz --detector=classifier.pt
"""

from __future__ import annotations

import dnnlib.interrupts  # noqa: F401  (first)

from collections.abc import Iterator
from pathlib import Path

import click

from dnnlib import EasyDict, UserError, cli
from dnnlib.util import write_json
from sampling.options import GENERAL
from training.saved_files import NETWORK_FILE

SOLVERS = ('euler', 'heun', 'dpm2', 'ipndm', 'ipndm_v', 'deis', 'dpmpp', 'unipc')
LEVELS = ('own', 'cosine', 'searched')
SEARCH = dict(num=128, nodes=61, low=None, high=None)  # options of the searches


@click.command(cls=cli.Command)
@cli.option('--network', type=NETWORK_FILE, required=True, help='Diffusion model.')
@cli.option('--ref', metavar='NPZ|URL', type=cli.PATH, required=True, help='Reference statistics.')
@cli.option(
    '--detector',
    metavar='PATH|URL',
    type=cli.PATH,
    help=f"Feature detector. {cli.PROGRAM}  [default: NVIDIA's Inception]",
)
@cli.option('--detector-sha256', metavar='HEX', help='Digest that the detector file must have.')
@cli.option(
    '--nfe',
    type=cli.NumberList(cli.LEVELS),
    default='2,4,5,8',
    help='Numbers of network evaluations; of an odd one, dpm2 takes one less, of an even one heun.',
)
@cli.option(
    '--levels',
    metavar='LIST',
    default=','.join(LEVELS),
    show_default=True,
    help="Noise levels: the solver's own, even in the cosine process's time, searched.",
)
@cli.option('--num', type=cli.TWO_IMAGES, default=6000, help='Images per cell.')
@cli.option('--seed', type=cli.SEED, default=0, help='First seed of the images.')
@GENERAL['labels']
@cli.option('--batch', type=cli.BATCH, default=256, help='Images per batch.')
@cli.option(
    '--json',
    'json_path',
    type=cli.OUTPUT,
    required=True,
    help='File of the results, from which an interrupted table resumes.',
)
def main(levels, json_path, **options):
    """Measure a teacher by all solvers in few network evaluations, and print a table."""
    from torch_utils import distributed

    wanted = levels.split(',')
    if unknown := [name for name in wanted if name not in LEVELS]:
        raise click.UsageError(f'--levels: {unknown[0]!r} is none of {", ".join(LEVELS)}.')
    distributed.init()
    # The metric and the search read options of fid.py and search.py too.
    options = EasyDict(options, class_idx=None, dinov2=None, skip_bad=False, cache=None, workers=2)
    table = SolverTable(options, Path(json_path))
    # Each cell is saved when it is measured, so that an interrupted table resumes.
    for name in wanted:
        for solver, nfe, steps in cells(options.nfe):
            table.measure(name, solver, nfe, steps)
    distributed.print0(table.markdown(wanted, options.nfe))
    distributed.print0('Paired error:\n')
    distributed.print0(table.markdown(wanted, options.nfe, 'paired_errors'), end='')
    distributed.shutdown()


def cells(counts: list[int]) -> Iterator[tuple[str, int, int]]:
    """(solver, evaluations, steps) of every cell; a solver of two evaluations a step may take one less."""
    for nfe in counts:
        for solver in SOLVERS:
            # n steps take 2n − 1 evaluations with Heun, 2n with the midpoint method, n with the others.
            steps = dict(heun=(nfe + 1) // 2, dpm2=nfe // 2).get(solver, nfe)
            if solver not in ('heun', 'dpm2') or steps > 1:
                yield solver, nfe, steps


class SolverTable:
    """Values by (levels, solver, evaluations), saved as each is measured.

    Raises: UserError if the network, the reference or the detector cannot be used, or the file is of another
        table.
    """

    def __init__(self, options: EasyDict, path: Path):
        from metrics import evaluation
        from metrics.measures import MEASURES
        from metrics.options import PAIRS
        from metrics.pairs import Pairing, data_deviation
        from metrics.time_points import MetricOfPoints, reference_digest
        from sampling.teacher_paths import Teacher
        from training.checkpoint import network_digest

        measures = {'fid': MEASURES['fid']}
        evaluation.check_detector_options(measures, options)
        references = evaluation.read_references(options.ref, measures, options)
        # All searches share the fine paths of this teacher.
        self.teacher = Teacher(options.network, EasyDict({**options, **SEARCH}))
        self.net = self.teacher.net
        self.options, self.path = options, path
        evaluation.make_folder(path)
        self.metric = MetricOfPoints(self, measures, references, options)

        # Pairs, of the first images.
        seeds = range(options.seed, options.seed + min(PAIRS, options.num))
        deviation = data_deviation(options.ref, references, options)
        labels = self.teacher.choose_labels
        self.pairing = Pairing(self.net, options.network, seeds, options.batch, labels, deviation=deviation)

        # A file of the same table is continued.
        settings = dict(
            network=network_digest(self.net, self.net.metadata),
            detector=self.metric.detector.digest,
            reference=reference_digest(options.ref, bool(references)),
            num=options.num,
            seed=options.seed,
            # Only where given, so that tables of older versions, without them, still fit.
            **(dict(labels=labels.digest()) if options.labels else {}),
        )
        self.record = dict(settings=settings, values={}, paired_errors={})
        if path.exists():
            self.record |= read_record(path, settings)

    def images(self, arguments: dict | list, options: EasyDict):
        """An image source as in metrics/images.py, for `MetricOfPoints`."""
        from metrics.generated import GeneratedImages

        # Without arguments, only the shape of the images is wanted, which any sampler shows.
        seeds = range(options.seed, options.seed + options.num)
        given = arguments or dict(solver='euler', steps=1)
        labels = self.teacher.choose_labels
        return GeneratedImages(self.net, seeds, options.batch, labels, name=str(given), **given)

    def measure(self, levels: str, solver: str, nfe: int, steps: int) -> None:
        """Measure a cell, unless the file has it."""
        from metrics import evaluation
        from torch_utils import distributed

        key, (values, errors) = (
            f'{levels} {solver} {nfe}',
            (self.record['values'], self.record['paired_errors']),
        )
        if key in values and key in errors:
            return
        # All processes measure together; the main one writes. A table of an older version has values only.
        arguments = self.arguments(levels, solver, steps)
        if key not in values:
            values[key] = self.metric(arguments)
        errors[key] = self.pairing.error(self.net, key, **arguments)['value']
        evaluation.log(f'{key}: {values[key]:.4g}, paired error {errors[key]:.4g}')
        if distributed.is_main():
            write_json(self.path, self.record)

    def arguments(self, levels: str, solver: str, steps: int) -> dict:
        """Sampling options of a cell."""
        from sampling.teacher_paths import ScheduleSearch

        if levels == 'own':
            return dict(solver=solver, steps=steps)
        if levels == 'cosine':
            return dict(solver=solver, steps=steps, discretization='cosine')
        try:
            search = ScheduleSearch(self.teacher, solver, steps)
        except UserError:  # no level to search
            return dict(solver=solver, steps=steps)
        return dict(search.sampler, sigmas=search.run(lambda line: None)['sigmas'])

    def markdown(self, levels: list[str], counts: list[int], entry: str = 'values') -> str:
        """A table of `values` or `paired_errors`: a line per solver and kind of levels, a column per number of
        evaluations; the least of a column is bold."""
        from experiments.report import markdown_table

        value = lambda name, solver, nfe: self.record[entry].get(f'{name} {solver} {nfe}')
        lines = [(name, solver) for name in levels for solver in SOLVERS]
        least = {nfe: min(v for each in lines if (v := value(*each, nfe)) is not None) for nfe in counts}
        text = lambda v, nfe: '' if v is None else f'**{v:.3f}**' if v == least[nfe] else f'{v:.3f}'
        return markdown_table(
            ['levels', 'solver', *map(str, counts)],
            [[name, solver, *(text(value(name, solver, n), n) for n in counts)] for name, solver in lines],
        )


def read_record(path: Path, settings: dict) -> dict:
    """The results of an earlier command. Raises: UserError if they are of another table, or damaged."""
    from dnnlib import schema

    # A file from elsewhere is not trusted: kinds and sizes of its entries are checked.
    values = schema.Dict(schema.Text(longest=100), schema.Real())
    try:
        record = schema.read_json(
            path,
            schema.Record(
                dict(settings=schema.Plain(), values=values, paired_errors=values), ['settings', 'values']
            ),
            'the table',
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f'--json={path} is not a table of solvers (it {error}): choose another name.'
        ) from error
    # Values of other settings would pass for those of this table.
    if record['settings'] != settings:
        raise UserError(
            f'--json={path} is the table of another network, reference, or other images or labels: choose '
            'another name.'
        )
    return record


if __name__ == '__main__':
    main()
