"""Are two answers the same? The kinds of answer, from the outside in, in the order in which their rules are asked.

Unordered: lists and sets. Ordered: tuples, vectors, matrices, the ends of intervals. A unit, a base or a label counts
only where both sides have one.
"""

from posttrain.rewards.answers import units
from posttrain.rewards.answers.compare import NOT_MINE, RULES, RuleOutcome, all_of, pairwise, same
from posttrain.rewards.answers.expressions import same_expression
from posttrain.rewards.answers.lists import list_rule, matched, ratio_rule, tuple_rule
from posttrain.rewards.answers.quantities import numeral_rule, quantity_rule
from posttrain.rewards.answers.relations import relation_rule
from posttrain.rewards.answers.sets import NotASet, is_set_like, real_set, same_set
from posttrain.rewards.answers.tree import Apply, Interval, Listing, Node, Tuple, Words, is_expression


def set_rule(a: Node, b: Node) -> RuleOutcome:
    if not (is_set_like(a) or is_set_like(b)):
        return NOT_MINE
    try:
        return same_set(real_set(a), real_set(b))
    except NotASet:
        pass
    if isinstance(a, Tuple) and isinstance(b, Interval):
        a, b = b, a
    if isinstance(a, Interval) and isinstance(b, Tuple):
        return not (a.low_closed or a.high_closed) and pairwise((a.low, a.high), b.items)
    match a, b:
        case Interval(), Interval():
            closed = (a.low_closed, a.high_closed) == (b.low_closed, b.high_closed)
            return closed and pairwise((a.low, a.high), (b.low, b.high))
        case Apply("cup" | "cap", _), Apply("cup" | "cap", _) if a.op == b.op:
            return matched(_flat(a, a.op), _flat(b, b.op))
        case Apply("setminus", (x, y)), Apply("setminus", (z, w)):
            return all_of([same(x, z), same(y, w)])
    return NOT_MINE if isinstance(a, Listing) or isinstance(b, Listing) else False


def _flat(node: Node, op: str) -> list[Node]:
    return [x for a in node.args for x in _flat(a, op)] if isinstance(node, Apply) and node.op == op else [node]


def word_rule(a: Node, b: Node) -> RuleOutcome:
    if isinstance(a, Words) and isinstance(b, Words):
        return a.text == b.text or (
            a.text.split()[0] in units.MONTHS and sorted(a.text.split()) == sorted(b.text.split())
        )
    return False if isinstance(a, Words) or isinstance(b, Words) else NOT_MINE


def expression_rule(a: Node, b: Node) -> RuleOutcome:
    return same_expression(a, b) if is_expression(a) and is_expression(b) else False


RULES.extend(
    (
        quantity_rule,
        numeral_rule,
        relation_rule,
        set_rule,
        list_rule,
        tuple_rule,
        ratio_rule,
        word_rule,
        expression_rule,
    )
)

__all__ = ["same"]
