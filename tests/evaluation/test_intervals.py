"""Intervals, the split of the variance and the paired comparison: known values, and what they promise in simulation."""

import math
import tracemalloc
from itertools import product

import numpy as np
import pytest

from posttrain.evaluation import intervals
from posttrain.evaluation.intervals import (
    bootstrap_interval,
    bootstrap_intervals,
    macro_mean,
    mean_interval,
    paired_comparison,
    paired_ratio,
    sign_flip_p_value,
    standard_error,
    variance_split,
    wilson_interval,
)


def simulated_scores(problems, samples, law, runs, seed=5):
    """[problems, runs] of c/n with a right-rate per problem from a beta law, and the true mean."""
    rng = np.random.default_rng(seed)
    rate = rng.beta(*law, size=(problems, runs))
    return rng.binomial(samples, rate) / samples, law[0] / sum(law)


# Wilson


@pytest.mark.parametrize(
    ("successes", "n", "expected"),
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_wilson_equals_the_table_of_newcombe_1998(successes, n, expected):
    assert wilson_interval(successes, n) == pytest.approx(expected, abs=5e-5)


def test_wilson_touches_0_and_1_exactly():
    assert wilson_interval(0, 7)[0] == 0.0
    assert wilson_interval(7, 7)[1] == 1.0


@pytest.mark.parametrize(
    ("successes", "n", "level", "field"),
    [(1, 0, 0.95, "n"), (3, 2, 0.95, "successes"), (math.nan, 2, 0.95, "successes"), (1, 2, 95, "level")],
)
def test_wilson_refuses_by_name(successes, n, level, field):
    with pytest.raises(ValueError, match=rf"^{field}: "):
        wilson_interval(successes, n, level)


# Cluster bootstrap


def coverage(problems, samples, law, runs):
    covered = 0
    for seed in range(runs // 250):
        scores, mean = simulated_scores(problems, samples, law, 250, seed)
        low, high = bootstrap_intervals(scores)
        covered += int(((low <= mean) & (mean <= high)).sum())
    return covered / runs


@pytest.mark.slow
def test_bootstrap_covers_95_percent():
    assert coverage(60, 8, (1, 1), 2000) == pytest.approx(0.95, abs=0.015)


@pytest.mark.slow
@pytest.mark.parametrize("law", [(1, 1), (0.3, 0.3), (0.3, 1.5), (4, 1)])
@pytest.mark.parametrize(("problems", "samples"), [(30, 4), (30, 64)])
def test_bootstrap_covers_95_percent_of_few_problems_of_any_difficulty(problems, samples, law):
    assert coverage(problems, samples, law, 4000) == pytest.approx(0.95, abs=0.015)


def test_bootstrap_is_as_wide_as_theory_says_for_many_problems():
    scores, _ = simulated_scores(2000, 8, (1, 1), 1)
    low, high = bootstrap_interval(scores[:, 0])
    assert high - low == pytest.approx(2 * 1.96 * standard_error(scores[:, 0]), rel=0.03)


def test_bootstrap_at_a_lower_level_is_narrower():
    scores, _ = simulated_scores(40, 8, (1, 1), 1)
    wide, narrow = bootstrap_interval(scores[:, 0]), bootstrap_interval(scores[:, 0], level=0.8)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_bootstrap_leans_to_the_long_tail():
    values = np.r_[np.zeros(25), 0.1, 0.2, 0.4, 0.8, 1.0]
    low, high = bootstrap_interval(values)
    assert high - values.mean() > 1.5 * (values.mean() - low)


def test_bootstrap_is_seeded():
    values = simulated_scores(40, 8, (1, 1), 1)[0][:, 0]
    assert (
        bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)
    )


def test_bootstrap_of_columns_equals_each_alone():
    values = simulated_scores(40, 8, (1, 1), 3)[0]
    low, high = bootstrap_intervals(values)
    for column in range(3):
        assert bootstrap_interval(values[:, column]) == pytest.approx((low[column], high[column]), abs=1e-12)


def test_bootstrap_follows_scale_and_shift():
    values = simulated_scores(40, 8, (1, 1), 1)[0][:, 0]
    low, high = bootstrap_interval(values)
    assert bootstrap_interval(1000 + 50 * values) == pytest.approx((1000 + 50 * low, 1000 + 50 * high))


@pytest.mark.parametrize("value", [0.0, 1.0, 0.3])
def test_bootstrap_of_equal_values_is_a_point(value):
    assert bootstrap_interval([value] * 7) == (value, value)


def test_one_problem_bounds_nothing():
    assert bootstrap_interval([0.5]) == (-math.inf, math.inf)


@pytest.mark.parametrize("level", [0.5, 0.95, 0.999999])
def test_bootstrap_stays_within_the_values(level):
    values = np.r_[np.zeros(9), 1.0]
    low, high = bootstrap_interval(values, level=level)
    assert 0 <= low <= values.mean() <= high <= 1


@pytest.mark.slow
def test_bootstrap_memory_is_bounded():
    values = np.random.default_rng(0).random(20_000)
    tracemalloc.start()
    bootstrap_interval(values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 2**20  # all draws at once are 1.6 GB


@pytest.mark.parametrize(
    ("values", "level", "field"),
    [
        ([], 0.95, "per_problem"),
        ([0.1, math.nan], 0.95, "per_problem"),
        ([0.1, math.inf], 0.95, "per_problem"),
        ([[0.1, 0.2]], 0.95, "per_problem"),
        ([0.1, 0.2], 1.0, "level"),
    ],
)
def test_bootstrap_refuses_by_name(values, level, field):
    with pytest.raises(ValueError, match=rf"^{field}: "):
        bootstrap_interval(values, level=level)


# The interval of a score


def test_one_sample_per_problem_gets_wilson():
    assert mean_interval([1, 0, 1, 1, 0]) == wilson_interval(3, 5)


def test_none_or_all_right_still_leaves_doubt():
    assert mean_interval(np.zeros(30)) == wilson_interval(0, 30)
    assert mean_interval(np.full(30, 1 - 1e-16)) == wilson_interval(30, 30)


def test_one_problem_with_several_samples_has_a_wide_interval():
    low, high = mean_interval([0.5])
    assert 0 <= low < 0.1 and 0.9 < high <= 1


def test_several_samples_per_problem_get_the_bootstrap():
    scores = simulated_scores(40, 8, (1, 1), 1)[0][:, 0]
    assert mean_interval(scores) == bootstrap_interval(scores)


def test_scores_outside_0_to_1_are_refused_by_name():
    with pytest.raises(ValueError, match=r"^scores: "):
        mean_interval([0.5, 1.5])


# Standard errors


def test_standard_error_of_thirty_problems_at_one_half():
    assert standard_error([0, 1] * 15) == pytest.approx(0.0928, abs=1e-4)  # 9.1 points with ddof 0


def test_variance_split_by_hand():
    split = variance_split([[0, 1], [1, 1], [0, 0, 0, 1]])
    # means 1/2, 1, 1/4; unbiased variances 1/2, 0, 1/4 over 2, 2, 4 samples
    assert split.se == pytest.approx(np.std([0.5, 1, 0.25], ddof=1) / 3**0.5)
    assert split.within == pytest.approx((1 / 4 + 0 + 1 / 16) ** 0.5 / 3)
    assert split.between**2 + split.within**2 == pytest.approx(split.se**2)


def test_variance_parts_are_unbiased():
    rng = np.random.default_rng(0)
    within, between = [], []
    for _ in range(1000):
        rate = rng.random(40)
        split = variance_split(rng.random((40, 4)) < rate[:, None])
        within.append(split.within**2)
        between.append(split.se**2 - split.within**2)
    assert np.mean(within) == pytest.approx(1 / 6 / 4 / 40, rel=0.03)  # E[p (1 - p)] = 1/6
    assert np.mean(between) == pytest.approx(1 / 12 / 40, rel=0.03)  # Var[p] = 1/12


def test_variance_parts_of_one_sample_per_problem_are_unknown():
    split = variance_split([[0], [1], [1]])
    assert (split.between, split.within) == (None, None) and split.se > 0


def test_problems_that_vary_less_than_their_samples_have_no_between_part():
    assert variance_split([[0, 1], [1, 0], [0, 1]]).between == 0.0


def test_macro_mean_gives_every_benchmark_the_same_weight():
    mean, error = macro_mean([0.2, 0.8], [0.03, 0.04])
    assert (mean, error) == (pytest.approx(0.5), pytest.approx(0.025))


@pytest.mark.parametrize(
    ("means", "errors", "field"),
    [
        ([], [], "means"),
        ([0.5, math.nan], [0.1, 0.1], "means"),
        ([0.5], [0.1, 0.1], "standard_errors"),
        ([0.5], [math.nan], "standard_errors"),
    ],
)
def test_macro_mean_refuses_by_name(means, errors, field):
    with pytest.raises(ValueError, match=rf"^{field}: "):
        macro_mean(means, errors)


# Paired comparison


def enumerated_p_value(differences):
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in product([-1, 1], repeat=len(differences))
    ]
    return np.mean(np.array(sums) >= abs(sum(differences)) - 1e-9)


@pytest.mark.parametrize(
    "differences",
    [
        [0.3, -0.1, 0.7, 0.2, 0.25, -0.4],
        [1 / 3, 2 / 3, -1 / 3, 1.0, 1 / 7],
        [0.1 + 0.2, -0.3, 0.3, 0.6],
        [12.0, -3.0, 250.0, 4.0, 9000.0],
        np.random.default_rng(0).normal(0.4, 1, 12).tolist(),
    ],
)
def test_sign_flip_equals_enumeration(differences):
    assert sign_flip_p_value(differences) == pytest.approx(enumerated_p_value(differences), abs=1e-12)


def test_one_sample_per_problem_is_mcnemar_s_exact_test():
    differences = [1] * 5 + [-1] * 15 + [0] * 200
    tail = sum(math.comb(20, i) for i in range(6)) / 2**20
    assert sign_flip_p_value(differences) == pytest.approx(2 * tail, rel=1e-12)


def test_fractions_of_samples_stay_exact_for_many_problems(monkeypatch):
    monkeypatch.setattr(intervals, "_sampled_p_value", lambda *args: pytest.fail("flips were sampled"))
    rng = np.random.default_rng(0)
    for n in (1, 3, 8, 12, 16, 64):
        differences = rng.binomial(n, 0.5, size=500) / n - rng.binomial(n, 0.45, size=500) / n
        assert 0 < sign_flip_p_value(differences) < 1


def test_sampled_flips_agree_with_the_exact_law(monkeypatch):
    differences = np.random.default_rng(3).binomial(8, 0.55, size=60) / 8 - 0.5
    exact = sign_flip_p_value(differences)
    monkeypatch.setattr(intervals, "SUPPORT", 1)
    sampled = sign_flip_p_value(differences)
    assert sampled != exact and sampled == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 10_000) ** 0.5)


def test_sampled_p_value_is_never_0_and_is_seeded():
    differences = np.random.default_rng(0).random(400)
    assert sign_flip_p_value(differences) == sign_flip_p_value(differences) == 1 / 10_001


@pytest.mark.parametrize(("samples", "runs"), [(1, 1500), (4, 1500)])
def test_paired_test_keeps_its_level(samples, runs):
    rng = np.random.default_rng(1)
    rejected = 0
    for _ in range(runs):
        rate = rng.beta(0.5, 0.5, size=50)
        run, baseline = rng.binomial(samples, rate, size=(2, 50)) / samples
        rejected += sign_flip_p_value(run - baseline) <= 0.05
    assert rejected / runs <= 0.05 + 3 * (0.05 * 0.95 / runs) ** 0.5
    assert rejected / runs >= 0.02  # not by never rejecting


@pytest.mark.slow
def test_paired_test_has_80_percent_power_at_the_detectable_difference():
    rng = np.random.default_rng(2)
    rejected, runs, problems, samples = 0, 600, 100, 8
    rate = rng.uniform(0.1, 0.6, size=problems)
    effect = (1.96 + 0.84) * np.sqrt((2 * rate * (1 - rate)).mean() / samples / problems)  # near enough for both runs
    for _ in range(runs):
        run = rng.binomial(samples, rate + effect) / samples
        baseline = rng.binomial(samples, rate) / samples
        rejected += sign_flip_p_value(run - baseline) <= 0.05
    assert rejected / runs == pytest.approx(0.8, abs=0.06)


def test_detectable_difference_is_2_8_standard_errors():
    run, baseline = simulated_scores(50, 4, (1, 1), 2)[0].T
    comparison = paired_comparison(run, baseline)
    assert comparison.detectable == pytest.approx((1.959964 + 0.841621) * comparison.se, rel=1e-6)
    assert comparison.se == pytest.approx(np.std(run - baseline, ddof=1) / 50**0.5)


def test_comparison_is_run_minus_baseline():
    comparison = paired_comparison([1.0, 0.75, 0.5, 1.0], [0.5, 0.5, 0.25, 0.25])
    assert comparison.difference == pytest.approx(0.4375)
    assert (comparison.low, comparison.high) == bootstrap_interval([0.5, 0.25, 0.25, 0.75])
    assert comparison.p_value == 2 / 2**4
    assert comparison.problems == 4


def test_pairing_removes_the_difficulty_of_the_problems():
    rate = np.random.default_rng(0).random(200)
    comparison = paired_comparison(rate + 0.01 * np.sin(np.arange(200)) + 0.02, rate)
    assert 0.015 < comparison.low < comparison.high < 0.025 and comparison.p_value < 0.001


def test_equal_runs_differ_by_nothing():
    comparison = paired_comparison([0.1 + 0.2, 1.0], [0.3, 1.0])
    assert comparison.difference == 0.0 and comparison.low == -comparison.high
    assert comparison.p_value == 1.0 and comparison.detectable is None
    tokens = paired_comparison([12.0, 90.0], [12.0, 90.0])
    assert (tokens.low, tokens.high) == (0.0, 0.0), "what may be any number has no such bound"


def test_one_problem_decides_nothing():
    comparison = paired_comparison([1.0], [0.0])
    assert (comparison.difference, comparison.p_value, comparison.detectable) == (1.0, 1.0, None)
    assert comparison.low < 0 and comparison.high == 1.0 and comparison.se is None
    tokens = paired_comparison([12.0], [90.0])
    assert (tokens.low, tokens.high) == (-math.inf, math.inf)


def tango(difference: float, better: int, problems: int) -> float:
    """The score statistic of paired proportions at a difference (Tango 1998), when `better` pairs have only the run right and
    the others are alike; the rate of such pairs under that difference by the largest likelihood on a grid."""
    rates = np.linspace(
        max(difference, 0.0), (1 + difference) / 2, 100_001
    )  # the baseline alone is right: rate - difference
    with np.errstate(divide="ignore", invalid="ignore"):
        ours = better * np.log(rates) if better else 0.0
        alike = (problems - better) * np.log(1 - 2 * rates + difference) if better < problems else 0.0
    rate = rates[np.argmax(ours + alike)]
    variance = problems * (2 * rate - difference - difference**2)
    return (better - problems * difference) / math.sqrt(variance)


@pytest.mark.parametrize("problems", [5, 40])
def test_problems_that_differ_alike_have_the_score_interval(problems):
    same, better = np.zeros(problems), np.ones(problems)
    alike, gain, loss = paired_comparison(same, same), paired_comparison(better, same), paired_comparison(same, better)
    assert tango(alike.high, 0, problems) == pytest.approx(-1.959964, rel=1e-6)
    assert tango(gain.low, problems, problems) == pytest.approx(1.959964, rel=1e-6)
    assert (gain.high, loss.low) == (1.0, -1.0)
    assert (loss.low, loss.high) == pytest.approx((-gain.high, -gain.low))
    half = paired_comparison(better, better / 2)
    assert -1 <= half.low < 0.5 < half.high <= 1


@pytest.mark.parametrize(
    ("run", "baseline", "field"), [([0.5, 1.0], [0.5], "baseline"), ([math.nan], [0.5], "run"), ([0.5], [], "baseline")]
)
def test_comparison_refuses_by_name(run, baseline, field):
    with pytest.raises(ValueError, match=rf"^{field}: "):
        paired_comparison(run, baseline)


# -- the ratio of two means


def test_a_constant_ratio_has_a_point_for_an_interval():
    lengths = np.arange(1.0, 30)
    assert paired_ratio(0.5 * lengths, lengths) == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.slow
def test_the_interval_of_a_ratio_covers():
    """Log-normal lengths, shared between both sides up to noise: 400 simulated pairs of 40 problems, ratio 0.7."""
    rng = np.random.default_rng(3)
    hits = 0
    for seed in range(400):
        lengths = rng.lognormal(4, 0.6, 40)
        run = 0.7 * lengths * rng.lognormal(-0.02, 0.2, 40)
        _, low, high = paired_ratio(run, lengths, seed=seed)
        hits += low <= 0.7 <= high
    assert 0.91 <= hits / 400 <= 0.98


def test_a_ratio_without_tokens_in_some_problems():
    assert paired_ratio([0.0, 5.0], [3.0, 4.0])[0] == pytest.approx(5 / 7)
    ratio, low, high = paired_ratio([3.0, 4.0], [0.0, 5.0])  # a draw may have the first problem alone
    assert ratio == pytest.approx(7 / 5) and 0 < low < ratio and high == float("inf")


@pytest.mark.parametrize(
    ("run", "message"),
    [([1.0, 2.0, 3.0], "must be the same problems"), ([-1.0, 1.0], "^run: must"), ([0.0, 0.0], "^run: must")],
)
def test_what_has_no_ratio_is_refused(run, message):
    with pytest.raises(ValueError, match=message):
        paired_ratio(run, [1.0, 2.0])
