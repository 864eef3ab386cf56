"""What DQO is measured against, through TRL's trainers and on the same completions: rejection sampling, DPO and KTO.

TRL's preference trainers take text and tokenise it, which need not give back the ids that were sampled. Here every method learns
from the ids themselves.
"""

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from posttrain.errors import UserError
from posttrain.trainers.dqo_examples import Example

Method = Literal["rejection", "dpo", "kto"]
SAVE_STEPS = 50
IGNORED = -100  # the label of a token that is not learned


@dataclass(frozen=True)
class BaselineTraining:
    """How a baseline is trained; the defaults are the embedded model's."""

    learning_rate: float = field(default=3e-4, metadata={"help": "AdamW"})
    beta: float = field(default=0.1, metadata={"help": "KL coefficient of DPO and KTO; rejection sampling has none"})
    epochs: float = field(default=2.0, metadata={"help": "passes over the completions, or over the pairs of them"})
    batch_size: int = field(default=32, metadata={"help": "completions or pairs per forward and device"})
    accumulation: int = field(default=1, metadata={"help": "forwards per step"})
    bf16: bool = field(default=False, metadata={"help": "bfloat16 forward; weights stay float32"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "less memory, a second forward"})

    def __post_init__(self) -> None:
        for name in ("learning_rate", "beta", "epochs", "batch_size", "accumulation"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}: must be positive, got {getattr(self, name)}")


def right_rows(examples: Sequence[Example]) -> list[dict[str, list[int]]]:
    """Rejection sampling: the completions that came out right. Errors: UserError naming `reward` when none did."""
    rows = []
    for example in filter(is_right, examples):
        ids, first = example["input_ids"], example["first"]
        rows.append({"input_ids": ids, "labels": [IGNORED] * first + ids[first:]})
    if not rows:
        raise UserError("reward: no completion is right, and rejection sampling learns from those alone; sample more")
    return rows


def pair_rows(examples: Sequence[Example]) -> list[dict[str, list[int]]]:
    """DPO: of every prompt its best completion with its worst, the second best with the second worst, ... while they differ.

    Errors: UserError naming `reward` when no prompt has two that differ.
    """
    by_prompt: dict[str, list[Example]] = {}
    for example in examples:
        by_prompt.setdefault(example["prompt_id"], []).append(example)
    rows = []
    for group in by_prompt.values():
        ranked = sorted(group, key=lambda example: -example["reward"])
        for best, worst in zip(ranked[: len(ranked) // 2], reversed(ranked), strict=False):
            if best["reward"] > worst["reward"]:
                (prompt, chosen), (_, rejected) = split(best), split(worst)
                rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    if not rows:
        raise UserError(
            "reward: no prompt has a better and a worse completion, and DPO learns from such pairs alone; "
            "sample more of each prompt, or leave dpo out"
        )
    return rows


def judged_rows(examples: Sequence[Example], batch_size: int, seed: int) -> list[dict[str, Any]]:
    """KTO: every completion with what it was, in an order drawn by the seed.

    KTO's KL estimate needs completions of other prompts: as in TRL, that of the row before within the forward's batch.
    Errors: UserError naming `reward` unless there are right ones and wrong ones, `batch_size` when a batch has no other row.
    """
    if batch_size < 2:
        raise UserError("batch_size: KTO compares completions within a forward; it must be at least 2")
    if len(set(map(is_right, examples))) < 2:
        raise UserError("reward: the completions are all right or all wrong, and KTO learns from the difference")
    rows = []
    for example in random.Random(seed).sample(examples, len(examples)):
        prompt, completion = split(example)
        rows.append({"prompt_ids": prompt, "completion_ids": completion, "label": is_right(example)})
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        for i, row in enumerate(batch):
            row["KL_completion_ids"] = batch[i - 1]["completion_ids"]
    return rows


def rejection_trainer(
    model: Any, tokenizer: Any, examples: Sequence[Example], settings: BaselineTraining, folder: Path, seed: int = 0
) -> Any:
    """TRL's SFTTrainer on the right completions. Errors: as `right_rows`."""
    return sft_trainer(model, tokenizer, right_rows(examples), settings, folder, seed)


def sft_trainer(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, list[int]]],
    settings: BaselineTraining,
    folder: Path,
    seed: int = 0,
) -> Any:
    """TRL's SFTTrainer on rows of `input_ids` and `labels`, as `right_rows` and `distil.bon_distill` make them."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(**_arguments(model, settings, folder, seed), train_sampling_strategy="group_by_length")
    return SFTTrainer(model, arguments, train_dataset=Dataset.from_list(list(rows)), processing_class=tokenizer)


def dpo_trainer(
    model: Any, tokenizer: Any, examples: Sequence[Example], settings: BaselineTraining, folder: Path, seed: int = 0
) -> Any:
    """TRL's DPOTrainer on pairs; the reference is the model as it is now. Errors: as `pair_rows`."""
    rows = pair_rows(examples)
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(**_arguments(model, settings, folder, seed), beta=settings.beta)
    return _of_ids(DPOTrainer)(
        model, copy.deepcopy(model), arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


def kto_trainer(
    model: Any, tokenizer: Any, examples: Sequence[Example], settings: BaselineTraining, folder: Path, seed: int = 0
) -> Any:
    """TRL's KTOTrainer on all completions, right and wrong ones weighing the same in sum (arXiv 2402.01306, eq. 8);
    the reference is the model as it is now. Errors: as `judged_rows`."""
    rows = judged_rows(examples, settings.batch_size, seed)
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    right = sum(row["label"] for row in rows)
    arguments = KTOConfig(
        **_arguments(model, settings, folder, seed),
        beta=settings.beta,
        desirable_weight=(len(rows) - right) / right,
    )
    return _of_ids(KTOTrainer)(
        model, copy.deepcopy(model), arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


TRAINERS: dict[Method, Callable[..., Any]] = {
    "rejection": rejection_trainer,
    "dpo": dpo_trainer,
    "kto": kto_trainer,
}


def is_right(example: Example) -> bool:
    return example["reward"] > 0.5


def split(example: Example) -> tuple[list[int], list[int]]:
    """Its prompt and its completion."""
    return example["input_ids"][: example["first"]], example["input_ids"][example["first"] :]


def _of_ids(trainer: type) -> type:
    """A trainer of TRL whose dataset has token ids already, under the names that its collator reads."""
    return type(trainer.__name__, (trainer,), {"_prepare_dataset": lambda self, dataset, *_: dataset})


def _arguments(model: Any, settings: BaselineTraining, folder: Path, seed: int) -> dict[str, Any]:
    """The optimiser is DQO's, so that methods differ in what they learn from and in their loss."""
    return {
        "output_dir": str(folder),
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine",
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulation,
        "bf16": settings.bf16,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "max_length": None,
        "use_cpu": model.device.type == "cpu",
        "logging_steps": 10,
        "save_steps": SAVE_STEPS,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
    }
