"""Precision, memory format, checkpointing and compilation: the same networks, run in other ways."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from helpers import FAST, lines, run
from torch.nn.attention import SDPBackend, sdpa_kernel

from dnnlib import EasyDict
from torch_utils import distributed
from torch_utils.flat import FlatParameters
from torch_utils.gradients import Gradients
from training import execution, networks
from training.checkpoint import load_network, save_snapshot
from training.networks import edm2 as networks_edm2
from training.networks.switched import Switched
from training.objectives.loss import State
from training.phema import WeightAverages
from training.run_files import saved_snapshots
from training.setup import speed_up
from training.trained import Trained

SMALL = dict(img_resolution=8, img_channels=3, label_dim=4)
KINDS = {
    'adm': lambda: networks.EDMPrecond(
        **SMALL,
        model_type='DhariwalUNet',
        model_channels=32,
        channel_mult=[1, 2],
        num_blocks=1,
        attn_resolutions=[4],
        dropout=0.2,
        channels_per_head=16,
    ),
    'ddpmpp': lambda: networks.VPPrecond(
        **SMALL, model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], dropout=0.2
    ),
    'ncsnpp': lambda: networks.EDMPrecond(
        **SMALL,
        model_type='SongUNet',
        model_channels=16,
        channel_mult=[1, 2],
        num_blocks=1,
        attn_resolutions=[4],
        embedding_type='fourier',
        encoder_type='residual',
        resample_filter=[1, 3, 3, 1],
        channel_mult_noise=2,
    ),
    'edm2': lambda: networks_edm2.Precond(
        **SMALL,
        use_fp16=False,
        model_channels=16,
        channel_mult=[1, 2],
        num_blocks=1,
        attn_resolutions=[4],
        dropout=0.2,
        channels_per_head=16,
    ),
}
GRAY = dict(SMALL, img_channels=1)


FEW_LAYERS = dict(channel_mult=[1], num_blocks=1, attn_resolutions=[8], dropout=0.2)  # quick to compile
ONE_LEVEL = {
    'adm': lambda: networks.EDMPrecond(**SMALL, model_channels=32, channels_per_head=16, **FEW_LAYERS)
}


def build(kind: str, kinds=KINDS) -> torch.nn.Module:
    """A network whose parameters are all random, the ones too that start as zeros."""
    torch.manual_seed(0)
    net = kinds[kind]().train()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return net


def inputs(net, count: int = 5):
    """x, sigma, labels and dropout masks."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, net.img_channels, net.img_resolution, net.img_resolution, generator=generator)
    sigma = torch.rand(count, generator=generator) * 3 + 0.1
    labels = torch.eye(net.label_dim)[torch.randint(net.label_dim, [count], generator=generator)]
    return x, sigma, labels, net.dropout_masks(count, generator)


def answers(net, x, sigma, labels, masks):
    """D and the gradients of a function of it by the weights."""
    net.zero_grad()
    denoised = net(x, sigma, labels, dropout_masks=masks)
    (denoised * torch.linspace(-1, 1, denoised.numel()).reshape(denoised.shape)).sum().backward()
    return denoised.detach().clone(), {
        name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None
    }


def assert_alike(ours, theirs, tolerance: float) -> None:
    """To `tolerance` of the largest value in each tensor."""
    (denoised, gradients), (expected, expected_gradients) = ours, theirs
    assert gradients.keys() == expected_gradients.keys() and len(gradients) > 20
    for name, (a, b) in {
        'D': (denoised, expected),
        **{name: (gradients[name], expected_gradients[name]) for name in gradients},
    }.items():
        assert (a - b).abs().max() <= tolerance * max(b.abs().max().item(), 1e-3), name


@pytest.mark.parametrize('kind', KINDS)
def test_channels_last_is_the_same_network_with_another_order_in_memory(kind):
    """FP32 sums in another order: 1e-4 of the largest value, gradients included."""
    net = build(kind)
    given = inputs(net)
    expected = answers(copy.deepcopy(net), *given)
    execution.run_with(net, channels_last=True)
    seen = []
    block = next(module for name, module in net.model.dec.items() if '_block' in name)
    block.register_forward_hook(
        lambda module, args, out: seen.append(out.is_contiguous(memory_format=torch.channels_last))
    )
    assert_alike(answers(net, *given), expected, 1e-4)
    assert seen == [True]


def test_channels_last_holds_for_gray_images_whose_one_channel_fits_both_orders():
    torch.manual_seed(0)
    net = networks.EDMPrecond(
        **GRAY,
        model_type='DhariwalUNet',
        model_channels=16,
        channel_mult=[1, 2],
        num_blocks=1,
        attn_resolutions=[],
    )
    execution.run_with(net.eval(), channels_last=True)
    seen = []
    net.model.dec['8x8_block0'].register_forward_hook(
        lambda module, args, out: seen.append(out.is_contiguous(memory_format=torch.channels_last))
    )
    net(*inputs(net)[:3])
    assert seen == [True]


def saved_bytes(net, given) -> int:
    """Memory that a forward pass leaves for its backward pass, weights left out."""
    weights, kept = {p.untyped_storage().data_ptr() for p in net.parameters()}, {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = (
                tensor  # held, so that no later tensor takes its place
            )
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(given[0], given[1], given[2], dropout_masks=given[3])
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize('kind', KINDS)
def test_checkpointed_activations_give_the_same_numbers_for_less_memory(kind):
    """The same operations run twice: bit for bit. What is kept is what goes in and out of blocks: less than half."""
    net = build(kind)
    given = inputs(net)
    before, after = (
        saved_bytes(execution.run_with(copy.deepcopy(net), checkpoint_activations=set_), given)
        for set_ in (False, True)
    )
    twin = execution.run_with(copy.deepcopy(net), checkpoint_activations=True)
    assert_alike(answers(twin, *given), answers(net, *given), 0)
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), net.state_dict().values()))
    assert after < before / 2, (before, after)


def test_masks_that_a_block_draws_itself_are_the_same_when_it_is_computed_again():
    """Without given masks, dropout draws from the global generator; the second computation has to see its first state."""
    net = build('adm')
    x, sigma, labels, _ = inputs(net)
    runs = []
    for checkpointed in (False, True):
        twin = execution.run_with(copy.deepcopy(net), checkpoint_activations=checkpointed)
        torch.manual_seed(3)
        runs.append(answers(twin, x, sigma, labels, None))
    assert_alike(*runs, 0)


def test_copies_and_snapshots_know_nothing_of_how_a_network_runs(tmp_path):
    """They are of this process: a snapshot made by a compiled run is no other than one made by a plain run."""
    net = build('adm').eval()
    for name in ('plain', 'fast'):
        if name == 'fast':
            execution.run_with(net, channels_last=True, checkpoint_activations=True, compiled=True)
        save_snapshot(tmp_path / f'{name}.pkl', net, objective='diffusion')
    assert (tmp_path / 'plain.pkl').read_bytes() == (tmp_path / 'fast.pkl').read_bytes()
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), load_network(tmp_path / 'fast.pkl')):
        assert (
            not other.channels_last
            and not other.model.checkpoint_activations
            and other._compiled_call_impl is None
        )


@pytest.mark.parametrize('kind', ['adm', 'ddpmpp'])
def test_a_teacher_that_holds_half_precision_answers_bit_for_bit_the_same(kind):
    """Weights are rounded before instead of at every call."""
    net = execution.in_precision(build(kind), 'bf16').eval()
    x, sigma, labels, _ = inputs(net)
    with torch.no_grad():
        expected = net(x, sigma, labels)
        assert torch.equal(execution.hold_in_half(net)(x, sigma, labels), expected)
    convolutions = [
        module.weight
        for module in net.modules()
        if isinstance(module, networks.Conv2d) and module.weight is not None
    ]
    assert {weight.dtype for weight in convolutions} == {
        torch.bfloat16
    } and net.model.map_layer0.weight.dtype == torch.float32
    assert execution.hold_in_half(build('adm')).model.out_conv.weight.dtype == torch.float32


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('kind', KINDS)
def test_half_precision_inside_is_the_same_network_with_shorter_numbers(kind, dtype):
    """Every layer rounds its numbers, to half of eps, and some twenty layers, forward and back, add up: to 8 roundings of the length of all that
    the U-Net answers, 0.4 % and 3.1 %, and of the gradients of its square, by all weights together. (A sum of both signs would not do: the gradient
    by one of EDM2's gains would be such a sum too, next to nothing of what is in it.) FP16 is for GPUs; here the U-Net is given its input in it."""
    net = build(kind)
    inner, given, seen, gradients = next(net.children()), inputs(net), [], []
    inner.register_forward_hook(lambda _, args, out: seen.append(out))
    for inside in (torch.float32, dtype):
        first = inner.register_forward_pre_hook(
            lambda _, args, inside=inside: (args[0].to(inside), *args[1:])
        )
        net.zero_grad()
        assert net(*given[:3], dropout_masks=given[3]).dtype == torch.float32 and seen[-1].dtype == inside
        seen[-1].float().square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
        first.remove()
    for exact, rounded in (seen, gradients):
        assert 0 < (rounded - exact).norm() / exact.norm() < 8 * torch.finfo(dtype).eps / 2


@pytest.mark.parametrize(
    'precision, earlier',
    [
        *(pytest.param(precision, [], marks=pytest.mark.slow) for precision in ('fp32', 'bf16')),
        ('fp32', [5, 3]),
    ],
)
def test_a_compiled_network_has_few_graphs_on_several_processes(precision, earlier):
    """And the same gradients, which arrive in several parts. DDP cuts where a bucket is full: at every parameter, if each
    seemed as large as all; and not at all where the batch size is dynamic, as after a network of the same class was
    compiled for other sizes, in `earlier` passes without gradients."""
    torch.compiler.reset()
    graphs, net = [], execution.in_precision(build('adm', ONE_LEVEL), precision)
    *given, masks = inputs(net)
    net(*given, dropout_masks=masks).square().sum().backward()
    plain = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    flat = FlatParameters(net)
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        gradients = Gradients(net, flat, *execution.rounded_parameters(net))
        ddp = distributed.in_several_graphs(gradients.net, torch.device('cpu'))
        gradients.net.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
        for count in earlier:
            *others, their_masks = inputs(net, count)
            with torch.no_grad():
                gradients.net(*others, dropout_masks=their_masks)
        graphs.clear()
        gradients.begin_step()
        with gradients.round(last=True):
            ddp(*given, dropout_masks=masks).square().sum().backward()
    finally:
        distributed.shutdown()
    assert 1 < len(graphs) <= distributed.GRAPHS + 1
    for parameter, gradient in zip(net.parameters(), plain):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('kind', KINDS)
def test_attention_is_given_to_fused_kernels_in_a_layout_that_they_take(kind, channels_last):
    """Forward and back. PyTorch would otherwise multiply the matrices out in silence; here it is not allowed to."""
    given = inputs(build(kind))
    ask = lambda: answers(execution.run_with(build(kind), channels_last=channels_last), *given)
    expected = ask()
    for backend, tolerance in ((SDPBackend.FLASH_ATTENTION, 0), (SDPBackend.MATH, 1e-4)):
        with sdpa_kernel(backend):
            assert_alike(ask(), expected, tolerance)


def test_both_networks_of_a_switched_one_are_set():
    high, low = build('adm'), build('adm')
    net = execution.run_with(execution.in_precision(Switched(high, low, 1.0), 'bf16'), channels_last=True)
    assert net.high.channels_last and net.low.channels_last and net.high.use_bf16 and net.low.use_bf16


@pytest.mark.parametrize(
    'kind, kinds, backend',
    [
        pytest.param('adm', ONE_LEVEL, 'aot_eager', id='one level'),
        pytest.param('adm', KINDS, 'aot_eager', marks=pytest.mark.slow),
        pytest.param('edm2', KINDS, 'aot_eager', marks=pytest.mark.slow),
        pytest.param('adm', KINDS, 'inductor', marks=pytest.mark.slow),
    ],
)
def test_a_compiled_network_is_the_same_and_noise_levels_compile_nothing_again(
    kind, kinds, backend, monkeypatch
):
    """Inductor fuses FP32 sums in another order: 1e-4. The compiler may not run again for other noise levels, images, labels and masks; for another
    batch size it may once, and then never for a third. A break of the graph would be an error (fullgraph)."""
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, 'compile', lambda net, **kwargs: compile_(net, fullgraph=True, backend=backend)
    )
    torch._dynamo.reset()
    net = build(kind, kinds)
    plain = copy.deepcopy(net)
    execution.run_with(net, compiled=True)

    def compare(given):
        assert_alike(answers(net, *given), answers(plain, *given), 1e-4)
        with torch.no_grad():
            a, b = net(*given[:3], dropout_masks=given[3]), plain(*given[:3], dropout_masks=given[3])
        assert (a - b).abs().max() < 1e-4 * b.abs().max()

    compare(inputs(net))
    compare(inputs(net, 7))
    with torch.compiler.set_stance('fail_on_recompile'):
        for count, level in ((7, 0.5), (6, 40.0)):
            x, sigma, labels, masks = inputs(net, count)
            compare((x * level, sigma * level, labels, masks))


@pytest.mark.parametrize('on_gpu, expected', [(False, None), (True, {'triton.cudagraphs': True})])
def test_what_is_only_asked_is_launched_as_graphs_on_a_gpu(on_gpu, expected, monkeypatch):
    """Not what trains, whose answers have to outlive the next call."""
    net, seen = build('adm').eval(), []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda net, **kwargs: seen.append(kwargs['options']))
    monkeypatch.setattr(execution, 'is_on_gpu', lambda net: on_gpu)
    execution.run_with(net, compiled=True, cuda_graphs=True)
    execution.run_with(net, compiled=True)
    execution.run_with(net, cuda_graphs=True)
    assert seen == [expected, None] and 'triton.cudagraphs' in torch._inductor.list_options()
    assert torch._dynamo.config.cache_size_limit >= execution.COMPILATIONS


@pytest.mark.parametrize('sampled_too', [False, True])
def test_a_teacher_that_snapshots_hold_keeps_its_weights(sampled_too):
    """`tcm` samples with its first stage; others only ask their teacher, which may be rounded then."""
    net, teacher = build('adm'), execution.in_precision(build('adm').eval(), 'bf16')
    state = State()
    state.sampling_network = lambda net: Switched(net, teacher, 1.0) if sampled_too else net
    options = EasyDict(channels_last=False, checkpoint_activations=False, compiled=False)
    flat = FlatParameters(net)
    student = Trained(net, Gradients(net, flat), net, None)
    speed_up(options, student, None, teacher, WeightAverages(net, flat, 1.0, None, []), state)
    assert {p.dtype for p in teacher.parameters()} == (
        {torch.float32} if sampled_too else {torch.float32, torch.bfloat16}
    )


@pytest.mark.slow
def test_a_compiled_run_is_the_plain_run(tmp_path, digits, teacher):
    """train.py and generate.py themselves, four steps of mcd with T changing, then pictures: losses and weights up to the order of FP32 sums."""
    stats, weights, pictures = {}, {}, {}
    for name, ways in {'plain': [], 'compiled': ['--compile', '--channels_last']}.items():
        outdir = tmp_path / name
        run(
            'train.py',
            f'--outdir={outdir}',
            f'--data={digits}',
            '--cond=1',
            f'--teacher={teacher}',
            '--consistency=True',
            '--S=2',
            '--T_start=4',
            '--T_end=16',
            '--T_anneal_kimg=0.064',
            '--batch=32',
            '--tick=0.032',
            '--dump=0',
            '--duration=0.000128',
            *FAST,
            *ways,
            timeout=900,
        )
        stats[name] = [line['Loss/cd']['mean'] for line in lines(outdir / 'stats.jsonl')]
        snapshot = saved_snapshots(outdir)[0]
        weights[name] = load_network(str(snapshot)).state_dict()
        run(
            'generate.py',
            f'--network={snapshot}',
            f'--dest={outdir / "images.npz"}',
            '--seeds=0-7',
            '--batch=4',
            *ways,
            timeout=900,
        )
        pictures[name] = np.load(outdir / 'images.npz')['arr_0'].astype(int)
    assert stats['compiled'] == pytest.approx(stats['plain'], rel=1e-4) and len(stats['plain']) == 4
    for key, tensor in weights['plain'].items():
        torch.testing.assert_close(weights['compiled'][key], tensor, rtol=1e-3, atol=1e-5)
    assert np.abs(pictures['compiled'] - pictures['plain']).max() <= 1
