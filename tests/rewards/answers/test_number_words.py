"""Numbers in words."""

from fractions import Fraction

import pytest

from posttrain.rewards.answers.number_words import spelt_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("zero", 0), ("seven", 7), ("Forty-Two", 42), ("one hundred", 100), ("two hundred and five", 205), ("one thousand two hundred", 1200),
        ("three million four hundred thousand sixty-one", 3_400_061), ("minus three", -3), ("one half", Fraction(1, 2)), ("half", Fraction(1, 2)),
        ("three quarters", Fraction(3, 4)), ("two-thirds", Fraction(2, 3)),
    ],
)  # fmt: skip
def test_numbers_are_read(text: str, value: Fraction) -> None:
    assert spelt_number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "and",
        "third",
        "one two",
        "twenty ten",
        "six twenty",
        "hundred",
        "two zero",
        "ten apples",
        "east",
        "one thousand million",
    ],
)
def test_other_words_are_not(text: str) -> None:
    assert spelt_number(text) is None
