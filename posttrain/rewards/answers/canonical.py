"""One key for all spellings of an answer, so that votes for it meet.

Two answers with the same key are equal, up to units and labels, which take no part in a vote; numbers give
themselves, other expressions a fingerprint of their values at fixed points.
"""

from fractions import Fraction

from posttrain.rewards.answers import budget
from posttrain.rewards.answers.agreement import Point, points
from posttrain.rewards.answers.bounds import NO_VALUE, Uncertain, Value
from posttrain.rewards.answers.exact import rational
from posttrain.rewards.answers.expressions import numerator, same_expression
from posttrain.rewards.answers.numeric import Evaluation
from posttrain.rewards.answers.plus_minus import spread
from posttrain.rewards.answers.readings import readings
from posttrain.rewards.answers.relations import stated_values
from posttrain.rewards.answers.sets import End, NotASet, RealSet, is_set_like, real_set
from posttrain.rewards.answers.show import show
from posttrain.rewards.answers.spelling import respell, squeeze
from posttrain.rewards.answers.tree import (
    Based,
    Listing,
    Matrix,
    Node,
    Num,
    Quantity,
    Ratio,
    Relation,
    Sym,
    Tuple,
    difference,
    is_expression,
    quotient,
    variables,
)

DIGITS = 25
PRECISIONS = (300, 1200, 4800)  # bits


def canonical(answer: str) -> str:
    """The key of an answer's value: "0.50" and "\\frac{1}{2}" give "1/2"; what cannot be read, its own spelling."""
    text = respell(answer)
    budget.start()
    try:
        found = readings(text, trusted=True)
        return key(found[0]) if found else squeeze(text)
    except budget.Exhausted:
        return squeeze(text)


def key(node: Node) -> str:
    """The key of a tree."""
    node = spread(node)
    match node:
        case Quantity(value, _):
            return key(value)
        case Based(digits, _):
            return digits.lstrip("0").lower() or "0"
        case Relation() if values := stated_values(node):
            return key(values[0])
        case Listing((item,)):
            return key(item)
    if isinstance(node, Sym):
        return show(node)
    if is_set_like(node):
        try:
            return _set_key(real_set(node))
        except NotASet:
            pass
    match node:
        case Relation((left, right), ("=",)) if is_expression(left) and is_expression(right):
            return _equation_key(numerator(difference(left, right))) or show(node)
        case Listing(items):
            return "{" + ", ".join(sorted(key(item) for item in items)) + "}"
        case Tuple(items):
            return "(" + ", ".join(key(item) for item in items) + ")"
        case Matrix(rows) if len(rows) == 1 or len(rows[0]) == 1:
            return key(Tuple(tuple(cell for row in rows for cell in row)))
        case Matrix(rows):
            return "[" + "; ".join(", ".join(key(cell) for cell in row) for row in rows) + "]"
        case Ratio((first, second)):
            return key(quotient(first, second))
    return _expression_key(node) if is_expression(node) else show(node)


def _expression_key(node: Node) -> str:
    value = rational(node)
    if value is not None:
        return str(value)
    values = _values(node)
    if not values:
        return show(node)
    if not variables(node) and (near := _nearby_rational(values[0])) is not None and same_expression(node, Num(near)):
        return str(near)
    return "~" + " ".join(values)


def _values(node: Node) -> list[str]:
    """The values at two points, the first two where there are any."""
    found: list[str] = []
    for real in (True, False):
        for point in points(node):
            try:
                found.append(_digits(node, point, real))
            except NO_VALUE:
                continue
            if len(found) == 2 or not point:
                return found
    return found


def _digits(node: Node, point: Point, real: bool) -> str:
    """The leading digits of a value, all of them certain; what is nothing to a thousand digits is 0."""
    for bits in PRECISIONS:
        at = Evaluation(point, bits, real, final=True)
        try:
            x = at.value(node)
        except Uncertain:
            continue
        if at.size(x) - at.error > 4 * DIGITS:
            return _complex_digits(at, x) if isinstance(x, at.mp.mpc) else at.mp.nstr(x, DIGITS)
    return "0"


def _complex_digits(at: Evaluation, x: Value) -> str:
    """Without the part that is rounding error."""
    parts = ["0" if at.size(part) <= at.size(x) - 4 * DIGITS else at.mp.nstr(part, DIGITS) for part in (x.real, x.imag)]
    return f"{parts[0]} + {parts[1]}i"


def _nearby_rational(value: str) -> Fraction | None:
    try:
        return Fraction(value).limit_denominator(10**6)
    except ValueError:  # a complex value
        return None


def _equation_key(node: Node) -> str:
    """The values of `node = 0` at three points, up to a common factor."""
    values = []
    for point in points(node)[:3]:
        try:
            values.append(Evaluation(point, 4 * DIGITS + 200, True).value(node))
        except NO_VALUE:
            return ""
    if len(values) < 3 or not values[0]:
        return ""
    return "0 = " + " ".join(str(v / values[0])[: DIGITS - 5] for v in values[1:])


def _set_key(pieces: RealSet) -> str:
    return " U ".join(
        f"{'[' if p.low_closed else '('}{_end_key(p.low)}, {_end_key(p.high)}{']' if p.high_closed else ')'}"
        for p in pieces
    )


def _end_key(end: End) -> str:
    return {1: "oo", -1: "-oo"}.get(end.infinite) or _expression_key(end.node)
