"""Whether a network's precision resolves the two outputs that its loss compares, at ever closer times.

The gradient of such a loss follows the difference of the outputs at t and r, which shrinks with 1 − r/t,
while rounding inside the network stays. Measured by `benchmarks/precision.py`; see docs/performance.md, 'What
precision a self-target needs'.
"""

from __future__ import annotations

import torch

from training.objectives import OBJECTIVES

# Largest relative rounding error. If 1 − r/t is as small, the gradient's cosine with its FP64 value is about
# 0.6 or less on three of four networks.
ROUNDING = dict(bf16=2.0**-8, fp16=2.0**-11, tf32=2.0**-11, fp32=2.0**-24, fp64=2.0**-53)


def arithmetic(precision: str, tf32: bool) -> str:
    """Key of ROUNDING for products inside the network."""
    return 'tf32' if precision == 'fp32' and tf32 else precision


def unresolved_gap(c, teacher: torch.nn.Module | None) -> str | None:
    """A warning if the pairs of the last step are closer than rounding, so that the gradient is mostly noise.

    Args:
        c: configuration of the run.
        teacher: the network of `c.teacher`.
    """
    # An objective of its own, without the weights of LPIPS, which do not matter here.
    perceptual = torch.nn.Identity() if getattr(c.loss, 'cm_loss', None) == 'lpips' else None
    # The gap at the last step, where it is smallest.
    objective = OBJECTIVES[c.objective]
    state = objective.module().setup(objective.complete(c.loss), teacher, perceptual=perceptual)
    # Images seen before the last step.
    last_nimg = (-(-c.total_nimg // c.batch_size) - 1) * c.batch_size
    gap, kind = state.self_target_gap(last_nimg), arithmetic(c.precision, c.tf32)
    if gap is None or gap >= ROUNDING[kind]:
        return None
    cures = dict(tf32='--tf32=False', bf16='--precision=fp32', fp16='--precision=fp32')
    cure = cures.get(kind, '--precision=fp64')
    return (
        'Warning: by the last step, half of the pairs of times that the loss compares are within 1 - r/t = '
        f'{gap:.1e} of each other, and {kind} rounds by up to {ROUNDING[kind]:.1e}: the gradient will be '
        f'rounding for the most part. Use {cure}, or change {state.gap_option}.'
    )
