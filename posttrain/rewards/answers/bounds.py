"""Arithmetic in arbitrary precision with a bound on the error of every result.

The bound is the exponent of a power of two (`error`: the value is within 2^error of the truth), propagated to first
order through each operation. So a zero is told from a small number, and what cancellation has destroyed is never taken
for agreement.
"""

import threading
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

GUARD = 4  # bits between the error bound and what counts as different from zero
EXACT = -(10**9)  # the error of what is not rounded, and the size of zero
MOST_BITS = 24_000  # of the size of an intermediate value, either way

Value = Any  # an mpf or mpc of this thread's context


class Undefined(Exception):
    """No real (or no finite) value at this point."""


class Unknown(Exception):
    """Nothing that we can evaluate, or too large to."""


class Uncertain(Exception):
    """More digits are needed to go on."""


# How an evaluation can fail; mpmath says it with ordinary errors.
NO_VALUE = (Undefined, Unknown, Uncertain, ZeroDivisionError, ValueError, OverflowError, TypeError, NotImplementedError)

_local = threading.local()


def context() -> Any:
    """This thread's own mpmath context: its precision is state, and threads must not share it."""
    if not hasattr(_local, "context"):
        from mpmath.ctx_mp import MPContext  # type: ignore[import-untyped]

        _local.context = MPContext()
    return _local.context


class Bounded:
    """Operations on values at one precision. `error` belongs to the value found last.

    Where a value may be zero, only the `final` evaluation says that it is; before that more digits are asked for.
    """

    def __init__(self, bits: int, real: bool, final: bool):
        self.mp = context()
        self.mp.prec = self.bits = bits
        self.real = real
        self.final = final
        self.error = EXACT
        self.cost = 20 + bits * bits // 20_000  # of an elementary function, in units of the budget

    def size(self, x: Value) -> int:
        """|x| < 2^size, and not much less."""
        return int(self.mp.mag(x)) if x else EXACT

    def exact(self, value: Fraction) -> Value:
        return self.mp.mpf(value.numerator) / value.denominator

    def with_error(self, x: Value, error: int) -> Value:
        self.error = error
        return x

    def is_zero(self, x: Value, error: int) -> bool:
        """Whether a value with that error is zero."""
        if self.size(x) > error + GUARD:
            return False
        if not self.final and max(self.size(x), error) > EXACT:
            raise Uncertain
        return True

    def nearest(self, x: Value, error: int) -> tuple[Value, bool]:
        """The nearest integer, and whether it is the value."""
        if error > -GUARD:
            raise Uncertain
        nearest = self.mp.nint(self.mp.re(x))
        return nearest, self.is_zero(x - nearest, error)

    def as_real(self, x: Value, error: int) -> Value:
        if isinstance(x, self.mp.mpc):
            if not self.is_zero(x.imag, error):
                raise Undefined
            return x.real
        return x

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

    def power(self, x: Value, x_error: int, y: Value, y_error: int, exponent: Fraction | None) -> Value:
        """x^y, where `exponent` is y if that is written as a number."""
        mp = self.mp
        if self.is_zero(x, x_error):
            if isinstance(y, mp.mpc) or y <= 0:
                raise Undefined
            return self.with_error(mp.zero, max(EXACT, int((x_error + 2 * GUARD) * y)))
        x_size, y_size = self.size(x), self.size(y)
        if y_size > 60 or abs(y) * max(1, abs(x_size)) > 2 * MOST_BITS:
            raise Unknown
        log_size = (abs(x_size) + 2).bit_length()
        growth = max(y_size + x_error - x_size + 1, log_size + y_error)  # of the error, relative to the result
        if growth > -GUARD:
            raise Uncertain
        result = self._raised(x, y, y_error, exponent)
        return self.with_error(result, max(self.size(result) + growth + 2, EXACT))

    def _raised(self, x: Value, y: Value, y_error: int, exponent: Fraction | None) -> Value:
        """x^y with x away from zero. In real numbers odd roots of negative numbers exist: (-8)^(1/3) = -2."""
        mp = self.mp
        if exponent is not None and not isinstance(x, mp.mpc):
            p, q = exponent.numerator, exponent.denominator
            if q == 1:
                return mp.power(x, p)
            if x > 0 and q < 1_000:
                return mp.power(mp.root(x, q), p)
            if self.real and q % 2:
                return (-1) ** p * mp.power(mp.root(-x, q), p)
        if self.real and x < 0:
            y, is_integer = self.nearest(y, y_error)
            if not is_integer:
                raise Undefined
        return mp.power(x, y)
