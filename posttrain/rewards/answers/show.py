"""Trees as a person would write them."""

from posttrain.rewards.answers.tree import (
    MINUS_ONE,
    Apply,
    Based,
    Interval,
    Listing,
    Matrix,
    Node,
    Num,
    Quantity,
    Ratio,
    Relation,
    Sym,
    Tuple,
    Words,
)

_SIGNS = {"cup": " ∪ ", "cap": " ∩ ", "setminus": " \\ "}


def show(node: Node) -> str:
    """One line of plain notation; what binds loosely stands in brackets."""
    match node:
        case Num(value):
            return str(value)
        case Sym(name):
            return name.removeprefix("set ")
        case Words(text):
            return f'"{text}"'
        case Based(digits, base):
            return f"{digits} in base {base}"
        case Quantity(value, unit):
            return f"{show(value)} [{unit}]"
        case Tuple(items):
            return f"({_joined(items)})"
        case Listing(items, _):
            return f"{{{_joined(items)}}}"
        case Ratio(items):
            return " : ".join(map(show, items))
        case Interval(low, high, low_closed, high_closed):
            return f"{'[' if low_closed else '('}{show(low)}, {show(high)}{']' if high_closed else ')'}"
        case Matrix(rows):
            return f"[{'; '.join(map(_joined, rows))}]"
        case Relation(sides, ops):
            return show(sides[0]) + "".join(f" {op} {show(side)}" for op, side in zip(ops, sides[1:], strict=True))
    return _operation(node)


def _joined(items: tuple[Node, ...]) -> str:
    return ", ".join(map(show, items))


def _operation(node: Apply) -> str:
    match node.op, node.args:
        case "add", args:
            return " + ".join(map(show, args)).replace("+ -", "- ")
        case "mul", (sign, *rest) if sign == MINUS_ONE and rest:
            return "-" + "*".join(map(_tight, rest))
        case "mul", args:
            return "*".join(map(_tight, args))
        case "pow", (base, exponent):
            return f"{_tight(base)}^{_tight(exponent)}"
        case (("cup" | "cap" | "setminus"), args):
            return _SIGNS[node.op].join(map(_tight, args))
    return f"{node.op.removesuffix('()')}({_joined(node.args)})"


def _tight(node: Node) -> str:
    text = show(node)
    loose = isinstance(node, Relation) or (isinstance(node, Apply) and node.op in ("add", "mul", "pow"))
    return f"({text})" if loose or (isinstance(node, Num) and ("/" in text or "-" in text)) else text
