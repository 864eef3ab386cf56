"""How good a value model's predictions are, in all and by how far a completion has come."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PARTS = 10  # of a completion's labelled span, from its first token to its last
BINS = 10  # of the calibration error


def value_metrics(predicted: Array, losses: Array, returns: Array) -> dict[str, float]:
    """Over labelled tokens, all arrays [tokens]; predicted: E[R].

    loss: mean; auc: that a token of a higher return is predicted higher, ties half (binary returns; else of returns above
    their mean); calibration_error: mean |predicted - true| over bins of about equal counts, with equal predictions in one
    bin; explained_variance: of the returns. What is not defined is NaN.
    """
    variance = float(returns.var()) if np.ptp(returns) else 0.0  # of equal numbers numpy's is not always 0
    return {
        "loss": float(losses.mean()),
        "auc": auc(predicted, returns > returns.mean()),
        "calibration_error": calibration_error(predicted, returns),
        "explained_variance": 1 - float((returns - predicted).var()) / variance if variance else float("nan"),
    }


def metrics_by_position(predicted: Array, losses: Array, returns: Array, position: Array) -> list[dict[str, float]]:
    """`value_metrics` of each tenth of the completions; position: of a token in its labelled span, within [0, 1)."""
    found = []
    for part in range(PARTS):
        rows = (position * PARTS).astype(int) == part
        if rows.any():
            of_part = value_metrics(predicted[rows], losses[rows], returns[rows])
            found.append({"from": part / PARTS, "tokens": int(rows.sum()), **of_part})
    return found


def auc(scores: Array, positive: NDArray[np.bool_]) -> float:
    """P(score of a positive > of a negative) + P(tie) / 2, by ranks; NaN where one kind is missing."""
    count, other = int(positive.sum()), int((~positive).sum())
    if not count or not other:
        return float("nan")
    ranks = _ranks(scores)
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * other))


def calibration_error(predicted: Array, returns: Array) -> float:
    bins = ((_ranks(predicted) - 0.5) * BINS / len(predicted)).astype(int)
    gaps = np.bincount(bins, predicted - returns)
    return float(np.abs(gaps).sum() / len(predicted))


def _ranks(values: Array) -> Array:
    """From 1 on; ties share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
