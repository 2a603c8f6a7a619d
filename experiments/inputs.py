"""What a comparison is given: a teacher and reference statistics, checked before any training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from dnnlib.util import atomic_write, named
from experiments import comparison
from experiments.bundled import BUNDLED, DIGITS
from experiments.runner import Metric

if TYPE_CHECKING:
    import numpy as np


def read_metrics(
    refs: Sequence[str], detectors: Sequence[str], image_shape: list[int] | None
) -> tuple[dict[str, Metric], dict[str, list]]:
    """Metrics by the names of their reference files, and what identifies them: digests of reference and
    detector.

    Args:
        image_shape: [C, H, W] of the images to be measured, where that is known.
    Raises: UserError where a reference or its detector cannot be used.
    """
    from dnnlib.downloads import file_sha256, local_path, pinned
    from metrics.calc import count_features
    from metrics.detectors import INCEPTION_URL, ScriptNetwork, load_detector
    from metrics.reference import check_same_detector, load_reference

    metrics = {
        Path(ref.partition('#')[0]).stem: Metric(ref, detector)
        for ref, detector in zip(refs, detectors or [None] * len(refs))
    }
    if len(metrics) < len(refs):
        raise click.UsageError('--ref: two files have the same name, which names the metric in the table.')

    # All references before the first detector, which may be a download.
    facts, references = {}, {}
    for name, (ref, _) in metrics.items():
        with named('--ref'):
            references[name] = load_reference(ref)

    # Detectors; a program is pinned by its digest, so that the scripts run the one that was checked.
    for name, (ref, source) in metrics.items():
        with named('--detector'):
            detector = load_detector(source or INCEPTION_URL)
        reference = references[name]
        if image_shape:
            count_features(detector, image_shape)
        check_same_detector(reference, detector, ref, image_shape)
        facts[name] = [file_sha256(local_path(ref)), detector.digest]
        if isinstance(detector.network, ScriptNetwork) and source:
            metrics[name] = Metric(ref, pinned(source, detector.digest))
    return metrics, facts


class Teacher(NamedTuple):
    """What a comparison needs to know of its teacher.

    Attributes:
        digest: of its file.
        classes: number of its classes; 0 for an unconditional one.
        network: options of train.py that make its network, where they are needed.
        image_shape: [C, H, W]; None for a network of latents.
        labels: labels to sample all models with, [N] classes or [N, D] vectors; None for all classes.
    """

    digest: str = 'trained here'
    classes: int = DIGITS.classes
    network: Sequence[str] = DIGITS.network
    image_shape: list[int] | None = None
    labels: np.ndarray | None = None

    @property
    def cond(self) -> bool:
        return self.classes > 0


def describe_teacher(teacher: str, data: str, objectives: Sequence[str]) -> Teacher:
    """Load the teacher and check that it fits.

    Raises: UserError if it is a student, does not match the data, or no options make its network and some of
        the `objectives` need them.
    """
    from data.dataset import ImageFolderDataset
    from data.label_space import LabelSpace
    from dnnlib.downloads import file_sha256, local_path
    from training import command_line
    from training.checkpoint import load_network
    from training.starting_point import check_teacher

    # Check the teacher against the data as train.py does.
    with named('--teacher'):
        net = load_network(teacher)
    cond, from_weights = bool(net.label_dim), comparison.starting_from_weights(objectives)
    dataset = (
        BUNDLED[data].dataset(LabelSpace(BUNDLED[data].classes * cond))
        if data in BUNDLED
        else ImageFolderDataset(data, use_labels=cond)
    )
    o = command_line.choose(dict(outdir=data, data=data, teacher=teacher, objective='mcd', augment=0.0))
    check_teacher(o, dataset, net)

    # Images of latents have the shape that a VAE gives them, which is not known here.
    shape = None if 'encoder' in net.metadata else [net.img_channels, net.img_resolution, net.img_resolution]
    options = comparison.network_options(net, from_weights) if from_weights else []
    digest, labels = file_sha256(local_path(teacher)), common_labels(net, dataset)
    return Teacher(digest, net.label_dim, options, shape, labels)


def common_labels(teacher, dataset) -> np.ndarray | None:
    """Labels to sample teacher and students with: the vectors of the data, or the classes that both have;
    None for all classes."""
    import numpy as np

    from data.label_space import space_of

    known, there = dataset.label_space, space_of(teacher)
    if known.are_vectors:
        return dataset.labels.values
    absent = {*known.absent, *there.absent}
    return np.array([k for k in range(known.dim) if k not in absent]) if absent else None


def write_labels(outdir: Path, labels: np.ndarray | None) -> str | None:
    """Write labels for --labels of generate.py; returns the file's path."""
    import numpy as np

    if labels is None:
        return None
    path = outdir / 'labels.npy'
    with atomic_write(path) as file:
        np.save(file, labels)
    return str(path)
