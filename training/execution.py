"""How networks run, which affects speed and memory only: precision, memory format, checkpointing,
compilation."""

from __future__ import annotations

import torch

from torch_utils.flat import FlatParameters

COMPILATIONS = 64  # far more than a run needs; beyond this limit PyTorch falls back to eager mode
PRECISIONS = ('fp32', 'fp16', 'bf16', 'fp64')


def in_precision(net: torch.nn.Module, precision: str) -> torch.nn.Module:
    """Make the network, its copies and snapshots compute in one of PRECISIONS; weights are FP32, or FP64 for
    fp64."""
    for part in networks_in(net):
        part.use_fp16, part.use_bf16 = precision == 'fp16', precision == 'bf16'
    return net.double() if precision == 'fp64' else net


def run_with(
    net: torch.nn.Module,
    *,
    channels_last: bool = False,
    checkpoint_activations: bool = False,
    compiled: bool = False,
    cuda_graphs: bool = False,
) -> torch.nn.Module:
    """Set how the network runs, in place; its copies and snapshots are not affected.

    Args:
        channels_last: use the channels-last memory format inside, where it lasts (`keeps_channels_last`).
        checkpoint_activations: keep only inputs and outputs of the U-Net's blocks for the backward pass, and
            recompute the rest.
        compiled: apply `torch.compile` at the first calls: with gradients, without, and once more for dynamic
            batch sizes when a second size occurs. Noise levels are tensors and cause no recompilation.
        cuda_graphs: launch compiled GPU code as CUDA graphs; for networks whose output is consumed before
            the next call.
    """
    # PyTorch counts compilations per class, over all networks, sizes and gradient modes together.
    if compiled:
        torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, COMPILATIONS)
    channels_last = channels_last and keeps_channels_last(net, compiled)
    for part in networks_in(net):
        part.channels_last, part.model.checkpoint_activations = channels_last, checkpoint_activations
        if compiled:
            part.compile(options={'triton.cudagraphs': True} if cuda_graphs and is_on_gpu(part) else None)
    return net


def keeps_channels_last(net: torch.nn.Module, compiled: bool, on_gpu: bool | None = None) -> bool:
    """Whether values stay in the channels-last format: on GPUs, PyTorch's group normalization returns the other
    one, from which every convolution would convert. Compiled code, and EDM2's networks, have none.

    Args:
        on_gpu: where it will run; None: where it is.
    """
    from training.networks import GroupNorm

    on_gpu = is_on_gpu(net) if on_gpu is None else on_gpu
    return compiled or not (on_gpu and any(isinstance(part, GroupNorm) for part in net.modules()))


CHANNELS_LAST_IGNORED = (
    '--channels_last is ignored without --compile, because group normalization would undo it in every block.'
)


def hold_in_half(net: torch.nn.Module) -> torch.nn.Module:
    """Store weights of convolutions and norms in the half precision of their computation, in place, for a frozen
    network.

    Weights are rounded once instead of at every call, so outputs are the same bit for bit.
    """
    for part in networks_in(net):
        parameters, half = rounded_parameters(part)
        for parameter in parameters:
            parameter.requires_grad_(False).data = parameter.data.to(half)
    return net


def rounded_parameters(net: torch.nn.Module) -> tuple[list[torch.nn.Parameter], torch.dtype | None]:
    """Parameters that a denoiser with a U-Net rounds to half precision as it is set to run, and the type."""
    half = torch.bfloat16 if net.use_bf16 else torch.float16 if net.use_fp16 and is_on_gpu(net) else None
    return (parameters_in_half(net) if half else []), half


def parameters_in_half(net: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Parameters that networks in half precision round as they are: those of convolutions and norms. EDM2's are not
    among them, because they are normalized in FP32 at every call."""
    from training.networks import Conv2d, GroupNorm

    layers = [module for module in net.modules() if isinstance(module, (Conv2d, GroupNorm))]
    return [parameter for layer in layers for parameter in layer.parameters(recurse=False)]


def blocks_of(net: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers of the U-Nets, in the order in which they run."""
    unets = [part.unet if hasattr(part, 'unet') else part.model for part in networks_in(net)]
    return [block for unet in unets for block in (*unet.enc.values(), *unet.dec.values())]


def leave_unit_weights(net: torch.nn.Module) -> None:
    """Let `force_unit_weights` do what EDM2's networks do to their weights in a forward pass of training.

    For weights that are divided among processes; and for compiled networks, whose code may round otherwise on
    another machine, so that weights would drift apart.
    """
    for part in networks_in(net):
        if hasattr(part, 'forces_unit_weights'):
            part.forces_unit_weights = False


@torch.no_grad()
def force_unit_weights(net: torch.nn.Module, parameters: FlatParameters) -> None:
    """Before a step, normalize the weights of EDM2's networks (Karras et al. 2024, Eq. 66) that do not do so
    themselves. If they are divided among processes, rows, which are normalized, are each on one."""
    left = [part for part in networks_in(net) if not getattr(part, 'forces_unit_weights', True)]
    if not left:
        return
    from training.networks.edm2 import MPConv, normalize_weight

    layers = [m for part in left for m in part.modules() if isinstance(m, MPConv) and m.weight.requires_grad]
    for layer in layers:
        own = parameters.own_part(layer.weight)
        own.copy_(normalize_weight(own))
    parameters.absorb()


def networks_in(net: torch.nn.Module) -> list[torch.nn.Module]:
    """The denoisers with a U-Net: `net`, or those that it consists of."""
    if hasattr(net, 'model'):
        return [net]
    return [part for child in net.children() for part in networks_in(child)]


def is_on_gpu(net: torch.nn.Module) -> bool:
    """Whether the network is on a GPU."""
    return next(net.parameters()).is_cuda
