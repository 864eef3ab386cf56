"""From the body of a request to what the engine is asked."""

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.data.prompts import render
from posttrain.errors import UserError
from posttrain.rollouts.collect import completion_seed
from posttrain.rollouts.engine import Request, Sampling, check_request
from posttrain.serving.catalogue import Catalogue
from posttrain.serving.errors import ApiError
from posttrain.serving.schema import ChatRequest, CompletionRequest, GuidanceField, Sampled

DEFAULT_TOKENS = 16  # of /v1/completions, as at OpenAI; a chat may fill the context


@dataclass(frozen=True)
class Rerank:
    """by: `probe`, or `guide` for its value model, of that name."""

    by: Literal["probe", "guide"]
    name: str
    k: int
    beta: float


@dataclass(frozen=True)
class Plan:
    """requests: of the first prompt's samples, then of the next prompt's, and so on; samples: n, or k of `rerank`;
    logprobs: whether the client sees them; seed: of a draw among re-ranked completions."""

    prompts: list[tuple[int, ...]]
    samples: int
    requests: list[Request]
    rerank: Rerank | None
    logprobs: bool
    seed: int


def chat_prompt(tokenizer: Any, body: ChatRequest) -> tuple[int, ...]:
    """Errors: ApiError for a conversation that the model's chat template refuses."""
    messages = [{"role": message.role, "content": message.text} for message in body.messages]
    try:
        return tuple(render(tokenizer, messages))
    except UserError as error:
        raise ApiError.of(error) from None
    except Exception as error:  # a template refuses by raising whatever it likes
        raise ApiError(400, f"messages: the model's chat template refuses them: {error}", "messages") from None


def text_prompts(tokenizer: Any, body: CompletionRequest, limit: int) -> list[tuple[int, ...]]:
    """One text, one list of token ids, or several of either; at most `limit`."""
    given: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if not given:
        raise ApiError(400, "prompt: is empty; it needs at least one token", "prompt")
    if isinstance(given[0], int):
        given = [given]
    if len(given) > limit:
        raise ApiError(400, f"prompt: at most {limit} completions for one request, got {len(given)} prompts", "prompt")
    return [tuple(tokenizer(item)["input_ids"] if isinstance(item, str) else item) for item in given]


def plan(body: Sampled, prompts: Sequence[tuple[int, ...]], catalogue: Catalogue, ids: Iterator[int]) -> Plan:
    """Errors: ApiError for whatever this server or its model cannot do."""
    try:
        return _plan(body, list(prompts), catalogue, ids)
    except UserError as error:
        raise ApiError.of(error) from None


def _plan(body: Sampled, prompts: list[tuple[int, ...]], catalogue: Catalogue, ids: Iterator[int]) -> Plan:
    if body.stream_options and not body.stream:
        raise ApiError(400, "stream_options: only with stream", "stream_options")
    rerank = _rerank(body, len(prompts), catalogue)
    samples = rerank.k if rerank else body.n or 1
    most = catalogue.limits.completions
    if samples * len(prompts) > most:
        name, count = ("rerank.k", rerank.k) if rerank else ("n", samples)
        raise ApiError(400, f"{name}: at most {most} completions for one request, got {count} * {len(prompts)}", name)
    guide, beta, candidates = _guidance(body.guidance, catalogue)
    explain = body.guidance is not None and body.guidance.explain
    logprobs, top = _logprobs(body)
    if guide is not None and catalogue.guides[guide].guidance.lazy:
        for name, asked in (("logprobs", logprobs), ("guidance.explain", explain)):
            if asked:
                raise ApiError(
                    400, f"{name}: needs the whole guided law, which this server never knows; leave it out", name
                )
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    seed = secrets.randbits(62) if body.seed is None else body.seed
    requests = []
    for number, prompt in enumerate(prompts):
        for sample in range(samples):
            sampling = Sampling(
                temperature=1.0 if body.temperature is None else body.temperature,
                top_p=1.0 if body.top_p is None else body.top_p,
                max_tokens=_max_tokens(body, catalogue.engine.context - len(prompt)),
                # The first completion has the seed that was asked for.
                seed=completion_seed(seed, str(number), sample) if number or sample else seed,
                stop=stop,
            )
            request = Request(next(ids), prompt, sampling, beta, guide, candidates, top, explain)
            check_request(request, catalogue.engine.context, f"number {number}" if len(prompts) > 1 else "it")
            catalogue.engine.check(request)
            requests.append(request)
    return Plan(prompts, samples, requests, rerank, logprobs, seed)


def _rerank(body: Sampled, prompts: int, catalogue: Catalogue) -> Rerank | None:
    if body.rerank is None:
        return None
    if (body.n or 1) > 1:
        raise ApiError(400, f"n: must be 1 with rerank, which keeps one completion, got {body.n}", "n")
    if prompts > 1:
        raise ApiError(400, f"prompt: rerank takes one prompt, got {prompts}", "prompt")
    field = body.rerank
    if field.guide is None:
        return Rerank("probe", catalogue.probe_name(field.probe, "rerank.probe"), field.k, field.beta)
    if field.probe is not None:
        raise ApiError(400, "rerank: scores by a probe or by a guide's value model; give one of them", "rerank")
    return Rerank("guide", catalogue.guide_name(field.guide, "rerank.guide"), field.k, field.beta)


def _guidance(field: GuidanceField | None, catalogue: Catalogue) -> tuple[str | None, float | None, int | None]:
    if field is None:
        return None, None, None
    name = catalogue.guide_name(field.guide, "guidance.guide")
    most = catalogue.guides[name].guidance.candidates
    if field.top_k is not None and field.top_k > most:
        raise ApiError(400, f"guidance.top_k: at most {most} on this server, got {field.top_k}", "guidance.top_k")
    return name, field.beta, field.top_k


def _logprobs(body: Sampled) -> tuple[bool, int]:
    if isinstance(body, ChatRequest):
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs: only with logprobs", "top_logprobs")
        return bool(body.logprobs), body.top_logprobs or 0
    assert isinstance(body, CompletionRequest)
    return body.logprobs is not None, body.logprobs or 0


def _max_tokens(body: Sampled, room: int) -> int:
    """room: what the context leaves; below 1 the prompt is refused, whatever is asked for."""
    if not isinstance(body, ChatRequest):
        return body.max_tokens or max(1, min(DEFAULT_TOKENS, room))
    if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
        raise ApiError(400, "max_tokens: is the old name of max_completion_tokens; give one of them", "max_tokens")
    return body.max_completion_tokens or body.max_tokens or max(1, room)
