"""Small random models, an engine without a model and a tokenizer without a vocabulary."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
import transformers

from posttrain.rollouts.collect import Prompt
from posttrain.rollouts.engine import Completion, Request, Sampling
from posttrain.rollouts.sampling import noise

VOCAB = 101
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # wide enough that argmax is never a tie
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


@functools.cache
def build_model(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE)).eval()
    if kind == "qwen2":  # grouped key-value heads, biases
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(num_key_value_heads=2, **BASE)).eval()
    # gemma3: layers with a sliding window, shorter than most prompts
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Gemma3TextConfig(
        num_key_value_heads=1, head_dim=16, sliding_window=8, layer_types=kinds, **BASE
    )
    return transformers.Gemma3ForCausalLM(config).eval()


@pytest.fixture(params=["llama", "qwen2", "gemma3"])
def model(request: pytest.FixtureRequest) -> Any:
    return build_model(request.param)


@pytest.fixture
def llama() -> Any:
    return build_model("llama")


@pytest.fixture
def ragged_requests() -> Callable[..., list[Request]]:
    """(count, **sampling) -> requests with prompts of 1 to 40 tokens, for 1 to 40 tokens, a seed each."""

    def make(count: int, **settings: Any) -> list[Request]:
        generator = torch.Generator().manual_seed(7)
        lengths = torch.randint(1, 41, (count, 2), generator=generator).tolist()
        return [
            Request(
                i,
                tuple(torch.randint(2, VOCAB, (prompt,), generator=generator).tolist()),
                Sampling(**{"max_tokens": tokens, "seed": 1000 + i, **settings}),
            )
            for i, (prompt, tokens) in enumerate(lengths)
        ]

    return make


class ScriptedEngine:
    """Digits that depend on the seed alone, last request first; remembers what it was asked."""

    fingerprint = "f" * 64
    context = 64

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for request in reversed(list(requests)):
            self.requests.append(request)
            count = request.sampling.max_tokens
            uniforms = noise(torch.full((count,), request.sampling.seed), torch.arange(count))
            ids = (uniforms * 10).long().tolist()
            yield Completion(request.id, tuple(ids), tuple((uniforms - 2).tolist()), "length" if ids[-1] else "stop")


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


class DigitTokenizer:
    """Token id 7 is the text "7"; whatever is completed is stated as the answer."""

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return "#### " + "".join(map(str, ids))


@pytest.fixture
def tokenizer() -> DigitTokenizer:
    return DigitTokenizer()


@pytest.fixture
def prompts() -> list[Prompt]:
    return [Prompt(f"p{i}", [{"role": "user", "content": f"{i}?"}], (1, i + 2), str(i)) for i in range(7)]
