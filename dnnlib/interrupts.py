"""Ctrl-C while a script is still importing: one line, exit status 130, no traceback.

Scripts import this first, before what takes time. For other programs that import `dnnlib` it does nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

# Who started this process, while that can be seen: a torchrun may be killed during the seconds of imports.
PARENT = os.getppid()
PARENT_COMMAND: list[str] = []
if 'TORCHELASTIC_RUN_ID' in os.environ:
    with contextlib.suppress(OSError), open(f'/proc/{PARENT}/cmdline', 'rb') as _file:
        PARENT_COMMAND = os.fsdecode(_file.read()).split('\0')[:-1]
SCRIPTS = (
    'train',
    'generate',
    'fid',
    'validation',
    'dataset_tool',
    'demo',
    'convert',
    'reconstruct_phema',
    'edit',
    'search',
    'compare',
    'example',
)
EXIT_INTERRUPTED = 128 + signal.SIGINT


def leave(*_) -> None:
    """End the process at once."""
    with contextlib.suppress(OSError):
        os.write(2, b'Interrupted.\n')
    os._exit(EXIT_INTERRUPTED)


def is_script() -> bool:
    """Whether one of the scripts is what Python runs."""
    folder, name = os.path.split(os.path.abspath(getattr(sys.modules['__main__'], '__file__', None) or ''))
    return (
        folder == os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        and name.removesuffix('.py') in SCRIPTS
    )


def at_work() -> None:
    """From here on an interrupt is an exception again, for work that must end in order: files, processes."""
    if signal.getsignal(signal.SIGINT) is leave and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def kept_from_children() -> Iterator[None]:
    """A block whose interrupts come at its end. Processes that it starts get none: this one ends them."""
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def unraisable(unraised) -> None:
    """Raise an interrupt that hit a callback (of an import, say), whose exceptions Python only prints."""
    if unraised.exc_type is KeyboardInterrupt:
        leave()
    sys.__unraisablehook__(unraised)


if (
    is_script() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):  # it is ignored in the background of a shell
    sys.unraisablehook = unraisable
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, leave)
