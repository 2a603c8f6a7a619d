"""Augmentation for diffusion training, with the labels that let the network undo it (Karras et al. 2022,
Appendix F.2 and Table 6).

Table 6's transforms, in its order: flips in x and y, isotropic scale, rotation, anisotropic scale,
translation. Each one happens with its own probability; the parameters it took, or zeros, are the image's
augmentation labels, so that sampling with zero labels gives clean images.

Where this differs from EDM's pipeline:
- Only the transforms of EDM's training preset exist; its integer shifts and quarter turns and its color
  transforms do not.
- Beyond its edges an image goes on as its own mirror image, to any distance: no margin depends on the drawn
  parameters, and so nothing waits for the device. (EDM pads by a data-dependent margin that leaves out the
  edge pixel's repetition.)
- The anti-aliasing filter is symmetric, so that flips and quarter turns commute with it; the sym6 wavelet is
  not.
- An image whose geometry stays as it is comes back bit for bit, instead of through the filters.
"""

from __future__ import annotations

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


def _taps(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[4·radius] the whole filter; sums to 2, the samples a pixel. Copied without waiting for the device."""
    taps = torch.tensor(HALF_FILTER[::-1] + HALF_FILTER, dtype=dtype)
    return (taps * 2 / taps.sum()).to(device, non_blocking=True)


def _upsampling_matrix(size: int, like: Tensor) -> Tensor:
    """[2·size, size]: `size` pixels, continued by reflection at their outer edges, to twice the sampling
    rate."""
    taps = _taps(like.device, like.dtype)
    source = torch.arange(-FILTER_RADIUS, size + FILTER_RADIUS, device=like.device)
    offset = torch.arange(2 * size, device=like.device)[:, None] - 2 * source[None, :] + 2 * FILTER_RADIUS - 1
    inside = (offset >= 0) & (offset < len(taps))
    weights = torch.where(inside, taps[offset.clamp(0, len(taps) - 1)], 0)
    period = source.remainder(2 * size)
    mirrored = torch.minimum(period, 2 * size - 1 - period)
    return weights @ (mirrored[:, None] == torch.arange(size, device=like.device)).to(like.dtype)


def _downsampling_matrix(size: int, like: Tensor) -> Tensor:
    """[size, 2·size + 4·radius − 2]: samples at twice the rate, with those that the filter needs on either
    side, to `size` pixels."""
    taps = _taps(like.device, like.dtype) / 2
    width = 2 * size + len(taps) - 2
    offset = (
        torch.arange(width, device=like.device)[None, :] - 2 * torch.arange(size, device=like.device)[:, None]
    )
    inside = (offset >= 0) & (offset < len(taps))
    return torch.where(inside, taps[offset.clamp(0, len(taps) - 1)], 0)


def warp(images: Tensor, inverse: Tensor) -> Tensor:
    """Images under an affine map, resampled through twice the sampling rate: a pixel p of the result shows
    the source at inverse · p.

    Args:
        images: [N, C, H, W] floating point; mirrored at the edges without end.
        inverse: [N, 3, 3] homogeneous matrices in pixels, x to the right, y down, origin at the image's
            center.
    Returns: [N, C, H, W].
    """
    height, width = images.shape[2:]
    fine = _upsampling_matrix(height, images) @ images @ _upsampling_matrix(width, images).T
    down_y, down_x = _downsampling_matrix(height, images), _downsampling_matrix(width, images)
    centered = lambda count: (
        (torch.arange(count, device=images.device, dtype=images.dtype) + 0.5 - count / 2) / 2
    )
    y, x = torch.meshgrid(centered(down_y.shape[1]), centered(down_x.shape[1]), indexing='ij')
    points = torch.stack([x, y, torch.ones_like(x)], dim=-1).flatten(0, 1)  # [H'·W', 3]
    source = (points @ inverse[:, :2].mT).unflatten(1, x.shape)  # [N, H', W', 2]
    scale = torch.stack(
        [x.new_full((), 2 / width), x.new_full((), 2 / height)]
    )  # grid_sample's edges are at ±1
    sampled = grid_sample(
        fine, source * scale, mode='bilinear', padding_mode='reflection', align_corners=False
    )
    return down_y @ sampled @ down_x.T


# ----------------------------------------------------------------------------
# Parameters and matrices.


class Parameters(NamedTuple):
    """What was drawn for each image, in Table 6's terms; zero where a transform does not happen."""

    xflip: Tensor  # [N] a0, 0 or 1
    yflip: Tensor  # [N] a1, 0 or 1
    scale: Tensor  # [N] a2: factor 2^(scale_std · a2)
    angle: Tensor  # [N] a3: radians, counter-clockwise
    aniso_angle: Tensor  # [N] a4: radians, direction of the stretch
    aniso: Tensor  # [N] a5: factor 2^(aniso_std · a5) along it, the inverse across
    shift: Tensor  # [N, 2] a6, a7: in units of translate_frac_std · (width, height), right and down


def _matrix(rows: list[list[Tensor | float]], like: Tensor) -> Tensor:
    """[N, 3, 3] of rows whose entries are [N] tensors or numbers."""
    return torch.stack(
        [torch.stack([torch.zeros_like(like) + entry for entry in row], dim=-1) for row in rows], dim=-2
    )


def _rotation(angle: Tensor) -> Tensor:
    c, s = angle.cos(), angle.sin()
    return _matrix([[c, -s, 0], [s, c, 0], [0, 0, 1]], angle)


def _scaling(x: Tensor, y: Tensor) -> Tensor:
    return _matrix([[x, 0, 0], [0, y, 0], [0, 0, 1]], x)


def _translation(x: Tensor, y: Tensor) -> Tensor:
    return _matrix([[1, 0, x], [0, 1, y], [0, 0, 1]], x)


class AugmentPipe:
    """EDM's augmentation: `images, labels = pipe(images)`.

    A transform happens with probability min(p · multiplier, 1); a multiplier of 0 leaves it out, its labels
    included. Defaults are EDM's preset.

    Args:
        p: common factor of all probabilities; 0 switches everything off (zero labels).
        xflip, yflip, scale, rotate_frac, aniso, translate_frac: multipliers. xflip = 1e8: always, and half of
            the images are then mirrored.
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
        """Random parameters for a batch. Every transform consumes its random numbers, whether it is on or
        off."""
        count = len(images)
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
        """[N, augment_dim] float32: the parameters as the network sees them, transforms that are off left
        out."""
        columns = dict(
            xflip=[a.xflip],
            yflip=[a.yflip],
            scale=[a.scale],
            rotate_frac=[a.angle.cos() - 1, a.angle.sin()],
            aniso=[a.aniso * a.aniso_angle.cos(), a.aniso * a.aniso_angle.sin()],
            translate_frac=[a.shift[:, 0], a.shift[:, 1]],
        )
        used = [column for name in LABEL_SIZES if self.multipliers[name] > 0 for column in columns[name]]
        return torch.stack(used, dim=1).float() if used else a.xflip.new_zeros(len(a.xflip), 0).float()

    def inverse_matrix(self, a: Parameters, height: int, width: int) -> Tensor:
        """[N, 3, 3] map from a pixel of the augmented image to the (flipped) source: the inverses of Table
        6's matrices, first to last."""
        shrink, squeeze = (-a.scale * self.scale_std).exp2(), (-a.aniso * self.aniso_std).exp2()
        shift_x, shift_y = (
            a.shift[:, 0] * (width * self.translate_frac_std),
            a.shift[:, 1] * (height * self.translate_frac_std),
        )
        direction = torch.where(
            a.aniso == 0, 0, a.aniso_angle
        )  # no stretch, no direction: the product is then exactly the identity
        unscale = _scaling(shrink, shrink)
        unrotate = _rotation(a.angle)  # y points down: a positive angle here undoes a counter-clockwise turn
        unstretch = _rotation(-direction) @ _scaling(squeeze, 1 / squeeze) @ _rotation(direction)
        return unscale @ unrotate @ unstretch @ _translation(-shift_x, -shift_y)

    def transform(self, images: Tensor, a: Parameters) -> Tensor:
        """[N, C, H, W] images under the given parameters: flips move pixels, the rest resamples."""
        pick = lambda mask: mask[:, None, None, None]
        images = torch.where(pick(a.xflip == 1), images.flip(3), images)
        images = torch.where(pick(a.yflip == 1), images.flip(2), images)
        if not any(
            self.multipliers[name] > 0 for name in ('scale', 'rotate_frac', 'aniso', 'translate_frac')
        ):
            return images
        inverse = self.inverse_matrix(a, *images.shape[2:])
        unmoved = (inverse == torch.eye(3, device=inverse.device, dtype=inverse.dtype)).flatten(1).all(dim=1)
        return torch.where(pick(unmoved), images, warp(images, inverse))
