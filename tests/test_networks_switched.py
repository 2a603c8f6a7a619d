"""Two networks in one: which of them answers, and that it is saved, read, described and sampled like any other network."""

import copy
import itertools
import json
import math
import os
import pickle

import pytest
import torch
from foreign import assert_same_tensors, tensors
from helpers import assert_one_clear_error, invoke
from hostile_networks import Calls
from stock_edm import assert_stock_edm_agrees

import convert
import generate
import reconstruct_phema
from dnnlib import UserError
from training import consistency_ops as ops
from training import networks, samplers
from training.checkpoint import (
    constructor_arguments,
    load_network,
    network_digest,
    numeric_attributes,
    save_snapshot,
)
from training.networks import edm2 as networks_edm2
from training.networks.switched import Switched

ADM = dict(model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[])
EDM2 = dict(
    model_channels=16,
    channel_mult=[1],
    num_blocks=1,
    attn_resolutions=[],
    channels_per_head=16,
    use_fp16=False,
)


def part(cls=networks.EDMPrecond, seed=0, img_resolution=4, label_dim=3, **options):
    torch.manual_seed(seed)
    net = cls(img_resolution, 1, label_dim, **{**(EDM2 if cls is networks_edm2.Precond else ADM), **options})
    for parameter in net.parameters():  # the output layers start at zero
        torch.nn.init.normal_(parameter, std=0.1)
    return net.eval().requires_grad_(False)


def pair(switch=1.0):
    """Networks of two classes, with numbers set after construction, as training does."""
    high, low = part(networks.EDMPrecond, 0), part(networks.CMPrecond, 1, boundary=0.002, sigma_min=0.002)
    high.use_bf16, low.sigma_max = False, 90.0
    return Switched(high, low, switch)


@torch.no_grad()
def answer(net):
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return net(x, torch.tensor([0.5, 1.0, 30.0]), torch.eye(3))


@pytest.fixture
def snapshot(tmp_path):
    net = pair()
    save_snapshot(
        tmp_path / 'net.pkl',
        net,
        objective='tcm',
        solver='cm',
        sigmas=[80.0, 0.8, 0.0],
        dataset_kwargs={'resolution': 4},
    )
    return tmp_path / 'net.pkl', net


# ----------------------------------------------------------------------------
# Who answers.


class Stage(torch.nn.Module):
    """A network whose every output is one number, with what samplers look at."""

    def __init__(self, value, **attributes):
        super().__init__()
        self.weight, self.value, self.asked = torch.nn.Parameter(torch.zeros(1)), value, []
        vars(self).update(
            dict(img_resolution=2, img_channels=1, label_dim=0, sigma_min=0.0, sigma_max=80.0, metadata={}),
            **attributes,
        )

    def forward(self, x, sigma, class_labels=None):
        self.asked.append(torch.as_tensor(sigma).tolist())
        return torch.full_like(x, self.value)

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma).round(decimals=int(self.value))


@pytest.fixture
def latents():
    return torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(0))


def test_below_the_dividing_time_the_other_network_answers(latents):
    """sigma >= t' is the second stage's, below the first's; every solver works with the pair, which costs one evaluation a step."""
    high, low = Stage(0.25, metadata=dict(solver='cm')), Stage(-0.5, sigma_min=0.001)
    net = Switched(high, low, 1.0)
    assert bool((samplers.sample(net, latents) == 0.25).all()) and high.asked == [80.0]
    assert bool((samplers.sample(net, latents, taus=[1.0]) == 0.25).all()) and low.asked == []
    assert bool((samplers.sample(net, latents, mid_t=0.821) == -0.5).all()) and low.asked == [0.821]
    assert high.asked == [80.0, 80.0, 1.0, 80.0]
    high.asked.clear(), low.asked.clear()
    levels = ops.karras_sigmas(5, 0.002, 80, 7).tolist()
    net.round_sigma = torch.as_tensor
    samplers.sample(net, latents, solver='heun', steps=5)
    evaluated = [levels[0], *itertools.chain(*([s] * 2 for s in levels[1:]))]
    assert high.asked == pytest.approx([s for s in evaluated if s >= 1]) and low.asked == pytest.approx(
        [s for s in evaluated if s < 1]
    )


def test_each_image_of_a_batch_is_answered_by_its_own_network(latents):
    net = Switched(Stage(0.25), Stage(-0.5), 1.0)
    outputs = net(latents[:4], torch.tensor([0.5, 1.0, 80.0, 0.99]))
    assert outputs[:, 0, 0, 0].tolist() == [-0.5, 0.25, 0.25, -0.5] and bool(
        (outputs == outputs[:, :, :1, :1]).all()
    )


@pytest.mark.parametrize(
    'sigma',
    [0.7, torch.tensor(0.7), torch.tensor(0.7, dtype=torch.float64)],
    ids=['number', 'single', 'double'],
)
def test_the_dividing_time_is_the_second_stages_in_every_precision(latents, sigma):
    """0.7 in FP32 is less than in FP64: it is the same level all the same."""
    high, low = Stage(1.0), Stage(2.0)
    assert Switched(high, low, 0.7)(latents, sigma)[0, 0, 0, 0] == 1 and low.asked == []


def test_two_networks_look_like_one():
    """To samplers and generation: geometry, range of noise levels and their rounding, boundary, metadata, parameters."""
    high, low = (
        Stage(0.0, sigma_max=60.0, metadata=dict(objective='tcm')),
        Stage(2.0, sigma_min=0.01, boundary=0.01),
    )
    net = Switched(high, low, 1.0)
    assert (net.img_resolution, net.img_channels, net.label_dim) == (2, 1, 0) and len(
        list(net.parameters())
    ) == 2
    assert (net.sigma_min, net.sigma_max, net.boundary, net.metadata) == (
        0.01,
        60.0,
        0.01,
        dict(objective='tcm'),
    )
    assert net.round_sigma(torch.tensor([0.126, 2.7])).tolist() == pytest.approx([0.13, 3.0])
    assert [float(net.round_sigma(sigma)) for sigma in (0.126, 2.7)] == pytest.approx([0.13, 3.0])


def test_two_networks_that_do_not_fit_are_refused():
    high = Stage(0.0)
    for low, switch, pattern in (
        (Stage(0.0, label_dim=10), 1.0, 'label_dim differ'),
        (high, 1.0, 'two networks are needed'),
        (Switched(Stage(0.0), Stage(0.0), 1.0), 1.0, 'two networks are needed'),
        *((Stage(0.0), switch, 'no noise level') for switch in (0.0, -1.0, math.inf, math.nan)),
    ):
        with pytest.raises(ValueError, match=pattern):
            Switched(high, low, switch)


# ----------------------------------------------------------------------------
# In memory.


def test_it_is_made_without_copying_a_weight_and_remembers_how_its_networks_were_made():
    """At every snapshot and evaluation of a run a pair is made around an average."""
    high, low = part(seed=0), part(networks.CMPrecond, seed=1)
    net = Switched(high, low=low, switch=0.5)
    assert net.high is high and net.low is low
    assert net.init_args == (dict(class_name='EDMPrecond', args=(4, 1, 3), kwargs=high.init_kwargs),)
    assert net.init_kwargs == dict(
        low=dict(class_name='CMPrecond', args=(4, 1, 3), kwargs=low.init_kwargs), switch=0.5
    )
    assert list(constructor_arguments(net)) == ['high', 'low', 'switch']


@pytest.mark.parametrize(
    'duplicate', [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=['deepcopy', 'pickle']
)
def test_duplicates_share_no_tensor_and_answer_alike(duplicate):
    net = pair()
    twin = duplicate(net)
    assert torch.equal(answer(net), answer(twin)) and twin.init_args == net.init_args
    assert not {tensor.data_ptr() for tensor in tensors(net).values()} & {
        tensor.data_ptr() for tensor in tensors(twin).values()
    }
    twin.high.model.out_conv.weight.mul_(2)
    assert not torch.equal(answer(net), answer(twin))


# ----------------------------------------------------------------------------
# In files.


def test_a_snapshot_gives_back_both_networks_with_numbers_and_metadata(snapshot):
    path, net = snapshot
    loaded = load_network(path)
    assert type(loaded) is Switched and (type(loaded.high), type(loaded.low)) == (
        networks.EDMPrecond,
        networks.CMPrecond,
    )
    assert_same_tensors(net, loaded)
    assert torch.equal(answer(net), answer(loaded)) and not any(
        parameter.requires_grad for parameter in loaded.parameters()
    )
    assert (
        numeric_attributes(loaded) == numeric_attributes(net)
        and loaded.low.sigma_max == 90
        and loaded.boundary == 0.002
    )
    assert (loaded.init_args, loaded.init_kwargs) == (net.init_args, net.init_kwargs)
    assert loaded.high.init_args == (4, 1, 3) and loaded.low.init_kwargs == net.low.init_kwargs
    assert loaded.metadata['objective'] == 'tcm' and loaded.metadata['dataset_kwargs'] == {'resolution': 4}
    save_snapshot(path.parent / 'again.pkl', loaded, **loaded.metadata)
    assert load_network(path.parent / 'again.pkl').metadata == loaded.metadata, 'digest included'


@pytest.mark.parametrize(
    'classes',
    [(networks_edm2.Precond, networks_edm2.Precond), (networks.EDMPrecond, networks_edm2.Precond)],
    ids=str,
)
def test_networks_of_edm2_can_be_the_two(tmp_path, classes):
    net = Switched(part(classes[0], 0), part(classes[1], 1), 1.0)
    save_snapshot(tmp_path / 'net.pkl', net)
    loaded = load_network(tmp_path / 'net.pkl')
    assert_same_tensors(net, loaded)
    assert torch.equal(answer(net), answer(loaded))


def test_a_snapshot_has_every_weight_once_and_every_source_once(tmp_path):
    """A second copy of either network would make it half as large again."""
    net = Switched(part(seed=0, model_channels=32), part(seed=1, model_channels=32), 1.0)
    save_snapshot(tmp_path / 'net.pkl', net)
    data, weights = (
        (tmp_path / 'net.pkl').read_bytes(),
        sum(tensor.nbytes for tensor in tensors(net).values()),
    )
    assert weights < len(data) < 1.4 * weights
    assert data.count(b'class DhariwalUNet(') == data.count(b'class Switched(') == 1


@pytest.mark.parametrize(
    'change',
    [
        lambda net: net.high.model.out_conv.weight.mul_(1.001),
        lambda net: net.low.model.out_conv.weight.mul_(1.001),
        lambda net: setattr(net, 'switch', 1.5),
        lambda net: setattr(net.high, 'use_fp16', True),
        lambda net: setattr(net.low, 'sigma_data', 0.6),
    ],
    ids=['weight above', 'weight below', 'dividing time', 'switch above', 'number below'],
)
def test_whatever_changes_in_either_network_changes_the_digest(change):
    net = pair()
    before = network_digest(net, {})
    assert before == network_digest(pair(), {})
    change(net)
    assert network_digest(net, {}) != before


def test_which_network_is_which_is_part_of_the_digest():
    net = Switched(part(seed=0), part(seed=1), 1.0)
    assert network_digest(net, {}) != network_digest(Switched(net.low, net.high, 1.0), {})


def test_a_change_by_a_tool_that_rewrites_the_pickle_is_noticed(snapshot):
    path, _ = snapshot
    data = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(data))
    load_network(path)
    data['ema'].low.model.out_conv.weight.mul_(1.001)
    path.write_bytes(pickle.dumps(data))
    with pytest.raises(UserError, match='digest'):
        load_network(path)


def test_what_could_not_be_read_back_is_not_saved(tmp_path):
    with pytest.raises(TypeError, match='Stage is none of our networks'):
        save_snapshot(tmp_path / 'net.pkl', Switched(Stage(0.0), Stage(0.0), 1.0))
    assert not list(tmp_path.iterdir())


def test_stock_edm_loads_it_with_nothing_of_ours_at_hand(tmp_path):
    """Sigma 0.5 wants one network, 2.0 the other."""
    given = dict(
        x=torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)),
        sigma=torch.tensor([0.5, 2.0]),
        labels=torch.eye(3)[:2],
    )
    nets = {
        'adm': pair(),
        'edm2': Switched(part(networks_edm2.Precond, 0), part(networks.EDMPrecond, 1), 1.0),
    }
    for name, net in nets.items():
        save_snapshot(tmp_path / f'{name}.pkl', net, dataset_kwargs={'resolution': 8})
    assert_stock_edm_agrees(tmp_path, nets, given)


# ----------------------------------------------------------------------------
# Hostile files.


def persistent(net, class_name=None, **changes) -> Calls:
    """A network's record with another class name or state."""
    function, (meta,) = net.__reduce__()
    return Calls(
        function, dict(meta, class_name=class_name or meta['class_name'], state={**meta['state'], **changes})
    )


def described(net, **changes) -> dict:
    return dict(dict(class_name=type(net).__name__, args=net.init_args, kwargs=net.init_kwargs), **changes)


@pytest.fixture
def refused(tmp_path):
    """Asserts that a network's record is refused with one message that names the file and matches a pattern; none of it runs."""
    canary = tmp_path / 'canary'

    def check(record, pattern):
        path = tmp_path / 'hostile.pkl'
        path.write_bytes(pickle.dumps(dict(ema=record, dataset_kwargs={}), protocol=4))
        with pytest.raises(UserError, match=pattern) as caught:
            load_network(path)
        message = str(caught.value)
        assert 'hostile.pkl' in message and '\n' not in message and len(message) < 1000

    check.canary = canary
    yield check
    assert not canary.exists(), 'something in the file was executed'


def nested(depth):
    description = described(part())
    for _ in range(depth):
        description = dict(class_name='Switched', args=(description, described(part()), 1.0), kwargs={})
    return description


ARGUMENTS = {
    'no networks': ((3, 4, 1.0), "Switched' of something else than two networks"),
    'lists': (([], [], 1.0), 'of something else'),
    'one': ((described(part()), 1.0), "missing 1 required positional argument: 'switch'"),
    'three': ((*[described(part())] * 3, 1.0), 'takes 3 positional arguments but 4'),
    'very many': ((described(part()),) * 16 + (1.0,), 'asks for a network|positional arguments'),
    'an unknown class': (
        (described(part()), described(part(), class_name='Popen'), 1.0),
        "holds a 'Popen', which is none of our networks",
    ),
    'no class': ((described(part()), {}, 1.0), 'holds a None'),
    'a class that is no name': (
        (described(part()), described(part(), class_name=['EDMPrecond']), 1.0),
        'cannot be used',
    ),
    'no arguments': (
        (described(part()), described(part(), args=None), 1.0),
        'no record of its constructor arguments',
    ),
    'sizes': (
        (described(part()), described(part(), kwargs=dict(ADM, num_blocks=10**9)), 1.0),
        'num_blocks is beyond 32',
    ),
    'other images': ((described(part()), described(part(img_resolution=8)), 1.0), 'img_resolution differ'),
    'other labels': ((described(part()), described(part(label_dim=0)), 1.0), 'label_dim differ'),
    'pairs of pairs': ((nested(1), described(part()), 1.0), 'of something else'),
    'pairs without end': ((nested(25), described(part()), 1.0), 'nests values without end'),
    'a level that is none': ((described(part()), described(part()), math.nan), 'no noise level nan'),
    'a level in words': ((described(part()), described(part()), 'one'), 'cannot be built from'),
    'no level': ((described(part()), described(part()), None), 'cannot be built from'),
}


@pytest.mark.parametrize('name', ARGUMENTS)
def test_constructor_arguments_that_make_no_pair_are_refused(refused, name):
    args, pattern = ARGUMENTS[name]
    refused(persistent(Switched(part(seed=0), part(seed=1), 1.0), _init_args=args), pattern)


def modules(net, **changes):
    return {'_modules': {**net._modules, **changes}}


@pytest.mark.parametrize(
    'changes, pattern',
    [
        (
            lambda net: dict(switch=2.0),
            'contradicts itself: switch is 2.0, its constructor arguments say 1.0',
        ),
        (lambda net: dict(switch='x'), 'switch is'),
        (
            lambda net: modules(net, low=persistent(net.low, class_name='CMPrecond')),
            "low is a 'CMPrecond', its constructor arguments say 'EDMPrecond'",
        ),
        (
            lambda net: modules(net, low=torch.nn.ModuleDict(net.low._modules)),
            'contradicts itself: low is a None',
        ),
        (lambda net: modules(net, low=persistent(net.low, img_channels=3)), 'low.img_channels is 3'),
        (lambda net: modules(net, low=persistent(net.low, sigma_min='x')), "low.sigma_min is 'x'"),
        (lambda net: modules(net, low=part(model_channels=16)), 'its constructor arguments say'),
        (lambda net: modules(net, low=3), 'something else where the module'),
        (lambda net: modules(net, third=part()), 'unexpected tensors: third'),
        (lambda net: {'_modules': {'high': net.high}}, 'lacks tensors: low'),
        (lambda net: {'_modules': 3}, 'something else where the module'),
    ],
    ids=[
        'level',
        'level in words',
        'class',
        'container',
        'channels',
        'number',
        'shape',
        'number for a network',
        'third',
        'one',
        'none',
    ],
)
def test_networks_that_are_not_what_the_arguments_say_are_refused(refused, changes, pattern):
    net = Switched(part(seed=0), part(seed=1), 1.0)
    refused(persistent(net, **changes(net)), pattern)


@pytest.mark.parametrize('place', ['argument', 'network', 'attribute', 'tensor'])
def test_a_call_hidden_in_one_of_the_networks_is_refused_by_name(refused, place):
    net, call = Switched(part(seed=0), part(seed=1), 1.0), Calls(os.system, f'touch {refused.canary}')
    if place == 'tensor':
        net.low.model.out_conv._parameters['weight'] = call
    changes = dict(
        argument=dict(_init_args=(call, call, 1.0)),
        network=modules(net, low=call),
        attribute=modules(net, low=persistent(net.low, x=call)),
        tensor={},
    )
    refused(persistent(net, **changes[place]), r"names '[a-z_.]*system', which such a file has no use for")


def test_embedded_source_is_not_run(refused, tmp_path):
    """Neither the pair's nor that of a network in it."""

    def harmful(net, **changes):
        call = persistent(net, **changes)
        call.args[0]['module_src'] = f'open({str(refused.canary)!r}, "w")'
        return call

    net = Switched(part(seed=0), part(seed=1), 1.0)
    record = harmful(net, **modules(net, low=harmful(net.low)))
    (tmp_path / 'net.pkl').write_bytes(pickle.dumps(dict(ema=record, dataset_kwargs={}), protocol=4))
    assert_same_tensors(load_network(tmp_path / 'net.pkl'), net)


# ----------------------------------------------------------------------------
# With the scripts.


def test_it_is_sampled_as_its_snapshot_says_and_info_tells_of_both_networks(snapshot, tmp_path):
    path, _ = snapshot
    done = invoke(generate.main, f'--network={path}', f'--outdir={tmp_path / "out"}', '--seeds=0-3')
    assert '(cm, 2 evaluations each)' in done.output and len(list((tmp_path / 'out').glob('*.png'))) == 4, (
        done.output
    )
    facts = json.loads(invoke(convert.main, 'info', path, '--json').stdout)
    assert (facts['preconditioning'], facts['objective'], facts['grid']) == (
        'Switched',
        'tcm',
        [80.0, 0.8, 0.0],
    )
    assert [facts['arguments'][name]['class_name'] for name in ('high', 'low')] == ['EDMPrecond', 'CMPrecond']
    assert 'CMPrecond' in invoke(convert.main, 'info', path).output


def test_it_goes_to_safetensors_and_back_and_not_to_diffusers(snapshot, tmp_path):
    path, _ = snapshot
    assert invoke(convert.main, '--to=safetensors', path, tmp_path / 'net.safetensors').exit_code == 0
    assert (
        invoke(
            convert.main, '--from=safetensors', tmp_path / 'net.safetensors', tmp_path / 'back.pkl'
        ).exit_code
        == 0
    )
    assert load_network(tmp_path / 'back.pkl').metadata == load_network(path).metadata, 'digest included'
    assert_one_clear_error(invoke(convert.main, '--to=diffusers', path, tmp_path / 'folder'), 'Switched')


def test_averages_of_other_widths_are_reconstructed_around_the_same_first_stage(tmp_path):
    """Of four snapshots of two widths: the weights above are combined; those below, which are the same in all, stay to rounding."""
    low = part(seed=9)
    for nimg, std in itertools.product((1000, 2000), (0.05, 0.1)):
        net = Switched(part(seed=nimg + int(std * 100)), low, 1.0)
        save_snapshot(
            tmp_path / f'network-snapshot-{nimg // 1000:06d}-{std:.3f}.pkl',
            net,
            objective='tcm',
            nimg=nimg,
            kimg=nimg / 1e3,
            ema_std=std,
            ema=f'phema-{std:.3f}',
        )
    done = invoke(
        reconstruct_phema.main, f'--indir={tmp_path}', f'--outdir={tmp_path / "out"}', '--outstd=0.07'
    )
    assert done.exit_code == 0, done.output
    made = load_network(next((tmp_path / 'out').glob('*.pkl')))
    torch.testing.assert_close(
        dict(made.low.named_parameters()), dict(low.named_parameters()), rtol=1e-5, atol=1e-6
    )
    assert not torch.equal(made.high.model.out_conv.weight, net.high.model.out_conv.weight)
