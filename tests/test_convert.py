"""convert.py: OpenAI's weights in, safetensors both ways, diffusers out, and what is in a file."""

import functools
import http.server
import json
import math
import os
import pickle
import random
import re
import struct
import sys
import threading
import tracemalloc
import zipfile

import helpers
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import FAST, assert_one_clear_error, run
from openai_unet import random_weights, unet, unet_shapes
from pages import blocks
from safetensors.torch import load_file, save_file
from stock_edm import assert_stock_edm_agrees

import convert
import train
from dnnlib import UserError, downloads
from sampling import generation
from training import consistency_ops as ops
from training import networks, samplers
from training.checkpoint import load_network, save_snapshot, save_state
from training.interchange.diffusers import save_diffusers
from training.interchange.openai import Untold, build_network, infer_layout, load_openai, parameter_names
from training.interchange.safetensors import from_json, load_safetensors, save_safetensors, to_json
from training.networks import edm2 as networks_edm2

SMALL = dict(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels={1}, scale_shift=True)
DEEP = dict(
    model_channels=64,
    channel_mult=(1, 1, 2),
    num_res_blocks=2,
    attention_levels={1, 2},
    scale_shift=False,
    image_channels=1,
)


invoke = functools.partial(helpers.invoke, convert.main)


def golden(fixtures, name):
    return {
        key: torch.as_tensor(value)
        for key, value in np.load(fixtures / f'{name}.npz').items()
        if value.dtype.kind != 'U'
    }


def published(path, **config):
    """A file such as OpenAI's, of random weights."""
    weights = random_weights(unet_shapes(**{**SMALL, **config}))
    torch.save(weights, path)
    return weights


def oracle(weights, net, x, sigma, labels=None, num_res_blocks=1, **heads):
    """D(x; sigma) of a diffusion model of these weights, by a network that shares nothing with ours."""
    noise, total = sigma[:, None, None, None], (sigma**2 + 0.25)[:, None, None, None]
    raw = unet(
        weights,
        num_res_blocks,
        x / total.sqrt(),
        250 * sigma.log(),
        labels if net.label_dim else None,
        **heads,
    )
    return 0.25 / total * x + 0.5 * noise / total.sqrt() * raw


def assert_same_network(a, b):
    """Every tensor bit for bit; class, constructor arguments with their types, numeric attributes, metadata."""
    assert type(a) is type(b) and repr((a.init_args, a.init_kwargs)) == repr((b.init_args, b.init_kwargs))
    numbers = lambda net: {
        name: value
        for name, value in vars(net).items()
        if isinstance(value, (int, float)) and not name.startswith('_')
    }
    assert numbers(a) == numbers(b)
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name
    drop = lambda net: repr(
        sorted((name, value) for name, value in net.metadata.items() if name != 'digest')
    )  # repr: NaN equals NaN
    assert drop(a) == drop(b)


@pytest.fixture
def source(tmp_path):
    """A small file such as OpenAI's, and its bytes."""
    published(tmp_path / 'weights.pt', num_classes=3)
    return tmp_path / 'weights.pt', (tmp_path / 'weights.pt').read_bytes()


@pytest.fixture(scope='session')
def consistency(fixtures):
    return load_openai(fixtures / 'openai-cm-cond.pt')


# ----------------------------------------------------------------------------
# OpenAI's weights in.


@pytest.mark.parametrize('kind, column', [('consistency', 'D_consistency'), ('edm', 'D_edm')])
def test_converted_weights_give_the_golden_output(fixtures, tmp_path, kind, column):
    result = invoke('--from=openai', f'--kind={kind}', fixtures / 'openai-cm-cond.pt', tmp_path / 'net.pkl')
    assert result.exit_code == 0 and '16x16x3, 10 classes' in result.stdout, result.stderr
    net, given = load_network(tmp_path / 'net.pkl'), golden(fixtures, 'openai-cm-cond')
    denoised = net(given['x'], given['sigma'], given['class_labels'])
    assert (denoised - given[column]).abs().max() < 1e-4 * given[column].std()


def test_a_consistency_model_is_the_identity_at_its_boundary_and_samples_in_one_step(consistency, family):
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(consistency(x, 0.002, torch.eye(10)[:2]), x)
    latents, labels = (
        torch.as_tensor(family['openai.noises'])[0],
        torch.eye(10)[torch.as_tensor(family['openai.labels'])],
    )
    with torch.no_grad():
        images = samplers.sample(consistency, latents, labels).clamp(-1, 1)
    assert np.abs(images.numpy() - family['openai.onestep']).max() < 1e-4 * family['openai.onestep'].std()


@pytest.mark.parametrize(
    'config',
    [SMALL, DEEP, {**DEEP, 'num_classes': 4, 'scale_shift': True}],
    ids=['small', 'deep', 'deep conditional'],
)
def test_networks_of_other_shapes_compute_what_openais_would(tmp_path, config):
    """LSUN's kind adds the embedding before the norm, has no labels, and several blocks and levels without attention."""
    weights = published(tmp_path / 'net.pt', **config)
    net = load_openai(tmp_path / 'net.pt', kind='edm')
    n, size = 3, 8 << (len(config['channel_mult']) - 1)
    assert net.img_resolution == size and net.label_dim == config.get('num_classes', 0)
    x, sigma, labels = (
        torch.randn(n, net.img_channels, size, size),
        torch.tensor([0.01, 1.0, 50.0]),
        torch.arange(n) % 4,
    )
    expected = oracle(weights, net, x, sigma, labels, config['num_res_blocks'])
    denoised = net(x, sigma, torch.eye(4)[labels] if net.label_dim else None)
    assert (denoised - expected).abs().max() < 1e-4 * expected.std()


WIDER = dict(
    model_channels=32, channel_mult=(1, 2, 3), attention_levels={1, 2}
)  # attention over 64 and 96 channels


@pytest.mark.parametrize(
    'options, heads, config',
    [
        (['--channels-per-head=32'], dict(head_channels=32), WIDER),
        (
            ['--channels-per-head=16', '--attention-order=heads-first'],
            dict(head_channels=16, heads_first=True),
            WIDER,
        ),
        (['--heads=4'], dict(heads=4), WIDER),
        (['--heads=1', '--attention-order=heads-first'], dict(heads=1, heads_first=True), WIDER),
        (['--attention-order=heads-first'], dict(heads_first=True), dict(channel_mult=(1, 4))),
        ([], {}, dict(channel_mult=(4, 8), model_channels=16)),
        ([], {}, dict(channel_mult=(2, 1, 2), attention_levels=set())),
    ],
    ids=str,
)
def test_what_the_shapes_do_not_tell_can_be_told(tmp_path, options, heads, config):
    """And survives as a snapshot: the arguments travel with the network."""
    weights = published(tmp_path / 'net.pt', **config)
    result = invoke('--from=openai', '--kind=edm', *options, tmp_path / 'net.pt', tmp_path / 'net.pkl')
    assert result.exit_code == 0, result.stderr
    net = load_network(tmp_path / 'net.pkl')
    x, sigma = torch.randn(2, 3, net.img_resolution, net.img_resolution), torch.tensor([0.1, 5.0])
    expected = oracle(weights, net, x, sigma, **heads)
    assert (net(x, sigma) - expected).abs().max() < 1e-4 * expected.std()
    if heads:
        assert (
            expected - oracle(weights, net, x, sigma, head_channels=8)
        ).abs().max() > 0.01 * expected.std(), 'any heads would do'


def test_heads_that_cannot_be_are_refused_and_the_options_named(tmp_path):
    published(tmp_path / 'net.pt', **WIDER)
    for options, words in (
        ([], 'over 96 channels, which cannot be split into heads of 64 channels'),
        (['--channels-per-head=48'], 'over 64'),
        (['--heads=5'], 'into 5 heads'),
        (['--channels-per-head=128'], 'over 64 channels'),
    ):
        result = invoke('--from=openai', *options, tmp_path / 'net.pt', tmp_path / 'net.pkl')
        assert_one_clear_error(result, 'net.pt', words, '--channels-per-head or --heads')
    assert not (tmp_path / 'net.pkl').exists()


def test_a_conversion_says_what_it_assumed(source, tmp_path):
    result = invoke('--from=openai', source[0], tmp_path / 'net.pkl')
    for word in (
        'a consistency model',
        'images of 16x16',
        '64 channels per attention head',
        'q, k, v first',
        'weights.pt does not record it',
    ):
        assert word in result.stdout
    told = ['--kind=edm', '--resolution=32', '--heads=1', '--attention-order=qkv-first']
    assert 'ssumed' not in invoke('--from=openai', *told, source[0], tmp_path / 'net.pkl').stdout


@pytest.mark.parametrize(
    'config, resolution, attention, millions',
    [
        (
            dict(
                model_channels=192,
                channel_mult=(1, 2, 3, 4),
                num_res_blocks=3,
                attention_levels={1, 2, 3},
                scale_shift=True,
                num_classes=1000,
            ),
            64,
            [32, 16, 8],
            295.9,
        ),
        (
            dict(
                model_channels=256,
                channel_mult=(1, 1, 2, 2, 4, 4),
                num_res_blocks=2,
                attention_levels={3, 4, 5},
                scale_shift=False,
            ),
            256,
            [32, 16, 8],
            526.5,
        ),
    ],
    ids=['ImageNet-64', 'LSUN-256'],
)
def test_the_published_layouts_are_recognized_from_their_shapes(config, resolution, attention, millions):
    shapes = unet_shapes(**config)
    net = build_network(infer_layout(shapes), Untold())
    assert (net.img_resolution, net.label_dim) == (resolution, config.get('num_classes', 0))
    assert net.init_kwargs['attn_resolutions'] == attention and net.init_kwargs['channel_mult'] == list(
        config['channel_mult']
    )
    assert (
        net.init_kwargs['num_blocks'] == config['num_res_blocks']
        and net.init_kwargs['adaptive_scale'] == config['scale_shift']
    )
    assert sum(parameter.numel() for parameter in net.parameters()) == pytest.approx(millions * 1e6, rel=1e-3)
    names = parameter_names(net.model)
    assert sorted(names.values()) == sorted(shapes)
    for ours, theirs in names.items():
        shape = tuple(net.model.get_parameter(ours).shape)
        assert shape == (shapes[theirs] if ours != 'map_label.weight' else shapes[theirs][::-1])


def test_a_resolution_can_be_given_and_must_fit(source, tmp_path):
    assert load_openai(source[0], resolution=32).init_kwargs['attn_resolutions'] == [16]
    with pytest.raises(UserError, match='2 levels, which do not fit images of 15x15'):
        load_openai(source[0], resolution=15)


def test_half_precision_weights_stay_half(source, tmp_path):
    """OpenAI's convert_to_fp16 leaves embeddings and output layer in FP32."""
    weights = torch.load(source[0], weights_only=True)
    images = load_openai(source[0])(torch.ones(1, 3, 16, 16), 1.0)
    for torso, halved in ((False, lambda name: True), (True, lambda name: '_block' in name)):
        torch.save(
            {name: tensor.half() if halved(name) else tensor for name, tensor in weights.items()},
            tmp_path / 'half.pt',
        )
        net = load_openai(tmp_path / 'half.pt')
        dtypes = {parameter.dtype for parameter in net.parameters()}
        assert dtypes == ({torch.float16, torch.float32} if torso else {torch.float16})
        assert 0 < (net(torch.ones(1, 3, 16, 16), 1.0) - images).abs().max() < 0.01


@pytest.mark.parametrize(
    'wrap, key',
    [
        (
            lambda w: {
                'model_state_dict': w,
                'step': 3,
                'optimizer': {'state': {0: {'exp_avg': torch.zeros(3)}}, 'param_groups': [{'lr': 0.1}]},
            },
            None,
        ),
        (lambda w: {f'module.{name}': tensor for name, tensor in w.items()}, None),
        (
            lambda w: {
                'n_averaged': torch.tensor(7),
                **{f'module.{name}': tensor for name, tensor in w.items()},
            },
            None,
        ),
        (
            lambda w: {'state': {'ema': {f'module._orig_mod.{name}': tensor for name, tensor in w.items()}}},
            None,
        ),
        (lambda w: {'model': {name: -tensor for name, tensor in w.items()}, 'ema': w}, 'ema'),
        (
            lambda w: {'a': {'model': {name: -tensor for name, tensor in w.items()}}, 'b': {'module': w}},
            'b.module',
        ),
    ],
    ids=['wrapped', 'data parallel', 'averaged model', 'nested', 'several', 'several nested'],
)
def test_weights_are_found_under_an_entry_or_a_prefix(source, tmp_path, wrap, key):
    torch.save(wrap(torch.load(source[0], weights_only=True)), tmp_path / 'wrapped.pt')
    found, expected = load_openai(tmp_path / 'wrapped.pt', key=key), load_openai(source[0])
    assert_same_network(found, expected)


def test_of_several_networks_one_must_be_chosen(source, tmp_path):
    weights = torch.load(source[0], weights_only=True)
    torch.save({'model': weights, 'ema': {'module': weights}}, tmp_path / 'two.pt')
    convert_two = lambda *options: invoke(
        '--from=openai', *options, tmp_path / 'two.pt', tmp_path / 'net.pkl'
    )
    assert_one_clear_error(convert_two(), 'several networks: ema.module, model', '--key')
    assert_one_clear_error(convert_two('--key=em'), "no network 'em' but others: ema.module, model")
    assert_one_clear_error(invoke('info', tmp_path / 'two.pt'), 'several networks')
    assert (
        convert_two('--key=ema').exit_code == 0
        and invoke('info', '--key=model', tmp_path / 'two.pt').exit_code == 0
    )


def test_weights_that_were_saved_on_a_gpu_load_without_one(source, tmp_path, monkeypatch):
    """The file names its tensors' device; here the name is put there by hand."""
    monkeypatch.setattr(torch.serialization, 'location_tag', lambda storage: 'cuda:3')
    torch.save(torch.load(source[0], weights_only=True), tmp_path / 'gpu.pt')
    monkeypatch.undo()
    assert b'cuda:3' in (tmp_path / 'gpu.pt').read_bytes()
    assert_same_network(load_openai(tmp_path / 'gpu.pt'), load_openai(source[0]))


@pytest.fixture(scope='module')
def run_folder(digits, tmp_path_factory):
    """A run of two steps with all that it writes; its teacher is a converted one."""
    folder = tmp_path_factory.mktemp('run')
    published(folder / 'edm.pt', num_classes=10, image_channels=1)
    invoke('--from=openai', '--kind=edm', '--resolution=8', folder / 'edm.pt', folder / 'teacher.pkl')
    run(
        'train.py',
        f'--outdir={folder}',
        f'--data={digits}',
        '--cond=1',
        '--consistency=True',
        f'--teacher={folder / "teacher.pkl"}',
        *FAST,
        '--batch=16',
        '--duration=0.000032',
        '--S=2',
        '--T_start=4',
        '--T_end=4',
        '--phema=0.05',
        '--dump=1',
    )
    return folder


def test_a_student_is_distilled_from_a_converted_teacher(run_folder):
    student = load_network(max(run_folder.glob('network-snapshot-*.pkl')))
    assert (
        isinstance(student, networks.CMPrecond)
        and student.metadata['objective'] == 'mcd'
        and student.boundary == 0
    )


def test_a_consistency_model_is_no_teacher(source, tmp_path, digits):
    invoke('--from=openai', source[0], tmp_path / 'cm.pkl')
    arguments = [
        f'--outdir={tmp_path}',
        f'--data={digits}',
        '--consistency=True',
        f'--teacher={tmp_path / "cm.pkl"}',
        '--dry-run',
    ]
    assert_one_clear_error(
        CliRunner().invoke(train.main, arguments, prog_name='train.py'), 'is a consistency model itself'
    )


def test_stock_edm_loads_a_converted_network(fixtures, tmp_path, consistency):
    given = golden(fixtures, 'openai-cm-cond')
    given = dict(x=given['x'], sigma=given['sigma'], labels=given['class_labels'])
    save_snapshot(tmp_path / 'net.pkl', consistency, **consistency.metadata)
    assert_stock_edm_agrees(tmp_path, dict(net=consistency), given)


# ----------------------------------------------------------------------------
# Files that are none of OpenAI's, or damaged, or hostile.


def edited(**changes):
    """Weights with some tensors replaced, or left out where the replacement is None."""
    weights = random_weights(unet_shapes(**SMALL)) | {
        name.replace('__', '.'): tensor for name, tensor in changes.items()
    }
    return {name: tensor for name, tensor in weights.items() if tensor is not None}


@pytest.mark.parametrize(
    'content, words',
    [
        ({'weight': torch.zeros(2, 2)}, 'a tensor time_embed.0.weight is expected, and there is weight.'),
        ({}, 'there is nothing'),
        ([torch.zeros(1)], 'there is a list'),
        (
            {'net': {'weight': torch.zeros(1)}, **{str(i): 0 for i in range(9)}},
            'there is net, 0, 1, 2, 3, ...',
        ),
        (edited(out__0__bias=None), 'lacks tensors: out.0.bias'),
        (edited(extra=torch.zeros(1)), 'unexpected tensors: extra'),
        (edited(out__2__bias=torch.zeros(6), out__2__weight=torch.zeros(6, 32, 3, 3)), 'learn_sigma'),
        (
            edited(out__2__bias=torch.zeros(4), out__2__weight=torch.zeros(4, 32, 3, 3)),
            'out.2.weight in the place of',
        ),
        (
            {name: tensor for name, tensor in edited().items() if not name.startswith('input_blocks.2.')},
            'by pooling (input_blocks.2 has no weights)',
        ),
        (
            edited(middle_block__1__qkv__weight=torch.zeros(192, 64, 1)),
            'middle_block.1.qkv.weight in the place of',
        ),
        (edited(time_embed__0__weight=torch.zeros(0, 0)), 'time_embed.0.weight'),
        (
            edited(time_embed__0__weight=torch.zeros(128, 128)),
            "not multiples of 32 and of the time embedding's 128",
        ),
        (edited(time_embed__0__weight=torch.zeros(128, 1)), "the time embedding's 1, an even number"),
        (
            edited(input_blocks__2__0__op__weight=torch.zeros(32, 32, 3, 3)),
            'resamples by a convolution (input_blocks.2.0.op.weight)',
        ),
        (edited(output_blocks__1__2__in_layers__2__weight=None), 'cannot be converted'),
        (
            edited(output_blocks__3__0__in_layers__2__weight=None),
            '3 blocks in its decoder, of which 1 upsample',
        ),
        (edited(out__0__bias=torch.zeros(32).to_sparse()), 'out.0.bias should be a tensor'),
        (edited(out__0__bias=torch.zeros(32, dtype=torch.int64)), 'out.0.bias should be a tensor'),
        (edited(out__0__bias='x'), 'out.0.bias should be a tensor'),
        (edited(time_embed__0__weight=torch.zeros(1).expand(1 << 20, 1 << 20)), 'share memory'),
        (random_weights(unet_shapes(**{**SMALL, 'model_channels': 16})), 'levels of 16, 32 channels'),
    ],
    ids=range(21),
)
def test_other_weights_are_refused_by_name(tmp_path, content, words):
    torch.save(content, tmp_path / 'weights.pt')
    result = invoke('--from=openai', tmp_path / 'weights.pt', tmp_path / 'net.pkl')
    assert_one_clear_error(result, 'weights.pt', words)
    assert [path.name for path in tmp_path.iterdir()] == ['weights.pt']


class Hostile:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('function', [os.system, eval, exec, open], ids=lambda function: function.__name__)
def test_nothing_in_a_pytorch_file_is_executed(tmp_path, function):
    canary = tmp_path / 'canary'
    argument = {os.system: f'touch {canary}', open: str(canary)}.get(function, f'open({str(canary)!r}, "w")')
    for content in (Hostile(function, argument), {**edited(), 'out.0.bias': Hostile(function, argument)}):
        torch.save(content, tmp_path / 'weights.pt')
        with pytest.raises(UserError, match='Nothing in it was executed'):
            load_openai(tmp_path / 'weights.pt')
        assert_one_clear_error(invoke('info', tmp_path / 'weights.pt'), 'weights.pt')
    (tmp_path / 'bare.pt').write_bytes(pickle.dumps(Hostile(function, argument)))
    assert_one_clear_error(invoke('--from=openai', tmp_path / 'bare.pt', tmp_path / 'net.pkl'), 'bare.pt')
    assert not canary.exists()


def test_dicts_without_end_are_given_up(tmp_path):
    """One that holds itself twice, and ones that hold each other a thousand times at each of four depths: followed up, they would fill the memory."""
    endless = {'leaf': 0}
    endless['x'] = endless['y'] = endless
    many = {}
    for _ in range(4):
        many = dict.fromkeys(map(str, range(999)), many)
    for content in (endless, many):
        torch.save(content, tmp_path / 'weights.pt')
        tracemalloc.start()
        with pytest.raises(UserError, match='is expected, and there is'):
            load_openai(tmp_path / 'weights.pt')
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100e6


def test_a_file_of_an_old_pytorch_is_named_as_such(tmp_path):
    torch.save(edited(), tmp_path / 'old.pt', _use_new_zipfile_serialization=False)
    assert_one_clear_error(
        invoke('--from=openai', tmp_path / 'old.pt', tmp_path / 'net.pkl'), 'old.pt', 'PyTorch 1.6'
    )


def test_a_compressed_archive_is_not_unpacked(tmp_path, source):
    """Ten megabytes of zeros in ten kilobytes, as a stand-in for more."""
    with zipfile.ZipFile(tmp_path / 'bomb.pt', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', bytes(10_000_000))
    with pytest.raises(UserError, match='compressed'):
        load_openai(tmp_path / 'bomb.pt')


def damages(data, count):
    draw = random.Random(0)
    for position in draw.sample(range(len(data)), count):
        yield data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :]
        yield data[:position]


def test_damage_to_a_pytorch_file_ends_in_an_error_or_changes_nothing(source):
    """Padding between a zip archive's entries may change unnoticed; every tensor has a checksum."""
    path, data = source
    whole, noticed = load_openai(path).state_dict(), 0
    for damaged in damages(data, 100):
        path.write_bytes(damaged)
        try:
            loaded = load_openai(path).state_dict()
        except UserError as error:
            noticed += str(error).startswith(str(path))
        else:
            assert all(torch.equal(loaded[name], whole[name]) for name in whole)
    assert noticed > 180


# ----------------------------------------------------------------------------
# safetensors.

SNAPSHOTS = [
    'edm-adm-cond',
    'edm-ddpmpp-uncond-augment',
    've-ncsnpp-uncond',
    'vp-ddpmpp-cond',
    'iddpm-adm-cond',
    'published-student',
    'edm2-cond',
]


@pytest.mark.parametrize('name', SNAPSHOTS)
def test_snapshots_of_others_survive_safetensors_exactly(fixtures, tmp_path, name):
    for arguments in (
        [f'--to=safetensors {fixtures / name}.pkl {tmp_path}/net.safetensors'],
        [f'--from=safetensors {tmp_path}/net.safetensors {tmp_path}/net.pkl'],
    ):
        assert invoke(*arguments[0].split()).exit_code == 0
    first, again = load_network(fixtures / f'{name}.pkl'), load_network(tmp_path / 'net.pkl')
    assert_same_network(first, again)
    assert load_safetensors(tmp_path / 'net.safetensors').metadata['digest'] == again.metadata['digest']
    given = golden(fixtures, name)
    augment = {key: given[key] for key in ['augment_labels'] if key in given}
    assert torch.equal(
        first(given['x'], given['sigma'], given.get('class_labels'), **augment),
        again(given['x'], given['sigma'], given.get('class_labels'), **augment),
    )


@pytest.fixture
def awkward(tmp_path):
    """A network with all that JSON does not have: tuples, infinities, NaN, tags that mean themselves, FP16, attributes set later."""
    torch.manual_seed(0)
    net = networks.EDMPrecond(
        8,
        1,
        label_dim=3,
        model_channels=16,
        channel_mult=(1, 2),
        num_blocks=1,
        attn_resolutions=(),
        dropout=0.5,
    )
    net.half().sigma_min, net.use_fp16 = 0.25, True
    net.metadata = dict(
        objective='mcd',
        sigmas=[80.0, 0.1, 0.0],
        fid=float('nan'),
        best=(1, -float('inf')),
        odd={'$tuple': [1]},
        odder={'$x': {}},
        none=None,
        empty={},
        dataset_kwargs={'path': 'π.zip'},
    )
    save_safetensors(tmp_path / 'net.safetensors', net.eval().requires_grad_(False))
    return net, tmp_path / 'net.safetensors'


def test_what_json_cannot_say_is_kept(awkward):
    net, path = awkward
    loaded = load_safetensors(path)
    assert_same_network(net, loaded)
    assert (
        loaded.init_kwargs['channel_mult'] == (1, 2)
        and loaded.sigma_max == float('inf')
        and not loaded.training
    )
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_tensors_keep_their_types(tmp_path, dtype):
    """EDM2's gains are tensors without dimensions."""
    torch.manual_seed(0)
    net = (
        networks_edm2.Precond(8, 1, 3, model_channels=16, channel_mult=[1], num_blocks=1, attn_resolutions=[])
        .eval()
        .requires_grad_(False)
    )
    net.metadata = dict(objective='diffusion', kimg=1.5)
    net.unet.enc.to(dtype)
    save_safetensors(tmp_path / 'net.safetensors', net)
    loaded = load_safetensors(tmp_path / 'net.safetensors')
    assert_same_network(net, loaded)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype, torch.float32}


def test_the_configuration_is_strict_json_in_the_files_header(awkward):
    _, path = awkward
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack('<Q', data[:8])[0]])

    def refuse(constant):
        raise ValueError(constant)

    config = json.loads(header['__metadata__']['config'], parse_constant=refuse)
    assert (
        config['class_name'] == 'EDMPrecond'
        and config['kwargs']['model_channels'] == 16
        and config['metadata']['objective'] == 'mcd'
    )
    assert set(load_file(path)) == set(header) - {'__metadata__'} == set(awkward[0].state_dict())


@pytest.mark.parametrize(
    'value',
    [
        1,
        'x',
        None,
        (1, (2, [3])),
        {'$float': 1},
        {'$dict': {'$tuple': ()}},
        {'a': {'$x': 1, 'b': 2}},
        float('-inf'),
    ],
)
def test_tagged_json_gives_back_what_it_was_given(value):
    assert repr(from_json(json.loads(json.dumps(to_json(value), allow_nan=False)))) == repr(value)


def test_every_damage_to_a_safetensors_file_is_noticed(awkward):
    """The digest in the metadata covers all that the network is; the header's padding and order are free."""
    net, path = awkward
    unnoticed = 0
    for damaged in damages(path.read_bytes(), 60):
        path.write_bytes(damaged)
        try:
            assert_same_network(net, load_safetensors(path))
            unnoticed += 1
        except UserError as error:
            assert 'net.safetensors' in str(error)
    assert unnoticed < 6


@pytest.mark.parametrize(
    'config, words',
    [
        (None, 'no configuration of ours'),
        ('{', 'makes no sense'),
        ('[' * 100_000, 'makes no sense'),
        ('[]', 'makes no sense'),
        ('{"format": {"$tuple": 3}}', 'makes no sense'),
        (dict(format='another 2'), "'another 2'"),
        (dict(class_name='os.system'), "'os.system'"),
        (dict(kwargs=dict(model_channels=1 << 40)), 'beyond'),
        (dict(kwargs=dict(channel_mult=[1] * 1000)), '1000 entries'),
        (dict(kwargs=dict(nonsense=1)), 'nonsense'),
        (dict(attributes=dict(sigma_min='x')), 'sigma_min'),
        (dict(metadata={}), 'digest'),
    ],
    ids=range(12),
)
def test_foreign_and_hostile_safetensors_are_refused_by_name(awkward, config, words):
    _, path = awkward
    if isinstance(config, dict):
        data = path.read_bytes()
        own = json.loads(json.loads(data[8 : 8 + struct.unpack('<Q', data[:8])[0]])['__metadata__']['config'])
        config = json.dumps({**own, **config})
    save_file(load_file(path), path, None if config is None else dict(config=config))
    result = invoke('--from=safetensors', path, path.with_suffix('.pkl'))
    assert_one_clear_error(result, 'net.safetensors', words)
    assert not path.with_suffix('.pkl').exists()


@pytest.mark.parametrize(
    'data', [b'', b'\xff' * 8, struct.pack('<Q', 1 << 40) + b'{}', struct.pack('<Q', 2) + b'{}', b'{' * 100]
)
def test_what_is_no_safetensors_file_is_refused(tmp_path, data):
    (tmp_path / 'x.safetensors').write_bytes(data)
    with pytest.raises(UserError, match=r'x\.safetensors'):
        load_safetensors(tmp_path / 'x.safetensors')


# ----------------------------------------------------------------------------
# diffusers.


@pytest.fixture
def pipeline(tmp_path):
    """A function that writes a network as a folder and loads diffusers' pipeline from it."""
    diffusers = pytest.importorskip('diffusers')

    def load(net):
        save_diffusers(tmp_path / 'folder', net)
        pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / 'folder')
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


def through_diffusers(pipe, x, sigma, labels):
    """D(x; sigma) by the pipeline's own network and scheduler."""
    noise = sigma[:, None, None, None]
    c_skip, c_out = pipe.scheduler.get_scalings_for_boundary_condition(noise)
    times = torch.as_tensor(pipe.scheduler.sigma_to_t(sigma.numpy()))
    with torch.no_grad():
        return (
            c_skip * x
            + c_out
            * pipe.unet(
                x / (noise**2 + pipe.scheduler.config.sigma_data**2).sqrt(), times, class_labels=labels
            ).sample
        )


def test_diffusers_gives_the_golden_output_of_a_converted_model(fixtures, pipeline, consistency, family):
    pipe, given = pipeline(consistency), golden(fixtures, 'openai-cm-cond')
    denoised = through_diffusers(pipe, given['x'], given['sigma'], given['class_labels'].argmax(1))
    assert (denoised - given['D_consistency']).abs().max() < 1e-4 * given['D_consistency'].std()
    latents, labels = torch.as_tensor(family['openai.noises'])[0], torch.as_tensor(family['openai.labels'])
    images = (
        pipe(
            batch_size=4, num_inference_steps=1, latents=latents, class_labels=labels, output_type='pt'
        ).images
        * 2
        - 1
    )
    assert np.abs(images.numpy() - family['openai.onestep']).max() < 1e-4 * family['openai.onestep'].std()


def test_diffusers_samples_in_several_steps_as_openai_does(pipeline, consistency, family, monkeypatch):
    """`timesteps` [22, 0] of 40 are OpenAI's ts=0,22,39; the noise between the steps is given, the pipeline would draw it."""
    pipe, noises = pipeline(consistency), torch.as_tensor(family['openai.noises'])
    assert np.abs(pipe.scheduler.sigmas.numpy() / family['openai.ts_sigmas_40'] - 1).max() < 1e-6
    module = sys.modules[type(pipe.scheduler).__module__]
    given = iter(noises[1:])
    monkeypatch.setattr(module, 'randn_tensor', lambda *args, **kwargs: next(given))
    labels = torch.as_tensor(family['openai.labels'])
    images = (
        pipe(
            batch_size=4,
            num_inference_steps=None,
            timesteps=[22, 0],
            latents=noises[0],
            class_labels=labels,
            output_type='pt',
        ).images
        * 2
        - 1
    )
    expected = np.clip(family['openai.multistep_0_22_39'], -1, 1)
    assert np.abs(images.numpy() - expected).max() < 1e-4 * expected.std()


def test_the_pipelines_timesteps_count_what_the_model_was_trained_on(tmp_path, source):
    """Told at the conversion or at the export; 40, Song et al.'s where they distill, if nobody knows."""

    def exported(*options, src):
        folder = tmp_path / f'folder{len(list(tmp_path.iterdir()))}'
        result = invoke('--to=diffusers', *options, src, folder)
        assert result.exit_code == 0, result.stderr
        return json.loads((folder / 'scheduler' / 'scheduler_config.json').read_text())['num_train_timesteps']

    invoke('--from=openai', source[0], tmp_path / 'cd.pkl')
    invoke('--from=openai', '--timesteps=201', source[0], tmp_path / 'ct.pkl')
    assert load_network(tmp_path / 'ct.pkl').metadata['num_timesteps'] == 201
    assert [
        exported(src=tmp_path / 'cd.pkl'),
        exported(src=tmp_path / 'ct.pkl'),
        exported('--timesteps=151', src=tmp_path / 'ct.pkl'),
        exported('--from=openai', '--timesteps=18', src=source[0]),
    ] == [40, 201, 151, 18]


def test_diffusers_scheduler_has_our_karras_nodes(tmp_path, source):
    diffusers = pytest.importorskip('diffusers')
    invoke('--from=openai', '--to=diffusers', '--timesteps=151', source[0], tmp_path / 'folder')
    scheduler = diffusers.CMStochasticIterativeScheduler.from_pretrained(tmp_path / 'folder' / 'scheduler')
    expected = ops.karras_sigmas(151, 0.002, 80, 7)
    torch.testing.assert_close(scheduler.sigmas, expected, rtol=1e-12, atol=0)
    scheduler.set_timesteps(timesteps=[150, 62, 0])
    torch.testing.assert_close(scheduler.sigmas, expected[[0, 62, 150, 150]].float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    'config, told',
    [
        (DEEP, {}),
        ({**DEEP, 'attention_levels': set(), 'scale_shift': True}, {}),
        ({**DEEP, 'attention_levels': {2}}, dict(channels_per_head=32)),
    ],
    ids=['additive', 'attention in the middle', 'smaller heads'],
)
def test_diffusers_agrees_on_other_layouts(tmp_path, pipeline, config, told):
    published(tmp_path / 'net.pt', **config)
    net = load_openai(tmp_path / 'net.pt', **told)
    x, sigma = torch.randn(3, 1, 32, 32), torch.tensor([0.01, 1.0, 50.0])
    denoised = net(x, sigma)
    assert (through_diffusers(pipeline(net), x, sigma, None) - denoised).abs().max() < 1e-4 * denoised.std()


def built(cls=networks.CMPrecond, channels=32, metadata=None, **kwargs):
    options = dict(boundary=0.002, sigma_max=80.0) if cls is networks.CMPrecond else {}
    net = cls(
        16,
        3,
        **{
            **options,
            **dict(model_channels=channels, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[]),
            **kwargs,
        },
    )
    net.metadata = metadata or {}
    return net


def edm_network(label_dim=0, channels=3, **metadata):
    """A random network of EDM's preconditioning, whose output has about unit variance; ours starts at 0."""
    generator = torch.Generator().manual_seed(0)
    options = dict(model_channels=32, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8])
    net = networks.EDMPrecond(
        16, channels, label_dim, sigma_data=0.4, min_channels_per_group=1, **options
    ).eval()
    for parameter in net.parameters():
        spread = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        torch.nn.init.normal_(parameter, std=spread, generator=generator)
    net.metadata = metadata
    return net


def student(S, kind, **options):
    """A random student and the grid that it would record."""
    sigmas = ops.student_grid(S, 0.002, 80.0, 7.0, kind).tolist()
    return edm_network(**options, S=S, sigmas=sigmas, rho=7.0, student_grid=kind)


def compare_images(pipe, net, classes=None, steps=None, **options):
    """The largest difference between the pipeline's images and ours from the same seeds, in [0, 1]; checks
    that the images are neither flat nor cut off."""
    seeds = range(4)
    made = pipe(
        batch_size=len(seeds),
        class_labels=classes,
        num_inference_steps=steps or len(net.metadata['sigmas']) - 1,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type='pt',
    ).images
    latents = generation.SeededNoise(seeds, 'cpu').randn([net.img_channels, 16, 16])
    labels = None if classes is None else torch.eye(net.label_dim)[classes]
    with torch.no_grad():
        images = samplers.sample(net, latents, labels, steps=steps, **options) / 2 + 0.5
    assert images.std() > 0.03 and ((images > 0) & (images < 1)).double().mean() > 0.9
    return (made - images.clamp(0, 1)).abs().max().item()


@pytest.mark.parametrize('label_dim', [0, 5])
@pytest.mark.parametrize('S', [1, 2, 8])
@pytest.mark.parametrize('kind', ['edm', 'full'])
def test_diffusers_makes_the_images_of_a_student(pipeline, S, kind, label_dim):
    """From one seed per image, as generate.py: our DDIM steps are in FP64, the scheduler's in FP32."""
    net = student(S, kind, label_dim=label_dim)
    pipe = pipeline(net)
    assert type(pipe.scheduler).__module__.startswith('diffusers.'), 'no code in the folder'
    assert pipe.scheduler.init_noise_sigma == pytest.approx(80, rel=1e-12)
    assert compare_images(pipe, net, [1, 0, 4, 4] if label_dim else None) < 1e-6


def test_the_recipes_lines_make_the_images_of_its_command(tmp_path, monkeypatch):
    """As 8-bit images they may differ where a value lies between two levels."""
    pytest.importorskip('diffusers')
    ((code, _),) = blocks(helpers.ROOT / 'docs' / 'recipes.md', 'py')
    save_diffusers(tmp_path / 'student', net := student(8, 'full', label_dim=1000))
    namespace = {}
    monkeypatch.chdir(tmp_path)
    exec(code.replace('cuda', 'cpu'), namespace)
    seeds, choose = range(16), generation.fixed_labels(207)
    expected = generation.generate_latents(net, seeds, choose).mul(127.5).add(128).clip(0, 255).byte()
    made = torch.stack([torch.as_tensor(np.array(image)) for image in namespace['images']])
    difference = (made.permute(0, 3, 1, 2).int() - expected.int()).abs()
    assert difference.max() <= 1 and difference.double().mean() < 1e-3


def test_diffusers_makes_the_images_of_a_grayscale_student_of_another_range(pipeline):
    net = edm_network(channels=1, S=3, rho=5, sigmas=[*ops.karras_sigmas(3, 0.01, 3, 5).tolist(), 0.0])
    assert compare_images(pipeline(net), net) < 1e-6


def test_diffusers_samples_a_teacher_by_eulers_method(pipeline):
    net = edm_network(label_dim=5)
    pipe = pipeline(net)
    for steps in (1, 18):
        assert compare_images(pipe, net, [0, 1, 2, 3], steps=steps, solver='euler') < 1e-6


def test_diffusers_takes_a_consistency_model_of_one_evaluation(pipeline):
    net = edm_network(solver='cm', sigmas=[80.0, 0.0])
    assert compare_images(pipeline(net), net) < 1e-6


def test_the_conversion_says_with_how_many_steps_to_sample(tmp_path, consistency):
    for name, net, words in (
        ('student', student(8, 'full'), 'num_inference_steps=8, the steps that it was trained for'),
        ('teacher', edm_network(), 'any num_inference_steps, which are Euler steps'),
        ('cm', consistency, 'any num_inference_steps.'),
    ):
        save_snapshot(tmp_path / f'{name}.pkl', net, **net.metadata)
        result = invoke('--to=diffusers', tmp_path / f'{name}.pkl', tmp_path / name)
        assert result.exit_code == 0 and words in result.stdout, (result.stdout, result.stderr)


@pytest.mark.parametrize(
    'metadata, words',
    [
        (dict(solver='cm', sigmas=[80.0, 0.821, 0.0]), '2 evaluations of the sampler cm, which adds noise'),
        (dict(solver='ancestral', sigmas=[80.0, 1.0, 0.0]), 'the sampler ancestral'),
        (dict(sigmas=[80.0, 3.2, 0.5, 0.0]), 'the noise levels 80, 3.2, 0.5'),
        (dict(sigmas=[0.9, 0.5, 0.0]), 'sampling from sigma = 0.9'),
        (dict(sigmas=[80.0, 0.0], encoder=dict(class_name='StabilityVAEEncoder')), 'a network of latents'),
        (dict(sigmas=[80.0, 0.0], label_kind='vectors'), 'label vectors'),
        (dict(sigmas=[80.0, 0.0], rho=math.nan), 'rho = nan'),
    ],
    ids=range(7),
)
def test_students_that_diffusers_would_sample_otherwise_are_refused(tmp_path, metadata, words):
    with pytest.raises(UserError, match=re.escape(words)):
        save_diffusers(tmp_path / 'folder', edm_network(label_dim=5, **metadata))
    assert not (tmp_path / 'folder').exists()


@pytest.mark.parametrize(
    'make, words',
    [
        (lambda: built(networks.EDMPrecond, boundary=0.002), "with EDM's time embedding, ln(sigma) / 4"),
        (lambda: built(networks.VPPrecond, model_type='DhariwalUNet'), 'VPPrecond'),
        (lambda: built(boundary=0), "with OpenAI's time embedding, 250 ln(sigma)"),
        (lambda: built(networks.EDMPrecond, model_type='SongUNet'), 'SongUNet'),
        (lambda: built(networks.EDMPrecond, augment_dim=9), 'augmentation labels'),
        (lambda: built(sigma_max=float('inf')), 'noise levels from 0.002 to inf'),
        (lambda: built(boundary=90.0), 'noise levels from 90 to 80'),
        (lambda: built(model_type='SongUNet'), 'SongUNet'),
        (lambda: built(augment_dim=9), 'augmentation labels'),
        (lambda: built(channel_mult=[2, 2]), '2 times as wide'),
        (lambda: built(channel_mult=[1, 2, 3], attn_resolutions=[8]), 'attention heads of 64 or 96 channels'),
        (lambda: built(), 'normalization in 8 or 16 or 24 or 32 groups'),
    ],
    ids=range(12),
)
def test_what_diffusers_cannot_express_is_refused_by_name(tmp_path, make, words):
    save_snapshot(tmp_path / 'net.pkl', make())
    assert_one_clear_error(invoke('--to=diffusers', tmp_path / 'net.pkl', tmp_path / 'folder'), words)
    assert [path.name for path in tmp_path.iterdir()] == ['net.pkl']


@pytest.mark.parametrize(
    'metadata, words',
    [
        (dict(rho='7'), "rho = '7'"),
        (dict(rho=math.inf), 'rho = inf'),
        (dict(num_timesteps=1), 'timesteps 1'),
        (dict(num_timesteps=40.0), 'timesteps 40.0'),
    ],
)
def test_a_scheduler_that_could_not_be_is_refused(tmp_path, metadata, words):
    with pytest.raises(UserError, match=words):
        save_diffusers(tmp_path / 'folder', built(metadata=metadata, min_channels_per_group=1))
    with pytest.raises(UserError, match='sigma_data = nan'):
        save_diffusers(tmp_path / 'folder', built(sigma_data=math.nan, min_channels_per_group=1))
    assert not (tmp_path / 'folder').exists()


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, consistency, monkeypatch):
    (tmp_path / 'taken').mkdir()
    (tmp_path / 'taken' / 'notes').touch()
    with pytest.raises(UserError, match='taken exists already'):
        save_diffusers(tmp_path / 'taken', consistency)
    with pytest.raises(UserError, match='nowhere'):
        save_diffusers(tmp_path / 'nowhere' / 'folder', consistency)
    monkeypatch.setattr('safetensors.torch.save', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_diffusers(tmp_path / 'folder', consistency)
    assert [path.name for path in tmp_path.rglob('*')] == ['taken', 'notes']


# ----------------------------------------------------------------------------
# The command line.


def test_info_says_what_is_in_every_kind_of_file(fixtures, tmp_path, consistency):
    def facts(path):
        result = invoke('info', path, '--json')
        assert result.exit_code == 0, result.stderr
        return json.loads(
            result.stdout, parse_constant=lambda constant: pytest.fail(f'{constant} is not JSON')
        )

    student = facts(fixtures / 'published-student.pkl')
    assert (
        student['preconditioning'] == 'EDMPrecond'
        and student['architecture'] == 'DhariwalUNet'
        and student['format'] == 'snapshot'
    )
    assert (
        student['resolution'],
        student['channels'],
        student['labels'],
        student['objective'],
        student['kimg'],
    ) == (16, 3, 10, 'mcd', None)
    assert (
        student['arguments']['dout_resolutions'] == [8]
        and student['parameters'] == 192_435
        and len(student['grid']) == 9
    )
    assert student['metadata']['S'] == 8 and student['sigma_max'] == 'inf'

    raw = facts(fixtures / 'openai-cm-cond.pt')
    assert (raw['format'], raw['preconditioning'], raw['objective'], raw['labels']) == (
        'openai',
        'CMPrecond',
        None,
        10,
    )
    assert raw['assumed'] == dict(resolution=16, channels_per_head=64, attention_order='qkv-first')
    edm2 = facts(fixtures / 'edm2-cond.pkl')
    assert (edm2['preconditioning'], edm2['architecture'], edm2['labels'], edm2['objective']) == (
        'Precond',
        'UNet',
        10,
        'diffusion',
    )

    save_snapshot(tmp_path / 'net.pkl', consistency, **consistency.metadata, kimg=2.5)
    save_safetensors(tmp_path / 'net.safetensors', load_network(tmp_path / 'net.pkl'))
    kept = [facts(tmp_path / name) for name in ('net.pkl', 'net.safetensors')]
    assert (
        [fact['format'] for fact in kept] == ['snapshot', 'safetensors']
        and kept[0]['kimg'] == 2.5
        and kept[0]['grid'] == [80, 0]
    )
    assert {**kept[0], 'file': 0, 'format': 0} == {**kept[1], 'file': 0, 'format': 0}


def test_info_of_weights_whose_heads_cannot_be_of_64_says_what_it_assumes(tmp_path):
    published(tmp_path / 'net.pt', **WIDER)
    facts = json.loads(invoke('info', tmp_path / 'net.pt', '--json').stdout)
    assert facts['assumed'] == dict(resolution=32, channels_per_head=32, attention_order='qkv-first')


def test_info_of_a_run_says_where_it_stands_and_which_average_a_snapshot_is(run_folder):
    def facts(names):
        return json.loads(
            invoke('info', max(names, key=lambda path: path.stat().st_mtime_ns), '--json').stdout
        )

    snapshots, averages = (set(run_folder.glob(f'network-snapshot-*{end}.pkl')) for end in ('', '-0.050'))
    state, average, snapshot = map(
        facts, (run_folder.glob('training-state-*.pt'), averages, snapshots - averages)
    )
    assert (state['format'], state['tick'], state['averages']) == (
        'training state',
        2,
        ['ema', 'phema-0.050'],
    )
    assert state['options']['loss']['T_end'] == 4 and state['options']['batch_size'] == 16
    assert (average['metadata']['ema'], average['metadata']['ema_std'], snapshot['metadata']['ema']) == (
        'phema-0.050',
        0.05,
        'ema',
    )
    for name in (
        'preconditioning',
        'arguments',
        'parameters',
        'resolution',
        'labels',
        'objective',
        'grid',
        'kimg',
    ):
        assert state[name] == snapshot[name] == average[name], name
    assert state['kimg'] == 0.032 and state['objective'] == 'mcd' and len(state['grid']) == 3
    text = invoke('info', state['file']).stdout
    assert 'training state' in text and 'phema-0.050' in text and 'kimg             0.032' in text


def test_a_state_that_is_damaged_or_of_another_program_is_named(run_folder, tmp_path):
    state = max(run_folder.glob('training-state-*.pt'))
    for name, content in (
        ('odd', dict(options='{}')),
        ('empty', {}),
        ('list', [1]),
        ('text', dict(options='{')),
    ):
        save_state(tmp_path / f'{name}.pt', content)
        assert_one_clear_error(invoke('info', tmp_path / f'{name}.pt'), f'{name}.pt', 'not a training state')
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / 'damaged.pt').write_bytes(data)
    assert_one_clear_error(invoke('info', tmp_path / 'damaged.pt'), 'damaged.pt', 'checksum')
    assert_one_clear_error(invoke(state, tmp_path / 'net.pkl'), 'is a training state', 'network-snapshot')
    assert_one_clear_error(invoke('--from=openai', state, tmp_path / 'net.pkl'), 'there is net, ')


def test_checkpoints_are_read_from_urls_with_their_digest(fixtures, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, 'DEFAULT_CACHE_DIR', tmp_path / 'cache')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(fixtures))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, 'log_message', lambda *_: None)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01)).start()
        url = f'http://127.0.0.1:{server.server_port}/openai-cm-cond.pt'
        digest = downloads.file_sha256(fixtures / 'openai-cm-cond.pt')
        assert_one_clear_error(invoke('info', f'{url}#sha256={"0" * 64}'), url, digest)
        assert json.loads(invoke('info', '--json', f'{url}#sha256={digest}').stdout)['format'] == 'openai'
        server.shutdown()
    assert invoke('--from=openai', url, tmp_path / 'net.pkl').exit_code == 0, 'it is in the cache'
    assert_one_clear_error(invoke('info', 's3://bucket/net.pkl'), 's3: is not supported')


def test_info_as_text_has_a_line_for_every_fact(fixtures):
    text = invoke('info', fixtures / 'edm-ddpmpp-uncond-augment.pkl').stdout
    facts = json.loads(invoke('info', fixtures / 'edm-ddpmpp-uncond-augment.pkl', '--json').stdout)
    assert all(any(line.startswith(name) for line in text.splitlines()) for name in facts)
    assert 'SongUNet' in text and f'{facts["parameters"]:,}' in text and facts['augment_labels'] == 9


def test_a_rewritten_snapshot_keeps_the_network_and_sheds_the_rest(fixtures, tmp_path):
    """A published student's loss holds its teacher, twice."""
    assert invoke(fixtures / 'published-student.pkl', tmp_path / 'net.pkl').exit_code == 0
    assert_same_network(load_network(fixtures / 'published-student.pkl'), load_network(tmp_path / 'net.pkl'))
    assert (tmp_path / 'net.pkl').stat().st_size < 0.6 * (fixtures / 'published-student.pkl').stat().st_size


@pytest.mark.parametrize(
    'arguments, words',
    [
        ('--kind=edm a b', '--kind: only for --from=openai'),
        ('--heads=2 --attention-order=qkv-first a b', '--heads, --attention-order: only for --from=openai'),
        ('--from=openai --heads=2 --channels-per-head=2 a b', 'exclude each other'),
        ('--from=openai --kind=edm --timesteps=40 a b', '--timesteps is for consistency models'),
        ('--timesteps=40 a b', '--timesteps is for consistency models'),
        ('--from=nonsense a b', 'nonsense'),
        ('', 'SRC'),
        ('a', 'DST'),
        ('a b c', 'extra argument'),
        ('info', 'FILE'),
        ('info --from=openai a', '--from'),
    ],
)
def test_wrong_usage_names_the_program_as_people_call_it(arguments, words):
    result = invoke(*arguments.split())
    assert_one_clear_error(result, words, status=2)
    command = 'convert.py info' if 'info' in arguments else 'convert.py'
    assert (
        result.stderr.startswith(f'Usage: {command} [OPTIONS]') and f"Try '{command} --help'" in result.stderr
    )


def test_wrong_use_is_told_from_wrong_files(fixtures, tmp_path, source):
    save_safetensors(tmp_path / 'net.safetensors', load_openai(source[0]))
    assert_one_clear_error(
        invoke(tmp_path / 'net.safetensors', tmp_path / 'net.pkl'),
        'is a safetensors, not a snapshot',
        '--from=safetensors',
    )
    assert_one_clear_error(
        invoke('--from=safetensors', fixtures / 'edm2-cond.pkl', tmp_path / 'net.pkl'), '--from=snapshot'
    )
    assert_one_clear_error(
        invoke(source[0], tmp_path / 'net.pkl'), 'weights.pt is a PyTorch file', '--from=openai'
    )
    assert_one_clear_error(
        invoke('info', '--key=ema', fixtures / 'edm2-cond.pkl'), 'is a snapshot: leave it out'
    )
    assert_one_clear_error(invoke('info', tmp_path / 'nothing.pkl'), 'nothing.pkl does not exist')
    assert_one_clear_error(invoke('--from=openai', source[0], tmp_path / 'nowhere' / 'net.pkl'), 'nowhere')
    net = built()
    save_snapshot(tmp_path / 'odd.pkl', net)
    data = pickle.loads((tmp_path / 'odd.pkl').read_bytes())
    data['metadata'] = dict(path='x')
    (tmp_path / 'odd.pkl').write_bytes(pickle.dumps(data))
    assert_one_clear_error(invoke(tmp_path / 'odd.pkl', tmp_path / 'net.pkl'), 'entries named path')
    assert not (tmp_path / 'net.pkl').exists()


@pytest.mark.parametrize('arguments', ['--help', '-h', '--from=openai --help', 'info --help'])
def test_the_help_describes_everything_in_80_columns(arguments):
    widths = dict(terminal_width=80, max_content_width=80)
    done = CliRunner().invoke(convert.main, arguments.split(), prog_name='convert.py', **widths)
    lines = done.stdout.splitlines()
    assert done.exit_code == 0 and lines, (done.exception, done.output)
    assert max(map(len, lines)) <= 80 and lines[0].startswith('Usage: convert.py')
    described = (
        ['  FILE  ']
        if 'info' in arguments
        else ['  SRC  ', '  DST  ', '       convert.py info [OPTIONS] FILE']
    )
    assert all(any(line.startswith(words) for line in lines) for words in described), lines
    assert lines.count('Arguments:') == 1 and not any('ositional' in line for line in lines)


def test_the_script_runs(source, tmp_path):
    assert 'objective cm' in run('convert.py', '--from=openai', source[0], tmp_path / 'net.pkl').stdout
