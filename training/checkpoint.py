"""Snapshots (`.pkl`, networks for sampling, in EDM's format) and training states (`.pt`, for resuming).

Nothing in a file is ever executed. A snapshot is read as data (`torch_utils.restricted_pickle`), from which
`stored_networks` builds one of our networks. A training state is checked in the same way
(`torch_utils.saved_tensors`) before `torch.load` reads it with `weights_only=True`.

Our files end in a line `#checksum <hex digits>` over all bytes before it, which other readers of pickles and
PyTorch files ignore. A snapshot's metadata also has a digest of the network, which survives re-pickling by
other tools.
"""

from __future__ import annotations

import copy
import os
import pickle
from typing import BinaryIO

import torch

import dnnlib
from dnnlib import UserError
from dnnlib.limits import JSON_FILE, UNREADABLE
from dnnlib.schema import Kind, Mismatch, check, parse_json
from dnnlib.text import first_line, printable
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
from torch_utils.sealed_file import DamagedFile, find_seal, read_sealed, sealed
from torch_utils.stored_tensors import module_tensors
from training import run_schema, saved_files
from training.networks import encoders
from training.snapshot_metadata import (  # noqa: F401 (users import some of these from here)
    check_metadata,
    network_digest,
    read_metadata,
    snapshot_metadata,
)
from training.stored_networks import (  # noqa: F401 (likewise)
    NETWORKS,
    build_unfilled,
    constructor_arguments,
    fill,
    inner_networks,
    numeric_attributes,
    read_tensors,
    restore_attributes,
    stored_attributes,
)

LARGE = 1 << 30  # bytes that take seconds to read: too long for a file that turns out to hold nothing

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
        without a network that we know.
    """
    # A folder is given by mistake only.
    name = os.fspath(source)
    if os.path.isdir(source):
        raise UserError(
            f'{name} cannot be used as a network snapshot: it {saved_files.why_no_snapshot(source)}'
        )

    # Read it. Garbage collection would walk over all that the pickle holds, again and again.
    with dnnlib.open_url(source) as file, dnnlib.util.without_garbage_collection():
        size, seal = find_seal(file)
        try:
            try:
                return _read_network(file, size, seal, key, torch.device(device))
            # A refused name explains itself; other failures may have a better explanation.
            except RefusedName:
                raise
            except MalformedPickle as error:
                _explain(file, size, seal, error)
                raise
        except (MalformedPickle, DamagedFile, Mismatch) as error:
            raise UserError(
                f'{name} cannot be used as a network snapshot: it {printable(error, 500)}.'
            ) from error


def _explain(file: BinaryIO, size: int, seal: str | None, error: MalformedPickle) -> None:
    """Raises: a better explanation of why a file is no snapshot, if there is one: its kind, or damage."""
    if (reason := saved_files.why_no_snapshot(file.name)) is not None:
        # The oldest pickles are text.
        as_pickle = f' (as a pickle it {error})' if reason.startswith('is text') else ''
        raise MalformedPickle(f'{reason.removesuffix(".")}{as_pickle}') from error
    if seal and size <= LARGE:
        read_sealed(file, size, seal)


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
    fill(net, read_tensors(net, module_tensors(record), file, size, seal), device)

    # Restore what was set after construction, and what the snapshot says of the network.
    restore_attributes(net, stored_attributes(net, state))
    net.metadata = read_metadata(snapshot, net)

    # A file without a checksum may have a digest, which other tools preserve.
    if not seal and 'digest' in net.metadata and net.metadata['digest'] != network_digest(net, net.metadata):
        raise MalformedPickle(
            'is damaged: its network does not match the digest in its metadata. Copy or download it again'
        )
    check_metadata(net)
    return net


def _network_record(snapshot, key: str):
    """The record of the network under `key`."""
    if not isinstance(snapshot, dict):
        raise MalformedPickle('is not a dict of networks, as snapshots are')
    # A network is known by its modules, whatever its class.
    is_network = lambda value: '_modules' in (persistent_object(value) or ('', ()))[1]
    held = [name for name, value in snapshot.items() if isinstance(name, str) and is_network(value)]
    if key not in held:
        names = ', '.join(map(repr, held[:20])) or 'none'
        raise MalformedPickle(f'has no network {key!r}; it has {names}{_held_instead(snapshot, key)}')
    return snapshot[key]


def _held_instead(snapshot: dict, key: str) -> str:
    """What a dict without networks holds instead, to follow '... it has none'."""
    is_reference = lambda value: isinstance(value, dict) and {'mu', 'sigma'} <= value.keys()
    if any(map(is_reference, [snapshot, *snapshot.values()])):
        return ' but the statistics of a reference, which are for --ref'

    is_tensor = lambda item: isinstance(item, Call) and item.name in TENSORS | NUMPY_ARRAYS
    # A state dict may be the file itself, or stand under the key that was asked for.
    under_key = [(f' under {name!r}', value) for name, value in snapshot.items() if name == key]
    for where, value in [('', snapshot), *under_key]:
        if isinstance(value, dict) and any(map(is_tensor, value.values())):
            return (
                f' but weights by name{where} (a state dict), which do not say which network they are of: '
                'give the snapshot that they were taken from'
            )
    return ''


# ----------------------------------------------------------------------------
# Writing snapshots.


def save_snapshot(path: str | os.PathLike, net: torch.nn.Module, **metadata):
    """Write a network and plain-data metadata as a snapshot that `load_network` and EDM's own tools read.

    The network is saved in evaluation mode and without gradients, its tensors with their dtypes; `net` itself
    is left alone. `dataset_kwargs` and `encoder` go where EDM's and EDM2's tools expect them. `digest` (see
    `network_digest`) is added, so `save_snapshot(copy, net, **net.metadata)` copies a snapshot.
    Raises: TypeError if the network is none of ours or the metadata is not plain data; UserError if the file
        cannot be written.
    """
    for network in (net, *inner_networks(net).values()):
        if type(network) not in NETWORKS.values():
            raise TypeError(f'{type(network).__name__} is none of our networks: {", ".join(NETWORKS)}')

    # Metadata, with a digest of them and of the network.
    metadata.pop('digest', None)
    if metadata.get('dataset_kwargs') == {}:
        del metadata['dataset_kwargs']
    try:
        metadata = plain(metadata)
    except MalformedPickle as error:
        raise TypeError(f'the metadata {error}') from error
    metadata['digest'] = network_digest(net, metadata)

    # The dict that EDM's tools expect.
    dataset_kwargs = metadata.pop('dataset_kwargs', {})
    snapshot = dict(
        ema=_frozen(net), loss_fn=None, augment_pipe=None, dataset_kwargs=dataset_kwargs, metadata=metadata
    )
    if metadata.get('encoder', {}).get('class_name') in encoders.ENCODERS:
        snapshot['encoder'] = encoders.build(metadata.pop('encoder'))

    # Protocol 4, which Python 3.4 and later read.
    with sealed(path) as file:
        pickle.dump(snapshot, file, protocol=4)


def _frozen(net: torch.nn.Module) -> torch.nn.Module:
    """A copy for evaluation, which shares the tensors that are on the CPU."""

    def on_cpu(tensor):
        tensor = tensor.detach().cpu()
        # A view would save all that it views.
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()

    # `deepcopy` takes what it finds here instead of copying.
    copies = {id(tensor): on_cpu(tensor) for tensor in net.buffers()}
    for tensor in net.parameters():
        copies[id(tensor)] = torch.nn.Parameter(on_cpu(tensor), requires_grad=False)
    return copy.deepcopy(net, copies).eval()


# ----------------------------------------------------------------------------
# Training states.


def save_state(path: str | os.PathLike, state: dict):
    """Write tensors and plain data (dicts, lists, tuples) so that `load_state` notices any damage.

    Raises: TypeError if the state holds anything else, which could not be read back; UserError if the file
        cannot be written.
    """
    _check_state(state, 'state')
    with sealed(path) as file:
        torch.save(state, file)


def _check_state(value, where: str):
    # Exact types: an instance of a subclass would be pickled as a class, which `load_state` refuses.
    if type(value) is dict:
        for key, item in value.items():
            _check_state(key, f'a key of {where}')
            _check_state(item, f'{where}[{key!r}]')
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            _check_state(item, f'{where}[{i}]')
    elif type(value) not in (type(None), bool, int, float, str, bytes) and not isinstance(
        value, torch.Tensor
    ):
        raise TypeError(
            f'{where} is a {type(value).__name__}; a training state holds tensors and plain data only'
        )


def verify(path: str | os.PathLike):
    """Read a file of ours back. Raises: UserError if it is not what was written."""
    with dnnlib.open_url(path) as file:
        size, seal = find_seal(file)
        try:
            if seal is None:
                raise DamagedFile('has no checksum at its end')
            read_sealed(file, size, seal)
        except DamagedFile as error:
            raise UserError(f'{os.fspath(path)} was not written well: it {error}.') from error


def load_state(path: str | os.PathLike) -> dict:
    """Read a training state, its tensors to the CPU, without executing anything in it.

    Raises: UserError, naming the file, if it is missing, damaged, or not a training state.
    """
    with dnnlib.open_url(path) as file:
        try:
            # Is it one of ours?
            size, seal = find_seal(file)
            if (reason := saved_files.why_no_state(file.name, sealed=seal is not None)) is not None:
                raise DamagedFile(reason.removesuffix('.'))
            if seal is None:
                raise DamagedFile(
                    'has no checksum at its end: it is damaged, incomplete, or no training state of ours'
                )

            # Check its checksum and its contents; of a large file the contents first, which is quick.
            if size > LARGE:
                check_saved(file)
            read_sealed(file, size, seal)
            check_saved(file)
            return torch.load(file, map_location='cpu', weights_only=True)
        except (DamagedFile, MalformedPickle) as error:
            raise UserError(f'{os.fspath(path)} cannot be used as a training state: it {error}.') from error
        except UNREADABLE as error:
            raise UserError(
                f'{os.fspath(path)} cannot be used as a training state: it is not a file of plain data and '
                f'tensors ({first_line(error)}).'
            ) from error


def read_state(path: str | os.PathLike, options_kind: Kind = run_schema.OPTIONS) -> dict:
    """A training state of a run, whose `options` are its configuration as a dict of that kind.

    Raises: UserError, naming the file and the entry that is wrong.
    """
    state = load_state(path)
    try:
        # Every entry is of its kind.
        check(state, run_schema.STATE, 'the state')
        options = parse_json(state['options'], JSON_FILE, 'the configuration of a run')
        check(options, options_kind, 'options')

        # Entries agree with each other.
        if state['progress']['tick_start_nimg'] > state['progress']['nimg']:
            raise Mismatch('has a tick that begins after the images that it has seen')
        if options.get('lr_schedule') == 'sqrt' and not options['lr_ref_nimg']:
            raise Mismatch('has options.lr_schedule = sqrt without options.lr_ref_nimg')
        return {**state, 'options': options}
    except ValueError as error:
        raise UserError(
            f'{os.fspath(path)} is not a training state that can be used: it {error}. '
            'Name a training-state-*.pt that train.py wrote.'
        ) from error


def read_options(path: str | os.PathLike, options_kind: Kind = run_schema.OPTIONS) -> dict:
    """The configuration in a training state, like `read_state`, but without reading its tensors, if that can be.

    Raises: UserError, naming the file and the entry that is wrong.
    """
    try:
        with dnnlib.open_url(path) as file:
            check_saved(file)
        # With mmap, tensors stay in the file: only the options are read.
        state = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        options = parse_json(state['options'], JSON_FILE, 'the configuration of a run')
        return check(options, options_kind, 'options')
    except (UserError, DamagedFile, MalformedPickle, KeyError, TypeError, *UNREADABLE):
        return read_state(path, options_kind)['options']  # says what is wrong
