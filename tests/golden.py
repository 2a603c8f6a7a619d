"""Golden numbers that travel with the repository: see tests/golden/README.md."""

from pathlib import Path

import numpy as np


def golden_numbers(name: str) -> dict[str, np.ndarray]:
    """A plain-number golden file: {name: array}."""
    with np.load(Path(__file__).parent / 'golden' / name, allow_pickle=False) as archive:
        return dict(archive)
