"""Q#, Q-Probe and DQO on one rollout service: the real vLLM, started without a guide, which is given what each run needs."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from posttrain.cli.main import main
from posttrain.data import arithmetic
from posttrain.data.prompts import render
from posttrain.decoding.guidance import Guidance
from posttrain.decoding.guide import load_guide
from posttrain.decoding.vllm import load_vllm_guide
from posttrain.errors import UserError
from posttrain.models.load import load_model
from posttrain.pipelines import dqo, qprobe, qsharp
from posttrain.pipelines.dqo import DQORunConfig, DQOTraining
from posttrain.pipelines.qprobe import QProbeConfig
from posttrain.pipelines.qsharp import QSharpConfig
from posttrain.pipelines.value_training import ValueTraining
from posttrain.rollouts.engine import Request, Sampling
from posttrain.rollouts.service import ServiceEngine
from posttrain.rollouts.table import read_table
from posttrain.rollouts.transformers import TransformersEngine
from tests.serving.services import Service

# At a threshold two engines differ where their rounding decides which side a token is on: a token of mass delta that one of them
# leaves out has there up to delta * exp(1 / beta) of the guided law's weight. So the mass is summed in float64.
GUIDANCE = Guidance(candidates=12, delta=1e-4)
VALUE = ValueTraining(head="q", layers=1, zero_init=False, epochs=1, learning_rate=1e-3, head_learning_rate=3e-2)
SMALL = {"max_tokens": 120, "slots": 32, "device": "cpu"}


def silent(_: str) -> None:
    pass


def greedy(engine, requests):
    return sorted(engine.generate(requests), key=lambda one: one.request_id)


def check_equal(service, policy, guide, requests):
    """Guided and unguided, as the transformers engine."""
    found = greedy(service, requests)
    engine = TransformersEngine(policy.model, policy.tokenizer, fingerprint="test", guide=guide)
    for one, other, request in zip(found, greedy(engine, requests), requests, strict=True):
        assert (one.ids, one.finish_reason) == (other.ids, other.finish_reason)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert one.kl == pytest.approx(other.kl, abs=1e-4 * (1 + len(one.ids)))
        assert one.log_ratio == pytest.approx(other.log_ratio, abs=1e-4 * (1 + len(one.ids)))
        assert (one.kl > 0) == (request.beta is not None)
    return [one.ids for one in found]


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_method_collects_from_one_service(tmp_path: Path, capsys) -> None:
    policy = load_model("tiny", "cpu", "float32")
    problems = arithmetic.problems(16, "test", seed=5, levels=(1, 2, 3))
    prompts = [tuple(render(policy.tokenizer, [{"role": "user", "content": one.text}])) for one in problems]
    requests = [
        Request(i, ids, Sampling(0.0, max_tokens=120), (0.1, None, 0.3, 0.1)[i % 4], candidates=(None, 5)[i % 8 == 4])
        for i, ids in enumerate(prompts)
    ]
    service = Service(tmp_path / "service.log", "--slots", "32")
    try:
        url = service.ready()
        on_service = {"engine": "service", "urls": (url,), **SMALL}

        probe = QProbeConfig(
            str(tmp_path / "probe"), train_prompts=8, train_samples=4, test_prompts=4, k=4, layers=(2,), **on_service
        )
        assert qprobe.run(probe, silent).train.manifest["settings"]["engine"] == "service"

        config = QSharpConfig(
            str(tmp_path / "qsharp"),
            train_prompts=16,
            train_samples=4,
            rollin_samples=2,
            test_prompts=4,
            beta=0.05,
            guidance=GUIDANCE,
            value=VALUE,
            **on_service,
        )
        qsharp.run(config, "collect", 1, silent)
        qsharp.run(config, "train", 1, silent)
        qsharp.run(config, "collect", 2, silent)
        rollin = read_table(tmp_path / "qsharp" / "round-2" / "rollin")
        value = tmp_path / "qsharp" / "round-1" / "value"
        guide, served = load_guide(value, policy, GUIDANCE), load_vllm_guide(value, policy, GUIDANCE)
        assert rollin.manifest["settings"]["guidance"] == guide.settings
        assert set(rollin.column("guide")) == {guide.name}
        assert min(rollin.column("kl")) > 0
        assert all(math.isfinite(ratio) for ratio in rollin.column("log_ratio"))
        rollouts = read_table(tmp_path / "qsharp" / "round-2" / "rollouts")
        assert rollouts.manifest["settings"]["engine"] == "service"

        with ServiceEngine([url], fingerprint=policy.fingerprint, slots=32) as engine:
            engine.use_guide(served, restart=False)
            before = check_equal(engine, policy, guide, requests)
            assert before != [one.ids for one in greedy(engine, [replace(one, beta=None) for one in requests])]

        command = ["rollout", "--model", "tiny", "--data", "arithmetic", "--samples", "1", "--limit", "2"]
        command += ["--engine", "service", "--url", url, "--guide", str(value)]
        assert main([*command, "--beta", "0.1", "--candidates", "3", "--out", str(tmp_path / "other")]) == 2
        assert "guide: the service has another; start it with --guide" in capsys.readouterr().err

        training = DQOTraining(batch_size=8, critic_warmup_steps=0)
        run = DQORunConfig(
            str(tmp_path / "dqo"),
            train_prompts=8,
            train_samples=4,
            test_prompts=4,
            test_samples=2,
            training=training,
            **on_service,
        )
        assert dqo.run(run, silent) is not None
        trained = load_model(str(tmp_path / "dqo" / "policy"), "cpu", "float32")
        for table, made in (("train", policy), ("test", policy), ("trained", trained)):
            assert read_table(tmp_path / "dqo" / table).column("policy")[0].endswith(made.fingerprint)
        with ServiceEngine([url], fingerprint=trained.fingerprint, slots=32) as engine:
            engine.use_guide(served, restart=False)  # what was pushed was the policy alone
            after = check_equal(engine, trained, load_guide(value, trained, GUIDANCE, any_reference=True), requests)
            assert after != before
        with pytest.raises(UserError, match="^model: .* serves .*start the service with the same model"):
            qprobe.run(replace(probe, out=str(tmp_path / "again")), silent)
    finally:
        service.kill()
