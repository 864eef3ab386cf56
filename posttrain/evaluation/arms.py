"""Ways to answer from the same samples, side by side: each is an arm with an accuracy, an interval and a cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.evaluation.intervals import mean_interval
from posttrain.evaluation.metrics import best_of_n, counts, majority_curve, pass_at_k, weighted_majority
from posttrain.rewards.math import canonical
from posttrain.rollouts.table import RolloutTable

Array = NDArray[np.float64]
SAMPLED = ("base", "majority", "oracle")  # arms of the base alone, which every method's own run has too


@dataclass(frozen=True)
class Arm:
    """One way to answer.

    per_problem: its expected score on every problem [prompts]. tokens: completion tokens that one answer costs, all samples
    counted. curve: accuracy against k, from k = 1. seconds: what it took to sample, learn and choose. measures: what else is
    known of it: `kl` to the reference, in nats per completion; `majority`, accuracy of a vote over its own samples;
    `tokens_per_second` of its sampling.
    """

    name: str
    title: str
    per_problem: Array
    tokens: float
    seconds: float
    curve: tuple[float, ...] = ()
    measures: Mapping[str, float] = field(default_factory=dict)

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
            **self.measures,
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


def policy_arm(name: str, title: str, table: RolloutTable, seconds: float) -> Arm:
    """One sample of another policy, from its own table [prompts, samples]; seconds: what it took to learn it."""
    n, right = counts(table.rectangle("correct"))
    k = int(n.min())
    ballots = [
        [None if answer is None else canonical(answer) for answer in row] for row in table.rectangle("extracted")
    ]
    lengths = [len(ids) for ids in table.column("completion_ids")]
    sampled = table.manifest["seconds"]
    measures = {"tokens_per_second": sum(lengths) / max(sampled, 1e-9)}
    # A table knows the KL of guidance, unless it was lazy, and not that of trained weights.
    if any(table.column("guide")) and not table.is_lazy:
        measures = {"kl": float(np.mean(table.column("kl"))), **measures}
    if k > 2:  # a vote of two is a coin
        vote = majority_curve(ballots, table.rectangle("correct"), k)
        measures["majority"] = float(vote[:, -1].mean())
    return Arm(name, title, pass_at_k(n, right, 1), float(np.mean(lengths)), seconds + sampled / k, (), measures)


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


def weighted_vote_arm(
    name: str,
    title: str,
    scores: Sequence[Sequence[float]],
    answers: Sequence[Sequence[str | None]],
    correct: Sequence[Sequence[bool]],
    lengths: Sequence[Sequence[int]],
    seconds: float,
    least: float = 0.0,
) -> Arm:
    """A vote of k samples, each counting for its score above `least`, all [prompts, k].

    least: what no score is below but by rounding, such as the least return of a reward model: a vote against an answer,
    which a weight below zero would be, is not one for the others.
    """
    ballots = [[None if answer is None else canonical(answer) for answer in row] for row in answers]
    weights = [[max(score - least, 0.0) for score in row] for row in scores]
    tokens = len(scores[0]) * float(np.mean([length for row in lengths for length in row]))
    return Arm(name, title, weighted_majority(ballots, weights, correct), tokens, seconds)
