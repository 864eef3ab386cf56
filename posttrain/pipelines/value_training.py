"""From rollout tables to a saved value model: once, and from where an interrupted training stood."""

import itertools
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from posttrain.config import within
from posttrain.errors import UserError
from posttrain.models.load import Policy
from posttrain.models.value import Head, base_fingerprint, new_value_model
from posttrain.pipelines.checkpoints import last_checkpoint
from posttrain.pipelines.ranks import Ranks, release
from posttrain.provenance import hash_json, plain, read_json, versions, write_json
from posttrain.rollouts.collect import reserved
from posttrain.rollouts.table import RolloutTable

MADE_BY = "made_by.json"
METRICS = (
    "loss",
    "auc",
    "calibration_error",
    "explained_variance",
    "pairs_right",
)  # those of its loss, without those that held-out prompts leave undefined


@dataclass(frozen=True)
class ValueTraining:
    """What a value model is, and how it is trained; defaults of training: the released code's."""

    head: Head = field(default="v", metadata={"help": "v, q or shared"})
    base: str | None = field(
        default=None,
        metadata={"help": "what the value model starts from; default: the policy", "fingerprint": base_fingerprint},
    )
    layers: int | None = field(default=None, metadata={"help": "only so many of the base's layers"})
    atoms: tuple[float, ...] | None = field(default=None, metadata={"help": "of the return; default: right or wrong"})
    zero_init: bool = field(default=True, metadata={"help": "the head starts at zero: no guidance"})
    learning_rate: float = field(default=2e-5, metadata={"help": "of the backbone, AdamW"})
    head_learning_rate: float | None = field(default=None, metadata={"help": "of the head; default: learning_rate"})
    epochs: float = field(default=5.0, metadata={"help": "passes over the completions"})
    batch_size: int = field(default=32, metadata={"help": "completions, or pairs of ipl, per step and device"})
    weight_decay: float = field(default=0.01, metadata={"help": "of AdamW"})
    loss: Literal["likelihood", "ipl"] = field(
        default="likelihood", metadata={"help": "likelihood of the return; ipl: better preferred to worse completions"}
    )
    reduction: Literal["row", "token"] = field(
        default="row", metadata={"help": "mean of each completion first, or over all tokens"}
    )
    bf16: bool = field(default=False, metadata={"help": "bfloat16 forward; weights stay float32"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "less memory, a second forward"})
    packing: bool = field(default=False, metadata={"help": "no padding; for flash attention"})
    lora_rank: int | None = field(default=None, metadata={"help": "LoRA on the backbone; default: full fine-tuning"})
    eval_fraction: float = field(default=0.1, metadata={"help": "share of the prompts that is held out"})
    drop_unanimous: bool = field(default=True, metadata={"help": "leave out prompts whose completions all agree"})

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epochs", "batch_size"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}: must be positive, got {getattr(self, name)}")
        if not 0 < self.eval_fraction < 1:
            raise UserError(f"eval_fraction: must be between 0 and 1, got {self.eval_fraction}")
        for name in ("head_learning_rate", "layers", "lora_rank"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name}: must be positive, got {value}; leave it out for the default")
        for name in ("base", "layers", "lora_rank"):
            if self.head == "shared" and getattr(self, name) is not None:
                raise UserError(f"{name}: a shared head has no backbone of its own; leave it out, or take head v or q")
        if self.head == "shared" and self.gradient_checkpointing:
            raise UserError("gradient_checkpointing: a shared head has no backbone of its own; leave it out")
        if self.loss == "ipl":
            if self.head == "v":
                raise UserError(
                    "head: must be q or shared with loss ipl: a v head has no V beside its values of tokens"
                )
            if self.atoms is not None:
                raise UserError("atoms: are of returns, and loss ipl learns from preferences; leave it out")
            if self.reduction != "row":
                raise UserError("reduction: must be row with loss ipl, whose penalty counts completions alike")
            if not self.drop_unanimous:
                raise UserError("drop_unanimous: must be true with loss ipl: completions that all agree make no pairs")
        if self.atoms is not None and not (
            len(self.atoms) > 1 and all(a < b for a, b in itertools.pairwise(self.atoms))
        ):
            raise UserError(f"atoms: must be at least two increasing numbers, got {list(self.atoms)}")


def train_value(
    policy: Policy,
    tables: Sequence[RolloutTable],
    config: ValueTraining,
    folder: Path,
    seed: int = 0,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Trains a value model from its start and saves it; what was made by the same tables and settings is kept.

    Returns what `made_by.json` says: seconds, the metrics on held-out prompts, and those by position. ranks: those that train,
    all of which call this; default: this process alone, on the policy's device.
    Errors: UserError naming `value` for a folder that something else made, `out` for one that another process trains
    into, `value.FIELD` for what the model says of its configuration, or as the examples say.
    """
    ranks = ranks or Ranks(str(policy.model.device))
    with reserved(folder) if ranks.first else nullcontext():
        return _train(policy, tables, config, folder, seed, ranks)


def _train(
    policy: Policy, tables: Sequence[RolloutTable], config: ValueTraining, folder: Path, seed: int, ranks: Ranks
) -> dict[str, Any]:
    base = []
    if config.base:
        with within("value."):
            base = [base_fingerprint(config.base)]
    settings = plain(config)
    if config.loss == "likelihood":  # named as before there was this choice: trainings go on
        del settings["loss"]
    key = hash_json(
        [
            [table.manifest["shards"] for table in tables],
            policy.fingerprint,
            str(policy.model.dtype),
            seed,
            settings,
            *base,
        ]
    )
    if (folder / MADE_BY).is_file():
        made = read_json(folder / MADE_BY, "value")
        if made["key"] != key:
            raise UserError(
                f"value: {folder} was trained on other completions or with other settings; delete it, or give another out"
            )
        return made
    from peft import LoraConfig  # with the trainer below, seconds of import

    from posttrain.trainers.follow import follow
    from posttrain.trainers.ipl import IPLTrainer
    from posttrain.trainers.value import ValueConfig, ValueTrainer, defined
    from posttrain.trainers.value_examples import examples_of, pairs_of, split_by_prompt

    started = time.perf_counter()
    atoms, preferences = list(config.atoms) if config.atoms else None, config.loss == "ipl"
    examples = examples_of(tables, config.drop_unanimous)
    with within("value."):
        train, held_out = split_by_prompt(examples, config.eval_fraction, seed)
        value = new_value_model(
            policy, config.head, config.base, config.layers, atoms, config.zero_init, seed=seed, preferences=preferences
        )
    scratch = folder.with_name(f"{folder.name}-checkpoints-{hash_json([key, *ranks.launch])[:12]}")
    trainer = (IPLTrainer if preferences else ValueTrainer)(
        value,
        ValueConfig(
            output_dir=str(scratch),
            learning_rate=config.learning_rate,
            head_learning_rate=config.head_learning_rate,
            num_train_epochs=config.epochs,
            per_device_train_batch_size=config.batch_size,
            per_device_eval_batch_size=2 * config.batch_size,
            weight_decay=config.weight_decay,
            reduction=config.reduction,
            bf16=config.bf16,
            gradient_checkpointing=config.gradient_checkpointing,
            packing=config.packing,
            use_cpu=ranks.use_cpu,
            logging_strategy="epoch",
            disable_tqdm=True,
            seed=seed,
        ),
        pairs_of(train) if preferences else train,
        pairs_of(held_out) if preferences else held_out,
        trunk=policy.model if config.head == "shared" else None,
        peft_config=LoraConfig(r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules="all-linear")
        if config.lora_rank
        else None,
    )
    with follow(trainer, folder) as clock:
        trainer.train(resume_from_checkpoint=last_checkpoint(scratch))
    metrics = {name.removeprefix("eval_"): float(number) for name, number in trainer.evaluate().items()}
    trainer.save(folder)
    release(trainer)
    made = {
        "key": key,
        "policy": policy.fingerprint,
        "config": plain(config),
        "seed": seed,
        "completions": {"train": len(train), "held_out": len(held_out)},
        "metrics": defined({name: metrics[name] for name in METRICS if name in metrics}),
        "by_position": [defined(entry) for entry in trainer.by_position],
        "seconds": clock.earlier + time.perf_counter() - started,
        "processes": trainer.args.world_size,
        "versions": versions(),
    }
    if ranks.first:
        write_json(folder / MADE_BY, made)
        shutil.rmtree(scratch, ignore_errors=True)
    return made
