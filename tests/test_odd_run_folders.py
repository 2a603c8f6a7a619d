"""Run folders in which something else lies where a run has a file of its own: one error, at once, and nothing outside is touched."""

import os
import shutil

import pytest
from helpers import FAST, TINY_NETWORK, assert_one_clear_error, run

from training.run_log import append_lines, records
from training.saved_files import OWN_FILES


@pytest.fixture(scope='module')
def arguments(digits):
    return [
        'train.py',
        f'--data={digits}',
        *TINY_NETWORK,
        *FAST,
        '--batch=64',
        '--tick=0.064',
        '--dump=1',
        '--augment=0',
        '--max-images=64',
    ]


@pytest.fixture(scope='module')
def folder(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp('run') / 'run'
    run(*arguments, f'--outdir={folder}', '--duration=0.000128')
    return folder


ODD = dict(
    link=lambda path, victim: path.symlink_to(victim),
    loop=lambda path, victim: path.symlink_to(path),
    nowhere=lambda path, victim: path.symlink_to('/nonexistent/x'),
    pipe=lambda path, victim: os.mkfifo(path),
    folder=lambda path, victim: path.mkdir(),
    device=lambda path, victim: path.symlink_to('/dev/zero'),
)


@pytest.mark.parametrize(
    'name, kind',
    [
        ('run.lock', 'nowhere'),
        ('run.lock', 'pipe'),
        ('stats.jsonl', 'pipe'),
        ('stats.jsonl', 'folder'),
        ('log.txt', 'link'),
        ('metrics-val.jsonl', 'device'),
        ('launch.json', 'loop'),
        ('preempted.json', 'folder'),
    ],
)
def test_something_else_in_the_place_of_a_file_is_named_before_anything_is_written(
    folder, arguments, tmp_path, name, kind
):
    shutil.copytree(folder, tmp_path / 'run')
    path, victim = tmp_path / 'run' / name, tmp_path / 'victim'
    victim.write_text('mine')
    path.unlink(missing_ok=True)
    ODD[kind](path, victim)
    before = {other.name: other.lstat().st_mtime_ns for other in (tmp_path / 'run').iterdir()}
    result = run(
        *arguments,
        f'--outdir={tmp_path / "run"}',
        f'--resume={tmp_path / "run"}',
        '--duration=0.000256',
        check=False,
        timeout=60,
    )
    assert_one_clear_error(result, name)
    assert {
        other.name: other.lstat().st_mtime_ns for other in (tmp_path / 'run').iterdir()
    } == before and victim.read_text() == 'mine'


def test_every_file_that_a_run_appends_to_is_on_the_list(folder):
    assert {path.name for path in folder.iterdir()} - set(OWN_FILES) <= {
        path.name
        for pattern in ('network-snapshot-*', 'training-state-*', 'samples-*')
        for path in folder.glob(pattern)
    }


@pytest.mark.parametrize('kind', ['pipe', 'folder', 'device'])
def test_records_are_of_regular_files(tmp_path, kind):
    ODD[kind](tmp_path / 'log.jsonl', None)
    with pytest.raises(OSError):
        next(records(str(tmp_path / 'log.jsonl')))


def test_a_log_of_gigabytes_without_line_ends_is_not_read(tmp_path):
    """A file of zeros that takes no space, to which a line is appended."""
    for name in ('log.txt', 'stats.jsonl'):
        with open(tmp_path / name, 'wb') as file:
            file.truncate(1 << 36)
        append_lines(str(tmp_path / name), '{"nimg": 1}\n')
        assert (tmp_path / name).stat().st_size == (1 << 36) + len('\n{"nimg": 1}\n')
