"""The process that serves: its socket, and how it ends."""

import signal
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from posttrain.errors import UserError
from posttrain.serving.gate import is_local

KEEP_ALIVE = 75  # seconds; longer than clients keep idle connections, or one would send a request into a closed one


def check_open(host: str, key: str | None) -> None:
    """Errors: UserError for an empty key, and for an address that others can reach without one."""
    if key is not None and not key.strip():
        raise UserError("api-key: is empty; give one, or leave it out and serve this machine only")
    if key is None and not is_local(host):
        raise UserError(f"host: {host} can be reached by others; give --api-key, or POSTTRAIN_API_KEY, or 127.0.0.1")


def bind(host: str, port: int) -> socket.socket:
    """The address is taken before the model is loaded; nobody is answered before it is. Errors: UserError."""
    if not 0 <= port < 2**16:
        raise UserError(f"port: must be between 0 (any free one) and 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        raise UserError(f"port: cannot serve on {host}:{port}: {getattr(error, 'strerror', None) or error}") from None
    return bound


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.ready()


def serve(app: FastAPI, bound: socket.socket, drain: int, say: Callable[[str], None] = print) -> None:
    """Until SIGTERM or SIGINT: then no new connections, what runs is finished for up to `drain` seconds."""
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=drain,
    )
    server = _Server(config, lambda: say(f"ready: http://{shown}:{port}"))
    # uvicorn raises the signal once more when all is done, for whoever it was meant for: a drained server has ended well.
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        server.run(sockets=[bound])
    finally:
        signal.signal(signal.SIGTERM, before)
