"""The value of an expression at a point, in arbitrary precision."""

import hashlib
import math
import threading
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from posttrain.rewards.answers.budget import spend
from posttrain.rewards.answers.tree import Apply, Node, Num, Sym

GUARD_BITS = 60
MOST_BITS = 24_000  # of the magnitude of an intermediate value, either way
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

    Remembers how large or small its intermediate values became (in bits): `peak` in all, `local` in the part evaluated
    last. A value that far below them is a zero hidden by rounding, or needs more digits: the `final` evaluation decides.
    """

    def __init__(self, point: dict[str, Fraction], bits: int, real: bool, final: bool = False):
        self.mp = context()
        self.mp.prec = self.bits = bits
        self.real = real
        self.final = final
        self.point: dict[str, Value] = {name: self.exact(value) for name, value in point.items()}
        self.peak = self.local = 0
        self.cost = 20 + bits * bits // 20_000  # of an elementary function, in units of the budget

    def exact(self, value: Fraction) -> Value:
        return self.mp.mpf(value.numerator) / value.denominator

    def value(self, node: Node) -> Value:
        """The value of a tree; raises one of NO_VALUE."""
        arithmetic = not isinstance(node, Apply) or node.op in ("add", "mul")
        spend(4 + self.cost // 50 if arithmetic else self.cost)
        outer, self.peak = self.peak, 0
        result = self.raw(node)
        if not self.mp.isfinite(result):
            raise Undefined
        if result:
            self.peak = max(self.peak, abs(int(self.mp.mag(result))))
        if self.peak > MOST_BITS:
            raise Unknown
        self.local = self.peak
        self.peak = max(outer, self.peak)
        return result

    def is_zero(self, value: Value, local: int) -> bool:
        """Whether a value is zero that was made from parts of that size."""
        if not value:
            return True
        if self.mp.mag(value) > local + GUARD_BITS - self.bits:
            return False
        if not self.final:
            raise Uncertain
        return True

    def raw(self, node: Node) -> Value:
        match node:
            case Num(value):
                return self.exact(value)
            case Sym(name):
                return self.name(name)
            case Apply("add", args):
                return sum((self.value(a) for a in args), start=self.mp.zero)
            case Apply("mul", args):
                return math.prod((self.value(a) for a in args), start=self.mp.one)
            case Apply("pow", (base, exponent)):
                return self.power(base, exponent)
            case Apply("deg", (x,)):
                return self.value(x) * self.mp.pi / 180
            case Apply("percent", (x,)):
                return self.value(x) / 100
            case Apply("sum" | "prod", (Sym(name), low, high, body)):
                return self.big(node.op, name, low, high, body)
            case Apply(op, args) if op.endswith("()") or op == "index":
                return self.unknown_function(op, args)
            case Apply("min" | "max", args):
                return (min if node.op == "min" else max)(self.as_real(self.value(a), self.local) for a in args)
            case Apply("gcd" | "lcm", args):
                return self.mp.mpf((math.gcd if node.op == "gcd" else math.lcm)(*(self.integer(a) for a in args)))
            case Apply("binom", (n, k)):
                return self.counted(self.mp.binomial, self.value(n), self.value(k))
            case Apply(op, (x,)):
                argument = self.value(x)
                return self.function(op, argument, self.local)
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

    def function(self, op: str, x: Value, local: int) -> Value:
        mp = self.mp
        match op:
            case "abs":
                return abs(x)
            case "ln":
                if self.is_zero(x, local) or (self.real and x < 0):
                    raise Undefined
                return mp.log(x)
            case "sin" | "cos" | "tan" | "cot" | "sec" | "csc":
                if mp.mag(x) > self.bits // 2:
                    raise Unknown
                below = mp.cos(x) if op in ("tan", "sec") else mp.sin(x) if op in ("cot", "csc") else mp.one
                if self.is_zero(below, local):
                    raise Undefined
                return getattr(mp, op)(x)
            case "sinh" | "cosh" | "tanh" | "coth" | "arsinh" | "arcosh" | "artanh":
                if mp.mag(x) > 14:
                    raise Unknown
                return self.kept_real(getattr(mp, op.replace("ar", "a"))(x))
            case "arcsin" | "arccos" | "arctan" | "arccot" | "arcsec" | "arccsc":
                if op in ("arcsec", "arccsc", "arccot") and self.is_zero(x, local):
                    raise Undefined
                return self.kept_real(getattr(mp, op.replace("arc", "a"))(x))
            case "factorial":
                return self.counted(mp.factorial, x)
            case "factorial2":
                return self.counted(mp.fac2, x)
            case "floor" | "ceil":
                x = self.as_real(x, local)
                nearest = mp.nint(x)
                return nearest if self.is_zero(x - nearest, local) else getattr(mp, op)(x)
            case "Re":
                return mp.re(x)
            case "Im":
                return mp.im(x)
        raise Unknown

    def counted(self, function: Callable[..., Value], *arguments: Value) -> Value:
        """A factorial or binomial; of what is no integer it is a gamma function, which is slow at high precision."""
        if any(self.mp.mag(x) > 12 for x in arguments):
            raise Unknown
        if not all(self.mp.isint(x) for x in arguments):
            spend(100 * self.cost)
            if self.bits > MOST_GAMMA_BITS:
                raise Unknown
        try:
            return function(*arguments)
        except ValueError as error:  # a pole
            raise Undefined from error

    def kept_real(self, value: Value) -> Value:
        if self.real and isinstance(value, self.mp.mpc):
            raise Undefined
        return value

    def as_real(self, value: Value, local: int) -> Value:
        if isinstance(value, self.mp.mpc):
            if not self.is_zero(value.imag, local):
                raise Undefined
            return value.real
        return value

    def integer(self, node: Node) -> int:
        value = self.as_real(self.value(node), self.local)
        return int(self.as_integer(value))

    def as_integer(self, value: Value) -> Value:
        """The integer that a value just evaluated is; Undefined where it is none."""
        nearest = self.mp.nint(value)
        if not self.is_zero(value - nearest, self.local):
            raise Undefined
        return nearest

    def power(self, base: Node, exponent: Node) -> Value:
        mp = self.mp
        x, local = self.value(base), self.local
        y = self.value(exponent)
        if self.is_zero(x, local):
            if isinstance(y, mp.mpc) or y <= 0:
                raise Undefined
            return mp.zero
        if mp.mag(y) > 60 or abs(y) * max(1, abs(int(mp.mag(x)))) > 2 * MOST_BITS:
            raise Unknown
        if isinstance(exponent, Num) and not isinstance(x, mp.mpc):
            p, q = exponent.value.numerator, exponent.value.denominator
            if q == 1:
                return mp.power(x, p)
            if x > 0 and q < 1_000:
                return mp.power(mp.root(x, q), p)
            if self.real and q % 2:  # the real root: (-8)^(1/3) = -2
                return (-1) ** p * mp.power(mp.root(-x, q), p)
        if self.real and x < 0:
            y = self.as_integer(y)
        return mp.power(x, y)

    def big(self, op: str, name: str, low: Node, high: Node, body: Node) -> Value:
        first, last = self.integer(low), self.integer(high)
        if last - first > LONGEST_SUM:
            raise Unknown
        outer = dict(self.point)
        terms = []
        for k in range(first, last + 1):
            self.point[name] = self.mp.mpf(k)
            terms.append(self.value(body))
        self.point = outer
        return sum(terms, start=self.mp.zero) if op == "sum" else math.prod(terms, start=self.mp.one)

    def unknown_function(self, op: str, args: tuple[Node, ...]) -> Value:
        """An uninterpreted function: any value, but always the same one at the same arguments."""
        parts = [op]
        for a in args:
            own_name = op == "index" and isinstance(a, Sym) and a.name not in self.point
            parts.append(a.name if own_name and isinstance(a, Sym) else self.mp.nstr(self.value(a), 25))
        digest = hashlib.sha256(" ".join(parts).encode()).digest()
        return self.mp.mpf(int.from_bytes(digest[:8], "big")) / 2**62
