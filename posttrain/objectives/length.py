"""Length-aware rewards: the group-gated one of GRPO-lambda (Dai et al. 2025, arXiv 2505.18086), and its peers.

All have one signature: `correct` [prompts, samples], 0 or 1 (or boolean), NaN where a completion was not scored; `lengths`
[prompts, samples], tokens; `finished` [prompts, samples], boolean, False where the token limit cut a completion off. They
return rewards [prompts, samples], float. c below is correct and finished: what was cut off is incorrect. NaN stays NaN,
and such a completion enters no statistic of correct ones and no accuracy. l is a length, p the accuracy of a prompt's group.

The paper's own constants could not be obtained: the defaults of `group_gated` are ours. Those of the peers are their
papers'. Deviations are population ones (ddof 0).

Errors: ValueError naming the argument for shapes that differ, and for settings out of range.
"""

import math

import torch
from torch import Tensor

EPS = 1e-7  # beside a standard deviation of lengths, in tokens


def group_gated(
    correct: Tensor,
    lengths: Tensor,
    finished: Tensor,
    gate_fraction: float = 0.2,
    alpha: float = 0.2,
    min_group_accuracy: float = 0.5,
    length_std_floor: float = 0.05,
) -> Tensor:
    """r = `sigmoid_length` in the groups that `gate` selects, c elsewhere (GRPO-lambda, section 3).

    Unlike the paper, a group must also be right often enough, whatever its rank, and a spread of lengths below
    `length_std_floor` of their mean counts as that much: one token does not get the force of hundreds.
    """
    gated = gate(correct, finished, gate_fraction, min_group_accuracy)
    shaped = sigmoid_length(correct, lengths, finished, alpha, length_std_floor)
    return torch.where(gated[:, None], shaped, _outcomes(correct, lengths, finished)[0])


def gate(correct: Tensor, finished: Tensor, gate_fraction: float = 0.2, min_group_accuracy: float = 0.5) -> Tensor:
    """Which groups have their lengths rewarded, boolean [prompts]: those in the top ceil(gate_fraction * prompts) by
    accuracy that reach min_group_accuracy too.

    The rows must be the whole batch of all ranks. Ties go to the row that comes first.
    """
    _check_unit(gate_fraction=gate_fraction, min_group_accuracy=min_group_accuracy)
    accuracy = group_accuracy(correct, finished)
    count = math.ceil(round(gate_fraction * len(accuracy), 9))  # 0.1 * 30 is above 3
    chosen = torch.zeros_like(accuracy, dtype=torch.bool)
    chosen[accuracy.argsort(descending=True, stable=True)[:count]] = True
    return chosen & (accuracy >= min_group_accuracy - 1e-6)


def group_accuracy(correct: Tensor, finished: Tensor) -> Tensor:
    """Mean of c over a group's scored completions, [prompts]; 0 where none was scored."""
    outcomes, _ = _outcomes(correct, correct, finished)
    scored = (~outcomes.isnan()).sum(-1)
    return outcomes.nansum(-1) / scored.clamp(min=1)


def sigmoid_length(
    correct: Tensor, lengths: Tensor, finished: Tensor, alpha: float = 0.1, length_std_floor: float = 0.0
) -> Tensor:
    """r = c (1 - alpha * sigmoid((l - m) / s)), m and s over a group's c = 1 (Arora & Zanette 2025, arXiv 2502.04463).

    length_std_floor: s is at least this part of m; their own code has none.
    """
    _check_unit(alpha=alpha)
    if not length_std_floor >= 0:
        raise ValueError(f"length_std_floor: must not be negative, got {length_std_floor}")
    outcomes, lengths = _outcomes(correct, lengths, finished)
    right = (outcomes == 1).to(lengths.dtype)
    count = right.sum(-1, keepdim=True).clamp(min=1)
    mean = (right * lengths).sum(-1, keepdim=True) / count
    spread = ((right * (lengths - mean).square()).sum(-1, keepdim=True) / count).sqrt()
    scores = (lengths - mean) / (spread.maximum(length_std_floor * mean) + EPS)
    return outcomes * (1 - alpha * scores.sigmoid())


def kimi(correct: Tensor, lengths: Tensor, finished: Tensor, weight: float = 1.0) -> Tensor:
    """r = c + weight * v where right, weight * min(0, v) where wrong; v = 1/2 - (l - min l) / (max l - min l), 0 where
    all lengths are equal (Kimi k1.5, arXiv 2501.12599; the weight is not published, below 2 right stays above wrong)."""
    outcomes, lengths = _outcomes(correct, lengths, finished)
    shortest, longest = lengths.amin(-1, keepdim=True), lengths.amax(-1, keepdim=True)
    score = 0.5 - (lengths - shortest) / (longest - shortest).clamp(min=1)
    score = score.where(longest > shortest, 0)
    return outcomes + weight * score.where(outcomes == 1, score.clamp(max=0))


def l1_exact(correct: Tensor, lengths: Tensor, finished: Tensor, target: Tensor | float, alpha: float = 3e-4) -> Tensor:
    """r = c - alpha * |target - l|, target the length asked for in the prompt, [prompts, 1] or a number (L1, arXiv
    2503.04697)."""
    outcomes, lengths = _outcomes(correct, lengths, finished)
    return outcomes - alpha * (target - lengths).abs()


def l1_max(correct: Tensor, lengths: Tensor, finished: Tensor, target: Tensor | float, alpha: float = 3e-4) -> Tensor:
    """r = c * clip(alpha * (target - l) + 1/2, 0, 1) (L1, arXiv 2503.04697). Its released code is alpha / 2."""
    outcomes, lengths = _outcomes(correct, lengths, finished)
    return outcomes * (alpha * (target - lengths) + 0.5).clamp(0, 1)


def soft_overlong(
    correct: Tensor, lengths: Tensor, finished: Tensor, max_length: int = 20480, cache: int = 4096
) -> Tensor:
    """r = +-1 plus what falls from 0 at l = max_length - cache to -1 at max_length (DAPO, arXiv 2503.14476, eq. (13))."""
    if not 0 < cache <= max_length:
        raise ValueError(f"cache: must be positive and at most max_length, got {cache} of {max_length}")
    outcomes, lengths = _outcomes(correct, lengths, finished)
    return 2 * outcomes - 1 + ((max_length - cache - lengths) / cache).clamp(-1, 0)


def shorter_better(
    correct: Tensor, lengths: Tensor, finished: Tensor, alpha: float = 2.0, beta: float = 1e-3
) -> Tensor:
    """r = alpha * c - beta * |l - l*|, l* the shortest of a group's c = 1, its mean length where there is none
    (ShorterBetter, arXiv 2504.21370)."""
    outcomes, lengths = _outcomes(correct, lengths, finished)
    shortest = lengths.masked_fill(outcomes != 1, math.inf).amin(-1, keepdim=True)
    optimal = shortest.where(shortest.isfinite(), lengths.mean(-1, keepdim=True))
    return alpha * outcomes - beta * (lengths - optimal).abs()


def alp(correct: Tensor, lengths: Tensor, finished: Tensor, beta: float = 1e-7) -> Tensor:
    """r = c - beta * l * max(p, 1 / samples): the gate made continuous (ALP, arXiv 2506.05256)."""
    outcomes, lengths = _outcomes(correct, lengths, finished)
    accuracy = group_accuracy(correct, finished)[:, None].to(lengths.dtype)
    return outcomes - beta * lengths * accuracy.clamp(min=1 / lengths.shape[1])


def difficulty_linear(correct: Tensor, lengths: Tensor, finished: Tensor, alpha: float = 0.25) -> Tensor:
    """r = c - alpha * p * l / max l (prime-rl)."""
    outcomes, lengths = _outcomes(correct, lengths, finished)
    accuracy = group_accuracy(correct, finished)[:, None].to(lengths.dtype)
    return outcomes - alpha * accuracy * lengths / lengths.amax(-1, keepdim=True).clamp(min=1)


def gr3(correct: Tensor, lengths: Tensor, finished: Tensor, alpha: float = 0.33) -> Tensor:
    """r = c / (1 + alpha * l / mean l), the mean over a group's completions, right or wrong (GR3, arXiv 2603.10535)."""
    outcomes, lengths = _outcomes(correct, lengths, finished)
    return outcomes / (1 + alpha * lengths / lengths.mean(-1, keepdim=True).clamp(min=1))


def cosine(correct: Tensor, lengths: Tensor, finished: Tensor, max_length: int = 14336) -> Tensor:
    """r falls from 2 to 1 where right and rises from -10 to 0 where wrong, by half a cosine over [0, max_length]; -10
    beyond it and where cut off (arXiv 2502.03373)."""
    outcomes, lengths = _outcomes(correct, lengths, finished)
    wave = (1 + torch.cos(math.pi * lengths / max_length)) / 2
    rewards = torch.where(outcomes == 1, 1 + wave, -10 * wave)
    rewards = rewards.masked_fill((lengths > max_length) | ~finished, -10)
    return rewards.masked_fill(outcomes.isnan(), math.nan)


def _outcomes(correct: Tensor, lengths: Tensor, finished: Tensor) -> tuple[Tensor, Tensor]:
    """c and the lengths, of one floating type."""
    if finished.dtype != torch.bool or finished.dim() != 2:
        raise ValueError(f"finished: must be boolean [prompts, samples], got {finished.dtype} {list(finished.shape)}")
    for name, values in (("correct", correct), ("lengths", lengths)):
        if values.shape != finished.shape:
            raise ValueError(f"{name}: must be {list(finished.shape)} like finished, got {list(values.shape)}")
    outcomes = correct if correct.is_floating_point() else correct.to(torch.get_default_dtype())
    if not ((outcomes == 0) | (outcomes == 1) | outcomes.isnan()).all():
        raise ValueError("correct: must be 0 or 1, or NaN where not scored")
    return outcomes.masked_fill(~finished & ~outcomes.isnan(), 0), lengths.to(outcomes.dtype)


def _check_unit(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: must lie in [0, 1], got {value}")
