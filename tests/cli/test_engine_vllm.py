"""`--engine vllm` of rollout and eval: what is refused at once, and what the real vLLM samples."""

import json
import os
import subprocess
import sys

import pytest

from posttrain.cli.main import main
from posttrain.models.load import load_model
from posttrain.models.value import new_value_model
from posttrain.rollouts.table import read_table

ROLLOUT = ("rollout", "--model", "tiny", "--data", "arithmetic", "--samples", "2", "--limit", "4", "--engine", "vllm")


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (("--device", "cpu"), "--device: not with --engine vllm; it takes the one it was built for"),
        (("--threads", "1"), "--threads: not with --engine vllm; set VLLM_CPU_OMP_THREADS_BIND or OMP_NUM_THREADS"),
        (("--dtype", "float8"), "dtype: must be float32 or bfloat16, got 'float8'"),
    ],
)
def test_what_vllm_does_not_do_is_refused(tmp_path, capsys, more, line):
    assert main([*ROLLOUT, "--out", str(tmp_path / "table"), *more]) == 2
    assert line in capsys.readouterr().err
    assert not (tmp_path / "table").exists()


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_guided_table_by_vllm_is_the_transformers_engines_where_nothing_is_drawn(tmp_path):
    value = new_value_model(load_model("tiny", device="cpu"), "q", layers=1, zero_init=False)
    value.head.out.weight.data.mul_(3)
    value.save_pretrained(tmp_path / "value")
    guide = ("--guide", str(tmp_path / "value"), "--beta", "0.05", "--candidates", "8")
    tables = {}
    for engine in ("transformers", "vllm"):
        settings = ("--temperature", "0", "--dtype", "float32", "--out", str(tmp_path / engine))
        command = [*ROLLOUT[:-1], engine, *settings, *guide]
        done = subprocess.run(
            [sys.executable, "-m", "posttrain", *command], capture_output=True, text=True, env=os.environ, timeout=600
        )
        assert done.returncode == 0, done.stderr[-3000:]
        tables[engine] = read_table(tmp_path / engine)
    assert tables["vllm"].column("completion_ids") == tables["transformers"].column("completion_ids")
    for column in ("correct", "guide", "beta"):
        assert tables["vllm"].column(column) == tables["transformers"].column(column)
    for column in ("kl", "log_ratio"):
        assert tables["vllm"].column(column) == pytest.approx(tables["transformers"].column(column), abs=1e-3)
    assert min(tables["vllm"].column("kl")) > 0.01
    settings = json.loads((tmp_path / "vllm" / "manifest.json").read_text())["settings"]
    assert settings["engine"] == "vllm"
    assert settings["dtype"] == "float32"
    assert settings["vllm"]
    assert settings["guidance"]["candidates"] == 8


@pytest.mark.slow
def test_an_evaluation_refuses_the_same(tmp_path, capsys):
    command = ("eval", "arithmetic", "--model", "tiny", "--out", str(tmp_path / "run"), "--engine", "vllm")
    assert main([*command, "--device", "cpu"]) == 2
    assert "--device: not with --engine vllm" in capsys.readouterr().err
    assert main([*command, "--guide", "somewhere", "--beta", "0.1,1"]) == 2
    assert "--beta: one with --engine vllm" in capsys.readouterr().err
    assert main([*command, "--guide", "somewhere"]) == 2
    assert "guide: somewhere has no config.json" in capsys.readouterr().err


@pytest.mark.vllm
@pytest.mark.slow
def test_an_evaluation_by_vllm(tmp_path):
    command = ("eval", "arithmetic", "--model", "tiny", "--limit", "6", "--temperature", "0", "--n", "1")
    found = {}
    for engine in ("transformers", "vllm"):
        more = ("--dtype", "float32", "--engine", engine, "--out", str(tmp_path / engine))
        done = subprocess.run(
            [sys.executable, "-m", "posttrain", *command, *more], capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found[engine] = read_table(tmp_path / engine / "arithmetic" / "rollouts").column("completion_ids")
    assert found["vllm"] == found["transformers"]
