"""Labels, equations and inequalities.

`x = 5` states 5 where `x` only names the value; `2x + z = 1` states nothing but itself. Two equations are one where
one is a multiple of the other; two inequalities where their solutions are, or where one is a positive multiple of the
other.
"""

import re

from posttrain.rewards.answers.compare import NOT_MINE, Outcome, RuleOutcome, all_of, any_of, pairwise, same
from posttrain.rewards.answers.expressions import numerator, proportional, ratio_sign
from posttrain.rewards.answers.sets import INEQUALITIES, NotASet, real_set, same_set
from posttrain.rewards.answers.show import show
from posttrain.rewards.answers.tree import (
    CONSTANTS,
    Apply,
    Listing,
    Node,
    Num,
    Quantity,
    Ratio,
    Relation,
    Sym,
    Tuple,
    Words,
    difference,
    is_expression,
    variables,
)

EQUALITIES = frozenset(("=", "~", "=="))


def relation_rule(a: Node, b: Node) -> RuleOutcome:
    if isinstance(a, Relation) and isinstance(b, Relation):
        return _both_relations(a, b)
    if isinstance(b, Relation):
        a, b = b, a
    if not isinstance(a, Relation):
        return NOT_MINE
    if set(a.ops) & INEQUALITIES:
        return NOT_MINE  # a set
    if isinstance(b, Listing) and any(isinstance(item, Relation) for item in b.items):
        return NOT_MINE
    values = stated_values(a)
    return any_of([same(value, b) for value in values]) if values else False


def stated_values(relation: Relation) -> list[Node]:
    """What `x = 5` or `2 + 3 = 5` or `x = 1/3 ≈ 0.33` states: the last exact value, and the rounded one after it."""
    sides, ops = relation.sides, relation.ops
    if ops[-1] == "in" and len(ops) == 1:
        return [sides[1]] if is_label(sides[0]) else []
    if not set(ops) <= EQUALITIES:
        return []
    exact = ops.index("~") if "~" in ops and ops.index("~") > 0 else len(ops)
    values = [sides[exact], sides[-1]] if exact < len(ops) else [sides[-1]]
    if ops[0] == "~" and not is_label(sides[0]):  # pi ≈ 3.14
        values = [sides[0], sides[-1]]
    first = sides[0]
    if is_label(first):
        return values
    if not variables(first) and not variables(sides[-1]) and is_expression(first):
        return values
    return values if len(sides) == 2 and is_expression(first) and same(first, sides[-1]) is True else []


def is_label(node: Node) -> bool:
    """Whether the left side only names the value: `x`, `f(x)`, `AB`, `angle ABC`, `|AB|`, `(x, y)`, `sin A`, text."""
    match node:
        case Sym(name):
            return name not in CONSTANTS
        case Words():
            return True
        case Apply("index", _):
            return True
        case Apply(op, _) if op.endswith("()"):
            return True
        case Apply("abs" | "sin" | "cos" | "tan" | "cot" | "deg", (inner,)):
            return _is_name_of_figure(inner)
        case Apply("mul", args):
            return all(_is_name_of_figure(a) for a in args)
        case Apply("pow", (base, Num(value))) if value == -1:
            return _is_name_of_figure(base)
        case Tuple(items) | Ratio(items):
            return all(is_label(item) for item in items)
        case Quantity(value, _):
            return is_label(value)
    return False


def _is_name_of_figure(node: Node) -> bool:
    match node:
        case Sym(name):
            return (
                name[0].isupper()
                or name in ("m", "theta", "alpha", "beta", "gamma", "phi")
                or name.startswith("angle ")
            )
        case Apply("mul", args):
            return all(_is_name_of_figure(a) for a in args)
        case Apply("pow", (base, Num(value))) if value == -1:
            return _is_name_of_figure(base)
    return False


def _both_relations(a: Relation, b: Relation) -> Outcome:
    if set(a.ops) & INEQUALITIES or set(b.ops) & INEQUALITIES:
        return _inequalities(a, b)
    outcomes: list[Outcome] = []
    if is_label(a.sides[0]) and is_label(b.sides[0]):
        if _same_label(a, b):
            return any_of([same(x, y) for x in stated_values(a)[:1] for y in stated_values(b)[:1]])
    elif (
        (len(a.ops) > 1 or len(b.ops) > 1 or "~" in (*a.ops, *b.ops))
        and (x := stated_values(a))
        and (y := stated_values(b))
    ):
        outcomes.append(same(x[0], y[0]))
    if a.ops == b.ops == ("=",) and all(is_expression(s) for s in (*a.sides, *b.sides)):
        outcomes.append(proportional(numerator(difference(*a.sides)), numerator(difference(*b.sides))))
    if a.ops == b.ops:
        outcomes.append(pairwise(a.sides, b.sides))
    return any_of(outcomes)


def _same_label(a: Relation, b: Relation) -> bool:
    x, y = a.sides[0], b.sides[0]
    if _letters(x) == _letters(y):
        return True
    functions = [(isinstance(s, Apply) and s.op.endswith("()")) or s == Sym("y") for s in (x, y)]
    return all(functions) and Sym("y") in (x, y) and bool(variables(a.sides[-1]))


def _letters(label: Node) -> str:
    """`AB`, `|AB|` and a line over AB are one name."""
    return re.sub(r"abs|[\s*()]", "", show(label))


def _inequalities(a: Relation, b: Relation) -> Outcome:
    if variables(a) != variables(b):
        return False
    try:
        return same_set(real_set(a), real_set(b))
    except NotASet:
        pass
    if len(a.ops) != len(b.ops):
        return False
    a, b = _ascending(a), _ascending(b)
    if a.ops != b.ops:
        return False
    outcomes: list[Outcome] = []
    for i in range(len(a.ops)):
        x, y = difference(a.sides[i], a.sides[i + 1]), difference(b.sides[i], b.sides[i + 1])
        if not (is_expression(x) and is_expression(y)):
            return pairwise(a.sides, b.sides)
        outcome = proportional(x, y)
        if outcome and a.ops[i] != "!=" and ratio_sign(x, y) <= 0:
            outcome = False
        outcomes.append(outcome)
    return any_of([all_of(outcomes), pairwise(a.sides, b.sides)])


def _ascending(relation: Relation) -> Relation:
    if any(op.startswith(">") for op in relation.ops) and not any(op.startswith("<") for op in relation.ops):
        ops = tuple(op.replace(">", "<") for op in reversed(relation.ops))
        return Relation(tuple(reversed(relation.sides)), ops)
    return relation
