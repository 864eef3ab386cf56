"""Log-probabilities of given tokens without the [tokens, vocab] tensor: the language-model head, a chunk at a time, in float32.

A bfloat16 logit is off by more than a token's log-ratio to its reference: the head's product is taken in float32 whatever the
model's precision. Backward recomputes a chunk's logits (not below a frozen head), so that memory grows with the tokens, not
with tokens times vocabulary.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 1 << 25  # logits in one chunk: 128 MiB in float32


def token_logprobs(model: Any, states: Tensor, tokens: Tensor) -> Tensor:
    """log pi(token) [tokens] from last hidden states [tokens, d], through the model's own head: under ZeRO-3, and with tied
    embeddings, it is the module that owns the weight that gathers it.

    Final soft caps and scales of the family are applied. Gradient flows into states and head.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    size = max(1, CHUNK_LOGITS // config.vocab_size)
    frozen = not any(weight.requires_grad for weight in head.parameters())
    parts = [
        _linearised(head, config, part, wanted)
        if frozen and part.requires_grad and torch.is_grad_enabled()
        else checkpoint(_chunk, head, config, part, wanted, use_reentrant=False)
        for part, wanted in zip(states.split(size), tokens.split(size), strict=True)
    ]
    return torch.cat(parts) if parts else states.new_zeros(0, dtype=torch.float32)


def _chunk(head: nn.Module, config: Any, states: Tensor, tokens: Tensor) -> Tensor:
    with torch.autocast(states.device.type, enabled=False):
        logits = in_float32(head, states)
        logits = logits / getattr(config, "logits_scaling", 1.0)  # Granite
        logits = logits * getattr(config, "logit_scale", 1.0)  # Cohere
        cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def _linearised(head: nn.Module, config: Any, states: Tensor, tokens: Tensor) -> Tensor:
    """`_chunk` below a frozen head: d log pi / d state [tokens, d], taken while the logits are there, is all that backward
    needs, so that it does not compute them again. A token's log-probability depends on no other's state."""
    fixed = states.detach().requires_grad_()
    logprobs = _chunk(head, config, fixed, tokens)
    (slopes,) = torch.autograd.grad(logprobs.sum(), fixed)
    return logprobs.detach() + ((states - fixed.detach()) * slopes).float().sum(-1)


def in_float32(head: Any, states: Tensor) -> Tensor:
    """A linear head's product in float32, whatever its own precision, and autocast's. The weight is widened inside the head's
    own call, after whatever gathers it there."""
    with torch.autocast(states.device.type, enabled=False):
        if next(head.parameters()).dtype == torch.float32:
            return head(states.float())
        if type(head) is not nn.Linear:
            widened = {name: parameter.float() for name, parameter in head.named_parameters()}
            return torch.func.functional_call(head, widened, (states.float(),))
        head.forward = partial(_wide_linear, head)  # type: ignore[method-assign]
        try:
            return head(states.float())
        finally:
            del head.forward


def _wide_linear(head: nn.Linear, states: Tensor) -> Tensor:
    return F.linear(states.float(), head.weight.float(), None if head.bias is None else head.bias.float())
