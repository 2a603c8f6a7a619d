"""Snapshots as other programs and versions write them, made from our networks without the code of those.

Pickles are written opcode by opcode where that matters: names of any module, storages of any device, what protocols differ in, the states of
old and new `torch.nn.Module`s. A `Style` says which of these; `snapshot` writes a network in it.
"""

import io
import pickle
import struct
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch

STORAGES = {
    torch.float32: 'FloatStorage',
    torch.float64: 'DoubleStorage',
    torch.float16: 'HalfStorage',
    torch.bfloat16: 'BFloat16Storage',
    torch.int64: 'LongStorage',
}
OLD_TABLES = (
    '_parameters',
    '_buffers',
    '_backward_hooks',
    '_forward_hooks',
    '_forward_pre_hooks',
    '_state_dict_hooks',
    '_load_state_dict_pre_hooks',
    '_modules',
)  # of a module in PyTorch 1.8: ordered dicts all


@dataclass(frozen=True)
class Style:
    protocol: int = 4
    numpy: str = 'numpy._core'  # `numpy.core` before NumPy 2
    location: str = 'cpu'  # where the tensors were
    era: str = 'new'  # `old`: modules of PyTorch 1.8
    description: int = 6  # entries of a storage's description; 5 in the oldest files
    view: bool = False  # storages are described as views of larger ones
    tensor: str = (
        'plain'  # or `typed`, `attributes`: how PyTorch writes tensors of new types, and such with attributes
    )
    requires_grad: bool = False
    parameter_state: bool = False  # parameters have attributes
    python2: bool = False  # byte strings are those of Python 2
    shared: bool = False  # all tensors are views of one storage
    numpy_numbers: bool = False  # floats among arguments and attributes are NumPy's


class Named:
    """A global that need not exist."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class Rebuilt:
    """An object that is pickled as a call of `function`, or with `new` as an instance of that class, and a state."""

    def __init__(self, function: Named, *args, state=None, new=False, kwargs=None):
        self.function, self.args, self.state, self.new, self.kwargs = function, args, state, new, kwargs


class Pickler(pickle._Pickler):
    """Python's own pickler, which also writes `Named` and `Rebuilt`."""

    def __init__(self, file, style: Style):
        super().__init__(file, style.protocol)
        self.style = style

    def save(self, obj, save_persistent_id=True):
        python2 = self.style.python2 and isinstance(obj, bytes)
        if id(obj) in self.memo or not (python2 or isinstance(obj, (Named, Rebuilt))):
            return super().save(obj, save_persistent_id)
        if python2:
            self.write(
                (b'U' + bytes([len(obj)]) if len(obj) < 256 else b'T' + struct.pack('<i', len(obj))) + obj
            )
        elif isinstance(obj, Named):
            self.save_name(obj)
        else:
            self.save(obj.function)
            self.save(obj.args)
            if obj.kwargs is not None:
                self.save(obj.kwargs)
            self.write(
                pickle.REDUCE if not obj.new else pickle.NEWOBJ if obj.kwargs is None else pickle.NEWOBJ_EX
            )
        self.memoize(obj)
        if isinstance(obj, Rebuilt) and obj.state is not None:
            self.save(obj.state)
            self.write(pickle.BUILD)

    def save_name(self, obj: Named):
        if self.style.protocol >= 4:
            self.save(obj.module)
            self.save(obj.name)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(pickle.GLOBAL + f'{obj.module}\n{obj.name}\n'.encode())


def dumps(value, style: Style = Style()) -> bytes:
    """A pickle of plain data, `Named` and `Rebuilt`."""
    file = io.BytesIO()
    Pickler(file, style).dump(value)
    return file.getvalue()


# ----------------------------------------------------------------------------
# Values.


def numpy_dtype(code: str) -> Rebuilt:
    return Rebuilt(Named('numpy', 'dtype'), code, False, True, state=(3, '<', None, None, None, -1, -1, 0))


def numpy_scalar(value, style: Style) -> Rebuilt:
    value = np.asarray(value)
    return Rebuilt(
        Named(f'{style.numpy}.multiarray', 'scalar'), numpy_dtype(value.dtype.str[1:]), value.tobytes()
    )


def numpy_array(value, style: Style):
    """An array: by protocol 5 around a buffer, by the others around nothing, which is then given a state."""
    value = np.asarray(value)
    if style.protocol == 5:
        return Rebuilt(
            Named(f'{style.numpy}.numeric', '_frombuffer'),
            bytearray(value.tobytes()),
            numpy_dtype(value.dtype.str[1:]),
            value.shape,
            'C',
        )
    return Rebuilt(
        Named(f'{style.numpy}.multiarray', '_reconstruct'),
        Named('numpy', 'ndarray'),
        (0,),
        b'b',
        state=(1, value.shape, numpy_dtype(value.dtype.str[1:]), False, value.tobytes()),
    )


def storage_bytes(data: torch.Tensor, style: Style) -> bytes:
    """[n] in PyTorch's legacy format."""
    header = dict(protocol_version=1001, little_endian=True, type_sizes=dict(short=2, int=4, long=4))
    view = None
    if style.view:
        view = ('root', 3, len(data))
        data = torch.cat([data.new_full([3], 7), data, data.new_full([2], 7)])
    kind = (
        Named('torch.storage', 'UntypedStorage')
        if data.dtype == torch.uint8
        else Named('torch', STORAGES[data.dtype])
    )
    record = ('storage', kind, '94339232', style.location, len(data), view)[: style.description]
    described = dumps(record, Style(protocol=2))[:-1] + b'Q.'
    pickles = [
        pickle.dumps(0x1950A86A20F9469CFC6C, 2),
        pickle.dumps(1001, 2),
        pickle.dumps(header, 2),
        described,
        pickle.dumps(['94339232'], 2),
    ]
    return b''.join(pickles) + struct.pack('<q', len(data)) + data.view(torch.uint8).numpy().tobytes()


def storage(data: torch.Tensor, style: Style) -> Rebuilt:
    return Rebuilt(Named('torch.storage', '_load_from_bytes'), storage_bytes(data, style))


def tensor(value: torch.Tensor, style: Style, stored: Rebuilt | None = None, offset: int = 0) -> Rebuilt:
    """A tensor; `stored`: its storage, else one of its own that has its elements as they lie in memory."""
    if stored is None:
        elements = value.as_strided([value.numel()], [1])
        stored = storage(elements.view(torch.uint8) if style.tensor == 'typed' else elements, style)
    args = (stored, offset, tuple(value.shape), value.stride(), False, OrderedDict())
    if style.tensor == 'typed':
        return Rebuilt(
            Named('torch._utils', '_rebuild_tensor_v3'),
            *args,
            Named('torch', str(value.dtype).partition('.')[2]),
            None,
        )
    if style.tensor == 'attributes':
        rebuild, kind = Named('torch._utils', '_rebuild_tensor_v2'), Named('torch', 'Tensor')
        return Rebuilt(
            Named('torch._tensor', '_rebuild_from_type_v2'),
            rebuild,
            kind,
            args,
            {'persistent': True, '_is_buffer': True},
        )
    return Rebuilt(Named('torch._utils', '_rebuild_tensor_v2'), *args)


def persistent(class_name: str, state: dict) -> Rebuilt:
    """A persistent object of a class, with source that is no Python."""
    meta = dict(type='class', version=6, module_src='never run', class_name=class_name, state=state)
    return Rebuilt(Named('torch_utils.persistence', '_reconstruct_persistent_obj'), meta)


# ----------------------------------------------------------------------------
# Networks.


class Writer:
    """Turns a network into what a snapshot of a style holds."""

    def __init__(self, net: torch.nn.Module, style: Style, forget: tuple[str, ...], extra: dict):
        self.style, self.forget, self.extra = style, forget, extra
        self.offsets, self.flat = {}, None
        if style.shared:
            tensors = [*net.parameters(), *net.buffers()]
            sizes = [value.numel() for value in tensors]
            self.offsets = {
                id(value): offset for value, offset in zip(tensors, np.cumsum([0, *sizes[:-1]]).tolist())
            }
            self.flat = storage(torch.cat([value.detach().flatten() for value in tensors]), style)

    def module(self, module: torch.nn.Module) -> Rebuilt:
        state = {
            name: value for name, value in vars(module).items() if name not in (*self.forget, 'metadata')
        }
        if self.style.era == 'old':
            kept = (
                *OLD_TABLES,
                '_non_persistent_buffers_set',
                '_is_full_backward_hook',
                '_init_args',
                '_init_kwargs',
            )
            state = {
                name: OrderedDict(value) if name in OLD_TABLES else value
                for name, value in state.items()
                if name in kept or name[0] != '_'
            }
        write = dict(_parameters=self.parameter, _buffers=self.tensor, _modules=self.module)
        for name, value in state.items():
            if name in write:
                state[name] = type(value)(
                    (key, item if item is None else write[name](item)) for key, item in value.items()
                )
            else:
                state[name] = self.value(value)
        state.update(self.extra)
        if hasattr(module, 'init_args'):
            return persistent(type(module).__name__, state)
        return Rebuilt(Named(type(module).__module__, type(module).__name__), state=state, new=True)

    def value(self, value):
        if isinstance(value, dict):
            return type(value)((name, self.value(item)) for name, item in value.items())
        if isinstance(value, (list, tuple)):
            return type(value)(self.value(item) for item in value)
        return (
            numpy_scalar(value, self.style)
            if isinstance(value, float) and self.style.numpy_numbers
            else value
        )

    def tensor(self, value: torch.Tensor) -> Rebuilt:
        return tensor(value.detach(), self.style, self.flat, self.offsets.get(id(value), 0))

    def parameter(self, value: torch.Tensor) -> Rebuilt:
        data = self.tensor(value)
        if self.style.parameter_state:
            return Rebuilt(
                Named('torch._utils', '_rebuild_parameter_with_state'),
                data,
                self.style.requires_grad,
                OrderedDict(),
                {'tag': 'decay'},
            )
        return Rebuilt(
            Named('torch._utils', '_rebuild_parameter'), data, self.style.requires_grad, OrderedDict()
        )


def network(
    net: torch.nn.Module, style: Style = Style(), forget: tuple[str, ...] = (), extra: dict | None = None
) -> Rebuilt:
    """A network as a record to pickle; without the attributes `forget`, with `extra` ones in every module."""
    return Writer(net, style, forget, extra or {}).module(net)


def snapshot(
    net: torch.nn.Module,
    style: Style = Style(),
    forget: tuple[str, ...] = (),
    extra: dict | None = None,
    **entries,
) -> bytes:
    """The bytes of a snapshot that holds a network as `ema`, and further entries."""
    return dumps(dict(ema=network(net, style, forget, extra), **entries), style)


# ----------------------------------------------------------------------------
# Comparing.


def tensors(net) -> dict[str, torch.Tensor]:
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def assert_same_tensors(a, b):
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name].cpu(), b[name].cpu()), name
