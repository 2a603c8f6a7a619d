"""torchrun as the parent process: its identity, ending with it, and its restarts."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import threading
import time
from pathlib import PurePath

import psutil

from dnnlib import identity, interrupts

PARENT_CHECK_SEC = 0.5  # how often a process checks that its torchrun is there
MODULES = ('torch.distributed.run', 'torch.distributed.launch')


def torchrun() -> dict | None:
    """The identity (`dnnlib.identity`) of the torchrun that is this process's parent, or None."""
    if 'TORCHELASTIC_RUN_ID' not in os.environ:
        return None
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process().parent()
        if parent is not None and _is_torchrun(parent.cmdline()):
            return identity.of_process(parent.pid)
    return None


def _is_torchrun(command: list[str]) -> bool:
    program, *names = [PurePath(word).name for word in command] or ['']
    return program == 'torchrun' or (
        program.startswith('python') and any(name in ('torchrun', *MODULES) for name in names)
    )


@functools.cache
def end_with_torchrun() -> None:
    """End this process within about a second after its torchrun: it would go on training unnoticed.

    Processes that a shell, nohup, setsid or srun has started outlive their parents as usual, whatever the
    environment.
    """
    # torchrun may have been killed while this process was importing.
    if os.getppid() != interrupts.PARENT and _is_torchrun(interrupts.PARENT_COMMAND):
        _end_with(interrupts.PARENT)
    if (parent := torchrun()) is not None:
        threading.Thread(
            target=_end_with, args=[parent['pid']], name='end-with-torchrun', daemon=True
        ).start()


def _end_with(parent: int) -> None:
    # An orphan gets another parent.
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_SEC)
    identity.end_at_once(
        f'torchrun (process {parent}) is gone: process {os.getpid()}, rank {os.environ.get("RANK")}, ends '
        'with it.'
    )


def launcher() -> list[str]:
    """The words that start this script again, up to its own options: with torchrun and its options if that did."""
    script, command = PurePath(sys.argv[0]), interrupts.PARENT_COMMAND
    if _is_torchrun(command):
        names = [PurePath(word).name for word in command]
        if script.name in names:
            words = command[: names.index(script.name) + 1]
            # Without the interpreter, whose path depends on the machine.
            return ['torchrun', *words[2:]] if names[1] == 'torchrun' else ['python', *words[1:]]
    return ['python', sys.argv[0]] if script.suffix == '.py' else [script.name]


def restarts() -> tuple[int, int]:
    """(number of restarts by torchrun so far, their limit), both 0 without torchrun."""
    values = (os.environ.get(f'TORCHELASTIC_{name}', '') for name in ('RESTART_COUNT', 'MAX_RESTARTS'))
    count, limit = (int(value) if re.fullmatch('[0-9]{1,9}', value) else 0 for value in values)
    return count, limit
