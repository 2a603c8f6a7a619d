"""The folder of a run: its number and name, and the configuration in it."""

from __future__ import annotations

import contextlib
import os
import re

from dnnlib import EasyDict, UserError
from training.command_line import Options
from training.saved_files import OPTIONS, saved_states


def planned_run_dir(o: Options, data_name: str) -> str:
    """The folder `<outdir>/00000-<data>-<cond>-<arch>-...`, numbered after the highest that exists.

    With --nosubdir it is `outdir`, with --resume the folder of the state.
    """
    if o.run.resume:
        return os.path.dirname(os.path.abspath(o.run.resume))
    if o.run.nosubdir:
        return o.run.outdir
    from torch_utils import distributed

    # The number.
    try:
        existing = os.listdir(o.run.outdir) if os.path.isdir(o.run.outdir) else []
    except OSError as error:
        raise UserError(f'--outdir={o.run.outdir} cannot be read: {error.strerror}') from error
    numbers = [int(m[1]) for m in map(re.compile(r'([0-9]{1,9})-').match, existing) if m]

    # What is trained, and how.
    arch = o.run.arch or ('ddpmpp' if not o.teacher else 'teacher')
    steps = getattr(o.own, 'S', None)
    student = [o.run.objective + (f'-s{steps}' if steps else '')] if o.objective.loss else []
    words = [
        data_name,
        'cond' if o.run.cond else 'uncond',
        arch,
        o.run.precond or 'edm',
        *student,
        f'gpus{distributed.get_world_size()}',
        f'batch{o.run.batch}',
        o.run.arithmetic,
        *([o.run.desc] if o.run.desc else []),
    ]
    return os.path.join(o.run.outdir, f'{max(numbers, default=-1) + 1:05d}-{"-".join(words)}')


def make_run_dir(o: Options, data_name: str) -> str:
    """Create the folder of a new run: --outdir itself, or the next number that no other run has taken."""
    # Another run may take the number between listing and creating: then the next one is free.
    while True:
        run_dir = planned_run_dir(o, data_name)
        try:
            os.makedirs(run_dir, exist_ok=o.run.nosubdir)
            return run_dir
        except FileExistsError as error:
            if o.run.nosubdir:
                raise UserError(f'--outdir={o.run.outdir} is a file: name a folder') from error
        except OSError as error:
            raise UserError(
                f'--outdir={o.run.outdir} cannot be written to: {error.strerror or error}'
            ) from error


def check_new_folder(o: Options, run_dir: str) -> None:
    """Check, without creating anything, that a new run can write into its folder.

    Raises: UserError if it cannot be created or written to, or holds training states of an earlier run.
    """
    # The folder, or the nearest one above it that exists.
    folder = os.path.abspath(run_dir)
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        raise UserError(f'--outdir={o.run.outdir}: {folder} is a file: name a folder')
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f'--outdir={o.run.outdir} cannot be written to: {folder} allows no new files')
    check_no_states(o, run_dir)


def check_no_states(o: Options, run_dir: str) -> None:
    """Raises: UserError if another run has left states in the folder of a new one."""
    if saved_states(run_dir):
        raise UserError(
            f'--outdir={o.run.outdir} holds training states of an earlier run: continue it by '
            f'--resume={o.run.outdir}, or choose another folder.'
        )


def remove_if_empty(folder: str) -> None:
    """Remove the folder of a run that ended before it wrote anything."""
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def record_options(o: Options, c: EasyDict) -> None:
    """Write training_options.json into the folder of a new run, which is locked.

    Raises: UserError if another run has left states there.
    """
    from dnnlib.util import write_json

    check_no_states(o, c.run_dir)
    write_json(os.path.join(c.run_dir, OPTIONS), c)
