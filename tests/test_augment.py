"""training/networks/augment.py against pixel permutations, analytic images and the formulas of Karras et al. 2022, Table 6."""

import math

import pytest
import torch

from training.networks.augment import AugmentPipe, Parameters, warp

GEOMETRY_OFF = dict(scale=0, rotate_frac=0, aniso=0, translate_frac=0)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def parameters(count, **given):
    """Parameters of the identity but for those given, for every image the same."""
    zeros = {name: torch.zeros(count, dtype=torch.float64) for name in Parameters._fields} | dict(
        shift=torch.zeros(count, 2, dtype=torch.float64)
    )
    return Parameters(
        **{name: zeros[name] + torch.as_tensor(given.get(name, 0), dtype=torch.float64) for name in zeros}
    )


def blob(x, y):
    """A smooth image without symmetry that is 0 at the borders of a 32x32 image."""
    return torch.exp(-((x - 3) ** 2 + (y + 2) ** 2 * 2) / 18) - 0.5 * torch.exp(
        -((x + 4) ** 2 * 1.5 + (y - 1) ** 2) / 12
    )


def grid(size=32):
    axis = torch.arange(size, dtype=torch.float64) + 0.5 - size / 2
    y, x = torch.meshgrid(axis, axis, indexing='ij')
    return x, y


def moved(**given):
    return AugmentPipe().transform(blob(*grid())[None, None], parameters(1, **given))[0, 0]


# ----------------------------------------------------------------------------
# Geometry.


def test_flips_are_exact_permutations_that_their_labels_tell():
    images = noise(64, 3, 8, 8, dtype=torch.float32)
    out, labels = AugmentPipe(p=1, yflip=1, **GEOMETRY_OFF)(images, torch.Generator().manual_seed(1))
    assert labels.shape == (64, 2) and labels.unique(dim=0).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    for image, result, (x, y) in zip(images, out, labels.tolist()):
        dims = [2] * int(x) + [1] * int(y)
        assert torch.equal(result, image.flip(dims))


def test_the_identity_comes_back_bit_for_bit_beside_images_that_change():
    images = noise(8, 3, 16, 16, dtype=torch.float32)
    a = parameters(8)._replace(
        angle=torch.tensor([0.0, 1, 0, 0, 0, 0, 0, 0]), aniso_angle=torch.linspace(0, 1, 8)
    )
    out = AugmentPipe().transform(images, Parameters(*(v.float() for v in a)))
    same = [torch.equal(o, i) for o, i in zip(out, images)]
    assert same == [True, False] + [True] * 6


def test_resampling_in_place_keeps_even_white_noise():
    """The filter followed by itself is the identity within 1e-4 an axis. Bilinear resampling twice would lose half."""
    images = noise(4, 3, 16, 16)
    error = warp(images, torch.eye(3, dtype=torch.float64).expand(4, 3, 3)) - images
    assert error.abs().max() < 3e-3 and error.std() < 5e-4


@pytest.mark.parametrize('turns', [1, 2, 3])
def test_a_positive_angle_turns_counter_clockwise(turns):
    out = moved(angle=turns * math.pi / 2)
    torch.testing.assert_close(out, blob(*grid()).rot90(turns), atol=2e-3, rtol=0)
    assert (out - blob(*grid()).rot90(turns + 1)).abs().max() > 0.3


def test_quarter_turns_and_mirrors_commute_with_the_filter():
    """A symmetric filter: turning white noise and resampling it are interchangeable to rounding."""
    images = noise(1, 1, 8, 8)
    turn = lambda angle: AugmentPipe().inverse_matrix(parameters(1, angle=angle), 8, 8)
    in_place = warp(images, torch.eye(3, dtype=torch.float64)[None])
    torch.testing.assert_close(warp(images, turn(math.pi / 2)), in_place.rot90(1, (2, 3)), atol=1e-10, rtol=0)
    mirror = torch.diag(torch.tensor([-1.0, 1, 1], dtype=torch.float64))[None]
    torch.testing.assert_close(warp(images, mirror), in_place.flip(3), atol=1e-10, rtol=0)


def test_a_shift_by_whole_pixels_moves_right_and_down():
    """translate_frac_std · 32 pixels = 4 pixels a unit."""
    out = moved(shift=[0.5, -0.75])
    torch.testing.assert_close(out, blob(*grid()).roll((-3, 2), (0, 1)), atol=2e-3, rtol=0)


def test_beyond_the_edge_an_image_goes_on_as_its_mirror_image():
    image = noise(1, 2, 8, 12)
    pipe = AugmentPipe(translate_frac_std=1 / 12)  # one unit is one pixel
    in_place = warp(image, torch.eye(3, dtype=torch.float64)[None])
    mirrored = torch.cat([in_place, in_place.flip(3)], dim=3)
    for pixels in (3, 8, 11, 29, 24 * 1000 + 3):
        out = pipe.transform(image, parameters(1, shift=[pixels, 0.0]))
        torch.testing.assert_close(out, mirrored.roll(pixels, 3)[..., :12], atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    'given, source',
    [
        (dict(scale=2.0), lambda x, y: (x / 2**0.4, y / 2**0.4)),
        (dict(aniso=1.5), lambda x, y: (x / 2**0.3, y * 2**0.3)),
        (dict(aniso=1.5, aniso_angle=math.pi / 2), lambda x, y: (x * 2**0.3, y / 2**0.3)),
        (
            dict(angle=0.3),
            lambda x, y: (x * math.cos(0.3) - y * math.sin(0.3), x * math.sin(0.3) + y * math.cos(0.3)),
        ),
        (dict(shift=[0.3, 0.1]), lambda x, y: (x - 1.2, y - 0.4)),
    ],
)
def test_each_transform_samples_the_analytic_image_where_its_formula_says(given, source):
    torch.testing.assert_close(moved(**given), blob(*source(*grid())), atol=8e-3, rtol=0)


def test_a_stretch_at_an_angle_is_along_that_direction():
    """Counter-clockwise angles: at 45 degrees an upward-right diagonal grows by 2^0.2 and its perpendicular shrinks; y points down."""
    inverse = AugmentPipe().inverse_matrix(parameters(1, aniso=1.0, aniso_angle=math.pi / 4), 8, 8)[0]
    up_right, down_right = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, -1, 0], [1.0, 1, 0]))
    torch.testing.assert_close(inverse @ up_right, up_right / 2**0.2)
    torch.testing.assert_close(inverse @ down_right, down_right * 2**0.2)


def test_transforms_follow_one_another_in_the_papers_order():
    """Scale, rotation, anisotropy, translation: the inverse of the product of the forward matrices."""
    a = parameters(1, scale=0.7, angle=0.4, aniso=-1.1, aniso_angle=0.9, shift=[0.6, -0.2])
    matrix = lambda *rows: torch.tensor([*rows, [0, 0, 1]], dtype=torch.float64)
    turn = lambda t: matrix(
        [math.cos(t), math.sin(t), 0], [-math.sin(t), math.cos(t), 0]
    )  # counter-clockwise with y down
    stretch = lambda x, y: matrix([x, 0, 0], [0, y, 0])
    s, q = 2 ** (0.2 * 0.7), 2 ** (0.2 * -1.1)
    forward = (
        matrix([1, 0, 0.6 * 20 / 8], [0, 1, -0.2 * 12 / 8])
        @ turn(0.9)
        @ stretch(q, 1 / q)
        @ turn(-0.9)
        @ turn(0.4)
        @ stretch(s, s)
    )
    torch.testing.assert_close(
        AugmentPipe().inverse_matrix(a, 12, 20)[0] @ forward,
        torch.eye(3, dtype=torch.float64),
        atol=1e-12,
        rtol=0,
    )


def test_constant_images_stay_constant_and_rectangles_keep_their_shape():
    images = torch.full((16, 1, 8, 12), 0.5, dtype=torch.float64)
    out, _ = AugmentPipe(p=1)(images, torch.Generator().manual_seed(0))
    assert out.shape == images.shape
    torch.testing.assert_close(out, images, atol=1e-12, rtol=0)


# ----------------------------------------------------------------------------
# Labels and randomness.


def test_labels_are_table_6s_in_edms_order():
    a = parameters(1, xflip=1, yflip=1, scale=0.7, angle=0.4, aniso=-1.1, aniso_angle=0.9, shift=[0.6, -0.2])
    expected = [
        1,
        1,
        0.7,
        math.cos(0.4) - 1,
        math.sin(0.4),
        -1.1 * math.cos(0.9),
        -1.1 * math.sin(0.9),
        0.6,
        -0.2,
    ]
    torch.testing.assert_close(AugmentPipe().labels(a), torch.tensor([expected]))
    assert AugmentPipe().augment_dim == 9


def test_transforms_that_are_off_have_no_labels():
    a = parameters(3, yflip=1, shift=[0.6, -0.2])
    pipe = AugmentPipe(scale=0, rotate_frac=0, xflip=0)
    assert pipe.augment_dim == 5
    torch.testing.assert_close(pipe.labels(a), torch.tensor([[1, 0, 0, 0.6, -0.2]]).expand(3, 5))
    assert AugmentPipe(xflip=0, yflip=0, **GEOMETRY_OFF).labels(a).shape == (3, 0)


def test_p_zero_is_the_identity_with_zero_labels():
    images = noise(32, 1, 8, 8, dtype=torch.float32)
    out, labels = AugmentPipe(p=0)(images)
    assert torch.equal(out, images) and labels.shape == (32, 9) and not labels.any()


def test_zero_labels_mean_an_untouched_image():
    images = noise(256, 1, 8, 8, dtype=torch.float32)
    out, labels = AugmentPipe(p=0.12)(images, torch.Generator().manual_seed(0))
    clean = (labels == 0).all(dim=1)
    assert 40 < clean.sum() < 130  # 1/2 · 0.94 · 0.88^4 of 256 is 72
    assert [torch.equal(o, i) for o, i in zip(out, images)] == clean.tolist()


def test_the_generator_decides_everything():
    images = noise(16, 3, 8, 8, dtype=torch.float32)
    run = lambda seed: AugmentPipe(p=0.5)(images, torch.Generator().manual_seed(seed))
    torch.manual_seed(0)
    (first, labels), (again, _), (other, _) = run(1), run(1), run(2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.dtype == labels.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), torch.manual_seed(0).get_state())


def test_frequencies_and_spreads_are_those_of_the_options():
    """20,000 draws: frequencies within 0.015 (4 standard errors), spreads within 5 %."""
    images = torch.zeros(20_000, 1, 1, 1)
    a = AugmentPipe(p=0.2, yflip=2, scale=0.5, rotate_frac_max=0.5).draw(
        images, torch.Generator().manual_seed(0)
    )
    rate = lambda v: (v != 0).float().mean().item()
    expected = dict(xflip=0.5, yflip=0.2, scale=0.1, angle=0.2, aniso_angle=0.5, aniso=0.2)
    assert all(abs(rate(getattr(a, name)) - value) < 0.015 for name, value in expected.items())
    assert abs(rate(a.shift[:, 0]) - 0.2) < 0.015 and torch.equal(a.shift[:, 0] == 0, a.shift[:, 1] == 0)
    for values in (a.scale, a.aniso, a.shift[:, 1]):
        assert abs(values[values != 0].std().item() - 1) < 0.05
    assert 1.5 < a.angle.max() <= math.pi / 2 and -math.pi / 2 <= a.angle.min() < -1.5
    assert a.aniso_angle.abs().max() > 3


def test_nothing_waits_for_values_on_the_device():
    """Tensors of the meta device have shapes but no values: a read of one (`.item()`, a boolean index, a branch) would raise."""
    out, labels = AugmentPipe()(torch.zeros(4, 3, 16, 16, device='meta'))
    assert (out.shape, labels.shape, out.device.type) == ((4, 3, 16, 16), (4, 9), 'meta')
