"""What the README and the files beside it say, against the code."""

import re

import pytest
import yaml
from helpers import ROOT
from pages import README

from training.objectives import OBJECTIVES

TEACHERS = {'diffusion': 'diffusion model', 'consistency': 'consistency model', None: 'none'}


def rows(title):
    """Cells of the rows of the table under the heading that begins so."""
    section = README.read_text().partition(f'## {title}')[2].partition('\n## ')[0]
    lines = [line for line in section.splitlines() if line.startswith('| ')]
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines[2:]]


def test_the_table_of_objectives_has_all_of_them_and_what_they_start_from():
    table = {row[0].strip('`'): row for row in rows('Objectives')}
    assert table.keys() == OBJECTIVES.keys()
    for name, (_, paper, teacher, sampler, use) in table.items():
        assert teacher == TEACHERS[OBJECTIVES[name].teacher], name
        assert '](https://arxiv.org/abs/' in paper or name == 'direct'
        assert ('`--S`' in sampler) == ('S' in OBJECTIVES[name].own) and use, name


def test_the_intervals_of_the_demo_support_what_is_said_of_them():
    """The teacher with 8 evaluations is apart from all others, and they overlap one another."""
    intervals = {
        tuple(row[:3]): tuple(map(float, re.search(r'\((.*) to (.*)\)', row[3]).groups()))
        for row in rows('Try it')
    }
    low, high = intervals.pop(('teacher', 'euler', '8'))
    assert len(intervals) >= 5 and all(high < a or b < low for a, b in intervals.values())
    assert max(a for a, _ in intervals.values()) < min(b for _, b in intervals.values())
    text = ' '.join(README.read_text().split())
    assert (
        'separate the teacher with 8 evaluations from every other row, and no two of the other rows' in text
    )


def test_sizes_have_the_command_that_measured_them():
    for what, size, command in rows('Install'):
        assert re.match(r'[\d.]+ [GM]B', size) and re.fullmatch(r'`.+`', command), what


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    project = (ROOT / 'pyproject.toml').read_text()
    assert f'version = "{citation["version"]}"' in project and f'license = "{citation["license"]}"' in project
    assert {'cff-version', 'message', 'title', 'authors'} <= citation.keys()
    assert citation['preferred-citation']['url'] in (ROOT / 'docs' / 'references.md').read_text()


def test_the_image_of_docker_has_the_tested_versions_and_nothing_of_this_folder_that_is_large():
    lines = (ROOT / 'Dockerfile').read_text().splitlines()
    (install,) = (line for line in lines if 'pip install' in line)
    assert '-c constraints.txt' in install and "'.[" in install
    ignored = (ROOT / '.dockerignore').read_text().split()
    assert {'.*', '*-out*', 'datasets', 'training-runs'} <= set(ignored)


@pytest.mark.parametrize('name', ['CONTRIBUTING.md', 'README.md'])
def test_links_beside_the_readme_lead_somewhere(name):
    text = (ROOT / name).read_text()
    targets = [t for t in re.findall(r'\]\(([^)\s]+)\)', text) if not t.startswith('https://')]
    assert targets and all((ROOT / target.partition('#')[0]).exists() for target in targets)


def test_the_environment_says_that_edm_has_one_of_the_same_name():
    for name in ('README.md', 'environment.yml'):
        text = (ROOT / name).read_text()
        assert "EDM's own environment" in text and '-n edm-multistep' in text
