"""Every option that is a path expands `~`, as a shell does where it sees one; nothing else does."""

import json
import os
import pwd
import shutil

import click
import pytest
from click.testing import CliRunner
from helpers import assert_one_clear_error, run

import convert
import dataset_tool
import fid
import train
from dnnlib import UserError, cli
from docs import generate_options

TEXT = {'STR', 'NAME', 'HEX', 'LIST', 'ROW'}  # what options of plain text are called

COMMANDS = {name: generate_options.command(name) for name in generate_options.COMMANDS}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home of this test's own, and an empty folder to be in."""
    (tmp_path / 'home').mkdir()
    (tmp_path / 'here').mkdir()
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.chdir(tmp_path / 'here')
    return tmp_path / 'home'


def words_of(parameter):
    return set((parameter.metavar or '').split('|'))


@pytest.mark.parametrize('name', COMMANDS)
def test_every_option_of_free_text_is_a_path_or_is_called_something_that_is_none(name):
    """An option that was forgotten is one of plain text under another name than those of TEXT."""
    shown = [p for p in COMMANDS[name].params if not getattr(p, 'hidden', False)]
    plain = {
        p.human_readable_name
        for p in shown
        if p.type is click.STRING and not (p.metavar and words_of(p) <= TEXT)
    }
    assert not plain, f'{name}: give these the type cli.PATH, or a metavar of {sorted(TEXT)}'


@pytest.mark.parametrize('name', COMMANDS)
def test_every_path_option_expands_the_home(name, home):
    paths = [p for p in COMMANDS[name].params if isinstance(p.type, cli.PathOrURL)]
    context = click.Context(COMMANDS[name])
    for parameter in paths:
        given, expected = (('~/x',), (f'{home}/x',)) if parameter.multiple else ('~/x', f'{home}/x')
        assert parameter.type_cast_value(context, given) == expected, parameter.name


def test_there_are_paths_in_all_commands_but_those_that_read_and_write_nothing():
    without = {
        name
        for name, command in COMMANDS.items()
        if not any(isinstance(p.type, cli.PathOrURL) for p in command.params)
    }
    assert without <= {name for name in COMMANDS if 'benchmarks' in name}, without
    lists = [p.name for p in train.main.params if p.type is cli.PATHS]
    assert lists == ['lpips']


def test_a_path_is_expanded_at_its_start_alone_and_urls_and_names_stay(home):
    user = pwd.getpwuid(os.getuid())
    digest = 'https://host/~user/net.pkl#sha256=' + '0' * 64
    for given, expected in {
        '~': f'{home}',
        '~/a/~/b': f'{home}/a/~/b',
        f'~{user.pw_name}/x': f'{user.pw_dir}/x',
        './~/x': './~/x',
        'a~': 'a~',
        'dinov2:~/m': f'dinov2:{home}/m',
        'dinov2': 'dinov2',
        'digits': 'digits',
        digest: digest,
        'stabilityai/sd-vae-ft-mse': 'stabilityai/sd-vae-ft-mse',
        'a$b/$HOME': 'a$b/$HOME',
        './$HOME/x': './$HOME/x',
        '~/a\nb': f'{home}/a\nb',
    }.items():
        assert cli.expand_path(given) == expected
    assert (
        cli.PATHS.convert('~/vgg.pth,https://host/~user/heads.pth', None, None)
        == f'{home}/vgg.pth,https://host/~user/heads.pth'
    )


@pytest.mark.parametrize(
    'path, words',
    [
        ('~nosuchuser/x', "no user 'nosuchuser'"),
        ('dinov2:~nosuchuser/x', "no user 'nosuchuser'"),
        ('$HOME/x', 'begins with a variable, $HOME'),
        ('${SCRATCH}/x', 'begins with a variable, ${SCRATCH}'),
        ('$OUT', 'begins with a variable, $OUT'),
        ('', 'it is empty'),
        (' ', 'it is empty'),
    ],
)
def test_what_a_shell_should_have_replaced_is_refused(path, words):
    with pytest.raises(UserError) as error:
        cli.expand_path(path)
    assert words in str(error.value)


@pytest.mark.parametrize('path', ['~nosuchuser/x.zip', '$HOME/x.zip', ''])
def test_a_path_that_no_shell_has_completed_is_a_usage_error_and_makes_no_folder(path, home):
    done = CliRunner().invoke(dataset_tool.main, ['--source=digits', f'--dest={path}'])
    assert_one_clear_error(done, '--dest', status=2)
    assert not os.listdir('.') and not os.listdir(home)


def test_nothing_is_called_a_tilde(digits, teacher, rulers, home):
    """Of data, of references, of conversions; and a run records the path in full."""
    (home / 'digits.zip').symlink_to(digits)
    (home / 't.pkl').symlink_to(teacher)
    for command, *arguments in (
        (dataset_tool.main, '--source=digits', '--max-images=3', '--dest=~/three.zip'),
        (convert.main, '~/t.pkl', '~/t.safetensors', '--to=safetensors'),
        (convert.info, '~/t.pkl'),
    ):
        done = CliRunner().invoke(command, arguments)
        assert done.exit_code == 0, done.output
    assert {path.name for path in home.iterdir()} == {'digits.zip', 't.pkl', 'three.zip', 't.safetensors'}
    for name, suffix in (('r', 'npz'), ('d', 'pt')):
        shutil.copy(rulers / f'pca.{suffix}', home / f'{name}.{suffix}')
    done = CliRunner().invoke(
        train.main,
        [
            '--outdir=~/runs',
            '--data=~/digits.zip',
            '--cond=1',
            '--consistency=1',
            '--teacher=~/t.pkl',
            '--val=1',
            '--val_ref=~/r.npz',
            '--val_detector=~/d.pt',
            '--val_dump_images_dir=~/i',
            '--transfer=~/t.pkl',
            '-n',
        ],
    )
    c = json.loads(done.stdout)
    assert c['run_dir'].startswith(f'{home}/runs/00000-') and c['dataset']['path'] == f'{home}/digits.zip'
    assert [c['teacher'], c['transfer']] == [f'{home}/t.pkl'] * 2
    assert [c['validation'][name] for name in ('ref', 'detector', 'dump_images_dir')] == [
        f'{home}/r.npz',
        f'{home}/d.pt',
        f'{home}/i',
    ]
    assert_one_clear_error(
        CliRunner().invoke(fid.main, ['calc', '--images=~/no', '--ref=~/none.npz']), f'{home}/no'
    )
    assert not os.listdir('.')


def test_the_example_expands_its_arguments_too(teacher, home):
    (home / 't.pkl').symlink_to(teacher)
    run('example.py', '~/t.pkl', '~/grid.png', env={'HOME': str(home)})
    assert (home / 'grid.png').is_file()
    assert_one_clear_error(
        run('example.py', '~/t.pkl', '~nosuchuser/grid.png', check=False, env={'HOME': str(home)}),
        'nosuchuser',
    )
