"""Gradients of a step on their way into one vector: rounded weights and their gradients in half precision, and means
over the processes, reduced while the backward pass runs."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator

import torch
import torch.distributed as dist
from torch.nn import Parameter

from torch_utils import distributed
from torch_utils.flat import FlatParameters, layout

SLICE = 25 << 20  # bytes of the gradient in FP32 that are reduced at once


class Gradients:
    """The network that a step evaluates, and its gradients, which come to `flat.weights.grad`.

    Weights that the network rounds to half precision in every pass are rounded once a step instead, all by one
    operation, and their gradients are added to those in FP32 by one after every backward pass: the same numbers, bit
    for bit, by three kernels a weight less.

    Several processes reduce the vector slice by slice. A slice is complete when each of its parameters has its
    gradient, but all processes reduce slices in one order, from the end of the vector, where gradients arrive first.
    Gradients that FSDP2 has divided are left alone.

    Args:
        net: the network that trains.
        flat: its parameters as one vector.
        rounded: those of its parameters that are rounded.
        dtype: the type that they are rounded to.
    Attributes:
        net: what a step evaluates: the network itself, or a copy with rounded weights that shares everything else.
        vectors: the rounded weights and their gradients, [n] each, if there are any.
    """

    def __init__(
        self,
        net: torch.nn.Module,
        flat: FlatParameters,
        rounded: Collection[Parameter] = (),
        dtype: torch.dtype | None = None,
    ):
        self.net, self.flat, self.vectors = net, flat, ()
        self._processes = 1 if flat.sharded else distributed.get_world_size()
        self._starts, total = layout([parameter.numel() for parameter in net.parameters()])
        if rounded:
            zeros = lambda: torch.zeros(total, dtype=dtype, device=flat.weights.device)
            self.vectors = zeros(), zeros()
            self.net = self._copy(net, rounded)

        self._trains = True
        self._trained = [parameter for parameter in self.net.parameters() if parameter.requires_grad]

        # What the reduction waits for.
        self._slices, self._reducing = [(0, total)], False
        if self._processes > 1:
            self._slices = self._cut(total)
            self._watch()

    def _copy(self, net: torch.nn.Module, rounded: Collection[Parameter]) -> torch.nn.Module:
        """The network with views of the rounded weights in place of some of its parameters."""
        kept, ours = set(map(id, rounded)), {id(buffer): buffer for buffer in net.buffers()}
        for start, parameter in zip(self._starts, net.parameters()):
            ours[id(parameter)] = parameter
            if id(parameter) in kept:
                end = start + parameter.numel()
                weights, gradient = (vector[start:end].view(parameter.shape) for vector in self.vectors)
                ours[id(parameter)] = Parameter(weights, parameter.requires_grad)
                ours[id(parameter)].grad = gradient
        return copy.deepcopy(net, ours)

    def _cut(self, total: int) -> list[tuple[int, int]]:
        """Slices of the vector that begin at parameters."""
        cuts = [0]
        for start in self._starts:
            if start - cuts[-1] >= SLICE // 4:
                cuts.append(start)
        return list(zip(cuts, [*cuts[1:], total]))

    def _watch(self) -> None:
        """Have every parameter tell when its gradient is complete."""
        self._expected, index = [0] * len(self._slices), 0
        for start, parameter in zip(self._starts, self.net.parameters()):
            index += start >= self._slices[index][1]
            if parameter.requires_grad:
                self._expected[index] += 1
                parameter.register_post_accumulate_grad_hook(lambda _, index=index: self._arrived(index))

    # ------------------------------------------------------------------------
    # A step.

    @torch.no_grad()
    def begin_step(self, trains: bool = True) -> None:
        """Before the first round: gradients are zero, and weights rounded.

        Args:
            trains: whether the weights take gradients in this step, in which the network is evaluated in any case.
        """
        if trains != self._trains and not self.flat.sharded:
            for parameter in self._trained:
                parameter.requires_grad_(trains)
            self._trains = trains
        self.flat.zero_gradients()
        if self.vectors:
            weights, gradient = self.vectors
            weights.copy_(self.flat.weights)
            gradient.zero_()

    @contextlib.contextmanager
    def round(self, last: bool) -> Iterator[None]:
        """A block with the backward pass of a micro-batch. After the last one the gradients are the means over the
        processes of what all rounds have added up to."""
        self._reducing = last and self._processes > 1
        if self._reducing:
            self._missing, self._next, self._pending = list(self._expected), len(self._slices) - 1, []
        yield
        if not self._reducing:
            self._take(0, None)
            return

        # What remains has parameters without a gradient in this round.
        while self._next >= 0:
            self._reduce()
        for work in self._pending:
            work.wait()
        self._reducing = False

    def _arrived(self, index: int) -> None:
        """A parameter of a slice has its gradient."""
        if self._reducing:
            self._missing[index] -= 1
            while self._next >= 0 and not self._missing[self._next]:
                self._reduce()

    @torch.no_grad()
    def _reduce(self) -> None:
        """Begin to average the next slice."""
        part = self._take(*self._slices[self._next])
        # Before the sum, which could overflow.
        part.mul_(1 / self._processes)
        self._pending.append(dist.all_reduce(part, async_op=True))
        self._next -= 1

    @torch.no_grad()
    def _take(self, start: int, end: int | None) -> torch.Tensor:
        """Part of the vector, with what the last backward pass has left in half precision."""
        part = self.flat.weights.grad[start:end]
        if self.vectors:
            left = self.vectors[1][start:end]
            part.add_(left)
            left.zero_()
        return part
