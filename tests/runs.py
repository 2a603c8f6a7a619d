"""Short training runs as real processes: how one is started, watched and compared with another."""

import os
import subprocess
import sys
import time

import psutil
import pytest
import torch
from helpers import FAST, ROOT, TINY_NETWORK, lines
from programs import Program

from training.checkpoint import load_network

LAUNCHER = ['-m', 'torch.distributed.run']
STEPS = 40  # of 64 images
ARGUMENTS = [
    '--cond=1',
    *TINY_NETWORK,
    *FAST,
    '--batch=64',
    f'--duration={STEPS * 64e-6}',
    '--tick=0.32',
    '--snap=1',
    '--dump=1',
    '--augment=0.1',
    '--dropout=0.1',
    '--ema=10kimg',
    '--phema=0.1',
]


def command(digits, folder, *extra, processes=1):
    """The command line of a diffusion training of `STEPS` steps, with dropout and augmentation, that saves after every fifth."""
    launcher = (
        []
        if processes == 1
        else [
            *LAUNCHER,
            '--standalone',
            f'--nproc_per_node={processes}',
            '--signals-to-handle=SIGTERM,SIGINT,SIGUSR1',
        ]
    )
    return [*launcher, 'train.py', f'--outdir={folder}', f'--data={digits}', *ARGUMENTS, *map(str, extra)]


class Process:
    """A run in the background, with the process ids of its ranks."""

    def __init__(self, arguments, **kwargs):
        if arguments[:2] == LAUNCHER:
            self.popen = subprocess.Popen(
                [sys.executable, '-W', 'ignore', *arguments],
                cwd=ROOT,
                env=dict(os.environ, OMP_NUM_THREADS='1'),
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                **kwargs,
            )
        else:
            self.popen = Program(arguments, **kwargs)

    def ranks(self):
        """Process ids of the workers that torchrun has started, or of the run itself."""
        children = [
            child
            for child in psutil.Process(self.popen.pid).children()
            if 'train.py' in ' '.join(child.cmdline())
        ]
        return [child.pid for child in children] or [self.popen.pid]

    def wait_for(self, condition, timeout=120):
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.popen.poll() is None and time.monotonic() < deadline, self.popen.communicate(
                timeout=10
            )
            time.sleep(0.002)

    def end(self, timeout=120):
        """(exit status, stdout, stderr)"""
        out, err = self.popen.communicate(timeout=timeout)
        return self.popen.returncode, out, err


def ticks(folder):
    """Whole lines; the last one may be being written."""
    path = folder / 'stats.jsonl'
    return path.read_bytes().count(b'\n') if path.exists() else 0


def assert_same_run(folder, whole):
    """Every tensor, and all metadata but paths, of the final snapshots; and every statistic of every tick but times and memory."""
    names = [path.name for path in sorted(whole.glob('network-snapshot-*.pkl'))]
    assert [path.name for path in sorted(folder.glob('network-snapshot-*.pkl'))] == names
    for name in names[-2:]:
        a, b = load_network(folder / name), load_network(whole / name)
        assert all(
            torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
        ), name
        assert a.metadata == b.metadata
    measured = [
        [
            {
                key: value
                for key, value in tick.items()
                if not key.startswith(('Timing/', 'Resources/', 'timestamp'))
            }
            for tick in lines(run / 'stats.jsonl')
        ]
        for run in (folder, whole)
    ]
    assert len(measured[0]) == len(measured[1])
    for a, b in zip(*measured):
        assert a.keys() == b.keys()
        for key in a:  # sums of a tick that was interrupted are added in another order
            assert a[key]['num'] == b[key]['num'] and a[key]['mean'] == pytest.approx(
                b[key]['mean'], rel=1e-12, nan_ok=True
            ), key
