"""Trains a policy by DQO: soft actor-critic over tokens, offline, on transformers' Trainer (objectives/dqo.py).

Policy and value model are one module: one forward, one optimizer with a learning rate each, one checkpoint. The returns, weights
and values that a loss holds fixed are those of the same forward, before either model is stepped.
"""

import copy
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict
from uuid import uuid4

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from transformers import ProgressCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import get_last_checkpoint

from posttrain.errors import UserError
from posttrain.models.actor_critic import ActorCritic, decoder, merged
from posttrain.models.value import ValueModel, vocabulary_hash
from posttrain.objectives.dqo import (
    importance_weights,
    kl_rewards,
    label_count,
    lambda_returns,
    policy_loss,
    value_loss,
)
from posttrain.provenance import hash_json, versions, write_json
from posttrain.trainers.dqo_card import write_dqo_card
from posttrain.trainers.dqo_examples import Example
from posttrain.trainers.dqo_metrics import measure
from posttrain.trainers.resumable import Resumable

ADAPTERS = "adapters.safetensors"  # of a checkpoint: all that is trained, where the rest is frozen
LAUNCH = "launch.json"  # of a checkpoint: the processes that wrote it
SHOWN = {
    "explained_variance": "explained",
    "kl": "KL",
    "ess": "effective",
}  # what says whether it goes well, beside the bar
REFERENCE_TOLERANCE = 1e-3  # nats per token, in float32: what kernels and batches may change


class Labelled(TypedDict):
    """A completion to learn from. input_ids: prompt and completion; first: index of the completion's first token; the rest
    is of the completion's tokens: rewards r_h, ref_logprobs log pi_ref, and logprobs log mu under the law that sampled them.
    ended: the last of them is the end token.
    """

    input_ids: list[int]
    first: int
    rewards: list[float]
    ref_logprobs: list[float]
    logprobs: list[float]
    ended: bool


@dataclass
class DQOConfig(TrainingArguments):
    """Arguments of transformers' Trainer, and what is DQO's own."""

    beta: float = field(default=0.03, metadata={"help": "KL coefficient, in units of the reward"})
    lam: float = field(
        default=1.0, metadata={"help": "of the lambda-returns; 1, the reported choice, never bootstraps"}
    )
    importance_cap: float | None = field(
        default=math.e, metadata={"help": "cap of a completion's weight pi / mu; none: every completion counts 1"}
    )
    normalisation: str = field(
        default="token", metadata={"help": "token: mean over all tokens; seq: of each completion first"}
    )
    full_gradient: bool = field(
        default=False, metadata={"help": "differentiate the returns through later tokens' log-probabilities too"}
    )
    learning_rate: float = field(default=5e-7, metadata={"help": "of the policy"})
    value_learning_rate: float = field(default=1e-5, metadata={"help": "of the value model: ahead of the policy"})
    critic_warmup_steps: int = field(default=0, metadata={"help": "steps in which only the value model learns"})
    adam_beta2: float = field(default=0.95, metadata={"help": "of AdamW"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    num_train_epochs: float = field(default=1, metadata={"help": "passes over the completions"})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "completions per forward"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "of both learning rates"})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "batches of similar length: little padding"}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "look for parameters without gradient; the losses reach all, at first at weight 0"},
    )
    packing: bool = field(
        default=False, metadata={"help": "rows one after the other without padding; for flash attention"}
    )
    value_layers: int | None = field(
        default=None, metadata={"help": "so many of the value model's last layers learn, and its head; default: all"}
    )
    report_to: Any = field(default="none", metadata={"help": "where to log: none, tensorboard, wandb, ..."})
    save_total_limit: int | None = field(default=2, metadata={"help": "how many checkpoints to keep"})

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise UserError(f"beta: must be positive and finite, got {self.beta}")
        if not 0 <= self.lam <= 1:
            raise UserError(f"lam: must be between 0 and 1, got {self.lam}")
        if self.importance_cap is not None and not self.importance_cap > 0:
            raise UserError(f"importance_cap: must be positive, got {self.importance_cap}; leave it out for no weights")
        if self.normalisation not in ("token", "seq"):
            raise UserError(f"normalisation: must be token or seq, got {self.normalisation!r}")
        if self.critic_warmup_steps < 0:
            raise UserError(f"critic_warmup_steps: must not be negative, got {self.critic_warmup_steps}")
        if self.value_layers is not None and self.value_layers < 0:
            raise UserError(f"value_layers: must not be negative, got {self.value_layers}")
        self.remove_unused_columns = False
        super().__post_init__()

    @property
    def device(self) -> torch.device:
        """A processor without the number that accelerate gives it on each rank, and torch's loader of checkpoints does not know."""
        found = super().device
        return torch.device("cpu") if found.type == "cpu" else found


def collate(examples: Sequence[Labelled]) -> dict[str, Tensor]:
    """A right-padded batch, all [rows, time]: input_ids, attention_mask, `actions` (bool, the completions' tokens), and the
    tokens' rewards and log-probabilities, NaN wherever there is none; and `ended` [rows]."""
    rows = [torch.tensor(example["input_ids"]) for example in examples]
    lengths = torch.tensor([len(row) for row in rows])
    time = torch.arange(int(lengths.max()))
    first = torch.tensor([example["first"] for example in examples])
    batch = {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": (time < lengths[:, None]).long(),
        "ended": torch.tensor([example["ended"] for example in examples]),
        "actions": (time >= first[:, None]) & (time < lengths[:, None]),
    }
    for name in ("rewards", "ref_logprobs", "logprobs"):
        columns = [torch.tensor([math.nan] * example["first"] + example[name]) for example in examples]
        batch[name] = pad_sequence(columns, batch_first=True, padding_value=math.nan)
    return batch


class EpochOrder(Sampler):
    """An epoch's order, a function of seed and epoch alone: every rank has the same, and a resumed training finds it again.

    group: completions of similar length stand within so many, which one step takes; 0: no grouping. epoch: says which one it is.
    """

    def __init__(self, lengths: Sequence[int], group: int, seed: int, epoch: Callable[[], int]) -> None:
        self.lengths, self.group, self.seed, self.epoch = lengths, group, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch())) % 2**63)
        if self.group:
            return iter(get_length_grouped_indices(self.lengths, self.group, generator=generator))
        return iter(torch.randperm(len(self.lengths), generator=generator).tolist())


class DQOProgress(ProgressCallback):
    """transformers' progress bar, with the numbers of `SHOWN` beside it instead of all in a line of their own."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        shown = {title: f"{logs[name]:.3g}" for name, title in SHOWN.items() if logs and name in logs}
        if state.is_world_process_zero and self.training_bar is not None and shown:
            self.training_bar.set_postfix(shown)


class DQOTrainer(Resumable):
    """train_dataset: completions as `Labelled`, their reference log-probabilities computed by `reference_logprobs`.

    peft_config, value_peft_config: LoRA on the policy, and on the value model's backbone, instead of full fine-tuning; compute
    the reference log-probabilities first, from the policy without adapters. `save` merges them. With both, the value model
    may stand on the policy's own weights (`new_critic(..., shared=True)`).
    Under ZeRO-3 make the models before the arguments: once they are there, transformers shards whatever is loaded.
    Errors: UserError for adapters under ZeRO-3 or with dropout, and where only one model on shared weights has them.

    What it logs, besides the losses: `dqo_metrics.measure`, means over batches and ranks.
    """

    def __init__(
        self,
        model: ActorCritic,
        args: DQOConfig,
        train_dataset: Sequence[Labelled],
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any = None,
        value_peft_config: Any = None,
    ) -> None:
        _adapt(model, peft_config, value_peft_config, args.seed)
        if args.value_layers is not None:
            _freeze_below(model.critic, args.value_layers)
        model.packing = args.packing
        if processing_class is not None:
            model.critic.config.vocabulary = vocabulary_hash(processing_class)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=collate,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        if self.pop_callback(ProgressCallback):
            self.add_callback(DQOProgress)
        self.model_accepts_loss_kwargs = True  # the losses divide by the counts of the whole step themselves
        self._measured: list[dict[str, float]] = []
        self._checked = False
        self._universal = False
        if self.is_deepspeed_enabled and "optimizer" in self.accelerator.state.deepspeed_plugin.deepspeed_config:
            raise UserError(
                "deepspeed: its configuration names an optimizer, which knows one learning rate for policy and value model; "
                "leave it out"
            )

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """resume_from_checkpoint: written by as many processes or by others, as long as a step takes as many completions; with
        DeepSpeed or without, in the same ZeRO stage, of which stage 3 goes on with as many alone. Errors: UserError where it was not."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            self._take_over(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _launch(self) -> dict[str, Any]:
        """zero_stage: None without DeepSpeed; completions: that a step takes on all ranks together."""
        args = self.args
        return {
            "ranks": args.world_size,
            "zero_stage": self.accelerator.state.deepspeed_plugin.zero_stage if self.is_deepspeed_enabled else None,
            "completions": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        }

    def _take_over(self, checkpoint: Path) -> None:
        there, here = launch_of(checkpoint), self._launch()
        if there["zero_stage"] != here["zero_stage"]:
            ways = [
                f"under ZeRO-{stage}" if stage is not None else "without DeepSpeed"
                for stage in (there["zero_stage"], here["zero_stage"])
            ]
            raise UserError(
                f"resume_from_checkpoint: {checkpoint} was written {ways[0]}, and this training runs {ways[1]}; launch it as it was"
            )
        if there["completions"] != here["completions"]:
            raise UserError(
                f"per_device_train_batch_size: a step of {checkpoint} takes {there['completions']} completions, one of this launch "
                f"{here['completions']}; change it or gradient_accumulation_steps"
            )
        if here["zero_stage"] == 3 and there["ranks"] != here["ranks"]:
            raise UserError(
                f"launch: {checkpoint} was written by {there['ranks']} processes under ZeRO-3, and goes on with as many, not with "
                f"{here['ranks']}"
            )
        if here["zero_stage"] is not None and there["ranks"] != here["ranks"]:
            with self.args.main_process_first(local=False):
                if self.args.process_index == 0:
                    _make_universal(checkpoint)
            self.accelerator.state.deepspeed_plugin.deepspeed_config["checkpoint"] = {"load_universal": True}
            self._universal = True

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """After a universal checkpoint, from which DeepSpeed may give all groups the settings of the first, each has its own."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._universal:
            rates = self.lr_scheduler.get_last_lr()
            for group, decay, rate in zip(self.optimizer.param_groups, self._decays, rates, strict=True):
                group.update(weight_decay=decay, lr=rate)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        args, strategy = self.args, self.args.train_sampling_strategy
        if strategy not in ("random", "group_by_length"):
            return super()._get_train_sampler(train_dataset)
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        lengths = [len(example["input_ids"]) for example in train_dataset or self.train_dataset]
        seed = args.seed if args.data_seed is None else args.data_seed
        group = step if strategy == "group_by_length" else 0
        return EpochOrder(lengths, group, seed, lambda: int(self.state.epoch or 0))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The usual one, with the value model in groups of its own."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        critic = set(map(id, self.accelerator.unwrap_model(self.model).critic.parameters()))
        for group in list(optimizer.param_groups):
            own = [parameter for parameter in group["params"] if id(parameter) in critic]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in critic]
            if own:
                optimizer.add_param_group({**group, "params": own, "lr": self.args.value_learning_rate})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        self._decays = [group["weight_decay"] for group in optimizer.param_groups]
        return optimizer

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Tensor]:
        """A step's micro-batches, and how many tokens (or completions) they have on all ranks together."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = (label_count(batch["actions"], self.args.normalisation) for batch in batches)
        count = sum(counts, start=torch.zeros((), dtype=torch.long))
        return batches, self.accelerator.gather(count.to(device)).sum()

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """On the device, in float32 under DeepSpeed too, whose precision would round the reference's log-probabilities."""
        return {name: tensor.to(self.args.device) for name, tensor in inputs.items()}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        args, mask = self.args, inputs["actions"]
        found = model(inputs["input_ids"], mask, inputs["attention_mask"])
        logprobs, values = (torch.zeros_like(inputs["rewards"]).masked_scatter(mask, flat) for flat in found)
        ref, rewards = inputs["ref_logprobs"], inputs["rewards"]
        if not self._checked and self.state.global_step == 0:
            self._check_reference(logprobs, ref, mask)
        weights = None
        if args.importance_cap is not None:
            weights = importance_weights(logprobs, inputs["logprobs"], mask, args.importance_cap)
        with torch.set_grad_enabled(args.full_gradient and torch.is_grad_enabled()):
            paid = kl_rewards(logprobs, ref, rewards, mask, args.beta)
            returns = lambda_returns(paid, values, mask, args.lam)
        shared = (weights, args.normalisation)
        of_values = value_loss(values, returns, mask, *shared, num_items_in_batch)
        of_policy = policy_loss(
            logprobs, ref, values, rewards, returns, mask, args.beta, *shared, args.full_gradient, num_items_in_batch
        )
        found_here = (logprobs, ref, values, rewards, returns, mask, inputs["ended"], weights, args.importance_cap)
        self._measured.append(measure(*found_here))
        warm = self.state.global_step >= args.critic_warmup_steps
        loss = of_values + (of_policy if warm else 0 * of_policy)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over ranks
        return (loss, found) if return_outputs else loss

    def _check_reference(self, logprobs: Tensor, ref: Tensor, mask: Tensor) -> None:
        """Before the first step policy and reference are the same model: what differs came from another kernel, template,
        or temperature, and would be learned from."""
        gap = (logprobs.detach() - ref)[mask].abs().max() if mask.any() else ref.new_zeros(())
        widest = float(self.accelerator.gather(gap.reshape(1)).max())  # all ranks stop, or none
        tolerance = REFERENCE_TOLERANCE if not (self.args.bf16 or self.args.fp16) else 100 * REFERENCE_TOLERANCE
        if not widest < tolerance:
            raise UserError(
                f"ref_logprobs: a token's differs by {widest:.3g} nats from that of the policy before its first step; compute "
                f"them anew with this model, in this precision{', or leave out packing' if self.args.packing else ''}"
            )
        self._checked = True

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With the mean, over ranks too, of what was measured since the last time."""
        if self._measured and "loss" in logs:
            here = torch.tensor([list(values.values()) for values in self._measured], device=self.args.device)
            means = self.accelerator.gather(here).nanmean(0).tolist()  # every rank measured as often
            logs.update(
                (name, mean) for name, mean in zip(self._measured[0], means, strict=True) if not math.isnan(mean)
            )
            self._measured.clear()
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A folder of the weights as they are now, of all ranks together; call it on all of them. Inside a checkpoint a
        frozen base is left out."""
        if _internal_call and self.args.should_save:
            write_json(Path(output_dir or self.args.output_dir) / LAUNCH, self._launch())
        if not _internal_call or not self._frozen() or is_deepspeed_zero3_enabled():
            self._save(output_dir, self._gathered())
        elif self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(
                {name: weight.detach().contiguous() for name, weight in self._trained().items()}, folder / ADAPTERS
            )
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _trained(self) -> dict[str, Tensor]:
        model = self.accelerator.unwrap_model(self.model)
        return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

    def _frozen(self) -> bool:
        return not all(weight.requires_grad for weight in self.accelerator.unwrap_model(self.model).parameters())

    def _gathered(self) -> dict[str, Tensor] | None:
        """All weights, where a rank has but a part of them: whether or not the launcher thought of saving."""
        return self.model_wrapped._zero3_consolidated_16bit_state_dict() if is_deepspeed_zero3_enabled() else None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The policy in the folder itself, the value model in `critic`, adapters merged, safetensors both."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model)
        parts = ((folder, model.policy, "policy."), (folder / "critic", model.critic, "critic."))
        for place, part, prefix in parts:
            own = None
            if state_dict is not None:
                own = {
                    name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)
                }
            merged(part).save_pretrained(place, state_dict=own)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = self.accelerator.unwrap_model(model or self.model)
        folder = Path(resume_from_checkpoint)
        if self._frozen():
            weights = load_file(folder / ADAPTERS) if (folder / ADAPTERS).is_file() else {}
            if weights.keys() != self._trained().keys():
                raise UserError(f"resume_from_checkpoint: {folder} is not a checkpoint of these adapters")
            model.load_state_dict(weights, strict=False)
            return
        for place, part in ((folder, model.policy), (folder / "critic", model.critic)):
            weights = {
                name: value
                for file in sorted(place.glob("model*.safetensors"))
                for name, value in load_file(file).items()
            }
            missing, unexpected = part.load_state_dict(weights, strict=False)
            tied = set(getattr(part, "_tied_weights_keys", None) or ())
            if unexpected or set(missing) - tied:
                raise UserError(f"resume_from_checkpoint: {place} is not a checkpoint of this model")
        if hasattr(model.policy, "tie_weights"):
            model.policy.tie_weights()

    def save(self, folder: str | Path) -> None:
        """The policy as an ordinary folder, with its value model in `critic` and what made it in `training.json`; call it on
        all ranks."""
        self._save(str(folder), self._gathered())
        if not self.args.should_save:
            return
        arguments = {
            name: value for name, value in self.args.to_dict().items() if isinstance(value, (int, float, str, bool))
        }
        log = [{name: value for name, value in entry.items() if value == value} for entry in self.state.log_history]
        write_json(Path(folder) / "training.json", {"versions": versions(), "arguments": arguments, "log": log})
        self.create_model_card(output_dir=folder)

    def create_model_card(self, *_: Any, output_dir: str | Path | None = None, **__: Any) -> None:
        """What the hub shows of the policy; transformers, which calls this before a push, would name no method."""
        if self.is_world_process_zero():
            names = DQOConfig.__annotations__.keys() - {"report_to", "save_total_limit"}
            settings = {name: value for name, value in self.args.to_dict().items() if name in names}
            policy = self.accelerator.unwrap_model(self.model).policy
            base = getattr(policy.config, "_name_or_path", "") or "a model without name"
            write_dqo_card(output_dir or self.args.output_dir, base, settings)


def launch_of(checkpoint: str | Path) -> dict[str, Any]:
    """What wrote a checkpoint: its `ranks`, `zero_stage`, and the `completions` of a step. Errors: UserError where it does not say."""
    file = Path(checkpoint) / LAUNCH
    if not file.is_file():
        raise UserError(f"resume_from_checkpoint: {checkpoint} has no {LAUNCH}; it is not a checkpoint of this trainer")
    return json.loads(file.read_text(encoding="utf-8"))


def _make_universal(checkpoint: Path) -> None:
    """DeepSpeed's own conversion of a checkpoint, whose parts are its ranks', into one by parameter, for any number of them."""
    step = (checkpoint / "latest").read_text().strip()
    whole = checkpoint / f"{step}_universal"
    shutil.rmtree(whole, ignore_errors=True)  # of a conversion that was interrupted
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    done = subprocess.run(
        [*command, "--input_folder", str(checkpoint / step), "--output_folder", str(whole)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        reason = (done.stderr.splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"resume_from_checkpoint: {checkpoint} cannot be converted for another number of processes ({reason[:200]}); "
            "launch as many as wrote it"
        )


def _adapt(model: ActorCritic, peft_config: Any, value_peft_config: Any, seed: int) -> None:
    given = {"peft_config": peft_config, "value_peft_config": value_peft_config}
    for name, config in given.items():
        if config is not None and is_deepspeed_zero3_enabled():
            raise UserError(f"{name}: adapters cannot be merged under ZeRO-3; use ZeRO-2")
        if getattr(config, "lora_dropout", 0):
            raise UserError(f"{name}: lora_dropout must be 0, got {config.lora_dropout}; it makes the log-ratios noise")
    theirs = set(map(id, model.policy.parameters()))
    if None in given.values() and any(id(weight) in theirs for weight in model.critic.backbone.parameters()):
        name = next(name for name, config in given.items() if config is None)
        raise UserError(f"{name}: policy and value model have the same weights, so that each needs adapters of its own")
    if peft_config is None and value_peft_config is None:
        return
    from peft import get_peft_model

    set_seed(seed)
    # Copies: peft writes the names of the modules that it found into a configuration, and the two models' differ.
    if peft_config is not None:
        model.policy = get_peft_model(model.policy, copy.deepcopy(peft_config))
    if value_peft_config is not None:
        model.critic.backbone = get_peft_model(model.critic.backbone, copy.deepcopy(value_peft_config))


def _freeze_below(critic: ValueModel, layers: int) -> None:
    """Nothing below the value model's last layers learns, adapters there neither: no backward goes that far down."""
    body = decoder(critic.backbone)
    if layers > len(body.layers):
        raise UserError(f"value_layers: the value model has {len(body.layers)} layers, fewer than {layers}")
    for module in (body.get_input_embeddings(), *body.layers[: len(body.layers) - layers]):
        module.requires_grad_(False)


def labelled(
    model: ActorCritic, examples: Sequence[Example], fingerprint: str, cache: Path, batch_size: int = 16
) -> list[Labelled]:
    """Examples with their reference log-probabilities, which are kept in the folder `cache` by what they are of.

    model: before its first step; fingerprint: of its policy, which is the reference.
    """
    dtype = str(next(model.policy.parameters()).dtype)
    key = hash_json([fingerprint, dtype, [[example["input_ids"], example["first"]] for example in examples]])
    path = cache / f"reference-{key[:16]}.safetensors"
    counts = [len(example["input_ids"]) - example["first"] for example in examples]
    if path.is_file():
        flat = load_file(path)["logprobs"]
    else:
        flat = torch.cat([torch.tensor(values) for values in reference_logprobs(model, examples, batch_size)])
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{uuid4().hex}.partial")  # every rank may write it, of every machine
        save_file({"logprobs": flat}, partial)
        partial.replace(path)
    found: list[Labelled] = []
    for example, ref in zip(examples, flat.split(counts), strict=True):
        logprobs = ref.tolist()
        behaviour = example["behaviour_logprobs"]
        rewards = list(example["process_rewards"] or [0.0] * len(logprobs))
        rewards[-1] += example["reward"]
        found.append(
            {
                "input_ids": example["input_ids"],
                "first": example["first"],
                "rewards": rewards,
                "ref_logprobs": logprobs,
                "logprobs": logprobs if behaviour is None else behaviour,
                "ended": not example["truncated"],
            }
        )
    return found


@torch.no_grad()
def reference_logprobs(model: ActorCritic, examples: Sequence[Any], batch_size: int = 16) -> list[list[float]]:
    """log pi_ref of every completion's tokens, by the kernel that training uses. model: before its first step."""
    model.eval()
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    found: list[list[float]] = [[] for _ in examples]
    device = next(model.parameters()).device
    for start in range(0, len(order), batch_size):
        part = [examples[i] for i in order[start : start + batch_size]]
        batch = collate([_unlabelled(example["input_ids"], example["first"]) for example in part])
        mask = batch["actions"].to(device)
        flat, _ = model(batch["input_ids"].to(device), mask, batch["attention_mask"].to(device))
        counts = mask.sum(-1).tolist()
        for i, values in zip(order[start : start + batch_size], flat.cpu().split(counts), strict=True):
            found[i] = values.tolist()
    return found


def _unlabelled(ids: list[int], first: int) -> Labelled:
    zeros = [0.0] * (len(ids) - first)
    return {
        "input_ids": ids,
        "first": first,
        "rewards": zeros,
        "ref_logprobs": zeros,
        "logprobs": zeros,
        "ended": False,
    }
