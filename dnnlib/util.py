"""EasyDict, the error that users see, and atomic writing of files."""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dnnlib import interrupts
from dnnlib.text import printable

LEFTOVER_SECONDS = 24 * 3600  # no write takes longer
LONGEST_MESSAGE = 4000  # characters
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


class UserError(Exception):
    """An input that cannot be used. The message gives cause and cure, and is printable whatever it quotes.

    Command lines (`dnnlib.cli.Command`) print it as `Error: ...` and exit with status 1, without a traceback.

    Args:
        message: one line.
        lines, more: further lines, for long ones.
    """

    def __init__(self, message: str, *lines: str, more: str | None = None):
        super().__init__(
            *(printable(line, LONGEST_MESSAGE) for line in (message, *lines, more) if line is not None)
        )

    def __str__(self) -> str:
        return '\n       '.join(self.args)


class WrongOptions(UserError):
    """Options that contradict each other, or the network that they are for: command lines exit with status 2."""


class NotFinite(UserError):
    """NaN or infinity in the images of a network, or in a detector's features.

    Attributes:
        counts: {'nonfinite': images} or {'nonfinite_features': images}.
    """

    def __init__(self, message: str, **counts: int):
        super().__init__(message)
        self.counts = counts


@contextlib.contextmanager
def named(option: str) -> Iterator[None]:
    """Prefix a `UserError` from the block with the option that names the file it is about."""
    try:
        yield
    except UserError as error:
        first, *lines = error.args
        raise UserError(f'{option}: {first}', *lines) from error


class EasyDict(dict):
    """A dict whose string keys are attributes too."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name, value):
        self[name] = value

    def __delattr__(self, name):
        try:
            del self[name]
        except KeyError:
            raise AttributeError(name) from None


# ----------------------------------------------------------------------------
# Writing.


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Disable garbage collection in the block, for code that makes many small objects and little garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, durable: bool = True, tidy: bool = True) -> Iterator[BinaryIO]:
    """A binary file that gets the name `path` only if the block succeeds.

    It is written under a hidden name in the same directory, flushed to disk, then renamed: after a full disk
    or a kill, readers find either the previous file or the complete new one. If the block raises, nothing is
    left behind.

    Args:
        durable: wait for the disk; False for many small files that may be lost to a power cut.
        tidy: remove what killed processes have left in the directory; see `remove_leftovers`.
    Raises: UserError if the directory is missing or not writable, or the disk is full.
    """
    interrupts.at_work()
    path = Path(path)
    temporary = path.with_name(temporary_name(path.name))
    if tidy:
        remove_leftovers(path.parent.absolute())

    # Open outside of the block's `try`: the errors of the two have different messages.
    try:
        file = open(temporary, 'xb')  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(
            f'Cannot write {path}: {error.strerror}. Choose an existing directory that you may write to.'
        ) from error

    # Write, flush the file, rename it, and flush the rename.
    try:
        with file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            _sync_directory(path.parent)
    # Errors of the disk, or of this file, are the user's; others are the block's own.
    except OSError as error:
        if error.errno in DISK_ERRORS or temporary.name in str(error.filename):
            cure = 'Free some space or choose' if error.errno in DISK_ERRORS else 'Choose'
            raise UserError(f'Cannot write {path}: {error.strerror}. {cure} another place.') from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A hidden folder beside `path` until the block ends. Raises: OSError."""
    interrupts.at_work()
    path = Path(path)
    remove_leftovers(path.parent.absolute())
    folder = path.with_name(temporary_name(path.name))
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def temporary_name(name: str) -> str:
    """Hidden name of a file that becomes `name`, with the identity of the process that writes it."""
    return f'.{name}.{_this_machine()}-{os.getpid()}-{secrets.token_hex(3)}.tmp'


@functools.cache
def _this_machine() -> str:
    """Six hexadecimal digits for a machine, its boot and its container, each with its own process ids."""
    facts = [os.uname().nodename]
    with contextlib.suppress(OSError):  # Linux only
        facts += [Path('/proc/sys/kernel/random/boot_id').read_text(), os.readlink('/proc/self/ns/pid')]
    return hashlib.sha256(' '.join(facts).encode()).hexdigest()[:6]


@functools.cache
def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders of killed processes from a folder, once per process.

    It is unknown whether a process of another machine, or of this one before its last boot, still runs: its
    files are removed once they are a day old.
    """
    for path in folder.glob('.*.tmp'):
        match = re.fullmatch(r'\..+\.([0-9a-f]{6})-([0-9]{1,9})-[0-9a-f]{6}\.tmp', path.name, re.DOTALL)
        with contextlib.suppress(OSError):
            if match and (not process_exists(int(match[2])) if match[1] == _this_machine() else is_old(path)):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def process_exists(pid: int) -> bool:
    """Whether a process has this id, including those of other users and those hidden from /proc."""
    try:
        # Signal 0 only checks.
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's process
    return True


def is_old(path: Path) -> bool:
    return time.time() - path.stat().st_mtime > LEFTOVER_SECONDS


# ----------------------------------------------------------------------------
# Folders and files.


def write_json(path: str | os.PathLike, value, **options) -> None:
    """Write a value as JSON of several lines, atomically; `options` are those of `json.dumps`."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=2, **options).encode() + b'\n')


def check_writable(folder: str | os.PathLike) -> None:
    """Raises: UserError if no file can be created in a folder: no permission, a read-only or full disk."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f'Cannot write to the folder {folder}: {error.strerror}. Make it writable, or choose another '
            'place.'
        ) from error


def check_other_file(source: str | os.PathLike, dest: str | os.PathLike, option: str) -> None:
    """Raises: UserError, naming the option, if writing `dest` would replace the input `source`."""
    try:
        same = os.path.samefile(source, dest)
    except (OSError, ValueError):  # one is not there, or no path at all
        same = os.fspath(source) == os.fspath(dest)
    if same:
        raise UserError(f'{option}={dest} is the file that is read, and would be lost: choose another name.')


def remove(path: str | os.PathLike) -> bool:
    """Remove a file. Returns: whether it existed. Raises: UserError if it cannot be removed."""
    try:
        os.remove(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f'{path}, of an earlier run, cannot be removed: {error.strerror}.') from error
    return True


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def unfinished(folder: Path, pattern: str) -> Iterator[Path]:
    """Temporary files of `atomic_write`, including those of killed processes, for final names that match."""
    return folder.glob(f'.{pattern}.*.tmp')


def _sync_directory(directory: Path) -> None:
    """Flush a rename to disk."""
    # A rename is an entry of the directory, which has its own buffer.
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
