"""`1 ± 2` as the values it stands for."""

import itertools
from collections.abc import Iterator

from posttrain.rewards.answers.tree import Apply, Interval, Listing, Node, Quantity, Relation, Tuple, mul, number, walk

MOST_SIGNS = 4


def spread(node: Node) -> Node:
    """The list of values, one for each choice of signs (`∓` ties all signs together); other trees as they are."""
    if not any(isinstance(n, Apply) and n.op in ("pm", "mp") for n in walk(node)):
        return node
    match node:
        case Relation(sides, ops):
            return Relation((*sides[:-1], spread(sides[-1])), ops)
        case Listing(items, joint):
            parts = [spread(item) for item in items]
            flat = [i for p in parts for i in (p.items if isinstance(p, Listing) else (p,))]
            return Listing(tuple(flat), joint)
        case Quantity(value, unit):
            inner = spread(value)
            items = inner.items if isinstance(inner, Listing) else (inner,)
            return Listing(tuple(Quantity(item, unit) for item in items))
    marks = [n for n in walk(node) if isinstance(n, Apply) and n.op in ("pm", "mp")]
    if len(marks) > MOST_SIGNS:
        return node
    tied = any(n.op == "mp" for n in marks)
    choices = (
        [[1] * len(marks), [-1] * len(marks)]
        if tied
        else [list(c) for c in itertools.product((1, -1), repeat=len(marks))]
    )
    return Listing(tuple(_signed(node, iter(signs)) for signs in choices))


def _signed(node: Node, signs: Iterator[int]) -> Node:
    match node:
        case Apply("pm" | "mp" as op, (inner,)):
            sign = next(signs) * (1 if op == "pm" else -1)
            return mul(number(sign), _signed(inner, signs))
        case Apply(op, args):
            return Apply(op, tuple(_signed(a, signs) for a in args))
        case Tuple(items):
            return Tuple(tuple(_signed(i, signs) for i in items))
        case Interval(low, high, low_closed, high_closed):
            return Interval(_signed(low, signs), _signed(high, signs), low_closed, high_closed)
    return node
