"""Functions and LaTeX constructions: `sin`, `log_2`, `\\frac`, `\\sqrt`, `\\sum`, matrices and systems."""

from posttrain.rewards.answers import units
from posttrain.rewards.answers.factors import root
from posttrain.rewards.answers.grammar import Grammar
from posttrain.rewards.answers.lexer import ParseError, Token
from posttrain.rewards.answers.linear import product
from posttrain.rewards.answers.tree import (
    MINUS_ONE,
    Apply,
    E,
    Interval,
    Listing,
    Matrix,
    Node,
    Num,
    Relation,
    Sym,
    Tuple,
    number,
    power,
    quotient,
)

INVERSE = {
    "sin": "arcsin", "cos": "arccos", "tan": "arctan", "cot": "arccot", "sec": "arcsec", "csc": "arccsc",
    "sinh": "arsinh",
    "cosh": "arcosh", "tanh": "artanh",
}  # fmt: skip
SEVERAL_ARGUMENTS = frozenset(("min", "max", "gcd", "lcm", "binom"))
MATRICES = frozenset("matrix pmatrix bmatrix Bmatrix vmatrix Vmatrix smallmatrix array".split())
SYSTEMS = frozenset("cases rcases dcases aligned align gathered gather split eqnarray equation".split())
MOST_CELLS = 400


class Macros(Grammar):
    # -- functions

    def function(self, name: str) -> Node:
        exponent: Node | None = None
        base: Node | None = None
        while self.op() in ("^", "_"):
            if self.take().text == "^":
                exponent = self.script()
            else:
                base = self.script()
        if name in SEVERAL_ARGUMENTS:
            node: Node = Apply(name, self.several_arguments())
        else:
            node = applied(name, self.function_argument(), base)
        if exponent is None:
            return node
        if exponent == MINUS_ONE and isinstance(node, Apply) and node.op in INVERSE:
            return Apply(INVERSE[node.op], node.args)
        return power(node, exponent)

    def several_arguments(self) -> tuple[Node, ...]:
        argument = self.bracketed() if self.op() in ("(", "{|", "{", "[") else self.function_argument()
        match argument:
            case Tuple(items) | Listing(items):
                return items
            case Interval(low, high):
                return (low, high)
        return (argument,)

    def script(self) -> Node:
        """An index or exponent on a function: `\\log_2 8`, `\\sin^{-1} x`, and in LaTeX `\\log_28` is log_2 of 8."""
        token = self.peek()
        if token and token.kind == "num" and self.latex and len(token.text) > 1:
            return self.one_digit()
        return self.factor() if self.op() == "-" else self.primary()

    def function_argument(self) -> Node:
        """A bracket, or the factors up to the next sign or function: `sin 2x cos y` is sin(2x) cos(y)."""
        if self.op() in ("(", "{", "[", "|"):
            node = self.primary()
            degrees = self.op() == "°" or (self.op() == "^" and "°" in (self.op(1), self.op(2)))
            return self.postfix(node) if degrees else node
        node = self.factor()
        while (token := self.peek()) and (token.kind in ("num", "sym", "run") or self.is_macro("frac", "sqrt")):
            if token.upright or token.text in units.SHORT or (token.kind == "num" and isinstance(node, Num)):
                break
            node = product(node, self.factor())
        return node

    # -- LaTeX constructions

    def macro(self, name: str) -> Node:
        match name:
            case "frac":
                top = self.argument()
                return quotient(top, self.argument())
            case "binom":
                top = self.argument()
                return Apply("binom", (top, self.argument()))
            case "sqrt":
                return self.square_root()
            case "overline":
                return self.overlined()
            case "begin":
                return self.environment()
            case "sum" | "prod" | "int" | "lim":
                return self.big_operator(name)
        raise ParseError(f"\\{name}")

    def argument(self) -> Node:
        """An argument: a group or a single token; of a number it is one digit, so `\\frac12` is one half."""
        if self.op() == "{":
            return self.bracketed()
        if self.kind() == "num":
            return self.one_digit()
        if self.kind() in ("sym", "cmd", "fn"):
            return self.primary()
        raise ParseError("argument")

    def one_digit(self) -> Node:
        token = self.take()
        if not token.text[0].isdigit():
            raise ParseError("argument")
        if len(token.text) > 1:
            self.at -= 1
            self.stream[self.at] = Token("num", token.text[1:], False)
        return number(int(token.text[0]))

    def square_root(self) -> Node:
        degree: Node = number(2)
        if self.op() == "[":
            self.take()
            degree = self.sum()
            self.expect("]")
        if self.op() in ("{", "("):
            return root(self.bracketed(), degree)
        if self.kind() in ("num", "sym", "cmd"):  # \sqrt13 means what its writer meant, not what TeX sets
            return root(self.primary(), degree)
        raise ParseError("root of nothing")

    def overlined(self) -> Node:
        self.expect("{")
        name = ""
        while self.op() != "}":
            name += self.take().text
        self.take()
        return Sym(f"overline {name}" if name.isdigit() else name)

    def big_operator(self, name: str) -> Node:
        low: Node | None = None
        high: Node | None = None
        while self.op() in ("_", "^"):
            if self.take().text == "_":
                low = self.bracketed() if self.op() == "{" else self.primary()
            else:
                high = self.bracketed() if self.op() == "{" else self.script()
        match name, low:
            case "sum" | "prod", Relation((Sym() as index, first), ("=",)) if high is not None:
                return Apply(name, (index, first, high, self.term()))
            case "lim", Relation((Sym() as variable, target), ("->",)) if high is None:
                return Apply("lim", (variable, target, self.term()))
            case "int", _ if low is not None and high is not None:
                return integral(self.term(), low, high)
        raise ParseError(f"\\{name} without bounds")

    # -- environments

    def environment(self) -> Node:
        name = self.environment_name()
        if name == "array" and self.op() == "{":
            self.index_text()  # the column format
        if name in MATRICES:
            return self.matrix(name)
        if name in SYSTEMS:
            return self.system(name)
        raise ParseError(f"environment {name}")

    def environment_name(self) -> str:
        self.expect("{")
        name = ""
        while self.op() != "}":
            name += self.take().text
        self.take()
        return name.rstrip("*")

    def rows(self) -> list[list[Node]]:
        rows: list[list[Node]] = [[]]
        while not self.is_macro("end"):
            if self.op() == "\\\\":
                self.take()
                rows.append([])
            elif self.op() in ("&", ",", ";"):
                self.take()
            else:
                rows[-1].append(self.item())
        self.take()
        self.environment_name()
        return [row for row in rows if row]

    def matrix(self, name: str) -> Node:
        rows = self.rows()
        if not rows or len({len(row) for row in rows}) != 1 or len(rows) * len(rows[0]) > MOST_CELLS:
            raise ParseError("ragged matrix")
        grid = Matrix(tuple(tuple(row) for row in rows))
        return Apply("det", (grid,)) if name == "vmatrix" else grid

    def system(self, name: str) -> Node:
        rows = self.rows()
        if "cases" in name and any(len(row) > 1 for row in rows):
            return Apply("cases", tuple(Tuple(tuple(row)) for row in rows))
        items = tuple(node for row in rows for node in row)
        if not items:
            raise ParseError("empty system")
        return items[0] if len(items) == 1 else Listing(items, "and")


def integral(body: Node, low: Node, high: Node) -> Node:
    """`f d x` from low to high, where the body was read as a product."""
    match body:
        case Apply("mul", (*factors, Sym("d"), Sym() as variable)):
            return Apply("int", (variable, low, high, product(number(1), *factors)))
    raise ParseError("integral over nothing")


def applied(name: str, argument: Node, base: Node | None) -> Node:
    """A function of one argument; logarithms become natural ones, roots and exp become powers."""
    match name:
        case "log" | "lg":
            return quotient(Apply("ln", (argument,)), Apply("ln", (base if base is not None else number(10),)))
        case _ if base is not None:
            raise ParseError("index on a function")
        case "sqrt":
            return root(argument)
        case "cbrt":
            return root(argument, number(3))
        case "exp":
            return power(E, argument)
        case "coth":
            return quotient(Apply("cosh", (argument,)), Apply("sinh", (argument,)))
    return Apply(name, (argument,))
