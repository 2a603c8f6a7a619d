"""Schemas of plain data in files: names, types and ranges, checked when a file is read.

A schema is made of the kinds below; `check(value, kind, where)` checks a value, whose name in messages is
`where`, such as 'progress.nimg'.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dnnlib.limits import JSON_FILE, UNREADABLE, check_size, open_regular, read_at_most
from dnnlib.text import printable

MAX_DEPTH, MAX_VALUES = 32, 1_000_000  # of plain data without a schema
LARGEST = 2**63 - 1  # integer, by default


class Mismatch(ValueError):
    """A value that does not match its schema. The message completes 'it ...'."""


class Kind:
    """A value of any kind. Subclasses describe theirs in `words`, and override `check`."""

    words = 'any value'

    def check(self, value, where: str) -> None:
        """Raises: Mismatch, which names the value `where`."""

    def refuse(self, value, where: str):
        raise Mismatch(f'has {shown(value)} for {printable(where, 200)}, which is {self.words}')


def check(value, kind: Kind, where: str):
    """The value. Raises: Mismatch, which names its first part of another kind."""
    kind.check(value, where)
    return value


def shown(value) -> str:
    """A value of a file for messages: a number or text itself, or the type of anything else."""
    if isinstance(value, int) and abs(value) > LARGEST:
        return 'a huge integer'
    return (
        printable(repr(value), 60)
        if value is None or isinstance(value, (bool, int, float, str))
        else f'a {type(value).__name__}'
    )


# ----------------------------------------------------------------------------
# Numbers and text.


@dataclass(frozen=True)
class Integer(Kind):
    low: int = 0
    high: int = LARGEST

    @property
    def words(self) -> str:
        return f'an integer from {self.low:,} to {self.high:,}'

    def check(self, value, where):
        # `type`, because True is an instance of int.
        if type(value) is not int or not self.low <= value <= self.high:
            self.refuse(value, where)


@dataclass(frozen=True)
class Real(Kind):
    """A number in a range, which may include infinity; NaN only if `nan`."""

    low: float = -1e300
    high: float = 1e300
    nan: bool = False

    @property
    def words(self) -> str:
        return (
            'a finite number'
            if (self.low, self.high) == (-1e300, 1e300)
            else f'a number from {self.low:g} to {self.high:g}'
        )

    def check(self, value, where):
        allowed_nan = self.nan and value != value  # NaN is in no range
        if type(value) not in (int, float) or not (self.low <= value <= self.high or allowed_nan):
            self.refuse(value, where)


@dataclass(frozen=True)
class Text(Kind):
    pattern: str = ''  # regular expression of the full text; empty: any
    longest: int = 4096  # characters
    words: str = 'text'

    def check(self, value, where):
        if (
            type(value) is not str
            or len(value) > self.longest
            or (self.pattern and not re.fullmatch(self.pattern, value, re.ASCII))
        ):
            self.refuse(value, where)


class Flag(Kind):
    words = 'true or false'

    def check(self, value, where):
        if type(value) is not bool:
            self.refuse(value, where)


@dataclass(frozen=True)
class OneOf(Kind):
    values: tuple

    @property
    def words(self) -> str:
        return f'one of {", ".join(map(str, self.values))}'

    def check(self, value, where):
        if type(value) is not str or value not in self.values:
            self.refuse(value, where)


# ----------------------------------------------------------------------------
# Lists, tables and records.


@dataclass(frozen=True)
class Maybe(Kind):
    """None, or of a kind."""

    kind: Kind

    def check(self, value, where):
        if value is not None:
            self.kind.check(value, where)


@dataclass(frozen=True)
class ListOf(Kind):
    kind: Kind
    longest: int = 10_000
    shortest: int = 0

    @property
    def words(self) -> str:
        return f'a list of {self.shortest:,} to {self.longest:,} entries'

    def check(self, value, where):
        if not isinstance(value, (list, tuple)) or not self.shortest <= len(value) <= self.longest:
            self.refuse(value, where)
        for i, item in enumerate(value):
            self.kind.check(item, f'{where}[{i}]')


@dataclass(frozen=True)
class Row(Kind):
    """A list with one entry per kind, in order."""

    kinds: tuple[Kind, ...]

    @property
    def words(self) -> str:
        return f'a list of {len(self.kinds)} entries'

    def check(self, value, where):
        if not isinstance(value, (list, tuple)) or len(value) != len(self.kinds):
            self.refuse(value, where)
        for i, (item, kind) in enumerate(zip(value, self.kinds)):
            kind.check(item, f'{where}[{i}]')


@dataclass(frozen=True)
class Dict(Kind):
    """Entries of one kind under keys of one kind."""

    keys: Kind
    kind: Kind
    longest: int = 100_000
    words = 'a table of entries'

    def check(self, value, where):
        if not isinstance(value, dict) or len(value) > self.longest:
            self.refuse(value, where)
        for key, item in value.items():
            self.keys.check(key, f'a name in {where}')
            self.kind.check(item, f'{where}.{key}')


class Plain(Kind):
    """Any plain data with finite numbers, up to `MAX_DEPTH` and `MAX_VALUES`."""

    words = 'plain data'

    def check(self, value, where):
        self._check(value, where, 0, [MAX_VALUES])

    def _check(self, value, where, depth, left):
        # `left` is shared by all levels. Values may share parts, which would be visited many times.
        left[0] -= 1
        if depth > MAX_DEPTH or left[0] < 0:
            raise Mismatch(f'nests or repeats values in {printable(where, 200)} without end')
        if isinstance(value, (dict, list, tuple)):
            if isinstance(value, dict) and not all(type(name) is str for name in value):
                raise Mismatch(f'has a name in {printable(where, 200)} that is not text')
            for item in value.values() if isinstance(value, dict) else value:
                self._check(item, where, depth + 1, left)
        elif type(value) in (int, float):
            if not -1e300 <= value <= 1e300:
                self.refuse(value, f'a number in {where}')
        elif not (value is None or type(value) in (bool, str)):
            self.refuse(value, where)


@dataclass(frozen=True)
class Record(Kind):
    """Entries by name, each of its kind; other names are of kind `others`, or refused if that is None."""

    fields: Mapping[str, Kind]
    required: Sequence[str] = ()
    others: Kind | None = field(default_factory=Plain)
    words = 'a table of entries by name'

    def check(self, value, where):
        if not isinstance(value, dict):
            self.refuse(value, where)
        if absent := [name for name in self.required if name not in value]:
            raise Mismatch(f'has no {absent[0]} in {printable(where, 200)}')
        for name, item in value.items():
            kind = self.fields.get(name, self.others) if type(name) is str else None
            if kind is None:
                raise Mismatch(f'has an unknown entry {shown(name)} in {printable(where, 200)}')
            kind.check(item, f'{where}.{name}')


# ----------------------------------------------------------------------------
# JSON.


def parse_json(data: bytes | str, limit: int, what: str):
    """The value of JSON text of at most `limit` bytes. Numbers may be NaN or infinite, as Python writes them.

    Raises: ValueError, which completes 'it ...', for anything else, including nesting or numbers beyond what
        Python reads.
    """
    check_size(len(data), limit, what)
    try:
        return json.loads(data)
    except UNREADABLE as error:
        raise ValueError(f'is no JSON ({printable(error, 200)})') from error


def read_json(path: str | os.PathLike, kind: Kind, what: str):
    """The value of a JSON file. Raises: OSError; ValueError, which completes 'it ...', for another kind."""
    with open_regular(path) as file:
        return check(parse_json(read_at_most(file, JSON_FILE, what), JSON_FILE, what), kind, what)
