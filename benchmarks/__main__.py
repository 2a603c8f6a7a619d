"""Every benchmark, one after the other, each in a process of its own: writes benchmarks/RESULTS.md.

The page is made of blocks. Each is what a script prints, under the command that makes it alone; a comment before it says which benchmark it is of, so
that some can be measured again and the others stay.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import click

from benchmarks.common import NOT_MEASURED, ROOT, NamesOf, machine
from dnnlib import UserError, cli
from dnnlib.util import atomic_write

MARK = '<!-- {} -->'


@dataclass(frozen=True)
class Benchmark:
    """A script with its arguments.

    Attributes:
        arguments, quick: command line; with --quick, these after them.
        threads: for torch and BLAS; None: as many as there are.
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
    'memory': Benchmark('memory.py', [], ['--size=demo']),
    'sampling-demo': Benchmark('sampling.py', [], SAMPLING_QUICK),
    'sampling-cifar10': Benchmark('sampling.py', ['--size=cifar10-ddpmpp', '--rounds=3'], SAMPLING_QUICK),
    'sampling-imagenet64': Benchmark('sampling.py', ['--size=imagenet64-adm', '--rounds=2'], SAMPLING_QUICK),
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
    'images': Benchmark('images.py', [], ['--images=32', '--rounds=1', '--memory=300', '--workers=2']),
}

INTRODUCTION = """# Measured

Written by `make bench` (`python -m benchmarks`). Each block is the output of the command above it. Ratios within one run are what to compare: they
are measured in turns, in the same minutes of the same machine. What the pages of [docs](../docs/performance.md) say of speed refers to this one.
"""


def read_blocks(path: Path) -> dict[str, str]:
    """The blocks of a page by their names; none of another kind of page, or where there is none."""
    text = path.read_text(encoding='utf-8') if path.exists() else ''
    parts = re.split(rf'^{MARK.format("([a-z0-9-]+)")}\n', text, flags=re.M)
    return {name: block.strip('\n') for name, block in zip(parts[1::2], parts[2::2])}


def write_page(path: Path, blocks: dict[str, str]) -> None:
    """The page, whole or not at all, in the order of BENCHMARKS."""
    import torch

    missing = [name for name in BENCHMARKS if name not in blocks]
    notes = [f'    {machine()}']
    if not torch.cuda.is_available():
        notes.append(f'GPU: {NOT_MEASURED}. None could be had.')
    if missing:
        notes.append(f'{NOT_MEASURED.capitalize()}: `python -m benchmarks --only={",".join(missing)}`.')
    sections = [f'{MARK.format(name)}\n{blocks[name]}' for name in BENCHMARKS if name in blocks]
    try:
        with atomic_write(path) as file:
            file.write(
                '\n\n'.join([INTRODUCTION.strip('\n'), *notes, *sections, '']).rstrip('\n').encode() + b'\n'
            )
    except OSError as error:
        raise UserError(f'--out={path} cannot be written: {error.strerror}') from error


def measure(benchmark: Benchmark, quick: bool) -> str | None:
    """What the script prints; None where it fails, which its own last lines explain."""
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
    help=f'Of {", ".join(BENCHMARKS)}.  [default: all]',
)
@cli.option(
    '--quick', is_flag=True, help='Small sizes, to see that everything works; the figures mean nothing.'
)
@cli.option(
    '--out',
    metavar='FILE',
    type=cli.PATH,
    default='benchmarks/RESULTS.md',
    show_default=True,
    help='Page to write.',
)
def main(names, quick, out):
    """Measure everything, and write the page of results, anew after every benchmark. Blocks that are not measured again stay as they are."""
    path = Path(out)
    blocks, failed = read_blocks(path), []
    if names and path.exists() and not blocks:
        raise UserError(
            f'{out} has no blocks that could stay as they are: leave out --only, or choose another --out.'
        )
    if not path.parent.is_dir():
        raise UserError(f'--out={out} cannot be written: {path.parent} is no folder.')
    for name in names or BENCHMARKS:
        click.echo(f'{name}...', err=True)
        text = measure(BENCHMARKS[name], quick)
        if text is None:
            failed.append(name)
            continue
        blocks[name] = text
        write_page(path, blocks)
    if failed:
        raise UserError(f'{", ".join(failed)} failed, see above. The other blocks are in {out}.')


if __name__ == '__main__':
    main(prog_name='python -m benchmarks')
