"""Zero-shot editing: the mathematics of sampling/editing.py and the command line of edit.py."""

import itertools
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import assert_one_clear_error
from hypothesis import given, settings
from hypothesis import strategies as st
from latents import save_latent_network, use_stand_in
from PIL import Image

import edit
import generate
from sampling import edit_files, editing
from training import networks, samplers
from training.checkpoint import load_network, save_snapshot

SHAPE = [2, 3, 4, 4]
TASKS = ['inpaint', 'colorize', 'superres']


def randn(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def known_component(task):
    """A: from images [N, 3, 4, 4] to what is known of them."""
    return dict(
        inpaint=lambda x: x[..., :3], colorize=editing.luma, superres=lambda x: editing.block_mean(x, 2)
    )[task]


def edit_toward(task, image):
    """The edit that knows A·image."""
    unknown = torch.arange(4) == 3
    return dict(
        inpaint=lambda: editing.inpainting(image, unknown),
        colorize=lambda: editing.colorization(editing.luma(image)),
        superres=lambda: editing.superresolution(editing.block_mean(image, 2), 2),
    )[task]()


# ----------------------------------------------------------------------------
# Edits.


@pytest.mark.parametrize('task', TASKS)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_an_edit_is_the_orthogonal_projection_on_the_images_with_the_known_component(task, seed):
    """The known component is right, a second edit changes nothing, and the way there is at right angles to
    all such images: it is the shortest."""
    image, denoised, other = randn(seed), randn(seed + 1), randn(seed + 2)
    apply, known = edit_toward(task, image), known_component(task)
    edited = apply(denoised)
    torch.testing.assert_close(known(edited), known(image), rtol=0, atol=1e-13)
    torch.testing.assert_close(apply(edited), edited, rtol=0, atol=1e-13)
    assert float(((edited - denoised) * (apply(other) - edited)).sum()) == pytest.approx(0, abs=1e-11)


def test_an_inpainting_keeps_what_is_known_to_the_last_bit():
    image, denoised, unknown = (
        randn(0),
        randn(1),
        torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) < 0.5,
    )
    edited = editing.inpainting(image, unknown)(denoised)
    assert torch.equal(edited[..., ~unknown], image[..., ~unknown]) and torch.equal(
        edited[..., unknown], denoised[..., unknown]
    )


@pytest.mark.parametrize('task', TASKS)
def test_edits_of_gaussian_data_on_a_line_close_in_on_the_conditional_mean(task):
    """Data z·u, z ~ N(0, s²), |u| = 1: what is known, A(z u), tells z, and so the image. Without noise
    between evaluations a sampler projects in turn on the line of u (the denoiser, as σ -> 0) and on the
    images of which the same is known. Each round multiplies the error in z by |(1 − A⁺A) u|², the share of u
    that is unknown, exactly; an edit that does not go the shortest way would have another rate.
    """
    u = randn(3, [1, 3, 4, 4])
    u /= u.norm()
    image, variance, found = 0.8 * u, 4.0, []

    def denoiser(x, sigma, labels):  # E[y | x] of these data
        found.append(float((x * u).sum()))
        return variance / (variance + sigma**2) * found[-1] * u

    samplers.sample(
        denoiser,
        randn(4, [1, 3, 4, 4]),
        None,
        'cm',
        taus=[1e-4 * 0.99**i for i in range(9)],
        sigma_min=1e-6,
        edit=edit_toward(task, image),
        clip_denoised=False,
        randn_like=torch.zeros_like,
    )
    errors = [z - 0.8 for z in found[1:]]
    A = torch.autograd.functional.jacobian(known_component(task), u).reshape(-1, u.numel())
    rate = 1 - float((torch.linalg.pinv(A) @ A @ u.flatten()).square().sum())
    assert 0.1 < rate < 0.9 and len(errors) == 9
    assert all(
        after / before == pytest.approx(rate, rel=1e-4) for before, after in itertools.pairwise(errors)
    )


# ----------------------------------------------------------------------------
# Eight bits.


@given(
    seed=st.integers(0, 10_000), factor=st.sampled_from([1, 2, 4]), spread=st.sampled_from([0.05, 1.0, 20.0])
)
@settings(max_examples=60, deadline=None)
def test_rounded_blocks_have_the_sums_that_they_had(seed, factor, spread):
    """For means of any uint8 images, the darkest and brightest too, and detail that goes far out of the
    range."""
    large = torch.randint(256, [2, 1, 8, 8], generator=torch.Generator().manual_seed(seed))
    large[0, :, :4], large[1, :, :4] = 0, 255
    means = editing.block_mean(large.double() / 127.5 - 1, factor)
    images = editing.superresolution(means, factor)(spread * randn(seed, [2, 1, 8, 8]))
    pixels = editing.round_blocks(images, factor)
    assert torch.equal(
        editing.to_blocks(pixels.long(), factor).sum(-1), editing.to_blocks(large, factor).sum(-1)
    )
    inside = (editing.to_blocks(images, factor).abs() <= 1).all(-1)
    moved = editing.to_blocks((pixels - (images + 1) * 127.5).abs(), factor).amax(-1)
    assert bool((moved[inside] < 1).all())


@given(seed=st.integers(0, 10_000), spread=st.sampled_from([0.1, 1.0, 10.0]))
@settings(max_examples=40, deadline=None)
def test_a_colored_image_turned_gray_by_pillow_is_the_gray_image(seed, spread):
    """Rounding moves luma by half a level at most, and Pillow rounds it to the nearest; black and white are
    among the pixels."""
    gray = torch.randint(256, [1, 1, 6, 6], generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    gray[..., 0], gray[..., 1] = 0, 255
    known = gray.double() / 127.5 - 1
    images = editing.contract_colors(editing.colorization(known)(spread * randn(seed, [1, 3, 6, 6])))
    torch.testing.assert_close(editing.luma(images), known, rtol=0, atol=1e-10)
    assert images.abs().max() <= 1 + 1e-10
    pixels = editing.to_pixels(images)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(Image.fromarray(pixels).convert('L')), gray[0, 0].numpy())


def test_images_within_the_range_are_not_contracted():
    images = randn(0).clamp(-0.9, 0.9)
    assert torch.equal(
        editing.contract_colors(images), editing.luma(images) + (images - editing.luma(images))
    )


def test_gray_pixels_are_pillows():
    images = torch.randint(256, [1, 3, 64, 64], generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    gray = np.asarray(Image.fromarray(images[0].permute(1, 2, 0).numpy()).convert('L'))
    assert np.array_equal(editing.gray_pixels(images)[0, 0].numpy(), gray)
    assert torch.equal(editing.gray_pixels(images[:, :1]), images[:, :1])


def test_blocks_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match='4x4 pixels do not divide into blocks of 3x3'):
        editing.block_mean(randn(0), 3)


# ----------------------------------------------------------------------------
# Between latents.


def test_slerp_goes_from_end_to_end_on_the_sphere_at_even_angles():
    a, b = randn(0, [1, 1, 4, 4]), randn(1, [1, 1, 4, 4])
    b *= a.norm() / b.norm()
    path = editing.slerp(
        a.expand(5, -1, -1, -1), b.expand(5, -1, -1, -1), torch.linspace(0, 1, 5, dtype=torch.float64)
    )
    assert torch.equal(path[:1], a) and torch.equal(path[-1:], b)
    norms = path.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, a.norm().expand(5), rtol=1e-12, atol=0)
    cosines = (path[1:] * path[:-1]).flatten(1).sum(1) / a.norm() ** 2
    torch.testing.assert_close(cosines, cosines[:1].expand(4), rtol=1e-12, atol=0)


def test_slerp_of_latents_in_one_line_is_linear():
    a = randn(0, [3, 1, 4, 4])
    torch.testing.assert_close(
        editing.slerp(a, 2 * a, torch.tensor([0, 0.5, 1], dtype=torch.float64)),
        a * torch.tensor([1, 1.5, 2], dtype=torch.float64).reshape(3, 1, 1, 1),
        rtol=1e-12,
        atol=0,
    )


# ----------------------------------------------------------------------------
# The command line.


def save_network(path, channels=1, label_dim=0, seed=0, boundary=0, **metadata):
    """A tiny network of random weights, none of them zero, so that noise level and label matter."""
    torch.manual_seed(seed)
    net = networks.EDMPrecond(
        8,
        channels,
        label_dim,
        model_type='DhariwalUNet',
        model_channels=16,
        channel_mult=[1],
        num_blocks=1,
        attn_resolutions=[],
        boundary=boundary,
    )
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    save_snapshot(path, net, **metadata)
    return str(path)


STUDENT = dict(objective='mcd', sigmas=[80.0, 10.0, 1.0, 0.1, 0.0])
CM = dict(objective='ect', solver='cm', sigmas=[80.0, 0.0], sigma_min=0.002, sigma_max=80.0)


@pytest.fixture(scope='module')
def snapshots(tmp_path_factory):
    folder = tmp_path_factory.mktemp('networks')
    return dict(
        student=save_network(folder / 'student.pkl', label_dim=10, **STUDENT),
        cm=save_network(folder / 'cm.pkl', **CM),
        student_rgb=save_network(folder / 'student-rgb.pkl', 3, **STUDENT),
        cm_rgb=save_network(folder / 'cm-rgb.pkl', 3, **CM),
        teacher=save_network(folder / 'teacher.pkl', objective='diffusion'),
        one_step=save_network(folder / 'one.pkl', sigmas=[80.0, 0.0]),
        several=save_network(folder / 'several.pkl', **CM | dict(sigmas=[80.0, 2.0, 0.5, 0.0])),
        bounded=save_network(folder / 'bounded.pkl', **CM, boundary=0.002),
        latents=save_latent_network(folder / 'latents.pkl', **STUDENT),
    )


def write_images(folder, count, channels=1, size=8, labels=None):
    """Random PNGs 000.png, ... and, with labels, a dataset.json."""
    folder.mkdir()
    rng = np.random.default_rng(size)
    for i in range(count):
        array = rng.integers(256, size=[size, size] if channels == 1 else [size, size, 3], dtype=np.uint8)
        Image.fromarray(array).save(folder / f'{i:03d}.png')
    if labels is not None:
        (folder / 'dataset.json').write_text(
            json.dumps(dict(labels=[[f'{i:03d}.png', label] for i, label in enumerate(labels)]))
        )
    return folder


def invoke(task, *arguments):
    return CliRunner().invoke(edit.main, [task, *map(str, arguments)], prog_name='edit.py')


def edited(task, *arguments):
    """The results by name, after a run that has to succeed."""
    result = invoke(task, *arguments)
    assert result.exit_code == 0, result.output
    outdir = next(a for a in map(str, arguments) if a.startswith('--outdir=')).removeprefix('--outdir=')
    results = {
        path: np.asarray(Image.open(f'{outdir}/images/{path}')).astype(int)
        for path in names_in(f'{outdir}/images')
    }
    assert results, 'no image was written'
    return outdir, results


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob('*.png'))


def original(folder, name):
    return np.asarray(Image.open(folder / f'{name[:3]}.png')).astype(int)


@pytest.mark.parametrize('network', ['student', 'cm'])
def test_known_pixels_of_an_inpainting_are_the_files_bytes(tmp_path, snapshots, network):
    """And those under the mask, white in a drawing of two colors, differ from seed to seed."""
    images = write_images(tmp_path / 'images', 3)
    unknown = np.random.default_rng(0).random([8, 8]) < 0.5
    Image.fromarray(unknown).save(tmp_path / 'mask.png')
    outdir, results = edited(
        'inpaint',
        f'--network={snapshots[network]}',
        f'--input={images}',
        f'--mask={tmp_path / "mask.png"}',
        '--seeds=0,5',
        f'--outdir={tmp_path / "out"}',
    )
    assert list(results) == [f'{i:03d}-{seed:06d}.png' for i in range(3) for seed in (0, 5)]
    for name, pixels in results.items():
        assert np.array_equal(pixels[~unknown], original(images, name)[~unknown]), name
    assert not np.array_equal(results['000-000000.png'], results['000-000005.png'])
    assert Image.open(f'{outdir}/grid.png').size == (
        3 * (64 + 2),
        4 * (64 + 2),
    )  # input, known part, two seeds; 8 pixels shown as 64


@pytest.mark.parametrize('options, unknown', [(['--box=2,4,8,8'], 24), (['--random-share=0.25'], 16)])
def test_a_box_or_a_random_share_can_be_made_up(tmp_path, snapshots, options, unknown):
    images = write_images(tmp_path / 'images', 2)
    _, results = edited(
        'inpaint',
        f'--network={snapshots["cm"]}',
        f'--input={images}',
        *options,
        f'--outdir={tmp_path / "out"}',
    )
    changed = np.zeros([8, 8], bool)
    for name, pixels in results.items():
        changed |= pixels != original(images, name)
    assert unknown - 3 <= changed.sum() <= unknown  # random pixels may happen to be right
    assert '--box' not in options[0] or not (changed[:4].any() or changed[:, :2].any())


@pytest.mark.parametrize('network', ['student', 'cm'])
@pytest.mark.parametrize('size', [4, 8])
def test_the_averages_of_a_super_resolution_are_its_input_exactly(tmp_path, snapshots, network, size):
    """In the 8-bit files: sums over blocks are those of the small image times four, or of the large one that
    was averaged."""
    images = write_images(tmp_path / 'images', 2, size=size)
    _, results = edited(
        'superres',
        f'--network={snapshots[network]}',
        f'--input={images}',
        '--factor=2',
        f'--outdir={tmp_path / "out"}',
    )
    sums = lambda x: x.reshape(4, 2, 4, 2).sum((1, 3))
    for name, pixels in results.items():
        given = original(images, name)
        assert np.array_equal(sums(pixels), given * 4 if size == 4 else sums(given))


@pytest.mark.parametrize('network', ['student_rgb', 'cm_rgb'])
@pytest.mark.parametrize('channels', [1, 3])
def test_a_colorization_turned_gray_is_its_input(tmp_path, snapshots, network, channels):
    images = write_images(tmp_path / 'images', 2, channels)
    outdir, results = edited(
        'colorize', f'--network={snapshots[network]}', f'--input={images}', f'--outdir={tmp_path / "out"}'
    )
    for name, pixels in results.items():
        gray = [
            np.asarray(Image.open(path).convert('L'))
            for path in (images / f'{name[:3]}.png', f'{outdir}/images/{name}')
        ]
        assert np.array_equal(*gray) and np.ptp(pixels, axis=2).max() > 10


@pytest.mark.parametrize(
    'task',
    [['inpaint', '--box=0,4,8,8'], ['stroke', '--sigma=0.7'], ['denoise', '--sigma=0.5', '--add-noise']],
)
@pytest.mark.parametrize('network', ['student', 'cm'])
def test_a_result_depends_on_its_image_and_seed_alone(tmp_path, snapshots, task, network):
    """Batches of 3 and of 64, all images and one of them: equal up to rounding of one level.

    Noise between evaluations is the seed's too.
    """
    images = write_images(tmp_path / 'images', 4)
    common = [
        *task,
        f'--network={snapshots[network]}',
        f'--input={images}',
        *(['--taus=0.4'] if network == 'cm' else ['--class=3']),
    ]
    _, one = edited(*common, '--seeds=0-2', '--batch=3', f'--outdir={tmp_path / "a"}')
    _, two = edited(*common, '--seeds=2,1,0', f'--outdir={tmp_path / "b"}')
    _, single = edited(*common, '--seeds=1', '--indices=2', f'--outdir={tmp_path / "c"}')
    assert len(one) == 12 and list(single) == ['002-000001.png']
    for other in (two, single):
        assert all(np.abs(pixels - one[name]).max() <= 1 for name, pixels in other.items())


def test_a_single_image_may_be_given(tmp_path, snapshots):
    images = write_images(tmp_path / 'images', 2)
    common = ['inpaint', f'--network={snapshots["cm"]}', '--box=0,0,8,4']
    _, one = edited(*common, f'--input={images / "001.png"}', f'--outdir={tmp_path / "a"}')
    _, all_of_them = edited(*common, f'--input={images}', f'--outdir={tmp_path / "b"}')
    assert list(one) == ['001-000000.png'] and np.array_equal(
        one['001-000000.png'], all_of_them['001-000000.png']
    )


def test_labels_are_those_of_the_data_set(tmp_path, snapshots):
    """Unless --class says otherwise: with class k it is the same image, with another it is not."""
    images = write_images(tmp_path / 'images', 2, labels=[3, 7])
    common = ['stroke', f'--network={snapshots["student"]}', f'--input={images}', '--sigma=5']
    _, own = edited(*common, f'--outdir={tmp_path / "own"}')
    _, threes = edited(*common, '--class=3', f'--outdir={tmp_path / "3"}')
    assert np.array_equal(own['000-000000.png'], threes['000-000000.png'])
    assert not np.array_equal(own['001-000000.png'], threes['001-000000.png'])
    _, second = edited(*common, '--indices=1', f'--outdir={tmp_path / "second"}')
    assert np.abs(second['001-000000.png'] - own['001-000000.png']).max() <= 1


def test_noise_is_removed_from_noisy_images_and_added_only_on_demand(tmp_path, snapshots):
    """Without --add-noise one evaluation of a consistency model at sigma is D(image; sigma), whatever the
    seed."""
    images = write_images(tmp_path / 'images', 1)
    common = ['denoise', f'--network={snapshots["cm"]}', f'--input={images}', '--sigma=0.5', '--seeds=0-1']
    _, clean = edited(*common, f'--outdir={tmp_path / "a"}')
    _, noised = edited(*common, '--add-noise', f'--outdir={tmp_path / "b"}')
    x = torch.from_numpy(original(images, '000')).double()[None, None] / 127.5 - 1
    with torch.no_grad():
        expected = editing.to_pixels(
            load_network(snapshots['cm'])(x, torch.tensor(0.5, dtype=torch.float64)).double()
        )[0, 0].numpy()
    assert np.array_equal(clean['000-000000.png'], expected) and np.array_equal(
        clean['000-000001.png'], expected
    )
    assert not np.array_equal(noised['000-000000.png'], noised['000-000001.png'])


def test_edits_of_a_consistency_model_take_several_evaluations_by_default(tmp_path, snapshots):
    images = write_images(tmp_path / 'images', 1)
    common = [
        'superres',
        f'--network={snapshots["cm"]}',
        f'--input={images}',
        '--factor=2',
        f'--outdir={tmp_path / "out"}',
    ]
    assert '(cm, up to 40 evaluations each)' in invoke(*common).output
    assert '(cm, up to 3 evaluations each)' in invoke(*common, '--taus=2,1').output
    assert '(cm, up to 1 evaluations each)' in invoke('denoise', *common[1:3], '--sigma=1', common[4]).output


def test_edits_take_the_levels_that_a_snapshot_records(tmp_path, snapshots):
    """80, 2 and 0.5: all of them where something is known; from sigma on those below it."""
    images = write_images(tmp_path / 'images', 1)
    common = [f'--network={snapshots["several"]}', f'--input={images}', f'--outdir={tmp_path / "out"}']
    assert '(cm, up to 3 evaluations each)' in invoke('superres', *common, '--factor=2').output
    for sigma, evaluations in ((5, 3), (2, 2), (0.3, 1)):
        assert (
            f'(cm, up to {evaluations} evaluations each)'
            in invoke('denoise', *common, f'--sigma={sigma}').output
        )
    net = load_network(snapshots['several'])
    started = samplers.CMOptions(start=(None, 1.0))
    assert samplers.cm_sigmas(net, started) == [1.0, 0.5] == samplers.cm_sigmas(net, started, 2)
    assert len(samplers.cm_sigmas(net, started, 4)) == 4
    _, by_itself = edited('stroke', *common, '--sigma=1')
    _, as_told = edited('stroke', f'--network={snapshots["cm"]}', *common[1:], '--sigma=1', '--taus=0.5')
    assert np.array_equal(by_itself['000-000000.png'], as_told['000-000000.png'])


@pytest.mark.parametrize('network', ['student', 'teacher', 'cm'])
def test_interpolation_ends_in_what_generate_makes_of_its_seeds(tmp_path, snapshots, network):
    """Of one class, since the label is the first seed's; and in the first end alone where noise is added,
    which is the first seed's too."""
    options = [
        f'--network={snapshots[network]}',
        *dict(student=['--class=4'], teacher=['--steps=4'], cm=['--taus=0.5'])[network],
    ]
    _, path = edited('interpolate', *options, '--seeds=3,8,1', '--count=3', f'--outdir={tmp_path / "path"}')
    CliRunner().invoke(generate.main, [*options, '--seeds=1,3,8', f'--outdir={tmp_path / "ends"}'])
    ends = {
        seed: np.asarray(Image.open(tmp_path / 'ends' / f'{seed:06d}.png')).astype(int) for seed in (1, 3, 8)
    }
    for i, seed in ((0, 3), (2, 8), (3, 8), (5, 1)):
        same = np.abs(path[f'{i:06d}.png'] - ends[seed]).max() <= 1
        assert same == (network != 'cm' or i in (0, 3)), (i, seed)
    assert np.abs(path['000001.png'] - ends[3]).max() > 1 and np.abs(path['000001.png'] - ends[8]).max() > 1


ERRORS = [
    (
        'inpaint',
        'teacher',
        ['--box=0,4,8,8'],
        ['is a teacher', 'only students and consistency models', '--objective=mcd'],
    ),
    ('stroke', 'teacher', ['--sigma=1'], ['is a teacher']),
    ('inpaint', 'one_step', ['--box=0,4,8,8'], ['single evaluation', '--steps=2']),
    ('inpaint', 'cm', ['--box=0,4,8,8', '--steps=1'], ['single evaluation']),
    ('inpaint', 'latents', ['--box=0,4,8,8'], ['latents of a VAE', 'networks of pixels']),
    ('inpaint', 'cm', ['--mask={tmp}/small.png'], ['small.png is 4x4', 'images are 8x8']),
    ('inpaint', 'cm', ['--mask={tmp}/nowhere.png'], ['nowhere.png is not a readable image (No such file']),
    ('inpaint', 'cm', ['--mask={tmp}/black.png'], ['no white']),
    ('inpaint', 'cm', ['--mask={tmp}/text.png'], ['text.png is not a readable image']),
    ('inpaint', 'cm', ['--box=0,4,9,8'], ['--box=0,4,9,8 goes beyond']),
    ('inpaint', 'cm', ['--random-share=0.001'], ['less than a pixel']),
    ('inpaint', 'cm', ['--box=0,4,8,8', '--input={tmp}/nothing'], ['nothing: no such file or folder']),
    (
        'inpaint',
        'cm',
        ['--box=0,4,8,8', '--input={tmp}/small.png'],
        ['an image of 4x4 gray', 'must be 8x8 gray: resize it'],
    ),
    ('inpaint', 'cm', ['--box=0,4,8,8', '--indices=1-2'], ['--indices=2 does not exist', '2 images 0 to 1']),
    ('inpaint', 'cm', ['--box=0,4,8,8', '--indices=1,1'], ['edited twice']),
    ('inpaint', 'cm', ['--box=0,4,8,8', '--input={tmp}/black.png', '--indices=1'], ['single image']),
    (
        'inpaint',
        'student',
        ['--box=0,4,8,8', '--input={tmp}/labeled'],
        ['class indices from 0 to 10, but the network has 10 classes', '--class'],
    ),
    ('inpaint', 'student', ['--box=0,4,8,8', '--taus=2,1'], ['student sampler has no option taus']),
    ('inpaint', 'teacher', ['--box=0,4,8,8', '--solver=cm'], ['is a teacher']),
    ('inpaint', 'teacher', ['--box=0,4,8,8', '--solver=student', '--steps=4'], ['is a teacher']),
    (
        'inpaint',
        'cm',
        ['--box=0,4,8,8', '--input={tmp}/rgba.png'],
        ['RGBA image', 'save it as 8-bit gray or RGB'],
    ),
    (
        'inpaint',
        'cm',
        ['--box=0,4,8,8', '--input={tmp}/deep.png'],
        ['16-bit', 'save it as 8-bit gray or RGB'],
    ),
    ('inpaint', 'cm', ['--mask={tmp}/deep.png'], ['16-bit', 'save it as 8-bit gray']),
    (
        'inpaint',
        'cm',
        ['--box=0,4,8,8', '--input={tmp}/rgb.png'],
        ['8x8 RGB', 'must be 8x8 gray: save it as 8-bit gray'],
    ),
    ('inpaint', 'cm_rgb', ['--box=0,4,8,8'], ['8x8 gray', 'must be 8x8 RGB: save them as 8-bit RGB']),
    (
        'inpaint',
        'cm',
        ['--box=0,4,8,8', '--input={tmp}/mixed', '--batch=1'],
        ['001.png is 4x4 gray, but 000.png is 8x8 gray', 'folder of their own'],
    ),
    ('colorize', 'cm', [], ['makes gray images']),
    ('colorize', 'cm_rgb', ['--input={tmp}/small.png'], ['must be 8x8 gray or 8x8 RGB']),
    ('superres', 'cm', ['--factor=3'], ['--factor=3 does not divide 8']),
    ('superres', 'cm', ['--factor=4', '--input={tmp}/small.png'], ['must be 2x2 gray or 8x8 gray']),
    ('stroke', 'cm', ['--sigma=100'], ['cannot start at sigma = 100', 'up to 80']),
    ('stroke', 'student', ['--sigma=100'], ['cannot start at sigma = 100', 'up to 80']),
    ('stroke', 'cm', ['--sigma=1', '--ts=0,22,39'], ['noise levels 1, 1.38', 'must fall']),
    ('stroke', 'bounded', ['--sigma=0.002'], ['cannot start at sigma = 0.002', 'above 0.002']),
]


@pytest.mark.parametrize('task, network, options, words', ERRORS)
def test_what_cannot_be_done_is_one_clear_error(tmp_path, snapshots, task, network, options, words):
    write_images(tmp_path / 'images', 2)
    write_images(tmp_path / 'labeled', 2, labels=[0, 10])
    for name, size in (('black', 8), ('small', 4)):
        Image.new('L', [size, size]).save(tmp_path / f'{name}.png')
    (tmp_path / 'text.png').write_text('no image')
    for name, mode in (('rgba', 'RGBA'), ('rgb', 'RGB'), ('deep', 'I;16')):
        Image.new(mode, [8, 8]).save(tmp_path / f'{name}.png')
    write_images(tmp_path / 'mixed', 1)
    Image.new('L', [4, 4]).save(tmp_path / 'mixed' / '001.png')
    options = [option.format(tmp=tmp_path) for option in options]
    result = invoke(
        task,
        f'--network={snapshots[network]}',
        f'--input={tmp_path / "images"}',
        f'--outdir={tmp_path / "out"}',
        *options,
    )
    assert_one_clear_error(result, *words)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'arguments',
    [
        ['inpaint'],
        ['inpaint', '--box=0,0,4,4', '--random-share=0.5'],
        ['inpaint', '--box=4,0,4,4'],
        ['inpaint', '--box=1,2,3'],
        ['superres'],
        ['inpaint', '--box=0,4,8,8', '--S_churn=1'],
        ['inpaint', '--box=0,4,8,8', '--seeds=0,0'],
        ['superres', '--factor=1'],
        ['stroke'],
        ['denoise', '--sigma=0'],
        ['inpaint', '--random-share=0'],
        ['sharpen'],
    ],
)
def test_wrong_usage_exits_with_status_2(tmp_path, snapshots, arguments):
    result = invoke(
        *arguments, f'--network={snapshots["cm"]}', f'--input={tmp_path}', f'--outdir={tmp_path / "out"}'
    )
    assert_one_clear_error(result, status=2)
    assert not (tmp_path / 'out').exists()


def test_interpolation_decodes_latents(tmp_path, snapshots, monkeypatch):
    """8x8 latents, 16x16 pixels by the stand-in for the VAE."""
    use_stand_in(monkeypatch)
    _, path = edited(
        'interpolate',
        f'--network={snapshots["latents"]}',
        '--seeds=0,1',
        '--count=3',
        f'--outdir={tmp_path / "out"}',
    )
    assert [pixels.shape for pixels in path.values()] == [(16, 16, 3)] * 3


def test_interpolation_needs_two_seeds(tmp_path, snapshots):
    for seeds, words in (('3', '3,7'), ('3,3', 'nothing between')):
        assert_one_clear_error(
            invoke('interpolate', f'--network={snapshots["cm"]}', f'--seeds={seeds}', f'--outdir={tmp_path}'),
            words,
            status=2,
        )


@pytest.mark.parametrize(
    'name', ['../../outside.png', '/outside.png', 'a/../../outside.png', 'a\\..\\outside.png']
)
def test_a_zip_writes_nothing_outside_of_the_folder(tmp_path, snapshots, name):
    """Names of results are those of the files in it."""
    write_images(tmp_path / 'images', 1)
    with zipfile.ZipFile(tmp_path / 'images.zip', 'w') as archive:
        archive.writestr(zipfile.ZipInfo(name), (tmp_path / 'images' / '000.png').read_bytes())
    result = invoke(
        'inpaint',
        f'--network={snapshots["cm"]}',
        '--box=0,4,8,8',
        f'--input={tmp_path / "images.zip"}',
        f'--outdir={tmp_path / "a" / "out"}',
    )
    assert_one_clear_error(result, 'is outside the data set', 'outside.png')
    assert not (tmp_path / 'a').exists()


@pytest.mark.parametrize('mode', ['1', 'P', 'RGB', 'RGBA', 'LA'])
def test_a_mask_may_be_of_any_mode_of_eight_bits(tmp_path, mode):
    drawing = Image.new('L', [8, 8])
    drawing.paste(255, (0, 4, 8, 8))
    drawing.convert(mode).save(tmp_path / 'mask.png')
    unknown = edit_files.unknown_pixels(8, str(tmp_path / 'mask.png'), None, None)
    assert unknown.sum() == 32 and bool(unknown[4:].all())


def test_a_photograph_is_read_as_its_camera_was_held(tmp_path):
    """EXIF's orientation 3: upside down."""
    drawing = Image.new('L', [8, 8])
    drawing.paste(255, (0, 0, 8, 2))
    exif = Image.Exif()
    exif[0x0112] = 3
    drawing.save(tmp_path / 'photo.png', exif=exif)
    assert edit_files.read_image(str(tmp_path / 'photo.png'))[0, 0, :, 0].tolist() == [0] * 6 + [255] * 2


def test_labels_that_are_not_used_need_not_be_complete(tmp_path, snapshots):
    """With --class, or where the network takes none."""
    images = write_images(tmp_path / 'images', 2, labels=[1])
    common = ['inpaint', f'--input={images}', '--box=0,4,8,8']
    assert_one_clear_error(
        invoke(*common, f'--network={snapshots["student"]}', f'--outdir={tmp_path / "a"}'),
        'no label for 1 of 2',
    )
    for options in (
        [f'--network={snapshots["student"]}', '--class=1'],
        [f'--network={snapshots["cm"]}', '--steps=2'],
    ):
        assert invoke(*common, *options, f'--outdir={tmp_path / "b"}').exit_code == 0


def test_interpolation_in_batches_is_the_same(tmp_path, snapshots):
    common = ['interpolate', f'--network={snapshots["cm"]}', '--taus=0.5', '--seeds=0,1', '--count=5']
    _, one = edited(*common, f'--outdir={tmp_path / "a"}')
    _, two = edited(*common, '--batch=2', f'--outdir={tmp_path / "b"}')
    assert len(one) == 5 and all(np.abs(two[name] - pixels).max() <= 1 for name, pixels in one.items())


def test_help_does_not_list_what_only_teachers_have():
    """Except where teachers can be used."""
    assert (
        '--S_churn' not in invoke('inpaint', '--help').output
        and '--S_churn' in invoke('interpolate', '--help').output
    )


@pytest.mark.parametrize('task', ['inpaint', 'colorize', 'superres', 'stroke', 'denoise', 'interpolate'])
def test_an_option_that_is_required_is_missed_before_anything_else(task):
    assert_one_clear_error(invoke(task), 'Missing option', status=2)
