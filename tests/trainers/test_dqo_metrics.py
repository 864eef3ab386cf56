"""DQO's diagnostics, by hand."""

import math

import pytest
import torch

from posttrain.trainers.dqo_metrics import measure

NAN = math.nan


def batch(weights=(2.0, 0.001), ended=(True, False)):
    """A right completion of four tokens that ended, a wrong one of two that was cut; the rest is not there."""
    return measure(
        torch.tensor([[NAN, -0.5, -1.2, -0.3, -0.9], [NAN, -0.7, -2.0, NAN, NAN]]),
        torch.tensor([[NAN, -0.8, -1.0, -0.6, -1.0], [NAN, -0.4, -1.5, NAN, NAN]]),
        torch.tensor([[NAN, 0.4, 0.5, 0.3, 0.7], [NAN, 0.4, 0.2, NAN, NAN]]),
        torch.tensor([[NAN, 0.0, 0.0, 0.0, 1.0], [NAN, 0.0, 0.0, NAN, NAN]]),
        torch.tensor([[NAN, 0.95, 0.98, 0.96, 0.99], [NAN, 0.08, 0.05, NAN, NAN]]),
        torch.tensor([[False, True, True, True, True], [False, True, True, False, False]]),
        torch.tensor(ended),
        None if weights is None else torch.tensor(weights),
        2.0,
    )


def test_every_number_is_the_one_by_hand():
    ratios = [0.3, -0.2, 0.3, 0.1, -0.3, -0.5]
    returns, errors = [0.95, 0.98, 0.96, 0.99, 0.08, 0.05], [0.55, 0.48, 0.66, 0.29, -0.32, -0.15]

    def variance(numbers):
        mean = sum(numbers) / len(numbers)
        return sum((number - mean) ** 2 for number in numbers) / len(numbers)

    expected = {
        "log_ratio_right": 0.5,
        "log_ratio_wrong": -0.8,
        "kl": sum(math.exp(ratio) * ratio - math.exp(ratio) + 1 for ratio in ratios) / 6,
        "value_first": 0.4,
        "return": (0.95 + 0.08) / 2,
        "explained_variance": 1 - variance(errors) / variance(returns),
        "residual_1": (0.55**2 + 0.32**2) / 2,
        "residual_2": 0.48**2,
        "residual_3": (0.66**2 + 0.15**2) / 2,
        "residual_4": 0.29**2,
        "end_probability": math.exp(-0.9),
        "length_right": 4.0,
        "length_wrong": 2.0,
        "weight": 1.0005,
        "weight_capped": 0.5,
        "weight_small": 0.5,
        "ess": 2.001**2 / (4 + 1e-6) / 2,
    }
    assert batch() == pytest.approx(expected, abs=1e-5)


def test_what_cannot_be_measured_is_nan():
    assert math.isnan(batch(ended=(False, False))["end_probability"])


def test_without_weights_nothing_is_said_of_them():
    assert not {"weight", "weight_capped", "weight_small", "ess"} & set(batch(weights=None))
