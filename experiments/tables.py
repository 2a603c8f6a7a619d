"""Tables, plot, samples and page of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from experiments import teacher
from experiments.bundled import BUNDLED
from experiments.results import distance_entries
from experiments.runner import DIVERSITY, Runner
from metrics.options import PAIRS
from training.objectives import OBJECTIVES

# The teacher's lines, and whether their levels are searched.
BEST = {'teacher, best solver': False, 'teacher, searched levels': True}

# ----------------------------------------------------------------------------
# Tables.


def of_students(rows: Sequence[dict]) -> dict[str, dict[int, list[dict]]]:
    """{objective: {evaluations: rows, one per seed}}, in the order of OBJECTIVES."""
    table = {name: {} for name in OBJECTIVES}
    students = [row for row in rows if row['seed'] is not None]
    for row in sorted(students, key=lambda row: (row['nfe'], row['seed'])):
        table[row['objective']].setdefault(row['nfe'], []).append(row)
    return {name: cells for name, cells in table.items() if cells}


def of_teacher(rows: Sequence[dict], solver: str) -> dict[int, dict]:
    """{evaluations: row} of the teacher with a solver and its own noise levels."""
    return {
        row['nfe']: row
        for row in rows
        if row['seed'] is None and row['solver'] == solver and not row.get('searched')
    }


def best_of_teacher(rows: Sequence[dict], searched: bool, entry: str = 'distance') -> dict[int, dict]:
    """{evaluations: row} of the teacher by the best of the fast solvers, or with searched levels."""
    own = [row for row in rows if row['seed'] is None]
    found = {nfe: teacher.best(own, nfe, searched, entry) for nfe in sorted({row['nfe'] for row in own})}
    return {nfe: row for nfe, row in found.items() if row}


def distances_table(rows: Sequence[dict], best: dict, entry: str) -> tuple[list[str], list[list[str]]]:
    """Header and lines: the mean over seeds relative to the row `best`, and in parentheses each seed's value.

    Args:
        best: the teacher with many evaluations.
        entry: key of the distance in a row.
    """

    def text(found: list[dict]) -> str:
        values = [row[entry] for row in found]
        each = ', '.join(f'{value:.4g}' for value in values)
        return f'{sum(values) / len(values) / best[entry]:.2f} ({each})'

    return table(rows, rows, best, entry, text)


def intervals_table(rows: Sequence[dict], best: dict) -> tuple[list[str], list[list[str]]]:
    """Header and lines: the 95 % interval of the distance, for each seed. Rows of older versions have none."""

    def text(found: list[dict]) -> str:
        ends = [row['interval'] for row in found if 'interval' in row]
        return ', '.join(f'{low:.4g} to {high:.4g}' for low, high in ends)

    return table(rows, rows, best, 'distance', text)


def paired_table(rows: Sequence[dict], best: dict) -> tuple[list[str], list[list[str]]]:
    """Header and lines: the mean of the paired error over seeds, and in parentheses each seed's; a dash for images
    without pairs. Rows of older versions have none.

    Args:
        best: the teacher with many evaluations, with which all are paired.
    """
    # Of the teacher only what has pairs, which the least error chooses among.
    paired = [row for row in rows if row.get('paired_error') is not None]

    def text(found: list[dict]) -> str:
        values = [row['paired_error'] for row in found if 'paired_error' in row]
        if not values or None in values:
            return '–' if values else ''
        each = f' ({", ".join(f"{value:.3f}" for value in values)})' if len(values) > 1 else ''
        return f'{sum(values) / len(values):.3f}{each}'

    return table(rows, paired, best, 'paired_error', text)


def table(
    rows: Sequence[dict], teachers: Sequence[dict], best: dict, entry: str, text: Callable[[list[dict]], str]
) -> tuple[list[str], list[list[str]]]:
    """Header and lines of what models make in each number of evaluations.

    Args:
        teachers: the rows among which those of the teacher are chosen, the best solver by `entry`.
        text: of a cell, from its rows, one for each seed.
    """
    students, euler, heun = of_students(rows), of_teacher(teachers, 'euler'), of_teacher(teachers, 'heun')
    columns = sorted({nfe for cells in students.values() for nfe in cells} | set(euler))

    # Students, then the teacher.
    lines = [
        [name, *(text(cells[n]) if n in cells else '' for n in columns)] for name, cells in students.items()
    ]
    lines.append(['teacher, Euler', *(text([euler[n]]) if n in euler else '' for n in columns)])
    for title, searched in BEST.items():
        found = best_of_teacher(teachers, searched, entry)
        named = [f'{text([found[n]])} {found[n]["solver"]}' if n in found else '' for n in columns]
        lines.append([title, *named])

    near = heun_columns(heun, columns, best)
    cells = [f'{text([heun[near[n]]])}, {near[n]} evaluations' if near[n] else '' for n in columns]
    lines.append(['teacher, Heun', *cells])
    return ['objective', *map(str, columns)], [line for line in lines if any(line[1:])]


def heun_columns(heun: dict[int, dict], columns: Sequence[int], best: dict) -> dict[int, int | None]:
    """{column: evaluations of Heun's method in it}: an odd number, so that in an even column stands one less."""
    return {n: next((k for k in (n, n - 1) if k in heun and k != best['nfe']), None) for n in columns}


def diversity_table(rows: Sequence[dict], measure: str, best: dict) -> tuple[list[str], list[list[str]]]:
    """Header and lines: the mean of `recall` or `coverage` over seeds. The teacher's are those of its best distances."""

    def text(found: list[dict]) -> str:
        values = [row[measure] for row in found if measure in row]
        return f'{sum(values) / len(values):.3f}' if values else ''

    return table(rows, rows, best, 'distance', text)


def training_table(rows: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: optimizer steps × network evaluations per image of a step."""
    students = of_students(rows)
    columns = sorted({nfe for cells in students.values() for nfe in cells})
    text = lambda row: f'{row["train_steps"]:,} × {row["cost"]:.3g}'
    lines = [
        [name, *(text(cells[n][0]) if n in cells else '' for n in columns)]
        for name, cells in students.items()
    ]
    return ['objective', *map(str, columns)], lines


def notes(rows: Sequence[dict], best: dict, budget: int, batch: int, metrics: Sequence[str]) -> list[str]:
    """Lines below the tables: units, and in what the objectives differ."""
    lines = [
        f'Columns are network evaluations of an image. The budget of a model is {budget:,} network '
        f'evaluations for each place in the batch of {batch}, where a forward pass counts 1 and the '
        "student's forward and backward together 3.",
        f"Ratios are to the teacher's own distance with {best['nfe']} evaluations (Heun); in brackets the "
        f'Fréchet distance of {best["images"]:,} images, of each training seed. By {next(iter(metrics))}, '
        f'that of the teacher is {best["distance"]:.4g}.',
        f'The best solver is that of {" and ".join(teacher.FAST)} with the least distance, which is named; '
        f'the teacher has the benefit of that choice. Levels of {" and ".join(teacher.SEARCHED)} are '
        'searched by search.py --schedule.',
    ]

    if any('recall' in row for row in rows):
        lines.append(
            "Recall and coverage: shares of the data near a model's images, see docs/recipes.md; those of "
            f'the teacher with {best["nfe"]} evaluations are {best.get("recall", float("nan")):.3f} and '
            f'{best.get("coverage", float("nan")):.3f}.'
        )

    # Which images have pairs.
    if any('paired_error' in row for row in rows):
        lines.append(
            f"Paired error: root mean square distance of a model's images from those of the teacher with "
            f'{best["nfe"]} evaluations, of the same seeds and labels, over the standard deviation of the '
            f"data ({PAIRS:,} pairs or all; docs/method.md). The teacher's solver is the one with the least."
        )
    if none := sorted({row['objective'] for row in rows if row.get('paired_error', 0) is None}):
        lines.append(
            f'–: {", ".join(none)} in more than one step draws noise between steps, so its images have no '
            'pairs.'
        )

    # Objectives that share a condition share a line.
    students = {name: OBJECTIVES[name] for name in of_students(rows)}
    halving = [name for name, o in students.items() if 'S_start' in o.own_defaults]
    fixed_steps = [name for name, o in students.items() if o.fixed_steps and name not in halving]
    any_steps = [name for name, o in students.items() if o.config().two_time]
    one_step = [name for name, o in students.items() if o.one_step]
    stochastic = [
        name for name, o in students.items() if not o.fixed_steps and name not in any_steps + one_step
    ]
    two_stages = [name for name, o in students.items() if o.teacher == 'consistency']
    no_teacher = [name for name, o in students.items() if not o.teacher]
    for names, text in (
        (fixed_steps, 'a student for each number of steps, each with the whole budget.'),
        (
            halving,
            'one chain of students, which has the budget as a whole; each is what it had made by then.',
        ),
        (one_step, 'a student of one step.'),
        (any_steps, 'one model for all columns, told where each of its steps ends.'),
        (stochastic, 'one model for all columns, sampled in that many stochastic steps.'),
        (two_stages, 'half of the budget for the first stage, ect, half for the second.'),
        (no_teacher, 'no teacher in training, but its weights to start from.'),
    ):
        if names:
            lines.append(f'{", ".join(names)}: {text}')

    # Bundled data sets have metrics of their own.
    if any(set(metrics) == set(bundled.metrics) for bundled in BUNDLED.values()):
        lines.append(
            'The features are made for this data: those of a classifier trained on it, principal components '
            'of its pixels, a random convolution. This is not FID, and compares with nothing outside this '
            'table.'
        )
    return lines


# ----------------------------------------------------------------------------
# The report.


def shown_samples(rows: Sequence[dict], best: dict) -> dict[str, dict[int, dict]]:
    """{name: {evaluations: row}} of the pictures: students of the first seed, and beside them the teacher."""
    lines = {
        name: {nfe: found[0] for nfe, found in cells.items()} for name, cells in of_students(rows).items()
    }
    columns = {nfe for cells in lines.values() for nfe in cells}
    # Without a student, all that the teacher has.
    euler, searched = of_teacher(rows, 'euler'), best_of_teacher(rows, searched=True)
    for title, cells in (('teacher, Euler', euler), ('teacher, searched', searched)):
        lines[title] = {nfe: row for nfe, row in cells.items() if not columns or nfe in columns}
    lines[f'teacher, {best["nfe"]}'] = {max(columns, default=best['nfe']): best}
    return {name: cells for name, cells in lines.items() if cells}


def write_report(
    runner: Runner, rows: Sequence[dict], best: dict, budget: int, batch: int, metrics: Sequence[str]
) -> None:
    """Write table.md, compare.png, samples.png and report.html; distances are relative to the row `best`."""
    from experiments import report as pages

    # Tables.
    tables = {
        f'Distance by {metric}': distances_table(rows, best, entry)
        for metric, entry in distance_entries(metrics).items()
    }
    if any('interval' in row for row in rows):
        tables[f'95 % intervals of the samples ({next(iter(metrics))})'] = intervals_table(rows, best)
    if any('paired_error' in row for row in rows):
        tables['Paired error'] = paired_table(rows, best)
    for measure in DIVERSITY:
        if any(measure in row for row in rows):
            title = f'{measure.capitalize()} ({next(iter(metrics))})'
            tables[title] = diversity_table(rows, measure, best)
    tables['Optimizer steps × network evaluations for an image'] = training_table(rows)
    text = notes(rows, best, budget, batch, metrics)
    sections = [f'{title}:\n\n{pages.markdown_table(*table)}' for title, table in tables.items()]
    runner.path('table.md').write_text('\n'.join([*sections, *(f'- {line}' for line in text)]) + '\n')

    # Plot of distance over evaluations; the reference is a level of its own.
    students, euler, heun = of_students(rows), of_teacher(rows, 'euler'), of_teacher(rows, 'heun')
    lines = {
        name: {nfe: [row['distance'] for row in found] for nfe, found in cells.items()}
        for name, cells in students.items()
    }
    lines['teacher, Euler'] = {nfe: [row['distance']] for nfe, row in euler.items()}
    lines['teacher, Heun'] = {nfe: [row['distance']] for nfe, row in heun.items() if row is not best}
    for title, searched in BEST.items():
        lines[title] = {nfe: [row['distance']] for nfe, row in best_of_teacher(rows, searched).items()}
    pages.write_frontier(
        lines,
        str(runner.path('compare.png')),
        f'Fréchet distance ({next(iter(metrics))})',
        (f'teacher, {best["nfe"]} evaluations', best['distance']),
    )

    # Samples.
    grid = lambda row: str(runner.path('grids', f'{row["model"]}.png'))
    pictures = {
        name: {nfe: grid(row) for nfe, row in cells.items()}
        for name, cells in shown_samples(rows, best).items()
    }
    pages.write_strips(pictures, str(runner.path('samples.png')))

    # The page.
    shown = [pages.embed(grid(row), f'{row["model"]}: {row["distance"]:.4g}') for row in rows]
    commands = runner.record.read_text() if runner.record.exists() else ''
    paragraphs = ''.join(f'<p>{pages.html.escape(line)}</p>' for line in text)
    pages.write_page(
        str(runner.path('report.html')),
        'Objectives side by side',
        [
            ('', pages.embed(str(runner.path('compare.png')), css='wide') + paragraphs),
            *((title, pages.html_table(*table)) for title, table in tables.items()),
            ('Samples, from the same seeds', pages.embed(str(runner.path('samples.png')), css='wide')),
            ('More of them', f'<div class="grids">{"".join(shown)}</div>'),
            ('Commands', f'<pre>{pages.html.escape(commands)}</pre>'),
        ],
    )
