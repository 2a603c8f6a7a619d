"""Averages of the weights over training: exponential with a half-life, and power-function EMA with its post-hoc reconstruction.

Power functions: Karras et al. 2024 (EDM2), Section 3 and Appendix C. A profile of exponent gamma weighs the weights at time tau <= t
by p(tau) ∝ tau^gamma; its relative width `std` is that of the profile, (gamma+1)^½ (gamma+2)^-1 (gamma+3)^-½.
"""
from __future__ import annotations

import copy

import numpy as np
import torch

from torch_utils.flat import FlatParameters


def std_to_exp(std) -> np.ndarray:
    """Exponent of the power-function profile with relative standard deviation `std` (any shape): the largest real root of
    (gamma + 2)² (gamma + 3) = (gamma + 1) / std²   (EDM2, Appendix C)."""
    std = np.asarray(std, dtype=np.float64)
    left = np.polymul(np.polymul([1, 2], [1, 2]), [1, 3])
    largest = lambda s: np.roots(np.polysub(left, np.array([1, 1]) / s ** 2)).real.max()
    return np.array([largest(s) for s in std.ravel()]).reshape(std.shape)


def power_function_beta(std: float, t_next: float, t_delta: float) -> float:
    """EMA decay of one update: (1 − t_delta / t_next)^(gamma + 1), with t_next the images after the update
    and t_delta its batch (EDM2, Section 3.1)."""
    return _decay(float(std_to_exp(std)), t_next, t_delta)


def _decay(exponent: float, t_next: float, t_delta: float) -> float:
    return (1 - t_delta / t_next) ** (exponent + 1)


def _profile_products(t_a, gamma_a, t_b, gamma_b) -> np.ndarray:
    """Inner products of profiles p(tau) = (gamma + 1) tau^gamma / t^(gamma+1) on [0, t], for broadcasting arrays (EDM2, Appendix C)."""
    t = np.minimum(t_a, t_b)
    shape = (t / t_a) ** gamma_a * (t / t_b) ** gamma_b * t / (t_a * t_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * shape


def solve_posthoc_coefficients(in_ofs, in_std, out_ofs, out_std) -> np.ndarray:
    """Weights that combine stored averages into others, least squares over profiles; columns sum to 1 (EDM2, Section 3.2).

    Args:
        in_ofs, in_std: [I] times (any unit of images) and widths of the stored averages.
        out_ofs, out_std: [O] the same for the wanted ones.
    Returns: [I, O] float64.
    """
    in_ofs, out_ofs = (np.asarray(t, dtype=np.float64).ravel() for t in (in_ofs, out_ofs))
    in_exp, out_exp = (std_to_exp(np.ravel(s)) for s in (in_std, out_std))
    gram = _profile_products(in_ofs[:, None], in_exp[:, None], in_ofs, in_exp)
    wanted = _profile_products(in_ofs[:, None], in_exp[:, None], out_ofs, out_exp)
    weights = np.linalg.solve(gram, wanted)
    return weights / weights.sum(axis=0)


def posthoc_error(in_ofs, in_std, out_ofs, out_std, weights) -> np.ndarray:
    """Relative L2 error of combined profiles, ‖p − Σᵢ cᵢ pᵢ‖ / ‖p‖, exactly, from inner products (EDM2, Appendix C):

        ‖p − Σᵢ cᵢ pᵢ‖² = ⟨p, p⟩ − 2 Σᵢ cᵢ ⟨pᵢ, p⟩ + Σᵢⱼ cᵢ cⱼ ⟨pᵢ, pⱼ⟩,
        ⟨p_a, p_b⟩ = (γ_a+1)(γ_b+1) / (γ_a+γ_b+1) · t^(γ_a+γ_b+1) / (t_a^(γ_a+1) t_b^(γ_b+1)),  t = min(t_a, t_b).

    It bounds the error of the weights. `WeightAverages` weighs step k by ∫ p over its images, exactly: its averages are ∫ p(τ) w(τ) dτ for
    the weights w that stay as they are during a step. As profiles have mass 1 and Σᵢ cᵢ = 1, a constant v may be taken off w, and by
    Cauchy-Schwarz the combined weights are at most error · ‖p‖ · (∫ ‖w(τ) − v‖² dτ)^½ away, ∫ over [0, t]; ‖p‖² = (γ+1)² / ((2γ+1) t).

    Args:
        in_ofs, in_std, out_ofs, out_std: as in `solve_posthoc_coefficients`.
        weights: [I, O] the coefficients c, whose columns sum to 1.
    Returns: [O] float64; cancellation leaves about 1e-8 where the error is 0.
    """
    in_ofs, out_ofs = (np.asarray(t, dtype=np.float64).ravel() for t in (in_ofs, out_ofs))
    in_exp, out_exp = (std_to_exp(np.ravel(s)) for s in (in_std, out_std))
    own = _profile_products(out_ofs, out_exp, out_ofs, out_exp)
    shared = (weights * _profile_products(in_ofs[:, None], in_exp[:, None], out_ofs, out_exp)).sum(axis=0)
    combined = (weights * (_profile_products(in_ofs[:, None], in_exp[:, None], in_ofs, in_exp) @ weights)).sum(axis=0)
    return np.sqrt(np.maximum(own - 2 * shared + combined, 0) / own)


def average_name(std: float) -> str:
    """What files, logs and --val_emas call a power-function average: `phema-0.050`."""
    return f'phema-{std:.3f}'


class WeightAverages:
    """Averages of a network's weights, updated after every optimiser step.

    Args:
        net: the network that trains.
        weights: its parameters as one vector.
        halflife_nimg, rampup_ratio: of the exponential average; its effective half-life is min(halflife_nimg, rampup_ratio × images seen)
            (no ramp where the ratio is None).
        phema_stds: widths of the power-function averages.
    """

    def __init__(self, net: torch.nn.Module, weights: FlatParameters, halflife_nimg: float, rampup_ratio: float | None, phema_stds: list[float]):
        self.halflife_nimg, self.rampup_ratio, self.source = halflife_nimg, rampup_ratio, weights
        self.ema, *others = (copy.deepcopy(net).eval().requires_grad_(False) for _ in range(1 + len(phema_stds)))
        self.phema = dict(zip(phema_stds, others))
        self.networks = {'ema': self.ema, **{average_name(std): average for std, average in self.phema.items()}}  # by the names that files say
        self.vectors = {name: FlatParameters(average).weights for name, average in self.networks.items()}
        self._exponents = [float(std_to_exp(std)) for std in phema_stds]

    def halflife_at(self, nimg: int) -> float:
        """Effective half-life in images after `nimg` images."""
        return self.halflife_nimg if self.rampup_ratio is None else min(self.halflife_nimg, nimg * self.rampup_ratio)

    @torch.no_grad()
    def update(self, nimg: int, batch_size: int) -> None:
        """Take in the weights after a step; `nimg` counts the images with this step's `batch_size`. Buffers do not change in training."""
        halflife = self.halflife_at(nimg - batch_size)  # the ramp counts the images before this step, as EDM does
        decays = [0.5 ** (batch_size / max(halflife, 1e-8)), *(_decay(exponent, nimg, batch_size) for exponent in self._exponents)]
        for average, beta in zip(self.vectors.values(), decays):
            average.lerp_(self.source.weights, 1 - beta)

    def state_dict(self) -> dict:
        """Tensors of all averages, for a training state."""
        return dict(ema=dict(self.ema.state_dict()), phema={std: dict(net.state_dict()) for std, net in self.phema.items()})

    def load_state_dict(self, state: dict) -> None:
        """Inverse of `state_dict`."""
        self.ema.load_state_dict(state['ema'])
        for std, net in self.phema.items():
            net.load_state_dict(state['phema'][std])
