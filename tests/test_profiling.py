"""training/profiling.py: what a trace of a run has, and that it changes nothing."""

import gzip
import json
from collections import Counter

import pytest
import torch
from helpers import FAST, lines, run

from training.profiling import WARM_UP, StepProfile


def trace(path):
    """How often each name is in a trace."""
    with gzip.open(path) as file:
        return Counter(event['name'] for event in json.load(file)['traceEvents'] if event.get('ph') == 'X')


def train_student(folder, digits, teacher, *options):
    run(
        'train.py',
        f'--outdir={folder}',
        f'--data={digits}',
        '--cond=1',
        '--consistency=True',
        f'--teacher={teacher}',
        '--S=2',
        *FAST,
        '--batch=32',
        '--duration=0.000256',
        '--tick=0.096',
        '--dump=0',
        '--ema=10kimg',
        '--T_start=8',
        '--T_end=8',
        '--anchor_hops=2',
        *options,
    )
    return folder


@pytest.fixture(scope='module')
def runs(tmp_path_factory, digits, teacher):
    """Eight steps, with and without a profile of three."""
    folder = tmp_path_factory.mktemp('profiles')
    return train_student(folder / 'plain', digits, teacher), train_student(
        folder / 'profiled', digits, teacher, '--profile=3'
    )


def test_a_trace_shows_the_parts_of_the_steps_by_name(runs):
    """Steps 3 to 5; a step asks the teacher more than once."""
    plain, profiled = runs
    (path,) = profiled.glob('profile-*')
    names = trace(path)
    assert {
        name: names[name] for name in ('data', 'gradients', 'optimizer', 'averages', 'student')
    } == dict.fromkeys(('data', 'gradients', 'optimizer', 'averages', 'student'), 3)
    assert names['teacher'] >= 3 and names['self-target'] <= 3
    assert (
        path.name == 'profile-000000.json.gz'
        and f'Profile of 3 steps: {path}' in (profiled / 'log.txt').read_text()
    )
    assert not list(plain.glob('*profile*')) and not list(profiled.glob('.profile*'))


def test_profiling_changes_no_number(runs):
    timeless = [
        [
            {
                name: value
                for name, value in line.items()
                if not name.startswith(('Timing', 'Resources', 'timestamp'))
            }
            for line in lines(folder / 'stats.jsonl')
        ]
        for folder in runs
    ]
    assert len(timeless[0]) > 1 and timeless[0] == timeless[1]


def test_the_share_of_time_that_data_are_waited_for_is_told_every_tick(runs):
    for folder in runs:
        shares = [line['Timing/data_wait_share']['mean'] for line in lines(folder / 'stats.jsonl')]
        assert all(0 < share < 1 for share in shares)
        assert all(
            f'data {min(share, 0.99):.0%}' in line
            for share, line in zip(
                shares,
                (line for line in (folder / 'log.txt').read_text().splitlines() if line.startswith('tick ')),
            )
        )


def profile(tmp_path, steps, taken, net=None, say=print):
    """The loop in small."""
    names = {('forward', 'sampling'): net} if net else {}
    with StepProfile(steps, str(tmp_path), torch.device('cpu'), names, say) as profile:
        for i in range(taken):
            with profile.part('everything'):
                torch.ones(3).sum()
                if net:
                    net(torch.ones(3))
                    with torch.no_grad():
                        net(torch.ones(3))
            profile.step(1000 * (i + 1))


def test_a_training_that_ends_before_leaves_what_was_recorded(tmp_path):
    said = []
    profile(tmp_path, 100, WARM_UP + 4, say=said.append)
    assert (
        trace(tmp_path / f'profile-{WARM_UP + 4:06d}.json.gz')['everything'] == 4
        and 'Profile of 4 steps' in said[0]
    )
    profile(tmp_path / 'none', 100, WARM_UP - 1)


def test_calls_are_told_apart_by_gradients_and_hooks_go_away(tmp_path):
    net = torch.nn.Linear(3, 3)
    profile(tmp_path, 2, WARM_UP + 5, net)
    names = trace(tmp_path / f'profile-{WARM_UP + 2:06d}.json.gz')
    assert (names['forward'], names['sampling'], names['everything']) == (2, 2, 2)
    assert not net._forward_hooks and not net._forward_pre_hooks


def test_calls_of_compiled_networks_are_told_apart_too(tmp_path):
    net = torch.nn.Linear(3, 3)
    net.compile(backend='eager')
    compiled = net._compiled_call_impl
    profile(tmp_path, 2, WARM_UP + 5, net)
    names = trace(tmp_path / f'profile-{WARM_UP + 2:06d}.json.gz')
    assert (names['forward'], names['sampling']) == (2, 2) and net._compiled_call_impl is compiled


def test_a_trace_that_cannot_be_written_ends_nothing(tmp_path, monkeypatch):
    def full(self, path):
        open(path, 'w').close()
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(torch.profiler.profile, 'export_chrome_trace', full)
    said = []
    profile(tmp_path, 1, WARM_UP + 3, say=said.append)
    assert (
        len(said) == 1
        and 'No space left on device. Training goes on.' in said[0]
        and not list(tmp_path.iterdir())
    )
