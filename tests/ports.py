"""A port for processes that a test starts."""

import contextlib
import random
import socket


def free_port() -> int:
    """Free, and to stay so until they bind it: below what the system deals out by itself, above what Ray does."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
