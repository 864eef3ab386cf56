"""Is this answer right? Extraction, equality and grading of mathematical answers.

    extract_answer("... so \\boxed{42}.")                     -> "42"
    equal(gold="1/2", pred="0.5")                             -> "equal"
    grade(completions=[...], golds=[...])                     -> [Grade(verdict, answer, rule), ...]
    readable("\\frac{1}{")                                    -> False

Verdicts: `equal`, `different`, `no_answer` (nothing is stated), `timeout` and `error` (counted apart, never right).
No text is ever evaluated as code; how it is read is told by `extract`, `parser` and `equality`, in the order in which
it happens.
"""

import time
from collections.abc import Sequence

from posttrain.errors import UserError
from posttrain.rewards.answers import algebra, budget
from posttrain.rewards.answers.canonical import canonical
from posttrain.rewards.answers.readings import readings
from posttrain.rewards.answers.spelling import respell
from posttrain.rewards.equality import decide
from posttrain.rewards.extract import extract
from posttrain.rewards.pool import grade_in_pool, worth_sharing
from posttrain.rewards.verdict import Grade, Verdict

__all__ = ["Grade", "Verdict", "canonical", "equal", "extract_answer", "grade", "readable"]

BATCH = 64  # answers between two looks at the clock


def extract_answer(text: str) -> str | None:
    """The answer that a completion states, as it is written there; None where it states none."""
    return extract(text).answer


def equal(*, gold: str, pred: str) -> Verdict:
    """Whether an answer (not a whole completion) equals the gold."""
    return decide(gold, pred).verdict


def readable(gold: str) -> bool:
    """Whether a gold is an answer that can be read; one that is not equals nothing but its own spelling."""
    budget.start()
    try:
        return bool(readings(respell(gold), trusted=True))
    except budget.Exhausted:
        return False


def grade(*, completions: Sequence[str], golds: Sequence[str]) -> list[Grade]:
    """One grade per completion, in order; what would take long is shared among child processes.

    Only the completion is searched, never a prompt. Raises UserError where the lengths differ.
    """
    if len(completions) != len(golds):
        raise UserError(f"golds: {len(golds)} for {len(completions)} completions; give one gold per completion")
    pairs = list(zip(completions, golds, strict=True))
    grades: list[Grade] = []
    start = time.perf_counter()
    while len(grades) < len(pairs):
        if workers := worth_sharing(len(grades), time.perf_counter() - start, len(pairs) - len(grades)):
            return grades + grade_in_pool(pairs[len(grades) :], workers)
        grades += grade_here(pairs[len(grades) : len(grades) + BATCH])
    return grades


def grade_here(pairs: Sequence[tuple[str, str]]) -> list[Grade]:
    """One grade per (completion, gold), in this process."""
    graded = [_grade(completion, gold) for completion, gold in pairs]
    for i, (grade, step) in enumerate(graded):
        if step == "algebra" and grade.verdict == "timeout":
            algebra.warm()  # it may have been late only because SymPy was still being imported: once more
            graded[i] = _grade(*pairs[i])
    return [grade for grade, _ in graded]


def _grade(completion: str, gold: str) -> tuple[Grade, str]:
    found = extract(completion)
    if found.answer is None:
        return Grade("no_answer", None, found.rule), "empty"
    decision = decide(gold, found.answer)
    return Grade(decision.verdict, found.answer, found.rule), decision.step
