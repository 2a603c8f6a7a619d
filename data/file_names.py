"""Names of a data set's files: found in a folder through symbolic links, separated by slashes, and told apart
where they only look the same."""

from __future__ import annotations

import os
import unicodedata
import urllib.parse
from collections.abc import Callable, Iterable, Iterator

from dnnlib import UserError

# ----------------------------------------------------------------------------
# Folders.


def walk(root: str) -> Iterator[str]:
    """The files of a folder and its subfolders, symbolic links followed, by their paths from the folder; none
    that is hidden.

    A folder that is reached twice, by two links say, is there twice.
    Raises: UserError that names a link to a folder which it lies in, a link to nothing, a folder that cannot
        be read, or what is neither file nor folder.
    """
    yield from _walk(root, '', [])


def _walk(root: str, inner: str, above: list[tuple[int, int]]) -> Iterator[str]:
    """As `walk`, of the subfolder `inner`, a path that ends in a slash; `above` has the device and inode of
    every folder that it lies in."""
    here = os.path.join(root, inner)
    try:
        status = os.stat(here)
        with os.scandir(here) as listing:
            entries = list(listing)
    except OSError as error:
        raise UserError(
            f'{here} cannot be read ({error.strerror}); check its permissions, or remove it'
        ) from error
    identity = status.st_dev, status.st_ino
    if identity in above:
        raise UserError(
            f'{root}: {inner[:-1]} is a link to a folder in which it lies, {os.path.realpath(here)}: its '
            'files would have no end; remove the link'
        )
    for entry in entries:
        if is_hidden_part(entry.name):
            continue
        if entry.is_symlink() and not os.path.exists(entry.path):
            raise UserError(
                f'{root}: {inner}{entry.name} is a link to {os.readlink(entry.path)}, which is not there, or '
                'leads back to the link; mend or remove it'
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
    """Whether a folder or file of that name is left out: hidden ones, and the resource forks in zips that
    macOS makes."""
    return part == '__MACOSX' or (part[:1] == '.' and part not in ('.', '..'))


def is_hidden(name: str) -> bool:
    return any(map(is_hidden_part, name.split('/')))


def with_slashes(name: str) -> str:
    """A name whose folders are separated by slashes: by backslashes they are in zips of some programs for
    Windows, and when those are unpacked."""
    return name.replace('\\', '/')


# ----------------------------------------------------------------------------
# Names that look the same.


def composed(name: str) -> str:
    """The name in Unicode's normalization form NFC: an accented letter is one character, where it can be."""
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
    """What a name in a zip was where UTF-8 was written without the flag that says so, and was read as zip's
    code page 437."""
    try:
        return composed(name.encode('cp437').decode())
    except UnicodeError:
        return composed(name)


# What a name has in common with one that is meant, why they differ, and the cure.
LOOKALIKES: list[tuple[Callable[[str], str], str, str]] = [
    (
        composed,
        'which looks the same in another Unicode normalization ({} against {})',
        'Give both one form: unicodedata.normalize in Python',
    ),
    (
        lambda name: composed(name).casefold(),
        'which differs in upper and lower case only',
        'Write it as the file is called',
    ),
    (
        lambda name: composed(urllib.parse.unquote(name)),
        'which has characters written as %XX',
        'Write it as the file is called',
    ),
    (
        lambda name: os.path.normpath(name).lstrip('/'),
        'which is another path to it',
        'Write it without ./ and a first /',
    ),
    (
        _as_utf8,
        'which is the same in UTF-8: the zip does not say that its names are UTF-8 (bit 11 of their flags)',
        'Make the zip again with a program that sets it',
    ),
]


def explain_absence(name: str, others: Iterable[str]) -> str | None:
    """Why a name is not among others of which one is meant: a sentence that tells how they differ, and the
    cure; None where none is alike."""
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
