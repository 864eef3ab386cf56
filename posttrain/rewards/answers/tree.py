"""What an answer is made of once it has been read: expressions and the structures around them.

Everything is immutable and hashable, so trees compare by structure with `==`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Num:
    """An exact rational number; a decimal is the fraction it denotes."""

    value: Fraction


@dataclass(frozen=True, slots=True)
class Sym:
    """A name with its indices and primes; `pi`, `e`, `i` and `oo` are the constants."""

    name: str


@dataclass(frozen=True, slots=True)
class Apply:
    """An operation or function on expressions: `add`, `mul`, `pow`, `sin`, `factorial`, ..., or an unknown `f()`."""

    op: str
    args: "tuple[Node, ...]"


@dataclass(frozen=True, slots=True)
class Tuple:
    """Ordered: a point, a vector, or (two entries) perhaps an open interval."""

    items: "tuple[Node, ...]"


@dataclass(frozen=True, slots=True)
class Listing:
    """Unordered: several values side by side, or in braces. `joint` is the word that joins them: `,` `and` `or`."""

    items: "tuple[Node, ...]"
    joint: str = ","


@dataclass(frozen=True, slots=True)
class Interval:
    low: "Node"
    high: "Node"
    low_closed: bool
    high_closed: bool


@dataclass(frozen=True, slots=True)
class Matrix:
    rows: "tuple[tuple[Node, ...], ...]"


@dataclass(frozen=True, slots=True)
class Relation:
    """A chain `sides[0] ops[0] sides[1] ops[1] ...` with ops among `=` `!=` `<` `<=` `>` `>=` `~` `in` `==`."""

    sides: "tuple[Node, ...]"
    ops: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Quantity:
    """A value with what stands beside it: a unit, a currency, a degree or percent sign, a modulus."""

    value: "Node"
    unit: str


@dataclass(frozen=True, slots=True)
class Based:
    """Digits with a base written below them."""

    digits: str
    base: int


@dataclass(frozen=True, slots=True)
class Ratio:
    items: "tuple[Node, ...]"


@dataclass(frozen=True, slots=True)
class Words:
    """Text: lower case, without articles and punctuation."""

    text: str


Node = Num | Sym | Apply | Tuple | Listing | Interval | Matrix | Relation | Quantity | Based | Ratio | Words

ZERO, ONE = Num(Fraction(0)), Num(Fraction(1))
MINUS_ONE = Num(Fraction(-1))
E, INFINITY = Sym("e"), Sym("oo")
CONSTANTS = frozenset({"pi", "e", "i", "oo"})
EMPTY_SET = Listing(())


def children(node: Node) -> "tuple[Node, ...]":
    match node:
        case Apply(_, args):
            return args
        case Tuple(items) | Listing(items) | Ratio(items):
            return items
        case Interval(low, high):
            return (low, high)
        case Matrix(rows):
            return tuple(cell for row in rows for cell in row)
        case Relation(sides):
            return sides
        case Quantity(value):
            return (value,)
    return ()


def walk(node: Node) -> Iterator[Node]:
    """The node and all below it."""
    stack = [node]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(children(node))


def fits(node: Node, most_nodes: int, tallest: int) -> bool:
    """Whether a tree stays within bounds, found without recursion."""
    level: list[Node] = [node]
    count = height = 0
    while level:
        count += len(level)
        height += 1
        if count > most_nodes or height > tallest:
            return False
        level = [child for parent in level for child in children(parent)]
    return True


def variables(node: Node) -> frozenset[str]:
    return frozenset(
        n.name for n in walk(node) if isinstance(n, Sym) and n.name not in CONSTANTS and not n.name.startswith("set ")
    )


def is_expression(node: Node) -> bool:
    """Whether the tree is a scalar expression all the way down."""
    return all(isinstance(n, Num | Sym | Apply) for n in walk(node))


def number(value: int | Fraction) -> Num:
    return Num(Fraction(value))


def add(*terms: Node) -> Node:
    return terms[0] if len(terms) == 1 else Apply("add", terms)


def mul(*factors: Node) -> Node:
    return factors[0] if len(factors) == 1 else Apply("mul", factors)


def power(base: Node, exponent: Node) -> Node:
    return Apply("pow", (base, exponent))


def negative(node: Node) -> Node:
    match node:
        case Num(value):
            return Num(-value)
        case Based(digits, base):
            return Based(f"-{digits}", base)
    return Apply("mul", (MINUS_ONE, node))


def difference(a: Node, b: Node) -> Node:
    return Apply("add", (a, negative(b)))


def quotient(a: Node, b: Node) -> Node:
    if isinstance(a, Num) and isinstance(b, Num) and b.value:
        return Num(a.value / b.value)
    return Apply("mul", (a, power(b, MINUS_ONE)))
