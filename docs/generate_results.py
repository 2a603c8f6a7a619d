"""Write docs/results.md: `python -m docs.generate_results`. Without arguments, and in place.

The prose is results.md.in's; tables come from the records in docs/measured/. A line of the template is

    {{ NAME N }}            table N, from 1, of a record that was written by hand from the output of its command
    {{ NAME distances }}    of a comparison (`experiments.evidence`): also intervals, paired, recall, coverage, training,
                            missing
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import click

from dnnlib import cli
from dnnlib.text import as_ranges
from experiments import tables
from experiments.report import markdown_table, write_frontier
from training.objectives import OBJECTIVES

DOCS = Path(__file__).parent
PLACE = re.compile(r'^\{\{ ([\w-]+) (\w+) \}\}$', re.MULTILINE)
STEPS = (1, 2, 4, 8)  # of records that do not say
DRAWN = 'digits-drawn'  # the comparison before labels were balanced, until all of it is repeated
SHOWN = ('mcd', 'direct', 'flowmap', 'ect', 'mm')  # in the figure; the table has all


@click.command(cls=cli.Command)
def main() -> None:
    """Write docs/results.md and its figure."""
    (DOCS / 'results.md').write_text(page())
    write_figure(str(DOCS / 'images' / 'compare.png'))


def page() -> str:
    """The text of docs/results.md."""
    return PLACE.sub(lambda place: table_of(place[1], place[2]).rstrip('\n'), template())


def template() -> str:
    return (DOCS / 'results.md.in').read_text()


def record(name: str) -> dict:
    """A record of docs/measured/."""
    return json.loads((DOCS / 'measured' / f'{name}.json').read_text())


def is_recorded(name: str) -> bool:
    return (DOCS / 'measured' / f'{name}.json').exists()


def teacher_distance() -> float:
    """That of the digits' teacher with 511 evaluations and drawn labels, to which ratios are unless a table names another."""
    return reference(record(DRAWN)['rows'])['distance']


def reference(rows: Sequence[Mapping]) -> Mapping:
    """The row of the teacher with the most evaluations."""
    return max((row for row in rows if row['seed'] is None), key=lambda row: row['nfe'])


def table_of(name: str, what: str) -> str:
    """A table, or a line, in Markdown."""
    if not is_recorded(name):
        return 'Not computed.' if what == 'distances' else ''
    found = record(name)
    if what.isdigit():
        return of_cells(found['tables'][int(what) - 1])
    rows = found['rows']
    if what == 'missing':
        return missing(found)
    best = reference(rows)
    if what == 'training':
        header, lines = tables.training_table(rows)
    elif what == 'distances':
        header, lines = tables.distances_table(rows, best, 'distance')
    elif what == 'intervals':
        header, lines = tables.intervals_table(rows, best)
    elif what == 'paired':
        header, lines = tables.paired_table(rows, best)
    else:
        header, lines = tables.diversity_table(rows, what, best)
    # Names of objectives are code.
    return markdown_table(
        header,
        [[f'`{name}`' if name in OBJECTIVES else name, *cells] for name, *cells in lines if any(cells)],
    )


def write_figure(dest: str) -> None:
    """Plot what a reader chooses among: some objectives, and the teacher by its best solvers."""
    rows = record(DRAWN)['rows']
    lines = {
        name: {nfe: [row['distance'] for row in found] for nfe, found in cells.items()}
        for name, cells in tables.of_students(rows).items()
        if name in SHOWN
    }
    for title, searched in tables.BEST.items():
        found = tables.best_of_teacher(rows, searched)
        lines[title] = {nfe: [row['distance']] for nfe, row in found.items()}
    best = reference(rows)
    level = f'teacher, {best["nfe"]} evaluations', best['distance']
    write_frontier(lines, dest, 'Fréchet distance (digits classifier)', level)


def of_cells(table: Mapping) -> str:
    """A table whose cells are text, numbers, or {'distances': one for each seed}, shown with the ratio of their mean to the
    teacher's distance, `reference` if the table has one."""
    best = table.get('reference', teacher_distance())
    numbers = [
        [row[i] for row in table['rows'] if isinstance(row[i], float)] for i in range(len(table['columns']))
    ]
    bold = [min(column) if table['least_in_bold'] and column else None for column in numbers]
    rows = [
        [
            cell_text(cell, digits, least, best)
            for cell, digits, least in zip(row, table['digits'], bold, strict=True)
        ]
        for row in table['rows']
    ]
    return markdown_table(table['columns'], rows, table['align'])


def cell_text(cell: str | float | Mapping, digits: int, least: float | None, best: float) -> str:
    if isinstance(cell, str):
        return cell
    if isinstance(cell, float):
        return f'**{cell:.{digits}f}**' if cell == least else f'{cell:.{digits}f}'
    values = cell['distances']
    each = ', '.join(f'{value:.{digits}f}' for value in values)
    return f'{sum(values) / len(values) / best:.2f} ({each})'


def missing(found: Mapping) -> str:
    """Which rows of a comparison were not computed."""
    measured = {(row['objective'], row['nfe'], row['seed']) for row in found['rows']}
    # {(numbers of steps, seeds): objectives}
    lacking: dict[tuple[str, str], list[str]] = {}
    for name in found['objectives']:
        counts = (1,) if OBJECTIVES[name].one_step else found.get('steps', STEPS)
        of_counts: dict[str, list[int]] = {}
        for seed in found['seeds']:
            missed = [nfe for nfe in counts if (name, nfe, seed) not in measured]
            some = f' in {", ".join(map(str, missed))} steps' * (len(missed) < len(counts))
            if missed:
                of_counts.setdefault(some, []).append(seed)
        for some, seeds in of_counts.items():
            lacking.setdefault((some, as_ranges(seeds)), []).append(f'`{name}`')
    if not lacking:
        return 'All rows are computed.'
    each = (
        f'{", ".join(names)}{some} of seed{"s" * ("-" in seeds or "," in seeds)} {seeds}'
        for (some, seeds), names in lacking.items()
    )
    return f'Not computed: {"; ".join(each)}.'


# ----------------------------------------------------------------------------
# Numbers.


def numbers(text: str) -> list[str]:
    """The decimal numbers of a text in Markdown, as they are written, but for those in code."""
    text = re.sub(r'```.*?```|`[^`\n]*`|\]\([^)]*\)', ' ', text, flags=re.DOTALL)
    # Indented code follows an empty line; other indented lines belong to lists.
    text = re.sub(r'(?<=\n\n)( {4}.*(\n|$))+', ' ', text)
    return re.findall(r'(?<![\w.])\d+\.\d+(?![\w.]*\d)', text)


def sections(text: str) -> list[tuple[str, set[str]]]:
    """The parts of a template between headings, and the records that each names: in its places, and for numbers of other
    parts in a comment `<!-- records: NAME, NAME -->`."""
    parts = re.split(r'^(?=##+ )', text, flags=re.MULTILINE)
    listed = lambda part: ','.join(re.findall(r'<!-- records: (.*?) -->', part))
    return [
        (
            part,
            {place[0] for place in PLACE.findall(part)} | {*listed(part).replace(' ', '').split(',')} - {''},
        )
        for part in parts
    ]


def known_numbers(names: Iterable[str]) -> list[float]:
    """All measured numbers of records, ratios of distances to the teacher's, means of seeds, and options of their commands."""
    found: list[float] = []
    for of_file in (record(name) for name in names if is_recorded(name)):
        found += leaves(of_file)
        if 'rows' in of_file and (rows := of_file['rows']):
            best = reference(rows)['distance']
            groups = itertools.groupby(
                sorted(rows, key=lambda row: (row['objective'], row['solver'], row['nfe'])),
                key=lambda row: (row['objective'], row['solver'], row['nfe']),
            )
            for _, group in groups:
                group = list(group)
                values = [row['distance'] for row in group]
                found += [value / best for value in (*values, sum(values) / len(values))]
                # Means of seeds, as in the tables.
                for entry in ('recall', 'coverage', 'paired_error'):
                    values = [row[entry] for row in group if row.get(entry) is not None]
                    found += [sum(values) / len(values)] if values else []
        for table in of_file.get('tables', []):
            best = table.get('reference', teacher_distance())
            for cell in itertools.chain(*table['rows']):
                if isinstance(cell, Mapping):
                    values = cell['distances']
                    found += [value / best for value in (*values, sum(values) / len(values))]
    return found


def leaves(value) -> list[float]:
    """All numbers in nested lists and mappings, and in their texts."""
    if isinstance(value, str):
        return [float(number) for number in re.findall(r'\d+\.\d+', value)]
    if isinstance(value, (int, float)):
        return [float(value)]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [number for each in inner for number in leaves(each)]


def is_known(number: str, known: Sequence[float]) -> bool:
    """Whether a written number is one of the known ones, rounded to its digits."""
    digits = len(number.partition('.')[2])
    half = 0.5 * 10**-digits * (1 + 1e-9)
    # Numbers are taken without their sign, a dash of typography.
    return any(abs(float(number) - abs(value)) <= half for value in known)


if __name__ == '__main__':
    main()
