"""kill -9 at random moments of the demo; the final tables equal an undisturbed run's. Ten kills: the soak."""

import os

import pytest

from tests.chaos import killed, state, undisturbed
from tests.small_demo import write

KILLS = int(os.environ.get("CHAOS_KILLS", "2"))


@pytest.mark.slow
@pytest.mark.timeout(900 + 300 * KILLS)
def test_a_demo_that_is_killed_leaves_what_an_undisturbed_one_leaves(tmp_path):
    file = write(tmp_path)
    seconds = undisturbed(file, tmp_path / "alone")
    killed(file, tmp_path / "killed", KILLS, seconds, seed=int(os.environ.get("CHAOS_SEED", "0")))
    alone, restarted = state(tmp_path / "alone"), state(tmp_path / "killed")
    assert alone.keys() == restarted.keys()
    for name, expected in alone.items():
        assert restarted[name] == expected, name
