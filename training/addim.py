"""Adjusted DDIM (Heek et al. 2024, Section 3.2): a DDIM step whose noise is lengthened, for the teacher's hop
(`consistency_ops.teacher_hop`) and for sampling (`solvers.addim`)."""

from __future__ import annotations

import torch
from torch import Tensor

from training.grids import expand_like, noise_level


def addim_hop(x_t: Tensor, denoised: Tensor, sigma_t: Tensor, sigma_s: Tensor, v: Tensor) -> Tensor:
    """One step of adjusted DDIM, whose noise is lengthened by what DDIM's smooth prediction lacks.

    x_s = D + sqrt(sigma_s² + (1 − sigma_s / sigma_t)² v / |e|²) e with e = (x_t − D) / sigma_t and |e| over
    all of an image's values   (Heek et al. 2024, Eq. 14 and Algorithm 3). v = 0 is DDIM, and so is a step to
    sigma_s = 0.

    Args:
        x_t, denoised: [N, ...] state and denoiser output at sigma_t.
        sigma_t, sigma_s: [N] noise levels, sigma_t > sigma_s >= 0.
        v: [N] expected squared distance of the image from D, see `addim_variance`.
    Returns: [N, ...] float64.
    """
    sigma_t, sigma_s, v = (noise_level(s, x_t).expand(len(x_t)) for s in (sigma_t, sigma_s, v))
    denoised = denoised.double()
    noise = (x_t.double() - denoised) / expand_like(sigma_t, x_t)  # [N, ...], about unit variance

    # Without noise there is nothing to lengthen, and nothing to divide by.
    square = noise.flatten(1).square().sum(dim=1).clamp(min=1e-100)
    length = (sigma_s**2 + (1 - sigma_s / sigma_t) ** 2 * v / square).sqrt()
    return denoised + expand_like(torch.where(sigma_s > 0, length, 0), x_t) * noise


def addim_variance(
    denoised: Tensor, sigma_t: Tensor, y: Tensor | None = None, xvar_frac: float = 0.75
) -> Tensor:
    """v of `addim_hop` for images of d values   (Heek et al. 2024, Section 3.2).

    xvar_frac |y − D|² from the clean images y or, without them, 0.1 d / (2 + 1/sigma_t²), a tenth of the
    posterior variance under a Gaussian prior of variance 1/2.

    Args:
        denoised: [N, ...] D at sigma_t [N].
        y: [N, ...]
    Returns: [N] float64.
    """
    if y is not None:
        return xvar_frac * (y.double() - denoised.double()).flatten(1).square().sum(dim=1)
    # Without images: d / (2 + 1/sigma²) is the expected error |y − D|² under that prior.
    sigma_t = noise_level(sigma_t, denoised).expand(len(denoised))
    return 0.1 * denoised[0].numel() / (2 + sigma_t**-2)
