"""The comparison of objectives: its plan, what it does when it is called again, tables and plot, and two objectives through the real scripts."""

import glob
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import click
import matplotlib.pyplot as plt
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import ROOT, assert_one_clear_error
from PIL import Image

import compare
from dnnlib import UserError
from experiments import comparison, report
from experiments.bundled import BUNDLED, DIGITS, PHOTOS, prepare
from experiments.comparison import Request, plan
from experiments.jobs import remaining_jobs, run_jobs
from experiments.results import Results, record_plan
from experiments.runner import Metric, Runner, newest_snapshot, run_interruptibly
from experiments.tables import distances_table, notes, paired_table, shown_samples, training_table
from training import checkpoint, command_line, starting_point
from training.networks import edm2 as networks_edm2
from training.objectives import OBJECTIVES

STUDENTS = (
    'mcd',
    'mct',
    'direct',
    'pd',
    'cm-cd',
    'cm-ct',
    'ict',
    'ect',
    'tcm',
    'scd',
    'sct',
    'flowmap',
    'mm',
    'sid',
)


def request(objectives=STUDENTS, steps=(1, 2, 4, 8), budget=8000, recipe=True, **kwargs):
    return Request(
        objectives,
        steps,
        kwargs.pop('seeds', (0,)),
        budget,
        kwargs.pop('batch', 128),
        True,
        DIGITS.network,
        recipe,
        **kwargs,
    )


def parsed(training):
    """What train.py makes of a training's options."""
    words = ['--outdir=x', '--data=x', *training.options, f'{training.start}=x']
    return command_line.parse(words)


# ----------------------------------------------------------------------------
# The plan.


def test_what_each_objective_gets_for_8000_evaluations():
    """By hand: mcd 2 + 1 + 3 an image, and where a pinned edge takes a share of 0.5 / S, 2 n for 12,
    6, 3 and 2 sub-steps of it; direct 2 n + 3 for 12, 6, 3 and 2 sub-steps; those without a teacher
    1 + 3; scd 1 + 2 + 3, sct one less; mm 1 + 1 + 3, sid 1 + 3 and 3 + 2 + 2
    in turn, for one step only; flowmap 1 + 3, after 16 solutions of 16. pd's steps take
    5, its nine stage lengths (64, 32, 16, 8, 4 once, 2, 1 twice) 177 steps
    each; its students of fewer steps stand at the end of a longer chain."""
    models = plan(request())
    got = {
        name: [(m.record()['train_steps'], m.record()['cost']) for m in models if m.objective == name]
        for name in STUDENTS
    }
    same = lambda steps, cost: [(steps, cost)] * 4
    assert got == {
        'mcd': [(444, 18), (888, 9), (1185, 6.75), (1280, 6.25)],
        'mct': same(2000, 4),
        'direct': [(296, 27), (533, 15), (888, 9), (1142, 7)],
        'pd': [(1593, 5), (1239, 5), (885, 5), (708, 5)],
        'cm-cd': same(1333, 6),
        'cm-ct': same(2000, 4),
        'ict': same(2000, 4),
        'ect': same(2000, 4),
        'tcm': same(2000, 4),
        'scd': same(1333, 6),
        'sct': same(1600, 5),
        'flowmap': same(1936, 4),
        'mm': same(1600, 5),
        'sid': [(1454, 5.5)],
    }
    at_first = {'flowmap': 16 * 16}  # its pool of solutions
    for m in models:
        spent = m.record()['train_steps'] * m.record()['cost'] + at_first.get(m.objective, 0)
        assert m.record()['evaluations'] == spent


@pytest.mark.parametrize('budget', [60, 997, 8000, 1234567])
def test_no_training_exceeds_the_budget_and_none_has_a_step_to_spare(budget):
    """What is left over is less than the smallest thing that could still be bought: a step; of pd a step of each of its nine stage lengths; of tcm a
    step of each of its two stages."""
    affordable = [name for name in STUDENTS if name != 'flowmap' or budget > 500]
    for model in plan(request(affordable, budget=budget)):
        unit = model.training.cost * {'pd': 9, 'tcm': 2}.get(model.objective, 1)
        assert 0 <= budget - model.training.evaluations < unit, model.name


@pytest.mark.parametrize('batch', [128, 96, 33])
def test_train_py_accepts_every_planned_run_and_makes_as_many_steps_of_it(batch):
    """--duration is in Mimg, --stage_steps in steps: the loop stops at the first step that reaches the former."""
    for model in plan(request(budget=12347, batch=batch, seeds=(5,))):
        for training in model.training.chain:
            o = parsed(training)
            run = o.run
            assert (run.objective, run.batch, run.seed, run.cond) == (training.objective, batch, 5, True)
            if training.objective == 'pd':
                assert training.steps == o.own.stage_steps * 9
            else:
                assert -(-round(run.duration * 1e6) // batch) == training.steps
            assert o.own.cost() == training.cost


def test_students_of_a_fixed_grid_are_trained_for_each_number_of_steps_and_consistency_models_once():
    models = {m.name: m for m in plan(request())}
    assert len(models) == 53
    assert len({m.training for m in models.values() if m.objective == 'direct'}) == 4
    assert [models[f'direct-seed0-{n}'].S for n in (1, 2, 4, 8)] == [1, 2, 4, 8]
    assert [parsed(models[f'mcd-seed0-{n}'].training).own.S for n in (1, 2, 4, 8)] == [1, 2, 4, 8]
    for name in ('cm-cd', 'cm-ct', 'ict', 'ect', 'tcm', 'scd', 'sct'):
        assert len({m.training for m in models.values() if m.objective == name}) == 1
        assert {(m.solver, m.S) for m in models.values() if m.objective == name} == {('cm', None)}


def test_progressive_distillation_is_one_chain_whose_students_are_its_entries():
    models = {m.nfe: m for m in plan(request(('pd',)))}
    (training,) = {m.training for m in models.values()}
    assert [folder for folder, _ in training.rounds] == [
        'S0064',
        'S0032',
        'S0016',
        'S0008',
        'S0004',
        'S0002',
        'S0001',
    ]
    assert {n: training.rounds[m.round][0] for n, m in models.items()} == {
        1: 'S0001',
        2: 'S0002',
        4: 'S0004',
        8: 'S0008',
    }
    own = parsed(training).own
    assert (own.S_start, own.S, own.stage_steps) == (64, 1, 177)
    assert [m.nfe for m in plan(request(('pd',), steps=(2, 8)))] == [2, 8]
    for steps in ((3, 8), (1, 3, 4)):
        with pytest.raises(click.UsageError, match='pd'):
            plan(request(('pd',), steps=steps))


def test_truncated_training_spends_half_on_its_first_stage_and_starts_from_it():
    (model,) = plan(request(('tcm',), steps=(2,), budget=8001))
    first = model.training.after
    assert (first.objective, first.steps, first.start) == ('ect', 1000, '--transfer')
    assert (model.training.steps, model.training.start) == (1000, '--teacher')
    assert [t.name for t in model.training.chain] == ['tcm-seed0-stage1', 'tcm-seed0']
    assert model.record()['train_steps'] == 2000 and model.record()['evaluations'] == 8000


def test_objectives_without_a_teacher_start_from_its_weights_in_its_network():
    for model in plan(request()):
        training = model.training.chain[0]
        has_network = '--cbase=16' in training.options
        expected = (
            '--transfer' if training.objective in ('mct', 'cm-ct', 'ict', 'ect', 'sct') else '--teacher'
        )
        assert (training.start, has_network) == (expected, expected == '--transfer')


def test_options_for_one_objective_or_one_student_change_that_one_and_its_cost():
    chosen = {
        'direct': ['--substeps=2', '--top-mass=0.5'],
        'direct-8': ['--substeps=6', '--top-mass=1'],
        'mcd': ['--hop=ddim'],
    }
    models = {
        m.name: m for m in plan(request(('direct', 'mcd', 'mct'), for_all=['--lr=3e-4'], for_some=chosen))
    }
    assert [models[f'direct-seed0-{n}'].training.cost for n in (1, 2, 4, 8)] == [7, 7, 7, 15]
    assert [parsed(models[f'direct-seed0-{n}'].training).own.top_mass for n in (4, 8)] == [0.5, 1]
    assert models['mcd-seed0-4'].training.cost == 5.75 and models['mct-seed0-4'].training.cost == 4
    assert all(parsed(m.training).run.lr == 3e-4 for m in models.values())


@pytest.mark.parametrize(
    ('kwargs', 'words'),
    [
        (dict(for_all=['--duration=1']), '--duration of train.py is for compare.py'),
        (dict(for_all=['--S=3']), '--S of train.py'),
        (dict(for_some={'scd': ['--S=2']}), '--S of train.py'),
        (dict(for_all=['--resume=x']), '--resume of train.py'),
        (dict(for_all=['--no-such']), 'no-such'),
        (dict(for_all=['lr']), "'lr' is not an option"),
        (dict(for_all=['--hop=ddim']), '--hop is for --objective='),
        (dict(for_some={'mdc': []}), '--with=mdc'),
        (dict(for_some={'direct-3': []}), '--with=direct-3'),
        (dict(for_some={'ect': ['--q=0.5']}), 'q'),
    ],
)
def test_options_that_cannot_be_are_named_before_anything_runs(kwargs, words):
    with pytest.raises(click.UsageError) as error:
        plan(request(('direct', 'ect', 'scd'), **kwargs))
    assert words in error.value.format_message()


def test_a_budget_below_one_step_is_an_error():
    """direct takes 12 · 2 + 3 in one sampling step; pd's chain at least nine steps of 5."""
    for objective, price in (('direct', 27), ('pd', 45)):
        assert plan(request((objective,), steps=(1, 2, 4, 8), budget=price))
        with pytest.raises(UserError, match='--budget'):
            plan(request((objective,), budget=price - 1))


def test_the_teacher_is_sampled_in_as_many_evaluations_and_in_many():
    models = comparison.teacher_models([1, 2, 4, 8], 256)
    few = (2, 4, 5, 8)
    assert [(m.name, m.steps, m.nfe) for m in models] == [
        ('teacher-heun-511', 256, 511),
        *((f'teacher-euler-{n}', n, n) for n in (1, *few)),
        *(
            (f'teacher-{name}-{n}', n, n)
            for name in ('deis', 'dpmpp', 'ipndm-searched', 'unipc-searched')
            for n in few
        ),
        ('teacher-heun-3', 2, 3),
        ('teacher-heun-7', 4, 7),
    ]
    assert [m.nfe for m in comparison.teacher_models([3], 256) if m.solver == 'euler'] == [1, 2, 3]


@pytest.mark.parametrize('name', ['edm-adm-cond', 'edm-ddpmpp-uncond-augment', 'edm2'])
def test_options_that_describe_a_network_make_one_that_takes_all_of_its_weights(fixtures, name):
    """But those of augmentation labels, which students do not have."""
    net = (
        networks_edm2.Precond(
            16, 3, 10, model_channels=64, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8]
        )
        if name == 'edm2'
        else checkpoint.load_network(fixtures / f'{name}.pkl')
    )
    words = ['--outdir=x', '--data=x', '--objective=ect', *comparison.network_options(net, ['ect'])]
    o = command_line.parse(words)
    dataset = SimpleNamespace(resolution=net.img_resolution, label_dim=net.label_dim)
    made = starting_point.network_from_scratch(o, dataset, net.img_channels)
    ours = checkpoint.NETWORKS[made.class_name](**made.kwargs)
    shapes = lambda network: {
        key: value.shape for key, value in network.state_dict().items() if 'augment' not in key
    }
    assert shapes(ours) == shapes(net)


@pytest.mark.parametrize('name', ['ve-ncsnpp-uncond', 'vp-ddpmpp-cond', 'edm2-cond'])
def test_networks_that_no_options_make_are_refused(fixtures, name):
    """Other preconditioning; or arguments without an option, as the 16 channels for each head of the last one."""
    needy = comparison.starting_from_weights(['mcd', 'tcm', 'ect', 'direct'])
    with pytest.raises(UserError, match='leave tcm, ect out of --objectives'):
        comparison.network_options(checkpoint.load_network(fixtures / f'{name}.pkl'), needy)


@pytest.mark.parametrize('data', BUNDLED.values(), ids=lambda data: data.name)
def test_train_py_accepts_the_teacher_of_each_bundled_data_set_and_its_network_fits(data):
    """Students that start from its weights are given options that make a network of the same shapes."""
    training = comparison.teacher_training(data)
    o = command_line.parse(['--outdir=x', '--data=x', *training.options])
    assert o.run.objective == 'diffusion' and o.run.cond and o.run.batch == data.batch
    assert -(-round(o.run.duration * 1e6) // o.run.batch) == training.steps == data.teacher_steps
    student = ['--outdir=x', '--data=x', '--objective=ect', *data.network]
    dataset = SimpleNamespace(resolution=data.resolution, label_dim=data.classes)
    shapes = [
        {
            name: value.shape
            for name, value in checkpoint.NETWORKS[made.class_name](**made.kwargs).state_dict().items()
        }
        for made in (
            starting_point.network_from_scratch(options, dataset, data.channels)
            for options in (o, command_line.parse(student))
        )
    ]
    assert shapes[0] == shapes[1]


# ----------------------------------------------------------------------------
# Doing it, with scripts that only pretend.


class PretendRunner(Runner):
    """Commands leave the files that the real ones would; those whose words contain `broken` fail."""

    broken = None

    def run(self, name, *arguments, threads=None):
        words = [str(word) for word in arguments]
        value = lambda option: next(
            word.partition('=')[2] for word in words if word.startswith(f'--{option}=')
        )
        with self.lock:
            self.commands.append(' '.join(words))
        if self.broken and self.broken in ' '.join(words):
            raise UserError(f'{name} broke')
        if words[0] == 'train.py':
            stages = ['S0002', 'S0001'] if '--objective=pd' in words else ['']
            for folder in (Path(value('outdir'), stage) for stage in stages):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / 'network-snapshot-000001.pkl').write_bytes(b'')
                (folder / 'log.txt').write_text('Training...\nDone.\n')
                tick = {'Timing/sec_per_tick': dict(mean=2.0), 'Timing/maintenance_sec': dict(mean=0.5)}
                (folder / 'stats.jsonl').write_text(f'{json.dumps(tick)}\n' * 3)
        elif words[0] == 'generate.py':
            folder = Path(value('outdir'))
            folder.mkdir(parents=True)
            for i in range(40):
                Image.fromarray(np.full((8, 8), i, np.uint8)).save(folder / f'{i:06d}.png')
        elif words[0] == 'search.py':
            Path(value('save')).touch()
        else:
            found = dict(value=float(len(self.commands)), interval=[0.1, 0.2])
            Path(value('json')).write_text(json.dumps(dict(fid=found, paired_error=found)))


class Recorder(Runner):
    """Commands are recorded, and leave empty files where real ones leave their output."""

    def run(self, name, *arguments, threads=None):
        words = [str(word) for word in arguments]
        self.commands.append(' '.join(words))
        given = dict(word[2:].split('=', 1) for word in words if word.startswith('--') and '=' in word)
        if 'metrics.small_detectors' in words:
            Path(given['outdir']).mkdir()
            for detector in ('classifier', 'pca', 'random'):
                Path(given['outdir'], f'{detector}.pt').write_bytes(detector.encode())
        else:
            Path(given['dest']).touch()


def test_features_and_references_are_made_from_the_photographs_and_one_from_held_out_crops(tmp_path):
    """Detectors see training crops only; what was made is not made again."""
    runner = Recorder(tmp_path, 1)
    data, metrics = prepare(PHOTOS, runner)
    made = [command for command in runner.commands if command.startswith('dataset_tool.py')]
    assert len(made) == 2 and all('--source=photos --dest=' in command for command in made)
    assert ['--split=test' in command for command in made] == [False, True]
    (detectors,) = (command for command in runner.commands if 'metrics.small_detectors' in command)
    assert f'--data={data}' in detectors.split()
    references = {
        name: next(c for c in runner.commands if c.startswith('fid.py ref') and f'/{name}.npz' in c)
        for name in metrics
    }
    assert list(references) == ['classifier', 'pca', 'random', 'held-out']
    assert {name for name, command in references.items() if 'photos-test.zip' in command} == {'held-out'}
    assert metrics['held-out'].detector == metrics['classifier'].detector
    count = len(runner.commands)
    assert prepare(PHOTOS, runner) == (data, metrics) and len(runner.commands) == count


def test_the_digits_have_the_data_set_and_metrics_that_they_had(tmp_path):
    runner = Recorder(tmp_path, 1)
    data, metrics = prepare(DIGITS, runner)
    assert data.name == 'digits.zip' and list(metrics) == ['classifier', 'pca', 'random']
    assert len(runner.commands) == 1 + 1 + 3


RULERS = dict(pca=Metric('pca.npz', 'pca.pt'), random=Metric('random.npz', 'random.pt'))
SETTINGS = dict(budget=100, images=40)


def pretend(outdir, objectives=('direct', 'ect'), broken=None, rulers=RULERS, **kwargs):
    """Carry out a comparison of 1 and 2 steps; returns the commands, as (script, folder), the results, and what failed."""
    models = [
        *comparison.teacher_models([1, 2], 4),
        *plan(request(objectives, (1, 2), 100, batch=16, **kwargs)),
    ]
    record_plan(outdir, SETTINGS, [t for m in models if m.training for t in m.training.chain])
    runner = PretendRunner(outdir, 1)
    runner.broken = broken
    results = Results(outdir / 'results.json', list(rulers))
    failures = run_jobs(
        runner, remaining_jobs(runner, models, 'digits.zip', 'teacher.pkl', rulers, 40, 64, results), 1
    )
    return runner.commands, results, failures


def scripts(commands, script):
    return [command for command in commands if command.startswith(script)]


def test_everything_is_done_once(tmp_path):
    """Three trainings; seven rows of the teacher (Heun's with 2 steps is left out: one step is Euler's), two of
    which have their levels searched, four of students, by two rulers each; pairs of all but the reference and the
    consistency model in two steps."""
    commands, results, failures = pretend(tmp_path)
    assert not failures and [
        len(scripts(commands, name)) for name in ('train.py', 'search.py', 'generate.py', 'fid.py')
    ] == [3, 2, 11, 22 + 9]
    assert f'--sigmas={tmp_path}/levels/teacher-ipndm-searched-2.txt' in ' '.join(commands)
    rows = json.loads((tmp_path / 'results.json').read_text())
    # Three ticks of 2 seconds and 0.5 between them.
    assert {row['train_seconds'] for row in rows if row['seed'] is not None} == {7.5}
    assert (
        {row['model'] for row in rows}
        == set(results.rows)
        == {
            'teacher-heun-7',
            'teacher-euler-1',
            'teacher-euler-2',
            'teacher-deis-2',
            'teacher-dpmpp-2',
            'teacher-ipndm-searched-2',
            'teacher-unipc-searched-2',
            'direct-seed0-1',
            'direct-seed0-2',
            'ect-seed0-1',
            'ect-seed0-2',
        }
    )
    row = results.rows['direct-seed0-2']
    assert (row['objective'], row['S'], row['solver'], row['nfe'], row['seed'], row['images']) == (
        'direct',
        2,
        'student',
        2,
        0,
        40,
    )
    assert (
        (row['train_steps'], row['cost'], row['evaluations']) == (6, 15, 90)
        and row['distance'] != row['distance_random']
        and row['seconds'] >= 0
    )
    # Paired with the teacher's reference, by the sampler that the images are of.
    pairs = [command for command in commands if '--metrics=paired_error' in command]
    assert all(
        '--pairs-with=teacher.pkl:heun:4 ' in command and '--seeds=0-39 ' in command for command in pairs
    )
    of_student = next(command for command in pairs if 'direct-seed0-2-pairs.json' in command)
    assert '--solver=student --steps=2 ' in of_student and '--ref=pca.npz ' in of_student
    assert row['paired_error'] > 0 and row['paired_interval'] == [0.1, 0.2]
    assert results.rows['teacher-heun-7']['paired_error'] == 0
    assert (
        results.rows['ect-seed0-2']['paired_error'] is None
        and results.rows['ect-seed0-1']['paired_error'] > 0
    )
    assert {path.stem for path in (tmp_path / 'grids').iterdir()} == set(results.rows)
    assert not any(path.is_dir() for path in (tmp_path / 'samples').iterdir()), (
        'images are measured, shown in a grid, and deleted'
    )
    assert pretend(tmp_path)[0] == []


def test_a_comparison_grows_by_objectives_and_seeds(tmp_path):
    pretend(tmp_path)
    commands, results, _ = pretend(tmp_path, objectives=('direct', 'ect', 'pd'), seeds=(0, 1))
    assert len(scripts(commands, 'train.py')) == 2 + 1 + 2 and len(scripts(commands, 'generate.py')) == 4 + 4
    assert not any(
        'teacher-' in command or ('seed0/' in command and 'pd' not in command) for command in commands
    )
    record_plan(tmp_path, SETTINGS, [])
    assert len(json.loads((tmp_path / 'plan.json').read_text())['trainings']) == 4 + 2 + 2, (
        'what is not asked for now is remembered'
    )
    assert results.rows['pd-seed1-1']['train_steps'] > results.rows['pd-seed1-2']['train_steps']
    assert any('--network=' in c and 'pd-seed0/S0002/' in c for c in commands) and any(
        'pd-seed0/S0001/' in c for c in commands
    )


@pytest.mark.parametrize('begun', [True, False])
def test_a_training_that_was_cut_goes_on_from_its_state_or_begins_anew(tmp_path, begun):
    for name in ('ect-seed0', 'direct-2-seed0'):
        folder = tmp_path / 'trainings' / name
        folder.mkdir(parents=True)
        (folder / 'log.txt').write_text('Training...\n')
        (folder / 'leftover').touch()
        if begun:
            (folder / 'training-state-000001.pt').touch()
    commands = scripts(pretend(tmp_path)[0], 'train.py')
    for name, start in (('ect-seed0', '--transfer='), ('direct-2-seed0', '--teacher=')):
        (command,) = (command for command in commands if f'/{name} ' in command)
        assert ('--resume=' in command) == begun
        assert (start in command) == (start == '--teacher=' or not begun), (
            'train.py refuses --transfer with --resume'
        )
        assert (tmp_path / 'trainings' / name / 'leftover').exists() == begun


def test_a_model_is_not_sampled_from_a_training_that_did_not_finish(tmp_path):
    """A snapshot alone does not say that the training is over; train.py's last word does."""
    folder = tmp_path / 'trainings' / 'ect-seed0'
    folder.mkdir(parents=True)
    (folder / 'network-snapshot-000000.pkl').touch()
    (folder / 'log.txt').write_text('Training...\ntick 1\n')
    commands = pretend(tmp_path, objectives=('ect',))[0]
    assert len(scripts(commands, 'train.py')) == 1
    first = next(i for i, command in enumerate(commands) if 'ect-seed0/network' in command)
    assert any(command.startswith('train.py') for command in commands[:first])


def test_what_fails_keeps_nothing_else_from_being_done_and_is_tried_again(tmp_path):
    commands, results, failures = pretend(tmp_path, broken='--objective=ect')
    assert failures == ['ect-seed0: ect-seed0 broke'] and len(results.rows) == 9
    commands, results, failures = pretend(tmp_path)
    assert not failures and len(results.rows) == 11
    assert len(scripts(commands, 'train.py')) == 1 and len(scripts(commands, 'generate.py')) == 2


def test_the_second_stage_follows_the_first_and_starts_from_its_snapshot(tmp_path):
    commands = scripts(pretend(tmp_path, objectives=('tcm',))[0], 'train.py')
    assert ['tcm-seed0-stage1 ' in c for c in commands] == [True, False]
    assert '--transfer=teacher.pkl' in commands[0]
    assert (
        f'--teacher={tmp_path / "trainings" / "tcm-seed0-stage1" / "network-snapshot-000001.pkl"}'
        in commands[1]
    )


def test_the_longest_jobs_come_first(tmp_path):
    """511 evaluations of 6,000 images are more than a training of 8,000 for each of 128 places; a few samples of the teacher are least."""
    models = [*comparison.teacher_models([1, 8], 256), *plan(request(('ect', 'direct'), (1, 8)))]
    jobs = remaining_jobs(
        Runner(tmp_path, 1), models, 'd', 't', RULERS, 6000, 64, Results(tmp_path / 'none.json', list(RULERS))
    )
    names = [name for _, name, _ in jobs]
    assert (
        names[0] == 'teacher-heun-511'
        and names[-1] == 'teacher-euler-1'
        and len(names) == 1 + 5 + 8 + 8 + 1 + 3
    )
    assert [work for work, *_ in jobs] == sorted((work for work, *_ in jobs), reverse=True) and jobs[0][
        0
    ] == 511 * 6000


@pytest.mark.parametrize(
    ('settings', 'lr', 'words'),
    [
        (dict(SETTINGS, budget=200), '1e-3', ['budget = 100', '200', 'another folder']),
        (SETTINGS, '2e-3', ['direct-1-seed0', '--lr=0.5e-3', 'another folder']),
    ],
)
def test_another_comparison_in_the_same_folder_is_an_error(tmp_path, settings, lr, words):
    trainings = lambda lr: [m.training for m in plan(request(('direct',), for_all=[f'--lr={lr}']))]
    record_plan(tmp_path, SETTINGS, trainings('0.5e-3' if lr == '2e-3' else lr))
    before = (tmp_path / 'plan.json').read_text()
    with pytest.raises(UserError) as error:
        record_plan(tmp_path, settings, trainings(lr))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert (tmp_path / 'plan.json').read_text() == before


@pytest.mark.parametrize(
    ('name', 'content'),
    [
        ('plan.json', '[]'),
        ('plan.json', '{"settings": {}}'),
        ('plan.json', '{'),
        ('results.json', '{}'),
        ('plan.json', '{"settings": [], "trainings": {}}'),
        ('results.json', '[{}]'),
        ('results.json', '[1]'),
    ],
)
def test_damaged_files_of_a_comparison_are_named(tmp_path, name, content):
    pretend(tmp_path, objectives=())
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f'{name} is damaged: delete it'):
        pretend(tmp_path, objectives=())


@pytest.mark.parametrize(
    'change',
    [
        dict(objective='nonsense'),
        dict(objective=[]),
        dict(distance=None),
        dict(distance_random='1'),
        dict(nfe=None),
        dict(solver=None),
        dict(seed=0),
    ],
)
def test_a_row_of_the_results_that_tables_cannot_read_is_named(tmp_path, change):
    """The last is of a teacher's row, which then lacks what is said of a training."""
    pretend(tmp_path, objectives=())
    path = tmp_path / 'results.json'
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([rows[0] | change, *rows[1:]]))
    with pytest.raises(UserError, match=r'results.json is damaged'):
        pretend(tmp_path, objectives=())


def test_the_newest_snapshot_is_told_by_its_name(tmp_path):
    """Neither by the times of files, which a copy changes, nor by the alphabet; averages of other lengths are not meant."""
    names = [
        'network-snapshot-000999.pkl',
        'network-snapshot-1000000.pkl',
        'network-snapshot-000998.pkl',
        'network-snapshot-1000000-0.050.pkl',
        'network-snapshot-1000001-0.100.pkl',
    ]
    for age, name in enumerate(names):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (age, age))
    assert newest_snapshot(tmp_path).name == 'network-snapshot-1000000.pkl'
    (tmp_path / 'network-snapshot-1000000-1000000512.pkl').touch()
    assert newest_snapshot(tmp_path).name == 'network-snapshot-1000000-1000000512.pkl'
    with pytest.raises(UserError, match='holds no network-snapshot'):
        newest_snapshot(tmp_path / 'empty')


@pytest.mark.parametrize('script', ['compare.py', 'demo.py'])
def test_a_signal_ends_a_script_and_what_it_runs(tmp_path, script):
    """SIGTERM while the first command is at work: one line, exit status 1, and none of its commands is left, or begun."""
    out = tmp_path / 'out'
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), f'--outdir={out}'],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    first = process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    rest, errors = process.communicate(timeout=60)  # a hundred times what it takes
    assert process.returncode == 1 and 'Error: Interrupted: ' in errors and 'Traceback' not in errors
    assert first.startswith('$ python ') and '$ python ' not in rest
    assert 'same command' in errors
    running = [Path(path).read_bytes() for path in glob.glob('/proc/[0-9]*/cmdline') if Path(path).exists()]
    assert not any(str(out).encode() in words for words in running)


def test_an_interruption_ends_what_runs_and_begins_nothing_more(tmp_path):
    """Ctrl-C, twice, while a command is at work that would take a minute."""
    runner = Runner(tmp_path, 1)

    def long():
        threading.Timer(0.5, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]).start()
        runner.run('a', '-c', 'import time; time.sleep(60)')

    start = time.monotonic()
    with pytest.raises(UserError, match='Interrupted: try again'):
        run_interruptibly(
            runner,
            lambda: run_jobs(runner, [(2, 'a', long), (1, 'b', lambda: runner.run('b', '-c', 'pass'))], 1),
            'try again',
        )
    assert time.monotonic() - start < 30 and runner.stopped and len(runner.commands) == 1
    with pytest.raises(UserError, match='not begun'):
        runner.run('c', '-c', 'pass')


# ----------------------------------------------------------------------------
# Tables and plot.


def row(objective, nfe, distance, seed=0, solver='student', **kwargs):
    facts = {} if seed is None else dict(train_steps=1000 * nfe, cost=6, evaluations=6000 * nfe)
    return dict(
        model=f'{objective}-seed{seed}-{nfe}',
        objective=objective,
        S=nfe,
        solver=solver,
        nfe=nfe,
        seed=seed,
        distance=distance,
        distance_pca=2 * distance,
        images=50,
        seconds=1.0,
        **facts,
        **kwargs,
    )


ROWS = [
    row('mcd', 1, 0.4),
    row('mcd', 1, 0.6, seed=1),
    row('mcd', 4, 0.1),
    row('direct', 4, 0.05),
    row('diffusion', 511, 0.04, None, 'heun'),
    row('diffusion', 1, 20.0, None, 'euler'),
    row('diffusion', 4, 0.8, None, 'euler'),
    row('diffusion', 3, 2.0, None, 'heun'),
]

BEST = ROWS[4]


def test_samples_are_shown_in_the_columns_of_students_with_the_teacher_beside_them():
    searched = [dict(row('diffusion', nfe, 0.1, None, 'unipc'), searched=True) for nfe in (2, 4)]
    euler, sampled = row('diffusion', 2, 5.0, None, 'euler'), [*ROWS, *searched]
    shown = shown_samples([*sampled, euler], BEST)
    assert {name: list(cells) for name, cells in shown.items()} == {
        'mcd': [1, 4],
        'direct': [4],
        'teacher, Euler': [1, 4],
        'teacher, searched': [4],
        'teacher, 511': [4],
    }
    assert shown['mcd'][1] is ROWS[0] and shown['teacher, 511'][4] is BEST
    alone = shown_samples([each for each in [*sampled, euler] if each['seed'] is None], BEST)
    assert list(alone['teacher, Euler']) == [1, 4, 2] and list(alone['teacher, 511']) == [511]


def test_the_reference_is_what_the_options_say_also_where_others_take_more_evaluations():
    """--reference-steps=2 --steps=4: Heun's 3 evaluations, which are then no point of the teacher's line; 0.1 / 2 = 0.05."""
    _, lines = distances_table(ROWS, ROWS[-1], 'distance')
    assert lines[0] == ['mcd', '0.25 (0.4, 0.6)', '0.05 (0.1)'] and [line[0] for line in lines] == [
        'mcd',
        'direct',
        'teacher, Euler',
    ]


def test_the_table_has_ratios_of_means_and_every_seed():
    """0.5 / 0.04 = 12.5; the ruler in second place is twice as long, and so is its reference."""
    header, lines = distances_table(ROWS, BEST, 'distance')
    assert header == ['objective', '1', '4']
    assert lines == [
        ['mcd', '12.50 (0.4, 0.6)', '2.50 (0.1)'],
        ['direct', '', '1.25 (0.05)'],
        ['teacher, Euler', '500.00 (20)', '20.00 (0.8)'],
        ['teacher, Heun', '', '50.00 (2), 3 evaluations'],
    ]
    assert distances_table(ROWS, BEST, 'distance_pca')[1][0] == ['mcd', '12.50 (0.8, 1.2)', '2.50 (0.2)']
    assert training_table(ROWS)[1] == [['mcd', '1,000 × 6', '4,000 × 6'], ['direct', '', '4,000 × 6']]


def test_the_paired_errors_are_means_and_a_dash_stands_where_there_is_none():
    """Rows of an older version have no such entry, and the sampler of ect in four steps has no pairs."""
    paired = lambda entry, error: dict(entry, paired_error=error)
    solver = dict(row('diffusion', 4, 0.3, None), solver='dpmpp', searched=False)
    rows = [
        paired(row('mcd', 1, 0.4), 0.2),
        paired(row('mcd', 1, 0.6, seed=1), 0.3),
        row('mcd', 4, 0.1),
        paired(row('ect', 1, 1.0, solver='cm'), 0.5),
        paired(row('ect', 4, 1.0, solver='cm'), None),
        paired(BEST, 0.0),
        paired(row('diffusion', 1, 20.0, None, 'euler'), 0.9),
        paired(row('diffusion', 3, 2.0, None, 'heun'), 0.4),
        paired(solver, 0.1),
    ]
    assert paired_table(rows, BEST) == (
        ['objective', '1', '4'],
        [
            ['mcd', '0.250 (0.200, 0.300)', ''],
            ['ect', '0.500', '–'],
            ['teacher, Euler', '0.900', ''],
            ['teacher, best solver', '', '0.100 dpmpp'],
            ['teacher, Heun', '', '0.400, 3 evaluations'],
        ],
    )
    text = '\n'.join(notes(rows, BEST, 8000, 128, ['pca']))
    assert '–: ect in more than one step' in text and 'Paired error: ' in text
    assert 'Paired error' not in '\n'.join(notes(ROWS, BEST, 8000, 128, ['pca']))


def test_the_teacher_has_the_benefit_of_its_best_solver_and_of_searched_levels():
    """By each distance the solver that is best by it; 0.2 / 0.04 = 5."""
    solvers = dict(deis=(0.5, 0.7, False), dpmpp=(0.3, 0.9, False), ipndm=(0.1, 0.1, False))
    few = [
        dict(row('diffusion', 4, distance), solver=solver, distance_pca=pca, seed=None, searched=searched)
        for solver, (distance, pca, searched) in {**solvers, 'searched': (0.2, 0.2, True)}.items()
    ]
    few[-1]['solver'] = 'ipndm'
    lines = {line[0]: line[1:] for line in distances_table([*ROWS, *few], BEST, 'distance')[1]}
    assert lines['teacher, best solver'] == ['', '7.50 (0.3) dpmpp']
    assert lines['teacher, searched levels'] == ['', '5.00 (0.2) ipndm']
    lines = {line[0]: line[1:] for line in distances_table([*ROWS, *few], BEST, 'distance_pca')[1]}
    assert lines['teacher, best solver'] == ['', '8.75 (0.7) deis']


def test_the_notes_say_of_each_objective_what_is_not_equal():
    rows = [*ROWS, *(row(name, 2, 1.0) for name in ('pd', 'ect', 'tcm', 'flowmap')), row('sid', 1, 1.0)]
    text = '\n'.join(notes(rows, BEST, 8000, 128, ['pca']))
    for words in (
        '8,000 network evaluations',
        '128',
        '511 evaluations',
        '0.04',
        '50 images',
        'mcd, direct: a student for each',
        'pd: one chain',
        'ect, tcm: one model',
        'sid: a student of one step',
        'flowmap: one model for all columns, told where each of its steps ends',
        'tcm: half',
        'ect: no teacher',
    ):
        assert words in text, words
    assert 'not FID' not in text and 'not FID' in '\n'.join(
        notes(rows, BEST, 8000, 128, list(DIGITS.metrics))
    )


def test_labels_move_as_little_as_keeps_them_apart():
    assert report.spread([0.1, 0.9, 0.5], 0.1) == pytest.approx([0.1, 0.9, 0.5])
    assert report.spread([0.5, 0.52, 0.1], 0.1) == pytest.approx([0.46, 0.56, 0.1])
    assert report.spread([0.5, 0.5, 0.5], 0.2) == pytest.approx([0.3, 0.5, 0.7])
    assert report.spread([0.02, 0.01, 1], 0.1) == pytest.approx([0.1, 0, 1]) and report.spread(
        [0.99, 1], 0.1
    ) == pytest.approx([0.9, 1])


def test_the_plot_has_a_line_through_the_geometric_means_and_a_label_for_each_name(tmp_path, monkeypatch):
    """sqrt(0.4 · 0.9) = 0.6; labels lie at least a twentieth of the height apart."""
    figures = []
    monkeypatch.setattr(plt, 'close', figures.append)
    names = [*report.LOOKS]
    lines = {name: {8: [0.1], 1: [0.4, 0.9], 2: [0.3]} for name in names}
    report.write_frontier(lines, str(tmp_path / 'plot.png'), 'distance', ('reference', 0.05))
    axes = figures[0].axes[0]
    assert [*map(float, axes.lines[1].get_xdata())] == [1, 2, 8] and axes.lines[
        1
    ].get_ydata() == pytest.approx([0.6, 0.3, 0.1])
    labels = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert set(labels) == {*names, 'reference'} and np.diff(sorted(labels.values())).min() > 0.0499
    assert (axes.get_xscale(), axes.get_yscale()) == ('log', 'log') and len(
        {report.LOOKS[name] for name in names}
    ) == len(names) >= len(STUDENTS) + 2
    assert (tmp_path / 'plot.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize(
    ('evaluations', 'labels'),
    [
        ([1, 2, 3, 4, 7, 8], [1, 2, 3, 4, 8]),
        ([3, 5, 6], [3, 6]),
        ([1, 2, 4, 8, 12], [1, 2, 4, 8, 12]),
        ([5], [5]),
        ([9, 10, 11, 12], [9, 12]),
    ],
)
def test_the_plot_shows_all_evaluations_and_labels_those_with_room(
    tmp_path, monkeypatch, evaluations, labels
):
    """Also where none is a power of two; and distances have numbers where none of 1, 2, 5 · 10^k is among them, as between 2.2 and 4.5."""
    figures = []
    monkeypatch.setattr(plt, 'close', figures.append)
    lines = {'mcd': {n: [2.2 + 2.3 * i / len(evaluations)] for i, n in enumerate(evaluations)}}
    report.write_frontier(lines, str(tmp_path / 'plot.png'), 'distance', ('reference', 2.3))
    axes = figures[0].axes[0]
    left, right = axes.get_xlim()
    assert left < evaluations[0] and evaluations[-1] < right and axes.get_xticks().tolist() == labels
    low, high = axes.get_ylim()
    assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 2


def test_strips_have_a_column_for_each_number_in_order(tmp_path, monkeypatch):
    """Of rows that lack some; all titles stand at one height."""
    figures = []
    monkeypatch.setattr(plt, 'close', figures.append)
    for k in (1, 2, 4):
        Image.new('L', [80, 50], 50 * k).save(tmp_path / f'{k}.png')
    grid = lambda k: str(tmp_path / f'{k}.png')
    report.write_strips(
        {'pd': {4: grid(4), 1: grid(1)}, 'ect': {2: grid(2), 1: grid(1)}}, str(tmp_path / 'strips.png')
    )
    titles = {
        text.get_text(): text.get_position() for text in figures[0].texts if 'evaluation' in text.get_text()
    }
    assert sorted(titles, key=lambda title: titles[title][0]) == [
        '1 evaluation',
        '2 evaluations',
        '4 evaluations',
    ]
    assert len({y for _, y in titles.values()}) == 1
    shown = [
        [
            int(axes.images[0].get_array()[0, 0, 0]) if axes.images else None
            for axes in figures[0].axes[i : i + 3]
        ]
        for i in (0, 3)
    ]
    assert shown == [[50, None, 200], [50, 100, None]]


def test_every_objective_has_a_look_of_its_own():
    assert set(OBJECTIVES) - {'diffusion'} <= set(report.LOOKS)


# ----------------------------------------------------------------------------
# The command.


def test_two_objectives_through_the_real_scripts(digits, teacher, rulers, tmp_path, forked_commands):
    """A few steps, one number of steps: that everything runs and is where it should be; and that nothing runs a second time."""
    out = tmp_path / 'out'
    arguments = [
        f'--outdir={out}',
        f'--data={digits}',
        f'--teacher={teacher}',
        f'--ref={rulers / "pca.npz"}',
        f'--detector={rulers / "pca.pt"}',
        '--objectives=direct,ect',
        '--steps=1',
        '--budget=54',
        '--batch=16',
        '--num=100',
        '--bootstrap=40',
        '--reference-steps=2',
        '--with=direct:--lr=1e-3',
        '--',
        '--workers=0',
    ]
    done = CliRunner().invoke(compare.main, arguments)
    assert done.exit_code == 0, done.output
    rows = {row['model']: row for row in json.loads((out / 'results.json').read_text())}
    assert set(rows) == {'teacher-heun-3', 'teacher-euler-1', 'direct-seed0-1', 'ect-seed0-1'}
    assert (rows['direct-seed0-1']['train_steps'], rows['ect-seed0-1']['train_steps']) == (6, 13)
    assert all(row['distance'] > 0 and row['images'] == 100 for row in rows.values())
    assert all((row['paired_error'] == 0) == (name == 'teacher-heun-3') for name, row in rows.items())
    # All classes in turn, and resampled by themselves.
    assert all(row['interval'][0] < row['interval'][1] for row in rows.values())
    of_images = [line for line in (out / 'commands.txt').read_text().splitlines() if '--images=' in line]
    assert len(of_images) == 4 and all('--bootstrap=40 --bootstrap-strata=10' in line for line in of_images)
    low, high = rows['direct-seed0-1']['interval']
    assert f'| direct | {low:.4g} to {high:.4g} |' in (out / 'table.md').read_text()
    assert f'| direct | {rows["direct-seed0-1"]["paired_error"]:.3f} |' in (out / 'table.md').read_text()
    for name, nimg in (('direct-1-seed0', 96), ('ect-seed0', 208)):
        stats = (out / 'trainings' / name / 'stats.jsonl').read_text().splitlines()
        assert json.loads(stats[-1])['Progress/nimg']['mean'] == nimg
        assert json.loads((out / 'trainings' / name / 'training_options.json').read_text())['seed'] == 0
    assert (out / 'table.md').read_text() in done.stdout
    page = (out / 'report.html').read_text()
    assert page.count('data:image/png;base64,') == 2 + 4 and 'train.py' in page
    assert {'compare.png', 'samples.png', 'plan.json', 'commands.txt'} <= {
        path.name for path in out.iterdir()
    }
    written = (out / 'plan.json').read_text()
    for change in (f'--detector={tmp_path / "other.pt"}', f'--detector={rulers / "random.pt"}'):
        changed = [change if argument.startswith('--detector=') else argument for argument in arguments]
        assert_one_clear_error(
            CliRunner().invoke(compare.main, [f'--outdir={tmp_path / "new"}', *changed[1:]]),
            'other.pt' if 'other' in change else 'was made with detector pca',
        )
    assert not (tmp_path / 'new').exists() and (out / 'plan.json').read_text() == written
    again = CliRunner().invoke(compare.main, arguments)
    assert (
        again.exit_code == 0
        and '$ python' not in again.stdout
        and json.loads((out / 'results.json').read_text()) == list(rows.values())
    )
    other = [argument.replace('budget=54', 'budget=55') for argument in arguments]
    assert_one_clear_error(CliRunner().invoke(compare.main, other), 'budget = 54', 'another folder')


@pytest.mark.parametrize(
    ('arguments', 'words', 'status'),
    [
        (['--data=x.zip'], ['no such file or folder, and none of digits, photos'], 2),
        ([f'--data={__file__}'], ['--teacher', '--ref'], 2),
        (['--objectives=mcd,nonsense'], ['nonsense', 'direct'], 2),
        (['--objectives=mcd,mcd'], ['twice'], 2),
        (['--steps=1,1'], ['different'], 2),
        (['--seeds=0-2,1'], ['--seeds', 'twice'], 2),
        (['--ref=a.npz'], ['--data=digits'], 2),
        (['--data=photos', '--detector=a.pt'], ['--data=photos'], 2),
        (['--with=direct'], ['NAME:OPTIONS'], 2),
        (['--with=direct:"'], ['quotation'], 2),
        (['--teacher=missing.pkl'], ['missing.pkl'], 1),
        (['--budget=3'], ['--budget', 'one step'], 1),
        (['--', '--lr=x'], ['lr'], 2),
        (['--', '--seed=3'], ['--seed of train.py'], 2),
        ([f'--data={__file__}', '--teacher=t', '--ref=a', '--ref=b', '--detector=c'], ['one for each'], 2),
    ],
)
def test_wrong_options_are_one_clear_error_and_nothing_is_written(
    tmp_path, monkeypatch, arguments, words, status
):
    monkeypatch.chdir(tmp_path)
    assert_one_clear_error(CliRunner().invoke(compare.main, arguments), *words, status=status)
    assert not any(tmp_path.iterdir())


def test_a_student_is_no_teacher(tmp_path, fixtures):
    result = CliRunner().invoke(
        compare.main, [f'--outdir={tmp_path / "out"}', f'--teacher={fixtures / "published-student.pkl"}']
    )
    assert_one_clear_error(result, 'student of', 'diffusion model')
    assert not (tmp_path / 'out').exists()


def test_a_folder_called_like_a_bundled_data_set_is_not_passed_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'photos').mkdir()
    assert_one_clear_error(CliRunner().invoke(compare.main, ['--data=photos']), '--data=./photos')
    assert [path.name for path in tmp_path.iterdir()] == ['photos']


def test_data_that_the_teacher_does_not_know_are_refused_before_anything_is_written(
    tmp_path, fixtures, digits, rulers
):
    """16x16x3 with ten classes is not 8x8x1; nor are digits by their name alone."""
    out, teacher = tmp_path / 'out', f'--teacher={fixtures / "edm-adm-cond.pkl"}'
    for data in ([f'--data={digits}', f'--ref={rulers / "pca.npz"}'], []):
        result = CliRunner().invoke(compare.main, [f'--outdir={out}', teacher, '--objectives=mcd', *data])
        assert_one_clear_error(result, 'expects images of', '8x8x1 with')
        assert not out.exists()
