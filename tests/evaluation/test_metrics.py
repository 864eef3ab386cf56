"""Point estimates, each against brute-force enumeration of its definition."""

import math
from collections import Counter
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.evaluation.metrics import (
    best_of_n,
    counts,
    g_pass_at_k,
    majority_at_k,
    majority_curve,
    mean_g_pass_at_k,
    pass_at_k,
    rates,
    token_stats,
    weighted_majority,
    worst_at_k,
)

COUNTS = [(n, c, k) for n in range(1, 9) for c in range(n + 1) for k in range(1, n + 1)]


def mean_over_subsets(samples, k, score):
    subsets = list(combinations(samples, k))
    return float(sum(Fraction(score(subset)) for subset in subsets) / len(subsets))


def vote(subset):
    """Score of a majority vote among (answer, flag) pairs, written as its definition reads."""
    tally = Counter(answer for answer, _ in subset if answer is not None)
    winners = [answer for answer, votes in tally.items() if votes == max(tally.values())]
    flags = [[flag for answer, flag in subset if answer == winner] for winner in winners]
    return sum(Fraction(sum(group), len(group)) for group in flags) / len(winners) if winners else 0


def top(subset):
    """Score of the highest-scored of (score, flag) pairs, ties shared."""
    flags = [flag for score, flag in subset if score == max(score for score, _ in subset)]
    return Fraction(sum(flags), len(flags))


@st.composite
def ballots(draw):
    """One problem: samples (answer, flag), the flag set by the answer, some without an answer."""
    answers = draw(st.lists(st.sampled_from([None, "a", "b", "c", "d"]), min_size=1, max_size=8))
    right = draw(st.sets(st.sampled_from("abcd")))
    return [(answer, int(answer in right)) for answer in answers]


# pass@k, worst@k, G-Pass@k


@pytest.mark.parametrize(("n", "c", "k"), COUNTS)
def test_subset_metrics_equal_enumeration(n, c, k):
    samples = [1] * c + [0] * (n - c)
    assert pass_at_k(n, c, k) == pytest.approx(mean_over_subsets(samples, k, max), abs=1e-14)
    assert worst_at_k(n, c, k) == pytest.approx(mean_over_subsets(samples, k, min), abs=1e-14)
    for needed in range(1, k + 1):
        expected = mean_over_subsets(samples, k, lambda subset, needed=needed: int(sum(subset) >= needed))
        assert g_pass_at_k(n, c, k, needed / k) == pytest.approx(expected, abs=1e-14)


def test_pass_at_k_is_exact_and_finite_for_thousands_of_samples():
    expected = 1 - Fraction(math.comb(9_990, 500), math.comb(10_000, 500))
    assert pass_at_k(10_000, 10, 500) == pytest.approx(float(expected), rel=1e-12)


def test_pass_at_k_broadcasts_over_ragged_problems():
    assert pass_at_k([4, 8, 2], [1, 8, 0], 2).tolist() == [0.5, 1.0, 0.0]


def test_pass_at_1_is_the_share_of_right_samples():
    assert pass_at_k(7, np.arange(8), 1) == pytest.approx(np.arange(8) / 7)


def test_counts_reads_ragged_groups():
    n, c = counts([[True, False, True], [0.0], np.array([1, 1])])
    assert (n.tolist(), c.tolist()) == ([3, 1, 2], [2, 0, 2])


def test_g_pass_needs_the_written_share_not_a_rounded_one_above_it():
    assert 0.28 * 25 > 7
    assert g_pass_at_k(25, 7, 25, 0.28) == pytest.approx(1.0)


def test_g_pass_at_tau_0_is_pass_at_k():
    assert g_pass_at_k(8, 3, 4, 0.0) == pytest.approx(pass_at_k(8, 3, 4))


@pytest.mark.parametrize("k", [4, 8, 16])
def test_mean_g_pass_is_the_sum_of_the_paper_for_even_k(k):
    paper = 2 / k * sum(g_pass_at_k(16, 11, k, i / k) for i in range(k // 2 + 1, k + 1))
    assert mean_g_pass_at_k(16, 11, k) == pytest.approx(float(paper))


@pytest.mark.parametrize("k", [1, 3, 5, 8])
def test_mean_g_pass_is_the_integral(k):
    taus = 0.5 + (np.arange(2000) + 0.5) / 4000
    riemann = np.mean([g_pass_at_k(8, 6, k, tau) for tau in taus])
    assert mean_g_pass_at_k(8, 6, k) == pytest.approx(riemann, abs=1e-3)
    assert mean_g_pass_at_k(8, 8, k) == pytest.approx(1.0)


@pytest.mark.parametrize("metric", [pass_at_k, worst_at_k, mean_g_pass_at_k])
def test_all_wrong_scores_0_and_all_right_1(metric):
    assert metric(8, [0, 8], 4).tolist() == pytest.approx([0.0, 1.0], abs=1e-15)


@pytest.mark.parametrize(
    ("n", "c", "k", "field"),
    [
        (4, 1, 5, "k"),
        ([8, 4], [1, 1], 5, "k"),
        (4, 1, 0, "k"),
        (4, 1, 2.0, "k"),
        (4, 1, math.nan, "k"),
        (4, 5, 1, "c"),
        (4, -1, 1, "c"),
        (4, 1.5, 1, "c"),
        (4, math.nan, 1, "c"),
        (math.nan, 1, 1, "n"),
        ([], [], 1, "n"),
        ([4, 4], [1, 1, 1], 1, "c"),
    ],
)
def test_wrong_counts_are_refused_by_name(n, c, k, field):
    with pytest.raises(ValueError, match=rf"^{field}: "):
        pass_at_k(n, c, k)


def test_tau_outside_0_to_1_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^tau: "):
        g_pass_at_k(8, 4, 4, 1.5)


# maj@k


@given(ballots())
def test_majority_curve_equals_enumeration(samples):
    answers, flags = zip(*samples, strict=True)
    expected = [mean_over_subsets(samples, k, vote) for k in range(1, len(samples) + 1)]
    assert majority_curve([answers], [flags])[0] == pytest.approx(expected, abs=1e-13)


@given(st.lists(st.tuples(st.sampled_from([None, "a", "b"]), st.integers(0, 1)), min_size=1, max_size=7))
def test_majority_equals_enumeration_where_one_answer_was_graded_both_ways(samples):
    answers, flags = zip(*samples, strict=True)
    flags = [flag if answer is not None else 0 for answer, flag in zip(answers, flags, strict=True)]
    expected = mean_over_subsets(list(zip(answers, flags, strict=True)), len(samples), vote)
    assert majority_at_k([answers], [flags], len(samples))[0] == pytest.approx(expected, abs=1e-13)


def test_majority_over_all_samples_shares_ties():
    answers = [["7", "7", "9", "9", "3"], ["7", "9", "3"], ["7", "9", "9"], ["7", None, None]]
    correct = [[1, 1, 0, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0]]
    assert [majority_at_k([a], [c], len(a))[0] for a, c in zip(answers, correct, strict=True)] == pytest.approx(
        [1 / 2, 1 / 3, 0, 1]
    )


def test_majority_at_1_is_accuracy_where_only_answered_samples_are_right():
    answers, correct = [["1", "2", None, "1"], ["5", "5", "6", "7"]], [[1, 0, 0, 1], [0, 0, 0, 1]]
    assert majority_at_k(answers, correct, 1) == pytest.approx(pass_at_k(*counts(correct), 1))


def test_majority_without_any_vote_scores_0():
    assert majority_curve([[None, None, None]], [[0, 0, 0]]).tolist() == [[0.0, 0.0, 0.0]]


def test_majority_curve_stops_at_the_smallest_group():
    assert majority_curve([["1", "1"], ["1", "2", "1"]], [[1, 1], [1, 0, 1]]).shape == (2, 2)


def test_majority_of_one_answer_scores_exactly_at_most_1():
    curve = majority_curve([["1"] * 64], [[1] * 64])
    assert curve.max() <= 1.0 and curve.min() == pytest.approx(1.0)


def test_majority_of_a_thousand_samples_agrees_with_sampled_subsets():
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(100), 10)  # 100 answers of ten votes each, four of them right
    drawn = [np.bincount(rng.choice(codes, 200, replace=False), minlength=100) for _ in range(4000)]
    scores = [np.mean(np.flatnonzero(tally == tally.max()) < 4) for tally in drawn]
    exact = majority_at_k([[str(code) for code in codes]], [codes < 4], 200)[0]
    assert exact == pytest.approx(0.04, rel=1e-9)  # by symmetry
    assert np.mean(scores) == pytest.approx(exact, abs=4 * np.std(scores) / 4000**0.5)


@pytest.mark.parametrize(
    ("answers", "correct", "k", "field"),
    [
        ([["1", "2"]], [[1, 0]], 3, "k"),
        ([["1"]], [[1, 0]], 1, "answers"),
        ([["1", "2"], ["1"]], [[1, 0]], 1, "answers"),
        ([["1", "2"]], [[1, math.nan]], 1, "correct"),
        ([["1", "2"]], [[1, 0.5]], 1, "correct"),
        ([[]], [[]], 1, "correct"),
        ([], [], 1, "correct"),
        ([["1"] * 1001], [[1] * 1001], 1, "answers"),
    ],
)
def test_wrong_votes_are_refused_by_name(answers, correct, k, field):
    with pytest.raises(ValueError, match=rf"^{field}: "):
        majority_at_k(answers, correct, k)


# Weighted majority


def test_weighted_majority_follows_the_weights_not_the_counts():
    assert weighted_majority([["1", "2", "2"]], [[0.9, 0.3, 0.3]], [[1, 0, 0]]).tolist() == [1.0]


def test_weighted_majority_shares_ties_whatever_the_rounding():
    assert 0.1 + 0.2 != 0.3
    assert weighted_majority([["1", "1", "2"]], [[0.1, 0.2, 0.3]], [[1, 1, 0]]).tolist() == [0.5]


def test_weighted_majority_ignores_samples_without_an_answer():
    assert weighted_majority([[None, "2"], [None, None]], [[9, 1], [1, 1]], [[0, 1], [0, 0]]).tolist() == [1.0, 0.0]


@given(ballots())
def test_weighted_majority_with_equal_weights_is_majority(samples):
    answers, flags = zip(*samples, strict=True)
    expected = majority_at_k([answers], [flags], len(samples))
    assert weighted_majority([answers], [[0.7] * len(samples)], [flags]) == pytest.approx(expected)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_weights_that_are_no_votes_are_refused_by_name(weight):
    with pytest.raises(ValueError, match=r"^weights: problem 0"):
        weighted_majority([["1", "2"]], [[weight, 1]], [[1, 0]])


# Best of n


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1)), min_size=1, max_size=8))
def test_best_of_n_equals_enumeration(samples):
    scores, flags = zip(*samples, strict=True)
    for k in range(1, len(samples) + 1):
        expected = mean_over_subsets(samples, k, top)
        assert best_of_n([scores], [flags], k)[0] == pytest.approx(expected, abs=1e-13)


def test_best_of_n_by_an_oracle_is_pass_at_k():
    correct = [[0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]]
    assert best_of_n(correct, correct, 3) == pytest.approx(pass_at_k(*counts(correct), 3))


def test_best_of_n_ranks_minus_infinity_last():
    assert best_of_n([[-math.inf, -5.0]], [[0, 1]], 2).tolist() == [1.0]


@pytest.mark.parametrize(
    ("scores", "k", "field"), [([[0.1, math.nan]], 1, "scores"), ([[0.1]], 1, "scores"), ([[0.1, 0.2]], 3, "k")]
)
def test_wrong_scores_are_refused_by_name(scores, k, field):
    with pytest.raises(ValueError, match=rf"^{field}: "):
        best_of_n(scores, [[1, 0]], k)


# Tokens and rates


def test_p95_is_the_smallest_length_that_95_percent_do_not_exceed():
    assert token_stats(range(1, 101)) == {"mean": 50.5, "p95": 95.0}
    assert token_stats([7]) == {"mean": 7.0, "p95": 7.0}


@pytest.mark.parametrize("lengths", [[], [1, math.nan], [-1], [math.inf]])
def test_wrong_lengths_are_refused_by_name(lengths):
    with pytest.raises(ValueError, match=r"^lengths: "):
        token_stats(lengths)


def test_rates_divide_by_all_samples():
    shares = rates(
        finish_reasons=["stop", "length", "stop", "stop"],
        answers=["1", None, "2", "3"],
        verdicts=["equal", "no_answer", "timeout", "error"],
    )
    assert shares == {"truncation": 0.25, "answer_found": 0.75, "grader_error": 0.5, "accuracy_finished": 1 / 3}


def test_accuracy_of_finished_samples_is_none_without_any():
    assert rates(finish_reasons=["length"], answers=["1"], verdicts=["equal"])["accuracy_finished"] is None


@pytest.mark.parametrize(
    ("reasons", "verdicts", "field"), [([], [], "finish_reasons"), (["stop"], ["equal", "equal"], "verdicts")]
)
def test_wrong_columns_are_refused_by_name(reasons, verdicts, field):
    with pytest.raises(ValueError, match=rf"^{field}: "):
        rates(finish_reasons=reasons, answers=["1"] * len(reasons), verdicts=verdicts)
