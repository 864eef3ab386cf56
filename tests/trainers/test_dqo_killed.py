"""kill -9 in the middle of a DQO training, and again."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.trainers.killed_dqo import trained

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_killed_training_ends_in_the_same_weights(tmp_path: Path) -> None:
    """Bitwise: the policy and the value model, and with them all that they are made from after the last kill."""
    whole = trained(tmp_path / "whole")
    assert whole.state.global_step == 10
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    for step, ends in ((4, -signal.SIGKILL), (8, -signal.SIGKILL), (-1, 0)):
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("killed_dqo.py")), str(tmp_path / "killed"), str(step)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **threads},
            timeout=200,
        )
        assert done.returncode == ends, done.stderr[-3000:]
        assert (tmp_path / "killed" / "policy").exists() == (ends == 0)
    for file in ("model.safetensors", "critic/model.safetensors"):
        once, twice = (load_file(tmp_path / name / "policy" / file) for name in ("whole", "killed"))
        assert once.keys() == twice.keys()
        assert all(torch.equal(once[name], twice[name]) for name in once)
