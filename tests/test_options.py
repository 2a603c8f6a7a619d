"""Numbers on command lines: each has a length and a range, and is read by the types of dnnlib/cli.py."""

import importlib
import re
import time

import click
import pytest
from click.testing import CliRunner
from helpers import ROOT, SCRIPTS, assert_one_clear_error, run

from dnnlib import UserError, cli
from docs import generate_options
from torch_utils import distributed
from training import command_line

NO_NUMBERS = [
    '9' * 5000,
    '1e308',
    'nan',
    'inf',
    '-inf',
    '²',
    '١',
    '1_000',
    '',
    '0x10',
    '1e9999',
    '1\n2',
    '\x1b[2J',
    '9' * 33,
    '-' + '9' * 5000,
]
NUMERIC = {'INT', 'FLOAT', 'KIMG', 'MIMG', 'TICKS', 'STEPS'}  # metavars
LISTS = (cli.NumberList, cli.IntRanges)


def commands():
    for script in SCRIPTS:
        main = importlib.import_module(script.removesuffix('.py')).main
        yield from (
            (f'{script} {name}'.strip(), command)
            for name, command in (getattr(main, 'commands', None) or {'': main}).items()
        )


OPTIONS = [
    pytest.param(command, option, id=f'{name} {option.opts[0]}')
    for name, command in commands()
    for option in command.params
    if (option.metavar or option.type.name.upper()) in NUMERIC
    or isinstance(option.type, (cli.Integer, cli.Number, *LISTS, click.types._NumberParamTypeBase))
]


def refusal(command, option, value):
    """The error that a value ends in."""
    with pytest.raises(click.UsageError) as error:
        option.type.convert(value, option, click.Context(command))
    return error.value


@pytest.mark.parametrize('command, option', OPTIONS)
def test_what_is_no_number_of_the_range_is_refused_by_every_option(command, option):
    start = time.monotonic()
    for value in NO_NUMBERS:
        if value == 'inf' and getattr(option.type, 'infinite', False):
            continue
        message = refusal(command, option, value).format_message()
        assert len(message) < 500 and message.isprintable(), (value, message)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize('command, option', OPTIONS)
def test_no_option_is_a_number_without_bounds(command, option):
    assert not isinstance(option.type, (click.types.IntParamType, click.types.FloatParamType)) or isinstance(
        option.type, (cli.Integer, cli.Number)
    )


def test_there_are_options_to_be_looked_at():
    assert len(OPTIONS) > 150


@pytest.mark.parametrize(
    'kind, values',
    [
        (cli.Integer(min=0), ['10000000000000', '-1', '1.0']),
        (cli.STEPS, ['0', '1000000000']),
        (cli.BATCH, ['1000000000000']),
        (cli.SIGMA, ['0', '1e-10', '2e6', '-1']),
        (cli.Number(), ['1e39', '-1e39', '1 2', '.']),
        (cli.NumberList(), ['1,', '1,,2', '1,0', ','.join(['1'] * 10_001)]),
        (cli.Seeds(), ['1-', '-1', '4294967296', '1,1', '²-³']),
    ],
)
def test_ranges_end_where_things_do(kind, values):
    for value in values:
        with pytest.raises(click.UsageError):
            kind.convert(value, None, None)


def test_numbers_that_are_numbers_are_read():
    assert [
        cli.Number().convert(text, None, None)
        for text in ('1', '-.5', '1.', '2e-3', ' 1E+3 ', '0.000123456789012345678')
    ] == [1, -0.5, 1, 0.002, 1000, 0.000123456789012345678]
    assert cli.Number(infinite=True).convert('inf', None, None) == float('inf')
    assert (
        cli.Integer().convert('-0012', None, None) == -12
        and cli.NumberList().convert('none', None, None) == []
    )


def test_the_most_numbers_of_a_list_are_those_of_its_ranges_together():
    """Forty ranges of as many as one may have: the list would take 16 GB."""
    ranges = ','.join(f'{i * 10**7}-{(i + 1) * 10**7 - 1}' for i in range(40))
    with pytest.raises(click.UsageError, match='more than 10,000,000 numbers'):
        cli.Seeds().convert(ranges, None, None)


@pytest.mark.parametrize('name', ['RANK', 'WORLD_SIZE'])
@pytest.mark.parametrize('value', ['9' * 5000, '²', '١', '1_0', '-1', ''])
def test_numbers_of_the_environment_are_numbers_too(monkeypatch, name, value):
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setenv('WORLD_SIZE', '1')
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f'{name} is .* not a number') as error:
        distributed.init()
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    'argument',
    [
        '--val_label=fixed:²',
        f'--val_label=fixed:{"9" * 5000}',
        f'--arch={"9" * 5000}',
        '--arch=\x1b[2J',
        f'--{"9" * 5000}',
        f'--cond={"9" * 5000}',
        '--ema=1e308kimg',
        '--ls=1e308',
    ],
)
def test_usage_errors_are_short_and_fit_for_a_terminal(argument):
    from train import main

    result = CliRunner().invoke(main, ['--outdir=x', '--data=x', argument])
    assert_one_clear_error(result, status=2)
    assert len(result.stderr) < 700 and '\x1b' not in result.stderr


def test_a_process_refuses_them_too():
    for arguments in (
        ['generate.py', '--network=x', '--outdir=x', f'--batch={"9" * 5000}'],
        ['reconstruct_phema.py', '--indir=x', '--outstd=0.1,0.1000001,...,1e300'],
    ):
        done = run(*arguments, check=False, timeout=30)
        assert_one_clear_error(done, status=2)
        assert len(done.stderr) < 700


def test_training_asks_for_a_folder_and_for_data():
    from train import main

    for given, missing in (([], '--outdir'), (['--outdir=x'], '--data'), (['--data=x'], '--outdir')):
        assert_one_clear_error(CliRunner().invoke(main, given), f"Missing option '{missing}'", status=2)


# ----------------------------------------------------------------------------
# Counts of images and their units.


@pytest.mark.parametrize(
    'option, text, value',
    [
        ('duration', '200kimg', 0.2),
        ('duration', '12.8 Mimg', 12.8),
        ('duration', '0.5', 0.5),
        ('lr_rampup', '1.5Mimg', 1500),
        ('lr_rampup', '20', 20),
        ('tick', '640img', 0.64),
        ('ema', '500kimg', 5e5),
        ('val_num', '10kimg', 10_000),
        ('val_num', '1.001kimg', 1001),
        ('max_images', '0.06Mimg', 60_000),
        ('T_anneal_kimg', '104.8Mimg', 104_800),
    ],
)
def test_a_count_of_images_may_name_its_unit(option, text, value):
    """Without one it counts what it always did."""
    words = [f'--{option.replace("max_images", "max-images")}={text}']
    words += ['--objective=mcd', '--teacher=x.pkl'] if option == 'T_anneal_kimg' else []
    words += ['--val=1', '--val_ref=x.npz'] if option == 'val_num' else []
    chosen = command_line.parse(['--outdir=runs', '--data=x.zip', *words])
    assert getattr(chosen.own, option, getattr(chosen.run, option, None)) == value


@pytest.mark.parametrize(
    'word, said',
    [
        ('--duration=5furlongs', '500kimg'),
        ('--duration=0kimg', '0<'),
        ('--duration=1e39kimg', 'range'),
        ('--val_num=0.5img', 'whole number'),
        ('--val_num=1img', '2'),
        ('--lr_rampup=-3kimg', '0'),
        ('--tick=kimg', 'kimg'),
    ],
)
def test_a_wrong_count_of_images_is_one_usage_error(word, said):
    with pytest.raises(click.UsageError, match=re.escape(said)):
        command_line.parse(['--outdir=runs', '--data=x.zip', '--val=1', '--val_ref=x.npz', word])


# ----------------------------------------------------------------------------
# Help.

APART = {'dnnlib.interrupts', 'data.lmdb_pipe', 'example'}  # run by commands, or without options


def runnable():
    """Names of the modules that `python FILE` or `python -m` runs."""
    paths = [*ROOT.glob('*.py'), *(path for room in ROOMS for path in (ROOT / room).rglob('*.py'))]
    names = {
        path.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.')
        for path in paths
        if "__name__ == '__main__'" in path.read_text() or path.name == '__main__.py'
    }
    return sorted(names - APART)


ROOMS = [
    'benchmarks',
    'data',
    'dnnlib',
    'docs',
    'experiments',
    'metrics',
    'sampling',
    'torch_utils',
    'training',
]


@pytest.mark.parametrize('module', runnable())
def test_every_option_and_argument_of_every_command_has_help(module):
    found = [(module, importlib.import_module(module).main)]
    for name, command in found:
        assert isinstance(command, cli.Command | cli.Group) and command.help, name
        found += [(f'{name} {key}', each) for key, each in getattr(command, 'commands', {}).items()]
        context = click.Context(command)
        for param in command.get_params(context):
            if not getattr(param, 'hidden', False):
                record = param.get_help_record(context)
                assert record and record[1].strip(), f'{name}: {param.human_readable_name} has no help'


@pytest.mark.parametrize('name', ['fid.py calc', 'fid.py ref', 'search.py', 'validation.py', 'compare.py'])
def test_num_images_is_num(name):
    command = generate_options.command(name)
    (option,) = [each for each in command.params if each.name == 'num']
    assert option.opts == ['--num', '--num-images']
    assert option.type.convert('10kimg', option, None) == 10_000
