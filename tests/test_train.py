"""train.py: the README's command, what a run writes, resuming, and every wrong input in one line."""

import functools
import json
import re
import shlex
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from helpers import FAST, ROOT, TINY_NETWORK, assert_one_clear_error, lines, run, run_python, run_ranks
from PIL import Image

import train
from data.dataset import ImageFolderDataset
from training.checkpoint import load_network, load_state
from training.run_files import states_to_keep

README_COMMAND = """
    --outdir=training-runs/imagenet64-cd-s8 --data=/path/to/imagenet-64x64.zip --cond=1 --arch=adm --precond=edm --batch=2048 --batch-gpu=64
    --fp16=True --ema=50 --ema_rampup=0.05 --lr=8e-5 --phema=0.05,0.10 --phema_snap=60 --consistency=True --sampling_mode=edm --dropout=0.20
    --dout_resolutions=16,8 --duration=210 --terminal_anchor --terminal_teacher_hop --teacher=/path/to/edm-imagenet-64x64-cond-adm.pkl
    --S=8 --T_start=64 --T_end=1280 --T_anneal_kimg=104800 --rho=7 --sigma_min=0.002 --sigma_max=80 --cd_loss=pseudo_huber
    --cd_weight_mode=sqrt_karras --val=1 --val_ref=/path/to/fid-refs/imagenet-64x64.npz --val_steps=8 --val_every=20 --val_at_start=0
    --val_teacher=False --snap=20 --dump=20 --workers=4 --seed=1959836853"""


invoke = functools.partial(helpers.invoke, train.main)


def readme_command(**replaced):
    """The published training command, options replaced by name."""
    options = dict(option.partition('=')[::2] for option in shlex.split(README_COMMAND))
    options |= {f'--{name.replace("batch_gpu", "batch-gpu")}': str(value) for name, value in replaced.items()}
    return [f'{name}={value}' if value else name for name, value in options.items()]


# ----------------------------------------------------------------------------
# The README's command.


def test_the_published_command_is_accepted_option_by_option(tmp_path, digits, teacher, rulers):
    arguments = readme_command(
        outdir=tmp_path / 'runs', data=digits, teacher=teacher, val_ref=rulers / 'pca.npz'
    )
    result = invoke(*arguments, f'--val_detector={rulers / "pca.pt"}', '--dry-run')
    assert result.exit_code == 0, result.output
    c = json.loads(result.stdout)
    assert not (tmp_path / 'runs').exists()
    assert (
        c['objective'] == 'mcd'
        and c['total_nimg'] == 210_000_000
        and c['batch_size'] == 2048
        and c['batch_gpu'] == 64
    )
    assert (
        c['ema_halflife_nimg'] == 50e6
        and c['ema_rampup_ratio'] == 0.05
        and c['lr'] == 8e-5
        and c['phema_stds'] == [0.05, 0.1]
    )
    assert (
        c['phema_snapshot_ticks'] == 60
        and c['snapshot_ticks'] == c['state_dump_ticks'] == 20
        and c['seed'] == 1959836853
        and c['workers'] == 4
    )
    assert (
        c['network']['class_name'] == 'EDMPrecond' and c['network']['kwargs']['model_type'] == 'DhariwalUNet'
    )
    assert c['network']['kwargs']['use_fp16'] is True and c['network']['kwargs']['dropout'] == 0.2
    assert c['network']['kwargs']['dout_resolutions'] == [16, 8]
    assert c['loss'] == dict(
        S=8,
        T_start=64,
        T_end=1280,
        T_anneal_kimg=104800,
        rho=7,
        student_grid='edm',
        sampling_mode='edm',
        hop='heun',
        cd_loss='pseudo_huber',
        cd_weight_mode='sqrt_karras',
        terminal_anchor=True,
        terminal_teacher_hop=True,
        sync_dropout=True,
        anchor_hops=None,
        sigma_min=0.002,
        sigma_max=80,
        sigma_data=0.5,
        sigma_grid='karras',
        keep_ties=False,
        top_mass=0,
        xvar_frac=0.75,
    )
    assert c['validation'] == dict(
        ref=str(rulers / 'pca.npz'),
        ref_data=None,
        detector=str(rulers / 'pca.pt'),
        steps=8,
        solver=None,
        order=None,
        afs=False,
        to_zero=None,
        discretization=None,
        sigmas=None,
        every=20,
        emas=['ema'],
        at_start=False,
        teacher=False,
        num=50000,
        batch=64,
        seed=0,
        label='auto',
        dump_images_dir=None,
        overwrite=False,
    )


def test_the_readme_of_this_repository_repeats_the_published_command():
    blocks = re.findall(r'train\.py \\\n((?:.*\\\n)*.*)\n', (ROOT / 'README.md').read_text())
    published = shlex.split(README_COMMAND)
    assert any(set(published) <= set(shlex.split(block.replace('\\\n', ' '))) for block in blocks)


def test_the_published_command_scaled_down_trains_on_digits(tmp_path, digits, teacher, rulers):
    arguments = readme_command(
        outdir=tmp_path,
        data=digits,
        teacher=teacher,
        val_ref=rulers / 'pca.npz',
        batch=64,
        batch_gpu=16,
        duration=0.00128,
        workers=1,
        dout_resolutions='8',
        T_anneal_kimg=0.6,
    )
    result = run(
        'train.py',
        *arguments,
        '--tick=0.064',
        f'--val_detector={rulers / "pca.pt"}',
        '--val_num=64',
        '--lr_rampup=0.1',
    )
    folder = tmp_path / '00000-digits-cond-adm-edm-mcd-s8-gpus1-batch64-fp16'
    assert folder.is_dir() and 'Done.' in result.stdout
    assert '50,000,000 images = 781,250 steps' in result.stdout
    options = json.loads((folder / 'training_options.json').read_text())
    assert options['loss']['S'] == 8

    stats = lines(folder / 'stats.jsonl')
    assert len(stats) == 20 and stats[-1]['Progress/kimg']['mean'] == 1.28
    assert stats[0]['Edges/T']['mean'] < stats[-1]['Edges/T']['mean'] and stats[-1]['Edges/T']['mean'] >= 1280
    assert {'Loss/cd', 'Edges/general', 'Progress/lr', 'Progress/grad_norm', 'Timing/sec_per_kimg'} <= set(
        stats[-1]
    )
    (record,) = lines(folder / 'metrics-val.jsonl')
    assert (
        record['kimg'] == 1.28
        and record['nfe'] == record['steps'] == 8
        and record['num_images'] == 64
        and record['ema'] == 'ema'
    )
    names = {path.name for path in folder.iterdir()}
    assert {
        'network-snapshot-000000.pkl',
        'network-snapshot-000001.pkl',
        'network-snapshot-000001-0.050.pkl',
        'network-snapshot-000001-0.100.pkl',
        'training-state-000001.pt',
        'log.txt',
    } <= names

    net = load_network(folder / 'network-snapshot-000001.pkl')
    assert net.metadata['objective'] == 'mcd' and net.metadata['S'] == 8 and len(net.metadata['sigmas']) == 9
    assert (
        net.metadata['nimg'] == 1280
        and net.metadata['fid'] == pytest.approx(record['fid'])
        and net.init_kwargs['dout_resolutions'] == [8]
    )
    assert load_network(folder / 'network-snapshot-000001-0.050.pkl').metadata['ema'] == 'phema-0.050'


# ----------------------------------------------------------------------------
# Teachers.


@pytest.mark.parametrize(
    'arch, precond',
    [
        ('ddpmpp', 'edm'),
        pytest.param('ddpmpp', 'vp', marks=pytest.mark.slow),
        pytest.param('ncsnpp', 've', marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_teacher_trains_and_its_loss_falls(tmp_path, digits, arch, precond):
    run(
        'train.py',
        f'--outdir={tmp_path}',
        f'--data={digits}',
        '--cond=1',
        f'--arch={arch}',
        f'--precond={precond}',
        '--cbase=8',
        '--cres=1,2',
        '--num_blocks=1',
        *FAST,
        '--batch=64',
        '--duration=0.0064',
        '--tick=1.6',
        '--augment=0.1',
        '--xflip=1',
        '--ema=10kimg',
        '--lr=3e-3',
        '--dump=0',
    )
    stats = lines(tmp_path / 'stats.jsonl')
    assert stats[-1]['Loss/diffusion']['mean'] < 0.8 * stats[0]['Loss/diffusion']['mean']
    net = load_network(max(tmp_path.glob('network-snapshot-*.pkl')))
    assert (
        net.init_kwargs['augment_dim'] == 9
        and net.metadata['objective'] == 'diffusion'
        and net.metadata['dataset_kwargs']['xflip'] is True
    )


def test_defaults_are_edms(tmp_path, digits):
    c = json.loads(invoke('--outdir', tmp_path, '--data', digits, '-n').stdout)
    assert (c['total_nimg'], c['batch_size'], c['lr'], c['ema_halflife_nimg'], c['augment']) == (
        200_000_000,
        512,
        1e-3,
        500_000,
        0.12,
    )
    assert c['network']['kwargs']['model_type'] == 'SongUNet' and c['network']['kwargs']['channel_mult'] == [
        2,
        2,
        2,
    ]
    assert (c['kimg_per_tick'], c['snapshot_ticks'], c['state_dump_ticks']) == (50, 50, 500)
    assert c['network']['class_name'] == 'EDMPrecond' and c['loss'] == dict(
        kind='edm', P_mean=-1.2, P_std=1.2
    )


def test_consistency_defaults_are_those_of_the_released_student(tmp_path, digits, teacher):
    c = json.loads(
        invoke(
            '--outdir',
            tmp_path,
            '--data',
            digits,
            '--cond=1',
            '--consistency=True',
            '--teacher',
            teacher,
            '-n',
        ).stdout
    )
    assert (c['lr'], c['augment'], c['ema_halflife_nimg'], c['total_nimg']) == (8e-5, 0, 50e6, 210_000_000)
    assert (
        c['loss']['T_anneal_kimg'] == 105_000
        and c['loss']['S'] == 8
        and c['loss']['terminal_anchor']
        and c['loss']['sync_dropout']
    )
    assert c['network']['kwargs']['model_channels'] == 8 and c['network']['kwargs']['channel_mult'] == [1, 2]


@pytest.mark.parametrize('text, images', [('50', 50e6), ('50Mimg', 50e6), ('500kimg', 5e5), ('0.5', 5e5)])
def test_the_half_life_can_name_its_unit(tmp_path, digits, text, images):
    assert (
        json.loads(invoke('--outdir', tmp_path, '--data', digits, f'--ema={text}', '-n').stdout)[
            'ema_halflife_nimg'
        ]
        == images
    )


def test_runs_are_numbered_and_described(tmp_path, digits):
    (tmp_path / '00007-something').mkdir()
    c = json.loads(invoke('--outdir', tmp_path, '--data', digits, '--desc=hello', '-n').stdout)
    assert c['run_dir'] == str(tmp_path / '00008-digits-uncond-ddpmpp-edm-gpus1-batch512-fp32-hello')


def test_long_half_lives_and_missing_dropout_resolutions_are_warned_of(tmp_path, digits, teacher):
    done = run(
        'train.py',
        f'--outdir={tmp_path}',
        f'--data={digits}',
        '--cond=1',
        '--consistency=True',
        f'--teacher={teacher}',
        *FAST,
        '--batch=64',
        '--duration=0.000128',
        '--ema=1kimg',
        '--dropout=0.1',
        '--dout_resolutions=16,8',
        '--dump=0',
        '--snap=0',
    )
    assert 'Warning: the half-life of the EMA is 1 kimg, and the run 0.128 kimg' in done.stderr
    assert 'Warning: --dout_resolutions names 16, which' in done.stderr


def test_a_transfer_starts_from_the_weights_that_fit(tmp_path, digits, teacher):
    run(
        'train.py',
        f'--outdir={tmp_path}',
        f'--data={digits}',
        '--cond=1',
        *TINY_NETWORK,
        *FAST,
        '--batch=64',
        '--duration=0.000064',
        '--augment=0',
        '--lr=1e-9',
        '--dump=0',
        f'--transfer={teacher}',
    )
    old, new = load_network(teacher), load_network(max(tmp_path.glob('*.pkl')))
    for a, b in zip(old.state_dict().values(), new.state_dict().values()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


# ----------------------------------------------------------------------------
# Accumulation, processes, resuming.


def student_run(digits, teacher, folder, *extra, processes=1):
    arguments = [
        'train.py',
        f'--outdir={folder}',
        f'--data={digits}',
        '--cond=1',
        '--consistency=True',
        f'--teacher={teacher}',
        *FAST,
        '--batch=64',
        '--duration=0.00064',
        '--tick=0.128',
        '--snap=1',
        '--dump=1',
        '--ema=10kimg',
        '--phema=0.1',
        '--dropout=0',
        '--T_anneal_kimg=0.32',
        *extra,
    ]
    run(*arguments) if processes == 1 else run_ranks(processes, *arguments)
    return folder


def final_tensors(folder):
    return load_network(folder / 'network-snapshot-000000-640.pkl').state_dict()


@pytest.fixture(scope='module')
def uninterrupted(digits, teacher, tmp_path_factory):
    return student_run(digits, teacher, tmp_path_factory.mktemp('whole'))


@pytest.mark.parametrize(
    'processes, extra',
    [
        pytest.param(1, ['--batch-gpu=16'], marks=pytest.mark.slow),
        pytest.param(2, [], marks=pytest.mark.slow),
        (2, ['--batch-gpu=16']),
    ],
    ids=['rounds', 'processes', 'both'],
)
def test_the_split_of_the_batch_does_not_matter(tmp_path, digits, teacher, uninterrupted, processes, extra):
    """Same images, noise and edges, whoever handles them: after ten steps, the losses agree to FP32 rounding."""
    split = student_run(digits, teacher, tmp_path / 'split', *extra, processes=processes)
    ours, theirs = lines(uninterrupted / 'stats.jsonl'), lines(split / 'stats.jsonl')
    assert len(ours) == len(theirs) == 6
    for a, b in zip(ours, theirs):
        assert a['Loss/cd']['num'] == b['Loss/cd']['num']
        assert a['Loss/cd']['mean'] == pytest.approx(b['Loss/cd']['mean'], rel=1e-3)
        assert a['Edges/general'] == pytest.approx(b['Edges/general'])


def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(tmp_path, digits, teacher, uninterrupted):
    half = student_run(digits, teacher, tmp_path, '--duration=0.00032')
    states = sorted(path.name for path in half.glob('training-state-*.pt'))
    state = half / states[0]
    assert load_state(state)['progress']['nimg'] < 640
    student_run(digits, teacher, half, f'--resume={state}')
    whole, resumed = final_tensors(uninterrupted), final_tensors(half)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    phema = [
        load_network(folder / 'network-snapshot-000000-640-0.100.pkl').state_dict()
        for folder in (uninterrupted, half)
    ]
    assert all(torch.equal(phema[0][name], phema[1][name]) for name in phema[0])


def test_the_seconds_of_ticks_and_of_what_lies_between_make_up_the_run(uninterrupted):
    """And each tick's images, at its speed, make up the 640 of training: the first tick is one step of 64, the others two."""
    stats = [
        {
            name.removeprefix('Timing/'): value['mean']
            for name, value in line.items()
            if name.startswith('Timing/')
        }
        for line in lines(uninterrupted / 'stats.jsonl')
    ]
    total = 0
    for tick in stats:
        assert tick['sec_per_tick'] > 0 and tick['maintenance_sec'] > 0 and 0 < tick['data_wait_share'] < 1
        total += tick['sec_per_tick'] + tick['maintenance_sec']
        assert tick['total_sec'] == pytest.approx(total, rel=1e-6)
    images = [round(tick['images_per_sec'] * tick['sec_per_tick'], 6) for tick in stats]
    assert images == [64, 128, 128, 128, 128, 64] and all(
        tick['sec_per_kimg'] == pytest.approx(1e3 / tick['images_per_sec']) for tick in stats
    )


def test_a_resumed_run_needs_no_seed_and_a_finished_one_trains_no_further(digits, teacher, uninterrupted):
    state = max(
        uninterrupted.glob('training-state-*.pt'), key=lambda path: load_state(path)['progress']['nimg']
    )
    arguments = [
        f'--outdir={uninterrupted}',
        f'--data={digits}',
        '--cond=1',
        '--consistency=True',
        f'--teacher={teacher}',
        '--batch=64',
        '--duration=0.00064',
        '--dropout=0',
        '--phema=0.1',
        f'--resume={state}',
    ]
    c = json.loads(invoke(*arguments, '--T_anneal_kimg=0.32', '--dry-run').stdout)
    assert c['seed'] == 0 and c['run_dir'] == str(uninterrupted)
    said = run('train.py', *arguments, '--workers=0').stdout
    assert (
        f'Nothing to do: {state} has seen 0.64 kimg, and --duration=0.00064 ends the run at 0.64 kimg' in said
    )
    assert 'longer --duration' in said


@pytest.mark.parametrize(
    'states, kept',
    [
        (dict(a=None, b=None, c=None), 'bc'),
        (dict(a=5, b=3, c=4, d=6), 'bcd'),
        (dict(a=2, b=3, c=None, d=None), 'acd'),
        (dict(a=1), 'a'),
    ],
)
def test_states_to_keep_are_the_two_newest_and_the_best_measured_one(states, kept):
    assert states_to_keep(states) == set(kept)


def test_a_teacher_with_augmentation_labels_is_distilled_by_two_processes(tmp_path, digits):
    """Without augmentation they are zero, and every parameter has a gradient."""
    common = [f'--data={digits}', '--cond=1', *FAST, '--batch=16', '--dump=0']
    run(
        'train.py',
        f'--outdir={tmp_path / "t"}',
        *common,
        *TINY_NETWORK,
        '--augment=0.1',
        '--duration=0.000032',
    )
    snapshot = max((tmp_path / 't').glob('*.pkl'))
    run_ranks(
        2,
        'train.py',
        f'--outdir={tmp_path / "s"}',
        *common,
        '--consistency=True',
        f'--teacher={snapshot}',
        '--duration=0.000064',
    )
    assert load_network(max((tmp_path / 's').glob('*.pkl'))).init_kwargs['augment_dim'] == 9


SHOW_WHO_FAILED = """
import sys, click, train
try:
    train.main(standalone_mode=False)
except click.ClickException as error:
    error.show()
    print("read by", "a worker" if "in DataLoader worker process" in str(error.__cause__.__cause__) else "the main process")
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(
    'workers, reader', [pytest.param(0, 'the main process', marks=pytest.mark.slow), (1, 'a worker')]
)
def test_an_image_whose_pixels_are_damaged_is_named_by_whoever_reads_it(tmp_path, workers, reader):
    """Its header is sound, so that the data set opens; the worker's error arrives as the cause, with its traceback for a text."""
    noise = np.random.default_rng(0).integers(256, size=(4, 8, 8), dtype=np.uint8)
    for i in range(4):
        Image.fromarray(noise[i]).save(tmp_path / f'{i}.png')
    sound = (tmp_path / '2.png').read_bytes()
    (tmp_path / '2.png').write_bytes(sound[: sound.index(b'IDAT') + 20])
    assert len(ImageFolderDataset(tmp_path)) == 4
    result = run_python(
        '-c',
        SHOW_WHO_FAILED,
        f'--outdir={tmp_path / "runs"}',
        f'--data={tmp_path}',
        '--arch=adm',
        '--cbase=8',
        '--cres=1',
        '--num_blocks=1',
        '--batch=8',
        '--duration=0.0001',
        f'--workers={workers}',
        '--cache=0',
        check=False,
    )
    assert_one_clear_error(result, '2.png')
    assert result.stdout.splitlines()[-1] == f'read by {reader}'


def test_only_the_two_newest_states_and_the_best_are_kept(tmp_path, digits, teacher, rulers):
    student_run(
        digits,
        teacher,
        tmp_path,
        '--val=1',
        '--val_every=1',
        '--val_num=32',
        f'--val_ref={rulers / "pca.npz"}',
        f'--val_detector={rulers / "pca.pt"}',
    )
    records = lines(tmp_path / 'metrics-val.jsonl')
    best = min(records, key=lambda r: r['fid'])['nimg']
    kept = {load_state(path)['progress']['nimg'] for path in tmp_path.glob('training-state-*.pt')}
    newest = {records[-1]['nimg'], records[-2]['nimg']}
    assert kept == newest | {best}


def test_in_loop_validation_covers_teacher_start_and_dumped_images(tmp_path, digits, teacher, rulers):
    student_run(
        digits,
        teacher,
        tmp_path / 'run',
        '--duration=0.000128',
        '--val=1',
        '--val_at_start=1',
        '--val_teacher=True',
        '--val_num=16',
        f'--val_ref_data={digits}',
        f'--val_detector={rulers / "pca.pt"}',
        f'--val_dump_images_dir={tmp_path / "dump"}',
        '--val_label=fixed:3',
    )
    records = lines(tmp_path / 'run' / 'metrics-val.jsonl')
    assert [(r['ema'], r['nimg'], r['nfe']) for r in records] == [
        ('teacher', 0, 35),
        ('ema', 0, 8),
        ('ema', 128, 8),
    ]
    dumped = {path.name: len(list(path.iterdir())) for path in (tmp_path / 'dump').iterdir()}
    assert dumped == {'000000000-teacher': 16, '000000000-ema': 16, '000000128-ema': 16}


# ----------------------------------------------------------------------------
# Options that are switched off.


@pytest.mark.parametrize(
    'switch, idle, base',
    [
        (['--val=0'], ['--val_ref=none.npz', '--val_steps=3', '--val_teacher=1', '--val_emas=0.05'], []),
        (['--val=False'], ['--val_num=8', '--val_dump_images_dir=x'], ['--objective=mct', '--S=2']),
        (['--wandb=0'], ['--wandb_project=p', '--wandb_mode=offline'], ['--tensorboard=0']),
        (
            ['--consistency=False'],
            [
                '--teacher=none.pkl',
                '--S=8',
                '--T_start=64',
                '--terminal_anchor',
                '--hop=heun',
                '--val_teacher=False',
            ],
            [],
        ),
        (['--cond=0'], ['--val_label=fixed:3'], []),
        (['--phema=none'], ['--phema_snap=60'], []),
        (['--lr_schedule=constant'], ['--lr_decay=70000'], []),
        (['--dump=0'], ['--keep=5'], []),
        (['--nosubdir'], ['--desc=words'], []),
    ],
)
def test_what_is_switched_off_explicitly_is_as_if_its_options_were_not_there(
    tmp_path, digits, switch, idle, base
):
    """One line names them, on stderr; stdout is one JSON object, the same as without them."""
    common = [
        f'--outdir={tmp_path / "runs"}',
        f'--data={digits}',
        '--cres=1,2',
        '--seed=0',
        '--dry-run',
        *base,
        *switch,
    ]
    done, without = invoke(*common, *idle), invoke(*common)
    assert done.exit_code == without.exit_code == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(without.stdout) and without.stderr == ''
    (line,) = done.stderr.splitlines()
    names = {option.split('=')[0] for option in idle}
    assert ': ignoring ' in line and set(line.rstrip('.').partition(': ignoring ')[2].split(', ')) == names


@pytest.mark.parametrize(
    'options, idle',
    [
        (
            ['--objective=mct', '--wandb=0', '--val=0', '--wandb_run=x', '--val_num=9'],
            ['--val=0: ignoring --val_num.', '--wandb=0: ignoring --wandb_run.'],
        ),
        (['--objective=ect', '--k=0', '--b=2'], ['--k=0: ignoring --b.']),
        (
            ['--objective=cm-ct', '--mu0=0', '--mu_schedule=fixed', '--cm_loss=l2'],
            ['--mu0=0: ignoring --mu_schedule.'],
        ),
    ],
)
def test_each_switch_has_its_line_and_numbers_of_a_loss_are_recorded_as_they_were(
    tmp_path, digits, options, idle
):
    done = invoke(f'--outdir={tmp_path}', f'--data={digits}', '--cres=1,2', '--dry-run', *options)
    assert done.stderr.splitlines() == idle
    loss = json.loads(done.stdout)['loss']
    assert '--b=2' not in options or loss['b'] == 2
    assert '--mu_schedule=fixed' not in options or loss['mu_schedule'] == 'fixed'


def test_the_published_command_trains_a_teacher_with_consistency_switched_off(tmp_path, digits):
    """Its own options of distillation are named, all of them, and nothing of them is left in the configuration."""
    command = readme_command(
        outdir=tmp_path, data=digits, arch='ddpmpp', consistency=False, val=0, fp16=False
    )
    done = invoke(*command, '--dout_resolutions=4', '--cres=1,2', '--dry-run')
    c = json.loads(done.stdout)
    assert (
        c['objective'] == 'diffusion'
        and c['teacher'] is None
        and c['validation'] is None
        and c['loss']['kind'] == 'edm'
    )
    of_val, of_objective = sorted(done.stderr.splitlines(), reverse=True)
    assert of_val.startswith('--val=0: ignoring --val_ref, ')
    assert of_objective.startswith('--consistency=False: ignoring --teacher, ')
    assert all(f'--{name}' in of_objective for name in ('S', 'cd_loss', 'rho'))


# ----------------------------------------------------------------------------
# Wrong input: one clear message, no traceback.


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['--nonsense=1'], ['No such option']),
        (['--consistency=True'], ['--teacher=PKL']),
        (['--S=4'], ['--S is for --objective=mcd or mct or direct', '--consistency=True means mcd']),
        (
            ['--objective=mct', '--teacher=t.pkl'],
            [
                '--teacher is for --objective=mcd or direct or pd or flowmap or cm-cd or tcm or scd or mm or sid, and this is mct'
            ],
        ),
        (['--objective=mcd', '--teacher=t.pkl', '--substeps=2'], ['--substeps is for --objective=direct']),
        (
            ['--objective=direct', '--teacher=t.pkl', '--sync_dropout'],
            ['--sync_dropout is for --objective=mcd or mct'],
        ),
        (
            ['--objective=direct', '--consistency=True', '--teacher=t.pkl'],
            ['--consistency=True means --objective=mcd'],
        ),
        (['--objective=direct', '--teacher=t.pkl', '--no_keep_ties'], ['--top-mass=0.9 needs --keep_ties']),
        (['--objective=mct', '--T_anneal_steps=5', '--T_anneal_kimg=5'], ['say the same']),
        (['--objective=mcd', '--teacher=t.pkl', '--xvar_frac=0.5'], ['--xvar_frac is for --hop=addim']),
        (['--consistency=True', '--teacher=t.pkl', '--S=100'], ['--S=100 <= --T_start=64']),
        (
            ['--consistency=True', '--teacher=t.pkl', '--T_start=128', '--T_end=64'],
            ['--T_start=128 <= --T_end=64'],
        ),
        (['--consistency=True', '--teacher=t.pkl', '--sigma_min=90'], ['--sigma_min=90 is not below']),
        (['--val=1'], ['--val_ref']),
        (['--val_num=8'], ['--val_num needs --val=1']),
        (['--val_num=8', '--wandb=0'], ['--val_num needs --val=1']),
        (['--wandb_run=x'], ['--wandb_run needs --wandb=1']),
        (['--val_ref='], ['--val_ref', 'empty']),
        (
            ['--consistency=False', '--objective=mcd', '--teacher=t.pkl'],
            ['--consistency=False contradicts --objective=mcd'],
        ),
        (
            ['--consistency=False', '--objective=mct', '--substeps=2'],
            ['--substeps is for --objective=direct'],
        ),
        (['--objective=diffusion', '--S=4'], ['--S is for --objective=mcd']),
        (['--fp16=False', '--precision=fp16'], ['--fp16=False contradicts --precision=fp16']),
        (['--lr_schedule=linear', '--lr_decay=5'], ['--lr_decay is for --lr_schedule=sqrt']),
        (
            ['--phema=none', '--val=1', '--val_ref=r.npz', '--val_emas=0.05'],
            ["'0.05' is not one more of ema"],
        ),
        (
            ['--consistency=True', '--teacher=t.pkl', '--val=1', '--val_ref=r.npz', '--val_steps=3'],
            ['--val_steps=3', '--S=8'],
        ),
        (['--val=1', '--val_ref=r.npz', '--val_teacher=1'], ['needs a teacher']),
        (['--phema_snap=3'], ['--phema_snap needs --phema']),
        (['--phema=0.9'], ['between 0.001 and 0.28']),
        (['--phema=0.0501,0.0502'], ['third decimal']),
        (['--lr=nan'], ['not a finite number']),
        (['--duration=inf'], ['not a finite number']),
        (['--ema=-5'], ['--ema']),
        (['--cres=1,x'], ["'1,x' is not a comma-separated list"]),
        (['--ema=50furlongs'], ['500kimg']),
        (['--val_label=sometimes'], ['fixed:K']),
        (['--arch=unet'], ['ddpmpp']),
        (['--resume=a.pt', '--transfer=b.pkl'], ['exclude each other']),
        (['--batch=64', '--batch-gpu=48'], ['equal parts']),
        (['--cond=perhaps'], ['--cond']),
    ],
)
def test_wrong_usage_exits_with_status_2(tmp_path, digits, arguments, words):
    assert_one_clear_error(
        invoke(f'--outdir={tmp_path / "runs"}', f'--data={digits}', *arguments), *words, status=2
    )
    assert not (tmp_path / 'runs').exists()


def truncated(digits, tmp_path):
    path = tmp_path / 'cut.zip'
    path.write_bytes(digits.read_bytes()[:20_000])
    return path


def hostile(tmp_path):
    path = tmp_path / 'hostile.pkl'
    path.write_bytes(b'cos\nsystem\n(S"touch ' + str(tmp_path / 'canary').encode() + b'"\ntR.')
    return path


@pytest.mark.parametrize(
    'case, words',
    [
        ('no data', ['missing.zip']),
        ('cut data', ['cut.zip', 'complete zip']),
        ('no labels', ['has no labels']),
        ('no teacher', ['nowhere.pkl']),
        ('hostile teacher', ['hostile.pkl', 'system']),
        ('not a snapshot', ['digits.zip']),
        ('teacher needs labels', ['10 classes', 'no classes']),
        ('contradiction', ['--cbase=64 contradicts']),
        ('other arch', ['--arch=ddpmpp contradicts']),
        ('other precond', ['--precond=vp contradicts']),
        ('augment', ['--augment=0.1 needs a teacher']),
        ('student as teacher', ['is a student']),
        ('levels', ['change --cres']),
        ('unwritable', ['--outdir']),
        ('no reference', ['none.npz']),
        ('wrong reference', ['features']),
        ('no resume', ['state.pt']),
        ('other run', ['S 8 -> 4', '--resume-override']),
        ('no network', ['make no network']),
        ('no levels', ['change --cres']),
        ('label', ['fixed:99', '10']),
    ],
)
def test_wrong_files_exit_with_status_1(tmp_path, digits, teacher, uninterrupted, rulers, case, words):
    base = dict(outdir=tmp_path / 'runs', data=digits, cond=1, consistency=True, teacher=teacher, seed=0)
    flat = tmp_path / 'file'
    flat.write_text('in the way')
    changes = {
        'no data': dict(data=tmp_path / 'missing.zip'),
        'cut data': dict(data=truncated(digits, tmp_path)),
        'no labels': dict(data=unlabeled(tmp_path)),
        'no teacher': dict(teacher=tmp_path / 'nowhere.pkl'),
        'hostile teacher': dict(teacher=hostile(tmp_path)),
        'not a snapshot': dict(teacher=digits),
        'teacher needs labels': dict(cond=0),
        'contradiction': dict(cbase=64),
        'other arch': dict(arch='ddpmpp'),
        'other precond': dict(precond='vp'),
        'augment': dict(augment=0.1),
        'student as teacher': dict(teacher=uninterrupted / 'network-snapshot-000000-640.pkl'),
        'levels': dict(consistency=None, teacher=None, cres='1,1,1,1,1'),
        'unwritable': dict(outdir=flat / 'sub'),
        'no reference': dict(
            val=1, val_ref=tmp_path / 'none.npz', val_detector=rulers / 'pca.pt', duration=0.0001, batch=64
        ),
        'wrong reference': dict(
            val=1,
            val_ref=reference_of(tmp_path, 7),
            val_detector=rulers / 'pca.pt',
            duration=0.0001,
            batch=64,
        ),
        'label': dict(
            val=1,
            val_ref=rulers / 'pca.npz',
            val_detector=rulers / 'pca.pt',
            val_label='fixed:99',
            duration=0.0001,
            batch=64,
        ),
        'no resume': dict(resume=tmp_path / 'state.pt'),
        'other run': dict(
            resume=max(uninterrupted.glob('training-state-*.pt')),
            S=4,
            batch=64,
            phema=0.1,
            dropout=0,
            T_anneal_kimg=0.32,
        ),
        'no network': dict(consistency=None, teacher=None, cbase=14),
        'no levels': dict(consistency=None, teacher=None, cres='none'),
    }[case]
    options = {name: value for name, value in (base | changes).items() if value is not None}
    result = invoke(*(f'--{name}={value}' for name, value in options.items()))
    assert_one_clear_error(result, *words)
    assert not (tmp_path / 'canary').exists()


def reference_of(tmp_path, dim):
    import numpy as np

    path = tmp_path / 'ref.npz'
    np.savez(path, mu=np.zeros(dim), sigma=np.eye(dim))
    return path


def unlabeled(tmp_path: Path):
    from PIL import Image

    folder = tmp_path / 'plain'
    folder.mkdir()
    Image.new('L', (8, 8)).save(folder / 'a.png')
    return folder


def test_a_teacher_of_another_resolution_is_named_with_the_cure(tmp_path, teacher):
    run(
        'dataset_tool.py',
        '--source=digits',
        f'--dest={tmp_path / "big.zip"}',
        '--resolution=16x16',
        '--transform=center-crop',
        '--max-images=20',
    )
    result = invoke(
        f'--outdir={tmp_path}',
        f'--data={tmp_path / "big.zip"}',
        '--cond=1',
        '--consistency=True',
        f'--teacher={teacher}',
    )
    assert_one_clear_error(result, 'expects images of 8x8x1 with 10 classes', '16x16x1', '--resolution=8x8')
