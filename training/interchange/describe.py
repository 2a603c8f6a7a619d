"""Descriptions of networks and training states for `convert.py info`."""

from __future__ import annotations

import math

import torch

from dnnlib import EasyDict, UserError
from dnnlib.text import printable as text_of
from torch_utils.restricted_pickle import MalformedPickle
from training import checkpoint
from training.phema import average_name


def describe(net: torch.nn.Module) -> dict:
    """Plain data about a network with `metadata`: its architecture, inputs, training, and the rest of its
    metadata."""
    arguments = checkpoint.constructor_arguments(net)
    metadata = dict(net.metadata)
    # EDM2's networks have a second child: the estimate of the loss.
    unet = next(child for child in net.children() if any(True for _ in child.parameters()))
    return dict(
        preconditioning=type(net).__name__,
        architecture=type(unet).__name__,
        arguments=arguments,
        parameters=sum(parameter.numel() for parameter in net.parameters()),
        dtypes=sorted({str(parameter.dtype).removeprefix('torch.') for parameter in net.parameters()}),
        resolution=net.img_resolution,
        channels=net.img_channels,
        labels=net.label_dim,
        augment_labels=arguments.get('augment_dim', 0),
        sigma_min=getattr(net, 'sigma_min', None),
        sigma_max=getattr(net, 'sigma_max', None),
        objective=metadata.pop('objective', None),
        grid=metadata.pop('sigmas', None),
        kimg=metadata.pop('kimg', None),
        metadata=metadata,
    )


def describe_state(source) -> dict:
    """Plain data about a training state: `describe` of a snapshot from it, and the position of the run.

    Raises: UserError, naming the source, if it is damaged or not a training state of ours.
    """
    state = checkpoint.read_state(source)

    # The network without weights, with the metadata of a snapshot.
    try:
        options, position = EasyDict(state['options']), state['progress']
        net = checkpoint.build_unfilled(options.network['class_name'], (), options.network['kwargs'])
        net.metadata = checkpoint.snapshot_metadata(options, position['nimg'])
        averages = ['ema', *(average_name(std) for std in state['averages']['phema'])]
    except (LookupError, AttributeError) as error:
        raise UserError(
            f'{source} is not a training state of this version of the program: it lacks {error.args[0]!r}.'
        ) from error
    except (TypeError, ValueError, MalformedPickle) as error:
        raise UserError(f'{source} is not a training state that can be described: {error}.') from error
    return dict(
        describe(net),
        tick=position.get('tick'),
        averages=averages,
        options={name: value for name, value in options.items() if name not in ('objective', 'network')},
    )


# ----------------------------------------------------------------------------
# Output.


def printable(value):
    """Plain data for strict JSON: non-finite numbers become the strings 'inf', '-inf' and 'nan'."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [printable(item) for item in value]
    if isinstance(value, dict):
        return {name: printable(item) for name, item in value.items()}
    return value


def as_text(facts: dict) -> str:
    """One line per fact, names in a column; nested facts are indented; long lists stay on one line."""
    width = max(len(text_of(name)) for name in facts)
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines.append(text_of(name) + ('' if value else ': none'))
            lines.extend('    ' + line for line in (as_text(value).splitlines() if value else []))
        else:
            lines.append(f'{text_of(name):{width}}  {text_of(as_phrase(value))}')
    return '\n'.join(lines)


def as_phrase(value) -> str:
    """A value in text for people."""
    if value is None:
        return '-'
    # Before integers, among which Python counts booleans.
    if isinstance(value, bool):
        return 'yes' if value else 'no'
    if isinstance(value, int):
        return f'{value:,}'
    if isinstance(value, float):
        return f'{value:g}'
    if isinstance(value, (list, tuple)):
        return ', '.join(map(as_phrase, value)) or 'none'
    return str(value)
