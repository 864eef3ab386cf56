"""kill -9 in the middle of a GRPO-lambda training."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.trainers.killed_grpo import trained

ROOT = Path(__file__).parents[2]
MEASURED = ("time", "runtime", "per_second")


def kept(log):
    return [
        {name: value for name, value in entry.items() if not any(word in name for word in MEASURED)}
        for entry in log
        if "train_loss" not in entry
    ]


@pytest.mark.slow
def test_a_killed_training_is_the_whole_one(tmp_path: Path) -> None:
    """Bitwise: weights, and every logged number; continued inside the second epoch."""
    whole = trained(tmp_path / "whole")
    whole.save_model(str(tmp_path / "whole" / "policy"))
    assert whole.state.global_step == 7
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    for step, ends in ((5, -signal.SIGKILL), (-1, 0)):
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("killed_grpo.py")), str(tmp_path / "killed"), str(step)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **threads},
            timeout=300,
        )
        assert done.returncode == ends, done.stderr[-3000:]
    once, twice = (load_file(tmp_path / name / "policy" / "model.safetensors") for name in ("whole", "killed"))
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)
    states = [
        json.loads((tmp_path / name / "checkpoint-6" / "trainer_state.json").read_text())
        for name in ("whole", "killed")
    ]
    logs = [kept(state["log_history"]) for state in states]
    assert logs[0] == logs[1] and {entry["epoch"] for entry in logs[0]} >= {1.0, 2.0}
