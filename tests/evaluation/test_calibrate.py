"""Platt's map."""

import numpy as np
import pytest

from posttrain.evaluation.calibrate import apply_logistic, fit_logistic


def drawn(a, b, rows=20_000):
    """Scores, and whether each completion is right by the law sigmoid(a * score + b)."""
    chance = np.random.default_rng(0)
    scores = 3 + 2 * chance.standard_normal(rows)
    return scores, (chance.random(rows) < 1 / (1 + np.exp(-a * scores - b))).astype(float)


@pytest.mark.parametrize(("a", "b"), [(1.0, -3.0), (-0.5, 2.0), (0.0, 0.4)])
def test_the_law_behind_the_scores_is_found(a, b):
    assert fit_logistic(*drawn(a, b)) == pytest.approx((a, b), abs=0.12)


def test_it_is_the_optimum_of_its_likelihood():
    scores, correct = drawn(0.7, -2.0, rows=200)
    right = correct.sum()
    targets = np.where(correct > 0, (right + 1) / (right + 2), 1 / (200 - right + 2))
    error = apply_logistic(scores, fit_logistic(scores, correct)) - targets
    assert error.sum() == pytest.approx(0, abs=1e-6) and (error * scores).sum() == pytest.approx(0, abs=1e-6)


def test_scores_that_separate_stay_finite():
    a, b = fit_logistic(np.array([-2.0, -1.0, 1.0, 2.0]), np.array([0.0, 0.0, 1.0, 1.0]))
    assert np.isfinite([a, b]).all() and a > 0
    assert 0 < apply_logistic(np.array([-1e6, 0.0, 1e6]), (a, b))[1] < 1


@pytest.mark.parametrize("verdict", [0.0, 1.0])
def test_completions_of_one_verdict_get_a_probability_near_it(verdict):
    scores, correct = np.linspace(-1, 1, 50), np.full(50, verdict)
    assert apply_logistic(scores, fit_logistic(scores, correct)) == pytest.approx(verdict, abs=0.05)


def test_equal_scores_get_the_share_that_is_right():
    scores, correct = np.full(100, 2.5), np.array([1.0] * 30 + [0.0] * 70)
    assert apply_logistic(scores, fit_logistic(scores, correct)) == pytest.approx(0.3, abs=0.01)
