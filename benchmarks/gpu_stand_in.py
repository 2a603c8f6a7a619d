"""A stand-in for a GPU: tensors on 'cuda' have shapes, types and layouts but no values, those on the host are
real.

Whole training steps run on it, forward and backward. What would make the host wait for the device, or mixes
devices, is recorded with the line of this repository that asked for it, and work goes
on with twos, or true. Kernels
are counted by a table of how many each operator launches (`LAUNCHES`), memory by the life of storages. So
counts are estimates and times do not exist; what is found to wait does wait.

Needs a device guard for 'cuda', which CPU builds of PyTorch lack: g++ builds one in seconds, to be loaded into
a new process (`guarded_environment`).
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import types
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]

# Autograd must take 'cuda' for a device without streams, and find a guard for it that does nothing.
GUARD = r"""
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <optional>
using c10::DeviceType;
#define VISIBLE __attribute__((visibility("default")))

namespace at::accelerator {
VISIBLE bool isAccelerator(DeviceType) { return false; }
VISIBLE std::optional<DeviceType> getAccelerator(bool) { return {}; }
}

static c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> idle;
__attribute__((constructor)) static void install() {
  c10::impl::device_guard_impl_registry[(int)DeviceType::CUDA].store(&idle);
}
"""

# ----------------------------------------------------------------------------
# The guard.


def why_unavailable() -> str | None:
    """Why there can be no stand-in here; None if there can."""
    if torch.version.cuda or torch.version.hip:
        return 'this PyTorch was built for GPUs, whose autograd looks for a real one'
    return None if shutil.which('g++') else 'there is no g++ to build a device guard with'


def guarded_environment() -> dict[str, str]:
    """Environment variables of a process that the guard is loaded into; builds it at the first call."""
    version = hashlib.sha256(f'{GUARD} {torch.__version__}'.encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f'gpu-stand-in-{os.getuid()}-{version}.so'
    if not library.exists():
        build_guard(library)
    return dict(LD_PRELOAD=str(library))


def build_guard(library: Path) -> None:
    """Compile the guard, under a name of its own until it is complete."""
    home, partial = Path(torch.__file__).parent, library.with_suffix(f'.{os.getpid()}')
    include, linked = f'-I{home / "include"}', [f'-L{home / "lib"}', f'-Wl,-rpath,{home / "lib"}', '-lc10']
    subprocess.run(
        ['g++', '-std=c++20', '-fPIC', '-shared', '-x', 'c++', '-', include, *linked, '-o', str(partial)],
        input=GUARD.encode(),
        check=True,
    )
    partial.rename(library)


# ----------------------------------------------------------------------------
# What the host asks of a device.


class Findings:
    """What made the host wait or mixed devices: {(what, where): times}.

    `asynchronous` counts waits for events, which earlier work has recorded, by place.
    """

    def __init__(self):
        self.waits: collections.Counter[tuple[str, str]] = collections.Counter()
        self.asynchronous: collections.Counter[str] = collections.Counter()

    def wait(self, what: str) -> None:
        self.waits[what, _place()] += 1

    def lines(self) -> list[str]:
        """`12 x item() at training/rng.py:3`, most frequent first."""
        return [f'{count} x {what} at {where}' for (what, where), count in self.waits.most_common()]


def _place() -> str:
    """The innermost line of this repository outside of this file."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path != Path(__file__).resolve() and '.venv' not in path.parts:
            return f'{path.relative_to(ROOT)}:{frame.f_lineno}'
        frame = frame.f_back
    return 'PyTorch'


# Operators that launch more than one kernel, besides those of biases, or none.
LAUNCHES = {
    'convolution_backward': 2,
    'native_group_norm': 2,
    'native_group_norm_backward': 3,
    '_scaled_dot_product_flash_attention_backward': 3,
    '_scaled_dot_product_efficient_attention_backward': 3,
    'linalg_vector_norm': 2,
    **dict.fromkeys(['empty', 'empty_like', 'empty_strided', 'new_empty', 'new_empty_strided', 'set_'], 0),
    **dict.fromkeys(['lift_fresh', 'detach', 'alias', '_unsafe_view', '_reshape_alias', 'record_stream'], 0),
}
# Operators whose result the host must know, or whose shape depends on values.
INDEXING = ('index', 'index_put', 'index_put_', '_index_put_impl_')
ASKING = ('_local_scalar_dense', 'equal', 'nonzero', 'masked_select', '_unique2', 'unique_dim')


def launches(func, args) -> int:
    """Number of kernels of an operator's call."""
    name = func.overloadpacket.__name__
    if func.is_view or func.namespace == 'prim':
        return 0
    count = LAUNCHES.get(name, 1)
    # cuDNN adds biases, and sums their gradients, by kernels of their own.
    if name == 'convolution' and args[2] is not None:
        count += 1
    if name == 'convolution_backward' and args[-1][2]:
        count += 1
    return count


# ----------------------------------------------------------------------------
# The device.


class StandIn(TorchDispatchMode):
    """Runs operators of the host for real, and those of the GPU on tensors without values.

    Attributes:
        findings: see `Findings`.
        kernels: number of kernels by operator, since `reset`.
        layouts: convolutions by the memory format of their input.
        allocated, peak: bytes on the device, now and at most since `reset`; only with `track_memory`.
    """

    # One for the process, in which tensors may be cached.
    fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __init__(self, track_memory: bool = False):
        super().__init__()
        self.findings, self.track_memory = Findings(), track_memory
        self.kernels: collections.Counter[str] = collections.Counter()
        self.layouts: collections.Counter[str] = collections.Counter()
        self.allocated = self.peak = 0
        self._storages: dict[int, int] = {}
        self._pinned: dict[int, weakref.ref] = {}

    def reset(self) -> None:
        """Forget counts and the peak; storages stay."""
        self.kernels.clear()
        self.layouts.clear()
        self.findings, self.peak = Findings(), self.allocated

    def __torch_dispatch__(self, func, types_, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        target = kwargs.get('device')
        to_gpu = target is not None and torch.device(target).type == 'cuda'
        if not to_gpu and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return self._on_host(func, args, kwargs)
        return self._on_gpu(func, args, kwargs, tensors)

    def _on_host(self, func, args, kwargs):
        pin = kwargs.pop('pin_memory', None)
        result = func(*args, **kwargs)
        return self.pin(result) if pin else result

    def _on_gpu(self, func, args, kwargs, tensors):
        name = func.overloadpacket.__name__
        # Generators have values, which nothing here needs.
        if isinstance(kwargs.get('generator'), torch.Generator):
            kwargs['generator'] = None
        args = tuple(None if isinstance(arg, torch.Generator) else arg for arg in args)
        if name == '_local_scalar_dense':
            self.findings.wait('item()')
            return func(torch.full([], 2, dtype=args[0].dtype))
        if name in ASKING:
            self.findings.wait(f'{name}()')
            if name == 'equal':
                return True
            if name == 'nonzero':
                return _every_index(args[0])
        if name in INDEXING and any(map(_is_mask, args[1])):
            self.findings.wait('indexing by a mask')
            indices = [_every_index(i).unbind(1) if _is_mask(i) else [i] for i in args[1]]
            args = (args[0], list(itertools.chain(*indices)), *args[2:])
        if (copied := self._copy_between(name, func, args, kwargs)) is not None:
            return copied

        # All other operators.
        try:
            with self.fake:
                result = func(*args, **kwargs)
        except RuntimeError as error:
            self.findings.wait(f'{name}: {str(error).strip().splitlines()[0]}')
            raise
        if count := launches(func, args):
            self.kernels[name] += count
        if name == 'convolution':
            self.layouts[_layout(args[0])] += 1
        if self.track_memory:
            for leaf in tree_leaves(result):
                self._track(leaf)
        return result

    # Copies between host and device.

    def _copy_between(self, name: str, func, args, kwargs):
        """The result of a copy to the host, which has no values; None for other operators.

        Copies in both directions are asynchronous only if pinned memory and `non_blocking` say so.
        """
        if name not in ('_to_copy', 'copy_', 'empty_like'):
            return None
        on_host = lambda tensor: not isinstance(tensor, FakeTensor)
        asynchronous = kwargs.get('non_blocking') or (name == 'copy_' and len(args) > 2 and args[2])

        if name == 'copy_':
            target, source = args[:2]
            if on_host(target) and not on_host(source):
                if not (asynchronous and self.is_pinned(target)):
                    self.findings.wait(f'copy to {"pinned" if self.is_pinned(target) else "pageable"} memory')
                self.kernels['copy to the host'] += 1
                return target.fill_(2)
            if on_host(source) and source.dim():
                self._check_upload(source, asynchronous)
            return None

        device = kwargs.get('device')
        to_host = device is not None and torch.device(device).type == 'cpu'
        if to_host and not on_host(args[0]):
            if name == '_to_copy':
                self.findings.wait('copy to pageable memory')
            result = torch.full(args[0].shape, 2, dtype=kwargs.get('dtype') or args[0].dtype)
            return self.pin(result) if kwargs.get('pin_memory') else result
        if name == '_to_copy' and on_host(args[0]):
            self._check_upload(args[0], asynchronous)
        return None

    def _check_upload(self, source: torch.Tensor, asynchronous: bool) -> None:
        if source.numel() and not (asynchronous and self.is_pinned(source)):
            kind = 'pinned' if self.is_pinned(source) else 'pageable'
            self.findings.wait(f'{"" if asynchronous else "blocking "}copy from {kind} memory')

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Take the tensor's memory for pinned."""
        storage = tensor.untyped_storage()
        self._pinned[storage.data_ptr()] = weakref.ref(storage)
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        storage = tensor.untyped_storage()
        found = self._pinned.get(storage.data_ptr())
        return found is not None and found() is storage

    # Memory.

    def _track(self, tensor) -> None:
        """Count a storage of the device until it is freed."""
        if not isinstance(tensor, FakeTensor) or tensor.device.type != 'cuda':
            return
        storage = tensor.untyped_storage()
        if id(storage) in self._storages:
            return
        # The caching allocator rounds to 512 bytes.
        size = -(-storage.nbytes() // 512) * 512
        self._storages[id(storage)] = size
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        weakref.finalize(storage, self._freed, id(storage)).atexit = False

    def _freed(self, key: int) -> None:
        self.allocated -= self._storages.pop(key)


def _is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _every_index(mask: torch.Tensor) -> torch.Tensor:
    """What `nonzero` returns for a mask that is true everywhere: [count, dimensions] int64."""
    with StandIn.fake:
        return torch.empty([mask.numel(), mask.dim()], dtype=torch.int64, device=mask.device)


def _layout(x: torch.Tensor) -> str:
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return 'NHWC'
    return 'NCHW' if x.is_contiguous() else 'other'


# ----------------------------------------------------------------------------
# What stands in for torch.cuda.


class _Stream:
    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream):
        pass

    wait_event = wait_stream

    def record_event(self, event=None):
        return torch.cuda.Event()


def _event_class(stand_in: StandIn) -> type:
    class Event:
        def __init__(self, *args, **kwargs):
            pass

        def record(self, stream=None):
            pass

        def query(self):
            return True

        def synchronize(self):
            stand_in.findings.asynchronous[_place()] += 1

    return Event


class _Generator(torch.Generator):
    """A generator of any device, whose numbers the device does not have."""

    def __new__(cls, device='cpu'):
        return super().__new__(cls, 'cpu')

    def __init__(self, device='cpu'):
        self._device = torch.device(device)


def _attention(q, k, v, *args, **kwargs):
    """The fused kernel that a GPU would choose, by precision."""
    if q.device.type != 'cuda':
        return torch._C._nn.scaled_dot_product_attention(q, k, v, *args, **kwargs)
    if q.dtype in (torch.float16, torch.bfloat16):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]


def _convert(module: torch.nn.Module, convert, recurse: bool = True) -> torch.nn.Module:
    """`Module._apply` by new parameters: those of the host cannot become the device's in place."""
    for part in module.modules() if recurse else [module]:
        for name, parameter in part.named_parameters(recurse=False):
            if (new := convert(parameter.detach())) is not parameter:
                setattr(part, name, torch.nn.Parameter(new, requires_grad=parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, convert(buffer))
    return module


def _copied(tensor: FakeTensor, memo: dict) -> FakeTensor:
    """`Parameter.__deepcopy__`, which parameters without values lack: not of the vector that one is a view of."""
    if not isinstance(tensor, torch.nn.Parameter):
        return torch.Tensor.__deepcopy__(tensor, memo)
    if id(tensor) not in memo:
        copy = tensor.detach().clone(memory_format=torch.preserve_format)
        memo[id(tensor)] = torch.nn.Parameter(copy, tensor.requires_grad)
    return memo[id(tensor)]


def _replacements(stand_in: StandIn) -> list[tuple[object, str, object]]:
    """(owner, name, value) of what is replaced while the stand-in is in use."""
    nothing, device = lambda *args, **kwargs: None, torch.device('cuda', 0)
    properties = types.SimpleNamespace(total_memory=80 * 2**30, name='stand-in')
    cuda = dict(
        is_available=lambda: True,
        current_device=lambda: device.index,
        device_count=lambda: 1,
        set_device=nothing,
        _lazy_init=nothing,
        synchronize=lambda *args: stand_in.findings.wait('torch.cuda.synchronize()'),
        Event=_event_class(stand_in),
        Stream=_Stream,
        current_stream=lambda *args: _Stream(),
        stream=lambda stream: contextlib.nullcontext(),
        get_device_name=lambda *args: properties.name,
        get_device_properties=lambda *args: properties,
        get_rng_state=lambda *args: torch.zeros(16, dtype=torch.uint8),
        max_memory_allocated=lambda *args: stand_in.peak,
        reset_peak_memory_stats=lambda *args: stand_in.reset(),
        empty_cache=nothing,
    )
    return [
        *((torch.cuda, name, value) for name, value in cuda.items()),
        (torch.accelerator, 'is_available', lambda: True),
        (torch, 'Generator', _Generator),
        (torch.nn.Module, '_apply', _convert),
        (torch.nn.functional, 'scaled_dot_product_attention', _attention),
        (FakeTensor, '__deepcopy__', _copied),
        (FakeTensor, 'tolist', lambda tensor: tensor.cpu().tolist()),
        (torch.Tensor, 'is_pinned', lambda tensor, *args: stand_in.is_pinned(tensor)),
        (torch.Tensor, 'pin_memory', lambda tensor, *args: stand_in.pin(tensor.clone())),
        (FakeTensorMode, 'avoid_device_init', True),
    ]


def leave() -> NoReturn:
    """End this process at once, its output written: threads of autograd, for a device that is not there, sometimes
    abort it at its end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@contextlib.contextmanager
def gpu(track_memory: bool = False) -> Iterator[StandIn]:
    """A context in which 'cuda' is the stand-in, in a process with `guarded_environment`."""
    stand_in = StandIn(track_memory)
    # Without a kernel on the GPU, PyTorch would split this operator into others.
    operators = torch.library.Library('aten', 'IMPL')
    operators.impl('silu_backward', lambda *args: NotImplemented, 'CUDA')
    with contextlib.ExitStack() as undo:
        # `torch.tensor(..., device='cuda')` makes a tensor of the host, and copies it.
        undo.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        for owner, name, value in _replacements(stand_in):
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        undo.enter_context(stand_in)
        yield stand_in
