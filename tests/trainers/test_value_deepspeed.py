"""The real DeepSpeed: a value model on two gloo ranks of this machine's processors."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from posttrain.models.load import load_model
from posttrain.models.value import load_value_model
from tests.trainers.zero_value_model import trained

pytestmark = [pytest.mark.deepspeed, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_give_the_value_model_of_one(tmp_path: Path, stage: int) -> None:
    pytest.importorskip("deepspeed")
    launch = ["accelerate.commands.launch", "--use_deepspeed", "--zero_stage", str(stage), "--num_processes", "2"]
    command = [sys.executable, "-m", *launch, "--main_process_port", str(free_port())]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("zero_value_model.py")), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["ranks"], report["engine"], report["zero_stage"]) == (2, "DeepSpeedEngine", stage)

    alone = trained(tmp_path / "alone", rows=8, accumulation=1)
    losses = [entry["loss"] for entry in alone.state.log_history if "loss" in entry]
    assert report["losses"] == pytest.approx(losses, abs=1e-5)
    saved = load_value_model(tmp_path / "guide", load_model("tiny", device="cpu")).state_dict()
    for name, weight in alone.model.state_dict().items():
        torch.testing.assert_close(saved[name], weight, atol=1e-5, rtol=0, msg=lambda text, n=name: f"{n}: {text}")
