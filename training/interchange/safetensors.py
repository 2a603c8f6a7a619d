"""Networks as one safetensors file: the tensors, and a JSON configuration under `config` in the header's
metadata.

The configuration holds what a snapshot holds besides tensors: class name, constructor arguments, numeric
attributes, metadata and its digest. So the network that is read equals the one that was written. JSON has
neither tuples nor infinities: see `to_json`.
"""

from __future__ import annotations

import json
import math
import os

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

import dnnlib
from dnnlib import UserError
from dnnlib.limits import SAFETENSORS_HEADER, UNREADABLE, TooLarge, check_size
from torch_utils.restricted_pickle import MalformedPickle, plain
from training import checkpoint

FORMAT = 'multistep-consistency-edm 1'

# ----------------------------------------------------------------------------
# Plain data as strict JSON.


def to_json(value):
    """Plain data in values that strict JSON preserves: tuples, non-finite numbers and dicts that would look
    like either are tagged.

    A tag is a dict of one key: {'$tuple': [...]}, {'$float': 'inf'}, {'$dict': {...}}.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return {'$float': str(value)}
    if isinstance(value, tuple):
        return {'$tuple': [to_json(item) for item in value]}
    if isinstance(value, list):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        items = {key: to_json(item) for key, item in value.items()}
        return {'$dict': items} if len(items) == 1 and next(iter(items)).startswith('$') else items
    return value


def from_json(value):
    """The inverse of `to_json`. Raises: ValueError, TypeError or AttributeError for tags that hold something
    else."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    tag, content = next(iter(value.items())) if len(value) == 1 else (None, None)
    if tag == '$float':
        return float(content)
    if tag == '$tuple':
        return tuple(from_json(content))
    return {key: from_json(item) for key, item in (content if tag == '$dict' else value).items()}


# ----------------------------------------------------------------------------
# Files.


def save_safetensors(path: str | os.PathLike, net: torch.nn.Module) -> None:
    """Writes a network and its `metadata`. Raises: UserError if the file cannot be written."""
    # The digest is computed anew, because metadata may have changed.
    metadata = {name: value for name, value in net.metadata.items() if name != 'digest'}
    metadata['digest'] = checkpoint.network_digest(net, metadata)
    config = dict(
        format=FORMAT,
        class_name=type(net).__name__,
        args=net.init_args,
        kwargs=net.init_kwargs,
        attributes=checkpoint.numeric_attributes(net),
        metadata=metadata,
    )

    # One file: the configuration in its header, then the tensors.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    data = safetensors.torch.save(tensors, dict(config=json.dumps(to_json(plain(config)), allow_nan=False)))
    with dnnlib.util.atomic_write(path) as file:
        file.write(data)


def load_safetensors(source: str | os.PathLike) -> torch.nn.Module:
    """The network that `save_safetensors` wrote, as `load_network` would return it.

    Args:
        source: path or http(s) URL.
    Raises: UserError, naming the source, if the file is damaged or not of this format.
    """
    # Build the network from the configuration and fill in the tensors.
    path = dnnlib.downloads.local_path(source)
    try:
        with open(path, 'rb') as file:
            check_size(
                int.from_bytes(file.read(8), 'little'), SAFETENSORS_HEADER, 'the header of a safetensors file'
            )
        with safe_open(path, framework='pt') as file:
            config = _parse_config((file.metadata() or {}).get('config'))
            net = checkpoint.build_unfilled(config['class_name'], config['args'], config['kwargs'])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        net.load_state_dict(tensors, assign=True)
        checkpoint.restore_attributes(net, config['attributes'])
    except (SafetensorError, *UNREADABLE) as error:
        reason = (
            f'it {error}'
            if isinstance(error, (MalformedPickle, TooLarge))
            else str(error).partition('\n')[0] or type(error).__name__
        )
        raise UserError(
            f'{os.fspath(source)} cannot be used as a network in safetensors format: {reason}.'
        ) from error

    # Check that the contents are those that were written, and make sense.
    net.requires_grad_(False).metadata = config['metadata']
    if checkpoint.network_digest(net, net.metadata) != net.metadata.get('digest'):
        raise UserError(
            f'{os.fspath(source)} is damaged: its contents do not match their digest. Copy or download it '
            'again.'
        )
    try:
        checkpoint.check_metadata(net)
    except ValueError as error:
        raise UserError(
            f'{os.fspath(source)} cannot be used as a network in safetensors format: it {error}.'
        ) from error
    return net


def _parse_config(text: str | None) -> dict:
    if text is None:
        raise MalformedPickle(
            'has no configuration of ours in its header; only files written by convert.py can be read'
        )
    # Entries and their kinds are checked here, so that what follows can rely on them.
    try:
        config = plain(from_json(json.loads(text)))
        kinds = dict(format=str, class_name=str, args=tuple, kwargs=dict, attributes=dict, metadata=dict)
        if not isinstance(config, dict) or any(
            not isinstance(config.get(name), kind) for name, kind in kinds.items()
        ):
            raise ValueError('entries are missing')
    except UNREADABLE as error:
        raise MalformedPickle(f'has a configuration that makes no sense ({error})') from error
    if config['format'] != FORMAT:
        raise MalformedPickle(f'is in format {config["format"]!r}; this version reads {FORMAT!r}')
    return config
