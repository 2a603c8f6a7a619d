"""Digits, a tiny teacher, and runs of the scripts, for tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
from click.testing import CliRunner
from programs import Program, run_together

from dnnlib import interrupts

ROOT = Path(__file__).resolve().parents[1]
TINY_NETWORK = [
    '--arch=adm',
    '--cbase=8',
    '--cres=1,2',
    '--num_blocks=1',
    '--attn_resolutions=none',
    '--dropout=0',
]
SCRIPTS = [f'{name}.py' for name in interrupts.SCRIPTS if name != 'example']
FAST = ['--workers=0', '--seed=0', '--nosubdir', '--lr_rampup=0.1', '--sample_grid=0']


def run(*arguments, check=True, timeout=300, **kwargs) -> subprocess.CompletedProcess:
    """`python <arguments>` in the repository (`programs.Program`)."""
    program = Program(arguments, **kwargs)
    output = program.communicate(timeout)
    return checked(subprocess.CompletedProcess(program.args, program.returncode, *output), check)


def run_ranks(processes: int, *arguments, check=True, timeout=300, **kwargs) -> subprocess.CompletedProcess:
    """The same in each rank of a process group (`programs.run_together`)."""
    return checked(run_together(processes, arguments, timeout, **kwargs), check)


def invoke(command: click.Command, *arguments):
    """A script's command in this process: click's result, with `exit_code`, `stdout` and `stderr`."""
    name = f'{command.callback.__module__}.py'
    return CliRunner().invoke(command, list(map(str, arguments)), prog_name=name)


def run_python(*arguments, check=True, timeout=300, env=None, **kwargs) -> subprocess.CompletedProcess:
    """The same in a new interpreter: four seconds more, for what happens before or during imports."""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, 'OMP_NUM_THREADS': '1', **(env or {})},
        text=True,
        capture_output=True,
        timeout=timeout,
        **kwargs,
    )
    return checked(done, check)


def torchrun(processes: int, *arguments, **kwargs) -> subprocess.CompletedProcess:
    """The same under torchrun."""
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    return run_python(*launcher, *arguments, **kwargs)


def checked(done: subprocess.CompletedProcess, check: bool) -> subprocess.CompletedProcess:
    assert not check or done.returncode == 0, done.stderr
    return done


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
