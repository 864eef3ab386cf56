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
SECONDS_FOR_CHUNK = 60
SECONDS_FOR_ONE = 5
MEGABYTES = 2048

Pair = tuple[str, str]  # completion, gold


def workers_for(count: int) -> int:
    """How many child processes that many answers deserve; 0: none, grade here."""
    return 0 if count < 4_000 else min(_cpus(), 16, count // 1_000)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def grade_in_pool(pairs: Sequence[Pair], workers: int) -> list[Grade]:
    """One grade per pair, in order. Every child is gone when this returns or raises."""
    grades: list[Grade | None] = [None] * len(pairs)
    chunks: queue.SimpleQueue[range] = queue.SimpleQueue()
    for start in range(0, len(pairs), CHUNK):
        chunks.put(range(start, min(start + CHUNK, len(pairs))))
    failures: list[BaseException] = []
    threads = [
        threading.Thread(target=_serve, args=(pairs, chunks, grades, failures), daemon=True) for _ in range(workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [grade for grade in grades if grade is not None]


def _serve(
    pairs: Sequence[Pair], chunks: "queue.SimpleQueue[range]", grades: list[Grade | None], failures: list[BaseException]
) -> None:
    child = _Child()
    try:
        while True:
            try:
                chunk = chunks.get_nowait()
            except queue.Empty:
                return
            found = child.grade([pairs[i] for i in chunk], SECONDS_FOR_CHUNK)
            if found is None:
                found = [
                    (child.grade([pairs[i]], SECONDS_FOR_ONE) or [Grade("timeout", None, "none")])[0] for i in chunk
                ]
            for i, grade in zip(chunk, found, strict=True):
                grades[i] = grade
    except BaseException as error:  # a thread must not lose it
        failures.append(error)
    finally:
        child.close()


class _Child:
    """A worker that is started again after it had to be killed."""

    def __init__(self) -> None:
        self._worker: Worker | None = None

    def grade(self, pairs: list[Pair], seconds: int) -> list[Grade] | None:
        """Grades, or None where the worker died, failed or was late."""
        if self._worker is None:
            self._worker = Worker("grade", seconds=seconds, megabytes=MEGABYTES)
        try:
            answer = self._worker.ask([list(pair) for pair in pairs], 2 * seconds)
        except (Died, TooLate):
            self.close()
            return None
        return None if isinstance(answer, str) else [Grade(*fields) for fields in answer]

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None
