"""Ways to answer from the same samples, side by side: each is an arm with an accuracy, an interval and a cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.evaluation.intervals import mean_interval
from posttrain.evaluation.metrics import best_of_n, counts, majority_curve, pass_at_k
from posttrain.rewards.math import canonical

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Arm:
    """One way to answer.

    per_problem: its expected score on every problem [prompts]. tokens: completion tokens that one answer costs, all samples
    counted. curve: accuracy against k, from k = 1. seconds: what it took to sample, learn and choose.
    """

    name: str
    title: str
    per_problem: Array
    tokens: float
    seconds: float
    curve: tuple[float, ...] = ()

    @property
    def accuracy(self) -> float:
        return float(self.per_problem.mean())

    @cached_property
    def interval(self) -> tuple[float, float]:
        return mean_interval(self.per_problem)

    def summary(self) -> dict[str, Any]:
        return {
            "accuracy": self.accuracy,
            "interval": list(self.interval),
            "tokens": self.tokens,
            "seconds": self.seconds,
        }


def sampled_arms(
    correct: Sequence[Sequence[bool]],
    answers: Sequence[Sequence[str | None]],
    lengths: Sequence[Sequence[int]],
    seconds: float,
) -> dict[str, Arm]:
    """What needs no learning, from k samples of every problem, all [prompts, k]: one sample, majority vote, the oracle.

    answers: as extracted; a vote counts for its canonical form. lengths: completion tokens; seconds: the time it took to draw all
    the samples.
    """
    n, right = counts(correct)
    k = int(n.min())
    per_sample = float(np.mean([length for row in lengths for length in row]))
    ballots = [[None if answer is None else canonical(answer) for answer in row] for row in answers]
    vote = majority_curve(ballots, correct, k)
    oracle = [pass_at_k(n, right, size) for size in range(1, k + 1)]
    base = oracle[0]
    return {
        "base": Arm("base", "one sample", base, per_sample, seconds / k, (float(base.mean()),) * k),
        "majority": Arm(
            "majority", f"majority of {k}", vote[:, -1], k * per_sample, seconds, tuple(vote.mean(0).tolist())
        ),
        "oracle": Arm(
            "oracle",
            f"oracle of {k}",
            oracle[-1],
            k * per_sample,
            seconds,
            tuple(float(score.mean()) for score in oracle),
        ),
    }


def reranked_arm(
    name: str,
    title: str,
    scores: Sequence[Sequence[float]],
    correct: Sequence[Sequence[bool]],
    lengths: Sequence[Sequence[int]],
    seconds: float,
) -> Arm:
    """The best-scored of k samples, all [prompts, k]; `curve` is exact over all subsets of the samples."""
    k = len(scores[0])
    curve = [best_of_n(scores, correct, size) for size in range(1, k + 1)]
    tokens = k * float(np.mean([length for row in lengths for length in row]))
    return Arm(name, title, curve[-1], tokens, seconds, tuple(float(value.mean()) for value in curve))
