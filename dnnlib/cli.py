"""What every command line of this repository shares: grouped help, errors in one line, EDM's value types."""
from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Sequence

import click

from dnnlib.util import UserError

MAX_NUMBERS = 10_000_000  # of a range of integers: more are a slip of the keyboard
SEED_COUNT = 1 << 32      # of the seeds that the generators tell apart: those below this
HELP_SETTINGS = dict(max_content_width=120, help_option_names=['-h', '--help'])


class Option(click.Option):
    """A click option that `--help` lists under the heading `group`."""

    def __init__(self, *args, group: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.group = group


class Argument(click.Argument):
    """A click argument that `--help` describes under the heading 'Arguments'."""

    group = 'Arguments'

    def __init__(self, *args, description: str, **kwargs):  # newer versions of click have `help`, and list it elsewhere
        super().__init__(*args, **kwargs)
        self.description = description

    def get_help_record(self, ctx):
        return self.human_readable_name, self.description


class Command(click.Command):
    """A command that lists its options by group and turns a `UserError` into one line and exit status 1."""

    def __init__(self, *args, context_settings=None, **kwargs):
        super().__init__(*args, context_settings={**HELP_SETTINGS, **(context_settings or {})}, **kwargs)

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except UserError as error:
            raise click.ClickException(str(error)) from error

    def format_options(self, ctx, formatter):
        groups: dict[str, list] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(param, 'group', None) or 'Options', []).append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)


class Group(click.Group):
    """A group of `Command`s, with the same handling of errors."""

    command_class = Command

    def __init__(self, *args, context_settings=None, **kwargs):
        super().__init__(*args, context_settings={**HELP_SETTINGS, **(context_settings or {})}, **kwargs)


def option(*names, group: str | None = None, **kwargs):
    """`click.option` with a heading for `--help`."""
    return click.option(*names, cls=Option, group=group, **kwargs)


def argument(*names, help: str, **kwargs):
    """`click.argument` with a description for `--help`."""
    return click.argument(*names, cls=Argument, description=help, **kwargs)


class Number(click.FloatRange):
    """A finite number in a range; `inf` only where `infinite` says so."""

    def __init__(self, *args, infinite: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.infinite = infinite

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if math.isnan(number) or (math.isinf(number) and not self.infinite):
            self.fail(f'{value} is not a finite number', param, ctx)
        return number


    def _describe_range(self):
        return super()._describe_range() if (self.min, self.max) != (None, None) else ''


POSITIVE = Number(min=0, min_open=True)
RHO = Number(min=0.1)  # exponents of noise levels; below, powers overflow


def expand_path(path: str) -> str:
    """A path with `~` or `~user` at its start in full, as a shell writes it, which leaves `--dest=~/x` alone. URLs and names stay as they are.

    A word and a colon may come before, as in `dinov2:~/models`. What a shell should have replaced and did not is refused, as the name of a
    folder it would be one that `rm -r` had better not be told of.
    Raises: UserError for a user that does not exist, for a path that begins with a variable such as $HOME, and for an empty one.
    """
    if not path.strip():
        raise UserError('it is empty. Give a path; a variable of the shell may not be set')
    kind, start = re.fullmatch(r'(\w+:(?!//))?(.*)', path, re.DOTALL).groups()
    if variable := re.match(r'\$(\w+|\{\w+\})', start):
        raise UserError(f'{path} begins with a variable, {variable[0]}, that no shell has replaced (in single quotes?). '
                        f'Write the path itself, or ./{start} for a file of that name')
    expanded = os.path.expanduser(start)
    if expanded.startswith('~'):
        raise UserError(f'there is no user {start.partition("/")[0][1:]!r}, whose home {path} would begin with. '
                        f'Write the path itself, or ./{start} for a file of that name')
    return (kind or '') + expanded


class PathOrURL(click.ParamType):
    """A path or URL, or `many` joined by commas, as text: see `expand_path`. The type of every option that is one; nothing else expands `~`."""

    name = 'path'

    def __init__(self, many: bool = False):
        self.many = many

    def convert(self, value, param, ctx):
        try:
            return ','.join(map(expand_path, value.split(','))) if self.many else expand_path(value)
        except UserError as error:
            self.fail(f'{error}.', param, ctx)


PATH, PATHS = PathOrURL(), PathOrURL(many=True)


class IntRanges(click.ParamType):
    """Comma-separated integers and ranges: `1,2,5-10` becomes [1, 2, 5, 6, 7, 8, 9, 10]."""

    name = 'list'

    def convert(self, value, param, ctx):
        if isinstance(value, list):
            return value
        values = []
        for part in value.split(','):
            match = re.fullmatch(r'\s*(\d+)(?:-(\d+))?\s*', part)
            if match is None or (match[2] and int(match[2]) < int(match[1])):
                self.fail(f'{part!r} is neither an integer nor a range such as 0-63', param, ctx)
            numbers = range(int(match[1]), int(match[2] or match[1]) + 1)
            if numbers.stop - numbers.start > MAX_NUMBERS:
                self.fail(f'{part!r} has more than {MAX_NUMBERS:,} numbers', param, ctx)
            values.extend(numbers)
        return values


class Seeds(IntRanges):
    """Seeds, as `IntRanges` reads them, each below 2^32 and, unless `repeats`, each named once."""

    def __init__(self, repeats: bool = False):
        self.repeats = repeats

    def convert(self, value, param, ctx):
        seeds = super().convert(value, param, ctx)
        if max(seeds) >= SEED_COUNT:
            self.fail(f'there is no seed {max(seeds)}: seeds are below 2^32 = {SEED_COUNT}', param, ctx)
        if not self.repeats and len(set(seeds)) < len(seeds):
            again = sorted({a for a, b in itertools.pairwise(sorted(seeds)) if a == b})
            self.fail(f'{as_ranges(again)} of {len(seeds)} seeds named twice: the same seed again gives the same again. Name each once', param, ctx)
        return seeds


SEED = click.IntRange(0, SEED_COUNT - 1)


def check_seeds(first: int, count: int, seed_option: str, count_option: str) -> None:
    """UsageError where `count` seeds from `first` on go beyond those that there are."""
    if first + count > SEED_COUNT:
        raise click.UsageError(f'{seed_option}={first} and {count_option}={count} ask for seeds up to {first + count - 1}, and seeds are below '
                               f'2^32 = {SEED_COUNT}: lower {seed_option}.')


def as_ranges(numbers: Sequence[int], limit: int = 20) -> str:
    """Ascending integers as `IntRanges` reads them, `0-3,7`; after `limit` ranges, how many numbers there are besides."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    text = ','.join(f'{low}-{high}' if low < high else f'{low}' for low, high in ranges[:limit])
    rest = sum(high - low + 1 for low, high in ranges[limit:])
    return text + (f' and {rest} more' if rest else '')


class NumberList(click.ParamType):
    """Comma-separated numbers of one type: `16,8` becomes [16, 8]; `none` is the empty list."""

    name = 'list'

    def __init__(self, kind: type = int):
        self.kind = kind

    def convert(self, value, param, ctx):
        if isinstance(value, list):
            return value
        if value.strip().lower() in ('', 'none'):
            return []
        try:
            return [self.kind(part) for part in value.split(',')]
        except ValueError:
            self.fail(f'{value!r} is not a comma-separated list of {self.kind.__name__} numbers', param, ctx)
