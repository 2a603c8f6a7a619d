"""Run all benchmarks, each in its own process, and write benchmarks/RESULTS.md and RESULTS.json.

The page consists of blocks: the output of a script under its command, after a comment with the benchmark's
name, by which some can be measured again while the others stay. The record beside it has each block with its
command and the commit that it measured.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import click

from benchmarks.common import NOT_MEASURED, ROOT, NamesOf, machine
from dnnlib import UserError, cli
from dnnlib.util import atomic_write, write_json
from experiments.results import commit

MARK = '<!-- {} -->'


@dataclass(frozen=True)
class Benchmark:
    """A script with its arguments.

    Attributes:
        arguments: its command line.
        quick: further arguments under --quick.
        threads: number of threads of torch and BLAS; None for the default.
    """

    script: str
    arguments: list[str] = field(default_factory=list)
    quick: list[str] = field(default_factory=list)
    threads: int | None = None


STEP_QUICK = ['--size=demo', '--steps=1', '--batch=2']
SAMPLING_QUICK = ['--size=demo', '--images=4', '--batch=2', '--rounds=1', '--eager']
BENCHMARKS = {
    'step-demo': Benchmark('step.py', [], [*STEP_QUICK, '--ways=channels_last']),
    'step-demo-one-thread': Benchmark(
        'step.py', ['--ways=compile'], [*STEP_QUICK, '--ways=plain'], threads=1
    ),
    'step-cifar10': Benchmark('step.py', ['--size=cifar10-ddpmpp'], [*STEP_QUICK, '--ways=bf16']),
    'step-imagenet64': Benchmark('step.py', ['--size=imagenet64-adm'], [*STEP_QUICK, '--ways=checkpoint']),
    'pieces-demo': Benchmark('pieces.py', ['--size=demo'], ['--rounds=1']),
    'pieces-imagenet64': Benchmark('pieces.py', [], ['--size=demo', '--rounds=1']),
    'kernels': Benchmark('kernels.py', [], ['--size=demo', '--ways=plain']),
    'memory': Benchmark('memory.py', [], ['--size=demo'], threads=1),
    'memory-edm2-xxl': Benchmark('memory.py', ['--size=edm2-xxl'], ['--size=demo'], threads=1),
    'sharding': Benchmark('sharding.py', [], ['--size=demo', '--processes=2'], threads=1),
    'sampling-demo': Benchmark('sampling.py', [], SAMPLING_QUICK),
    'sampling-cifar10': Benchmark('sampling.py', ['--size=cifar10-ddpmpp', '--rounds=3'], SAMPLING_QUICK),
    'sampling-imagenet64': Benchmark('sampling.py', ['--size=imagenet64-adm', '--rounds=2'], SAMPLING_QUICK),
    'solvers': Benchmark('solvers.py', [], ['--size=demo', '--batch=2', '--rounds=1']),
    'startup': Benchmark('startup.py', [], ['--rounds=1', '--scripts=train.py']),
    'data': Benchmark(
        'data.py', [], ['--members=2000', '--images=64', '--workers=0', '--rounds=1'], threads=1
    ),
    'checkpoint': Benchmark(
        'checkpoint.py', ['--rounds=2'], ['--channels=8', '--res=8', '--rounds=1', '--repeats=1'], threads=1
    ),
    'state': Benchmark('state.py', [], ['--parameters=100000']),
    'frechet': Benchmark('frechet.py', [], ['--dim=16', '--rounds=1'], threads=1),
    'precision': Benchmark('precision.py', ['--batch=32'], ['--batch=2'], threads=1),
    'derivatives': Benchmark('derivatives.py', [], ['--sizes=demo', '--rounds=1'], threads=1),
    'images': Benchmark('images.py', [], ['--images=32', '--rounds=1', '--memory=300', '--workers=2']),
}

INTRODUCTION = """# Measured

Written by `make bench` (`python -m benchmarks`). Each block is the output of the command above it. Compare ratios within a block: they are measured
in turns, in the same minutes on the same machine. Speeds in [docs](../docs/performance.md) refer to this page.
"""


def read_blocks(path: Path) -> dict[str, str]:
    """The blocks of a page by name; empty if there is no page, or one without blocks."""
    text = path.read_text(encoding='utf-8') if path.exists() else ''
    parts = re.split(rf'^{MARK.format("([a-z0-9-]+)")}\n', text, flags=re.M)
    return {name: block.strip('\n') for name, block in zip(parts[1::2], parts[2::2])}


def read_commits(path: Path) -> dict[str, str | None]:
    """The commit that each block of a page measured, by the record beside it."""
    record = path.with_suffix('.json')
    blocks = json.loads(record.read_text()) if record.exists() else {}
    return {name: block['commit'] for name, block in blocks.items()}


def record_of(blocks: dict[str, str], commits: dict[str, str | None]) -> dict[str, dict]:
    """{name: command, commit, text} of blocks, in the order of BENCHMARKS; null where a block has none."""
    command_of = lambda text: (re.findall('^`(.+)`$', text, re.M) or [None])[0]
    return {
        name: dict(command=command_of(blocks[name]), commit=commits.get(name), text=blocks[name])
        for name in BENCHMARKS
        if name in blocks
    }


def write_page(path: Path, blocks: dict[str, str], commits: dict[str, str | None]) -> None:
    """Write the page and its record, each atomically, with blocks in the order of BENCHMARKS."""
    import torch

    # Name the device, and what is missing.
    missing = [name for name in BENCHMARKS if name not in blocks]
    notes = [f'    {machine()}']
    if not torch.cuda.is_available():
        notes.append(f'GPU: {NOT_MEASURED}, for want of one.')
    if missing:
        notes.append(f'{NOT_MEASURED.capitalize()}: `python -m benchmarks --only={",".join(missing)}`.')

    # Each block follows a comment with its name.
    sections = [f'{MARK.format(name)}\n{blocks[name]}' for name in BENCHMARKS if name in blocks]
    try:
        with atomic_write(path) as file:
            file.write(
                '\n\n'.join([INTRODUCTION.strip('\n'), *notes, *sections, '']).rstrip('\n').encode() + b'\n'
            )
        write_json(path.with_suffix('.json'), record_of(blocks, commits))
    except OSError as error:
        raise UserError(f'--out={path} cannot be written: {error.strerror}') from error


def measure(benchmark: Benchmark, quick: bool) -> str | None:
    """The output of a script; None if it fails, in which case its own error message was printed."""
    command = [
        sys.executable,
        f'benchmarks/{benchmark.script}',
        *benchmark.arguments,
        *(benchmark.quick if quick else []),
    ]
    env = {name: value for name, value in os.environ.items() if name != 'OMP_NUM_THREADS'}
    if benchmark.threads is not None:
        env['OMP_NUM_THREADS'] = str(benchmark.threads)
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip('\n') if done.returncode == 0 else None


@click.command(cls=cli.Command)
@cli.option(
    '--only',
    'names',
    metavar='LIST',
    type=NamesOf(BENCHMARKS),
    help=f'Benchmarks to run, of {", ".join(BENCHMARKS)}.  [default: all]',
)
@cli.option(
    '--quick',
    is_flag=True,
    help='Use small sizes, to test that everything works; the numbers are meaningless.',
)
@cli.option(
    '--out',
    metavar='FILE',
    type=cli.PATH,
    default='benchmarks/RESULTS.md',
    show_default=True,
    help='Output file.',
)
def main(names, quick, out):
    """Run benchmarks and write the page of results, updated after each one. Other blocks stay."""
    path = Path(out)
    blocks, commits, failed = read_blocks(path), read_commits(path), []
    if names and path.exists() and not blocks:
        raise UserError(f'{out} has no blocks to keep: leave out --only, or choose another --out.')
    if not path.parent.is_dir():
        raise UserError(f'--out={out} cannot be written: {path.parent} is not a folder.')
    for name in names or BENCHMARKS:
        click.echo(f'{name}...', err=True)
        text = measure(BENCHMARKS[name], quick)
        if text is None:
            failed.append(name)
            continue
        blocks[name], commits[name] = text, commit()
        write_page(path, blocks, commits)
    if failed:
        raise UserError(f'{", ".join(failed)} failed, see above. The other blocks are in {out}.')


if __name__ == '__main__':
    main(prog_name='python -m benchmarks')
