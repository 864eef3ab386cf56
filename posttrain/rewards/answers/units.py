"""Units, currencies and number words: what may stand beside a value."""

import re
from fractions import Fraction

from posttrain.rewards.answers.number_words import SMALL

_LENGTH = {"mm": "1/1000", "cm": "1/100", "dm": "1/10", "m": "1", "km": "1000"}
_ALIASES = {
    "millimeter": "mm", "millimetre": "mm", "centimeter": "cm", "centimetre": "cm", "meter": "m", "metre": "m",
    "kilometer": "km",
    "kilometre": "km", "inch": "in", "inche": "in", "foot": "ft", "feet": "ft", "yard": "yd", "mile": "mi",
    "gram": "g", "gm": "g",
    "kilogram": "kg", "milligram": "mg", "pound": "lb", "ounce": "oz", "ton": "ton", "second": "s", "sec": "s",
    "minute": "min",
    "hour": "h", "hr": "h", "liter": "l", "litre": "l", "milliliter": "ml", "millilitre": "ml", "newton": "n",
    "joule": "j", "watt": "w",
    "volt": "v", "degree": "deg", "deg": "deg", "°": "deg", "radian": "rad", "percent": "%", "pct": "%",
    "percentage": "%", "dollar": "$",
    "usd": "$", "buck": "$", "cent": "cent", "euro": "€", "eur": "€", "sq": "square", "cu": "cubic", "mph": "mi/h",
    "kph": "km/h",
    "unit": "unit", "lbs": "lb", "yen": "¥",
    "rupee": "₹", "inr": "₹", "gbp": "£", "pence": "penny", "pennie": "penny", "people": "person", "men": "man", "women": "woman",
    "children": "child",
}  # fmt: skip
# value of one unit in the base unit of its kind
_SCALES: dict[str, tuple[str, Fraction]] = {
    **{unit: ("m", Fraction(scale)) for unit, scale in _LENGTH.items()},
    "in": ("in", Fraction(1)), "ft": ("in", Fraction(12)), "yd": ("in", Fraction(36)), "mi": ("in", Fraction(63360)),
    "mg": ("g", Fraction(1, 1000)), "g": ("g", Fraction(1)), "kg": ("g", Fraction(1000)), "oz": ("oz", Fraction(1)),
    "lb": ("oz", Fraction(16)), "s": ("s", Fraction(1)), "min": ("s", Fraction(60)), "h": ("s", Fraction(3600)),
    "day": ("s", Fraction(86400)), "week": ("s", Fraction(604800)), "ml": ("l", Fraction(1, 1000)),
    "l": ("l", Fraction(1)),
    "cent": ("$", Fraction(1, 100)), "$": ("$", Fraction(1)),
}  # fmt: skip

SUBDIVIDED = frozenset(_SCALES)  # "5 ft 10 in", "2 h 30 min"
MONTHS = frozenset(
    "january february march april may june july august september october november december".split()
    + "jan feb mar apr jun jul aug sep sept oct nov dec".split()
)

_INVERSE = re.compile(r" (\w+)\^-(\d+)")  # m s^-2
SHORT = frozenset(  # two or three letters that are a unit beside a number, not a product
    "mm cm dm km ft in yd mi kg mg lb lbs oz hr hrs min sec mph kph kmh sq cu deg rad usd pm am ml kw hz pa ev per "
    "pct day yr yrs yen".split()
)
LETTERS = frozenset("m s g h L l N J W V K A C F".split())  # one letter, set off by a space: "5 m"

# a phrase with one of these beside a number says more than a unit does
_NOT_UNITS = frozenset(
    "not no never nor neither either or and maybe perhaps possibly probably likely could might may but if unless "
    "except approximately "
    "approx about roughly around almost nearly least most than over under between up wrong "
    "incorrect false correct "
    "true equal equals is are was be mark marked grade grader grading graded score accept accepted ignore disregard "
    "please instruction "
    "instructions previous prompt system user assistant answer answers output print return import eval exec def "
    "lambda reward full "
    "credit evaluate evaluation treat consider regard regardless any all none some something anything unknown "
    "undefined option options "
    "choice choices guess think sure unsure also instead otherwise alternatively yes when where for every "
    "other".split()
)
_TRUSTED = frozenset("any all every for other over".split())  # in a gold these are plain words
_CHANGES = frozenset(  # first beside a number, they make another of it
    "squared cubed halves thirds fourths fifths sixths sevenths eighths ninths tenths hundredths thousandths".split()
)


def unit_name(pieces: list[str]) -> str:
    """One spelling for a unit phrase: lower case, singular, `cm^2` for square centimetres."""
    names: list[str] = []
    power: int | None = None
    for piece in pieces:
        word = piece.lower()
        word = _ALIASES.get(
            word, _ALIASES.get(word.removesuffix("s"), word.removesuffix("s") if len(word) > 3 else word)
        )
        if word in ("square", "cubic"):
            power = 2 if word == "square" else 3
        elif word in ("of", "the", "a", "an", ".", "*", "-", "{", "}", "(", ")"):
            continue
        elif word == "per":
            names.append("/")
        elif power is not None and word != "^":
            names += [word, "^", str(power)]
            power = None
        else:
            names.append(word)
    name = " ".join(names).replace(" ^ ", "^").replace(" / ", "/")
    return _INVERSE.sub(lambda m: f"/{m[1]}" + (f"^{m[2]}" if m[2] != "1" else ""), name)


def acceptable(pieces: list[str], trusted: bool) -> bool:
    """Whether a phrase beside a value can be a unit. A gold's phrase is trusted further than a model's."""
    words = [piece.lower() for piece in pieces if piece.isalpha()]
    if any(word in _NOT_UNITS and not (trusted and word in _TRUSTED) for word in words):
        return False
    # 3 minus one, 5 squared, 3 tenths
    if words and (words[-1] == "right" or words[-1] in SMALL or words[0] in _CHANGES):
        return False
    return len(words) <= (12 if trusted else 4) and sum(map(len, words)) <= 60


def conversion(a: str, b: str) -> Fraction | None:
    """How many of unit b one a is, where both measure the same thing and the factor is exact."""
    power = 1
    if "^" in a and "^" in b:
        (a, p), (b, q) = a.split("^", 1), b.split("^", 1)
        if p != q or not p.isdigit() or int(p) > 4:
            return None
        power = int(p)
    if a not in _SCALES or b not in _SCALES or _SCALES[a][0] != _SCALES[b][0]:
        return None
    return (_SCALES[a][1] / _SCALES[b][1]) ** power
