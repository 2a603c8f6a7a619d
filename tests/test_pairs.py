"""The paired error: closed forms of linear networks, any batch size and number of processes, and what has no pairs."""

import json
import math
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
from helpers import assert_one_clear_error, run_ranks
from latents import save_latent_network, use_stand_in
from teachers import ADM, DIGITS

import dataset_tool
import fid
import generate
from dnnlib import NotFinite, UserError
from metrics.generated import GeneratedImages
from metrics.options import PairsWith, Teacher
from metrics.pairs import Deviation, Pairing, check_deterministic
from metrics.uncertainty import root_mean_interval
from sampling import generation
from training import networks
from training.checkpoint import load_network, save_snapshot
from training.consistency_ops import karras_sigmas

SHAPE = [3, 4, 4]
run = helpers.invoke


class Linear(torch.nn.Module):
    """D(x; σ) = mean + shift of the class + slope(σ) (x − mean), in FP64."""

    img_channels, img_resolution = SHAPE[0], SHAPE[1]
    sigma_min, sigma_max = 0.002, 80.0

    def __init__(self, slope, mean=0.0, shifts=(), metadata=None):
        super().__init__()
        self.slope, self.mean, self.metadata = slope, mean, metadata or {}
        self.label_dim = len(shifts)
        self.shifts = torch.nn.Parameter(torch.tensor(shifts or [0.0], dtype=torch.float64))

    def forward(self, x, sigma, class_labels=None):
        shift = 0 if class_labels is None else (class_labels.double() @ self.shifts).reshape(-1, 1, 1, 1)
        slope = self.slope(torch.as_tensor(sigma, dtype=torch.float64)).reshape(-1, 1, 1, 1)
        return self.mean + shift + slope * (x.double() - self.mean)


def gaussian(deviation, mean=0.0):
    """The denoiser of N(mean, deviation²)."""
    return Linear(lambda sigma: deviation**2 / (deviation**2 + sigma**2), mean)


def one_step(factor, mean=0.0, **facts):
    """A student whose image is mean + factor · (n − mean / 80) of the latent n, from σ = 80."""
    return Linear(lambda sigma: factor / sigma, mean, metadata=dict(sigmas=[80.0, 0.0]), **facts)


def latents(seeds):
    return generation.SeededNoise(seeds, 'cpu').randn(SHAPE).double()


OF_DATA = Deviation(0.5, 'the data')


def pairing(teacher, seeds=range(40), batch=16, deviation=OF_DATA, **more):
    return Pairing(teacher, 'teacher', seeds, batch, None, deviation=deviation, **more)


def heun_factor(deviation, steps=256):
    """What Heun's method with these steps multiplies an image's distance from the mean by, from 80 n to 0."""
    levels, factor = [*karras_sigmas(steps, 0.002, 80.0, 7.0).tolist(), 0.0], 80.0
    slope = lambda x, sigma: x * sigma / (deviation**2 + sigma**2)  # (x − D(x; σ)) / σ
    for i in range(steps):
        a, b = levels[i], levels[i + 1]
        first = slope(factor, a)
        euler = factor + (b - a) * first
        factor = factor + (b - a) * (first + slope(euler, b)) / 2 if b else euler
    return factor


# ----------------------------------------------------------------------------
# Closed forms.


def test_two_linear_students_have_the_error_of_their_difference():
    """x − y is linear in the latents n: mean, interval and quantiles follow from those of the seeds."""
    # The mean is taken off 80 n before that is scaled: the latent's part is factor (n − mean / 80).
    x = 0.3 + 0.7 * (latents(range(40)) - 0.3 / 80)
    y = 0.1 + 0.5 * (latents(range(40)) - 0.1 / 80)
    squares = (x - y).square().flatten(1).mean(1).numpy()
    found = pairing(one_step(0.5, 0.1)).error(one_step(0.7, 0.3), 'student')
    assert found['value'] == pytest.approx(math.sqrt(squares.mean()) / 0.5, rel=1e-12)
    half = 1.959964 * squares.std(ddof=1) / math.sqrt(40)
    low, high = (math.sqrt(squares.mean() + sign * half) / 0.5 for sign in (-1, 1))
    assert found['interval'] == pytest.approx([low, high], rel=1e-9)
    expected = np.quantile(np.sqrt(squares), [0.05, 0.5, 0.95]) / 0.5
    assert list(found['quantiles'].values()) == pytest.approx(expected, rel=1e-12)
    assert list(found['quantiles']) == ['5', '50', '95'] and found['num_images'] == 40
    assert (found['deviation'], found['deviation_of']) == (0.5, 'the data')


def test_a_teacher_is_solved_by_heuns_method_with_511_evaluations():
    """Of Gaussian data, the discrete solution is known, and 2e-4 beside the ODE's own."""
    teacher, n = gaussian(0.6), latents(range(40))
    y = heun_factor(0.6)
    found = pairing(teacher).error(one_step(0.8), 'student')
    rms = math.sqrt(n.square().mean())
    assert found['value'] == pytest.approx((0.8 - y) * rms / 0.5, rel=1e-10)
    assert y == pytest.approx(80 * 0.6 / math.hypot(0.6, 80), rel=3e-4)
    assert pairing(teacher).sampler == 'heun, 511 evaluations each'


def test_more_steps_of_the_teacher_come_nearer_at_second_order():
    errors = [
        pairing(gaussian(0.6)).error(gaussian(0.6), 'few', solver='heun', steps=steps)['value']
        for steps in (8, 16, 32)
    ]
    assert 3 < errors[0] / errors[1] < 6 and 3 < errors[1] / errors[2] < 6, errors


def test_a_network_has_no_distance_from_itself():
    net = gaussian(0.6)
    found = pairing(net).error(net, 'itself', solver='heun', steps=256)
    assert found['value'] == 0 and found['interval'] == [0, 0] and set(found['quantiles'].values()) == {0}


def test_without_the_data_the_deviation_is_that_of_the_teachers_images():
    y = 0.1 + 0.5 * (latents(range(40)) - 0.1 / 80)
    found = pairing(one_step(0.5, 0.1), deviation=None).error(one_step(0.7), 'student')
    assert found['deviation'] == pytest.approx(float(y.std(unbiased=False)), rel=1e-12)
    assert found['deviation_of'] == "the teacher's images"


def test_images_beyond_the_range_are_not_clamped():
    """All of these are beyond [-1, 1], where 8-bit images would all be white."""
    found = pairing(one_step(0.0, 3.0)).error(one_step(0.0, 2.0), 'student')
    assert found['value'] == pytest.approx(1 / 0.5, rel=1e-12)


@pytest.mark.parametrize('batch', [1, 7, 40, 64])
def test_the_batch_size_makes_no_difference(batch):
    value = lambda size: pairing(gaussian(0.6), batch=size, steps=8).error(one_step(0.7), 'student')
    one, other = value(16), value(batch)
    assert one['value'] == pytest.approx(other['value'], rel=1e-12)
    assert one['quantiles'] == pytest.approx(other['quantiles'], rel=1e-12)


def test_both_networks_have_the_same_labels():
    """With equal shifts of the classes the networks are equal, and with two classes exchanged they are not."""
    make = lambda shifts, sigmas: Linear(
        lambda sigma: 0.5 / sigma, shifts=shifts, metadata=dict(sigmas=sigmas)
    )
    teacher = make([0.0, 1.0], [80.0, 0.0])
    assert pairing(teacher).error(make([0.0, 1.0], [80.0, 0.0]), 'student')['value'] == 0
    found = pairing(teacher).error(make([1.0, 0.0], [80.0, 0.0]), 'student')
    assert found['value'] == pytest.approx(1 / 0.5)
    # The error is symmetric.
    back = pairing(make([1.0, 0.0], [80.0, 0.0])).error(teacher, 'teacher')
    assert back['value'] == pytest.approx(found['value'], rel=1e-12)
    fixed = Pairing(
        teacher, 'teacher', range(8), 8, generation.fixed_labels(1), deviation=Deviation(0.5, 'data')
    )
    assert fixed.error(make([0.3, 1.0], [80.0, 0.0]), 'student')['value'] == 0


def test_the_teachers_images_are_made_once():
    calls = []
    teacher = gaussian(0.6)
    teacher.register_forward_hook(lambda *_: calls.append(1))
    pairs = pairing(teacher)
    pairs.error(one_step(0.7), 'student')
    made = len(calls)
    pairs.error(one_step(0.6), 'student')
    assert len(calls) == made == 3 * 511


def test_the_interval_holds_the_error_of_all_images():
    """In 95 % of samples of 200 squared errors of a skew distribution; 400 samples leave an error of 1.1 %."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        low, high = root_mean_interval(rng.gamma(4.0, 0.25, 200))
        inside += low <= 1 <= high
    assert 0.92 < inside / 400 < 0.975


# ----------------------------------------------------------------------------
# What has no pairs.


def test_images_that_are_not_finite_are_an_error_that_names_their_seeds():
    broken = one_step(0.5)
    broken.slope = lambda sigma: torch.tensor(math.nan)
    with pytest.raises(NotFinite, match=r'^student: 40 of 40 images are not finite.*seeds 0-39') as error:
        pairing(gaussian(0.6)).error(broken, 'student')
    assert error.value.counts == dict(nonfinite=40)
    with pytest.raises(NotFinite, match=r'^teacher .student, 1 evaluations each.: 40 of 40'):
        pairing(broken).error(one_step(0.5), 'student')


def test_samplers_that_draw_noise_on_the_way_have_no_pairs():
    """A consistency model has them in one step, and a teacher without churn."""
    model = gaussian(0.6)
    model.metadata = dict(solver='cm')
    check_deterministic(model, 'model', 'cm', 1)
    with pytest.raises(UserError, match=r'model is sampled with noise that is drawn on the way.*in one step'):
        check_deterministic(model, 'model', 'cm', 2)
    check_deterministic(gaussian(0.6), 'teacher', 'heun', 4, S_churn=0.0)
    with pytest.raises(UserError, match='leave S_churn out'):
        check_deterministic(gaussian(0.6), 'teacher', 'heun', 4, S_churn=10.0)


def test_networks_of_other_images_or_labels_have_no_pairs():
    pairs, labeled = pairing(gaussian(0.6)), Linear(lambda sigma: sigma, shifts=[0.0, 1.0])
    with pytest.raises(
        UserError, match='student makes images of 4x4x3 with 2 classes, and teacher of 4x4x3 with no'
    ):
        pairs.error(labeled, 'student')
    larger = gaussian(0.6)
    larger.img_resolution = 8
    with pytest.raises(UserError, match='student makes images of 8x8x3'):
        pairs.error(larger, 'student')
    latent = gaussian(0.6)
    latent.metadata = dict(encoder=dict(class_name='StabilityVAEEncoder'))
    with pytest.raises(
        UserError, match='student makes what StabilityVAEEncoder decodes, and teacher what pixels'
    ):
        pairs.error(latent, 'student')
    labeled.metadata = dict(label_kind='classes')
    untaught = Linear(
        lambda sigma: sigma, shifts=[0.0, 1.0], metadata=dict(label_kind='classes', classes='0')
    )
    with pytest.raises(UserError, match='teacher has seen no images of classes 1'):
        pairing(untaught).error(labeled, 'student')


def test_images_without_a_deviation_have_no_paired_error():
    with pytest.raises(UserError, match='all values of the images are equal'):
        pairing(one_step(0.0, 1.0), deviation=None).error(one_step(0.5), 'student')


# ----------------------------------------------------------------------------
# --pairs-with.


@pytest.mark.parametrize(
    'text, expected',
    [
        ('teacher.pkl', ('teacher.pkl', None, None)),
        ('teacher.pkl:heun', ('teacher.pkl', 'heun', None)),
        ('teacher.pkl:heun:64', ('teacher.pkl', 'heun', 64)),
        ('https://host:8080/a:b.pkl', ('https://host:8080/a:b.pkl', None, None)),
        ('https://host:8080/a.pkl:dpmpp:20', ('https://host:8080/a.pkl', 'dpmpp', 20)),
        ('runs/10:30/teacher.pkl:best:511', ('runs/10:30/teacher.pkl', 'best', 511)),
        ('models:v1:heun:8', ('models:v1', 'heun', 8)),
    ],
)
def test_solver_and_steps_are_read_from_the_right(text, expected):
    assert Teacher().convert(text, None, None) == PairsWith(*expected)


def test_a_file_with_colons_in_its_name_is_that_file(tmp_path):
    path = tmp_path / 'a.pkl:heun:7'
    path.write_bytes(b'')
    assert Teacher().convert(str(path), None, None) == (str(path), None, None)


@pytest.mark.parametrize(
    'options, words',
    [
        (['--pairs-with=t.pkl:heum:256'], 'is not NETWORK[:SOLVER[:STEPS]], as in teacher.pkl:heun:256'),
        (['--pairs-with=t.pkl:256'], 'is not NETWORK[:SOLVER[:STEPS]]'),
        (['--pairs-with=t.pkl:heun:'], 'is not NETWORK[:SOLVER[:STEPS]]'),
        (['--pairs-with=t.pkl:heun:1.5'], 'is not NETWORK[:SOLVER[:STEPS]]'),
        (['--pairs-with=:heun:8'], 'is not NETWORK[:SOLVER[:STEPS]]'),
        (['--pairs-with=t.pkl:heun:0'], '--pairs-with'),
        (['--pairs-num=10'], '--pairs-num needs --pairs-with=PKL'),
        (['--metrics=paired_error'], '--metrics=paired_error needs --pairs-with=PKL'),
        (['--pairs-with=t.pkl', '--pairs-num=11'], '--seeds=0-9 are 10, fewer than the 11 pairs'),
        (['--pairs-with=t.pkl', '--pairs-num=1'], '--pairs-num'),
        (
            ['--pairs-with=t.pkl', '--metrics=paired_error', '--detector=d'],
            '--detector: not used by paired_error',
        ),
    ],
)
def test_wrong_options_are_usage_errors(options, words):
    result = run(fid.main, 'calc', '--network=x.pkl', '--seeds=0-9', '--ref=z', *options)
    assert_one_clear_error(result, words, status=2)


def test_a_folder_of_images_has_no_pairs():
    result = run(fid.main, 'calc', '--images=x', '--ref=z', '--pairs-with=t.pkl')
    assert_one_clear_error(result, '--pairs-with is for --network', status=2)


# ----------------------------------------------------------------------------
# fid.py calc.


@pytest.fixture(scope='module')
def lab(tmp_path_factory, teacher, digits, rulers):
    """A student of one step with the teacher's weights, and options to measure it."""
    folder = tmp_path_factory.mktemp('pairs')
    net = load_network(teacher)
    own = dict(net.metadata, sigmas=[80.0, 0.0], solver='student', S=1)
    save_snapshot(folder / 'student.pkl', net, **own)
    options = [f'--ref={rulers / "pca.npz"}', f'--detector={rulers / "pca.pt"}', '--seeds=0-29', '--batch=8']
    return SimpleNamespace(
        student=folder / 'student.pkl', teacher=teacher, digits=digits, options=options, rulers=rulers
    )


def calc(lab, path, *options, network=None):
    network = network or lab.student
    result = run(fid.main, 'calc', f'--network={network}', *lab.options, f'--json={path}', *options)
    assert result.exit_code == 0, result.output
    return json.loads(path.read_text()), result


def by_hand(lab, seeds, steps=4):
    """(paired error times deviation, images of the teacher) by EDM's labels and latents, from the networks' outputs."""
    nets = load_network(lab.student), load_network(lab.teacher)
    x, y = (
        generation.generate_latents(net, seeds, None, solver, n)
        for net, solver, n in zip(nets, ('student', 'heun'), (1, steps))
    )
    return float((x - y).square().mean().sqrt()), y


def test_the_error_stands_beside_the_distance(lab, tmp_path):
    """The number on stdout remains the distance; the deviation is that of the data set, as --stats has it."""
    found, result = calc(lab, tmp_path / 'fid.json', f'--pairs-with={lab.teacher}:heun:4', '--pairs-num=20')
    assert list(found) == ['fid', 'paired_error']
    assert float(result.stdout) == pytest.approx(found['fid']['value'], rel=1e-9)
    run(dataset_tool.main, f'--source={lab.digits}', '--stats', f'--json={tmp_path}/stats.json')
    std = json.loads((tmp_path / 'stats.json').read_text())['std']
    error = found['paired_error']
    assert error['deviation'] == pytest.approx(std, rel=1e-12)
    assert error['deviation_of'] == str(lab.rulers / 'pca.npz')
    assert error['value'] == pytest.approx(by_hand(lab, range(20))[0] / std, rel=1e-5)
    assert error['interval'][0] < error['value'] < error['interval'][1] and error['num_images'] == 20
    assert error['reference_sampler'] == dict(solver='heun', steps=4, sampler='heun, 7 evaluations each')
    assert 'Paired error' in result.stderr and '5 %' in result.stderr and str(lab.teacher) in result.stderr


def test_alone_it_needs_neither_detector_nor_reference(lab, tmp_path):
    path = tmp_path / 'pairs.json'
    result = run(
        fid.main,
        'calc',
        f'--network={lab.student}',
        '--seeds=0-9',
        '--seeds=10-19',
        '--metrics=paired_error',
        f'--pairs-with={lab.teacher}:heun:4',
        f'--json={path}',
    )
    assert result.exit_code == 0, result.output
    found = json.loads(path.read_text())
    assert list(found) == ['paired_error']
    expected = []
    for seeds in (range(10), range(10, 20)):
        error, y = by_hand(lab, seeds)
        expected.append(error / float(y.std(unbiased=False)))
    assert [each['value'] for each in found['paired_error']['sets']] == pytest.approx(expected, rel=1e-5)
    assert float(result.stdout) == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert found['paired_error']['sets'][0]['deviation_of'] == "the teacher's images"


def test_the_deviation_of_a_reference_of_images_is_theirs(lab, tmp_path):
    """And a reference that does not record it is noted."""
    pairs = f'--pairs-with={lab.teacher}:heun:4'
    of_file, _ = calc(lab, tmp_path / 'a.json', pairs)
    of_images, _ = calc(lab, tmp_path / 'b.json', pairs, f'--ref={lab.digits}')
    a, b = of_file['paired_error'], of_images['paired_error']
    assert b['deviation'] == pytest.approx(a['deviation'], rel=1e-12) and b['deviation_of'] == str(lab.digits)
    with np.load(lab.rulers / 'pca.npz') as file:
        np.savez(tmp_path / 'old.npz', **{key: file[key] for key in file.files if key != 'pixel_std'})
    found, result = calc(lab, tmp_path / 'c.json', pairs, f'--ref={tmp_path}/old.npz')
    assert found['paired_error']['deviation_of'] == "the teacher's images"
    assert 'does not record the standard deviation' in result.stderr


def test_the_teacher_itself_has_no_error_and_the_cache_changes_nothing(lab, tmp_path):
    options = [
        '--pairs-with=' + str(lab.teacher) + ':heun:4',
        '--metrics=paired_error',
        f'--cache={tmp_path}/cache',
    ]
    detector = [option for option in lab.options if not option.startswith('--detector')]
    lab = SimpleNamespace(**{**vars(lab), 'options': detector})
    itself, _ = calc(lab, tmp_path / 'a.json', *options, '--steps=4', network=lab.teacher)
    assert itself['paired_error']['value'] == 0 and itself['paired_error']['interval'] == [0, 0]
    assert len(list((tmp_path / 'cache').glob('paired-images-*/*.npz'))) == 4
    cached, _ = calc(lab, tmp_path / 'b.json', *options)
    fresh, _ = calc(lab, tmp_path / 'c.json', *options[:-1])
    assert cached == fresh
    # Other steps have images of their own.
    calc(lab, tmp_path / 'd.json', *options, f'--pairs-with={lab.teacher}:heun:5')
    assert len(list((tmp_path / 'cache').glob('paired-images-*'))) == 2


def test_any_number_of_processes_gives_the_same_error(lab, tmp_path):
    """Batches of 8 of 30 pairs on one, two and three processes."""
    found = []
    for processes in (1, 2, 3):
        path = tmp_path / f'{processes}.json'
        result = run_ranks(
            processes,
            'fid.py',
            'calc',
            f'--network={lab.student}',
            *lab.options,
            f'--pairs-with={lab.teacher}:heun:4',
            f'--json={path}',
        )
        assert len(result.stdout.splitlines()) == 1
        found.append(json.loads(path.read_text())['paired_error'])
    assert found[0] == found[1] == found[2]


def test_the_error_of_latents_is_that_of_their_images(tmp_path, monkeypatch):
    """A decoded image is what a stand-in VAE makes of the latents."""
    use_stand_in(monkeypatch)
    student = save_latent_network(tmp_path / 'student.pkl', sigmas=[80.0, 0.0], solver='student')
    teacher = save_latent_network(tmp_path / 'teacher.pkl')
    nets = load_network(student), load_network(teacher)
    encoder = GeneratedImages(nets[0], range(4), 4)
    assert encoder.image_shape[0] == 3
    from training.networks import encoders

    decode = encoders.encoder_of(nets[0], 'cpu').decode_levels
    x, y = (
        decode(generation.generate_latents(net, range(4), None, solver, n)).double() / 127.5
        for net, solver, n in zip(nets, ('student', 'heun'), (1, 4))
    )
    found = Pairing(nets[1], 'teacher', range(4), 4, None, 'heun', 4, Deviation(0.5, 'data')).error(
        nets[0], 'student'
    )
    assert found['value'] == pytest.approx(float((x - y).square().mean().sqrt()) / 0.5, rel=1e-6)


def test_a_student_of_a_guided_teacher_is_compared_with_that(lab, tmp_path):
    """--guide is of the teacher then, and a student that records guidance is not compared without a warning."""
    torch.manual_seed(1)
    weak = networks.EDMPrecond(**DIGITS, **ADM)
    save_snapshot(tmp_path / 'weak.pkl', weak, objective='diffusion')
    guided = dict(guide=str(tmp_path / 'weak.pkl'), guidance=2.0)
    net = load_network(lab.student)
    save_snapshot(tmp_path / 'student.pkl', net, **{**net.metadata, **guided})
    pairs = f'--pairs-with={lab.teacher}:heun:4'
    plain, result = calc(lab, tmp_path / 'a.json', pairs, network=tmp_path / 'student.pkl')
    assert 'was distilled from a teacher that was guided' in result.stderr
    options = [f'--guide={guided["guide"]}', '--guidance=2']
    found, result = calc(lab, tmp_path / 'b.json', pairs, *options, network=tmp_path / 'student.pkl')
    assert 'Warning: ' + str(tmp_path) not in result.stderr
    error, other = found['paired_error'], plain['paired_error']
    assert error['value'] != other['value'] and found['fid']['value'] == plain['fid']['value']
    assert error['reference_sampler']['sampler'] == 'heun, 7 evaluations each and 7 of the guide'


def test_a_class_is_that_of_both_networks(lab, tmp_path):
    found, _ = calc(lab, tmp_path / 'a.json', f'--pairs-with={lab.teacher}:heun:4', '--class=3')
    choose = generation.fixed_labels(3)
    nets = load_network(lab.student), load_network(lab.teacher)
    x, y = (
        generation.generate_latents(net, range(30), choose, solver, n)
        for net, solver, n in zip(nets, ('student', 'heun'), (1, 4))
    )
    error = found['paired_error']
    assert error['value'] * error['deviation'] == pytest.approx(
        float((x - y).square().mean().sqrt()), rel=1e-5
    )


@pytest.mark.parametrize('broken', ['student', 'teacher'])
def test_a_network_whose_images_are_not_finite_ends_all_processes(lab, tmp_path, broken):
    net = load_network(lab.student if broken == 'student' else lab.teacher)
    with torch.no_grad():
        next(net.parameters()).fill_(math.nan)
    path = tmp_path / 'broken.pkl'
    save_snapshot(path, net, **net.metadata)
    paths = dict(student=lab.student, teacher=lab.teacher) | {broken: path}
    result = run(
        fid.main,
        'calc',
        f'--network={paths["student"]}',
        '--seeds=0-9',
        '--metrics=paired_error',
        f'--pairs-with={paths["teacher"]}:heun:2',
    )
    assert_one_clear_error(result, str(path), '10 of 10 images are not finite', 'There is no paired error')


def test_files_that_do_not_fit_are_refused_before_any_work(lab, tmp_path):
    small = networks.EDMPrecond(img_resolution=16, img_channels=1, label_dim=10, **ADM)
    save_snapshot(tmp_path / 'larger.pkl', small, objective='diffusion')
    for pairs, words in (
        (f'{tmp_path}/larger.pkl', '16x16x1 with 10 classes: they have no pairs'),
        (f'{tmp_path}/missing.pkl', '--pairs-with: '),
        (f'{lab.student}:dpmpp', 'solves the ODE of a diffusion model'),
    ):
        result = run(fid.main, 'calc', f'--network={lab.student}', *lab.options, f'--pairs-with={pairs}')
        assert_one_clear_error(result, words, status=result.exit_code)
        assert result.exit_code in (1, 2) and result.stdout == ''


def test_images_of_files_are_measured_as_before(lab, tmp_path):
    """generate.py's images have the distance of --network, which an option of pairs leaves alone."""
    run(generate.main, f'--network={lab.student}', f'--outdir={tmp_path}/images', '--seeds=0-29', '--batch=8')
    options = [option for option in lab.options if not option.startswith('--seeds')]
    result = run(fid.main, 'calc', f'--images={tmp_path}/images', '--num=30', *options)
    found, _ = calc(lab, tmp_path / 'fid.json', f'--pairs-with={lab.teacher}:heun:4')
    assert float(result.stdout) == pytest.approx(found['fid']['value'], rel=1e-9)
