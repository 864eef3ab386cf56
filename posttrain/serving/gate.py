"""What stands before every route: the key, the size of the body, and the count of answers."""

import hmac
import ipaddress
import re
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from posttrain.serving.errors import ApiError
from posttrain.serving.metrics import Metrics
from posttrain.serving.page import FILES as PAGE

HEALTH = "/health"
FLUSHED = 64 << 20  # bytes of a body too large that are read and thrown away, so that its sender hears why


def is_local(host: str) -> bool:
    """Whether a name or address is this machine's own, whoever resolves it."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Gate:
    """ASGI. key: what clients must bring as `Authorization: Bearer KEY`, everywhere but at `/health` and for the page at `/`;
    None: nothing, but they must have asked for this machine by a name of its own: a web page can point a name of its own at
    it, too."""

    def __init__(
        self, app: ASGIApp, key: str | None, body: int, metrics: Metrics, known: Callable[[str], bool]
    ) -> None:
        self.app = app
        self.key = None if key is None else f"Bearer {key}".encode()
        self.body = body
        self.metrics = metrics
        self.known = known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        path = scope["path"] if self.known(scope["path"]) else "other"

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        try:
            self._check_key(scope)
            receive = await self._read(scope, receive)
        except ApiError as error:
            await error.response()(scope, receive, counting)
            return
        await self.app(scope, receive, counting)
        self.metrics.seconds.labels(path).observe(time.perf_counter() - start)

    def _check_key(self, scope: Scope) -> None:
        if scope["path"] == HEALTH:
            return
        headers = dict(scope["headers"])
        if self.key is None:
            host = headers.get(b"host", b"").decode("latin-1")
            if not is_local(re.sub(r":\d*$", "", host).strip("[]")):
                raise ApiError(403, "host: a server without a key answers to localhost only", code="host_not_local")
            return
        if scope["path"] in PAGE:  # it asks for the key
            return
        given = headers.get(b"authorization", b"")
        if not hmac.compare_digest(given, self.key):
            raise ApiError(
                401,
                "api-key: missing or wrong; send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read(self, scope: Scope, receive: Receive) -> Receive:
        """The whole body, then whatever else comes. Errors: ApiError 413."""
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
            if size <= self.body:
                parts.append(message.get("body", b""))
            elif size > FLUSHED:
                break
        if size > self.body:
            raise ApiError(413, f"body: at most {self.body} bytes", code="body_too_large")
        whole: list[Message] = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        return replay
