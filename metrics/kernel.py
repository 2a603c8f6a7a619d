"""Kernel distance between two sets of features, the KD in KID (Bińkowski et al. 2018)."""

from __future__ import annotations

import math

import torch

from dnnlib.util import UserError


def kernel_distance(
    features: torch.Tensor, reference: torch.Tensor, block: int = 1000, blocks: int = 100, seed: int = 0
) -> dict:
    """Squared maximum mean discrepancy, averaged over blocks (Bińkowski et al. 2018, Sec. 4).

    The kernel is k(x, y) = (x·y/D + 1)³. A block compares `block` images with as many of the reference by the
    unbiased estimate `squared_mmd`, whose expectation does not depend on the number of images; it may be
    negative. A random permutation of each set is cut into J = ⌊min(n, m)/block⌋ disjoint blocks, and more
    permutations follow until there are `blocks`.

    `std` is the spread over all blocks, which papers quote beside a KID; it is not the error of the value.
    `error` is. Blocks of one permutation are independent, but other permutations reuse the same images. So
    the variance of a block is taken within permutations and divided by J, not by `blocks`. For different
    distributions that is the variance of the mean; for nearly equal ones, where averaging over permutations
    does help, and for sets of unequal size, it is an upper bound.

    Args:
        features: [n, D] of the images.
        reference: [m, D] of the reference's images, on the same device.
        block: samples of each set per block, at most the size of the smaller set.
        blocks: number of blocks; 1 if a block holds all images of both sets.
        seed: seed of the permutations.
    Returns: dict of `value`, `std`, `error` (None, unknown, if J or `blocks` is 1), `blocks` and `block` as
        used.
    Raises: UserError for features that are not finite or do not match, or a block of fewer than two samples.
    """
    features, reference = check_features(features, reference, least=2)
    n, m = len(features), len(reference)
    if block < 2 or blocks < 1:
        raise UserError(
            f'A kernel distance needs at least 1 block of at least 2 samples, got {blocks} of {block}.'
        )

    # One block of everything has no randomness.
    block = min(block, n, m)
    disjoint = min(n, m) // block
    blocks = 1 if n == m == block else blocks

    # Cut disjoint blocks from one pair of permutations after another.
    generator = torch.Generator().manual_seed(seed)
    values = []
    while len(values) < blocks:
        ours, theirs = (torch.randperm(count, generator=generator).to(features.device) for count in (n, m))
        for start in range(0, min(disjoint, blocks - len(values)) * block, block):
            values.append(
                squared_mmd(features[ours[start : start + block]], reference[theirs[start : start + block]])
            )
    values = torch.stack(values).cpu()
    return dict(
        value=values.mean().item(),
        std=values.std(correction=0).item(),
        error=_standard_error(values, disjoint),
        blocks=blocks,
        block=block,
    )


def squared_mmd(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Unbiased estimate of E k(x, x′) + E k(y, y′) − 2 E k(x, y) (Gretton et al. 2012, Eq. 3).

    The kernel is k(x, y) = (x·y/D + 1)³.

    Args:
        x, y: [n, D], [m, D]; n, m >= 2. No sample is paired with itself.
    Returns: [] float64.
    """
    # FP64, because the terms nearly cancel for similar sets.
    x, y = x.double(), y.double()

    def kernel(a, b):
        value = torch.mm(a, b.T).div_(a.shape[1]).add_(1)
        return value * value * value

    def within(a):
        pairs = kernel(a, a)
        return (pairs.sum() - pairs.diagonal().sum()) / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2 * kernel(x, y).mean()


def check_features(features, reference, least: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features as tensors [n, D], [m, D]. Raises: UserError, also for fewer than `least` samples in a set."""
    # Each set.
    features, reference = torch.as_tensor(features), torch.as_tensor(reference)
    for name, values in (('images', features), ('reference', reference)):
        if values.ndim != 2:
            raise UserError(
                f'Features of the {name} have shape {tuple(values.shape)}, expected [N, D]. '
                'Use a detector with one feature vector per image.'
            )
        if len(values) < least:
            raise UserError(
                f'{len(values)} features of the {name} are too few: at least {least} are needed. Use more '
                'images.'
            )
        if not values.isfinite().all():
            raise UserError(
                f'Some features of the {name} are NaN or infinite. Check the detector and the images.'
            )

    # The two together.
    if features.shape[1] != reference.shape[1]:
        raise UserError(
            f'Images and reference have {features.shape[1]} and {reference.shape[1]} features: they come '
            'from different detectors. Use one detector for both.'
        )
    return features, reference


def _standard_error(values: torch.Tensor, disjoint: int) -> float | None:
    """Standard error of the mean of block values [blocks]; each run of `disjoint` blocks shares no sample."""
    permutations = values.split(disjoint)
    # Each permutation has one degree of freedom less than blocks, for its mean.
    freedom = sum(len(part) - 1 for part in permutations)
    if freedom == 0:
        return None
    variance = sum((part - part.mean()).square().sum().item() for part in permutations) / freedom
    return math.sqrt(variance / min(disjoint, len(values)))
