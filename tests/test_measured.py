"""Every measured number in README and docs stands in a record of docs/measured/, with its command and commit; and
docs/results.md is what its generator writes."""

import json
import re

import pytest

from docs import generate_results
from docs.generate_results import DOCS, is_known, known_numbers, numbers
from experiments.evidence import COMPARISONS
from training.objectives import OBJECTIVES

# {page: its records}; RESULTS is the record that `python -m benchmarks` writes.
RESULTS = DOCS.parent / 'benchmarks' / 'RESULTS.json'
PAGES = {
    'README.md': ['demo', 'digits-drawn', 'flowmap'],
    'docs/differences.md': [],
    'docs/editing.md': ['editing'],
    'docs/formats.md': [],
    'docs/guidance.md': ['guidance'],
    'docs/logging.md': [],
    'docs/method.md': ['method'],
    'docs/new-objective.md': [],
    'docs/own-images.md': ['own-images'],
    'docs/performance.md': ['performance', RESULTS],
    'docs/README.md': [],
    'docs/recipes.md': [],
    'docs/references.md': [],
    'docs/scaling.md': [RESULTS],
    'docs/slurm.md': [RESULTS],
}
FULL = {'README.md', 'docs/editing.md', 'docs/guidance.md', 'docs/performance.md'}  # of numbers
GENERATED = {'docs/results.md', 'docs/options.md'}  # the first from records, see below; the second has none
# Numbers of pages that nobody measured here: constants of formulas, settings, versions, and what others published, all of
# which the page attributes; counts that other tests repeat. A new number is measured, or is added here.
NOT_MEASURED = {
    'README.md': '3.10 2.3 2.3',  # Python; FIDs of another project
    'docs/differences.md': '0.5 0.1 51.2 25.6 0.06 3.2',
    'docs/editing.md': '127.5',  # gray levels
    'docs/formats.md': '5.81 3.25 0.12 2.15 4.17 4.62 3.71 3.28 0.5 0.002 2.0',  # EDM2's encoder; a boundary; a license
    'docs/method.md': '2403.06807 2206.00364 1.2 1.2 0.001 0.00054 0.005 1.0 1.4 1.0 1.6 0.982 1.1 7.5 0.25 1.6 '
    # Of papers, to the end of the page.
    '2312.02696 22.3 22.6 4.54 7.84 3.99 7.52 5.55 6.84 3.69 7.20 2.0 2.4',
    'docs/own-images.md': '7.7 2.1 31.9 4.6 9.8 7.9',  # parameters and memory, tests/test_own_images.py
    'docs/performance.md': '5.5',  # a count of passes
    'docs/recipes.md': '2.3 0.002 0.75 12.8 3.2 0.05 10.5 3.2',
    'docs/references.md': '2.3 2.7 2.3',  # FIDs of another project
    'docs/scaling.md': '3.35',  # an assumption
}
SECTIONS = generate_results.sections(generate_results.template())
RECORDS = sorted((DOCS / 'measured').glob('*.json'))


def test_results_md_is_what_the_generator_writes():
    assert (DOCS / 'results.md').read_text() == generate_results.page(), 'run python -m docs.generate_results'


@pytest.mark.parametrize('page', PAGES)
def test_every_number_of_a_page_is_in_its_records(page):
    known = known_numbers(name for name in PAGES[page] if name != RESULTS)
    if RESULTS in PAGES[page]:
        known += [
            float(number.replace(',', '')) for number in re.findall(r'\d[\d,]*\.?\d*', RESULTS.read_text())
        ]
    found = numbers((DOCS.parent / page).read_text())
    assert len(found) > 20 or page not in FULL
    assert [number for number in found if not is_known(number, known)] == NOT_MEASURED.get(page, '').split()


def test_every_page_is_compared_with_its_records():
    pages = {str(path.relative_to(DOCS.parent)) for path in (DOCS.parent / 'README.md', *DOCS.glob('*.md'))}
    assert pages == {*PAGES, *GENERATED}


@pytest.mark.parametrize(
    ('text', 'names'), SECTIONS, ids=[text.splitlines()[0].strip('# ') for text, _ in SECTIONS]
)
def test_every_number_of_a_section_of_the_results_is_in_the_records_that_it_names(text, names):
    known = known_numbers(names)
    assert [number for number in numbers(text) if not is_known(number, known)] == []


def test_a_number_that_nobody_measured_is_found_out():
    """Rounded values and ratios count, in prose and tables; numbers in code are not claims."""
    assert numbers('| 1.20 (0.0451) |, `--lr=2.5`, [x](y.md#1.5) v1.2.3 and 0.07.\n```\n9.9\n```') == [
        '1.20',
        '0.0451',
        '0.07',
    ]
    assert is_known('0.045', [0.04512]) and is_known('1.2', [1.1512])
    assert not is_known('0.046', [0.04512]) and not is_known('0.0452', [0.04512])


@pytest.mark.parametrize('path', RECORDS, ids=lambda path: path.stem)
def test_a_record_says_how_and_when(path):
    """A command, seeds, and for each table, fact and row the commit that measured it."""
    record = json.loads(path.read_text())
    assert record['command'].strip() and record['seeds']
    parts = [part for kind in ('tables', 'facts', 'rows') for part in record.get(kind, [])]
    assert parts and all(re.fullmatch('[0-9a-f]{12}(-dirty)?', part['commit'] or '') for part in parts)
    if 'rows' in record:
        assert {*record['objectives']} <= {*OBJECTIVES} and record['seeds'] and record['settings']
        assert {row['seed'] for row in record['rows']} <= {None, *record['seeds']}
        # Those with drawn labels are of an earlier version.
        name = path.stem.removesuffix('-drawn')
        assert f'--only={name}' in record['command'] and name in COMPARISONS


def test_rows_that_were_not_computed_are_named():
    found = dict(objectives=['mcd', 'sid', 'ect'], seeds=[0, 1, 2], rows=[])
    row = lambda objective, nfe, seed: dict(objective=objective, nfe=nfe, seed=seed)
    found['rows'] = [row('mcd', nfe, 0) for nfe in (1, 2, 4, 8)] + [row('ect', nfe, 1) for nfe in (1, 2, 4)]
    found['rows'] += [row('sid', 1, seed) for seed in (0, 1, 2)]
    assert generate_results.missing(found) == (
        'Not computed: `mcd` of seeds 1-2; `ect` of seeds 0,2; `ect` in 8 steps of seed 1.'
    )
