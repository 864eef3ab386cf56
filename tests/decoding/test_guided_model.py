"""A guided model's `generate` against the engine's ids and transformers' own `generate`."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

import posttrain
from posttrain.decoding.guided_model import GuidedModel
from posttrain.errors import UserError
from posttrain.models.load import load_model
from posttrain.models.value import new_value_model
from posttrain.pipelines.export import export
from posttrain.rollouts.collect import completion_seed
from posttrain.rollouts.engine import Request, Sampling
from posttrain.rollouts.transformers import TransformersEngine

QUESTIONS = ("23+48-17=?", "7*8+5=?", "1+1=?")


@pytest.fixture(scope="module")
def guided(tmp_path_factory) -> GuidedModel:
    root = tmp_path_factory.mktemp("guided")
    policy = load_model("tiny", "cpu", "float32")
    new_value_model(policy, "v", layers=1, zero_init=False).save_pretrained(root / "value")
    export(["tiny", str(root / "value")], root / "out")
    return posttrain.load_guided(root / "out", "cpu", "float32")


@pytest.fixture(scope="module")
def batch(guided):
    """Left-padded prompts of different lengths."""
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    guided.tokenizer.padding_side = "left"
    return guided.tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )


def prompts(batch):
    return [
        tuple(row[kept.bool()].tolist()) for row, kept in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def test_guided_ids_are_the_engines(guided, batch):
    width = batch["input_ids"].shape[1]
    assert not batch["attention_mask"].all()
    found = guided.generate(
        batch["input_ids"], batch["attention_mask"], max_new_tokens=40, do_sample=True, temperature=0.8, top_p=0.9,
        num_return_sequences=2, beta=0.002, seed=7,
    )  # fmt: skip
    engine = TransformersEngine(guided.model, guided.tokenizer, fingerprint="", guide=guided.guide)
    requests = [
        Request(2 * row + k, prompt, Sampling(0.8, 0.9, 0, 40, completion_seed(7, str(row), k)), 0.002)
        for row, prompt in enumerate(prompts(batch))
        for k in range(2)
    ]
    done = {completion.request_id: completion.ids for completion in engine.generate(requests)}
    free = [replace(request, beta=None) for request in requests]
    assert done != {completion.request_id: completion.ids for completion in engine.generate(free)}
    assert found.shape == (6, width + max(map(len, done.values())))
    for row, ids in enumerate(found):
        assert torch.equal(ids[:width], batch["input_ids"][row // 2])
        assert tuple(ids[width : width + len(done[row])].tolist()) == done[row]
        assert set(ids[width + len(done[row]) :].tolist()) <= {guided.tokenizer.pad_token_id}


def test_unguided_greedy_is_transformers_own_generate(guided, batch):
    expected = guided.model.generate(**batch, max_new_tokens=60, do_sample=False)
    found = guided.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=60, beta=math.inf)
    assert torch.equal(found, expected)
    # Alone and without a mask, too.
    one = torch.tensor([prompts(batch)[2]])
    assert torch.equal(
        guided.generate(one, max_new_tokens=60, beta=math.inf),
        guided.model.generate(one, max_new_tokens=60, do_sample=False),
    )


@pytest.mark.slow
def test_its_beta_and_where_the_noise_comes_from(guided, batch, monkeypatch):
    one, asked = batch["input_ids"][:1], []
    real = guided.engine.generate
    monkeypatch.setattr(guided.engine, "generate", lambda requests: asked.extend(requests) or real(requests))

    def sample(**more):
        return guided.generate(one, max_new_tokens=24, do_sample=True, temperature=3.0, **more).tolist()

    for given, expected in ((None, 0.1), (0.3, 0.3), (math.inf, None)):
        sample(seed=1, beta=given)
        assert asked[-1].beta == expected and asked[-1].sampling.temperature == 3.0
    assert sample(seed=1) == sample(seed=1) != sample(seed=2)
    assert sample(generator=torch.Generator().manual_seed(3)) == sample(generator=torch.Generator().manual_seed(3))
    torch.manual_seed(5)
    first, second = sample(), sample()
    torch.manual_seed(5)
    assert sample() == first != second


def test_what_does_not_fit_is_one_line(guided, batch, tmp_path):
    ids = batch["input_ids"]
    for arguments, message in (
        ({"max_new_tokens": 4000}, "max_tokens"),
        ({"beta": 0.0}, "beta: must be at least"),
        ({"num_return_sequences": 0}, "num_return_sequences: must be at least 1"),
        ({"attention_mask": batch["attention_mask"][:1]}, "attention_mask: must be"),
        ({"do_sample": True, "top_p": 0.0}, "top_p: must be above 0"),
    ):
        with pytest.raises(UserError, match=message):
            guided.generate(ids, **arguments)
    with pytest.raises(UserError, match="guide: .* has no value/; posttrain export RUN"):
        posttrain.load_guided(tmp_path)


@pytest.mark.parametrize(
    ("beta", "message"),
    [
        (0, "beta: must be at least 1e-09"),
        (-0.1, "beta: must be at least 1e-09"),
        (math.nan, "beta: must be at least 1e-09"),
        ("much", "beta: must be a number, got 'much'"),
        ([0.1], r"beta: must be a number, got \[0.1\]"),
        (True, "beta: must be a number, got True"),
    ],
)
def test_a_beta_of_the_folder_that_is_none_is_refused(guided, tmp_path, beta, message):
    with pytest.raises(UserError, match=f"posttrain.json: {message}"):
        posttrain.load_guided(with_beta(guided, tmp_path, beta), "cpu", "float32")


@pytest.mark.parametrize(("beta", "expected"), [(None, 0.1), (0.3, 0.3), (math.inf, math.inf)])
def test_the_folder_says_its_beta(guided, tmp_path, beta, expected):
    assert posttrain.load_guided(with_beta(guided, tmp_path, beta), "cpu", "float32").beta == expected


def with_beta(guided, folder, beta):
    """The exported folder, but for what it says of beta."""
    copied = shutil.copytree(guided.policy.name, folder / "copy")
    settings = json.loads((copied / "posttrain.json").read_text())
    (copied / "posttrain.json").write_text(json.dumps({**settings, "beta": beta}))
    return copied
