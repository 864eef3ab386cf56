"""Is this answer right? Extraction, equality and grading of mathematical answers.

    extract_answer("... so \\boxed{42}.")                     -> "42"
    equal(gold="1/2", pred="0.5")                             -> "equal"
    grade(completions=[...], golds=[...])                     -> [Grade(verdict, answer, rule), ...]

Verdicts: `equal`, `different`, `no_answer` (nothing is stated), `timeout` and `error` (counted apart, never right).
No text is ever evaluated as code; how it is read is told by `extract`, `parser` and `equality`, in the order in which
it happens.
"""

from collections.abc import Sequence

from posttrain.errors import UserError
from posttrain.rewards.answers.canonical import canonical
from posttrain.rewards.equality import decide
from posttrain.rewards.extract import extract
from posttrain.rewards.pool import grade_in_pool, workers_for
from posttrain.rewards.verdict import Grade, Verdict

__all__ = ["Grade", "Verdict", "canonical", "equal", "extract_answer", "grade", "grade_one"]


def extract_answer(text: str) -> str | None:
    """The answer that a completion states, as it is written there; None where it states none."""
    return extract(text).answer


def equal(*, gold: str, pred: str) -> Verdict:
    """Whether an answer (not a whole completion) equals the gold."""
    return decide(gold, pred).verdict


def grade_one(completion: str, gold: str) -> Grade:
    """The grade of one completion, in this process."""
    found = extract(completion)
    verdict: Verdict = "no_answer" if found.answer is None else decide(gold, found.answer).verdict
    return Grade(verdict, found.answer, found.rule)


def grade(*, completions: Sequence[str], golds: Sequence[str]) -> list[Grade]:
    """One grade per completion, in order; large batches are shared among child processes.

    Only the completion is searched, never a prompt. Raises UserError where the lengths differ.
    """
    if len(completions) != len(golds):
        raise UserError(f"golds: {len(golds)} for {len(completions)} completions; give one gold per completion")
    pairs = list(zip(completions, golds, strict=True))
    workers = workers_for(len(pairs))
    grades = grade_in_pool(pairs, workers) if workers > 1 else [grade_one(*pair) for pair in pairs]
    # A timeout may be the machine's fault: once more, alone.
    return [grade_one(*pair) if g.verdict == "timeout" else g for g, pair in zip(grades, pairs, strict=True)]
