"""The options of a run as its training states hold them: the defaults of `train.py --resume`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from dnnlib import UserError
from dnnlib.lazy import lazy_import
from dnnlib.options import Option
from dnnlib.schema import read_json
from dnnlib.text import printable
from dnnlib.util import named
from training import config_file
from training.config import COUNTED_IN_IMAGES
from training.saved_files import OPTIONS, folder_of, folder_of_rounds, no_state, round_folders, saved_states

recorded = lazy_import('training.recorded')  # it imports PyTorch, which --help must not

# A state has the weights of --transfer. Lengths that a loss records in images are taken from there, because the
# batch size, in which these options count, may change.
NOT_STORED = ('transfer', *COUNTED_IN_IMAGES)


def read(resume: str, known: Mapping[str, Option]) -> dict[str, str]:
    """The options, {name: value as on a command line}, of the run that --resume names.

    Of progressive distillation they are those of all its rounds, with the first one's teacher.

    Raises: UserError if there is no such run, or its options cannot be read.
    """
    # A state, a run's folder, or the folder of rounds, which has no states itself.
    of_rounds, rounds = folder_of_rounds(resume), []
    alone = os.path.isdir(resume) and not saved_states(resume)
    c = None if alone else of_state(resume)
    if c is None or c.get('stages'):
        rounds = round_folders(of_rounds)
    if c is None and not rounds:
        raise UserError(f'--resume={resume}: {no_state(resume)}')
    try:
        if not rounds:
            kept = config_file.from_record(dict(c, stages=None), known)
            kept = {name: word for name, word in kept.items() if name not in NOT_STORED}
            return kept | dict(outdir=folder_of(resume))

        # The newest round has the options that the run was last resumed with.
        first, newest = of_round(rounds[0]), of_round(rounds[-1])
        c = dict(newest, teacher=first['teacher'], loss=dict(newest['loss'], S=newest['stages'][0][0]))
        kept = config_file.from_record(c, known)
        return {name: word for name, word in kept.items() if name != 'transfer'} | dict(outdir=of_rounds)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise UserError(f'--resume={resume}: its configuration {printable(error, 400)}.') from error


def of_state(resume: str) -> dict:
    """The configuration in a training state, or in the newest one of a folder whose configuration is whole."""
    from training import checkpoint

    if not os.path.isdir(resume):
        with named('--resume'):
            return checkpoint.read_options(resume, recorded.RECORDED)
    # Damaged states are reported when one is chosen.
    for path in saved_states(resume):
        with contextlib.suppress(UserError):
            return checkpoint.read_options(path, recorded.RECORDED)
    raise UserError(f'--resume={resume}: {no_state(resume)}')


def of_round(folder: Path) -> dict:
    """The configuration of a round of progressive distillation. Raises: UserError if it is missing or damaged."""
    if saved_states(folder):
        return of_state(os.fspath(folder))
    return recorded_options(folder)


def recorded_options(folder: str | os.PathLike) -> dict:
    """The training_options.json of a round. Raises: UserError if it is missing or damaged."""
    path = Path(folder, OPTIONS)
    try:
        return read_json(path, recorded.STAGE, 'the configuration')
    except (OSError, ValueError) as error:
        reason = '' if isinstance(error, FileNotFoundError) else f' (it {error})'
        raise UserError(
            f'{path} is missing or damaged{reason}: delete that folder and the ones of fewer steps, and '
            'resume.'
        ) from error
