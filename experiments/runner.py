"""Run commands of this repository and print them, several in parallel; shared by demo.py and compare.py."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from dnnlib import UserError
from dnnlib.processes import how_ended
from dnnlib.text import printable
from dnnlib.util import LONGEST_MESSAGE
from metrics.options import GOOD_SOLVER, LEAST_PER_CLASS, PAIRS
from training.saved_files import LOG

ROOT = Path(__file__).resolve().parents[1]
SHOWN = 40  # images in a grid
DIVERSITY = ('recall', 'coverage')  # which methods that match distributions may lose
T = TypeVar('T')


@dataclass
class Runner:
    """Runs and records commands of the repository.

    Args:
        outdir: output folder.
        threads: CPU threads per command while several run in parallel.
        record: file to which every command is appended.
    """

    outdir: Path
    threads: int
    record: Path | None = None
    commands: list[str] = field(default_factory=list)
    running: set[subprocess.Popen] = field(default_factory=set)
    # Reentrant: a second signal may arrive while the first is handled.
    lock: threading.RLock = field(default_factory=threading.RLock)
    stopped: bool = False

    def run(self, name: str, *arguments, threads: int | None = None) -> str:
        """Run `python <arguments>` and print its lines after [name].

        Returns: its output. Raises: UserError if it fails or `stop` was called.
        """
        # Paths relative to the current folder make commands that can be copied.
        script = [os.path.relpath(ROOT / arguments[0])] if arguments[0].endswith('.py') else [arguments[0]]
        shown = ['python', *script, *map(str, arguments[1:])]
        # Commands run side by side, so each has a share of the cores.
        env = dict(
            os.environ,
            OMP_NUM_THREADS=str(threads or self.threads),
            PYTHONUNBUFFERED='1',
            PYTHONPATH=str(ROOT),
        )

        # Start under the lock, so that `stop` finds every process.
        with self.lock:
            if self.stopped:
                raise UserError(f'`{shlex.join(shown)}` was not begun.')
            self.commands.append(shlex.join(shown))
            print(f'$ {shlex.join(shown)}', flush=True)
            if self.record:
                with open(self.record, 'a', encoding='utf-8') as file:
                    file.write(shlex.join(shown) + '\n')
            process = subprocess.Popen(
                [sys.executable, '-W', 'ignore', *shown[1:]],
                env=env,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            self.running.add(process)

        # Print its output as it comes.
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip())
            with self.lock:
                print(printable(f'[{name}] {line.rstrip()}', LONGEST_MESSAGE), flush=True)
        self.running.discard(process)
        if process.wait() != 0:
            raise UserError(
                f'`{shlex.join(shown)}` failed ({how_ended(process.returncode)}); its last line: '
                f'{lines[-1] if lines else "none"}'
            )
        return '\n'.join(lines)

    def stop(self) -> None:
        """Terminate running commands and start no more."""
        with self.lock:
            self.stopped = True
            running = list(self.running)
        # Terminated, not killed: trainings save a state first.
        for process in running:
            process.terminate()

    def path(self, *parts: str) -> Path:
        return self.outdir.joinpath(*parts)


# ----------------------------------------------------------------------------
# Running several at once.


def run_interruptibly(runner: Runner, function: Callable[[], T], cure: str) -> T:
    """Call `function` in a thread; Ctrl-C and SIGTERM terminate the runner's commands, which ends the
    function.

    Returns: its result. Raises: UserError with the `cure` if interrupted.
    """
    signals: list[int] = []

    def stop(number, frame):
        signals.append(number)
        runner.stop()

    # Handlers run in the main thread, which only waits; the work is in another.
    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            future = pool.submit(function)
            while not future.done():
                time.sleep(0.1)  # signals are handled between sleeps; blocking on the future could delay them
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if signals:
        raise UserError(f'Interrupted: {cure}')
    return future.result()


@contextlib.contextmanager
def workers(runner: Runner, count: int) -> Iterator[concurrent.futures.Executor]:
    """Threads for jobs; an error in the block cancels pending jobs and terminates running commands."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            runner.stop()
            raise


# ----------------------------------------------------------------------------
# Networks and their measurement.


def is_finished(folder: Path) -> bool:
    """Whether the log of a training ends as train.py ends a complete run."""
    # A folder with snapshots may still be of an interrupted run.
    log = folder / LOG
    return log.exists() and log.read_text().rstrip().endswith('\nDone.')


def resumption(folder: Path) -> list[str]:
    """The option that resumes a training. Without a state there is nothing to resume: the folder is emptied,
    and there is none."""
    if any(folder.rglob('training-state-*.pt')):
        return [f'--resume={folder}']
    shutil.rmtree(folder, ignore_errors=True)
    return []


def newest_snapshot(folder: Path) -> Path:
    """The newest snapshot of a finished training. Raises: UserError if there is none."""
    from training.run_files import saved_snapshots

    found = saved_snapshots(folder)
    if not found:
        raise UserError(
            f'{folder} holds no network-snapshot-*.pkl, though its training is done: delete the folder to '
            'train again.'
        )
    return found[0]


class Metric(NamedTuple):
    """A Fréchet distance: its reference statistics and feature detector (None: the default of fid.py)."""

    ref: str
    detector: str | None

    @property
    def measures_diversity(self) -> bool:
        """Whether the reference also has features, which recall and coverage need. One that is not here has none."""
        if not zipfile.is_zipfile(self.ref):
            return False
        with zipfile.ZipFile(self.ref) as archive:
            return 'features.npy' in archive.namelist()


class Resampling(NamedTuple):
    """How 95 % intervals are computed: options of fid.py. Without resamples there are none."""

    bootstrap: int = 0
    strata: int = 1

    def options(self, images: int) -> list[str]:
        """For a number of images, which may be too small for classes by themselves."""
        # fid.py refuses few images of a class.
        strata = self.strata if images >= self.strata * LEAST_PER_CLASS else 1
        return [f'--bootstrap={self.bootstrap}', f'--bootstrap-strata={strata}'] if self.bootstrap else []


NO_INTERVALS = Resampling()


@dataclass(frozen=True)
class Pairs:
    """What images are compared with one by one: a teacher's of the same seeds, by Heun's method.

    Attributes:
        teacher, steps: the teacher's snapshot, and its steps.
        num: number of pairs.
    """

    teacher: Path | str
    steps: int
    num: int = PAIRS


def make_outdir(outdir: Path) -> None:
    """Create the output folder. Raises: UserError."""
    try:
        outdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'--outdir={outdir} cannot be created: {error.strerror}') from error


def measure(
    runner: Runner,
    name: str,
    network: Path | str,
    sampler: Sequence[str],
    images: int,
    metrics: dict[str, Metric],
    batch: int = 256,
    resampling: Resampling = NO_INTERVALS,
    labels: str | None = None,
    pairs: Pairs | None = None,
) -> dict:
    """Sample a network into samples/<name>, and compute its distances.

    Args:
        sampler: options of generate.py, solver and steps or noise levels.
        metrics: distances to compute, by name.
        labels: see --labels of generate.py.
        pairs: None for no paired error.
    Returns: `images`, `seconds` of sampling, and under the first metric `distance` and, with resamples,
        `interval`, and where its reference has features `recall` and `coverage`; under every other one the distance
        as `distance_<name>` and `interval_<name>`; with `pairs` the entries of `paired_error`.
    """
    # Sample; images of an interrupted run are discarded.
    folder, start = runner.path('samples', name), time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    runner.run(
        name,
        'generate.py',
        f'--network={network}',
        f'--outdir={folder}',
        '--strict-outdir',
        f'--seeds=0-{images - 1}',
        f'--batch={batch}',
        *sampler,
        *([f'--labels={labels}'] if labels else []),
    )
    row = dict(images=images, seconds=round(time.monotonic() - start, 1))
    if pairs:
        row |= paired_error(runner, name, network, sampler, images, metrics, batch, labels, pairs)

    # Measure under every metric.
    for i, (metric, of_metric) in enumerate(metrics.items()):
        result = runner.path('samples', f'{name}-{metric}.json')
        diversity = DIVERSITY if i == 0 and of_metric.measures_diversity else ()
        found = calculated(
            runner,
            name,
            result,
            f'--images={folder}',
            f'--ref={of_metric.ref}',
            f'--num={images}',
            f'--batch={batch}',
            *([f'--detector={of_metric.detector}'] if of_metric.detector else []),
            *([f'--metrics={",".join(("fid", *diversity))}'] if diversity else []),
            *resampling.options(images),
        )
        suffix = f'_{metric}' if i else ''
        row[f'distance{suffix}'] = found['fid']['value']
        if resampling.bootstrap:
            row[f'interval{suffix}'] = found['fid']['interval']
        row |= {measure: found[measure]['value'] for measure in diversity}
    return row


def paired_error(
    runner: Runner,
    name: str,
    network: Path | str,
    sampler: Sequence[str],
    images: int,
    metrics: dict[str, Metric],
    batch: int,
    labels: str | None,
    pairs: Pairs,
) -> dict:
    """The paired error of a network, whose images are those that `measure` samples first.

    The teacher's images stay in the folder `pairs`, so that they are made once for all networks.
    Returns: `paired_error` and `paired_interval`.
    """
    result = runner.path('samples', f'{name}-pairs.json')
    num = min(pairs.num, images)
    # The first reference tells the deviation of the data.
    ref = next(iter(metrics.values())).ref
    found = calculated(
        runner,
        name,
        result,
        f'--network={network}',
        f'--seeds=0-{num - 1}',
        f'--batch={batch}',
        *sampler,
        *([f'--labels={labels}'] if labels else []),
        '--metrics=paired_error',
        f'--pairs-with={pairs.teacher}:{GOOD_SOLVER}:{pairs.steps}',
        f'--ref={ref}',
        f'--cache={runner.path("pairs")}',
    )['paired_error']
    return dict(paired_error=found['value'], paired_interval=found['interval'])


def calculated(runner: Runner, name: str, result: Path, *arguments: str) -> dict:
    """What `fid.py calc` with these arguments writes to the file `result`, {metric: entries}."""
    runner.run(name, 'fid.py', 'calc', *arguments, f'--json={result}')
    return json.loads(result.read_text())
