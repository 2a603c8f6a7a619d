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
