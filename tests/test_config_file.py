"""--config: options from a file, and a run that is repeated from its own record."""

import json

import pytest
import torch
import yaml
from click.testing import CliRunner
from helpers import FAST, TINY_NETWORK, assert_one_clear_error, run

import train
from training.checkpoint import load_network, save_snapshot
from training.run_files import saved_snapshots

PLACES = {'run_dir'}


def dry_run(*words, unsaid=None):
    """The configuration; `unsaid` is what stderr must not have."""
    result = CliRunner().invoke(train.main, ['--outdir=runs', '--dry-run', *map(str, words)])
    assert result.exit_code == 0, result.output
    assert unsaid is None or unsaid not in result.stderr, result.stderr
    return json.loads(result.stdout)


def write(path, value):
    path.write_text(json.dumps(value) if path.suffix == '.json' else yaml.safe_dump(value))
    return f'--config={path}'


@pytest.fixture(scope='module')
def consistency_model(teacher, tmp_path_factory):
    path = tmp_path_factory.mktemp('model') / 'ect.pkl'
    save_snapshot(path, load_network(teacher), objective='ect', solver='cm')
    return path


CASES = {
    'a teacher': [*TINY_NETWORK, '--lr=3e-4', '--grad-clip=0.7', '--xflip=1', '--tick=0.3', '--no-such=0'][
        :-1
    ],
    'another preconditioning': [*TINY_NETWORK, '--precond=vp', '--arch=ncsnpp', '--ls=dynamic'],
    'a network of EDM2': [*TINY_NETWORK, '--arch=edm2', '--lr_decay=77'],
    'averages and validation': [
        *TINY_NETWORK,
        '--phema=0.05,0.1',
        '--val=1',
        '--val_ref={ref}',
        '--val_detector={detector}',
        '--val_emas=all',
    ],
    'loggers': [*TINY_NETWORK, '--wandb=1', '--wandb_tags=a,b', '--wandb_mode=offline', '--tensorboard'],
    'mcd': [
        '--consistency=True',
        '--hop=addim',
        '--xvar_frac=0.5',
        '--S=4',
        '--T_anneal_steps=7',
        '--batch=192',
    ],
    'mcd without anchor': ['--objective=mcd', '--no_terminal_anchor', '--dropout=0.2', '--ema=333kimg'],
    'mct': ['--objective=mct', *TINY_NETWORK, '--S=1', '--fp16=0'],
    'direct': ['--objective=direct', '--top-mass=0.25', '--substeps=2', '--solver=ipndm'],
    'pd': ['--objective=pd', '--S_start=8', '--stage_steps=12', '--batch=64'],
    'pd in one stage': ['--objective=pd', '--S_start=2', '--S=2', '--stage_steps=12'],
    'cm-cd': ['--objective=cm-cd', '--N=9'],
    'cm-cd on a grid that grows': [
        '--objective=cm-cd',
        '--s1=20',
        '--mu0=0.9',
        '--mu_schedule=fixed',
        '--cm_loss=l1',
    ],
    'cm-ct': ['--objective=cm-ct', *TINY_NETWORK, '--cm_loss=l2', '--schedule_steps=33', '--mid_t=0.7'],
    'ict': ['--objective=ict', *TINY_NETWORK, '--P_mean=-1', '--duration=0.887'],
    'ect': [
        '--objective=ect',
        *TINY_NETWORK,
        '--no_clip_denoised',
        '--stage_steps=3000',
        '--duration=0.9',
        '--q=3',
    ],
    'tcm': ['--objective=tcm', '--stage_steps=5', '--boundary_share=0.5'],
    'scd': ['--objective=scd', '--tangent_warmup=77', '--tangent_c=0.3', '--no_clip_denoised'],
    'sct': ['--objective=sct', *TINY_NETWORK, '--jvp=difference', '--tangent_weight=prior', '--duration=0.9'],
    'mm': ['--objective=mm', '--S=4', '--mm_times=uniform', '--beta1=0.1', '--aux_lr=1e-5', '--grad-clip=2'],
    'sid': ['--objective=sid', '--sigma_init=3', '--alpha=1', '--aux_ahead=7', '--duration=0.9'],
}


@pytest.mark.parametrize('name', CASES)
def test_a_run_is_repeated_from_what_it_recorded(tmp_path, digits, teacher, consistency_model, rulers, name):
    """Everything but the folder is the same, to the last bit of every number."""
    from training.command_line import objective_in
    from training.objectives import OBJECTIVES

    kind = OBJECTIVES[objective_in(CASES[name]) or 'diffusion'].teacher
    start = {
        None: [],
        'diffusion': [f'--teacher={teacher}'],
        'consistency': [f'--teacher={consistency_model}'],
    }
    words = [word.format(ref=rulers / 'pca.npz', detector=rulers / 'pca.pt') for word in CASES[name]]
    c = dry_run(f'--data={digits}', '--cond=1', *start[kind], *words)
    again = dry_run(write(tmp_path / 'c.json', c), unsaid='ignoring')
    assert {key: c[key] for key in c if key not in PLACES} == {
        key: again[key] for key in again if key not in PLACES
    }


def test_a_real_run_is_repeated_bit_for_bit(tmp_path, digits):
    words = [
        f'--data={digits}',
        '--cond=1',
        *TINY_NETWORK,
        *FAST,
        '--batch=64',
        '--duration=0.000128',
        '--nosubdir',
    ]
    run('train.py', f'--outdir={tmp_path / "a"}', *words)
    run(
        'train.py',
        f'--outdir={tmp_path / "b"}',
        f'--config={tmp_path / "a" / "training_options.json"}',
        '--nosubdir',
    )
    a, b = (load_network(saved_snapshots(tmp_path / name)[0]) for name in 'ab')
    assert all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )
    assert a.metadata == b.metadata


@pytest.mark.parametrize('suffix', ['yml', 'json'])
def test_options_by_name_give_way_to_the_command_line(tmp_path, digits, suffix):
    values = {
        'data': str(digits),
        'batch-gpu': 32,
        '--lr': '8e-5',
        'cres': [1, 2],
        'tf32': True,
        'compile': False,
        'desc': None,
    }
    config = write(tmp_path / f'c.{suffix}', values)
    c = dry_run(config, '--lr=1e-3')
    assert (c['batch_gpu'], c['lr'], c['tf32'], c['network']['kwargs']['channel_mult']) == (
        32,
        1e-3,
        True,
        [1, 2],
    )
    assert dry_run(config)['lr'] == 8e-5


def test_options_of_a_file_are_checked_as_those_of_the_command_line(tmp_path, digits):
    for values, *words in (
        (dict(batch=-1), 'batch', '-1'),
        (dict(S=4), '--S is for --objective=mcd'),
        (dict(val_num=9), '--val_num needs --val=1'),
        (dict(consistency=True), '--teacher'),
        (dict(cres=[1, 'x']), 'cres'),
    ):
        config = write(tmp_path / 'c.yml', dict(values, data=str(digits)))
        result = CliRunner().invoke(train.main, ['--outdir=x', '--dry-run', config])
        assert_one_clear_error(result, *words, status=2)


@pytest.mark.parametrize(
    'text, word',
    [
        ('batchsize: 3', 'batch_size'),
        ('btach: 3', 'batch is one'),
        ('{batch_gpu: 3, batch-gpu: 4}', 'twice'),
        ('compile: 1\ncompiled: 0', 'twice'),
        ('a: &a [1, 1]\nb: &b [*a, *a]\nlr: [*b, *b]', 'has a, which is not an option'),
        ('cres: &a [1, 1]\nlr: [*a, *a]', 'list of these'),
        ('lr: ' + 70_000 * '1', '65,536'),
        ('- 3', 'not a mapping'),
        ('{"lr": ', 'no JSON'),
        ('a: [', 'neither YAML nor JSON'),
        ('lr: {a: 3}', 'not text, a number'),
        ('!!python/object/apply:os.system ["touch pwned"]', 'neither YAML nor JSON'),
        ('{"loss": 1, "network": 2, "dataset": 3, "total_nimg": 4}', 'c.json'),
        ('\x00\x01', 'neither YAML nor JSON'),
        ('[' * 100_000, 'c.json'),
    ],
)
def test_what_is_no_configuration_is_one_clear_error(tmp_path, text, word):
    (tmp_path / 'c.json').write_text(text)
    result = CliRunner().invoke(train.main, ['--outdir=x', f'--config={tmp_path / "c.json"}'])
    assert_one_clear_error(result, 'c.json', *([word] if word != 'batch_size' else ['batchsize']))


def test_a_later_stage_of_progressive_distillation_names_the_first(tmp_path, digits, teacher):
    c = dry_run(f'--data={digits}', '--cond=1', '--objective=pd', f'--teacher={teacher}', '--S_start=4')
    c['loss']['S'] = 2
    result = CliRunner().invoke(train.main, ['--outdir=x', write(tmp_path / 'c.json', c)])
    assert_one_clear_error(result, 'round of 2 steps', 'take that of 4')
