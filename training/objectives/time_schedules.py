"""Schedules over training steps, and distributions of times: consistency models, iCT, ECT, TCM and
progressive distillation.

Pure functions without networks or state. A schedule takes the progress so far, in optimizer steps or in
images, whichever the lengths beside it are in, and returns plain numbers on the host. A function of noise
levels takes and returns FP64 tensors of any shape, on any device, and does not synchronize with it. As in EDM,
time is the noise level: t = sigma. A consistency pair is t > r >= 0 on one trajectory x_t = y + t n.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from scipy import special
from torch import Tensor

from training.choices import ECT_WEIGHTS, TCM_WEIGHTS, check_choice


def _check_discretization(K: int, s0: int, s1: int) -> None:
    if K < 1 or not 1 <= s0 <= s1:
        raise ValueError(f'K >= 1 and 1 <= s0 <= s1 do not hold for K = {K}, s0 = {s0}, s1 = {s1}')


# ----------------------------------------------------------------------------
# Consistency models (Song et al. 2023): N nodes from sigma_max to sigma_min
# (`grids.karras_sigmas`), N − 1 equally likely edges.


def discretization_steps(k: int, K: int, s0: int, s1: int) -> int:
    """Nodes of the grid after k of K steps: they grow from s0 to s1 + 1 like the square root of k.

    N(k) = max(ceil(sqrt(k/K ((s1+1)² − s0²) + s0²) − 1), 1) + 1   (Song et al. 2023, Appendix C). N stays
    constant after K steps.

    Raises: ValueError unless K >= 1 and 1 <= s0 <= s1.
    """
    _check_discretization(K, s0, s1)
    square = min(k / K, 1.0) * ((s1 + 1) ** 2 - s0**2) + s0**2
    return max(math.ceil(math.sqrt(square) - 1), 1) + 1


def target_ema(N: int, s0: int, mu0: float) -> float:
    """Decay of the target network while the grid has N nodes: mu0 at N = s0 + 1, closer to 1 on finer grids.

    mu = exp(s0 ln mu0 / (N − 1))   (Song et al. 2023, Appendix C). With mu0 = 0 the target is the network
    itself.
    """
    return mu0 ** (s0 / (N - 1))


# ----------------------------------------------------------------------------
# iCT (Song & Dhariwal 2023): the same grid, doubled in stages; lognormal edges.


def doubling_steps(k: int, K: int, s0: int = 10, s1: int = 1280) -> int:
    """Nodes of the grid after k of K steps: they double in stages of K' steps, at least one.

    N(k) = min(s0 2^floor(k/K'), s1) + 1 with K' = floor(K / (log2(s1/s0) + 1))   (Song & Dhariwal 2023,
    Section 3.4).

    Raises: ValueError unless K >= 1 and 1 <= s0 <= s1.
    """
    _check_discretization(K, s0, s1)
    # At least one step per stage, in runs of fewer steps than doublings.
    stage_steps = max(math.floor(K / (math.log2(s1 / s0) + 1)), 1)
    return min(s0 << (min(k, K) // stage_steps), s1) + 1


def lognormal_edge_probabilities(sigmas: Tensor, P_mean: float = -1.1, P_std: float = 2.0) -> Tensor:
    """Probability of each edge of a decreasing grid: that ln sigma ~ N(P_mean, P_std²) falls into it, given
    that it falls into one.

    ∝ erf((ln sigma_t − P_mean) / (√2 P_std)) − erf((ln sigma_s − P_mean) / (√2 P_std))   (Song & Dhariwal
    2023, Section 3.5).

    Args:
        sigmas: [N] decreasing, above 0.
    Returns: [N−1] float64.
    Raises: ValueError if nearly no noise level of that distribution lies on the grid.
    """
    # erf rather than the distribution function: the factor 1/2 cancels.
    cumulative = torch.erf((sigmas.double().log() - P_mean) / (math.sqrt(2) * P_std))
    inside = cumulative[:-1] - cumulative[1:]
    if not inside.sum() > 0:
        raise ValueError(
            f'almost no noise level of that distribution lies between {sigmas[-1]:g} and {sigmas[0]:g}'
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
    """t with ln t ~ N(P_mean, P_std²)   (Geng et al. 2024, Table 2).

    Args:
        normal: standard normal numbers of any shape.
    Returns: float64, in the shape of `normal`.
    """
    return (normal.double() * P_std + P_mean).exp()


def tuning_stage(iteration: int, stage_steps: int) -> int:
    """a = floor(iteration / d): 0, 1, …   (Geng et al. 2024, Eq. 17)."""
    return iteration // stage_steps


def tuning_stages(q: float, last_gap: float = 2.0**-8) -> int:
    """Number of stages until 1 − r/t is about `last_gap`: 8 for q = 2 and 4 for q = 4, as in ECT for CIFAR-10
    and ImageNet-64 (Geng et al. 2024).

    For other q the number, at least 1, for which q^−stages is nearest to `last_gap` by its logarithm.
    """
    return max(round(-math.log(last_gap) / math.log(q)), 1)


def earlier_time(t: Tensor, stage: int, q: float, k: float = 8.0, b: float = 1.0) -> Tensor:
    """The earlier time r of a pair, in the shape of `t`.

    r = t max(0, 1 − q^−(stage+1) (1 + k sigmoid(−b t)))   (Geng et al. 2024, Eqs. 17 and 18). k = 0 is the
    constant mapping, one ratio r / t for all t. Where r = 0 the target is the image: diffusion training.

    Raises: ValueError for a stage so late that r and t cannot be told apart.
    """
    gap = float(q) ** -(stage + 1)
    if gap < 1e-12:
        raise ValueError(
            f'stage {stage} of q = {q:g} brings r to within {gap:.0e} of t, less than numbers resolve: '
            'make the stages longer'
        )
    return t * (1 - gap * (1 + k * torch.sigmoid(-b * t))).clamp(min=0)


def ect_weight(t: Tensor, r: Tensor, mode: str, sigma_data: float) -> Tensor:
    """Weight of the pseudo-Huber loss of a pair, in the shape of `t`   (Geng et al. 2024, Tables 2 and 3).

    `gap`: 1/(t − r), from the derivation. Functions of t only: `flat` 1; `inv` 1/t; `snr` 1/t²; `inv_sum` 1/t
    + 1/sigma_d; `karras` 1/t² + 1/sigma_d²; `c_in_squared` 1/(t² + sigma_d²).

    Raises: ValueError for another mode.
    """
    check_choice('weight', mode, ECT_WEIGHTS)
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
    return 1 / (t**2 + sigma_data**2)


# ----------------------------------------------------------------------------
# TCM (Lee et al. 2025): the second stage of ECT, restricted to [t', sigma_max].


def truncated_log_student_times(
    u: Tensor, low: float, high: float, scale: float = 0.2, df: float = 0.01
) -> Tensor:
    """t with ln t = scale · X, X Student-t of `df` degrees of freedom, given that t lies in [low, high]
    (Lee et al. 2025, experiment setup).

    By the inverse of the distribution function: t increases with u in [0, 1), from low at u = 0. At df = 0.01
    t is nearly uniform in ln ln t.

    Args:
        u: [N] float64 on the host, uniform (`SampleRng.uniform`).
        low, high: t' and sigma_max.
    Returns: [N] float64 on the host.
    Raises: ValueError for an empty range, or one that the distribution nearly misses.
    """
    if not 0 < low < high < math.inf:
        raise ValueError(f'0 < low < high < inf does not hold for {low}, {high}')

    # Of −X, which has the same distribution, because floating point resolves the small probabilities at late
    # times, not those near 1.
    first, last = special.stdtr(df, -math.log(low) / scale), special.stdtr(df, -math.log(high) / scale)
    if not first > last:
        raise ValueError(f'next to no time of that distribution lies between {low:g} and {high:g}')
    x = -special.stdtrit(df, first + u.double().numpy() * (last - first))
    return (scale * torch.from_numpy(x)).exp().clamp(low, high)


def tcm_ratio(iteration: int, stage_steps: int, q: float, cap: float) -> float:
    """The constant part of r / t in stage a of ECT.

    min(1 − q^−(a+1), cap)   (Lee et al. 2025, training details; cap 0.999 for CIFAR-10, 0.9961 for
    ImageNet-64).
    """
    return min(1 - q ** -(tuning_stage(iteration, stage_steps) + 1.0), cap)


def tcm_earlier_time(t: Tensor, ratio: float, k: float = 8.0, b: float = 1.0, floor: float = 1e-6) -> Tensor:
    """The earlier time r of a pair, in the shape of `t`.

    r = max(floor, t − t (1 − ratio)(1 + k sigmoid(−b t)))   (Lee et al. 2025, training details). This is
    ECT's mapping with a floor, because the stage-1 network, which gives the target below t', is not evaluated
    at 0.
    """
    return (t - t * (1 - ratio) * (1 + k * torch.sigmoid(-b * t))).clamp(min=floor)


def tcm_weight(t: Tensor, r: Tensor, mode: str, sigma_data: float) -> Tensor:
    """Weight omega(t) / (t − r) of the pseudo-Huber loss of a pair, in the shape of `t`.

    omega is 1 (`flat`, CIFAR-10) or t / c_out(t)² = t (1/t² + 1/sigma_d²) (`karras`, ImageNet-64)   (Lee et
    al. 2025, training details).

    Raises: ValueError for another mode.
    """
    check_choice('weight', mode, TCM_WEIGHTS)
    gap = gap_weight(t, r)
    return gap if mode == 'flat' else gap * t * (t**-2 + sigma_data**-2)


def boundary_count(batch: int, share: float) -> int:
    """floor(share · batch), the number of samples of a batch at t = t'   (Lee et al. 2025, Algorithm 1; share
    = rho = 0.25).

    Raises: ValueError if one of the two subsets would be empty; a share of 0 means no boundary loss.
    """
    # In fractions, because 0.29 · 100 is 28.999… in floating point.
    count = math.floor(batch * Fraction(share).limit_denominator(10**6))
    if not (0 < count < batch or share == 0):
        raise ValueError(
            f'a share of {share:g} of {batch} samples leaves the boundary or the rest without any'
        )
    return count


def boundary_samples(first: int, count: int, batch: int, share: float) -> Tensor:
    """[count] bool on the host: which of the samples first … first + count − 1 of the training stream lie at
    t = t'.

    Every `batch` consecutive samples hold exactly `boundary_count` of them, evenly spread, so that processes
    and accumulation rounds share the work.
    """
    # Sample i lies at t' where floor(i n / batch) steps up, as in drawing a line on pixels.
    n, position = boundary_count(batch, share), torch.arange(first, first + count)
    return (position + 1) * n // batch > position * n // batch


def boundary_scales(at_boundary: Tensor, batch: int, share: float, w_b: float) -> Tensor:
    """[N] float64 factors that turn the mean over a batch into TCM's loss, the mean of the batch − n
    consistency samples plus w_b times the mean of the n boundary samples   (Lee et al. 2025, Algorithm 1).

    batch / (batch − n) and w_b batch / n.
    """
    n = boundary_count(batch, share)
    consistency = torch.full_like(at_boundary, batch / (batch - n), dtype=torch.float64)
    return torch.where(at_boundary, w_b * batch / n, consistency) if n else consistency


# ----------------------------------------------------------------------------
# Progressive distillation (Salimans & Ho 2022); the edges of a round are `loss_pd.halving_edges`.


def halving_rounds(start: int, end: int, stage_steps: int) -> list[tuple[int, int]]:
    """(S, optimizer steps) of each round: S = start, start/2, …, end. Rounds of two sampling steps and of one
    take twice as long (Salimans & Ho 2022; OpenAI's consistency_models).

    The teacher of the first round takes 2 start steps.

    Raises: ValueError unless start is end times a power of two.
    """
    # The logarithm proposes, the shift verifies: float rounding cannot let another number pass.
    halvings = round(math.log2(start / end)) if start >= end >= 1 else -1
    if halvings < 0 or end << halvings != start:
        raise ValueError(f'{start} steps do not become {end} by halving')
    counts = [start >> i for i in range(halvings + 1)]
    return [(S, stage_steps if S > 2 else 2 * stage_steps) for S in counts]
