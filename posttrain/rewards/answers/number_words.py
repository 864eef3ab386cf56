"""Numbers in words: `forty-two`, `two hundred and five`, `three quarters`."""

import re
from fractions import Fraction

_TEENS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen".split()
)
_TENS = {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}
SMALL = {word: value for value, word in enumerate(_TEENS)} | _TENS
MAGNITUDES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = {
    "half": 2,
    "third": 3,
    "quarter": 4,
    "fourth": 4,
    "fifth": 5,
    "sixth": 6,
    "seventh": 7,
    "eighth": 8,
    "ninth": 9,
    "tenth": 10,
}
_PLURALS = {f"{word}s": value for word, value in _PARTS.items()} | {"halves": 2}
MOST_WORDS = 16
_DIGITS = re.compile(r"[0-9]{1,30}(?:\.[0-9]{1,30})?")


def spelt_number(text: str) -> Fraction | None:
    """The value of a number in English words, None where the text is something else."""
    words = [word for word in text.lower().replace("-", " ").split() if word != "and"]
    if not words or len(words) > MOST_WORDS or "and" in (text.split() or [""])[0]:
        return None
    if words[0] in ("minus", "negative"):
        rest = " ".join(words[1:])
        value = Fraction(rest) if _DIGITS.fullmatch(rest) else spelt_number(rest)
        return None if value is None else -value
    part = _PARTS.get(words[-1]) or _PLURALS.get(words[-1])
    if part:
        count = _cardinal(words[:-1]) if words[:-1] != ["a"] else 1
        if words == ["half"]:
            count = 1
        return Fraction(count, part) if count and count < 20 else None
    cardinal = _cardinal(words)
    return None if cardinal is None else Fraction(cardinal)


def _cardinal(words: list[str]) -> int | None:
    """`two hundred thousand five`; each word must fit the ones before it."""
    total = group = 0
    last: int | None = None
    for word in words:
        if word in SMALL:
            value = SMALL[word]
            fits = last is None or last >= 100 or (last in _TENS.values() and 0 < value < 10)
            if not fits or (value == 0 and len(words) > 1):
                return None
            group += value
        elif word == "hundred":
            if not 0 < group < 10:
                return None
            value = 100
            group *= value
        elif word in MAGNITUDES:
            value = MAGNITUDES[word]
            if not group or (total and total < value * 10):
                return None
            total, group = total + group * value, 0
        else:
            return None
        last = value
    return total + group if words else None
