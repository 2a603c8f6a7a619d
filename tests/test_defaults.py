"""What --dry-run says where options are left out, for every objective on EDM's networks and on EDM2's, in pixels and latents; and what a resumed run
goes on with."""

import json
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import FAST, TINY_NETWORK, assert_one_clear_error
from latents import npy, random_latents

import train
from dnnlib import EasyDict
from training.announcements import schedule_warnings
from training.checkpoint import load_network, load_state, save_snapshot
from training.networks import edm2 as networks_edm2
from training.objectives import OBJECTIVES
from training.objectives import time_schedules as times
from training.run_files import saved_snapshots, saved_states

EDM2 = ['--arch=edm2', '--cres=1,2', '--num_blocks=1']
DIVIDED = dict(solver='cm', sigmas=[80.0, 0.0], objective='ect')  # metadata of a consistency model


def dry_run(*options):
    result = CliRunner().invoke(train.main, ['--outdir=runs', *map(str, options), '--dry-run'])
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout), result.stderr


def settings(c):
    """A run's settings as options have them."""
    kwargs = c['network']['kwargs']
    return dict(
        optim=c['optim'],
        lr=c['lr'],
        lr_rampup=c['lr_rampup_nimg'] / 1e3,
        lr_schedule=c['lr_schedule'],
        lr_decay=c['lr_ref_nimg'] / c['batch_size'] or None,
        beta2=c['betas'][1],
        duration=c['total_nimg'] / 1e6,
        batch=c['batch_size'],
        ema=c['ema_halflife_nimg'] / 1e6,
        ema_rampup=c['ema_rampup_ratio'] or 0,
        phema=c['phema_stds'],
        augment=c['augment'],
        dropout=kwargs['dropout'],
        dout_resolutions=kwargs.get('dout_resolutions'),
    )


@pytest.fixture(scope='module')
def teachers(teacher, tmp_path_factory):
    """Snapshots by (kind of network, what it is): diffusion or consistency model."""
    folder, made = tmp_path_factory.mktemp('teachers'), {}
    edm2 = networks_edm2.Precond(
        8, 1, 10, model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[], dropout=0.4
    )
    for kind, net in (('edm', load_network(teacher)), ('edm2', edm2)):
        for what, metadata in (('diffusion', dict(objective='diffusion')), ('consistency', DIVIDED)):
            path = folder / f'{kind}-{what}.pkl'
            save_snapshot(path, net, **metadata)
            made[kind, what] = path
    return made


# In the order of `settings`. What students get from the teacher of the tests: dropout 0 (edm) and 0.4 (edm2).
STUDENT = ['adam', 8e-5, 10_000, 'constant', None, 0.999, 210, 2048, 50, 0.05, [], 0]
EDM2_STUDENT = ['adam', 1e-3, 10_000, 'sqrt', 2000, 0.99, 210, 2048, 50, 0.05, [0.05, 0.1], 0]
SONG = ['radam', 4e-4, 0, 'constant', None, 0.999, 409.6, 512, 3.549, 0, [], 0]
EDM2_SONG = ['radam', 1e-3, 0, 'sqrt', 2000, 0.99, 409.6, 512, 3.549, 0, [0.05, 0.1], 0]
CONTINUOUS = ['adam', 1e-4, 0, 'constant', None, 0.99, 204.8, 512, 3.549, 0, [], 0]
TABLE = {
    ('diffusion', 'edm'): [
        'adam',
        1e-3,
        10_000,
        'constant',
        None,
        0.999,
        200,
        512,
        0.5,
        0.05,
        [],
        0.12,
        0.13,
        None,
    ],
    ('diffusion', 'edm2'): [
        'adam',
        0.01,
        10_000,
        'sqrt',
        35_000,
        0.99,
        2**30 / 1e6,
        2048,
        0.5,
        0.05,
        [0.05, 0.1],
        0,
        0,
        None,
    ],
    ('mcd', 'edm'): [*STUDENT, 0, None],
    ('mcd', 'edm2'): [*EDM2_STUDENT, 0.4, None],
    ('mct', 'edm'): [*STUDENT, 0, None],
    ('mct', 'edm2'): [*EDM2_STUDENT, 0, None],
    ('direct', 'edm'): [*STUDENT, 0, None],
    ('direct', 'edm2'): [*EDM2_STUDENT, 0.4, None],
    ('flowmap', 'edm'): [*STUDENT, 0, None],
    ('flowmap', 'edm2'): [*EDM2_STUDENT, 0.4, None],
    ('pd', 'edm'): ['adam', 2e-4, 0, 'linear', None, 0.999, 6.4, 128, 0.5, 0.05, [], 0, 0, None],
    ('pd', 'edm2'): ['adam', 1e-3, 0, 'sqrt', 2000, 0.99, 6.4, 128, 0.5, 0.05, [0.05, 0.1], 0, 0.4, None],
    ('cm-cd', 'edm'): [*SONG, 0, None],
    ('cm-cd', 'edm2'): [*EDM2_SONG, 0, None],
    ('cm-ct', 'edm'): [*SONG, 0, None],
    ('cm-ct', 'edm2'): [*EDM2_SONG, 0, None],
    ('ict', 'edm'): ['radam', 1e-4, 0, 'constant', None, 0.999, 409.6, 1024, 10.14, 0, [], 0, 0.3, None],
    ('ict', 'edm2'): ['radam', 1e-3, 0, 'sqrt', 2000, 0.99, 409.6, 1024, 10.14, 0, [0.05, 0.1], 0, 0.3, None],
    ('ect', 'edm'): ['radam', 1e-4, 0, 'constant', None, 0.999, 51.2, 128, 0.887, 0, [], 0, 0.2, None],
    ('ect', 'edm2'): [
        'adam',
        1e-3,
        0,
        'sqrt',
        2000,
        0.99,
        12.8,
        128,
        0.887,
        0,
        [0.01, 0.05, 0.1],
        0,
        0.4,
        [8, 4],
    ],
    ('tcm', 'edm'): ['radam', 5e-5, 0, 'constant', None, 0.999, 204.8, 1024, 7.097, 0, [], 0, 0, None],
    ('tcm', 'edm2'): ['adam', 5e-4, 0, 'sqrt', 8000, 0.99, 122.88, 1024, 7.097, 0, [0.05, 0.1], 0, 0.4, None],
    ('scd', 'edm'): [*CONTINUOUS, 0, None],
    ('sct', 'edm'): [*CONTINUOUS, 0.2, None],
    ('mm', 'edm'): ['adam', 2e-6, 2048, 'linear', None, 0.99, 409.6, 2048, 50, 0.05, [], 0, 0, None],
    ('mm', 'edm2'): ['adam', 2e-6, 2048, 'linear', None, 0.99, 409.6, 2048, 50, 0.05, [], 0, 0.4, None],
    ('sid', 'edm'): ['adam', 1e-5, 0, 'constant', None, 0.999, 100, 256, 0.5, 0.05, [], 0, 0, None],
    ('sid', 'edm2'): ['adam', 1e-5, 0, 'constant', None, 0.999, 100, 256, 0.5, 0.05, [], 0, 0.4, None],
}


def numbers_in(text):
    return [float(number) for number in re.findall(r'(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?', text)]


@pytest.mark.parametrize('objective, kind', TABLE)
def test_what_is_left_out_is_what_the_table_and_help_say(digits, teachers, objective, kind):
    """A number that a run is trained with stands among the defaults that --help names for its option, to the digits that it has there."""
    of = OBJECTIVES[objective]
    network = (
        [f'--teacher={teachers[kind, of.teacher]}']
        if of.teacher
        else EDM2
        if kind == 'edm2'
        else ['--cres=1,2']
    )
    c, said = dry_run(f'--data={digits}', '--cond=1', f'--objective={objective}', *network)
    got = settings(c)
    for name, expected in zip(got, TABLE[objective, kind], strict=True):
        assert got[name] == (
            pytest.approx(expected, rel=1e-9) if isinstance(expected, float) else expected
        ), name
    assert 'Warning' not in said
    for option in train.main.params:
        default, value = re.search(r'\[default: (.*)\]', option.help or ''), got.get(option.name)
        if (
            not default
            or value is None
            or option.name == 'dout_resolutions'
            or (objective, option.name) == ('pd', 'duration')
        ):
            continue
        known = numbers_in(default[1])
        for number in value if isinstance(value, list) else [] if isinstance(value, str) else [value]:
            of_teacher = option.name == 'dropout' and of.teacher
            assert of_teacher or any(
                abs(number / other - 1) < 1e-4 if other else number == 0 for other in known
            ), (option.name, number, default[1])
        assert not isinstance(value, str) or value in default[1], (option.name, value)


def test_every_objective_is_in_the_table():
    """Those that differentiate refuse EDM2's networks."""
    both = {(name, kind) for name in OBJECTIVES for kind in ('edm', 'edm2')}
    assert {*TABLE} == {
        (name, kind) for name, kind in both if kind == 'edm' or not OBJECTIVES[name].config().differentiates
    }


# ----------------------------------------------------------------------------
# EDM2's networks: sizes, pixels and latents.


@pytest.fixture(scope='module')
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp('latents')
    for i, latent in enumerate(random_latents(4)):
        (folder / f'img-mean-std-{i:08d}.npy').write_bytes(npy(latent))
    return folder


@pytest.mark.parametrize(
    'width, lr, dropout, mebi',
    [
        (128, 0.012, 0, 1024),
        (None, 0.01, 0, 1024),
        (192, 0.01, 0, 1024),
        (256, 0.009, 0.1, 2048),
        (320, 0.008, 0.1, 1024),
        (384, 0.007, 0.1, 640),
        (160, 0.012, 0, 1024),
        (16, 0.01, 0, 1024),
        (448, 0.007, 0.1, 640),
    ],
)
def test_a_teacher_of_pixels_has_the_preset_of_its_size_for_imagenet_64(digits, width, lr, dropout, mebi):
    """Karras et al. 2024's presets edm2-img64-*; a width between two sizes is the smaller one, below them all S."""
    c, _ = dry_run(f'--data={digits}', *EDM2, *([f'--cbase={width}'] if width else []))
    assert (c['loss']['P_mean'], c['loss']['P_std'], c['lr_ref_nimg']) == (-0.8, 1.6, 35_000 * 2048)
    assert (c['lr'], c['network']['kwargs']['dropout'], c['total_nimg']) == (lr, dropout, mebi << 20)


@pytest.mark.parametrize(
    'width, lr, dropout, mebi',
    [
        (128, 0.012, 0, 2048),
        (192, 0.01, 0, 2048),
        (256, 0.009, 0.1, 2048),
        (320, 0.008, 0.1, 1792),
        (384, 0.007, 0.1, 1280),
        (448, 0.0065, 0.1, 896),
    ],
)
def test_a_teacher_of_latents_has_that_for_imagenet_512(latents, width, lr, dropout, mebi):
    c, _ = dry_run(f'--data={latents}', '--arch=edm2', '--cres=1', '--num_blocks=1', f'--cbase={width}')
    assert (c['loss']['P_mean'], c['loss']['P_std'], c['lr_ref_nimg']) == (-0.4, 1.0, 70_000 * 2048)
    assert (c['lr'], c['network']['kwargs']['dropout'], c['total_nimg']) == (lr, dropout, mebi << 20)


def test_what_is_given_overrides_the_preset(digits):
    c, _ = dry_run(
        f'--data={digits}', *EDM2, '--P_mean=-0.4', '--lr_decay=70000', '--batch=256', '--dropout=0.2'
    )
    assert (c['loss']['P_mean'], c['loss']['P_std'], c['lr_ref_nimg'], c['network']['kwargs']['dropout']) == (
        -0.4,
        1.6,
        70_000 * 256,
        0.2,
    )


@pytest.mark.parametrize(
    'width, lr, dropout',
    [(192, 1e-3, 0.4), (256, 9e-4, 0.5), (320, 8e-4, 0.5), (384, 7e-4, 0.5), (128, 1e-3, 0.4)],
)
def test_consistency_tuning_has_ects_preset_of_the_size(digits, width, lr, dropout):
    """Geng et al. 2024's code for ImageNet-64: 12.8 Mimg in four stages of 3.2, weight 1/t² + 1/sigma_d², dropout up to 16x16."""
    c, _ = dry_run(f'--data={digits}', *EDM2, f'--cbase={width}', '--objective=ect')
    assert (c['lr'], c['network']['kwargs']['dropout'], c['network']['kwargs']['dout_resolutions']) == (
        lr,
        dropout,
        [8, 4],
    )
    assert (c['loss']['ect_weight'], c['loss']['stage_nimg'], c['total_nimg']) == (
        'karras',
        3_200_000,
        12_800_000,
    )
    assert c['phema_stds'] == [0.01, 0.05, 0.1]
    assert c['loss']['P_mean'] == -0.8 and c['loss']['c'] == 0.06 and c['lr_ref_nimg'] == 2000 * 128


def test_dropout_of_consistency_tuning_is_at_the_levels_up_to_16(tmp_path):
    """Of 64x64 images in four levels those of 16 and 8; of 48x48 in three that of 12."""
    import PIL.Image

    for side, levels, expected in ((64, '1,1,1,1', [16, 8]), (48, '1,1,1', [12])):
        folder = tmp_path / str(side)
        folder.mkdir()
        PIL.Image.fromarray(np.zeros([side, side, 3], np.uint8)).save(folder / '0.png')
        c, _ = dry_run(
            f'--data={folder}',
            '--arch=edm2',
            '--objective=ect',
            '--cbase=16',
            '--num_blocks=1',
            f'--cres={levels}',
        )
        assert c['network']['kwargs']['dout_resolutions'] == expected
        c, _ = dry_run(
            f'--data={folder}',
            '--arch=edm2',
            '--objective=ect',
            '--cbase=16',
            '--num_blocks=1',
            f'--cres={levels}',
            '--dout_resolutions=48,64',
        )
        assert c['network']['kwargs']['dout_resolutions'] == [48, 64]


# ----------------------------------------------------------------------------
# Stages of consistency tuning, and what precision resolves.


@pytest.mark.parametrize(
    'q, stages', [(2, 8), (4, 4), (3, 5), (1.5, 14), (10, 2), (16, 2), (256, 1), (1000, 1), (2.5, 6)]
)
def test_the_last_stage_has_a_gap_of_about_1_in_256_whatever_q_is(q, stages):
    """As near as a whole number of stages comes: within the root of q."""
    assert times.tuning_stages(q) == stages
    assert q == 1000 or q**-0.5 <= q**-stages * 256 <= q**0.5


@pytest.mark.parametrize(
    'q, kimg, batch',
    [
        (2, 51200, 128),
        (4, 12800, 128),
        (3, 99.7, 64),
        (1.5, 30, 256),
        (10, 12.8, 128),
        (4, 0.9, 128),
        (4, 0.001, 8),
    ],
)
def test_the_default_stages_are_all_that_a_run_goes_through(digits, q, kimg, batch):
    """Also where steps do not divide by stages: the last step is in the last stage, never in one beyond; a run of fewer steps has one a stage."""
    c, _ = dry_run(
        f'--data={digits}',
        *TINY_NETWORK,
        '--objective=ect',
        f'--q={q}',
        f'--duration={kimg / 1e3}',
        f'--batch={batch}',
    )
    steps, length = -(-c['total_nimg'] // batch), c['loss']['stage_nimg']
    last = times.tuning_stage((steps - 1) * batch, length)
    assert length % batch == 0 and last <= times.tuning_stages(q) - 1
    assert last == times.tuning_stages(q) - 1 or steps < 10 * times.tuning_stages(q)


def test_stages_that_are_given_stay_what_they_are(digits):
    c, _ = dry_run(f'--data={digits}', *EDM2, '--objective=ect', '--stage_steps=12500')
    assert c['loss']['stage_nimg'] == 12500 * 128


@pytest.mark.parametrize(
    'options, gap',
    [
        (
            ['--objective=ect', *EDM2, '--precision=bf16', '--stage_steps=12500'],
            '6.3e-05',
        ),  # eight stages of q = 4
        (['--objective=ect', *EDM2, '--precision=fp16', '--stage_steps=12500'], '6.3e-05'),
        (['--objective=ect', *EDM2, '--tf32', '--stage_steps=12500'], '6.3e-05'),
        (['--objective=ect', *TINY_NETWORK, '--precision=bf16', '--stage_steps=33334'], '1.1e-03'),
        (['--objective=ict', *TINY_NETWORK, '--precision=bf16', '--s1=8192'], '1.5e-03'),
        (['--objective=cm-ct', '--cm_loss=l2', *TINY_NETWORK, '--precision=bf16', '--s1=4096'], '2.2e-03'),
        (['--objective=mct', *TINY_NETWORK, '--precision=bf16', '--T_end=5120'], '2.4e-03'),
    ],
)
def test_pairs_closer_than_the_precision_are_warned_of(digits, options, gap):
    """The gap at the median time, 4^-8 (1 + 8 sigmoid(-e^-0.8)) = 6.3e-5 in the first line."""
    _, said = dry_run(f'--data={digits}', *options)
    (line,) = [line for line in said.splitlines() if '1 - r/t' in line]
    assert (
        f'1 - r/t = {gap}' in line and ('--tf32=False' if '--tf32' in options else '--precision=fp32') in line
    )


@pytest.mark.parametrize(
    'options',
    [
        ['--objective=ect', *EDM2, '--precision=bf16'],
        ['--objective=ect', *TINY_NETWORK, '--precision=bf16'],
        ['--objective=ect', *EDM2, '--stage_steps=12500'],
        ['--objective=ict', *TINY_NETWORK, '--precision=bf16'],
        ['--objective=mct', *TINY_NETWORK, '--precision=bf16'],
        ['--objective=cm-ct', '--cm_loss=lpips', *TINY_NETWORK, '--precision=fp16'],
        ['--precision=bf16', *TINY_NETWORK],
    ],
)
def test_pairs_that_the_precision_resolves_are_not_warned_of(digits, options):
    assert '1 - r/t' not in dry_run(f'--data={digits}', *options)[1]


@pytest.mark.parametrize('cap, warned', [(0.999, True), (0.9961, False)])
def test_truncated_training_is_warned_of_by_its_cap(digits, teachers, cap, warned):
    _, said = dry_run(
        f'--data={digits}',
        '--cond=1',
        '--objective=tcm',
        f'--teacher={teachers["edm", "consistency"]}',
        f'--ratio_cap={cap}',
        '--precision=bf16',
    )
    assert ('--ratio_cap' in said) == warned, said


# ----------------------------------------------------------------------------
# Runs that are resumed, and what they say.

SHORT = ['--cond=1', *FAST, '--batch=64', '--tick=0.32', '--dump=1', '--snap=1', *TINY_NETWORK]


def trained(folder, digits, *options):
    result = CliRunner().invoke(train.main, [f'--outdir={folder}', f'--data={digits}', *SHORT, *options])
    assert result.exit_code == 0, (result.output, result.exception)
    return load_network(saved_snapshots(folder)[0]), load_state(saved_states(folder)[0])


def test_a_resumed_run_keeps_its_rampup_whatever_the_default_has_become(tmp_path, digits):
    """As runs that were begun when 0.05 was the default of ect: resumed without the option they end bit for bit as one that was never stopped."""
    ect = ['--objective=ect', '--ema=1kimg', '--lr=2e-3', '--stage_steps=8']
    whole, _ = trained(tmp_path / 'whole', digits, *ect, '--ema_rampup=0.05', '--duration=0.00128')
    trained(tmp_path / 'half', digits, *ect, '--ema_rampup=0.05', '--duration=0.00064')
    resumed, state = trained(
        tmp_path / 'half', digits, *ect, '--duration=0.00128', f'--resume={tmp_path / "half"}'
    )
    assert json.loads(state['options'])['ema_rampup_ratio'] == 0.05
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))
    _, state = trained(
        tmp_path / 'half',
        digits,
        *ect,
        '--ema_rampup=0',
        '--duration=0.00192',
        f'--resume={tmp_path / "half"}',
    )
    assert json.loads(state['options'])['ema_rampup_ratio'] is None


def test_a_resumed_run_needs_none_of_the_options_that_have_defaults(tmp_path, digits):
    """Learning rate, decay, length, averages, batch, dropout, the loss's own: all are as they were, given or not when it began; and yet another
    objective's, or a contradiction, is refused."""
    given = [
        '--objective=ect',
        '--batch=32',
        '--lr=3e-3',
        '--lr_schedule=sqrt',
        '--lr_decay=7',
        '--beta2=0.98',
        '--ema=3kimg',
        '--optim=adam',
        '--phema=0.07',
        '--dropout=0.1',
        '--dout_resolutions=4',
        '--q=3',
        '--ect_weight=snr',
        '--P_mean=-0.5',
        '--duration=0.00064',
    ]
    _, state = trained(tmp_path, digits, *given)
    before = json.loads(state['options'])
    few = [
        '--outdir=x',
        f'--data={digits}',
        '--cond=1',
        '--objective=ect',
        *TINY_NETWORK[:-1],
        f'--resume={tmp_path}',
        '--dry-run',
    ]
    after = json.loads(CliRunner().invoke(train.main, few).stdout)
    skipped = {
        'resume',
        'run_dir',
        'kimg_per_tick',
        'snapshot_ticks',
        'phema_snapshot_ticks',
        'state_dump_ticks',
        'workers',
        'lr_rampup_nimg',
    }
    assert {name: before[name] for name in before if name not in skipped} == {
        name: after[name] for name in before if name not in skipped
    }
    assert after['lr_rampup_nimg'] == pytest.approx(before['lr_rampup_nimg'])
    assert_one_clear_error(CliRunner().invoke(train.main, [*few, '--batch=64']), 'batch 32 -> 64')


def test_an_average_that_mostly_is_its_beginning_is_warned_of(tmp_path, digits):
    """Half-lives of 1000 images without a limit over 1280 images: 2^-1.28 = 41 % remain of the first weights; with a limit of 5 % next to nothing."""
    trained(tmp_path / 'a', digits, '--objective=ect', '--ema=1kimg', '--duration=0.00128')
    assert '41% of the average will still be the weights' in (tmp_path / 'a' / 'log.txt').read_text()
    trained(
        tmp_path / 'b', digits, '--objective=ect', '--ema=1kimg', '--ema_rampup=0.05', '--duration=0.00128'
    )
    assert 'of the average will still be' not in (tmp_path / 'b' / 'log.txt').read_text()


@pytest.mark.parametrize('halflife, warned', [(6399, True), (6400, False)])
def test_a_half_life_of_fewer_than_a_hundred_steps_is_warned_of(halflife, warned):
    """In batches of 64 images a hundred steps are 6400, and less than 0.03 % of this run."""
    c = EasyDict(
        batch_size=64,
        total_nimg=100_000_000,
        lr_rampup_nimg=0,
        loss=EasyDict(),
        ema_halflife_nimg=halflife,
        ema_rampup_ratio=0.05,
    )
    assert any('averages next to nothing' in line for line in schedule_warnings(c)) is warned


def test_a_run_says_at_its_start_what_its_precision_does_not_resolve(tmp_path, digits):
    trained(
        tmp_path,
        digits,
        '--objective=ect',
        '--q=4',
        '--precision=bf16',
        '--stage_steps=1',
        '--duration=0.000512',
    )
    assert '1 - r/t = 6.6e-05' in (tmp_path / 'log.txt').read_text()


@pytest.mark.parametrize(
    'option, recorded', [('--no_clip_denoised', False), ('--clip_denoised', True), (None, None)]
)
def test_networks_record_whether_their_images_are_clamped(tmp_path, digits, option, recorded):
    net, _ = trained(
        tmp_path, digits, '--objective=ect', '--duration=0.000064', *([option] if option else [])
    )
    assert net.metadata.get('clip_denoised') is recorded
