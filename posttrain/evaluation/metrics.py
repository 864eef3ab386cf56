"""Point estimates of an evaluation: pass@k, majority vote, best of n, G-Pass@k, tokens, rates.

Every score is returned per problem, [prompts], so that its interval can treat problems as the sampling unit
(`posttrain.evaluation.intervals`); the reported number is its mean. Everything at k < n is the exact average over all
subsets of k of the n samples: nothing here is drawn at random.

Groups are [prompts][samples] and may be ragged. A wrong argument raises a ValueError that names it.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from posttrain.evaluation.intervals import (
    bootstrap_interval,
    bootstrap_intervals,
    macro_mean,
    mean_interval,
    paired_comparison,
    standard_error,
    variance_split,
    wilson_interval,
)

__all__ = [
    "DEFINITIONS",
    "best_of_n",
    "bootstrap_interval",
    "bootstrap_intervals",
    "counts",
    "g_pass_at_k",
    "macro_mean",
    "majority_at_k",
    "majority_curve",
    "mean_g_pass_at_k",
    "mean_interval",
    "paired_comparison",
    "pass_at_k",
    "rates",
    "standard_error",
    "token_stats",
    "variance_split",
    "weighted_majority",
    "wilson_interval",
    "worst_at_k",
]

Array = NDArray[np.float64]
Flags = Iterable[Iterable[float]]  # [prompts][samples], 0 or 1
Answers = Iterable[Iterable[str | None]]  # [prompts][samples], canonical answers; None: no answer was found

MAX_SAMPLES = 1000  # C(1000, 500) is still a float64

DEFINITIONS = {
    "pass@1": "mean over problems of c/n, c of the n samples right (also called avg@n or mean@n)",
    "pass@k": "probability that at least one of k samples is right: mean over problems of 1 - C(n-c,k)/C(n,k)",
    "maj@k": "score of the most frequent canonical answer among k samples, averaged exactly over all subsets of k; "
    "samples without an answer cast no vote; tied answers share the score equally",
    "weighted majority": "score of the answer with the largest sum of weights over all n samples; samples without an "
    "answer cast no vote; tied answers share the score equally",
    "best-of-k": "score of the sample ranked first by the scorer among k samples, averaged exactly over all subsets of "
    "k; tied samples share the score equally",
    "worst@k": "probability that all of k samples are right: mean over problems of C(c,k)/C(n,k)",
    "G-Pass@k_tau": "probability that at least ceil(tau k), and at least one, of k samples are right (hypergeometric)",
    "mG-Pass@k": "2 x the integral of G-Pass@k_tau over tau from 1/2 to 1",
    "Q#": "one completion of the guided policy: every token's weight is pi_ref * E[exp(R / beta)], under the value model's law "
    "of the return R after it",
    "CD": "controlled decoding: the same value model used by its mean, every token's weight is pi_ref * exp(E[R] / beta)",
    "IPL": "every token's weight is pi_ref * exp(Q / beta), Q learned from which completions are preferred",
    "reward model": "the value model's E[R] of a whole completion, read at its last token: the scorer of best-of-k and, above "
    "the least return, the weight of a vote",
    "KL": "nats per completion: the sum over its tokens of KL(guided law || reference law) at the sampling temperature, exact over "
    "the whole vocabulary, before top-p; mean over completions",
    "tokens": "completion tokens, over all samples: mean, and p95 = the smallest length that 95 % of the samples do "
    "not exceed",
    "seconds": "wall clock of all that an arm needs, all problems together: sampling (of one sample: its share), and for "
    "a learned arm its training completions, training and choosing too",
    "truncation": "share of samples that ended at the token limit (finish reason length)",
    "answer found": "share of samples in which an answer was found",
    "grader error": "share of samples whose grading ended in an error or a timeout; they count as wrong",
    "accuracy, finished": "share of right samples among those that were not truncated (for diagnosis only)",
    "standard error": "standard deviation over problems of the per-problem score / sqrt(problems)",
    "interval": "95 % unless stated; Wilson where every problem scores 0 or 1 (as with n = 1) or all score the same, "
    "else a BCa bootstrap of 10,000 seeded draws over problems (the cluster)",
    "within": "the part of the standard error that more samples per problem would remove",
    "between": "the part of the standard error that only more problems would remove",
    "macro mean": "mean over benchmarks of their means, each benchmark counting the same",
    "difference": "mean over the shared problems of run minus baseline, paired by problem",
    "p-value": "two-sided sign-flip permutation test of the paired differences (McNemar's exact test for n = 1); "
    "exact where the law has few enough values, else 10,000 seeded flips",
    "detectable": "the smallest true difference that a two-sided test at 5 % (unless stated) finds with 80 % power",
}


def counts(correct: Flags) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Samples n and right samples c of every problem, both [prompts]."""
    groups = _flags(correct)
    return np.array([len(group) for group in groups]), np.array([int(group.sum()) for group in groups])


def pass_at_k(n: ArrayLike, c: ArrayLike, k: int) -> Array:
    """1 - C(n-c, k) / C(n, k), the unbiased estimate from c right of n samples (Chen et al. 2021, eq. 1).

    n and c broadcast; the result has their shape. ValueError where k is larger than an n.
    """
    samples, right = _counts(n, c)
    return 1.0 - _all_from(samples - right, samples, _size(k, samples))


def worst_at_k(n: ArrayLike, c: ArrayLike, k: int) -> Array:
    """C(c, k) / C(n, k): all k samples are right. Shapes and errors as `pass_at_k`."""
    samples, right = _counts(n, c)
    return _all_from(right, samples, _size(k, samples))


def g_pass_at_k(n: ArrayLike, c: ArrayLike, k: int, tau: float) -> Array:
    """At least ceil(tau k) of k samples are right (G-Pass@k_tau, Liu et al. 2024, arXiv 2412.13147, eq. 4).

    tau in [0, 1]; at tau = 0 it is pass@k, at tau = 1 worst@k. Shapes and errors as `pass_at_k`.
    """
    if not 0 <= tau <= 1:
        raise ValueError(f"tau: {tau} is not between 0 and 1")
    law = _right_among(n, c, k)
    needed = max(1, math.ceil(tau * k - 1e-9))  # 0.28 * 25 is 7.000000000000001
    return np.minimum(law[..., needed:].sum(-1), 1.0)


def mean_g_pass_at_k(n: ArrayLike, c: ArrayLike, k: int) -> Array:
    """mG-Pass@k = 2 * integral of G-Pass@k_tau over tau in [1/2, 1] (Liu et al. 2024, eq. 6).

    The integrand is a step function, so the integral is exact: for even k it is the paper's sum 2/k sum_{i>k/2}; for
    odd k it keeps the half step that the sum leaves out, so that a problem with all samples right scores 1.
    """
    law = _right_among(n, c, k)
    right = np.arange(k + 1)
    return np.minimum(law @ np.clip(2 * right / k - 1, 0.0, 1.0), 1.0)


def majority_at_k(answers: Answers, correct: Flags, k: int) -> Array:
    """Expected score of a majority vote among k of the n samples, [prompts]: the exact mean over all C(n, k) subsets.

    A sample votes for its canonical answer, None for nothing (a subset without votes scores 0). Tied answers share the
    score equally. Where samples of one answer were graded differently, its score is their mean.
    """
    return majority_curve(answers, correct, k)[:, -1]


def majority_curve(answers: Answers, correct: Flags, last: int | None = None) -> Array:
    """maj@k for k = 1..last, [prompts, last]; `last` defaults to the smallest n. See `majority_at_k`."""
    groups = _flags(correct)
    ballots = _aligned("answers", answers, groups)
    samples = np.array([len(group) for group in groups])
    last = _size(int(samples.min()) if last is None else last, samples)
    if samples.max() > MAX_SAMPLES:
        raise ValueError(f"answers: {samples.max()} samples of one problem; at most {MAX_SAMPLES}")
    curves = []
    for ballot, group in zip(ballots, groups, strict=True):
        classes = defaultdict(list)
        for answer, flag in zip(ballot, group, strict=True):
            if answer is not None:
                classes[answer].append(float(flag))
        blocks = sorted((len(flags), sum(flags) / len(flags)) for flags in classes.values())
        curves.append(_vote(tuple(blocks), len(group), last))
    return np.array(curves)


def weighted_majority(answers: Answers, weights: Iterable[Iterable[float]], correct: Flags) -> Array:
    """Score of the answer with the largest sum of weights over all samples, [prompts]; None casts no vote, ties share.

    Weights are finite and not negative (a probability, say); with equal weights this is maj@n.
    """
    groups = _flags(correct)
    ballots = _aligned("answers", answers, groups)
    votes = [np.asarray(row, dtype=np.float64) for row in _aligned("weights", weights, groups)]
    scores = []
    for index, (ballot, vote, group) in enumerate(zip(ballots, votes, groups, strict=True)):
        if not np.all(np.isfinite(vote) & (vote >= 0)):
            raise ValueError(f"weights: problem {index} has one that is not a finite number >= 0")
        classes = defaultdict(list)
        for answer, weight, flag in zip(ballot, vote.tolist(), group.tolist(), strict=True):
            if answer is not None:
                classes[answer].append((weight, flag))
        totals = {answer: math.fsum(weight for weight, _ in block) for answer, block in classes.items()}
        top = max(totals.values(), default=0.0)
        winners = [answer for answer, total in totals.items() if total >= top * (1 - 1e-12)]  # 0.1 + 0.2 ties with 0.3
        means = [sum(flag for _, flag in classes[answer]) / len(classes[answer]) for answer in winners]
        scores.append(sum(means) / len(means) if means else 0.0)
    return np.array(scores)


def best_of_n(scores: Iterable[Iterable[float]], correct: Flags, k: int) -> Array:
    """Expected score of the sample that a scorer ranks first among k of the n, [prompts]: exact over all subsets.

    Tied samples share the win. Scores may be infinite, not NaN.
    """
    import torch  # the other metrics do without

    from posttrain.decoding.rerank import best_of_each

    groups = _flags(correct)
    k = _size(k, np.array([len(group) for group in groups]))
    ranks = [np.asarray(row, dtype=np.float64) for row in _aligned("scores", scores, groups)]
    for index, row in enumerate(ranks):
        if np.isnan(row).any():
            raise ValueError(f"scores: problem {index} has a NaN")
    width = max(map(len, groups))
    padded, flags = (
        torch.tensor(np.array([np.pad(row, (0, width - len(row))) for row in rows])) for rows in (ranks, groups)
    )
    mask = torch.arange(width) < torch.tensor([[len(group)] for group in groups])
    return np.minimum(best_of_each(padded, flags, k, mask).numpy(), 1.0)


def token_stats(lengths: Iterable[float]) -> dict[str, float]:
    """`mean` and `p95` (a length that occurs) of the completion lengths of all samples, flat, in tokens."""
    tokens = np.array(list(lengths), dtype=np.float64)
    if not tokens.size or not np.all(np.isfinite(tokens) & (tokens >= 0)):
        raise ValueError("lengths: needs at least one, all finite and not negative")
    return {"mean": float(tokens.mean()), "p95": float(np.quantile(tokens, 0.95, method="inverted_cdf"))}


def rates(
    *, finish_reasons: Sequence[str], answers: Sequence[str | None], verdicts: Sequence[str]
) -> dict[str, float | None]:
    """Shares of all samples (three columns of one rollout table): `truncation`, `answer_found`, `grader_error`;
    and `accuracy_finished`, the share of right ones among the samples not truncated (None where all were)."""
    total = len(finish_reasons)
    if not total:
        raise ValueError("finish_reasons: no samples")
    if len(answers) != total or len(verdicts) != total:
        raise ValueError(f"verdicts: {len(verdicts)} of them and {len(answers)} answers for {total} finish_reasons")
    finished = [verdict for reason, verdict in zip(finish_reasons, verdicts, strict=True) if reason != "length"]
    return {
        "truncation": 1 - len(finished) / total,
        "answer_found": sum(answer is not None for answer in answers) / total,
        "grader_error": sum(verdict in ("error", "timeout") for verdict in verdicts) / total,
        "accuracy_finished": finished.count("equal") / len(finished) if finished else None,
    }


def _all_from(part: NDArray[np.int64], samples: NDArray[np.int64], k: int) -> Array:
    """C(part, k) / C(samples, k): all k come from the part. As a product, which cannot overflow."""
    chance = np.ones(samples.shape)
    for drawn in range(k):
        chance = chance * (np.maximum(part - drawn, 0) / (samples - drawn))
    return chance


def _right_among(n: ArrayLike, c: ArrayLike, k: int) -> Array:
    """Hypergeometric law of the number of right samples among k of n, [..., k + 1], one draw at a time: no overflow."""
    samples, right = (count[..., None] for count in _counts(n, c))
    hits = np.arange(_size(k, samples) + 1)
    law = np.where(hits == 0, 1.0, np.zeros(samples.shape))
    for drawn in range(k):
        hit = np.maximum(right - hits, 0) * law
        law = np.maximum(samples - right - (drawn - hits), 0) * law
        law[..., 1:] += hit[..., :-1]
        law = law / (samples - drawn)
    return law


@lru_cache(maxsize=4096)
def _vote(blocks: tuple[tuple[int, float], ...], n: int, last: int) -> Array:
    """maj@k for k = 1..last of one problem. `blocks`: (votes, mean score) of every answer; other samples are silent.

    Subsets are counted by generating functions in z, whose exponent is the subset's size. Let the winning count be v.
    An answer with m votes is below it in sum_{x<v} C(m, x) z^x ways and at it in C(m, v) z^v; those that cannot reach
    it, and silence, are free: (1 + z)^rest. ways[0][j] counts the subsets with j answers at v, ways[1][j] adds up the
    scores of those j answers; a tie of j is worth ways[1][j] / j.
    """
    choose = _binomials(n)
    credit = np.zeros(last + 1)
    highest = max((votes for votes, score in blocks if score > 0), default=0)
    offsets = last + np.arange(last + 1)[None, :] - np.arange(last + 1)[:, None]
    for v in range(1, min(highest, last) + 1):
        contenders = [(votes, score) for votes, score in blocks if votes >= v]
        most = min(len(contenders), last // v)
        ways = np.zeros((2, most + 1, last + 1))
        ways[0, 0] = choose[n - sum(votes for votes, _ in contenders), : last + 1]
        for votes, score in contenders:
            below = np.zeros(2 * last + 1)
            below[last : last + v] = choose[votes, :v]
            grown = ways @ below[offsets]
            level = choose[votes, v] * ways[:, :-1, : last + 1 - v]
            grown[:, 1:, v:] += level
            grown[1, 1:, v:] += score * level[0]
            ways = grown
        credit += (ways[1, 1:] / np.arange(1, most + 1)[:, None]).sum(0)
    return np.minimum(credit[1:] / choose[n, 1 : last + 1], 1.0)


@lru_cache(maxsize=8)
def _binomials(n: int) -> Array:
    """C(m, x) for 0 <= m, x <= n (Pascal's triangle: sums of positive numbers, exact to rounding)."""
    table = np.zeros((n + 1, n + 1))
    table[:, 0] = 1.0
    for m in range(1, n + 1):
        table[m, 1:] = table[m - 1, 1:] + table[m - 1, :-1]
    return table


def _size(k: int, samples: NDArray[np.int64]) -> int:
    if not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"k: {k} is not a whole number of samples, 1 or more")
    if k > samples.min():
        raise ValueError(f"k: {k} is larger than n, the number of samples ({samples.min()})")
    return int(k)


def _counts(n: ArrayLike, c: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    arrays = {}
    for name, given in (("n", n), ("c", c)):
        values = np.asarray(given, dtype=np.float64)
        if not values.size or not np.all(np.isfinite(values) & (values == np.rint(values)) & (values >= 0)):
            raise ValueError(f"{name}: needs whole numbers, 0 or more")
        arrays[name] = values.astype(np.int64)
    try:
        samples, right = np.broadcast_arrays(arrays["n"], arrays["c"])
    except ValueError:
        raise ValueError(f"c: shape {arrays['c'].shape} does not fit that of n, {arrays['n'].shape}") from None
    if np.any(right > samples):
        raise ValueError("c: more right samples than samples (n)")
    return samples, right


def _flags(correct: Flags) -> list[Array]:
    groups = [np.asarray(list(group), dtype=np.float64) for group in correct]
    if not groups:
        raise ValueError("correct: no problems")
    for index, group in enumerate(groups):
        if not group.size:
            raise ValueError(f"correct: problem {index} has no samples")
        if not np.all((group == 0) | (group == 1)):
            raise ValueError(f"correct: problem {index} holds a value other than 0 (wrong) and 1 (right)")
    return groups


def _aligned(name: str, rows: Iterable[Iterable[Any]], groups: list[Array]) -> list[list[Any]]:
    given = [list(row) for row in rows]
    if len(given) != len(groups):
        raise ValueError(f"{name}: {len(given)} problems, correct has {len(groups)}")
    for index, (row, group) in enumerate(zip(given, groups, strict=True)):
        if len(row) != len(group):
            raise ValueError(f"{name}: problem {index} has {len(row)} samples, correct has {len(group)}")
    return given
