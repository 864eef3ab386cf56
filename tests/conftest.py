"""Fixtures shared by all tests."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Under a shell's `&` or a runner SIGINT may be ignored, and a child would inherit that: tests send it to children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# The same examples everywhere, however slow the machine.
settings.register_profile(
    "tests", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets (`POSTTRAIN_DATA`, else `../shared/data` beside the checkout); skips without it."""
    folder = Path(os.environ.get("POSTTRAIN_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no data folder; set POSTTRAIN_DATA")
    return folder
