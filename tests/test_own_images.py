"""docs/own-images.md: its commands run one after the other, on fewer images, and its tables are what they say."""

import json
import os
import re
import shlex

import pytest
import torch
from helpers import ROOT, invoke, run
from pages import shell_lines

import train

PAGE = ROOT / 'docs' / 'own-images.md'
# The same commands, with little work.
SMALLER = {
    r'--duration=\S+': '--duration=0.000064',
    r'--budget=\S+': '--budget=0.001',
    r'--seeds=0-999': '--seeds=0-15',
    r'--num=1000': '--num=16',
    r'(--source=photos .*)(--dest)': r'\1--max-images-per-class=16 \2',
    r'--cbase=64 --cres=1,2,2 --num_blocks=2': '--cbase=16 --cres=1,2 --num_blocks=1',
    r'--batch=256': '--batch=8',
    r'--precision=fp16 ': '',  # which warns where there is no GPU
}


class Colors(torch.nn.Module):
    """A feature detector: the colors of four patches."""

    def forward(self, images, return_features: bool = False):
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)


def smaller(command: str) -> str:
    for pattern, new in SMALLER.items():
        command = re.sub(pattern, new, command)
    return command


def newest(match: re.Match) -> str:
    """A snapshot of the shorter run in place of the page's."""
    folder = match[1]
    return os.path.join(folder, max(name for name in os.listdir(folder) if name.endswith('.pkl')))


def test_the_commands_run_one_after_the_other(tmp_path):
    """All in one folder, but for the detector, which trains for a minute."""
    commands, ran = [re.sub(r'\bown/', f'{tmp_path}/own/', line) for line in shell_lines(PAGE)], []
    for command in map(smaller, commands):
        arguments = shlex.split(re.sub(r'(\S+/own/\w+)/network-snapshot-\d+\.pkl', newest, command))
        assert arguments.pop(0) == 'python', command
        if arguments[:2] == ['-m', 'metrics.small_detectors']:
            torch.jit.script(Colors()).save(tmp_path / 'own' / 'classifier.pt')
            continue
        done = run(*arguments)
        ran.append(arguments[0])
        if '--budget=0.001' in arguments:
            assert 'measured), so 0.001 hours are' in done.stderr
            assert json.loads(done.stdout)['total_nimg'] % 8 == 0
    assert len(ran) >= 14 and ran.count('train.py') == 4
    for name in ('student.png', 'teacher.png', 'samples-euler/000015.png', 'classifier.npz'):
        assert (tmp_path / 'own' / name).is_file(), name


def rows(heading: str) -> list[list[str]]:
    """Cells of the first table under a heading."""
    section = PAGE.read_text().partition(f'\n## {heading}\n')[2]
    table = re.search(r'(?:^\|.*\n)+', section, re.M)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in table]


@pytest.mark.parametrize('row', rows('How large, how long'), ids=lambda row: row[0])
def test_parameters_and_memory_are_what_a_dry_run_says(row, tmp_path):
    resolution, network, batch, _, parameters, memory = row
    run('dataset_tool.py', '--source=digits', '--max-images=4', f'--resolution={resolution}x{resolution}',
        f'--dest={tmp_path}/gray.zip')  # fmt: skip
    options = [*shlex.split(network.strip('`')), *shlex.split(batch.strip('`'))]
    result = invoke(
        train.main, f'--outdir={tmp_path}', f'--data={tmp_path}/gray.zip', '--arch=adm', *options, '--dry-run'
    )
    about = json.loads(result.stdout)['about']
    assert about['network']['parameters'] / 1e6 == pytest.approx(float(parameters.split()[0]), rel=0.01)
    assert about['memory_gib']['device_total'] == pytest.approx(float(memory.split()[0]), rel=0.03)


def test_the_pages_pictures_are_small():
    for name in re.findall(r'\]\((images/\S+\.png)\)', PAGE.read_text()):
        assert (ROOT / 'docs' / name).stat().st_size < 150_000, name
