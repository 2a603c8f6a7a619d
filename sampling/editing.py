"""Zero-shot editing: the known component of an image replaces the network's (Song et al. 2023, Section 6).

A linear map A gives the known component: pixels outside a mask, the luma of each pixel, or the mean of each
block of p×p pixels. An edit moves D to the nearest image with the right component,

    D' = D + A⁺(A·y − A·D),   A⁺ the pseudo-inverse of A,

which is Song et al.'s Algorithm 4 without its orthogonal matrices, which only complete A's rows to a basis
and change coordinates back and forth. `samplers.sample(..., edit=...)` applies an edit after every
evaluation. Images are [N, C, H, W], in [-1, 1].

The conversions to 8 bits below keep the known component.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from training.networks.encoders import StandardRGBEncoder
from training.samplers import Edit

# Rec. 601's 0.299, 0.587, 0.114 in the 16-bit fixed point of Pillow's convert('L').
LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)
GRAY = 128  # of unknown pixels in the grid
ROOM = 1e-12  # least divisor: distance to the end of the range

# ----------------------------------------------------------------------------
# Edits.


def inpainting(image: Tensor, unknown: Tensor) -> Edit:
    """Keep `image` [N, C, H, W] bit for bit except where `unknown`, boolean and broadcastable, is true."""
    return lambda denoised: torch.where(unknown, denoised, image.to(denoised.dtype))


def colorization(gray: Tensor) -> Edit:
    """Give RGB images the luma `gray` [N, 1, H, W]; the two directions of color orthogonal to it are D's."""

    def edit(denoised):
        weights = _luma_weights(denoised)
        return denoised + weights / weights.square().sum() * (gray - luma(denoised))

    return edit


def superresolution(small: Tensor, factor: int) -> Edit:
    """Give blocks of factor × factor pixels the means `small` [N, C, H / factor, W / factor].

    Differences within a block are D's.
    """
    return lambda denoised: denoised + repeat(small - block_mean(denoised, factor), factor)


def luma(images: Tensor) -> Tensor:
    """[N, 3, H, W] to [N, 1, H, W], weighted as in `LUMA`."""
    return (images * _luma_weights(images)).sum(1, keepdim=True)


def _luma_weights(like: Tensor) -> Tensor:
    return torch.tensor(LUMA, dtype=like.dtype, device=like.device).reshape(3, 1, 1)


def block_mean(images: Tensor, factor: int) -> Tensor:
    """Means of blocks of factor × factor pixels: [N, C, H, W] to [N, C, H / factor, W / factor].

    Raises: ValueError if the factor does not divide the sides.
    """
    return to_blocks(images, factor).mean(-1)


def repeat(images: Tensor, factor: int) -> Tensor:
    """Each pixel as a block of factor × factor: the pseudo-inverse of `block_mean`."""
    return images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def to_blocks(images: Tensor, factor: int) -> Tensor:
    """[N, C, H, W] to [N, C, H / factor, W / factor, factor²].

    Raises: ValueError if the factor does not divide the sides.
    """
    n, c, h, w = images.shape
    if h % factor or w % factor:
        raise ValueError(f'{w}x{h} pixels do not divide into blocks of {factor}x{factor}')
    # [N, C, h, p, w, p] to [N, C, h, w, p²].
    return images.reshape(n, c, h // factor, factor, w // factor, factor).transpose(3, 4).flatten(4)


def from_blocks(blocks: Tensor, factor: int) -> Tensor:
    """Inverse of `to_blocks`."""
    n, c, h, w, _ = blocks.shape
    return blocks.unflatten(4, (factor, factor)).transpose(3, 4).reshape(n, c, h * factor, w * factor)


# ----------------------------------------------------------------------------
# Into 8 bits. With the right component D may leave [-1, 1]: a block's bright side with a raised mean, say.


def contract(values: Tensor, center: Tensor, dim: int) -> Tensor:
    """Shrink values along `dim` toward `center` by one factor, as far as needed to be in [-1, 1].

    `center` is in [-1, 1]. If it is a weighted mean of the values, that mean stays.
    """
    offset = values - center
    # Distance from the center to the end of the range in each value's direction.
    room = (1 - center * offset.sign()).clamp(min=ROOM)
    return center + offset / (offset.abs() / room).amax(dim, keepdim=True).clamp(min=1)


def contract_colors(images: Tensor) -> Tensor:
    """RGB images [N, 3, H, W] in [-1, 1]: colors outside become paler, with the same luma if it is inside."""
    return contract(images, luma(images).clamp(-1, 1), 1)


def round_blocks(images: Tensor, factor: int) -> Tensor:
    """To uint8 without changing the blocks' sums, which must be integers in gray levels.

    For averages of uint8 images they are. Inside [-1, 1], no value moves by a full gray level.
    """
    # Shrink values outside of the range toward their block's mean.
    blocks = to_blocks(images.double(), factor)
    levels = (contract(blocks, blocks.mean(-1, keepdim=True).clamp(-1, 1), -1) + 1) * 127.5

    # Round down, but the largest remainders up, as many as the sum lacks.
    lower = levels.floor()
    lacking = (levels - lower).sum(-1, keepdim=True).round()
    # The rank of each remainder within its block, the largest first; ties go by position.
    rank = (lower - levels).argsort(dim=-1, stable=True).argsort(dim=-1)
    return from_blocks(lower + (rank < lacking), factor).to(torch.uint8)


def gray_pixels(images: Tensor) -> Tensor:
    """Luma of uint8 images [N, 1 or 3, H, W], rounded as by Pillow's convert('L').

    Returns: uint8 [N, 1, H, W].
    """
    if images.shape[1] == 1:
        return images
    # Integer arithmetic with rounding, exactly as in Pillow.
    weights = torch.tensor(LUMA, dtype=torch.float64, device=images.device).reshape(3, 1, 1) * 65536
    weights = weights.to(torch.int64)
    return ((images * weights).sum(1, keepdim=True) + 32768).div(65536, rounding_mode='floor').to(torch.uint8)


# ----------------------------------------------------------------------------
# Tasks: an edit, what sampling starts from, and the conversion of results to 8 bits.


class Prepared(NamedTuple):
    """A batch for the sampler.

    Attributes:
        known: known component of the images, for the grid: uint8 [N, C, H, W].
        latents: [N, C, H, W].
        options: of `samplers.sample`: an edit, or a start.
        to_pixels: conversion of the sampler's output to uint8.
    """

    known: Tensor
    latents: Tensor
    options: dict
    to_pixels: Callable[[Tensor], Tensor]


Task = Callable[['Tensor', 'Tensor'], Prepared]  # function of images, uint8 [N, C, H, W], and latents


def to_signed(images: Tensor) -> Tensor:
    """uint8 to [-1, 1], in float64, so that what is known stays exact."""
    return images.double() / 127.5 - 1


def to_pixels(images: Tensor) -> Tensor:
    """[N, C, H, W] in [-1, 1] to uint8, rounded."""
    return StandardRGBEncoder().decode(images)


def inpainting_task(unknown: Tensor) -> Task:
    """`unknown`: boolean [H, W]."""

    def prepare(images, latents):
        where = unknown.to(images.device)
        # An edit in float64 keeps known pixels to the bit.
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
    """For images of `resolution`, which are averaged first, or of a `factor`-th of it."""

    def prepare(images, latents):
        small = to_signed(images)
        # Of an image at full size, only the averages are known.
        small = block_mean(small, factor) if images.shape[-1] == resolution else small
        return Prepared(
            to_pixels(small),
            latents,
            dict(edit=superresolution(small, factor)),
            lambda x: round_blocks(x, factor),
        )

    return prepare


def start_task(sigma: float, add_noise: bool) -> Task:
    """Start sampling from the images, which have noise of level `sigma` already, or get it by `add_noise`."""

    def prepare(images, latents):
        begin = to_signed(images)
        noise = latents.double() * add_noise
        return Prepared(to_pixels(begin + sigma * noise), noise, dict(start=(begin, sigma)), to_pixels)

    return prepare


# ----------------------------------------------------------------------------
# Between latents.


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Spherical interpolation, (sin((1−t)θ) a + sin(tθ) b) / sin θ, for the angle θ between a and b.

    Shares 0 and 1 give a and b bit for bit. Between latents of equal norm, all points have that norm. A
    straight line's middle would be shorter by √2 in many dimensions, where two latents are at right angles,
    and networks are not trained on such latents.

    Args:
        a, b: [N, ...]. share: t, [N].
    """
    # Latents in one line are interpolated linearly: sin θ is 0.
    dims = tuple(range(1, a.ndim))
    norms = torch.linalg.vector_norm(a, dim=dims) * torch.linalg.vector_norm(b, dim=dims)
    # Rounding may carry the cosine past 1.
    angle = ((a * b).sum(dims) / norms).clamp(-1, 1).acos()
    straight = angle.sin() < 1e-6
    divisor = torch.where(straight, 1, angle.sin())
    weights = (
        torch.where(straight, t, (t * angle).sin() / divisor).reshape(-1, *[1] * len(dims))
        for t in (1 - share, share)
    )
    return sum(weight * end for weight, end in zip(weights, (a, b)))
