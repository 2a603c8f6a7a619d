"""torchrun as the parent: its identity, ending with it, and whether it has restarted its processes."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import threading
import time
from pathlib import PurePath

import psutil

from dnnlib import identity, interrupts

PARENT_CHECK_SEC = 0.5
MODULES = ('torch.distributed.run', 'torch.distributed.launch')


def torchrun() -> dict | None:
    """The identity (`dnnlib.identity`) of the torchrun that is this process's parent, or None."""
    if 'TORCHELASTIC_RUN_ID' not in os.environ:
        return None
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process().parent()
        return (
            identity.of_process(parent.pid) if parent is not None and _is_torchrun(parent.cmdline()) else None
        )


def _is_torchrun(command: list[str]) -> bool:
    program, *names = [PurePath(word).name for word in command] or ['']
    return program == 'torchrun' or (
        program.startswith('python') and any(name in ('torchrun', *MODULES) for name in names)
    )


@functools.cache
def end_with_torchrun() -> None:
    """End this process within about a second of its torchrun, if one started it: it would train on unseen.

    One that a shell has started, or nohup, setsid or srun, in whatever environment, outlives its parent as
    ever.
    """
    if os.getppid() != interrupts.PARENT and _is_torchrun(
        interrupts.PARENT_COMMAND
    ):  # killed while this process was importing
        _end_with(interrupts.PARENT)
    if (parent := torchrun()) is not None:
        threading.Thread(
            target=_end_with, args=[parent['pid']], name='end-with-torchrun', daemon=True
        ).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_SEC)
    identity.end_at_once(
        f'torchrun (process {parent}) is gone: process {os.getpid()}, rank {os.environ.get("RANK")}, ends '
        'with it.'
    )


def restarts() -> tuple[int, int]:
    """(how often torchrun has started its processes again, how often it may), both 0 without torchrun."""
    values = (os.environ.get(f'TORCHELASTIC_{name}', '') for name in ('RESTART_COUNT', 'MAX_RESTARTS'))
    count, limit = (int(value) if re.fullmatch('[0-9]{1,9}', value) else 0 for value in values)
    return count, limit
