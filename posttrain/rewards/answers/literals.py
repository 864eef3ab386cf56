"""The exact value of a number as it is written."""

import re
from fractions import Fraction

from posttrain.rewards.answers.lexer import ParseError

LARGEST_EXPONENT = 400  # of a literal such as 1e9

_REPEATING = re.compile(r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*\{?\s*(\d+)\s*\}?|\((\d+)\))")
_DOTTED = re.compile(r"(\d*)\.(\d*)\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?")
_GOES_ON = re.compile(r"(\d*)\.(\d+)(?:\.\.\.+|\\[lc]?dots[bc]?)")
LONGEST_CYCLE = 30


def literal_value(text: str) -> Fraction:
    """`1,234.5`, `6.7e-5`, `0.1\\overline{6}`, `0.\\dot{3}`, `0.333...` as exact fractions."""
    plain = text.replace(",", "")
    if "\\" not in plain and "(" not in plain and ".." not in plain:
        mantissa, _, exponent = plain.lower().partition("e")
        if exponent and abs(int(exponent)) > LARGEST_EXPONENT:
            raise ParseError("exponent too large")
        value = Fraction(mantissa.rstrip(".") or "0")
        return value * Fraction(10) ** int(exponent) if exponent else value
    if match := _REPEATING.fullmatch(plain):
        return _repeating(match[1], match[2], match[3] or match[4])
    if match := _DOTTED.fullmatch(plain):
        return _repeating(match[1], match[2], match[3] + match[4] + match[5])
    if match := _GOES_ON.fullmatch(plain):
        whole, digits = match.groups()
        for length in range(1, min(LONGEST_CYCLE, len(digits) // 2) + 1):
            cycle = digits[-length:]
            if digits.endswith(cycle * (3 if length == 1 else 2)):  # 0.333... and 0.1212..., but not 3.14159...
                return _repeating(whole, digits[:-length], cycle)
    raise ParseError("a number that goes on, who knows how")


def _repeating(whole: str, fixed: str, cycle: str) -> Fraction:
    value = Fraction(int(whole or "0") * 10 ** len(fixed) + int(fixed or "0"))
    return (value + Fraction(int(cycle), 10 ** len(cycle) - 1)) / 10 ** len(fixed)
