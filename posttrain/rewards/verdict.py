"""What grading returns."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["equal", "different", "no_answer", "error", "timeout"]


@dataclass(frozen=True)
class Grade:
    """The verdict on one completion, the answer found in it and the extraction rule that found it."""

    verdict: Verdict
    answer: str | None
    rule: str

    @property
    def correct(self) -> bool:
        return self.verdict == "equal"
