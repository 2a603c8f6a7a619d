"""Labels of generated images: one class, random ones of a file or the training set, or uniform classes, random or in
turn."""

from __future__ import annotations

import os
from collections.abc import Sequence

import click
import numpy as np
import torch

from data.label_space import Labels, LabelSpace, space_of
from dnnlib import UserError
from dnnlib.text import as_ranges
from sampling import generation
from sampling.options import BALANCED, DATA
from torch_utils import misc

MAX_LABEL_BYTES = 1 << 30  # in a file


class DrawnLabels:
    """Chooses uniformly among `labels`, by each image's seed, where EDM draws the class."""

    def __init__(self, labels: Labels):
        self.labels, self.are_vectors = labels, labels.are_vectors

    def __call__(self, noise: generation.SeededNoise, label_dim: int) -> torch.Tensor:
        places = noise.randint(len(self.labels)).tolist()  # on the host: labels are chosen there
        return torch.from_numpy(np.stack([self.labels[i] for i in places])).to(noise.device)

    def digest(self) -> str:
        """Digest of what determines the labels besides the seeds."""
        return self.labels.digest()


class BalancedLabels:
    """Gives `classes` in turn to consecutive seeds, so that N seeds in a row have each class equally often, to one image."""

    def __init__(self, classes: Sequence[int]):
        self.classes = list(classes)

    def __call__(self, noise: generation.SeededNoise, label_dim: int) -> torch.Tensor:
        noise.randint(label_dim)  # later noise is the same as with a random label
        indices = [self.classes[seed % len(self.classes)] for seed in noise.seeds]
        return torch.nn.functional.one_hot(misc.upload(np.array(indices), noise.device), label_dim).float()

    def digest(self) -> str:
        """Digest of what determines the labels besides the seeds."""
        return f'{BALANCED}-{as_ranges(self.classes)}'


def choose(
    net, network: str, class_idx: int | None = None, labels: str | None = None
) -> generation.LabelChooser:
    """The chooser for --class or --labels of a network; without both, classes are uniform.

    Raises: UserError if the network has no such labels, or requires the option; click.UsageError for both.
    """
    if class_idx is not None and labels is not None:
        raise click.UsageError('--class and --labels exclude each other.')

    # A single class, or the default.
    space = space_of(net)
    if class_idx is not None:
        space.check_class(class_idx, f'--class={class_idx}', network)
        return generation.fixed_labels(class_idx)
    if labels is None:
        return generation.uniform_over(space, network)

    # Labels of a file or of the training set.
    if not space.dim:
        raise UserError(f'--labels={labels}: {network} takes no labels; leave the option out')
    if labels == BALANCED:
        if space.are_vectors:
            raise UserError(
                f'--labels={BALANCED}: {network} takes {space}, which do not come in turn: give '
                f'--labels={DATA}, or --labels=FILE.npy'
            )
        return BalancedLabels(space.with_images)
    if labels == DATA:
        return DrawnLabels(labels_of_training_set(net, network))
    return DrawnLabels(read_labels(labels, space, network))


def given_labels(labels: torch.Tensor) -> generation.LabelChooser:
    """A chooser of these labels."""

    def choose(noise, label_dim):
        noise.randint(label_dim)  # later noise is the same as with a random label
        return labels.to(noise.device)

    return choose


def read_labels(path: str, space: LabelSpace, network: str) -> Labels:
    """The labels in a .npy file. Raises: UserError if they are not labels of the network."""
    from data.arrays import map_npy

    if not path.endswith('.npy'):
        raise UserError(
            f'--labels={path} is no .npy file; save the labels with numpy.save, or give --labels={DATA} or '
            f'--labels={BALANCED}'
        )
    values = map_npy(path)
    # The header gives the size; the values stay in the file.
    if values.nbytes > MAX_LABEL_BYTES:
        raise UserError(
            f'--labels={path} has {values.nbytes:,} bytes, and labels at most {MAX_LABEL_BYTES:,}: '
            'save fewer of them'
        )
    return Labels.checked(values, space, f'--labels={path}', network)


def labels_of_training_set(net, network: str) -> Labels:
    """The labels of the data set that a snapshot records.

    Raises: UserError if it is missing or has changed.
    """
    from data.dataset import ImageFolderDataset

    # Find it.
    record = net.metadata.get('dataset_kwargs', {})
    # The record is data of a file: check its types.
    path, max_size = record.get('path'), record.get('max_size')
    cure = 'give --labels=FILE.npy'
    if not isinstance(path, str) or type(max_size) not in (int, type(None)):
        raise UserError(f'--labels={DATA}: {network} does not record its training set; {cure}')
    if not (os.path.isfile(path) or os.path.isdir(path)):
        raise UserError(
            f'--labels={DATA}: the training set of {network}, {path}, is not there; '
            f'run where it is, or {cure}'
        )

    # Check that it is the same.
    dataset = ImageFolderDataset(path, use_labels=True, max_size=max_size)
    if record.get('digest') not in (None, dataset.digest()) or dataset.label_space.differs(space_of(net)):
        raise UserError(
            f'--labels={DATA}: {path} holds another data set ({dataset.num_images} images, '
            f'{dataset.label_space}) than {network} was trained on; restore that one, or {cure}'
        )
    return dataset.labels
