"""How networks are run, which changes their speed and memory and not what they are: precision, memory format,
checkpointing, compilation."""

from __future__ import annotations

import torch

COMPILATIONS = 64  # far more than a run needs: beyond them PyTorch would go on eagerly, with a warning
PRECISIONS = ('fp32', 'fp16', 'bf16', 'fp64')


def in_precision(net: torch.nn.Module, precision: str) -> torch.nn.Module:
    """The network, set to compute in one of PRECISIONS; its weights are FP32, or FP64 with fp64. Copies and
    snapshots of it do likewise."""
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
    """The network, in place, set to run in a certain way, which copies and snapshots of it know nothing of.

    Args:
        channels_last: channels of an image lie next to each other in memory inside.
        checkpoint_activations: a backward pass keeps what goes in and out of the U-Net's blocks and computes
            the rest again.
        compiled: by `torch.compile`, at the first calls: once with gradients and once without, and again for
            batches of any size where another size follows the first. Noise levels are tensors, so a new
            level, or T, compiles nothing.
        cuda_graphs: what is compiled for a GPU is launched as CUDA graphs; for networks whose answer is used
            up before the next call.
    """
    # They are of one class, and PyTorch counts what is compiled for all of them together: sizes, with
    # gradients and without
    if compiled:
        torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, COMPILATIONS)
    for part in networks_in(net):
        part.channels_last, part.model.checkpoint_activations = channels_last, checkpoint_activations
        if compiled:
            part.compile(options={'triton.cudagraphs': True} if cuda_graphs and is_on_gpu(part) else None)
    return net


def hold_in_half(net: torch.nn.Module) -> torch.nn.Module:
    """The network, in place, whose convolutions hold their weights in the half precision that they compute
    in; for one that is only asked.

    They are rounded before instead of at every call, so the answers are the same, bit for bit. EDM2's weights
    stay as they are, since they are normalized in FP32 at every call.
    """
    from training.networks import Conv2d

    for part in networks_in(net):
        half = (
            torch.bfloat16 if part.use_bf16 else torch.float16 if part.use_fp16 and is_on_gpu(part) else None
        )
        for module in part.modules() if half else ():
            if isinstance(module, Conv2d):
                for name in ('weight', 'bias'):
                    if (parameter := getattr(module, name)) is not None:
                        parameter.requires_grad_(False).data = parameter.data.to(half)
    return net


def networks_in(net: torch.nn.Module) -> list[torch.nn.Module]:
    """The denoisers with a U-Net of their own: `net`, or the two that it is made of."""
    return [net] if hasattr(net, 'model') else [net.high, net.low]


def is_on_gpu(net: torch.nn.Module) -> bool:
    """Whether it computes there."""
    return next(net.parameters()).is_cuda
