"""Guidance in sampling: against closed forms, its interval, its cost, and guides that do not fit."""

import functools
import itertools
import json

import numpy as np
import pytest
import torch
from gaussian import Gaussian
from helpers import assert_one_clear_error, invoke, lines, run_ranks
from teachers import ADM, DIGITS, TEACHERS

import edit
import fid
import generate
import search
import validation
from training import execution, guidance, networks, samplers
from training.checkpoint import load_network, network_digest, save_snapshot

# Two networks of the same data; D_weak is of a larger spread.
STRONG, WEAK = 0.5, 0.9
WEIGHT = 2.5


class GaussianNet(Gaussian):
    """With the attributes of a network; counts its evaluations."""

    img_channels, img_resolution, label_dim = 1, 2, 0

    def __init__(self, variance):
        super().__init__(variance)
        self.evaluated = []

    def __call__(self, x, sigma, class_labels=None, **_):
        self.evaluated.append(len(x))
        return super().__call__(x, sigma)

    def round_sigma(self, sigma):
        return sigma


def guided_gaussian(interval=None, weight=WEIGHT):
    nets = GaussianNet(STRONG**2), GaussianNet(WEAK**2)
    return guidance.GuidedDenoiser(*nets, weight, interval)


def solution(x, sigma_t, sigma_s, weight=WEIGHT):
    """x at sigma_s on the guided ODE through x at sigma_t.

    dx/dsigma = (x − D_g) / sigma is w times the slope of D plus 1 − w times that of D_weak, and the slope for
    a variance v is x sigma / (v + sigma²), whose integral of dx/x is ln(v + sigma²) / 2.
    """
    spread = lambda deviation: (deviation**2 + sigma_s**2) / (deviation**2 + sigma_t**2)
    return x * spread(STRONG) ** (weight / 2) * spread(WEAK) ** ((1 - weight) / 2)


def test_the_guided_sampler_is_the_closed_form_at_second_order():
    """Twice as many steps of Heun's method have a quarter of the error."""
    latents = torch.randn([3, 1, 2, 2], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = solution(latents * 80, 80, 0.002)
    errors = [
        (samplers.sample(guided_gaussian(), latents, solver='heun', steps=n, to_zero=False) / exact - 1)
        .abs()
        .max()
        for n in (50, 100, 200)
    ]
    assert errors[-1] < 1e-3 and all(3.5 < a / b < 4.5 for a, b in itertools.pairwise(errors)), errors
    unguided = solution(latents * 80, 80, 0.002, weight=1)
    assert (unguided / exact - 1).abs().min() > 0.3  # another image


@pytest.mark.parametrize('solver', ['ipndm', 'dpmpp', 'unipc', 'deis', 'dpm2', 'euler', 'addim'])
def test_every_solver_takes_the_guided_network(solver):
    """All solutions meet; Euler's of 2,000 steps is within 1 %. The variance that aDDIM adds is off."""
    latents = torch.ones([2, 1, 2, 2], dtype=torch.float64)
    steps, options = (2000, {}) if solver in ('euler', 'addim') else (100, dict(to_zero=False))
    options |= dict(xvar_scale=0.0) if solver == 'addim' else {}
    images = samplers.sample(guided_gaussian(), latents, solver=solver, steps=steps, **options)
    assert torch.allclose(images, solution(latents * 80, 80, 0.002), rtol=1e-2)


def test_outside_of_the_interval_the_network_alone_is_solved():
    """Levels at the ends of the interval, so that no step crosses them: three closed forms in turn."""
    interval, latents = (0.2, 5.0), torch.ones([2, 1, 2, 2], dtype=torch.float64)
    parts = [
        torch.logspace(*torch.tensor(ends).log10().tolist(), 200)
        for ends in ((80, 5.0), (5.0, 0.2), (0.2, 0.002))
    ]
    sigmas = sorted({float(s) for part in parts for s in part.double()}, reverse=True)
    net = guided_gaussian(interval)
    images = samplers.sample(net, latents, solver='heun', sigmas=sigmas)
    x = solution(latents * 80, 80, 5.0, weight=1)
    x = solution(solution(x, 5.0, 0.2), 0.2, 0.002, weight=1)
    assert torch.allclose(images, x, rtol=2e-3)
    assert not torch.allclose(images, solution(latents * 80, 80, 0.002), rtol=0.05)


def test_the_guide_is_evaluated_only_where_it_has_an_effect_and_is_counted():
    net, latents = guided_gaussian((0.2, 5.0)), torch.ones([2, 1, 2, 2], dtype=torch.float64)
    samplers.sample(net, latents, solver='heun', steps=9)
    inside = guidance.guide_evaluations(net, 'heun', 9)
    assert len(net.net.evaluated) == 17 and 0 < len(net.guide.evaluated) == inside < 17
    assert guidance.describe(net, 'heun', 9) == f'heun, 17 evaluations each and {inside} of the guide'

    # The ends of the interval belong to it.
    assert [net.guides_at(sigma) for sigma in (0.19, 0.2, 1, 5.0, 5.1)] == [False, True, True, True, False]

    # With w = 1, never; and every solver is counted as it is run.
    net = guided_gaussian(weight=1)
    samplers.sample(net, latents, steps=9)
    assert not net.guide.evaluated and guidance.guide_evaluations(net, 'heun', 9) == 0
    for solver, options in (('dpm2', {}), ('unipc', dict(afs=True)), ('ipndm', dict(to_zero=True))):
        net = guided_gaussian((0.1, 20.0))
        solver, steps = samplers.resolve(net, solver, 7, **options)
        samplers.sample(net, latents, solver=solver, steps=steps, **options)
        assert len(net.guide.evaluated) == guidance.guide_evaluations(net, solver, steps, **options), solver
        assert len(net.net.evaluated) == samplers.evaluations(solver, steps, **options)


def test_levels_of_a_batch_choose_image_by_image():
    """As in training, where each image has a level of its own: the ends of the interval belong to it."""
    net, sigma = guided_gaussian((0.5, 2.0)), torch.tensor([0.1, 0.5, 1.0, 2.0, 2.1], dtype=torch.float64)
    x = torch.randn([5, 1, 2, 2], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    strong, weak = Gaussian(STRONG**2)(x, sigma), Gaussian(WEAK**2)(x, sigma)
    expected = torch.where(
        torch.tensor([False, True, True, True, False]).reshape(-1, 1, 1, 1),
        weak + WEIGHT * (strong - weak),
        strong,
    )
    assert torch.equal(net(x, sigma), expected)


# ----------------------------------------------------------------------------
# Networks.


def random_net(path, make=None, seed=0, **metadata):
    """A snapshot with random weights in every layer."""
    torch.manual_seed(seed)
    net = make() if make else networks.EDMPrecond(**DIGITS, **ADM)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    save_snapshot(path, net, **{'objective': 'diffusion', **metadata})
    return path


@pytest.fixture(scope='module')
def nets(tmp_path_factory):
    """{name: snapshot}: a network trained with labels dropped, guides that fit it, and others that do not."""
    folder = tmp_path_factory.mktemp('nets')
    edm = lambda **changes: lambda: networks.EDMPrecond(**{**DIGITS, **ADM, **changes})
    grid = dict(sigmas=[80.0, 1.0, 0.0])
    latents = dict(encoder=dict(class_name='StabilityVAEEncoder'))
    made = dict(
        net=dict(label_dropout=0.1),
        plain=dict(seed=1),
        small=dict(seed=2, make=edm(model_channels=8)),
        uncond=dict(seed=3, make=edm(label_dim=0)),
        larger=dict(make=edm(img_resolution=16)),
        colors=dict(make=edm(img_channels=3)),
        other_classes=dict(make=edm(label_dim=9)),
        fewer_classes=dict(label_kind='classes', classes='0-8'),
        vectors=dict(label_kind='vectors'),
        latents=latents,
        ve=dict(make=TEACHERS['VE']),
        student=dict(objective='mcd', **grid),
        cm=dict(objective='ect', solver='cm', sigmas=[80.0, 0.0]),
    )
    return {name: str(random_net(folder / f'{name}.pkl', **options)) for name, options in made.items()}


def sampled(folder, net, *options, steps=3, seeds='0-5'):
    """{file: latents} of generate.py, float32 before they are quantized, and what it says."""
    result = invoke(
        generate.main,
        f'--network={net}',
        f'--outdir={folder}',
        f'--seeds={seeds}',
        f'--steps={steps}',
        '--latents',
        '--workers=0',
        *options,
    )
    assert result.exit_code == 0, result.output
    return {path.name: np.load(path) for path in folder.iterdir()}, result.stdout


def by_hand(net, guide, weight, seeds=6, steps=3):
    """The latents, guided by a function that evaluates one network after the other."""
    from sampling import generation

    def denoise(x, sigma, labels):
        strong, weak = net(x, sigma, labels).double(), guide(x, sigma, labels).double()
        return weak + weight * (strong - weak)

    class Guided(generation.IdentityDenoiser):
        __call__ = lambda self, *args: denoise(*args)

    guided = Guided(net)
    return generation.generate_latents(guided, range(seeds), steps=steps).numpy()


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_generate_guides_by_another_network_and_without_the_label(tmp_path, nets):
    net, without = load_network(nets['net']), lambda net: lambda x, sigma, labels: net(x, sigma, None)
    for name, guide in (
        ('small', load_network(nets['small'])),
        ('uncond', without(load_network(nets['uncond']))),
        ('none-label', without(net)),
    ):
        got, said = sampled(tmp_path / name, nets['net'], f'--guide={nets.get(name, name)}', '--guidance=3')
        expected = by_hand(net, guide, 3.0)
        assert np.allclose(np.stack([got[key] for key in sorted(got)]), expected, atol=2e-4 * expected.std())
        assert '(heun, 5 evaluations each and 5 of the guide)' in said

    # EDM2's spelling.
    edm2, _ = sampled(tmp_path / 'edm2', nets['net'], f'--gnet={nets["small"]}', '--guidance=3')
    assert equal(edm2, {path.name: np.load(path) for path in (tmp_path / 'small').iterdir()})


def test_with_weight_1_and_outside_of_the_interval_images_are_the_same_bit_for_bit(tmp_path, nets):
    plain, _ = sampled(tmp_path / 'plain', nets['net'])
    for i, options in enumerate(
        (
            [f'--guide={nets["small"]}', '--guidance=1'],
            ['--guide=none-label', '--guidance=1'],
            ['--guide=none-label', '--guidance=4', '--guidance_interval=0.01,0.02'],
        )
    ):
        got, said = sampled(tmp_path / str(i), nets['net'], *options)
        assert equal(got, plain) and 'and 0 of the guide' in said
    got, said = sampled(
        tmp_path / 'some', nets['net'], '--guide=none-label', '--guidance=4', '--guidance_interval=1,10'
    )
    assert not equal(got, plain) and 'and 2 of the guide' in said  # of 80, 2.5, 2.5, 0.002 and 0.002


def test_the_same_network_without_its_label_is_one_batch(nets):
    net = load_network(nets['net'])
    sizes = []
    net.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    guided = guidance.GuidedDenoiser(net, None, 2.0, (0.5, 10.0))
    latents, labels = torch.randn(4, 1, 8, 8), torch.eye(10)[:4]
    with torch.no_grad():
        samplers.sample(guided, latents, labels, 'euler', 3)
        assert sizes == [4, 8, 4]  # 80, 2.5, 0.002
        # Labels for augmentation go along, and other networks see those that they know.
        assert guided(latents, torch.ones(4), labels).shape == latents.shape
    sizes.clear()


def test_precision_and_memory_format_reach_both_networks(tmp_path, nets):
    guided = guidance.GuidedDenoiser(load_network(nets['net']), load_network(nets['small']), 2.0)
    execution.run_with(execution.in_precision(guided, 'bf16'), channels_last=True)
    assert all(part.use_bf16 and part.channels_last for part in (guided.net, guided.guide))
    fp32, _ = sampled(tmp_path / 'fp32', nets['net'], f'--guide={nets["small"]}', '--guidance=2', seeds='0')
    bf16, _ = sampled(
        tmp_path / 'bf16',
        nets['net'],
        f'--guide={nets["small"]}',
        '--guidance=2',
        '--precision=bf16',
        seeds='0',
    )
    difference = np.abs(fp32['000000.npy'] - bf16['000000.npy']).max() / np.abs(fp32['000000.npy']).max()
    assert 1e-4 < difference < 0.2


def test_two_processes_give_the_images_of_one(tmp_path, nets):
    options = ['--guide=none-label', '--guidance=3', '--guidance_interval=0.1,20']
    one, _ = sampled(tmp_path / 'one', nets['net'], *options, '--batch=3')
    run_ranks(
        2,
        'generate.py',
        f'--network={nets["net"]}',
        f'--outdir={tmp_path / "two"}',
        '--seeds=0-5',
        '--steps=3',
        '--latents',
        '--batch=3',
        '--workers=0',
        *options,
    )
    assert equal(one, {path.name: np.load(path) for path in (tmp_path / 'two').iterdir()})


def test_a_guided_teacher_of_every_kind_is_sampled(tmp_path):
    """VE's and iDDPM's rounding and ranges, EDM2's network, which takes no augmentation labels."""
    for i, (kind, make) in enumerate(TEACHERS.items()):
        net = random_net(tmp_path / f'{i}.pkl', make, label_dropout=0.1)
        guide = random_net(tmp_path / f'{i}-guide.pkl', make, seed=1)
        plain, _ = sampled(tmp_path / f'{i}', net, seeds='0')
        for name in ('none-label', guide):
            got, said = sampled(
                tmp_path / f'{i}-{str(name)[-9:-4]}', net, f'--guide={name}', '--guidance=2', seeds='0'
            )
            assert not equal(got, plain) and np.isfinite(got['000000.npy']).all(), kind
            assert '5 evaluations each and 5 of the guide' in said, kind


def test_augmentation_labels_reach_a_guide_that_knows_them():
    make = lambda dim: networks.EDMPrecond(**DIGITS, **ADM, **(dict(augment_dim=dim) if dim else {}))
    seen = {}
    for name, dim in (('net', 9), ('same', 9), ('none', 0)):
        seen[name] = make(dim)
        hook = functools.partial(
            lambda name, module, args, kwargs: seen.__setitem__((name, 'augment'), kwargs), name
        )
        seen[name].register_forward_pre_hook(hook, with_kwargs=True)
    x, labels = torch.randn(2, 1, 8, 8), torch.eye(10)[:2]
    for guide, expected in (('same', True), ('none', False)):
        guided = guidance.GuidedDenoiser(seen['net'], seen[guide], 2.0)
        guided(x, torch.ones(2), labels, augment_labels=torch.ones(2, 9))
        assert 'augment_labels' in seen['net', 'augment']
        assert ('augment_labels' in seen[guide, 'augment']) == expected
    guidance.GuidedDenoiser(seen['net'], None, 2.0)(x, torch.ones(2), labels, augment_labels=torch.ones(2, 9))
    assert seen['net', 'augment']['augment_labels'].shape == (4, 9)


def test_a_guided_network_is_known_by_network_guide_weight_and_interval(nets):
    """Caches and searched levels are of one of them."""
    net, small, uncond = (load_network(nets[name]) for name in ('net', 'small', 'uncond'))
    models = [
        net,
        *(guidance.GuidedDenoiser(net, guide, 2.0) for guide in (None, small, uncond)),
        guidance.GuidedDenoiser(net, None, 3.0),
        guidance.GuidedDenoiser(net, None, 2.0, (0.1, 5.0)),
        guidance.GuidedDenoiser(load_network(nets['plain']), small, 2.0),
    ]
    digests = list(map(guidance.model_digest, models))
    assert len(set(digests)) == len(models) and digests[0] == network_digest(net, net.metadata)


# ----------------------------------------------------------------------------
# Evaluation and interpolation.


@pytest.fixture(scope='module')
def reference(tmp_path_factory, digits, rulers):
    return f'--ref={rulers / "pca.npz"}', f'--detector={rulers / "pca.pt"}'


def test_evaluations_are_guided_counted_and_recorded(tmp_path, nets, reference):
    options = ['--num=8', '--steps=3', f'--outdir={tmp_path}', *reference]
    guide = ['--guide=none-label', '--guidance=3', '--guidance_interval=1,10']
    for extra in ([], guide):
        result = invoke(validation.main, f'--network={nets["net"]}', *options, *extra)
        assert result.exit_code == 0, result.output
    plain, guided = lines(tmp_path / 'metrics-val.jsonl')
    assert (
        'guidance' not in plain and plain['nfe'] == 5 and guided['nfe'] == 7 and guided['fid'] != plain['fid']
    )
    assert guided['guidance'] == dict(guide='none-label', guidance=3.0, guidance_interval=[1.0, 10.0])

    # fid.py measures the same images, and keeps features of one guide apart from those of another.
    cache = f'--cache={tmp_path / "cache"}'
    for extra, expected in (
        ([], plain),
        (guide, guided),
        (guide, guided),
        ([*guide[:1], '--guidance=2'], None),
    ):
        result = invoke(
            fid.main,
            'calc',
            f'--network={nets["net"]}',
            '--seeds=0-7',
            '--steps=3',
            cache,
            *reference,
            *extra,
        )
        assert result.exit_code == 0, result.output
        if expected:
            assert float(result.stdout) == pytest.approx(expected['fid'], rel=1e-6)
        else:
            assert float(result.stdout) != pytest.approx(guided['fid'], rel=1e-3)


def test_a_schedule_is_searched_for_the_guided_network(tmp_path, nets):
    """The line on stdout samples what was searched; without the guide, levels are of another network."""
    guide = ['--guide=none-label', '--guidance=3.0', '--guidance_interval=0.1,20.0']
    files = [f'--save={tmp_path / "levels.txt"}', f'--json={tmp_path / "found.json"}']
    own = [f'--network={nets["net"]}', '--schedule', '--num=4', '--nodes=6', '--steps=2', *files]
    found = {}
    for extra in ([], guide):
        result = invoke(search.main, *own, *extra)
        assert result.exit_code == 0, result.output
        found[len(extra)] = json.loads((tmp_path / 'found.json').read_text())
    assert found[0]['network'] != found[3]['network'] and found[0]['distance'] != found[3]['distance']
    assert result.stdout.split()[-4:-1] == guide and ' evaluations each and 1 of the guide' in result.stderr

    sigmas = f'--sigmas={tmp_path / "levels.txt"}'
    for extra, warned in ((guide, False), ([], True), ([guide[0], '--guidance=2'], True)):
        result = invoke(
            generate.main,
            f'--network={nets["net"]}',
            f'--dest={tmp_path / "x.npz"}',
            '--seeds=0',
            sigmas,
            *extra,
        )
        assert result.exit_code == 0, result.output
        assert ('another network' in result.stderr) == warned
    result = invoke(
        search.main, f'--network={nets["cm"]}', f'--log={tmp_path / "x.jsonl"}', '--metric=is', *guide
    )
    assert_one_clear_error(result, '--guide', '--schedule', status=2)


def test_interpolation_is_guided(tmp_path, nets):
    for name, extra in (('plain', []), ('guided', [f'--guide={nets["small"]}', '--guidance=4'])):
        result = invoke(
            edit.main,
            'interpolate',
            f'--network={nets["net"]}',
            f'--outdir={tmp_path / name}',
            '--seeds=0,1',
            '--count=2',
            '--steps=2',
            *extra,
        )
        assert result.exit_code == 0, result.output
    assert (tmp_path / 'plain/grid.png').read_bytes() != (tmp_path / 'guided/grid.png').read_bytes()


# ----------------------------------------------------------------------------
# What does not fit.


@pytest.mark.parametrize(
    'net, guide, words',
    [
        ('net', 'larger', ['16x16x1 with 10 classes', '8x8x1 with 10 classes']),
        ('net', 'colors', ['8x8x3']),
        ('net', 'other_classes', ['with 9 classes']),
        ('net', 'fewer_classes', ['classes 9', 'no images']),
        ('net', 'vectors', []),
        ('uncond', 'net', ['10 classes', 'no classes']),
        ('net', 'latents', ['StabilityVAEEncoder', 'pixels']),
        ('net', 've', ['0.02 to 100', '0.002 to 80', '--guidance_interval']),
        ('net', 'net', ['itself', 'none-label']),
        ('net', 'student', ['a student of 2 steps', 'diffusion model']),
        ('net', 'cm', ['a consistency model']),
        ('student', 'net', ['a student of 2 steps', 'train.py']),
        ('cm', 'none-label', ['a consistency model', 'train.py']),
        ('uncond', 'none-label', ['has none']),
        ('plain', 'none-label', ['--label_dropout', 'unconditional']),
        ('net', 'missing.pkl', ['missing.pkl']),
    ],
)
def test_a_guide_that_does_not_fit_is_named_with_the_reason(tmp_path, nets, net, guide, words):
    kind = [dict(label_kind='classes')] if guide == 'vectors' else []
    path = str(random_net(tmp_path / 'classes.pkl', seed=4, **kind[0])) if kind else nets[net]
    result = invoke(
        generate.main,
        f'--network={path}',
        f'--outdir={tmp_path / "out"}',
        f'--guide={nets.get(guide, guide)}',
        '--guidance=2',
        '--steps=2',
    )
    assert_one_clear_error(result, '--guide' if guide != 'missing.pkl' else '', *words)
    assert not (tmp_path / 'out').exists()


def test_a_guide_of_fewer_noise_levels_fits_within_an_interval(tmp_path, nets):
    net = str(random_net(tmp_path / 'net.pkl', TEACHERS['DDPM++ with augmentation labels']))
    _, said = sampled(
        tmp_path / 'out',
        net,
        f'--guide={nets["ve"]}',
        '--guidance=2',
        '--guidance_interval=0.1,10',
        seeds='0',
    )
    assert 'and 2 of the guide' in said
    # The range of the two together is the guide's only where it guides.
    ve, edm = load_network(nets['ve']), load_network(net)
    of = lambda interval: guidance.GuidedDenoiser(edm, ve, 2.0, interval)
    ends = lambda net: (net.sigma_min, net.sigma_max)
    assert ends(of((0.1, 10))) == (0, float('inf')) and ends(of(None)) == (0.02, 100)
    assert ends(of((0.001, 10))) == (0.02, float('inf')) and ends(of((0.1, 200))) == (0, 100)


@pytest.mark.parametrize(
    'options, words',
    [
        (['--guidance=2'], ['--guidance', '--guide=PKL']),
        (['--guidance_interval=0.1,5'], ['--guidance_interval', '--guide=PKL']),
        (['--guide=none-label'], ['--guidance=W']),
        (['--guide=none-label', '--guidance=-1'], ['-1']),
        (['--guide=none-label', '--guidance=2', '--guidance_interval=5'], ['LO,HI']),
        (['--guide=none-label', '--guidance=2', '--guidance_interval=5,0.1'], ['LO,HI']),
        (['--guide=none-label', '--guidance=2', '--guidance_interval=1,2,3'], ['LO,HI']),
    ],
)
def test_options_that_need_each_other_are_usage_errors(tmp_path, nets, options, words):
    result = invoke(generate.main, f'--network={nets["net"]}', f'--outdir={tmp_path / "out"}', *options)
    assert_one_clear_error(result, *words, status=2)
    result = invoke(
        fid.main, 'calc', f'--images={tmp_path}', '--ref=a.npz', '--guide=none-label', '--guidance=2'
    )
    assert_one_clear_error(result, '--guide', '--images', status=2)


def test_a_network_that_drops_labels_itself_is_known_to(nets):
    """As EDM's constructor records it, in snapshots of other programs."""
    net = networks.EDMPrecond(**DIGITS, **ADM, label_dropout=0.1)
    net.metadata = dict(objective='diffusion')
    guidance.check_label_dropout(net, 'net')
