"""Stories told by the scripts themselves, as demo.py and compare.py do: commands that are shown and run,
several side by side."""

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from dnnlib import UserError
from dnnlib.processes import how_ended
from dnnlib.text import printable
from dnnlib.util import LONGEST_MESSAGE

ROOT = Path(__file__).resolve().parents[1]
SHOWN = 40  # images in a grid
T = TypeVar('T')


@dataclass
class Story:
    """Runs commands of the repository and remembers them.

    Args:
        outdir: folder for what they write.
        threads: what each command may use while several run side by side.
        record: file to which every command is appended as well.
    """

    outdir: Path
    threads: int
    record: Path | None = None
    commands: list[str] = field(default_factory=list)
    running: set[subprocess.Popen] = field(default_factory=set)
    lock: threading.RLock = field(
        default_factory=threading.RLock
    )  # a second signal may come while the first stops the story
    stopped: bool = False

    def say(self, line: str) -> None:
        with self.lock:
            print(printable(line, LONGEST_MESSAGE), flush=True)

    def run(self, name: str, *arguments, threads: int | None = None) -> str:
        """Run `python <arguments>`; its lines appear behind [name], and its stdout is returned. Raises:
        UserError where it fails."""
        script = [os.path.relpath(ROOT / arguments[0])] if arguments[0].endswith('.py') else [arguments[0]]
        shown = ['python', *script, *map(str, arguments[1:])]
        env = dict(
            os.environ,
            OMP_NUM_THREADS=str(threads or self.threads),
            PYTHONUNBUFFERED='1',
            PYTHONPATH=str(ROOT),
        )
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
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip())
            self.say(f'[{name}] {line.rstrip()}')
        self.running.discard(process)
        if process.wait() != 0:
            raise UserError(
                f'`{shlex.join(shown)}` failed ({how_ended(process.returncode)}); its last line: '
                f'{lines[-1] if lines else "none"}'
            )
        return '\n'.join(lines)

    def stop(self) -> None:
        """End what still runs, and begin nothing more."""
        with self.lock:
            self.stopped = True
            running = list(self.running)
        for process in running:
            process.terminate()

    def path(self, *parts: str) -> Path:
        return self.outdir.joinpath(*parts)


def tell(story: Story, function: Callable[[], T], cure: str) -> T:
    """What `function` returns, called in a thread. The keyboard and SIGTERM end what the story runs, and with
    that the function.

    Raises: UserError with the `cure` where they have.
    """
    signals: list[int] = []

    def stop(number, frame):
        signals.append(number)
        story.stop()

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            future = pool.submit(function)
            while not future.done():
                time.sleep(0.1)  # a main thread that waits for another one may miss a signal
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if signals:
        raise UserError(f'Interrupted: {cure}')
    return future.result()


@contextlib.contextmanager
def workers(story: Story, count: int) -> Iterator[concurrent.futures.Executor]:
    """Threads for a story's jobs. When an error ends the context, no other job begins, and the commands of
    those that have are ended."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            story.stop()
            raise


def newest_snapshot(folder: Path) -> Path:
    """The last of `run_files.saved_snapshots`. Raises: UserError where there is none."""
    from training.run_files import saved_snapshots

    found = saved_snapshots(folder)
    if not found:
        raise UserError(
            f'{folder} holds no network-snapshot-*.pkl, though its training is done: delete the folder to '
            'train again.'
        )
    return found[0]


class Ruler(NamedTuple):
    """How a Fréchet distance is measured: reference statistics, and the detector that they were made with
    (None: fid.py's own)."""

    ref: str
    detector: str | None


def make_outdir(outdir: Path) -> None:
    """The folder of a story. Raises: UserError where it cannot be made."""
    try:
        outdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'--outdir={outdir} cannot be made: {error.strerror}') from error


def measure(
    story: Story,
    name: str,
    network: Path | str,
    solver: str,
    steps: int,
    images: int,
    rulers: dict[str, Ruler],
    batch: int = 256,
    bootstrap: int = 0,
    labels: str | None = None,
) -> dict:
    """Sample a network, and measure the images with every ruler. The images stay in the folder
    samples/<name>.

    `labels`: as --labels of generate.py.
    Returns: `images`, `seconds` of sampling; `distance`, and with `bootstrap` its `interval`; the same as
    `distance_<ruler>` by all rulers but the first.
    """
    folder, start = story.path('samples', name), time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)  # of a story that was interrupted
    story.run(
        name,
        'generate.py',
        f'--network={network}',
        f'--outdir={folder}',
        '--strict-outdir',
        f'--seeds=0-{images - 1}',
        f'--batch={batch}',
        f'--solver={solver}',
        f'--steps={steps}',
        *([f'--labels={labels}'] if labels else []),
    )
    row = dict(images=images, seconds=round(time.monotonic() - start, 1))
    for i, (ruler, (ref, detector)) in enumerate(rulers.items()):
        result = story.path('samples', f'{name}-{ruler}.json')
        story.run(
            name,
            'fid.py',
            'calc',
            f'--images={folder}',
            f'--ref={ref}',
            f'--num={images}',
            f'--batch={batch}',
            *([f'--detector={detector}'] if detector else []),
            *([f'--bootstrap={bootstrap}'] if bootstrap else []),
            f'--json={result}',
        )
        found = json.loads(result.read_text())['fid']
        suffix = f'_{ruler}' if i else ''
        row |= {
            f'distance{suffix}': found['value'],
            **({f'interval{suffix}': found['interval']} if bootstrap else {}),
        }
    return row
