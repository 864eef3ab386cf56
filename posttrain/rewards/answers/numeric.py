"""The value of an expression at a point, in arbitrary precision, with a bound on its error.

Every value comes with the exponent of a bound on its absolute error (`error`: it is within 2^error of the truth),
propagated to first order through each operation. So a zero is told from a small number, and what cancellation has
destroyed is never taken for agreement.
"""

import hashlib
import math
import threading
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

from posttrain.rewards.answers.budget import spend
from posttrain.rewards.answers.tree import Apply, Node, Num, Sym

GUARD = 4  # bits between the error bound and what counts as different from zero
EXACT = -(10**9)  # the error of what is not rounded, and the size of zero
MOST_BITS = 24_000  # of the size of an intermediate value, either way
MOST_GAMMA_BITS = 700
LONGEST_SUM = 300

Value = Any  # an mpf or mpc of this thread's context


class Undefined(Exception):
    """No real (or no finite) value at this point."""


class Unknown(Exception):
    """Nothing that we can evaluate, or too large to."""


class Uncertain(Exception):
    """More digits are needed to tell a value from zero."""


# How an evaluation can fail; mpmath says it with ordinary errors.
NO_VALUE = (Undefined, Unknown, Uncertain, ZeroDivisionError, ValueError, OverflowError, TypeError, NotImplementedError)

_local = threading.local()


def context() -> Any:
    """This thread's own mpmath context: its precision is state, and threads must not share it."""
    if not hasattr(_local, "context"):
        from mpmath.ctx_mp import MPContext  # type: ignore[import-untyped]

        _local.context = MPContext()
    return _local.context


class Evaluation:
    """One evaluation at one precision.

    `error` belongs to the value found last. `lost` is the most bits, counted from the unit, that any error took;
    `depth` is how far below the unit the smallest meaningful value lies. Where a value may be zero, only the `final`
    evaluation says that it is.
    """

    def __init__(self, point: dict[str, Fraction], bits: int, real: bool, final: bool = False):
        self.mp = context()
        self.mp.prec = self.bits = bits
        self.real = real
        self.final = final
        self.point: dict[str, Value] = {name: self.exact(value) for name, value in point.items()}
        self.error = EXACT
        self.lost = self.depth = 0
        self.cost = 20 + bits * bits // 20_000  # of an elementary function, in units of the budget

    # -- sizes and errors

    def size(self, x: Value) -> int:
        """|x| < 2^size, and not much less."""
        return int(self.mp.mag(x)) if x else EXACT

    def exact(self, value: Fraction) -> Value:
        return self.mp.mpf(value.numerator) / value.denominator

    def is_zero(self, x: Value, error: int) -> bool:
        """Whether a value with that error is zero."""
        if self.size(x) > error + GUARD:
            return False
        if not self.final and max(self.size(x), error) > EXACT:
            raise Uncertain
        return True

    def with_error(self, x: Value, error: int) -> Value:
        self.error = error
        return x

    # -- expressions

    def value(self, node: Node) -> Value:
        """The value of a tree; raises one of NO_VALUE."""
        op = node.op if isinstance(node, Apply) else "add"
        spend(4 + self.cost // {"add": 50, "mul": 50, "pow": 8}.get(op, 1))
        x = self.raw(node)
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

    def raw(self, node: Node) -> Value:
        match node:
            case Num(value):
                fits = value.denominator == 1 and value.numerator.bit_length() <= self.bits
                x = self.exact(value)
                return self.with_error(x, EXACT if fits else self.size(x) - self.bits + 2)
            case Sym(name):
                x = self.name(name)
                return self.with_error(x, self.size(x) - self.bits + 2)
            case Apply("add", args):
                return self.total((self.value(a), self.error) for a in args)
            case Apply("mul", args):
                return self.product((self.value(a), self.error) for a in args)
            case Apply("pow", (base, exponent)):
                return self.power(base, exponent)
            case Apply("deg", (x,)):
                return self.value(x) * self.mp.pi / 180
            case Apply("percent", (x,)):
                return self.value(x) / 100
            case Apply("sum" | "prod" as op, (Sym(name), low, high, body)):
                terms = self.terms(name, low, high, body)
                return self.total(terms) if op == "sum" else self.product(terms)
            case Apply(op, args) if op.endswith("()") or op == "index":
                return self.unknown_function(op, args)
            case Apply("min" | "max" as op, args):
                found = [(self.as_real(self.value(a)), self.error) for a in args]
                return self.with_error((min if op == "min" else max)(x for x, _ in found), max(e for _, e in found))
            case Apply("gcd" | "lcm" as op, args):
                integers = [self.integer(a) for a in args]
                return self.with_error(self.mp.mpf((math.gcd if op == "gcd" else math.lcm)(*integers)), EXACT)
            case Apply("binom", (n, k)):
                return self.counted(self.mp.binomial, (self.value(n), self.error), (self.value(k), self.error))
            case Apply("factorial" | "factorial2" as op, (x,)):
                return self.counted(
                    self.mp.factorial if op == "factorial" else self.mp.fac2, (self.value(x), self.error)
                )
            case Apply(op, (x,)):
                return self.function(op, self.value(x), self.error)
        raise Unknown

    def name(self, name: str) -> Value:
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

    def total(self, terms: Iterable[tuple[Value, int]]) -> Value:
        x, error, count = self.mp.zero, EXACT, 1
        for y, its_error in terms:
            x += y
            error = max(error, its_error, max(self.size(x), self.size(y)) - self.bits)
            count += 1
        return self.with_error(x, error + count.bit_length())

    def product(self, factors: Iterable[tuple[Value, int]]) -> Value:
        x, error = self.mp.one, EXACT
        for y, its_error in factors:
            error = max(self.size(x) + its_error, self.size(y) + error, error + its_error, EXACT) + 2
            x *= y
            error = max(error, self.size(x) - self.bits)
        return self.with_error(x, error)

    def terms(self, name: str, low: Node, high: Node, body: Node) -> list[tuple[Value, int]]:
        """The values of a body while its index runs."""
        first, last = self.integer(low), self.integer(high)
        if last - first > LONGEST_SUM:
            raise Unknown
        outer = dict(self.point)
        found = []
        for k in range(first, last + 1):
            self.point[name] = self.mp.mpf(k)
            found.append((self.value(body), self.error))
        self.point = outer
        return found

    def power(self, base: Node, exponent: Node) -> Value:
        mp = self.mp
        x, x_error = self.value(base), self.error
        y, y_error = self.value(exponent), self.error
        if self.is_zero(x, x_error):
            if isinstance(y, mp.mpc) or y <= 0:
                raise Undefined
            return self.with_error(mp.zero, EXACT if x_error == EXACT else int((x_error + 2 * GUARD) * y))
        x_size, y_size = self.size(x), self.size(y)
        if y_size > 60 or abs(y) * max(1, abs(x_size)) > 2 * MOST_BITS:
            raise Unknown
        log_size = (abs(x_size) + 2).bit_length()
        growth = max(y_size + x_error - x_size + 1, log_size + y_error)  # of the error, relative to the result
        if growth > -GUARD:
            raise Unknown if self.final else Uncertain
        result = self.raised(x, y, y_error, exponent)
        return self.with_error(result, max(self.size(result) + growth + 2, EXACT))

    def raised(self, x: Value, y: Value, y_error: int, exponent: Node) -> Value:
        """x^y with x away from zero. In real numbers odd roots of negative numbers exist: (-8)^(1/3) = -2."""
        mp = self.mp
        if isinstance(exponent, Num) and not isinstance(x, mp.mpc):
            p, q = exponent.value.numerator, exponent.value.denominator
            if q == 1:
                return mp.power(x, p)
            if x > 0 and q < 1_000:
                return mp.power(mp.root(x, q), p)
            if self.real and q % 2:
                return (-1) ** p * mp.power(mp.root(-x, q), p)
        if self.real and x < 0:
            y = self.nearest(y, y_error)
        return mp.power(x, y)

    # -- functions

    def function(self, op: str, x: Value, error: int) -> Value:
        mp = self.mp
        match op:
            case "abs":
                return abs(x)
            case "ln":
                if self.is_zero(x, error) or (self.real and x < 0):
                    raise Undefined
                return self.with_error(mp.log(x), error - self.size(x) + 2)
            case "sin" | "cos" | "tan" | "cot" | "sec" | "csc":
                return self.trigonometric(op, x, error)
            case "sinh" | "cosh" | "tanh":
                if self.size(x) > 14:
                    raise Unknown
                result = getattr(mp, op)(x)
                return self.with_error(result, error + max(self.size(result), 0) + 2)
            case "arctan" | "arccot" | "arsinh":
                if op == "arccot" and self.is_zero(x, error):
                    raise Undefined
                return self.with_error(getattr(mp, _MPMATH[op])(x), error + 1)
            case "arcsin" | "arccos" | "arcsec" | "arccsc" | "arcosh" | "artanh":
                return self.with_branch_points(op, x, error)
            case "floor" | "ceil":
                x = self.as_real(x)
                nearest = mp.nint(x)
                found = nearest if self.is_zero(x - nearest, error) else getattr(mp, op)(x)
                return self.with_error(found, EXACT)
            case "Re" | "Im":
                return mp.re(x) if op == "Re" else mp.im(x)
        raise Unknown

    def trigonometric(self, op: str, x: Value, error: int) -> Value:
        mp = self.mp
        if self.size(x) > self.bits // 2 or error > -GUARD:
            raise Unknown if self.final else Uncertain
        if op in ("sin", "cos"):
            return getattr(mp, op)(x)
        below = mp.cos(x) if op in ("tan", "sec") else mp.sin(x)
        below_error = max(error, self.size(below) - self.bits)
        if self.is_zero(below, below_error):
            raise Undefined
        return self.with_error(getattr(mp, op)(x), below_error - 2 * self.size(below) + 4)

    def with_branch_points(self, op: str, x: Value, error: int) -> Value:
        """Inverse functions that end, with a vertical tangent or a pole, at -1 and 1."""
        mp = self.mp
        if op in ("arcsec", "arccsc"):
            if self.is_zero(x, error):
                raise Undefined
            x, error = 1 / x, error - 2 * self.size(x) + 4
            op = "arccos" if op == "arcsec" else "arcsin"
        gap = 1 - x * x
        if self.is_zero(gap, error + max(self.size(x), 0) + 2):
            if op == "artanh":
                raise Undefined
            at_end = getattr(mp, _MPMATH[op])(mp.nint(mp.re(x)))
            return self.with_error(at_end, EXACT if error == EXACT else error // 2 + GUARD)
        result = getattr(mp, _MPMATH[op])(x)
        if self.real and isinstance(result, mp.mpc):
            raise Undefined
        steepness = 1 - self.size(gap) if op == "artanh" else max(0, 1 - self.size(gap)) // 2 + 1
        return self.with_error(result, error + max(steepness, 0) + 1)

    def counted(self, function: Callable[..., Value], *arguments: tuple[Value, int]) -> Value:
        """A factorial or binomial; of what is no integer it is a gamma function, which is slow at high precision."""
        mp = self.mp
        if any(self.size(x) > 12 for x, _ in arguments):
            raise Unknown
        nearest = [mp.nint(mp.re(x)) for x, _ in arguments]
        if all(self.is_zero(x - n, error) for (x, error), n in zip(arguments, nearest, strict=True)):
            return self.with_error(self.at_no_pole(function, *nearest), EXACT)
        spend(100 * self.cost)
        if self.bits > MOST_GAMMA_BITS:
            raise Unknown
        result = self.at_no_pole(function, *(x for x, _ in arguments))
        return self.with_error(result, max(error for _, error in arguments) + max(self.size(result), 0) + 10)

    def at_no_pole(self, function: Callable[..., Value], *arguments: Value) -> Value:
        try:
            return function(*arguments)
        except ValueError as error:
            raise Undefined from error

    def unknown_function(self, op: str, args: tuple[Node, ...]) -> Value:
        """An uninterpreted function: any value, but always the same one at the same arguments."""
        parts = [op]
        for a in args:
            if op == "index" and isinstance(a, Sym) and a.name not in self.point:
                parts.append(a.name)
            else:
                x = self.value(a)
                parts.append("0" if self.is_zero(x, self.error) else self.mp.nstr(x, 25))
        digest = hashlib.sha256(" ".join(parts).encode()).digest()
        return self.with_error(self.mp.mpf(int.from_bytes(digest[:8], "big")) / 2**62, EXACT)

    # -- kinds of numbers

    def as_real(self, x: Value) -> Value:
        """The value found last as a real number."""
        if isinstance(x, self.mp.mpc):
            if not self.is_zero(x.imag, self.error):
                raise Undefined
            return x.real
        return x

    def integer(self, node: Node) -> int:
        return int(self.nearest(self.as_real(self.value(node)), self.error))

    def nearest(self, x: Value, error: int) -> Value:
        """The integer that a value is; Undefined where it is none."""
        nearest = self.mp.nint(x)
        if not self.is_zero(x - nearest, error):
            raise Undefined
        return nearest


_MPMATH = {
    "arcsin": "asin", "arccos": "acos", "arctan": "atan", "arccot": "acot", "arsinh": "asinh", "arcosh": "acosh",
    "artanh": "atanh",
}  # fmt: skip
