"""Evaluation inside training and from the command line: every average, any number of processes, pictures, and signals in the middle."""

import json
import os
import signal
import time

import numpy as np
import pytest
from helpers import FAST, assert_one_clear_error, lines, run, run_ranks
from PIL import Image
from runs import Process

from training.checkpoint import load_network


def student_command(digits, teacher, rulers, folder, *extra):
    return [
        'train.py',
        f'--outdir={folder}',
        f'--data={digits}',
        '--cond=1',
        '--consistency=True',
        f'--teacher={teacher}',
        *FAST,
        '--batch=64',
        '--duration=0.000384',
        '--tick=0.064',
        '--snap=3',
        '--dump=0',
        '--S=2',
        '--T_start=8',
        '--T_end=8',
        '--anchor_hops=2',
        '--ema=10kimg',
        '--phema=0.05,0.10',
        '--val=1',
        f'--val_ref={rulers / "pca.npz"}',
        f'--val_detector={rulers / "pca.pt"}',
        '--val_num=96',
        '--val_batch=32',
        '--val_every=3',
        *extra,
    ]


@pytest.fixture(scope='module')
def evaluated(digits, teacher, rulers, tmp_path_factory):
    """A run that evaluated all of its averages."""
    folder = tmp_path_factory.mktemp('evaluated')
    run(*student_command(digits, teacher, rulers, folder, '--val_emas=all'))
    return folder


def test_every_average_is_evaluated_and_its_snapshot_says_with_what_result(evaluated):
    records = lines(evaluated / 'metrics-val.jsonl')
    assert [(record['nimg'], record['ema']) for record in records] == [
        (nimg, name) for nimg in (256, 384) for name in ('ema', 'phema-0.050', 'phema-0.100')
    ]
    assert (
        all(record['nfe'] == 2 and record['num_images'] == 96 for record in records)
        and len({record['fid'] for record in records}) == 6
    )
    for record in records[3:]:
        suffix = record['ema'].removeprefix('ema').removeprefix('phema')
        assert (
            load_network(evaluated / f'network-snapshot-000000-384{suffix}.pkl').metadata['fid']
            == record['fid']
        )


def test_every_evaluation_leaves_a_picture_of_its_first_samples(evaluated):
    """8 × 8 digits of 8 × 8 pixels, enlarged four times to be seen."""
    pictures = sorted(path.name for path in evaluated.glob('fakes-*.png'))
    assert pictures == [
        f'fakes-000000{nimg}-{name}.png'
        for nimg in (256, 384)
        for name in ('ema', 'phema-0.050', 'phema-0.100')
    ]
    with Image.open(evaluated / pictures[0]) as picture:
        assert picture.size == (256, 256) and len(set(picture.getdata())) > 8


def test_the_command_line_repeats_what_training_found_on_any_number_of_processes(tmp_path, evaluated, rulers):
    """The same images in the same batches, statistics summed in FP64: only the order of that sum differs."""
    expected = {
        record['ema']: record['fid']
        for record in lines(evaluated / 'metrics-val.jsonl')
        if record['nimg'] == 384
    }
    options = [
        'validation.py',
        f'--ref={rulers / "pca.npz"}',
        f'--detector={rulers / "pca.pt"}',
        '--num=96',
        '--batch=32',
        '--label=uniform',
        *(f'--network={evaluated / f"network-snapshot-000000-384{suffix}.pkl"}' for suffix in ('', '-0.050')),
    ]
    run(*options, f'--outdir={tmp_path / "one"}')
    run_ranks(2, *options, f'--outdir={tmp_path / "two"}')
    one, two = (lines(tmp_path / name / 'metrics-val.jsonl') for name in ('one', 'two'))
    assert [record['ema'] for record in one] == ['ema', 'phema-0.050'] and one[0].keys() == lines(
        evaluated / 'metrics-val.jsonl'
    )[0].keys()
    for a, b in zip(one, two, strict=True):
        assert a['fid'] == pytest.approx(b['fid'], rel=1e-9) and a['num_images'] == b['num_images'] == 96
        assert expected[a['ema']] > 0


def test_evaluation_in_training_does_not_depend_on_the_number_of_processes(tmp_path, digits, teacher, rulers):
    """Before the first step, so that the networks are the same to the bit."""
    arguments = ['--val_at_start=1', '--val_teacher=1', '--duration=0.000064']
    run(*student_command(digits, teacher, rulers, tmp_path / 'one', *arguments))
    run_ranks(2, *student_command(digits, teacher, rulers, tmp_path / 'two', *arguments))
    one, two = (lines(tmp_path / name / 'metrics-val.jsonl') for name in ('one', 'two'))
    assert [record['ema'] for record in one] == [record['ema'] for record in two] == ['teacher', 'ema']
    assert [a['fid'] for a in one] == pytest.approx([b['fid'] for b in two], rel=1e-9)


def test_a_signal_during_an_evaluation_gives_it_up_and_a_resume_makes_it_again(
    tmp_path, digits, teacher, rulers
):
    """On one process of two: both stop, long before 20,000 images are done."""
    slow = [
        *student_command(digits, teacher, rulers, tmp_path),
        '--val_num=20000',
        '--val_batch=16',
        f'--val_dump_images_dir={tmp_path / "images"}',
    ]
    process = Process(
        [
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node=2',
            '--signals-to-handle=SIGTERM,SIGINT,SIGUSR1',
            *slow,
        ]
    )
    process.wait_for(lambda: any(tmp_path.glob('images/*/*.png')))
    start = time.monotonic()
    os.kill(process.ranks()[1], signal.SIGUSR1)
    process.end()
    assert time.monotonic() - start < 60
    note = json.loads((tmp_path / 'preempted.json').read_text())
    assert note['nimg'] == 256 and not (tmp_path / 'metrics-val.jsonl').exists()
    assert (
        len(list(tmp_path.glob('images/*/*.png'))) < 10_000
    )  # the process that was not asked has not done its half either

    run_ranks(2, *student_command(digits, teacher, rulers, tmp_path, f'--resume={tmp_path}'))
    run(
        *student_command(digits, teacher, rulers, tmp_path, f'--resume={tmp_path}')
    )  # as if killed before the next state: from the same one
    assert [record['nimg'] for record in lines(tmp_path / 'metrics-val.jsonl')] == [256, 384]
    nimg = [tick['Progress/nimg']['mean'] for tick in lines(tmp_path / 'stats.jsonl')]
    assert nimg == [64, 128, 192, 256, 320, 384]


def test_a_picture_that_cannot_be_written_need_not_stop_a_run(tmp_path, digits, teacher, rulers):
    arguments = ['--val_at_start=1', '--duration=0.000064', '--snap=0']
    for choice in ('continue', 'stop'):
        folder = tmp_path / choice
        (folder / 'fakes-000000000-ema.png' / 'in the way').mkdir(parents=True)
        result = run(
            *student_command(digits, teacher, rulers, folder, *arguments, f'--on-save-error={choice}'),
            check=False,
        )
        if choice == 'stop':
            assert_one_clear_error(result, 'fakes-000000000-ema.png', '--on-save-error=continue')
        else:
            assert (
                result.returncode == 0
                and 'Training goes on' in result.stderr
                and len(lines(folder / 'metrics-val.jsonl')) == 1
            ), result.stderr


@pytest.mark.parametrize('emas', ['0.07', 'ema,ema', 'median'])
def test_an_average_that_is_not_kept_cannot_be_evaluated(tmp_path, digits, teacher, rulers, emas):
    result = run(
        *student_command(digits, teacher, rulers, tmp_path / 'run', f'--val_emas={emas}'), check=False
    )
    assert_one_clear_error(result, f'--val_emas={emas}', '0.050, 0.100', status=2)
    assert not (tmp_path / 'run').exists()


def test_a_reference_of_another_resolution_is_noted(tmp_path, teacher, rulers):
    """It is the same check as fid.py's, which knows the size of the network's images."""
    with np.load(rulers / 'pca.npz') as file:
        np.savez(tmp_path / 'larger.npz', **{**file, 'resolution': '16x16x1'})
    result = run(
        'validation.py',
        f'--ref={tmp_path / "larger.npz"}',
        f'--detector={rulers / "pca.pt"}',
        '--num=4',
        f'--network={teacher}',
        f'--outdir={tmp_path}',
    )
    assert 'is of 16x16 images, but these are 8x8' in result.stderr
