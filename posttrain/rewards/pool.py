"""Grading in bulk: child processes that share the work, none of which can hold it up.

A chunk whose child dies or is late is graded again, one answer at a time, so that a single bad answer costs its own
verdict only.
"""

import os
import queue
import threading
from collections.abc import Sequence

from posttrain.rewards.process import Died, TooLate, Worker
from posttrain.rewards.verdict import Grade

CHUNK = 250  # answers per question
SECONDS_ALONE = 0.5
SECONDS_WORTH_SHARING = 3.0
MOST_WORKERS = 16
SECONDS_FOR_CHUNK = 60  # of CPU time
SECONDS_FOR_ONE = 5
MEGABYTES = 2048

Pair = tuple[str, str]  # completion, gold


def worth_sharing(done: int, seconds: float, left: int) -> int:
    """How many child processes to share the answers left with, at the pace so far; 0: not worth starting them."""
    if not done or seconds < SECONDS_ALONE or left * seconds / done < SECONDS_WORTH_SHARING:
        return 0
    workers = min(_cpus(), MOST_WORKERS, -(-left // CHUNK))
    return workers if workers > 1 else 0


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def grade_in_pool(pairs: Sequence[Pair], workers: int) -> list[Grade]:
    """One grade per pair, in order. Every child is gone when this returns or raises."""
    work = _Work(pairs)
    children = [_Child() for _ in range(workers)]
    threads = [threading.Thread(target=work.serve, args=(child,), daemon=True) for child in children]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        work.drop()
        for child in children:
            child.close()
    if work.failures:
        raise work.failures[0]
    return [grade for grade in work.grades if grade is not None]


class _Work:
    """What is to be graded, and the grades so far."""

    def __init__(self, pairs: Sequence[Pair]):
        self.pairs = pairs
        self.grades: list[Grade | None] = [None] * len(pairs)
        self.failures: list[BaseException] = []
        self.chunks: queue.SimpleQueue[range] = queue.SimpleQueue()
        for start in range(0, len(pairs), CHUNK):
            self.chunks.put(range(start, min(start + CHUNK, len(pairs))))

    def serve(self, child: "_Child") -> None:
        try:
            while True:
                self.grade(self.chunks.get_nowait(), child)
        except (queue.Empty, _Closed):
            pass
        except BaseException as error:  # must not be lost with the thread
            self.failures.append(error)

    def grade(self, chunk: range, child: "_Child") -> None:
        found = child.grade([self.pairs[i] for i in chunk], SECONDS_FOR_CHUNK)
        for n, i in enumerate(chunk):
            if found is None:
                alone = child.grade([self.pairs[i]], SECONDS_FOR_ONE)
                self.grades[i] = alone[0] if alone else Grade("timeout", None, "none")
            else:
                self.grades[i] = found[n]

    def drop(self) -> None:
        """Leave the chunks that nobody has begun."""
        while not self.chunks.empty():
            self.chunks.get_nowait()


class _Closed(Exception):
    """The child was ended for good."""


class _Child:
    """A worker that is started again after it had to be killed, until it is closed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: Worker | None = None
        self._closed = False

    def grade(self, pairs: list[Pair], seconds: int) -> list[Grade] | None:
        """Grades, or None where the worker died, failed or was late."""
        with self._lock:
            if self._closed:
                raise _Closed
            if self._worker is None:
                self._worker = Worker("grade", seconds=SECONDS_FOR_CHUNK, megabytes=MEGABYTES)
            worker = self._worker
        try:
            answer = worker.ask([list(pair) for pair in pairs], 2 * seconds)
        except (Died, TooLate):
            self._end()
            return None
        return None if isinstance(answer, str) else [Grade(*fields) for fields in answer]

    def close(self) -> None:
        self._closed = True
        self._end()

    def _end(self) -> None:
        with self._lock:
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()
