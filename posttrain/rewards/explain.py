"""The path that a grade took, told in a few lines."""

from posttrain.rewards.answers.show import show
from posttrain.rewards.answers.spelling import respell
from posttrain.rewards.answers.tree import Node
from posttrain.rewards.equality import decide
from posttrain.rewards.extract import extract
from posttrain.rewards.verdict import Grade

_RULES = {
    "boxed": "the last balanced box with content",
    "hash": "what follows the last ####",
    "tag": "the last <answer> element",
    "phrase": "the last explicit statement",
    "bold": "the bold number on the last line",
    "bare": "the text is one number",
    "given": "no statement was found: the text is taken as the answer itself",
}
_STEPS = {
    "empty": "there is no answer",
    "text": "the strings, once spelling is levelled",
    "number": "exact fractions",
    "clock": "times of day",
    "structure": "both were parsed and compared part by part",
    "choice": "the letters of the options",
    "algebra": "SymPy, in its own process",
    "unread": "at least one side is nothing that can be read",
    "budget": "it would cost more than one comparison may",
    "error": "a defect of the grader",
}


def grade_text(gold: str, text: str) -> tuple[Grade, list[str]]:
    """The grade of a completion, or of a bare answer, and the lines that explain it."""
    found = extract(text)
    answer, rule = (text, "given") if found.answer is None else (found.answer, found.rule)
    decision = decide(gold, answer)
    lines = [
        f"extraction  {rule}: {_RULES[rule]}",
        f"answer      {answer.strip()}",
        f"levelled    gold  {respell(gold)}",
        f"            pred  {respell(answer)}",
    ]
    for side, seen in zip(("gold", "pred"), decision.seen, strict=False):
        lines.append(
            f"{'read as' if side == 'gold' else '':11} {side}  {show(seen) if isinstance(seen, Node) else seen}"
        )
    lines.append(f"decided by  {decision.step}: {_STEPS[decision.step]}")
    return Grade(decision.verdict, answer, rule), lines
