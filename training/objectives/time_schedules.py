"""What changes with the training step, and how times are drawn: consistency models, iCT, ECT, TCM and
progressive distillation.

Pure functions without networks or state. A schedule takes the number of optimizer steps done so far and gives
plain numbers, known to the host; what is a function of noise levels takes and gives FP64 tensors of any
shape, on any device, and never waits for it. As in EDM time is noise level: t = sigma. A consistency pair is
t > r >= 0 on one trajectory x_t = y + t n.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from scipy import special
from torch import Tensor

ECT_WEIGHTS = ('gap', 'flat', 'inv', 'inv_sum', 'snr', 'karras', 'c_in_squared')
TCM_WEIGHTS = ('flat', 'karras')


def _check_discretization(K: int, s0: int, s1: int) -> None:
    if K < 1 or not 1 <= s0 <= s1:
        raise ValueError(f'K >= 1 and 1 <= s0 <= s1 do not hold for K = {K}, s0 = {s0}, s1 = {s1}')


# ----------------------------------------------------------------------------
# Consistency models (Song et al. 2023): N nodes from sigma_max to sigma_min
# (`consistency_ops.karras_sigmas`), N − 1 edges, each as likely.


def discretization_steps(k: int, K: int, s0: int, s1: int) -> int:
    """N(k) = max(ceil(sqrt(k/K ((s1+1)² − s0²) + s0²) − 1), 1) + 1, the nodes of the grid after k of K steps
    (Song et al. 2023, Appendix C).

    It grows from s0 to s1 + 1 like the square root of the steps, and stays there after K.
    """
    _check_discretization(K, s0, s1)
    square = min(k / K, 1.0) * ((s1 + 1) ** 2 - s0**2) + s0**2
    return max(math.ceil(math.sqrt(square) - 1), 1) + 1


def target_ema(N: int, s0: int, mu0: float) -> float:
    """mu = exp(s0 ln mu0 / (N − 1)), decay of the target network while the grid has N nodes   (Song et al.
    2023, Appendix C).

    mu0 at N = s0 + 1; the finer the grid, the closer to 1. mu0 = 0 is no average: the target is the network
    itself.
    """
    return mu0 ** (s0 / (N - 1))


# ----------------------------------------------------------------------------
# iCT (Song & Dhariwal 2023): the same grid, doubled in stages; lognormal edges.


def doubling_steps(k: int, K: int, s0: int = 10, s1: int = 1280) -> int:
    """N(k) = min(s0 2^floor(k/K'), s1) + 1 with K' = floor(K / (log2(s1/s0) + 1)), nodes of the grid after k
    of K steps   (Song & Dhariwal 2023, Section 3.4).

    A stage lasts one step at least, however small K.
    """
    _check_discretization(K, s0, s1)
    stage_steps = max(math.floor(K / (math.log2(s1 / s0) + 1)), 1)
    return min(s0 << (min(k, K) // stage_steps), s1) + 1


def lognormal_edge_probabilities(sigmas: Tensor, P_mean: float = -1.1, P_std: float = 2.0) -> Tensor:
    """Probability of each edge of a falling grid [N] > 0, [N−1] float64: that ln sigma ~ N(P_mean, P_std²)
    falls into it, given that it falls into one; ∝ erf((ln sigma_t − P_mean) / (√2 P_std)) − erf((ln sigma_s −
    P_mean) / (√2 P_std))   (Song & Dhariwal 2023, Section 3.5)."""
    cumulative = torch.erf((sigmas.double().log() - P_mean) / (math.sqrt(2) * P_std))
    inside = cumulative[:-1] - cumulative[1:]
    if not inside.sum() > 0:
        raise ValueError(
            f'next to no noise level of that distribution lies between {sigmas[-1]:g} and {sigmas[0]:g}'
        )
    return inside / inside.sum()


def gap_weight(sigma_t: Tensor, sigma_s: Tensor) -> Tensor:
    """1 / (sigma_t − sigma_s)   (Song & Dhariwal 2023, Section 3.1)."""
    return 1 / (sigma_t - sigma_s)


def pseudo_huber_eps(values: int) -> float:
    """c = 0.00054 √d of the pseudo-Huber distance between images of d values   (Song & Dhariwal 2023, Section
    3.3)."""
    return 0.00054 * math.sqrt(values)


# ----------------------------------------------------------------------------
# ECT (Geng et al. 2024): continuous times, r moves from 0 (diffusion) toward t stage by stage.


def lognormal_times(normal: Tensor, P_mean: float = -1.1, P_std: float = 2.0) -> Tensor:
    """t with ln t ~ N(P_mean, P_std²) from standard normal numbers; float64, of their shape and device (Geng
    et al. 2024, Table 2)."""
    return (normal.double() * P_std + P_mean).exp()


def tuning_stage(iteration: int, stage_steps: int) -> int:
    """a = floor(iteration / d): 0, 1, …   (Geng et al. 2024, Eq. 17)."""
    return iteration // stage_steps


def tuning_stages(q: float, last_gap: float = 2.0**-8) -> int:
    """How many stages make 1 − r/t about `last_gap` in the last one, by factors of q: 8 for q = 2 and 4 for q
    = 4, ECT's numbers for CIFAR-10 and ImageNet-64 (Geng et al. 2024); for other q the whole number, at least
    1, whose q^−stages is nearest, by its logarithm."""
    return max(round(-math.log(last_gap) / math.log(q)), 1)


def earlier_time(t: Tensor, stage: int, q: float, k: float = 8.0, b: float = 1.0) -> Tensor:
    """r = t max(0, 1 − q^−(stage+1) (1 + k sigmoid(−b t))), in the shape of `t`   (Geng et al. 2024, Eqs. 17
    and 18).

    k = 0 is the constant mapping, one ratio r / t for all t. Where r = 0 the target is the image: that is
    diffusion training.
    Raises: ValueError for a stage so late that r and t run together.
    """
    gap = float(q) ** -(stage + 1)
    if gap < 1e-12:
        raise ValueError(
            f'stage {stage} of q = {q:g} brings r to within {gap:.0e} of t, less than numbers resolve: make the stages longer'
        )
    return t * (1 - gap * (1 + k * torch.sigmoid(-b * t))).clamp(min=0)


def ect_weight(t: Tensor, r: Tensor, mode: str, sigma_data: float) -> Tensor:
    """Weight of the pseudo-Huber loss of a pair, in the shape of `t`   (Geng et al. 2024, Tables 2 and 3).

    `gap`: 1/(t − r), what the derivation gives. Those of t alone: `flat` 1; `inv` 1/t; `snr` 1/t²; `inv_sum`
    1/t + 1/sigma_d; `karras` 1/t² + 1/sigma_d²; `c_in_squared` 1/(t² + sigma_d²).
    """
    if mode == 'gap':
        return gap_weight(t, r)
    if mode == 'flat':
        return torch.ones_like(t)
    if mode == 'inv':
        return 1 / t
    if mode == 'snr':
        return t**-2
    if mode == 'inv_sum':
        return 1 / t + 1 / sigma_data
    if mode == 'karras':
        return t**-2 + sigma_data**-2
    if mode == 'c_in_squared':
        return 1 / (t**2 + sigma_data**2)
    raise ValueError(f'weight {mode!r} is not one of {", ".join(ECT_WEIGHTS)}')


# ----------------------------------------------------------------------------
# TCM (Lee et al. 2025): ECT's second stage, on [t', sigma_max] alone.


def truncated_log_student_times(
    u: Tensor, low: float, high: float, scale: float = 0.2, df: float = 0.01
) -> Tensor:
    """t with ln t = scale · X, X Student-t of `df` degrees of freedom, given that t lies in [low, high]
    (Lee et al. 2025, experiment setup).

    By the inverse of the distribution function: u in [0, 1) -> t, increasing, u = 0 -> low. At df = 0.01 this
    is nearly uniform in ln ln t.

    Args:
        u: [N] float64 on the host, uniform (`SampleRng.uniform`).
        low, high: t' and sigma_max.
    Returns: [N] float64 on the host.
    """
    if not 0 < low < high < math.inf:
        raise ValueError(f'0 < low < high < inf does not hold for {low}, {high}')
    # X is symmetric: −X has its small probabilities, which floating point resolves, where times are long.
    first, last = special.stdtr(df, -math.log(low) / scale), special.stdtr(df, -math.log(high) / scale)
    if not first > last:
        raise ValueError(f'next to no time of that distribution lies between {low:g} and {high:g}')
    x = -special.stdtrit(df, first + u.double().numpy() * (last - first))
    return (scale * torch.from_numpy(x)).exp().clamp(low, high)


def tcm_ratio(iteration: int, stage_steps: int, q: float, cap: float) -> float:
    """min(1 − q^−(a+1), cap), a the stage of ECT: the constant part of r / t   (Lee et al. 2025, training
    details; cap 0.999 for CIFAR-10, 0.9961 for ImageNet-64)."""
    return min(1 - q ** -(tuning_stage(iteration, stage_steps) + 1.0), cap)


def tcm_earlier_time(t: Tensor, ratio: float, k: float = 8.0, b: float = 1.0, floor: float = 1e-6) -> Tensor:
    """r = max(floor, t − t (1 − ratio)(1 + k sigmoid(−b t))), in the shape of `t`   (Lee et al. 2025,
    training details).

    ECT's mapping, but for the floor: the stage-1 network, which gives the target below t', is not evaluated at 0.
    """
    return (t - t * (1 - ratio) * (1 + k * torch.sigmoid(-b * t))).clamp(min=floor)


def tcm_weight(t: Tensor, r: Tensor, mode: str, sigma_data: float) -> Tensor:
    """omega(t) / (t − r), in the shape of `t`; omega is 1 (`flat`, CIFAR-10) or t / c_out(t)² = t (1/t² +
    1/sigma_d²) (`karras`, ImageNet-64) (Lee et al. 2025, training details)."""
    if mode not in TCM_WEIGHTS:
        raise ValueError(f'weight {mode!r} is not one of {", ".join(TCM_WEIGHTS)}')
    gap = gap_weight(t, r)
    return gap if mode == 'flat' else gap * t * (t**-2 + sigma_data**-2)


def boundary_count(batch: int, share: float) -> int:
    """floor(share · batch), how many of a batch's samples lie at t = t'   (Lee et al. 2025, Algorithm 1;
    share = rho = 0.25).

    Raises: ValueError where one of the two parts would be empty; a share of 0 is no boundary loss.
    """
    count = math.floor(
        batch * Fraction(share).limit_denominator(10**6)
    )  # in fractions: 0.29 · 100 is 28.999… in floating point
    if not (0 < count < batch or share == 0):
        raise ValueError(
            f'a share of {share:g} of {batch} samples leaves the boundary or the rest without any'
        )
    return count


def boundary_samples(first: int, count: int, batch: int, share: float) -> Tensor:
    """Which of the samples first … first + count − 1 of the training stream lie at t = t': [count] bool on
    the host.

    Every `batch` consecutive samples hold exactly `boundary_count` of them, evenly spread, so that processes
    and accumulation rounds share the work.
    """
    n, position = boundary_count(batch, share), torch.arange(first, first + count)
    return (position + 1) * n // batch > position * n // batch


def boundary_scales(at_boundary: Tensor, batch: int, share: float, w_b: float) -> Tensor:
    """Factors, [N] float64, under which the mean over a whole batch becomes TCM's loss, the mean of the batch
    − n consistency samples plus w_b times the mean of the n others: batch / (batch − n) and w_b batch / n
    (Lee et al. 2025, Algorithm 1)."""
    n = boundary_count(batch, share)
    consistency = torch.full(
        at_boundary.shape, batch / (batch - n), dtype=torch.float64, device=at_boundary.device
    )
    return torch.where(at_boundary, w_b * batch / n, consistency) if n else consistency


# ----------------------------------------------------------------------------
# Progressive distillation (Salimans & Ho 2022); the edges of a stage are `consistency_ops.halving_edges`.


def halving_stages(start: int, end: int, stage_steps: int) -> list[tuple[int, int]]:
    """(S, optimizer steps) of each stage: S = start, start/2, …, end. Stages of two sampling steps and of one
    take twice as long (Salimans & Ho 2022; OpenAI's consistency_models).

    The first stage's teacher takes 2 start steps. Raises: ValueError unless start is end times a power of
    two.
    """
    halvings = round(math.log2(start / end)) if start >= end >= 1 else -1
    if halvings < 0 or end << halvings != start:
        raise ValueError(f'{start} steps do not become {end} by halving')
    counts = [start >> i for i in range(halvings + 1)]
    return [(S, stage_steps if S > 2 else 2 * stage_steps) for S in counts]
