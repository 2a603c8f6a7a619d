"""Options that the commands of experiments share."""

from __future__ import annotations

from collections.abc import Sequence

import click

from dnnlib import cli
from dnnlib.options import Option


class NamesOrAll(click.ParamType):
    """Comma-separated different names out of those that are known, or `all`."""

    name = 'list'

    def __init__(self, known: Sequence[str]):
        self.known = list(known)

    def convert(self, value, param, ctx):
        if not isinstance(value, str):
            return value
        names = self.known if value == 'all' else [name.strip() for name in value.split(',')]
        for name in names:
            if name not in self.known:
                self.fail(f'{name!r} is none of {", ".join(self.known)}', param, ctx)
            if names.count(name) > 1:
                self.fail(f'{name!r} is named twice', param, ctx)
        return names


JOBS = Option('jobs', cli.SOME_WORKERS, 'Commands to run in parallel.', default=2, metavar='INT')
SCALE = Option(
    'scale',
    cli.SOME_FACTOR,
    'Factor for the number of training steps and, below 1, of samples. Small values give a meaningless '
    'table.',
    default=1.0,
    metavar='FLOAT',
)
