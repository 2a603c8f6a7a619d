"""`train.py --resume=RUN` by itself goes on as the run was; options on top are listed, and refused where they make another run."""

import json
import shutil

import pytest
import torch
from helpers import FAST, TINY_NETWORK, assert_one_clear_error, invoke

import train
from training import run_files
from training.checkpoint import load_network, load_state
from training.saved_files import saved_snapshots, saved_states

OPTIONS = ['--cond=1', *TINY_NETWORK, *FAST, '--batch=64', '--duration=0.000256', '--tick=0.064', '--dump=1']
PLACES = ('resume', 'run_dir')


def options_of(folder):
    return run_files.load_state(str(folder))[1]['options']


@pytest.fixture(scope='module')
def begun(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp('begun') / '00000-run'
    result = invoke(
        train.main, f'--outdir={folder}', f'--data={digits}', *OPTIONS, '--lr=0.002', '--grad-clip=0.7'
    )
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def folder(begun, tmp_path):
    return shutil.copytree(begun, tmp_path / 'runs' / begun.name)


def test_a_run_goes_on_as_it_was_by_its_folder_alone(folder):
    """Not one entry of its configuration changes but where it is and what it resumes from."""
    before = options_of(folder)
    state = saved_states(folder)[1]
    result = invoke(train.main, f'--resume={state}')
    assert result.exit_code == 0 and not result.stderr, result.output
    after = options_of(folder)
    assert {k: v for k, v in before.items() if k not in PLACES} == {
        k: v for k, v in after.items() if k not in PLACES
    }


def test_averages_of_every_third_step_go_on_bit_for_bit_from_between_two_of_them(digits, tmp_path):
    options = [f'--data={digits}', *OPTIONS, '--duration=0.000384', '--lr=0.01', '--lr_rampup=0', '--keep=9']
    options += ['--ema=64', '--phema=0.1', '--ema-every=3', '--ema-device=cpu']
    assert invoke(train.main, f'--outdir={tmp_path / "whole"}', *options).exit_code == 0
    states = {load_state(path)['progress']['nimg']: path for path in saved_states(tmp_path / 'whole')}
    whole, middle = load_state(states[384])['averages'], load_state(states[256])
    assert 'waiting' in middle['averages'] and 'waiting' not in whole
    (tmp_path / 'resumed').mkdir()
    shutil.copy(states[256], tmp_path / 'resumed')
    assert invoke(train.main, f'--resume={tmp_path / "resumed"}').exit_code == 0
    resumed = load_state(saved_states(tmp_path / 'resumed')[0])['averages']
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def test_options_on_top_are_listed_on_one_line(folder):
    result = invoke(train.main, f'--resume={folder}', '--lr=8e-5', '--duration=0.00032', '--snap=3')
    assert result.exit_code == 0, result.output
    assert 'Resuming with lr 0.002 -> 8e-05, duration 0.000256 -> 0.00032, snap 50 -> 3.' in result.stderr
    assert load_network(saved_snapshots(folder)[0]).metadata['nimg'] == 320
    assert options_of(folder)['grad_clip'] == 0.7


def test_what_makes_it_another_run_is_refused_unless_it_is_insisted_on(folder):
    options = [f'--resume={folder}', '--dropout=0.2', '--batch=32', '--dry-run']
    result = invoke(train.main, *options)
    assert_one_clear_error(result, 'dropout 0.0 -> 0.2', 'batch 64 -> 32', '--resume-override')
    result = invoke(train.main, *options, '--resume-override')
    assert json.loads(result.stdout)['batch_size'] == 32


def test_options_that_are_given_again_change_nothing(folder, digits):
    result = invoke(
        train.main, f'--outdir={folder.parent}', f'--data={digits}', *OPTIONS, f'--resume={folder}'
    )
    assert result.exit_code == 0 and 'Resuming with' not in result.stderr, result.output


def test_another_folder_is_named_as_not_used(folder, tmp_path):
    result = invoke(train.main, f'--outdir={tmp_path / "other"}', f'--resume={folder}', '--dry-run')
    assert f'continues in {folder}: ignoring --outdir={tmp_path / "other"}' in result.stderr
    assert json.loads(result.stdout)['run_dir'] == str(folder) and not (tmp_path / 'other').exists()


def test_data_that_have_moved_are_named_as_stored(folder, digits, tmp_path):
    moved = shutil.copy(digits, tmp_path / 'gone.zip')
    invoke(train.main, f'--resume={folder}', f'--data={moved}', '--duration=0.00032')
    (tmp_path / 'gone.zip').unlink()
    assert_one_clear_error(invoke(train.main, f'--resume={folder}'), 'gone.zip', 'stored', '--data=PATH')
    assert invoke(train.main, f'--resume={folder}', f'--data={digits}').exit_code == 0


def test_a_teacher_needs_no_repeating_and_another_one_is_refused(tmp_path, digits, teacher, begun):
    student = ['--consistency=True', '--S=2', '--T_start=4', '--T_end=8', '--T_anneal_steps=7', *FAST]
    student += ['--cond=1', '--batch=64', '--duration=0.000128', '--tick=0.064', '--dump=1']
    folder = tmp_path / 'student'
    result = invoke(
        train.main, f'--outdir={folder}', f'--data={digits}', f'--teacher={teacher.parent}', *student
    )
    assert result.exit_code == 0, result.output
    assert f'its newest snapshot is {teacher}' in result.stderr and options_of(folder)['teacher'] == str(
        teacher
    )
    result = invoke(train.main, f'--resume={folder}', '--duration=0.000192', '--sigma-max=80')
    assert result.exit_code == 0 and '/7' not in result.stderr, result.output
    assert options_of(folder)['loss']['T_anneal_kimg'] == 0.448
    assert_one_clear_error(
        invoke(train.main, f'--resume={folder}', f'--teacher={begun}'), str(teacher), 'another network'
    )


def test_a_folder_of_runs_lists_them_newest_first(begun, tmp_path):
    runs = [shutil.copytree(begun, tmp_path / 'runs' / f'{i:05d}-run') for i in range(12)]
    assert_one_clear_error(
        invoke(train.main, f'--resume={tmp_path / "runs"}'),
        'is a folder of run folders',
        'and 2 more',
        f'--resume={tmp_path / "runs"}',
    )
    assert all(run.exists() for run in runs)


def test_files_are_in_the_order_of_the_images_that_they_have_seen(tmp_path):
    """By number, whatever the digits; two of one kimg by their images; averages of a width are apart."""
    names = ['1000000', '0999999', '100000', '099999', '000000-640', '000000-64', '000000']
    for name in [*names[::2], *names[1::2], '2000000-0.050']:
        (tmp_path / f'network-snapshot-{name}.pkl').touch()
    assert [path.stem.removeprefix('network-snapshot-') for path in saved_snapshots(tmp_path)] == names
