"""Load a file's named tensors into a network: exactly its names and shapes, or an error with all problems."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dnnlib.util import UserError

SHOWN = 3  # names per problem in a message


def load_weights(network: torch.nn.Module, weights: object, source: str, what: str) -> None:
    """Copy `weights`, {name: tensor}, into a network with exactly these names and shapes.

    Batch normalization's counters (`num_batches_tracked`) may be missing, as in files of PyTorch before
    0.4.1; they have no effect here.

    Args:
        source, what: the file and its expected contents, for messages.
    Raises: UserError listing all names that are missing, unexpected, misshapen, not tensors or not finite.
    """
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
        raise UserError(
            f'{source} holds a {type(weights).__name__}, not the named tensors of {what}. Give the state '
            'dict itself.'
        )

    # Old files may lack the counters of batch normalization.
    wanted = network.state_dict()
    counters = {
        name: torch.zeros_like(tensor)
        for name, tensor in wanted.items()
        if name.endswith('num_batches_tracked')
    }

    # Collect all problems before reporting.
    shared = {name: value for name, value in weights.items() if name in wanted}
    problems = {
        'lacks': [name for name in wanted if name not in weights and name not in counters],
        'has unexpected': [name for name in weights if name not in wanted],
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
    """Whether it is a dense CPU tensor of real numbers."""
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
