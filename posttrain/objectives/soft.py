"""The one idea in log-space: the soft value and the tilted policy of max_pi E_pi[Q] - beta * KL(pi || pi_ref).

    V      = beta * log E_pi_ref[exp(Q / beta)]
    log pi = log pi_ref + Q / beta - V / beta

Both work relative to the largest Q, so |Q| / beta of 1e4 and more loses nothing. A reference of -inf marks an action
that does not exist (masked, padding): whatever stands there in the other argument, NaN included, is never read.
Half-precision inputs should be widened by the caller: the result has the dtype of the arguments.
"""

import torch
from torch import Tensor


def soft_value(q: Tensor, ref_logprobs: Tensor, beta: float, dim: int = -1) -> Tensor:
    """V = beta * logsumexp(log pi_ref + Q / beta) over `dim`, the optimal value of the regularised problem.

    q, ref_logprobs: same shape, actions along `dim`; q and the result in units of the reward. Where no action exists:
    -inf. Errors: ValueError for beta <= 0.
    """
    if beta <= 0:
        raise ValueError(f"beta: must be positive, got {beta}")
    q, top = _relative(q, ref_logprobs, dim)
    return beta * torch.logsumexp(ref_logprobs + q / beta, dim) + top.squeeze(dim)


def tilt(ref_logits: Tensor, log_tilt: Tensor) -> Tensor:
    """Normalised log-probabilities of pi ∝ pi_ref * exp(log_tilt), actions last.

    ref_logits need not be normalised; log_tilt is Q / beta, or any log-weight. Log-probabilities are logits too: a
    sampler may divide them by a temperature or filter them further. Masked actions stay -inf, and so does a row
    without actions.
    """
    log_tilt, _ = _relative(log_tilt, ref_logits, -1)
    logits = ref_logits + log_tilt
    none = (logits == -torch.inf).all(-1, keepdim=True)
    return torch.log_softmax(logits.masked_fill(none, 0), -1).masked_fill(none, -torch.inf)


def _relative(values: Tensor, ref: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Values minus their largest over the actions that exist (0 elsewhere), and that largest, kept as a dimension."""
    missing = ref == -torch.inf
    top = values.detach().masked_fill(missing, -torch.inf).amax(dim, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0)
    return (values - top).masked_fill(missing, 0), top
