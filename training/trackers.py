"""W&B and TensorBoard: numbers and pictures of a run, whose steps are images seen.

A failure of either is logged once, and training continues. docs/logging.md says what is written where.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator

from dnnlib import UserError
from dnnlib.limits import open_regular
from training.saved_files import METRICS, STATS

INIT_TIMEOUT = 60.0  # seconds that W&B has to begin a run
FINISH_TIMEOUT = 300.0  # seconds that W&B has to send what remains at the end
WRITTEN_AFTER = (
    60.0  # seconds until W&B's service, which writes every 15, has surely written what it was sent
)

# ----------------------------------------------------------------------------
# Weights & Biases.


class WandbRun:
    """A run at W&B. The first failure is logged, and nothing is sent after it.

    W&B takes each step once, in ascending order, and keeps what it has. So a resumed run may add its recorded
    history, and later what it computes again: steps that W&B has are skipped.

    Args:
        run_dir: folder in which W&B keeps its own folder, `wandb`.
        options, config: see `RunLog.start`.
        latest: most images that the run had recorded before it was resumed.
        say: function that logs a line.
    """

    def __init__(
        self, run_dir: str, options: dict, config: dict | None, latest: int, say: Callable[[str], None]
    ):
        self.id: str | None = options.get('id')
        self._say, self._run, self._failed = say, None, False
        # The last step that W&B has, and the step that is being collected.
        self._last_step, self._step, self._row, self._images = -1, -1, {}, {}
        # Offline, a file notes which steps are written: those up to `_sure`, which was sent before `_since`.
        self._note: str | None = None
        self._sure, self._since = -1, time.monotonic()
        with self._tolerating():
            self._begin(run_dir, options, config, latest)

    def _begin(self, run_dir: str, options: dict, config: dict | None, latest: int) -> None:
        # Set up the package, or it would not be silent at first, and prompt for a key at a terminal.
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
        wandb.setup(settings)

        # Begin or resume the run.
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

        # Find the last step that W&B has.
        if not run.offline:
            self._last_step = run.starting_step - 1
        else:
            self._note = os.path.join(run_dir, 'wandb', f'{run.id}.written')
            self._last_step = self._sure = self._written_step(latest) if self.id else -1
            self._write_note(self._last_step)
        self._run, self.id = run, run.id
        self._say(f'W&B: {run.sync_dir} (wandb sync uploads it)' if run.offline else f'W&B: {run.url}')

    def _written_step(self, latest: int) -> int:
        """The last step that earlier processes surely wrote, by our note or else by their last record."""
        try:
            with open_regular(self._note) as file:
                return min(int(file.read(20)), latest)
        except OSError:  # uploaded and removed
            return latest
        except ValueError:  # truncated
            return -1

    def _write_note(self, step: int) -> None:
        """Note, offline, the last step that a kill cannot lose. After an older note, more is sent again."""
        if self._note:
            with contextlib.suppress(OSError), open(self._note, 'w') as file:
                file.write(f'{step}\n')

    def add(self, step: int, values: dict[str, float], images: dict[str, str] | None = None) -> None:
        """Collect numbers and PNG files of a step, in one or several calls."""
        self.advance(step)
        self._step = step
        self._row.update(values)
        self._images.update(images or {})

    def advance(self, step: int) -> None:
        """Send what was collected, once training has reached a later step."""
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
        """A block in which W&B may fail: by its own exceptions, by OSError (broken connections, time-outs,
        full disks) or by ValueError (settings in the environment).

        Its own exceptions have no common base class, and those of a service process that died or hangs are
        private (wandb.sdk.mailbox), so they are recognized by the package of their class.
        """
        try:
            yield
        except Exception as error:
            package = type(error).__module__.partition('.')[0]
            if not isinstance(error, (OSError, ValueError)) and package != 'wandb':
                raise

            # Send nothing more, and say so once.
            self._run = None
            if not self._failed:
                self._failed = True
                self._say(
                    f'W&B failed, and training continues without it: {type(error).__name__}: '
                    f'{" ".join(str(error).split())} ({STATS} and {METRICS} have everything; resuming the '
                    'run with --wandb=1 sends what W&B lacks)'
                )


def import_wandb():
    """The package. Raises: UserError if it is not installed."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(f'--wandb=1 needs the package wandb ({error}): pip install wandb') from error
    return wandb


# ----------------------------------------------------------------------------
# TensorBoard.


class TensorBoard:
    """Event files in the run folder. After a failure, logged once, the next call begins a new file.

    Args:
        run_dir: folder of the files.
        purge_step: step from which on TensorBoard ignores earlier files.
        say: function that logs a line.
    Raises: UserError if tensorboard is not installed.
    """

    def __init__(self, run_dir: str, purge_step: int, say: Callable[[str], None]):
        self._new_writer = summary_writer_class()
        self._run_dir, self._say = run_dir, say
        self._purge_step: int | None = purge_step  # None once it is written
        self._writer, self._failed = None, False

    def add(self, step: int, values: dict[str, float], images: dict[str, str]) -> None:
        """Write numbers and PNG files of a step."""
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
                    'continues.'
                )


def summary_writer_class():
    """PyTorch's writer of event files. Raises: UserError if the package tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            f'--tensorboard=1 needs the package tensorboard ({error}): pip install tensorboard'
        ) from error
    return SummaryWriter


def pixels_of(path: str):
    """The pixels of a PNG file, [H, W, 3] uint8."""
    import numpy as np

    from data.pixels import open_image

    with open_image(path) as image:
        return np.asarray(image.convert('RGB'))
