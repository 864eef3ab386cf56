"""What stands beside a value: units, currencies, degree and percent signs, moduli."""

from posttrain.rewards.answers import units
from posttrain.rewards.answers.cursor import MONEY
from posttrain.rewards.answers.lexer import ParseError, Token
from posttrain.rewards.answers.linear import product
from posttrain.rewards.answers.macros import Macros
from posttrain.rewards.answers.number_words import MAGNITUDES
from posttrain.rewards.answers.tree import MINUS_ONE, Apply, Node, Num, Quantity, Sym, Words, add, mul, negative, number


class Measures(Macros):
    def __init__(self, stream: list[Token], latex: bool, trusted: bool):
        super().__init__(stream, latex)
        self.trusted = trusted

    def is_relation(self) -> bool:
        raise NotImplementedError

    def measure(self) -> Node:
        """A value and its unit; `2 hours 30 minutes` and `5 feet and 10 inches` are one value."""
        node = self.measured()
        while isinstance(node, Quantity) and node.unit in units.SUBDIVIDED:
            start = self.at
            self.at += self.op() == "and"
            part = self.measured() if self.kind() == "num" else None
            factor = units.conversion(part.unit, node.unit) if isinstance(part, Quantity) else None
            if not isinstance(part, Quantity) or factor is None or factor >= 1:
                self.at = start
                break
            node = Quantity(add(node.value, mul(number(factor), part.value)), node.unit)
        return node

    def measured(self) -> Node:
        outer, self.money = self.money, ""
        node = self.with_unit(self.union())
        self.money = outer
        return node

    def with_unit(self, node: Node) -> Node:
        unit = self.money
        for mark, name in (("deg", "deg"), ("percent", "%")):
            if (stripped := without_mark(node, mark)) is not None:
                node, unit = stripped, name
        pieces = self.unit_pieces(node)
        if isinstance(node, Num) and len(pieces) == 1 and pieces[0].lower() in units.MONTHS:
            return Words(f"{pieces[0].lower()} {node.value}")
        while pieces and isinstance(node, Num) and pieces[0].lower() in MAGNITUDES:
            node = Num(node.value * MAGNITUDES[pieces.pop(0).lower()])
        if pieces:
            if not units.acceptable(pieces, self.trusted):
                raise ParseError("text beside a value")
            unit = unit or units.unit_name(pieces)
        return Quantity(node, unit) if unit else node

    def unit_pieces(self, node: Node) -> list[str]:
        if self.op() == "mod" or (self.op() == "(" and self.op(1) == "mod"):
            return self.modulus()
        pieces: list[str] = []
        bracket = self.op() == "(" and self.kind(1) == "word"
        if bracket:
            self.take()
        while token := self.peek():
            if (
                token.kind == "word"
                or (token.kind == "run" and not self.is_relation())
                or (token.kind in ("sym", "fn") and (token.upright or pieces or self.is_letter_unit(node)))
                or (token.kind == "fn" and self.is_time_unit())
                or (token.kind == "op" and token.text in MONEY | {"%", "cent", "°"})
            ):
                pieces.append(self.take().text)
            elif pieces and token.kind == "op" and token.text in ("^", "/", "-", "*", "'") and self.peek(1):
                pieces.append(self.take().text)
                if self.op() == "{" or self.kind() == "num":
                    pieces.append(self.index_text())
            else:
                break
        if bracket:
            self.expect(")")
        return pieces

    def modulus(self) -> list[str]:
        bracket = self.op() == "("
        self.at += 1 + bracket
        modulus = self.primary()
        if bracket:
            self.expect(")")
        match modulus:
            case Num(value):
                return ["mod", str(value)]
            case Sym(name):
                return ["mod", name]
        raise ParseError("modulus")


def without_mark(node: Node, mark: str) -> Node | None:
    """`-5°` as -5 and `5° + 3°` as 5 + 3; None where the mark is not on the whole value."""
    match node:
        case Apply(op, (inner,)) if op == mark:
            return inner
        case Apply("mul", (sign, inner)) if sign == MINUS_ONE:
            stripped = without_mark(inner, mark)
            return None if stripped is None else negative(stripped)
        case Apply("mul", args):
            stripped = without_mark(args[-1], mark)
            return None if stripped is None else product(*args[:-1], stripped)
        case Apply("add", args):
            parts = [p for a in args if (p := without_mark(a, mark)) is not None]
            return Apply("add", tuple(parts)) if len(parts) == len(args) else None
        case Apply("pm" | "mp" as op, (inner,)):
            stripped = without_mark(inner, mark)
            return None if stripped is None else Apply(op, (stripped,))
    return None
