"""A value model as a reward model: E[R] of whole completions, read at their last token (table 3 of arXiv 2502.20548).

For the re-ranker's best-of-n, and for a majority vote weighted by these scores (`evaluation.metrics`). What it thought on
the way, after every token, is for people. Of preferences a score is the sum of Q - V over a completion's tokens: that of
their implied rewards (`objectives/ipl.py`) less V of the prompt.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from posttrain.models.features import Row, batches_by_length
from posttrain.models.value import ValueModel


def value_scores(value: ValueModel, rows: Sequence[Row], policy: Any, batch_tokens: int = 8192) -> Tensor:
    """Expected returns, float32 [rows], of (prompt ids, completion ids); of an empty completion, after its prompt.

    policy: the model that a shared head reads.
    """
    return torch.tensor([values[-1] for values in _prefix_values(value, rows, policy, batch_tokens)])


def token_values(value: ValueModel, rows: Sequence[Row], policy: Any, batch_tokens: int = 8192) -> list[list[float]]:
    """Expected returns after every token of the completions, [rows][tokens]; otherwise as `value_scores`."""
    found = _prefix_values(value, rows, policy, batch_tokens)
    return [values[len(prompt) :] for (prompt, _), values in zip(rows, found, strict=True)]


@torch.inference_mode()
def _prefix_values(value: ValueModel, rows: Sequence[Row], policy: Any, batch_tokens: int) -> list[list[float]]:
    """The same after every token of prompt and completion."""
    device = policy.device
    trunk = policy.get_decoder() if value.config.head == "shared" else None
    sequences = [torch.tensor([*prompt, *completion]) for prompt, completion in rows]
    lengths = [len(sequence) for sequence in sequences]
    found: list[list[float]] = [[] for _ in rows]
    for batch in batches_by_length(lengths, batch_tokens):
        ids = pad_sequence([sequences[i] for i in batch], batch_first=True).to(device)
        ends = torch.tensor([lengths[i] for i in batch], device=device)
        mask = (torch.arange(ids.shape[1], device=device) < ends[:, None]).long()
        logits = value(ids, attention_mask=mask, trunk=trunk).float()
        if value.config.preferences:
            starts = torch.tensor([len(rows[i][0]) for i in batch], device=device)
            prompt = torch.arange(ids.shape[1], device=device) < starts[:, None]
            scores = (logits[..., 0] - logits[..., 1]).masked_fill(prompt, 0).cumsum(-1)
        else:
            scores = value.expected(logits)
        for i, row in zip(batch, scores.tolist(), strict=True):
            found[i] = row[: lengths[i]]
    return found
