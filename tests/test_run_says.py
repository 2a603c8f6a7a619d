"""What a run says of itself: defaults of short runs, warnings about schedules, the tick line, its end, pictures of snapshots."""

import json
import re

import numpy as np
import pytest
import torch
from helpers import FAST, TINY_NETWORK, invoke, lines, run, torchrun
from PIL import Image

import train
from dnnlib import EasyDict
from experiments import comparison
from experiments.bundled import DIGITS
from sampling import generation
from training import announcements
from training.checkpoint import load_network
from training.objectives import OBJECTIVES
from training.run_files import saved_snapshots
from training.tick_stats import Clock, tick_line

SHORT = [
    '--cond=1',
    *TINY_NETWORK,
    *[word for word in FAST if 'sample_grid' not in word],
    '--batch=64',
    '--tick=0.128',
]


def dry_run(data, *options):
    result = invoke(train.main, '--outdir=runs', f'--data={data}', *options, '--dry-run')
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), result.stderr


# ----------------------------------------------------------------------------
# Defaults that are shares of the run.


@pytest.mark.parametrize('objective', [name for name, known in OBJECTIVES.items() if not known.teacher])
@pytest.mark.parametrize('share', [0.1, 1, 1.5])
def test_a_shorter_run_has_the_same_shares_and_a_longer_one_the_same_numbers(digits, objective, share):
    usual = OBJECTIVES[objective].defaults
    duration = usual['duration'] * share
    c, said = dry_run(digits, f'--objective={objective}', *TINY_NETWORK, f'--duration={duration!r}')
    factor = min(duration / usual['duration'], 1)
    assert c['ema_halflife_nimg'] == pytest.approx(usual['ema'] * factor, rel=1e-12)
    assert c['lr_rampup_nimg'] == pytest.approx(usual['lr_rampup'] * 1e3 * factor, rel=1e-12)
    assert share < 1 or (c['ema_halflife_nimg'], c['lr_rampup_nimg']) == (
        usual['ema'],
        usual['lr_rampup'] * 1e3,
    )
    assert 'T_anneal_kimg' not in c['loss'] or c['loss']['T_anneal_kimg'] == pytest.approx(duration * 1e3 / 2)
    assert said == ''


def test_the_decay_of_edm2_begins_after_as_many_steps_in_any_run(digits):
    """A share of a short run would decay from the first steps on, when the run has learned nothing."""
    c, _ = dry_run(digits, '--arch=edm2', '--cres=1,2', '--num_blocks=1', '--duration=0.001')
    assert c['lr_ref_nimg'] == 35_000 * 2048


def test_what_is_given_is_never_scaled(digits):
    c, _ = dry_run(digits, *TINY_NETWORK, '--duration=1', '--ema=0.5', '--lr_rampup=100')
    assert (c['ema_halflife_nimg'], c['lr_rampup_nimg']) == (0.5e6, 1e5)


def test_a_resumed_run_keeps_its_numbers_with_another_duration(tmp_path, digits):
    data = [
        f'--outdir={tmp_path}',
        f'--data={digits}',
        *SHORT[:-1],
        '--tick=1',
        '--objective=mct',
        '--S=2',
        '--T_end=64',
    ]
    data = [word for word in data if 'lr_rampup' not in word]
    assert invoke(train.main, *data, '--duration=0.000128', '--sample_grid=0').exit_code == 0
    first = json.loads((tmp_path / 'training_options.json').read_text())
    assert first['lr_rampup_nimg'] == pytest.approx(1e7 * 0.000128 / 210)
    again, _ = dry_run(digits, *data[2:], f'--resume={tmp_path}', '--duration=21')
    assert again['total_nimg'] == 21_000_000
    for name in ('lr_rampup_nimg', 'ema_halflife_nimg', 'lr_ref_nimg'):
        assert again[name] == pytest.approx(first[name], rel=1e-12), name
    assert again['loss']['T_anneal_kimg'] == first['loss']['T_anneal_kimg'] == pytest.approx(0.064)


# ----------------------------------------------------------------------------
# Warnings.


def warned(**changes):
    """The warnings about a run like the published one, with changes."""
    loss = EasyDict(S=8, T_start=64, T_end=1280, T_anneal_kimg=104_800)
    c = EasyDict(
        batch_size=2048,
        total_nimg=210_000_000,
        lr_rampup_nimg=10e6,
        ema_halflife_nimg=50e6,
        ema_rampup_ratio=0.05,
    )
    loss |= {
        name: changes.pop(name)
        for name in list(changes)
        if name in (*loss, 's0', 's1', 'N', 'schedule_nimg', 'terminal_anchor')
    }
    c |= changes
    c['loss'] = EasyDict(loss)
    return announcements.schedule_warnings(EasyDict(c))


@pytest.mark.parametrize(
    'changes, words',
    [
        (dict(), []),
        (dict(total_nimg=10_000_001), ['T is', 'half-life']),
        (dict(total_nimg=10_000_000), ['learning rate is still rising', 'T is', 'half-life']),
        (dict(T_anneal_kimg=0), []),
        (dict(T_start=1280), []),
        (dict(T_anneal_kimg=2_400), ['T rises from 64 to 1280 in 1,172 steps']),  # 1,216 are needed
        (dict(T_anneal_kimg=2_500), []),
        (dict(T_anneal_kimg=2_500, S=2), ['about 4,864 to follow']),
        (dict(T_anneal_kimg=2_500, S=1), ['about 9,728 to follow']),
        (dict(T_anneal_kimg=2_500, S=1, terminal_anchor=True), []),
        (dict(s0=2, s1=150, schedule_nimg=102_540 * 2048), []),  # the last step goes so far
        (dict(s0=2, s1=150, schedule_nimg=300_000_000), ['has not grown to --s1=150']),
        (dict(s0=2, s1=150, schedule_nimg=300_000_000, N=18), []),
        (dict(ema_halflife_nimg=50e3), ['averages next to nothing']),  # the README's `kimg`
        (dict(ema_halflife_nimg=1e9), ['--ema_rampup=0.05 alone limits it, to 1.05e+04 kimg']),
        (dict(ema_rampup_ratio=None), ['5% of the average will still be']),  # 2^-4.2
        (dict(ema_rampup_ratio=None, ema_halflife_nimg=30e6), []),  # 2^-7
        (dict(ema_rampup_ratio=5.0), ['2% of the average will still be']),
    ],
)
def test_each_warning_is_one_line_where_it_applies_and_nowhere_else(changes, words):
    said = warned(**changes)
    assert len(said) == len(words) and all(word in line for line, word in zip(said, words)), said
    assert all(line.startswith('Warning: ') and '\n' not in line for line in said)


@pytest.mark.parametrize('ratio, halflife', [(None, 500.0), (0.5, 500.0), (2.0, 1e9), (0.05, 300.0)])
def test_the_share_of_the_beginning_is_the_product_of_the_decays(ratio, halflife):
    """Of 1000 steps of one image, by `WeightAverages.decays`; the ramp's sum over steps is an integral up to 1 / (2 ratio) in its exponent."""
    share = 1.0
    for n in range(1000):
        share *= (
            0.5 ** (1 / max(halflife if ratio is None else min(halflife, n * ratio), 1e-8))
            if n or ratio is None
            else 1
        )
    exact = announcements.initial_share(halflife, ratio, 1000, 1)
    assert (
        share == pytest.approx(exact, rel=1e-12)
        if ratio is None
        else share < exact < share * 2 ** (0.6 / ratio)
    )


def test_a_run_whose_last_step_is_its_first_is_not_warned_of_its_average():
    assert announcements.initial_share(1.0, 0.05, 64, 64) == 0


@pytest.mark.parametrize(
    'objective', ['teacher', *(name for name, known in OBJECTIVES.items() if known.loss and name != 'tcm')]
)
def test_the_digits_are_warned_of_where_too_many_edges_cost_quality(digits, teacher, objective):
    """compare.py's trainings. mct has the default edges: of 8 steps it is as good as the teacher, below it is not (docs/results.md)."""
    if objective == 'teacher':
        trainings = [comparison.teacher_training(DIGITS)]
    else:
        steps = [1, 2, 4, 8] if objective == 'mct' else [1, 8]
        request = comparison.Request(
            [objective], steps, [0], 10_000, DIGITS.batch, True, DIGITS.network, recipe=True
        )
        trainings = dict.fromkeys(model.training for model in comparison.plan(request))
    warned_of = []
    for training in trainings:
        start = [f'{training.start}={teacher}'] if OBJECTIVES[training.objective].teacher else []
        _, said = dry_run(digits, *training.options, *start)
        warned_of += [training.name] * said.count('T rises from 64 to 1280')
        assert said.count('Warning') == said.count('T rises from 64 to 1280'), said
    assert warned_of == ([f'mct-{S}-seed0' for S in (1, 2, 4)] if objective == 'mct' else [])


def test_a_short_run_of_the_defaults_says_that_its_edges_are_too_many(digits):
    _, said = dry_run(digits, *TINY_NETWORK, '--objective=mct', '--duration=0.003')
    assert said.count('Warning') == 1 and 'T rises from 64 to 1280' in said and 'Lower --T_end' in said


# ----------------------------------------------------------------------------
# Lines.


@pytest.mark.parametrize(
    'values',
    [
        dict(
            tick=99999,
            kimg=2147483.6,
            lr=3.84e-10,
            halflife=0.0123,
            total=86400 * 99.9,
            speed=0.01234,
            wait=1,
            loss=-1.234e-5,
        ),
        dict(
            tick=0,
            kimg=12345.678,
            lr=0.000384,
            halflife=50_000,
            total=59.6,
            speed=99960,
            wait=0.5,
            loss=float('nan'),
        ),
        dict(tick=12, kimg=99999.94, lr=0, halflife=999.6, total=0, speed=0, wait=0, loss=1.23e22),
    ],
)
def test_the_line_of_a_tick_fits_100_columns(values):
    stats = {
        'Progress/tick': values['tick'],
        'Progress/kimg': values['kimg'],
        'Progress/lr': values['lr'],
        'Progress/ema_halflife_kimg': values['halflife'],
        'Timing/total_sec': values['total'],
        'Timing/images_per_sec': values['speed'],
        'Timing/data_wait_share': values['wait'],
        'Loss/cd': values['loss'],
    }
    text = tick_line({name: dict(mean=value) for name, value in stats.items()}, 'Loss/cd', 86400 * 99.9)
    assert len(text) <= 100, (len(text), text)
    names = ['tick', 'kimg', 'loss', 'lr', 'ema', 'time', 'img/s', 'data', 'ETA']
    assert re.findall(r'[A-Za-z/]+(?= +[-0-9n])', text) == names
    without = tick_line({name: dict(mean=value) for name, value in stats.items()}, 'Loss/cd', None)
    assert 'ETA' not in without


def test_the_estimate_is_of_the_pace_after_the_first_tick_and_never_negative():
    clock = Clock(start=0.0, tick_start=0.0, maintenance=0.0)
    assert clock.remaining(50.0, 64, 1000) is None
    clock.steady = (100.0, 64)
    assert clock.remaining(100.0, 64, 1000) is None
    assert clock.remaining(110.0, 164, 1164) == pytest.approx(100.0)
    assert clock.remaining(110.0, 1200, 1164) == 0


# ----------------------------------------------------------------------------
# A run from its start to its end.


TOLD = [
    *SHORT,
    '--duration=0.000256',
    '--snap=1',
    '--dump=1',
    '--lr_rampup=1',
    '--tensorboard=1',
    '--shard=optimizer',
    '--cache=False',
]


@pytest.fixture(scope='module')
def told(digits, tmp_path_factory):
    """A run of four steps that keeps its pictures: its folder, and its output."""
    folder = tmp_path_factory.mktemp('told')
    done = run('train.py', f'--outdir={folder}', f'--data={digits}', *TOLD)
    return folder, done


def test_the_start_names_folder_and_device_and_the_end_the_snapshot(told):
    folder, done = told
    said = done.stdout.splitlines()
    assert said[0] == f'Output folder: {folder}' and said[1].startswith('Device: CPU, ')
    newest = saved_snapshots(folder)[0]
    assert said[-3:-1] == [
        f'Last snapshot: {newest}',
        f'Sample from it: python generate.py --network={newest} --outdir=samples --seeds=0-63',
    ]
    ticks = [line for line in said if line.startswith('tick')]
    assert ['ETA' in line for line in ticks] == [False, True, True] and max(map(len, ticks)) <= 100


def test_warnings_are_on_stderr_and_in_the_log(told):
    folder, done = told
    warnings = [line for line in (folder / 'log.txt').read_text().splitlines() if line.startswith('Warning')]
    assert warnings == [line for line in done.stderr.splitlines() if line.startswith('Warning')]
    assert len(warnings) == 1 and 'learning rate is still rising' in warnings[0]


def test_a_dry_run_warns_of_all_that_the_run_warns_of(told, digits):
    """One option without effect, one about the data, one about the schedule."""
    folder, _ = told
    logged = [
        line for line in (folder / 'log.txt').read_text().splitlines() if re.match('Warning|Note', line)
    ]
    result = invoke(train.main, '--outdir=runs', f'--data={digits}', *TOLD, '--dry-run')
    assert result.stderr.splitlines() == logged and len(logged) == 3


def test_every_snapshot_has_the_picture_that_generate_makes_of_it(told):
    """64 images of seeds 0 to 63 in eight columns, four times their size."""
    folder, _ = told
    snapshots = saved_snapshots(folder)
    pictures = sorted(folder.glob('samples-*.png'))
    assert len(snapshots) == len(pictures) == 3
    for path in snapshots:
        picture = np.asarray(
            Image.open(path.with_name(path.name.replace('network-snapshot', 'samples')).with_suffix('.png'))
        )
        images = generation.generate_batch(load_network(path), range(64))
        grid = generation.image_grid(images, 8)[0].numpy()
        assert np.abs(picture[::4, ::4].astype(int) - grid).max() <= 1 and picture.shape == (256, 256)


def test_tensorboard_has_the_pictures(told):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(told[0])).Reload()
    steps = [each.step for each in events.Images('Samples/snapshot')]
    assert steps == [line['Progress/nimg']['mean'] for line in lines(told[0] / 'stats.jsonl')]


def test_pictures_do_not_change_what_is_trained_and_can_be_left_out(told, digits, tmp_path):
    folder, _ = told
    options = [f'--data={digits}', *SHORT, '--duration=0.000256', '--snap=1', '--lr_rampup=1']
    assert invoke(train.main, f'--outdir={tmp_path}', *options, '--sample_grid=0').exit_code == 0
    assert not list(tmp_path.glob('samples-*'))
    nets = [load_network(saved_snapshots(place)[0]).state_dict() for place in (folder, tmp_path)]
    assert all(torch.equal(a, b) for a, b in zip(*map(dict.values, nets)))


def test_a_number_that_is_no_square_leaves_black_places(digits, tmp_path):
    options = [f'--outdir={tmp_path}', f'--data={digits}', *SHORT, '--duration=0.000064', '--sample_grid=7']
    assert invoke(train.main, *options).exit_code == 0
    picture = np.asarray(Image.open(next(tmp_path.glob('samples-*.png'))))
    side = picture.shape[0] // 3
    assert (
        picture.shape == (3 * side, 3 * side)
        and not picture[2 * side :, side:].any()
        and picture[: 2 * side].any()
    )


@pytest.mark.parametrize('processes', [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_prints_no_warnings_of_pytorch(digits, tmp_path, processes):
    """Neither Python's, by the file that they are in, nor those of C++ and of the tracer."""
    options = [f'--outdir={tmp_path}', f'--data={digits}', *SHORT, '--duration=0.00064', '--sample_grid=4']
    done = torchrun(processes, 'train.py', *options, '--profile=2', env=dict(PYTHONWARNINGS='default'))
    assert 'Profile of 2 steps' in done.stdout
    assert not [line for line in done.stderr.splitlines() if re.search(r'/torch/|USDT|STAGE|\[W\d', line)]
