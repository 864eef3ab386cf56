"""Lists and sets, which are unordered; tuples, vectors and matrices, which are ordered; ratios."""

from collections import Counter
from collections.abc import Sequence

from posttrain.rewards.answers.compare import NOT_MINE, Outcome, RuleOutcome, all_of, any_of, pairwise, same
from posttrain.rewards.answers.exact import rational
from posttrain.rewards.answers.expressions import same_expression
from posttrain.rewards.answers.relations import EQUALITIES, is_label, stated_values
from posttrain.rewards.answers.tree import (
    Apply,
    Listing,
    Matrix,
    Node,
    Num,
    Ratio,
    Relation,
    Sym,
    Tuple,
    is_expression,
    mul,
    quotient,
)

MOST_ITEMS = 60


def list_rule(a: Node, b: Node) -> RuleOutcome:
    if isinstance(b, Listing):
        a, b = b, a
    if not isinstance(a, Listing):
        return NOT_MINE
    a = _without_qualifiers(a)
    if isinstance(b, Listing):
        b = _without_qualifiers(b)
    if not isinstance(a, Listing) or (not isinstance(b, Listing) and len(a.items) == 1):
        return same(a if not isinstance(a, Listing) else a.items[0], b)
    if isinstance(b, Tuple):
        return pairwise([_unlabelled(i) for i in _coordinates(a.items)], b.items)
    if isinstance(b, Matrix) and 1 in (len(b.rows), len(b.rows[0])):
        return pairwise([_unlabelled(i) for i in _coordinates(a.items)], [c for row in b.rows for c in row])
    if (
        isinstance(b, Relation)
        and isinstance(b.sides[0], Tuple)
        and is_label(b.sides[0])
        and isinstance(b.sides[-1], Tuple)
    ):
        pairs = zip(b.sides[0].items, b.sides[-1].items, strict=False)
        return list_rule(a, Listing(tuple(Relation(pair, ("=",)) for pair in pairs)))
    if isinstance(b, Relation):
        values = stated_values(b)
        return any_of([same(_unlabelled_list(a), value) for value in values]) if values else False
    if not isinstance(b, Listing):
        return False
    if len(a.items) == len(b.items) and any(isinstance(i, Listing) for i in (*a.items, *b.items)):
        grouped = matched(a.items, b.items)
        if grouped:
            return grouped
    x, y = _flat_items(a), _flat_items(b)
    if Sym("…") in x or Sym("…") in y:
        return pairwise(x, y)
    labels = [_label_names(x), _label_names(y)]
    if bool(labels[0]) != bool(labels[1]) and max(len(set(names)) for names in labels) > 1:
        return pairwise([_unlabelled(i) for i in x], [_unlabelled(i) for i in y])
    return matched(x, y)


def _flat_items(node: Node) -> list[Node]:
    if isinstance(node, Listing):
        return [x for item in node.items for x in _flat_items(item)]
    if isinstance(node, Relation) and isinstance(node.sides[-1], Listing) and is_label(node.sides[0]):
        return [Relation((*node.sides[:-1], item), node.ops) for item in _flat_items(node.sides[-1])]
    return [node]


def _label_names(items: list[Node]) -> list[Node]:
    labels = [i.sides[0] for i in items if isinstance(i, Relation) and i.ops == ("=",) and is_label(i.sides[0])]
    return labels if len(labels) == len(items) else []


def _coordinates(items: Sequence[Node]) -> list[Node]:
    """`y = 1, x = -2` in the order that coordinates have; as they stand where their names have none."""
    names = {
        label.name: item
        for label, item in zip(_label_names(list(items)), items, strict=False)
        if isinstance(label, Sym)
    }
    ordered = len(names) == len(items) and any(names.keys() <= set(axes) for axes in ("xyz", "abcdefgh"))
    return [names[name] for name in sorted(names)] if ordered else list(items)


def _unlabelled(node: Node) -> Node:
    if isinstance(node, Relation) and set(node.ops) <= EQUALITIES and (values := stated_values(node)):
        return values[0]
    return node


def _unlabelled_list(node: Listing) -> Node:
    return Listing(tuple(_unlabelled(i) for i in node.items), node.joint)


def _without_qualifiers(node: Listing) -> Node:
    """Without `k in Z` beside the family of values that it explains."""
    kept = [i for i in node.items if not (isinstance(i, Relation) and i.ops == ("in",) and _is_index_set(i.sides[1]))]
    if not kept or len(kept) == len(node.items):
        return node
    return kept[0] if len(kept) == 1 else Listing(tuple(kept), node.joint)


def _is_index_set(node: Node) -> bool:
    return (isinstance(node, Sym) and node.name.split("_")[0] in ("set Z", "set N", "set Z^+", "Z", "N")) or (
        isinstance(node, Apply) and node.op == "pow" and _is_index_set(node.args[0])
    )


def matched(a: Sequence[Node], b: Sequence[Node]) -> Outcome:
    """Whether the items can be paired off, in any order; what is said twice counts once where the other side is shorter."""
    a, b = [_exact(item) for item in a], [_exact(item) for item in b]
    if len(a) != len(b):
        if min(len(a), len(b)) < 2:
            return False
        a, b = _distinct(a), _distinct(b)
    if len(a) != len(b):
        return False
    common = Counter(a) & Counter(b)
    a, b = list((Counter(a) - common).elements()), list((Counter(b) - common).elements())
    if len(a) > MOST_ITEMS:
        return None
    unsure = False
    for item in a:  # equality is transitive, so the first partner is as good as any
        outcomes: list[Outcome] = []
        for other in b:
            outcomes.append(same(item, other))
            if outcomes[-1]:
                break
        if True in outcomes:
            b.pop(len(outcomes) - 1)
        elif None in outcomes:
            unsure = True
        else:
            return False
    return None if unsure else True


def _exact(item: Node) -> Node:
    """A rational constant as its value, so that most items pair off by what they are."""
    value = rational(item) if isinstance(item, Apply) else None
    return item if value is None else Num(value)


def _distinct(items: Sequence[Node]) -> list[Node]:
    kept: list[Node] = []
    for item in dict.fromkeys(items):
        if len(kept) > MOST_ITEMS or not any(same(item, other) for other in kept):
            kept.append(item)
    return kept


def tuple_rule(a: Node, b: Node) -> RuleOutcome:
    if isinstance(b, Matrix):
        a, b = b, a
    match a, b:
        case Matrix(), Matrix():
            if len(a.rows) != len(b.rows):
                return False
            return all_of([pairwise(x, y) for x, y in zip(a.rows, b.rows, strict=True)])
        case Matrix(), Tuple(items) if 1 in (len(a.rows), len(a.rows[0])):
            return pairwise([c for row in a.rows for c in row], items)
        case Matrix(rows), Tuple(items) if len(rows) == len(items):
            return all_of(
                [pairwise(row, i.items) if isinstance(i, Tuple) else False for row, i in zip(rows, items, strict=True)]
            )
        case Tuple(), Tuple():
            return pairwise(a.items, b.items)
    return False if isinstance(a, Matrix | Tuple) or isinstance(b, Matrix | Tuple) else NOT_MINE


def ratio_rule(a: Node, b: Node) -> RuleOutcome:
    if isinstance(a, Ratio) and isinstance(b, Ratio):
        if len(a.items) != len(b.items) or not all(is_expression(i) for i in (*a.items, *b.items)):
            return pairwise(a.items, b.items)
        crossed = [
            same_expression(mul(x, b.items[0]), mul(y, a.items[0])) for x, y in zip(a.items, b.items, strict=True)
        ]
        return all_of(crossed)
    if isinstance(b, Ratio):
        a, b = b, a
    if not isinstance(a, Ratio):
        return NOT_MINE
    if len(a.items) == 2 and is_expression(b) and all(is_expression(i) for i in a.items):
        value = rational(b)
        return False if value is not None and value.denominator == 1 else same(quotient(*a.items), b)  # 1:2 is 1/2
    return False
