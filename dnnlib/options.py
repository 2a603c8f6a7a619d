"""Options declared once, as fields of frozen dataclasses.

    @dataclass(frozen=True)
    class SegmentOptions:
        S: int = opt(8, cli.STEPS, 'Number of student sampling steps.')

The command line, `--help`, the tables of docs/options.md, the check of a recorded value and the reader of
`--config` all come from the field. A subclass gives an option another default by a plain `S: int = 1`.
Commands that share options take them with `gathered` or, one by one, with the option as a decorator.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from dnnlib import cli, limits, schema

SWITCH = 'switch'  # a kind: --name/--no_name
FLAG = 'flag'  # a kind: --name alone, off by default
ON_OFF = 'on or off'  # a kind: --name, --name=True, --name=False


@dataclass(frozen=True)
class Option:
    """An option of a command, declared by `opt`; also the decorator that adds it to one.

    Attributes:
        name: of the field, and of the command's parameter.
        kind: click type, `bool`, or one of SWITCH, FLAG, ON_OFF; None: any text.
        help: one or more sentences.
        flags: names on the command line; by default `--name`.
        default_text: the default in --help if it depends on other things.
        key: path in a recorded configuration, with dots between names; None: elsewhere, see `record`.
        record: whether an objective's configuration records it among the options of its loss.
        unit: factor from the option's unit to the recorded one.
        settled: a default of None is replaced before the run begins, so that no record has None.
        scales: the default is that of a run of the usual length; a shorter run has the same share of its own.
        later: records of runs have it only if it is not at its default, because runs of versions before it
            do not.
        idle: (option, value) with which this one has no effect.
        needs: (option, value) without which this one is refused.
        switch: option that enables a group, and without which this one is refused.
        heading: in --help.
    """

    name: str
    kind: Any
    help: str
    default: Any = None
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    default_text: str | None = None
    key: str | None = None
    record: bool = True
    unit: float = 1
    settled: bool = False
    scales: bool = False
    later: bool = False
    idle: tuple[str, object] | None = None
    needs: tuple[str, object] | None = None
    switch: str | None = None
    required: bool = False
    heading: str = ''

    @property
    def flag(self) -> str:
        """The first long name, for messages."""
        return next(name for name in self.flags or (f'--{self.name}',) if name.startswith('--'))

    def spelled(self, value: object) -> str:
        """The option with a value, as on a command line."""
        if self.kind in (SWITCH, FLAG):
            return self.flag if value or self.kind == FLAG else f'--no_{self.name}'
        as_number = isinstance(value, bool) and self.default is not None  # --val=0, but --consistency=False
        text = 'none' if value in ([], None) else int(value) if as_number else value
        return f'{self.flag}={text}'

    def parameter(self, default_text: str | None) -> cli.Option:
        """The option of a click command. Its own default is None: only what is given has a value."""
        names, details = self._declaration(default_text)
        return cli.Option(names, **({} if self.required else dict(default=None)), **details)

    def __call__(self, command: Callable) -> Callable:
        """As a decorator: adds the option, with its default, to a click command."""
        names, details = self._declaration(self.default_text)
        shown = self.default is not None and self.kind not in (SWITCH, FLAG)
        default = {} if self.required else dict(default=self.default)
        return cli.option(*names, **default, show_default=shown, **details)(command)

    def _declaration(self, default_text: str | None) -> tuple[list[str], dict]:
        """Names and settings of a click option, without the default: with one, even None, click would not miss
        a required option."""
        text = f'{self.help}  [default: {default_text}]' if default_text and not self.required else self.help
        details = dict(help=text, group=self.heading, required=self.required)
        if self.kind == SWITCH:
            return [self.name, f'--{self.name}/--no_{self.name}'], details
        if self.kind == FLAG:
            details |= dict(is_flag=True)
        elif self.kind == ON_OFF:
            details |= dict(type=bool, is_flag=False, flag_value=True)
        else:
            details |= dict(type=self.kind, metavar=self.metavar)
        return [self.name, *(self.flags or (f'--{self.name}',))], details

    def under(self, heading: str) -> Option:
        """The same option under another heading."""
        return dataclasses.replace(self, heading=heading)

    def schema(self) -> schema.Kind:
        """The kind of a recorded value, before its unit."""
        return kind_of(self.kind)


# ----------------------------------------------------------------------------
# Declaring options, and reading the declarations.


def opt(default, kind, help: str, **details) -> Any:
    """A field of a frozen dataclass that is an option.

    Args: see `Option`. A `default` of None is found later, or means none.
    """
    return dataclasses.field(default=default, metadata=dict(option=dict(kind=kind, help=help, **details)))


def recorded(default, kind: schema.Kind) -> Any:
    """A field that is not an option: a number that follows from options and is recorded with them."""
    return dataclasses.field(default=default, metadata=dict(recorded=kind))


def options_of(cls: type) -> dict[str, Option]:
    """{name: option} of a class, with the class's own defaults, in the order of classes and fields.

    The heading of an option is its own, or that of the class that declares it.
    """
    found = {}
    for field in dataclasses.fields(cls):
        # Find the class that declares the option, which a subclass may only give another default.
        for base in cls.__mro__:
            own = dataclasses.is_dataclass(base) and field.name in inspect.get_annotations(base)
            if own and 'option' in (metadata := base.__dataclass_fields__[field.name].metadata):
                switch = getattr(base, 'switch', None)
                # The switch of a group does not need itself.
                group = dict(heading=base.heading, switch=None if switch == field.name else switch)
                found[field.name] = Option(
                    field.name, default=field.default, **{**group, **metadata['option']}
                )
                break
    return found


def gathered(name: str, options: Sequence[Option], make: Callable = dict) -> Callable[[Callable], Callable]:
    """A decorator: adds options to a click command, whose argument `name` is `make(**values)`."""

    def decorate(command):
        @functools.wraps(command)
        def gathering(**values):
            own = {option.name: values.pop(option.name) for option in options}
            return command(**{name: make(**own)}, **values)

        # The last decorator comes first in --help.
        for option in reversed(options):
            gathering = option(gathering)
        return gathering

    return decorate


def kind_of(kind: Any) -> schema.Kind:
    """The schema of an option's value in a file. Numbers keep their ranges; text is limited in length."""
    # A type may have a schema of its own.
    if hasattr(kind, 'schema'):
        return kind.schema
    if isinstance(kind, cli.Images):
        return kind_of(kind.kind)
    if isinstance(kind, click.Choice):
        return schema.OneOf(tuple(kind.choices))
    if kind in (bool, SWITCH, FLAG, ON_OFF):
        return schema.Flag()
    if isinstance(kind, cli.NumberList):
        return schema.ListOf(kind_of(kind.kind), limits.MAX_STEPS)

    # Numbers: what no range bounds, the command line does.
    if isinstance(kind, click.IntRange):
        return schema.Integer(kind.min or 0, cli.MOST if kind.max is None else kind.max)
    if isinstance(kind, click.FloatRange):
        low = -cli.LARGEST if kind.min is None else kind.min
        high = cli.LARGEST if kind.max is None else kind.max
        # An open end excludes its bound: the next number is the first inside.
        return schema.Real(
            math.nextafter(low, math.inf) if kind.min_open else low,
            math.nextafter(high, -math.inf) if kind.max_open else high,
        )
    return schema.Text()


# ----------------------------------------------------------------------------
# Values, as text and by name.


def value_text(value: object) -> str:
    """A default for --help."""
    if value is None:
        return 'none'
    if isinstance(value, list):
        return ','.join(f'{item:g}' for item in value) or 'none'
    if isinstance(value, float):
        return f'{value:.6g}'
    return str(value)


def grouped(values: Mapping[str, object], base: object) -> str:
    """`base; a, b 3; c 4` from {name: value}: names whose values differ from the base, by value."""
    groups: dict[str, list[str]] = {}
    for name, value in values.items():
        if value != base:
            groups.setdefault(value_text(value), []).append(name)
    return '; '.join([value_text(base), *(f'{", ".join(names)} {text}' for text, names in groups.items())])


def given_in(ctx: click.Context) -> dict[str, object]:
    """{name: value} of the options given on the command line or by `--config`."""
    default = (click.core.ParameterSource.DEFAULT, click.core.ParameterSource.ENVIRONMENT, None)
    return {
        name: value for name, value in ctx.params.items() if ctx.get_parameter_source(name) not in default
    }


def at(record: Mapping, key: str) -> Any:
    """The entry of nested mappings at a key with dots; None if there is none."""
    for part in key.split('.'):
        record = record.get(part) if isinstance(record, Mapping) else None
    return record


def names(options: Iterable[Option]) -> str:
    """The options' flags, for messages."""
    return ', '.join(option.flag for option in options)
