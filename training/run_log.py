"""Run logger: console and log.txt, stats.jsonl, metrics-val.jsonl, a progress bar, W&B, TensorBoard.

No failure here ends training. docs/logging.md says what is written where.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterator

import tqdm

from dnnlib import UserError
from dnnlib.limits import JSON_LINE, check_size, open_regular
from dnnlib.schema import Integer, Mismatch, Real, Record, Text, check, parse_json
from dnnlib.text import printable
from dnnlib.util import LONGEST_MESSAGE, atomic_write
from training.saved_files import LOG, METRICS, STATS
from training.trackers import TensorBoard, WandbRun, import_wandb, summary_writer_class

# Entries of an evaluation that are not results.
CIRCUMSTANCES = ('kimg', 'nimg', 'num_images', 'num_pairs', 'steps', 'nfe', 'seconds')
# A line of either .jsonl file. Numbers under other names are finite or null.
LINE = Record(
    {
        'nimg': Integer(),
        'kimg': Real(0),
        'ema': Text(longest=64),
        'timestamp': Real(0),
        'Progress/nimg': Record(dict(mean=Real(0, 1e15)), ['mean']),
    }
)


class RunLog:
    """Run logger; only rank 0, which is `enabled`, writes.

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
        self._unwritten: dict[str, str] = {}  # lines by file name
        self._warned = False  # of lines that cannot be written

    def start(
        self,
        total_nimg: int,
        resumed_at: int | None = None,
        wandb: dict | None = None,
        config: dict | None = None,
        tensorboard: bool = False,
    ) -> None:
        """Begin a run, or resume one at `resumed_at` images and remove later records, which come again.

        Args:
            total_nimg: images at the end of the run.
            resumed_at: images that the training state has seen; None for a new run.
            wandb: None, or `project`, `entity`, `name`, `tags`, `mode` and, from the training state, `id` of
                the W&B run, each possibly None.
            config: the run's configuration, plain data, shown by W&B.
            tensorboard: write TensorBoard's event files into the run folder.
        Raises: UserError if a package is missing, or the disk is too full to shorten a file.
        """
        self.wandb_id = wandb and wandb.get('id')
        if not self.enabled:
            return
        # A run that was killed before its first state begins anew in its folder.
        seen = -1 if resumed_at is None else resumed_at
        latest, history = forget_future(self.run_dir, seen)

        # TensorBoard, W&B, and the progress bar.
        if tensorboard:
            self._tensorboard = TensorBoard(self.run_dir, seen + 1, say=self)
        if wandb and wandb.get('mode') != 'disabled':
            self._wandb = WandbRun(self.run_dir, wandb, config, latest, say=self)
            self.wandb_id = self._wandb.id
            # W&B skips the steps that it has.
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
        """Log a line, to the console and log.txt. Warnings go to stderr."""
        if self.enabled:
            line = printable(line, LONGEST_MESSAGE)
            stream = sys.stderr if line.startswith('Warning:') else sys.stdout
            # The terminal may be gone.
            with contextlib.suppress(OSError), tqdm.tqdm.external_write_mode(file=stream):
                print(line, file=stream, flush=True)
            self._append(LOG, line)

    def stats(self, stats: dict[str, dict]) -> None:
        """Log the statistics of a tick, {name: {"num", "mean", "std"}}, among them `Progress/nimg`."""
        if self.enabled:
            self._append(STATS, json_line(dict(stats, timestamp=time.time())))
            self._show(images_seen(stats), scalars(stats), {})

    def evaluation(self, record: dict, grid: str | None = None) -> None:
        """Log an evaluation of the average `record['ema']` at `record['nimg']` images; `grid`: a PNG file.

        A failed evaluation has a `problem` instead of a `fid` or `paired_error`, which is logged as a warning.
        """
        if self.enabled:
            self(json_line(record))
            if 'problem' in record:
                what = 'FID' if record['fid'] is None else 'paired error'
                self(
                    f'Warning: there is no {what} of {record["ema"]} at {record["nimg"] / 1e3:g} kimg: '
                    f'{record["problem"]}'
                )
            self._append(METRICS, json_line(record))
            images = {f'Samples{average_suffix(record)}': grid} if grid else {}
            self._show(record['nimg'], scalars(record), images)

    def samples(self, nimg: int, path: str) -> None:
        """Show the picture of a snapshot, a PNG file, in TensorBoard and W&B."""
        if self.enabled:
            self._show(nimg, {}, {'Samples/snapshot': path})

    def advance(self, nimg: int) -> None:
        """Move the progress bar; cheap enough for every step."""
        if self._wandb:
            self._wandb.advance(nimg)
        if self._bar is not None:
            with contextlib.suppress(OSError):
                # The last step may go beyond the end.
                self._bar.update(min(nimg / 1e3, self._bar.total) - self._bar.n)

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
        # Lines that a full disk refused have a last chance.
        self._write()

    def _show(self, step: int, values: dict[str, float], images: dict[str, str]) -> None:
        if self._tensorboard:
            self._tensorboard.add(step, values, images)
        if self._wandb:
            self._wandb.add(step, values, images)

    def _append(self, name: str, line: str) -> None:
        # Kept until they are written: a full disk neither ends training nor loses lines.
        self._unwritten[name] = self._unwritten.get(name, '') + line + '\n'
        self._write()

    def _write(self) -> None:
        for name, lines in list(self._unwritten.items()):
            try:
                append_lines(os.path.join(self.run_dir, name), lines)
                del self._unwritten[name]
            except OSError as error:
                # Warn once, until all lines are written. The terminal may be gone too.
                if not self._warned:
                    line = (
                        f'Cannot write {name} in {self.run_dir}: {error.strerror}. Training goes on; '
                        'missing lines are written when that is possible again.'
                    )
                    with contextlib.suppress(OSError):
                        print(line, file=sys.stderr, flush=True)
                self._warned = True
        self._warned &= bool(self._unwritten)


def check_available(wandb: dict | None, tensorboard: bool) -> None:
    """Check the options before anything is created. Raises: UserError if they cannot work."""
    if tensorboard:
        summary_writer_class()
    if wandb and wandb.get('mode') != 'disabled':
        package = import_wandb()
        # W&B itself knows which names it takes.
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
    """A record as one line of strict JSON, with null for numbers that are not finite."""

    def finite(value):
        if isinstance(value, dict):
            return {key: finite(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(record))


def scalars(record: dict) -> dict[str, float]:
    """The numbers of a line of stats.jsonl or metrics-val.jsonl, by their names in W&B and TensorBoard."""
    # An evaluation.
    if 'nimg' in record:
        values = {
            f'Metrics/{name}{average_suffix(record)}': value
            for name, value in record.items()
            if isinstance(value, (int, float)) and name not in CIRCUMSTANCES
        }
    # Statistics.
    else:
        moments = {name: entry for name, entry in record.items() if isinstance(entry, dict)}
        values = {name: entry.get('mean') for name, entry in moments.items()}
        values.update(
            {f'{name}_std': entry.get('std') for name, entry in moments.items() if entry.get('num', 0) > 1}
        )
    return {name: value for name, value in values.items() if value is not None}


def average_suffix(record: dict) -> str:
    """Empty for the run's exponential average; `/<name>` for other averages and the teacher."""
    name = record.get('ema', 'ema')
    return '' if name == 'ema' else f'/{name}'


def append_lines(path: str, lines: str) -> None:
    """Append all lines or none. A line that a kill truncated is ended first, or removed from a .jsonl file.

    Raises: OSError, such as for a full disk; then the file is as it was.
    """
    with open(path, 'a+b', buffering=0) as file:
        # End or remove a truncated last line.
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

        # A disk that fills up takes part of the data, which is removed again.
        data = lines.encode()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(end)
            raise


def _is_record(line: bytes) -> bool:
    with contextlib.suppress(Mismatch):
        return parse(line) is not None
    return False


def parse(line: bytes) -> dict | None:
    """The record of a line; None if it has none. Raises: Mismatch for a record that no run writes."""
    try:
        record = parse_json(line, JSON_LINE, 'a line of statistics')
    except ValueError:
        return None
    return check(record, LINE, 'the record') if isinstance(record, dict) else None


def records(path: str) -> Iterator[tuple[bytes, dict | None]]:
    """The lines of a .jsonl file, each with its record or None. The last line may be truncated.

    Raises: UserError, naming the line, for a record that no run writes, and for an endless line.
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
    """Images seen at a record of either file; None if it does not say."""
    count = record.get('nimg', record.get('Progress/nimg'))
    count = count.get('mean') if isinstance(count, dict) else count
    return int(count) if isinstance(count, (int, float)) else None


def forget_future(run_dir: str, nimg: int) -> tuple[int, dict[int, dict[str, float]]]:
    """Remove records beyond `nimg` images, and a truncated line, from stats.jsonl and metrics-val.jsonl.

    Returns: the most images seen at any record (-1 for none), and the remaining numbers by images seen.
    Raises: UserError, naming the line, for a record that no run writes.
    """
    latest, history = -1, {}
    for path in (os.path.join(run_dir, name) for name in (STATS, METRICS)):
        if not os.path.exists(path):
            continue

        # Keep lines up to `nimg`, and lines without a record.
        kept, count, complete = [], 0, True
        for line, record in records(path):
            count, complete = count + 1, line.endswith(b'\n')
            if record is None and not complete:  # the last line
                continue
            seen = images_seen(record or {})
            if seen is not None:
                latest = max(latest, seen)
                if seen > nimg:
                    continue
                history.setdefault(seen, {}).update(scalars(record))
            kept.append(line if complete else line + b'\n')
        # Rewrite the file only if something changes.
        if not complete or len(kept) < count:
            with atomic_write(path) as file:
                file.writelines(kept)
    return latest, history
