"""DQO on two gloo ranks of this machine's processors gives what one rank gives."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from posttrain.models.value import ValueModel
from tests.trainers.ranks_dqo import trained

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("alone"), rows=8, accumulation=1)


@pytest.mark.parametrize(
    ("engine", "stage"),
    [
        ("DistributedDataParallel", 0),
        pytest.param("DeepSpeedEngine", 2, marks=pytest.mark.deepspeed),
        pytest.param("DeepSpeedEngine", 3, marks=pytest.mark.deepspeed),
    ],
)
def test_two_ranks_give_the_models_of_one(tmp_path: Path, alone, engine: str, stage: int) -> None:
    if stage:
        pytest.importorskip("deepspeed")
    launched(tmp_path, stage)
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["ranks"], report["engine"], report["zero_stage"]) == (2, engine, stage)

    losses = [entry["loss"] for entry in alone.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in report["log"]] == pytest.approx(losses, abs=1e-5)
    assert len(set(losses)) == 5
    for folder in (tmp_path / "policy", tmp_path / "run" / "checkpoint-5"):
        expect_close(transformers.AutoModelForCausalLM.from_pretrained(folder), alone.model.policy)
        expect_close(ValueModel.from_pretrained(folder / "critic"), alone.model.critic)


@pytest.mark.deepspeed
def test_bfloat16_weights_under_zero_3_have_float32_heads(tmp_path: Path, alone) -> None:
    """The heads' weights are widened where they are gathered, and the reference is not rounded."""
    pytest.importorskip("deepspeed")
    launched(tmp_path, 3, "--mixed_precision", "bf16")
    log = json.loads((tmp_path / "report.json").read_text())["log"]
    losses = [entry["loss"] for entry in alone.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in log] == pytest.approx(losses, rel=0.2)
    assert abs(log[0]["log_ratio_right"]) < 0.1


def launched(out: Path, stage: int, *options: str) -> None:
    port = str(free_port())
    launch = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    if stage:
        launch = ["accelerate.commands.launch", "--use_deepspeed", "--zero_stage", str(stage), *options]
        launch += ["--num_processes", "2", "--main_process_port", port]
    script = Path(__file__).with_name("ranks_dqo.py")
    done = subprocess.run(
        [sys.executable, "-m", *launch, str(script), str(out), *options[1:]],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def expect_close(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    weights = found.state_dict()
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(weights[name], weight, atol=1e-5, rtol=0, msg=lambda text, n=name: f"{n}: {text}")
