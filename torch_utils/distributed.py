"""Distributed processes: rank, device, and the few collectives that the scripts need.

In a single process without a process group, the collectives return their argument.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from dnnlib import cli, interrupts
from dnnlib.limits import MAX_DIGITS
from dnnlib.text import first_line, printable
from dnnlib.util import UserError
from torch_utils import elastic, misc

NVIDIA_DEVICE = '/dev/nvidia0'  # the driver makes it for the first GPU
PATIENCE = timedelta(days=7)  # longer than any save or download; a process that ends is noticed at once
GRAPHS = 4  # of a compiled network's gradients, after the first parameter's
CHUNK = 1 << 28  # bytes of a broadcast

# The group of collectives that wait for the main process to read, write or download, on the CPUs; else empty.
_patient: list[dist.ProcessGroup] = []

# ----------------------------------------------------------------------------
# Joining the others.


def init(init_timeout: float | None = None, timeout: float | None = None) -> None:
    """Set the process up, and join torchrun's process group, if there is one (NCCL with CUDA, else gloo).

    Args:
        init_timeout: minutes to wait for all processes to join.
        timeout: minutes that a process waits for the others in a collective, after which all end; not for the
            main process while it reads, writes or downloads (`_patient`). None: PyTorch's defaults.

    Disables TensorFloat-32, which a teacher's slopes over a thousand edges do not allow. Keeps freed memory.
    A process that torchrun started will end with torchrun.

    Raises: UserError if the environment is incomplete, the other processes cannot be reached, or PyTorch cannot
        use the machine's GPU.
    """
    # Settings of any process.
    interrupts.at_work()
    misc.allow_tf32(False)
    misc.keep_freed_memory()
    elastic.end_with_torchrun()
    check_gpu()
    if 'RANK' not in os.environ and 'WORLD_SIZE' not in os.environ:
        return

    # This process's place among the others, and its GPU.
    rank, world_size = _environment('RANK'), _environment('WORLD_SIZE')
    if not rank < world_size:
        raise UserError(
            f'RANK={rank} is not below WORLD_SIZE={world_size}. Start the processes with torchrun.'
        )
    if torch.cuda.is_available():
        local_rank = _environment('LOCAL_RANK')
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f'LOCAL_RANK={local_rank}, but this machine has {torch.cuda.device_count()} GPUs. Lower '
                '--nproc_per_node.'
            )
        torch.cuda.set_device(local_rank)
    if world_size == 1 or dist.is_initialized():
        return

    # Join them; after a restart, torchrun's store needs a new prefix.
    _check_host_name(world_size)
    try:
        waits = {} if timeout is None else dict(timeout=timedelta(minutes=timeout))
        joins = {} if init_timeout is None else dict(timeout=timedelta(minutes=init_timeout))
        if elastic.restarts()[1]:
            store = _store_of_this_start(rank, world_size)
        else:
            store, *_ = next(dist.rendezvous('env://', rank, world_size, **joins))
        if joins:
            store.set_timeout(joins['timeout'])
        where = dict(store=store, rank=rank, world_size=world_size)
        dist.init_process_group('nccl' if torch.cuda.is_available() else 'gloo', **where, **waits)
        _patient.append(dist.new_group(backend='gloo', timeout=PATIENCE))
        # What the main process has printed, the others need not print again.
        if not rank:
            cli.ON_ERROR.append(_tell_of_error)
    except (RuntimeError, ValueError) as error:  # torch's own network and store errors are RuntimeErrors
        reason = first_line(error)
        raise UserError(
            f'Process {rank} of {world_size} could not join the others: {reason} '
            'Start the processes with torchrun, and check MASTER_ADDR, MASTER_PORT and the network.'
        ) from error


def _check_host_name(world_size: int) -> None:
    """Raises: UserError if other machines could not reach this one by the address of its name, which gloo takes."""
    on_other_machines = int(os.environ.get('LOCAL_WORLD_SIZE', world_size)) < world_size
    if not on_other_machines or 'GLOO_SOCKET_IFNAME' in os.environ:
        return
    try:
        address = socket.gethostbyname(name := socket.gethostname())
    except OSError:
        return
    if address.startswith('127.'):
        raise UserError(
            f'This machine takes its name, {name}, for {address}, where other machines do not reach it. Set '
            'GLOO_SOCKET_IFNAME to its network interface (and NCCL_SOCKET_IFNAME), such as eth0: `ip '
            'address` lists them.'
        )


def check_gpu() -> None:
    """Raises: UserError if the machine has an NVIDIA GPU that PyTorch cannot use. On the CPU a run would take
    days in place of minutes, without a word."""
    hidden = os.environ.get('CUDA_VISIBLE_DEVICES', 'all') in ('', '-1')
    if hidden or not os.path.exists(NVIDIA_DEVICE) or torch.cuda.is_available():
        return
    if torch.version.cuda is None:
        reason = 'this PyTorch was built for CPUs'
    else:
        try:
            torch.cuda.init()
            reason = 'CUDA finds no device'
        except (RuntimeError, AssertionError) as error:
            reason = first_line(error)
    raise UserError(
        f'This machine has an NVIDIA GPU ({NVIDIA_DEVICE}), but PyTorch {torch.__version__} cannot use it: '
        f'{reason}. Install a PyTorch for the driver that nvidia-smi names (README.md: Installation), or set '
        'CUDA_VISIBLE_DEVICES= (empty) to run on the CPU.'
    )


def _store_of_this_start(rank: int, world_size: int) -> dist.Store:
    """torchrun's store, under a prefix that the main process chooses and passes to the others.

    After a restart the store still has the addresses of ended processes. The number of restarts cannot be the
    prefix, because torchruns on several machines count separately.
    """
    # Each process registers a random name; the main process passes the prefix, its own name, to all of them.
    store, *_ = next(dist.rendezvous('env://', rank, world_size))
    name, deadline = secrets.token_hex(8), time.monotonic() + store.timeout.total_seconds()
    if rank:
        store.set(f'name/{rank}', name)
        prefix = store.get(f'prefix for {name}').decode()  # waits
        store.set(f'{prefix}/joined/{rank}', '')
        return dist.PrefixStore(prefix, store)

    # Names of ended processes are in the store too, so wait until every rank confirms.
    missing = range(1, world_size)
    while missing := [other for other in missing if not store.check([f'{name}/joined/{other}'])]:
        for other in missing:
            if store.check([f'name/{other}']):
                store.set(f'prefix for {store.get(f"name/{other}").decode()}', name)
        if time.monotonic() > deadline:
            raise RuntimeError(f'processes {", ".join(map(str, missing[:20]))} did not join.')
        time.sleep(0.02)
    return dist.PrefixStore(name, store)


def _environment(name: str) -> int:
    value = os.environ.get(name, '')
    if not re.fullmatch('[0-9]{1,9}', value):
        raise UserError(
            f"The environment variable {name} is '{printable(value, MAX_DIGITS)}', not a number of at most "
            '9 digits. Start the processes with torchrun, or unset RANK and WORLD_SIZE.'
        )
    return int(value)


# ----------------------------------------------------------------------------
# This process among the others.


def get_rank() -> int:
    """This process's number, 0 .. get_world_size() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def get_local_world_size() -> int:
    """Number of processes on this machine, as torchrun says."""
    return (
        _environment('LOCAL_WORLD_SIZE') if dist.is_initialized() and 'LOCAL_WORLD_SIZE' in os.environ else 1
    )


def get_backend() -> str | None:
    """The library of collectives, `nccl` or `gloo`; None in a single process."""
    return dist.get_backend() if dist.is_initialized() else None


def get_device() -> torch.device:
    """The GPU that belongs to this process, or the CPU."""
    return (
        torch.device('cuda', torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device('cpu')
    )


def is_main() -> bool:
    """Whether this is rank 0, which prints and writes files."""
    return get_rank() == 0


def in_several_graphs(net: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """`net` in DDP, for which torch.compile cuts it into several graphs, so that its gradients do not all arrive at
    the end of the backward pass. `gradients.Gradients` reduces them, DDP does not. Buffers are constants."""
    wrapper = torch.nn.parallel.DistributedDataParallel
    # PyTorch 2.13 renamed the option.
    new = 'forward_sync_buffers' in inspect.signature(wrapper).parameters
    buffers = {'forward_sync_buffers' if new else 'broadcast_buffers': False}
    ddp = wrapper(net, device_ids=[device] if device.type == 'cuda' else None, **buffers)
    ddp.require_backward_grad_sync = False

    # torch.compile cuts the network where a bucket of this size is full, and takes each parameter for as large as
    # its storage, which is that of all (`FlatParameters`).
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    largest = max(parameter.untyped_storage().nbytes() for parameter in trained)
    if largest > trained[0].nbytes:
        ddp.bucket_bytes_cap = max(ddp.bucket_bytes_cap, largest * -(-len(trained) // GRAPHS))

    # It cannot cut a graph of a dynamic batch size, which the graphs of a class become once any network of it was
    # compiled for two sizes, such as a teacher's for part of a batch.
    ddp.register_forward_pre_hook(_of_static_size, with_kwargs=True)
    return ddp


def _of_static_size(net: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    """Have torch.compile take the first dimension of all tensors as a constant."""
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor) and leaf.ndim:
            torch._dynamo.mark_static(leaf, 0)


# ----------------------------------------------------------------------------
# Errors of other processes.


@contextlib.contextmanager
def _together():
    """A block that needs the other processes. Raises: UserError if one has ended, which says why itself."""
    try:
        yield
    except RuntimeError as error:
        _lost(error)


@contextlib.contextmanager
def among_others():
    """A block that sometimes needs the other processes, such as a backward pass.

    Raises: UserError if one has ended; other errors unchanged.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or 'gloo/transport' in str(error):
            _lost(error)
        raise


ENDED = 'the main process has printed an error'  # a key of the store


def _tell_of_error() -> None:
    """Leave word in the store, which outlives this process under torchrun, that it has printed an error."""
    with contextlib.suppress(RuntimeError):
        dist.distributed_c10d._get_default_store().set(ENDED, '')


def _lost(error: RuntimeError) -> NoReturn:
    # One message is enough.
    with contextlib.suppress(RuntimeError):
        if not is_main() and dist.distributed_c10d._get_default_store().check([ENDED]):
            raise SystemExit(1) from error
    reason = str(error).strip().splitlines()[-1]
    raise UserError(
        f'Process {get_rank()} lost the others ({reason}). See above what stopped them.'
    ) from error


# ----------------------------------------------------------------------------
# Collectives.


def _patient_group() -> dist.ProcessGroup | None:
    """The group that waits for the main process; None, the group of all, where `init` has not joined it."""
    return _patient[0] if _patient else None


def barrier() -> None:
    """Wait for every process."""
    if dist.is_initialized():
        with _together():
            dist.barrier(_patient_group())


@contextlib.contextmanager
def main_process_first():
    """A block that the main process runs before the others, such as a download into the cache."""
    # The others find what the main process has left in the cache.
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over processes, in place; returns `tensor`. With NCCL it must be on this process's GPU."""
    if dist.is_initialized():
        with _together():
            dist.all_reduce(tensor)
    return tensor


def broadcast_object(obj: Any) -> Any:
    """The main process's `obj` (anything that pickles), on every process."""
    if not dist.is_initialized():
        return obj
    box = [obj]
    with _together():
        dist.broadcast_object_list(box, src=0, group=_patient_group())
    return box[0]


def broadcast_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The main process's contiguous `tensor`, on the CPU, into every process's, in place."""
    # As bytes: not all types can be sent.
    data = tensor.view(-1).view(torch.uint8)
    with _together():
        for start in range(0, len(data), CHUNK):
            dist.broadcast(data[start : start + CHUNK], src=0, group=_patient_group())
    return tensor


def gather_objects(obj: Any) -> list[Any]:
    """Every process's `obj` (anything that pickles), in the order of ranks, on every process."""
    if not dist.is_initialized():
        return [obj]
    boxes = [None] * get_world_size()
    with _together():
        dist.all_gather_object(boxes, obj, group=_patient_group())
    return boxes


def gather_on_main(obj: Any) -> list[Any]:
    """Every process's `obj` (anything that pickles), by rank, on the main process; elsewhere []."""
    if not dist.is_initialized():
        return [obj]
    boxes = [None] * get_world_size() if is_main() else None
    with _together():
        dist.gather_object(obj, boxes, group=_patient_group())
    return boxes or []


def weights_from_main(net: torch.nn.Module) -> torch.nn.Module:
    """The network, with the main process's parameters and buffers on every process: random numbers may differ in
    their last bit between machines."""
    if dist.is_initialized():
        with _together():
            for tensor in (*net.parameters(), *net.buffers()):
                dist.broadcast(tensor.detach(), src=0)
    return net


def same_everywhere(tensor: torch.Tensor) -> bool:
    """Whether `tensor`, of a length divisible by 16, has equal checksums on all processes. Synchronizes."""
    if not dist.is_initialized():
        return True
    # Checksums agree if their minimum and maximum over the processes do.
    # The bits as integers, because sums of floats would round, and NaN is not equal to itself.
    least = tensor.detach().view(torch.int32).view(-1, 16).sum(dim=0, dtype=torch.int64)
    most = least.clone()
    with _together():
        dist.all_reduce(least, dist.ReduceOp.MIN)
        dist.all_reduce(most, dist.ReduceOp.MAX)
    return torch.equal(least, most)


class AsyncAllReduce:
    """Async all-reduce of flags on the CPUs, which waits neither for other processes nor for devices.

    Every process must call `exchange` and `any` in the same order.
    """

    def __init__(self):
        # Between two calls the main process may save.
        group = lambda: dist.new_group(backend='gloo', timeout=PATIENCE)
        self._group = group() if dist.is_initialized() else None
        self._pending: tuple[Any, torch.Tensor] | None = None

    def exchange(self, values: list[int]) -> list[int]:
        """Maxima over processes of the previous call's flags, zeros at first; `values` without a group."""
        if self._group is None:
            return values
        # Start this exchange, then take the result of the previous one, which has had a step to arrive.
        earlier, tensor = self._pending, torch.tensor(values)
        self._pending = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group, async_op=True), tensor
        if earlier is None:
            return [0] * len(values)
        earlier[0].wait()
        return earlier[1].tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process now. Synchronizes the processes."""
        if self._group is None:
            return flag
        tensor = torch.tensor(int(flag))
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        return bool(tensor)

    def close(self) -> None:
        """Wait for a pending exchange."""
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None


# ----------------------------------------------------------------------------
# Acting as one program.


def fail_together(*lines: str) -> NoReturn:
    """End all processes, which must all call this, with exit status 1 and one message."""
    if is_main():
        raise UserError(*lines)
    raise SystemExit(1)


def from_main(function: Callable[[], Any]) -> Any:
    """The main process's `function()` (anything that pickles) on every process; all raise its UserError."""
    # The others wait in the broadcast, so an error must reach it too.
    result, problem = None, None
    if is_main():
        try:
            result = function()
        except UserError as error:
            problem = error.args
    result, problem = broadcast_object((result, problem))
    if problem is not None:
        fail_together(*problem)
    return result


class _Sent(NamedTuple):
    """In place of a tensor that is broadcast."""

    index: int
    shape: torch.Size
    dtype: torch.dtype


def tensors_from_main(function: Callable[[], Any]) -> Any:
    """The main process's `function()`, plain data and tensors of the CPU, on every process; all raise its
    UserError."""
    if not dist.is_initialized():
        return function()
    tensors: list[torch.Tensor] = []

    def without_tensors(value):
        if torch.is_tensor(value):
            tensors.append(value.contiguous())
            return _Sent(len(tensors) - 1, value.shape, value.dtype)
        if isinstance(value, dict):
            return type(value)({key: without_tensors(entry) for key, entry in value.items()})
        return type(value)(map(without_tensors, value)) if type(value) in (list, tuple) else value

    def with_tensors(value):
        if isinstance(value, _Sent):
            own = tensors[value.index] if is_main() else torch.empty(value.shape, dtype=value.dtype)
            return broadcast_tensor(own)
        if isinstance(value, dict):
            return type(value)({key: with_tensors(entry) for key, entry in value.items()})
        return type(value)(map(with_tensors, value)) if type(value) in (list, tuple) else value

    # Their shapes first, then the tensors in the same order.
    return with_tensors(from_main(lambda: without_tensors(function())))


def progress(items: Iterable | None = None, leave: bool = False, **options):
    """A bar of tqdm's over the items, on the main process if stderr is a terminal; without `leave` it leaves no trace."""
    from tqdm import tqdm

    hidden = None if is_main() else True  # tqdm's None: hidden unless stderr is a terminal
    return tqdm(items, disable=hidden, dynamic_ncols=True, leave=leave, **options)


def print0(*args, **kwargs) -> None:
    """`print` on the main process only."""
    if is_main():
        print(*args, **kwargs)


def shutdown() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        _patient.clear()
        dist.destroy_process_group()
