"""What an objective is to the training loop, and what losses share.

An objective is a module `training.objectives.loss_<x>` with

    NAME                                            the loop reports its loss as `Loss/<NAME>`
    setup(c, teacher, net, perceptual) -> State     once, before the first step or `load_state_dict`
    loss(net, images, labels, rng, state, augment_labels) -> [N]

A step is `state.begin_step(nimg)`, the loss of every micro-batch, `state.end_step()`. Importing a module
imports no PyTorch.

`setup` takes the objective's options as attributes of `c`, a frozen `teacher`, the network that trains and a
perceptual distance (`metrics.lpips`); an objective uses what it needs.

Args of `loss`:
    net: the network that trains, maybe in DDP, see `distributed.in_several_graphs`.
    images: [N, C, H, W] in [-1, 1].
    labels: [N, label_dim] one-hot, or None.
    rng: `training.rng.SampleRng`, the only source of random numbers.
    state: what `setup` returned.
    augment_labels: [N, augment_dim], or None.

A loss is one number for each image, summed over the image's values. It never synchronizes with the device:
no `.item()`, no indexing by a boolean mask.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from dnnlib.lazy import lazy_import

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from torch_utils.flat import FlatParameters

torch = lazy_import('torch')
training_stats = lazy_import('torch_utils.training_stats')

SIGMA_BIN_EDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
SIGMA_BINS = [
    f'{low:g}-{high:g}' for low, high in zip((0, *SIGMA_BIN_EDGES), (*SIGMA_BIN_EDGES, float('inf')))
]


class State:
    """What an objective keeps from step to step: its options `c`, its frozen `teacher`, and in subclasses
    schedules and averages.

    Attributes:
        gap_option: the option of train.py that `self_target_gap` depends on; empty if the network is not
            compared with itself.
        in_fp32: whether it evaluates the network in FP32 (`force_fp32`) as well.
        auxiliary: the second network that trains, of an objective that declares one; None before the loop sets it.
        trains_auxiliary: whether that network trains in this step, and not the student.
    """

    gap_option = ''
    in_fp32 = False
    auxiliary: Module | None = None
    trains_auxiliary = False

    def __init__(self, c=None, teacher: Module | None = None):
        self.c, self.teacher = c, teacher

    def begin_step(self, nimg: int) -> None:
        """The next optimizer step follows `nimg` images."""

    def end_step(self) -> None:
        """The optimizer has updated the weights."""

    def networks(self) -> list[Module]:
        """Networks that it evaluates besides the one that trains and the teacher."""
        return []

    def divide(self, weights: FlatParameters, divided: Callable[[Module], FlatParameters]) -> None:
        """The network that trains has been divided among processes, of which `weights` is this one's share; divide
        those of `networks` likewise."""

    def sampling_network(self, net: Module) -> Module:
        """What samples images with `net`, an average of the network that trains; usually `net` itself."""
        return net

    def self_target_gap(self, nimg: int) -> float | None:
        """Median of 1 − r/t over the pairs of times whose outputs are compared by the step that follows
        `nimg` images; None if no outputs are compared."""
        return None

    def per_image(self) -> Tensor | None:
        """[N, ...] what a resumed run needs of each image of this process's part of the batch, on any device."""
        return None

    def load_per_image(self, rows: Tensor) -> None:
        """What `per_image` returned, for this process's part of the batch."""

    def state_dict(self) -> dict:
        """Tensors and plain data that a resumed run needs; on the main process. All call this together."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Inverse of `state_dict`, on every process."""


# ----------------------------------------------------------------------------
# Evaluating networks.


def unwrap(net: Module) -> Module:
    """The network inside a DistributedDataParallel wrapper, or `net` itself."""
    return net.module if isinstance(net, torch.nn.parallel.DistributedDataParallel) else net


def dropout_masks(net: Module, rng, purpose: str = 'dropout') -> dict[str, Tensor]:
    """Dropout masks {name: [N, C, H, W]} for one pass over the images of `rng`; none in evaluation mode."""
    net = unwrap(net)
    return net.dropout_masks(rng.count, rng.generator(purpose)) if net.training else {}


def denoiser(
    net: Module,
    labels: Tensor | None,
    augment_labels: Tensor | None = None,
    masks: Mapping[str, Tensor] | None = None,
    rows: Tensor | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """D(x, sigma) -> [N, C, H, W] float64 of a network, under the labels and dropout masks of a batch; of a two-time
    network G(x, sigma, r=r).

    Args:
        masks: None lets a network in training mode draw its own.
        rows: [M] int64 images of the batch; x, sigma and D are then of these alone.
    """
    # Unconditional networks have no labels: None stays None.
    select = lambda values: values if values is None or rows is None else values[rows]
    labels, options = select(labels), {}
    if augment_labels is not None:
        options['augment_labels'] = select(augment_labels)
    if masks is not None:
        options['dropout_masks'] = {name: select(mask) for name, mask in masks.items()}
    return lambda x, sigma, **end: net(x, sigma, labels, **end, **options).double()


def student_and_target(
    net: Module,
    labels: Tensor | None,
    augment_labels: Tensor | None,
    rng,
    sync_dropout: bool,
    target: Module | None = None,
    rows: Tensor | None = None,
) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """The denoiser that trains, and the denoiser of its targets.

    Args:
        sync_dropout: both see the same dropout masks.
        target: network of the targets; None: `net` itself, without DDP, because no gradients flow there.
        rows: [M] int64 images that have such a target; None: all.
    """
    masks = dropout_masks(net, rng)
    target_masks = masks if sync_dropout else dropout_masks(net, rng, 'target dropout')
    target = unwrap(net) if target is None else target
    return (
        denoiser(net, labels, augment_labels, masks),
        denoiser(target, labels, augment_labels, target_masks, rows),
    )


# ----------------------------------------------------------------------------
# Statistics.


@functools.cache
def _bin_edges(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(SIGMA_BIN_EDGES, dtype=torch.float64).to(device, dtype)


def report_by_sigma(sigma: Tensor, loss: Tensor) -> None:
    """Report the losses [N] by bins of the noise levels [N], as `Loss/sigma_<low>-<high>`."""
    index = torch.bucketize(sigma.detach().contiguous(), _bin_edges(sigma.device, sigma.dtype))
    training_stats.report_bins([f'Loss/sigma_{name}' for name in SIGMA_BINS], index, loss)


def report_levels(sigma_t: Tensor, loss: Tensor) -> None:
    """Report the noise levels [N] that images are trained at, and their losses [N]."""
    training_stats.report('Edges/log10_sigma_t', sigma_t.log() / math.log(10))
    report_by_sigma(sigma_t, loss)
