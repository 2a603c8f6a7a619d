"""Processes: alone, wrongly started, and two of them for real."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dnnlib.util import UserError
from torch_utils import distributed

ROOT = Path(__file__).resolve().parents[1]

TOGETHER = """
import torch
from metrics.statistics import FeatureStats
from torch_utils import distributed
torch.set_num_threads(1)
distributed.init()
rank = distributed.get_rank()
assert distributed.get_world_size() == 2
total = distributed.all_reduce_sum(torch.tensor(rank + 1.0, dtype=torch.float64, device=distributed.get_device()))
assert total == 3, total
assert distributed.broadcast_object({'from': rank}) == {'from': 0}
assert distributed.gather_objects('ab'[rank]) == ['a', 'b']
assert distributed.gather_on_main('ab'[rank]) == (['a', 'b'] if rank == 0 else [])
distributed.barrier()
features = torch.randn(21, 4, generator=torch.Generator().manual_seed(0))
stats = FeatureStats(4, distributed.get_device())
stats.append(features.split([13, 8])[rank].to(distributed.get_device()))
stats.reduce()
assert (torch.from_numpy(stats.sigma) - features.double().T.cov()).abs().max() < 1e-12
distributed.print0(f'rank {rank} speaks')
distributed.shutdown()
"""


def test_one_process_needs_no_group():
    distributed.init()
    x = torch.ones(3)
    assert distributed.all_reduce_sum(x) is x
    assert (distributed.get_rank(), distributed.get_world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.broadcast_object('x') == 'x' and distributed.gather_objects(
        'x'
    ) == distributed.gather_on_main('x') == ['x']
    assert not torch.distributed.is_initialized()
    distributed.barrier()
    distributed.shutdown()


@pytest.mark.parametrize(
    'environment, words',
    [
        (dict(RANK='1'), 'WORLD_SIZE'),
        (dict(RANK='one', WORLD_SIZE='2'), "RANK is 'one'"),
        (dict(RANK='2', WORLD_SIZE='2', LOCAL_RANK='0'), 'RANK=2 is not below WORLD_SIZE=2'),
        (dict(RANK='0', WORLD_SIZE='2', LOCAL_RANK='0'), 'could not join'),
    ],
)
def test_a_wrong_environment_is_an_error_with_a_cure(monkeypatch, environment, words):
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words) as error:
        distributed.init()
    assert 'torchrun' in str(error.value) and '\n' not in str(error.value)


def test_two_processes_add_gather_and_broadcast(tmp_path):
    (tmp_path / 'together.py').write_text(TOGETHER)
    run = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node=2',
            str(tmp_path / 'together.py'),
        ],
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'CUDA_VISIBLE_DEVICES': ''},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == 'rank 0 speaks'
