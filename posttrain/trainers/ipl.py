"""IPL (arXiv 2305.15363): trains a value model on preferences instead of returns (objectives/ipl.py), otherwise as any is trained."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from posttrain.errors import UserError
from posttrain.objectives.ipl import expectile_loss, implied_rewards, preference_loss, reward_penalty
from posttrain.trainers.value import ValueTrainer
from posttrain.trainers.value_examples import collate_pairs


class IPLTrainer(ValueTrainer):
    """Fits Q, and V before every token, to pairs of completions. One network for both, without the paper's twins and target
    copies: a learning rate that a likelihood bears is unstable here.

    train_dataset, eval_dataset: of `pairs_of`; a batch of n has 2 n completions. The value model: one of preferences.
    Errors: UserError for another value model, for `reduction: token`, and as `ValueTrainer`.
    """

    def __init__(self, model: Any, args: Any, *datasets: Any, **others: Any) -> None:
        if not model.config.preferences:
            raise UserError("preferences: the value model is of returns; make one of preferences")
        if args.reduction != "row":
            raise UserError("reduction: must be row for preferences, whose penalty counts completions alike")
        super().__init__(model, args, *datasets, **others)
        self.data_collator = partial(collate_pairs, packed=args.packing)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Any, Any]:
        """Its loss is that of the preferences alone: the penalty and the error of V grow with Q, however good it is."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            chosen, rejected = self._rewards(self._logits(model, inputs), inputs["mask"]).chunk(2)
        margins = chosen.sum(-1) - rejected.sum(-1)
        return preference_loss(chosen, rejected), margins, torch.ones_like(margins)

    def _loss(self, logits: Tensor, inputs: dict[str, Any], denominator: Tensor | None) -> Tensor:
        """logits: [2 pairs, time, 2]. denominator: how many completions the whole step has, on all ranks."""
        mask, (q, values) = inputs["mask"], logits.unbind(-1)
        rewards = self._rewards(logits, mask)
        chosen, rejected = rewards.chunk(2)
        loss = preference_loss(chosen, rejected) + reward_penalty(rewards, mask) + expectile_loss(q, values, mask)
        return loss if denominator is None else loss * (len(mask) / denominator)

    def _rewards(self, logits: Tensor, mask: Tensor) -> Tensor:
        """V is a target here: it follows Q by the expectile loss alone."""
        q, values = logits.unbind(-1)
        return implied_rewards(q, values.detach(), mask)

    def _metrics(self, prediction: Any) -> dict[str, float]:
        """Of held-out pairs, the share whose implied rewards are in the right order."""
        return {"pairs_right": float((prediction.predictions > 0).mean())}
