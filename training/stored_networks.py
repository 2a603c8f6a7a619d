"""Networks as files record them: a class name, constructor arguments, attributes and tensors.

`build_unfilled` makes one of our own classes from a record, after checking its arguments, without memory for
tensors; these are then read straight into place. Nothing in a record is executed.
"""

from __future__ import annotations

import inspect
import math
from typing import BinaryIO

import torch
from torch.overrides import TorchFunctionMode

from dnnlib.schema import check
from torch_utils.persistence import HERE_ONLY
from torch_utils.restricted_pickle import MalformedPickle, persistent_object, plain
from torch_utils.sealed_file import read_parts, read_sealed
from torch_utils.stored_tensors import LocatedTensor, Storages, StoredTensor
from training import networks, run_schema
from training.networks import edm2 as networks_edm2
from training.networks.switched import Switched

# ----------------------------------------------------------------------------
# What there may be.


# What a snapshot may hold: class name -> class.
NETWORKS = {**networks.PRECONDS, **networks_edm2.PRECONDS, Switched.__name__: Switched}
# Attributes that always equal the constructor argument of that name.
FIXED = ('img_resolution', 'img_channels', 'label_dim', 'switch')

# Limits of constructor arguments: entries of a list, characters of a string, absolute values by name.
MAX_ENTRIES, MAX_CHARACTERS, MAX_SIZE = 16, 32, 1 << 17
LIMITS = dict(
    num_blocks=32,
    M=10_000,
    channel_mult=1024,
    channel_mult_emb=1024,
    channel_mult_noise=1024,
    label_dim=1 << 20,
)

# ----------------------------------------------------------------------------
# Building.


def build_unfilled(class_name: str, args, kwargs) -> torch.nn.Module:
    """The network of a recorded class and constructor arguments, on the meta device, without memory.

    Raises: MalformedPickle if there is no such network.
    """
    cls = NETWORKS.get(class_name)
    if cls is None:
        raise MalformedPickle(f'holds a {class_name!r}, which is none of our networks: {", ".join(NETWORKS)}')

    # The arguments are plain data of a reasonable size.
    args, kwargs = plain(args), plain(kwargs)
    if not isinstance(args, tuple) or not isinstance(kwargs, dict):
        raise MalformedPickle('has no record of its constructor arguments')
    _check_arguments([*((f'argument {i}', value) for i, value in enumerate(args)), *kwargs.items()])

    # Build it. Wrong arguments can cause any of these errors.
    wrong = TypeError, ValueError, ArithmeticError, AttributeError, LookupError, NameError, RuntimeError
    try:
        with _Unfilled():
            net = cls(*args, **kwargs) if cls is not Switched else _switched_unfilled(*args, **kwargs)
    except wrong as error:
        raise MalformedPickle(
            f'has constructor arguments that {class_name} cannot be built from: {error}'
        ) from error
    return net.eval().requires_grad_(False)


def _check_arguments(values):
    """Refuse sizes that no network has, which would take forever to build, or fill the memory."""
    for name, value in values:
        longest = MAX_CHARACTERS if isinstance(value, str) else MAX_ENTRIES
        if isinstance(value, (str, list, tuple)) and len(value) > longest:
            raise MalformedPickle(f'asks for a network whose {name} has {len(value)} entries')
        limit = LIMITS.get(name, MAX_SIZE)
        if isinstance(value, (list, tuple)):
            _check_arguments((name, item) for item in value)
        elif isinstance(value, int) and abs(value) > limit:
            raise MalformedPickle(f'asks for a network whose {name} is beyond {limit:,}')


class _Unfilled(TorchFunctionMode):
    """A mode in which networks make tensors on the meta device and do not initialize them.

    `torch.device('meta')` alone would have PyTorch work out the result of initializing, in Python, with its
    compiler, which takes a second to import.
    """

    FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.randn, torch.rand)
    INITIALIZERS = (torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.mul)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self.FACTORIES:
            return torch.empty(*args, **{**kwargs, 'device': 'meta'})
        if function in self.INITIALIZERS and args[0].is_meta:
            return args[0]
        return function(*args, **kwargs)


def _switched_unfilled(high: dict, low: dict, switch: float) -> Switched:
    """A `Switched` from the `init_args` of its two networks, neither of which may be a `Switched`."""
    parts = []
    for part in (high, low):
        if not isinstance(part, dict) or part.get('class_name') == Switched.__name__:
            raise MalformedPickle(f'holds a {Switched.__name__!r} of something else than two networks')
        parts.append(build_unfilled(part.get('class_name'), part.get('args'), part.get('kwargs')))
    return Switched(*parts, switch)


def constructor_arguments(net: torch.nn.Module) -> dict:
    """The arguments that a network was built with, by name."""
    # What the constructor takes by name, and what it hands on to the U-Net.
    bound = inspect.signature(type(net).__init__).bind(net, *net.init_args, **net.init_kwargs).arguments
    own = {name: value for name, value in bound.items() if name not in ('self', 'model_kwargs')}
    return {**own, **bound.get('model_kwargs', {})}


# ----------------------------------------------------------------------------
# Tensors.


def tensors_of(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name."""
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def read_tensors(
    net: torch.nn.Module, stored: dict[str, StoredTensor], file: BinaryIO, size: int, seal: str | None
) -> dict[str, torch.Tensor]:
    """A network's tensors, read from a file, all of which is compared with its seal, if it has one.

    Raises: MalformedPickle if names, shapes or types are not the network's; DamagedFile.
    """
    located = _locate(net, stored, file, size)

    # Memory from this thread: what the allocator holds for other threads, it returns in between.
    elements = {name: torch.empty(tensor.extent, dtype=tensor.dtype) for name, tensor in located.items()}
    # Read straight into it. In pickles of an old protocol, tensors are text.
    parts = []
    for name, tensor in located.items():
        memory = elements[name].view(torch.uint8).numpy()
        if tensor.text is None:
            parts.append((tensor.start, memory))
        else:
            memory.data[:] = tensor.text_bytes()
    if seal:
        read_sealed(file, size, seal, parts)
    else:
        read_parts(file, parts)
    return {name: tensor.view(elements.pop(name)) for name, tensor in located.items()}


def _locate(
    net: torch.nn.Module, stored: dict[str, StoredTensor], file: BinaryIO, size: int
) -> dict[str, LocatedTensor]:
    """Positions of the network's tensors in the file."""
    # The names are the network's.
    expected = tensors_of(net)
    for what, names in (
        ('lacks', expected.keys() - stored.keys()),
        ('has unexpected', stored.keys() - expected.keys()),
    ):
        if names:
            listed = ', '.join(sorted(names)[:5]) + (', ...' if len(names) > 5 else '')
            raise MalformedPickle(f'{what} tensors: {listed}')

    # So are shapes and types.
    storages, located = Storages(file), {}
    for name, tensor in expected.items():
        if stored[name].shape != tuple(tensor.shape):
            raise MalformedPickle(
                f'has {name} of shape {list(stored[name].shape)}, its constructor arguments say '
                f'{list(tensor.shape)}'
            )
        located[name] = storages.locate(stored[name])
        if located[name].dtype.is_floating_point != tensor.is_floating_point():
            raise MalformedPickle(f'has {name} as {located[name].dtype}')

    # A small file must not fill the memory by tensors that share its bytes.
    if sum(tensor.nbytes for tensor in located.values()) > size:
        raise MalformedPickle('has tensors that share memory: together they are larger than the file')
    return located


def fill(net: torch.nn.Module, tensors: dict[str, torch.Tensor], device: torch.device):
    """Give an unfilled network its tensors, each with its own dtype."""
    for prefix, module in net.named_modules():
        for table in (module._parameters, module._buffers):
            for name in [name for name, tensor in table.items() if tensor is not None]:
                tensor = tensors.pop(f'{prefix}.{name}' if prefix else name).to(device)
                if table is module._parameters:
                    tensor = torch.nn.Parameter(tensor, requires_grad=False)
                table[name] = tensor


# ----------------------------------------------------------------------------
# Attributes.


def inner_networks(net: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The two networks of a `Switched`; none otherwise."""
    return dict(net.named_children()) if isinstance(net, Switched) else {}


def numeric_attributes(net: torch.nn.Module) -> dict[str, bool | int | float]:
    """A network's numbers and switches (sigma_min, ...); those of inner networks as `high.sigma_min`."""
    left_out = {'training'} | HERE_ONLY
    found = {
        name: value
        for name, value in vars(net).items()
        if not name.startswith('_') and name not in left_out and isinstance(value, (bool, int, float))
    }
    for name, inner in inner_networks(net).items():
        found |= {f'{name}.{attribute}': value for attribute, value in numeric_attributes(inner).items()}
    return found


def stored_attributes(net: torch.nn.Module, state: dict) -> dict:
    """The attributes in a network's record, by the names of `numeric_attributes`."""
    stored = dict(state)
    for name, inner in inner_networks(net).items():
        class_name, attributes = persistent_object(state['_modules'][name]) or (None, {})
        if class_name != type(inner).__name__:
            raise MalformedPickle(
                f'contradicts itself: {name} is a {class_name!r}, its constructor arguments say '
                f'{type(inner).__name__!r}'
            )
        stored.update({f'{name}.{attribute}': value for attribute, value in attributes.items()})
    return stored


def restore_attributes(net: torch.nn.Module, state: dict):
    """Set the numbers and switches that were changed after construction (use_fp16, sigma_min, ...).

    Raises: MalformedPickle for values that contradict the constructor arguments; Mismatch for impossible
        ones.
    """
    for name, value in numeric_attributes(net).items():
        if name not in state:
            continue
        # It is a number, which agrees with the constructor's arguments.
        stored = plain(state[name])
        part, _, attribute = name.rpartition('.')
        too_large = isinstance(stored, int) and abs(stored) >= 1 << 63
        changed = attribute in FIXED and stored != value
        if not isinstance(stored, (bool, int, float)) or too_large or changed:
            raise MalformedPickle(
                f'contradicts itself: {name} is {stored!r}, its constructor arguments say {value!r}'
            )
        setattr(net.get_submodule(part), attribute, stored)

    # Check what the network has now.
    for name, value in numeric_attributes(net).items():
        kind = run_schema.NETWORK_NUMBERS.get(name.rpartition('.')[2], run_schema.NUMBER)
        check(value, run_schema.FLAG if isinstance(value, bool) else kind, name)
    for part in (net, *inner_networks(net).values()):
        if getattr(part, 'sigma_min', 0) >= getattr(part, 'sigma_max', math.inf):
            raise MalformedPickle(
                f'is of a network whose sigma_min = {part.sigma_min:g} is not below its sigma_max = '
                f'{part.sigma_max:g}'
            )
