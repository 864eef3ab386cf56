"""Exact arithmetic on trees."""

from fractions import Fraction

import pytest

from posttrain.rewards.answers.exact import PRIME, SQUARE_ROOT_OF_MINUS_ONE, NotExact, rational, residue
from posttrain.rewards.answers.parser import parse


def test_the_field_is_one() -> None:
    assert all(pow(base, PRIME - 1, PRIME) == 1 for base in (2, 3, 5, 7, 11, 13))
    assert SQUARE_ROOT_OF_MINUS_ONE**2 % PRIME == PRIME - 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1/2+1/3", Fraction(5, 6)),
        ("2^{-3}", Fraction(1, 8)),
        (r"\sqrt{\frac{4}{9}}", Fraction(2, 3)),
        (r"\sqrt[3]{-27}", Fraction(-3)),
        ("8^{2/3}", Fraction(4)),
        ("5!", Fraction(120)),
        ("7!!", Fraction(105)),
        (r"\binom{10}{3}", Fraction(120)),
        (r"\lfloor -\frac{7}{2} \rfloor", Fraction(-4)),
        (r"\gcd(12,18)", Fraction(6)),
        ("(-1)^{10^{30}}", Fraction(1)),
        ("0^5", Fraction(0)),
    ],
)
def test_rational_constants_have_their_value(text: str, value: Fraction) -> None:
    assert rational(parse(text)) == value


@pytest.mark.parametrize(
    "text", [r"\sqrt{2}", "x", r"\pi", "1/0", "0^0", "0^{-1}", "9^{9^9}", "5000!", r"\sqrt{-4}", r"(-8)^{1/2}"]
)
def test_others_have_none(text: str) -> None:
    assert rational(parse(text)) is None


def test_a_tower_is_compared_without_being_written_out() -> None:
    assert residue(parse("9^{9^9}"), 1) == pow(9, 9**9, PRIME)


def test_radicals_are_not_in_the_field() -> None:
    with pytest.raises(NotExact):
        residue(parse(r"\sqrt{2}"), 1)
