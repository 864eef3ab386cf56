"""DQO on two gloo ranks of this machine's processors gives what one rank gives."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from posttrain.errors import UserError
from posttrain.models.value import ValueModel
from posttrain.trainers.dqo import DQOTrainer
from tests.ports import free_port
from tests.trainers.ranks_dqo import trained

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("alone"), rows=8, accumulation=1)


ENGINES = [
    pytest.param(("DistributedDataParallel", 0), id="ddp"),
    pytest.param(("DeepSpeedEngine", 2), marks=pytest.mark.deepspeed, id="zero2"),
    pytest.param(("DeepSpeedEngine", 3), marks=pytest.mark.deepspeed, id="zero3"),
]


@pytest.fixture(scope="module")
def two_ranks(request, tmp_path_factory):
    """The folder of a training on two ranks, and its ZeRO stage, 0 for DDP."""
    return launched_on_two(request.param, tmp_path_factory, "ranks_dqo.py")


@pytest.mark.parametrize("two_ranks", ENGINES, indirect=True)
def test_two_ranks_give_the_models_of_one(two_ranks, alone) -> None:
    out, _ = two_ranks
    log = json.loads((out / "report.json").read_text())["log"]
    losses = [entry["loss"] for entry in alone.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in log] == pytest.approx(losses, abs=1e-5)
    assert len(set(losses)) == 5
    for folder in (out / "policy", out / "run" / "checkpoint-5"):
        expect_same(folder, alone)


@pytest.mark.parametrize("two_ranks", ENGINES[:2], indirect=True)
def test_a_checkpoint_goes_on_on_one_rank_and_on_two_again(two_ranks, alone, tmp_path: Path) -> None:
    """Two steps on two ranks, two on one, and one on two."""
    out, stage = two_ranks
    launched(tmp_path / "one", stage, ranks=1, checkpoint=out / "run" / "checkpoint-2")
    expect_same(tmp_path / "one" / "policy", alone)
    launched(tmp_path / "two", stage, checkpoint=tmp_path / "one" / "run" / "checkpoint-4")
    expect_same(tmp_path / "two" / "policy", alone)


def test_what_cannot_go_on_is_said(alone, tmp_path: Path, monkeypatch) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(Path(alone.args.output_dir) / "checkpoint-2", checkpoint)
    with pytest.raises(UserError, match="per_device_train_batch_size: a step of .* takes 8 completions, .* launch 4;"):
        trained(tmp_path, rows=4, accumulation=1, checkpoint=checkpoint)
    launch = json.loads((checkpoint / "launch.json").read_text())
    (checkpoint / "launch.json").write_text(json.dumps({**launch, "zero_stage": 3}))
    with pytest.raises(
        UserError, match="was written under ZeRO-3, and this training runs without DeepSpeed; launch it"
    ):
        trained(tmp_path, rows=8, accumulation=1, checkpoint=checkpoint)
    monkeypatch.setattr(DQOTrainer, "_launch", lambda self: {**launch, "zero_stage": 3, "ranks": 2})
    with pytest.raises(UserError, match="launch: .* was written by 1 processes under ZeRO-3, and goes on with as many"):
        trained(tmp_path, rows=8, accumulation=1, checkpoint=checkpoint)


@pytest.mark.deepspeed
def test_bfloat16_weights_under_zero_3_have_float32_heads(tmp_path: Path, alone) -> None:
    """The heads' weights are widened where they are gathered, and the reference is not rounded."""
    pytest.importorskip("deepspeed")
    launched(tmp_path, 3, "--bf16", precision="bf16")
    log = json.loads((tmp_path / "report.json").read_text())["log"]
    losses = [entry["loss"] for entry in alone.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in log] == pytest.approx(losses, rel=0.2)
    assert abs(log[0]["log_ratio_right"]) < 0.1


def launched_on_two(
    engine_and_stage: tuple[str, int], tmp_path_factory: pytest.TempPathFactory, script: str
) -> tuple[Path, int]:
    engine, stage = engine_and_stage
    if stage:
        pytest.importorskip("deepspeed")
    out = tmp_path_factory.mktemp(f"two-{stage}")
    launched(out, stage, script=script)
    report = json.loads((out / "report.json").read_text())
    assert (report["ranks"], report["engine"], report["zero_stage"]) == (2, engine, stage)
    return out, stage


def launched(
    out: Path,
    stage: int,
    *options: str,
    script: str = "ranks_dqo.py",
    ranks: int = 2,
    precision: str = "no",
    checkpoint: Path | None = None,
) -> None:
    """A script of this folder on so many ranks, under DDP where `stage` is 0."""
    port = str(free_port())
    launch = ["torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", port]
    if stage:
        launch = ["accelerate.commands.launch", "--use_deepspeed", "--zero_stage", str(stage)]
        launch += ["--mixed_precision", precision, "--num_processes", str(ranks), "--main_process_port", port]
    resume = ["--resume", str(checkpoint)] if checkpoint else []
    done = subprocess.run(
        [sys.executable, "-m", *launch, str(Path(__file__).with_name(script)), str(out), *options, *resume],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def expect_same(folder: Path, alone) -> None:
    expect_close(transformers.AutoModelForCausalLM.from_pretrained(folder), alone.model.policy)
    expect_close(ValueModel.from_pretrained(folder / "critic"), alone.model.critic)


def expect_close(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    weights = found.state_dict()
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(weights[name], weight, atol=1e-5, rtol=0, msg=lambda text, n=name: f"{n}: {text}")
