"""Brackets: groups, tuples, intervals, sets, matrices in lists, absolute values."""

from posttrain.rewards.answers.cursor import CLOSING, SEPARATORS, Cursor
from posttrain.rewards.answers.lexer import ParseError
from posttrain.rewards.answers.tree import (
    EMPTY_SET,
    Apply,
    Interval,
    Listing,
    Matrix,
    Node,
    Relation,
    Sym,
    Tuple,
    quotient,
)


class Brackets(Cursor):
    def absolute(self) -> Node:
        self.bars += 1
        in_set, self.in_set = self.in_set, False
        inner = self.sum()
        self.in_set = in_set
        self.bars -= 1
        self.expect("|")
        return Apply("abs", (inner,))

    def outward_interval(self) -> Node:
        """`]a, b[`, as the French write it."""
        self.outward = True
        low = self.sum()
        if self.take().text not in (",", ";"):
            raise ParseError("interval")
        high = self.sum()
        self.outward = False
        close = self.take().text
        if close not in ("[", "]"):
            raise ParseError("interval")
        return Interval(low, high, False, close == "]")

    def bracketed(self) -> Node:
        opening = self.take().text
        saved = self.bars, self.in_set, self.outward
        self.bars, self.in_set, self.outward = 0, opening == "{|", False
        node = self.inside(opening)
        self.bars, self.in_set, self.outward = saved
        return node

    def inside(self, opening: str) -> Node:
        if opening in ("⌊", "⌈"):
            inner = self.sum()
            self.expect(CLOSING[opening])
            return Apply("floor" if opening == "⌊" else "ceil", (inner,))
        if opening == "{|" and self.op() == "|}":
            self.take()
            return EMPTY_SET
        if opening == "{" and self.op() == "}" and not self.latex:
            self.take()
            return EMPTY_SET
        items = [self.item()]
        while self.op() in (",", ";") or (opening in ("{", "{|") and self.op() in SEPARATORS):
            while self.op() in SEPARATORS:
                self.take()
            items.append(self.item())
        if opening == "{|" and self.op() in ("|", ":"):
            return self.set_builder(items[0])
        if opening == "{" and self.is_macro("choose", "over"):
            how, below = self.take().text, self.sum()
            self.expect("}")
            return Apply("binom", (items[0], below)) if how == "choose" else quotient(items[0], below)
        close = self.take().text
        if opening in ("(", "[") and close in (")", "]"):
            return bracket(opening + close, tuple(items))
        if close != CLOSING[opening]:
            raise ParseError(f"expected {CLOSING[opening]}")
        if opening == "⟨":
            return Tuple(tuple(items))
        if opening == "{" and len(items) == 1:
            return items[0]
        return Listing(tuple(items), "{" if opening == "{|" else ",")

    def set_builder(self, subject: Node) -> Node:
        """`{x | x > 5}` is its condition; what is built from more than a name stays as it is written."""
        self.take()
        condition = self.answer("|}")
        self.expect("|}")
        conditions = list(condition.items) if isinstance(condition, Listing) else [condition]
        if isinstance(subject, Relation) and subject.ops == ("in",):
            conditions.insert(0, subject)
            subject = subject.sides[0]
        if isinstance(subject, Sym) and all(isinstance(c, Relation) for c in conditions):
            return conditions[0] if len(conditions) == 1 else Listing(tuple(conditions), "and")
        return Apply("builder", (subject, *conditions))


def bracket(ends: str, items: tuple[Node, ...]) -> Node:
    """A group, a tuple, an interval or a matrix, by the shape of the brackets and the number of items."""
    if len(items) == 1:
        if ends not in ("()", "[]"):
            raise ParseError("a half-open bracket around one value")
        return items[0]
    if ends == "()":
        return Tuple(items)
    rows = [r for r in map(row_of, items) if r is not None]
    if ends == "[]" and len(rows) == len(items) and len({len(r) for r in rows}) == 1:
        return Matrix(tuple(rows))
    if len(items) == 2:
        return Interval(items[0], items[1], ends[0] == "[", ends[1] == "]")
    if ends == "[]":
        return Tuple(items)
    raise ParseError("a half-open tuple")


def row_of(node: Node) -> tuple[Node, ...] | None:
    """The entries of `[1, 2]` where that is a row of `[[1, 2], [3, 4]]`."""
    match node:
        case Interval(low, high, True, True):
            return (low, high)
        case Tuple(items) if len(items) > 2:
            return items
    return None
