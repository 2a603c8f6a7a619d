"""Every measured number in README and docs stands in a record of docs/measured/, with its command and commit; and
docs/results.md is what its generator writes."""

import json
import re

import pytest

from docs import generate_results
from docs.generate_results import DOCS, is_known, known_numbers, numbers
from experiments.evidence import COMPARISONS
from training.objectives import OBJECTIVES

PAGES = {
    'README.md': ['demo', 'digits-drawn', 'flowmap'],
    'docs/guidance.md': ['guidance', 'demo'],
}  # and their records
# The version of Python, and two distances that README attributes to another project.
NOT_MEASURED = {'README.md': ['3.10', '2.3', '2.3']}
SECTIONS = generate_results.sections(generate_results.template())
RECORDS = sorted((DOCS / 'measured').glob('*.json'))


def test_results_md_is_what_the_generator_writes():
    assert (DOCS / 'results.md').read_text() == generate_results.page(), 'run python -m docs.generate_results'


@pytest.mark.parametrize('page', PAGES)
def test_every_number_of_a_page_is_in_its_records(page):
    known, found = known_numbers(PAGES[page]), numbers((DOCS.parent / page).read_text())
    assert len(found) > 20
    assert [number for number in found if not is_known(number, known)] == NOT_MEASURED.get(page, [])


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
    """A command, and for each table, fact and row the commit that measured it."""
    record = json.loads(path.read_text())
    assert record['command'].strip()
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
    assert generate_results.missing(found) == 'Not computed: `mcd` of seeds 1-2; `ect` of seeds 0-2.'
