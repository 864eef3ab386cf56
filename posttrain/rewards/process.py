"""A child process that answers questions, one JSON line each, and can be killed at any moment.

Plain pipes to `python -m posttrain.rewards.worker`: nothing is forked, the user's main module is never imported
again, and any thread may ask. The child limits its own CPU time and memory and ends when its input does, so it does
not outlive its parent.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import posttrain


class Died(Exception):
    """The child ended before it answered: a limit was reached, or somebody killed it."""


class TooLate(Exception):
    """No answer within the time allowed; the child may still be working."""


class Worker:
    """`task`: what it does with a question. `seconds`: CPU time for each. `megabytes`: memory."""

    def __init__(self, task: str, seconds: float, megabytes: int):
        package = str(Path(posttrain.__file__).parents[1])
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "posttrain.rewards.worker", task, str(seconds), str(megabytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            close_fds=True,
        )
        self._received = b""
        self.ready = False  # the child has started up
        self._asked = 0

    def ask(self, question: Any, seconds: float) -> Any:
        """The child's answer. Raises Died, or TooLate; an answer that comes after that is dropped."""
        self._asked += 1
        deadline = time.monotonic() + seconds
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps([self._asked, question]).encode() + b"\n")
            self._child.stdin.flush()
        except OSError as error:
            raise Died from error
        while True:
            number, answer = json.loads(self._line(deadline))
            self.ready = True
            if number == self._asked:
                return answer

    def _line(self, deadline: float) -> bytes:
        assert self._child.stdout is not None
        poll = select.poll()
        poll.register(self._child.stdout, select.POLLIN | select.POLLHUP)
        while b"\n" not in self._received:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TooLate
            piece = os.read(self._child.stdout.fileno(), 1 << 20)
            if not piece:
                raise Died
            self._received += piece
        line, _, self._received = self._received.partition(b"\n")
        return line

    def close(self) -> None:
        """End the child and collect it, so that no zombie stays."""
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
