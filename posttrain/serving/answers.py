"""OpenAI's answers: of a chat and of a plain completion, whole and in chunks."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from posttrain.rollouts.engine import Completion
from posttrain.serving.catalogue import Catalogue
from posttrain.serving.text import TextStream
from posttrain.serving.worker import Token

Json = dict[str, Any]


@dataclass(frozen=True)
class Shown:
    """A token whose log-probability is shown, and where its text begins in the completion's."""

    token: Token
    offset: int


class Answers:
    """The common frame; `kind`, `chunk_kind` and `prefix` are OpenAI's names for it."""

    kind: str
    chunk_kind: str
    prefix: str

    def __init__(self, catalogue: Catalogue) -> None:
        self.tokenizer = catalogue.policy.tokenizer
        self._frame = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": catalogue.name,
            "system_fingerprint": catalogue.policy.fingerprint[:16],
        }

    def whole(self, choices: Sequence[Json], usage: Json, more: Json) -> Json:
        return {"object": self.kind, **self._frame, "choices": list(choices), "usage": usage, **more}

    def chunk(self, choices: Sequence[Json], more: Json) -> Json:
        return {"object": self.chunk_kind, **self._frame, "choices": list(choices), **more}

    def choice(self, index: int, text: str, shown: Sequence[Shown] | None, reason: str) -> Json:
        raise NotImplementedError

    def opening(self, index: int) -> Json | None:
        """What a choice's stream begins with, before there is a token."""
        return None

    def delta(self, index: int, text: str, shown: Sequence[Shown] | None, reason: str | None) -> Json:
        raise NotImplementedError

    def guided(self, completion: Completion) -> Json:
        """How far guidance moved a completion, in nats, null where that is not known; where it was asked, what guidance did at
        every token."""
        told: Json = {"kl": completion.kl, "log_ratio": completion.log_ratio}
        if completion.steps:
            tokens = zip(completion.ids, completion.logprobs, completion.steps, strict=True)
            told["tokens"] = [
                {
                    "token": self._name(id),
                    "logprob": logprob,
                    "reference": step.reference,
                    "candidates": [{**asdict(one), "token": self._name(one.id)} for one in step.candidates],
                }
                for id, logprob, step in tokens
            ]
        return {"guidance": told}

    def _name(self, id: int) -> str:
        return self.tokenizer.decode([id], skip_special_tokens=False)


class ChatAnswers(Answers):
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def choice(self, index: int, text: str, shown: Sequence[Shown] | None, reason: str) -> Json:
        message = {"role": "assistant", "content": text}
        return {"index": index, "message": message, "logprobs": self._logprobs(shown), "finish_reason": reason}

    def opening(self, index: int) -> Json:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def delta(self, index: int, text: str, shown: Sequence[Shown] | None, reason: str | None) -> Json:
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": self._logprobs(shown), "finish_reason": reason}

    def _logprobs(self, shown: Sequence[Shown] | None) -> Json | None:
        if shown is None:
            return None
        return {
            "content": [
                {
                    **self._entry(one.token.id, one.token.logprob),
                    "top_logprobs": [self._entry(*top) for top in one.token.top],
                }
                for one in shown
            ],
            "refusal": None,
        }

    def _entry(self, id: int, logprob: float | None) -> Json:
        name = self._name(id)
        part = "\ufffd" in name  # of a character, whose bytes the name does not tell
        return {"token": name, "logprob": logprob, "bytes": None if part else list(name.encode())}


class TextAnswers(Answers):
    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def choice(self, index: int, text: str, shown: Sequence[Shown] | None, reason: str) -> Json:
        return self.delta(index, text, shown, reason)

    def delta(self, index: int, text: str, shown: Sequence[Shown] | None, reason: str | None) -> Json:
        return {"index": index, "text": text, "logprobs": self._logprobs(shown), "finish_reason": reason}

    def _logprobs(self, shown: Sequence[Shown] | None) -> Json | None:
        if shown is None:
            return None
        return {
            "tokens": [self._name(one.token.id) for one in shown],
            "token_logprobs": [one.token.logprob for one in shown],
            "top_logprobs": [{self._name(id): logprob for id, logprob in one.token.top} for one in shown],
            "text_offset": [one.offset for one in shown],
        }


def tokens_of(completion: Completion) -> list[Token]:
    """The stop token included: their log-probabilities add up to that of the completion."""
    logprobs = completion.logprobs or (None,) * len(completion.ids)
    tops = completion.top_logprobs or ((),) * len(completion.ids)
    return [Token(*token) for token in zip(completion.ids, logprobs, tops, strict=True)]


def all_shown(tokenizer: Any, completion: Completion) -> list[Shown]:
    stream, shown = TextStream(tokenizer), []
    for token in tokens_of(completion):
        shown.append(Shown(token, stream.length))
        stream.push(token.id)
    return shown


def usage_of(prompts: Sequence[Sequence[int]], completions: int) -> Json:
    """Tokens; completions: of all that were sampled, also of those that re-ranking did not keep."""
    prompt = sum(map(len, prompts))
    return {"prompt_tokens": prompt, "completion_tokens": completions, "total_tokens": prompt + completions}
