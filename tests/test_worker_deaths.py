"""Processes that load data are killed under runs, as the system does when memory runs out."""

import os
import signal
from types import SimpleNamespace

import psutil
import pytest
import torch
from helpers import assert_one_clear_error
from runs import Process, command, ticks

from dnnlib import UserError
from torch_utils.distributed import among_others
from training.checkpoint import load_state
from training.run_files import saved_states

WORDS = ('A data-loading process died (killed by SIGKILL', '--workers', '--cache=False')


def kill_worker(rank):
    """The worker of one process of a run."""
    (worker,) = (
        child
        for child in psutil.Process(rank).children()
        if 'resource_tracker' not in ' '.join(child.cmdline())
    )
    os.kill(worker.pid, signal.SIGKILL)


def test_a_run_whose_worker_was_killed_ends_in_one_line_and_its_states_are_whole(tmp_path, digits):
    process = Process(command(digits, tmp_path, '--workers=1', '--duration=1'))
    process.wait_for(lambda: ticks(tmp_path) >= 2)
    kill_worker(process.popen.pid)
    status, _, err = process.end()
    assert_one_clear_error(SimpleNamespace(returncode=status, stderr=err), *WORDS)
    assert load_state(saved_states(tmp_path)[0])['progress']['nimg']
    assert not list(tmp_path.glob('.*.tmp'))


@pytest.mark.slow
def test_both_processes_end_where_one_has_lost_its_worker(tmp_path, digits):
    """The only traceback is the one of torchrun itself, which does not know why its processes end."""
    process = Process(command(digits, tmp_path, '--workers=1', '--duration=1', processes=2))
    process.wait_for(lambda: ticks(tmp_path) >= 2)
    kill_worker(process.ranks()[1])
    status, _, err = process.end()
    assert status == 1 and all(word in err for word in WORDS) and 'train.py", line' not in err, err


def test_errors_of_the_program_stay_what_they_are_among_others():
    with pytest.raises(UserError, match=r'lost the others \(.*Connection closed by peer'), among_others():
        raise RuntimeError('[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:37779.')
    with pytest.raises(UserError, match=r'lost the others'), among_others():
        raise torch.distributed.DistBackendError('NCCL error: remote process exited')
    with pytest.raises(RuntimeError, match='shapes'), among_others():
        raise RuntimeError('shapes do not fit')
