"""reconstruct_phema.py: closed forms, averages that training tracked as well, memory, EDM2's files, and every wrong input in one line."""

import functools
import gc
import pickle
import shutil

import helpers
import numpy as np
import pytest
import torch
from helpers import FAST, TINY_NETWORK, assert_one_clear_error, run

import reconstruct_phema
from training import checkpoint, networks, phema, posthoc_ema, samplers
from training.checkpoint import load_network, save_snapshot

STEPS, BATCH = 16, 64
STUDENT = dict(
    objective='mcd',
    S=2,
    sigma_min=0.002,
    sigma_max=80.0,
    rho=7.0,
    student_grid='edm',
    sigma_data=0.5,
    sigmas=[80.0, 0.002, 0.0],
)


invoke = functools.partial(helpers.invoke, reconstruct_phema.main)


def reconstructed(*arguments):
    """What the command printed, where it succeeds."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def small_net(seed=0, cls=networks.EDMPrecond, **kwargs):
    """10,617 parameters, and a buffer: random Fourier frequencies."""
    torch.manual_seed(seed)
    options = dict(
        model_type='SongUNet',
        embedding_type='fourier',
        model_channels=8,
        channel_mult=[1],
        num_blocks=1,
        attn_resolutions=[],
        dropout=0,
    )
    return cls(8, 1, 2, **{**options, **kwargs}).eval().requires_grad_(False)


def parameters(net):
    return torch.cat([parameter.flatten().double() for parameter in net.parameters()])


def set_parameters(net, vector):
    torch.nn.utils.vector_to_parameters(vector, net.parameters())
    return net


def store(folder, nimg, std, net, prefix='network-snapshot', **metadata):
    """A stored average as training writes it."""
    folder.mkdir(exist_ok=True)
    path = folder / f'{prefix}-{nimg // 1000:06d}-{std:.3f}.pkl'
    save_snapshot(
        path,
        net,
        **{
            **dict(
                objective='diffusion',
                kimg=nimg / 1e3,
                nimg=nimg,
                ema=f'phema-{std:.3f}',
                ema_std=std,
                dataset_kwargs=dict(path='data.zip', resolution=8),
            ),
            **metadata,
        },
    )
    return path


@pytest.fixture(scope='module')
def template(tmp_path_factory):
    folder, net = tmp_path_factory.mktemp('template') / 'run', small_net()
    for nimg in (1000, 2000, 4000):
        for std in (0.05, 0.1):
            store(folder, nimg, std, net)
    return folder


@pytest.fixture
def stored(tmp_path, template):
    """A folder with two widths at 1, 2 and 4 kimg, all of the same network."""
    return shutil.copytree(template, tmp_path / 'run')


# ----------------------------------------------------------------------------
# Closed forms.


def polynomial_average(coefficients, std, t):
    """The power-function average at time `t` of Σₙ aₙ τⁿ: tau^n under (γ+1) τ^γ / t^(γ+1) is (γ+1) / (γ+1+n) tⁿ. `coefficients`: [n, P]."""
    g = float(phema.std_to_exp(std))
    return sum(a * (g + 1) / (g + 1 + n) * t**n for n, a in enumerate(coefficients))


@pytest.fixture(scope='module')
def polynomial(tmp_path_factory):
    """(folder, [3, P] coefficients): FP64 averages of weights a₀ + a₁ τ + a₂ τ², τ in units of 16,000 images, at 16 times."""
    folder, net = tmp_path_factory.mktemp('polynomial') / 'run', small_net().double()
    coefficients = torch.randn(
        3, len(parameters(net)), dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    for k in range(1, 17):
        for std in (0.05, 0.1):
            store(folder, 1000 * k, std, set_parameters(net, polynomial_average(coefficients, std, k / 16)))
    return folder, coefficients


@pytest.mark.parametrize('outkimg', [16, 9])
def test_weights_that_are_a_polynomial_of_time_get_their_analytic_averages(tmp_path, polynomial, outkimg):
    """Off by at most the profile error · ‖p‖ · (∫ (w − v)²)^½, v the average itself; the integral by Gauss-Legendre nodes, exact for polynomials.
    Over all weights that is below 1 %."""
    folder, coefficients = polynomial
    reconstructed(
        f'--indir={folder}',
        f'--outdir={tmp_path}',
        '--outstd=0.03,0.07,0.15,0.2',
        f'--outkimg={outkimg}',
        '--batch=4',
    )
    t = outkimg / 16
    nodes, node_weights = np.polynomial.legendre.leggauss(5)
    trajectory = torch.stack(
        [sum(a * tau**n for n, a in enumerate(coefficients)) for tau in (nodes + 1) * t / 2]
    )
    for std in (0.03, 0.07, 0.15, 0.2):
        net, wanted = (
            load_network(tmp_path / f'phema-{outkimg:06d}-{std:.3f}.pkl'),
            polynomial_average(coefficients, std, t),
        )
        spread = torch.from_numpy(node_weights * t / 2) @ (trajectory - wanted) ** 2
        g = float(phema.std_to_exp(std))
        bound = net.metadata['profile_error'] * (g + 1) / ((2 * g + 1) * t) ** 0.5 * spread**0.5
        distance = (parameters(net) - wanted).abs()
        assert (distance <= bound).all() and 0 < distance.norm() < 0.01 * wanted.norm()


def test_sums_are_of_the_coefficients_that_the_profiles_say(tmp_path, polynomial):
    """In FP64 throughout, so to 1e-12: the file has Σ cᵢ wᵢ, of every input up to the time and of no later one."""
    folder, coefficients = polynomial
    reconstructed(f'--indir={folder}', f'--outdir={tmp_path}', '--outstd=0.15', '--outkimg=9')
    times, stds = np.repeat(np.arange(1, 10), 2), np.tile([0.05, 0.1], 9)
    c = phema.solve_posthoc_coefficients(times, stds, [9], [0.15])[:, 0]
    wanted = sum(
        weight * polynomial_average(coefficients, std, t / 16) for weight, t, std in zip(c, times, stds)
    )
    net = load_network(tmp_path / 'phema-000009-0.150.pkl')
    torch.testing.assert_close(parameters(net), wanted, rtol=0, atol=1e-12)
    assert next(net.parameters()).dtype == torch.float64


# ----------------------------------------------------------------------------
# After training.


@pytest.fixture(scope='module')
def trained(digits, tmp_path_factory):
    """A digits run of 16 steps that stored three widths after every one."""
    folder = tmp_path_factory.mktemp('trained')
    run(
        'train.py',
        f'--outdir={folder}',
        f'--data={digits}',
        '--cond=1',
        *TINY_NETWORK,
        *FAST,
        f'--batch={BATCH}',
        '--augment=0',
        '--ema=10kimg',
        f'--duration={STEPS * BATCH / 1e6}',
        f'--tick={BATCH / 1e3}',
        '--snap=0',
        '--phema=0.05,0.10,0.15',
        '--phema_snap=1',
        '--dump=0',
        '--lr=2e-3',
    )
    return folder


def stored_at(folder, step, std):
    """The snapshot after a step; ours have the exact number of images in their metadata, and in the name where kimg is not enough."""
    nimg = step * BATCH
    first = next(k for k in range(1, STEPS + 1) if k * BATCH // 1000 == nimg // 1000)
    return folder / f'network-snapshot-{nimg // 1000:06d}{f"-{nimg}" if first != step else ""}-{std:.3f}.pkl'


def trajectory(folder):
    """[STEPS, P] weights after every step, from the averages before and after it: a' = β a + (1 − β) w."""
    averages = [parameters(load_network(stored_at(folder, step, 0.05))) for step in range(1, STEPS + 1)]
    betas = [phema.power_function_beta(0.05, step * BATCH, BATCH) for step in range(1, STEPS + 1)]
    return torch.stack(
        [averages[0], *((b - beta * a) / (1 - beta) for a, b, beta in zip(averages, averages[1:], betas[1:]))]
    )


def sparse_copy(trained, folder, steps, stds=(0.05, 0.1)):
    folder.mkdir()
    for step in steps:
        for std in stds:
            shutil.copy(stored_at(trained, step, std), folder)
    return folder


def test_a_width_that_was_tracked_too_is_reconstructed_from_two_others_as_closely_as_promised(
    tmp_path, trained
):
    """Every fourth, second or single step stored: at most the bound of `posthoc_error` away, and not by luck, at least 1 % of it. The bound is that
    of the trajectory itself; 2e-7 is left for FP32."""
    tracked, weights, distances = (
        parameters(load_network(stored_at(trained, STEPS, 0.15))),
        trajectory(trained),
        [],
    )
    g = float(phema.std_to_exp(0.15))
    for every in (4, 2, 1):
        indir = sparse_copy(trained, tmp_path / str(every), range(every, STEPS + 1, every))
        reconstructed(f'--indir={indir}', '--instd=0.05,0.10', '--outstd=0.15')
        (net,) = (load_network(path) for path in indir.glob('phema-*'))
        factor = (g + 1) / (2 * g + 1) ** 0.5 * ((weights - tracked) ** 2).sum(dim=1).mean().sqrt()
        distance, bound = (parameters(net) - tracked).norm(), net.metadata['profile_error'] * factor
        assert 0.01 * bound < distance <= bound + 2e-7 * tracked.norm(), (every, distance, bound)
        distances.append(distance)
    assert distances[0] > 3 * distances[1] > 9 * distances[2], distances


@pytest.mark.parametrize('kimg, step', [(None, STEPS), (0.448, 7), (0.064, 1)])
def test_a_stored_average_is_reconstructed_as_itself(tmp_path, trained, kimg, step):
    reconstructed(
        f'--indir={trained}',
        f'--outdir={tmp_path}',
        '--instd=0.05,0.1',
        '--outstd=0.05',
        *([f'--outkimg={kimg}'] if kimg else []),
    )
    (path,) = tmp_path.iterdir()
    ours, theirs = load_network(path), load_network(stored_at(trained, step, 0.05))
    torch.testing.assert_close(parameters(ours), parameters(theirs), rtol=1e-6, atol=1e-6)
    assert path.name == stored_at(trained, step, 0.05).name.replace('network-snapshot', 'phema')
    assert {name for name in ours.metadata if ours.metadata[name] != theirs.metadata.get(name)} == {
        'digest',
        'reconstructed',
        'profile_error',
    }


def test_list_says_what_is_there_and_how_well_it_would_do_and_writes_nothing(trained):
    before = sorted(trained.iterdir())
    lines = reconstructed(f'--indir={trained}', '--list').splitlines()
    assert [line.split() for line in lines[2:]] == [
        [width, '16', '0.064', 'to', '1.024'] for width in ('0.050', '0.100', '0.150')
    ]
    text = reconstructed(
        f'--indir={trained}', '--list', '--outstd=0.1,0.01', '--instd=0.05,0.15', '--outkimg=0.896'
    )
    arguments = np.repeat(np.arange(1, 15), 2), np.tile([0.05, 0.15], 14), [14, 14], [0.01, 0.1]
    errors = 100 * phema.posthoc_error(*arguments, phema.solve_posthoc_coefficients(*arguments))
    assert errors[1] < 5 < errors[0]
    assert f'0.010  profile error {errors[0]:.2g} %\n  0.100  profile error {errors[1]:.2g} %' in text
    assert 'Warning: 0.010 is only a rough reconstruction' in text and '0.100 is' not in text
    assert sorted(trained.iterdir()) == before


# ----------------------------------------------------------------------------
# Files.


def test_outputs_keep_what_is_no_parameter_and_say_what_they_are(tmp_path, stored):
    net = small_net()
    net.sigma_max = 40.0
    for path in stored.iterdir():
        save_snapshot(path, net, **{**load_network(path).metadata, **STUDENT})
    reconstructed(f'--indir={stored}', f'--outdir={tmp_path / "new" / "out"}', '--outstd=0.2')
    out = load_network(tmp_path / 'new' / 'out' / 'phema-000004-0.200.pkl')
    assert out.sigma_max == 40 and torch.equal(out.model.map_noise.freqs, net.model.map_noise.freqs)
    torch.testing.assert_close(
        parameters(out), parameters(net), rtol=1e-6, atol=1e-6
    )  # all inputs are equal, and coefficients sum to 1
    expected = dict(
        STUDENT,
        kimg=4.0,
        nimg=4000,
        ema='phema-0.200',
        ema_std=0.2,
        reconstructed=True,
        dataset_kwargs=dict(path='data.zip', resolution=8),
    )
    assert {
        name: out.metadata[name] for name in expected
    } == expected and out.metadata.keys() == expected.keys() | {'digest', 'profile_error'}
    assert samplers.resolve(out, None, None) == ('student', 2)


def test_reconstructions_beside_their_inputs_are_no_inputs_and_are_replaced_or_skipped(stored):
    reconstructed(f'--indir={stored}', '--outstd=0.2')
    output, once = stored / 'phema-000004-0.200.pkl', reconstructed(f'--indir={stored}', '--list')
    digest = load_network(output).metadata['digest']
    output.write_bytes(b'')
    assert 'Wrote 1 ' in reconstructed(
        f'--indir={stored}', '--outstd=0.07,0.2', '--skip', '--inprefix=network-snapshot'
    )
    assert output.read_bytes() == b'' and (stored / 'phema-000004-0.070.pkl').exists()
    output.unlink()
    for _ in range(2):
        reconstructed(f'--indir={stored}', '--outstd=0.2')
        assert load_network(output).metadata['digest'] == digest
    assert reconstructed(f'--indir={stored}', '--list') == once
    assert 'Wrote 0 ' in reconstructed(f'--indir={stored}', '--outstd=0.07', '--skip')


def in_the_manner_of_edm2(path, net):
    """A snapshot without metadata, in half precision."""
    with open(path, 'wb') as file:
        pickle.dump(
            dict(ema=net.half(), loss_fn=None, augment_pipe=None, dataset_kwargs=dict(resolution=8)), file
        )


def test_snapshots_of_edm2_are_understood_by_name_and_stay_in_half_precision(tmp_path):
    """kimg is a floor, of multiples of 1024 images: 1024 and 3072 here. One at 0 images, which EDM2 stores too, is no average. Sums of half-precision
    weights are rounded once, at the end: 2⁻¹¹ of the sum."""
    vectors = {}
    for kimg, seed in ((0, 9), (1, 1), (3, 2)):
        for std in (0.05, 0.1):
            net = set_parameters(
                small_net(), torch.randn(10_617, generator=torch.Generator().manual_seed(seed))
            )
            in_the_manner_of_edm2(tmp_path / f'edm2-img64-{kimg:07d}-{std:.3f}.pkl', net)
            vectors[kimg, std] = parameters(net)
    reconstructed(f'--indir={tmp_path}', '--outstd=0.15')
    net = load_network(tmp_path / 'phema-0000003-0.150.pkl')
    times, stds = [1024, 1024, 3072, 3072], [0.05, 0.1] * 2
    c = phema.solve_posthoc_coefficients(times, stds, [3072], [0.15])[:, 0]
    wanted = sum(weight * vectors[t // 1000, std] for weight, t, std in zip(c, times, stds))
    torch.testing.assert_close(parameters(net), wanted, rtol=2**-11, atol=1e-6)
    assert {p.dtype for p in net.parameters()} == {
        torch.float16
    } and net.model.map_noise.freqs.dtype == torch.float16
    assert (net.metadata['nimg'], net.metadata['kimg'], net.metadata['ema']) == (3072, 3.072, 'phema-0.150')


@pytest.mark.parametrize(
    'kimg, training_batch, nimg',
    [
        (2147483, 2048, 2**31),
        (2147483, 1024, 2**31),
        (939524, 2048, 28 * 2**25),
        (1, 1024, 1024),
        (0, 1024, 0),
        (2, 512, 2048),
        (1, 640, 1280),
    ],
)
def test_a_floor_of_kimg_means_a_whole_number_of_training_steps(kimg, training_batch, nimg):
    """The first are published: 2 Gi images, and 28 of EDM2's steps of 32 Mi."""
    assert posthoc_ema.nimg_at(kimg, training_batch) == nimg


def test_a_floor_of_kimg_at_which_no_step_ends_is_an_error():
    with pytest.raises(ValueError, match='no multiple of --training_batch=2048 is at 3 kimg'):
        posthoc_ema.nimg_at(3, 2048)


# ----------------------------------------------------------------------------
# Memory.


@pytest.mark.parametrize('batch', [1, 2])
def test_memory_holds_the_sums_and_one_input(tmp_path, stored, monkeypatch, batch):
    """Bytes of all tensors that are alive, whenever an input has just been loaded and an output is about to be written, in networks; buffers of four
    numbers are below 1e-2. Nothing waits for the garbage collector."""
    network, load, save, seen = 10_617 * 4, checkpoint.load_network, checkpoint.save_snapshot, []

    def live():
        things = (thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter))
        tensors = [
            t for t in things if t.layout is torch.strided and not t.is_meta
        ]  # other tests may have left others behind
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def counting_load(*arguments):
        net = load(*arguments)
        seen.append(live() - before)
        return net

    def counting_save(*arguments, **metadata):
        seen.append(live() - before)
        save(*arguments, **metadata)

    monkeypatch.setattr(checkpoint, 'load_network', counting_load)
    monkeypatch.setattr(checkpoint, 'save_snapshot', counting_save)
    gc.collect()
    gc.disable()
    gc.freeze()  # `gc.get_objects` leaves out what there is now
    before = live()
    try:
        reconstructed(
            f'--indir={stored}', f'--outdir={tmp_path}', '--outstd=0.01,0.02,0.03', f'--batch={batch}'
        )
    finally:
        gc.unfreeze()
        gc.enable()
    assert len(seen) == 6 * (4 - batch) + 3
    assert max(seen) / network == pytest.approx(batch + 1, abs=0.01)


def test_the_batch_does_not_change_the_files(tmp_path, stored):
    for batch in (1, 2, 5):
        reconstructed(
            f'--indir={stored}',
            f'--outdir={tmp_path / str(batch)}',
            '--outstd=0.02,0.07,0.15',
            f'--batch={batch}',
        )
    one, two, five = (
        [load_network(path).metadata['digest'] for path in sorted((tmp_path / str(batch)).iterdir())]
        for batch in (1, 2, 5)
    )
    assert len(one) == 3 and one == two == five


# ----------------------------------------------------------------------------
# Lists of widths.


@pytest.mark.parametrize(
    'text, widths',
    [
        ('0.1', [0.1]),
        ('0.1,0.05', [0.05, 0.1]),
        ('0.05, 0.1, ..., 0.25', [0.05, 0.1, 0.15, 0.2, 0.25]),
        ('0.01,0.02,...,0.03', [0.01, 0.02, 0.03]),
        ('0.25,0.2,...,0.1', [0.1, 0.15, 0.2, 0.25]),
        ('0.01,0.02,...,0.05,0.1,...,0.2', [0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.15, 0.2]),
    ],
)
def test_three_dots_go_on_evenly(text, widths):
    assert reconstruct_phema.Widths().convert(text, None, None) == widths


@pytest.mark.parametrize(
    'option',
    [
        '--outstd=0.1,x',
        '--outstd=',
        '--outstd=...,0.1',
        '--outstd=0.1,...,0.2',
        '--outstd=0.1,0.15,...',
        '--outstd=0.1,0.1,...,0.2',
        '--outstd=0.1,0.15,...,0.22',
        '--outstd=0.2,0.15,...,0.25',
        '--outstd=0.1,0.11,...,inf',
        '--outstd=nan',
        '--outstd=0.3',
        '--outstd=0.0001',
        '--outstd=0.1,0.1001',
        '--instd=2',
        '--outkimg=0',
        '--outkimg=nan',
        '--batch=0',
        '--outprefix=a/b',
        '--outprefix=',
        '--inprefix=../x',
    ],
)
def test_malformed_options_exit_with_status_2(tmp_path, option):
    assert_one_clear_error(
        invoke(f'--indir={tmp_path}', '--outstd=0.15', option), option.split('=')[0], status=2
    )


def test_widths_or_list_must_be_given(tmp_path):
    assert_one_clear_error(invoke(f'--indir={tmp_path}'), '--outstd=LIST', '--list', status=2)


# ----------------------------------------------------------------------------
# Wrong input: one clear message, and nothing written.


def damage(stored):
    path = stored / 'network-snapshot-000002-0.100.pkl'
    content, weights = bytearray(path.read_bytes()), max(load_network(path).parameters(), key=torch.numel)
    content[content.index(weights.detach().numpy().tobytes())] ^= 1  # which no structure gives away
    path.write_bytes(content)


def diverge(stored):
    store(stored, 2000, 0.1, set_parameters(small_net(), torch.full([10_617], float('nan'))))


def hostile(stored):
    (stored / 'network-snapshot-000003-0.100.pkl').write_bytes(b'cos\nsystem\n(S"touch canary"\ntR.')


def truncate(stored):
    path = stored / 'network-snapshot-000002-0.100.pkl'
    path.write_bytes(path.read_bytes()[:20_000])


def other_constants(stored):
    net = small_net()
    net.sigma_min = 0.01
    store(stored, 2000, 0.1, net)


WRONG = {  # what is wrong: (how to make it so, options, words of the message)
    'no folder': (lambda stored: shutil.rmtree(stored), [], ['--indir=', 'cannot be listed']),
    'a file for a folder': (
        lambda stored: None,
        ['--indir=reconstruct_phema.py'],
        ['--indir=reconstruct_phema.py', 'Name the folder'],
    ),
    'nothing stored': (
        lambda stored: [path.unlink() for path in stored.iterdir()],
        [],
        ['holds no averages', 'network-snapshot-', '--phema=0.05,0.10'],
    ),
    'other prefix': (
        lambda stored: None,
        ['--inprefix=edm2'],
        ['holds no averages', 'edm2-<kimg>', '--inprefix'],
    ),
    'reconstructions only': (
        lambda stored: (
            reconstructed(f'--indir={stored}', '--outstd=0.2'),
            [p.unlink() for p in stored.glob('network*')],
        ),
        [],
        ['holds no averages stored by training'],
    ),
    'two prefixes': (
        lambda stored: store(stored, 1000, 0.05, small_net(), prefix='other'),
        [],
        ['several names: network-snapshot, other', '--inprefix'],
    ),
    'no such width': (lambda stored: None, ['--instd=0.05,0.07'], ['--instd: 0.070 is not stored']),
    'no such time': (lambda stored: None, ['--outkimg=3.5'], ['--outkimg=3.5 is not a time', '2 or 4']),
    'after the end': (lambda stored: None, ['--outkimg=5'], ['--outkimg=5 is not a time', 'or 4.']),
    'which time': (
        lambda stored: (
            store(stored, 2500, 0.1, small_net()).rename(stored / 'network-snapshot-000002-2500-0.100.pkl')
            and store(stored, 2000, 0.1, small_net()).rename(stored / 'x')
            and store(stored, 2001, 0.05, small_net())
        ),
        ['--outkimg=2'],
        ['--outkimg=2 is ambiguous', '2.001 or 2.5'],
    ),
    'other architecture': (
        lambda stored: store(stored, 2000, 0.1, small_net(model_channels=12)),
        [],
        ['different runs', 'argument model_channels is 8'],
    ),
    'other class': (
        lambda stored: store(stored, 2000, 0.1, small_net(cls=networks.VPPrecond)),
        [],
        ['different runs', "network is 'EDMPrecond'"],
    ),
    'other objective': (
        lambda stored: store(stored, 2000, 0.1, small_net(), **STUDENT),
        [],
        ['different runs', "objective is 'diffusion'"],
    ),
    'other grid': (
        lambda stored: [
            store(stored, t, s, small_net(), **{**STUDENT, 'S': t})
            for t in (1000, 2000, 4000)
            for s in (0.05, 0.1)
        ],
        [],
        ['different runs', 'S is 1000 there and 2000 here'],
    ),
    'other data': (
        lambda stored: store(stored, 2000, 0.1, small_net(), dataset_kwargs=dict(resolution=16)),
        [],
        ['different runs', 'data set resolution'],
    ),
    'other frequencies': (
        lambda stored: store(stored, 2000, 0.1, small_net(seed=1)),
        [],
        ['000002-0.100.pkl', 'constants'],
    ),
    'other noise levels': (other_constants, [], ['000002-0.100.pkl', 'settings of its network differ']),
    'duplicate': (
        lambda stored: shutil.copy(
            stored / 'network-snapshot-000002-0.100.pkl', stored / 'network-snapshot-000002-2000-0.100.pkl'
        ),
        [],
        ['000002-0.100.pkl', '000002-2000-0.100.pkl', 'width 0.100 after 2,000 images'],
    ),
    'damage': (damage, [], ['000002-0.100.pkl', 'damaged']),
    'truncated': (truncate, [], ['000002-0.100.pkl', 'truncated', 'remove it']),
    'hostile': (hostile, [], ['000003-0.100.pkl']),
    'diverged': (diverge, [], ['000002-0.100.pkl', 'not finite', '--outkimg']),
    'impossible width': (
        lambda stored: store(stored, 2000, 0.1, small_net(), ema_std=0.9),
        [],
        ['ema_std 0.9', '[0.001, 0.28]'],
    ),
    'no width': (lambda stored: store(stored, 2000, 0.1, small_net(), ema_std=None), [], ['ema_std None']),
    'no time': (
        lambda stored: in_the_manner_of_edm2(stored / 'network-snapshot-0000042-0.100.pkl', small_net()),
        [],
        ['0000042-0.100.pkl', '42 kimg'],
    ),
    'unwritable': (
        lambda stored: None,
        ['--outdir=reconstruct_phema.py/out'],
        ['--outdir=reconstruct_phema.py/out'],
    ),
    'a tracked width in the way': (
        lambda stored: None,
        ['--outprefix=network-snapshot', '--outstd=0.07,0.1', '--instd=0.05'],
        ['network-snapshot-000004-0.100.pkl', 'is not a reconstruction'],
    ),
    'something else in the way': (
        lambda stored: (stored / 'phema-000004-0.150.pkl').write_text('mine'),
        ['--inprefix=network-snapshot'],
        ['phema-000004-0.150.pkl', 'is not a reconstruction'],
    ),
}


@pytest.mark.parametrize('case', WRONG)
def test_wrong_contents_exit_with_status_1_and_change_nothing(stored, case):
    break_it, options, words = WRONG[case]
    break_it(stored)
    before = {path: path.read_bytes() for path in stored.iterdir()} if stored.exists() else {}
    assert_one_clear_error(invoke(f'--indir={stored}', '--outstd=0.15', *options), *words)
    assert before == ({path: path.read_bytes() for path in stored.iterdir()} if stored.exists() else {})


def test_what_a_resumed_run_may_change_and_older_versions_did_not_say_is_no_contradiction(stored):
    for nimg, path, cache, fid in ((1000, 'data.zip', True, 5.0), (2000, 'elsewhere.zip', False, 4.0)):
        store(
            stored, nimg, 0.1, small_net(), dataset_kwargs=dict(path=path, resolution=8, cache=cache), fid=fid
        )
    store(stored, 4000, 0.1, small_net(), seed=7, fid=3.0)
    reconstructed(f'--indir={stored}', '--outstd=0.15')
    assert 'fid' not in load_network(stored / 'phema-000004-0.150.pkl').metadata
