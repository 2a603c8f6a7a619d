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
MARK = 'search.py --schedule: '  # before the record, in a comment

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
    lines = [f'# {MARK}' + json.dumps(dict(record)), *map(repr, levels)]
    with atomic_write(path) as file:
        file.write('\n'.join(lines).encode() + b'\n')


def complete(given: Mapping[str, object]) -> dict:
    """Sampling options, completed by the record of `sigmas`, if they have one.

    Raises: UserError if another solver, or other options of it, are given, or the levels are not those of the
        record.
    """
    record = getattr(given.get('sigmas'), 'record', None)
    if record is None:
        return dict(given)
    from training.solvers import ODE_SOLVERS

    # What is not given is as in the search.
    completed = dict(given, sigmas=list(given['sigmas']))
    for name in ('solver', 'order', 'variant', 'afs', 'to_zero'):
        value = record.get(name)
        if given.get(name) is not None and given[name] != value:
            raise WrongOptions(
                f'the noise levels of sigmas were searched for {name} {value}, not {given[name]}: leave that '
                'option out, or give the levels themselves, as in 80,5.8,0.9,0.002'
            )
        if value is not None:
            completed[name] = value

    # A file that has lost lines would still be a list of levels.
    solver, afs, to_zero = ODE_SOLVERS.get(record['solver']), record['afs'], record['to_zero']
    steps = solver and solver.steps(len(given['sigmas']), afs, to_zero)
    if solver is None or solver.nfe(steps, afs, to_zero) != record['nfe']:
        raise WrongOptions(
            f'the file of sigmas is damaged: its {len(given["sigmas"])} noise levels are not the '
            f'{record["nfe"]} evaluations by {record["solver"]} that it records. Search them again'
        )
    return completed


def follow_search(net, solver: str | None, options: dict) -> tuple[str | None, dict]:
    """(solver, options) of sampling a network, completed by the record of `sigmas`, if they have one.

    Warns on stderr if they were searched for another network. Raises: see `complete`.
    """
    record = getattr(options.get('sigmas'), 'record', None)
    if record is None:
        return solver, options
    from torch_utils import distributed
    from training.guidance import model_digest

    options = complete(dict(options, solver=solver))
    # Such levels may still do well, as for a later snapshot of the same run: only a warning.
    if model_digest(net) != record['network'] and distributed.is_main():
        click.echo(
            'Warning: the noise levels of --sigmas were searched for another network, or other guidance.',
            err=True,
        )
    return options.pop('solver'), options


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
            with open(path, encoding='utf-8-sig') as file:
                # A character more than allowed shows that a file is too large, without reading all of it.
                text = file.read(LARGEST_LIST + 1)
        except OSError as error:
            self.fail(
                f'{cli.shown(value)} is neither a list such as 80,5.8,0.9,0.002 nor a file: {error.strerror}',
                param,
                ctx,
            )
        except ValueError:  # not UTF-8
            self.fail(f'{cli.shown(value)} is not a text file', param, ctx)
        if len(text) > LARGEST_LIST:
            self.fail(f'{cli.shown(value)} is too large for a list of noise levels', param, ctx)
        # Numbers, and what a comment records.
        lines, record = text.splitlines(), None
        numbers = [line.partition('#')[0] for line in lines]
        # A damaged record is an error: levels suit only the solver that they were searched for.
        for line in lines:
            mark, found, text = line.partition('#')[2].lstrip().partition(MARK)
            if found and not mark:
                try:
                    record = schema.parse_json(text, LARGEST_LIST, 'the record')
                    schema.check(record, RECORD, 'the record')
                except ValueError as error:
                    self.fail(f'{cli.shown(value)}: its record of the search {error}', param, ctx)
        return ' '.join(numbers).replace(',', ' ').split(), record
