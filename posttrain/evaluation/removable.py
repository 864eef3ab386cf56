"""How much of what right answers say could be left out.

On the embedded model's task the generator knows, problem by problem, the shortest chain that comes out right
(posttrain/data/arithmetic.py): what a right answer is longer than that is removable. A chain that mixes both writers' steps
can be shorter still; such an answer counts with the negative number that it is.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.data.arithmetic import Problem
from posttrain.evaluation.intervals import bootstrap_interval
from posttrain.rollouts.table import RolloutTable

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Removable:
    """Of every problem's right completions [prompts]: how many there are, their tokens, and those that are removable."""

    right: Array
    tokens: Array
    removable: Array

    @property
    def mean_tokens(self) -> float:
        """Of a right completion; NaN where there is none."""
        return float(self.tokens.sum() / self.right.sum()) if self.right.any() else float("nan")

    @property
    def mean(self) -> float:
        """Removable tokens of a right completion; NaN where there is none."""
        return float(self.removable.sum() / self.right.sum()) if self.right.any() else float("nan")


@dataclass(frozen=True)
class Removed:
    """`share` of the removable tokens that is gone, with its 95 % interval over problems."""

    share: float
    low: float
    high: float


def removable(table: RolloutTable, tokenizer: Any) -> Removable:
    """Counts in tokens, the one that ends a completion included. Errors: ValueError where a prompt is not of that task."""
    prompts = [row[0] for row in table.by_prompt("prompt")]
    shortest = np.array([shortest_tokens(prompt[-1]["content"], tokenizer) for prompt in prompts])
    right = np.array(table.rectangle("correct"), dtype=np.float64)
    lengths = np.array([[len(ids) for ids in row] for row in table.rectangle("completion_ids")])
    extra = right * (lengths - shortest[:, None])
    return Removable(right.sum(1), (right * lengths).sum(1), extra.sum(1))


def shortest_tokens(problem: str, tokenizer: Any) -> int:
    """Tokens of the shortest correct chain and of its end. Errors: ValueError for a text that is no problem of that task."""
    chain = Problem.parse(problem).shortest_correct_chain
    return len(tokenizer(chain, add_special_tokens=False)["input_ids"]) + 1


def removed(after: Removable, before: Removable) -> Removed:
    """1 - what is removable after / before, on the same problems in the same order; the interval is a bootstrap over
    problems of the share, linearised. Errors: ValueError where no answer was right, or nothing was removable before."""
    if not (after.right.any() and before.right.any()) or before.mean == 0:
        raise ValueError("before: needs right answers before and after, and something removable before")
    ratio = after.mean / before.mean
    influence = _influence(after) / before.mean - ratio * _influence(before) / before.mean
    low, high = bootstrap_interval(1 - ratio - influence)
    return Removed(1 - ratio, low, high)


def _influence(of: Removable) -> Array:
    """What each problem adds to the mean, a ratio of two sums; sums to 0."""
    return (of.removable - of.mean * of.right) / of.right.mean()
