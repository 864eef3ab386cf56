"""The engine on the real vLLM (CPU) against the engine on transformers, in float32."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from posttrain.data import arithmetic
from posttrain.data.prompts import render
from posttrain.models.load import TINY, load_model, model_fingerprint
from posttrain.rollouts.engine import Completion, Request, Sampling
from posttrain.rollouts.transformers import TransformersEngine

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

LAWS = {
    "greedy": {"temperature": 0.0, "max_tokens": 192},
    "stop ids": {"temperature": 0.0, "max_tokens": 192, "stop_ids": [28]},
    "short": {"temperature": 0.0, "max_tokens": 5},
    "stop text": {"temperature": 0.0, "max_tokens": 192, "stop": ["="]},
    "sampled": {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "max_tokens": 192},
}


@pytest.fixture(scope="module")
def policy():
    return load_model("tiny", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def prompts(policy):
    problems = arithmetic.problems(16, "test", seed=5, levels=(1, 2, 3))
    return [render(policy.tokenizer, [{"role": "user", "content": problem.text}]) for problem in problems]


@pytest.fixture(scope="module")
def other(policy, tmp_path_factory):
    """A folder of other weights, whose head is tied to its embedding as the policy's is."""
    folder = tmp_path_factory.mktemp("other")
    model = load_model("tiny", device="cpu", dtype="float32").model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    assert model.config.tie_word_embeddings
    model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(prompts, other):
    """What vLLM made of everything below, in a process of its own: vLLM leaves threads and a process group behind."""
    work = {"model": str(TINY), "other": str(other), "prompts": prompts, "laws": LAWS}
    script = Path(__file__).with_name("run_vllm.py")
    done = subprocess.run(
        [sys.executable, str(script)], input=json.dumps(work), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def completions(found):
    return [Completion(**{**one, "ids": tuple(one["ids"]), "logprobs": tuple(one["logprobs"])}) for one in found]


def ours(model, tokenizer, prompts, law):
    engine = TransformersEngine(model, tokenizer, fingerprint="test")
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in law.items()}
    requests = [Request(i, tuple(ids), Sampling(**fields)) for i, ids in enumerate(prompts)]
    return sorted(engine.generate(requests), key=lambda done: done.request_id)


@pytest.mark.parametrize("name", ["greedy", "stop ids", "short", "stop text"])
def test_greedy_completions_are_those_of_the_transformers_engine(policy, prompts, theirs, name):
    expected = ours(policy.model, policy.tokenizer, prompts, LAWS[name])
    found = completions(theirs[name])
    for one, other in zip(found, expected, strict=True):
        assert (one.ids, one.finish_reason, one.stop) == (other.ids, other.finish_reason, other.stop)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize("name", ["stop ids", "stop text"])
def test_the_stops_of_the_cases_above_are_met(theirs, name):
    assert any(one.finish_reason == "stop" for one in completions(theirs[name]))


def test_log_probabilities_are_of_the_law_that_was_sampled(policy, prompts, theirs):
    """softmax(l / T), cut to top_k and renormalised, cut to top_p and renormalised."""
    law = LAWS["sampled"]
    for ids, one in zip(prompts, completions(theirs["sampled"]), strict=True):
        with torch.no_grad():
            logits = policy.model(torch.tensor([[*ids, *one.ids]])).logits[0, len(ids) - 1 : -1] / law["temperature"]
        top, tokens = logits.topk(law["top_k"])
        mass = top.softmax(-1)
        kept = mass.masked_fill(mass.cumsum(-1) - mass >= law["top_p"], 0)
        expected = logits.new_zeros(logits.shape).scatter(1, tokens, kept / kept.sum(-1, keepdim=True)).log()
        expected = expected.gather(1, torch.tensor(one.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(one.logprobs), expected, atol=1e-4, rtol=0)


def test_a_seed_is_a_completion(theirs):
    assert theirs["sampled"] == theirs["sampled again"]
    assert theirs["sampled"] != theirs["another seed"]


def test_an_abandoned_call_leaves_nothing_behind(theirs):
    assert theirs["unfinished"] is False
    assert theirs["after it"] == theirs["greedy"]


def test_new_weights_are_those_of_a_fresh_engine(policy, prompts, theirs, other):
    model = load_model(str(other), device="cpu", dtype="float32").model
    expected = ours(model, policy.tokenizer, prompts, LAWS["greedy"])
    for found in (theirs["other folder"], theirs["other model"]):
        for one, own in zip(completions(found), expected, strict=True):
            assert one.ids == own.ids
            assert one.logprobs == pytest.approx(own.logprobs, abs=1e-4)
    assert theirs["other fingerprint"] == model_fingerprint(other)
    assert theirs["back"] == theirs["greedy"]


def test_what_is_refused_is_refused_before_anything_is_generated(theirs):
    assert theirs["refused"] == [
        "max_tokens: request 0 has 40 tokens and asks for 500 more, the model's context is 512; at most 472 fit",
        "beta: this engine has no guide; give it a value model, or leave beta out",
        "prompt: request 0 has token ids outside the model's vocabulary of 101",
        "temperature: vLLM samples at 0 (greedy) or from 0.01 to 2.0, got 0.001; the transformers engine takes any",
        "temperature: vLLM samples at 0 (greedy) or from 0.01 to 2.0, got 2.5; the transformers engine takes any",
        "top_logprobs: this engine tells at most 20, got 50",
        "stop_ids: the model's vocabulary has 101 tokens, got (1000,)",
        "slots: must be at least 1, got 0",
    ]


def test_two_iterators_run_side_by_side(theirs):
    for side in theirs["side by side"]:
        assert [one["ids"] for one in side] == [one["ids"] for one in theirs["greedy"]]


def test_an_option_that_says_what_is_vllms_own_default_is_said(theirs):
    assert theirs["options"] == {"dtype": "auto", "enforce_eager": False, "gpu_memory_utilization": 0.92}
