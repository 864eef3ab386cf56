"""What our own arithmetic cannot settle: integrals, limits and infinite sums, by SymPy in a process that can be killed.

SymPy never sees text. It is given the trees that our parser built, and only those with small numbers, small exponents
and few nodes. The first question starts the process; until it has imported SymPy, a question may be answered
`timeout`.
"""

import atexit
import os
import threading
from fractions import Fraction
from typing import Any

from posttrain.rewards.answers.tree import ONE, Apply, Node, Num, Sym, walk
from posttrain.rewards.process import Died, TooLate, Worker
from posttrain.rewards.verdict import Verdict

NEEDED_FOR = frozenset(("int", "lim", "sum", "prod"))
UNDERSTOOD = NEEDED_FOR | frozenset(
    "add mul pow ln abs sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan factorial binom floor ceil".split()
)
MOST_NODES = 120
LARGEST_NUMBER = 10**6
LARGEST_EXPONENT = 60
LARGEST_FACTORIAL = 100
CPU_SECONDS = 0.5  # for one question: what decides is the work, not the load of the machine
SECONDS_TO_START = 60.0
SECONDS = 0.8  # of wall clock; with what was spent before it, below one second in all

_lock = threading.Lock()
_worker: Worker | None = None
_owner = 0  # the process that started it; a fork must not talk into its parent's pipe


def settle(gold: Node, pred: Node) -> Verdict | None:
    """The verdict on expressions with integrals, limits or infinite sums; None where there are none."""
    if not any(isinstance(n, Apply) and n.op in NEEDED_FOR for tree in (gold, pred) for n in walk(tree)):
        return None
    if not (harmless(gold) and harmless(pred)):
        return None
    answer = _ask([to_data(gold), to_data(pred)], SECONDS)
    verdicts: dict[str, Verdict | None] = {
        "equal": "equal",
        "different": "different",
        "timeout": "timeout",
        "unknown": None,
    }
    return verdicts.get(answer, "error")


def warm() -> None:
    """Wait until the process has imported SymPy."""
    _ask([to_data(ONE), to_data(ONE)], SECONDS_TO_START)


def _ask(question: Any, seconds: float) -> str:
    global _worker, _owner
    with _lock:
        if _worker is None or _owner != os.getpid():
            _worker, _owner = Worker("algebra", seconds=CPU_SECONDS, megabytes=1024), os.getpid()
        try:
            return str(_worker.ask(question, seconds))
        except TooLate:
            if _worker.ready:  # it is at work, not starting
                _stop()
        except Died:
            _stop()
    return "timeout"


def _stop() -> None:
    global _worker
    if _worker is not None and _owner == os.getpid():
        _worker.close()
    _worker = None


atexit.register(_stop)


def harmless(node: Node) -> bool:
    """Whether a tree is small enough, with small enough numbers, to be worth the worker's time."""
    nodes = list(walk(node))
    if len(nodes) > MOST_NODES:
        return False
    for n in nodes:
        match n:
            case Num(value) if abs(value.numerator) > LARGEST_NUMBER or value.denominator > LARGEST_NUMBER:
                return False
            case Apply("pow", (_, Num(exponent))) if abs(exponent) > LARGEST_EXPONENT:
                return False
            case Apply("pow", (_, Apply("pow", _))):
                return False
            case Apply("factorial", (inner,)) if not isinstance(inner, Sym) and not _at_most(inner, LARGEST_FACTORIAL):
                return False
            case Apply(op, _) if op not in UNDERSTOOD:
                return False
            case Num() | Sym() | Apply():
                continue
            case _:
                return False
    return True


def _at_most(node: Node, largest: int) -> bool:
    return isinstance(node, Num) and abs(node.value) <= largest


def to_data(node: Node) -> Any:
    """A tree as nested JSON lists."""
    match node:
        case Num(value):
            return [value.numerator, value.denominator]
        case Sym(name):
            return name
        case Apply(op, args):
            return {op: [to_data(a) for a in args]}
    raise TypeError(f"not an expression: {node!r}")


def from_data(data: Any) -> Node:
    """The tree that `to_data` wrote down."""
    match data:
        case [top, bottom]:
            return Num(Fraction(top, bottom))
        case str():
            return Sym(data)
    ((op, args),) = data.items()
    return Apply(op, tuple(from_data(a) for a in args))
