"""The mathematics of continuous-time consistency (Lu & Song 2025): TrigFlow's coordinates, the tangent of a
consistency function, and derivatives of functions along a direction.

Pure functions in FP64, without networks or state. TrigFlow is EDM in other coordinates: with t = atan(sigma /
sigma_d), X = x cos t = cos t y + sin t z for noise z = sigma_d n, and the denoiser is D = cos t X − sigma_d sin t F.
F is minus EDM's network, X / sigma_d is EDM's c_in x. The ODE is dX/dt = sigma_d F.

Along the ODE the times of a step are t and its lower end s, 0 in consistency models: the state at s is cos(t − s) X
− sigma_d sin(t − s) F.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from training.choices import JVPS, check_choice
from training.consistency_ops import expand_like

# Central differences, as a share of the tangent: the error of its square is below FP32's rounding over it.
STEP = 1e-3


# ----------------------------------------------------------------------------
# Coordinates. Times t are [N] float64, images [N, ...].


def time_of(sigma: Tensor, sigma_data: float) -> Tensor:
    """t = atan(sigma / sigma_d), from 0 to pi/2."""
    return (sigma / sigma_data).atan()


def noisy(y: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """X = cos t y + sin t z for images y and noise z of deviation sigma_d   (Lu & Song 2025, Section 3)."""
    t = expand_like(t, y)
    return t.cos() * y + t.sin() * z


def noise_velocity(y: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """dX/dt = cos t z − sin t y along images and noise, whose mean given X is the ODE's."""
    t = expand_like(t, y)
    return t.cos() * z - t.sin() * y


def edm_state(X: Tensor, t: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """(x, sigma) of a denoiser: X / cos t, sigma_d tan t."""
    return X / expand_like(t, X).cos(), sigma_data * t.tan()


def velocity(denoised: Tensor, X: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    """F = (cos t X − D) / (sigma_d sin t), of the D that a network gives at `edm_state`."""
    t = expand_like(t, X)
    return (t.cos() * X - denoised.double()) / (sigma_data * t.sin())


# ----------------------------------------------------------------------------
# The tangent.


def rate(t: Tensor, s: Tensor | float = 0.0) -> Tensor:
    """cos(t − s) sin(t − s), the factor that keeps derivatives by t bounded; [N].

    With s = 0 the derivative by ln sigma is the one by t times this.
    """
    return (t - s).cos() * (t - s).sin()


def tangent(
    X: Tensor,
    F: Tensor,
    dX: Tensor,
    dF: Tensor,
    t: Tensor,
    sigma_data: float,
    warmup: float = 1.0,
    s: Tensor | float = 0.0,
) -> Tensor:
    """g, the derivative of the state at s along the ODE, times cos(t − s).

    g = −cos²(t−s) (sigma_d F − dX/dt) − w (cos(t−s) sin(t−s) X + sigma_d dF)   (Lu & Song 2025, Algorithm 1, with
    the prior weight 1/sigma inside). 0 for the exact consistency function and w = 1.

    Args:
        F, dF: [N, ...] network at (X, t), and its derivative by t along dX/dt times `rate`.
        dX: [N, ...] dX/dt.
        warmup: w, in [0, 1]: without its second term g is the step of diffusion training or distillation.
        s: lower end of the step, [N] or 0.
    Returns: [N, ...] float64.
    """
    cos = expand_like(t - s, X).cos()
    return -(cos**2) * (sigma_data * F - dX) - warmup * (expand_like(rate(t, s), X) * X + sigma_data * dF)


def normalized(g: Tensor, c: float) -> Tensor:
    """g / (|g| + c) with |g| over all of an image's values   (Lu & Song 2025, Section 4.2, "tangent
    normalization")."""
    return g / (norms(g) + c).reshape(-1, *[1] * (g.ndim - 1))


def norms(g: Tensor) -> Tensor:
    """[N] |g| over all of an image's values."""
    return torch.linalg.vector_norm(g.flatten(1), dim=1)


# ----------------------------------------------------------------------------
# Derivatives.


def derivative(
    function: Callable[..., Tensor],
    at: Sequence[Tensor],
    along: Sequence[Tensor],
    mode: str,
    step: float = STEP,
) -> tuple[Tensor, Tensor]:
    """(value, directional derivative) of a function, without gradients.

    `forward`: in forward mode. A network must be called by `forward` itself, because compiled code has no forward
    mode; attention runs by its formula, because fused kernels have none either. `difference`: (f(at + h along) −
    f(at − h along)) / 2h, and half of the sum for the value, both to order h².

    Raises: ValueError for another mode.
    """
    check_choice('jvp', mode, JVPS)
    if mode == 'forward':
        with torch.no_grad(), attention_by_formula():
            return torch.func.jvp(function, tuple(at), tuple(along))
    with torch.no_grad():
        after, before = (
            function(*(x + side * step * dx for x, dx in zip(at, along, strict=True))) for side in (1, -1)
        )
        return (after + before) / 2, (after - before) / (2 * step)


def attention_by_formula() -> contextlib.AbstractContextManager:
    """A context in which attention has a derivative in forward mode."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)
