"""The ways to read an answer: usually one, but `1,234` is a number or two of them, and `A5_11` a numeral or a name."""

import re

from posttrain.rewards.answers.lexer import LONGEST, ParseError
from posttrain.rewards.answers.number_words import SMALL, spelt_number
from posttrain.rewards.answers.parser import parse
from posttrain.rewards.answers.tree import Based, Node, Relation, Sym, number

_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
# 1000,99 and 1,22 and 0,111; but 1,2 and 0,4 are lists
_DECIMAL_COMMA = re.compile(r"([-+]?)(0(?=,\d{3,}\Z)|\d{4,}|[1-9]\d*(?=,\d\d\Z)),(\d+)")
_LETTER_UNIT = re.compile(r"([-+]?[\d.,]+)\s+([A-Za-z](?:[^A-Za-z].{0,20})?)")
_TEXT = re.compile(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}")
_NUMERAL = re.compile(
    r"\s*([-+]?)\(?([0-9a-zA-Z]+)\)?(?:\s*_\s*\{?\s*\(?(?:base )?\s*([a-z]+|\d{1,2})\s*\)?\}?|\s+\(?(?:in )?base[- ](\w+)\)?)\s*"
)
_LABEL = re.compile(r"\s*([A-Za-z])\s*=")
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def readings(text: str, trusted: bool) -> list[Node]:
    """The trees that a respelled text may stand for, the likeliest first; none where it is no answer."""
    if len(text) > LONGEST:
        return []
    if (numeral := _numeral(text)) is not None:
        return [numeral]
    label = _LABEL.match(text)
    if label and (numeral := _numeral(text[label.end() :])) is not None:
        return [Relation((Sym(label[1]), numeral), ("=",))]
    if (value := spelt_number(_TEXT.sub(r"\1", text))) is not None:
        return [number(value)]
    found: list[Node] = []
    for spelling, grouped in _spellings(text):
        try:
            found.append(parse(spelling, grouped=grouped, trusted=trusted))
        except (ParseError, ZeroDivisionError):
            continue
    return found


def _spellings(text: str) -> list[tuple[str, bool]]:
    """The text, and whether `1,234` in it is one number."""
    found = [(text, True)]
    if _GROUPED.search(text):
        found.append((text, False))
    if match := _DECIMAL_COMMA.fullmatch(text):
        found.append((f"{match[1]}{match[2]}.{match[3]}", True))
    if match := _LETTER_UNIT.fullmatch(text):  # "5 N" is five newtons or five times N
        found.append((f"{match[1]}{match[2]}", True))
    return found


def _numeral(text: str) -> Based | None:
    """`A5_{11}`, `52_{\\text{eight}}`, `52 base 8`: digits that exist in the base below them."""
    match = _NUMERAL.fullmatch(_TEXT.sub(r"\1", text))
    if not match:
        return None
    name = match[3] or match[4]
    base = SMALL.get(name, int(name) if name.isdigit() else 0)
    digits = match[2].lower()
    plain = any(c.isdigit() for c in digits) or (base == 16 and len(digits) > 1)  # AB_16, but a_16 is a name
    known = 2 <= base <= 36 and plain and all(c in _DIGITS[:base] for c in digits)
    return Based(match[1].removeprefix("+") + match[2], base) if known else None
