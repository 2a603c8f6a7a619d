"""What a run logs: console and log.txt, stats.jsonl, metrics-val.jsonl, a progress bar, W&B, TensorBoard.

Nothing that goes wrong here ends a training. docs/logging.md says what is written where.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator

import tqdm

from dnnlib import UserError
from dnnlib.limits import JSON_LINE, check_size, open_regular
from dnnlib.schema import Integer, Mismatch, Real, Record, Text, check, parse_json
from dnnlib.text import printable
from dnnlib.util import LONGEST_MESSAGE, atomic_write

LOG, STATS, METRICS = 'log.txt', 'stats.jsonl', 'metrics-val.jsonl'
# Entries of an evaluation that are not results.
CIRCUMSTANCES = ('kimg', 'nimg', 'num_images', 'steps', 'nfe', 'seconds')
INIT_TIMEOUT = 60.0  # seconds that W&B has for beginning a run
FINISH_TIMEOUT = 300.0  # and for sending what is left when it ends
WRITTEN_AFTER = 60.0  # seconds after which W&B's service, which writes every 15, has written what it was sent
LINE = Record(
    {
        'nimg': Integer(),
        'kimg': Real(0),
        'ema': Text(longest=64),
        'timestamp': Real(0),  # of either file; other numbers are finite or null
        'Progress/nimg': Record(dict(mean=Real(0, 1e15)), ['mean']),
    }
)


class RunLog:
    """Run logger. Only the main process, which is `enabled`, writes.

    Lines can be logged at once, statistics and evaluations after `start`. Lines that a full disk refuses are
    kept in memory and written when there is room.
    """

    def __init__(self, run_dir: str, enabled: bool):
        self.run_dir, self.enabled = os.path.abspath(run_dir), enabled
        # For the training state: a resumed run continues this W&B run.
        self.wandb_id: str | None = None
        self._bar: tqdm.tqdm | None = None
        self._wandb: WandbRun | None = None
        self._tensorboard: TensorBoard | None = None
        self._unwritten: dict[str, str] = {}  # by file name
        self._told = False  # whether it was said that they cannot be written

    def start(
        self,
        total_nimg: int,
        resumed_at: int | None = None,
        wandb: dict | None = None,
        config: dict | None = None,
        tensorboard: bool = False,
    ) -> None:
        """Begin a run, or resume one at `resumed_at` images and remove the later records, which come again.

        Args:
            total_nimg: images at the end of the run.
            resumed_at: images that the training state has seen; None for a new run.
            wandb: `project`, `entity`, `name`, `tags`, `mode` and, from the training state, `id` of the W&B
                run, each possibly None; or None.
            config: the run's configuration, plain data, shown by W&B.
            tensorboard: whether to write TensorBoard's event files into the run folder.
        Raises: UserError where a package is missing, or the disk is too full to shorten a file.
        """
        self.wandb_id = wandb and wandb.get('id')
        if not self.enabled:
            return
        # A run that was killed before its first state begins anew in its folder.
        seen = -1 if resumed_at is None else resumed_at
        latest, history = forget_future(self.run_dir, seen)
        if tensorboard:
            self._tensorboard = TensorBoard(self.run_dir, seen + 1, say=self)
        if wandb and wandb.get('mode') != 'disabled':
            self._wandb = WandbRun(self.run_dir, wandb, config, latest, say=self)
            self.wandb_id = self._wandb.id
            for step, values in sorted(history.items()):
                self._wandb.add(step, values)
        self._bar = tqdm.tqdm(
            initial=(resumed_at or 0) / 1e3,
            total=total_nimg / 1e3,
            unit='kimg',
            disable=not sys.stderr.isatty(),
            leave=False,
            dynamic_ncols=True,
            bar_format='{percentage:3.0f}%|{bar}| {n:.1f}/{total:.1f} kimg {remaining}',
        )

    def __call__(self, line: str) -> None:
        """A line for people."""
        if self.enabled:
            line = printable(line, LONGEST_MESSAGE)
            with (
                contextlib.suppress(OSError),
                tqdm.tqdm.external_write_mode(file=sys.stdout),
            ):  # the terminal may be gone
                print(line, flush=True)
            self._append(LOG, line)

    def stats(self, stats: dict[str, dict]) -> None:
        """The statistics of a tick, {name: {"num", "mean", "std"}}; `Progress/nimg` says which tick."""
        if self.enabled:
            self._append(STATS, json_line(dict(stats, timestamp=time.time())))
            self._show(images_seen(stats), scalars(stats), {})

    def evaluation(self, record: dict, grid: str | None = None) -> None:
        """An evaluation of the average `record['ema']` at `record['nimg']` images; `grid`: a PNG of samples.

        One that failed has no `fid` but a `problem`, of which people are warned.
        """
        if self.enabled:
            self(json_line(record))
            if 'problem' in record:
                self(
                    f'Warning: there is no FID of {record["ema"]} at {record["nimg"] / 1e3:g} kimg: '
                    f'{record["problem"]}'
                )
            self._append(METRICS, json_line(record))
            self._show(
                record['nimg'], scalars(record), {f'Samples{average_suffix(record)}': grid} if grid else {}
            )

    def advance(self, nimg: int) -> None:
        """Move the progress bar; cheap enough for every step."""
        if self._wandb:
            self._wandb.advance(nimg)
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.update(nimg / 1e3 - self._bar.n)

    def close(self, exit_code: int = 0) -> None:
        """End the bar, W&B (with this exit code) and TensorBoard. A second call does nothing."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish(exit_code)
        self._bar = self._tensorboard = self._wandb = None
        self._write()

    def _show(self, step: int, values: dict[str, float], images: dict[str, str]) -> None:
        if self._tensorboard:
            self._tensorboard.add(step, values, images)
        if self._wandb:
            self._wandb.add(step, values, images)

    def _append(self, name: str, line: str) -> None:
        self._unwritten[name] = self._unwritten.get(name, '') + line + '\n'
        self._write()

    def _write(self) -> None:
        for name, lines in list(self._unwritten.items()):
            try:
                append_lines(os.path.join(self.run_dir, name), lines)
                del self._unwritten[name]
            except OSError as error:
                if not self._told:
                    with contextlib.suppress(OSError):
                        print(
                            f'Cannot write {name} in {self.run_dir}: {error.strerror}. Training goes on; '
                            'what is missing is written when that is possible again.',
                            file=sys.stderr,
                            flush=True,
                        )
                self._told = True
        self._told &= bool(self._unwritten)


def check_available(wandb: dict | None, tensorboard: bool) -> None:
    """Before anything is created. Raises: UserError where the options ask for something that cannot work."""
    if tensorboard:
        summary_writer_class()
    if wandb and wandb.get('mode') != 'disabled':
        package = import_wandb()
        try:
            package.Settings(project=wandb.get('project'))
        except (package.errors.UsageError, ValueError) as error:
            raise UserError(
                f'--wandb_project={wandb["project"]} cannot be the name of a W&B project ({error}): choose '
                'another.'
            ) from error


# ----------------------------------------------------------------------------
# Lines of JSON.


def json_line(record: dict) -> str:
    """A record as one line of strict JSON, in which a number that is not finite is null."""

    def finite(value):
        if isinstance(value, dict):
            return {key: finite(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(record))


def scalars(record: dict) -> dict[str, float]:
    """The numbers of a line of stats.jsonl or metrics-val.jsonl, by their names in W&B and TensorBoard."""
    if 'nimg' in record:
        values = {
            f'Metrics/{name}{average_suffix(record)}': value
            for name, value in record.items()
            if isinstance(value, (int, float)) and name not in CIRCUMSTANCES
        }
    else:
        moments = {name: entry for name, entry in record.items() if isinstance(entry, dict)}
        values = {name: entry.get('mean') for name, entry in moments.items()}
        values.update(
            {f'{name}_std': entry.get('std') for name, entry in moments.items() if entry.get('num', 0) > 1}
        )
    return {name: value for name, value in values.items() if value is not None}


def average_suffix(record: dict) -> str:
    """Nothing for the run's exponential average; `/<name>` for other averages and the teacher."""
    name = record.get('ema', 'ema')
    return '' if name == 'ema' else f'/{name}'


def append_lines(path: str, lines: str) -> None:
    """Append lines, all or none. A line that a kill cut short is ended first, or removed from a .jsonl file.

    Raises: OSError, such as that of a full disk; then the file is as it was.
    """
    with open(path, 'a+b', buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        if file.read(1) not in (b'', b'\n'):
            file.seek(max(end - JSON_LINE, 0))
            data = file.read() if path.endswith('.jsonl') else b''
            last = data[data.rfind(b'\n') + 1 :]
            if path.endswith('.jsonl') and len(last) < JSON_LINE and not _is_record(last):
                end -= len(last)
                file.truncate(end)
            else:
                lines = '\n' + lines
        data = lines.encode()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(end)  # a disk that fills up takes the beginning
            raise


def _is_record(line: bytes) -> bool:
    with contextlib.suppress(Mismatch):
        return parse(line) is not None
    return False


def parse(line: bytes) -> dict | None:
    """The record of a line; None where it is none. Raises: Mismatch where it is one that no run writes."""
    try:
        record = parse_json(line, JSON_LINE, 'a line of statistics')
    except ValueError:
        return None
    return check(record, LINE, 'the record') if isinstance(record, dict) else None


def records(path: str) -> Iterator[tuple[bytes, dict | None]]:
    """The lines of a .jsonl file, each with its record or None. The last line may lack its end.

    Raises: UserError, which names the line, for a record that no run writes, and for a line without end.
    """
    with open_regular(path) as file:
        for number in itertools.count(1):
            if not (line := file.readline(JSON_LINE + 1)):
                return
            try:
                check_size(len(line), JSON_LINE, 'a line of statistics')
                yield line, parse(line)
            except ValueError as error:
                raise UserError(
                    f'{path}: line {number} {error}. Remove that line, or restore the file.'
                ) from error


def images_seen(record: dict) -> int | None:
    """The images that the run had seen at a record of either file; None where it does not say."""
    count = record.get('nimg', record.get('Progress/nimg'))
    count = count.get('mean') if isinstance(count, dict) else count
    return int(count) if isinstance(count, (int, float)) else None


def forget_future(run_dir: str, nimg: int) -> tuple[int, dict[int, dict[str, float]]]:
    """Remove the records beyond `nimg` images, and a line cut short, from stats.jsonl and metrics-val.jsonl.

    Returns: the most images that any record told of (-1 for none), and the numbers that are left by images
        seen.
    Raises: UserError, which names the line, for a record that no run writes.
    """
    latest, history = -1, {}
    for path in (os.path.join(run_dir, name) for name in (STATS, METRICS)):
        if not os.path.exists(path):
            continue
        kept, count, whole = [], 0, True
        for line, record in records(path):
            count, whole = count + 1, line.endswith(b'\n')
            if record is None and not whole:  # the last one
                continue
            seen = images_seen(record or {})
            if seen is not None:
                latest = max(latest, seen)
                if seen > nimg:
                    continue
                history.setdefault(seen, {}).update(scalars(record))
            kept.append(line if whole else line + b'\n')
        if not whole or len(kept) < count:
            with atomic_write(path) as file:
                file.writelines(kept)
    return latest, history


# ----------------------------------------------------------------------------
# Weights & Biases.


class WandbRun:
    """A run at W&B, whose steps are images seen. The first failure there is logged, and ends the sending.

    W&B takes each step once, in ascending order, and keeps what it has. A resumed run therefore begins with
    what W&B does not have: it adds the recorded history again, and later what it computes again, and steps
    that are there already are passed over.

    Args:
        run_dir: folder in which W&B keeps its own, `wandb`.
        options, config: as `RunLog.start` takes them.
        latest: most images that the run had recorded before it was resumed.
        say: takes a line for people.
    """

    def __init__(
        self, run_dir: str, options: dict, config: dict | None, latest: int, say: Callable[[str], None]
    ):
        self.id: str | None = options.get('id')
        self._say, self._run, self._failed = say, None, False
        self._last_step, self._step, self._row, self._images = -1, -1, {}, {}
        self._note: str | None = None  # the file that says, offline, which steps are written
        self._sure, self._since = -1, time.monotonic()  # the last step that had been sent at that time
        with self._tolerating():
            self._begin(run_dir, options, config, latest)

    def _begin(self, run_dir: str, options: dict, config: dict | None, latest: int) -> None:
        wandb = import_wandb()
        settings = wandb.Settings(
            silent=True,
            console='off',
            save_code=False,
            disable_code=True,
            init_timeout=INIT_TIMEOUT,
            finish_timeout=FINISH_TIMEOUT,
            finish_timeout_raises=True,
        )
        wandb.setup(settings)  # or it would not be silent at first, and ask at a terminal for a key
        run = wandb.init(
            project=options.get('project'),
            entity=options.get('entity'),
            name=options.get('name') or os.path.basename(run_dir),
            tags=options.get('tags') or None,
            mode=options.get('mode'),
            id=self.id,
            resume='allow',
            dir=run_dir,
            config=config,
            settings=settings,
        )
        if run.disabled:  # by an environment variable
            return
        if not run.offline:
            self._last_step = run.starting_step - 1
        else:
            self._note = os.path.join(run_dir, 'wandb', f'{run.id}.written')
            self._last_step = self._sure = self._written_step(latest) if self.id else -1
            self._write_note(self._last_step)
        self._run, self.id = run, run.id
        self._say(f'W&B: {run.sync_dir} (wandb sync uploads it)' if run.offline else f'W&B: {run.url}')

    def _written_step(self, latest: int) -> int:
        """The last step that earlier processes surely wrote, by our note; without one, their last record."""
        try:
            with open_regular(self._note) as file:
                return min(int(file.read(20)), latest)
        except OSError:  # what was there has been uploaded and removed
            return latest
        except ValueError:  # cut short
            return -1

    def _write_note(self, step: int) -> None:
        """Note, offline, the last step that is safe from a kill. With an older note more is sent again."""
        if self._note:
            with contextlib.suppress(OSError), open(self._note, 'w') as file:
                file.write(f'{step}\n')

    def add(self, step: int, values: dict[str, float], images: dict[str, str] | None = None) -> None:
        """Numbers and PNG files of a step; several calls may tell of one step."""
        self.advance(step)
        self._step = step
        self._row.update(values)
        self._images.update(images or {})

    def advance(self, step: int) -> None:
        """Send what was added, once training has come to a later step."""
        if step > self._step:
            self._send()

    def _send(self) -> None:
        row, images, self._row, self._images = self._row, self._images, {}, {}
        if self._run is None or not row or self._step <= self._last_step:
            return
        with self._tolerating():
            pictures = {name: import_wandb().Image(path) for name, path in images.items()}
            self._run.log({**row, **pictures}, step=self._step, commit=True)
            self._last_step = self._step
            if time.monotonic() - self._since > WRITTEN_AFTER:
                self._write_note(self._sure)
                self._sure, self._since = self._step, time.monotonic()

    def finish(self, exit_code: int) -> None:
        """End the run and W&B's service process."""
        self._send()
        with self._tolerating():
            if self._run is not None:
                self._run.finish(exit_code=exit_code)
                self._write_note(self._last_step)
        with self._tolerating():
            # Without this, W&B complains at exit about a service that has died.
            import_wandb().teardown(exit_code=exit_code)

    @contextlib.contextmanager
    def _tolerating(self) -> Iterator[None]:
        """A block in which W&B may fail.

        Its own exceptions have no base class in common, and those of a service process that has died or hangs
        are private (wandb.sdk.mailbox), so the package of their class tells them. Besides there are OSError
        (broken connections, time-outs, full disks) and ValueError (settings in the environment).
        """
        try:
            yield
        except Exception as error:
            if (
                not isinstance(error, (OSError, ValueError))
                and type(error).__module__.partition('.')[0] != 'wandb'
            ):
                raise
            self._run = None
            if not self._failed:
                self._failed = True
                self._say(
                    f'W&B failed, and training goes on without it: {type(error).__name__}: '
                    f'{" ".join(str(error).split())} ({STATS} and {METRICS} have everything; resuming the '
                    'run with --wandb=1 sends what W&B lacks)'
                )


def import_wandb():
    """The package. Raises: UserError where it is not installed."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(f'--wandb=1 needs the package wandb ({error}): pip install wandb') from error
    return wandb


# ----------------------------------------------------------------------------
# TensorBoard.


class TensorBoard:
    """Event files in the run folder. After a failure, told once, the next call begins a new file.

    Args:
        run_dir: where they go.
        purge_step: what earlier files hold from this step on is not shown.
        say: takes a line for people.
    Raises: UserError where tensorboard is not installed.
    """

    def __init__(self, run_dir: str, purge_step: int, say: Callable[[str], None]):
        self._new_writer = summary_writer_class()
        self._run_dir, self._say = run_dir, say
        self._purge_step: int | None = purge_step  # None once it is written
        self._writer, self._failed = None, False

    def add(self, step: int, values: dict[str, float], images: dict[str, str]) -> None:
        """Numbers and PNG files of a step."""
        with self._tolerating():
            self._writer = self._writer or self._new_writer(self._run_dir, purge_step=self._purge_step)
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            for name, path in images.items():
                self._writer.add_image(name, pixels_of(path), step, dataformats='HWC')
            self._writer.flush()
            self._purge_step, self._failed = None, False

    def close(self) -> None:
        """End the file."""
        if self._writer is not None:
            with self._tolerating():
                self._writer.close()

    @contextlib.contextmanager
    def _tolerating(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writer = None  # its thread has ended
            if not self._failed:
                self._failed = True
                self._say(
                    f'TensorBoard: cannot write into {self._run_dir}: {error.strerror or error}. Training '
                    'goes on.'
                )


def summary_writer_class():
    """torch's writer of event files. Raises: UserError where the package tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            f'--tensorboard=1 needs the package tensorboard ({error}): pip install tensorboard'
        ) from error
    return SummaryWriter


def pixels_of(path: str):
    """A PNG file as [H, W, 3] uint8."""
    import numpy as np

    from data.pixels import open_image

    with open_image(path) as image:
        return np.asarray(image.convert('RGB'))
