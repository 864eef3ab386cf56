"""Expressions, by recursive descent.

    union    := ratio ((`cup` | `cap` | `setminus`) ratio)*        ratio := sum (`:` sum)*
    sum      := sign? term ((`+` | `-` | `±` | `∓`) term)*
    term     := factor ((`*` | `/` | nothing) factor)*
    factor   := sign? primary (`!` | `^` factor | `_` index | `'` | `°` | `%`)*
    primary  := number | name | function | macro | bracket | `|` sum `|`

Nesting, length and the size of literals are bounded, so that every parse ends soon; what does not fit raises
ParseError.
"""

import itertools
from fractions import Fraction

from posttrain.rewards.answers import units
from posttrain.rewards.answers.brackets import Brackets
from posttrain.rewards.answers.cursor import CLOSING, MONEY, SET_OPERATIONS
from posttrain.rewards.answers.lexer import ParseError, Token
from posttrain.rewards.answers.linear import product, total, transpose
from posttrain.rewards.answers.literals import literal_value
from posttrain.rewards.answers.number_words import SMALL
from posttrain.rewards.answers.tree import (
    EMPTY_SET,
    Apply,
    Based,
    Matrix,
    Node,
    Num,
    Ratio,
    Sym,
    Tuple,
    negative,
    number,
    power,
    quotient,
)

TRANSPOSED = (Sym("T"), Sym("top"), Sym("intercal"))


class Grammar(Brackets):
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
            terms.append(negative(term) if sign == "-" else Apply(sign, (term,)) if sign in ("pm", "mp") else term)
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
                return not token.upright or token.text not in ("min", "sec")
            case "cmd":
                return token.text not in ("end", "choose", "over")
            case "op" if token.text == "|":
                return not self.bars and not self.in_set
            case "op" if token.text == "(":
                return self.kind(1) != "word" and self.op(1) != "mod"
            case "op" if token.text == "[":
                return not self.outward
        return token.kind == "op" and token.text in ("{", "⌊", "⌈")

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

    # -- factors

    def factor(self) -> Node:
        self.descend()
        sign = self.op()
        if sign in ("-", "+", "pm", "mp"):
            self.take()
            node = self.factor()
            node = negative(node) if sign == "-" else node if sign == "+" else Apply(sign, (node,))
        else:
            node = self.postfix(self.primary())
        self.depth -= 1
        return node

    def postfix(self, node: Node) -> Node:
        while sign := self.op():
            if sign == "!":
                self.take()
                double = self.op() == "!"
                self.at += double
                node = Apply("factorial2" if double else "factorial", (node,))
            elif sign == "^":
                self.take()
                node = self.raised(node)
            elif sign == "_":
                numeral = self.stream[self.at - 1].text
                self.take()
                node = self.indexed(node, numeral)
            elif sign == "'":
                self.take()
                node = primed(node, "'")
            elif sign == "°":
                self.take()
                node = self.degrees(node)
            elif sign == "%" and self.kind(1) not in ("num", "sym"):
                self.take()
                node = Apply("percent", (node,))
            elif sign == "(" and isinstance(node, Sym) and self.is_application(node):
                argument = self.bracketed()
                node = Apply(f"{node.name}()", argument.items if isinstance(argument, Tuple) else (argument,))
            else:
                break
        return node

    def raised(self, base: Node) -> Node:
        """What follows `^`: a degree sign, primes, a star, or an exponent."""
        grouped = self.op() == "{"
        mark = self.op(int(grouped))
        if mark in ("°", "'", "*") or (mark in ("+", "-") and grouped and self.op(2) == "}"):
            self.at += 1 + grouped
            while grouped and self.op() == "'":
                mark += self.take().text
            degrees = self.degrees(base) if mark == "°" else None
            if grouped:
                self.expect("}")
            return self.degrees(base) if degrees else primed(base, mark)
        if mark in ("+", "-") and not grouped:
            return power(base, self.factor())
        self.descend()
        exponent = self.primary()
        while self.op() == "^":  # 2^3^4 is 2^(3^4)
            self.take()
            exponent = self.raised(exponent)
        self.depth -= 1
        return transpose(base) if exponent in TRANSPOSED and isinstance(base, Matrix) else power(base, exponent)

    def degrees(self, node: Node) -> Node:
        """After a degree sign: of an angle or, with a C or F behind it, of temperature."""
        token = self.peek()
        if token and token.kind == "sym" and token.text in ("C", "F"):
            self.take()
        return Apply("deg", (node,))

    def indexed(self, node: Node, numeral: str) -> Node:
        """What follows `_`: the base of a numeral, or part of a name."""
        index = self.index_text()
        match node:
            case Num():
                base = SMALL.get(index) or (int(index) if index.isdigit() else 0)
                if not numeral.replace(",", "").replace(".", "", 1).isdigit() or not 2 <= base <= 36:
                    raise ParseError("base")
                return Based(numeral.replace(",", ""), base)
            case Sym(name):
                return Sym(f"{name}_{index}")
            case Apply("pow", (Sym(name), exponent)):  # v^2_0
                return power(Sym(f"{name}_{index}"), exponent)
        return Apply("index", (node, Sym(index)))

    def index_text(self) -> str:
        if self.op() != "{":
            return self.take().text
        self.take()
        depth = 1
        parts: list[str] = []
        while True:
            token = self.take()
            if token.kind == "op" and token.text in ("{", "}"):
                depth += 1 if token.text == "{" else -1
                if depth == 0:
                    return "".join(parts)
            else:
                parts.append(token.text)

    def is_application(self, node: Sym) -> bool:
        """`f(x + 1)`, `Phi(x, y)` and, left of an equals sign, `P(A)`; elsewhere a bracket after a name multiplies."""
        if node.name.rstrip("'") in ("f", "g"):
            return True
        depth, simple = 0, node.name not in ("x", "y", "z")
        for ahead in range(len(self.stream) - self.at):
            sign = self.op(ahead)
            depth += (sign in CLOSING) - (sign in CLOSING.values())
            if depth == 0:
                return simple and ahead > 1 and self.op(ahead + 1) in ("=", "~")
            if depth == 1 and sign in (",", ";"):
                return True
            simple = simple and (ahead == 0 or self.kind(ahead) in ("sym", "num", "run", "word"))
        return False

    # -- primaries

    def primary(self) -> Node:
        self.descend()
        node = self.primary_inside(self.take())
        self.depth -= 1
        return node

    def primary_inside(self, token: Token) -> Node:
        match token.kind:
            case "num":
                return Num(literal_value(token.text))
            case "sym":
                return EMPTY_SET if token.text == "∅" else self.named(token.text)
            case "run":
                return product(*(Sym(letter) for letter in token.text))
            case "word":
                return Sym(token.text)
            case "fn":
                return self.function(token.text)
            case "cmd":
                return self.macro(token.text)
        if token.text in MONEY:
            self.money = token.text
            return self.mixed_number() or self.factor()
        if token.text == "dots":
            return Sym("…")
        if token.text == "|":
            return self.absolute()
        if token.text in CLOSING:
            self.at -= 1
            return self.bracketed()
        if token.text == "]":
            return self.outward_interval()
        raise ParseError(f"unexpected {token.text}")

    def named(self, name: str) -> Node:
        """A name; `Delta x` and `angle ABC` are one name each."""
        following = self.peek()
        if (
            name in ("Delta", "angle", "triangle", "measuredangle")
            and following
            and following.kind in ("sym", "run", "word")
        ):
            while (
                (following := self.peek())
                and following.kind in ("sym", "run", "word")
                and following.text not in units.SHORT
            ):
                name += " " + self.take().text
                if name.startswith("Delta"):
                    break
        return Sym(name)


def root(argument: Node, degree: Node = number(2)) -> Node:  # noqa: B008 - a frozen value
    return power(argument, quotient(number(1), degree))


def primed(node: Node, marks: str) -> Node:
    match node:
        case Sym(name):
            return Sym(name + marks)
        case Apply("index", (inner, Sym(index))):
            return Apply("index", (inner, Sym(index + marks)))
    raise ParseError("a prime on a value")
