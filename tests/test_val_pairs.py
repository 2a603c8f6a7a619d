"""The paired error in training (--val_pairs) and of saved snapshots (validation.py --pairs-with)."""

import json
import math

import helpers
import pytest
import torch
from helpers import FAST, assert_one_clear_error, lines, run, run_ranks

import fid
import train
import validation
from training.checkpoint import load_network, save_snapshot
from training.run_files import saved_snapshots
from training.run_log import json_line, parse, scalars

PAIRED = ['paired_error', 'paired_interval', 'paired_quantiles', 'num_pairs', 'paired_with']


def command(digits, teacher, rulers, folder, *extra):
    return [
        'train.py',
        f'--outdir={folder}',
        f'--data={digits}',
        '--cond=1',
        '--objective=direct',
        f'--teacher={teacher}',
        *FAST,
        '--batch=64',
        '--duration=0.000256',
        '--tick=0.064',
        '--snap=2',
        '--dump=2',
        '--S=1',
        '--substeps=2',
        '--ema=10kimg',
        '--val=1',
        f'--val_ref={rulers / "pca.npz"}',
        f'--val_detector={rulers / "pca.pt"}',
        '--val_num=32',
        '--val_batch=16',
        '--val_every=2',
        '--val_label=uniform',
        '--val_at_start=1',
        *extra,
    ]


@pytest.fixture(scope='module')
def whole(digits, teacher, rulers, tmp_path_factory):
    """A run that evaluates 16 pairs at its start, in the middle and at its end, and the teacher."""
    folder = tmp_path_factory.mktemp('paired')
    run(*command(digits, teacher, rulers, folder, '--val_pairs=16', '--val_teacher=1'))
    return folder


def test_every_evaluation_has_the_error_of_its_network(whole, teacher, rulers, tmp_path):
    """As fid.py finds it for the last snapshot; the teacher's own is that of its 18 steps, and smaller."""
    records = lines(whole / 'metrics-val.jsonl')
    assert [(record['nimg'], record['ema']) for record in records] == [
        (0, 'teacher'),
        *((nimg, 'ema') for nimg in (0, 192, 256)),
    ]
    for record in records:
        low, high = record['paired_interval']
        assert low < record['paired_error'] < high and record['num_pairs'] == 16
        assert list(record['paired_quantiles']) == ['5', '50', '95']
        assert record['paired_with'] == dict(solver='heun', steps=256)
    assert records[0]['paired_error'] < 0.2 * records[1]['paired_error']
    result = helpers.invoke(
        fid.main,
        'calc',
        f'--network={saved_snapshots(whole)[0]}',
        '--seeds=0-15',
        '--batch=16',
        f'--ref={rulers / "pca.npz"}',
        '--metrics=paired_error',
        f'--pairs-with={teacher}',
        f'--json={tmp_path / "pairs.json"}',
    )
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / 'pairs.json').read_text())['paired_error']
    assert records[-1]['paired_error'] == pytest.approx(found['value'], rel=1e-6)
    assert records[-1]['paired_interval'] == pytest.approx(found['interval'], rel=1e-6)
    assert f'"paired_error": {records[-1]["paired_error"]}' in (whole / 'log.txt').read_text()
    assert 'heun, 511 evaluations each' in (whole / 'log.txt').read_text()


def test_a_run_trains_the_same_without_it(whole, digits, teacher, rulers, tmp_path):
    run(*command(digits, teacher, rulers, tmp_path))
    a, b = (load_network(saved_snapshots(folder)[0]).state_dict() for folder in (whole, tmp_path))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    record = lines(tmp_path / 'metrics-val.jsonl')[-1]
    assert not {*PAIRED} & record.keys() and record['fid'] == lines(whole / 'metrics-val.jsonl')[-1]['fid']
    options = [json.loads((folder / 'training_options.json').read_text()) for folder in (whole, tmp_path)]
    assert options[0]['validation']['pairs'] == 16 and 'pairs' not in options[1]['validation']


@pytest.mark.slow
def test_a_resumed_run_evaluates_the_same_pairs(whole, digits, teacher, rulers, tmp_path):
    """From the state in the middle, with the options in it."""
    run(
        *command(
            digits, teacher, rulers, tmp_path, '--val_pairs=16', '--val_teacher=1', '--duration=0.000192'
        )
    )
    run('train.py', f'--resume={tmp_path}', '--duration=0.000256')
    results = [
        [{key: record.get(key) for key in ('nimg', 'ema', 'fid', *PAIRED)} for record in lines(path)]
        for path in (whole / 'metrics-val.jsonl', tmp_path / 'metrics-val.jsonl')
    ]
    assert results[0] == results[1]


def test_processes_agree(whole, digits, teacher, rulers, tmp_path):
    """One batch of pairs, which one process of two has, before the first step: the networks are equal to the bit."""
    run_ranks(2, *command(digits, teacher, rulers, tmp_path, '--val_pairs=16', '--duration=0.000064'))
    one, two = lines(whole / 'metrics-val.jsonl')[1], lines(tmp_path / 'metrics-val.jsonl')[0]
    assert one['nimg'] == two['nimg'] == 0
    assert {key: one[key] for key in PAIRED} == {key: two[key] for key in PAIRED}


def test_trackers_show_the_error_and_files_of_runs_hold_it(whole):
    record = lines(whole / 'metrics-val.jsonl')[-1]
    assert scalars(record) == {'Metrics/fid': record['fid'], 'Metrics/paired_error': record['paired_error']}
    teachers = lines(whole / 'metrics-val.jsonl')[0]
    assert scalars(teachers)['Metrics/paired_error/teacher'] == teachers['paired_error']
    assert parse(json_line(record).encode()) == record


# ----------------------------------------------------------------------------
# Who has no pairs.


@pytest.mark.parametrize(
    'options, words',
    [
        (['--objective=ect'], '--objective=ect has no teacher'),
        (['--objective=flowmap'], '--objective=flowmap has no teacher'),
        (['--objective=diffusion'], '--objective=diffusion has no teacher'),
        (['--objective=tcm', '--teacher=t.pkl'], '--objective=tcm goes on from a consistency model'),
        (['--objective=cm-cd', '--teacher=t.pkl', '--val_steps=2'], 'Add --val_steps=1'),
        (['--objective=cm-cd', '--teacher=t.pkl', '--mid_t=0.8'], 'draws noise between 2 steps'),
        (['--objective=mcd', '--teacher=t.pkl', '--val_pairs=1'], 'needs two pairs or more'),
        (['--objective=mcd', '--teacher=t.pkl', '--val=0'], None),
    ],
)
def test_runs_without_pairs_are_usage_errors(options, words, tmp_path):
    given = [
        '--outdir=runs',
        f'--data={tmp_path}/none.zip',
        '--val=1',
        '--val_ref=x',
        '--val_pairs=9',
        *options,
    ]
    result = helpers.invoke(train.main, *given, '--dry-run')
    if words is None:
        # Switched off, it is said and ignored, and the missing file is the only error.
        assert_one_clear_error(result, 'ignoring', '--val_pairs', 'none.zip')
        return
    assert_one_clear_error(result, words, status=2)


def test_without_validation_there_are_no_pairs(tmp_path):
    result = helpers.invoke(
        train.main,
        '--outdir=runs',
        f'--data={tmp_path}/none.zip',
        '--objective=mcd',
        '--teacher=t',
        '--val_pairs=9',
    )
    assert_one_clear_error(result, '--val_pairs needs --val=1', status=2)


# ----------------------------------------------------------------------------
# validation.py.


def validate(rulers, folder, *options):
    reference = [f'--ref={rulers / "pca.npz"}', f'--detector={rulers / "pca.pt"}']
    return helpers.invoke(
        validation.main, *reference, f'--outdir={folder}', '--num=32', '--batch=16', *options
    )


def test_the_command_line_repeats_what_training_found(whole, teacher, rulers, tmp_path):
    student = saved_snapshots(whole)[0]
    options = [f'--network={student}', f'--network={teacher}', f'--pairs-with={teacher}', '--pairs-num=16']
    result = validate(rulers, tmp_path, *options, '--label=uniform')
    assert result.exit_code == 0, result.output
    trained, (one, of_teacher) = lines(whole / 'metrics-val.jsonl'), lines(tmp_path / 'metrics-val.jsonl')
    assert one['paired_error'] == pytest.approx(trained[-1]['paired_error'], rel=1e-6)
    assert of_teacher['paired_error'] == pytest.approx(trained[0]['paired_error'], rel=1e-6)
    assert list(one) == list(trained[-1]) and one['num_pairs'] == 16


def test_the_number_of_pairs_is_at_most_that_of_images_by_default(teacher, rulers, tmp_path):
    result = validate(rulers, tmp_path, f'--network={teacher}', f'--pairs-with={teacher}:heun:18')
    (record,) = lines(tmp_path / 'metrics-val.jsonl')
    assert result.exit_code == 0 and record['num_pairs'] == 32 and record['paired_error'] == 0


def test_a_broken_network_has_neither_distance_nor_error(whole, teacher, rulers, tmp_path):
    net = load_network(saved_snapshots(whole)[0])
    with torch.no_grad():
        next(net.parameters()).fill_(math.nan)
    save_snapshot(tmp_path / 'broken.pkl', net, **net.metadata)
    options = [f'--network={tmp_path / "broken.pkl"}', f'--pairs-with={teacher}:heun:2']
    assert_one_clear_error(validate(rulers, tmp_path, *options), '32 of 32 images are not finite')
    (record,) = lines(tmp_path / 'metrics-val.jsonl')
    assert record['fid'] is record['paired_error'] is None and record['nonfinite'] == 32


def test_a_broken_teacher_leaves_the_distance(whole, teacher, rulers, tmp_path):
    net = load_network(teacher)
    with torch.no_grad():
        next(net.parameters()).fill_(math.nan)
    save_snapshot(tmp_path / 'broken.pkl', net, **net.metadata)
    student = saved_snapshots(whole)[0]
    options = [f'--network={student}', f'--pairs-with={tmp_path / "broken.pkl"}:heun:2']
    assert_one_clear_error(
        validate(rulers, tmp_path, *options), 'broken.pkl', '32 of 32 images are not finite'
    )
    (record,) = lines(tmp_path / 'metrics-val.jsonl')
    assert record['fid'] > 0 and record['paired_error'] is None and 'broken.pkl' in record['problem']


@pytest.mark.parametrize(
    'options, words, status',
    [
        (['--pairs-num=4'], '--pairs-num needs --pairs-with=PKL', 2),
        (['--pairs-with=x.pkl:heum'], 'is not NETWORK[:SOLVER[:STEPS]]', 2),
        (['--pairs-with=missing.pkl'], '--pairs-with: ', 1),
    ],
)
def test_wrong_teachers_are_refused(teacher, rulers, tmp_path, options, words, status):
    assert_one_clear_error(validate(rulers, tmp_path, f'--network={teacher}', *options), words, status=status)
