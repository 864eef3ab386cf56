"""Exact arithmetic on expressions: rational values, and identity tests in a large prime field.

Two expressions built from numbers, names, `pi`, `e`, `i` by `+ - * /` and integer powers are equal exactly when they
agree at a random point of a large field (Schwartz 1980, Zippel 1979): a wrong `True` has probability below 2^-400,
and numbers never grow.
"""

import functools
import hashlib
import math
import random
from fractions import Fraction

from posttrain.rewards.answers.budget import spend
from posttrain.rewards.answers.tree import Apply, Node, Num, Sym

MOST_BITS = 20_000  # of an exact intermediate value
LARGEST_FACTORIAL = 2_100  # problems like to use the year

PRIME = 2**512 - 875  # 1 modulo 4, so that the field has a square root of -1
SQUARE_ROOT_OF_MINUS_ONE = pow(2, (PRIME - 1) // 4, PRIME)


class NotExact(Exception):
    """The expression leaves the exact domain, or is too large for it."""


def rational(node: Node) -> Fraction | None:
    """The exact value of an expression, None where it is not a rational constant (or one too large to write)."""
    try:
        return _rational(node)
    except (NotExact, ZeroDivisionError):
        return None


def _rational(node: Node) -> Fraction:
    spend(2)
    if isinstance(node, Num):
        return node.value
    if not isinstance(node, Apply):
        raise NotExact
    match node.op, node.args:
        case "add", args:
            return _bounded(sum((_rational(a) for a in args), start=Fraction(0)))
        case "mul", args:
            value = Fraction(1)
            for a in args:
                value = _bounded(value * _rational(a))
            return value
        case "pow", (base, exponent):
            return _power(_rational(base), _rational(exponent))
        case "percent", (x,):
            return _rational(x) / 100
        case "abs", (x,):
            return abs(_rational(x))
        case "floor", (x,):
            return Fraction(math.floor(_rational(x)))
        case "ceil", (x,):
            return Fraction(math.ceil(_rational(x)))
        case "factorial", (x,):
            return Fraction(math.factorial(_integer(x, LARGEST_FACTORIAL)))
        case "factorial2", (x,):
            return Fraction(math.prod(range(_integer(x, LARGEST_FACTORIAL), 0, -2)))
        case "binom", (n, k):
            return Fraction(math.comb(_integer(n, 10 * LARGEST_FACTORIAL), _integer(k, LARGEST_FACTORIAL)))
        case "min", args:
            return min(_rational(a) for a in args)
        case "max", args:
            return max(_rational(a) for a in args)
        case ("gcd" | "lcm") as op, args:
            integers = [_integer(a, 2**MOST_BITS) for a in args]
            return Fraction(math.gcd(*integers) if op == "gcd" else math.lcm(*integers))
    raise NotExact


def _integer(node: Node, largest: int) -> int:
    value = _rational(node)
    if value.denominator != 1 or not 0 <= value <= largest:
        raise NotExact
    return value.numerator


def _bounded(value: Fraction) -> Fraction:
    bits = value.numerator.bit_length() + value.denominator.bit_length()
    spend(bits // 200)
    if bits > MOST_BITS:
        raise NotExact
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if base not in (0, 1, -1) and bits * abs(exponent.numerator) > MOST_BITS:
            raise NotExact
        if base == 0 and exponent <= 0:
            raise NotExact
        if base in (1, -1):
            exponent = Fraction(exponent.numerator % 2)
        elif base == 0 and exponent.numerator > 0:
            return Fraction(0)
        return base**exponent.numerator
    degree = exponent.denominator
    if degree > 64 or (base < 0 and degree % 2 == 0):
        raise NotExact
    top, bottom = _exact_root(abs(base.numerator), degree), _exact_root(base.denominator, degree)
    return _power(Fraction(top if base >= 0 else -top, bottom), Fraction(exponent.numerator))


def _exact_root(value: int, degree: int) -> int:
    root = 1 << (value.bit_length() // degree + 1)
    while value:  # Newton's method from above
        step = ((degree - 1) * root + value // root ** (degree - 1)) // degree
        if step >= root:
            break
        root = step
    root = root if value else 0
    if root**degree != value:
        raise NotExact
    return root


@functools.lru_cache(maxsize=4096)
def coordinate(seed: int, name: str) -> int:
    """The value of a name at the random point of the field that the seed names."""
    return random.Random(f"{seed} {name}").randrange(2, PRIME)


def residue(node: Node, seed: int) -> int:
    """The expression at a random point of the field; raises NotExact where it is no rational function."""
    spend(2)
    if isinstance(node, Num):
        return node.value.numerator * pow(node.value.denominator, -1, PRIME) % PRIME
    if isinstance(node, Sym):
        if node.name == "oo":
            raise NotExact
        return SQUARE_ROOT_OF_MINUS_ONE if node.name == "i" else coordinate(seed, node.name)
    if not isinstance(node, Apply):
        raise NotExact
    match node.op, node.args:
        case "add", args:
            return sum(residue(a, seed) for a in args) % PRIME
        case "mul", args:
            result = 1
            for a in args:
                result = result * residue(a, seed) % PRIME
            return result
        case "pow", (base, exponent) if (power := rational(exponent)) is not None and power.denominator == 1:
            bottom = residue(base, seed)
            if bottom == 0 and power <= 0:
                raise NotExact
            return pow(bottom, power.numerator, PRIME)
        case "percent", (x,):
            return residue(x, seed) * pow(100, -1, PRIME) % PRIME
        case op, args if op.endswith("()"):
            key = " ".join([op, *(str(residue(a, seed)) for a in args)])
            return int.from_bytes(hashlib.sha512(key.encode()).digest(), "big") % PRIME
    value = rational(node)
    if value is None:
        raise NotExact
    return value.numerator * pow(value.denominator, -1, PRIME) % PRIME
