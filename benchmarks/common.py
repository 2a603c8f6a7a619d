"""Shared by the benchmarks: name of the machine, blocks of Markdown, timing in turns, and separate
processes."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import click

from dnnlib import cli

ROOT = Path(__file__).resolve().parents[1]
NOT_MEASURED = 'not measured'
WIDTH = 150  # of prose


def rounds_option(help: str, default: int = 3):
    """The decorator that adds --rounds to a benchmark."""
    return cli.option(
        '--rounds', metavar='INT', type=click.IntRange(min=1), default=default, show_default=True, help=help
    )


def machine() -> str:
    """The device and the versions that timings depend on, in one line."""
    import numpy
    import torch

    cpu = f'{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads'
    device = f'{torch.cuda.get_device_name()}, {cpu}' if torch.cuda.is_available() else cpu
    return (
        f'{device}; torch {torch.__version__}, NumPy {numpy.__version__}, Python {platform.python_version()}'
    )


def command() -> str:
    """The command line of this process, relative to the root of the repository."""
    threads = [f'OMP_NUM_THREADS={os.environ["OMP_NUM_THREADS"]}'] if 'OMP_NUM_THREADS' in os.environ else []
    script = Path(sys.argv[0]).resolve()
    name = str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name
    return shlex.join([*threads, 'python', name, *sys.argv[1:]])


def block(title: str, prose: str, *parts: str) -> str:
    """A section of RESULTS.md: title, command, prose, machine, and `parts`: paragraphs or tables."""
    prose = textwrap.fill(prose, WIDTH, break_long_words=False, break_on_hyphens=False)
    return '\n\n'.join(
        [f'## {title}', f'`{command()}`', prose, f'    {machine()}', *(part.strip('\n') for part in parts)]
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. Raises: ValueError if a row is not as long as the header."""
    from experiments.report import markdown_table

    if any(len(row) != len(header) for row in rows):
        raise ValueError(f'rows of {sorted({len(row) for row in rows})} cells under {len(header)} headings')
    return markdown_table(header, rows)


def in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call in every round, by name; in turns, so that other load affects all equally."""
    seconds = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def least(seconds: dict[str, list[float]]) -> dict[str, float]:
    """The minimum of each: noise only adds time."""
    return {name: min(values) for name, values in seconds.items()}


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median of a / b over rounds in which both were measured."""
    return statistics.median(x / y for x, y in zip(a, b))


def apart(*arguments, env: dict[str, str] | None = None):
    """JSON output of `python <arguments>`, a fresh process with unused memory and threads."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ, **(env or {})),
    )
    return json.loads(done.stdout)


class NamesOf(click.ParamType):
    """Comma-separated names out of those that are known; repetitions are dropped."""

    name = 'list'

    def __init__(self, known: Collection[str]):
        self.known = known

    def convert(self, value, param, ctx):
        if isinstance(value, list):
            return value
        names = value.split(',')
        if unknown := [name for name in names if name not in self.known]:
            self.fail(f'{", ".join(unknown)}: choose from {", ".join(self.known)}', param, ctx)
        return list(dict.fromkeys(names))
