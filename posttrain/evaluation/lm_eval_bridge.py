"""The metrics of lm-eval 0.4.13's math tasks, on the completions of ours: for comparing with published numbers, not as the score.

- gsm8k_cot: `strict-match` (the first number after "The answer is") and `flexible-extract` (the last number of all), compared
  as strings without commas, dollar signs and a last dot.
- minerva_math, minerva_math500: `exact_match` (what stands in "Final Answer: The final answer is ... I hope it is correct.",
  normalised as in Lewkowycz et al. 2022, App. D, and compared as strings, else by SymPy).

lm-eval has a second metric for the latter, `math_verify`; it hands text of the model to SymPy's `parse_expr`, which evaluates
Python, so it is not offered here. lm-eval scores the first sample of a problem; here every sample has its score.
"""

import importlib.metadata
import re
from collections.abc import Sequence
from typing import Any

from posttrain.rewards.process import Died, TooLate, Worker

METRICS = {
    "gsm8k_cot": ("strict-match", "flexible-extract"),
    "minerva_math": ("exact_match",),
    "minerva_math500": ("exact_match",),
}
INVALID = "[invalid]"
SECONDS = 5  # lm-eval's limit for one comparison
MEGABYTES = 2048
LONGEST = 10_000  # characters of an answer; no gold is that long


def scores(task: str, row: dict[str, Any], completions: Sequence[str], judge: "Judge") -> dict[str, list[float]]:
    """metric -> a score, 0 or 1, for every completion of one problem (a row with `answer`, and `solution` where it has one)."""
    if task == "gsm8k_cot":
        return {name: [gsm8k_score(name, text, row["answer"]) for text in completions] for name in METRICS[task]}
    gold = normalise(boxed(row.get("solution", "")) or row["answer"])
    return {"exact_match": [float(judge.equivalent(normalise(final_answer(text)), gold)) for text in completions]}


def gsm8k_score(name: str, completion: str, gold: str) -> float:
    return float(_bare(filtered(name, completion)) == _bare(gold))


_STRICT = re.compile(r"The answer is (\-?[0-9\.\,]+).")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def filtered(name: str, completion: str) -> str:
    """What a gsm8k_cot filter takes out of a completion."""
    found = (_STRICT if name == "strict-match" else _FLEXIBLE).findall(completion)
    return (found[0] if name == "strict-match" else found[-1]).strip() if found else INVALID


def _bare(text: str) -> str:
    text = text.replace(",", "").replace("$", "").rpartition("#### ")[2]
    return re.sub(r"\.$", "", text).lower()


_END = re.compile(r"(.*?). I hope it is correct.")


def final_answer(completion: str) -> str:
    """What Minerva's closing phrase states."""
    for line in (completion + "I hope it is correct.").split("\n"):
        _, phrase, rest = line.partition("Final Answer: The final answer is")
        if phrase and (match := _END.match(rest)):
            return match.group(1).strip()
    return "[invalidanswer]"


def boxed(solution: str) -> str | None:
    """The content of a reference solution's last box, as lm-eval reads it."""
    if "\\boxed " in solution:
        return solution.split("\\boxed ")[-1].split("$")[0]
    start = solution.rfind("\\boxed{")
    depth = 0
    for index in range(start + len("\\boxed"), len(solution) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(solution[index], 0)
        if depth == 0:
            return solution[start + len("\\boxed{") : index]
    return None


_REPLACED = (
    ("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), (r"\ ", ""), (" ", ""), ("mbox", "text"),
    (",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}"),
)  # fmt: skip
_UNITS = (
    "square ways integers dollars mph inches ft hours km units sue points feet minutes digits cents degrees cm gm pounds meters "
    "meals edges students childrentickets multiples"
).split()
_REMOVED = (
    *_UNITS[:10], "\\ldots", *_UNITS[10:], "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}",
    "\\text{}", r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', "\\dots",
)  # fmt: skip
_WHOLE_UNITS = [re.compile(rf"(?<!\\)\b{unit}\b") for unit in _UNITS]
_COMMAND = re.compile(r"(\\[a-zA-Z]+)")
_RESPELT = tuple(
    (re.compile(pattern), spelling)
    for pattern, spelling in (
        (r"(.*?)(\$)(.*?)(\$)(.*)", r"$\3$"),
        (r"(\\text\{)(.*?)(\})", r"\2"),
        (r"(\\textbf\{)(.*?)(\})", r"\2"),
        (r"(\\overline\{)(.*?)(\})", r"\2"),
        (r"(\\boxed\{)(.*)(\})", r"\2"),
        (r"(frac)([^{])(.)", r"frac{\2}{\3}"),
        (r"(sqrt)(\[[^\]]*\])(\w)", r"\1\2{\3}"),
        (r"(sqrt)(?!\[)([^{])", r"sqrt{\2}"),
    )
)
_THOUSANDS = re.compile(r"-?\d{1,3}(,\d{3})+")


def normalise(answer: str) -> str:
    """Minerva's normal form of an answer, with lm-eval's repairs (units as words, roots with an index, tuples)."""
    answer = answer.split("=")[-1]
    if len(answer) > LONGEST:
        return answer
    for unit in _WHOLE_UNITS:
        answer = unit.sub("", answer)
    for before, after in _REPLACED:
        answer = answer.replace(before, after)
    for removed in _REMOVED:
        if removed.isalpha():  # a unit; never out of the name of a command: "ft" is in "\left"
            pieces = _COMMAND.split(answer)
            answer = "".join(piece if index % 2 else piece.replace(removed, "") for index, piece in enumerate(pieces))
        else:
            answer = answer.replace(removed, "")
    for pattern, spelling in _RESPELT:
        answer = pattern.sub(spelling, answer)
    answer = answer.replace("$", "")
    return answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else answer


class Judge:
    """Compares normal forms: the same string, or the same value to SymPy. What SymPy cannot read, or not in five seconds, differs."""

    def __init__(self) -> None:
        self._worker: Worker | None = None

    def equivalent(self, pred: str, gold: str) -> bool:
        if pred == gold and pred:
            return True
        if max(len(pred), len(gold)) > LONGEST:
            return False
        self._worker = self._worker or Worker("latex", SECONDS, MEGABYTES)
        start_up = 0 if self._worker.ready else 60
        try:
            return self._worker.ask([pred, gold], start_up + SECONDS) is True
        except (Died, TooLate):
            self.close()
            return False

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def available(task: str | None) -> bool:
    """Whether a task's metrics can be computed here: SymPy's LaTeX parser works with one version of its runtime only."""
    return task == "gsm8k_cot" or (task is not None and antlr_version().startswith("4.11"))


def antlr_version() -> str:
    try:
        return importlib.metadata.version("antlr4-python3-runtime")
    except importlib.metadata.PackageNotFoundError:
        return "none"
