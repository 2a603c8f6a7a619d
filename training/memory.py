"""Memory of a process in training by part, from the shapes of its tensors alone. docs/scaling.md has the formula."""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from dnnlib import EasyDict
from torch_utils.flat import FlatParameters
from torch_utils.gradients import Gradients
from training import execution
from training.objectives.loss import State
from training.starting_point import as_denoiser, on_meta

PRIME = 1_000_003  # images; no size of a network's weights is divisible by it


def parts(
    c: EasyDict,
    net: torch.nn.Module,
    teacher: torch.nn.Module | None,
    state: State,
    micro_batch: int,
    processes: int,
    on_gpu: bool,
    auxiliary: bool = False,
    passes: int = 1,
) -> dict[str, int]:
    """Bytes of a process by part, at the moment of a step that needs most; `averages` may be on the host.

    Of temporary tensors there are only those that a checkpointed block computes again.

    Args:
        c: the run's configuration.
        net, teacher, state: the networks, on any device (meta will do), and what the objective sets up.
        micro_batch: images of a pass.
        on_gpu: whether the run is on GPUs, where networks compute in FP16.
        auxiliary: whether a second network trains, which is not averaged.
        passes: networks of the student's size that a gradient goes through.
    """
    size = 8 if c.precision == 'fp64' else 4
    vector = size * sum(p.numel() for p in net.parameters())
    divided = c.get('shard') == 'optimizer' and processes > 1
    share = vector // processes if divided else vector
    # Of weights FSDP2 has a share, and the optimizer or the average another; those that train stay gathered.
    shares = 2 * share if divided else 0

    # Both half precisions take the same memory. FP16 is for GPUs only.
    half = c.precision == 'bf16' or (c.precision == 'fp16' and on_gpu)
    rounded = half and not divided and not state.in_fp32 and bool(execution.parameters_in_half(net))
    precision = 'bf16' if half else 'fp64' if c.precision == 'fp64' else 'fp32'
    held = half and teacher is not None and state.sampling_network(net) is net
    fixed, per_image = saved_for_backward(c.network, precision, rounded, c.checkpoint_activations)
    # Of weights and gradients, 2 bytes each.
    halves = vector if rounded else 0
    buckets = vector if c.compiled and processes > 1 and not divided else 0
    return dict(
        weights=vector + shares,
        rounded=halves,
        gradients=share,
        buckets=buckets,
        # Adam keeps two moments of each gradient.
        optimizer=2 * share,
        averages=(1 + len(c.phema_stds)) * share,
        target=(shares or vector) * len(state.networks()),
        auxiliary=vector + shares + halves + buckets + 3 * share if auxiliary else 0,
        teacher=0 if teacher is None else frozen_bytes(teacher, size, held),
        activations=passes * (fixed + micro_batch * per_image),
    )


def frozen_bytes(teacher: torch.nn.Module, size: int, held: bool) -> int:
    """Bytes of a teacher's weights of `size` bytes, some of them held in half precision (`execution.hold_in_half`)
    or not."""
    total = size * sum(p.numel() for p in teacher.parameters())
    return total - 2 * sum(p.numel() for p in execution.parameters_in_half(teacher)) if held else total


# ----------------------------------------------------------------------------
# Activations.


def saved_for_backward(
    network: Mapping, precision: str, rounded: bool = False, checkpointed: bool = False
) -> tuple[int, int]:
    """Bytes that a training pass of a network {class_name, kwargs} saves for the backward pass, apart from its
    parameters: bytes that do not depend on the number of images, and bytes for each image.

    Args:
        precision: fp32, bf16 or fp64.
        rounded: whether weights are rounded to half precision before the pass.
        checkpointed: whether blocks save their inputs alone. Then those are counted, and what the largest block
            computes again.
    """
    return _saved_bytes(json.dumps(network), precision, rounded, checkpointed)


@functools.cache
def _saved_bytes(network: str, precision: str, rounded: bool, checkpointed: bool) -> tuple[int, int]:
    net = execution.in_precision(on_meta(json.loads(network)), precision).train().requires_grad_(True)
    if rounded:
        net = Gradients(net, FlatParameters(net), *execution.rounded_parameters(net)).net

    # Of blocks and of what surrounds them.
    by_block = _saved_by_block(net)
    total = [sum(each) for each in zip(*by_block.values())]
    if not checkpointed:
        return tuple(total)
    largest = max(
        (sizes for block, sizes in by_block.items() if block is not None), key=lambda sizes: sizes[1]
    )
    execution.run_with(net, checkpoint_activations=True)
    return tuple(map(sum, zip(largest, *_saved_by_block(net).values())))


def _saved_by_block(net: torch.nn.Module) -> dict[int | None, list[int]]:
    """{index of a block, None outside of blocks: [bytes of saved tensors, bytes for each image]} of a pass.

    The meta device computes no numbers, so the pass is over a large prime number of images: a tensor depends on
    the images if its size is divisible by that.
    """
    own = {p.untyped_storage()._cdata for p in net.parameters()}
    kept, current, found = {}, [None], defaultdict(lambda: [0, 0])

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in kept:
            kept[storage._cdata] = storage  # alive, so that no other storage gets its address
            nbytes, of_images = storage.nbytes(), storage.nbytes() % PRIME == 0
            found[current[0]][of_images] += nbytes // PRIME if of_images else nbytes
        return tensor

    enter = lambda index: lambda *_: current.__setitem__(0, index)
    hooks = []
    for index, block in enumerate(execution.blocks_of(net)):
        hooks += [block.register_forward_pre_hook(enter(index)), block.register_forward_hook(enter(None))]
    with torch.device('meta'), FusedAttention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        images = torch.zeros(PRIME, net.img_channels, net.img_resolution, net.img_resolution)
        sigma, labels = torch.ones(PRIME), torch.zeros(PRIME, net.label_dim) if net.label_dim else None
        net(images, sigma, labels, dropout_masks=net.dropout_masks(PRIME), **as_denoiser(net, sigma))
    for hook in hooks:
        hook.remove()
    return found


class FusedAttention(TorchFunctionMode):
    """Has the meta device, which would form the matrix of attention, save what fused kernels do."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args)
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    """[N, heads, L, features] of q, k and v, without values."""

    @staticmethod
    def forward(ctx, q, k, v):
        result, logsumexp = (
            torch.empty_like(q),
            torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device),
        )
        ctx.save_for_backward(q, k, v, result, logsumexp)
        return result
