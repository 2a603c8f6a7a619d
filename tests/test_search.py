"""search.py and the search of time points behind it."""

import json
import math
import os
import shlex
import tempfile

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import assert_one_clear_error, lines, run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

import fid
import generate
import search
from dnnlib import UserError
from experiments.search_log import SearchLog
from metrics import time_points
from metrics.measures import MEASURES
from sampling.time_search import find_points, least, log_levels, most_evaluations
from training import networks, samplers
from training.checkpoint import load_network, save_snapshot
from training.consistency_ops import karras_sigmas

# ----------------------------------------------------------------------------
# The search.

steps_down = st.lists(st.integers(1, 1000), max_size=120)


class Recorded:
    """A function that remembers what it was asked."""

    def __init__(self, function):
        self.function, self.asked = function, []

    def __call__(self, x):
        self.asked.append(x)
        return self.function(x)


@settings(deadline=None, derandomize=True)
@given(steps_down, steps_down, st.integers(0, 20))
def test_the_least_of_a_single_valley_is_found_exactly(falling, rising, scan):
    """Sequences that fall strictly, then rise strictly; either part may be missing.

    Nothing is asked twice, and no more than was announced.
    """
    values = [*np.cumsum(falling[::-1])[::-1].tolist(), 0, *np.cumsum(rising).tolist()]
    function = Recorded(values.__getitem__)
    assert least(function, len(values), scan) == (len(falling), 0)
    assert len(set(function.asked)) == len(function.asked) <= most_evaluations(len(values), scan=scan)


@pytest.mark.parametrize(
    'count, evaluations', [(1, 1), (2, 2), (3, 3), (4, 3), (7, 4), (12, 5), (38, 8), (54, 8), (216, 11)]
)
def test_the_number_of_evaluations_is_kiefers(count, evaluations):
    """k evaluations find the least of F − 1 for F = 2, 3, 5, 8, 13, ..., and some place of the least needs
    them all. Thirds would take two a step: of 216 levels, between which a tolerance of 5 % divides 0.002 to
    80, 11 evaluations instead of about 26."""
    assert most_evaluations(count) == evaluations
    asked = []
    for place in range(count):
        function = Recorded(lambda i, place=place: abs(i - place))
        assert least(function, count) == (place, 0)
        asked.append(len(function.asked))
    assert max(asked) == evaluations


@pytest.mark.parametrize('scan', [1, 2, 3, 5, 8])
def test_no_valley_needs_more_than_is_announced_after_a_scan_and_some_need_all(scan):
    """Wherever the least of up to 64 places lies.

    Where a first look takes part in the search after it, one fewer may do.
    """
    spare = []
    for count in range(1, 65):
        worst = 0
        for place in range(count):
            function = Recorded(lambda i, place=place: abs(i - place))
            assert least(function, count, scan) == (place, 0)
            worst = max(worst, len(function.asked))
        spare.append(most_evaluations(count, scan=scan) - worst)
    assert set(spare) == {0, 1} and spare.count(0) > 32


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(0, 20))
def test_of_a_function_with_many_valleys_it_is_the_least_that_was_seen(values, scan):
    """And no more of them was seen than was announced."""
    function = Recorded(values.__getitem__)
    place, value = least(function, len(values), scan)
    assert len(function.asked) <= most_evaluations(len(values), scan=scan)
    assert value == values[place] == min(values[i] for i in function.asked)
    assert place == min(i for i in function.asked if values[i] == value)


def test_a_scan_finds_a_valley_beyond_a_plateau():
    """A level near either end hardly changes the metric; there is a valley at place 30 of 217, and a hump
    about place 110. Of the two points that a plain search begins with, the one beyond the hump wins, and the
    valley is lost. Of eight first looks, 24 places from each other, one sees it."""
    metric = lambda i: (
        1 - i / 1e6 + 2 * math.exp(-(((i - 110) / 20) ** 2)) - math.exp(-(((i - 30) / 12) ** 2))
    )
    assert least(metric, 217)[1] > 0.9 and least(metric, 217, scan=8) == (30, metric(30))
    assert most_evaluations(217, scan=8) == 8 + 8  # between two neighbors of a place there are 48 others


@settings(deadline=None, derandomize=True)
@given(
    st.floats(-7, 0),
    st.floats(0.5, 11),
    st.floats(0, 1),
    st.sampled_from([0.001, 0.01, 0.05, 0.3]),
    st.sampled_from([0.5, 1, 2]),
)
def test_the_minimum_over_sigma_is_found_to_the_tolerance(log_low, width, share, tolerance, power):
    """f = |ln sigma − c|^p with c anywhere between the ends: the level found is next to c, with a millionth
    for six digits. Candidates fall, lie between the ends, and have no wider gap."""
    low, high, center = math.exp(log_low), math.exp(log_low + width), log_low + share * width
    levels = log_levels(low, high, tolerance)
    assert all(1 < a / b <= (1 + tolerance) * (1 + 1e-5) for a, b in zip([high, *levels], [*levels, low]))
    (((tau,), _),) = find_points(lambda taus: abs(math.log(taus[0]) - center) ** power, levels, 1)
    assert abs(math.log(tau) - center) <= math.log1p(tolerance) + 1e-5


@settings(deadline=None, derandomize=True)
@given(
    st.integers(1, 4),
    st.integers(0, 60),
    st.lists(st.floats(0, 60), min_size=4, max_size=4),
    st.integers(0, 9),
)
def test_points_are_found_one_after_another_each_below_the_last(points, spare, wanted, scan):
    """A sum of parabolas, one for each place in the list: the search of point k asks about lists of k with
    the first k − 1 as found; it takes the least that is left to it, which has room for the points to come."""
    candidates = [float(i) for i in reversed(range(points + spare))]
    function = Recorded(lambda taus: sum((tau - target) ** 2 for tau, target in zip(taus, wanted)))
    found = list(find_points(function, candidates, points, scan))
    assert [len(taus) for taus, _ in found] == list(range(1, points + 1))
    lengths = [len(taus) for taus in function.asked]
    assert lengths == sorted(lengths) and len({tuple(taus) for taus in function.asked}) == len(lengths)
    assert len(lengths) <= most_evaluations(len(candidates), points, scan)
    above = []
    for taus, value in found:
        assert taus[:-1] == above and value == function.function(taus)
        assert all(asked[:-1] == above for asked in function.asked if len(asked) == len(taus))
        room = [tau for tau in candidates if points - len(taus) <= tau and (not above or tau < above[-1])]
        assert taus[-1] in room and value <= min(function.function([*above, tau]) for tau in room) + 1e-9
        above = taus


# ----------------------------------------------------------------------------
# The command line.


class Moments(torch.nn.Module):
    """Gray levels of three pixels, and two classes by the first, in the manner of NVIDIA's Inception."""

    def forward(self, images, return_features: bool = False):
        features = images[:, 0, 1, 1:4].float() / 255
        return features if return_features else torch.stack([features[:, 0], 1 - features[:, 0]], dim=1)


class Blind(torch.nn.Module):
    """Features that are no numbers."""

    def forward(self, images):
        return images[:, 0, 1, 1:4].float() * float('nan')


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    """A folder with random networks of two classes (cm.pkl, a consistency model; teacher.pkl; student.pkl, of
    three steps; one.pkl, of one), detectors, images and their reference."""
    folder = tmp_path_factory.mktemp('lab')
    torch.manual_seed(0)
    net = networks.EDMPrecond(
        8, 1, 2, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[], dropout=0
    )
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # none is zero, not even what classes go through
    ends = dict(sigma_min=0.002, sigma_max=80.0)
    save_snapshot(
        folder / 'cm.pkl', net, objective='ect', solver='cm', sigmas=[80.0, 0.0], fid=7.5, nimg=1000, **ends
    )
    save_snapshot(folder / 'teacher.pkl', net, objective='diffusion')
    save_snapshot(folder / 'student.pkl', net, objective='mcd', S=3, sigmas=[80.0, 9.0, 1.0, 0.0], **ends)
    save_snapshot(folder / 'one.pkl', net, objective='mcd', S=1, sigmas=[80.0, 0.0], num_timesteps=7, **ends)
    torch.jit.script(Moments()).save(folder / 'moments.pt')
    torch.jit.script(Blind()).save(folder / 'blind.pt')
    rng = np.random.default_rng(0)
    np.save(folder / 'data.npy', rng.integers(90, 180, (50, 8, 8), dtype=np.uint8))
    np.save(folder / 'other.npy', rng.integers(90, 180, (50, 8, 8), dtype=np.uint8))
    made = CliRunner().invoke(
        fid.main,
        [
            'ref',
            f'--data={folder}/data.npy',
            f'--dest={folder}/ref.npz',
            f'--detector={folder}/moments.pt',
            '--features=50',
        ],
    )
    assert made.exit_code == 0, made.output
    return folder


@pytest.fixture
def counted(monkeypatch):
    """The points that were evaluated, as lists."""
    evaluated, evaluate = [], time_points.MetricOfPoints.__call__
    monkeypatch.setattr(
        time_points.MetricOfPoints,
        '__call__',
        lambda self, taus: evaluated.append(taus) or evaluate(self, taus),
    )
    return evaluated


def small(lab, log, network='cm.pkl'):
    """Options of a search that takes no time."""
    return [
        f'--network={lab}/{network}',
        f'--log={log}',
        '--num=12',
        '--batch=5',
        f'--detector={lab}/moments.pt',
        '--space=karras-index',
        '--timesteps=9',
        '--scan=0',
    ]


def run(lab, log, *more, network='cm.pkl'):
    """A small search; later options override its own."""
    ref = [] if '--metric=is' in more else [f'--ref={lab}/ref.npz']
    return CliRunner().invoke(search.main, [*small(lab, log, network), *ref, *map(str, more)])


def evaluations(log):
    """Records of a log without its first line and without what differs from run to run."""
    return [{name: value for name, value in record.items() if name != 'seconds'} for record in lines(log)[1:]]


def test_every_value_is_that_of_fid_py_for_the_points_of_its_line(lab, tmp_path):
    """The one that was found too, by the options as they are printed, in generate.py's and fid.py's words.
    Candidates are the Karras levels that `--ts` counts; of 7 of them 4 evaluations find the least, after one
    of a single step."""
    result = run(lab, tmp_path / 'log.jsonl', f'--json={tmp_path}/found.json')
    assert result.exit_code == 0, result.output
    records, found = evaluations(tmp_path / 'log.jsonl'), json.loads((tmp_path / 'found.json').read_text())
    levels = karras_sigmas(9, 0.002, 80.0, 7.0)[1:-1].tolist()
    assert 4 <= len(records) == found['evaluations'] <= 5 and all(
        record['metric'] == 'fid' for record in records
    )
    assert records[0]['taus'] == [] and all(record['taus'][0] in levels for record in records[1:])
    best = min(records[1:], key=lambda record: record['value'])
    assert found['by_steps'] == [
        dict(steps=1, taus=[], value=records[0]['value']),
        dict(steps=2, taus=best['taus'], value=best['value']),
    ]
    assert (found['taus'], found['value'], found['sigmas']) == (
        best['taus'],
        best['value'],
        [80.0, *best['taus'], 0.0],
    )
    (line,) = result.stdout.splitlines()
    for options, value in (
        (['--solver=cm', f'--taus={records[1]["taus"][0]!r}'], records[1]['value']),
        (shlex.split(line), best['value']),
    ):
        told = CliRunner().invoke(
            fid.main,
            [
                'calc',
                f'--network={lab}/cm.pkl',
                '--seeds=0-11',
                '--batch=5',
                f'--ref={lab}/ref.npz',
                f'--detector={lab}/moments.pt',
                *options,
            ],
        )
        assert float(told.stdout) == pytest.approx(value, rel=1e-9)
    assert 'at most 5 evaluations of 12 images' in result.stderr and f'2 steps: {line}, FID' in result.stderr


class Distances:
    """A metric of three points, best near 9, 0.8 and 0.1, instead of one of images."""

    name = title = 'fid'
    measure = MEASURES['fid']

    def __init__(self):
        self.asked = []

    def __call__(self, taus):
        self.asked.append(taus)
        return sum(abs(math.log(tau / best)) for tau, best in zip(taus, (9.0, 0.8, 0.1))) / 3 - len(
            taus
        )  # another step helps


def test_a_search_that_was_stopped_anywhere_ends_as_if_it_was_not(tmp_path, monkeypatch):
    """Cut after each line, in the middle of each, just before its end, and with all but its end: what is
    whole is not evaluated again, all the rest is, once and in the same order, and the log becomes the
    same."""
    monkeypatch.setattr(os, 'fsync', lambda descriptor: None)  # of a thousand lines
    levels = log_levels(0.002, 80.0, 0.2)
    plan = dict(
        points=3,
        highest=80.0,
        scan=2,
        evaluations_at_most=most_evaluations(len(levels), 3, 2),
        images_each=12,
    )

    def searched(path):
        evaluate = Distances()
        return time_points.search(
            evaluate, SearchLog(str(path), dict(metric='fid', num=12)), levels, plan
        ), evaluate.asked

    whole, all_points = searched(tmp_path / 'whole.jsonl')
    records, text = evaluations(tmp_path / 'whole.jsonl'), (tmp_path / 'whole.jsonl').read_bytes()
    assert [record['taus'] for record in records] == all_points and whole['evaluations'] == len(
        all_points
    ) > 15
    cut, ends = tmp_path / 'cut.jsonl', [i + 1 for i, byte in enumerate(text) if byte == ord('\n')]
    for kept, (start, end) in enumerate(zip([0, *ends], ends)):
        for length, lost in ((start, 0), (start + 1, 0), ((start + end) // 2, 0), (end - 2, 0), (end - 1, 1)):
            cut.write_bytes(text[:length])
            result, asked = searched(cut)
            assert result == whole and asked == all_points[max(kept - 1 + lost, 0) :], (kept, length)
            assert evaluations(cut) == records and cut.read_bytes().endswith(b'\n')
    assert searched(cut) == (whole, []) and cut.read_bytes().count(b'\n') == len(records) + 1


def test_a_command_that_was_stopped_goes_on_from_its_log(lab, tmp_path, counted):
    """Killed in the header, after the first line, and in the third: output and results are those of the whole
    search."""
    options, cut = ['--steps=3', f'--json={tmp_path}/found.json'], tmp_path / 'cut.jsonl'
    whole = run(lab, tmp_path / 'whole.jsonl', *options)
    text, found, all_points = (
        (tmp_path / 'whole.jsonl').read_bytes(),
        (tmp_path / 'found.json').read_bytes(),
        list(counted),
    )
    first, second, third, *_ = (i + 1 for i, byte in enumerate(text) if byte == ord('\n'))
    for length, known in ((first // 2, 0), (second, 1), ((second + third) // 2, 1)):
        cut.write_bytes(text[:length])
        counted.clear()
        resumed = run(lab, cut, *options)
        assert resumed.exit_code == 0 and resumed.stdout == whole.stdout and counted == all_points[known:], (
            resumed.output
        )
        assert (tmp_path / 'found.json').read_bytes() == found and evaluations(cut) == evaluations(
            tmp_path / 'whole.jsonl'
        )


def test_another_search_of_the_same_values_begins_with_those_that_are_known(lab, tmp_path, counted):
    """Three steps after two; a range that has some of them: the value of points does not depend on what else
    is searched."""
    log = tmp_path / 'log.jsonl'
    run(lab, log)
    first = [tuple(taus) for taus in counted]
    counted.clear()
    assert (
        run(lab, log, '--steps=3').exit_code == 0 and run(lab, log, '--low=0.05', '--high=60').exit_code == 0
    )
    again = [tuple(taus) for taus in counted]
    assert again and not set(first) & set(again) and len(set(again)) == len(again)


def test_a_search_without_the_clamp_measures_without_it_and_says_so(lab, tmp_path):
    """Its points as options, and the network that it saves, are sampled as it sampled; its values are
    fid.py's without the clamp, and no others."""
    options = [f'--save={tmp_path}/two.pkl', '--no_clip_denoised']
    result = run(lab, tmp_path / 'log.jsonl', *options)
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    assert (
        line.endswith(' --no_clip_denoised')
        and load_network(tmp_path / 'two.pkl').metadata['clip_denoised'] is False
    )
    best = min(evaluations(tmp_path / 'log.jsonl')[1:], key=lambda record: record['value'])
    measured = [f'--ref={lab}/ref.npz', f'--detector={lab}/moments.pt', '--seeds=0-11', '--batch=5']
    for network, sampling in ((f'{lab}/cm.pkl', shlex.split(line)), (f'{tmp_path}/two.pkl', [])):
        told = CliRunner().invoke(fid.main, ['calc', f'--network={network}', *measured, *sampling])
        assert float(told.stdout.split()[-1]) == pytest.approx(best['value'], rel=1e-6), told.output
    sampler = time_points.Sampler(load_network(lab / 'cm.pkl'), 'cm.pkl', None, clip_denoised=False)
    assert sampler.arguments([1.0])['clip_denoised'] is False
    assert 'another search' in run(lab, tmp_path / 'log.jsonl').stderr


def test_a_log_of_other_settings_is_refused_and_left_alone(lab, tmp_path, counted):
    log = tmp_path / 'log.jsonl'
    run(lab, log)
    counted.clear()
    before = log.read_bytes()
    for options, words in (
        ([f'--network={lab}/one.pkl'], ['network is']),
        (['--num=13'], ['num is 13, in the log 12']),
        (['--seed=1'], ['seed is 1, in the log 0']),
        (['--class=1'], ['class is 1, in the log null']),
        (['--no_clip_denoised'], ['clip_denoised is false, in the log null']),
        (['--metric=kid'], ['metric is "kid", in the log "fid"']),
        ([f'--ref={lab}/other.npy'], ['reference is']),
    ):
        assert_one_clear_error(run(lab, log, *options), 'log of another search', 'or another --log', *words)
    assert log.read_bytes() == before and counted == []
    header = lines(log)[0]['search']
    assert header.keys() == {'metric', 'num', 'seed', 'class', 'network', 'detector', 'reference'}


@pytest.mark.parametrize(
    'content, words',
    [
        ('notes\n', 'not a log of search.py'),
        ('notes', 'not a log of search.py'),
        ('{"kimg": 1}\n', 'not a log of search.py'),
        ('{"search": {}}\n', 'log of another search'),
        ('{"search": {}}\nrubbish\n', 'line 2 is not an evaluation'),
        ('{"search": {}}\n{"taus": [1.0], "value": null}\n', 'line 2 is not an evaluation'),
        ('{"search": {}}\n{"taus": ["1"], "value": 1}\n', 'line 2 is not an evaluation'),
        ('{"search": {}}\n{"taus": 1, "value": 1}\n{}\n', 'line 2'),
    ],
)
def test_a_file_that_is_no_log_is_refused_and_left_alone(lab, tmp_path, content, words):
    log = tmp_path / 'log.jsonl'
    log.write_text(content)
    assert_one_clear_error(run(lab, log), words, str(log))
    assert log.read_text() == content


def test_scores_are_made_large_and_distances_small(lab, tmp_path):
    """Over all candidates of a tiny space, where the search sees three of four values: of `is` the greatest
    of them, of `kid` the least."""
    for metric, best in (('is', max), ('kid', min)):
        log = tmp_path / f'{metric}.jsonl'
        result = run(lab, log, f'--metric={metric}', '--timesteps=6')
        assert result.exit_code == 0, result.output
        values = {tuple(record['taus']): record['value'] for record in evaluations(log)[1:]}
        assert len(set(values.values())) == len(values) >= 2
        assert result.stdout.strip() == time_points.as_options(best(values, key=values.get)), values


def test_every_metric_has_a_direction():
    """Distances, and scores between none and all."""
    smaller = {name for name, measure in MEASURES.items() if not measure.larger_is_better}
    assert smaller == {'fid', 'fid_inf', 'kid', 'fd_dinov2'}


def test_a_step_that_does_not_help_is_told(tmp_path, capsys):
    """The third makes this metric larger wherever it is; two and one do not."""

    class Worse(Distances):
        def __call__(self, taus):
            return super().__call__(taus) + 3 * (len(taus) == 2)

    plan = dict(points=2, highest=80.0, scan=0, evaluations_at_most=99, images_each=12)
    for metric, told in ((Distances, 0), (Worse, 1)):
        time_points.search(
            metric(),
            SearchLog(str(tmp_path / f'{told}.jsonl'), dict(metric='fid')),
            log_levels(0.002, 80.0, 0.2),
            plan,
        )
        assert capsys.readouterr().err.count('Warning: no better than 2 steps') == told


def test_the_copy_is_sampled_at_the_points_without_being_told(lab, tmp_path):
    """Its images are those of the options printed, and its weights and other metadata the network's; what was
    measured at other levels is gone."""
    result = run(lab, tmp_path / 'log.jsonl', '--steps=3', f'--save={tmp_path}/new/copy.pkl')
    assert result.exit_code == 0, result.output
    original, copy = load_network(lab / 'cm.pkl'), load_network(tmp_path / 'new' / 'copy.pkl')
    taus = [float(tau) for tau in result.stdout.strip().partition('--taus=')[2].split(',')]
    assert copy.metadata['sigmas'] == [80.0, *taus, 0.0] and samplers.resolve(copy, None, None) == ('cm', 3)
    assert original.metadata.keys() - copy.metadata.keys() == {'fid'} and (
        copy.metadata['nimg'],
        copy.metadata['objective'],
    ) == (1000, 'ect')
    assert all(torch.equal(a, b) for a, b in zip(original.parameters(), copy.parameters()))
    for name, options in (
        ('a', [f'--network={tmp_path}/new/copy.pkl']),
        ('b', [f'--network={lab}/cm.pkl', *shlex.split(result.stdout)]),
    ):
        CliRunner().invoke(generate.main, [*options, f'--outdir={tmp_path}/{name}', '--seeds=0-3'])
    names = [f'{seed:06d}.png' for seed in range(4)]
    assert [(tmp_path / 'a' / name).read_bytes() for name in names] == [
        (tmp_path / 'b' / name).read_bytes() for name in names
    ]


def test_a_students_only_step_makes_it_a_consistency_model(lab, tmp_path):
    """Candidates are what its own number of timesteps says. The copy is of two steps, and says so."""
    result = run(
        lab,
        tmp_path / 'log.jsonl',
        '--space=karras-index',
        '--timesteps=7',
        f'--save={tmp_path}/copy.pkl',
        network='one.pkl',
    )
    assert result.exit_code == 0 and 'of 5 noise levels' in result.stderr, result.output
    defaults = [
        f'--network={lab}/one.pkl',
        f'--ref={lab}/ref.npz',
        f'--detector={lab}/moments.pt',
        f'--log={tmp_path}/log.jsonl',
        '--space=karras-index',
        '--dry-run',
    ]
    assert json.loads(CliRunner().invoke(search.main, defaults).stdout)['candidates'] == 5
    metadata = load_network(tmp_path / 'copy.pkl').metadata
    assert (metadata['S'], len(metadata['sigmas']), metadata['solver']) == (2, 3, 'cm')


def test_the_class_and_the_seed_reach_the_images(lab, tmp_path):
    values = {}
    for i, options in enumerate(([], ['--seed=7'], ['--class=1'])):
        run(lab, tmp_path / f'{i}.jsonl', *options)
        values[tuple(options)] = evaluations(tmp_path / f'{i}.jsonl')[0]['value']
    assert len(set(values.values())) == 3


def test_two_processes_find_what_one_does(lab, tmp_path):
    """Under torchrun, 12 images in batches of 5: the same points, values equal to 1e-9, each line in the log
    once, one line on stdout."""
    alone = run(lab, tmp_path / 'alone.jsonl')
    done = run_ranks(
        2,
        'search.py',
        *small(lab, tmp_path / 'two.jsonl'),
        f'--ref={lab}/ref.npz',
        env={'CUDA_VISIBLE_DEVICES': ''},
    )
    assert done.stdout == alone.stdout
    one, two = evaluations(tmp_path / 'alone.jsonl'), evaluations(tmp_path / 'two.jsonl')
    assert [record['taus'] for record in one] == [record['taus'] for record in two]
    np.testing.assert_allclose(
        [record['value'] for record in two], [record['value'] for record in one], rtol=1e-9
    )
    assert lines(tmp_path / 'two.jsonl')[0] == lines(tmp_path / 'alone.jsonl')[0]


def test_a_dry_run_prints_the_plan_and_makes_nothing(lab, tmp_path):
    """Of 217 candidates between 80 and 0.002, two points, 8 + 8 evaluations each at most (see above), and one
    of a single step."""
    result = run(lab, tmp_path / 'new' / 'log.jsonl', '--space=log', '--timesteps=9', '--dry-run')
    assert_one_clear_error(result, '--timesteps is for --space=karras-index', status=2)
    arguments = [
        f'--network={lab}/cm.pkl',
        f'--ref={lab}/ref.npz',
        f'--detector={lab}/moments.pt',
        f'--log={tmp_path}/new/log.jsonl',
        '--steps=3',
        '-n',
    ]
    plan = json.loads(CliRunner().invoke(search.main, arguments).stdout)
    assert (
        plan['points'],
        plan['candidates'],
        plan['evaluations_at_most'],
        plan['images_each'],
        plan['nfe'],
    ) == (2, 217, 33, 50000, 3)
    assert (
        (plan['metric'], plan['highest']) == ('fid', 80.0)
        and 76 < plan['first'] < 80
        and 0.002 < plan['last'] < 0.0021
    )
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize(
    'options, words, status',
    [
        (['--metric=fid,kid'], ['more than one'], 2),
        (['--metric=fad'], ['is not one of fid'], 2),
        (['--tolerance=0.1'], ['--tolerance is for --space=log'], 2),
        (['--low=2', '--high=1'], ['--low is not below --high'], 2),
        (['--log=log.txt'], ['ends in .jsonl'], 2),
        (['--steps=1'], ['--steps'], 2),
        (['--metric=is', '--ref=x.npz'], ['is compares with nothing'], 2),
        (['--dinov2=x'], ['not used by fid'], 2),
        (['--save=@/cm.pkl'], ['--save', 'is the file that is read, and would be lost'], 1),
        (['--network=@/teacher.pkl'], ['objective diffusion', 'add --solver=cm', '--objective=ect'], 1),
        (['--network=@/student.pkl'], ['is a student of 3 steps'], 1),
        (['--network=@/student.pkl', '--solver=cm'], ['student of 3 steps'], 1),
        (['--network=@/none.pkl'], ['does not exist'], 1),
        (['--ref=@/none.npz'], ['does not exist'], 1),
        (['--class=2'], ['--class=2 does not exist'], 1),
        (['--steps=9'], ['7 noise levels', '9 steps need 8', '--timesteps'], 1),
        (['--low=100'], ['0 noise levels', 'widen --low'], 1),
        (['--detector=@/blind.pt'], ['made with detector moments'], 1),
        (['--detector=@/blind.pt', '--ref=@/data.npy', '--metric=kid'], ['NaN'], 1),
        (['--metric=is', '--detector=@/blind.pt'], ['has no classes'], 1),
        (['--metric=fid_inf', '--num=11'], ['11 images are too few'], 1),
    ],
)
def test_what_cannot_be_searched_is_told_with_its_cure(lab, tmp_path, options, words, status):
    options = [option.replace('@', str(lab)) for option in options]
    log = tmp_path / 'log.jsonl'
    assert_one_clear_error(run(lab, log, *options), *words, status=status)
    assert not log.exists() or evaluations(log) == []


def test_a_reference_that_is_missing_is_told(lab, tmp_path):
    arguments = [f'--network={lab}/cm.pkl', f'--log={tmp_path}/log.jsonl']
    assert_one_clear_error(
        CliRunner().invoke(search.main, arguments),
        '--ref is missing, and fid compares with a reference',
        status=2,
    )


def test_a_model_that_does_not_say_what_it_is_can_be_searched_all_the_same(lab, tmp_path):
    """As published ones in EDM's format do not."""
    assert run(lab, tmp_path / 'log.jsonl', '--solver=cm', network='teacher.pkl').exit_code == 0


def test_a_log_that_cannot_be_written_ends_the_search(tmp_path, monkeypatch):
    """A full disk; the file is left as it was."""

    def full(path, text):
        raise OSError(28, 'No space left on device')

    log = SearchLog(str(tmp_path / 'log.jsonl'), dict(metric='fid'))
    before = (tmp_path / 'log.jsonl').read_bytes()
    monkeypatch.setattr('training.run_log.append_lines', full)
    with pytest.raises(UserError, match=r'No space left.*the same command goes on'):
        log.value([1.0], lambda: 2.0)
    assert (tmp_path / 'log.jsonl').read_bytes() == before


def test_a_log_whose_folder_is_gone_speaks_of_the_folder(tmp_path):
    log = SearchLog(str(tmp_path / 'new.jsonl'), dict(metric='fid'))
    log.path = str(tmp_path / 'gone' / 'new.jsonl')
    with pytest.raises(
        UserError, match=r'No such file or directory. Make sure that its folder is there'
    ) as error:
        log.value([1.0], lambda: 2.0)
    assert 'space' not in str(error.value)


@pytest.mark.parametrize('option', ['log', 'save', 'json'])
def test_places_that_cannot_be_written_are_told_before_the_search(
    lab, tmp_path, counted, monkeypatch, option
):
    """A folder that is closed to writing, also to an administrator: of three files, each once."""
    closed, make = tmp_path / 'closed', tempfile.TemporaryFile

    def refuse(dir):
        if str(dir) == str(closed):
            raise PermissionError(13, 'Permission denied')
        return make(dir=dir)

    monkeypatch.setattr(tempfile, 'TemporaryFile', refuse)
    file = closed / dict(log='log.jsonl', save='copy.pkl', json='found.json')[option]
    assert_one_clear_error(
        run(lab, tmp_path / 'log.jsonl', f'--{option}={file}'),
        f'Cannot write to the folder {closed}: Permission denied',
        'another place',
    )
    assert counted == [] and not any(closed.iterdir())


def test_the_result_is_told_also_where_it_cannot_be_saved(lab, tmp_path, monkeypatch):
    """A disk that fills up during the search."""

    def full(*arguments):
        raise UserError('the disk is full')

    monkeypatch.setattr(search, 'write_json', full)
    result = run(lab, tmp_path / 'log.jsonl', f'--json={tmp_path}/found.json')
    assert_one_clear_error(result, 'the disk is full')
    assert result.stdout.startswith('--solver=cm --taus=')


def test_a_line_is_on_disk_before_the_next_evaluation_begins(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(
        os, 'fsync', lambda descriptor: synced.append((tmp_path / 'log.jsonl').read_bytes().count(b'\n'))
    )
    log = SearchLog(str(tmp_path / 'log.jsonl'), dict(metric='fid'))
    for k in range(2):
        assert log.value([2.0, 1.0 - k], lambda k=k: float(k)) == k and synced == list(range(1, k + 3))
