"""Which labels generated images get: one class, labels drawn from a file or from the training set, or classes
drawn uniformly."""

from __future__ import annotations

import os

import click
import numpy as np
import torch

from data.label_space import Labels, LabelSpace, space_of
from dnnlib import UserError
from sampling import generation

MAX_LABEL_BYTES = 1 << 30  # of a file of labels
DATA = 'data'  # what stands for the training set in the place of a file


class DrawnLabels:
    """A chooser of labels that gives every image one of `labels`, each as likely, drawn by the image's seed
    where EDM draws the class."""

    def __init__(self, labels: Labels):
        self.labels, self.are_vectors = labels, labels.are_vectors

    def __call__(self, noise: generation.SeededNoise, label_dim: int) -> torch.Tensor:
        places = noise.randint(len(self.labels)).tolist()
        return torch.from_numpy(np.stack([self.labels[i] for i in places])).to(noise.device)

    def digest(self) -> str:
        """Of what decides the labels, besides the seeds."""
        return self.labels.digest()


def choose(
    net, network: str, class_idx: int | None = None, labels: str | None = None
) -> generation.LabelChooser:
    """The chooser that --class and --labels mean for a network; without both, classes are drawn uniformly.

    Raises: UserError where the network has no such labels, or needs to be told which; click.UsageError where
    both are given.
    """
    if class_idx is not None and labels is not None:
        raise click.UsageError('--class and --labels exclude each other.')
    space = space_of(net)
    if class_idx is not None:
        space.check_class(class_idx, f'--class={class_idx}', network)
        return generation.fixed_labels(class_idx)
    if labels is None:
        return generation.uniform_over(space, network)
    if not space.dim:
        raise UserError(f'--labels={labels}: {network} takes no labels; leave the option out')
    return DrawnLabels(
        labels_of_training_set(net, network) if labels == DATA else read_labels(labels, space, network)
    )


def given_labels(labels: torch.Tensor) -> generation.LabelChooser:
    """A chooser of these labels. Random ones are drawn all the same, so that later noise does not change."""

    def choose(noise, label_dim):
        noise.randint(label_dim)
        return labels.to(noise.device)

    return choose


def read_labels(path: str, space: LabelSpace, network: str) -> Labels:
    """The labels in a .npy file. Raises: UserError where they are none of the network."""
    from data.arrays import map_npy

    if not path.endswith('.npy'):
        raise UserError(
            f'--labels={path} is no .npy file; save the labels with numpy.save, or give --labels={DATA}'
        )
    values = map_npy(path)
    if values.nbytes > MAX_LABEL_BYTES:
        raise UserError(
            f'--labels={path} has {values.nbytes:,} bytes, and labels at most {MAX_LABEL_BYTES:,}: '
            'save fewer of them'
        )
    return Labels.checked(values, space, f'--labels={path}', network)


def labels_of_training_set(net, network: str) -> Labels:
    """The labels of the data set that a snapshot records.

    Raises: UserError where it is not there, or is another one by now.
    """
    from data.dataset import ImageFolderDataset

    record = net.metadata.get('dataset_kwargs', {})
    path, max_size = record.get('path'), record.get('max_size')
    cure = 'give --labels=FILE.npy'
    if not isinstance(path, str) or type(max_size) not in (int, type(None)):
        raise UserError(f'--labels={DATA}: {network} does not record its training set; {cure}')
    if not (os.path.isfile(path) or os.path.isdir(path)):
        raise UserError(
            f'--labels={DATA}: the training set of {network}, {path}, is not there; '
            f'run where it is, or {cure}'
        )
    dataset = ImageFolderDataset(path, use_labels=True, max_size=max_size)
    if record.get('digest') not in (None, dataset.digest()) or dataset.label_space.differs(space_of(net)):
        raise UserError(
            f'--labels={DATA}: {path} holds another data set ({dataset.num_images} images, '
            f'{dataset.label_space}) than {network} was trained on; put that back, or {cure}'
        )
    return dataset.labels
