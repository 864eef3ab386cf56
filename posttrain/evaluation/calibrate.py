"""From a scorer's scores to probabilities: Platt's logistic map, fitted on one set of completions and read on another."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def fit_logistic(scores: Array, correct: Array, steps: int = 100) -> tuple[float, float]:
    """(a, b) of p = sigmoid(a * score + b), by Newton's method; scores and correct are flat, of one length.

    Platt's targets (1999) stand for 0 and 1, so that scores which separate the two have a finite optimum.
    """
    right = correct.sum()
    targets = np.where(correct > 0, (right + 1) / (right + 2), 1 / (len(correct) - right + 2))
    centre, spread = scores.mean(), scores.std() or 1.0
    inputs = np.stack([(scores - centre) / spread, np.ones_like(scores)], 1)  # [rows, 2]
    weights = np.zeros(2)
    for _ in range(steps):
        p = _sigmoid(inputs @ weights)
        gradient = inputs.T @ (p - targets) / len(targets)
        hessian = (inputs * (p * (1 - p))[:, None]).T @ inputs / len(targets) + 1e-9 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        weights -= step * min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-12))  # damped: a full step can overshoot
        if float(np.abs(step).max()) < 1e-10:
            break
    return float(weights[0] / spread), float(weights[1] - weights[0] * centre / spread)


def apply_logistic(scores: Array, fitted: tuple[float, float]) -> Array:
    a, b = fitted
    return _sigmoid(a * scores + b)


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * x))
