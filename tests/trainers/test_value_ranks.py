"""A value model on two gloo ranks of this machine's processors is the one of one rank."""

import json
from pathlib import Path

import pytest
import torch

from posttrain.models.load import load_model
from posttrain.models.value import load_value_model
from posttrain.trainers.value import ValueTrainer
from tests.trainers.ranks_value import trained
from tests.trainers.test_dqo_ranks import ENGINES, launched, launched_on_two

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SCRIPT = "ranks_value.py"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("alone"), rows=8, accumulation=1)


@pytest.fixture(scope="module")
def two_ranks(request, tmp_path_factory):
    """The folder of a training on two ranks, and its ZeRO stage, 0 for DDP."""
    return launched_on_two(request.param, tmp_path_factory, SCRIPT)


@pytest.mark.parametrize("two_ranks", ENGINES, indirect=True)
def test_two_ranks_give_the_value_model_of_one(two_ranks, alone) -> None:
    out, _ = two_ranks
    losses = [entry["loss"] for entry in alone.state.log_history if "loss" in entry]
    log = json.loads((out / "report.json").read_text())["log"]
    assert [entry["loss"] for entry in log] == pytest.approx(losses, abs=1e-5)
    assert len(set(losses)) == 3
    expect_same(out / "guide", alone)


@pytest.mark.parametrize("two_ranks", ENGINES, indirect=True)
def test_a_checkpoint_goes_on(two_ranks, alone, tmp_path: Path) -> None:
    """A step on two ranks, and two more; without DeepSpeed, whose checkpoints are of as many ranks, one of these on one."""
    (out, stage), step = two_ranks, 1
    for ranks in (2,) if stage else (1, 2):
        checkpoint, out, step = out / "run" / f"checkpoint-{step}", tmp_path / str(ranks), step + 1
        launched(out, stage, script=SCRIPT, ranks=ranks, checkpoint=checkpoint)
        assert json.loads((out / "report.json").read_text())["ranks"] == ranks
        expect_same(out / "guide", alone)


def expect_same(folder: Path, alone: ValueTrainer) -> None:
    saved = load_value_model(folder, load_model("tiny", device="cpu")).state_dict()
    for name, weight in alone.model.state_dict().items():
        torch.testing.assert_close(saved[name], weight, atol=1e-5, rtol=0, msg=lambda text, n=name: f"{n}: {text}")
