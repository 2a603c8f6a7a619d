"""Solvers of teachers behind samplers.sample and commands: levels, evaluations, refusals, records."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gaussian import Gaussian
from helpers import assert_one_clear_error, invoke, lines, run_ranks

import fid
import generate
import train
import validation
from dnnlib import UserError, WrongOptions
from sampling import generation, options
from training import samplers
from training.checkpoint import load_network, save_snapshot
from training.samplers import schedule_sigmas
from training.solvers import ODE_SOLVERS, ode_solve

FAST = ['ipndm', 'ipndm_v', 'deis', 'dpmpp', 'unipc', 'dpm2']
TEACHERS = ('edm-adm-cond', 'vp-ddpmpp-cond', 've-ncsnpp-uncond', 'iddpm-adm-cond', 'edm2-cond')
LIST = [80.0, 6.0, 1.0, 0.2, 0.002]


class Counting:
    """A denoiser of Gaussian data that records its noise levels, and refuses to round them."""

    def __init__(self, sigma_min=0.0, sigma_max=math.inf, **metadata):
        self.sigma_min, self.sigma_max, self.metadata, self.asked = sigma_min, sigma_max, metadata, []
        self.gaussian = Gaussian(0.25)

    def __call__(self, x, sigma, class_labels=None):
        self.asked.append(float(sigma))
        return self.gaussian(x, sigma)


@pytest.fixture
def latents():
    return torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))


# ----------------------------------------------------------------------------
# Evaluations and levels.


@pytest.mark.parametrize('afs', [None, True])
@pytest.mark.parametrize('to_zero', [None, False, True])
@pytest.mark.parametrize(
    'solver, order', [(name, k) for name, known in ODE_SOLVERS.items() for k in known.orders or (None,)]
)
def test_evaluations_are_as_many_as_they_are_said_to_be(latents, solver, order, to_zero, afs):
    """K of `steps=K`, but for heun and dpm2; of a list, those that its levels need."""
    given = dict(order=order, to_zero=to_zero, afs=afs)
    given = {name: value for name, value in given.items() if value is not None}
    for steps, sigmas in [(2, None), (3, None), (8, None), (None, LIST), (None, [80.0, 5.0, 0.5])]:
        net = Counting()
        chosen = given if sigmas is None else dict(given, sigmas=sigmas)
        images = samplers.sample(net, latents, None, solver, steps, **chosen)
        resolved = samplers.resolve(net, solver, steps, **chosen)
        assert len(net.asked) == samplers.evaluations(*resolved, **chosen) and images.isfinite().all()
        if solver not in ('heun', 'dpm2'):
            assert resolved[1] == len(net.asked) == steps or sigmas
        assert f'{len(net.asked)} evaluations each' in samplers.describe(*resolved, **chosen)


def test_a_list_that_ends_in_0_has_a_last_evaluation_there(latents):
    for solver, nfe in (('euler', 4), ('ipndm', 4), ('heun', 7), ('dpm2', 7)):
        net = Counting()
        samplers.sample(net, latents, None, solver, sigmas=[*LIST[:-1], 0.0])
        assert len(net.asked) == nfe and net.asked[-1] == 0.2
        assert samplers.evaluations(*samplers.resolve(net, solver, None, sigmas=[*LIST[:-1], 0.0]),
                                    sigmas=[*LIST[:-1], 0.0]) == nfe  # fmt: skip


@pytest.mark.parametrize(
    'solver, schedule, rho',
    [
        ('ipndm', 'polynomial', 7),
        ('ipndm_v', 'polynomial', 7),
        ('deis', 'time_uniform', 2),
        ('dpmpp', 'logsnr', None),
        ('unipc', 'logsnr', None),
    ],
)
def test_levels_are_by_default_those_that_the_authors_use(latents, solver, schedule, rho):
    """K evaluations are at K of K + 1 levels, since the state at the last is the image."""
    net = Counting()
    samplers.sample(net, latents, None, solver, 5)
    expected = schedule_sigmas(schedule, 6, 0.002, 80, rho).tolist()
    assert net.asked == pytest.approx(expected[:-1], rel=1e-12)
    net.asked.clear()
    samplers.sample(net, latents, None, solver, 5, discretization='cosine', to_zero=True, afs=True)
    assert net.asked == pytest.approx(schedule_sigmas('cosine', 6, 0.002, 80).tolist()[1:], rel=1e-12)


@pytest.mark.parametrize('solver', FAST)
def test_levels_stay_within_the_networks_range_and_are_not_rounded(latents, solver):
    net = Counting(0.02, 50.0)
    net.round_sigma = None  # calling it fails
    images = samplers.sample(net, latents, None, solver, 6, to_zero=True)
    assert (
        net.asked[0] == 50
        and min(net.asked) == net.asked[-1] >= 0.02
        and net.asked[-1] == pytest.approx(0.02)
    )
    x = latents.double() * 50
    sigmas = samplers.teachers.ode_levels(
        net, solver, 6, samplers.teachers.SolverOptions(to_zero=True)
    ).sigmas
    denoiser = lambda x, sigma: net.gaussian(x, sigma)
    torch.testing.assert_close(images, ode_solve(denoiser, x, sigmas, solver, to_zero=True), rtol=0, atol=0)


@pytest.mark.parametrize('name', TEACHERS)
def test_every_kind_of_teacher_is_sampled(fixtures, name):
    """Of EDM's, VP, VE, iDDPM and EDM2's preconditioning; lists are taken as they are, within the network's range."""
    net = load_network(fixtures / f'{name}.pkl')
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, net.img_channels, net.img_resolution, net.img_resolution, generator=generator)
    labels = torch.eye(net.label_dim)[:2] if net.label_dim else None
    low, high = samplers.clip_range(net, 0.002, 80)
    with torch.no_grad():
        images = samplers.sample(net, x, labels, 'unipc', 3)
        listed = samplers.sample(
            net, x, labels, 'unipc', sigmas=schedule_sigmas('logsnr', 4, low, high).clamp(low, high).tolist()
        )
    assert images.dtype == torch.float64 and images.isfinite().all() and images.std() > 0
    torch.testing.assert_close(images, listed, rtol=0, atol=1e-10)
    if net.sigma_max < 1e5:
        with pytest.raises(WrongOptions, match='outside of what the network knows'):
            samplers.sample(net, x, labels, 'unipc', sigmas=[net.sigma_max * 1.01, 1.0])


def test_best_is_chosen_by_the_number_of_evaluations(latents):
    resolve = lambda steps, **options: samplers.resolve(Counting(), 'best', steps, **options)
    assert resolve(1) == ('ipndm', 1) and resolve(8) == ('ipndm', 8) and resolve(34) == ('ipndm', 34)
    assert resolve(None) == ('ipndm', 18) and resolve(35) == resolve(36) == ('heun', 18)
    assert resolve(511) == ('heun', 256) and resolve(8, to_zero=True, afs=True) == ('ipndm', 8)
    torch.testing.assert_close(
        samplers.sample(Counting(), latents, None, 'best', 8),
        samplers.sample(Counting(), latents, None, 'ipndm', 8),
    )


# ----------------------------------------------------------------------------
# Refusals.


@pytest.mark.parametrize(
    'solver, steps, given, message',
    [
        ('dpmpp', 5, dict(order=4), 'dpmpp order is one of 2, 3'),
        ('dpm2', 5, dict(order=2), 'no order to choose'),
        ('euler', 5, dict(order=2), 'euler sampler has no option order'),
        ('ipndm', 5, dict(variant='bh1'), 'no variant to choose'),
        ('addim', 5, dict(afs=True), 'addim sampler has no option afs'),
        ('heun', 5, dict(afs=True, S_churn=10.0), 'leave out S_churn'),
        ('heun', 1, dict(afs=True), 'no evaluation of the network'),
        ('ipndm', None, dict(sigmas=[80.0, 1.0, 1.0]), 'must fall'),
        ('ipndm', None, dict(sigmas=[math.inf, 1.0]), 'must fall'),
        ('ipndm', None, dict(sigmas=[]), 'must fall'),
        ('ipndm', None, dict(sigmas=[80.0]), 'a step needs two'),
        ('ipndm', None, dict(sigmas=[80.0, 0.0], to_zero=True), 'end above 0'),
        ('ipndm', None, dict(sigmas=[80.0, 0.0], to_zero=False), 'to_zero is off'),
        ('ipndm', 8, dict(sigmas=LIST), 'makes 4 steps, not 8'),
        ('ipndm', None, dict(sigmas=LIST, rho=5.0), 'leave out rho'),
        ('ipndm', None, dict(sigmas=[100.0, 1.0]), 'noise level 100 is outside .* 0 to 90'),
        ('best', 8, dict(order=3), 'its own order'),
        ('best', None, dict(sigmas=LIST), 'its own sigmas'),
    ],
)
def test_what_does_not_go_together_is_a_usage_error(latents, solver, steps, given, message):
    with pytest.raises(WrongOptions, match=message):
        samplers.sample(Counting(sigma_max=90.0), latents, None, solver, steps, **given)


def test_schedules_and_churn_of_edm_are_for_its_solvers(latents):
    for given in (dict(schedule='vp'), dict(scaling='vp'), dict(S_churn=1.0)):
        with pytest.raises(UserError, match='ipndm sampler has no option'):
            samplers.sample(Counting(), latents, None, 'ipndm', 4, **given)


@pytest.mark.parametrize('solver', [*FAST, 'best'])
def test_students_and_consistency_models_refuse_them_by_name(solver):
    for metadata, what in (
        (dict(sigmas=[80.0, 2.5, 0.0]), 'a student of 2 steps'),
        (dict(solver='cm'), 'a consistency model'),
        (dict(solver='cm', sigmas=[80.0, 0.0]), 'a consistency model'),
    ):
        with pytest.raises(
            WrongOptions, match=f'{solver} solves the ODE of a diffusion model, and this is {what}'
        ):
            samplers.resolve(SimpleNamespace(metadata=metadata), solver, 4)


# ----------------------------------------------------------------------------
# Command lines.


def test_the_command_line_knows_the_samplers():
    assert [*sorted(samplers.SAMPLERS, key=options.SOLVERS.index), 'best'] == options.SOLVERS
    assert options.FAST_SOLVERS == FAST
    assert {*options.OF_TEACHERS['discretization'].kind.choices} == {*samplers.teachers.DISCRETIZATIONS}


def generated(net, folder, *words):
    result = invoke(
        generate.main, f'--network={net}', f'--outdir={folder}', '--workers=0', '--seeds=0-2', *words
    )
    assert result.exit_code == 0, result.output
    return result


def test_the_command_says_solver_order_and_evaluations(teacher, tmp_path):
    result = generated(teacher, tmp_path, '--solver=best', '--steps=4')
    assert '(ipndm of order 4, 4 evaluations each)' in result.output
    assert '--solver=best: ipndm of order 4, 4 evaluations each.' in result.stderr
    words = ['--solver=dpmpp', '--order=2', '--steps=3', '--afs', '--to-zero', '--disc=polynomial']
    assert '(dpmpp of order 2, 3 evaluations each)' in generated(teacher, tmp_path, *words).output
    file = tmp_path / 'levels.txt'
    file.write_text('# found by hand\n80, 5.8\n0.9 0.002  # the end\n')
    assert (
        '(dpm2, 6 evaluations each)'
        in generated(teacher, tmp_path, '--solver=dpm2', f'--sigmas={file}').output
    )


@pytest.mark.parametrize('solver', ODE_SOLVERS)
def test_images_do_not_depend_on_how_seeds_are_split(teacher, solver):
    """As processes and batches split them."""
    net = load_network(teacher)
    whole = generation.generate_batch(net, range(6), solver=solver, steps=4)
    parts = [
        generation.generate_batch(net, seeds, solver=solver, steps=4) for seeds in ([0, 2, 4], [1, 3], [5])
    ]
    apart = torch.cat(parts)[[0, 3, 1, 4, 2, 5]]
    assert (whole.int() - apart.int()).abs().max() <= 1 and whole.float().std() > 5


def test_two_processes_make_the_images_of_one(teacher, tmp_path):
    """Under torchrun, by a solver that remembers the most."""
    words = [f'--network={teacher}', '--solver=unipc', '--steps=4', '--seeds=0-4', '--batch=2', '--workers=0']
    assert invoke(generate.main, *words, f'--dest={tmp_path}/one.npz').exit_code == 0
    run_ranks(2, 'generate.py', *words, f'--dest={tmp_path}/two.npz', env={'CUDA_VISIBLE_DEVICES': ''})
    one, two = (np.load(tmp_path / f'{name}.npz')['arr_0'].astype(int) for name in ('one', 'two'))
    assert abs(one - two).max() <= 1 and one.std() > 5


@pytest.mark.parametrize(
    'words, message',
    [
        (['--solver=dpmpp', '--order=4'], 'dpmpp order is one of 2, 3'),
        (['--solver=ipndm', '--order=5'], '--order'),
        (['--order=2'], 'heun sampler has no option order'),
        (['--solver=ipndm', '--sigmas=80,1,5'], 'fall'),
        (['--solver=ipndm', '--sigmas=80,nan'], 'neither a list'),
        (['--solver=ipndm', '--sigmas=1e7,1'], 'range'),
        (['--solver=ipndm', '--sigmas=none.txt'], 'neither a list such as'),
        (['--solver=ipndm', '--sigmas=80,1,0.002', '--steps=5'], 'makes 2 steps, not 5'),
        (['--solver=best', '--disc=logsnr'], 'its own discretization'),
    ],
)
def test_a_wrong_combination_exits_with_status_2(teacher, tmp_path, words, message):
    result = invoke(generate.main, f'--network={teacher}', f'--outdir={tmp_path}/out', '--workers=0', *words)
    assert_one_clear_error(result, message, status=2)
    assert not (tmp_path / 'out').exists()


def test_a_student_refuses_them_with_status_2(teacher, tmp_path):
    student = tmp_path / 'student.pkl'
    save_snapshot(student, load_network(teacher), objective='mcd', S=2, sigmas=[80.0, 2.5, 0.0])
    for words, message in ((['--solver=ipndm'], 'student of 2 steps'), (['--afs'], 'no option afs')):
        result = invoke(generate.main, f'--network={student}', f'--outdir={tmp_path}/out', *words)
        assert_one_clear_error(result, message, status=2)


def test_metrics_of_a_network_and_validation_take_them(teacher, rulers, tmp_path):
    ref = [f'--ref={rulers / "pca.npz"}', f'--detector={rulers / "pca.pt"}']
    words = ['--solver=deis', '--order=3', '--steps=3', '--to-zero']
    result = invoke(
        fid.main, 'calc', f'--network={teacher}', '--seeds=0-63', *ref, *words, '--batch=32',
        f'--json={tmp_path / "found.json"}',
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    result = invoke(
        validation.main,
        f'--network={teacher}',
        '--num=64',
        '--batch=32',
        f'--outdir={tmp_path}',
        *ref,
        *words,
    )
    assert result.exit_code == 0, result.stderr
    (record,) = lines(tmp_path / 'metrics-val.jsonl')
    assert (record['steps'], record['nfe']) == (3, 3)
    assert record['sampling'] == dict(solver='deis', order=3, to_zero=True)
    found = json.loads((tmp_path / 'found.json').read_text())
    assert record['fid'] == pytest.approx(found['fid']['value'], rel=1e-6)
    result = invoke(
        fid.main, 'calc', f'--network={teacher}', '--seeds=0-63', *ref, '--solver=dpm2', '--order=2'
    )
    assert_one_clear_error(result, 'no order to choose', status=2)


def test_training_of_a_teacher_validates_with_them(digits, rulers, tmp_path):
    run = [
        '--cond=1', f'--data={digits}', f'--outdir={tmp_path}', '--nosubdir', '--val=1', '--val_solver=dpmpp',
        '--val_order=2', '--val_steps=3', '--val_sigmas=80,5,1,0.002', f'--val_ref={rulers / "pca.npz"}',
    ]  # fmt: skip
    result = invoke(train.main, *run, f'--val_detector={rulers / "pca.pt"}', '--dry-run')
    (tmp_path / 'c.json').write_text(result.stdout)
    again = invoke(train.main, f'--outdir={tmp_path}', f'--config={tmp_path / "c.json"}', '--dry-run')
    recorded = json.loads(result.stdout)['validation']
    assert json.loads(again.stdout)['validation'] == recorded
    assert (recorded['solver'], recorded['order'], recorded['sigmas']) == ('dpmpp', 2, [80, 5, 1, 0.002])
    for words, message in (
        ([*run, '--val_order=4', f'--val_detector={rulers / "pca.pt"}'], 'dpmpp order is one of 2, 3'),
        (
            [*run, '--objective=ect'],
            '--val_solver, --val_order, --val_sigmas: these are for --objective=diffusion',
        ),
    ):
        assert_one_clear_error(invoke(train.main, *words), message, status=2)
