"""A tokenizer whose tokens are characters, and an engine that adds two numbers, rightly about half of the time."""

import json
import random
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from posttrain.evaluation.benchmarks import Problems, load_all
from posttrain.evaluation.harness import Model
from posttrain.rollouts.engine import Completion, Request, first_stop


class Characters:
    chat_template: str | None = "chatml"
    bos_token_id = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}

    def apply_chat_template(
        self, messages: Any, add_generation_prompt: bool, return_dict: bool
    ) -> dict[str, list[int]]:
        turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
        return self("".join(turns) + "<|im_start|>assistant\n" * add_generation_prompt)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, ids))


class Adder:
    """A completion depends on its prompt and its seed alone; the engine remembers what it was asked."""

    fingerprint = "a" * 64
    context = 20_000

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay
        self.asked: list[Request] = []

    def check(self, request: Request) -> None: ...

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for request in requests:
            time.sleep(self.delay)
            self.asked.append(request)
            yield self.answer(request)

    def answer(self, request: Request) -> Completion:
        chance = random.Random(request.sampling.seed)
        a, b = re.findall(r"(\d+)\+(\d+)", "".join(map(chr, request.prompt_ids)))[-1]
        total = int(a) + int(b) + chance.choice([0, 0, 1, 2])
        text = f"{a} and {b} make {total}. The answer is {total}.\n\\boxed{{{total}}}" + "." * chance.randrange(9)
        text = text[: chance.choice([10, *[400] * 9])] + "".join(f"\n{stop}" for stop in request.sampling.stop)
        stop = first_stop(text, request.sampling.stop)
        ids = tuple(map(ord, text))
        reason = "stop" if stop or len(ids) > 10 else "length"
        return Completion(request.id, ids, tuple(-chance.random() for _ in ids), reason, stop)


def write_data(path: Path, problems: int = 12) -> Path:
    rows = [
        {"id": f"p{i}", "problem": f"{7 * i}+{i * i}=?", "answer": str(7 * i + i * i), "level": 1 + i % 3}
        for i in range(problems)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def adder(engine: Adder | None = None, **settings: Any) -> Model:
    return Model("adder", engine or Adder(), Characters(), {"engine": "stand-in", **settings})


def tasks_of(data: Path, **overrides: Any) -> list[Problems]:
    return load_all([str(data)], {"max_tokens": 400, **overrides})
