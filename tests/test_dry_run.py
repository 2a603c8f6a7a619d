"""--dry-run says what a run would train and hold, and refuses what would stop it; --transfer names the network."""

import functools
import json
import os

import helpers
import pytest
import torch
from helpers import TINY_NETWORK, assert_one_clear_error

import train
from metrics import detectors
from torch_utils import distributed
from training import architectures, memory
from training.checkpoint import load_network, save_snapshot
from training.networks import EDMPrecond

invoke = functools.partial(helpers.invoke, train.main)


def described(*words):
    result = invoke('--outdir=runs', '--cond=1', '--dry-run', *words)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), result.stderr


# ----------------------------------------------------------------------------
# Facts.


def test_network_and_memory_are_those_of_the_network_that_would_train(digits):
    """Parameters of the real network; Adam's two moments and three averages of FP32 numbers."""
    c, _ = described(f'--data={digits}', *TINY_NETWORK, '--phema=0.05,0.1', '--batch=64', '--batch-gpu=16')
    net = EDMPrecond(**c['network']['kwargs'])
    count = sum(p.numel() for p in net.parameters())
    of_network, memory = c['about']['network'], c['about']['memory_gib']
    assert of_network['parameters'] == count and of_network['resolutions'] == [8, 4]
    assert (of_network['channels'], of_network['num_blocks'], of_network['attn_resolutions']) == (
        [8, 16],
        1,
        [],
    )
    rounded = lambda copies: round(copies * 4 * count / 2**30, 3)
    assert [memory[part] for part in ('weights', 'gradients', 'optimizer', 'averages', 'teacher')] == [
        *map(rounded, (1, 1, 2, 3, 0))
    ]
    assert memory['micro_batch'] == 16 and memory['activations'] > 0


@pytest.mark.parametrize('processes', [1, 4])
def test_the_memory_of_divided_weights_is_that_of_one_process(digits, monkeypatch, processes):
    """Bytes a parameter: gathered weights 4 and two shares of them, and N-ths of gradient 4, moments 8 and averages 8. A
    target network is shares alone. One process divides nothing."""
    monkeypatch.setattr(distributed, 'get_world_size', lambda: processes)
    start = [f'--data={digits}', '--arch=adm', '--cbase=256', '--cres=1', '--phema=0.05', '--batch=64']
    c, _ = described(*start, '--objective=cm-ct', '--mu0=0.9', '--cm_loss=l2', '--shard=optimizer')
    memory, count = c['about']['memory_gib'], c['about']['network']['parameters']
    expected = dict(weights=4, gradients=4, optimizer=8, averages=8, target=4)
    if processes > 1:
        expected = dict(weights=4 + 8 / 4, gradients=4 / 4, optimizer=8 / 4, averages=8 / 4, target=8 / 4)
    assert {part: memory[part] for part in expected} == {
        part: pytest.approx(bytes_each * count / 2**30, abs=1e-3) for part, bytes_each in expected.items()
    }
    assert memory['micro_batch'] == 64 // processes and memory['processes'] == processes


def test_defaults_of_a_network_are_named(digits):
    """ADM's own: three blocks; attention at 32, 16 and 8, of which 8x8 images have one, from 64 channels on."""
    c, said = described(f'--data={digits}', '--arch=adm', '--cbase=64', '--cres=1,2')
    of_network = c['about']['network']
    assert (of_network['num_blocks'], of_network['attn_resolutions'], of_network['dropout']) == (3, [8], 0.13)
    assert 'Warning' not in said  # nobody asked for 32
    c, _ = described(f'--data={digits}', '--arch=adm', '--cbase=32', '--cres=1')
    assert c['about']['network']['attn_resolutions'] == []


def test_activations_are_what_the_forward_pass_saves():
    """The meta device, which computes nothing, against tensors on the CPU, for a batch of three."""
    kwargs = dict(TEST_NETWORK, label_dim=10, attn_resolutions=[8], channels_per_head=16)
    real, kept = EDMPrecond(**kwargs).train(), {}
    own = {p.untyped_storage().data_ptr() for p in real.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        masks = real.dropout_masks(3)
        real(torch.randn(3, 1, 8, 8), torch.ones(3), torch.eye(10)[:3], dropout_masks=masks)
    expected = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)
    network = dict(class_name='EDMPrecond', kwargs=kwargs)
    fixed, per_image = memory.saved_for_backward(network, 'fp32')
    assert fixed + 3 * per_image == pytest.approx(expected, rel=0.02)


TEST_NETWORK = dict(
    img_resolution=8,
    img_channels=1,
    model_type='DhariwalUNet',
    model_channels=16,
    channel_mult=[1, 2],
    num_blocks=1,
    attn_resolutions=[4],
    dropout=0.1,
)


@pytest.mark.parametrize(
    'options, per_image, total',
    [
        # The student's forward and backward pass.
        (['--objective=diffusion', '--duration=0.01'], 3, 30_000),
        # Heun's hop, the self-target and the student; on one edge in T 4 Heun steps of 2.
        (['--objective=mcd', '--T_start=32', '--T_end=64', '--duration=0.01'], 6 + 4 * 2 / 64, 61_250),
        (['--objective=direct', '--substeps=5', '--duration=0.01'], 2 * 5 + 3, 130_000),
        # Two teacher steps and the student, over the rounds of 4, 2 and 1 sampling steps; the last two are twice as long.
        (
            ['--objective=pd', '--S_start=4', '--S=1', '--stage_steps=10', '--batch=64'],
            5,
            5 * (10 + 20 + 20) * 64,
        ),
    ],
)
def test_the_network_evaluations_of_a_run(digits, teacher, options, per_image, total):
    words = [] if '--objective=diffusion' in options else [f'--teacher={teacher}']
    c, _ = described(f'--data={digits}', *([] if words else TINY_NETWORK), *words, *options)
    assert c['about']['cost'] == dict(evaluations_per_image=per_image, evaluations=total)


@pytest.mark.parametrize('option', ['attn_resolutions', 'dout_resolutions'])
def test_a_resolution_that_no_level_has_is_said_with_those_there_are(digits, option):
    words = [word for word in TINY_NETWORK if not word.startswith('--attn')]
    _, said = described(f'--data={digits}', *words, f'--{option}=16,4')
    assert f'Warning: --{option} names 16, which this network does not have: its levels are 8, 4.' in said


# ----------------------------------------------------------------------------
# Checks.


def test_a_reference_of_another_detector_is_refused_and_what_would_be_downloaded_is_listed(digits, rulers):
    start = [f'--data={digits}', *TINY_NETWORK, '--val=1', f'--val_ref={rulers / "pca.npz"}']
    assert described(*start, f'--val_detector={rulers / "pca.pt"}')[0]['about']['not_checked'] == []
    result = invoke('--outdir=runs', '--dry-run', *start, f'--val_detector={rulers / "random.pt"}')
    assert_one_clear_error(result, '--val_ref', 'was made with detector pca', 'random')
    (left,) = described(*start, '--val_detector=https://example.com/none.pt')[0]['about']['not_checked']
    assert left == 'https://example.com/none.pt: not downloaded yet'


@pytest.mark.parametrize(
    'detector, word',
    [
        ([], 'features of detector pca, but detector inception-2015-12-05 returns 2048'),
        (
            [f'--val_detector=https://example.com/none.pt#sha256={"0" * 64}'],
            'made with detector pca (SHA-256',
        ),
    ],
)
def test_a_reference_of_another_detector_is_refused_before_that_is_downloaded(
    digits, rulers, monkeypatch, detector, word
):
    """By the number of Inception's features, and by a pinned digest."""
    monkeypatch.setattr(detectors, 'local_path', lambda *_, **__: pytest.fail('it was looked for'))
    start = ['--outdir=runs', f'--data={digits}', *TINY_NETWORK, '--val=1', f'--val_ref={rulers / "pca.npz"}']
    assert_one_clear_error(invoke(*start, *detector, '--dry-run'), '--val_ref', word)


def test_missing_files_of_validation_are_found_before_a_run(digits, rulers, tmp_path):
    start = ['--outdir=runs', '--dry-run', f'--data={digits}', *TINY_NETWORK, '--val=1']
    assert_one_clear_error(invoke(*start, f'--val_ref={tmp_path / "r.npz"}'), '--val_ref', 'r.npz')
    result = invoke(*start, f'--val_ref={rulers / "pca.npz"}', f'--val_detector={tmp_path / "d.pt"}')
    assert_one_clear_error(result, '--val_detector', 'd.pt')


def test_an_output_folder_that_no_run_could_use_is_refused(digits, tmp_path):
    start = ['--dry-run', f'--data={digits}', *TINY_NETWORK]
    (tmp_path / 'file').write_text('')
    assert_one_clear_error(invoke(f'--outdir={tmp_path / "file" / "runs"}', *start), 'is a file')
    (tmp_path / 'training-state-000001.pt').write_text('')
    result = invoke(f'--outdir={tmp_path}', '--nosubdir', *start)
    assert_one_clear_error(result, 'training states of an earlier run')
    if os.getuid():
        (tmp_path / 'closed').mkdir(mode=0o500)
        assert_one_clear_error(invoke(f'--outdir={tmp_path / "closed"}', *start), 'cannot be written to')


# ----------------------------------------------------------------------------
# The network of --transfer.


def test_transfer_alone_gives_the_architecture(digits, teacher):
    """As --teacher does; dropout, which changes no weight, is the objective's."""
    c, said = described(f'--data={digits}', '--objective=ect', f'--transfer={teacher}')
    theirs = load_network(teacher).init_kwargs
    ours = c['network']['kwargs']
    assert all(
        ours[name] == theirs[name] for name in ('model_type', 'model_channels', 'channel_mult', 'num_blocks')
    )
    assert ours['dropout'] == 0.2 and 'Network of --transfer: --arch=adm --precond=edm --cbase=8' in said
    assert '-cond-adm-edm-ect-' in c['run_dir']


def test_an_architecture_that_is_given_is_not_replaced(digits, teacher):
    c, said = described(f'--data={digits}', *TINY_NETWORK, '--cbase=16', f'--transfer={teacher}')
    assert c['network']['kwargs']['model_channels'] == 16 and 'Network of' not in said
    c, _ = described(f'--data={digits}', '--cbase=16', f'--transfer={teacher}')
    assert c['network']['kwargs']['model_type'] == 'DhariwalUNet'
    assert c['network']['kwargs']['model_channels'] == 16


def test_a_network_that_no_option_describes_needs_arch(digits, tmp_path):
    net = EDMPrecond(**dict(TEST_NETWORK, model_type='SongUNet', channel_mult_noise=3, label_dim=10))
    save_snapshot(tmp_path / 'odd.pkl', net)
    result = invoke(
        '--outdir=runs', '--cond=1', '--dry-run', f'--data={digits}', f'--transfer={tmp_path / "odd.pkl"}'
    )
    assert_one_clear_error(result, 'no --arch names', 'say which one to train by --arch')


def test_levels_follow_the_network():
    assert architectures.resolutions(dict(kwargs=dict(img_resolution=64))) == [64, 32, 16, 8]
