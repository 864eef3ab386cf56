"""Two answers side by side: the frame in which the rules of `structure` work.

A rule looks at a pair of trees and says True, False, None (nothing can be decided, which is never a yes) or NOT_MINE.
"""

from collections.abc import Callable, Sequence
from enum import Enum

from posttrain.rewards.answers.budget import spend
from posttrain.rewards.answers.plus_minus import spread
from posttrain.rewards.answers.tree import Listing, Node

Outcome = bool | None


class Pass(Enum):
    """What a rule says of a pair that is of no kind that it knows."""

    NOT_MINE = "not mine"


NOT_MINE = Pass.NOT_MINE
RuleOutcome = bool | None | Pass
RULES: list[Callable[[Node, Node], RuleOutcome]] = []  # filled, in order, by `structure`


def same(a: Node, b: Node) -> Outcome:
    """Whether two answers are equal; None where it cannot be decided."""
    spend(5)
    if a == b:
        return True
    a, b = _single(spread(a)), _single(spread(b))
    for rule in RULES:
        outcome = rule(a, b)
        if not isinstance(outcome, Pass):
            return outcome
    return False


def _single(node: Node) -> Node:
    return node.items[0] if isinstance(node, Listing) and len(node.items) == 1 else node


def any_of(outcomes: Sequence[Outcome]) -> Outcome:
    return True if True in outcomes else None if None in outcomes else False


def all_of(outcomes: Sequence[Outcome]) -> Outcome:
    return False if False in outcomes else None if None in outcomes else True


def pairwise(a: Sequence[Node], b: Sequence[Node]) -> Outcome:
    if len(a) != len(b):
        return False
    outcomes: list[Outcome] = []
    for x, y in zip(a, b, strict=True):
        outcomes.append(same(x, y))
        if outcomes[-1] is False:
            return False
    return all_of(outcomes)
