"""From image files to 8-bit gray or RGB pixels: formats, orientation, transparency, ranges, crops."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Iterable
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from PIL.Image import Resampling, Transpose

from dnnlib import UserError, limits

# Supported formats: Pillow's module and the extensions. Pillow detects formats by content and knows more, but
# some of those run programs (EPS: Ghostscript), and rare ones are hardly tested against hostile files.
IMAGE_FORMATS = dict(
    PNG=('Png', '.png .apng'),
    JPEG=('Jpeg', '.jpg .jpeg .jpe .jfif'),
    MPO=('Mpo', '.mpo'),
    WEBP=('WebP', '.webp'),
    AVIF=('Avif', '.avif .avifs'),
    GIF=('Gif', '.gif'),
    BMP=('Bmp', '.bmp'),
    DIB=('Bmp', '.dib'),
    TIFF=('Tiff', '.tif .tiff'),
    PPM=('Ppm', '.pbm .pgm .ppm .pnm .pfm'),
    JPEG2000=('Jpeg2K', '.jp2 .j2k .j2c .jpc .jpf .jpx'),
    TGA=('Tga', '.tga .icb .vda .vst'),
)
IMAGE_EXTENSIONS = frozenset(
    extension for _, extensions in IMAGE_FORMATS.values() for extension in extensions.split()
)
# Raised by `open_image` and by `load` of its result.
UNREADABLE = (*limits.UNREADABLE, Image.DecompressionBombError)

# `open_image` refuses large images itself.
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)

ORIENTATION = 0x0112  # EXIF tag
WHITE_IS_ZERO = 0x0106, 0  # TIFF tag PhotometricInterpretation, and its value if 0 is white
SIGNED = 0x0153, 2  # TIFF tag SampleFormat, and its value for signed integers
GRAY_MODES = ('1', 'L', 'LA', 'La')
CHUNK = 1 << 20  # pixels per table lookup
# How viewers transpose the stored pixels, by EXIF orientation (1: not at all), and the inverse.
TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
TURNS_BACK = {**TURNS, 6: Transpose.ROTATE_90, 8: Transpose.ROTATE_270}


class Picture(NamedTuple):
    """An image and what its file declares.

    Attributes:
        image: loaded pixels.
        orientation: EXIF orientation, 1 to 8.
        turned: whether `image` is already upright, as Pillow does for TIFF.
        raw: mode of the file's samples in Pillow's terms, such as 'RGB;16B'; '' if unknown.
        animated: whether the file holds several frames or pages; `image` is the first.
    """

    image: Image.Image
    orientation: int = 1
    turned: bool = False
    raw: str = ''
    animated: bool = False

    @classmethod
    def load(cls, image: Image.Image) -> Picture:
        """Load an open image whose pixels have not been read. Raises: one of `UNREADABLE`."""
        # Loading resets the raw mode and, in a TIFF, the orientation.
        raw, before = raw_mode(image), orientation(image) if image.format == 'TIFF' else 1
        animated = getattr(image, 'is_animated', False)  # `n_frames` would count them: there may be millions
        image.load()
        after = orientation(image)
        return cls(image, max(before, after), before > after, raw, animated)

    @property
    def loses_bits(self) -> bool:
        """Whether Pillow has reduced 16 bits per channel to the upper 8."""
        return self.image.mode[0] not in 'IF' and has_16_bits(self.raw)


# ----------------------------------------------------------------------------
# Files.


@functools.lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Those of `IMAGE_FORMATS` that this Pillow reads; loads no other plugins."""
    for module in dict.fromkeys(module for module, _ in IMAGE_FORMATS.values()):
        with contextlib.suppress(ImportError):
            importlib.import_module(f'PIL.{module}ImagePlugin')
    return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)


def open_image(file: str | os.PathLike | BinaryIO, size: int | None = None) -> Image.Image:
    """Read the header of an image in one of `IMAGE_FORMATS`, of at most `limits.IMAGE_PIXELS` pixels.

    Args:
        file: path, or a binary file that must stay open.
        size: bytes of the file; required unless `file` is a path.
    Raises: one of `UNREADABLE`.
    """
    # Check sizes in the file and its header before Pillow allocates memory for pixels.
    size = os.stat(file).st_size if size is None else size
    limits.check_size(size, limits.IMAGE_FILE, 'an image')
    image = Image.open(file, formats=_formats())
    try:
        if image.width * image.height > limits.IMAGE_PIXELS or max(image.size) > limits.IMAGE_SIDE:
            raise limits.TooLarge(
                f'has {image.width} x {image.height} pixels; the limit is {limits.IMAGE_PIXELS:,} pixels, '
                f'and {limits.IMAGE_SIDE:,} per side'
            )
        limits.check_inflation(image.width * image.height * len(image.getbands()), size, 'pixels')
    except limits.TooLarge:
        image.close()
        raise
    return image


# ----------------------------------------------------------------------------
# Orientation.


def orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8 from an image's header; 1 if missing or invalid."""
    try:
        # Not image.getexif(): PNG's method would read the pixels, because the tag may follow them.
        value = Image.Image.getexif(image).get(ORIENTATION, 1)
    except UNREADABLE:  # damaged EXIF
        return 1
    return value if value in TURNS else 1


def is_left_unturned(image: Image.Image) -> bool:
    """Whether viewers rotate an image (its header suffices) but Pillow does not."""
    return image.format != 'TIFF' and orientation(image) != 1


def oriented(picture: Picture, upright: bool) -> Image.Image:
    """The pixels as viewers show them (`upright`), or as stored."""
    if picture.orientation == 1 or upright == picture.turned:
        return picture.image
    return picture.image.transpose((TURNS if upright else TURNS_BACK)[picture.orientation])


# ----------------------------------------------------------------------------
# Modes.


def raw_mode(image: Image.Image) -> str:
    # A tile is (decoder, box, offset, arguments), whose first argument may be a mode.
    """Mode of the file's samples, for an open image; '' if its decoder names none."""
    arguments = image.tile[0][3] if getattr(image, 'tile', None) else ''
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ''


def has_16_bits(raw: str) -> bool:
    """Whether samples have more than 8 bits. `BGR;16` (BMP, TGA) means 16 bits per pixel, not per channel."""
    return ';16' in raw and not raw.startswith('BGR')


def is_color(image: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> bool:
    """Whether an image (its header suffices) is in color, or would be on that background."""
    # Pillow opens 16-bit gray with alpha as RGBA.
    gray = image.mode in GRAY_MODES or image.mode[0] in 'IF' or raw_mode(image) in ('LA;16B', 'LA;16N')
    return not gray or (len(set(background)) > 1 and may_be_transparent(image))


def may_be_transparent(image: Image.Image) -> bool:
    return image.getbands()[-1] in 'Aa' or 'transparency' in image.info


def opacity(picture: Picture, name: str) -> Image.Image | None:
    """Alpha as an 'L' image (255: opaque), from a channel, palette or color key; None if all is opaque.

    Raises: UserError.
    """
    image = picture.image
    if image.mode == 'P':
        # A palette's transparency is one index or a table of them, which converting resolves.
        alpha = image.convert('RGBA').getchannel('A')
    elif image.getbands()[-1] in 'Aa':
        alpha = image.getchannel(image.getbands()[-1])
    elif 'transparency' in image.info:
        alpha = Image.fromarray(np.where(_equals_key(picture, name), 0, 255).astype(np.uint8))
    else:
        return None
    return alpha if alpha.getextrema()[0] < 255 else None


def _equals_key(picture: Picture, name: str) -> np.ndarray:
    """[H, W] bool: pixels of the file's transparent color (PNG's tRNS chunk, GIF)."""
    # The color is in units of the file's samples.
    image, key = picture.image, picture.image.info['transparency']
    if picture.loses_bits:
        raise UserError(
            f'{name} has 16 bits per channel and a transparent color, but Pillow reads only the upper 8 '
            'bits; convert it to 8 bits'
        )
    values = np.asarray(image.convert('L') if image.mode == '1' else image)
    if picture.raw in ('L;2', 'L;4'):  # Pillow scales the samples to 0..255 but not the key
        key = key * 255 // (2 ** int(picture.raw[2:]) - 1)
    return (values == np.array(key)).all(-1) if values.ndim == 3 else values == key


def to_mode(picture: Picture, mode: str, name: str) -> Image.Image:
    """The image as 8-bit 'L' or 'RGB', ignoring alpha. Raises: UserError for values of unknown range."""
    image = picture.image
    if image.mode[0] in 'IF' or _has_tag(image, *SIGNED):
        image = Image.fromarray(_levels(picture, name))
    elif image.mode in ('P', 'La', 'RGBa'):  # Pillow does not convert these to every mode
        image = image.convert('LA' if image.mode == 'La' else 'RGBA')
    try:
        return image if image.mode == mode else image.convert(mode)
    except ValueError as error:
        raise UserError(f'{name} cannot be converted to {mode} ({error}); convert it to RGB') from error


def _levels(picture: Picture, name: str) -> np.ndarray:
    """uint8 [H, W] from gray values of more than 8 bits. Raises: UserError if black and white are unknown."""
    image = picture.image
    if image.mode == 'F':
        raise UserError(f'{name} is a floating-point image of unknown range; convert it to 8 bits')

    # Formats whose range is known: PNG's samples are unsigned, TIFF's mode tells, and Pillow scales PGM and
    # JPEG 2000 to 16 bits whatever their maximum.
    known = {'PNG': 'I', 'PPM': 'I', 'JPEG2000': 'I;16', 'TIFF': 'I;16'}.get(image.format)
    if known is None or not image.mode.startswith(known) or _has_tag(image, *SIGNED):
        raise UserError(
            f'{name} has integers of unknown range (mode '
            f'{image.mode}{", " + picture.raw if picture.raw else ""}); convert it to 8 bits, or to unsigned '
            '16 bits from 0 (black) to 65535 (white)'
        )

    # Scale by table lookup, in chunks to bound memory.
    white = 4095 if picture.raw.startswith('I;12') else 65535
    levels = np.rint(np.arange(white + 1) * (255 / white)).astype(np.uint8)
    if _has_tag(image, *WHITE_IS_ZERO):
        levels = levels[::-1]
    values = np.asarray(image).reshape(-1)
    return np.concatenate([levels[values[i : i + CHUNK]] for i in range(0, len(values), CHUNK)]).reshape(
        image.height, image.width
    )


def _has_tag(image: Image.Image, tag: int, value: int) -> bool:
    """Whether a TIFF's tag has this value in any channel."""
    found = image.tag_v2.get(tag) if image.format == 'TIFF' else None
    return found == value or (isinstance(found, tuple) and value in found)


def prepared(
    picture: Picture, mode: str, background: tuple[int, int, int], upright: bool, name: str
) -> tuple[Image.Image, bool]:
    """(8-bit 'L' or 'RGB' image on the background, upright if wanted; whether any pixel was transparent).

    'L' requires a gray background. Raises: UserError.
    """
    alpha, image = opacity(picture, name), to_mode(picture, mode, name)
    if alpha is not None:
        canvas = Image.new(mode, image.size, background if mode == 'RGB' else background[0])
        image = Image.composite(image, canvas, alpha)
    return oriented(picture._replace(image=image), upright), alpha is not None


# ----------------------------------------------------------------------------
# Images that need no conversion.


def describe_shape(shape: Iterable[int]) -> str:
    """A shape [C, H, W] for messages, such as '32x32 RGB'."""
    channels, height, width = shape
    return f'{width}x{height} {"gray" if channels == 1 else "RGB"}'


def image_shape_of(
    image: Image.Image, source: str, cure: str = 'convert the data set with dataset_tool.py'
) -> tuple[int, int, int]:
    """(channels, height, width) of an image that needs no conversion. Raises: UserError, with `cure`."""
    kind = '16-bit ' + image.mode if is_16_bit(image) else image.mode
    if 'transparency' in image.info:
        raise UserError(
            f'{source} is a {kind} image with a color key for transparency, which training and metrics would '
            f'see as that color; {cure}'
        )
    if kind not in ('L', 'RGB'):
        raise UserError(
            f'{source} is a {kind} image, but only 8-bit grayscale (L) and RGB are supported; {cure}'
        )
    return len(kind), image.height, image.width


def image_pixels(image: Image.Image) -> np.ndarray:
    """uint8 [C, H, W]"""
    image.load()
    # Gray images [H, W] become [H, W, 1].
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def is_16_bit(image: Image.Image) -> bool:
    """Whether the file has more than 8 bits per channel.

    Pillow reduces 16-bit RGB to 8 bits by itself; only the raw mode of its decoder tells.
    """
    return image.mode[0] in 'IF' or has_16_bits(raw_mode(image))


# ----------------------------------------------------------------------------
# Transforms.


def crop_center(image: Image.Image, width: int, height: int) -> Image.Image:
    """The central width x height pixels, rounded toward the top left."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resize by Lanczos filter, ignoring the aspect ratio."""
    return image if image.size == (width, height) else image.resize((width, height), Resampling.LANCZOS)


def center_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    """The largest centered square, resized."""
    side = min(image.size)
    return resize(crop_center(image, side, side), width, height)


def letterboxed(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resize, then pad with black bars to a square of `width`."""
    canvas = Image.new(image.mode, (width, width))
    canvas.paste(resize(image, width, height), (0, (width - height) // 2))
    return canvas


def center_crop_wide(image: Image.Image, width: int, height: int) -> Image.Image | None:
    """EDM's and StyleGAN's crop of LSUN: the central w·H/W rows at full width, resized, with black bars.

    None if the image has fewer than `width` columns, or fewer than `height` such rows. w·H/W (rounded half
    to even) is the image's height at the wanted width, so images wider than `width` are squeezed sideways.
    """
    rows = round(width * image.height / image.width)
    if image.width < width or rows < height:
        return None
    return letterboxed(crop_center(image, image.width, rows), width, height)


def center_crop_letterbox(image: Image.Image, width: int, height: int) -> Image.Image:
    """The largest centered crop of ratio width : height, resized, with black bars to a square of `width`."""
    crop_width = min(image.width, max(round(image.height * width / height), 1))
    crop_height = min(image.height, max(round(image.width * height / width), 1))
    return letterboxed(crop_center(image, crop_width, crop_height), width, height)


def center_crop_dhariwal(image: Image.Image, width: int, height: int) -> Image.Image:
    """ADM's preprocessing (Dhariwal & Nichol 2021).

    Halve by box filter while the shorter side is at least twice too long, resize it exactly by bicubic
    filter, then crop the center.
    """
    # What remains after halving is less than a factor of two.
    while min(image.size) >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    factor = width / min(image.size)
    image = image.resize((round(image.width * factor), round(image.height * factor)), Resampling.BICUBIC)
    return crop_center(image, width, height)
