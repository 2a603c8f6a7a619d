"""File names of a data set: walking folders, separators, and explaining names that only look the same."""

from __future__ import annotations

import os
import unicodedata
import urllib.parse
from collections.abc import Callable, Iterable, Iterator

from dnnlib import UserError

RUN_RECORD = 'training_options.json'  # EDM's name for the configuration in a run's folder

# ----------------------------------------------------------------------------
# Folders.


def walk(root: str) -> Iterator[str]:
    """Relative paths of the visible files below a folder, following symbolic links.

    A folder that two links lead to is listed twice.
    Raises: UserError for a link to a folder above it, a broken link, an unreadable folder, or a special file.
    """
    yield from _walk(root, '', [])


def _walk(root: str, inner: str, above: list[tuple[int, int]]) -> Iterator[str]:
    """`walk` below the subfolder `inner`, which ends in a slash.

    Args:
        above: (device, inode) of each folder above it.
    """
    # Read the folder.
    here = os.path.join(root, inner)
    try:
        status = os.stat(here)
        with os.scandir(here) as listing:
            entries = list(listing)
    except OSError as error:
        raise UserError(
            f'{here} cannot be read ({error.strerror}); check its permissions, or remove it'
        ) from error

    # A folder inside itself is an endless loop of links.
    identity = status.st_dev, status.st_ino
    if identity in above:
        raise UserError(
            f'{root}: {inner[:-1]} is a link to a folder that contains it, {os.path.realpath(here)}: an '
            'endless loop; remove the link'
        )

    # Yield files, and descend into folders.
    for entry in entries:
        if is_hidden_part(entry.name):
            continue
        if entry.is_symlink() and not os.path.exists(entry.path):
            raise UserError(
                f'{root}: {inner}{entry.name} is a link to {os.readlink(entry.path)}, which does not exist '
                'or leads back to the link; fix or remove it'
            )
        if entry.is_dir():
            yield from _walk(root, f'{inner}{entry.name}/', [*above, identity])
        elif entry.is_file():
            yield inner + entry.name
        else:
            raise UserError(
                f'{root}: {inner}{entry.name} is neither a file nor a folder (a pipe, a socket or a device); '
                'remove it'
            )


def is_hidden_part(part: str) -> bool:
    """Whether a file or folder name is skipped: hidden ones, and macOS resource forks in zips."""
    return part == '__MACOSX' or (part[:1] == '.' and part not in ('.', '..'))


def is_hidden(name: str) -> bool:
    return any(map(is_hidden_part, name.split('/')))


def with_slashes(name: str) -> str:
    """The name with forward slashes; some Windows programs write zips with backslashes."""
    return name.replace('\\', '/')


# ----------------------------------------------------------------------------
# Names that look the same.


def composed(name: str) -> str:
    """The name in Unicode form NFC: accented letters as single characters where possible."""
    return unicodedata.normalize('NFC', name)


def _unicode_form(name: str) -> str:
    return (
        'composed, NFC'
        if name == composed(name)
        else 'decomposed, NFD'
        if name == unicodedata.normalize('NFD', name)
        else 'mixed'
    )


def _as_utf8(name: str) -> str:
    """Undo reading a zip's UTF-8 name as code page 437, which happens if the zip lacks the UTF-8 flag."""
    try:
        return composed(name.encode('cp437').decode())
    except UnicodeError:
        return composed(name)


# (key that two names share, how they differ, the cure), tried in this order.
# fmt: off
LOOKALIKES: list[tuple[Callable[[str], str], str, str]] = [
    (composed,
     'which looks the same in another Unicode normalization ({} against {})',
     'Normalize both with unicodedata.normalize in Python'),
    (lambda name: composed(name).casefold(),
     'which differs in case only',
     'Spell it like the file name'),
    (lambda name: composed(urllib.parse.unquote(name)),
     'which has characters written as %XX',
     'Spell it like the file name'),
    (lambda name: os.path.normpath(name).lstrip('/'),
     'which is another path to it',
     'Write it without ./ and a leading /'),
    (_as_utf8,
     'which is the same in UTF-8: the zip does not flag its names as UTF-8 (bit 11)',
     'Recreate the zip with a program that does'),
]
# fmt: on


def explain_absence(name: str, others: Iterable[str]) -> str | None:
    """Why `name` is not among `others` although one looks alike, and the cure; None if none looks alike."""
    others = list(others)
    for key, difference, cure in LOOKALIKES:
        wanted = key(name)
        other = next((other for other in others if key(other) == wanted), None)
        if other is not None:
            return (
                f'There is {other!a} instead of {name!a}, '
                f'{difference.format(_unicode_form(other), _unicode_form(name))}. {cure}.'
            )
    return None
