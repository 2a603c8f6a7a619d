"""Every objective through train.py: a short run on digits, resumed half-way, and what its snapshot says."""
import pytest
import torch
from click.testing import CliRunner
from helpers import FAST, TINY_NETWORK, lines

import generate
import train
from training.checkpoint import load_network
from training.consistency_ops import student_grid
from training.objectives import OBJECTIVES

RUNS = {
    'mcd': ['--hop=addim', '--sigma_grid=cosine', '--keep_ties', '--top-mass=0.3', '--T_anneal_steps=6'],
    'mct': [*TINY_NETWORK, '--T_anneal_kimg=0.2'],
    'direct': ['--substeps=2', '--T_end=16', '--student_grid=full'],
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
    """Twenty steps; against ten, and ten more from the state that they left."""
    options = [f'--data={digits}', '--cond=1', f'--objective={objective}', '--S=2', *FAST, '--batch=64', '--lr=2e-3', '--ema=1kimg', '--dropout=0',
               '--tick=0.32', '--dump=1', '--snap=1', *RUNS[objective]]
    if objective != 'direct':
        options += ['--T_start=4', '--T_end=16']
    if OBJECTIVES[objective].teacher:
        options += [f'--teacher={teacher}']
    whole, half = tmp_path / 'whole', tmp_path / 'half'
    invoke(train.main, f'--outdir={whole}', *options, '--duration=0.00128')
    schedule = [] if 'T_anneal' in str(options) else ['--T_anneal_kimg=0.64']
    invoke(train.main, f'--outdir={half}', *options, *schedule, '--duration=0.00064')
    invoke(train.main, f'--outdir={half}', *options, *schedule, '--duration=0.00128', f'--resume={half}')
    networks = [load_network(last_snapshot(folder)) for folder in (whole, half)]
    assert all(torch.equal(a, b) for a, b in zip(*(net.state_dict().values() for net in networks)))
    name = f'Loss/{OBJECTIVES[objective].loss_class().name}'
    losses = [tick[name]['mean'] for tick in lines(whole / 'stats.jsonl')]
    assert losses[-1] < losses[0], losses

    metadata = networks[0].metadata
    assert (metadata['objective'], metadata['S'], metadata['kimg']) == (objective, 2, 1.28)
    grid = student_grid(2, metadata['sigma_min'], metadata['sigma_max'], 7, metadata['student_grid'], metadata['sigma_grid'])
    assert metadata['sigmas'] == grid.tolist() and (metadata['sigma_grid'] == 'cosine') == (objective == 'mcd')
    done = invoke(generate.main, f'--network={last_snapshot(whole)}', f'--outdir={tmp_path / "out"}', '--seeds=0-3')
    assert 'student, 2 evaluations each' in done.output and len(list((tmp_path / 'out').glob('*.png'))) == 4
