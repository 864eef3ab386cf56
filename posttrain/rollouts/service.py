"""The engine on a service: one or many servers of `posttrain rollout-service`, asked over HTTP in token ids.

A row is what one replica, whichever it was, answered whole; what a lost replica had begun is asked of another. With vLLM behind
it, same weights and seeds give the same law, and equal rows only where batches are composed alike.
"""

import asyncio
import json
import math
import queue
import tempfile
import threading
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit
from uuid import uuid4

from posttrain.decoding.vllm import BETA, CANDIDATES, RECORD, VLLMGuide
from posttrain.errors import UserError
from posttrain.models.load import model_fingerprint
from posttrain.rollouts.engine import Completion, Request, Sampling, check_request
from posttrain.rollouts.replicas import Replicas
from posttrain.rollouts.vllm import check_law

TIMEOUT, PATIENCE = 600.0, 120.0  # seconds

T = TypeVar("T")


class ServiceEngine:
    """An `Engine` over HTTP. Close it, or use it in a `with`: it keeps a thread and its connections.

    urls: of the replicas, which must all serve one model under the same settings; fingerprint: of the model that they must
    serve, None: whichever they do; slots: requests at a time and replica; key: what the service asks for. timeout: seconds
    for one completion, after which its replica is lost; patience: seconds without any replica.
    Errors: UserError naming `url`, `slots`, `timeout`, `patience` or `model`.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        fingerprint: str | None = None,
        slots: int = 64,
        key: str | None = None,
        timeout: float = TIMEOUT,
        patience: float = PATIENCE,
    ) -> None:
        bases = service_urls(urls)
        if slots < 1:
            raise UserError(f"slots: must be at least 1, got {slots}")
        for name, value in (("timeout", timeout), ("patience", patience)):
            if not value > 0:
                raise UserError(f"{name}: must be above 0 seconds, got {value:g}")
        self.slots = slots * len(bases)
        self.guide: VLLMGuide | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout service", daemon=True)
        self._thread.start()
        self._replicas: Replicas | None = None
        try:
            self._replicas = self._wait(_opened(Replicas(bases, key, slots, timeout, patience)))
            strangers = [replica for replica in self._replicas.replicas if replica.stranger]
            if strangers:
                raise UserError(f"url: {strangers[0].url} {strangers[0].trouble}; all must serve the same")
            self._take_over()
            if fingerprint is not None and fingerprint != self.fingerprint:
                raise UserError(
                    f"model: {bases[0]} serves {self.fingerprint[:16]}, this model's fingerprint is {fingerprint[:16]}; "
                    "start the service with the same model"
                )
        except BaseException:
            self.close()
            raise

    def _take_over(self) -> None:
        self.fingerprint: str = self._identity["fingerprint"]
        self.context: int = self._identity["context"]

    @property
    def _identity(self) -> dict[str, Any]:
        assert self._replicas is not None and self._replicas.identity is not None
        return self._replicas.identity

    @property
    def settings(self) -> dict[str, Any]:
        """What decides its completions, besides the weights and the request: not how many replicas there are."""
        guidance = {"guidance": self.guide.settings} if self.guide else {}
        return {"engine": "service", **self._identity["settings"], **guidance}

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions as they finish. Errors: UserError for a request that cannot fit, before any generation; one naming `url`
        when there is no replica for too long."""
        waiting = list(requests)
        for request in waiting:
            self.check(request)
        return self._run(waiting)

    def check(self, request: Request) -> None:
        """Errors: UserError for a request that this engine cannot fulfil."""
        check_request(request, self.context)
        check_law(request.sampling)
        for name, asked in (("top_logprobs", request.top_logprobs > 0), ("explain", request.explain)):
            if asked:
                raise UserError(
                    f"{name}: a service tells the sampled tokens alone; leave it out, or use another engine"
                )
        if request.beta is not None:
            if self.guide is None:
                raise UserError("beta: this engine has no guide; give it a value model, or leave beta out")
            if math.isinf(request.beta):
                raise UserError("beta: an infinite one does not guide; leave it out")
        vocab = self._identity["vocab"]
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < vocab:
            raise UserError(f"prompt: request {request.id} has token ids outside the model's vocabulary of {vocab}")

    def _run(self, requests: list[Request]) -> Iterator[Completion]:
        done: queue.SimpleQueue[Completion | None] = queue.SimpleQueue()
        running = asyncio.run_coroutine_threadsafe(self._complete_all(requests, done), self._loop)
        running.add_done_callback(lambda _: done.put(None))
        try:
            while (completion := done.get()) is not None:
                yield completion
            running.result()
        finally:
            running.cancel()

    async def _complete_all(self, requests: list[Request], done: "queue.SimpleQueue[Completion | None]") -> None:
        replicas, left = self._replicas, iter(requests)
        assert replicas is not None

        async def work() -> None:
            for request in left:
                done.put(completion(request, await replicas.complete(body(request))))

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.slots, len(requests))):
                    group.create_task(work())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    def sync_weights(self, source: Any) -> None:
        """New weights of the same architecture into every replica, once it has finished what it is at.

        source: a transformers folder that the replicas can read under the same name, or a model (written to a scratch folder,
        which is of use only to replicas that share this machine's TMPDIR).
        Errors: UserError naming `weights` when no replica takes them; one that does not is left out.
        """
        assert self._replicas is not None
        if isinstance(source, (str, Path)):
            folder = Path(source).absolute()
            self.fingerprint = model_fingerprint(folder)
            self._wait(self._replicas.replace(str(folder), self.fingerprint))
            return
        with tempfile.TemporaryDirectory() as scratch:
            source.save_pretrained(scratch)
            self.sync_weights(scratch)

    def use_guide(self, guide: VLLMGuide, restart: bool) -> None:
        """From now on requests with a `beta` are guided by it; those without stand beside them as they are.

        restart: replicas that have another guide, or none, start anew with this one, and with the policy that they were started
        with first. Errors: UserError naming `guide`.
        """
        assert self._replicas is not None
        if restart and self._identity["guidance"] != guide.settings:
            folder = str(guide.folder.absolute())
            self._wait(self._replicas.restart(folder, asdict(guide.guidance), guide.settings))
            self._take_over()
        if self._identity["guidance"] != guide.settings:
            told = json.dumps(asdict(guide.guidance))
            raise UserError(
                f"guide: the service has {'another' if self._identity['guidance'] else 'none'}; start it with "
                f"--guide {guide.folder} --guidance '{told}'"
            )
        self.guide = guide

    def follow(self, fingerprint: str) -> None:
        """Goes on with weights that another process has pushed."""
        assert self._replicas is not None and self._replicas.identity is not None
        self._replicas.identity = {**self._replicas.identity, "fingerprint": fingerprint}
        self.fingerprint = fingerprint

    def close(self) -> None:
        """Stops the thread; the service goes on."""
        if self._loop.is_closed():
            return
        if self._replicas is not None:
            self._wait(self._replicas.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def __enter__(self) -> "ServiceEngine":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def service_urls(urls: Sequence[str], field: str = "url") -> list[str]:
    """Without /v1 and a slash at the end. Errors: UserError naming the field."""
    found = [url.rstrip("/").removesuffix("/v1") for url in urls]
    if not found:
        raise UserError(f"{field}: give at least one, as in --url http://127.0.0.1:8000")
    for url in found:
        try:
            parts = urlsplit(url)
            fine = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
        except ValueError:
            fine = False
        if not fine:
            raise UserError(f"{field}: must be like http://127.0.0.1:8000, got {url!r}")
    if len(set(found)) < len(found):
        raise UserError(f"{field}: names one twice, got {', '.join(found)}")
    return found


def check_for_service(url: Sequence[str] | None, used: bool, **others: Any) -> None:
    """others: what only other engines do. Errors: UserError naming the option."""
    if not used:
        if url:
            raise UserError("--url: it is the service's; add --engine service")
        return
    service_urls(url or [])
    for name, value in others.items():
        if value is not None:
            raise UserError(f"--{name}: not with --engine service; it was decided when the service was started")


def body(request: Request) -> dict[str, Any]:
    """Every setting is said: what is not, a server would take from the model's generation config."""
    sampling: Sampling = request.sampling
    return {
        "prompt": list(request.prompt_ids),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": sampling.max_tokens,
        "seed": sampling.seed,
        "stop_token_ids": list(sampling.stop_ids),
        "ignore_eos": bool(sampling.stop_ids),  # a request with stop ids of its own ends at those and at no others
        "stop": list(sampling.stop),
        "logprobs": 0,
        "return_token_ids": True,
        **({} if request.beta is None else {"vllm_xargs": guidance(request)}),
    }


def guidance(request: Request) -> dict[str, Any]:
    """A name of its own for every request: whoever asks it again has another."""
    asked = {BETA: request.beta, RECORD: uuid4().hex}
    return asked if request.candidates is None else {**asked, CANDIDATES: request.candidates}


def completion(request: Request, choice: dict[str, Any]) -> Completion:
    """Errors: UserError for an answer without token ids or log-probabilities."""
    try:
        ids, logprobs = tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"])
    except (KeyError, TypeError):
        raise UserError("url: the service gives no token ids; start it with posttrain rollout-service") from None
    if len(ids) != len(logprobs):
        raise UserError(f"url: the service gave {len(ids)} tokens and {len(logprobs)} log-probabilities")
    stop = choice.get("stop_reason")
    done = Completion(request.id, ids, logprobs, choice["finish_reason"], stop if isinstance(stop, str) else None)
    if request.beta is None:
        return done
    account = choice["guidance"]
    return replace(done, kl=account["kl"], log_ratio=sum(logprobs) - account["reference"])


async def _opened(replicas: Replicas) -> Replicas:
    try:
        await replicas.open()
    except BaseException:
        await replicas.close()
        raise
    return replicas
