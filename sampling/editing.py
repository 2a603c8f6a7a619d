"""Zero-shot editing: what is known of an image, put in place of the same component of what a network makes up
(Song et al. 2023, Section 6).

A linear map A tells what is known: pixels outside a mask, the luma of each pixel, the mean of each block of
p×p pixels. An edit moves D the shortest way to an image whose known component is right,

    D' = D + A⁺(A·y − A·D),   A⁺ the pseudo-inverse of A,

which is Song et al.'s Algorithm 4 without its orthogonal matrices: they complete A's rows to a basis and
change coordinates back and forth. Edits are given to `samplers.sample(..., edit=...)`, which makes them after
every evaluation. Images are [N, C, H, W], in [-1, 1].

What follows an edit in this file brings such an image to 8 bits without losing again what was known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from training.networks.encoders import StandardRGBEncoder
from training.samplers import Edit

LUMA = (
    19595 / 65536,
    38470 / 65536,
    7471 / 65536,
)  # Rec. 601's 0.299, 0.587, 0.114 in the 16-bit fixed point of Pillow's convert('L')
GRAY = 128  # of pixels that are to be made up, where what is known is shown
ROOM = 1e-12  # least distance to the ends of the range that is divided by

# ----------------------------------------------------------------------------
# Edits.


def inpainting(image: Tensor, unknown: Tensor) -> Edit:
    """Keeps `image` [N, C, H, W] bit for bit except where `unknown`, boolean and broadcastable, is true."""
    return lambda denoised: torch.where(unknown, denoised, image.to(denoised.dtype))


def colorization(gray: Tensor) -> Edit:
    """Gives RGB images the luma `gray` [N, 1, H, W]; the two directions of color orthogonal to it are D's."""

    def edit(denoised):
        weights = _luma_weights(denoised)
        return denoised + weights / weights.square().sum() * (gray - luma(denoised))

    return edit


def superresolution(small: Tensor, factor: int) -> Edit:
    """Gives blocks of factor × factor pixels the means `small` [N, C, H / factor, W / factor]; their
    differences within a block are D's."""
    return lambda denoised: denoised + repeat(small - block_mean(denoised, factor), factor)


def luma(images: Tensor) -> Tensor:
    """[N, 3, H, W] to [N, 1, H, W], weighted as in `LUMA`."""
    return (images * _luma_weights(images)).sum(1, keepdim=True)


def _luma_weights(like: Tensor) -> Tensor:
    return torch.tensor(LUMA, dtype=like.dtype, device=like.device).reshape(3, 1, 1)


def block_mean(images: Tensor, factor: int) -> Tensor:
    """Means of blocks of factor × factor pixels: [N, C, H, W] to [N, C, H / factor, W / factor].

    Raises: ValueError where it does not divide.
    """
    return to_blocks(images, factor).mean(-1)


def repeat(images: Tensor, factor: int) -> Tensor:
    """Each pixel as a block of factor × factor: the pseudo-inverse of `block_mean`."""
    return images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def to_blocks(images: Tensor, factor: int) -> Tensor:
    """[N, C, H, W] to [N, C, H / factor, W / factor, factor²].

    Raises: ValueError where it does not divide.
    """
    n, c, h, w = images.shape
    if h % factor or w % factor:
        raise ValueError(f'{w}x{h} pixels do not divide into blocks of {factor}x{factor}')
    return images.reshape(n, c, h // factor, factor, w // factor, factor).transpose(3, 4).flatten(4)


def from_blocks(blocks: Tensor, factor: int) -> Tensor:
    """Inverse of `to_blocks`."""
    n, c, h, w, _ = blocks.shape
    return blocks.unflatten(4, (factor, factor)).transpose(3, 4).reshape(n, c, h * factor, w * factor)


# ----------------------------------------------------------------------------
# Into 8 bits. With the right known component D may be outside [-1, 1]: bright at one side of a block whose
# mean is brighter still.


def contract(values: Tensor, center: Tensor, dim: int) -> Tensor:
    """Values along `dim`, drawn toward `center` by one factor until they are in [-1, 1]; as they are where
    they are inside. `center` is inside.

    A weighted mean of theirs stays what it is if it is the center.
    """
    offset = values - center
    room = (1 - center * offset.sign()).clamp(min=ROOM)
    return center + offset / (offset.abs() / room).amax(dim, keepdim=True).clamp(min=1)


def contract_colors(images: Tensor) -> Tensor:
    """RGB images [N, 3, H, W] within [-1, 1]: colors outside are made paler, at the same luma, which must be
    inside."""
    return contract(images, luma(images).clamp(-1, 1), 1)


def round_blocks(images: Tensor, factor: int) -> Tensor:
    """To uint8 without changing the blocks' sums, which must be whole numbers of gray levels, as averages of
    uint8 images are.

    Values outside [-1, 1] are drawn toward their block's mean; then all are rounded down, and those with the
    largest remainders up instead, as many as the sum lacks. No value moves by a whole gray level.
    """
    blocks = to_blocks(images.double(), factor)
    levels = (contract(blocks, blocks.mean(-1, keepdim=True).clamp(-1, 1), -1) + 1) * 127.5
    lower = levels.floor()
    lacking = (levels - lower).sum(-1, keepdim=True).round()
    rank = (lower - levels).argsort(dim=-1, stable=True).argsort(dim=-1)
    return from_blocks(lower + (rank < lacking), factor).to(torch.uint8)


def gray_pixels(images: Tensor) -> Tensor:
    """Luma of uint8 images [N, 1 or 3, H, W], rounded as by Pillow's convert('L').

    Returns: uint8 [N, 1, H, W].
    """
    if images.shape[1] == 1:
        return images
    weights = (
        (torch.tensor(LUMA, dtype=torch.float64, device=images.device) * 65536)
        .to(torch.int64)
        .reshape(3, 1, 1)
    )
    return ((images * weights).sum(1, keepdim=True) + 32768).div(65536, rounding_mode='floor').to(torch.uint8)


# ----------------------------------------------------------------------------
# Tasks: an edit, what it starts from, and how its results become 8 bits.


class Prepared(NamedTuple):
    """A batch made ready for the sampler.

    Attributes:
        known: what the network knows of the images, shown in the grid: uint8 [N, C, H, W].
        latents: [N, C, H, W].
        options: of `samplers.sample`: an edit, or a start.
        to_pixels: from what the sampler returns to uint8.
    """

    known: Tensor
    latents: Tensor
    options: dict
    to_pixels: Callable[[Tensor], Tensor]


Task = Callable[['Tensor', 'Tensor'], Prepared]  # of images, uint8 [N, C, H, W], and latents


def to_signed(images: Tensor) -> Tensor:
    """uint8 to [-1, 1], in float64: what is known stays exact."""
    return images.double() / 127.5 - 1


def to_pixels(images: Tensor) -> Tensor:
    """[N, C, H, W] in [-1, 1] to uint8, rounded."""
    return StandardRGBEncoder().decode(images)


def inpainting_task(unknown: Tensor) -> Task:
    """`unknown`: boolean [H, W]."""

    def prepare(images, latents):
        where = unknown.to(images.device)
        return Prepared(
            images.masked_fill(where, GRAY),
            latents,
            dict(edit=inpainting(to_signed(images), where)),
            to_pixels,
        )

    return prepare


def colorization_task(images: Tensor, latents: Tensor) -> Prepared:
    gray = gray_pixels(images)
    return Prepared(
        gray, latents, dict(edit=colorization(to_signed(gray))), lambda x: to_pixels(contract_colors(x))
    )


def superresolution_task(factor: int, resolution: int) -> Task:
    """From images of `resolution`, which are averaged, or of a `factor`-th of it."""

    def prepare(images, latents):
        small = to_signed(images)
        small = block_mean(small, factor) if images.shape[-1] == resolution else small
        return Prepared(
            to_pixels(small),
            latents,
            dict(edit=superresolution(small, factor)),
            lambda x: round_blocks(x, factor),
        )

    return prepare


def start_task(sigma: float, add_noise: bool) -> Task:
    """Sampling begins at the images, with noise of `sigma` that they have already or that is added."""

    def prepare(images, latents):
        begin = to_signed(images)
        noise = latents.double() * add_noise
        return Prepared(to_pixels(begin + sigma * noise), noise, dict(start=(begin, sigma)), to_pixels)

    return prepare


# ----------------------------------------------------------------------------
# Between latents.


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Spherical interpolation: [N, ...] points at `share` [N] of the angle θ from a [N, ...] to b,
    (sin((1−t)θ) a + sin(tθ) b) / sin θ.

    0 and 1 give a and b themselves, to the last bit. Between latents of equal norm, all have that norm, which
    a straight line does not keep: its middle is shorter by a factor √2 in many dimensions, where two latents
    are at right angles, and a network has seen none so short. Latents in one line are interpolated linearly.
    """
    dims = tuple(range(1, a.ndim))
    norms = torch.linalg.vector_norm(a, dim=dims) * torch.linalg.vector_norm(b, dim=dims)
    angle = ((a * b).sum(dims) / norms).clamp(-1, 1).acos()
    straight = angle.sin() < 1e-6
    divisor = torch.where(straight, 1, angle.sin())
    weights = (
        torch.where(straight, t, (t * angle).sin() / divisor).reshape(-1, *[1] * len(dims))
        for t in (1 - share, share)
    )
    return sum(weight * end for weight, end in zip(weights, (a, b)))
