"""The HTTP application: OpenAI's routes, health and metrics."""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable, Container, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import torch
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from posttrain.errors import nearest
from posttrain.objectives.qprobe import select
from posttrain.rollouts.collect import completion_text
from posttrain.rollouts.engine import Completion
from posttrain.serving.answers import (
    Answers,
    ChatAnswers,
    Json,
    Shown,
    TextAnswers,
    all_shown,
    tokens_of,
    usage_of,
)
from posttrain.serving.catalogue import Catalogue
from posttrain.serving.errors import ApiError, ErrorBody, json_response
from posttrain.serving.exchange import Exchange
from posttrain.serving.gate import Gate
from posttrain.serving.metrics import Metrics
from posttrain.serving.page import add_page
from posttrain.serving.plan import Plan, chat_prompt, plan, text_prompts
from posttrain.serving.schema import (
    ChatRequest,
    CompletionRequest,
    GuidanceField,
    Message,
    RerankField,
    Sampled,
    StreamOptions,
    TextPart,
)
from posttrain.serving.scores import scores
from posttrain.serving.text import TextStream
from posttrain.serving.worker import Token, Worker

T = TypeVar("T")
FIELDS = {
    name
    for body in (ChatRequest, CompletionRequest, GuidanceField, RerankField, StreamOptions, Message, TextPart)
    for name in body.model_fields
}


class Service:
    """A catalogue with a worker that samples from it. active: requests being answered."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self.tokenizer = catalogue.policy.tokenizer
        self.worker = Worker(catalogue.engine)
        self.metrics = Metrics(self.worker, catalogue.slots)
        self.active = 0
        self._ids = itertools.count()

    async def answer(
        self, http: HttpRequest, body: Sampled, answers: Answers, encode: Callable[[], Sequence[tuple[int, ...]]]
    ) -> Response:
        """encode: the body's prompts as token ids, which may take a while."""
        start = time.perf_counter()
        self.catalogue.check_model(body.model)
        most = self.catalogue.limits.requests
        if self.active >= most:
            raise ApiError(429, f"requests: {most} are being answered; try again", headers={"Retry-After": "1"})
        self.active += 1
        exchange: Exchange | None = None

        def leave() -> None:
            self.active -= 1
            if exchange and exchange.close():
                self.metrics.cancelled.inc()

        try:
            prompts = await asyncio.to_thread(encode)
            planned = plan(body, prompts, self.catalogue, self._ids)
            self.metrics.prompt_tokens.inc(sum(map(len, prompts)))
            exchange = Exchange(self.worker, planned.requests)
            exchange.start(stream=bool(body.stream) and planned.rerank is None)
            if body.stream:
                usage = bool(body.stream_options and body.stream_options.include_usage)
                events = self._stream(planned, exchange, answers, usage, start)
                return Stream(events, leave)
            whole = await _unless_left(http, self._whole(planned, exchange, answers))
        except BaseException:
            leave()
            raise
        leave()
        return json_response(whole)

    async def _whole(self, planned: Plan, exchange: Exchange, answers: Answers) -> Json:
        completions, usage, more = await self._finished(planned, exchange)
        choices = []
        for index, completion in enumerate(completions):
            shown = all_shown(self.tokenizer, completion) if planned.logprobs else None
            text = completion_text(self.tokenizer, completion)
            choice = answers.choice(index, text, shown, completion.finish_reason)
            choices.append({**choice, **self._guided(planned, completion, answers)})
        return answers.whole(choices, usage, more)

    async def _finished(self, planned: Plan, exchange: Exchange) -> tuple[list[Completion], Json, Json]:
        """What is kept, what it took, and how it was chosen."""
        completions = await exchange.completions()
        tokens = sum(len(completion.ids) for completion in completions)
        self.metrics.completion_tokens.inc(tokens)
        usage = usage_of(planned.prompts, tokens)
        rerank = planned.rerank
        if rerank is None:
            return completions, usage, {}
        generator = torch.Generator().manual_seed(planned.seed)
        [prompt], ids = planned.prompts, [completion.ids for completion in completions]
        found = await scores(self.catalogue, self.worker, rerank, prompt, ids, self._ids)
        chosen = int(select(found[None], rerank.beta, generator))
        told = {rerank.by: rerank.name, "beta": rerank.beta, "scores": found.tolist(), "chosen": chosen}
        return [completions[chosen]], usage, {"rerank": told}

    async def _stream(
        self, planned: Plan, exchange: Exchange, answers: Answers, with_usage: bool, start: float
    ) -> AsyncIterator[str]:
        """Server-sent events."""
        try:
            count = 1 if planned.rerank else len(planned.requests)
            for index in range(count):
                opening = answers.opening(index)
                if opening:
                    yield _sse(answers.chunk([opening], {}))
            if planned.rerank:
                completions, usage, more = await self._finished(planned, exchange)
                yield _sse(
                    answers.chunk([self._last(_Voice(self, planned), 0, completions[0], planned, answers)], more)
                )
            else:
                voices = [_Voice(self, planned) for _ in range(count)]
                tokens, first = 0, True
                async for index, event in exchange.events():
                    if first:
                        self.metrics.first_token.observe(time.perf_counter() - start)
                        first = False
                    if isinstance(event, Token):
                        piece = voices[index].hear(event)
                        if piece:
                            yield _sse(answers.chunk([answers.delta(index, *piece, None)], {}))
                    else:
                        tokens += len(event.ids)
                        self.metrics.completion_tokens.inc(len(event.ids))
                        yield _sse(answers.chunk([self._last(voices[index], index, event, planned, answers)], {}))
                usage = usage_of(planned.prompts, tokens)
            if with_usage:
                yield _sse(answers.chunk([], {"usage": usage}))
        except Exception as error:  # the status is sent already
            yield _sse(_failed(error).body())
        yield "data: [DONE]\n\n"

    def _last(self, voice: "_Voice", index: int, completion: Completion, planned: Plan, answers: Answers) -> Json:
        delta = answers.delta(index, *voice.end(completion), completion.finish_reason)
        return {**delta, **self._guided(planned, completion, answers)}

    def _guided(self, planned: Plan, completion: Completion, answers: Answers) -> Json:
        return answers.guided(completion) if planned.requests[0].beta is not None else {}


class _Voice:
    """One choice of a stream: its text, and the tokens whose text is still held back."""

    def __init__(self, service: Service, planned: Plan) -> None:
        self.tokenizer = service.tokenizer
        self.text = TextStream(self.tokenizer, planned.requests[0].sampling.stop)
        self.logprobs = planned.logprobs
        self.heard = 0
        self._held: list[Shown] = []

    def hear(self, token: Token) -> tuple[str, list[Shown] | None] | None:
        """A piece of text and its tokens, or None while they are held back."""
        self._take(token)
        piece = self.text.push(token.id)
        return (piece, self._tokens()) if piece else None

    def end(self, completion: Completion) -> tuple[str, list[Shown] | None]:
        for token in tokens_of(completion)[self.heard :]:
            self._take(token)
        return self.text.finish(completion_text(self.tokenizer, completion)), self._tokens()

    def _take(self, token: Token) -> None:
        self.heard += 1
        if self.logprobs:
            self._held.append(Shown(token, self.text.length))

    def _tokens(self) -> list[Shown] | None:
        held, self._held = self._held, []
        return held if self.logprobs else None


class Stream(StreamingResponse):
    """Calls `leave` when it is over, however it ends."""

    def __init__(self, events: AsyncIterator[str], leave: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.leave()


def create_app(catalogue: Catalogue, key: str | None = None) -> FastAPI:
    """key: what clients must bring, None: nothing."""
    service = Service(catalogue)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start(asyncio.get_running_loop())
        try:
            yield
        finally:
            await asyncio.to_thread(service.worker.stop)

    refused: dict[int | str, Json] = {"4XX": {"description": "Refused", "model": ErrorBody}}
    app = FastAPI(title="posttrain", lifespan=lifespan, docs_url=None, redoc_url=None, responses=refused)
    app.state.service = service

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, http: HttpRequest) -> Response:
        return await service.answer(http, body, ChatAnswers(catalogue), lambda: [chat_prompt(service.tokenizer, body)])

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
        most = catalogue.limits.completions
        return await service.answer(
            http, body, TextAnswers(catalogue), lambda: text_prompts(service.tokenizer, body, most)
        )

    created = int(time.time())

    def card() -> Json:
        return {
            "id": catalogue.name,
            "object": "model",
            "created": created,
            "owned_by": "posttrain",
            "context": catalogue.engine.context,
            "fingerprint": catalogue.policy.fingerprint,
            "guides": list(catalogue.guides),
            "lazy": [name for name, guide in catalogue.guides.items() if guide.guidance.lazy],
            "probes": list(catalogue.rerankers),
        }

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [card()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        catalogue.check_model(name)
        return json_response(card())

    @app.get("/health")
    async def health() -> Response:
        alive = service.worker.alive
        return json_response({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    add_page(app)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_wrong_body)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_failure)
    paths = {route.path for route in app.routes if hasattr(route, "path")}
    app.add_middleware(
        Gate, key=key, body=catalogue.limits.body, metrics=service.metrics, known=lambda path: path in paths
    )
    return app


async def _unless_left(http: HttpRequest, work: Any) -> Any:
    """What the work returns; where the client has gone before that, the work is cancelled and so is the answer."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has left")
        return task.result()
    except ApiError:
        raise
    except Exception as error:
        raise _failed(error) from error
    finally:
        for one in (task, gone):
            one.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _failed(error: Exception) -> ApiError:
    """Of the engine: not the client's fault, whatever it is."""
    return ApiError(500, f"engine: {error or type(error).__name__}")


def _sse(body: Json) -> str:
    return f"data: {json.dumps(body)}\n\n"


def _on_api_error(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


def _on_http_error(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, str(error.detail), headers=error.headers).response()


def _on_failure(_: HttpRequest, error: Exception) -> Response:
    return ApiError(500, f"internal error: {type(error).__name__}").response()


def _on_wrong_body(_: HttpRequest, error: Exception) -> Response:
    """The innermost thing that is wrong: where a union takes a text or a list, both errors are there, and the list was meant."""
    assert isinstance(error, RequestValidationError)
    first = max(error.errors(), key=lambda each: len(each["loc"]))
    place = first["loc"][1:]
    if first["type"] == "json_invalid":
        return ApiError(400, f"body: is not JSON: {first['ctx']['error']}").response()
    if first["type"] == "extra_forbidden":
        name = str(place[-1])[:60]
        field = _path([*place[:-1], name], {*FIELDS, name})
        return ApiError(400, f"{field}: unknown field{nearest(name, FIELDS)}", field).response()
    field = _path(place, FIELDS) or "body"
    return ApiError(400, f"{field}: {first['msg']}", field).response()


def _path(place: Sequence[str | int], fields: Container[str]) -> str:
    """As OpenAI writes it: `messages[1].content`. A union's members stand in the place too; they are nobody's field."""
    parts = (
        f"[{part}]" if isinstance(part, int) else f".{part}"
        for part in place
        if isinstance(part, int) or part in fields
    )
    return "".join(parts).removeprefix(".")
