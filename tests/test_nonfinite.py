"""Images that are not finite: named, neither written nor measured, wherever a network makes images; and features that are not."""

import functools
import json
import math
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import FAST, TINY_NETWORK, assert_one_clear_error, lines, run_ranks
from latents import StandInVAE, save_latent_network
from PIL import Image

import dataset_tool
import edit
import fid
import generate
import search
import train
import validation
from dnnlib import NotFinite
from metrics.calc import compute_features
from metrics.generated import GeneratedImages
from metrics.images import ArrayImages
from sampling import edit_files, editing, generation
from training import samplers
from training.checkpoint import load_network, save_snapshot
from training.networks import encoders

SEEDS = range(8)
BROKEN = 4  # the class that overflows


@pytest.fixture(scope='module')
def overflowing(teacher, tmp_path_factory):
    """(snapshot whose class 4 overflows, the seeds of `SEEDS` that draw this class)."""
    net = load_network(teacher)
    with torch.no_grad():
        net.model.map_label.weight[:, BROKEN] = 1e38
    path = tmp_path_factory.mktemp('overflowing') / 'overflowing.pkl'
    save_snapshot(path, net)
    noise = generation.SeededNoise(SEEDS, 'cpu')
    noise.randn([1, 8, 8])
    bad = [seed for seed, label in zip(SEEDS, noise.randint(10).tolist()) if label == BROKEN]
    assert 0 < len(bad) < len(SEEDS) - 2
    return path, bad


@pytest.fixture
def call(overflowing):
    """A script's command in this process, with the snapshot."""
    return lambda command, *arguments: CliRunner().invoke(
        command, [*map(str, arguments), f'--network={overflowing[0]}']
    )


def seeds_text(bad):
    return f'of seed{"s" * (len(bad) > 1)} {",".join(map(str, bad))}'


def written(folder):
    return sorted(int(path.stem) for path in folder.rglob('*.*'))


# ----------------------------------------------------------------------------
# generate.py.

OPTIONS = ['--workers=0', f'--seeds=0-{len(SEEDS) - 1}', '--steps=2', '--batch=3']


@pytest.mark.parametrize('kind', [[], ['--subdirs'], ['--latents']])
def test_a_folder_gets_the_finite_images_alone_and_loses_what_an_earlier_run_left_of_the_others(
    tmp_path, call, teacher, overflowing, kind
):
    _, bad = overflowing
    CliRunner().invoke(generate.main, [*OPTIONS, *kind, f'--outdir={tmp_path}', f'--network={teacher}'])
    assert written(tmp_path) == list(SEEDS)
    result = call(generate.main, *OPTIONS, *kind, f'--outdir={tmp_path}')
    assert_one_clear_error(
        result,
        f'{len(bad)} of 8',
        seeds_text(bad),
        f'{len(bad)} of the same names, of an earlier run, removed',
    )
    assert written(tmp_path) == [seed for seed in SEEDS if seed not in bad] and 'Done' not in result.output


@pytest.mark.parametrize('name', ['out.npz', 'out.zip'])
def test_a_single_file_does_not_appear_and_an_earlier_one_stays(tmp_path, call, overflowing, name):
    assert_one_clear_error(
        call(generate.main, *OPTIONS, f'--dest={tmp_path / name}'),
        seeds_text(overflowing[1]),
        'was not written',
    )
    assert not list(tmp_path.iterdir())
    (tmp_path / name).write_bytes(b'earlier')
    assert_one_clear_error(call(generate.main, *OPTIONS, f'--dest={tmp_path / name}'), 'is of an earlier run')
    assert [path.name for path in tmp_path.iterdir()] == [name] and (
        tmp_path / name
    ).read_bytes() == b'earlier'


def test_allow_nonfinite_writes_them_all_and_names_them(tmp_path, call, overflowing):
    for where in (
        '--outdir=' + str(tmp_path / 'folder'),
        '--dest=' + str(tmp_path / 'a.npz'),
        '--dest=' + str(tmp_path / 'a.zip'),
    ):
        result = call(generate.main, *OPTIONS, where, '--allow-nonfinite')
        assert (
            result.exit_code == 0
            and 'Warning' in result.stderr
            and seeds_text(overflowing[1]) in result.stderr
        ), result.output
    assert written(tmp_path / 'folder') == list(SEEDS) and len(np.load(tmp_path / 'a.npz')['arr_0']) == 8
    assert (
        len([name for name in zipfile.ZipFile(tmp_path / 'a.zip').namelist() if name.endswith('.png')]) == 8
    )


@pytest.mark.parametrize('where', ['folder', 'a.npz'])
def test_the_processes_decide_together(tmp_path, overflowing, where):
    """Batches of one on two processes, with one bad image on the second process only: process 0 has only sound ones, and names it all the same."""
    network, bad = overflowing
    sound = [seed for seed in SEEDS if seed not in bad]
    chosen = [sound[0], bad[0], sound[1]]
    option = f'--outdir={tmp_path / where}' if where == 'folder' else f'--dest={tmp_path / where}'
    result = run_ranks(
        2,
        'generate.py',
        f'--network={network}',
        option,
        f'--seeds={",".join(map(str, chosen))}',
        '--batch=1',
        '--steps=2',
        '--workers=0',
        check=False,
    )
    assert (
        result.returncode == 1
        and result.stderr.count('Error: 1 of 3 images is not finite') == 1
        and seeds_text(bad[:1]) in result.stderr
    )
    assert (
        (written(tmp_path / where) == sorted([sound[0], sound[1]]))
        if where == 'folder'
        else not list(tmp_path.iterdir())
    )


class OverflowingVAE(StandInVAE):
    """Decodes in half precision, which overflows for latents that are bright, and drops the fourth channel."""

    def decode(self, z):
        return SimpleNamespace(sample=(super().decode(z).sample * 3e4).half() / 3e4)


def test_a_vae_that_overflows_is_noticed_and_so_are_latents_that_it_would_not_show(tmp_path, monkeypatch):
    """In half precision 3e4 · x overflows from x = 2.18 on. Of the other image the network itself draws one infinity, where the VAE does not look."""
    monkeypatch.setattr('training.networks.encoders.load_vae', lambda name, device: OverflowingVAE())
    encoder = encoders.StabilityVAEEncoder(raw_mean=[0] * 4, raw_std=[0.5] * 4)
    drawn = torch.zeros(3, 4, 4, 4, dtype=torch.float64)
    drawn[1, 0, 0, 0], drawn[2, 3, 0, 0] = 3, torch.inf
    images, finite = generation.checked_images(encoder, drawn)
    assert finite.tolist() == [True, False, False] and images.dtype == torch.uint8
    network = save_latent_network(tmp_path / 'latent.pkl', dict(raw_mean=[0.5] * 4, raw_std=[1e-3] * 4))
    result = CliRunner().invoke(
        generate.main,
        [f'--network={network}', f'--dest={tmp_path / "o.npz"}', '--seeds=0-1', '--steps=2', '--workers=0'],
    )
    assert result.exit_code == 0, result.output
    network = save_latent_network(
        tmp_path / 'latent.pkl', dict(raw_mean=[9.0] * 4, raw_std=[1e-3] * 4)
    )  # too bright
    result = CliRunner().invoke(
        generate.main,
        [f'--network={network}', f'--outdir={tmp_path / "o"}', '--seeds=0-1', '--steps=2', '--workers=0'],
    )
    assert_one_clear_error(result, '2 of 2 images are not finite', 'of seeds 0-1')
    assert not list((tmp_path / 'o').iterdir())


def test_latents_of_a_data_set_are_not_written_where_the_vae_overflows(tmp_path, monkeypatch):
    """One of three images; a data set with NaN in it, and in its statistics, would only be noticed by training."""

    class Overflowing(StandInVAE):
        def encode(self, x):
            found = super().encode(x)
            found.latent_dist.mean[(x.mean(dim=(1, 2, 3)) > 0.9)] = torch.inf
            return found

    monkeypatch.setattr('training.networks.encoders.load_vae', lambda name, device: Overflowing())
    (tmp_path / 'images').mkdir()
    for i, level in enumerate((0, 255, 100)):
        Image.fromarray(np.full([8, 8, 3], level, np.uint8)).save(tmp_path / 'images' / f'{i}.png')
    result = CliRunner().invoke(
        dataset_tool.main,
        [f'--source={tmp_path / "images"}', f'--dest={tmp_path / "latents.zip"}', '--encode-vae=x'],
    )
    assert_one_clear_error(result, '1.png', 'not finite')
    assert not (tmp_path / 'latents.zip').exists()


def test_decode_is_what_it_was():
    """Levels cut off and cast, for EDM2's tools, which call it with an encoder's embedded source."""
    values = torch.linspace(-1.5, 1.5, 301)[None, None]
    assert torch.equal(
        encoders.StandardRGBEncoder().decode(values), (values * 127.5 + 128).clip(0, 255).to(torch.uint8)
    )
    with pytest.raises(NotFinite, match=r'1 of 2 images is not finite .*of seed 5'):
        net = Broken(evaluation=1, image=1)
        generation.generate_batch(net, [3, 5], solver='euler', steps=2)


# ----------------------------------------------------------------------------
# Samplers and edits: what is not finite in a single evaluation shows at the end.


class Broken(torch.nn.Module):
    """D = x / (1 + sigma²), and `value` in one pixel of one image at one evaluation."""

    img_channels, img_resolution, label_dim, sigma_min, sigma_max = 3, 4, 0, 0.002, 80.0

    def __init__(self, evaluation, image, value=torch.inf, metadata=()):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros([]))
        self.metadata = dict(metadata)
        self.evaluation, self.image, self.value, self.calls = evaluation, image, value, 0

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

    def forward(self, x, sigma, class_labels=None):
        denoised = (x / (1 + sigma**2)).clone()
        if self.calls == self.evaluation:
            denoised[self.image, 1, 2, 3] = self.value
        self.calls += 1
        return denoised


SAMPLINGS = {
    'student': dict(solver='student', steps=3),
    'cm': dict(solver='cm', steps=3),
    'euler': dict(solver='euler', steps=3),
    'heun': dict(solver='heun', steps=2),
    'churn': dict(solver='heun', steps=2, S_churn=20),
    'addim': dict(solver='addim', steps=3),
    'vp': dict(solver='euler', steps=3, discretization='vp', schedule='vp', scaling='vp'),
}


@pytest.mark.parametrize('value', [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize('name', SAMPLINGS)
def test_no_sampler_hides_an_evaluation_that_is_not_finite(name, value):
    """Each of them makes three evaluations; clamped to [-1, 1] an infinity would be a white pixel, and the next noise would cover it."""
    latents = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for evaluation in range(3):
        net = Broken(evaluation, 1, value)
        images = samplers.sample(net, latents, **SAMPLINGS[name])
        assert net.calls == 3 and generation.all_finite(images).tolist() == [True, False], evaluation


@pytest.mark.parametrize('solver', ['student', 'cm'])
@pytest.mark.parametrize('kind', ['inpaint', 'colorize', 'superres'])
def test_no_edit_hides_it(kind, solver):
    """The broken pixel is one that inpainting puts the image's own over."""
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
    unknown = torch.zeros(4, 4, dtype=torch.bool)
    unknown[0] = True
    edits = dict(
        inpaint=lambda: editing.inpainting(images, unknown),
        colorize=lambda: editing.colorization(editing.luma(images)),
        superres=lambda: editing.superresolution(editing.block_mean(images, 2), 2),
    )
    for evaluation in range(2):
        drawn = samplers.sample(
            Broken(evaluation, 0), torch.zeros(2, 3, 4, 4), solver=solver, steps=2, edit=edits[kind]()
        )
        assert generation.all_finite(drawn).tolist() == [False, True]


def test_edit_names_image_and_seed_and_leaves_no_grid(tmp_path, digits, monkeypatch):
    net = Broken(1, 1, metadata=dict(objective='mcd', solver='cm', sigmas=[80.0, 1.0, 0.0], S=2))
    net.img_channels, net.img_resolution = 1, 8
    net.forward = functools.partial(gray_broken, net)
    monkeypatch.setattr(edit_files, 'load', lambda network: net)
    (tmp_path / 'images').mkdir()
    (tmp_path / 'grid.png').write_bytes(b'earlier')
    common = [
        'inpaint',
        '--network=x',
        f'--input={digits}',
        '--indices=0-1',
        '--box=0,0,8,4',
        '--seeds=7',
        f'--outdir={tmp_path}',
    ]
    result = CliRunner().invoke(edit.main, common)
    assert_one_clear_error(result, '1 of 2 images is not finite', 'img00000001-000007')
    assert [path.name for path in (tmp_path / 'images').rglob('*.png')] == [
        'img00000000-000007.png'
    ] and not (tmp_path / 'grid.png').exists()


def gray_broken(net, x, sigma, class_labels=None):
    denoised = x / (1 + sigma**2)
    if net.calls == net.evaluation:
        denoised[net.image] = torch.inf
    net.calls += 1
    return denoised


def test_interpolation_names_its_images(tmp_path, call, overflowing):
    sound, bad = next(seed for seed in SEEDS if seed not in overflowing[1]), overflowing[1][0]
    result = call(
        edit.main,
        'interpolate',
        f'--seeds={bad},{sound}',
        '--count=2',
        '--steps=2',
        f'--outdir={tmp_path / "a"}',
    )
    assert_one_clear_error(
        result, '2 of 2 images are not finite', '000000, 000001'
    )  # the first seed's label holds throughout
    result = call(
        edit.main,
        'interpolate',
        f'--seeds={sound},{bad},{sound}',
        '--count=2',
        '--steps=2',
        f'--outdir={tmp_path / "b"}',
    )
    assert_one_clear_error(result, '2 of 4 images are not finite', '000002, 000003')
    assert written(tmp_path / 'b') == [0, 1]


# ----------------------------------------------------------------------------
# Measures.


@pytest.fixture
def measured(rulers):
    return [f'--ref={rulers / "pca.npz"}', f'--detector={rulers / "pca.pt"}', '--batch=4', '--steps=2']


def test_a_measure_of_them_is_an_error_that_names_the_seeds_also_from_the_cache(
    tmp_path, call, overflowing, measured
):
    """Of two batches the one with bad images is not cached, so that they are noticed again."""
    _, bad = overflowing
    for _ in range(2):
        result = call(fid.main, 'calc', *measured, '--seeds=0-7', f'--cache={tmp_path}')
        assert_one_clear_error(result, f'{len(bad)} of 8', seeds_text(bad))
        assert result.stdout == ''
    assert len(list(tmp_path.rglob('*.npz'))) == sum(
        not any(seed in bad for seed in part) for part in (range(4), range(4, 8))
    )


def test_processes_give_one_error_between_them(overflowing, measured):
    result = run_ranks(
        2, 'fid.py', 'calc', f'--network={overflowing[0]}', *measured, '--seeds=0-7', check=False
    )
    told = [
        line for line in result.stderr.splitlines() if line.startswith('Error: ')
    ]  # torchrun adds words of its own
    assert (
        result.returncode == 1
        and result.stdout == ''
        and len(told) == 1
        and seeds_text(overflowing[1]) in told[0]
    )


def test_the_validation_command_writes_a_line_without_a_distance_and_goes_on_to_the_next_snapshot(
    tmp_path, call, teacher, overflowing, measured
):
    network, bad = overflowing
    result = CliRunner().invoke(
        validation.main,
        [*measured, '--num=8', f'--network={network}', f'--network={teacher}', f'--outdir={tmp_path}'],
    )
    assert_one_clear_error(result, str(network), seeds_text(bad))
    failed, sound = lines(tmp_path / 'metrics-val.jsonl')
    assert (
        failed['fid'] is None
        and failed['nonfinite'] == len(bad)
        and seeds_text(bad) in failed['problem']
        and failed['num_images'] == 8
    )
    assert sound['fid'] > 0 and failed.keys() - sound.keys() == {'nonfinite', 'problem'}


def test_a_search_ends_with_the_seeds(tmp_path, call, overflowing, rulers):
    result = call(
        search.main,
        f'--ref={rulers / "pca.npz"}',
        f'--detector={rulers / "pca.pt"}',
        f'--log={tmp_path / "log.jsonl"}',
        '--solver=cm',
        '--num=8',
        '--batch=4',
        '--scan=2',
        '--tolerance=1',
    )
    assert_one_clear_error(result, seeds_text(overflowing[1]))
    assert len(lines(tmp_path / 'log.jsonl')) == 1  # what it was a search for, and no value


class Half(torch.nn.Module):
    """Features that overflow for bright images, or class probabilities that do."""

    def __init__(self, of_classes: bool):
        super().__init__()
        self.of_classes = of_classes

    def forward(self, x, return_features: bool = False):
        features = torch.stack([x[:, 0, 0, 0], x[:, 0, 0, 1], x[:, 0, 1, 0]], dim=1).float()
        broken = torch.where(features > 200, torch.inf, features)
        return (
            (features if self.of_classes else broken)
            if return_features
            else (broken if self.of_classes else features) / 765 + 1 / 6
        )


@pytest.mark.parametrize(
    'metrics, of_classes',
    [
        ('fid', False),
        ('kid', False),
        ('precision', False),
        ('coverage', False),
        ('fid_inf', False),
        ('is', True),
    ],
)
def test_a_detector_that_is_not_finite_is_named_whatever_the_measure(tmp_path, metrics, of_classes):
    """16 images of which three are bright. No interval, no score, no share comes of it, and its features are not cached."""
    images = np.random.default_rng(0).integers(0, 200, [16, 8, 8, 3], dtype=np.uint8)
    images[[3, 8, 12], 0, 0, 0] = 255
    np.savez(tmp_path / 'images.npz', images)
    sound = np.random.default_rng(1).integers(0, 200, [16, 8, 8, 3], dtype=np.uint8)
    np.savez(tmp_path / 'sound.npz', sound)
    torch.jit.script(Half(of_classes)).save(tmp_path / 'half.pt')
    reference = [] if metrics == 'is' else [f'--ref={tmp_path / "sound.npz"}']
    for _ in range(2):
        result = CliRunner().invoke(
            fid.main,
            [
                'calc',
                f'--images={tmp_path / "images.npz"}',
                *reference,
                f'--detector={tmp_path / "half.pt"}',
                f'--metrics={metrics}',
                '--num=16',
                '--batch=4',
                f'--cache={tmp_path / "cache"}',
            ],
        )
        assert_one_clear_error(
            result, 'Detector half returns features that are not finite', 'for 3 of 16 images'
        )
    kept = [
        4,
        *(range(0, 16, 4) if reference else []),
    ]  # of four batches the one that has no bright image, and all of the reference
    assert sorted(int(path.stem) for path in (tmp_path / 'cache').rglob('*.npz')) == sorted(kept)
    result = CliRunner().invoke(
        fid.main,
        [
            'ref',
            f'--data={tmp_path / "images.npz"}',
            f'--detector={tmp_path / "half.pt"}',
            '--batch=4',
            f'--dest={tmp_path / "ref.npz"}',
        ],
    )
    assert (
        of_classes
        or (assert_one_clear_error(result, 'Detector half'), not (tmp_path / 'ref.npz').exists())[1]
    )


def test_images_come_before_features(tmp_path):
    """Where both are bad the images are at fault."""
    net, detector = (
        Broken(0, 1),
        SimpleNamespace(name='blind', dim=1, device='cpu', digest='', has_classes=False),
    )
    blind = type(
        'Blind',
        (),
        dict(vars(detector), __call__=lambda self, images: torch.full([len(images), 1], torch.nan)),
    )()
    with pytest.raises(NotFinite, match='of seed 4') as error:
        compute_features(GeneratedImages(net, [3, 4], 2, solver='euler', steps=2), {'x': blind}, 2)
    assert error.value.counts == {'nonfinite': 1}
    np.save(tmp_path / 'a.npy', np.zeros([2, 8, 8, 3], np.uint8))
    with pytest.raises(NotFinite, match=r'Detector blind .* 2 of 2') as error:
        compute_features(ArrayImages(tmp_path / 'a.npy'), {'x': blind}, 2)
    assert error.value.counts == {'nonfinite_features': 2}


# ----------------------------------------------------------------------------
# In training.


@pytest.fixture
def failing(monkeypatch):
    """Makes the images of seed 3 infinite in the evaluations at some numbers of images seen."""
    own, moments = generation.generate_latents, {}

    def generate_latents(net, seeds, *arguments, **options):
        drawn = own(net, seeds, *arguments, **options)
        if net.metadata.get('nimg') in moments:
            drawn[[seed == 3 for seed in seeds]] = moments[net.metadata['nimg']]
        return drawn

    monkeypatch.setattr(generation, 'generate_latents', generate_latents)
    return moments


def train_with_evaluations(folder, digits, rulers, *extra):
    """Evaluations at 64 (the second step), 96 and 128 images; a state at every tick."""
    return CliRunner().invoke(
        train.main,
        [
            f'--outdir={folder}',
            f'--data={digits}',
            '--cond=1',
            *TINY_NETWORK,
            *FAST,
            '--batch=32',
            '--duration=0.000128',
            '--tick=0.032',
            '--augment=0',
            '--ema=10kimg',
            '--snap=1',
            '--dump=1',
            '--keep=1',
            '--val=1',
            '--val_every=1',
            '--val_num=8',
            '--val_batch=8',
            '--val_steps=2',
            f'--val_ref={rulers / "pca.npz"}',
            f'--val_detector={rulers / "pca.pt"}',
            *extra,
        ],
    )


def test_an_evaluation_in_training_that_fails_is_recorded_warned_of_and_never_the_best(
    tmp_path, digits, rulers, failing
):
    """Of three evaluations the second fails. The best state stays the best; snapshot and state of the failed one have no FID."""
    plain = train_with_evaluations(tmp_path / 'plain', digits, rulers)
    failing[96] = torch.inf
    result = train_with_evaluations(
        tmp_path / 'failing', digits, rulers, f'--val_dump_images_dir={tmp_path / "images"}'
    )
    assert plain.exit_code == result.exit_code == 0, result.output
    expected, records = (lines(tmp_path / name / 'metrics-val.jsonl') for name in ('plain', 'failing'))
    assert [record['nimg'] for record in records] == [64, 96, 128]
    assert [record['fid'] for record in records] == [
        expected[0]['fid'],
        None,
        expected[2]['fid'],
    ] and records[1]['nonfinite'] == 1
    log = (tmp_path / 'failing' / 'log.txt').read_text()
    assert (
        'Warning: there is no FID of ema at 0.096 kimg' in log
        and 'of seed 3' in log
        and 'no picture of samples (ema)' in log
    )
    assert log.rstrip().endswith('Done.')
    pictures = sorted(path.name for path in (tmp_path / 'failing').glob('fakes-*.png'))
    assert pictures == ['fakes-000000064-ema.png', 'fakes-000000128-ema.png']
    assert written(tmp_path / 'images' / '000000096-ema') == [0, 1, 2, 4, 5, 6, 7]
    assert load_network(tmp_path / 'failing' / 'network-snapshot-000000-96.pkl').metadata['fid'] is None
    state = torch.load(
        max((tmp_path / 'failing').glob('training-state-*.pt'), key=lambda path: path.stat().st_mtime_ns),
        weights_only=True,
    )
    kept = state['progress']['states']
    finite = {name: value for name, value in kept.items() if value is not None}
    assert min(finite.values()) == min(record['fid'] for record in records if record['fid'] is not None)
    for name in ('net', 'averages'):  # training itself does not notice
        other = torch.load(
            max((tmp_path / 'plain').glob('training-state-*.pt'), key=lambda path: path.stat().st_mtime_ns),
            weights_only=True,
        )
        assert json.dumps(digest(state[name])) == json.dumps(digest(other[name]))


def digest(value):
    if isinstance(value, torch.Tensor):
        return value.double().sum().item()
    return (
        {key: digest(entry) for key, entry in value.items()}
        if isinstance(value, dict)
        else [digest(entry) for entry in value]
    )


def test_a_detector_that_fails_in_training_does_not_end_it(tmp_path, digits, rulers, monkeypatch):
    from metrics.detectors import Detector

    own = Detector.__call__
    monkeypatch.setattr(
        Detector, '__call__', lambda self, images: own(self, images) * (torch.nan if len(images) == 8 else 1)
    )
    result = train_with_evaluations(tmp_path, digits, rulers)
    assert result.exit_code == 0, result.output
    assert [
        (record['fid'], record['nonfinite_features']) for record in lines(tmp_path / 'metrics-val.jsonl')
    ] == [(None, 8)] * 3


def test_readers_of_the_log_pass_over_an_evaluation_without_a_distance():
    """W&B and TensorBoard get the count, and no FID."""
    from training.run_log import json_line, scalars

    record = dict(kimg=0.1, nimg=96, fid=None, num_images=8, ema='ema', nonfinite=1, problem='a sentence')
    assert scalars(record) == {'Metrics/nonfinite': 1} and json.loads(json_line(record))['fid'] is None
    assert math.isfinite(scalars(dict(record, fid=2.0))['Metrics/fid'])


def test_the_example_refuses_too(overflowing, tmp_path):
    import example

    with pytest.raises(Exception, match='images are not finite'):
        example.main(str(overflowing[0]), str(tmp_path / 'grid.png'))
    assert not (tmp_path / 'grid.png').exists()


def test_a_dump_tells_of_images_of_an_earlier_evaluation(tmp_path, digits, rulers):
    folder = tmp_path / 'images' / '000000064-ema'
    folder.mkdir(parents=True)
    Image.new('L', (8, 8)).save(folder / '000123.png')
    result = train_with_evaluations(
        tmp_path / 'run', digits, rulers, f'--val_dump_images_dir={tmp_path / "images"}', '--val_overwrite=1'
    )
    assert result.exit_code == 0 and f'{folder} holds 1 images of an earlier evaluation' in result.output, (
        result.output
    )
