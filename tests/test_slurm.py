"""The batch script, run by bash with stand-ins for SLURM's commands and real training processes."""

import json
import os
import signal
import stat
import subprocess
import sys
import time

import pytest
from helpers import FAST, ROOT, TINY_NETWORK

from training.run_files import saved_states

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "$1" >> "$SCONTROL_LOG.srun"; shift; done   # its own options
exec "$@"                               # a signal to this process is a signal to torchrun
"""
SCONTROL = """#!/bin/bash
if [[ "$1 $2" == "show hostnames" ]]; then echo localhost; else echo "$*" >> "$SCONTROL_LOG"; fi
"""
STEPS = 60
FOR_MEMORY = [
    '--shard=optimizer',
    '--ema-device=cpu',
    '--ema-every=7',
    '--checkpoint-activations',
    '--phema=0.1',
]


@pytest.fixture
def cluster(tmp_path):
    """Environment of a job on one node, whose `scontrol` keeps a log of what it was asked."""
    programs = tmp_path / 'bin'
    programs.mkdir()
    torchrun = f'#!/bin/bash\nexec {sys.executable} -W ignore -m torch.distributed.run "$@"\n'
    for name, text in dict(srun=SRUN, scontrol=SCONTROL, torchrun=torchrun).items():
        (programs / name).write_text(text)
        (programs / name).chmod(stat.S_IRWXU)
    return dict(
        os.environ,
        PATH=f'{programs}:{os.environ["PATH"]}',
        OMP_NUM_THREADS='1',
        SCONTROL_LOG=str(tmp_path / 'scontrol.log'),
        SLURM_JOB_ID='7',
        SLURM_NNODES='1',
        SLURM_CPUS_PER_TASK='3',
        SLURM_NODEID='0',
        SLURM_JOB_NODELIST='localhost',
        GPUS_PER_NODE='2',
        MASTER_PORT='0',
    )


def submit(cluster, *arguments):
    return subprocess.Popen(
        ['bash', 'slurm/train.sbatch', *map(str, arguments)],
        cwd=ROOT,
        env=cluster,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def torchrun_of(script):
    """The process id of the torchrun that a script has started."""
    children = subprocess.run(
        ['pgrep', '-P', str(script.pid), '-f', 'torch.distributed.run'], text=True, capture_output=True
    ).stdout.split()
    return int(children[0])


@pytest.mark.parametrize(
    'more', [pytest.param([], id='plain'), pytest.param(FOR_MEMORY, id='for memory', marks=pytest.mark.slow)]
)
def test_a_job_that_must_stop_requeues_itself_and_its_next_start_goes_on_to_the_end(
    tmp_path, digits, cluster, more
):
    run_dir, log = tmp_path / 'run', tmp_path / 'scontrol.log'
    options = [
        f'--data={digits}',
        '--cond=1',
        *TINY_NETWORK,
        *(option for option in FAST if option != '--nosubdir'),
        '--batch=64',
        '--tick=0.64',
        '--snap=0',
        '--dump=1',
        '--augment=0',
        f'--duration={STEPS * 64e-6}',
        *more,
    ]
    job = submit(cluster, run_dir, *options)
    while not (run_dir / 'stats.jsonl').exists():
        assert job.poll() is None, job.communicate()
        time.sleep(0.01)
    os.kill(torchrun_of(job), signal.SIGUSR1)
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0 and 'a state is safe' in out, (out, err)
    assert log.read_text() == 'requeue 7\n'
    assert '--cpus-per-task=3\n' in (tmp_path / 'scontrol.log.srun').read_text()
    assert json.loads((run_dir / 'preempted.json').read_text())['signal'] == 'SIGUSR1' and saved_states(
        run_dir
    )

    job = submit(cluster, run_dir, *options)
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0 and 'Resumed from' in out and 'Done.' in out, (out, err)
    assert log.read_text() == 'requeue 7\n' and not (run_dir / 'preempted.json').exists()
    nimg = [
        json.loads(line)['Progress/nimg']['mean']
        for line in (run_dir / 'stats.jsonl').read_text().splitlines()
    ]
    assert nimg == sorted(set(nimg)) and nimg[-1] == STEPS * 64


@pytest.mark.slow
def test_a_job_that_fails_is_not_requeued_even_after_an_earlier_stop(tmp_path, cluster):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'preempted.json').write_text('{}')
    job = submit(cluster, tmp_path / 'run', '--data=nowhere.zip')
    out, err = job.communicate(timeout=120)
    assert job.returncode == 1 and 'nowhere.zip' in err and not (tmp_path / 'scontrol.log').exists(), (
        out,
        err,
    )


def test_wrong_use_is_told(cluster):
    job = submit(cluster, 'run')
    assert 'usage: sbatch' in job.communicate()[1] and job.returncode == 2
