"""Snapshots (`.pkl`, networks for sampling, in EDM's format) and training states (`.pt`, for resuming).

Nothing in a file is ever executed. A snapshot is read as data (`torch_utils.restricted_pickle`): the class
name selects one of our networks, its recorded constructor arguments build it, the tensors are copied in.
Training states are checked in the same way (`torch_utils.saved_tensors`) before they are `torch.load`ed with
`weights_only=True`.

Files that we write end in a line `#checksum <hex digits>` over all bytes before it, which other readers of
pickles and PyTorch files ignore. A snapshot's metadata has a digest of what the network is as well; it
survives re-pickling by other tools.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import itertools
import json
import math
import os
import pickle
from typing import BinaryIO

import torch
from torch.overrides import TorchFunctionMode

import dnnlib
from data.label_space import LabelSpace
from dnnlib import EasyDict, UserError
from dnnlib.limits import JSON_FILE, UNREADABLE
from dnnlib.schema import Kind, Mismatch, check, parse_json
from dnnlib.text import printable
from torch_utils.persistence import HERE_ONLY
from torch_utils.restricted_pickle import (
    NUMPY_ARRAYS,
    TENSORS,
    Call,
    MalformedPickle,
    RefusedName,
    persistent_object,
    plain,
    read_pickle,
)
from torch_utils.saved_tensors import check_saved
from torch_utils.sealed_file import DamagedFile, find_seal, read_parts, read_sealed, sealed
from torch_utils.stored_tensors import LocatedTensor, Storages, StoredTensor, module_tensors
from training import networks, run_schema, saved_files
from training.consistency_ops import student_grid
from training.networks import edm2 as networks_edm2
from training.networks import encoders
from training.networks.switched import Switched

STUDENT_LOSS = 'EDMConsistencyDistillLoss'  # the class that identifies a published student's snapshot
NETWORKS = {
    **networks.PRECONDS,
    **networks_edm2.PRECONDS,
    Switched.__name__: Switched,
}  # class name -> class: what a snapshot may hold
# Numbers that are what the constructor was told.
FIXED = ('img_resolution', 'img_channels', 'label_dim', 'switch')

# ----------------------------------------------------------------------------
# Reading snapshots.


def load_network(
    source: str | os.PathLike, device: str | torch.device = 'cpu', key: str = 'ema'
) -> torch.nn.Module:
    """The network under `key` of a snapshot, in evaluation mode: D = net(x, sigma, class_labels).

    Reads our snapshots, EDM's, and those of published multistep students, without executing anything in them.
    `net.metadata` is a plain dict. Ours: what `save_snapshot` was given, and `digest`. A published student:
    objective 'mcd', S, sigma_min, sigma_max, rho, student_grid, sigmas, from its loss. Other snapshots:
    objective 'diffusion'. `dataset_kwargs` where the snapshot has them.

    Args:
        source: path or http(s) URL.
    Raises: UserError, naming the source, for files that are missing, damaged, hostile, of another kind, or
        hold no network that we know.
    """
    if os.path.isdir(source):
        raise UserError(
            f'{os.fspath(source)} cannot be used as a network snapshot: it '
            f'{saved_files.why_no_snapshot(source)}'
        )
    with dnnlib.open_url(source) as file, dnnlib.util.without_garbage_collection():
        size, seal = find_seal(file)
        try:
            try:
                return _read_network(file, size, seal, key, torch.device(device))
            except RefusedName:
                raise
            except MalformedPickle as error:
                if (reason := saved_files.why_no_snapshot(file.name)) is not None:
                    # The oldest pickles are text.
                    as_pickle = f' (as a pickle it {error})' if reason.startswith('is text') else ''
                    raise MalformedPickle(f'{reason.removesuffix(".")}{as_pickle}') from error
                if seal and size <= LARGE:
                    read_sealed(file, size, seal)  # damage is the better explanation
                raise
        except (MalformedPickle, DamagedFile, Mismatch) as error:
            raise UserError(
                f'{os.fspath(source)} cannot be used as a network snapshot: it {printable(error, 500)}.'
            ) from error


def _read_network(
    file: BinaryIO, size: int, seal: str | None, key: str, device: torch.device
) -> torch.nn.Module:
    # Read the structure; tensors stay in the file.
    snapshot = read_pickle(file, stop=size)
    if file.tell() != size:
        raise MalformedPickle('goes on after the end of its pickle (truncated or damaged?)')

    # Build our own class from the recorded arguments, and read the tensors straight into its memory.
    record = _network_record(snapshot, key)
    class_name, state = persistent_object(record)
    net = build_unfilled(class_name, state.get('_init_args', ()), state.get('_init_kwargs', {}))
    _fill(net, _read_tensors(_locate(net, module_tensors(record), file, size), file, size, seal), device)

    # What was set after construction, and what the snapshot says of the network.
    restore_attributes(net, _stored_attributes(net, state))
    net.metadata = _metadata(snapshot, net)
    if not seal and 'digest' in net.metadata and net.metadata['digest'] != network_digest(net, net.metadata):
        raise MalformedPickle(
            'is damaged: its network does not match the digest in its metadata. Copy or download it again'
        )
    check_metadata(net)
    return net


def _network_record(snapshot, key: str):
    if not isinstance(snapshot, dict):
        raise MalformedPickle('is not a dict of networks, as snapshots are')
    held = [
        name
        for name, value in snapshot.items()
        if isinstance(name, str) and '_modules' in (persistent_object(value) or ('', ()))[1]
    ]
    if key not in held:
        raise MalformedPickle(
            f'has no network {key!r}; it has '
            f'{", ".join(map(repr, held[:20])) or "none"}{_held_instead(snapshot, key)}'
        )
    return snapshot[key]


def _held_instead(snapshot: dict, key: str) -> str:
    """Words on what a dict of no networks holds, to follow '... it has none'."""
    if any(
        isinstance(value, dict) and {'mu', 'sigma'} <= value.keys()
        for value in [snapshot, *snapshot.values()]
    ):
        return ' but the statistics of a reference, which are for --ref'
    holders = [
        ('', snapshot),
        *((f' under {name!r}', value) for name, value in snapshot.items() if name == key),
    ]
    for where, value in holders:
        if isinstance(value, dict) and any(
            isinstance(item, Call) and item.name in TENSORS | NUMPY_ARRAYS for item in value.values()
        ):
            return (
                f' but weights by name{where} (a state dict), which do not say which network they are of: '
                'give the snapshot that they were taken from'
            )
    return ''


LARGE = 1 << 30  # bytes: reading so many takes seconds, which is too long for files that hold nothing
MAX_ENTRIES, MAX_SIZE = 16, 1 << 17  # of an argument: entries of a list, largest number
LIMITS = {
    'num_blocks': 32,
    'M': 10_000,
    'channel_mult': 1024,
    'channel_mult_emb': 1024,
    'channel_mult_noise': 1024,
    'label_dim': 1 << 20,
}


def _check_arguments(values):
    """Refuses sizes that no network has, which would take forever to build, or fill the memory."""
    for name, value in values:
        limit = LIMITS.get(name, MAX_SIZE)
        if (isinstance(value, (list, tuple)) and len(value) > MAX_ENTRIES) or (
            isinstance(value, str) and len(value) > 32
        ):
            raise MalformedPickle(f'asks for a network whose {name} has {len(value)} entries')
        if isinstance(value, (list, tuple)):
            _check_arguments((name, item) for item in value)
        elif isinstance(value, int) and abs(value) > limit:
            raise MalformedPickle(f'asks for a network whose {name} is beyond {limit:,}')


class _Unfilled(TorchFunctionMode):
    """A mode in which networks make tensors on the meta device, without memory, and do not initialize them.

    Under `torch.device('meta')` alone PyTorch works out what initializing would give, in Python, with its
    compiler: a second to import it.
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


def build_unfilled(class_name: str, args, kwargs) -> torch.nn.Module:
    """The network of a class and constructor arguments of a file, on the meta device, without memory.

    Raises: MalformedPickle where there is no such network.
    """
    cls = NETWORKS.get(class_name)
    if cls is None:
        raise MalformedPickle(f'holds a {class_name!r}, which is none of our networks: {", ".join(NETWORKS)}')
    args, kwargs = plain(args), plain(kwargs)
    if not isinstance(args, tuple) or not isinstance(kwargs, dict):
        raise MalformedPickle('has no record of its constructor arguments')
    _check_arguments([*((f'argument {i}', value) for i, value in enumerate(args)), *kwargs.items()])
    try:
        with _Unfilled():
            net = cls(*args, **kwargs) if cls is not Switched else _switched_unfilled(*args, **kwargs)
    except (
        TypeError,
        ValueError,
        ArithmeticError,
        AttributeError,
        LookupError,
        NameError,
        RuntimeError,
    ) as error:  # what wrong arguments can cause
        raise MalformedPickle(
            f'has constructor arguments that {class_name} cannot be built from: {error}'
        ) from error
    return net.eval().requires_grad_(False)


def _switched_unfilled(high: dict, low: dict, switch: float) -> Switched:
    """Two networks in one, from what `init_args` says of them; neither may hold networks itself."""
    parts = []
    for part in (high, low):
        if not isinstance(part, dict) or part.get('class_name') == Switched.__name__:
            raise MalformedPickle(f'holds a {Switched.__name__!r} of something else than two networks')
        parts.append(build_unfilled(part.get('class_name'), part.get('args'), part.get('kwargs')))
    return Switched(*parts, switch)


def constructor_arguments(net: torch.nn.Module) -> dict:
    """The arguments that a network was built with, by name."""
    bound = inspect.signature(type(net).__init__).bind(net, *net.init_args, **net.init_kwargs).arguments
    return {
        **{name: value for name, value in bound.items() if name not in ('self', 'model_kwargs')},
        **bound.get('model_kwargs', {}),
    }


def _tensors(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def _locate(
    net: torch.nn.Module, stored: dict[str, StoredTensor], file: BinaryIO, size: int
) -> dict[str, LocatedTensor]:
    """Where the network's tensors lie in the file.

    Raises: MalformedPickle where their names, shapes or kinds of numbers are not the network's.
    """
    expected = _tensors(net)
    for what, names in (
        ('lacks', expected.keys() - stored.keys()),
        ('has unexpected', stored.keys() - expected.keys()),
    ):
        if names:
            raise MalformedPickle(
                f'{what} tensors: {", ".join(sorted(names)[:5])}{", ..." if len(names) > 5 else ""}'
            )
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
    if sum(tensor.nbytes for tensor in located.values()) > size:
        raise MalformedPickle('has tensors that share memory: together they are larger than the file')
    return located


def _read_tensors(
    located: dict[str, LocatedTensor], file: BinaryIO, size: int, seal: str | None
) -> dict[str, torch.Tensor]:
    """The tensors, read from the file, all of which is compared with its seal, if it has one."""
    # Memory is this thread's: what PyTorch's allocator holds for other threads it returns in between.
    elements = {name: torch.empty(tensor.extent, dtype=tensor.dtype) for name, tensor in located.items()}
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


def _fill(net: torch.nn.Module, tensors: dict[str, torch.Tensor], device: torch.device):
    """Gives a network that has none its tensors, each with its own dtype."""
    for prefix, module in net.named_modules():
        for table in (module._parameters, module._buffers):
            for name in [name for name, tensor in table.items() if tensor is not None]:
                tensor = tensors.pop(f'{prefix}.{name}' if prefix else name).to(device)
                table[name] = (
                    torch.nn.Parameter(tensor, requires_grad=False) if table is module._parameters else tensor
                )


def _parts(net: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The networks that a network is made of: none, or two."""
    return dict(net.named_children()) if isinstance(net, Switched) else {}


def _stored_attributes(net: torch.nn.Module, state: dict) -> dict:
    """The attributes in a network's record, by the names of `numeric_attributes`."""
    stored = dict(state)
    for name, part in _parts(net).items():
        class_name, inner = persistent_object(state['_modules'][name]) or (None, {})
        if class_name != type(part).__name__:
            raise MalformedPickle(
                f'contradicts itself: {name} is a {class_name!r}, its constructor arguments say '
                f'{type(part).__name__!r}'
            )
        stored.update({f'{name}.{attribute}': value for attribute, value in inner.items()})
    return stored


def restore_attributes(net: torch.nn.Module, state: dict):
    """Numbers and switches that were set after construction (use_fp16, sigma_min, high.sigma_max, ...)."""
    for name, value in numeric_attributes(net).items():
        if name not in state:
            continue
        stored = plain(state[name])
        beyond = isinstance(stored, int) and abs(stored) >= 1 << 63
        part, _, attribute = name.rpartition('.')
        if not isinstance(stored, (bool, int, float)) or beyond or (attribute in FIXED and stored != value):
            raise MalformedPickle(
                f'contradicts itself: {name} is {stored!r}, its constructor arguments say {value!r}'
            )
        setattr(net.get_submodule(part), attribute, stored)
    for name, value in numeric_attributes(net).items():
        kind = (
            run_schema.FLAG
            if isinstance(value, bool)
            else run_schema.NETWORK_NUMBERS.get(name.rpartition('.')[2], run_schema.NUMBER)
        )
        check(value, kind, name)
    for part in (net, *_parts(net).values()):
        if getattr(part, 'sigma_min', 0) >= getattr(part, 'sigma_max', math.inf):
            raise MalformedPickle(
                f'is of a network whose sigma_min = {part.sigma_min:g} is not below its sigma_max = '
                f'{part.sigma_max:g}'
            )


def numeric_attributes(net: torch.nn.Module) -> dict[str, bool | int | float]:
    """A network's numbers and switches (sigma_min, ...); those of inner networks as `high.sigma_min`."""
    own = {
        name: value
        for name, value in vars(net).items()
        if not name.startswith('_')
        and name not in {'training'} | HERE_ONLY
        and isinstance(value, (bool, int, float))
    }
    return own | {
        f'{name}.{inner}': value
        for name, part in _parts(net).items()
        for inner, value in numeric_attributes(part).items()
    }


def _metadata(snapshot: dict, net: torch.nn.Module) -> dict:
    metadata = plain(snapshot.get('metadata') or {})
    if not isinstance(metadata, dict):
        raise MalformedPickle('has metadata that are not a dict')
    dataset_kwargs = (
        plain(snapshot['dataset_kwargs'], leave_out=True)
        if isinstance(snapshot.get('dataset_kwargs'), dict)
        else {}
    )
    if not metadata:
        class_name, loss = persistent_object(snapshot.get('loss_fn')) or (None, {})
        metadata = (
            _published_student(loss, net) if class_name == STUDENT_LOSS else dict(objective='diffusion')
        )
    encoder = (
        _encoder(snapshot['encoder']) if snapshot.get('encoder') is not None else metadata.get('encoder')
    )
    if encoder is not None and not (isinstance(encoder, dict) and isinstance(encoder.get('class_name'), str)):
        raise MalformedPickle('has metadata whose encoder is no dict with a class_name')
    return {
        **metadata,
        **({'dataset_kwargs': dataset_kwargs} if dataset_kwargs else {}),
        **({'encoder': encoder} if encoder else {}),
    }


def _encoder(node) -> dict | None:
    """A snapshot's encoder as `encoders.build` takes it, None for pixels; only the name of unknown ones."""
    class_name, state = persistent_object(node) or (None, {})
    known = class_name in encoders.ENCODERS
    args, kwargs = (
        plain(state.get(name, empty)) if known else empty
        for name, empty in (('_init_args', ()), ('_init_kwargs', {}))
    )
    if class_name is None or not isinstance(args, tuple) or not isinstance(kwargs, dict):
        raise MalformedPickle('has an encoder without class or constructor arguments')
    return encoders.record(class_name, args, kwargs)


def check_metadata(net: torch.nn.Module):
    """Check a network's metadata and the noise levels in it. Raises: ValueError, which completes 'it ...'."""
    metadata = net.metadata
    try:
        LabelSpace.recorded(net.label_dim, metadata)
    except ValueError as error:
        raise MalformedPickle(f'has metadata with {error}') from error
    check(metadata, run_schema.METADATA, 'metadata')
    levels = metadata.get('sigmas', [1, 0])
    if metadata.get('S', len(levels) - 1) != len(levels) - 1:
        raise MalformedPickle(f'has metadata with S = {metadata["S"]} and {len(levels)} noise levels')
    if levels[-1] != 0 or any(high <= low for high, low in itertools.pairwise(levels)):
        raise MalformedPickle('has metadata with noise levels that do not fall to zero')


def _published_student(loss: dict, net: torch.nn.Module) -> dict:
    """Metadata of a student whose snapshot has none: its loss knows the grid that it was trained on."""
    S, sigma_min, sigma_max, rho = numbers = [
        plain(loss.get(name)) for name in ('S', 'sigma_min', 'sigma_max', 'rho')
    ]
    try:
        check(S, run_schema.STEPS, 'S')
        check(rho, run_schema.RHO, 'rho')
        sigma_min, sigma_max = (
            float(min(max(sigma, net.sigma_min), net.sigma_max)) for sigma in (sigma_min, sigma_max)
        )
        sigmas = student_grid(S, sigma_min, sigma_max, rho, 'edm').tolist()
    except (ValueError, TypeError, ArithmeticError) as error:
        raise MalformedPickle(
            f'has a {STUDENT_LOSS} with impossible S, sigma_min, sigma_max, rho: {numbers}'
        ) from error
    return dict(
        objective='mcd',
        S=S,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        rho=rho,
        student_grid='edm',
        sigmas=sigmas,
    )


# ----------------------------------------------------------------------------
# Writing snapshots.


def save_snapshot(path: str | os.PathLike, net: torch.nn.Module, **metadata):
    """Writes a network and plain-data metadata as a snapshot that `load_network` and EDM's own tools read.

    The network is saved as it would sample, in evaluation mode and without gradients, its tensors with their
    dtypes; `net` itself is left alone. `dataset_kwargs` and `encoder` go where EDM's and EDM2's tools expect
    them. `digest` (sha256 over class, constructor arguments, numeric attributes, metadata and tensors) is
    added, so `save_snapshot(copy, net, **net.metadata)` copies a snapshot.
    Raises: TypeError where the network is none of ours or the metadata is not plain data; UserError where the
        file cannot be written.
    """
    for network in (net, *_parts(net).values()):
        if type(network) not in NETWORKS.values():
            raise TypeError(f'{type(network).__name__} is none of our networks: {", ".join(NETWORKS)}')
    try:
        metadata = plain(
            {
                name: value
                for name, value in metadata.items()
                if name != 'digest' and (name, value) != ('dataset_kwargs', {})
            }
        )
    except MalformedPickle as error:
        raise TypeError(f'the metadata {error}') from error
    metadata['digest'] = network_digest(net, metadata)
    dataset_kwargs = metadata.pop('dataset_kwargs', {})
    snapshot = dict(
        ema=_frozen(net), loss_fn=None, augment_pipe=None, dataset_kwargs=dataset_kwargs, metadata=metadata
    )
    if metadata.get('encoder', {}).get('class_name') in encoders.ENCODERS:
        snapshot['encoder'] = encoders.build(metadata.pop('encoder'))
    with sealed(path) as file:
        pickle.dump(snapshot, file, protocol=4)


def snapshot_metadata(c: EasyDict, nimg: int) -> dict:
    """Plain data that a snapshot carries, so that samplers know what the network is."""
    metadata = dict(
        objective=c.objective,
        kimg=nimg / 1e3,
        nimg=nimg,
        seed=c.seed,
        **({'encoder': c.encoder} if c.encoder else {}),
    )
    metadata.update(
        {name: c.dataset[name] for name in ('label_kind', 'classes') if name in c.dataset}
    )  # a `LabelSpace.record`
    known = {**c.loss, **(c.sampling or {})}
    known['num_timesteps'] = known.get('N')
    recorded = (
        'S',
        'sigma_min',
        'sigma_max',
        'rho',
        'student_grid',
        'sigma_grid',
        'sigma_data',
        'num_timesteps',
        'clip_denoised',
    )
    metadata.update({name: known[name] for name in recorded if known.get(name) is not None})
    if 'S' in known:
        sigmas = student_grid(
            *(known[name] for name in ('S', 'sigma_min', 'sigma_max', 'rho', 'student_grid', 'sigma_grid'))
        )
        metadata.update(sigmas=sigmas.tolist())
    elif c.sampling:
        metadata.update(
            solver='cm', sigmas=[known['sigma_max'], *([known['mid_t']] if known['mid_t'] else []), 0.0]
        )
    return metadata


def _frozen(net: torch.nn.Module) -> torch.nn.Module:
    """A copy for evaluation whose tensors are the network's own where these are on the CPU."""

    def own(tensor):
        tensor = tensor.detach().cpu()
        # A view would save all that it views.
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()

    copies = {
        id(tensor): own(tensor) for tensor in net.buffers()
    }  # `deepcopy` takes what it finds here instead of copying
    copies |= {
        id(tensor): torch.nn.Parameter(own(tensor), requires_grad=False) for tensor in net.parameters()
    }
    return copy.deepcopy(net, copies).eval()


def network_digest(net: torch.nn.Module, metadata: dict) -> str:
    """sha256 over class, arguments, numeric attributes, metadata, and tensors (name, dtype, shape, bytes)."""
    facts = [
        type(net).__name__,
        plain(net.init_args),
        plain(net.init_kwargs),
        numeric_attributes(net),
        {**metadata, 'digest': None},
    ]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(_tensors(net).items()):
        digest.update(f'\n{name} {tensor.dtype} {list(tensor.shape)}\n'.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# ----------------------------------------------------------------------------
# Training states.


def save_state(path: str | os.PathLike, state: dict):
    """Writes tensors and plain data (dicts, lists, tuples) so that `load_state` notices any damage.

    Raises: TypeError where the state holds anything else, which could not be read back; UserError where the
        file cannot be written.
    """
    _check_state(state, 'state')
    with sealed(path) as file:
        torch.save(state, file)


def _check_state(value, where: str):
    if type(value) is dict:
        for key, item in value.items():
            _check_state(key, f'a key of {where}')
            _check_state(item, f'{where}[{key!r}]')
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            _check_state(item, f'{where}[{i}]')
    elif not (
        value is None or type(value) in (bool, int, float, str, bytes) or isinstance(value, torch.Tensor)
    ):
        raise TypeError(
            f'{where} is a {type(value).__name__}; a training state holds tensors and plain data only'
        )


def verify(path: str | os.PathLike):
    """Reads a file of ours back. Raises: UserError where it is not what was written."""
    with dnnlib.open_url(path) as file:
        size, seal = find_seal(file)
        try:
            if seal is None:
                raise DamagedFile('has no checksum at its end')
            read_sealed(file, size, seal)
        except DamagedFile as error:
            raise UserError(f'{os.fspath(path)} was not written well: it {error}.') from error


def load_state(path: str | os.PathLike) -> dict:
    """Reads a training state, its tensors to the CPU, without executing anything in it.

    Raises: UserError, naming the file, where it is missing, damaged, or not a training state.
    """
    with dnnlib.open_url(path) as file:
        try:
            size, seal = find_seal(file)
            if (reason := saved_files.why_no_state(file.name, sealed=seal is not None)) is not None:
                raise DamagedFile(reason.removesuffix('.'))
            if seal is None:
                raise DamagedFile(
                    'has no checksum at its end: it is damaged, incomplete, or no training state of ours'
                )
            if size > LARGE:
                check_saved(file)
            read_sealed(file, size, seal)
            check_saved(file)
            return torch.load(file, map_location='cpu', weights_only=True)
        except (DamagedFile, MalformedPickle) as error:
            raise UserError(f'{os.fspath(path)} cannot be used as a training state: it {error}.') from error
        except UNREADABLE as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                f'{os.fspath(path)} cannot be used as a training state: it is no file of plain data and tensors ({reason}).'
            ) from error


def read_state(path: str | os.PathLike, options_kind: Kind = run_schema.OPTIONS) -> dict:
    """A training state of a run; `options` is its configuration as a dict, of a kind.

    Raises: UserError, naming the file and the entry that cannot be one.
    """
    state = load_state(path)
    try:
        check(state, run_schema.STATE, 'the state')
        options = check(
            parse_json(state['options'], JSON_FILE, 'the configuration of a run'), options_kind, 'options'
        )
        if state['progress']['tick_start_nimg'] > state['progress']['nimg']:
            raise Mismatch('has a tick that begins after the images that it has seen')
        if options.get('lr_schedule') == 'sqrt' and not options['lr_ref_nimg']:
            raise Mismatch('has options.lr_schedule = sqrt without options.lr_ref_nimg')
        return {**state, 'options': options}
    except ValueError as error:
        raise UserError(
            f'{os.fspath(path)} is no training state that can be used: it {error}. '
            'Name a training-state-*.pt that train.py wrote.'
        ) from error
