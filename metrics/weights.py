"""Named tensors of a file into a network: all of them, or a message that says what does not fit."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dnnlib.util import UserError

SHOWN = 3  # names of each kind in a message


def load_weights(network: torch.nn.Module, weights: object, source: str, what: str) -> None:
    """Copies `weights`, {name: tensor}, into a network that has exactly these names and shapes.

    The counters of batch normalization (`num_batches_tracked`) may be absent, as in files of PyTorch before
    0.4.1; they change nothing.

    Args:
        source, what: for messages: the file, and what it should be.
    Raises: UserError, naming all that is wrong, where anything is missing, superfluous, misshapen, not a
        tensor or not finite.
    """
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
        raise UserError(
            f'{source} holds a {type(weights).__name__}, not the named tensors of {what}. Give the state '
            'dict itself.'
        )
    wanted = network.state_dict()
    counters = {
        name: torch.zeros_like(tensor)
        for name, tensor in wanted.items()
        if name.endswith('num_batches_tracked')
    }
    shared = {name: value for name, value in weights.items() if name in wanted}
    problems = {
        'lacks': [name for name in wanted if name not in weights and name not in counters],
        'has besides': [name for name in weights if name not in wanted],
        'has no plain tensor at': [name for name, value in shared.items() if not _is_plain(value)],
    }
    tensors = {name: value for name, value in shared.items() if _is_plain(value)}
    problems['has another shape at'] = [
        f'{name} {list(value.shape)} instead of {list(wanted[name].shape)}'
        for name, value in tensors.items()
        if value.shape != wanted[name].shape
    ]
    problems['has NaN or infinite numbers at'] = [
        name for name, value in tensors.items() if not value.isfinite().all()
    ]
    if found := [f'{problem} {_some(names)}' for problem, names in problems.items() if names]:
        raise UserError(
            f'{source} does not hold the weights of {what}: it {"; ".join(found)}. Check which file it is.'
        )
    network.load_state_dict({**counters, **tensors})


def _is_plain(value: object) -> bool:
    """Whether it is a dense tensor of real numbers, in memory."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == 'cpu'
        and not value.is_quantized
        and not value.is_complex()
    )


def _some(names: list[str]) -> str:
    more = f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
    return ', '.join(names[:SHOWN]) + more
