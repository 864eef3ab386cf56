"""Sets of real numbers as sorted, disjoint pieces, so that intervals, unions, differences and inequalities compare as
sets."""

import functools
from dataclasses import dataclass
from typing import Any

from posttrain.rewards.answers.agreement import constant
from posttrain.rewards.answers.exact import rational
from posttrain.rewards.answers.expressions import same_expression
from posttrain.rewards.answers.tree import (
    INFINITY,
    Apply,
    Interval,
    Listing,
    Node,
    Num,
    Quantity,
    Relation,
    Sym,
    Tuple,
    difference,
    is_expression,
    negative,
    number,
    quotient,
    variables,
    walk,
)

MOST_PIECES = 60


class NotASet(Exception):
    """The tree is no set of real numbers with constant ends."""


@functools.total_ordering
class End:
    """A real number or an infinity, ordered numerically and equal only when the expressions are."""

    def __init__(self, node: Node):
        self.node = node
        self.infinite = 1 if node == INFINITY else -1 if node == negative(INFINITY) else 0
        self.value: Any = None if self.infinite else constant(node)
        if not self.infinite and self.value is None:
            raise NotASet

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, End)
        if self.infinite or other.infinite:
            return self.infinite == other.infinite
        if abs(self.value - other.value) > abs(self.value) * 1e-25 + 1e-25:
            return False
        return same_expression(self.node, other.node) is True

    def __lt__(self, other: "End") -> bool:
        if self.infinite or other.infinite:
            return self.infinite < other.infinite
        return self != other and bool(self.value < other.value)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Piece:
    low: End
    low_closed: bool
    high: End
    high_closed: bool

    def empty(self) -> bool:
        return self.high < self.low or (self.low == self.high and not (self.low_closed and self.high_closed))


RealSet = list[Piece]
LOWEST, HIGHEST = End(negative(INFINITY)), End(INFINITY)
EVERYTHING: RealSet = [Piece(LOWEST, False, HIGHEST, False)]


def real_set(node: Node) -> RealSet:
    """The set that a tree denotes; raises NotASet."""
    match node:
        case Sym("set R"):
            return EVERYTHING
        case Interval(low, high, low_closed, high_closed):
            return _interval(low, low_closed, high, high_closed)
        case Tuple((low, high)):
            return _interval(low, False, high, False)
        case Apply("cup", (a, b)):
            return union(real_set(a), real_set(b))
        case Apply("cap", (a, b)):
            return intersection(real_set(a), real_set(b))
        case Apply("setminus", (a, b)):
            return intersection(real_set(a), complement(real_set(b)))
        case Listing(items, joint):
            return _listed(items, joint)
        case Relation():
            return _solved(node)
    raise NotASet


def _interval(low: Node, low_closed: bool, high: Node, high_closed: bool) -> RealSet:
    piece = Piece(End(_plain(low)), low_closed, End(_plain(high)), high_closed)
    if piece.empty():  # (2, -1) is a point, not the empty set
        raise NotASet
    return [piece]


def _plain(node: Node) -> Node:
    return node.value if isinstance(node, Quantity) else node


def _listed(items: tuple[Node, ...], joint: str) -> RealSet:
    if len(items) > MOST_PIECES:
        raise NotASet
    if items and all(isinstance(item, Relation) for item in items):
        names = {name for item in items for name in variables(item)}
        if len(names) > 1:
            raise NotASet
        parts = [real_set(item) for item in items]
        met = functools.reduce(intersection, parts)
        if joint == "and" or (joint != "or" and met):  # "x > 2, x < 5" is one range; "x < 2, x > 5" is two
            return met
        return functools.reduce(union, parts)
    pieces = []
    for item in items:
        if is_expression(_plain(item)):
            end = End(_plain(item))
            pieces.append(Piece(end, True, end, True))
        else:
            raise NotASet
    return normal(pieces)


def normal(pieces: RealSet) -> RealSet:
    """Sorted, non-empty, disjoint and not touching."""
    if len(pieces) > MOST_PIECES:
        raise NotASet
    ordered = sorted((p for p in pieces if not p.empty()), key=functools.cmp_to_key(_by_low))
    merged: RealSet = []
    for piece in ordered:
        last = merged[-1] if merged else None
        touching = last is not None and (
            piece.low < last.high or (piece.low == last.high and (piece.low_closed or last.high_closed))
        )
        if last is None or not touching:
            merged.append(piece)
            continue
        if last.high == piece.high:
            high, closed = last.high, last.high_closed or piece.high_closed
        else:
            further = max(last, piece, key=lambda p: p.high)
            high, closed = further.high, further.high_closed
        merged[-1] = Piece(last.low, last.low_closed, high, closed)
    return merged


def _by_low(a: Piece, b: Piece) -> int:
    if a.low == b.low:
        return b.low_closed - a.low_closed
    return -1 if a.low < b.low else 1


def union(a: RealSet, b: RealSet) -> RealSet:
    return normal([*a, *b])


def complement(pieces: RealSet) -> RealSet:
    gaps, low, closed = [], LOWEST, False
    for piece in pieces:
        gaps.append(Piece(low, closed, piece.low, not piece.low_closed and not piece.low.infinite))
        low, closed = piece.high, not piece.high_closed and not piece.high.infinite
    gaps.append(Piece(low, closed, HIGHEST, False))
    return normal(gaps)


def intersection(a: RealSet, b: RealSet) -> RealSet:
    return complement(union(complement(a), complement(b)))


def same_set(a: RealSet, b: RealSet) -> bool:
    return len(a) == len(b) and all(
        p.low == q.low and p.high == q.high and p.low_closed == q.low_closed and p.high_closed == q.high_closed
        for p, q in zip(a, b, strict=True)
    )


INEQUALITIES = frozenset(("<", "<=", ">", ">=", "!="))
FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}


def _solved(relation: Relation) -> RealSet:
    """The solutions of a chain of linear inequalities in one name (or in one `f(x)`)."""
    if relation.ops == ("in",):
        if variables(relation.sides[0]) and not variables(relation.sides[1]):
            return real_set(relation.sides[1])
        raise NotASet
    if not all(op in FLIPPED for op in relation.ops) or all(op == "=" for op in relation.ops):
        raise NotASet
    relation = _as_one_name(relation)
    names = sorted(variables(relation))
    if len(names) != 1:
        raise NotASet
    result = EVERYTHING
    for left, op, right in zip(relation.sides, relation.ops, relation.sides[1:], strict=False):
        result = intersection(result, _solutions(left, op, right, names[0]))
    return result


def _solutions(left: Node, op: str, right: Node, name: str) -> RealSet:
    """Where `left op right`; an absolute value alone on one side is opened into its two cases."""
    if isinstance(right, Apply) and right.op == "abs":
        left, op, right = right, FLIPPED[op], left
    if not (isinstance(left, Apply) and left.op == "abs"):
        return _half_line(difference(left, right), op, name)
    above, below = difference(left.args[0], right), Apply("add", (left.args[0], right))
    positive, negated = _half_line(above, op, name), _half_line(below, FLIPPED[op], name)
    return intersection(positive, negated) if op in ("<", "<=", "!=") else union(positive, negated)


def _as_one_name(relation: Relation) -> Relation:
    """With an application such as f(x), standing alone between constants, read as the unknown."""
    open_sides = [s for s in relation.sides if variables(s)]
    if len(open_sides) == 1 and isinstance(open_sides[0], Apply) and open_sides[0].op.endswith("()"):
        return Relation(tuple(Sym("f") if s is open_sides[0] else s for s in relation.sides), relation.ops)
    return relation


def _half_line(node: Node, op: str, name: str) -> RealSet:
    """Where `node op 0`, for a node that is linear in the name (or has its absolute value against a constant)."""
    if not all(is_expression(n) for n in walk(node)):
        raise NotASet
    offset = substituted(node, name, number(0))
    slope = difference(substituted(node, name, number(1)), offset)
    line = Apply("add", (offset, Apply("mul", (slope, Sym(name)))))
    value = constant(slope)
    if value is None or same_expression(node, line) is not True:
        raise NotASet
    if same_expression(slope, number(0)) is True:
        raise NotASet
    end = End(_simple(quotient(negative(offset), slope)))
    op = FLIPPED[op] if value < 0 else op
    match op:
        case "<" | "<=":
            return [Piece(LOWEST, False, end, op == "<=")]
        case ">" | ">=":
            return [Piece(end, op == ">=", HIGHEST, False)]
        case "!=":
            return complement([Piece(end, True, end, True)])
    return [Piece(end, True, end, True)]


def _simple(node: Node) -> Node:
    value = rational(node)
    return node if value is None else Num(value)


def substituted(node: Node, name: str, value: Node) -> Node:
    match node:
        case Sym(own) if own == name:
            return value
        case Apply(op, args):
            return Apply(op, tuple(substituted(a, name, value) for a in args))
    return node


def is_set_like(node: Node) -> bool:
    match node:
        case Interval() | Apply("cup" | "cap" | "setminus", _) | Sym("set R"):
            return True
        case Relation(_, ops):
            return bool(set(ops) & INEQUALITIES) or ops == ("in",)
        case Listing(items):
            return any(is_set_like(item) for item in items)
        case Quantity(value):
            return is_set_like(value)
    return False
