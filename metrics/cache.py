"""Features on disk, batch by batch: an evaluation that was stopped goes on where it was, and another one of
the same images starts from them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from data.arrays import ArchivedArrays
from dnnlib import UserError
from dnnlib.util import atomic_write
from torch_utils import distributed

FACTS = 'facts.json'


class FeatureCache:
    """A folder `<root>/<name>-<key>` with an `.npz` for every batch and `facts.json`, which says what the
    features are of.

    Args:
        root: folder that may hold the features of many image sets.
        name: of the detector.
        facts: plain data that decides the features: other facts, another key.
    Raises: UserError where the folder cannot be made.
    """

    def __init__(self, root: str | os.PathLike, name: str, facts: dict):
        text = json.dumps(facts, sort_keys=True, indent=2)
        self.folder = Path(root) / f'{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}'
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f'--cache={root} cannot be made: {error.strerror}. Choose another place.'
            ) from error
        if (
            distributed.is_main() and not (self.folder / FACTS).exists()
        ):  # a cache that is only read need not be writable
            with atomic_write(self.folder / FACTS) as file:
                file.write(text.encode() + b'\n')

    def load(self, part: range, names: set[str]) -> dict[str, np.ndarray] | None:
        """The arrays of a batch, `names` at least, with a row for each of its images; None where they are not
        there, or damaged."""
        try:
            with ArchivedArrays(self._path(part), self._path(part)) as file:
                arrays = {key: file.read(key) for key in file.keys}
        except UserError:
            return None
        return (
            arrays
            if names <= arrays.keys() and all(array.shape[:1] == (len(part),) for array in arrays.values())
            else None
        )

    def save(self, part: range, arrays: dict[str, np.ndarray]) -> None:
        """Keep the arrays of a batch, which all have a row for each of its images."""
        with atomic_write(self._path(part), durable=False) as file:
            np.savez(file, **arrays)

    def _path(self, part: range) -> Path:
        return self.folder / f'{part.start:09d}.npz'
