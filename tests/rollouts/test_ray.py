"""The engine on a real Ray cluster, with the real vLLM (CPU), against the engine on transformers, in float32."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from posttrain.cli.main import main
from posttrain.data import arithmetic
from posttrain.data.prompts import render
from posttrain.decoding.guidance import Guidance
from posttrain.decoding.guide import load_guide
from posttrain.errors import UserError
from posttrain.models.load import TINY, load_model, model_fingerprint
from posttrain.models.value import new_value_model
from posttrain.rollouts.ray import alike
from posttrain.rollouts.table import read_table
from posttrain.rollouts.transformers import TransformersEngine
from tests.decoding.test_vllm import opinionated
from tests.rollouts.run_vllm import plain, requests

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1500)]
ROOT = Path(__file__).parents[2]
LAW = {"temperature": 0.0, "max_tokens": 96}


def test_two_machines_give_what_the_transformers_engine_gives(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    policy = load_model("tiny", device="cpu", dtype="float32")
    opinionated(new_value_model(policy, "q", layers=1, zero_init=False), tmp_path / "guide")
    problems = arithmetic.problems(15, "test", seed=5, levels=(1, 2, 3))
    prompts = [list(render(policy.tokenizer, [{"role": "user", "content": each.text}])) for each in problems]
    done = subprocess.run(
        [sys.executable, "-m", "tests.rollouts.run_ray"],
        input=json.dumps({"model": str(TINY), "guide": str(tmp_path / "guide"), "prompts": prompts, "law": LAW}),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["replicas"] == 2 and found["fingerprint"] == model_fingerprint(TINY)
    assert found["settings"]["engine"] == "ray" and found["settings"]["dtype"] == "float32"
    assert found["handler kept"]
    guide = load_guide(tmp_path / "guide", policy, Guidance(delta=0))
    engine = TransformersEngine(policy.model, policy.tokenizer, fingerprint=policy.fingerprint, slots=8, guide=guide)
    asked = requests(prompts, LAW)
    for name, each in (("completions", asked), ("guided", [replace(one, beta=0.5) for one in asked])):
        expected = plain(engine.generate(each))
        assert [one["request_id"] for one in found[name]] == list(range(15))
        for theirs, ours in zip(found[name], expected, strict=True):
            assert theirs["ids"] == list(ours["ids"])
            assert theirs["logprobs"] == pytest.approx(list(ours["logprobs"]), abs=1e-4)
    assert found["completions"] != found["guided"]
    too_long, unknown, died, full, taken = found["refused"]
    assert too_long.startswith("max_tokens: ") and unknown.startswith("prompt: request 0 has token ids outside")
    assert re.fullmatch(
        r"engine: a process of Ray's has died \(Actor(Died|Unavailable)Error\); what is finished is kept, --resume goes on",
        died,
    )
    assert re.match("engine: Ray has room for [01] of 2 replicas now; other work holds the rest", full)
    assert taken.startswith("engine: the Ray cluster has no free GPU") and found["free GPUs"] == 1


def test_a_table_is_collected(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    command = [
        "rollout",
        "--model",
        "tiny",
        "--data",
        "arithmetic",
        "--engine",
        "ray",
        "--dtype",
        "float32",
        "--limit",
        "4",
        "--samples",
        "2",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "posttrain", *command, "--out", str(tmp_path / "table")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    table = read_table(tmp_path / "table")
    assert len(table) == 8 and table.manifest["settings"]["engine"] == "ray"


@pytest.mark.parametrize("address", ["127.0.0.1:1", "head", "http://127.0.0.1:8265"])
def test_an_address_where_there_is_no_cluster_is_one_line(address: str, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    command = ["rollout", "--model", "tiny", "--data", "arithmetic", "--engine", "ray", "--limit", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "posttrain", *command, "--samples", "1", "--out", str(tmp_path / "table")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": address},
        timeout=300,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert f"posttrain: error: engine: no Ray cluster at {address}: " in done.stderr


def test_machines_must_have_the_same_model_and_settings() -> None:
    one = ("a", 512, {"dtype": "float32"})
    assert alike([one, ("a", 512, {"dtype": "float32"})]) == one
    with pytest.raises(UserError, match="^model: machines of the cluster have different ones: a and b"):
        alike([one, one, ("b", 512, {"dtype": "float32"})])
    with pytest.raises(UserError, match="^engine: machines of the cluster sample differently"):
        alike([one, ("a", 512, {"dtype": "bfloat16"})])


def test_without_ray_it_is_said(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    command = ["rollout", "--model", "tiny", "--data", "arithmetic", "--engine", "ray", "--limit", "1"]
    assert main([*command, "--samples", "1", "--out", str(tmp_path / "a")]) == 2
    assert "engine: ray cannot be imported" in capsys.readouterr().err
