"""Snapshots and training states: golden outputs, round trips, metadata, damage."""

import copy
import json
import pickle
import random
import resource
import signal
import zipfile

import numpy as np
import pytest
import torch
from foreign import assert_same_tensors, tensors
from helpers import run_python

from dnnlib import UserError
from torch_utils.flat import FlatParameters
from torch_utils.sealed_file import SEAL_LENGTH, sealed
from training import networks
from training.checkpoint import load_network, load_state, save_snapshot, save_state
from training.consistency_ops import student_grid

GOLDEN = {  # file: class, positional constructor arguments, some of the named ones
    'edm-adm-cond': ('EDMPrecond', (16, 3, 10), dict(model_type='DhariwalUNet')),
    'edm-ddpmpp-uncond-augment': ('EDMPrecond', (16, 3, 0), dict(model_type='SongUNet', augment_dim=9)),
    've-ncsnpp-uncond': (
        'VEPrecond',
        (16, 3, 0),
        dict(encoder_type='residual', resample_filter=[1, 3, 3, 1]),
    ),
    'vp-ddpmpp-cond': ('VPPrecond', (16, 3, 10), dict(channel_mult=[1, 2, 2])),
    'iddpm-adm-cond': ('iDDPMPrecond', (16, 3, 10), dict(model_channels=16)),
    'published-student': ('EDMPrecond', (16, 3, 10), dict(dropout=0.2, dout_resolutions=[8])),
}


def small_net(cls=networks.EDMPrecond, **kwargs):
    torch.manual_seed(0)
    options = dict(
        model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], model_type='DhariwalUNet'
    )
    net = cls(8, 1, label_dim=3, **{**options, **kwargs})
    for parameter in net.parameters():  # the output layers start at zero
        torch.nn.init.normal_(parameter, std=0.1)
    return net


@pytest.fixture
def snapshot(tmp_path):
    """A snapshot of ours: (path, the network that went in)."""
    net = small_net()
    save_snapshot(
        tmp_path / 'net.pkl',
        net,
        objective='mcd',
        S=2,
        sigmas=[80.0, 1.0, 0.0],
        fid=float('nan'),
        dataset_kwargs={'resolution': 8},
    )
    return tmp_path / 'net.pkl', net


# ----------------------------------------------------------------------------
# Snapshots that others wrote.


@pytest.mark.parametrize('name', GOLDEN)
def test_snapshots_of_edm_load_with_their_arguments_and_give_the_golden_output(fixtures, name):
    """Tolerance: relative 1e-4 of the output's standard deviation, FP32 on the CPU."""
    class_name, args, kwargs = GOLDEN[name]
    net = load_network(fixtures / f'{name}.pkl')
    assert (type(net).__name__, net.init_args) == (class_name, args)
    assert net.init_kwargs | kwargs == net.init_kwargs
    assert not net.training and not any(parameter.requires_grad for parameter in net.parameters())
    golden = {key: torch.as_tensor(value) for key, value in np.load(fixtures / f'{name}.npz').items()}
    augment = {key: golden[key] for key in ['augment_labels'] if key in golden}
    denoised = net(golden['x'], golden['sigma'], golden.get('class_labels'), **augment)
    assert (denoised - golden['D']).abs().max() < 1e-4 * golden['D'].std()


def test_a_snapshot_of_weights_that_are_views_of_one_vector_is_no_larger(tmp_path):
    """As in training, where all parameters share their memory: each would bring the whole of it along."""
    torch.manual_seed(0)
    net = networks.EDMPrecond(
        8, 1, 0, model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[]
    )
    save_snapshot(tmp_path / 'plain.pkl', net)
    flat = FlatParameters(net)
    assert all(p.untyped_storage().nbytes() == 4 * flat.weights.numel() for p in net.parameters())
    save_snapshot(tmp_path / 'flat.pkl', net)
    plain, views = ((tmp_path / f'{name}.pkl').stat().st_size for name in ('plain', 'flat'))
    assert abs(views - plain) < 0.02 * plain
    assert_same_tensors(load_network(tmp_path / 'plain.pkl'), load_network(tmp_path / 'flat.pkl'))


@pytest.mark.parametrize('name', GOLDEN)
def test_a_round_trip_keeps_every_tensor_argument_and_attribute(fixtures, tmp_path, name):
    first = load_network(fixtures / f'{name}.pkl')
    save_snapshot(tmp_path / 'again.pkl', first, **first.metadata)
    again = load_network(tmp_path / 'again.pkl')
    assert_same_tensors(first, again)
    assert (again.init_args, again.init_kwargs, again.sigma_min, again.sigma_max) == (
        first.init_args,
        first.init_kwargs,
        first.sigma_min,
        first.sigma_max,
    )
    assert again.metadata.pop('digest') and again.metadata == first.metadata


def test_attributes_come_from_the_file_not_from_recomputation(fixtures):
    """iDDPM's largest noise level was computed in FP32 by its authors; the file says which number was used in training."""
    assert load_network(fixtures / 'iddpm-adm-cond.pkl').sigma_max == 20291.171875


def test_a_published_student_is_recognized_by_its_loss(fixtures):
    metadata = load_network(fixtures / 'published-student.pkl').metadata
    assert metadata['dataset_kwargs']['resolution'] == 16
    expected = dict(objective='mcd', S=8, sigma_min=0.002, sigma_max=80.0, rho=7.0, student_grid='edm')
    assert metadata.items() >= expected.items()
    assert metadata['sigmas'] == student_grid(8, 0.002, 80.0, 7.0, 'edm').tolist()


def test_a_plain_edm_snapshot_is_a_diffusion_model(fixtures):
    assert load_network(fixtures / 've-ncsnpp-uncond.pkl').metadata == {'objective': 'diffusion'}


def test_another_key_is_an_error_that_lists_the_keys(fixtures):
    with pytest.raises(UserError, match=r"no network 'net'; it has 'ema'"):
        load_network(fixtures / 'edm-adm-cond.pkl', key='net')


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r'nothing-here\.pkl'):
        load_network(tmp_path / 'nothing-here.pkl')


# ----------------------------------------------------------------------------
# Our own snapshots.


def test_a_snapshot_gives_back_network_and_metadata(snapshot):
    path, net = snapshot
    loaded = load_network(path)
    assert_same_tensors(net, loaded)
    metadata = loaded.metadata
    assert len(metadata.pop('digest')) == 64 and np.isnan(metadata.pop('fid'))
    assert metadata == dict(objective='mcd', S=2, sigmas=[80.0, 1.0, 0.0], dataset_kwargs={'resolution': 8})


def test_saving_leaves_the_network_as_it_was(tmp_path):
    net = small_net().train()
    before = {name: value.clone() for name, value in tensors(net).items()}
    save_snapshot(tmp_path / 'net.pkl', net)
    assert net.training and all(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(before[name], value) for name, value in tensors(net).items())


def test_half_precision_weights_views_and_set_attributes_survive(tmp_path):
    net = small_net(networks.iDDPMPrecond).half()
    base = torch.randn(3, *net.model.out_conv.weight.shape)
    net.model.out_conv.weight = torch.nn.Parameter(base[1])
    net.use_fp16, net.sigma_min = True, 0.5
    save_snapshot(tmp_path / 'net.pkl', net)
    loaded = load_network(tmp_path / 'net.pkl')
    assert_same_tensors(net, loaded)
    assert (
        loaded.use_fp16 is True
        and loaded.sigma_min == 0.5
        and loaded.model.map_layer0.weight.dtype == torch.float16
    )
    assert loaded.model.out_conv.weight.untyped_storage().nbytes() == base[1].nbytes, (
        'the tensors beside the view were saved too'
    )


def test_numpy_numbers_in_arguments_and_metadata_become_plain(tmp_path):
    save_snapshot(
        tmp_path / 'net.pkl', small_net(dropout=np.float64(0.25)), fid=np.float32(1.5), kimg=np.int64(3)
    )
    loaded = load_network(tmp_path / 'net.pkl')
    assert type(loaded.init_kwargs['dropout']) is float and loaded.init_kwargs['dropout'] == 0.25
    assert (type(loaded.metadata['fid']), type(loaded.metadata['kimg'])) == (float, int)


def test_metadata_that_is_not_plain_data_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match='Tensor'):
        save_snapshot(tmp_path / 'net.pkl', small_net(), loss=torch.zeros(1))
    assert not list(tmp_path.iterdir())


def test_a_failing_save_leaves_the_previous_snapshot_whole(snapshot):
    path, net = snapshot
    before = path.read_bytes()
    net.model.register_forward_hook(lambda *_: None)  # cannot be pickled
    with pytest.raises((pickle.PicklingError, AttributeError)):
        save_snapshot(path, net)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_changed_metadata_changes_the_digest_and_nothing_else_does(tmp_path):
    net = small_net()
    digests = []
    for i, kimg in enumerate([1, 1, 2]):
        save_snapshot(tmp_path / f'{i}.pkl', copy.deepcopy(net), kimg=kimg)
        digests.append(load_network(tmp_path / f'{i}.pkl').metadata['digest'])
    assert digests[0] == digests[1] != digests[2]


# ----------------------------------------------------------------------------
# Damage.


def positions(length, count):
    return random.Random(0).sample(range(length), count)


def test_every_flipped_bit_in_our_snapshot_is_noticed(snapshot):
    path, _ = snapshot
    data = path.read_bytes()
    for position in [*positions(len(data), 60), *range(len(data) - 20, len(data))]:
        path.write_bytes(data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :])
        with pytest.raises(UserError, match=r'net\.pkl'):
            load_network(path)


def test_every_truncation_of_our_snapshot_is_noticed(snapshot):
    path, _ = snapshot
    data = path.read_bytes()
    for length in [0, 1, 2, *positions(len(data), 25), *range(len(data) - SEAL_LENGTH + 1, len(data))]:
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=r'net\.pkl'):
            load_network(path)


@pytest.mark.parametrize(
    'alter',
    [
        lambda data: data['ema'].model.out_conv.weight.mul_(1.001),
        lambda data: data['metadata'].update(S=4),
        lambda data: data['dataset_kwargs'].update(resolution=16),
        lambda data: setattr(data['ema'], 'sigma_data', 0.6),
        lambda data: setattr(
            data['ema'].model.out_conv,
            'weight',
            torch.nn.Parameter(data['ema'].model.out_conv.weight.mT[:, :8]),
        ),
    ],
    ids=['tensor', 'metadata', 'dataset_kwargs', 'attribute', 'shape'],
)
def test_a_change_by_a_tool_that_rewrites_the_pickle_is_noticed(snapshot, alter):
    """Such a tool drops the checksum at the end of the file; the digest in the metadata remains."""
    path, _ = snapshot
    with open(path, 'rb') as file:
        data = pickle.load(file)
    path.write_bytes(pickle.dumps(data))
    load_network(path)
    alter(data)
    path.write_bytes(pickle.dumps(data))
    with pytest.raises(UserError, match=r'digest|shape'):
        load_network(path)


# ----------------------------------------------------------------------------
# Training states.

STATE = dict(
    net=dict(weight=torch.arange(6.0).reshape(2, 3), half=torch.ones(3, dtype=torch.float16)),
    nimg=12_800,
    rng=[torch.get_rng_state()],
    options=dict(lr=8e-5, betas=(0.9, 0.999), label=None, desc='digits'),
)


def test_a_training_state_gives_back_what_was_saved(tmp_path):
    save_state(tmp_path / 'state.pt', STATE)
    loaded = load_state(tmp_path / 'state.pt')
    assert (
        loaded.keys() == STATE.keys() and loaded['nimg'] == 12_800 and loaded['options'] == STATE['options']
    )
    assert (
        torch.equal(loaded['net']['weight'], STATE['net']['weight'])
        and loaded['net']['half'].dtype == torch.float16
    )
    assert torch.equal(loaded['rng'][0], STATE['rng'][0])


def test_a_training_state_is_an_ordinary_pytorch_file(tmp_path):
    save_state(tmp_path / 'state.pt', STATE)
    assert torch.load(tmp_path / 'state.pt', weights_only=True)['nimg'] == 12_800


@pytest.mark.parametrize(
    'save',
    [
        lambda path: save_state(path, dict(a=torch.zeros(100_000))),
        lambda path: save_snapshot(path, small_net()),
    ],
)
def test_a_full_disk_leaves_the_previous_file_whole(tmp_path, save):
    """A limit on file sizes stands in for the disk; its error number is treated alike."""
    path = tmp_path / 'previous'
    path.write_bytes(b'previous')
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UserError, match='previous'):
            save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b'previous' and list(tmp_path.iterdir()) == [path]


def test_what_could_not_be_read_back_is_not_saved(tmp_path):
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\] is a float64"):
        save_state(tmp_path / 'state.pt', dict(a=[1, np.float64(2)]))
    assert not list(tmp_path.iterdir())


def test_every_damage_to_a_training_state_is_noticed(tmp_path):
    path = tmp_path / 'state.pt'
    save_state(path, STATE)
    data = path.read_bytes()
    for position in positions(len(data), 100):
        for damaged in (
            data[:position],
            data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :],
        ):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=r'state\.pt'):
                load_state(path)


def test_a_training_state_that_is_sealed_but_broken_is_one_clear_error(tmp_path):
    """Whatever PyTorch makes of it; some changes it does not mind."""
    save_state(tmp_path / 'state.pt', STATE)
    data, draw = (tmp_path / 'state.pt').read_bytes()[:-SEAL_LENGTH], random.Random(0)
    refused = 0
    for position in positions(len(data), 150):
        with sealed(tmp_path / 'state.pt') as file:
            file.write(data[:position] + bytes([draw.randrange(256)]) + data[position + draw.randrange(3) :])
        try:
            load_state(tmp_path / 'state.pt')
        except UserError as error:
            refused += 'state.pt' in str(error) and '\n' not in str(error)
    assert refused > 50


def test_a_training_state_cannot_unpack_to_more_than_its_length(tmp_path):
    """100 MB of zeros, 100 kB compressed."""
    save_state(tmp_path / 'plain.pt', dict(a=torch.zeros(25_000_000)))
    with (
        zipfile.ZipFile(tmp_path / 'plain.pt') as source,
        zipfile.ZipFile(tmp_path / 'bomb', 'w', zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in source.infolist():
            bomb.writestr(entry.filename, source.read(entry))
    with sealed(tmp_path / 'state.pt') as file:
        file.write((tmp_path / 'bomb').read_bytes())
    with pytest.raises(UserError, match='compressed'):
        load_state(tmp_path / 'state.pt')


def test_a_training_state_that_would_run_code_is_refused(tmp_path, monkeypatch):
    """Even with a valid checksum: the file is one that `save_state` would have written, had it not checked."""

    class Hostile:
        def __reduce__(self):
            return open, (str(tmp_path / 'canary'), 'w')

    monkeypatch.setattr('training.checkpoint._check_state', lambda *_: None)
    save_state(tmp_path / 'state.pt', dict(a=Hostile()))
    with pytest.raises(UserError, match=r'state\.pt'):
        load_state(tmp_path / 'state.pt')
    assert not (tmp_path / 'canary').exists()


# ----------------------------------------------------------------------------
# The benchmark.


@pytest.mark.slow
def test_the_benchmark_measures_every_way_of_loading_and_saving():
    done = json.loads(
        run_python(
            'benchmarks/checkpoint.py', '--channels=8', '--res=8', '--rounds=1', '--repeats=1', '--json'
        ).stdout
    )
    assert len(done['rows']) == 5 and all(
        min(row['first'], row['again']) > 0 for row in done['rows'].values()
    )
