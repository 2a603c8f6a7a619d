"""Text of strangers (file names, servers' answers) in messages: it cannot forge lines or move the cursor."""

from __future__ import annotations

from dnnlib.limits import MAX_TEXT


def printable(text: object, longest: int = MAX_TEXT) -> str:
    r"""A text with all but spaces and visible characters escaped, cut off after `longest` characters.

    Line ends, escape sequences, marks that change the direction of writing and halves of characters are none.
    """
    text = str(text)
    shown = text[:longest]
    if not shown.isprintable():
        shown = ''.join(char if char.isprintable() else ascii(char)[1:-1] for char in shown)
    return shown + (f'... ({len(text) - longest:,} characters more)' if len(text) > longest else '')
