"""Text of messages. Untrusted text (file names, server responses) cannot forge lines or move the cursor there."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from dnnlib.limits import MAX_TEXT


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def printable(text: object, longest: int = MAX_TEXT) -> str:
    r"""A text cut off after `longest` characters, with all but spaces and visible characters escaped.

    Escapes line ends, control sequences, marks of writing direction, and lone surrogates.
    """
    text = str(text)
    shown = text[:longest]
    if not shown.isprintable():
        shown = ''.join(char if char.isprintable() else ascii(char)[1:-1] for char in shown)
    return shown + (f'... ({len(text) - longest:,} characters more)' if len(text) > longest else '')


def as_ranges(numbers: Sequence[int], limit: int | None = None) -> str:
    """Ascending integers as options of lists read them, `0-3,7`; after `limit` ranges, the number of others."""
    # Consecutive numbers share the difference from their positions.
    groups = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in run] for _, run in groups]
    text = ','.join(f'{run[0]}-{run[-1]}' if len(run) > 1 else f'{run[0]}' for run in runs[:limit])
    rest = 0 if limit is None else sum(map(len, runs[limit:]))
    return text + (f' and {rest} more' if rest else '')
