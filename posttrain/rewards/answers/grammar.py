"""Expressions, by recursive descent.

    union    := ratio ((`cup` | `cap` | `setminus`) ratio)*        ratio := sum (`:` sum)*
    sum      := sign? term ((`+` | `-` | `±` | `∓`) term)*
    term     := factor ((`*` | `/` | nothing) factor)*

Nesting, length and the size of literals are bounded, so that every parse ends soon; what does not fit raises
ParseError.
"""

import itertools
from fractions import Fraction

from posttrain.rewards.answers import units
from posttrain.rewards.answers.cursor import SET_OPERATIONS
from posttrain.rewards.answers.factors import Factors
from posttrain.rewards.answers.lexer import ParseError
from posttrain.rewards.answers.linear import opposite, product, total
from posttrain.rewards.answers.literals import literal_value
from posttrain.rewards.answers.tree import (
    Apply,
    Node,
    Num,
    Ratio,
    quotient,
)


class Grammar(Factors):
    """One method per rule of the grammar above."""

    # -- sets, ratios, sums, products

    def union(self) -> Node:
        node = self.ratio()
        while self.op() in SET_OPERATIONS or self.is_letter_union():
            sign = self.take().text
            node = Apply("cup" if sign == "U" else sign, (node, self.ratio()))
        return node

    def is_letter_union(self) -> bool:
        token = self.peek()
        return token is not None and token.kind == "sym" and token.text == "U" and self.op(1) in ("(", "[", "{|", "{")

    def ratio(self) -> Node:
        items = [self.sum()]
        while self.op() == ":" and not self.in_set:
            self.take()
            items.append(self.sum())
        return items[0] if len(items) == 1 else Ratio(tuple(items))

    def sum(self) -> Node:
        self.descend()
        terms: list[Node] = []
        sign = self.take().text if self.op() in ("+", "-", "pm", "mp") else "+"
        while True:
            term = self.term()
            terms.append(opposite(term) if sign == "-" else Apply(sign, (term,)) if sign in ("pm", "mp") else term)
            if self.op() not in ("+", "-", "pm", "mp"):
                break
            sign = self.take().text
        self.depth -= 1
        return total(tuple(terms))

    def term(self) -> Node:
        node = self.mixed_number() or self.factor()
        while True:
            if self.op() in ("*", "/"):
                sign = self.take().text
                factor = self.mixed_number() or self.factor()
                node = product(node, factor) if sign == "*" else quotient(node, factor)
            elif self.starts_factor(node):
                node = product(node, self.factor())
            else:
                return node

    def starts_factor(self, node: Node) -> bool:
        """Whether the next token is multiplied with what stands before it although there is no sign."""
        token = self.peek()
        if token is None:
            return False
        match token.kind:
            case "num":
                return not isinstance(node, Num) and self.stream[self.at - 1].kind != "num"
            case "run":
                return token.text.lower() not in units.SHORT
            case "sym":
                unit = (
                    self.is_letter_unit(node)
                    or self.is_letter_union()
                    or (token.upright and token.text not in ("e", "i", "pi"))
                )
                return not unit
            case "fn":
                return not self.is_time_unit()
            case "cmd":
                return token.text not in ("end", "choose", "over")
            case "op" if token.text == "|":
                return not self.bars and not self.in_set
            case "op" if token.text == "(":
                return self.kind(1) != "word" and self.op(1) != "mod"
            case "op" if token.text == "[":
                return not self.outward
        return token.kind == "op" and token.text in ("{", "⌊", "⌈")

    def is_time_unit(self) -> bool:
        """`30 min` and `20 sec`: no functions, for they have no argument."""
        token, following = self.peek(), self.peek(1)
        if token is None or token.text not in ("min", "sec") or token.upright or following is None:
            return token is not None and token.text in ("min", "sec")
        return (following.kind == "num" and following.space) or following.text in (",", "/", "and", "or", ")")

    def is_letter_unit(self, node: Node) -> bool:
        """Plain `5 m` or `5 m/s`, with a space, at the end: a unit rather than a factor."""
        token = self.peek()
        if self.latex or not isinstance(node, Num) or token is None or token.kind != "sym" or not token.space:
            return False
        rest = list(itertools.takewhile(lambda t: t.kind != "num" or not t.space, self.stream[self.at :]))
        return len(rest) < 10 and all(
            t.text in units.LETTERS if t.kind == "sym" else t.kind == "num" or t.text in ("/", "^", "-", "{", "}")
            for t in rest
        )

    def mixed_number(self) -> Node | None:
        """`2\\frac{1}{3}` or `2 1/3`: an integer and a proper fraction."""
        start, whole = self.at, self.peek()
        if whole is None or whole.kind != "num" or not whole.text.replace(",", "").isdigit():
            return None
        self.at += 1
        part = self.literal_fraction()
        if part is not None and 0 < part < 1 and self.op() not in ("^", "!"):
            return Num(literal_value(whole.text) + part)
        self.at = start
        return None

    def literal_fraction(self) -> Fraction | None:
        start, token = self.at, self.peek()
        if self.is_macro("frac"):
            self.at += 1
            node = self.macro("frac")
            literal = all(t.kind == "num" or t.text in ("frac", "{", "}") for t in self.stream[start : self.at])
            return node.value if isinstance(node, Num) and literal else None
        if token and token.kind == "num" and token.space and self.op(1) == "/" and self.kind(2) == "num":
            top, _, bottom = self.take(), self.take(), self.take()
            if top.text.isdigit() and bottom.text.isdigit() and int(bottom.text):
                return Fraction(int(top.text), int(bottom.text))
            raise ParseError("two numbers side by side")
        return None
