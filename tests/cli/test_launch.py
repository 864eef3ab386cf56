"""`accelerate launch` or `torchrun`, with `-m posttrain ...`: two processes train, the first does everything else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from tests.ports import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
DQO = {
    **{"model": "tiny", "data": "arithmetic", "device": "cpu", "max_tokens": 96},
    **{"train_prompts": 8, "train_samples": 4, "test_prompts": 6, "test_samples": 2},
    "training": {"batch_size": 4, "epochs": 1, "critic_warmup_steps": 0},
}


def line(folder: Path, config: dict, *options: str, command: str) -> tuple[list[str], dict]:
    """The command in two processes, and what to start it with. options: of `accelerate launch`; without any it is `torchrun`."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(config))
    launch = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    if options:
        launch = ["accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
        launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())]
    own = ["-m", "posttrain", command, "--config", str(folder / "recipe.yaml"), "--out", str(folder / "run")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return [sys.executable, "-m", *launch, *options, *own], {"env": env, "text": True}


def launched(folder: Path, config: dict, *options: str, command: str = "dqo") -> subprocess.CompletedProcess[str]:
    words, settings = line(folder, config, *options, command=command)
    return subprocess.run(words, capture_output=True, timeout=900, **settings)


@pytest.mark.deepspeed
def test_dqo_under_zero_3(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    done = launched(tmp_path / "a", DQO, "--use_deepspeed", "--zero_stage", "3")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("policy: ") == 1  # the first process alone reports
    out = tmp_path / "a" / "run"
    assert json.loads((out / "policy" / "made_by.json").read_text())["processes"] == 2
    base = AutoModelForCausalLM.from_pretrained(ROOT / "posttrain" / "assets" / "tiny").state_dict()
    trained = AutoModelForCausalLM.from_pretrained(out / "policy").state_dict()
    assert {name: weight.shape for name, weight in trained.items()} == {name: w.shape for name, w in base.items()}
    assert any(not weight.equal(base[name]) for name, weight in trained.items())

    done = launched(tmp_path / "b", {**DQO, "baselines": ["dpo"]}, "--use_deepspeed", "--zero_stage", "3")
    assert done.returncode != 0
    assert done.stderr.count("posttrain: error: baselines: are trained in one process or under DDP") == 1


def test_dqo_under_ddp_and_one_readable_error(tmp_path: Path) -> None:
    done = launched(tmp_path / "a", {**DQO, "baselines": ["rejection", "kto"]})
    assert done.returncode == 0, done.stderr[-3000:]
    for folder in ("policy", "rejection/policy", "kto/policy"):
        assert json.loads((tmp_path / "a" / "run" / folder / "made_by.json").read_text())["processes"] == 2

    done = launched(tmp_path / "b", {**DQO, "training": {"beta": 0}})
    assert done.returncode != 0
    assert done.stderr.count("posttrain: error: training.beta: must be positive") == 1
