"""From image files, of formats that are listed here, to 8-bit pixels, gray or RGB: orientation, transparency,
ranges of integers; and the ways to a square."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from PIL.Image import Resampling, Transpose

from dnnlib import UserError, limits

# The formats that are read, with the module of Pillow that reads them, and their extensions. Pillow tells a
# file's format by its contents and knows more: some start programs (EPS: Ghostscript), others hold no pixels
# or are hardly ever seen, and so hardly ever tested against hostile files.
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
UNREADABLE = (
    *limits.UNREADABLE,
    Image.DecompressionBombError,
)  # what `open_image` and `load` of what it opens raise

warnings.filterwarnings(
    'ignore', category=Image.DecompressionBombWarning
)  # from a size on that `open_image` refuses

ORIENTATION = 0x0112  # the EXIF tag
WHITE_IS_ZERO = 0x0106, 0  # TIFF's tag PhotometricInterpretation, and its value where 0 is white
SIGNED = 0x0153, 2  # TIFF's tag SampleFormat, and its value for signed integers
GRAY_MODES = ('1', 'L', 'LA', 'La')
PART = 1 << 20  # pixels that are looked up together
# How a viewer turns the stored pixels, by EXIF orientation (1: not at all), and how that is undone.
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
    """An image and what its file says of it.

    Attributes:
        image: its pixels, loaded.
        orientation: 1 to 8, by which viewers turn it (EXIF).
        turned: whether `image` is so turned already: Pillow does that to TIFF.
        raw: the mode of the file's samples, in the name of Pillow's decoder, such as 'RGB;16B'; '' where
            there is none.
        animated: whether the file holds several pictures, of an animation or pages; `image` is the first.
    """

    image: Image.Image
    orientation: int = 1
    turned: bool = False
    raw: str = ''
    animated: bool = False

    @classmethod
    def load(cls, image: Image.Image) -> Picture:
        """Of an image that is open, and whose pixels have not been read. Raises: what Pillow raises of
        damaged files."""
        raw, before = raw_mode(image), orientation(image) if image.format == 'TIFF' else 1
        animated = getattr(image, 'is_animated', False)  # frames are not counted: there may be millions
        image.load()
        after = orientation(image)
        return cls(image, max(before, after), before > after, raw, animated)

    @property
    def loses_bits(self) -> bool:
        """Whether Pillow has kept the upper 8 bits only of 16 a channel."""
        return self.image.mode[0] not in 'IF' and has_16_bits(self.raw)


# ----------------------------------------------------------------------------
# Files.


@functools.lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Those of `IMAGE_FORMATS` that this Pillow reads. No other plugins are loaded for them."""
    for module in dict.fromkeys(module for module, _ in IMAGE_FORMATS.values()):
        with contextlib.suppress(ImportError):
            importlib.import_module(f'PIL.{module}ImagePlugin')
    return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)


def open_image(file: str | os.PathLike | BinaryIO, size: int | None = None) -> Image.Image:
    """An image of which only the header has been read, of one of `IMAGE_FORMATS` and of no more pixels than
    `limits.IMAGE_PIXELS`.

    Args:
        file: path, or a binary file, which has to stay open.
        size: bytes of the file; only needed where `file` is no path.
    Raises: one of `UNREADABLE`.
    """
    size = os.stat(file).st_size if size is None else size
    limits.check_size(size, limits.IMAGE_FILE, 'an image')
    image = Image.open(file, formats=_formats())
    try:
        if image.width * image.height > limits.IMAGE_PIXELS or max(image.size) > limits.IMAGE_SIDE:
            raise limits.TooLarge(
                f'has {image.width} x {image.height} pixels, and an image has at most '
                f'{limits.IMAGE_PIXELS:,}, and no side longer than {limits.IMAGE_SIDE:,}'
            )
        limits.check_inflation(image.width * image.height * len(image.getbands()), size, 'pixels')
    except limits.TooLarge:
        image.close()
        raise
    return image


# ----------------------------------------------------------------------------
# Orientation.


def orientation(image: Image.Image) -> int:
    """1 to 8, of an image whose header is read; 1 where it says nothing sensible. Its pixels are not read for
    it."""
    try:
        value = Image.Image.getexif(image).get(
            ORIENTATION, 1
        )  # a PNG's own method reads the pixels, as the tag may follow them
    except UNREADABLE:  # damaged EXIF
        return 1
    return value if value in TURNS else 1


def is_left_unturned(image: Image.Image) -> bool:
    """Whether viewers turn an image, of which only the header need be read, and Pillow does not."""
    return image.format != 'TIFF' and orientation(image) != 1


def oriented(picture: Picture, upright: bool) -> Image.Image:
    """The pixels as viewers show them, or as they are stored."""
    if picture.orientation == 1 or upright == picture.turned:
        return picture.image
    return picture.image.transpose((TURNS if upright else TURNS_BACK)[picture.orientation])


# ----------------------------------------------------------------------------
# Modes.


def raw_mode(image: Image.Image) -> str:
    """The mode of the samples in the file of an image that is open; '' where its decoder names none."""
    arguments = image.tile[0][3] if getattr(image, 'tile', None) else ''
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ''


def has_16_bits(raw: str) -> bool:
    """Whether samples of a raw mode have more than 8 bits. In BMP and TGA, `BGR;16` has 16 bits a pixel, not
    a channel."""
    return ';16' in raw and not raw.startswith('BGR')


def is_color(image: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> bool:
    """Whether an image, of which only the header need be read, is not gray, or would not stay so on that
    background."""
    gray = (
        image.mode in GRAY_MODES or image.mode[0] in 'IF' or raw_mode(image) in ('LA;16B', 'LA;16N')
    )  # of 16 bits, which Pillow opens as RGBA
    return not gray or (len(set(background)) > 1 and may_be_transparent(image))


def may_be_transparent(image: Image.Image) -> bool:
    return image.getbands()[-1] in 'Aa' or 'transparency' in image.info


def opacity(picture: Picture, name: str) -> Image.Image | None:
    """'L', 255 where a pixel is opaque; None where all are. Channels, palettes, and a color that the file
    names as transparent. Raises: UserError."""
    image = picture.image
    if image.mode == 'P':
        alpha = image.convert('RGBA').getchannel('A')
    elif image.getbands()[-1] in 'Aa':
        alpha = image.getchannel(image.getbands()[-1])
    elif 'transparency' in image.info:
        alpha = Image.fromarray(np.where(_equals_key(picture, name), 0, 255).astype(np.uint8))
    else:
        return None
    return alpha if alpha.getextrema()[0] < 255 else None


def _equals_key(picture: Picture, name: str) -> np.ndarray:
    """[H, W] whether a pixel has the color that the file names as transparent (PNG's chunk tRNS, GIF), in the
    units of its samples."""
    image, key = picture.image, picture.image.info['transparency']
    if picture.loses_bits:
        raise UserError(
            f'{name} has 16 bits a channel and a transparent color, and Pillow reads only the upper 8 bits; '
            'convert it to 8 bits'
        )
    values = np.asarray(image.convert('L') if image.mode == '1' else image)
    if picture.raw in ('L;2', 'L;4'):  # Pillow scales the samples to 0 ... 255, but not the key
        key = key * 255 // (2 ** int(picture.raw[2:]) - 1)
    return (values == np.array(key)).all(-1) if values.ndim == 3 else values == key


def to_mode(picture: Picture, mode: str, name: str) -> Image.Image:
    """The image in 8 bits, 'L' or 'RGB', whatever its opacity. Raises: UserError where its values have no
    known range."""
    image = picture.image
    if image.mode[0] in 'IF' or _has_tag(image, *SIGNED):
        image = Image.fromarray(_levels(picture, name))
    elif image.mode in ('P', 'La', 'RGBa'):  # to what Pillow converts to any other
        image = image.convert('LA' if image.mode == 'La' else 'RGBA')
    try:
        return image if image.mode == mode else image.convert(mode)
    except ValueError as error:
        raise UserError(f'{name} cannot be converted to {mode} ({error}); convert it to RGB') from error


def _levels(picture: Picture, name: str) -> np.ndarray:
    """uint8 [H, W] of gray values of more than 8 bits, of which black and white are known. Raises: UserError
    where they are not."""
    image = picture.image
    if image.mode == 'F':
        raise UserError(f'{name} is a floating-point image of unknown range; convert it to 8 bits')
    # PNG's samples are unsigned, TIFF's as its mode says; Pillow scales those of PGM and JPEG 2000 to 16
    # bits, whatever their maximum.
    known = {'PNG': 'I', 'PPM': 'I', 'JPEG2000': 'I;16', 'TIFF': 'I;16'}.get(image.format)
    if known is None or not image.mode.startswith(known) or _has_tag(image, *SIGNED):
        raise UserError(
            f'{name} has integers of unknown range (mode '
            f'{image.mode}{", " + picture.raw if picture.raw else ""}); convert it to 8 bits, or to unsigned '
            '16 bits from 0, black, to 65535, white'
        )
    white = 4095 if picture.raw.startswith('I;12') else 65535
    levels = np.rint(np.arange(white + 1) * (255 / white)).astype(np.uint8)
    if _has_tag(image, *WHITE_IS_ZERO):
        levels = levels[::-1]
    values = np.asarray(image).reshape(-1)
    return np.concatenate([levels[values[i : i + PART]] for i in range(0, len(values), PART)]).reshape(
        image.height, image.width
    )


def _has_tag(image: Image.Image, tag: int, value: int) -> bool:
    """Whether a tag of a TIFF has a value, in any channel."""
    found = image.tag_v2.get(tag) if image.format == 'TIFF' else None
    return found == value or (isinstance(found, tuple) and value in found)


def prepared(
    picture: Picture, mode: str, background: tuple[int, int, int], upright: bool, name: str
) -> tuple[Image.Image, bool]:
    """(the 8-bit image 'L' or 'RGB', composited on the background and turned or not, whether any of its
    pixels is transparent).

    'L' takes a gray background. Raises: UserError.
    """
    alpha, image = opacity(picture, name), to_mode(picture, mode, name)
    if alpha is not None:
        canvas = Image.new(mode, image.size, background if mode == 'RGB' else background[0])
        image = Image.composite(image, canvas, alpha)
    return oriented(picture._replace(image=image), upright), alpha is not None


# ----------------------------------------------------------------------------
# Transforms.


def crop_center(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle width x height pixels; one pixel nearer to the top left where they cannot be in the
    middle."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image at that size, whatever its own aspect ratio, by Lanczos filter."""
    return image if image.size == (width, height) else image.resize((width, height), Resampling.LANCZOS)


def center_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    """The largest centered square, resized."""
    side = min(image.size)
    return resize(crop_center(image, side, side), width, height)


def letterboxed(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image, resized, between black bars that make it a square of `width`."""
    canvas = Image.new(image.mode, (width, width))
    canvas.paste(resize(image, width, height), (0, (width - height) // 2))
    return canvas


def center_crop_wide(image: Image.Image, width: int, height: int) -> Image.Image | None:
    """As EDM and StyleGAN cut LSUN: of the image, the middle w H / W rows in all their columns, resized,
    between black bars; None where the image has fewer than `width` columns, or fewer than `height` such rows.

    w H / W is the height of the image scaled to the wanted width, rounded half to even. What is cut out
    therefore has the wanted ratio where W = w, and is squeezed from the sides where the image is wider.
    """
    rows = round(width * image.height / image.width)
    if image.width < width or rows < height:
        return None
    return letterboxed(crop_center(image, image.width, rows), width, height)


def center_crop_letterbox(image: Image.Image, width: int, height: int) -> Image.Image:
    """The largest centered part of the ratio width : height, resized, between black bars that make it a
    square of `width`."""
    crop_width = min(image.width, max(round(image.height * width / height), 1))
    crop_height = min(image.height, max(round(image.width * height / width), 1))
    return letterboxed(crop_center(image, crop_width, crop_height), width, height)


def center_crop_dhariwal(image: Image.Image, width: int, height: int) -> Image.Image:
    """ADM's preprocessing (Dhariwal & Nichol 2021): halved by box filter while twice too large, the shorter
    side made exact by bicubic filter, the middle cropped."""
    while min(image.size) >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    factor = width / min(image.size)
    image = image.resize((round(image.width * factor), round(image.height * factor)), Resampling.BICUBIC)
    return crop_center(image, width, height)
