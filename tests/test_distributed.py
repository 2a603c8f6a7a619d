"""Processes: alone, wrongly started, and two of them for real."""

import contextlib
import os
import socket
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
state = dict(a=[torch.arange(6.0).reshape(2, 3).T, torch.tensor(True)], b=(torch.ones(2, dtype=torch.bfloat16), 'text'), c=None)
received = distributed.tensors_from_main(lambda: state if rank == 0 else 1 / 0)
assert received['a'][0].tolist() == [[0, 3], [1, 4], [2, 5]] and received['a'][1].item() is True
assert received['b'][0].dtype == torch.bfloat16 and received['b'][1] == 'text' and received['c'] is None
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


def test_a_gpu_that_pytorch_cannot_use_is_an_error(monkeypatch, tmp_path):
    """Unless it is hidden on purpose."""
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    monkeypatch.setattr(distributed, 'NVIDIA_DEVICE', str(tmp_path / 'nvidia0'))
    distributed.check_gpu()
    (tmp_path / 'nvidia0').touch()
    with pytest.raises(UserError, match='built for CPUs'):
        distributed.check_gpu()
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    with pytest.raises(UserError, match='not compiled with CUDA'):
        distributed.check_gpu()
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    distributed.check_gpu()


@pytest.mark.parametrize(
    'address, others, refused', [('127.0.1.1', 8, True), ('127.0.1.1', 4, False), ('10.0.0.7', 8, False)]
)
def test_a_name_that_only_this_machine_reaches_is_an_error_on_several(monkeypatch, address, others, refused):
    monkeypatch.delenv('GLOO_SOCKET_IFNAME', raising=False)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    monkeypatch.setattr(socket, 'gethostbyname', lambda name: address)
    with pytest.raises(UserError, match='GLOO_SOCKET_IFNAME') if refused else contextlib.nullcontext():
        distributed._check_host_name(others)


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
