"""What DQO's trainer logs of a batch: whether policy, values and weights do what they should."""

import math

import torch
from torch import Tensor

SMALL = 0.01  # a weight below it: a completion that no longer counts
QUARTERS = 4


@torch.no_grad()
def measure(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    rewards: Tensor,
    returns: Tensor,
    mask: Tensor,
    ended: Tensor,
    weights: Tensor | None,
    cap: float | None,
) -> dict[str, float]:
    """Tensors [rows, time], of completions' tokens where `mask` is true; ended, weights: [rows]; NaN where there is nothing to
    measure. ended: the last token is the end token; cap: of the weights.

    log_ratio_right, log_ratio_wrong   nats: sum over a completion whose rewards add up to more than 1/2, or not
    kl                                 nats per token: of KL(pi || pi_ref); unbiased where pi_ref sampled the completions
    value_first, return                V of the prompt, and what came of it
    explained_variance                 of the returns, by V
    residual_1 .. residual_4           mean (V - G)^2 of the tokens in each quarter of their completions
    end_probability                    pi(end token) where a completion ended
    length_right, length_wrong         tokens
    weight, weight_capped, weight_small, ess   mean, share at the cap, share below 0.01, effective share of the sample
    """
    log_ratios = (logprobs - ref_logprobs).masked_fill(~mask, 0)
    right = rewards.masked_fill(~mask, 0).sum(-1) > 0.5
    lengths = mask.sum(-1)
    first = mask.int().argmax(-1, keepdim=True)
    last = first + lengths.unsqueeze(-1) - 1
    errors = (returns - values)[mask]
    spread = returns[mask].var(correction=0)
    quarter = (QUARTERS * (mask.cumsum(-1) - 1) // lengths.clamp(min=1).unsqueeze(-1))[mask]
    tokens = log_ratios[mask]
    measured = {
        "log_ratio_right": log_ratios.sum(-1)[right].mean(),
        "log_ratio_wrong": log_ratios.sum(-1)[~right].mean(),
        "kl": (tokens.exp() * tokens - tokens.expm1()).mean(),
        "value_first": values.gather(1, first).mean(),
        "return": returns.gather(1, first).mean(),
        "explained_variance": 1 - errors.var(correction=0) / spread if spread > 0 else torch.tensor(math.nan),
        **{f"residual_{i + 1}": errors[quarter == i].square().mean() for i in range(QUARTERS)},
        "end_probability": logprobs.gather(1, last)[ended].exp().mean(),
        "length_right": lengths[right].float().mean(),
        "length_wrong": lengths[~right].float().mean(),
    }
    if weights is not None and cap is not None:
        measured["weight"] = weights.mean()
        measured["weight_capped"] = (weights >= cap * (1 - 1e-6)).float().mean()
        measured["weight_small"] = (weights < SMALL).float().mean()
        measured["ess"] = weights.sum().square() / weights.square().sum() / len(weights)
    device = logprobs.device  # one transfer, not twenty
    return dict(zip(measured, torch.stack([value.to(device) for value in measured.values()]).tolist(), strict=True))
