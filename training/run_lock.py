"""One run in a folder at a time: a lock that the main process holds while it may write there.

`run.lock` names its holder. It is created atomically by a hard link, on network file systems too, and its
modification time is a heartbeat. A lock whose process has ended is taken over. On this machine that is known;
of another machine it is concluded from a heartbeat that stands still.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import secrets
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dnnlib import UserError, identity, limits, schema
from dnnlib.text import printable
from dnnlib.util import check_writable
from torch_utils import distributed, elastic
from training import saved_files

LOCK = 'run.lock'
RECORD = schema.Record(
    dict(
        token=schema.Text('[0-9a-f]{32}'),
        process=identity.KIND,
        torchrun=schema.Maybe(identity.KIND),
        timestamp=schema.Real(0, 1 << 33),
        period=schema.Real(1e-6, 3600),
    ),
    required=['token', 'process', 'torchrun', 'timestamp', 'period'],
)
PERIOD = 10.0  # seconds between heartbeats
MISSED = 10  # missed heartbeats after which a process on another machine counts as gone
CHECK_SEC = 1.0  # how often a run checks that the lock is still its own
# Seconds for a run to notice that the lock was taken from it, or that its torchrun is gone, and to end.
FAREWELL_SEC = 15.0
# Errors of file systems without hard links.
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


# ----------------------------------------------------------------------------
# The holder, as the file says.


@dataclasses.dataclass(frozen=True)
class Holder:
    """The holder of a lock, as its file says.

    Attributes:
        token: unique to this lock.
        process: see `identity.of_process`; None if the file is damaged.
        torchrun: the torchrun that started the process, in the same form, or None.
        since: when it took the lock, in seconds since the epoch.
        period: seconds between its heartbeats.
        beat: its last heartbeat, by the clock of the file system.
    """

    token: str
    process: dict | None
    torchrun: dict | None
    since: float
    period: float
    beat: float

    def has_ended(self) -> bool | None:
        """Whether the process is gone; None if only its heartbeat can tell."""
        return identity.has_ended(self.process) if self.process else None

    def __str__(self):
        if self.process is None:
            return f'an unknown process ({LOCK} is damaged)'
        return (
            f'process {self.process["pid"]} on {printable(self.process["host"], 100)}, '
            f'since {time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))}'
        )


def read_holder(path: Path) -> Holder | None:
    """The holder of the lock `path`; None if there is no such file.

    Raises: OSError; UserError if it is not a regular file.
    """
    try:
        # A link is refused too: its target is nobody's lock.
        if not stat.S_ISREG(path.lstat().st_mode):
            raise UserError(f'{path} was not made by train.py and stands in the way of its lock: remove it')
        with limits.open_regular(path) as file:
            status = os.fstat(file.fileno())
            data = file.read(limits.KB * 16)
    except FileNotFoundError:
        return None

    # Parse it; a damaged lock counts by its file alone.
    try:
        record = schema.check(schema.parse_json(data, limits.JSON_FILE, LOCK), RECORD, LOCK)
    except ValueError:
        return Holder(f'{status.st_ino:x}-{status.st_mtime_ns:x}', None, None, 0.0, PERIOD, status.st_mtime)
    return Holder(
        record['token'],
        record['process'],
        record['torchrun'],
        record['timestamp'],
        record['period'],
        status.st_mtime,
    )


# ----------------------------------------------------------------------------
# The lock.


class RunLock:
    """The lock of a folder.

    Args:
        folder: an existing folder.
        take: take the lock from a run that has it.
        say: function that prints a line.
        on_loss: called with an error, in another thread, when another process has taken the lock; by default
            it ends this process.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        take: bool = False,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
        on_loss: Callable[[str], None] = identity.end_at_once,
    ):
        self.folder, self.path = Path(folder), Path(folder, LOCK)
        self.take, self.say, self.on_loss = take, say, on_loss

        # What the file says.
        self.token = secrets.token_hex(16)
        self._record = json.dumps(
            dict(
                token=self.token,
                process=identity.of_process(),
                torchrun=elastic.torchrun(),
                timestamp=time.time(),
                period=PERIOD,
                processes=distributed.get_world_size(),
            ),
            indent=2,
        ).encode()

        # The heartbeat, from `acquire` to `release`.
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name='run-lock', daemon=True)

    def acquire(self) -> None:
        """Take the lock, and keep it until `release`.

        Raises: UserError, which names the holder, or the reason that the folder cannot be locked.
        """
        check_writable(self.folder)
        saved_files.check_own_files(self.folder)
        # The holder that is watched, since when, and whether waiting for it was announced.
        seen, since, announced = None, 0.0, False
        try:
            while not self._create(self.path):
                holder = read_holder(self.path)
                if holder is None:
                    continue
                if seen is None or holder.token != seen.token:
                    seen, since, announced = holder, time.monotonic(), False
                ended, waited, still = holder.has_ended(), time.monotonic() - since, holder.beat == seen.beat
                # As watched from here, or by the clock of the file system, whichever is longer.
                silence = max(waited, self._now() - holder.beat)

                # The holder is gone, or gives way: replace its lock.
                if ended or self.take or (ended is None and still and silence >= MISSED * holder.period):
                    if self._replace(holder):
                        self._watcher.start()
                        self._bid_farewell(holder, ended)
                        return

                # Perhaps it is on a node that died, as when a job starts again on another one: wait.
                elif ended is None and still:
                    if not announced:
                        remaining = MISSED * holder.period - silence
                        self.say(
                            f'{self.folder} belongs to {holder}. Waiting up to {remaining:.0f} seconds for '
                            'its heartbeat.'
                        )
                        announced = True

                # It is still running, unless its torchrun is gone: then it is about to end.
                elif not (holder.torchrun and identity.has_ended(holder.torchrun) and waited < FAREWELL_SEC):
                    raise UserError(
                        f'{self.folder} is the folder of a run that goes on: {holder}, last heartbeat '
                        f'{max(self._now() - holder.beat, 0):.0f} seconds ago. Wait for its end, choose '
                        'another folder, or take this one from it by --take-lock, which stops that run'
                    )
                time.sleep(CHECK_SEC / 4)
        except OSError as error:
            raise UserError(
                f'{self.folder} cannot be locked: {error.strerror or error}. Choose another place.'
            ) from error
        self._watcher.start()

    def release(self) -> None:
        """Remove the lock, if it is still ours."""
        self._over.set()
        self._watcher.join(timeout=PERIOD)
        with contextlib.suppress(OSError, UserError):
            if self._is_own(self.path):
                self.path.unlink()

    def _bid_farewell(self, holder: Holder, ended: bool | None) -> None:
        """Say whose lock it was. Wait for a run that may still be going: it notices, and stops writing."""
        if ended or not self.take:
            self.say(f'{self.folder} was locked by {holder}, which is gone: taking over.')
            return
        self.say(
            f'Taking {self.folder} from {holder}; waiting up to {FAREWELL_SEC:.0f} seconds until it has '
            'noticed.'
        )
        deadline = time.monotonic() + FAREWELL_SEC
        while time.monotonic() < deadline and not holder.has_ended():
            time.sleep(CHECK_SEC / 4)

    def _watch(self) -> None:
        """Thread: beat; create the lock again if it was removed; call `on_loss` if it is another's."""
        beat = time.monotonic()
        while not self._over.wait(CHECK_SEC):
            try:
                if not self._is_own(self.path) and not self._create(self.path):
                    holder = read_holder(self.path)
                    if holder is not None and holder.process is not None and holder.token != self.token:
                        self.on_loss(
                            f'Error: {self.folder} was taken from this run, by {holder}: nothing more is '
                            'written. The files that it has saved are complete; the other run continues '
                            'from them.'
                        )
                        return
                if time.monotonic() - beat >= PERIOD:
                    os.utime(self.path)  # without a time: by the clock of the file system
                    beat = time.monotonic()
            # A full or read-only disk, or a server that is away, is no reason to stop.
            except (OSError, UserError):
                continue

    def _is_own(self, path: Path) -> bool:
        holder = read_holder(path)
        return holder is not None and holder.token == self.token

    def _now(self) -> float:
        """The time by the clock of the file system."""
        with self._written() as path:
            return path.stat().st_mtime

    @contextlib.contextmanager
    def _written(self) -> Iterator[Path]:
        """A hidden file with this lock's record, which is removed unless it is renamed."""
        path = self.folder / f'.{LOCK}.{os.getpid()}-{secrets.token_hex(4)}.tmp'
        try:
            with open(path, 'xb') as file:
                file.write(self._record)
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _create(self, path: Path) -> bool:
        """Try to create `path` with this lock's record, unless it exists. Returns: whether it is ours now."""
        with self._written() as own:
            # A server may have made the link although its first reply was lost: `_is_own` tells.
            try:
                os.link(own, path)
            except FileExistsError:
                pass
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                with contextlib.suppress(FileExistsError), open(path, 'xb') as file:
                    file.write(self._record)
        return self._is_own(path)

    def _replace(self, holder: Holder) -> bool:
        """Try to replace another lock. Returns: whether that succeeded, as it does for one process only.

        That is the process that creates a claim, a file named by the other lock's token and a number. If the
        process of a claim has ended, the claim of the next number counts.
        """
        # Create a claim.
        claims = []
        for number in itertools.count():
            claims.append(self.folder / f'.{LOCK}.{holder.token}.{number}')
            if self._create(claims[-1]):
                break
            other = read_holder(claims[-1])
            if other is None:
                return False
            gone = other.has_ended()
            if gone is False or (gone is None and self._now() - other.beat < MISSED * PERIOD):
                return False

        # Replace the lock, unless an earlier claim has done so.
        try:
            now = read_holder(self.path)
            if now is None or now.token != holder.token:
                claims = claims[-1:]
                return False
            with self._written() as own:
                os.replace(own, self.path)
            return True
        finally:
            for claim in claims:
                claim.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: str, take: bool = False) -> Iterator[None]:
    """A block in which the main process holds the lock of a folder, if the folder exists.

    All processes enter it together, or end with one message.
    """

    def acquire():
        nonlocal lock
        if os.path.isdir(folder):
            lock = RunLock(folder, take)
            lock.acquire()

    lock = None
    distributed.from_main(acquire)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()
