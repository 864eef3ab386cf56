"""Small random models, an engine without a model and a tokenizer without a vocabulary."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch

from posttrain.rollouts.collect import Prompt
from posttrain.rollouts.engine import Completion, Request, Sampling
from posttrain.rollouts.sampling import noise
from tests.small_models import VOCAB, build_model


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

    def check(self, request: Request) -> None: ...

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
