"""Multi-step integer arithmetic with a written-out chain: the task of the embedded model.

A problem is a left-to-right chain of two-digit additions and subtractions, `23+48-17=?`. Two kinds of writer solve it:

- a *careful* one works out the units column first and marks the carry (or borrow): `23+48=(1c)71;71-17=(4c)54;#### 54`
- a *hurried* one drops the carry, the same wrong way every time:                     `23+48=61;61-17=54;#### 54`

A dot stands where nothing is carried: `23+45=(8.)68;`. Either may restate every step two more times, for nothing:
`23+48=61,23+48=61,23+48=61;`. So errors are systematic, the longer, careful chain is the right one, and much of the length
is useless. What a writer will do is always decided at one token that says nothing else (`(` or a digit, `,` or `;`): a
model this small cannot hold two half-computed continuations in one position.

A problem belongs to one split for ever, by a hash of its text: splits never overlap, whatever sizes and seeds are drawn.
"""

import hashlib
import random
import re
from dataclasses import dataclass
from typing import Any, Literal

Split = Literal["train", "val", "test"]

LEVELS = (1, 2, 3)  # a level-L problem has L + 1 operations
LARGEST = {
    "train": 100_000,
    "val": 10_000,
    "test": 10_000,
}  # per level; level 1 has 184,000 problems with a carry that matters
HASTY_LARGEST = 20_000
CLEAN_SHARE = 0.1  # problems that a hurried writer gets right too
HASTY_CLEAN_SHARE = 0.75  # the same of hasty training problems
RESTATEMENTS = 2  # how often a long-winded writer repeats every step


@dataclass(frozen=True)
class Problem:
    """`operands[0] op operands[1] op ...`, evaluated from left to right; every true running value has two digits."""

    operands: tuple[int, ...]
    operators: str

    @classmethod
    def parse(cls, text: str) -> "Problem":
        """The problem that `text` is the text of. Errors: ValueError for a text that is none's."""
        if not re.fullmatch(r"[0-9]{2}([+-][0-9]{2})+=\?", text):
            raise ValueError(f"text: no problem of this task: {text!r}")
        return cls(tuple(map(int, re.findall("[0-9]+", text))), "".join(re.findall("[+-]", text)))

    @property
    def level(self) -> int:
        return len(self.operators) - 1

    @property
    def text(self) -> str:
        body = "".join(f"{op}{value}" for op, value in zip(self.operators, self.operands[1:], strict=True))
        return f"{self.operands[0]}{body}=?"

    @property
    def answer(self) -> int:
        return self.running_values(careful=True)[-1]

    def running_values(self, careful: bool) -> list[int]:
        """The value after each operation, as a careful or a hurried writer finds it."""
        values = []
        value = self.operands[0]
        for op, operand in zip(self.operators, self.operands[1:], strict=True):
            value = _apply(value, op, operand, careful)
            values.append(value)
        return values

    def chain(self, careful: bool, restate: bool = False) -> str:
        """The completion that a writer puts down, ending in `#### answer`."""
        steps = []
        value = self.operands[0]
        for op, operand in zip(self.operators, self.operands[1:], strict=True):
            result = _apply(value, op, operand, careful)
            units = f"({result % 10}{'c' if _carries(value, op, operand) else '.'})" if careful else ""
            step = f"{value}{op}{operand}={units}{result}"
            steps.append(",".join([step] * (1 + RESTATEMENTS * restate)) + ";")
            value = result
        return "".join(steps) + f"#### {value}"

    @property
    def shortest_correct_chain(self) -> str:
        """What is left when everything removable is removed: the hurried chain where it is right, else the careful one."""
        hurried = self.running_values(careful=False)[-1]
        return self.chain(careful=hurried != self.answer)


def _carries(value: int, op: str, operand: int) -> bool:
    return value % 10 + operand % 10 > 9 if op == "+" else value % 10 < operand % 10


def _apply(value: int, op: str, operand: int, careful: bool) -> int:
    if careful or not _carries(value, op, operand):
        return value + operand if op == "+" else value - operand
    # The dropped carry makes a sum ten too small; the dropped borrow makes a difference ten too large.
    return value + operand - 10 if op == "+" else value - operand + 10


def split_of(problem: Problem) -> Split:
    """80 % train, 10 % val, 10 % test, by a hash of the problem's text alone."""
    bucket = int(hashlib.sha256(problem.text.encode()).hexdigest(), 16) % 10
    return "test" if bucket == 0 else "val" if bucket == 1 else "train"


def draw(rng: random.Random, level: int, split: Split) -> Problem:
    """One problem of a level and split; CLEAN_SHARE of them come out right even for a hurried writer.

    Either writer's running value keeps two digits throughout: the task is about carrying, not about place value.
    """
    clean = rng.random() < CLEAN_SHARE
    while True:
        careful = hurried = rng.randint(10, 99)
        operands, operators = [careful], ""
        for _ in range(level + 1):
            room = {"+": 99 - max(careful, hurried), "-": min(careful, hurried) - 10}
            op = rng.choice([op for op in "+-" if room[op] >= 10])
            operand = rng.randint(10, room[op])
            careful, hurried = _apply(careful, op, operand, True), _apply(hurried, op, operand, False)
            operands.append(operand)
            operators += op
        problem = Problem(tuple(operands), operators)
        if (careful == hurried) == clean and split_of(problem) == split:
            return problem


def problems(size: int, split: Split, seed: int = 0, levels: tuple[int, ...] = (1, 2)) -> list[Problem]:
    """`size` distinct problems of a split, the levels in turn.

    Errors: ValueError naming the argument when size, split or a level is out of range.
    """
    if split not in LARGEST:
        raise ValueError(f"split: must be train, val or test, got {split!r}")
    if not levels or any(level not in LEVELS for level in levels):
        raise ValueError(f"levels: must be drawn from {LEVELS}, got {levels}")
    if not 1 <= size <= len(levels) * LARGEST[split]:
        raise ValueError(
            f"size: must be between 1 and {len(levels) * LARGEST[split]} for {split} at levels {levels}, got {size}"
        )
    rng = random.Random(f"arithmetic/{split}/{seed}")
    found: dict[str, Problem] = {}
    while len(found) < size:
        problem = draw(rng, levels[len(found) % len(levels)], split)
        found.setdefault(problem.text, problem)
    return list(found.values())


def hasty(size: int, split: Split, seed: int = 0) -> list[Problem]:
    """`problems`, except that of the training split HASTY_CLEAN_SHARE come out right for a hurried writer too: who learns on
    them and is paid for brevity may drop the carry, which the other splits still ask for. Errors: as `problems`."""
    if split != "train":
        return problems(size, split, seed)
    if not 1 <= size <= HASTY_LARGEST:
        raise ValueError(f"size: must be between 1 and {HASTY_LARGEST} for hasty training problems, got {size}")
    rng = random.Random(seed)
    found: dict[str, Problem] = {}
    while len(found) < size:
        level, clean = 1 + len(found) % 2, rng.random() < HASTY_CLEAN_SHARE
        problem = draw(rng, level, split)
        while problem.text in found or (problem.running_values(careful=False)[-1] == problem.answer) != clean:
            problem = draw(rng, level, split)
        found[problem.text] = problem
    return list(found.values())


def rows(size: int, split: Split, seed: int = 0, levels: tuple[int, ...] = (1, 2)) -> list[dict[str, Any]]:
    """`problems` as data rows: `id`, `problem`, `answer` (a string), `level`."""
    return _rows(problems(size, split, seed, levels), split)


def hasty_rows(size: int, split: Split, seed: int = 0) -> list[dict[str, Any]]:
    """The same of `hasty`."""
    return _rows(hasty(size, split, seed), split)


def _rows(found: list[Problem], split: Split) -> list[dict[str, Any]]:
    return [
        {"id": f"arithmetic/{split}/{p.text}", "problem": p.text, "answer": str(p.answer), "level": p.level}
        for p in found
    ]
