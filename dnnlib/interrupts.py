"""The keyboard's interrupt while a script and what it needs are imported, and nothing is begun: one line, exit status 130, no traceback.

Scripts import this first, before what takes time. For other programs that import `dnnlib` it does nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

# Who started this process, as long as that can be seen: imports take seconds, in which a torchrun may be killed.
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
    """From here on an interrupt is an exception again. Called by whatever has to be ended in order: files half written, processes, groups of them."""
    if signal.getsignal(signal.SIGINT) is leave and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def kept_from_children() -> Iterator[None]:
    """A block whose interrupts come at its end. Processes that it starts never get any: the one that the keyboard interrupts ends them."""
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def unraisable(unraised) -> None:
    """Python prints, and forgets, an exception in a callback, such as those of imports. An interrupt should not be forgotten."""
    if unraised.exc_type is KeyboardInterrupt:
        leave()
    sys.__unraisablehook__(unraised)


if (
    is_script() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):  # it is ignored in the background of a shell
    sys.unraisablehook = unraisable
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, leave)
