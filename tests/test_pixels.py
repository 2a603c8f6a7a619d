"""From files to pixels by dataset_tool.py: transparency, orientation and ranges of every kind, against the formulas; and nothing lost in silence."""

import ast
import io
import struct
import time
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import ROOT, assert_one_clear_error
from PIL import Image, ImageOps

import dataset_tool
import fid
from data.dataset import ImageFolderDataset
from data.pixels import TURNS
from dnnlib import EasyDict, UserError
from metrics.calc import compute_features
from metrics.images import open_images
from sampling import edit_files
from training.announcements import data_warnings

NOISE = np.random.default_rng(0).integers(0, 256, [8, 8, 4], dtype=np.uint8)
ALPHA = np.tile(np.array([0, 128, 255, 255], np.uint8), (8, 2))  # by columns: transparent, half, opaque
WIDE = np.random.default_rng(1).integers(0, 65536, [8, 8, 4]).astype('>u2')


def run(folder, *options):
    return CliRunner().invoke(dataset_tool.main, [f'--source={folder}', f'--dest={folder}.zip', *options])


def converted(folder, *options):
    """(the only image written, what was said)."""
    result = run(folder, *options)
    assert result.exit_code == 0, result.output
    with zipfile.ZipFile(f'{folder}.zip') as archive:
        return np.asarray(Image.open(io.BytesIO(archive.read('00000/img00000000.png')))), result.output


def saved(folder, image, kind='png', **options):
    folder.mkdir()
    image.save(folder / f'a.{kind}', **options)
    return folder


def raw_png(folder, depth, color_type, rows, *chunks):
    """A PNG of 8x8 whose samples Pillow does not write."""

    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    folder.mkdir()
    header = struct.pack('>IIBBBBB', 8, 8, depth, color_type, 0, 0, 0)
    data = zlib.compress(b''.join(b'\0' + row for row in rows))
    (folder / 'a.png').write_bytes(
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', header)
        + b''.join(chunk(*c) for c in chunks)
        + chunk(b'IDAT', data)
        + chunk(b'IEND', b'')
    )
    return folder


def raw_tiff(folder, bits, data, photometric=1, sample_format=1):
    """A TIFF of 8x8 whose samples Pillow does not write."""
    tags = [
        (256, 8),
        (257, 8),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 8),
        (277, 1),
        (278, 8),
        (279, len(data)),
        (339, sample_format),
    ]
    directory = (
        struct.pack('<H', len(tags))
        + b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in tags)
        + bytes(4)
    )
    folder.mkdir()
    (folder / 'a.tif').write_bytes(b'II*\0' + struct.pack('<I', 8 + len(data)) + data + directory)
    return folder


# ----------------------------------------------------------------------------
# Transparency.


def over(color, background, alpha=ALPHA):
    """The formula of compositing, rounded."""
    alpha = alpha[..., None] / 255 if color.ndim == 3 else alpha / 255
    return np.rint(color * alpha + np.array(background) * (1 - alpha))


@pytest.mark.parametrize(
    'kind, options', [('png', {}), ('webp', dict(lossless=True, exact=True)), ('tif', {})]
)
@pytest.mark.parametrize(
    'background, rgb', [(None, (255, 255, 255)), ('black', (0, 0, 0)), ('#10a0ff', (16, 160, 255))]
)
def test_transparent_pixels_lie_on_the_background(tmp_path, kind, options, background, rgb):
    folder = saved(tmp_path / 'src', Image.fromarray(np.dstack([NOISE[..., :3], ALPHA])), kind, **options)
    pixels, said = converted(folder, *([f'--background={background}'] if background else []))
    np.testing.assert_allclose(pixels, over(NOISE[..., :3], rgb), atol=1)
    np.testing.assert_array_equal(pixels[:, 2], NOISE[:, 2, :3])
    assert (
        f'1 images have transparent pixels and were composited on --background={background or "white"}'
        in said
    )


def test_an_opaque_alpha_channel_is_not_called_transparent(tmp_path):
    pixels, said = converted(
        saved(tmp_path / 'src', Image.fromarray(np.dstack([NOISE[..., :3], np.full([8, 8], 255, np.uint8)])))
    )
    assert 'transparent' not in said and np.array_equal(pixels, NOISE[..., :3])


@pytest.mark.parametrize(
    'background, shape, color',
    [('white', (8, 8), 255), ('#808080', (8, 8), 128), ('red', (8, 8, 3), (255, 0, 0))],
)
def test_gray_stays_gray_on_a_gray_background(tmp_path, background, shape, color):
    pixels, _ = converted(
        saved(tmp_path / 'src', Image.fromarray(np.dstack([NOISE[..., 0], ALPHA]), 'LA')),
        f'--background={background}',
    )
    opaque = pixels[:, 2, 0] if pixels.ndim == 3 else pixels[:, 2]
    assert pixels.shape == shape and (pixels[:, 0] == color).all() and np.array_equal(opaque, NOISE[:, 2, 0])


@pytest.mark.parametrize('kind, transparency', [('png', 2), ('png', bytes([255, 0, 128, 255])), ('gif', 2)])
def test_palettes_are_transparent_by_entry(tmp_path, kind, transparency):
    image = Image.fromarray(NOISE[..., 0] % 4, 'L').convert('P')
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 90, 50, 10])
    pixels, said = converted(saved(tmp_path / 'src', image, kind, transparency=transparency))
    alpha = np.array([255, 255, 0, 255] if transparency == 2 else list(transparency), np.uint8)[
        NOISE[..., 0] % 4
    ]
    np.testing.assert_allclose(pixels, over(np.asarray(image.convert('RGB')), 255, alpha), atol=1)
    assert 'transparent' in said


def test_a_color_named_transparent_is_so_in_gray_rgb_and_fewer_or_more_bits(tmp_path):
    """The chunk tRNS counts in the samples' own units; Pillow leaves it so, and scales the samples."""
    expected = NOISE[..., :3].copy()
    expected[0, 0] = 255
    rgb = saved(
        tmp_path / 'rgb', Image.fromarray(NOISE[..., :3]), transparency=tuple(NOISE[0, 0, :3].tolist())
    )
    np.testing.assert_array_equal(converted(rgb)[0], expected)
    gray = saved(tmp_path / 'gray', Image.fromarray(NOISE[..., 0]), transparency=int(NOISE[0, 0, 0]))
    np.testing.assert_array_equal(
        converted(gray)[0], np.where(NOISE[..., 0] == NOISE[0, 0, 0], 255, NOISE[..., 0])
    )
    for depth, row, key, levels in (
        (1, b'\x0f', 0, [255] * 8),
        (2, b'\x1b\x1b', 2, [0, 85, 255, 255] * 2),
        (4, b'\x01\x5a\xff\x37', 5, [0, 17, 255, 170, 255, 255, 51, 119]),
    ):
        folder = raw_png(tmp_path / str(depth), depth, 0, [row] * 8, (b'tRNS', struct.pack('>H', key)))
        assert converted(folder)[0][0].tolist() == levels
    values = WIDE[..., 0]
    folder = raw_png(
        tmp_path / '16',
        16,
        0,
        [row.tobytes() for row in values],
        (b'tRNS', struct.pack('>H', int(values[0, 0]))),
    )
    np.testing.assert_array_equal(
        converted(folder)[0], np.where(values == values[0, 0], 255, np.rint(values / 257))
    )
    folder = raw_png(
        tmp_path / '48', 16, 2, [row[:, :3].tobytes() for row in WIDE], (b'tRNS', WIDE[0, 0, :3].tobytes())
    )
    assert_one_clear_error(run(folder), 'a.png has 16 bits per channel and a transparent color')


@pytest.mark.parametrize('color_type, channels', [(6, [0, 1, 2, 3]), (4, [0, 3])])
def test_of_16_bits_a_channel_the_upper_8_are_kept_and_that_is_said(tmp_path, color_type, channels):
    wide = WIDE.copy()
    wide[..., 3] = 65535
    wide[:, 0, 3] = 0
    pixels, said = converted(
        raw_png(
            tmp_path / 'src',
            16,
            color_type,
            [np.ascontiguousarray(row[:, channels]).tobytes() for row in wide],
        )
    )
    expected = (
        (wide[..., :3] >> 8).astype(np.uint8) if color_type == 6 else (wide[..., 0] >> 8).astype(np.uint8)
    )
    assert (pixels[:, 0] == 255).all() and np.array_equal(pixels[:, 1:], expected[:, 1:])
    assert (
        '1 images have 16 bits per channel, of which the upper 8 were kept' in said and 'transparent' in said
    )


@pytest.mark.parametrize('color', ['nocolor', '#12345', '#ff000080', '', 'hsl(1)'])
def test_a_background_that_is_no_opaque_color_names_the_choices(tmp_path, color):
    assert_one_clear_error(run(tmp_path, f'--background={color}'), 'a name of CSS', '#rrggbb', status=2)


def test_training_and_measuring_refuse_transparency(tmp_path):
    for name, image in (('rgba', Image.fromarray(NOISE)), ('la', Image.fromarray(NOISE[..., :2], 'LA'))):
        folder = saved(tmp_path / name, image)
        for read in (ImageFolderDataset, open_images):
            with pytest.raises(Exception, match=r'a\.png is a (RGBA|LA) image'):
                read(folder)


def test_the_handed_transparent_images_show_no_hidden_colors(tmp_path, fixtures):
    """Magenta noise lies under their transparent pixels."""
    for name in ('rgba', 'paltrans'):
        source = Image.open(fixtures / f'faults/{name}/a.png')
        hidden = np.asarray(source.convert('RGBA'))[..., 3] == 0
        result = CliRunner().invoke(
            dataset_tool.main, [f'--source={fixtures}/faults/{name}', f'--dest={tmp_path}/{name}']
        )
        assert '1 images have transparent pixels' in result.output
        assert (
            hidden.any()
            and (np.asarray(Image.open(tmp_path / name / '00000/img00000000.png'))[hidden] == 255).all()
        )


# ----------------------------------------------------------------------------
# Orientation.

SQUARES = np.kron(NOISE[:2, :2, :3], np.ones([4, 4, 1], np.uint8))


def tagged(folder, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = dict(jpg=dict(quality=100, subsampling=0), webp=dict(lossless=True, exact=True)).get(kind, {})
    return saved(folder, Image.fromarray(SQUARES), kind, exif=exif, **options)


def turned(pixels, orientation):
    """Where rows and columns of the stored pixels begin, by the EXIF standard."""
    return {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: pixels[::-1].transpose(1, 0, 2),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: pixels[:, ::-1].transpose(1, 0, 2),
    }[orientation]


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('kind', ['jpg', 'png', 'webp', 'tif'])
def test_orientation_is_ignored_or_applied_and_counted(tmp_path, kind, orientation):
    folder = tagged(tmp_path / 'src', kind, orientation)
    stored, said = converted(folder)
    np.testing.assert_allclose(stored.astype(int), SQUARES, atol=4 if kind == 'jpg' else 0)
    assert ('1 images have an EXIF orientation, which was ignored' in said) == (orientation != 1)
    upright, said = converted(folder, '--exif=apply')
    np.testing.assert_array_equal(upright, turned(stored, orientation))
    assert ('1 images have an EXIF orientation, which was applied' in said) == (orientation != 1)
    np.testing.assert_array_equal(
        edit_files.read_image(str(folder / f'a.{kind}'))[0].permute(1, 2, 0), upright
    )


def test_the_handed_photo_is_turned_as_it_is_displayed(tmp_path, fixtures):
    result = CliRunner().invoke(
        dataset_tool.main, [f'--source={fixtures}/faults/exif', f'--dest={tmp_path}/out', '--exif=apply']
    )
    assert '1 images have an EXIF orientation, which was applied' in result.output
    pixels = np.asarray(Image.open(tmp_path / 'out/00000/img00000000.png')).astype(int)
    np.testing.assert_array_equal(
        pixels, np.asarray(ImageOps.exif_transpose(Image.open(fixtures / 'faults/exif/a.jpg')))
    )
    assert (
        np.abs(pixels - np.asarray(Image.open(fixtures / 'faults/exif_as_displayed.png'))).max() <= 4
    )  # JPEG


def test_damaged_exif_says_nothing(tmp_path):
    folder = saved(
        tmp_path / 'src', Image.fromarray(SQUARES), 'jpg', exif=b'Exif\0\0garbage', quality=100, subsampling=0
    )
    assert np.abs(converted(folder, '--exif=apply')[0].astype(int) - SQUARES).max() <= 4


def test_data_sets_and_images_to_be_measured_count_what_they_do_not_turn(tmp_path, capsys):
    folder = tagged(tmp_path / 'src', 'jpg', 6)
    for i, orientation in enumerate((1, 3, 3)):
        (folder / f'{i}.jpg').write_bytes(
            (tagged(tmp_path / f'{i}', 'jpg', orientation) / 'a.jpg').read_bytes()
        )
    c = EasyDict(dataset=EasyDict(path=str(folder)))
    said = list(data_warnings(c, ImageFolderDataset(folder)))
    assert any(
        'Note: 3 images carry an EXIF orientation, which is ignored' in line and '--exif=apply' in line
        for line in said
    )
    source, detector = open_images(folder), lambda images: images.float().mean((2, 3))
    detector.name, detector.digest, detector.dim, detector.device, detector.has_classes = (
        'means',
        '',
        3,
        'cpu',
        False,
    )
    seen = compute_features(source, {'x': detector}, 2)['x']
    assert sorted(source.unturned.values()) == [3, 3, 6] and seen.unturned == 3
    fid.warn_about(source, seen)
    assert f'Note: 3 images in {folder} have an EXIF orientation' in ''.join(capsys.readouterr())


def test_all_turns_are_there():
    assert sorted(TURNS) == list(range(2, 9))


# ----------------------------------------------------------------------------
# Ranges of integers.

STEPS = np.arange(64).reshape(8, 8) * 1000  # 0 ... 63,000


@pytest.mark.parametrize(
    'write, white, values',
    [
        (lambda folder: saved(folder, Image.fromarray(STEPS.astype(np.uint16)), 'png'), 65535, STEPS),
        (lambda folder: saved(folder, Image.fromarray(STEPS.astype(np.uint16)), 'tif'), 65535, STEPS),
        (lambda folder: saved(folder, Image.fromarray(STEPS.astype('>u2')), 'tif'), 65535, STEPS),
        (
            lambda folder: raw_tiff(folder, 16, STEPS.astype('<u2').tobytes(), photometric=0),
            65535,
            65535 - STEPS,
        ),
        (lambda folder: raw_tiff(folder, 12, pack_12_bits(STEPS // 16)), 4095, STEPS // 16),
        (lambda folder: pgm(folder, 65535, STEPS.astype('>u2')), 65535, STEPS),
        (lambda folder: pgm(folder, 63000, STEPS.astype('>u2')), 63000, STEPS),
        (lambda folder: pgm(folder, 15, (STEPS // 4000).astype(np.uint8)), 15, STEPS // 4000),
    ],
)
def test_integers_of_known_range_are_scaled_to_it(tmp_path, write, white, values):
    np.testing.assert_allclose(
        converted(write(tmp_path / 'src'))[0],
        np.rint(values * (255 / white)),
        atol=1 if white == 63000 else 0,
    )


def pgm(folder, maximum, values):
    folder.mkdir()
    (folder / 'a.pgm').write_bytes(b'P5 8 8 %d\n' % maximum + values.tobytes())
    return folder


def pack_12_bits(values):
    return b''.join((int(a) << 12 | int(b)).to_bytes(3, 'big') for a, b in values.reshape(-1, 2))


@pytest.mark.parametrize(
    'write',
    [
        lambda folder: saved(folder, Image.fromarray(STEPS.astype(np.int32)), 'tif'),
        lambda folder: raw_tiff(folder, 32, STEPS.astype('<u4').tobytes()),
        lambda folder: raw_tiff(folder, 16, STEPS.astype('<i2').tobytes(), sample_format=2),
        lambda folder: raw_tiff(folder, 8, STEPS.astype('i1').tobytes(), sample_format=2),
    ],
)
def test_integers_of_unknown_range_are_refused_and_nothing_saturates(tmp_path, write):
    """Signed ones too; values beyond 65535 became white."""
    assert_one_clear_error(
        run(write(tmp_path / 'src')), 'a.tif has integers of unknown range', 'convert it to 8 bits'
    )
    assert not (tmp_path / 'src.zip').exists()


# ----------------------------------------------------------------------------
# Frames and pages.


@pytest.mark.parametrize('kind', ['gif', 'tiff', 'webp', 'png'])
def test_files_of_several_frames_or_pages_are_counted_and_the_first_is_taken(tmp_path, kind):
    frames = [Image.fromarray(np.full([8, 8, 3], level, np.uint8)) for level in (10, 100, 200)]
    (tmp_path / 'in').mkdir()
    frames[0].save(tmp_path / 'in' / f'a.{kind}', save_all=True, append_images=frames[1:], lossless=True)
    pixels, said = converted(tmp_path / 'in')
    assert (
        pixels == 10
    ).all() and 'Note: 1 files hold several frames or pages, of which the first was used.' in said
    frames[0].save(tmp_path / 'in' / f'a.{kind}', lossless=True)
    assert 'several frames' not in converted(tmp_path / 'in')[1]


def test_a_color_that_stands_for_transparent_is_refused_where_pixels_are_taken_as_they_are(tmp_path):
    """Of RGB and of gray: what viewers do not show would be trained on and measured."""
    for mode, key in (('RGB', (255, 0, 255)), ('L', 0)):
        (tmp_path / mode).mkdir()
        Image.new(mode, (8, 8), key).save(tmp_path / mode / 'a.png', transparency=key)
        with pytest.raises(UserError, match='a color key for transparency'):
            ImageFolderDataset(tmp_path / mode)
        with pytest.raises(UserError, match='a color key for transparency'):
            open_images(tmp_path / mode)


# ----------------------------------------------------------------------------
# Which files are opened.

EPS = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(canary) (w) file closefile showpage\n%%EOF\n'


def test_every_image_is_opened_by_the_one_function():
    calls = [
        f'{path.name}:{node.lineno}'
        for path in ROOT.rglob('*.py')
        if not {'.venv', 'tests', 'benchmarks'} & set(path.parts)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr == 'open'
        and ast.unparse(node.value).endswith('Image')
    ]
    assert len(calls) == 1 and calls[0].startswith('pixels.py'), calls


@pytest.mark.parametrize('name', ['a.png', 'a.jpg', 'a.tif'])
@pytest.mark.parametrize(
    'content', [EPS, b'\xc5\xd0\xd3\xc6' + struct.pack('<II', 32, len(EPS)) + bytes(20) + EPS]
)
def test_postscript_starts_no_program_whatever_its_name(tmp_path, monkeypatch, name, content):
    monkeypatch.setattr('subprocess.Popen', lambda *args, **_: pytest.fail(f'started {args}'))
    monkeypatch.setattr('subprocess.check_call', lambda *args, **_: pytest.fail(f'started {args}'))
    (tmp_path / 'src').mkdir()
    (tmp_path / 'src' / name).write_bytes(content)
    for result in (
        run(tmp_path / 'src'),
        CliRunner().invoke(fid.main, ['ref', f'--data={tmp_path / "src"}', f'--dest={tmp_path}/x.npz']),
    ):
        assert_one_clear_error(result, f'{name} is not a readable image (it is a PostScript document (EPS))')
    with pytest.raises(UserError, match='PostScript'):
        edit_files.read_image(str(tmp_path / 'src' / name))
    with pytest.raises(UserError, match='PostScript'):
        ImageFolderDataset(tmp_path / 'src')


@pytest.mark.parametrize('kind', ['eps', 'psd', 'pdf', 'fli', 'wmf', 'im', 'h5'])
def test_files_of_formats_that_are_not_read_are_named_and_left_out(tmp_path, kind):
    folder = saved(tmp_path / 'src', Image.fromarray(NOISE[..., :3]))
    (folder / f'b.{kind.upper()}').write_bytes(EPS)
    assert f'are skipped: b.{kind.upper()}' in converted(folder)[1]


@pytest.mark.parametrize(
    'kind, options',
    [
        ('png', {}),
        ('apng', {}),
        ('jpg', {}),
        ('jpeg', {}),
        ('jfif', {}),
        ('mpo', {}),
        ('webp', dict(lossless=True)),
        ('gif', {}),
        ('bmp', {}),
        ('dib', {}),
        ('tif', {}),
        ('tiff', dict(compression='tiff_lzw')),
        ('ppm', {}),
        ('pnm', {}),
        ('jp2', {}),
        ('j2k', {}),
        ('tga', {}),
        ('avif', {}),
    ],
)
def test_the_formats_that_are_read(tmp_path, kind, options):
    pixels, _ = converted(
        saved(tmp_path / 'in', Image.fromarray(np.full([8, 8, 3], 120, np.uint8)), kind, **options)
    )
    assert np.abs(pixels.astype(int) - 120).max() <= 3


def claiming(width, height, depth=8, color_type=0, *chunks):
    """A PNG that says so, with hardly any pixels in it."""

    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', width, height, depth, color_type, 0, 0, 0)
    return (
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', header)
        + b''.join(chunk(*c) for c in chunks)
        + chunk(b'IDAT', zlib.compress(bytes(1000)))
        + chunk(b'IEND', b'')
    )


def bomb(size):
    return zlib.compress(bytes(size), 9)


def many_frames(count):
    """A GIF of 1x1, whose frames are 15 bytes each."""
    frame = b',' + struct.pack('<4HB', 0, 0, 1, 1, 0) + b'\x02\x02D\x01\0'
    return b'GIF89a' + struct.pack('<2H3B', 1, 1, 0x80, 0, 0) + bytes(6) + frame * count + b';'


HOSTILE_IMAGES = {
    'a gigapixel': (claiming(40_000, 40_000), 'pixel'),
    'a line of 2**31 pixels': (claiming(2**31 - 1, 1), 'pixel'),
    'a column of 2**31 pixels': (claiming(1, 2**31 - 1), 'pixel'),
    '100 million pixels': (claiming(10_000, 10_000), 'the limit is 67,108,864'),
    'longer than any JPEG': (claiming(70_000, 1), 'per side'),
    'more than it has': (claiming(8000, 8000, 8, 2), 'claims 192,000,000 bytes'),
    'a BMP of two gigapixels': (
        b'BM' + struct.pack('<I4xI', 60, 54) + struct.pack('<IiiHHI', 40, 65000, 30000, 1, 24, 0) + bytes(24),
        'pixel',
    ),
    'a TIFF of a gigapixel': (
        b'II*\0\x08\0\0\0\x03\0'
        + b''.join(
            struct.pack('<HHII', *tag) for tag in ((256, 4, 1, 60_000), (257, 4, 1, 60_000), (258, 3, 1, 8))
        )
        + bytes(40),
        '',
    ),
    'a TIFF tag of 16 GB': (
        b'II*\0\x08\0\0\0\x02\0' + struct.pack('<HHIIHHII4x', 256, 12, 0x7FFFFFFF, 8, 257, 4, 1, 8),
        '',
    ),
    'a text of a gigabyte': (claiming(8, 8, 8, 0, (b'zTXt', b'a\0\0' + bomb(1 << 27))), 'MAX_TEXT_CHUNK'),
    'a profile of a gigabyte': (claiming(8, 8, 8, 0, (b'iCCP', b'a\0\0' + bomb(1 << 27))), ''),
}


@pytest.mark.parametrize('case', HOSTILE_IMAGES)
def test_images_that_claim_too_much_are_one_error_and_take_no_memory(tmp_path, case):
    content, words = HOSTILE_IMAGES[case]
    (tmp_path / 'src').mkdir()
    (tmp_path / 'src/a.png').write_bytes(content)
    tracemalloc.start()
    result = run(tmp_path / 'src')
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()
    if case != 'a profile of a gigabyte':  # which is left out, as viewers do
        assert_one_clear_error(result, 'a.png', words)
        assert 'Warning' not in result.stderr


def test_frames_are_not_counted(tmp_path):
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in/a.gif').write_bytes(many_frames(1_000_000))
    start = time.monotonic()
    assert (
        'files hold several frames or pages' in converted(tmp_path / 'in')[1] and time.monotonic() - start < 5
    )
