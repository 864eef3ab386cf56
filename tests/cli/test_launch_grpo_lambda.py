"""GRPO-lambda under a launcher: the first process measures, both sample and train; what is killed goes on."""

import json
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from posttrain.cli.main import main
from tests.cli.test_launch import ROOT, launched, line

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
CONFIG = {  # three groups of four a step, of which the second straddles the two processes
    **{"model": "tiny", "data": "arithmetic", "device": "cpu", "max_tokens": 96},
    **{"train_prompts": 12, "validation_prompts": 0, "test_prompts": 4, "test_samples": 2},
    "training": {
        **{"steps": 3, "prompts_per_step": 3, "samples": 4, "batch_size": 6, "max_tokens": 96},
        **{"penalty_warmup_steps": 0, "gate_fraction": 1.0, "trl": {"save_steps": 1}},
    },
}
ZERO_2 = ("--use_deepspeed", "--zero_stage", "2")
ZERO_3 = ("--use_deepspeed", "--zero_stage", "3")


def finished(folder: Path, *options: str, **changes: object) -> subprocess.CompletedProcess[str]:
    done = launched(folder, {**CONFIG, **changes}, *options, command="grpo-lambda")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("policy: ") == 1  # the first process alone reports
    return done


def killed(folder: Path, *options: str) -> None:
    """All its processes at once, when the first checkpoint is written."""
    words, settings = line(folder, CONFIG, *options, command="grpo-lambda")
    started = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **settings)
    deadline = time.monotonic() + 900
    while not list(folder.glob("run/*-checkpoints-*/checkpoint-1/trainer_state.json")):
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    parent = psutil.Process(started.pid)
    for process in [parent, *parent.children(recursive=True)]:
        process.kill()
    started.wait()
    assert not list(folder.glob("run/*/made_by.json"))


def expect_trained(out: Path, processes: int) -> dict:
    """A whole policy that is not the one it began with, of three steps; what its `made_by.json` says."""
    made = json.loads((out / "made_by.json").read_text())
    assert made["processes"] == processes
    assert [entry["step"] for entry in made["log"] if "accuracy" in entry] == [1, 2, 3]
    trained = AutoModelForCausalLM.from_pretrained(out).state_dict()
    base = AutoModelForCausalLM.from_pretrained(ROOT / "posttrain" / "assets" / "tiny").state_dict()
    assert {name: weight.shape for name, weight in trained.items()} == {name: w.shape for name, w in base.items()}
    assert any(not weight.equal(base[name]) for name, weight in trained.items())
    return made


def test_under_ddp_it_is_killed_and_goes_on(tmp_path: Path) -> None:
    """In as many processes to the same policy, bit for bit; or in one."""
    finished(tmp_path / "whole")
    expect_trained(tmp_path / "whole" / "run" / "grpo_lambda", 2)
    killed(tmp_path / "two")
    shutil.copytree(tmp_path / "two", tmp_path / "one")

    finished(tmp_path / "two")
    expect_trained(tmp_path / "two" / "run" / "grpo_lambda", 2)
    whole, two = (load_file(tmp_path / name / "run/grpo_lambda/model.safetensors") for name in ("whole", "two"))
    assert all(weight.equal(two[key]) for key, weight in whole.items())

    recipe, out = tmp_path / "one" / "recipe.yaml", tmp_path / "one" / "run"
    assert main(["grpo-lambda", "--config", str(recipe), "--out", str(out)]) == 0
    expect_trained(out / "grpo_lambda", 1)


@pytest.mark.deepspeed
def test_under_zero_2_it_is_killed_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    killed(tmp_path / "a", *ZERO_2)
    finished(tmp_path / "a", *ZERO_2)
    expect_trained(tmp_path / "a" / "run" / "grpo_lambda", 2)


@pytest.mark.deepspeed
def test_under_zero_3_two_arms_follow_each_other(tmp_path: Path) -> None:
    """While they sample, every process has all weights, and right answers come of them."""
    pytest.importorskip("deepspeed")
    arms = ["grpo", "grpo_lambda"]
    finished(tmp_path / "a", *ZERO_3, arms=arms)
    for arm in arms:
        made = expect_trained(tmp_path / "a" / "run" / arm, 2)
        assert all(entry["accuracy"] > 0 for entry in made["log"] if "accuracy" in entry)


def test_what_its_processes_cannot_share_is_said_once(tmp_path: Path) -> None:
    training = {**CONFIG["training"], "batch_size": 4}
    done = launched(tmp_path / "a", {**CONFIG, "training": training}, command="grpo-lambda")
    assert done.returncode != 0
    assert done.stderr.count("posttrain: error: training.batch_size: in 2 processes 8 completions go forward") == 1
