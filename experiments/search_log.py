"""The log of search.py: every evaluation of a metric, from which a search resumes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable

from dnnlib import UserError
from dnnlib.util import DISK_ERRORS, named
from torch_utils import distributed
from training import run_log


class SearchLog:
    """File of all evaluations: a line of settings, then a line per evaluation.

    Searches that share a log may evaluate different points, but under the same settings. The main process
    reads and writes the file, and shares its values with the others.

    Args:
        path: path of the file, which need not exist.
        settings: plain data that the values depend on.
    Raises: UserError if the file is another kind of file, has other settings, is damaged or cannot be
        written.
    """

    def __init__(self, path: str, settings: dict):
        self.path, self.metric = path, settings['metric']
        self.values: dict[tuple[float, ...], float] = {}
        if distributed.is_main():
            header, self.values = read_log(path)
            # Values of other settings would steer the search wrongly.
            others = [
                f'{name} is {json.dumps(settings.get(name))}, in the log {json.dumps(header.get(name))}'
                for name in {**settings, **(header or {})}
                if header is not None and settings.get(name) != header.get(name)
            ]
            if others:
                raise UserError(
                    f'{path} is the log of another search: {"; ".join(others)}. Use the options of that '
                    'search, or another --log.'
                )
            # Also for an existing log: fail now, not after the first evaluation, if it cannot be written.
            self._append(dict(search=settings) if header is None else None)
        # All processes must take the same way through the search.
        self.values = distributed.broadcast_object(self.values)

    def value(self, taus: list[float], compute: Callable[[], float]) -> float:
        """The value at these points: from the log, or from `compute`, and then first written to disk."""
        if tuple(taus) not in self.values:
            start = time.monotonic()
            value = compute()
            # On disk before the next evaluation, so that a kill loses one at most.
            if distributed.is_main():
                self._append(
                    dict(
                        taus=taus, metric=self.metric, value=value, seconds=round(time.monotonic() - start, 3)
                    )
                )
            self.values[tuple(taus)] = value
        return self.values[tuple(taus)]

    def _append(self, record: dict | None) -> None:
        """Append a line, if any, and flush it to disk; an incomplete last line is removed first."""
        try:
            run_log.append_lines(self.path, f'{run_log.json_line(record)}\n' if record else '')
            with open(self.path, 'rb') as file:
                os.fsync(file.fileno())
        except OSError as error:
            cure = (
                'Free some space'
                if error.errno in DISK_ERRORS
                else 'Make sure that its folder is there and open to writing'
            )
            raise UserError(
                f'--log={self.path} cannot be written: {error.strerror}. {cure}; the same command goes on '
                'from what is in it.'
            ) from error


def read_log(path: str) -> tuple[dict | None, dict[tuple[float, ...], float]]:
    """(settings, values by points) of a log; (None, {}) if there is none yet. An incomplete last line is
    ignored.

    Raises: UserError if the file is something else, or damaged.
    """
    try:
        with named('--log'):
            lines = list(run_log.records(path))
    except FileNotFoundError:
        return None, {}
    except OSError as error:
        raise UserError(f'--log={path} cannot be read: {error.strerror}.') from error

    # The last line, if the process was killed while it wrote it; it may be the first as well.
    torn = lines.pop()[0] if lines and lines[-1][1] is None and not lines[-1][0].endswith(b'\n') else b''
    if not lines and b'{"search": '.startswith(torn[:11]):
        return None, {}

    # Settings, then evaluations.
    settings = (lines[0][1] or {}).get('search') if lines else None
    if not isinstance(settings, dict):
        raise UserError(f'--log={path} is not a log of search.py. Choose another name.')
    values = {}
    for number, (_, record) in enumerate(lines[1:], start=2):
        taus, value = (record or {}).get('taus'), (record or {}).get('value')
        if not isinstance(taus, list) or not all(
            isinstance(number, (int, float)) for number in [*taus, value]
        ):
            raise UserError(
                f'--log={path} is damaged: line {number} is not an evaluation. Remove that line, or choose '
                'another name.'
            )
        values[tuple(taus)] = value
    return settings, values
