"""Is an answer equal to the gold? The steps, in order; the first that can decide does:

1. `empty`      there is no answer
2. `text`       the strings are the same once spelling is levelled
3. `number`     two plain numbers, as exact fractions
4. `clock`      two times of day
5. `structure`  both are read: sets, tuples, units, labels, ... down to expressions, exactly or in arbitrary precision
6. `algebra`    what is left of that (integrals, limits, infinite sums): SymPy in a process that can be killed
7. `choice`     the letter of an option against the letter, or against what the option says
8. `unread`     one side is nothing that can be read: different

A comparison that costs more than its allowance ends as `timeout`.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from posttrain.rewards.answers import budget
from posttrain.rewards.answers.algebra import settle
from posttrain.rewards.answers.readings import readings
from posttrain.rewards.answers.spelling import respell, squeeze
from posttrain.rewards.answers.structure import same
from posttrain.rewards.verdict import Verdict

LONGEST_TEXT = 20_000  # characters; beyond it only the very same string is equal


@dataclass(frozen=True)
class Decision:
    """A verdict, the step that took it, and what it saw of gold and prediction."""

    verdict: Verdict
    step: str
    seen: tuple[object, ...] = ()


def decide(gold: str, pred: str) -> Decision:
    """Compare a gold with a predicted answer; no text makes it raise."""
    budget.start()
    try:
        return _decide(gold, pred)
    except budget.Exhausted:
        return Decision("timeout", "budget")
    except Exception as error:  # a defect of ours, on text that anybody may send: counted as `error`, never as right
        return Decision("error", "error", (error,))


def _decide(gold: str, pred: str) -> Decision:
    if not pred.strip():
        return Decision("no_answer", "empty")
    if pred.strip() == gold.strip():
        return Decision("equal", "text")
    if max(len(gold), len(pred)) > LONGEST_TEXT:
        return Decision("different", "unread")
    gold, pred = respell(gold), respell(pred)
    if not pred:
        return Decision("no_answer", "empty")
    if pred == gold or squeeze(pred) == squeeze(gold):
        return Decision("equal", "text")
    for step in (_number, _clock, _structure, _choice):
        if decision := step(gold, pred):
            return decision
    return Decision("different", "unread")


def _verdict(equal: bool | None, step: str, *seen: object) -> Decision:
    return Decision("equal" if equal else "different", step, seen)


_NUMBER = re.compile(r"([-+]?)\s*([1-9]\d{0,2}(?:,\d{3})+|\d+)?(\.\d+)?(?:/(\d+))?")
LONGEST_NUMBER = 1_000  # digits


def _number(gold: str, pred: str) -> Decision | None:
    x, y = plain_number(gold), plain_number(pred)
    return None if x is None or y is None else _verdict(x == y, "number", x, y)


def plain_number(text: str) -> Fraction | None:
    """The value of `42`, `-1,234.5`, `.5`, `3/4`."""
    match = _NUMBER.fullmatch(text) if len(text) <= LONGEST_NUMBER else None
    if not match or not (match[2] or match[3]) or (match[4] and not int(match[4])):
        return None
    value = Fraction(f"{match[1]}{(match[2] or '0').replace(',', '')}{match[3] or ''}")
    return value / int(match[4]) if match[4] else value


_CLOCK = re.compile(r"(?i)(\d{1,2}):([0-5]\d)(?::([0-5]\d))?([ap]?)\.?(?:m\.?)?(?:o'clock)?")
_NOT_CLOCK = re.compile(r"\\!|\\text|\\mbox|\\textbf|\\ |[{}~\s]")


def _clock(gold: str, pred: str) -> Decision | None:
    """`4:30 p.m.` against `4:30`; what may as well be a ratio in lowest terms, such as `3:10`, is left alone."""
    a, b = (_CLOCK.fullmatch(_NOT_CLOCK.sub("", text)) for text in (gold, pred))
    if not a or not b:
        return None
    reduced = int(a[1]) and int(a[2]) % int(a[1]) and not a[2].startswith("0")
    if reduced and not (a[4] or b[4]):
        return None
    same_time = [int(x or 0) for x in a.group(1, 2, 3)] == [int(x or 0) for x in b.group(1, 2, 3)]
    return _verdict(same_time and ("" in (a[4], b[4]) or a[4].lower() == b[4].lower()), "clock", a[0], b[0])


def _structure(gold: str, pred: str) -> Decision | None:
    golds, preds = readings(gold, trusted=True), readings(pred, trusted=False)
    if not golds or not preds:
        return None
    undecided = False
    for a in golds:
        for b in preds:
            outcome = same(a, b)
            if outcome:
                return Decision("equal", "structure", (a, b))
            undecided = undecided or outcome is None
    if undecided and (verdict := settle(golds[0], preds[0])):
        return Decision(verdict, "algebra", (golds[0], preds[0]))
    if undecided or option(gold) or option(pred):
        return None
    return Decision("different", "structure", (golds[0], preds[0]))


_STYLE = re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf)|mbox)\s*\{([^{}]*)\}")
_OPTION = re.compile(r"(?:(?i:option|choice|answer)\s+)?\(?\s*([A-Z])\s*(?:\)|(?=\Z|[.:]))\s*[.:]?\s*(.*)", re.DOTALL)
_ANOTHER = re.compile(r"(?:^|[\s(])[A-Z][).:]|(?i:\b(?:or|and|not)\b)")


def option(text: str) -> tuple[str, str] | None:
    """The letter of a multiple-choice answer and what is written after it: `(C) 45` gives C and 45."""
    match = _OPTION.fullmatch(_STYLE.sub(r"\1", text).strip())
    return None if not match or _ANOTHER.search(match[2]) else (match[1], match[2].strip())


def _choice(gold: str, pred: str) -> Decision | None:
    a, b = option(gold), option(pred)
    if a and b:
        texts = not (a[1] and b[1]) or decide(a[1], b[1]).verdict == "equal"
        return _verdict(a[0] == b[0] and texts, "choice", a[0], b[0])
    if b and b[1]:
        return _verdict(decide(gold, b[1]).verdict == "equal", "choice", gold, b[1])
    if a and a[1]:
        return _verdict(decide(a[1], pred).verdict == "equal", "choice", a[1], pred)
    return None
