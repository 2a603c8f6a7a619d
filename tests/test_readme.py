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
        known = OBJECTIVES[name]
        assert teacher == TEACHERS[known.teacher] + ', or none' * (not known.needs_teacher), name
        assert '](https://arxiv.org/abs/' in paper or name == 'direct'
        assert ('`--S`' in sampler) == ('S' in known.own_defaults) and use, name


def test_the_intervals_of_the_demo_support_what_is_said_of_them():
    """By the first table: where a student wins, and what cannot be told apart."""
    interval = lambda cell: tuple(map(float, re.search(r'\((.*) to (.*)\)', cell).groups()))
    table = {row[0]: [interval(cell) if cell else None for cell in row[1:]] for row in rows('Try it')}
    assert list(table) == ['1', '2', '4', '5', '8', '511']
    teacher = {nfe: list(filter(None, cells[:3])) for nfe, cells in table.items()}
    students = {nfe: list(filter(None, cells[3:])) for nfe, cells in table.items()}

    # With 1 and 2 evaluations all students are below the teacher; with 4 the intervals overlap.
    apart = lambda nfe: max(high for _, high in students[nfe]) < min(low for low, _ in teacher[nfe])
    assert students['1'] and students['2'] and apart('1') and apart('2') and not apart('4')
    assert min(low for low, _ in students['4']) < min(low for low, _ in teacher['4'])

    # With 5 and 8 the teacher's best overlap its 511, and the students do. Students of 8 steps overlap that of 4; those of
    # mcd in 2 and of direct in 1 are apart from them.
    overlap = lambda intervals: max(low for low, _ in intervals) < min(high for _, high in intervals)
    assert overlap([*teacher['511'], min(teacher['5']), *students['8'], *teacher['8'][1:]])
    assert overlap([*students['8'], *students['4']])
    (of_mcd, of_direct), mcd_2, direct_1 = students['8'], students['2'][0], students['1'][0]
    assert of_mcd[1] < mcd_2[0] and of_direct[1] < direct_1[0]
    text = ' '.join(README.read_text().split())
    for said in (
        'with 1 and 2 evaluations, by far',
        'but the intervals overlap',
        "as good as in 511 of Heun's",
        'no student beats it',
    ):
        assert said in text, said


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
