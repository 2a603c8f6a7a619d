"""Guided teachers in every distilling objective, labels dropped in training, and what runs record of both."""

import functools
import json
import shutil

import helpers
import pytest
import torch
from helpers import FAST, TINY_NETWORK, assert_one_clear_error, lines
from losses import Loss
from teachers import ADM, DIGITS

import train
from experiments import comparison
from training import command_line, guidance, networks
from training.checkpoint import load_network, network_digest, save_snapshot
from training.objectives import OBJECTIVES, loss_diffusion
from training.rng import SampleRng

invoke = functools.partial(helpers.invoke, train.main)
SEGMENTS = dict(S=2, T_start=4, T_end=4, T_anneal_kimg=0, cd_loss='l2')
DISTILLING = {
    'mcd': dict(SEGMENTS, keep_ties=True, top_mass=0.5, anchor_hops=2),
    'direct': dict(SEGMENTS, substeps=2),
    'pd': dict(S=2),
    'cm-cd': dict(cm_loss='l2', N=4),
    'scd': dict(warmup_nimg=0, tangent_weight='prior', tangent_c=10.0),
    'flowmap': dict(target='hop', steps=[1, 2], T=4, cd_loss='l2', batch_size=16, reuse=1),
    'mm': dict(S=2, batch_size=16),
    'sid': dict(batch_size=16, aux_ahead=-1),  # the student's turn, which evaluates the teacher
}


def test_every_objective_with_a_diffusion_teacher_is_here_and_has_the_options():
    names = {name for name, objective in OBJECTIVES.items() if objective.teacher == 'diffusion'}
    assert names == set(DISTILLING) == {name for name, own in command_line.OWN.items() if 'guide' in own}


# ----------------------------------------------------------------------------
# Losses.


def random_net(seed, **changes):
    torch.manual_seed(seed)
    net = networks.EDMPrecond(**{**DIGITS, **ADM, **changes}).eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.1)
    return net


class ByHand(torch.nn.Module):
    """A teacher that guides image by image, in plain Python."""

    def __init__(self, net, guide, weight, interval):
        super().__init__()
        self.net, self.guide, self.weight, self.interval = net, guide, weight, interval

    def forward(self, x, sigma, labels):
        def denoise(x, sigma, labels):
            strong = self.net(x, sigma, labels).double()
            if not self.interval[0] <= float(sigma) <= self.interval[1]:
                return strong
            return (1 - self.weight) * self.guide(x, sigma, labels).double() + self.weight * strong

        return torch.cat([denoise(*image) for image in zip(x.split(1), sigma.split(1), labels.split(1))])


@pytest.mark.parametrize('guide', ['none-label', 'unconditional', 'smaller'])
@pytest.mark.parametrize('objective', DISTILLING)
def test_a_guided_teacher_is_what_it_is_by_hand_in_every_loss(objective, guide):
    """The student is another network. An interval about half of whose levels are drawn."""
    net, interval = random_net(0), (0.05, 10.0)
    other = random_net(1, label_dim=0) if guide == 'unconditional' else random_net(1, model_channels=8)
    guided = guidance.GuidedDenoiser(net, None if guide == 'none-label' else other, 3.0, interval)
    of_hand = (
        other
        if guide == 'smaller'
        else lambda x, sigma, labels: (net if guide == 'none-label' else other)(x, sigma)
    )
    of_student = {'cm-cd': dict(boundary=0.002), 'flowmap': dict(two_time=True)}
    student = random_net(2, **of_student.get(objective, {}))
    images, labels = torch.rand([16, 1, 8, 8]) * 2 - 1, torch.eye(10)[torch.arange(16) % 10]

    def values(teacher):
        loss = Loss(objective, teacher, student, **DISTILLING[objective])
        loss.state.auxiliary = random_net(3)
        return loss(student, images, labels, SampleRng(3, 0, 16))

    got, expected, unguided = values(guided), values(ByHand(net, of_hand, 3.0, interval)), values(net)
    assert torch.allclose(got, expected, rtol=1e-3)
    assert not torch.allclose(got, unguided, rtol=0.05)
    assert torch.equal(values(guidance.GuidedDenoiser(net, other, 1.0)), unguided)


def test_costs_count_the_guide():
    """Two evaluations where there was one: of mcd the hop's 2 and the anchor's 2 x 4 on 1/64 of the images,
    of direct 2 x 3 by Heun and 3 by iPNDM, of pd 2 in the first of its three rounds, of 10, 20 and 20 steps;
    of scd and mm 1; of sid 2, of which one is a gradient, in every other step; with w = 1 none."""

    def cost(objective, *words):
        common = ['--outdir=x', '--data=x', '--teacher=x.pkl', f'--objective={objective}']
        guide = [[], ['--guide=none-label', '--guidance=2'], ['--guide=g.pkl', '--guidance=1']]
        return [command_line.parse([*common, *words, *options]).own.cost() for options in guide]

    for words, more in (
        (['mcd', '--T_end=64', '--anchor_hops=4'], 2 + 8 / 64),
        (['mcd', '--no_terminal_anchor', '--hop=ddim'], 1),
        (['direct', '--substeps=3'], 6),
        (['direct', '--substeps=3', '--solver=ipndm'], 3),
        (['pd', '--S_start=4', '--S=1', '--stage_steps=10'], 2 * 10 / 50),
        (['pd', '--S_start=4', '--S=4'], 2),
        (['cm-cd'], 2),
        (['scd'], 1),
        (['mm'], 1),
        (['sid'], 1),
    ):
        plain, guided, no_effect = cost(*words)
        assert plain == no_effect and guided == pytest.approx(plain + more), words

    # compare.py buys fewer steps.
    request = comparison.Request(['direct'], [8], [0], 9000, 128, True, [], for_all=['--substeps=2'])
    (plain,) = comparison.plan(request)
    (guided,) = comparison.plan(
        comparison.Request(
            ['direct'],
            [8],
            [0],
            9000,
            128,
            True,
            [],
            for_all=['--substeps=2', '--guide=none-label', '--guidance=2'],
        )
    )
    assert (plain.training.cost, guided.training.cost) == (7, 11) and guided.training.steps == 9000 // 11


# ----------------------------------------------------------------------------
# Labels dropped in training.


def test_labels_are_dropped_by_the_place_of_an_image_in_the_stream():
    """Whatever the batch: 64 images at once, or in parts of 16. About a fifth, and the others as they are."""
    labels = torch.eye(10)[torch.arange(64) % 10]
    whole = loss_diffusion.drop_labels(labels, SampleRng(5, 64, 64), 0.2)
    parts = [
        loss_diffusion.drop_labels(labels[i : i + 16], SampleRng(5, 64 + i, 16), 0.2)
        for i in range(0, 64, 16)
    ]
    assert torch.equal(whole, torch.cat(parts))
    dropped = whole.sum(dim=1) == 0
    assert 5 <= dropped.sum() <= 21 and torch.equal(whole[~dropped], labels[~dropped])
    assert not torch.equal(whole, loss_diffusion.drop_labels(labels, SampleRng(6, 64, 64), 0.2))
    assert (
        loss_diffusion.drop_labels(labels, None, 0.0) is labels
        and loss_diffusion.drop_labels(None, None, 0.5) is None
    )


@pytest.mark.parametrize('kind', ['edm', 'edm2', 'vp', 've'])
def test_every_diffusion_loss_drops_labels_and_no_other_random_number_changes(kind):
    seen = []

    def net(x, sigma, labels, augment_labels=None, dropout_masks=None, return_logvar=False):
        seen.append((x, sigma, labels))
        return (x, x.new_zeros(len(x), 1, 1, 1)) if return_logvar else x

    net.training = False
    images, labels = torch.zeros(32, 1, 8, 8), torch.ones(32, 10)
    for options in ({}, dict(label_dropout=0.5)):
        loss = Loss(loss_diffusion, **dict(kind=kind, **options))
        loss(net, images, labels, SampleRng(0, 0, 32))
    (x, sigma, all_labels), (same_x, same_sigma, some) = seen
    assert torch.equal(x, same_x) and torch.equal(sigma, same_sigma) and torch.equal(all_labels, labels)
    assert 0 < some.sum() < labels.sum() and set(some.mean(dim=1).tolist()) == {0.0, 1.0}


TEACHER = [
    '--cond=1',
    *TINY_NETWORK,
    *FAST,
    '--batch=32',
    '--tick=0.032',
    '--dump=1',
    '--ema=10kimg',
    '--augment=0',
]


def test_training_without_some_labels_is_recorded_and_resumes(tmp_path, digits):
    options = [f'--outdir={tmp_path}', f'--data={digits}', *TEACHER]
    result = invoke(*options, '--label_dropout=0.2', '--duration=0.000064')
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / 'training_options.json').read_text())
    assert record['loss']['label_dropout'] == 0.2
    net = load_network(max(tmp_path.glob('network-snapshot-*.pkl')))
    assert net.metadata['label_dropout'] == 0.2
    guidance.check_label_dropout(net, 'net')

    # By its folder alone it goes on with them; with another share, it would be another run.
    result = invoke(f'--resume={tmp_path}', '--duration=0.000096', '--dry-run')
    assert json.loads(result.stdout)['loss']['label_dropout'] == 0.2
    result = invoke(f'--resume={tmp_path}', '--label_dropout=0')
    assert_one_clear_error(result, 'label_dropout 0.2 -> 0.0', '--resume-override')

    # Without the option, records are as they were.
    plain = json.loads(invoke(f'--outdir={tmp_path / "plain"}', *options[1:], '-n').stdout)
    assert not any('label_dropout' in part for part in (plain['loss'], plain)) and plain['guide'] is None


@pytest.mark.parametrize(
    'words, said',
    [
        (['--label_dropout=0.1'], ['--label_dropout=0.1', '--cond=1']),
        (['--cond=1', '--label_dropout=1'], ['--label_dropout']),
        (['--cond=1', '--label_dropout=0.1', '--objective=ect'], ['--objective=diffusion']),
        (['--guide=none-label', '--guidance=2'], ['--guid', '--objective=mcd']),
        (['--objective=tcm', '--teacher=x.pkl', '--guide=x.pkl', '--guidance=2'], ['--guid', 'tcm']),
        (['--objective=mcd', '--teacher=x.pkl', '--guidance=2'], ['--guidance', '--guide=PKL']),
        (['--objective=pd', '--teacher=x.pkl', '--guide=x.pkl'], ['--guidance=W']),
        (['--objective=direct', '--teacher=x.pkl', '--guidance_interval=1,2'], ['--guide=PKL']),
    ],
)
def test_options_that_do_not_go_together_are_usage_errors(words, said):
    assert_one_clear_error(invoke('--outdir=x', '--data=x', *words), *said, status=2)


# ----------------------------------------------------------------------------
# Runs.


@pytest.fixture(scope='module')
def dropped(teacher, tmp_path_factory):
    """The digits teacher, whose snapshot says that labels were dropped."""
    path, net = tmp_path_factory.mktemp('dropped') / 'dropped.pkl', load_network(teacher)
    save_snapshot(path, net, **dict(net.metadata, label_dropout=0.1))
    return path


@pytest.fixture(scope='module')
def guide(tmp_path_factory):
    path = tmp_path_factory.mktemp('guide') / 'guide.pkl'
    save_snapshot(path, random_net(1, model_channels=8), objective='diffusion')
    return path


SHORT = [
    '--cond=1',
    *FAST,
    '--batch=32',
    '--ema=10kimg',
    '--dropout=0',
    '--tick=0.032',
    '--dump=1',
    '--snap=1',
    '--keep=9',
]
OPTIONS = {
    'mcd': ['--S=2', '--T_start=4', '--T_end=4', '--T_anneal_kimg=1'],
    'direct': ['--S=2', '--T_end=4', '--substeps=2'],
    'cm-cd': ['--N=4', '--cm_loss=l2'],
}
WITHOUT_LABEL = ['--guide=none-label', '--guidance=2.5', '--guidance_interval=0.1,20']


def distill(folder, digits, teacher, objective, *options, duration=0.000064):
    result = invoke(
        f'--outdir={folder}',
        f'--data={digits}',
        f'--teacher={teacher}',
        f'--objective={objective}',
        *SHORT,
        *OPTIONS[objective],
        *options,
        f'--duration={duration}',
    )
    assert result.exit_code == 0, result.output
    return result


def last_path(folder):
    return max(folder.glob('network-snapshot-*.pkl'), key=lambda path: load_network(path).metadata['nimg'])


def last(folder):
    return load_network(last_path(folder))


def same_weights(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize('objective', OPTIONS)
def test_a_guided_distillation_records_its_guide_and_resumes_by_its_folder_alone(
    tmp_path, digits, dropped, guide, objective
):
    guide = shutil.copy(guide, tmp_path / 'guide.pkl')
    by = (
        WITHOUT_LABEL
        if objective == 'mcd'
        else [f'--guide={guide}', '--guidance=2.5', '--guidance_interval=0.1,20']
    )
    digest = network_digest(load_network(dropped if objective == 'mcd' else guide), {})
    said = distill(tmp_path / 'whole', digits, dropped, objective, *by, duration=0.000096)
    assert 'Guidance: ' in said.stdout and 'with weight 2.5 at noise levels from 0.1 to 20' in said.stdout
    distill(tmp_path / 'half', digits, dropped, objective, *by, duration=0.000064)
    result = invoke(f'--resume={tmp_path / "half"}', '--duration=0.000096')
    assert result.exit_code == 0, result.output
    whole, half = last(tmp_path / 'whole'), last(tmp_path / 'half')
    assert same_weights(whole, half)

    expected = dict(
        guide=by[0].partition('=')[2], guide_digest=digest, guidance=2.5, guidance_interval=[0.1, 20.0]
    )
    for record in (
        whole.metadata,
        half.metadata,
        json.loads((tmp_path / 'half/training_options.json').read_text()),
    ):
        assert {name: record[name] for name in expected} == expected

    # A recorded configuration repeats it.
    again = invoke(
        f'--config={tmp_path / "half/training_options.json"}', f'--outdir={tmp_path / "again"}', '-n'
    )
    assert again.exit_code == 0, again.output
    assert {name: json.loads(again.stdout)[name] for name in expected} == expected

    # Another guide, weight or interval makes it another run; the same guide elsewhere does not.
    for options, words in (
        (['--guidance=3'], ['guidance 2.5 -> 3.0']),
        (['--guidance_interval=0.1,10'], ['guidance_interval']),
        (
            ['--guide=none-label'] if objective != 'mcd' else [f'--guide={guide}'],
            [f'with {by[0]}', 'guided otherwise'],
        ),
    ):
        refused = invoke(f'--resume={tmp_path / "half"}', *options, '--duration=0.000128')
        assert_one_clear_error(refused, *words, '--resume-override')
    moved = guide.rename(tmp_path / 'moved.pkl')
    if objective != 'mcd':
        resumed = [f'--resume={tmp_path / "half"}', '--duration=0.000128', '-n']
        assert_one_clear_error(invoke(*resumed), 'give its present place by --guide=PATH')
        result = invoke(*resumed, f'--guide={moved}')
        assert result.exit_code == 0 and json.loads(result.stdout)['guide'] == str(moved)
        assert 'Resuming with duration' in result.stderr and 'guide' not in result.stderr


def test_with_weight_1_a_distillation_is_the_same_bit_for_bit(tmp_path, digits, dropped):
    distill(tmp_path / 'plain', digits, dropped, 'mcd')
    distill(tmp_path / 'one', digits, dropped, 'mcd', '--guide=none-label', '--guidance=1')
    distill(tmp_path / 'two', digits, dropped, 'mcd', '--guide=none-label', '--guidance=2')
    plain, one, two = (last(tmp_path / name) for name in ('plain', 'one', 'two'))
    assert same_weights(plain, one) and not same_weights(plain, two)
    assert 'guidance' not in plain.metadata and one.metadata['guidance'] == 1.0

    # A run without a guide resumes as such, and not with one.
    refused = invoke(
        f'--resume={tmp_path / "plain"}', '--guide=none-label', '--guidance=2', '--duration=0.000096'
    )
    assert_one_clear_error(refused, 'without --guide', 'with --guide=none-label')


def test_the_guided_teacher_is_evaluated(tmp_path, digits, dropped, rulers):
    """By --val_teacher, with the guide's evaluations counted: of 35, those at levels in the interval."""
    validation = [
        '--val=1',
        '--val_teacher=1',
        f'--val_ref={rulers / "pca.npz"}',
        f'--val_detector={rulers / "pca.pt"}',
    ]
    found = {}
    for name, options in (('plain', []), ('guided', WITHOUT_LABEL)):
        distill(
            tmp_path / name, digits, dropped, 'mcd', *options, *validation, '--val_num=8', duration=0.000032
        )
        found[name] = lines(tmp_path / name / 'metrics-val.jsonl')
    plain, guided = (records[0] for records in found.values())
    assert plain['ema'] == guided['ema'] == 'teacher' and plain['fid'] != guided['fid']
    assert plain['nfe'] == 35 < guided['nfe'] < 70 and 'guidance' not in plain
    assert guided['guidance'] == dict(guide='none-label', guidance=2.5, guidance_interval=[0.1, 20.0])
    assert all('guidance' not in record for record in found['guided'][1:])  # the student


def test_progressive_distillation_is_guided_in_its_first_round(tmp_path, digits, dropped, guide):
    """Later rounds have the student of the one before as teacher, and say which guide it descends from."""
    options = [f'--data={digits}', '--objective=pd', f'--teacher={dropped}', *SHORT]
    options += ['--S_start=2', '--S=1', '--stage_steps=1']
    by = [f'--guide={guide}', '--guidance=2.5']
    result = invoke(f'--outdir={tmp_path / "run"}', *options, *by)
    assert result.exit_code == 0, result.output
    assert result.stdout.count('Guidance: ') == 2  # recorded, and announced, in both
    expected = dict(guide=str(guide), guide_digest=network_digest(load_network(guide), {}), guidance=2.5)
    nets = [last(tmp_path / 'run' / stage) for stage in ('S0002', 'S0001')]
    for net in nets:
        assert {name: net.metadata[name] for name in expected} == expected

    # The second round by itself, from the first one's student, without a guide.
    alone = [*options, f'--teacher={last_path(tmp_path / "run/S0002")}', '--S_start=1']
    result = invoke(f'--outdir={tmp_path / "alone"}', *alone)
    assert result.exit_code == 0, result.output
    assert same_weights(last(tmp_path / 'alone/S0001'), nets[1])

    # It resumes by its folder; with other guidance it is refused, even where no state is left.
    assert invoke(f'--resume={tmp_path / "run"}').exit_code == 0
    for path in (tmp_path / 'run').glob('S*/training-state-*.pt'):
        path.unlink()
    refused = invoke(f'--resume={tmp_path / "run"}', '--guidance=3')
    assert_one_clear_error(refused, 'S0002', 'guided otherwise')


def test_a_guide_that_does_not_fit_the_teacher_is_refused_before_anything_is_written(
    tmp_path, digits, dropped, teacher
):
    def refused(*options, teacher=dropped, words=()):
        result = invoke(
            f'--outdir={tmp_path / "run"}',
            f'--data={digits}',
            '--objective=direct',
            f'--teacher={teacher}',
            *SHORT,
            *options,
            '--guidance=2',
        )
        assert_one_clear_error(result, '--guide', f'--teacher={teacher}', *words)
        assert not (tmp_path / 'run').exists()

    def saved(name, net, **metadata):
        save_snapshot(tmp_path / name, net, objective='diffusion', **metadata)
        return tmp_path / name

    refused('--guide=none-label', teacher=teacher, words=['--label_dropout'])
    refused(f'--guide={dropped}', words=['itself'])
    refused(f'--guide={saved("large.pkl", random_net(0, img_resolution=16))}', words=['16x16x1', '8x8x1'])
    refused(f'--guide={saved("classes.pkl", random_net(0, label_dim=3))}', words=['3 classes', '10 classes'])

    # Not finite, and without the augmentation labels that the teacher has.
    broken = random_net(0)
    next(broken.parameters()).fill_(float('nan'))
    result = invoke(
        f'--outdir={tmp_path / "run"}',
        f'--data={digits}',
        '--objective=direct',
        f'--teacher={dropped}',
        *SHORT,
        f'--guide={saved("broken.pkl", broken)}',
        '--guidance=2',
    )
    assert_one_clear_error(result, '--guide=', 'not finite')
    augmented = saved('augmented.pkl', random_net(0, augment_dim=9))
    plain = saved('plain.pkl', random_net(1))
    options = [f'--teacher={augmented}', f'--guide={plain}', '--guidance=2', '--augment=0.1']
    result = invoke(
        f'--outdir={tmp_path / "run"}', f'--data={digits}', '--objective=direct', *SHORT, *options
    )
    assert_one_clear_error(result, '--augment=0.1', f'--guide={plain}')
