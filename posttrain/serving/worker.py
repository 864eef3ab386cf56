"""The engine's thread: one running batch, which requests join and leave between two tokens.

Everything that touches the model happens here. Other threads only put something into the inbox; what the engine has to say
goes to the event loop, all of a step at once.
"""

import asyncio
import queue
import threading
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from posttrain.rollouts.engine import Completion, Request, TopLogprobs
from posttrain.rollouts.transformers import TransformersEngine
from posttrain.rollouts.vllm import VLLMEngine

T = TypeVar("T")


@dataclass(frozen=True)
class Token:
    """One more token of a completion that goes on; logprob: None where it is not known; top: as `Completion.top_logprobs`,
    empty where nobody asked."""

    id: int
    logprob: float | None
    top: TopLogprobs


Event = Token | Completion | Exception
Listener = Callable[[Event], None]


@dataclass
class Job:
    """A request, who hears of it, and whether of every token or of the completion only. told: tokens that were heard of."""

    request: Request
    listener: Listener
    stream: bool
    told: int = 0


class Worker:
    """Runs from `start` to `stop`. A listener is called on the event loop: with the tokens of a streaming job, and then once
    with its completion, or with the exception that ended it; after `cancel`, perhaps with what was under way already."""

    def __init__(self, engine: TransformersEngine | VLLMEngine) -> None:
        self.engine = engine
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._line: dict[int, Job] = {}
        self._jobs: dict[int, Job] = {}
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def running(self) -> int:
        """Requests in slots."""
        return len(self._jobs)

    @property
    def waiting(self) -> int:
        """Requests in line for one."""
        return len(self._line)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self.engine.alive

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread.start()

    def stop(self) -> None:
        """Ends after the step under way; what is unfinished is lost."""
        self._inbox.put(self._stop)
        self._thread.join()

    def submit(self, jobs: Collection[Job]) -> None:
        self._inbox.put(lambda: self._line.update({job.request.id: job for job in jobs}))

    def cancel(self, ids: Collection[int]) -> None:
        """Frees the slots of these requests, whether they run, wait or have ended."""
        self._inbox.put(lambda: self._drop(frozenset(ids)))

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Runs something else on the model, between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)

        self._inbox.put(run)
        return future

    def _stop(self) -> None:
        self._stopped = True

    def _run(self) -> None:
        self._batch = self.engine.batch(stream=True)
        while not self._stopped:
            try:
                self._read_inbox()
                self._advance()
            except Exception as error:  # a broken step has left every row in an unknown state
                self._batch.close()
                self._batch = self.engine.batch(stream=True)
                lost, self._jobs = self._jobs, {}
                self._say((job.listener, error) for job in lost.values())
        self._batch.close()

    def _read_inbox(self) -> None:
        """All that has come; waits for something where there is nothing to do."""
        if not self._line and not self._jobs:
            self._inbox.get()()
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                return
            command()

    def _drop(self, ids: frozenset[int]) -> None:
        self._batch.drop(ids)
        for jobs in (self._line, self._jobs):
            for id in ids & jobs.keys():
                del jobs[id]

    def _advance(self) -> None:
        newcomers = list(self._line.values())[: self._batch.room]
        for job in newcomers:
            del self._line[job.request.id]
            self._jobs[job.request.id] = job
        if newcomers:
            self._batch.add([job.request for job in newcomers])
        if not self._jobs:
            return
        said: list[tuple[Listener, Event]] = []
        for completion in self._batch.step():
            said.append((self._jobs.pop(completion.request_id).listener, completion))
        for row in self._batch.rows:
            job = self._jobs[row.request.id]
            if job.stream:
                new = range(job.told, len(row.ids))
                tokens = (
                    Token(row.ids[i], row.logprobs[i] if row.logprobs else None, row.tops[i] if row.tops else ())
                    for i in new
                )
                said += [(job.listener, token) for token in tokens]
                job.told = len(row.ids)
        self._say(said)

    def _say(self, said: Iterable[tuple[Listener, Event]]) -> None:
        said = list(said)
        if said and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_tell, said)


def _tell(said: list[tuple[Listener, Event]]) -> None:
    for listener, event in said:
        listener(event)
