"""vLLM's own OpenAI server, with what a rollout service needs besides: which policy it serves, and how that is replaced.

    GET  /v1/policy                     {"fingerprint", "context", "vocab", "settings", "guidance"}
    POST /v1/policy {"folder": F}       new weights from a folder on the server's machine; the same answer
    POST /v1/guide                      {"folder": F, "guidance": settings}: 202, and the server starts anew with that guide
    POST /v1/guide/account              {"record": R, "ids": tokens} of a guided completion: {"kl", "reference"}, once

Every answer of the server carries the fingerprint of the policy that made it in the header `FINGERPRINT`.
"""

import asyncio
import hmac
import os
import re
import signal
import socket
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import BackgroundTasks, Body, FastAPI
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from posttrain.config import build
from posttrain.decoding.guidance import Guidance
from posttrain.decoding.vllm import VLLMGuide, load_vllm_guide, processors
from posttrain.errors import UserError
from posttrain.models.load import Policy, model_fingerprint
from posttrain.rollouts.replicas import ACCOUNT, FINGERPRINT, GUIDE, POLICY
from posttrain.rollouts.vllm import CPU_CACHE_GIB, MEMORY_SHARE
from posttrain.serving.gate import HEALTH, is_local
from posttrain.serving.server import KEEP_ALIVE

UNKNOWN = "unknown"  # while weights are replaced, and after that has failed


class ServedPolicy:
    """Which policy a running vLLM has, and by what it is guided. client: vLLM's `AsyncLLM`; next: the guide to start anew with."""

    def __init__(self, client: Any, policy: Policy, guide: VLLMGuide | None) -> None:
        self.client = client
        self.policy = policy
        self.fingerprint = policy.fingerprint
        self.guide = guide
        self.next: VLLMGuide | None = None
        self._reloading = asyncio.Lock()

    def identity(self) -> dict[str, Any]:
        """What all replicas of a service must have in common."""
        from vllm import __version__

        config = self.client.vllm_config
        return {
            "fingerprint": self.fingerprint,
            "context": config.model_config.max_model_len,
            "vocab": config.model_config.get_vocab_size(),
            "settings": {
                "vllm": __version__,
                "dtype": str(config.model_config.dtype).removeprefix("torch."),
                "device": config.device_config.device.type,
            },
            "guidance": self.guide.settings if self.guide else None,
        }

    async def reload(self, folder: str) -> None:
        """Waits for what runs, replaces the weights, forgets what the cache holds of the old ones."""
        fingerprint = await asyncio.to_thread(model_fingerprint, Path(folder))
        async with self._reloading:
            await self.client.pause_generation(mode="wait")
            try:
                self.fingerprint = UNKNOWN
                await self.client.collective_rpc("reload_policy", args=(folder,))
                await self.client.reset_prefix_cache()
                self.fingerprint = fingerprint
            finally:
                await self.client.resume_generation()


class Signed:
    """ASGI: the fingerprint on every answer; both, where the policy was replaced between a request and its answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        policy: ServedPolicy | None = getattr(scope["app"].state, "policy", None)
        if policy is None:  # it starts
            await self.app(scope, receive, send)
            return
        before = policy.fingerprint

        async def signing(message: Message) -> None:
            if message["type"] == "http.response.start":
                after = policy.fingerprint
                value = after if after == before else f"{before}, {after}"
                message["headers"] = [*message.get("headers", ()), (FINGERPRINT.lower().encode(), value.encode())]
            await send(message)

        await self.app(scope, receive, signing)


class LocalOnly:
    """ASGI: for a server without a key. A web page can point a name of its own at this machine, but not ask by another."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            if not is_local(re.sub(r":\d*$", "", host).strip("[]")):
                refusal = JSONResponse({"error": "host: a server without a key answers to localhost only"}, 403)
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)


class Locked:
    """ASGI: vLLM asks for its keys on some paths only, and answers on others too (`/invocations`); here on all but `/health`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != HEALTH:
            brought = dict(scope["headers"]).get(b"authorization", b"")
            keys: list[str] = scope["app"].state.args.api_key
            if not any(hmac.compare_digest(brought, f"Bearer {key}".encode()) for key in keys):
                await JSONResponse({"error": "Unauthorized"}, 401)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def add_policy_routes(app: FastAPI, policy: ServedPolicy) -> None:
    @app.get(POLICY)
    async def which() -> JSONResponse:
        if policy.next:
            return JSONResponse({"error": "it starts anew with another guide"}, 503)
        return JSONResponse(policy.identity())

    @app.post(POLICY)
    async def replace(folder: str = Body(embed=True)) -> JSONResponse:
        if not (Path(folder) / "config.json").is_file():
            return JSONResponse({"error": f"folder: {folder} has no config.json"}, 400)
        if policy.guide and policy.guide.reads_policy:
            return JSONResponse(
                {"error": "guide: its shared head reads the states of the policy it was trained for"}, 400
            )
        try:
            await policy.reload(folder)
        except Exception as error:  # whatever vLLM finds wrong with the weights; it may have taken some of them
            return JSONResponse({"error": f"folder: {folder} was not taken: {str(error).splitlines()[0]}"}, 500)
        return JSONResponse(policy.identity())

    @app.post(GUIDE)
    async def guide(
        folder: Annotated[str, Body()], guidance: Annotated[dict[str, Any], Body()], after: BackgroundTasks
    ) -> JSONResponse:
        try:
            policy.next = load_vllm_guide(folder, policy.policy, build(Guidance, guidance))
        except UserError as error:
            return JSONResponse({"error": str(error)}, 400)
        after.add_task(os.kill, os.getpid(), signal.SIGTERM)
        return JSONResponse({"guidance": policy.next.settings}, 202, background=after)

    @app.post(ACCOUNT)
    async def account(record: Annotated[str, Body()], ids: Annotated[list[int], Body()]) -> JSONResponse:
        try:
            kl, reference = (await policy.client.collective_rpc("take_account", args=(record, ids)))[0]
        except Exception as error:  # no guide, or no such record
            return JSONResponse({"error": f"record: {record} has no account: {error}"}, 404)
        return JSONResponse({"kl": kl, "reference": reference})

    app.state.policy = policy


def options(
    folder: Path,
    *,
    name: str,
    dtype: str,
    slots: int,
    context: int | None,
    key: str | None,
    guided: bool = False,
    more: Sequence[str] = (),
) -> Namespace:
    """vLLM's settings: those of the engine in process; guided: the folder is a composite; more: vLLM's own words, which have
    the last one. Errors: UserError for a guide on several engines, of which only the first would give account."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    words = [f"--model={folder}", f"--served-model-name={name}", f"--dtype={dtype}", f"--max-num-seqs={slots}"]
    words += [f"--gpu-memory-utilization={MEMORY_SHARE}", "--enable-prefix-caching", "--seed=0"]
    words += ["--logprobs-mode=processed_logprobs", "--allowed-origins=[]"]
    words += [
        "--worker-extension-cls=posttrain.serving.rollout_worker.PolicyWorker",
        f"--middleware={__name__}.{Signed.__name__}",
    ]
    words += ["--enforce-eager"] if dtype == "float32" else []  # compiled kernels fuse, and round, in another order
    words += ["--no-enable-chunked-prefill"] if current_platform.is_cpu() else []  # as in rollouts/vllm.py, and why
    words += [f"--max-model-len={context}"] if context else []
    words += [f"--logits-processors={name}" for name in processors()] if guided else []
    words += [f"--api-key={key}"] if key else []
    words += [f"--middleware={__name__}.{(Locked if key else LocalOnly).__name__}"]
    args = make_arg_parser(FlexibleArgumentParser(prog="vllm's options")).parse_args([*words, *more])
    validate_parsed_serve_args(args)
    if guided and args.data_parallel_size > 1:
        raise UserError("guide: not with --data-parallel-size; start so many services, and list their URLs")
    return args


def prepare_environment() -> None:
    """Before vLLM is imported."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # on CPU: the worker lives in the engine's process
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # so that the engine ends with this process
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_CACHE_GIB)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout has one line: that it is ready


def serve(
    args: Namespace,
    policy: Policy,
    bound: socket.socket,
    say: Callable[[str], None] = print,
    guide: VLLMGuide | None = None,
) -> VLLMGuide | None:
    """Until SIGTERM or SIGINT; what runs then is given up. say: told once that the service is ready. guide: of the composite
    that is served.

    Returns the guide that the service was asked to start anew with.
    Errors: UserError naming `engine` where vLLM does not start with this model.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)  # vLLM's own handler takes over once it serves
    try:
        return asyncio.run(_serve(args, policy, bound, say, guide))
    except (ValueError, RuntimeError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"engine: vllm does not serve {policy.name}: {reason}") from None


async def _serve(
    args: Namespace, policy: Policy, bound: socket.socket, say: Callable[[str], None], guide: VLLMGuide | None
) -> VLLMGuide | None:
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.launcher import serve_http

    host, port = bound.getsockname()[:2]
    async with build_async_engine_client(args) as client:
        tasks = await client.get_supported_tasks()
        app = build_app(args, tasks, client.model_config)
        await init_app_state(client, app.state, args, tasks)
        served = ServedPolicy(client, policy, guide)
        add_policy_routes(app, served)
        announced = asyncio.create_task(_announce(app, f"ready: http://{host}:{port}", say))
        ended = await serve_http(
            app,
            sock=bound,
            host=host,
            port=port,
            log_level="warning",
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE,
        )
        announced.cancel()
    await ended
    return served.next


async def _announce(app: FastAPI, line: str, say: Callable[[str], None]) -> None:
    while not (hasattr(app.state, "server") and app.state.server.started):
        await asyncio.sleep(0.05)
    say(line)
