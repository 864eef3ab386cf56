"""Factors, by recursive descent.

factor   := sign? primary (`!` | `^` factor | `_` index | `'` | `°` | `%`)*
primary  := number | name | function | macro | bracket | `|` sum `|`
"""

from posttrain.rewards.answers import units
from posttrain.rewards.answers.brackets import Brackets
from posttrain.rewards.answers.cursor import CLOSING, MONEY
from posttrain.rewards.answers.lexer import ParseError, Token
from posttrain.rewards.answers.linear import opposite, product, transpose
from posttrain.rewards.answers.literals import literal_value
from posttrain.rewards.answers.number_words import SMALL
from posttrain.rewards.answers.tree import (
    EMPTY_SET,
    Apply,
    Based,
    Matrix,
    Node,
    Num,
    Sym,
    Tuple,
    number,
    power,
    quotient,
)

TRANSPOSED = (Sym("T"), Sym("top"), Sym("intercal"))


class Factors(Brackets):
    def mixed_number(self) -> Node | None:
        raise NotImplementedError

    def factor(self) -> Node:
        self.descend()
        sign = self.op()
        if sign in ("-", "+", "pm", "mp"):
            self.take()
            node = self.factor()
            node = opposite(node) if sign == "-" else node if sign == "+" else Apply(sign, (node,))
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
