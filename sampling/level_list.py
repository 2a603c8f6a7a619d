"""Lists of noise levels on command lines and in files, and the record of the search that found them. Imports no
torch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence

import click

from dnnlib import WrongOptions, cli, limits, schema
from dnnlib.util import atomic_write

LARGEST_LIST = 1 << 20  # characters of a file of noise levels
MARK = '# search.py --schedule: '  # before the record, in a comment

# What levels were searched for: the network's digest, the solver with its options, network evaluations.
RECORD = schema.Record(
    dict(
        network=schema.Text(r'[0-9a-f]{64}', words='a digest'),
        solver=schema.Text(r'[a-z0-9_]+', 64, words='the name of a solver'),
        order=schema.Maybe(schema.Integer(1, 16)),
        variant=schema.Maybe(schema.Text(r'[a-z0-9_]+', 64)),
        afs=schema.Flag(),
        to_zero=schema.Flag(),
        nfe=schema.Integer(1, 2 * limits.MAX_STEPS),
    ),
    required=['network', 'solver', 'afs', 'to_zero', 'nfe'],
)


class SearchedLevels(list):
    """Noise levels with the `record` of their search."""

    def __init__(self, levels: Sequence[float], record: dict):
        super().__init__(levels)
        self.record = record


def write_levels(path: str, levels: Sequence[float], record: Mapping[str, object]) -> None:
    """Write a file that `--sigmas` reads, atomically; repr gives the shortest exact digits."""
    lines = [MARK + json.dumps(dict(record)), *map(repr, levels)]
    with atomic_write(path) as file:
        file.write('\n'.join(lines).encode() + b'\n')


def follow_search(net, solver: str | None, options: dict) -> tuple[str | None, dict]:
    """The solver and sampling options, completed by the record of `sigmas`, if they have one.

    Warns on stderr if they were searched for another network.

    Raises: UserError if another solver, or other options of it, are given.
    """
    record = getattr(options.get('sigmas'), 'record', None)
    if record is None:
        return solver, options
    from torch_utils import distributed
    from training.guidance import model_digest

    # What is not given is as in the search.
    given, completed = dict(options, solver=solver), {}
    for name in ('solver', 'order', 'variant', 'afs', 'to_zero'):
        value = record.get(name)
        completed[name] = value if given.get(name) is None else given[name]
        if completed[name] != value:
            raise WrongOptions(
                f'the noise levels of sigmas were searched for {name} {value}, not {completed[name]}: leave that '
                'option out, or give the levels themselves, as in 80,5.8,0.9,0.002'
            )
    # Such levels may still do well, as for a later snapshot of the same run: only a warning.
    if model_digest(net) != record['network'] and distributed.is_main():
        click.echo('Warning: the noise levels of --sigmas were searched for another network.', err=True)
    solver = completed.pop('solver')
    return solver, {**options, **{name: value for name, value in completed.items() if value is not None}}


class LevelList(click.ParamType):
    """Noise levels: comma-separated numbers, or the path of a text file with numbers between commas or white
    space, in which `#` begins a comment. They fall, and only the last may be 0."""

    name = 'list'
    kind = cli.Number(min=0, max=cli.SIGMA.max)
    schema = schema.ListOf(schema.Real(0, cli.SIGMA.max), limits.MAX_STEPS)

    def convert(self, value, param, ctx):
        if isinstance(value, list):
            return value
        # Numbers, or else the path of a file.
        words = value.split(',')
        record = None
        if not all(cli.NUMBER.fullmatch(word.strip()) for word in words):
            words, record = self._read(value, param, ctx)
        if not 0 < len(words) <= limits.MAX_STEPS:
            self.fail(
                f'{cli.shown(value)} lists {len(words)} noise levels, not 1 to {limits.MAX_STEPS}', param, ctx
            )
        # Each in its range, then all in order.
        levels = [self.kind.convert(word, param, ctx) for word in words]
        if any(above <= below for above, below in itertools.pairwise(levels)):
            self.fail(f'{cli.shown(value)}: noise levels fall from one to the next', param, ctx)
        return levels if record is None else SearchedLevels(levels, record)

    def _read(self, value, param, ctx) -> tuple[list[str], dict | None]:
        """(numbers, record of a search or None) of a text file."""
        path = cli.PATH.convert(value, param, ctx)
        try:
            with open(path, encoding='utf-8') as file:
                # A character more than allowed shows that a file is too large, without reading all of it.
                text = file.read(LARGEST_LIST + 1)
        except OSError as error:
            self.fail(
                f'{cli.shown(value)} is neither a list such as 80,5.8,0.9,0.002 nor a file: {error.strerror}',
                param,
                ctx,
            )
        except ValueError:  # not UTF-8
            self.fail(f'{cli.shown(value)} is no text file', param, ctx)
        if len(text) > LARGEST_LIST:
            self.fail(f'{cli.shown(value)} is too large for a list of noise levels', param, ctx)
        # Numbers, and what a comment records.
        lines, record = text.splitlines(), None
        numbers = [line.partition('#')[0] for line in lines]
        # A damaged record is an error: levels suit only the solver that they were searched for.
        for line in lines:
            if line.startswith(MARK):
                try:
                    record = schema.parse_json(line.removeprefix(MARK), LARGEST_LIST, 'the record')
                    schema.check(record, RECORD, 'the record')
                except ValueError as error:
                    self.fail(f'{cli.shown(value)}: its record of the search {error}', param, ctx)
        return ' '.join(numbers).replace(',', ' ').split(), record
