"""A value model as a reward model: E[R] of whole completions, read at their last token (table 3 of arXiv 2502.20548).

For the re-ranker's best-of-n, and for a majority vote weighted by these scores (`evaluation.metrics`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from posttrain.models.features import Row, batches_by_length
from posttrain.models.value import ValueModel
from posttrain.objectives.qsharp import expected_return


@torch.inference_mode()
def value_scores(value: ValueModel, rows: Sequence[Row], policy: Any, batch_tokens: int = 8192) -> Tensor:
    """Expected returns, float32 [rows], of (prompt ids, completion ids). policy: the model that a shared head reads."""
    device = policy.device
    trunk = policy.get_decoder() if value.config.head == "shared" else None
    sequences = [torch.tensor([*prompt, *completion]) for prompt, completion in rows]
    lengths = [len(sequence) for sequence in sequences]
    scores = torch.empty(len(rows))
    for batch in batches_by_length(lengths, batch_tokens):
        ids = pad_sequence([sequences[i] for i in batch], batch_first=True).to(device)
        ends = torch.tensor([lengths[i] for i in batch], device=device)
        mask = (torch.arange(ids.shape[1], device=device) < ends[:, None]).long()
        logits = value(ids, attention_mask=mask, trunk=trunk)
        last = logits[torch.arange(len(batch), device=device), ends - 1]
        scores[batch] = expected_return(last.float(), value.atoms).cpu()
    return scores
