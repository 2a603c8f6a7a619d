"""search.py --schedule, and the search of a solver's noise levels behind it."""

import itertools
import json
import math
import shlex

import numpy as np
import pytest
import torch
from gaussian import Gaussian
from helpers import assert_one_clear_error, invoke, run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

import generate
import search
import train
import validation
from dnnlib import WrongOptions
from sampling import level_list, schedule_search, teacher_paths
from training import networks
from training.checkpoint import load_network, save_snapshot
from training.schedules import schedule_sigmas
from training.solvers import ode_solve

NODES = schedule_sigmas('polynomial', 13, 0.02, 10.0).tolist()

# ----------------------------------------------------------------------------
# Paths.


@settings(deadline=None, derandomize=True)
@given(st.integers(2, 7), st.data(), st.sampled_from([0.5, 1.0, 1.3]))
def test_the_cheapest_path_is_that_of_all_paths(nodes, data, discount):
    jumps = data.draw(st.integers(1, nodes - 1))
    errors = np.full((nodes, nodes), np.inf)
    for i, j in itertools.combinations(range(nodes), 2):
        errors[i, j] = data.draw(st.floats(0, 10))
    cost = lambda path: sum(discount**k * errors[i, j] for k, (i, j) in enumerate(itertools.pairwise(path)))
    every = [(0, *inner, nodes - 1) for inner in itertools.combinations(range(1, nodes - 1), jumps - 1)]
    found = schedule_search.cheapest_path(errors.tolist(), jumps, discount)
    assert tuple(found) in every and cost(found) == pytest.approx(min(map(cost, every)), rel=1e-12)


@pytest.mark.parametrize('jumps', [0, 5])
def test_a_path_has_no_more_jumps_than_there_are_nodes(jumps):
    with pytest.raises(ValueError, match=f'a path of {jumps} jumps over 5 nodes'):
        schedule_search.cheapest_path([[1.0] * 5] * 5, jumps)


@pytest.fixture
def gaussian():
    return Gaussian(torch.tensor([0.02, 0.25, 1.0, 4.0]).reshape(1, 1, 2, 2), mean=0.3)


@pytest.fixture
def start():
    return 10 * torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_fine_paths_are_heuns_and_remember_their_slopes(gaussian, start):
    path = schedule_search.fine_path(gaussian, start, NODES)
    for i, sigma in enumerate(NODES):
        expected = ode_solve(gaussian, start, NODES[: i + 1], 'heun') if i else start
        torch.testing.assert_close(path.states[i], expected, rtol=1e-12, atol=1e-12)
        if i + 1 < len(NODES):
            slope = (expected - gaussian(expected, torch.tensor(sigma, dtype=torch.float64))) / sigma
            torch.testing.assert_close(path.slopes[i], slope, rtol=1e-12, atol=1e-12)


def test_the_error_of_a_jump_is_that_of_an_euler_step_along_the_path(gaussian, start):
    path = schedule_search.fine_path(gaussian, start, NODES)
    errors = schedule_search.jump_errors(path, NODES)
    assert errors.shape == (13, 13)
    for i, j in itertools.product(range(13), repeat=2):
        if j <= i:
            assert errors[i, j] == math.inf
            continue
        jumped = ode_solve(gaussian, path.states[i], [NODES[i], NODES[j]], 'euler')
        difference = (jumped - path.states[j]).numpy().reshape(3, -1)
        assert errors[i, j].item() == pytest.approx(
            np.sqrt((difference**2).mean(axis=1)).sum(), rel=1e-9, abs=1e-12
        )


# ----------------------------------------------------------------------------
# The search.


@pytest.mark.parametrize('solver', ['euler', 'ipndm', 'dpmpp'])
def test_the_best_of_all_schedules_on_the_nodes_is_found(gaussian, start, solver):
    """Of Gaussian data and all 165 choices of three inner nodes, and never behind the usual schedules."""
    path = schedule_search.fine_path(gaussian, start, NODES)
    error = lambda levels: (
        schedule_search.rms(ode_solve(gaussian, start, levels, solver) - path.states[-1]).mean().item()
    )
    asked, reported = [], []
    usual, best = schedule_search.search(
        schedule_search.jump_errors(path, NODES).tolist(),
        NODES,
        5,
        lambda levels: asked.append(tuple(levels)) or error(levels),
        reported.append,
    )
    every = [[NODES[0], *inner, NODES[-1]] for inner in itertools.combinations(NODES[1:-1], 3)]
    assert best.error <= 1.0001 * min(map(error, every)) and best.error <= usual.error
    assert best.error == error(best.sigmas) and usual.error == error(usual.sigmas)
    assert len(set(asked)) == len(asked) and {found.source for found in reported} >= {'cosine', 'logsnr'}


def test_levels_move_until_no_move_helps():
    """A made-up distance whose least is far from every path that the search begins with."""
    goal = [0, 2, 7, 8, 12]
    distance = lambda levels: sum(
        abs(math.log(sigma / NODES[i])) for sigma, i in zip(levels, goal)
    )  # levels are nodes, but for the usual schedules
    errors = [[math.inf if j <= i else float(j - i) for j in range(13)] for i in range(13)]
    _, best = schedule_search.search(errors, NODES, 5, distance)
    assert best.sigmas == [NODES[i] for i in goal] and best.source == 'moved'


# ----------------------------------------------------------------------------
# The command.


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    """A folder with random networks of two classes: teacher.pkl, other.pkl, student.pkl, broken.pkl."""
    folder = tmp_path_factory.mktemp('schedules')
    torch.manual_seed(0)
    net = networks.EDMPrecond(
        8, 1, 2, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[], dropout=0
    )
    for name, std in (('teacher', 0.2), ('other', 0.2), ('broken', math.nan)):
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
            parameter.data.mul_(std / 0.2)
        save_snapshot(folder / f'{name}.pkl', net, objective='diffusion')
    save_snapshot(folder / 'student.pkl', net, objective='mcd', S=2, sigmas=[80.0, 1.0, 0.0])
    return folder


def found_by(lab, *arguments, network='teacher.pkl'):
    own = [f'--network={lab}/{network}', '--schedule', '--num=6', '--batch=4', '--nodes=9', '--steps=3']
    return invoke(search.main, *own, *map(str, arguments))


def images(lab, folder, *arguments, network='teacher.pkl'):
    own = [f'--network={lab}/{network}', f'--dest={folder}/images.npz', '--seeds=0-3', '--workers=0']
    result = invoke(generate.main, *own, *map(str, arguments))
    assert result.exit_code == 0, result.output
    with np.load(folder / 'images.npz') as file:
        return file['arr_0'], result


@pytest.mark.parametrize(
    'options, nfe',
    [
        ([], 3),
        (['--solver=dpmpp', '--order=2', '--afs'], 3),
        (['--solver=unipc', '--variant=bh1', '--to_zero'], 3),
        (['--solver=heun'], 5),
        (['--solver=euler', '--no_to_zero'], 3),
    ],
)
def test_what_is_found_is_sampled_by_the_line_and_by_the_file_alike(lab, tmp_path, options, nfe):
    """The distance that is told is that of images of the next seeds from a fine path's ends."""
    result = found_by(lab, *options, f'--save={tmp_path}/levels.txt', f'--json={tmp_path}/found.json')
    assert result.exit_code == 0, result.output
    (line,), found = result.stdout.splitlines(), json.loads((tmp_path / 'found.json').read_text())
    assert found['nfe'] == nfe and found['distance'] >= 0 and found['sigmas'][0] == 80.0

    by_line, _ = images(lab, tmp_path, *shlex.split(line))
    by_file, said = images(lab, tmp_path, f'--sigmas={tmp_path}/levels.txt')
    assert np.array_equal(by_line, by_file) and f'{nfe} evaluations each' in said.output
    assert 'Warning' not in said.output

    # The distance again, of seeds 6 to 11, from the ends of their own paths.
    net = load_network(lab / 'teacher.pkl', torch.device('cpu'))
    given = level_list.LevelList().convert(f'{tmp_path}/levels.txt', None, None)
    sampler = {
        name: found[name] for name in ('solver', 'order', 'variant', 'afs', 'to_zero') if name in found
    }
    nodes = schedule_sigmas('polynomial', 9, 0.002, 80.0).tolist()
    nodes = [80.0, *nodes[1:-1], 0.002]
    paths = teacher_paths.TeacherPaths(net, nodes, range(6, 12), 6, None, with_errors=False)
    assert paths.distance(given, **sampler) == pytest.approx(found['distance'], rel=1e-5)


def test_two_processes_find_what_one_does(lab, tmp_path):
    arguments = [
        f'--network={lab}/teacher.pkl',
        '--schedule',
        '--num=6',
        '--batch=2',
        '--nodes=9',
        '--steps=3',
    ]
    alone = invoke(search.main, *arguments, f'--json={tmp_path}/one.json')
    env = {'CUDA_VISIBLE_DEVICES': ''}
    done = run_ranks(2, 'search.py', *arguments, f'--json={tmp_path}/two.json', env=env)
    assert done.stdout == alone.stdout
    one, two = (json.loads((tmp_path / f'{name}.json').read_text()) for name in ('one', 'two'))
    assert two['distance'] == pytest.approx(one['distance'], rel=1e-9)


def test_a_dry_run_prints_the_plan_and_searches_nothing(lab, monkeypatch):
    monkeypatch.setattr(teacher_paths.TeacherPaths, '__init__', None)
    result = found_by(lab, '--dry-run', '--low=0.01', '--high=40', '--solver=dpm2')
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert (plan['first'], plan['last'], plan['nfe'], plan['levels']) == (40, 0.01, 6, 4)


def test_levels_remember_what_they_are_of(lab, tmp_path):
    """Another solver, or other options of it, are refused; another network is told."""
    assert found_by(lab, f'--save={tmp_path}/levels.txt').exit_code == 0
    common = [f'--dest={tmp_path}/images.npz', f'--sigmas={tmp_path}/levels.txt', '--seeds=0', '--workers=0']
    for option, words in (
        ('--solver=dpmpp', 'for solver ipndm, not dpmpp'),
        ('--order=2', 'for order 4, not 2'),
        ('--afs', 'for afs False, not True'),
    ):
        result = invoke(generate.main, f'--network={lab}/teacher.pkl', *common, option)
        assert_one_clear_error(result, words, status=2)
    _, said = images(lab, tmp_path, f'--sigmas={tmp_path}/levels.txt', '--solver=ipndm', network='other.pkl')
    assert 'searched for another network' in said.output


def edited(text, how):
    """The file of levels, changed."""
    lines = text.splitlines()
    record = json.loads(lines[0].partition(level_list.MARK)[2])
    mark = f'# {level_list.MARK}'
    return '\n'.join(
        {
            'a lost line': lines[:-1],
            'other evaluations': [mark + json.dumps(record | dict(nfe=7)), *lines[1:]],
            'afs': [mark + json.dumps(record | dict(afs=True)), *lines[1:]],
            'no such solver': [mark + json.dumps(record | dict(solver='xyz')), *lines[1:]],
            'white space': [' ' + lines[0].replace('# ', '#   '), *lines[1:]],
            'a mark of bytes': ['\ufeff' + lines[0], *lines[1:]],
        }[how]
    )


@pytest.mark.parametrize('how', ['a lost line', 'other evaluations', 'afs', 'no such solver'])
def test_levels_that_are_not_those_of_their_record_are_refused(lab, tmp_path, how):
    assert found_by(lab, f'--save={tmp_path}/levels.txt').exit_code == 0
    (tmp_path / 'edited.txt').write_text(edited((tmp_path / 'levels.txt').read_text(), how))
    words = [f'--dest={tmp_path}/images.npz', f'--sigmas={tmp_path}/edited.txt', '--seeds=0', '--workers=0']
    result = invoke(generate.main, f'--network={lab}/teacher.pkl', *words)
    assert_one_clear_error(result, 'the file of sigmas is damaged', status=2)


@pytest.mark.parametrize('how', ['white space', 'a mark of bytes'])
def test_an_editor_may_change_white_space(lab, tmp_path, how):
    assert found_by(lab, '--solver=dpmpp', f'--save={tmp_path}/levels.txt').exit_code == 0
    text = edited((tmp_path / 'levels.txt').read_text(), how)
    (tmp_path / 'edited.txt').write_text(text, encoding='utf-8')
    _, said = images(lab, tmp_path, f'--sigmas={tmp_path}/edited.txt')
    assert 'dpmpp of order 3, 3 evaluations each' in said.output


def test_evaluations_follow_the_record_too(lab, tmp_path):
    """validation.py, and the configuration of a training, which keeps the solver beside the numbers."""
    assert found_by(lab, '--solver=dpmpp', '--afs', f'--save={tmp_path}/levels.txt').exit_code == 0
    levels = f'{tmp_path}/levels.txt'
    np.savez(tmp_path / 'ref.npz', mu=np.zeros(2048), sigma=np.eye(2048))
    words = ['--objective=diffusion', '--arch=adm', '--cres=1', '--dry-run', '--outdir=x', '--cond=1']
    np.save(tmp_path / 'data.npy', np.zeros((8, 8, 8), np.uint8))
    data = [f'--data={tmp_path}/images.zip', '--val=1', f'--val_ref={tmp_path}/ref.npz']
    made = invoke(
        generate.main,
        f'--network={lab}/teacher.pkl',
        f'--dest={tmp_path}/images.zip',
        '--seeds=0-7',
        '--workers=0',
    )
    assert made.exit_code == 0, made.output
    options = validation.OF_ODE['sigmas'].kind.convert(levels, None, None)
    completed = level_list.complete(dict(sigmas=options, solver=None))
    assert (completed['solver'], completed['afs'], type(completed['sigmas'])) == ('dpmpp', True, list)

    planned = invoke(train.main, *words, *data, f'--val_sigmas={levels}')
    assert planned.exit_code == 0, planned.output
    recorded = json.loads(planned.stdout)['validation']
    assert (recorded['solver'], recorded['order'], recorded['afs']) == ('dpmpp', 3, True)
    refused = invoke(train.main, *words, *data, f'--val_sigmas={levels}', '--val_solver=euler')
    assert_one_clear_error(refused, 'searched for solver dpmpp, not euler', status=2)

    refused = invoke(
        validation.main,
        f'--network={lab}/teacher.pkl',
        f'--ref={tmp_path}/ref.npz',
        f'--sigmas={levels}',
        '--order=2',
    )
    assert_one_clear_error(refused, 'searched for order 3, not 2', status=2)


@pytest.mark.parametrize(
    'record, words',
    [
        ('{"solver": "ipndm"}', 'has no network in the record'),
        ('{', 'its record of the search'),
        ('[' * 10_000, 'its record of the search'),
        (json.dumps(dict(network='0' * 64, solver='\x1b[31m', afs=False, to_zero=False, nfe=3)), 'solver'),
        (
            json.dumps(dict(network='0' * 64, solver='ipndm', order=1e400, afs=0, to_zero=False, nfe=3)),
            'record',
        ),
    ],
)
def test_a_damaged_record_is_one_clear_error(lab, tmp_path, record, words):
    (tmp_path / 'levels.txt').write_text(f'# {level_list.MARK}{record}\n80\n1\n0.002\n')
    result = invoke(
        generate.main,
        f'--network={lab}/teacher.pkl',
        f'--outdir={tmp_path}',
        f'--sigmas={tmp_path}/levels.txt',
    )
    assert_one_clear_error(result, words, status=2)


def test_a_record_of_an_unknown_solver_is_one_clear_error(lab):
    net = load_network(lab / 'teacher.pkl', torch.device('cpu'))
    record = dict(network='0' * 64, solver='ipndm', afs=False, to_zero=True, nfe=3)
    given = dict(sigmas=level_list.SearchedLevels([80.0, 1.0], record), to_zero=False)
    with pytest.raises(WrongOptions, match='for to_zero True, not False'):
        level_list.follow_search(net, None, given)


@pytest.mark.parametrize(
    'arguments, words, status',
    [
        (['--log=a.jsonl'], '--log: a search for a --schedule has no such option', 2),
        (['--metric=kid', '--scan=2'], '--scan, --metric: a search for a --schedule', 2),
        (['--solver=cm'], '--solver=cm is not a solver for teachers', 2),
        (['--order=7'], "'--order': 7 is not in the range", 2),
        (['--solver=heun', '--order=2'], 'solver has no order to choose', 2),
        (['--steps=2', '--afs', '--solver=heun'], '2 steps of heun have 2 noise levels', 2),
        (['--steps=12'], '--nodes=9 are fewer than 13 noise levels', 2),
        (['--low=3', '--high=2'], '--low is not below --high', 2),
        (['--low=1', '--high=1.0000001'], '--low=1 and --high=1 leave no room', 2),
        (['--seed=4294967290'], '--seed', 2),
        (['--save=missing.txt/levels.txt/x'], 'levels.txt', 1),
    ],
)
def test_what_cannot_be_searched_is_told_with_its_cure(lab, tmp_path, monkeypatch, arguments, words, status):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'missing.txt').write_text('')
    assert_one_clear_error(found_by(lab, *arguments), words, status=status)


@pytest.mark.parametrize(
    'network, words', [('student.pkl', 'is a student or a consistency model'), ('broken.pkl', 'not finite')]
)
def test_networks_without_a_schedule_are_told(lab, network, words):
    assert_one_clear_error(found_by(lab, network=network), words)


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['--log=a.jsonl', '--nodes=9'], '--nodes: only a search for a --schedule'),
        (['--log=a.jsonl', '--solver=ipndm'], '--solver=ipndm is for --schedule'),
        ([], '--log is missing'),
    ],
)
def test_a_search_for_points_has_no_options_of_schedules(lab, arguments, words):
    assert_one_clear_error(invoke(search.main, f'--network={lab}/student.pkl', *arguments), words, status=2)
