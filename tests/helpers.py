"""Digits, a tiny teacher, and runs of the scripts, for tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TINY_NETWORK = [
    '--arch=adm',
    '--cbase=8',
    '--cres=1,2',
    '--num_blocks=1',
    '--attn_resolutions=none',
    '--dropout=0',
]
FAST = ['--workers=0', '--seed=0', '--nosubdir', '--lr_rampup=0.1']


def run(*arguments, check=True, timeout=300, **kwargs) -> subprocess.CompletedProcess:
    """`python <arguments>` in the repository, single-threaded."""
    env = dict(os.environ, OMP_NUM_THREADS='1', **kwargs.pop('env', {}))
    command = [sys.executable, '-W', 'ignore', *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=timeout, **kwargs
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def torchrun(processes: int, *arguments, **kwargs) -> subprocess.CompletedProcess:
    """The same under torchrun with gloo."""
    return run(
        '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}', *arguments, **kwargs
    )


def lines(path: Path) -> list[dict]:
    """The records of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_one_clear_error(result, *words, status=1):
    """One `Error:` without a traceback, on stderr, with the given words and exit status; `result` is of click's runner or a process."""
    code = result.returncode if hasattr(result, 'returncode') else result.exit_code
    assert code == status, (code, result.stderr)
    assert 'Traceback' not in result.stderr and result.stderr.count('Error:') == 1, result.stderr
    for word in words:
        assert word in result.stderr, (word, result.stderr)
