"""A network's parameters as views of one vector, so that optimizer, averages and norms take one operation."""

from __future__ import annotations

import itertools

import torch

ALIGNMENT = 16  # elements: every parameter starts on a 64-byte boundary of FP32


class FlatParameters:
    """Move the parameters of `net` into one vector, in place; they become views, and `net` works as before.

    Alignment gaps are zeros and have zero gradients. Move the network to its device and type first.

    Attributes:
        weights: [n] Parameter. If the network trains, its `grad` is the vector of all gradients.
    Raises: ValueError if parameters differ in type or device.
    """

    def __init__(self, net: torch.nn.Module):
        parameters = list(net.parameters())
        kinds = {(p.dtype, p.device) for p in parameters}
        if len(kinds) != 1:
            raise ValueError(f'parameters of several types or devices: {sorted(map(str, kinds))}')

        # Lay the parameters out at aligned starts.
        # Rounded up, so that every start is aligned.
        sizes = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in parameters]
        starts = [0, *itertools.accumulate(sizes)]
        vector = parameters[0].new_zeros(starts[-1], requires_grad=False)
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
