"""Ctrl-C while a script is still importing: one line, exit status 130, no traceback.

Scripts import this first, before anything slow. In other programs that import `dnnlib` it does nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

# The parent, recorded before the seconds of imports, during which a torchrun may be killed.
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
EXIT_INTERRUPTED = 128 + signal.SIGINT  # as shells report it


def leave(*_) -> None:
    """End the process at once."""
    with contextlib.suppress(OSError):
        os.write(2, b'Interrupted.\n')
    os._exit(EXIT_INTERRUPTED)


def is_script() -> bool:
    """Whether Python runs one of the scripts, or its command `edm-...` that pip installed."""
    folder, name = os.path.split(os.path.abspath(getattr(sys.modules['__main__'], '__file__', None) or ''))
    if name.startswith('edm-'):
        return name.removeprefix('edm-').replace('-', '_') in SCRIPTS
    return (
        folder == os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        and name.removesuffix('.py') in SCRIPTS
    )


def at_work() -> None:
    """From now on, interrupts raise KeyboardInterrupt again, for work that must clean up."""
    if signal.getsignal(signal.SIGINT) is leave and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def kept_from_children() -> Iterator[None]:
    """Defer interrupts to the end of the block. Processes started in it ignore them: this one ends them."""
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def unraisable(unraised) -> None:
    """Leave on an interrupt in a callback (of an import, say), whose exceptions Python only prints."""
    if unraised.exc_type is KeyboardInterrupt:
        leave()
    sys.__unraisablehook__(unraised)


# A shell's background processes ignore interrupts, and go on doing so.
if is_script() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    sys.unraisablehook = unraisable
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, leave)
