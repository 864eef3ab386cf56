"""The engine protocol: prompts as token ids in, completions as token ids out, in the order in which they finish."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from posttrain.errors import UserError

FinishReason = Literal["stop", "length"]
TopLogprobs = tuple[tuple[int, float], ...]
LEAST_BETA = 1e-9  # tilts go up to 1 / beta, and must keep the digits that tell tokens apart


@dataclass(frozen=True)
class Sampling:
    """How one request is sampled; the law is softmax(logits / temperature), cut to top_k, renormalised, cut to top_p,
    renormalised.

    `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off; `stop_ids` empty means the model's own end-of-text ids;
    `stop` are texts that end a completion as well, once its decoded text contains one;
    `seed` is this request's own: the same seed gives the same completion whatever else is sampled beside it.

    Errors: UserError naming the field that is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or 1e-6 <= self.temperature < math.inf):
            raise UserError(
                f"temperature: must be 0 (greedy) or a finite number of at least 1e-6, got {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: must be above 0 and at most 1 (off), got {self.top_p}")
        if not 0 <= self.top_k < 2**31:
            raise UserError(f"top_k: must be 0 (off) or more, and below 2**31, got {self.top_k}")
        if self.max_tokens < 1:
            raise UserError(f"max_tokens: must be at least 1, got {self.max_tokens}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed: must be between 0 and 2**63 - 1, got {self.seed}")
        if not all(self.stop):
            raise UserError("stop: an empty text would end every completion at once")


@dataclass(frozen=True)
class Request:
    """One completion to sample. `id` is the caller's own name for it, unique within one call of `generate`.

    beta: the KL coefficient of the engine's guide for this request, in units of the reward; None: no guidance. guide: which
    guide, where the engine has several. candidates: value only so many of the tokens that the guide would value.
    top_logprobs: also report the most likely tokens of every step. explain: also report what the guide did at every step.
    Errors: UserError for a beta below LEAST_BETA, candidates below 1, or negative top_logprobs.
    """

    id: int
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    beta: float | None = None
    guide: str | None = None
    candidates: int | None = None
    top_logprobs: int = 0
    explain: bool = False

    def __post_init__(self) -> None:
        if self.candidates is not None and self.candidates < 1:
            raise UserError(f"candidates: must be at least 1, got {self.candidates}")
        if self.top_logprobs < 0:
            raise UserError(f"top_logprobs: must not be negative, got {self.top_logprobs}")
        if self.beta is not None and not self.beta >= LEAST_BETA:
            raise UserError(f"beta: must be at least {LEAST_BETA:g} (infinite: no tilt), got {self.beta}")


@dataclass(frozen=True)
class Candidate:
    """A token that could be sampled: its log-probabilities under softmax(logits / temperature) and under the guided law,
    before top-k and top-p, and the value model's expected return of going on with it; None: it was not asked, since no other
    token was a candidate."""

    id: int
    reference: float
    logprob: float
    value: float | None


@dataclass(frozen=True)
class GuidedStep:
    """What guidance did at a token. reference: the sampled token's log-probability under softmax(logits / temperature);
    candidates: best first under that law."""

    reference: float
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Completion:
    """What came of a request.

    `ids` include the stop token when `finish_reason` is "stop". `logprobs` are those of `ids`, in nats, under the law
    that was really sampled from; of a greedy request, under the model's own law at temperature 1 (the law of argmax is
    a point mass, whose log-probability 0 tells nobody anything).

    Of a guided request, in nats: `kl`, the sum over tokens of KL(guided law || softmax(logits / temperature)), exact, before
    top-k and top-p; `log_ratio`, the sum of the sampled tokens' log-ratios of the law that was really sampled from to
    softmax(logits / temperature). Without guidance both are 0; of a lazily guided request neither is known, nor are `logprobs`,
    which are then empty.

    `top_logprobs`: of every step the request's `top_logprobs` most likely tokens (id, log-probability), best first, under
    the law that `logprobs` are of; a token that could not be drawn is not among them.

    `steps`: of a guided request that asked to `explain`, one for each of `ids`.
    """

    request_id: int
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    stop: str | None = None  # the text of `Sampling.stop` that ended it; `ids` go on to the token that completed it
    kl: float | None = 0.0
    log_ratio: float | None = 0.0
    top_logprobs: tuple[TopLogprobs, ...] = ()
    steps: tuple[GuidedStep, ...] = ()
    text: str | None = None  # of an engine that tells nothing else: `ids` then only count, and there are no `logprobs`


def first_stop(text: str, stop: Sequence[str]) -> str | None:
    """Which of the stop texts occurs first in a text."""
    found = [(text.index(candidate), candidate) for candidate in stop if candidate in text]
    return min(found)[1] if found else None


class Engine(Protocol):
    """Turns requests into completions.

    `fingerprint` names the weights; `context` is the largest number of tokens that prompt and completion may have
    together; `settings` are whatever else decides its completions.
    """

    fingerprint: str
    context: int

    @property
    def settings(self) -> dict[str, Any]: ...

    def check(self, request: Request) -> None:
        """Errors: UserError for a request that this engine cannot fulfil."""
        ...

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Every request's completion, once, as they finish. Errors: UserError for a request that cannot fit, before any
        generation."""
        ...


def check_request(request: Request, context: int, name: str = "") -> None:
    """Every engine and every collector calls this before it generates anything.

    Errors: UserError naming `prompt` or `max_tokens`; `name` says which prompt (default: the request's id).
    """
    length = len(request.prompt_ids)
    name = name or f"request {request.id}"
    if length == 0:
        raise UserError(f"prompt: {name} is empty; it needs at least one token")
    if length >= context:
        raise UserError(f"prompt: {name} has {length} tokens, the model's context is {context}; shorten it")
    if length + request.sampling.max_tokens > context:
        raise UserError(
            f"max_tokens: {name} has {length} tokens and asks for {request.sampling.max_tokens} more, "
            f"the model's context is {context}; at most {context - length} fit"
        )


def check_lazy(sampling: Sampling, top_logprobs: int = 0, explain: bool = False) -> None:
    """Errors: UserError naming what a lazily guided request cannot have: it needs the whole law, which is never known."""
    asked = {
        "top_p": sampling.top_p < 1,
        "top_k": sampling.top_k > 0,
        "top_logprobs": top_logprobs > 0,
        "explain": explain,
    }
    for name, is_asked in asked.items():
        if is_asked:
            raise UserError(f"{name}: needs the whole guided law, which lazy guidance never knows; leave it out")
