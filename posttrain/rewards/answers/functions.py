"""Functions of values that have error bounds: how far an error in the argument moves the result."""

from collections.abc import Callable

from posttrain.rewards.answers.bounds import EXACT, GUARD, Bounded, Uncertain, Undefined, Unknown, Value
from posttrain.rewards.answers.budget import spend

MOST_GAMMA_BITS = 700
_MPMATH = {
    "arcsin": "asin", "arccos": "acos", "arctan": "atan", "arccot": "acot", "arsinh": "asinh", "arcosh": "acosh",
    "artanh": "atanh", "factorial": "factorial", "factorial2": "fac2", "binom": "binomial",
}  # fmt: skip


class Functions(Bounded):
    def function(self, op: str, x: Value, error: int) -> Value:
        mp = self.mp
        match op:
            case "abs":
                return self.with_error(abs(x), error)
            case "ln":
                if self.is_zero(x, error) or (self.real and x < 0):
                    raise Undefined
                return self.with_error(mp.log(x), error - self.size(x) + 2)
            case "sin" | "cos" | "tan" | "cot" | "sec" | "csc":
                return self._trigonometric(op, x, error)
            case "sinh" | "cosh":
                if self.size(x) > 14:
                    raise Unknown
                result = getattr(mp, op)(x)
                return self.with_error(result, error + max(self.size(result), 0) + 2)
            case "tanh" | "arctan" | "arsinh":  # nowhere steeper than 1 on the real line
                if isinstance(x, mp.mpc) or self.size(x) > 14:
                    raise Unknown
                return self.with_error(getattr(mp, _MPMATH.get(op, op))(x), error + 1)
            case "arccot":
                if isinstance(x, mp.mpc):
                    raise Unknown
                if self.is_zero(x, error):
                    raise Undefined
                return self.with_error(mp.acot(x), error + 1)
            case "arcsin" | "arccos" | "arcsec" | "arccsc" | "arcosh" | "artanh":
                return self._with_branch_points(op, x, error)
            case "floor" | "ceil":
                x = self.as_real(x, error)
                nearest, is_integer = self.nearest(x, error)
                return self.with_error(nearest if is_integer else getattr(mp, op)(x), EXACT)
            case "Re" | "Im":
                return self.with_error(mp.re(x) if op == "Re" else mp.im(x), error)
        raise Unknown

    def _trigonometric(self, op: str, x: Value, error: int) -> Value:
        mp = self.mp
        if self.size(x) > self.bits // 2 or error > -GUARD:
            raise Uncertain
        if op in ("sin", "cos"):
            result = getattr(mp, op)(x)
            return self.with_error(result, error + max(self.size(result), 0) + 2)
        below = mp.cos(x) if op in ("tan", "sec") else mp.sin(x)
        below_error = max(error + max(self.size(below), 0) + 2, self.size(below) - self.bits)
        if self.is_zero(below, below_error):
            raise Undefined
        return self.with_error(getattr(mp, op)(x), below_error - 2 * min(self.size(below), 0) + 4)

    def _with_branch_points(self, op: str, x: Value, error: int) -> Value:
        """Inverse functions that end, with a vertical tangent or a pole, at -1 and 1."""
        mp = self.mp
        if op in ("arcsec", "arccsc"):
            if self.is_zero(x, error):
                raise Undefined
            x, error = 1 / x, max(error - 2 * self.size(x) + 4, 2 - self.size(x) - self.bits)
            op = "arccos" if op == "arcsec" else "arcsin"
        gap = (1 - x) * (1 + x)
        if self.is_zero(gap, EXACT if error == EXACT else error + max(self.size(x), 0) + 2):
            if op == "artanh":
                raise Undefined
            at_end = getattr(mp, _MPMATH[op])(mp.nint(mp.re(x)))
            return self.with_error(at_end, EXACT if error == EXACT else error // 2 + GUARD)
        result = getattr(mp, _MPMATH[op])(x)
        if self.real and isinstance(result, mp.mpc):
            raise Undefined
        steepness = 1 - self.size(gap) if op == "artanh" else max(0, 1 - self.size(gap)) // 2 + 1
        return self.with_error(result, error + max(steepness, 0) + 1)

    def counted(self, op: str, *arguments: tuple[Value, int]) -> Value:
        """A factorial or binomial; of what is no integer it is a gamma function, which is slow at high precision."""
        mp = self.mp
        function = getattr(mp, _MPMATH[op])
        if any(self.size(x) > 12 for x, _ in arguments):
            raise Unknown
        nearest = [self.nearest(x, error) for x, error in arguments]
        if all(is_integer for _, is_integer in nearest):
            return self.with_error(self._at_no_pole(function, *(n for n, _ in nearest)), EXACT)
        spend(100 * self.cost)
        if self.bits > MOST_GAMMA_BITS:
            raise Unknown
        result = self._at_no_pole(function, *(x for x, _ in arguments))
        poles = 1 if all(mp.re(x) > 0 for x, _ in arguments) else 2  # beside one, the slope is the square of the value
        slope = poles * max(self.size(result), 0) + 10
        return self.with_error(result, max(error for _, error in arguments) + slope)

    def _at_no_pole(self, function: Callable[..., Value], *arguments: Value) -> Value:
        try:
            return function(*arguments)
        except ValueError as error:
            raise Undefined from error
