"""Fixtures that tests share."""
from pathlib import Path

import pytest
from golden import golden_numbers


@pytest.fixture(scope='session')
def fixtures() -> Path:
    """The folder of golden files that other projects' code computed."""
    folder = Path(__file__).resolve().parents[2] / 'shared' / 'fixtures'
    if not folder.is_dir():
        pytest.skip('the shared fixtures are not beside this checkout')
    return folder


@pytest.fixture(scope='session')
def numerics():
    return golden_numbers('numerics.npz')


@pytest.fixture(scope='session')
def family():
    return golden_numbers('family.npz')
