"""kill -9 at random moments of the demo; the final tables equal an undisturbed run's. Ten kills: the soak."""

import os
import shutil

import pytest

from tests.chaos import killed, state, undisturbed
from tests.small_demo import write

KILLS = int(os.environ.get("CHAOS_KILLS", "2"))


@pytest.mark.slow
@pytest.mark.timeout(900 + 300 * KILLS)
def test_a_demo_that_is_killed_leaves_what_an_undisturbed_one_leaves(tmp_path):
    file, out = write(tmp_path), tmp_path / "run"  # one folder for both: rows name the policy by its folder
    seconds = undisturbed(file, out)
    alone = state(out)
    shutil.rmtree(out)
    killed(file, out, KILLS, seconds, seed=int(os.environ.get("CHAOS_SEED", "0")))
    restarted = state(out)
    assert alone.keys() == restarted.keys()
    for name, expected in alone.items():
        assert restarted[name] == expected, name
