"""DQO: a policy and a value function that satisfy the soft Bellman equation on offline completions (arXiv 2410.09302).

A state s_h is the prompt and the tokens before token h, an action a_h is token h (the end token is one), nothing is
discounted. The optimum of E_pi[ sum_h r_h - beta * l_h ], with l_h = log pi(a_h | s_h) - log pi_ref(a_h | s_h), is

    V*(s) = beta * log E_pi_ref[exp(Q*(s, a) / beta)],      pi*(a | s) = pi_ref(a | s) * exp((Q*(s, a) - V*(s)) / beta)

so that Q = beta * l + V makes pi the softmax of Q / beta for every pi and V, and what is left is the Bellman equation
beta * l_h + V(s_h) = r_h + V(s_h+1). At the optimum it holds on every completion, whoever sampled it.

OREO (arXiv 2412.16145) has the same losses at lam = 1, without weights and with `normalisation` "seq", and adds a regulariser, the
KL over the whole vocabulary, that is not here.

Tensors are [batch, time], best float32 or wider (the log-ratios drown in bfloat16's rounding); `values[:, h]` is V
*before* token h, and V after the last token is 0. The boolean mask is true at the tokens of completions. A masked entry
(prompt, padding) may hold NaN and is never read, in the gradient neither. A sequence is a row's unmasked tokens, or in
packed rows those with the same number in the integers `segments` [batch, time], which count from 0 over the batch.
`beta` is the KL coefficient, in units of the reward, and so is V.

Errors: ValueError naming the argument for beta <= 0, lam outside [0, 1] and shapes that differ.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Normalisation = Literal["token", "seq"]


def kl_rewards(logprobs: Tensor, ref_logprobs: Tensor, rewards: Tensor, mask: Tensor, beta: float) -> Tensor:
    """r~_h = r_h - beta * l_h: rewards from which the KL to the reference is paid; 0 where masked.

    Differentiable in `logprobs`, for `full_gradient`.
    """
    _check(mask, logprobs=logprobs, ref_logprobs=ref_logprobs, rewards=rewards)
    _check_beta(beta)
    return (rewards - beta * (logprobs - ref_logprobs)).masked_fill(~mask, 0)


def lambda_returns(
    kl_rewards: Tensor, values: Tensor, mask: Tensor, lam: float, segments: Tensor | None = None
) -> Tensor:
    """G_h = r~_h + (1 - lam) * V(s_h+1) + lam * G_h+1; 0 where masked. The values receive no gradient.

    lam = 1, the reported choice, is the KL-paid reward to go; lam = 0 the target of one step.
    """
    _check(mask, kl_rewards=kl_rewards, values=values, segments=segments)
    if not 0 <= lam <= 1:
        raise ValueError(f"lam: must lie in [0, 1], got {lam}")
    tokens = _Sequences(mask, segments)
    rewards, following = tokens.rows(kl_rewards[mask]), _following(tokens.rows(values[mask].detach()))
    returns = _discounted_sums(rewards + (1 - lam) * following, lam)
    return torch.zeros_like(kl_rewards).masked_scatter(mask, tokens.of(returns))


def value_loss(
    values: Tensor,
    returns: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    normalisation: Normalisation = "token",
    denominator: Tensor | float | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """L_V = E w (V(s_h) - sg G_h)^2, eq. (4.6).

    weights: w of every sequence. normalisation: `token`, the mean over all tokens; `seq`, the mean over each sequence's
    tokens, then over the sequences that have any. denominator: how many such tokens (or sequences) there are in all,
    where this batch is a part of a larger one; None: this batch is all.
    """
    _check(mask, values=values, returns=returns, segments=segments)
    residuals = values[mask] - returns[mask].detach()
    return _weighted_mean(residuals.square(), _Sequences(mask, segments), weights, normalisation, denominator)


def policy_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    rewards: Tensor,
    returns: Tensor,
    mask: Tensor,
    beta: float,
    weights: Tensor | None = None,
    normalisation: Normalisation = "token",
    full_gradient: bool = False,
    denominator: Tensor | float | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """L_Q = E w (beta * l_h + sg V(s_h) - r_h - sg G_h+1)^2, eq. (4.7); the means are those of `value_loss`.

    At lam = 1 its residuals are those of L_V, V - G; only the parameters that receive gradient differ. rewards: r_h,
    before the KL is paid. full_gradient: let the returns pass their gradient on to the log-probabilities of later
    tokens; `kl_rewards` must then have been called with gradients on. Errors: ValueError where it was not.
    """
    _check(mask, logprobs=logprobs, ref_logprobs=ref_logprobs, values=values, rewards=rewards, returns=returns)
    _check(mask, segments=segments)
    _check_beta(beta)
    if not full_gradient:
        returns = returns.detach()
    elif torch.is_grad_enabled() and logprobs.requires_grad and not returns.requires_grad:
        raise ValueError(
            "returns: full_gradient needs returns that depend on the log-probabilities; these are detached"
        )
    tokens = _Sequences(mask, segments)
    log_ratios = logprobs[mask] - ref_logprobs[mask]
    targets = rewards[mask] + tokens.of(_following(tokens.rows(returns[mask])))
    residuals = beta * log_ratios + values[mask].detach() - targets
    return _weighted_mean(residuals.square(), tokens, weights, normalisation, denominator)


def importance_weights(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    mask: Tensor,
    cap: float = math.e,
    segments: Tensor | None = None,
) -> Tensor:
    """w = min(cap, pi(y | x) / mu(y | x)) of whole sequences, [batch] or, when packed, [segments]; without gradient.

    behaviour_logprobs: log mu, of the law that the completions were sampled from; the reference's where it sampled them
    as it is (temperature 1, nothing cut off). Errors: ValueError for cap <= 0.
    """
    _check(mask, logprobs=logprobs, behaviour_logprobs=behaviour_logprobs, segments=segments)
    if not cap > 0:
        raise ValueError(f"cap: must be positive, got {cap}")
    log_ratios = logprobs[mask].detach() - behaviour_logprobs[mask].detach()
    return _Sequences(mask, segments).rows(log_ratios).sum(-1).clamp(max=math.log(cap)).exp()


def token_rewards(
    outcome: float,
    length: int,
    scores: Sequence[tuple[int, float]] = (),
    kind: Literal["additive", "shaping"] = "additive",
    scale: float = 1.0,
) -> Tensor:
    """r_h of one completion of `length` tokens, float32 [length]: its outcome on the last token, and process rewards.

    scores: (index of a step's last token, score) of some steps. `additive` pays scale * score at that token, and so asks
    for another policy. `shaping` takes the scores for a potential Phi of the prefix that ends there (0 for the prompt
    and for the whole completion, whose score is not read) and pays its differences: pi* stays, V* becomes V* - Phi.
    Errors: ValueError for an index outside the completion, or one that has two potentials.
    """
    rewards = torch.zeros(length)
    if length > 0:
        rewards[-1] = outcome
    potential = 0.0
    for position, (index, score) in enumerate(ordered := sorted(scores)):
        if not 0 <= index < length:
            raise ValueError(f"scores: token {index} is not in a completion of {length} tokens")
        if kind == "additive":
            rewards[index] += scale * score
        elif kind != "shaping":
            raise ValueError(f"kind: must be 'additive' or 'shaping', got {kind!r}")
        elif position and ordered[position - 1][0] == index:
            raise ValueError(f"scores: token {index} has two potentials")
        elif index < length - 1:
            rewards[index] += scale * score - potential
            potential = scale * score
    if potential:
        rewards[-1] -= potential
    return rewards


def label_count(mask: Tensor, normalisation: Normalisation = "token", segments: Tensor | None = None) -> Tensor:
    """What a mean is taken over: the tokens of completions, or the sequences that have any."""
    _check(mask, segments=segments)
    return _Sequences(mask, segments).count(normalisation)


class _Sequences:
    """The tokens of completions in a batch, flat in its order, and as one right-padded row per sequence.

    sequence, position: [tokens], where a token stands; lengths: [sequences].
    """

    def __init__(self, mask: Tensor, segments: Tensor | None) -> None:
        if segments is None:
            self.sequence, count = mask.nonzero()[:, 0], len(mask)
        else:
            self.sequence = segments[mask].long()
            count = int(self.sequence.max()) + 1 if len(self.sequence) else 0
            if count and self.sequence.min() < 0:
                raise ValueError("segments: must not be negative where the mask is true")
        self.lengths = torch.bincount(self.sequence, minlength=count)
        order = self.sequence.argsort(stable=True)
        begins = self.lengths.cumsum(0) - self.lengths
        rank = torch.arange(len(order), device=mask.device)
        self.position = torch.empty_like(order).scatter(0, order, rank - begins[self.sequence[order]])

    def rows(self, tokens: Tensor) -> Tensor:
        """[tokens] -> [sequences, longest], 0 beyond a sequence's end."""
        longest = int(self.lengths.max()) if len(self.lengths) else 0
        return tokens.new_zeros(len(self.lengths), longest).index_put((self.sequence, self.position), tokens)

    def of(self, rows: Tensor) -> Tensor:
        """[sequences, longest] -> [tokens]."""
        return rows[self.sequence, self.position]

    def count(self, normalisation: Normalisation) -> Tensor:
        if normalisation not in ("token", "seq"):
            raise ValueError(f"normalisation: must be 'token' or 'seq', got {normalisation!r}")
        return self.lengths.sum() if normalisation == "token" else (self.lengths > 0).sum()


def _following(rows: Tensor) -> Tensor:
    """What stands at the next token; 0 at the last."""
    return F.pad(rows[:, 1:], (0, 1)) if rows.shape[1] else rows


def _discounted_sums(rows: Tensor, lam: float) -> Tensor:
    """S_h = x_h + lam * S_h+1 by doubling, in log2(time) steps: after each, S_h has twice as many terms."""
    shift = 1
    while shift < rows.shape[1]:
        rows = rows + lam**shift * F.pad(rows[:, shift:], (0, shift))
        shift *= 2
    return rows


def _weighted_mean(
    losses: Tensor,
    tokens: _Sequences,
    weights: Tensor | None,
    normalisation: Normalisation,
    denominator: Tensor | float | None,
) -> Tensor:
    """Mean of w * loss [tokens] over all tokens or sequences: divided by how many there are, not by the sum of w."""
    if weights is not None:
        if weights.shape != tokens.lengths.shape:
            raise ValueError(f"weights: must be one of each of {len(tokens.lengths)} sequences, got {_shape(weights)}")
        losses = losses * weights.detach()[tokens.sequence]
    count = tokens.count(normalisation)
    if normalisation == "seq":
        losses = losses / tokens.lengths[tokens.sequence]
    return losses.sum() / torch.as_tensor(count if denominator is None else denominator).clamp(min=1)


def _check(mask: Tensor, **tensors: Tensor | None) -> None:
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise ValueError(f"mask: must be boolean [batch, time], got {mask.dtype} {_shape(mask)}")
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != mask.shape:
            raise ValueError(f"{name}: shape {_shape(tensor)} is not the mask's, {_shape(mask)}")


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta: must be positive, got {beta}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
