"""No program writes over the file that it reads, by that name or by another; dataset_tool.py may: it converts a data set in place."""

import os
import shutil

import pytest
from helpers import assert_one_clear_error, run


@pytest.mark.parametrize(
    'program, arguments',
    [
        ('convert.py', ['--to=safetensors', '{a}', '{b}']),
        ('convert.py', ['--from=safetensors', '{a}', '{b}']),
        ('fid.py', ['ref', '--data={a}', '--dest={b}']),
        ('generate.py', ['--network={a}', '--dest={b}', '--seeds=0']),
        ('example.py', ['{a}', '{b}']),
        ('search.py', ['--network={a}', '--schedule', '--save={b}']),
        ('search.py', ['--network={a}', '--schedule', '--json={b}']),
        ('search.py', ['--network={a}', '--log=a.jsonl', '--ref=r.npz', '--json={b}']),
        ('fid.py', ['calc', '--network={a}', '--ref=r.npz', '--json={b}']),
        ('fid.py', ['calc', '--images=images', '--ref={a}', '--json={b}']),
        ('fid.py', ['calc', '--images=images', '--ref=r.npz', '--detector={a}#sha256=00', '--json={b}']),
        ('dataset_tool.py', ['--stats', '--source={a}', '--json={b}']),
    ],
)
@pytest.mark.parametrize('another_name', [False, True])
def test_what_is_read_is_not_written_over(tmp_path, digits, teacher, program, arguments, another_name):
    a, b = tmp_path / 'a.zip', tmp_path / ('b.zip' if another_name else 'a.zip')
    shutil.copy(digits if 'ref' in arguments else teacher, a)
    if another_name:
        os.link(a, b)
    before = a.read_bytes()
    result = run(program, *(argument.format(a=a, b=b) for argument in arguments), check=False)
    assert_one_clear_error(result, b.name, 'is the file that is read')
    assert a.read_bytes() == before


def test_two_outputs_are_two_files(tmp_path, teacher):
    both = [f'--{name}={tmp_path}/found' for name in ('save', 'json')]
    result = run('search.py', f'--network={teacher}', '--schedule', *both, check=False)
    assert_one_clear_error(result, '--save and --json name one file', status=2)
