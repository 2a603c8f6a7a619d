"""Text of strangers (names in archives, words in files, what servers say) in messages for people: it cannot forge lines or move the cursor."""

from __future__ import annotations

from dnnlib.limits import MAX_TEXT


def printable(text: object, longest: int = MAX_TEXT) -> str:
    r"""A text with everything that is no visible character or space escaped, as `\n` or `\x1b`, and cut off after `longest` characters.

    Line ends, escape sequences, marks that change the direction of writing and halves of characters are none.
    """
    text = str(text)
    shown = text[:longest]
    if not shown.isprintable():
        shown = ''.join(char if char.isprintable() else ascii(char)[1:-1] for char in shown)
    return shown + (f'... ({len(text) - longest:,} characters more)' if len(text) > longest else '')
