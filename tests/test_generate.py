"""generate.py, example.py and the code they share."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import psutil
import pytest
import torch
from click.testing import CliRunner
from helpers import ROOT, assert_one_clear_error, run, run_ranks
from latents import npy, random_latents, save_latent_network, save_vae, use_stand_in
from PIL import Image

import generate
import validation
from data.dataset import ImageFolderDataset
from data.label_space import LabelSpace
from dnnlib import EasyDict, UserError
from metrics.images import open_images
from sampling import generation, writers
from training import samplers
from training.checkpoint import load_network, save_snapshot
from training.consistency_ops import student_grid
from training.networks import encoders


def invoke(*arguments):
    """In this process, which writes too."""
    return CliRunner().invoke(generate.main, ['--workers=0', *map(str, arguments)], prog_name='generate.py')


def pixels(folder):
    return {
        str(path.relative_to(folder)): np.asarray(Image.open(path)) for path in sorted(folder.rglob('*.png'))
    }


@pytest.fixture(scope='module')
def student(teacher, tmp_path_factory):
    """A snapshot that says it is a 4-step student (its weights are the teacher's)."""
    path = tmp_path_factory.mktemp('student') / 'student.pkl'
    sigmas = student_grid(4, 0.002, 80, 7, 'full').tolist()
    save_snapshot(
        path,
        load_network(teacher),
        objective='mcd',
        S=4,
        sigmas=sigmas,
        sigma_min=0.002,
        sigma_max=80.0,
        rho=7.0,
        student_grid='full',
    )
    return path


def test_an_image_depends_on_its_seed_alone(tmp_path, student):
    """One process with batches of 5, of 16, and two processes: bit-identical 8-bit images up to rounding of
    one level."""
    run('generate.py', f'--network={student}', f'--outdir={tmp_path / "a"}', '--seeds=0-15', '--batch=5')
    run_ranks(
        2,
        'generate.py',
        f'--network={student}',
        f'--outdir={tmp_path / "b"}',
        '--seeds=0-15',
        '--batch=4',
        '--steps=4',
    )
    invoke(f'--network={student}', f'--outdir={tmp_path / "c"}', '--seeds=3,7-8')
    a, b, c = (pixels(tmp_path / name) for name in 'abc')
    assert list(a) == list(b) == [f'{seed:06d}.png' for seed in range(16)] and list(c) == [
        '000003.png',
        '000007.png',
        '000008.png',
    ]
    for other in (b, c):
        assert all(np.abs(a[name].astype(int) - other[name]).max() <= 1 for name in other)
    assert len({image.tobytes() for image in a.values()}) == 16


def test_solver_and_steps_default_to_what_the_snapshot_is(tmp_path, student, teacher):
    assert (
        '(student, 4 evaluations each)'
        in invoke(f'--network={student}', f'--outdir={tmp_path}', '--seeds=0').output
    )
    assert (
        '(heun, 35 evaluations each)'
        in invoke(f'--network={teacher}', f'--outdir={tmp_path}', '--seeds=0').output
    )


def test_a_published_student_is_sampled_with_its_own_steps(fixtures, tmp_path):
    result = invoke(
        '--network', fixtures / 'published-student.pkl', f'--outdir={tmp_path}', '--seeds=0-3', '--steps=8'
    )
    assert result.exit_code == 0 and '(student, 8 evaluations each)' in result.output
    result = invoke('--network', fixtures / 'published-student.pkl', f'--outdir={tmp_path}', '--steps=4')
    assert_one_clear_error(result, 'trained for 8 steps', '--force-steps')


def test_subfolders_hold_a_thousand_seeds_each(tmp_path, student):
    invoke(f'--network={student}', f'--outdir={tmp_path}', '--seeds=999-1000', '--subdirs')
    assert list(pixels(tmp_path)) == ['000000/000999.png', '001000/001000.png']


def test_a_class_can_be_chosen_and_changes_the_image(tmp_path, teacher):
    for k in (1, 2):
        invoke(
            f'--network={teacher}', f'--outdir={tmp_path / str(k)}', '--seeds=0', f'--class={k}', '--steps=4'
        )
    assert not np.array_equal(pixels(tmp_path / '1')['000000.png'], pixels(tmp_path / '2')['000000.png'])


def test_edms_options_reach_the_sampler(tmp_path, teacher):
    """Each of them changes the image of seed 0."""
    base = ['--seeds=0', '--steps=8']
    variants = [
        [],
        ['--S_churn=40'],
        ['--S_churn=40', '--S_noise=1.5'],
        ['--S_churn=40', '--S_min=1', '--S_max=2'],
        ['--sigma_max=20'],
        ['--sigma_min=0.3'],
        ['--rho=3'],
        ['--solver=euler'],
        ['--disc=vp'],
        ['--disc=ve', '--schedule=ve'],
        ['--schedule=vp', '--scaling=vp'],
    ]
    images = []
    for i, options in enumerate(variants):
        result = invoke(f'--network={teacher}', f'--outdir={tmp_path / str(i)}', *base, *options)
        assert result.exit_code == 0, result.output
        images.append(pixels(tmp_path / str(i))['000000.png'].tobytes())
    assert len(set(images)) == len(variants)


@pytest.mark.parametrize(
    'options, words',
    [
        (['--class=10'], ['--class=10 does not exist', '10 classes']),
        (['--steps=8'], ['trained for 4 steps']),
        (['--S_churn=1'], ['no option S_churn']),
        (['--network=nowhere.pkl'], ['nowhere.pkl']),
    ],
)
def test_what_cannot_be_done_is_one_clear_error(tmp_path, student, options, words):
    assert_one_clear_error(invoke(f'--network={student}', f'--outdir={tmp_path / "out"}', *options), *words)


def test_a_hostile_snapshot_is_refused_and_nothing_of_it_runs(tmp_path):
    (tmp_path / 'hostile.pkl').write_bytes(
        b'cos\nsystem\n(S"touch ' + str(tmp_path / 'canary').encode() + b'"\ntR.'
    )
    assert_one_clear_error(
        invoke(f'--network={tmp_path / "hostile.pkl"}', f'--outdir={tmp_path / "out"}'), 'hostile.pkl'
    )
    assert not (tmp_path / 'canary').exists() and not (tmp_path / 'out').exists()


def test_what_is_refused_leaves_no_folder(tmp_path, student, teacher):
    """The sampler, which refuses some options only when it runs, first runs with an identity denoiser."""
    for network, options in (
        (student, ['--S_churn=1']),
        (student, ['--class=10']),
        (teacher, ['--solver=cm', '--taus=1,2']),
    ):
        for where in ('--outdir=' + str(tmp_path / 'a' / 'b'), '--dest=' + str(tmp_path / 'a' / 'b.npz')):
            assert_one_clear_error(invoke(f'--network={network}', where, *options))
            assert not (tmp_path / 'a').exists()


@pytest.mark.parametrize('kind', [[], ['--subdirs'], ['--latents'], ['--latents', '--subdirs']])
def test_images_that_a_folder_holds_besides_are_told_and_refused_if_wanted(tmp_path, student, kind):
    """Those of other seeds, in folders or not; of the same seeds in the other layout; and of names that are
    no seeds. Text is none of them."""
    run_with = lambda *options: invoke(f'--network={student}', f'--outdir={tmp_path}', *options)
    assert 'holds other' not in run_with('--seeds=0-5,1000-1001', *kind).stderr
    assert (
        'holds other' not in run_with('--seeds=0-5,1000-1001', *kind, '--strict-outdir').stderr
    )  # its own are written over
    before = {path: path.read_bytes() for path in tmp_path.rglob('*.*')}
    refused = run_with('--seeds=4-6', *kind, '--strict-outdir')
    assert_one_clear_error(refused, '6 of other seeds (', '000000.', '--strict-outdir')
    assert {
        path: path.read_bytes() for path in tmp_path.rglob('*.*')
    } == before and 'Generating' not in refused.output

    other_layout = [option for option in kind if option != '--subdirs'] + ['--subdirs'] * (
        '--subdirs' not in kind
    )
    result = run_with('--seeds=4-6', *other_layout)
    assert result.exit_code == 0 and 'Warning' in result.stderr and '6 of other seeds' in result.stderr
    assert '2 of these seeds, but ' in result.stderr and 'folders as by --subdirs' in result.stderr
    (tmp_path / 'notes.txt').write_text('nothing')
    (tmp_path / '.hidden.png').write_bytes(b'')
    (tmp_path / 'more').mkdir()
    Image.new('L', (8, 8)).save(tmp_path / 'more' / 'other.jpg')
    Image.new('L', (8, 8)).save(tmp_path / '7.png')  # a seed is written with six digits
    assert '2 of other names (7.png, more/other.jpg)' in run_with('--seeds=0-6,1000-1001', *kind).stderr


def test_a_single_file_has_no_folder_to_be_strict_about(tmp_path, student):
    assert_one_clear_error(
        invoke(f'--network={student}', f'--dest={tmp_path / "a.npz"}', '--strict-outdir'),
        '--strict-outdir goes with',
        status=2,
    )


def test_an_unwritable_folder_is_named(tmp_path, student):
    (tmp_path / 'file').write_text('')
    assert_one_clear_error(invoke(f'--network={student}', f'--outdir={tmp_path / "file" / "x"}'), '--outdir')


@pytest.mark.parametrize(
    'options',
    [['--seeds=5-1'], ['--seeds=a'], ['--solver=dpm'], ['--batch=0'], ['--workers=-1'], ['--dest=a.npz'], []],
)
def test_wrong_usage_exits_with_status_2(tmp_path, student, options):
    network = [f'--network={student}'] if options else []
    assert_one_clear_error(invoke(*network, f'--outdir={tmp_path}', *options), status=2)


def test_latents_come_before_labels_and_churn_noise():
    """EDM's order for one generator per seed."""
    noise = generation.SeededNoise([5, 6], 'cpu')
    latents, labels, churn = noise.randn([1, 2, 2]), noise.randint(10), noise.randn_like(torch.zeros(2, 3))
    g = torch.Generator().manual_seed(6)
    assert torch.equal(latents[1], torch.randn(1, 2, 2, generator=g)) and labels[1] == torch.randint(
        10, [], generator=g
    )
    assert torch.equal(churn[1], torch.randn(3, generator=g))


# ----------------------------------------------------------------------------
# One file instead of many.

SCATTERED = [5, 3, 1000, 4, 7, 8, 2]  # neither sorted nor without gaps


@pytest.fixture(scope='module')
def scattered(student, tmp_path_factory):
    """Images and classes of these seeds, [7, 8, 8, 1] and [7], drawn without generate.py."""
    classes = generation.RecordedLabels(generation.uniform_labels)
    images = generation.generate_batch(load_network(student), SCATTERED, classes)
    return images.permute(0, 2, 3, 1).numpy(), classes.tolist()


def seeds_option(seeds):
    return '--seeds=' + ','.join(map(str, seeds))


def test_an_array_holds_the_images_in_the_order_of_seeds_and_their_classes(tmp_path, student, scattered):
    """A process of its own generates batches of 3; rounding may differ by one level."""
    images, classes = scattered
    run(
        'generate.py',
        f'--network={student}',
        f'--dest={tmp_path / "new" / "x.npz"}',
        seeds_option(SCATTERED),
        '--batch=3',
        '--workers=2',
    )
    with np.load(tmp_path / 'new' / 'x.npz') as file:
        assert sorted(file) == ['arr_0', 'arr_1'] and (file['arr_0'].dtype, file['arr_1'].dtype) == (
            np.uint8,
            np.int64,
        )
        assert np.abs(file['arr_0'].astype(int) - images).max() <= 1 and file['arr_1'].tolist() == classes
    assert [path.name for path in (tmp_path / 'new').iterdir()] == ['x.npz']
    seen_by_fid = open_images(tmp_path / 'new' / 'x.npz').batch(range(7))[0]
    assert np.abs(seen_by_fid.permute(0, 2, 3, 1).numpy().astype(int) - images).max() <= 1


def test_a_zip_is_a_data_set(tmp_path, student, scattered):
    images, classes = scattered
    (tmp_path / 'x.zip').write_text('an earlier one')
    result = invoke(
        f'--network={student}', f'--dest={tmp_path / "x.zip"}', seeds_option(SCATTERED), '--batch=3'
    )
    assert result.exit_code == 0, result.output
    dataset = ImageFolderDataset(tmp_path / 'x.zip', use_labels=True)
    assert len(dataset) == 7 and [dataset.get_label(i).argmax() for i in range(7)] == classes
    assert all(
        np.abs(dataset[i][0].transpose(1, 2, 0).astype(int) - image).max() <= 1
        for i, image in enumerate(images)
    )
    assert len(open_images(tmp_path / 'x.zip')) == 7 and [path.name for path in tmp_path.iterdir()] == [
        'x.zip'
    ]


def test_processes_fill_one_file_together(tmp_path, student, scattered):
    """Two processes, of which the first has two of the three batches."""
    images, classes = scattered
    run_ranks(
        2,
        'generate.py',
        f'--network={student}',
        f'--dest={tmp_path / "x.npz"}',
        seeds_option(SCATTERED),
        '--batch=3',
    )
    with np.load(tmp_path / 'x.npz') as file:
        assert file['arr_1'].tolist() == classes and np.abs(file['arr_0'].astype(int) - images).max() <= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ['x.npz']


def test_a_chosen_class_is_in_the_file(tmp_path, student):
    invoke(f'--network={student}', f'--dest={tmp_path / "x.npz"}', '--seeds=0-4', '--batch=3', '--class=4')
    assert np.load(tmp_path / 'x.npz')['arr_1'].tolist() == [4] * 5


def test_without_classes_there_are_none_in_the_file(tmp_path, monkeypatch, latent_network):
    use_stand_in(monkeypatch)
    for name in ('x.npz', 'x.zip'):
        result = invoke(
            f'--network={latent_network}', f'--dest={tmp_path / name}', '--seeds=0-1', '--steps=4'
        )
        assert result.exit_code == 0, result.output
    assert sorted(np.load(tmp_path / 'x.npz')) == ['arr_0'] and np.load(tmp_path / 'x.npz')[
        'arr_0'
    ].shape == (2, 16, 16, 3)
    assert json.loads(zipfile.ZipFile(tmp_path / 'x.zip').read('dataset.json')) == {'labels': None}


def test_a_file_that_cannot_be_written_is_named(tmp_path, student):
    (tmp_path / 'folder.npz').mkdir()
    (tmp_path / 'file').write_text('')
    for status, name, word, *options in (
        (1, 'folder.npz', 'is a folder'),
        (1, 'file/x.npz', 'cannot be written'),
        (2, 'folder.png', 'neither'),
        (2, 'x.npz', '--latents', '--latents'),
        (2, 'x.zip', '--subdirs', '--subdirs'),
    ):
        assert_one_clear_error(
            invoke(f'--network={student}', f'--dest={tmp_path / name}', *options), word, status=status
        )


def test_an_interrupted_file_never_appears(tmp_path, student, monkeypatch):
    def fail(*_):
        raise UserError('the disk is full')

    monkeypatch.setattr(writers, 'join_arrays', fail)
    (tmp_path / 'x.npz').write_text('an earlier one')
    assert_one_clear_error(
        invoke(f'--network={student}', f'--dest={tmp_path / "x.npz"}', '--seeds=0'), 'the disk is full'
    )
    assert (tmp_path / 'x.npz').read_text() == 'an earlier one' and len(list(tmp_path.iterdir())) == 1


# ----------------------------------------------------------------------------
# Workers.


def test_workers_write_what_the_process_itself_would(tmp_path, student):
    for workers in (0, 2):
        run(
            'generate.py',
            f'--network={student}',
            f'--outdir={tmp_path / str(workers)}',
            '--seeds=0-40',
            '--batch=16',
            f'--workers={workers}',
        )
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in '02']
    assert files[0] == files[1] and len(files[0]) == 41


def test_what_a_worker_meets_with_ends_the_command_in_one_line(tmp_path, student):
    (tmp_path / '000003.png').mkdir()
    done = run(
        'generate.py',
        f'--network={student}',
        f'--outdir={tmp_path}',
        '--seeds=0-40',
        '--batch=4',
        '--workers=1',
        check=False,
    )
    assert_one_clear_error(done, '000003.png', 'Cannot write')
    assert not list(tmp_path.glob('.*'))


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_complete_files_and_no_process(tmp_path, student, number):
    """A million seeds; the signal comes when the first files are there.

    What a shell starts in the background ignores SIGINT: not so here.
    """
    process = subprocess.Popen(
        [
            sys.executable,
            'generate.py',
            f'--network={student}',
            f'--outdir={tmp_path}',
            '--seeds=0-999999',
            '--batch=8',
            '--workers=1',
        ],
        cwd=ROOT,
        env=dict(os.environ, OMP_NUM_THREADS='1'),
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        wait_until(lambda: len(list(tmp_path.glob('*.png'))) > 16)
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(
            number
        )  # a terminal tells all of them
        error = process.communicate(timeout=120)[1].decode()
    finally:
        process.kill()
    assert 'Traceback' not in error and process.returncode == (1 if number == signal.SIGINT else -number), (
        error
    )
    wait_until(
        lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in family)
    )
    assert len(family) >= 1 and all(
        np.asarray(Image.open(path)).shape == (8, 8) for path in tmp_path.glob('*.png')
    )


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# ----------------------------------------------------------------------------
# Latents.


@pytest.fixture
def latent_network(tmp_path):
    return save_latent_network(tmp_path / 'latent.pkl', dict(raw_mean=[0.5] * 4, raw_std=[0.3] * 4))


def test_latents_are_written_as_the_sampler_gives_them(tmp_path, latent_network, monkeypatch):
    """float32 of its float64, one file a seed; and no VAE is needed."""
    monkeypatch.setitem(sys.modules, 'diffusers', None)
    result = invoke(
        f'--network={latent_network}',
        f'--outdir={tmp_path / "out"}',
        '--seeds=3,1000-1001',
        '--steps=4',
        '--latents',
        '--subdirs',
    )
    assert result.exit_code == 0 and 'Generating 3 latents' in result.output, result.output
    net = load_network(latent_network)
    noise = generation.SeededNoise([3, 1000, 1001], 'cpu').randn([4, 8, 8])
    expected = samplers.sample(net, noise, None, 'heun', 4)
    assert sorted(str(path.relative_to(tmp_path / 'out')) for path in (tmp_path / 'out').rglob('*.*')) == [
        '000000/000003.npy',
        '001000/001000.npy',
        '001000/001001.npy',
    ]
    for seed, latents in zip([3, 1000, 1001], expected):
        written = np.load(tmp_path / 'out' / f'{seed - seed % 1000:06d}' / f'{seed:06d}.npy')
        assert written.dtype == np.float32 and np.array_equal(written, latents.float().numpy())


def test_any_network_can_write_what_it_draws_before_rounding(tmp_path, student):
    invoke(f'--network={student}', f'--outdir={tmp_path}', '--seeds=0', '--latents')
    invoke(f'--network={student}', f'--outdir={tmp_path}', '--seeds=0')
    drawn = torch.from_numpy(np.load(tmp_path / '000000.npy'))
    level = pixels(tmp_path)['000000.png'].astype(int)
    assert (
        drawn.shape == (1, 8, 8)
        and np.abs(encoders.StandardRGBEncoder().decode(drawn)[0].numpy() - level).max() <= 1
    )


def test_images_of_a_latent_network_come_from_its_vae(tmp_path, latent_network, monkeypatch):
    """The stand-in doubles the sides and takes the latents, their map undone, for colors."""
    use_stand_in(monkeypatch)
    result = invoke(
        f'--network={latent_network}', f'--outdir={tmp_path}', '--seeds=0-2', '--batch=2', '--steps=4'
    )
    assert result.exit_code == 0, result.output
    invoke(
        f'--network={latent_network}',
        f'--outdir={tmp_path}',
        '--seeds=0-2',
        '--batch=2',
        '--steps=4',
        '--latents',
    )
    for seed in range(3):
        colors = np.load(tmp_path / f'{seed:06d}.npy')[:3] / 0.5 * 0.3 + 0.5
        image = pixels(tmp_path)[f'{seed:06d}.png']
        expected = np.repeat(np.repeat(colors.transpose(1, 2, 0), 2, axis=0), 2, axis=1).clip(0, 1) * 255
        assert (
            image.shape == (16, 16, 3) and np.abs(image - expected).max() <= 1.01
        )  # cut off, from a rounded map
        assert image.std() > 5


def test_a_real_vae_decodes_from_the_command_line(tmp_path):
    network = save_latent_network(tmp_path / 'latent.pkl', dict(vae_name=save_vae(tmp_path / 'vae')))
    result = invoke(f'--network={network}', f'--outdir={tmp_path / "out"}', '--seeds=0-2', '--steps=4')
    assert result.exit_code == 0, result.output
    net = load_network(network)
    expected = generation.generate_batch(net, [0, 1, 2], steps=4).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.stack(list(pixels(tmp_path / 'out').values())), expected) and expected.shape == (
        3,
        16,
        16,
        3,
    )


def test_images_of_a_latent_network_without_diffusers_are_one_clear_error_before_any_is_made(
    tmp_path, latent_network, monkeypatch
):
    monkeypatch.setitem(sys.modules, 'diffusers', None)
    encoders.load_vae.cache_clear()
    result = invoke(f'--network={latent_network}', f'--outdir={tmp_path / "out"}', '--seeds=0')
    assert_one_clear_error(result, 'pip install diffusers', '--latents')
    assert not (tmp_path / 'out').exists()


def test_latents_never_appear_half_written(tmp_path, monkeypatch):
    def full(file, values):
        file.write(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(np, 'save', full)
    (tmp_path / 'a.npy').write_bytes(b'earlier')
    with pytest.raises(UserError, match=r'Cannot write .*a\.npy: No space left'):
        writers.write_latents(np.zeros([1, 4, 2, 2], np.float32), [str(tmp_path / 'a.npy')])
    assert (tmp_path / 'a.npy').read_bytes() == b'earlier'


class ChannelMeans(torch.nn.Module):
    """A feature detector for images of 16x16 pixels only."""

    def forward(self, x):
        assert x.dtype == torch.uint8 and list(x.shape[1:]) == [3, 16, 16]
        return torch.cat([x.float().mean(dim=[2, 3]), x.float().std(dim=[2, 3])], dim=1)


def val_options(tmp_path, **options):
    torch.jit.script(ChannelMeans()).save(tmp_path / 'means.pt')
    return EasyDict(
        dict(
            ref=None,
            detector=tmp_path / 'means.pt',
            steps=4,
            num=16,
            batch=8,
            seed=0,
            label='auto',
            dump_images_dir=None,
            overwrite=False,
        ),
        **options,
    )


def test_validation_sees_the_decoded_images_of_a_latent_network(tmp_path, latent_network, monkeypatch):
    """Against a reference made of the very images that it is going to generate: distance 0."""
    use_stand_in(monkeypatch)
    invoke(
        f'--network={latent_network}',
        f'--outdir={tmp_path / "ref"}',
        '--seeds=0-15',
        '--batch=8',
        '--steps=4',
    )
    net = load_network(latent_network)
    options = val_options(tmp_path, ref_data=tmp_path / 'ref')
    validator = validation.Validator(
        options, None, str(tmp_path), torch.device('cpu'), [4, 8, 8], LabelSpace(0), net.metadata['encoder']
    )
    assert abs(validator.run(net, nimg=0, ema='ema')['fid']) < 1e-6
    options.seed = 100
    assert validator.run(net, nimg=0, ema='ema')['fid'] > 1e-3


def test_latents_are_no_reference(tmp_path, latent_network, monkeypatch):
    use_stand_in(monkeypatch)
    (tmp_path / 'latents').mkdir()
    (tmp_path / 'latents' / 'a.npy').write_bytes(npy(random_latents(1)[0]))
    with pytest.raises(UserError, match=r'holds latents .*, not images'):
        validation.Validator(
            val_options(tmp_path, ref_data=tmp_path / 'latents'),
            None,
            str(tmp_path),
            torch.device('cpu'),
            [4, 8, 8],
            LabelSpace(0),
            dict(class_name='StabilityVAEEncoder'),
        )


def test_validation_misses_a_vae_at_once(tmp_path, monkeypatch):
    """With a reference of images that are there: those are looked for first."""
    Image.new('RGB', (16, 16)).save(tmp_path / 'reference.png')
    monkeypatch.setitem(sys.modules, 'diffusers', None)
    encoders.load_vae.cache_clear()
    with pytest.raises(UserError, match='pip install diffusers'):
        validation.Validator(
            val_options(tmp_path, ref_data=tmp_path),
            None,
            str(tmp_path),
            torch.device('cpu'),
            [4, 8, 8],
            LabelSpace(0),
            dict(class_name='StabilityVAEEncoder'),
        )


# ----------------------------------------------------------------------------
# The other ways to images.


def test_the_example_draws_a_grid_for_students_and_teachers(tmp_path, student, teacher):
    for name, snapshot in dict(student=student, teacher=teacher).items():
        run('example.py', snapshot, tmp_path / f'{name}.png')
        assert Image.open(tmp_path / f'{name}.png').size == (80, 32)
    assert_one_clear_error(
        run('example.py', tmp_path / 'none.pkl', tmp_path / 'x.png', check=False), 'none.pkl'
    )
    assert_one_clear_error(
        run('example.py', student, student / 'x.png', check=False), 'x.png cannot be written'
    )
    alone = run('example.py', student, check=False)
    assert alone.returncode == 2 and alone.stderr.startswith('Usage: python example.py')


def test_validation_of_saved_snapshots_writes_the_loops_lines(tmp_path, student, teacher, rulers):
    done = run(
        'validation.py',
        f'--network={student}',
        f'--network={teacher}',
        f'--ref={rulers / "pca.npz"}',
        f'--detector={rulers / "pca.pt"}',
        f'--outdir={tmp_path}',
        '--num=64',
        '--batch=32',
    )
    records = [json.loads(line) for line in (tmp_path / 'metrics-val.jsonl').read_text().splitlines()]
    assert [json.loads(line) for line in done.stdout.splitlines()] == records
    assert [r['nfe'] for r in records] == [4, 35]
    assert set(records[0]) == {'kimg', 'nimg', 'fid', 'num_images', 'steps', 'nfe', 'ema', 'seconds'}
    run('generate.py', f'--network={student}', f'--outdir={tmp_path / "images"}', '--seeds=0-63')
    value = run(
        'fid.py',
        'calc',
        f'--images={tmp_path / "images"}',
        f'--ref={rulers / "pca.npz"}',
        f'--detector={rulers / "pca.pt"}',
        '--num=64',
    )
    assert float(value.stdout.splitlines()[-1]) == pytest.approx(records[0]['fid'], rel=1e-3)
