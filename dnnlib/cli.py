"""Shared by all command lines: grouped help, errors in one line, types of values."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Sequence

import click

from dnnlib.limits import MAX_DIGITS, MAX_STEPS
from dnnlib.text import as_ranges, printable
from dnnlib.util import UserError, WrongOptions, check_other_file

MAX_NUMBERS = 10_000_000  # in a list of integers; more are a typing error
MOST, LARGEST = 10**12, 1e38  # limits of counts and of other numbers (the latter's is FP32's)
# [0-9] and not \d: int() and float() read the digits of every script.
INTEGER = re.compile(r'[+-]?[0-9]+')
NUMBER = re.compile(r'[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?')
INFINITY = re.compile(r'[+-]?inf(inity)?', re.IGNORECASE)
SEED_COUNT = 1 << 32  # seeds are below this; generators use 32 bits
LONGEST_USAGE_ERROR = 400  # characters; a usage error repeats the value
IMAGE_UNITS = dict(img=1, kimg=1_000, mimg=1_000_000)


def underscored(name: str) -> str:
    """An option's name in one of its spellings: `-` and `_` are alike, as in --lr-rampup and --batch_gpu."""
    return name.replace('-', '_')


def as_declared(command: click.Command, words: Sequence[str]) -> list[str]:
    """A command line with the options' names as the command declares them.

    click's own `token_normalize_func` would also spell the choices of values anew, as in --objective=cm-cd.
    """
    flags = {underscored(flag): flag for p in command.params for flag in (*p.opts, *p.secondary_opts)}
    end = words.index('--') if '--' in words else len(words)  # from there on they are no options
    spelled = []
    for word in words[:end]:
        name, equals, value = word.partition('=') if word.startswith('--') else (word, '', '')
        spelled.append(flags.get(underscored(name), name) + equals + value)
    return [*spelled, *words[end:]]


HELP_SETTINGS = dict(max_content_width=120, help_option_names=['-h', '--help'])


class Option(click.Option):
    """A click option that `--help` lists under the heading `group`."""

    def __init__(self, *args, group: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.group = group


class Argument(click.Argument):
    """A click argument that `--help` describes under the heading 'Arguments'."""

    group = 'Arguments'

    # Not called `help`: newer versions of click have that, and list it elsewhere.
    def __init__(self, *args, description: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.description = description

    def get_help_record(self, ctx):
        return self.human_readable_name, self.description


# Called when a command ends with an error that it prints.
ON_ERROR: list[Callable[[], None]] = []


class Command(click.Command):
    """A command that lists its options by group and turns a `UserError` into one line and exit status 1, or 2
    of a `WrongOptions`."""

    def __init__(self, *args, context_settings=None, **kwargs):
        super().__init__(*args, context_settings={**HELP_SETTINGS, **(context_settings or {})}, **kwargs)

    def parse_args(self, ctx, args):
        return super().parse_args(ctx, as_declared(self, args))

    def make_context(self, *args, **kwargs):
        try:
            return super().make_context(*args, **kwargs)
        except click.UsageError as error:
            # A message quotes what was typed, which may be long or have control characters.
            error.message = printable(error.message, LONGEST_USAGE_ERROR)
            raise
        except UserError as error:  # from a callback
            raise click.ClickException(str(error)) from error

    def invoke(self, ctx):
        try:
            check_outputs(ctx)
            return super().invoke(ctx)
        except (UserError, click.ClickException) as error:
            # Under torchrun: tell the other processes, which would wait for this one.
            for tell in ON_ERROR:
                tell()
            if isinstance(error, click.ClickException):
                raise
            if isinstance(error, WrongOptions):
                raise click.UsageError(str(error), ctx) from error
            raise click.ClickException(str(error)) from error

    def format_options(self, ctx, formatter):
        self.format_groups(ctx, formatter, self.get_params(ctx))

    def format_groups(self, ctx, formatter, parameters):
        """Write the parameters under the headings of their groups."""
        groups: dict[str, list] = {}
        # Groups appear in the order of their first parameters.
        for param in parameters:
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

    def parse_args(self, ctx, args):
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            # An option of a command, given before the command or without it.
            meant = underscored(error.option_name)
            having = [
                name
                for name, command in self.commands.items()
                if any(underscored(flag) == meant for p in command.params for flag in p.opts)
            ]
            if not having:
                raise
            commands = ' or '.join(f'{ctx.info_name} {name}' for name in having)
            raise click.UsageError(
                f'{error.option_name} is an option of a command: write {commands}, and then its options.', ctx
            ) from error


def option(*names, group: str | None = None, **kwargs):
    """`click.option` with a heading for `--help`, which shows the default."""
    has_default = kwargs.get('default') not in (None, '') and not kwargs.get('is_flag')
    return click.option(*names, cls=Option, group=group, **dict(show_default=has_default) | kwargs)


def argument(*names, help: str, **kwargs):
    """`click.argument` with a description for `--help`."""
    return click.argument(*names, cls=Argument, description=help, **kwargs)


PROGRAM = (
    'A TorchScript file is a program that PyTorch runs: give one that you trust, with #sha256= and its '
    'digest behind it.'
)


def shown(value: object) -> str:
    """A value of the command line in quotes, shortened."""
    return f"'{printable(value, MAX_DIGITS)}'"


class Integer(click.IntRange):
    """A whole number in a range, in decimal digits, at most `MOST` unless the range's maximum is given."""

    name = 'int'

    def convert(self, value, param, ctx):
        # int() would take '1_000' and digits of other scripts too.
        text = str(value).strip()
        if not INTEGER.fullmatch(text) or len(text) > MAX_DIGITS:
            self.fail(
                f'{shown(value)} is not a whole number'
                + f' of at most {MAX_DIGITS} digits' * (len(text) > MAX_DIGITS),
                param,
                ctx,
            )
        number = super().convert(text, param, ctx)
        if self.max is None and number > MOST:
            self.fail(f'{number} is too large: {MOST} is the most that counts go to', param, ctx)
        return number


class Number(click.FloatRange):
    """A number in a range, in decimal digits, at most `LARGEST`; `inf` only if `infinite`."""

    name = 'float'

    def __init__(self, *args, infinite: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.infinite = infinite

    def convert(self, value, param, ctx):
        # FloatRange takes 'nan', '1_000' and digits of other scripts too.
        text = str(value).strip()
        is_infinity = self.infinite and INFINITY.fullmatch(text)
        if not is_infinity and (not NUMBER.fullmatch(text) or len(text) > MAX_DIGITS):
            self.fail(
                f'{shown(value)} is not a finite number'
                + f' of at most {MAX_DIGITS} characters' * (len(text) > MAX_DIGITS),
                param,
                ctx,
            )
        number = super().convert(text, param, ctx)
        if abs(number) > LARGEST and not is_infinity:
            self.fail(f'{shown(value)} is too large: {LARGEST:g} is as far as numbers go here', param, ctx)
        return number

    def _describe_range(self):
        return super()._describe_range() if (self.min, self.max) != (None, None) else ''


class Images(click.ParamType):
    """A number of images: a bare one in units of `unit` images, or with its unit, as in 500kimg or 50Mimg.

    Args:
        kind: type of the value, which is in units of `unit` images.
    """

    def __init__(self, kind: Integer | Number, unit: float = 1):
        self.kind, self.unit = kind, unit
        self.name = {1e3: 'kimg', 1e6: 'mimg'}.get(unit, kind.name)

    def convert(self, value, param, ctx):
        # A number and its unit, of two letters or more: a single e is an exponent's.
        match = re.fullmatch(
            r'([0-9.+-].*?)\s*([a-z]{2,})', str(value).strip()[:LONGEST_USAGE_ERROR], re.IGNORECASE
        )
        if match is None:
            return self.kind.convert(value, param, ctx)
        known = match[2].lower() in IMAGE_UNITS
        if not known or not NUMBER.fullmatch(match[1]) or len(match[1]) > MAX_DIGITS:
            self.fail(f'{shown(value)} is not a number of images such as 50, 50Mimg or 500kimg', param, ctx)
        images = float(match[1]) * IMAGE_UNITS[match[2].lower()]
        if isinstance(self.kind, click.IntRange):
            # 1.001 * 1000 is not a whole number in binary.
            if not abs(images) <= MOST or abs(images - round(images)) > 1e-9 * max(1.0, images):
                self.fail(f'{shown(value)} is not a whole number of images, at most {MOST}', param, ctx)
            return self.kind.convert(round(images), param, ctx)
        # repr keeps every digit.
        return self.kind.convert(repr(images / self.unit), param, ctx)


COUNT = Integer(min=1)
STEPS = Integer(min=1, max=MAX_STEPS)  # of a sampler or a grid of noise levels
LEVELS = Integer(min=2, max=MAX_STEPS)  # noise levels in a grid
INDEX = Integer(min=0, max=MAX_STEPS)  # of a noise level
BATCH = Integer(min=1, max=1 << 20)  # images
SIDE = Integer(min=1, max=1 << 16)  # pixels or channels
WORKERS, SOME_WORKERS = Integer(min=0, max=1024), Integer(min=1, max=1024)
POSITIVE = Number(min=0, min_open=True)
SIGMA = Number(min=1e-9, max=1e6)  # noise levels: their squares are FP32 numbers
RHO = Number(min=0.1, max=1000)  # exponents of noise levels; below, powers overflow
FACTOR = Number(min=0, max=1e6)
SOME_FACTOR, SIGNED_FACTOR = Number(min=0, max=1e6, min_open=True), Number(min=-1e6, max=1e6)
KIMG = Images(Number(min=0, max=1e9), 1e3)  # a trillion images
SOME_MIMG = Images(Number(min=0, max=1e6, min_open=True), 1e6)
SOME_KIMG = Images(Number(min=0, max=1e9, min_open=True), 1e3)
IMAGES, SOME_IMAGES, TWO_IMAGES = (Images(Integer(min=least)) for least in (0, 1, 2))


def expand_path(path: str) -> str:
    """A path with its leading `~` or `~user` expanded, which shells do not do in `--dest=~/x`.

    URLs and names stay as they are. A prefix such as `dinov2:` may precede the path. A variable that no shell
    has replaced is refused: as a folder's name, it would be dangerous to delete.

    Raises: UserError for a user that does not exist, a path that begins with a variable such as $HOME, and an
        empty path.
    """
    if not path.strip():
        raise UserError('it is empty. Give a path; a variable of the shell may not be set')

    # Keep a prefix, but not the scheme of a URL.
    kind, start = re.fullmatch(r'(\w+:(?!//))?(.*)', path, re.DOTALL).groups()
    if variable := re.match(r'\$(\w+|\{\w+\})', start):
        raise UserError(
            f'{path} begins with a variable, {variable[0]}, that no shell has replaced (in single quotes?). '
            f'Write the path itself, or ./{start} for a file of that name'
        )

    # expanduser leaves `~name` as it is if there is no such user.
    expanded = os.path.expanduser(start)
    if expanded.startswith('~'):
        raise UserError(
            f'there is no user {start.partition("/")[0][1:]!r}, whose home {path} would begin with. '
            f'Write the path itself, or ./{start} for a file of that name'
        )
    return (kind or '') + expanded


class PathOrURL(click.ParamType):
    """A path or URL as text, or `many` of them joined by commas.

    Every option with a path has this type, because only it expands `~` (see `expand_path`).
    """

    name = 'path'

    def __init__(self, many: bool = False):
        self.many = many

    def convert(self, value, param, ctx):
        try:
            return ','.join(map(expand_path, value.split(','))) if self.many else expand_path(value)
        except UserError as error:
            self.fail(f'{error}.', param, ctx)


class OutputPath(PathOrURL):
    """The path of a file that the command writes. None that it reads may be written over: `check_outputs`."""

    name = 'file'


PATH, PATHS, OUTPUT = PathOrURL(), PathOrURL(many=True), OutputPath()


def check_outputs(ctx: click.Context) -> None:
    """Raises: UserError if a file to write is one that another option names, by this name or another; a
    UsageError if that one is to be written too."""
    options = {param.name: param for param in ctx.command.get_params(ctx)}
    for name, param in options.items():
        if not isinstance(param.type, OutputPath) or not (dest := ctx.params.get(name)):
            continue
        for other, value in ctx.params.items():
            if other != name and value == dest and isinstance(options[other].type, OutputPath):
                raise click.UsageError(f'{param.opts[0]} and {options[other].opts[0]} name one file.')
            # Several paths may be one option, and a digest may follow a path.
            texts = [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else []
            for text in texts if other != name else ():
                if isinstance(text, str):
                    check_other_file(text.partition('#')[0], dest, param.opts[0])


class IntRanges(click.ParamType):
    """Comma-separated integers and ranges: `1,2,5-10` becomes [1, 2, 5, 6, 7, 8, 9, 10]."""

    name = 'list'

    def convert(self, value, param, ctx):
        # click may pass on a value that is converted already, such as a default.
        if isinstance(value, list):
            return value
        values = []
        for part in value.split(','):
            match = re.fullmatch(rf'\s*([0-9]{{1,{MAX_DIGITS}}})(?:-([0-9]{{1,{MAX_DIGITS}}}))?\s*', part)
            if match is None or (match[2] and int(match[2]) < int(match[1])):
                self.fail(f'{shown(part)} is neither an integer nor a range such as 0-63', param, ctx)
            # Check the total before a range such as 0-999999999 takes gigabytes.
            first, last = int(match[1]), int(match[2] or match[1])
            if len(values) + last - first >= MAX_NUMBERS:
                self.fail(f'{shown(value)} has more than {MAX_NUMBERS:,} numbers', param, ctx)
            values.extend(range(first, last + 1))
        return values


class Seeds(IntRanges):
    """Seeds below 2^32 in the format of `IntRanges`; unless `repeats`, no seed occurs twice."""

    def __init__(self, repeats: bool = False):
        self.repeats = repeats

    def convert(self, value, param, ctx):
        seeds = super().convert(value, param, ctx)
        if max(seeds) >= SEED_COUNT:
            self.fail(f'there is no seed {max(seeds)}: seeds are below 2^32 = {SEED_COUNT}', param, ctx)
        if not self.repeats and (again := repeated(seeds)):
            self.fail(
                f'{as_ranges(again, limit=20)} of {len(seeds)} seeds named twice: the same seed again '
                'gives the same again. Name each once',
                param,
                ctx,
            )
        return seeds


SEED = Integer(0, SEED_COUNT - 1)


def repeated(numbers: Iterable[int]) -> list[int]:
    """The numbers that occur more than once, ascending."""
    # Sort them: a set of ten million takes a gigabyte.
    return sorted({a for a, b in itertools.pairwise(sorted(numbers)) if a == b})


def check_seeds(first: int, count: int, seed_option: str, count_option: str) -> None:
    """Raises: UsageError if the last of `count` seeds from `first` on is 2^32 or more."""
    if first + count > SEED_COUNT:
        raise click.UsageError(
            f'{seed_option}={first} and {count_option}={count} need seeds up to {first + count - 1}, and '
            f'seeds are below 2^32 = {SEED_COUNT}: lower {seed_option}.'
        )


class NumberList(click.ParamType):
    """Comma-separated numbers of one type: `16,8` becomes [16, 8]; `none` is the empty list."""

    name = 'list'

    def __init__(self, kind: Integer | Number = COUNT):
        self.kind = kind

    def convert(self, value, param, ctx):
        if isinstance(value, list):
            return value
        if value.strip().lower() == 'none':
            return []
        words = value.split(',')
        if len(words) > MAX_STEPS:
            self.fail(f'{shown(value)} has more than {MAX_STEPS:,} numbers', param, ctx)
        try:
            return [self.kind.convert(word, param, ctx) for word in words]
        except click.BadParameter as error:
            self.fail(
                f'{shown(value)} is not a comma-separated list of such numbers: {error.message}', param, ctx
            )
