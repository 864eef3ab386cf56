"""Two replicas with the real vLLM, one killed with -9 in the middle of a collection of 500 and restarted later."""

import re
import threading
import time
from pathlib import Path

import httpx
import pytest

from posttrain.models.load import load_tokenizer
from posttrain.pipelines.rollout import RolloutConfig
from posttrain.rewards.math import grade
from posttrain.rollouts.collect import collect, prompts_for
from posttrain.rollouts.engine import Sampling
from posttrain.rollouts.service import ServiceEngine
from tests.serving.services import Service


def served(url: str) -> int:
    text = httpx.get(f"{url}/metrics", timeout=60).text
    return round(sum(float(count) for count in re.findall(r"^vllm:request_success_total\{.*\} (\S+)$", text, re.M)))


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_rows_are_there_once(tmp_path: Path) -> None:
    services = [Service(tmp_path / f"{name}.log", "--slots", "8") for name in ("left", "right")]
    back, at_death, failures = threading.Event(), [], []

    def disturb(right: Service, url: str) -> None:
        try:
            while served(url) < 20:
                time.sleep(0.05)
            at_death.append(served(url))
            right.kill()
            right.start()
            right.ready()
            while served(url) == 0:  # the pool, which pauses between its tries, takes it back once it has completed one
                time.sleep(0.05)
        except BaseException as error:
            failures.append(error)
        finally:
            back.set()

    def patient(completions, golds):
        """Collecting goes on from the second shard to the third once the replica is back."""
        patient.shards += 1
        if patient.shards == 2:
            assert back.wait(1200)
        return grade(completions=completions, golds=golds)

    patient.shards = 0
    try:
        urls = [service.ready() for service in services]
        policy = load_tokenizer("tiny")
        config = RolloutConfig("arithmetic", "train", 125)
        with ServiceEngine(urls, fingerprint=policy.fingerprint, slots=8, patience=600) as engine:
            thread = threading.Thread(target=disturb, args=(services[1], urls[1]))
            thread.start()
            table = collect(
                engine,
                policy.tokenizer,
                prompts_for(config.rows(), policy.tokenizer, config.template),
                samples=4,
                sampling=Sampling(max_tokens=192),
                out=tmp_path / "table",
                policy="tiny",
                shard_prompts=25,
                grader=patient,
                progress=False,
            )
            thread.join()
        assert not failures
        assert at_death[0] < 100, "it died after the first shard"
        assert served(urls[1]) > 50, "it never came back"
    finally:
        for service in services:
            service.kill()
    keys = list(zip(table.column("prompt_id"), table.column("sample"), strict=True))
    assert len(keys) == len(set(keys)) == 500
    assert all(
        len(ids) == len(logprobs) > 0
        for ids, logprobs in zip(table.column("completion_ids"), table.column("logprobs"), strict=True)
    )
    assert 0.35 < sum(table.column("correct")) / 500 < 0.65
