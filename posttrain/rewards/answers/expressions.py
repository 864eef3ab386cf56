"""Are two scalar expressions, equations or inequalities the same?"""

from posttrain.rewards.answers.agreement import WORKING_BITS, Numbers, decide, points, same_value
from posttrain.rewards.answers.bounds import NO_VALUE, Unknown
from posttrain.rewards.answers.exact import PRIME, NotExact, rational, residue
from posttrain.rewards.answers.numeric import Evaluation
from posttrain.rewards.answers.tree import ONE, Apply, Node, Num, add, mul, power, variables

SEEDS = (1, 2, 3)


def same_expression(a: Node, b: Node) -> bool | None:
    """Whether two expressions are identical, exactly where both are rational, else numerically. None: cannot say."""
    if a == b:
        return True
    x, y = rational(a), rational(b)
    if x is not None and y is not None:
        return x == y
    verdict = _same_residues(a, b)
    return verdict if verdict is not None else same_value(a, b)


def _same_residues(a: Node, b: Node) -> bool | None:
    for seed in SEEDS:
        try:
            return residue(a, seed) == residue(b, seed)
        except NotExact:
            return None
        except ValueError:  # a pole at this point
            continue
    return None


def proportional(a: Node, b: Node) -> bool | None:
    """Whether a = c * b with a constant c that is not 0: then `a = 0` and `b = 0` are one equation."""
    names = variables(a)
    if not names or names != variables(b):
        return False
    try:
        a1, a2, b1, b2 = residue(a, 1), residue(a, 2), residue(b, 1), residue(b, 2)
        return bool(a1 and b1) and a1 * b2 % PRIME == a2 * b1 % PRIME
    except (NotExact, ValueError):
        pass
    origin = points(a, b)[0]

    def crossed(at: Evaluation) -> Numbers:
        here = at.point
        there = {name: at.exact(value) for name, value in origin.items()}
        found = []
        for mine, other in ((a, b), (b, a)):
            x = (at.value(mine), at.error)
            at.point = there
            y = (at.value(other), at.error)
            at.point = here
            if at.is_zero(*y):
                raise Unknown
            found.append((at.product((x, y)), at.error))
        return found[0], found[1]

    return decide(crossed, a, b)


def ratio_sign(a: Node, b: Node) -> int:
    """The sign of a/b at the first point where it has one, else 0."""
    for point in points(a, b):
        try:
            at = Evaluation(point, WORKING_BITS, real=True)
            return 1 if at.value(a) / at.value(b) > 0 else -1
        except NO_VALUE:
            continue
    return 0


def numerator(node: Node) -> Node:
    """The numerator over a common denominator: `y - 1/x` as `x y - 1`."""
    return _fraction(node)[0]


def _fraction(node: Node) -> tuple[Node, Node]:
    match node:
        case Apply("mul", args):
            parts = [_fraction(a) for a in args]
            return mul(*(p[0] for p in parts)), mul(*(p[1] for p in parts))
        case Apply("add", args):
            parts = [_fraction(a) for a in args]
            below = [p[1] for p in parts]
            if all(d == ONE for d in below):
                return node, ONE
            terms = [mul(part[0], *(d for j, d in enumerate(below) if j != i)) for i, part in enumerate(parts)]
            return add(*terms), mul(*below)
        case Apply("pow", (base, Num(value))) if value.denominator == 1 and variables(base):
            top, bottom = _fraction(base)
            if value < 0:
                return power(bottom, Num(-value)), power(top, Num(-value))
            return power(top, Num(value)), power(bottom, Num(value))
    return node, ONE
