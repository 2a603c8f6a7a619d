"""A network's parameters as views of one vector, so that optimizer, averages and norms take one operation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

ALIGNMENT = 16  # elements: every parameter starts on a 64-byte boundary of FP32


def layout(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Aligned starts of parameters of these sizes in a vector, and its length."""
    # Rounded up, so that every start is aligned.
    ends = itertools.accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
    *starts, total = [0, *ends]
    return starts, total


class FlatParameters:
    """Move the parameters of `net` into one vector, in place; they become views, and `net` works as before.

    Alignment gaps are zeros and have zero gradients. Move the network to its device and type first.

    A process may hold only its share of the vector: see `ShardedParameters`, for which the methods are.

    Attributes:
        weights: [n] Parameter. If the network trains, its `grad` is the vector of all gradients.
    Raises: ValueError if parameters differ in type or device.
    """

    sharded = False

    def __init__(self, net: torch.nn.Module):
        parameters = list(net.parameters())
        kinds = {(p.dtype, p.device) for p in parameters}
        if len(kinds) != 1:
            raise ValueError(f'parameters of several types or devices: {sorted(map(str, kinds))}')

        # Lay the parameters out at aligned starts.
        starts, total = layout([p.numel() for p in parameters])
        vector = parameters[0].new_zeros(total, requires_grad=False)
        gradient = torch.zeros_like(vector)

        # Copy each into its place. `.data` replaces the storage; the Parameter objects stay.
        for start, parameter in zip(starts, parameters):
            view = vector[start : start + parameter.numel()].view(parameter.shape)
            view.copy_(parameter.detach())
            parameter.data = view
            if parameter.requires_grad:
                parameter.grad = gradient[start : start + parameter.numel()].view(parameter.shape)
        self.weights = torch.nn.Parameter(vector, requires_grad=parameters[0].requires_grad)
        if self.weights.requires_grad:
            self.weights.grad = gradient

    @property
    def size(self) -> int:
        """Length of the vector of the whole network."""
        return len(self.weights)

    def zero_gradients(self) -> None:
        """Before a step."""
        self.weights.grad.zero_()

    def take_gradients(self) -> None:
        """After the backward pass: `weights.grad` is the gradient."""

    def publish(self) -> None:
        """After an update: the network has the weights of the vector."""

    def absorb(self) -> None:
        """After the network's weights have changed: the vector has them."""

    def own_part(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """What this process has of a parameter."""
        return parameter.detach()

    def norm(self, vector: torch.Tensor) -> torch.Tensor:
        """Euclidean norm of a vector like `weights`; [] on the device."""
        return torch.linalg.vector_norm(vector)

    def whole(self, vector: torch.Tensor) -> torch.Tensor | None:
        """A vector like `weights` for the whole network; on the main process."""
        return vector

    def share(self, whole: torch.Tensor) -> torch.Tensor:
        """Inverse of `whole`, on every process."""
        return whole

    def distance(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Euclidean distance of two vectors like `weights`; [] on the device."""
        return torch.dist(a, b)

    def state_dict(self, net: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Tensors of the whole network; on the main process."""
        return dict(net.state_dict())

    def load_state_dict(self, net: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
        """Inverse of `state_dict`, on every process. Raises: RuntimeError for those of another network."""
        net.load_state_dict(state)
