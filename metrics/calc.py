"""Statistics of a stream of images: what fid.py, validation and the demo have in common."""
from __future__ import annotations

from collections.abc import Iterable

import torch

from dnnlib.util import UserError
from metrics.detectors import Detector
from metrics.statistics import FeatureStats
from torch_utils import distributed


def feature_statistics(batches: Iterable[torch.Tensor], detector: Detector, keep: bool = False) -> FeatureStats:
    """Statistics of the detector's features of all images, of all processes together.

    Args:
        batches: this process's images, uint8 [n, C, H, W] a batch. A process may have none, but every process must call.
        detector: from `load_detector`.
        keep: whether to keep the features (for `bootstrap_interval`).
    Returns: the reduced statistics, the same on every process.
    Raises: UserError where there are no images at all.
    """
    stats = None
    for images in batches:
        features = detector(images)
        if stats is None:
            stats = FeatureStats(features.shape[1], detector.device, keep)
        stats.append(features)
    dims = {dim for dim in distributed.gather_objects(detector.dim) if dim is not None}
    if not dims:
        raise UserError('There are no images to compute statistics of.')
    if stats is None:
        detector.dim = dims.pop()
        stats = FeatureStats(detector.dim, detector.device, keep)
    return stats.reduce()
