"""Networks whose numbers are broken are refused before anything is trained from them, and before there is a folder."""

import pytest
import torch
from click.testing import CliRunner
from helpers import FAST, TINY_NETWORK, assert_one_clear_error

import train
from training.checkpoint import load_network, save_snapshot

BREAKS = {
    'a weight': (
        'model.dec.8x8_block0.conv0.weight',
        torch.nan,
        ['not finite', 'in model.dec.8x8_block0.conv0.weight'],
    ),
    'a buffer or bias': ('model.map_layer0.bias', torch.inf, ['not finite', 'in model.map_layer0.bias']),
    'what it makes': (
        'model.enc.8x8_conv.weight',
        3e38,
        ['not finite', 'of noise of sigma = 0.4', 'weights are finite'],
    ),
}


def broken(teacher, path, name, value):
    net = load_network(teacher)
    with torch.no_grad():
        net.state_dict()[name].view(-1)[:1] = value
    save_snapshot(path, net, objective='diffusion')
    return path


@pytest.mark.parametrize('dry_run', [False, True])
@pytest.mark.parametrize('option', ['teacher', 'transfer'])
@pytest.mark.parametrize('what', BREAKS)
def test_a_broken_network_is_refused_by_the_name_of_what_is_broken(
    tmp_path, digits, teacher, what, option, dry_run
):
    name, value, words = BREAKS[what]
    path = broken(teacher, tmp_path / 'broken.pkl', name, value)
    origin = (
        ['--objective=mcd', f'--teacher={path}']
        if option == 'teacher'
        else TINY_NETWORK + [f'--transfer={path}']
    )
    arguments = [
        f'--outdir={tmp_path / "runs"}',
        f'--data={digits}',
        '--cond=1',
        *FAST,
        *origin,
        *['--dry-run'] * dry_run,
    ]
    result = CliRunner().invoke(train.main, arguments)
    assert_one_clear_error(result, f'--{option}={path}', *words)
    assert not (tmp_path / 'runs').exists()
