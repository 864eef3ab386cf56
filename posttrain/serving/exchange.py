"""The completions of one HTTP request, while they are sampled."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial

from posttrain.rollouts.engine import Completion, Request
from posttrain.serving.worker import Event, Job, Token, Worker


class Exchange:
    """Begins with `start`; `close` frees the slots of whatever has not ended by then."""

    def __init__(self, worker: Worker, requests: Sequence[Request]) -> None:
        self.worker = worker
        self.requests = requests
        self._open = {request.id for request in requests}
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def start(self, stream: bool) -> None:
        """stream: hear of every token."""
        self.worker.submit(
            [Job(request, partial(self._hear, number), stream) for number, request in enumerate(self.requests)]
        )

    def close(self) -> bool:
        """Whether there was anything left to free."""
        if self._open:
            self.worker.cancel(self._open)
        return bool(self._open)

    async def events(self) -> AsyncIterator[tuple[int, Token | Completion]]:
        """What happens to which request (its place in `requests`), until all have ended. Raises what the engine raised."""
        while self._open:
            number, event = await self._events.get()
            if not isinstance(event, Token):
                self._open.discard(self.requests[number].id)
            if isinstance(event, Exception):
                raise event
            yield number, event

    async def completions(self) -> list[Completion]:
        """All of them, in the order of `requests`."""
        found: dict[int, Completion] = {}
        async for number, event in self.events():
            if isinstance(event, Completion):
                found[number] = event
        return [found[number] for number in range(len(self.requests))]

    def _hear(self, number: int, event: Event) -> None:
        self._events.put_nowait((number, event))
