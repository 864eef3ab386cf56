"""Reward functions that fail on some completions: those are marked, the others scored, what they logged stays aligned."""

import asyncio
import functools

import pytest

from posttrain.errors import UserError
from posttrain.trainers.verifiers import AsyncVerifier, Verifier, tolerant


class Log:
    def __init__(self):
        self.extras, self.metrics = {}, []

    def extra(self, column, values):
        self.extras.setdefault(column, []).extend(values)

    def metric(self, name, value):
        self.metrics.append((name, value))


def call(function, texts, **columns):
    """(verifier, rewards, log)"""
    log, verifier = Log(), tolerant(function, "checker")
    found = verifier(completions=texts, log_extra=log.extra, log_metric=log.metric, **columns)
    return verifier, asyncio.run(found) if isinstance(verifier, AsyncVerifier) else found, log


def lengths(completions, log_extra, log_metric, **_):
    log_metric("seen", len(completions))
    log_extra("text", completions)
    if "bad" in completions:
        raise ValueError("a bad one")
    log_extra("length", [len(text) for text in completions])
    return [len(text) for text in completions]


async def waiting(completions, **columns):
    await asyncio.sleep(0)
    return lengths(completions, **columns)


BOTH = pytest.mark.parametrize("function", [lengths, waiting])


@BOTH
def test_without_an_error_it_is_the_function(function):
    verifier, rewards, log = call(function, ["a", "bb"])
    assert rewards == [1.0, 2.0] and verifier.errors == [None, None]
    assert log.extras == {"text": ["a", "bb"], "length": [1, 2]} and log.metrics == [("seen", 2)]


@pytest.mark.slow
@BOTH
def test_what_raises_is_marked_and_the_columns_stay_aligned(function):
    verifier, rewards, log = call(function, ["a", "bad", "bb"])
    assert rewards == [1.0, None, 2.0]
    assert verifier.errors == [None, "ValueError: a bad one", None]
    assert log.extras == {"text": ["a", None, "bb"], "length": [1, None, 2]}
    assert log.metrics == [("seen", 1), ("seen", 1)]


def test_columns_are_cut_with_the_completions_and_the_rest_is_shared():
    state, seen = object(), []

    def picky(completions, answer, trainer_state, **_):
        assert trainer_state is state
        seen.append((completions, answer))
        if len(completions) > 1:
            raise RuntimeError
        return [float(completions == answer)]

    _, rewards, _ = call(picky, ["a", "b"], answer=["a", "c"], trainer_state=state)
    assert rewards == [1.0, 0.0] and seen[1:] == [(["a"], ["a"]), (["b"], ["c"])]


@pytest.mark.parametrize(
    ("value", "error"), [("high", "returned 'high'"), (float("inf"), "returned inf"), ([1], "returned [1]")]
)
def test_what_is_no_number_is_marked(value, error):
    verifier, rewards, _ = call(lambda completions, **_: [1, value, None], ["a", "b", "c"])
    assert rewards == [1.0, None, None] and verifier.errors == [None, error, None]


def test_errors_are_those_of_the_last_batch():
    log, verifier = Log(), tolerant(lengths, "checker")
    for texts in (["bad", "a"], ["a", "a"]):
        verifier(completions=texts, log_extra=log.extra, log_metric=log.metric)
    assert verifier.errors == [None, None]


@pytest.mark.parametrize(
    ("values", "message"),
    [([1.0], "checker returned 1 rewards for 2 completions"), (3, "checker returned 3; must be a list")],
)
def test_a_wrong_number_of_rewards_is_the_users_mistake(values, message):
    with pytest.raises(UserError, match=f"^reward_funcs: {message}"):
        call(lambda **_: values, ["a", "b"])


def test_an_interruption_is_not_an_error_of_the_verifier():
    def interrupted(**_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(interrupted, ["a"])


def test_whatever_waits_is_awaited():
    class Waiting:
        async def __call__(self, **_):
            return [1.0]

    for function in (waiting, functools.partial(waiting), Waiting()):
        assert type(tolerant(function, "x")) is AsyncVerifier
    for function in (lengths, functools.partial(lengths)):
        assert type(tolerant(function, "x")) is Verifier
