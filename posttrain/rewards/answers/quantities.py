"""Units, currencies, percents, moduli and number bases: each counts only where both sides have one."""

from posttrain.rewards.answers import units
from posttrain.rewards.answers.compare import NOT_MINE, Outcome, RuleOutcome, any_of, same
from posttrain.rewards.answers.exact import rational
from posttrain.rewards.answers.tree import (
    Apply,
    Based,
    Listing,
    Node,
    Num,
    Quantity,
    Relation,
    difference,
    is_expression,
    mul,
    number,
)


def quantity_rule(a: Node, b: Node) -> RuleOutcome:
    if isinstance(a, Quantity) and isinstance(b, Quantity):
        return _both_quantities(a, b)
    if isinstance(b, Quantity):
        a, b = b, a
    if not isinstance(a, Quantity):
        return NOT_MINE
    if isinstance(b, Relation | Listing) and not is_expression(a.value):
        return NOT_MINE
    if isinstance(b, Relation) or (isinstance(b, Listing) and len(b.items) > 1):
        return NOT_MINE
    if a.unit == "%":  # 28% is 28, and is 0.28
        return (
            any_of([same(a.value, b), same(Apply("percent", (a.value,)), b)])
            if is_expression(a.value)
            else same(a.value, b)
        )
    return same(a.value, b)


def _both_quantities(a: Quantity, b: Quantity) -> Outcome:
    if a.unit == b.unit and a.unit.startswith("mod ") and a.unit[4:].isdigit():
        rest = rational(difference(a.value, b.value))
        if rest is not None and int(a.unit[4:]):
            return rest % int(a.unit[4:]) == 0
    if a.unit == b.unit or _compatible(a.unit, b.unit):
        return same(a.value, b.value)
    factor = units.conversion(a.unit, b.unit)
    return same(mul(number(factor), a.value), b.value) if factor is not None else False


def _compatible(a: str, b: str) -> bool:
    """`unit^2` stands for any unit; `ticket` agrees with `child ticket`; pounds are money or weight."""
    if {a, b} == {"lb", "£"}:
        return True
    if a.split("^")[0] == "unit" or b.split("^")[0] == "unit":
        return "%" not in (a, b)
    words, others = set(a.split()), set(b.split())
    return words <= others or others <= words


def numeral_rule(a: Node, b: Node) -> RuleOutcome:
    if isinstance(a, Based) and isinstance(b, Based):
        return a.base == b.base and a.digits.lstrip("0").lower() == b.digits.lstrip("0").lower()
    if isinstance(b, Based):
        a, b = b, a
    if isinstance(a, Based) and isinstance(b, Num):
        return b.value.denominator == 1 and a.digits.lstrip("0") == str(b.value)
    return False if isinstance(a, Based) and not isinstance(b, Relation | Listing) else NOT_MINE
