"""Features on disk, batch by batch, for interrupted evaluations and others of the same images."""

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
    """A folder `<root>/<name>-<key>` with an `.npz` per batch, and `facts.json`, which identifies them.

    Args:
        root: folder for the features of any number of image sets.
        name: the detector's name.
        facts: plain data that determines the features and, by digest, the key.
    Raises: UserError if the folder cannot be created.
    """

    def __init__(self, root: str | os.PathLike, name: str, facts: dict):
        text = json.dumps(facts, sort_keys=True, indent=2)
        self.folder = Path(root) / f'{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}'
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f'--cache={root} cannot be created: {error.strerror}. Choose another folder.'
            ) from error
        # Write only what is missing: a cache that is only read need not be writable.
        if distributed.is_main() and not (self.folder / FACTS).exists():
            with atomic_write(self.folder / FACTS) as file:
                file.write(text.encode() + b'\n')

    def load(self, part: range, names: set[str]) -> dict[str, np.ndarray] | None:
        """Arrays of a batch, at least `names`, with a row per image; None if missing or damaged."""
        try:
            with ArchivedArrays(self._path(part), self._path(part)) as file:
                arrays = {key: file.read(key) for key in file.keys}
        except UserError:
            return None
        # A damaged or older batch is computed again.
        complete = all(array.shape[:1] == (len(part),) for array in arrays.values())
        return arrays if complete and names <= arrays.keys() else None

    def save(self, part: range, arrays: dict[str, np.ndarray]) -> None:
        """Store the arrays of a batch, which have a row per image."""
        with atomic_write(self._path(part), durable=False) as file:
            np.savez(file, **arrays)

    def _path(self, part: range) -> Path:
        return self.folder / f'{part.start:09d}.npz'
