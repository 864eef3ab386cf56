"""Two steps of plain language modelling on the embedded model; the launcher decides on how many ranks and under what ZeRO.

accelerate launch --use_deepspeed --zero_stage 2 --num_processes 2 tests/trainers/zero_language_model.py OUT
"""

import json
import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from posttrain.data import arithmetic
from posttrain.data.prompts import messages_for, render
from posttrain.models.load import load_model
from posttrain.pipelines.ranks import leave, part


def main(out: Path) -> None:
    arguments = TrainingArguments(
        str(out),
        max_steps=2,
        per_device_train_batch_size=2,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
    )
    policy = load_model("tiny", device="cpu")
    texts = [render(policy.tokenizer, messages_for(row, "{problem}")) for row in arithmetic.rows(16, "train", 0)]
    shortest = min(map(len, texts))
    batch = [{"input_ids": torch.tensor(ids[:shortest]), "labels": torch.tensor(ids[:shortest])} for ids in texts]
    before = {name: weight.detach().clone() for name, weight in policy.model.named_parameters()}
    trainer = Trainer(policy.model, arguments, train_dataset=batch)
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_world_process_zero():
        report = {
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "ranks": trainer.args.world_size,
            "engine": type(trainer.model_wrapped).__name__,
            "zero_stage": trainer.model_wrapped.zero_optimization_stage(),
            "moved": sum(not torch.equal(weight, before[name]) for name, weight in model.named_parameters()),
        }
        (out / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    part()
    leave(0)
