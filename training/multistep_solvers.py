"""Multistep solvers of the probability-flow ODE, one evaluation per step: a step reuses the last ones'.

Each is `solver(denoiser, x, sigmas, order, ...) -> x`, as in training/solvers.py. The first steps have the
order that the evaluations so far allow. All coefficients are Python numbers that depend on the levels only,
so a step launches a few operations on the state and waits for nothing.

Two families. With the slope d_i = (x_i − D_i) / sigma_i, linear multistep (Adams-Bashforth) methods
extrapolate d: `ipndm`, `ipndm_v`, `deis`. In lambda = −ln sigma, exponential integrators extrapolate D: `dpmpp`, `unipc`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from training.ode_time import vp_betas

if TYPE_CHECKING:
    from training.solvers import Denoiser

QUADRATURE_NODES = 128  # for errors below 1e-12 from 1e-6 to 1e6 in a single step

# ----------------------------------------------------------------------------
# Linear multistep methods.

# Weights of the last slopes, newest first, for equal steps.
ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def ipndm(denoiser: Denoiser, x: Tensor, sigmas: Sequence[float], order: int = 4) -> Tensor:
    """x <- x + (sigma' − sigma) sum_k w_k d_{i−k}, with the weights of equal steps   (the linear multistep
    part of PNDM, Liu et al. 2022, Section 3.3, without its Runge-Kutta start: iPNDM of Zhang & Chen 2023,
    Appendix).

    Args: as of `solvers.euler`; order: 1 to 4.
    """
    weights = [
        [(end - start) * w for w in ADAMS_BASHFORTH[min(order, i + 1)]]
        for i, (start, end) in enumerate(itertools.pairwise(sigmas))
    ]
    return linear_multistep(denoiser, x, sigmas, weights)


def ipndm_v(denoiser: Denoiser, x: Tensor, sigmas: Sequence[float], order: int = 4) -> Tensor:
    """`ipndm` for unequal steps: the weights integrate the polynomial in sigma through the last slopes
    exactly.

    w_k = ∫ l_k(sigma) dsigma over the step, l_k the Lagrange basis at the last levels   (variable-step
    Adams-Bashforth methods). Equals `ipndm` where the steps are equal.

    Args: as of `ipndm`.
    """
    return linear_multistep(denoiser, x, sigmas, polynomial_weights(tuple(sigmas), order))


def deis(denoiser: Denoiser, x: Tensor, sigmas: Sequence[float], order: int = 4) -> Tensor:
    """Slopes extrapolated by a polynomial in the time of the variance-preserving process   (tAB-DEIS: Zhang &
    Chen 2023, Eq. 14 and 15).

    w_k = ∫ l_k(t) (dsigma/dt) dt over the step, with t(sigma) of the linear process that spans the levels
    (training/ode_time.py), by quadrature. The paper's tAB3 is order 4.

    Args: as of `ipndm`.
    """
    return linear_multistep(denoiser, x, sigmas, vp_time_weights(tuple(sigmas), order))


def linear_multistep(
    denoiser: Denoiser, x: Tensor, sigmas: Sequence[float], weights: Sequence[Sequence[float]]
) -> Tensor:
    """x <- x + sum_k w_k d_{i−k}.

    Args:
        weights: of each step, one per slope, newest first; at most 4.
    """
    slopes: list[Tensor] = []  # newest first
    for sigma, step_weights in zip(sigmas, weights):
        # As many as the highest order uses; the number of weights says how many take part.
        slopes = [(x - denoiser(x, sigma)) / sigma, *slopes[:3]]
        for weight, slope in zip(step_weights, slopes):
            x = x + weight * slope
    return x


# Cached, because every batch has the same levels.
@functools.lru_cache(maxsize=16)
def polynomial_weights(sigmas: tuple[float, ...], order: int) -> list[list[float]]:
    """∫ l_k dsigma over each step. Two Gauss nodes integrate cubic polynomials, the highest here, exactly."""
    return [
        lagrange_weights(sigmas, i, order, lambda sigma: sigma, *gauss_legendre(sigmas[i], sigmas[i + 1], 2))
        for i in range(len(sigmas) - 1)
    ]


@functools.lru_cache(maxsize=16)
def vp_time_weights(sigmas: tuple[float, ...], order: int) -> list[list[float]]:
    """∫ l_k(t(sigma)) dsigma over each step, to about 1e-12 of its length."""
    beta_d, beta_min = vp_betas(sigmas[-1], sigmas[0])

    def time(sigma):
        """`vp_time(beta_d, beta_min).time` of an array."""
        square = beta_min**2 + 2 * beta_d * np.log1p(np.square(sigma))
        return (np.sqrt(np.maximum(square, 0)) - beta_min) / beta_d

    # t is a smooth function of u in sigma = scale sinh u, which is linear near 0 and logarithmic above
    # `scale`, where t(sigma) bends. In sigma itself, a step from 80 to 0.002 would need thousands of nodes.
    scale = abs(beta_min) / math.sqrt(2 * abs(beta_d))
    found = []
    for i, (start, end) in enumerate(itertools.pairwise(sigmas)):
        u, du = gauss_legendre(math.asinh(start / scale), math.asinh(end / scale), QUADRATURE_NODES)
        nodes, dsigma = scale * np.sinh(u), scale * np.cosh(u) * du
        found.append(lagrange_weights(sigmas, i, order, time, nodes, dsigma))
    return found


@functools.lru_cache(maxsize=4)
def legendre(n: int) -> tuple[np.ndarray, np.ndarray]:
    """[n] nodes and weights of Gauss-Legendre quadrature on [-1, 1]."""
    return np.polynomial.legendre.leggauss(n)


def gauss_legendre(start: float, end: float, n: int) -> tuple[np.ndarray, np.ndarray]:
    """[n] nodes and [n] weights of an integral from start to end, exact for polynomials of degree 2n − 1."""
    nodes, weights = legendre(n)
    return (start + end) / 2 + (end - start) / 2 * nodes, (end - start) / 2 * weights


def lagrange_weights(
    sigmas: Sequence[float],
    i: int,
    order: int,
    time: Callable[[np.ndarray], np.ndarray],
    nodes: np.ndarray,
    node_weights: np.ndarray,
) -> list[float]:
    """Integrals of the Lagrange basis in `time` at the last levels up to sigmas[i], newest first, by a
    quadrature.

    Args:
        nodes, node_weights: [n] levels within the step, and their weights.
    """
    # The first steps know fewer levels than `order`.
    known, at = time(np.array(sigmas[max(i + 1 - order, 0) : i + 1]))[::-1], time(nodes)
    weights = []
    for k, own in enumerate(known):
        others = [other for j, other in enumerate(known) if j != k]
        basis = np.prod([(at - other) / (own - other) for other in others], axis=0)
        weights.append(float((node_weights * basis).sum()))
    return weights


# ----------------------------------------------------------------------------
# Exponential integrators in lambda = −ln sigma, on the denoised image.


def dpmpp(denoiser: Denoiser, x: Tensor, sigmas: Sequence[float], order: int = 3) -> Tensor:
    """DPM-Solver++(2M) and (3M): D extrapolated in lambda from the last ones   (Lu et al. 2022b, Proposition 4.1
    and Algorithm 2; 3M, of the authors' code, has one more divided difference).

    x' = (sigma'/sigma) x + (1 − e^{−h}) D + ..., h = lambda' − lambda. The last steps have lower orders:
    min(order, i + 1, steps left). So a step to 0 gives D.

    As in that code, the second difference has half of the weight of the exact integral, so that a step of 3M
    has the local error of 2M, h³, with a smaller factor.

    Args: as of `solvers.euler`; order: 2 or 3.
    """
    lambdas, steps = [log_snr(sigma) for sigma in sigmas], len(sigmas) - 1
    outputs: list[Tensor] = []  # newest first
    for i in range(steps):
        outputs = [denoiser(x, sigmas[i]), *outputs[:2]]
        h = lambdas[i + 1] - lambdas[i]
        step_order = min(order, i + 1, steps - i)
        phi_1 = -math.expm1(-h)  # 1 − e^{−h}
        x = sigmas[i + 1] / sigmas[i] * x + phi_1 * outputs[0]

        # Divided differences at sigmas[i]: the first and half the second derivative of D, times h and h².
        if step_order > 1:
            r0 = (lambdas[i] - lambdas[i - 1]) / h
            first = (outputs[0] - outputs[1]) / r0
        if step_order == 2:
            x = x + phi_1 / 2 * first
        if step_order == 3:
            r1 = (lambdas[i - 1] - lambdas[i - 2]) / h
            second = (first - (outputs[1] - outputs[2]) / r1) / (r0 + r1)
            phi_2 = 1 - phi_1 / h
            x = x + phi_2 * (first + r0 * second) + (0.5 - phi_2 / h) * second
    return x


def unipc(
    denoiser: Denoiser, x: Tensor, sigmas: Sequence[float], order: int = 3, variant: str = 'bh2'
) -> Tensor:
    """A predictor (UniP) and a corrector (UniC) that takes no evaluation of its own   (Zhao et al. 2023,
    Algorithms 1 and 2 with multistep outputs).

    D at the predicted state corrects that state, and is the first output of the next step. The last state is
    not corrected, which would take an evaluation more. Orders are lowered in the last steps as in `dpmpp`.

    Args: as of `dpmpp`; variant: B(h) of the paper for D, bh1: −h, bh2: e^{−h} − 1.
    """
    steps = len(sigmas) - 1
    step_orders = [min(order, i + 1, steps - i) for i in range(steps)]
    outputs: list[Tensor] = []  # newest first
    x_before = x
    for i in range(steps):
        latest = denoiser(x, sigmas[i])
        if i > 0:
            # Correct the last step, whose prediction is x.
            x = unipc_step(x_before, outputs, sigmas, i - 1, step_orders[i - 1], variant, latest)
        outputs = [latest, *outputs[:2]]
        # The next step needs the corrected state, and the network evaluates the predicted one.
        x_before, x = x, unipc_step(x, outputs, sigmas, i, step_orders[i], variant)
    return x


def unipc_step(
    x: Tensor,
    outputs: Sequence[Tensor],
    sigmas: Sequence[float],
    i: int,
    order: int,
    variant: str,
    latest: Tensor | None = None,
) -> Tensor:
    """The step from sigmas[i] to the next level: UniP or, with `latest`, UniC.

    x' = (sigma'/sigma) x − (e^{−h} − 1) D_0 − B(h) sum_m a_m (D_m − D_0) / r_m   (Zhao et al. 2023, Theorem
    3.1, for the prediction of D).

    Args:
        outputs: D at sigmas[i] and the levels before it, D_0 first; at least `order` of them.
        latest: D at the predicted state; r = 1.
    """
    lambdas = [log_snr(sigma) for sigma in sigmas[max(i + 1 - order, 0) : i + 2]]
    h = lambdas[-1] - lambdas[-2]
    ratios = [(lambdas[-2 - m] - lambdas[-2]) / h for m in range(1, order)]
    differences = [(outputs[m] - outputs[0]) / ratios[m - 1] for m in range(1, order)]
    # UniC adds the end of the step, evaluated at the prediction.
    if latest is not None:
        ratios, differences = [*ratios, 1.0], [*differences, latest - outputs[0]]

    x = sigmas[i + 1] / sigmas[i] * x - math.expm1(-h) * outputs[0]
    b_h = -h if variant == 'bh1' else math.expm1(-h)
    for weight, difference in zip(unipc_weights(ratios, -h, b_h), differences):
        x = x - b_h * weight * difference
    return x


def unipc_weights(ratios: Sequence[float], z: float, b_z: float) -> list[float]:
    """a that solve sum_m r_m^{q−1} a_m = q! z phi_{q+1}(z) / B(z) for q = 1 ... len(ratios), z = −h.

    phi_1(z) = (e^z − 1) / z, phi_{q+1} = (phi_q − 1/q!) / z. A single weight is 1/2, its limit for small
    steps, as the authors take it.
    """
    if len(ratios) < 2:
        return [0.5] * len(ratios)
    # expm1, because z is small in short steps.
    phi, moments = math.expm1(z) / z, []
    for q in range(1, len(ratios) + 1):
        phi = (phi - 1 / math.factorial(q)) / z
        moments.append(math.factorial(q) * z * phi / b_z)
    # A Vandermonde system of at most three unknowns, solved on the host.
    powers = np.vander(ratios, increasing=True).T
    return np.linalg.solve(powers, moments).tolist()


def log_snr(sigma: float) -> float:
    """lambda = −ln sigma: the logarithm of the signal-to-noise ratio, halved; infinite at 0."""
    return -math.log(sigma) if sigma > 0 else math.inf
