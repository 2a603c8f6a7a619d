"""training/networks/encoders.py: the affine map and its inverse, noise by sample, records, and what a snapshot's `encoder` entry may do."""

import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import FAST, TINY_NETWORK, assert_one_clear_error, run
from latents import DEVIATIONS, npy, random_latents, save_latent_network, save_vae, use_stand_in

from data.label_space import LabelSpace
from dnnlib import UserError
from torch_utils import persistence
from training import command_line
from training.checkpoint import load_network, save_snapshot
from training.networks import EDMPrecond, encoders
from training.networks.encoders import StabilityVAEEncoder, StandardRGBEncoder
from training.rng import SampleRng
from training.starting_point import check_teacher

RAW_MEAN, RAW_STD = [5.81, 3.25, 0.12, -2.15], [4.17, 4.62, 3.71, 3.28]  # EDM2's, of ImageNet-512


def column(values):
    return np.array(values).reshape(1, 4, 1, 1)


# ----------------------------------------------------------------------------
# Pixels.


def test_pixels_are_mapped_to_minus_one_to_one_and_rounded_back_as_edm_does_it():
    encoder, levels = StandardRGBEncoder(), torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert encoder.noise_shape((3, 16, 16)) is None and encoder.encode_pixels(levels) is levels
    assert torch.equal(encoder.encode_latents(levels), levels.to(torch.float32) / 127.5 - 1)
    assert torch.equal(encoder.decode(encoder.encode_latents(levels)), levels)
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).reshape(5, 1, 1, 1)
    assert encoder.decode(values).flatten().tolist() == [0, 0, 128, 255, 255]


def test_pixels_are_decoded_in_the_precision_of_the_sampler():
    """1e-9 below the edge of a level in FP64; in FP32 it would be the next level."""
    value = torch.tensor((200 - 1e-9 - 128) / 127.5, dtype=torch.float64)
    assert StandardRGBEncoder().decode(value) == 199 and StandardRGBEncoder().decode(value.float()) == 200


# ----------------------------------------------------------------------------
# Latents.


def test_latents_are_drawn_and_brought_to_the_wanted_statistics():
    """(mean + std noise - raw_mean) / raw_std * final_std + final_mean, to float32's 1e-6; by default to mean 0 and deviation 0.5."""
    raw, noise = random_latents(3), random_latents(3, channels=4, seed=1)
    for options, final_mean, final_std in [
        ({}, 0, 0.5),
        (dict(final_mean=2, final_std=0.25), 2, 0.25),
        (dict(final_mean=[0, 1, 2, 3], final_std=[1, 2, 3, 4]), column([0, 1, 2, 3]), column([1, 2, 3, 4])),
    ]:
        final = StabilityVAEEncoder(**options).encode_latents(torch.from_numpy(raw), torch.from_numpy(noise))
        expected = (raw[:, :4] + raw[:, 4:] * noise - column(RAW_MEAN)) / column(
            RAW_STD
        ) * final_std + final_mean
        assert final.dtype == torch.float32 and final.shape == (3, 4, 4, 4)
        np.testing.assert_allclose(final, expected, rtol=1e-5, atol=2e-6)


def test_stored_half_precision_is_computed_in_single():
    raw, noise = torch.from_numpy(random_latents(2)).half(), torch.zeros(2, 4, 4, 4)
    encoder = StabilityVAEEncoder()
    assert torch.equal(encoder.encode_latents(raw, noise), encoder.encode_latents(raw.float(), noise))


def test_a_sample_gets_the_same_latents_however_the_batch_is_split():
    """The noise belongs to its place in the stream; the map itself is a function of (raw, noise) alone."""
    encoder, raw = StabilityVAEEncoder(), torch.from_numpy(random_latents(48))
    encode = lambda first, count: encoder.encode_latents(
        raw[first : first + count],
        SampleRng(3, 100 + first, count).normal('latents', encoder.noise_shape(raw.shape[1:])),
    )
    whole = encode(0, 48)
    assert torch.equal(torch.cat([encode(0, 7), encode(7, 9), encode(16, 32)]), whole)
    assert torch.equal(encode(0, 48), whole)
    spread = (whole - encoder.encode_latents(raw, torch.zeros(48, 4, 4, 4))) / raw[:, 4:]  # noise times scale
    assert torch.allclose(spread.std(dim=(0, 2, 3)), torch.tensor(encoder.scale), rtol=0.2)


def test_without_noise_it_draws_some_as_edm2s_own_training_loop_expects():
    torch.manual_seed(0)
    raw = torch.from_numpy(random_latents(2))
    drawn = StabilityVAEEncoder().encode_latents(raw)
    torch.manual_seed(0)
    assert torch.equal(drawn, StabilityVAEEncoder().encode_latents(raw, torch.randn(2, 4, 4, 4)))


def test_nothing_in_the_training_step_asks_the_device_for_a_value():
    """Tensors on the meta device have no values to ask for."""
    raw, noise = torch.empty(2, 8, 4, 4, device='meta'), torch.empty(2, 4, 4, 4, device='meta')
    assert StabilityVAEEncoder().encode_latents(raw, noise).shape == (2, 4, 4, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_the_training_step_does_not_wait_for_the_gpu():
    encoder, raw = StabilityVAEEncoder(), torch.from_numpy(random_latents(4)).cuda()
    expected = encoder.encode_latents(raw.cpu(), torch.ones(4, 4, 4, 4))
    try:
        torch.cuda.set_sync_debug_mode('error')
        final = encoder.encode_latents(raw, torch.ones(4, 4, 4, 4, device='cuda'))
    finally:
        torch.cuda.set_sync_debug_mode('default')
    torch.testing.assert_close(final.cpu(), expected)


def test_pixels_pass_through_the_vae_as_0_to_1_in_small_batches(monkeypatch):
    vae, pixels = use_stand_in(monkeypatch), torch.randint(0, 256, [7, 3, 8, 8], dtype=torch.uint8)
    raw = StabilityVAEEncoder(batch_size=3).encode_pixels(pixels)
    assert vae.batches == [3, 3, 1] and torch.equal(torch.cat(vae.seen), pixels / 255)
    assert raw.shape == (7, 8, 4, 4) and torch.equal(
        raw[:, 4:], DEVIATIONS.reshape(1, 4, 1, 1).expand(7, 4, 4, 4)
    )


def test_decoding_undoes_the_map_and_cuts_off_to_8_bits(monkeypatch):
    """The stand-in's latents are the colors themselves: 0.5 is 127.5, cut off to 127; values beyond 0 ... 1 are clipped."""
    vae, encoder = use_stand_in(monkeypatch), StabilityVAEEncoder(batch_size=2)
    colors = torch.tensor([-1, 0.1001, 0.5, 0.9999, 3]).reshape(5, 1, 1, 1).expand(5, 4, 2, 2)
    final = encoder.encode_latents(
        torch.cat([colors, torch.zeros_like(colors)], dim=1), torch.zeros_like(colors)
    )
    pixels = encoder.decode(final.double())  # the sampler's precision
    assert vae.batches == [2, 2, 1] and pixels.dtype == torch.uint8 and pixels.shape == (5, 3, 4, 4)
    assert pixels[:, 0, 0, 0].tolist() == [0, 25, 127, 254, 255] and not pixels.requires_grad


def test_a_real_vae_encodes_and_decodes_as_diffusers_does_it(tmp_path):
    """Against diffusers called directly, with EDM2's numbers written out."""
    name = save_vae(tmp_path / 'vae')
    from diffusers import AutoencoderKL

    vae, encoder = (
        AutoencoderKL.from_pretrained(name).eval(),
        StabilityVAEEncoder(vae_name=name, batch_size=2),
    )
    pixels = torch.randint(0, 256, [3, 3, 8, 8], dtype=torch.uint8)
    with torch.no_grad():
        distribution = vae.encode(pixels / 255).latent_dist
        latents = distribution.mean
        expected = vae.decode(latents).sample
    raw = encoder.encode_pixels(pixels)
    torch.testing.assert_close(raw, torch.cat([latents, distribution.std], dim=1), rtol=1e-4, atol=1e-5)
    final = encoder.encode_latents(raw, torch.zeros_like(latents))
    levels = (expected * 255).clamp(0, 255)
    assert (
        encoder.decode(final) - levels
    ).abs().max() <= 1.01 and levels.std() > 5  # a level, cut off, and rounding


def test_a_vae_is_loaded_once(tmp_path):
    name = save_vae(tmp_path / 'vae')
    encoder = StabilityVAEEncoder(vae_name=name)
    encoder.init('cpu')
    assert encoders.load_vae(name, torch.device('cpu')) is encoders.load_vae(name, torch.device('cpu'))
    (tmp_path / 'vae' / 'config.json').unlink()
    assert encoder.decode(torch.zeros(1, 4, 4, 4)).shape == (1, 3, 8, 8)


@pytest.fixture
def empty_cache():
    encoders.load_vae.cache_clear()
    yield
    encoders.load_vae.cache_clear()


def only_pickled_weights(folder):
    """As older repositories have them; these would create a file if they were unpickled."""

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(folder / 'canary'),)

    (folder / 'diffusion_pytorch_model.safetensors').unlink()
    (folder / 'diffusion_pytorch_model.bin').write_bytes(pickle.dumps(Hostile()))


@pytest.mark.parametrize(
    'damage',
    [
        lambda folder: (folder / 'diffusion_pytorch_model.safetensors').write_bytes(b'no tensors'),
        lambda folder: (folder / 'diffusion_pytorch_model.safetensors').unlink(),
        lambda folder: (folder / 'config.json').write_text('{'),
        lambda folder: (folder / 'config.json').write_text(
            (folder / 'config.json').read_text().replace('"latent_channels": 4', '"latent_channels": 8')
        ),
        only_pickled_weights,
    ],
)
def test_a_vae_that_cannot_be_loaded_is_one_clear_error(tmp_path, damage, empty_cache, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    name = save_vae(tmp_path / 'vae')
    damage(tmp_path / 'vae')
    with pytest.raises(UserError, match='cannot be loaded') as error:
        encoders.make_ready(StabilityVAEEncoder(vae_name=name), 'cpu')
    assert name in str(error.value) and 'Hugging Face' in str(error.value) and '\n' not in str(error.value)
    assert not (tmp_path / 'vae' / 'canary').exists()


def test_a_vae_of_other_latents_is_named(tmp_path, empty_cache):
    name = save_vae(tmp_path / 'vae')
    with pytest.raises(UserError, match='it has 4 latent channels, not 2'):
        encoders.make_ready(StabilityVAEEncoder(vae_name=name, raw_mean=[0, 0], raw_std=[1, 1]), 'cpu')


def test_without_diffusers_the_cure_is_named(monkeypatch, empty_cache):
    monkeypatch.setitem(sys.modules, 'diffusers', None)
    with pytest.raises(UserError, match=r'pip install diffusers.*--latents'):
        encoders.build(dict(class_name='StabilityVAEEncoder'), 'cpu')
    encoders.build(dict(class_name='StabilityVAEEncoder'))  # training needs none


# ----------------------------------------------------------------------------
# Records.


@pytest.mark.parametrize(
    'arguments',
    [{}, dict(batch_size=2), dict(vae_name='a', raw_mean=[0, 1], raw_std=[1, 2], final_mean=1, final_std=2)],
)
def test_a_record_builds_the_encoder_again(arguments):
    encoder = StabilityVAEEncoder(**arguments)
    record = encoders.record_of(encoder)
    assert record == {'class_name': 'StabilityVAEEncoder', **arguments}
    again = encoders.build(record)
    assert (again.vae_name, again.scale, again.bias, again.batch_size) == (
        encoder.vae_name,
        encoder.scale,
        encoder.bias,
        encoder.batch_size,
    )
    assert encoders.record_of(again) == record


def test_pixels_have_no_record():
    assert (
        encoders.record_of(StandardRGBEncoder()) is None and type(encoders.build(None)) is StandardRGBEncoder
    )


def test_arguments_by_position_are_recorded_by_name():
    assert encoders.record_of(StabilityVAEEncoder('a', batch_size=2)) == dict(
        class_name='StabilityVAEEncoder', vae_name='a', batch_size=2
    )


@pytest.mark.parametrize(
    'record, words',
    [
        (dict(class_name='Other'), "'Other' is none that we know"),
        (dict(vae_name='a'), "'None' is none that we know"),
        (dict(class_name=[1]), 'none that we know'),
        (dict(class_name='StabilityVAEEncoder', vae_name=5), 'vae_name is a int'),
        (dict(class_name='StabilityVAEEncoder', color=3), 'cannot be built'),
        (dict(class_name='StabilityVAEEncoder', raw_mean=[1, 2]), 'cannot be'),
        (dict(class_name='StabilityVAEEncoder', raw_std=[1, 1, 0, 1]), 'deviations'),
        (dict(class_name='StabilityVAEEncoder', raw_std='x'), 'cannot be'),
        (dict(class_name='StabilityVAEEncoder', batch_size=0), 'batch_size'),
        (dict(class_name='StabilityVAEEncoder', raw_mean=None), 'cannot be built'),
        (dict(class_name='StabilityVAEEncoder', final_std=float('nan')), 'deviations'),
    ],
)
@pytest.mark.filterwarnings('ignore:divide by zero', 'ignore:invalid value')
def test_a_record_that_builds_nothing_is_one_clear_error(record, words):
    with pytest.raises(UserError, match=words):
        encoders.build(record)


def data_set(channels=8, encoder=None, holds_latents=True):
    return SimpleNamespace(name='data', num_channels=channels, encoder=encoder, holds_latents=holds_latents)


def test_a_data_set_says_what_the_network_sees():
    """8 channels of latents are 4 of the network; the teacher's record counts before the data set's, and that before EDM2's."""
    own, taught = (dict(class_name='StabilityVAEEncoder', vae_name=name) for name in ('own', 'taught'))
    for dataset, teacher, vae_name in [
        (data_set(), None, 'stabilityai/sd-vae-ft-mse'),
        (data_set(encoder=own), None, 'own'),
        (data_set(encoder=own), SimpleNamespace(metadata={}), 'own'),
        (data_set(encoder=own), SimpleNamespace(metadata={'encoder': taught}), 'taught'),
    ]:
        encoder, channels = encoders.for_dataset(dataset, teacher)
        assert (encoder.vae_name, channels) == (vae_name, 4)
    for channels in (1, 3):
        encoder, seen = encoders.for_dataset(data_set(channels, holds_latents=False))
        assert type(encoder) is StandardRGBEncoder and seen == channels


@pytest.mark.parametrize(
    'dataset',
    [data_set(4), data_set(6), data_set(16), data_set(8, encoder=dict(class_name='StandardRGBEncoder'))],
)
def test_latents_of_other_channels_are_refused(dataset):
    with pytest.raises(UserError, match=r'The latents of data have \d+ channels.*--encode-vae'):
        encoders.for_dataset(dataset)


@pytest.mark.parametrize(
    'holds_latents, cure',
    [(True, r'--encode-vae from images of another size\.$'), (False, r'--encode-vae\.$')],
)
def test_data_that_do_not_fit_a_teacher_of_latents_are_to_be_encoded(holds_latents, cure):
    net = EDMPrecond(
        8,
        4,
        model_type='DhariwalUNet',
        model_channels=32,
        channel_mult=[1],
        num_blocks=1,
        attn_resolutions=[],
    )
    net.metadata = dict(encoder=dict(class_name='StabilityVAEEncoder'), objective='diffusion')
    data = SimpleNamespace(
        **vars(data_set(8, holds_latents=holds_latents)), resolution=16, label_space=LabelSpace(0)
    )
    with pytest.raises(UserError, match=cure):
        o = dict(outdir='x', teacher='t.pkl', data='d.zip', objective='mcd', augment=0.0)
        check_teacher(command_line.choose(o), data, net)


# ----------------------------------------------------------------------------
# Snapshots.


def test_a_round_trip_keeps_the_encoder(tmp_path):
    record = dict(
        class_name='StabilityVAEEncoder', vae_name='somewhere', raw_mean=[1.0, 2.0, 3.0, 4.0], batch_size=2
    )
    first = load_network(save_latent_network(tmp_path / 'a.pkl', record))
    assert first.metadata['encoder'] == record and encoders.encoder_of(first).vae_name == 'somewhere'
    save_snapshot(tmp_path / 'b.pkl', first, **first.metadata)
    assert load_network(tmp_path / 'b.pkl').metadata == first.metadata


def test_the_digest_covers_the_encoder(tmp_path):
    """Without the seal at its end, as after re-pickling by another tool; then a record that was altered."""
    save_latent_network(tmp_path / 'a.pkl', dict(vae_name='somewhere'))
    content, _, _ = (tmp_path / 'a.pkl').read_bytes().rpartition(b'\n#')
    (tmp_path / 'b.pkl').write_bytes(content)
    assert load_network(tmp_path / 'b.pkl').metadata['encoder']['vae_name'] == 'somewhere'
    (tmp_path / 'c.pkl').write_bytes(content.replace(b'somewhere', b'elsewhere'))
    with pytest.raises(UserError, match='does not match the digest'):
        load_network(tmp_path / 'c.pkl')


def test_snapshots_of_pixels_have_no_encoder_entry(tmp_path, teacher):
    assert 'encoder' not in load_network(teacher).metadata and b'encoders' not in teacher.read_bytes()
    assert type(encoders.encoder_of(load_network(teacher), 'cpu')) is StandardRGBEncoder


def snapshot_with(tmp_path, encoder, **entries):
    """The snapshot of a latent network, re-pickled with another encoder entry and without our metadata, as EDM2 writes it."""
    with open(save_latent_network(tmp_path / 'ours.pkl'), 'rb') as file:
        data = pickle.load(file)
    data = dict(ema=data['ema'], encoder=encoder, dataset_kwargs={}, loss_fn=None, **entries)
    (tmp_path / 'edm2.pkl').write_bytes(pickle.dumps(data, protocol=4))
    return tmp_path / 'edm2.pkl'


class Entry:
    """Pickles as a persistent object of version 6, whatever its class, source and state."""

    def __init__(self, class_name, state, source=''):
        self.meta = dict(type='class', version=6, module_src=source, class_name=class_name, state=state)

    def __reduce__(self):
        return persistence._reconstruct_persistent_obj, (self.meta,)


def edm2_state(args=(), **kwargs):
    """The state of EDM2's object: arrays, a place for the VAE, arguments."""
    arrays = dict(
        scale=np.float32([1, 2, 3, 4]),
        bias=np.float32([1, 2, 3, 4]),
        _vae=None,
        vae_name='x',
        batch_size=np.int64(8),
    )
    return dict(arrays, _init_args=args, _init_kwargs=kwargs)


@pytest.mark.parametrize(
    'state, expected',
    [
        (edm2_state(), {}),
        (edm2_state(batch_size=4), dict(batch_size=4)),
        (edm2_state(args=('a',), raw_std=[1, 1, 1, 1]), dict(vae_name='a', raw_std=[1, 1, 1, 1])),
    ],
)
def test_the_encoder_of_an_edm2_snapshot_is_read_from_its_arguments(tmp_path, state, expected):
    canary = f'open({str(tmp_path / "canary")!r}, "w")'
    net = load_network(snapshot_with(tmp_path, Entry('StabilityVAEEncoder', state, source=canary)))
    assert net.metadata == dict(
        objective='diffusion', encoder={'class_name': 'StabilityVAEEncoder', **expected}
    )
    assert not (tmp_path / 'canary').exists()


def test_edm2s_snapshots_of_pixels_have_no_encoder_in_their_metadata(tmp_path):
    net = load_network(
        snapshot_with(tmp_path, Entry('StandardRGBEncoder', dict(_init_args=(), _init_kwargs={})))
    )
    assert net.metadata == dict(objective='diffusion')
    with pytest.raises(UserError, match='4 channels, which its StandardRGBEncoder cannot decode'):
        encoders.encoder_of(net)


def test_an_encoder_that_we_do_not_know_is_an_error_only_where_it_is_needed(tmp_path):
    """Its state may hold anything, such as a whole network; the name is kept in copies."""
    net = load_network(
        snapshot_with(
            tmp_path,
            Entry(
                'TheirEncoder', dict(model=torch.nn.Parameter(torch.zeros(3)), _init_args=(torch.zeros(3),))
            ),
        )
    )
    assert net.metadata['encoder'] == dict(class_name='TheirEncoder')
    save_snapshot(tmp_path / 'copy.pkl', net, **net.metadata)
    copy = load_network(tmp_path / 'copy.pkl')
    assert copy.metadata['encoder'] == dict(class_name='TheirEncoder')
    with pytest.raises(UserError, match=r"'TheirEncoder' is none that we know.*--latents"):
        encoders.encoder_of(copy)


@pytest.mark.parametrize(
    'entry',
    [
        'StabilityVAEEncoder',
        5,
        {},
        [1],
        Entry('StabilityVAEEncoder', dict(_init_args=[1], _init_kwargs={})),
        Entry('StabilityVAEEncoder', dict(_init_args=(), _init_kwargs=3)),
        Entry('StabilityVAEEncoder', edm2_state(vae_name=np.zeros(3))),
    ],
)
def test_a_malformed_entry_is_one_clear_error(tmp_path, entry):
    with pytest.raises(UserError, match=r'edm2\.pkl cannot be used as a network snapshot: it h'):
        load_network(snapshot_with(tmp_path, entry))


@pytest.mark.parametrize('encoder', ['yes', {}, dict(class_name=['x'])])
def test_metadata_whose_encoder_is_no_record_is_refused(tmp_path, encoder):
    with pytest.raises(UserError, match='whose encoder is not a dict with a class_name'):
        load_network(snapshot_with(tmp_path, None, metadata=dict(objective='diffusion', encoder=encoder)))


def test_a_network_and_an_encoder_of_other_channels_do_not_go_together(tmp_path):
    net = load_network(save_latent_network(tmp_path / 'a.pkl', dict(raw_mean=[0, 0], raw_std=[1, 1])))
    with pytest.raises(UserError, match='4 channels, which its StabilityVAEEncoder cannot decode'):
        encoders.encoder_of(net)


# EDM2's way of loading, reduced to its essence: it runs the source that comes along.
STOCK = """
import pickle, sys, types
import torch
stand_in = types.ModuleType('torch_utils.persistence')
modules = {}

def persistent_class(cls):
    return cls

def reconstruct(meta):
    if meta['module_src'] not in modules:
        modules[meta['module_src']] = vars(types.ModuleType('embedded'))
        exec(meta['module_src'], modules[meta['module_src']])
    cls = modules[meta['module_src']][meta['class_name']]
    obj = cls.__new__(cls)
    getattr(obj, '__setstate__', vars(obj).update)(meta['state'])
    return obj

stand_in.persistent_class, stand_in._reconstruct_persistent_obj = persistent_class, reconstruct
sys.modules['torch_utils'], sys.modules['torch_utils.persistence'] = types.ModuleType('torch_utils'), stand_in
with open('net.pkl', 'rb') as file:
    encoder = pickle.load(file)['encoder']
assert type(encoder).__module__ == 'embedded' and type(encoder).__name__ == 'StabilityVAEEncoder'
torch.manual_seed(0)
torch.save(encoder.encode_latents(torch.ones(2, 8, 4, 4)), 'latents.pt')
if len(sys.argv) > 1:
    encoder.init(torch.device('cpu'))
    encoder.batch_size = 1
    pixels = encoder.decode(torch.ones(2, 4, 4, 4))
    torch.save((pixels, encoder.encode_pixels(pixels)), 'pixels.pt')
"""


@pytest.mark.parametrize('vae', [False, True], ids=['latents', 'pixels'])
def test_stock_edm2_uses_our_encoder_with_nothing_of_ours_at_hand(tmp_path, vae):
    """In a process of its own. What its training loop, its sampler and its dataset_tool call, with a VAE where diffusers is installed."""
    record = dict(vae_name=save_vae(tmp_path / 'vae') if vae else 'somewhere', raw_mean=[1, 2, 3, 4])
    save_latent_network(tmp_path / 'net.pkl', record)
    command = [sys.executable, '-c', STOCK, *(['decode'] if vae else [])]
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=120)
    encoder = StabilityVAEEncoder(**record)
    torch.manual_seed(0)
    assert torch.equal(torch.load(tmp_path / 'latents.pt'), encoder.encode_latents(torch.ones(2, 8, 4, 4)))
    if vae:
        pixels, raw = torch.load(tmp_path / 'pixels.pt')
        assert (pixels.int() - encoder.decode(torch.ones(2, 4, 4, 4)).int()).abs().max() <= 1
        torch.testing.assert_close(raw, encoder.encode_pixels(pixels), rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------
# The whole way.


def test_a_teacher_and_its_student_train_on_latents(tmp_path):
    """No diffusers, no VAE: these are needed for pixels alone. The student has the encoder of its teacher, though the data set has lost its own."""
    (tmp_path / 'latents').mkdir()
    for i, raw in enumerate(random_latents(32, size=8)):
        (tmp_path / 'latents' / f'img-mean-std-{i:08d}.npy').write_bytes(npy(raw))
    label_file = tmp_path / 'latents' / 'dataset.json'
    label_file.write_text(
        '{"labels": null, "encoder": {"class_name": "StabilityVAEEncoder", "vae_name": "mine", "raw_std": [1, 1, 1, 1]}}'
    )
    train = [
        'train.py',
        f'--data={tmp_path / "latents"}',
        *FAST,
        '--batch=32',
        '--duration=0.000064',
        '--ema=10kimg',
        '--dump=0',
    ]
    run(*train, f'--outdir={tmp_path / "teacher"}', *TINY_NETWORK)
    teacher_path = max((tmp_path / 'teacher').glob('*.pkl'))
    teacher = load_network(teacher_path)
    assert (teacher.img_channels, teacher.img_resolution) == (4, 8)
    record = dict(class_name='StabilityVAEEncoder', vae_name='mine', raw_std=[1, 1, 1, 1])
    assert teacher.metadata['encoder'] == record
    label_file.unlink()
    run(
        *train,
        f'--outdir={tmp_path / "student"}',
        '--consistency=True',
        f'--teacher={teacher_path}',
        '--S=2',
        '--T_start=4',
        '--T_end=4',
    )
    student = max((tmp_path / 'student').glob('*.pkl'))
    assert load_network(student).metadata['encoder'] == record
    run('generate.py', f'--network={student}', f'--outdir={tmp_path / "out"}', '--seeds=0-2', '--latents')
    assert np.load(tmp_path / 'out' / '000002.npy').shape == (4, 8, 8)


def test_a_teacher_of_pixels_refuses_latents(tmp_path, teacher):
    (tmp_path / 'a.npy').write_bytes(npy(random_latents(1, size=8)[0]))
    command = [
        'train.py',
        f'--data={tmp_path}',
        f'--outdir={tmp_path / "out"}',
        '--consistency=True',
        f'--teacher={teacher}',
        '--dry-run',
    ]
    result = run(*command, check=False)
    assert_one_clear_error(result, '8x8x1', '8x8x4')
