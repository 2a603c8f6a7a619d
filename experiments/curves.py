"""Curves of a run, also of one in progress: `python -m experiments.curves RUNDIR` writes training-curves.png.

Panels over the images seen, each where the run has recorded it: loss, Fréchet distance, learning rate,
half-life of the EMA, gradient norm, number of teacher edges, speed. Rounds of a progressive distillation are
lines in the same panels.
"""

from __future__ import annotations

import os
from pathlib import Path

import click

from dnnlib import UserError, cli
from training.saved_files import METRICS, STATS, round_folders

CURVES = 'training-curves.png'
Line = tuple[list[float], list[float]]  # thousands of images, values

# Panels by their captions: names in stats.jsonl, and whether the axis is logarithmic.
STATISTICS = {
    'learning rate': ('Progress/lr', False),
    'EMA half-life (kimg)': ('Progress/ema_halflife_kimg', False),
    'gradient norm': ('Progress/grad_norm', True),
    'teacher edges T': ('Edges/T', True),
    'images per second': ('Timing/images_per_sec', False),
}


@click.command(cls=cli.Command)
@cli.argument(
    'run_dir',
    metavar='RUNDIR',
    type=cli.PATH,
    help='Folder of a run, or of the rounds of progressive distillation.',
)
@cli.option(
    '--dest', metavar='PNG', type=cli.PATH, help=f'Picture to write.  [default: {CURVES} in the run folder]'
)
def main(run_dir, dest):
    """Draw the curves of a run, from its stats.jsonl and metrics-val.jsonl, also while it trains."""
    folders = folders_of(run_dir)
    panels = panels_of(folders)
    if not panels:
        raise UserError(f'{run_dir} has no tick in its {STATS} yet: wait for the first one.')
    dest = dest or os.path.join(run_dir, CURVES)
    draw(panels, dest, title=Path(run_dir).resolve().name)
    click.echo(f'Wrote {dest}')


def folders_of(run_dir: str) -> dict[str, Path]:
    """{name: folder with statistics}: the run's own, or those of its rounds.

    Raises: UserError, which names what is there, if there are none.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise UserError(f'{run_dir} is not a folder: give the folder of a run.')
    if (folder / STATS).is_file():
        return {'': folder}
    if rounds := {path.name: path for path in round_folders(folder) if (path / STATS).is_file()}:
        return rounds
    below = [path.name for path in sorted(folder.iterdir()) if (path / STATS).is_file()]
    runs = f'it holds the runs {", ".join(below)}: give one of them' if below else 'give the folder of a run'
    raise UserError(f'{run_dir} has no {STATS}: {runs}.')


def panels_of(folders: dict[str, Path]) -> dict[str, tuple[dict[str, Line], bool]]:
    """{caption: ({label: line}, logarithmic)} of what the folders have recorded."""
    from experiments.report import read_jsonl

    panels: dict[str, tuple[dict[str, Line], bool]] = {}

    def add(caption: str, label: str, line: Line, logarithmic: bool) -> None:
        if line[0]:
            panels.setdefault(caption, ({}, logarithmic))[0][label] = line

    for each, folder in folders.items():
        stats = read_jsonl(folder / STATS)
        # The loss is the one that is not of a part of the images: of a segment, or of a range of noise levels.
        losses = dict.fromkeys(name for record in stats for name in record if is_loss(name))
        for name in losses:
            label = ' '.join(filter(None, (each, name.removeprefix('Loss/'))))
            line = line_of(stats, name)
            add('loss', label, line, logarithmic=min(line[1], default=0) > 0)
        # Evaluations, a line for each average.
        for record in (each for each in read_jsonl(folder / METRICS) if each.get('fid') is not None):
            label = ' '.join(filter(None, (each, record.get('ema', 'ema'))))
            xs, ys = panels.setdefault('Fréchet distance', ({}, True))[0].setdefault(label, ([], []))
            xs.append(record['kimg'])
            ys.append(record['fid'])
        # Other statistics, where they were recorded.
        for caption, (name, logarithmic) in STATISTICS.items():
            add(caption, each, line_of(stats, name), logarithmic)
    return panels


def is_loss(name: str) -> bool:
    return name.startswith('Loss/') and not name.startswith(('Loss/sigma_', 'Loss/segment'))


def line_of(stats: list[dict], name: str) -> Line:
    """(kimg, mean) at each tick that has the statistic."""
    entries = [(each['Progress/kimg']['mean'], each.get(name, {}).get('mean')) for each in stats]
    known = [(x, y) for x, y in entries if y is not None]
    return [x for x, _ in known], [y for _, y in known]


def draw(panels: dict[str, tuple[dict[str, Line], bool]], dest: str, title: str) -> None:
    """Write the panels, two in a row, as a PNG file. Raises: UserError if that fails."""
    import matplotlib

    # No display is needed, as on a cluster.
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    from dnnlib.util import atomic_write

    rows = -(-len(panels) // 2)
    figure, axes = plt.subplots(
        rows, 2, figsize=(11, 2.6 * rows + 0.5), squeeze=False, constrained_layout=True
    )
    figure.suptitle(title, fontsize=11)
    # With an odd number of panels the last place stays empty.
    for place in axes.flat[len(panels) :]:
        place.axis('off')
    for place, (caption, (lines, logarithmic)) in zip(axes.flat, panels.items()):
        for label, (x, y) in lines.items():
            # The first tick is a single step; a mark shows lines of one point.
            place.plot(x, y, marker='.' if len(x) < 30 else '', linewidth=1.2, label=label or None)
        place.set(xlabel='thousands of images', title=caption)
        if logarithmic and all(value > 0 for _, y in lines.values() for value in y):
            place.set_yscale('log')
        place.grid(alpha=0.3)
        if any(lines):
            place.legend(fontsize=7)
    with atomic_write(dest) as file:
        figure.savefig(file, format='png', dpi=110)
    plt.close(figure)


if __name__ == '__main__':
    main()
