"""Kernel distance between two sets of features, the KD in KID (Bińkowski et al. 2018)."""

from __future__ import annotations

import math

import torch

from dnnlib.util import UserError


def kernel_distance(
    features: torch.Tensor, reference: torch.Tensor, block: int = 1000, blocks: int = 100, seed: int = 0
) -> dict:
    """Squared maximum mean discrepancy under k(x, y) = (x·y/D + 1)³, the mean over blocks of samples
    (Bińkowski et al. 2018, Sec. 4).

    A block is `block` images against as many of the reference, and its value the unbiased estimate
    `squared_mmd`, whose expectation does not depend on the number of images and which may be negative. A
    random permutation of each set is cut into disjoint blocks; there are J = ⌊min(n, m)/block⌋ of them, and
    new permutations follow until there are `blocks`.

    `std` is the spread of all blocks, which is what is usually quoted beside a KID; it is no error of the
    value. `error` is one. Blocks of one permutation are independent; those of another consist of the same
    images again and add nothing new. So the variance of a block is taken within permutations and divided by
    J, not by `blocks`. For different distributions that is the variance of the mean; for nearly equal ones,
    where averaging over permutations does help, and for sets of unequal size it is an upper bound.

    Args:
        features: [n, D] of the images.
        reference: [m, D] of the reference's images, on the same device.
        block: samples of each set in a block; where a set has fewer, that many.
        blocks: how many. A single one where it would hold all images of both sets.
        seed: of the permutations.
    Returns: dict of `value`, `std`, `error` (None where J or `blocks` is 1: then nothing is known of it),
        `blocks` and `block` as used.
    Raises: UserError for features that are not finite or do not match, or a block of fewer than two samples.
    """
    features, reference = check_features(features, reference, least=2)
    n, m = len(features), len(reference)
    if block < 2 or blocks < 1:
        raise UserError(
            f'{blocks} blocks of {block} samples say nothing: a kernel distance needs one block or more, of '
            '2 or more samples.'
        )
    block = min(block, n, m)
    disjoint = min(n, m) // block
    blocks = 1 if n == m == block else blocks
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
    """Unbiased estimate of E k(x, x′) + E k(y, y′) − 2 E k(x, y), k(x, y) = (x·y/D + 1)³ (Gretton et al.
    2012, Eq. 3).

    Args:
        x, y: [n, D], [m, D]; n, m >= 2. No sample is paired with itself.
    Returns: [] float64.
    """
    x, y = x.double(), y.double()

    def kernel(a, b):
        value = torch.mm(a, b.T).div_(a.shape[1]).add_(1)
        return value * value * value

    def within(a):
        pairs = kernel(a, a)
        return (pairs.sum() - pairs.diagonal().sum()) / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2 * kernel(x, y).mean()


def check_features(features, reference, least: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets of features as tensors [n, D], [m, D], or a UserError that says what is wrong with which;
    `least` samples are needed of each."""
    features, reference = torch.as_tensor(features), torch.as_tensor(reference)
    for name, values in (('images', features), ('reference', reference)):
        if values.ndim != 2:
            raise UserError(
                f'Features of the {name} have shape {tuple(values.shape)}, expected [N, D]. '
                'Use a detector with one feature vector an image.'
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
    if features.shape[1] != reference.shape[1]:
        raise UserError(
            f'Images and reference have {features.shape[1]} and {reference.shape[1]} features: they come '
            'from different detectors. Use one detector for both.'
        )
    return features, reference


def _standard_error(values: torch.Tensor, disjoint: int) -> float | None:
    """Standard error of the mean of block values [blocks], of which every `disjoint` successive ones share no
    sample."""
    permutations = values.split(disjoint)
    freedom = sum(len(part) - 1 for part in permutations)
    if freedom == 0:
        return None
    variance = sum((part - part.mean()).square().sum().item() for part in permutations) / freedom
    return math.sqrt(variance / min(disjoint, len(values)))
