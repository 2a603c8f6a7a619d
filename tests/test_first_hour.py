"""Wrong inputs of a first hour, each of which ends in one message that names the cure."""

import sys

import numpy as np
import PIL.Image
import pytest
from helpers import FAST, TINY_NETWORK, assert_one_clear_error, invoke, run_python, run_ranks

import compare
import convert
import dataset_tool
import edit
import fid
import generate
import search
import train
from experiments import comparison

STUDENT = ['--consistency=True', '--S=2', '--T_start=4', '--T_end=8', '--dry-run']


def write_images(folder, shapes, suffix='png'):
    folder.mkdir(parents=True)
    for i, shape in enumerate(shapes):
        pixels = np.random.RandomState(i).randint(0, 256, shape, dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f'{i}.{suffix}')
    return folder


def test_a_training_state_as_network(whole, tmp_path):
    state = max(whole.glob('training-state-*.pt'))
    result = invoke(generate.main, f'--network={state}', f'--outdir={tmp_path / "x"}')
    assert_one_clear_error(result, 'is a training state of train.py', 'network-snapshot-')


MISSING = [
    (generate.main, ['--network=none.pkl', '--outdir=x']),
    (fid.main, ['calc', '--network=none.pkl', '--seeds=0-1', '--metrics=is']),
    (edit.main, ['inpaint', '--network=none.pkl', '--input=x.zip', '--outdir=x', '--box=0,0,2,2']),
    (edit.main, ['interpolate', '--network=none.pkl', '--seeds=0,1', '--outdir=x']),
    (search.main, ['--network=none.pkl', '--schedule', '--save=x.txt']),
    (train.main, ['--resume=none.pt']),
]


@pytest.mark.parametrize('command, words', MISSING)
def test_a_missing_snapshot_or_state_is_told_under_its_option(tmp_path, monkeypatch, command, words):
    monkeypatch.chdir(tmp_path)
    result = invoke(command, *words)
    option = next(word.partition('=')[0] for word in words if 'none.' in word)
    assert_one_clear_error(result, f'Error: {option}: none.p', 'does not exist. Check the path.')


def test_a_missing_teacher_is_told_under_its_option(digits):
    result = invoke(train.main, '--outdir=x', f'--data={digits}', '--teacher=none.pkl', *STUDENT)
    assert_one_clear_error(result, 'Error: --teacher: none.pkl does not exist. Check the path.')


def test_an_empty_source(tmp_path):
    (tmp_path / 'empty').mkdir()
    result = invoke(dataset_tool.main, f'--source={tmp_path / "empty"}', f'--dest={tmp_path / "x.zip"}')
    assert_one_clear_error(result, f'--source={tmp_path / "empty"} holds no images: check the path', '.png')


def test_cond_forgotten_with_a_conditional_teacher(digits, teacher):
    result = invoke(train.main, '--outdir=x', f'--data={digits}', f'--teacher={teacher}', *STUDENT)
    assert_one_clear_error(result, 'Add --cond=1, which reads the labels')
    assert 'convert the data' not in result.stderr


@pytest.mark.parametrize('size, more', [(8, []), (16, [', and convert them with --resolution=8x8'])])
def test_rgb_data_for_a_grayscale_teacher(tmp_path, teacher, size, more):
    data = write_images(tmp_path / 'rgb', 4 * [(size, size, 3)])
    result = invoke(train.main, '--outdir=x', f'--data={data}', f'--teacher={teacher}', *STUDENT)
    assert_one_clear_error(result, 'save its images as grayscale before dataset_tool.py', *more)


@pytest.mark.parametrize(
    'option', ['--lr-rampup=7', '--lr_rampup=7', '--batch_gpu=32', '--dry-run', '--dry_run']
)
def test_dashes_and_underscores_are_alike(digits, option):
    result = invoke(train.main, '--outdir=x', f'--data={digits}', *TINY_NETWORK, '-n', option)
    assert result.exit_code == 0, result.output


def test_options_before_the_command_of_fid():
    result = invoke(fid.main, '--images=x', '--ref=y')
    assert_one_clear_error(result, '--images is an option of a command: write fid.py calc', status=2)


@pytest.mark.parametrize(
    'shapes', [[(30, 20, 3), (17, 17, 3)], [(20, 20, 3), (17, 17, 3)], [(16, 16, 3), (16, 16, 3)]]
)
@pytest.mark.parametrize('cond', [0, 1])
def test_raw_class_folders_as_data(tmp_path, shapes, cond):
    for name in 'ab':
        write_images(tmp_path / 'raw' / name, shapes, 'jpg')
    result = invoke(
        train.main, '--outdir=x', f'--data={tmp_path / "raw"}', f'--cond={cond}', '-n', *TINY_NETWORK
    )
    if shapes[0][0] < 17 and not cond:
        # Images that can be trained on as they are.
        assert result.exit_code == 0, result.output
    else:
        assert_one_clear_error(result, 'dataset_tool.py')
        assert shapes[0][0] > 16 or (
            f'--source={tmp_path / "raw"}' in result.stderr and '(a, b)' in result.stderr
        )


@pytest.mark.parametrize(
    'command, options',
    [
        (fid.main, ['calc', '--images={}', '--num=2', '--metrics=is']),
        (fid.main, ['ref', '--data={}', '--dest=x.npz']),
        (dataset_tool.main, ['--source={}', '--dest=x.zip']),
        (train.main, ['--data={}', '--outdir=x', '-n', *TINY_NETWORK]),
    ],
)
def test_a_run_folder_is_no_folder_of_images(whole, tmp_path, monkeypatch, command, options):
    """Its pictures are grids of samples."""
    monkeypatch.chdir(tmp_path)
    result = invoke(command, *(option.format(whole) for option in options))
    assert_one_clear_error(result, 'is the folder of a training run', 'generate.py')


def test_one_truncated_png(tmp_path):
    folder = write_images(tmp_path / 'images', 3 * [(8, 8, 3)])
    whole = (folder / '1.png').read_bytes()
    (folder / '1.png').write_bytes(whole[: len(whole) // 2])
    result = invoke(dataset_tool.main, f'--source={folder}', f'--dest={tmp_path / "x.zip"}')
    assert_one_clear_error(result, '1.png is not a readable image', 'replace or remove it')


def test_fp16_on_a_cpu_is_said(digits):
    result = invoke(train.main, '--outdir=x', f'--data={digits}', '-n', '--fp16=True', *TINY_NETWORK)
    assert result.exit_code == 0 and result.stderr.count('FP16 is for GPUs only') == 1, result.output


def test_a_duration_in_thousands_of_images(digits):
    for kimg in (200_000, 20_000):
        result = invoke(
            train.main, '--outdir=x', f'--data={digits}', '-n', f'--duration={kimg}', *TINY_NETWORK
        )
        assert_one_clear_error(result, 'in millions of images', f'--duration={kimg // 1000}.', status=2)


def test_a_configuration_in_a_run_folder_and_files_that_are_none(whole, digits):
    command = [train.main, '--outdir=x', '-n']
    result = invoke(*command, f'--config={whole}')
    assert result.exit_code == 0 and '"total_nimg"' in result.stdout, result.output
    assert_one_clear_error(invoke(*command, f'--config={digits}'), 'it is no text', 'YAML or JSON')
    no_run = invoke(*command, f'--config={digits.parent}')
    assert_one_clear_error(no_run, 'training_options.json cannot be read: No such file')


def test_a_comparison_names_what_is_missing_and_no_more(digits):
    assert_one_clear_error(invoke(compare.main, '--data=nope.zip'), 'no such file or folder', status=2)
    result = invoke(compare.main, f'--data={digits}', '--teacher=a.pkl')
    assert_one_clear_error(result, 'needs --ref=NPZ', status=2)
    assert '--teacher' not in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    'options, words',
    [
        (['net.pkl', 'net.safetensors'], 'add --to=safetensors'),
        (['--to=safetensors', 'net.pkl', 'copy.pkl'], 'add --to=snapshot'),
    ],
)
def test_endings_that_contradict_the_format(options, words):
    assert_one_clear_error(invoke(convert.main, *options), words, status=2)


def test_a_photograph_as_safetensors(tmp_path):
    photo = write_images(tmp_path / 'photos', [(8, 8, 3)], 'jpeg') / '0.jpeg'
    result = invoke(convert.main, '--from=safetensors', photo, tmp_path / 'net.pkl')
    assert_one_clear_error(result, 'is a JPEG image, not a safetensors file')


def test_a_folder_named_digits_is_not_taken_for_the_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / 'digits', [(8, 8)])
    result = invoke(dataset_tool.main, '--source=digits', '--dest=x.zip', '--max-images=8')
    assert result.exit_code == 0 and './digits' in result.stderr


def test_nothing_is_warned_of_before_an_error(tmp_path, teacher):
    write_images(tmp_path / 'out', [(8, 8)])
    (tmp_path / 'out' / '0.png').rename(tmp_path / 'out' / '000999.png')
    options = [f'--network={teacher}', f'--outdir={tmp_path / "out"}', '--seeds=0-1', '--workers=0']
    result = invoke(generate.main, *options, '--class=99')
    assert_one_clear_error(result, '99')
    assert 'Warning' not in result.stderr


def test_the_example_has_help():
    done = run_python('example.py', '--help')
    assert done.stdout.startswith('Usage: python example.py') and not done.stderr


def test_an_error_of_the_main_process_is_the_only_one(tmp_path, digits, teacher):
    """Of two: the other one ends without a word."""
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'training-state-000000.pt').write_bytes(b'none')
    done = run_ranks(
        2,
        'train.py',
        f'--outdir={tmp_path / "run"}',
        f'--data={digits}',
        *TINY_NETWORK,
        *FAST,
        '--batch=64',
        check=False,
    )
    assert done.returncode and 'holds training states of an earlier run' in done.stderr
    assert 'lost the others' not in done.stderr


def test_the_command_to_resume_names_the_launcher(monkeypatch):
    from torch_utils import elastic

    monkeypatch.setattr(sys, 'argv', ['train.py'])
    assert elastic.launcher() == ['python', 'train.py']
    torchrun = ['/venv/bin/python', '/venv/bin/torchrun', '--nproc_per_node=2', 'train.py', '--outdir=x']
    monkeypatch.setattr(elastic.interrupts, 'PARENT_COMMAND', torchrun)
    assert elastic.launcher() == ['torchrun', '--nproc_per_node=2', 'train.py']
    module = ['/venv/bin/python', '-m', 'torch.distributed.run', '--standalone', './train.py', '-n']
    monkeypatch.setattr(elastic.interrupts, 'PARENT_COMMAND', module)
    assert elastic.launcher() == ['python', '-m', 'torch.distributed.run', '--standalone', './train.py']


def test_values_are_spelled_as_they_are_shown():
    """`-` and `_` are alike in the names of options only."""
    assert '|cm-cd|cm-ct|' in ''.join(invoke(train.main, '--help').stdout.split())
    result = invoke(train.main, '--outdir=x', '--data=x', '--objective=cm_cd')
    assert_one_clear_error(result, "'cm_cd' is not one of", status=2)


def test_options_of_train_that_compare_passes_on_are_alike_too():
    assert comparison.parameter_names(['--top_mass=1', '--batch_gpu=8']) == ['top_mass', 'batch_gpu']
