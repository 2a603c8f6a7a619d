"""generate.py, example.py and the code they share."""
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import assert_one_clear_error, run, torchrun
from PIL import Image

import generate
from training import generation
from training.checkpoint import load_network, save_snapshot
from training.consistency_ops import student_grid


def invoke(*arguments):
    return CliRunner().invoke(generate.main, list(map(str, arguments)), prog_name='generate.py')


def pixels(folder):
    return {str(path.relative_to(folder)): np.asarray(Image.open(path)) for path in sorted(folder.rglob('*.png'))}


@pytest.fixture(scope='module')
def student(teacher, tmp_path_factory):
    """A snapshot that says it is a 4-step student (its weights are the teacher's)."""
    path = tmp_path_factory.mktemp('student') / 'student.pkl'
    sigmas = student_grid(4, 0.002, 80, 7, 'full').tolist()
    save_snapshot(path, load_network(teacher), objective='mcd', S=4, sigmas=sigmas, sigma_min=0.002, sigma_max=80.0, rho=7.0, student_grid='full')
    return path


def test_an_image_depends_on_its_seed_alone(tmp_path, student):
    """One process with batches of 5, of 16, and two processes: bit-identical 8-bit images up to rounding of one level."""
    run('generate.py', f'--network={student}', f'--outdir={tmp_path / "a"}', '--seeds=0-15', '--batch=5')
    torchrun(2, 'generate.py', f'--network={student}', f'--outdir={tmp_path / "b"}', '--seeds=0-15', '--batch=4', '--steps=4')
    invoke(f'--network={student}', f'--outdir={tmp_path / "c"}', '--seeds=3,7-8')
    a, b, c = (pixels(tmp_path / name) for name in 'abc')
    assert list(a) == list(b) == [f'{seed:06d}.png' for seed in range(16)] and list(c) == ['000003.png', '000007.png', '000008.png']
    for other in (b, c):
        assert all(np.abs(a[name].astype(int) - other[name]).max() <= 1 for name in other)
    assert len({image.tobytes() for image in a.values()}) == 16


def test_solver_and_steps_default_to_what_the_snapshot_is(tmp_path, student, teacher):
    assert '(student, 4 evaluations each)' in invoke(f'--network={student}', f'--outdir={tmp_path}', '--seeds=0').output
    assert '(heun, 35 evaluations each)' in invoke(f'--network={teacher}', f'--outdir={tmp_path}', '--seeds=0').output


def test_a_published_student_is_sampled_with_its_own_steps(fixtures, tmp_path):
    result = invoke('--network', fixtures / 'published-student.pkl', f'--outdir={tmp_path}', '--seeds=0-3', '--steps=8')
    assert result.exit_code == 0 and '(student, 8 evaluations each)' in result.output
    result = invoke('--network', fixtures / 'published-student.pkl', f'--outdir={tmp_path}', '--steps=4')
    assert_one_clear_error(result, 'trained for 8 steps', '--force-steps')


def test_subfolders_hold_a_thousand_seeds_each(tmp_path, student):
    invoke(f'--network={student}', f'--outdir={tmp_path}', '--seeds=999-1000', '--subdirs')
    assert list(pixels(tmp_path)) == ['000000/000999.png', '001000/001000.png']


def test_a_class_can_be_chosen_and_changes_the_image(tmp_path, teacher):
    for k in (1, 2):
        invoke(f'--network={teacher}', f'--outdir={tmp_path / str(k)}', '--seeds=0', f'--class={k}', '--steps=4')
    assert not np.array_equal(pixels(tmp_path / '1')['000000.png'], pixels(tmp_path / '2')['000000.png'])


def test_edms_options_reach_the_sampler(tmp_path, teacher):
    """Each of them changes the image of seed 0."""
    base = ['--seeds=0', '--steps=8']
    variants = [[], ['--S_churn=40'], ['--S_churn=40', '--S_noise=1.5'], ['--S_churn=40', '--S_min=1', '--S_max=2'], ['--sigma_max=20'],
                ['--sigma_min=0.3'], ['--rho=3'], ['--solver=euler'], ['--disc=vp'], ['--disc=ve', '--schedule=ve'],
                ['--schedule=vp', '--scaling=vp']]
    images = []
    for i, options in enumerate(variants):
        result = invoke(f'--network={teacher}', f'--outdir={tmp_path / str(i)}', *base, *options)
        assert result.exit_code == 0, result.output
        images.append(pixels(tmp_path / str(i))['000000.png'].tobytes())
    assert len(set(images)) == len(variants)


@pytest.mark.parametrize('options, words', [
    (['--class=10'], ['--class=10 does not exist', '10 classes']), (['--steps=8'], ['trained for 4 steps']),
    (['--S_churn=1'], ['no option S_churn']), (['--network=nowhere.pkl'], ['nowhere.pkl'])])
def test_what_cannot_be_done_is_one_clear_error(tmp_path, student, options, words):
    assert_one_clear_error(invoke(f'--network={student}', f'--outdir={tmp_path / "out"}', *options), *words)


def test_a_hostile_snapshot_is_refused_and_nothing_of_it_runs(tmp_path):
    (tmp_path / 'hostile.pkl').write_bytes(b'cos\nsystem\n(S"touch ' + str(tmp_path / 'canary').encode() + b'"\ntR.')
    assert_one_clear_error(invoke(f'--network={tmp_path / "hostile.pkl"}', f'--outdir={tmp_path / "out"}'), 'hostile.pkl')
    assert not (tmp_path / 'canary').exists() and not (tmp_path / 'out').exists()


def test_an_unwritable_folder_is_named(tmp_path, student):
    (tmp_path / 'file').write_text('')
    assert_one_clear_error(invoke(f'--network={student}', f'--outdir={tmp_path / "file" / "x"}'), '--outdir')


@pytest.mark.parametrize('options', [['--seeds=5-1'], ['--seeds=a'], ['--solver=dpm'], ['--batch=0'], []])
def test_wrong_usage_exits_with_status_2(tmp_path, student, options):
    network = [f'--network={student}'] if options else []
    assert_one_clear_error(invoke(*network, f'--outdir={tmp_path}', *options), status=2)


def test_latents_come_before_labels_and_churn_noise():
    """EDM's order for one generator per seed."""
    noise = generation.SeededNoise([5, 6], 'cpu')
    latents, labels, churn = noise.randn([1, 2, 2]), noise.randint(10), noise.randn_like(torch.zeros(2, 3))
    g = torch.Generator().manual_seed(6)
    assert torch.equal(latents[1], torch.randn(1, 2, 2, generator=g)) and labels[1] == torch.randint(10, [], generator=g)
    assert torch.equal(churn[1], torch.randn(3, generator=g))


def test_rounding_is_edms():
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).reshape(5, 1, 1, 1)
    assert generation.to_uint8(values).flatten().tolist() == [0, 0, 128, 255, 255]


def test_the_example_draws_a_grid_for_students_and_teachers(tmp_path, student, teacher):
    for name, snapshot in dict(student=student, teacher=teacher).items():
        run('example.py', snapshot, tmp_path / f'{name}.png')
        assert Image.open(tmp_path / f'{name}.png').size == (80, 32)
    assert_one_clear_error(run('example.py', tmp_path / 'none.pkl', tmp_path / 'x.png', check=False), 'none.pkl')


def test_validation_of_saved_snapshots_writes_the_loops_lines(tmp_path, student, teacher, rulers):
    done = run('validation.py', f'--network={student}', f'--network={teacher}', f'--ref={rulers / "pca.npz"}', f'--detector={rulers / "pca.pt"}',
               f'--outdir={tmp_path}', '--num=64', '--batch=32')
    records = [json.loads(line) for line in (tmp_path / 'metrics-val.jsonl').read_text().splitlines()]
    assert [json.loads(line) for line in done.stdout.splitlines()] == records
    assert [r['nfe'] for r in records] == [4, 35]
    assert set(records[0]) == {'kimg', 'nimg', 'fid', 'num_images', 'steps', 'nfe', 'ema', 'seconds'}
    run('generate.py', f'--network={student}', f'--outdir={tmp_path / "images"}', '--seeds=0-63')
    value = run('fid.py', 'calc', f'--images={tmp_path / "images"}', f'--ref={rulers / "pca.npz"}', f'--detector={rulers / "pca.pt"}', '--num=64')
    assert float(value.stdout.splitlines()[-1]) == pytest.approx(records[0]['fid'], rel=1e-3)
