"""FID's Inception network, for the weights that pytorch-fid published.

TensorFlow's graph `inception-2015-12-05` (Szegedy et al. 2016, Inception v3), on which Heusel et al. 2017
define FID. It differs from the Inception v3 of later libraries: average pools exclude the padding, and the
last block uses a max pool. Modules have the names of pytorch-fid's state dict.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metrics.weights import load_weights

CLASSES = 1008  # ImageNet's 1000 and some unused ones
RESOLUTION = 299  # pixels
WHAT = "pytorch-fid's Inception"

# ----------------------------------------------------------------------------
# Architecture. A block is a list of parallel branches; a branch is a sequence of convolutions, pools, and
# pairs of convolutions whose outputs are concatenated.


class Conv(NamedTuple):
    """Convolution without bias, batch normalization, ReLU."""

    name: str
    width: int
    kernel: int | tuple[int, int] = 1  # (height, width), or one number for both
    stride: int = 1
    padded: bool = True  # keep the size at stride 1


def average_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def halving_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


def mixed_35(pooled: int) -> list[list]:
    """Block at 35x35."""
    return [
        [Conv('branch1x1', 64)],
        [Conv('branch5x5_1', 48), Conv('branch5x5_2', 64, 5)],
        [Conv('branch3x3dbl_1', 64), Conv('branch3x3dbl_2', 96, 3), Conv('branch3x3dbl_3', 96, 3)],
        [average_pool, Conv('branch_pool', pooled)],
    ]


def mixed_17(inner: int) -> list[list]:
    """Block at 17x17, with convolutions alternating between rows and columns."""
    row, column = (1, 7), (7, 1)
    return [
        [Conv('branch1x1', 192)],
        [Conv('branch7x7_1', inner), Conv('branch7x7_2', inner, row), Conv('branch7x7_3', 192, column)],
        [
            Conv('branch7x7dbl_1', inner),
            Conv('branch7x7dbl_2', inner, column),
            Conv('branch7x7dbl_3', inner, row),
            Conv('branch7x7dbl_4', inner, column),
            Conv('branch7x7dbl_5', 192, row),
        ],
        [average_pool, Conv('branch_pool', 192)],
    ]


def mixed_8(pool) -> list[list]:
    """Block at 8x8; two branches end in a pair of a row and a column convolution."""
    row, column = (1, 3), (3, 1)
    return [
        [Conv('branch1x1', 320)],
        [Conv('branch3x3_1', 384), (Conv('branch3x3_2a', 384, row), Conv('branch3x3_2b', 384, column))],
        [
            Conv('branch3x3dbl_1', 448),
            Conv('branch3x3dbl_2', 384, 3),
            (Conv('branch3x3dbl_3a', 384, row), Conv('branch3x3dbl_3b', 384, column)),
        ],
        [pool, Conv('branch_pool', 192)],
    ]


# fmt: off
LAYERS = [
    Conv('Conv2d_1a_3x3', 32, 3, stride=2),  # 149x149
    Conv('Conv2d_2a_3x3', 32, 3, padded=False),  # 147x147
    Conv('Conv2d_2b_3x3', 64, 3),
    halving_pool,  # 73x73
    Conv('Conv2d_3b_1x1', 80),
    Conv('Conv2d_4a_3x3', 192, 3, padded=False),  # 71x71
    halving_pool,  # 35x35
    ('Mixed_5b', mixed_35(pooled=32)),
    ('Mixed_5c', mixed_35(pooled=64)),
    ('Mixed_5d', mixed_35(pooled=64)),
    ('Mixed_6a', [  # 17x17
        [Conv('branch3x3', 384, 3, stride=2)],
        [Conv('branch3x3dbl_1', 64), Conv('branch3x3dbl_2', 96, 3), Conv('branch3x3dbl_3', 96, 3, stride=2)],
        [halving_pool],
    ]),
    ('Mixed_6b', mixed_17(inner=128)),
    ('Mixed_6c', mixed_17(inner=160)),
    ('Mixed_6d', mixed_17(inner=160)),
    ('Mixed_6e', mixed_17(inner=192)),
    ('Mixed_7a', [  # 8x8
        [Conv('branch3x3_1', 192), Conv('branch3x3_2', 320, 3, stride=2)],
        [Conv('branch7x7x3_1', 192), Conv('branch7x7x3_2', 192, (1, 7)), Conv('branch7x7x3_3', 192, (7, 1)),
         Conv('branch7x7x3_4', 192, 3, stride=2)],
        [halving_pool],
    ]),
    ('Mixed_7b', mixed_8(average_pool)),
    ('Mixed_7c', mixed_8(max_pool)),
]
# fmt: on

# ----------------------------------------------------------------------------
# Modules.


class NormalizedConv(torch.nn.Module):
    """relu(bn(conv(x))) of a `Conv`. `width`: output channels."""

    def __init__(self, in_channels: int, spec: Conv):
        super().__init__()
        self.width = spec.width
        kernel = spec.kernel if isinstance(spec.kernel, tuple) else (spec.kernel, spec.kernel)
        # Strided convolutions are unpadded, as in TensorFlow's graph.
        padding = tuple(size // 2 for size in kernel) if spec.padded and spec.stride == 1 else 0
        self.conv = torch.nn.Conv2d(in_channels, spec.width, kernel, spec.stride, padding, bias=False)
        self.bn = torch.nn.BatchNorm2d(spec.width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(torch.nn.Module):
    """Parallel branches whose outputs are concatenated along the channels. `width`: output channels."""

    def __init__(self, in_channels: int, branches: list[list]):
        super().__init__()
        self.branches = branches
        self.width = sum(self._add(branch, in_channels) for branch in branches)

    def _add(self, branch: list, width: int) -> int:
        """Create the modules of a branch. Returns: its output channels."""
        for step in branch:
            if not callable(step):
                convs = [step] if isinstance(step, Conv) else step
                for conv in convs:
                    self.add_module(conv.name, NormalizedConv(width, conv))
                width = sum(conv.width for conv in convs)
        return width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._run(branch, x) for branch in self.branches], dim=1)

    def _run(self, branch: list, x: Tensor) -> Tensor:
        for step in branch:
            if callable(step):
                x = step(x)
            elif isinstance(step, Conv):
                x = getattr(self, step.name)(x)
            else:
                x = torch.cat([getattr(self, conv.name)(x) for conv in step], dim=1)
        return x


class FIDInception(torch.nn.Module):
    """The 2048 features after the last pool (`pool3`) of uint8 images [N, 3, H, W] of any size."""

    metric_name, img_channels, has_classes = 'FID', 3, True

    def __init__(self):
        super().__init__()
        # A step is a function, or the name of a module: modules must be attributes to be in the state dict.
        self.steps, width = [], self.img_channels
        for layer in LAYERS:
            if callable(layer):
                self.steps.append(layer)
                continue
            name, module = (
                (layer.name, NormalizedConv(width, layer))
                if isinstance(layer, Conv)
                else (layer[0], Mixed(width, layer[1]))
            )
            width = module.width
            self.add_module(name, module)
            self.steps.append(name)
        self.fc = torch.nn.Linear(width, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """float32 [N, 2048]."""
        # As in pytorch-fid: bilinear without antialiasing, then to [-1, 1].
        x = F.interpolate(images.float() / 255, size=(RESOLUTION, RESOLUTION), mode='bilinear') * 2 - 1
        for step in self.steps:
            x = step(x) if callable(step) else getattr(self, step)(x)
        return x.mean(dim=[2, 3])

    def with_probabilities(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(features [N, 2048], class probabilities [N, 1008])."""
        # Without the output bias, as in Salimans et al. 2016.
        features = self.features(images)
        return features, F.linear(features, self.fc.weight).softmax(dim=1)


def build_inception(weights: object, source: str, device: torch.device) -> FIDInception:
    """The network with pytorch-fid's state dict. Raises: UserError, naming `source`, for other contents."""
    with torch.device('meta'):  # no random numbers for weights that come from a file
        network = FIDInception()
    network = network.to_empty(device='cpu')
    load_weights(network, weights, source, WHAT)
    # On a CPU, channels last is 1.5 times as fast.
    layout = torch.channels_last if device.type == 'cpu' else torch.preserve_format
    return network.eval().requires_grad_(False).to(device, memory_format=layout)
