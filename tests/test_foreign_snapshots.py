"""Snapshots that other versions of Python, NumPy, PyTorch and EDM might write load as the networks that they hold."""

import argparse
import pickle
import random
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import PurePosixPath

import foreign
import numpy as np
import pytest
import torch
from foreign import Named, Rebuilt, Style, assert_same_tensors, tensors

from dnnlib import EasyDict, UserError
from training import networks
from training.checkpoint import load_network, save_snapshot
from training.consistency_ops import student_grid
from training.networks import edm2 as networks_edm2

OPTIONS = dict(model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], label_dropout=0.1)
EDM2 = dict(model_channels=16, channel_mult=[1, 2], num_blocks=1)
SONG = dict(OPTIONS, model_type='SongUNet', augment_dim=9)
NETWORKS = {
    'adm': (networks.EDMPrecond, (8, 3), dict(OPTIONS, dropout=0.13)),
    'adm, arguments by position': (
        networks.EDMPrecond,
        (8, 1, 3, True, 0.01, 50.0, 1.0, 'DhariwalUNet'),
        dict(OPTIONS, num_blocks=2),
    ),
    'adm, one level': (
        networks.EDMPrecond,
        (8, 1),
        dict(OPTIONS, channel_mult=[2], attn_resolutions=[8, 4], channel_mult_emb=2),
    ),
    'adm with heads': (
        networks.EDMPrecond,
        (8, 1, 3),
        dict(OPTIONS, model_channels=32, channel_mult=(2, 4), attn_resolutions=(8,)),
    ),
    'ddpm++': (networks.EDMPrecond, (8, 3, 3), SONG),
    'ncsn++': (
        networks.VEPrecond,
        (8, 3, 0),
        dict(
            SONG,
            embedding_type='fourier',
            encoder_type='residual',
            channel_mult_noise=2,
            resample_filter=[1, 3, 3, 1],
        ),
    ),
    'skips': (
        networks.VPPrecond,
        (8, 1, 3),
        dict(SONG, encoder_type='skip', decoder_type='skip', channel_mult=[1, 1, 2], beta_d=18.0),
    ),
    'iddpm': (networks.iDDPMPrecond, (8, 3, 3), dict(OPTIONS, M=50, C_2=0.01)),
    'edm2': (networks_edm2.Precond, (8, 4, 3), dict(EDM2, attn_resolutions=[4], channels_per_head=16)),
    'edm2, unconditional': (
        networks_edm2.Precond,
        (8, 3, 0),
        dict(EDM2, channel_mult_emb=1, channel_mult_noise=2, label_balance=0.4, dropout=0.1),
    ),
}
STYLES = {
    'protocol 2': Style(protocol=2, numpy='numpy.core'),
    'protocol 2, bytes of Python 2': Style(protocol=2, python2=True),
    'protocol 3': Style(protocol=3, numpy='numpy.core', era='old'),
    'protocol 5': Style(protocol=5),
    'numbers of NumPy 1': Style(numpy='numpy.core', numpy_numbers=True),
    'numbers of NumPy 2': Style(numpy_numbers=True),
    'numbers of NumPy 1, protocol 2': Style(protocol=2, numpy='numpy.core', numpy_numbers=True),
    'modules of PyTorch 1.8': Style(era='old'),
    'tensors on a GPU': Style(location='cuda:0'),
    'short descriptions': Style(description=5),
    'storages that are views': Style(view=True),
    'untyped storages': Style(tensor='typed'),
    'tensors with attributes': Style(tensor='attributes'),
    'parameters with attributes and gradients': Style(parameter_state=True, requires_grad=True),
    'one storage for all': Style(shared=True),
    'one storage for all, protocol 2': Style(protocol=2, shared=True),
}
NEW_ATTRIBUTES = (
    'use_bf16',
    'dout_resolutions',
    'img_resolution',
    'sigma_data',
)  # which older versions of the classes did not have


def network_of(kind):
    cls, args, kwargs = NETWORKS[kind]
    torch.manual_seed(0)
    net = cls(*args, **kwargs).eval().requires_grad_(False)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


@torch.no_grad()
def output_of(net, **kwargs):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, net.img_channels, net.img_resolution, net.img_resolution, generator=generator)
    if getattr(net.model, 'map_augment', None) is not None:
        kwargs['augment_labels'] = torch.randn(2, 9, generator=generator)
    return net(
        x * 2, torch.tensor([0.3, 5.0]), torch.eye(net.label_dim)[[0, 2]] if net.label_dim else None, **kwargs
    )


def assert_loads_as(path, net, data, atol=0.0):
    """The bytes load as the same network: class, arguments, tensors and outputs, bit for bit, each tensor in memory of its own.

    `atol`: of the outputs; convolutions sum in another order where a weight lies in memory in another.
    """
    path.write_bytes(data)
    loaded = load_network(path)
    assert type(loaded) is type(net) and (loaded.init_args, loaded.init_kwargs) == (
        net.init_args,
        net.init_kwargs,
    )
    assert_same_tensors(net, loaded)
    torch.testing.assert_close(output_of(net), output_of(loaded), rtol=0, atol=atol)
    assert not loaded.training and not any(tensor.requires_grad for tensor in tensors(loaded).values())
    assert len({tensor.data_ptr() for tensor in tensors(loaded).values()}) == len(tensors(loaded))
    return loaded


@pytest.mark.parametrize('kind', ['ncsn++', 'edm2'])
@pytest.mark.parametrize('style', STYLES)
def test_a_snapshot_loads_whatever_versions_wrote_it(tmp_path, style, kind):
    net = network_of(kind)
    assert_loads_as(
        tmp_path / 'net.pkl',
        net,
        foreign.snapshot(net, STYLES[style], forget=NEW_ATTRIBUTES, loss_fn=None, augment_pipe=None),
    )


@pytest.mark.parametrize('kind', NETWORKS)
def test_networks_of_every_kind_load_and_survive_a_round_trip(tmp_path, kind):
    net = network_of(kind)
    loaded = assert_loads_as(tmp_path / 'net.pkl', net, foreign.snapshot(net))
    save_snapshot(tmp_path / 'again.pkl', loaded, **loaded.metadata)
    assert_loads_as(tmp_path / 'again.pkl', net, (tmp_path / 'again.pkl').read_bytes())
    assert {
        name: value for name, value in vars(loaded).items() if isinstance(value, (int, float))
    }.items() <= vars(load_network(tmp_path / 'again.pkl')).items()


@pytest.mark.parametrize(
    'style',
    [Style(), Style(protocol=2), Style(protocol=5), Style(view=True), Style(tensor='attributes')],
    ids=str,
)
def test_what_these_tests_write_as_a_tensor_is_one_for_pytorch_too(style):
    """Python's own unpickler and PyTorch rebuild it."""
    for value in (
        torch.randn(3, 4),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.tensor(2.5),
        torch.randn(5).bfloat16(),
    ):
        read = pickle.loads(foreign.dumps(foreign.tensor(value, style), style))
        assert torch.equal(read, value) and read.dtype == value.dtype and read.stride() == value.stride()


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_what_this_pytorch_pickles_loads_in_every_protocol_and_precision(tmp_path, protocol, dtype):
    net = network_of('ddpm++').to(dtype)
    (tmp_path / 'net.pkl').write_bytes(pickle.dumps(EasyDict(ema=net), protocol=protocol))
    loaded = load_network(tmp_path / 'net.pkl')
    assert_same_tensors(net, loaded)
    assert torch.equal(output_of(net), output_of(loaded))


def test_storages_of_one_file_may_come_from_different_machines(tmp_path):
    """Half of them begin otherwise, with another size of long integers, as Windows has."""
    net, draw = network_of('adm'), random.Random(0)

    def tensor(value):
        record = foreign.tensor(value.detach(), Style())
        (stored,) = record.args[0].args
        if draw.random() < 0.5:
            record.args[0].args = (stored.replace(b'longq\x07K\x04', b'longq\x07K\x08', 1),)
            assert record.args[0].args != (stored,)
        return record

    writer = foreign.Writer(net, Style(), (), {})
    writer.tensor = tensor
    assert_loads_as(tmp_path / 'net.pkl', net, foreign.dumps(dict(ema=writer.module(net))))


def test_half_precision_frequencies_are_multiplied_in_half_precision_as_in_edm():
    """EDM computes (2π f) in the precision of the stored frequencies; at f = 40 and t = 1.5 single precision differs by 0.07 radians."""
    embedding = networks.FourierEmbedding(32).half()
    x = torch.tensor([1.5, -0.7])
    angles = torch.outer(x, (2 * np.pi * embedding.freqs).float())
    assert torch.equal(embedding(x), torch.cat([angles.cos(), angles.sin()], dim=1))


def test_tensors_may_lie_in_memory_in_any_order(tmp_path):
    """Transposed, strided, with channels last, of no dimensions, and at an offset into a larger storage."""
    net, style = network_of('edm2'), Style()
    record = foreign.network(net)

    def state(name):
        node = record
        for part in name.split('.'):
            node = (node.state or node.args[0]['state'])['_modules'][part]
        return node.state or node.args[0]['state']

    weight = net.unet.out_conv.weight
    state('unet.out_conv')['_parameters']['weight'] = foreign.tensor(
        weight.detach().contiguous(memory_format=torch.channels_last), style
    )
    matrix = net.unet.emb_noise.weight
    state('unet.emb_noise')['_parameters']['weight'] = foreign.tensor(matrix.detach().T.contiguous().T, style)
    padded = torch.randn(100)
    padded[7:39:2] = net.unet.emb_fourier.freqs
    strided = foreign.tensor(padded[7:39:2], style, foreign.storage(padded, style), offset=7)
    state('unet.emb_fourier')['_buffers']['freqs'] = strided
    assert net.unet.out_gain.ndim == 0 and strided.args[3] == (2,)
    assert_loads_as(tmp_path / 'net.pkl', net, foreign.dumps(dict(ema=record)), atol=1e-5)


def oddities(style):
    """What people's modules have besides what a network needs: data of every kind, by name."""
    recursive = ([],)
    recursive[0].append(recursive)
    own = {
        'dtype': torch.float16,
        'device': torch.device('cuda', 1),
        'size': torch.Size([1, 2]),
        'range': range(3),
        'slice': slice(1, 2),
        'complex': 1j,
        'set': {1, 'a'},
        'frozenset': frozenset({(1, 2)}),
        'bytes': b'x' * 300,
        'nothing': b'',
        'bytearray': bytearray(b'ab'),
        'huge': 1 << 5000,
        'large': -(1 << 70),
        'type': float,
        'array type': np.float32,
        'path': PurePosixPath('a/b'),
        'recursive': recursive,
        'options': argparse.Namespace(lr=1.0),
        'deque': deque([1, 2], maxlen=3),
        'counter': Counter('aab'),
        'default': defaultdict(list, a=[1]),
        'ordered': OrderedDict(a=OrderedDict()),
        'easy': EasyDict(a=EasyDict(b=1)),
        'keys': {1: 'a', (2, 'b'): 1, None: 2, b'c': 3, 2.5: 4},
        'tensor': torch.zeros(2, dtype=torch.bool),
        'parameter': torch.nn.Parameter(torch.zeros(1)),
        'text': 'é\n' * 5000,
        'layers': torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.SiLU()),
        'state dict': torch.nn.Linear(1, 1).state_dict(),
    }
    written = {
        'scalar': foreign.numpy_scalar(np.float64(2), style),
        'array': foreign.numpy_array(np.zeros([2, 3], np.float32), style),
        'made by copyreg': Rebuilt(
            Named('copyreg', '_reconstructor'),
            Named('dnnlib.util', 'EasyDict'),
            Named('builtins', 'dict'),
            {'a': 1},
        ),
        'with keywords': Rebuilt(Named('collections', 'OrderedDict'), new=True, kwargs={})
        if style.protocol >= 4
        else None,
    }
    return {**own, **written}


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
@pytest.mark.parametrize('package', ['numpy.core', 'numpy._core'])
def test_data_that_the_network_does_not_need_is_skipped(tmp_path, protocol, package):
    """As attributes of every module, as entries of the snapshot, in its losses and augmentations, and among the data set's arguments."""
    net, style = network_of('adm'), Style(protocol=protocol, numpy=package)
    extra = oddities(style)
    loss = foreign.persistent(
        'Loss', {**extra, 'nets': [foreign.network(net, style), foreign.network(net, style)]}
    )
    data = foreign.snapshot(
        net,
        style,
        extra=extra,
        loss_fn=loss,
        augment_pipe=foreign.persistent('AugmentPipe', extra),
        odd=extra,
        metadata=None,
        dataset_kwargs=EasyDict(
            path='x.zip', resolution=8, odd=extra['array'], odder={'path': extra['path'], 'n': 1}
        ),
    )
    loaded = assert_loads_as(tmp_path / 'net.pkl', net, data)
    assert loaded.metadata == dict(
        objective='diffusion', dataset_kwargs=dict(path='x.zip', resolution=8, odder={'n': 1})
    )


def test_edm2s_snapshots_load_with_their_encoders(tmp_path):
    """The encoder's state has arrays; its constructor's arguments alone are kept."""
    net, style = network_of('edm2').half(), Style(numpy='numpy.core')
    state = dict(
        vae_name='vae',
        scale=foreign.numpy_array(np.ones(4, np.float32), style),
        bias=foreign.numpy_array(np.zeros(4, np.float32), style),
        batch_size=8,
        _vae=None,
        _init_args=(),
        _init_kwargs=dict(vae_name='vae'),
    )
    loss = foreign.persistent(
        'EDM2Loss', dict(P_mean=-0.4, P_std=1.0, sigma_data=0.5, _init_args=(), _init_kwargs={})
    )
    record = EasyDict(
        ema=foreign.network(net, style),
        encoder=foreign.persistent('StabilityVAEEncoder', state),
        loss_fn=loss,
        dataset_kwargs=EasyDict(class_name='data.dataset.ImageFolderDataset', path='x.zip'),
    )
    loaded = assert_loads_as(tmp_path / 'net.pkl', net, foreign.dumps(record, style))
    assert loaded.metadata['encoder'] == dict(class_name='StabilityVAEEncoder', vae_name='vae')
    assert {tensor.dtype for tensor in tensors(loaded).values()} == {torch.float16}


def student_loss(net, **changes):
    teacher = foreign.network(net)
    state = dict(
        teacher_net=teacher,
        S=foreign.numpy_scalar(np.int64(4), Style()),
        T_start=64,
        rho=7,
        sigma_min=0.002,
        sigma_max=80.0,
        _filter_cache={(64, 4): [1.0]},
        _run_dir=PurePosixPath('run'),
        _init_args=(),
        _init_kwargs=dict(teacher_net=teacher, S=4),
    )
    return foreign.persistent('EDMConsistencyDistillLoss', {**state, **changes})


def test_students_of_other_settings_are_recognized_and_their_teachers_left_in_the_file(tmp_path):
    net = network_of('adm with heads')
    loaded = assert_loads_as(
        tmp_path / 'net.pkl', net, foreign.snapshot(net, loss_fn=student_loss(net), metadata=None)
    )
    sigmas = student_grid(4, 0.002, 80.0, 7, 'edm').tolist()
    assert loaded.metadata == dict(
        objective='mcd', S=4, sigma_min=0.002, sigma_max=80.0, rho=7, student_grid='edm', sigmas=sigmas
    )


@pytest.mark.parametrize(
    'changes',
    [
        dict(S=0),
        dict(S=2.5),
        dict(S=10**9),
        dict(S=None),
        dict(rho=0),
        dict(rho=1e-9),
        dict(rho=float('inf')),
        dict(sigma_min=0),
        dict(sigma_min=90.0),
        dict(sigma_max='80'),
        dict(sigma_max=10**400),
        dict(sigma_max=float('nan')),
    ],
    ids=str,
)
def test_students_whose_grid_is_impossible_are_refused(tmp_path, changes):
    net = network_of('adm')
    (tmp_path / 'net.pkl').write_bytes(foreign.snapshot(net, loss_fn=student_loss(net, **changes)))
    with pytest.raises(UserError, match=r'impossible|noise levels'):
        load_network(tmp_path / 'net.pkl')


@pytest.mark.parametrize(
    'changes',
    [
        dict(sigmas=5),
        dict(sigmas=[]),
        dict(sigmas=[0.0]),
        dict(sigmas=[1.0, 2.0, 0.0]),
        dict(sigmas=[2.0, 1.0]),
        dict(sigmas=['a', 0.0]),
        dict(sigmas=[float('nan'), 0.0]),
        dict(sigma_max=None),
        dict(sigma_min=-1),
        dict(rho='7'),
        dict(encoder=3),
    ],
    ids=str,
)
def test_metadata_that_nothing_can_be_sampled_with_is_refused(tmp_path, changes):
    (tmp_path / 'net.pkl').write_bytes(
        foreign.snapshot(network_of('adm'), metadata=dict(objective='mcd', **changes))
    )
    with pytest.raises(UserError, match='metadata'):
        load_network(tmp_path / 'net.pkl')
