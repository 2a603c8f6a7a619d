"""A network's parameters divided among processes by FSDP2, and each process's share of them as one vector.

Every process evaluates the whole network: FSDP2 gathers the parameters block by block in the first forward pass
of a step and keeps them until the backward pass, which averages gradients over the processes and leaves each its
share. Those of a frozen network are gathered in every pass, and not kept. Optimizer and averages work on shares.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from torch_utils.flat import FlatParameters, layout


class ShardedParameters(FlatParameters):
    """Divides `net` among the processes, in place; the interface is that of `FlatParameters`.

    A parameter is divided along its first dimension. Scalars, which FSDP2 does not divide, are the same on all
    processes, and come last in a share. Vectors of the whole network have the layout of `FlatParameters`, so
    states are alike whatever the number of processes, divided or not.

    Args:
        net: the same network on every process, on its device.
        blocks: parts of it that are gathered one after another.
    Attributes:
        weights: [m] Parameter, this process's share. If the network trains, `grad` is that of the gradient, after
            `take_gradients`.
        parameters: those of the network, DTensors but for scalars.
    """

    sharded = True

    def __init__(self, net: torch.nn.Module, blocks: Iterable[torch.nn.Module]):
        # The network before it is divided, with parameters that have no values.
        meta = {
            id(p): torch.nn.Parameter(torch.empty_like(p, device='meta'), requires_grad=False)
            for p in net.parameters()
        }
        self._template = copy.deepcopy(net, meta).eval()

        # Divide it. Gathered blocks stay until the backward pass, if there is one, because the network may be
        # evaluated several times in a step.
        trains = any(parameter.requires_grad for parameter in net.parameters())
        device = next(net.parameters()).device
        self.mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        scalars = {parameter for parameter in net.parameters() if parameter.ndim == 0}
        for part in (*blocks, net):
            if any(parameter.ndim for parameter in part.parameters()):
                fully_shard(part, mesh=self.mesh, reshard_after_forward=not trains, ignored_params=scalars)

        # This process's share: vectors first, then scalars.
        self.parameters = list(net.parameters())
        self._shapes = [parameter.shape for parameter in self.parameters]
        self._starts, self._size = layout([shape.numel() for shape in self._shapes])
        own = [own_part(parameter) for parameter in self.parameters]
        order = sorted(range(len(own)), key=lambda i: self.parameters[i].ndim == 0)
        starts, total = layout([own[i].numel() for i in order])
        self._places = sorted(zip(order, starts, (own[i].shape for i in order)))
        self._scalars = next((s for i, s in zip(order, starts) if self.parameters[i].ndim == 0), total)
        self.weights = torch.nn.Parameter(own[0].new_zeros(total), requires_grad=trains)
        if trains:
            self.weights.grad = torch.zeros_like(self.weights, requires_grad=False)
        self.absorb()

    def parts(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """Views of a share, [m], as this process's parts of the parameters, in their order."""
        return [vector[start : start + shape.numel()].view(shape) for _, start, shape in self._places]

    # Between the network and the share.

    def own_part(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        return own_part(parameter)

    @torch.no_grad()
    def absorb(self) -> None:
        torch._foreach_copy_(self.parts(self.weights.detach()), list(map(own_part, self.parameters)))

    @torch.no_grad()
    def publish(self) -> None:
        torch._foreach_copy_(list(map(own_part, self.parameters)), self.parts(self.weights.detach()))

    def zero_gradients(self) -> None:
        self.weights.grad.zero_()
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Means over the processes. Parameters that were not used have zeros."""
        views = self.parts(self.weights.grad)
        pairs = [(view, own_part(p.grad)) for view, p in zip(views, self.parameters) if p.grad is not None]
        torch._foreach_copy_([view for view, _ in pairs], [gradient for _, gradient in pairs])
        # FSDP2 has averaged all but scalars.
        scalars = self.weights.grad[self._scalars :]
        if len(scalars):
            dist.all_reduce(scalars)
            scalars.div_(self.mesh.size())
        for parameter in self.parameters:
            parameter.grad = None

    def norm(self, vector: torch.Tensor) -> torch.Tensor:
        # Scalars, which all processes have, count once.
        own, scalars = vector.detach()[: self._scalars], vector.detach()[self._scalars :]
        total = torch.linalg.vector_norm(own).square()
        dist.all_reduce(total)
        return (total + torch.linalg.vector_norm(scalars).square()).sqrt()

    # Vectors of the whole network. All processes call these together.

    @property
    def size(self) -> int:
        return self._size

    @torch.no_grad()
    def whole(self, vector: torch.Tensor, device: torch.device | None = None) -> torch.Tensor | None:
        """The vector [n] whose shares the processes hold: on `device` of every process, or on the CPU of the main
        one and None elsewhere."""
        held = device is not None or dist.get_rank() == 0
        result = torch.zeros(self.size, dtype=vector.dtype, device=device or 'cpu') if held else None
        for start, shape, parameter, part in zip(
            self._starts, self._shapes, self.parameters, self.parts(vector)
        ):
            if isinstance(parameter, DTensor):
                like = dict(shape=shape, stride=parameter.stride())
                part = DTensor.from_local(part, self.mesh, parameter.placements, **like).full_tensor()
            if held:
                result[start : start + shape.numel()].copy_(part.flatten())
        return result

    @torch.no_grad()
    def share(self, whole: torch.Tensor) -> torch.Tensor:
        """This process's share [m], on the device, of a vector [n] that every process has."""
        result = torch.zeros_like(self.weights, requires_grad=False)
        for start, shape, parameter, part in zip(
            self._starts, self._shapes, self.parameters, self.parts(result)
        ):
            value = whole[start : start + shape.numel()].view(shape).to(part)
            if isinstance(parameter, DTensor):
                own = distribute_tensor(value, self.mesh, parameter.placements, src_data_rank=None)
                value = own.to_local()
            part.copy_(value)
        return result

    def distance(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.norm(a - b)

    def state_dict(self, net: torch.nn.Module) -> dict[str, torch.Tensor]:
        whole = self.whole(self.weights.detach())
        return {} if whole is None else dict(self.network(whole).state_dict())

    @torch.no_grad()
    def load_state_dict(self, net: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
        self.weights.copy_(self.share(self.flattened(state)))
        self.publish()

    def flattened(self, state: dict[str, torch.Tensor]) -> torch.Tensor:
        """The parameters among the tensors of a network as a vector [n].

        Raises: RuntimeError for those of another network.
        """
        net = self.network(torch.zeros(self.size, dtype=self.weights.dtype))
        net.load_state_dict(state)
        vector = torch.zeros(self.size, dtype=self.weights.dtype)
        for start, parameter in zip(self._starts, net.parameters()):
            vector[start : start + parameter.numel()].copy_(parameter.flatten())
        return vector

    def network(self, whole: torch.Tensor) -> torch.nn.Module:
        """A copy of the network, not divided, whose parameters are views of the vector [n]."""
        net = copy.deepcopy(self._template)
        for start, (name, parameter) in zip(self._starts, list(net.named_parameters())):
            module, _, leaf = name.rpartition('.')
            view = whole[start : start + parameter.numel()].view(parameter.shape)
            setattr(net.get_submodule(module), leaf, torch.nn.Parameter(view, requires_grad=False))
        return net.to(whole.device)


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a parameter or gradient; a scalar itself."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
