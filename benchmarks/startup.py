"""Start-up time: --help of every script, and train.py up to its first step, for teacher and student of the
demo's size.

Training is timed by its output: from the start of `train.py` to the line about the data, the line with which
training starts, and the line of the first tick, which follows the first step.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import ROOT, block, in_turns, least, rounds_option, table
from dnnlib import cli
from experiments import bundled, runner
from experiments.bundled import DIGITS

EVENTS = {'data ready': 'Data: ', 'training begins': 'Training for ', 'first step done': 'tick 0 '}


def scripts() -> list[str]:
    """Scripts at the top of the repository that have --help."""
    return sorted(path.name for path in ROOT.glob('*.py') if 'click.' in path.read_text(encoding='utf-8'))


def run(*arguments) -> None:
    subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def time_training(*options) -> dict[str, float]:
    """Seconds from the start of train.py to each of EVENTS."""
    command = [sys.executable, 'train.py', *map(str, options)]
    start, seconds = time.perf_counter(), {}
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=dict(os.environ, PYTHONUNBUFFERED='1')
    ) as process:
        for line in process.stdout:
            for event, text in EVENTS.items():
                if text in line:
                    seconds.setdefault(event, time.perf_counter() - start)
    if process.returncode or seconds.keys() != EVENTS.keys():
        raise RuntimeError(
            f'train.py exited with {process.returncode} after these events: {", ".join(seconds) or "none"}'
        )
    return seconds


def time_trainings(rounds: int, folder: Path) -> dict[str, dict[str, float]]:
    """Least seconds to each event, for a teacher with the demo's network and for an 8-step student of it."""
    data = folder / 'digits.zip'
    run('dataset_tool.py', '--source=digits', f'--dest={data}')

    # One step.
    short = [
        f'--data={data}',
        '--cond=1',
        *bundled.COMMON,
        f'--batch={DIGITS.batch}',
        '--seed=0',
        '--nosubdir',
        '--duration=0.000128',
        '--dump=0',
    ]

    # Each student has the teacher of its round.
    found = {}
    for attempt in range(rounds):
        teacher = [*short, *DIGITS.network, *DIGITS.teacher, f'--outdir={folder / f"teacher-{attempt}"}']
        student = [
            *short,
            *bundled.student_options('mcd', 8),
            '--objective=mcd',
            '--S=8',
            f'--outdir={folder / f"student-{attempt}"}',
        ]
        found.setdefault('teacher', []).append(time_training(*teacher))
        snapshot = runner.newest_snapshot(folder / f'teacher-{attempt}')
        found.setdefault('8-step student', []).append(time_training(*student, f'--teacher={snapshot}'))
    return {
        name: {event: min(run[event] for run in runs) for event in EVENTS} for name, runs in found.items()
    }


@click.command(cls=cli.Command)
@rounds_option('Number of repetitions.')
@cli.option('--scripts', 'names', metavar='LIST', help='Scripts whose --help is timed.  [default: all]')
def main(rounds, names):
    """Time --help of every script, and train.py up to its first step."""
    names = names.split(',') if names else scripts()
    if unknown := sorted(set(names) - set(scripts())):
        raise click.UsageError(f'--scripts: {", ".join(unknown)} is not one of {", ".join(scripts())}')
    helped = least(in_turns({name: lambda name=name: run(name, '--help') for name in names}, rounds))
    with tempfile.TemporaryDirectory() as folder:
        trained = time_trainings(rounds, Path(folder))
    click.echo(
        block(
            'Start-up',
            f'Seconds, least of {rounds}: `--help` of every script, and train.py with the network and '
            f'options of the demo, from its start to each event; the first step has {DIGITS.batch} images.',
            table(['`--help` of', 'seconds'], [[name, f'{seconds:.2f}'] for name, seconds in helped.items()]),
            table(
                ['train.py', *EVENTS],
                [
                    [name, *(f'{seconds:.1f}' for seconds in events.values())]
                    for name, events in trained.items()
                ],
            ),
        )
    )


if __name__ == '__main__':
    main()
