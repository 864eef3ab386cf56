"""Q-Probe: scores of k sampled completions, and the losses that train them (Li et al. 2024, arXiv 2402.14688).

Scores Q and rewards r are [prompts, samples]; a row is one prompt, or one chunk of a prompt's completions. The
re-ranked policy draws k completions from the base policy and keeps one by

    rho_i = exp(Q_i / beta) / sum_j exp(Q_j / beta),        E[reward] = E[sum_i rho_i r_i]    exactly, for every k

and tends, as k grows, to the optimum pi_ref * exp(Q / beta) / Z of E_pi[Q] - beta * KL(pi || pi_ref).

Ragged rows take a boolean mask [prompts, samples]; a masked entry may hold NaN and is never read, in the gradient
neither. Rows with no valid entry are left out of every mean; a mean over nothing is 0.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def reward_loss(
    scores: Tensor, rewards: Tensor, kind: Literal["mse", "bce"] = "mse", mask: Tensor | None = None
) -> Tensor:
    """L_Q = mean (Q - r)^2, or L_CE = mean [softplus(Q) - r Q] for r in [0, 1]; the mean is over the valid entries.

    Eq. (2) and (3) of the paper, the latter with the sign that makes it a loss. Errors: ValueError for another kind.
    """
    if mask is not None:
        scores, rewards = scores[mask], rewards[mask]
    if kind == "mse":
        losses = (scores - rewards).square()
    elif kind == "bce":
        losses = F.softplus(scores) - rewards * scores
    else:
        raise ValueError(f"kind: must be 'mse' or 'bce', got {kind!r}")
    return losses.sum() / max(losses.numel(), 1)


def dropout_penalty(
    scores: Tensor, spread: Tensor, rate: float, kind: Literal["mse", "bce"] = "mse", mask: Tensor | None = None
) -> Tensor:
    """What dropout of a linear score's inputs adds to `reward_loss` in expectation: the limit of infinitely many masks.

    spread: sum_j (theta_j h_j)^2 of the inputs h behind each score. rate / (1 - rate) * spread is the variance that inverted
    dropout gives a score: exactly what a squared loss gains, and to second order, times sigma (1 - sigma) / 2, what bce does
    (Wager, Wang and Liang 2013). Of a preference the score is the difference of two, and so are its inputs.
    Errors: ValueError for another kind, and a rate outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate: must be at least 0 and below 1, got {rate}")
    if mask is not None:
        scores, spread = scores[mask], spread[mask]
    gains = rate / (1 - rate) * spread
    if kind == "bce":
        gains = gains * torch.sigmoid(scores) * torch.sigmoid(-scores) / 2
    elif kind != "mse":
        raise ValueError(f"kind: must be 'mse' or 'bce', got {kind!r}")
    return gains.sum() / max(gains.numel(), 1)


def preference_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """L_QP = mean -log sigmoid(Q_w - Q_l) over pairs (Bradley-Terry); both of one shape."""
    losses = F.softplus(rejected - chosen)
    return losses.sum() / max(losses.numel(), 1)


def policy_loss(scores: Tensor, rewards: Tensor, beta: float, mask: Tensor | None = None) -> Tensor:
    """L_PG = - mean over rows of sum_i rho_i r_i, the re-ranked policy's own expected reward (eq. (5) of the paper).

    dL/dQ_i = - rho_i (r_i - sum_j rho_j r_j) / beta per row: already centred, so that no baseline changes it, and
    exactly zero for a row of one sample or of equal rewards. The number of samples in a row is the k that is
    optimised. Errors: ValueError for beta <= 0.
    """
    if beta <= 0:
        raise ValueError(f"beta: must be positive, got {beta}")
    return -policy_value(scores, rewards, beta, mask)


def policy_value(scores: Tensor, rewards: Tensor, beta: float, mask: Tensor | None = None) -> Tensor:
    """Expected reward of the completion that `select` keeps, mean over rows; beta 0 is the argmax, ties to the
    first."""
    scores, rewards, mask = _valid_rows(scores, rewards, mask)
    # Relative to one constant per row: with equal rewards the sum below is exactly zero, and so is its gradient.
    top = rewards.detach().masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
    relative = (rewards - top).masked_fill(~mask, 0)
    values = (_selection(scores, beta, mask) * relative).sum(-1) + top.squeeze(-1)
    return values.sum() / max(len(values), 1)


def select(scores: Tensor, beta: float, generator: torch.Generator | None = None, mask: Tensor | None = None) -> Tensor:
    """Index of the completion to keep for each prompt, [prompts]: i ~ rho, or the argmax at beta 0 (ties to the first).

    Errors: ValueError for a negative beta, a prompt with no valid sample, or a valid score that is not finite.
    """
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    empty = (~mask.any(-1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"mask: nothing to select from in row {empty[0]}")
    if not scores[mask].isfinite().all():
        raise ValueError("scores: must be finite wherever the mask is true")
    probabilities = _selection(scores.double(), beta, mask)
    if beta == 0:
        return probabilities.argmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def _selection(scores: Tensor, beta: float, mask: Tensor) -> Tensor:
    """rho of every row, zero where masked; every row has a valid entry."""
    if beta < 0:
        raise ValueError(f"beta: must not be negative, got {beta}")
    scores = scores.masked_fill(~mask, 0)
    masked = scores.masked_fill(~mask, -torch.inf)
    if beta == 0:
        return F.one_hot(masked.argmax(-1), scores.shape[-1]).to(scores.dtype)
    relative = scores - masked.detach().amax(-1, keepdim=True)  # so that no beta, however small, overflows
    return torch.softmax((relative / beta).masked_fill(~mask, -torch.inf), -1)


def _valid_rows(scores: Tensor, rewards: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if mask is None:
        mask = torch.ones_like(scores, dtype=torch.bool)
    rows = mask.any(-1)
    return scores[rows], rewards[rows], mask[rows]


def best_of_n(
    scores: Tensor,
    baseline: Tensor | None = None,
    min_advantage: float = 0.0,
    head_reduce: Literal["min", "mean", "max"] = "min",
) -> tuple[Tensor, Tensor, Tensor]:
    """Digi-Q's extraction (arXiv 2502.15760): which sample of each prompt to imitate, its advantage, and whether that is above
    `min_advantage`; all [prompts], ties to the first.

    scores: [heads, prompts, samples]; baseline: V [heads, prompts], None: the mean of a head's scores. Heads are reduced before
    the difference: of 16 equal samples the best seems .09 better by the `min` of two heads with noise .1, .21 by the `max`.
    Errors: ValueError for another `head_reduce`.
    """
    reductions: dict[str, Callable[..., Tensor]] = {"min": torch.amin, "mean": torch.mean, "max": torch.amax}
    if head_reduce not in reductions:
        raise ValueError(f"head_reduce: must be 'min', 'mean' or 'max', got {head_reduce!r}")
    reduce, baseline = reductions[head_reduce], scores.mean(-1) if baseline is None else baseline
    scores, baseline = reduce(scores, 0), reduce(baseline, 0)
    advantages, chosen = (scores - baseline.unsqueeze(-1)).max(-1)
    return chosen, advantages, advantages > min_advantage
