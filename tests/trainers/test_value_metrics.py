"""Metrics of predicted returns, against brute force and constructed data."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.trainers.value_metrics import auc, calibration_error, metrics_by_position, value_metrics


def array(*values):
    return np.array(values, dtype=np.float64)


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40))
def test_auc_equals_the_count_over_all_pairs(tokens):
    scores, positive = array(*(score for score, _ in tokens)), np.array([kind for _, kind in tokens])
    pairs = [(a > b) + (a == b) / 2 for a in scores[positive] for b in scores[~positive]]
    if pairs:
        assert auc(scores, positive) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    else:
        assert math.isnan(auc(scores, positive))


def test_auc_of_many_tokens_does_not_overflow():
    count = 300_000
    scores, positive = np.arange(2 * count) / count, np.arange(2 * count) >= count
    assert auc(scores, positive) == 1 and auc(-scores, positive) == 0


def test_returns_that_are_not_binary_are_parted_at_their_mean():
    returns = array(-2, 0, 1.5, 5)  # mean 1.125
    assert value_metrics(array(-3, 0.1, 0.2, 9), np.ones(4), returns)["auc"] == 1
    assert value_metrics(array(-3, 2, 0, 9), np.ones(4), returns)["auc"] == 0.75


def test_a_calibrated_prediction_has_no_calibration_error():
    predicted = np.repeat([0.0, 0.25, 0.5, 0.75, 1.0], 8)
    returns = np.concatenate([np.arange(8) < 8 * p for p in (0.0, 0.25, 0.5, 0.75, 1.0)]).astype(float)
    assert calibration_error(predicted, returns) == pytest.approx(0)


@pytest.mark.parametrize("shift", [0.1, -0.2])
def test_calibration_error_of_a_shift_is_the_shift(shift):
    generator = np.random.default_rng(0)
    returns = generator.random(1000)
    assert calibration_error(returns + shift, returns) == pytest.approx(abs(shift))


def test_calibration_error_is_of_bins_and_not_of_the_whole():
    """Right on average, and nowhere right."""
    predicted, returns = np.repeat([0.2, 0.8], 50), np.repeat([0.8, 0.2], 50)
    assert calibration_error(predicted, returns) == pytest.approx(0.6)


def test_tokens_of_one_prediction_are_one_bin_in_whatever_order_they_come():
    """An untrained value model says one half everywhere; that is calibrated where half of the returns are 1."""
    predicted, returns = np.full(100, 0.5), np.repeat([0.0, 1.0], 50)
    assert calibration_error(predicted, returns) == pytest.approx(0)
    assert calibration_error(predicted, returns[::-1]) == pytest.approx(0)


def test_calibration_error_of_fewer_tokens_than_bins():
    assert calibration_error(array(0.2, 0.9), array(0, 1)) == pytest.approx((0.2 + 0.1) / 2)


def test_explained_variance():
    returns = array(0, 1, 0, 1)
    ones = np.ones(4)
    assert value_metrics(returns, ones, returns)["explained_variance"] == 1
    assert value_metrics(returns + 3, ones, returns)["explained_variance"] == 1  # a shift is no variance
    assert value_metrics(ones, ones, returns)["explained_variance"] == 0
    assert value_metrics(1 - returns, ones, returns)["explained_variance"] == -3
    assert value_metrics(array(0, 0.5, 0, 0.5), ones, returns)["explained_variance"] == pytest.approx(0.75)


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0])
def test_equal_returns_explain_nothing(value):
    found = value_metrics(np.linspace(0, 1, 30), np.ones(30), np.full(30, value))
    assert math.isnan(found["explained_variance"]) and math.isnan(found["auc"])


def test_loss_is_the_mean_over_tokens():
    assert value_metrics(array(0, 1), array(1, 4), array(0, 1))["loss"] == 2.5


def test_positions_are_tenths_of_a_completion():
    """Predictions that get better from one tenth to the next."""
    position = np.tile(np.arange(20) / 20, 50)
    returns = np.repeat([0.0, 1.0], 500)
    predicted = 0.5 + (returns - 0.5) * (position + 0.01)
    found = metrics_by_position(predicted, 1 - position, returns, position)
    assert [part["from"] for part in found] == pytest.approx([i / 10 for i in range(10)])
    assert [part["tokens"] for part in found] == [100] * 10
    assert [part["loss"] for part in found] == pytest.approx([1 - (i + 0.25) / 10 for i in range(10)])
    errors = [part["calibration_error"] for part in found]
    assert errors == sorted(errors, reverse=True) and found[-1]["auc"] == 1


def test_tenths_without_a_token_are_left_out():
    found = metrics_by_position(array(0, 1, 1), array(1, 1, 2), array(0, 1, 1), array(0, 0, 0.5))
    assert [(part["from"], part["tokens"], part["loss"]) for part in found] == [(0.0, 2, 1.0), (0.5, 1, 2.0)]


@pytest.mark.parametrize("length", range(1, 300, 7))
def test_every_token_is_in_some_tenth(length):
    position = np.arange(length) / length
    found = metrics_by_position(position, position, position, position)
    assert sum(part["tokens"] for part in found) == length
