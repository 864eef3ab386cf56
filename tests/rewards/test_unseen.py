"""Cases that were written from the label policy before any of them was run."""

import pytest

from posttrain.rewards.equality import decide
from posttrain.rewards.math import grade
from tests.rewards import near_misses, oddities, typical

EQUAL = [pair for pairs in near_misses.EQUAL.values() for pair in pairs] + oddities.EQUAL + typical.EQUAL
DIFFERENT = (
    [pair for pairs in near_misses.DIFFERENT.values() for pair in pairs] + oddities.DIFFERENT + typical.DIFFERENT
)


@pytest.mark.parametrize(("a", "b"), [*EQUAL, *((b, a) for a, b in EQUAL)])
def test_equal_either_way_round(a: str, b: str) -> None:
    assert decide(a, b).verdict == "equal"


@pytest.mark.parametrize(("a", "b"), [*DIFFERENT, *((b, a) for a, b in DIFFERENT)])
def test_different_either_way_round(a: str, b: str) -> None:
    assert decide(a, b).verdict == "different"


@pytest.mark.parametrize(("gold", "completion", "right"), oddities.COMPLETIONS + typical.COMPLETIONS)
def test_completions(gold: str, completion: str, right: bool) -> None:
    assert grade(completions=[completion], golds=[gold])[0].correct is right
