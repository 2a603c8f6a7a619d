"""Augmentation for diffusion training, with the labels that let the network undo it (Karras et al. 2022,
Appendix F.2 and Table 6).

Table 6's transforms, in its order: flips in x and y, isotropic scale, rotation, anisotropic scale,
translation. Each one happens with its own probability; the parameters it took, or zeros, are the image's
augmentation labels, so that sampling with zero labels gives clean images.

Where this differs from EDM's pipeline:
- Only the transforms of EDM's training preset exist; its integer shifts and quarter turns and its color
  transforms do not.
- An image continues beyond its edges as its own mirror image, to any distance. No margin depends on the drawn
  parameters, so nothing synchronizes with the device. (EDM pads by a data-dependent margin without repeating
  the edge pixel.)
- The anti-aliasing filter is symmetric, so that flips and quarter turns commute with it; the sym6 wavelet is
  not.
- An image whose geometry does not change is returned bit for bit, not passed through the filters.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

# One half of the symmetric anti-aliasing filter, at 1/4, 3/4, 5/4, ... pixels from its center. A
# least-squares design of our own: up to twice the sampling rate and down again is the identity within 1e-4
# (autocorrelation 1, 0, 0, ... at whole pixels, which no symmetric filter but Haar's attains exactly), with
# the least energy from 0.75 to 1 cycles a pixel, where upsampling leaves images of the spectrum.
HALF_FILTER = (0.9686003, 0.1772385, -0.1703621, -0.0031990, 0.0361462, -0.0082490, 0.0013851, -0.0015662)
FILTER_RADIUS = len(HALF_FILTER) // 2  # pixels
LABEL_SIZES = dict(xflip=1, yflip=1, scale=1, rotate_frac=2, aniso=2, translate_frac=2)

# ----------------------------------------------------------------------------
# Resampling.


@functools.cache  # a copy to the device may wait for it
def _taps(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[4·radius] the filter; sums to 2, the samples per pixel."""
    taps = torch.tensor(HALF_FILTER[::-1] + HALF_FILTER, dtype=dtype)
    return (taps * 2 / taps.sum()).to(device)


def _upsampling_matrix(size: int, like: Tensor) -> Tensor:
    """[2·size, size] matrix from `size` pixels, continued by reflection at their outer edges, to twice the
    sampling rate."""
    # Weight of each source pixel, within the filter's radius beyond the edges, in each sample.
    taps = _taps(like.device, like.dtype)
    source = torch.arange(-FILTER_RADIUS, size + FILTER_RADIUS, device=like.device)
    # [2·size, size + 2·radius] index of the tap by which a source pixel reaches a sample.
    offset = torch.arange(2 * size, device=like.device)[:, None] - 2 * source[None, :] + 2 * FILTER_RADIUS - 1
    inside = (offset >= 0) & (offset < len(taps))
    weights = torch.where(inside, taps[offset.clamp(0, len(taps) - 1)], 0)

    # Pixels beyond the edges are mirrored ones.
    # Coordinates repeat with a period of an image and its mirror image.
    period = source.remainder(2 * size)
    mirrored = torch.minimum(period, 2 * size - 1 - period)
    return weights @ (mirrored[:, None] == torch.arange(size, device=like.device)).to(like.dtype)


def _downsampling_matrix(size: int, like: Tensor) -> Tensor:
    """[size, 2·size + 4·radius − 2] matrix from samples at twice the rate, with those that the filter needs
    on either side, to `size` pixels."""
    # Twice as many samples as pixels: taps that sum to 2 would double the values.
    taps = _taps(like.device, like.dtype) / 2
    width = 2 * size + len(taps) - 2
    pixel, sample = torch.arange(size, device=like.device), torch.arange(width, device=like.device)
    # [size, width] index of the tap that carries a sample to a pixel.
    offset = sample[None, :] - 2 * pixel[:, None]
    inside = (offset >= 0) & (offset < len(taps))
    return torch.where(inside, taps[offset.clamp(0, len(taps) - 1)], 0)


def warp(images: Tensor, inverse: Tensor) -> Tensor:
    """Images under an affine map: a pixel p of the result shows the source at inverse · p.

    The result is interpolated at twice the sampling rate, then filtered down.

    Args:
        images: [N, C, H, W] floating point; mirrored repeatedly beyond the edges.
        inverse: [N, 3, 3] homogeneous matrices in pixels, x to the right, y down, origin at the image's
            center.
    Returns: [N, C, H, W].
    """
    # Twice the sampling rate.
    height, width = images.shape[2:]
    fine = _upsampling_matrix(height, images) @ images @ _upsampling_matrix(width, images).T
    down_y, down_x = _downsampling_matrix(height, images), _downsampling_matrix(width, images)

    # Where each sample of the result, in pixels from the center, lies in the source.
    along = lambda count: torch.arange(count, device=images.device, dtype=images.dtype)
    # Samples are half a pixel apart, and centered.
    centered = lambda count: (along(count) + 0.5 - count / 2) / 2
    y, x = torch.meshgrid(centered(down_y.shape[1]), centered(down_x.shape[1]), indexing='ij')
    points = torch.stack([x, y, torch.ones_like(x)], dim=-1).flatten(0, 1)  # [H'·W', 3]
    source = (points @ inverse[:, :2].mT).unflatten(1, x.shape)  # [N, H', W', 2]

    # `grid_sample` has edges at ±1. The scale is filled on the device, because a copy would synchronize.
    scale = torch.stack([x.new_full((), 2 / width), x.new_full((), 2 / height)])
    options = dict(mode='bilinear', padding_mode='reflection', align_corners=False)
    # [N, C, H', W'] at twice the rate, then down to [N, C, H, W].
    sampled = grid_sample(fine, source * scale, **options)
    return down_y @ sampled @ down_x.T


# ----------------------------------------------------------------------------
# Parameters and matrices.


class Parameters(NamedTuple):
    """What was drawn for each image, in the terms of Table 6; zero where a transform is not applied."""

    xflip: Tensor  # [N] a0, 0 or 1
    yflip: Tensor  # [N] a1, 0 or 1
    scale: Tensor  # [N] a2: factor 2^(scale_std · a2)
    angle: Tensor  # [N] a3: radians, counter-clockwise
    aniso_angle: Tensor  # [N] a4: radians, direction of the stretch
    aniso: Tensor  # [N] a5: factor 2^(aniso_std · a5) along it, the inverse across
    shift: Tensor  # [N, 2] a6, a7: in units of translate_frac_std · (width, height), right and down


def _matrix(rows: list[list[Tensor | float]], like: Tensor) -> Tensor:
    """[N, 3, 3] from rows whose entries are [N] tensors or numbers."""
    entries = [torch.stack([torch.zeros_like(like) + entry for entry in row], dim=-1) for row in rows]
    return torch.stack(entries, dim=-2)


def _rotation(angle: Tensor) -> Tensor:
    c, s = angle.cos(), angle.sin()
    return _matrix([[c, -s, 0], [s, c, 0], [0, 0, 1]], angle)


def _scaling(x: Tensor, y: Tensor) -> Tensor:
    return _matrix([[x, 0, 0], [0, y, 0], [0, 0, 1]], x)


def _translation(x: Tensor, y: Tensor) -> Tensor:
    return _matrix([[1, 0, x], [0, 1, y], [0, 0, 1]], x)


class AugmentPipe:
    """EDM's augmentation: `images, labels = pipe(images)`.

    A transform is applied with probability min(p · multiplier, 1); a multiplier of 0 removes it and its
    labels. Defaults are EDM's preset.

    Args:
        p: common factor of all probabilities; 0 disables all transforms (zero labels).
        xflip, yflip, scale, rotate_frac, aniso, translate_frac: multipliers. With xflip = 1e8 a flip is
            always drawn, which mirrors half of the images.
        scale_std, aniso_std: standard deviation of log2 of the factor.
        rotate_frac_max: largest angle in units of π.
        aniso_rotate_prob: probability that a stretch has a random direction rather than along x.
        translate_frac_std: standard deviation of the shift in units of the image's side.
    Attributes:
        augment_dim: length of the labels (9 for the preset): a0; a1; a2; cos a3 − 1, sin a3; a5 cos a4, a5
            sin a4; a6, a7.
    """

    def __init__(
        self,
        p: float = 0.12,
        xflip: float = 1e8,
        yflip: float = 1,
        scale: float = 1,
        rotate_frac: float = 1,
        aniso: float = 1,
        translate_frac: float = 1,
        scale_std: float = 0.2,
        rotate_frac_max: float = 1,
        aniso_std: float = 0.2,
        aniso_rotate_prob: float = 0.5,
        translate_frac_std: float = 0.125,
    ):
        self.p = p
        self.multipliers = dict(
            xflip=xflip,
            yflip=yflip,
            scale=scale,
            rotate_frac=rotate_frac,
            aniso=aniso,
            translate_frac=translate_frac,
        )
        self.scale_std, self.aniso_std, self.translate_frac_std = scale_std, aniso_std, translate_frac_std
        self.rotate_frac_max, self.aniso_rotate_prob = rotate_frac_max, aniso_rotate_prob
        self.augment_dim = sum(size for name, size in LABEL_SIZES.items() if self.multipliers[name] > 0)

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Augmented images and their labels.

        Args:
            images: [N, C, H, W] floating point.
            generator: on the device of the images; all randomness comes from it.
        Returns: ([N, C, H, W], [N, augment_dim] float32).
        """
        parameters = self.draw(images, generator)
        return self.transform(images, parameters), self.labels(parameters)

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> Parameters:
        """Random parameters for a batch. Every transform consumes its random numbers, enabled or not."""
        count = len(images)

        # Draws of [N] on the device, so that nothing synchronizes.
        like = dict(device=images.device, dtype=images.dtype, generator=generator)
        happens = lambda name: torch.rand(count, **like) < self.multipliers[name] * self.p
        coin = lambda: (torch.rand(count, **like) < 0.5).to(images.dtype)
        angle = lambda: (torch.rand(count, **like) * 2 - 1) * math.pi
        normal = lambda *shape: torch.randn(count, *shape, **like)
        return Parameters(
            xflip=torch.where(happens('xflip'), coin(), 0),
            yflip=torch.where(happens('yflip'), coin(), 0),
            scale=torch.where(happens('scale'), normal(), 0),
            angle=torch.where(happens('rotate_frac'), angle() * self.rotate_frac_max, 0),
            aniso_angle=torch.where(torch.rand(count, **like) < self.aniso_rotate_prob, angle(), 0),
            aniso=torch.where(happens('aniso'), normal(), 0),
            shift=torch.where(happens('translate_frac')[:, None], normal(2), 0),
        )

    def labels(self, a: Parameters) -> Tensor:
        """[N, augment_dim] float32: the parameters as the network sees them, without disabled transforms."""
        columns = dict(
            xflip=[a.xflip],
            yflip=[a.yflip],
            scale=[a.scale],
            rotate_frac=[a.angle.cos() - 1, a.angle.sin()],
            aniso=[a.aniso * a.aniso_angle.cos(), a.aniso * a.aniso_angle.sin()],
            translate_frac=[a.shift[:, 0], a.shift[:, 1]],
        )
        # Disabled transforms have no columns.
        used = [column for name in LABEL_SIZES if self.multipliers[name] > 0 for column in columns[name]]
        return torch.stack(used, dim=1).float() if used else a.xflip.new_zeros(len(a.xflip), 0).float()

    def inverse_matrix(self, a: Parameters, height: int, width: int) -> Tensor:
        """[N, 3, 3] map from a pixel of the augmented image to the (flipped) source: the inverses of the
        matrices of Table 6, first to last."""
        # Factors and shifts in pixels. Without a stretch the direction is 0, which makes the product exactly
        # the identity.
        shrink, squeeze = (-a.scale * self.scale_std).exp2(), (-a.aniso * self.aniso_std).exp2()
        shift_x = a.shift[:, 0] * (width * self.translate_frac_std)
        shift_y = a.shift[:, 1] * (height * self.translate_frac_std)
        direction = torch.where(a.aniso == 0, 0, a.aniso_angle)

        # y points down, so a positive angle here undoes a counter-clockwise rotation.
        unscale = _scaling(shrink, shrink)
        unrotate = _rotation(a.angle)
        unstretch = _rotation(-direction) @ _scaling(squeeze, 1 / squeeze) @ _rotation(direction)
        return unscale @ unrotate @ unstretch @ _translation(-shift_x, -shift_y)

    def transform(self, images: Tensor, a: Parameters) -> Tensor:
        """[N, C, H, W] images under the given parameters: flips move pixels, other transforms resample."""
        # Flips, without resampling.
        per_image = lambda mask: mask[:, None, None, None]
        images = torch.where(per_image(a.xflip == 1), images.flip(3), images)
        images = torch.where(per_image(a.yflip == 1), images.flip(2), images)
        resampling = ('scale', 'rotate_frac', 'aniso', 'translate_frac')
        if not any(self.multipliers[name] > 0 for name in resampling):
            return images

        # An unmoved image is returned as it is, not through the filters.
        inverse = self.inverse_matrix(a, *images.shape[2:])
        unmoved = (inverse == torch.eye(3, device=inverse.device, dtype=inverse.dtype)).flatten(1).all(dim=1)
        return torch.where(per_image(unmoved), images, warp(images, inverse))
