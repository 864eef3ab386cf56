"""`posttrain rollout-service`: what it refuses, and the real vLLM behind it against the engine on transformers, in float32."""

import json
import os
import signal
import subprocess
import sys

import httpx
import pytest
import torch

from posttrain.cli.main import main
from posttrain.data import arithmetic
from posttrain.data.prompts import render
from posttrain.models.load import load_model, model_fingerprint
from posttrain.rollouts.engine import Request, Sampling
from posttrain.rollouts.service import ServiceEngine
from posttrain.rollouts.table import read_table
from posttrain.rollouts.transformers import TransformersEngine


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "host: 0.0.0.0 can be reached by others; give --api-key"),
        (["--port", "99999"], "port: must be between"),
        (["--slots", "0"], "slots: must be at least 1, got 0"),
        (["--context", "513"], "context: tiny has 512 tokens, got 513"),
        (["--dtype", "float8"], "dtype: must be float32 or bfloat16"),
        (["--guidance", "{}"], "--guidance: it is the guide's; name one with --guide DIR"),
        (["--guide", "somewhere", "--guidance", "[1]"], "--guidance: must be a JSON object, got '[1]'"),
        (["--guide", "somewhere"], "guide: somewhere has no config.json"),
    ],
)
def test_a_mistake_is_one_line(options, message, capsys, monkeypatch):
    monkeypatch.delenv("POSTTRAIN_API_KEY", raising=False)
    assert main(["rollout-service", "--model", "tiny", *options]) == 2
    assert message in capsys.readouterr().err


def sampled(engine, requests):
    found = sorted(engine.generate(requests), key=lambda one: one.request_id)
    return [(one.ids, one.finish_reason, one.stop) for one in found], [one.logprobs for one in found]


def check_equal(service, model, tokenizer, requests):
    ids, logprobs = sampled(service, requests)
    expected = sampled(TransformersEngine(model, tokenizer, fingerprint="test"), requests)
    assert ids == expected[0]
    for found, own in zip(logprobs, expected[1], strict=True):
        assert found == pytest.approx(own, abs=1e-4)
    return ids


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_service_is_its_model_takes_new_weights_and_ends_on_sigterm(tmp_path, monkeypatch):
    """One server for all of it: starting one takes most of the time."""
    monkeypatch.setenv("POSTTRAIN_API_KEY", "secret")
    policy = load_model("tiny", device="cpu", dtype="float32")
    problems = arithmetic.problems(16, "test", seed=5, levels=(1, 2, 3))
    prompts = [tuple(render(policy.tokenizer, [{"role": "user", "content": one.text}])) for one in problems]
    laws = (
        Sampling(0.0, max_tokens=192),
        Sampling(0.0, max_tokens=5),
        Sampling(0.0, max_tokens=192, stop_ids=(28,)),
        Sampling(0.0, max_tokens=192, stop=("=",)),
    )
    requests = [Request(i, ids, laws[i % 4]) for i, ids in enumerate(prompts)]
    command = [sys.executable, "-m", "posttrain", "rollout-service", "--model", "tiny", "--port", "0", "--slots", "8"]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ) as process,
    ):
        try:
            line = process.stdout.readline()
            assert line.startswith("ready: http://127.0.0.1:"), (tmp_path / "log").read_text()[-3000:]
            url = line.removeprefix("ready: ").strip()
            assert httpx.get(f"{url}/v1/policy").status_code == 401
            bare = {"model": "tiny", "prompt": "1+1=", "max_tokens": 1}  # vLLM itself asks for no key there
            for path in ("/v1/completions", "/invocations", "/tokenize"):
                assert httpx.post(f"{url}{path}", json=bare).status_code == 401
            assert (
                httpx.post(f"{url}/invocations", json=bare, headers={"Authorization": "Bearer no"}).status_code == 401
            )
            assert httpx.get(f"{url}/health").status_code == 200
            with ServiceEngine([url], fingerprint=policy.fingerprint, key="secret", slots=8) as service:
                assert (service.context, service.settings["dtype"]) == (512, "float32")
                before = check_equal(service, policy.model, policy.tokenizer, requests)

                drawn = [Request(i, ids, Sampling(0.8, seed=i, max_tokens=20)) for i, ids in enumerate(prompts)]
                assert sampled(service, drawn)[0] == sampled(service, drawn)[0]

                common = ("rollout", "--model", "tiny", "--data", "arithmetic", "--samples", "2", "--limit", "4")
                for name, more in {"service": ("--url", url), "transformers": ("--dtype", "float32")}.items():
                    engine = ("--engine", name, *more, "--temperature", "0", "--out", str(tmp_path / name))
                    assert main([*common, *engine]) == 0
                tables = [read_table(tmp_path / name) for name in ("service", "transformers")]
                assert tables[0].column("completion_ids") == tables[1].column("completion_ids")
                assert (
                    json.loads((tmp_path / "service" / "manifest.json").read_text())["settings"]["engine"] == "service"
                )

                other = load_model("tiny", device="cpu", dtype="float32").model
                generator = torch.Generator().manual_seed(0)
                with torch.no_grad():
                    for parameter in other.parameters():
                        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
                other.save_pretrained(tmp_path / "other")
                service.sync_weights(tmp_path / "other")
                assert service.fingerprint == model_fingerprint(tmp_path / "other")
                assert check_equal(service, other, policy.tokenizer, requests) != before
                service.sync_weights(policy.model)
                assert check_equal(service, policy.model, policy.tokenizer, requests) == before
            process.send_signal(signal.SIGTERM)
            assert process.wait(300) == 0
            assert process.stdout.read() == ""
        finally:
            process.kill()
