"""A policy and its value function as one module: one optimizer, one DeepSpeed engine, one checkpoint, one forward."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from posttrain.errors import UserError
from posttrain.models.features import FeatureSpec, Row, batches_by_length
from posttrain.models.logprobs import in_float32, token_logprobs
from posttrain.models.probe import Probe
from posttrain.models.value import ValueModel, ValueModelConfig


class ActorCritic(nn.Module):
    """policy: a causal language model, PEFT adapters included; critic: a V-type value model, whose logit is V itself.

    packing: a forward reads its rows one after the other, without their padding, and each attends to itself alone because its
    positions begin at 0 again (transformers' attention knows by that; recurrent layers do not).
    """

    def __init__(self, policy: Any, critic: ValueModel) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.packing = False

    @property
    def config(self) -> Any:
        """The policy's: what transformers' Trainer and DeepSpeed read sizes from."""
        return self.policy.config

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **which: Any) -> None:
        """which: the layers and places that newer transformers name."""
        kwargs = {
            "use_reentrant": False,
            **(gradient_checkpointing_kwargs or {}),
        }  # a frozen base's inputs need no gradient
        for model in (self.policy, self.critic.backbone):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs, **which)

    def forward(
        self,
        input_ids: Tensor,
        actions: Tensor,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """log pi(token) and V(before it) of the tokens that `actions` marks: both float32 [marked tokens], in order.

        input_ids: [rows, time], padded on the right; actions: bool [rows, time], true at the tokens of completions, never at
        a row's first.
        """
        position_ids = None
        if self.packing and attention_mask is not None:
            read = attention_mask.bool()
            positions = torch.arange(read.shape[1], device=read.device).expand_as(read)
            input_ids, actions, position_ids = (part[read].unsqueeze(0) for part in (input_ids, actions, positions))
            attention_mask = None
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "use_cache": False,
        }
        before = actions.roll(-1, dims=1)  # the state before token t is that at token t - 1
        states = decoder(self.policy)(**inputs).last_hidden_state[before]
        logprobs = token_logprobs(self.policy, states, input_ids[actions])
        values = in_float32(self.critic.head, self.critic.backbone(**inputs).last_hidden_state[before])
        return logprobs, values.squeeze(-1)


def decoder(policy: Any) -> Any:
    """The policy without its head, adapters in place."""
    return (policy.get_base_model() if hasattr(policy, "get_base_model") else policy).get_decoder()


def new_critic(policy: Any, reference: str, shared: bool = False, probe: Probe | None = None) -> ValueModel:
    """V = 0 everywhere, in float32, its backbone a copy of the policy's own. reference: the starting policy's fingerprint.

    probe: a linear one of that policy's last states, trained to say the reward: V starts as what it says of a prefix.

    shared: the backbone is made of modules of its own on the policy's very weights, which take no second place in memory:
    for adapters on each of them. No adapter is ever switched, so a backward sees those that its forward saw.
    """
    body = policy.get_decoder()
    config = ValueModelConfig(
        backbone=copy.deepcopy(body.config),
        head="v",
        hidden_size=body.config.hidden_size,
        embedding_size=body.get_input_embeddings().embedding_dim,
        vocab_size=body.config.vocab_size,
        reference=reference,
        soft=True,
    )
    with torch.random.fork_rng(devices=[]):
        critic = ValueModel(config).to(policy.device)
    if shared:
        weights = (*body.parameters(), *body.buffers())
        critic.backbone = copy.deepcopy(body, {id(weight): weight for weight in weights})
    else:
        critic.backbone.load_state_dict(body.state_dict())
    critic.zero_head()
    if probe is not None:
        _start_from(critic, probe)
    return critic


@torch.no_grad()
def _start_from(critic: ValueModel, probe: Probe) -> None:
    """Errors: UserError naming `probe` where its scores are no function that the head can be."""
    card, depth = probe.card, critic.config.backbone.num_hidden_layers
    probe.check_policy(str(critic.config.reference))
    if card.hidden is not None or card.feature != FeatureSpec(depth, "last") or card.loss != "mse":
        raise UserError(
            f"probe: the value model starts from a linear probe of layer {depth}, last, of loss mse; this one is "
            f"{'linear' if card.hidden is None else 'not linear'}, of {card.feature}, of loss {card.loss}"
        )
    weight = probe.first.weight / probe.std  # as the probe standardises its features
    critic.head.weight.copy_(weight)
    critic.head.bias.copy_(probe.first.bias - weight @ probe.mean)


@torch.inference_mode()
def prefix_values(critic: ValueModel, rows: Sequence[Row], batch_tokens: int = 8192) -> list[Tensor]:
    """V of every prefix of (prompt ids, completion ids): of each row float32 [tokens + 1], entry t after t tokens of the completion.

    After an end token V is 0 and was not learned: the last entry of a completion that ended says nothing.
    """
    device = critic.device
    sequences = [torch.tensor([*prompt, *completion]) for prompt, completion in rows]
    values: list[Tensor] = [torch.empty(0)] * len(rows)
    for batch in batches_by_length([len(sequence) for sequence in sequences], batch_tokens):
        ids = pad_sequence([sequences[i] for i in batch], batch_first=True).to(device)
        lengths = torch.tensor([len(sequences[i]) for i in batch], device=device)
        mask = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()
        found = critic(ids, attention_mask=mask).float().cpu()
        for i, row in zip(batch, found, strict=True):
            values[i] = row[len(rows[i][0]) - 1 : len(sequences[i])].clone()
    return values


def merged(model: Any) -> Any:
    """A policy or value model without adapters: a copy that they are merged into, or itself where it has none."""
    if hasattr(model, "merge_and_unload"):
        return copy.deepcopy(model).merge_and_unload()
    if hasattr(getattr(model, "backbone", None), "merge_and_unload"):
        model = copy.deepcopy(model)
        model.backbone = model.backbone.merge_and_unload()
    return model
