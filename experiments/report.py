"""Tables, sample grids and curves of a set of runs, as files and as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Sequence

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np
import torch
from PIL import Image
from sklearn.isotonic import isotonic_regression

from data.pixels import open_image
from dnnlib import UserError
from sampling.generation import image_grid
from training.run_log import records

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c1e21; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } th, td { padding: .35rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; background: #f6f7f8; }
.grids { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; } figure img { image-rendering: pixelated; display: block; }
figcaption { font-size: .85rem; color: #555; margin-top: .2rem; } pre { background: #f6f7f8; padding: .8rem; overflow-x: auto; font-size: .8rem; }
img.wide { max-width: 100%; }
"""


def read_jsonl(path: str | os.PathLike) -> list[dict]:
    """The records of a .jsonl file of a run; an empty list if there is no file.

    A last line that the run is still writing is left out. Raises: UserError, naming the line, for anything
    else.
    """
    if not os.path.exists(path):
        return []
    found = [record for line, record in records(path) if record is not None or line.endswith(b'\n')]
    if None in found:
        raise UserError(
            f'{path}: line {found.index(None) + 1} is not a record of a run. Remove that line, or restore '
            'the file.'
        )
    return found


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], align: Sequence[str] | None = None
) -> str:
    """A Markdown table. `align`: `left` or `right` for each column; None: the first left, the others right."""
    align = align or ['left'] + ['right'] * (len(header) - 1)
    lines = [header, [dict(left=':--', right='--:')[side] for side in align], *rows]
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in lines) + '\n'


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table."""
    line = lambda cells, tag: (
        '<tr>' + ''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in cells) + '</tr>'
    )
    return '<table>' + line(header, 'th') + ''.join(line(row, 'td') for row in rows) + '</table>'


def write_grid(paths: Sequence[str], dest: str, columns: int = 8) -> None:
    """Tile PNG files, a multiple of `columns`, into one; each is enlarged to 32 pixels or more."""
    arrays = [np.asarray(open_image(path)) for path in paths]
    # [N, C, H, W]; files of gray images have no dimension of channels.
    images = torch.from_numpy(np.stack([a[None] if a.ndim == 2 else a.transpose(2, 0, 1) for a in arrays]))

    # A dark line between images; whole factors keep pixels square and sharp.
    pixel = max(32 // images.shape[3], 1)
    images = torch.nn.functional.pad(images, (0, 1, 0, 1), value=96)
    grid = image_grid(images, columns).permute(1, 2, 0).numpy()
    picture = Image.fromarray(grid[:, :, 0] if grid.shape[2] == 1 else grid)
    picture.resize((picture.width * pixel, picture.height * pixel), Image.NEAREST).save(dest)


def write_rows(rows: dict[str, Sequence[str]], dest: str) -> None:
    """A line of samples, PNG files of one size, for each caption, enlarged."""
    count = max(map(len, rows.values()))
    # Inches: the captions at the left, at about 0.08 for each of their characters, and a sample.
    margin, side = 0.08 * max(map(len, rows)) + 0.2, 0.5
    size = (margin + side * count, side * len(rows))
    figure, panels = plt.subplots(len(rows), 1, figsize=size, squeeze=False)
    figure.subplots_adjust(left=margin / size[0], right=1, bottom=0, top=1, hspace=0.06)
    for axes, (caption, paths) in zip(panels[:, 0], rows.items()):
        # A black pixel between samples.
        samples = [np.pad(np.asarray(open_image(path).convert('L')), (0, 1)) for path in paths]
        axes.imshow(np.concatenate(samples, axis=1), cmap='gray', interpolation='nearest', aspect='auto')
        axes.axis('off')
        axes.text(-0.01, 0.5, caption, transform=axes.transAxes, ha='right', va='center', fontsize=10)
    figure.savefig(dest, dpi=110)
    plt.close(figure)


def write_curves(curves: dict[str, tuple[Sequence[float], Sequence[float]]], dest: str, ylabel: str) -> None:
    """Line plot of {name: (kimg, values)} on a logarithmic axis."""
    figure, axes = plt.subplots(figsize=(7, 3.6), constrained_layout=True)
    for name, (x, y) in curves.items():
        axes.plot(x, y, marker='.', label=name)
    axes.set(xlabel='thousands of images', ylabel=ylabel, yscale='log')
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(dest, dpi=110)
    plt.close(figure)


HUES = dict(
    blue='#0072B2',
    orange='#E69F00',
    green='#009E73',
    red='#D55E00',
    purple='#CC79A7',
    sky='#56B4E9',
    gray='#777777',
    black='#000000',
)
# Colors that color-blind readers can distinguish (Okabe and Ito). Related objectives share a color, and
# differ in dashes and markers.
LOOKS = {
    'mcd': ('blue', '-', 'o'),
    'mct': ('blue', '--', 's'),
    'direct': ('red', '-', 'o'),
    'pd': ('green', '-', 'o'),
    'flowmap': ('red', '--', 's'),
    'cm-cd': ('orange', '-', 'o'),
    'cm-ct': ('orange', '--', 's'),
    'ict': ('purple', '-', 'o'),
    'ect': ('sky', '-', 'o'),
    'tcm': ('sky', '--', 's'),
    'scd': ('green', '--', 's'),
    'sct': ('green', ':', '^'),
    'mm': ('orange', ':', '^'),
    'sid': ('red', ':', '^'),
    'teacher, Euler': ('gray', ':', 'x'),
    'teacher, Heun': ('black', ':', 'x'),
    'teacher, best solver': ('black', '-', 'D'),
    'teacher, searched levels': ('black', '--', 'd'),
}


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Move values in [0, 1] as little as possible (least squares) to `gap` between neighbors, in order."""
    # Minus multiples of the gap, the sorted values only need to be non-decreasing: isotonic regression.
    order = np.argsort(values, kind='stable')
    offsets = gap * np.arange(len(order))
    moved = (
        isotonic_regression(np.asarray(values)[order] - offsets, y_min=0, y_max=max(1 - offsets[-1], 0))
        + offsets
    )
    return moved[np.argsort(order)].tolist()


def apart(numbers: Sequence[int]) -> list[int]:
    """Those of ascending numbers that have room for labels on a logarithmic axis; powers of two have
    priority, then the ends."""
    chosen: list[int] = []
    for number in sorted(numbers, key=lambda n: (n & (n - 1) > 0, n not in (numbers[0], numbers[-1]))):
        if all(max(number, other) >= 1.3 * min(number, other) for other in chosen):
            chosen.append(number)
    return sorted(chosen)


def write_frontier(
    lines: dict[str, dict[int, Sequence[float]]], dest: str, ylabel: str, level: tuple[str, float]
) -> None:
    """Plot distance over network evaluations on logarithmic axes, with a dashed horizontal line.

    Lines connect the geometric means over seeds; their names stand at their ends.

    Args:
        lines: {name: {evaluations: one value per seed}}.
        level: name and value of the dashed line.
    """
    figure, axes = plt.subplots(figsize=(8, 5))
    figure.subplots_adjust(left=0.1, right=0.72, bottom=0.11, top=0.97)
    lines = {name: dict(sorted(points.items())) for name, points in lines.items() if points}
    axes.axhline(level[1], linestyle='--', color='black', linewidth=1)

    # Lines and seeds; their ends as (name, color, marker, x, y).
    ends = [(level[0], 'black', '', None, level[1])]
    for name, points in lines.items():
        hue, dashes, mark = LOOKS.get(name, ('black', '-.', 'D'))
        # Geometric means, because the axis is logarithmic.
        means = [float(np.exp(np.mean(np.log(values)))) for values in points.values()]
        axes.plot(list(points), means, linestyle=dashes, marker=mark, markersize=5, color=HUES[hue])
        seeds = [(nfe, value) for nfe, values in points.items() if len(values) > 1 for value in values]
        axes.scatter(*zip(*seeds) if seeds else ((), ()), s=9, color=HUES[hue], alpha=0.5)
        ends.append((name, HUES[hue], mark, list(points)[-1], means[-1]))

    # Axes, with ticks at the evaluations that were measured.
    evaluations = sorted({nfe for points in lines.values() for nfe in points} or {1})
    ticks = apart(evaluations)
    axes.set(
        xscale='log',
        yscale='log',
        xlabel='network evaluations for an image',
        ylabel=ylabel,
        xlim=(evaluations[0] / 1.15, evaluations[-1] * 1.15),
    )
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()

    # Values at 1, 2, 5 · 10^k, or others if fewer than two of these are in range.
    low, high = axes.get_ylim()
    numbers = [n * 10.0**k for k in range(-9, 10) for n in (1, 2, 5)]
    for some in (numbers, matplotlib.ticker.MaxNLocator(5).tick_values(low, high)):
        inside = [value for value in some if low <= value <= high]
        if len(inside) > 1:
            break
    axes.set_yticks(inside)
    axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter('%g'))
    axes.grid(alpha=0.25)

    # Names to the right of the axes, each with a leader from the end of its line.
    place = lambda value: (np.log(value) - np.log(low)) / (np.log(high) - np.log(low))
    for (name, color, mark, x, value), y in zip(ends, spread([place(value) for *_, value in ends], 0.05)):
        right = axes.transAxes.inverted().transform(axes.transData.transform((x, value)))[0] if x else 1
        axes.plot(
            [right, 1.02, 1.05],
            [place(value), place(value) if x is None or right > 0.9 else y, y],
            transform=axes.transAxes,
            clip_on=False,
            color=color,
            linewidth=0.8,
            marker=mark,
            markevery=[2],
            markersize=5,
        )
        axes.text(1.07, y, name, transform=axes.transAxes, va='center', fontsize=10)
    figure.savefig(dest, dpi=140)
    plt.close(figure)


def write_strips(pictures: dict[str, dict[int, str]], dest: str, rows: int = 5) -> None:
    """Write a table of samples: a line per name, a column per number of evaluations.

    Args:
        pictures: {name: {evaluations: PNG file of a grid}}; the first of a grid's `rows` lines is shown.
    """
    # The margin at the left is for names, that at the top for numbers, in inches.
    columns = sorted({nfe for cells in pictures.values() for nfe in cells})
    figure, panels = plt.subplots(
        len(pictures),
        len(columns),
        figsize=(2.6 * len(columns) + 1, 0.42 * len(pictures) + 0.4),
        squeeze=False,
    )
    figure.subplots_adjust(
        left=1.2 / (2.6 * len(columns) + 1),
        right=0.995,
        top=1 - 0.3 / (0.42 * len(pictures) + 0.4),
        bottom=0.01,
        wspace=0.04,
        hspace=0.1,
    )

    # Positions before imshow shrinks some panels to the shape of their picture.
    places = [[axes.get_position() for axes in line] for line in panels]
    for line, row, (name, cells) in zip(panels, places, pictures.items()):
        figure.text(
            row[0].x0 - 0.03 * row[0].width,
            (row[0].y0 + row[0].y1) / 2,
            name,
            ha='right',
            va='center',
            fontsize=10,
        )
        for axes, column in zip(line, columns):
            axes.axis('off')
            if column in cells:
                picture = np.asarray(open_image(cells[column]).convert('RGB'))
                axes.imshow(picture[: len(picture) // rows], interpolation='nearest')

    # Headings of the columns.
    for place, nfe in zip(places[0], columns):
        figure.text(
            (place.x0 + place.x1) / 2,
            place.y1,
            f'{nfe} evaluation{"s" * (nfe > 1)}',
            ha='center',
            va='bottom',
            fontsize=10,
        )
    figure.savefig(dest, dpi=130)
    plt.close(figure)


def embed(path: str, caption: str | None = None, css: str = '') -> str:
    """A PNG file as an <img> that contains its data, or with a caption as a <figure>."""
    # Within the page, which remains a single file to send.
    with open(path, 'rb') as file:
        data = base64.b64encode(file.read()).decode()
    image = (
        f'<img class="{css}" alt="{html.escape(caption or os.path.basename(path))}" '
        f'src="data:image/png;base64,{data}">'
    )
    return f'<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>' if caption else image


def write_page(dest: str, title: str, sections: Sequence[tuple[str, str]]) -> None:
    """Write a self-contained page of (heading, HTML) sections."""
    body = ''.join(
        f'<h2>{html.escape(heading)}</h2>{content}' if heading else content for heading, content in sections
    )
    with open(dest, 'w', encoding='utf-8') as file:
        file.write(
            '<!doctype html><html lang="en"><meta '
            f'charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>{body}</html>\n'
        )
