"""Q#: the law of the return under pi_ref, and the log-tilt that it puts on every token (Zhou et al. 2025, arXiv 2502.20548).

The reward comes at the end and the MDP is deterministic, so the optimum of E_pi[R] - beta * KL(pi || pi_ref) is (Thm 2.2)

    Q*(x, y) = beta * log E_pi_ref[exp(R / beta) | x, y],       pi*(y | x) ∝ pi_ref(y | x) * exp(Q*(x, y) / beta)

whose expectation is under pi_ref and never moves: the law Z(x, y) of R is learned by maximum likelihood, once for every
beta, and a token's log-tilt is log E_{z ~ Z}[exp(z / beta)].

Two models of Z: Bernoulli, one logit f with P(R = 1) = sigmoid(f); categorical, logits over `atoms` (last dimension).
`beta` is the KL coefficient, in units of the reward (the paper's eta; the released code's --eta is 1 / beta): a number, or a
tensor that broadcasts against the log-tilts; infinity is no guidance, a tilt of exactly 0.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["row", "token"]


def bernoulli_log_tilt(value_logits: Tensor, beta: float | Tensor) -> Tensor:
    """log(1 - p + p exp(1 / beta)) = softplus(f + 1 / beta) - softplus(f), within [0, 1 / beta]; any shape.

    Errors: ValueError for beta <= 0.
    """
    scale = _inverse(beta, value_logits)
    # For large f both softplus are nearly f: their difference, and the gain that is left of it, are taken apart.
    return torch.where(
        value_logits > 0,
        scale + F.softplus(-value_logits - scale) - F.softplus(-value_logits),
        F.softplus(value_logits + scale) - F.softplus(value_logits),
    )


def categorical_log_tilt(value_logits: Tensor, atoms: Tensor, beta: float | Tensor) -> Tensor:
    """log sum_i z_i exp(v_i / beta) of logits [..., atoms] -> [...]; a logit of -inf is an atom of probability 0.

    Errors: ValueError for beta <= 0.
    """
    logprobs = torch.log_softmax(value_logits, -1)
    scale = _inverse(beta, value_logits)
    tilt = torch.logsumexp(logprobs + scale.unsqueeze(-1) * atoms.to(logprobs), -1)
    return tilt.masked_fill(scale == 0, 0)


def expected_log_tilt(value_logits: Tensor, beta: float | Tensor, atoms: Tensor | None = None) -> Tensor:
    """E_{z ~ Z}[z] / beta: controlled decoding (CD), the baseline of the paper's section 4; equal to Q# only where R is certain.

    value_logits: [...] (Bernoulli), or [..., atoms] with `atoms`. Errors: ValueError for beta <= 0.
    """
    return expected_return(value_logits, atoms) * _inverse(beta, value_logits)


def expected_return(value_logits: Tensor, atoms: Tensor | None = None) -> Tensor:
    """E[R], what a return model predicts as a reward model (table 3 of the paper); shapes as in `expected_log_tilt`."""
    if atoms is None:
        return torch.sigmoid(value_logits)
    return torch.softmax(value_logits, -1) @ atoms.to(value_logits)


def history_weights(count: int, decay: float = 0.9) -> Tensor:
    """Weights [count] of the value logits of several rounds, newest first: proportional to decay^i, of sum 1.

    Mirror descent keeps log pi = log pi_ref + a weighted sum of all rounds' Q; of the last `count` of them the weights are
    scaled up to the whole sum (StaQ, arXiv 2506.13862, its weight-corrected variant).
    """
    weights = decay ** torch.arange(count, dtype=torch.float64)
    return weights / weights.sum()


def negative_log_likelihood(value_logits: Tensor, returns: Tensor, atoms: Tensor | None = None) -> Tensor:
    """-log Z(r) of every return [...]: value_logits [...] (Bernoulli, r within [0, 1]), or [..., atoms]."""
    if atoms is None:
        return F.softplus(value_logits) - returns.to(value_logits) * value_logits
    return F.cross_entropy(value_logits.movedim(-1, 1), nearest_atom(returns, atoms), reduction="none")


def bernoulli_loss(
    value_logits: Tensor,
    returns: Tensor,
    mask: Tensor,
    reduction: Reduction = "row",
    denominator: Tensor | None = None,
) -> Tensor:
    """L_bce = -r log p - (1 - r) log(1 - p).

    value_logits, mask: [batch, time]; returns: [batch] (of whole completions) or [batch, time], within [0, 1].
    reduction: `row`, the mean over a row's labelled tokens, then over the rows that have any (the paper's); `token`, the
    mean over all labelled tokens. denominator: how many such rows (or tokens) there are in all, where this batch is a part
    of a larger one; None: this batch is all.
    """
    losses = negative_log_likelihood(value_logits.masked_fill(~mask, 0), _spread(returns, mask))
    return masked_mean(losses, mask, reduction, denominator)


def categorical_loss(
    value_logits: Tensor,
    returns: Tensor,
    atoms: Tensor,
    mask: Tensor,
    reduction: Reduction = "row",
    denominator: Tensor | None = None,
) -> Tensor:
    """L_mle = -log z[bin(r)]: value_logits [batch, time, atoms]; returns of any range, binned by `nearest_atom`."""
    logits = value_logits.masked_fill(~mask.unsqueeze(-1), 0)
    losses = negative_log_likelihood(logits, _spread(returns, mask), atoms)
    return masked_mean(losses, mask, reduction, denominator)


def squared_loss(
    value_logits: Tensor,
    returns: Tensor,
    mask: Tensor,
    reduction: Reduction = "row",
    denominator: Tensor | None = None,
) -> Tensor:
    """(sigmoid(f) - r)^2, the ablation of the paper's table 4: a regression of the mean, without a law."""
    returns = _spread(returns, mask).to(value_logits)
    errors = torch.sigmoid(value_logits.masked_fill(~mask, 0)) - returns
    return masked_mean(errors.square(), mask, reduction, denominator)


def nearest_atom(returns: Tensor, atoms: Tensor) -> Tensor:
    """Index of the atom nearest to each return, halfway to the even index; returns beyond the range take its ends.

    atoms: increasing, of any range and spacing. Errors: ValueError for atoms that are not.
    """
    check_atoms(atoms)
    atoms = atoms.to(returns.device, torch.float64)
    returns = returns.double()
    right = torch.searchsorted(atoms, returns.contiguous()).clamp(1, len(atoms) - 1)
    left = right - 1
    below, above = returns - atoms[left], atoms[right] - returns
    return torch.where((below < above) | ((below == above) & (left % 2 == 0)), left, right)


def check_atoms(atoms: Tensor) -> None:
    if atoms.dim() != 1 or len(atoms) < 2 or not atoms.isfinite().all() or not (atoms.diff() > 0).all():
        raise ValueError(f"atoms: must be at least two finite increasing numbers, got {atoms.tolist()}")


def masked_mean(
    values: Tensor, mask: Tensor, reduction: Reduction = "row", denominator: Tensor | None = None
) -> Tensor:
    """Mean of values [batch, time] where the mask is true, as `bernoulli_loss` says; over nothing it is 0."""
    values = values.masked_fill(~mask, 0)
    if reduction == "row":
        values = values.sum(-1) / mask.sum(-1).clamp(min=1)
    elif reduction != "token":
        raise ValueError(f"reduction: must be 'row' or 'token', got {reduction!r}")
    if denominator is None:
        denominator = label_count(mask, reduction)
    return values.sum() / denominator.clamp(min=1)


def label_count(mask: Tensor, reduction: Reduction = "row") -> Tensor:
    """What a mean is taken over: the rows of mask [batch, time] with a label, or the labelled tokens."""
    return mask.any(-1).sum() if reduction == "row" else mask.sum()


def _spread(returns: Tensor, mask: Tensor) -> Tensor:
    """Returns per token; where the mask is false, 0 instead of whatever stands there."""
    returns = returns.unsqueeze(-1) if returns.dim() < mask.dim() else returns
    return returns.expand(mask.shape).masked_fill(~mask, 0)


def _inverse(beta: float | Tensor, like: Tensor) -> Tensor:
    beta = torch.as_tensor(beta, dtype=like.dtype, device=like.device)
    if not (beta > 0).all():
        raise ValueError(f"beta: must be positive, got {beta.min().item()}")
    return 1 / beta
