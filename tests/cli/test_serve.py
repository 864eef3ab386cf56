import argparse
import json
import os
import signal
import subprocess
import sys
import urllib.request
from contextlib import ExitStack

import httpx
import pytest

from posttrain.cli import serve
from posttrain.cli.main import main
from posttrain.models.load import load_model
from posttrain.models.probe import Probe, ProbeCard
from posttrain.models.value import new_value_model
from posttrain.serving.catalogue import Limits
from tests.serving.conftest import KEY, started


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "host: 0.0.0.0 can be reached by others; give --api-key"),
        (["--api-key", ""], "api-key: is empty"),
        (["--port", "99999"], "port: must be between"),
        (["--slots", "0"], "slots: must be at least 1, got 0"),
        (["--context", "0"], "context: must be at least 1, got 0"),
        (["--context", "513", "--port", "0"], "context: tiny has 512 tokens, got 513"),
        (["--drain", "-1"], "drain: must not be negative"),
        (["--max-requests", "0"], "max-requests: must be at least 1, got 0"),
        (["--candidates", "0"], "candidates: must be at least 1"),
        (["--lazy"], "--lazy: it is the guide's; name one with --guide DIR"),
        (["--guide", "a=x", "--guide", "a=y"], "guide: a names two folders"),
        (["--port", "0", "--guide", "nowhere"], "guide: nowhere has no config.json"),
        (["--port", "0", "--probe", "nowhere"], "probe: nowhere has no config.json"),
        (["--", "--tensor-parallel-size", "2"], "--tensor-parallel-size: is vLLM's; add --engine vllm"),
        (["--engine", "vllm", "--device", "cpu"], "--device: not with --engine vllm"),
        (["--engine", "vllm", "--guide", "a=x", "--guide", "b=y"], "guide: one with --engine vllm, where it and the"),
        (["--engine", "vllm", "--port", "0", "--guide", "nowhere"], "guide: nowhere has no config.json"),
        (["--engine", "vllm", "--port", "0", "--probe", "nowhere"], "probe: nowhere has no config.json"),
    ],
)
def test_a_mistake_is_one_line(options, message, capsys, monkeypatch):
    monkeypatch.delenv("POSTTRAIN_API_KEY", raising=False)
    assert main(["serve", "--model", "tiny", *options]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


def test_a_context_is_all_that_a_request_may_take():
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    args = parser.parse_args(["--model", "tiny", "--device", "cpu", "--context", "64"])
    assert serve._transformers(args, {}, {}, Limits(1, 1, 1), ExitStack()).engine.context == 64


def test_a_v_head_is_not_for_vllm(tmp_path, capsys):
    new_value_model(load_model("tiny", "cpu"), "v").save_pretrained(tmp_path / "v")
    assert main(["serve", "--model", "tiny", "--engine", "vllm", "--port", "0", "--guide", str(tmp_path / "v")]) == 2
    assert "train with value.head q or shared, or use --engine transformers" in capsys.readouterr().err


def test_a_value_model_is_no_probe_and_a_probe_no_value_model(tmp_path, capsys):
    policy = load_model("tiny", "cpu")
    new_value_model(policy, "v", layers=1).save_pretrained(tmp_path / "v")
    Probe(ProbeCard(policy.model.config.hidden_size)).save_pretrained(tmp_path / "probe")
    for option, folder, message in (
        ("--probe", "v", "holds a value model, not a probe; a value model is given as a guide"),
        ("--guide", "probe", "holds a probe, not a value model; give it as a probe"),
    ):
        assert main(["serve", "--model", "tiny", "--port", "0", option, str(tmp_path / folder)]) == 2
        shown = capsys.readouterr().err
        assert shown == f"posttrain: error: {option[2:]}: {tmp_path / folder} {message}\n"


def test_a_lazy_guide_is_called_one(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("POSTTRAIN_API_KEY", raising=False)
    monkeypatch.setattr("posttrain.serving.server.serve", lambda *_: None)
    new_value_model(load_model("tiny", "cpu"), "v", layers=1).save_pretrained(tmp_path / "v")
    options = ["serve", "--model", "tiny", "--port", "0", "--guide", str(tmp_path / "v")]
    for more, guides in (([], "v"), (["--lazy"], "v (lazy)")):
        assert main([*options, *more]) == 0
        assert capsys.readouterr().out == f"model tiny, guides: {guides}, probes: none\n"


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_server_on_vllm_finishes_what_has_begun_and_ends_well_on_sigterm(tmp_path, monkeypatch):
    """With vLLM in processes of its own, as users have it."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    new_value_model(load_model("tiny", "cpu"), "q", layers=1, zero_init=False).save_pretrained(tmp_path / "q")
    body = {"prompt": "1", "temperature": 2.0, "seed": 1, "n": 2, "max_tokens": 300, "stream": True}
    body["guidance"] = {"beta": 0.1}
    headers = {"Authorization": f"Bearer {KEY}"}
    with (
        started("--engine", "vllm", "--guide", str(tmp_path / "q"), "--", "--max-model-len", "320") as running,
        httpx.Client(headers=headers, timeout=300) as client,
    ):
        assert client.get(f"{running.url}/v1/models").json()["data"][0]["context"] == 320
        with client.stream("POST", f"{running.url}/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            running.process.send_signal(signal.SIGTERM)
            said = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        ended = [choice for one in said for choice in one["choices"] if choice["finish_reason"]]
        assert sorted(choice["index"] for choice in ended) == [0, 1]
        assert all(choice["guidance"]["kl"] > 0 for choice in ended)
        assert running.process.wait(300) == 0


@pytest.mark.slow
def test_a_server_says_when_it_is_ready_and_ends_well_on_sigterm():
    command = [sys.executable, "-m", "posttrain", "serve", "--model", "tiny", "--port", "0", "--threads", "1"]
    environment = {**os.environ, "POSTTRAIN_API_KEY": "secret"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout.readline() == "model tiny, guides: none, probes: none\n"
            url = process.stdout.readline().removeprefix("ready: ").strip()
            body = json.dumps({"prompt": "1+1=", "max_tokens": 5}).encode()
            headers = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
            with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", body, headers)) as answer:
                assert len(json.load(answer)["choices"]) == 1
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0 and process.stderr.read() == ""
        finally:
            process.kill()
