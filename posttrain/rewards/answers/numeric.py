"""Arbitrary-precision values of expressions at points, and equality of expressions by them.

Radicals, logarithms and trigonometry leave the exact domain. There two expressions are compared at rational points:
first at moderate precision, where a difference above the rounding error decides `different`; what agrees is computed
again with enough digits that the literals of both sides, their largest and their smallest intermediate value are all
resolved, so a rounded value is never its exact one.
"""

import functools
import hashlib
import math
import random
import threading
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

from posttrain.rewards.answers.budget import spend
from posttrain.rewards.answers.tree import CONSTANTS, Apply, Node, Num, Sym, variables, walk

WORKING_BITS = 200
GUARD_BITS = 60
MOST_BITS = 24_000
LONGEST_SUM = 300
_local = threading.local()

Value = Any  # an mpf or mpc of this thread's context
Point = dict[str, Fraction]


class Undefined(Exception):
    """No real (or no finite) value at this point."""


class Unknown(Exception):
    """Nothing we can evaluate, or too large to."""


def context() -> Any:
    """This thread's own mpmath context: precision is state, and threads must not share it."""
    if not hasattr(_local, "context"):
        from mpmath.ctx_mp import MPContext  # type: ignore[import-untyped]

        _local.context = MPContext()
    return _local.context


_RANGES = ((0.2, 3), (-3, 3), (1, 9), (-4, -0.1), (0, 1), (-1, 1), (3, 12), (-9, 9))


def points(names: Iterable[str], integers: bool = False) -> list[Point]:
    """Fixed pseudo-random rational points: positive, of both signs, large, negative, small; or small positive integers.

    A name has the same value at the i-th point whatever other names there are.
    """
    names = list(names)
    return [{name: _coordinate(i, name, integers) for name in names} for i in range(len(_RANGES) if names else 1)]


@functools.lru_cache(maxsize=4096)
def _coordinate(i: int, name: str, integers: bool) -> Fraction:
    generator = random.Random(f"{i} {name}")
    if integers:
        return Fraction(generator.randint(1, 4) + i)
    return Fraction(round(generator.uniform(*_RANGES[i]) * 9973), 9973)


class Evaluation:
    """One evaluation: remembers how large and how small its intermediate values became (`peak`, in bits)."""

    def __init__(self, point: Point, bits: int, real: bool):
        self.mp = context()
        self.mp.prec = bits
        self.bits = bits
        self.point: dict[str, Value] = {name: self.exact(value) for name, value in point.items()}
        self.real = real
        self.peak = 0
        self.cost = 20 + bits * bits // 20_000  # of an elementary function

    def exact(self, value: Fraction) -> Value:
        return self.mp.mpf(value.numerator) / value.denominator

    def value(self, node: Node) -> Value:
        spend(self.cost if isinstance(node, Apply) and node.op not in ("add", "mul") else 1 + self.cost // 50)
        result = self.noted(self.raw(node))
        if not self.mp.isfinite(result):
            raise Undefined
        return result

    def noted(self, value: Value) -> Value:
        if value:
            magnitude = self.mp.mag(value)
            if self.mp.isfinite(magnitude):
                self.peak = max(self.peak, abs(int(magnitude)))
        if self.peak > MOST_BITS:
            raise Unknown
        return value

    def is_zero(self, value: Value) -> bool:
        return bool(not value or self.mp.mag(value) < self.peak + GUARD_BITS - self.bits)

    def raw(self, node: Node) -> Value:
        if isinstance(node, Num):
            return self.exact(node.value)
        if isinstance(node, Sym):
            return self.name(node.name)
        if not isinstance(node, Apply):
            raise Unknown
        match node.op, node.args:
            case "add", args:
                return sum((self.value(a) for a in args), start=self.mp.zero)
            case "mul", args:
                return math.prod((self.value(a) for a in args), start=self.mp.one)
            case "pow", (base, exponent):
                return self.power(base, exponent)
            case "deg", (x,):
                return self.value(x) * self.mp.pi / 180
            case "percent", (x,):
                return self.value(x) / 100
            case (("sum" | "prod"), (Sym(name), low, high, body)):
                return self.big(node.op, name, low, high, body)
            case op, args if op.endswith("()") or op == "index":
                return self.unknown_function(op, args)
            case (("min" | "max"), args):
                return (min if node.op == "min" else max)(self.as_real(self.value(a)) for a in args)
            case (("gcd" | "lcm"), args):
                integers = [self.integer(a) for a in args]
                return self.mp.mpf(math.gcd(*integers) if node.op == "gcd" else math.lcm(*integers))
            case "binom", (n, k):
                return self.small(self.mp.binomial, self.value(n), self.value(k))
            case op, (x,):
                return self.function(op, self.value(x))
        raise Unknown

    def name(self, name: str) -> Value:
        if name == "pi":
            return +self.mp.pi
        if name == "e":
            return +self.mp.e
        if name == "i":
            if self.real:
                raise Undefined
            return self.mp.j
        if name not in self.point:
            raise Unknown
        return self.point[name]

    def function(self, op: str, x: Value) -> Value:
        mp = self.mp
        match op:
            case "abs":
                return abs(x)
            case "ln":
                if self.is_zero(x) or (self.real and x < 0):
                    raise Undefined
                return mp.log(x)
            case "sin" | "cos" | "tan" | "cot" | "sec" | "csc":
                if mp.mag(x) > self.bits // 2:
                    raise Unknown
                if (op in ("tan", "sec") and self.is_zero(mp.cos(x))) or (
                    op in ("cot", "csc") and self.is_zero(mp.sin(x))
                ):
                    raise Undefined
                return getattr(mp, op)(x)
            case "sinh" | "cosh" | "tanh" | "coth" | "arsinh" | "arcosh" | "artanh":
                if mp.mag(x) > 14:
                    raise Unknown
                name = {"arsinh": "asinh", "arcosh": "acosh", "artanh": "atanh"}.get(op, op)
                return self.kept_real(getattr(mp, name)(x))
            case "arcsin" | "arccos" | "arctan" | "arccot" | "arcsec" | "arccsc":
                if op in ("arcsec", "arccsc", "arccot") and self.is_zero(x):
                    raise Undefined
                return self.kept_real(getattr(mp, "a" + op.removeprefix("arc"))(x))
            case "factorial":
                return self.small(mp.factorial, x)
            case "factorial2":
                return self.small(mp.fac2, x)
            case "floor" | "ceil":
                x = self.as_real(x)
                nearest = mp.nint(x)
                if self.is_zero(x - nearest):
                    return nearest
                return mp.floor(x) if op == "floor" else mp.ceil(x)
            case "Re":
                return mp.re(x)
            case "Im":
                return mp.im(x)
        raise Unknown

    def small(self, function: Callable[..., Value], *arguments: Value) -> Value:
        if any(self.mp.mag(x) > 12 for x in arguments):
            raise Unknown
        try:
            return function(*arguments)
        except ValueError as error:  # a pole
            raise Undefined from error

    def kept_real(self, value: Value) -> Value:
        if self.real and isinstance(value, self.mp.mpc):
            raise Undefined
        return value

    def as_real(self, value: Value) -> Value:
        if isinstance(value, self.mp.mpc):
            if not self.is_zero(value.imag):
                raise Undefined
            return value.real
        return value

    def integer(self, node: Node) -> int:
        value = self.as_real(self.value(node))
        nearest = self.mp.nint(value)
        if not self.is_zero(value - nearest):
            raise Undefined
        return int(nearest)

    def power(self, base: Node, exponent: Node) -> Value:
        mp = self.mp
        x = self.value(base)
        if isinstance(exponent, Num):
            p, q = exponent.value.numerator, exponent.value.denominator
            if self.is_zero(x):
                if p <= 0:
                    raise Undefined
                return mp.mpf(0)
            self.check_size(x, abs(p) / q)
            if q == 1:
                return mp.power(x, p)
            if isinstance(x, mp.mpf) and x < 0:
                if self.real and q % 2 == 0:
                    raise Undefined
                if self.real:  # the real root: (-8)^(1/3) = -2
                    return (-1) ** p * mp.power(mp.root(-x, q), p)
            return mp.power(mp.root(x, q), p) if q < 1000 else mp.power(x, self.exact(exponent.value))
        y = self.value(exponent)
        if self.is_zero(x):
            if isinstance(y, mp.mpc) or y <= 0:
                raise Undefined
            return mp.mpf(0)
        if self.real and x < 0:
            nearest = mp.nint(y)
            if not self.is_zero(y - nearest):
                raise Undefined
            y = nearest
        if mp.mag(y) > 60:
            raise Unknown
        self.check_size(x, float(abs(y)))
        return mp.power(x, y)

    def check_size(self, x: Value, exponent: float) -> None:
        if exponent * max(1, abs(int(self.mp.mag(x)))) > MOST_BITS * 2:
            raise Unknown

    def big(self, op: str, name: str, low: Node, high: Node, body: Node) -> Value:
        first, last = self.integer(low), self.integer(high)
        if last - first > LONGEST_SUM:
            raise Unknown
        outer = self.point.get(name)
        terms = []
        for k in range(first, last + 1):
            self.point[name] = self.mp.mpf(k)
            terms.append(self.value(body))
        if outer is None:
            self.point.pop(name, None)
        else:
            self.point[name] = outer
        return sum(terms, start=self.mp.zero) if op == "sum" else math.prod(terms, start=self.mp.one)

    def unknown_function(self, op: str, args: tuple[Node, ...]) -> Value:
        """An uninterpreted function: any value, but always the same one at the same arguments."""
        parts = [op]
        for a in args:
            if op == "index" and isinstance(a, Sym) and a.name not in self.point:
                parts.append(a.name)
            else:
                parts.append(self.mp.nstr(self.value(a), 25, strip_zeros=False))
        digest = hashlib.sha256(" ".join(parts).encode()).digest()
        return self.mp.mpf(int.from_bytes(digest[:8], "big")) / 2**62


def literal_bits(node: Node) -> int:
    return sum(
        n.value.numerator.bit_length() + n.value.denominator.bit_length() for n in walk(node) if isinstance(n, Num)
    )


def agree(pairs: Callable[[Evaluation], tuple[Value, Value]], point: Point, real: bool, literals: int) -> bool:
    """Whether the two values agree at one point; raises Undefined or Unknown."""
    bits = WORKING_BITS
    for last in (False, True):
        evaluation = Evaluation(point, bits, real)
        a, b = pairs(evaluation)
        rest = abs(a - b)
        if rest and evaluation.mp.mag(rest) > evaluation.peak + GUARD_BITS - bits:
            return False
        if last:
            return True
        bits = WORKING_BITS + 2 * GUARD_BITS + 3 * evaluation.peak + 2 * literals
        if bits > MOST_BITS * 2:
            raise Unknown
    raise AssertionError("unreachable")


def same_value(a: Node, b: Node) -> bool | None:
    """Whether two expressions are equal wherever both are defined; None where nothing can be said."""
    literals = literal_bits(a) + literal_bits(b)
    names = variables(a) | variables(b)
    return decide(lambda at: (at.value(a), at.value(b)), names, literals, needs_integers(a) or needs_integers(b))


def needs_integers(node: Node) -> bool:
    return any(isinstance(n, Apply) and n.op in ("sum", "prod", "gcd", "lcm") for n in walk(node))


def decide(
    pair: Callable[[Evaluation], tuple[Value, Value]], names: Iterable[str], literals: int, integers: bool
) -> bool | None:
    """Agreement at every point where both are real; where that is nowhere, at every complex one."""
    chosen = points(names, integers)
    try:
        for real in (True, False):
            agreed = 0
            for point in chosen:
                try:
                    if not agree(pair, point, real, literals):
                        return False
                    agreed += 1
                except (Undefined, ZeroDivisionError):
                    continue
            if agreed >= min(2, len(chosen)):
                return True
    except (Unknown, ValueError, OverflowError, TypeError, NotImplementedError, RecursionError):
        return None
    return None


def constant(node: Node, bits: int = WORKING_BITS) -> Value | None:
    """The real value of an expression without names, None where it has none."""
    if variables(node) - CONSTANTS:
        return None
    try:
        evaluation = Evaluation({}, bits, True)
        return evaluation.value(node)
    except (Undefined, Unknown, ZeroDivisionError, ValueError, OverflowError, TypeError, NotImplementedError):
        return None
