"""The engine on any OpenAI-compatible endpoint: text in, text out, and of the tokens no more than their count.

Of such an endpoint nobody knows the weights, the template or the token ids. What stands for them says so: the fingerprint is the
endpoint's address, a prompt's ids are the code points of its messages as JSON, and a completion's ids are all UNKNOWN, as many
as the endpoint counted. Log-probabilities are left out.
"""

import json
import math
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import httpx

from posttrain.data.prompts import Message
from posttrain.errors import UserError
from posttrain.rollouts.engine import Completion, Request
from posttrain.rollouts.service import service_urls

UNKNOWN = -1
CONTEXT = 2**31 - 1  # as far as anybody here knows
TIMEOUT, PATIENCE = 600.0, 120.0  # seconds for one answer, and without any
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0  # seconds between two tries
LATER = (408, 409, 425, 429)  # and 5xx: ask again


class Transcript:
    """What stands for the tokenizer of an endpoint that keeps its own: a prompt is the JSON of its messages."""

    chat_template = "the endpoint's own"
    bos_token_id = None

    def apply_chat_template(self, messages: Sequence[Message], **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in json.dumps(messages, ensure_ascii=False)]}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(id) for id in ids if id != UNKNOWN)


class ChatEngine:
    """An `Engine` over chat completions. slots: requests at the same time; key: what the endpoint asks for.

    Errors: UserError naming `base-url` or `slots`.
    """

    context = CONTEXT

    def __init__(
        self, base_url: str, model: str, *, key: str | None = None, slots: int = 64, patience: float = PATIENCE
    ) -> None:
        if slots < 1:
            raise UserError(f"slots: must be at least 1, got {slots}")
        [root] = service_urls([base_url], "base-url")
        self.base_url, self.model, self.slots, self.patience = f"{root}/v1", model, slots, patience
        self.fingerprint = f"unknown at {self.base_url}"
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._answered = 0.0

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "engine": "chat",
            "base_url": self.base_url,
            "prompt_ids": "code points of the messages as JSON",
            "completion_ids": f"unknown ({UNKNOWN}), as many as the endpoint counted",
        }

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions as they finish. Errors: UserError for what a chat endpoint is not asked for; one naming `base-url` for a
        request that it refuses, and when it answers none for `patience` seconds."""
        waiting = list(requests)
        for request in waiting:
            self.check(request)
        return self._run(waiting)

    def check(self, request: Request) -> None:
        """Errors: UserError for what a chat endpoint is not asked for."""
        if request.beta is not None or request.sampling.stop_ids:
            raise UserError("base-url: a chat endpoint takes neither a guide nor stop ids; leave them out")

    def _run(self, requests: list[Request]) -> Iterator[Completion]:
        left, lock, ended = iter(requests), threading.Lock(), threading.Event()
        done: queue.SimpleQueue[Completion | Exception] = queue.SimpleQueue()
        self._answered = time.monotonic()

        def work() -> None:
            while not ended.is_set():
                with lock:
                    request = next(left, None)
                if request is None:
                    return
                try:
                    done.put(self._complete(client, request, ended))
                except Exception as error:
                    done.put(error)
                    return

        with httpx.Client(headers=self._headers, timeout=TIMEOUT, limits=httpx.Limits(keepalive_expiry=2.0)) as client:
            threads = [threading.Thread(target=work, daemon=True) for _ in range(min(self.slots, len(requests)))]
            for thread in threads:
                thread.start()
            try:
                for _ in requests:
                    found = done.get()
                    if isinstance(found, Exception):
                        raise found
                    yield found
            finally:
                ended.set()

    def _complete(self, client: httpx.Client, request: Request, ended: threading.Event) -> Completion:
        pause, troubled = FIRST_PAUSE, math.inf
        while True:
            try:
                answer = client.post(f"{self.base_url}/chat/completions", json=self._body(request))
                trouble = f"answers {answer.status_code}: {' '.join(answer.text.split())[:200]}"
                if answer.status_code == 200:
                    self._answered = time.monotonic()
                    return _completion(request, answer)
                if answer.status_code < 500 and answer.status_code not in LATER:
                    raise UserError(f"base-url: {self.base_url} {trouble}")
            except httpx.HTTPError as error:
                trouble = f"cannot be reached ({type(error).__name__})"
            troubled = min(troubled, time.monotonic())  # a slow endpoint is not one that answers none
            if time.monotonic() + pause > max(self._answered, troubled) + self.patience:
                raise UserError(f"base-url: {self.base_url} {trouble}; no answer for {self.patience:g} seconds")
            if ended.wait(pause):
                raise UserError("base-url: given up")
            pause = min(2 * pause, LONGEST_PAUSE)

    def _body(self, request: Request) -> dict[str, Any]:
        """What is off is not said: not every endpoint knows every field."""
        sampling = request.sampling
        return {
            "model": self.model,
            "messages": json.loads(Transcript().decode(request.prompt_ids)),
            "temperature": sampling.temperature,
            "max_tokens": sampling.max_tokens,
            "seed": sampling.seed % 2**31,
            **({"top_p": sampling.top_p} if sampling.top_p < 1 else {}),
            **({"top_k": sampling.top_k} if sampling.top_k else {}),
            **({"stop": list(sampling.stop)} if sampling.stop else {}),
        }


def _completion(request: Request, answer: httpx.Response) -> Completion:
    """Errors: UserError naming `base-url` for an answer that is no chat completion, or does not count its tokens."""
    try:
        content = answer.json()
        [choice] = content["choices"]
        text, count = choice["message"]["content"] or "", int(content["usage"]["completion_tokens"])
        reason = choice["finish_reason"]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"base-url: no chat completion with usage, but {answer.text[:200]!r}") from None
    return Completion(request.id, (UNKNOWN,) * count, (), "length" if reason == "length" else "stop", text=text)
