"""Untrusted text (file names, server responses) in messages: it cannot forge lines or move the cursor."""

from __future__ import annotations

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
