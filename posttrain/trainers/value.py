"""Trains a value model by maximum likelihood of the return, on transformers' Trainer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from posttrain.errors import UserError
from posttrain.models.value import ValueModel
from posttrain.objectives.qsharp import (
    bernoulli_loss,
    categorical_loss,
    expected_return,
    label_count,
    negative_log_likelihood,
)
from posttrain.provenance import versions, write_json
from posttrain.trainers.head_dropout import HeadDropout, check_dropout
from posttrain.trainers.resumable import Resumable
from posttrain.trainers.value_examples import Example, collate, unpack
from posttrain.trainers.value_metrics import metrics_by_position, value_metrics


@dataclass
class ValueConfig(TrainingArguments):
    """Arguments of transformers' Trainer, and what is this trainer's own; defaults as in the released code, where it has any.

    With `bf16` the weights stay in float32 and the forward runs in bfloat16: small updates are not rounded away.
    """

    learning_rate: float = field(default=2e-5, metadata={"help": "of AdamW"})
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "of the head, which starts from nothing; default: learning_rate"}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "of AdamW"})
    max_grad_norm: float = field(default=5.0, metadata={"help": "gradients are clipped to this norm"})
    num_train_epochs: float = field(default=5, metadata={"help": "passes over the examples"})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "completions per forward"})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "of the learning rate"})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "batches of similar length: little padding"}
    )
    reduction: str = field(
        default="row",
        metadata={"help": "row: mean over a completion's tokens, then over completions; token: over all tokens"},
    )
    head_dropout: float = field(default=0.0, metadata={"help": "rate, of what the head reads"})
    dropout_schedule: str = field(
        default="constant",
        metadata={"help": "constant; early: falls to 0 within dropout_cutoff; late: begins there"},
    )
    dropout_cutoff: int | None = field(default=None, metadata={"help": "steps, of an early or late schedule"})
    packing: bool = field(
        default=False, metadata={"help": "rows one after the other without padding; for flash attention"}
    )
    report_to: Any = field(default="none", metadata={"help": "where to log: none, tensorboard, wandb, ..."})
    save_strategy: str = field(default="epoch", metadata={"help": "when to save a checkpoint one can resume from"})
    save_total_limit: int | None = field(default=2, metadata={"help": "how many checkpoints to keep"})

    def __post_init__(self) -> None:
        if self.reduction not in ("row", "token"):
            raise UserError(f"reduction: must be row or token, got {self.reduction!r}")
        check_dropout(self.head_dropout, self.dropout_schedule, self.dropout_cutoff)
        self.remove_unused_columns = False
        self.label_names = ["returns", "mask"]
        super().__post_init__()

    @property
    def device(self) -> torch.device:
        """A processor without the number that accelerate gives it on each rank, and torch's loader of checkpoints does not know."""
        found = super().device
        return torch.device("cpu") if found.type == "cpu" else found


class ValueTrainer(Resumable):
    """Fits Z(x, y), the law of the return under the policy whose completions these are (objectives/qsharp.py).

    train_dataset, eval_dataset: of `value_examples`. trunk: the policy, for a shared head; it stays frozen.
    peft_config: LoRA on the backbone instead of full fine-tuning; `save` merges it.
    Under ZeRO-3 make the model before the arguments: once they are there, transformers shards whatever is loaded.
    Errors: UserError for a trunk or a peft_config where the head has no use for it, adapters under ZeRO-3, and returns that
    are not within [0, 1] for a Bernoulli model.
    """

    def __init__(
        self,
        model: ValueModel,
        args: ValueConfig,
        train_dataset: Sequence[Example],
        eval_dataset: Sequence[Example] | None = None,
        trunk: Any = None,
        peft_config: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if (model.config.head == "shared") != (trunk is not None):
            raise UserError("trunk: a shared head needs the policy that it reads, other heads must not have one")
        if args.gradient_checkpointing and model.backbone is None:
            raise UserError("gradient_checkpointing: a shared head has nothing to compute again; leave it out")
        for examples in (train_dataset, eval_dataset or ()):
            bernoulli = model.config.atoms is None and not model.config.preferences
            if bernoulli and any(not 0 <= example["return_"] <= 1 for example in examples):
                raise UserError("reward: returns must be within [0, 1] without atoms; give atoms that span them")
        if peft_config is not None:
            if model.backbone is None:
                raise UserError("peft_config: a shared head has no backbone to adapt")
            if is_deepspeed_zero3_enabled():
                raise UserError("peft_config: adapters cannot be merged under ZeRO-3; use ZeRO-2")
            from peft import get_peft_model

            set_seed(args.seed)
            model.backbone = get_peft_model(model.backbone, peft_config)
        self.trunk = trunk.get_decoder().eval() if trunk is not None else None
        self.by_position: list[dict[str, float]] = []
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=partial(collate, packed=args.packing),
            processing_class=processing_class,
            callbacks=callbacks,
            compute_metrics=self._metrics,
        )
        if args.head_dropout:
            reads = model.head if model.config.head == "v" else model.head.prefix
            self.add_callback(HeadDropout(reads, args.head_dropout, args.dropout_schedule, args.dropout_cutoff or 0))
        self.model_accepts_loss_kwargs = True  # the loss below divides by the count of the whole step itself

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The usual one, with the head in groups of its own where it has a learning rate of its own."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        if self.args.head_learning_rate is not None:
            head = set(map(id, self.accelerator.unwrap_model(self.model).head.parameters()))
            for group in list(optimizer.param_groups):
                own = [parameter for parameter in group["params"] if id(parameter) in head]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in head]
                if own:
                    optimizer.add_param_group({**group, "params": own, "lr": self.args.head_learning_rate})
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Tensor]:
        """A step's micro-batches, and how many labels they have on all ranks together."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum(
            (label_count(batch["mask"], self.args.reduction) for batch in batches),
            start=torch.zeros((), dtype=torch.long),
        )
        return batches, self.accelerator.gather(count.to(device)).sum()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        logits = self._logits(model, inputs)
        loss = self._loss(logits, inputs, num_items_in_batch)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over ranks
        return (loss, logits) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Any, Any]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            logits = self._logits(model, inputs)
            returns, mask = inputs["returns"], inputs["mask"]
            loss = self._loss(logits, inputs, None)
            atoms = self._atoms(logits)
            losses = negative_log_likelihood(logits.float(), returns.unsqueeze(-1).expand(mask.shape), atoms)
            expected = expected_return(logits, atoms)
        return loss, (expected, losses), (returns, mask.long())

    def _logits(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Value logits [rows, time(, atoms)]."""
        forward = {name: inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids")}
        logits = model(**forward, trunk=self.trunk).float()
        return unpack(logits, inputs["lengths"]) if "lengths" in inputs else logits

    def _loss(self, logits: Tensor, inputs: dict[str, Any], denominator: Tensor | None) -> Tensor:
        returns, mask, atoms = inputs["returns"], inputs["mask"], self._atoms(logits)
        if atoms is None:
            return bernoulli_loss(logits, returns, mask, self.args.reduction, denominator)
        return categorical_loss(logits, returns, atoms, mask, self.args.reduction, denominator)

    def _atoms(self, like: Tensor) -> Tensor | None:
        atoms = self.accelerator.unwrap_model(self.model).atoms
        return None if atoms is None else atoms.to(like.device)

    def _metrics(self, prediction: Any) -> dict[str, float]:
        expected, losses = prediction.predictions
        returns, mask = prediction.label_ids
        labelled = mask == 1  # the padding between batches is -100
        order = np.cumsum(labelled, 1) - 1
        position = order / labelled.sum(1, keepdims=True).clip(1)
        spread = np.broadcast_to(returns[:, None], labelled.shape)
        tokens = tuple(array[labelled].astype(np.float64) for array in (expected, losses, spread))
        self.by_position = metrics_by_position(tokens[0], tokens[1], tokens[2], position[labelled])
        return value_metrics(tokens[0], tokens[1], tokens[2])

    def save(self, folder: str | Path) -> None:
        """The value model as an ordinary folder, adapters merged, with what made it in `training.json`; call it on all
        ranks."""
        model = self.accelerator.unwrap_model(self.model)
        if hasattr(model.backbone, "merge_and_unload"):
            model.backbone = model.backbone.merge_and_unload()
        weights = (  # of all ranks together
            self.model_wrapped._zero3_consolidated_16bit_state_dict()  # whether or not the launcher thought of saving
            if is_deepspeed_zero3_enabled()
            else self.accelerator.get_state_dict(self.model_wrapped)
        )
        if not self.args.should_save:
            return
        model.save_pretrained(folder, state_dict=weights)
        arguments = {
            name: value for name, value in self.args.to_dict().items() if isinstance(value, (int, float, str, bool))
        }
        write_json(
            Path(folder) / "training.json",
            {
                "versions": versions(),
                "arguments": arguments,
                "log": [defined(entry) for entry in self.state.log_history],
                "by_position": [defined(entry) for entry in self.by_position],
            },
        )


def defined(metrics: dict[str, float]) -> dict[str, float]:
    """Without what is NaN, as the AUC of a tenth whose returns are all equal: JSON has no word for it."""
    return {name: value for name, value in metrics.items() if not isinstance(value, float) or math.isfinite(value)}
