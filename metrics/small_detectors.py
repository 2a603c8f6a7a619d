"""Feature detectors for small data sets, for which Inception's features mean little.

`python -m metrics.small_detectors --data=digits.zip --outdir=rulers` writes three TorchScript files for fid.py and
train.py: a small classifier, PCA of the pixels, and a random convolution. The classifier is trained on the
data set itself; the other two are not trained, and show whether its results are an artifact.
"""

from __future__ import annotations

import os

import click
import numpy as np
import torch
import torch.nn.functional as F

from data.dataset import ImageFolderDataset
from dnnlib import UserError, cli
from dnnlib.util import atomic_write
from torch_utils import distributed

FEATURES = 64  # of every detector
SEED = 0


class Classifier(torch.nn.Module):
    """Three convolutions and a linear layer; the features are averages over the image, as in Inception."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.img_channels = channels
        self.conv0 = torch.nn.Conv2d(channels, 32, 3, padding=1)
        self.conv1 = torch.nn.Conv2d(32, 64, 3, padding=1, stride=2)
        self.conv2 = torch.nn.Conv2d(64, FEATURES, 3, padding=1)
        self.out = torch.nn.Linear(FEATURES, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.float() / 127.5 - 1
        x = F.relu(self.conv2(F.relu(self.conv1(F.relu(self.conv0(x))))))
        return x.mean(dim=[2, 3])


class PixelPCA(torch.nn.Module):
    """Projection of the pixels onto the data's leading principal components."""

    def __init__(self, mean: torch.Tensor, components: torch.Tensor, channels: int):
        super().__init__()
        self.img_channels = channels
        self.register_buffer('mean', mean)
        self.register_buffer('components', components)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images.flatten(1).float() / 127.5 - 1 - self.mean) @ self.components


class RandomConvolution(torch.nn.Module):
    """Two convolutions with fixed random weights, averaged over the quadrants of the image."""

    def __init__(self, channels: int, generator: torch.Generator):
        super().__init__()
        self.img_channels = channels
        # The four quadrants together have `FEATURES` features.
        width = FEATURES // 4
        self.register_buffer(
            'first', torch.randn(width, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
        )
        # After a ReLU half of the inputs are zero, so fan-in counts half.
        self.register_buffer(
            'second', torch.randn(width, width, 3, 3, generator=generator) / (9 * width / 2) ** 0.5
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.relu(F.conv2d(images.float() / 127.5 - 1, self.first, padding=1))
        x = F.relu(F.conv2d(x, self.second, padding=1))
        return F.adaptive_avg_pool2d(x, 2).flatten(1)


def train_classifier(images, labels, classes: int, epochs: int = 20):
    """Train a classifier on four fifths of the images, as a feature detector.

    Dropout and label smoothing (Szegedy et al. 2016, as for Inception) keep its features bounded.

    Args:
        images: [N, C, H, W] uint8. labels: [N] int64.
    Returns: (module, held-out accuracy).
    """
    # Train on four fifths in a random order.
    # The caller's random numbers stay as they are.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        net = Classifier(images.shape[1], classes)
        order = torch.randperm(len(images))
        held_out, training = order[: len(order) // 5], order[len(order) // 5 :]
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
        for _ in distributed.progress(range(epochs), unit='epoch'):
            for batch in training[torch.randperm(len(training))].split(64):
                loss = F.cross_entropy(
                    net.out(F.dropout(net(images[batch]), 0.2)), labels[batch], label_smoothing=0.1
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    # Classify the others.
    with torch.no_grad():
        predicted = net.out(net(images[held_out])).argmax(dim=1)
    return net.eval().requires_grad_(False), (predicted == labels[held_out]).double().mean().item()


def make_detectors(images, labels, classes: int) -> tuple[dict, float]:
    """Scripted detectors by name, and the classifier's held-out accuracy.

    Args:
        images: [N, C, H, W] uint8. labels: [N] int64.
    """
    classifier, accuracy = train_classifier(images, labels, classes)
    pixels = images.flatten(1).float() / 127.5 - 1
    mean = pixels.mean(dim=0)
    # Right singular vectors are the principal components, the largest first.
    components = torch.linalg.svd(pixels - mean, full_matrices=False).Vh[:FEATURES].T.contiguous()
    channels = images.shape[1]
    detectors = dict(
        classifier=classifier,
        pca=PixelPCA(mean, components, channels),
        random=RandomConvolution(channels, torch.Generator().manual_seed(SEED)),
    )
    return {name: torch.jit.script(module.eval()) for name, module in detectors.items()}, accuracy


@click.command(cls=cli.Command)
@cli.option(
    '--data', metavar='ZIP|DIR', type=cli.PATH, required=True, help='Labeled data set of small images.'
)
@cli.option(
    '--outdir',
    metavar='DIR',
    type=cli.PATH,
    required=True,
    help='Folder for classifier.pt, pca.pt and random.pt.',
)
def main(data, outdir):
    """Make three TorchScript feature detectors for a small labeled data set."""
    # Read the data set into memory.
    dataset = ImageFolderDataset(data, use_labels=True)
    pairs = [dataset[i] for i in range(len(dataset))]
    images = torch.from_numpy(np.stack([image for image, _ in pairs]))
    labels = torch.from_numpy(np.stack([label for _, label in pairs])).argmax(dim=1)

    # Make the detectors and write them.
    detectors, accuracy = make_detectors(images, labels, dataset.label_dim)
    try:
        os.makedirs(outdir, exist_ok=True)
    except OSError as error:
        raise UserError(f'--outdir={outdir} cannot be created: {error.strerror}') from error
    for name, detector in detectors.items():
        with atomic_write(os.path.join(outdir, f'{name}.pt')) as file:
            torch.jit.save(detector, file)
    click.echo(
        f'Classifier: {accuracy:.1%} of held-out images correct. Wrote {", ".join(detectors)} to {outdir}.'
    )


if __name__ == '__main__':
    main()
