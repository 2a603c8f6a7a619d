"""Every objective through train.py: a short run on digits, resumed half-way, and what its snapshot says."""

import json
import os
import shutil

import pytest
import torch
from click.testing import CliRunner
from helpers import TINY_NETWORK, assert_one_clear_error, lines
from objective_runs import RUNS, SHORT, SLOW, arguments

import generate
import train
from training.checkpoint import load_network, load_state, network_digest, save_snapshot
from training.consistency_ops import student_grid
from training.interchange.describe import describe_state
from training.objectives import OBJECTIVES
from training.saved_files import saved_snapshots, saved_states


def invoke(command, *arguments):
    result = CliRunner().invoke(command, list(map(str, arguments)), prog_name='script')
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def last_snapshot(folder, suffix=''):
    """The newest snapshot of the EMA, or of the average whose width is the suffix of its name."""
    newest = saved_snapshots(folder)[0]
    return newest.with_name(f'{newest.stem}{suffix}.pkl')


def test_every_student_objective_is_run_here():
    assert {case.partition(',')[0] for case in RUNS} | {'diffusion', 'pd'} == set(OBJECTIVES)


@pytest.mark.parametrize(
    'case', [pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in RUNS]
)
def test_a_run_learns_ends_bit_for_bit_as_a_resumed_one_and_is_sampled(
    tmp_path, digits, teacher, consistency_model, case
):
    """Twenty steps; against ten, and ten more from the state that they left. The first tick is a single step: its loss is chance."""
    objective = case.partition(',')[0]
    kind = OBJECTIVES[objective]
    options = [*arguments(case, digits, teacher, consistency_model), '--tick=0.64']
    whole, half = tmp_path / 'whole', tmp_path / 'half'
    invoke(train.main, f'--outdir={whole}', *options, '--duration=0.00128')
    options += ['--T_anneal_kimg=0.64'] if 'T_end' in kind.options and 'T_anneal' not in str(options) else []
    invoke(train.main, f'--outdir={half}', *options, '--duration=0.00064')
    invoke(train.main, f'--outdir={half}', *options, '--duration=0.00128', f'--resume={half}')
    for suffix in ('-0.100', ''):
        networks = [load_network(last_snapshot(folder, suffix)) for folder in (whole, half)]
        assert all(torch.equal(a, b) for a, b in zip(*(net.state_dict().values() for net in networks)))
    ticks = lines(whole / 'stats.jsonl')
    # The student's turn may come after the first tick, a single step.
    losses = [tick[f'Loss/{kind.module().NAME}']['mean'] for tick in ticks[1:]]
    if 's0' in kind.options and objective != 'cm-cd':  # ever finer grids, whose losses do not compare
        assert ticks[-1]['Edges/T']['mean'] > ticks[0]['Edges/T']['mean']
    elif kind.auxiliary:  # so says the student's
        states = [load_state(saved_states(folder)[0])['auxiliary'] for folder in (whole, half)]
        weights, others = (torch.cat([t.flatten() for t in state['net'].values()]) for state in states)
        assert torch.equal(weights, others)
        assert {int(state['update']['optimizer']['state'][0]['step']) for state in states} == {
            20 - (20 - (3 if objective == 'mm' else 1)) // 2
        }
        assert {f'Loss/{name}' for name in ('auxiliary', objective)} <= ticks[-1].keys()
    elif 'Tangent/warmup' in ticks[0]:  # the value says nothing of progress
        assert ticks[0]['Tangent/warmup']['mean'] == 0 and ticks[-1]['Tangent/warmup']['mean'] == 1
        assert ticks[-1]['Tangent/rms']['mean'] > 0
    else:
        assert losses[-1] < losses[0], losses

    metadata = networks[0].metadata
    assert (metadata['objective'], metadata['kimg']) == (objective, 1.28)
    if '--S=2' in options:
        grid = student_grid(
            2,
            metadata['sigma_min'],
            metadata['sigma_max'],
            7,
            metadata.get('student_grid', 'full'),
            metadata.get('sigma_grid', 'karras'),
        )
        assert metadata['sigmas'] == grid.tolist() and (metadata.get('sigma_grid') == 'cosine') == (
            objective in ('mcd', 'mm')
        )
        assert metadata.get('solver') == ('ancestral' if objective == 'mm' else None)
    elif kind.one_step:
        assert metadata['sigmas'] == [2.5, 0.0] and not {'S', 'solver'} & metadata.keys()
    elif objective == 'flowmap':
        assert metadata['steps'] == [1, 2] and not {'S', 'sigmas', 'solver'} & metadata.keys()
    else:
        assert (metadata['solver'], metadata['sigmas']) == ('cm', [80.0, 0.8, 0.0])
    assert describe_state(max(whole.glob('training-state-*.pt')))['objective'] == objective
    done = invoke(
        generate.main, f'--network={last_snapshot(whole)}', f'--outdir={tmp_path / "out"}', '--seeds=0-3'
    )
    steps = 1 if kind.one_step else 2
    assert f'{metadata.get("solver", "student")}, {steps} evaluations each' in done.output
    assert len(list((tmp_path / 'out').glob('*.png'))) == 4


# ----------------------------------------------------------------------------
# Progressive distillation: several runs, one command.


def distill(folder, digits, teacher, *options):
    return invoke(
        train.main,
        f'--outdir={folder}',
        f'--data={digits}',
        '--objective=pd',
        f'--teacher={teacher}',
        *SHORT,
        '--keep=9',
        '--S_start=4',
        '--S=1',
        '--stage_steps=10',
        *options,
    )


def weights(folder):
    return load_network(last_snapshot(folder)).state_dict()


@pytest.fixture(scope='module')
def progressive(tmp_path_factory, digits, teacher):
    folder = tmp_path_factory.mktemp('progressive')
    distill(folder, digits, teacher)
    return folder


def test_progressive_distillation_halves_stage_by_stage(progressive, teacher):
    """Stages of two steps and of one last twice as long; each is told its teacher's digest."""
    seen, teachers = {}, [str(teacher)]
    for S in (4, 2, 1):
        folder = progressive / f'S{S:04d}'
        net, record = (
            load_network(last_snapshot(folder)),
            json.loads((folder / 'training_options.json').read_text()),
        )
        seen[S] = net.metadata['nimg'] // 64
        assert net.metadata['sigmas'] == student_grid(S, 0.002, 80, 7, 'full').tolist() and record[
            'stages'
        ] == [[4, 10], [2, 20], [1, 20]]
        assert record['teacher'] == teachers[-1] and record['teacher_digest'] == network_digest(
            load_network(teachers[-1]), {}
        )
        teachers.append(str(last_snapshot(folder)))
    assert seen == {4: 10, 2: 20, 1: 20}
    losses = [tick['Loss/pd']['mean'] for tick in lines(progressive / 'S0004' / 'stats.jsonl')]
    assert losses[-1] < losses[1], losses


@pytest.mark.parametrize('cut', ['in the second stage', 'between two stages', 'after the end'])
def test_progressive_distillation_goes_on_where_it_stopped_and_ends_bit_for_bit_the_same(
    tmp_path, progressive, digits, teacher, cut
):
    folder = tmp_path / 'run'
    shutil.copytree(progressive, folder)
    for path in folder.glob('S*/training_options.json'):
        path.write_text(path.read_text().replace(str(progressive), str(folder)))
    if cut != 'after the end':
        shutil.rmtree(folder / 'S0001')
    if cut == 'in the second stage':
        states = saved_states(folder / 'S0002')
        for path in [*(folder / 'S0002').glob('network-snapshot-*.pkl'), *states[:2]]:
            path.unlink()
        assert len(states) > 3
    resume = saved_states(folder / 'S0002')[0] if cut == 'in the second stage' else folder
    distill(folder, digits, teacher, f'--resume={resume}')
    for S in (2, 1):
        assert all(
            torch.equal(a, b)
            for a, b in zip(*(weights(run / f'S{S:04d}').values() for run in (progressive, folder)))
        )


def test_progressive_distillation_may_start_from_a_student_of_twice_the_steps(
    tmp_path, progressive, digits, teacher
):
    first = last_snapshot(progressive / 'S0004')
    options = [f'--data={digits}', '--objective=pd', f'--teacher={first}', *SHORT]
    invoke(train.main, f'--outdir={tmp_path}', *options, '--S_start=2', '--S=2', '--stage_steps=10')
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights(tmp_path / 'S0002').values(), weights(progressive / 'S0002').values())
    )
    result = CliRunner().invoke(train.main, [f'--outdir={tmp_path / "no"}', *options, '--S_start=4'])
    assert_one_clear_error(result, 'student of 4 steps', 'student of --student_grid=full and 8 steps')


@pytest.mark.parametrize(
    'options, words',
    [
        (['--S_start=12', '--S=8'], ['do not become 8 by halving', 'power of two']),
        (['--duration=1'], ['--stage_steps']),
        (['--hop=heun'], ['ddim or addim']),
        (['--student_grid=edm'], ['full grids']),
        (['--snap=0'], ["next one's teacher"]),
        (['--val=1', '--val_ref=x.npz', '--val_steps=3'], ['each round']),
        (['--T_end=9'], ['mcd or mct or direct']),
        (['--transfer=x.pkl'], ['starts from its teacher']),
    ],
)
def test_options_that_progressive_distillation_cannot_have(options, words):
    arguments = ['--outdir=x', '--data=x', '--objective=pd', '--teacher=x.pkl', *options]
    assert_one_clear_error(CliRunner().invoke(train.main, arguments), *words, status=2)


def test_stages_of_an_earlier_run_are_not_overwritten(progressive, digits, teacher, tmp_path):
    arguments = [f'--data={digits}', '--objective=pd', f'--teacher={teacher}', *SHORT]
    assert_one_clear_error(
        CliRunner().invoke(train.main, [f'--outdir={progressive}', *arguments]),
        'holds the rounds of an earlier run',
        '--resume',
    )
    assert_one_clear_error(
        CliRunner().invoke(train.main, [f'--outdir={tmp_path}', *arguments, f'--resume={tmp_path}']),
        'it holds no training-state',
    )


def test_a_stage_of_another_teacher_is_noticed(tmp_path, progressive, digits, teacher):
    folder = tmp_path / 'run'
    shutil.copytree(progressive, folder)
    os.replace(last_snapshot(folder / 'S0004'), tmp_path / 'aside.pkl')
    for path in (folder / 'S0004').glob('network-snapshot-*.pkl'):
        path.unlink()
    net = load_network(tmp_path / 'aside.pkl')
    next(net.parameters()).mul_(1.5)
    save_snapshot(folder / 'S0004' / 'network-snapshot-000000.pkl', net, **net.metadata)
    options = [
        f'--data={digits}',
        '--objective=pd',
        f'--teacher={teacher}',
        *SHORT,
        '--S_start=4',
        '--stage_steps=10',
    ]
    result = CliRunner().invoke(train.main, [f'--outdir={folder}', *options, f'--resume={folder}'])
    assert_one_clear_error(result, 'S0002 was distilled from another teacher')


# ----------------------------------------------------------------------------
# Defaults.


def configuration_of(*options):
    return json.loads(invoke(train.main, '--outdir=runs', *options, '--dry-run').stdout)


def test_networks_of_edm2_are_tuned_with_their_own_times_and_rates(digits):
    """Geng et al. 2024, ImageNet-64; what is given overrides."""
    edm2 = [f'--data={digits}', '--arch=edm2', '--cbase=16', '--cres=1,2', '--objective=ect']
    c = configuration_of(*edm2)
    assert [c['loss'][name] for name in ('P_mean', 'P_std', 'q', 'c')] == [-0.8, 1.6, 4.0, 0.06]
    assert [c[name] for name in ('optim', 'lr', 'lr_schedule')] == ['adam', 1e-3, 'sqrt'] and c[
        'lr_ref_nimg'
    ] == 2000 * 128
    c = configuration_of(*edm2, '--q=3', '--optim=radam')
    assert (c['loss']['q'], c['loss']['c'], c['optim']) == (3.0, 0.06, 'radam')
    c = configuration_of(f'--data={digits}', *TINY_NETWORK, '--objective=ect')
    assert [c['loss'][name] for name in ('P_mean', 'P_std', 'q', 'c')] == [-1.1, 2.0, 2.0, 0.0] and c[
        'optim'
    ] == 'radam'


@pytest.mark.parametrize(
    'options, expected',
    [
        (['--objective=cm-cd', '--cm_loss=l2'], dict(N=18, mu0=0.0, hop='heun')),
        (
            ['--objective=cm-cd', '--cm_loss=l2', '--s0=2', '--s1=40', '--mu0=0.9'],
            dict(N=None, s0=2, s1=40, mu0=0.9, mu_schedule='adaptive'),
        ),
        (
            ['--objective=cm-ct', '--cm_loss=l1'],
            dict(N=None, s0=2, s1=150, mu0=0.9, schedule_nimg=409_600_000),
        ),
        (['--objective=cm-ct', '--cm_loss=l1', '--N=40', '--mu0=0.95'], dict(N=40, mu0=0.95)),
        (
            ['--objective=ict'],
            dict(s0=10, s1=1280, P_mean=-1.1, P_std=2.0, c=None, batch_size=1024, schedule_nimg=409_600_000),
        ),
        (
            ['--objective=tcm'],
            dict(
                dividing_t=1.0,
                ratio_cap=0.999,
                boundary_share=0.25,
                boundary_weight=0.1,
                c=1e-8,
                stage_nimg=1024,
                batch_size=1024,
            ),
        ),
        (
            ['--objective=scd', '--duration=256'],
            dict(P_mean=-1.0, P_std=1.4, tangent_c=0.1, tangent_weight='adaptive', warmup_nimg=5_120_000),
        ),
        (
            ['--objective=sct', '--duration=5.12'],
            dict(P_mean=-1.0, P_std=1.4, jvp='forward', warmup_nimg=512_000),
        ),
        (
            ['--objective=pd', '--S_start=8', '--S=2'],
            dict(S=8, student_grid='full', hop='ddim', cd_loss='l2', cd_weight_mode='truncated-snr'),
        ),
    ],
)
def test_each_objective_has_its_papers_defaults(digits, teacher, consistency_model, options, expected):
    objective = OBJECTIVES[options[0].partition('=')[2]]
    start = (
        [f'--teacher={teacher if objective.teacher == "diffusion" else consistency_model}']
        if objective.teacher
        else TINY_NETWORK
    )
    c = configuration_of(f'--data={digits}', '--cond=1', *start, *options)
    assert {name: c['loss'][name] for name in expected} == expected
    assert c['network']['kwargs'].get('boundary', 0) == (0.002 if objective.boundary else 0)


@pytest.mark.parametrize(
    'objective, optim, lr, rampup_kimg, batch, mimg, ema_mimg, dropout',
    [
        ('diffusion', 'adam', 1e-3, 10_000, 512, 200, 0.5, 0.13),
        ('mcd', 'adam', 8e-5, 10_000, 2048, 210, 50, 0),
        ('mct', 'adam', 8e-5, 10_000, 2048, 210, 50, 0),
        ('direct', 'adam', 8e-5, 10_000, 2048, 210, 50, 0),
        ('pd', 'adam', 2e-4, 0, 128, 6.4, 0.5, 0),
        ('cm-cd', 'radam', 4e-4, 0, 512, 409.6, 3.549, 0),
        ('cm-ct', 'radam', 4e-4, 0, 512, 409.6, 3.549, 0),
        ('ict', 'radam', 1e-4, 0, 1024, 409.6, 10.14, 0.3),
        ('ect', 'radam', 1e-4, 0, 128, 51.2, 0.887, 0.2),
        ('tcm', 'radam', 5e-5, 0, 1024, 204.8, 7.097, 0),
        ('scd', 'adam', 1e-4, 0, 512, 204.8, 3.549, 0),
        ('sct', 'adam', 1e-4, 0, 512, 204.8, 3.549, 0.2),
        ('mm', 'adam', 2e-6, 2048, 2048, 409.6, 50, 0),
        ('sid', 'adam', 1e-5, 0, 256, 100, 0.5, 0),
    ],
)
def test_each_objective_is_optimized_as_in_its_paper(
    digits, teacher, consistency_model, objective, optim, lr, rampup_kimg, batch, mimg, ema_mimg, dropout
):
    """Of EDM's, the released student's and the papers' CIFAR-10 models; half-lives in Mimg are -batch ln 2 / ln(decay) of the published decays
    0.9999 (CM, ECT, TCM) and 0.99993 (iCT). A student's dropout is its teacher's, which here has none; a stage of pd is 50,000 steps."""
    kind = OBJECTIVES[objective]
    start = (
        [f'--teacher={teacher if kind.teacher == "diffusion" else consistency_model}']
        if kind.teacher
        else ['--cres=1,2', '--cbase=8']
    )
    extra = (
        ['--cm_loss=l2']
        if objective.startswith('cm')
        else ['--S_start=8', '--S=2']
        if objective == 'pd'
        else []
    )
    c = configuration_of(f'--data={digits}', '--cond=1', f'--objective={objective}', *start, *extra)
    assert (c['optim'], c['lr'], c['batch_size'], c['total_nimg']) == (optim, lr, batch, mimg * 1e6)
    assert c['lr_rampup_nimg'] == rampup_kimg * 1e3 and c['ema_halflife_nimg'] == ema_mimg * 1e6
    assert c['network']['kwargs']['dropout'] == dropout and c['augment'] == (
        0.12 if objective == 'diffusion' else 0
    )


@pytest.mark.parametrize(
    'options, words',
    [
        (['--objective=cm-cd', '--N=18', '--s1=40'], ['--N', '--s1']),
        (['--objective=cm-ct', '--s0=9', '--s1=4'], ['--s0=9', '--s1=4']),
        (['--objective=cm-ct', '--cm_loss=l2', '--lpips=x.pth'], ['--lpips', 'l2']),
        (['--objective=ict', '--mu0=0.9'], ['--mu0', 'cm-cd or cm-ct']),
        (['--objective=ect', '--dividing_t=2'], ['--dividing_t', 'tcm']),
        (['--objective=cm-cd', '--mu_schedule=fixed'], ['--mu_schedule', '--s1']),
        (['--objective=mct', '--hop=ddim'], ['--hop', 'mcd or pd or flowmap or cm-cd']),
    ],
)
def test_options_that_contradict_each_other_or_the_objective(options, words):
    teacher = ['--teacher=x.pkl'] if OBJECTIVES[options[0].partition('=')[2]].teacher else []
    assert_one_clear_error(
        CliRunner().invoke(train.main, ['--outdir=x', '--data=x', *teacher, *options]), *words, status=2
    )


@pytest.mark.parametrize('objective', [name for name, objective in OBJECTIVES.items() if objective.teacher])
def test_a_teacher_of_the_wrong_kind_is_refused_by_name(
    tmp_path, digits, teacher, consistency_model, objective
):
    wrong = consistency_model if OBJECTIVES[objective].teacher == 'diffusion' else teacher
    options = [f'--data={digits}', '--cond=1', f'--objective={objective}', f'--teacher={wrong}']
    assert_one_clear_error(
        CliRunner().invoke(train.main, [f'--outdir={tmp_path / "x"}', *options]),
        str(wrong),
        'consistency model',
    )
    assert not (tmp_path / 'x').exists()


def resumed(progressive, tmp_path):
    """A copy of a finished progressive distillation."""
    folder = tmp_path / 'run'
    shutil.copytree(progressive, folder)
    return folder


@pytest.mark.parametrize(
    'options, words',
    [
        (['--stage_steps=5'], ['[[4, 10], [2, 20], [1, 20]]', '--stage_steps']),
        (['--S=2'], ['--S_start']),
        (['--hop=addim'], ['hop ddim -> addim']),
    ],
)
def test_a_finished_progressive_distillation_is_resumed_with_its_own_options_only(
    tmp_path, progressive, digits, teacher, options, words
):
    folder = resumed(progressive, tmp_path)
    arguments = [
        f'--outdir={folder}',
        f'--data={digits}',
        '--objective=pd',
        f'--teacher={teacher}',
        *SHORT,
        '--keep=9',
        '--S_start=4',
        '--S=1',
        '--stage_steps=10',
        f'--resume={folder}',
        *options,
    ]
    assert_one_clear_error(CliRunner().invoke(train.main, arguments), *words)


@pytest.mark.parametrize('lost', ['training_options.json', 'network-snapshot-*.pkl'])
def test_a_stage_that_lost_a_file_says_what_to_delete(tmp_path, progressive, digits, teacher, lost):
    """Its last snapshot, which the next stage starts from, or what it was made with."""
    folder = resumed(progressive, tmp_path)
    for path in (folder / 'S0002').glob(lost):
        path.unlink()
    arguments = [
        f'--outdir={folder}',
        f'--data={digits}',
        '--objective=pd',
        f'--teacher={teacher}',
        *SHORT,
        '--keep=9',
        '--S_start=4',
        '--S=1',
        '--stage_steps=10',
        f'--resume={folder}',
    ]
    assert_one_clear_error(
        CliRunner().invoke(train.main, arguments), 'S0002', 'delete that folder and the ones of fewer steps'
    )


def test_a_student_of_other_noise_levels_is_no_teacher_of_the_next_stage(tmp_path, progressive, digits):
    options = [
        f'--data={digits}',
        '--objective=pd',
        f'--teacher={last_snapshot(progressive / "S0004")}',
        *SHORT,
        '--S_start=2',
        '--sigma_max=40',
    ]
    assert_one_clear_error(
        CliRunner().invoke(train.main, [f'--outdir={tmp_path}', *options]), 'student of 4 steps itself'
    )


# ----------------------------------------------------------------------------
# What only files or numbers tell.


class Means(torch.nn.Module):
    """A stand-in for NVIDIA's LPIPS."""

    def forward(self, images, return_lpips: bool = False):
        return images.mean(dim=(2, 3)) / 255


def test_a_perceptual_distance_is_loaded_before_anything_is_written(tmp_path, digits):
    torch.jit.script(Means()).save(tmp_path / 'lpips.pt')
    options = [
        f'--data={digits}',
        '--objective=cm-ct',
        *TINY_NETWORK,
        *SHORT,
        '--s1=4',
        '--duration=0.000128',
    ]
    invoke(train.main, f'--outdir={tmp_path / "run"}', *options, f'--lpips={tmp_path / "lpips.pt"}')
    assert 'Loss/cm-ct' in lines(tmp_path / 'run' / 'stats.jsonl')[-1]
    result = CliRunner().invoke(
        train.main, [f'--outdir={tmp_path / "no"}', *options, f'--lpips={tmp_path / "missing.pt"}']
    )
    assert_one_clear_error(result, 'missing.pt')
    assert not (tmp_path / 'no').exists()


@pytest.mark.parametrize(
    'options, words',
    [
        (['--objective=ict', '--P_mean=100', '--P_std=0.1'], ['--P_mean=100', 'between 0.002 and 80']),
        (['--objective=ect', '--mid_t=100'], ['--mid_t=100', '80']),
        (['--objective=cm-ct', '--cm_loss=l2', '--mid_t=0.002'], ['--mid_t=0.002']),
    ],
)
def test_distributions_and_levels_beyond_the_networks_are_refused(digits, options, words):
    assert_one_clear_error(
        CliRunner().invoke(train.main, ['--outdir=x', f'--data={digits}', *TINY_NETWORK, *options]), *words
    )


@pytest.mark.parametrize(
    'options, words',
    [
        (['--dividing_t=90'], ['--dividing_t=90']),
        (['--boundary_share=0.0001'], ['--boundary_share=0.0001']),
        (['--dividing_t=20', '--student_scale=0.01', '--student_df=10000'], ['--student_df=10000']),
    ],
)
def test_truncations_that_leave_nothing_to_train_are_refused(digits, consistency_model, options, words):
    arguments = [
        '--outdir=x',
        f'--data={digits}',
        '--cond=1',
        '--objective=tcm',
        f'--teacher={consistency_model}',
        *options,
    ]
    assert_one_clear_error(CliRunner().invoke(train.main, arguments), *words)


def test_a_target_network_may_be_added_on_request(tmp_path, digits):
    """--resume-override: it begins with the network that was trained so far."""
    options = [
        f'--outdir={tmp_path}',
        f'--data={digits}',
        '--objective=cm-ct',
        *TINY_NETWORK,
        *SHORT,
        '--cm_loss=l2',
        '--N=4',
    ]
    invoke(train.main, *options, '--mu0=0', '--duration=0.00064')
    invoke(
        train.main, *options, '--mu0=0.5', '--duration=0.00128', f'--resume={tmp_path}', '--resume-override'
    )
    state = load_state(saved_states(tmp_path)[0])
    assert state['progress']['nimg'] == 1280 and set(state['loss']) == {'target'}
