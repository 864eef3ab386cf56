"""Reward functions in TRL's signature that survive their own errors: the completion they fail on is marked, the rest is scored."""

import inspect
import math
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

from posttrain.errors import UserError

Call = dict[str, Any]  # keyword arguments: lists are one per completion, the rest is shared


def tolerant(function: Callable[..., Any], name: str) -> "Verifier":
    """What scores a batch as `function` does, and completion by completion where the batch raises."""
    inner = function
    while isinstance(inner, partial):
        inner = inner.func
    waits = inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(getattr(inner, "__call__", None))  # noqa: B004
    return (AsyncVerifier if waits else Verifier)(function, name)


class Verifier:
    """A reward function. errors: of the last batch, what was wrong per completion, None where nothing; such a completion's
    reward is None, which TRL takes for not scored.

    What the function logged is passed on only for completions that it scored, so columns stay aligned.
    Errors: UserError where it returns another number of rewards than there are completions.
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.function = function
        self.name = name
        self.errors: list[str | None] = []

    def __call__(self, **batch: Any) -> list[float | None]:
        attempts = self._attempts(batch)
        call = next(attempts)
        while True:
            try:
                outcome = self.function(**call)
            except Exception as error:
                outcome = error
            try:
                call = attempts.send(outcome)
            except StopIteration as done:
                return done.value

    def _attempts(self, batch: Call) -> Generator[Call, Any, list[float | None]]:
        """Yields calls, receives their values or what they raised; first the whole batch, then one by one."""
        count = len(batch["completions"])
        whole = _Recorded(batch)
        outcome = yield whole.call
        if not isinstance(outcome, Exception):
            whole.replay()
            return self._read(outcome, count)
        rewards: list[float | None] = []
        errors: list[str | None] = []
        parts: list[_Recorded] = []
        for i in range(count):
            part = _Recorded({name: [value[i]] if isinstance(value, list) else value for name, value in batch.items()})
            outcome = yield part.call
            if isinstance(outcome, Exception):
                rewards.append(None)
                errors.append(f"{type(outcome).__name__}: {outcome}")
                parts.append(_Recorded({}))
            else:
                rewards += self._read(outcome, 1)
                errors += self.errors
                parts.append(part)
        self.errors = errors
        for column in sorted({column for part in parts for column in part.extras}):
            batch["log_extra"](column, [value for part in parts for value in part.extras.get(column, [None])])
        for metric, value in [entry for part in parts for entry in part.metrics]:
            batch["log_metric"](metric, value)
        return rewards

    def _read(self, values: Any, count: int) -> list[float | None]:
        try:
            values = list(values)
        except TypeError:
            raise UserError(f"reward_funcs: {self.name} returned {values!r}; must be a list of numbers") from None
        if len(values) != count:
            raise UserError(f"reward_funcs: {self.name} returned {len(values)} rewards for {count} completions")
        self.errors = [None] * count
        rewards: list[float | None] = []
        for i, value in enumerate(values):
            try:
                reward = None if value is None else float(value)
            except (TypeError, ValueError):
                reward = math.inf
            if reward is not None and math.isinf(reward):
                self.errors[i], reward = f"returned {value!r}", None
            rewards.append(reward)
        return rewards


class AsyncVerifier(Verifier):
    async def __call__(self, **batch: Any) -> list[float | None]:  # type: ignore[override]
        attempts = self._attempts(batch)
        call = next(attempts)
        while True:
            try:
                outcome = await self.function(**call)
            except Exception as error:
                outcome = error
            try:
                call = attempts.send(outcome)
            except StopIteration as done:
                return done.value


class _Recorded:
    """A call whose logging is kept back until it is known to have succeeded."""

    def __init__(self, call: Call) -> None:
        self.extras: dict[str, list[Any]] = {}
        self.metrics: list[tuple[str, float]] = []
        self.own = call
        self.call = {
            **call,
            "log_extra": self._extra,
            "log_metric": lambda name, value: self.metrics.append((name, value)),
        }

    def _extra(self, column: str, values: list[Any]) -> None:
        self.extras.setdefault(column, []).extend(values)

    def replay(self) -> None:
        for column, values in self.extras.items():
            self.own["log_extra"](column, values)
        for name, value in self.metrics:
            self.own["log_metric"](name, value)
