"""Tables, sample grids and curves of a set of runs, as files and as one self-contained HTML page."""
from __future__ import annotations

import base64
import html
import json
import os
from collections.abc import Sequence

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from training.generation import image_grid

STYLE = '''
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c1e21; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } th, td { padding: .35rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; background: #f6f7f8; }
.grids { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; } figure img { image-rendering: pixelated; display: block; }
figcaption { font-size: .85rem; color: #555; margin-top: .2rem; } pre { background: #f6f7f8; padding: .8rem; overflow-x: auto; font-size: .8rem; }
img.wide { max-width: 100%; }
'''


def read_jsonl(path: str | os.PathLike) -> list[dict]:
    """The objects of a .jsonl file; an empty list where there is none."""
    if not os.path.exists(path):
        return []
    with open(path, encoding='utf-8') as file:
        return [json.loads(line) for line in file]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column left-aligned and the others right-aligned."""
    lines = [header, [':--'] + ['--:'] * (len(header) - 1), *rows]
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in lines) + '\n'


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as HTML."""
    line = lambda cells, tag: '<tr>' + ''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in cells) + '</tr>'
    return '<table>' + line(header, 'th') + ''.join(line(row, 'td') for row in rows) + '</table>'


def write_grid(paths: Sequence[str], dest: str, columns: int = 8, pixel: int = 4) -> None:
    """Images from PNG files, tiled into one PNG, each pixel `pixel` pixels wide; the number of files is a multiple of `columns`."""
    arrays = [np.asarray(Image.open(path)) for path in paths]
    images = torch.from_numpy(np.stack([a[None] if a.ndim == 2 else a.transpose(2, 0, 1) for a in arrays]))
    images = torch.nn.functional.pad(images, (0, 1, 0, 1), value=96)
    grid = image_grid(images, columns).permute(1, 2, 0).numpy()
    picture = Image.fromarray(grid[:, :, 0] if grid.shape[2] == 1 else grid)
    picture.resize((picture.width * pixel, picture.height * pixel), Image.NEAREST).save(dest)


def write_side_by_side(pictures: dict[str, str], dest: str) -> None:
    """PNG files in a row, each under its caption."""
    figure, panels = plt.subplots(1, len(pictures), figsize=(4 * len(pictures), 3), constrained_layout=True)
    for axes, (caption, path) in zip(panels, pictures.items()):
        axes.imshow(np.asarray(Image.open(path).convert('L')), cmap='gray', interpolation='nearest')
        axes.set_title(caption, fontsize=10)
        axes.axis('off')
    figure.savefig(dest, dpi=110)
    plt.close(figure)


def write_curves(curves: dict[str, tuple[Sequence[float], Sequence[float]]], dest: str, ylabel: str, levels: dict[str, float] | None = None) -> None:
    """Line plot of {name: (kimg, values)} on a logarithmic axis, with horizontal dashed `levels`."""
    figure, axes = plt.subplots(figsize=(7, 3.6), constrained_layout=True)
    for name, (x, y) in curves.items():
        axes.plot(x, y, marker='.', label=name)
    for index, (name, level) in enumerate((levels or {}).items()):
        axes.axhline(level, linestyle='--', color=f'{0.3 + 0.3 * index}', linewidth=1, label=name)
    axes.set(xlabel='thousands of images', ylabel=ylabel, yscale='log')
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(dest, dpi=110)
    plt.close(figure)


def embed(path: str, caption: str | None = None, css: str = '') -> str:
    """An <img>, or a <figure> with a caption, that holds the PNG file itself."""
    with open(path, 'rb') as file:
        data = base64.b64encode(file.read()).decode()
    image = f'<img class="{css}" alt="{html.escape(caption or os.path.basename(path))}" src="data:image/png;base64,{data}">'
    return f'<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>' if caption else image


def write_page(dest: str, title: str, sections: Sequence[tuple[str, str]]) -> None:
    """A self-contained page of (heading, HTML) sections."""
    body = ''.join(f'<h2>{html.escape(heading)}</h2>{content}' if heading else content for heading, content in sections)
    with open(dest, 'w', encoding='utf-8') as file:
        file.write(f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
                   f'<h1>{html.escape(title)}</h1>{body}</html>\n')
