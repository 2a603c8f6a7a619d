"""Seeds on command lines: below 2^32, since generators know no more, and named once."""

import click
import pytest
from click.testing import CliRunner
from helpers import assert_one_clear_error
from hypothesis import given
from hypothesis import strategies as st

import compare
import edit
import fid
import generate
import search
import train
import validation
from dnnlib import cli
from dnnlib.text import as_ranges
from sampling.generation import SeededNoise

TOP = (1 << 32) - 1
EDIT = ['--network=x', '--input=x', '--outdir=x']
WITH_SEEDS = {
    'generate': (generate.main, ['--network=x', '--outdir=x']),
    'fid': (fid.main, ['calc', '--network=x', '--ref=x']),
    'inpaint': (edit.main, ['inpaint', *EDIT, '--box=0,0,1,1']),
    'stroke': (edit.main, ['stroke', *EDIT, '--sigma=1']),
    'compare': (compare.main, []),
}


@pytest.mark.parametrize('name', WITH_SEEDS)
@pytest.mark.parametrize(
    'seeds, words',
    [
        ('0-3,2-5', '2-3 of 8 seeds named twice'),
        ('7,7', '7 of 2 seeds named twice'),
        (f'0,{1 << 32}', f'no seed {1 << 32}'),
        (f'{TOP}-{TOP + 2}', f'no seed {TOP + 2}'),
    ],
)
def test_a_seed_that_is_not_there_or_comes_again_is_a_usage_error(tmp_path, monkeypatch, name, seeds, words):
    command, arguments = WITH_SEEDS[name]
    monkeypatch.chdir(tmp_path)
    assert_one_clear_error(
        CliRunner().invoke(command, [*arguments, f'--seeds={seeds}']), '--seeds', words, status=2
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'command, arguments, option',
    [
        (validation.main, ['--network=x', '--ref=x', '--num=10', f'--seed={TOP - 8}'], '--seed'),
        (search.main, ['--network=x', '--ref=x', '--log=x.jsonl', '--num=10', f'--seed={TOP - 8}'], '--seed'),
        (
            train.main,
            ['--data=x', '--outdir=x', '--val=1', '--val_ref=x', '--val_num=100', f'--val_seed={TOP - 98}'],
            '--val_seed',
        ),
        (
            train.main,
            ['--data=x', '--outdir=x', '--val=1', '--val_ref=x', '--val_num=2', f'--val_seed={TOP - 62}'],
            '--val_seed',
        ),  # the picture's
        (validation.main, ['--network=x', '--ref=x', f'--seed={TOP + 1}'], '--seed'),
        (search.main, ['--network=x', '--ref=x', '--log=x.jsonl', f'--seed={TOP + 1}'], '--seed'),
        (
            train.main,
            ['--data=x', '--outdir=x', '--val=1', '--val_ref=x', f'--val_seed={TOP + 1}'],
            '--val_seed',
        ),
    ],
)
def test_a_range_from_a_first_seed_ends_below_the_last_one_too(
    tmp_path, monkeypatch, command, arguments, option
):
    """Nothing is read or made: the files named are not there."""
    monkeypatch.chdir(tmp_path)
    assert_one_clear_error(CliRunner().invoke(command, arguments), option, status=2)
    assert not list(tmp_path.iterdir())


def test_the_last_seeds_are_seeds():
    cli.check_seeds(TOP - 9, 10, '--seed', '--num')
    with pytest.raises(click.UsageError, match=f'seeds up to {TOP + 1}'):
        cli.check_seeds(TOP - 8, 10, '--seed', '--num')
    assert cli.Seeds().convert(f'{TOP - 1}-{TOP}', None, None) == [TOP - 1, TOP]
    assert SeededNoise([TOP], 'cpu').randn([2]).shape == (1, 2)
    with pytest.raises(ValueError, match='no seed 4294967296'):
        SeededNoise([0, TOP + 1], 'cpu')


def test_a_path_between_seeds_may_come_back():
    assert cli.Seeds(repeats=True).convert('0,1,0', None, None) == [0, 1, 0]


@given(st.sets(st.integers(0, 200), min_size=1))
def test_ranges_are_read_back_as_the_numbers_that_they_were_made_of(numbers):
    assert cli.IntRanges().convert(as_ranges(sorted(numbers), limit=1000), None, None) == sorted(numbers)


def test_many_ranges_are_cut_off_with_a_count():
    assert as_ranges(range(0, 60, 2), limit=3) == '0,2,4 and 27 more'
    assert as_ranges([0, 1, 2, 9, 11, 12], limit=2) == '0-2,9 and 2 more'
