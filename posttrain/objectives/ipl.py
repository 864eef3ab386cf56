"""IPL: token values from preference pairs, without a reward model (Hejna and Sadigh 2023, arXiv 2305.15363).

Every Q implies the reward whose values it holds, and that reward explains the preferences, as Bradley and Terry's:

    r_Q(s_t, a_t) = Q(s_t, a_t) - gamma * V(s_t+1),        P(w over l) = sigma(sum_t r_Q(w) - sum_t r_Q(l))

Many rewards explain the same preferences; a penalty c * mean(r_Q^2) makes one of them the solution, and bounds it. V follows
Q by expectile regression: near the best of the actions that occur. Q is in nats, the log-odds of a preference; a frozen
policy is guided by pi_ref * exp((Q - V) / beta), in which V is the same for every action of a state.

With gamma = 1 and V = log sum_a exp Q the sum telescopes, sum_t r_Q = V(s_0) + sum_t log softmax(Q)(a_t | s_t): for two
completions of one prompt the loss is then DPO without a reference (CPL).

Tensors are [batch, time]: q[:, t] is that of token t, values[:, t] is V *before* it, and V after the last token is 0. The
boolean mask is true at the tokens of completions; a masked entry may hold NaN and is never read, in the gradient neither.
"""

import torch.nn.functional as F
from torch import Tensor


def implied_rewards(q: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """r_Q of every token, 0 where masked; differentiable in both (a V that is fitted apart is detached before)."""
    following = F.pad(values.masked_fill(~mask, 0)[:, 1:], (0, 1))
    return (q - gamma * following).masked_fill(~mask, 0)


def preference_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigma of the difference of undiscounted sums, mean over pairs.

    chosen, rejected: implied rewards [pairs, time], of any two lengths.
    """
    return -F.logsigmoid(chosen.sum(-1) - rejected.sum(-1)).mean()


def reward_penalty(rewards: Tensor, mask: Tensor, weight: float = 0.5) -> Tensor:
    """c * mean(r_Q^2): over a completion's tokens first, so that long ones weigh no more, then over completions."""
    return weight * _mean(rewards.masked_fill(~mask, 0).square(), mask)


def expectile_loss(q: Tensor, values: Tensor, mask: Tensor, tau: float = 0.7) -> Tensor:
    """|tau - 1(u < 0)| * u^2 with u = Q - V, of V alone (Q receives no gradient); mean as in `reward_penalty`.

    tau 0.5 fits the mean of Q over the actions that occur, tau towards 1 their maximum. Errors: ValueError for tau outside (0, 1).
    """
    if not 0 < tau < 1:
        raise ValueError(f"tau: must lie between 0 and 1, got {tau}")
    errors = (q.detach() - values).masked_fill(~mask, 0)
    return _mean((tau - (errors < 0).to(errors)).abs() * errors.square(), mask)


def _mean(losses: Tensor, mask: Tensor) -> Tensor:
    return (losses.sum(-1) / mask.sum(-1).clamp(min=1)).sum() / mask.any(-1).sum().clamp(min=1)
