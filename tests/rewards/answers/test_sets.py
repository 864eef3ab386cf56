"""Sets of real numbers."""

import pytest

from posttrain.rewards.answers.parser import parse
from posttrain.rewards.answers.sets import NotASet, complement, intersection, real_set, same_set, union

SETS = [
    r"(0,1)",
    r"[0,1] \cup [2,3)",
    r"\{-1\} \cup [0,7)",
    r"(-\infty, 2]",
    r"\mathbb{R}",
    r"(\sqrt{2}, \pi)",
    "x > 3",
    r"x \ne 3",
]


@pytest.mark.parametrize("text", SETS)
def test_a_complement_undoes_itself(text: str) -> None:
    node = real_set(parse(text))
    assert same_set(complement(complement(node)), node)


@pytest.mark.parametrize("a", SETS)
@pytest.mark.parametrize("b", SETS)
def test_de_morgan(a: str, b: str) -> None:
    x, y = real_set(parse(a)), real_set(parse(b))
    assert same_set(complement(union(x, y)), intersection(complement(x), complement(y)))


@pytest.mark.parametrize("text", ["(2,1)", "(1,1)", "[a,b]", "x + y > 1", "x^2 < 4", "(1,2,3)", "5"])
def test_what_is_no_real_set_says_so(text: str) -> None:
    with pytest.raises(NotASet):
        real_set(parse(text))
