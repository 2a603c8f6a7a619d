"""--preset: a table of settings, each of which is a command line that parses, and one of which is the published command."""

import functools
import json

import helpers
import pytest
import yaml
from helpers import TINY_NETWORK, assert_one_clear_error
from test_train import readme_command

import train
from dnnlib import options
from experiments import bundled, demo_run
from experiments.bundled import DIGITS
from training import command_line, presets
from training.objectives import OBJECTIVES

invoke = functools.partial(helpers.invoke, train.main)
PLACES = ['--outdir=runs', '--data=data.zip', '--val=0']


def dry_run(*words):
    result = invoke('--outdir=runs', '--dry-run', *words)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


# ----------------------------------------------------------------------------
# The table.


@pytest.mark.parametrize('name', presets.PRESETS)
def test_every_preset_is_a_command_line_that_parses(name):
    """Only --data, --outdir and, where no teacher is offered, --teacher are missing."""
    preset = presets.PRESETS[name]
    teacher = ['--teacher=x.pkl'] if preset.needs else []
    chosen = command_line.parse([*PLACES, f'--preset={name}', *teacher])
    assert chosen.run.objective == (preset.objective or 'diffusion') and chosen.run.preset == name
    if preset.objective and OBJECTIVES[preset.objective].teacher:
        assert bool(preset.needs) != ('teacher' in preset.options)
    assert not preset.needs or preset.needs in presets.PRESETS


@pytest.mark.parametrize('name', presets.PRESETS)
def test_the_options_that_are_listed_are_those_of_the_preset(name):
    """What --list-presets prints, pasted on a command line, is the preset."""
    listed = invoke('--list-presets').stdout
    entry = listed[listed.index(f'{name}\n') :].partition('\n\n')[0]
    words = entry.partition('options:')[2].split()
    start = [
        f'--{key}={presets.PRESETS[name].options[key]}'
        for key in ('teacher', 'transfer')
        if key in presets.PRESETS[name].options
    ]
    start += ['--teacher=x.pkl'] if presets.PRESETS[name].needs else []
    pasted = command_line.parse([*PLACES, *words, *start, '--val=0'])
    preset = command_line.parse([*PLACES, f'--preset={name}', *start])
    assert pasted.own == preset.own and pasted.run == preset.run.__class__(
        **{**vars(preset.run), 'preset': None}
    )


def test_the_list_fits_a_hundred_columns_and_tells_ours_from_published_figures():
    listed = invoke('--list-presets').stdout
    assert all(len(line) <= 100 or 'https://' in line for line in listed.splitlines())
    entries = listed.split('\n\n')
    assert [entry.split('\n')[0] for entry in entries] == list(presets.PRESETS)
    assert 'FID 2.3 (README of github.com/EpiGenomicsCode/edm); here: not' in entries[0]
    for entry in entries:
        assert entry.startswith(('digits', 'small')) or 'here: not trained' in ' '.join(entry.split()), entry


def test_digits_are_trained_as_in_the_demo():
    """Two places name these settings; this keeps them alike. The demo validates as well, and saves more often."""
    paths = ['--outdir=runs', '--data=data.zip']

    def of_demo(steps, *words):
        kimg = steps * DIGITS.batch / 1000
        common = [word for word in demo_run.COMMON if not word.startswith(('--nosubdir', '--snap', '--dump'))]
        return command_line.parse([*paths, *common, f'--duration={kimg / 1000:g}', *words])

    teacher = command_line.parse([*paths, '--preset=digits-teacher'])
    compare = of_demo(DIGITS.teacher_steps, *DIGITS.network, *DIGITS.teacher)
    assert vars(teacher.run) == {**vars(compare.run), 'preset': 'digits-teacher'}
    names = set()
    for objective, (_, runs) in demo_run.STUDENTS.items():
        for S, steps in runs.items():
            names.add(name := f'digits-{objective}{S}')
            start = ['--teacher=x.pkl', f'--S={S}']
            compare = of_demo(
                steps, f'--objective={objective}', *start, *bundled.student_options(objective, S)
            )
            preset = command_line.parse([*paths, f'--preset={name}', '--teacher=x.pkl'])
            assert preset.own == compare.own and vars(preset.run) == {**vars(compare.run), 'preset': name}
    assert names == {name for name in presets.PRESETS if name.startswith('digits')} - {'digits-teacher'}


# ----------------------------------------------------------------------------
# The published command.


def test_the_published_command_is_one_preset(tmp_path, digits, teacher, rulers):
    files = dict(outdir=tmp_path / 'runs', data=digits, teacher=teacher, val_ref=rulers / 'pca.npz')
    detector = f'--val_detector={rulers / "pca.pt"}'
    result = invoke(*readme_command(**files), detector, '--dry-run')
    published = json.loads(result.stdout)
    assert published.pop('preset') is None
    places = [f'--{name}={path}' for name, path in files.items()]
    preset = dry_run('--preset=imagenet64-mcd8', *places, detector)
    assert preset.pop('preset') == 'imagenet64-mcd8'
    assert preset == published


# ----------------------------------------------------------------------------
# What takes precedence.


def test_the_command_line_wins_over_a_file_and_a_file_over_a_preset(tmp_path, digits):
    config = tmp_path / 'c.yml'
    config.write_text(yaml.safe_dump(dict(lr=2e-4, dropout=0.5)))
    start = [f'--data={digits}', *TINY_NETWORK[:-1], '--teacher=none.pkl']
    for words in (
        ['--preset=digits-mcd8', f'--config={config}'],
        [f'--config={config}', '--preset=digits-mcd8'],
    ):
        chosen = command_line.parse(['--outdir=runs', *start, *words, '--S=4'])
        assert (chosen.own.S, chosen.run.lr, chosen.run.dropout, chosen.own.T_start) == (4, 2e-4, 0.5, 16)
    config.write_text(yaml.safe_dump(dict(preset='digits-mcd8', lr=2e-4)))
    chosen = command_line.parse(['--outdir=runs', *start, f'--config={config}'])
    assert (chosen.run.preset, chosen.own.S, chosen.run.lr) == ('digits-mcd8', 8, 2e-4)


@pytest.mark.parametrize(
    'words, name, value',
    [
        (['imagenet64-mcd8', '--T_anneal_steps=7'], 'T_anneal_kimg', None),
        (['imagenet64-mcd8', '--precision=bf16'], 'fp16', None),
        (['imagenet64-mcd8', '--S=4'], 'val_steps', None),
        (['cifar10-cm-cd', '--s1=20'], 'N', None),
        (['cifar10-ect', '--resume=run'], 'transfer', None),
        (['cifar10-cm-cd,small-gpu'], 'batch_gpu', 16),
    ],
)
def test_an_option_displaces_what_a_preset_says_of_the_same(words, name, value, monkeypatch):
    # The run of --resume, which is not there.
    stored = dict(outdir='run', data='data.zip', objective='diffusion')
    monkeypatch.setattr(command_line.stored_options, 'read', lambda *_: stored)
    chosen = command_line.parse([*PLACES, f'--preset={words[0]}', *words[1:]])
    assert getattr(chosen.own, name, getattr(chosen.run, name, None)) == value
    assert name not in chosen.given or value is not None


def test_a_preset_is_recorded_and_a_repeated_run_takes_the_recorded_options_only(tmp_path, digits):
    """The record of a preset with an option switched off: the preset must not switch it on again."""
    c = dry_run('--preset=digits-teacher', f'--data={digits}', '--lr_schedule=constant', '--seed=5')
    assert c['preset'] == 'digits-teacher'
    (tmp_path / 'c.json').write_text(json.dumps(c))
    again = dry_run(f'--config={tmp_path / "c.json"}')
    assert again['preset'] is None and {**again, 'preset': None} == {**c, 'preset': None}


@pytest.mark.parametrize(
    'words, said',
    [
        (['--preset=imagenet64-mcd9'], ['imagenet64-mcd', 'Did you mean', '--list-presets']),
        (['--preset=cifar10-ect,cifar10-ict'], ['each name an objective']),
        (['--preset=cifar10-cm-cd', '--objective=direct'], ['--objective=cm-cd', 'leave one of them out']),
        (['--preset=digits-mcd8'], ['--teacher=PKL']),
        (['--preset=imagenet64-mcd8'], ['--val_ref', '--val=0']),
    ],
)
def test_a_wrong_preset_is_one_usage_error(digits, words, said):
    result = invoke('--outdir=runs', f'--data={digits}', *words)
    assert_one_clear_error(result, *said, status=2)


def test_a_preset_shows_its_options_as_given():
    context = command_line.command().make_context('train.py', [*PLACES, '--preset=cifar10-ect'])
    assert options.given_in(context)['mid_t'] == 0.821
