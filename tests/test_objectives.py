"""Every objective through train.py: a short run on digits, resumed half-way, and what its snapshot says."""
import pytest
import torch
from click.testing import CliRunner
from helpers import FAST, TINY_NETWORK, lines

import generate
import train
from training.checkpoint import load_network
from training.consistency_ops import student_grid
from training.interchange.describe import describe_state
from training.objectives import OBJECTIVES

RUNS = {
    'mcd': ['--hop=addim', '--sigma_grid=cosine', '--keep_ties', '--top-mass=0.3', '--T_anneal_steps=6'],
    'mct': [*TINY_NETWORK, '--T_anneal_kimg=0.2'],
    'direct': ['--substeps=2', '--T_end=16', '--student_grid=full'],
    'ect': [*TINY_NETWORK, '--stage_steps=8', '--mid_t=0.8', '--q=4'],
}


def invoke(command, *arguments):
    result = CliRunner().invoke(command, list(map(str, arguments)), prog_name='script')
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def last_snapshot(folder):
    return max(folder.glob('network-snapshot-*.pkl'), key=lambda path: load_network(path).metadata['nimg'])


def test_every_student_objective_is_run_here():
    assert set(RUNS) | {'diffusion'} == set(OBJECTIVES)


@pytest.mark.parametrize('objective', RUNS)
def test_a_run_learns_ends_bit_for_bit_as_a_resumed_one_and_is_sampled(tmp_path, digits, teacher, objective):
    """Twenty steps; against ten, and ten more from the state that they left. The first tick is a single step: its loss is chance."""
    kind = OBJECTIVES[objective]
    options = [f'--data={digits}', '--cond=1', f'--objective={objective}', *FAST, '--batch=64', '--lr=2e-3', '--ema=1kimg', '--dropout=0',
               '--tick=0.32', '--dump=1', '--snap=1', *RUNS[objective]]
    options += ['--S=2'] if 'S' in kind.options else []
    options += ['--T_start=4', '--T_end=16'] if objective in ('mcd', 'mct') else []
    options += [f'--teacher={teacher}'] if kind.teacher else []
    whole, half = tmp_path / 'whole', tmp_path / 'half'
    invoke(train.main, f'--outdir={whole}', *options, '--duration=0.00128')
    options += ['--T_anneal_kimg=0.64'] if 'S' in kind.options and 'T_anneal' not in str(options) else []
    invoke(train.main, f'--outdir={half}', *options, '--duration=0.00064')
    invoke(train.main, f'--outdir={half}', *options, '--duration=0.00128', f'--resume={half}')
    networks = [load_network(last_snapshot(folder)) for folder in (whole, half)]
    assert all(torch.equal(a, b) for a, b in zip(*(net.state_dict().values() for net in networks)))
    losses = [tick[f'Loss/{kind.loss_class().name}']['mean'] for tick in lines(whole / 'stats.jsonl')]
    assert losses[-1] < losses[1], losses

    metadata = networks[0].metadata
    assert (metadata['objective'], metadata['kimg']) == (objective, 1.28)
    if 'S' in kind.options:
        grid = student_grid(2, metadata['sigma_min'], metadata['sigma_max'], 7, metadata['student_grid'], metadata['sigma_grid'])
        assert metadata['sigmas'] == grid.tolist() and (metadata['sigma_grid'] == 'cosine') == (objective == 'mcd')
    else:
        assert (metadata['solver'], metadata['sigmas']) == ('cm', [80.0, 0.8, 0.0])
    assert describe_state(max(whole.glob('training-state-*.pt')))['objective'] == objective
    done = invoke(generate.main, f'--network={last_snapshot(whole)}', f'--outdir={tmp_path / "out"}', '--seeds=0-3')
    assert f'{"student" if "S" in kind.options else "cm"}, 2 evaluations each' in done.output and len(list((tmp_path / 'out').glob('*.png'))) == 4
