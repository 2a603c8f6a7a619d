"""Snapshots (`.pkl`, networks for sampling, in EDM's format) and training states (`.pt`, everything needed to resume).

Nothing in a file is ever executed. A snapshot is read as data (`torch_utils.restricted_pickle`): the class name selects one of our
networks, its recorded constructor arguments build it, the tensors are copied in. Training states are `torch.load`ed with `weights_only=True`.

Files that we write end in a line `#sha256 <hex digits>` over all bytes before it, which other readers of pickles and PyTorch files
ignore. A snapshot's metadata has a digest of what the network is as well; it survives re-pickling by other tools.
"""
from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import pickle
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import torch

import dnnlib
from dnnlib import UserError
from torch_utils.restricted_pickle import MalformedPickle, StoredTensor, module_tensors, persistent_object, plain, read_pickle, read_tensor
from training import networks, networks_edm2
from training.consistency_ops import student_grid

STUDENT_LOSS = 'EDMConsistencyDistillLoss'  # the class that identifies a published student's snapshot
SEAL_LENGTH = len(b'\n#sha256 ') + 64 + len(b'\n')
NETWORKS = {**networks.PRECONDS, **networks_edm2.PRECONDS}  # class name -> class: what a snapshot may hold
GEOMETRY = ('img_resolution', 'img_channels', 'label_dim')

#----------------------------------------------------------------------------
# Sealed files: contents, then their checksum.

class _SealingFile:
    """Passes what is written on to a file and hashes it on the way."""

    def __init__(self, file: BinaryIO):
        self.file, self.hash = file, hashlib.sha256()
        self.failure: OSError | None = None

    def write(self, data) -> int:
        self.hash.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.failure = error
            raise

    def flush(self):
        self.file.flush()


@contextlib.contextmanager
def _sealed(path: str | os.PathLike) -> Iterator[_SealingFile]:
    """A file to write to, which appears under its name when it is complete, sealed and on disk."""
    with dnnlib.util.atomic_write(path) as file:
        sealing = _SealingFile(file)
        try:
            yield sealing
        except RuntimeError:  # what PyTorch's writer makes of a full disk
            if sealing.failure:
                raise sealing.failure from None
            raise
        file.write(b'\n#sha256 ' + sealing.hash.hexdigest().encode() + b'\n')


def _find_seal(file: BinaryIO) -> tuple[int, str | None]:
    """(length of the contents, the checksum that follows them or None); leaves the file at its start."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - SEAL_LENGTH, 0))
    seal = re.fullmatch(rb'\n#sha256 ([0-9a-f]{64})\n', file.read())
    file.seek(0)
    return (size, None) if seal is None else (size - SEAL_LENGTH, seal[1].decode())


def _check_contents(file: BinaryIO, size: int, checksum: str):
    """Raises MalformedPickle where the first `size` bytes have another checksum; leaves the file at its start."""
    digest, block = hashlib.sha256(), memoryview(bytearray(1 << 20))
    while size and (count := file.readinto(block[:min(size, len(block))])):
        digest.update(block[:count])
        size -= count
    if digest.hexdigest() != checksum:
        raise MalformedPickle('is damaged: its contents do not match its checksum. Copy or download it again')
    file.seek(0)

#----------------------------------------------------------------------------
# Reading snapshots.

def load_network(source: str | os.PathLike, device: str | torch.device = 'cpu', key: str = 'ema') -> torch.nn.Module:
    """The network that a snapshot holds under `key`: D = net(x, sigma, class_labels), in evaluation mode, without gradients.

    Reads our snapshots, EDM's, and those of published multistep students, without executing anything in them.
    `net.metadata` is a plain dict. Ours: what `save_snapshot` was given, and `digest`. A published student: objective 'mcd', S, sigma_min,
    sigma_max, rho, student_grid, sigmas, from its loss. Other snapshots: objective 'diffusion'. `dataset_kwargs` where the snapshot has them.

    Args:
        source: path or http(s) URL.
    Raises: UserError, naming the source, for files that are missing, damaged, hostile, or hold no network that we know.
    """
    with dnnlib.open_url(source) as file, dnnlib.open_url(source) as contents, ThreadPoolExecutor(1) as pool:
        size, checksum = _find_seal(file)
        check = pool.submit(_check_contents, contents, size, checksum) if checksum else None
        try:
            try:
                return _read_network(file, size, key, torch.device(device), sealed=checksum is not None)
            finally:
                if check:
                    check.result()  # damage is the better explanation of whatever else went wrong
        except MalformedPickle as error:
            raise UserError(f'{os.fspath(source)} cannot be used as a network snapshot: it {error}.') from error


def _read_network(file: BinaryIO, size: int, key: str, device: torch.device, sealed: bool) -> torch.nn.Module:
    snapshot = read_pickle(file, stop=size)
    if file.tell() != size:
        raise MalformedPickle('goes on after the end of its pickle (truncated or damaged?)')
    record = _network_record(snapshot, key)
    net = build_unfilled(record)
    _fill(net, module_tensors(record), file, size, device)
    restore_attributes(net, persistent_object(record)[1])
    net.metadata = _metadata(snapshot, net)
    if not sealed and 'digest' in net.metadata and net.metadata['digest'] != network_digest(net, net.metadata):
        raise MalformedPickle('is damaged: its network does not match the digest in its metadata. Copy or download it again')
    return net


def _network_record(snapshot, key: str):
    if not isinstance(snapshot, dict):
        raise MalformedPickle('is not a dict of networks, as snapshots are')
    held = [name for name, value in snapshot.items() if persistent_object(value)]
    if key not in held:
        raise MalformedPickle(f'has no network {key!r}; it has {", ".join(map(repr, held)) or "none"}')
    return snapshot[key]


def _check_arguments(values):
    """Refuses sizes that no network has: building one would go on for ever, even without memory behind its tensors."""
    for name, value in values:
        limit = {'num_blocks': 64, 'M': 10_000}.get(name, 1 << 20)
        if isinstance(value, (list, tuple)):
            if len(value) > 32:
                raise MalformedPickle(f'asks for a network whose {name} has {len(value)} entries')
            _check_arguments((name, item) for item in value)
        elif isinstance(value, int) and abs(value) > limit:
            raise MalformedPickle(f'asks for a network whose {name} is beyond {limit:,}')


def build_unfilled(record) -> torch.nn.Module:
    """The network of a record's class and constructor arguments, on the meta device: its tensors have shapes but no memory."""
    class_name, state = persistent_object(record)
    cls = NETWORKS.get(class_name)
    if cls is None:
        raise MalformedPickle(f'holds a {class_name!r}, which is none of our networks: {", ".join(NETWORKS)}')
    args, kwargs = plain(state.get('_init_args', ())), plain(state.get('_init_kwargs', {}))
    if not isinstance(args, tuple) or not isinstance(kwargs, dict):
        raise MalformedPickle('has no record of its constructor arguments')
    _check_arguments([*((f'argument {i}', value) for i, value in enumerate(args)), *kwargs.items()])
    try:
        with torch.device('meta'):
            net = cls(*args, **kwargs)
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError, NameError, RuntimeError) as error:  # what wrong arguments can cause
        raise MalformedPickle(f'has constructor arguments that {class_name} cannot be built from: {error}') from error
    return net.eval().requires_grad_(False)


def _tensors(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def _fill(net: torch.nn.Module, stored: dict[str, StoredTensor], file: BinaryIO, size: int, device: torch.device):
    """Reads the stored tensors into the network that has none yet, each with its own dtype, after comparing every name and shape."""
    expected = _tensors(net)
    for what, names in (('lacks', expected.keys() - stored.keys()), ('has unexpected', stored.keys() - expected.keys())):
        if names:
            raise MalformedPickle(f'{what} tensors: {", ".join(sorted(names)[:5])}{", ..." if len(names) > 5 else ""}')
    for name, tensor in expected.items():
        if stored[name].shape != tuple(tensor.shape):
            raise MalformedPickle(f'has {name} of shape {list(stored[name].shape)}, its constructor arguments say {list(tensor.shape)}')
    left = size  # however often a file refers to one storage, its tensors are not larger than itself
    for name, tensor in expected.items():
        value = read_tensor(file, stored[name])
        left -= value.nbytes
        if left < 0 or value.is_floating_point() != tensor.is_floating_point():
            raise MalformedPickle(f'has {name} as {value.dtype}, or its tensors share memory')
        owner, _, leaf = name.rpartition('.')
        value = value.to(device)
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        setattr(net.get_submodule(owner), leaf, torch.nn.Parameter(value, requires_grad=False) if is_parameter else value)


def restore_attributes(net: torch.nn.Module, state: dict):
    """Numbers and switches that were set after construction (use_fp16, sigma_min, sigma_max, ...)."""
    for name, value in numeric_attributes(net).items():
        if name not in state:
            continue
        stored = plain(state[name])
        if not isinstance(stored, (bool, int, float)) or (name in GEOMETRY and stored != value):
            raise MalformedPickle(f'contradicts itself: {name} is {stored!r}, its constructor arguments say {value!r}')
        setattr(net, name, stored)


def numeric_attributes(net: torch.nn.Module) -> dict[str, bool | int | float]:
    """A network's own numbers and switches (sigma_min, use_fp16, ...), by name."""
    return {name: value for name, value in vars(net).items()
            if not name.startswith('_') and name != 'training' and isinstance(value, (bool, int, float))}


def _metadata(snapshot: dict, net: torch.nn.Module) -> dict:
    metadata = plain(snapshot.get('metadata') or {})
    dataset_kwargs = plain(snapshot.get('dataset_kwargs') or {})
    if not isinstance(metadata, dict) or not isinstance(dataset_kwargs, dict):
        raise MalformedPickle('has metadata or dataset_kwargs that are not dicts')
    if not metadata:
        class_name, loss = persistent_object(snapshot.get('loss_fn')) or (None, {})
        metadata = _published_student(loss, net) if class_name == STUDENT_LOSS else dict(objective='diffusion')
    return {**metadata, **({'dataset_kwargs': dataset_kwargs} if dataset_kwargs else {})}


def _published_student(loss: dict, net: torch.nn.Module) -> dict:
    """Metadata of a student whose snapshot has none: its loss knows the grid that it was trained on."""
    S, sigma_min, sigma_max, rho = numbers = [plain(loss.get(name)) for name in ('S', 'sigma_min', 'sigma_max', 'rho')]
    if not (all(isinstance(number, (int, float)) and math.isfinite(number) and number > 0 for number in numbers)
            and isinstance(S, int) and S <= 10_000 and sigma_min < sigma_max):
        raise MalformedPickle(f'has a {STUDENT_LOSS} with impossible S, sigma_min, sigma_max, rho: {numbers}')
    sigma_min, sigma_max = (float(min(max(sigma, net.sigma_min), net.sigma_max)) for sigma in (sigma_min, sigma_max))
    sigmas = student_grid(S, sigma_min, sigma_max, rho, 'edm').tolist()
    return dict(objective='mcd', S=S, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho, student_grid='edm', sigmas=sigmas)

#----------------------------------------------------------------------------
# Writing snapshots.

def save_snapshot(path: str | os.PathLike, net: torch.nn.Module, **metadata):
    """Writes a network and plain-data metadata as a snapshot that `load_network` and EDM's own tools read.

    The network is saved as it would sample, in evaluation mode and without gradients, its tensors with their dtypes; `net` itself is
    left alone. `dataset_kwargs` goes where EDM's tools expect it. `digest` (sha256 over class, constructor arguments, numeric
    attributes, metadata and tensors) is added, so `save_snapshot(copy, net, **net.metadata)` copies a snapshot.
    Raises: TypeError where the network is none of ours or the metadata is not plain data; UserError where the file cannot be written.
    """
    if type(net) not in NETWORKS.values():
        raise TypeError(f'{type(net).__name__} is none of our networks: {", ".join(NETWORKS)}')
    try:
        metadata = plain({name: value for name, value in metadata.items() if name != 'digest' and (name, value) != ('dataset_kwargs', {})})
    except MalformedPickle as error:
        raise TypeError(f'the metadata {error}') from error
    metadata['digest'] = network_digest(net, metadata)
    dataset_kwargs = metadata.pop('dataset_kwargs', {})
    snapshot = dict(ema=_frozen(net), loss_fn=None, augment_pipe=None, dataset_kwargs=dataset_kwargs, metadata=metadata)
    with _sealed(path) as file:
        pickle.dump(snapshot, file, protocol=4)


def _frozen(net: torch.nn.Module) -> torch.nn.Module:
    """A copy for evaluation whose tensors are the network's own where these are on the CPU."""
    def own(tensor):
        tensor = tensor.detach().cpu()
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()  # a view would save all that it views

    copies = {id(tensor): own(tensor) for tensor in net.buffers()}  # `deepcopy` takes what it finds here instead of copying
    copies |= {id(tensor): torch.nn.Parameter(own(tensor), requires_grad=False) for tensor in net.parameters()}
    return copy.deepcopy(net, copies).eval()


def network_digest(net: torch.nn.Module, metadata: dict) -> str:
    """sha256 over class, constructor arguments, numeric attributes, metadata, and the tensors' names, dtypes, shapes and bytes."""
    facts = [type(net).__name__, plain(net.init_args), plain(net.init_kwargs), numeric_attributes(net), {**metadata, 'digest': None}]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(_tensors(net).items()):
        digest.update(f'\n{name} {tensor.dtype} {list(tensor.shape)}\n'.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()

#----------------------------------------------------------------------------
# Training states.

def save_state(path: str | os.PathLike, state: dict):
    """Writes tensors and plain data (nested dicts, lists, tuples) so that `load_state` gives them back, or notices damage.

    Raises: TypeError where the state holds anything else, which could not be read back; UserError where the file cannot be written.
    """
    _check_state(state, 'state')
    with _sealed(path) as file:
        torch.save(state, file)


def _check_state(value, where: str):
    if type(value) is dict:
        for key, item in value.items():
            _check_state(key, f'a key of {where}')
            _check_state(item, f'{where}[{key!r}]')
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            _check_state(item, f'{where}[{i}]')
    elif not (value is None or type(value) in (bool, int, float, str, bytes) or isinstance(value, torch.Tensor)):
        raise TypeError(f'{where} is a {type(value).__name__}; a training state holds tensors and plain data only')


def load_state(path: str | os.PathLike) -> dict:
    """Reads a training state, its tensors to the CPU, without executing anything in it.

    Raises: UserError, naming the file, where it is missing, damaged, or not a training state.
    """
    with dnnlib.open_url(path) as file:
        try:
            size, checksum = _find_seal(file)
            if checksum is None:
                raise MalformedPickle('has no checksum at its end: it is damaged, incomplete, or no training state of ours')
            _check_contents(file, size, checksum)
            return torch.load(file, map_location='cpu', weights_only=True)
        except (MalformedPickle, pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, ValueError) as error:
            reason = str(error) if isinstance(error, MalformedPickle) else f'cannot be read as plain data and tensors ({str(error).splitlines()[0]})'
            raise UserError(f'{os.fspath(path)} cannot be used as a training state: it {reason}.') from error
