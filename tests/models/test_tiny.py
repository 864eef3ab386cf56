"""The embedded model is frozen: these are its properties, not its goals."""

import hashlib
import re

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.data import arithmetic
from posttrain.data.prompts import render
from posttrain.evaluation.metrics import counts, majority_at_k, pass_at_k
from posttrain.models.load import TINY, load_model
from posttrain.rewards.math import grade
from posttrain.rollouts.engine import Request, Sampling
from posttrain.rollouts.transformers import TransformersEngine

SHA256 = "343bf01d6b4f67f16ab7f8310159231635980337ba7b13fc55cc9b50eed14f25"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def test_the_weights_are_frozen():
    assert hashlib.sha256((TINY / "model.safetensors").read_bytes()).hexdigest() == SHA256
    assert sum(file.stat().st_size for file in TINY.rglob("*")) <= 8 * 2**20


def test_it_loads_as_any_model_does_and_suits_vllm():
    config = AutoModelForCausalLM.from_pretrained(TINY).config
    assert config.model_type == "llama" and config.head_dim in (32, 64)


def test_the_tokenizer_has_one_token_per_printable_character(tokenizer):
    text = "".join(map(chr, range(32, 127)))
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == 95 == len(set(ids)) and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", ["é", "\n", "\t", "漢字", "😀", "\x00"])
def test_anything_else_is_unk_and_never_an_error(tokenizer, text):
    ids = tokenizer(f"1{text}2", add_special_tokens=False).input_ids
    one, two = tokenizer.convert_tokens_to_ids(["1", "2"])
    assert ids == [one, *[tokenizer.unk_token_id] * len(text), two]


def test_the_chat_template(tokenizer):
    ids = render(tokenizer, [{"role": "user", "content": "23+48-17=?"}])
    assert tokenizer.decode(ids) == "<|user|>23+48-17=?<|assistant|>"


@pytest.mark.slow
def test_what_the_embedded_model_is_like():
    policy = load_model("tiny", device="cpu")
    engine = TransformersEngine(policy.model, policy.tokenizer, fingerprint=policy.fingerprint)
    problems, k = arithmetic.problems(500, "test", seed=11), 8
    prompts = [tuple(render(policy.tokenizer, [{"role": "user", "content": problem.text}])) for problem in problems]
    requests = [
        Request(i * k + j, prompt, Sampling(max_tokens=192, seed=i * k + j))
        for i, prompt in enumerate(prompts)
        for j in range(k)
    ]
    done = sorted(engine.generate(requests), key=lambda completion: completion.request_id)
    texts = [policy.tokenizer.decode(completion.ids, skip_special_tokens=True) for completion in done]
    grades = grade(completions=texts, golds=[str(problem.answer) for problem in problems for _ in range(k)])
    correct = [[grade.correct for grade in grades[i : i + k]] for i in range(0, len(grades), k)]
    answers = [[grade.answer for grade in grades[i : i + k]] for i in range(0, len(grades), k)]

    n, right = counts(correct)
    assert 0.42 <= pass_at_k(n, right, 1).mean() <= 0.52
    assert pass_at_k(n, right, 8).mean() > 0.90
    assert majority_at_k(answers, correct, 8).mean() <= 0.57

    careful = [grade.correct for text, grade in zip(texts, grades, strict=True) if "=(" in text]
    assert 0.3 < len(careful) / len(texts) < 0.6
    assert sum(careful) / len(careful) >= 0.95

    lengths = {True: [], False: []}
    for text, grade_, completion in zip(texts, grades, done, strict=True):
        if grade_.correct and "=(" in text:
            lengths["," in text].append(len(completion.ids) / len(re.findall(";", text)))
    restating = len(lengths[True]) / (len(lengths[True]) + len(lengths[False]))
    assert 0.4 < restating < 0.6
    mean = {restated: sum(values) / len(values) for restated, values in lengths.items()}
    assert mean[True] >= 2.2 * mean[False]
