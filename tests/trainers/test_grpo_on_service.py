"""`posttrain grpo-lambda` on a rollout service: real vLLM, two ranks under ZeRO-2, weights pushed at every step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from posttrain.data import arithmetic
from posttrain.data.prompts import render
from posttrain.models.load import load_model
from posttrain.rollouts.engine import Request, Sampling
from posttrain.rollouts.service import ServiceEngine
from posttrain.rollouts.table import read_table
from posttrain.rollouts.transformers import TransformersEngine
from tests.ports import free_port
from tests.serving.services import Service

ROOT = Path(__file__).parents[2]
CONFIG = {
    **{"model": "tiny", "data": "arithmetic", "device": "cpu", "max_tokens": 160, "slots": 32},
    **{"train_prompts": 400, "validation_prompts": 0, "test_prompts": 80, "test_samples": 2},
}
TRAINING = {"prompts_per_step": 8, "samples": 8, "batch_size": 32, "learning_rate": 5e-4, "penalty_warmup_steps": 2}


def train_on(url: str, folder: Path, steps: int, **more: int) -> Path:
    """The run's folder."""
    training = {**TRAINING, "max_tokens": 160, "steps": steps, **more}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**CONFIG, "training": training}))
    launch = ["accelerate.commands.launch", "--use_deepspeed", "--zero_stage", "2", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = ["posttrain", "grpo-lambda", "--config", str(folder / "recipe.yaml"), "--out", str(folder / "run")]
    command += ["--engine", "service", "--url", url]
    done = subprocess.run(
        [sys.executable, "-m", *launch, "--main_process_port", str(free_port()), "-m", *command],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "run"


def greedy(engine, tokenizer, count: int = 24) -> list[tuple[int, ...]]:
    problems = arithmetic.problems(count, "test", seed=5, levels=(1, 2, 3))
    prompts = [tuple(render(tokenizer, [{"role": "user", "content": one.text}])) for one in problems]
    requests = [Request(i, ids, Sampling(0.0, max_tokens=192)) for i, ids in enumerate(prompts)]
    return [one.ids for one in sorted(engine.generate(requests), key=lambda one: one.request_id)]


def check_run(url: str, run: Path, steps: int) -> tuple[float, float]:
    """Accuracy before and after. What the service has at the end is the policy that was saved, and not the one before."""
    trained, base = (load_model(name, "cpu", "float32") for name in (str(run / "grpo_lambda"), "tiny"))
    with ServiceEngine([url], fingerprint=trained.fingerprint) as service:
        served = greedy(service, trained.tokenizer)
    ours, before = (
        greedy(TransformersEngine(one.model, one.tokenizer, fingerprint="test"), one.tokenizer)
        for one in (trained, base)
    )
    assert served == ours != before
    made = json.loads((run / "grpo_lambda" / "made_by.json").read_text())
    log = [entry for entry in made["log"] if "accuracy" in entry]
    assert made["processes"] == 2
    assert [entry["step"] for entry in log] == list(range(1, steps + 1))
    for table in ("test", "grpo_lambda-test"):
        assert read_table(run / table).manifest["settings"]["engine"] == "service"
    arms = json.loads((run / "summary.json").read_text())["arms"]
    return arms["base"]["accuracy"], arms["grpo_lambda"]["accuracy"]


@pytest.mark.vllm
@pytest.mark.deepspeed
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_ranks_train_on_a_service(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    service = Service(tmp_path / "service.log", "--slots", "64")
    try:
        url = service.ready()
        run = train_on(url, tmp_path, steps=30)
        before, after = check_run(url, run, steps=30)
        assert after > before + 0.1
    finally:
        service.kill()
