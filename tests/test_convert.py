"""convert.py: OpenAI's weights in, safetensors both ways, diffusers out, and what is in a file."""
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import FAST, assert_one_clear_error, run
from openai_unet import random_weights, unet, unet_shapes
from safetensors.torch import load_file, save_file
from test_persistence import STAND_IN

import convert
import train
from dnnlib import UserError
from training import networks, samplers
from training.checkpoint import load_network, save_snapshot
from training.interchange.diffusers import save_diffusers
from training.interchange.openai import build_network, infer_layout, load_openai, parameter_names
from training.interchange.safetensors import from_json, load_safetensors, save_safetensors, to_json

SMALL = dict(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels={1}, scale_shift=True)
DEEP = dict(model_channels=64, channel_mult=(1, 1, 2), num_res_blocks=2, attention_levels={1, 2}, scale_shift=False, image_channels=1)


def invoke(*arguments):
    return CliRunner().invoke(convert.main, list(map(str, arguments)), prog_name='convert.py')


def golden(fixtures, name):
    return {key: torch.as_tensor(value) for key, value in np.load(fixtures / f'{name}.npz').items() if value.dtype.kind != 'U'}


def published(path, **config):
    """A file such as OpenAI's, of random weights."""
    weights = random_weights(unet_shapes(**{**SMALL, **config}))
    torch.save(weights, path)
    return weights


def assert_same_network(a, b):
    """Every tensor bit for bit; class, constructor arguments with their types, numeric attributes, metadata."""
    assert type(a) is type(b) and repr((a.init_args, a.init_kwargs)) == repr((b.init_args, b.init_kwargs))
    numbers = lambda net: {name: value for name, value in vars(net).items() if isinstance(value, (int, float)) and not name.startswith('_')}
    assert numbers(a) == numbers(b)
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name
    drop = lambda net: repr(sorted((name, value) for name, value in net.metadata.items() if name != 'digest'))  # repr: NaN equals NaN
    assert drop(a) == drop(b)


@pytest.fixture
def source(tmp_path):
    """A small file such as OpenAI's, and its bytes."""
    published(tmp_path / 'weights.pt', num_classes=3)
    return tmp_path / 'weights.pt', (tmp_path / 'weights.pt').read_bytes()


@pytest.fixture(scope='session')
def consistency(fixtures):
    return load_openai(fixtures / 'openai-cm-cond.pt')

#----------------------------------------------------------------------------
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
    latents, labels = torch.as_tensor(family['openai.noises'])[0], torch.eye(10)[torch.as_tensor(family['openai.labels'])]
    with torch.no_grad():
        images = samplers.sample(consistency, latents, labels).clamp(-1, 1)
    assert np.abs(images.numpy() - family['openai.onestep']).max() < 1e-4 * family['openai.onestep'].std()


@pytest.mark.parametrize('config', [SMALL, DEEP, {**DEEP, 'num_classes': 4, 'scale_shift': True}], ids=['small', 'deep', 'deep conditional'])
def test_networks_of_other_shapes_compute_what_openais_would(tmp_path, config):
    """LSUN's kind adds the embedding before the norm, has no labels, and several blocks and levels without attention."""
    weights = published(tmp_path / 'net.pt', **config)
    net = load_openai(tmp_path / 'net.pt', kind='edm')
    n, size = 3, 8 << (len(config['channel_mult']) - 1)
    assert net.img_resolution == size and net.label_dim == config.get('num_classes', 0)
    x, sigma, labels = torch.randn(n, net.img_channels, size, size), torch.tensor([0.01, 1.0, 50.0]), torch.arange(n) % 4
    noise, total = sigma[:, None, None, None], (sigma ** 2 + 0.25)[:, None, None, None]
    raw = unet(weights, config['num_res_blocks'], x / total.sqrt(), 250 * sigma.log(), labels if net.label_dim else None)
    expected = 0.25 / total * x + 0.5 * noise / total.sqrt() * raw
    denoised = net(x, sigma, torch.eye(4)[labels] if net.label_dim else None)
    assert (denoised - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize('config, resolution, attention, millions', [
    (dict(model_channels=192, channel_mult=(1, 2, 3, 4), num_res_blocks=3, attention_levels={1, 2, 3}, scale_shift=True, num_classes=1000),
     64, [32, 16, 8], 295.9),
    (dict(model_channels=256, channel_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=2, attention_levels={3, 4, 5}, scale_shift=False),
     256, [32, 16, 8], 526.5),
], ids=['ImageNet-64', 'LSUN-256'])
def test_the_published_layouts_are_recognised_from_their_shapes(config, resolution, attention, millions):
    shapes = unet_shapes(**config)
    net = build_network(infer_layout(shapes), 'consistency', None)
    assert (net.img_resolution, net.label_dim) == (resolution, config.get('num_classes', 0))
    assert net.init_kwargs['attn_resolutions'] == attention and net.init_kwargs['channel_mult'] == list(config['channel_mult'])
    assert net.init_kwargs['num_blocks'] == config['num_res_blocks'] and net.init_kwargs['adaptive_scale'] == config['scale_shift']
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
    torch.save({name: tensor.half() for name, tensor in torch.load(source[0], weights_only=True).items()}, tmp_path / 'half.pt')
    net = load_openai(tmp_path / 'half.pt')
    assert all(parameter.dtype == torch.float16 for parameter in net.parameters())
    difference = net(torch.ones(1, 3, 16, 16), 1.0) - load_openai(source[0])(torch.ones(1, 3, 16, 16), 1.0)
    assert 0 < difference.abs().max() < 0.01


def test_a_student_is_distilled_from_a_converted_teacher(tmp_path, digits):
    published(tmp_path / 'edm.pt', num_classes=10, image_channels=1)
    invoke('--from=openai', '--kind=edm', '--resolution=8', tmp_path / 'edm.pt', tmp_path / 'teacher.pkl')
    run('train.py', f'--outdir={tmp_path / "run"}', f'--data={digits}', '--cond=1', '--consistency=True', f'--teacher={tmp_path / "teacher.pkl"}',
        *FAST, '--batch=16', '--duration=0.000032', '--S=2', '--T_start=4', '--T_end=4', '--dump=0')
    student = load_network(max((tmp_path / 'run').glob('network-snapshot-*.pkl')))
    assert isinstance(student, networks.CMPrecond) and student.metadata['objective'] == 'mcd' and student.boundary == 0


def test_a_consistency_model_is_no_teacher(source, tmp_path, digits):
    invoke('--from=openai', source[0], tmp_path / 'cm.pkl')
    arguments = [f'--outdir={tmp_path}', f'--data={digits}', '--consistency=True', f'--teacher={tmp_path / "cm.pkl"}', '--dry-run']
    assert_one_clear_error(CliRunner().invoke(train.main, arguments, prog_name='train.py'), 'student of 1 steps')


def test_stock_edm_loads_a_converted_network(fixtures, tmp_path, consistency):
    """In a process of its own, with a stand-in for EDM's `torch_utils.persistence` and nothing of ours."""
    (tmp_path / 'torch_utils').mkdir()
    (tmp_path / 'torch_utils' / '__init__.py').touch()
    (tmp_path / 'torch_utils' / 'persistence.py').write_text(STAND_IN)
    (tmp_path / 'script.py').write_text(
        'import pickle, sys, numpy as np, torch\n'
        'given = {name: torch.as_tensor(value) for name, value in np.load(sys.argv[1]).items() if value.dtype.kind != "U"}\n'
        'net = pickle.load(open("net.pkl", "rb"))["ema"]\n'
        'assert "training" not in sys.modules and "training.networks" not in sys.modules\n'
        'np.save("out.npy", net(given["x"], given["sigma"], given["class_labels"]).numpy())\n')
    save_snapshot(tmp_path / 'net.pkl', consistency, **consistency.metadata)
    subprocess.run([sys.executable, 'script.py', fixtures / 'openai-cm-cond.npz'], cwd=tmp_path, check=True, timeout=120,
                   env={**os.environ, 'PYTHONPATH': str(tmp_path)})
    expected = golden(fixtures, 'openai-cm-cond')['D_consistency']
    assert np.abs(np.load(tmp_path / 'out.npy') - expected.numpy()).max() < 1e-4 * expected.std()

#----------------------------------------------------------------------------
# Files that are none of OpenAI's, or damaged, or hostile.

def edited(**changes):
    """Weights with some tensors replaced, or left out where the replacement is None."""
    weights = random_weights(unet_shapes(**SMALL)) | {name.replace('__', '.'): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in weights.items() if tensor is not None}


@pytest.mark.parametrize('content, words', [
    ({'weight': torch.zeros(2, 2)}, 'time_embed.0.weight'),
    ({}, 'state dict'),
    ([torch.zeros(1)], 'state dict'),
    ({'net': {'weight': torch.zeros(1)}}, 'state dict'),
    (edited(out__0__bias=None), 'lacks tensors: out.0.bias'),
    (edited(extra=torch.zeros(1)), 'unexpected tensors: extra'),
    (edited(out__2__bias=torch.zeros(6), out__2__weight=torch.zeros(6, 32, 3, 3)), 'out.2.weight in the place of'),
    (edited(middle_block__1__qkv__weight=torch.zeros(192, 64, 1)), 'middle_block.1.qkv.weight in the place of'),
    (edited(time_embed__0__weight=torch.zeros(0, 0)), 'time_embed.0.weight'),
    (edited(time_embed__0__weight=torch.zeros(128, 128)), 'not multiples of 128'),
    (edited(input_blocks__2__0__op__weight=torch.zeros(32, 32, 3, 3)), 'resamples by a convolution (input_blocks.2.0.op.weight)'),
    (edited(output_blocks__1__2__in_layers__2__weight=None), 'cannot be converted'),
    (edited(output_blocks__3__0__in_layers__2__weight=None), '3 blocks in its decoder, of which 1 upsample'),
    (edited(out__0__bias=torch.zeros(32).to_sparse()), 'state dict'),
    (edited(out__0__bias=torch.zeros(32, dtype=torch.int64)), 'state dict'),
    (edited(time_embed__0__weight=torch.zeros(1).expand(1 << 20, 1 << 20)), 'share memory'),
    (random_weights(unet_shapes(**{**SMALL, 'model_channels': 16})), 'not multiples of 16 and 32'),
    (random_weights(unet_shapes(**{**SMALL, 'channel_mult': (1, 3)})), 'heads of 64 do not divide'),
], ids=range(18))
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


def test_a_compressed_archive_is_not_unpacked(tmp_path, source):
    """Ten megabytes of zeros in ten kilobytes, as a stand-in for more."""
    with zipfile.ZipFile(tmp_path / 'bomb.pt', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', bytes(10_000_000))
    with pytest.raises(UserError, match='compressed'):
        load_openai(tmp_path / 'bomb.pt')


def damages(data, count):
    draw = random.Random(0)
    for position in draw.sample(range(len(data)), count):
        yield data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1:]
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

#----------------------------------------------------------------------------
# safetensors.

SNAPSHOTS = ['edm-adm-cond', 'edm-ddpmpp-uncond-augment', 've-ncsnpp-uncond', 'vp-ddpmpp-cond', 'iddpm-adm-cond', 'published-student']


@pytest.mark.parametrize('name', SNAPSHOTS)
def test_snapshots_of_others_survive_safetensors_exactly(fixtures, tmp_path, name):
    for arguments in ([f'--to=safetensors {fixtures / name}.pkl {tmp_path}/net.safetensors'],
                      [f'--from=safetensors {tmp_path}/net.safetensors {tmp_path}/net.pkl']):
        assert invoke(*arguments[0].split()).exit_code == 0
    first, again = load_network(fixtures / f'{name}.pkl'), load_network(tmp_path / 'net.pkl')
    assert_same_network(first, again)
    assert load_safetensors(tmp_path / 'net.safetensors').metadata['digest'] == again.metadata['digest']
    given = golden(fixtures, name)
    augment = {key: given[key] for key in ['augment_labels'] if key in given}
    assert torch.equal(first(given['x'], given['sigma'], given.get('class_labels'), **augment),
                       again(given['x'], given['sigma'], given.get('class_labels'), **augment))


@pytest.fixture
def awkward(tmp_path):
    """A network with all that JSON does not have: tuples, infinities, NaN, tags that mean themselves, FP16, attributes set later."""
    torch.manual_seed(0)
    net = networks.EDMPrecond(8, 1, label_dim=3, model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(), dropout=0.5)
    net.half().sigma_min, net.use_fp16 = 0.25, True
    net.metadata = dict(objective='mcd', sigmas=[80.0, 0.1, 0.0], fid=float('nan'), best=(1, -float('inf')), odd={'$tuple': [1]}, odder={'$x': {}},
                        none=None, empty={}, dataset_kwargs={'path': 'π.zip'})
    save_safetensors(tmp_path / 'net.safetensors', net.eval().requires_grad_(False))
    return net, tmp_path / 'net.safetensors'


def test_what_json_cannot_say_is_kept(awkward):
    net, path = awkward
    loaded = load_safetensors(path)
    assert_same_network(net, loaded)
    assert loaded.init_kwargs['channel_mult'] == (1, 2) and loaded.sigma_max == float('inf') and not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_the_configuration_is_strict_json_in_the_files_header(awkward):
    _, path = awkward
    data = path.read_bytes()
    header = json.loads(data[8:8 + struct.unpack('<Q', data[:8])[0]])

    def refuse(constant):
        raise ValueError(constant)
    config = json.loads(header['__metadata__']['config'], parse_constant=refuse)
    assert config['class_name'] == 'EDMPrecond' and config['kwargs']['model_channels'] == 16 and config['metadata']['objective'] == 'mcd'
    assert set(load_file(path)) == set(header) - {'__metadata__'} == set(awkward[0].state_dict())


@pytest.mark.parametrize('value', [1, 'x', None, (1, (2, [3])), {'$float': 1}, {'$dict': {'$tuple': ()}}, {'a': {'$x': 1, 'b': 2}}, float('-inf')])
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


@pytest.mark.parametrize('config, words', [
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
], ids=range(12))
def test_foreign_and_hostile_safetensors_are_refused_by_name(awkward, config, words):
    _, path = awkward
    if isinstance(config, dict):
        data = path.read_bytes()
        own = json.loads(json.loads(data[8:8 + struct.unpack('<Q', data[:8])[0]])['__metadata__']['config'])
        config = json.dumps({**own, **config})
    save_file(load_file(path), path, None if config is None else dict(config=config))
    result = invoke('--from=safetensors', path, path.with_suffix('.pkl'))
    assert_one_clear_error(result, 'net.safetensors', words)
    assert not path.with_suffix('.pkl').exists()


@pytest.mark.parametrize('data', [b'', b'\xff' * 8, struct.pack('<Q', 1 << 40) + b'{}', struct.pack('<Q', 2) + b'{}', b'{' * 100])
def test_what_is_no_safetensors_file_is_refused(tmp_path, data):
    (tmp_path / 'x.safetensors').write_bytes(data)
    with pytest.raises(UserError, match=r'x\.safetensors'):
        load_safetensors(tmp_path / 'x.safetensors')

#----------------------------------------------------------------------------
# diffusers.

@pytest.fixture
def pipeline(tmp_path):
    """A function that writes a network as a folder and loads diffusers' pipeline from it."""
    diffusers = pytest.importorskip('diffusers')

    def load(net):
        save_diffusers(tmp_path / 'folder', net)
        pipe = diffusers.ConsistencyModelPipeline.from_pretrained(tmp_path / 'folder')
        pipe.set_progress_bar_config(disable=True)
        return pipe
    return load


def through_diffusers(pipe, x, sigma, labels):
    """D(x; sigma) by the pipeline's own network and scheduler."""
    noise = sigma[:, None, None, None]
    c_skip, c_out = pipe.scheduler.get_scalings_for_boundary_condition(noise)
    times = torch.as_tensor(pipe.scheduler.sigma_to_t(sigma.numpy()))
    with torch.no_grad():
        return c_skip * x + c_out * pipe.unet(x / (noise ** 2 + pipe.scheduler.config.sigma_data ** 2).sqrt(), times, class_labels=labels).sample


def test_diffusers_gives_the_golden_output_of_a_converted_model(fixtures, pipeline, consistency, family):
    pipe, given = pipeline(consistency), golden(fixtures, 'openai-cm-cond')
    denoised = through_diffusers(pipe, given['x'], given['sigma'], given['class_labels'].argmax(1))
    assert (denoised - given['D_consistency']).abs().max() < 1e-4 * given['D_consistency'].std()
    latents, labels = torch.as_tensor(family['openai.noises'])[0], torch.as_tensor(family['openai.labels'])
    images = pipe(batch_size=4, num_inference_steps=1, latents=latents, class_labels=labels, output_type='pt').images * 2 - 1
    assert np.abs(images.numpy() - family['openai.onestep']).max() < 1e-4 * family['openai.onestep'].std()


@pytest.mark.parametrize('config', [DEEP, {**DEEP, 'attention_levels': set(), 'scale_shift': True}], ids=['additive', 'attention in the middle'])
def test_diffusers_agrees_on_other_layouts(tmp_path, pipeline, config):
    published(tmp_path / 'net.pt', **config)
    net = load_openai(tmp_path / 'net.pt')
    x, sigma = torch.randn(3, 1, 32, 32), torch.tensor([0.01, 1.0, 50.0])
    denoised = net(x, sigma)
    assert (through_diffusers(pipeline(net), x, sigma, None) - denoised).abs().max() < 1e-4 * denoised.std()


def built(cls=networks.CMPrecond, channels=32, **kwargs):
    options = dict(boundary=0.002, sigma_max=80.0) if cls is networks.CMPrecond else {}
    net = cls(16, 3, **{**options, **dict(model_channels=channels, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[]), **kwargs})
    net.metadata = {}
    return net


@pytest.mark.parametrize('make, words', [
    (lambda: built(networks.EDMPrecond), "EDM's time embedding, ln(sigma) / 4"),
    (lambda: built(networks.VPPrecond, model_type='DhariwalUNet'), 'VPPrecond'),
    (lambda: built(boundary=0), 'diffusion model'),
    (lambda: built(sigma_max=float('inf')), 'upper end'),
    (lambda: built(model_type='SongUNet'), 'SongUNet'),
    (lambda: built(augment_dim=9), 'augmentation labels'),
    (lambda: built(channel_mult=[2, 2]), '2 times as wide'),
    (lambda: built(channel_mult=[1, 3]), 'attention over 96 channels'),
    (lambda: built(), 'normalisation in 8 or 16 or 24 or 32 groups'),
], ids=range(9))
def test_what_diffusers_cannot_express_is_refused_by_name(tmp_path, make, words):
    save_snapshot(tmp_path / 'net.pkl', make())
    assert_one_clear_error(invoke('--to=diffusers', tmp_path / 'net.pkl', tmp_path / 'folder'), words)
    assert [path.name for path in tmp_path.iterdir()] == ['net.pkl']


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

#----------------------------------------------------------------------------
# The command line.

def test_info_says_what_is_in_every_kind_of_file(fixtures, tmp_path, consistency):
    def facts(path):
        result = invoke('info', path, '--json')
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout, parse_constant=lambda constant: pytest.fail(f'{constant} is not JSON'))

    student = facts(fixtures / 'published-student.pkl')
    assert student['preconditioning'] == 'EDMPrecond' and student['architecture'] == 'DhariwalUNet' and student['format'] == 'snapshot'
    assert (student['resolution'], student['channels'], student['labels'], student['objective'], student['kimg']) == (16, 3, 10, 'mcd', None)
    assert student['arguments']['dout_resolutions'] == [8] and student['parameters'] == 192_435 and len(student['grid']) == 9
    assert student['metadata']['S'] == 8 and student['sigma_max'] == 'inf'

    raw = facts(fixtures / 'openai-cm-cond.pt')
    assert (raw['format'], raw['preconditioning'], raw['objective'], raw['labels']) == ('openai', 'CMPrecond', None, 10)

    save_snapshot(tmp_path / 'net.pkl', consistency, **consistency.metadata, kimg=2.5)
    save_safetensors(tmp_path / 'net.safetensors', load_network(tmp_path / 'net.pkl'))
    kept = [facts(tmp_path / name) for name in ('net.pkl', 'net.safetensors')]
    assert [fact['format'] for fact in kept] == ['snapshot', 'safetensors'] and kept[0]['kimg'] == 2.5 and kept[0]['grid'] == [80, 0]
    assert {**kept[0], 'file': 0, 'format': 0} == {**kept[1], 'file': 0, 'format': 0}


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


def test_wrong_use_is_told_from_wrong_files(tmp_path, source):
    assert_one_clear_error(invoke('--kind=edm', source[0], tmp_path / 'net.pkl'), '--from=openai', status=2)
    assert_one_clear_error(invoke('--from=nonsense', source[0], tmp_path / 'net.pkl'), 'nonsense', status=2)
    assert_one_clear_error(invoke(source[0]), 'DST', status=2)
    assert_one_clear_error(invoke('info'), 'FILE', status=2)
    assert_one_clear_error(invoke(source[0], tmp_path / 'net.pkl'), 'weights.pt')
    assert_one_clear_error(invoke('info', tmp_path / 'nothing.pkl'), 'nothing.pkl does not exist')
    assert_one_clear_error(invoke('--from=openai', source[0], tmp_path / 'nowhere' / 'net.pkl'), 'nowhere')
    net = built()
    save_snapshot(tmp_path / 'odd.pkl', net)
    data = pickle.loads((tmp_path / 'odd.pkl').read_bytes())
    data['metadata'] = dict(path='x')
    (tmp_path / 'odd.pkl').write_bytes(pickle.dumps(data))
    assert_one_clear_error(invoke(tmp_path / 'odd.pkl', tmp_path / 'net.pkl'), 'entries named path')
    assert not (tmp_path / 'net.pkl').exists()


def test_the_script_runs_and_its_help_shows_both_uses(source, tmp_path):
    result = run('convert.py', '--help')
    assert all(word in result.stdout for word in ('--from', '--to', '--kind', 'info', 'SRC DST', "OpenAI's"))
    assert 'objective cm' in run('convert.py', '--from=openai', source[0], tmp_path / 'net.pkl').stdout
