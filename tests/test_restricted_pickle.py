"""Hostile snapshots: each gets an error that names the file, quickly, and nothing in it runs."""

import contextlib
import copy
import gc
import importlib
import io
import os
import pickle
import pickletools
import random
import re
import struct
import subprocess
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_one_clear_error, run, run_python
from hostile_networks import Calls

from dnnlib import EasyDict, UserError
from torch_utils import restricted_pickle, stored_tensors
from torch_utils.restricted_pickle import MalformedPickle, plain, read_pickle
from training import checkpoint, networks
from training.checkpoint import load_network

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def one_thread():
    """Hundreds of tiny networks: threads would wait for each other, and longer on a busy machine than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def canary(tmp_path):
    """A file that the hostile pickles would create; the test fails if any did."""
    path = tmp_path / 'canary'
    yield path
    assert not path.exists(), 'something in the file was executed'


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = networks.EDMPrecond(
        8, 1, label_dim=3, model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4]
    )
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net.eval().requires_grad_(False)


@pytest.fixture
def refused(tmp_path):
    """Asserts that a snapshot's bytes are refused with one message that names the file and matches a pattern."""

    def check(data: bytes, pattern: str | None = None):
        path = tmp_path / 'hostile.pkl'
        path.write_bytes(data)
        with pytest.raises(UserError, match=pattern) as caught:
            load_network(path)
        message = str(caught.value)
        assert 'hostile.pkl' in message and '\n' not in message and len(message) < 1000

    return check


def snapshot_of(net, **entries) -> bytes:
    return pickle.dumps(
        dict(ema=net, loss_fn=None, augment_pipe=None, dataset_kwargs={}, **entries), protocol=4
    )


def loads(data: bytes):
    return read_pickle(io.BytesIO(data), stop=len(data))


# ----------------------------------------------------------------------------
# Code.


@pytest.mark.parametrize(
    'place', ['top', 'key', 'state', 'tensor', 'submodule', 'argument', 'metadata', 'loss', 'meta']
)
@pytest.mark.parametrize(
    'function',
    [os.system, eval, open, subprocess.check_output, torch.load],
    ids=lambda function: function.__name__,
)
def test_a_call_hidden_anywhere_in_a_snapshot_is_refused_by_name(net, canary, refused, place, function):
    argument = {
        os.system: f'touch {canary}',
        eval: f'open({str(canary)!r}, "w")',
        open: str(canary),
        subprocess.check_output: ['touch', str(canary)],
        torch.load: io.BytesIO(),
    }[function]
    call = Calls(function, argument, *(['w'] if function is open else []))
    if place == 'state':
        net.extra = call
    elif place == 'tensor':
        net.model.out_conv._parameters['weight'] = call
    elif place == 'submodule':
        net.model._modules['out_conv'] = call
    elif place == 'argument':
        net._init_kwargs['num_blocks'] = call
    elif place == 'meta':
        net = Calls(net.__reduce__()[0], call)
    entries = {'key': {'other': call}, 'metadata': {'metadata': {'S': call}}, 'loss': {'loss_fn': call}}.get(
        place, {}
    )
    data = (
        pickle.dumps(call, protocol=4)
        if place == 'top'
        else pickle.dumps({**dict(ema=net, dataset_kwargs={}), **entries}, protocol=4)
    )
    refused(data, f"names '[a-z_.]*{function.__name__}', which such a file has no use for")


def names(module: str, name: str) -> bytes:
    return (
        b'\x80\x04'
        + b''.join(b'\x8c' + bytes([len(text)]) + text.encode() for text in (module, name))
        + b'\x93.'
    )


RAW = {
    'os.system': (b'\x80\x02cos\nsystem\n(X\x06\x00\x00\x00touch at\x85R.', "names 'os.system'"),
    'getattr': (names('builtins', 'getattr'), "names 'builtins.getattr'"),
    'attribute chain': (
        names('torch.nn.modules.container', 'ModuleDict.__init__.__globals__'),
        'ModuleDict.__init__.__globals__',
    ),
    'chain to a module': (
        names('torch_utils.persistence', 'pickle.loads'),
        "names 'torch_utils.persistence.pickle.loads'",
    ),
    'empty name': (names('torch.nn.modules.container', ''), "names 'torch.nn.modules.container.'"),
    'numpy internals': (b'\x80\x02cnumpy\nsave\n.', "names 'numpy.save'"),
    'private module': (b'\x80\x02c__main__\nx\n.', "names '__main__.x'"),
    'name that is no string': (b'\x80\x04K\x01K\x02\x93.', 'names'),
    'text-mode INST': (b'(ios\nsystem\n.', 'opcode 0x69'),
    'OBJ': (b'(cos\nsystem\no.', "names 'os.system'"),
    'extension registry': (b'\x80\x02\x82\x01.', 'opcode 0x82'),
    'persistent id, text': (b'Pfoo\n.', 'opcode 0x50'),
    'persistent id': (b'\x80\x02K\x01Q.', 'refers to objects outside'),
    'NEWOBJ_EX': (b'\x80\x04)}\x92.', 'well-formed'),
    'NEWOBJ_EX of something': (b'\x80\x04cos\nsystem\n)}\x92.', "names 'os.system'"),
    'duplicate': (b'\x80\x02}2.', 'opcode 0x32'),
    'buffer from elsewhere': (b'\x80\x05\x97.', 'opcode 0x97'),
    'partial application': (b'\x80\x02cfunctools\npartial\n.', "names 'functools.partial'"),
    'imports': (b'\x80\x02c__builtin__\n__import__\n.', "names '__builtin__.__import__'"),
    'codecs': (names('_codecs', 'decode'), "names '_codecs.decode'"),
    'PyTorch code': (names('torch', 'load'), "names 'torch.load'"),
    'call of a record': (b'\x80\x02ccollections\nOrderedDict\n(tR)R.', 'calls something'),
    'call of a call': (b'\x80\x02ctorch\nSize\n)R)R.', 'calls something'),
    'state for a list': (b'\x80\x02]}b.', 'fills a list'),
    'state for a name': (b'\x80\x02ctorch.storage\n_load_from_bytes\n}b.', 'fills a Name'),
    'items for a list': (b'\x80\x02]K\x01K\x02s.', 'fills a list'),
    'entries for a dict': (b'\x80\x02}K\x01a.', 'fills a dict'),
    'odd number of items': (b'\x80\x02}(K\x01u.', 'key without a value'),
    'mark left over': (b'\x80\x02}(.', 'well-formed'),
    'name without an end': (b'\x80\x02c' + b'x' * 1000, 'name without an end'),
    'empty stack': (b'\x80\x02.', 'well-formed'),
    'missing mark': (b'\x80\x02t.', 'well-formed'),
    'missing memo': (b'\x80\x02h\x07.', 'well-formed'),
    'bytes of 2**62': (b'\x80\x04\x8e' + struct.pack('<Q', 1 << 62) + b'.', 'truncated'),
    'text of 2**62': (b'\x80\x04\x8d' + struct.pack('<Q', 1 << 62) + b'.', 'truncated'),
    'text that is not UTF-8': (b'\x80\x04\x8c\x01\xff.', 'well-formed'),
    'second pickle': (b'\x80\x02}.\x80\x02}.', 'goes on after'),
    'no dict': (b'\x80\x02K\x01.', 'not a dict'),
    'empty dict': (b'\x80\x02}.', "no network 'ema'; it has none"),
    'garbage': (random.Random(0).randbytes(4096), 'cannot be used'),
    'text': (b'<html>404 not found</html>', 'cannot be used'),
    'zip': (b'PK\x03\x04' + bytes(100), 'cannot be used'),
    'nothing': (b'', 'truncated'),
}


@pytest.mark.parametrize('name', RAW)
def test_handwritten_pickles_are_refused(canary, refused, name):
    refused(*RAW[name])


def test_a_pickle_inside_a_tensors_storage_is_not_run_either(net, canary, refused):
    """`torch.storage._load_from_bytes` would unpickle its argument without restrictions."""
    payload = pickle.dumps([Calls(os.system, f'touch {canary}'), 'x' * 300], protocol=2)
    storage = Calls(torch.storage._load_from_bytes, payload)
    net.model.out_norm._parameters['bias'] = Calls(
        torch._utils._rebuild_tensor_v2, storage, 0, (16,), (1,), False, OrderedDict()
    )
    refused(snapshot_of(net), 'posix.system')


def test_embedded_source_is_not_run(net, canary, tmp_path):
    function, (meta,) = net.__reduce__()
    meta['module_src'] = f'open({str(canary)!r}, "w")'
    (tmp_path / 'net.pkl').write_bytes(snapshot_of(Calls(function, meta)))
    assert torch.equal(load_network(tmp_path / 'net.pkl').model.out_conv.weight, net.model.out_conv.weight)


def test_objects_that_the_network_does_not_need_stay_inert(net, canary, tmp_path):
    """A loss of an unknown class, whose source would do harm and which holds a network, does not keep the snapshot from loading."""
    function, (meta,) = copy.deepcopy(net).__reduce__()
    source = f'open({str(canary)!r}, "w")'
    loss = Calls(
        function,
        dict(
            type='class',
            version=6,
            module_src=source,
            class_name='Loss',
            state={'net': Calls(function, meta)},
        ),
    )
    (tmp_path / 'net.pkl').write_bytes(
        pickle.dumps(dict(ema=net, loss_fn=loss, dataset_kwargs=EasyDict(path='x')), protocol=4)
    )
    assert load_network(tmp_path / 'net.pkl').metadata == {
        'objective': 'diffusion',
        'dataset_kwargs': {'path': 'x'},
    }


# ----------------------------------------------------------------------------
# Contradictions and bombs.


def altered(net, class_name=None, **changes) -> bytes:
    function, (meta,) = net.__reduce__()
    meta.update(class_name=class_name or meta['class_name'], state={**meta['state'], **changes})
    return snapshot_of(Calls(function, meta))


def test_an_unknown_class_is_named_with_those_that_are_known(net, refused):
    refused(altered(net, class_name='Popen'), "holds a 'Popen', which is none of our networks: EDMPrecond")


@pytest.mark.parametrize(
    'state',
    [
        {'_modules': 3},
        {'_modules': {'model': 3}},
        {'_parameters': {'x': 3}},
        {'_modules': {}},
        {'_init_args': 3},
        {'_init_kwargs': {'model_type': 'torch'}},
        {'_init_kwargs': {'num_blocks': 'many'}},
        {'_init_kwargs': {'__class__': 3}},
        {'sigma_data': 'x'},
        {'sigma_data': 10**600},
        {'img_resolution': 10**9},
    ],
)
def test_a_state_that_is_not_the_class_s_own_is_refused(net, refused, state):
    refused(altered(net, **state), 'cannot be used')


def test_an_unknown_constructor_argument_is_named(net, refused):
    refused(altered(net, _init_kwargs={**net.init_kwargs, 'flux': 3}), "unexpected keyword argument 'flux'")


@pytest.mark.parametrize(
    'kwargs, pattern',
    [
        (dict(num_blocks=10**9), 'num_blocks is beyond 32'),
        (dict(model_channels=10**9), 'model_channels is beyond'),
        (dict(model_channels=10**5), 'lacks tensors'),
        (dict(model_channels=-16), 'negative'),
        (dict(model_channels=0), 'built'),
        (dict(channel_mult=[1] * 10**5), 'channel_mult has 100000 entries'),
        (dict(channel_mult=[1, 10**6]), 'channel_mult is beyond 1,024'),
        (dict(channel_mult=[1, [2, [10**6]]]), 'channel_mult is beyond 1,024'),
        (dict(channel_mult=[]), 'channel_mult is empty'),
        (dict(attn_resolutions=list(range(10**5))), '100000 entries'),
        (dict(model_type='x' * 10**5), '100000 entries'),
        (dict(label_dim=1 << 20), r'say \[64, 1048576\]'),
        (dict(label_dim=(1 << 20) + 1), 'label_dim is beyond 1,048,576'),
        (dict(model_channels=[1] * 16, channel_mult_emb=10**9), 'channel_mult_emb is beyond'),
    ],
    ids=str,
)
def test_sizes_that_no_memory_holds_are_refused_at_once(net, refused, kwargs, pattern):
    refused(altered(net, _init_kwargs={**net.init_kwargs, **kwargs}), pattern)


@pytest.mark.parametrize('count', [0, 15, 17, 10**12, -1])
def test_a_storage_that_claims_another_length_than_it_has_is_refused(net, refused, count):
    """17: it would begin to read what comes after it; 10**12: it would fill the memory. The count is what comes before the elements."""
    stored = torch.zeros(16)._typed_storage().__reduce__()[1][0]
    stored = stored[:-72] + struct.pack('<q', count) + stored[-64:]
    tensor = Calls(
        torch._utils._rebuild_tensor_v2,
        Calls(torch.storage._load_from_bytes, stored),
        0,
        (16,),
        (1,),
        False,
        OrderedDict(),
    )
    net.model.out_norm._parameters['bias'] = tensor
    refused(snapshot_of(net), 'length is not what it claims')


def with_tensor(net, shape, stride, offset=0, storage=None) -> bytes:
    storage = torch.zeros(16).untyped_storage() if storage is None else storage
    storage = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    net.model.out_norm._parameters['bias'] = Calls(
        torch._utils._rebuild_tensor_v2, storage, offset, shape, stride, False, OrderedDict()
    )
    return snapshot_of(net)


@pytest.mark.parametrize(
    'shape, stride, offset',
    [
        ((10**12,), (1,), 0),
        ((10**12,), (0,), 0),
        ((16,), (2,), 0),
        ((16,), (1,), 1),
        ((16,), (-1,), 15),
        ((16,), (1,), -1),
        ((16,), (1, 1), 0),
        ((-16,), (1,), 0),
        ((16,), (1 << 62,), 0),
        ((16.0,), (1,), 0),
        ('16', '1', 0),
    ],
)
def test_a_tensor_that_is_not_within_its_storage_is_refused(net, refused, shape, stride, offset):
    refused(with_tensor(net, shape, stride, offset), 'tensor|shape')


def test_a_tensor_that_repeats_the_elements_of_its_storage_is_refused(net, refused):
    """Otherwise a few bytes would fill any memory."""
    refused(
        with_tensor(net, (16,), (0,), storage=torch.zeros(1).untyped_storage()),
        'does not fit into its storage of 1 elements',
    )


def test_a_tensor_that_stands_for_the_negative_of_its_storage_is_refused(net, refused):
    """PyTorch can write such, by a flag; read without it the network would be another one."""
    storage = torch.zeros(16)._typed_storage()
    net.model.out_norm._parameters['bias'] = Calls(
        torch._utils._rebuild_tensor_v2, storage, 0, (16,), (1,), False, OrderedDict(), {'neg': True}
    )
    refused(snapshot_of(net), 'negative')


def test_a_view_into_a_larger_storage_is_read_for_what_it_is(net, tmp_path):
    storage = torch.arange(64.0)
    (tmp_path / 'net.pkl').write_bytes(with_tensor(net, (16,), (2,), 5, storage.untyped_storage()))
    bias = load_network(tmp_path / 'net.pkl').model.out_norm.bias
    assert torch.equal(bias, storage[5:37:2]) and bias.untyped_storage().nbytes() == 64


def test_one_storage_for_many_tensors_cannot_multiply_a_small_file(refused):
    """The file is 70 kB, the network that it asks for would be 45 MB."""
    net = networks.EDMPrecond(8, 1, model_channels=64, channel_mult=[1, 2], num_blocks=2, attn_resolutions=[])
    largest = max(net.parameters(), key=lambda parameter: parameter.numel())
    storage = Calls(
        torch.storage._load_from_bytes, torch.zeros(largest.numel())._typed_storage().__reduce__()[1][0]
    )
    for module in net.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                strides = parameter.stride()
                module._parameters[name] = Calls(
                    torch._utils._rebuild_tensor_v2,
                    storage,
                    0,
                    tuple(parameter.shape),
                    strides,
                    False,
                    OrderedDict(),
                )
    data = snapshot_of(net)
    assert len(data) < 4 * (largest.numel() + 100_000)
    refused(data, 'share memory')


def nested(depth, wrap):
    value = []
    for _ in range(depth):
        value = wrap(value)
    return value


def test_nests_that_would_take_for_ever_are_refused(net, refused):
    """Levels of pairs, each of one object twice: 2**28 values to whoever follows both, at a depth that is no reason to refuse."""
    doubled = nested(28, lambda value: [value, value])
    refused(snapshot_of(net, metadata=dict(objective=doubled)), 'without end')
    refused(altered(net, _init_kwargs=dict(channel_mult=doubled)), 'without end')
    meta = net.model.out_conv.__reduce__()[1][0]
    modules = nested(
        40,
        lambda value: (
            Calls(
                net.__reduce__()[0],
                {**meta, 'state': {**meta['state'], '_modules': {'a': value, 'b': value}}},
            )
            if value
            else net.model.out_conv
        ),
    )
    refused(altered(net, _modules={'model': modules}), 'without end')


def test_keys_that_would_take_for_ever_to_hash_or_collide_are_not_hashed(refused):
    """A nest of pairs, each of one object twice; 100,000 integers and as many pairs that Python hashes alike (modulo 2**61 − 1)."""
    nest = b')' + b'\x94h\x00\x86' + b''.join(b'\x94h' + bytes([i]) + b'\x86' for i in range(1, 60))
    refused(b'\x80\x04}' + nest + b'K\x01s.', 'it has none')
    refused(b'\x80\x04\x8f(' + nest + b'\x90.', 'not a dict')
    numbers = [b'\x8a\x0f' + ((2**61 - 1) * i).to_bytes(15, 'little') for i in range(1, 100_001)]
    refused(b'\x80\x04}(' + b''.join(number + b'N' for number in numbers) + b'u.', 'it has none')
    refused(b'\x80\x04}(' + b''.join(number + number + b'\x86N' for number in numbers) + b'u.', 'it has none')


def test_a_name_that_is_a_nest_is_not_written_out(refused):
    """Its text would have 2**60 characters."""
    nest = b']\x94' + b''.join(b']\x94(h' + bytes([i]) + b'h' + bytes([i]) + b'e' for i in range(60))
    refused(b'\x80\x04' + nest + b'\x8c\x01x\x93.', 'names something by what is not text')
    refused(b'\x80\x04\x8c\x01x' + nest + b'\x93.', 'names something by what is not text')
    refused(b'\x80\x04' + nest + b')R.', 'not a function')


def test_a_long_name_shared_by_many_modules_is_not_repeated(net, refused):
    """100 kB in the file; a dotted name for each of 20,000 parameters would be 2 GB."""
    function, (meta,) = net.model.out_norm.__reduce__()
    table = {'x' * 100_000: net.model.out_norm.weight}
    child = Calls(function, {**meta, 'state': {**meta['state'], '_parameters': table}})
    refused(
        altered(net, _modules={'model': child, **{f'{i}': child for i in range(20_000)}}),
        'names are no text or without end',
    )


def test_records_are_limited_in_number(refused, monkeypatch):
    """Each may take a hundred times the memory that it takes in the file."""
    monkeypatch.setattr(restricted_pickle, 'MAX_RECORDS', 1000)
    refused(b'\x80\x04' + b'}' * 2000 + b'.', 'more than 1,000 records')


def test_integers_of_any_length_are_read_in_no_time(net, tmp_path, refused):
    """A million digits would take minutes to print. As an attribute that no one needs they do not matter."""
    huge = 1 << 4_000_000
    refused(snapshot_of(net, metadata=dict(S=huge)), 'holds a Span')
    net.extra = huge
    (tmp_path / 'net.pkl').write_bytes(snapshot_of(net))
    load_network(tmp_path / 'net.pkl')


NAMES = dict(line='a\nError: b', escape='\x1b[31m', surrogate='\ud800', long='x' * 10**6, direction='\u202e')


@pytest.mark.parametrize('name', NAMES.values(), ids=NAMES)
def test_messages_are_one_printable_line_whatever_the_file_calls_things(net, refused, tmp_path, name):
    for data in (
        snapshot_of(Calls(net.__reduce__()[0], {**net.__reduce__()[1][0], 'class_name': name})),
        pickle.dumps({name: net}),
        altered(net, _init_kwargs={name: 1}),
        altered(net, _modules={name[:900]: net.model}),
        altered(net, sigma_data=name),
    ):
        refused(data)
        with pytest.raises(UserError) as caught:
            load_network(tmp_path / 'hostile.pkl')
        assert str(caught.value).isprintable()


def test_cycles_and_depth_are_refused_without_a_crash(net, refused):
    cycle = {}
    cycle['again'] = cycle
    refused(snapshot_of(net, metadata=cycle), 'without end')
    refused(b'\x80\x04}\x8c\x03ema' + b']' * 200_000 + b'a' * 199_999 + b's.', "no network 'ema'")
    refused(b'\x80\x04}\x8c\x03ema' + b')' + b'\x85' * 200_000 + b's.', "no network 'ema'")
    refused(
        b'\x80\x04}\x8c\x03emactorch\nSize\n\x94' + b'h\x00' * 200_000 + b')' + b'R\x85' * 200_000 + b'Rs.',
        "no network 'ema'",
    )


# ----------------------------------------------------------------------------
# Damage to snapshots that have no checksum.


def spans_of(tree, found):
    """All places in the file that hold tensors."""
    queue, seen = [tree], set()
    while queue:
        node = queue.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, restricted_pickle.Span):
            found.append((node.start, node.start + node.size))
        queue.extend(
            node.values()
            if isinstance(node, dict)
            else node
            if isinstance(node, (list, tuple))
            else [*node.args, node.state]
            if isinstance(node, restricted_pickle.Call)
            else []
        )
    return found


def test_flipped_bits_in_a_foreign_snapshot_give_an_error_or_a_working_network(net, tmp_path):
    """A foreign snapshot has no digest. Flips are in the structure, 150, where they can do something, and anywhere, 50."""
    function, (meta,) = net.__reduce__()
    data = snapshot_of(Calls(function, {**meta, 'module_src': ''}))
    inside = np.zeros(len(data), bool)
    for start, stop in spans_of(loads(data), []):
        inside[start:stop] = True
    draw, errors = random.Random(0), 0
    path = tmp_path / 'foreign.pkl'
    for position in draw.sample(list(np.flatnonzero(~inside)), 150) + draw.sample(range(len(data)), 50):
        path.write_bytes(
            data[:position] + bytes([data[position] ^ 1 << draw.randrange(8)]) + data[position + 1 :]
        )
        try:
            loaded = load_network(path)
        except UserError:
            errors += 1
        else:
            assert loaded(torch.zeros(1, 1, 8, 8), torch.ones(1)).shape == (1, 1, 8, 8)
    assert 50 < errors < 200


def test_every_truncation_of_a_foreign_snapshot_is_an_error(net, refused):
    data = snapshot_of(net)
    for length in random.Random(0).sample(range(len(data)), 60):
        refused(data[:length])


# ----------------------------------------------------------------------------
# Plain data.


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_plain_data_is_read_as_python_reads_it(protocol):
    value = {
        'a': [1, -5, 70_000, 1 << 40, -(1 << 70), 2.5, float('inf')],
        'b': (True, False, None, ('x',), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        'é' * 300: {'nested': {}},
        'shared': [[1]] * 3,
        'ordered': OrderedDict(a=1),
        'easy': EasyDict(b=2),
    }
    assert plain(loads(pickle.dumps(value, protocol=protocol))) == value


@pytest.mark.parametrize(
    'number', [np.float64(0.1), np.float32(0.5), np.int64(-3), np.bool_(True), np.uint8(200), np.float16(2)]
)
def test_numpy_scalars_become_python_numbers(number):
    value = plain(loads(pickle.dumps(number, protocol=4)))
    assert value == number.item() and type(value) is type(number.item())


@pytest.mark.parametrize(
    'number',
    [
        np.complex64(1),
        np.str_('x'),
        np.datetime64('2020-01-01'),
        np.array([1.0]),
        np.array([{}], dtype=object),
    ],
    ids=['complex', 'text', 'date', 'array', 'objects'],
)
def test_other_numpy_values_are_no_plain_data(number):
    with pytest.raises(MalformedPickle):
        plain(loads(pickle.dumps(number, protocol=4)))


REBUILDERS = {
    'torch_utils.persistence._reconstruct_persistent_obj',
    'torch._utils._rebuild_parameter',
    'torch._utils._rebuild_parameter_with_state',
    'torch._utils._rebuild_tensor_v2',
    'torch._utils._rebuild_tensor_v3',
    'torch._tensor._rebuild_from_type_v2',
    '_codecs.encode',
    'torch.storage._load_from_bytes',
    'numpy.core.multiarray.scalar',
    'numpy._core.multiarray.scalar',
    'numpy.core.numeric._frombuffer',
    'numpy._core.numeric._frombuffer',
    'numpy.core.multiarray._reconstruct',
    'numpy._core.multiarray._reconstruct',
    'copyreg._reconstructor',
    'copy_reg._reconstructor',
}


def test_the_table_has_types_of_data_and_what_rebuilds_them_and_nothing_else():
    """The names are inert; but a list that grows carelessly is how such readers fail."""
    assert REBUILDERS < restricted_pickle.SNAPSHOT_NAMES
    for name in restricted_pickle.SNAPSHOT_NAMES - REBUILDERS:
        assert re.fullmatch(r'[a-z_.]+\.\w+', name), f'{name}: a dotted name reaches into a class'
        module, _, attribute = name.rpartition('.')
        with contextlib.suppress(ImportError):  # other versions of Python
            value = getattr(importlib.import_module(module), attribute, None)
            assert value is None or isinstance(value, (type, torch.dtype)), name


def test_no_module_that_reads_snapshots_can_run_anything():
    for module in (restricted_pickle, stored_tensors, checkpoint):
        source = Path(module.__file__).read_text()
        allowed = source.replace('_Unpickler', '') if module is restricted_pickle else source
        assert not re.search(
            r'import_module|__import__|pickle\.load|Unpickler|(?<![.\w])(eval|exec)\(', allowed
        ), module
        assert all('weights_only=True' in call for call in re.findall(r'torch\.load\([^)]*\)', source)), (
            module
        )
    assert source.count('torch.load(') == 2  # checkpoint.py: a state, and the options in one


def test_of_pythons_unpickler_only_what_makes_constants_lists_and_tuples_is_used():
    """What calls, imports, sets attributes, hashes, or takes as much memory as the file claims is replaced, or refused."""
    ours, pythons = restricted_pickle._Unpickler, pickle._Unpickler
    kept = {
        pickletools.code2op[chr(code)].name
        for code, load in ours.dispatch.items()
        if load is pythons.dispatch[code]
    }
    constants = 'NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG1 BINFLOAT'
    texts = 'SHORT_BINSTRING BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8'
    values = 'EMPTY_LIST EMPTY_DICT EMPTY_TUPLE LIST TUPLE TUPLE1 TUPLE2 TUPLE3'
    memo = 'BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE'
    by_our_methods = 'GLOBAL BINPERSID'  # find_class and persistent_load
    order = 'PROTO MARK STOP POP POP_MARK'
    assert kept == set(f'{constants} {texts} {values} {memo} {by_our_methods} {order}'.split())
    assert {'find_class', 'persistent_load'} <= vars(ours).keys()


# ----------------------------------------------------------------------------
# The process, the command line.


def test_pythons_garbage_collector_is_as_it_was_after_loading(net, refused, tmp_path):
    (tmp_path / 'net.pkl').write_bytes(snapshot_of(net))
    for switch in (gc.disable, gc.enable):
        switch()
        enabled = gc.isenabled()
        refused(b'')
        load_network(tmp_path / 'net.pkl')
        assert gc.isenabled() == enabled


def test_loading_does_not_import_pytorchs_compiler(net, tmp_path):
    """It takes more than a second, and building a network on the meta device with random weights would import it, `sympy` first of all."""
    (tmp_path / 'net.pkl').write_bytes(snapshot_of(net))
    code = 'import sys; from training.checkpoint import load_network; load_network(sys.argv[1]); assert "sympy" not in sys.modules'
    run_python('-c', code, tmp_path / 'net.pkl')


def test_generating_from_a_hostile_file_is_one_clear_error(net, canary, tmp_path):
    net.model.out_conv._parameters['weight'] = Calls(os.system, f'touch {canary}')
    (tmp_path / 'net.pkl').write_bytes(snapshot_of(net))
    done = run(
        'generate.py', f'--network={tmp_path / "net.pkl"}', f'--outdir={tmp_path / "out"}', check=False
    )
    assert_one_clear_error(done, 'net.pkl', 'posix.system', 'nothing was executed')
    assert not (tmp_path / 'out').exists()
