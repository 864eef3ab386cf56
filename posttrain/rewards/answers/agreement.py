"""Equality of expressions by their values.

Radicals, logarithms and trigonometry leave the exact domain. There two expressions are compared at points: first at
moderate precision, where a difference above the error bounds says `different`; what agrees is evaluated again with so
many digits that the literals of both sides and their smallest intermediate values are all resolved. So a rounded value
is never its exact one.
"""

import functools
import random
from collections.abc import Callable
from fractions import Fraction

from posttrain.rewards.answers.bounds import (
    GUARD,
    MOST_BITS,
    NO_VALUE,
    Uncertain,
    Undefined,
    Unknown,
    Value,
)
from posttrain.rewards.answers.numeric import Evaluation
from posttrain.rewards.answers.tree import Apply, Node, Num, variables, walk

WORKING_BITS = 200
MARGIN = 100  # bits that two equal values must share beyond everything that could make them differ
MOST_ATTEMPTS = 4  # each with more digits than the one before
ENOUGH = 2  # points where both sides are real
COUNTING = frozenset(("factorial", "factorial2", "binom", "sum", "prod", "gcd", "lcm"))

Point = dict[str, Fraction]
Numbers = tuple[tuple[Value, int], tuple[Value, int]]  # two values, each with its error
Pair = Callable[[Evaluation], Numbers]

_RANGES = ((0.2, 3), (-3, 3), (1, 9), (-4, -0.1), (0, 1), (-1, 1), (3, 12), (-9, 9))


def points(*trees: Node) -> list[Point]:
    """Fixed pseudo-random points: rationals positive, of both signs, large, negative, small; positive integers in n!.

    A name has the same value at the i-th point whatever else there is.
    """
    names = frozenset[str]().union(*map(variables, trees))
    integers = frozenset[str]().union(*map(integer_names, trees))
    count = len(_RANGES) if names else 1
    return [{name: _coordinate(i, name, name in integers) for name in names} for i in range(count)]


def integer_names(node: Node) -> frozenset[str]:
    """The names in factorials, binomials and bounds of sums: those stand for integers."""
    return frozenset[str]().union(*(variables(n) for n in walk(node) if isinstance(n, Apply) and n.op in COUNTING))


@functools.lru_cache(maxsize=4096)
def _coordinate(i: int, name: str, integer: bool) -> Fraction:
    generator = random.Random(f"{i} {name}")
    if integer:
        return Fraction(generator.randint(1, 4) + i)
    return Fraction(round(generator.uniform(*_RANGES[i]) * 9973), 9973)


def same_value(a: Node, b: Node) -> bool | None:
    """Whether two expressions are equal wherever both are defined; None where nothing can be said."""
    return decide(lambda at: ((at.value(a), at.error), (at.value(b), at.error)), a, b)


def decide(pair: Pair, *trees: Node) -> bool | None:
    """Whether two values made of the trees agree wherever they are real; where that is nowhere, at complex points."""
    chosen = points(*trees)
    literals = sum(map(literal_bits, trees))
    for real in (True, False):
        agreed = 0
        for point in chosen:
            try:
                if not _agree(pair, point, real, literals):
                    return False
                agreed += 1
            except (Undefined, ZeroDivisionError):
                continue
            except NO_VALUE:
                return None
        if agreed >= min(ENOUGH, len(chosen)):
            return True
    return None


def _agree(pair: Pair, point: Point, real: bool, literals: int) -> bool:
    bits = WORKING_BITS
    for attempt in range(MOST_ATTEMPTS):
        at = Evaluation(point, bits, real, final=attempt > 0)
        numbers = None
        try:
            numbers = pair(at)
            if _differ(at, numbers):
                return False
        except Uncertain:
            pass
        resolution = MARGIN + 2 * literals + 2 * at.depth
        if numbers and at.final and max(error for _, error in numbers) <= -resolution:
            return True
        bits = max(bits, WORKING_BITS + resolution + 2 * at.lost)
        if bits > 2 * MOST_BITS:
            break
    raise Unknown  # they agree as far as can be seen, which is not far


def _differ(at: Evaluation, numbers: Numbers) -> bool:
    """Whether two values are further apart than their errors explain."""
    (a, a_error), (b, b_error) = numbers
    return at.size(a - b) > max(a_error, b_error) + GUARD


def constant(node: Node) -> Value | None:
    """The real value of an expression without names, None where it has none."""
    if variables(node):
        return None
    try:
        return Evaluation({}, WORKING_BITS, real=True, final=True).value(node)
    except NO_VALUE:
        return None


def literal_bits(node: Node) -> int:
    numbers = (n.value for n in walk(node) if isinstance(n, Num))
    return sum(value.numerator.bit_length() + value.denominator.bit_length() for value in numbers)
