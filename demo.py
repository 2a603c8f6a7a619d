"""Demo on real digits, in minutes on a laptop: a teacher that needs 511 evaluations, students that need 8 or
fewer.

Runs the scripts of this repository as a user would, prints each command, and writes a report. The same command
again resumes what was interrupted.
"""

from __future__ import annotations

import dnnlib.interrupts  # noqa: F401  (first)

import os
from pathlib import Path

import click

from dnnlib import cli
from experiments.demo_run import Done, run_demo, supported, write_report
from experiments.options import JOBS, SCALE
from experiments.runner import Runner, make_outdir, run_interruptibly


@click.command(cls=cli.Command)
@cli.option(
    '--outdir',
    metavar='DIR',
    type=cli.PATH,
    default='demo-out',
    help='Output folder; the same command again resumes there.',
)
@SCALE
@JOBS
def main(outdir, scale, jobs):
    """Train a teacher on real digits, distill students of 8 and fewer steps in two ways, and write a report.

    Takes minutes on two cores.
    """
    outdir = Path(outdir)
    make_outdir(outdir)
    done = Done(outdir, scale)
    runner = Runner(outdir, threads=max((os.cpu_count() or 1) // jobs, 1), record=outdir / 'commands.txt')
    try:
        rows = run_interruptibly(
            runner, lambda: run_demo(runner, done, jobs), 'run the same command again to resume.'
        )
    finally:
        done.save()
    minutes = done.seconds / 60
    write_report(runner, rows, minutes)
    print('\n' + runner.path('table.md').read_text())
    print(supported(rows) + '\n')
    print(f'{minutes:.1f} minutes. Open {runner.path("report.html")} for the samples, curves and commands.')


if __name__ == '__main__':
    main()
