"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets (`POSTTRAIN_DATA`, else `../shared/data` beside the checkout); skips without it."""
    folder = Path(os.environ.get("POSTTRAIN_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no data folder; set POSTTRAIN_DATA")
    return folder
