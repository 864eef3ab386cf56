"""Answers of every family against the label policy."""

import pytest

from posttrain.rewards.equality import decide
from tests.rewards.families import DIFFERENT, EQUAL

EQUAL_PAIRS = [pytest.param(*pair, id=f"{family}: {pair}") for family, pairs in EQUAL.items() for pair in pairs]
DIFFERENT_PAIRS = [pytest.param(*pair, id=f"{family}: {pair}") for family, pairs in DIFFERENT.items() for pair in pairs]


@pytest.mark.parametrize(("gold", "pred"), EQUAL_PAIRS)
def test_equal(gold: str, pred: str) -> None:
    assert decide(gold, pred).verdict == "equal"


@pytest.mark.parametrize(("gold", "pred"), EQUAL_PAIRS)
def test_equal_the_other_way_round(gold: str, pred: str) -> None:
    assert decide(pred, gold).verdict == "equal"


@pytest.mark.parametrize(("gold", "pred"), DIFFERENT_PAIRS)
def test_different(gold: str, pred: str) -> None:
    assert decide(gold, pred).verdict in ("different", "no_answer")


@pytest.mark.parametrize(
    "text",
    sorted(
        {
            text
            for table in (EQUAL, DIFFERENT)
            for pairs in table.values()
            for pair in pairs
            for text in pair
            if text.strip("$ ")
        }
    ),
)
def test_everything_equals_itself(text: str) -> None:
    assert decide(text, text).verdict == "equal"


@pytest.mark.parametrize("text", ["", " ", "$$", r"\[ \]"])
def test_nothing_is_no_answer(text: str) -> None:
    assert decide("42", text).verdict == "no_answer"


def test_a_defect_is_an_error_and_never_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.rewards.equality.respell", lambda text: 1 / 0)
    assert decide("42", "42.0").verdict == "error"


def test_what_costs_too_much_is_a_timeout() -> None:
    heavy = "+".join(rf"\sin({k}x)" for k in range(1, 150))
    assert decide(heavy + "+1", "1+" + heavy).verdict == "timeout"
