"""The value of an expression at a point, in arbitrary precision, with a bound on its error."""

import hashlib
import math
from fractions import Fraction

from posttrain.rewards.answers.bounds import EXACT, GUARD, MOST_BITS, Uncertain, Undefined, Unknown, Value
from posttrain.rewards.answers.budget import spend
from posttrain.rewards.answers.functions import Functions
from posttrain.rewards.answers.tree import Apply, Node, Num, Sym

LONGEST_SUM = 300


class Evaluation(Functions):
    """One evaluation at one precision.

    `lost` is the most bits, counted from the unit, that any error took; `depth` is how far below the unit the smallest
    meaningful value lies.
    """

    def __init__(self, point: dict[str, Fraction], bits: int, real: bool, final: bool = False):
        super().__init__(bits, real, final)
        self.point: dict[str, Value] = {name: self.exact(value) for name, value in point.items()}
        self.lost = self.depth = 0

    def value(self, node: Node) -> Value:
        """The value of a tree; raises one of NO_VALUE."""
        op = node.op if isinstance(node, Apply) else "add"
        spend(4 + self.cost // {"add": 50, "mul": 50, "pow": 8}.get(op, 1))
        x = self._unrounded(node)
        if not self.mp.isfinite(x):
            raise Undefined
        size = self.size(x)
        if isinstance(node, Apply):
            self.error = max(self.error, size - self.bits + 2)
        if abs(size) > MOST_BITS and size != EXACT:
            raise Unknown
        self.lost = max(self.lost, self.error + self.bits)
        if EXACT < size > self.error + GUARD:
            self.depth = max(self.depth, -size)
        return x

    def _unrounded(self, node: Node) -> Value:
        """The value, before the rounding of the last operation is added to its error."""
        match node:
            case Num(value):
                fits = value.denominator == 1 and value.numerator.bit_length() <= self.bits
                x = self.exact(value)
                return self.with_error(x, EXACT if fits else self.size(x) - self.bits + 2)
            case Sym(name):
                x = self._named(name)
                return self.with_error(x, EXACT if self.mp.isint(x) else self.size(x) - self.bits + 2)
            case Apply("add", args):
                return self.total((self.value(a), self.error) for a in args)
            case Apply("mul", args):
                return self.product((self.value(a), self.error) for a in args)
            case Apply("pow", (base, exponent)):
                x, x_error = self.value(base), self.error
                y, y_error = self.value(exponent), self.error
                return self.power(x, x_error, y, y_error, exponent.value if isinstance(exponent, Num) else None)
            case Apply("deg", (angle,)):
                return self.value(angle) * self.mp.pi / 180
            case Apply("percent", (x,)):
                return self.value(x) / 100
            case Apply("sum" | "prod" as op, (Sym(name), low, high, body)):
                terms = self._terms(name, low, high, body)
                return self.total(terms) if op == "sum" else self.product(terms)
            case Apply(op, args) if op.endswith("()") or op == "index":
                return self._unknown_function(op, args)
            case Apply("min" | "max" as op, args):
                found = [(self.as_real(self.value(a), self.error), self.error) for a in args]
                return self.with_error((min if op == "min" else max)(x for x, _ in found), max(e for _, e in found))
            case Apply("gcd" | "lcm" as op, args):
                integers = [self._integer(a) for a in args]
                return self.with_error(self.mp.mpf((math.gcd if op == "gcd" else math.lcm)(*integers)), EXACT)
            case Apply("factorial" | "factorial2" | "binom" as op, args):
                return self.counted(op, *[(self.value(a), self.error) for a in args])
            case Apply(op, (argument,)):
                return self.function(op, self.value(argument), self.error)
        raise Unknown

    def _named(self, name: str) -> Value:
        match name:
            case "pi":
                return +self.mp.pi
            case "e":
                return +self.mp.e
            case "i" if self.real:
                raise Undefined
            case "i":
                return self.mp.j
        if name not in self.point:
            raise Unknown
        return self.point[name]

    def _integer(self, node: Node) -> int:
        nearest, is_integer = self.nearest(self.as_real(self.value(node), self.error), self.error)
        if not is_integer:
            raise Undefined
        return int(nearest)

    def _terms(self, name: str, low: Node, high: Node, body: Node) -> list[tuple[Value, int]]:
        """The values of a body while its index runs."""
        first, last = self._integer(low), self._integer(high)
        if last - first > LONGEST_SUM:
            raise Unknown
        outer = dict(self.point)
        found = []
        for k in range(first, last + 1):
            self.point[name] = self.mp.mpf(k)
            found.append((self.value(body), self.error))
        self.point = outer
        return found

    def _unknown_function(self, op: str, args: tuple[Node, ...]) -> Value:
        """An uninterpreted function: any value, but always the same one at the same arguments."""
        digits = self.bits // 8
        parts = [op]
        for a in args:
            if op == "index" and isinstance(a, Sym) and a.name not in self.point:
                parts.append(a.name)
                continue
            x = self.value(a)
            if self.is_zero(x, self.error):
                parts.append("0")
            elif self.size(x) - self.error < 4 * digits + GUARD:
                raise Uncertain
            else:
                parts.append(self.mp.nstr(x, digits))
        digest = hashlib.sha256(" ".join(parts).encode()).digest()
        return self.with_error(self.mp.mpf(int.from_bytes(digest[:8], "big")) / 2**62, EXACT)
